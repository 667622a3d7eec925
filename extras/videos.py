"""What people do with videos before training: lists, a check, re-encoding.

    python extras/videos.py lists k400 DIR        the set's own tables -> DIR/train.csv, DIR/val.csv
    python extras/videos.py check DIR             decodes a clip of each video: out/check-DIR/*.csv
    python extras/videos.py prepare DIR DIR-256   re-encodes, so that training reads it fastest

`lists` knows the tables as downloaded, in DIR or a folder in it, and videos anywhere below:
    k400     *.csv with rows label,youtube_id,time_start,time_end,split; <id>_<start>_<end>.mp4, six
             digits each. Classes are numbered by name.
    ssv2     *labels.json, *train.json, *validation.json; <id>.webm
    ucf101   ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt; <Class>/v_*.avi; --split 1 to 3
    hmdb51   testTrainMulti_7030_splits/<class>_test_split1.txt; <class>/*.avi; --split 1 to 3
Videos that a table names and DIR lacks (in Kinetics some always are) are named in missing.txt.

`prepare` writes H.264 with short side 256, a key frame every 32 frames, B-frames that no other
frame needs, no sound. Names and folders stay, except that all end in .mp4, which lists find
nevertheless; a.avi beside a.mp4 keeps its name. Lists come along, with their absolute paths changed
to the new videos. Stopped at any moment it goes on where it was.
"""
import csv
import errno
import json
import os
import sys
from collections import Counter
from pathlib import Path

import av

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import (SUFFIXES, VideoError, decode, files_below, find_videos, in_parallel,
                  pretraining_frames, reformat, video_stream)
from sigma import UserError
from train import RunError, launch, parser_with


# --- lists ----------------------------------------------------------------------------------------

def tables(root, pattern):
    """Files by name in root or in a folder in it, those of root first."""
    return sorted(root.glob(pattern)) + sorted(root.glob(f"*/{pattern}"))


def rows(path):
    """The words of each line that has any."""
    return [line.split() for line in path.read_text().splitlines() if line.strip()]


def kinetics(root, split, number):
    found = []
    for path in tables(root, "*.csv"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if (table.fieldnames or [])[:2] == ["label", "youtube_id"]:
                found += table
    label = {name: i for i, name in enumerate(sorted({row["label"] for row in found}))}
    return [(f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}",
             label[row["label"]]) for row in found if row["split"].startswith(split)]


def something(root, split, number):
    file = "validation" if split == "val" else split
    labels, videos = (tables(root, pattern) for pattern in ("*labels.json", f"*{file}.json"))
    if not labels or not videos:
        return []
    label, plain = json.loads(labels[0].read_text()), str.maketrans("", "", "[]")
    return [(row["id"], int(label[row["template"].translate(plain)]))
            for row in json.loads(videos[0].read_text())]


def ucf101(root, split, number):
    label = {name: int(i) - 1 for path in tables(root, "classInd.txt") for i, name in rows(path)}
    file = f"{'train' if split == 'train' else 'test'}list{number:02}.txt"
    names = [row[0] for path in tables(root, file) for row in rows(path)]
    return [(name.removesuffix(".avi"), label[name.split("/")[0]]) for name in names]


def hmdb51(root, split, number):
    flag, end, found = "1" if split == "train" else "2", f"_test_split{number}.txt", []
    for label, path in enumerate(tables(root, "*" + end)):
        folder = path.name.removesuffix(end)
        found += [(f"{folder}/{name.removesuffix('.avi')}", label)
                  for name, theirs in rows(path) if theirs == flag]
    return found


SETS = {"k400": kinetics, "ssv2": something, "ucf101": ucf101, "hmdb51": hmdb51}


def new_folder(out):
    """Makes the folder for lists, unless it has some."""
    for name in ("train.csv", "val.csv"):
        if (out / name).exists():
            raise UserError(f"{out / name} is there already: choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def write(path, content):
    """Writes bytes under another name, then renames the file: it is complete or not there."""
    draft = path.with_name(f".{path.name}.unfinished")
    draft.write_bytes(content)
    draft.replace(path)


def lists(args):
    """Writes train.csv and val.csv with lines `path label`, and missing.txt."""
    root, out = Path(args.folder), Path(args.out or args.folder)
    new_folder(out)
    files, texts, missing = {}, {}, []
    for path in files_below(root) if root.is_dir() else ():
        if path.suffix.lower() in SUFFIXES:
            files[path.stem] = files[f"{path.parent.name}/{path.stem}"] = path
    for split in ("train", "val"):
        try:
            listed = SETS[args.set](root, split, args.split)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"the tables in {root} can't be read: {error!r}") from error
        found = [(files[name], label) for name, label in listed if name in files]
        kept = [f"{path.relative_to(out) if path.is_relative_to(out) else path.resolve()} {label}\n"
                for path, label in found]  # relative: the folder can be moved, or prepared
        missing += [f"{split} {name}\n" for name, _ in listed if name not in files]
        if not kept:
            raise UserError(f"{root} has no {split} videos that tables of {args.set} name "
                            f"({len(listed)} are named): see --help for the layout")
        texts[f"{split}.csv"] = kept
        print(f"{split}: {len(kept):,} of {len(listed):,} videos that the tables name")
    for name, lines in (texts | {"missing.txt": missing}).items():  # all of them, or none
        write(out / name, "".join(lines).encode())
    print(f"train with --data {args.set} --root {out}")


