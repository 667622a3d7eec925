"""Videos in, uint8 clips with tube masks out: finding, decoding, cropping, and a toy set that needs no download.

What `--data` may name (`find_videos`):
    a set in SETS           k400, ssv2, ucf101, hmdb51 as people have them on disk, toy: rendered once as mp4 files
    a folder                FOLDER/<class name>/*.mp4 (any depth below a class), or FOLDER/train/<class name>/*.mp4,
                            or FOLDER/train.csv, a list
    a flat folder           FOLDER/*.mp4: no labels, enough for pretraining
    a folder of images      in place of videos, as the folders above: clips that stand still
    a list file             a video a line, `path` or `path label`; the label is a whole number and the last field, so
                            paths may hold spaces; relative paths start at the list's own folder
Each video is opened, the wanted frames are decoded and nothing after them, and the clip stays uint8 until it is on the
training device (`normalise`). A video that can't be read raises VideoError; `Clips` takes another one and says so.

    python data.py check --data k400 --root DIR     decode a clip of each video: lists of the good and of the bad ones
    python data.py prepare SRC DST                  re-encode a folder so that training reads it fastest
"""
import argparse
import csv
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

from sigma import IMAGENET_MEAN, IMAGENET_STD, tube_mask

av.logging.set_level(av.logging.FATAL)              # a damaged file is reported once, by us, not line by line by FFmpeg
SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
IMAGES = {".jpg", ".jpeg", ".png"}
RETRIES = 10                                          # other clips that are tried in place of one that can't be read


class UserError(Exception):
    """Something that the user can mend; the message says what was expected, what was found and what to do."""


class VideoError(Exception):
    """One video that can't be read; the message says why."""


# --- Data sets: recipe and layout -------------------------------------------------------------------------------------

VIDEO = dict(frames=16, stride=4, size=224, ratio=0.9, epochs=800, batch_size=40, lr=1.5e-4, warmup=40, eps=None,
             global_batch=None, workers=min(8, os.cpu_count()), views="1x1", sampling="dense", flip="on", augment="on")
TASKS = {                                                                 # what the labelled tasks have in their place
    "finetune": dict(epochs=100, batch_size=16, lr=1e-3, warmup=5, views="5x3", global_batch=None),
    "probe": dict(epochs=30, batch_size=16, lr=1e-3, warmup=5, views="5x3", global_batch=None)}
# A set's own settings come on top, as published where the authors have them (ucf101 and hmdb51: as k400). global_batch:
# GPUs x clips on each. small, finetune, probe: what differs for these. videos: of the training split, about. layout:
# what lies below the root. flip: never where classes tell left from right.
KINETICS = dict(stride=4, epochs=800, eps=0.05, global_batch=16 * 40, finetune=dict(global_batch=8 * 4 * 8))
SETS = {
    "k400": KINETICS | dict(videos=241_000, classes=400,
                            layout="{train,val}/<class>/*.mp4, or csv tables label,youtube_id,time_start,... beside"),
    "ssv2": dict(videos=168_913, classes=174, stride=2, epochs=800, eps=0.03, global_batch=16 * 32,
                 sampling="segments", flip="off", small=dict(epochs=2400, eps=0.05, global_batch=8 * 16),
                 finetune=dict(epochs=40, views="2x3", global_batch=8 * 4),
                 probe=dict(views="2x3", global_batch=8 * 24 * 2),
                 layout="20bn-something-something-v2/<id>.webm with {labels,train,validation}.json"),
    "ucf101": KINETICS | dict(videos=9_537, classes=101,
                              layout="UCF-101/<Class>/v_*.avi with ucfTrainTestlist/"
                                     "{classInd,trainlist01,testlist01}.txt"),
    "hmdb51": KINETICS | dict(videos=3_570, classes=51,
                              layout="<class>/*.avi with testTrainMulti_7030_splits/<class>_test_split1.txt"),
    "toy": dict(videos=8192, classes=8, stride=1, epochs=20, eps=0.03, global_batch=64, frames=8, size=32, ratio=0.75,
                batch_size=64, lr=6e-3, warmup=1, workers=0, flip="off", layout="{train,val}/<class>/*.mp4",
                finetune=dict(epochs=10, batch_size=64, lr=4e-3, warmup=1, views="1x1", augment="off"),
                probe=dict(epochs=5, batch_size=64, lr=4e-3, warmup=1, views="1x1", augment="off")),
}
SPLITS = ("train", "val", "test")


def recipe(data, model, task="pretrain"):
    """The default settings for a task with `model` on `data`. The tiny model takes clips like toy's from any data."""
    own = SETS.get("toy" if model == "tiny" else data, {})
    if task in TASKS:
        own = own | TASKS[task] | own.get(task, {})
    elif model == "small":
        own = own | own.get("small", {})
    return {name: own.get(name, default) for name, default in VIDEO.items()}


