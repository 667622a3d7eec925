"""What each part of SIGMA must do, as short tests: `python -m pytest -q`. No network, no GPU, no files from outside."""
import argparse
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from einops import rearrange

import data
import sigma
import train
from data import Clips, Order, UserError, VideoError, decode, find_videos, normalise, pretraining_frames
from sigma import SIGMA, Classifier, Encoder, build_model, sinkhorn, split_mask, symmetric_loss, take_tubes, tube_mask

HERE = Path(__file__).parent
CHILDREN = multiprocessing.get_context("forkserver")                      # starts processes that have torch in a moment
CHILDREN.set_forkserver_preload(["train"])
GRID, TUBE, SIZE = (2, 4, 4), (2, 8, 8), (4, 32, 32)                  # of the clips that the tests give to small models


def small(target="mlp", **changes):
    """A model that takes milliseconds, in float64 so that equal means equal."""
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, tube=TUBE, target_dim=16,
                 prototypes=20, projector_widths=(24,))
    return SIGMA(**sizes | changes, target=target).double()


def batch(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(n, 3, *SIZE, generator=generator, dtype=torch.float64)
    return video, tube_mask(n, GRID, 0.75, generator)


def cosines(n, k, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(m, dim, generator=generator), dim=1) for m in (n, k))
    return a @ b.T


# --- sigma.py: tubes and masks ----------------------------------------------------------------------------------------

def test_positions_are_the_published_sinusoids_and_a_longer_table_begins_with_a_shorter_one():
    table = sigma.positions(50, 8)
    for p, j in ((0, 0), (0, 1), (7, 0), (7, 3), (49, 6), (49, 7)):
        angle = p / 10000 ** (2 * (j // 2) / 8)
        assert table[p, j] == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6)
    assert torch.equal(sigma.positions(20, 8), table[:20])


def test_a_tube_mask_hides_the_same_number_in_each_clip_at_its_own_places_through_all_slices():
    mask = tube_mask(6, (8, 14, 14))
    assert mask.shape == (6, 1568) and mask.sum(dim=1).tolist() == [1408] * 6         # int(0.9 * 196) = 176 in 8 slices
    slices = mask.view(6, 8, 196)
    assert (slices == slices[:, :1]).all()
    assert len({tuple(m.tolist()) for m in slices[:, 0]}) == 6
    again = [tube_mask(2, GRID, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="leave some"):
        tube_mask(1, (8, 14, 14), 1.0)


def test_tubes_put_back_together_give_the_clip():
    video, _ = batch()
    t, h, w = GRID
    tubes = take_tubes(video, TUBE)
    back = rearrange(tubes, "b (t h w) c p q r -> b c (t p) (h q) (w r)", t=t, h=h, w=w)
    assert torch.equal(back, video)
    index = torch.tensor([[3, 17]] * 4)
    assert torch.equal(take_tubes(video, TUBE, index), tubes[:, [3, 17]])


def test_pixel_targets_are_standardised_tubes_in_the_order_frame_row_column_channel():
    video, mask = batch(1)
    _, hidden = split_mask(mask, "cpu")
    target = small("pixel").embed(video, hidden)
    n = hidden[0, 5].item()
    t, h, w = n // 16, n // 4 % 4, n % 4
    mean, std = (torch.tensor(v).double()[:, None, None, None] for v in (sigma.IMAGENET_MEAN, sigma.IMAGENET_STD))
    tube = (video[0] * std + mean)[:, 2 * t:2 * t + 2, 8 * h:8 * h + 8, 8 * w:8 * w + 8]         # 3 frames rows columns
    for channel, frame, row, column in ((0, 0, 0, 0), (2, 1, 7, 3), (1, 0, 4, 5)):
        values = tube[channel]
        expected = (values[frame, row, column] - values.mean()) / (values.std() + 1e-6)
        found = target[0, 5, frame * 8 * 8 * 3 + row * 8 * 3 + column * 3 + channel]
        assert found.item() == pytest.approx(expected.item(), abs=1e-9)


# --- sigma.py: encoder ------------------------------------------------------------------------------------------------

def test_the_masked_encoder_equals_its_blocks_run_on_the_visible_tokens_of_the_full_embedding():
    encoder, (video, mask) = small().encoder, batch()
    tokens = encoder.patch_embed.proj(video).flatten(2).transpose(1, 2) + sigma.positions(32, 32)      # by convolution
    tokens = torch.stack([clip[~m] for clip, m in zip(tokens, mask)])
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.allclose(encoder(video, mask), encoder.norm(tokens), atol=1e-12)
    nothing_hidden = torch.zeros_like(mask)
    assert torch.allclose(encoder(video), encoder(video, nothing_hidden), atol=1e-12)


def test_attention_is_scaled_softmax_with_a_bias_on_queries_and_values_but_not_on_keys():
    layer, x = small().encoder.blocks[0].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    torch.nn.init.normal_(layer.q_bias)
    torch.nn.init.normal_(layer.v_bias)
    w_q, w_k, w_v = layer.qkv.weight.split(32)
    q, k, v = x @ w_q.T + layer.q_bias, x @ w_k.T, x @ w_v.T + layer.v_bias
    heads = [(q[..., h] @ k[..., h].transpose(1, 2) / 16 ** 0.5).softmax(dim=-1) @ v[..., h]
             for h in (slice(0, 16), slice(16, 32))]
    assert torch.allclose(layer(x), layer.proj(torch.cat(heads, dim=2)), atol=1e-12)


def test_the_decoder_sees_visible_tokens_then_mask_tokens_each_at_its_place_and_answers_for_the_hidden():
    model, (video, mask) = small(), batch(1)
    visible, hidden = split_mask(mask, "cpu")
    table = sigma.positions(32, 16).double()
    x = model.encoder_to_decoder(model.encoder(video, mask))[0] + table[~mask[0]]
    x = torch.cat([x, model.mask_token[0] + table[mask[0]]])[None]
    for block in model.decoder.blocks:
        x = block(x)
    expected = model.decoder.head(model.decoder.norm(x))[:, 8:]
    assert torch.allclose(model.predict(video, mask, visible, hidden), expected, atol=1e-12)


def test_weights_start_as_published():
    model = build_model("tiny")
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith(("encoder.", "decoder.")):                         # xavier-uniform
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound, name
        elif name.startswith(("encoder.", "decoder.")) and "patch_embed" not in name:              # norms 1, biases 0
            assert (weight == float("norm" in name and "weight" in name)).all(), name
    assert model.encoder_to_decoder.weight.abs().max() <= 1 / 128 ** 0.5                           # torch's default
    assert 0 < model.mask_token.abs().max() <= 0.02 and model.prototypes.std().item() == pytest.approx(1, abs=0.05)


def test_changing_hidden_pixels_changes_no_token():
    encoder, (video, mask) = small().encoder, batch()
    hidden = mask.view(4, 1, *GRID).repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = torch.where(hidden, video + 1, video)
    assert torch.equal(encoder(video, mask), encoder(other, mask))
    assert not torch.equal(encoder(video), encoder(other))


@pytest.mark.parametrize("size, tokens", [((2, 16, 16), 4), ((4, 32, 48), 48), ((2, 328, 320), 1640)])
def test_the_encoder_takes_any_size_that_the_tube_divides(size, tokens):
    encoder = small().encoder
    assert encoder(torch.zeros(1, 3, *size, dtype=torch.float64)).shape == (1, tokens, 32)


def test_wrong_sizes_and_uneven_masks_stop_with_a_sentence():
    model, (video, mask) = small(), batch()
    with pytest.raises(ValueError, match=r"divisible by the tube \(2, 8, 8\), found \(4, 30, 32\)"):
        model.encoder(video[..., :30, :])
    with pytest.raises(ValueError, match=r"must have the shape \(4, 32\), found \(4, 31\)"):
        model.encoder(video, mask[:, :31])
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match="same number"):
        model(video, mask)
    with pytest.raises(ValueError, match="needs features of all tubes"):
        small("dino")(*batch())
    with pytest.raises(ValueError, match=r"shape \(4, 32, 16\), found \(4, 33, 16\)"):
        small("dino")(*batch(), torch.zeros(4, 33, 16))


# --- sigma.py: Sinkhorn -----------------------------------------------------------------------------------------------

def plain_sinkhorn(scores, eps, iters):
    """The textbook iteration in float64."""
    q = (scores.double() / eps).exp()
    for _ in range(iters):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def test_sinkhorn_gives_each_tube_one_and_each_prototype_an_equal_share():
    soft = sinkhorn(cosines(600, 40), eps=0.05, iters=50)
    assert torch.allclose(soft.sum(dim=1), torch.ones(600), atol=1e-5)
    assert torch.allclose(soft.sum(dim=0), torch.full((40,), 600 / 40), rtol=1e-3)


@pytest.mark.parametrize("eps", [0.03, 0.05, 0.1])
@pytest.mark.parametrize("iters", [1, 3, 10])
def test_sinkhorn_equals_the_plain_iteration(eps, iters):
    scores = cosines(700, 50)
    plain = plain_sinkhorn(scores, eps, iters)
    assert torch.allclose(sinkhorn(scores, eps, iters).double(), plain, rtol=1e-4, atol=1e-30)
    assert torch.allclose(sinkhorn(scores.double(), eps, iters), plain, rtol=1e-10, atol=0)
    both = sinkhorn([scores, -scores], eps, iters)                          # two branches that share the all-reduces
    assert torch.allclose(both[0].double(), plain, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("scores", [cosines(300, 40), torch.eye(30) * 2 - 1, torch.ones(20, 6),
                                    F.one_hot(torch.zeros(50, dtype=int), 8) * 2.0 - 1])  # last: all on one prototype
def test_sinkhorn_stays_exact_at_small_eps(scores):
    soft = sinkhorn(scores, eps=0.005)
    assert soft.isfinite().all() and torch.allclose(soft.double(), plain_sinkhorn(scores, 0.005, 10), atol=1e-5)


def test_sinkhorn_works_in_float32_under_autocast_and_needs_no_gradient():
    scores = cosines(200, 30).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        soft = sinkhorn(scores)
    assert soft.dtype == torch.float32 and not soft.requires_grad
    assert torch.allclose(soft.double(), plain_sinkhorn(scores, 0.05, 10), rtol=1e-4)
    assert sinkhorn(scores.bfloat16()).dtype == torch.float32


def test_hard_assignments_use_all_prototypes_even_where_most_scores_favour_one():
    scores = cosines(2000, 20)
    scores[:, 0] += 0.9                                                   # every tube's nearest prototype is the first
    nearest, assigned = scores.argmax(dim=1), sinkhorn(scores).argmax(dim=1)
    assert (nearest == 0).float().mean() > 0.9
    assert assigned.bincount(minlength=20).min() > 2000 / 20 / 3
    used, entropy = sigma.usage(assigned, 20)
    assert used == 20 and 0.95 * math.log(20) < entropy <= math.log(20) + 1e-6


# --- sigma.py: loss ---------------------------------------------------------------------------------------------------

def gradients(model, video, mask, features=None):
    """The parameters that get a gradient from each term of the loss: {"target_term": names, "video_term": names}."""
    visible, hidden = split_mask(mask, "cpu")
    scores = model.compare(model.predict(video, mask, visible, hidden), model.embed(video, hidden, features))
    hard = [soft.argmax(dim=1) for soft in sinkhorn(list(scores))]
    names, parameters = zip(*model.named_parameters())
    terms = {"target_term": F.cross_entropy(scores[1] / 0.1, hard[0]),
             "video_term": F.cross_entropy(scores[0] / 0.1, hard[1])}
    return {term: {n for n, g in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))
                   if g is not None and g.abs().max() > 0} for term, loss in terms.items()}


def test_the_target_term_trains_projector_and_prototypes_and_the_video_term_the_video_model_alone():
    model = small()
    found = gradients(model, *batch())
    names = {name for name, _ in model.named_parameters()}
    projection = {name for name in names if name.startswith("projector") or name == "prototypes"}
    assert found["target_term"] == projection
    assert found["video_term"] == names - projection


