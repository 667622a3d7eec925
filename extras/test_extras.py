"""What the scripts in extras/ must do, as short tests: python -m pytest -q."""
import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import sys
from fractions import Fraction
from itertools import islice, permutations
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import av
import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.utils import save_image

# Before the others, since it hides GPUs; two of these are fixtures.
from test_sigma import (here, in_two_processes, read_json, run, saved, start_apart, turn,
                        where_a_test_works)

import data
import sigma
import train
from data import decode, find_videos, normalise
from extras import (augment, bench, check, clusters, curves, features, finetune, motion, pictures,
                    reader, segment, step, videos, weights, windows)
from extras import sinkhorn as sinkhorn_script
from extras import toy as toy_set
from extras.finetune import Classifier
from extras.reader import VideoError
from extras.run import RunError, launch, loader
from sigma import Encoder, UserError, build_model, load_encoder, load_model, tube_mask


NOISE = torch.randint(256, (40, 48, 64, 3))  # the frames of a video
WINDOWS = ["--init", "run", "--data", "set", "--window", 8, "--stride", 2, "--step", 4, "--out"]


def put(files, root="."):
    """Writes texts by name, or tiny videos: None, or a shade of grey."""
    for path, content in ((Path(root, name), content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_bytes(os.fsencode(content))
        else:
            toy_set.write_video("v.mp4", torch.full((8, 32, 32, 3), content or 0).byte())
            os.rename("v.mp4", path)


def put_greys(number, bad=None):
    """Videos in set/, 0.mp4 and so on, lighter from one to the next; `bad` can't be read."""
    put({f"{i}.mp4": "no video" if i == bad else 20 * i for i in range(number)}, "set")


def put_lists(label_of):
    """Eleven videos in set/ to test on, one of them unreadable; the first five are to train on."""
    put_greys(11, bad=6)
    lines = [f"{i}.mp4 {label_of(i)}\n" for i in range(11)]
    put({"train.csv": "".join(lines[:5]), "val.csv": "".join(lines)}, "set")


def write_frames(path, images, times=None, tick=40, codec="libx264", options=None, **file_options):
    """A video of images (T, H, W, 3), in BT.709, full range. times: when each is shown, in ticks of
    so many milliseconds."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w", options=file_options) as container:
        tick = Fraction(tick, 1000)
        stream = container.add_stream(codec, rate=1 / tick, options=options)
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.time_base, context.colorspace, context.color_range = tick, 1, 2
        for image, time in zip(images.byte().numpy(), times or range(len(images))):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=2,
                                   threads=1)  # those of more would hang a later fork
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def feature_at(start):
    """The feature of a plain clip of set/v.mp4, cropped as everywhere."""
    clip, = decode("set/v.mp4", lambda n: [[min(start + 2 * i, n - 1) for i in range(8)]])
    clip = data.resize_crop(clip, data.centre_crop(*clip.shape[-2:]), 32)
    return load_encoder("run")(normalise(clip[None], "cpu")).mean(dim=1)[0]


class TestFeatures:
    def test_features_come_in_list_order_for_readable_videos(self, here, capsys):
        """Of the centre clip, which here is the whole video: the mean over its tokens, or these."""
        put_greys(6, bad=4)
        put({"list.csv": "".join(f"{i}.mp4 {i}\n" for i in (5, 2, 4, 0))}, "set")
        flags = ["--init", "run", "--data", "set/list.csv", "--out"]
        assert run(features, *flags, "out") == 0 and "4.mp4" in capsys.readouterr().out
        assert run(features, *flags, "tokens", "--tokens") == 0
        tokens, pooled = saved("tokens/features.pt"), saved("out/features.pt")
        assert pooled["paths"] == ["set/5.mp4", "set/2.mp4", "set/0.mp4"]
        assert pooled["labels"].tolist() == [5, 2, 0]
        clips = torch.stack([decode(path, lambda n: [range(n)])[0] for path in pooled["paths"]])
        wanted = load_encoder("run")(normalise(clips.transpose(1, 2), "cpu"))
        assert torch.allclose(tokens["features"], wanted, atol=1e-4)
        assert torch.allclose(pooled["features"], wanted.mean(dim=1), atol=1e-4)

    def test_features_are_not_overwritten(self, here):
        put({"features.pt": "mine"}, "out")
        assert run(features, "--init", "run", "--data", "toy", "--out", "out") == 2
        assert Path("out/features.pt").read_text() == "mine"

    def test_a_long_video_s_features_are_those_of_its_middle(self, here):
        write_frames("set/v.mp4", NOISE)
        assert run(features, "--init", "run", "--data", "set", "--stride", 2, "--out", "out") == 0
        assert torch.allclose(saved("out/features.pt")["features"][0], feature_at(12), atol=1e-4)

    def test_k_nn_compares_with_training_videos(self, here):
        """They say here the contrary of what the test set says of the same videos."""
        put({"dark.mp4": 20, "light.mp4": 200, "train.csv": "dark.mp4 0\nlight.mp4 1\n",
             "val.csv": "dark.mp4 1\nlight.mp4 0\n"}, "set")
        assert run(features, "--init", "run", "--data", "set", "--knn", "--out", "out") == 0
        assert read_json("out")["knn"] == 0

    def test_k_nn_without_labels_is_refused(self, here):
        put({"a/0.mp4": 0}, "set")
        assert run(features, "--init", "run", "--data", "set/a", "--knn") == 2

    def test_features_of_a_fine_tuned_network_are_those_that_its_head_gets(self, here):
        """After fc_norm: of videos, and of windows."""
        put({"v.mp4": 90}, "set")
        content = saved("run/last.pt")
        model = Classifier(load_encoder("run"), 5).eval()
        nn.init.normal_(model.fc_norm.weight)
        nn.init.normal_(model.fc_norm.bias)
        torch.save(content | {"model": model.state_dict()}, "tuned.pt")
        flags = ["--init", "tuned.pt", "--data", "set", "--out"]
        assert run(features, *flags, "f") == run(windows, *flags, "w", "--window", 8) == 0
        clip, = decode("set/v.mp4", lambda n: [range(8)])
        model.head = nn.Identity()
        wanted = model(normalise(clip.transpose(0, 1)[None], "cpu"))
        for found in (saved("f/features.pt")["features"], numpy.load("w/v.npy")):
            assert torch.allclose(torch.as_tensor(found), wanted, atol=1e-4)

    def test_the_old_flag_names_the_new_script(self, here, capsys):
        assert run(features, *WINDOWS, "out") == 2
        assert capsys.readouterr().err.strip().endswith("python extras/windows.py")

    def test_a_checkpoint_without_flags_gives_features_too(self, here):
        put_greys(2)
        content = saved("run/last.pt")
        del content["args"]
        torch.save(content, "bare.pt")
        clip = ["--frames", 8, "--stride", 1, "--size", 32]
        assert run(features, "--init", "bare.pt", "--data", "set", *clip, "--out", "out") == 0

    def test_features_that_are_not_finite_are_not_written(self, here, capsys):
        """Neither of videos nor of windows."""
        put_greys(2)
        content = saved("run/last.pt")
        content["model"]["encoder.norm.bias"][0] = torch.nan
        torch.save(content, "nan.pt")
        assert run(features, "--init", "nan.pt", "--data", "set", "--out", "out") == 1
        assert run(windows, "--init", "nan.pt", "--data", "set", "--window", 8, "--out", "w") == 1
        assert capsys.readouterr().err.count("not finite") == 2
        assert not list(Path(".").glob("*/*.npy")) and not Path("out/features.pt").exists()

    def test_test_videos_that_are_missing_are_counted(self, here):
        """k-NN and a fine-tuned accuracy say of how many videos of how many named they are."""
        put_greys(6)
        lines = "".join(f"{i}.mp4 {i % 2}\n" for i in range(6))
        put({"train.csv": lines, "val.csv": lines + "gone.mp4 1\nlost.mp4 0\n"}, "set")
        for script, more in ((features, ["--knn"]), (finetune, ["--freeze", "--epochs", 1])):
            out = script.__name__.split(".")[-1]
            assert run(script, "--init", "run", "--data", "set", *more, "--out", out) == 0
            results = read_json(out)
            assert (results["videos"], results["named"], results["missing"]) == (6, 8, 2)
            assert "gone.mp4" in results["first_missing"]

    def test_windows_count_what_was_listed_and_not_what_lies_beside(self, here):
        put({"a/1.mp4": None, "a/notes.txt": "", "2.mp4": None}, "set")  # 2 is in no class folder
        assert run(windows, "--init", "run", "--data", "set", "--window", 8, "--out", "out") == 0
        found = read_json("out", "windows.json")
        assert found["missing"] == 1 and found["first_missing"].startswith("set/2.mp4")


class TestWindows:
    @pytest.mark.parametrize("times, rows", [
        (range(0, 160, 4), 7), (range(0, 40, 4), 1), ([i * i for i in range(40)], 7)])
    def test_windows_have_the_features_of_plain_clips(self, times, rows, here, monkeypatch):
        """At a constant rate, in a short video, at a varying rate; each frame is decoded once."""
        decoded, all_frames = [], windows.all_frames
        monkeypatch.setattr(windows, "all_frames", lambda path: (
            decoded.append(frame) or frame for frame in all_frames(path)))
        monkeypatch.delattr(windows, "decode")
        write_frames("set/v.mp4", NOISE[:len(times)], times, tick=10)
        assert run(windows, *WINDOWS, "out") == 0 and len(decoded) == len(times)
        found = torch.from_numpy(numpy.load("out/v.npy"))
        facts = read_json("out", "windows.json")["videos"]["v"]
        assert found.shape == (rows, 128) and found.dtype == torch.float32
        wanted = torch.stack([feature_at(4 * row) for row in range(rows)])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert facts | dict(frames=len(times), feature_stride=4, window_span=16) == facts
        assert facts["fps"] == pytest.approx(100 * (len(times) - 1) / times[-1])

    def test_an_unreadable_window_keeps_its_row(self, here, monkeypatch, capsys):
        """The nearest one stands in, so that later rows keep their times."""
        def all_frames(path):
            yield from islice(reader.all_frames(path), 20)
            raise VideoError("damage")

        def decode_unless_damaged(path, choose):
            if {20, 21}.intersection(*choose(40)):
                raise VideoError("damage")
            return decode(path, choose)

        write_frames("set/v.mp4", NOISE)
        monkeypatch.setattr(windows, "all_frames", all_frames)
        monkeypatch.setattr(windows, "decode", decode_unless_damaged)
        assert run(windows, *WINDOWS, "out") == 0
        found = torch.from_numpy(numpy.load("out/v.npy"))
        facts = read_json("out", "windows.json")["videos"]["v"]
        assert facts["unreadable"] == [2, 3, 4, 5] and "v.mp4: 4 of 7" in capsys.readouterr().out
        assert torch.equal(found[2:4], found[[1, 1]]) and torch.equal(found[4:6], found[[6, 6]])
        assert torch.allclose(found[6], feature_at(24), atol=1e-5)

    def test_windows_resume_and_name_what_is_unreadable(self, here, capsys):
        put_greys(3, bad=1)
        assert run(windows, *WINDOWS, "out") == 0 and "1.mp4" in capsys.readouterr().out
        before = os.stat("out/0.npy").st_mtime_ns
        os.remove("out/2.npy")
        assert run(windows, *WINDOWS, "out") == 0
        assert Path("out/2.npy").exists() and os.stat("out/0.npy").st_mtime_ns == before

    def test_windows_of_other_settings_or_of_unknown_ones_are_not_mixed(self, here):
        put_greys(1)
        assert run(windows, *WINDOWS, "out") == 0
        assert run(windows, *WINDOWS, "out", "--step", 8) == 2
        os.remove("out/windows.json")
        assert run(windows, *WINDOWS, "out") == 2

    def test_videos_of_one_name_are_refused(self, here, capsys):
        put({"a/0.mp4": 0, "b/0.mp4": 0}, "set")
        assert run(windows, *WINDOWS, "out") == 2
        shown = capsys.readouterr().err
        assert "a/0.mp4" in shown and "b/0.mp4" in shown

    def test_two_processes_write_the_windows_that_one_writes(self, here):
        put_greys(5, bad=2)
        assert run(windows, *WINDOWS, "one", "--workers", 2) == 0
        assert "2.mp4" in in_two_processes(windows.main, *WINDOWS, "two")
        files = [path for path in Path("one").iterdir() if path.suffix]
        assert len(files) == 5
        for path in files:
            assert path.read_bytes() == Path("two", path.name).read_bytes()



@pytest.fixture
def prepared(here, monkeypatch):
    """A function that starts finetune.py with flags and returns what it would train. It does not:
    the model gives `outputs` of a video instead, if there are any, and is then tested."""
    def prepare(*flags, outputs=None):
        given = SimpleNamespace()

        def fit(args, model, optimizer, clips, loss_of, **_):
            given.model, given.clips, given.loss_of = model, clips, loss_of
            Path(args.out).mkdir(exist_ok=True)
            given.modes = []
            if outputs:
                model.forward = lambda video: given.modes.append(model.training) or outputs(video)
            return outputs is not None
        monkeypatch.setattr(finetune, "fit", fit)
        assert run(finetune, "--init", "run", "--out", "out", *flags) == 0
        return given
    return prepare


@pytest.fixture
def unmixed(monkeypatch):
    """Clips are not mixed with each other; torch's random numbers start anew."""
    for name in ("MixUp", "CutMix"):
        monkeypatch.setattr(v2, name, lambda **_: lambda video, labels: (video, labels))
    torch.manual_seed(0)


class TestFineTuning:
    def test_a_head_starts_near_zero(self):
        head = Classifier(Encoder(dim=32, depth=1, heads=2), 5).head
        assert 0 < head.weight.abs().max() < 1e-4 and not head.bias.any()

    def test_drop_path_skips_a_clip_or_scales_it_up(self):
        """All its tokens alike, so that the mean stays."""
        encoder = Encoder(dim=32, depth=2, heads=2)
        Classifier(encoder, 5, 0.25)
        last, x = encoder.blocks[1].attn.double(), torch.randn(1, 3, 32).double()
        kept = (last(x.expand(4000, -1, -1)) / last.eval()(x)).flatten(1)
        assert set(kept[:, 0].round(decimals=6).tolist()) == {0, round(1 / 0.75, 6)}
        assert torch.allclose(kept, kept[:, :1]) and 0.95 < kept.mean() < 1.05

    def test_a_classifier_norms_the_mean_of_all_tokens(self):
        """The encoder's own last norm is left out."""
        encoder = Encoder(dim=32, depth=2, heads=2, tube=(2, 8, 8))
        nn.init.normal_(encoder.norm.weight)
        model, video = Classifier(encoder, 5).eval(), torch.randn(2, 3, 4, 32, 32)
        tokens = encoder.patch_embed(sigma.take_tubes(video, (2, 8, 8))) + sigma.positions(32, 32)
        pooled = F.layer_norm(encoder.blocks(tokens).mean(dim=1), (32,), eps=1e-6)
        assert torch.allclose(model(video), pooled @ model.head.weight.T, atol=1e-6)

    def test_groups_by_name_have_the_published_rates_and_decay(self):
        model = Classifier(Encoder(dim=32, depth=2, heads=2, tube=(2, 8, 8)), 5)
        optimizer, names = finetune.make_optimizer(model), {p: n for n, p in
                                                            model.named_parameters()}
        found = {names[p]: (group["scale"], group["weight_decay"])
                 for group in optimizer.param_groups for p in group["params"]}
        wanted = {"fc_norm.weight": (1, 0), "fc_norm.bias": (1, 0), "head.weight": (1, 0.05),
                  "head.bias": (1, 0), "encoder.patch_embed.proj.weight": (0.75 ** 3, 0.05),
                  "encoder.patch_embed.proj.bias": (0.75 ** 3, 0)}
        for i, scale in enumerate((0.75 ** 2, 0.75)):
            wanted |= {f"encoder.blocks.{i}.{name}": (scale, 0.05) for name in (
                "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")}
            wanted |= {f"encoder.blocks.{i}.{name}": (scale, 0) for name in (
                "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias",
                "attn.v_bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias")}
        assert found == wanted
        assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)

    @pytest.mark.parametrize("flags, largest", [([], 0.1), (["--freeze"], 0)])
    def test_drop_path_grows_linearly_over_the_blocks_to_a_tenth(self, flags, largest, prepared):
        """It skips halves of blocks, for some clips; a probe has none."""
        blocks, clips = prepared(*flags).model.train().encoder.blocks, torch.randn(8000, 1, 128)
        for i, block in enumerate(blocks):
            for half in (block.attn, block.mlp):
                skipped = (half(clips) == 0).flatten(1).all(dim=1).float().mean()
                assert skipped == pytest.approx(largest * i / (len(blocks) - 1), abs=0.015)

    @pytest.mark.parametrize("lines, flags, score", [
        ("a.png 1\nb.png 1\n", [], "top1"), ("a.png\nb.png 0\n", ["--multi-label"], "mAP")],
        ids=["one label", "several"])
    def test_probabilities_of_a_video_s_views_are_averaged(self, lines, flags, score, prepared):
        """Not logits, in which one view of three that is very sure would outweigh the others."""
        picture = torch.zeros(3, 8, 24)
        picture[:, :, 16:] = 1  # the last of three crops
        Path("set").mkdir()
        save_image(picture, "set/a.png")
        save_image(torch.full_like(picture, 0.5), "set/b.png")
        put({"train.csv": "a.png 0\na.png 1\n", "val.csv": lines}, "set")
        logits = torch.tensor([[-5.0, 5], [0, 10], [100, 0]])  # of a dark, a grey, a bright view

        def outputs(video):
            brightness = video.mean(dim=(1, 2, 3, 4))
            return logits[(brightness > -1).long() + (brightness > 1)]
        prepared("--data", "set", "--size", 8, "--views", 1, 3, *flags, outputs=outputs)
        assert read_json("out")[score] == 1

    def test_nothing_is_dropped_where_a_network_is_tested(self, prepared):
        given = prepared(outputs=lambda video: torch.zeros(len(video), 8))
        assert given.modes and not any(given.modes)

    def test_a_video_that_cannot_be_read_counts_as_wrong(self, prepared):
        put_lists(lambda i: 0)
        prepared("--data", "set", outputs=lambda video: torch.eye(2)[:1].expand(len(video), -1))
        assert read_json("out")["top1"] == pytest.approx(10 / 11)

    @pytest.mark.parametrize("amp", ["bf16", "off"])
    def test_training_and_testing_take_the_precision_of_amp(self, amp, prepared):
        found = []

        def outputs(video):
            found.append(torch.is_autocast_enabled("cpu"))
            return torch.zeros(len(video), 8)
        prepared("--amp", amp, outputs=outputs).loss_of(outputs, data.Batch(
            torch.zeros(1, 3, 2, 8, 8).byte(), None, torch.tensor([0]), None, {}))
        assert len(found) > 1 and set(found) == {amp == "bf16"}

    @pytest.mark.parametrize("dim, calls", [(1024, 2), (768, 1)])
    def test_blocks_as_wide_as_large_s_are_computed_again_for_their_gradient(
            self, dim, calls, prepared):
        sizes, counted = dict(dim=dim, depth=1, heads=16, tube=(4, 8, 8)), []
        weights = nn.ModuleDict({"encoder": Encoder(**sizes)}).state_dict()
        torch.save({"model": weights, "sizes": sizes}, "wide.pt")
        model = prepared("--init", "wide.pt", "--frames", 8, "--size", 32).model
        model.encoder.blocks[0].norm1.register_forward_hook(lambda *_: counted.append(1))
        model(torch.randn(1, 3, 8, 16, 16)).sum().backward()
        assert len(counted) == calls

    @pytest.mark.parametrize("sampling, frames", [
        ("dense", augment.dense_frames), ("segments", augment.segment_frames)])
    def test_clips_have_the_frames_of_sampling_and_random_crops(
            self, sampling, frames, prepared, monkeypatch):
        monkeypatch.setitem(finetune.RECIPES["toy"], "augment", True)
        for flags, crop in (([], augment.random_crop), (["--no-augment"], data.centre_crop)):
            clips = prepared("--sampling", sampling, *flags).clips
            assert (clips.choose, clips.crop) == (frames, crop)

    @pytest.mark.parametrize("n", [5, 10, 16, 40, 100])
    def test_segments_are_equal_parts_and_any_frame_of_one_may_be_drawn(self, n):
        """Where there are fewer frames than segments, the frame at a segment's start is taken."""
        drawn = zip(*(augment.segment_frames(n, 16, 2, data.seeded(i)) for i in range(200)))
        part = n // 16
        for i, frames in enumerate(drawn):
            assert set(frames) == (set(range(i * part, (i + 1) * part)) or {i * n // 16})

    def test_a_dense_window_may_start_anywhere(self):
        starts = {augment.dense_frames(70, 16, 4, data.seeded(i))[0] for i in range(100)}
        assert starts == set(range(6))

    @pytest.mark.parametrize("sampling", ["dense", "segments"])
    def test_a_video_is_tested_on_the_frames_of_its_sampling(self, sampling, prepared):
        shades = torch.arange(16) * 15
        write_frames("set/v.mp4", shades[:, None, None, None].expand(16, 32, 32, 3))
        put({"list.csv": "v.mp4 0\n"}, "set")
        found = []

        def outputs(video):
            found.append((video * 0.225 + 0.45).mean(dim=(1, 3, 4))[0] * 255)  # about
            return torch.zeros(1, 2)
        prepared("--data", "set/list.csv", "--val", "set/list.csv", "--sampling", sampling,
                 outputs=outputs)
        frames, = augment.view_frames(16, 8, 1, 1, sampling)
        assert found[0].tolist() == pytest.approx(shades[frames].tolist(), abs=7)

    @pytest.mark.parametrize("sampling, flip, mirrored", [
        ("dense", True, True), ("dense", False, False), ("segments", True, False)])
    def test_dense_clips_alone_are_mirrored_unless_no_flip(
            self, sampling, flip, mirrored, monkeypatch):
        asked = []
        monkeypatch.setattr(finetune, "augment", lambda video, labels, classes, flip: (
            asked.append(flip) or video.float(), labels))
        args = argparse.Namespace(repeat=1, augment=True, multi_label=False, amp="off",
                                  sampling=sampling, flip=flip)
        batch = data.Batch(torch.zeros(2, 3, 2, 8, 8).byte(), None, torch.tensor([0, 1]), None, {})
        finetune.loss_of(lambda video: torch.zeros(2, 3), batch, args, 3, None)
        assert asked == [mirrored]

    def test_labels_are_smoothed_by_a_tenth(self):
        args = argparse.Namespace(repeat=1, augment=False, multi_label=False, amp="off")
        batch = data.Batch(torch.zeros(1, 3, 2, 8, 8).byte(), None, torch.tensor([0]), None, {})
        logits = torch.tensor([[3.0, 0, 0, 0]])
        loss, _ = finetune.loss_of(lambda video: logits, batch, args, 4, None)
        wanted = -(torch.tensor([0.925, 0.025, 0.025, 0.025]) * logits.log_softmax(dim=1)).sum()
        assert loss.item() == pytest.approx(wanted.item())

    def test_several_labels_have_a_cross_entropy_each_without_smoothing(self):
        args = argparse.Namespace(repeat=1, augment=False, multi_label=True, amp="off")
        batch = data.Batch(torch.zeros(1, 3, 2, 8, 8).byte(), None, torch.tensor([1]), None, {})
        logits, table = torch.tensor([[3.0, -1, 0]]), torch.tensor([[0.0, 1, 0], [1, 0, 1]])
        loss, _ = finetune.loss_of(lambda video: logits, batch, args, 3, table)
        said = torch.where(table[1] == 1, logits.sigmoid(), 1 - logits.sigmoid())  # of the truth
        assert loss.item() == pytest.approx(-said.log().mean().item())

    def test_erased_boxes_have_noise_of_their_own_in_each_frame(self, unmixed, monkeypatch):
        """A quarter of the clips lose a box, the same one in all frames."""
        monkeypatch.setattr(v2, "RandAugment", lambda *_, **__: v2.Identity())
        torch.manual_seed(0)
        still = torch.full((400, 3, 3, 16, 16), 128).byte()
        video, _ = augment.augment(still, torch.zeros(400).long(), 2, flip=False)
        changed = (video != normalise(still, "cpu")[0, :, :1, :1, :1]).isfinite() & (
            (video - normalise(still, "cpu")).abs() > 1e-3)
        erased = changed.flatten(1).any(dim=1)
        assert 0.18 < erased.float().mean() < 0.32
        inside = changed[erased].all(dim=1).float()
        assert (inside[:, 0] - inside[:, 1]).abs().mean() < 0.01  # one box
        assert (video[erased][:, :, 0] - video[erased][:, :, 1]).abs().amax(dim=(1, 2, 3)).min() > 0

    def test_all_frames_of_a_clip_are_distorted_alike(self, monkeypatch):
        """A still one stays still, but for the noise that erases."""
        monkeypatch.setattr(v2, "RandomErasing", lambda *_, **__: v2.Identity())
        still = torch.randint(256, (6, 3, 1, 16, 16)).byte().expand(-1, -1, 4, -1, -1)
        for _ in range(20):
            video, _ = augment.augment(still, torch.arange(6), 7, flip=True)
            assert torch.allclose(video, video[:, :, :1].expand_as(video))

    @pytest.mark.parametrize("flip, low, high", [(False, 0, 0), (True, 0.35, 0.65)])
    def test_half_of_the_clips_are_mirrored_if_asked(self, flip, low, high, unmixed, monkeypatch):
        monkeypatch.setattr(v2, "RandAugment", lambda *_, **__: v2.Identity())
        monkeypatch.setattr(v2, "RandomErasing", lambda *_, **__: v2.Identity())
        ramp = torch.arange(16).mul(8).byte().expand(200, 3, 2, 16, 16)  # brighter to the right
        columns = augment.augment(ramp, torch.zeros(200).long(), 2, flip)[0].mean(dim=(1, 2, 3))
        assert low <= (columns[:, 0] > columns[:, -1]).float().mean() <= high

    def test_four_operations_of_strength_7_are_each_applied_to_half_of_the_clips(
            self, unmixed, monkeypatch):
        """As RandAugment's "m7-n4-mstd0.5" in the published commands: of 10, give or take 0.5."""
        used = []
        monkeypatch.setattr(v2, "RandAugment", lambda number, strength, bins, **_: v2.Lambda(
            lambda clip: used.append(10 * number * strength / (bins - 1)) or clip))
        augment.augment(torch.zeros(300, 3, 2, 8, 8).byte(), torch.zeros(300).long(), 2, False)
        assert 0.45 < len(used) / (4 * 300) < 0.55
        assert 6 <= min(used) < 6.9 < sum(used) / len(used) < 7.1 < max(used) <= 8

    def test_clips_are_mixed_by_mixup_and_cutmix_in_turns(self, monkeypatch):
        """Of shares from Beta(0.8, 0.8) and from Beta(1, 1)."""
        used = []
        for name in ("MixUp", "CutMix"):
            monkeypatch.setattr(v2, name, lambda alpha, num_classes, name=name: v2.Lambda(
                lambda x: used.append((name, alpha)) or x))
        for _ in range(100):
            augment.augment(torch.zeros(1, 3, 1, 8, 8).byte(), torch.zeros(1).long(), 2, False)
        assert set(used) == {("MixUp", 0.8), ("CutMix", 1.0)}
        assert 0.3 < used.count(("MixUp", 0.8)) / len(used) < 0.7

    @pytest.mark.parametrize("labels", [[0, 2], [[1, 1, 0, 0], [0, 0, 1, 0]]])  # one, several
    def test_mixing_gives_each_clip_s_labels_its_share(self, labels):
        labels, clips = torch.tensor(labels), torch.zeros(2, 3, 2, 8, 8).byte()
        one, two = labels if labels.ndim == 2 else F.one_hot(labels, 4)
        shares = torch.stack([augment.augment(clips, labels, 4, flip=False)[1] for _ in range(20)])
        share = shares[..., :1]  # of the first clip; the rest is the second's
        assert torch.allclose(shares, share * one + (1 - share) * two)
        assert shares.min() >= 0 and ((share > 0.1) & (share < 0.9)).any()
        assert torch.maximum(share, 1 - share).median() < 0.99

    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("augmented", [False, True])
    def test_a_stand_in_for_unreadable_videos_has_no_part_in_the_loss(self, several, augmented):
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

    def test_average_precision_by_hand(self):
        """Of the first class's two videos one is first, one is third; the second's shares its place
        with another; the third class has none and does not count."""
        scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.3, 0.1, 0.3], [0.1, 0.2, 0.4]])
        truth = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
        found = finetune.mean_average_precision(scores, truth)
        assert found == pytest.approx(((1 / 1 + 2 / 3) / 2 + 1 / 2) / 2)

    def test_a_video_that_cannot_be_read_is_ranked_last(self, monkeypatch):
        flags = dict(views=[1, 1], sampling="segments", amp="off", workers=0, multi_label=True,
                     freeze=False, epochs=1, lr=0.1)
        monkeypatch.setattr(finetune, "collect", lambda *_: (  # scores of two videos, and labels
            torch.tensor([[0.2], [0.9]]), torch.tensor([0, -1])))
        results = finetune.test(argparse.Namespace(**flags), nn.Identity(), [("a", 0), ("b", 1)],
                                torch.tensor([[1.0], [0.0]]), dict(frames=4, stride=1, size=8),
                                ["c: there is no file"])
        assert results["mAP"] == 1 and results["unreadable"] == 1
        assert (results["named"], results["first_missing"]) == (3, "c: there is no file")

    def test_several_labels_a_line_are_learned_and_tested_by_map(self, here):
        """Without the flag such a list is refused."""
        put_lists(lambda i: f"{i % 3} {3 + i % 2}")
        flags = ["--data", "set", "--init", "run", "--epochs", 1, "--out"]
        assert run(finetune, *flags, "refused") == 2
        assert run(finetune, *flags, "several", "--multi-label", "--views", 2, 1) == 0
        results = read_json("several")
        assert 0 < results["mAP"] <= 1 and (results["videos"], results["unreadable"]) == (11, 1)
        assert len(saved("several/last.pt")["model"]["head.bias"]) == 5

    def test_dense_frames_lie_evenly_in_a_window(self):
        """Of 16 x 4 frames; a shorter video gives a frame for each stride, then its last."""
        for n in range(65, 365, 30):
            frames = augment.dense_frames(n, 16, 4, data.seeded(n))
            assert frames == [min(int(frames[0] + i * 64 / 15), frames[0] + 63) for i in range(16)]
        assert augment.dense_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10

    def test_random_crops_have_8_to_100_percent_of_the_area(self):
        areas = [height * width / 48 / 64 for _, _, height, width in (
            augment.random_crop(48, 64, data.seeded(seed)) for seed in range(200))]
        assert 0.07 < min(areas) < 0.2 < 0.8 < max(areas) <= 1

    def test_test_clips_lie_evenly_over_a_video(self):
        """Dense: every fourth of 300 frames, 75, from five starts; the last is held."""
        starts = [view[0] // 4 for view in augment.view_frames(300, 16, 4, 5, "dense")]
        assert starts == [int(c * (75 - 16) / 4) for c in range(5)]
        assert augment.view_frames(20, 16, 4, 5, "dense") == [[0, 4, 8, 12] + [16] * 12] * 5
        assert augment.view_frames(9, 3, 2, 2, "segments") == [[0, 3, 6], [1, 4, 7]]

    def test_test_crops_lie_evenly_along_the_long_side(self):
        chosen = [[0, 2, 4, 6], [1, 1, 1, 1]]
        write_frames("v.mp4", NOISE)
        views, *_ = augment.Views([("v.mp4", 0)], frames=4, stride=2, size=24, tube=(2, 8, 8),
                                   repeat=6, choose=lambda *_: chosen)[0, 0]
        clips = torch.stack(decode("v.mp4", lambda n: chosen)).transpose(1, 2)
        clips = data.transform.resize(clips, [24], antialias=False)  # 2 3 4 24 32
        wanted = torch.stack([clips[..., left:left + 24] for left in (0, 4, 8)], dim=1)
        assert torch.equal(views, wanted.flatten(0, 1))

    def test_the_probe_moves_no_weight_of_the_encoder(self, here):
        assert run(finetune, "--freeze", "--init", "run", "--epochs", 2, "--out", "probe") == 0
        before, after = saved("run")["model"], saved("probe")["model"]
        assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("encoder."))
        assert after["head.weight"].abs().max() > 2e-4

    def test_a_finished_run_is_tested_again_for_other_views_or_videos_alone(self, here, capsys):
        flags = ["--freeze", "--init", "run", "--epochs", 1, "--limit", 40, "--out", "out"]
        assert run(finetune, *flags) == 0
        put({"results.json": json.dumps(read_json("out") | {"summary": "as before"})}, "out")
        assert run(finetune, *flags) == 0 and "as before" in capsys.readouterr().out
        put({"one.csv": f"{find_videos('data/toy/val')[0][0][0]} 0\n"})
        for more, number in (["--views", 2, 1], 32), (["--views", 2, 1, "--val", "one.csv"], 1):
            assert run(finetune, *flags, *more) == 0
            found = read_json("out")
            assert (found["videos"], found["args"]["views"]) == (number, [2, 1])

    def test_a_head_for_as_many_classes_is_taken_on(self, here):
        for init in ("run", "first"):  # the first step's rate is 0
            flags = ["--init", init, "--max-steps", 1, "--out"]
            assert run(finetune, *flags, "first" if init == "run" else "second") == 0
        assert torch.equal(saved("first")["model"]["head.weight"],
                           saved("second")["model"]["head.weight"])
        put_lists(lambda i: i % 3)
        assert run(finetune, *flags, "third", "--data", "set") == 0  # another number: a new one
        assert len(saved("third")["model"]["head.weight"]) == 3

    @pytest.mark.parametrize("flags", [
        ["--model", "small"], ["--size", 30], ["--val", "data/toy/val/0_right"]])
    def test_another_size_or_a_test_set_without_labels_is_refused(self, flags, here):
        assert run(finetune, "--init", "run", "--out", "never", *flags) == 2

    def test_fine_tuning_resumes_exactly_though_it_mixes(self, here, monkeypatch):
        monkeypatch.setitem(finetune.RECIPES["toy"], "augment", True)
        flags = ["--epochs", 2, "--batch-size", 16, "--repeat", 2, "--accum", 1, "--workers", 1]
        for out, *more in (["whole"], ["parts", "--max-steps", 5], ["parts"]):
            assert run(finetune, *flags, "--out", out, *more) == 0
        assert same(saved("whole")["model"], saved("parts")["model"])

    def test_each_layer_trains_at_three_quarters_of_the_next_one_s_rate(self, here):
        assert run(finetune, "--init", "run", "--max-steps", 2, "--out", "out") == 0
        rates = sorted({group["lr"] for group in saved("out")["optimizer"]["param_groups"]})
        assert len(rates) == 6  # of the head, four blocks, the embedding
        assert all(below == pytest.approx(0.75 * rate) for below, rate in zip(rates, rates[1:]))

    def test_each_clip_from_one_decoding_has_its_video_s_label(self, prepared):
        given = prepared("--no-augment", "--repeat", 2)
        batch = data.collate([given.clips[0, 0], given.clips[0, 63]])  # first and last class
        right = 99 * F.one_hot(torch.tensor([0, 0, 7, 7]))
        assert given.loss_of(lambda video: right, batch)[0] < 9.9

    @pytest.mark.parametrize("flags, wanted", [
        ("k400", dict(epochs=100, lr=1e-3, global_batch=256, views=[7, 3], sampling="dense",
                      repeat=1)),
        ("ucf101", dict(epochs=100, global_batch=256, views=[5, 3])),
        ("ssv2", dict(epochs=40, lr=1e-3, global_batch=32, views=[2, 3], sampling="segments")),
        ("ssv2 --freeze", dict(epochs=30, lr=1e-3, global_batch=384, repeat=2, views=[2, 3])),
        ("mine --init run", dict(epochs=10, lr=4e-3, global_batch=64)),  # tiny ones take toy's
        ("k400 --init run", dict(frames=8, stride=1, size=32)),
        ("k400 --init run --size 64 --stride 3", dict(frames=8, stride=3, size=64)),
        ("k400 --init other.pt", dict(frames=4, stride=4, size=16))])  # which tells no stride
    def test_recipes_are_the_published_ones_and_clips_the_run_s(self, flags, wanted, here):
        torch.save(saved("run/last.pt") | {"args": {"frames": 4, "size": 16}}, "other.pt")
        args, _ = finetune.parse(["--data", *flags.split()])
        assert vars(args) | wanted == vars(args)

    def test_limits_are_fair(self):
        videos = list(enumerate([0] * 50 + [1] * 20 + [2] * 5))
        labels = [label for _, label in set(finetune.limit(videos, 40, seed=0))]
        assert sorted(map(labels.count, range(3))) == [5, 17, 18]

    @pytest.mark.parametrize("script, key, one, two", [
        # Drop path would draw other numbers.
        (finetune, "top1", *(["--freeze", "--lr", 1, "--batch-size", n] for n in (4, 2))),
        (features, "knn", ["--knn"], ["--knn"])])
    def test_two_processes_with_uneven_shares_get_one_s_accuracy(self, script, key, one, two, here):
        put_lists(lambda i: i % 3)
        flags = ["--data", "set", "--init", "run", "--workers", 0, "--out"]
        assert run(script, *flags, "one", *one) == 0
        assert "6.mp4" in in_two_processes(script.main, *flags, "two", *two)
        one, two = read_json("one"), read_json("two")
        assert one[key] == two[key] and (two["videos"], two["unreadable"]) == (11, 1)


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


