"""What pictures.py and bench.py must do: python -m pytest -q part_pictures.py."""
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bench
import pictures
import train
from data import decode, make_toy
from sigma import take_tubes

TUBE = (4, 8, 8)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_toy(folder / "data" / "toy", train=64, val=32)
    os.chdir(folder)
    for target in ("mlp", "pixel"):
        train.main(["--target", target, "--max-steps", "1", "--out", target])


def test_prototypes_of_one_direction_have_one_colour():
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    colours = pictures.colour(centres.repeat(25, 1) + 0.01 * torch.randn(100, 16)).view(25, 4, 3)
    apart = torch.pdist(colours.mean(dim=0)).min()
    assert apart > 10 * colours.std(dim=0).max() and apart > 40


@pytest.mark.parametrize("size", [32, 64])  # finer than tubes in the small one
def test_painting_puts_each_tube_at_its_place(tmp_path, size):
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (8, size, size)), indexing="ij")
    video = (8 * t + 2 * y + 0.5 * x).expand(1, 3, -1, -1, -1)
    maps = pictures.slide(video, TUBE, lambda x: take_tubes(x, TUBE).mean(dim=(3, 4, 5)))
    film = pictures.paint(tmp_path / "a.png", video, maps)[:, 16:-16].float()
    error = (film[:, :, 16:112] - film[:, :, 144:240]).abs().mean(dim=(1, 2, 3))
    assert error[2:6].max() < 6 if size == 32 else error.max() < 20


def test_the_framed_tube_is_at_its_place():
    video = torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8)
    video[..., 7, 8:16, 16:24] = 99  # the last frame of the tube in row 1, column 2
    image = pictures.frame_tubes(video, torch.tensor([16 + 6]), TUBE)[0, 0]
    rows, columns = (image == 255).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 65, 62, 97)
    assert not image[128:, :64].any() and (image[128:, 64:] == 99).all()


def test_pictures_and_a_film_that_plays_are_written(work):
    pictures.main(["mlp", "--split", "val", "--out", "all"])
    names = {"masks.png", "components.png", "prototypes.png", "clusters.png", "clusters.mp4"}
    assert {path.name for path in Path("all").iterdir()} == names
    assert decode("all/clusters.mp4", range).shape == (8, 3, 512, 256)
    pictures.main(["pixel"])  # it has no prototypes
    assert {path.name for path in Path("pixel").glob("*.png")} == {"masks.png", "components.png"}


def test_bench_names_the_bottleneck(work, capsys, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() is None or 1)
    monkeypatch.setattr(bench, "clips_per_second", lambda clips: 10_000)
    bench.main(["--data", "toy", "--model", "tiny", "--batch-size", "8", "--target", "dino-s"])
    shown = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["bottleneck"][0] == "model" and {"teacher", "hours of the recipe"} <= set(shown)
