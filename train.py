"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                   toy set: render, pretrain, linear probe, k-NN
    torchrun --nproc_per_node=8 train.py --data k400 --root DIR        the paper's recipe
    python train.py --data videos/ --model small --epochs 100          your own videos

A run writes last.pt, log.jsonl and results.json to its folder, --out. SIGTERM, SIGUSR1 and Ctrl-C
save and stop it, a second one ends it at once; the same command goes on where it stopped.
"""
import argparse
import copy
import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Clips, EndlessSampler, Videos, centre_crop, centre_frames, corner_crop,
                  find_videos, kill_workers, loader, make_toy, normalise, open_videos)
from sigma import (DINO, SIGMA, SIZES, TARGETS, Teacher, UserError, fill, read_checkpoint,
                   sizes_for, tube_mask)

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun's
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600  # at most, from one log line or save to the next
MAX_UNREADABLE = 0.01  # share of the videos; five are always tolerated
EVAL_CLIPS = 10_000  # of each split, for probe and k-NN
PROTOCOL = ("top-1, frozen encoder, mean over tokens, one centre clip per video; probe: ridge "
            "regression on standardised features; k-NN: cosine, k = 20, temperature 0.07")


class RunError(UserError):
    """A run that can't go on; its message says why and what is left."""
    code = 1


# --- Recipes and flags ----------------------------------------------------------------------------

RECIPE = dict(frames=16, stride=4, size=224, ratio=0.9, epochs=800, warmup=40, lr=1.5e-4,
              final_lr=1e-5, eps=0.05, clips=40, global_batch=None, workers=min(8, os.cpu_count()))
K400 = dict(global_batch=16 * 40)  # GPUs x clips on each, as published
RECIPES = {  # what a data set changes; ucf101 and hmdb51: the paper does not pretrain on them
    "k400": K400, "ucf101": K400, "hmdb51": K400,
    "ssv2": dict(stride=2, eps=0.03, clips=32, global_batch=16 * 32),
    "ssv2 small": dict(stride=2, epochs=2400, clips=16, global_batch=8 * 16),
    "toy": dict(frames=8, stride=1, size=32, ratio=0.75, epochs=16, warmup=1, lr=8e-3, eps=0.03,
                clips=64, global_batch=64, workers=0),
}


def recipe(data, model):
    """The settings for a model on a data set; tiny takes clips like the toy set's from any data."""
    own = "toy" if model == "tiny" else data
    return RECIPE | RECIPES.get(f"{own} {model}", RECIPES.get(own, {}))


def locate(data, root=None):
    """Where the videos of --data and --root are: the folder of a named set, or a folder or list."""
    return root or (f"data/{data}" if data in RECIPES else data)


