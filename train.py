"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                             toy set: rendered, trained on, and judged by a probe
    python train.py --target pixel                              the same with VideoMAE's target, to compare
    python train.py --data videos/ --model small --epochs 100   a folder or list of real videos (layouts: data.py)
    torchrun --nproc_per_node=8 train.py --data train.csv --batch-size 40
    python train.py --resume out/toy-mlp                        go on where a run stopped, with its own settings
    python train.py --bench --model base                        no training: how fast loader and model are here

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
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.io import write_png
from torchvision.utils import make_grid
from tqdm import tqdm

from data import RETRIES, Clips, Order, UserError, centre_crop, find_videos, loader, make_toy, normalise
from sigma import SIZES, build_model, sinkhorn, take_tubes, training_flops, tube_mask

RECIPES = {    # where every default lives. video: the paper's, for all sizes but tiny. toy: what did well in trials, for tiny
    "toy": dict(model="tiny", frames=8, stride=1, size=32, ratio=0.75, batch_size=64, epochs=30, warmup_epochs=1, lr=4e-3,
                workers=0),
    "video": dict(model="base", frames=16, stride=4, size=224, ratio=0.9, batch_size=32, epochs=800, warmup_epochs=40,
                  lr=1.5e-4, workers=min(8, os.cpu_count())),
}
BETAS, WEIGHT_DECAY, FINAL_LR = (0.9, 0.95), 0.05, 1e-5                         # AdamW's, in both; rates for a batch of 256
LOG_EVERY, SAVE_SECONDS = 10, 600                              # steps from log line to log line, time between checkpoints
MAX_BAD = 5                                                           # unreadable videos, where 1% of all would be fewer


class RunError(Exception):
    """A run that can't go on; the message says why and what is left."""


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def flag(name, kind, text, **more):
        default = [str(recipe[name[2:].replace("-", "_")]) for recipe in RECIPES.values()
                   if name[2:].replace("-", "_") in recipe]
        parser.add_argument(name, type=kind, help=text + (f" (toy {default[0]}, video {default[1]})" if default else ""), **more)

    def number(kind, least):
        def convert(text):
            value = kind(text)
            if not (least <= value < math.inf):
                raise ValueError
            return value
        convert.__name__ = f"{kind.__name__} of at least {least}"
        return convert

    positive = number(int, 1)
    flag("--data", str, "toy, a folder of videos, or a list file (default toy)")
    flag("--model", str, "size of the networks", choices=list(SIZES))
    flag("--target", str, "mlp: SIGMA-MLP; pixel: the VideoMAE baseline (default mlp)", choices=["mlp", "pixel"])
    flag("--frames", positive, "frames of a clip")
    flag("--stride", positive, "from one frame of a clip to the next; for about 10 a second")
    flag("--size", positive, "pixels of a clip's side")
    flag("--epochs", positive, "passes over the data; the schedule stretches with them")
    flag("--batch-size", positive, "clips in one process at a time: as many as the memory holds")
    flag("--accum", positive, "batches added up to one optimiser step; Sinkhorn still sees one at a time (default 1)")
    flag("--lr", number(float, 0), "learning rate for a global batch of 256, scaled linearly to yours")
    flag("--amp", str, "autocast; bf16 where the GPU has it, else off", choices=["bf16", "fp16", "off"])
    flag("--workers", number(int, 0), "loader processes for each training process")
    flag("--seed", number(int, 0), "of weights, shuffle, crops and masks (default 0)")
    flag("--out", str, "folder of the run (default out/<data>-<model>-<target>)")
    flag("--resume", str, "a run's folder or checkpoint: go on exactly where it stopped")
    flag("--init", str, "a checkpoint: start a new run from its weights")
    flag("--max-steps", positive, "stop and save after this many steps of the schedule")
    parser.add_argument("--bench", action="store_true", help="measure loader, step and Sinkhorn on this machine; no training")
    return parser.parse_args(argv)