def labels_of(place, split="train"):
    return [label for _, label in find_videos(place, (split, ""), [])[0]]


class TestVideos:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_official_tables_become_lists_that_train(self, name):
        files, *labels = LAYOUTS[name]
        put(files, "set")
        assert run(videos, "lists", name, "set", "--out", "lists") == 0
        assert [labels_of("lists"), labels_of("lists", "val")] == labels
        assert len(Path("lists/missing.txt").read_text().splitlines()) == 1
        assert run(train, "--data", name, "--root", "lists", "--model", "tiny", "--size", 32,
                   "--frames", 4, "--max-steps", 1, "--workers", 0, "--out", "run") == 0

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_without_one_of_its_tables_a_set_gets_no_lists(self, name, capsys):
        put(dict(list(LAYOUTS[name][0].items())[:-1]), "set")
        assert run(videos, "lists", name, "set", "--out", "lists") == 2
        assert "layout" in capsys.readouterr().err and not Path("lists").exists()

    def test_lists_are_not_overwritten(self):
        put(LAYOUTS["ssv2"][0], "set")
        put({"val.csv": "mine"}, "lists")
        assert run(videos, "lists", "ssv2", "set", "--out", "lists") == 2
        assert os.listdir("lists") == ["val.csv"]

    def test_check_lists_the_good_and_names_the_bad(self):
        put({"train/a/1.mp4": 30, "train/b/2 2.mp4": 30, "train/b/3.mp4": "", "val/b/4.mp4": 30,
             "train/b/notes.txt": ""}, "set")
        cut = "set/train/b/cut.mp4"  # its header promises 20 frames
        write_frames(cut, 255 * torch.rand(20, 64, 96, 3), movflags="faststart")
        with av.open(cut) as container:
            tenth = [packet for packet in container.demux() if packet.size][9]
        os.truncate(cut, tenth.pos + tenth.size)
        assert run(videos, "check", "set", "--out", "out", "--workers", 2) == 0
        bad = Path("out/bad.txt").read_text()
        assert bad.count("\n") == 3
        assert all(name in bad for name in ("3.mp4: ", "notes.txt", "cut.mp4"))
        assert labels_of("out") == [0, 1] and labels_of("out", "val") == [1]

    def test_the_bars_of_check_reach_their_end(self, capsys):
        put({"train/a/1.mp4": 30, "val/a/2.mp4": 30}, "set")
        assert run(videos, "check", "set", "--out", "out", "--workers", 0) == 0
        assert capsys.readouterr().err.count("100%") == 2

    def test_check_writes_to_a_new_folder_alone(self):
        put({"a/1.mp4": 30}, "set")
        assert run(videos, "check", "set", "--out", "set") == 2

    @pytest.mark.parametrize("name, times, tick, turns", [
        ("b.avi", range(40), 40, 0),  # avi has no times of showing
        ("fast.mkv", range(40), 1, 0),  # no average rate
        ("late.mkv", [1000 + i * i for i in range(40)], 1, 0),
        *((f"{turns}.mp4", range(0, 1600, 40), 1, turns) for turns in range(4))])
    def test_a_prepared_video_shows_all_frames_at_their_times(self, name, times, tick, turns):
        """In order, upright, in their colours: whatever the original says in another way."""
        images = torch.empty(40, 64, 96, 3)
        for i, image in enumerate(images):  # from blue to red, white at the top
            image[:16], image[16:] = 250, torch.tensor([6 * i, 40, 240 - 6 * i])
        write_frames(f"a/{name}", images, times, tick, options={"bf": "3"})
        if turns:
            turn(f"a/{name}", turns)
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        with av.open(str(Path("b", name).with_suffix(".mp4"))) as container:
            frames = list(container.decode(video=0))
        assert [frame.time for frame in frames] == pytest.approx(
            [(time - times[0]) * tick / 1000 for time in times], abs=1e-4)
        for i, frame in enumerate(frames):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1))
            image = image.rot90(-turns).float()
            assert frame.rotation == 0 and image.shape == (256, 384, 3) and image[:48].mean() > 240
            assert image[80:].mean(dim=(0, 1)).tolist() == pytest.approx(
                [6 * i, 40, 240 - 6 * i], abs=4)

    def test_names_may_hold_a_colon_or_any_byte(self, capsys):
        name = "cam:1\udcff" if sys.platform == "linux" else "cam:1"  # macOS wants UTF-8
        root, target = f"a {name}", f"b {name}"
        put({f"clap/{name}.mp4": 30, "clap/2.mp4": 60,
             "splits/clap_test_split1.txt": f"{name}.avi 1 \n2.avi 2 \n"}, root)
        assert run(videos, "lists", "hmdb51", root) == 0
        assert run(videos, "check", f"{root}/train.csv", "--out", name, "--workers", 0) == 0
        assert run(videos, "prepare", root, target, "--workers", 0) == 0
        for place in (root, target, name):
            (path, label), = find_videos(place)[0]
            assert label == 0 and decode(path, lambda n: [[n - 1]])[0].float().mean() < 40
        assert "cam:1" in capsys.readouterr().out  # whose coding is strict, as a terminal's

    def test_prepared_videos_keep_their_names_and_lists_lead_to_them(self):
        """Of x.avi and x.mp4 each its own; also old names and absolute paths in lists."""
        put({"x/1.webm": 30, "x.avi": 60, "x.mp4": 200, "list.csv":
             f"x/1.webm 3\nx.avi 0\nx.mp4 1\n{Path.cwd()}/a/x.mp4 2\n"}, "a")
        assert run(videos, "prepare", "a", "b", "--workers", 2) == 0
        paths = [os.path.relpath(path) for path, _ in find_videos("b/list.csv")[0]]
        assert paths == ["b/x/1.mp4", "b/x.avi", "b/x.mp4", "b/x.mp4"]
        shades = [decode(path, lambda n: [[n - 1]])[0].float().mean().item() for path in paths]
        assert shades == pytest.approx([30, 60, 200, 200], abs=5)

    def test_a_prepared_video_is_made_for_fast_reading(self):
        """A key frame every 32 frames, and B-frames between; of a size that stays here."""
        frames = torch.arange(80)[:, None, None, None].expand(80, 256, 342, 3).byte() * 3
        Path("a").mkdir()
        toy_set.write_video("a/long.mp4", frames, rate=25)
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        with av.open("b/long.mp4") as container:
            stream, found = container.streams.video[0], list(container.decode(video=0))
            assert (stream.height, stream.width, len(container.streams)) == (256, 342, 1)
        assert [i for i, frame in enumerate(found) if frame.key_frame] == [0, 32, 64]
        assert sum(frame.pict_type == av.video.frame.PictureType.B for frame in found) >= 54

    def test_prepare_names_what_it_cannot_read(self):
        put({"bad.mp4": "text", "good.mp4": 30}, "a")
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        assert "bad.mp4: " in Path("b/bad.txt").read_text() and Path("b/good.mp4").exists()

    def test_prepare_resumes_and_overwrites_nothing(self):
        put({"x/1.mp4": 30, "x.mp4": 60, "list.csv": "x.mp4 1\n"}, "a")
        put({"x.mp4": "mine", "list.csv": "mine"}, "b")
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        assert Path("b/x/1.mp4").exists()
        assert Path("b/x.mp4").read_text() == Path("b/list.csv").read_text() == "mine"

    def test_prepare_needs_a_target_outside_its_source(self):
        put({"x/1.mp4": 30}, "a")
        assert run(videos, "prepare", "a", "a/y") == run(videos, "prepare", "a/x", "a") == 2

    def test_prepare_killed_leaves_only_complete_files(self):
        for i in range(4):
            write_frames(f"a/{i}.mp4", NOISE[:30])
        process, _ = start_apart(launch, videos.main, ["prepare", "a", "b", "--workers", "0"])
        while not list(Path("b").glob("*.mp4")):
            assert process.is_alive()
            process.join(0.01)
        process.kill()
        process.join()
        done = list(Path("b").glob("*.mp4"))
        assert len(done) < 4 and all(len(decode(p, lambda n: [range(n)])[0]) == 30 for p in done)
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        assert len(list(Path("b").glob("*.mp4"))) == 4 and "unfinished" not in str(os.listdir("b"))

    def test_a_full_disk_or_a_bug_is_no_fault_of_a_video(self, monkeypatch):
        """The one ends prepare with a sentence, the other with a traceback."""
        def fail(*_):
            raise error

        put({"a/1.mp4": 30})
        monkeypatch.setattr(videos, "resize", fail)
        error = OSError(28, "No space left on device")
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 1
        error = TypeError("a bug")
        with pytest.raises(TypeError):
            run(videos, "prepare", "a", "b", "--workers", 0)

    def test_prepare_removes_what_a_killed_process_left_in_any_folder(self):
        put({"x/1.mp4": 30}, "a")
        put({"x/1.mp4.0123abcd.unfinished": "half a video"}, "b")
        assert run(videos, "prepare", "a", "b", "--workers", 0) == 0
        assert os.listdir("b/x") == ["1.mp4"]

    def test_the_help_of_lists_shows_the_layouts(self, capsys):
        assert run(videos, "lists", "--help") == 0
        assert "classInd" in capsys.readouterr().out


