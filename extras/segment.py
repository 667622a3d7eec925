"""Unsupervised video object segmentation: the encoder's tokens, clustered without any training.

    python extras/segment.py --init out/k400-base-dino --root DAVIS    without --init: untrained
    python extras/segment.py --init CHECKPOINT --root DAVIS --clusters 10 --layer 11 --pictures
    torchrun --nproc_per_node=2 extras/segment.py --init RUN --root YTVOS

The paper's third benchmark, mean intersection over union on DAVIS 2017 and YouTube-VOS. Videos are
ROOT/JPEGImages/[480p/]<video>/*.jpg with ROOT/Annotations/[480p/]<video>/*.png: palette indices are
objects, 0 is background, 255 void and counted as background; grey masks have 255 for one object. Of
the videos in ImageSets/<year>/val.txt if that is there, else of all.

Protocol. From the paper: tokens of the whole clip, without mask; *clustering* has as many clusters
as there are segments, *overclustering* more. Chosen here, since the paper does not say: clips of
--frames consecutive frames, the last filled with its last frame, resized to --size squared; tokens
behind the last norm, or of block --layer; a time slice belongs to its first frame, and counts if
that is annotated; maps brought to the annotations' size, both --size squared, bilinearly; k-means
for each clip by cosine, k-means++ starts, the best of --restarts; clustering: K = segments of the
clip with background, matched one to one so that the sum of IoUs is largest; overclustering: each of
--clusters goes to the segment that it overlaps most. Means over segments, then clips, then videos.
"""
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
import av
from data import IMAGES, decode, normalise, seeded, video_stream, write_video
from sigma import UserError, build_model, load_model
from train import (RANK, WORLD, autocast, count, gather, launch, log, parser_with, pick_amp,
                   set_up)

