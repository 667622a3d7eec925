"""Pictures of any pretraining checkpoint: what it sees, and what it has learned.

    python extras/pictures.py out/toy-tiny-mlp                    on the run's own videos
    python extras/pictures.py out/toy-tiny-mlp --data videos/ --split val --out pictures

masks.png: what the encoder sees. components.png: its tokens, their principal components as colours.
prototypes.png: in each row the tubes nearest to one. clusters.png, .mp4: each place's prototype.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, centre_crop, centre_frames, collate, find_videos, normalise, write_video
from sigma import DINO, UserError, load_model, read_checkpoint, take_tubes
from train import launch, locate, log, make_teacher, recipe, set_up

SIDE = 128  # of a frame in a picture, pixels


def slide(video, tube, forward):
    """Maps (B, t, h, w, C) of forward(video) -> (B, N, C). In small clips the grid of tubes is slid
    by parts of a tube: a cell of the map, one part, has the mean of the tubes around it."""
    t, h, w = video.shape[2:]
    n = min(4, tube[0]) if h < 8 * tube[1] else 1  # parts of a tube, along each axis
    video = F.pad(video, [step // 2 for step in tube[::-1] for _ in "ab"], mode="replicate")
    i, j, k = (range(step // n // 2, step, step // n) for step in tube)
    maps = [forward(video[:, :, a:a + t, b:b + h, c:c + w]) for a in i for b in j for c in k]
    maps = rearrange(torch.stack(maps), "(a b c) n (t h w) e -> n e (t a) (h b) (w c)", a=n, b=n,
                     t=t // tube[0], h=h // tube[1])
    return F.avg_pool3d(maps, n | 1, 1, n // 2, count_include_pad=False).movedim(1, -1)


def colour(x):
    """Vectors (..., C) as red, green and blue of 0 to 255: their first three principal components,
    so that like ones have like colours."""
    parts = x @ torch.pca_lowrank(x.flatten(0, -2), q=6, niter=8)[2][:, :3]
    low, high = (parts.flatten(0, -2).quantile(q, dim=0) for q in (0.02, 0.98))
    return ((parts - low) / (high - low)).clamp(0, 1) * 255


def paint(path, video, maps):
    """Writes up to eight frames of clips (B, 3, T, S, S), and below each its map (B, t, h, w, 3),
    as PNG. Returns the two as large as there: (2, B, 3, T, SIDE, SIDE)."""
    maps = F.interpolate(maps.movedim(-1, 1).float().cpu(), video.shape[2:])
    pair = torch.stack([F.interpolate(x, (x.shape[2], SIDE, SIDE), mode="area")
                        for x in (video.float(), maps)])
    frames = rearrange(pair[:, :, :, ::-(-pair.shape[3] // 8)], "n b c t h w -> b n t c h w")
    save_image(frames.flatten(0, 2) / 255, path, nrow=frames.shape[2], pad_value=1)
    return pair


def frame_tubes(video, place, tube):
    """A tube of each clip (n, 3, T, S, S): its first frame, white around the tube, and below that
    what the tube holds at first and at last: (n, 3, SIDE * 3/2, SIDE)."""
    h, w = (size // step for size, step in zip(video.shape[3:], tube[1:]))
    frame = video[torch.arange(len(video)), :, place // (h * w) * tube[0]].float()
    spot = F.one_hot(place % (h * w), h * w).view(-1, 1, h, w).float()
    spot, frame = F.interpolate(spot, SIDE), F.interpolate(frame, SIDE, mode="area")
    frame = frame.masked_fill(F.max_pool2d(spot, 5, 1, 2) > spot, 255)
    ends = take_tubes(video, tube, place[:, None])[:, 0, :, [0, -1]].float()  # n 3 2 q r
    ends = F.interpolate(rearrange(ends, "n c two q r -> n c q (two r)"), (SIDE // 2, SIDE))
    return torch.cat([frame, ends], dim=2)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of pretraining: a file, or a run's folder")
    parser.add_argument("--data", help="a named set, a folder or a list (default: the run's)")
    parser.add_argument("--root", help="folder of a named set (default: data/<name>)")
    parser.add_argument("--split", default="train", help="train (default), val or test")
    parser.add_argument("--teacher", metavar="FILE", help="DINO's weights (default: downloaded)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the checkpoint's)")
    args = parser.parse_args(argv)
    device, content = set_up(), read_checkpoint(args.checkpoint)
    model = load_model(args.checkpoint).to(device).eval()
    tube, target = model.encoder.tube, getattr(model, "target", "pixel")
    run = content["args"] if "sizes" in content else {}  # other code has other flags
    data = args.data or run.get("root") or run.get("data", "toy")
    run = recipe(data, "base") | {"target": target, "teacher": None} | run
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent)

    # Up to 256 MiB of clips from the whole list; four of them are shown.
    videos = find_videos(locate(data, args.root), (args.split, ""))
    clips = Clips(videos, **{name: run[name] for name in ("frames", "stride", "size", "ratio")},
                  tube=tube, choose=centre_frames, crop=centre_crop, tries=1)
    most = min(2048, len(clips), 2 ** 28 // (3 * clips.frames * clips.size ** 2) or 1)
    keys = tqdm([(0, i * len(clips) // most) for i in range(most)], desc="reading")
    video, mask, *_, bad = collate([clips[key] for key in keys])
    for path, reason in sum(bad, []):
        log(f"unreadable video {path}: {reason}; it is left out")
    video, mask = (x[[not reasons for reasons in bad]] for x in (video, mask))
    if not len(video):
        raise UserError("none of the videos can be read")
    some = torch.linspace(0, len(video) - 1, min(4, len(video))).long()
    shown, batch = video[some], normalise(video[some], device)

    out.mkdir(parents=True, exist_ok=True)
    hidden = F.interpolate(mask[some].view(-1, 1, *clips.grid).float(), shown.shape[2:]).bool()
    paint(out / "masks.png", shown, shown.masked_fill(hidden, 128).movedim(1, -1))
    tokens = slide(batch, tube, model.encoder)
    paint(out / "components.png", shown, colour(tokens - tokens.mean(dim=(1, 2, 3), keepdim=True)))
    if target == "pixel":
        return log(f"wrote masks and components to {out}; there are no prototypes to show")
    flags = argparse.Namespace(target=target, teacher=args.teacher or run["teacher"])
    teacher = make_teacher(flags, tube).to(device) if target in DINO else None
    prototypes = F.normalize(model.prototypes, dim=1)

    def project(clips):  # what the projection network sees: unit features of all tubes, B N E
        index = torch.arange(mask.shape[1], device=device).expand(len(clips), -1)
        features = model.embed(clips, index, teacher(clips) if teacher else None)
        return F.normalize(features, dim=2)

    found = []
    for part in tqdm(video.split(8), desc="projecting"):
        cosine, number = (project(normalise(part, device)) @ prototypes.T).max(dim=2)
        contrast = take_tubes(part.float(), tube).std(dim=(3, 4, 5)).mean(dim=2)
        found.append((cosine.cpu(), number.cpu(), contrast))
    cosine, number, contrast = (torch.cat(part) for part in zip(*found))  # n N each
    cosine[contrast < 1.5 * contrast.median()] = -2  # nothing can be seen in flat tubes
    rows = []
    for k in number.unique():
        best, place = cosine.masked_fill(number != k, -2).max(dim=1)  # in each clip
        best, clip = best.topk(min(8, len(best)))
        if best[-1] > -2:  # so many clips have one
            rows.append((best.mean().item(), frame_tubes(video[clip], place[clip], tube)))
    rows = [images for _, images in sorted(rows, key=lambda row: row[0])[:-7:-1]]
    if rows:
        save_image(torch.cat(rows) / 255, out / "prototypes.png", nrow=len(rows[0]), pad_value=1)

    used = prototypes[number.unique().to(device)]
    nearest = (slide(batch, tube, project) @ used.T).argmax(dim=-1)  # B t h w
    pair = paint(out / "clusters.png", shown, colour(used)[nearest])
    write_video(out / "clusters.mp4", rearrange(pair.byte(), "n b c t h w -> t (b h) (n w) c"))
    log(f"wrote pictures of masks, components, prototypes and clusters to {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
