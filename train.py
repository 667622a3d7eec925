"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                             toy set: rendered, trained on, and judged by a probe
    python train.py --target pixel                              the same with VideoMAE's target, to compare
    python train.py --data videos/ --model small --epochs 100   a folder or list of real videos (layouts: data.py)
    torchrun --nproc_per_node=8 train.py --data train.csv --batch-size 40
    python train.py --resume out/toy-tiny-mlp                   go on where a run stopped, with its own settings
    python train.py --bench --model small --batch-size 2        train nothing: how fast are loader and step here?

A run writes last.pt, log.jsonl, results.json and pictures to out/<run>/. SIGTERM and Ctrl-C save before they stop it.
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
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid
from tqdm import tqdm

from data import RETRIES, Clips, Order, UserError, centre_crop, find_videos, loader, make_toy, normalise, write_png
from sigma import SIZES, build_model, sinkhorn, take_tubes, training_flops, tube_mask

RECIPES = {                            # every default lives here; "toy" goes with --model tiny, "video" with the others
    "toy": dict(frames=8, stride=1, size=32, ratio=0.75, epochs=20, batch_size=64, lr=6e-3, warmup=1, workers=0),
    "video": dict(frames=16, stride=4, size=224, ratio=0.9, epochs=800, batch_size=32, lr=1.5e-4, warmup=40,
                  workers=min(8, os.cpu_count())),                           # the paper's recipe for Kinetics-400
}
COMMON = dict(target="mlp", accum=1, seed=0, amp=None)
BETAS, WEIGHT_DECAY, FINAL_LR = (0.9, 0.95), 0.05, 1e-5         # AdamW's; rates are for a global batch of 256 clips
LOG_EVERY, SAVE_SECONDS = 10, 600                               # steps between log lines; time between checkpoints
TOLERATED = 5                                                   # unreadable videos in a set of which 1% would be fewer
TOY = "data/toy"
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

    natural, positive, either = number(int, 0), number(int, 1), parser.add_mutually_exclusive_group()
    for name, kind, text in (
            ("data", str, "toy, a folder of videos, or a list file (default: toy)"),
            ("model", list(SIZES), "size of the networks (default: tiny for toy, else base)"),
            ("target", ["mlp", "pixel"], "mlp: SIGMA-MLP; pixel: the VideoMAE baseline (default: mlp)"),
            ("frames", positive, "frames of a clip"),
            ("stride", positive, "frames of the video from one frame of the clip to the next"),
            ("size", positive, "pixels of a clip's side"),
            ("epochs", positive, "passes over the data; the schedule stretches with them"),
            ("batch_size", positive, "clips at a time in one process: as many as its memory holds"),
            ("accum", positive, "batches added up to one step; Sinkhorn sees one at a time (default: 1)"),
            ("lr", number(float, 0), "learning rate for a global batch of 256, scaled to yours"),
            ("amp", ["bf16", "fp16", "off"], "autocast (default: bf16 on a GPU that has it, else off)"),
            ("workers", natural, "loader processes for each training process"),
            ("seed", natural, "of weights, shuffle, crops and masks (default: 0)"),
            ("out", str, "folder of the run (default: out/<data>-<model>-<target>)"),
            ("resume", str, "folder or checkpoint of a run: go on exactly where it stopped"),
            ("init", str, "folder or checkpoint of a run: start a new one from its weights"),
            ("max_steps", positive, "stop and save after this many steps of the schedule")):
        if name in RECIPES["toy"]:
            text += f" (default: {RECIPES['toy'][name]} with tiny, else {RECIPES['video'][name]})"
        options = dict(choices=kind) if isinstance(kind, list) else dict(type=kind)
        place = either if name in ("resume", "init") else parser
        place.add_argument("--" + name.replace("_", "-"), help=text, **options)
    parser.add_argument("--bench", action="store_true", help="measure loader, step and Sinkhorn here; train nothing")
    return vars(parser.parse_args(argv))


