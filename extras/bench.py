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

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import Clips, find_videos, normalise
from extras.run import AMP, DEVICE, GPU, launch, set_up, write_json
from extras.step import DTYPES, count_memory, random_mask, recompute, training_step
from sigma import SIZES, UserError, sinkhorn, sizes_for, symmetric_loss
from train import locate, parser_with, settings_for

VIDEOS = {"k400": 241_000, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570, "toy": 8_192}
SIDE = 8192 if GPU else 4096  # of the matrices whose product steps are compared with
HELP = {  # what flags of train.py mean here
    "data": "the recipe to time, and its videos: k400 (default), ssv2, ucf101, hmdb51, toy, a "
            "folder or a list",
    "model": "size (default: base, for toy tiny; with --memory all)",
    "batch-size": "clips of a step (default: the recipe's for one GPU)",
    "amp": f"autocast (default: {AMP}, with --memory bf16)"}


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


# --- Speed ----------------------------------------------------------------------------------------

def measure(args, name, batch):
    """Figures of a training step on random clips, by name: clips a second, FLOP of a clip, FLOP/s
    of a matrix product and the step's share of them, peak memory in bytes; the teacher's share of
    the step's time; and those of `measure_sinkhorn`."""
    mask = random_mask(args, name, batch)
    trained = training_step(args, name, mask)
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
        found |= measure_sinkhorn(int(mask.sum()), len(model.prototypes), spent)
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
    """One run, from the flags to the figures."""
    parser = parser_with(__doc__, "root", "target", "compile", meanings=HELP)
    add = parser.add_argument
    add("--memory", action="store_true", help="count the peak memory of a step, measure nothing")
    add("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    add("--check", action="store_true", help=argparse.SUPPRESS)  # as it was
    parser.set_defaults(data="k400", amp=None)
    args = parser.parse_args(argv)
    if args.check:
        parser.error("whether training works here, checks: python extras/check.py")
    args.amp = args.amp or ("bf16" if args.memory else AMP)
    (show_memory if args.memory else bench)(args)


if __name__ == "__main__":
    sys.exit(launch(main))