def count(text):
    """A flag's whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


FLAGS = {  # the scripts in extras/ take theirs from here
    "data": dict(default="toy", help="k400, ssv2, ucf101, hmdb51, toy, a folder or a list"),
    "root": dict(help="folder of a named set (default: data/<name>)"),
    "val": dict(help="labelled videos to test on (default: val or test of --data)"),
    "model": dict(choices=SIZES, help="default: tiny for toy, else base"),
    "target": dict(choices=TARGETS, default="mlp", help="mlp: SIGMA-MLP (default); dino, dino-s: "
                   "SIGMA-DINO with ViT-B or ViT-S; pixel: VideoMAE"),
    "teacher": dict(metavar="FILE", help="DINO's weights (default: downloaded once)"),
    "init": dict(metavar="FILE", help="checkpoint, or folder of a run, whose weights are taken"),
    "out": dict(help="folder to write to (default: below out/, named after --data)"),
    "epochs": dict(type=count, help="passes over the data; the schedule stretches with them"),
    "batch-size": dict(type=count, help="clips at a time in a process: what its memory holds"),
    "accum": dict(type=count, help="batches per step (default: as many as make the recipe's global "
                  "batch); Sinkhorn still balances each batch alone"),
    "repeat": dict(type=count, default=1, help="clips from each decoded video: loads faster"),
    "mask": dict(choices=["tube", "motion"], default="tube", help="motion: visible places move "
                 "with the picture, see extras/motion.py"),
    "lr": dict(type=float, help="peak learning rate for 256 clips per step, scaled to yours"),
    "eps": dict(type=float, help="Sinkhorn's: smaller is sharper; 0.03 to 0.05 is usual"),
    "frames": dict(type=count, help="frames of a clip"),
    "stride": dict(type=count, help="video frames from one frame of a clip to the next"),
    "size": dict(type=count, help="height and width of a clip, pixels"),
    "amp": dict(choices=["bf16", "fp16", "off"], help="autocast (default: bf16 or fp16 on GPUs)"),
    "compile": dict(action="store_true", help="compile the blocks: starts slowly, runs faster"),
    "workers": dict(type=int, help="loader processes of each training process"),
    "timeout": dict(type=count, default=300, help="seconds to wait for the loader"),
    "seed": dict(type=int, default=0, help="of new weights, order, crops and masks"),
    "eval-every": dict(type=int, default=0, help="epochs between probes (default: at the end)"),
    "keep-every": dict(type=int, default=0, help="epochs between checkpoints that are kept"),
    "max-steps": dict(type=count, help="stop and save after this step"),
}


def parser_with(description, *names):
    """A parser of command lines with those of FLAGS."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **FLAGS[name])
    return parser


def check(parser, args, tube):
    """Ends with a usage error if flags can't be used together."""
    sides = (args.frames, args.size, args.size)
    if any(side % step for side, step in zip(sides, tube)):
        parser.error(f"--frames and --size must be multiples of the model's tubes, {tube}")
    if args.root and args.data not in RECIPES:
        parser.error("--root only applies to named data sets, not to a folder or list")
    if args.batch_size and args.batch_size % args.repeat:
        parser.error("--batch-size must be divisible by --repeat")
    if not 0 <= args.lr < math.inf or args.workers < 0:
        parser.error("--lr and --workers must be at least 0")


def parse(argv):
    """The flags, with the recipe of --data and --model as defaults."""
    parser = parser_with(__doc__, *FLAGS)
    known, _ = parser.parse_known_args(argv)
    model = known.model or ("tiny" if known.data == "toy" else "base")
    name = f"{Path(known.data).resolve().stem}-{model}-{known.target}"
    parser.set_defaults(model=model, out=f"out/{name}", **recipe(known.data, model))
    args = parser.parse_args(argv)
    tube = sizes_for(args.model)["tube"]
    check(parser, args, tube)
    if args.size == tube[1]:
        parser.error("--size must be larger than a tube, or nothing is left to predict from")
    if args.teacher and args.target not in DINO:
        parser.error("--teacher only applies to --target dino or dino-s")
    if args.mask == "motion" and not Path(__file__).with_name("extras").exists():
        parser.error("--mask motion needs extras/motion.py")
    if args.eps < 0.005:
        parser.error("--eps must be at least 0.005")
    return args


