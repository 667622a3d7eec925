"""More tests of weights.py and videos.py, to be merged into test_extras.py."""
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import data
import sigma
import videos
import weights
from data import decode, find_videos
from train import launch


def run(script, *arguments):
    """The exit code of a command line."""
    return launch(script.main, [str(argument) for argument in arguments])


def grey(path, value):
    """A short video of one shade of grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_video(path, torch.full((8, 32, 48, 3), value, dtype=torch.uint8))


@pytest.mark.parametrize("target", ["mlp", "pixel"])
def test_a_file_without_its_decoder_head_is_no_encoder(target, tmp_path, capsys):
    """Nothing is loaded partially in silence; what is no tensor is refused too."""
    whole = sigma.build_model("tiny", target=target).state_dict()
    lacking = {name: w for name, w in whole.items() if name != "decoder.head.weight"}
    for content, word in ((lacking, "decoder.head.weight"), (whole | {"step": 1}, "can't be read")):
        torch.save({"model": content}, tmp_path / "theirs.pt")
        assert run(weights, "import", tmp_path / "theirs.pt", tmp_path / "ours.pt") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "ours.pt").exists()


def test_query_key_and_value_stand_in_this_order(tmp_path):
    """config.json tells heads and clips; --to hf writes it back."""
    model = sigma.build_model("tiny", target="pixel", heads=8)
    torch.save({"model": model.state_dict(), "args": dict(frames=12, size=48, stride=3),
                "sizes": sigma.sizes_for("tiny", "pixel", heads=8)}, tmp_path / "ours.pt")
    assert run(weights, "export", tmp_path / "ours.pt", "--to", "hf", tmp_path / "hf") == 0
    theirs = torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=True)
    x = torch.randn(3, 128)
    for part, wanted in zip(("query", "key", "value"),
                            (x @ model.encoder.blocks[0].attn.qkv.weight.T).chunk(3, dim=1)):
        weight = theirs[f"videomae.encoder.layer.0.attention.attention.{part}.weight"]
        assert torch.allclose(x @ weight.T, wanted, atol=1e-5)
    back = weights.convert(tmp_path / "hf")
    assert back["sizes"]["heads"] == 8
    assert back["args"]["frames"] == 12 and back["args"]["size"] == 48
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["VideoMAEForPreTraining"]
    (tmp_path / "hf" / "pytorch_model.bin").unlink()  # config.json is not overwritten either
    assert run(weights, "export", tmp_path / "ours.pt", "--to", "hf", tmp_path / "hf") == 2


def test_prepared_lists_name_the_prepared_videos(tmp_path):
    """Of a.avi and a.mp4 each its own, and absolute paths lead to the copies."""
    source, target = tmp_path / "a", tmp_path / "b"
    grey(source / "x.mp4", 30)
    (source / "x.mp4").rename(source / "x.avi")
    grey(source / "x.mp4", 200)
    (source / "train.csv").write_text(f"x.avi 0\nx.mp4 1\n{source.resolve()}/x.mp4 2\n")
    assert run(videos, "prepare", source, target, "--workers", 0) == 0
    found = find_videos(target)
    assert all(Path(path).is_relative_to(target) for path in found.paths)
    shades = [decode(path, lambda n: [0]).float().mean().item() for path in found.paths]
    assert shades == pytest.approx([30, 200, 200], abs=5)


def test_nothing_of_the_user_s_is_overwritten(tmp_path):
    grey(tmp_path / "set" / "in" / "in" / "v.mp4", 30)
    assert run(videos, "prepare", tmp_path / "set" / "in", tmp_path / "set", "--workers", 0) == 2
    assert [path.name for path in (tmp_path / "set").rglob("*.*")] == ["v.mp4"]
    (tmp_path / "set" / "train.csv").write_text("in/in/v.mp4 3\ngone.mp4 4\n")
    assert run(videos, "check", tmp_path / "set", "--out", tmp_path / "set", "--workers", 0) == 2
    assert "gone.mp4 4" in (tmp_path / "set" / "train.csv").read_text()


def test_lists_are_written_all_or_none(tmp_path):
    tables = tmp_path / "ucfTrainTestlist"
    grey(tmp_path / "UCF-101" / "A" / "v.mp4", 30)
    tables.mkdir()
    (tables / "classInd.txt").write_text("1 A\n")
    (tables / "trainlist01.txt").write_text("A/v.avi 1\n")
    assert run(videos, "lists", "ucf101", tmp_path) == 2
    assert not (tmp_path / "train.csv").exists()
    (tables / "testlist01.txt").write_text("A/v.avi\n")
    assert run(videos, "lists", "ucf101", tmp_path) == 0
    assert find_videos(tmp_path).labels == find_videos(tmp_path, ("val",)).labels == [0]
