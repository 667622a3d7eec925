"""The frames of video files, exactly: `decode` gives clips, `all_frames` a whole file.

Needs av and torch alone: this file can be copied into other code. How frame i is found:

    1. The time stamps of all packets are read, undecoded; sorted, they tell when frames are shown.
       (mp4 and avi hold a table of packets: if it is even, the first stamps are enough.)
    2. Unless stamps are guessed, repeated or in disorder, decoding starts at the key frame before
       the first wanted frame and ends with the last, and frames are told by their stamps.
    3. If they are, or if 2 did not give all, the file is decoded from its beginning, and without
       stamps to trust frames are counted. A packet without a picture repeats the one before.
"""
import os
from bisect import bisect_left
from contextlib import contextmanager, suppress
from math import inf

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

av.logging.set_level(av.logging.FATAL)  # a damaged file is reported once, by VideoError
TAGS = {} if av.__version__ >= "19" else {"metadata_errors": "replace"}  # they need not be UTF-8
REFORMATTER = VideoReformatter()  # to set one up for each frame takes up to a tenth of the time
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class VideoError(Exception):
    """A video that can't be read; the message says why."""


def decode(path, choose, watch=None):
    """The clips that choose(number of frames) asks for, lists of indices: (T, 3, H, W) uint8 each,
    upright. Index i is the frame nearest to i steps after the first, a step being the mean gap: at
    a constant rate, frame i. A file that ends sooner holds its last one. watch(frame, position,
    turns) is called with each decoded frame, motion vectors included: its time in steps from the
    first, and the quarter turns anticlockwise that make it upright; where positions do not ascend,
    decoding has started again. Raises VideoError with the reason."""
    with opened(path, watch) as (container, stream):
        times, trusted = frame_times(path, container, stream)
        step = (times[-1] - times[0]) / (len(times) - 1 or 1) or 1
        clips = [[nearest(times, times[0] + i * step) for i in clip] for clip in choose(len(times))]
        wanted = sorted(needed := {number for clip in clips for number in clip})
        ways = [from_key_frame(container, stream, times, wanted)] if trusted else []
        for frames in (*ways, from_beginning(path, times, trusted, watch)):
            images, image, seen, last = {}, None, None, -1
            for last, frame in frames:
                if watch and frame is not seen:  # a repeated one is not decoded
                    position = (times[min(last, len(times) - 1)] - times[0]) / step
                    watch(seen := frame, position, quarter_turns(frame))
                if last in needed:
                    images[last] = image = to_rgb(frame, image)
                if last >= wanted[-1]:
                    break
            if len(images) == len(wanted):
                break
    images |= {n: to_rgb(frame, image) for n in wanted if n > last}  # the file ends sooner
    if lost := set(wanted) - images.keys():
        raise VideoError(f"it is damaged: frame {min(lost)} can't be decoded")
    return [torch.stack([images[number] for number in clip]).permute(0, 3, 1, 2) for clip in clips]


def all_frames(path):
    """All frames of a video, as shown: (number, frame, seconds after the first), or VideoError."""
    with opened(path) as (container, stream):
        times, trusted = frame_times(path, container, stream)
        tick, end = stream.time_base, len(times) - 1  # a packet may have more frames than one
    for number, frame in from_beginning(path, times, trusted):
        yield number, frame, float((times[min(number, end)] - times[0]) * tick)


@contextmanager
def opened(path, motion=False):
    """The container and video stream of a file. Raises VideoError if they, or what is then
    read from them, can't be read. motion: frames bring their motion vectors."""
    try:  # Python opens the file: FFmpeg takes some names for addresses or patterns
        if not os.path.getsize(path):
            raise VideoError("it is empty")
        with open(path, "rb") as file, av.open(file, **TAGS) as container:
            stream = video_stream(container)
            stream.codec_context.options = {"flags2": "+export_mvs"} if motion else {}
            yield container, stream
    except av.FFmpegError as error:  # its words are about FFmpeg
        raise VideoError("it is damaged, or no video") from error
    except OSError as error:
        raise VideoError(f"it can't be read: {error.strerror}") from error


def video_stream(container):
    """The video: the stream that the file marks as default, else FFmpeg's best, but no cover
    picture if there is another. One thread decodes it, as workers are parallel themselves."""
    streams, best = container.streams.video, container.streams.best("video")
    streams = [s for s in streams if s.codec_context and not s.disposition & COVERS]
    if not streams:
        raise VideoError("it has no video stream of a known codec")
    stream = min(streams, key=lambda s: (
        s.frames == 1 or not s.frames and s.codec_context.name in ("mjpeg", "png"),  # a picture
        not s.disposition & Disposition.default, s != best))
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def frame_times(path, container, stream):
    """When each frame is shown, ascending, in ticks; and whether decoded frames can be told by
    these times: else they must be counted. Those of a cut file are as its table of packets says."""
    codec, kind, entries = stream.codec_context, container.format.name, stream.index_entries
    stamps, key, table, reorders = [], None, even_table(entries, stream.frames), codec.has_b_frames
    # Where frames are decoded in another order than they are shown in, stamps may be guesses: avi
    # has no others, mpg few; nor are those right that were copied from an avi with "packed" MPEG-4.
    guessed, packs = kind == "mpeg" or reorders and kind == "avi", codec.name == "mpeg4"
    few = 1 if guessed or not reorders else inf if packs else 8  # stamps are enough, with a table
    for packet in container.demux(stream):
        key = packet.is_keyframe if key is None else key  # the first packet's
        if is_frame(packet, codec, guessed):
            stamps.append((packet.pts, packet.dts, packet.is_discard))  # off, by an edit list
            guessed = guessed or packs and bytes(packet).count(b"\0\0\1\xb6") > 1  # two frames
            if table and key and len(stamps) >= few and (few == 1 or packet.pts != packet.dts):
                break
    if stamps and stream.frames and not key and entries[:1] and entries[0].is_keyframe:
        raise VideoError("it is damaged at its beginning")
    pts, dts = [pts for pts, *_ in stamps], [dts for _, dts, _ in stamps if dts is not None]
    counted = guessed or len(set(pts)) < len(pts) or dts != sorted(dts)
    trusted = not counted and not (reorders and pts == dts)
    times = range(len(pts)) if counted else sorted(pts for pts, _, cut in stamps if not cut)
    if not times:
        raise VideoError("it holds no frames")
    if not key or not counted and pts[0] > times[0]:  # the decoder has to find its first frame
        shown = (frame.pts for _, frame in from_beginning(path, [0], False))
        counted = not trusted
        times = range(sum(1 for _ in shown)) if counted else times[bisect_left(times, next(shown)):]
    elif table:
        times, counted = range(times[0], times[0] + table.stop, table.step), False
    elif len(stamps) < len(entries) and entries[-1].pos + entries[-1].size > os.path.getsize(path):
        times += [times[0] + e.timestamp - entries[0].timestamp for e in entries[len(stamps):]]
    step = float(1 / ((stream.guessed_rate or 25) * stream.time_base))
    return [i * step for i in times] if counted else times, trusted


