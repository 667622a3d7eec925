"""How fast are loader, training step, Sinkhorn and teacher here, how long does a recipe take?

    python extras/bench.py --model small --batch-size 2
    python extras/bench.py --data k400 --root DIR --target dino --batch-size 40 --amp bf16
    python extras/bench.py --check                      does all of it work here, and how fast?

Trains nothing and writes nothing. The loader's figure is of one core, in its own time; the step's,
of random clips with the optimiser; Sinkhorn's, in products of the same scores with a vector.

--check prints a table in Markdown to paste into an issue, in up to eight minutes on a GPU: training
for 20 steps in each precision, also compiled, under torchrun, stopped and resumed, with a teacher;
Sinkhorn against float64 on the CPU; speed and memory. What fails is named; the exit code is then 1.
"""
import argparse
import faulthandler
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
import train
from data import Clips, find_videos, normalise
from extras import run
from extras.run import AMP, BF16, DEVICE, GPU, RunError, autocast, launch, set_up
from extras.toy import make_toy
from sigma import (DINO_WIDTHS, SIGMA, Encoder, Teacher, UserError, sinkhorn, sizes_for,
                   symmetric_loss, tube_mask)
from train import locate, make_optimizer, parser_with, set_blocks, settings_for

VIDEOS = {"k400": 241_000, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570, "toy": 8_192}
SIDE = 8192 if GPU else 4096  # of the matrix product that steps are compared with
LIMIT, TOTAL = (120, 480) if GPU else (600, 3600)  # seconds for a part of --check, and for all


# --- Speed ----------------------------------------------------------------------------------------