def test_with_features_from_outside_the_target_term_trains_the_prototypes_alone():
    features = torch.randn(4, 32, 16, dtype=torch.float64, requires_grad=True)
    model, (video, mask) = small("dino"), batch()
    assert gradients(model, video, mask, features)["target_term"] == {"prototypes"}
    model(video, mask, features)[0].backward()
    assert features.grad is None


def test_outside_features_are_standardised_per_clip_and_channel_over_all_tubes():
    model, (video, mask) = small("dino"), batch()
    features = torch.randn(4, 32, 16, dtype=torch.float64)
    loss, _ = model(video, mask, features)
    shifted, _ = model(video, mask, features * torch.rand(4, 1, 16).double().add(1) + torch.randn(4, 1, 16))
    assert loss.item() == pytest.approx(shifted.item(), rel=1e-5)
    hidden = split_mask(mask, "cpu")[1]
    expected = (features - features.mean(1, keepdim=True)) / (features.var(1, keepdim=True).sqrt() + 1e-6)
    assert torch.allclose(model.embed(video, hidden, features)[2], expected[2][mask[2]])


def test_the_loss_is_two_cross_entropies_of_the_hard_assignments():
    model, (video, mask) = small(), batch()
    loss, stats = model(video, mask)
    visible, hidden = split_mask(mask, "cpu")
    scores = model.compare(model.predict(video, mask, visible, hidden), model.embed(video, hidden))
    video_hard, target_hard = (plain_sinkhorn(s, 0.05, 10).argmax(dim=1) for s in scores)
    assert torch.equal(stats["video_assignment"], video_hard) and torch.equal(stats["target_assignment"], target_hard)
    rows = torch.arange(len(video_hard))
    logs = [(s / 0.1).log_softmax(dim=1) for s in scores]
    by_hand = -(logs[1][rows, video_hard] + logs[0][rows, target_hard]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert loss.item() == pytest.approx((stats["target_term"] + stats["video_term"]).item(), rel=1e-12)
    assert not any(value.requires_grad for value in stats.values())


def test_the_loss_starts_near_two_ln_k():
    torch.manual_seed(0)
    model = build_model("small", tube=TUBE, prototypes=500)
    loss, stats = model(torch.randn(4, 3, 16, 64, 64), tube_mask(4, (8, 8, 8)))
    assert stats["log_k"].item() == pytest.approx(math.log(500), rel=1e-6)
    for term in ("target_term", "video_term"):
        assert stats[term].item() == pytest.approx(math.log(500), rel=0.1)


def test_prototypes_are_made_unit_length_in_place_and_their_gradient_is_that_of_the_scores():
    model, (video, mask) = small(), batch()
    assert model.prototypes.norm(dim=1).max() > 2
    model(video, mask)[0].backward()
    assert torch.allclose(model.prototypes.norm(dim=1), torch.ones(20, dtype=torch.float64))
    radial = (model.prototypes.grad * model.prototypes).sum(dim=1)       # a graph through the rescaling would have none
    assert radial.abs().max() > 1e-4


def test_the_pixel_target_is_the_mean_squared_error_of_standardised_pixels():
    model, (video, mask) = small("pixel"), batch()
    visible, hidden = split_mask(mask, "cpu")
    difference = model.predict(video, mask, visible, hidden) - model.embed(video, hidden)
    assert model(video, mask)[0].item() == pytest.approx(difference.square().mean().item(), rel=1e-12)
    assert not hasattr(model, "prototypes") and not hasattr(model, "projector")


def test_parameters_have_the_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model("base").state_dict().items()}
    block = {"norm1.weight": (768,), "norm1.bias": (768,), "attn.q_bias": (768,), "attn.v_bias": (768,),
             "attn.qkv.weight": (2304, 768), "attn.proj.weight": (768, 768), "attn.proj.bias": (768,),
             "norm2.weight": (768,), "norm2.bias": (768,), "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,),
             "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,)}
    published = {"mask_token": (1, 1, 384), "prototypes": (3000, 256), "encoder_to_decoder.weight": (384, 768),
                 "encoder.patch_embed.proj.weight": (768, 3, 2, 16, 16), "encoder.patch_embed.proj.bias": (768,),
                 "encoder.norm.weight": (768,), "encoder.norm.bias": (768,), "decoder.norm.weight": (384,),
                 "decoder.norm.bias": (384,), "decoder.head.weight": (256, 384), "decoder.head.bias": (256,)}
    published |= {f"encoder.blocks.{n}.{name}": shape for n in range(12) for name, shape in block.items()}
    published |= {f"decoder.blocks.{n}.{name}": tuple(s // 2 for s in shape)
                  for n in range(4) for name, shape in block.items()}
    widths = (1536, 1024, 1024, 512, 256)
    for n, (i, o) in enumerate(zip(widths, widths[1:])):                   # there called head.0, head.2, head.4, head.6
        published |= {f"projector.{2 * n}.weight": (o, i), f"projector.{2 * n}.bias": (o,)}
    assert shapes == published


@pytest.mark.parametrize("way", ["recompute", "compile"])
def test_recomputed_and_compiled_blocks_give_the_same_loss_and_gradients(way):
    video, mask = batch()
    results = []
    for changed in (False, True):
        model = small().float()                                # torch 2.6 can't compile attention of doubles for a CPU
        for part in (model.encoder, model.decoder):
            part.recompute = changed and way == "recompute"
            for block in part.blocks if changed and way == "compile" else ():
                block.compile()
        loss, _ = model(video.float(), mask)
        loss.backward()
        results.append([loss] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*results))


def test_recomputing_keeps_fewer_activations():
    kept = {}
    for recompute in (False, True):
        model, (video, mask) = small(), batch()
        model.encoder.recompute = model.decoder.recompute = recompute
        kept[recompute] = 0

        def count(tensor):
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(video, mask)
    assert kept[True] < 0.7 * kept[False]


def test_the_free_functions_can_be_copied_with_one_import_line():
    for function, imports, call in ((tube_mask, "import torch", "tube_mask(2, (2, 4, 4))"),
                                    (sinkhorn, "import torch, torch.distributed as dist", "sinkhorn(torch.rand(9, 4))"),
                                    (symmetric_loss, "import torch, torch.nn.functional as F",
                                     "symmetric_loss(*torch.rand(2, 9, 4), *torch.randint(4, (2, 9)))")):
        source = inspect.getsource(function)
        assert exec(f"{imports}\n{source}\n{call}", {}) is None


def test_the_encoder_can_be_copied_with_the_parts_above_it():
    parts = [sigma.positions, sigma.split_mask, sigma.take_tubes, sigma.Attention, sigma.MLP, sigma.Block,
             sigma.TubeEmbedding, sigma.init_linear, sigma.run, sigma.Encoder]
    imports = ("import math, torch, torch.nn.functional as F\nfrom einops import rearrange\nfrom torch import nn\n"
               "from functools import cache\nfrom torch.utils.checkpoint import checkpoint\n")
    space = {}
    exec(imports + "\n".join(map(inspect.getsource, parts)), space)
    assert space["Encoder"](dim=32, depth=1, heads=2)(torch.zeros(1, 3, 2, 32, 32)).shape == (1, 4, 32)


def test_the_walk_prints_a_dozen_lines():
    with redirect_stdout(io.StringIO()) as text:
        sigma.walk()
    assert 10 <= len(text.getvalue().splitlines()) <= 14 and "(1408, 3000)" in text.getvalue()


# --- data.py: decoding. Each test frame carries its own number as eight black or white squares. -----------------------

def numbered_frame(number, height=48, width=64):
    frame = torch.full((height, width, 3), 90, dtype=torch.uint8)
    for bit in range(8):
        top, left = 8 + 16 * (bit // 4), 16 * (bit % 4)
        frame[top:top + 16, left:left + 16] = 255 * (number >> bit & 1)
    return frame


def read_number(frame):
    """The number in a frame (3, H, W)."""
    squares = [frame[:, 16 + 16 * (bit // 4), 8 + 16 * (bit % 4)] for bit in range(8)]
    return sum((square.float().mean().item() > 128) << bit for bit, square in enumerate(squares))


def to_chw(frame):
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


def write_numbered(path, codec="libx264", count=100, rate=25, pts=None, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(i).numpy(), format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


FORMATS = {"h264 with B-frames, one key frame": ("v.mp4", "libx264", dict(bf="3", g="250")),
           "h264 with B-frames, open groups": ("v.mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
           "h264 in matroska, time stamps rounded": ("v.mkv", "libx264", dict(rate=24, bf="2", g="10")),
           "h264 in mpeg-ts": ("v.ts", "libx264", dict(bf="2", g="10")),
           "mpeg2 in mpeg-ts": ("v.ts", "mpeg2video", dict(bf="2", g="12", b="2M")),
           "mpeg4 with B-frames in avi": ("v.avi", "mpeg4", dict(bf="2", g="12", b="2M")),
           "vp9 in webm": ("v.webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"})}


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_gives_exactly_the_frames_asked_for(name, tmp_path):
    file, codec, options = FORMATS[name]
    path = write_numbered(tmp_path / file, codec, **options)
    for start, stride in ((0, 1), (1, 2), (11, 4), (29, 3), (38, 4), (84, 1)):
        wanted = [start + stride * i for i in range(16)]
        assert [read_number(f) for f in decode(path, lambda n: wanted)] == wanted, (start, stride)


def test_the_number_of_frames_is_known_or_nearly_so(tmp_path):
    for name, (file, codec, options) in FORMATS.items():
        counts = []
        decode(write_numbered(tmp_path / file, codec, **options), lambda n: counts.append(n) or [0])
        assert abs(counts[0] - 100) <= 1, name


def test_frames_at_a_variable_rate_are_chosen_by_time(tmp_path):
    gaps = [40, 40, 200, 20, 20, 40, 300, 40, 40, 40] * 4
    pts = [sum(gaps[:i]) for i in range(len(gaps))]
    path = write_numbered(tmp_path / "v.mp4", count=len(pts), pts=pts, bf="2", g="8")
    with av.open(path) as container:
        step = float(1000 / container.streams.video[0].average_rate)
        shown = [round(float(frame.time) * 1000) for frame in container.decode(video=0)]
    wanted = [3 + 2 * i for i in range(14)]
    expected = [max(i for i, t in enumerate(shown) if t - shown[0] <= index * step + 0.1) for index in wanted]
    assert [read_number(f) for f in decode(path, lambda n: wanted)] == expected
    assert expected != wanted


def test_frames_that_an_edit_list_cuts_off_do_not_count(tmp_path):
    source, path = write_numbered(tmp_path / "v.mp4", count=60, g="30"), str(tmp_path / "cut.mp4")
    with av.open(source) as whole, av.open(path, "w") as cut:                      # as `ffmpeg -ss 0.4 -c copy` does it
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - 10 * 512, packet.dts - 10 * 512, stream
                cut.mux(packet)
    with av.open(path) as container:
        shown = [read_number(to_chw(frame)) for frame in container.decode(video=0)]
    assert [read_number(f) for f in decode(path, lambda n: [0, 3, 20, 40])] == [shown[i] for i in (0, 3, 20, 40)]


def test_the_last_frame_is_held_where_a_video_ends_before_the_clip(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", count=10)
    assert [read_number(f) for f in decode(path, lambda n: [4, 8, 12, 16])] == [4, 8, 9, 9]
    path = write_numbered(tmp_path / "one.mp4", count=1)
    assert [read_number(f) for f in decode(path, lambda n: pretraining_frames(n, 4, 4))] == [0] * 4


def damaged_files(folder):
    """Files that can't be read, each with a word of the reason that is expected."""
    good = Path(write_numbered(folder / "good.mp4", bf="2", g="12")).read_bytes()
    media = good.index(b"mdat") + 8
    noise = bytes((i * 7919 + i // 251) % 256 for i in range(len(good)))
    scrambled = good[:media] + noise[media:len(good) * 3 // 4] + good[len(good) * 3 // 4:]
    for name, content, word in (("empty.mp4", b"", "Invalid data"), ("text.mp4", b"hello, I am a text", "Invalid data"),
                                ("noise.mp4", noise[:4096], "Invalid data"), ("scrambled.mp4", scrambled, "be read"),
                                ("cut.mp4", good[:len(good) // 2], "Invalid data")):
        (folder / name).write_bytes(content)
        yield folder / name, word
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    yield folder / "sound.mp4", "no video stream"
    yield folder / "missing.mp4", "No such file"


def test_damaged_files_end_in_a_sentence_that_gives_the_reason(tmp_path):
    foreign = tmp_path / "codec.mp4"
    foreign.write_bytes(Path(write_numbered(tmp_path / "v.mp4")).read_bytes().replace(b"avc1", b"zzz9"))
    for path, word in [*damaged_files(tmp_path), (foreign, "known codec")]:
        with pytest.raises(VideoError, match=word):
            decode(str(path), lambda n: pretraining_frames(n, 16, 4))


# --- data.py: clips ---------------------------------------------------------------------------------------------------

def clips_of(folder, **changes):
    return Clips(find_videos(folder), **dict(frames=4, stride=2, size=32, tube=TUBE, ratio=0.75) | changes)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy set in data/toy, where train.py looks for it."""
    folder = tmp_path_factory.mktemp("work")
    data.make_toy(folder / "data" / "toy", train=64, val=32)
    return folder


def test_pretraining_frames_start_anywhere_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    starts = {tuple(pretraining_frames(70, 16, 4, generator)) for _ in range(300)}
    assert {clip[0] for clip in starts} == set(range(7))                                  # 0 to 70 - 64, both included
    assert all(b - a == 4 for clip in starts for a, b in zip(clip, clip[1:]))
    assert pretraining_frames(30, 16, 4) == [0, 4, 8, 12, 16, 20, 24, 28] + [29] * 8


def test_the_corner_crop_has_ten_shapes_and_thirteen_places():
    generator = torch.Generator().manual_seed(0)
    boxes = {data.corner_crop(240, 320, generator) for _ in range(4000)}
    shapes = {(h, w) for _, _, h, w in boxes}
    sides = [240, 210, 180, 158]
    assert shapes == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    places = {(top, left) for top, left, h, w in boxes if (h, w) == (180, 180)}
    assert len(places) == 13 and {(0, 0), (60, 140), (30, 70), (15, 35), (45, 105), (0, 70)} <= places
    assert all(top >= 0 and left >= 0 and top + h <= 240 and left + w <= 320 for top, left, h, w in boxes)


def test_the_same_key_gives_the_same_clip_in_any_worker_and_another_epoch_another_one(tmp_path):
    for i in range(4):
        write_numbered(tmp_path / f"{i}.mp4", count=60)
    clips = clips_of(tmp_path)
    keys = [(0, 2), (1, 2), (0, 0), (0, 1)]
    alone, shared = (next(iter(data.loader(clips, 4, keys, workers))) for workers in (0, 2))
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    assert not torch.equal(alone[0][0], alone[0][1]) and not torch.equal(alone[1][0], alone[1][1])
    assert alone[0].shape == (4, 3, 4, 32, 32) and alone[0].dtype == torch.uint8


def test_normalise_takes_imagenet_mean_and_deviation_out():
    white = normalise(torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8), "cpu")
    expected = [(1 - mean) / std for mean, std in zip(sigma.IMAGENET_MEAN, sigma.IMAGENET_STD)]
    assert white[0, :, 0, 0, 0].tolist() == pytest.approx(expected)


def test_an_unreadable_video_is_replaced_and_named(tmp_path):
    write_numbered(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    clips = clips_of(tmp_path)
    video, _, _, index, bad = clips[0, 1]
    assert index == 0 and video.float().std() > 0
    assert {path for path, _ in bad} == {str(tmp_path / "b.mp4")} and "Invalid data" in bad[0][1]
    assert clips[0, 0][4] == []


def test_an_epoch_has_each_video_once_over_all_ranks_and_can_begin_in_the_middle():
    orders = [Order(50, batch=4, rank=rank, world=2, seed=5) for rank in range(2)]
    keys = [list(order) for order in orders]
    assert [len(k) for k in keys] == [24, 24] and len(set(keys[0] + keys[1])) == 48   # 50 = 6 steps of 8, and 2 dropped
    orders[0].seen = 32
    assert list(orders[0]) == keys[0][16:]
    orders[0].epoch, orders[0].seen = 1, 0
    assert [i for _, i in orders[0]] != [i for _, i in keys[0]]


@pytest.mark.parametrize("batch, world, accum", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (5, 3, 1), (7, 1, 1)])
def test_an_epoch_begun_with_two_ranks_and_ended_with_others_has_each_video_once(batch, world, accum):
    begun = [key for rank in range(2) for key in list(Order(60, 4, rank, 2, seed=5))[:12]]                # 3 steps of 8
    orders = [Order(60, batch, rank, world, seed=5, multiple=accum) for rank in range(world)]
    ended = []
    for order in orders:
        order.seen = 24
        ended += list(order)
    step = batch * world * accum
    assert len(set(begun + ended)) == len(begun + ended) == 24 + 36 // step * step


def test_videos_are_found_in_class_folders_flat_folders_and_lists(tmp_path):
    for name in ("wave/a b.mp4", "wave/c.webm", "clap/deep/d.avi", "clap/notes.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    found = find_videos(tmp_path / "set")
    assert [Path(p).name for p in found.paths] == ["d.avi", "a b.mp4", "c.webm"] and found.labels == [0, 1, 1]
    assert found.classes == 2 and "notes.txt: not a video" in found.passed_over[0]
    flat = find_videos(tmp_path / "set" / "wave")
    assert flat.labels == [-1, -1] and flat.classes == 0
    (tmp_path / "list.csv").write_text("set/wave/a b.mp4 7\n\nset/wave/c.webm\ngone.mp4 1\nset/wave/c.webm cat\n"
                                       f"{tmp_path}/set/clap/deep/d.avi\t0\n", encoding="utf-8-sig")
    found = find_videos(tmp_path / "list.csv")
    assert [Path(p).name for p in found.paths] == ["a b.mp4", "c.webm", "d.avi"] and found.labels == [7, -1, 0]
    assert 'line 4, "gone.mp4 1": there is no such file' in found.passed_over[0]
    assert 'line 5, "set/wave/c.webm cat": its label is not a whole number' in found.passed_over[1]
    with pytest.raises(UserError, match="found no such place"):
        find_videos(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found a file"):
        find_videos(tmp_path / "set" / "wave" / "c.webm")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="folder or lists that can be read"):
        find_videos(tmp_path / "noise.bin")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="expected videos to train on in .*, found none"):
        find_videos(tmp_path / "none")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A tiny video in each container that the data sets come in: {suffix: bytes}."""
    folder = tmp_path_factory.mktemp("clip")
    codecs = {".mp4": ("libx264", {}), ".avi": ("mpeg4", {}), ".webm": ("libvpx-vp9", {"deadline": "realtime"})}
    return {end: Path(write_numbered(folder / f"v{end}", codec, count=20, **options)).read_bytes()
            for end, (codec, options) in codecs.items()}


def put(root, files, clip_file):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip_file[path.suffix] if text is None else text.encode())


HEADER = "label,youtube_id,time_start,time_end,split\n"
LAYOUTS = {                                                             # files; training and validation labels; missing
    "k400 in class folders": ("k400", {"train/air drumming/a.mp4": None, "train/zumba/b.mp4": None,
                                       "train/zumba/d.mp4": None, "val/zumba/c.mp4": None}, [0, 1, 1], [1], 0),
    "k400 with its tables": ("k400", {
        "train/x/abcdefghijk_000010_000020.mp4": None, "train/-bcdefghijk_000001_000011.mp4": None,
        "val/zzz_000000_000010.mp4": None, "annotations/val.csv": HEADER + "zumba,zzz,0,10,validate\n",
        "annotations/train.csv": HEADER + "zumba,abcdefghijk,10,20,train\nabseiling,-bcdefghijk,1,11,train\n"
                                          '"a, b",gone,5,15,train\n'}, [2, 1], [2], 1),
    "k400 with lists": ("k400", {"v/a b.mp4": None, "v/c.mp4": None, "train.csv": "v/a b.mp4 7\nv/gone.mp4 3\n",
                                 "val.csv": "v/c.mp4 7\n"}, [7], [7], 1),
    "ssv2": ("ssv2", {
        "20bn-something-something-v2/1.webm": None, "20bn-something-something-v2/2.webm": None,
        "labels/labels.json": json.dumps({"Holding something": "0", "Moving something up": "1"}),
        "labels/train.json": json.dumps([{"id": "1", "label": "moving a cup up", "template": "Moving [something] up"},
                                         {"id": "9", "label": "gone", "template": "Holding [something]"}]),
        "labels/validation.json": json.dumps([{"id": "2", "template": "Holding [something]"}])}, [1], [0], 1),
    "ucf101": ("ucf101", {
        "UCF-101/Kayaking/v_Kayaking_g01_c01.avi": None, "UCF-101/YoYo/v_YoYo_g01_c01.avi": None,
        "ucfTrainTestlist/classInd.txt": "1 Kayaking\r\n2 YoYo\r\n",
        "ucfTrainTestlist/trainlist01.txt": "YoYo/v_YoYo_g01_c01.avi 2\r\nYoYo/v_YoYo_g09_c01.avi 2\r\n",
        "ucfTrainTestlist/testlist01.txt": "Kayaking/v_Kayaking_g01_c01.avi\r\n"}, [1], [0], 1),
    "hmdb51": ("hmdb51", {
        "clap/a.avi": None, "clap/b.avi": None, "wave/a.avi": None,
        "testTrainMulti_7030_splits/clap_test_split1.txt": "a.avi 2 \nb.avi 1 \nc.avi 1 \n",
        "testTrainMulti_7030_splits/wave_test_split1.txt": "a.avi 1 \nd.avi 0 \n"}, [0, 1], [0], 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_set_is_found_as_people_have_it_and_trains_by_its_recipe(layout, clip_file, tmp_path, monkeypatch, capsys):
    name, files, train_labels, val_labels, missing = LAYOUTS[layout]
    put(tmp_path / "data" / name, files, clip_file)
    monkeypatch.chdir(tmp_path)
    found, val = find_videos(name), find_videos(name, "val")
    assert (found.labels, val.labels, len(found.passed_over)) == (train_labels, val_labels, missing)
    assert train.main(["--data", name, "--model", "small", "--size", "32", "--frames", "4", "--max-steps", "1",
                       "--out", "run"]) == 0
    plan, recipe = capsys.readouterr().out, data.recipe(name, "small")
    for text in (f"{len(train_labels)} videos in {name}", f"{missing} missing", f"4 frames, {recipe['stride']} apart",
                 f"{recipe['epochs']} epochs", f"eps {recipe['eps']}", f"batch of {recipe['global_batch']}", "cost"):
        assert text in plan, text
    assert Path("run/passed_over.txt").exists() == bool(missing)


def test_a_set_that_is_not_there_or_laid_out_otherwise_ends_in_a_sentence_with_the_expected_tree(tmp_path, clip_file):
    put(tmp_path, {"something/else/v.avi": None, "labels.json": "{", "train.json": "[]"}, clip_file)
    for name, tree in (("k400", "{train,val}/<class>/*.mp4"), ("ucf101", "UCF-101/<Class>/v_*.avi"),
                       ("hmdb51", "testTrainMulti_7030_splits")):
        with pytest.raises(UserError, match=re.escape(tree)):
            find_videos(name, root=tmp_path)
    with pytest.raises(UserError, match="lists that can be read, found JSONDecodeError"):
        find_videos("ssv2", root=tmp_path)


def test_recipes_are_the_published_ones():
    def of(name, model):
        own = data.recipe(name, model)
        return own["frames"], own["stride"], own["epochs"], own["eps"], own["global_batch"]
    assert of("k400", "small") == of("k400", "base") == (16, 4, 800, 0.05, 640)
    assert of("ssv2", "base") == (16, 2, 800, 0.03, 512) and of("ssv2", "small") == (16, 2, 2400, 0.05, 128)
    assert [data.SETS[name]["classes"] for name in ("k400", "ssv2", "ucf101", "hmdb51")] == [400, 174, 101, 51]


def test_one_decoding_pass_gives_several_clips_each_with_its_own_place_crop_and_mask(tmp_path, monkeypatch):
    for i in range(6):
        write_numbered(tmp_path / f"{i}.mp4", count=60)
    passes = []
    monkeypatch.setattr(data, "decode", lambda *arguments: passes.append(arguments) or decode(*arguments))
    clips = clips_of(tmp_path, repeat=4, size=48, tube=(2, 16, 16), crop=data.centre_crop)
    video, mask, *_ = clips[0, 0]
    assert len(passes) == 1 and video.shape == (4, 3, 4, 48, 48) and mask.shape == (4, 18)
    numbers = [[sum((frame[:, 16 + 16 * (b // 4), 16 * (b % 4)].float().mean().item() > 128) << b for b in (1, 2, 5, 6))
                for frame in clip.transpose(0, 1)] for clip in video]
    assert len({tuple(n) for n in numbers}) > 1 and len({tuple(m.tolist()) for m in mask}) > 1
    whole = data.collate([clips[0, i] for i in range(3)])
    assert whole[0].shape[0] == whole[1].shape[0] == 12
    monkeypatch.chdir(tmp_path)
    passes.clear()
    assert train.main(["--data", ".", "--model", "tiny", "--epochs", "8", "--batch-size", "6", "--accum", "1", "--out",
                       "out/r", "--repeat", "2", "--workers", "0"]) == 0
    trained = [key for key in passes if key[1].__qualname__.endswith("union")]
    # 8 epochs of 6 clips are 8 steps of 6 clips, from 8 x 3 decodings; the learning rate counts clips.
    assert log_of("out/r")[-1]["step"] == 8 and log_of("out/r")[-1]["epoch"] == 8
    assert torch.load("out/r/last.pt", weights_only=True)["config"]["peak_lr"] == pytest.approx(6e-3 * 6 / 256)
    assert len(trained) >= 24 and torch.load("out/r/last.pt", weights_only=True)["epoch"] == 4


def test_check_writes_the_good_and_the_bad_videos_of_each_split(tmp_path, clip_file, capsys):
    put(tmp_path / "k400", {"train/a/1.mp4": None, "train/b/2 2.mp4": None, "train/b/3.mp4": "", "val/b/4.mp4": None,
                            "train/b/notes.txt": ""}, clip_file)
    out = tmp_path / "checked"
    arguments = ["check", "--data", "k400", "--root", f"{tmp_path}/k400", "--out", str(out), "--workers", "2"]
    assert data.main(arguments) == 0
    assert (out / "train.csv").read_text().split("\n") == [f"{tmp_path}/k400/train/a/1.mp4 0",
                                                           f"{tmp_path}/k400/train/b/2 2.mp4 1", ""]
    bad = (out / "bad.txt").read_text()
    assert "3.mp4: it can't be read: Invalid data" in bad and "notes.txt: not a video" in bad and bad.count("\n") == 2
    said = capsys.readouterr().out
    assert "train: 2 good videos" in said and "val: 1 good" in said and "2 classes" in said
    assert find_videos(out).labels == [0, 1] and find_videos(out, "val").labels == [1]
    assert data.main(["check", "--data", "k400", "--root", str(tmp_path / "none")]) == 2


def test_prepare_re_encodes_once_and_keeps_names_times_and_tables(tmp_path, clip_file, capsys):
    source, target = tmp_path / "a", tmp_path / "b"
    put(source, {"x/one.webm": None, "x/two.avi": None, "bad.mp4": "text", "list.csv": "x/one.webm 3\nx/two.avi 4\n"},
        clip_file)
    write_numbered(source / "long.mp4", count=80, rate=Fraction(25, 2), bf="2", g="250")
    assert data.main(["prepare", str(source), str(target), "--workers", "2"]) == 0
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == {
        "x/one.mp4", "x/two.mp4", "long.mp4", "list.csv", "bad.txt"}
    assert "bad.mp4: Invalid data" in (target / "bad.txt").read_text()
    with av.open(str(target / "long.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert (container.streams.video[0].height, container.streams.video[0].width) == (256, 342)
        frames = list(container.decode(video=0))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 32, 64]
    assert [float(frame.time) for frame in frames] == pytest.approx([i / 12.5 for i in range(80)], abs=1e-3)
    frames = F.interpolate(decode(target / "long.mp4", lambda n: [5, 70]).float(), (48, 64))
    assert [read_number(frame) for frame in frames] == [5, 70]
    assert find_videos(target / "list.csv").labels == [3, 4]                        # a list finds the files' new names
    times = {p: p.stat().st_mtime_ns for p in target.rglob("*.mp4")}
    (target / "x" / "one.mp4").unlink()
    assert data.main(["prepare", str(source), str(target)]) == 0                                      # goes on
    assert "2 of them in" in capsys.readouterr().out and (target / "x" / "one.mp4").exists()
    assert all(p.stat().st_mtime_ns == time for p, time in times.items() if p.name != "one.mp4")
    assert data.main(["prepare", str(source), str(source / "inside")]) == 2


def test_prepare_killed_at_any_moment_leaves_only_whole_files_under_their_names(tmp_path):
    for i in range(6):
        write_numbered(tmp_path / f"{i}.mp4", count=100)
    (tmp_path / "a").mkdir()
    for i in range(6):
        (tmp_path / f"{i}.mp4").rename(tmp_path / "a" / f"{i}.mp4")
    for delay in (0, 0.02, 0.05, 0.1):
        before = len(list((tmp_path / "b").glob("*.mp4")))
        child = CHILDREN.Process(target=data.main, args=(["prepare", str(tmp_path / "a"), str(tmp_path / "b"),
                                                           "--workers", "0"],))
        child.start()
        while not list((tmp_path / "b").glob(".*")) and len(list((tmp_path / "b").glob("*.mp4"))) == before:
            assert child.is_alive()
        time.sleep(delay)
        child.kill()
        child.join()
        for path in (tmp_path / "b").glob("[!.]*.mp4"):
            assert len(decode(str(path), range)) == 100
    assert data.main(["prepare", str(tmp_path / "a"), str(tmp_path / "b"), "--workers", "0"]) == 0
    assert len(find_videos(tmp_path / "b").paths) == 6 and not list((tmp_path / "b").glob(".*"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_two_workers_read_hundreds_of_clips_without_growing(tmp_path):
    list(damaged_files(tmp_path))
    for i in range(8):
        write_numbered(tmp_path / f"{i}.mp4", count=60, bf="2", g="12")
    clips = clips_of(tmp_path, size=64)
    sizes = []

    def size():
        pids = [worker.pid for worker in multiprocessing.active_children()]
        open_files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return max(open_files), max(pages) * os.sysconf("SC_PAGESIZE") / 2 ** 20

    for _ in data.loader(clips, 8, [(e, i % len(clips)) for e in range(60) for i in range(16)], 2):
        sizes.append(size())
    files, memory = zip(*sizes)
    assert len(sizes) == 120 and max(files[60:]) < max(files[20:60]) + 8       # queues come and go; a leak has hundreds
    assert max(memory[60:]) < max(memory[20:60]) + 8                              # MiB; a leak of one container has 2
    for _ in range(3):                                                            # a loop that is left early ends too
        next(iter(data.loader(clips, 4, [(0, i) for i in range(8)] * 9, 2)))
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_the_toy_set_is_the_same_for_the_same_seed_and_read_as_any_other_video(toy, tmp_path):
    data.make_toy(tmp_path / "toy", train=64, val=32)
    for split, number in (("train", 64), ("val", 32)):
        found, again = find_videos(toy / "data" / "toy", split), find_videos(tmp_path / "toy", split)
        assert len(found.paths) == number and found.classes == 8
        assert all(Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(found.paths, again.paths))
    assert decode(found.paths[0], range).shape == (8, 3, 32, 32)


def test_no_single_frame_of_a_toy_clip_tells_its_class():
    labels = torch.arange(3000) % 8
    clips = data.toy_clips(labels, torch.Generator().manual_seed(0)).float()
    for t in (0, 7):
        pixels = F.avg_pool2d(clips[:, t].permute(0, 3, 1, 2), 4).flatten(1)
        scores = train.linear_probe(pixels[:2000], labels[:2000], pixels[2000:])
        assert train.accuracy(scores, labels[2000:])["top1"] < 0.125 + 4 * math.sqrt(0.125 * 0.875 / 1000)


# --- train.py ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def here(toy, monkeypatch):
    """The folder with the small toy set as the working directory; runs go to its sub-folders."""
    monkeypatch.chdir(toy)
    return toy


def wait_for_a_log_line(out, process):
    while not Path(out, "log.jsonl").exists() or "\n" not in Path(out, "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)


def children_of(pid):
    stats = [path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [int(begin.split()[0]) for begin, end in stats if end.split()[1] == str(pid)]


def log_of(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines(keepends=True)
    return [line for line in map(json.loads, (line for line in lines if line.endswith("\n"))) if "loss" in line]


def test_the_loss_falls_in_twenty_steps(here):
    assert train.main(["--epochs", "20", "--batch-size", "64", "--out", "falls", "--max-steps", "20"]) == 0
    first, *_, last = log_of("falls")
    assert last["step"] == 20 and last["loss"] < first["loss"] - 0.5
    assert {"target_term", "video_term", "log_k", "prototypes_used", "entropy", "grad_norm", "lr", "clips_per_second",
            "data_wait"} <= set(last)


def test_ten_steps_equal_five_a_stop_a_resume_and_five_bit_for_bit(here):
    common = ["--epochs", "5", "--batch-size", "16", "--accum", "2", "--seed", "3"]                  # 2 steps an epoch
    assert train.main([*common, "--out", "ten"]) == 0
    assert train.main([*common, "--out", "five", "--max-steps", "5"]) == 0
    assert train.main(["--resume", "five"]) == 0
    ten, five = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("ten", "five"))
    assert ten["step"] == five["step"] == 10 and ten["epoch"] == 5
    assert all(torch.equal(ten["model"][name], five["model"][name]) for name in ten["model"])
    for a, b in zip(ten["optimizer"]["state"].values(), five["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_a_finished_run_leaves_results_and_pictures(here, capsys):
    assert train.main(["--epochs", "1", "--batch-size", "32", "--out", "finished"]) == 0
    results = json.loads(Path("finished/results.json").read_text())
    assert {"linear_probe", "knn"} == set(results["untrained"]) == set(results["trained"])
    assert all(Path("finished", name).stat().st_size > 500 for name in ("last.pt", "masks.png", "prototypes.png"))
    shown = capsys.readouterr().out
    for text in ("64 videos in toy, 8 classes", "1 processes x 32 clips x 2", "= 1 steps", "linear probe", "prot"):
        assert text in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_and_ends_cleanly(number, here):
    out = f"stopped-{number.name}"
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--epochs", "100000", "--workers", "2", "--out",
                                out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               start_new_session=True)
    wait_for_a_log_line(out, process)
    os.killpg(process.pid, number)                                                     # the loader's workers get it too
    try:
        text, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0 and f"go on with --resume {out}" in text
    assert torch.load(f"{out}/last.pt", weights_only=True)["step"] == log_of(out)[-1]["step"] > 0


def test_a_killed_loader_worker_ends_the_run_with_a_sentence(here):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--epochs", "100000", "--workers", "2", "--out",
                                "orphan"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_a_log_line("orphan", process)
    os.kill(max(children_of(process.pid)), signal.SIGKILL)
    try:
        _, text = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and "error: a loader worker was killed" in text


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(here, capsys):
    common = ["--epochs", "50", "--batch-size", "32", "--out", "nan"]
    assert train.main([*common, "--max-steps", "2"]) == 0
    good = Path("nan/last.pt").read_bytes()
    checkpoint = torch.load("nan/last.pt", weights_only=True)
    checkpoint["model"]["encoder.norm.bias"][0] = math.nan
    torch.save(checkpoint, "nan/poisoned.pt")
    assert train.main(["--resume", "nan/poisoned.pt"]) == 1
    assert re.search(r"error: expected a finite loss .* at step 3", capsys.readouterr().err)
    assert Path("nan/last.pt").read_bytes() == good


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path, monkeypatch):
    for step in range(3):
        train.write_whole(tmp_path / "last.pt", {"step": step}, tmp_path / "previous.pt")
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in ("last.pt", "previous.pt")]
    assert steps == [2, 1]                                                                             # two are kept
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(content, file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(train.RunError, match="No space left"):
        train.write_whole(tmp_path / "last.pt", {"step": 3}, tmp_path / "previous.pt")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before



def train_in_child(folder, arguments):
    """A training run that writes a checkpoint after each step."""
    os.chdir(folder)
    train.LOG_STEPS, train.SAVE_SECONDS = 1, 0
    sys.exit(train.main(arguments))


def test_a_run_killed_at_many_random_moments_ends_as_if_it_had_never_been(here):
    arguments = ["--epochs", "60", "--batch-size", "16", "--accum", "1", "--lr", "0.001", "--seed", "5"]

    def start(out):
        again = ["--resume", out] if any(Path(out, name).exists() for name in train.CHECKPOINTS) else \
            [*arguments, "--out", out]
        child = CHILDREN.Process(target=train_in_child, args=(str(here), [*again, "--max-steps", "100"]))
        child.start()
        return child

    calm = start("calm")
    calm.join(120)
    moments, killed_at = random.Random(0), []
    while not killed_at or killed_at[-1] < 60:
        child = start("killed")
        while not Path("killed/log.jsonl").exists() or len(log_of("killed")) <= max(killed_at, default=0):
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.6))
        child.kill()
        child.join()
        killed_at.append(len(log_of("killed")))
    assert len(killed_at) > 5
    child = start("killed")
    child.join(120)
    assert calm.exitcode == child.exitcode == 0
    calm, killed = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("calm", "killed"))
    assert calm["step"] == killed["step"] == 100
    assert all(torch.equal(calm["model"][name], killed["model"][name]) for name in calm["model"])
    assert [line["step"] for line in log_of("killed")] == list(range(1, 101))


def fail_in_child(folder):
    os.chdir(folder)
    train.collapse = None
    train.main(["--epochs", "9", "--batch-size", "16", "--accum", "1", "--workers", "2", "--out", "failed"])


def test_an_unforeseen_error_ends_the_run_and_its_workers_too(here):
    child = CHILDREN.Process(target=fail_in_child, args=(str(here),))
    child.start()
    child.join(60)
    hung = child.is_alive()
    child.kill()
    assert not hung and child.exitcode == 1


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(here, capsys):
    assert train.main(["--epochs", "9", "--batch-size", "64", "--out", "torn", "--max-steps", "2"]) == 0
    assert train.main(["--resume", "torn", "--max-steps", "4"]) == 0
    whole = Path("torn/last.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", None):
        Path("torn/last.pt").unlink(missing_ok=True)
        if content is not None:
            Path("torn/last.pt").write_bytes(content)
        path, checkpoint = train.read_checkpoint("torn")
        assert path.name == "previous.pt" and checkpoint["step"] == 2
        assert "going on from the checkpoint before, torn/previous.pt, step 2" in capsys.readouterr().out
    assert train.main(["--resume", "torn"]) == 0
    Path("torn/last.pt").write_bytes(b"")
    Path("torn/previous.pt").write_bytes(b"")
    assert train.main(["--resume", "torn"]) == 2


@pytest.mark.parametrize("world, given, clips, expected", [
    (1, {}, 9999, (40, 16)), (16, {}, 9999, (40, 1)), (64, {}, 9999, (10, 1)), (8, {}, 9999, (40, 2)),
    (8, {"batch_size": 20}, 9999, (20, 4)), (2, {"batch_size": 32}, 9999, (32, 10)), (4, {"accum": 8}, 9999, (20, 8)),
    (64, {"batch_size": 32}, 9999, (32, 1)), (1, {}, 12, (12, 1)), (2, {"batch_size": 2}, 12, (2, 3))])
def test_the_recipe_fixes_the_global_batch_and_accumulation_follows(world, given, clips, expected, monkeypatch):
    monkeypatch.setattr(train, "WORLD", world)
    c = argparse.Namespace(**train.COMMON | data.recipe("k400", "base") | given)
    assert train.split_batch(c, given, clips) == expected


def test_features_on_few_prototypes_or_a_loss_stuck_at_ln_k_are_called_a_collapse():
    log_k = math.log(3000)
    healthy = dict(target_term=7.1, video_term=7.4, log_k=log_k, entropy=log_k - 0.2, target_entropy=log_k - 0.2)
    assert train.collapse(healthy, 50_000) is None and train.collapse({"pixel_term": 0.5}, 50_000) is None
    assert train.collapse(healthy | dict(entropy=math.log(400)), 1000) is None                # few tubes can't use many
    few = healthy | dict(target_entropy=math.log(90))
    assert "share no more than 90 of 3000 prototypes" in train.collapse(few, 50_000)
    assert "video_term stays at 8.01" in train.collapse(healthy | dict(video_term=8.01), 50_000)
    assert "target_term stays at 0.10" in train.collapse(healthy | dict(target_term=0.1), 50_000)


def test_a_collapsed_run_says_so_once(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    monkeypatch.setattr(sigma.SIGMA, "embed", lambda self, video, hidden, features=None: self.projector(
        torch.ones(*hidden.shape, 768)))                                                      # the same for each tube
    assert train.main(["--epochs", "40", "--out", "collapsed", "--max-steps", "40", "--lr", "0"]) == 0
    assert capsys.readouterr().out.count("collapsed? ") == 1


def test_accuracy_is_measured_every_so_many_epochs(here, capsys):
    assert train.main(["--epochs", "5", "--batch-size", "32", "--out", "judged", "--eval-every", "2"]) == 0
    assert [line["epoch"] for line in log_of("judged") if "knn" in line] == [2, 4]
    assert "epoch 2: linear probe" in capsys.readouterr().out


def test_the_benchmark_names_the_bottleneck_and_the_hours(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "BENCH_SECONDS", 0.5)
    assert train.main(["--bench", "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    for text in ("times naive PyAV", "training step", "share of matrix product", "balance them", "1, 8, 64"):
        assert text in shown, text


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rate = [train.learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rate[0] == 0 and rate[9] == rate[10] == 1
    assert rate[55] == pytest.approx(0.55) and rate[-1] == pytest.approx(0.1, abs=1e-3)
    assert rate[3] == pytest.approx(3 / 9) and all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_weight_decay_spares_biases_norms_and_other_vectors():
    model = build_model("tiny")
    decayed, spared = train.make_optimizer(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert all(re.search("bias|norm", names[id(p)]) for p in spared["params"])
    assert not any(re.search("bias|norm", names[id(p)]) for p in decayed["params"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_too(here, amp):
    common = ["--epochs", "2", "--batch-size", "32", "--max-steps", "2"]
    assert train.main([*common, "--amp", amp, "--out", f"amp-{amp}"]) == 0


def test_wrong_usage_ends_in_one_sentence_and_code_2(here, capsys):
    Path("junk.pt").write_bytes(b"junk")
    Path("bad.csv").write_text("nothing.mp4 0\n")
    data.write_video(Path("less").mkdir() or "less/v.mp4", torch.zeros(8, 32, 32, 3, dtype=torch.uint8))
    assert train.main(["--epochs", "1", "--batch-size", "32", "--max-steps", "1", "--out", "taken"]) == 0
    for arguments, message in (
            (["--data", "nowhere"], "found no such place: give FOLDER/<class>"),
            (["--data", "bad.csv"], 'line 1, "nothing.mp4 0"'),
            (["--resume", "nowhere"], "expected weights, found no file nowhere"),
            (["--init", "junk.pt"], "expected weights, found something else in junk.pt"),
            (["--init", "taken/last.pt", "--target", "pixel"], "expected --target mlp or none with the weights"),
            (["--resume", "taken", "--epochs", "9"], "the run's own --epochs 1, found 9"),
            (["--resume", "taken", "--data", "less"], "expected the run's 64 videos, found 1 in less"),
            (["--repeat", "3", "--batch-size", "64"], "expected a --batch-size divisible by --repeat 3, found 64"),
            (["--data", "ssv2"], "data/ssv2/20bn-something-something-v2/<id>.webm"),
            (["--out", "taken"], "found a checkpoint in taken"),
            (["--batch-size", "65"], "global batch of 1 processes x 65 clips x 1 accumulated = 65, found 64"),
            (["--size", "30"], "divisible by the tube (4, 8, 8), found 8 and 30"),
            (["--size", "8"], "found 1 x 1 tubes in a frame"),
            (["--out", "bad.csv"], "expected a folder as --out, found the file bad.csv")):
        assert train.main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
    for arguments in (["--epochs", "0"], ["--amp", "int8"], ["--model", "giant"], ["--bogus"], ["--lr", "nan"],
                      ["--resume", "taken", "--init", "taken"]):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_too_many_unreadable_videos_end_the_run_with_their_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for i in range(4):
        write_numbered(tmp_path / "videos" / f"good{i}.mp4", count=20)
    for i in range(8):
        (tmp_path / "videos" / f"bad{i}.mp4").write_bytes(b"")
    arguments = ["--data", "videos", "--model", "tiny", "--batch-size", "12", "--epochs", "200", "--out", "run"]
    assert train.main(arguments) == 1
    captured = capsys.readouterr()
    assert "expected at most 1% unreadable videos, found" in captured.err and "Traceback" not in captured.err
    assert all(captured.out.count(f"bad{i}.mp4: it can't be read") == 1 for i in range(8))
    assert Path("run/last.pt").exists()


def test_a_set_without_any_readable_video_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for i in range(3):
        (tmp_path / "videos" / f"bad{i}.mp4").write_bytes(b"")
    assert train.main(["--data", "videos", "--model", "tiny", "--batch-size", "3", "--epochs", "50"]) == 1
    assert "found 3 of 3" in capsys.readouterr().err


# --- Evaluation -------------------------------------------------------------------------------------------------------

def test_a_classifier_is_the_mean_of_all_tokens_before_the_last_norm_then_layer_norm_and_a_head_that_starts_near_zero():
    video, _ = batch()
    encoder = small().encoder
    tokens = sigma.run(encoder.blocks, encoder.patch_embed(take_tubes(video, TUBE)) + sigma.positions(32, 32), False)
    model = Classifier(encoder, 5, drop_path=0.5).double().eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    pooled = F.layer_norm(tokens.mean(dim=1), (32,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    assert torch.allclose(model.pooled(video), pooled, atol=1e-12)
    assert torch.allclose(model(video), pooled @ model.head.weight.T + model.head.bias, atol=1e-12)
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    assert [block.drop_path for block in encoder.blocks] == [0, 0.5]


def test_drop_path_skips_whole_clips_in_training_alone_and_keeps_the_mean():
    block = sigma.Block(32, 2).double()
    block.drop_path, x = 0.25, torch.ones(4000, 3, 2, dtype=torch.float64)
    torch.manual_seed(0)
    kept = block.skip(x)
    assert set(kept.unique().tolist()) == {0, 1 / 0.75} and (kept == kept[:, :1, :1]).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval().skip(x), x)


def test_learning_rates_fall_by_a_quarter_with_each_layer_down_from_the_head():
    model = Classifier(small().encoder, 5)
    scale = {id(p): group["scale"] for group in train.make_optimizer(model, "finetune").param_groups
             for p in group["params"]}
    named = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(named) == len(scale)
    for name, expected in (("head.weight", 1), ("fc_norm.bias", 1), ("encoder.blocks.1.attn.q_bias", 0.75),
                           ("encoder.blocks.0.mlp.fc1.weight", 0.75 ** 2),
                           ("encoder.patch_embed.proj.bias", 0.75 ** 3)):
        assert named[name] == pytest.approx(expected), name
    assert {group["scale"] for group in train.make_optimizer(model, "probe").param_groups} == {1}


def test_mixed_labels_still_sum_to_one_and_mixed_clips_stay_clips(monkeypatch):
    c, seen = argparse.Namespace(task="finetune", classes=7, augment="on"), []
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, target, **_: seen.append(target) or logits.sum())
    for seed in range(20):
        torch.manual_seed(seed)
        video = torch.randint(256, (6, 3, 4, 16, 16), dtype=torch.uint8)
        train.make_step(lambda x: x.mean(dim=(2, 3, 4)).repeat(1, 3)[:, :7], c, "cpu")(video, None, torch.arange(3))
    for target in seen:                                                             # two clips of each of three videos
        assert target.shape == (6, 7) and torch.allclose(target.sum(dim=1), torch.ones(6)) and (target >= 0).all()
    assert any(((target > 0.01) & (target < 0.99)).any() for target in seen)


def test_each_of_a_video_s_clips_has_its_label_and_without_augmentation_is_left_as_it_is(monkeypatch):
    c, seen = argparse.Namespace(task="finetune", classes=7, augment="off"), []
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, target, **_: seen.append(target) or logits.sum())
    video = torch.randint(256, (6, 3, 4, 16, 16), dtype=torch.uint8)
    train.make_step(lambda x: seen.append(x) or x[:, 0, 0, 0, :7], c, "cpu")(video, None, torch.tensor([3, 5, 1]))
    assert torch.equal(seen[0], normalise(video, "cpu")) and seen[1].tolist() == [3, 3, 5, 5, 1, 1]


def test_fine_tuning_takes_frames_evenly_from_a_window_or_one_from_each_segment():
    for n in (65, 300):
        starts = set()
        for seed in range(300):
            frames = data.dense_frames(n, 16, 4, torch.Generator().manual_seed(seed))
            assert frames == [min(int(frames[0] + i * 64 / 15), frames[0] + 63) for i in range(16)] and frames[-1] < n
            starts.add(frames[0])
        assert starts <= set(range(n - 64)) and len(starts) > min(n - 64, 50) / 2
    assert data.dense_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10               # 30 // 4 = 7, the end is 30
    assert data.dense_frames(1, 16, 4) == [0] * 16
    for seed in range(50):
        frames = data.segment_frames(50, 16, 2, torch.Generator().manual_seed(seed))
        assert [index // 3 for index in frames] == list(range(16))
    assert data.segment_frames(4, 16, 2) == sorted([0, 1, 2, 3] * 4)


def test_test_views_spread_over_the_video_and_crops_along_its_long_side(tmp_path):
    dense = data.view_frames(300, 16, 4, 5, "dense")                                           # every 4th: 75 frames
    assert [view[0] // 4 for view in dense] == [0, 14, 29, 44, 59]                           # int(c * (75 - 16) / 4)
    assert all(view == list(range(view[0], view[0] + 64, 4)) for view in dense)
    assert data.view_frames(20, 16, 4, 5, "dense") == [[0, 4, 8, 12] + [16] * 12] * 5
    segments = data.view_frames(50, 16, 2, 2, "segments")
    both = sorted([int(50 / 16 / 2 + 50 / 16 * i) for i in range(16)] + [int(50 / 16 * i) for i in range(16)])
    assert segments == [both[0::2], both[1::2]]
    path = write_numbered(tmp_path / "v.mp4", count=20)                                                       # 48 x 64
    shape = dict(frames=4, stride=2, tube=(2, 8, 8), ratio=0.5, crops=3)
    clips = data.Views(data.Videos([path], [0]), times=2, size=24, **shape)
    video, *_ = clips[0, 0]
    whole = data.transform.resize(decode(path, lambda n: [0, 2, 4, 6]), [24], antialias=False)               # 24 x 32
    assert video.shape == (6, 3, 4, 24, 24)
    for view, left in enumerate((0, 4, 8)):                                                          # int(s * 8 / 2)
        assert torch.equal(video[view], whole[..., left:left + 24].transpose(0, 1))
    tall = data.Views(data.Videos([path], [0]), size=64, **shape)
    tall.frames_of = lambda *_: [torch.arange(96)[:, None].expand(4, 3, 96, 64).byte()]
    assert [v[0, 0, 0, 0].item() for v in tall[0, 0][0]] == [0, 16, 32]


def numbered_videos(folder, count, bad=()):
    """Paths of videos whose grey value is 20 times their number; those in bad can't be read."""
    for i in range(count):
        path = folder / f"{i}.mp4"
        data.write_video(path, torch.full((8, 32, 32, 3), 20 * i, dtype=torch.uint8))
        if i in bad:
            path.write_bytes(b"no video")
    return [str(folder / f"{i}.mp4") for i in range(count)]


def views_of(paths, labels, **options):
    return data.Views(data.Videos(paths, labels), frames=8, stride=1, size=32, tube=(4, 8, 8), ratio=0.75, **options)


C = argparse.Namespace(amp="off", workers=0, size=32, out=".", tokens=False)


def encoded_label(video):
    """Class scores of a model that sees the label: numbered_videos' brightness."""
    grey = (video * 0.229 + 0.485)[:, 0].mean(dim=(1, 2, 3)) * 255 / 20                        # of the red channel
    return -(grey[:, None] - torch.arange(12)).abs()


def test_a_model_that_knows_the_answer_gets_100_percent_and_shuffled_labels_get_chance(tmp_path, capsys):
    paths, labels = numbered_videos(tmp_path, 12), list(range(12))
    right = train.accuracy(*train.collect(encoded_label, views_of(paths, labels), C, torch.device("cpu")))
    assert right["top1"] == right["top5"] == 1 and right["videos"] == 12
    scores, _ = train.collect(encoded_label, views_of(paths, labels), C, torch.device("cpu"))
    shuffled = [train.accuracy(scores, torch.randperm(12))["top1"] for _ in range(300)]
    assert sum(shuffled) / 300 == pytest.approx(1 / 12, abs=0.03)
    Path(paths[3]).write_bytes(b"no video")
    wrong = train.accuracy(*train.collect(encoded_label, views_of(paths, labels), C, torch.device("cpu")))
    assert wrong["top1"] == pytest.approx(11 / 12) and wrong["unreadable"] == 1 and wrong["videos"] == 12
    assert "3.mp4" in capsys.readouterr().out


def test_the_scores_of_several_views_are_averaged(tmp_path):
    paths = [write_numbered(tmp_path / f"{i}.mp4", count=40 + i) for i in range(3)]
    views = views_of(paths, [0, 1, 2], times=2, crops=3)
    torch.manual_seed(0)
    model = Classifier(build_model("tiny").encoder, 4).eval()
    torch.nn.init.normal_(model.head.weight)
    scores, _ = train.collect(lambda video: model(video).softmax(dim=1), views, C, torch.device("cpu"))
    for i in range(3):
        by_hand = sum(model(normalise(clip[None], "cpu")).softmax(dim=1)[0] for clip in views[0, i][0]) / 6
        assert torch.allclose(scores[i], by_hand, atol=1e-5)


def test_features_come_in_list_order_for_every_video_that_can_be_read(here, tmp_path, capsys):
    paths = numbered_videos(tmp_path, 9, bad=(4,))
    order = [5, 2, 4, 8, 0, 1, 7]
    (tmp_path / "list.csv").write_text("".join(f"{paths[i]} {i}\n" for i in order))
    assert train.main(["--max-steps", "1", "--batch-size", "16", "--out", "for-features"]) == 0
    for tokens in ([], ["--tokens"]):
        assert train.main(["--task", "features", "--init", "for-features", "--data", str(tmp_path / "list.csv"),
                           "--out", "features", "--workers", "0", *tokens]) == 0
        written = torch.load("features/features.pt", weights_only=True)
        assert written["paths"] == [paths[i] for i in order if i != 4]
        assert written["labels"].tolist() == [5, 2, 8, 0, 1, 7]
        model = build_model("tiny")
        model.load_state_dict(torch.load("for-features/last.pt", weights_only=True)["model"])
        for path, features in zip(written["paths"], written["features"]):
            expected = model.encoder(normalise(decode(path, range).transpose(0, 1)[None], "cpu"))[0]
            assert torch.allclose(features, expected if tokens else expected.mean(dim=0), atol=1e-4)
    assert "4.mp4" in capsys.readouterr().out


def test_the_probe_trains_its_head_and_moves_no_encoder_weight(here, capsys):
    assert train.main(["--max-steps", "2", "--batch-size", "16", "--out", "for-probe"]) == 0
    assert train.main(["--task", "probe", "--init", "for-probe", "--epochs", "2", "--out", "probe", "--batch-size",
                       "16"]) == 0
    before, after = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in ("for-probe", "probe"))
    encoder = [name for name in after if name.startswith("encoder.")]
    assert len(encoder) > 40 and all(torch.equal(before[name], after[name]) for name in encoder)
    assert after["head.weight"].abs().max() > 2e-4
    result = json.loads(Path("probe/results.json").read_text())
    assert {"top1", "top5", "videos", "unreadable"} <= set(result["trained"])
    assert result["checkpoint"] == "probe/last.pt" and result["data"] == "toy" and result["views"] == "1x1"
    assert "frozen" in result["protocol"]
    assert json.loads(Path("probe/log.jsonl").read_text().splitlines()[-1])["trained"] == result["trained"]
    assert "new: fc_norm" in capsys.readouterr().out


def test_fine_tuning_resumes_exactly_though_it_mixes_and_drops_at_random(here):
    common = ["--task", "finetune", "--augment", "on", "--epochs", "4", "--batch-size", "16", "--repeat", "2"]
    assert train.main([*common, "--out", "tuned-whole"]) == 0
    assert train.main([*common, "--out", "tuned-parts", "--max-steps", "5"]) == 0
    assert train.main(["--resume", "tuned-parts"]) == 0
    whole, parts = (torch.load(f"tuned-{name}/last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert train.main(["--resume", "tuned-parts", "--views", "2x1"]) == 0                          # tests once more
    assert json.loads(Path("tuned-parts/results.json").read_text())["views"] == "2x1"
    assert train.main(["--task", "knn", "--init", "tuned-parts", "--out", "tuned-knn"]) == 0


def test_ssv2_is_never_mirrored_and_others_half_of_the_time(here, capsys):
    assert data.recipe("ssv2", "base", "finetune")["flip"] == data.recipe("toy", "tiny", "probe")["flip"] == "off"
    assert data.recipe("k400", "base", "finetune")["flip"] == data.recipe("mine", "base", "probe")["flip"] == "on"
    assert train.main(["--task", "finetune", "--data", "ssv2", "--flip", "on"]) == 2
    ramp = torch.arange(64).mul(4).byte().expand(4, 3, 64, 64)                           # brighter to the right
    for flip, expected in ((False, {False}), (True, {False, True})):
        augment = data.v2.Compose(data.tuning_augmentation(32, flip).transforms[:2])          # crop and flip alone
        mirrored = {bool((clip[..., 0] > clip[..., -1]).all()) for clip in (augment(ramp) for _ in range(40))}
        assert mirrored == expected


def test_augmentation_is_the_same_for_all_frames_of_a_clip_and_for_the_same_key(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", count=1)
    clips = clips_of(tmp_path, choose=data.dense_frames, augment=data.tuning_augmentation(32, True), frames=4, size=32)
    seen = [clips[epoch, 0][0][0] for epoch in range(30)]
    assert all((clip == clip[:, :1]).all() for clip in seen) and not torch.equal(seen[0], seen[1]) and path
    state = torch.get_rng_state()
    assert torch.equal(clips[3, 0][0][0], seen[3]) and torch.equal(torch.get_rng_state(), state)


def test_a_limited_set_has_equal_classes_and_is_the_same_for_one_seed():
    labels = [0] * 50 + [1] * 20 + [2] * 5
    videos = data.Videos([str(i) for i in range(75)], labels)
    few = videos.limit(10, seed=0)
    assert sorted(few.labels.count(k) for k in range(3)) == [3, 3, 4] and len(set(few.paths)) == 10
    assert few.paths == videos.limit(10, seed=0).paths != videos.limit(10, seed=1).paths
    assert [videos.limit(40, seed=0).labels.count(k) for k in range(3)] in ([17, 18, 5], [18, 17, 5])


def test_folders_of_images_are_clips_that_stand_still(tmp_path, here, capsys):
    image = torch.rand(3, 20, 24)
    for name in ("train/cat/0%03d.png", "train/dog/1.jpg", "test/cat/2.png", "test/dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        train.save_image(image, tmp_path / name)
    found = find_videos(str(tmp_path))
    assert found.labels == [0, 1] and found.paths[0].endswith("0%03d.png")
    frames = decode(found.paths[0], lambda n: [0] * 8)
    assert frames.shape == (8, 3, 20, 24) and (frames / 255 - image).abs().max() < 0.01
    assert train.main(["--task", "finetune", "--data", str(tmp_path), "--model", "tiny", "--epochs", "1", "--workers",
                       "0", "--out", "images"]) == 0                                                    # test as val
    assert json.loads(Path("images/results.json").read_text())["trained"]["videos"] == 2
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match="can't be read"):
        decode(str(tmp_path / "broken.png"), range)


def n_frames_equal(frames):
    return bool((frames == frames[:1]).all())


def test_weights_of_another_model_stop_fine_tuning_with_the_list_of_differences(here, capsys):
    assert train.main(["--max-steps", "1", "--batch-size", "16", "--out", "other"]) == 0
    kept = torch.load("other/last.pt", weights_only=True)
    del kept["model"]["encoder.blocks.2.mlp.fc1.bias"]
    torch.save(kept, "broken.pt")
    assert train.main(["--task", "finetune", "--init", "broken.pt", "--out", "never"]) == 2
    assert "encoder.blocks.2.mlp.fc1.bias" in capsys.readouterr().err
    assert train.main(["--task", "probe", "--init", "other", "--model", "small", "--out", "never"]) == 2
    assert "expected --model tiny or none" in capsys.readouterr().err


def test_two_processes_with_uneven_shares_get_the_accuracy_of_one(here, tmp_path):
    paths = numbered_videos(tmp_path, 11, bad=(6,))
    (tmp_path / "val.csv").write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(paths)))
    (tmp_path / "train.csv").write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(paths[:5])))
    common = ["--task", "knn", "--data", str(tmp_path), "--model", "tiny", "--workers", "0"]
    assert train.main([*common, "--out", "knn-one"]) == 0
    result = subprocess.run([*TORCHRUN, str(HERE / "train.py"), *common, "--out", "knn-two"], cwd=here,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads(Path(f"knn-{name}/results.json").read_text())["knn"] for name in ("one", "two"))
    assert one == two and one["videos"] == 11 and one["unreadable"] == 1
    assert "6.mp4" in result.stdout and result.stdout.count("top-1") == 1


def test_prototypes_are_grouped_by_direction():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(4, 16), dim=1)
    vectors = F.normalize(centres.repeat(25, 1) + 0.05 * torch.randn(100, 16), dim=1)
    group = train.group_prototypes(vectors, torch.arange(0, 100, 3), number=4)
    assert all(len(set(group[k::4].tolist())) == 1 for k in range(4)) and len(set(group.tolist())) == 4


def test_painting_puts_each_tube_at_its_place():
    clips = argparse.Namespace(grid=GRID, tube=TUBE)
    image = train.paint(torch.arange(32.), clips)
    assert image.shape == (1, *SIZE) and image[0, 0, 9, 17] == 6 and image[0, 3, 31, 0] == 28
    tubes = take_tubes(image.expand(3, -1, -1, -1)[None], TUBE)
    assert torch.equal(tubes[0].flatten(1).amax(dim=1), torch.arange(32.)) and n_frames_equal(image[0, :2])


def test_show_writes_pictures_and_a_film_that_plays(here):
    assert train.main(["--max-steps", "1", "--batch-size", "16", "--out", "shown"]) == 0
    assert train.main(["--task", "show", "--init", "shown", "--split", "val", "--out", "pictures"]) == 0
    names = {"masks.png", "components.png", "prototypes.png", "clusters.png", "clusters.mp4"}
    assert {path.name for path in Path("pictures").iterdir()} == names
    film = decode("pictures/clusters.mp4", range)
    assert film.shape == (24, 3, 224, 448)                                                     # three clips of 8 frames
    assert not torch.equal(film[0], film[8])


# --- Two processes ----------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def half_of_the_batch(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (video, mask) = small(), batch()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    part = slice(2 * rank, 2 * rank + 2)
    loss, stats = parallel(video[part], mask[part])
    loss.backward()
    soft = sinkhorn(cosines(60, 10).double()[30 * rank:30 * rank + 30])
    torch.save(dict(loss=loss.detach(), video=stats["video_assignment"], target=stats["target_assignment"], soft=soft,
                    gradients={n: p.grad for n, p in model.named_parameters()}), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_gradients_and_assignments_of_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(half_of_the_batch, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, (video, mask) = small(), batch()
    loss, stats = model(video, mask)
    loss.backward()
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-12)
    for name in ("video", "target"):
        assert torch.equal(torch.cat([first[name], second[name]]), stats[f"{name}_assignment"])
    for name, parameter in model.named_parameters():
        assert torch.allclose(first["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-14), name
        assert torch.equal(first["gradients"][name], second["gradients"][name])
    assert torch.allclose(torch.cat([first["soft"], second["soft"]]), sinkhorn(cosines(60, 10).double()), rtol=1e-12)


def test_torchrun_trains_on_two_processes(here):
    result = subprocess.run([*TORCHRUN, str(HERE / "train.py"), "--epochs", "4", "--batch-size", "16", "--out", "two"],
                            cwd=here, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 processes x 16 clips x 2 accumulated = 64" in result.stdout and result.stdout.count("untrained") == 1
    assert log_of("two")[-1]["step"] == 4


def test_a_run_goes_on_with_another_number_of_processes_as_if_nothing_had_changed(here):
    assert train.main(["--epochs", "3", "--batch-size", "16", "--accum", "1", "--out", "one"]) == 0
    assert train.main(["--epochs", "3", "--batch-size", "16", "--accum", "1", "--out", "more", "--max-steps", "6"]) == 0
    result = subprocess.run([*TORCHRUN, str(HERE / "train.py"), "--resume", "more"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "it had 1 processes x 16 clips x 1" in result.stdout and "2 processes x 8 clips x 1" in result.stdout
    one, more = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("one", "more"))
    assert one["step"] == more["step"] == 12
    assert all(torch.allclose(one["model"][name], more["model"][name], atol=1e-4) for name in one["model"])
    assert train.main(["--epochs", "4", "--batch-size", "16", "--accum", "1", "--out", "odd", "--max-steps", "6"]) == 0
    assert train.main(["--resume", "odd", "--batch-size", "12"]) == 0                        # another global batch
    assert torch.load("odd/last.pt", weights_only=True)["epoch"] == 4


def test_a_process_that_dies_ends_the_whole_job_within_a_minute(here):
    job = subprocess.Popen([*TORCHRUN, str(HERE / "train.py"), "--epochs", "100000", "--out", "dies"],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_a_log_line("dies", job)
    os.kill(max(children_of(job.pid)), signal.SIGKILL)
    try:
        assert job.wait(timeout=60) != 0
    finally:
        job.kill()


# --- DINO as the projection network -----------------------------------------------------------------------------------

def dino_weights(width=128, depth=2, patch=16, side=2):
    """Random weights of a small DINO, in DINO's own names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width), "norm.weight": (width,),
              "norm.bias": (width,), "patch_embed.proj.weight": (width, 3, patch, patch),
              "patch_embed.proj.bias": (width,)}
    for n in range(depth):
        for name, shape in (("norm1", (width,)), ("norm2", (width,)), ("attn.qkv", (3 * width, width)),
                            ("attn.proj", (width, width)), ("mlp.fc1", (4 * width, width)),
                            ("mlp.fc2", (width, 4 * width))):
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def dino_tokens(w, image, heads, depth=2):
    """DINO's forward pass written out, all tokens of one image (3, S, S)."""
    def norm(x, name):
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = F.conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)[0].flatten(1).T
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    for n in range(depth):
        qkv = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
        weight = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])).softmax(dim=2)
        x = x + linear(torch.einsum("hij,jhd->ihd", weight, v).flatten(1), f"blocks.{n}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")), f"blocks.{n}.mlp.fc2")
    return norm(x, "norm")


def test_the_teacher_gives_dino_s_patch_tokens_of_the_first_frame_of_each_tubelet():
    weights, video = dino_weights(), torch.randn(2, 3, 6, 32, 32)
    teacher = sigma.load_teacher(weights, (3, 2, 2), (2, 16, 16))
    tokens = teacher(video)
    assert tokens.shape == (2, 12, 128)
    by_hand = [torch.cat([dino_tokens(weights, clip[:, t], heads=2)[1:] for t in (0, 2, 4)]) for clip in video]
    assert torch.allclose(tokens, torch.stack(by_hand), atol=1e-4)
    video[:, :, 1::2] = 0
    assert torch.equal(teacher(video), tokens)                                                   # no other frame counts


def test_the_teacher_never_trains_and_stays_in_float32_under_autocast():
    teacher = sigma.load_teacher(dino_weights(), (1, 2, 2), (2, 16, 16)).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    video = torch.randn(1, 3, 2, 32, 32, requires_grad=True)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        tokens = teacher(video)
    assert torch.equal(tokens, teacher(video)) and tokens.dtype == torch.float32 and not tokens.requires_grad
    assert torch.get_float32_matmul_precision() == "high"


def test_the_teacher_has_a_token_for_each_tube_whatever_their_size():
    weights = dino_weights(side=3)
    for grid, tube, size in (((1, 3, 3), (2, 16, 16), 48), ((2, 5, 5), (1, 16, 16), 80), ((1, 4, 4), (2, 8, 8), 32)):
        teacher = sigma.load_teacher(weights, grid, tube)
        assert teacher(torch.randn(1, 3, grid[0] * tube[0], size, size)).shape == (1, math.prod(grid), 128)
        places = teacher.vit.encoder.pos_embedding[0, 1:].unflatten(0, grid[1:])           # corners stay what they were
        theirs = weights["pos_embed"][0, 1:].unflatten(0, (3, 3))
        assert torch.allclose(places[::grid[1] - 1, ::grid[1] - 1], theirs[::2, ::2], atol=1e-5)
    with pytest.raises(sigma.WeightsError, match="as many tubes down as across"):
        sigma.load_teacher(weights, (1, 2, 3), (2, 16, 16))
    del weights["blocks.1.mlp.fc2.bias"]
    with pytest.raises(sigma.WeightsError, match="1 names that differ"):
        sigma.load_teacher(weights, (1, 3, 3), (2, 16, 16))


def test_dino_is_downloaded_once_as_weights_alone_and_against_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        torch.save(dino_weights(depth=1), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = sigma.download_dino("dino"), sigma.download_dino("dino")
    assert asked == [(sigma.DINO["dino"][1], "bf34ad0f424b9029")] and first.keys() == second.keys()


@pytest.mark.parametrize("rank, expected", [("0", ["download", "all"]), ("1", ["all", "download"])])
def test_one_process_of_each_machine_downloads_while_the_others_wait(rank, expected, monkeypatch):
    done, width = [], {"target_dim": 768, "tube": (2, 16, 16)}
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(train, "gather", lambda thing: done.append("all") or [thing])
    monkeypatch.setattr(train, "download_dino", lambda name: done.append("download") or dino_weights(768, depth=1))
    c = argparse.Namespace(target="dino", task="pretrain", frames=2, size=32, sizes=width, teacher=None)
    train.make_teacher(c, torch.device("cpu"))
    assert done[:2] == expected and done.count("download") == 1


def test_training_with_the_teacher_keeps_it_out_of_the_checkpoint_and_goes_on_with_two_processes(here, capsys):
    torch.save(dino_weights(384, depth=1, side=14), "dino.pth")
    common = ["--target", "dino-s", "--teacher", "dino.pth", "--batch-size", "16", "--epochs", "3"]
    assert train.main([*common, "--out", "dino", "--max-steps", "2"]) == 0
    kept = torch.load("dino/last.pt", weights_only=True)
    assert kept["model"]["prototypes"].shape == (128, 384)
    assert not any("vit" in name or "project" in name for name in kept["model"])
    result = subprocess.run([*TORCHRUN, str(HERE / "train.py"), "--resume", "dino"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.load("dino/last.pt", weights_only=True)["step"] == 3 and Path("dino/prototypes.png").exists()
    assert train.main(["--task", "show", "--init", "dino", "--teacher", "dino.pth", "--out", "dino-show"]) == 0
    assert Path("dino-show/clusters.mp4").exists()
    capsys.readouterr()
    assert train.main([*common[:4], "--bench", "--batch-size", "2"]) == 0
    assert re.search(r"teacher +\d+% ", capsys.readouterr().out)


def test_without_network_or_with_another_teacher_one_sentence_says_what_to_do(here, capsys, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    torch.save(dino_weights(384, depth=1), "small.pth")
    torch.save({"a": torch.zeros(1)}, "other.pth")
    for arguments, message in ((["dino"], "dino_vitbase16_pretrain.pth, found <urlopen error no network>: download"),
                               (["dino", "--teacher", "nowhere"], "found no file nowhere"),
                               (["dino", "--teacher", "small.pth"], "768 wide for --target dino, found 384 in small"),
                               (["mlp", "--teacher", "small.pth"], "expected --target dino or dino-s with --teacher"),
                               (["dino", "--teacher", "other.pth"], "found no cls_token")):
        assert train.main(["--out", "never", "--target", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path("never").exists()


# --- Weights of others, and for others --------------------------------------------------------------------------------

def their_block(ours, theirs):
    """(our name, their name) of what a block of Hugging Face's holds, but for query, key and value weights."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    return [(f"{ours}.{a}.{part}", f"{theirs}.{b}.{part}") for a, b in names.items() for part in ("weight", "bias")] + [
        (f"{ours}.attn.{part}_bias", f"{theirs}.attention.attention.{part}_bias") for part in "qv"]


def hugging_face_file(model, kind):
    """A model's weights as the transformers library would save them."""
    ours, prefix = model.state_dict(), "" if kind == "Model" else "videomae."
    pairs = [(f"encoder.patch_embed.proj.{part}", f"{prefix}embeddings.patch_embeddings.projection.{part}")
             for part in ("weight", "bias")]
    stacks = [(f"encoder.blocks.{n}", f"{prefix}encoder.layer.{n}") for n in range(2)]
    if kind == "ForPreTraining":
        stacks.append(("decoder.blocks.0", "decoder.decoder_layers.0"))
        same = ("mask_token", "encoder_to_decoder.", "decoder.norm.", "decoder.head.")
        pairs += [(name, name) for name in ours if name.startswith(same)]
    if kind == "ForVideoClassification":
        pairs += [(name, name.replace("head", "classifier")) for name in ours if name.startswith(("fc_norm", "head"))]
    else:
        pairs += [(f"encoder.norm.{part}", f"{prefix}layernorm.{part}") for part in ("weight", "bias")]
    theirs = {}
    for a, b in stacks:
        pairs += their_block(a, b)
        for part, weight in zip(("query", "key", "value"), ours[f"{a}.attn.qkv.weight"].chunk(3)):
            theirs[f"{b}.attention.attention.{part}.weight"] = weight.clone()
    return theirs | {b: ours[a] for a, b in pairs}


def trained(model):
    """The model with no weight left at its start, as after training, in float32."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.float().eval()


def network(kind):
    if kind in ("ForVideoClassification", "fine-tuned", "our fine-tuned"):
        return trained(Classifier(small().encoder, 5))
    return trained(small({"dino": "dino", "ForPreTraining": "pixel", "pixel": "pixel"}.get(kind, "mlp")))


FILES = ["ours", "our fine-tuned", "mlp", "dino", "pixel", "fine-tuned", "Model", "ForPreTraining",
           "ForVideoClassification"]


def save_as(kind, model, path):
    """Writes a checkpoint as the named code would."""
    weights, flags = model.state_dict(), argparse.Namespace(model="any", lr=1e-3, betas=[0.9, 0.95])
    if kind in ("mlp", "dino", "pixel"):
        weights = {name.replace("projector.", "head."): value for name, value in weights.items()}
        content = {"model": weights, "optimizer": {"state": {}}, "epoch": 799, "args": flags}
    elif kind == "fine-tuned":
        content = {"module": {name.removeprefix("encoder."): value for name, value in weights.items()}, "args": flags}
    elif kind in ("ours", "our fine-tuned"):
        content = {"model": weights}
    else:
        content = hugging_face_file(model, kind)
    torch.save(content, path)


@pytest.mark.parametrize("kind", FILES)
def test_weights_in_every_layout_give_the_same_network(kind, tmp_path):
    model, (video, mask) = network(kind), batch(2)
    save_as(kind, model, tmp_path / "weights.pt")
    loaded = sigma.load_model(tmp_path / "weights.pt", heads=2, decoder_heads=2).eval()
    wanted = {name: value for name, value in model.state_dict().items()
              if kind != "Model" or name.startswith("encoder.")}
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.encoder(video.float()), model.encoder(video.float()))
    if isinstance(model, Classifier):
        assert torch.equal(loaded(video.float()), model(video.float()))
    elif kind != "Model":
        assert loaded.target == model.target
        features = torch.randn(2, 32, 16) if kind == "dino" else None
        assert loaded(video.float(), mask, features)[0] == model(video.float(), mask, features)[0]
    longer = torch.randn(1, 3, 6, 40, 40)
    assert loaded.encoder(longer).shape == (1, 75, 32)                            # any length and size: 3 x 5 x 5 tubes


def test_query_key_and_value_weights_of_hugging_face_stand_in_this_order():
    theirs = {f"{part}.weight": torch.randn(32, 32) for part in ("query", "key", "value")}
    block = "encoder.layer.0.attention.attention."
    ours = sigma.from_hugging_face({block + name: value for name, value in theirs.items()})
    x = torch.randn(3, 32)
    q, k, v = (x @ ours["encoder.blocks.0.attn.qkv.weight"].T).chunk(3, dim=1)
    for found, part in ((q, "query"), (k, "key"), (v, "value")):
        assert torch.allclose(found, x @ theirs[f"{part}.weight"].T, atol=1e-5)


def test_a_file_that_does_not_fit_stops_with_the_list_and_runs_no_code(tmp_path):
    model = network("mlp")
    weights = model.state_dict()
    del weights["decoder.norm.bias"]
    weights["encoder.blocks.1.attn.q_bias"] = torch.zeros(31)
    torch.save({"model": weights}, tmp_path / "lacking.pt")
    with pytest.raises(sigma.WeightsError, match=r"2 names .* decoder.norm.bias .* encoder.blocks.1.attn.q_bias "
                                                 r"\(expected \(32,\), found \(31,\)\)"):
        sigma.load_model(tmp_path / "lacking.pt", heads=2, decoder_heads=2)
    save_as("mlp", model, tmp_path / "good.pt")
    with pytest.raises(sigma.WeightsError, match="a width of 32"):                 # heads can't be read off the weights
        sigma.load_model(tmp_path / "good.pt")

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": model.state_dict(), "args": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(Exception, match="mkdir"):
        sigma.load_model(tmp_path / "harmful.pt")
    assert not (tmp_path / "harm").exists()
    monkey = tmp_path / "file.safetensors"
    monkey.write_bytes(b"")
    if not importlib.util.find_spec("safetensors"):
        with pytest.raises(sigma.WeightsError, match="pip install safetensors"):
            sigma.load_model(monkey)


@pytest.mark.parametrize("size", ["small", "base", "large", "huge"])
def test_size_and_target_are_read_off_the_weights(size):
    for target in sigma.TARGETS:
        with torch.device("meta"):
            model = build_model(size, target=target, prototypes=77)
        sizes = sigma.sizes_of(model.state_dict())
        wanted = sigma.options(size, target, prototypes=77)
        assert sizes["target"] == target and all(sizes[name] == wanted[name] for name in sizes.keys() & wanted.keys())
        assert sizes["dim"] == wanted["dim"] and (target == "pixel") == ("prototypes" not in sizes)


@pytest.mark.parametrize("kind", ["mlp", "dino", "pixel", "fine-tuned"])
@pytest.mark.parametrize("layout", ["hf", "authors"])
def test_exported_weights_have_the_names_of_the_others_and_come_back_exactly(kind, layout, here):
    model = network(kind)
    os.makedirs("mine", exist_ok=True)
    torch.save({"model": model.state_dict(), "config": {"sizes": {"heads": 2, "decoder_heads": 2}}}, "mine/any.pt")
    out = f"exported-{kind}-{layout}/pytorch_model.bin"
    command = ["--task", "export", "--init", "mine/any.pt", "--format", layout, "--out", out]
    assert train.main(command) == 0
    written = torch.load(out, weights_only=True)
    if layout == "hf":
        saved = {"pixel": "ForPreTraining", "fine-tuned": "ForVideoClassification"}.get(kind, "Model")
        expected = hugging_face_file(model, saved)
        config = json.loads(Path(out).with_name("config.json").read_text())
        assert config["architectures"] == [f"VideoMAE{saved}"] and config["layer_norm_eps"] == 1e-6
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size",
                 "tubelet_size", "image_size", "num_frames")
        assert [config[name] for name in names] == [32, 2, 2, 128, 8, 2, 224, 16]
        assert config["use_mean_pooling"] == (kind == "fine-tuned")
    else:
        save_as(kind, model, "expected.pt")
        expected = torch.load("expected.pt", weights_only=False)
        expected, written = expected.get("model", expected.get("module")), written["model"]
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    back = sigma.load_model(Path(out).parent if layout == "hf" else out, heads=2, decoder_heads=2).state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.items())
    assert len(back) == len(model.state_dict()) or layout == "hf" and saved == "Model"
    assert train.main(command) == 2                                                             # nothing is overwritten


def test_published_weights_start_any_task_and_contradictions_stop(here, capsys):
    model = trained(build_model("tiny"))
    save_as("mlp", model, "published.pth")
    torch.save(hugging_face_file(trained(Classifier(Encoder(dim=32, depth=2, heads=2, tube=TUBE), 8)),
                                 "ForVideoClassification"), "tuned.bin")
    Path("config.json").write_text('{"num_attention_heads": 2}')
    try:
        small_steps = ["--max-steps", "1", "--batch-size", "16"]
        assert train.main(["--init", "published.pth", "--out", "a", *small_steps]) == 0
        assert train.main(["--init", "published.pth", "--out", "b", "--task", "finetune", *small_steps]) == 0
        assert "left out: decoder, encoder_to_decoder, mask_token, projector, prototypes" in capsys.readouterr().out
        assert train.main(["--init", "tuned.bin", "--out", "c", "--task", "knn", "--frames", "4"]) == 0
        assert train.main(["--init", "tuned.bin", "--out", "d", "--task", "finetune", *small_steps]) == 0
        for arguments, message in (
                (["--init", "published.pth", "--model", "small"], "expected --model tiny or none with the weights in"),
                (["--init", "published.pth", "--target", "dino"], "expected --target mlp or none with the weights in"),
                (["--init", "tuned.bin"], "found an encoder and a classifier in tuned.bin"),
                (["--task", "export", "--init", "published.pth", "--out", "x.pt"], "expected --format with --task"),
                (["--task", "export", "--init", "published.pth", "--format", "hf", "--out", "x"], "found x: choose")):
            assert train.main([*arguments, *["--out", "never"] * ("--out" not in arguments)]) == 2
            assert message in capsys.readouterr().err
    finally:
        Path("config.json").unlink()


# --- README.md --------------------------------------------------------------------------------------------------------

def test_each_python_snippet_of_the_readme_runs_and_prints_what_it_says(here):
    assert train.main(["--epochs", "1", "--batch-size", "32"]) == 0                 # one starts from out/toy-tiny-mlp
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert len(snippets) == 4
    for snippet in snippets:
        with redirect_stdout(io.StringIO()) as text:
            exec(snippet, {})
        said = re.findall(r"^print\(.*\) +# (.*)$", snippet, re.M)
        assert said and text.getvalue().splitlines() == said


def test_each_evaluation_command_of_the_readme_runs(here):
    assert train.main(["--max-steps", "2", "--batch-size", "16", "--out", "out/toy-tiny-mlp-readme"]) == 0
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"^python train.py (--task .*--init out/toy-tiny-mlp.*)$", readme, re.M)
    assert [command.split()[1] for command in commands] == ["knn", "probe", "finetune", "finetune", "features", "show",
                                                                "export"]
    for i, command in enumerate(commands):
        words = command.replace("out/toy-tiny-mlp", "out/toy-tiny-mlp-readme").replace("819", "16").split()
        if words[1] != "export":
            words += ["--epochs", "1", "--batch-size", "16", "--out", f"out/readme-{i}"]
        assert train.main(words) == 0, command
    assert json.loads(Path("out/hf/config.json").read_text())["num_frames"] == 8
