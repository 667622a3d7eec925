"""Features of sliding windows of videos, for detectors of actions in time, such as ActionFormer.

    python extras/windows.py --init RUN --data DIR --window 16 --step 16 --workers 8

NAME.npy for each video, float32 (windows, D): a row for each window of W frames, --stride apart,
one every S frames, the mean over the encoder's tokens (after fc_norm, if the network was
fine-tuned); and windows.json with their times. An unreadable window keeps its row, with the nearest
one's features, and is named. Run the same command again to resume.
"""
import contextlib
import json
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import SPLITS, centre_crop, decode, find_videos, resize_crop
from extras.evaluate import clip_of, finite, missing, share_of, told
from extras.reader import VideoError, all_frames, frame_times, nearest, opened, to_rgb
from extras.run import (DEVICE, RANK, WORLD, claim, draft_of, gather, gather_dict, launch, log,
                        progress, set_up, start_worker, write_json)
from sigma import UserError, load_encoder, read_checkpoint
from train import DEFAULTS, FLAGS, at_least, check_clip, locate, parser_with

HELP = {  # what flags of train.py mean here
    "stride": "video frames from one frame of a window to the next (default: the run's of --init)",
    "size": "height and width of a window, pixels (default: the same)",
    "workers": "loader processes of each process (default: 0)"}


class Windows(IterableDataset):
    """All windows of videos: items (path, rows, clips (n, 3, W, S, S) uint8), at the end of a video
    (path, facts about it or why it can't be read, None)."""

    def __init__(self, paths, settings):
        self.paths, self.settings = paths, settings

    def __iter__(self):
        worker = get_worker_info()
        for path in self.paths[worker.id::worker.num_workers] if worker else self.paths:
            try:
                facts = next(windows := windows_of(path, **self.settings))
                while part := list(islice(windows, 16)):  # to the network at once
                    rows, clips = zip(*part)
                    yield path, rows, torch.stack(clips)
                yield path, facts, None
            except VideoError as error:
                yield path, str(error), None


def windows_of(path, *, window, stride, step, size, **_):
    """Yields facts about a video, then (row, clip (3, W, S, S) uint8) for each window that can be
    read, from one pass over the file. Raises VideoError."""
    def picture(frames):  # n 3 H W -> 3 n S S
        return resize_crop(frames, centre_crop(*frames.shape[-2:]), size)

    with opened(path) as (container, stream):
        ticks, _ = frame_times(path, container, stream)
        n, tick, rate = len(ticks), stream.time_base, stream.guessed_rate or 25
    gap, span = (ticks[-1] - ticks[0]) / (n - 1 or 1) or 1 / (rate * tick), window * stride
    clips = [range(start, start + span, stride) for start in range(0, max(n - span, 0) + 1, step)]
    yield dict(path=str(path), fps=1 / float(gap * tick), frames=n, duration=n * float(gap * tick),
               windows=len(clips), feature_stride=step, window_span=span)
    # Of all indices; beyond the end: the last frame.
    shown = [nearest(ticks, ticks[0] + i * gap) for i in range(max(n, span))]
    numbers = [[shown[i] for i in clip] for clip in clips]  # of the frames that the indices show
    needed, left = set().union(*numbers), set(range(len(clips)))
    pictures, image, row = {}, None, 0
    try:
        for number, frame, _ in all_frames(path):
            if number in needed:
                image = to_rgb(frame, image)
                pictures[number] = picture(image.permute(2, 0, 1)[None])
            while row < len(clips) and numbers[row][-1] <= number:
                if pictures.keys() >= set(numbers[row]):  # else a frame was lost
                    yield row, torch.cat([pictures[i] for i in numbers[row]], dim=1)
                    left.remove(row)
                pictures = {i: x for i, x in pictures.items() if i >= numbers[row][0]}
                row += 1
    except VideoError:
        if image is None:
            raise
    for row in sorted(left):  # of damaged files: what can be had apart
        with contextlib.suppress(VideoError):
            yield row, picture(*decode(path, lambda n: [clips[row]]))


@torch.no_grad()
def write_features(forward, windows, out, workers):
    """Writes NAME.npy, (windows, D), for each video of a Windows. Returns by path the facts about
    it, or why it can't be read. The nearest row stands in for a missing one; facts tell which."""
    try:
        import numpy
    except ImportError as error:
        raise UserError("to write .npy files do: pip install numpy") from error
    features, found = {}, {}
    for path, what, clips in DataLoader(windows, batch_size=None, num_workers=workers,
                                        worker_init_fn=start_worker):
        rows = features.setdefault(path, {})
        if clips is not None:
            rows |= zip(what, finite(forward, clips, windows.settings["amp"], path).cpu())
        elif not rows:
            found[path] = what if isinstance(what, str) else "none of its windows can be read"
        else:
            every = range(what["windows"])
            lost = [row for row in every if row not in rows]
            rows |= {row: rows[min(rows, key=lambda other: abs(other - row))] for row in lost}
            with draft_of(out / f"{Path(path).stem}.npy") as draft, open(draft, "wb") as file:
                numpy.save(file, torch.stack([rows[row] for row in every]).numpy())
            found[path] = what | {"unreadable": lost}
            rows.clear()
    return found


