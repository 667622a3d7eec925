"""Does training work on this machine, and how fast?

    python extras/check.py

Starts train.py and bench.py as you would, in a temporary folder, and compares their logs: training
in each precision, also compiled, under torchrun, stopped by SIGTERM and resumed, with a teacher of
random weights; Sinkhorn against float64 on the CPU; speed and memory. It prints a table in Markdown
to paste into an issue, in up to eight minutes on a GPU. What fails is named; the exit code is then
1. No part can hang: each has a time limit.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the core, wherever this is started
from extras.run import AMP, BF16, DEVICE, GPU, RunError, launch, set_up
from extras.toy import make_toy, random_dino
from sigma import DINO_WIDTHS, sinkhorn

LIMIT, TOTAL = (140, 480) if GPU else (600, 3600)  # seconds for a part, and for all
EPOCHS, STEPS = 40, 20  # of the runs, on a toy set of 128 clips


def run_command(command, folder, limit, stop_if=lambda: False, **environment):
    """What a command prints. Raises RunError with the last line of its error, or if it takes more
    than limit seconds. It gets a SIGTERM once stop_if() is true."""
    end, stopping = time.monotonic() + limit, False
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile(
            "w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=errors, start_new_session=True,
            env=os.environ | {"TMPDIR": str(folder)} | environment)
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise RunError(f"not done in {limit:.0f} seconds")
                if not stopping and stop_if():
                    process.terminate()
                    stopping = True
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0), errors.seek(0)
        printed, complaint = out.read(), errors.read()
    if process.returncode:
        found = re.findall(r"^(?:\[rank0\]: )?((?:[\w.]*(?:[Ee]rror|Exception)): \S.*)", complaint,
                           re.MULTILINE)  # of torchrun's processes as well
        lines = found or complaint.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RunError(lines[-1][:300])
    return printed


def losses(out):
    """(last step, first loss, mean loss of all steps) of a run's log, whose lines hold the mean
    since the line before."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    steps = [0, *(line["step"] for line in lines)]
    total = sum(line["loss"] * (now - then) for line, then, now in zip(lines, steps, steps[1:]))
    return steps[-1], lines[0]["loss"], total / steps[-1]


def train(folder, limit, out, *flags, like=None, resumed=False, steps=STEPS, launcher=(), **more):
    """Runs train.py on the toy set and returns what it came to. Raises RunError if that is not the
    last step, or the first loss is not that of the run `like`; resumed: the mean loss. (Later ones
    of other precisions differ: training amplifies rounding.)"""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--epochs", str(EPOCHS),
               "--out", out, *flags, "--max-steps"]
    for end in (steps,) if resumed else (1, steps):  # a log line after the first step
        run_command([*command, str(end)], folder, limit, **more)
    last, first, mean = losses(folder / out)
    if last != steps:
        raise RunError(f"the run ended after step {last}, not {steps}")
    note = f"first loss {first:.4f}, mean of {last} steps {mean:.4f}"
    if like:
        _, *wanted = losses(folder / like)
        note += f"; {like} {wanted[resumed]:.4f}"
        allowed = 1e-3 if "off" in flags else 0.02
        if not abs((first, mean)[resumed] / wanted[resumed] - 1) <= allowed:
            raise RunError(f"{note}: more than {allowed:.1%} apart")
    return note


def stop(folder, limit, out):
    """Sends a SIGTERM to a run once its log has begun. Raises RunError unless it stops early, in
    order, with a checkpoint."""
    log = folder / out / "log.jsonl"
    command = [sys.executable, str(ROOT / "train.py"), "--epochs", str(EPOCHS), "--out", out]
    run_command(command, folder, limit, lambda: log.exists() and log.stat().st_size)
    last, *_ = losses(folder / out)
    if last >= STEPS or not (folder / out / "last.pt").exists():
        raise RunError(f"it did not stop, but trained to step {last}, or has left no checkpoint")
    return f"stopped and saved after step {last}"


def compare_sinkhorn():
    """Prints by how much assignments differ from float64's on the CPU. Raises RunError if by more
    than the rounding of float32 or TF32."""
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


