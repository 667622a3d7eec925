"""Unsupervised video object segmentation: the encoder's tokens, clustered without any training.

    python extras/segment.py --init out/k400-base-dino --root DAVIS    without --init: untrained
    python extras/segment.py --init CHECKPOINT --root DAVIS --clusters 10 --layer 11 --pictures
    torchrun --nproc_per_node=2 extras/segment.py --init RUN --root YTVOS

The paper's third benchmark, mean intersection over union on DAVIS 2017 and YouTube-VOS. Videos are
ROOT/JPEGImages/[480p/]<video>/*.jpg with ROOT/Annotations/[480p/]<video>/*.png, of those in
ImageSets/<year>/val.txt if that is there, else of all. Annotations: 0 is background, 255 void and
counted as background, numbers between are segments: palette indices 1 to 254, or grey values 1 to
126. In a video whose grey masks hold 0 and 255 alone (or soft edges between), 255 is the object.

Protocol. From the paper: tokens of the whole clip, without mask; *clustering* has as many clusters
as there are segments, *overclustering* more. Chosen here, since the paper does not say: clips of
--frames consecutive frames, the last one filled up with its last frame, resized to --size squared;
tokens after the last norm (a fine-tuned encoder has none), or of block --layer; a time slice
belongs to its first frame, and counts if that is annotated; maps brought to the annotations' size,
both --size squared, bilinearly; k-means for each clip by cosine, k-means++ starts, the best of
--restarts; clustering: K = segments of the clip with background, matched one to one so that the sum
of IoUs is largest; overclustering: each of --clusters (or more, for more segments) goes to the
segment that it overlaps most. Means over segments, then clips, then videos.
"""
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from einops import rearrange
from torchvision.transforms.v2 import functional as transform
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import IMAGES, decode, progress, seeded
from extras.clusters import clustering, maps, mean_iou, number_segments, overclustering
from extras.evaluate import clip_of, finite
from extras.reader import VideoError, all_frames
from extras.run import DEVICE, RANK, WORLD, draft_of, gather_dict, launch, log, set_up, write_json
from extras.toy import write_video
from sigma import UserError, build_model, load_encoder, read_checkpoint
from train import DEFAULTS, at_least, check_clip, parser_with

