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
import json
import sys
from bisect import bisect_left, bisect_right
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import (Clips, VideoError, all_frames, centre_crop, centre_frames, decode, find_videos,
                  frame_numbers, frame_times, held_out, normalise, opened, resize_crop, to_rgb)
from extras.evaluate import accuracy, collect, nearest_neighbours
from extras.run import (DEVICE, RANK, WORLD, autocast, claim, gather, launch, log, progress,
                        save_atomically, set_up, start_worker)
from sigma import UserError, load_encoder, read_checkpoint
from train import FLAGS, RECIPE, at_least, locate, parser_with

SPLITS = {"train": ("train", ""), "val": ("val", "test")}
BATCH = 16  # windows at a time, of one video


class Windows(IterableDataset):
    """All windows of videos, each file decoded once: items (number of the video, rows, clips (n, 3,
    W, S, S) uint8), at its end (number, facts about it or why it can't be read, None). Windows that
    can't be read are left out."""

    def __init__(self, paths, settings):
        self.paths = paths
        self.window, self.stride, self.step, self.size = (
            settings[name] for name in ("window", "stride", "step", "size"))

    def __iter__(self):
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.paths), every):
            try:
                facts, windows = self.plan(self.paths[number])
                while part := list(islice(windows, BATCH)):
                    rows, clips = zip(*part)
                    yield number, rows, torch.stack(clips)
                yield number, facts, None
            except VideoError as error:
                yield number, str(error), None

    def plan(self, path):
        """Facts about a video, from the times of all its frames, and an iterator of its windows."""
        with opened(path) as (container, stream):
            ticks, keys = frame_times(path, container, stream)
            n, tick, rate = len(ticks), float(stream.time_base), float(stream.guessed_rate or 25)
        step, span = (ticks[-1] - ticks[0]) / (n - 1 or 1) or 1, self.window * self.stride
        rate = 1 / float(step * tick) if n > 1 else rate
        clips = [[min(start + self.stride * i, n - 1) for i in range(self.window)]
                 for start in range(0, max(n - span, 0) + 1, self.step)]
        facts = dict(path=str(path), fps=rate, frames=n, duration=n / rate, windows=len(clips),
                     feature_stride=self.step, window_span=span)
        shown = frame_numbers(ticks, step, range(n))
        return facts, self.read(path, clips, shown, ticks if keys else None)

    def read(self, path, clips, shown, times):
        """Yields (row, window (3, W, S, S)) of clips, which are lists of indices, in one pass over
        the file. shown: the number of the frame that each index shows. times: of all frames, to
        tell them by, else they are counted."""
        needed, pictures, image, row, left = {i for clip in clips for i in clip}, {}, None, 0, []
        try:
            for count, (frame, _) in enumerate(all_frames(path)):
                number = bisect_left(times, frame.pts) if times else count  # some may be lost
                first, end = bisect_left(shown, number), bisect_right(shown, number)
                if here := needed.intersection(range(first, end)):
                    image = to_rgb(frame, image)
                    pictures |= dict.fromkeys(here, self.picture(image.permute(2, 0, 1)[None]))
                while row < len(clips) and clips[row][-1] < end:
                    if pictures.keys() >= set(clips[row]):
                        yield row, torch.cat([pictures[i] for i in clips[row]], dim=1)
                    else:
                        left.append(row)
                    row += 1
                    pictures = {i: x for i, x in pictures.items() if i >= row * self.step}
        except VideoError:
            if image is None:
                raise
        for row in left + list(range(row, len(clips))):  # of damaged files: what can be had apart
            try:
                clip, = decode(path, lambda n: [clips[row]])
                yield row, self.picture(clip)
            except VideoError:
                pass

    def picture(self, frames):
        """Frames (n, 3, H, W), cropped and resized as in Clips: (3, n, S, S)."""
        return resize_crop(frames, centre_crop(*frames.shape[-2:]), self.size)


@torch.no_grad()
def windows_features(forward, windows, amp, workers):
    """Yields (path, facts about the video, its features (windows, D)), or (path, why it can't be
    read, None). The nearest row stands in for a missing one; facts tell which."""
    found = {}
    for number, what, clips in DataLoader(windows, batch_size=None, num_workers=workers,
                                          worker_init_fn=start_worker):
        rows, path = found.setdefault(number, {}), windows.paths[number]
        if clips is not None:
            with autocast(amp):
                rows |= zip(what, forward(normalise(clips, DEVICE)).float().cpu())
        elif not rows:
            yield path, what if isinstance(what, str) else "none of its windows can be read", None
        else:
            missing = [row for row in range(what["windows"]) if row not in rows]
            rows |= {row: rows[min(rows, key=lambda other: abs(other - row))] for row in missing}
            features = torch.stack([rows[row] for row in range(what["windows"])])
            yield path, what | {"unreadable": missing}, features
            found[number] = {}


