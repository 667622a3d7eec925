"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                             toy set: rendered, trained on, and judged by a probe
    python train.py --target pixel                              the same with VideoMAE's target, to compare
    torchrun --nproc_per_node=8 train.py --data k400 --root DIR           the paper's recipe (sets and layouts: data.py)
    python train.py --data videos/ --model small --epochs 100   a folder or list of your own videos
    python train.py --resume out/toy-tiny-mlp                   go on where a run stopped, with its own settings
    python train.py --bench --model small --batch-size 2        train nothing: how fast are loader and step here?

A run writes two checkpoints, log.jsonl, results.json and pictures to out/<run>/. SIGTERM, SIGUSR1, Ctrl-C save first.
"""
import argparse
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path

import av
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image
from tqdm import tqdm

from data import RETRIES, SETS, VIDEO, Clips, Order, UserError, centre_crop, find_videos, kill_workers, loader
from data import make_toy, normalise, recipe, scaled
from sigma import SIZES, build_model, sinkhorn, take_tubes, tube_mask

COMMON = dict(root=None, target="mlp", accum=None, repeat=1, seed=0, amp=None, eval_every=0, compile=False)
RECOMPUTE = ("large", "huge")                                   # models whose activations are computed again, not kept
BETAS, WEIGHT_DECAY, FINAL_LR = (0.9, 0.95), 0.05, 1e-5         # AdamW's; rates are for a global batch of 256 clips
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600              # a log line every 10 steps, or sooner if slow
TOLERATED = 5                                                   # unreadable videos in a set of which 1% would be fewer
EVAL_CLIPS = 10_000                                             # of each split, for the probe and k-NN while training
BENCH_SECONDS = 10                                              # in which --bench reads videos
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))    # torchrun's


class RunError(Exception):
    """A run that can't go on; the message says why and what is left."""


# --- The command line -------------------------------------------------------------------------------------------------

def parse(argv):
    """The flags that were given, as a dictionary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def number(kind, least):
        def convert(text):
            if not least <= kind(text) < math.inf:
                raise ValueError
            return kind(text)
        convert.__name__ = f"{kind.__name__} (at least {least})"
        return convert

    natural, positive, real = number(int, 0), number(int, 1), number(float, 0)
    either, toy = parser.add_mutually_exclusive_group(), SETS["toy"]
    for name, kind, text in (
            ("data", str, "k400, ssv2, ucf101, hmdb51, toy, a folder of videos, or a list file (default: toy)"),
            ("root", str, "the named set's folder (default: data/<name>)"),
            ("model", list(SIZES), "size of the networks (default: tiny for toy, else base)"),
            ("target", ["mlp", "pixel"], "mlp: SIGMA-MLP; pixel: the VideoMAE baseline (default: mlp)"),
            ("frames", positive, "frames of a clip"),
            ("stride", positive, "frames of the video from one frame of the clip to the next"),
            ("size", positive, "pixels of a clip's side"),
            ("epochs", positive, "passes over the data; the schedule stretches with them"),
            ("batch_size", positive, "clips at a time in one process: as many as its memory holds"),
            ("accum", positive, "batches added up to one step (default: what makes the recipe's global batch, else 1)"),
            ("repeat", positive, "clips from each decoding of a video, which counts as so many epochs (default: 1)"),
            ("lr", real, "learning rate for a global batch of 256, scaled to yours"),
            ("eps", number(float, 0.001), "Sinkhorn's: smaller is sharper (default: the set's, else 0.05)"),
            ("amp", ["bf16", "fp16", "off"], "autocast (default: bf16 on a GPU that has it, else off)"),
            ("workers", natural, "loader processes for each training process"),
            ("seed", natural, "of weights, shuffle, crops and masks (default: 0)"),
            ("out", str, "folder of the run (default: out/<data>-<model>-<target>)"),
            ("resume", str, "folder or checkpoint of a run: go on exactly where it stopped"),
            ("init", str, "folder or checkpoint of a run: start a new one from its weights"),
            ("eval_every", natural, "epochs between k-NN and linear probe on the validation split (default: 0, never)"),
            ("max_steps", positive, "stop and save after this many steps of the schedule"),
            ("compile", None, "compile the transformer blocks: slow to start, then faster"),
            ("bench", None, "measure loader, step and Sinkhorn here; train nothing")):
        if name in VIDEO and name != "eps":
            text += f" (default: {VIDEO[name]}; toy and tiny: {toy[name]})"
        kind = dict(action="store_true") if kind is None else {"choices" if isinstance(kind, list) else "type": kind}
        place = either if name in ("resume", "init") else parser
        place.add_argument("--" + name.replace("_", "-"), help=text, **kind)
    return vars(parser.parse_args(argv))


def configure(given):
    """The run's settings, a plain dictionary: recipe, then flags; and the checkpoint that it goes on from, or None."""
    checkpoint, once = None, ("resume", "init", "max_steps", "bench")
    if "resume" in given:
        path, checkpoint = read_checkpoint(given["resume"])
        config = checkpoint["config"] | dict(out=str(path.parent), accum=None)
        free = {"data", "root", "batch_size", "accum", "workers", "out", "eval_every", "compile"}
        for name in given.keys() - free - set(once):
            if given[name] != config[name]:
                raise UserError(f"--resume keeps the run's own --{name} {config[name]}, found {given[name]}: leave it "
                                "out, or start a new run from the weights with --init")
    else:
        full = "bench" in given and given.get("model", "tiny") != "tiny"
        data = given.get("data", "k400" if full else "toy")
        model = given.get("model", "tiny" if data == "toy" else "base")
        config = COMMON | recipe(data, model) | dict(data=data, model=model)
    config |= {name: value for name, value in given.items() if name not in once}
    config = {"out": f"out/{Path(config['data']).resolve().stem}-{config['model']}-{config['target']}"} | config
    out = Path(config["out"])
    taken = any((out / name).exists() for name in CHECKPOINTS) and not (checkpoint and out.samefile(path.parent))
    if taken and "bench" not in given:
        raise UserError(f"expected a new folder for a new run, found a checkpoint in {out}: go on with --resume {out}, "
                        "or choose another --out")
    if config["root"] and config["data"] not in SETS:
        raise UserError(f"expected --root with --data {', '.join(SETS)}, found it with {config['data']}: leave it out")
    if out.exists() and not out.is_dir():
        raise UserError(f"expected a folder as --out, found the file {out}: choose another name")
    return config, checkpoint


