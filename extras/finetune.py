"""Fine-tune an encoder with labels, or train a linear probe on it (--freeze), and test it.

    python extras/finetune.py --init out/toy-tiny-mlp --data toy
    torchrun --nproc_per_node=8 extras/finetune.py --init out/ssv2-base-mlp --data ssv2 --root DIR
    python extras/finetune.py --freeze --init out/k400-base-mlp --data train.csv --val val.csv

Protocol, as published: AdamW (0.9, 0.999), weight decay 0.05, learning rate 1e-3 x batch / 256,
label smoothing 0.1, RandAugment, mixup 0.8, cutmix 1.0, random erasing 0.25; with --freeze the
encoder stays as it is, without it rates are x 0.75 per layer down and drop path is 0.1. Clips have
the frames, stride and size of the run that --init names. Which frames: dense (K400), evenly from a
window of frames x stride, half of them mirrored (unless --no-flip); or segments (SSv2), a random
one of each of as many equal parts, none mirrored: left and right are labels. Tested on clips x
crops of each video (--views), probabilities averaged; a video that can't be read counts as wrong,
one that is missing is counted and named.
--multi-label (Charades): a list's lines `path 3 17 44` name any number of classes; sigmoids, binary
cross-entropy without smoothing, mean average precision over the classes that the test set has.
Without --init it trains from scratch. Run the same command again to resume; other --views or --val
test a finished run once more.
"""
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import RandomResizedCrop, v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import Clips, centre_crop, find_videos, normalise, seeded
from extras.evaluate import (accuracy, clip_of, collect, held_out, mean_average_precision,
                             share_of, told)
from extras.run import DEVICE, autocast, launch, log, one_first, saved_run, set_up, write_json
from extras.toy import make_toy
from sigma import IMAGENET_MEAN, IMAGENET_STD, SIZES, build_model, load_encoder, read_checkpoint
from train import (at_least, check_clip, fit, locate, parser_with, set_blocks,
                   settings_for)

# What changes in the recipe of pretraining: for all, then by data set, then for probes.
DEFAULTS = dict(epochs=100, lr=1e-3, final_lr=1e-6, warmup=5, gpu_batch=16, global_batch=None,
                views=[5, 3], sampling="dense", augment=True, repeat=1)
K400 = dict(global_batch=8 * 4 * 8)  # GPUs x clips x accumulated batches, as published
RECIPES = {
    "k400": K400 | dict(views=[7, 3]), "ucf101": K400, "hmdb51": K400,
    "ssv2": dict(epochs=40, global_batch=8 * 4, views=[2, 3], sampling="segments"),
    "toy": dict(epochs=10, lr=4e-3, warmup=1, gpu_batch=64, global_batch=64, views=[1, 1],
                sampling="segments", augment=False)}
PROBES = {"ssv2": dict(epochs=30, global_batch=8 * 24 * 2, repeat=2), "toy": dict(epochs=5)}


class Classifier(nn.Module):
    """An encoder, without its last norm, with a classifier: mean over all tokens, LayerNorm, linear
    layer near 0 at first. drop_path: how often, in training, a clip skips a half of the last block;
    it grows linearly from 0 in the first."""

    def __init__(self, encoder, classes, drop_path=0.0):
        super().__init__()
        self.encoder, encoder.norm = encoder, nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        nn.init.zeros_(self.head.bias)
        rates = [drop_path * i / max(len(encoder.blocks) - 1, 1)
                 for i in range(len(encoder.blocks))]
        for block, rate in zip(encoder.blocks, rates):
            for half in (block.attn, block.mlp):
                half.register_forward_hook(
                    lambda half, _, x, rate=rate: stochastic_depth(x, rate, "row", half.training))

    def forward(self, video):  # B 3 T H W, normalised
        return self.head(self.fc_norm(self.encoder(video).mean(dim=1)))  # B classes


