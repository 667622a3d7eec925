"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                   toy set: render, pretrain, linear probe, k-NN
    torchrun --nproc_per_node=8 train.py --data k400 --root DIR        the paper's recipe
    python train.py --data videos/ --model small --epochs 100          your own videos

A run writes last.pt, log.jsonl and results.json to its folder, --out. SIGTERM, SIGUSR1 and Ctrl-C
save and stop it, a second one ends it at once; the same command goes on where it stopped.
"""
import argparse
import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (Clips, centre_crop, centre_frames, corner_crop, endless_order, find_videos,
                  kill_workers, loader, make_toy, normalise, on_signals)
from sigma import (DINO, SIGMA, SIZES, TARGETS, RunError, Teacher, UserError, fill,
                   read_checkpoint, sizes_for, tube_mask)

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun's
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)
AMP = "bf16" if BF16 else "fp16" if GPU else "off"  # the fastest that this machine has
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600  # at most, from one log line or save to the next
MAX_UNREADABLE = 0.01  # share of the videos; five are always tolerated
EVAL_CLIPS = 10_000  # of each split, for probe and k-NN
PROTOCOL = ("top-1, frozen encoder, mean over tokens, one centre clip per video; probe: ridge "
            "regression on standardised features; k-NN: cosine, k = 20, temperature 0.07")


# --- Recipes and flags ----------------------------------------------------------------------------

RECIPE = dict(frames=16, stride=4, size=224, ratio=0.9, epochs=800, warmup=40, lr=1.5e-4,
              final_lr=1e-5, eps=0.05, gpu_batch=40, global_batch=None,
              workers=min(8, os.cpu_count()))
K400 = dict(global_batch=16 * 40)  # GPUs x clips on each, as published
RECIPES = {  # what a data set changes; ucf101 and hmdb51: the paper does not pretrain on them
    "k400": K400, "ucf101": K400, "hmdb51": K400,
    "ssv2": dict(stride=2, eps=0.03, gpu_batch=32, global_batch=16 * 32),
    "ssv2 small": dict(stride=2, epochs=2400, gpu_batch=16, global_batch=8 * 16),
    "toy": dict(frames=8, stride=1, size=32, ratio=0.75, epochs=16, warmup=1, lr=6e-3, eps=0.03,
                gpu_batch=64, global_batch=64, workers=0),
}


def recipe(data, model):
    """The settings for a model on a data set; tiny takes clips like the toy set's from any data."""
    own = "toy" if model == "tiny" else data
    workers = {} if data == "toy" else {"workers": RECIPE["workers"]}
    return RECIPE | RECIPES.get(f"{own} {model}", RECIPES.get(own, {})) | workers


def locate(data, root=None):
    """Where the videos of --data and --root are: the folder of a named set, or a folder or list."""
    if root and data not in RECIPES:
        raise UserError("--root only applies to named data sets, not to a folder or list")
    return root or (f"data/{data}" if data in RECIPES else data)


def at_least(low, kind=int):
    """The type of a flag: a finite number, `low` or more."""
    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return kind(text)
    return number


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
    "epochs": dict(type=at_least(1), help="passes over the data; the schedule stretches with them"),
    "batch-size": dict(type=at_least(1), help="clips at a time in a process: as memory allows"),
    "accum": dict(type=at_least(1), help="batches per step (default: as many as make the recipe's "
                  "global batch); Sinkhorn still balances each batch alone"),
    "repeat": dict(type=at_least(1), default=1, help="clips from each decoding: loads faster"),
    "mask": dict(choices=["tube", "motion"], default="tube", help="see extras/motion.py"),
    "lr": dict(type=at_least(0, float), help="peak learning rate for 256 clips a step, scaled"),
    "eps": dict(type=at_least(0.005, float), help="Sinkhorn's, 0.03 to 0.05 is usual"),
    "frames": dict(type=at_least(1), help="frames of a clip"),
    "stride": dict(type=at_least(1), help="video frames from one frame of a clip to the next"),
    "size": dict(type=at_least(1), help="height and width of a clip, pixels"),
    "amp": dict(choices=["bf16", "fp16", "off"], default=AMP, help=f"autocast (default: {AMP})"),
    "compile": dict(action="store_true", help="compile the blocks: starts slowly, runs faster"),
    "workers": dict(type=at_least(0), help="loader processes of each training process"),
    "timeout": dict(type=at_least(1), default=300, help="seconds to wait for the loader"),
    "seed": dict(type=int, default=0, help="of new weights, order, crops and masks"),
    "eval-every": dict(type=at_least(0), default=0, help="epochs between probes (default: none)"),
    "keep-every": dict(type=at_least(0), default=0, help="epochs between checkpoints to keep"),
    "max-steps": dict(type=at_least(1), help="stop and save after this step"),
}