# --- Parts of a run ---------------------------------------------------------------------------------------------------

def set_up():
    """Joins the processes that torchrun started, if it did, and returns this one's device."""
    torch.set_float32_matmul_precision("high")                        # TF32 on GPUs; 0.1% of the assignments change
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device, libc = torch.device("cpu"), ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):           # glibc: M_MMAP_MAX and M_TRIM_THRESHOLD. Keep large freed blocks: to get
            libc.mallopt(-4, 0)                # them anew from the system, page by page, takes a CPU step up to a third
            libc.mallopt(-1, 2 ** 31 - 1)       # of its time.
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def gather(thing):
    """The list of every rank's thing; waits for all ranks."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def say(text):
    """Prints above the progress bar, on the first rank alone."""
    if RANK == 0:
        tqdm.write(text)


def autocast(name, device):
    """The autocast context for --amp; by default bf16 on a GPU that has it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name or ("bf16" if able else "off"))
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def make_model(c, device):
    """The model of settings c, on the device."""
    torch.manual_seed(c.seed)
    model = build_model(c.model, target=c.target, **dict(eps=c.eps) if c.eps else {}).to(device)
    for part in (model.encoder, model.decoder):
        part.recompute = c.model in RECOMPUTE
        if c.compile:                       # one block at a time: they are alike, so one compilation serves them all
            for block in part.blocks:
                block.compile()
    return model


def make_optimizer(model):
    """AdamW without weight decay on biases, norms and other vectors. The learning rate is set before each step."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=WEIGHT_DECAY),
              dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(step, steps, warmup, peak, final):
    """Linear from 0 to peak in `warmup` steps, then a cosine down to final."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_clips(c, tube, split="train", **options):
    """The clips of settings c. The first rank finds the videos and tells the others; all raise its UserError. The toy
    set is not cropped, and stays in memory once it is decoded."""
    found = [None]
    if RANK == 0:
        try:
            found = [find_videos(c.data, split, c.root)]
        except UserError as error:
            found = [error]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    own = {name: getattr(c, name) for name in ("frames", "stride", "size", "ratio", "seed", "repeat")}
    toy = {"cache": {}, "crop": centre_crop} if c.data == "toy" else {}
    return Clips(found[0], **own | dict(tube=tube) | toy | options)