HUGGING_FACE = {  # parts of our names and theirs
    "encoder.patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "encoder.blocks": "videomae.encoder.layer", "encoder.norm": "videomae.layernorm",
    "decoder.blocks": "decoder.decoder_layers", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "attn": "attention.attention", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def theirs_of(model, target):
    """A model's weights as the authors' code names them, and as Hugging Face's does."""
    whole, authors, hugging_face = target in ("pixel", "classes"), {}, {}
    for name, weight in model.state_dict().items():
        prefix = "encoder." if target == "classes" else ""
        authors[name.removeprefix(prefix).replace("projector.", "head.")] = weight
        if whole or name.startswith("encoder."):
            for ours, theirs in HUGGING_FACE.items():
                name = name.replace(ours, theirs)
            name = name if whole else name.removeprefix("videomae.")
            name = name.replace("head.", "classifier.") if target == "classes" else name
            parts = ("query", "key", "value") if "qkv" in name else ("",)
            for part, rows in zip(parts, weight.chunk(len(parts))):
                hugging_face[name.replace("qkv", part)] = rows.clone()
    return authors, hugging_face


def write_hugging_face(target, **flags):
    """Random weights of a SIGMA, or for "classes" a classifier, as the authors' a.pth with these
    flags -> our a.pt -> Hugging Face's folder hf. Returns the network and what theirs_of gives."""
    model = build_model("tiny", target="mlp" if target == "classes" else target, heads=8)
    model = (Classifier(model.encoder, 5) if target == "classes" else model).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    authors, hugging_face = theirs_of(model, target)
    torch.save({"module": authors, "args": argparse.Namespace(**flags)}, "a.pth")
    assert run(weights, "import", "a.pth", "a.pt", "--heads", 8) == 0
    assert run(weights, "export", "a.pt", "--to", "hf", "hf") == 0
    return model, authors, hugging_face


@pytest.fixture
def no_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)


