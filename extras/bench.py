"""How fast are loader, training step, Sinkhorn and teacher here, how long does a recipe take?

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, find_videos, normalise
from sigma import DINO, SIGMA, Encoder, Teacher, UserError, sinkhorn, sizes_for, tube_mask
from train import (DEVICE, GPU, autocast, launch, locate, make_optimizer, parser_with, recipe,
                   set_blocks, set_up)

VIDEOS = {"k400": 241_000, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570, "toy": 8_192}


def seconds(work):
    """Mean time of work(), after calls that do not count."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(5).mean


def random_teacher(width, tube):
    """A Teacher with random weights, as fast as with DINO's."""
    weights = Encoder(dim=width, depth=12, heads=width // 64, tube=(1, 16, 16)).state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0]
    weights |= {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 197, width)}
    return Teacher(weights, tube).to(DEVICE)


def show(what, value, note=""):
    """Prints a line of the table."""
    print(f"{what:26}{value:>18}   {note}", flush=True)


def main(argv=None):
    parser = parser_with(__doc__, "data", "root", "model", "target", "batch-size", "amp", "compile")
    parser.set_defaults(data="k400")
    args = parser.parse_args(argv)
    set_up()
    name = args.model or ("tiny" if args.data == "toy" else "base")
    own, sizes = recipe(args.data, name), sizes_for(name, args.target)
    batch, frames, size = args.batch_size or own["gpu_batch"], own["frames"], own["size"]
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; {name}, {args.target}, {batch} clips of {frames} x "
          f"{size} x {size}, autocast {args.amp}")
    try:
        videos, *_ = find_videos(locate(args.data, args.root))
    except UserError as error:
        if args.data not in VIDEOS:
            raise
        videos = []
        show("loader", "not measured", error)
    clips = Clips(videos, frames=frames, stride=own["stride"], size=size, tube=sizes["tube"])
    video = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    video, mask = video.pin_memory() if GPU else video, tube_mask(batch, clips.grid, own["ratio"])
    model = SIGMA(**sizes).to(DEVICE)
    teacher = random_teacher(sizes["target_dim"], sizes["tube"]) if args.target in DINO else None
    optimizer = make_optimizer(model)

    def step(n=batch):
        x = normalise(video[:n], DEVICE)
        with autocast(args.amp):
            loss, _ = model(x, mask[:n], teacher(x) if teacher else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Fused attention is not counted on a CPU; recomputed blocks would count twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(1)
    set_blocks([*model.encoder.blocks, *model.decoder.blocks], name in ("large", "huge"),
               args.compile)
    spent, work, side = seconds(step), counter.get_total_flops(), 8192 if GPU else 4096
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    rate, square = batch / spent, torch.randn(side, side, device=DEVICE, dtype=dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    peak = torch.cuda.max_memory_allocated() if GPU else peak
    product = 2 * side ** 3 / seconds(lambda: square @ square)  # FLOP/s
    show("training step", f"{rate:,.2f} clips/s", f"{work / 1e9:,.1f} GFLOP a clip")
    show("share of matrix product", f"{work * rate / product:.0%}",
         f"of {product / 1e9:,.0f} GFLOP/s, {side} x {side}")
    if teacher:
        share = seconds(lambda: teacher(normalise(video, DEVICE))) / spent
        show("teacher", f"{share:.0%}", "of the step's time")
    if args.target != "pixel":
        n, k = int(mask.sum()), len(model.prototypes)
        scores, vector = 2 * torch.rand(n, k, device=DEVICE) - 1, torch.rand(k, device=DEVICE)
        ratio = seconds(lambda: sinkhorn(scores)) / seconds(lambda: scores @ vector)
        show("Sinkhorn", f"{ratio:.0f} products", f"of the {n:,} x {k:,} scores with a vector")
    show("peak memory", f"{peak / 2 ** 30:.2f} GiB", "of the step")
    if videos:
        torch.set_num_threads(1)  # as loader workers have
        start, workers = time.process_time(), max(1, own["workers"])
        for i in range(100):
            clips[i, i * 7919 % len(clips)]
        loading = 100 / (time.process_time() - start)
        show("loader, one core", f"{loading:,.1f} clips/s", "of the core's own time")
        show("bottleneck", "loader" if loading * workers < rate else "model",
             f"with {workers} workers; {rate / loading:.1f} balance")
    hours = VIDEOS.get(args.data, len(videos)) * own["epochs"] / rate / 3600
    show("hours of the recipe", " / ".join(f"{hours / n:,.1f}" for n in (1, 8, 64)),
         "on 1 / 8 / 64 such machines, if the loader keeps up")


if __name__ == "__main__":
    sys.exit(launch(main))
