"""How fast are loader, training step and Sinkhorn here, and how long does a recipe take?

    python extras/bench.py --model small --batch-size 2
    python extras/bench.py --data k400 --root DIR --model base --batch-size 40
    python extras/bench.py --model base --target dino

Trains nothing and writes nothing. The loader is timed on one core, in process time; the step with
the optimiser, on random clips; Sinkhorn in products of the same scores with a vector.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, find_videos, normalise
from sigma import DINO, SIGMA, SIZES, TARGETS, Teacher, UserError, sinkhorn, sizes_for, tube_mask
from train import autocast, launch, locate, make_optimizer, pick_amp, recipe, set_up

VIDEOS = {"k400": 241_000, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570, "toy": 8_192}


def seconds(work, device, repeat=5):
    """Median time of work(), after one call that does not count."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]


def random_teacher(target, tube):
    """A Teacher of the target's width with random weights: as fast as the real one."""
    width = DINO[target][0]
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width), "norm.weight": (width,),
              "norm.bias": (width,), "patch_embed.proj.weight": (width, 3, 16, 16),
              "patch_embed.proj.bias": (width,)}
    layers = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
              "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
              "mlp.fc2": (width, 4 * width)}
    for n in range(12):
        for name, shape in layers.items():
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
    return Teacher({name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}, tube)


def clips_per_second(clips, limit=10):
    """Clips that one core reads in a second of its time."""
    threads, read = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    clips[0, 0]
    start = time.process_time()
    while time.process_time() - start < limit and read < 1000:
        clips[read, read * 7919 % len(clips)]
        read += 1
    torch.set_num_threads(threads)
    return read * clips.repeat / (time.process_time() - start)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="k400", help="recipe, folder or list (default: k400)")
    parser.add_argument("--root", help="folder of a named set (default: data/<name>)")
    parser.add_argument("--model", choices=SIZES, default="base", help="default: base")
    parser.add_argument("--target", choices=TARGETS, default="mlp", help="default: mlp")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--repeat", type=int, default=1, help="clips from each decoded video")
    parser.add_argument("--amp", choices=["bf16", "fp16", "off"], help="default: on GPUs")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    args = parser.parse_args(argv)
    device, own = set_up(), recipe(args.data, args.model)
    amp, gpu = pick_amp(args.amp, device), device.type == "cuda"
    sizes, batch = sizes_for(args.model, args.target), args.batch_size or own["clips"]
    frames, size, tube = own["frames"], own["size"], sizes["tube"]

    def show(what, value, note=""):
        print(f"{what:26}{value:>18}   {note}", flush=True)

    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    loading = None
    try:
        videos = find_videos(locate(args.data, args.root))
        loading = clips_per_second(Clips(videos, frames=frames, stride=own["stride"], size=size,
                                         tube=tube, ratio=own["ratio"], repeat=args.repeat))
        show("loader, one core", f"{loading:,.1f} clips/s", f"{frames} x {size} x {size}")
    except UserError as error:
        show("loader, one core", "not measured", str(error))
    teacher = random_teacher(args.target, tube).to(device) if args.target in DINO else None
    model = SIGMA(**sizes).to(device)
    grid = (frames // tube[0], size // tube[1], size // tube[2])
    video = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    video, mask = video.pin_memory() if gpu else video, tube_mask(batch, grid, own["ratio"])
    with FlopCounterMode(display=False) as counter:  # of one clip
        clip = normalise(video[:1], device)
        model(clip, mask[:1], teacher(clip) if teacher else None)[0].backward()
    work = counter.get_total_flops()
    for part in (model.encoder, model.decoder):
        part.recompute = args.model in ("large", "huge")
        for block in part.blocks if args.compile else ():
            block.compile()
    optimizer = make_optimizer(model)

    def step():
        clips = normalise(video, device)
        with autocast(amp, device):
            loss, _ = model(clips, mask, teacher(clips) if teacher else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    time_of_step = seconds(step, device)
    rate = batch / time_of_step
    show("training step", f"{rate:,.2f} clips/s", f"{args.model}, {args.target}, batch {batch}, "
         f"{str(amp or torch.float32).removeprefix('torch.')}")
    show("arithmetic", f"{work / 1e9:,.2f} GFLOP/clip", "forward and backward, matrix products")
    side = 8192 if gpu else 4096
    square = torch.randn(side, side, device=device, dtype=amp or torch.float32)
    product = 2 * side ** 3 / seconds(lambda: square @ square, device)
    show("share of matrix product", f"{work * rate / product:.0%}",
         f"of {product / 1e9:,.0f} GFLOP/s, {side} x {side}")
    if teacher:
        share = seconds(lambda: teacher(normalise(video, device)), device) / time_of_step
        show("teacher", f"{share:.0%}", "of the step's time")
    if args.target != "pixel":
        n, k = int(mask.sum()), len(model.prototypes)
        scores, vector = 2 * torch.rand(n, k, device=device) - 1, torch.rand(k, device=device)
        ratio = seconds(lambda: sinkhorn(scores), device) / seconds(lambda: scores @ vector, device)
        show("Sinkhorn", f"{ratio:.0f} products", f"of the {n:,} x {k:,} scores with a vector")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = torch.cuda.max_memory_allocated() if gpu else used
    show("peak memory", f"{used / 2 ** 30:.2f} GiB", "of the GPU" if gpu else "of the process")
    if loading:
        slower = "loader" if loading * max(own["workers"], 1) < rate else "model"
        show("bottleneck", slower, f"with {own['workers']} workers; {rate / loading:.1f} balance")
    if args.data in VIDEOS:
        hours = [VIDEOS[args.data] * own["epochs"] / rate / count / 3600 for count in (1, 8, 64)]
        show("hours of the recipe", " / ".join(f"{h:,.1f}" for h in hours),
             f"on 1 / 8 / 64 such {'GPUs' if gpu else 'machines'}, if the loader keeps up")


if __name__ == "__main__":
    sys.exit(launch(main))
