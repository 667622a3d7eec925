"""Videos in, uint8 clips with tube masks out: finding, decoding, cropping, loading; a toy set.

What `--data` and `--root` may name:
    a list         lines `path label` or `path`; the label is a whole number and the last field, so
                   paths may hold spaces; relative paths start at the list's folder
    a folder       DIR/train/<class>/*.mp4 and DIR/val/<class>/*.mp4, or DIR/<class>/*.mp4, or
                   DIR/*.mp4 without labels, or lists DIR/train.csv and DIR/val.csv
Images (.jpg, .png) are clips that stand still. The tables of Kinetics, Something-Something, UCF101
and HMDB51 are turned into lists once, by extras/videos.py.

Only the frames of a clip are decoded and converted, and a clip stays uint8 until it is on the
training device. A video that can't be read is named and counted, and another takes its place.
"""
import ctypes
import itertools
import math
import multiprocessing
import os
import shutil
import signal
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

from sigma import IMAGENET_MEAN, IMAGENET_STD, UserError, tube_mask

av.logging.set_level(av.logging.FATAL)  # a damaged file is reported once, by us
SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
IMAGES = {".jpg", ".jpeg", ".png"}
RETRIES = 10  # other videos that are tried in place of one that can't be read


class VideoError(Exception):
    """A video that can't be read; the message says why."""


def seeded(*numbers):
    """A random generator that the whole numbers determine."""
    return torch.Generator().manual_seed(hash(numbers) % 2 ** 63)


# --- Finding videos -------------------------------------------------------------------------------

@dataclass
class Videos:
    """Paths, and a label for each (-1: none); names of the classes, if folders name them; what was
    skipped, each with the reason."""
    paths: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    classes: list = field(default_factory=list)
    skipped: list = field(default_factory=list)

    def take(self, indices):
        """Those at the indices alone."""
        return Videos([self.paths[i] for i in indices], [self.labels[i] for i in indices],
                      self.classes, self.skipped)

    def spread(self, most):
        """At most so many, evenly from the whole list."""
        return self.take(range(0, len(self.paths), math.ceil(len(self.paths) / most) or 1))


def find_videos(source, splits=("train", ""), classes=None, required=True):
    """The Videos of a list or folder (layouts: top of this file).

    splits: names to look for in a folder, in turn; "" is the folder itself. classes: names that
    number the class folders, those of the training videos; an unknown one stops. required: whether
    finding none is an error. Raises UserError.
    """
    source, found = Path(source), Videos()
    try:
        if source.is_file() and "" in splits:
            read_list(source, found)
        for name in splits if source.is_dir() else ():
            if name and (source / f"{name}.csv").is_file():
                read_list(source / f"{name}.csv", found)
            elif (source / name).is_dir() and not found.paths:
                walk_folder(source / name, found, classes)
            if found.paths:
                break
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} can't be read: {error}") from error
    if not found.paths and required:
        what = f"no videos in {source}" if source.exists() else f"there is no {source}"
        skipped = f", but {len(found.skipped)} skipped, first {found.skipped[:1]}"
        raise UserError(f"{what}{skipped if found.skipped else ''}. Give class folders, a folder "
                        "of videos, or a list with lines `path label`; a folder may also hold them "
                        f"as {' or '.join(f'{name}, {name}.csv' for name in splits if name)}")
    return found


