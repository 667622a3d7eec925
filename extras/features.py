"""Features of videos from a frozen encoder, and k-NN on them.

    python extras/features.py --init out/toy-tiny-mlp --data toy --split val
    python extras/features.py --init out/toy-tiny-mlp --data toy --knn
    python extras/features.py --init RUN --data DIR --window 16 --step 16

features.pt holds `features` (videos, D), the mean over the encoder's tokens of one centre clip
(behind fc_norm, if the network was fine-tuned), with --tokens (videos, N, D); `paths` and `labels`,
in list order; videos that can't be read are named and left out. --knn: cosine, k = 20, votes
exp(cosine / 0.07), held-out videos against training ones.

--window W --step S is for detectors of actions in time, such as ActionFormer: NAME.npy for each
video, float32 (windows, D), a row for each window of W frames, --stride apart, one every S frames;
and windows.json with their times. The same command goes on where it stopped.
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
from data import Clips, centre_crop, centre_frames, decode, find_videos, normalise, resize_crop
from extras.evaluate import accuracy, collect, held_out, nearest_neighbours
from extras.reader import VideoError, all_frames, frame_times, nearest, opened, to_rgb
from extras.run import (DEVICE, RANK, WORLD, autocast, claim, gather, launch, log, progress,
                        save_atomically, set_up, start_worker)
from sigma import UserError, load_encoder, read_checkpoint
from train import FLAGS, DEFAULTS, at_least, locate, parser_with

SPLITS = {"train": ("train", ""), "val": ("val", "test")}


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
            with autocast(windows.settings["amp"]):
                rows |= zip(what, forward(normalise(clips, DEVICE)).float().cpu())
        elif not rows:
            found[path] = what if isinstance(what, str) else "none of its windows can be read"
        else:
            every = range(what["windows"])
            missing = [row for row in every if row not in rows]
            rows |= {row: rows[min(rows, key=lambda other: abs(other - row))] for row in missing}
            draft = out / f"{Path(path).stem}.npy.unfinished"
            with open(draft, "wb") as file:
                numpy.save(file, torch.stack([rows[row] for row in every]).numpy())
            draft.replace(draft.with_suffix(""))
            found[path] = what | {"unreadable": missing}
            rows.clear()
    return found


def write(path, content):
    """Writes JSON, complete or not at all, on the first rank alone."""
    if RANK == 0:
        draft = path.with_name(f"{path.name}.unfinished")
        draft.write_text(json.dumps(content, indent=2))
        draft.replace(path)


def write_windows(forward, paths, out, settings, workers):
    """Writes NAME.npy for each video, and windows.json."""
    names, index = {}, out / "windows.json"
    for path in paths:
        if names.setdefault(Path(path).stem, path) != path:
            raise UserError(f"{names[Path(path).stem]} and {path} would share one .npy: rename one")
    before = json.loads(index.read_text()) if index.exists() else {}
    if before.get("settings", settings) != settings:
        raise UserError(f"{out} has windows of other settings, {before['settings']}, not "
                        f"{settings}: choose another --out")
    if not before and (other := next(out.glob("*.npy"), None)):
        raise UserError(f"{other} is there without a windows.json: choose another --out")
    videos, step = before.get("videos", {}), settings["step"]
    span = settings["window"] * settings["stride"]
    content = dict(settings=settings, actionformer=dict(feat_stride=step, num_frames=span),
                   opentad=dict(feature_stride=step, offset_frames=span // 2), videos=videos)
    todo = gather([path for name, path in names.items()
                   if name not in videos or not (out / f"{name}.npy").exists()])[0]
    log(f"{len(names) - len(todo):,} of {len(names):,} videos are done")
    write(index, content)  # settings first: there is no .npy without them
    share = 4 * max(1, workers) * WORLD  # videos from one note in windows.json to the next
    bar = progress(total=len(todo), unit="video", disable=RANK > 0)
    for start in range(0, len(todo), share):
        part = todo[start:start + share]
        found = write_features(forward, Windows(part[RANK::WORLD], settings), out, workers)
        found = {path: facts for there in gather(found) for path, facts in there.items()}
        for path in part:  # in order, whoever read them
            if isinstance(facts := found[path], str):
                log(f"unreadable video {path}: {facts}")
                continue
            videos[Path(path).stem] = facts
            if rows := facts["unreadable"]:
                log(f"{path}: {len(rows)} of {facts['windows']} windows can't be read and have the "
                    f"nearest one's features: {', '.join(map(str, rows[:20]))}")
        write(index, content)
        bar.update(len(part))
    bar.close()
    bad = sum(name not in videos for name in names)
    if bad == len(names):
        raise UserError("none of the videos can be read")
    log(f"wrote {out}/windows.json and {len(names) - bad:,} .npy files; {bad:,} can't be read")


def parse(argv):
    """The flags."""
    parser = parser_with(__doc__, *"data root val frames stride size amp workers out".split())
    add = parser.add_argument
    add("--init", required=True, **FLAGS["init"])
    add("--split", choices=SPLITS, default="train", help="default: train, or the folder itself")
    add("--knn", action="store_true", help="k-NN of held-out videos, no file of features")
    add("--tokens", action="store_true", help="a feature of each tube instead of each video")
    add("--window", type=at_least(1), help="frames of a window; one file per video")
    add("--step", type=at_least(1), default=16, help="video frames from one window to the next")
    parser.set_defaults(workers=0)
    args = parser.parse_args(argv)
    if args.knn + args.tokens + bool(args.window) > 1 or args.knn and args.split == "val":
        parser.error("--knn, --tokens and --window exclude each other, and --knn takes both splits")
    if args.window and args.frames:
        parser.error("--window takes the place of --frames")
    out = Path(args.out or f"out/{Path(args.data).resolve().stem}-{args.split}-features")
    result = out / ("results.json" if args.knn else "features.pt")
    if not args.window and result.exists():
        parser.error(f"{result} is there already: choose another --out")
    return args, out


def main(argv=None):
    """One run, from the flags to a file."""
    args, out = parse(argv)
    set_up()
    encoder, content = load_encoder(args.init).to(DEVICE).eval(), read_checkpoint(args.init)
    # Clips are like those that it was trained on, unless flags differ.
    clip = DEFAULTS | content["args"] | {name: flag for name, flag in vars(args).items() if flag}
    frames, stride, size = args.window or clip["frames"], clip["stride"], clip["size"]
    if any(side % step for side, step in zip((frames, size, size), encoder.tube)):
        raise UserError(f"frames and --size must be multiples of the tube, {encoder.tube}")
    norm = [w.to(DEVICE) for name, w in content["model"].items() if name.startswith("fc_norm.")]

    def forward(video):
        if args.tokens:
            return encoder(video)  # B N D
        pooled = encoder(video).mean(dim=1)  # B D
        # A fine-tuned network has a norm of its own behind the mean: weight and bias.
        return F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-6) if norm else pooled

    def features_of(videos):
        clips = Clips(videos, frames=frames, stride=stride, size=size, tube=encoder.tube,
                      ratio=None, choose=centre_frames, crop=centre_crop, tries=1)
        return collect(forward, clips, args.amp, args.workers)

    root = locate(args.data, args.root)
    videos, classes, _ = find_videos(root, SPLITS[args.split])
    if not videos:
        raise UserError(f"{root} has no {args.split} videos")
    out.mkdir(parents=True, exist_ok=True)
    if args.window:
        settings = dict(window=frames, stride=stride, step=args.step, size=size, amp=args.amp,
                        weights=sum(int(p.view(torch.int32).sum())  # to tell networks apart
                                    for p in [*encoder.parameters(), *norm]))
        with claim(out) if RANK == 0 else contextlib.nullcontext():  # locks it against others
            return write_windows(forward, [p for p, _ in videos], out, settings, args.workers)
    if args.knn:
        tests, _ = held_out(videos, classes, root, args.val, required=True)
        (train, labels), (test, truth) = features_of(videos), features_of(tests)
        results = dict(knn=accuracy(nearest_neighbours(train, labels, test), truth),
                       videos=len(truth), unreadable=int((truth < 0).sum()), args=vars(args),
                       protocol="cosine, k = 20, votes exp(cosine / 0.07), one centre clip")
        write(out / "results.json", results)
        return log(f"k-NN {results['knn']:.1%} of {len(truth):,} videos; wrote {out}/results.json")
    features, numbers = features_of([(path, i) for i, (path, _) in enumerate(videos)])
    features = features[numbers >= 0]  # -1: it can't be read; its own label may be -1 too
    paths, labels = zip(*(videos[i] for i in numbers.tolist() if i >= 0))
    if RANK == 0:
        save_atomically(out / "features.pt", dict(features=features, paths=list(paths),
                                                  labels=torch.tensor(labels), args=vars(args)))
    log(f"wrote {out}/features.pt: features {tuple(features.shape)}")


if __name__ == "__main__":
    sys.exit(launch(main))
