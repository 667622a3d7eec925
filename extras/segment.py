"""Unsupervised video object segmentation: the encoder's tokens, clustered without any training.

    python extras/segment.py --init out/k400-base-dino --root DAVIS    without --init: untrained
    python extras/segment.py --init CHECKPOINT --root DAVIS --clusters 10 --layer 11 --pictures
    torchrun --nproc_per_node=2 extras/segment.py --init RUN --root YTVOS

The paper's third benchmark, mean intersection over union on DAVIS 2017 and YouTube-VOS. Videos are
ROOT/JPEGImages/[480p/]<video>/*.jpg with ROOT/Annotations/[480p/]<video>/*.png: palette indices are
objects, 0 is background, 255 void and counted as background; in a video whose grey masks hold 0 and
255 alone (or soft edges between), 255 is the object. Of the videos in ImageSets/<year>/val.txt if
that is there, else of all.

Protocol. From the paper: tokens of the whole clip, without mask; *clustering* has as many clusters
as there are segments, *overclustering* more. Chosen here, since the paper does not say: clips of
--frames consecutive frames, the last filled with its last frame, resized to --size squared, both as
in the run that --init names; tokens after the last norm, or of block --layer; a time slice belongs
to its first frame, and counts if that is annotated; maps brought to the annotations' size, both
--size squared, bilinearly; k-means for each clip by cosine, k-means++ starts, the best of
--restarts; clustering: K = segments of the clip with background, matched one to one so that the sum
of IoUs is largest; overclustering: each of --clusters goes to the segment that it overlaps most.
Means over segments, then clips, then videos.
"""
import sys
from functools import cache
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import IMAGES, decode, normalise, progress, seeded
from extras.reader import VideoError, video_stream
from extras.run import (DEVICE, RANK, WORLD, RunError, autocast, gather_dict, launch, log, set_up,
                        write_json)
from extras.toy import write_video
from sigma import UserError, build_model, load_encoder, read_checkpoint
from train import at_least, parser_with

COLOURS = torch.tensor([[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
                        [245, 130, 48], [145, 30, 180], [70, 240, 240], [250, 190, 212]])


def read_mask(path):
    """An annotation's numbers (H, W), 0 to 255, and whether it is grey; else palette indices.
    Raises UserError if it holds colours or can't be read."""
    try:
        with open(path, "rb") as file, av.open(file) as container:
            frame = next(container.decode(video_stream(container)))
    except (OSError, VideoError, av.FFmpegError, StopIteration) as error:
        raise UserError(f"{path} can't be read: {error or 'it holds no image'}") from error
    if frame.format.name == "pal8":
        return torch.from_numpy(frame.to_ndarray()[0]).long(), False  # without the palette
    if frame.format.name not in ("gray", "monob", "monow"):
        raise UserError(f"{path} holds colours ({frame.format.name}), not the indices of segments")
    return torch.from_numpy(frame.to_ndarray(format="gray", threads=1)).long(), True


def read_masks(paths):
    """{stem: segments (H, W)} of one video's annotations {stem: path}. 255 is void, as background,
    beside numbers of objects; where a whole video has none, 255 is its object in grey masks, which
    may have soft edges: numbers above 16, the most segments there can be."""
    read = {stem: read_mask(path) for stem, path in paths.items()}
    numbers = {n for mask, _ in read.values() for n in mask.unique().tolist()} - {0, 255}
    binary = all(grey for _, grey in read.values()) and (not numbers or max(numbers) > 16)
    return {stem: (mask > 127).long() if binary else mask.masked_fill(mask == 255, 0)
            for stem, (mask, _) in read.items()}


def read_image(path, size):
    """An image (1, 3, size, size), 0 to 255. Raises UserError."""
    try:
        return transform.resize(decode(path, lambda n: [[0]])[0], [size, size])
    except (OSError, VideoError, av.FFmpegError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def find_frames(root):
    """{video: (frames, {stem: annotation})} of a folder in the layout above."""
    root = Path(root)
    jpegs, annotations = (root / name / "480p" if (root / name / "480p").is_dir() else root / name
                          for name in ("JPEGImages", "Annotations"))
    names = {Path(word).parent.name or word  # DAVIS 2016 lists frames, others list videos
             for path in sorted(root.glob("ImageSets/*/val.txt"))[-1:]
             for word in path.read_text().split()}
    found = {}
    for folder in sorted(path for path in jpegs.glob("[!.]*") if path.is_dir()):
        frames = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
        masks = {path.stem: path for path in (annotations / folder.name).glob("*.png")}
        if frames and masks and (not names or folder.name in names):
            found[folder.name] = frames, masks
    if not found:
        raise UserError(f"{root} has no videos with annotations, as --help describes them")
    return found


def kmeans(tokens, k, generator, restarts=5, rounds=50):
    """Clusters tokens (n, D) by cosine: the cluster of each, (n,), of the best of the restarts."""
    tokens, best = F.normalize(tokens, dim=1), (-2.0, None)
    for _ in range(restarts):
        centres = tokens[torch.randint(len(tokens), (1,), generator=generator)]
        while len(centres) < k:  # k-means++: a far token is likely to be the next centre
            distance = (1 - (tokens @ centres.T).amax(dim=1)).clamp(min=1e-9)
            chosen = torch.multinomial(distance, 1, generator=generator)
            centres = torch.cat([centres, tokens[chosen]])
        cluster = torch.empty(0)
        for _ in range(rounds):
            before, (cosine, cluster) = cluster, (tokens @ centres.T).max(dim=1)
            if torch.equal(before, cluster):
                break
            sums = torch.zeros_like(centres).index_add_(0, cluster, tokens)
            centres = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), centres)
        best = max(best, (cosine.mean().item(), cluster), key=lambda result: result[0])
    return best[1]