def configure(given):
    """The run's settings, a plain dictionary: recipe, then flags; and the checkpoint that it goes on from, or None."""
    checkpoint = None
    if "resume" in given:
        path, checkpoint = read_checkpoint(given["resume"])
        config = checkpoint["config"] | {"out": str(path.parent)}
        for name in ("model", "target", "frames", "stride", "size", "epochs", "lr", "seed", "amp"):
            if name in given and given[name] != config[name]:
                raise UserError(f"--resume keeps the run's own --{name} {config[name]}, found {given[name]}: leave it "
                                "out, or start a new run from the weights with --init")
    else:
        data = given.get("data", "toy")
        model = given.get("model", "tiny" if data == "toy" else "base")
        config = COMMON | RECIPES["toy" if model == "tiny" else "video"] | dict(data=data, model=model)
        if data == "toy" and "bench" not in given:                       # whatever the model, the clips are as they are
            config |= {name: RECIPES["toy"][name] for name in ("frames", "stride", "size", "ratio", "workers")}
    config |= {name: value for name, value in given.items() if name not in ("resume", "init", "max_steps", "bench")}
    config = {"out": f"out/{Path(config['data']).resolve().stem}-{config['model']}-{config['target']}"} | config
    out = Path(config["out"])
    if (out / "last.pt").exists() and "bench" not in given and not (checkpoint and out.samefile(path.parent)):
        raise UserError(f"expected a new folder for a new run, found a checkpoint in {out}: go on with --resume {out}, "
                        "or choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"expected a folder as --out, found the file {out}: choose another name")
    return config, checkpoint


# --- Parts of a run ---------------------------------------------------------------------------------------------------

def set_up():
    """Joins the processes that torchrun started, if it did, and returns this one's device."""
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


def precision(name, device):
    """autocast's dtype for --amp; None is off."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name or ("bf16" if able else "off"))


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
    """The clips of settings c. The toy set is not cropped, and stays in memory once it is decoded."""
    if c.data == "toy":
        options = {"cache": {}, "crop": centre_crop} | options
    return Clips(find_videos(TOY if c.data == "toy" else c.data, split), frames=c.frames, stride=c.stride, size=c.size,
                 tube=tube, ratio=c.ratio, seed=c.seed, **options)


def endless(data, order, step, steps_per_epoch, accum):
    """All batches from optimiser step `step` on, epoch after epoch."""
    while True:
        order.epoch, order.start = step // steps_per_epoch, step % steps_per_epoch * accum
        yield from data
        step = (order.epoch + 1) * steps_per_epoch


@contextmanager
def stop_requests():
    """Yields a list to which SIGTERM and Ctrl-C add, instead of ending the process."""
    requests = []
    before = {name: signal.signal(name, lambda number, frame: requests.append(number))
              for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def write_whole(path, write):
    """Calls write(file) on a file of another name, which takes the name `path` once all of it is on the disk."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:                          # torch.save turns a full disk into the latter
        draft.unlink(missing_ok=True)
        raise RunError(f"expected to write {path}, found {error}: make room and try again; what it held before is "
                       "untouched") from None


def read_checkpoint(path):
    """One of our checkpoints, given by its path or its run's folder, read without running any code that it may hold."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return path, {name: checkpoint[name] for name in ("model", "optimizer", "scaler", "step", "rng", "config")}
    except FileNotFoundError:
        raise UserError(f"expected a checkpoint, found no file {path}: give a run's folder or its last.pt") from None
    except Exception as error:                                        # whatever a foreign or damaged file brings about
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise UserError(f"expected a checkpoint of train.py in {path}, found something else ({reason}): give a run's "
                        "folder or its last.pt") from None


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

def pretrain(config, checkpoint, init, max_steps, device):
    """Sets a run up, says what it is going to do, trains, and shows what was learned."""
    c, out = argparse.Namespace(**config), Path(config["out"])
    torch.manual_seed(c.seed)
    model = build_model(c.model, target=c.target)
    if checkpoint or init:
        load_weights(model, (checkpoint or read_checkpoint(init)[1])["model"], init or out)
    clips = make_clips(c, model.encoder.tube)
    order = Order(len(clips), c.batch_size, RANK, WORLD, c.seed, c.accum)
    global_batch, per_epoch = c.batch_size * WORLD * c.accum, order.steps // c.accum
    product = f"{WORLD} processes x {c.batch_size} clips x {c.accum} accumulated = {global_batch}"
    if per_epoch == 0:
        raise UserError(f"expected enough clips for a global batch of {product}, found {len(clips)}: lower "
                        "--batch-size or --accum, or give more videos")
    for name, value in (("global_batch", global_batch), ("clips", len(clips))):
        if checkpoint and config[name] != value:
            raise UserError(f"expected the run's {name.replace('_', ' ')} of {config[name]}, found {value} ({product}):"
                            " --resume needs the same, --init does not")
    steps, peak_lr = per_epoch * c.epochs, c.lr * global_batch / 256
    warmup = int(per_epoch * min(c.warmup, c.epochs / 10))           # the recipe's, at most a tenth of the run
    config |= dict(global_batch=global_batch, clips=len(clips), steps=steps, peak_lr=peak_lr, warmup_steps=warmup)
    dtype = precision(c.amp, device)

    videos, k = clips.videos, 0 if c.target == "pixel" else len(model.prototypes)
    tubes = tube_mask(1, clips.grid, c.ratio).sum().item() * c.batch_size * WORLD
    say(f"data       {len(clips):,} clips in {c.data}, {videos.classes or 'no'} classes; "
        f"{len(videos.passed_over)} lines or files passed over")
    for line in videos.passed_over[:3]:
        say(f"           passed over: {line}")
    say(f"model      {c.model}, target {c.target}, {sum(p.numel() for p in model.parameters()):,} parameters; clips of "
        f"{c.frames} frames, {c.stride} apart, {c.size} x {c.size}: {math.prod(clips.grid):,} tubes")
    say(f"batch      {product}; on {device}, autocast {str(dtype or 'off').removeprefix('torch.')}")
    say(f"schedule   {c.epochs} epochs of {per_epoch:,} = {steps:,} steps, the first {warmup:,} of them warmup; "
        f"learning rate {c.lr:g} x {global_batch} / 256 = {peak_lr:.3g}")
    if k:
        say(f"Sinkhorn   {tubes:,} hidden tubes at a time share {k:,} prototypes")
    if tubes < k:
        say("           warning: fewer tubes than prototypes, so some go unused: raise --batch-size or the number of "
            "processes (not --accum: each batch is balanced by itself)")
    say(f"run        {out}" + (f", going on after step {checkpoint['step']:,}" if checkpoint else ""))

    finished = fit(model, clips, order, config, checkpoint, max_steps, dtype, device)
    if finished and RANK == 0:
        show(model, clips, config, device)


def fit(model, clips, order, config, checkpoint, max_steps, dtype, device):
    """The training loop, from the checkpoint or the start; True when the schedule is complete.

    It waits for the GPU only where it writes a log line. There it also minds signals and unreadable videos.
    """
    c, out = argparse.Namespace(**config), Path(config["out"])
    optimizer, step = make_optimizer(model.to(device)), 0
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        step = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type in checkpoint["rng"].keys() - {"cpu"}:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    parallel = model
    if WORLD > 1:
        parallel = DistributedDataParallel(model)         # without device_ids, which would move the masks to the GPU

    def save():
        if RANK == 0:
            rng = {"cpu": torch.get_rng_state()}
            if device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state()
            write_whole(out / "last.pt", lambda file: torch.save(dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                epoch=step * c.epochs // c.steps, rng=rng, config=config), file))

    log = out / "log.jsonl"
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        lines = log.read_text().splitlines(keepends=True) if checkpoint and log.exists() else []
        log.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step))
    if not checkpoint:
        save()                                                             # a place that can't be written to shows now
    data = endless(loader(clips, c.batch_size, order, c.workers, device), order, step, c.steps // c.epochs, c.accum)
    last, recent, unreadable, found, hopeless = min(c.steps, max_steps or c.steps), [], {}, {}, False
    logged, saved, waited = time.monotonic(), time.monotonic(), 0.0
    with stop_requests() as stopped, tqdm(total=c.steps, initial=step, unit="step", disable=RANK > 0,
                                          dynamic_ncols=True) as bar:
        while step < last:
            rate = learning_rate(step, c.steps, c.warmup_steps, c.peak_lr, FINAL_LR * c.global_batch / 256)
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
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss, stats = parallel(normalise(video, device), mask)
                    scaler.scale(loss / c.accum).backward()
                total = total + loss.detach() / c.accum
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            recent.append({"loss": total, "grad_norm": norm} | {k: v for k, v in stats.items() if v.ndim == 0})
            bar.update(1)
            alone, impatient = WORLD == 1, time.monotonic() - logged > 10  # several must log at the same step
            if step % LOG_EVERY and step < last and not (alone and (stopped or impatient)):
                continue

            # A log line: means over the steps since the last one, and over the ranks.
            names = list(recent[0])
            rows = torch.stack([torch.stack([line[name].float() for name in names]) for line in recent])
            if WORLD > 1:
                dist.all_reduce(rows)
            rows, recent = (rows / WORLD).tolist(), []                                     # steps x numbers
            now, everyone = time.monotonic(), gather((bool(stopped), hopeless, found))
            new = {path: reason for *_, theirs in everyone for path, reason in theirs.items() if path not in unreadable}
            unreadable, found = unreadable | new, {}
            for path, reason in new.items():
                say(f"unreadable video {path}: {reason}; another clip takes its place")
            line = {"step": step, "epoch": step * c.epochs / c.steps, "lr": rate}
            line |= {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows))}
            line |= {"clips_per_second": len(rows) * c.global_batch / (now - logged),
                     "data_wait": waited / (now - logged), "unreadable_videos": len(unreadable)}
            logged, waited = now, 0.0
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                                f"{line['data_wait']:.0%} waiting for data")
            if RANK == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
            for number, row in enumerate(rows, start=step - len(rows) + 1):
                if not all(map(math.isfinite, row[:1] if scaler.is_enabled() else row)):     # fp16 skips such gradients
                    raise RunError(f"expected a finite loss and gradient, found loss {row[0]}, norm {row[1]} at step "
                                   f"{number}: the last good checkpoint is untouched, start anew from it with --init "
                                   f"{out / 'last.pt'}, another --out and a lower --lr or --amp off")
            too_many = any(each for _, each, _ in everyone) or len(unreadable) > max(TOLERATED, len(clips) // 100)
            stop = any(each for each, *_ in everyone)
            if step == last or stop or too_many or now - saved > SAVE_SECONDS:
                save()
                saved = now
            if too_many:
                raise RunError(f"expected at most 1% unreadable videos, found {len(unreadable)} of {len(clips):,}: "
                               f"mend those named above and --resume {out}, or start a new run without them")
            if stop:
                break
    if step < c.steps:
        say(f"stopped after step {step:,} of {c.steps:,}; go on with --resume {out}")
    return step == c.steps


# --- What was learned -------------------------------------------------------------------------------------------------

@torch.no_grad()
def pooled_features(encoder, clips, device):
    """Mean over the tokens of each clip, (n, D) float32, and the labels (n,). Raises RunError if one can't be read."""
    features, labels = [], []
    keys = [(0, index) for index in range(len(clips))]
    for video, _, label, _, bad in tqdm(loader(clips, 128, keys, 0), desc="features", unit="batch", leave=False):
        if any(bad):
            raise RunError(f"expected videos that can be read, found {max(bad)[0]}: mend or remove it")
        features.append(encoder(normalise(video, device)).mean(dim=1).float().cpu())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Top-1 of ridge regression to one-hot labels from frozen features, standardised by the training set."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test, targets = (train - mean) / std, (test - mean) / std, F.one_hot(train_labels).float()
    covariance = train.T @ train + 10 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(covariance, train.T @ (targets - targets.mean(dim=0)))
    return ((test @ weight + targets.mean(dim=0)).argmax(dim=1) == test_labels).float().mean().item()


def nearest_neighbours(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Top-1 of k-NN by cosine; a neighbour's vote weighs exp(cosine / temperature)."""
    cosines, index = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(min(k, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (cosines / temperature).exp())
    return (votes.argmax(dim=1) == test_labels).float().mean().item()


def picture(path, rows, height):
    """Writes rows (r, n, 3, h, w) uint8 of images as one PNG, each image `height` pixels high."""
    images = F.interpolate(rows.flatten(0, 1).float(), scale_factor=height / rows.shape[-2], mode="nearest-exact")
    write_png(path, make_grid(images.byte(), nrow=rows.shape[1], padding=2, pad_value=255))
    return path


def sample(clips, number):
    """Keys of up to `number` clips, spread over the whole set."""
    return [(0, i) for i in torch.linspace(0, len(clips) - 1, min(number, len(clips))).long().tolist()]


def show_masks(path, clips):
    """Three clips, up to eight frames of each, and below each the same with its hidden tubes in grey."""
    rows = []
    for video, mask, *_ in map(clips.__getitem__, sample(clips, 3)):
        hidden = mask.view(1, *clips.grid)
        for axis, step in enumerate(clips.tube, start=1):
            hidden = hidden.repeat_interleave(step, dim=axis)                                                 # 1 T S S
        rows += [frames[:, ::max(1, frames.shape[1] // 8)] for frames in (video, video.masked_fill(hidden, 128))]
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


def show(model, clips, config, device):
    """On the toy set linear probe and k-NN of the untrained and of the trained encoder; results.json; pictures."""
    c, out, results = argparse.Namespace(**config), Path(config["out"]), {"config": config}
    if c.data == "toy":
        val = make_clips(c, clips.tube, "val", cache={})
        torch.manual_seed(c.seed)
        encoders = {"untrained": build_model(c.model, target=c.target).to(device).encoder, "trained": model.encoder}
        protocol = (f"frozen encoder, mean over tokens; {len(clips):,} training and {len(val):,} held-out clips, one "
                    "view each; probe: ridge regression; k-NN: cosine, k = 20, temperature 0.07; chance 12.5%")
        results["protocol"] = protocol
        tqdm.write(f"top-1 on held-out clips ({protocol})\n{'':12}linear probe    k-NN")
        for name, encoder in encoders.items():
            features = [*pooled_features(encoder, clips, device), *pooled_features(encoder, val, device)]
            results[name] = {"linear_probe": linear_probe(*features), "knn": nearest_neighbours(*features)}
            tqdm.write(f"{name:12}{results[name]['linear_probe']:12.1%}{results[name]['knn']:8.1%}")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    files = [out / "last.pt", out / "log.jsonl", out / "results.json", show_masks(out / "masks.png", clips)]
    if c.target != "pixel":
        files.append(show_prototypes(out / "prototypes.png", model, clips, device))
    tqdm.write("wrote " + ", ".join(map(str, files)))


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


def bench(config, device):
    """Prints how fast the loader, a training step and Sinkhorn are on this machine. Trains nothing, writes no run."""
    c = argparse.Namespace(**config)
    dtype = precision(c.amp, device)
    model = build_model(c.model, target=c.target).to(device)
    clips = make_clips(c, model.encoder.tube, cache=None)
    batches = iter(loader(clips, 4, ((epoch, i) for epoch in count() for i in range(len(clips))), workers=1))
    next(batches)                                                                       # the worker has started
    start, read = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < 10:
        read += len(next(batches)[0])
    loading = read / spent
    del batches

    optimizer, mask = make_optimizer(model), tube_mask(c.batch_size, clips.grid, c.ratio)
    video = normalise(torch.randint(256, (c.batch_size, 3, c.frames, c.size, c.size), dtype=torch.uint8), device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, _ = model(video, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    large = torch.randn(4096, 4096, device=device, dtype=dtype)
    product = 2 * 4096 ** 3 / seconds(lambda: large @ large, device)                              # operations a second
    training = c.batch_size / seconds(step, device)                                               # clips a second
    work = training_flops(model, clips.grid, int(mask[0].sum()))
    gpu, name = device.type == "cuda", str(dtype or torch.float32).removeprefix("torch.")
    rows = [("loader, one worker", f"{loading:,.1f} clips/s", f"{c.data}, {c.frames} x {c.size} x {c.size}"),
            ("training step", f"{training:,.2f} clips/s", f"{c.model}, {c.target}, batch {c.batch_size}, {name}"),
            ("arithmetic", f"{work / 1e9:,.2f} GFLOP/clip", "forward and backward, as sigma.training_flops counts"),
            ("share of matrix product", f"{work * training / product:.0%}", f"of {product / 1e9:,.0f} GFLOP/s, 4096^2")]
    if c.target != "pixel":
        n, k = int(mask.sum()), len(model.prototypes)
        scores, vector = 2 * torch.rand(n, k, device=device) - 1, torch.rand(k, device=device)
        ratio = seconds(lambda: sinkhorn(scores, model.eps), device) / seconds(lambda: scores @ vector, device)
        rows.append(("Sinkhorn", f"{ratio:.0f} products", f"of the {n:,} x {k:,} scores with a vector"))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.append(("peak memory", f"{peak / 2 ** 30:.2f} GiB", "of the GPU" if gpu else "of the process"))
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    say(f"{where}, torch {torch.__version__}")
    for label, value, note in rows:
        say(f"{label:26}{value:>18}   {note}")


def main(argv=None):
    """Runs the command line. Returns the exit code: 0; 1 for a run that can't go on; 2 for wrong usage."""
    given = parse(argv)
    try:
        config, checkpoint = configure(given)
        device = set_up()
        if config["data"] == "toy":
            if RANK == 0:
                make_toy(TOY)
            gather(None)                                                        # the others wait until it is there
        if "bench" in given:
            bench(config, device)
        else:
            pretrain(config, checkpoint, given.get("init"), given.get("max_steps"), device)
        return 0
    except (UserError, RunError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "expected the batch to fit into the GPU's memory, it did not: lower --batch-size and raise --accum"
        if RANK:                            # what all ranks find wrong the first one says, and torchrun ends the others
            time.sleep(3)
        print(f"error{f' on rank {RANK}' if RANK else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