def write(path, content):
    """Writes a tensor as .npy, anything else as JSON, complete or not at all."""
    draft = path.with_name(f"{path.name}.unfinished")
    with open(draft, "wb") as file:
        if isinstance(content, torch.Tensor):
            try:
                import numpy
            except ImportError as error:
                raise UserError("to write .npy files do: pip install numpy") from error
            numpy.save(file, content.numpy())
        else:
            file.write(json.dumps(content, indent=2).encode())
    draft.replace(path)


def write_windows(forward, paths, out, settings, amp, workers):
    """Writes NAME.npy for each video, and windows.json."""
    names = {}
    for path in paths:
        if names.setdefault(Path(path).stem, path) != path:
            raise UserError(f"{names[Path(path).stem]} and {path} would share one .npy: rename one")
    lock = claim(out) if RANK == 0 else None  # held until this function ends
    gather()
    before, videos = out / "windows.json", {}
    if before.exists():
        before = json.loads(before.read_text())
        if before["settings"] != settings:
            raise UserError(f"{out} has windows of other settings, {before['settings']}, not "
                            f"{settings}: choose another --out")
        videos = before["videos"]
    elif other := next(out.glob("*.npy"), None):
        raise UserError(f"{other} is there without a windows.json: choose another --out")
    step, span = settings["step"], settings["window"] * settings["stride"]
    content = dict(settings=settings, actionformer=dict(feat_stride=step, num_frames=span),
                   opentad=dict(feature_stride=step, offset_frames=span // 2), videos=videos)
    share = 4 * max(1, workers)  # videos of each process, from one note in windows.json to the next
    todo = gather([path for name, path in names.items()
                   if name not in videos or not (out / f"{name}.npy").exists()])[0]
    log(f"{len(names) - len(todo):,} of {len(names):,} videos are done")
    bar = progress(total=len(todo), unit="video", disable=RANK > 0)
    if RANK == 0:  # settings first: there is no .npy without them
        write(out / "windows.json", content)
    for start in range(0, len(todo), share * WORLD):
        found, part = {}, todo[start:start + share * WORLD]
        windows = Windows(part[RANK::WORLD], settings)
        for path, facts, features in windows_features(forward, windows, amp, workers):
            if features is not None:
                write(out / f"{Path(path).stem}.npy", features)
            found[path] = facts
        found = {path: facts for there in gather(found) for path, facts in there.items()}
        for path in part:  # in order, whoever read them
            if isinstance(facts := found[path], str):
                log(f"unreadable video {path}: {facts}")
                continue
            videos[Path(path).stem] = facts
            if rows := facts["unreadable"]:
                log(f"{path}: {len(rows)} of {facts['windows']} windows can't be read and have the "
                    f"nearest one's features: {', '.join(map(str, rows[:20]))}")
        if RANK == 0:
            write(out / "windows.json", content)
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
    trained = RECIPE | content["args"]  # take clips like those that it was trained on
    frames = args.window or args.frames or trained["frames"]
    stride, size = args.stride or trained["stride"], args.size or trained["size"]
    if any(side % step for side, step in zip((frames, size, size), encoder.tube)):
        raise UserError(f"frames and --size must be multiples of the tube, {encoder.tube}")
    norm = [content["model"][name].to(DEVICE) for name in content["model"]
            if name.startswith("fc_norm.")]  # of a fine-tuned network: weight and bias

    def forward(video):
        tokens = encoder(video)  # B N D
        if args.tokens:
            return tokens
        pooled = tokens.mean(dim=1)
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
        paths = [path for path, _ in videos]
        return write_windows(forward, paths, out, settings, args.amp, args.workers)
    if args.knn:
        tests = held_out(videos, classes, root, args.val, required=True)
        (train, labels), (test, truth) = features_of(videos), features_of(tests)
        results = dict(knn=accuracy(nearest_neighbours(train, labels, test), truth),
                       videos=len(truth), unreadable=int((truth < 0).sum()), args=vars(args),
                       protocol="cosine, k = 20, votes exp(cosine / 0.07), one centre clip")
        if RANK == 0:
            write(out / "results.json", results)
        return log(f"k-NN {results['knn']:.1%} of {len(truth):,} videos; wrote {out}/results.json")
    numbered = [(path, i) for i, (path, _) in enumerate(videos)]  # -1 is left for unreadable
    features, numbers = features_of(numbered)
    paths, labels = zip(*(videos[i] for i in numbers.tolist() if i >= 0))
    features = features[numbers >= 0]
    if RANK == 0:
        save_atomically(out / "features.pt", dict(features=features, paths=list(paths),
                                                  labels=torch.tensor(labels), args=vars(args)))
    log(f"wrote {out}/features.pt: features {tuple(features.shape)}")


if __name__ == "__main__":
    sys.exit(launch(main))
