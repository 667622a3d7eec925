"""Videos in, uint8 clips with tube masks out: finding, decoding, cropping, and a toy set that needs no download.

What `--data` may name (`find_videos`):
    toy                     eight motion classes, rendered once into data/toy as mp4 files
    a folder                FOLDER/<class name>/*.mp4 (any depth below a class), or FOLDER/train/<class name>/*.mp4
    a flat folder           FOLDER/*.mp4: no labels, enough for pretraining
    a list file             a video a line, `path` or `path label`; the label is a whole number and the last field, so
                            paths may hold spaces; relative paths start at the list's own folder
Each video is opened, the wanted frames are decoded and nothing after them, and the clip stays uint8 until it is on the
training device (`normalise`). A video that can't be read raises VideoError; `Clips` takes another one and says so.
"""
import math
import os
import shutil
import signal
from bisect import bisect_right
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

from sigma import IMAGENET_MEAN, IMAGENET_STD, tube_mask

av.logging.set_level(av.logging.FATAL)              # a damaged file is reported once, by us, not line by line by FFmpeg
SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
RETRIES = 10                                          # other clips that are tried in place of one that can't be read


class UserError(Exception):
    """Something that the user can mend; the message says what was expected, what was found and what to do."""


class VideoError(Exception):
    """One video that can't be read; the message says why."""


# --- Finding videos ---------------------------------------------------------------------------------------------------

@dataclass
class Videos:
    """paths, and for each its label (-1: none); what was passed over, each with the reason."""
    paths: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    passed_over: list = field(default_factory=list)

    @property
    def classes(self):
        return len(set(self.labels) - {-1})


def find_videos(source, split="train"):
    """The videos of a folder or a list file (layouts: top of this file). Raises UserError where there are none."""
    source, found = Path(source), Videos()
    try:
        if source.is_file() and source.suffix.lower() not in SUFFIXES:
            read_list(source, found)
        elif source.is_dir():
            source = source / split if (source / split).is_dir() else source
            walk_folder(source, found)
        else:
            what = "a video" if source.is_file() else "nothing"
            raise UserError(f"expected toy, a folder of videos or a list file, found {what} at {source}: "
                            "give a folder, or a text file with a path on each line")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a folder or list that can be read, found {error}: check {source}") from None
    if not found.paths:
        why = f" ({len(found.passed_over)} passed over, first: {found.passed_over[0]})" if found.passed_over else ""
        raise UserError(f"expected videos in {source}, found none{why}: "
                        "give FOLDER/<class>/*.mp4, FOLDER/*.mp4 or a file with lines `path` or `path label`")
    return found


def walk_folder(folder, found):
    """Adds the videos below a folder; the names of its sub-folders are the classes, in alphabetical order."""
    def videos_in(place):
        files = sorted(p for p in place if p.is_file() and not p.name.startswith("."))
        found.passed_over += [f"{p}: not a video by its name" for p in files if p.suffix.lower() not in SUFFIXES]
        return [str(p) for p in files if p.suffix.lower() in SUFFIXES]

    loose = videos_in(folder.iterdir())
    for label, subfolder in enumerate(sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))):
        paths = videos_in(subfolder.rglob("*"))
        found.paths += paths
        found.labels += [label] * len(paths)
    if found.paths:
        found.passed_over += [f"{path}: in no class folder, while others are" for path in loose]
    else:
        found.paths, found.labels = loose, [-1] * len(loose)


def read_list(file, found):
    """Adds the videos of a list file; lines that name none are passed over, quoted with their number."""
    for number, line in enumerate(map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()), start=1):
        path, label = line, "-1"                                                        # no label
        if len(line.split()) > 1 and not os.path.isfile(file.parent / line):
            path, label = line.rsplit(maxsplit=1)
        path = str(file.parent / path)
        if not line:
            continue
        if not os.path.isfile(path):
            found.passed_over.append(f'{file}, line {number}, "{line[:200]}": there is no such file')
        elif label != "-1" and not label.isdecimal():
            found.passed_over.append(f'{file}, line {number}, "{line[:200]}": its label is not a whole number')
        else:
            found.paths.append(path)
            found.labels.append(int(label))


# --- Decoding ---------------------------------------------------------------------------------------------------------

def pretraining_frames(n, frames, stride, generator=None):
    """Indices of a clip in a video of n frames: random start, then every stride-th; past the end the last one."""
    start = int(torch.randint(max(n - frames * stride, 0) + 1, (1,), generator=generator))
    return [min(start + stride * i, n - 1) for i in range(frames)]


