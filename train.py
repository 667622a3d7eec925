"""Pretrain SIGMA and evaluate it: on the toy set in minutes, on real videos, on one process or many.

    python train.py                                             toy set: rendered, trained on, and judged by a probe
    python train.py --target pixel                              the same with VideoMAE's target, to compare
    torchrun --nproc_per_node=8 train.py --data k400 --root DIR           the paper's recipe (sets and layouts: data.py)
    python train.py --data videos/ --model small --epochs 100   a folder or list of your own videos
    python train.py --resume out/toy-tiny-mlp                   go on where a run stopped, with its own settings
    python train.py --bench --model small --batch-size 2        train nothing: how fast are loader and step here?
    python train.py --task finetune --init out/toy-tiny-mlp     all weights, with labels; then test (also: probe, knn)
    python train.py --task features --init out/toy-tiny-mlp     pooled features of all videos, in one file
    python train.py --task show --init out/toy-tiny-mlp         pictures: masks, prototypes, cluster maps, components
    python train.py --task export --init out/toy-tiny-mlp --format hf --out FILE             weights for other programs

A run writes two checkpoints, log.jsonl, results.json and pictures to out/<run>/. SIGTERM, SIGUSR1, Ctrl-C save first.
"""
import argparse
import ctypes
import json
import math
import os
import re
import resource
import signal
import socket
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
from torchvision import tv_tensors
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

from data import RETRIES, SETS, SPLITS, TASKS, VIDEO, Clips, Order, UserError, Views, centre_crop, dense_frames
from data import find_videos, kill_workers, loader, make_toy, normalise, recipe, scaled, segment_frames
from data import tuning_augmentation, write_video
from sigma import DINO, ENCODER, FOLDER_FILES, SIGMA, SIZES, TARGETS, Classifier, Encoder, Teacher, WeightsError
from sigma import download_dino, fill, load_teacher, options, read_file, read_weights, sinkhorn, sizes_of, take_tubes
from sigma import to_authors, to_hugging_face, tube_mask

COMMON = dict(task="pretrain", root=None, val=None, limit=0, target="mlp", accum=None, repeat=1, seed=0, amp=None,
              eval_every=0, compile=False, split="train", tokens=False, classes=None, source=None, sizes=None,
              teacher=None, format=None)
RECOMPUTE = ("large", "huge")                                   # models whose activations are computed again, not kept
BETAS, FINAL_LR, WEIGHT_DECAY = (0.9, 0.95), 1e-5, 0.05         # AdamW's; rates are for a global batch of 256 clips
LABELLED_BETAS, LABELLED_FINAL_LR, LAYER_DECAY, DROP_PATH, SMOOTHING = (0.9, 0.999), 1e-6, 0.75, 0.1, 0.1
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600              # a log line every 10 steps, or sooner if slow
TOLERATED = 5                                                   # unreadable videos in a set of which 1% would be fewer
EVAL_CLIPS = 10_000                                             # of each split, for the probe and k-NN while training
BENCH_SECONDS = 10                                              # in which --bench reads videos
CACHE = {}                                                      # the toy set's decoded videos
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
            ("task", ["pretrain", *TASKS, "knn", "features", "show", "export"], "what to do (default: pretrain)"),
            ("data", str, "k400, ssv2, ucf101, hmdb51, toy, a folder of videos, or a list file (default: toy)"),
            ("root", str, "the named set's folder (default: data/<name>)"),
            ("val", str, "videos to test on, a folder or list (default: the val or test split of --data)"),
            ("limit", natural, "use so many labelled training videos, the same number of each class (default: all)"),
            ("model", list(SIZES), "size of the networks (default: that of --init, else tiny for toy, else base)"),
            ("target", list(TARGETS), "mlp: SIGMA-MLP; dino, dino-s: SIGMA-DINO with ViT-B or ViT-S; pixel: the "
             "VideoMAE baseline (default: that of --init, else mlp)"),
            ("teacher", str, "file of DINO's weights (default: downloaded once)"),
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
            ("views", str, "for testing: clips x crops of each video, like 5x3 (default: the set's; knn: 1x1)"),
            ("sampling", ["dense", "segments"], "frames of labelled clips: stride apart, or from all of the video"),
            ("flip", ["on", "off"], "mirror labelled clips at random: off where classes tell left from right"),
            ("augment", ["on", "off"], "off: labelled clips as in pretraining, not mixed, erased or distorted"),
            ("split", list(SPLITS), "of --data, for features and show (default: train)"),
            ("tokens", None, "features: of each tube instead of each video"),
            ("workers", natural, "loader processes for each training process"),
            ("seed", natural, "of weights, shuffle, crops and masks (default: 0)"),
            ("out", str, "folder of the run (default: out/<data>-<model>-<target>)"),
            ("resume", str, "folder or checkpoint of a run: go on exactly where it stopped"),
            ("init", str, "folder or checkpoint of a run, or a published one: take its weights"),
            ("format", ["hf", "authors"], "for export: names and layout of Hugging Face, or of the authors' code"),
            ("eval_every", natural, "epochs between accuracies on the validation split (default: 0, never)"),
            ("max_steps", positive, "stop and save after this many steps of the schedule"),
            ("compile", None, "compile the transformer blocks: slow to start, then faster"),
            ("bench", None, "measure loader, step and Sinkhorn here; train nothing")):
        if name in VIDEO and "default" not in text:
            text += f" (default: {VIDEO[name]}; toy and tiny: {toy.get(name, VIDEO[name])}; some sets have their own)"
        kind = dict(action="store_true") if kind is None else {"choices" if isinstance(kind, list) else "type": kind}
        place = either if name in ("resume", "init") else parser
        place.add_argument("--" + name.replace("_", "-"), help=text, **kind)
    return vars(parser.parse_args(argv))