class TestWeights:
    @pytest.mark.parametrize("target", ["mlp", "dino", "pixel", "l2", "classes"])
    def test_every_layout_gives_the_same_network(self, target, no_safetensors):
        """Bit for bit, there and back. Heads come from flags, then from config.json."""
        model, authors, hugging_face = write_hugging_face(
            target, num_frames=8, sampling_rate=2, input_size=32)
        clip, kept = torch.randn(1, 3, 8, 16, 16), model.state_dict()
        torch.save(hugging_face, "b.bin")
        assert run(weights, "import", "b.bin", "b.pt", "--heads", 8) == 0
        assert run(weights, "import", "hf", "c.pt") == 0
        for name in ("a", "b", "c"):
            assert same(saved(f"{name}.pt")["model"], kept)
            assert torch.equal(load_encoder(f"{name}.pt")(clip), model.encoder(clip))
            for to in ("authors", "hf"):
                export = ("export", f"{name}.pt", "--to", to, f"{to}-{name}")
                assert [run(weights, *export), run(weights, *export)] == [0, 2]  # not twice
            assert same(saved(f"hf-{name}/pytorch_model.bin"), hugging_face)
            if target not in ("pixel", "classes"):  # Hugging Face's has the encoder alone
                kept = {n: w for n, w in kept.items() if n.startswith("encoder.")}
        assert same(saved("authors-a")["model"], authors)
        assert saved("a.pt")["args"] == {"frames": 8, "stride": 2, "size": 32}  # from the flags
        assert saved("c.pt")["args"] == saved("a.pt")["args"]  # in config.json
        assert saved("authors-a")["args"]["sampling_rate"] == 2
        if target != "classes":
            assert same(load_model("a.pt").state_dict(), model.state_dict())

    @pytest.mark.parametrize("name, value", [
        ("hidden_act", "relu"), ("qkv_bias", False), ("qv_bias", False), ("layer_norm_eps", 1e-3),
        ("intermediate_size", 100), ("norm_pix_loss", False), ("image_size", [32, 64]),
        ("tubelet_size", 2), ("num_channels", 1), ("model_type", "vivit")])
    def test_other_networks_of_hugging_face_are_refused(self, name, value, capsys, no_safetensors):
        write_hugging_face("pixel")
        put({"config.json": json.dumps(read_json("hf", "config.json") | {name: value})}, "hf")
        assert run(weights, "import", "hf", "no.pt") == 2
        assert name in capsys.readouterr().err and not Path("no.pt").exists()

    def test_an_image_processor_prepares_frames_as_we_do(self, no_safetensors):
        write_hugging_face("classes", input_size=64, num_frames=8)
        config, images = (read_json("hf", f"{part}config.json") for part in ("", "preprocessor_"))
        assert (config["num_labels"], config["num_frames"]) == (5, 8) and config["use_mean_pooling"]
        assert images["crop_size"] == {"height": 64, "width": 64} and images["do_rescale"]
        assert images["image_mean"] == list(sigma.IMAGENET_MEAN)

    def test_safetensors_are_read_and_written_if_the_package_is_there(self):
        pytest.importorskip("safetensors")
        model, *_ = write_hugging_face("pixel")
        assert run(weights, "import", "hf/model.safetensors", "again.pt") == 0
        assert same(load_model("again.pt").state_dict(), model.state_dict())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_named(self, value, capsys):
        content = build_model("tiny").state_dict()
        content["mask_token"].fill_(value)
        torch.save(content, "bad.pt")
        assert run(weights, "import", "bad.pt", "ours.pt") == 2
        assert "mask_token" in capsys.readouterr().err and not Path("ours.pt").exists()

    def test_wrappers_are_taken_off(self):
        model = build_model("tiny")
        for key, prefix in (("state_dict", "model."), ("module", "module._orig_mod."),
                            ("model", "_orig_mod.")):
            torch.save({key: {prefix + n: w for n, w in model.state_dict().items()}}, f"{key}.pt")
            assert run(weights, "import", f"{key}.pt", f"ours-{key}.pt") == 0
            assert same(load_model(f"ours-{key}.pt").state_dict(), model.state_dict())

    def test_files_that_do_not_fit_stop_and_run_no_code(self, capsys, no_safetensors):
        harm = type("Harm", (), {"__reduce__": lambda _: (os.mkdir, ("harm",))})()
        whole = build_model("tiny").state_dict()
        _, classifier = theirs_of(Classifier(build_model("tiny").encoder, 5), "classes")
        for content, missing, word in (
                (classifier, "fc_norm.", "mean pooling"),
                (classifier, "layer.0.layernorm", "norm1"),
                (classifier, "layer.0.attention.attention.key", "query"),
                (classifier | {"extra": torch.zeros(1)}, "-", "extra"),
                (whole, "decoder.head.weight", "decoder.head.weight"),
                (whole, "encoder.norm", "use_mean_pooling"),
                (whole | {"step": 1}, "-", "theirs.pt"), ({}, "-", "theirs.pt"),
                (whole | {"harm": harm}, "-", "mkdir")):
            torch.save({n: w for n, w in content.items() if missing not in n}, "theirs.pt")
            assert run(weights, "import", "theirs.pt", "ours.pt") == 2
            assert word in capsys.readouterr().err
        for name, word in (("cut.pt", "cut.pt"), ("a.safetensors", "pip install safetensors")):
            Path(name).write_bytes(Path("theirs.pt").read_bytes()[:1000])
            assert run(weights, "import", name, "ours.pt") == 2
            assert word in capsys.readouterr().err
        assert not Path("harm").exists() and not Path("ours.pt").exists()

    def test_safetensors_may_be_read_by_whom_the_umask_lets(self):
        pytest.importorskip("safetensors")
        write_hugging_face("pixel")
        Path("mine").touch()
        assert Path("hf/model.safetensors").stat().st_mode == Path("mine").stat().st_mode


