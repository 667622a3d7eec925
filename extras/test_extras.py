"""What the scripts in extras/ must do, as short tests: python -m pytest -q."""
import argparse
import contextlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in test_sigma.py

import av
import numpy
import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import data
import sigma
import train
from data import decode, find_videos, normalise
from extras import bench, features, finetune, motion, pictures, segment, videos, weights
from extras.finetune import Classifier
from extras.run import RunError, launch
from sigma import Encoder, UserError, build_model, load_encoder, load_model, tube_mask


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy set, and a pretraining run of one step, `run`."""
    folder = tmp_path_factory.mktemp("work")
    with contextlib.chdir(folder):
        data.make_toy("data/toy", train=64, val=32)
        assert run(train, "--max-steps", 1, "--out", "run") == 0
    return folder


@pytest.fixture
def work(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


def run(script, *arguments):
    """The exit code of a script's command line."""
    try:
        return launch(script.main, [str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's
        return end.code


def two_processes(script, *arguments):
    """What a script prints under torchrun, with two processes."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         script.__file__, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def grey_videos(folder, count, bad=()):
    """Videos (path, label) whose grey value is 20 times their label; those in bad can't be read."""
    for i in range(count):
        data.write_video(folder / f"{i}.mp4", torch.full((8, 32, 32, 3), 20 * i).byte())
        if i in bad:
            (folder / f"{i}.mp4").write_bytes(b"no video")
    return [(str(folder / f"{i}.mp4"), i) for i in range(count)]


def weights_of(out):
    return torch.load(f"{out}/last.pt", weights_only=True)["model"]


def results_of(out):
    return json.loads(Path(out, "results.json").read_text())




# --- features.py ----------------------------------------------------------------------------------

def test_features_come_in_list_order_for_readable_videos(work, tmp_path, capsys):
    paths, encoder = [p for p, _ in grey_videos(tmp_path, 6, bad=[4])], load_encoder("run")
    (tmp_path / "list.csv").write_text("".join(f"{paths[i]} {i}\n" for i in (5, 2, 4, 0)))
    flags = ["--init", "run", "--data", tmp_path / "list.csv", "--out", tmp_path / "out"]
    assert run(features, *flags) == 0 and "4.mp4" in capsys.readouterr().out
    assert run(features, *flags) == 2  # nothing is overwritten
    assert run(features, *flags[:-1], tmp_path / "tokens", "--tokens") == 0
    tokens, pooled = (torch.load(tmp_path / out / "features.pt", weights_only=True)
                      for out in ("tokens", "out"))
    assert pooled["paths"] == [paths[i] for i in (5, 2, 0)] and pooled["labels"][1] == 2
    clips = torch.stack([decode(path, lambda n: [range(n)])[0] for path in pooled["paths"]])
    wanted = encoder(normalise(clips.transpose(1, 2), "cpu"))
    assert torch.allclose(tokens["features"], wanted, atol=1e-4)
    assert torch.allclose(pooled["features"], wanted.mean(dim=1), atol=1e-4)


WINDOWS = ["--init", "run", "--window", 8, "--stride", 2, "--step", 4]  # a window spans 16 frames


def noise_video(path, times):
    """A video of noise whose frames are shown at these times, in 1/100 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for time in times:
            pixels = torch.randint(256, (32, 48, 3)).byte().numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def windows_in(out, name):
    """What was written for a video: its features and its entry in windows.json."""
    facts = json.loads(Path(out, "windows.json").read_text())["videos"][name]
    return torch.from_numpy(numpy.load(Path(out, f"{name}.npy"))), facts


def feature_of(path, start):
    """The feature of a plain clip from there, cropped as everywhere."""
    clip, = decode(path, lambda n: [[min(start + 2 * i, n - 1) for i in range(8)]])
    clip = data.resize_crop(clip, data.centre_crop(*clip.shape[-2:]), 32)
    return load_encoder("run")(normalise(clip[None], "cpu")).mean(dim=1)[0]


@pytest.mark.parametrize("times, rows", [
    (range(0, 160, 4), 7), (range(0, 40, 4), 1), ([i * i for i in range(40)], 7)])
def test_windows_have_the_features_of_plain_clips(times, rows, work, tmp_path):
    """At a constant rate, in a video shorter than a window, at a varying rate."""
    noise_video(tmp_path / "v.mp4", times)
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", tmp_path / "out") == 0
    found, facts = windows_in(tmp_path / "out", "v")
    assert found.shape == (rows, 128) and found.dtype == torch.float32
    wanted = torch.stack([feature_of(tmp_path / "v.mp4", 4 * row) for row in range(rows)])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (facts["frames"], facts["feature_stride"], facts["window_span"]) == (len(times), 4, 16)
    assert facts["fps"] == pytest.approx(100 * (len(times) - 1) / times[-1])


def test_a_video_is_decoded_once_however_much_windows_overlap(work, tmp_path, monkeypatch):
    noise_video(tmp_path / "v.mp4", range(0, 160, 4))
    seen, all_frames = [], features.all_frames
    monkeypatch.setattr(features, "all_frames", lambda path: (
        seen.append(frame) or frame for frame in all_frames(path)))
    monkeypatch.delattr(features, "decode")
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", tmp_path / "out") == 0
    assert len(seen) == 40


def test_an_unreadable_window_keeps_its_row(work, tmp_path, monkeypatch, capsys):
    """The nearest one stands in, so that later rows keep their times."""
    def all_frames(path, read=features.all_frames):
        for number, frame in enumerate(read(path)):
            if number == 20:
                raise data.VideoError("damage")
            yield frame

    def decode_unless_damaged(path, choose):
        if {20, 21}.intersection(*choose(40)):
            raise data.VideoError("damage")
        return decode(path, choose)

    noise_video(tmp_path / "v.mp4", range(0, 160, 4))
    monkeypatch.setattr(features, "all_frames", all_frames)
    monkeypatch.setattr(features, "decode", decode_unless_damaged)
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", tmp_path / "out") == 0
    found, facts = windows_in(tmp_path / "out", "v")
    assert facts["unreadable"] == [2, 3, 4, 5] and "v.mp4: 4 of 7" in capsys.readouterr().out
    assert torch.equal(found[2:4], found[[1, 1]]) and torch.equal(found[4:6], found[[6, 6]])
    assert torch.allclose(found[6], feature_of(tmp_path / "v.mp4", 24), atol=1e-5)


def test_windows_go_on_with_the_same_settings_and_stop_with_others(work, tmp_path, capsys):
    videos, out = grey_videos(tmp_path, 3, bad=[1]), tmp_path / "out"
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", out) == 0
    assert "1.mp4" in capsys.readouterr().out
    before = (out / "0.npy").stat().st_mtime_ns
    (out / "2.npy").unlink()
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", out) == 0
    assert (out / "2.npy").exists() and (out / "0.npy").stat().st_mtime_ns == before
    assert run(features, *WINDOWS[:-1], 8, "--data", tmp_path, "--out", out) == 2
    (out / "windows.json").unlink()
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", out) == 2


def test_videos_of_one_name_are_refused(work, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        grey_videos(tmp_path / folder, 1)
    assert run(features, *WINDOWS, "--data", tmp_path, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert "a/0.mp4" in shown and "b/0.mp4" in shown
    assert run(features, "--init", "run", "--data", tmp_path / "a", "--knn") == 2  # no labels


def test_two_processes_write_the_windows_that_one_writes(work, tmp_path):
    grey_videos(tmp_path, 5, bad=[2])
    flags = [*WINDOWS, "--data", tmp_path, "--out"]
    assert run(features, *flags, tmp_path / "one", "--workers", 2) == 0
    assert "2.mp4" in two_processes(features, *flags, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir() if path.suffix)
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --- finetune.py ----------------------------------------------------------------------------------

def test_a_classifier_its_drop_path_and_its_learning_rates():
    encoder = Encoder(dim=32, depth=2, heads=2, tube=(2, 8, 8))
    model, video = Classifier(encoder, 5, 0.25).double(), torch.randn(2, 3, 4, 32, 32).double()
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    first, last, x = *(block.attn for block in encoder.blocks), torch.randn(1, 3, 32).double()
    kept = (last(x.expand(4000, -1, -1)) / last.eval()(x)).flatten(1)
    assert set(kept[:, 0].round(decimals=6).tolist()) == {0, round(1 / 0.75, 6)}
    assert torch.allclose(kept, kept[:, :1]) and kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(first(x), first.eval()(x))
    tokens = encoder.patch_embed(sigma.take_tubes(video, (2, 8, 8))) + sigma.positions(32, 32)
    pooled = F.layer_norm(encoder.blocks.eval()(tokens).mean(dim=1), (32,), eps=1e-6)
    assert torch.allclose(model.eval()(video), pooled @ model.head.weight.T, atol=1e-12)
    rates = {p: (group["scale"], group["weight_decay"])
             for group in finetune.make_optimizer(model).param_groups for p in group["params"]}
    assert rates.keys() == set(model.parameters()) and rates[model.head.weight] == (1, 0.05)
    assert rates[first.q_bias] == (0.75 ** 2, 0)
    assert rates[encoder.patch_embed.proj.weight] == (0.75 ** 3, 0.05)


def test_mixed_labels_sum_to_one_and_frames_stay_alike(monkeypatch):
    """A still clip stays still, whatever distorts, erases and mixes it; mirrored only if asked."""
    still = torch.randint(256, (6, 3, 1, 16, 16)).byte().expand(-1, -1, 4, -1, -1)
    video, shares = map(torch.cat, zip(*(
        finetune.augment(still, torch.arange(6), 7, flip=True) for _ in range(20))))
    assert torch.allclose(video, video[:, :, :1].expand_as(video))
    assert torch.allclose(shares.sum(dim=1), torch.ones(120)) and shares.min() >= 0
    assert shares.amax(dim=1).median() < 0.99
    monkeypatch.setattr(finetune.v2, "RandAugment", lambda *_, **__: finetune.v2.Identity())
    ramp = torch.arange(32).mul(8).byte().expand(32, 3, 2, 32, 32)  # brighter to the right
    for flip in (False, True):
        columns = finetune.augment(ramp, torch.arange(32) % 4, 4, flip)[0].mean(dim=(1, 2, 3))
        assert (columns[:, 24:].sum(1) > columns[:, :8].sum(1)).all() == (not flip)


def test_mixing_gives_each_clip_s_labels_its_share():
    """Also several labels a clip: of two mixed clips each class gets what its own clip has."""
    labels, clips = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]), torch.zeros(2, 3, 2, 8, 8).byte()
    shares = torch.stack([finetune.augment(clips, labels, 4, flip=False)[1] for _ in range(20)])
    assert torch.equal(shares[..., 0], shares[..., 1]) and not shares[..., 3].any()
    assert torch.allclose(shares[..., 0] + shares[..., 2], torch.ones(20, 2))
    assert ((shares > 0.1) & (shares < 0.9)).any()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_a_stand_in_for_unreadable_videos_has_no_part_in_the_loss(several, augmented):
    args = argparse.Namespace(repeat=2, augment=augmented, multi_label=several, amp="off",
                              sampling="dense", flip=True)
    video = torch.randint(256, (6, 3, 2, 8, 8)).byte()
    video[2:4] = 0
    table = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 0, 0]]).float() if several else None
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(384, 3))

    def loss(clips, labels):
        torch.manual_seed(0)
        batch = data.Batch(video[clips], None, torch.tensor(labels), None, {})
        return finetune.loss_of(network, batch, args, 3, table)[0]

    assert loss(range(6), [2, -1, 1]) == loss([0, 1, 4, 5], [2, 1])
    nothing = loss([2, 3], [-1])
    nothing.backward()  # a graph, which other processes wait for
    assert nothing == 0 and not network[1].weight.grad.any()


def test_average_precision_by_hand():
    """Of the first class's two videos one is first, one is third; the second's shares its place
    with another; the third class has none and does not count."""
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.3, 0.1, 0.3], [0.1, 0.2, 0.4]])
    truth = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = finetune.mean_average_precision(scores, truth)
    assert found == pytest.approx(((1 / 1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_several_labels_a_line_are_learned_and_tested_by_map(tmp_path, work):
    """A video that can't be read is ranked last; without the flag such a list is refused."""
    lines = [f"{path} {label % 3} {3 + label % 2}\n" for path, label in
             grey_videos(tmp_path, 11, bad=[6])]
    (tmp_path / "train.csv").write_text("".join(lines[:5]))
    (tmp_path / "val.csv").write_text("".join(lines))
    flags = ["--data", tmp_path, "--init", "run", "--epochs", 1, "--out"]
    assert run(finetune, *flags, "refused") == 2
    assert run(finetune, *flags, "several", "--multi-label", "--views", 2, 1) == 0
    results = results_of("several")
    assert 0 < results["mAP"] <= 1 and (results["videos"], results["unreadable"]) == (11, 1)
    assert len(weights_of("several")["head.bias"]) == 5


def test_clips_are_like_those_of_the_run_unless_flags_differ(work, tmp_path):
    """Of a run of other code perhaps only frames and size are known."""
    def of(*flags):
        args, _ = finetune.parse(["--data", "k400", "--init", *flags])
        return args.frames, args.stride, args.size

    assert of("run") == (8, 1, 32) and of("run", "--size", "64", "--stride", "3") == (8, 3, 64)
    content = sigma.read_checkpoint("run")
    torch.save(content | {"args": {"frames": 4, "size": 16}}, tmp_path / "other.pt")
    assert of(str(tmp_path / "other.pt")) == (4, 4, 16)


def test_frames_and_crops_to_train_and_to_test_on(tmp_path):
    for n in range(65, 365, 3):
        one, two = (finetune.dense_frames(n, 16, 4, data.seeded(n)) for _ in range(2))
        assert one == two == [min(int(one[0] + i * 64 / 15), one[0] + 63) for i in range(16)]
        parts = [index // 3 for index in finetune.segment_frames(50, 16, 2, data.seeded(n))]
        assert parts == list(range(16))
    assert finetune.dense_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10
    assert finetune.segment_frames(4, 16, 2) == sorted([0, 1, 2, 3] * 4)
    areas = [height * width / 48 / 64 for _, _, height, width in (
        finetune.random_crop(48, 64, data.seeded(seed)) for seed in range(200))]
    assert 0.07 < min(areas) < 0.2 < 0.8 < max(areas) <= 1
    dense = finetune.view_frames(300, 16, 4, 5, "dense")  # every 4th: 75 frames
    assert [view[0] // 4 for view in dense] == [int(c * (75 - 16) / 4) for c in range(5)]
    assert finetune.view_frames(20, 16, 4, 5, "dense") == [[0, 4, 8, 12] + [16] * 12] * 5
    assert finetune.view_frames(9, 3, 2, 2, "segments") == [[0, 3, 6], [1, 4, 7]]
    path, chosen = str(tmp_path / "v.mp4"), [[0, 2, 4, 6], [1, 1, 1, 1]]
    data.write_video(path, torch.randint(256, (20, 48, 64, 3)).byte())
    views, *_ = finetune.Views([(path, 0)], frames=4, stride=2, size=24, tube=(2, 8, 8), repeat=6,
                               choose=lambda *_: chosen)[0, 0]
    clips = torch.stack(decode(path, lambda n: chosen)).transpose(1, 2)
    clips = data.transform.resize(clips, [24], antialias=False)  # 2 3 4 24 32
    wanted = torch.stack([clips[..., left:left + 24] for left in (0, 4, 8)], dim=1)
    assert torch.equal(views, wanted.flatten(0, 1))


def test_the_probe_moves_no_weight_of_the_encoder(work, capsys):
    flags = ["--freeze", "--init", "run", "--epochs", 2, "--limit", 40, "--out", "probe"]
    assert run(finetune, *flags) == 0 and "a new head" in capsys.readouterr().out
    before, after, results = weights_of("run"), weights_of("probe"), results_of("probe")
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("encoder."))
    assert after["head.weight"].abs().max() > 2e-4 and results["videos"] == 32
    Path("probe/results.json").write_text(json.dumps(results | {"summary": "as before"}))
    assert run(finetune, *flags) == 0 and "as before" in capsys.readouterr().out
    assert run(finetune, "--init", "probe", "--max-steps", 1, "--out", "on") == 0
    assert "head.weight" in capsys.readouterr().out
    for wrong in (["--model", "small"], ["--size", 30], ["--val", "data/toy/val/0_right"]):
        assert run(finetune, "--init", "run", "--out", "never", *wrong) == 2  # or: no labels


def test_fine_tuning_resumes_exactly_though_it_mixes(work, monkeypatch, capsys):
    monkeypatch.setitem(finetune.RECIPES["toy"], "augment", True)
    common = ["--epochs", 3, "--batch-size", 16, "--repeat", 2, "--accum", 1, "--out"]
    for flags in (["whole"], ["parts", "--max-steps", 5], ["parts"]):
        assert run(finetune, *common, *flags) == 0
    assert all(map(torch.equal, weights_of("whole").values(), weights_of("parts").values()))
    assert run(finetune, *common, "parts", "--views", 2, 1) == 0
    assert results_of("parts")["args"]["views"] == [2, 1]  # tested once more
    assert run(finetune, *common, "parts", "--lr", 0.5) == 2 and "0.5" in capsys.readouterr().err

    def fit(args, model, optimizer, clips, loss_of, **_):
        batch = data.collate([clips[0, 0], clips[0, 63]])  # of the first and the last class
        assert loss_of(lambda video: 99 * F.one_hot(torch.tensor([0, 0, 7, 7])), batch)[0] < 9.9
    monkeypatch.setattr(finetune, "fit", fit)
    assert run(finetune, "--no-augment", "--repeat", 2, "--out", "never") == 0


def test_recipes_are_the_published_ones_and_limits_are_fair(work):
    def of(*flags):
        args, _ = finetune.parse(["--data", *flags])
        return args.epochs, args.lr, args.global_batch, args.views, args.sampling
    assert of("k400") == (100, 1e-3, 256, [5, 3], "dense")
    assert of("ssv2") == (40, 1e-3, 32, [2, 3], "segments")
    assert of("ssv2", "--freeze")[:3] == (30, 1e-3, 384)
    assert of("mine", "--init", "run")[:3] == (10, 4e-3, 64)  # a tiny network takes toy's
    videos = list(enumerate([0] * 50 + [1] * 20 + [2] * 5))
    labels = [label for _, label in set(finetune.limit(videos, 40, seed=0))]
    assert sorted(map(labels.count, range(3))) == [5, 17, 18]


def test_two_processes_with_uneven_shares_get_one_s_accuracy(tmp_path, work):
    lines = [f"{path} {label % 3}" for path, label in grey_videos(tmp_path, 11, bad=[6])]
    (tmp_path / "train.csv").write_text("\n".join(lines[:5]))
    (tmp_path / "val.csv").write_text("\n".join(lines))
    flags = ["--data", tmp_path, "--init", "run", "--workers", 0, "--out"]
    probe = ["--freeze", "--lr", 1, "--batch-size"]  # drop path would draw other numbers
    for script, key, one, two in ((finetune, "top1", [*probe, 4], [*probe, 2]),
                                  (features, "knn", ["--knn"], ["--knn"])):
        assert run(script, *flags, f"{key}-1", *one) == 0
        assert "6.mp4" in two_processes(script, *flags, f"{key}-2", *two)
        one, two = results_of(f"{key}-1"), results_of(f"{key}-2")
        assert one[key] == two[key] and (two["videos"], two["unreadable"]) == (11, 1)




# --- videos.py ------------------------------------------------------------------------------------

ROWS = "label,youtube_id,time_start,time_end,split\n"
LAYOUTS = {  # files, None stands for a video; training and validation labels
    "k400": ({
        "x/abcdefghijk_000010_000020.mp4": None, "-bcdefghijk_000001_000011.mp4": None,
        "zzz_000000_000010.mp4": None, "t/train.csv": ROWS + "zumba,abcdefghijk,10,20,train\n"
        'abseiling,-bcdefghijk,1,11,train\n"a, b",gone,5,15,train\n',
        "t/val.csv": ROWS + "zumba,zzz,0,10,validate\n"}, [2, 1], [2]),
    "ssv2": ({
        "v/1.webm": None, "v/2.webm": None, "l/labels.json": '{"Hold a": "0", "Move a up": "1"}',
        "l/train.json": '[{"id": "1", "template": "Move [a] up"}, {"id": "9", "template": "Hold '
        '[a]"}]', "l/validation.json": '[{"id": "2", "template": "Hold [a]"}]'}, [1], [0]),
    "ucf101": ({
        "UCF-101/Yo/v_Yo_g01_c01.avi": None, "UCF-101/Kayak/v_Kayak_g01_c01.avi": None,
        "ucf/classInd.txt": "1 Kayak\r\n2 Yo\r\n",
        "ucf/trainlist01.txt": "Yo/v_Yo_g01_c01.avi 2\r\nYo/v_gone.avi 2\r\n",
        "ucf/testlist01.txt": "Kayak/v_Kayak_g01_c01.avi\r\n"}, [1], [0]),
    "hmdb51": ({
        "clap/a.avi": None, "clap/b.avi": None, "wave/a.avi": None,
        "splits/wave_test_split1.txt": "a.avi 1 \nd.avi 0 \n",
        "splits/clap_test_split1.txt": "a.avi 2 \nb.avi 1 \nc.avi 1 \n"}, [0, 1], [0])}


def put(root, files):
    """Writes texts by name, or tiny videos, None or a shade of grey."""
    for path, content in ((root / name, content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_bytes(os.fsencode(content))
        else:
            data.write_video(root / "v.mp4", torch.full((8, 32, 48, 3), content or 0).byte())
            (root / "v.mp4").rename(path)


def labels_of(place, split="train"):
    return [label for _, label in find_videos(place, (split, ""), [])[0]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_tables_become_lists_that_train(name, tmp_path, capsys):
    files, *labels = LAYOUTS[name]
    out = tmp_path / "lists"
    put(tmp_path / "set", dict(list(files.items())[:-1]))  # a table lacks: no list is written
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 2 and not out.exists()
    assert "layout" in capsys.readouterr().err
    put(tmp_path / "set", files)
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 0
    assert [labels_of(out), labels_of(out, "val")] == labels
    assert len((out / "missing.txt").read_text().splitlines()) == 1
    assert run(train, "--data", name, "--root", out, "--model", "small", "--size", 32, "--frames",
               4, "--max-steps", 1, "--workers", 0, "--out", tmp_path / "run") == 0
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 2  # not twice


def test_check_lists_the_good_and_names_the_bad(tmp_path, capsys):
    put(tmp_path / "set", {"train/a/1.mp4": 30, "train/b/2 2.mp4": 30, "train/b/3.mp4": "",
                           "val/b/4.mp4": 30, "train/b/notes.txt": ""})
    cut = tmp_path / "set" / "train" / "b" / "cut.mp4"  # its header promises 20 frames
    write_frames(cut, range(0, 800, 40), movflags="faststart")
    with av.open(str(cut)) as container:
        tenth = [packet for packet in container.demux() if packet.size][9]
    os.truncate(cut, tenth.pos + tenth.size)
    out = tmp_path / "checked"
    assert run(videos, "check", tmp_path / "set", "--out", out, "--workers", 2) == 0
    assert capsys.readouterr().err.count("100%") == 2  # the bars reach the end
    bad = (out / "bad.txt").read_text()
    assert bad.count("\n") == 3 and all(name in bad for name in ("3.mp4: ", "notes.txt", "cut.mp4"))
    assert labels_of(out) == [0, 1] and labels_of(out, "val") == [1]
    assert run(videos, "check", tmp_path / "set", "--out", tmp_path / "set") == 2


def write_frames(path, times, base=Fraction(1, 1000), **options):
    """A video of frames that go from blue to red, white at the top, at the times, in ticks of
    `base` seconds; in BT.709, full range."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=1 / base, options={"bf": "3"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        context = stream.codec_context
        context.time_base, context.colorspace, context.color_range = base, 1, 2
        for i, time in enumerate(times):
            picture = torch.tensor([6 * i, 40, 240 - 6 * i]).expand(64, 96, 3).clone()
            picture[:16] = 250
            frame = av.VideoFrame.from_ndarray(picture.byte().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=2)
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def turn(path, turns):
    """Has an mp4 file say that its frames are to be turned by 90 degrees anticlockwise."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    matrix = numpy.array([cos, -sin, 0, sin, cos, 0, 0, 0, 1 << 14]) << 16
    content[place:place + 36] = matrix.astype(">i4").tobytes()
    path.write_bytes(content)


TICK = Fraction(1, 1000)


@pytest.mark.parametrize("name, times, base, turns", [
    ("b.avi", range(40), 40 * TICK, 0),  # avi has no times of showing
    ("fast.mkv", range(40), TICK, 0),  # no average rate
    ("late.mkv", [1000 + i * i for i in range(40)], TICK, 0),
    *((f"{turns}.mp4", range(0, 1600, 40), TICK, turns) for turns in range(4))])
def test_a_prepared_video_shows_all_frames_at_their_times(tmp_path, name, times, base, turns):
    """In order, upright, in their colours: whatever the original says in another way."""
    (tmp_path / "a").mkdir()
    write_frames(tmp_path / "a" / name, times, base)
    if turns:
        turn(tmp_path / "a" / name, turns)
    assert run(videos, "prepare", tmp_path / "a", tmp_path / "b", "--workers", 0) == 0
    with av.open(str((tmp_path / "b" / name).with_suffix(".mp4"))) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx(
        [float((time - times[0]) * base) for time in times], abs=1e-4)
    for i, frame in enumerate(frames):
        image = torch.from_numpy(frame.to_ndarray(format="rgb24")).rot90(-turns).float()
        assert frame.rotation == 0 and image.shape == (256, 384, 3) and image[:48].mean() > 240
        assert image[80:].mean(dim=(0, 1)).tolist() == pytest.approx(
            [6 * i, 40, 240 - 6 * i], abs=4)


def test_names_may_hold_a_colon_or_any_byte(tmp_path, capsys):
    name = "cam:1\udcff" if sys.platform == "linux" else "cam:1"  # macOS wants UTF-8
    root, target = tmp_path / f"a {name}", tmp_path / f"b {name}"
    put(root, {f"clap/{name}.mp4": 30, "clap/2.mp4": 60,
               "splits/clap_test_split1.txt": f"{name}.avi 1 \n2.avi 2 \n"})
    assert run(videos, "lists", "hmdb51", root) == 0
    assert run(videos, "check", root / "train.csv", "--out", tmp_path / name, "--workers", 0) == 0
    assert run(videos, "prepare", root, target, "--workers", 0) == 0
    for place in (root, target, tmp_path / name):
        (path, label), = find_videos(place)[0]
        assert label == 0 and decode(path, lambda n: [[n - 1]])[0].float().mean() < 40
    assert "cam:1" in capsys.readouterr().out  # whose coding is strict, as a terminal's


def test_prepare_keeps_names_and_overwrites_nothing(tmp_path):
    """Of x.avi and x.mp4 each its own; lists find the new names, absolute paths lead to copies."""
    source, target = tmp_path / "a", tmp_path / "b"
    put(source, {"x/1.webm": 30, "bad.mp4": "text", "x.avi": 60, "x.mp4": 200, "list.csv":
                 f"x/1.webm 3\nx.avi 0\nx.mp4 1\n{source.resolve()}/x.mp4 2\n"})
    frames = torch.arange(80)[:, None, None, None].expand(80, 256, 342, 3).byte() * 3
    data.write_video(source / "long.mp4", frames, rate=25)
    assert run(videos, "prepare", source, target, "--workers", 2) == 0
    assert "bad.mp4: " in (target / "bad.txt").read_text()
    with av.open(str(target / "long.mp4")) as container:
        stream, found = container.streams.video[0], list(container.decode(video=0))
        assert (stream.height, stream.width, len(container.streams)) == (256, 342, 1)
    assert [i for i, frame in enumerate(found) if frame.key_frame] == [0, 32, 64]
    assert sum(frame.pict_type == av.video.frame.PictureType.B for frame in found) >= 54
    paths = [path for path, _ in find_videos(target / "list.csv")[0]]
    names = ["x/1.mp4", "x.avi", "x.mp4", "x.mp4"]
    assert paths == [str(target / name) for name in names]
    shades = [decode(path, lambda n: [[n - 1]])[0].float().mean().item()
              for path in [*paths, target / "long.mp4"]]
    assert shades == pytest.approx([30, 60, 200, 200, 237], abs=5)
    put(target, {"x.mp4": "mine", "list.csv": "mine"})
    (target / "x" / "1.mp4").unlink()
    assert run(videos, "prepare", source, target, "--workers", 0) == 0
    assert (target / "x" / "1.mp4").exists()
    assert [(target / name).read_text() for name in ("x.mp4", "list.csv")] == ["mine", "mine"]
    assert run(videos, "prepare", source, source / "x") == 2
    assert run(videos, "prepare", source / "x", source) == 2


def test_prepare_killed_leaves_only_complete_files(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        data.write_video(tmp_path / f"a/{i}.mp4", torch.randint(256, (30, 96, 128, 3)).byte())
    process = subprocess.Popen([sys.executable, videos.__file__, "prepare", tmp_path / "a",
                                tmp_path / "b", "--workers", "0"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("b/*.mp4")):
        with pytest.raises(subprocess.TimeoutExpired):  # it still runs
            process.wait(0.05)
    process.kill()
    process.wait()
    done = list(tmp_path.glob("b/*.mp4"))
    assert len(done) < 4 and all(len(decode(p, lambda n: [range(n)])[0]) == 30 for p in done)
    assert run(videos, "prepare", tmp_path / "a", tmp_path / "b", "--workers", 0) == 0
    assert len(list(tmp_path.glob("b/*.mp4"))) == 4 and not list(tmp_path.glob("b/*.unfinished"))


def test_a_full_disk_or_a_bug_is_no_fault_of_a_video(tmp_path, monkeypatch):
    """The one ends prepare with a sentence, the other with a traceback."""
    def fail(*_):
        raise error

    put(tmp_path / "a", {"1.mp4": 30})
    monkeypatch.setattr(videos, "resize", fail)
    command = (videos, "prepare", tmp_path / "a", tmp_path / "b", "--workers", 0)
    error = OSError(28, "No space left on device")
    assert run(*command) == 1
    error = TypeError("a bug")
    with pytest.raises(TypeError):
        run(*command)


# --- weights.py -----------------------------------------------------------------------------------

HUGGING_FACE = {  # parts of our names and theirs
    "encoder.patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "encoder.blocks": "videomae.encoder.layer", "encoder.norm": "videomae.layernorm",
    "decoder.blocks": "decoder.decoder_layers", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "attn": "attention.attention", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def theirs_of(model, target):
    """A model's weights as the authors' code names them, and as Hugging Face's does."""
    authors, hugging_face = {}, {}
    for name, weight in model.state_dict().items():
        prefix = "encoder." if target == "classes" else ""
        authors[name.removeprefix(prefix).replace("projector.", "head.")] = weight
        if target in ("pixel", "classes") or name.startswith("encoder."):
            for ours, theirs in HUGGING_FACE.items():
                name = name.replace(ours, theirs)
            if target not in ("pixel", "classes"):
                name = name.removeprefix("videomae.")
            parts = ("query", "key", "value") if "qkv" in name else ("",)
            for part, rows in zip(parts, weight.chunk(len(parts))):
                hugging_face[name.replace("qkv", part)] = rows.clone()
    if target == "classes":
        for part in ("weight", "bias"):
            hugging_face[f"classifier.{part}"] = hugging_face.pop(f"head.{part}")
    return authors, hugging_face


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def random_weights(target):
    """A tiny SIGMA, or for "classes" a classifier, with 8 heads."""
    model = build_model("tiny", target="mlp" if target == "classes" else target, heads=8)
    model = Classifier(model.encoder, 5) if target == "classes" else model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def no_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)


@pytest.mark.parametrize("target", ["mlp", "dino", "pixel", "l2", "classes"])
def test_every_layout_gives_the_same_network(target, tmp_path, monkeypatch, no_safetensors):
    """Bit for bit, there and back. Heads come from flags, then from config.json."""
    monkeypatch.chdir(tmp_path)
    model = random_weights(target)
    authors, hugging_face = theirs_of(model, target)
    clip, ours = torch.randn(1, 3, 8, 16, 16), model.state_dict()
    flags = argparse.Namespace(num_frames=8, sampling_rate=2, input_size=32)
    torch.save({"module": authors, "args": flags}, "a.pth")
    torch.save(hugging_face, "b.bin")
    for source, flags in (("a.pth", ["--heads", 8]), ("b.bin", ["--heads", 8]), ("hf-a.pth", [])):
        assert run(weights, "import", source, f"{source}.pt", *flags) == 0
        kept = ours
        if source != "a.pth" and target not in ("pixel", "classes"):
            kept = {name: w for name, w in ours.items() if name.startswith("encoder.")}
        assert same(torch.load(f"{source}.pt", weights_only=True)["model"], kept)
        assert torch.equal(load_encoder(f"{source}.pt")(clip), model.encoder(clip))
        for to in ("authors", "hf"):
            export = ("export", f"{source}.pt", "--to", to, f"{to}-{source}")
            assert [run(weights, *export), run(weights, *export)] == [0, 2]  # not twice
        found = torch.load(f"hf-{source}/pytorch_model.bin", weights_only=True)
        assert same(found, hugging_face)
    assert same(torch.load("authors-a.pth", weights_only=True)["model"], authors)
    clips = torch.load("a.pth.pt", weights_only=True)["args"]
    assert clips == {"frames": 8, "stride": 2, "size": 32}  # from the authors' flags
    del clips["stride"]  # which Hugging Face's don't have
    assert torch.load("hf-a.pth.pt", weights_only=True)["args"] == clips
    if target != "classes":
        assert same(load_model("a.pth.pt").state_dict(), ours)


@pytest.mark.parametrize("name, value", [
    ("hidden_act", "relu"), ("qkv_bias", False), ("qv_bias", False), ("layer_norm_eps", 1e-3),
    ("intermediate_size", 100), ("norm_pix_loss", False), ("image_size", [32, 64]),
    ("tubelet_size", 2), ("num_channels", 1), ("model_type", "vivit")])
def test_another_network_of_hugging_face_s_is_refused(name, value, tmp_path, capsys,
                                                      no_safetensors):
    torch.save({"model": random_weights("pixel").state_dict(), "args": {},
                "sizes": sigma.sizes_for("tiny", "pixel", heads=8)}, tmp_path / "ours.pt")
    assert run(weights, "export", tmp_path / "ours.pt", "--to", "hf", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {name: value}))
    assert run(weights, "import", tmp_path / "hf", tmp_path / "no.pt") == 2
    assert name in capsys.readouterr().err and not (tmp_path / "no.pt").exists()


def test_an_image_processor_prepares_frames_as_we_do(tmp_path, no_safetensors):
    torch.save({"model": random_weights("classes").state_dict(), "args": {"size": 64, "frames": 8},
                "sizes": dict(dim=128, depth=4, heads=8, tube=(4, 8, 8), classes=5)},
               tmp_path / "ours.pt")
    assert run(weights, "export", tmp_path / "ours.pt", "--to", "hf", tmp_path / "hf") == 0
    config, images = (json.loads((tmp_path / "hf" / f"{name}.json").read_text())
                      for name in ("config", "preprocessor_config"))
    assert (config["num_labels"], config["num_frames"], config["use_mean_pooling"]) == (5, 8, True)
    assert images["crop_size"] == {"height": 64, "width": 64} and images["do_rescale"]
    assert images["image_mean"] == list(sigma.IMAGENET_MEAN)


def test_safetensors_are_read_and_written_if_the_package_is_there(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    model = random_weights("pixel")
    torch.save(model.state_dict(), tmp_path / "authors.pth")
    monkeypatch.chdir(tmp_path)
    assert run(weights, "import", "authors.pth", "a.pt", "--heads", 8) == 0
    assert run(weights, "export", "a.pt", "--to", "hf", "folder") == 0
    assert run(weights, "import", "folder/model.safetensors", "b.pt") == 0
    assert same(load_model("b.pt").state_dict(), model.state_dict())


def test_files_that_do_not_fit_stop_and_run_no_code(tmp_path, capsys, no_safetensors):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    whole = build_model("tiny").state_dict()
    _, classifier = theirs_of(Classifier(build_model("tiny").encoder, 5), "classes")
    for content, missing, word in (
            (classifier, "fc_norm.", "mean pooling"), (classifier, "layer.0.layernorm", "norm1"),
            (classifier, "layer.0.attention.attention.key", "query"),
            (classifier | {"extra": torch.zeros(1)}, "-", "extra"),
            (whole, "decoder.head.weight", "decoder.head.weight"),
            (whole, "encoder.norm", "use_mean_pooling"), (whole | {"step": 1}, "-", "theirs.pt"),
            ({}, "-", "theirs.pt"), (whole | {"harm": Harmful()}, "-", "mkdir")):
        torch.save({n: w for n, w in content.items() if missing not in n}, tmp_path / "theirs.pt")
        assert run(weights, "import", tmp_path / "theirs.pt", tmp_path / "ours.pt") == 2
        assert word in capsys.readouterr().err
    for name, word in (("cut.pt", "cut.pt"), ("a.safetensors", "pip install safetensors")):
        (tmp_path / name).write_bytes((tmp_path / "theirs.pt").read_bytes()[:1000])
        assert run(weights, "import", tmp_path / name, tmp_path / "ours.pt") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "harm").exists() and not (tmp_path / "ours.pt").exists()


# --- bench.py -------------------------------------------------------------------------------------

def test_bench_names_the_bottleneck(work, capsys, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work: work() is None or 1)  # once, as if in 1 s
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert run(bench, "--data", "toy", "--batch-size", 8, "--target", "dino-s") == 0
    shown = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["training step"][0] == "8.00" and shown["bottleneck"][0] == "model"
    assert {"teacher", "Sinkhorn", "peak memory", "hours of the recipe"} <= set(shown)


def test_the_check_names_what_fails_and_goes_on(capsys, monkeypatch):
    python = sys.executable
    commands = [("first", [python, "missing.py"]), ("second", [python, "-m", "timeit", "1/0"]),
                ("third", [python, "--version"])]
    monkeypatch.setattr(bench, "parts", lambda: commands)
    assert run(bench, "--check") == 1
    shown, errors = capsys.readouterr()
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["**fails**", "**fails**", "works"]
    assert "missing.py" in rows[0][2] and "division by zero" in rows[1][2]
    assert rows[2][2].startswith("Python 3") and "first, second" in errors
    commands[:2] = []
    assert run(bench, "--check") == 0
    with pytest.raises(RunError, match="not done"):
        bench.apart(["sleep", "60"], "/", 0.1)


@pytest.fixture
def part(monkeypatch):
    """Runs a part of the check in this process, without the time limit that would end it."""
    monkeypatch.setattr(bench.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(bench.run, "LOG_STEPS", bench.run.LOG_STEPS)  # put back afterwards
    return lambda *flags: run(bench, "--part", *flags)


def test_the_check_only_runs_commands_that_there_are(part, monkeypatch):
    monkeypatch.setattr(bench, "PARTS", dict.fromkeys(bench.PARTS, lambda args: None))
    for _, command in bench.parts():
        assert part(*command[command.index("--part") + 1:]) == 0


def test_the_check_compares_losses(part, work, capsys):
    """The first with that of the CPU, and the last of a resumed run with that of a whole one."""
    assert part("toy", "--amp", "off", "--max-steps", 1, "--out", "cpu-mlp") == 0
    for kind, out in (("toy", "toy-bf16"), ("stop", "check-stopped"), ("resume", "check-stopped")):
        assert part(kind, "--amp", "bf16", "--max-steps", 8, "--out", out) == 0
    for kind, out, like, step in (("resume", "check-stopped", "toy-bf16", 8),
                                  ("toy", "check-again", "cpu-mlp", 1)):
        Path(like, "log.jsonl").write_text(json.dumps(dict(step=step, loss=20)))
        assert part(kind, "--amp", "bf16", "--max-steps", 8, "--out", out) == 1
        assert f"{like} 20.0" in capsys.readouterr().err


def test_the_check_compares_sinkhorn(part, monkeypatch):
    assert part("sinkhorn") == 0
    monkeypatch.setattr(bench, "sinkhorn", lambda scores, eps, hard=False: sigma.sinkhorn(
        scores, eps if scores.dtype == torch.float64 else 1.1 * eps, hard=hard))
    assert part("sinkhorn") == 1


def test_the_check_takes_as_many_clips_as_fit(part, monkeypatch, capsys):
    def measure(args, name, batch):
        if batch > most:
            raise torch.OutOfMemoryError
        return dict.fromkeys(("rate", "share", "product", "sinkhorn", "loss", "peak"), 1.0)

    monkeypatch.setattr(bench, "measure", measure)
    for most, code in ((12, 0), (0, 1)):
        assert part("speed", "--model", "large", "--batch-size", 40) == code
    assert "10 at a time (40 don't fit)" in capsys.readouterr().out


# --- pictures.py ----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 64])  # finer than tubes in the small one
def test_painting_puts_each_tube_at_its_place(tmp_path, size):
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (8, size, size)), indexing="ij")
    video, tube = (8 * t + y / 4 + 128 / size * x).expand(1, 3, -1, -1, -1), (4, 8, 8)
    maps = pictures.slide(video, tube, lambda x: sigma.take_tubes(x, tube).mean(dim=(3, 4, 5)))
    film = pictures.paint(tmp_path / "a.png", video, maps)[:, 16:-16].float()
    error = (film[:, :, 16:112] - film[:, :, 144:240]).abs().mean(dim=(1, 2, 3))
    assert error[2:6].max() < 6 if size == 32 else error.max() < 20


def test_the_framed_tube_is_at_its_place():
    video = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
    video[:, 7, 8:16, 16:24] = 99  # the last frame of the tube in slice 1, row 1, column 2
    image = pictures.frame_tube(video, torch.tensor(16 + 4 + 2), (4, 8, 8))[0]
    rows, columns = (image == 255).nonzero().float().mean(dim=0).tolist()
    assert (rows, columns) == pytest.approx((48, 80), abs=1)
    assert not image[128:, :64].any() and (image[128:, 64:] == 99).all()


def test_pictures_and_a_film_that_plays_are_written(work):
    """Models with pixel and l2 targets have no prototypes to show."""
    for target in ("pixel", "l2", "mlp"):
        assert run(train, "--target", target, "--max-steps", 1, "--out", target) == 0
        assert run(pictures, target, "--split", "val", "--out", f"{target}-shown") == 0
        names = {path.name for path in Path(f"{target}-shown").iterdir()}
        more = {"prototypes.png", "clusters.png", "clusters.mp4"} if target == "mlp" else set()
        assert names == {"masks.png", "components.png"} | more
    assert decode("mlp-shown/clusters.mp4", lambda n: [range(n)])[0].shape == (8, 3, 512, 256)


def test_curves_of_runs_are_drawn_where_their_logs_say(tmp_path):
    """Both runs in both panels; what is 10 times as small is one decade lower."""
    for name, factor in (("a&b", 1), ("c", 0.1)):
        (tmp_path / name).mkdir()
        lines = [dict(step=step, loss=factor * 10 / step, video_std=factor, target_std=2 * factor)
                 for step in (1, 10, 100)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs, out = [tmp_path / "a&b", tmp_path / "c"], tmp_path / "curves.svg"
    assert run(pictures, "--curves", *runs, "--out", out) == 0
    lines = [[[float(x) for x in point.split(",")] for point in line.get("points").split()]
             for line in ElementTree.parse(out).iter() if line.tag.endswith("polyline")]
    first, second, *spreads = lines
    assert len(lines) == 6 and all(len(line) == 3 for line in lines)
    decade = first[1][1] - first[0][1]
    assert first[2][1] - first[1][1] == pytest.approx(decade, abs=0.2)
    assert second[0][1] - first[0][1] == pytest.approx(decade, abs=0.2)
    assert first[2][0] == pytest.approx(100 * first[0][0], rel=0.02)
    assert spreads[0][0][1] == spreads[0][2][1] < spreads[2][0][1]
    (tmp_path / "c" / "log.jsonl").write_text('{"step": 1, "loss": 1}')
    assert run(pictures, "--curves", *runs) == run(pictures, "run", "--curves", runs[0]) == 2


# --- motion.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("right", [0, 1])
def test_visible_places_pan_with_the_picture(right):
    """By one tube a slice; those that leave are replaced. Without motion it is the tube mask."""
    grid = t, h, w = 6, 8, 10
    pan = torch.tensor([0.0, right]).expand(t, h, w, 2)
    mask, again = (motion.motion_mask(pan, grid, 0.7, data.seeded(0)) for _ in range(2))
    assert torch.equal(mask, again)
    assert torch.equal(mask, tube_mask(1, grid, 0.7, data.seeded(0))[0]) == (right == 0)
    visible = ~mask.view(grid)
    for before, now in zip(visible[:-1, :, :w - right], visible[1:, :, right:]):
        assert (now >= before).all() or (before >= now).all()  # followed onwards or backwards
    busy = motion.motion_mask(2 * torch.randn(t, h, w, 2), grid, 0.7)  # places leave, or meet
    for found in (mask, busy):
        assert (found.view(t, h * w).sum(dim=1) == int(0.7 * 80)).all()


PREPARED = {"preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32", "bf": "3",
            "x264-params": "b-pyramid=none:b-adapt=0:scenecut=0"}  # as extras/videos.py does it


def write_pan(path, right=3, still=0, codec="libx264", options=PREPARED):
    """Forty frames of a window that pans over a picture. still: columns at the left that don't."""
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=data.seeded(0)), (480, 640),
                            mode="bicubic")[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        for i in range(40):
            frame = picture[2 * i:2 * i + 240, right * i:right * i + 320].clone()
            frame[:, :still] = picture[:240, :still]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name, codec, options", [
    ("prepared.mp4", "libx264", PREPARED), ("b.avi", "libx264", PREPARED),
    ("default.mp4", "libx264", {}), ("mpeg4.avi", "mpeg4", {"bf": "2", "b": "2M"})])
def test_vectors_of_a_known_pan_are_right_nine_times_of_ten(tmp_path, name, codec, options):
    """Within half a pixel a frame; the content moves against the window."""
    watch = motion.Watch()
    write_pan(tmp_path / name, codec=codec, options=options)
    for _ in range(2):  # decode may have to start again
        decode(tmp_path / name, lambda n: [range(0, 32, 2)], watch=watch)
    starts = [start for start, *_ in watch.fields]
    assert starts == sorted(set(starts))
    vectors = torch.cat([field[field.isfinite().all(dim=2)] for *_, field in watch.fields])
    right = ((vectors - torch.tensor([-2.0, -3.0])).abs() <= 0.5).all(dim=1)
    assert len(vectors) > 5000 and right.float().mean() > 0.9


@pytest.mark.parametrize("turns", range(4))
def test_vectors_tell_where_each_pixel_of_the_upright_frame_comes_from(tmp_path, turns):
    """However the file is turned. A part stands still, so that directions and places count."""
    watch, path = motion.Watch(), tmp_path / "v.mp4"
    write_pan(path, still=80)
    turn(path, turns)
    frames = decode(path, lambda n: [range(8)], watch=watch)[0].float().mean(dim=1)
    field = torch.stack([field for *_, field in watch.fields]).nanmedian(dim=0).values.nan_to_num()
    down, right = field.round().long().repeat_interleave(8, 0).repeat_interleave(8, 1).unbind(2)
    y, x = torch.meshgrid(*map(torch.arange, frames.shape[1:]), indexing="ij")
    inner = (y.minimum(x) >= 8) & (y < len(y) - 8) & (x < y.shape[1] - 8)
    y, x, down, right = (values[inner] for values in (y, x, down, right))
    before, now = frames[:-1, y - down, x - right], frames[1:, y, x]
    assert (before - now).abs().mean() < 0.3 * (frames[:-1, y, x] - now).abs().mean()


def test_crop_and_resize_transform_the_motion():
    def moved(field, *box):  # from frame 0 to frame 2
        return motion.displacements([(0.0, 2.0, field)], [0, 2], box, (2, 15, 20))[1]

    field = torch.tensor([4.0, -8.0]).repeat(30, 40, 1)  # pixels a frame, of 240 x 320
    whole = moved(field, 0, 0, 240, 320)
    assert torch.allclose(whole, torch.tensor([0.5, -1.0]).expand(15, 20, 2))
    assert torch.allclose(moved(field, 60, 80, 120, 160), 2 * whole)  # enlarged twice
    field[:, 20:] = torch.nan
    assert not moved(field, 0, 160, 240, 160).any()  # where all is missing


def test_motion_clips_are_the_same_in_any_worker(tmp_path):
    """Their frames are those of plain Clips, who may have decoded a kept video before."""
    for i in range(3):
        write_pan(tmp_path / f"{i}.mp4", right=i)
    videos, keys, cache = find_videos(tmp_path)[0], [(0, 0), (1, 1), (2, 2), (3, 2)], {}
    options = dict(frames=16, stride=2, size=64, tube=(2, 8, 8), ratio=0.75)
    plain = data.Clips(videos, **options, cache=cache)
    clips, kept = (motion.MotionClips(videos, **options, cache=some)
                   for some in (None, cache))
    still, alone, shared, again, third = (
        next(iter(torch.utils.data.DataLoader(some, 4, sampler=keys, num_workers=workers,
                                              collate_fn=data.collate)))[:2]
        for some, workers in ((plain, 0), (clips, 0), (clips, 2), (kept, 0), (kept, 0)))
    assert all(torch.equal(video, still[0]) for video, _ in (alone, shared, again, third))
    assert all(torch.equal(mask, alone[1]) for _, mask in (shared, again, third))
    assert not torch.equal(alone[1], still[1])


def test_training_with_motion_masks_resumes_exactly(work, capsys):
    flags = ["--epochs", "2", "--batch-size", "16", "--accum", "1", "--out"]
    assert run(motion, "train", *flags, "moved") == 0
    assert run(motion, "train", *flags, "stopped", "--max-steps", 3) == 0
    assert run(train, *flags, "stopped") == 2  # would go on with other masks
    assert run(motion, "train", *flags, "stopped") == 0
    whole, parts = weights_of("moved"), weights_of("stopped")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "follow motion" in capsys.readouterr().out
    assert run(motion, "--out", "motion.png") == 0 and Path("motion.png").exists()


def test_a_set_without_vectors_goes_on_with_tube_masks(tmp_path):
    save_image(torch.rand(3, 32, 32), tmp_path / "a.png")
    clips = motion.motion_clips(find_videos(tmp_path)[0], frames=2, stride=1, size=32)
    assert type(clips) is data.Clips
    assert run(motion, "--data", tmp_path) == 2


# --- segment.py -----------------------------------------------------------------------------------

def write_png(path, rows, form):
    """A PNG of (H, W) numbers, "gray" or with a palette, "pal8"."""
    image, palette = rows.byte().numpy(), torch.arange(1024).byte().view(256, 4).numpy()
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *rows.shape, form
        content = (image, palette) if form == "pal8" else image
        container.mux(stream.encode(av.VideoFrame.from_ndarray(content, format=form)))
        container.mux(stream.encode(None))


SQUARES = torch.zeros(48, 48, dtype=torch.long)  # three segments: 0, and two rectangles
SQUARES[:24, :24], SQUARES[24:, 16:] = 1, 2


def test_annotations_are_read_as_indices_not_colours(tmp_path):
    void = torch.where(torch.arange(48 * 48).view(48, 48) == 47, 255, SQUARES)
    write_png(tmp_path / "palette.png", void, "pal8")
    write_png(tmp_path / "grey.png", (SQUARES == 1) * 255, "gray")
    assert torch.equal(segment.read_mask(tmp_path / "palette.png"), SQUARES)
    assert torch.equal(segment.read_mask(tmp_path / "grey.png"), (SQUARES == 1).long())
    save_image(torch.rand(3, 8, 8), tmp_path / "colours.png")
    with pytest.raises(UserError, match="colours"):
        segment.read_mask(tmp_path / "colours.png")


def test_tokens_that_know_their_segment_give_100_percent():
    true = SQUARES.expand(2, 48, 48)
    tokens = F.one_hot(true[:, ::8, ::8], 16).float()  # a token for 8 x 8 pixels
    tokens += 0.2 * torch.randn(tokens.shape, generator=data.seeded(0))
    found = segment.maps(tokens, 3, argparse.Namespace(restarts=5, size=48), data.seeded(0))
    found = found[:, 4::8, 4::8].repeat_interleave(8, 1).repeat_interleave(8, 2)
    for order in ([0, 1, 2], [2, 0, 1]):  # the numbers mean nothing
        renamed = torch.tensor(order)[true]
        assert torch.equal(segment.clustering(found, renamed, 3), renamed)


def test_a_small_example_by_hand():
    true = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = segment.clustering(torch.tensor([1, 1, 1, 2, 2, 2, 0, 2]), true, 3)
    _, ious = segment.compare(found, true, 3, 3)
    assert ious.diagonal().tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 2])
    over = torch.tensor([3, 3, 4, 4, 0, 1, 2, 2])
    assert torch.equal(segment.overclustering(over, true, 5, 3), true)
    greedy = torch.tensor([[0.9, 0.8], [0.8, 0.0]])  # the best pair alone is not the best sum
    assert segment.match(greedy) == [1, 0]


def test_videos_of_any_length_and_missing_segments(tmp_path, work):
    """One object leaves; frames without annotation; two processes give what one gives."""
    for video, length in (("a", 3), ("b", 9)):
        folders = [tmp_path / kind / "480p" / video for kind in ("JPEGImages", "Annotations")]
        for i in range(length):
            rows = torch.where((SQUARES == 2) & torch.tensor(i > 3), 0, SQUARES)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            save_image(0.2 + 0.3 * rows.float().expand(3, -1, -1), folders[0] / f"{i:05}.jpg")
            if i % 4 != 3:
                write_png(folders[1] / f"{i:05}.png", rows, "pal8")
    flags = ["--root", tmp_path, "--model", "tiny", "--frames", 4, "--size", 32, "--out"]
    assert run(segment, *flags, tmp_path / "one", "--pictures") == 0
    one = results_of(tmp_path / "one")
    assert set(one["videos"]) == {"a", "b"} and 0 < one["clustering"][0] <= 1
    assert decode(tmp_path / "one" / "b.mp4", lambda n: [[0]])[0].shape[-2:] == (32, 128)
    assert two_processes(segment, *flags, tmp_path / "two").count("mIoU") == 2
    assert results_of(tmp_path / "two")["videos"] == one["videos"]
    assert run(segment, "--root", tmp_path / "one") == 2
    assert run(segment, *flags[:2], "--init", "run", "--out", tmp_path / "run") == 0
    trained = results_of(tmp_path / "run")["args"]  # clips like those of the run
    assert (trained["frames"], trained["size"]) == (8, 32)
