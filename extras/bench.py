"""How fast are loader, training step, Sinkhorn and teacher here, and how long takes a recipe?

    python extras/bench.py --model small --batch-size 2
    python extras/bench.py --data k400 --root DIR --target dino --batch-size 40 --amp bf16

Trains nothing and writes nothing. The loader's figure is of one core, in its own time; the step's,
of random clips with the optimiser; Sinkhorn's, in products of the same scores with a vector.
"""
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, VideoError, Videos, find_videos, normalise
from sigma import DINO, SIGMA, Encoder, Teacher, UserError, sinkhorn, sizes_for, tube_mask
from train import (autocast, launch, locate, make_optimizer, parser_with, pick_amp, recipe, set_up)

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
    """A Teacher with random weights, as fast as with DINO's."""
    width = DINO[target][0]
    weights = Encoder(dim=width, depth=12, heads=width // 64, tube=(1, 16, 16)).state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0]
    weights |= {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 197, width)}
    return Teacher(weights, tube)


def clips_per_second(clips, limit=10):
    """Clips that one core reads in a second of its time."""
    threads, read, start = torch.get_num_threads(), 0, time.process_time()
    torch.set_num_threads(1)  # as loader workers have
    while time.process_time() - start < limit and read < 1000:
        clips[read, read * 7919 % len(clips)]
        read += 1
    torch.set_num_threads(threads)
    return read / (time.process_time() - start)


def main(argv=None):
    parser = parser_with(__doc__, "data", "root", "model", "target", "batch-size", "amp", "compile")
    parser.set_defaults(data="k400")
    args = parser.parse_args(argv)
    device, model_name = set_up(), args.model or ("tiny" if args.data == "toy" else "base")
    own, sizes = recipe(args.data, model_name), sizes_for(model_name, args.target)
    amp, gpu, batch = pick_amp(args.amp, device), device.type == "cuda", args.batch_size
    batch, size, dtype = batch or own["clips"], own["size"], amp or torch.float32
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; {model_name}, {args.target}, {batch} clips of "
          f"{own['frames']} x {size} x {size}, {dtype}")

    def show(what, value, note=""):
        print(f"{what:26}{value:>18}   {note}", flush=True)

    clips = Clips(Videos(), tube=sizes["tube"], **{name: own[name] for name in (
        "frames", "stride", "size", "ratio")})
    loading = None
    try:
        clips.videos = find_videos(locate(args.data, args.root))
        loading = clips_per_second(clips)
        show("loader, one core", f"{loading:,.1f} clips/s", "of the core's own time")
    except (UserError, VideoError) as error:
        show("loader, one core", "not measured", str(error))

    # The step.
    video = torch.randint(256, (batch, 3, own["frames"], size, size), dtype=torch.uint8)
    video, mask = video.pin_memory() if gpu else video, tube_mask(batch, clips.grid, own["ratio"])
    teacher = random_teacher(args.target, sizes["tube"]).to(device) if args.target in DINO else None
    model = SIGMA(**sizes).to(device)
    with FlopCounterMode(display=False) as counter:  # of one clip, nothing computed twice
        x = normalise(video[:1], device)
        model(x, mask[:1], teacher(x) if teacher else None)[0].backward()
    for part in (model.encoder, model.decoder):
        part.recompute = model_name in ("large", "huge")  # as in training
        for block in part.blocks if args.compile else ():
            block.compile()
    optimizer = make_optimizer(model)

    def step():
        x = normalise(video, device)
        with autocast(amp, device):
            loss, _ = model(x, mask, teacher(x) if teacher else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    spent = seconds(step, device)
    rate, work, side = batch / spent, counter.get_total_flops(), 8192 if gpu else 4096
    show("training step", f"{rate:,.2f} clips/s", f"{work / 1e9:,.1f} GFLOP a clip")
    square = torch.randn(side, side, device=device, dtype=dtype)
    product = 2 * side ** 3 / seconds(lambda: square @ square, device)
    show("share of matrix product", f"{work * rate / product:.0%}",
         f"of {product / 1e9:,.0f} GFLOP/s, {side} x {side}")
    if teacher:
        share = seconds(lambda: teacher(normalise(video, device)), device) / spent
        show("teacher", f"{share:.0%}", "of the step's time")
    if args.target != "pixel":
        n, k = int(mask.sum()), sizes.get("prototypes", 3000)
        scores, vector = 2 * torch.rand(n, k, device=device) - 1, torch.rand(k, device=device)
        ratio = seconds(lambda: sinkhorn(scores), device) / seconds(lambda: scores @ vector, device)
        show("Sinkhorn", f"{ratio:.0f} products", f"of the {n:,} x {k:,} scores with a vector")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if gpu else peak
    show("peak memory", f"{peak / 2 ** 30:.2f} GiB")
    if loading:
        slower = "loader" if loading * max(own["workers"], 1) < rate else "model"
        show("bottleneck", slower, f"with {own['workers']} workers; {rate / loading:.1f} balance")
    hours = VIDEOS.get(args.data, len(clips)) * own["epochs"] / rate / 3600
    show("hours of the recipe", " / ".join(f"{hours / n:,.1f}" for n in (1, 8, 64)),
         "on 1 / 8 / 64 such machines, if the loader keeps up")


if __name__ == "__main__":
    sys.exit(launch(main))