class TestBench:
    @pytest.fixture
    def figures(self, here, monkeypatch):
        """What bench.py finds with flags, each time as if it were a second."""
        monkeypatch.setattr(bench, "seconds", lambda work: work() is None or 1)
        monkeypatch.setattr(bench, "SIDE", 64, raising=False)  # of a matrix product
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

        def found(*flags):
            assert run(bench, "--data", "toy", *flags, "--out", "found.json") == 0
            return read_json(".", "found.json")
        return found

    def test_bench_names_the_bottleneck(self, figures, monkeypatch):
        monkeypatch.setattr(bench, "measure_loader", lambda *_: 7.0)
        assert figures("--batch-size", 8)["bottleneck"] == "loader"
        assert figures("--batch-size", 6)["bottleneck"] == "model"

    def test_a_recipe_takes_all_its_clips_at_the_step_s_speed(self, figures):
        found = figures("--batch-size", 8)
        assert found["clips_per_second"] == 8
        assert found["hours"] == pytest.approx(8192 * 16 / 8 / 3600)

    def test_bench_times_teacher_and_sinkhorn(self, figures):
        assert figures("--batch-size", 2, "--target", "dino-s").keys() >= {
            "teacher", "sinkhorn", "loss", "sinkhorn_matvecs"}

    def test_memory_is_counted_without_computing(self):
        """The weights are 4 bytes each, Adam's state 8; a clip more takes more."""
        args = argparse.Namespace(data="toy", target="mlp", amp="off")
        one, two, four = (step.count_memory(args, "tiny", n) for n in (8, 16, 32))
        weights = 4 * sum(p.numel() for p in build_model("tiny").parameters())
        assert one["Parameter"] == pytest.approx(weights, rel=0.01)
        assert one["Optstate"] == pytest.approx(2 * weights, rel=0.01)
        more = two["Total"] - one["Total"]
        assert four["Total"] - two["Total"] == pytest.approx(2 * more, rel=0.1)

    def test_commands_that_have_moved_say_where(self, capsys):
        assert run(bench, "--check") == 2 and "extras/check.py" in capsys.readouterr().err


