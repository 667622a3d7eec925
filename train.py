"""Pretrain SIGMA: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                   toy set: render, pretrain, linear probe, k-NN
    torchrun --nproc_per_node=8 train.py --data k400 --root DIR        the paper's recipe
    python train.py --data videos/ --model small --epochs 100          your own videos

A run writes last.pt, log.jsonl, results.json and skipped.txt to its folder, --out. SIGTERM, SIGHUP,
SIGUSR1 and Ctrl-C save and stop it, a second signal after 3 s ends it at once; run the same command
again to resume. The loop is `fit`; what keeps a run alive is in extras/run.py, probe and k-NN in
extras/evaluate.py.
"""
import argparse
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import Clips, centre_crop, corner_crop, find_videos, normalise, seeded
from extras.evaluate import (NO_PROBE, PROTOCOL, evaluate, fingerprint, held_out, make_teacher,
                             probe_sets, start_folder, told)
from extras.run import (AMP, DEVICE, RANK, WORLD, Run, autocast, launch, log, one_first, saved_run,
                        set_up, write_json)
from extras.toy import make_toy
from sigma import (BASELINES, DINO_WIDTHS, SIGMA, SIZES, TARGETS, UserError, fill, read_checkpoint,
                   sizes_for, tube_mask)

# --- Recipes and flags ----------------------------------------------------------------------------

DEFAULTS = dict(frames=16, stride=4, size=224, ratio=0.9, epochs=800, least_steps=0, warmup=40,
                lr=1.5e-4, final_lr=1e-5, eps=0.05, gpu_batch=40, global_batch=None,
                workers=min(8, os.cpu_count()))
K400 = dict(global_batch=16 * 40)  # GPUs x clips on each, as published
RECIPES = {  # what a data set changes; ucf101 and hmdb51: the paper does not pretrain on them
    "k400": K400, "ucf101": K400, "hmdb51": K400,
    "ssv2": dict(stride=2, eps=0.03, gpu_batch=32, global_batch=16 * 32),
    "ssv2 small": dict(stride=2, epochs=2400, gpu_batch=16, global_batch=8 * 16),
    "toy": dict(frames=8, stride=1, size=32, ratio=0.75, epochs=16, warmup=1, lr=6e-3,
                prototypes=64, gpu_batch=64, global_batch=64, workers=0),
    "tiny": dict(tube=(4, 16, 16), size=64, ratio=0.75, epochs=60, least_steps=1600, warmup=7,
                 lr=3e-3, gpu_batch=32, global_batch=32),  # that model on any data but toy
}


def settings_for(data, model):
    """The recipe for a model on a data set."""
    key = "tiny" if model == "tiny" and data != "toy" else data
    sizes = {name: sizes_for(model)[name] if model in SIZES else None
             for name in ("tube", "prototypes")}
    return sizes | DEFAULTS | RECIPES.get(f"{key} {model}", RECIPES.get(key, {}))


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
                   "SIGMA-DINO with ViT-B or ViT-S; pixel: VideoMAE; l2: without prototypes and "
                   "Sinkhorn, which collapses"),
    "teacher": dict(metavar="FILE", help="a ViT's weights (default: DINO's, downloaded once)"),
    "init": dict(metavar="FILE", help="checkpoint, or folder of a run, whose weights are taken"),
    "out": dict(help="folder to write to (default: below out/)"),
    "epochs": dict(type=at_least(1), help="passes over the data (tiny: more, if the set is small)"),
    "batch-size": dict(type=at_least(1), help="clips per process and forward pass"),
    "accum": dict(type=at_least(1), help="batches per step (default: as many as make the recipe's "
                  "global batch); Sinkhorn still balances each batch alone"),
    "repeat": dict(type=at_least(1), default=1, help="clips from each decoding: loads faster"),
    "ratio": dict(type=at_least(0, float), help="share of tubes to hide, 0.75 to 0.95 is usual"),
    "prototypes": dict(type=at_least(2), help="K: fewer for small data, one for at least three "
                       "hidden tubes of a batch (default: 3000, tiny 128, toy 64)"),
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


def parser_with(description, *names, meanings={}):
    """An argument parser with the given entries of FLAGS; meanings: more, with other help texts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*names, *meanings):
        meaning = {"help": meanings[name]} if name in meanings else {}
        parser.add_argument(f"--{name}", **FLAGS[name] | meaning)
    return parser


def check_clip(frames, size, tube):
    """Raises UserError if clips can't be cut into tubes."""
    if any(side % step for side, step in zip((frames, size, size), tube)):
        raise UserError("--frames and --size must be multiples of the model's tubes, "
                        f"{tuple(tube)}: {frames} and {size} are not")


