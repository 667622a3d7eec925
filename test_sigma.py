"""What each part of SIGMA must do, as short tests: python -m pytest -q. No network, no GPU."""
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image

import data
import sigma
import train
from data import Clips, EndlessSampler, VideoError, decode, find_videos, normalise
from sigma import (SIGMA, Teacher, UserError, build_model, load_model, sinkhorn, split_mask,
                   symmetric_loss, take_tubes, tube_mask)

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
GRID, TUBE, SIZE = (2, 4, 4), (2, 8, 8), (4, 32, 32)  # of the clips for small models


def small(target="mlp", **changes):
    """A model that takes milliseconds, in float64 so that equal means equal."""
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2,
                 tube=TUBE, target_dim=16, prototypes=20, projector_widths=(24,))
    return SIGMA(**sizes | changes, target=target).double()


def batch(n=4, seed=0):
    """n clips and their masks."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(n, 3, *SIZE, generator=generator, dtype=torch.float64)
    return video, tube_mask(n, GRID, 0.75, generator)


def cosines(n, k, dim=16, seed=0):
    """Cosines (n, k) of random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(m, dim, generator=generator), dim=1) for m in (n, k))
    return a @ b.T


# --- sigma.py: tubes and masks --------------------------------------------------------------------

def test_positions_are_the_published_sinusoids():
    table = sigma.positions(50, 8)
    for p, j in ((0, 0), (0, 1), (7, 0), (7, 3), (49, 6), (49, 7)):
        angle = p / 10000 ** (2 * (j // 2) / 8)
        wanted = math.cos(angle) if j % 2 else math.sin(angle)
        assert table[p, j] == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(sigma.positions(20, 8), table[:20])
    assert sigma.positions(20, 7).shape == (20, 7)


def test_a_tube_mask_hides_equally_many_in_all_slices():
    mask = tube_mask(6, (8, 14, 14))
    assert mask.sum(dim=1).tolist() == [1408] * 6  # int(0.9 * 196) = 176 in each of 8 slices
    slices = mask.view(6, 8, 196)
    assert (slices == slices[:, :1]).all()
    assert len({tuple(m.tolist()) for m in slices[:, 0]}) == 6  # each clip its own positions
    again = [tube_mask(2, GRID, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError):
        tube_mask(1, (8, 14, 14), 1.0)


def test_tubes_put_back_together_give_the_clip():
    video, _ = batch()
    t, h, w = GRID
    tubes = take_tubes(video, TUBE)
    back = rearrange(tubes, "b (t h w) c p q r -> b c (t p) (h q) (w r)", t=t, h=h, w=w)
    assert torch.equal(back, video)
    index = torch.tensor([[3, 17]] * 4)
    assert torch.equal(take_tubes(video, TUBE, index), tubes[:, [3, 17]])


def test_pixel_targets_are_standardised_tubes():
    """In the order frame, row, column, channel; each channel over the tube's positions."""
    video, mask = batch(1)
    _, hidden = split_mask(mask)
    target = small("pixel").embed(video, hidden)
    n = hidden[0, 5].item()
    t, h, w = n // 16, n // 4 % 4, n % 4
    mean, std = (torch.tensor(v).double()[:, None, None, None]
                 for v in (sigma.IMAGENET_MEAN, sigma.IMAGENET_STD))
    tube = (video[0] * std + mean)[:, 2 * t:2 * t + 2, 8 * h:8 * h + 8, 8 * w:8 * w + 8]
    for channel, frame, row, column in ((0, 0, 0, 0), (2, 1, 7, 3), (1, 0, 4, 5)):
        values = tube[channel]
        wanted = (values[frame, row, column] - values.mean()) / (values.std() + 1e-6)
        found = target[0, 5, frame * 8 * 8 * 3 + row * 8 * 3 + column * 3 + channel]
        assert found.item() == pytest.approx(wanted.item(), abs=1e-9)


# --- sigma.py: the video model --------------------------------------------------------------------

def test_the_masked_encoder_is_its_blocks_on_visible_tokens():
    encoder, (video, mask) = small().encoder, batch()
    visible, _ = split_mask(mask)
    tokens = encoder.patch_embed.proj(video).flatten(2).mT + sigma.positions(32, 32)  # convolution
    tokens = torch.stack([clip[~m] for clip, m in zip(tokens, mask)])
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.allclose(encoder(video, visible), encoder.norm(tokens), atol=1e-12)
    everything = torch.arange(32).expand(4, -1)
    assert torch.allclose(encoder(video), encoder(video, everything), atol=1e-12)


def test_attention_has_a_bias_on_queries_and_values_not_keys():
    layer, x = small().encoder.blocks[0].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    torch.nn.init.normal_(layer.q_bias)
    torch.nn.init.normal_(layer.v_bias)
    w_q, w_k, w_v = layer.qkv.weight.split(32)
    q, k, v = x @ w_q.T + layer.q_bias, x @ w_k.T, x @ w_v.T + layer.v_bias
    heads = [(q[..., h] @ k[..., h].transpose(1, 2) / 16 ** 0.5).softmax(dim=-1) @ v[..., h]
             for h in (slice(0, 16), slice(16, 32))]
    assert torch.allclose(layer(x), layer.proj(torch.cat(heads, dim=2)), atol=1e-12)


def test_the_decoder_sees_visible_tokens_then_mask_tokens():
    """Each at its position; it answers for the hidden ones alone."""
    model, (video, mask) = small(), batch(1)
    visible, hidden = split_mask(mask)
    table = sigma.positions(32, 16).double()
    x = model.encoder_to_decoder(model.encoder(video, visible))[0] + table[~mask[0]]
    x = torch.cat([x, model.mask_token[0] + table[mask[0]]])[None]
    for block in model.decoder.blocks:
        x = block(x)
    wanted = model.decoder.head(model.decoder.norm(x))[:, 8:]
    assert torch.allclose(model.predict(video, visible, hidden), wanted, atol=1e-12)


def test_weights_start_as_published():
    model = build_model("tiny")
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith(("encoder.", "decoder.")):  # xavier-uniform
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound, name
        elif name.startswith(("encoder.", "decoder.")) and "patch_embed" not in name:
            assert (weight == float("norm" in name and "weight" in name)).all(), name
    assert model.encoder_to_decoder.weight.abs().max() <= 1 / 128 ** 0.5  # torch's default
    assert 0 < model.mask_token.abs().max() <= 0.02
    assert model.prototypes.std().item() == pytest.approx(1, abs=0.05)


def test_changing_hidden_pixels_changes_no_token():
    encoder, (video, mask) = small().encoder, batch()
    hidden = mask.view(4, 1, *GRID)
    for axis, step in enumerate(TUBE, start=2):
        hidden = hidden.repeat_interleave(step, axis)
    other, (visible, _) = torch.where(hidden, video + 1, video), split_mask(mask)
    assert torch.equal(encoder(video, visible), encoder(other, visible))
    assert not torch.equal(encoder(video), encoder(other))


@pytest.mark.parametrize("size, tokens", [((2, 16, 16), 4), ((4, 32, 48), 48),
                                          ((2, 328, 320), 1640)])
def test_the_encoder_takes_any_size_that_the_tube_divides(size, tokens):
    encoder = small().encoder
    assert encoder(torch.zeros(1, 3, *size, dtype=torch.float64)).shape == (1, tokens, 32)


def test_wrong_sizes_and_uneven_masks_stop():
    model, (video, mask) = small(), batch()
    with pytest.raises(ValueError, match=r"\(4, 30, 32\)"):
        model.encoder(video[..., :30, :])
    with pytest.raises(ValueError, match=r"\(4, 32\)"):
        model(video, mask[:, :31])
    with pytest.raises(ValueError, match="Teacher"):
        small("dino")(video, mask)
    with pytest.raises(ValueError, match=r"\(4, 32, 16\)"):
        small("dino")(video, mask, torch.zeros(4, 33, 16))
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match="same number"):
        model(video, mask)


@pytest.mark.parametrize("way", ["recompute", "compile"])
def test_recomputed_and_compiled_blocks_give_the_same(way):
    video, mask = batch()
    results = []
    for changed in (False, True):
        model = small().float()  # torch 2.6 can't compile attention of doubles on a CPU
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


# --- sigma.py: Sinkhorn ---------------------------------------------------------------------------

def plain_sinkhorn(scores, eps, iters):
    """The textbook iteration in float64."""
    q = (scores.double() / eps).exp()
    for _ in range(iters):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def test_sinkhorn_gives_rows_one_and_columns_equal_shares():
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
    both = sinkhorn([scores, -scores], eps, iters)  # two branches that share the all-reduces
    assert torch.allclose(both[0].double(), plain, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("scores", [
    cosines(300, 40), torch.eye(30) * 2 - 1, torch.ones(20, 6),
    F.one_hot(torch.zeros(50, dtype=int), 8) * 2.0 - 1])  # the last: all on one prototype
def test_sinkhorn_stays_exact_at_small_eps(scores):
    soft = sinkhorn(scores, eps=0.005)
    assert soft.isfinite().all()
    assert torch.allclose(soft.double(), plain_sinkhorn(scores, 0.005, 10), atol=1e-5)


def test_sinkhorn_works_in_float32_under_autocast():
    scores = cosines(200, 30).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        soft = sinkhorn(scores)
    assert soft.dtype == torch.float32 and not soft.requires_grad
    assert torch.allclose(soft.double(), plain_sinkhorn(scores, 0.05, 10), rtol=1e-4)
    assert sinkhorn(scores.bfloat16()).dtype == torch.float32


def test_assignments_use_all_prototypes_even_if_one_is_nearest():
    scores = cosines(2000, 20)
    scores[:, 0] += 0.9  # every tube's nearest prototype is the first
    nearest, assigned = scores.argmax(dim=1), sinkhorn(scores).argmax(dim=1)
    assert (nearest == 0).float().mean() > 0.9
    assert assigned.bincount(minlength=20).min() > 2000 / 20 / 3
    used, entropy = sigma.usage(assigned, 20)
    assert used == 20 and 0.95 * math.log(20) < entropy <= math.log(20) + 1e-6


# --- sigma.py: the loss, and who gets gradient ----------------------------------------------------

def gradients(model, video, mask, features=None):
    """Names of the parameters that get a gradient from (the target term, the video term)."""
    visible, hidden = split_mask(mask)
    scores = model.compare(model.predict(video, visible, hidden),
                           model.embed(video, hidden, features))
    hard = [soft.argmax(dim=1) for soft in sinkhorn(scores)]
    names, parameters = zip(*model.named_parameters())
    found = []
    for branch in (1, 0):
        loss = F.cross_entropy(scores[branch] / 0.1, hard[1 - branch])
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        found.append({n for n, g in zip(names, grads) if g is not None and g.abs().max() > 0})
    return found


def test_each_term_trains_its_own_branch():
    """The target term trains projector and prototypes, the video term the video model alone."""
    model = small()
    target_term, video_term = gradients(model, *batch())
    names = {name for name, _ in model.named_parameters()}
    projection = {name for name in names if name.startswith(("projector", "prototypes"))}
    assert target_term == projection and video_term == names - projection


def test_with_a_teacher_the_target_term_trains_prototypes_alone():
    features = torch.randn(4, 32, 16, dtype=torch.float64, requires_grad=True)
    model, (video, mask) = small("dino"), batch()
    assert gradients(model, video, mask, features)[0] == {"prototypes"}
    model(video, mask, features)[0].backward()
    assert features.grad is None


def test_teacher_features_are_standardised_over_all_tubes():
    """Per clip and channel, before the hidden ones are taken."""
    model, (video, mask) = small("dino"), batch()
    features = torch.randn(4, 32, 16, dtype=torch.float64)
    hidden = split_mask(mask)[1]
    wanted = features - features.mean(1, keepdim=True)
    wanted = wanted / (features.var(1, keepdim=True).sqrt() + 1e-6)
    assert torch.allclose(model.embed(video, hidden, features)[2], wanted[2][mask[2]])


def test_the_loss_is_two_cross_entropies_of_hard_assignments():
    model, (video, mask) = small(), batch()
    loss, stats = model(video, mask)
    visible, hidden = split_mask(mask)
    scores = model.compare(model.predict(video, visible, hidden), model.embed(video, hidden))
    hard = [plain_sinkhorn(s, 0.05, 10).argmax(dim=1) for s in scores]
    assert torch.equal(stats["video_assignment"], hard[0])
    assert torch.equal(stats["target_assignment"], hard[1])
    rows = torch.arange(len(hard[0]))
    logs = [(s / 0.1).log_softmax(dim=1) for s in scores]
    by_hand = -(logs[1][rows, hard[0]] + logs[0][rows, hard[1]]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)
    terms = stats["target_term"] + stats["video_term"]
    assert loss.item() == pytest.approx(terms.item(), rel=1e-12)
    assert not any(value.requires_grad for value in stats.values())


def test_the_loss_starts_near_two_ln_k():
    torch.manual_seed(0)
    model = build_model("small", tube=TUBE, prototypes=500)
    _, stats = model(torch.randn(4, 3, 16, 64, 64), tube_mask(4, (8, 8, 8)))
    assert stats["log_k"].item() == pytest.approx(math.log(500), rel=1e-6)
    for term in ("target_term", "video_term"):
        assert stats[term].item() == pytest.approx(math.log(500), rel=0.1)


def test_prototypes_are_rescaled_in_training_steps_only():
    model, (video, mask) = small(), batch()
    start = model.prototypes.detach().clone()
    quiet, _ = model.eval()(video, mask)
    assert torch.equal(model.prototypes, start) and start.norm(dim=1).max() > 2
    loss, _ = model.train()(video, mask)
    loss.backward()
    assert loss.item() == pytest.approx(quiet.item(), rel=1e-12)
    assert torch.allclose(model.prototypes.norm(dim=1), torch.ones(20, dtype=torch.float64))
    radial = (model.prototypes.grad * model.prototypes).sum(dim=1)  # 0 if rescaling had a graph
    assert radial.abs().max() > 1e-4


def test_the_pixel_target_is_a_mean_squared_error():
    model, (video, mask) = small("pixel"), batch()
    visible, hidden = split_mask(mask)
    difference = model.predict(video, visible, hidden) - model.embed(video, hidden)
    wanted = difference.square().mean().item()
    assert model(video, mask)[0].item() == pytest.approx(wanted, rel=1e-12)
    assert not hasattr(model, "prototypes") and not hasattr(model, "projector")


def half_of_the_batch(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, (video, mask) = small(), batch()
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    part = slice(2 * rank, 2 * rank + 2)
    loss, stats = parallel(video[part], mask[part])
    loss.backward()
    soft = sinkhorn(cosines(60, 10).double()[30 * rank:30 * rank + 30])
    alone = sinkhorn(cosines(30, 10, seed=rank), group=dist.new_subgroups(1)[0])
    torch.save(dict(loss=loss.detach(), video=stats["video_assignment"], soft=soft, alone=alone,
                    target=stats["target_assignment"],
                    gradients={n: p.grad for n, p in model.named_parameters()}),
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    """Loss, gradients and assignments of the whole batch; a group of one balances alone."""
    torch.multiprocessing.spawn(half_of_the_batch, (str(tmp_path),), nprocs=2)
    halves = first, second = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, (video, mask) = small(), batch()
    loss, stats = model(video, mask)
    loss.backward()
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-12)
    for name in ("video", "target"):
        both = torch.cat([half[name] for half in halves])
        assert torch.equal(both, stats[f"{name}_assignment"])
    for name, parameter in model.named_parameters():
        assert torch.allclose(first["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-14)
        assert torch.equal(first["gradients"][name], second["gradients"][name])
    soft = torch.cat([half["soft"] for half in halves])
    assert torch.allclose(soft, sinkhorn(cosines(60, 10).double()), rtol=1e-12)
    assert torch.equal(second["alone"], sinkhorn(cosines(30, 10, seed=1)))


# --- sigma.py: DINO, checkpoints ------------------------------------------------------------------

def dino_weights(width=128, depth=2, patch=16, side=2):
    """Random weights of a small DINO, in DINO's own names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width),
              "norm.weight": (width,), "norm.bias": (width,), "patch_embed.proj.bias": (width,),
              "patch_embed.proj.weight": (width, 3, patch, patch)}
    layers = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width),
              "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
              "mlp.fc2": (width, 4 * width)}
    for n in range(depth):
        for name, shape in layers.items():
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def dino_tokens(w, image, heads=2, depth=2):
    """DINO's forward pass written out, key bias included: all tokens of an image (3, S, S)."""
    def norm(x, name):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = F.conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = torch.cat([w["cls_token"][0], x[0].flatten(1).T]) + w["pos_embed"][0]
    for n in range(depth):
        qkv = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
        weight = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])).softmax(dim=2)
        x = x + linear(torch.einsum("hij,jhd->ihd", weight, v).flatten(1), f"blocks.{n}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{n}.mlp.fc2")
    return norm(x, "norm")


def test_the_teacher_gives_dino_s_patch_tokens():
    """Of the first frame of each tubelet, in float32 also under autocast; nothing trains."""
    weights, video = dino_weights(), torch.randn(2, 3, 6, 32, 32)
    teacher = Teacher(weights).train()
    tokens = teacher(video)
    by_hand = [torch.cat([dino_tokens(weights, clip[:, t])[1:] for t in (0, 2, 4)])
               for clip in video]
    assert torch.allclose(tokens, torch.stack(by_hand), atol=1e-4)
    video[:, :, 1::2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(video.requires_grad_()), tokens)
    assert not tokens.requires_grad and not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_has_a_token_for_each_tube():
    """Whatever the clip's and the tube's size; positions are interpolated as DINO does it."""
    teacher = Teacher(dino_weights(side=3), (2, 8, 8))
    assert teacher(torch.randn(1, 3, 4, 32, 40)).shape == (1, 2 * 4 * 5, 128)
    weights = dino_weights(side=3, depth=0)
    side = weights["pos_embed"][:, 1:].mT.unflatten(2, (3, 3))
    place = F.interpolate(side, scale_factor=(5.1 / 3, 4.1 / 3), mode="bicubic").flatten(2).mT
    weights |= {"patch_embed.proj.weight": torch.zeros(128, 3, 16, 16),
                "norm.weight": torch.ones(128), "norm.bias": torch.zeros(128)}
    wanted = F.layer_norm(place + weights["patch_embed.proj.bias"], (128,), eps=1e-6)
    found = Teacher(weights)(torch.randn(1, 3, 2, 80, 64))
    assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(UserError, match="fc2.bias"):
        Teacher({n: w for n, w in dino_weights().items() if "1.mlp.fc2.bias" not in n})


def test_parameters_have_the_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model("base").state_dict().items()}
    block = {"norm1.weight": (768,), "norm1.bias": (768,), "attn.q_bias": (768,),
             "attn.v_bias": (768,), "attn.qkv.weight": (2304, 768), "attn.proj.weight": (768, 768),
             "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
             "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072),
             "mlp.fc2.bias": (768,)}
    wanted = {"mask_token": (1, 1, 384), "prototypes": (3000, 256),
              "encoder_to_decoder.weight": (384, 768), "encoder.norm.weight": (768,),
              "encoder.norm.bias": (768,), "encoder.patch_embed.proj.weight": (768, 3, 2, 16, 16),
              "encoder.patch_embed.proj.bias": (768,), "decoder.norm.weight": (384,),
              "decoder.norm.bias": (384,), "decoder.head.weight": (256, 384),
              "decoder.head.bias": (256,)}
    wanted |= {f"encoder.blocks.{n}.{name}": s for n in range(12) for name, s in block.items()}
    wanted |= {f"decoder.blocks.{n}.{name}": tuple(side // 2 for side in s)
               for n in range(4) for name, s in block.items()}
    widths = (1536, 1024, 1024, 512, 256)
    for n, (i, o) in enumerate(zip(widths, widths[1:])):  # published as head.0, head.2, ...
        wanted |= {f"projector.{2 * n}.weight": (o, i), f"projector.{2 * n}.bias": (o,)}
    assert shapes == wanted


@pytest.mark.parametrize("target", ["mlp", "dino-s", "pixel"])
def test_published_checkpoints_load_wholly(target, tmp_path):
    """Their head.N is our projector; sizes are read off the weights; flags may lie beside them."""
    model = build_model("small", target=target, depth=2, decoder_depth=1, prototypes=30).eval()
    weights = {n.replace("projector.", "head."): w for n, w in model.state_dict().items()}
    flags = sigma.argparse.Namespace(lr=1e-3)
    torch.save({"model": weights, "args": flags, "epoch": 799}, tmp_path / "theirs.pth")
    loaded, clip = load_model(tmp_path / "theirs.pth").eval(), torch.randn(1, 3, 4, 48, 32)
    assert loaded.target == target and loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded.encoder(clip), model.encoder(clip))
    for name in {"decoder.norm.bias", "decoder.head.weight", "head.2.bias"} & weights.keys():
        lacking = {n: w for n, w in weights.items() if n != name}
        torch.save({"model": lacking}, tmp_path / "lacking.pth")
        with pytest.raises(UserError, match=name.replace("head.2", "projector.2")):
            load_model(tmp_path / "lacking.pth")
    with pytest.raises(UserError, match="decoder_heads"):
        load_model(tmp_path / "theirs.pth", decoder_heads=5)


def test_damaged_and_harmful_files_stop_and_run_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": build_model("tiny").state_dict(), "args": Harmful()}, tmp_path / "a.pt")
    (tmp_path / "last.pt").write_bytes(b"junk")
    for path, word in ((tmp_path / "a.pt", "mkdir"), (tmp_path, "a.pt"), (tmp_path / "no", "no")):
        with pytest.raises(UserError, match=word):  # a damaged last.pt names what lies beside it
            load_model(path)
    assert not (tmp_path / "harm").exists()


def test_parts_can_be_copied_with_their_imports():
    for function, imports, call in (
            (tube_mask, "import torch", "tube_mask(2, (2, 4, 4))"),
            (sinkhorn, "import torch, torch.distributed as dist", "sinkhorn(torch.rand(9, 4))"),
            (symmetric_loss, "import torch, torch.nn.functional as F",
             "symmetric_loss(*torch.rand(2, 9, 4), *torch.randint(4, (2, 9)))")):
        exec(f"{imports}\n{inspect.getsource(function)}\n{call}", {})
    parts = [sigma.positions, sigma.take_tubes, sigma.Attention, sigma.MLP, sigma.Block,
             sigma.run_blocks, sigma.init_linear, sigma.TubeEmbedding, sigma.Encoder]
    space = {}
    exec("import math, torch, torch.nn.functional as F\nfrom einops import rearrange\n"
         "from torch import nn\nfrom torch.utils.checkpoint import checkpoint\n"
         + "\n".join(map(inspect.getsource, parts)), space)
    encoder = space["Encoder"](dim=32, depth=1, heads=2)
    assert encoder(torch.zeros(1, 3, 2, 32, 32)).shape == (1, 4, 32)


def test_the_walk_prints_every_step():
    with redirect_stdout(io.StringIO()) as text:
        sigma.walk()
    assert all(f"\n{step} " in text.getvalue() for step in range(1, 7))


# --- data.py: decoding. Each test frame carries its number as eight black or white squares. -------

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


def read_numbers(path, wanted):
    return [read_number(frame) for frame in decode(str(path), lambda n: wanted)]


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


FORMATS = {
    "h264 with B-frames, one key frame": ("v.mp4", "libx264", dict(bf="3", g="250")),
    "h264, open groups": ("v.mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "h264 in matroska, rounded stamps": ("v.mkv", "libx264", dict(rate=24, bf="2", g="10")),
    "h264 in mpeg-ts": ("v.ts", "libx264", dict(bf="2", g="10")),
    "mpeg2 in mpeg-ts": ("v.ts", "mpeg2video", dict(bf="2", g="12", b="2M")),
    "mpeg4 with B-frames in avi": ("v.avi", "mpeg4", dict(bf="2", g="12", b="2M")),
    "vp9 in webm": ("v.webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"})}


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_gives_exactly_the_frames_asked_for(name, tmp_path):
    file, codec, options = FORMATS[name]
    path, counts = write_numbered(tmp_path / file, codec, **options), []
    for start, stride in ((0, 1), (1, 2), (11, 4), (29, 3), (38, 4), (84, 1)):
        wanted = [start + stride * i for i in range(16)]
        assert read_numbers(path, wanted) == wanted, (start, stride)
    decode(path, lambda n: counts.append(n) or [0])
    assert abs(counts[0] - 100) <= 1  # known, or nearly so


def test_frames_at_a_variable_rate_are_chosen_by_time(tmp_path):
    gaps = [40, 40, 200, 20, 20, 40, 300, 40, 40, 40] * 4
    pts = [sum(gaps[:i]) for i in range(len(gaps))]
    path = write_numbered(tmp_path / "v.mp4", count=len(pts), pts=pts, bf="2", g="8")
    with av.open(path) as container:
        step = float(1000 / container.streams.video[0].average_rate)
        shown = [round(float(frame.time) * 1000) for frame in container.decode(video=0)]
    wanted = [3 + 2 * i for i in range(14)]
    by_time = [max(i for i, t in enumerate(shown) if t - shown[0] <= index * step + 0.1)
               for index in wanted]
    assert read_numbers(path, wanted) == by_time != wanted


def test_frames_that_an_edit_list_cuts_off_do_not_count(tmp_path):
    source, path = write_numbered(tmp_path / "v.mp4", count=60, g="30"), str(tmp_path / "cut.mp4")
    with av.open(source) as whole, av.open(path, "w") as cut:  # as ffmpeg -ss 0.4 -c copy does it
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = packet.pts - 10 * 512, packet.dts - 10 * 512
                packet.stream = stream
                cut.mux(packet)
    with av.open(path) as container:
        shown = [read_number(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
                 for frame in container.decode(video=0)]
    assert read_numbers(path, [0, 3, 20, 40]) == [shown[i] for i in (0, 3, 20, 40)]


def test_the_last_frame_is_held_where_a_video_ends(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", count=10)
    assert read_numbers(path, [4, 8, 12, 16]) == [4, 8, 9, 9]
    path = write_numbered(tmp_path / "one.mp4", count=1)
    assert read_numbers(path, data.pretraining_frames(1, 4, 4)) == [0] * 4


def damaged_files(folder):
    """Files that can't be read, each with a word of the reason that is expected."""
    good = Path(write_numbered(folder / "good.mp4", bf="2", g="12")).read_bytes()
    media = good.index(b"mdat") + 8
    noise = bytes((i * 7919 + i // 251) % 256 for i in range(len(good)))
    scrambled = good[:media] + noise[media:len(good) * 3 // 4] + good[len(good) * 3 // 4:]
    for name, content, word in (
            ("empty.mp4", b"", "Invalid data"), ("text.mp4", b"hello, I am a text", "Invalid data"),
            ("noise.mp4", noise[:4096], "Invalid data"), ("scrambled.mp4", scrambled, "be read"),
            ("cut.mp4", good[:len(good) // 2], "Invalid data"),
            ("codec.mp4", good.replace(b"avc1", b"zzz9"), "known codec")):
        (folder / name).write_bytes(content)
        yield folder / name, word
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        silence = torch.zeros(1, 1024).numpy()
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    yield folder / "sound.mp4", "no video stream"
    yield folder / "missing.mp4", "No such file"


def test_damaged_files_say_why_they_cannot_be_read(tmp_path):
    for path, word in damaged_files(tmp_path):
        with pytest.raises(VideoError, match=word):
            decode(str(path), lambda n: data.pretraining_frames(n, 16, 4))


def test_an_image_is_a_clip_that_stands_still(tmp_path):
    image = torch.rand(3, 20, 24)
    for name in ("0%03d.png", "1.jpg"):
        (tmp_path / "a").mkdir(exist_ok=True)
        save_image(image, tmp_path / "a" / name)
    found = find_videos(tmp_path)
    frames = decode(found.paths[0], lambda n: [0] * 8)
    assert found.labels == [0, 0] and frames.shape == (8, 3, 20, 24)
    assert (frames / 255 - image).abs().max() < 0.01
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match="be read"):
        decode(str(tmp_path / "broken.png"), range)


# --- data.py: finding videos ----------------------------------------------------------------------

def put(root, *names):
    """Makes empty files, good enough to be found."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_videos_are_found_in_folders_and_lists(tmp_path):
    put(tmp_path / "set", "wave/a b.mp4", "wave/c.webm", "clap/deep/d.avi", "clap/notes.txt")
    found = find_videos(tmp_path / "set")
    assert [Path(p).name for p in found.paths] == ["d.avi", "a b.mp4", "c.webm"]
    assert found.labels == [0, 1, 1] and found.classes == ["clap", "wave"]
    assert len(found.skipped) == 1 and "notes.txt" in found.skipped[0]
    assert find_videos(tmp_path / "set" / "wave").labels == [-1, -1]
    (tmp_path / "list.csv").write_text(
        "set/wave/a b.mp4 7\n\nset/wave/c.webm\ngone.mp4 1\nset/wave/c.webm cat\n"
        f"{tmp_path}/set/clap/deep/d.avi\t0\n", encoding="utf-8-sig")
    found = find_videos(tmp_path / "list.csv")
    assert [Path(p).name for p in found.paths] == ["a b.mp4", "c.webm", "d.avi"]
    assert found.labels == [7, -1, 0]
    assert 'line 4, "gone.mp4 1"' in found.skipped[0] and "line 5" in found.skipped[1]


def test_what_holds_no_videos_stops_with_a_sentence(tmp_path):
    put(tmp_path, "empty/x.txt", "ucf/ucfTrainTestlist/classInd.txt", "ucf/UCF-101/A/v.avi")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "k400").mkdir()
    (tmp_path / "k400" / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n")
    for name, word in (("nowhere", "there is no"), ("empty", "no videos"), ("noise.bin", "be read"),
                       ("ucf", "extras/videos.py"), ("k400", "extras/videos.py")):
        with pytest.raises(UserError, match=word):
            find_videos(tmp_path / name)


def test_classes_are_numbered_once_by_name_for_all_splits(tmp_path):
    """Also where the validation videos lack a class; one that training lacks stops."""
    put(tmp_path, "a/train/clap/1.mp4", "a/train/run/2.mp4", "a/train/wave/3.mp4",
        "a/val/wave/4.mp4", "b/wave/5.mp4", "b/run/6.mp4", "c/swim/7.mp4")
    classes = find_videos(tmp_path / "a").classes
    assert find_videos(tmp_path / "a", ("val", "test"), classes).labels == [2]
    assert find_videos(tmp_path / "b", ("val", ""), classes).labels == [1, 2]
    for known in (classes, []):  # []: the training videos came from a list
        with pytest.raises(UserError, match="swim"):
            find_videos(tmp_path / "c", ("val", ""), known)
    (tmp_path / "list.csv").write_text("a/val/wave/4.mp4 0\n")  # its own videos are not held out
    assert not find_videos(tmp_path / "list.csv", ("val", "test"), required=False).paths


def test_only_regular_files_are_videos(tmp_path):
    """Opening a named pipe would block for ever."""
    put(tmp_path, "a/1.mp4")
    os.mkfifo(tmp_path / "a" / "2.mp4")
    (tmp_path / "list.csv").write_text("a/2.mp4 0\na/1.mp4 0\n")
    for source in (tmp_path, tmp_path / "list.csv"):
        found = find_videos(source)
        assert [Path(p).name for p in found.paths] == ["1.mp4"]
        assert any("2.mp4" in reason for reason in found.skipped)


# --- data.py: clips -------------------------------------------------------------------------------

def clips_of(folder, **changes):
    return Clips(find_videos(folder), **dict(frames=4, stride=2, size=32, tube=TUBE, ratio=0.75)
                 | changes)


def test_pretraining_frames_start_anywhere_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    clips = {tuple(data.pretraining_frames(70, 16, 4, generator)) for _ in range(300)}
    assert {clip[0] for clip in clips} == set(range(7))  # 0 to 70 - 64, both included
    assert all(b - a == 4 for clip in clips for a, b in zip(clip, clip[1:]))
    assert data.pretraining_frames(30, 16, 4) == [0, 4, 8, 12, 16, 20, 24, 28] + [29] * 8
    assert data.centre_frames(70, 16, 4)[0] == 3


def test_the_corner_crop_has_ten_shapes_and_thirteen_places():
    generator = torch.Generator().manual_seed(0)
    boxes = {data.corner_crop(240, 320, generator) for _ in range(4000)}
    sides = [240, 210, 180, 158]
    assert {(h, w) for _, _, h, w in boxes} == {
        (a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    places = {(top, left) for top, left, h, w in boxes if (h, w) == (180, 180)}
    assert len(places) == 13
    assert {(0, 0), (60, 140), (30, 70), (15, 35), (45, 105), (0, 70)} <= places
    assert all(top + h <= 240 and left + w <= 320 for top, left, h, w in boxes)


def test_the_same_key_gives_the_same_clip_in_any_worker(tmp_path):
    for i in range(4):
        write_numbered(tmp_path / f"{i}.mp4", count=60)
    clips, keys = clips_of(tmp_path), [(0, 2), (4, 2), (1, 0), (2, 1)]
    alone, shared = (next(iter(data.loader(clips, 4, keys, workers))) for workers in (0, 2))
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    assert not torch.equal(alone[0][0], alone[0][1])  # another pass: another clip and mask
    assert not torch.equal(alone[1][0], alone[1][1])
    assert alone[0].shape == (4, 3, 4, 32, 32) and alone[0].dtype == torch.uint8


def test_one_decoding_gives_several_clips_each_of_its_own(tmp_path, monkeypatch):
    write_numbered(tmp_path / "v.mp4", count=60)
    calls = []
    monkeypatch.setattr(data, "decode", lambda *a, **o: calls.append(a) or decode(*a, **o))
    video, mask, *_ = clips_of(tmp_path, repeat=4)[0, 0]
    assert len(calls) == 1 and video.shape == (4, 3, 4, 32, 32) and mask.shape == (4, 32)
    assert not torch.equal(video[0], video[1]) and not torch.equal(mask[0], mask[1])


def test_normalise_takes_out_imagenet_mean_and_std():
    white = normalise(torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8), "cpu")
    wanted = [(1 - mean) / std for mean, std in zip(sigma.IMAGENET_MEAN, sigma.IMAGENET_STD)]
    assert white[0, :, 0, 0, 0].tolist() == pytest.approx(wanted, rel=1e-5)
    floats = torch.zeros(1, 3, 2, 4, 4)
    assert normalise(floats, "cpu").all() and not floats.any()  # the input stays as it is


def test_a_set_that_cannot_be_read_at_all_is_no_result(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the videos"):
        train.collect(lambda video: video, clips_of(tmp_path, tries=1), torch.device("cpu"))


def test_an_unreadable_video_is_replaced_and_named(tmp_path):
    write_numbered(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    clips = clips_of(tmp_path)
    video, _, _, index, bad = clips[0, 1]
    assert index == 0 and video.float().std() > 0
    assert {path for path, _ in bad} == {str(tmp_path / "b.mp4")} and "Invalid data" in bad[0][1]
    assert clips[0, 0][4] == []
    black, _, label, _, bad = clips_of(tmp_path, tries=1)[0, 1]  # in evaluation nothing replaces it
    assert label == -1 and len(bad) == 1 and not black.any()


def first_keys(number, **options):
    return list(__import__("itertools").islice(iter(EndlessSampler(50, **options)), number))


def test_each_pass_has_every_video_once_over_all_ranks():
    """What a step sees does not depend on how many processes share it, nor on a stop."""
    one = first_keys(200, batch=8)
    assert [position for position, _ in one] == list(range(200))
    passes = [[video for _, video in one[i:i + 50]] for i in range(0, 200, 50)]
    assert all(sorted(order) == list(range(50)) for order in passes) and passes[0] != passes[1]
    ranks = [first_keys(100, batch=4, rank=rank, world=2) for rank in range(2)]
    shared = [key for i in range(0, 100, 4) for rank in ranks for key in rank[i:i + 4]]
    assert shared == one and first_keys(40, batch=4, start=160) == one[160:]
    assert first_keys(50, batch=8, seed=1) != one[:50]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_two_workers_read_hundreds_of_clips_without_growing(tmp_path):
    list(damaged_files(tmp_path))
    for i in range(8):
        write_numbered(tmp_path / f"{i}.mp4", count=60, bf="2", g="12")
    clips, sizes = clips_of(tmp_path, size=64), []
    for _ in data.loader(clips, 8, [(e, i % len(clips)) for e in range(60) for i in range(16)], 2):
        pids = [worker.pid for worker in multiprocessing.active_children()]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        sizes.append((max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
                      max(pages) * os.sysconf("SC_PAGESIZE") / 2 ** 20))
    files, memory = zip(*sizes)
    assert max(files[60:]) < max(files[20:60]) + 8  # queues come and go; a leak has hundreds
    assert max(memory[60:]) < max(memory[20:60]) + 8  # MiB; a leak of one container has 2


def test_the_toy_set_is_the_same_for_the_same_seed(toy, tmp_path):
    data.make_toy(tmp_path / "toy", train=64, val=32)
    for split, number in (("train", 64), ("val", 32)):
        found, again = (find_videos(root, (split,))
                        for root in (toy / "data" / "toy", tmp_path / "toy"))
        assert len(found.paths) == number and len(found.classes) == 8
        assert all(Path(a).read_bytes() == Path(b).read_bytes()
                   for a, b in zip(found.paths, again.paths))
    assert decode(found.paths[0], range).shape == (8, 3, 32, 32)


def test_no_single_frame_of_a_toy_clip_tells_its_class():
    labels = torch.arange(3000) % 8
    clips = data.toy_clips(labels, torch.Generator().manual_seed(0)).float()
    for t in (0, 7):
        pixels = F.avg_pool2d(clips[:, t].permute(0, 3, 1, 2), 4).flatten(1)
        scores = train.linear_probe(pixels[:2000], labels[:2000], pixels[2000:])
        chance = 0.125 + 4 * math.sqrt(0.125 * 0.875 / 1000)
        assert train.accuracy(scores, labels[2000:]) < chance


# --- train.py -------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy set where train.py looks for it, and a finished run, `run`."""
    folder = tmp_path_factory.mktemp("work")
    data.make_toy(folder / "data" / "toy", train=64, val=32)
    result = subprocess.run([sys.executable, str(HERE / "train.py"), *RUN, "--out", "run"],
                            cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder / "run.txt").write_text(result.stdout)
    return folder


RUN = ["--epochs", "10", "--batch-size", "16", "--accum", "2", "--seed", "3", "--eval-every", "4",
       "--keep-every", "5"]  # 20 steps of 32 clips


@pytest.fixture
def here(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


def run(*arguments, of=train.main):
    """The exit code of a run in this process."""
    return train.launch(of, [str(argument) for argument in arguments])


def start(*arguments, **options):
    """A run in a process of its own."""
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *arguments], **options)


def finish(process, seconds=60):
    """(exit code, stdout, stderr) of a process that must end by itself."""
    try:
        return process.communicate(timeout=seconds), process.returncode
    finally:
        process.kill()


WITH_CORE = os.environ | {"PYTHONPATH": str(HERE)}


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def wait_for_a_log_line(out, process):
    while not Path(out, "log.jsonl").exists() or not Path(out, "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)


def children_of(pid):
    stats = [p.read_text().rsplit(")", 1) for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    return [int(begin.split()[0]) for begin, end in stats if end.split()[1] == str(pid)]


def wait_until_ended(pids):
    """Ended processes are gone, or zombies that nobody has asked about."""
    for pid in pids:
        stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
        while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_learns_and_leaves_results_log_and_checkpoints(here):
    first, *_, last = log_of("run")
    assert last["step"] == 20 and last["loss"] < first["loss"]
    assert {"target_term", "video_term", "log_k", "prototypes_used", "entropy", "grad_norm", "lr",
            "clips_per_second", "data_wait", "unreadable_videos"} <= set(last)
    assert [line["epoch"] for line in log_of("run") if "knn" in line] == [4, 8]
    results = json.loads(Path("run/results.json").read_text())
    assert {"linear_probe", "knn"} == set(results["untrained"]) == set(results["trained"])
    kept = torch.load("run/epoch-0005.pt", weights_only=True)
    assert kept["clips_seen"] == 5 * 64 and load_model("run").encoder.dim == 128


def test_the_same_command_goes_on_bit_for_bit(here):
    """20 steps equal 7, a stop, and 13; on one process, with accumulation."""
    assert run(*RUN, "--out", "parts", "--max-steps", 7) == 0
    assert run(*RUN, "--out", "parts") == 0
    whole, parts = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("run", "parts"))
    assert parts["clips_seen"] == 640
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    states = (checkpoint["optimizer"]["state"].values() for checkpoint in (whole, parts))
    for a, b in zip(*states):
        assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_a_finished_run_shows_its_results_again(here, capsys):
    before = Path("run/last.pt").read_bytes()
    assert run(*RUN, "--out", "run") == 0
    shown = [line for line in (here / "run.txt").read_text().splitlines() if "k-NN " in line]
    assert all(line in capsys.readouterr().out for line in shown[-1:])
    assert Path("run/last.pt").read_bytes() == before


def test_contradicting_flags_stop_with_both_values(here, capsys):
    assert run(*RUN, "--out", "run", "--lr", 0.5, "--epochs", 9) == 2
    error = capsys.readouterr().err
    for text in ("--lr 0.5", "0.008", "--epochs 9", "10"):
        assert text in error


def test_a_killed_run_goes_on_as_if_it_had_never_been(here):
    """Killed with SIGKILL at any moment: the checkpoint is complete, the log has each step once."""
    command = ["-c", "import sys, train; train.LOG_STEPS = 1; train.SAVE_SECONDS = 0; "
               "sys.exit(train.launch(train.main))", *RUN, "--out", "killed"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for steps in (3, 8, 14):
        process = subprocess.Popen([sys.executable, *command], env=WITH_CORE, **quiet)
        while not Path("killed/log.jsonl").exists() or len(log_of_complete("killed")) < steps:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert run(*RUN, "--out", "killed") == 0
    whole, killed = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("run", "killed"))
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])
    steps = [line["step"] for line in log_of("killed")]
    assert steps == sorted(set(steps))


def log_of_complete(out):
    return [line for line in Path(out, "log.jsonl").read_text().split("\n") if line.endswith("}")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_ends(number, here):
    out = f"stopped-{number.name}"
    process = start("--epochs", "100000", "--workers", "2", "--out", out, stdout=subprocess.PIPE,
                    start_new_session=True)
    wait_for_a_log_line(out, process)
    os.killpg(process.pid, number)  # the loader's workers get it too
    (text, _), code = finish(process)
    assert code == 0 and "same command goes on" in text
    saved = torch.load(f"{out}/last.pt", weights_only=True)
    assert saved["clips_seen"] == 64 * log_of(out)[-1]["step"] > 0


def test_signals_end_a_run_that_waits_for_data(here):
    """The first one waits for the step; the second ends the process, and its workers with it."""
    process = start("--epochs", "100000", "--workers", "2", "--out", "waits")
    wait_for_a_log_line("waits", process)
    workers = children_of(process.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    process.terminate()
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert finish(process, 10)[1] == -signal.SIGTERM
    wait_until_ended(workers)


@pytest.mark.parametrize("number, seconds", [(signal.SIGKILL, 300), (signal.SIGSTOP, 3)])
def test_a_dead_or_stalled_worker_ends_the_run(number, seconds, here):
    out = f"worker-{number.name}"
    process = start("--epochs", "100000", "--workers", "2", "--timeout", str(seconds), "--out", out)
    wait_for_a_log_line(out, process)
    workers = children_of(process.pid)
    os.kill(max(workers), number)
    (_, text), code = finish(process)
    assert code == 1 and "error: " in text and "Traceback" not in text
    wait_until_ended(workers)


def test_a_non_finite_loss_stops_and_keeps_the_good_checkpoint(here, capsys):
    assert run(*RUN, "--out", "nan", "--max-steps", 2) == 0
    checkpoint = torch.load("nan/last.pt", weights_only=True)
    checkpoint["model"]["encoder.norm.bias"][0] = math.nan
    torch.save(checkpoint, "nan/last.pt")
    bad = Path("nan/last.pt").read_bytes()
    assert run(*RUN, "--out", "nan") == 1
    assert "step 3" in capsys.readouterr().err and Path("nan/last.pt").read_bytes() == bad


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    train.save_atomically(tmp_path / "last.pt", {"step": 1})
    before = (tmp_path / "last.pt").read_bytes()

    def half(content, file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(train.RunError, match="No space left"):
        train.save_atomically(tmp_path / "last.pt", {"step": 3})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("world, given, videos, wanted", [
    (1, {}, 9999, (40, 16)), (16, {}, 9999, (40, 1)), (64, {}, 9999, (10, 1)),
    (8, {}, 9999, (40, 2)), (8, {"batch_size": 20}, 9999, (20, 4)),
    (2, {"batch_size": 32}, 9999, (32, 10)), (4, {"accum": 8}, 9999, (20, 8)),
    (64, {"batch_size": 32}, 9999, (32, 1)), (1, {}, 12, (12, 1)),
    (2, {"batch_size": 2}, 12, (2, 3)), (16, {"repeat": 4}, 9999, (40, 1))])
def test_the_recipe_fixes_the_global_batch(world, given, videos, wanted):
    """Accumulation follows from it; a small set's global batch is all its clips."""
    args = train.parse(["--data", "k400"])
    vars(args).update(given)
    assert train.split_batch(args, world, videos) == wanted


def test_recipes_are_the_published_ones():
    def of(*flags):
        args = train.parse(["--data", *flags])
        return args.frames, args.stride, args.epochs, args.eps, args.global_batch
    assert of("k400") == of("k400", "--model", "small") == (16, 4, 800, 0.05, 640)
    assert of("ssv2") == (16, 2, 800, 0.03, 512)
    assert of("ssv2", "--model", "small") == (16, 2, 2400, 0.05, 128)
    assert of("mine", "--epochs", "3") == (16, 4, 3, 0.05, None)


def test_collapsed_features_are_told_from_healthy_ones():
    log_k = math.log(3000)
    healthy = dict(target_term=7.1, video_term=7.4, log_k=log_k, entropy=log_k - 0.2,
                   target_entropy=log_k - 0.2)
    assert not train.collapse(healthy, 50_000) and not train.collapse({"pixel_term": 0.5}, 50_000)
    assert not train.collapse(healthy | dict(entropy=math.log(400)), 1000)  # few tubes, few used
    for change in (dict(target_entropy=math.log(90)), dict(video_term=8.01), dict(target_term=0.1)):
        assert "collapsed?" in train.collapse(healthy | change, 50_000)


def test_a_collapsed_run_says_so_once(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    monkeypatch.setattr(SIGMA, "embed", lambda self, video, hidden, features=None: self.projector(
        torch.ones(*hidden.shape, 768)))  # the same for each tube
    assert run("--epochs", 40, "--out", "collapsed", "--max-steps", 40, "--lr", 0) == 0
    assert capsys.readouterr().out.count("collapsed? ") == 1


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rate = [train.learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rate[0] == 0 and rate[3] == pytest.approx(3 / 9) and rate[9] == rate[10] == 1
    assert rate[55] == pytest.approx(0.55) and rate[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_weight_decay_spares_biases_norms_and_other_vectors():
    model = build_model("tiny")
    decayed, spared = train.make_optimizer(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert all(re.search("bias|norm", names[id(p)]) for p in spared["params"])
    assert not any(re.search("bias|norm", names[id(p)]) for p in decayed["params"])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_too_and_the_log_is_json(here, amp, monkeypatch):
    """Gradients that overflow in fp16 are null there."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0 ** 60)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert run("--epochs", 4, "--max-steps", 2, "--amp", amp, "--out", amp) == 0
    text = Path(amp, "log.jsonl").read_text()
    assert "Infinity" not in text and ("null" in text) == (amp == "fp16")


def test_wrong_usage_ends_in_one_sentence_and_code_2(here, capsys):
    Path("junk.pt").write_bytes(b"junk")
    Path("bad.csv").write_text("nothing.mp4 0\n")
    for arguments, word in ((["--data", "nowhere"], "nowhere"), (["--data", "bad.csv"], "line 1"),
                            (["--init", "nowhere"], "nowhere"), (["--init", "junk.pt"], "junk"),
                            (["--init", "run", "--target", "pixel"], "decoder.head"),
                            (["--val", "nowhere"], "nowhere"), (["--out", "bad.csv"], "bad.csv")):
        arguments = [*arguments, *([] if "--out" in arguments else ["--out", "never"])]
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and word in error, error
    for arguments in (["--epochs", "0"], ["--amp", "int8"], ["--bogus"], ["--lr", "nan"],
                      ["--size", "30"], ["--size", "8"], ["--root", "x", "--data", "mine"],
                      ["--teacher", "x"], ["--repeat", "3", "--batch-size", "64"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err
    assert not Path("never").exists()


def test_an_unforeseen_error_keeps_its_traceback_and_ends_all(here):
    process = subprocess.Popen(
        [sys.executable, "-c", "import train; train.collapse = None; train.launch(train.main)",
         *RUN, "--workers", "2", "--out", "failed"], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env=WITH_CORE)
    (_, text), code = finish(process)
    assert code == 1 and "Traceback" in text and "TypeError" in text


@pytest.mark.parametrize("good", [0, 4])
def test_too_many_unreadable_videos_end_the_run_by_name(good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for i in range(good):
        write_numbered(tmp_path / "videos" / f"good{i}.mp4", count=20)
    for i in range(8):
        (tmp_path / "videos" / f"bad{i}.mp4").write_bytes(b"")
    assert run("--data", "videos", "--model", "tiny", "--epochs", 200, "--out", "run") == 1
    captured = capsys.readouterr()
    assert all(captured.out.count(f"bad{i}.mp4: ") == 1 for i in range(8))
    assert "8 of" in captured.err and Path("run/last.pt").exists()


def test_sigma_dino_trains_and_its_teacher_stays_outside(here, capsys):
    torch.save(dino_weights(384, depth=1, side=14), "dino.pth")
    flags = ["--target", "dino-s", "--teacher", "dino.pth", "--epochs", 2, "--out", "dino"]
    assert run(*flags) == 0
    kept = torch.load("dino/last.pt", weights_only=True)["model"]
    assert kept["prototypes"].shape == (128, 384) and not any("vit" in name for name in kept)
    assert run("--target", "dino", "--teacher", "run/last.pt", "--out", "never") == 2
    assert "patch_embed" in capsys.readouterr().err


def test_dino_is_downloaded_once_and_checked_against_its_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked, args = [], train.parse(["--target", "dino"])

    def download(url, path, hash_prefix=None, progress=True):
        asked.append(hash_prefix)
        torch.save(dino_weights(depth=1), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = (train.make_teacher(args, (2, 16, 16)) for _ in range(2))
    assert asked == ["bf34ad0f42"] and first.dim == second.dim == 128
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **o: open("nowhere"))
    with pytest.raises(UserError, match="--teacher"):
        train.make_teacher(args, (2, 16, 16))


# --- train.py on two processes --------------------------------------------------------------------

def test_torchrun_goes_on_where_one_process_stopped(here):
    """The same steps on the same clips: another number of processes changes rounding alone."""
    flags = ["--epochs", "3", "--out"]
    assert run(*flags, "one") == run(*flags, "more", "--max-steps", 2) == 0
    result = subprocess.run([*TORCHRUN, str(HERE / "train.py"), *flags, "more"], cwd=here,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("untrained") == 1 and "2 processes x 32" in result.stdout
    one, more = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("one", "more"))
    assert one["clips_seen"] == more["clips_seen"] == 3 * 64
    assert all(torch.allclose(one["model"][name], more["model"][name], atol=1e-4)
               for name in one["model"])
    assert json.loads(Path("more/results.json").read_text())["trained"]["knn"] == pytest.approx(
        json.loads(Path("one/results.json").read_text())["trained"]["knn"], abs=0.1)


def test_sigterm_to_one_rank_saves_and_stops_all_while_data_is_awaited(here):
    """All ranks agree at each step, not at a log line that slow data puts far away."""
    code = ("import sys, time, data, train; read = data.Clips.read; "
            "data.Clips.read = lambda *a: time.sleep(0.05) or read(*a); "
            "train.LOG_STEPS = train.LOG_SECONDS = 10 ** 6; sys.exit(train.launch(train.main))")
    Path("slow.py").write_text(code.replace("; ", "\n"))
    job = subprocess.Popen([*TORCHRUN, "slow.py", "--epochs", "1000", "--out", "slow"],
                           env=WITH_CORE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True)
    while not Path("slow/last.pt").exists():
        assert job.poll() is None
        time.sleep(0.1)
    time.sleep(6)  # a step takes 1.6 s of waiting
    os.kill(children_of(job.pid)[-1], signal.SIGTERM)
    finish(job, 60)
    assert torch.load("slow/last.pt", weights_only=True)["clips_seen"] > 0


def test_a_rank_that_dies_ends_the_whole_job(here):
    command = [*TORCHRUN, str(HERE / "train.py"), "--epochs", "100000", "--out", "dies"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_a_log_line("dies", job)
    os.kill(max(children_of(job.pid)), signal.SIGKILL)
    assert finish(job, 60)[1] != 0


# --- README.md ------------------------------------------------------------------------------------

def test_each_python_snippet_of_the_readme_prints_what_it_says(here):
    assert run("--epochs", 1) == 0  # one starts from out/toy-tiny-mlp
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        with redirect_stdout(io.StringIO()) as text:
            exec(snippet, {})
        said = re.findall(r"^print\(.*\) +# (.*)$", snippet, re.M)
        assert said and text.getvalue().splitlines() == said
