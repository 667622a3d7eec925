"""Pictures of any pretraining run: what it sees, what it has learned, and how.

    python extras/pictures.py out/toy-tiny-mlp                    on the run's own videos
    python extras/pictures.py out/toy-tiny-mlp --data videos/ --split val --out pictures

masks.png: what a mask leaves of clips. components.png: the encoder's tokens. prototypes.png: a row
of tubes for each. clusters.png and .mp4: each place's prototype, dark where there is little to see.
Curves of runs: python extras/curves.py
"""
import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import draw_bounding_boxes, save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import SPLITS, Clips, centre_crop, centre_frames, collate, find_videos, normalise
from extras.evaluate import clip_of, collect, make_teacher
from extras.run import DEVICE, draft_of, launch
from extras.toy import write_video
from sigma import DINO_WIDTHS, UserError, load_model, read_checkpoint, standardise, take_tubes
from train import FLAGS, check_clip, locate, parser_with, settings_for


def slide(video, tube, forward):
    """Maps (B, t, h, w, C) of forward(video) -> (B, N, C). In small clips the grid of tubes is slid
    by parts of a tube: each cell of the map, one part, gets the tube around it."""
    t, h, w = video.shape[2:]
    n = min(4, tube[0]) if h < 8 * tube[1] else 1  # parts of a tube, along each axis
    video = F.pad(video, [step // 2 for step in tube[::-1] for _ in "ab"], mode="replicate")
    i, j, k = (range(step // n // 2, step, step // n) for step in tube)
    maps = [forward(video[:, :, a:a + t, b:b + h, c:c + w]) for a in i for b in j for c in k]
    return rearrange(maps, "(a b c) n (t h w) e -> n (t a) (h b) (w c) e", a=n, b=n,
                     t=t // tube[0], h=h // tube[1]).cpu()


def colour(x):
    """The first three principal components of x (..., C) as red, green and blue of 0 to 255."""
    parts = x @ torch.linalg.eigh(x.flatten(0, -2).T.cov()).eigenvectors[:, -3:]
    parts = standardise(parts, dim=tuple(range(x.ndim - 1)))
    return (0.5 + parts / 4).clamp(0, 1).cpu() * 255


def write_image(path, images, columns):
    """Writes a table of images (n, 3, H, W), 0 to 255, as PNG: complete, or not there."""
    with draft_of(path) as draft:
        save_image(images / 255, draft, format="png", nrow=columns, pad_value=1)


def paint(path, video, maps, side=128):
    """Writes frames of clips (B, 3, T, S, S) as PNG, `side` pixels high, and below them their maps
    (B, t, h, w, 3). Returns all frames as a video (T, B * side, 2 * side, 3) uint8."""
    maps = F.interpolate(maps.movedim(-1, 1).float(), video.shape[2:])
    both = F.interpolate(torch.cat([video, maps]), (video.shape[2], side, side), mode="area")
    rows = rearrange(both[:, :, ::-(-both.shape[2] // 8)], "(n b) c t h w -> (b n) t c h w", n=2)
    write_image(path, rows.flatten(0, 1), rows.shape[1])
    return rearrange(both.byte(), "(n b) c t h w -> t (b h) (n w) c", n=2)


def frame_tube(video, place, tube, side=128):
    """A frame of a clip (3, T, S, S) with a box around a tube; below, the first and the last frame
    of the tube: (3, 1.5 side, side) uint8."""
    h, w = (size // step for size, step in zip(video.shape[2:], tube[1:]))
    t, i, j = place // (h * w), place // w % h, place % w
    frame = F.interpolate(video[None, :, t * tube[0]].float(), (side, side), mode="area")[0].byte()
    box = torch.tensor([[j / w, i / h, (j + 1) / w, (i + 1) / h]]) * side
    frame = draw_bounding_boxes(frame, box, colors="white", width=2)
    ends = take_tubes(video[None], tube)[0, place][:, [0, -1]]  # 3 2 q r
    ends = rearrange(ends, "c two q r -> 1 c q (two r)")
    return torch.cat([frame, F.interpolate(ends, (side // 2, side))[0]], dim=1)


def show_prototypes(path, clips, looks, prototypes, tube):
    """Writes a row of tubes, one of a clip, for each of the six prototypes that have the nearest.
    looks (clips, N, 3): see `show`."""
    contrast, number, cosine = looks.unbind(dim=2)
    cosine[contrast < 1.5 * contrast.median()] = -torch.inf  # there is nothing to see in flat tubes
    best = cosine.new_full((len(clips), prototypes), -torch.inf)  # of each clip's tubes
    best, n = best.scatter_reduce(1, number.long(), cosine, "amax"), min(8, len(clips))
    score, order = best.topk(n, dim=0).values.mean(dim=0).sort(descending=True)
    rows = []
    for k in order[score.isfinite()][:6]:
        nearest, place = cosine.masked_fill(number != k, -torch.inf).max(dim=1)
        rows += [frame_tube(clips[0, i][0][0], place[i], tube) for i in nearest.topk(n)[1].tolist()]
    if rows:
        write_image(path, torch.stack(rows), n)


@torch.no_grad()
def show(model, clips, teacher, out, workers):
    """Writes all pictures of a model and clips; teacher: of a DINO target."""
    tube = model.encoder.tube
    video, mask, *_ = collate([clips[0, i * len(clips) // 4] for i in range(4)])
    hidden = F.interpolate(mask.view(-1, 1, *clips.grid).float(), video.shape[2:]).bool()
    paint(out / "masks.png", video, video.masked_fill(hidden, 128).movedim(1, -1))
    normal = normalise(video, DEVICE)
    tokens = slide(normal, tube, lambda x: standardise(model.encoder(x), dim=1))
    paint(out / "components.png", video, colour(tokens))
    if model.target in ("pixel", "l2"):
        return print(f"wrote masks and components to {out}; there are no prototypes to show")

    def look(x):  # contrast of each tube, number of its prototype, cosine to it: B N 3
        contrast = take_tubes(x, tube).std(dim=(3, 4, 5)).mean(dim=2)  # B N
        every = torch.arange(contrast.shape[1], device=DEVICE).expand(len(x), -1)
        features = F.normalize(model.embed(x, every, teacher(x) if teacher else None), dim=2)
        cosine, number = (features @ F.normalize(model.prototypes, dim=1).T).max(dim=2)
        return torch.stack([contrast, number, cosine], dim=2)

    looks, _ = collect(look, clips, workers=workers)
    show_prototypes(out / "prototypes.png", clips, looks, len(model.prototypes), tube)
    contrast, number, _ = slide(normal, tube, look).unbind(dim=-1)
    shade = (contrast / contrast.quantile(0.75)).clamp(0, 1)[..., None]
    painted = paint(out / "clusters.png", video, colour(model.prototypes)[number.long()] * shade)
    with TemporaryDirectory() as folder, draft_of(out / "clusters.mp4") as draft:
        write_video(Path(folder, "all.mp4"), painted)  # whose suffix tells it the format
        shutil.copyfile(Path(folder, "all.mp4"), draft)
    print(f"wrote masks, components, prototypes and clusters to {out}")


def parse(argv):
    """The flags."""
    parser = parser_with(__doc__, "root")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="of pretraining: a file, or a run's folder")
    add("--data", help=f"{FLAGS['data']['help']} (default: the run's)")
    add("--split", default="train", help="train (default), val or test")
    add("--teacher", **FLAGS["teacher"] | {"help": "weights of a DINO target's teacher (default: "
        "the run's, or DINO's, downloaded once)"})
    add("--curves", nargs="*", help=argparse.SUPPRESS)  # as it was
    add("--out", type=Path, help="folder to write to (default: the checkpoint's)")
    args = parser.parse_args(argv)
    if args.curves is not None or not args.checkpoint:
        parser.error("give a checkpoint; curves of runs are drawn by: python extras/curves.py")
    return args


def main(argv=None):
    """Pictures of a checkpoint, on the videos of its run or others."""
    args = parse(argv)
    content, model = read_checkpoint(args.checkpoint), load_model(args.checkpoint).to(DEVICE).eval()
    run = settings_for("k400", "base") | content.get("args", {}) | clip_of(content)
    data = args.data or (not args.root and run.get("root")) or run.get("data", "k400")
    videos, *_ = find_videos(locate(data, args.root),
                             SPLITS["train"] if args.split == "train" else (args.split,))
    if not videos:
        raise UserError(f"there are no {args.split} videos in {data}")
    videos = videos[::-(-len(videos) // 1024)]
    check_clip(run["frames"], run["size"], model.encoder.tube)
    clips = Clips(videos, **{name: run[name] for name in ("frames", "stride", "size", "ratio")},
                  tube=model.encoder.tube, choose=centre_frames, crop=centre_crop, tries=1)
    teacher = None
    if model.target in DINO_WIDTHS:
        flags = argparse.Namespace(target=model.target, teacher=args.teacher or run.get("teacher"))
        teacher = make_teacher(flags, model.encoder.tube).to(DEVICE)
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent)
    out.mkdir(parents=True, exist_ok=True)
    show(model, clips, teacher, out, run["workers"])


if __name__ == "__main__":
    sys.exit(launch(main))