def parser_with(description, *names):
    """An argument parser with the given entries of FLAGS."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **FLAGS[name])
    return parser


def check(parser, args, tube):
    """Ends with a usage error if flags can't be used together."""
    if any(side % step for side, step in zip((args.frames, args.size, args.size), tube)):
        parser.error(f"--frames and --size must be multiples of the model's tubes, {tube}")
    if args.batch_size and args.batch_size % args.repeat:
        parser.error("--batch-size must be divisible by --repeat")


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
    return args


def split_batch(args, world, videos):
    """(clips at a time in each process, batches accumulated) that make the recipe's global batch,
    640 = 8 processes x 40 x 2; or, of a small set, all its clips. Given flags are kept."""
    most = args.batch_size or args.gpu_batch
    wanted = args.global_batch or most * world * (args.accum or 1)
    share = max(1, min(wanted, videos) // world)  # of each process
    if args.batch_size:
        return args.batch_size, args.accum or max(1, share // args.batch_size)
    accum = args.accum or math.ceil(share / most)
    return max(1, min(most, share // accum) // args.repeat) * args.repeat, accum


# --- Processes and precision ----------------------------------------------------------------------

def set_up():
    """Joins the processes that torchrun started, if it did."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: 0.1% of the assignments change
    if GPU:
        torch.cuda.set_device(DEVICE)
    elif hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep large freed blocks, since
        libc.mallopt(-4, 0)  # getting them anew, page by page, takes up to a third of a step
        libc.mallopt(-1, 2 ** 31 - 1)
    if WORLD > 1:  # others wait while one renders, downloads or walks a slow disk
        dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(hours=1))


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
    """work() in one process of each machine, then in all, which find what it has left."""
    if LOCAL_RANK == 0:
        work()
    gather()
    return work()


def autocast(amp):
    """The context that --amp names."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(DEVICE.type, dtype, enabled=amp != "off")


# --- Model and optimiser --------------------------------------------------------------------------

def make_teacher(args, tube):
    """The frozen Teacher of a DINO target, from --teacher or downloaded into torch's cache."""
    if args.teacher:
        return Teacher(read_checkpoint(args.teacher, "pos_embed")["model"], tube)
    _, url, sha = DINO[args.target]
    name = Path(url).stem + (f"-{sha}.pth" if sha else ".pth")  # torch checks such a hash
    socket.setdefaulttimeout(30)
    try:
        weights = one_first(lambda: torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True, check_hash=bool(sha), file_name=name))
        return Teacher(weights, tube)
    except (OSError, RuntimeError) as error:
        raise UserError(f"DINO's weights can't be downloaded ({error}): get {url} elsewhere and "
                        "give the file with --teacher") from error


def set_blocks(blocks, recompute, compiled=False):
    """recompute: a block's activations are computed again for the backward pass, not kept."""
    for block in blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()


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


# --- Checkpoints ----------------------------------------------------------------------------------

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
    saved, free = read_checkpoint(args.out), set(
        "root val out teacher batch_size accum amp workers timeout compile eval_every keep_every "
        "max_steps views".split())
    differ = [f"--{name.replace('_', '-')} {now} (the run has {saved['args'].get(name)})"
              for name, now in vars(args).items()
              if name not in free and saved["args"].get(name) != now]
    if differ:
        raise UserError(f"the run in {args.out} goes on with its own settings, but you give "
                        f"{', '.join(differ)}: leave them out, or choose another --out")
    return saved


# --- Probe and k-NN of the frozen encoder ---------------------------------------------------------

@torch.no_grad()
def collect(forward, clips, amp="off", workers=0):
    """(outputs (n, ...), labels (n,)) of all clips in order, on every rank; ranks share the work.

    forward: normalised clips (B, 3, T, S, S) -> (B, ...), averaged over the clips of a video. A
    video that can't be read is named, and its label is -1, which no prediction equals.
    """
    batch = max(1, 64 // clips.repeat) if GPU or clips.size < 64 else 1
    keys = [(0, i) for i in range(RANK, len(clips), WORLD)]
    found, unreadable = [], {}
    bar = tqdm(loader(clips, batch, keys, workers), "evaluating", math.ceil(len(keys) / batch),
               leave=False, disable=RANK > 0, unit="batch")
    for video, _, label, index, bad in bar:
        with autocast(amp):
            output = forward(normalise(video, DEVICE)).float().unflatten(0, (len(label), -1))
        found.append((index, label, output.mean(dim=1).cpu()))
        unreadable |= bad
    unreadable = {path: reason for part in gather(unreadable) for path, reason in part.items()}
    for path, reason in unreadable.items():
        log(f"unreadable video {path}: {reason}")
    if len(unreadable) == len(clips):
        raise UserError("none of the videos can be read")
    index, label, output = map(torch.cat, zip(*(row for rows in gather(found) for row in rows)))
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


def evaluate(encoder, sets, args, title):
    """Accuracy of probe and k-NN; sets: labelled training clips, and held-out ones to test on."""
    (train, labels), (test, truth) = (
        collect(lambda video: encoder(video).mean(dim=1), clips, args.amp, args.workers)
        for clips in sets)
    probe = accuracy(linear_probe(train, labels, test), truth)
    knn = accuracy(nearest_neighbours(train, labels, test), truth)
    log(f"{title:10}linear probe {probe:.1%}, k-NN {knn:.1%}")
    return {"linear_probe": probe, "knn": knn}


# --- Training -------------------------------------------------------------------------------------

def collapsed(line, tubes):
    """Whether a log line of SIGMA, from after warmup, shows collapsed features: a term of the loss
    stuck at ln K or at 0, or an entropy far below ln K (or ln of the hidden tubes, if fewer)."""
    k, terms = line["log_k"], (line["target_term"], line["video_term"])
    stuck = any(abs(term / k - 1) < 0.01 or term < 0.05 * k for term in terms)
    return stuck or min(line["entropy"], line["target_entropy"]) < min(k, math.log(tubes)) - 1.4


def fit(args, model, optimizer, clips, loss_of, *, sizes, before=None, probe=None):
    """The training loop, to the last step, --max-steps or a signal; True if all steps are done.

    loss_of(network, batch): the loss of a loader's batch and detached statistics; network is the
    model, in DDP if there are several processes. sizes: the model's, for its checkpoints. before:
    what saved_run returned. probe(title): figures for the log, every --eval-every epochs.
    """
    out, n = Path(args.out), len(clips)
    batch, accum = split_batch(args, WORLD, n)
    per_step, step = batch * accum * WORLD, 0  # clips
    steps = max(1, args.epochs * n // per_step)
    warmup = int(min(args.warmup, args.epochs / 8) * n / per_step)
    peak, final = args.lr * per_step / 256, args.final_lr * per_step / 256
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.amp == "fp16")
    if before:
        if before["videos"] != n:
            raise UserError(f"the run in {out} has {before['videos']:,} videos, there are now "
                            f"{n:,}: start a new one with --init {out} and another --out")
        fill(model, before["model"], out)
        optimizer.load_state_dict(before["optimizer"])
        scaler.load_state_dict(before["scaler"])
        step = before["clips_seen"] // per_step
    log(f"clips     {args.frames} frames, {args.stride} apart, {args.size} x {args.size}; "
        f"{WORLD} processes x {batch} at a time x {accum} accumulated = {per_step} per step\n"
        f"schedule  {args.epochs} epochs = {steps:,} steps, {warmup:,} of them warmup; learning "
        f"rate {args.lr:g} x {per_step} / 256 = {peak:.3g}")

    def save(name="last.pt"):
        if RANK == 0:
            save_atomically(out / name, dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), sizes=sizes,
                scaler=scaler.state_dict(), clips_seen=step * per_step, videos=n, args=vars(args),
                log_size=(out / "log.jsonl").stat().st_size))

    def passed(every):  # whether this step completes a multiple of so many epochs
        return every and step * per_step // n // every > (step - 1) * per_step // n // every

    def stop(number, frame):
        signals.append(number)
        on_signals(signal.SIG_DFL)  # the second one ends the process at once

    if RANK == 0:
        with open(out / "log.jsonl", "a") as file:  # drop lines of steps that will be repeated
            file.truncate(min(before["log_size"], file.tell()) if before else 0)
    if not before:
        save()  # a disk that can't be written to shows now
    network, control = model, None
    if WORLD > 1:
        network = DistributedDataParallel(model)
        control = dist.new_group(backend="gloo")  # two numbers per step
    keys = endless_order(n, batch // args.repeat, RANK, WORLD, args.seed,
                         step * per_step // args.repeat)
    batches = loader(clips, batch // args.repeat, keys, args.workers, args.timeout)
    rows, unreadable, named, bad_lines, signals = [], {}, set(), 0, []
    log_time, save_time, waited = time.monotonic(), time.monotonic(), 0.0
    last, stopped = min(steps, args.max_steps or steps), False
    on_signals(stop)
    bar = tqdm(total=steps, initial=step, unit="step", disable=RANK > 0, dynamic_ncols=True)
    while step < last and not stopped:
        rate = learning_rate(step, steps, warmup, peak, final)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1)
        total = 0.0
        for part in range(1, accum + 1):
            asked = time.monotonic()
            samples = next(batches)
            waited += time.monotonic() - asked
            _, mask, *_, bad = samples
            unreadable |= bad
            # What is random in a step follows from its number: a run goes on exactly.
            torch.manual_seed(hash((args.seed, step, part, RANK)) % 2 ** 63)
            network.require_backward_grad_sync = part == accum  # DDP's; until then they add up
            loss, stats = loss_of(network, samples)
            scaler.scale(loss / accum).backward()
            total = total + loss.detach() / accum
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        stats = {name: value.float() for name, value in stats.items() if value.ndim == 0}
        stats = {"loss": total, "grad_norm": norm, **stats}
        rows.append(torch.stack(list(stats.values())))
        step += 1
        bar.update()

        # All ranks agree on what comes next. Until here nothing has waited for the GPU.
        late = time.monotonic() - log_time > LOG_SECONDS or step % LOG_STEPS == 0
        flags = torch.tensor([len(signals), late], dtype=torch.int)
        if WORLD > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=control)
        stopped, late = flags.bool().tolist()
        probing, keeping = passed(args.eval_every), passed(args.keep_every)
        if not (late or stopped or step == last or probing or keeping):
            continue

        # A log line: means over the steps since the last one, and over the ranks.
        rows = torch.stack(rows) / WORLD
        if WORLD > 1:
            dist.all_reduce(rows)
        finite = rows[:, :1 if scaler.is_enabled() else 2].isfinite().all(dim=1).tolist()
        if not all(finite):  # fp16 may overflow in gradients: the scaler skips such steps
            raise RunError("the loss or its gradient is not finite at step "
                           f"{step - len(rows) + 1 + finite.index(False)}: start anew from the "
                           f"last good checkpoint, --init {out}, another --out and a lower --lr")
        seconds, line = time.monotonic() - log_time, dict(zip(stats, rows.mean(dim=0).tolist()))
        line |= dict(step=step, epoch=step * per_step / n, lr=rate, data_wait=waited / seconds,
                     clips_per_second=len(rows) * per_step / seconds)
        bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                            f"{line['data_wait']:.0%} waiting for data")
        for path, reason in [pair for found in gather(unreadable) for pair in found.items()]:
            if path not in named:
                log(f"unreadable video {path}: {reason}; another one takes its place")
            named.add(path)
        collapse = "log_k" in line and step > warmup and collapsed(line, int(mask.sum()))
        bad_lines = bad_lines + 1 if collapse else 0
        if bad_lines == 10:  # in a row; said once
            log("the features have collapsed: few prototypes are in use, or a term of the loss is "
                "near 0 or ln K; lower --lr or --eps, or raise --batch-size")
        if probing and probe:
            line |= probe(f"epoch {line['epoch']:g}")
        if RANK == 0:
            line = {name: x if math.isfinite(x) else None for name, x in line.items()}
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line | {"unreadable_videos": len(named)}) + "\n")
        too_many = len(named) > max(min(5, n - 1), MAX_UNREADABLE * n)
        if stopped or step == last or too_many or time.monotonic() - save_time > SAVE_SECONDS:
            save()
            save_time = time.monotonic()
        if keeping:
            save(f"epoch-{step * per_step // n:04}.pt")
        if too_many:
            raise RunError(f"{len(named)} of {n:,} videos can't be read, more than "
                           f"{MAX_UNREADABLE:.0%}: fix or remove those named above")
        rows, unreadable, log_time, waited = [], {}, time.monotonic(), 0.0
    bar.close()
    on_signals(signal.SIG_DFL)
    if step < steps:
        log(f"stopped after step {step:,} of {steps:,}; the same command goes on")
    return step >= steps