def dense_frames(n, frames, stride, generator=None):
    """Evenly over a window of frames * stride at a random place; of a shorter video a frame for
    each stride, then its last."""
    window, number = min(n, frames * stride), min(n // stride, frames)
    start = int(torch.randint(max(n - window, 1), (1,), generator=generator))
    step = window / max(number - 1, 1)
    chosen = [min(int(start + i * step), start + window - 1) for i in range(number)]
    return chosen + [n - 1] * (frames - number)


def segment_frames(n, frames, stride, generator=None):
    """A random frame of each of `frames` equal parts of the video."""
    part = n // frames
    if part == 0:
        return [i * n // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, (1,), generator=generator)) for i in range(frames)]


def spread(number, free):
    """Starts of `number` windows, evenly over `free` positions; a single one is in the middle."""
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
    """`repeat` views of each video: the clips of `choose`, their short side resized to `size`, and
    crops evenly along the long one. tries=1: an unreadable video is not replaced."""

    def read(self, path, generator):
        clips, views = self.frames_of(path, lambda n: self.choose(n, self.frames, self.stride)), []
        for clip in clips:
            clip = v2.functional.resize(clip, [self.size], antialias=False)  # as published
            axis = 2 if clip.shape[2] > clip.shape[3] else 3
            starts = spread(self.repeat // len(clips), clip.shape[axis] - self.size)
            views += [clip.narrow(axis, i, self.size).transpose(0, 1) for i in starts]  # 3 T S S
        return torch.stack(views), None  # nothing is masked


def random_crop(height, width, generator):
    """A random box (top, left, height, width) of 8 to 100% of the area, sides 3:4 to 4:3."""
    torch.manual_seed(int(torch.randint(2 ** 62, (1,), generator=generator)))  # torchvision's
    return RandomResizedCrop.get_params(torch.empty(1, height, width), (0.08, 1), (3 / 4, 4 / 3))


def augment(video, labels, classes, flip):
    """Clips (B, 3, T, S, S) uint8, labels on the CPU, (B,) or 0 and 1 (B, classes) -> normalised
    clips, class shares (B, classes). Flip, RandAugment (four operations, each with probability 1/2,
    strength 7 +- 0.5 of 10) and the erased box are shared by all frames of a clip, the noise in
    the box is each frame's own; mixup or cutmix joins pairs of clips."""
    operation = v2.RandomApply([v2.RandomChoice([
        v2.RandAugment(1, strength, 101, fill=[124, 116, 104]) for strength in (64, 70, 76)])], 0.5)
    distort = v2.Compose([
        v2.RandomHorizontalFlip(0.5 if flip else 0), *[operation] * 4,
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.RandomErasing(0.25, value=math.nan)])  # one box; what fills it comes below
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                           v2.CutMix(alpha=1.0, num_classes=classes)])
    video = torch.stack([distort(clip) for clip in video.transpose(1, 2)])  # B T 3 S S
    video = torch.where(video.isnan(), torch.randn_like(video), video)
    mixed, shares = mix(video.flatten(1, 2), labels)
    return mixed.view_as(video).transpose(1, 2), shares


def loss_of(network, batch, args, classes, table):
    """Cross-entropy of a Batch, with --multi-label of each class by itself; table: find_labelled's.
    A clip that stands in for videos that can't be read has no part in it; if all do, it is 0."""
    video, labels = batch.video, batch.labels.repeat_interleave(args.repeat)
    readable = labels >= 0
    if 0 < readable.sum() < len(readable):
        video, labels = video[readable], labels[readable]
    labels = labels.clamp(min=0) if table is None else table[labels.clamp(min=0)]
    if args.augment:
        video, labels = augment(video.to(DEVICE), labels, classes,
                                flip=args.flip and args.sampling == "dense")
    else:
        video = normalise(video, DEVICE)
    with autocast(args.amp):
        logits = network(video).float()
    loss = nn.BCEWithLogitsLoss() if args.multi_label else nn.CrossEntropyLoss(label_smoothing=0.1)
    # Times 0 there is a graph all the same, or other processes would wait for ever.
    return loss(logits, labels.to(DEVICE)) * readable.any(), {}


def finetuning_settings(data, model, freeze=False, clip=None):
    """The recipe for an encoder, "tiny" to "huge" or "other", on a data set. clip: frames, stride
    and size of the clips that it was trained on, which come before a recipe's."""
    key = "toy" if model == "tiny" else data
    probe = PROBES.get(key, dict(epochs=30)) if freeze else {}
    return settings_for(data, model) | DEFAULTS | RECIPES.get(key, {}) | probe | (clip or {})


def make_parser():
    """The parser of the flags; what they mean here, where it is not what train.py says."""
    parser = parser_with(__doc__, *"init data root val epochs batch-size lr frames stride size amp "
                         "workers timeout seed max-steps out".split())
    add = parser.add_argument
    add("--model", choices=SIZES, help="to train from scratch: tiny (default for toy) to huge "
        "(default: base); --init brings its own")
    add("--repeat", type=at_least(1), help="clips from each decoding (default: 2 for a probe on "
        "ssv2, else 1)")
    add("--accum", type=at_least(1), help="batches per step (default: as many as make the "
        "recipe's global batch)")
    add("--freeze", action="store_true", help="linear probe: train LayerNorm and head alone")
    add("--multi-label", action="store_true", help="several labels a line, as for Charades")
    add("--limit", type=at_least(1), help="number of training videos, balanced over classes (with "
        "--multi-label at random)")
    add("--views", type=at_least(1), nargs=2, metavar=("CLIPS", "CROPS"), help="of a test video")
    add("--sampling", choices=["dense", "segments"], help="frames of a clip, see above")
    add("--no-augment", dest="augment", action="store_false", help="centre crops alone, as for toy")
    add("--no-flip", dest="flip", action="store_false", help="if classes tell left from right")
    return parser


def parse(argv):
    """The flags, with the recipe as defaults, and the encoder of --init or a new one."""
    parser = make_parser()
    known, _ = parser.parse_known_args(argv)
    torch.manual_seed(known.seed)
    if known.init:
        encoder, clip = load_encoder(known.init), clip_of(read_checkpoint(known.init))
    else:
        size = known.model or ("tiny" if known.data == "toy" else "base")
        encoder, clip = build_model(size, tube=settings_for(known.data, size)["tube"]).encoder, {}
    model = {row["dim"]: name for name, row in SIZES.items()}.get(encoder.dim, "other")
    task = "probe" if known.freeze else "finetune"
    parser.set_defaults(**finetuning_settings(known.data, model, known.freeze, clip) | dict(
        model=model, least_steps=0, eval_every=0, keep_every=0,
        out=f"out/{Path(known.data).resolve().stem}-{task}"))
    args = parser.parse_args(argv)
    check_clip(args.frames, args.size, encoder.tube)
    if args.batch_size and args.batch_size % args.repeat:
        parser.error(f"--batch-size must be divisible by --repeat, {args.repeat}")
    if args.model != model:
        parser.error(f"--init holds a {model} encoder: leave out --model")
    return args, encoder


def limit(videos, number, seed):
    """A random choice of `number` videos; classes have equal shares, or differ by one video."""
    turn, seen = {}, {}
    for i in torch.randperm(len(videos), generator=seeded(seed)).tolist():
        label = videos[i][1]
        turn[i] = seen[label] = seen.get(label, 0) + 1
    return [videos[i] for i in sorted(turn, key=turn.get)[:number]]


def make_optimizer(model):
    """AdamW; each layer's rate is 0.75 times the next one's ("scale"); no decay on vectors."""
    layers = [nn.ModuleList([model.fc_norm, model.head]), *reversed(model.encoder.blocks),
              model.encoder.patch_embed]
    groups = [dict(params=[p for p in layer.parameters() if (p.ndim > 1) == matrices],
                   scale=0.75 ** below, weight_decay=0.05 if matrices else 0.0)
              for below, layer in enumerate(layers) for matrices in (True, False)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def find_labelled(args, root):
    """Videos to train and to test on, what was skipped of the latter, the number of classes, and
    None; or, with --multi-label, a table (videos, classes) of 0 and 1, and the label of a video is
    its row in it."""
    videos, names, skipped = find_videos(root, several=args.multi_label)
    tests, lacking = held_out(videos, names, root, args.val, required=True)
    log(f"data      {len(videos):,} videos to train on{told(skipped)}\n"
        f"tests     {len(tests):,} videos{told(lacking)}")
    labels = [label if isinstance(label, tuple) else (label,) for _, label in videos + tests]
    classes, table = 1 + max(max(label, default=0) for label in labels), None
    if args.multi_label:
        table = torch.zeros(len(labels), classes)
        for row, label in zip(table, labels):
            row[list(label)] = 1
        rows = [(path, i) for i, (path, _) in enumerate(videos + tests)]
        videos, tests = rows[:len(videos)], rows[len(videos):]
    videos = limit(videos, args.limit, args.seed) if args.limit else videos
    return videos, tests, lacking, classes, table


def test(args, model, tests, table, options, lacking=()):
    """What the model gets right of the test videos, as results.json holds it. lacking: what was
    named to test on but skipped."""
    views = Views(tests, **options, repeat=args.views[0] * args.views[1], tries=1,
                  choose=partial(view_frames, views=args.views[0], sampling=args.sampling))
    last = nn.Sigmoid() if args.multi_label else nn.Softmax(dim=1)
    scores, labels = collect(nn.Sequential(model, last).eval(), views, args.amp, args.workers)
    if args.multi_label:
        scores[labels < 0] = -torch.inf  # ranked last
        results = {"mAP": mean_average_precision(scores, table[[label for _, label in tests]])}
    else:
        results = {f"top{k}": accuracy(scores, labels, k) for k in (1, 5)}
    figures = [f"{name} {x:.1%}" for name, x in results.items()]
    flags = [f"{name} {vars(args)[name]}" for name in "freeze epochs lr sampling views".split()]
    named = len(tests) + len(lacking)
    return results | dict(
        videos=len(labels), named=named, missing=len(lacking),
        first_missing=next(iter(lacking), None), unreadable=int((labels < 0).sum()),
        args=vars(args), summary=f"{', '.join(figures)} {share_of(len(labels), named)}"
        f"{told(lacking) if lacking else ''}; {', '.join(flags)}")


def make_model(args, encoder, classes, saved):
    """The Classifier on its device; a new one takes the head of --init if that has as many
    classes."""
    model = Classifier(encoder, classes, 0.0 if args.freeze else 0.1).to(DEVICE)
    if args.init and not saved:
        head = {name: w for name, w in read_checkpoint(args.init)["model"].items()
                if name.startswith("fc_norm.") or name.startswith("head.") and len(w) == classes}
        model.load_state_dict(head, strict=False)
        log(f"weights   the encoder of {args.init}, {', '.join(head) or 'a new head'}")
    encoder.requires_grad_(not args.freeze)
    set_blocks(encoder.blocks, recompute=encoder.dim >= 1024)  # memory before speed
    return model


def main(argv=None):
    """One run, from the flags to the results."""
    args, encoder = parse(argv)
    set_up()
    root, toy = locate(args.data, args.root), args.data == "toy"
    saved, finished = saved_run(args), Path(args.out, "results.json")
    if saved and finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        if [results["args"][name] for name in ("views", "val")] == [args.views, args.val]:
            return log(f"{results['summary']}; other --views or --val test it again")
    if toy:
        one_first(lambda: make_toy(root))
    videos, tests, lacking, classes, table = find_labelled(args, root)
    sizes = dict(dim=encoder.dim, depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads,
                 tube=encoder.tube, classes=classes)
    model = make_model(args, encoder, classes, saved)
    options = dict(frames=args.frames, stride=args.stride, size=args.size, tube=encoder.tube,
                   ratio=None, seed=args.seed, cache={} if toy else None)
    clips = Clips(videos, **options, repeat=args.repeat,
                  crop=random_crop if args.augment else centre_crop,
                  choose=dense_frames if args.sampling == "dense" else segment_frames)
    finished.unlink(missing_ok=True)  # of other views, or of a run that was here before
    loss = partial(loss_of, args=args, classes=classes, table=table)
    if fit(args, model, make_optimizer(model), clips, loss, facts=dict(sizes=sizes), saved=saved):
        results = test(args, model, tests, table, options, lacking)
        write_json(finished, results)
        log(results["summary"])


if __name__ == "__main__":
    sys.exit(launch(main))