def split_batch(c, given, clips):
    """(batch size, batches to accumulate) for which processes x size x number is the recipe's global batch, or nearly.

    Where the batch size isn't given, it is at most the recipe's. A small set's global batch is at most all its clips.
    """
    most, accum = max(c.batch_size // c.repeat, 1), c.accum                                         # counted in videos
    share = (c.global_batch or c.batch_size * WORLD * (accum or 1)) // WORLD // c.repeat              # of each process
    share = max(min(share, clips // WORLD), 1)
    if "batch_size" in given:
        return c.batch_size, accum or max(share // most, 1)
    accum = accum or -(-share // most)
    return max(min(most, share // accum), 1) * c.repeat, accum


@contextmanager
def stop_requests():
    """Yields a list to which SIGTERM, SIGUSR1 and Ctrl-C add, instead of ending the process."""
    requests, names = [], (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(name, lambda number, frame: requests.append(number)) for name in names]
    try:
        yield requests
    finally:
        for name, handler in zip(names, before):
            signal.signal(name, handler)


def make_judges(c, tube):
    """Training and validation clips for `evaluate`, if the run wants them and there are any with labels, else None."""
    if not c.eval_every and c.data != "toy":
        return None
    try:
        judges = [make_clips(c, tube, split, crop=centre_crop, repeat=1) for split in ("train", "val")]
    except UserError as error:
        return say(f"accuracy   not while training: {error}")
    return judges if all(clips.videos.classes for clips in judges) else say("accuracy   not without labels")


def endless(batches, order):
    """All batches from the order's place on, epoch after epoch."""
    while True:
        yield from batches
        order.epoch, order.seen = order.epoch + 1, 0


# --- Checkpoints: the newest and the one before -----------------------------------------------------------------------

CHECKPOINTS = ("last.pt", "previous.pt")


def write_checkpoint(folder, content):
    """Writes folder/last.pt, the old one becomes previous.pt. At any moment one of them is whole."""
    last, previous = (folder / name for name in CHECKPOINTS)
    draft = folder / "unfinished.pt"
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            last.replace(previous)
        draft.replace(last)
    except (OSError, RuntimeError) as error:                          # torch.save turns a full disk into the latter
        draft.unlink(missing_ok=True)
        raise RunError(f"expected to write {last}, found {error}: make room and --resume {folder}; what it held before "
                       "is untouched") from None


def read_checkpoint(path):
    """(path, content) of a checkpoint given by its path or its run's folder; of the one before if last.pt is damaged.

    Runs no code that the file may hold. Raises UserError.
    """
    path, problems = Path(path), []
    if path.is_dir() or path.name == CHECKPOINTS[0]:
        folder = path if path.is_dir() else path.parent
        candidates = [folder / name for name in CHECKPOINTS]
    else:
        candidates = [path]
    for path in candidates:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            names = ("model", "optimizer", "scaler", "step", "epoch", "seen", "rng", "config")
            checkpoint = {name: checkpoint[name] for name in names}
            if problems:
                say(f"{problems[0]}: going on from the checkpoint before, {path}, step {checkpoint['step']:,}")
            return path, checkpoint
        except FileNotFoundError:
            problems.append(f"found no file {path}")
        except Exception as error:                                    # whatever a foreign or damaged file brings about
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            problems.append(f"found something else in {path} ({reason})")
    raise UserError(f"expected a checkpoint of train.py, {' and '.join(problems)}: give a run's folder or its last.pt")


def load_weights(model, weights, path):
    """Puts weights into the model, all of them or none."""
    found, expected = ({name: tuple(value.shape) for name, value in w.items()} for w in (weights, model.state_dict()))
    differ = [f"{name} (expected {expected.get(name)}, found {found.get(name)})"
              for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differ:
        raise UserError(f"expected weights of this --model and --target in {path}, found {len(differ)} names that "
                        f"differ: {', '.join(differ[:20])}{', ...' * (len(differ) > 20)}: give its own flags")
    model.load_state_dict(weights)


# --- Pretraining ------------------------------------------------------------------------------------------------------

def pretrain(c, given, checkpoint, device):
    """Sets a run up, says what it is going to do and what it will cost, trains, and shows what was learned."""
    before = checkpoint and Namespace(**checkpoint["config"])
    model = make_model(c, device)
    clips, judges = make_clips(c, model.encoder.tube), make_judges(c, model.encoder.tube)
    if before and before.clips != len(clips):
        raise UserError(f"expected the run's {before.clips:,} videos, found {len(clips):,} in {c.data}: --resume needs "
                        "as many, --init does not")
    wanted = c.global_batch
    c.batch_size, c.accum = split_batch(c, given, len(clips))
    c.world, c.global_batch, c.clips = WORLD, c.batch_size * WORLD * c.accum, len(clips)
    product = f"{WORLD} processes x {c.batch_size} clips x {c.accum} accumulated = {c.global_batch:,}"
    if c.batch_size % c.repeat:
        raise UserError(f"expected a --batch-size divisible by --repeat {c.repeat}, found {c.batch_size}: change one")
    order = Order(len(clips), c.batch_size // c.repeat, RANK, WORLD, c.seed, c.accum)
    per_pass = len(clips) // order.step                              # steps in which each video is opened at most once
    if per_pass == 0:
        raise UserError(f"expected enough videos for a global batch of {product}, found {len(clips)}: lower "
                        "--batch-size or --accum, or give more videos")
    c.steps, c.peak_lr = per_pass * c.epochs // c.repeat, c.lr * c.global_batch / 256
    c.warmup_steps = int(per_pass * min(c.warmup, c.epochs / 10) / c.repeat)      # the recipe's, at most a tenth of all
    parallel = DistributedDataParallel(model) if WORLD > 1 else model    # device_ids would move the masks to the GPU
    # Measured before weights are loaded: its forward pass rounds the prototypes once more, and a run that goes on must
    # not differ from one that was never stopped. All ranks take the first one's figure.
    cost = gather(time_batch(parallel, c, clips.grid, device))[0] * c.accum                    # seconds a step, roughly
    place = Namespace(step=0, epoch=0, seen=0)                                # seen: videos of this pass over the data
    if checkpoint or "init" in given:
        path, source = (given.get("resume"), checkpoint) if checkpoint else read_checkpoint(given["init"])
        load_weights(model, source["model"], path)
    if checkpoint:
        place = Namespace(**{name: checkpoint[name] for name in vars(place)})
        if before.global_batch != c.global_batch:
            place.step = place.epoch * per_pass + place.seen // order.step

    k, videos, left = 0 if c.target == "pixel" else len(model.prototypes), clips.videos, c.steps - place.step
    tubes = tube_mask(1, clips.grid, c.ratio).sum().item() * c.batch_size * WORLD
    parameters, passed_over = sum(p.numel() for p in model.parameters()), len(videos.passed_over)
    for title, text in (
            ("data", f"{len(clips):,} videos in {c.data}, {videos.classes or 'no'} classes; {passed_over:,} missing or "
                     "passed over" + (f", named in {c.out}/passed_over.txt" if passed_over else "")),
            ("model", f"{c.model}, target {c.target}, {parameters:,} parameters; clips of {c.frames} frames, "
                      f"{c.stride} apart, {c.size} x {c.size}: {math.prod(clips.grid):,} tubes"),
            ("batch", f"{product} clips in a step; on {device}, autocast {c.amp or 'as the device can'}"),
            ("schedule", f"{c.epochs} epochs = {c.steps:,} steps, the first {c.warmup_steps:,} of them warmup; "
                         f"learning rate {c.lr:g} x {c.global_batch} / 256 = {c.peak_lr:.3g}"),
            ("cost", f"{duration(cost * left)} for {left:,} steps of {cost:.3f} s, as measured now on random clips, if "
                     "the loader keeps up"),
            ("Sinkhorn", k and f"{tubes:,} hidden tubes at a time share {k:,} prototypes, eps {model.eps:g}: those of "
                               "one batch on all processes, not of all that is accumulated"),
            ("warning", tubes < 3 * k and "few hidden tubes for so many prototypes, some go unused: raise --batch-size "
                                          "or the number of processes (not --accum)"),
            ("warning", wanted not in (None, c.global_batch) and
             f"a global batch of {wanted} is meant, this one is {c.global_batch}: the learning rate is scaled to it"),
            ("changed", before and (before.world, before.batch_size, before.accum) != (WORLD, c.batch_size, c.accum) and
             f"it had {before.world} processes x {before.batch_size} clips x {before.accum} accumulated before: "
             "Sinkhorn balances other batches now"),
            ("run", c.out + f", going on after step {place.step:,}" * (place.step > 0))):
        if text:
            say(f"{title:11}{text}")
    Path(c.out).mkdir(parents=True, exist_ok=True)
    if videos.passed_over and RANK == 0:
        Path(c.out, "passed_over.txt").write_text("\n".join(videos.passed_over) + "\n")
    if fit(model, parallel, clips, judges, order, c, checkpoint, place, given.get("max_steps"), cost, device):
        show(model, clips, judges, c, device)


def time_batch(parallel, c, grid, device, optimizer=None, repeat=1):
    """Seconds that forward and backward of one batch take, on random clips (CPUs get few); leaves no gradients."""
    gpu = device.type == "cuda"
    number = c.batch_size if gpu else min(c.batch_size, max(2, 2 ** 21 // (c.frames * c.size ** 2)))
    video = torch.randint(256, (number, 3, c.frames, c.size, c.size), dtype=torch.uint8)
    video, mask = video.pin_memory() if gpu else video, tube_mask(number, grid, c.ratio)

    def work():
        with autocast(c.amp, device):
            loss, _ = parallel(normalise(video, device), mask)
        loss.backward()
        if optimizer:
            optimizer.step()
        parallel.zero_grad()

    return seconds(work, device, repeat) * c.batch_size / number


def fit(model, parallel, clips, judges, order, c, checkpoint, place, max_steps, cost, device):
    """The training loop, from `place` on; True when the schedule is complete.

    It waits for the GPU only where it writes a log line. There it also minds signals and unreadable videos.
    """
    out, log, optimizer = Path(c.out), Path(c.out, "log.jsonl"), make_optimizer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type in checkpoint["rng"].keys() - {"cpu"}:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])

    def save():
        if RANK == 0:
            rng = {"cpu": torch.get_rng_state()}
            if device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state()
            write_checkpoint(out, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=rng,
                                       scaler=scaler.state_dict(), config=vars(c), **vars(place)))

    if RANK == 0:                                                       # lines of steps that are going to be done again
        lines = log.read_text().splitlines(keepends=True) if checkpoint and log.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= place.step]
        log.write_text("".join(kept))
    if not checkpoint:
        save()                                                             # a place that can't be written to shows now
    order.epoch, order.seen = place.epoch, place.seen
    data = endless(loader(clips, order.batch, order, c.workers, device), order)
    last, every = min(c.steps, max_steps or c.steps), max(1, min(LOG_STEPS, int(LOG_SECONDS / cost)))
    recent, unreadable, found, hopeless, verdicts = [], {}, {}, False, 0
    logged, saved, waited = time.monotonic(), time.monotonic(), 0.0
    with stop_requests() as stopped, tqdm(total=c.steps, initial=place.step, unit="step", disable=RANK > 0,
                                          dynamic_ncols=True) as bar:
        while place.step < last:
            rate = learning_rate(place.step, c.steps, c.warmup_steps, c.peak_lr, FINAL_LR * c.global_batch / 256)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for part in range(1, c.accum + 1):
                asked = time.monotonic()
                video, mask, _, _, bad = next(data)
                waited += time.monotonic() - asked
                found |= {path: reason for sample in bad for path, reason in sample}
                hopeless |= any(len(sample) == RETRIES for sample in bad)
                with parallel.no_sync() if WORLD > 1 and part < c.accum else nullcontext():
                    with autocast(c.amp, device):
                        loss, stats = parallel(normalise(video, device), mask)
                    scaler.scale(loss / c.accum).backward()
                total = total + loss.detach() / c.accum
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recent.append({"loss": total, "grad_norm": norm} | {name: v for name, v in stats.items() if v.ndim == 0})
            epoch = place.step * c.epochs // c.steps
            place.step, place.seen = place.step + 1, place.seen + order.step
            if len(clips) - place.seen < order.step:                               # the rest is no whole step: dropped
                place.epoch, place.seen = place.epoch + 1, 0
            bar.update(1)
            judge = judges and c.eval_every and place.step * c.epochs // c.steps // c.eval_every > epoch // c.eval_every
            if not (place.step % every == 0 or place.step == last or judge or (WORLD == 1 and stopped)):
                continue

            # A log line: means over the steps since the last one, and over the ranks.
            names = list(recent[0])
            rows = torch.stack([torch.stack([line[name].float() for name in names]) for line in recent])
            if WORLD > 1:
                dist.all_reduce(rows)
            rows, recent = (rows / WORLD).tolist(), []                                                 # steps x numbers
            now, everyone = time.monotonic(), gather((bool(stopped), hopeless, found))
            stop, hopeless = (any(each[i] for each in everyone) for i in (0, 1))
            new = {path: reason for *_, theirs in everyone for path, reason in theirs.items() if path not in unreadable}
            unreadable, found = unreadable | new, {}
            for path, reason in new.items():
                say(f"unreadable video {path}: {reason}; another clip takes its place")
            line = {"step": place.step, "epoch": place.step * c.epochs / c.steps, "lr": rate}
            line |= {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows))}
            line |= {"clips_per_second": len(rows) * c.global_batch / (now - logged),
                     "data_wait": waited / (now - logged), "unreadable_videos": len(unreadable)}
            for number, row in enumerate(rows, start=place.step - len(rows) + 1):
                if not all(map(math.isfinite, row[:1] if scaler.is_enabled() else row)):     # fp16 skips such gradients
                    raise RunError(f"expected a finite loss and gradient, found loss {row[0]}, norm {row[1]} at step "
                                   f"{number}: the last good checkpoint is untouched, start anew from it with --init "
                                   f"{out / 'last.pt'}, another --out and a lower --lr or --amp off")
            if judge:
                line |= evaluate(model.encoder, judges, c, device)
                say(f"epoch {line['epoch']:g}: linear probe {line['linear_probe']:.1%}, k-NN {line['knn']:.1%}")
            verdict = place.step > c.warmup_steps and collapse(line, mask.sum().item())
            verdicts = verdicts + 1 if verdict else 0
            if verdicts == 10:                                                     # log lines in a row; it is said once
                say(verdict)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                                f"{line['data_wait']:.0%} waiting for data")
            if RANK == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
            hopeless |= len(unreadable) > max(TOLERATED, len(clips) // 100)
            if place.step == last or stop or hopeless or now - saved > SAVE_SECONDS:
                save()
                saved = now
            if hopeless:
                raise RunError(f"expected at most 1% unreadable videos, found {len(unreadable)} of {len(clips):,}: "
                               f"mend those named above and --resume {out}, or start a new run without them")
            if stop:
                break
            logged, waited = time.monotonic(), 0.0
    if place.step < c.steps:
        say(f"stopped after step {place.step:,} of {c.steps:,}; go on with --resume {out}")
    return place.step == c.steps


def collapse(line, tubes):
    """A sentence if a log line from after warmup shows collapsed features, else None. tubes: hidden ones in a batch."""
    if "log_k" not in line:
        return None
    used, k = math.exp(min(line["entropy"], line["target_entropy"])), math.exp(line["log_k"])
    advice = "lower --lr or --eps, or give Sinkhorn more tubes at a time (--batch-size, more processes)"
    if used < 0.25 * min(k, tubes):
        return f"collapsed? {tubes:,} hidden tubes share no more than {used:.0f} of {k:.0f} prototypes: {advice}"
    for term in ("target_term", "video_term"):
        if abs(line[term] / line["log_k"] - 1) < 0.01 or line[term] < 0.05 * line["log_k"]:
            return f"collapsed? {term} stays at {line[term]:.2f}, bad near 0 and ln K = {line['log_k']:.2f}: {advice}"


# --- What was learned -------------------------------------------------------------------------------------------------

def sample(clips, number):
    """Keys of up to `number` clips, spread over the whole set."""
    return [(0, i) for i in torch.linspace(0, len(clips) - 1, min(number, len(clips))).long().tolist()]


@torch.no_grad()
def pooled_features(encoder, clips, c, device):
    """Mean over the tokens of up to EVAL_CLIPS clips, (n, D) float32 on the CPU, and their labels (n,); all ranks share
    the work. A video that can't be read is named and has the label -1, which no prediction equals."""
    parts = []
    batches = loader(clips, 64, sample(clips, EVAL_CLIPS)[RANK::WORLD], c.workers, device)
    for video, _, label, _, bad in tqdm(batches, desc="features", unit="batch", leave=False, disable=RANK > 0):
        with autocast(c.amp, device):
            pooled = encoder(normalise(video, device)).mean(dim=1).float().cpu()
        parts.append((pooled, label.masked_fill(torch.tensor([len(each) > 0 for each in bad]), -1), bad))
    features, labels, bad = zip(*[part for theirs in gather(parts) for part in theirs])
    for path, reason in (each[0] for batch in bad for each in batch if each):
        say(f"unreadable video {path}: {reason}; it counts as wrong")
    return torch.cat(features), torch.cat(labels)


def evaluate(encoder, judges, c, device):
    """Top-1 of linear probe and k-NN on the frozen encoder. judges: clips to fit them on, clips to test them on."""
    features = [part for clips in judges for part in pooled_features(encoder, clips, c, device)]
    return {"linear_probe": linear_probe(*features), "knn": nearest_neighbours(*features)}


def linear_probe(train, train_labels, test, test_labels):
    """Top-1 of ridge regression to one-hot labels from frozen features, standardised by the training set."""
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test, targets = (train - mean) / std, (test - mean) / std, F.one_hot(train_labels).float()
    covariance = train.T @ train + 10 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(covariance, train.T @ (targets - targets.mean(dim=0)))
    return ((test @ weight + targets.mean(dim=0)).argmax(dim=1) == test_labels).float().mean().item()


def nearest_neighbours(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Top-1 of k-NN by cosine; a neighbour's vote weighs exp(cosine / temperature)."""
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
    cosines, index = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (cosines / temperature).exp())
    return (votes.argmax(dim=1) == test_labels).float().mean().item()


def picture(path, rows, height):
    """Writes rows (r, n, 3, h, w) uint8 of images as one PNG, each image `height` pixels high."""
    images = F.interpolate(rows.flatten(0, 1).float(), scale_factor=height / rows.shape[-2], mode="nearest-exact")
    save_image(images / 255, path, nrow=rows.shape[1], padding=2, pad_value=1)
    return path


def show_masks(path, clips):
    """Three clips, up to eight frames of each, and below each the same with its hidden tubes in grey."""
    rows = []
    for videos, masks, *_ in map(clips.__getitem__, sample(clips, 3)):
        hidden = masks[0].view(1, *clips.grid)
        for axis, step in enumerate(clips.tube, start=1):
            hidden = hidden.repeat_interleave(step, dim=axis)                                                 # 1 T S S
        for frames in (videos[0], videos[0].masked_fill(hidden, 128)):
            rows.append(frames[:, ::max(1, frames.shape[1] // 8)])
    return picture(path, torch.stack(rows).transpose(1, 2), height=96)


@torch.no_grad()
def show_prototypes(path, model, clips, device, number=12, nearest=8):
    """For some prototypes, from much to little used, a row of the real tubes nearest to it, from different clips."""
    tubes, best, places, use = [], [], [], 0
    for video, *_ in loader(clips, 8, sample(clips, 256), workers=0):
        tubes.append(take_tubes(video, clips.tube))                                                       # b N 3 p q r
        everything = torch.arange(tubes[-1].shape[1], device=device).expand(len(video), -1)
        features = model.embed(normalise(video, device), everything)                                            # b N E
        scores = model.compare(features, features)[1].view(*features.shape[:2], -1).cpu()                       # b N K
        use = use + scores.argmax(dim=2).flatten().bincount(minlength=scores.shape[2])
        for values, kept in zip(scores.max(dim=1), (best, places)):                      # each clip's nearest tube: b K
            kept.append(values)
    tubes, best, places = torch.cat(tubes), torch.cat(best), torch.cat(places)
    chosen = use.argsort(descending=True)[torch.linspace(0, int((use > 0).sum()) - 1, number).long()]
    clip = best[:, chosen].topk(min(nearest, len(best)), dim=0).indices                        # nearest clips: n number
    found = tubes[clip, places[:, chosen].gather(0, clip)]                                      # n number 3 p q r
    return picture(path, rearrange(found, "n k c p q r -> k n c q (p r)"), height=48)


def show(model, clips, judges, c, device):
    """Linear probe and k-NN, on the toy set of the untrained encoder too; results.json; pictures."""
    out, results = Path(c.out), {"config": vars(c)}
    encoders = {"untrained": make_model(c, device).encoder} if c.data == "toy" else {}
    for name, encoder in (encoders | {"trained": model.encoder}).items() if judges else ():
        results[name] = evaluate(encoder, judges, c, device)
        say(f"{name:13}linear probe {results[name]['linear_probe']:.1%}, k-NN {results[name]['knn']:.1%}")
    if RANK == 0:
        results["protocol"] = ("top-1 on validation clips; frozen encoder, mean over tokens, one view of each of at "
                               f"most {EVAL_CLIPS:,} clips; probe: ridge regression; k-NN: cosine, k = 20, "
                               "temperature 0.07")
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        files = [out / "last.pt", out / "log.jsonl", out / "results.json", show_masks(out / "masks.png", clips)]
        if c.target != "pixel":
            files.append(show_prototypes(out / "prototypes.png", model, clips, device))
        say(results["protocol"] * (len(results) > 2) + "\nwrote " + ", ".join(map(str, files)))


# --- Benchmark --------------------------------------------------------------------------------------------------------

def seconds(work, device, repeat=5):
    """Median time of work(), after one call that doesn't count."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]


def duration(time):
    return f"{time / 3600:,.1f} hours" if time > 5400 else f"{time / 60:.1f} minutes"


def naive_clip(path, frames, size):
    """The simple way to read a clip, to compare with: all frames decoded and converted, then some resized as floats."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"
        video = [scaled(f, f.width, f.height, "rgb24").to_ndarray() for f in container.decode(video=0)]
    clip = torch.stack([torch.from_numpy(frame) for frame in video[:frames]]).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(clip, (size, size), mode="bilinear", antialias=True)


def time_loading(clips):
    """Clips that one core reads in a second of its time: (this loader, the naive one), in turns on the same videos."""
    threads, spent, read = torch.get_num_threads(), [0.0, 0.0], 0
    torch.set_num_threads(1)                                                                # as in the loader's workers
    clips[0, 0]
    for _, index in sample(clips, 1000):
        for way, work in enumerate((lambda: clips[0, index],
                                    lambda: naive_clip(clips.videos.paths[index], clips.frames, clips.size))):
            start = time.process_time()
            work()
            spent[way] += time.process_time() - start
        read += 1
        if sum(spent) > BENCH_SECONDS:
            break
    torch.set_num_threads(threads)
    return read * clips.repeat / spent[0], read / spent[1]


def bench(c, given, device):
    """Prints how fast the loader, a training step and Sinkhorn are on this machine. Trains nothing, writes no run."""
    model, rows, loading = make_model(c, device), [], None
    try:
        clips = make_clips(c, model.encoder.tube, cache=None)
        loading, naive = time_loading(clips)
        rows.append(("loader, one core", f"{loading:,.1f} clips/s", f"{c.data}, {c.frames} x {c.size} x {c.size}, "
                     f"repeat {c.repeat}; {loading / naive:.1f} times naive PyAV's {naive:,.1f}"))
    except UserError as error:
        rows.append(("loader", "not measured", str(error)))
    c.batch_size = split_batch(c, given, len(clips) if loading else c.batch_size)[0]
    grid = [size // step for size, step in zip((c.frames, c.size, c.size), model.encoder.tube)]
    gpu = device.type == "cuda"
    side = 8192 if gpu else 4096
    large = torch.randn(side, side, device=device)
    with autocast(c.amp, device):
        large = large.to((large[:1] @ large[:, :1]).dtype)                                   # the dtype of its products
    product = 2 * side ** 3 / seconds(lambda: large @ large, device)                            # operations a second
    mask = tube_mask(1, grid, c.ratio)
    with FlopCounterMode(display=False) as counter:              # of one clip, nothing computed twice, before compiling
        build_model(c.model, target=c.target).to(device)(
            torch.zeros(1, 3, c.frames, c.size, c.size, device=device), mask)[0].backward()
    work = counter.get_total_flops()
    training = c.batch_size / time_batch(model, c, grid, device, make_optimizer(model), repeat=5)    # clips a second
    rows.append(("training step", f"{training:,.2f} clips/s", f"{c.model}, {c.target}, batch {c.batch_size}, "
                 f"{str(large.dtype).removeprefix('torch.')}"))
    rows += [("arithmetic", f"{work / 1e9:,.2f} GFLOP/clip", "forward and backward, matrix products"),
             ("share of matrix product", f"{work * training / product:.0%}",
              f"of {product / 1e9:,.0f} GFLOP/s, {side} x {side}")]
    if c.target != "pixel":
        n, k = int(mask.sum()) * c.batch_size, len(model.prototypes)
        scores, vector = 2 * torch.rand(n, k, device=device) - 1, torch.rand(k, device=device)
        ratio = seconds(lambda: sinkhorn(scores, model.eps), device) / seconds(lambda: scores @ vector, device)
        rows.append(("Sinkhorn", f"{ratio:.0f} products", f"of the {n:,} x {k:,} scores with a vector"))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.append(("peak memory", f"{peak / 2 ** 30:.2f} GiB", "of the GPU" if gpu else "of the process"))
    if loading:
        slower = "loader" if loading * max(c.workers, 1) < training else "model"
        rows.append(("bottleneck", slower, f"with {c.workers} workers; {math.ceil(training / loading)} balance them"))
    if videos := len(clips) if loading else SETS.get(c.data, {}).get("videos"):
        times = [duration(videos * c.epochs / training / count) for count in (1, 8, 64)]
        rows.append(("the recipe's time", "", f"{', '.join(times)} on 1, 8, 64 such {'GPUs' if gpu else 'machines'}: "
                     f"{videos:,} videos x {c.epochs} epochs, if the loader keeps up"))
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    for label, value, note in rows:
        print(f"{label:26}{value:>18}   {note}")


def main(argv=None):
    """Runs the command line. Returns the exit code: 0; 1 for a run that can't go on; 2 for wrong usage."""
    given = parse(argv)
    try:
        config, checkpoint = configure(given)
        c = Namespace(**config)
        if "bench" in given and WORLD > 1:
            raise UserError(f"expected --bench in one process, found {WORLD}: run it without torchrun")
        device = set_up()
        if c.data == "toy":
            if RANK == 0:
                make_toy(c.root or "data/toy")
            gather(None)                                                        # the others wait until it is there
        if "bench" in given:
            bench(c, given, device)
        else:
            pretrain(c, given, checkpoint, device)
        return 0
    except (UserError, RunError, OSError, RuntimeError) as error:
        known = {"DataLoader worker": "a loader worker was killed, often for want of memory: lower --workers",
                 "out of memory": "a batch did not fit into memory: lower --batch-size",
                 "inductor": "the blocks can't be compiled, is there a C++ compiler? leave out --compile",
                 "onnection": "another process of the run is gone: its own message says why"}
        if not isinstance(error, (UserError, RunError, OSError)):
            known = [sentence for part, sentence in known.items() if part in str(error)]
            if not known:
                raise
            error = f"{known[0]}; go on with --resume"
        if RANK:                            # what all ranks find wrong the first one says, and torchrun ends the others
            time.sleep(3)
        print(f"error{f' on rank {RANK}' if RANK else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        kill_workers()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