COLOURS = torch.tensor([[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
                        [245, 130, 48], [145, 30, 180], [70, 240, 240], [250, 190, 212]])


def read_mask(path):
    """The segments of an annotation, (H, W): palette indices, or 0 and 1 from a grey mask."""
    with open(path, "rb") as file, av.open(file) as container:
        frame = next(container.decode(video_stream(container)))
    if frame.format.name not in ("pal8", "gray", "monob", "monow"):
        raise UserError(f"{path} holds colours ({frame.format.name}), not the indices of segments")
    if frame.format.name.startswith("mono"):
        frame = frame.reformat(format="gray", threads=1)
    plane = frame.planes[0]
    mask = torch.frombuffer(bytearray(plane), dtype=torch.uint8).view(-1, plane.line_size)
    mask = mask[:frame.height, :frame.width].long()
    if frame.format.name == "gray":
        return (mask > 127).long() if mask.max() > 127 else mask
    return mask.masked_fill(mask == 255, 0)


def find_frames(root):
    """{video: (frames, {stem: annotation})} of a folder in the layout above."""
    def place(name):
        folder = Path(root) / name
        return folder / "480p" if (folder / "480p").is_dir() else folder

    names = [line for path in sorted(Path(root).glob("ImageSets/*/val.txt"))[-1:]
             for line in path.read_text().split()]
    folders = sorted(p for p in place("JPEGImages").glob("[!.]*") if p.is_dir())
    found = {}
    for folder in folders:
        frames = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
        masks = {p.stem: p for p in (place("Annotations") / folder.name).glob("*.png")}
        if frames and masks and (not names or folder.name in names):
            found[folder.name] = frames, masks
    if not found:
        raise UserError(f"{root} has no videos with annotations: give a folder with JPEGImages and "
                        "Annotations, see --help")
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
        cluster = None
        for _ in range(rounds):
            before, (cosine, cluster) = cluster, (tokens @ centres.T).max(dim=1)
            if before is not None and torch.equal(before, cluster):
                break
            sums = torch.zeros_like(centres).index_add_(0, cluster, tokens)
            empty = sums.norm(dim=1, keepdim=True) == 0
            centres = torch.where(empty, centres, F.normalize(sums, dim=1))
        if cosine.mean() > best[0]:
            best = cosine.mean().item(), cluster
    return best[1]


def overlap(found, true, k, s):
    """Pixels that each of k clusters shares with each of s segments, (k, s); maps of one shape."""
    return (found.flatten() * s + true.flatten()).bincount(minlength=k * s).view(k, s).float()


def iou(shared):
    """Intersection over union of clusters and segments from what they share, (k, s)."""
    union = shared.sum(dim=1, keepdim=True) + shared.sum(dim=0) - shared
    return shared / union.clamp(min=1)


def match(scores):
    """The cluster of each segment, one to one, for which the sum of scores (k, s) is largest."""
    k, s = scores.shape
    if k <= 7:
        chosen = max(itertools.permutations(range(k), s),
                     key=lambda clusters: sum(scores[c, i].item() for i, c in enumerate(clusters)))
        return list(chosen)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UserError(f"matching {k} clusters takes SciPy: pip install scipy") from error
    clusters, segments = linear_sum_assignment(scores.numpy(), maximize=True)
    return [cluster for _, cluster in sorted(zip(segments.tolist(), clusters.tolist()))]


def clustering(found, true, s):
    """IoU of each of s segments with the cluster that is matched to it, and the matched map."""
    scores = iou(overlap(found, true, s, s))
    clusters = match(scores)
    segment = torch.tensor([clusters.index(c) for c in range(s)])
    return torch.stack([scores[c, i] for i, c in enumerate(clusters)]), segment[found]


def overclustering(found, true, k, s):
    """IoU of each of s segments with the clusters that overlap it most, and the merged map."""
    merged = overlap(found, true, k, s).argmax(dim=1)[found]
    return iou(overlap(merged, true, s, s)).diagonal(), merged


def maps(tokens, k, args, generator):
    """Cluster maps (t, size, size) of a clip's tokens (t, h, w, D)."""
    cluster = kmeans(tokens.flatten(0, 2), k, generator, args.restarts).view(tokens.shape[:3])
    shares = F.one_hot(cluster, k).permute(0, 3, 1, 2).float()
    return F.interpolate(shares, (args.size, args.size), mode="bilinear").argmax(dim=1)


def segment_video(tokens_of, frames, masks, args, tubelet, index):
    """For each clip of a video its segments' IoUs (clustering, overclustering), background first;
    and for each slice four images: frame, truth, clustering, overclustering."""
    scores, shown, generator = [], [], seeded(args.seed, index)
    for start in range(0, len(frames), args.frames):
        paths = frames[start:start + args.frames]
        firsts = range(0, len(paths), tubelet)
        slices = [t for t, first in enumerate(firsts) if paths[first].stem in masks]
        if not slices:
            continue
        images = [transform.resize(decode(str(path), lambda n: [0])[0], [args.size, args.size])
                  for path in paths]
        clip = torch.stack(images + images[-1:] * (args.frames - len(images)), dim=1)  # 3 T S S
        true = torch.stack([transform.resize(
            read_mask(masks[paths[firsts[t]].stem])[None], [args.size, args.size],
            InterpolationMode.NEAREST)[0] for t in slices])
        segments = torch.tensor([0, *sorted(set(true.unique().tolist()) - {0})])
        true = torch.searchsorted(segments, true)
        tokens, s = tokens_of(clip), len(segments)
        k = max(args.clusters, s)
        exact, same = clustering(maps(tokens, s, args, generator)[slices], true, s)
        over, merged = overclustering(maps(tokens, k, args, generator)[slices], true, k, s)
        scores.append((exact.tolist(), over.tolist()))
        for i, t in enumerate(slices):
            image = clip[:, firsts[t]]
            colours = [COLOURS[part[i] % len(COLOURS)].movedim(-1, 0)
                       for part in (true, same, merged)]
            shown.append(torch.stack([image] + [(image + 2 * c) // 3 for c in colours]).byte())
    return scores, shown


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def main(argv=None):
    parser = parser_with(__doc__, "init", "model", "frames", "size", "seed", "amp", "out")
    parser.set_defaults(model="base", frames=16, size=224, out="out/segment")
    add = parser.add_argument
    add("--root", required=True, help="folder with JPEGImages and Annotations")
    add("--layer", type=int, help="block whose output is clustered (default: the last, normed)")
    add("--clusters", type=count, default=10, help="of overclustering (default: 10)")
    add("--restarts", type=count, default=5, help="of k-means (default: 5)")
    add("--pictures", action="store_true", help="a picture and a film for each video")
    args = parser.parse_args(argv)
    device, out = set_up(), Path(args.out)
    torch.manual_seed(args.seed)
    encoder = (load_model(args.init) if args.init else build_model(args.model)).encoder
    encoder, amp = encoder.to(device).eval(), pick_amp(args.amp, device)
    grid = [side // step for side, step in zip((args.frames, args.size, args.size), encoder.tube)]
    if any(side % step for side, step in zip((args.frames, args.size, args.size), encoder.tube)):
        parser.error(f"--frames and --size must be multiples of the tube {encoder.tube}")
    if args.layer and not 1 <= args.layer <= len(encoder.blocks):
        parser.error(f"--layer must be from 1 to {len(encoder.blocks)}")
    if args.layer:
        encoder.blocks, encoder.norm = encoder.blocks[:args.layer], torch.nn.Identity()

    @torch.no_grad()
    def tokens_of(clip):
        with autocast(amp, device):
            return encoder(normalise(clip[None], device))[0].float().cpu().unflatten(0, grid)

    videos, mine = find_frames(args.root), {}
    out.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(RANK, len(videos), WORLD), unit="video", disable=RANK > 0):
        name = list(videos)[index]
        scores, shown = segment_video(tokens_of, *videos[name], args, encoder.tube[0], index)
        if not scores:
            continue
        mine[name] = {way: [mean(mean(clip[i][first:]) for clip in scores if clip[i][first:])
                            for first in (0, 1)]
                      for i, way in enumerate(("clustering", "overclustering"))}
        if args.pictures:  # frame, truth, clustering, overclustering
            rows = torch.cat(shown[::max(1, len(shown) // 8)]).float() / 255
            save_image(rows, out / f"{name}.png", nrow=4, padding=2, pad_value=1)
            film = [torch.cat(list(row), dim=2).movedim(0, 2) for row in shown]
            write_video(out / f"{name}.mp4", torch.stack(film).contiguous())
    scores = {name: row for part in gather(mine) for name, row in sorted(part.items())}
    if not scores:
        raise UserError(f"no annotated frame of {args.root} begins a time slice")
    results = dict(protocol=f"{len(scores)} videos, clips of {args.frames} x {args.size} x "
                   f"{args.size}, each number with and without background", videos=scores)
    for way in ("clustering", "overclustering"):
        columns = zip(*(row[way] for row in scores.values()))
        results[way] = [mean(x for x in column if x is not None) for column in columns]
        with_it, without = (f"{x:.1%}" if x is not None else "none" for x in results[way])
        log(f"{way:15} mIoU {with_it} with background, {without} without")
    if RANK == 0:
        (out / "results.json").write_text(json.dumps(results | {"args": vars(args)}, indent=2))
    log(f"{results['protocol']}; wrote {out}/results.json")


if __name__ == "__main__":
    sys.exit(launch(main))
