"""Fine-tune an encoder with labels, or train a linear probe on it (--freeze), and test it.

    python extras/finetune.py --init out/toy-tiny-mlp --data toy
    torchrun --nproc_per_node=8 extras/finetune.py --init out/ssv2-base-mlp --data ssv2 --root DIR
    python extras/finetune.py --freeze --init out/k400-base-mlp --data train.csv --val val.csv

Protocol, as published: mean over the encoder's tokens, without its last norm, then LayerNorm and a
linear layer. AdamW (0.9, 0.999), weight decay 0.05, learning rate 1e-3 x batch / 256, 5 epochs of
warmup, label smoothing 0.1. Fine-tuning: rates x 0.75 per layer down, drop path 0.1, RandAugment,
mixup 0.8, cutmix 1.0, random erasing 0.25. With --freeze the encoder stays as it is, and the
augmentation stays on, as in the published probe. Frames: dense (K400), 16 evenly from a window of
16 x stride, or segments (SSv2), a random one of each of 16 parts. Tested on clips x crops of each
video (--views), probabilities averaged; a video that can't be read counts as wrong.

Without --init it trains from scratch. The same command goes on where it stopped.
"""
import argparse
import json
import math
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import (Clips, EndlessSampler, centre_crop, find_videos, loader, make_toy, normalise,
                  seeded)
from sigma import SIZES, Encoder, UserError, fill, read_checkpoint, sizes_for, sizes_of, tube_mask
from train import (RANK, RECIPES, WORLD, RunError, StopSignals, accuracy, autocast, check_same,
                   collect, gather, launch, learning_rate, locate, log, one_first, pick_amp,
                   prepare_folder, recipe, save_atomically, set_up, split_batch, within)

# What fine-tuning changes in the pretraining recipe of a data set; "freeze": for the probe.
TUNE = dict(epochs=100, lr=1e-3, warmup=5, clips=16, global_batch=None, sampling="dense",
            views="5x3", flip="on", augment="on", freeze=dict(epochs=30))
TOY = dict(epochs=10, lr=4e-3, warmup=1, clips=64, global_batch=64, sampling="dense", views="1x1",
           flip="off", augment="off", freeze=dict(epochs=5))
K400 = dict(global_batch=8 * 4 * 8)
OWN = {"k400": K400, "ucf101": K400, "hmdb51": K400, "toy": TOY, "tiny": TOY,
       "ssv2": dict(epochs=40, global_batch=8 * 4, sampling="segments", views="2x3", flip="off",
                    freeze=dict(epochs=30, global_batch=8 * 24 * 2))}
LAYER_DECAY, DROP_PATH, SMOOTHING = 0.75, 0.1, 0.1


class Classifier(nn.Module):
    """An encoder with a classifier: mean over all tokens, LayerNorm, linear layer near 0 at first.

    encoder: an Encoder, which loses its last norm. drop_path: how often, in training, a clip skips
    a half of the last block; it grows linearly from 0 in the first. Names are the published ones,
    with "encoder." before the encoder's.
    """

    def __init__(self, encoder, classes, drop_path=0.0):
        super().__init__()
        self.encoder, encoder.norm = encoder, nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(0.001)
        nn.init.zeros_(self.head.bias)
        rates = torch.linspace(0, drop_path, len(encoder.blocks)).tolist()
        for block, rate in zip(encoder.blocks, rates):
            for half in (block.attn, block.mlp):
                half.register_forward_hook(
                    lambda half, _, x, rate=rate: stochastic_depth(x, rate, "row", half.training))

    def forward(self, video):
        """Normalised video (B, 3, T, H, W) -> logits (B, classes)."""
        return self.head(self.fc_norm(self.encoder(video).mean(dim=1)))


# --- Frames, augmentation, views ------------------------------------------------------------------

def evenly(start, end, number):
    """`number` indices from start to end, both included, but below end."""
    step = (end - start) / max(number - 1, 1)
    return [min(int(start + i * step), end - 1) for i in range(number)]