def compare(found, true, k, s):
    """Of maps of one shape, what each of k clusters has of each of s segments: the pixels that they
    share, and intersection over union; two of (k, s)."""
    shared = (found.flatten() * s + true.flatten()).bincount(minlength=k * s).view(k, s).float()
    return shared, shared / (shared.sum(dim=1, keepdim=True) + shared.sum(dim=0) - shared).clamp(1)


def match(scores):
    """The cluster of each segment, one to one, for which the sum of scores (s, s) is largest."""
    @cache  # 2^s sets instead of s! orders
    def best(free):  # the largest sum and its clusters, if the last segments share the free ones
        options = [(c, *best(free - {c})) for c in free]
        return max(((scores[c, -len(free)].item() + total, [c, *clusters])
                    for c, total, clusters in options), default=(0, []))

    return best(frozenset(range(len(scores))))[1]


def clustering(found, true, s):
    """The map of clusters with the number of each one's segment, matched one to one."""
    clusters = match(compare(found, true, s, s)[1])
    return torch.tensor(clusters).argsort()[found]


def overclustering(found, true, k, s):
    """The map of clusters with the number of the segment that each overlaps most."""
    return compare(found, true, k, s)[0].argmax(dim=1)[found]


def maps(tokens, k, args, generator):
    """Cluster maps (t, size, size) of a clip's tokens (t, h, w, D)."""
    cluster = kmeans(tokens.flatten(0, 2), k, generator, args.restarts).view(tokens.shape[:3])
    shares = F.one_hot(cluster, k).permute(0, 3, 1, 2).float()
    return F.interpolate(shares, (args.size, args.size), mode="bilinear").argmax(dim=1)


