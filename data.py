"""Videos in, uint8 clips with tube masks out: finding, decoding, cropping, loading; a toy set.

What `--data` and `--root` may name:
    a list      lines `path label` or `path`; the label is a whole number and the last field, so
                paths may hold spaces; relative paths start at the list's folder
    a folder    DIR/train/<class>/*.mp4 and DIR/val/<class>/*.mp4, or DIR/<class>/*.mp4, or
                DIR/*.mp4 without labels, or lists DIR/train.csv and DIR/val.csv
Images (.jpg, .png) are clips that stand still. extras/videos.py turns the tables of Kinetics,
Something-Something, UCF101 and HMDB51 into lists. Only a clip's frames are decoded, and it stays
uint8 until it is on the training device.
"""
import ctypes
import glob
import itertools
import math
import multiprocessing
import os
import shutil
import signal
from bisect import bisect_left, bisect_right
from functools import cache
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transform
from tqdm import tqdm

from sigma import IMAGENET_MEAN, IMAGENET_STD, RunError, UserError, tube_mask

av.logging.set_level(av.logging.FATAL)  # a damaged file is reported once, by us
SUFFIXES = set(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .ts .mts .wmv .flv .3gp .ogv".split())
IMAGES = {".jpg", ".jpeg", ".png"}
TABLES = ("*labels.json", "ucfTrainTestlist", "testTrainMulti*")  # of Something-Something, ...
MAKE_LISTS = "turn it into lists first, see python extras/videos.py lists --help"


class VideoError(Exception):
    """A video that can't be read; the message says why."""


def seeded(*numbers):
    """A random generator that the whole numbers determine."""
    return torch.Generator().manual_seed(hash(numbers) % 2 ** 63)


# --- Finding videos -------------------------------------------------------------------------------

def find_videos(source, splits=("train", ""), classes=None):
    """The videos of a list or folder (layouts: top of this file) as pairs (path, label), -1 for no
    label; the names of its class folders; and what was skipped, each with the reason.

    splits: names to look for in a folder, in turn; "" is the source itself. classes: names of the
    training set's classes; a label is the index in them. Raises UserError if a folder is not one of
    them, or if there are no videos though the source itself was looked into.
    """
    skipped = []
    for path in [Path(source, name) for split in splits for name in (f"{split}.csv", split)]:
        if path.is_file():
            videos, names = read_list(path, skipped), []
        else:
            videos, names = walk_folder(path, classes, skipped)
        if videos:
            return videos, names, skipped
    if "" not in splits:
        return [], [], skipped
    what = f"no videos in {source}" if os.path.exists(source) else f"there is no {source}"
    why = f", but {len(skipped)} skipped files or lines, first {skipped[0]}" if skipped else ""
    raise UserError(f"{what}{why}. Give class folders, a folder of videos, a list with lines `path "
                    "label`, or a folder that holds them as train or train.csv")


def read_list(file, skipped):
    """The videos of a list; lines that name none are skipped, quoted with their number."""
    text, videos = file.read_text(encoding="utf-8-sig", errors="replace"), []
    if text.startswith("label,youtube_id"):
        raise UserError(f"{file} is a table of Kinetics: {MAKE_LISTS}")
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        path, label = line, "-1"
        if len(line.split()) > 1 and not os.path.isfile(file.parent / line):
            path, label = line.rsplit(maxsplit=1)
        path = file.parent / path
        if path.suffix and not os.path.isfile(path):
            path = path.with_suffix(".mp4")  # as extras/videos.py prepare names it
        if os.path.isfile(path) and (label == "-1" or label.isdecimal()):
            videos.append((str(path), int(label)))
        elif line:
            reason = "the label is no number" if os.path.isfile(path) else "there is no such file"
            skipped.append(f'{file}, line {number}, "{line[:200]}": {reason}')
    return videos


def walk_folder(folder, classes, skipped):
    """The videos below a folder, and its classes: its sub-folders that contain some, sorted."""
    if any(any(folder.glob(pattern)) for pattern in TABLES):
        raise UserError(f"{folder} has a table of its set: {MAKE_LISTS}")
    files = sorted(glob.glob("**/*.*", root_dir=folder, recursive=True))  # links are followed
    files = [folder / name for name in files if not os.path.isdir(folder / name)]
    kinds = SUFFIXES if any(path.suffix.lower() in SUFFIXES for path in files) else IMAGES
    videos = [path for path in files if path.suffix.lower() in kinds and path.is_file()]
    videos = [path for path in videos if path.parent != folder] or videos
    skipped += [f"{path}: not a video, by its name or place"
                for path in sorted(set(files) - set(videos))]
    if not videos or videos[0].parent == folder:
        return [(str(path), -1) for path in videos], []
    names = [path.relative_to(folder).parts[0] for path in videos]
    classes = sorted(set(names)) if classes is None else classes
    if unknown := set(names) - set(classes):
        raise UserError(f"{folder} has class folders that the training videos don't have: "
                        f"{', '.join(sorted(unknown)[:5])}")
    return [(str(path), classes.index(name)) for path, name in zip(videos, names)], classes


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


def decode(path, choose, clips=None, watch=None):
    """The clips that choose(number of frames) asks for, lists of indices: (T, 3, H, W) uint8 each.

    Frame i is the last one shown by i / rate seconds after the first, which is the i-th if the rate
    is constant. Many files know only roughly how many frames they have: where one ends sooner, its
    last frame is held. clips: what choose gave, for a second try that reads all from the beginning.
    watch(frame, position) is called with each decoded frame, motion vectors included, and its place
    in frames from the first. Raises VideoError with the reason.
    """
    try:
        if Path(path).suffix.lower() in IMAGES:
            with open(path, "rb") as file, av.open(file) as container:  # a name may hold a %
                frame = next(container.decode(video_stream(container)))
            image = to_rgb(frame).permute(2, 0, 1)
            return [image.expand(len(clip), -1, -1, -1) for clip in choose(1)]
        with av.open(path, metadata_errors="replace") as container:  # closed whatever happens
            stream = video_stream(container)
            if watch:
                stream.codec_context.options = {"flags2": "+export_mvs"}
            packets = (packet for packet in container.demux(stream) if packet.size)
            first, seek = next(packets), clips is None  # no clips yet: the first try
            # The first packet holds the first frame, unless an edit list cuts it off.
            origin, frames = first.pts, stream.frames
            if first.is_discard:
                origin, frames = stream.start_time, 0
            step = 1 / (stream.average_rate * stream.time_base)  # from frame to frame, in ticks
            if seek:
                length = stream.duration or (container.duration or 0) / (av.time_base
                                                                         * stream.time_base)
                # Some webm files tell neither frames nor duration: count packets, undecoded.
                clips = choose(frames or round(length / step) or 1 + sum(1 for _ in packets))
            indices = sorted({index for clip in clips for index in clip})
            # Time stamps are rounded to ticks: forgive one, but never as much as half a frame.
            times = [float(origin + index * step + min(1, step / 2)) for index in indices]
            if seek:
                container.seek(int(times[0]), stream=stream)  # to the key frame before the clips
                packets = (packet for packet in container.demux(stream) if packet.size)
                first = next(packets, None)
                at_key = first and first.is_keyframe and first.pts is not None
                if not at_key or first.pts > times[0]:  # some formats seek elsewhere
                    return decode(path, choose, clips, watch)
            # A packet is never shown before its dts: stop reading behind the last frame.
            needed = [first, *itertools.takewhile(
                lambda packet: packet.dts is None or packet.dts <= times[-1], packets)]
            see = watch and (lambda frame: watch(frame, float((frame.pts - origin) / step)))
            images = dict(zip(indices, decode_packets(stream, needed, times, see)))
            clips = [torch.stack([images[index] for index in clip]) for clip in clips]
            return [clip.permute(0, 3, 1, 2) for clip in clips]
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
    context, chosen = stream.codec_context, []
    complete = len(shown) == len(packets) and context.name in ("h264", "hevc")

    def frames():
        for packet in packets:
            skip = complete and packet.pts not in wanted
            context.skip_frame = "NONREF" if skip else "DEFAULT"
            yield from packet.decode()
        yield from context.decode(None)  # those that the decoder still holds back

    for frame in frames():
        if frame.pts is None:
            raise VideoError("it holds frames without time stamps")
        if see:
            see(frame)
        later = bisect_left(times, frame.pts) if chosen else 0
        chosen[later:] = [frame] * (len(times) - later)  # until a frame that is shown by then
    if not chosen:
        raise VideoError("none of its frames can be decoded")
    images = {frame.pts: to_rgb(frame, chosen[0]) for frame in chosen}  # convert each frame once
    return [images[frame.pts] for frame in chosen]


@cache
def reformatter():
    """One for the whole process: to set one up for each frame takes up to a tenth of the time."""
    return VideoReformatter()


def to_rgb(frame, like=None):
    """A decoded frame as (H, W, 3) uint8, in the size of another one; on one thread (default: all,
    for each frame anew)."""
    like = like or frame
    frame = reformatter().reformat(frame, like.width, like.height, "rgb24", threads=1)
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
        return torch.stack(clips), tube_mask(self.repeat, self.grid, self.ratio, generator)

    def __getitem__(self, key):
        position, index = key
        generator, bad = seeded(self.seed, position, index), {}
        for _ in range(self.tries):
            path, label = self.videos[index]
            try:
                return *self.read(path, generator), label, index, bad
            except VideoError as error:
                bad[path] = str(error)
                index = int(torch.randint(len(self), (1,), generator=generator))
        black = torch.zeros(self.repeat, 3, self.frames, self.size, self.size, dtype=torch.uint8)
        return black, tube_mask(self.repeat, self.grid, self.ratio, generator), -1, key[1], bad


def endless_order(n, batch, rank=0, world=1, seed=0, start=0):
    """Keys (position, video) for ever: all n videos in a new order, then again in another one.

    All ranks together count positions from `start` on, `batch` in turn for each of `world` ranks.
    So what a step sees depends on how far the run is, not on how many processes share it.
    """
    for position in itertools.count(start):
        if position == start or position % n == 0:  # a new pass
            order = torch.randperm(n, generator=seeded(seed, position // n)).tolist()
        if (position - start) // batch % world == rank:
            yield position, order[position % n]


def collate(samples):
    """A batch: video (B, 3, T, S, S), mask (B, N), labels and indices of videos, all bad ones."""
    video, mask, label, index, bad = zip(*samples)
    bad = {path: reason for part in bad for path, reason in part.items()}
    return torch.cat(video), torch.cat(mask), torch.tensor(label), torch.tensor(index), bad


def on_signals(handler):
    """Sets what the signals do that stop a run: SIGTERM, SIGUSR1 and Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handler)


def start_worker(worker):
    """Signals to stop go to a whole group of processes, but workers must live until the training
    process has saved; and they must not outlive it."""
    on_signals(signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG: killed when the parent ends


def kill_workers():
    """Ends loader workers that an error has left behind: they ignore Python's own signal."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for another error
    for worker in multiprocessing.active_children():
        worker.kill()


def open_videos():
    """The videos that loader workers have open at the moment, where /proc tells (Linux)."""
    links = [link for worker in multiprocessing.active_children()
             for link in Path(f"/proc/{worker.pid}/fd").glob("*")]
    files = {os.path.realpath(link) for link in links}
    return sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES)


def loader(clips, batch, keys, workers, timeout=300):
    """Yields batches, as collate makes them, of the clips that the keys name. Raises RunError if
    the next one takes longer than timeout seconds."""
    def give_up(number, frame):
        raise RunError(f"the loader gave no batch in {timeout} s, is a disk stalled? Its workers "
                       f"have open: {', '.join(open_videos()) or 'no video, or not known'}")

    signal.signal(signal.SIGALRM, give_up)  # PyTorch's own limit waits for a stopped worker
    signal.alarm(timeout)
    for samples in DataLoader(clips, batch, sampler=keys, num_workers=workers, collate_fn=collate,
                              worker_init_fn=start_worker, pin_memory=torch.cuda.is_available()):
        signal.alarm(0)
        yield samples
        signal.alarm(timeout)
    signal.alarm(0)


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


def toy_clip(label, generator):
    """A clip (TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3) uint8 of a shape drifting at 45 degrees x label.

    A lobed, striped shape of random looks on a smooth background, on a plane whose opposite edges
    are joined: no single frame tells the class. No pixel noise, since nothing could predict it.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    size, turn = TOY_SIZE, 2 * math.pi
    travelled = uniform(2, 3.5) * torch.arange(TOY_FRAMES)[:, None, None]  # pixels
    pixel = torch.arange(size) + 0.5
    x = pixel - uniform(0, size) - travelled * math.cos(label * turn / 8)  # from the shape's centre
    y = pixel[:, None] - uniform(0, size) - travelled * math.sin(label * turn / 8)  # T S 1
    x, y = ((distance + size / 2) % size - size / 2 for distance in (x, y))  # the joined edges
    radius, angle = uniform(math.log(7), math.log(18)).exp(), uniform(0, turn)
    along = (x * angle.cos() + y * angle.sin()) / radius  # in the shape's own coordinates: T S S
    across = (y * angle.cos() - x * angle.sin()) / radius
    lobes, depth = torch.randint(2, 6, (), generator=generator), uniform(0.15, 0.35)
    outline = 1 - depth + depth * torch.cos(lobes * torch.atan2(across, along))
    inside = ((outline - along.hypot(across)) * radius + 0.5).clamp(0, 1)  # edge: one pixel wide
    angle = uniform(0, turn)
    stripes = torch.sin(uniform(2, 4) * (along * angle.cos() + across * angle.sin())
                        + uniform(0, turn))
    texture = uniform(0, 1, 3) + uniform(-0.5, 0.5, 3) * stripes[..., None]  # T S S 3
    background = F.interpolate(uniform(0, 1, 1, 3, 2, 2), (size, size), mode="bilinear",
                               align_corners=True)[0].permute(1, 2, 0)  # S S 3
    return (background.lerp(texture.clamp(0, 1), inside[..., None]) * 255).round().byte()


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
    """Writes a toy clip to path, of a class and from a seed: job = (path, label, seed)."""
    path, label, seed = job
    write_video(path, toy_clip(label, seeded(seed)))


def make_toy(root, train=TOY_TRAIN, val=TOY_VAL):
    """Renders the toy set into root/{train,val}/<class>/*.mp4 on all cores, unless it is there.

    It works in a folder of another name until all is written: root is complete or not there.
    """
    root = Path(root)
    if root.is_dir():
        return
    draft, jobs = root.with_name(f"{root.name}.unfinished-{os.getpid()}"), []
    for split, numbers in (("train", range(train)), ("val", range(TOY_TRAIN, TOY_TRAIN + val))):
        for label, name in enumerate(TOY_CLASSES):
            (draft / split / name).mkdir(parents=True)
            jobs += [(draft / split / name / f"{i:05}.mp4", label, i) for i in numbers[label::8]]
    for _ in in_parallel(render, jobs, os.cpu_count(), "rendering the toy set"):
        pass
    try:
        draft.rename(root)
    except OSError:  # another process was faster: its set is the same
        shutil.rmtree(draft)