def files_below(folder):
    """All files below a folder, sorted; links are followed, names with a dot first left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            yield from files_below(entry.path) if entry.is_dir() else [Path(entry.path)]


def walk_folder(folder, found, classes=None):
    """Adds the videos below a folder; its sub-folders are the classes, numbered by name."""
    for pattern in ("*labels.json", "ucfTrainTestlist", "testTrainMulti*"):
        if any(folder.glob(pattern)):
            raise UserError(f"{folder} has tables of its own, {pattern}: turn them into lists, see "
                            "python extras/videos.py lists --help")
    files = list(files_below(folder))
    kinds = SUFFIXES if any(path.suffix.lower() in SUFFIXES for path in files) else IMAGES
    videos = [path for path in files if path.suffix.lower() in kinds and path.is_file()]
    in_classes = [path for path in videos if path.parent != folder]
    found.paths = [str(path) for path in in_classes or videos]
    found.labels = [-1] * len(found.paths)
    found.skipped += [f"{path}: not a video, by its name or place"
                      for path in sorted(set(files) - set(in_classes or videos))]
    if in_classes:
        names = [path.relative_to(folder).parts[0] for path in in_classes]
        found.classes = sorted(set(names)) if classes is None else classes
        if unknown := sorted(set(names) - set(found.classes)):
            raise UserError(f"{folder} has class folders that the training videos don't have: "
                            f"{', '.join(unknown[:5])}")
        number = {name: label for label, name in enumerate(found.classes)}
        found.labels = [number[name] for name in names]


def read_list(file, found):
    """Adds the videos of a list; lines that name none are skipped, quoted with their number."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    if lines and lines[0].startswith("label,youtube_id"):
        raise UserError(f"{file} is a table of Kinetics: turn it into a list first, see python "
                        "extras/videos.py lists --help")
    for number, line in enumerate(map(str.strip, lines), start=1):
        path, label = line, "-1"
        if len(line.split()) > 1 and not (file.parent / line).is_file():
            path, label = line.rsplit(maxsplit=1)
        path = file.parent / path
        if path.suffix and not path.is_file():
            path = path.with_suffix(".mp4")  # as extras/videos.py prepare names it
        if path.is_file() and (label == "-1" or label.isdecimal()):
            found.paths.append(str(path))
            found.labels.append(int(label))
        elif line:
            reason = "the label is no number" if path.is_file() else "there is no such file"
            found.skipped.append(f'{file}, line {number}, "{line[:200]}": {reason}')


# --- Decoding -------------------------------------------------------------------------------------

def pretraining_frames(n, frames, stride, generator=None):
    """Indices of a clip in a video of n frames: a random start, then every stride-th frame; where
    the video ends the last one is held."""
    start = int(torch.randint(max(n - frames * stride, 0) + 1, (1,), generator=generator))
    return [min(start + stride * i, n - 1) for i in range(frames)]


def centre_frames(n, frames, stride, generator=None):
    """The same with the start that puts the clip in the middle."""
    start = max(n - frames * stride, 0) // 2
    return [min(start + stride * i, n - 1) for i in range(frames)]


def decode(path, choose, indices=None, watch=None):
    """The frames that choose(number of frames) -> ascending indices asks for: (n, 3, H, W) uint8.

    Frame i is the last one shown by i / rate seconds after the first, which is the i-th if the rate
    is constant. Many files know only roughly how many frames they have: where one ends sooner, its
    last frame is held. With indices, chosen before, it reads from the file's beginning.
    watch(frame, position) is called with each decoded frame, motion vectors included, and its place
    in frames from the first. Raises VideoError with the reason.
    """
    try:
        if Path(path).suffix.lower() in IMAGES:
            with open(path, "rb") as file, av.open(file) as container:  # a name may hold a %
                image = to_rgb(next(container.decode(video_stream(container))))
            return image.permute(2, 0, 1).expand(len(choose(1)), -1, -1, -1)
        with av.open(path, metadata_errors="replace") as container:  # closed whatever happens
            stream = video_stream(container)
            if watch:
                stream.codec_context.options = {"flags2": "+export_mvs"}
            packets = (packet for packet in container.demux(stream) if packet.size)
            first = next(packets, None)
            if first is None or first.pts is None:
                raise VideoError("it holds no frames with time stamps")
            # The first packet holds the first frame, unless an edit list cuts it off.
            origin, frames = first.pts, stream.frames
            if first.is_discard:
                origin, frames = stream.start_time, 0
            step = 1 / (stream.average_rate * stream.time_base)  # from frame to frame, in ticks
            seek = indices is None
            if seek:
                length = stream.duration or (container.duration or 0) / (av.time_base
                                                                         * stream.time_base)
                # Some webm files tell neither frames nor duration: count packets, undecoded.
                indices = choose(frames or round(length / step) or 1 + sum(1 for _ in packets))
            # Time stamps are rounded to ticks: forgive one, but never as much as half a frame.
            times = [float(origin + index * step + min(1, step / 2)) for index in indices]
            if seek:
                container.seek(int(times[0]), stream=stream)  # to the key frame before the clip
                packets = (packet for packet in container.demux(stream) if packet.size)
                first = next(packets, None)
                at_key = first and first.is_keyframe and first.pts is not None
                if not at_key or first.pts > times[0]:  # some formats seek elsewhere
                    return decode(path, choose, indices, watch)
            # A packet is never shown before its dts: stop reading behind the last wanted frame.
            wanted = [first]
            while packet := next(packets, None):
                wanted.append(packet)
                if packet.dts is not None and packet.dts > times[-1]:
                    break
            see = watch and (lambda frame: watch(frame, float((frame.pts - origin) / step)))
            return torch.stack(decode_packets(stream, wanted, times, see)).permute(0, 3, 1, 2)
    except (av.FFmpegError, OSError, ValueError, IndexError, ZeroDivisionError, TypeError,
            StopIteration) as error:
        reason = getattr(error, "strerror", None) or error or "it holds no frames"
        raise VideoError(f"it can't be read: {reason}") from error