def segment_video(tokens_of, frames, masks, args, tubelet, generator):
    """For each clip of a video with annotations its mean IoU by clustering and overclustering, with
    and without background, (2, 2); and images (slices, 4, 3, size, size): frame, truth, both."""
    scores, shown, paths_of, masks = [], [], masks, read_masks(masks)
    for start in range(0, len(frames), args.frames):
        paths = frames[start:start + args.frames]
        firsts = [i for i in range(0, len(paths), tubelet) if paths[i].stem in masks]
        if not firsts:
            continue
        images = [read_image(path, args.size) for path in paths]
        clip = torch.cat(images + images[-1:] * (args.frames - len(images)))  # T 3 S S
        true = torch.cat([transform.resize(
            masks[paths[i].stem][None], [args.size, args.size],
            InterpolationMode.NEAREST) for i in firsts])
        segments = torch.tensor(sorted({0, *true.unique().tolist()}))
        true, s = torch.searchsorted(segments, true), len(segments)
        if s > 16:  # matching them would take minutes
            raise UserError(f"{paths_of[paths[firsts[0]].stem]} and the next have {s} segments, 16 "
                            "is the most: is it a mask of objects?")
        k, slices = max(args.clusters, s), [i // tubelet for i in firsts]
        tokens = tokens_of(clip)
        same = clustering(maps(tokens, s, args, generator)[slices], true, s)
        merged = overclustering(maps(tokens, k, args, generator)[slices], true, k, s)
        ious = [compare(found, true, s, s)[1].diagonal() for found in (same, merged)]
        scores.append(torch.stack([torch.stack([x.mean(), x[1:].mean()]) for x in ious]))
        colours = COLOURS[torch.stack([true, same, merged], dim=1) % len(COLOURS)].movedim(-1, 2)
        images = clip[firsts][:, None]  # t 1 3 S S
        shown.append(torch.cat([images, (images + 2 * colours) // 3], dim=1).byte())
    return scores, shown


def report(scores, args):
    """Prints and writes the means of all videos' scores, {name: (2, 2)}."""
    if not scores:
        raise UserError(f"no annotated frame of {args.root} begins a time slice")
    mean, out = torch.stack(list(scores.values())).nanmean(dim=0), Path(args.out)

    def table(scores):
        return {way: [x if x == x else None for x in row]  # JSON knows no nan
                for way, row in zip(("clustering", "overclustering"), scores.tolist())}

    for way, (with_it, without) in zip(table(mean), mean.tolist()):
        log(f"{way:15} mIoU {with_it:.1%} with background, {without:.1%} without")
    videos = {name: table(row) for name, row in sorted(scores.items())}
    write_json(out / "results.json", table(mean) | {"videos": videos, "args": vars(args)})
    log(f"means of {len(scores)} videos; wrote {out}/results.json")


def main(argv=None):
    parser = parser_with(__doc__, "init", "model", "frames", "size", "seed", "amp", "out")
    add = parser.add_argument
    add("--root", required=True, help="folder with JPEGImages and Annotations")
    add("--layer", type=at_least(1), help="block to cluster behind (default: the last, normed)")
    add("--clusters", type=at_least(1), default=10, help="of overclustering (default: 10)")
    add("--restarts", type=at_least(1), default=5, help="of k-means (default: 5)")
    add("--pictures", action="store_true", help="a picture and a video of each video")
    init = parser.parse_known_args(argv)[0].init
    trained = read_checkpoint(init).get("args", {}) if init else {}
    parser.set_defaults(frames=trained.get("frames") or 16, size=trained.get("size") or 224,
                        out="out/segment")
    args = parser.parse_args(argv)
    if init and args.model:
        parser.error("--model is for an untrained encoder, --init brings its own: leave out one")
    set_up()
    torch.manual_seed(args.seed)
    encoder = load_encoder(init) if init else build_model(args.model or "base").encoder
    encoder, out = encoder.to(DEVICE).eval(), Path(args.out)
    sides = args.frames, args.size, args.size
    if any(side % step for side, step in zip(sides, encoder.tube)):
        parser.error(f"--frames and --size must be multiples of the tube {encoder.tube}")
    if args.layer:
        if args.layer > len(encoder.blocks):
            parser.error(f"--layer must be from 1 to {len(encoder.blocks)}")
        encoder.blocks, encoder.norm = encoder.blocks[:args.layer], torch.nn.Identity()

    @torch.no_grad()
    def tokens_of(clip):  # T 3 S S -> t h w D
        for precision in dict.fromkeys((args.amp, "off")):
            with autocast(precision):
                tokens = encoder(normalise(clip.transpose(0, 1)[None], DEVICE))[0]
            if tokens.isfinite().all():
                break
            log(f"tokens are not finite with --amp {precision}"
                + ("; now in float32" if precision != "off" else ""))
        else:
            raise RunError("the encoder's tokens are not finite: its weights are damaged")
        return tokens.float().cpu().unflatten(0, [a // b for a, b in zip(sides, encoder.tube)])

    videos, mine = find_frames(args.root), {}
    out.mkdir(parents=True, exist_ok=True)
    for index in progress(range(RANK, len(videos), WORLD), unit="video", disable=RANK > 0):
        name = list(videos)[index]
        scores, shown = segment_video(tokens_of, *videos[name], args, encoder.tube[0],
                                      seeded(args.seed, index))
        if not scores:
            continue
        mine[name] = torch.stack(scores).nanmean(dim=0)  # nan: clips of background alone
        if args.pictures:
            shown = torch.cat(shown)
            save_image(shown[::-(-len(shown) // 8)].flatten(0, 1) / 255, out / f"{name}.png",
                       nrow=4, pad_value=1)
            write_video(out / f"{name}.mp4", rearrange(shown, "t n c h w -> t h (n w) c"))
    report(gather_dict(mine), args)


if __name__ == "__main__":
    sys.exit(launch(main))
