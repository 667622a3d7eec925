"""Pictures of any pretraining checkpoint: what it sees, and what it has learned.

    python extras/pictures.py out/toy-tiny-mlp                    on the run's own videos
    python extras/pictures.py out/toy-tiny-mlp --data videos/ --split val --out pictures

masks.png: clips, and what a mask leaves of them. components.png: the encoder's tokens, their first
principal components as red, green and blue. prototypes.png: a row for each, the tubes nearest to
it, with their first and last frames. clusters.png, clusters.mp4: the prototype of each place, like
ones in like colours. In small clips the tubes' grid is slid by parts of a tube, for finer maps.
"""
import argparse
import itertools
import math
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

SIDE = 128  # pixels of a frame in a picture


def slide(video, tube, forward):
    """Maps (B, t, h, w, C) of forward(video) -> (B, N, C): each cell gets the tube around it."""
    t, h, w = video.shape[2:]
    n = math.gcd(4, *tube) if h < 8 * tube[1] else 1  # cells of a tube, along each axis
    padded = F.pad(video, [step // 2 for step in tube[::-1] for _ in "ab"], mode="replicate")
    starts = itertools.product(*(range(step // n // 2, step, step // n) for step in tube))
    maps = [forward(padded[:, :, i:i + t, j:j + h, k:k + w]) for i, j, k in starts]
    return rearrange(torch.stack(maps), "(a b c) n (t h w) e -> n (t a) (h b) (w c) e", a=n, b=n,
                     t=t // tube[0], h=h // tube[1])


def colour(x):
    """The first three principal components of x (..., C) as red, green and blue of 0 to 255."""
    parts = x @ torch.pca_lowrank(x.flatten(0, -2), q=6, niter=8)[2][:, :3]
    low, high = (parts.flatten(0, -2).quantile(q, dim=0) for q in (0.02, 0.98))
    return ((parts - low) / (high - low)).clamp(0, 1) * 255


def paint(path, video, maps):
    """Writes up to eight frames of clips (B, 3, T, S, S), each above its map (B, t, h, w, 3), as
    PNG. Returns clips, then maps, as large as there: (2, B, 3, T, SIDE, SIDE)."""
    maps = F.interpolate(maps.movedim(-1, 1).float().cpu(), video.shape[2:])
    pair = torch.cat([video.float(), maps])
    pair = F.interpolate(pair, (video.shape[2], SIDE, SIDE), mode="area").unflatten(0, (2, -1))
    shown = torch.linspace(0, video.shape[2] - 1, min(8, video.shape[2])).long()
    images = rearrange(pair[:, :, :, shown], "two b c t h w -> (b two t) c h w")
    save_image(images / 255, path, nrow=len(shown), pad_value=1)
    return pair


def frame_tubes(video, place, tube):
    """A tube of each clip (n, 3, T, S, S): its first frame, white around the tube, and below that
    the tube's own first and last frames: (n, 3, SIDE * 3/2, SIDE)."""
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

    # Clips as in pretraining, up to 256 MiB of them; four are shown.
    run = content["args"] if "sizes" in content else {}  # other code has other flags
    data = args.data or run.get("data", "toy")
    root = args.root if args.data else args.root or run.get("root")
    shape = recipe(data, "base") | run
    clips = Clips(find_videos(locate(data, root), (args.split, "")), frames=shape["frames"],
                  stride=shape["stride"], size=shape["size"], ratio=shape["ratio"], tube=tube,
                  choose=centre_frames, crop=centre_crop, tries=1)
    most = min(2048, len(clips), 2 ** 28 // (3 * clips.frames * clips.size ** 2) or 1)
    keys = [(0, i * len(clips) // most) for i in range(most)]
    video, mask, *_, bad = collate([clips[key] for key in tqdm(keys, desc="reading")])
    for path, reason in itertools.chain(*bad):
        log(f"unreadable video {path}: {reason}; it is left out")
    readable = [i for i, reasons in enumerate(bad) if not reasons]
    if not readable:
        raise UserError("none of the videos can be read")
    video, mask = video[readable], mask[readable].view(-1, *clips.grid, 1)
    some = torch.linspace(0, len(video) - 1, min(4, len(video))).long()
    shown, batch = video[some], normalise(video[some], device)
    out = args.out or args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    out.mkdir(parents=True, exist_ok=True)

    hidden = F.interpolate(mask[some].movedim(-1, 1).float(), shown.shape[2:]).bool()
    paint(out / "masks.png", shown, shown.masked_fill(hidden, 128).movedim(1, -1))
    tokens = slide(batch, tube, model.encoder)
    paint(out / "components.png", shown, colour(tokens - tokens.mean(dim=(1, 2, 3), keepdim=True)))
    if target == "pixel":
        return log(f"wrote masks and components to {out}; the checkpoint has no prototypes")

    flags = argparse.Namespace(target=target, teacher=args.teacher or run.get("teacher"))
    teacher = make_teacher(flags, tube).to(device) if target in DINO else None
    prototypes = F.normalize(model.prototypes, dim=1)

    def project(clips):  # all tubes as the projection network sees them: B N E
        index = torch.arange(mask[0].numel(), device=device).expand(len(clips), -1)
        features = model.embed(clips, index, teacher(clips) if teacher else None)
        return F.normalize(features, dim=2)

    found = []
    for part in tqdm(video.split(8), desc="projecting"):
        best = (project(normalise(part, device)) @ prototypes.T).max(dim=2)
        contrast = take_tubes(part.float(), tube).std(dim=(3, 4, 5)).mean(dim=2)
        found.append((best.values.cpu(), best.indices.cpu(), contrast))
    cosine, number, contrast = (torch.cat(part) for part in zip(*found))  # n N each
    cosine[contrast < 0.5 * contrast.mean()] = -2  # flat tubes show nothing
    rows = []
    for k in number.unique():
        best, place = cosine.masked_fill(number != k, -2).max(dim=1)  # in each clip
        best, clip = best.topk(min(8, len(best)))
        if best[-1] > -2:  # so many clips have one
            rows.append((best.mean().item(), frame_tubes(video[clip], place[clip], tube)))
    rows = [images for _, images in sorted(rows, key=lambda row: -row[0])[:6]]
    if rows:
        save_image(torch.cat(rows) / 255, out / "prototypes.png", pad_value=1)

    # A place has the mean feature of the tubes that cover it.
    maps = slide(batch, tube, project).movedim(-1, 1)
    n = maps.shape[-1] * tube[-1] // clips.size
    maps = F.avg_pool3d(maps, n | 1, 1, n // 2, count_include_pad=False).movedim(1, -1)
    used = prototypes[number.unique().to(device)]
    pair = paint(out / "clusters.png", shown, colour(used)[(maps @ used.T).argmax(dim=-1)])
    film = rearrange(pair.byte(), "two b c t h w -> t (b h) (two w) c")
    write_video(out / "clusters.mp4", film)
    log(f"wrote to {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