def parse(argv, *ideas):
    """The flags, with the recipe of --data and --model as defaults. ideas: what main was given in
    place of its own classes; they name the run."""
    parser = parser_with(__doc__, *FLAGS)
    known, _ = parser.parse_known_args(argv)
    model = known.model or ("tiny" if known.data == "toy" else "base")
    names = [getattr(idea, "__name__", type(idea).__name__).strip("<>")  # of a lambda
             for idea in ideas if idea not in (Clips, SIGMA, None)]
    name = "-".join([Path(known.data).resolve().stem, model, known.target, *names])
    settings = settings_for(known.data, model) | ({"least_steps": 0} if known.epochs else {})
    parser.set_defaults(model=model, out=f"out/{name}", ideas=names, **settings)
    args = parser.parse_args(argv)
    check_clip(args.frames, args.size, args.tube)
    if args.batch_size and args.batch_size % args.repeat:
        parser.error("--batch-size must be divisible by --repeat")
    places = (args.size // args.tube[1]) ** 2  # of a slice
    if not 0 < int(args.ratio * places) < places:
        parser.error(f"--ratio {args.ratio:g} hides all tubes of --size {args.size}, or none")
    if args.teacher and args.target not in DINO_WIDTHS:
        parser.error("--teacher only applies to --target dino or dino-s")
    return args


# --- Model, optimiser, schedule -------------------------------------------------------------------

def set_blocks(blocks, recompute, compiled=False):
    """recompute: a block's activations are computed again for the backward pass, not kept."""
    for block in blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()


def make_optimizer(model):
    """AdamW, without weight decay on biases, norms, other vectors, and the mask token."""
    weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in weights if p.ndim > 1 and name != "mask_token"]
    no_decay = [p for name, p in weights if p.ndim <= 1 or name == "mask_token"]
    groups = [dict(params=decay, weight_decay=0.05), dict(params=no_decay, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, warmup, peak, final):
    """Linear from 0 to peak in `warmup` steps, then a cosine down to final."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def split_batch(args, world, videos):
    """(clips per process and forward pass, batches accumulated) that make the recipe's global
    batch, 640 = 8 processes x 40 x 2; or, of a small set, all its clips. Flags override this."""
    fits = args.batch_size or args.gpu_batch
    global_batch = args.global_batch or fits * world * (args.accum or 1)
    per_process = max(1, min(global_batch, videos) // world)
    if args.batch_size:
        return args.batch_size, args.accum or max(1, round(per_process / args.batch_size))
    accum = args.accum or math.ceil(per_process / fits)
    return max(1, min(fits, per_process // accum) // args.repeat) * args.repeat, accum


# --- The loop -------------------------------------------------------------------------------------

def fit(args, model, optimizer, clips, loss_of, *, facts, saved=None, probe=None):
    """Trains to the last step, --max-steps or a signal; True if all steps are done.

    loss_of(network, batch): the loss of a Batch and detached scalars to log; network is the model,
    in DDP if there are several processes. facts: what else checkpoints hold: "sizes", the model's.
    saved: what saved_run returned. probe(title): figures for the log, every --eval-every epochs.
    """
    batch, accum = split_batch(args, WORLD, len(clips))
    per_step = batch * accum * WORLD  # clips
    epochs = max(args.epochs, math.ceil(args.least_steps * per_step / len(clips)))
    steps = max(1, epochs * len(clips) // per_step)
    warmup = int(min(args.warmup, epochs / 8) * len(clips) / per_step)
    peak, final = args.lr * per_step / 256, args.final_lr * per_step / 256
    log(f"clips     {args.frames} frames, {args.stride} apart, {args.size} x {args.size}; {WORLD} "
        f"processes x {batch} per forward pass x {accum} accumulated = {per_step} per step\n"
        f"schedule  {epochs} epochs = {steps:,} steps, {warmup:,} of them warmup; learning "
        f"rate {args.lr:g} x {per_step} / 256 = {peak:.3g}")
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=args.amp == "fp16")
    run = Run(args, model, optimizer, scaler, clips, batch=batch, per_step=per_step, steps=steps,
              collapse_from=warmup, facts=facts, saved=saved, probe=probe)
    network = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    for step in run.steps():  # between them run logs, saves, and minds signals
        rate = learning_rate(step, steps, warmup, peak, final)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1)
        totals = {}
        for part, samples in run.batches(accum):
            # What is random in a step follows from its number: runs resume exactly.
            torch.manual_seed(seeded(args.seed, step, part, RANK).initial_seed())
            network.require_backward_grad_sync = part == accum  # DDP's; until then they add up
            loss, stats = loss_of(network, samples)
            scaler.scale(loss / accum).backward()
            for name, value in {"loss": loss, **stats}.items():
                totals[name] = totals.get(name, 0) + value.detach() / accum
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.report(loss=totals.pop("loss"), grad_norm=norm, **totals)
    return run.complete


# --- Pretraining ----------------------------------------------------------------------------------

def prepare_model(args, saved, model_class=SIGMA, teacher_of=None):
    """The model on its device, the teacher of a DINO target or None, and what checkpoints say of
    them. Raises UserError if the saved run had another teacher."""
    teacher, facts = None, {"sizes": sizes_for(
        args.model, args.target, tube=args.tube, eps=args.eps, prototypes=args.prototypes)}
    if args.target in DINO_WIDTHS:
        teacher = (teacher_of or make_teacher)(args, args.tube).to(DEVICE)
        facts["sizes"]["target_dim"] = teacher.dim
        facts["teacher"] = fingerprint(teacher)
        if saved and saved.get("teacher", facts["teacher"]) != facts["teacher"]:
            raise UserError(f"the run in {args.out} has another teacher than the one you give: its "
                            "weights differ; resume it with its own, or choose another --out")
    torch.manual_seed(args.seed)
    model = model_class(**facts["sizes"]).to(DEVICE)
    if args.init and not saved:
        fill(model, read_checkpoint(args.init)["model"], args.init)
    set_blocks([*model.encoder.blocks, *model.decoder.blocks], args.model in ("large", "huge"),
               args.compile)
    log(f"model     {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"target {args.target}, on {DEVICE}, autocast {args.amp}")
    return model, teacher, facts


def prepare_clips(args, clips_class):
    """Clips to train on; and for probe and k-NN, if there are labels, some of these videos and
    held-out ones to test on, else None. Tells what was found, and what of it was skipped."""
    root, toy = locate(args.data, args.root), args.data == "toy"
    if toy:
        one_first(lambda: make_toy(root))
    videos, classes, skipped = find_videos(root)
    tests, lacking = held_out(videos, classes, root, args.val)
    options = dict(frames=args.frames, stride=args.stride, size=args.size, tube=args.tube,
                   seed=args.seed, cache={} if toy else None)
    clips = clips_class(videos, **options, ratio=args.ratio, repeat=args.repeat,
                        crop=centre_crop if toy else corner_crop)
    sets, share = probe_sets(videos, tests, lacking, **options)
    if args.eval_every and not sets:
        raise UserError(f"--eval-every: {NO_PROBE}")
    start_folder(args.out, [*skipped, *lacking])
    twice = len(videos) - len({path for path, _ in videos})
    log(f"data      {len(videos):,} videos{f', {twice:,} of them named before' if twice else ''}"
        f"{told(skipped)}\ntests     {len(tests):,} videos{told(lacking)}\n"
        f"          what was skipped is in {args.out}/skipped.txt")
    return clips, sets, share


def main(argv=None, clips_class=Clips, model_class=SIGMA, teacher_of=None):
    """Pretraining, from the flags to the results. For ideas of your own (extras/ideas.md):
    clips_class: other masks; model_class: other networks, targets, assignments; teacher_of(args,
    tube): any frozen module that has `dim` and gives tokens (B, N, dim) of a normalised video."""
    args = parse(argv, clips_class, model_class, teacher_of)
    set_up()
    out, finished = Path(args.out), Path(args.out, "results.json")
    saved = saved_run(args)
    if saved and finished.exists():
        return log(f"{finished.read_text(encoding='utf-8')}{out} is complete; to start anew choose "
                   "another --out, or remove it")
    model, teacher, facts = prepare_model(args, saved, model_class, teacher_of)
    clips, sets, share = prepare_clips(args, clips_class)
    if args.target not in BASELINES:
        tubes = tube_mask(1, clips.grid, args.ratio).sum() * WORLD * split_batch(
            args, WORLD, len(clips))[0]
        log(f"Sinkhorn  {tubes:,} hidden tubes per forward pass share {args.prototypes:,} "
            "prototypes; if fewer than three for each, raise --batch-size (not --accum)")

    def probe(title, encoder=model.encoder):
        return evaluate(encoder, sets, args.amp, args.workers, title, share)

    def loss_of(network, samples):
        video = normalise(samples.video, DEVICE)
        with autocast(args.amp):
            loss, stats = network(video, samples.mask, teacher(video) if teacher else None)
        return loss, {name: x for name, x in stats.items() if not name.endswith("_assignment")}

    if not fit(args, model, make_optimizer(model), clips, loss_of, facts=facts, saved=saved,
               probe=probe if sets else None):
        return
    results = {"checkpoint": f"{out}/last.pt", "tests": share,
               "protocol": PROTOCOL if sets else NO_PROBE}
    if args.data == "toy":
        torch.manual_seed(args.seed)
        results["untrained"] = probe("untrained", model_class(**facts["sizes"]).encoder.to(DEVICE))
    if sets:
        results["trained"] = probe("trained")
    write_json(finished, results)
    source = shlex.join(word for name in ("data", "root", "val") if vars(args)[name]
                        for word in (f"--{name}", vars(args)[name]))
    log(f"{results['protocol']}\nwrote {out}/last.pt, log.jsonl and results.json; next:\n"
        f"    python extras/pictures.py {out}\n"
        f"    python extras/features.py --init {out} {source}"
        + (f"\n    python extras/finetune.py --init {out} {source}" if sets else ""))


if __name__ == "__main__":
    sys.exit(launch(main))
