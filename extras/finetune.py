"""Fine-tune an encoder with labels, or train a linear probe on it (--freeze), and test it.

    python extras/finetune.py --init out/toy-tiny-mlp --data toy
    torchrun --nproc_per_node=8 extras/finetune.py --init out/ssv2-base-mlp --data ssv2 --root DIR
    python extras/finetune.py --freeze --init out/k400-base-mlp --data train.csv --val val.csv

Protocol, as published: mean over the encoder's tokens, without its last norm, then LayerNorm and a
linear layer. AdamW (0.9, 0.999), weight decay 0.05, learning rate 1e-3 x batch / 256, label
smoothing 0.1. Fine-tuning: rates x 0.75 per layer down, drop path 0.1, RandAugment, mixup 0.8,
cutmix 1.0, random erasing 0.25. With --freeze the encoder stays as it is; the augmentation stays
on, as in the published probe. Frames: dense (K400), 16 evenly from a window of 16 x stride, or
segments (SSv2), a random one of each of 16 parts. Tested on clips x crops of each video (--views),
probabilities averaged; a video that can't be read counts as wrong.

Without --init it trains from scratch. The same command goes on where it stopped; with other --views
or --val a finished run is tested once more.
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import RandomResizedCrop, v2

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import (IMAGENET_MEAN, IMAGENET_STD, Clips, centre_crop, corner_crop, find_videos,
                  make_toy, normalise, seeded)
from sigma import (SIZES, Encoder, UserError, fill, read_checkpoint, sizes_for, sizes_of, tube_mask)
from train import (RANK, accuracy, autocast, check, collect, count, fit, launch, locate, log,
                   one_first, parser_with, pick_amp, recipe, saved_run, set_up)

# What fine-tuning changes in the pretraining recipe of a data set, and what a probe changes in it.
TUNE = dict(epochs=100, lr=1e-3, final_lr=1e-6, warmup=5, clips=16, global_batch=None, views="5x3",
            sampling="dense", flip="on", augment="on")
K400 = dict(global_batch=8 * 4 * 8)
OWN = {"k400": K400, "ucf101": K400, "hmdb51": K400,
       "ssv2": dict(epochs=40, global_batch=8 * 4, views="2x3", sampling="segments", flip="off"),
       "toy": dict(epochs=10, lr=4e-3, warmup=1, clips=64, global_batch=64, views="1x1", flip="off",
                   augment="off")}
PROBE = {"ssv2": dict(epochs=30, global_batch=8 * 24 * 2), "toy": dict(epochs=5)}


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

def dense_frames(n, frames, stride, generator=None):
    """Evenly over a window of frames * stride at a random place; of a shorter video a frame for
    each stride, then its last."""
    start, window, number = 0, n, n // stride
    if n > frames * stride:
        window, number = frames * stride, frames
        start = int(torch.randint(n - window, (1,), generator=generator))
    step = window / max(number - 1, 1)
    chosen = [min(int(start + i * step), start + window - 1) for i in range(number)]
    return (chosen + [n - 1] * frames)[:frames]


def segment_frames(n, frames, stride, generator=None):
    """A random frame of each of `frames` equal parts of the video."""
    part = n // frames
    if part == 0:
        return [i * n // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, (1,), generator=generator)) for i in range(frames)]


def spread(number, free):
    """Starts of so many windows, evenly over `free` positions; a single one is in the middle."""
    return [i * free // (number - 1) for i in range(number)] if number > 1 else [free // 2]


def view_frames(n, frames, stride, views, sampling):
    """Indices for each test view in time."""
    if sampling == "segments":  # start and middle of each segment, in turns; one view: the middle
        offsets = [view / views for view in range(views)] if views > 1 else [0.5]
        return [[int((i + offset) * n / frames) for i in range(frames)] for offset in offsets]
    every = range(0, n, stride)
    return [[every[min(start + i, len(every) - 1)] for i in range(frames)]
            for start in spread(views, max(len(every) - frames, 0))]


class Views(Clips):
    """Each video in times x crops views, R of them: the short side is resized to `size`, the crops
    lie evenly along the long one. An unreadable video is not replaced: black, label -1."""

    def __init__(self, videos, *, times=1, crops=1, sampling="dense", **shape):
        super().__init__(videos, **shape, repeat=times * crops, tries=1)
        self.times, self.crops, self.sampling = times, crops, sampling

    def read(self, path, generator=None):
        views = []
        for clip in self.frames_of(path, lambda n: view_frames(
                n, self.frames, self.stride, self.times, self.sampling)):
            clip = v2.functional.resize(clip, [self.size], antialias=False)  # as published
            clip = clip.transpose(0, 1)  # 3 T H W
            axis = 2 if clip.shape[2] > clip.shape[3] else 3
            views += [clip.narrow(axis, start, self.size)
                      for start in spread(self.crops, clip.shape[axis] - self.size)]
        return torch.stack(views), tube_mask(self.repeat, self.grid, self.ratio)


def random_crop(height, width, generator):
    """A random box (top, left, height, width) of 8 to 100% of the area, sides 3:4 to 4:3."""
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own random state
        torch.set_rng_state(generator.get_state())
        box = RandomResizedCrop.get_params(torch.empty(1, height, width), (0.08, 1), (3 / 4, 4 / 3))
        generator.set_state(torch.get_rng_state())
    return box


def augmentation(classes, flip):
    """A function (clips (B, 3, T, S, S) uint8, labels (B,)) -> (normalised clips, class shares (B,
    classes)). Flip, RandAugment (four operations, each with probability 1/2, strength 7 +- 0.5 of
    10) and erasing are alike in all frames of a clip; mixup or cutmix joins pairs of clips."""
    strengths = [v2.RandAugment(1, strength, 101, fill=[124, 116, 104])
                 for strength in (64, 70, 76)]
    distort = v2.Compose([
        v2.RandomHorizontalFlip(0.5 if flip else 0),
        *[v2.RandomApply([v2.RandomChoice(strengths)], 0.5)] * 4,
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.RandomErasing(0.25, value="random")])
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                           v2.CutMix(alpha=1.0, num_classes=classes)])

    def augment(video, labels):
        video = torch.stack([distort(clip) for clip in video.transpose(1, 2)])  # B T 3 S S
        mixed, shares = mix(video.flatten(1, 2), labels)
        return mixed.view_as(video).transpose(1, 2), shares

    return augment


# --- Training -------------------------------------------------------------------------------------

def parse(argv):
    """The flags, with the recipe of --data, model and --freeze as defaults; sizes and weights of
    --init, or of a new encoder and {}."""
    parser = parser_with(__doc__, *"init data root val model epochs batch-size accum repeat lr "
                         "frames stride size amp workers timeout seed max-steps out".split())
    add = parser.add_argument
    add("--freeze", action="store_true", help="linear probe: train LayerNorm and head alone")
    add("--limit", type=count, help="so many training videos, equally many of each class")
    add("--views", help="clips x crops of each test video, such as 5x3")
    add("--sampling", choices=["dense", "segments"], help="frames of a clip, see above")
    add("--flip", choices=["on", "off"], help="off where classes tell left from right")
    add("--augment", choices=["on", "off"], help="off: crops alone, nothing mixed or erased")
    known, _ = parser.parse_known_args(argv)
    model, weights = known.model or ("tiny" if known.data == "toy" else "base"), {}
    sizes = sizes_for(model)
    if known.init:
        content = read_checkpoint(known.init)
        weights, sizes = content["model"], content.get("sizes") or sizes_of(content["model"])
        model = {row["dim"]: name for name, row in SIZES.items()}.get(sizes["dim"], "other")
        if not sizes["heads"]:
            parser.error(f"{known.init} does not tell its number of heads: see extras/weights.py")
    own = "toy" if model == "tiny" else known.data
    defaults = recipe(known.data, model) | TUNE | OWN.get(own, {})
    defaults |= PROBE.get(own, dict(epochs=30)) if known.freeze else {}
    name = f"{Path(known.data).resolve().stem}-{'probe' if known.freeze else 'finetune'}"
    parser.set_defaults(model=model, out=f"out/{name}", eval_every=0, keep_every=0, **defaults)
    args = parser.parse_args(argv)
    check(parser, args, sizes["tube"])
    if args.model != model:
        parser.error(f"--init holds a {model} encoder: leave out --model")
    if Path(args.data).is_file() and not args.val:
        parser.error("a list as --data takes videos to test on: --val LIST or FOLDER")
    if args.flip == "on" and args.data == "ssv2":
        parser.error("--flip on can't be used with ssv2: left and right are labels there")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.views):
        parser.error(f"--views {args.views} is not clips x crops, such as 5x3")
    return args, sizes, weights


def limit(videos, number, seed):
    """A random choice of `number` videos; classes have equal shares, or differ by one video."""
    turn, seen = {}, Counter()
    for i in torch.randperm(len(videos.paths), generator=seeded(seed)).tolist():
        turn[i] = seen[videos.labels[i]] = seen[videos.labels[i]] + 1
    return videos.take(sorted(sorted(turn, key=turn.get)[:number]))


def make_optimizer(model):
    """AdamW; each layer learns at 0.75 times the rate ("scale") of the one above it; no weight
    decay on vectors."""
    layers = [nn.ModuleList([model.fc_norm, model.head]), *reversed(model.encoder.blocks),
              model.encoder.patch_embed]
    groups = [dict(params=[p for p in layer.parameters() if (p.ndim > 1) == matrices],
                   scale=0.75 ** below, weight_decay=0.05 if matrices else 0.0)
              for below, layer in enumerate(layers) for matrices in (True, False)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def take_weights(model, weights, source):
    """Fills a Classifier from a checkpoint, but for a head of other classes; says what is new."""
    kept = {n: w for n, w in weights.items() if n.startswith(("encoder.", "fc_norm.", "head."))
            and not n.startswith("encoder.norm.")}
    new = {n: w for n, w in model.state_dict().items() if n.startswith(("fc_norm.", "head."))
           and (n not in kept or kept[n].shape != w.shape)}
    fill(model, kept | new, source)
    left = {".".join(n.split(".")[:2]) for n in weights.keys() - kept.keys()}
    log(f"weights   {source}; new: {', '.join(new) or 'none'}; "
        f"left out: {', '.join(sorted(left)) or 'none'}")


def main(argv=None):
    """One run, from the flags to the results."""
    args, sizes, weights = parse(argv)
    device, out, root = set_up(), Path(args.out), locate(args.data, args.root)
    amp, before, finished = pick_amp(args.amp, device), saved_run(args), out / "results.json"
    results = json.loads(finished.read_text()) if before and finished.exists() else {}
    if results and (results["views"], results["args"]["val"]) == (args.views, args.val):
        return show(results)
    if args.data == "toy":
        one_first(lambda: make_toy(root))
    videos = find_videos(root)
    tests = find_videos(args.val or root, ("val", "test", "") if args.val else ("val", "test"),
                        videos.classes)
    for path, label in zip(videos.paths + tests.paths, videos.labels + tests.labels):
        if label < 0:
            raise UserError(f"{path} has no label: give class folders or lines `path label`")
    classes = 1 + max(videos.labels + tests.labels)
    videos = limit(videos, args.limit, args.seed) if args.limit else videos

    torch.manual_seed(args.seed)
    sizes = {name: sizes[name] for name in ("dim", "depth", "heads", "tube")}
    model = Classifier(Encoder(**sizes), classes, 0.0 if args.freeze else 0.1).to(device)
    if weights and not before:
        take_weights(model, weights, args.init)
    model.encoder.requires_grad_(not args.freeze)
    model.encoder.recompute = sizes["dim"] >= 1024  # memory before speed
    toy, augmented = args.data == "toy", args.augment == "on"
    shape = dict(frames=args.frames, stride=args.stride, size=args.size, tube=sizes["tube"],
                 ratio=args.ratio, seed=args.seed, cache={} if toy else None)
    clips = Clips(videos, choose=dense_frames if args.sampling == "dense" else segment_frames,
                  crop=random_crop if augmented else centre_crop if toy else corner_crop,
                  repeat=args.repeat, **shape)
    times, crops = map(int, args.views.split("x"))
    views = Views(tests, times=times, crops=crops, sampling=args.sampling, **shape)
    augment = augmentation(classes, args.flip == "on")

    def loss_of(network, samples):
        video, _, labels, *_ = samples
        labels = labels.clamp(min=0).repeat_interleave(args.repeat).to(device)  # -1: black
        if augmented:
            video, labels = augment(video.to(device), labels)
        else:
            video = normalise(video, device)
        with autocast(amp, device):
            logits = network(video)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1), {}

    log(f"protocol  {'linear probe' if args.freeze else 'fine-tuning'}, {classes} classes, "
        f"{args.sampling} frames, augmentation {args.augment}, flip {args.flip}")
    step = fit(args, model, make_optimizer(model), clips, loss_of, device=device, before=before,
               sizes=sizes | dict(classes=classes))
    if step is None:
        return
    model.eval()
    scores, labels = collect(lambda video: model(video).softmax(dim=1), views, device, amp,
                             args.workers)
    way = "linear probe, encoder frozen" if args.freeze else "fine-tuning of all weights"
    results = dict(
        top1=accuracy(scores, labels), top5=accuracy(scores, labels, 5), videos=len(labels),
        unreadable=int((labels < 0).sum()), views=args.views, step=step, args=vars(args),
        protocol=f"{way}; {args.epochs} epochs, lr {args.lr:g}, {args.sampling} frames, "
        f"augmentation {args.augment}, flip {args.flip}; {args.views} views, mean of probabilities",
        data=str(args.val or root), init=args.init, checkpoint=f"{out}/last.pt")
    if RANK == 0:
        finished.write_text(json.dumps(results, indent=2) + "\n")
        with open(out / "log.jsonl", "a") as file:  # keeps what other views gave
            file.write(json.dumps(results) + "\n")
    show(results)


def show(results):
    """Logs the results of a finished run."""
    log(f"top-1 {results['top1']:.1%}, top-5 {results['top5']:.1%} of {results['videos']:,} videos,"
        f" {results['unreadable']} of them unreadable; {results['protocol']}\n"
        f"{results['checkpoint']} is complete; other --views or --val test it again")


if __name__ == "__main__":
    sys.exit(launch(main))
