"""Videos in, uint8 clips with tube masks out: finding, choosing frames, cropping, loading.

What `--data` and `--root` may name:
    a list      lines `path label`, `path,label` or `path`, which may be quoted; the label is a
                whole number from 0 on, the last field; relative paths start at the list's folder
    a folder    DIR/train/<class>/*.mp4 and DIR/val/<class>/*.mp4, or DIR/<class>/*.mp4, or
                DIR/*.mp4 without labels, or lists DIR/train.csv and DIR/val.csv
Images (.jpg, .png) are clips that stand still. extras/videos.py turns the tables of Kinetics,
Something-Something, UCF101 and HMDB51 into lists. Clips stay uint8 until they are on the GPU.
"""
import os
import re
import sys
from collections import namedtuple
from itertools import count, pairwise
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

from extras import reader
from sigma import IMAGENET_MEAN, IMAGENET_STD, UserError, tube_mask

SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
IMAGES = {".jpg", ".jpeg", ".png"}
TABLES = ("*labels.json", "ucfTrainTestlist", "testTrainMulti*")  # of Something-Something, ...
SPLITS = {"train": ("train", ""), "val": ("val", "test")}  # names of --split to look for, in turn
MAKE_LISTS = "turn it into lists first, see python extras/videos.py lists --help"


def seeded(*numbers):
    """A random generator that the whole numbers determine: 64-bit Pythons hash these alike."""
    return torch.Generator().manual_seed(hash(numbers) % 2 ** 63)


# --- Finding videos -------------------------------------------------------------------------------

def find_videos(source, splits=SPLITS["train"], classes=None, several=False):
    """The videos of a list or folder (layouts: top of this file) as pairs (path, label), -1 for no
    label; the names of its class folders; and what was skipped, each with the reason.

    splits: names to look for in a folder, in turn; "" is the source itself. classes: names of the
    training set's classes; a label is the index in them. several: lists have lines `path 3 17 44`,
    and their labels are tuples. Raises UserError if a folder is not one of the classes, labels
    can't be numbers of classes, or the source itself was looked into and has no videos.
    """
    places = [Path(source, name) for split in splits for name in (f"{split}.csv", split)]
    places, skipped = [Path(source)] if Path(source).is_file() and "" in splits else places, []
    for path in places:
        if path.is_file():
            videos, names = read_list(path, skipped, several), []
        else:
            videos, names = walk_folder(path, classes, skipped)
        if videos:
            if classes is None:
                check_labels(videos, path)
            return videos, names, skipped
    if "" not in splits:
        return [], [], skipped
    what = f"no videos in {source}" if os.path.exists(source) else f"there is no {source}"
    why = f", but {len(skipped)} skipped files or lines, first {skipped[0]}" if skipped else ""
    raise UserError(f"{what}{why}. Give class folders, a folder of videos, a list with lines `path "
                    "label`, or a folder that holds them as train or train.csv")


def read_list(file, skipped, several=False):
    """The videos of a list; lines that name none are skipped, quoted with their number."""
    content, videos = file.read_bytes(), []
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} is UTF-16, as PowerShell's > writes it: save it as UTF-8")
    if content.startswith(b"label,youtube_id"):
        raise UserError(f"{file} is a table of Kinetics: {MAKE_LISTS}")
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    for number, line in enumerate(map(str.strip, lines), start=1):
        path, labels = split_line(line, file.parent)
        if not os.path.isfile(path):
            reason = f"there is no file {path}"
        elif not all(label.isdecimal() or label == "-1" for label in labels):
            reason = "the label is no number"
        elif len(labels) > 1 and not several:
            reason = f"{len(labels)} fields follow the path, not one label"
        else:
            labels = tuple(int(label) for label in labels if label != "-1")
            videos.append((str(path), labels if several else (*labels, -1)[0]))
            continue
        if line:
            skipped.append(f'{file}, line {number}, "{line[:200]}": {reason}')
    return videos


def split_line(line, folder):
    """The path in a line, which may hold spaces and commas, and the fields after it: the
    fewest for which the path is a file; if there is none, at most one."""
    line = re.sub(r'^"(.*?)"(?=[\s,;]|$)', r"\1", line)  # quoted by a spreadsheet
    words = re.split(r"([\s,;]+)", line)  # in turn with what separates them
    for end in range(len(words), 0, -2):
        path = folder / "".join(words[:end])
        names = [path, folder / "".join(words[:end]).replace("\\", "/")]  # of a list from Windows
        if path.suffix.lower() in SUFFIXES:
            names.append(path.with_suffix(".mp4"))  # as extras/videos.py prepare names it
        for name in filter(os.path.isfile, names):
            return name, words[end + 1::2]
    return folder / "".join(words[:-2] or words), words[2:][-1:]


