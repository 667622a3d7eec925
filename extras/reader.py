"""The frames of video files, exactly: `decode` gives clips, `all_frames` a whole file.

Needs av and torch alone: this file can be copied into other code. How frame i is found:

    1. The time stamps of all packets are read, undecoded; sorted, they tell when frames are shown.
       (mp4 and avi hold a table of packets: if it is even, the first few stamps are enough.)
    2. Stamps are trusted unless they are guesses, repeated, or in disorder. If they are, decoding
       starts at the key frame before the first wanted frame, and stamps tell frames apart.
    3. If not, or if 2 did not give all of them, the file is decoded from its beginning, and where
       stamps are not trusted frames are counted. Packets without a picture repeat the one before.
"""
import os
from bisect import bisect_left
from collections import namedtuple
from contextlib import contextmanager

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

av.logging.set_level(av.logging.FATAL)  # a damaged file is reported once, by VideoError
# Tags need not be UTF-8, which PyAV 19 takes care of.
TAGS = {} if av.__version__ >= "19" else {"metadata_errors": "replace"}
REFORMATTER = VideoReformatter()  # to set one up for each frame takes up to a tenth of the time


class VideoError(Exception):
    """A video that can't be read; the message says why."""


def decode(path, choose, watch=None):
    """The clips that choose(number of frames) asks for, lists of indices: (T, 3, H, W) uint8 each,
    upright as the file's display matrix says.

    Index i of n is the frame nearest to i steps after the first, a step being the mean gap: at a
    constant rate, frame i. A file that ends sooner holds its last one. watch(frame, position,
    turns) is called with each decoded frame, motion vectors included: its time in steps from the
    first, and the quarter turns anticlockwise that make it upright. Where positions do not ascend,
    decoding has started again. Raises VideoError with the reason.
    """
    with opened(path, watch) as (container, stream):
        times, trusted = frame_times(path, container, stream)
        step = (times[-1] - times[0]) / (len(times) - 1 or 1) or 1
        clips = [frame_numbers(times, step, clip) for clip in choose(len(times))]
        wanted = sorted({number for clip in clips for number in clip})
        ways = [from_key_frame(container, stream, times, wanted)] if trusted else []
        for frames in (*ways, from_beginning(path, times, trusted, watch)):
            images, image, seen, last = {}, None, None, -1
            for last, frame in frames:
                if watch and frame is not seen:  # not a repeated one
                    watch(frame, (times[0:last + 1][-1] - times[0]) / step, quarter_turns(frame))
                seen = frame
                if last in wanted:
                    images[last] = image = to_rgb(frame, image)
                if last >= wanted[-1]:
                    break
            if len(images) == len(wanted):
                break
        else:  # a file that ends sooner
            images |= {number: to_rgb(frame, image) for number in wanted if number > last}
    if lost := set(wanted) - images.keys():
        raise VideoError(f"it is damaged: frame {min(lost)} can't be decoded")
    return [torch.stack([images[number] for number in clip]).permute(0, 3, 1, 2) for clip in clips]


def all_frames(path):
    """All frames of a video in the order in which they are shown: (number, frame, seconds after the
    first). Raises VideoError with the reason."""
    with opened(path) as (container, stream):
        times, trusted = frame_times(path, container, stream)
        tick, step = stream.time_base, (times[-1] - times[0]) / (len(times) - 1 or 1) or 1
    for number, frame in from_beginning(path, times, trusted):
        beyond = max(number - len(times) + 1, 0)  # a packet may have more frames than one
        yield number, frame, float((times[number - beyond] + beyond * step - times[0]) * tick)


@contextmanager
def opened(path, motion=False):
    """The container and video stream of a file. Raises VideoError if they, or what is then
    read from them, can't be read. motion: frames bring their motion vectors."""
    if os.path.isfile(path) and not os.path.getsize(path):
        raise VideoError("it is empty")
    try:  # Python opens the file: FFmpeg takes some names for addresses or patterns
        with open(path, "rb") as file, av.open(file, **TAGS) as container:
            stream = video_stream(container)
            if motion:
                stream.codec_context.options = {"flags2": "+export_mvs"}
            yield container, stream
    except av.FFmpegError as error:  # its words are about FFmpeg
        raise VideoError("it is damaged, or no video") from error
    except OSError as error:
        raise VideoError(f"it can't be read: {error.strerror}") from error


