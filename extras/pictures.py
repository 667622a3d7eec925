"""Pictures of any pretraining run: what it sees, what it has learned, and how.

    python extras/pictures.py out/toy-tiny-mlp                    on the run's own videos
    python extras/pictures.py out/toy-tiny-mlp --data videos/ --split val --out pictures
    python extras/pictures.py --curves out/toy-tiny-mlp out/toy-tiny-l2 --out curves.svg

masks.png: what a mask leaves of clips. components.png: the encoder's tokens. prototypes.png: a row
of tubes for each. clusters.png and .mp4: each place's prototype, dark where there is little to see.
--curves: the loss of runs and the spread of their features, from their log.jsonl.
"""
import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import draw_bounding_boxes, save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from data import Clips, centre_crop, centre_frames, collate, find_videos, normalise
from extras.evaluate import collect
from extras.run import DEVICE, launch
from extras.toy import write_video
from sigma import DINO_WIDTHS, UserError, load_model, read_checkpoint, standardise, take_tubes
from train import locate, make_teacher, parser_with, settings_for


COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"  # of curves


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


def paint(path, video, maps, side=128):
    """Writes frames of clips (B, 3, T, S, S) as PNG, `side` pixels high, and below them their maps
    (B, t, h, w, 3). Returns all frames as a film (T, B * side, 2 * side, 3) uint8."""
    maps = F.interpolate(maps.movedim(-1, 1).float(), video.shape[2:])
    both = F.interpolate(torch.cat([video, maps]), (video.shape[2], side, side), mode="area")
    rows = rearrange(both[:, :, ::-(-both.shape[2] // 8)], "(n b) c t h w -> (b n) t c h w", n=2)
    save_image(rows.flatten(0, 1) / 255, path, nrow=rows.shape[1], pad_value=1)
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
        save_image(torch.stack(rows) / 255, path, nrow=n, pad_value=1)


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
    film = paint(out / "clusters.png", video, colour(model.prototypes)[number.long()] * shade)
    write_video(out / "clusters.mp4", film)
    print(f"wrote masks, components, prototypes and clusters to {out}")


def panel(title, curves, left):
    """SVG of curves, [(points (step, value), style)]; the axis of values is logarithmic."""
    steps, values = zip(*(point for curve, _ in curves for point in curve))
    last, low, high = max(steps), math.floor(math.log10(min(values))), math.log10(max(values))
    high = max(math.ceil(high), low + 1)
    tick = next(m * 10 ** e for e in range(12) for m in (1, 2, 5) if last <= 5 * m * 10 ** e)

    def place(step, value):
        return f"{390 * step / last:.1f},{250 * (high - math.log10(value)) / (high - low):.1f}"

    svg = [f'<g transform="translate({left},45)"><text y="-18" font-weight="bold">{title}</text>',
           '<text x="195" y="292" text-anchor="middle">step</text>']
    for e in range(low, high + 1, math.ceil((high - low) / 8)):
        svg.append(f'<g transform="translate({place(0, 10 ** e)})"><path d="M0 0h390" stroke="#ddd"'
                   f'/><text x="-8" y="5" text-anchor="end">{10.0 ** e:g}</text></g>')
    for step in range(0, last + 1, tick):
        svg.append(f'<g transform="translate({place(step, 10 ** low)})"><path d="M0 0v5" stroke='
                   f'"#444"/><text y="21" text-anchor="middle">{step:,}</text></g>')
    svg += [f'<polyline points="{" ".join(place(*point) for point in curve)}" {style}/>'
            for curve, style in curves]
    return [*svg, '<path d="M0 0v250h390" fill="none" stroke="#444"/></g>']


def draw_curves(runs, path):
    """Writes an SVG of the runs' losses and the spread of their features. Raises UserError if a
    run's log holds none."""
    solid, dashed = 'fill="none" stroke-width="2" stroke="{}"'.format, ' stroke-dasharray="6 4"'
    losses, spreads, keys = [], [], []
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        lines = [json.loads(line) for line in open(Path(run, "log.jsonl"), encoding="utf-8")]
        lines, style = lines[::math.ceil(len(lines) / 400) or 1], solid(colour)
        curves = [[(line["step"], line[name]) for line in lines if line.get(name)]  # 0 has no place
                  for name in ("loss", "video_std", "projection_std")]
        if not all(curves):
            raise UserError(f"{run}/log.jsonl has no loss, video_std and projection_std: it is no "
                            "pretraining run, or one of an older version")
        losses.append((curves[0], style))
        spreads += [(curves[1], style), (curves[2], style + dashed)]
        keys.append((escape(Path(run).resolve().name), style))
    keys += [("video model", solid("#888")), ("projection network", solid("#888") + dashed)]
    height = 360 + 24 * math.ceil(len(keys) / 4)  # four keys in a row
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {height}" font-size="14" '
           'font-family="sans-serif" fill="#222"><rect width="100%" height="100%" fill="#fff"/>',
           *panel("loss", losses, 65),
           *panel("spread of the features (standard deviation)", spreads, 560)]
    svg += [f'<g transform="translate({65 + 230 * (i % 4)},{362 + i // 4 * 24})"><path d="M0 0h30" '
            f'{style}/><text x="38" y="5">{name}</text></g>'
            for i, (name, style) in enumerate(keys)]
    path.write_text("\n".join([*svg, "</svg>\n"]), encoding="utf-8")
    print(f"wrote {path}")


def main(argv=None):
    """Pictures of a checkpoint, or curves of runs."""
    parser = parser_with(__doc__, "data", "root", "teacher")
    parser.set_defaults(data=None)  # the run's
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="of pretraining: a file, or a run's folder")
    add("--split", default="train", help="train (default), val or test")
    add("--curves", nargs="+", metavar="RUN", help="folders of runs, for one SVG of all")
    add("--out", type=Path, help="folder to write to (default: the checkpoint's); or the SVG")
    args = parser.parse_args(argv)
    if bool(args.curves) == bool(args.checkpoint):
        parser.error("give a checkpoint, or runs after --curves")
    if args.curves:
        return draw_curves(args.curves, args.out or Path("curves.svg"))
    content, model = read_checkpoint(args.checkpoint), load_model(args.checkpoint).to(DEVICE).eval()
    run = settings_for("k400", "base") | content.get("args", {})
    data = args.data or (not args.root and run.get("root")) or run.get("data", "k400")
    splits = ("train", "") if args.split == "train" else (args.split,)
    videos, *_ = find_videos(locate(data, args.root), splits)
    if not videos:
        raise UserError(f"there are no {args.split} videos in {data}")
    videos = videos[::-(-len(videos) // 1024)]
    clips = Clips(videos, **{name: run[name] for name in ("frames", "stride", "size", "ratio")},
                  tube=model.encoder.tube, choose=centre_frames, crop=centre_crop, tries=1)
    flags = argparse.Namespace(target=model.target, teacher=args.teacher or run.get("teacher"))
    teacher = None
    if model.target in DINO_WIDTHS:
        teacher = make_teacher(flags, model.encoder.tube).to(DEVICE)
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent)
    out.mkdir(parents=True, exist_ok=True)
    show(model, clips, teacher, out, run["workers"])


if __name__ == "__main__":
    sys.exit(launch(main))