# --- check, prepare -------------------------------------------------------------------------------

def problem(path):
    """Why a clip of the video at path can't be read, or None."""
    try:
        decode(path, lambda n: pretraining_frames(n, frames=16, stride=4))
    except VideoError as error:
        return str(error)


def check(args):
    """Writes lists of the good videos of each split, which --data takes, and bad.txt."""
    source, classes, bad = Path(args.folder), None, []
    out = Path(args.out or f"out/check-{source.resolve().stem}")
    new_folder(out)
    for split, places in (("train", ("train", "")), ("val", ("val", "test"))):
        found = find_videos(source, places, classes, required=split == "train")
        if max(found.labels, default=-1) >= 0:
            classes = found.classes  # none from a list: class folders can't be numbered like it
        good = []
        checked = in_parallel(problem, found.paths, args.workers, f"checking {split}")
        for (path, reason), label in zip(checked, found.labels):
            if reason:
                bad.append(f"{path}: {reason}\n")
            else:
                good.append(os.path.abspath(path) + (f" {label}\n" if label >= 0 else "\n"))
        bad += [f"{line}\n" for line in found.skipped]
        if good:
            write(out / f"{split}.csv", "".join(good).encode())
            print(f"{out / split}.csv: {len(good):,} good videos of {len(found.paths):,}")
    write(out / "bad.txt", "".join(bad).encode())
    print(f"{len(bad):,} bad or skipped: {out / 'bad.txt'}; train with --data {out}")


def re_encode(pair):
    """Writes the video of a pair (source, target) anew; returns why it can't be done, or None."""
    source, target = pair
    draft = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(source), metadata_errors="replace") as old, \
                av.open(str(draft), "w", format="mp4") as new:
            video = video_stream(old)
            scale = 256 / min(video.width, video.height)
            # No frame refers to a B-frame, and three of four are: a clip can skip those.
            stream = new.add_stream("libx264", rate=video.average_rate, options={
                "preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32",
                "keyint_min": "32", "sc_threshold": "0", "bf": "3",
                "x264-params": "b-pyramid=none:b-adapt=0"})
            stream.width, stream.height = (max(2, round(side * scale / 2) * 2)
                                           for side in (video.width, video.height))
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", video.time_base
            stream.codec_context.thread_count = 1
            for frame in old.decode(video):
                image = reformat(frame, stream.width, stream.height, "yuv420p")
                image.pts, image.time_base = frame.pts, frame.time_base
                image.pict_type = 0  # the encoder's choice
                new.mux(stream.encode(image))
            new.mux(stream.encode(None))
        decode(str(draft), lambda n: [0, n - 1])  # a last look before it counts
        draft.replace(target)
    except (av.FFmpegError, VideoError, OSError, ValueError, IndexError, ZeroDivisionError,
            TypeError) as error:
        draft.unlink(missing_ok=True)
        return getattr(error, "strerror", None) or str(error)


def prepare(args):
    """Re-encodes the videos of a folder that the target does not have yet; copies lists."""
    source, target = (Path(folder).resolve() for folder in (args.folder, args.target))
    if not source.is_dir() or target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"{source} must be a folder of videos, and {target} another one outside it")
    files, pairs = [path for path in files_below(source) if path.is_file()], {}
    twins = Counter(path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES)
    for path in files:
        goal = target / path.relative_to(source)
        if path.suffix.lower() in SUFFIXES:
            alone = twins[path.with_suffix("")] == 1  # else a list would find the wrong one
            pairs[goal.with_suffix(".mp4") if alone else goal] = path
        elif path.suffix.lower() in (".csv", ".json", ".txt"):
            goal.parent.mkdir(parents=True, exist_ok=True)
            old, new = (os.fsencode(folder) + b"/" for folder in (source, target))
            write(goal, path.read_bytes().replace(old, new))  # absolute paths lead to the new ones
    left = [(path, goal) for goal, path in pairs.items() if not goal.exists()]
    print(f"{len(pairs):,} videos in {source}, {len(pairs) - len(left):,} in {target} already")
    bad = []
    for (path, _), reason in in_parallel(re_encode, left, args.workers, "preparing"):
        if reason == os.strerror(errno.ENOSPC):
            raise RunError(f"no room is left for {target}: make some, the same command goes on")
        bad += [f"{path}: {reason}\n"] if reason else []
    write(target / "bad.txt", "".join(bad).encode())
    print(f"{len(left) - len(bad):,} prepared, {len(bad):,} unreadable ({target / 'bad.txt'})")


def main(argv=None):
    parser = parser_with(__doc__)
    tasks = parser.add_subparsers(required=True)
    for work in (lists, check, prepare):
        task = tasks.add_parser(work.__name__, help=work.__doc__, description=work.__doc__)
        task.set_defaults(work=work)
        if work is lists:
            task.add_argument("set", choices=SETS)
            task.add_argument("--split", type=int, default=1, choices=(1, 2, 3))
        task.add_argument("folder", help="of the videos" + (", or a list" if work is check else ""))
        if work is prepare:
            task.add_argument("target", help="folder of the new videos")
        else:
            task.add_argument("--out", help="folder of the lists")
        if work is not lists:
            task.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    try:
        args.work(args)
    except OSError as error:  # such as a full disk
        raise RunError(f"a file can't be written or read: {error}") from error


if __name__ == "__main__":
    sys.exit(launch(main))