def video_stream(container):
    """The stream that the file marks as default, else FFmpeg's best, but no cover picture; decoded
    by one thread, as workers are parallel themselves."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video
               if stream.codec_context and not stream.disposition & covers]
    if not streams:
        raise VideoError("it has no video stream of a known codec")
    if len(streams) > 1:
        best = container.streams.best("video")
        streams.sort(key=lambda stream: (
            stream.frames == 1 or not stream.frames and stream.codec_context.name in STILLS,
            not stream.disposition & Disposition.default, stream != best))
    streams[0].thread_type, streams[0].codec_context.thread_count = "NONE", 1
    return streams[0]


STILLS = "mjpeg", "png"  # where a file does not say how many frames a stream has, one

# --- When frames are shown ------------------------------------------------------------------------

Stamps = namedtuple("Stamps", "pts dts key cut")  # of a packet; cut: off, by an edit list


def frame_times(path, container, stream):
    """When each frame is shown, ascending, in ticks; and whether decoded frames can be told by
    these times: else frames must be counted from the beginning."""
    codec, kind, packets = stream.codec_context, container.format.name, []
    reorders = codec.has_b_frames  # frames may be decoded in another order than they are shown in
    # FFmpeg has only guesses then: avi has no times of showing, mpg has few.
    guessed = kind == "mpeg" or kind == "avi" and reorders
    table, enough = even_table(stream), 32 if reorders and not guessed else 1
    for packet in container.demux(stream):
        if is_frame(packet, codec, guessed):
            packets.append(Stamps(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
        if table and len(packets) == enough:
            break
    if not packets:
        raise VideoError("it holds no frames")
    first, entries = packets[0], stream.index_entries
    if stream.frames and len(entries) and entries[0].is_keyframe and not first.key:
        raise VideoError("it is damaged at its beginning")
    pts = [stamps.pts for stamps in packets]
    dts = [stamps.dts for stamps in packets if stamps.dts is not None]
    if guessed or len(set(pts)) < len(pts) or dts != sorted(dts):
        step = 1 / ((stream.guessed_rate or 25) * stream.time_base)
        times, trusted = [i * float(step) for i in range(len(table or packets))], False
    else:
        times = sorted(stamps.pts for stamps in packets if not stamps.cut)
        trusted = not (reorders and pts == dts)
    whole = first.key and (first.pts is None or first.pts <= times[0])
    if not whole:  # frames are shown from the first key frame on
        frames = in_order(path)
        start = bisect_left(times, next(frames).pts) if trusted else -sum(1 for _ in frames) - 1
        return times[start:], trusted
    if table and not guessed:
        return [times[0] + time for time in table], trusted
    if len(packets) < len(entries) == stream.frames and is_cut(path, entries):
        times += [times[-1] + entry.timestamp - entries[len(packets) - 1].timestamp
                  for entry in entries[len(packets):]]
    return times, trusted


def is_frame(packet, codec, guessed=False):
    """Whether a packet stands for a frame, if only for the last one again (size 0); not so are the
    second field of a frame (no stamp), hidden frames of VP8, and the end of the file."""
    if not packet.size:
        return packet.dts is not None
    return guessed or packet.pts is not None and not (
        codec.name == "vp8" and not memoryview(packet)[0] & 16)


def even_table(stream):
    """Times after the first by the file's table of packets, if it is whole and even, else None."""
    table, n = stream.index_entries, stream.frames
    if n < 2 or n != len(table) or table[0].is_discard or table[-1].is_discard:
        return None
    times = [entry.timestamp for entry in table]
    even = range(0, n * (times[1] - times[0]), max(times[1] - times[0], 1))
    return even if times == [times[0] + time for time in even] else None


def is_cut(path, entries):
    """Whether the file ends before its last packet."""
    return entries[-1].pos + entries[-1].size > os.path.getsize(path)


def nearest(times, time):
    """The place of the time that is nearest to another one."""
    after = min(bisect_left(times, time), len(times) - 1)
    before = max(after - 1, 0)
    return after if times[after] - time < time - times[before] else before