def is_frame(packet, codec, guessed=False):
    """Whether a packet is a frame, or repeats one (size 0): no second field, no hidden frame."""
    if not packet.size or codec.name == "vp8" and not memoryview(packet)[0] & 16:
        return not packet.size and packet.dts is not None
    return guessed or packet.pts is not None


def even_table(entries, n):
    """Times after the first by the file's table of n packets; None if it is not whole and even."""
    if 1 < n == len(entries) and not entries[0].is_discard and not entries[-1].is_discard:
        start, step = entries[0].timestamp, entries[1].timestamp - entries[0].timestamp
        some = range(0, n, n // 64 or 1)  # an exception would be noticed when its frame is met
        if step > 0 and all(entries[i].timestamp == start + i * step for i in some):
            return range(0, n * step, step)


def nearest(times, time):
    """The place of the time that is nearest to another one."""
    after = min(bisect_left(times, time), len(times) - 1)
    return after - (after > 0 and times[after] - time >= time - times[after - 1])


def from_key_frame(container, stream, times, wanted):
    """Pairs (number, frame), from the key frame before the first of the wanted numbers to the last.
    It ends sooner if the file can't be entered there, or frames don't come as their stamps say."""
    codec, packets, last = stream.codec_context, [], -1
    numbers, needed = {time: i for i, time in enumerate(times)}, {times[i] for i in wanted}
    missing, skips, skip = set(needed), codec.name in ("h264", "hevc"), None
    with suppress(av.FFmpegError):
        container.seek(times[wanted[0]], stream=stream)
    for packet in container.demux(stream):  # all of them first: in turn with decoding takes longer
        if not packets and not (packet.is_keyframe and (packet.pts or 0) <= times[wanted[0]]):
            return
        if packet.size:
            packets.append((packet, skips and packet.pts not in needed))
        missing.discard(packet.pts)
        if not missing:
            break
    for packet, neither in [*packets, (None, False)]:  # None: what the decoder still holds back
        if skip != (skip := neither):  # a frame neither wanted nor referred to needs no decoding
            codec.skip_frame = "NONREF" if skip else "DEFAULT"
        for frame in codec.decode(packet):
            number = numbers.get(frame.pts, -1)
            if number <= last:
                return
            yield number, frame
            last = number


def from_beginning(path, times, trusted, motion=False):
    """Pairs (number, frame) of all frames, in order: told by trusted stamps, else counted. A packet
    without error and without picture repeats the one before. Raises VideoError where one fails."""
    with opened(path, motion) as (container, stream):
        codec, key, last, held, end = stream.codec_context, False, -1, None, times[0]
        one_by_one = not codec.has_b_frames or codec.name == "mpeg4"  # the delay never grows
        for packet in container.demux(stream):
            key, frames = key or packet.is_keyframe, []
            try:
                if packet.size or packet.dts is None:  # else it is the last picture again
                    frames = packet.decode()
            except av.InvalidDataError:
                if key:
                    raise
                codec.flush_buffers()  # the file is cut: wait for its key frame
            for frame in frames:
                if trusted and (frame.pts is None or frame.pts < times[0]):
                    continue
                number = max(last + 1, nearest(times, frame.pts) if trusted else 0)
                yield from ((i, held) for i in range(last + 1, number) if held)
                yield number, frame
                last, held = number, frame
            end = max(end, end if packet.pts is None else packet.pts)
            if held and not (frames or trusted) and one_by_one and is_frame(packet, codec, True):
                yield (last := last + 1), held
    if held is None:
        raise VideoError("none of its frames can be decoded")
    yield from ((i, held) for i in range(last + 1, nearest(times, end) + 1) if trusted)


def quarter_turns(frame):
    """How often a frame must be rotated by 90 degrees, anticlockwise, to be upright."""
    return round(frame.rotation / 90) % 4


def to_rgb(frame, like=None):
    """A decoded frame as (H, W, 3) uint8, upright, resized to `like` if given."""
    turns, (height, width) = quarter_turns(frame), (frame.height, frame.width)
    if like is not None:
        height, width = like.shape[1::-1] if turns % 2 else like.shape[:2]
    frame = REFORMATTER.reformat(frame, width, height, "rgb24", threads=1)  # default: all cores
    image = torch.from_numpy(frame.to_ndarray())
    return image.rot90(turns) if turns else image