def write_log(out, losses):
    put({"log.jsonl": "\n".join(json.dumps(dict(step=step, loss=loss))
                                for step, loss in losses.items())}, out)


class TestCheck:
    def test_a_part_that_fails_is_named_and_the_others_run(self, monkeypatch, capsys):
        def fail(folder, limit):
            raise RunError("broken")

        monkeypatch.setattr(check, "make_toy", lambda *_, **__: None)
        monkeypatch.setattr(check, "parts", lambda: {"one": fail, "two": lambda *_: "fine"})
        assert run(check) == 1
        shown, errors = capsys.readouterr()
        assert "| one | **fails** | broken |" in shown and "| two | works | fine |" in shown
        assert "1 parts fail: one" in errors

    def test_a_command_s_error_is_its_last_line(self):
        with pytest.raises(RunError, match="division by zero"):
            check.run_command([sys.executable, "-c", "1 / 0"], ".", 60)

    def test_a_command_that_takes_too_long_ends_with_all_it_started(self):
        script = "sleep 60 & echo $! > pid; wait"
        with pytest.raises(RunError, match="not done"):
            check.run_command(["sh", "-c", script], ".", 0.5)
        state = Path("/proc", Path("pid").read_text().strip(), "stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"

    def test_a_command_is_stopped_on_demand(self):
        script = "trap 'echo stopped; exit 0' TERM; touch ready; while :; do sleep 0.1; done"
        assert check.run_command(["sh", "-c", script], ".", 60, Path("ready").exists) == "stopped\n"

    def test_the_mean_loss_weighs_each_line_by_its_steps(self):
        write_log("run", {1: 8.0, 10: 4.0})
        assert check.losses("run") == (10, 8.0, pytest.approx((8 + 9 * 4) / 10))

    @pytest.mark.parametrize("log, reason", [
        ({1: 5.0, 20: 1.0}, None), ({1: 5.2, 20: 1.0}, "apart"), ({19: 5.0}, "after step 19")])
    def test_a_run_must_start_with_the_loss_of_another(self, log, reason, monkeypatch):
        monkeypatch.setattr(check, "run_command", lambda *_, **__: write_log("here", log))
        write_log("there", {1: 5.01, 20: 4.0})
        with pytest.raises(RunError, match=reason) if reason else contextlib.nullcontext():
            check.train(Path.cwd(), 60, "here", like="there")

    def test_sinkhorn_in_another_precision_must_agree(self, monkeypatch):
        assert run(check, "--sinkhorn") == 0
        monkeypatch.setattr(check, "sinkhorn", lambda scores, eps, hard=False: sigma.sinkhorn(
            scores, eps if scores.dtype == torch.float64 else 1.1 * eps, hard=hard))
        assert run(check, "--sinkhorn") == 1

    def test_speed_is_that_of_as_many_clips_as_fit(self, monkeypatch):
        def command(words, folder, limit):
            if int(words[words.index("--batch-size") + 1]) > 12:
                raise RunError("error: out of GPU memory: lower --batch-size")
            Path("speed.json").write_text(json.dumps(dict.fromkeys((
                "clips_per_second", "mfu", "matmul_flops", "sinkhorn", "loss", "peak_memory"), 1)))

        monkeypatch.setattr(check, "run_command", command)
        assert "10 per forward pass (40 don't fit)" in check.speed(Path.cwd(), 60, "large", 40)


class TestNoData:
    """The forward pass on a GPU that need not be there: tensors have a device and a shape, but no
    data. What mixes devices raises, and what reads a value back, which would make the CPU wait."""

    @pytest.fixture
    def cuda(self, monkeypatch):
        index = sigma.split_mask(tube_mask(2, (2, 4, 4), 0.75))  # a real one is read on the CPU
        monkeypatch.setattr(sigma, "split_mask", lambda mask, device: [
            torch.zeros_like(x, device=device) for x in index])
        monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, *_, **__: x)  # reads values
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("cuda")

    @pytest.mark.parametrize("target", ["mlp", "pixel", "l2", "dino-s"])
    def test_pretraining_stays_on_the_gpu(self, target, cuda):
        with cuda:
            model = build_model("tiny", target=target)
            teacher = sigma.Teacher(toy_set.random_dino(384, 1), (4, 8, 8))
            video = torch.zeros(2, 3, 8, 32, 32)
            if target == "dino-s":
                model.prototypes = nn.Parameter(torch.zeros(128, 384))
                model.decoder.head = nn.Linear(64, 384)
        features = teacher(video) if target == "dino-s" else None
        loss, stats = model(video, torch.zeros(2, 32, dtype=torch.bool, device="cpu"), features)
        assert {x.device.type for x in (loss, *stats.values())} == {"cuda"}

    @pytest.mark.parametrize("several", [False, True])
    def test_fine_tuning_stays_on_the_gpu(self, several, cuda, monkeypatch):
        """But for the labels, which tell on the CPU which clips could be read."""
        args = argparse.Namespace(augment=False, amp="off", multi_label=several, repeat=1)
        with cuda:
            network = Classifier(build_model("tiny").encoder, 5, drop_path=0.1)
        video = torch.zeros(2, 3, 8, 32, 32, dtype=torch.uint8)
        labels = torch.zeros(2, 5) if several else torch.zeros(2, dtype=torch.long)
        monkeypatch.setattr(finetune, "readable", lambda *_: (video, labels, True))
        monkeypatch.setattr(finetune, "DEVICE", cuda)
        loss, _ = finetune.loss_of(network, None, args, 5, None)
        assert loss.device.type == "cuda"


class TestPictures:
    @pytest.mark.parametrize("size", [32, 64])  # finer than tubes in the small one
    def test_painting_puts_each_tube_at_its_place(self, size):
        t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (8, size, size)), indexing="ij")
        video, tube = (8 * t + y / 4 + 128 / size * x).expand(1, 3, -1, -1, -1), (4, 8, 8)
        maps = pictures.slide(video, tube, lambda x: sigma.take_tubes(x, tube).mean(dim=(3, 4, 5)))
        painted = pictures.paint("a.png", video, maps)[:, 16:-16].float()
        error = (painted[:, :, 16:112] - painted[:, :, 144:240]).abs().mean(dim=(1, 2, 3))
        assert error[2:6].max() < 6 if size == 32 else error.max() < 20

    def test_the_framed_tube_is_at_its_place(self):
        video = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
        video[:, 7, 8:16, 16:24] = 99  # the last frame of the tube in slice 1, row 1, column 2
        image = pictures.frame_tube(video, torch.tensor(16 + 4 + 2), (4, 8, 8))[0]
        rows, columns = (image == 255).nonzero().float().mean(dim=0).tolist()
        assert (rows, columns) == pytest.approx((48, 80), abs=1)
        assert not image[128:, :64].any() and (image[128:, 64:] == 99).all()

    @pytest.mark.parametrize("target, more", [
        ("pixel", set()), ("l2", set()),  # they have no prototypes to show
        ("mlp", {"prototypes.png", "clusters.png", "clusters.mp4"})])
    def test_pictures_and_a_video_that_plays_are_written(self, target, more, here):
        assert run(train, "--target", target, "--max-steps", 1, "--out", "new") == 0
        assert run(pictures, "new", "--split", "val", "--out", "shown") == 0
        assert set(os.listdir("shown")) == {"masks.png", "components.png"} | more
        if more:
            played, = decode("shown/clusters.mp4", lambda n: [range(n)])
            assert played.shape == (8, 3, 512, 256)

    def test_curves_have_moved(self, capsys):
        assert run(pictures, "--curves", "run") == 2
        assert "extras/curves.py" in capsys.readouterr().err


class TestCurves:
    def test_curves_of_runs_are_drawn_where_their_logs_say(self):
        """Both runs in both panels; what is 10 times as small is one decade lower."""
        for name, factor in (("a&b", 1), ("c", 0.1)):
            log = [dict(step=step, loss=factor * 10 / step, video_std=factor,
                        projection_std=2 * factor) for step in (1, 10, 100)]
            put({"log.jsonl": "\n".join(map(json.dumps, log))}, name)
        assert run(curves, "a&b", "c", "--out", "curves.svg") == 0
        lines = [[[float(x) for x in point.split(",")] for point in line.get("points").split()]
                 for line in ElementTree.parse("curves.svg").iterfind(".//{*}polyline")]
        first, second, *spreads = lines
        assert len(lines) == 6 and all(len(line) == 3 for line in lines)
        decade = first[1][1] - first[0][1]
        assert first[2][1] - first[1][1] == pytest.approx(decade, abs=0.2)
        assert second[0][1] - first[0][1] == pytest.approx(decade, abs=0.2)
        assert first[2][0] == pytest.approx(100 * first[0][0], rel=0.02)
        video, projection, video_of_c, _ = (line[0][1] for line in spreads)
        assert projection < video < video_of_c  # the larger, the higher

    def test_a_log_without_spreads_is_refused(self):
        put({"c/log.jsonl": '{"step": 1, "loss": 1}'})
        assert run(curves, "c") == 2 and not Path("curves.svg").exists()


def write_pan(path, right=3, still=0, codec="libx264", options=videos.H264):
    """Forty frames of a window that pans over a picture. still: columns at the left that don't."""
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=data.seeded(0)), (480, 640),
                            mode="bicubic")[0].clamp(0, 1).mul(255).permute(1, 2, 0)
    frames = torch.stack([picture[2 * i:, right * i:][:240, :320] for i in range(40)])
    frames[:, :, :still] = picture[:240, :still]
    write_frames(path, frames, codec=codec, options=options)