def video_stream(container):
    """The first stream that is a video and no cover picture; decoded by one thread, as workers are
    parallel themselves."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic and stream.codec_context:
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            return stream
    raise VideoError("it has no video stream of a known codec")


def decode_packets(stream, packets, times, see=None):
    """For each of the ascending times the last frame shown by then, (H, W, 3) uint8. see(frame) is
    called with each decoded frame."""
    shown = sorted(packet.pts for packet in packets if packet.pts is not None)
    wanted = {shown[max(bisect_right(shown, time) - 1, 0)] for time in times} if shown else {}
    # A frame that is neither wanted nor referred to needs no decoding. This takes packets that all
    # tell their time, and a decoder that minds the setting packet by packet (dav1d does not).
    context, chosen, last = stream.codec_context, [], None
    complete = len(shown) == len(packets) and context.name in ("h264", "hevc")
    unwanted = "NONREF" if complete else "DEFAULT"

    def frames():
        for packet in packets:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else unwanted
            yield from packet.decode()
        yield from context.decode(None)  # those that the decoder still holds back

    for frame in frames():
        if frame.pts is None:
            raise VideoError("it holds frames without time stamps")
        if see:
            see(frame)
        while last is not None and len(chosen) < len(times) and frame.pts > times[len(chosen)]:
            chosen.append(last)
        if len(chosen) == len(times):
            break
        last = frame
    if last is None:
        raise VideoError("none of its frames can be decoded")
    chosen += [last] * (len(times) - len(chosen))  # the video ends: its last frame is held
    size = chosen[0].width, chosen[0].height
    images = {frame.pts: to_rgb(frame, *size) for frame in chosen}  # convert each frame once
    return [images[frame.pts] for frame in chosen]


reformatter = None


def reformat(frame, width, height, pixel_format):
    """A decoded frame in another size and pixel format, on one thread (default: all, each time)."""
    global reformatter  # made in each worker: threads of its own would not survive a fork
    reformatter = reformatter or VideoReformatter()
    return reformatter.reformat(frame, width, height, pixel_format, threads=1)


def to_rgb(frame, width=None, height=None):
    """A decoded frame as (H, W, 3) uint8."""
    frame = reformat(frame, width or frame.width, height or frame.height, "rgb24")
    return torch.from_numpy(frame.to_ndarray())


# --- Clips ----------------------------------------------------------------------------------------

CROP_FACTORS = (1, 0.875, 0.75, 0.66)  # of the short side
CROP_SHAPES = [(CROP_FACTORS[i], CROP_FACTORS[j]) for i in range(4) for j in range(4)
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
    if box != (0, 0, size, size) or frames.shape[-2:] != (size, size):
        frames = transform.resized_crop(frames, *box, [size, size], antialias=True)
    return frames.transpose(0, 1)


class Clips(Dataset):
    """A clip with its tube mask for each key (position, index): the same in any worker and rank.

    Items are (video (R, 3, T, S, S) uint8, mask (R, N) bool, label, index, bad). bad: a pair (path,
    reason) for each video that couldn't be read, in whose place another one came; after `tries` of
    them the clip is black and its label -1. repeat: R, the clips from one pass over a video, each
    with its own place, crop and mask. cache: a dictionary that keeps decoded videos of small sets.
    """

    def __init__(self, videos, *, frames, stride, size, tube=(2, 16, 16), ratio=0.9, repeat=1,
                 choose=pretraining_frames, crop=corner_crop, seed=0, cache=None, tries=RETRIES):
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.ratio, self.repeat, self.choose, self.crop = ratio, repeat, choose, crop
        self.grid = (frames // tube[0], size // tube[1], size // tube[2])
        self.seed, self.cache, self.tries = seed, cache, tries

    def __len__(self):
        return len(self.videos.paths)

    def frames_of(self, path, choose, watch=None):
        """The frames (T, 3, H, W) of each list of indices in choose(number of frames)."""
        if self.cache is not None:
            if path not in self.cache:
                self.cache[path] = decode(path, range, watch=watch)
            frames = self.cache[path]
            return [frames[clip] for clip in choose(len(frames))]
        clips = []

        def union(n):
            clips.extend(choose(n))
            return sorted(set().union(*clips))

        frames = decode(path, union, watch=watch)
        place = {index: i for i, index in enumerate(sorted(set().union(*clips)))}
        return [frames[[place[index] for index in clip]] for clip in clips]

    def read(self, path, generator):
        """Clips (R, 3, T, S, S) and masks (R, N) from one pass over a video. Raises VideoError."""
        clips = self.frames_of(path, lambda n: [
            self.choose(n, self.frames, self.stride, generator) for _ in range(self.repeat)])
        clips = [resize_crop(clip, self.crop(*clip.shape[-2:], generator), self.size)
                 for clip in clips]
        return torch.stack(clips), tube_mask(self.repeat, self.grid, self.ratio, generator)

    def __getitem__(self, key):
        position, index = key
        generator, bad = seeded(self.seed, position, index), []
        while len(bad) < self.tries:
            path = self.videos.paths[index]
            try:
                return *self.read(path, generator), self.videos.labels[index], index, bad
            except VideoError as error:
                bad.append((path, str(error)))
                if self.tries > 1:
                    index = int(torch.randint(len(self), (1,), generator=generator))
        black = torch.zeros(self.repeat, 3, self.frames, self.size, self.size, dtype=torch.uint8)
        return black, tube_mask(self.repeat, self.grid, self.ratio, generator), -1, index, bad


class EndlessSampler(Sampler):
    """Keys (position, video) for ever: all n videos in a new order, then again in another one.

    All ranks together count positions from `start` on, `batch` in turn for each of `world` ranks.
    So what a step sees depends on how far the run is, not on how many processes share it.
    """

    def __init__(self, n, batch, rank=0, world=1, seed=0, start=0):
        self.n, self.batch, self.rank, self.world = n, batch, rank, world
        self.seed, self.start = seed, start

    def __iter__(self):
        passed, order = -1, []
        for base in itertools.count(self.start + self.rank * self.batch, self.world * self.batch):
            for position in range(base, base + self.batch):
                if position // self.n != passed:
                    passed = position // self.n
                    order = torch.randperm(self.n, generator=seeded(self.seed, passed)).tolist()
                yield position, order[position % self.n]


def collate(samples):
    """A batch: video (B, 3, T, S, S), mask (B, N), labels and indices of videos, lists of bad."""
    video, mask, label, index, bad = zip(*samples)
    return torch.cat(video), torch.cat(mask), torch.tensor(label), torch.tensor(index), bad


def start_worker(worker):
    """Signals to stop go to a whole group of processes, but workers must live until the training
    process has saved; and they must not outlive it."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG: killed when the parent ends