def configure(given):
    """The run's whole configuration as a plain dictionary: recipe, then flags; on --resume the checkpoint's, then flags."""
    checkpoint = None
    if "resume" in given:
        path = Path(given["resume"])
        path = path / "last.pt" if path.is_dir() else path
        checkpoint = read_checkpoint(path)
        config = checkpoint["config"] | {"out": str(path.parent)}
        for name in {"data", "model", "target", "frames", "stride", "size", "seed", "epochs", "lr"} & set(given):
            if given[name] != config[name]:
                raise UserError(f"--resume goes on with the run's own --{name} {config[name]}, found {given[name]}: "
                                "leave it away, or use --init to start a new run from the weights")
    else:
        data = given.get("data", "toy")
        model = given.get("model", "tiny" if data == "toy" else "base")
        config = RECIPES["toy" if model == "tiny" else "video"] | dict(data=data, target="mlp", accum=1, seed=0)
    config = config | {k: v for k, v in given.items() if k not in ("resume", "init", "bench", "max_steps")}
    name = "toy" if config["data"] == "toy" else Path(config["data"]).resolve().stem
    config.setdefault("out", f"out/{name}-{config['model']}-{config['target']}")
    return config, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a run
# ---------------------------------------------------------------------------------------------------------------------

class Processes:
    """This process among those that torchrun started: rank, world, device. Alone without torchrun."""

    def __init__(self):
        self.rank, self.world, local = (int(os.environ.get(k, v)) for k, v in
                                        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def gather(self, thing):
        """The list of every rank's thing; waits for all."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)


def keep_freed_memory():
    """Tells glibc to keep freed blocks. Handing a step's large ones back to the system costs a CPU step a third of its time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                                      # M_MMAP_MAX: no block gets pages of its own
        libc.mallopt(-1, 2 ** 31 - 1)                                            # M_TRIM_THRESHOLD: the heap doesn't shrink


def precision(name, device):
    """autocast's dtype for --amp, None for off; by default bf16 where the GPU has it."""
    if name is None:
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def make_optimizer(model):
    """AdamW without weight decay on biases, norms and other vectors. The learning rate is set before each step."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=WEIGHT_DECAY),
              dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(step, steps, warmup, peak, final):
    """Linear from 0 to peak in `warmup` steps, then a cosine that reaches final after the last step."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def endless(data, order, step, steps_per_epoch, accum):
    """All batches from optimiser step `step` on, epoch after epoch."""
    while True:
        order.epoch, order.start = step // steps_per_epoch, step % steps_per_epoch * accum
        yield from data
        step = (order.epoch + 1) * steps_per_epoch


def write_whole(path, write):
    """Calls write(file) on a temporary file and gives it the name `path` only when all of it is on the disk."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:                                  # torch.save turns a full disk into the latter
        draft.unlink(missing_ok=True)
        raise RunError(f"expected to write {path}, found {error}: make room and --resume; "
                       "the checkpoint that was there before is untouched") from None


def read_checkpoint(path):
    """One of our checkpoints as a dictionary, read without running any code that it may hold."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("model", "optimizer", "scaler", "step", "epoch", "rng", "config")}
    except FileNotFoundError:
        raise UserError(f"expected a checkpoint, found no file {path}: give a run's folder or its last.pt") from None
    except Exception as error:                                  # whatever a damaged or foreign file makes of the unpickler
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"expected a checkpoint of train.py in {path}, found something else ({reason}): "
                        "give a run's folder or its last.pt") from None