class TestMotion:
    GRID = 6, 8, 10

    def test_without_motion_a_mask_is_the_tube_mask(self):
        found = motion.motion_mask(torch.zeros(*self.GRID, 2), self.GRID, 0.7, data.seeded(0))
        assert torch.equal(found, tube_mask(1, self.GRID, 0.7, data.seeded(0))[0])

    def test_visible_places_pan_with_the_picture(self):
        """By one tube a slice; others replace those that leave."""
        pan = torch.tensor([0.0, 1]).expand(*self.GRID, 2)
        mask, again = (motion.motion_mask(pan, self.GRID, 0.7, data.seeded(0)) for _ in range(2))
        visible = ~mask.view(self.GRID)
        for before, now in zip(visible[:-1, :, :-1], visible[1:, :, 1:]):
            assert (now >= before).all() or (before >= now).all()  # followed onwards or backwards
        assert torch.equal(mask, again)

    @pytest.mark.parametrize("speed", [0, 0.3, 2])
    def test_each_slice_hides_the_same_number_whatever_moves(self, speed):
        """Places leave, or meet."""
        flow = speed * torch.randn(*self.GRID, 2, generator=data.seeded(0))
        found = motion.motion_mask(flow, self.GRID, 0.7, data.seeded(1))
        assert (found.view(6, 80).sum(dim=1) == int(0.7 * 80)).all()

    @pytest.mark.parametrize("name, codec, options", [
        ("prepared.mp4", "libx264", videos.H264), ("b.avi", "libx264", videos.H264),
        ("default.mp4", "libx264", {}), ("mpeg4.avi", "mpeg4", {"bf": "2", "b": "2M"})])
    def test_vectors_of_a_known_pan_are_right_nine_times_of_ten(self, name, codec, options):
        """Within half a pixel a frame; the content moves against the window."""
        watch = motion.MotionRecorder()
        write_pan(name, codec=codec, options=options)
        for _ in range(2):  # decode may have to start again
            decode(name, lambda n: [range(0, 32, 2)], watch=watch)
        starts = [start for start, *_ in watch.fields]
        assert starts == sorted(set(starts))
        vectors = torch.cat([field[field.isfinite().all(dim=2)] for *_, field in watch.fields])
        right = ((vectors - torch.tensor([-2.0, -3.0])).abs() <= 0.5).all(dim=1)
        assert len(vectors) > 5000 and right.float().mean() > 0.9

    @pytest.mark.parametrize("turns", range(4))
    def test_vectors_tell_where_each_pixel_of_the_upright_frame_comes_from(self, turns):
        """However the file is rotated. A part stands still, so that directions and places count."""
        watch = motion.MotionRecorder()
        write_pan("v.mp4", still=80)
        turn("v.mp4", turns)
        frames = decode("v.mp4", lambda n: [range(8)], watch=watch)[0].float().mean(dim=1)
        field = torch.stack([field for *_, field in watch.fields]).nanmedian(dim=0).values
        cells = field.nan_to_num().round().long()
        down, right = cells.repeat_interleave(8, 0).repeat_interleave(8, 1).unbind(2)
        y, x = torch.meshgrid(*map(torch.arange, frames.shape[1:]), indexing="ij")
        inner = (y.minimum(x) >= 8) & (y < len(y) - 8) & (x < y.shape[1] - 8)
        y, x, down, right = (values[inner] for values in (y, x, down, right))
        before, now = frames[:-1, y - down, x - right], frames[1:, y, x]
        assert (before - now).abs().mean() < 0.3 * (frames[:-1, y, x] - now).abs().mean()

    def test_crop_and_resize_transform_the_motion(self):
        def moved(field, *box):  # from frame 0 to frame 2
            return motion.displacements([(0.0, 2.0, field)], [0, 2], box, (2, 15, 20))[1]

        field = torch.tensor([4.0, -8.0]).repeat(30, 40, 1)  # pixels a frame, of 240 x 320
        whole = moved(field, 0, 0, 240, 320)
        assert torch.allclose(whole, torch.tensor([0.5, -1.0]).expand(15, 20, 2))
        assert torch.allclose(moved(field, 60, 80, 120, 160), 2 * whole)  # enlarged twice
        field[:, 20:] = torch.nan
        assert not moved(field, 0, 160, 240, 160).any()  # where all is missing

    def test_motion_clips_are_the_same_in_any_worker(self):
        """Their frames are those of plain Clips, who may have decoded a kept video before."""
        for i in range(3):
            write_pan(f"{i}.mp4", right=i)
        videos, keys, cache = find_videos(".")[0], [(0, 0), (1, 1), (2, 2), (3, 2)], {}
        options = dict(frames=16, stride=2, size=64, tube=(2, 8, 8), ratio=0.75)
        plain = data.Clips(videos, **options, cache=cache)
        clips, kept = (motion.MotionClips(videos, **options, cache=some) for some in (None, cache))
        still, alone, shared, again, third = (
            next(loader(some, 4, keys, workers))[:2]
            for some, workers in ((plain, 0), (clips, 0), (clips, 2), (kept, 0), (kept, 0)))
        assert all(torch.equal(video, still[0]) for video, _ in (alone, shared, again, third))
        assert all(torch.equal(mask, alone[1]) for _, mask in (shared, again, third))
        assert not torch.equal(alone[1], still[1])

    def test_training_with_motion_masks_resumes_exactly(self, here, capsys):
        flags = ["--epochs", "2", "--batch-size", "16", "--accum", "1", "--out"]
        assert run(motion, "train", *flags, "whole") == 0
        assert run(motion, "train", *flags, "parts", "--max-steps", 3) == 0
        assert run(train, *flags, "parts") == 2  # would resume with other masks
        assert run(motion, "train", *flags, "parts") == 0
        assert same(saved("whole")["model"], saved("parts")["model"])
        assert "follow motion" in capsys.readouterr().out

    def test_a_picture_of_masks_is_drawn(self, here):
        assert run(motion, "--out", "motion.png") == 0 and Path("motion.png").exists()

    def test_a_set_without_vectors_gets_tube_masks(self):
        save_image(torch.rand(3, 32, 32), "a.png")
        clips = motion.motion_clips(find_videos(".")[0], frames=2, stride=1, size=32)
        assert type(clips) is data.Clips
        assert run(motion, "--data", ".") == 2


SQUARES = torch.zeros(48, 48, dtype=torch.long)  # three segments: 0, and two rectangles
SQUARES[:24, :24], SQUARES[24:, 16:] = 1, 2


def write_png(path, rows, form):
    """A PNG of (H, W) numbers, "gray" or with a palette, "pal8"."""
    image, palette = rows.byte().numpy(), torch.arange(1024).byte().view(256, 4).numpy()
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *rows.shape, form
        content = (image, palette) if form == "pal8" else image
        container.mux(stream.encode(av.VideoFrame.from_ndarray(content, format=form)))
        container.mux(stream.encode(None))


