"""Preparing a data set: lists, a check of all videos, re-encoding.

    python extras/videos.py lists k400 DIR        the set's own tables -> DIR/train.csv, DIR/val.csv
    python extras/videos.py check DIR             reads each video whole: out/check-DIR/*.csv
    python extras/videos.py prepare DIR DIR-256   re-encodes, so that training reads it fastest

`lists` knows the tables of k400, ssv2, ucf101 and hmdb51: `lists --help` shows how they must lie.
Videos that DIR lacks (of Kinetics it always lacks some) are named in missing.txt.

`prepare` writes all frames at their times as H.264: upright, short side 256, a key frame every 32
frames, B-frames that no other needs, no sound. Folders and names stay, except that all end in .mp4
(existing lists still work); a.avi beside a.mp4 keeps its name. Lists come along, absolute paths in
them lead to the new videos. Run the same command again to resume; what is there already stays.
"""
import argparse
import csv
import errno
import os
import sys
from collections import Counter
from pathlib import Path

import av
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import SPLITS, SUFFIXES, decode, files_below, find_videos
from extras import tables
from extras.reader import REFORMATTER, VideoError, all_frames, opened, quarter_turns
from extras.run import RunError, claim, draft_of, launch, log
from extras.toy import in_parallel
from sigma import UserError
from train import at_least, parser_with

H264 = {"preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32", "keyint_min": "32",
        "sc_threshold": "0", "bf": "3", "x264-params": "b-pyramid=none:b-adapt=0"}
FULL = "no room is left"


def write(path, lines):
    """Writes lines to a file, which is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft:
        draft.write_bytes(os.fsencode("".join(lines)))
    log(f"{path}: {len(lines):,} lines")


def lists(args):
    """Writes train.csv and val.csv with lines `path label`, and missing.txt."""
    root, out = Path(args.folder), Path(args.out or args.folder)
    if (out / "train.csv").exists() or (out / "val.csv").exists():
        raise UserError(f"{out} has lists already: choose another --out")
    try:
        rows = [row for row in tables.ROWS[args.set](root, args.split)
                if row[0] in ("train", "val")]
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"the tables in {root} can't be read: {error!r}") from error
    videos, found = {}, {"train.csv": [], "val.csv": [], "missing.txt": []}
    for path in filter(Path.is_file, files_below(root, [])):
        if path.suffix.lower() in SUFFIXES:  # relative: the folder can be moved, or prepared
            place = path.relative_to(out) if path.is_relative_to(out) else path.resolve()
            videos[path.stem] = videos[f"{path.parent.name}/{path.stem}"] = place
    for split, video, label in rows:
        if video in videos:
            found[f"{split}.csv"].append(f"{videos[video]} {label}\n")
        else:
            found["missing.txt"].append(f"{split} {video}\n")
    if not found["train.csv"] or not found["val.csv"]:
        raise UserError(f"of the {len(rows):,} videos that the tables name {root} has none to "
                        "train on, or none to test on: see `lists --help` for the layout")
    for name, lines in found.items():  # all of them, or none
        write(out / name, lines)


def problem(video):
    """Why a video (path, label) can't be read, from its first frame to its last, or None."""
    promised = []
    try:
        decode(video[0], lambda n: promised.append(n) or [[n - 1]])
        found = sum(1 for _ in all_frames(video[0]))
    except VideoError as error:
        return str(error)
    if found < 0.9 * promised[0] - 1:
        return f"it ends after {found:,} of {promised[0]:,} frames"


def check(args):
    """Writes lists of the good videos of each split, which --data takes, and bad.txt."""
    out = Path(args.out or f"out/check-{Path(args.folder).resolve().stem}")
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out")
    classes, bad = None, []
    for split, places in SPLITS.items():
        videos, classes, skipped = find_videos(args.folder, places, classes)
        found = list(in_parallel(problem, videos, args.workers, f"checks {split}"))
        good = [f"{os.path.abspath(path)} {label}\n"  # -1: it has none
                for (path, label), reason in found if not reason]
        bad += [f"{path}: {reason}\n" for (path, _), reason in found if reason]
        bad += [f"{line}\n" for line in skipped]
        if good:
            write(out / f"{split}.csv", good)
    write(out / "bad.txt", bad)


def resize(frame):
    """A frame with short side 256, rotated as its file says, in its own colours."""
    sides, turns = (frame.height, frame.width), quarter_turns(frame)
    height, width = (max(2, 2 * round(128 * side / min(sides))) for side in sides)
    form = "yuv444p" if turns else "yuv420p"  # planes of one size can be rotated
    image = REFORMATTER.reformat(frame, width, height, form, threads=1)
    if turns:
        planes = torch.from_numpy(image.to_ndarray()).rot90(turns, (1, 2))
        image = av.VideoFrame.from_ndarray(planes.numpy(), form)
    image.time_base, image.pict_type = frame.time_base, 0  # the encoder chooses the type
    return image


