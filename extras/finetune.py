"""Fine-tune an encoder with labels, or train a linear probe on it (--freeze), and test it.

    python extras/finetune.py --init out/toy-tiny-mlp --data toy
    torchrun --nproc_per_node=8 extras/finetune.py --init out/ssv2-base-mlp --data ssv2 --root DIR
    python extras/finetune.py --freeze --init out/k400-base-mlp --data train.csv --val val.csv

Protocol, as published: AdamW (0.9, 0.999), weight decay 0.05, learning rate 1e-3 x batch / 256,
label smoothing 0.1, RandAugment, mixup 0.8, cutmix 1.0, random erasing 0.25; without --freeze also
rates x 0.75 per layer down, drop path 0.1. Clips have the frames, stride and size of the run that
--init names. Frames: dense (K400), evenly from a window of frames x stride, half of the clips
mirrored; or segments (SSv2), a random one of each of as many equal parts, none mirrored: left and
right are labels. Tested on clips x crops of each video, probabilities averaged; an unreadable video
counts as wrong, a missing one is named. --multi-label (Charades): lines `path 3 17 44` of a list
name any number of classes; sigmoids, binary cross-entropy without smoothing, mean average precision
over the test set's classes. A tiny encoder is trained as on the toy set, whatever the data: 10
epochs, lr 4e-3, segments, centre crops. The same command resumes; other --views or --val test anew.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import stochastic_depth

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import find_videos, normalise
from extras.augment import augment, label_table, limit, readable, test_clips, training_clips
from extras.evaluate import (accuracy, clip_of, collect, held_out, mean_average_precision, missing,
                             share_of, told)
from extras.run import DEVICE, autocast, launch, log, one_first, saved_run, set_up, write_json
from extras.toy import make_toy
from sigma import SIZES, build_model, load_encoder, read_checkpoint
from train import at_least, check_clip, fit, locate, parser_with, set_blocks, settings_for

# What changes in the recipe of pretraining: for all, then by data set, then for probes.
DEFAULTS = dict(epochs=100, lr=1e-3, final_lr=1e-6, warmup=5, gpu_batch=16, global_batch=None,
                views=[5, 3], sampling="dense", augment=True, repeat=1, least_steps=0,
                eval_every=0, keep_every=0)
K400 = dict(global_batch=8 * 4 * 8)  # GPUs x clips x accumulated batches, as published
RECIPES = {
    "k400": K400 | dict(views=[7, 3]), "ucf101": K400, "hmdb51": K400,
    "ssv2": dict(epochs=40, global_batch=8 * 4, views=[2, 3], sampling="segments"),
    "toy": dict(epochs=10, lr=4e-3, warmup=1, gpu_batch=64, global_batch=64, views=[1, 1],
                sampling="segments", augment=False)}
PROBES = {"ssv2": dict(epochs=30, global_batch=8 * 24 * 2, repeat=2), "toy": dict(epochs=5)}
HELP = {  # what flags of train.py mean here
    "model": "to train from scratch (default: tiny for toy, else base); --init brings its own",
    "epochs": "passes over the training videos (default: the recipe's)",
    "accum": "batches per step (default: as many as make the recipe's global batch)",
    "repeat": "clips from each decoding (default: 2 for a probe on ssv2, else 1)",
    "seed": "of new weights, order, crops and distortions"}


class Classifier(nn.Module):
    """An encoder, without its last norm, and a classifier: mean over tokens, LayerNorm, linear.
    drop_path: the probability, in training, that a clip skips attention or MLP of the last block;
    it grows linearly from 0 in the first."""

    def __init__(self, encoder, classes, drop_path=0.0):
        super().__init__()
        self.encoder, encoder.norm = encoder, nn.Identity()
        self.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(encoder.blocks):
            rate = drop_path * i / max(len(encoder.blocks) - 1, 1)
            for half in (block.attn, block.mlp):
                half.register_forward_hook(
                    lambda half, _, x, rate=rate: stochastic_depth(x, rate, "row", half.training))

    def forward(self, video):  # B 3 T H W, normalised
        return self.head(self.fc_norm(self.encoder(video).mean(dim=1)))  # B classes


def loss_of(network, batch, args, classes, table):
    """Cross-entropy of a Batch, with --multi-label of each class by itself; table: find_labelled's.
    A clip that stands in for videos that can't be read has no part in it; if all do, it is 0."""
    video, labels, some = readable(batch, args.repeat, table)
    if args.augment:
        video, labels = augment(video.to(DEVICE), labels, classes,
                                flip=args.flip and args.sampling == "dense")
    else:
        video = normalise(video, DEVICE)
    with autocast(args.amp):
        logits = network(video).float()
    loss = nn.BCEWithLogitsLoss() if args.multi_label else nn.CrossEntropyLoss(label_smoothing=0.1)
    # Times 0 the graph remains: without a backward pass DDP's other processes would wait for ever.
    return loss(logits, labels.to(DEVICE)) * some, {}


def make_parser():
    """The parser of the flags, without the defaults that recipes give: see `settings`."""
    parser = parser_with(__doc__, *"init data root val batch-size lr frames stride size".split(),
                         "amp", "workers", "timeout", "max-steps", "out", meanings=HELP)
    add = parser.add_argument
    add("--freeze", action="store_true", help="linear probe: train LayerNorm and head alone")
    add("--multi-label", action="store_true", help="several labels a line, as for Charades")
    add("--limit", type=at_least(1), help="number of training videos; single labels are balanced")
    add("--views", type=at_least(1), nargs=2, metavar=("CLIPS", "CROPS"), help="of a test video")
    add("--sampling", choices=["dense", "segments"], help="frames of a clip, see above")
    add("--no-augment", dest="augment", action="store_false", help="centre crops alone, as for toy")
    add("--no-flip", dest="flip", action="store_false", help="if classes tell left from right")
    parser.set_defaults(repeat=None, augment=None)
    return parser