def files_below(folder, skipped, above=()):
    """The files below a folder that have a suffix. Links are followed, but not in circles."""
    try:
        real, entries = os.path.realpath(folder), list(os.scandir(folder))
    except OSError as error:
        skipped += [f"{folder}: {error.strerror}"] if above else []  # source itself need not be
        return []
    if real in above:
        skipped.append(f"{folder}: it leads back to a folder that it is in")
        return []
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    files = [Path(entry.path) for entry in entries if not entry.is_dir() and "." in entry.name]
    for entry in entries:
        files += files_below(entry.path, skipped, {*above, real}) if entry.is_dir() else []
    return files


def walk_folder(folder, classes, skipped):
    """The videos below a folder, and its classes: its sub-folders that contain some, sorted."""
    if any(any(folder.glob(pattern)) for pattern in TABLES):
        raise UserError(f"{folder} has a table of its set: {MAKE_LISTS}")
    files = sorted(files_below(folder, skipped))
    kinds = {kind: [path for path in files if path.suffix.lower() in suffixes and path.is_file()]
             for kind, suffixes in (("videos", SUFFIXES), ("images", IMAGES))}
    kind = max(kinds, key=lambda kind: len(kinds[kind]))  # videos, if there are as many
    videos = [path for path in kinds[kind] if path.parent != folder] or kinds[kind]
    own = SUFFIXES if kind == "videos" else IMAGES
    skipped += [f"{path}: " + (f"most files here are {kind}" if path.suffix.lower() not in own else
                               "it is in no class folder, or no file")
                for path in sorted(set(files) - set(videos))]
    if not videos or videos[0].parent == folder:
        return [(str(path), -1) for path in videos], []
    names = [path.relative_to(folder).parts[0] for path in videos]
    classes = sorted(set(names)) if classes is None else classes
    if unknown := set(names) - set(classes):
        raise UserError(f"{folder} has class folders that the training videos don't have: "
                        f"{', '.join(sorted(unknown)[:5])}")
    return [(str(path), classes.index(name)) for path, name in zip(videos, names)], classes


def check_labels(videos, source):
    """Raises UserError if labels can't be numbers of classes: one of millions, or large gaps."""
    lists = [label if isinstance(label, tuple) else [label] for _, label in videos]
    labels = sorted({-1}.union(*lists))
    gap, n = max((b - a - 1 for a, b in pairwise(labels)), default=0), len(labels) - 1
    if labels[-1] > 1_000_000 or gap > n:
        raise UserError(f"the labels of {source} go up to {labels[-1]:,}, but there are only {n:,}:"
                        " number the classes 0, 1, 2 and so on")


# --- Clips: which frames, which box, which mask ---------------------------------------------------

def pretraining_frames(n, frames, stride, generator=None):
    """Indices of a clip in a video of n frames: a random start, then every stride-th frame; where
    the video ends the last one is held."""
    start = int(torch.randint(max(n - frames * stride, 0) + 1, (1,), generator=generator))
    return [min(start + stride * i, n - 1) for i in range(frames)]


def centre_frames(n, frames, stride, generator=None):
    """The same with the start that puts the clip in the middle."""
    start = max(n - frames * stride, 0) // 2
    return [min(start + stride * i, n - 1) for i in range(frames)]


def decode(path, choose, watch=None):
    """Like reader.decode; images too, as clips that stand still."""
    if Path(path).suffix.lower() not in IMAGES:
        return reader.decode(path, choose, watch)
    image = reader.to_rgb(next(reader.all_frames(path))[1]).permute(2, 0, 1)  # 3 H W
    return [image.expand(len(clip), -1, -1, -1) for clip in choose(1)]


CROP_FACTORS = (1, 0.875, 0.75, 0.66)  # of the short side
CROP_SHAPES = [(h, w) for i, h in enumerate(CROP_FACTORS) for j, w in enumerate(CROP_FACTORS)
               if abs(i - j) <= 1]  # height and width at most one step apart: 10
CROP_PLACES = [(i, j) for i in range(5) for j in range(5) if (i + j) % 2 == 0]  # 13, in quarters


