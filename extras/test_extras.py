"""What the scripts in extras/ must do, as short tests: python -m pytest -q."""
import argparse
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bench
import data
import features
import finetune
import motion
import pictures
import segment
import sigma
import train
import videos
import weights
from data import Videos, decode, find_videos, normalise
from finetune import Classifier
from sigma import Encoder, UserError, build_model, load_model, tube_mask

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy set, and a pretraining run of one step, `run`."""
    folder = tmp_path_factory.mktemp("work")
    data.make_toy(folder / "data" / "toy", train=64, val=32)
    os.chdir(folder)
    assert run(train, "--max-steps", 1, "--out", "run") == 0
    return folder


@pytest.fixture
def work(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


def run(script, *arguments):
    """The exit code of a script's command line."""
    try:
        return train.launch(script.main, [str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's
        return end.code


def grey_videos(folder, count, bad=()):
    """Videos whose grey value is 20 times their number, the label; those in bad can't be read."""
    for i in range(count):
        path = folder / f"{i}.mp4"
        data.write_video(path, torch.full((8, 32, 32, 3), 20 * i, dtype=torch.uint8))
        if i in bad:
            path.write_bytes(b"no video")
    return Videos([str(folder / f"{i}.mp4") for i in range(count)], list(range(count)))


def weights_of(out):
    return torch.load(f"{out}/last.pt", weights_only=True)["model"]


def results_of(out):
    return json.loads(Path(out, "results.json").read_text())


# --- features.py ----------------------------------------------------------------------------------

def test_features_come_in_list_order_for_readable_videos(work, tmp_path, capsys):
    paths, order = grey_videos(tmp_path, 9, bad=(4,)).paths, [5, 2, 4, 8, 0, 1, 7]
    (tmp_path / "list.csv").write_text("".join(f"{paths[i]} {i}\n" for i in order))
    encoder = load_model("run").encoder
    for tokens in ([], ["--tokens"]):
        assert run(features, "--init", "run", "--data", tmp_path / "list.csv", "--out",
                   tmp_path / f"out{len(tokens)}", *tokens) == 0
        written = torch.load(tmp_path / f"out{len(tokens)}" / "features.pt", weights_only=True)
        assert written["paths"] == [paths[i] for i in order if i != 4]
        assert written["labels"].tolist() == [5, 2, 8, 0, 1, 7]
        for path, found in zip(written["paths"], written["features"]):
            clip = normalise(decode(path, range).transpose(0, 1)[None], "cpu")
            wanted = encoder(clip)[0]
            wanted = wanted if tokens else wanted.mean(dim=0)
            assert torch.allclose(found, wanted, atol=1e-4)
    assert "4.mp4" in capsys.readouterr().out


def test_windows_slide_over_each_whole_video(work, tmp_path):
    (tmp_path / "videos").mkdir()
    frames = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
    data.write_video(tmp_path / "videos" / "v.mp4", frames)
    assert run(features, "--init", "run", "--data", tmp_path / "videos", "--window", 8, "--step", 4,
               "--stride", 1, "--out", tmp_path / "out") == 0
    written = torch.load(*(tmp_path / "out").glob("*.pt"), weights_only=True)
    assert written["starts"].tolist() == [0, 4, 8, 12] and written["features"].shape == (4, 128)
    clip = decode(tmp_path / "videos" / "v.mp4", lambda n: range(8, 16)).transpose(0, 1)[None]
    wanted = load_model("run").encoder(normalise(clip, "cpu")).mean(dim=1)[0]
    assert torch.allclose(written["features"][2], wanted, atol=1e-4)


def test_two_processes_with_uneven_shares_get_one_s_accuracy(work, tmp_path):
    paths = grey_videos(tmp_path, 11, bad=(6,)).paths
    lines = [f"{path} {i % 3}\n" for i, path in enumerate(paths)]
    (tmp_path / "val.csv").write_text("".join(lines))
    (tmp_path / "train.csv").write_text("".join(lines[:5]))
    flags = ["--init", "run", "--data", str(tmp_path), "--knn", "--out"]
    assert run(features, *flags, "knn-one") == 0
    result = subprocess.run([*TORCHRUN, str(HERE / "features.py"), *flags, "knn-two"], cwd=work,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads(Path(out, "results.json").read_text()) for out in ("knn-one", "knn-two"))
    assert one["knn"] == two["knn"] and one["videos"] == 11 and one["unreadable"] == 1
    assert "6.mp4" in result.stdout and result.stdout.count("k-NN") == 1


# --- videos.py ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """Bytes of a tiny video for each suffix."""
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    data.write_video(path, torch.randint(256, (20, 48, 64, 3), dtype=torch.uint8))
    return path.read_bytes()


def put(root, files, clip):
    """Writes files by name: None stands for a video."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip if text is None else text.encode())


HEADER = "label,youtube_id,time_start,time_end,split\n"
SSV2 = [{"id": "1", "label": "moving a cup up", "template": "Moving [something] up"},
        {"id": "9", "label": "gone", "template": "Holding [something]"}]
LAYOUTS = {  # files; training and validation labels
    "k400": ({
        "train/x/abcdefghijk_000010_000020.mp4": None, "train/-bcdefghijk_000001_000011.mp4": None,
        "val/zzz_000000_000010.mp4": None, "tables/val.csv": HEADER + "zumba,zzz,0,10,validate\n",
        "tables/train.csv": HEADER + "zumba,abcdefghijk,10,20,train\n"
        'abseiling,-bcdefghijk,1,11,train\n"a, b",gone,5,15,train\n'}, [2, 1], [2]),
    "ssv2": ({
        "20bn-something-something-v2/1.webm": None, "20bn-something-something-v2/2.webm": None,
        "labels/labels.json": json.dumps({"Holding something": "0", "Moving something up": "1"}),
        "labels/train.json": json.dumps(SSV2),
        "labels/validation.json": json.dumps([{"id": "2", "template": "Holding [something]"}])},
        [1], [0]),
    "ucf101": ({
        "UCF-101/Kayaking/v_Kayaking_g01_c01.avi": None, "UCF-101/YoYo/v_YoYo_g01_c01.avi": None,
        "ucfTrainTestlist/classInd.txt": "1 Kayaking\r\n2 YoYo\r\n",
        "ucfTrainTestlist/trainlist01.txt": "YoYo/v_YoYo_g01_c01.avi 2\r\nYoYo/v_gone.avi 2\r\n",
        "ucfTrainTestlist/testlist01.txt": "Kayaking/v_Kayaking_g01_c01.avi\r\n"}, [1], [0]),
    "hmdb51": ({
        "clap/a.avi": None, "clap/b.avi": None, "wave/a.avi": None,
        "testTrainMulti_7030_splits/clap_test_split1.txt": "a.avi 2 \nb.avi 1 \nc.avi 1 \n",
        "testTrainMulti_7030_splits/wave_test_split1.txt": "a.avi 1 \nd.avi 0 \n"}, [0, 1], [0])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_tables_become_lists_that_train(name, clip_file, tmp_path, capsys):
    files, train_labels, val_labels = LAYOUTS[name]
    put(tmp_path / "set", files, clip_file)
    assert run(videos, "lists", name, tmp_path / "set", "--out", tmp_path / "lists") == 0
    assert find_videos(tmp_path / "lists").labels == train_labels
    assert find_videos(tmp_path / "lists", ("val",)).labels == val_labels
    assert len((tmp_path / "lists" / "missing.txt").read_text().splitlines()) == 1
    assert run(train, "--data", name, "--root", tmp_path / "lists", "--model", "small", "--size",
               32, "--frames", 4, "--max-steps", 1, "--workers", 0, "--out", tmp_path / "run") == 0
    assert run(videos, "lists", name, tmp_path / "set", "--out", tmp_path / "lists") == 2
    assert run(videos, "lists", name, tmp_path / "nowhere") == 2
    assert "layout" in capsys.readouterr().err


def test_check_lists_the_good_and_names_the_bad(clip_file, tmp_path):
    put(tmp_path / "set", {"train/a/1.mp4": None, "train/b/2 2.mp4": None, "train/b/3.mp4": "",
                           "val/b/4.mp4": None, "train/b/notes.txt": ""}, clip_file)
    out = tmp_path / "checked"
    assert run(videos, "check", tmp_path / "set", "--out", out, "--workers", 2) == 0
    bad = (out / "bad.txt").read_text()
    assert "3.mp4: it can't be read" in bad and "notes.txt" in bad and bad.count("\n") == 2
    assert find_videos(out).labels == [0, 1] and find_videos(out, ("val",)).labels == [1]


def test_prepare_keeps_names_and_times_and_goes_on(clip_file, tmp_path, capsys):
    source, target = tmp_path / "a", tmp_path / "b"
    put(source, {"x/one.webm": None, "bad.mp4": "text", "list.csv": "x/one.webm 3\n"}, clip_file)
    frames = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 48, 64, 3) * 3
    data.write_video(source / "long.mp4", frames, rate=25)
    assert run(videos, "prepare", source, target, "--workers", 2) == 0
    names = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert names == {"x/one.mp4", "long.mp4", "list.csv", "bad.txt"}
    assert "bad.mp4: Invalid data" in (target / "bad.txt").read_text()
    with av.open(str(target / "long.mp4")) as container:
        stream, found = container.streams.video[0], list(container.decode(video=0))
        assert (stream.height, stream.width, len(container.streams)) == (256, 342, 1)
    assert [i for i, frame in enumerate(found) if frame.key_frame] == [0, 32, 64]
    assert [float(f.time) for f in found] == pytest.approx([i / 25 for i in range(80)], abs=1e-3)
    shown = decode(target / "long.mp4", lambda n: [5, 70]).float().mean(dim=(1, 2, 3))
    assert shown.tolist() == pytest.approx([15, 210], abs=4)
    assert find_videos(target / "list.csv").labels == [3]  # a list finds the new names
    before = (target / "long.mp4").stat().st_mtime_ns
    (target / "x" / "one.mp4").unlink()
    assert run(videos, "prepare", source, target, "--workers", 0) == 0
    assert (target / "x" / "one.mp4").exists()
    assert (target / "long.mp4").stat().st_mtime_ns == before
    assert run(videos, "prepare", source, source / "inside") == 2


def test_prepare_killed_leaves_only_complete_files(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        frames = torch.randint(256, (60, 96, 128, 3), dtype=torch.uint8)
        data.write_video(tmp_path / "a" / f"{i}.mp4", frames)
    command = [sys.executable, str(HERE / "videos.py"), "prepare", "a", "b", "--workers", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not list((tmp_path / "b").glob("*.mp4")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    complete = list((tmp_path / "b").glob("[!.]*.mp4"))
    assert len(complete) < 4 and all(len(decode(str(path), range)) == 60 for path in complete)


def grey(path, value):
    """A short video of one shade of grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_video(path, torch.full((8, 32, 48, 3), value, dtype=torch.uint8))


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


# --- bench.py -------------------------------------------------------------------------------------

def test_bench_names_the_bottleneck(work, capsys, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() is None or 1)
    monkeypatch.setattr(bench, "clips_per_second", lambda clips: 10_000)
    flags = ["--data", "toy", "--batch-size", 8, "--target", "dino-s"]
    assert run(bench, *flags) == 0
    shown = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["bottleneck"][0] == "model" and {"teacher", "hours of the recipe"} <= set(shown)


# --- finetune.py ----------------------------------------------------------------------------------

def tiny_encoder():
    torch.manual_seed(0)
    return Encoder(dim=32, depth=2, heads=2, tube=(2, 8, 8)).double()


def test_a_classifier_is_mean_then_norm_then_a_head_near_zero():
    """The encoder's last norm is left out; the head starts near 0."""
    video, encoder = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), tiny_encoder()
    tokens = encoder.patch_embed(sigma.take_tubes(video, (2, 8, 8))) + sigma.positions(32, 32)
    for block in encoder.blocks:
        tokens = block(tokens)
    model = Classifier(encoder, 5, drop_path=0.5).double().eval()
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    torch.nn.init.normal_(model.fc_norm.weight)
    pooled = F.layer_norm(tokens.mean(dim=1), (32,), model.fc_norm.weight, None, 1e-6)
    assert torch.allclose(model(video), pooled @ model.head.weight.T, atol=1e-12)


def test_drop_path_skips_whole_clips_in_training_alone():
    """More often in later blocks; the mean over clips stays."""
    first, last = (block.attn for block in
                   Classifier(tiny_encoder(), 5, drop_path=0.25).encoder.blocks)
    x = torch.randn(1, 3, 32, dtype=torch.float64).expand(4000, -1, -1)
    kept = (last(x) / last.eval()(x)).flatten(1)
    assert set(kept[:, 0].round(decimals=6).tolist()) == {0, round(1 / 0.75, 6)}
    assert torch.allclose(kept, kept[:, :1].expand_as(kept))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(first(x), first.eval()(x))


def test_learning_rates_fall_by_a_quarter_per_layer():
    model = Classifier(tiny_encoder(), 5)
    groups = {id(p): group for group in finetune.make_optimizer(model).param_groups
              for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, scale, decay in (("head.weight", 1, 0.05), ("fc_norm.bias", 1, 0),
                               ("encoder.blocks.1.attn.q_bias", 0.75, 0),
                               ("encoder.blocks.0.mlp.fc1.weight", 0.75 ** 2, 0.05),
                               ("encoder.patch_embed.proj.bias", 0.75 ** 3, 0)):
        group = groups[id(model.get_parameter(name))]
        assert (group["scale"], group["weight_decay"]) == (scale, decay), name


def test_mixed_labels_sum_to_one_and_frames_stay_alike():
    """A still clip stays still, whatever distorts, erases and mixes it."""
    augment, mixed = finetune.augmentation(7, flip=True), 0
    for seed in range(20):
        torch.manual_seed(seed)
        still = torch.randint(256, (6, 3, 1, 16, 16), dtype=torch.uint8).expand(-1, -1, 4, -1, -1)
        video, shares = augment(still, torch.arange(6))
        assert video.shape == (6, 3, 4, 16, 16) and shares.shape == (6, 7)
        assert torch.allclose(video, video[:, :, :1].expand_as(video))
        assert torch.allclose(shares.sum(dim=1), torch.ones(6)) and (shares >= 0).all()
        mixed += int(((shares > 0.01) & (shares < 0.99)).any())
    assert mixed > 10


def test_clips_are_mirrored_only_if_flip_is_on(monkeypatch):
    """Left and right are labels in Something-Something."""
    monkeypatch.setattr(finetune.v2, "RandAugment", lambda *_, **__: finetune.v2.Identity())
    ramp = torch.arange(32).mul(8).byte().expand(8, 3, 2, 32, 32)  # brighter to the right
    for flip in (False, True):
        torch.manual_seed(0)
        video, _ = finetune.augmentation(4, flip)(ramp, torch.arange(8) % 4)
        left, right = (video[..., part].mean(dim=(1, 2, 3, 4))
                       for part in (slice(8), slice(24, 32)))
        assert (right > left).all() == (not flip)


def test_a_random_crop_lies_inside_and_moves_on():
    boxes = [finetune.random_crop(48, 64, generator) for generator in [data.seeded(0)]
             for _ in range(200)]
    assert len(set(boxes)) > 150
    assert all(t >= 0 and l >= 0 and t + h <= 48 and l + w <= 64 for t, l, h, w in boxes)
    assert min(h * w for _, _, h, w in boxes) < 0.2 * 48 * 64 < 0.8 * 48 * 64 < max(
        h * w for _, _, h, w in boxes)


def test_training_frames_are_dense_or_one_of_each_segment():
    for n in (65, 300):
        for seed in range(100):
            frames = finetune.dense_frames(n, 16, 4, data.seeded(seed))
            start = frames[0]
            assert frames == [min(int(start + i * 64 / 15), start + 63) for i in range(16)]
            assert frames[-1] < n
    assert finetune.dense_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10
    assert finetune.dense_frames(1, 16, 4) == [0] * 16
    for seed in range(50):
        frames = finetune.segment_frames(50, 16, 2, data.seeded(seed))
        assert [index // 3 for index in frames] == list(range(16))
    assert finetune.segment_frames(4, 16, 2) == sorted([0, 1, 2, 3] * 4)


def test_views_spread_over_time_and_the_long_side(tmp_path):
    dense = finetune.view_frames(300, 16, 4, 5, "dense")  # every 4th: 75 frames
    assert [view[0] // 4 for view in dense] == [0, 14, 29, 44, 59]  # int(c * (75 - 16) / 4)
    assert all(view == list(range(view[0], view[0] + 64, 4)) for view in dense)
    assert finetune.view_frames(20, 16, 4, 5, "dense") == [[0, 4, 8, 12] + [16] * 12] * 5
    both = sorted(int(50 / 16 * (i + offset)) for i in range(16) for offset in (0, 0.5))
    assert finetune.view_frames(50, 16, 2, 2, "segments") == [both[0::2], both[1::2]]
    path = str(tmp_path / "v.mp4")
    data.write_video(path, torch.randint(256, (20, 48, 64, 3), dtype=torch.uint8))
    video = finetune.Views(Videos([path], [0]), times=2, crops=3, frames=4, stride=2, size=24,
                  tube=(2, 8, 8))[0, 0][0]
    first = decode(path, lambda n: [0, 2, 4, 6])
    first = data.transform.resize(first, [24], antialias=False).transpose(0, 1)  # 3 4 24 32
    for view, left in enumerate((0, 4, 8)):  # int(s * 8 / 2)
        assert torch.equal(video[view], first[..., left:left + 24])


def test_a_model_that_knows_the_answer_gets_100_percent(tmp_path, capsys):
    """Outputs are averaged over a video's views; an unreadable one is named and wrong."""
    def known(video):  # brightness of each clip
        grey = (video * 0.229 + 0.485)[:, 0].mean(dim=(1, 2, 3)) * 255 / 20
        return -(grey[:, None] - torch.arange(12)).abs()

    views = finetune.Views(grey_videos(tmp_path, 12, bad=[3]), times=2, crops=3, frames=4, stride=1,
                  size=32, tube=(4, 8, 8))
    scores, labels = train.collect(known, views, torch.device("cpu"))
    assert train.accuracy(scores, labels) == pytest.approx(11 / 12) and labels[3] == -1
    assert "3.mp4" in capsys.readouterr().out
    clips = normalise(views[0, 5][0], "cpu")
    assert torch.allclose(scores[5], sum(known(clip[None])[0] for clip in clips) / 6, atol=1e-5)


def test_the_probe_moves_no_weight_of_the_encoder(work, capsys):
    assert run(finetune, "--freeze", "--init", "run", "--epochs", 2, "--out", "probe") == 0
    assert "new: fc_norm.weight" in capsys.readouterr().out
    before, after = weights_of("run"), weights_of("probe")
    encoder = [name for name in after if name.startswith("encoder.")]
    assert len(encoder) > 40 and all(torch.equal(before[n], after[n]) for n in encoder)
    assert after["head.weight"].abs().max() > 2e-4
    results = results_of("probe")
    assert {"top1", "top5"} < results.keys() and "frozen" in results["protocol"]
    assert (results["videos"], results["unreadable"], results["views"]) == (32, 0, "1x1")
    assert run(finetune, "--init", "probe", "--max-steps", 1, "--out", "on") == 0
    assert "new: none" in capsys.readouterr().out  # the head is taken too
    with pytest.raises(SystemExit):
        finetune.parse(["--init", "run", "--model", "small"])


def test_fine_tuning_resumes_exactly_though_it_mixes(work, capsys):
    common = ["--augment", "on", "--epochs", 3, "--batch-size", 16, "--repeat", 2, "--accum", 1]
    assert run(finetune, *common, "--out", "whole") == 0
    assert run(finetune, *common, "--out", "parts", "--max-steps", 5) == 0
    assert run(finetune, *common, "--out", "parts") == 0
    whole, parts = weights_of("whole"), weights_of("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert run(finetune, *common, "--out", "parts", "--views", "2x1") == 0  # tests once more
    assert results_of("parts")["views"] == "2x1"
    assert run(finetune, *common, "--out", "parts", "--lr", 0.5) == 2
    assert "0.5" in capsys.readouterr().err


def test_recipes_are_the_published_ones(work):
    """Something-Something is never mirrored: left and right are labels there."""
    def of(*flags):
        args, *_ = finetune.parse(["--data", *flags])
        return args.epochs, args.lr, args.global_batch, args.views, args.sampling, args.flip
    assert of("k400") == (100, 1e-3, 256, "5x3", "dense", "on")
    assert of("ssv2") == (40, 1e-3, 32, "2x3", "segments", "off")
    assert of("ssv2", "--freeze") == (30, 1e-3, 384, "2x3", "segments", "off")
    assert of("mine", "--freeze") == (30, 1e-3, None, "5x3", "dense", "on")
    assert of("mine", "--init", "run")[:3] == (10, 4e-3, 64)  # a tiny network takes toy's
    with pytest.raises(SystemExit):
        finetune.parse(["--data", "ssv2", "--flip", "on"])


def test_a_limited_set_has_equal_classes():
    videos = Videos([str(i) for i in range(75)], [0] * 50 + [1] * 20 + [2] * 5)
    few = finetune.limit(videos, 10, seed=0)
    assert sorted(few.labels.count(k) for k in range(3)) == [3, 3, 4] and len(set(few.paths)) == 10
    assert few.paths == finetune.limit(videos, 10, 0).paths != finetune.limit(videos, 10, 1).paths
    assert sorted(finetune.limit(videos, 40, 0).labels.count(k) for k in range(3)) == [5, 17, 18]


def test_images_are_clips_that_stand_still(tmp_path, work):
    """test takes the place of val; a list to train on needs another to test on."""
    for name in ("train/cat/1.png", "train/dog/2.jpg", "test/cat/3.png", "test/dog/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 40, 48), tmp_path / name)
    flags = ["--data", tmp_path, "--init", "run", "--epochs", 1, "--workers", 0]
    assert run(finetune, *flags, "--out", "images") == 0
    assert results_of("images")["videos"] == 2
    (tmp_path / "list.csv").write_text("train/cat/1.png\n")
    assert run(finetune, "--data", tmp_path / "list.csv", "--out", "never") == 2
    assert run(finetune, "--data", tmp_path / "list.csv", "--val", tmp_path, "--out", "never") == 2


def test_two_processes_get_the_accuracy_of_one(tmp_path, work):
    """Of videos in uneven shares, one of them unreadable."""
    videos = grey_videos(tmp_path, 11, bad=[6])
    lines = [f"{path} {label % 3}\n" for path, label in zip(videos.paths, videos.labels)]
    (tmp_path / "train.csv").write_text("".join(lines[:5]))
    (tmp_path / "val.csv").write_text("".join(lines))
    flags = ["--data", str(tmp_path), "--init", "run", "--workers", "0", "--epochs", "2"]
    assert run(finetune, *flags, "--batch-size", 4, "--out", "one") == 0
    result = subprocess.run([*TORCHRUN, str(HERE / "finetune.py"), *flags, "--batch-size", "2",
                             "--out", "two"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert results_of("one")["top1"] == results_of("two")["top1"]
    assert results_of("two")["videos"] == 11 and results_of("two")["unreadable"] == 1
    assert "6.mp4" in result.stdout and result.stdout.count("top-1") == 1


# --- weights.py -----------------------------------------------------------------------------------

TUBE = (2, 8, 8)


def small(target="mlp"):
    sizes = dict(dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2,
                 tube=TUBE, target_dim=16, prototypes=20, projector_widths=(24,))
    return sigma.SIGMA(**sizes, target=target)


def network(kind):
    """A network with no weight left at its start, as after training."""
    torch.manual_seed(1)
    target = {"ForPreTraining": "pixel", "dino": "dino", "pixel": "pixel"}.get(kind, "mlp")
    model = small(target)
    if kind in ("ForVideoClassification", "fine-tuned"):
        model = Classifier(model.encoder, 5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def their_block(ours, theirs):
    """(our name, their name) in a block of Hugging Face's, but for query, key, value weights."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense"}
    pairs = [(f"{ours}.{a}.{part}", f"{theirs}.{b}.{part}")
             for a, b in names.items() for part in ("weight", "bias")]
    return pairs + [(f"{ours}.attn.{part}_bias", f"{theirs}.attention.attention.{part}_bias")
                    for part in "qv"]


def hugging_face_file(model, kind):
    """A model's weights as the transformers library saves them."""
    ours, prefix = model.state_dict(), "" if kind == "Model" else "videomae."
    embedding = f"{prefix}embeddings.patch_embeddings.projection"
    pairs = [(f"encoder.patch_embed.proj.{part}", f"{embedding}.{part}")
             for part in ("weight", "bias")]
    stacks = [(f"encoder.blocks.{n}", f"{prefix}encoder.layer.{n}") for n in range(2)]
    if kind == "ForPreTraining":
        stacks.append(("decoder.blocks.0", "decoder.decoder_layers.0"))
        same = ("mask_token", "encoder_to_decoder.", "decoder.norm.", "decoder.head.")
        pairs += [(name, name) for name in ours if name.startswith(same)]
    if kind == "ForVideoClassification":
        pairs += [(name, name.replace("head", "classifier")) for name in ours
                  if name.startswith(("fc_norm", "head"))]
    else:
        pairs += [(f"encoder.norm.{part}", f"{prefix}layernorm.{part}")
                  for part in ("weight", "bias")]
    theirs = {}
    for a, b in stacks:
        pairs += their_block(a, b)
        parts = zip(("query", "key", "value"), ours[f"{a}.attn.qkv.weight"].chunk(3))
        for part, weight in parts:
            theirs[f"{b}.attention.attention.{part}.weight"] = weight.clone()
    return theirs | {b: ours[a] for a, b in pairs}


def save_as(kind, model, path):
    """Writes a checkpoint as the named code would."""
    ours, flags = model.state_dict(), argparse.Namespace(model="any", lr=1e-3)
    if kind == "fine-tuned":
        theirs = {name.removeprefix("encoder."): w for name, w in ours.items()}
        torch.save({"module": theirs, "args": flags}, path)
    elif kind in ("mlp", "dino", "pixel"):
        theirs = {name.replace("projector.", "head."): w for name, w in ours.items()}
        torch.save({"model": theirs, "epoch": 799, "args": flags}, path)
    else:
        torch.save(hugging_face_file(model, kind), path)


@pytest.mark.parametrize("kind", ["mlp", "dino", "pixel", "fine-tuned", "Model", "ForPreTraining",
                                  "ForVideoClassification"])
def test_every_layout_gives_the_same_network(kind, tmp_path):
    """Bit for bit; the imported file is one of ours, and goes back the way it came."""
    model, clip = network(kind), torch.randn(1, 3, 6, 40, 40)
    save_as(kind, model, tmp_path / "theirs.pt")
    ours = tmp_path / "ours.pt"
    flags = ["--heads", 2, "--decoder-heads", 2]
    assert run(weights, "import", tmp_path / "theirs.pt", ours, *flags) == 0
    assert torch.equal(load_model(ours).encoder(clip), model.encoder(clip))
    kept = {name: w for name, w in model.state_dict().items()
            if kind != "Model" or name.startswith("encoder.")}
    found = torch.load(ours, weights_only=True)["model"]
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    for way, name in (("authors", "a.pth"), ("hf", "hf")):
        assert run(weights, "export", ours, tmp_path / name, "--to", way) == 0
        back = tmp_path / f"back-{way}.pt"
        assert run(weights, "import", tmp_path / name, back, *flags) == 0
        again = torch.load(back, weights_only=True)["model"]
        assert again.keys() <= kept.keys() and len(again) >= 30
        assert all(torch.equal(w, kept[name]) for name, w in again.items())
    hugging_face = torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=True)
    saved = {"pixel": "ForPreTraining", "fine-tuned": "ForVideoClassification", "mlp": "Model",
             "dino": "Model"}.get(kind, kind)
    assert hugging_face.keys() == hugging_face_file(model, saved).keys()
    assert run(weights, "export", ours, tmp_path / "a.pth", "--to", "authors") == 2  # not twice


def test_files_that_do_not_fit_stop_and_run_no_code(tmp_path, capsys):
    model = network("ForVideoClassification")
    theirs = hugging_face_file(model, "ForVideoClassification")
    first_token = {n: w for n, w in theirs.items() if not n.startswith("fc_norm")}
    lacking = {n: w for n, w in theirs.items() if not n.endswith("0.output.dense.bias")}

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for content, word in ((first_token, "mean pooling"), (lacking, "mlp.fc2.bias"),
                          ({"model": theirs, "args": Harmful()}, "mkdir"), ({}, "SIGMA")):
        torch.save(content, tmp_path / "theirs.pt")
        assert run(weights, "import", tmp_path / "theirs.pt", tmp_path / "never.pt",
                   "--heads", 2) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "harm").exists() and not (tmp_path / "never.pt").exists()


@pytest.mark.parametrize("target", ["mlp", "pixel"])
def test_a_file_without_its_decoder_head_is_no_encoder(target, tmp_path, capsys):
    """Nothing is loaded partially in silence; what is no tensor is refused too."""
    whole = build_model("tiny", target=target).state_dict()
    lacking = {name: w for name, w in whole.items() if name != "decoder.head.weight"}
    for content, word in ((lacking, "decoder.head.weight"), (whole | {"step": 1}, "can't be read")):
        torch.save({"model": content}, tmp_path / "theirs.pt")
        assert run(weights, "import", tmp_path / "theirs.pt", tmp_path / "ours.pt") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "ours.pt").exists()


def test_query_key_and_value_stand_in_this_order(tmp_path):
    """config.json tells heads and clips; --to hf writes it back."""
    model = build_model("tiny", target="pixel", heads=8)
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


# --- pictures.py ----------------------------------------------------------------------------------

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
    tube = (4, 8, 8)
    maps = pictures.slide(video, tube, lambda x: sigma.take_tubes(x, tube).mean(dim=(3, 4, 5)))
    film = pictures.paint(tmp_path / "a.png", video, maps)[:, 16:-16].float()
    error = (film[:, :, 16:112] - film[:, :, 144:240]).abs().mean(dim=(1, 2, 3))
    assert error[2:6].max() < 6 if size == 32 else error.max() < 20


def test_the_framed_tube_is_at_its_place():
    video = torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8)
    video[..., 7, 8:16, 16:24] = 99  # the last frame of the tube in row 1, column 2
    image = pictures.frame_tubes(video, torch.tensor([16 + 6]), (4, 8, 8))[0, 0]
    rows, columns = (image == 255).nonzero().unbind(dim=1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 65, 62, 97)
    assert not image[128:, :64].any() and (image[128:, 64:] == 99).all()


def test_pictures_and_a_film_that_plays_are_written(work):
    """An encoder with pixel targets has no prototypes to show."""
    assert run(pictures, "run", "--split", "val", "--out", "pictures") == 0
    names = {"masks.png", "components.png", "prototypes.png", "clusters.png", "clusters.mp4"}
    assert {path.name for path in Path("pictures").iterdir()} == names
    assert decode("pictures/clusters.mp4", range).shape == (8, 3, 512, 256)
    assert run(train, "--target", "pixel", "--max-steps", 1, "--out", "pixel") == 0
    assert run(pictures, "pixel", "--out", "pixel-shown") == 0
    assert {path.name for path in Path("pixel-shown").iterdir()} == {"masks.png", "components.png"}
    assert run(pictures, "nowhere") == 2


# --- motion.py ------------------------------------------------------------------------------------

def still_motion(t, h, w, down=0.0, right=0.0):
    return torch.tensor([down, right]).expand(t, h, w, 2)


def test_without_motion_the_mask_is_the_tube_mask():
    for seed in range(5):
        grid = (8, 14, 14)
        tube = tube_mask(1, grid, 0.9, data.seeded(seed))[0]
        found = motion.motion_mask(still_motion(*grid), grid, 0.9, data.seeded(seed))
        assert torch.equal(found, tube)


def test_visible_places_pan_with_the_picture():
    """By one tube a slice; those that leave are replaced, each slice shows as many."""
    grid = t, h, w = 6, 8, 10
    mask = motion.motion_mask(still_motion(t, h, w, right=1.0), grid, 0.7, data.seeded(0))
    mask = mask.view(t, h, w)
    assert (mask.flatten(1).sum(dim=1) == int(0.7 * 80)).all()
    for before, now in zip(~mask[:-1, :, :-1], ~mask[1:, :, 1:]):  # now: one column further
        followed_on, followed_back = (now >= before).all(), (before >= now).all()
        assert followed_on or followed_back
    again = motion.motion_mask(still_motion(t, h, w, right=1.0), grid, 0.7, data.seeded(0))
    assert torch.equal(again.view_as(mask), mask)


def test_places_that_meet_leave_one_and_a_free_one():
    field = torch.zeros(1, 4, 2)
    field[0, 0, 1], field[0, 2, 1] = 1, -1  # both go to column 1
    places = motion.follow([(0.0, 0.0), (0.0, 2.0)], field, data.seeded(0))
    tubes = {round(column) for _, column in places}
    assert len(tubes) == 2 and 1 in tubes


def write_pan(path, down=2, right=3, options=None):
    """Forty frames of a window that pans over a picture, encoded as prepare does it."""
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=data.seeded(0)), (480, 640),
                            mode="bicubic")[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    options = options or {"preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32",
                          "keyint_min": "32", "sc_threshold": "0", "bf": "3",
                          "x264-params": "b-pyramid=none:b-adapt=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(40):
            frame = picture[down * i:down * i + 240, right * i:right * i + 320].contiguous()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def test_vectors_of_a_known_pan_are_right_nine_times_of_ten(tmp_path):
    """Within half a pixel a frame; the content moves against the window."""
    watch = motion.Watch()
    data.decode(write_pan(tmp_path / "v.mp4"), lambda n: list(range(0, 32, 2)), watch=watch)
    vectors = torch.cat([field.flatten(0, 1) for _, field in watch.fields])
    vectors = vectors[vectors.isfinite().all(dim=1)]
    right = ((vectors - torch.tensor([-2.0, -3.0])).abs() <= 0.5).all(dim=1)
    assert len(vectors) > 10_000 and right.float().mean() > 0.9


def test_crop_resize_and_flip_transform_the_motion():
    field = torch.tensor([4.0, -8.0]).expand(30, 40, 2)  # pixels a frame, of 240 x 320
    whole = motion.tube_motion([field], (0, 0, 240, 320), (1, 15, 20))
    assert torch.allclose(whole, torch.tensor([0.25, -0.5]).expand(15, 20, 2))
    half = motion.tube_motion([field], (60, 80, 120, 160), (1, 15, 20))  # enlarged twice
    assert torch.allclose(half, 2 * whole)
    left = torch.zeros(30, 40, 2)
    left[:, :20] = torch.tensor([0.0, 16.0])
    mirrored = motion.tube_motion([left], (0, 0, 240, 320), (1, 15, 20), flip=True)
    assert (mirrored[:, 10:, 1] == -1).all() and not mirrored[:, :10].any()
    missing = torch.full((30, 40, 2), float("nan"))
    assert not motion.tube_motion([missing], (0, 0, 240, 320), (1, 15, 20)).any()


def test_motion_clips_are_the_same_in_any_worker(tmp_path):
    for i in range(3):
        write_pan(tmp_path / f"{i}.mp4", right=i)
    options = dict(frames=16, stride=2, size=64, tube=(2, 8, 8), ratio=0.75)
    videos, keys = data.find_videos(tmp_path), [(0, 0), (1, 1), (2, 2), (3, 2)]
    clips = motion.MotionClips(videos, **options)
    alone, shared = (next(iter(data.loader(clips, 4, keys, workers))) for workers in (0, 2))
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    plain = next(iter(data.loader(data.Clips(videos, **options), 4, keys, 0)))
    assert torch.equal(plain[0], alone[0]) and not torch.equal(plain[1][3], alone[1][3])
    slices = alone[1][3].view(8, -1)
    assert (slices != slices[:1]).any() and (slices.sum(dim=1) == 48).all()
    kept = motion.MotionClips(videos, **options, cache={})
    assert torch.equal(kept[3, 2][1], kept[3, 2][1]) and kept[3, 2][1].shape == (1, 512)


def test_training_with_motion_masks_resumes_exactly(work, capsys):
    flags = ["--mask", "motion", "--epochs", "2", "--batch-size", "16", "--accum", "1"]
    assert run(train, *flags, "--out", "moved") == 0
    assert run(train, *flags, "--out", "stopped", "--max-steps", 3) == 0
    assert run(train, *flags, "--out", "stopped") == 0
    whole, parts = (torch.load(f"{out}/last.pt", weights_only=True)["model"]
                    for out in ("moved", "stopped"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "64 videos" in capsys.readouterr().out


def test_a_set_without_vectors_goes_on_with_tube_masks(tmp_path):
    write_pan(tmp_path / "v.mp4", options={"preset": "veryfast", "g": "1"})  # intra frames alone
    said, videos = [], data.find_videos(tmp_path)
    assert motion.clips_for(videos, said.append) is data.Clips and len(said) == 1


# --- segment.py -----------------------------------------------------------------------------------

def write_png(path, rows, palette):
    """An 8-bit PNG of (H, W) numbers, with a palette (colour type 3) or grey (0)."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    height, width = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3 if palette else 0, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(row) for row in rows.tolist())
    colours = chunk(b"PLTE", bytes(i * 37 % 256 for i in range(768))) if palette else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def squares(height=48, width=50):
    """Three segments: 0, and two rectangles."""
    rows = torch.zeros(height, width, dtype=torch.long)
    rows[8:24, 8:24], rows[32:40, 32:48] = 1, 2
    return rows


def test_annotations_are_read_as_indices_not_colours(tmp_path):
    rows = squares()
    rows[0, 0] = 255  # void
    write_png(tmp_path / "palette.png", rows, palette=True)
    assert torch.equal(segment.read_mask(tmp_path / "palette.png"), squares())
    write_png(tmp_path / "grey.png", (squares() == 1) * 255, palette=False)
    assert torch.equal(segment.read_mask(tmp_path / "grey.png"), (squares() == 1).long())
    save_image(torch.rand(3, 8, 8), tmp_path / "colours.png")
    with pytest.raises(UserError, match="colours"):
        segment.read_mask(tmp_path / "colours.png")


def test_tokens_that_know_their_segment_give_100_percent():
    """And the numbers of segments and clusters mean nothing."""
    true = squares(48, 48).expand(2, 48, 48)
    args = argparse.Namespace(restarts=5, size=48)
    tokens = F.one_hot(true[:, ::8, ::8], 3).float()  # a token for 8 x 8 pixels
    for order in ([0, 1, 2], [2, 0, 1]):
        renamed = torch.tensor(order)[true]
        found = segment.maps(tokens, 3, args, data.seeded(0))
        found = F.one_hot(found[:, 4::8, 4::8], 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
        scores, same = segment.clustering(found.argmax(-1), renamed, 3)
        assert torch.equal(scores, torch.ones(3)) and torch.equal(same, renamed)


def test_random_clusters_give_what_chance_gives():
    generator = data.seeded(0)
    true = torch.randint(2, (4, 100, 100), generator=generator)
    found = torch.randint(2, (4, 100, 100), generator=generator)
    scores, _ = segment.clustering(found, true, 2)
    assert scores.tolist() == pytest.approx([1 / 3] * 2, abs=0.02)  # 1/4 shared of 3/4
    found = torch.randint(10, (4, 100, 100), generator=generator)
    scores, merged = segment.overclustering(found, true, 10, 2)
    for i in range(2):
        both, either = ((merged == i) & (true == i)).sum(), ((merged == i) | (true == i)).sum()
        assert scores[i].item() == pytest.approx((both / either).item())


def test_a_small_example_by_hand():
    true = torch.tensor([[[0, 0, 0, 0, 1, 1, 2, 2]]])
    found = torch.tensor([[[1, 1, 1, 0, 0, 0, 2, 0]]])
    scores, _ = segment.clustering(found, true, 3)
    assert scores.tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 2])
    over = torch.tensor([[[3, 3, 4, 4, 0, 1, 2, 2]]])
    assert segment.overclustering(over, true, 5, 3)[0].tolist() == [1, 1, 1]
    greedy = torch.tensor([[0.9, 0.8], [0.8, 0.0]])  # the best pair alone is not the best sum
    assert segment.match(greedy) == [1, 0]


def test_videos_of_any_length_and_missing_segments(tmp_path, work, capsys):
    """One object leaves; frames without annotation; two processes give what one gives."""
    for video, length in (("a", 3), ("b", 9)):
        for i in range(length):
            rows = squares() * ((squares() != 2) | torch.tensor(i < 4))
            image = 0.2 + 0.3 * rows.float().expand(3, -1, -1)
            folder = tmp_path / "JPEGImages" / "480p" / video
            folder.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / f"{i:05}.jpg")
            if i % 4 != 3:
                mask = tmp_path / "Annotations" / "480p" / video / f"{i:05}.png"
                write_png(mask, rows, palette=True)
    flags = ["--root", str(tmp_path), "--model", "tiny", "--frames", 4, "--size", 32, "--pictures"]
    assert run(segment, *flags, "--out", tmp_path / "one") == 0
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(one["videos"]) == {"a", "b"} and 0 < one["clustering"][0] <= 1
    assert decode(str(tmp_path / "one" / "b.mp4"), range).shape[-2:] == (32, 128)
    result = subprocess.run([*TORCHRUN, str(HERE / "segment.py"), *map(str, flags), "--out",
                             str(tmp_path / "two")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["videos"] == one["videos"] and result.stdout.count("mIoU") == 2
    assert run(segment, "--root", tmp_path / "one") == 2
    assert run(segment, *flags[:4], "--size", 30) == 2