class TestSegment:
    def test_annotations_are_read_as_indices_not_colours(self):
        void = torch.where(torch.arange(48 * 48).view(48, 48) == 47, 255, SQUARES)
        write_png("palette.png", void, "pal8")
        write_png("grey.png", (SQUARES == 1) * 255, "gray")
        assert torch.equal(segment.read_masks({"a": "palette.png"})["a"], SQUARES)
        binary = segment.read_masks({"a": "grey.png"})["a"]
        assert torch.equal(binary, (SQUARES == 1).long())
        save_image(torch.rand(3, 8, 8), "colours.png")
        with pytest.raises(UserError, match="colours"):
            segment.read_mask("colours.png")

    @pytest.mark.parametrize("form", ["gray", "pal8"])
    def test_255_is_void_beside_other_numbers_of_the_video(self, form):
        """Also in a frame of its own that holds 0 and 255 alone."""
        void = torch.arange(48 * 48).view(48, 48) == 47
        write_png("a.png", torch.where(void, 255, SQUARES), form)
        write_png("b.png", void * 255, form)
        found = segment.read_masks({"a": "a.png", "b": "b.png"})
        assert torch.equal(found["a"], SQUARES) and not found["b"].any()

    @pytest.mark.parametrize("read", [segment.read_mask, lambda path: segment.read_image(path, 8)])
    def test_an_unreadable_image_is_named(self, read):
        put({"bad.png": "no image"})
        with pytest.raises(UserError, match="bad.png"):
            read("bad.png")

    def test_tokens_that_know_their_segment_give_100_percent(self):
        true = SQUARES.expand(2, 48, 48)
        tokens = F.one_hot(true[:, ::8, ::8], 16).float()  # a token for 8 x 8 pixels
        tokens += 0.2 * torch.randn(tokens.shape, generator=data.seeded(0))
        found = clusters.maps(tokens, 3, 48, 5, data.seeded(0))
        found = found[:, 4::8, 4::8].repeat_interleave(8, 1).repeat_interleave(8, 2)
        for order in ([0, 1, 2], [2, 0, 1]):  # the numbers mean nothing
            renamed = torch.tensor(order)[true]
            assert torch.equal(clusters.clustering(found, renamed, 3), renamed)

    def test_one_start_of_k_means_finds_ten_clusters(self):
        """Its centres start far apart (k-means++); of random tokens some would share a cluster."""
        true = torch.arange(10).repeat(20)
        tokens = F.one_hot(true, 16) + 0.002 * torch.randn(200, 16, generator=data.seeded(0))
        for seed in range(5):
            found = clusters.kmeans(tokens, 10, data.seeded(seed), restarts=1)
            assert len({*zip(found.tolist(), true.tolist())}) == len(found.unique()) == 10

    def test_a_small_example_by_hand(self):
        true = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        found = clusters.clustering(torch.tensor([1, 1, 1, 2, 2, 2, 0, 2]), true, 3)
        _, ious = clusters.overlaps(found, true, 3, 3)
        assert ious.diagonal().tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 2])
        over = torch.tensor([3, 3, 4, 4, 0, 1, 2, 2])
        assert torch.equal(clusters.overclustering(over, true, 5, 3), true)
        greedy = torch.tensor([[0.9, 0.8], [0.8, 0.0]])  # the best pair alone is not the best sum
        assert clusters.match(greedy) == [1, 0]

    def write_davis(self, rows=SQUARES, length=4):
        """A video of grey images, all with the segments of rows; returns flags."""
        for i in range(length):
            for folder in ("JPEGImages/v", "Annotations/v"):
                Path(folder).mkdir(parents=True, exist_ok=True)
            save_image(rows.float().expand(3, -1, -1) / 20, f"JPEGImages/v/{i}.jpg")
            write_png(f"Annotations/v/{i}.png", rows, "pal8")
        return ["--root", ".", "--frames", 4, "--size", 32, "--out", "out"]

    def damaged(self, name, value, first=0):
        """A checkpoint with `value` added to the weights so named, from the block `first` on."""
        content = saved("run/last.pt")
        for n, weight in content["model"].items():
            if re.search(name, n) and int((re.search(r"blocks\.(\d+)", n) or [0, 9])[1]) >= first:
                weight += value
        torch.save(content, "damaged.pt")
        return ["--init", "damaged.pt"]

    def test_the_tokens_of_a_layer_come_from_the_blocks_up_to_it_alone(self, here):
        """Neither later blocks, damaged here, nor the last norm have a part in them."""
        flags = self.write_davis() + self.damaged(r"encoder\.(blocks|norm)", torch.nan, first=2)
        assert [run(segment, *flags, "--layer", n) for n in (2, 3)] == [0, 1]

    def test_layers_that_the_encoder_lacks_are_refused(self, here, capsys):
        flags = self.write_davis() + ["--init", "run", "--layer", 5]
        assert run(segment, *flags) == 2 and "--layer" in capsys.readouterr().err

    def test_what_overflows_in_fp16_is_computed_in_float32(self, here, capsys):
        flags = self.write_davis() + self.damaged(r"patch_embed\.proj\.bias", 1e6)
        scores = []
        for amp in ("off", "fp16"):
            assert run(segment, *flags, "--amp", amp) == 0
            scores.append(read_json("out")["videos"])
        assert scores[0] == scores[1] and "float32" in capsys.readouterr().out

    def test_tokens_that_are_not_finite_end_it(self, here, capsys):
        flags = self.write_davis() + self.damaged(r"patch_embed\.proj\.bias", torch.nan)
        assert run(segment, *flags) == 1 and "not finite" in capsys.readouterr().err

    def test_an_unreadable_image_ends_it_by_name(self, here, capsys):
        flags = self.write_davis()
        put({"JPEGImages/v/2.jpg": "no image"})
        assert run(segment, *flags, "--init", "run") == 2
        assert "v/2.jpg" in capsys.readouterr().err

    def test_more_segments_than_letters_are_told_apart(self, here):
        flags = self.write_davis(torch.arange(30)[:, None].repeat_interleave(3, 0).expand(90, 48))
        assert run(segment, *flags, "--init", "run", "--size", 96) == 0
        assert 0 < read_json("out")["clustering"][0] < 1

    def write_two_videos(self):
        """Of 3 and of 9 frames, some without annotation; in the second one object leaves."""
        for video, length in (("a", 3), ("b", 9)):
            frames, masks = Path("JPEGImages/480p", video), Path("Annotations/480p", video)
            frames.mkdir(parents=True)
            masks.mkdir(parents=True)
            for i in range(length):
                rows = torch.where((SQUARES == 2) & torch.tensor(i > 3), 0, SQUARES)
                save_image(0.2 + 0.3 * rows.float().expand(3, -1, -1), frames / f"{i:05}.jpg")
                if i % 4 != 3:
                    write_png(masks / f"{i:05}.png", rows, "pal8")
        return ["--root", ".", "--model", "tiny", "--frames", 4, "--size", 32, "--out"]

    def test_videos_of_any_length_and_missing_segments(self):
        assert run(segment, *self.write_two_videos(), "out") == 0
        found = read_json("out")
        assert set(found["videos"]) == {"a", "b"} and 0 < found["clustering"][0] <= 1

    def test_two_processes_find_the_segments_that_one_finds(self):
        flags = self.write_two_videos()
        assert run(segment, *flags, "one") == 0
        assert in_two_processes(segment.main, *flags, "two").count("mIoU") == 2
        assert read_json("two")["videos"] == read_json("one")["videos"]

    def test_segments_are_shown_as_pictures_and_videos(self):
        assert run(segment, *self.write_two_videos(), "out", "--pictures") == 0
        assert Path("out/a.png").exists()
        assert decode("out/b.mp4", lambda n: [[0]])[0].shape[-2:] == (32, 128)

    def test_clips_to_segment_are_like_those_of_the_run(self, here):
        self.write_two_videos()
        assert run(segment, "--root", ".", "--init", "run", "--out", "out") == 0
        found = read_json("out")["args"]
        assert (found["frames"], found["size"]) == (8, 32)

    def test_a_short_clip_is_filled_with_its_last_frame(self, here):
        for root, numbers in (("short", (0, 1, 2)), ("filled", (0, 1, 2, 2))):
            for i, number in enumerate(numbers):
                put({f"JPEGImages/v/{i}.jpg": "", "Annotations/v/0.png": ""}, root)
                image = torch.rand(3, 48, 48, generator=data.seeded(number))
                save_image(image, f"{root}/JPEGImages/v/{i}.jpg")
            write_png(f"{root}/Annotations/v/0.png", SQUARES, "pal8")
            assert run(segment, "--root", root, "--init", "run", "--frames", 4,
                       "--out", f"of-{root}") == 0
        assert read_json("of-short")["videos"] == read_json("of-filled")["videos"]

    def test_a_folder_without_annotations_is_refused(self):
        put({"JPEGImages/v/1.jpg": ""})
        assert run(segment, "--root", ".") == 2

    def test_many_grey_segments_are_not_taken_for_soft_edges(self):
        """20 numbers and void are segments; a grey edge of an object of 255 is none."""
        many = torch.arange(48 * 48).view(48, 48) % 21
        write_png("many.png", torch.where(many == 0, 255, many), "gray")
        write_png("soft.png", torch.where(SQUARES == 2, 127, (SQUARES == 1) * 255), "gray")
        assert torch.equal(segment.read_masks({"a": "many.png"})["a"], many)
        assert torch.equal(segment.read_masks({"a": "soft.png"})["a"], (SQUARES == 1).long())

    def test_matching_is_the_best_of_all_orders(self):
        orders = torch.tensor(list(permutations(range(6))))  # 720 6
        for seed in range(50):
            scores = torch.rand(6, 6, generator=data.seeded(seed))
            best = orders[scores[torch.arange(6), orders].sum(dim=1).argmax()]
            assert clusters.match(scores) == best.tolist()


def test_what_scripts_write_has_the_mode_that_the_umask_asks_for(here):
    put({"v.mp4": 90}, "set")
    hf = "safetensors" if importlib.util.find_spec("safetensors") else "bin"
    umask = os.umask(0o027)
    try:
        assert [run(script, *words) for script, *words in (
            (features, "--init", "run", "--data", "set", "--out", "out"),
            (windows, "--init", "run", "--data", "set", "--window", 8, "--out", "out"),
            (weights, "import", "run", "out/ours.pt"), (curves, "run", "--out", "out/curves.svg"),
            (weights, "export", "run", "--to", "hf", "out/hf"),
            (videos, "check", "set", "--out", "out/check", "--workers", 0),
            (videos, "prepare", "set", "out/prepared", "--workers", 0))] == [0] * 7
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("out").rglob("*.*")}
    assert modes.keys() >= {"features.pt", "v.npy", "windows.json", "ours.pt", "curves.svg",
                            "train.csv", "v.mp4"} and any(hf in name for name in modes)
    assert set(modes.values()) == {0o640}, modes


class TestPages:
    """The pages beside the scripts say what runs."""

    def snippets(self, page):
        text = (Path(__file__).parent / page).read_text(encoding="utf-8")
        return re.findall(r"```python\n(.*?)```", text, re.S)

    def test_the_answers_print_what_they_say(self, capsys):
        space = {}
        for snippet in self.snippets("questions.md"):
            exec(snippet, space)
            said = re.findall(r"^(?:print\(.*\)  )?# (.*)$", snippet, re.M)
            assert said == capsys.readouterr().out.splitlines(), snippet

    @pytest.mark.parametrize("page", ["../README.md", "README.md", "activitynet.md"])
    def test_scripts_know_the_flags_and_words_of_the_pages_commands(self, page, capsys):
        """But not ActionFormer's, with its configs/. That the commands work, other tests show."""
        text = (Path(__file__).parent / page).read_text(encoding="utf-8").replace("\\\n", " ")
        command = r"(?:python|torchrun)(?: -\S+)* ((?:extras/)?\w+)\.py([^`|\n&#]*)"
        commands = [(name, words.split()) for name, words in re.findall(command, text)
                    if name != "sigma" and "configs/" not in words]
        for name, words in commands:
            with pytest.raises(SystemExit) as end:
                importlib.import_module(name.replace("/", ".")).main([*words, "--help"])
            shown = capsys.readouterr().out
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            assert end.value.code == 0 and all(f"{flag} " in shown for flag in flags), (name, words)
        assert commands

    def test_ideas_run_and_resume_under_their_own_name_only(self, here):
        ideas = dict.fromkeys(("BlockMask", "Centred", "MovingAverage"))
        space = {}
        exec(self.snippets("ideas.md")[0], space)
        for name in ideas:
            out = Path("out", f"toy-tiny-mlp-{name}")
            assert (out / "last.pt").exists()
            assert run(train, "--max-steps", 2, "--out", out) == 2  # without the class
        train.main(["--max-steps", "2"], model_class=space["MovingAverage"])

    def test_an_idea_of_a_moving_average_follows_the_encoder_slowly(self, here):
        space = {}
        exec(self.snippets("ideas.md")[0], space)
        model = space["MovingAverage"](**sigma.sizes_for("tiny"))
        before = {name: w.clone() for name, w in model.average.state_dict().items()}
        for weight in model.encoder.parameters():
            weight.data += 1
        model(torch.randn(2, 3, 8, 32, 32), tube_mask(2, (2, 4, 4), 0.75))
        for name, weight in model.average.state_dict().items():
            assert torch.allclose(weight, before[name] + 0.004, atol=1e-5)

    def test_an_idea_of_a_mask_and_of_an_assignment_do_what_they_say(self, here):
        space = {}
        exec(self.snippets("ideas.md")[0], space)
        clips = space["BlockMask"]([], frames=8, stride=1, size=32, tube=(4, 8, 8), repeat=3)
        mask = clips.masks(data.seeded(0)).view(3, 2, 4, 4)
        assert ((~mask).sum(dim=(2, 3)) == 4).all() and (mask == mask[:, :1]).all()
        scores = torch.tensor([[0.9, 0.0], [0.9, 0.4], [0.8, 0.0]])
        assert space["Centred"].assign(None, scores).tolist() == [0, 1, 0]

    def test_teachers_and_a_model_of_transformers_run(self, here, capsys):
        pytest.importorskip("transformers")
        space = {}
        for snippet in self.snippets("ideas.md"):
            exec(snippet, space)
        assert "torch.Size([]) torch.Size([64, 32])" in capsys.readouterr().out
        video = torch.randn(2, 3, 8, 32, 32)
        for name in ("dinov2", "siglip", "vjepa2"):
            assert Path("out", f"toy-tiny-dino-{name}", "last.pt").exists()
            teacher = space[name](None, (4, 8, 8))
            changed = video.clone()
            changed[:, :, 4:] += torch.randn(2, 3, 4, 32, 32)
            a, b = teacher(video), teacher(changed)
            assert a.shape == (2, 32, teacher.dim)
            if name != "vjepa2":  # frame by frame: the first slice stays as it was
                assert torch.allclose(a[:, :16], b[:, :16], atol=1e-5)
            assert not torch.allclose(a[:, 16:], b[:, 16:], atol=1e-5)

    def test_the_picture_of_sinkhorn_is_what_its_script_draws(self):
        assert run(sinkhorn_script, "drawn.svg") == 0
        drawn, kept = (Path(path).read_text(encoding="utf-8") for path in (
            "drawn.svg", Path(train.__file__).parent / "assets" / "sinkhorn.svg"))
        numbers = r"(?<=>)\d\.\d\d(?=<)"  # may differ in the last digit
        a, b = ([float(x) for x in re.findall(numbers, text)] for text in (drawn, kept))
        assert len(a) == 10 * 18 + 9 * 3 and a == pytest.approx(b, abs=0.011)