def split_batch(args, world, videos):
    """(clips at a time in each process, batches accumulated) that make the recipe's global batch,
    or for a small set as many clips as it has. Given flags are kept."""
    most = args.batch_size or args.clips
    wanted = args.global_batch or most * world * (args.accum or 1)
    share = max(1, min(wanted, videos) // world)  # of each process
    if args.batch_size:
        return args.batch_size, args.accum or max(1, share // args.batch_size)
    accum = args.accum or math.ceil(share / most)
    batch = max(1, min(most, share // accum) // args.repeat) * args.repeat
    return batch, accum


# --- Set-up ---------------------------------------------------------------------------------------

def set_up():
    """Joins the processes that torchrun started, if it did; returns this one's device."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: 0.1% of the assignments change
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    else:
        device, libc = torch.device("cpu"), ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc: keep large freed blocks, since getting them anew
            libc.mallopt(-4, 0)       # from the system, page by page, takes up to a third of a step
            libc.mallopt(-1, 2 ** 31 - 1)
    if WORLD > 1:  # others wait while one renders, downloads or walks a slow disk
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return device


def log(text):
    """Prints above the progress bar, on the first rank alone."""
    if RANK == 0:
        tqdm.write(text)


def gather(thing=None):
    """The list of every rank's thing; waits for all."""
    things = [thing] * WORLD
    if WORLD > 1:
        dist.all_gather_object(things, thing)
    return things


def one_first(work):
    """work() in one process of each machine, then in the others, which find what it has left."""
    for turn in (True, False):
        if turn == (LOCAL_RANK == 0):
            result = work()
        gather()
    return result


def pick_amp(name, device):
    """The dtype of autocast, None for float32: --amp, or on a GPU the best that it has."""
    if name is None and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def autocast(amp, device):
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


def make_teacher(args, tube):
    """The frozen Teacher of a DINO target, from --teacher or downloaded into torch's cache."""
    def download():
        _, url, sha = DINO[args.target]
        name = Path(url).stem + (f"-{sha}.pth" if sha else ".pth")  # torch checks such a hash
        socket.setdefaulttimeout(30)
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True,
                                                      check_hash=bool(sha), file_name=name)
        except (OSError, RuntimeError) as error:
            raise UserError(f"DINO's weights can't be downloaded ({error}): get {url} elsewhere "
                            "and give the file with --teacher") from error

    if args.teacher:
        return Teacher(read_checkpoint(args.teacher, "patch_embed.proj.weight")["model"], tube)
    return Teacher(one_first(download), tube)


def make_optimizer(model):
    """AdamW, without weight decay on biases, norms and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=0.05),
              dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, warmup, peak, final):
    """Linear from 0 to peak in `warmup` steps, then a cosine down to final."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# --- Interruptions --------------------------------------------------------------------------------

@contextmanager
def stop_signals():
    """A list that SIGTERM, SIGUSR1 and Ctrl-C add to; the second one ends the process at once."""
    seen, before = [], {}

    def note(number, frame):
        seen.append(number)
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        before[name] = signal.signal(name, note)
    try:
        yield seen
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def within(seconds, batches):
    """Yields a loader's batches. Raises RunError after so many seconds without one."""
    def give_up(number, frame):
        raise RunError(f"the loader gave no batch in {seconds} s, is a disk stalled? Its workers "
                       f"have open: {', '.join(open_videos()) or 'no video, or not known'}")

    signal.signal(signal.SIGALRM, give_up)
    batches = iter(batches)
    while True:
        signal.alarm(seconds)
        try:
            batch = next(batches, None)
        finally:
            signal.alarm(0)
        if batch is None:
            return
        yield batch


def save_atomically(path, content):
    """torch.save under another name, then renamed: the file is complete or not there."""
    draft = path.with_name(path.name + ".unfinished")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        draft.unlink(missing_ok=True)
        raise RunError(f"{path} can't be written ({error}); what was there before is untouched, "
                       "and the same command goes on from it") from error


def saved_run(args):
    """The checkpoint in --out, None if there is none. Raises UserError if flags contradict it."""
    if not Path(args.out, "last.pt").exists():
        return None
    saved, given = read_checkpoint(args.out), vars(args)
    free = {"root", "val", "out", "teacher", "batch_size", "accum", "workers", "timeout", "compile",
            "eval_every", "keep_every", "max_steps", "views"}
    differ = [f"--{name.replace('_', '-')} {given.get(name)} (the run has {value})"
              for name, value in saved["args"].items()
              if name not in free and given.get(name) != value]
    if differ:
        raise UserError(f"the run in {args.out} goes on with its own settings, but you give "
                        f"{', '.join(differ)}: leave them out, or choose another --out")
    return saved


# --- Probe and k-NN of the frozen encoder ---------------------------------------------------------

@torch.no_grad()
def collect(forward, clips, device, amp=None, workers=0):
    """(outputs (n, ...), labels (n,)) of all clips in order, on every rank; ranks share the work.

    forward: normalised clips (B, 3, T, S, S) -> (B, ...), averaged over the clips of a video. A
    video that can't be read is named; its output is 0 and its label -1, which no prediction equals.
    """
    batch = max(1, 64 // clips.repeat) if device.type == "cuda" or clips.size < 64 else 1
    keys = [(0, i) for i in range(RANK, len(clips), WORLD)]
    batches = within(300, loader(clips, batch, keys, workers, device))
    found, unreadable = [], {}
    bar = tqdm(batches, desc="evaluating", total=math.ceil(len(keys) / batch), unit="batch",
               leave=False, disable=RANK > 0)
    for video, _, label, index, bad in bar:
        with autocast(amp, device):
            output = forward(normalise(video, device)).float().unflatten(0, (len(label), -1))
        found.append((index, label, output.mean(dim=1).cpu()))
        unreadable.update(sum(bad, []))
    unreadable = {path: reason for part in gather(unreadable) for path, reason in part.items()}
    for path, reason in unreadable.items():
        log(f"unreadable video {path}: {reason}")
    if len(unreadable) == len(set(clips.videos.paths)):
        raise UserError("none of the videos can be read")
    found = [row for rows in gather(found) for row in rows]
    index, label, output = (torch.cat(part) for part in zip(*found))
    order = index.argsort()
    return output[order], label[order]


def accuracy(scores, labels, k=1):
    """Share of rows of scores (n, classes) whose k largest hold the label (n,)."""
    hits = scores.topk(min(k, scores.shape[1])).indices == labels[:, None]
    return hits.any(dim=1).float().mean().item()


def linear_probe(train, labels, test):
    """Class scores of test features: ridge regression to one-hot labels, standardised features."""
    train, labels = train[labels >= 0], labels[labels >= 0]
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test, targets = (train - mean) / std, (test - mean) / std, F.one_hot(labels).float()
    covariance = train.T @ train + 10 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(covariance, train.T @ (targets - targets.mean(dim=0)))
    return test @ weight + targets.mean(dim=0)


def nearest_neighbours(train, labels, test, k=20, temperature=0.07):
    """Class scores of test features: k-NN, a neighbour's vote weighs exp(cosine / temperature)."""
    train, labels = F.normalize(train[labels >= 0], dim=1), labels[labels >= 0]
    votes = torch.zeros(len(test), int(labels.max()) + 1)
    for rows, part in zip(votes.split(1024), F.normalize(test, dim=1).split(1024)):
        cosines, index = (part @ train.T).topk(min(k, len(train)), dim=1)
        rows.scatter_add_(1, labels[index], (cosines / temperature).exp())
    return votes


def evaluate(encoder, sets, device, amp, workers):
    """Accuracy of probe and k-NN; sets: labelled training clips, and held-out ones to test on."""
    (train, labels), (test, truth) = (
        collect(lambda video: encoder(video).mean(dim=1), clips, device, amp, workers)
        for clips in sets)
    return {"linear_probe": accuracy(linear_probe(train, labels, test), truth),
            "knn": accuracy(nearest_neighbours(train, labels, test), truth)}


def show(results):
    """Logs the accuracies of a run."""
    for name, row in results.items():
        if name in ("untrained", "trained"):
            log(f"{name:10}linear probe {row['linear_probe']:.1%}, k-NN {row['knn']:.1%}")
    log(results["protocol"] if "trained" in results else "no probe: it takes labels, and labelled "
        "videos in val or test of --data, or --val")


# --- Training -------------------------------------------------------------------------------------

def collapse(line, tubes):
    """A sentence if a log line from after warmup shows collapsed features, else None. tubes: hidden
    ones in a batch; a few need not use all prototypes."""
    if "log_k" not in line:
        return None
    k, used = math.exp(line["log_k"]), math.exp(min(line["entropy"], line["target_entropy"]))
    terms = line["target_term"], line["video_term"]
    stuck = any(abs(t / line["log_k"] - 1) < 0.01 or t < 0.05 * line["log_k"] for t in terms)
    if stuck or used < 0.25 * min(k, tubes):
        return (f"collapsed? {used:.0f} of {k:.0f} prototypes are effectively in use, the terms of "
                f"the loss are {terms[0]:.2f} and {terms[1]:.2f} (bad: near 0, or ln K = "
                f"{line['log_k']:.2f}): lower --lr or --eps, or raise --batch-size")


def fit(args, model, optimizer, clips, loss_of, *, device, sizes, before=None, probe=None):
    """The training loop, to the last step, --max-steps or a signal; returns the step if all are
    done. loss_of(network, batch): the loss of a loader's batch and detached statistics; network is
    the model, in DDP if there are several processes. sizes: the model's, for its checkpoints.
    before: what saved_run returned. probe(): figures for the log, every --eval-every epochs."""
    out = Path(args.out)
    batch, accum = split_batch(args, WORLD, len(clips))
    per_step, step = batch * accum * WORLD, 0  # clips
    steps = max(1, args.epochs * len(clips) // per_step)
    warmup = int(min(args.warmup, args.epochs / 8) * len(clips) / per_step)
    peak, final = args.lr * per_step / 256, args.final_lr * per_step / 256
    scaler = torch.amp.GradScaler(device.type, enabled=pick_amp(args.amp, device) == torch.float16)
    if before:
        if before["videos"] != len(clips):
            raise UserError(f"the run in {out} has {before['videos']:,} videos, there are now "
                            f"{len(clips):,}: start a new one with --init {out} and another --out")
        fill(model, before["model"], out)
        optimizer.load_state_dict(before["optimizer"])
        scaler.load_state_dict(before["scaler"])
        step = before["clips_seen"] // per_step
        if step >= steps:
            return step
    log(f"data      {len(clips):,} videos, {len(clips.videos.skipped):,} files or lines skipped "
        f"({out}/skipped.txt)\n"
        f"clips     {args.frames} frames, {args.stride} apart, {args.size} x {args.size}; "
        f"{WORLD} processes x {batch} at a time x {accum} accumulated = {per_step} per step\n"
        f"schedule  {args.epochs} epochs = {steps:,} steps, {warmup:,} of them warmup; learning "
        f"rate {args.lr:g} x {per_step} / 256 = {peak:.3g}")

    def save(name="last.pt"):
        if RANK == 0:
            save_atomically(out / name, dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), sizes=sizes,
                scaler=scaler.state_dict(), clips_seen=step * per_step, videos=len(clips),
                log_size=(out / "log.jsonl").stat().st_size, args=vars(args)))

    if RANK == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "skipped.txt").write_text("".join(f"{line}\n" for line in clips.videos.skipped))
            with open(out / "log.jsonl", "a") as file:  # without the steps that come once more
                file.truncate(min(before["log_size"], file.tell()) if before else 0)
        except OSError as error:
            raise UserError(f"--out {out} can't be used: {error}") from error
    if not before:
        (out / "results.json").unlink(missing_ok=True)  # of a run that was here before
        save()  # a disk that can't be written to shows now
    network, control = model, None
    if WORLD > 1:
        network = DistributedDataParallel(model, broadcast_buffers=False)
        control = dist.new_group(backend="gloo")  # two numbers per step
    sampler = EndlessSampler(len(clips), batch // args.repeat, RANK, WORLD, args.seed,
                             step * per_step // args.repeat)
    batches = within(args.timeout, loader(clips, sampler.batch, sampler, args.workers, device))
    recent, unreadable, named, bad_lines = [], {}, set(), 0
    logged, saved, waited = time.monotonic(), time.monotonic(), 0.0
    last, stopped = min(steps, args.max_steps or steps), False
    bar = tqdm(total=steps, initial=step, unit="step", disable=RANK > 0, dynamic_ncols=True)
    with stop_signals() as signals, bar:
        while step < last and not stopped:
            rate = learning_rate(step, steps, warmup, peak, final)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1)
            total = 0.0
            for part in range(1, accum + 1):
                asked = time.monotonic()
                samples = next(batches)
                waited += time.monotonic() - asked
                unreadable.update(sum(samples[-1], []))
                # What is random in a step follows from its number: a run goes on exactly.
                torch.manual_seed(hash((args.seed, step, part, RANK)) % 2 ** 63)
                with network.no_sync() if WORLD > 1 and part < accum else nullcontext():
                    loss, stats = loss_of(network, samples)
                    scaler.scale(loss / accum).backward()
                total = total + loss.detach() / accum
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()
                                            if p.grad is not None])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            stats = {name: value for name, value in stats.items() if value.ndim == 0}
            recent.append({"loss": total, "grad_norm": norm, **stats})
            epoch, step = step * per_step // len(clips), step + 1
            bar.update()

            # All ranks agree on what comes next. Until here nothing has waited for the GPU.
            late = time.monotonic() - logged > LOG_SECONDS or step % LOG_STEPS == 0
            flags = torch.tensor([len(signals) > 0, late], dtype=torch.int)
            if WORLD > 1:
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=control)
            stopped, late = flags.bool().tolist()
            now = step * per_step // len(clips)
            probing, keeping = (every and now // every > epoch // every
                                for every in (args.eval_every, args.keep_every))
            if not (late or stopped or step == last or probing or keeping):
                continue

            # A log line: means over the steps since the last one, and over the ranks.
            rows = torch.stack([torch.stack([x.float() for x in one.values()]) for one in recent])
            rows = rows / WORLD
            if WORLD > 1:
                dist.all_reduce(rows)
            for i, row in enumerate(rows.tolist(), start=step - len(rows) + 1):
                if not all(map(math.isfinite, row[:1] if scaler.is_enabled() else row)):
                    raise RunError(f"the loss ({row[0]}) or its gradient ({row[1]}) is not finite "
                                   f"at step {i}; {out}/last.pt is the last good checkpoint. Start "
                                   f"anew from it: --init {out}, another --out, a lower --lr")
            seconds = time.monotonic() - logged
            line = {"step": step, "epoch": step * per_step / len(clips), "lr": rate,
                    **dict(zip(recent[0], rows.mean(dim=0).tolist())),
                    "clips_per_second": len(rows) * per_step / seconds,
                    "data_wait": waited / seconds}
            for path, reason in (pair for found in gather(unreadable) for pair in found.items()):
                if path not in named:
                    named.add(path)
                    log(f"unreadable video {path}: {reason}; another one takes its place")
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                                f"{line['data_wait']:.0%} waiting for data")
            problem = collapse(line, int(samples[1].sum())) if step > warmup else None
            bad_lines = bad_lines + 1 if problem else 0
            if bad_lines == 10:  # in a row; said once
                log(problem)
            if probing and probe:
                line |= (found := probe())
                show({"trained": found, "protocol": f"at epoch {line['epoch']:g}"})
            if RANK == 0:
                line = {name: x if math.isfinite(x) else None for name, x in line.items()}
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line | {"unreadable_videos": len(named)}) + "\n")
            too_many = len(named) > max(min(5, len(clips) - 1), MAX_UNREADABLE * len(clips))
            if stopped or step == last or too_many or time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if keeping:
                save(f"epoch-{now:04}.pt")
            if too_many:
                raise RunError(f"{len(named)} of {len(clips):,} videos can't be read, more than "
                               f"{MAX_UNREADABLE:.0%}: mend or remove those named above")
            recent, logged, waited = [], time.monotonic(), 0.0
    if step >= steps:
        return step
    log(f"stopped after step {step:,} of {steps:,}; the same command goes on")


