"""Curves of pretraining runs: the loss, and the spread of both networks' features, which falls to 0
if they collapse.

    python extras/curves.py out/toy-tiny-mlp out/toy-tiny-l2 --out curves.svg

Reads their log.jsonl; of a run that still trains as well.
"""
import itertools
import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from extras.run import draft_of, launch
from sigma import UserError
from train import parser_with

COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"


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
    with draft_of(path) as draft:
        draft.write_text("\n".join([*svg, "</svg>\n"]), encoding="utf-8")
    print(f"wrote {path}")


def main(argv=None):
    parser = parser_with(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, one SVG for all")
    parser.add_argument("--out", type=Path, default="curves.svg", help="default: curves.svg")
    args = parser.parse_args(argv)
    draw_curves(args.runs, args.out)


if __name__ == "__main__":
    sys.exit(launch(main))