def encode(source, draft):
    """Writes a video anew. Raises VideoError if it can't be read."""
    with opened(source) as (_, old):
        rate = old.guessed_rate
    with open(draft, "wb") as file, av.open(file, "w", format="mp4") as new:
        stream, pts = new.add_stream("libx264", rate=rate, options=H264), -1
        for _, frame, seconds in all_frames(source):
            image, to = resize(frame), stream.codec_context
            if pts < 0:
                to.width, to.height, to.pix_fmt = image.width, image.height, "yuv420p"
                to.colorspace, to.color_range = frame.colorspace or 2, frame.color_range  # no RGB
                to.time_base, to.thread_count = frame.time_base, 1
            image.pts = pts = max(pts + 1, round(seconds / frame.time_base))
            new.mux(stream.encode(image))
        new.mux(stream.encode(None))


def re_encode(job):
    """Prepares a video, job = (source, target); returns why it can't be done, or None."""
    source, target = job
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(target) as draft:
            encode(source, draft)
            decode(draft, lambda n: [[0, n - 1]])  # a last look before it counts
    except VideoError as error:
        return str(error)
    except OSError as error:
        return FULL if error.errno == errno.ENOSPC else f"it can't be written: {error.strerror}"
    except av.FFmpegError:
        return "it can't be encoded as H.264"


def plan(source, target):
    """What `prepare` has to do: pairs of a video and its new place, such pairs of lists, and what
    can't be read, with the reason."""
    skipped = []
    files = [path for path in files_below(source, skipped) if path.is_file()]
    twins = Counter(path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES)
    videos, texts = [], []
    for path in files:
        kind, goal = path.suffix.lower(), target / path.relative_to(source)
        if kind in SUFFIXES and twins[path.with_suffix("")] == 1:  # else lists find the wrong
            goal = goal.with_suffix(".mp4")
        if kind in (*SUFFIXES, ".csv", ".json", ".txt") and not goal.exists():
            (videos if kind in SUFFIXES else texts).append((path, goal))
    return videos, texts, skipped


def prepare(args):
    """Re-encodes the videos of a folder that the target does not have yet; copies lists."""
    source, target = Path(args.folder).resolve(), Path(args.target).resolve()
    if not source.is_dir() or target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"{source} must be a folder of videos, and {target} another one outside it")
    with claim(target):
        for draft in target.rglob("*.unfinished"):  # of a killed process
            draft.unlink()
        videos, texts, skipped = plan(source, target)
        for path, goal in texts:
            lines = os.fsdecode(path.read_bytes()).replace(f"{source}/", f"{target}/")
            write(goal, lines.splitlines(keepends=True))
        bad = [f"{line}\n" for line in skipped]
        for (path, _), reason in in_parallel(re_encode, videos, args.workers, "preparing"):
            if reason == FULL:
                raise RunError(f"{FULL} for {target}: make some, then run the same command "
                               "again to resume")
            if reason:
                bad.append(f"{path}: {reason}\n")
        write(target / "bad.txt", bad)


def make_parser():
    """The parser of the three commands' flags."""
    parser = parser_with(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work, details=""):
        added = commands.add_parser(
            work.__name__, help=work.__doc__, description=f"{work.__doc__}{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter)
        added.set_defaults(work=work)
        return added

    add = command(lists, f"\n\n{tables.__doc__}").add_argument
    add("set", choices=tables.ROWS, help="whose tables they are")
    add("folder", help="DIR, with the tables and the videos")
    add("--split", type=int, default=1, choices=[1, 2, 3], help="of ucf101 and hmdb51 (default: 1)")
    add("--out", help="folder of the lists (default: DIR)")
    workers = dict(type=at_least(0), default=os.cpu_count(),
                   help="processes that decode (default: as many as cores)")
    add = command(check).add_argument
    add("folder", help="videos as --data names them: a folder or a list")
    add("--workers", **workers)
    add("--out", help="folder of the lists (default: out/check-FOLDER)")
    add = command(prepare).add_argument
    add("folder", help="of the videos")
    add("target", help="folder of the new videos")
    add("--workers", **workers)
    return parser


def main(argv=None):
    """lists, check or prepare, from the flags to the files."""
    args = make_parser().parse_args(argv)
    args.work(args)


if __name__ == "__main__":
    sys.exit(launch(main))
