"""Features of videos from a frozen encoder, and k-NN on them.

    python extras/features.py --init out/toy-tiny-mlp --data toy --split val
    python extras/features.py --init out/toy-tiny-mlp --data toy --knn

features.pt holds `features` (videos, D), the mean over the encoder's tokens of one centre clip
(after fc_norm, if the network was fine-tuned), with --tokens (videos, N, D); `paths` and `labels`,
in list order; how many videos were `named`, how many of them are `missing` or `unreadable`: these
are left out. --knn: cosine, k = 20, votes exp(cosine / 0.07), held-out videos against training
ones. Windows for detectors of actions: extras/windows.py.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import SPLITS, Clips, centre_crop, centre_frames, find_videos
from extras.evaluate import (accuracy, clip_of, collect, held_out, missing, nearest_neighbours,
                             share_of, told)
from extras.run import DEVICE, RANK, launch, log, save_atomically, set_up, write_json
from sigma import UserError, load_encoder, read_checkpoint
from train import DEFAULTS, FLAGS, check_clip, locate, parser_with

HELP = {  # what flags of train.py mean here
    "val": "with --knn: labelled videos to test on (default: val or test of --data)",
    "frames": "frames of a clip (default: as in the run of --init)",
    "stride": "video frames from one frame of a clip to the next (default: the same)",
    "size": "height and width of a clip, pixels (default: the same)",
    "workers": "loader processes of each process (default: 0)"}


def parse(argv):
    """The flags, and the file to write."""
    parser = parser_with(__doc__, *"data root amp out".split(), meanings=HELP)
    add = parser.add_argument
    add("--init", required=True, **FLAGS["init"])
    add("--split", choices=SPLITS, default="train", help="default: train, or the folder itself")
    add("--knn", action="store_true", help="k-NN of held-out videos, no file of features")
    add("--tokens", action="store_true", help="a feature of each tube instead of each video")
    parser.set_defaults(workers=0)
    words = sys.argv[1:] if argv is None else argv
    if {"--window", "--step"} & {word.split("=")[0] for word in words}:
        raise UserError("windows have a script of their own: python extras/windows.py")
    args = parser.parse_args(argv)
    if args.knn and (args.tokens or args.split == "val"):
        parser.error("--knn takes both splits, and no --tokens")
    out = Path(args.out or f"out/{Path(args.data).resolve().stem}-{args.split}-features")
    result = out / ("results.json" if args.knn else "features.pt")
    if result.exists():
        parser.error(f"{result} is there already: choose another --out")
    return args, result


def network(args):
    """A function from normalised clips to their features, and the Clips' options. Clips are like
    those that the network was trained on, unless flags differ."""
    encoder, content = load_encoder(args.init).to(DEVICE).eval(), read_checkpoint(args.init)
    clip = DEFAULTS | clip_of(content)
    clip = {name: vars(args)[name] or clip[name] for name in ("frames", "stride", "size")}
    check_clip(clip["frames"], clip["size"], encoder.tube)
    norm = [w.to(DEVICE) for name, w in content["model"].items() if name.startswith("fc_norm.")]

    def forward(video):
        if args.tokens:
            return encoder(video)  # B N D
        pooled = encoder(video).mean(dim=1)  # B D
        # A fine-tuned network has a norm of its own after the mean: weight and bias.
        return F.layer_norm(pooled, pooled.shape[1:], *norm, eps=1e-6) if norm else pooled

    return forward, clip | dict(tube=encoder.tube, ratio=None, choose=centre_frames,
                                crop=centre_crop, tries=1)


def main(argv=None):
    """One run, from the flags to a file."""
    args, result = parse(argv)
    set_up()
    forward, options = network(args)

    def features_of(videos):
        return collect(forward, Clips(videos, **options), args.amp, args.workers)

    root = locate(args.data, args.root)
    videos, classes, skipped = find_videos(root, SPLITS[args.split])
    if not videos:
        raise UserError(f"{root} has no {args.split} videos")
    log(f"data      {len(videos):,} videos{told(skipped)}")
    gone = missing(skipped)
    result.parent.mkdir(parents=True, exist_ok=True)
    if args.knn:
        tests, lacking = held_out(videos, classes, root, args.val, required=True)
        log(f"tests     {len(tests):,} videos{told(lacking)}")
        (train, labels), (test, truth) = features_of(videos), features_of(tests)
        knn, lost = accuracy(nearest_neighbours(train, labels, test), truth), missing(lacking)
        named = len(tests) + lost["missing"]
        write_json(result, dict(
            knn=knn, videos=len(truth), named=named, **lost,
            unreadable=int((truth < 0).sum()), training={
                "videos": len(labels), "named": len(videos) + gone["missing"], **gone,
                "unreadable": int((labels < 0).sum())},
            args=vars(args), protocol="cosine, k = 20, votes exp(cosine / 0.07), one centre clip"))
        return log(f"k-NN {knn:.1%} {share_of(len(truth), named)}; wrote {result}")
    features, numbers = features_of([(path, i) for i, (path, _) in enumerate(videos)])
    features = features[numbers >= 0]  # -1: it can't be read; its own label may be -1 too
    paths, labels = zip(*(videos[i] for i in numbers.tolist() if i >= 0))
    bad, named = len(videos) - len(paths), len(videos) + gone["missing"]
    if RANK == 0:
        save_atomically(result, dict(
            features=features, paths=list(paths), labels=torch.tensor(labels), named=named,
            **gone, unreadable=bad, args=vars(args)))
    log(f"wrote {result}: features {tuple(features.shape)} {share_of(len(paths), named)}; {bad:,} "
        "can't be read")


if __name__ == "__main__":
    sys.exit(launch(main))
