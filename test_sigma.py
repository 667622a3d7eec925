"""What each part of SIGMA must do, as short tests: python -m pytest -q. No network, no GPU."""
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import av
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.utils import save_image

import data
import sigma
import train
from sigma import Teacher, UserError, build_model, load_model, sinkhorn, split_mask, tube_mask

HERE = Path(__file__).resolve().parent
SIZE, TUBE, GRID = (4, 32, 32), (2, 8, 8), (2, 4, 4)  # a clip, a tube, a clip in tubes
torch.manual_seed(0)
VIDEO, MASK = torch.randn(4, 3, *SIZE).double(), tube_mask(4, GRID, 0.75)
VISIBLE, HIDDEN = split_mask(MASK)
FEATURES = torch.randn(4, 32, 16).double()  # as a teacher gives them
SCORES = F.normalize(torch.randn(700, 16), dim=1) @ F.normalize(torch.randn(16, 50), dim=0)


def small(target="mlp"):
    """A model that takes milliseconds, in float64 so that equal means equal."""
    torch.manual_seed(0)
    return build_model("tiny", target=target, dim=32, depth=2, heads=2, decoder_dim=16, tube=TUBE,
                       decoder_depth=1, target_dim=16, prototypes=20).double()


def plain_sinkhorn(scores, eps=0.05, iters=10):
    """The textbook iteration in float64."""
    q = (scores.double() / eps).exp()
    for _ in range(iters):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def dino(side=2, width=128):
    """A small DINO of torch's own layers, and its random weights in DINO's names."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0, F.gelu, 1e-6,
                                       batch_first=True, norm_first=True)
    vit = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width, eps=1e-6), False)
    vit.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
    vit.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    vit.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    names = {"layers": "blocks", "self_attn.in_proj_": "attn.qkv.", "self_attn.out_": "attn.",
             "linear": "mlp.fc"}
    return vit, {re.sub("|".join(names), lambda old: names[old[0]], name): weight
                 for name, weight in vit.state_dict().items()}


class TestMethod:
    def test_positions_and_masks_are_as_published(self):
        """Sinusoids; each clip's tubes are hidden at its own positions, the same in all slices."""
        angle = torch.arange(50)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        wanted = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
        assert torch.allclose(sigma.positions(50, 8), wanted, atol=1e-5)
        slices = tube_mask(6, (8, 14, 14)).view(6, 8, 196)
        assert (slices.sum(dim=2) == 176).all() and (slices == slices[:, :1]).all()
        assert len(slices[:, 0].unique(dim=0)) == 6

    def test_the_video_model_written_out(self):
        """The encoder is its blocks on visible tokens; the decoder sees them, then mask tokens."""
        assert torch.equal(VIDEO, rearrange(sigma.take_tubes(VIDEO, TUBE), "b (t h w) c p q r -> "
                                            "b c (t p) (h q) (w r)", t=2, h=4))
        model, encoder = small(), small().encoder
        tokens = encoder.patch_embed.proj(VIDEO).flatten(2).mT + sigma.positions(32, 32)
        tokens = encoder.norm(encoder.blocks(tokens[~MASK].view(4, 8, 32)))
        assert torch.allclose(encoder(VIDEO, VISIBLE), tokens, atol=1e-12)
        assert torch.equal(encoder(VIDEO), encoder(VIDEO, torch.arange(32).expand(4, -1)))
        hidden_pixels = F.interpolate(MASK.view(4, 1, *GRID).double(), SIZE)
        assert torch.equal(encoder(VIDEO, VISIBLE), encoder(VIDEO + hidden_pixels, VISIBLE))
        place = sigma.positions(32, 16).double().expand(4, -1, -1)
        seen = model.encoder_to_decoder(tokens) + place[~MASK].view(4, 8, 16)
        x = torch.cat([seen, model.mask_token + place[MASK].view(4, 24, 16)], dim=1)
        wanted = model.decoder.head(model.decoder.norm(model.decoder.blocks(x)))[:, 8:]
        assert torch.allclose(model.predict(VIDEO, VISIBLE, HIDDEN), wanted, atol=1e-12)

    @pytest.mark.parametrize("target", ["mlp", "dino", "pixel"])
    def test_the_loss_and_its_gradient_written_out(self, target):
        """Targets are standardised; each branch predicts the other's assignment; prototypes learn
        from the targets' side alone; training steps rescale them first, outside the graph."""
        model = small(target)
        start = model.prototypes.detach().clone() if target != "pixel" else None
        quiet, _ = model.eval()(VIDEO, MASK, FEATURES)  # changes no prototypes
        assert target == "pixel" or torch.equal(model.prototypes, start)
        pixels = rearrange(VIDEO, "b c (t p) (h q) (w r) -> b (t h w) (p q r) c", p=2, q=8, r=8)
        pixels = pixels * torch.tensor(sigma.IMAGENET_STD) + torch.tensor(sigma.IMAGENET_MEAN)
        x, dim = (FEATURES, 1) if target == "dino" else (pixels, 2)  # over all tubes, or in each
        x = (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)
        x = x[MASK].flatten(1)  # of hidden tubes, in the order frame, row, column, channel
        true = model.projector(x) if target == "mlp" else x
        video = model.predict(VIDEO, VISIBLE, HIDDEN).flatten(0, 1)
        loss, _ = model.train()(VIDEO, MASK, FEATURES)
        if target == "pixel":
            wanted = (video - true).square().mean()
        else:
            assert torch.equal(model.prototypes, F.normalize(start, dim=1))
            scores = (F.normalize(video, dim=1) @ model.prototypes.detach().T,
                      F.normalize(true, dim=1) @ model.prototypes.T)
            hard = [plain_sinkhorn(s.detach()).argmax(dim=1) for s in scores]
            wanted = -sum((s / 0.1).log_softmax(dim=1)[range(96), other].mean()
                          for s, other in zip(scores, reversed(hard)))
        assert torch.allclose(loss, wanted, rtol=1e-6) and torch.allclose(loss, quiet)
        gradients = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, wanted))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))

    @pytest.mark.parametrize("eps, iters", [(0.005, 10), (0.03, 1), (0.05, 3), (0.1, 10)])
    @pytest.mark.parametrize("scores", [SCORES, torch.eye(30) * 2 - 1, torch.ones(20, 6),
                                        torch.tensor([[1.0, -1, -1]] * 50)])
    def test_sinkhorn_equals_the_plain_iteration(self, scores, eps, iters):
        """In float32 under autocast too, and for two branches, which share the all-reduces."""
        plain = plain_sinkhorn(scores, eps, iters)
        assert torch.allclose(sinkhorn(scores.double(), eps, iters), plain, rtol=1e-9, atol=1e-300)
        with torch.autocast("cpu", torch.bfloat16):
            both = sinkhorn([scores, -scores], eps, iters)
        assert torch.allclose(both[0].double(), plain, rtol=1e-3, atol=1e-6)
        assert both[1].dtype == sinkhorn(scores.bfloat16()).dtype == torch.float32

    def test_sinkhorn_uses_all_prototypes_equally(self):
        scores = SCORES.clone()
        scores[:, 0] += 0.9  # every tube's nearest prototype is the first
        soft = sinkhorn(scores, iters=50)
        assert torch.allclose(soft.sum(dim=1), torch.ones(700), atol=1e-5)
        assert torch.allclose(soft.sum(dim=0), torch.full((50,), 700 / 50), rtol=1e-3)
        assert soft.argmax(dim=1).bincount(minlength=50).min() > 700 / 50 / 3

    def test_weights_and_loss_start_as_published(self):
        model = build_model("small", tube=TUBE, prototypes=500)
        for name, w in [*model.encoder.named_parameters(), *model.decoder.named_parameters()]:
            if w.ndim == 2:  # xavier-uniform
                bound = (6 / sum(w.shape)) ** 0.5
                assert 0.95 * bound < w.abs().max() <= bound, name
            elif "patch_embed" not in name:
                assert (w == float("norm" in name and "weight" in name)).all(), name
        assert model.encoder_to_decoder.weight.abs().max() <= 1 / 384 ** 0.5  # torch's default
        assert 0 < model.mask_token.abs().max() <= 0.02 and 0.95 < model.prototypes.std() < 1.05
        loss, _ = model(torch.randn(4, 3, 16, 64, 64), tube_mask(4, (8, 8, 8)))
        assert 0.9 < loss / math.log(500) / 2 < 1.1

    def test_sizes_that_do_not_fit_and_uneven_masks_stop(self):
        model, uneven = small(), MASK ^ (torch.arange(128).view(4, 32) == 0)
        assert model.encoder(torch.zeros(1, 3, 2, 328, 16).double()).shape == (1, 82, 32)
        for call, words in ((lambda: model.encoder(VIDEO[..., :30, :]), "4, 30, 32"),
                            (lambda: model(VIDEO, MASK[:, :31]), "4, 32"),
                            (lambda: model(VIDEO, uneven), "same number"),
                            (lambda: small("dino")(VIDEO, MASK), "Teacher")):
            with pytest.raises(ValueError, match=words):
                call()

    @pytest.mark.parametrize("recompute, compiled", [(True, False), (False, True)])
    def test_recomputed_or_compiled_blocks_give_the_same_gradient(self, recompute, compiled):
        grads, calls = [], []
        for changed in (False, True):
            model = small().float()  # torch 2.6 can't compile attention of doubles on a CPU
            model.encoder.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(changed))
            train.set_blocks(model.encoder.blocks[:1], recompute and changed, compiled and changed)
            model(VIDEO.float(), MASK)[0].backward()
            grads.append([p.grad for p in model.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads))
        assert compiled or calls == [False, True, True]

    @pytest.mark.parametrize("side, h, w", [(2, 2, 2), (3, 5, 4)])
    def test_the_teacher_gives_dino_s_patch_tokens(self, side, h, w):
        """Of each tubelet's first frame; positions interpolated; float32 under autocast; frozen.
        Our attention has biases on queries and values: DINO's on keys changes nothing."""
        (vit, weights), video = dino(side), torch.randn(2, 3, 4, 16 * h, 16 * w)
        place = vit.pos_embed[:, 1:].mT.unflatten(2, (side, side))
        if (h, w) != (side, side):  # as DINO does it
            scale = ((h + 0.1) / side, (w + 0.1) / side)
            place = F.interpolate(place, scale_factor=scale, mode="bicubic")
        x = vit.patch_embed["proj"](rearrange(video[:, :, ::2], "b c t h w -> (b t) c h w"))
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(4, -1, -1)
        wanted = vit(torch.cat([first, (x + place).flatten(2).mT], dim=1))[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = Teacher(weights).train()(video.requires_grad_())
        assert torch.allclose(tokens.view(wanted.shape), wanted, atol=1e-4) and not tokens.grad_fn
        assert Teacher(weights, TUBE)(video[..., :16]).shape == (2, 2 * 2 * h * 2, 128)

    @pytest.mark.parametrize("target, e", [("mlp", 256), ("dino-s", 384), ("pixel", 1536)])
    def test_published_checkpoints_load_wholly_or_stop(self, target, e, tmp_path):
        """Names and shapes as published, of a ViT-S with one block; flags may lie beside them."""
        shapes = {"mask_token": (1, 1, 192), "encoder_to_decoder.weight": (192, 384)}
        layers = {"encoder.patch_embed.proj": (384, 3, 2, 16, 16), "encoder.norm": (384,),
                  "decoder.norm": (192,), "decoder.head": (e, 192)}
        if target == "mlp":
            layers |= {"head.0": (1024, 1536), "head.2": (1024, 1024), "head.4": (512, 1024),
                       "head.6": (256, 512)}
        if target != "pixel":
            shapes["prototypes"] = (3000, e)
        for block, d in (("encoder.blocks.0.", 384), ("decoder.blocks.0.", 192)):
            layers |= {block + "norm1": (d,), block + "norm2": (d,), block + "attn.proj": (d, d),
                       block + "mlp.fc1": (4 * d, d), block + "mlp.fc2": (d, 4 * d)}
            shapes |= {block + "attn.qkv.weight": (3 * d, d), block + "attn.q_bias": (d,),
                       block + "attn.v_bias": (d,)}
        for name, shape in layers.items():
            shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
        content = {"model": {name: torch.randn(shape) for name, shape in shapes.items()}}
        torch.save(content | {"args": train.parse([]), "epoch": 799}, tmp_path / "a.pth")
        model = load_model(tmp_path / "a.pth")
        assert model.target == target and model.encoder.blocks[0].attn.heads == 6
        for name, weight in content["model"].items():
            assert torch.equal(model.get_parameter(re.sub("^head", "projector", name)), weight)
        del content["model"]["decoder.norm.bias"]
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError, match="decoder.norm.bias"):
            load_model(tmp_path / "a.pth")

    def test_damaged_and_harmful_files_stop_and_run_nothing(self, tmp_path):
        harm = {"__reduce__": lambda _: (os.mkdir, (str(tmp_path / "harm"),))}
        torch.save({"model": {}, "args": type("Harm", (), harm)()}, tmp_path / "a.pt")
        (tmp_path / "last.pt").write_bytes(b"junk")
        for name, word in (("a.pt", "mkdir"), ("", "a.pt"), ("no", "no")):
            with pytest.raises(UserError, match=word):  # a damaged last.pt names what is beside it
                load_model(tmp_path / name)
        assert not (tmp_path / "harm").exists()

    def test_parts_can_be_copied_with_their_imports(self):
        source = inspect.getsource(sigma)
        imports = "\n".join(re.findall("^import .*|^from .*", source, re.M))
        encoder = source[source.index("def positions"):source.index("class Decoder")]
        parts = {"tube_mask(2, (2, 4, 4))": inspect.getsource(tube_mask),
                 "sinkhorn(torch.rand(9, 4))": inspect.getsource(sinkhorn),
                 "symmetric_loss": inspect.getsource(sigma.symmetric_loss),
                 "Encoder(dim=32, depth=1, heads=2)(torch.rand(1, 3, 2, 32, 32))": encoder}
        for call, part in parts.items():
            exec(f"{imports}\n{part}\n{call}", {})