def main(argv=None):
    """Pretraining, from the flags to the results."""
    args = parse(argv)
    device, out, root = set_up(), Path(args.out), locate(args.data, args.root)
    amp, before = pick_amp(args.amp, device), saved_run(args)
    if before and (out / "results.json").exists():
        show(json.loads((out / "results.json").read_text()))
        return log(f"{out} is complete; to start anew choose another --out, or remove it")

    # Model and optimiser.
    sizes, teacher = sizes_for(args.model, args.target, eps=args.eps), None
    if args.target in DINO:
        teacher = make_teacher(args, sizes["tube"]).to(device)
        sizes["target_dim"] = teacher.dim
    torch.manual_seed(args.seed)
    model = SIGMA(**sizes).to(device)
    untrained = copy.deepcopy(model.encoder) if args.data == "toy" else None
    if args.init and not before:
        fill(model, read_checkpoint(args.init)["model"], args.init)
    for part in (model.encoder, model.decoder):
        part.recompute = args.model in ("large", "huge")  # memory before speed
        for block in part.blocks if args.compile else ():
            block.compile()
    log(f"model     {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"target {args.target}, on {device}, {str(amp or torch.float32).removeprefix('torch.')}")

    # Videos: to train on; for probe and k-NN some of them, and held-out ones to test on.
    if args.data == "toy":
        one_first(lambda: make_toy(root))
    videos, held_out = find_videos(root), Videos()
    if max(videos.labels) >= 0:
        splits = ("val", "test", "") if args.val else ("val", "test")
        held_out = find_videos(args.val or root, splits, videos.classes, required=bool(args.val))
    shape = dict(frames=args.frames, stride=args.stride, size=args.size, tube=sizes["tube"],
                 ratio=args.ratio, seed=args.seed, cache={} if args.data == "toy" else None)
    kind = Clips
    if args.mask == "motion":
        sys.path.append(str(Path(__file__).with_name("extras")))
        from motion import clips_for
        kind = clips_for(videos, log)
    clips = kind(videos, **shape, repeat=args.repeat,
                 crop=centre_crop if args.data == "toy" else corner_crop)
    sets = [Clips(some.spread(EVAL_CLIPS), **shape, choose=centre_frames, crop=centre_crop, tries=1)
            for some in (videos, held_out)]

    def probe(encoder=model.encoder):
        return evaluate(encoder, sets, device, amp, args.workers)

    def loss_of(network, samples):
        video = normalise(samples[0], device)
        with autocast(amp, device):
            return network(video, samples[1], teacher(video) if teacher else None)

    if args.target != "pixel":
        tubes = tube_mask(1, clips.grid, args.ratio).sum() * split_batch(
            args, WORLD, len(clips))[0] * WORLD
        log(f"Sinkhorn  {tubes:,} hidden tubes at a time share {len(model.prototypes):,} prototypes"
            "; if fewer than three for each, raise --batch-size (--accum does not help)")
    labelled = max(held_out.labels, default=-1) >= 0
    step = fit(args, model, make_optimizer(model), clips, loss_of, device=device, sizes=sizes,
               before=before, probe=probe if labelled else None)
    if step is None:
        return

    # Results.
    results = dict(protocol=PROTOCOL, step=step, checkpoint=f"{out}/last.pt", args=vars(args))
    if labelled:
        results |= {"untrained": probe(untrained)} if untrained else {}
        results["trained"] = probe()
    if RANK == 0:
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        show(results)
        source = f"--data {args.data}" + (f" --root {args.root}" if args.root else "")
        print(f"wrote {out}/last.pt, log.jsonl and results.json; next:\n"
              f"    python extras/pictures.py {out} {source}\n"
              f"    python extras/finetune.py --init {out} {source}\n"
              f"    python extras/features.py --init {out} {source}")


def launch(main, argv=None):
    """Runs main(argv); what a user can mend ends in one sentence. Returns the exit code."""
    try:
        main(argv)
        return 0
    except UserError as error:
        code, message = error.code, error
    except torch.OutOfMemoryError:
        code, message = 1, "out of GPU memory: lower --batch-size, --accum makes up for it"
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        code, message = 1, f"{error}, perhaps for want of memory: lower --workers"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    finally:
        kill_workers()
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6: gloo's threads still need Python to free tensors
            dist.destroy_process_group()
    if RANK:  # what all ranks find the first one says; torchrun then ends the others
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(launch(main))