def corner_crop(height, width, generator=None):
    """VideoMAE's and SIGMA's multi-scale corner crop: a random box (top, left, height, width)."""
    shape, place = (options[int(torch.randint(len(options), (1,), generator=generator))]
                    for options in (CROP_SHAPES, CROP_PLACES))
    h, w = (max(1, int(min(height, width) * factor)) for factor in shape)
    return place[0] * ((height - h) // 4), place[1] * ((width - w) // 4), h, w


def centre_crop(height, width, generator=None):
    """The largest square in the middle, as (top, left, height, width)."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def resize_crop(frames, box, size):
    """The box of each frame (T, 3, H, W), resized bilinearly: (3, T, size, size) uint8."""
    return transform.resized_crop(frames, *box, [size, size], antialias=True).transpose(0, 1)


class Clips(Dataset):
    """A clip with its tube mask for each key (position, index): the same in any worker and rank.

    Items are (video (R, 3, T, S, S) uint8, mask (R, N) bool, label, index, bad). bad: the reason by
    path of each video that couldn't be read, in whose place another one came; after `tries` of them
    the clip is black and its label -1. repeat: R, the clips from one pass over a video, each
    with its own place, crop and mask. cache: a dictionary that keeps decoded videos of small sets.
    """

    def __init__(self, videos, *, frames, stride, size, tube=(2, 16, 16), ratio=0.9, repeat=1,
                 choose=pretraining_frames, crop=corner_crop, seed=0, cache=None, tries=10):
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.ratio, self.repeat, self.choose, self.crop = ratio, repeat, choose, crop
        self.grid = (frames // tube[0], size // tube[1], size // tube[2])
        self.seed, self.cache, self.tries = seed, cache, tries

    def __len__(self):
        return len(self.videos)

    def frames_of(self, path, choose, watch=None):
        """The clips (T, 3, H, W) of a video that choose(number of frames) asks for."""
        if self.cache is None:
            return decode(path, choose, watch=watch)
        if path not in self.cache:
            self.cache[path], = decode(path, lambda n: [range(n)], watch=watch)
        return [self.cache[path][clip] for clip in choose(len(self.cache[path]))]

    def read(self, path, generator):
        """Clips (R, 3, T, S, S) and masks (R, N) from one pass over a video. Raises VideoError."""
        clips = self.frames_of(path, lambda n: [
            self.choose(n, self.frames, self.stride, generator) for _ in range(self.repeat)])
        clips = [resize_crop(clip, self.crop(*clip.shape[-2:], generator), self.size)
                 for clip in clips]
        return torch.stack(clips), self.masks(generator)

    def masks(self, generator):
        """R masks (R, N); None if ratio is None: nothing is to be hidden."""
        if self.ratio is not None:
            return tube_mask(self.repeat, self.grid, self.ratio, generator)

    def __getitem__(self, key):
        position, index = key
        generator, bad = seeded(self.seed, position, index), {}
        for _ in range(self.tries):
            path, label = self.videos[index]
            try:
                return *self.read(path, generator), label, index, bad
            except reader.VideoError as error:
                bad[path] = str(error)
                index = int(torch.randint(len(self), (1,), generator=generator))
        black = torch.zeros(self.repeat, 3, self.frames, self.size, self.size, dtype=torch.uint8)
        return black, self.masks(generator), -1, key[1], bad


def endless_order(n, batch, rank=0, world=1, seed=0, start=0):
    """An endless shuffled stream of keys (position, video): all n videos, then all in a new order.

    All ranks together count positions from `start` on, `batch` in turn for each of `world` ranks.
    So what a step sees depends on how far the run is, not on how many processes share it.
    """
    for position in count(start):
        if position == start or position % n == 0:  # a new pass
            order = torch.randperm(n, generator=seeded(seed, position // n)).tolist()
        if (position - start) // batch % world == rank:
            yield position, order[position % n]


Batch = namedtuple("Batch", "video mask labels index bad")


def collate(samples):
    """A Batch of Clips' items: video (B, 3, T, S, S), mask (B, N) or None, labels and indices of
    videos (n,), and all bad videos."""
    video, mask, labels, index, bad = zip(*samples)
    bad = {path: reason for part in bad for path, reason in part.items()}
    mask = None if mask[0] is None else torch.cat(mask)
    return Batch(torch.cat(video), mask, torch.tensor(labels), torch.tensor(index), bad)


def progress(items=None, title=None, total=None, **options):
    """A tqdm bar. Where its output is kept, as in a job's log, it moves rarely, and ends each time
    in a newline: a launcher may hold back a line until then."""
    if sys.stderr is None or not sys.stderr.isatty():
        options |= dict(mininterval=30, maxinterval=30, bar_format="{l_bar}{bar:10}{r_bar}\n")
    return tqdm(items, title, total, dynamic_ncols=True, **options)


def normalise(video, device):
    """Video (B, 3, T, H, W) uint8 -> float32 on the device, normalised with ImageNet's mean and
    standard deviation."""
    video = video.to(device, non_blocking=True).to(torch.float32, copy=True)
    for channel, mean, std in zip(video.unbind(1), IMAGENET_MEAN, IMAGENET_STD):
        channel.sub_(255 * mean).div_(255 * std)  # numbers: a tensor made here would wait for a GPU
    return video