def frame_numbers(times, step, clip):
    """The numbers of the frames that the indices of a clip stand for. step: the mean of times'."""
    return [nearest(times, times[0] + i * step) for i in clip]


# --- Decoding -------------------------------------------------------------------------------------

def from_key_frame(container, stream, times, wanted):
    """Pairs (number, frame), from the key frame before the first of the wanted numbers to the last.
    It ends sooner if the file can't be entered there, or frames don't come as their stamps say."""
    codec, last, latest = stream.codec_context, -1, None
    needed, skips = {times[number] for number in wanted}, codec.name in ("h264", "hevc")
    first, missing = times[wanted[0]], set(needed)
    try:
        container.seek(first, stream=stream)
    except av.FFmpegError:
        return
    for packet in container.demux(stream):
        pts = packet.pts
        if latest is None:
            if not packet.is_keyframe or pts is None or pts > first:
                return
            latest = pts
        if not packet.size and packet.dts is not None:
            continue
        # A frame that is neither wanted nor referred to needs no decoding.
        skip = skips and pts not in needed and pts is not None and pts < latest
        codec.skip_frame = "NONREF" if skip else "DEFAULT"
        missing.discard(pts)
        frames = codec.decode(packet if packet.size else None)
        if not missing and packet.size:
            frames += codec.decode(None)  # what the decoder still holds back
        for frame in frames:
            number = -1 if frame.pts is None else bisect_left(times, frame.pts)
            if not last < number < len(times) or times[number] != frame.pts:
                return
            yield number, frame
            last = number
        if not missing:
            return
        latest = max(latest, pts or latest)


def from_beginning(path, times, trusted, motion=False):
    """Pairs (number, frame) of all frames, in order: told by their stamps if these are trusted, else
    counted. A number that decoded without an error and without a picture has the one before."""
    last, held, end = -1, None, times[0]
    for packet, codec, frames in decoded(path, motion):
        for frame in frames:
            number = last + 1
            if trusted:
                if frame.pts is None or frame.pts < times[0]:
                    continue
                number = max(number, nearest(times, frame.pts))
                yield from ((i, held) for i in range(last + 1, number) if held)
            yield number, frame
            last, held = number, frame
        end = max(end, end if packet.pts is None else packet.pts)
        one_by_one = not codec.has_b_frames or codec.name == "mpeg4"  # the delay never grows
        if one_by_one and not trusted and held and not frames and is_frame(packet, codec, True):
            last += 1
            yield last, held
    if held is None:
        raise VideoError("none of its frames can be decoded")
    if trusted:
        yield from ((i, held) for i in range(last + 1, nearest(times, end) + 1))


def in_order(path):
    """The frames of a file as its decoder gives them, from the beginning."""
    return (frame for _, _, frames in decoded(path) for frame in frames)


def decoded(path, motion=False):
    """Triples (packet, codec, frames that it completes) from the beginning on. Raises VideoError at
    the first error: what follows could not be numbered. Before any key frame errors are none."""
    with opened(path, motion) as (container, stream):
        key, codec = False, stream.codec_context
        for packet in container.demux(stream):
            key, frames = key or packet.is_keyframe, []
            try:
                if packet.size or packet.dts is None:  # the end; else the last picture again
                    frames = codec.decode(packet if packet.size else None)
            except av.InvalidDataError:
                if key:
                    raise
                codec.flush_buffers()  # the file is cut: wait for its key frame
            yield packet, codec, frames


# --- Frames to images -----------------------------------------------------------------------------

def quarter_turns(frame):
    """How often a frame must be turned by 90 degrees, anticlockwise, to be upright."""
    return round(frame.rotation / 90) % 4


def to_rgb(frame, like=None):
    """A decoded frame as (H, W, 3) uint8, upright, resized to `like` if given. PyAV's default would
    start all threads for each frame."""
    turns, (height, width) = quarter_turns(frame), (frame.height, frame.width)
    if like is not None:
        height, width = like.shape[1::-1] if turns % 2 else like.shape[:2]
    frame = REFORMATTER.reformat(frame, width, height, "rgb24", threads=1)
    image = torch.from_numpy(frame.to_ndarray())
    return image.rot90(turns) if turns else image