def write_numbered(path, codec="libx264", times=range(60), rate=25, **options):
    """A video whose frame i has a white bar of i pixels. times: when each is shown, in frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        for i, when in enumerate(times):
            image = (torch.arange(128) < i).byte().expand(48, 128).contiguous() * 255
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="gray")
            frame.pts = when
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers_in(path, *clips):
    return [[(frame[0, 24] > 127).sum().item() for frame in clip]
            for clip in data.decode(str(path), lambda n: clips)]


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(*arguments):
    return {Path(path).name: label for path, label in data.find_videos(*arguments)[0]}


def clips_of(folder, **changes):
    shape = dict(frames=4, stride=2, size=32, tube=TUBE, ratio=0.75)
    return data.Clips(data.find_videos(folder)[0], **shape | changes)


class TestData:
    @pytest.mark.parametrize("file, codec, options", [
        ("one-key-frame.mp4", "libx264", {"bf": "3", "g": "250"}),
        ("open-groups.mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
        ("rounded-stamps.mkv", "libx264", {"rate": 24, "bf": "2", "g": "10"}),
        ("h264.ts", "libx264", {"g": "10"}), ("mpeg2.ts", "mpeg2video", {"bf": "2", "b": "2M"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "b": "2M"}),
        ("vp9.webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"})])
    def test_decoding_gives_exactly_the_frames_asked_for(self, file, codec, options, tmp_path):
        """The last one is held where a video ends."""
        write_numbered(tmp_path / file, codec, range(100), **options)
        for start, stride in ((0, 1), (1, 2), (11, 4), (29, 3), (38, 4), (84, 1), (90, 2)):
            clip = [start + stride * i for i in range(16)]
            assert numbers_in(tmp_path / file, clip) == [[min(i, 99) for i in clip]]
        assert numbers_in(tmp_path / file, [50, 90], [7]) == [[50, 90], [7]]

    @pytest.mark.parametrize("times", [range(-10, 50), [i + i // 10 * 5 for i in range(60)]])
    def test_frames_are_chosen_by_time(self, times, tmp_path):
        """Also where an edit list cuts off those before zero, and where the rate is variable."""
        write_numbered(tmp_path / "v.mp4", times=times, bf="2", g="8")
        with av.open(str(tmp_path / "v.mp4")) as container:
            step = 25 / container.streams.video[0].average_rate
        clip = range(0, 40, 3)
        wanted = [max(n for n, when in enumerate(times) if when <= i * step) for i in clip]
        assert numbers_in(tmp_path / "v.mp4", clip) == [wanted] != [list(clip)]

    def test_damaged_files_say_why_they_cannot_be_read(self, tmp_path):
        path = tmp_path / "v.mp4"
        write_numbered(path, bf="2", g="12")
        good = path.read_bytes()
        media, half = good.index(b"mdat") + 8, len(good) // 2
        noise = bytes((i * 7919 + i // 251) % 256 for i in range(half))
        for content, word in ((b"", "Invalid"), (noise, "Invalid"), (good[:half], "Invalid"),
                              (good[:media] + noise[media:] + good[half:], "be read"),
                              (good.replace(b"avc1", b"zzz9"), "known codec")):
            path.write_bytes(content)
            with pytest.raises(data.VideoError, match=word):
                numbers_in(path, range(60))

    def test_an_image_is_a_clip_that_stands_still(self, tmp_path):
        image = torch.rand(3, 20, 24)
        save_image(image, tmp_path / "0%03d.png")
        clip, = data.decode(data.find_videos(tmp_path)[0][0][0], lambda n: [[0] * 8])
        assert clip.shape == (8, 3, 20, 24) and (clip / 255 - image).abs().max() < 0.01

    def test_videos_are_found_in_folders_and_lists(self, tmp_path):
        """Named pipes are none: opening one would block for ever. Bad lines are quoted."""
        put(tmp_path, "set/wave/a b.mp4", "set/wave/c.webm", "set/clap/e/d.avi", "set/clap/x.txt")
        os.mkfifo(tmp_path / "set/wave/pipe.mp4")
        assert found(tmp_path / "set") == {"d.avi": 0, "a b.mp4": 1, "c.webm": 1}
        assert found(tmp_path / "set/wave") == {"a b.mp4": -1, "c.webm": -1}
        lines = ["set/wave/a b.mp4 7", "set/wave/c.webm", f"{tmp_path}/set/clap/e/d.avi\t0",
                 "gone.mp4 1", "set/wave/c.webm cat", "set/wave/pipe.mp4 1"]
        (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        assert found(tmp_path / "list.csv") == {"a b.mp4": 7, "c.webm": -1, "d.avi": 0}
        skipped = data.find_videos(tmp_path / "list.csv")[2]
        assert all(f'line {n}, "{lines[n - 1]}"' in skipped[n - 4] for n in (4, 5, 6))

    def test_classes_are_numbered_once_by_name_for_all_splits(self, tmp_path):
        put(tmp_path, "a/train/clap/1.mp4", "a/train/run/2.mp4", "a/train/wave/3.mp4",
            "a/val/wave/4.mp4", "b/wave/5.mp4", "b/run/6.mp4", "c/swim/7.mp4")
        classes = data.find_videos(tmp_path / "a")[1]
        assert found(tmp_path / "a", ("val", "test"), classes) == {"4.mp4": 2}
        assert found(tmp_path / "b", ("val", ""), classes) == {"5.mp4": 2, "6.mp4": 1}
        with pytest.raises(UserError, match="swim"):  # a class that training lacks
            data.find_videos(tmp_path / "c", ("val", ""), classes)

    def test_what_holds_no_videos_stops_with_a_sentence(self, tmp_path):
        put(tmp_path, "empty/x.txt", "ucf/ucfTrainTestlist/classInd.txt", "ucf/UCF-101/A/v.avi")
        (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
        (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n")
        for name, word in (("nowhere", "nowhere"), ("empty", "x.txt"), ("noise.bin", "line 1"),
                           ("ucf", "extras/videos.py"), ("", "extras/videos.py")):
            with pytest.raises(UserError, match=word):
                data.find_videos(tmp_path / name)

    def test_clips_start_anywhere_and_corner_crops_are_the_published(self):
        clips = {tuple(data.pretraining_frames(70, 16, 4)) for _ in range(300)}
        assert clips == {tuple(range(start, start + 64, 4)) for start in range(7)}
        boxes, sides = {data.corner_crop(240, 320) for _ in range(4000)}, [240, 210, 180, 158]
        assert {(h, w) for _, _, h, w in boxes} == {
            (a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
        places = {(top, left) for top, left, h, w in boxes if (h, w) == (180, 180)}
        assert places == {(15 * i, 35 * j) for i in range(5) for j in range(i % 2, 5, 2)}

    def test_the_same_key_gives_the_same_clips_in_any_worker(self, tmp_path, monkeypatch):
        """Another pass gives others, and so does a repeat, from the same decoding."""
        calls, decode = [], data.decode
        monkeypatch.setattr(data, "decode", lambda *a, **o: calls.append(a) or decode(*a, **o))
        write_numbered(tmp_path / "v.mp4")
        clips, keys = clips_of(tmp_path, repeat=2), [(0, 0), (4, 0)]
        alone, shared = (next(iter(data.loader(clips, 2, keys, workers))) for workers in (0, 2))
        for one, two in zip(alone[:2], shared[:2]):
            assert torch.equal(one, two) and len(one.flatten(1).unique(dim=0)) == 4
        assert len(calls) == 2 and alone[0].shape == (4, 3, 4, 32, 32)
        green = (alone[0][:, 1] / 255 - 0.456) / 0.224
        assert torch.allclose(data.normalise(alone[0], "cpu")[:, 1], green, atol=1e-5)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_an_unreadable_video_is_replaced_and_named(self, tmp_path):
        """Hundreds of clips leave no open files or memory behind."""
        write_numbered(tmp_path / "a.mp4", bf="2", g="12")
        (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:2000])
        clips, used = clips_of(tmp_path), []
        *_, index, bad = clips[0, 1]
        assert index == 0 and "b.mp4" in str(bad) and "Invalid data" in str(bad)
        black, _, label, _, bad = clips_of(tmp_path, tries=1)[0, 1]  # evaluation replaces none
        assert label == -1 and len(bad) == 1 and not black.any()
        for i in range(600):
            clips[i, i % 2]
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used.append((len(os.listdir("/proc/self/fd")), pages))
        assert used[-1][0] == used[200][0] and used[-1][1] < used[200][1] + 2000

    def test_each_pass_has_every_video_once_over_all_ranks(self):
        """What a step sees does not depend on how many processes share it, nor on a stop."""
        one = list(islice(data.endless_order(50, 8), 200))
        passes = [[video for _, video in one[i:i + 50]] for i in range(0, 200, 50)]
        assert all(sorted(order) == list(range(50)) for order in passes) and passes[0] != passes[1]
        ranks = [list(islice(data.endless_order(50, 4, rank, world=2), 100)) for rank in range(2)]
        assert [key for i in range(0, 100, 4) for rank in ranks for key in rank[i:i + 4]] == one
        assert list(islice(data.endless_order(50, 8, start=160), 40)) == one[160:]

    def test_the_toy_set_is_the_same_for_the_same_seed(self, here, tmp_path):
        path, label = data.find_videos("data/toy")[0][-1]
        data.render((tmp_path / "again.mp4", label, int(Path(path).stem)))
        assert (tmp_path / "again.mp4").read_bytes() == Path(path).read_bytes()

    def test_no_single_frame_of_a_toy_clip_tells_its_class(self):
        labels, generator = torch.arange(3000) % 8, torch.Generator().manual_seed(0)
        clips = torch.stack([data.toy_clip(label, generator) for label in labels.tolist()]).float()
        for t in (0, 7):
            pixels = F.avg_pool2d(clips[:, t].permute(0, 3, 1, 2), 4).flatten(1)
            scores = train.linear_probe(pixels[:2000], labels[:2000], pixels[2000:])
            assert train.accuracy(scores, labels[2000:]) < 0.167  # 0.125 + 4 standard deviations


RUN = "--epochs 10 --batch-size 16 --accum 2 --seed 3 --eval-every 4 --keep-every 5".split()
OUT = "out/toy-tiny-mlp"  # the default folder; RUN takes 20 steps of 32 clips
TORCHRUN = "-m torch.distributed.run --nproc_per_node=2 --standalone --no-python".split()


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """Works in a folder with a small toy set and a finished run."""
    os.chdir(tmp_path_factory.mktemp("work"))
    data.make_toy("data/toy", train=64, val=32)
    assert run(*RUN) == 0


def run(*flags):
    """The exit code of a run in this process."""
    try:
        return train.launch(train.main, [str(flag) for flag in flags])
    except SystemExit as end:  # argparse's
        return end.code


def run_apart(out, *flags, ranks=1, patch="", reading="None", signals=()):
    """Exit code and output of a run of its own, when it and all that share its output have ended.
    patch: code at its start; reading: before each clip. Signals are sent when it has logged."""
    code = (f"import os, sys, time, data, train\nread = data.Clips.__getitem__\n{patch}\n"
            f"data.Clips.__getitem__ = lambda self, key: {reading} or read(self, key)\n"
            "sys.exit(train.launch(train.main))")
    launcher = [sys.executable, *TORCHRUN] if ranks == 2 else []
    process = subprocess.Popen(
        [*launcher, sys.executable, "-c", code, "--epochs", "999", "--out", out, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(HERE)})
    log = Path(out, "log.jsonl")
    while signals and process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    for number in signals:
        assert process.poll() is None
        os.killpg(process.pid, number)
        time.sleep(0.5)
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def saved(out, file="last.pt"):
    return torch.load(f"{out}/{file}", weights_only=True)


def half_of_the_batch(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model, part = small(), slice(2 * rank, 2 * rank + 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss, stats = parallel(VIDEO[part], MASK[part])
    loss.backward()
    alone = sinkhorn(SCORES.chunk(2)[rank], group=torch.distributed.new_subgroups(1)[0])
    gradients = [p.grad for p in model.parameters()]
    torch.save((loss.detach(), stats, alone, gradients), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class TestTraining:
    def test_a_run_learns_and_leaves_results_that_a_second_shows(self, here, capsys):
        log, results = log_of(OUT), json.loads(Path(OUT, "results.json").read_text())
        assert log[-1]["step"] == 20 and log[-1]["loss"] < log[0]["loss"]
        assert [line["epoch"] for line in log if "knn" in line] == [4, 8]
        assert {"linear_probe", "knn"} == set(results["untrained"]) == set(results["trained"])
        assert saved(OUT, "epoch-0005.pt")["clips_seen"] == 5 * 64
        assert run(*RUN) == 0 and str(results["trained"]["knn"]) in capsys.readouterr().out

    def test_a_stopped_or_killed_run_goes_on_bit_for_bit(self, here):
        """Killed with SIGKILL at any moment; the log has each step once."""
        for position, seconds in ((100, 600), (333, 0)):  # of a clip; from save to save
            run_apart("killed", *RUN, patch=f"train.LOG_STEPS, train.SAVE_SECONDS = 1, {seconds}",
                      reading=f"key[0] == {position} and os.kill(os.getpid(), 9)")
        assert run(*RUN, "--out", "killed", "--max-steps", 15) == 0
        assert run(*RUN, "--out", "killed") == 0
        whole, killed = saved(OUT), saved("killed")
        assert all(torch.equal(w, killed["model"][name]) for name, w in whole["model"].items())
        for i, state in whole["optimizer"]["state"].items():
            assert torch.equal(state["exp_avg"], killed["optimizer"]["state"][i]["exp_avg"])
        steps = [line["step"] for line in log_of("killed")]
        assert steps == sorted(set(steps)) and steps[-1] == 20

    @pytest.mark.parametrize("number", [SIGTERM, SIGUSR1, SIGINT])
    def test_a_signal_to_all_processes_saves_and_ends(self, number, here):
        code, text = run_apart(number.name, "--workers", "2", signals=[number])
        assert code == 0 and "same command goes on" in text
        assert saved(number.name)["clips_seen"] == 64 * log_of(number.name)[-1]["step"] > 0

    def test_a_second_signal_ends_a_waiting_run_with_its_workers(self, here):
        code, _ = run_apart("waits", "--workers", "2", patch="train.LOG_STEPS = 1",
                            reading="key[0] > 63 and time.sleep(999)", signals=[SIGTERM] * 2)
        assert code == -SIGTERM

    @pytest.mark.parametrize("reading, word", [
        ("os.kill(os.getpid(), 9)", "error: "), ("time.sleep(999)", "error: "), ("1 / 0", "Trace")])
    def test_dead_or_stalled_workers_end_in_a_sentence_bugs_do_not(self, reading, word, here):
        code, text = run_apart("fails", "--workers", "2", "--timeout", "5", reading=reading)
        assert code == 1 and word in text and ("Traceback" in text) == (word == "Trace")

    def test_a_non_finite_loss_stops_and_keeps_the_good_checkpoint(self, here, capsys):
        assert run(*RUN, "--out", "nan", "--max-steps", 2) == 0
        checkpoint = saved("nan")
        checkpoint["model"]["encoder.norm.bias"][0] = math.nan
        torch.save(checkpoint, "nan/last.pt")
        assert run(*RUN, "--out", "nan") == 1 and "step 3" in capsys.readouterr().err
        assert saved("nan")["clips_seen"] == 2 * 32

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
    def test_a_full_disk_leaves_the_checkpoint_that_was_there(self, tmp_path):
        (tmp_path / "last.pt").write_bytes(b"old")
        (tmp_path / "last.pt.unfinished").symlink_to("/dev/full")
        with pytest.raises(UserError, match="last.pt can't be written"):
            train.save_atomically(tmp_path / "last.pt", {"step": 3})
        assert os.listdir(tmp_path) == ["last.pt"] and (tmp_path / "last.pt").read_bytes() == b"old"

    @pytest.mark.parametrize("flags, world, videos, wanted", [
        ("", 6, 9999, (35, 3)), ("", 64, 9999, (10, 1)), ("", 1, 12, (12, 1)),
        ("--batch-size 20", 8, 9999, (20, 4)), ("--batch-size 32", 64, 9999, (32, 1)),
        ("--accum 8", 4, 9999, (20, 8)), ("--repeat 4", 16, 9999, (40, 1))])
    def test_the_recipe_fixes_the_global_batch(self, flags, world, videos, wanted):
        args = train.parse(["--data", "k400", *flags.split()])
        assert train.split_batch(args, world, videos) == wanted

    def test_recipes_schedule_and_weight_decay_are_as_published(self):
        for flags, *wanted in (["k400", 16, 4, 800, 0.05, 640], ["ssv2", 16, 2, 800, 0.03, 512],
                               ["ssv2 --model small", 16, 2, 2400, 0.05, 128]):
            args = train.parse(["--data", *flags.split()])
            assert [args.frames, args.stride, args.epochs, args.eps, args.global_batch] == wanted
        rate = [train.learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
        assert rate[0] == 0 and rate[3] == pytest.approx(3 / 9) and rate[9] == rate[10] == 1
        assert rate[55] == pytest.approx(0.55) and rate[-1] == pytest.approx(0.1, abs=1e-3)
        model = build_model("tiny")
        decay = {p: group["weight_decay"] for group in train.make_optimizer(model).param_groups
                 for p in group["params"]}
        assert all(decay[p] == (0 if re.search("bias|norm", name) else 0.05)
                   for name, p in model.named_parameters())

    def test_collapsed_features_are_told_and_said_once(self, here, capsys, monkeypatch):
        healthy = dict(target_term=7.1, video_term=7.4, log_k=8, entropy=7.8, target_entropy=7.8)
        assert not train.collapsed(healthy, 50_000)
        assert not train.collapsed(healthy | dict(entropy=6), 1000)  # few tubes, few prototypes
        for change in (dict(target_entropy=4.5), dict(video_term=8.01), dict(target_term=0.1)):
            assert train.collapsed(healthy | change, 50_000)
        monkeypatch.setattr(train, "LOG_STEPS", 1)
        monkeypatch.setattr(train, "collapsed", lambda *_: True)
        assert run("--epochs", 20, "--out", "collapsed") == 0
        assert capsys.readouterr().out.count("have collapsed") == 1

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_autocast_trains_too_and_the_log_is_json(self, here, amp, monkeypatch):
        """Gradients that overflow in fp16 are null there."""
        scaler = torch.amp.GradScaler(train.DEVICE.type, 2.0 ** 60, enabled=amp == "fp16")
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **options: scaler)
        assert run("--epochs", 4, "--max-steps", 2, "--amp", amp, "--out", amp) == 0
        text = Path(amp, "log.jsonl").read_text()
        assert "Infinity" not in text and ("null" in text) == (amp == "fp16")

    @pytest.mark.parametrize("flags, word", [
        ("--data nowhere", "nowhere"), ("--data bad.csv", "line 1"), ("--init nowhere", "nowhere"),
        ("--init bad.csv", "bad.csv"), (f"--init {OUT} --target pixel", "decoder.head"),
        ("--val nowhere", "nowhere"), ("--out bad.csv", "bad.csv"), ("--epochs 0", "from 1"),
        ("--amp int8", "amp"), ("--bogus", "bogus"), ("--lr nan", "lr"), ("--size 8", "larger"),
        ("--size 30", "multiples"), ("--root x --data mine", "--root"), ("--teacher x", "teacher"),
        ("--repeat 3 --batch-size 64", "--repeat"),
        (f"{' '.join(RUN)} --out {OUT} --lr 0.5", "--lr 0.5 (the run has 0.0")])
    def test_wrong_usage_ends_in_one_sentence_and_code_2(self, here, capsys, flags, word):
        Path("bad.csv").write_text("nothing.mp4 0\n")
        assert run("--out", "never", *flags.split()) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in error and word in error and not Path("never").exists()

    def test_too_many_unreadable_videos_end_the_run_by_name(self, here, tmp_path, capsys):
        write_numbered(tmp_path / "good.mp4")
        put(tmp_path, *(f"bad{i}.mp4" for i in range(8)))
        assert run("--data", tmp_path, "--model", "tiny", "--epochs", 99, "--out", "bad") == 1
        captured = capsys.readouterr()
        assert all(captured.out.count(f"bad{i}.mp4: ") == 1 for i in range(8))
        assert "8 of" in captured.err and Path("bad/last.pt").exists()

    def test_sigma_dino_trains_and_its_teacher_is_downloaded_once(self, here, monkeypatch):
        hashes, weights = [], dino(side=14)[1]
        monkeypatch.setenv("TORCH_HOME", "torch-home")
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, sha, **_:
                            hashes.append(sha) or torch.save(weights, path))
        for out in ("dino-1", "dino-2"):
            assert run("--target", "dino", "--max-steps", 1, "--out", out) == 0
        kept = saved("dino-1")["model"]
        assert kept["prototypes"].shape == (128, 128) and not any("vit" in name for name in kept)
        assert hashes == ["bf34ad0f42"]  # that the file must have

    def test_walk_and_readme_snippets_print_what_they_say(self, here, capsys):
        sigma.walk()
        assert re.findall(r"^\d", capsys.readouterr().out, re.M) == list("123456")
        snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
        assert snippets
        for snippet in snippets:
            exec(snippet, {})
            said = re.findall(r"^print\(.*\) +# (.*)$", snippet, re.M)
            assert said and capsys.readouterr().out.splitlines() == said

    def test_two_processes_give_what_one_gives(self, tmp_path):
        """Loss, gradients and assignments of the whole batch; a group of one balances alone."""
        torch.multiprocessing.spawn(half_of_the_batch, (str(tmp_path),), nprocs=2)
        losses, stats, alone, gradients = zip(*(torch.load(tmp_path / f"{i}.pt") for i in (0, 1)))
        model = small()
        loss, wanted = model(VIDEO, MASK)
        loss.backward()
        assert torch.allclose(sum(losses) / 2, loss, rtol=1e-12)
        for name in ("video_assignment", "target_assignment"):
            assert torch.equal(torch.cat([half[name] for half in stats]), wanted[name])
        for p, *parts in zip(model.parameters(), *gradients):
            assert all(torch.allclose(part, p.grad, rtol=1e-9, atol=1e-14) for part in parts)
        assert torch.equal(alone[1], sinkhorn(SCORES[350:]))

    def test_torchrun_goes_on_where_one_process_stopped(self, here):
        """The same steps on the same clips: another number of processes changes rounding alone."""
        flags = ["--epochs", "3", "--out"]
        assert run(*flags, "one") == run(*flags, "more", "--max-steps", 2) == 0
        code, text = run_apart("more", "--epochs", "3", ranks=2)
        assert code == 0 and "2 processes x 32" in text, text
        one, more = saved("one"), saved("more")
        assert one["clips_seen"] == more["clips_seen"] == 3 * 64
        assert all(torch.allclose(w, more["model"][n], atol=1e-4) for n, w in one["model"].items())

    @pytest.mark.parametrize("number, steps", [(SIGTERM, 7), (SIGKILL, 0)])
    def test_a_signal_to_one_rank_ends_all_at_that_step(self, number, steps, here):
        """SIGTERM saves first, without waiting for a log line; if a rank dies, the job ends."""
        killed = f"key[0] == 440 and os.kill(os.getpid(), {number})"  # of rank 1, in step 7
        code, _ = run_apart(f"rank-{number}", ranks=2, reading=killed, patch="train.LOG_STEPS = 99")
        assert (code == 0) == (number == SIGTERM)
        assert saved(f"rank-{number}")["clips_seen"] == 64 * steps