def dense_frames(n, frames, stride, generator=None):
    """Evenly over a window of frames * stride at a random place; short videos hold the last."""
    if n > frames * stride:
        start = int(torch.randint(n - frames * stride, (1,), generator=generator))
        return evenly(start, start + frames * stride, frames)
    return (evenly(0, n, n // stride) + [n - 1] * frames)[:frames]


def segment_frames(n, frames, stride, generator=None):
    """A random frame of each of `frames` equal parts of the video."""
    part = n // frames
    if part == 0:
        return [i * n // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, (1,), generator=generator)) for i in range(frames)]


def view_frames(n, frames, stride, views, sampling):
    """Indices for each test view in time; a single one is in the middle."""
    if sampling == "segments":  # the middle and the start of each segment, in turns
        part = n / frames
        return [[int(part * i + part * (view / views if views > 1 else 0.5))
                 for i in range(frames)] for view in range(views)]
    every = range(0, n, stride)
    free = max(len(every) - frames, 0)
    starts = [view * free // (views - 1) for view in range(views)] if views > 1 else [free // 2]
    return [[every[min(start + i, len(every) - 1)] for i in range(frames)] for start in starts]


def augmentation(size, flip):
    """Of (T, 3, H, W) uint8, alike for all frames: random resized crop, flip, and four times, with
    probability 1/2, an operation of RandAugment of strength 7 +- 0.5 of 10."""
    strengths = [v2.RandAugment(1, strength, 101, fill=[124, 116, 104])
                 for strength in (64, 70, 76)]
    return v2.Compose([v2.RandomResizedCrop(size, antialias=False),
                       v2.RandomHorizontalFlip(0.5 if flip else 0)]
                      + [v2.RandomApply([v2.RandomChoice(strengths)], 0.5)] * 4)


class TrainingClips(Clips):
    """Clips for training with labels. augment: a transform of frames; None for the plain crop."""

    def __init__(self, videos, augment=None, **options):
        super().__init__(videos, **options)
        self.augment = augment

    def read(self, path, generator):
        if self.augment is None:
            return super().read(path, generator)
        clips = self.frames_of(path, lambda n: [
            self.choose(n, self.frames, self.stride, generator) for _ in range(self.repeat)])
        with torch.random.fork_rng(devices=[]):  # transforms draw from torch's own random state
            torch.default_generator.set_state(generator.get_state())
            clips = [self.augment(clip).transpose(0, 1) for clip in clips]
        return torch.stack(clips), tube_mask(self.repeat, self.grid, self.ratio, generator)


class Views(Clips):
    """Each video in times x crops views, R of them: the short side is resized to `size`, the crops
    lie evenly along the long one. An unreadable video is not replaced: black, label -1."""

    def __init__(self, videos, *, times=1, crops=1, sampling="dense", **options):
        super().__init__(videos, **options | dict(repeat=times * crops, tries=1))
        self.times, self.crops, self.sampling = times, crops, sampling

    def read(self, path, generator=None):
        found = []
        for clip in self.frames_of(path, lambda n: view_frames(
                n, self.frames, self.stride, self.times, self.sampling)):
            clip = transform.resize(clip, [self.size], antialias=False).transpose(0, 1)  # 3 T H W
            axis = 2 if clip.shape[2] > clip.shape[3] else 3
            free = clip.shape[axis] - self.size
            for crop in range(self.crops):
                start = crop * free // (self.crops - 1) if self.crops > 1 else free // 2
                found.append(clip.narrow(axis, start, self.size))
        return torch.stack(found), tube_mask(self.repeat, self.grid, self.ratio)


def limit(videos, number, seed):
    """A random choice of `number` videos; classes have equal shares, or differ by one video."""
    turn, ranked = Counter(), []
    for i in torch.randperm(len(videos.paths), generator=seeded(seed)).tolist():
        turn[videos.labels[i]] += 1  # how many of its class came so far
        ranked.append((turn[videos.labels[i]], len(ranked), i))
    return videos.take(sorted(i for _, _, i in sorted(ranked)[:number]))


# --- Training -------------------------------------------------------------------------------------

def parse(argv):
    """The flags, with the recipe of --data, --model and --freeze as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--init", help="run, or checkpoint, whose encoder is taken (default: from scratch)")
    add("--data", default="toy", help="k400, ssv2, ucf101, hmdb51, toy, a folder or a list")
    add("--root", help="folder of a named set (default: data/<name>)")
    add("--val", help="videos to test on (default: val or test of --data)")
    add("--model", choices=SIZES, help="without --init (default: tiny for toy, else base)")
    add("--freeze", action="store_true", help="linear probe: train LayerNorm and head alone")
    add("--limit", type=int, help="so many training videos, equally many of each class")
    for name in ("epochs", "batch-size", "accum", "frames", "stride", "size", "max-steps"):
        add(f"--{name}", type=int, help="as in train.py")
    add("--repeat", type=int, default=1, help="repeated augmentation: clips of a decoded video")
    add("--lr", type=float, help="peak learning rate for 256 clips per step, scaled to yours")
    add("--views", help="clips x crops of each test video, such as 5x3")
    add("--sampling", choices=["dense", "segments"], help="frames of a clip, see above")
    add("--flip", choices=["on", "off"], help="off where classes tell left from right")
    add("--augment", choices=["on", "off"], help="off: crops alone, nothing mixed or erased")
    add("--amp", choices=["bf16", "fp16", "off"], help="autocast (default: on GPUs)")
    add("--workers", type=int, help="loader processes of each training process")
    add("--timeout", type=int, default=300, help="seconds to wait for the loader")
    add("--seed", type=int, default=0, help="of the head, order, augmentation and --limit")
    add("--out", help="folder of the run (default: out/<data>-finetune, or -probe)")
    known, _ = parser.parse_known_args(argv)
    model = known.model or ("tiny" if known.data == "toy" else "base")
    if known.init:
        width = read_checkpoint(known.init)["model"]["encoder.patch_embed.proj.weight"].shape[0]
        model = {row["dim"]: name for name, row in SIZES.items()}.get(width, "other")
    own = recipe(known.data, model) | TUNE | OWN.get("tiny" if model == "tiny" else known.data, {})
    own |= own.pop("freeze") if known.freeze else {}
    own.pop("freeze", None)
    name = f"{Path(known.data).resolve().stem}-{'probe' if known.freeze else 'finetune'}"
    parser.set_defaults(model=model, out=f"out/{name}", **own)
    args = parser.parse_args(argv)
    numbers = (args.epochs, args.batch_size, args.accum, args.frames, args.stride, args.size,
               args.max_steps, args.limit, args.repeat)
    if any(number is not None and number < 1 for number in numbers) or not 0 <= args.lr < math.inf:
        parser.error("counts must be at least 1, and --lr at least 0")
    if args.batch_size and args.batch_size % args.repeat:
        parser.error("--batch-size must be divisible by --repeat")
    if args.model != model:
        parser.error(f"--init holds a {model} encoder: leave out --model")
    if Path(args.data).is_file() and not args.val:
        parser.error("a list as --data takes videos to test on: --val LIST or FOLDER")
    if args.flip == "on" and args.data == "ssv2":
        parser.error("--flip on can't be used with ssv2: left and right are labels there")
    if args.root and args.data not in RECIPES:
        parser.error("--root only applies to named data sets, not to a folder or list")
    counts = args.views.split("x")
    if len(counts) != 2 or not all(count.isdecimal() and int(count) for count in counts):
        parser.error(f"--views {args.views} is not clips x crops, such as 5x3")
    return args


def make_optimizer(model, freeze):
    """AdamW; no weight decay on vectors; layer-wise rates in fine-tuning, as a group's "scale"."""
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        layer = depth + 1  # of the head
        if "patch_embed" in name:
            layer = 0
        elif ".blocks." in name:
            layer = int(name.split(".")[2]) + 1
        scale = 1.0 if freeze else LAYER_DECAY ** (depth + 1 - layer)
        if p.requires_grad:
            groups.setdefault((scale, 0.05 if p.ndim > 1 else 0.0), []).append(p)
    groups = [dict(params=params, scale=scale, weight_decay=decay)
              for (scale, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


class Mixing:
    """What augmentation does to a batch on the device: erasing, then mixup or cutmix."""

    def __init__(self, classes):
        self.erase = v2.RandomErasing(p=0.25, value="random")
        self.mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                                    v2.CutMix(alpha=1.0, num_classes=classes)])

    def __call__(self, video, labels):
        """Video (B, 3, T, S, S) and labels (B,) -> video and class shares (B, classes)."""
        video = torch.stack([self.erase(clip.transpose(0, 1)).transpose(0, 1) for clip in video])
        video, shares = self.mix(tv_tensors.Video(video), labels)
        return video.as_subclass(torch.Tensor), shares


def load_encoder(args):
    """(sizes, weights by our names to start from); decoder, projector, prototypes are left out."""
    if not args.init:
        return sizes_for(args.model), {}
    content = read_checkpoint(args.init)
    sizes = content.get("sizes") or sizes_of(content["model"])
    if not sizes.get("heads"):
        raise UserError(f"{args.init} does not tell its number of heads: see extras/weights.py")
    kept = ("encoder.", "fc_norm.", "head.")
    left = {n.split(".")[0] for n in content["model"] if not n.startswith(kept)}
    if left:
        log(f"weights   {args.init}; left out: {', '.join(sorted(left))}, the encoder's last norm")
    return sizes, {n: w for n, w in content["model"].items()
                   if n.startswith(kept) and not n.startswith("encoder.norm.")}


def find_labelled(source, splits, classes=None):
    """The Videos, each of which must have a label."""
    videos = find_videos(source, splits, classes)
    without = [path for path, label in zip(videos.paths, videos.labels) if label < 0]
    if without:
        raise UserError(f"{len(without)} videos have no label, first {without[0]}: give class "
                        "folders or lines `path label`")
    return videos


def main(argv=None):
    """One run, from the flags to the results."""
    args = parse(argv)
    device, out, root = set_up(), Path(args.out), locate(args.data, args.root)
    amp = pick_amp(args.amp, device)
    before = read_checkpoint(out) if (out / "last.pt").exists() else None
    if before:  # a finished run may be tested again on other views
        check_same({n: v for n, v in before["args"].items() if n != "views"}, vars(args), out)

    if args.data == "toy":
        one_first(lambda: make_toy(root))
    videos = find_labelled(root, ("train", ""))
    tests = find_labelled(args.val or root, ("val", "test", "") if args.val else ("val", "test"),
                          videos.classes)
    if args.limit:
        videos = limit(videos, args.limit, args.seed)
    classes = max(max(videos.labels), max(tests.labels)) + 1
    sizes, weights = load_encoder(args)
    sizes = {name: sizes[name] for name in ("dim", "depth", "heads", "tube")}
    if any(side % step for side, step in zip((args.frames, args.size, args.size), sizes["tube"])):
        raise UserError(f"--frames and --size must be multiples of the tube {sizes['tube']}")
    torch.manual_seed(args.seed)
    model = Classifier(Encoder(**sizes), classes, 0.0 if args.freeze else DROP_PATH)
    own = model.state_dict()
    if weights:
        fits = weights.get("head.weight", torch.empty(0)).shape == own["head.weight"].shape
        new = {n: w for n, w in own.items() if n.startswith(("fc_norm.", "head.")) and not fits}
        fill(model, weights | new, args.init)
        log("weights   the head is taken too" if fits else "weights   fc_norm and head are new")
    model.encoder.requires_grad_(not args.freeze)
    model.encoder.recompute = sizes["dim"] >= 1024 and not args.freeze
    model.to(device)
    optimizer = make_optimizer(model, args.freeze)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    mixing = Mixing(classes) if args.augment == "on" else None

    shape = dict(frames=args.frames, stride=args.stride, size=args.size, tube=sizes["tube"],
                 ratio=args.ratio, seed=args.seed)
    choose = dense_frames if args.sampling == "dense" else segment_frames
    augment = augmentation(args.size, args.flip == "on") if mixing else None
    if args.data == "toy":  # small enough to be kept, and not cropped
        shape |= dict(cache={}, crop=centre_crop)
    clips = TrainingClips(videos, augment, choose=choose, repeat=args.repeat, **shape)
    times, crops = map(int, args.views.split("x"))
    views = Views(tests, times=times, crops=crops, sampling=args.sampling, **shape)
    batch, accum = split_batch(args, WORLD, len(clips))
    per_step = batch * accum * WORLD
    steps = max(1, args.epochs * len(clips) // per_step)
    warmup = int(min(args.warmup, args.epochs / 8) * len(clips) / per_step)
    peak, final, step = args.lr * per_step / 256, 1e-6 * per_step / 256, 0
    if before:
        fill(model, before["model"], out)
        optimizer.load_state_dict(before["optimizer"])
        scaler.load_state_dict(before["scaler"])
        step = before["clips_seen"] // per_step
    way = "linear probe, encoder frozen" if args.freeze else "fine-tuning of all weights"
    protocol = (f"{way}; {args.epochs} epochs, lr {args.lr:g} x {per_step} / 256, {args.sampling} "
                f"frames, augmentation {args.augment}, flip {args.flip}; {args.views} test views")
    log(f"data      {len(videos.paths):,} training and {len(tests.paths):,} test videos, {classes} "
        f"classes; {WORLD} processes x {batch} clips x {accum} accumulated, {steps:,} steps")
    log(f"protocol  {protocol}")

    finished = out / "results.json"
    if step >= steps and finished.exists():
        results = json.loads(finished.read_text())
        if (results["views"], results["args"]["val"]) == (args.views, args.val):
            return log(f"{out} is complete: top-1 {results['top1']:.1%}, top-5 "
                       f"{results['top5']:.1%} on {args.views} views; other --views test again")

    def save():
        if RANK == 0:
            save_atomically(out / "last.pt", dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), args=vars(args),
                scaler=scaler.state_dict(), sizes=sizes | dict(classes=classes),
                clips_seen=step * per_step, log_size=(out / "log.jsonl").stat().st_size))

    if RANK == 0:
        prepare_folder(out, videos.skipped, before["log_size"] if before else 0)
    if not before:
        save()
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if WORLD > 1 else model
    sampler = EndlessSampler(len(clips), batch // args.repeat, RANK, WORLD, args.seed,
                             step * per_step // args.repeat)
    batches = within(args.timeout, loader(clips, sampler.batch, sampler, args.workers, device))
    stop, bad, recent, last = StopSignals(), {}, [], min(steps, args.max_steps or steps)
    saved = logged = time.monotonic()
    bar = tqdm(total=steps, initial=step, unit="step", disable=RANK > 0, dynamic_ncols=True)
    while step < last:
        rate = learning_rate(step, steps, warmup, peak, final)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        total = 0.0
        for part in range(1, accum + 1):
            video, _, labels, _, unreadable = next(batches)
            bad.update(pair for pairs in unreadable for pair in pairs)
            torch.manual_seed(hash((args.seed, step, part, RANK)) % 2 ** 63)  # drop path, mixing
            target = labels.clamp(min=0).to(device).repeat_interleave(len(video) // len(labels))
            video = normalise(video, device)
            if mixing:
                video, target = mixing(video, target)
            with parallel.no_sync() if WORLD > 1 and part < accum else nullcontext():
                with autocast(amp, device):
                    logits = parallel(video)
                loss = F.cross_entropy(logits.float(), target, label_smoothing=SMOOTHING)
                scaler.scale(loss / accum).backward()
            total = total + loss.detach() / accum
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        bar.update()
        recent.append(total)
        stopped = any(gather(stop.seen)) if WORLD > 1 else stop.seen
        if not (stopped or step == last or step % 10 == 0):
            continue
        mean = torch.stack(recent).mean().item()
        if not math.isfinite(mean):
            raise RunError(f"the loss is {mean} at step {step}; {out}/last.pt is the last good "
                           "checkpoint: lower --lr, or --amp off")
        unreadable = {path: reason for found in gather(bad) for path, reason in found.items()}
        bar.set_postfix_str(f"loss {mean:.3f}, {len(unreadable)} unreadable videos")
        if RANK == 0:
            with open(out / "log.jsonl", "a") as file:
                speed = len(recent) * per_step / (time.monotonic() - logged)
                file.write(json.dumps({"step": step, "loss": mean, "lr": rate, "clips_per_second":
                                       speed, "unreadable_videos": len(unreadable)}) + "\n")
        if len(unreadable) > max(min(5, len(clips) - 1), 0.01 * len(clips)):
            save()
            raise RunError("too many videos can't be read: " + "; ".join(
                f"{path}: {reason}" for path, reason in sorted(unreadable.items())))
        if stopped or step == last or time.monotonic() - saved > 600:
            save()
            saved = time.monotonic()
        recent, logged = [], time.monotonic()
        if stopped:
            break
    bar.close()
    stop.restore()
    for path, reason in {p: r for found in gather(bad) for p, r in found.items()}.items():
        log(f"unreadable video {path}: {reason}; another one took its place")
    if step < steps:
        return log(f"stopped after step {step:,} of {steps:,}; the same command goes on")

    model.eval()
    scores, labels = collect(lambda video: model(video).softmax(dim=1), views, device, amp,
                             args.workers)
    results = dict(top1=accuracy(scores, labels), top5=accuracy(scores, labels, 5),
                   videos=len(labels), unreadable=int((labels < 0).sum()), views=args.views,
                   protocol=protocol, data=str(args.val or root), checkpoint=f"{out}/last.pt",
                   init=args.init, step=step, args=vars(args))
    if RANK == 0:
        finished.write_text(json.dumps(results, indent=2) + "\n")
        with open(out / "log.jsonl", "a") as file:  # keeps what other views gave
            file.write(json.dumps({"step": step, **results}) + "\n")
    log(f"top-1 {results['top1']:.1%}, top-5 {results['top5']:.1%} of {len(labels):,} videos, "
        f"{results['unreadable']} of them unreadable\n{protocol}\nwrote {out}/results.json")


if __name__ == "__main__":
    sys.exit(launch(main))