@dataclass
class Videos:
    """paths, and for each its label (-1: none); what was passed over, each with the reason."""
    paths: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    passed_over: list = field(default_factory=list)

    @property
    def classes(self):
        return len(set(self.labels) - {-1})

    def take(self, indices):
        """Those at the indices alone."""
        return Videos([self.paths[i] for i in indices], [self.labels[i] for i in indices], self.passed_over)

    def limit(self, number, seed):
        """A random choice of `number` videos in which the classes have equal shares, or differ by one video."""
        turn, ranked = Counter(), []
        for i in torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(seed)).tolist():
            turn[self.labels[i]] += 1                                              # how many of its class came so far
            ranked.append((turn[self.labels[i]], len(ranked), i))
        return self.take(sorted(i for _, _, i in sorted(ranked)[:number]))


def find_videos(data, split="train", root=None):
    """The videos of one split of `data`, a name in SETS (in the folder root, default data/<name>), a folder or a list.

    The layouts stand at the top of this file and in SETS. Raises UserError where there are none.
    """
    named, found = data in SETS, Videos()
    source = Path(root or f"data/{data}") if named else Path(data)
    try:
        if source.is_file() and source.suffix.lower() not in SUFFIXES and split == "train":
            read_list(source, found)
        elif source.is_dir():
            if listed := annotated(data, source, split):
                match_names(source, listed, found)
            elif (source / f"{split}.csv").is_file():
                read_list(source / f"{split}.csv", found)
            if not found.paths and (source / split).is_dir():
                folders = [p for each in SPLITS for p in (source / each).glob("[!.]*") if p.is_dir()]
                walk_folder(source / split, found, {p.name for p in folders})         # one numbering for all splits
            if not found.paths and split == "train" and not named:
                walk_folder(source, found)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError, csv.Error) as error:
        raise UserError(f"expected a folder or lists that can be read, found {type(error).__name__} {error}: "
                        f"check {source}") from None
    if not found.paths:
        what = "none" if source.is_dir() else "a file" if source.exists() else "no such place"
        if found.passed_over:
            what += f" ({len(found.passed_over):,} passed over, first: {found.passed_over[0]})"
        layout = f"{source}/{SETS[data]['layout']}, or {source}/{{train,val}}.csv with" if named else \
            "FOLDER/<class>/*.mp4, FOLDER/*.mp4 or a text file with"
        raise UserError(f"expected videos to {split} on in {source}, found {what}: give {layout} lines `path label`")
    return found


