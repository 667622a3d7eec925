"""The clips of fine-tuning: which videos, frames and crops, and how they are distorted and mixed.

What VideoMAE (Tong et al., NeurIPS 2022), and SIGMA after it, trains and tests classifiers with:
    training_clips   frames evenly from a random window, as for Kinetics (Wang et al., Non-local
                     Neural Networks, CVPR 2018), or a random one of each of equal parts, as for
                     Something-Something (Wang et al., TSN, ECCV 2016); crops of random area and
                     shape (Szegedy et al., Inception, CVPR 2015)
    augment          RandAugment (Cubuk et al., NeurIPS 2020), random erasing (Zhong et al., AAAI
                     2020), mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019)
    test_clips       several clips in time, several crops of each

The functions of frames take the number of frames of a video, those of a clip, the stride between
them, and a generator; they return indices. Only extras/finetune.py uses this file. To copy it: it
needs `Clips`, `centre_crop` and `seeded` of data.py, and ImageNet's mean and deviation.
"""
import math
from functools import partial

import torch
from torchvision.transforms import RandomResizedCrop, v2

from data import Clips, centre_crop, seeded
from sigma import IMAGENET_MEAN, IMAGENET_STD


# --- Videos and frames ----------------------------------------------------------------------------

def limit(videos, number, seed):
    """A random choice of `number` videos; classes have equal shares, or differ by one video."""
    turn, seen = {}, {}
    for i in torch.randperm(len(videos), generator=seeded(seed)).tolist():
        label = videos[i][1]
        turn[i] = seen[label] = seen.get(label, 0) + 1
    return [videos[i] for i in sorted(turn, key=turn.get)[:number]]


def label_table(videos, tests):
    """Videos with several labels, (path, (3, 17, 44)) -> both as (path, row), and the table whose
    rows these are: 0 and 1 (videos, classes)."""
    both = videos + tests
    table = torch.zeros(len(both), 1 + max(max(labels, default=0) for _, labels in both))
    for row, (_, labels) in zip(table, both):
        row[list(labels)] = 1
    rows = [(path, i) for i, (path, _) in enumerate(both)]
    return rows[:len(videos)], rows[len(videos):], table


def dense_frames(n, frames, stride, generator=None):
    """Evenly over a window of frames * stride at a random place; of a shorter video a frame for
    each stride, then its last."""
    window, number = min(n, frames * stride), min(n // stride, frames)
    start = int(torch.randint(max(n - window, 1), (1,), generator=generator))
    step = window / max(number - 1, 1)
    chosen = [min(int(start + i * step), start + window - 1) for i in range(number)]
    return chosen + [n - 1] * (frames - number)


def segment_frames(n, frames, stride, generator=None):
    """A random frame of each of `frames` equal parts of the video; stride has no part in it."""
    part = n // frames
    if part == 0:
        return [i * n // frames for i in range(frames)]
    return [i * part + int(torch.randint(part, (1,), generator=generator)) for i in range(frames)]


def spread(number, free):
    """Starts of `number` windows, evenly over `free` positions; a single one is in the middle."""
    return [i * free // (number - 1) for i in range(number)] if number > 1 else [free // 2]


def view_frames(n, frames, stride, views, sampling):
    """Indices for each of so many test views in time. sampling: "dense" or "segments"."""
    if sampling == "segments":  # start and middle of each segment, in turns; one view: the middle
        offsets = [view / views for view in range(views)] if views > 1 else [0.5]
        return [[int((i + offset) * n / frames) for i in range(frames)] for offset in offsets]
    every = range(0, n, stride)
    return [[every[min(start + i, len(every) - 1)] for i in range(frames)]
            for start in spread(views, max(len(every) - frames, 0))]


# --- Crops ----------------------------------------------------------------------------------------

def random_crop(height, width, generator):
    """A random box (top, left, height, width) of 8 to 100% of the area, sides 3:4 to 4:3. Seeds
    torch's global generator, from which torchvision draws it."""
    torch.manual_seed(int(torch.randint(2 ** 62, (1,), generator=generator)))
    return RandomResizedCrop.get_params(torch.empty(1, height, width), (0.08, 1), (3 / 4, 4 / 3))


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


# --- Data sets ------------------------------------------------------------------------------------

def training_clips(videos, sampling, augmented, **options):
    """Clips to train on. sampling: "dense" or "segments"; augmented: random crops, for `augment`,
    else the centre's; options: those of Clips."""
    return Clips(videos, **options, crop=random_crop if augmented else centre_crop,
                 choose=dense_frames if sampling == "dense" else segment_frames)


def test_clips(videos, sampling, clips, crops, **options):
    """Views of videos to test on: so many crops of each of so many clips."""
    return Views(videos, **options, repeat=clips * crops, tries=1,
                 choose=partial(view_frames, views=clips, sampling=sampling))


# --- Distorting and mixing ------------------------------------------------------------------------

def readable(batch, repeat, table=None):
    """Drops clips that stand in for unreadable videos. Returns clips (n, 3, T, S, S), their labels,
    (n,) or rows of the table (n, classes), and whether any clip is real: if none is, all come back
    with meaningless labels, for a loss times 0. On the CPU: no GPU has to be waited for."""
    video, labels = batch.video, batch.labels.repeat_interleave(repeat)
    found = labels >= 0
    if 0 < found.sum() < len(found):
        video, labels = video[found], labels[found]
    labels = labels.clamp(min=0)
    return video, labels if table is None else table[labels], bool(found.any())


def augment(video, labels, classes, flip):
    """Clips (B, 3, T, S, S) uint8, labels on the CPU, (B,) or 0 and 1 (B, classes) -> normalised
    clips, class shares (B, classes). Flip, RandAugment and the erased box are shared by all frames
    of a clip, the noise in the box is each frame's own; mixup or cutmix joins pairs of clips.
    RandAugment: four operations, each with probability 1/2, of strength 6.4, 7 or 7.6 in 10 (64 to
    76 in 101 bins), for a normal distribution around 7 with a deviation of 0.5."""
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