def kill_workers():
    """Ends loader workers that an error has left behind: they ignore Python's own signal."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for another error
    for worker in multiprocessing.active_children():
        worker.kill()


def loader(clips, batch, sampler, workers, device="cpu"):
    """A DataLoader of batches as collate makes them."""
    return DataLoader(clips, batch, sampler=sampler, num_workers=workers, collate_fn=collate,
                      worker_init_fn=start_worker, pin_memory=torch.device(device).type == "cuda")


def open_videos():
    """The videos that loader workers have open at the moment, where /proc tells (Linux)."""
    links = [link for worker in multiprocessing.active_children()
             for link in Path(f"/proc/{worker.pid}/fd").glob("*")]
    files = {os.path.realpath(link) for link in links}
    return sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES)


def in_parallel(work, items, workers, title, unit=" videos"):
    """Yields (item, work(item)) in order, with a progress bar; worker processes do the work."""
    results = DataLoader(items, batch_size=None, collate_fn=work, num_workers=workers,
                         worker_init_fn=start_worker)
    yield from zip(items, tqdm(results, desc=title, unit=unit, dynamic_ncols=True))


def normalise(video, device):
    """Video (B, 3, T, H, W) uint8 -> float32 on the device, normalised with ImageNet's mean and
    standard deviation."""
    video = video.to(device, non_blocking=True).to(torch.float32, copy=True)
    for channel, mean, std in zip(video.unbind(1), IMAGENET_MEAN, IMAGENET_STD):
        channel.sub_(255 * mean).div_(255 * std)  # numbers: a tensor made here would wait for a GPU
    return video


# --- The toy set ----------------------------------------------------------------------------------

TOY_CLASSES = ("0_right", "1_down_right", "2_down", "3_down_left", "4_left", "5_up_left", "6_up",
               "7_up_right")
TOY_FRAMES, TOY_SIZE, TOY_TRAIN, TOY_VAL = 8, 32, 8192, 1600


def toy_clips(labels, generator):
    """Clips (n, TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3) uint8 of a shape that drifts in one of eight
    directions, labels (n,).

    A lobed, striped shape of random looks on a smooth background, on a plane whose opposite edges
    are joined: no single frame tells the class. No pixel noise, since nothing could predict it.
    """
    n, size = len(labels), TOY_SIZE

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape or (1, 1, 1), generator=generator)

    background = F.interpolate(uniform(0, 1, 3, 2, 2), (size, size), mode="bilinear",
                               align_corners=True)
    direction = labels.view(-1, 1, 1, 1) * math.pi / 4
    travelled = uniform(1.5, 3) * torch.arange(TOY_FRAMES)[:, None, None]  # pixels
    pixel = torch.arange(size) + 0.5
    x = pixel - uniform(0, size) - travelled * direction.cos()  # from the shape's centre: n T 1 S
    y = pixel[:, None] - uniform(0, size) - travelled * direction.sin()  # n T S 1
    x, y = ((distance + size / 2) % size - size / 2 for distance in (x, y))  # the joined edges
    radius, angle = uniform(math.log(7), math.log(18)).exp(), uniform(0, 2 * math.pi)
    along = (x * angle.cos() + y * angle.sin()) / radius  # in the shape's own coordinates: n T S S
    across = (y * angle.cos() - x * angle.sin()) / radius
    lobes, depth = torch.randint(2, 6, (n, 1, 1, 1), generator=generator), uniform(0.15, 0.35)
    outline = 1 - depth + depth * torch.cos(lobes * torch.atan2(across, along))
    inside = ((outline - along.hypot(across)) * radius + 0.5).clamp(0, 1)  # edge: one pixel wide
    turn = uniform(0, math.pi)
    stripes = torch.sin(uniform(2, 4) * (along * turn.cos() + across * turn.sin())
                        + uniform(0, 2 * math.pi))
    texture = uniform(0, 1, 3, 1, 1, 1) + uniform(-0.5, 0.5, 3, 1, 1, 1) * stripes[:, None]
    clip = background[:, :, None].lerp(texture.clamp(0, 1), inside[:, None])  # n 3 T S S
    return (clip * 255).round().byte().permute(0, 2, 3, 4, 1)


def write_video(path, frames, rate=8):
    """Writes frames (T, H, W, 3) uint8 as H.264 in mp4; H and W even."""
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "10", "x264-params": "partitions=all:subme=2"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def render(job):
    """Writes toy clips first, first + 1, ... of a split into its class folders."""
    folder, first, number, seed = job
    labels = torch.arange(first, first + number) % len(TOY_CLASSES)
    for i, (label, clip) in enumerate(zip(labels, toy_clips(labels, seeded(seed, first))), first):
        write_video(folder / TOY_CLASSES[label] / f"{i:05}.mp4", clip)


def make_toy(root, seed=0, train=TOY_TRAIN, val=TOY_VAL):
    """Renders the toy set into root/{train,val}/<class>/*.mp4 on all cores, unless it is there.

    It works in a folder of another name until all is written: root is complete or not there.
    """
    root = Path(root)
    if root.is_dir():
        return
    draft, jobs = root.with_name(f"{root.name}.unfinished-{os.getpid()}"), []
    for split, number in (("train", train), ("val", val)):
        for name in TOY_CLASSES:
            (draft / split / name).mkdir(parents=True)
        jobs += [(draft / split, i, min(64, number - i), 2 * seed + (split == "val"))
                 for i in range(0, number, 64)]
    for _ in in_parallel(render, jobs, os.cpu_count(), "rendering the toy set", " x 64 clips"):
        pass
    try:
        draft.rename(root)
    except OSError:  # another process was faster: its set is the same
        shutil.rmtree(draft)