def main(argv=None):
    """Pretraining, from the flags to the results."""
    args = parse(argv)
    set_up()
    out, root, toy = Path(args.out), locate(args.data, args.root), args.data == "toy"
    before, finished = saved_run(args), out / "results.json"
    if before and finished.exists():
        return log(f"{finished.read_text()}{out} is complete; to start anew choose another --out, "
                   "or remove it")

    # Model.
    sizes, teacher = sizes_for(args.model, args.target, eps=args.eps), None
    if args.target in DINO:
        teacher = make_teacher(args, sizes["tube"]).to(DEVICE)
        sizes["target_dim"] = teacher.dim
    torch.manual_seed(args.seed)
    model = SIGMA(**sizes).to(DEVICE)
    if args.init and not before:
        fill(model, read_checkpoint(args.init)["model"], args.init)
    set_blocks([*model.encoder.blocks, *model.decoder.blocks], args.model in ("large", "huge"),
               args.compile)
    log(f"model     {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"target {args.target}, on {DEVICE}, autocast {args.amp}")

    # Videos: to train on; for probe and k-NN some of them, and held-out ones to test on.
    if toy:
        one_first(lambda: make_toy(root))
    videos, classes, skipped = find_videos(root)
    splits = ("val", "test", "") if args.val else ("val", "test")
    labelled = any(label >= 0 for _, label in videos)
    held_out = find_videos(args.val or root, splits, classes)[0] if labelled else []
    labelled = any(label >= 0 for _, label in held_out)
    options = dict(frames=args.frames, stride=args.stride, size=args.size, tube=sizes["tube"],
                   ratio=args.ratio, seed=args.seed, cache={} if toy else None)
    clips_class = Clips
    if args.mask == "motion":
        sys.path.append(str(Path(__file__).with_name("extras")))
        from motion import clips_for
        clips_class = clips_for(videos, log)
    clips = clips_class(videos, **options, repeat=args.repeat,
                        crop=centre_crop if toy else corner_crop)
    sets = [Clips(part[::math.ceil(len(part) / EVAL_CLIPS) or 1], **options, choose=centre_frames,
                  crop=centre_crop, tries=1) for part in (videos, held_out)]
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped))
        finished.unlink(missing_ok=True)  # of a run that was here before
    log(f"data      {len(videos):,} videos, {len(skipped):,} files or lines skipped, see {out}/"
        "skipped.txt")
    if args.target != "pixel":
        tubes = tube_mask(1, clips.grid, args.ratio).sum() * WORLD * split_batch(
            args, WORLD, len(videos))[0]
        log(f"Sinkhorn  {tubes:,} hidden tubes at a time share {len(model.prototypes):,} prototypes"
            "; if fewer than three for each, raise --batch-size (--accum does not help)")

    def probe(title, encoder=model.encoder):
        return evaluate(encoder, sets, args, title)

    def loss_of(network, samples):
        video, mask, *_ = samples
        video = normalise(video, DEVICE)
        with autocast(args.amp):
            return network(video, mask, teacher(video) if teacher else None)

    if not fit(args, model, make_optimizer(model), clips, loss_of, sizes=sizes, before=before,
               probe=probe if labelled else None):
        return
    results = dict(checkpoint=f"{out}/last.pt", protocol=PROTOCOL if labelled else "no probe: it "
                   "takes labels, and labelled videos in val or test of --data, or --val")
    if toy:
        torch.manual_seed(args.seed)
        results["untrained"] = probe("untrained", SIGMA(**sizes).encoder.to(DEVICE))
    if labelled:
        results["trained"] = probe("trained")
    if RANK == 0:
        finished.write_text(json.dumps(results, indent=2) + "\n")
    source = " ".join(f"--{name} {vars(args)[name]}" for name in ("data", "root", "val")
                      if vars(args)[name])
    log(f"{results['protocol']}\nwrote {out}/last.pt, log.jsonl and results.json; next:\n"
        f"    python extras/pictures.py {out}\n"
        f"    python extras/finetune.py --init {out} {source}\n"
        f"    python extras/features.py --init {out} {source}")


def launch(main, argv=None):
    """Runs main(argv), user errors without a traceback. Returns the exit code."""
    try:
        main(argv)
        return 0
    except (UserError, OSError) as error:  # OSError: no such file or permission, a full disk
        code, message = getattr(error, "code", 2), error
    except torch.OutOfMemoryError:
        code, message = 1, "out of GPU memory: lower --batch-size, --accum makes up for it"
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        code, message = 1, f"{error}, perhaps for want of memory: lower --workers"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    finally:
        signal.alarm(0)
        kill_workers()
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6: gloo's threads still need Python to free tensors
            dist.destroy_process_group()
    if RANK:  # rank 0 reports first; torchrun then ends the others
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(launch(main))
