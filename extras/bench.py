"""How fast are loader, training step, Sinkhorn and teacher here, how long does a recipe take, and
will it fit?

    python extras/bench.py --model small --batch-size 2
    python extras/bench.py --data k400 --root DIR --target dino --batch-size 40 --amp bf16
    python extras/bench.py --memory [--data ssv2]       peak memory of all sizes; needs no GPU

Trains nothing, and writes nothing but --out. The loader's speed is that of one core, in its own
time; the step's is that of random clips, with the optimizer; Sinkhorn's is given in products of its
scores with a vector, of which it needs at least 20. --memory counts on tensors without data.
Whether training works on this machine: python extras/check.py
"""
import argparse
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import Clips, find_videos, normalise
from extras.run import AMP, DEVICE, GPU, launch, set_up, write_json
from extras.toy import random_dino
from sigma import (DINO_WIDTHS, SIGMA, SIZES, Teacher, UserError, sinkhorn, sizes_for, split_mask,
                   symmetric_loss, tube_mask)
from train import locate, make_optimizer, parser_with, set_blocks, settings_for

VIDEOS = {"k400": 241_000, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570, "toy": 8_192}
SIDE = 8192 if GPU else 4096  # of the matrices whose product steps are compared with
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def seconds(work):
    """Mean time of work(), after calls that do not count."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(5).mean


def peak_memory():
    """Peak memory in bytes: of tensors on the GPU, or else of this process from its start."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux


def training_step(args, name, batch, device=DEVICE):
    """model, teacher (or None), optimizer, random clips as video (uint8) and mask, in the recipe of
    --data; and step(n), which trains on n of the clips."""
    own, sizes = settings_for(args.data, name), sizes_for(name, args.target)
    frames, size, (p, q, r) = own["frames"], own["size"], sizes["tube"]
    video = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    video = video.pin_memory() if device.type == "cuda" else video
    mask = tube_mask(batch, (frames // p, size // q, size // r), own["ratio"])
    with device:
        model, teacher = SIGMA(**sizes), None
        if args.target in DINO_WIDTHS:
            teacher = Teacher(random_dino(sizes["target_dim"]), sizes["tube"])
    optimizer = make_optimizer(model)

    def step(n=batch):
        x = normalise(video[:n], device)
        with torch.autocast(device.type, DTYPES[args.amp], enabled=args.amp != "off"):
            loss, _ = model(x, mask[:n], teacher(x) if teacher else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return SimpleNamespace(model=model, teacher=teacher, optimizer=optimizer, video=video,
                           mask=mask, step=step)


def recompute(model, name, compiled=False):
    """As train.py does it: the blocks of large sizes keep no activations."""
    set_blocks([*model.encoder.blocks, *model.decoder.blocks], name in ("large", "huge"), compiled)


# --- Speed ----------------------------------------------------------------------------------------

def measure(args, name, batch):
    """Figures of a training step on random clips, by name: clips a second, FLOP of a clip, FLOP/s
    of a matrix product and the step's share of them, peak memory in bytes; the teacher's share of
    the step's time; and those of `measure_sinkhorn`."""
    trained = training_step(args, name, batch)
    model, teacher, step = trained.model, trained.teacher, trained.step
    # Fused attention is not counted on a CPU; recomputed blocks would count twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(1)
    recompute(model, name, args.compile)
    spent, peak = seconds(step), peak_memory()
    square = torch.randn(SIDE, SIDE, device=DEVICE, dtype=DTYPES[args.amp])
    matmul_flops = 2 * SIDE ** 3 / seconds(lambda: square @ square)
    found = dict(clips_per_second=batch / spent, clip_flop=counter.get_total_flops(),
                 matmul_flops=matmul_flops, peak_memory=peak)
    found["mfu"] = found["clip_flop"] * found["clips_per_second"] / matmul_flops
    if teacher:
        found["teacher"] = seconds(lambda: teacher(normalise(trained.video, DEVICE))) / spent
    if hasattr(model, "prototypes"):
        found |= measure_sinkhorn(int(trained.mask.sum()), len(model.prototypes), spent)
    return found


def measure_sinkhorn(n, k, spent):
    """Of n tubes and k prototypes: the share of `spent` seconds that Sinkhorn takes, and the loss
    with its gradient, each with both networks' scores; and Sinkhorn's time in products of the
    scores with a vector."""
    scores = [(2 * torch.rand(n, k, device=DEVICE) - 1).requires_grad_() for _ in range(2)]
    fixed, vector = scores[0].detach(), torch.rand(k, device=DEVICE)
    prototype = torch.randint(k, (n,), device=DEVICE)
    one = seconds(lambda: sinkhorn(fixed, hard=True))
    loss = seconds(lambda: torch.autograd.grad(
        symmetric_loss(*scores, prototype, prototype)[0], scores))
    return dict(tubes=n, prototypes=k, sinkhorn=2 * one / spent, loss=loss / spent,
                sinkhorn_matvecs=one / seconds(lambda: fixed @ vector))


def measure_loader(videos, own, tube):
    """Clips a second that one core loads, in the core's own time."""
    clips = Clips(videos, frames=own["frames"], stride=own["stride"], size=own["size"], tube=tube)
    torch.set_num_threads(1)  # as loader workers have
    start = time.process_time()
    for i in range(100):
        clips[i, i * 7919 % len(clips)]
    return 100 / (time.process_time() - start)


def machine():
    """The hardware and the versions that figures depend on."""
    gpu = torch.cuda.get_device_properties(DEVICE) if GPU else None
    name = (f"{gpu.name}, {gpu.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}" if GPU
            else f"CPU, {torch.get_num_threads()} threads")
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def show(what, value, note=""):
    """Prints a line of the table."""
    print(f"{what:22}{value:>20}   {note}", flush=True)


def show_step(found):
    """Prints what `measure` found."""
    show("training step", f"{found['clips_per_second']:,.2f} clips/s",
         f"{found['clip_flop'] / 1e9:,.1f} GFLOP a clip")
    show("share of a matmul's", f"{found['mfu']:.0%}", "of the measured rate (MFU), "
         f"{found['matmul_flops'] / 1e9:,.0f} GFLOP/s at {SIDE} x {SIDE}")
    if "teacher" in found:
        show("teacher", f"{found['teacher']:.0%}", "of the step's time")
    if "sinkhorn" in found:
        show("Sinkhorn", f"{found['sinkhorn_matvecs']:.0f} products",
             f"of the {found['tubes']:,} x {found['prototypes']:,} scores with a vector; twice "
             f"{found['sinkhorn']:.0%} of the step")
    show("peak memory", f"{found['peak_memory'] / 2 ** 30:.2f} GiB",
         "of the step" if GPU else "of the whole process, not of the step alone")


def bench(args):
    """Prints the speeds, and how long the recipe of --data takes; writes them to --out."""
    set_up()
    name = args.model or ("tiny" if args.data == "toy" else "base")
    own, tube = settings_for(args.data, name), sizes_for(name, args.target)["tube"]
    batch = args.batch_size or own["gpu_batch"]
    print(f"{machine()}; {name}, {args.target}, {batch} clips of {own['frames']} x {own['size']} x "
          f"{own['size']}, autocast {args.amp}")
    try:
        videos, *_ = find_videos(locate(args.data, args.root))
    except UserError as error:
        if args.data not in VIDEOS:
            raise
        videos = []
        show("loader", "not measured", error)
    found = measure(args, name, batch)
    show_step(found)
    rate, workers = found["clips_per_second"], max(1, own["workers"])
    if videos:
        loading = found["loader"] = measure_loader(videos, own, tube)
        found["bottleneck"] = "loader" if loading * workers < rate else "model"
        show("loader, one core", f"{loading:,.1f} clips/s", "of the core's own time")
        show("bottleneck", found["bottleneck"],
             f"with {workers} workers; {rate / loading:.1f} balance")
    found["hours"] = VIDEOS.get(args.data, len(videos)) * own["epochs"] / rate / 3600
    show("hours of the recipe", " / ".join(f"{found['hours'] / n:,.1f}" for n in (1, 8, 64)),
         f"on 1 / 8 / 64 such {'GPUs' if GPU else 'machines'}, if the loader keeps up")
    if args.out:
        write_json(args.out, found)


# --- Memory ---------------------------------------------------------------------------------------

def count_memory(args, name, batch):
    """Bytes of a training step when it needs most, by kind as MemTracker names them, and "Total".
    Nothing is computed: the tensors have shapes, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # private: they may move
    from torch.distributed._tools.mem_tracker import MemTracker

    own, (p, q, r) = settings_for(args.data, name), sizes_for(name)["tube"]
    grid = own["frames"] // p, own["size"] // q, own["size"] // r
    index = split_mask(tube_mask(batch, grid, own["ratio"]))  # a real one: its numbers are read
    with (FakeTensorMode(allow_non_fake_inputs=True), patch("torch.nn.init.trunc_normal_"),
          patch("sigma.split_mask", lambda *_: [torch.zeros_like(x) for x in index])):
        trained = training_step(args, name, batch, torch.device("cpu"))
        recompute(trained.model, name)
        for weight in trained.model.parameters():  # Adam's state is there from the first step on
            weight.grad = torch.zeros_like(weight)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(trained.model, trained.optimizer, trained.video)
        with tracker:
            trained.step()
    peak, found = tracker.get_tracker_snapshot("peak"), {}
    for kind, number in (pair for kinds in peak.values() for pair in kinds.items()):
        found[str(getattr(kind, "value", kind))] = found.get(kind, 0) + number
    return found


def show_memory(args):
    """Prints the peak memory of a step of each size, in Markdown; writes it to --out."""
    found = {}
    print(f"Peak memory of a training step, counted: recipe of {args.data}, target {args.target}, "
          f"autocast {args.amp}\n\n| size | clips | GiB | of it weights and Adam |\n"
          "|---|---|---|---|")
    for name in [args.model] if args.model else SIZES:
        batch = args.batch_size or settings_for(args.data, name)["gpu_batch"]
        found[name] = count_memory(args, name, batch)
        total, fixed = found[name]["Total"], found[name]["Parameter"] + found[name]["Optstate"]
        print(f"| {name} | {batch} | {total / 2 ** 30:.1f} | {fixed / 2 ** 30:.1f} |", flush=True)
    print("\nOn a GPU CUDA's own memory and what is lost between tensors come on top; with several "
          "processes DDP's copy of the gradients.")
    if args.out:
        write_json(args.out, found)


def main(argv=None):
    parser = parser_with(__doc__, "data", "root", "model", "target", "batch-size", "amp", "compile")
    parser.add_argument("--memory", action="store_true", help="count the peak memory of each size, "
                        "or of --model, with --amp bf16 if no other is given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # as it was
    parser.set_defaults(data="k400", amp=None)
    args = parser.parse_args(argv)
    if args.check:
        parser.error("whether training works here, checks: python extras/check.py")
    args.amp = args.amp or ("bf16" if args.memory else AMP)
    (show_memory if args.memory else bench)(args)


if __name__ == "__main__":
    sys.exit(launch(main))