def load_weights(model, weights, path):
    """Puts weights into the model, wholly or not at all."""
    have, want = {k: tuple(v.shape) for k, v in weights.items()}, {k: tuple(v.shape) for k, v in model.state_dict().items()}
    differ = sorted(f"{k} (expected {want.get(k, 'nothing')}, found {have.get(k, 'nothing')})"
                    for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differ:
        raise UserError(f"the weights in {path} don't fit this model; {len(differ)} names differ: {', '.join(differ[:20])}"
                        f"{', ...' if len(differ) > 20 else ''}: give the --model and --target they were trained with")
    model.load_state_dict(weights)


def data_source(name, processes):
    """The folder or list behind --data; the first process renders the toy set, the others wait for it."""
    if name != "toy":
        return name
    if processes.rank == 0:
        make_toy("data/toy")
    processes.gather(None)
    return "data/toy"


def make_clips(videos, c, model, **options):
    """The clips of a configuration c, cut for the model's tubes; the toy set stays in memory once it is decoded."""
    return Clips(videos, frames=c.frames, stride=c.stride, size=c.size, tube=model.encoder.tube, ratio=c.ratio, seed=c.seed,
                 **({"cache": {}, "crop": centre_crop} if c.data == "toy" else {}) | options)


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining
# ---------------------------------------------------------------------------------------------------------------------

def pretrain(config, checkpoint, init, max_steps, processes):
    """Sets a run up, prints its plan, trains, and shows what was learned."""
    c, say = argparse.Namespace(**config), processes.say
    out = Path(c.out)
    if checkpoint is None and (out / "last.pt").exists():
        raise UserError(f"expected a new folder for a new run, found a checkpoint in {out}: "
                        f"go on with --resume {out}, or choose another --out")
    torch.manual_seed(c.seed)
    model = build_model(c.model, target=c.target)
    if checkpoint or init:
        load_weights(model, (checkpoint or read_checkpoint(init))["model"], init or out)
    videos = find_videos(data_source(c.data, processes))
    clips = make_clips(videos, c, model)
    order = Order(len(clips), c.batch_size, processes.rank, processes.world, c.seed, c.accum)
    global_batch, per_epoch = c.batch_size * processes.world * c.accum, order.steps // c.accum
    if per_epoch == 0:
        raise UserError(f"expected at least one global batch of {global_batch} clips, found {len(clips)}: "
                        "lower --batch-size or --accum, or give more videos")
    config = config | dict(global_batch=global_batch, steps=per_epoch * c.epochs, peak_lr=c.lr * global_batch / 256,
                           warmup=int(per_epoch * min(c.warmup_epochs, c.epochs / 10)))
    if checkpoint and checkpoint["config"]["global_batch"] != global_batch:
        raise UserError(f"--resume needs the run's global batch of {checkpoint['config']['global_batch']} clips, found "
                        f"{processes.world} processes x {c.batch_size} x {c.accum} = {global_batch}: change one of them")
    dtype = precision(config.get("amp"), processes.device)

    say(f"data       {len(clips):,} clips in {c.data}, {videos.classes or 'no'} classes, {len(videos.passed_over)} passed over")
    for line in videos.passed_over[:3]:
        say(f"           passed over: {line}")
    say(f"model      {c.model}, target {c.target}, {sum(p.numel() for p in model.parameters()):,} parameters; a clip is "
        f"{c.frames} frames of {c.size} x {c.size}, {c.stride} apart, {math.prod(clips.grid)} tubes")
    say(f"batch      {processes.world} processes x {c.batch_size} clips x {c.accum} accumulated = {global_batch}, on "
        f"{processes.device}, autocast {str(dtype or 'off').removeprefix('torch.')}")
    say(f"schedule   {c.epochs} epochs x {per_epoch:,} = {config['steps']:,} steps, {config['warmup']:,} of them warmup, to a "
        f"learning rate of {c.lr:g} x {global_batch} / 256 = {config['peak_lr']:.3g}")
    if c.target != "pixel":
        tubes = clips.grid[0] * int(c.ratio * math.prod(clips.grid[1:])) * c.batch_size * processes.world
        say(f"Sinkhorn   {tubes:,} hidden tubes at a time share {len(model.prototypes):,} prototypes")
        if tubes < len(model.prototypes):
            say("           warning: fewer tubes than prototypes, which can't all be used: raise --batch-size or the number "
                "of processes (--accum does not help, each batch is balanced by itself)")
    say(f"run        {out}" + (f", going on after step {checkpoint['step']:,}" if checkpoint else ""))
    finished = fit(model, clips, order, config, checkpoint, max_steps, dtype, processes)
    if finished and processes.rank == 0:
        show(model, clips, config, processes.device)


def fit(model, clips, order, config, checkpoint, max_steps, dtype, processes):
    """The training loop, from the checkpoint or from the start. Returns whether the schedule was completed.

    The loop never waits for a GPU between two log lines; there it looks at losses, signals and unreadable videos.
    """
    c, device, out = argparse.Namespace(**config), processes.device, Path(config["out"])
    optimizer, scaler = make_optimizer(model.to(device)), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = 0
    if checkpoint:
        step = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
    parallel = model
    if processes.world > 1:
        parallel = DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    stop, unreadable, recent, last = [], {}, [], min(c.steps, max_steps or c.steps)
    handlers = {name: signal.signal(name, lambda number, frame: stop.append(number))
                for name in (signal.SIGTERM, signal.SIGINT)}
    if processes.rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    def save():
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step,
                     epoch=step * c.epochs // c.steps, rng=torch.get_rng_state(), config=config)
        if processes.rank == 0:
            write_whole(out / "last.pt", lambda file: torch.save(state, file))

    data = loader(clips, c.batch_size, order, c.workers, device)
    batches = endless(data, order, step, c.steps // c.epochs, c.accum)
    bar = tqdm(total=c.steps, initial=step, unit="step", disable=processes.rank > 0, dynamic_ncols=True)
    logged, saved, waited = time.monotonic(), time.monotonic(), 0.0
    new, hopeless = {}, False                                               # unreadable videos since the last log line
    while step < last:
        lr = learning_rate(step, c.steps, c.warmup, c.peak_lr, FINAL_LR * c.global_batch / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(1, c.accum + 1):
            asked = time.monotonic()
            video, mask, _, _, bad = next(batches)
            waited += time.monotonic() - asked
            new |= {path: reason for sample in bad for path, reason in sample}
            hopeless |= any(len(sample) == RETRIES for sample in bad)
            together = parallel.no_sync() if processes.world > 1 and part < c.accum else nullcontext()
            with together:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, stats = parallel(normalise(video, device), mask)
                scaler.scale(loss / c.accum).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        recent.append({"loss": loss.detach(), "grad_norm": norm} | {k: v for k, v in stats.items() if v.ndim == 0})
        if step % LOG_EVERY and step < last and not (stop and processes.world == 1):
            continue

        # A log line. Here and only here the program waits for the GPU and for the other processes.
        names = list(recent[0])
        rows = torch.stack([torch.stack([line[name].float() for name in names]) for line in recent])  # steps x numbers
        if processes.world > 1:
            dist.all_reduce(rows)
        rows, recent = (rows / processes.world).tolist(), []
        for number, row in enumerate(rows, start=step - len(rows) + 1):
            if not all(map(math.isfinite, row[:1] if scaler.is_enabled() else row)):   # fp16's scaler skips infinite gradients
                raise RunError(f"expected a finite loss and gradient, found {dict(zip(names, row))} at step {number}: the last "
                               f"good checkpoint is kept; start from it with --init {out / 'last.pt'} and a lower --lr or "
                               "--amp off")
        now, everyone = time.monotonic(), processes.gather((bool(stop), hopeless, new))
        speed = len(rows) * c.global_batch / (now - logged)
        line = {"step": step, "epoch": step * c.epochs / c.steps} | dict(zip(names, (sum(x) / len(rows) for x in zip(*rows))))
        line |= {"lr": lr, "clips_per_second": speed, "data_wait": waited / (now - logged)}
        bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:.0f} clips/s, {line['data_wait']:.0%} waiting for data")
        bar.update(len(rows))
        logged, waited = now, 0.0
        for path, reason in ((path, reason) for _, _, found in everyone for path, reason in found.items()):
            if path not in unreadable:
                unreadable[path] = reason
                processes.say(f"unreadable video {path}: {reason}; another clip takes its place")
        new, hopeless = {}, any(each for _, each, _ in everyone)
        stop += [True] * any(each for each, _, _ in everyone)
        if processes.rank == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line | {"unreadable_videos": len(unreadable)}) + "\n")
        if hopeless or len(unreadable) > max(MAX_BAD, len(clips) // 100):
            save()
            raise RunError(f"expected at most 1% unreadable videos, found {len(unreadable)} among {len(clips):,} so far: "
                           f"mend or remove the ones named above; {out / 'last.pt'} is saved")
        if step == last or stop or now - saved > SAVE_SECONDS:
            save()
            saved = now
        if stop:
            break
    bar.close()
    for name, handler in handlers.items():
        signal.signal(name, handler)
    if step < c.steps:
        processes.say(f"stopped after step {step:,} of {c.steps:,} and saved; go on with --resume {out}")
    return step == c.steps


# ---------------------------------------------------------------------------------------------------------------------
# What was learned: features, linear probe, nearest neighbours, pictures
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def pooled_features(encoder, clips, device):
    """Mean over the tokens of each clip, (n, D) float32, and the labels (n,). Raises RunError if a clip can't be read."""
    features, labels = [], []
    for video, _, label, _, bad in loader(clips, 128, [(0, i) for i in range(len(clips))], workers=0):
        if any(bad):
            raise RunError(f"expected videos that can be read, found {next(filter(None, bad))[0]}: remove it from the list")
        features.append(encoder(normalise(video, device)).mean(dim=1).float().cpu())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def linear_probe(train, train_labels, test, test_labels):
    """Top-1 of logistic regression on frozen features, standardised by the training set; fitted to the optimum."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    head = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train), train_labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (head(test).argmax(dim=1) == test_labels).float().mean().item()


def nearest_neighbours(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Top-1 of k-NN by cosine; a neighbour's vote weighs exp(cosine / temperature)."""
    cosines, index = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(k, dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (cosines / temperature).exp())
    return (votes.argmax(dim=1) == test_labels).float().mean().item()


def judge(encoder, train, val, device):
    """Linear probe and k-NN top-1 of an encoder, fitted on the training clips and tested on the validation clips."""
    encoder.eval()
    features = [*pooled_features(encoder, train, device), *pooled_features(encoder, val, device)]
    return {"linear_probe": linear_probe(*features), "knn": nearest_neighbours(*features)}


def picture(path, rows, height):
    """Writes rows (r, n, 3, h, w) uint8 of images as one PNG, each image `height` pixels high; returns the path."""
    images = F.interpolate(rows.flatten(0, 1).float(), scale_factor=height / rows.shape[-2], mode="nearest-exact")
    write_png(make_grid(images.byte(), nrow=rows.shape[1], padding=2, pad_value=255), str(path))
    return path


def show_masks(path, clips, number=3):
    """Clips, one frame for each time slice, and under each the same with its hidden tubes in grey."""
    tube, rows = clips.tube, []
    for index in range(min(number, len(clips))):
        video, mask, *_ = clips[0, index]
        hidden = mask.view(1, *clips.grid)
        for axis, step in enumerate(tube, start=1):
            hidden = hidden.repeat_interleave(step, dim=axis)                                                    # 1 T S S
        rows += [video[:, ::tube[0]], video.masked_fill(hidden, 128)[:, ::tube[0]]]
    return picture(path, torch.stack(rows).transpose(1, 2), height=96)


@torch.no_grad()
def show_prototypes(path, model, clips, device, number=12, nearest=8):
    """A row for each of some prototypes, the most used ones: the real tubes nearest to it, each from different clips."""
    video = torch.stack([clips[0, index][0] for index in range(min(256, len(clips)))])
    tubes = take_tubes(video, clips.tube)                                                              # B N 3 p q r
    scores = torch.cat([model.compare(*[model.embed(normalise(part, device), everything.expand(len(part), -1))] * 2)[1]
                        for everything in [torch.arange(tubes.shape[1], device=device)[None]]
                        for part in video.split(16)]).view(*tubes.shape[:2], -1)                                  # B N K
    popular = scores.flatten(0, 1).argmax(dim=1).bincount(minlength=scores.shape[2]).argsort(descending=True)[:number]
    best, place = scores[..., popular].max(dim=1)                            # the best tube of each clip: B prototypes
    clip = best.topk(min(nearest, len(video)), dim=0).indices                                   # nearest prototypes
    found = tubes[clip.cpu(), place.gather(0, clip).cpu()]                                # nearest prototypes 3 p q r
    return picture(path, rearrange(found, "n k c p q r -> k n c q (p r)"), height=48)


def show(model, clips, config, device):
    """After pretraining: pictures, on the toy set linear probe and k-NN before and after, and results.json."""
    c, out = argparse.Namespace(**config), Path(config["out"])
    files = [out / "last.pt", out / "log.jsonl", out / "results.json", show_masks(out / "masks.png", clips)]
    if c.target != "pixel":
        files.append(show_prototypes(out / "prototypes.png", model, clips, device))
    results = {"config": config}
    if c.data == "toy":
        val = make_clips(find_videos("data/toy", "val"), c, model)
        torch.manual_seed(c.seed)
        untrained = build_model(c.model, target=c.target).to(device)
        results |= {"protocol": f"frozen encoder, mean over tokens, {len(clips):,} training and {len(val):,} held-out clips, one "
                    "view; linear probe: logistic regression; k-NN: cosine, k = 20, temperature 0.07",
                    "chance": 1 / 8, "untrained": judge(untrained.encoder, clips, val, device),
                    "trained": judge(model.encoder, clips, val, device)}
        tqdm.write(f"top-1 on held-out clips ({results['protocol']})\n             linear probe   k-NN   (chance 12.5%)")
        for name in ("untrained", "trained"):
            tqdm.write(f"{name:12}{results[name]['linear_probe']:12.1%}{results[name]['knn']:9.1%}")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    tqdm.write("wrote " + ", ".join(map(str, files)))


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark
# ---------------------------------------------------------------------------------------------------------------------

def seconds(work, device, repeat=5):
    """Median time of work() after one call that doesn't count."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeat // 2]


def bench(config, processes):
    """Prints how fast the loader, a training step and Sinkhorn are on this machine. Trains nothing, writes nothing."""
    c, device = argparse.Namespace(**config), processes.device
    dtype = precision(config.get("amp"), device)
    model = build_model(c.model, target=c.target).to(device)
    clips = make_clips(find_videos(data_source(c.data, processes)), c, model, cache=None)
    reader = iter(loader(clips, 8, [(0, i % len(clips)) for i in range(8 * 1000)], workers=1))
    next(reader)
    start, read = time.perf_counter(), 0
    while time.perf_counter() - start < 8:
        read += len(next(reader)[0])
    loading = read / (time.perf_counter() - start)
    del reader

    optimizer = make_optimizer(model)
    video = normalise(torch.randint(256, (c.batch_size, 3, c.frames, c.size, c.size), dtype=torch.uint8), device)
    mask = tube_mask(c.batch_size, clips.grid, c.ratio)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, _ = model(video, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    large = torch.randn(4096, 4096, device=device, dtype=dtype or torch.float32)
    product = 2 * 4096 ** 3 / seconds(lambda: large @ large, device)
    training = c.batch_size / seconds(step, device)
    work = training_flops(model, clips.grid, hidden=int(mask[0].sum()))
    rows = [("loader, one worker", f"{loading:,.1f} clips/s", f"{c.data}, {c.frames} x {c.size} x {c.size}"),
            ("training step", f"{training:,.2f} clips/s", f"{c.model}, {c.target}, batch {c.batch_size}, autocast "
             + str(dtype or "off").removeprefix("torch.")),
            ("arithmetic", f"{work / 1e9:,.1f} GFLOP/clip", "forward and backward, as sigma.training_flops counts"),
            ("share of matrix product", f"{work * training / product:.0%}", f"of {product / 1e9:,.0f} GFLOP/s at 4096 x 4096")]
    if c.target != "pixel":
        k = len(model.prototypes)
        scores = F.normalize(torch.randn(int(mask.sum()), 64, device=device), dim=1) @ \
            F.normalize(torch.randn(k, 64, device=device), dim=1).T
        vector = torch.rand(k, device=device)
        ratio = seconds(lambda: sinkhorn(scores), device) / seconds(lambda: scores @ vector, device)
        rows.append(("Sinkhorn, 10 iterations", f"{ratio:.0f} products", f"of the {len(scores):,} x {k:,} scores with a vector"))
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    rows.append(("peak memory", f"{peak / 2 ** 30:.2f} GiB", "of the GPU" if device.type == "cuda" else "of the process"))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    for name, value, note in rows:
        print(f"{name:26}{value:>20}   {note}")


def main(argv=None):
    """Runs the command line; returns the exit code: 0, 1 for a run that can't go on, 2 for wrong usage."""
    given, processes = vars(parse(argv)), None
    try:
        config, checkpoint = configure(given)
        processes = Processes()
        if given.get("bench"):
            bench(config, processes)
        else:
            pretrain(config, checkpoint, given.get("init"), given.get("max_steps"), processes)
        return 0
    except (UserError, RunError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