def write_windows(forward, paths, out, settings, workers, skipped):
    """Writes NAME.npy for each video, and windows.json. skipped: what was named but is missing."""
    names, index = {}, out / "windows.json"
    for path in paths:
        if names.setdefault(Path(path).stem, path) != path:
            raise UserError(f"{names[Path(path).stem]} and {path} would share one .npy: rename one")
    saved = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    if saved.get("settings", settings) != settings:
        raise UserError(f"{out} has windows of other settings, {saved['settings']}, not "
                        f"{settings}: choose another --out")
    if not saved and (other := next(out.glob("*.npy"), None)):
        raise UserError(f"{other} is there without a windows.json: choose another --out")
    videos, step = saved.get("videos", {}), settings["step"]
    span = settings["window"] * settings["stride"]
    content = dict(settings=settings, actionformer=dict(feat_stride=step, num_frames=span),
                   opentad=dict(feature_stride=step, offset_frames=span // 2),
                   **missing(skipped), videos=videos)
    todo = gather([path for name, path in names.items()
                   if name not in videos or not (out / f"{name}.npy").exists()])[0]
    log(f"{len(names) - len(todo):,} of {len(names):,} videos are done")
    write_json(index, content)  # settings first: there is no .npy without them
    share = 4 * max(1, workers) * WORLD  # videos from one note in windows.json to the next
    bar = progress(total=len(todo), unit="video", disable=RANK > 0)
    for start in range(0, len(todo), share):
        part = todo[start:start + share]
        found = write_features(forward, Windows(part[RANK::WORLD], settings), out, workers)
        found = gather_dict(found)
        for path in part:  # in order, whoever read them
            if isinstance(facts := found[path], str):
                log(f"unreadable video {path}: {facts}")
                continue
            videos[Path(path).stem] = facts
            if rows := facts["unreadable"]:
                log(f"{path}: {len(rows)} of {facts['windows']} windows can't be read and have the "
                    f"nearest one's features: {', '.join(map(str, rows[:20]))}")
        write_json(index, content)
        bar.update(len(part))
    bar.close()
    bad = sum(name not in videos for name in names)
    if bad == len(names):
        raise UserError("none of the videos can be read")
    share = share_of(len(names), len(names) + missing(skipped)["missing"])
    log(f"wrote {out}/windows.json and {len(names) - bad:,} .npy files, {share}; {bad:,} can't be "
        f"read{told(skipped)}")


def parse(argv):
    """The flags."""
    parser = parser_with(__doc__, *"data root amp out".split(), meanings=HELP)
    add = parser.add_argument
    add("--init", required=True, **FLAGS["init"])
    add("--split", choices=SPLITS, default="train", help="default: train, or the folder itself")
    add("--window", type=at_least(1), help="frames of a window (default: of the run's clips)")
    add("--step", type=at_least(1), default=16, help="video frames from one window to the next "
        "(default: 16)")
    parser.set_defaults(workers=0)
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{Path(args.data).resolve().stem}-{args.split}-windows"
    return args


def main(argv=None):
    """One run, from the flags to the files."""
    args = parse(argv)
    set_up()
    encoder, content = load_encoder(args.init).to(DEVICE).eval(), read_checkpoint(args.init)
    flags = {"frames": args.window, "stride": args.stride, "size": args.size}
    clip = DEFAULTS | clip_of(content) | {name: flag for name, flag in flags.items() if flag}
    check_clip(clip["frames"], clip["size"], encoder.tube)
    norm = [w.to(DEVICE) for name, w in content["model"].items() if name.startswith("fc_norm.")]

    def forward(video):
        pooled = encoder(video).mean(dim=1)  # B D
        return F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-6) if norm else pooled

    root, out = locate(args.data, args.root), Path(args.out)
    videos, _, skipped = find_videos(root, SPLITS[args.split])
    if not videos:
        raise UserError(f"{root} has no {args.split} videos")
    settings = dict(window=clip["frames"], stride=clip["stride"], step=args.step,
                    size=clip["size"], amp=args.amp,
                    weights=sum(int(p.view(torch.int32).sum())  # to tell networks apart
                                for p in [*encoder.parameters(), *norm]))
    log(f"data      {len(videos):,} videos{told(skipped)}")
    with claim(out) if RANK == 0 else contextlib.nullcontext():  # locks it against others
        write_windows(forward, [p for p, _ in videos], out, settings, args.workers, skipped)


if __name__ == "__main__":
    sys.exit(launch(main))