def sinkhorn_apart(folder, limit):
    """compare_sinkhorn in a process of its own, which may be ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--sinkhorn"]
    return run_command(command, folder, limit).strip()


def speed(folder, limit, model, batch, *flags):
    """Runs bench.py, with half as many clips as long as they don't fit, and returns its figures."""
    end, asked, out = time.monotonic() + limit, batch, folder / "speed.json"
    while True:
        command = [sys.executable, str(ROOT / "extras/bench.py"), "--model", model,
                   "--batch-size", str(batch), "--out", str(out), *flags]
        try:
            run_command(command, folder, end - time.monotonic())
            break
        except RunError as error:
            if "out of GPU memory" not in str(error) or batch == 1:
                raise
            batch //= 2
    found = json.loads(out.read_text())
    fits = "" if batch == asked else f" ({asked} don't fit)"
    return (f"{found['clips_per_second']:,.1f} clips/s, {batch} per forward pass{fits}; "
            f"{found['mfu']:.0%}"
            f" of a matmul's {found['matmul_flops'] / 1e12:,.2f} TFLOP/s; of a step Sinkhorn "
            f"{found['sinkhorn']:.0%}, loss {found['loss']:.0%}; peak memory of the "
            f"{'step' if GPU else 'process'} {found['peak_memory'] / 2 ** 30:.1f} GiB")


def parts():
    """What is checked, the quickest answers first: names, and functions of (folder, limit) that
    return a note or raise RunError."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=1".split()
    amps, cpu = ["off", *["bf16"] * (BF16 or not GPU), "fp16"], {"CUDA_VISIBLE_DEVICES": ""}
    dino = ["--target", "dino-s", "--teacher", "teacher.pt", "--amp"]
    speeds = ([("small", 40), ("base", 40), ("large", 40)] if GPU else
              [("tiny", 64, "--data", "toy"), ("small", 2)])

    def part(work, *flags, **options):
        return lambda folder, limit: work(folder, limit, *flags, **options)

    return {
        "training on the CPU": part(train, "cpu", "--amp", "off", **cpu),
        **{f"training, {amp}": part(train, amp, "--amp", amp, like="cpu") for amp in amps},
        "Sinkhorn": sinkhorn_apart,
        "torchrun": part(train, "torchrun", like=AMP, launcher=torchrun),
        "SIGTERM": part(stop, "stopped"),
        "resumed": part(train, "stopped", like=AMP, resumed=True),
        "DINO on the CPU": part(train, "dino-cpu", *dino, "off", steps=4, **cpu),
        "DINO": part(train, "dino", *dino, AMP, steps=4, like="dino-cpu"),
        **{f"speed, {flags[0]}": part(speed, *flags) for flags in speeds},
        **{f"compiled, {amp}": part(train, f"compiled-{amp}", "--amp", amp, "--compile", like="cpu")
           for amp in amps}}


def check():
    """Runs all parts in a temporary folder and prints the table. Raises RunError if any fails."""
    failed, end = [], time.monotonic() + TOTAL
    name = torch.cuda.get_device_name(DEVICE) if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, --amp {AMP}\n\n| part | result | figures | s |\n"
          "|---|---|---|---|")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        make_toy(folder / "data/toy", train=128, val=32)
        torch.save(random_dino(DINO_WIDTHS["dino-s"]), folder / "teacher.pt")
        for name, work in parts().items():
            print(f"| {name} | ", end="", flush=True)
            start, result = time.monotonic(), "works"
            try:
                note = work(folder, max(0, min(LIMIT, end - start)))
            except (RunError, OSError) as error:  # OSError: a log that is not there
                result, note = "**fails**", str(error).replace("|", "\\|")
                failed.append(name)
            print(f"{result} | {note} | {time.monotonic() - start:.0f} |", flush=True)
    if failed:
        raise RunError(f"{len(failed)} parts fail: {', '.join(failed)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sinkhorn", action="store_true", help="compare nothing but Sinkhorn")
    (compare_sinkhorn if parser.parse_args(argv).sinkhorn else check)()


if __name__ == "__main__":
    sys.exit(launch(main))