def files_below(folder):
    """The files below a folder, sorted; links are followed, names that begin with a dot are left out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def walk_folder(folder, found, classes=()):
    """Adds the videos below a folder. Its sub-folders and `classes` are the classes, numbered alphabetically."""
    files = files_below(folder)
    kind = SUFFIXES if any(path.suffix.lower() in SUFFIXES for path in files) else IMAGES
    videos = [path for path in files if path.suffix.lower() in kind]
    found.passed_over += [f"{path}: not a video by its name" for path in files if path.suffix.lower() not in kind]
    deep = [path for path in videos if path.parent != Path(folder)]
    names = sorted({path.relative_to(folder).parts[0] for path in deep} | set(classes) if deep else {})
    number = {name: label for label, name in enumerate(names)}
    found.paths += map(str, deep or videos)
    found.labels += [number[path.relative_to(folder).parts[0]] for path in deep] or [-1] * len(videos)
    if deep:
        found.passed_over += [f"{p}: in no class folder, while others are" for p in videos if p.parent == Path(folder)]


def read_list(file, found):
    """Adds the videos of a list file; lines that name none are passed over, quoted with their number."""
    for number, line in enumerate(map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()), start=1):
        path, label = line, "-1"                                                        # no label
        if len(line.split()) > 1 and not os.path.isfile(file.parent / line):
            path, label = line.rsplit(maxsplit=1)
        path = file.parent / path
        path = path if path.is_file() or not path.suffix else path.with_suffix(".mp4")         # as `prepare` names it
        if not line:
            continue
        if not path.is_file():
            found.passed_over.append(f'{file}, line {number}, "{line[:200]}": there is no such file')
        elif label != "-1" and not label.isdecimal():
            found.passed_over.append(f'{file}, line {number}, "{line[:200]}": its label is not a whole number')
        else:
            found.paths.append(str(path))
            found.labels.append(int(label))


def match_names(root, listed, found):
    """Adds the videos below root that `listed`, pairs (name without suffix, label), names by file or by folder/file."""
    files = {}
    for path in files_below(root):
        if path.suffix.lower() in SUFFIXES:
            files[path.stem] = files[f"{path.parent.name}/{path.stem}"] = str(path)
    found.passed_over += [f"{name}: listed, but there is no such video" for name, _ in listed if name not in files]
    kept = [(files[name], label) for name, label in listed if name in files]
    found.paths, found.labels = [path for path, _ in kept], [label for _, label in kept]


def annotated(data, root, split):
    """(name, label) of each video of a split by the set's own tables, in root or a folder in it; empty without them."""
    def tables(pattern):
        return [path for place in ("", "*/") for path in sorted(root.glob(place + pattern))]

    def rows(path):
        return [line.split() for line in path.read_text().splitlines() if line.strip()]

    if data == "k400":                                               # rows label,youtube_id,time_start,time_end,split
        found = []
        for path in tables("*.csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file)
                found += table if (table.fieldnames or [])[:2] == ["label", "youtube_id"] else []
        number = {name: label for label, name in enumerate(sorted({row["label"] for row in found}))}
        return [(f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}", number[row["label"]])
                for row in found if row["split"].startswith(split)]                                  # val or validate
    if data == "ssv2":                              # {label: number}; [{"id", "template": the label with brackets}]
        files = tables("*labels.json")[:1] + tables(f"*{'validation' if split == 'val' else split}.json")[:1]
        number, found = [json.loads(path.read_text()) for path in files] if len(files) == 2 else ({}, [])
        plain = str.maketrans("", "", "[]")
        return [(row["id"], int(number[row["template"].translate(plain)])) for row in found]
    if data == "ucf101":                                             # lines `number class`; lines `class/file.avi ...`
        number = {name: int(label) - 1 for path in tables("classInd.txt") for label, name in rows(path)}
        file = {"train": "trainlist01.txt", "val": "testlist01.txt"}.get(split, "none")
        names = [name for path in tables(file) for name, *_ in rows(path)]
        return [(name.removesuffix(".avi"), number[name.split("/")[0]]) for name in names]
    if data == "hmdb51":                                             # lines `file.avi flag`: 1 train, 2 test, 0 neither
        flag, end = {"train": "1", "val": "2"}.get(split), "_test_split1.txt"
        return [(f"{path.name.removesuffix(end)}/{name.removesuffix('.avi')}", label)
                for label, path in enumerate(tables("*" + end)) for name, theirs in rows(path) if theirs == flag]
    return []


# --- Decoding ---------------------------------------------------------------------------------------------------------

def pretraining_frames(n, frames, stride, generator=None):
    """Indices of a clip in a video of n frames: random start, then every stride-th; past the end the last one."""
    start = int(torch.randint(max(n - frames * stride, 0) + 1, (1,), generator=generator))
    return [min(start + stride * i, n - 1) for i in range(frames)]


def dense_frames(n, frames, stride, generator=None):
    """As Kinetics is fine-tuned: evenly over a window of frames * stride, whose place is random."""
    def evenly(start, end, number):
        return [min(int(start + i * ((end - start) / max(number - 1, 1))), end - 1) for i in range(number)]

    if n > frames * stride:
        start = int(torch.randint(n - frames * stride, (1,), generator=generator))
        return evenly(start, start + frames * stride, frames)
    return (evenly(0, n, n // stride) + [n - 1] * frames)[:frames]


def segment_frames(n, frames, stride, generator=None):
    """As Something-Something is fine-tuned: a random frame of each of `frames` equal parts of the video."""
    part = n // frames
    if part == 0:
        return [i * n // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, (1,), generator=generator)) for i in range(frames)]


def view_frames(n, frames, stride, views, sampling):
    """Indices for each of the views in time: "dense", windows spread over the video; "segments", frames from all of it.

    A single view is the one in the middle.
    """
    if sampling == "segments":
        part = n / frames
        return [[int(part * i + part * (view / views if views > 1 else 0.5)) for i in range(frames)]
                for view in range(views)]
    every = list(range(0, n, stride))
    free = max(len(every) - frames, 0)
    starts = [view * free // (views - 1) for view in range(views)] if views > 1 else [free // 2]
    return [[every[min(start + i, len(every) - 1)] for i in range(frames)] for start in starts]


def still(path, choose):
    """An image as a video of one frame, (n, 3, H, W) uint8: as many copies as choose asks for."""
    try:
        with open(path, "rb") as file, av.open(file) as container:      # a path with % would be taken for many images
            frame = next(container.decode(video_stream(container)))
            image = torch.from_numpy(scaled(frame, frame.width, frame.height, "rgb24").to_ndarray())
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as error:
        raise VideoError(f"it can't be read: {getattr(error, 'strerror', None) or error}") from None
    return image.permute(2, 0, 1).expand(len(choose(1)), -1, -1, -1)


def decode(path, choose, indices=None):
    """Frames of a video, (n, 3, H, W) uint8 RGB: those that choose(number of frames) -> ascending indices asks for.

    Frame i is the last one shown at or before i / rate seconds after the first, which is the i-th where the rate is
    constant. Many files know the number of their frames only roughly: where one ends sooner, its last frame is held.
    Raises VideoError with the reason. With indices, which choose has given before, it reads from the file's beginning.
    """
    if Path(path).suffix.lower() in IMAGES:
        return still(path, choose)
    try:
        with av.open(path, metadata_errors="replace") as container:                   # closed whatever happens: no leak
            stream = video_stream(container)
            packets = packets_of(container, stream)
            first = next(packets, None)
            if first is None or first.pts is None:
                raise VideoError("it holds no frames with time stamps")
            # The first packet holds the first frame, unless an edit list cuts it off.
            origin, frames = (stream.start_time, 0) if first.is_discard else (first.pts, stream.frames)
            step = 1 / (stream.average_rate * stream.time_base)                          # from frame to frame, in ticks
            seek = indices is None
            if seek:
                length = stream.duration or (container.duration or 0) / (av.time_base * stream.time_base)
                # Some webm files tell neither frames nor duration: count their packets, which needs no decoding.
                indices = choose(frames or round(length / step) or 1 + sum(1 for _ in packets))
            # Time stamps are rounded to ticks: forgive one tick, but never as much as half a frame.
            times = [float(origin + index * step + min(1, step / 2)) for index in indices]
            if seek:
                container.seek(int(times[0]), stream=stream)                     # to the last key frame before the clip
                packets = packets_of(container, stream)
                first = next(packets, None)
                if not (first and first.is_keyframe and first.pts is not None and first.pts <= times[0]):
                    return decode(path, choose, indices)             # it landed elsewhere, as some formats often do
            found = clip_packets([first], packets, times[-1])
            return torch.stack(decode_packets(stream, found, times)).permute(0, 3, 1, 2)
    except (av.FFmpegError, OSError, ValueError, IndexError, ZeroDivisionError, TypeError) as error:
        raise VideoError(f"it can't be read: {getattr(error, 'strerror', None) or error}") from None


def video_stream(container):
    """The first stream that is a video and no cover picture, to be decoded by one thread: workers are parallel."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or streams[0].codec_context is None:
        raise VideoError("it has no video stream of a known codec")
    streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
    return streams[0]


def packets_of(container, stream):
    """The stream's compressed packets in file order, without the empty ones that mark its end."""
    return (packet for packet in container.demux(stream) if packet.size)


def clip_packets(found, packets, end):
    """Adds packets up to the last one that can hold a frame shown by `end`: a packet is never shown before its dts."""
    for packet in packets:
        found.append(packet)
        if packet.dts is not None and packet.dts > end:
            break
    return found


def decode_packets(stream, packets, times):
    """For each of the ascending times the last frame shown by then, (H, W, 3) uint8; converts no others to RGB."""
    shown = sorted(packet.pts for packet in packets if packet.pts is not None)
    wanted = {shown[max(bisect_right(shown, time) - 1, 0)] for time in times} if shown else {}
    # A frame that is neither wanted nor referred to by others need not be decoded. Needs packets that all tell their
    # frame's time, and a decoder that minds the setting packet by packet: dav1d, for one, drops wanted frames.
    context, chosen, last = stream.codec_context, [], None
    unwanted = "NONREF" if len(shown) == len(packets) and context.name in ("h264", "hevc") else "DEFAULT"

    def frames():
        for packet in packets:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else unwanted
            yield from packet.decode()
        yield from context.decode(None)                                        # those that the decoder still holds back

    for frame in frames():
        if frame.pts is None:
            raise VideoError("it holds frames without time stamps")
        while last is not None and len(chosen) < len(times) and frame.pts > times[len(chosen)]:
            chosen.append(last)
        if len(chosen) == len(times):
            break                                                               # nothing behind the clip is decoded
        last = frame
    if last is None:
        raise VideoError("none of its frames can be decoded")
    chosen += [last] * (len(times) - len(chosen))                               # the video ends: its last frame is held
    size = chosen[0].width, chosen[0].height
    images = {frame.pts: torch.from_numpy(scaled(frame, *size, "rgb24").to_ndarray()) for frame in chosen}    # H W 3
    return [images[frame.pts] for frame in chosen]


reformatter = None


def scaled(frame, width, height, pixels):
    """A decoded frame in another size and pixel format, on one thread: the default is one for each core, each time."""
    global reformatter                             # one in each worker process: threads of its own don't survive a fork
    reformatter = reformatter or VideoReformatter()
    return reformatter.reformat(frame, width, height, pixels, threads=1)


# --- Clips ------------------------------------------------------------------------------------------------------------

CROP_FACTORS = (1, 0.875, 0.75, 0.66)                                                 # of the short side, for each side
CROP_SIDES = [(i, j) for i in CROP_FACTORS for j in CROP_FACTORS
              if abs(CROP_FACTORS.index(i) - CROP_FACTORS.index(j)) <= 1]             # at most one step apart: 10 pairs
CROP_PLACES = [(i, j) for i in range(5) for j in range(5) if (i + j) % 2 == 0]           # 13 quarters of the free space


def corner_crop(height, width, generator=None):
    """The multi-scale corner crop of VideoMAE and SIGMA: a random box (top, left, height, width) for the whole clip."""
    sides, place = (options[int(torch.randint(len(options), (1,), generator=generator))]
                    for options in (CROP_SIDES, CROP_PLACES))
    h, w = (max(1, int(min(height, width) * side)) for side in sides)
    return place[0] * ((height - h) // 4), place[1] * ((width - w) // 4), h, w


def centre_crop(height, width, generator=None):
    """The largest square in the middle, as (top, left, height, width)."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def resize_crop(frames, box, size):
    """The box of each frame (T, 3, H, W) uint8, resized bilinearly to size x size: (3, T, size, size) uint8."""
    if box != (0, 0, size, size) or frames.shape[-2:] != (size, size):
        frames = transform.resized_crop(frames, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
    return frames.transpose(0, 1)


def tuning_augmentation(size, flip):
    """Fine-tuning's augmentation, alike for all frames of a clip: (T, 3, H, W) uint8 -> (T, 3, size, size) uint8.

    Random resized crop, flip, and four times with probability 1/2 an operation of RandAugment of strength 7 of 10 with
    deviation 0.5. It draws from torch's own random state.
    """
    strengths = [v2.RandAugment(1, strength, 101, fill=[124, 116, 104]) for strength in (64, 70, 76)]
    return v2.Compose([v2.RandomResizedCrop(size, antialias=False), v2.RandomHorizontalFlip(0.5 if flip else 0)]
                      + [v2.RandomApply([v2.RandomChoice(strengths)], 0.5)] * 4)


class Clips(Dataset):
    """A clip with its tube mask for each key (epoch, index): the same key gives the same clip, on whichever worker.

    Items are (video (R, 3, T, S, S) uint8, mask (R, N) bool, label, index, bad): bad holds the [path, reason] of videos
    that couldn't be read, in whose place the clip comes from another one. After `tries` of them the clip is black.
    repeat: R, clips from one pass over the video, each with its own place, crop and mask. choose: pretraining_frames or
    one like it. crop: corner_crop or centre_crop. augment: a transform of frames in place of crop. cache: a dict that
    keeps decoded videos, for sets that fit into memory.
    """
    tries = RETRIES

    def __init__(self, videos, *, frames, stride, size, tube, ratio, repeat=1, choose=pretraining_frames,
                 crop=corner_crop, augment=None, seed=0, cache=None):
        if frames % tube[0] or size % tube[1] or size % tube[2]:
            raise UserError(f"expected --frames and --size divisible by the tube {tuple(tube)}, found {frames} and "
                            f"{size}: take multiples")
        self.grid = (frames // tube[0], size // tube[1], size // tube[2])
        if int(ratio * self.grid[1] * self.grid[2]) == 0:
            raise UserError(f"expected clips of which {ratio:.0%} can be hidden, found {self.grid[1]} x {self.grid[2]} "
                            "tubes in a frame: take a larger --size")
        self.videos, self.frames, self.stride, self.size, self.tube = videos, frames, stride, size, tube
        self.ratio, self.repeat, self.choose, self.crop, self.augment = ratio, repeat, choose, crop, augment
        self.seed, self.cache = seed, cache

    def __len__(self):
        return len(self.videos.paths)

    def frames_of(self, path, choose):
        """For each list of indices in choose(number of frames) these frames of the video, (T, 3, H, W) uint8."""
        clips = []

        def union(n):
            clips.extend(choose(n))
            return sorted(set().union(*clips))

        if self.cache is None:
            frames = decode(path, union)
            place = {index: i for i, index in enumerate(sorted(set().union(*clips)))}         # of a frame among these
        else:
            if path not in self.cache:
                self.cache[path] = decode(path, range)
            frames = self.cache[path]
            union(len(frames))
            place = range(len(frames))
        return [frames[[place[index] for index in clip]] for clip in clips]

    def read(self, path, generator):
        """The clips of one pass over the video at path, (R, 3, T, size, size) uint8. Raises VideoError."""
        clips = self.frames_of(path, lambda n: [self.choose(n, self.frames, self.stride, generator)
                                                for _ in range(self.repeat)])
        if not self.augment:
            return torch.stack([resize_crop(clip, self.crop(*clip.shape[-2:], generator), self.size) for clip in clips])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(generator.get_state())
            return torch.stack([self.augment(clip).transpose(0, 1) for clip in clips])

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, index)) % 2 ** 63)
        mask, bad = tube_mask(self.repeat, self.grid, self.ratio, generator), []
        while len(bad) < self.tries:
            path = self.videos.paths[index]
            try:
                return self.read(path, generator), mask, self.videos.labels[index], index, bad
            except VideoError as error:
                bad.append([path, str(error)])
                if self.tries > 1:
                    index = int(torch.randint(len(self), (1,), generator=generator))
        return torch.zeros(self.repeat, 3, self.frames, *[self.size] * 2, dtype=torch.uint8), mask, -1, index, bad


class Views(Clips):
    """Each video in several views, for testing: items as those of Clips, R = views in time x crops, time first.

    The short side is resized to `size`; the crops, size x size, lie evenly along the long one (a single one in the
    middle). No other video takes the place of one that can't be read: its views are black and its label is -1.
    """
    tries = 1

    def __init__(self, videos, *, times=1, crops=1, sampling="dense", **options):
        super().__init__(videos, **options | dict(repeat=times * crops))
        self.times, self.crops, self.sampling = times, crops, sampling

    def read(self, path, generator=None):
        clips = self.frames_of(path, lambda n: view_frames(n, self.frames, self.stride, self.times, self.sampling))
        found = []
        for clip in clips:
            clip = transform.resize(clip, [self.size], antialias=False).transpose(0, 1)                     # 3 T H W
            axis = 2 if clip.shape[2] > clip.shape[3] else 3
            free = clip.shape[axis] - self.size
            for crop in range(self.crops):
                start = crop * free // (self.crops - 1) if self.crops > 1 else free // 2
                found.append(clip.narrow(axis, start, self.size))
        return torch.stack(found)


class Order(Sampler):
    """Keys (epoch, index) of this rank's videos: one shuffle for all ranks, new in each epoch, cut into whole steps.

    A step takes multiple * batch videos on each of `world` ranks; an uneven last one is dropped on all ranks alike. The
    videos of a step are the same for every split into ranks. Set `epoch`, and `seen`, the number of its videos that are
    done on all ranks together, before each pass.
    """

    def __init__(self, n, batch, rank=0, world=1, seed=0, multiple=1):
        self.n, self.batch, self.rank, self.world, self.seed = n, batch, rank, world, seed
        self.step, self.epoch, self.seen = batch * world * multiple, 0, 0

    def __len__(self):
        return (self.n - self.seen) // self.step * self.step // self.world

    def __iter__(self):
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2 ** 63)
        order = torch.randperm(self.n, generator=generator)[self.seen:][:len(self) * self.world]
        mine = order.view(-1, self.world, self.batch)[:, self.rank].flatten()
        return ((self.epoch, index) for index in mine.tolist())


def collate(samples):
    """A batch: video (B, 3, T, S, S) uint8, mask (B, N), and for each video label, index and the list of bad ones."""
    video, mask, label, index, bad = zip(*samples)
    return torch.cat(video), torch.cat(mask), torch.tensor(label), torch.tensor(index), bad


def ignore_signals(worker):
    """A signal to stop goes to all processes of a group; the workers must live until the training process has saved."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def kill_workers():
    """Ends loader workers that an error has left behind: they ignore the signal by which Python would end them."""
    for worker in multiprocessing.active_children():
        worker.kill()


def loader(clips, batch, sampler, workers, device="cpu"):
    """A DataLoader of batches as collate makes them."""
    return DataLoader(clips, batch, sampler=sampler, num_workers=workers, collate_fn=collate,
                      worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda")


def in_parallel(work, items, workers, title, unit=" videos"):
    """Yields (item, work(item)) in order, with a progress bar; the work is done by the workers of a DataLoader."""
    results = DataLoader(items, batch_size=None, collate_fn=work, num_workers=workers, worker_init_fn=ignore_signals)
    yield from zip(items, tqdm(results, desc=title, unit=unit, dynamic_ncols=True))


@cache
def channels(values, device):
    """Three numbers as a tensor (3, 1, 1, 1), made once for each device: making one on a GPU waits for it."""
    return torch.tensor(values, device=device)[:, None, None, None]


def normalise(video, device):
    """Video (B, 3, T, H, W) uint8 -> float32 on the device, with ImageNet's mean and deviation taken out."""
    video = video.to(device, non_blocking=True).float().div_(255)
    return video.sub_(channels(IMAGENET_MEAN, device)).div_(channels(IMAGENET_STD, device))


# --- The toy set ------------------------------------------------------------------------------------------------------

TOY_CLASSES = ("0_right", "1_down_right", "2_down", "3_down_left", "4_left", "5_up_left", "6_up", "7_up_right")
TOY_FRAMES, TOY_SIZE, TOY_TRAIN, TOY_VAL = 8, 32, 8192, 1600


def toy_clips(labels, generator):
    """Clips of a shape that drifts in one of eight directions, labels (n,): (n, TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3).

    A lobed, striped shape on a smooth background, all of random looks, on a plane whose opposite edges are joined: its
    place says nothing about its class, so no single frame does. No pixel noise: nothing could predict it.
    """
    n, size = len(labels), TOY_SIZE

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape or (1, 1, 1), generator=generator)

    background = F.interpolate(uniform(0, 1, 3, 2, 2), (size, size), mode="bilinear", align_corners=True)
    direction = labels.view(-1, 1, 1, 1) * math.pi / 4
    travelled = uniform(1.5, 3) * torch.arange(TOY_FRAMES)[:, None, None]                         # in pixels
    pixel = torch.arange(size) + 0.5
    x, y = (position - place - travelled * way for position, place, way in                     # from the shape's centre
            ((pixel, uniform(0, size), direction.cos()), (pixel[:, None], uniform(0, size), direction.sin())))
    x, y = ((distance + size / 2) % size - size / 2 for distance in (x, y))                       # n T 1 S and n T S 1
    radius, angle = (uniform(math.log(7), math.log(18))).exp(), uniform(0, 2 * math.pi)
    along = (x * angle.cos() + y * angle.sin()) / radius                       # in the shape's own coordinates: n T S S
    across = (y * angle.cos() - x * angle.sin()) / radius
    lobes, depth = torch.randint(2, 6, (n, 1, 1, 1), generator=generator), uniform(0.15, 0.35)
    outline = 1 - depth + depth * torch.cos(lobes * torch.atan2(across, along))
    inside = ((outline - along.hypot(across)) * radius + 0.5).clamp(0, 1)                       # an edge one pixel wide
    turn = uniform(0, math.pi)
    stripes = torch.sin(uniform(2, 4) * (along * turn.cos() + across * turn.sin()) + uniform(0, 2 * math.pi))
    texture = uniform(0, 1, 3, 1, 1, 1) + uniform(-0.5, 0.5, 3, 1, 1, 1) * stripes[:, None]       # n 3 T S S
    clip = background[:, :, None].lerp(texture.clamp(0, 1), inside[:, None])
    return (clip * 255).round().byte().permute(0, 2, 3, 4, 1)


def write_video(path, frames, rate=8):
    """Writes frames (T, H, W, 3) uint8 as H.264 in mp4; H and W even."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def render(job):
    """Writes toy clips first, first + 1, ... of a split into its class folders; the same for one seed."""
    folder, first, number, seed = job
    labels = torch.arange(first, first + number) % len(TOY_CLASSES)
    clips = toy_clips(labels, torch.Generator().manual_seed(hash((seed, first)) % 2 ** 63))
    for i, (label, clip) in enumerate(zip(labels, clips), start=first):
        write_video(folder / TOY_CLASSES[label] / f"{i:05}.mp4", clip)


def make_toy(root, seed=0, train=TOY_TRAIN, val=TOY_VAL):
    """Renders the toy set into root/{train,val}/<class>/*.mp4 on all cores, unless root is there already.

    Works in a folder of another name until all is written, so that root is whole or not there.
    """
    root = Path(root)
    if root.is_dir():
        return
    draft, jobs = root.with_name(f"{root.name}.unfinished-{os.getpid()}"), []
    for split, number in (("train", train), ("val", val)):
        for name in TOY_CLASSES:
            (draft / split / name).mkdir(parents=True)
        jobs += [(draft / split, i, min(64, number - i), 2 * seed + (split == "val")) for i in range(0, number, 64)]
    for _ in in_parallel(render, jobs, os.cpu_count(), "rendering the toy set, once", unit=" x 64 clips"):
        pass
    try:
        draft.rename(root)
    except OSError:                                                    # another process was faster: its set is the same
        shutil.rmtree(draft)


# --- Before training: python data.py check, python data.py prepare ----------------------------------------------------

def problem(path, frames, stride):
    """Why a clip of the video at path can't be read, or None."""
    try:
        decode(path, partial(pretraining_frames, frames=frames, stride=stride))
    except VideoError as error:
        return str(error)


def check(data, root, out, workers):
    """Decodes a clip of each video of each split; writes out/<split>.csv, which --data out takes, and out/bad.txt."""
    settings, bad = recipe(data, "base"), []
    reason_of = partial(problem, frames=settings["frames"], stride=settings["stride"])
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        try:
            found = find_videos(data, split, root)
        except UserError:
            if split == "train":
                raise
            continue
        lines, unread = [], []
        results = in_parallel(reason_of, found.paths, workers, f"checking {split}")
        for (path, reason), label in zip(results, found.labels):
            if reason:
                unread.append(f"{path}: {reason}")
            else:
                lines.append(os.path.abspath(path) + f" {label}" * (label >= 0))
        (out / f"{split}.csv").write_text("".join(f"{line}\n" for line in lines))
        bad += found.passed_over + unread
        print(f"{split}: {len(lines):,} good videos in {out / split}.csv, {len(unread):,} unreadable, "
              f"{len(found.passed_over):,} missing or passed over, {found.classes} classes")
    (out / "bad.txt").write_text("".join(f"{line}\n" for line in bad))
    print(f"{len(bad):,} bad ones with the reason in {out / 'bad.txt'}; train with --data {out}")


def re_encode(pair):
    """Writes the video source as H.264 with short side 256, a key frame every 32 frames, no sound: quick to read.

    pair: (source, target). The target's name appears when it is whole. Returns why it can't be done, or None.
    """
    source, target = pair
    draft = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(source), metadata_errors="replace") as old, av.open(str(draft), "w", format="mp4") as new:
            video = video_stream(old)
            scale = 256 / min(video.width, video.height)
            # No frame refers to a B-frame, and three of four are: those that a clip doesn't want needn't be decoded.
            stream = new.add_stream("libx264", rate=video.average_rate, options={
                "preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32", "keyint_min": "32",
                "sc_threshold": "0", "bf": "3", "x264-params": "b-pyramid=none:b-adapt=0"})
            stream.width, stream.height = (max(2, round(side * scale / 2) * 2) for side in (video.width, video.height))
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", video.time_base
            stream.codec_context.thread_count = 1
            for frame in old.decode(video):
                image = scaled(frame, stream.width, stream.height, "yuv420p")
                image.pts, image.time_base, image.pict_type = frame.pts, frame.time_base, 0    # 0: the encoder's choice
                new.mux(stream.encode(image))
            new.mux(stream.encode(None))
        decode(str(draft), lambda n: [0, n - 1])                                        # a last look before it counts
        draft.replace(target)
    except (av.FFmpegError, VideoError, OSError, ValueError, IndexError, ZeroDivisionError, TypeError) as error:
        draft.unlink(missing_ok=True)
        return getattr(error, "strerror", None) or str(error)


def prepare(source, target, workers):
    """re_encode for each video of a folder that the target folder doesn't have yet; lists and tables are copied."""
    if not source.is_dir() or target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"expected a folder of videos and another one, not inside it, found {source} and {target}: "
                        "give python data.py prepare SRC DST")
    pairs = {}
    for path in files_below(source):
        goal = target / path.relative_to(source)
        if path.suffix.lower() in SUFFIXES:
            plain = goal.with_suffix(".mp4")
            pairs[goal.with_name(path.name + ".mp4") if plain in pairs else plain] = path        # a.avi beside a.mp4
        elif path.suffix.lower() in (".csv", ".json", ".txt"):
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, goal)
    left = [(path, goal) for goal, path in pairs.items() if not goal.exists()]
    print(f"{len(pairs):,} videos in {source}, {len(pairs) - len(left):,} of them in {target} already")
    bad = []
    for (path, _), reason in in_parallel(re_encode, left, workers, "preparing"):
        if reason == os.strerror(errno.ENOSPC):
            raise UserError(f"expected room for {target}, found the disk full: make room and start again, it goes on")
        bad += [f"{path}: {reason}\n"] if reason else []
    (target / "bad.txt").write_text("".join(bad))
    print(f"{len(left) - len(bad):,} videos prepared, {len(bad):,} unreadable" + f": {target / 'bad.txt'}" * bool(bad))


def main(argv=None):
    """Runs the command line. Returns the exit code: 0, or 2 for something that the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, names in (("check", ("--data", "--root", "--out")), ("prepare", ("source", "target"))):
        command = tasks.add_parser(task, help=globals()[task].__doc__)
        for name in names:
            command.add_argument(name, **dict(required=True) if name == "--data" else {})
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    given = parser.parse_args(argv)
    try:
        if given.task == "check":
            check(given.data, given.root, Path(given.out or f"out/check-{Path(given.data).stem}"), given.workers)
        else:
            prepare(Path(given.source), Path(given.target), given.workers)
        return 0
    except (UserError, OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        print(f"error: {error or 'stopped'}", file=sys.stderr)
        return 2
    finally:
        kill_workers()


if __name__ == "__main__":
    sys.exit(main())