def configure(given):
    """The run's settings, a plain dictionary: recipe, then flags; and the checkpoint that it starts from, or None."""
    checkpoint, once, task = None, ("resume", "init", "max_steps", "bench"), given.get("task", "pretrain")
    if "resume" in given or "init" in given:
        path, checkpoint = read_checkpoint(given.get("resume") or given["init"], "resume" in given)
        sizes, before = sizes_of(checkpoint["model"], checkpoint), checkpoint.get("config") or {}
    if "resume" in given:
        config = COMMON | VIDEO | dict(sizes=sizes) | before | dict(out=str(path.parent), accum=None)
        free = {"data", "root", "val", "views", "batch_size", "accum", "workers", "out", "eval_every", "compile",
                "teacher"}
        for name in given.keys() - free - set(once):
            if given[name] != config[name]:
                raise UserError(f"--resume keeps the run's own --{name} {config[name]}, found {given[name]}: leave it "
                                "out, or start a new run from the weights with --init")
    else:
        for name in {"features": ["init"], "show": ["init"], "export": ["init", "format", "out"]}.get(task, []):
            if name not in given:
                raise UserError(f"expected --{name} with --task {task}, found none: give it, see --help")
        model, target = given.get("model"), given.get("target", "mlp")
        if checkpoint:
            shape = f"{sizes['dim']} wide, {sizes['depth']} blocks"
            model = next((name for name, size in SIZES.items() if all(size[part] == sizes[part] for part in
                                                                      ("dim", "depth"))), shape.replace(" ", ""))
            target = sizes.get("target", target)
            for name, value in (("model", model), ("target", target)):
                if given.get(name, value) != value:
                    raise UserError(f"expected --{name} {value} or none with the weights in {path} ({shape}), found "
                                    f"{given[name]}: leave it out, or give other weights")
            if task in ("pretrain", "show") and "target" not in sizes:
                raise UserError(f"expected a whole pretraining network with --task {task}, found an encoder "
                                f"{'and a classifier' if 'classes' in sizes else 'alone'} in {path}: give another file")
        full = "bench" in given and model not in (None, "tiny")
        data = given.get("data", "k400" if full else "toy")
        model = model or ("tiny" if data == "toy" else "base")
        config = COMMON | recipe(data, model, task) | dict(
            data=data, model=model, target=target, source=str(path) if checkpoint else "untrained",
            sizes=sizes if checkpoint else options(model, target))
        if task == "export":
            config |= {name: before.get(name, VIDEO[name]) for name in ("frames", "size")}
    config |= {name: value for name, value in given.items() if name not in once}
    name = f"{Path(config['data']).resolve().stem}-{config['model']}-{config['target']}"
    config = {"out": f"out/{name}" + f"-{config['task']}" * (config["task"] != "pretrain")} | config
    c, out, task = Namespace(**config), Path(config["out"]), config["task"]
    fresh = "bench" not in given and not ("resume" in given and out.samefile(path.parent))
    for wrong, message in (
            (task == "export" and (out.exists() or out.suffix not in (".bin", ".pt", ".pth")),
             f"the name of a new file, .bin, .pt or .pth, as --out, found {out}: choose another"),
            (fresh and any((out / name).exists() for name in CHECKPOINTS),
             f"a new folder for a new run, found a checkpoint in {out}: --resume {out}, or choose another --out"),
            (out.exists() and not out.is_dir(), f"a folder as --out, found the file {out}: choose another name"),
            (c.root and c.data not in SETS,
             f"--root with --data {', '.join(SETS)}, found it with {c.data}: leave it out"),
            (c.teacher and c.target not in DINO,
             f"--target dino or dino-s with --teacher, found {c.target}: leave one out"),
            (not re.fullmatch(r"[1-9]\d?x[1-9]", c.views),
             f"--views as clips x crops, like 5x3, found {c.views}: give two numbers"),
            (c.flip == "on" and c.data == "ssv2",
             "--flip off with ssv2, found on: left and right are labels there"),
            ("bench" in given and WORLD > 1,
             f"--bench in one process, found {WORLD}: run it without torchrun"),
            ("bench" in given and task != "pretrain",
             f"--bench with --task pretrain, found {task}: leave one of them out")):
        if wrong:
            raise UserError(f"expected {message}")
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
    """The model of settings c, on the device: SIGMA, or for c.classes the encoder with a classifier, or the encoder."""
    torch.manual_seed(c.seed)
    if c.task in ("pretrain", "show"):
        model = SIGMA(**c.sizes | (dict(eps=c.eps) if c.eps else {}))
    else:
        model = nn.ModuleDict({"encoder": Encoder(**{name: c.sizes[name] for name in ENCODER if name in c.sizes})})
        if c.classes:
            model = Classifier(model.encoder, c.classes, DROP_PATH if c.task == "finetune" else 0)
            model.encoder.requires_grad_(c.task != "probe")
    for part in (module for name, module in model.named_children() if name in ("encoder", "decoder")):
        part.recompute = c.model in RECOMPUTE
        if c.compile:                       # one block at a time: they are alike, so one compilation serves them all
            for block in part.blocks:
                block.compile()
    return model.to(device)