def settings(flags, model, clip):
    """All settings of a run by name, for an encoder "tiny" to "huge" or "other": flags come first,
    then the clip (frames, stride and size) of the run that --init names, then the recipes."""
    key = "toy" if model == "tiny" else flags.data
    recipe = RECIPES.get(key, {}) | (PROBES.get(key, dict(epochs=30)) if flags.freeze else {})
    given = {name: value for name, value in vars(flags).items() if value is not None}
    return settings_for(flags.data, model) | DEFAULTS | recipe | clip | given | {"model": model}


def parse(argv):
    """The settings of the run, and the encoder that it starts from."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    torch.manual_seed(flags.seed)
    if flags.init:
        encoder, clip = load_encoder(flags.init), clip_of(read_checkpoint(flags.init))
    else:
        size = flags.model or ("tiny" if flags.data == "toy" else "base")
        encoder, clip = build_model(size, tube=settings_for(flags.data, size)["tube"]).encoder, {}
    model = next((name for name, row in SIZES.items() if row["dim"] == encoder.dim), "other")
    if flags.model not in (None, model):
        parser.error(f"--init holds a {model} encoder: leave out --model")
    out = f"out/{Path(flags.data).resolve().stem}-{'probe' if flags.freeze else 'finetune'}"
    args = argparse.Namespace(**vars(flags) | {"out": out} | settings(flags, model, clip))
    check_clip(args.frames, args.size, encoder.tube)
    if args.batch_size and args.batch_size % args.repeat:
        parser.error(f"--batch-size must be divisible by --repeat, {args.repeat}")
    return args, encoder


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
    with --multi-label the table that label_table makes, else None."""
    if args.data == "toy":
        one_first(lambda: make_toy(root))
    videos, names, skipped = find_videos(root, several=args.multi_label)
    tests, lacking = held_out(videos, names, root, args.val, required=True)
    log(f"data      {len(videos):,} videos to train on{told(skipped)}\n"
        f"tests     {len(tests):,} videos{told(lacking)}")
    table = None
    if args.multi_label:
        videos, tests, table = label_table(videos, tests)
    classes = 1 + max(label for _, label in videos + tests) if table is None else table.shape[1]
    videos = limit(videos, args.limit, args.seed) if args.limit else videos
    return videos, tests, lacking, classes, table


def test(args, model, tests, table, options, lacking=()):
    """What results.json holds of a model. lacking: what was named to test on but skipped."""
    clips = test_clips(tests, args.sampling, *args.views, **options)
    last = nn.Sigmoid() if args.multi_label else nn.Softmax(dim=1)
    scores, labels = collect(nn.Sequential(model, last).eval(), clips, args.amp, args.workers)
    if args.multi_label:
        scores[labels < 0] = -torch.inf  # ranked last
        results = {"mAP": mean_average_precision(scores, table[[label for _, label in tests]])}
    else:
        results = {f"top{k}": accuracy(scores, labels, k) for k in (1, 5)}
    lost, figures = missing(lacking), [f"{name} {x:.1%}" for name, x in results.items()]
    named = len(tests) + lost["missing"]
    flags = [f"{name} {vars(args)[name]}" for name in "freeze epochs lr sampling views".split()]
    return results | dict(
        videos=len(labels), named=named, **lost, unreadable=int((labels < 0).sum()),
        args=vars(args), summary=f"{', '.join(figures)} {share_of(len(labels), named)}"
        f"{told(lacking) if lacking else ''}; {', '.join(flags)}")


def make_model(args, encoder, classes, saved):
    """The Classifier on its device, a new one with the head of --init if it has as many classes."""
    model = Classifier(encoder, classes, 0.0 if args.freeze else 0.1).to(DEVICE)
    if args.init and not saved:
        head = {name: w for name, w in read_checkpoint(args.init)["model"].items()
                if name.startswith("fc_norm.") or name.startswith("head.") and len(w) == classes}
        model.load_state_dict(head, strict=False)
        log(f"weights   the encoder of {args.init}, {', '.join(head) or 'a new fc_norm'}"
            + (", a new head" if "head.weight" not in head else ""))
    encoder.requires_grad_(not args.freeze)
    set_blocks(encoder.blocks, recompute=encoder.dim >= 1024)  # memory before speed
    return model


def main(argv=None):
    """One run, from the flags to the results."""
    args, encoder = parse(argv)
    set_up()
    saved, finished = saved_run(args), Path(args.out, "results.json")
    if saved and finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        if [results["args"][name] for name in ("views", "val")] == [args.views, args.val]:
            return log(f"{results['summary']}; other --views or --val test it again")
    videos, tests, lacking, classes, table = find_labelled(args, locate(args.data, args.root))
    sizes = dict(dim=encoder.dim, depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads,
                 tube=encoder.tube, classes=classes)
    model = make_model(args, encoder, classes, saved)
    options = dict(frames=args.frames, stride=args.stride, size=args.size, tube=encoder.tube,
                   ratio=None, seed=args.seed, cache={} if args.data == "toy" else None)
    clips = training_clips(videos, args.sampling, args.augment, repeat=args.repeat, **options)
    finished.unlink(missing_ok=True)  # of other views, or of a run that was here before
    loss = partial(loss_of, args=args, classes=classes, table=table)
    if fit(args, model, make_optimizer(model), clips, loss, facts=dict(sizes=sizes), saved=saved):
        results = test(args, model, tests, table, options, lacking)
        write_json(finished, results)
        log(results["summary"])


if __name__ == "__main__":
    sys.exit(launch(main))