COLOURS = torch.tensor([[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
                        [245, 130, 48], [145, 30, 180], [70, 240, 240], [250, 190, 212]])
HELP = {  # what flags of train.py mean here
    "model": "of an untrained encoder, without --init (default: base)",
    "frames": "of a clip, consecutive ones (default: as many as in the run of --init, else 16)",
    "size": "height and width of a clip, pixels (default: the run's, else 224)",
    "seed": "of k-means, and of an untrained encoder"}


def read_mask(path):
    """An annotation's numbers (H, W), 0 to 255, and whether it is grey; else palette indices.
    Raises UserError if it holds colours or can't be read."""
    try:
        _, frame, _ = next(all_frames(path))
    except VideoError as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if frame.format.name == "pal8":
        return torch.from_numpy(frame.to_ndarray()[0]).long(), False  # without the palette
    if frame.format.name not in ("gray", "monob", "monow"):
        raise UserError(f"{path} holds colours ({frame.format.name}), not the indices of segments")
    return torch.from_numpy(frame.to_ndarray(format="gray", threads=1)).long(), True


def read_masks(paths):
    """{stem: segments (H, W)} of a video's annotations {stem: path}. If all are grey and hold 0 and
    255 alone, or any value above 126, as soft edges do, there is one object: pixels above 127.
    Otherwise 255 is void and becomes background."""
    read = {stem: read_mask(path) for stem, path in paths.items()}
    numbers = {n for mask, _ in read.values() for n in mask.unique().tolist()} - {0, 255}
    binary = all(grey for _, grey in read.values()) and (not numbers or max(numbers) > 126)
    return {stem: (mask > 127).long() if binary else mask.masked_fill(mask == 255, 0)
            for stem, (mask, _) in read.items()}


def read_image(path, size):
    """An image (1, 3, size, size), 0 to 255. Raises UserError."""
    try:
        return transform.resize(decode(path, lambda n: [[0]])[0], [size, size])
    except VideoError as error:
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


def annotated_clips(frames, masks, length, size, frames_per_tube):
    """Yields the clips of a video that have time slices whose first frame is annotated: their first
    path, the numbers of these slices, the annotations, and the clip (length, 3, size, size)."""
    for start in range(0, len(frames), length):
        paths = frames[start:start + length]
        stems = {i: path.stem for i, path in enumerate(paths[::frames_per_tube])
                 if path.stem in masks}
        if stems:
            images = [read_image(path, size) for path in paths]
            clip = torch.cat(images + images[-1:] * (length - len(images)))
            yield paths[0], list(stems), [masks[stem] for stem in stems.values()], clip


def segment_clip(tokens, true, s, slices, args, generator):
    """Maps of a clip's tokens (T, h, w, D) by clustering and by overclustering, numbered as the s
    segments of true (t, size, size). slices: the t of the T that count."""
    k = max(args.clusters, s)
    few, many = (maps(tokens, n, args.size, args.restarts, generator)[slices] for n in (s, k))
    return clustering(few, true, s), overclustering(many, true, k, s)


def segment_video(tokens_of, frames, masks, args, frames_per_tube, generator):
    """For each clip of a video with annotations its mean IoU by clustering and overclustering, with
    and without background, (2, 2); and images (slices, 4, 3, size, size): frame, truth, both."""
    scores, shown = [], []
    clips = annotated_clips(frames, read_masks(masks), args.frames, args.size, frames_per_tube)
    for path, slices, annotations, clip in clips:
        true, s = number_segments(annotations, args.size)
        found = segment_clip(tokens_of(clip, path), true, s, slices, args, generator)
        scores.append(torch.stack([mean_iou(x, true, s) for x in found]))
        colours = COLOURS[torch.stack([true, *found], dim=1) % len(COLOURS)].movedim(-1, 2)
        images = clip[::frames_per_tube][slices, None]  # t 1 3 S S
        shown.append(torch.cat([images, (images + 2 * colours) // 3], dim=1).byte())
    return scores, shown


def write_pictures(shown, out, name):
    """Writes what segment_video shows: eight slices as NAME.png, all as NAME.mp4."""
    shown = torch.cat(shown)
    with draft_of(out / f"{name}.png") as draft:
        save_image(shown[::-(-len(shown) // 8)].flatten(0, 1) / 255, draft, format="png", nrow=4,
                   pad_value=1)
    with TemporaryDirectory() as folder, draft_of(out / f"{name}.mp4") as draft:
        video = Path(folder, "all.mp4")  # its suffix tells write_video the format
        write_video(video, rearrange(shown, "t n c h w -> t h (n w) c"))
        shutil.copyfile(video, draft)


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


def parse(argv):
    """The flags."""
    parser = parser_with(__doc__, "init", "amp", "out", meanings=HELP)
    add = parser.add_argument
    add("--root", required=True, help="folder with JPEGImages and Annotations")
    add("--layer", type=at_least(1), help="block whose tokens to use (default: the last, normed)")
    add("--clusters", type=at_least(1), default=10, help="of overclustering (default: 10)")
    add("--restarts", type=at_least(1), default=5, help="of k-means (default: 5)")
    add("--pictures", action="store_true", help="write a picture and a video of each video")
    init = parser.parse_known_args(argv)[0].init
    clip = DEFAULTS | (clip_of(read_checkpoint(init)) if init else {})
    parser.set_defaults(frames=clip["frames"], size=clip["size"], out="out/segment")
    args = parser.parse_args(argv)
    if init and args.model:
        parser.error("--model is for an untrained encoder, --init brings its own: leave out one")
    return args


def make_encoder(args):
    """The encoder of --init, or an untrained one, up to --layer. Raises UserError."""
    torch.manual_seed(args.seed)
    encoder = load_encoder(args.init) if args.init else build_model(args.model or "base").encoder
    check_clip(args.frames, args.size, encoder.tube)
    if args.layer:
        if args.layer > len(encoder.blocks):
            raise UserError(f"--layer must be from 1 to {len(encoder.blocks)}")
        encoder.blocks, encoder.norm = encoder.blocks[:args.layer], torch.nn.Identity()
    return encoder.to(DEVICE).eval()


def main(argv=None):
    """One run, from the flags to the results."""
    args = parse(argv)
    set_up()
    encoder, out = make_encoder(args), Path(args.out)
    grid = [side // step for side, step in zip((args.frames, args.size, args.size), encoder.tube)]

    def tokens_of(clip, name):  # T 3 S S -> t h w D
        tokens = finite(encoder, clip.transpose(0, 1)[None], args.amp, name)[0]
        return tokens.cpu().unflatten(0, grid)

    videos, mine = find_frames(args.root), {}
    out.mkdir(parents=True, exist_ok=True)
    share = list(enumerate(videos))[RANK::WORLD]
    for index, name in progress(share, unit="video", disable=RANK > 0):
        scores, shown = segment_video(tokens_of, *videos[name], args, encoder.tube[0],
                                      seeded(args.seed, index))
        if scores:
            mine[name] = torch.stack(scores).nanmean(dim=0)  # nan: clips of background alone
            if args.pictures:
                write_pictures(shown, out, name)
    report(gather_dict(mine), args)


if __name__ == "__main__":
    sys.exit(launch(main))
