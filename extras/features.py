"""Features of videos from a frozen encoder, and k-NN on them.

    python extras/features.py --init out/toy-tiny-mlp --data toy --split val
    python extras/features.py --init out/toy-tiny-mlp --data toy --knn
    python extras/features.py --init RUN --data DIR --window 16 --step 16

features.pt holds `features` (videos, D), the mean over the encoder's tokens of one centre clip
(behind fc_norm, if the network was fine-tuned), with --tokens (videos, N, D); `paths` and `labels`,
in list order; videos that can't be read are named and left out. --knn: cosine, k = 20, votes
exp(cosine / 0.07), held-out videos against training ones. --window W --step S: features of windows
of W frames, --stride apart, one every S frames, a file per video with `features` (windows, D) and
`starts`, which is what detectors of actions in time such as ActionFormer read.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, VideoError, centre_crop, centre_frames, decode, find_videos
from sigma import UserError, load_model, read_checkpoint
from train import (DEVICE, FLAGS, RANK, RECIPE, accuracy, at_least, collect, launch, locate, log,
                   nearest_neighbours, parser_with, save_atomically, set_up)


SPLITS = {"train": ("train", ""), "val": ("val", "test")}


class Windows(Clips):
    """Clips at given places: `videos` is a list of pairs ((path, start), start)."""

    def read(self, video, generator):
        path, start = video
        self.choose = lambda n, frames, stride, _: [min(start + stride * i, n - 1)
                                                    for i in range(frames)]
        return super().read(path, generator)


def main(argv=None):
    """One run, from the flags to a file."""
    parser = parser_with(__doc__, *"data root val frames stride size amp workers out".split())
    add = parser.add_argument
    add("--init", required=True, **FLAGS["init"])
    add("--split", choices=SPLITS, default="train", help="default: train, or the folder itself")
    add("--knn", action="store_true", help="k-NN of held-out videos, no file of features")
    add("--tokens", action="store_true", help="a feature of each tube instead of each video")
    add("--window", type=at_least(1), help="frames of a window; one file per video")
    add("--step", type=at_least(1), default=16, help="frames from one window to the next")
    parser.set_defaults(workers=0)
    args = parser.parse_args(argv)
    if args.knn and (args.tokens or args.window or args.split == "val"):
        parser.error("--knn needs pooled features of both splits: leave out --tokens, --window and "
                     "--split")
    out = Path(args.out or f"out/{Path(args.data).resolve().stem}-{args.split}-features")
    if (out / "features.pt").exists():
        parser.error(f"{out}/features.pt is there already: choose another --out")
    set_up()

    # The network, and clips like those that it was trained on.
    encoder, content = load_model(args.init).encoder.to(DEVICE).eval(), read_checkpoint(args.init)
    trained = content.get("args")
    trained = RECIPE | (trained if isinstance(trained, dict) else {})  # else: of other code
    frames = args.window or args.frames or trained["frames"]
    stride, size = args.stride or trained["stride"], args.size or trained["size"]
    if any(side % step for side, step in zip((frames, size, size), encoder.tube)):
        parser.error(f"frames and --size must be multiples of the tube, {encoder.tube}")
    norm = [content["model"][name].to(DEVICE) for name in content["model"]
            if name.startswith("fc_norm.")]  # of a fine-tuned network: weight and bias

    def forward(video):
        tokens = encoder(video)  # B N D
        if args.tokens:
            return tokens
        pooled = tokens.mean(dim=1)
        return F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-6) if norm else pooled

    def features_of(videos, kind=Clips):
        clips = kind(videos, frames=frames, stride=stride, size=size, tube=encoder.tube, ratio=0.5,
                     choose=centre_frames, crop=centre_crop, tries=1)
        return collect(forward, clips, args.amp, args.workers)

    root = locate(args.data, args.root)
    videos, classes, _ = find_videos(root, SPLITS[args.split])
    if not videos:
        raise UserError(f"{root} has no {args.split} videos")
    out.mkdir(parents=True, exist_ok=True)
    if args.knn:
        splits = ("val", "test", "") if args.val else ("val", "test")
        tests, *_ = find_videos(args.val or root, splits, classes)
        if not tests or min(label for _, label in videos + tests) < 0:
            raise UserError("give labelled videos and others to test on, as class folders or lines "
                            "`path label`: train and val in --data, or --data and --val")
        (train, labels), (test, truth) = features_of(videos), features_of(tests)
        results = dict(knn=accuracy(nearest_neighbours(train, labels, test), truth),
                       videos=len(truth), unreadable=int((truth < 0).sum()), args=vars(args),
                       protocol="cosine, k = 20, votes exp(cosine / 0.07), one centre clip")
        if RANK == 0:
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        return log(f"k-NN {results['knn']:.1%} of {len(truth):,} videos; wrote {out}/results.json")

    def save(name, **content):
        if RANK == 0:
            save_atomically(out / name, content)
            log(f"wrote {out / name}: features {tuple(content['features'].shape)}")

    if not args.window:
        numbered = [(path, i) for i, (path, _) in enumerate(videos)]  # -1 is left for unreadable
        features, numbers = features_of(numbered)
        paths, labels = zip(*(videos[i] for i in numbers.tolist() if i >= 0))
        return save("features.pt", features=features[numbers >= 0], paths=list(paths),
                    labels=torch.tensor(labels), args=vars(args))
    for index, (path, _) in enumerate(videos):
        starts = []

        def place(n):
            starts.extend(range(0, max(n - frames * stride, 0) + 1, args.step))
            return [[0]]

        try:
            decode(path, place)
            features, found = features_of([((path, start), start) for start in starts], Windows)
        except (VideoError, UserError) as error:  # at its beginning, or in all windows
            log(f"unreadable video {path}: {error}")
            continue
        save(f"{index:06}-{Path(path).stem}.pt", features=features[found >= 0],
             starts=found[found >= 0], path=path)


if __name__ == "__main__":
    sys.exit(launch(main))