def seconds(work):
    """Mean time of work(), after calls that do not count."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(5).mean


def random_weights(width):
    """The state dict of a DINO ViT with random weights, as fast as the real one."""
    weights = Encoder(dim=width, depth=12, heads=width // 64, tube=(1, 16, 16)).state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0]
    weights |= {"cls_token": torch.randn(1, 1, width), "pos_embed": torch.randn(1, 197, width)}
    return weights


def measure(args, name, batch):
    """Figures of a training step on random clips, by name: clips a second, FLOP of a clip, FLOP/s
    of a matrix product and the step's share of them, peak memory in GiB; and how much of its time
    teacher, Sinkhorn and loss (forward and backward) take, both with both branches' scores."""
    own, sizes = settings_for(args.data, name), sizes_for(name, args.target)
    frames, size, (p, q, r) = own["frames"], own["size"], sizes["tube"]
    video = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    video = video.pin_memory() if GPU else video
    mask = tube_mask(batch, (frames // p, size // q, size // r), own["ratio"])
    model, teacher = SIGMA(**sizes).to(DEVICE), None
    if args.target in DINO_WIDTHS:
        teacher = Teacher(random_weights(sizes["target_dim"]), sizes["tube"]).to(DEVICE)
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
    spent = seconds(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB on Linux
    peak = torch.cuda.max_memory_allocated() if GPU else peak
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    square = torch.randn(SIDE, SIDE, device=DEVICE, dtype=dtype)
    found = dict(rate=batch / spent, work=counter.get_total_flops(), peak=peak / 2 ** 30,
                 product=2 * SIDE ** 3 / seconds(lambda: square @ square))
    found["share"] = found["work"] * found["rate"] / found["product"]
    if teacher:
        found["teacher"] = seconds(lambda: teacher(normalise(video, DEVICE))) / spent
    if hasattr(model, "prototypes"):
        n, k = int(mask.sum()), len(model.prototypes)
        scores = [(2 * torch.rand(n, k, device=DEVICE) - 1).requires_grad_() for _ in range(2)]
        fixed, vector = scores[0].detach(), torch.rand(k, device=DEVICE)
        prototype = torch.randint(k, (n,), device=DEVICE)
        one = seconds(lambda: sinkhorn(fixed, hard=True))
        loss = seconds(lambda: torch.autograd.grad(
            symmetric_loss(*scores, prototype, prototype)[0], scores))
        found |= dict(n=n, k=k, sinkhorn=2 * one / spent, loss=loss / spent,
                      products=one / seconds(lambda: fixed @ vector))
    return found


def machine():
    """The hardware and the versions that figures depend on."""
    gpu = torch.cuda.get_device_properties(DEVICE) if GPU else None
    name = (f"{gpu.name}, {gpu.total_memory / 2 ** 30:.0f} GiB, CUDA {torch.version.cuda}" if GPU
            else f"CPU, {torch.get_num_threads()} threads")
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def show(what, value, note=""):
    """Prints a line of the table."""
    print(f"{what:26}{value:>18}   {note}", flush=True)


def bench(args):
    """Prints the speeds, and how long the recipe of --data takes."""
    set_up()
    name = args.model or ("tiny" if args.data == "toy" else "base")
    own, tube = settings_for(args.data, name), sizes_for(name, args.target)["tube"]
    batch, frames, size = args.batch_size or own["gpu_batch"], own["frames"], own["size"]
    print(f"{machine()}; {name}, {args.target}, {batch} clips of {frames} x {size} x {size}, "
          f"autocast {args.amp}")
    try:
        videos, *_ = find_videos(locate(args.data, args.root))
    except UserError as error:
        if args.data not in VIDEOS:
            raise
        videos = []
        show("loader", "not measured", error)
    found = measure(args, name, batch)
    rate = found["rate"]
    show("training step", f"{rate:,.2f} clips/s", f"{found['work'] / 1e9:,.1f} GFLOP a clip")
    show("share of matrix product", f"{found['share']:.0%}",
         f"of {found['product'] / 1e9:,.0f} GFLOP/s, {SIDE} x {SIDE}")
    if "teacher" in found:
        show("teacher", f"{found['teacher']:.0%}", "of the step's time")
    if "sinkhorn" in found:
        show("Sinkhorn", f"{found['products']:.0f} products",
             f"of the {found['n']:,} x {found['k']:,} scores with a vector")
    show("peak memory", f"{found['peak']:.2f} GiB", "of the step")
    if videos:
        clips = Clips(videos, frames=frames, stride=own["stride"], size=size, tube=tube)
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


# --- The parts of --check: each a process of its own, whose last line goes into the table ---------

class Stopping(Clips):
    """Clips that bring a SIGTERM in step 6 of a toy run."""

    def __getitem__(self, key):
        if key[0] == 5 * 64:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(key)


def toy(args):
    """Trains on a small toy set. The first loss must be that of float32 on the CPU; the last one of
    a run that was stopped and resumed, that of a run that wasn't."""
    make_toy("data/toy", train=128, val=0)
    run.LOG_STEPS = 1  # each loss, not means
    flags = ["--epochs", "40", "--max-steps", args.max_steps, "--target", args.target,
             "--amp", args.amp, "--out", args.out, *["--compile"] * args.compile]
    if args.target in DINO_WIDTHS:
        torch.manual_seed(0)
        torch.save(random_weights(DINO_WIDTHS[args.target]), "teacher.pt")
        flags += ["--teacher", "teacher.pt"]
    train.main(flags, Clips if args.part == "toy" else Stopping)
    step, like, allowed = 1, f"cpu-{args.target}", 1e-3 if args.amp == "off" else 2e-2
    last = 6 if args.part == "stop" else int(args.max_steps)
    if args.part == "resume":
        step, like, allowed = last, f"toy-{args.amp}", 2e-2
    logs = [Path(out, "log.jsonl").read_text().splitlines() for out in (args.out, like)]
    found, others = ({line["step"]: line["loss"] for line in map(json.loads, log)} for log in logs)
    if max(found) != last:
        raise RunError(f"the run ended after step {max(found)}, not {last}")
    loss, wanted = found[step], others[step]
    note = f"loss {loss:.5f} in step {step}, {like} {wanted:.5f}; {found[last]:.5f} in step {last}"
    if not abs(loss / wanted - 1) <= allowed:
        raise RunError(f"{note}: more than {allowed:g} apart")
    print(note, torch.distributed.get_backend() if torch.distributed.is_initialized() else "")


def compare_sinkhorn(args):
    """Assignments must be those of float64 on the CPU, but for the rounding of float32 or TF32."""
    set_up()
    torch.manual_seed(0)
    scores, notes = 2 * torch.rand((16384, 3000) if GPU else (2048, 1000)) - 1, []
    for eps in (0.05, 0.03, 0.005):
        wanted, here = sinkhorn(scores.double(), eps), scores.to(DEVICE)
        error = (sinkhorn(here, eps).cpu() - wanted).abs().max()
        same = sinkhorn(here, eps, hard=True).cpu() == wanted.argmax(dim=1)
        notes += [f"eps {eps}: error {error:.0e}, {same.float().mean():.2%} assigned alike"]
        if not error <= 1e-3 or same.float().mean() < 0.995:
            raise RunError(notes[-1])
    print("; ".join(notes))


def speed(args):
    """Speed and memory of a training step, with half as many clips as long as they don't fit."""
    set_up()
    batch = args.batch_size
    while batch:
        try:
            found = measure(args, args.model, batch)
        except torch.OutOfMemoryError:
            batch //= 2
            gc.collect()  # recomputed blocks hold themselves
            continue
        fits = "" if batch == args.batch_size else f" ({args.batch_size} don't fit)"
        return print(f"{found['rate']:,.1f} clips/s, {batch} at a time{fits}; {found['share']:.0%} "
                     f"of the matrix rate, {found['product'] / 1e12:,.2f} TFLOP/s; of a step "
                     f"Sinkhorn {found['sinkhorn']:.0%}, loss {found['loss']:.0%}; "
                     f"peak {found['peak']:.1f} GiB")
    raise RunError("out of GPU memory with one clip")


PARTS = {"toy": toy, "stop": toy, "resume": toy, "sinkhorn": compare_sinkhorn, "speed": speed}


def parts():
    """Names and commands of what --check runs, the quickest answers first."""
    python, cpu = [sys.executable], ["env", "CUDA_VISIBLE_DEVICES=", sys.executable]
    torchrun = [*python, *"-m torch.distributed.run --standalone --nproc_per_node=1".split()]
    amps = ["off", *["bf16"] * (BF16 or not GPU), "fp16"]
    models = ((f"{size} --batch-size 40" for size in ("small", "base", "large")) if GPU else
              ("tiny --data toy --batch-size 64", "small --batch-size 2"))
    rows = [("a step on the CPU", cpu, "toy --amp off --max-steps 1 --out cpu-mlp"),
            *((f"20 steps, {amp}", python, f"toy --amp {amp} --out toy-{amp}") for amp in amps),
            ("Sinkhorn", python, "sinkhorn"),
            ("torchrun", torchrun, "toy --out torchrun"),
            ("SIGTERM", python, "stop --out stopped"),
            ("resumed", python, "resume --out stopped"),
            ("DINO, CPU", cpu, "toy --target dino-s --amp off --max-steps 1 --out cpu-dino-s"),
            ("DINO", python, "toy --target dino-s --max-steps 5 --out dino"),
            *((f"speed, {model.split()[0]}", python, f"speed --model {model}") for model in models),
            *((f"20 steps, {amp}, compiled", python, f"toy --amp {amp} --compile --out c-{amp}")
              for amp in amps)]
    return [(name, [*start, str(Path(__file__).resolve()), "--part", *part.split()])
            for name, start, part in rows]


def apart(command, folder, limit):
    """The last line that a command prints. Raises RunError with that of its error."""
    try:
        done = subprocess.run(command, cwd=folder, env=os.environ | {"TMPDIR": folder},
                              capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"not done in {limit:.0f} seconds") from error
    if done.returncode:
        errors = re.findall(r"^(?:\[rank0\]: )?([\w.]*(?:[Ee]rror|Exception): \S.*)|(Timeout \(.*)",
                            done.stderr, re.MULTILINE)  # those of torchrun and faulthandler as well
        lines = ["".join(pair) for pair in errors] or done.stderr.strip().splitlines()
        raise RunError(lines[-1][:300] if lines else f"exit code {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def check():
    """Runs all parts in a temporary folder and prints the table. Raises RunError if any fails."""
    failed, end = [], time.monotonic() + TOTAL
    print(f"{machine()}, --amp {AMP}\n\n| part | result | figures | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, command in parts():
            print(f"| {name} | ", end="", flush=True)
            start, result = time.monotonic(), "works"
            try:
                note = apart(command, folder, max(0, min(LIMIT + 20, end - start)))
            except RunError as error:
                result, note = "**fails**", str(error).replace("|", "\\|")
                failed.append(name)
            print(f"{result} | {note} | {time.monotonic() - start:.0f} |", flush=True)
    if failed:
        raise RunError(f"{len(failed)} parts fail: {', '.join(failed)}")


def main(argv=None):
    parser = parser_with(__doc__, "data", "root", "model", "target", "batch-size", "amp", "compile")
    parser.add_argument("--check", action="store_true", help="try all of it, without other flags")
    for flag in ("--part", "--out", "--max-steps"):  # of a process of --check
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.set_defaults(data="k400", max_steps="20")
    args = parser.parse_args(argv)
    if args.part:
        faulthandler.dump_traceback_later(LIMIT, exit=True)  # under torchrun, too
        PARTS[args.part](args)
    elif args.check:
        check()
    else:
        bench(args)


if __name__ == "__main__":
    sys.exit(launch(main))