def make_teacher(c, device, load=True, width_is_free=False):
    """The frozen teacher of DINO's targets, else None. load: False for random weights, to time it. width_is_free: makes
    new prototypes as wide as --teacher. One process of each machine downloads; the others wait. Raises UserError."""
    if c.target not in DINO or c.task not in ("pretrain", "show"):
        return None
    grid = [size // step for size, step in zip((c.frames, c.size, c.size), c.sizes["tube"])]
    width, url, _ = DINO[c.target]
    if not load:
        vit = VisionTransformer(image_size=16 * grid[1], patch_size=16, num_layers=12, num_heads=width // 64,
                                hidden_dim=width, mlp_dim=4 * width)
        teacher = Teacher(vit, c.sizes["tube"])
    elif c.teacher:
        teacher = load_teacher(read_file(c.teacher)[0], grid, c.sizes["tube"])
    else:
        socket.setdefaulttimeout(30)                              # a network that swallows requests must not stop a run
        for turn in ("first", "others"):                        # the others find in the cache what the first one loaded
            problem = ""
            try:
                if turn == ("first" if os.environ.get("LOCAL_RANK", "0") == "0" else "others"):
                    weights = download_dino(c.target)
            except (OSError, RuntimeError) as error:
                problem = str(error)
            if problem := max(gather(problem)):
                raise UserError(f"expected DINO's weights from {url}, found {problem}: download that file elsewhere "
                                "and say where it is with --teacher FILE")
        teacher = load_teacher(weights, grid, c.sizes["tube"])
    others = {name for name, (theirs, *_) in DINO.items() if theirs == teacher.dim and name != c.target}
    if others or teacher.dim != c.sizes["target_dim"] and not width_is_free:
        raise UserError(f"expected a teacher {c.sizes['target_dim']} wide for --target {c.target}, found {teacher.dim} "
                        f"in {c.teacher}: give another --teacher or --target")
    c.sizes["target_dim"] = teacher.dim
    return teacher.to(device)


def layer_scale(name, depth):
    """What a parameter's learning rate is multiplied with in fine-tuning: 1 for the head, then less from the last
    block down to the tube embedding (layer-wise decay)."""
    layer = 0 if "patch_embed" in name else int(name.split("blocks.")[1].split(".")[0]) + 1 if "blocks." in name \
        else depth + 1
    return LAYER_DECAY ** (depth + 1 - layer)


def make_optimizer(model, task="pretrain"):
    """AdamW without weight decay on biases, norms and other vectors. The learning rate is set before each step, to
    that of the schedule times the group's scale."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = layer_scale(name, len(model.encoder.blocks)) if task == "finetune" else 1.0
            groups.setdefault((scale, p.ndim > 1), []).append(p)
    return torch.optim.AdamW([dict(params=params, scale=scale, weight_decay=WEIGHT_DECAY if matrices else 0.0)
                              for (scale, matrices), params in groups.items()],
                             lr=0.0, betas=LABELLED_BETAS if task in TASKS else BETAS, fused=True)


def make_step(parallel, c, device, teacher=None):
    """What training does with a batch (video uint8, mask, label of each video): the loss and its statistics."""
    if c.task not in TASKS:
        def pretrain(video, mask, label):
            video = normalise(video, device)
            return parallel(video, mask, teacher(video) if teacher else None)

        return pretrain
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=c.classes), v2.CutMix(alpha=1.0, num_classes=c.classes)])
    erase = v2.RandomErasing(p=0.25, value="random")

    def step(video, mask, label):
        video, label = normalise(video, device), label.clamp(min=0).to(device)           # -1: a clip that is all black
        target = label.repeat_interleave(len(video) // len(label))
        if c.augment == "on":
            video = torch.stack([erase(clip.transpose(0, 1)).transpose(0, 1) for clip in video])
            video, target = mix(tv_tensors.Video(video), target)                            # target: B classes, soft
        logits = parallel(video.as_subclass(torch.Tensor)).float()
        most = target.argmax(dim=1) if target.ndim > 1 else target
        return (F.cross_entropy(logits, target, label_smoothing=SMOOTHING),
                {"train_accuracy": (logits.argmax(dim=1) == most).float().mean()})

    return step


def learning_rate(step, steps, warmup, peak, final):
    """Linear from 0 to peak in `warmup` steps, then a cosine down to final."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def find(c, split):
    """The videos of a split as settings c choose them. For val a set may have test, and --limit is for training."""
    if split == "val" and c.val:
        return find_videos(c.val)
    if split != "val":
        found = find_videos(c.data, split, c.root)
        return found.limit(c.limit, c.seed) if c.limit and split == "train" else found
    reasons = []
    for name in ("val", "test"):
        try:
            return find_videos(c.data, name, c.root)
        except UserError as error:
            reasons.append(error)
    raise UserError(f"{reasons[0]}; or say with --val which folder or list to test on")


def make_clips(c, split="train", views=None, most=None, **options):
    """The clips of settings c: for training, or with `views`, like "5x3", for testing. most: take up to so many videos,
    spread over the set. The first rank finds the videos and tells the others; all raise its UserError. The toy set is
    not cropped, and stays in memory once it is decoded."""
    found = [None]
    if RANK == 0:
        try:
            found = [find(c, split)]
        except UserError as error:
            found = [error]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    videos = found[0]
    if isinstance(videos, UserError):
        raise videos
    if most:
        videos = videos.take([i for _, i in sample(videos.paths, most)])
    options = {name: getattr(c, name) for name in ("frames", "stride", "size", "ratio", "seed")} | dict(
        tube=c.sizes["tube"], cache=CACHE if c.data == "toy" else None) | options
    if views:
        times, crops = map(int, views.split("x"))
        return Views(videos, times=times, crops=crops, sampling=c.sampling, **options)
    if c.data == "toy":
        options["crop"] = centre_crop
    if c.task in TASKS:
        options["choose"] = segment_frames if c.sampling == "segments" else dense_frames
        options["augment"] = tuning_augmentation(c.size, c.flip == "on") if c.augment == "on" else None
    return Clips(videos, **dict(repeat=c.repeat) | options)


def check_labels(c, *sets):
    """Sets c.classes. Raises UserError unless each video of the sets of clips has a label."""
    for clips in sets:
        without = [path for path, label in zip(clips.videos.paths, clips.videos.labels) if label < 0]
        if without:
            raise UserError(f"expected a label for each video with --task {c.task}, found {len(without):,} without, "
                            f"first {without[0]}: give class folders or lines `path label`")
    c.classes = max(SETS.get(c.data, {}).get("classes", 0), *(1 + max(clips.videos.labels) for clips in sets))


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


def make_judge(c, model, device):
    """What measures accuracy while training: a function, or None where it isn't wanted or can't be."""
    if not c.eval_every and not (c.data == "toy" and c.task == "pretrain"):
        return None
    if c.task in TASKS:
        return lambda views=make_clips(c, "val", "1x1", EVAL_CLIPS): test(model, views, c, device)
    try:
        sets = [make_clips(c, split, "1x1", EVAL_CLIPS) for split in ("train", "val")]
    except UserError as error:
        return say(f"accuracy   not while training: {error}")
    if not all(clips.videos.classes for clips in sets):
        return say("accuracy   not without labels")
    return lambda encoder=model.encoder: evaluate(encoder, *sets, c, device)


def endless(batches, order):
    """All batches from the order's place on, epoch after epoch."""
    while True:
        yield from batches
        order.epoch, order.seen = order.epoch + 1, 0


# --- Checkpoints: the newest and the one before -----------------------------------------------------------------------

CHECKPOINTS = ("last.pt", "previous.pt")


def write_whole(path, content, before=None):
    """torch.save under another name, then the path's: it is whole or not there. What was there becomes `before`."""
    draft = path.with_name("unfinished.pt")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            path.replace(before)
        draft.replace(path)
    except (OSError, RuntimeError) as error:                          # torch.save turns a full disk into the latter
        draft.unlink(missing_ok=True)
        raise RunError(f"expected to write {path}, found {error}: make room and start again, a run with --resume "
                       f"{path.parent}; what was there before is untouched") from None


def read_checkpoint(path, whole=True):
    """(path, content) of a checkpoint given by its path or its run's folder; of the one before if last.pt is damaged.

    whole: it must be one of train.py's, else all weights that sigma.read_weights knows will do. They stand at "model".
    Raises WeightsError.
    """
    path, problems = Path(path), []
    candidates = [path]
    if path.name == CHECKPOINTS[0] or path.is_dir() and not any((path / name).exists() for name in FOLDER_FILES):
        candidates = [(path if path.is_dir() else path.parent) / name for name in CHECKPOINTS]
    for path in candidates:
        try:
            weights, rest = read_weights(path)
            lacking = {"optimizer", "scaler", "step", "epoch", "seen", "config"} - rest.keys()
            if whole and lacking:
                raise WeightsError(f"expected a checkpoint of train.py, found no {', '.join(sorted(lacking))} in "
                                   f"{path}: start from its weights with --init")
            if problems:
                say(f"{problems[0]}; going on from the checkpoint before, {path}, step {rest['step']:,}")
            return path, rest | {"model": weights}
        except WeightsError as error:
            problems.append(error)
    raise problems[0]


def load_encoder(model, weights, path):
    """Puts a run's weights into a Classifier: the encoder wholly, the head too if it fits; says what is new."""
    own = model.state_dict()
    new = {name: value for name, value in own.items() if name.startswith(("fc_norm.", "head."))
           and getattr(weights.get(name), "shape", None) != value.shape}
    rest = ("decoder.", "encoder_to_decoder.", "mask_token", "prototypes", "projector.", "encoder.norm.", *new)
    left = sorted({name.split(".")[0] for name in weights if name.startswith(rest)} - {"encoder", "head", "fc_norm"})
    fill(model, {name: value for name, value in weights.items() if not name.startswith(rest)} | new, path)
    say(f"weights    of the encoder from {path}" + f"; new: {', '.join(new)}" * bool(new) +
        f"; left out: {', '.join(left)} and the encoder's last norm, as published" * bool(left))


# --- Training ---------------------------------------------------------------------------------------------------------

def run(c, given, checkpoint, device):
    """Sets a run up, says what it is going to do and what it will cost, trains, and shows what was learned."""
    before = Namespace(**checkpoint["config"]) if "resume" in given else None
    clips, labelled = make_clips(c), c.task in TASKS
    if labelled:
        tests = make_clips(c, "val", c.views)
        check_labels(c, clips, tests)
    teacher = make_teacher(c, device, width_is_free=not checkpoint)
    model = make_model(c, device)
    judge = make_judge(c, model, device)
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
    c.warmup_steps = int(per_pass * min(c.warmup, c.epochs / 8) / c.repeat)     # the recipe's, at most an eighth of all
    parallel = DistributedDataParallel(model) if WORLD > 1 else model    # device_ids would move the masks to the GPU
    step = make_step(parallel, c, device, teacher)
    # Measured before weights are loaded: its forward pass rounds the prototypes once more, and a run that goes on must
    # not differ from one that was never stopped. All ranks take the first one's figure.
    cost = gather(time_batch(step, parallel, c, clips.grid, device))[0] * c.accum              # seconds a step, roughly
    place = Namespace(step=0, epoch=0, seen=0)                                # seen: videos of this pass over the data
    if checkpoint and labelled and not before:
        load_encoder(model, checkpoint["model"], c.source)
    elif checkpoint:
        fill(model, checkpoint["model"], given.get("resume", c.source))
    if before:
        place = Namespace(**{name: checkpoint[name] for name in vars(place)})
        if before.global_batch != c.global_batch:
            place.step = place.epoch * per_pass + place.seen // order.step

    k, videos, left = len(getattr(model, "prototypes", ())), clips.videos, c.steps - place.step
    tubes = tube_mask(1, clips.grid, c.ratio).sum().item() * c.batch_size * WORLD
    parameters, passed_over = sum(p.numel() for p in model.parameters()), len(videos.passed_over)
    for title, text in (
            ("data", f"{len(clips):,} videos in {c.data}, {videos.classes or 'no'} classes; {passed_over:,} missing or "
                     "passed over" + (f", named in {c.out}/passed_over.txt" if passed_over else "")),
            ("model", f"{c.model}, {c.task if labelled else f'target {c.target}'}, {parameters:,} parameters; clips of "
                      f"{c.frames} frames, "
                      f"{c.stride} apart, {c.size} x {c.size}: {math.prod(clips.grid):,} tubes"),
            ("batch", f"{product} clips in a step; on {device}, autocast {c.amp or 'as the device can'}"),
            ("schedule", f"{c.epochs} epochs = {c.steps:,} steps, the first {c.warmup_steps:,} of them warmup; "
                         f"learning rate {c.lr:g} x {c.global_batch} / 256 = {c.peak_lr:.3g}"),
            ("cost", f"{duration(cost * left)} for {left:,} steps of {cost:.3f} s, as measured now on random clips, if "
                     "the loader keeps up"),
            ("protocol", labelled and protocol(c)),
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
    if not fit(model, parallel, step, clips, judge, order, c, checkpoint if before else None, place,
               given.get("max_steps"), cost, device):
        return
    if labelled:
        results = {"trained": test(model, tests, c, device)}
    else:
        encoders = {"untrained": make_model(c, device).encoder} if c.data == "toy" else {}
        results = {name: judge(encoder) for name, encoder in (encoders | {"trained": model.encoder}).items() if judge}
    report(c, results, place.step, f"{c.out}/last.pt")
    if RANK == 0:
        pictures(model, None if labelled else clips, c, device, teacher)


def time_batch(step, parallel, c, grid, device, optimizer=None, repeat=1):
    """Seconds that forward and backward of one batch take, on random clips (CPUs get few); leaves no gradients."""
    gpu = device.type == "cuda"
    number = c.batch_size if gpu else min(c.batch_size, max(2, 2 ** 21 // (c.frames * c.size ** 2)))
    video = torch.randint(256, (number, 3, c.frames, c.size, c.size), dtype=torch.uint8)
    video, mask = video.pin_memory() if gpu else video, tube_mask(number, grid, c.ratio)

    def work():
        with autocast(c.amp, device):
            loss, _ = step(video, mask, torch.zeros(number, dtype=torch.long))
        loss.backward()
        if optimizer:
            optimizer.step()
        parallel.zero_grad()

    return seconds(work, device, repeat) * c.batch_size / number


def fit(model, parallel, step, clips, judge, order, c, checkpoint, place, max_steps, cost, device):
    """The training loop, from `place` on; True when the schedule is complete.

    It waits for the GPU only where it writes a log line. There it also minds signals and unreadable videos.
    """
    out, log, optimizer = Path(c.out), Path(c.out, "log.jsonl"), make_optimizer(model, c.task)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])

    def save():
        if RANK == 0:
            last, before = (out / name for name in CHECKPOINTS)                    # at any moment one of them is whole
            write_whole(last, dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                   scaler=scaler.state_dict(), config=vars(c), **vars(place)), before)

    if RANK == 0:                                                       # lines of steps that are going to be done again
        lines = log.read_text().splitlines(keepends=True) if checkpoint and log.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= place.step]
        log.write_text("".join(kept))
    if not checkpoint:
        save()                                                             # a place that can't be written to shows now
    order.epoch, order.seen = place.epoch, place.seen
    data = endless(loader(clips, order.batch, order, c.workers, device), order)
    last, every = min(c.steps, max_steps or c.steps), max(1, min(LOG_STEPS, int(LOG_SECONDS / cost)))
    final = (LABELLED_FINAL_LR if c.task in TASKS else FINAL_LR) * c.global_batch / 256
    recent, unreadable, found, hopeless, verdicts = [], {}, {}, False, 0
    logged, saved, waited = time.monotonic(), time.monotonic(), 0.0
    with stop_requests() as stopped, tqdm(total=c.steps, initial=place.step, unit="step", disable=RANK > 0,
                                          dynamic_ncols=True) as bar:
        while place.step < last:
            rate = learning_rate(place.step, c.steps, c.warmup_steps, c.peak_lr, final)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1)
            total = 0.0
            for part in range(1, c.accum + 1):
                asked = time.monotonic()
                video, mask, label, _, bad = next(data)
                waited += time.monotonic() - asked
                found |= {path: reason for sample in bad for path, reason in sample}
                hopeless |= any(len(sample) == RETRIES for sample in bad)
                # Random numbers (drop path, mixing) follow from the step: there is nothing to save, and ranks differ.
                torch.manual_seed(hash((c.seed, place.step, part, RANK)) % 2 ** 63)
                with parallel.no_sync() if WORLD > 1 and part < c.accum else nullcontext():
                    with autocast(c.amp, device):
                        loss, stats = step(video, mask, label)
                    scaler.scale(loss / c.accum).backward()
                total = total + loss.detach() / c.accum
            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recent.append({"loss": total, "grad_norm": norm} | {name: v for name, v in stats.items() if v.ndim == 0})
            epoch = place.step * c.epochs // c.steps
            place.step, place.seen = place.step + 1, place.seen + order.step
            if len(clips) - place.seen < order.step:                               # the rest is no whole step: dropped
                place.epoch, place.seen = place.epoch + 1, 0
            bar.update(1)
            due = judge and c.eval_every and place.step * c.epochs // c.steps // c.eval_every > epoch // c.eval_every
            if not (place.step % every == 0 or place.step == last or due or (WORLD == 1 and stopped)):
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
            if due:
                line |= (accuracies := judge())
                say(f"epoch {line['epoch']:g}: {in_words(accuracies)}")
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


