"""Pictures of any pretraining checkpoint: what it sees, and what it has learned.

    python extras/pictures.py out/toy-tiny-mlp                    on the run's own videos
    python extras/pictures.py out/toy-tiny-mlp --data videos/ --split val --out pictures

masks.png: what a mask leaves of clips. components.png: the encoder's tokens. prototypes.png: a row
of tubes for each. clusters.png and .mp4: each place's prototype, dark where there is little to see.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, centre_crop, centre_frames, collate, find_videos, normalise, write_video
from sigma import DINO, load_model, read_checkpoint, standardise, take_tubes
from train import collect, launch, locate, log, make_teacher, parser_with, recipe, set_up


def slide(video, tube, forward):
    """Maps (B, t, h, w, C) of forward(video) -> (B, N, C). In small clips the grid of tubes is slid
    by parts of a tube: each cell of the map, one part, gets the tube around it."""
    t, h, w = video.shape[2:]
    n = min(4, tube[0]) if h < 8 * tube[1] else 1  # parts of a tube, along each axis
    video = F.pad(video, [step // 2 for step in tube[::-1] for _ in "ab"], mode="replicate")
    i, j, k = (range(step // n // 2, step, step // n) for step in tube)
    maps = [forward(video[:, :, a:a + t, b:b + h, c:c + w]) for a in i for b in j for c in k]
    return rearrange(torch.stack(maps).cpu(), "(a b c) n (t h w) e -> n (t a) (h b) (w c) e", a=n,
                     b=n, t=t // tube[0], h=h // tube[1])


def colour(x):
    """The first three principal components of x (..., C) as red, green and blue of 0 to 255."""
    parts = x @ torch.linalg.eigh(x.flatten(0, -2).T.cov()).eigenvectors[:, -3:]
    parts = standardise(parts, dim=tuple(range(x.ndim - 1)))
    return (0.5 + parts / 4).clamp(0, 1).cpu() * 255


def paint(path, video, maps, side=128):
    """Writes frames of clips (B, 3, T, S, S) as PNG, `side` pixels high, and below them their maps
    (B, t, h, w, 3). Returns all frames as a film (T, B * side, 2 * side, 3) uint8."""
    maps = F.interpolate(maps.movedim(-1, 1).float(), video.shape[2:])
    both = F.interpolate(torch.cat([video, maps]), (video.shape[2], side, side), mode="area")
    rows = rearrange(both[:, :, ::-(-both.shape[2] // 8)], "(n b) c t h w -> (b n) t c h w", n=2)
    save_image(rows.flatten(0, 1) / 255, path, nrow=rows.shape[1], pad_value=1)
    return rearrange(both.byte(), "(n b) c t h w -> t (b h) (n w) c", n=2)


def frame_tubes(video, place, tube, side=128):
    """Tubes of clips (n, 3, T, S, S), framed, and below their two ends: (n, 3, 1.5 side, side)."""
    h, w = (size // step for size, step in zip(video.shape[3:], tube[1:]))
    frame = video[torch.arange(len(video)), :, place // (h * w) * tube[0]].float()
    spot = F.one_hot(place % (h * w), h * w).view(-1, 1, h, w).float()
    spot, frame = F.interpolate(spot, side), F.interpolate(frame, side, mode="area")
    frame = frame.masked_fill(F.max_pool2d(spot, 5, 1, 2) > spot, 255)
    ends = take_tubes(video, tube, place[:, None])[:, 0, :, [0, -1]].float()  # n 3 2 q r
    ends = F.interpolate(rearrange(ends, "n c two q r -> n c q (two r)"), (side // 2, side))
    return torch.cat([frame, ends], dim=2)


@torch.no_grad()
def main(argv=None):
    parser = parser_with(__doc__, "data", "root", "teacher")
    parser.set_defaults(data=None)  # the run's
    parser.add_argument("checkpoint", type=Path, help="of pretraining: a file, or a run's folder")
    parser.add_argument("--split", default="train", help="train (default), val or test")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the checkpoint's)")
    args = parser.parse_args(argv)
    device, content = set_up(), read_checkpoint(args.checkpoint)
    model = load_model(args.checkpoint).to(device).eval()
    tube, target = model.encoder.tube, getattr(model, "target", "pixel")
    run = recipe("k400", "base") | (content["args"] if "sizes" in content else {})
    data = args.data or run.get("root") or run.get("data", "k400")
    videos = find_videos(locate(data, args.root), (args.split, "")).spread(1024)
    videos.labels = [0] * len(videos.paths)  # collect wants labels
    clips = Clips(videos, **{name: run[name] for name in ("frames", "stride", "size", "ratio")},
                  tube=tube, choose=centre_frames, crop=centre_crop)
    flags = argparse.Namespace(target=target, teacher=args.teacher or run.get("teacher"))
    teacher = make_teacher(flags, tube).to(device) if target in DINO else None

    def look(x):  # of each tube: contrast, and if there are any, number of its prototype, cosine
        number = cosine = contrast = take_tubes(x, tube).std(dim=(3, 4, 5)).mean(dim=2)  # B N
        if target != "pixel":
            every = torch.arange(contrast.shape[1], device=device).expand(len(x), -1)
            features = F.normalize(model.embed(x, every, teacher(x) if teacher else None), dim=2)
            cosine, number = (features @ F.normalize(model.prototypes, dim=1).T).max(dim=2)
        return torch.stack([contrast, number, cosine], dim=-1)  # B N 3

    contrast, number, cosine = collect(look, clips, device, workers=run["workers"])[0].unbind(-1)
    video, mask, *_ = collate([clips[0, i * len(clips) // 4] for i in range(4)])
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent)
    out.mkdir(parents=True, exist_ok=True)
    hidden = F.interpolate(mask.view(-1, 1, *clips.grid).float(), video.shape[2:]).bool()
    paint(out / "masks.png", video, video.masked_fill(hidden, 128).movedim(1, -1))
    tokens = slide(normalise(video, device), tube, lambda x: standardise(model.encoder(x), dim=1))
    paint(out / "components.png", video, colour(tokens))
    if target == "pixel":
        return log(f"wrote masks and components to {out}; there are no prototypes to show")
    cosine[contrast < 1.5 * contrast.median()] = -2  # there is nothing to see in flat tubes
    rows = []
    for k in number.unique():
        best, place = cosine.masked_fill(number != k, -2).max(dim=1)  # in each clip
        best, clip = best.topk(min(8, len(best)))
        if best[-1] > -2:  # so many clips have one
            rows.append((best.mean().item(), clip.tolist(), place[clip]))
    rows = [frame_tubes(collate([clips[0, i] for i in clip])[0], place, tube)
            for _, clip, place in sorted(rows, key=lambda row: -row[0])[:6]]
    if rows:
        save_image(torch.cat(rows) / 255, out / "prototypes.png", nrow=len(rows[0]), pad_value=1)
    contrast, number, _ = slide(normalise(video, device), tube, look).unbind(dim=-1)
    shade = (contrast / contrast.quantile(0.75)).clamp(0, 1)[..., None]
    film = paint(out / "clusters.png", video, colour(model.prototypes)[number.long()] * shade)
    write_video(out / "clusters.mp4", film)
    log(f"wrote masks, components, prototypes and clusters to {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
