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
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, VideoError, centre_crop, centre_frames, decode, find_videos, normalise
from data import resize_crop
from sigma import UserError, load_model, read_checkpoint
from train import (RANK, RECIPE, WORLD, accuracy, autocast, collect, count, gather, launch, locate,
                   log, nearest_neighbours, parser_with, pick_amp, save_atomically, set_up)

SPLITS = {"train": ("train", ""), "val": ("val", "test")}


def parse(argv):
    parser = parser_with(__doc__, *"init data root val frames stride size amp workers out".split())
    add = parser.add_argument
    add("--split", choices=SPLITS, default="train", help="default: train, or the folder itself")
    add("--knn", action="store_true", help="k-NN of held-out videos, no file of features")
    add("--tokens", action="store_true", help="a feature of each tube instead of each video")
    add("--window", type=count, help="frames of a window; one file per video")
    add("--step", type=count, default=16, help="frames from one window to the next")
    known, _ = parser.parse_known_args(argv)
    if not known.init:
        parser.error("--init RUN or FILE is needed")
    trained = read_checkpoint(known.init).get("args", {})
    trained = RECIPE | (trained if isinstance(trained, dict) else {})  # else: of other code
    shape = {name: trained[name] for name in ("frames", "stride", "size")}
    name = f"{Path(known.data).resolve().stem}-{known.split}"
    parser.set_defaults(out=f"out/{name}-features", workers=0, **shape)  # as it was trained
    args = parser.parse_args(argv)
    if args.knn and (args.tokens or args.window):
        parser.error("--knn takes pooled features of videos: leave out --tokens and --window")
    return args


def pooling(path, encoder):
    """A function of tokens (B, N, D) -> features of clips (B, D), as the network was trained."""
    weights = read_checkpoint(path)["model"]
    norm = nn.Identity()
    if "fc_norm.weight" in weights:
        norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        norm.load_state_dict({part: weights[f"fc_norm.{part}"] for part in ("weight", "bias")})
    return lambda tokens: norm.to(tokens.device)(tokens.mean(dim=1))


@torch.no_grad()
def write_windows(videos, forward, args, out, amp, device):
    """A file of window features for each video; ranks share the videos."""
    unreadable = {}
    for index in tqdm(range(RANK, len(videos.paths), WORLD), unit="video", disable=RANK > 0):
        path, starts, found = videos.paths[index], [0], []

        def window(n):  # decoded one by one: videos may be long
            last = max(n - args.window * args.stride, 0)
            starts.extend(range(starts[-1] + args.step, last + 1, args.step) if not found else ())
            return [min(start + i * args.stride, n - 1) for i in range(args.window)]

        try:
            for start in starts:  # the first window adds the others
                frames = decode(path, window)
                clip = resize_crop(frames, centre_crop(*frames.shape[-2:]), args.size)[None]
                with autocast(amp, device):
                    found.append(forward(normalise(clip, device)).float().cpu())
        except VideoError as error:
            unreadable[path] = str(error)
            continue
        name = f"{index:06}-{Path(path).stem}.pt"
        save_atomically(out / name, dict(features=torch.cat(found), starts=torch.tensor(starts),
                                         path=path, window=args.window, stride=args.stride))
    for part in gather(unreadable):
        for path, reason in part.items():
            log(f"unreadable video {path}: {reason}")


def main(argv=None):
    args = parse(argv)
    device, out, root = set_up(), Path(args.out), locate(args.data, args.root)
    encoder, amp = load_model(args.init).encoder.to(device).eval(), pick_amp(args.amp, device)
    if any(side % step for side, step in zip((args.window or args.frames, args.size, args.size),
                                             encoder.tube)):
        raise UserError(f"frames and --size must be multiples of the tube {encoder.tube}")
    pooled = pooling(args.init, encoder)
    forward = (lambda video: encoder(video)) if args.tokens else (lambda v: pooled(encoder(v)))
    out.mkdir(parents=True, exist_ok=True)

    def clips_of(videos):
        return Clips(videos, frames=args.frames, stride=args.stride, size=args.size, ratio=0.5,
                     tube=encoder.tube, choose=centre_frames, crop=centre_crop, tries=1)

    if args.knn:
        videos = find_videos(root)
        splits = ("val", "test", "") if args.val else ("val", "test")
        tests = find_videos(args.val or root, splits, videos.classes)
        (train, labels), (test, truth) = (
            collect(forward, clips_of(some), device, amp, args.workers) for some in (videos, tests))
        results = dict(knn=accuracy(nearest_neighbours(train, labels, test), truth), init=args.init,
                       videos=len(truth), unreadable=int((truth < 0).sum()), data=str(root),
                       protocol="cosine, k = 20, votes exp(cosine / 0.07), one centre clip")
        if RANK == 0:
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        return log(f"k-NN {results['knn']:.1%} of {len(truth):,} videos; wrote {out}/results.json")
    if (out / "features.pt").exists():
        raise UserError(f"{out}/features.pt is there already: choose another --out")
    videos = find_videos(root, SPLITS[args.split])
    if args.window:
        write_windows(videos, forward, args, out, amp, device)
        return log(f"wrote a file per video to {out}")
    numbered = replace(videos, labels=list(range(len(videos.paths))))  # -1 is left for unreadable
    found, index = collect(forward, clips_of(numbered), device, amp, args.workers)
    rows = index[index >= 0].tolist()
    if RANK == 0:
        save_atomically(out / "features.pt", dict(
            features=found[index >= 0], paths=[videos.paths[i] for i in rows],
            labels=torch.tensor([videos.labels[i] for i in rows]), args=vars(args)))
    log(f"wrote {out}/features.pt: {tuple(found[index >= 0].shape)}; "
        f"{len(videos.paths) - len(rows)} videos can't be read")


if __name__ == "__main__":
    sys.exit(launch(main))