# --- What was learned: numbers ----------------------------------------------------------------------------------------

def sample(clips, number):
    """Keys of up to `number` clips, spread over the whole set."""
    return [(0, i) for i in torch.linspace(0, len(clips) - 1, min(number, len(clips))).long().tolist()]


@torch.no_grad()
def infer(forward, views, c, device):
    """Yields (index, label, output) of each video in list order, on all ranks, which share the work.

    forward: normalised clips (B, 3, T, S, S) -> (B, ...); the output is its mean over the video's views, float32 on the
    CPU, and None for a video that can't be read, which is named.
    """
    batch = max(1, 64 // views.repeat) if device.type == "cuda" or c.size < 64 else 1
    batches = iter(loader(views, batch, [(0, i) for i in range(RANK, len(views), WORLD)], c.workers, device))
    rounds = range(math.ceil(math.ceil(len(views) / WORLD) / batch))       # alike on all ranks, also where one has less
    for _ in tqdm(rounds, desc="evaluating", unit="batch", leave=False, disable=RANK > 0, dynamic_ncols=True):
        rows, found = [], next(batches, None)
        if found:
            video, _, labels, indices, bad = found
            with autocast(c.amp, device):
                outputs = forward(normalise(video, device)).float().unflatten(0, (len(labels), -1)).mean(dim=1).cpu()
            rows = list(zip(indices.tolist(), labels.tolist(), outputs, bad))
        rows = [row for theirs in gather(rows) for row in theirs]
        for index, label, output, bad in sorted(rows, key=lambda row: row[0]):
            for path, reason in bad:
                say(f"unreadable video {path}: {reason}")
            yield index, label, None if bad else output


def collect(forward, views, c, device):
    """The outputs (n, ...) of infer for all videos and their labels (n,); -1, which no prediction equals, and zeros for
    those that can't be read."""
    _, labels, outputs = zip(*infer(forward, views, c, device))
    kept = [output for output in outputs if output is not None]
    if not kept:
        raise UserError(f"expected videos that can be read, found none among {len(views)}: see those named above")
    return torch.stack([torch.zeros_like(kept[0]) if out is None else out for out in outputs]), torch.tensor(labels)


def accuracy(scores, labels):
    """Top-1 and top-5 of scores (n, classes) for labels (n,)."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(dim=1).float().mean().item(),
            "videos": len(labels), "unreadable": int((labels < 0).sum())}


def test(model, views, c, device):
    """Accuracy of a Classifier; its probabilities are averaged over the views of each video, as published."""
    model.eval()
    found = accuracy(*collect(lambda video: model(video).softmax(dim=1), views, c, device))
    model.train()
    return found


def pooled(model):
    """The function that gives a model's features of whole clips (B, D): the mean over the encoder's tokens."""
    return model.pooled if isinstance(model, Classifier) else lambda video: model(video).mean(dim=1)


def evaluate(encoder, train, val, c, device):
    """Accuracy of ridge regression and of k-NN on the frozen encoder's pooled features."""
    features = [part for views in (train, val) for part in collect(pooled(encoder), views, c, device)]
    return {name: accuracy(way(*features[:3]), features[3])["top1"]
            for name, way in (("linear_probe", linear_probe), ("knn", nearest_neighbours))}


def linear_probe(train, labels, test):
    """Class scores of test features by ridge regression to one-hot labels on standardised features."""
    train, labels = train[labels >= 0], labels[labels >= 0]
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test, targets = (train - mean) / std, (test - mean) / std, F.one_hot(labels).float()
    covariance = train.T @ train + 10 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(covariance, train.T @ (targets - targets.mean(dim=0)))
    return test @ weight + targets.mean(dim=0)


def nearest_neighbours(train, labels, test, k=20, temperature=0.07):
    """Class scores of test features by k-NN: a neighbour's vote weighs exp(cosine / temperature)."""
    train, labels = F.normalize(train[labels >= 0], dim=1), labels[labels >= 0]
    votes = torch.zeros(len(test), int(labels.max()) + 1)
    for some, theirs in zip(F.normalize(test, dim=1).split(1024), votes.split(1024)):       # all at once are too many
        cosines, index = (some @ train.T).topk(min(k, len(train)), dim=1)
        theirs.scatter_add_(1, labels[index], (cosines / temperature).exp())
    return votes


def protocol(c):
    """How the numbers of a run come about, in a line."""
    if c.task == "pretrain":
        return (f"top-1, frozen encoder, mean over tokens, one view of each of at most {EVAL_CLIPS:,} clips; linear "
                "probe: ridge regression on standardised features; k-NN: cosine, k = 20, temperature 0.07")
    if c.task == "knn":
        return "k-NN, no training: cosine, k = 20, votes exp(cosine / 0.07); mean over the tokens of one centre view"
    return ("linear probe: encoder frozen, LayerNorm and linear layer on the mean over tokens" if c.task == "probe" else
            f"fine-tuning: all weights, layer-wise lr decay {LAYER_DECAY}, drop path {DROP_PATH}") + (
        f"; {c.epochs} epochs, lr {c.lr:g} x {c.global_batch} / 256, label smoothing {SMOOTHING}, " +
        ("RandAugment, mixup, cutmix, erasing" if c.augment == "on" else "no augmentation") +
        f", flip {c.flip if c.augment == 'on' else 'off'}, {c.sampling} frames; tested on {c.views} views")


def in_words(results):
    names = {"top1": "top-1", "top5": "top-5", "linear_probe": "linear probe", "knn": "k-NN"}
    return ", ".join(f"{names.get(name, name)} {value:.1%}" if isinstance(value, float) else f"{value:,} {name}"
                     for name, value in results.items())


def report(c, results, step, checkpoint):
    """Writes named accuracies with how they came about to the screen, results.json and log.jsonl."""
    about = dict(task=c.task, data=c.data, val=c.val, checkpoint=checkpoint, step=step, views=c.views,
                 protocol=protocol(c))
    for name, found in results.items():
        say(f"{name:13}{in_words(found)}")
    if RANK == 0:
        if results:
            say(f"{about['protocol']}; {c.val or c.data}, weights {checkpoint}")
            with open(Path(c.out, "log.jsonl"), "a") as file:
                file.write(json.dumps(about | results) + "\n")
        Path(c.out, "results.json").write_text(json.dumps(results | about | {"config": vars(c)}, indent=2) + "\n")
        say(f"wrote {Path(c.out, 'results.json')}")


def use(c, checkpoint, device):
    """The tasks without training: knn, features, show, export."""
    weights, out = checkpoint["model"] if checkpoint else {}, Path(c.out)
    if c.task == "export":
        return export(c, weights) if RANK == 0 else None
    out.mkdir(parents=True, exist_ok=True)
    if c.task == "show":
        clips, teacher = make_clips(c, c.split), make_teacher(c, device)
        model = fill(make_model(c, device).eval(), weights, c.source)
        return pictures(model, clips, c, device, teacher) if RANK == 0 else None
    c.classes = c.sizes.get("classes")
    model = make_model(c, device).eval()
    left = {name for name in weights if not name.startswith(("encoder.", "fc_norm.", "head."))}
    if weights:
        fill(model, {name: value for name, value in weights.items() if name not in left}, c.source)
        say(f"weights    of the encoder from {c.source}"
            + f"; left out: {', '.join(sorted({name.split('.')[0] for name in left}))}" * bool(left))
    encoder = model if c.classes else model.encoder
    if c.task == "knn":
        sets = [make_clips(c, split, c.views) for split in ("train", "val")]
        check_labels(c, *sets)
        train, labels, tests, truth = [part for views in sets for part in collect(pooled(encoder), views, c, device)]
        return report(c, {"knn": accuracy(nearest_neighbours(train, labels, tests), truth)}, 0, c.source)
    forward = (lambda video: model.encoder(video)) if c.tokens else pooled(encoder)
    write_features(forward, make_clips(c, c.split, c.views), c, device)


def export(c, weights):
    """Writes the weights in another layout into the file c.out; for Hugging Face config.json beside it."""
    path, left, config = Path(c.out), [], None
    if c.format == "hf":
        content, config, left = to_hugging_face(weights, c.sizes, c.frames, c.size)
    else:
        content = {"model": to_authors(weights)}
    if config and path.with_name("config.json").exists():
        raise UserError(f"expected a folder without config.json for {path}, found one: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    if config:
        path.with_name("config.json").write_text(json.dumps(config, indent=2) + "\n")
    say(f"wrote {path}" + " and config.json beside it" * bool(config)
        + f"; left out: {', '.join(left)}, which have no place there" * bool(left)
        + f"; from_pretrained looks for {FOLDER_FILES[1]}" * (bool(config) and path.name not in FOLDER_FILES))


def write_features(forward, views, c, device):
    """Writes out/features.pt: features (n, D), or (n, N, D) of each tube, paths, labels, of the n videos that can be
    read, in list order. Never holds all features in memory."""
    out, paths, labels = Path(c.out), [], []
    draft = out / "features.unfinished"
    with open(draft, "wb") if RANK == 0 else nullcontext() as file:
        for index, label, output in infer(forward, views, c, device):
            if output is not None and RANK == 0:
                paths.append(views.videos.paths[index])
                labels.append(label)
                file.write(output.numpy().tobytes())
                shape = output.shape
    if RANK == 0:
        if not paths:
            raise UserError(f"expected videos that can be read, found none among {len(views)}: see those named above")
        features = torch.from_file(str(draft), size=len(paths) * shape.numel()).view(-1, *shape)         # not in memory
        torch.save({"features": features, "paths": paths, "labels": torch.tensor(labels), "config": vars(c)},
                   out / "features.pt")
        draft.unlink()
        say(f"wrote {out / 'features.pt'}: {tuple(features.shape)} of {len(views):,} videos")


# --- What was learned: pictures ---------------------------------------------------------------------------------------

COLOURS = torch.tensor([[230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180],
                        [70, 240, 240], [250, 190, 212]], dtype=torch.uint8)


def pictures(model, clips, c, device, teacher=None):
    """Writes what can be seen of a run into its folder. clips: pretraining's, or None for a Classifier."""
    out = Path(c.out)
    written = draw_curve(out / "curve.png", out / "log.jsonl")
    if clips:
        written += show_masks(out / "masks.png", clips)
        written += show_components(out / "components.png", model.encoder, clips, device)
    if clips and c.target != "pixel":
        written += show_prototypes(out / "prototypes.png", model, clips, device, teacher)
        written += show_clusters(out / "clusters.png", out / "clusters.mp4", model, clips, device, teacher)
    if written:
        say("wrote " + ", ".join(map(str, written)))


def picture(path, rows, height):
    """Writes rows (r, n, 3, h, w) uint8 of images as one PNG, each image `height` pixels high."""
    images = F.interpolate(rows.flatten(0, 1).float(), scale_factor=height / rows.shape[-2], mode="nearest-exact")
    save_image(images / 255, path, nrow=rows.shape[1], padding=2, pad_value=1)
    return [path]


def paint(values, clips):
    """One clip's values of tubes (N, C) as pixels (C, T, S, S)."""
    values = values.view(*clips.grid, -1).movedim(-1, 0)
    for axis, step in enumerate(clips.tube, start=1):
        values = values.repeat_interleave(step, dim=axis)
    return values


def strip(path, pairs):
    """Writes pairs of clips (3, T, S, S) as PNG: up to eight frames of each, one clip below the other."""
    rows = [clip[:, ::max(1, clip.shape[1] // 8)].movedim(1, 0) for pair in pairs for clip in pair]
    return picture(path, torch.stack(rows), height=96)


def show_masks(path, clips):
    """Three clips, and below each the same with its hidden tubes in grey."""
    return strip(path, [(video[0], video[0].masked_fill(paint(mask[0], clips), 128))
                        for video, mask, *_ in map(clips.__getitem__, sample(clips, 3))])


@torch.no_grad()
def show_components(path, encoder, clips, device):
    """Three clips, and below each its tokens: their first three principal components as red, green and blue."""
    videos = torch.stack([clips[key][0][0] for key in sample(clips, 3)])
    tokens = torch.cat([encoder(normalise(video[None], device)).cpu() for video in videos])                      # 3 N D
    flat = tokens.flatten(0, 1) - tokens.mean(dim=(0, 1))
    parts = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    colours = ((parts - low) / (high - low + 1e-6)).clamp(0, 1).mul(255).byte().view(len(videos), -1, 3)
    return strip(path, [(video, paint(colour, clips)) for video, colour in zip(videos, colours)])


def nearest_prototypes(model, video, device, teacher=None):
    """For all tubes of clips (B, 3, T, S, S) uint8: cosine to the nearest prototype and its number, (B, N) each, as the
    projection network sees them."""
    everything = torch.arange(math.prod(video.shape[2:]) // math.prod(model.encoder.tube), device=device)
    video = normalise(video, device)
    features = model.embed(video, everything.expand(len(video), -1), teacher(video) if teacher else None)        # B N E
    return [part.view(features.shape[:2]).cpu() for part in model.compare(features, features)[1].max(dim=1)]


@torch.no_grad()
def show_prototypes(path, model, clips, device, teacher=None, number=12, nearest=8):
    """For some prototypes, from much to little used, a row of the real tubes nearest to it, from different clips."""
    found = []
    for video, *_ in loader(clips, 8, sample(clips, 256), workers=0):
        found.append((take_tubes(video, clips.tube), *nearest_prototypes(model, video, device, teacher)))
    tubes, cosine, prototype = (torch.cat(parts) for parts in zip(*found))                         # m N 3 p q r and m N
    use = prototype.flatten().bincount(minlength=len(model.prototypes))
    rows = []
    used = int((use > 0).sum())
    for k in use.argsort(descending=True)[torch.linspace(0, used - 1, min(number, used)).long()]:
        best, place = cosine.masked_fill(prototype != k, -1).max(dim=1)                                # in each clip: m
        clip = best.topk(min(nearest, len(best))).indices
        shown = tubes[clip, place[clip]] * (best[clip] > -1)[:, None, None, None, None]         # black: no more of them
        rows.append(rearrange(shown, "n c p q r -> n c q (p r)"))
    return picture(path, torch.stack(rows), height=48)


@torch.no_grad()
def group_prototypes(prototypes, members, number=8, rounds=20):
    """Groups unit vectors (K, E) by spherical k-means into `number` groups: the group of each, (K,). members: those
    that are in use; the first centre is the first of them, each next one the farthest from those before."""
    used = prototypes[members]
    centres = used[:1]
    while len(centres) < min(number, len(used)):
        centres = torch.cat([centres, used[(used @ centres.T).amax(dim=1).argmin()][None]])
    for _ in range(rounds):
        group = (used @ centres.T).argmax(dim=1)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, group, used), dim=1)
    return (prototypes @ centres.T).argmax(dim=1)


@torch.no_grad()
def show_clusters(path, film, model, clips, device, teacher=None):
    """Three clips, and below each (in the film: beside it) the same with each tube in the colour of its prototype."""
    videos = torch.stack([clips[key][0][0] for key in sample(clips, 3)])
    prototype = torch.cat([nearest_prototypes(model, video[None], device, teacher)[1] for video in videos])
    group = group_prototypes(F.normalize(model.prototypes.cpu(), dim=1), prototype.unique())
    pairs = [(video, video // 3 + paint(COLOURS[group[tubes]], clips) // 3 * 2)
             for video, tubes in zip(videos, prototype)]
    frames = torch.cat([torch.cat(pair, dim=3) for pair in pairs], dim=1).movedim(0, 1).float()             # 3T 3 S 2S
    frames = F.interpolate(frames, scale_factor=max(1, 224 // clips.size), mode="nearest-exact")
    write_video(film, frames.byte().movedim(1, 3))
    return strip(path, pairs) + [film]


def draw_curve(path, log):
    """Writes the terms of the loss over the steps of a log beside ln K as PNG, if there are any."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lines = [line for line in lines if "loss" in line]
    if len(lines) < 2:
        return []
    names = [name for name in ("target_term", "video_term", "log_k") if name in lines[0]] or ["loss"]
    image, left = torch.full((3, 320, 640), 255, dtype=torch.uint8), 8
    height, width = image.shape[1] - 40, image.shape[2] - 2 * left
    steps = torch.tensor([line["step"] for line in lines], dtype=torch.float64)
    curves = torch.tensor([[line[name] for line in lines] for name in names], dtype=torch.float64)
    at = torch.linspace(steps[0], steps[-1], width, dtype=torch.float64)
    after = torch.searchsorted(steps, at).clamp(1, len(steps) - 1)
    curves = curves[:, after - 1].lerp(curves[:, after], (at - steps[after - 1]) / (steps[after] - steps[after - 1]))
    rows = ((1 - curves / (1.05 * curves.max())).clamp(0, 1) * height).long().tolist()
    for colour, row in zip(COLOURS, rows):
        for x, (a, b) in enumerate(zip(row, row[1:]), start=left):
            image[:, min(a, b):max(a, b) + 2, x] = colour[:, None]
    image[:, height, left:-left] = 0                                                                # loss 0: the bottom
    texts = [f"{name.replace('log_k', 'ln K')} {lines[-1][name]:.2f}" for name in names]
    texts.append(f"steps {steps[0]:.0f} to {steps[-1]:.0f}")
    boxes = torch.tensor([[10 + 150 * i, height + 12, 18 + 150 * i, height + 20] for i in range(len(texts))])
    colours = [tuple(colour.tolist()) for colour in COLOURS[:len(names)]] + [(0, 0, 0)]
    image = draw_bounding_boxes(image, boxes, [f"     {text}" for text in texts], colors=colours, fill=True)
    save_image(image / 255, path)
    return [path]


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
    teacher, rows, loading = make_teacher(c, device, bool(c.teacher), width_is_free=True), [], None
    model = make_model(c, device)
    try:
        clips = make_clips(c, cache=None)
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
        video = torch.zeros(1, 3, c.frames, c.size, c.size, device=device)
        SIGMA(**c.sizes).to(device)(video, mask, teacher(video) if teacher else None)[0].backward()
    work = counter.get_total_flops()
    step = time_batch(make_step(model, c, device, teacher), model, c, grid, device, make_optimizer(model), repeat=5)
    training = c.batch_size / step                                                                     # clips a second
    rows.append(("training step", f"{training:,.2f} clips/s", f"{c.model}, {c.target}, batch {c.batch_size}, "
                 f"{str(large.dtype).removeprefix('torch.')}"))
    rows += [("arithmetic", f"{work / 1e9:,.2f} GFLOP/clip", "forward and backward, matrix products"),
             ("share of matrix product", f"{work * training / product:.0%}",
              f"of {product / 1e9:,.0f} GFLOP/s, {side} x {side}")]
    if teacher:
        video = video.expand(c.batch_size if gpu else 1, -1, -1, -1, -1)
        share = seconds(lambda: teacher(video), device) * c.batch_size / len(video) / step
        rows.append(("teacher", f"{share:.0%}", "of the step's time: frozen, float32, first frame of each tubelet"))
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
        device = set_up()
        if c.data == "toy":
            if RANK == 0:
                make_toy(c.root or "data/toy")
            gather(None)                                                        # the others wait until it is there
        if "bench" in given:
            bench(c, given, device)
        elif c.task in ("pretrain", *TASKS):
            run(c, given, checkpoint, device)
        else:
            use(c, checkpoint, device)
        return 0
    except (UserError, WeightsError, RunError, OSError, RuntimeError) as error:
        known = {"DataLoader worker": "a loader worker was killed, often for want of memory: lower --workers",
                 "out of memory": "a batch did not fit into memory: lower --batch-size",
                 "inductor": "the blocks can't be compiled, is there a C++ compiler? leave out --compile",
                 "onnection": "another process of the run is gone: its own message says why"}
        if not isinstance(error, (UserError, WeightsError, RunError, OSError)):
            known = [sentence for part, sentence in known.items() if part in str(error)]
            if not known:
                raise
            error = f"{known[0]}; go on with --resume"
        if RANK:                            # what all ranks find wrong the first one says, and torchrun ends the others
            time.sleep(3)
        print(f"error{f' on rank {RANK}' if RANK else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, (UserError, WeightsError)) else 1
    finally:
        kill_workers()
        if dist.is_initialized():
            time.sleep(0.1)    # gloo's threads may need Python to free their last tensors: torch 2.6 would wait forever
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