def decode(path, choose, indices=None):
    """Frames of a video, (n, 3, H, W) uint8 RGB: those that choose(number of frames) -> ascending indices asks for.

    Frame i is the last one shown at or before i / rate seconds after the first, which is the i-th where the rate is
    constant. Many files know the number of their frames only roughly: where one ends sooner, its last frame is held.
    Raises VideoError with the reason. With indices, which choose has given before, it reads from the file's beginning.
    """
    try:
        with av.open(path, metadata_errors="replace") as container:                   # closed whatever happens: no leak
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams or streams[0].codec_context is None:
                raise VideoError("it has no video stream of a known codec")
            stream = streams[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1       # workers are parallel, not decoders
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
    images = {frame.pts: to_rgb(frame, chosen[0].width, chosen[0].height) for frame in chosen}
    return [images[frame.pts] for frame in chosen]


reformatter = None


def to_rgb(frame, width, height):
    """A decoded frame as (height, width, 3) uint8, on one thread: the default is one for each core, each time."""
    global reformatter                             # one in each worker process: threads of its own don't survive a fork
    reformatter = reformatter or VideoReformatter()
    return torch.from_numpy(reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray())


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
    return frames.transpose(0, 1).contiguous()


class Clips(Dataset):
    """A clip with its tube mask for each key (epoch, index): the same key gives the same clip, on whichever worker.

    Items are (video (3, T, S, S) uint8, mask (N,) bool, label, index, bad): bad holds the [path, reason] of videos that
    couldn't be read, in whose place the clip comes from another one. After RETRIES of them the clip is black.
    crop: corner_crop or centre_crop. cache: a dict that keeps decoded videos, for sets that fit into memory.
    """

    def __init__(self, videos, *, frames, stride, size, tube, ratio, crop=corner_crop, seed=0, cache=None):
        if frames % tube[0] or size % tube[1] or size % tube[2]:
            raise UserError(f"expected --frames and --size divisible by the tube {tuple(tube)}, found {frames} and "
                            f"{size}: take multiples")
        self.videos, self.size, self.ratio, self.crop, self.seed, self.cache = videos, size, ratio, crop, seed, cache
        self.grid = (frames // tube[0], size // tube[1], size // tube[2])
        if int(ratio * self.grid[1] * self.grid[2]) == 0:
            raise UserError(f"expected clips of which {ratio:.0%} can be hidden, found {self.grid[1]} x {self.grid[2]} "
                            "tubes in a frame: take a larger --size")
        self.frames, self.stride, self.tube = frames, stride, tube

    def __len__(self):
        return len(self.videos.paths)

    def read(self, path, generator):
        """One clip of the video at path, (3, T, size, size) uint8. Raises VideoError."""
        choose = partial(pretraining_frames, frames=self.frames, stride=self.stride, generator=generator)
        if self.cache is None:
            frames = decode(path, choose)
        else:
            if path not in self.cache:
                self.cache[path] = decode(path, range)
            frames = self.cache[path]
            frames = frames[choose(len(frames))]
        return resize_crop(frames, self.crop(*frames.shape[-2:], generator), self.size)

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, index)) % 2 ** 63)
        mask, bad = tube_mask(1, self.grid, self.ratio, generator)[0], []
        while len(bad) < RETRIES:
            path = self.videos.paths[index]
            try:
                return self.read(path, generator), mask, self.videos.labels[index], index, bad
            except VideoError as error:
                bad.append([path, str(error)])
                index = int(torch.randint(len(self), (1,), generator=generator))
        return torch.zeros(3, self.frames, self.size, self.size, dtype=torch.uint8), mask, -1, index, bad


class Order(Sampler):
    """Keys (epoch, index) of this rank's clips: one shuffle for all ranks, new in each epoch, cut into whole steps.

    A step takes `batch` clips on each of `world` ranks; the last, uneven one is dropped on all ranks alike.
    Set `epoch`, and `start` to the number of steps of it that are done, before each pass.
    """

    def __init__(self, n, batch, rank=0, world=1, seed=0, multiple=1):
        self.n, self.batch, self.rank, self.world, self.seed = n, batch, rank, world, seed
        self.steps, self.epoch, self.start = n // (batch * world * multiple) * multiple, 0, 0

    def __len__(self):
        return (self.steps - self.start) * self.batch

    def __iter__(self):
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2 ** 63)
        order = torch.randperm(self.n, generator=generator)[:self.steps * self.world * self.batch]
        mine = order.view(self.steps, self.world, self.batch)[self.start:, self.rank].flatten()
        return ((self.epoch, index) for index in mine.tolist())


def collate(samples):
    """A batch: video (B, 3, T, S, S) uint8, mask (B, N), label (B,), index (B,), and the list of bad videos."""
    video, mask, label, index, bad = zip(*samples)
    return torch.stack(video), torch.stack(mask), torch.tensor(label), torch.tensor(index), bad


def ignore_signals(worker):
    """A signal to stop goes to all processes of a group; the workers must live until the training process has saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def loader(clips, batch, sampler, workers, device="cpu"):
    """A DataLoader of batches as collate makes them."""
    return DataLoader(clips, batch, sampler=sampler, num_workers=workers, collate_fn=collate,
                      worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda")


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


def write_png(path, image):
    """Writes an image (3, H, W) uint8."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *image.shape[1:], "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    Path(path).write_bytes(b"".join(map(bytes, encoder.encode(frame) + encoder.encode(None))))


def make_toy(root, seed=0, train=TOY_TRAIN, val=TOY_VAL):
    """Renders the toy set into root/{train,val}/<class>/*.mp4, the same for one seed, unless root is there already.

    Works in a folder of another name until all is written, so that root is whole or not there.
    """
    root = Path(root)
    if root.is_dir():
        return
    draft = root.with_name(f"{root.name}.unfinished-{os.getpid()}")
    with tqdm(total=train + val, desc="rendering the toy set, once", unit=" clips") as bar:
        for part, (split, number) in enumerate((("train", train), ("val", val))):
            generator = torch.Generator().manual_seed(2 * seed + part)
            for name in TOY_CLASSES:
                (draft / split / name).mkdir(parents=True)
            for first in range(0, number, 256):
                labels = torch.arange(first, min(first + 256, number)) % len(TOY_CLASSES)
                for i, clip in enumerate(toy_clips(labels, generator), start=first):
                    write_video(draft / split / TOY_CLASSES[labels[i - first]] / f"{i:05}.mp4", clip)
                bar.update(len(labels))
    try:
        draft.rename(root)
    except OSError:                                                    # another process was faster: its set is the same
        shutil.rmtree(draft)
