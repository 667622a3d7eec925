"""What Sinkhorn does to a matrix of cosines, drawn: python extras/sinkhorn.py assets/sinkhorn.svg

Rows are six tubes that all like the first of three prototypes best, columns the prototypes. Below
each matrix stand its column sums: how much each prototype got of the six.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from extras.run import draft_of, launch
from sigma import sinkhorn

SCORES = torch.tensor([[.9, .1, .0], [.8, .3, .1], [.7, .2, .4], [.9, .5, .2], [.6, .1, .5],
                       [.8, .6, .1]])
CELL_W, CELL_H, STEP = 48, 26, 182  # pixels: a cell, and from one matrix to the next
ITERATIONS, EPS = (1, 3, 10), (0.01, 0.05, 0.2, 1, 100)


def matrix(x, left, top, title, sums=True):
    """x (N, K) as SVG, its cells as dark as their share of the row, column sums below."""
    def text(column, y, words, more=""):
        return f'<text x="{CELL_W * column + CELL_W / 2:g}" y="{y}" {more}>{words}</text>'

    n, k = x.shape
    svg = [f'<g transform="translate({left},{top})">', text(k / 2 - 0.5, -12, title)]
    for i, row in enumerate(x.tolist()):
        for j, value in enumerate(row):
            shade = value / sum(row)
            svg += [f'<rect x="{CELL_W * j}" y="{CELL_H * i}" width="{CELL_W - 2}" '
                    f'height="{CELL_H - 2}" fill="#0072b2" fill-opacity="{shade:.2f}" '
                    'stroke="#bbb"/>',
                    text(j, CELL_H * i + 17, f"{value:.2f}",
                         'fill="#fff"' if shade > 0.55 else "")]
    if sums:
        svg += [text(j, CELL_H * n + 20, f"{total:.2f}", 'font-weight="bold"')
                for j, total in enumerate(x.sum(dim=0).tolist())]
    return "\n".join([*svg, "</g>"])


def drawing():
    """The whole picture as text."""
    top, below = 74, 352  # of the two rows of matrices
    parts = [matrix(SCORES, 24, top, "cosines", sums=False),
             matrix((SCORES / 0.05).softmax(dim=1), 24 + STEP, top, "softmax of each row")]
    for i, iters in enumerate(ITERATIONS):
        title = f"{iters} iteration{'s' * (iters > 1)}"
        parts.append(matrix(sinkhorn(SCORES, 0.05, iters), 24 + STEP * (i + 2), top, title))
    for i, eps in enumerate(EPS):
        parts.append(matrix(sinkhorn(SCORES, eps, 200), 24 + STEP * i, below, f"eps {eps:g}"))
    width = 24 + STEP * len(EPS)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 560" font-size="14" '
            'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" fill="#222">\n'
            '<rect width="100%" height="100%" fill="#fff"/>\n'
            f'<text x="{width / 2:g}" y="30" font-weight="bold">Sinkhorn step by step, eps 0.05; '
            'below each matrix its column sums</text>\n'
            f'<text x="{width / 2:g}" y="308" font-weight="bold">Converged (200 iterations), '
            'from a small eps to a large one</text>\n' + "\n".join(parts) + "\n</svg>\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the SVG to write")
    with draft_of(parser.parse_args(argv).file) as draft:
        draft.write_text(drawing(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(launch(main))
