"""What each part of SIGMA must do, as short tests: python -m pytest -q. No network.

Read TestMethod first: it says in code what the paper says in words. The tests run on the CPU, also
where there is a GPU; a few, marked so, run on a GPU if there is one.
"""
import contextlib
import functools
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from signal import SIGALRM, SIGCHLD, SIGKILL, SIGTERM

GPUS = os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hidden from the tests and from what they start

import av
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.utils import save_image

import data
import sigma
import train
from extras import evaluate, reader
from extras import run as running
from extras import toy
from extras.reader import VideoError
from sigma import Teacher, UserError, build_model, load_model, sinkhorn, split_mask, tube_mask

HERE = Path(__file__).resolve().parent
AUTHORS = json.loads((HERE / "assets" / "authors.json").read_text())
SIZE, TUBE, GRID = (4, 32, 32), (2, 8, 8), (2, 4, 4)  # a clip, a tube, a clip in tubes
torch.manual_seed(0)
VIDEO = torch.randn(4, 3, *SIZE).double()
MASK = (torch.rand(4, 16).argsort(dim=1) < 12).repeat(1, 2)  # by hand: 12 of 16 places are hidden
VISIBLE, HIDDEN = (rows.nonzero()[:, 1].view(4, -1) for rows in (~MASK, MASK))
FEATURES = torch.randn(4, 32, 16).double()  # as a teacher gives them
MEAN, STD = (torch.tensor(numbers, dtype=torch.double).view(3, 1, 1, 1)
             for numbers in (sigma.IMAGENET_MEAN, sigma.IMAGENET_STD))
SCORES = F.normalize(torch.randn(700, 16), dim=1) @ F.normalize(torch.randn(16, 50), dim=0)
SMALL = dict(dim=32, depth=2, heads=2, decoder_dim=16, tube=TUBE, decoder_depth=1, target_dim=16,
             prototypes=20)


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """A folder with a small toy set, data/toy, and a finished run, `run`, of 20 steps."""
    folder = tmp_path_factory.getbasetemp() / "here"  # one for both test files
    if not folder.exists():
        folder.mkdir()
        with contextlib.chdir(folder):
            toy.make_toy("data/toy", train=64, val=32)
            assert run(train, *RUN, "--out", OUT) == 0
    return folder


@pytest.fixture(autouse=True)
def where_a_test_works(request, tmp_path, monkeypatch):
    """In an empty folder; if it asks for `here`, with links to what is there."""
    monkeypatch.chdir(tmp_path)
    if "here" in request.fixturenames:
        for path in request.getfixturevalue("here").iterdir():
            os.symlink(path, path.name)


def small(target="mlp"):
    """A model that takes milliseconds, in float64 so that equal means equal."""
    torch.manual_seed(0)
    return build_model("tiny", target=target, **SMALL).double()


def by_formula(name, shape):
    """Numbers that anyone can make again: value i of the tensor of this name."""
    i, seed = torch.arange(math.prod(shape)).double(), zlib.crc32(name.encode()) % 1000
    return torch.sin(i * (1.7 + seed / 1000) + 0.013 * (i * i) + seed).view(shape)


def sinkhorn_in_logs(scores, eps=0.05, iters=10):
    """The definition, as SwAV has it, in float64: each prototype's total, then each tube's, is made
    the same in turns; logarithms neither overflow nor underflow."""
    q = scores.double() / eps
    for _ in range(iters):
        q = q - q.logsumexp(dim=0)
        q = q - q.logsumexp(dim=1, keepdim=True)
    return q.exp()


def dino(side=2, width=128):
    """torchvision's ViT with random weights, and these in DINO's names."""
    vit = VisionTransformer(16 * side, 16, 2, width // 64, width, 4 * width).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "heads.head": "head",
             "conv_proj": "patch_embed.proj", "encoder.layers.encoder_layer_": "blocks.",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_": "attn.",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "encoder.ln": "norm", "ln_": "norm"}
    return vit, {re.sub("|".join(names), lambda old: names[old[0]], name): weight
                 for name, weight in vit.state_dict().items()}


def dinov2_by_formula(registers=0, dim=128):
    """Weights of two blocks of a DINOv2, patches of 14, 3 x 3 positions, in its authors' names."""
    block = {"norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
             "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    layers = {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    layers |= {"norm": (dim,), "patch_embed.proj": (dim, 3, 14, 14)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"blocks.{i}.ls{j}.gamma": (dim,) for i in (0, 1) for j in (1, 2)}
    shapes |= {"cls_token": (1, 1, dim), "mask_token": (1, dim), "pos_embed": (1, 10, dim)}
    shapes |= {"register_tokens": (1, registers, dim)} if registers else {}
    return {name: (0.2 * by_formula(name, shape)).float() for name, shape in shapes.items()}


def of_hugging_face(weights):
    """Weights of transformers' DINOv2, version 4 or 5, in its authors' names."""
    names = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings\\.": "",
             "position_embeddings": "pos_embed", "encoder.layer.": "blocks.",
             "attention.(output.dense|o_proj)": "attn.proj", "attention.(attention.)?": "attn.",
             r"layer_scale(\d)\.lambda1": r"ls\1.gamma", "layernorm": "norm",
             r"query|q_proj": "qkv", "key|k_proj": "key", "value|v_proj": "value"}
    for old, new in names.items():
        weights = {re.sub(old, new, name): w for name, w in weights.items()}
    for name in [name for name in weights if ".qkv." in name]:
        rows = [weights.pop(name.replace("qkv", part)) for part in ("qkv", "key", "value")]
        weights[name] = torch.cat(rows)
    return weights


FIGURES = {"plain": [6.74277, -0.938951], "registers": [6.31132, -1.52093]}  # norm, weighted sum


def teacher(weights):
    """A Teacher of a ViT with patches of 14 in its authors' names."""
    return Teacher(evaluate.dino_weights(weights), (2, 14, 14))


class TestMethod:
    @pytest.mark.parametrize("target", ["mlp", "dino", "pixel", "l2"])
    def test_the_loss_and_its_gradient_written_out(self, target):
        """Targets are standardised; each branch predicts the other's assignment; prototypes learn
        from the targets' side alone; training steps rescale them first, outside the graph."""
        model = small(target)
        start = model.prototypes.detach().clone() if target in ("mlp", "dino") else None
        quiet, _ = model.eval()(VIDEO, MASK, FEATURES)  # changes no prototypes
        assert start is None or torch.equal(model.prototypes, start)
        pixels = rearrange(VIDEO * STD + MEAN, "b c (t p) (h q) (w r) -> b (t h w) (p q r) c",
                           p=2, q=8, r=8)
        x, dim = (FEATURES, 1) if target == "dino" else (pixels, 2)  # over all tubes, or in each
        x = (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)
        x = x[MASK].flatten(1)  # of hidden tubes, in the order frame, row, column, channel
        embedded = model.projector(x) if target in ("mlp", "l2") else x
        predicted = model.predict(VIDEO, VISIBLE, HIDDEN).flatten(0, 1)
        loss, stats = model.train()(VIDEO, MASK, FEATURES)
        if start is None:  # the baselines; with l2 both networks learn
            wanted = (predicted - embedded).square().mean()
        else:
            assert torch.equal(model.prototypes, F.normalize(start, dim=1))
            scores = (F.normalize(predicted, dim=1) @ model.prototypes.detach().T,
                      F.normalize(embedded, dim=1) @ model.prototypes.T)
            hard = [sinkhorn_in_logs(x.detach()).argmax(dim=1) for x in scores]
            wanted = -sum((x / 0.1).log_softmax(dim=1)[range(96), other].mean()
                          for x, other in zip(scores, reversed(hard)))
        assert torch.allclose(loss, wanted, rtol=1e-6) and torch.allclose(loss, quiet)
        for name, features in (("video_std", predicted), ("projection_std", embedded)):
            assert torch.allclose(stats[name].double(), features.std(dim=0).mean())
        gradients = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, wanted))
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))

    @pytest.mark.parametrize("target, sizes", [
        ("mlp", dict(target_dim=20, prototypes=12)), ("pixel", {}),
        ("dino", dict(target_dim=24, prototypes=15))])
    def test_loss_assignments_and_gradients_equal_the_authors_code(self, target, sizes):
        """assets/authors.json holds what their code gives for weights and a clip that `by_formula`
        makes; of larger tensors the norm, and the sum of the values times -1 to 1."""
        hidden = torch.tensor(AUTHORS["hidden"])  # of each slice's nine places
        mask = torch.zeros(2, 9, dtype=torch.bool).scatter_(1, hidden, True).repeat(1, 4)
        model = build_model("small", target=target, dim=48, depth=2, heads=3, decoder_dim=32,
                            decoder_depth=1, decoder_heads=2, eps=0.05, **sizes).double()
        weights = {re.sub("^projector", "head", n): p for n, p in model.named_parameters()}
        for name, weight in weights.items():
            value = by_formula(name, weight.shape)
            is_norm = re.search(r"norm\d?\.weight", name)
            weight.data = value if name == "prototypes" else 0.08 * value + bool(is_norm)
        video = (0.5 + 0.5 * by_formula("video", (2, 3, 8, 48, 48)) - MEAN) / STD
        loss, stats = model(video, mask, by_formula("features", (2, 36, 24)))
        loss.backward()
        visible, hidden = split_mask(mask)
        large = {"encoder_visible": model.encoder(video, visible),
                 "predicted": model.predict(video, visible, hidden),
                 **{name: weight.grad for name, weight in weights.items()}}
        found = {name.replace("projection_", "target_"): x.tolist()  # as the file names it
                 for name, x in {"loss": loss, **stats}.items()}
        for name, x in large.items():
            ramp = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
            found[name] = [x.norm().item(), (x * ramp).sum().item()]
        wanted = dict(AUTHORS[target])
        gradients = wanted.pop("gradients")
        assert gradients.keys() == weights.keys()
        for name, numbers in (wanted | gradients).items():
            assert found[name] == pytest.approx(numbers, rel=1e-10, abs=1e-10), name

    def test_positions_are_sinusoids(self):
        angle = torch.arange(50)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        wanted = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
        assert torch.allclose(sigma.positions(50, 8), wanted, atol=1e-5)

    def test_each_clip_s_tubes_are_hidden_at_places_of_its_own_in_all_slices(self):
        slices = tube_mask(6, (8, 14, 14)).view(6, 8, 196)
        assert (slices.sum(dim=2) == 176).all() and (slices == slices[:, :1]).all()
        assert len(slices[:, 0].unique(dim=0)) == 6

    def test_tubes_come_in_the_order_time_row_column(self):
        assert torch.equal(VIDEO, rearrange(sigma.take_tubes(VIDEO, TUBE), "b (t h w) c p q r -> "
                                            "b c (t p) (h q) (w r)", t=2, h=4))

    def test_the_encoder_is_its_blocks_on_visible_tokens(self):
        encoder = small().encoder
        tokens = encoder.patch_embed.proj(VIDEO).flatten(2).mT + sigma.positions(32, 32)
        tokens = encoder.norm(encoder.blocks(tokens[~MASK].view(4, 8, 32)))
        assert torch.allclose(encoder(VIDEO, VISIBLE), tokens, atol=1e-12)
        assert torch.equal(encoder(VIDEO), encoder(VIDEO, torch.arange(32).expand(4, -1)))

    def test_the_encoder_sees_nothing_of_hidden_tubes(self):
        hidden_pixels = F.interpolate(MASK.view(4, 1, *GRID).double(), SIZE)
        encoder = small().encoder
        assert torch.equal(encoder(VIDEO, VISIBLE), encoder(VIDEO + hidden_pixels, VISIBLE))

    def test_the_decoder_sees_visible_tokens_and_then_mask_tokens(self):
        model, place = small(), sigma.positions(32, 16).double().expand(4, -1, -1)
        seen = model.encoder_to_decoder(model.encoder(VIDEO, VISIBLE))
        x = torch.cat([seen + place[~MASK].view(4, 8, 16),
                       model.mask_token + place[MASK].view(4, 24, 16)], dim=1)
        wanted = model.decoder.head(model.decoder.norm(model.decoder.blocks(x)))[:, 8:]
        assert torch.allclose(model.predict(VIDEO, VISIBLE, HIDDEN), wanted, atol=1e-12)

    @pytest.mark.parametrize("eps, iters", [(0.005, 10), (0.03, 1), (0.05, 3), (0.1, 10)])
    @pytest.mark.parametrize("scores", [SCORES, torch.eye(30) * 2 - 1, torch.ones(20, 6),
                                        torch.tensor([[1.0, -1, -1]] * 50)])
    def test_sinkhorn_meets_its_definition(self, scores, eps, iters):
        """In float32 under autocast too; the hard assignment is each tube's largest share."""
        wanted = sinkhorn_in_logs(scores, eps, iters)
        assert torch.allclose(sinkhorn(scores.double(), eps, iters), wanted, rtol=1e-9, atol=1e-300)
        with torch.autocast("cpu", torch.bfloat16):
            soft, before = sinkhorn(scores, eps, iters), scores.clone()
        assert torch.allclose(soft.double(), wanted, rtol=1e-3, atol=1e-6)
        assert torch.equal(sinkhorn(scores, eps, iters, hard=True), soft.argmax(dim=1))
        assert torch.equal(scores, before) and sinkhorn(scores.bfloat16()).dtype == torch.float32

    def test_sinkhorn_equals_the_authors(self):
        scores = 0.9 * by_formula("scores", (60, 8))
        for eps, rows in AUTHORS["sinkhorn"].items():
            found = sinkhorn(scores, float(eps))[:3].float()  # as their code returns it
            assert torch.equal(found, torch.tensor(rows))

    @pytest.mark.parametrize("eps, iters", [(0.005, 10), (0.01, 10), (0.05, 200)])
    def test_sinkhorn_is_finite_when_features_collapse(self, eps, iters):
        """When nearly all tubes are alike, and for scores far outside of cosines."""
        alike = torch.tensor([[1.0, -1.0]] * 8000 + [[-1.0, 1.0]])
        few = torch.tensor([[0.3, 0.1]] * 12_000 + [[-0.2, 0.5]] * 3)
        for scores in (alike, few, 1e30 * SCORES):
            soft = sinkhorn(scores, eps, iters)
            assert soft.isfinite().all() and torch.allclose(soft.sum(dim=1), torch.ones(len(soft)))
        assert torch.allclose(sinkhorn(few, eps, iters).double(), sinkhorn_in_logs(few, eps, iters),
                              atol=1e-3)
        assert sinkhorn(alike, eps, iters, hard=True)[-1] == 1

    def test_the_loss_is_two_cross_entropies_at_temperature_a_tenth(self):
        one, two = SCORES[:9], SCORES[9:18]
        loss, terms = sigma.symmetric_loss(one, two, one.argmax(dim=1), two.argmax(dim=1))
        wanted = [F.cross_entropy(two / 0.1, one.argmax(dim=1)),
                  F.cross_entropy(one / 0.1, two.argmax(dim=1))]
        assert [terms["projection_term"], terms["video_term"]] == wanted and loss == sum(wanted)

    @pytest.mark.parametrize("assignment", [
        torch.tensor([0, 0, 2, 2]), torch.tensor([[0.6, 0.4, 0]] * 2 + [[0.1, 0.2, 0.7]] * 2)])
    def test_usage_tells_how_many_prototypes_are_used_and_how_evenly(self, assignment):
        used, entropy = sigma.usage(assignment, 3)
        assert used == 2 and entropy == pytest.approx(math.log(2))

    def test_nan_does_not_pass_for_an_assignment(self):
        model = small()
        nn.init.constant_(model.decoder.head.bias, math.nan)
        assert model(VIDEO, MASK)[0].isnan()

    @pytest.mark.parametrize("target, low, high", [("l2", 0, 0.4), ("mlp", 1, math.inf)])
    def test_without_sinkhorn_learned_features_collapse(self, target, low, high):
        """Why SIGMA is made as it is: regressing jointly trained features ends in a constant."""
        model, spread = small(target).float(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss, stats = model(torch.randn(4, 3, *SIZE), MASK)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spread.append(stats["projection_std"])
        assert low < spread[-1] / spread[0] < high

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

    def test_clips_of_any_size_that_the_tube_divides_are_encoded(self):
        assert small().encoder(torch.zeros(1, 3, 2, 328, 16).double()).shape == (1, 82, 32)

    @pytest.mark.parametrize("call, words", [
        (lambda model: model.encoder(VIDEO[..., :30, :]), "4, 30, 32"),
        (lambda model: model(VIDEO, MASK[:, :31]), "4, 32"),
        (lambda model: model(VIDEO, MASK ^ (torch.arange(128).view(4, 32) == 0)), "same number"),
        (lambda model: small("dino")(VIDEO, MASK), "Teacher")])
    def test_sizes_that_do_not_fit_and_uneven_masks_stop(self, call, words):
        with pytest.raises(ValueError, match=words):
            call(small())

    @pytest.mark.parametrize("recompute, compiled", [(True, False), (False, True)])
    def test_recomputed_or_compiled_blocks_give_the_same_gradient(
            self, recompute, compiled, monkeypatch):
        """Compiled by a backend that is quick and needs no C++ compiler."""
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(
            nn.Module.compile, backend="aot_eager"))
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
        """Of each slice's first frame; positions interpolated; float32 under autocast; frozen.
        Our attention has biases on queries and values: DINO's on keys changes nothing."""
        (vit, weights), video = dino(side), torch.randn(2, 3, 4, 16 * h, 16 * w)
        token, place = vit.encoder.pos_embedding.split([1, side * side], dim=1)
        if (h, w) != (side, side):  # as DINO does it
            place = F.interpolate(place.mT.unflatten(2, (side, side)), mode="bicubic",
                                  scale_factor=((h + 0.1) / side, (w + 0.1) / side)).flatten(2).mT
        x = vit.conv_proj(rearrange(video[:, :, ::2], "b c t h w -> (b t) c h w")).flatten(2).mT
        vit.encoder.pos_embedding = nn.Parameter(torch.cat([token, place], dim=1))
        wanted = vit.encoder(torch.cat([vit.class_token.expand(4, -1, -1), x], dim=1))[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = Teacher(weights).train()(video.requires_grad_())
        assert torch.allclose(tokens.view(wanted.shape), wanted, atol=1e-4) and not tokens.grad_fn
        assert Teacher(weights, TUBE)(video[..., :16]).shape == (2, 2 * 2 * h * 2, 128)

    @pytest.mark.parametrize("registers, h, w", [(0, 3, 3), (4, 3, 3), (4, 5, 4)])
    def test_dinov2_as_transformers_computes_it(self, registers, h, w):
        """At other grids without registers its authors add 0.1, which transformers does not."""
        transformers = pytest.importorskip("transformers")
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        sizes = {"num_register_tokens": registers} if registers else {}
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42,
            patch_size=14, **sizes)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        video = torch.randn(2, 3, 2, 14 * h, 14 * w)
        with torch.no_grad():
            wanted = model(video[:, :, 0]).last_hidden_state[:, 1 + registers:]
        found = teacher(of_hugging_face(model.state_dict()))(video)
        assert torch.allclose(found, wanted, atol=1e-5)

    @pytest.mark.parametrize("kind", FIGURES)
    def test_dinov2_where_transformers_is_not_installed(self, kind):
        """Figures written down from transformers' models with weights by a formula."""
        registers, h, w = (4, 4, 2) if kind == "registers" else (0, 3, 3)
        found = teacher(dinov2_by_formula(registers))(
            by_formula("video", (1, 3, 2, 14 * h, 14 * w)).float())
        ramp = torch.linspace(-1, 1, found.numel()).view(found.shape)
        assert [found.norm(), (found * ramp).sum()] == pytest.approx(FIGURES[kind], rel=1e-4)

    @pytest.mark.parametrize("registers", [0, 4])
    def test_names_and_wrappers_of_a_teacher_s_weights_change_nothing(self, registers):
        """Wrappers of training code, heads, MAE's decoder, chunks of blocks; iBOT's and timm's
        names for the same."""
        plain, video = dinov2_by_formula(registers), torch.randn(1, 3, 2, 42, 42)
        wanted = teacher(plain)(video)
        more = plain | {name: torch.ones(2) for name in (
            "decoder_blocks.0.norm1.weight", "head.weight")}
        chunks = {n.replace("blocks.", "blocks.0."): w for n, w in plain.items()}
        ibot = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): w for n, w in plain.items()}
        timm = {n.replace("register_tokens", "reg_token"): w for n, w in plain.items()}
        place = timm["pos_embed"].split([1, 9], dim=1)
        timm |= {"cls_token": timm["cls_token"] + place[0], "pos_embed": place[1]}
        student = {n: w + 1 for n, w in plain.items()}
        both = ("student", student), ("teacher", plain)
        train = {f"{who}.backbone.{n}": w for who, part in both
                 for n, w in part.items()} | {"teacher.dino_head.mlp.0.weight": torch.ones(2)}
        for content in (more, chunks, ibot, timm, {"model": more, "epoch": 3}, {"model": train},
                        {"student": student, "teacher": {f"module._orig_mod.backbone.{n}": w
                                                         for n, w in plain.items()}},
                        {"state_dict": {f"model.{n}": w for n, w in plain.items()}}):
            found = teacher(evaluate.plain_weights(content, "a.pth"))(video)
            assert torch.allclose(found, wanted, atol=1e-5)

    def test_a_teacher_in_half_precision_is_read(self):
        plain, video = dinov2_by_formula(), torch.randn(1, 3, 2, 42, 42)
        half = {name: w.half() for name, w in plain.items()}
        assert torch.allclose(*(teacher(x)(video) for x in (plain, half)), atol=0.05)

    def test_a_teacher_without_biases_has_them_at_zero(self):
        plain, video = dinov2_by_formula(), torch.randn(1, 3, 2, 42, 42)
        biases = {n: w for n, w in plain.items() if "qkv.bias" not in n}
        zeros = plain | {n: w * 0 for n, w in plain.items() if "qkv.bias" in n}
        assert torch.equal(*(teacher(x)(video) for x in (biases, zeros)))

    @pytest.mark.parametrize("name, word", [
        ("blocks.0.mlp.w12.weight", "SwiGLU"), ("rope_embed.periods", "rotary"),
        ("blocks.0.attn.q_norm.weight", "norms of queries"), ("norm_pre.weight", "CLIP"),
        ("blocks.0.attn.rel_pos", "rel_pos")])
    def test_a_teacher_with_more_than_a_plain_vit_is_refused(self, name, word):
        with pytest.raises(UserError, match=word):
            teacher(dinov2_by_formula() | {name: torch.ones(2)})

    @pytest.mark.parametrize("weights, word", [
        ({"embeddings.cls_token": torch.ones(1, 1, 64)}, "Hugging Face"),
        (dinov2_by_formula(dim=96), "96 wide")])
    def test_a_teacher_in_other_names_or_widths_is_refused(self, weights, word):
        with pytest.raises(UserError, match=word):
            teacher(weights)

    @pytest.mark.parametrize("name, change", [
        ("pos_embed", lambda w: w[:, 2:]), ("pos_embed", lambda w: torch.cat([w[:, :4], w], dim=1)),
        ("patch_embed.proj.weight", lambda w: w[:, :, None])])
    def test_a_teacher_of_other_than_square_images_is_refused(self, name, change):
        """Fewer or more positions than a square and the class token have; patches of a video."""
        weights = dinov2_by_formula()
        with pytest.raises(UserError, match="images"):
            teacher(weights | {name: change(weights[name])})

    @pytest.mark.parametrize("content, word", [
        ({"net": {}}, "net"), ({"a": torch.tensor([math.nan])}, "not finite: a")])
    def test_what_is_no_weight_or_not_finite_is_named(self, content, word):
        with pytest.raises(UserError, match=word):
            evaluate.plain_weights(content, "a.pth")

    def test_checkpoints_load_strictly_or_stop(self):
        model, loaders = small(), (load_model, sigma.load_encoder)
        content = {"model": model.state_dict(), "sizes": sigma.sizes_for("tiny", **SMALL)}
        torch.save(content, "a.pt")
        loaded, encoder = (load("a.pt").double() for load in loaders)
        assert torch.equal(loaded(VIDEO, MASK)[0], model(VIDEO, MASK)[0])
        assert torch.equal(encoder(VIDEO), model.encoder(VIDEO))
        del content["model"]["encoder.norm.bias"]
        torch.save(content, "a.pt")
        for load in loaders:
            with pytest.raises(UserError, match="norm.bias"):
                load("a.pt")

    def test_foreign_damaged_and_harmful_files_stop_and_run_nothing(self):
        harm = {"__reduce__": lambda _: (os.mkdir, ("harm",))}
        torch.save({"model": {}, "args": type("Harm", (), harm)()}, "harmful.pt")
        torch.save({"model": {}}, "theirs.pt")
        Path("last.pt").write_bytes(b"junk")  # its error names what is beside it
        for name, word in (("harmful.pt", "mkdir"), ("theirs.pt", "weights.py import"),
                           ("", "harmful.pt, theirs.pt"), ("no", "no")):
            with pytest.raises(UserError, match=word):
                load_model(name)
        assert not Path("harm").exists()

    @pytest.mark.parametrize("call", [
        "tube_mask(2, (2, 4, 4)).shape", "sinkhorn(torch.rand(9, 4), hard=True).shape",
        "[x.shape for x in compare(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.eye(4))]",
        "symmetric_loss(*torch.rand(2, 9, 4), *torch.rand(2, 9, 4).softmax(dim=2))[0] > 0",
        "Encoder(dim=32, depth=1, heads=2)(torch.rand(1, 3, 2, 32, 32)).shape"])
    def test_parts_run_in_an_empty_file_with_the_imports_that_the_page_names(self, call):
        """The table in extras/ideas.md: what is copied, with which parts, with which imports."""
        name = re.search(r"tube_mask|sinkhorn|compare|symmetric_loss|Encoder", call)[0]
        page = (HERE / "extras" / "ideas.md").read_text(encoding="utf-8")
        parts, imports = re.search(rf"^\| `{name}` \|(.*)\|(.*)\|$", page, re.M).groups()
        sources = [inspect.getsource(getattr(sigma, part))
                   for part in [*re.findall("`(.*?)`", parts), name]]
        space = {}  # an empty file
        exec("\n".join([*re.findall("`(.*?)`", imports), *sources]), space)
        assert eval(call, {"torch": torch, name: space[name]})


def write_numbered(path, codec="libx264", times=range(60), rate=25, sound=None, **options):
    """A video whose frame i has a white bar of i pixels. times: when each is shown, in frames.
    sound: a codec, for six seconds of silence."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        voice = sound and container.add_stream(sound, rate=48000)
        for i, when in enumerate(times):
            image = 255 * (torch.arange(128) < i).byte().expand(48, 128)
            frame = av.VideoFrame.from_ndarray(image.numpy(), format="gray")
            frame.pts = when
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            silence = torch.zeros(1, 6 * 48000, dtype=torch.int16).numpy()
            frame = av.AudioFrame.from_ndarray(silence, layout="mono")
            frame.sample_rate = 48000
            container.mux(voice.encode(frame) + voice.encode(None))


def turn(path, turns):
    """Has an mp4's track header say, as phones do, that frames are to be rotated by 90 degrees
    anticlockwise, so many times."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]
    content, matrix = bytearray(Path(path).read_bytes()), (cos, -sin, 0, sin, cos)
    struct.pack_into(">5i", content, content.index(b"tkhd") + 44, *(x << 16 for x in matrix))
    Path(path).write_bytes(content)


def numbers_in(path, *clips):
    return [[(frame[0, 24] > 127).sum().item() for frame in clip]
            for clip in data.decode(path, lambda n: clips)]


def touch(*names):
    """Makes empty files."""
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(*arguments):
    return {Path(path).name: label for path, label in data.find_videos(*arguments)[0]}


def clips_of_folder(**changes):
    shape = dict(frames=4, stride=2, size=32, tube=TUBE, ratio=0.75)
    return data.Clips(data.find_videos(".")[0], **shape | changes)


class TestData:
    VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}
    LATE = dict(times=range(20, 120), bf="0", sound="mp2")  # starts after the sound, ends before

    @pytest.mark.parametrize("file, options", [
        ("one-key-frame.mp4", dict(bf="3", g="250")), ("h264.flv", dict(bf="2")),
        ("open-groups.mp4", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
        ("no-key-frames.mp4", {"x264-params": "intra-refresh=1:keyint=30:bframes=0"}),
        ("rounded-stamps.mkv", dict(rate=24, bf="2", g="10")), ("h264.ts", dict(g="10")),
        ("mpeg2.ts", dict(codec="mpeg2video", bf="2", b="2M")), ("vp9.webm", VP9 | dict(g="30")),
        ("mpeg4.avi", dict(codec="mpeg4", bf="2", b="2M")), ("h264.avi", dict(bf="3")),
        ("fast.mkv", dict(rate=1000, bf="2")), ("sound.avi", LATE | dict(times=range(100))),
        ("short-last-frame.mp4", dict(times=[*range(0, 198, 2), 197], rate=50)),
        ("late.mkv", LATE), ("late.mp4", LATE), ("late.ts", LATE),
        ("late.flv", LATE | dict(sound="aac")), ("late.webm", LATE | VP9 | dict(sound="libopus"))])
    def test_decoding_gives_exactly_the_frames_asked_for(self, file, options):
        """They are counted, whatever the sound; the last one is held where a video ends."""
        write_numbered(file, **{"times": range(100)} | options)
        clips = [[start + stride * i for i in range(16)] for start, stride in (
            (0, 1), (1, 2), (11, 4), (29, 3), (38, 4), (84, 1), (90, 2))]
        for clip in (*clips, range(100), *([i] for i in range(100))):
            assert numbers_in(file, clip) == [[min(i, 99) for i in clip]]
        assert numbers_in(file, [50, 90], [7]) == [[50, 90], [7]]
        assert len(data.decode(file, lambda n: [range(n)])[0]) == 100

    @pytest.mark.parametrize("times", [range(-10, 50), [i + i // 10 * 5 for i in range(60)]])
    @pytest.mark.parametrize("bf", ["0", "2"])
    def test_frames_are_chosen_by_time(self, times, bf):
        """The nearest, also where an edit list cuts some off, and where the rate is variable."""
        write_numbered("v.mp4", times=times, bf=bf, g="8")
        shown = [when for when in times if when >= 0]
        step = shown[-1] / (len(shown) - 1)
        clip = range(0, 40, 3)
        wanted = [min(range(len(times)), key=lambda n: abs(times[n] - i * step)) for i in clip]
        assert numbers_in("v.mp4", clip) == [wanted] != [list(clip)]

    def test_a_file_that_starts_without_a_key_frame_is_read_from_the_first(self):
        write_numbered("whole.ts", g="12", bf="0")
        with av.open("whole.ts") as whole, av.open("cut.mkv", "w") as cut:
            stream = cut.add_stream_from_template(whole.streams.video[0])
            for packet in list(whole.demux(video=0))[5:-1]:  # the last one is empty
                packet.stream = stream
                cut.mux(packet)
        assert numbers_in("cut.mkv", range(4)) == [[12, 13, 14, 15]]

    def test_a_late_clip_is_sought_also_where_b_frames_were_allowed_and_none_chosen(self):
        write_numbered("v.mp4", **{"bf": "3", "g": "10", "x264-params": "b-bias=-100"})
        with av.open("v.mp4") as container:
            assert container.streams.video[0].codec_context.has_b_frames
            assert all(frame.pict_type != 3 for frame in container.decode(video=0))
        decoded = []
        data.decode("v.mp4", lambda n: [[55]], lambda *frame: decoded.append(frame))
        assert len(decoded) <= 10

    def test_a_packet_without_a_picture_repeats_the_one_before(self):
        """MPEG-4 has such packets: a P-frame's header that says "not coded". No other shifts."""
        write_numbered("whole.avi", codec="mpeg4", bf="0", b="2M")
        with av.open("whole.avi") as whole, av.open("v.avi", "w") as copy:
            stream = copy.add_stream_from_template(whole.streams.video[0])
            for i, packet in enumerate(list(whole.demux(video=0))[:-1]):
                if i == 15:
                    header = b"\0\0\1\xb6" + int(f"0101{i:05b}1001111", 2).to_bytes(2, "big")
                    pts, packet = packet.pts, av.Packet(header)
                    packet.pts = packet.dts = pts
                    packet.time_base = whole.streams.video[0].time_base
                packet.stream = stream
                copy.mux(packet)
        wanted = [i - (i == 15) for i in range(60)]
        assert numbers_in("v.avi", range(60), [15]) == [wanted, [14]]
        assert [number for number, *_ in reader.all_frames("v.avi")] == list(range(60))

    def test_stamps_in_the_order_of_decoding_are_not_trusted(self):
        """As in an mp4 copied from an avi with B-frames, where FFmpeg has guessed them."""
        write_numbered("v.mp4", bf="2", g="12")
        with av.open("v.mp4") as film, av.open("copy.mp4", "w") as copy:
            stream = copy.add_stream_from_template(film.streams.video[0])
            packets = list(film.demux(video=0))[:-1]
            for packet, time in zip(packets, sorted(packet.pts for packet in packets)):
                packet.pts = packet.dts = time
                packet.stream = stream
                copy.mux(packet)
        assert numbers_in("copy.mp4", range(60), [37]) == [[*range(60)], [37]]

    def test_packed_frames_are_told_apart_also_in_a_copy(self):
        """MPEG-4 in avi may have a B-frame in the packet of the frame before, and a tiny packet in
        its place; ffmpeg -c copy takes over the wrong stamps."""
        write_numbered("v.avi", codec="mpeg4", bf="1", b="2M", sc_threshold="1000000000")
        with av.open("v.avi") as film, av.open("packed.mp4", "w") as copy:
            stream = copy.add_stream_from_template(film.streams.video[0])
            contents = [bytes(packet) for packet in film.demux(video=0)][:-1]
            place = contents[0].index(b"\0\0\1\xb6")
            contents[0] = contents[0][:place] + b"\0\0\1\xb2DivX503b1393p" + contents[0][place:]
            b_frames = [i for i, x in enumerate(contents) if x.startswith(b"\0\0\1\xb6")
                        and x[4] >> 6 == 2]
            for i in b_frames:
                contents[i - 1], contents[i] = contents[i - 1] + contents[i], contents[i][:7]
            for i, content in enumerate(contents):
                packet = av.Packet(content)
                packet.pts, packet.dts, packet.stream = i + 1, i, stream
                packet.time_base, packet.is_keyframe = film.streams.video[0].time_base, i == 0
                copy.mux(packet)
        assert b_frames and numbers_in("packed.mp4", range(60), [37]) == [[*range(60)], [37]]

    @pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
    def test_after_a_damaged_middle_no_frame_shifts(self, codec):
        write_numbered("v.mp4", codec=codec, bf="2", g="12", b="2M")
        with av.open("v.mp4") as container:
            packet = [packet for packet in container.demux() if packet.size][29]
        content = bytearray(Path("v.mp4").read_bytes())
        content[packet.pos:packet.pos + packet.size] = bytes(packet.size)
        Path("v.mp4").write_bytes(content)
        found = {}
        for i in range(60):
            with contextlib.suppress(VideoError):
                found[i], = numbers_in("v.mp4", [i])[0]
        assert found == {i: i for i in found} and {*range(22), *range(48, 58)} <= found.keys()
        with pytest.raises(VideoError):
            numbers_in("v.mp4", range(60))

    @pytest.mark.parametrize("name, stills, default", [("thumb.mp4", 1, 0), ("two.mkv", 9, 1)])
    def test_the_video_is_read_not_just_the_first_stream(self, name, stills, default):
        """A picture that comes first is none, and of two the one marked as default counts."""
        write_numbered("v.mp4")
        with av.open("v.mp4") as whole, av.open(name, "w") as both:
            first = both.add_stream("mjpeg" if stills == 1 else "libx264", rate=25)
            first.width, first.height, first.pix_fmt = 192, 160, "yuvj420p"
            second = both.add_stream_from_template(whole.streams.video[0])
            first.disposition, second.disposition = int(not default), int(default)
            for i in range(stills):
                both.mux(first.encode(av.VideoFrame(192, 160, "yuvj420p")))
            both.mux(first.encode(None))
            for packet in list(whole.demux(video=0))[:-1]:
                packet.stream = second
                both.mux(packet)
        assert numbers_in(name, range(60)) == [[*range(60)]]

    def test_the_reader_works_as_a_file_of_its_own(self):
        write_numbered("v.mp4", bf="2")
        Path("alone").mkdir()
        Path("alone/reader.py").write_bytes(Path(reader.__file__).read_bytes())
        code = "import reader; print(*reader.decode('../v.mp4', lambda n: [[0, n - 1]])[0].shape)"
        result = subprocess.run([sys.executable, "-c", code], cwd="alone", capture_output=True)
        assert result.stdout.split() == [b"2", b"3", b"48", b"128"], result.stderr

    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_rotated_videos_stand_upright(self, turns):
        write_numbered("v.mp4", bf="2")
        before, = data.decode("v.mp4", lambda n: [[30]])
        turn("v.mp4", turns)
        upright, = data.decode("v.mp4", lambda n: [[30]])
        assert torch.equal(upright, before.rot90(turns, (2, 3)))

    @pytest.mark.parametrize("name", [b"cam:1.mp4", b"100%d.mp4", b"caf\xe9.mp4"])
    def test_any_file_name_is_a_file_name(self, name):
        write_numbered("v.mp4")
        os.rename("v.mp4", name)
        assert numbers_in(os.fsdecode(name), [7]) == [[7]]

    def test_tags_need_not_be_utf_8(self):
        write_numbered("v.mkv")
        content = Path("v.mkv").read_bytes().replace(b"Lavf", b"\xff" * 4)  # the name of the writer
        Path("v.mkv").write_bytes(content)
        assert b"Lavf" not in content and numbers_in("v.mkv", [7]) == [[7]]

    def test_damaged_files_say_why_they_cannot_be_read(self):
        write_numbered("v.mp4", bf="2", g="12")
        good = Path("v.mp4").read_bytes()
        media, half = good.index(b"mdat") + 8, len(good) // 2
        noise = bytes((i * 7919 + i // 251) % 256 for i in range(half))
        for content, word in ((b"", "empty"), (noise, "damaged"), (good[:half], "damaged"),
                              (good[:media] + noise[media:] + good[half:], "beginning"),
                              (good.replace(b"avc1", b"zzz9"), "known codec")):
            Path("v.mp4").write_bytes(content)
            with pytest.raises(VideoError, match=word):
                numbers_in("v.mp4", range(60))

    def test_an_image_is_a_clip_that_stands_still(self):
        image = torch.rand(3, 20, 24)
        save_image(image, "0%03d.png")
        clip, = data.decode(data.find_videos(".")[0][0][0], lambda n: [[0] * 8])
        assert clip.shape == (8, 3, 20, 24) and (clip / 255 - image).abs().max() < 0.01

    def test_videos_are_found_in_folders_and_lists(self):
        """Named pipes are none: opening one would block for ever. Bad lines are quoted."""
        touch("set/wave/a b.mp4", "set/wave/c.webm", "set/clap/e/d.avi", "set/clap/x.txt")
        os.mkfifo("set/wave/pipe.mp4")
        assert found("set") == {"d.avi": 0, "a b.mp4": 1, "c.webm": 1}
        assert found("set/wave") == {"a b.mp4": -1, "c.webm": -1}
        lines = ["set/wave/a b.mp4 1", "set/wave/c.webm", f"{Path.cwd()}/set/clap/e/d.avi\t0",
                 "gone.mp4 1", "set/wave/c.webm cat", "set/wave/pipe.mp4 1"]
        Path("list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        assert found("list.csv") == {"a b.mp4": 1, "c.webm": -1, "d.avi": 0}
        for n, reason in enumerate(data.find_videos("list.csv")[2], start=4):
            assert f'line {n}, "{lines[n - 1]}"' in reason

    @pytest.mark.parametrize("lines, labels, word", [
        ("a.mp4,0\nb, 1.mp4\t1", [0, 1], ""), ('"a.mp4";0\n"b, 1.mp4",1', [0, 1], ""),
        ("a.mp4 0 1\na.mp4 1", [1], "not one label"),
        ("a.mp4 10 20 0\na.mp4 0", [0], "not one label"), ("gone.mp4 0\na.mp4 0", [0], "gone.mp4"),
        ("a.jpg 0\na.mp4 0", [0], "a.jpg"),
        ("b, 1.mp4 3 1 2\na.mp4 0\na.mp4", [(3, 1, 2), (0,), ()], "")])  # several, if asked
    def test_lists_as_people_have_them(self, lines, labels, word):
        """Only a video's suffix may have become mp4: `.mp4,0` is none."""
        touch("a.mp4", "b, 1.mp4")
        Path("list.csv").write_text(lines)
        videos, _, skipped = data.find_videos("list.csv", several=() in labels)
        assert [label for _, label in videos] == labels and word in str(skipped)

    @pytest.mark.parametrize("source, content, word", [
        ("nowhere", b"", "nowhere"), ("empty", b"", "x.txt"), ("ucf", b"", "extras/videos.py"),
        ("", b"label,youtube_id,time_start,time_end,split\n", "extras/videos.py"),
        ("train.csv", bytes(range(256)), "line 1"), ("", "a.mp4 0".encode("utf-16"), "UTF-16"),
        ("", b"a.mp4 20240131\nb.mp4 20240201", "20,240,201"), ("", b"a.mp4 7", "up to 7")])
    def test_what_holds_no_videos_or_no_classes_stops_with_a_sentence(self, source, content, word):
        touch("a.mp4", "b.mp4", "empty/x.txt", "ucf/ucfTrainTestlist/classInd.txt", "ucf/A/v.avi")
        Path("train.csv").write_bytes(content)
        with pytest.raises(UserError, match=word):
            data.find_videos(source)

    @pytest.mark.parametrize("kind, other", [("mp4", "jpg"), ("jpg", "mp4")])
    def test_the_kind_with_more_files_decides_what_a_folder_is(self, kind, other):
        touch(f"a/1.{kind}", f"a/2.{kind}", f"b/3.{kind}", f"b/4.{other}")
        videos, _, skipped = data.find_videos(".")
        assert len(videos) == 3 and f"4.{other}" in skipped[0]

    def test_a_folder_that_leads_back_to_itself_does_not_multiply_its_videos(self):
        """What is passed over is named; a link to a folder elsewhere is followed."""
        touch("set/a/1.mp4", "set/b/2.mp4", "elsewhere/3.mp4")
        for name, target in (("set/a/up", "set"), ("set/b/self", "set/b"), ("set/c", "elsewhere")):
            os.symlink(Path.cwd() / target, name)
        videos, classes, skipped = data.find_videos("set")
        assert found("set") == {"1.mp4": 0, "2.mp4": 1, "3.mp4": 2} and classes == ["a", "b", "c"]
        assert len(videos) == 3 and ["leads back" in reason for reason in skipped] == [True] * 2

    def test_lists_written_on_windows_are_read(self):
        touch("set/a 1.mp4")
        Path("list.csv").write_bytes(b"set\\a 1.mp4 0\r\n")
        assert found("list.csv") == {"a 1.mp4": 0}

    def test_a_centre_crop_is_the_square_in_the_middle(self):
        assert data.centre_crop(240, 320) == (0, 40, 240, 240)
        assert data.centre_crop(320, 240) == (40, 0, 240, 240)

    def test_clips_are_resized_with_antialiasing(self):
        """Stripes finer than the new pixels become grey."""
        stripes = (torch.arange(48) % 2 * 255).byte().expand(1, 3, 48, 48)
        clip = data.resize_crop(stripes, (0, 0, 48, 48), 16)[..., 2:-2]
        assert (clip.float() - 127.5).abs().max() < 20

    def test_bars_are_lines_where_there_is_no_terminal(self, capsys):
        """A job's launcher may hold back what does not end in a newline."""
        list(data.progress(range(3), "working", 3))
        *lines, rest = capsys.readouterr().err.split("\n")
        assert "0/3" in lines[0] and "3/3" in "".join(lines[1:]) and "/" not in rest

    def test_classes_are_numbered_once_by_name_for_all_splits(self):
        touch("a/train/clap/1.mp4", "a/train/run/2.mp4", "a/train/wave/3.mp4", "a/val/wave/4.mp4",
            "b/wave/5.mp4", "b/run/6.mp4")
        classes = data.find_videos("a")[1]
        assert found("a", ("val", "test"), classes) == {"4.mp4": 2}
        assert found("b", ("val", ""), classes) == {"5.mp4": 2, "6.mp4": 1}

    def test_a_class_that_training_lacks_is_refused(self):
        touch("c/swim/7.mp4")
        with pytest.raises(UserError, match="swim"):
            data.find_videos("c", ("val", ""), ["run", "wave"])

    def test_clips_start_anywhere(self):
        clips = {tuple(data.pretraining_frames(70, 16, 4)) for _ in range(300)}
        assert clips == {tuple(range(start, start + 64, 4)) for start in range(7)}

    def test_corner_crops_are_the_published(self):
        boxes, sides = {data.corner_crop(240, 320) for _ in range(4000)}, [240, 210, 180, 158]
        assert {(h, w) for _, _, h, w in boxes} == {
            (a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
        places = {(top, left) for top, left, h, w in boxes if (h, w) == (180, 180)}
        assert places == {(15 * i, 35 * j) for i in range(5) for j in range(i % 2, 5, 2)}

    def test_the_same_key_gives_the_same_clips_in_any_worker(self):
        write_numbered("v.mp4")
        alone, shared = (next(running.loader(clips_of_folder(repeat=2), 2, [(0, 0), (4, 0)], n))
                         for n in (0, 2))
        assert alone.video.shape == (4, 3, 4, 32, 32)
        assert all(torch.equal(one, two) for one, two in zip(alone[:2], shared[:2]))

    def test_repeats_and_passes_have_clips_and_masks_of_their_own(self, monkeypatch):
        """Repeats come from one decoding."""
        calls, decode = [], data.decode
        monkeypatch.setattr(data, "decode", lambda *a, **o: calls.append(a) or decode(*a, **o))
        write_numbered("v.mp4")
        batch = next(running.loader(clips_of_folder(repeat=2), 2, [(0, 0), (4, 0)], 0))
        assert len(calls) == 2
        assert all(len(x.flatten(1).unique(dim=0)) == 4 for x in (batch.video, batch.mask))

    def test_clips_are_normalised_by_imagenet_s_mean_and_deviation(self):
        video = torch.randint(256, (2, 3, 4, 8, 8)).byte()
        wanted = ((video / 255 - MEAN) / STD).float()
        assert torch.allclose(data.normalise(video, "cpu"), wanted, atol=1e-5)

    def damage_one(self):
        """Of two videos, the second."""
        write_numbered("a.mp4", bf="2", g="12")
        Path("b.mp4").write_bytes(Path("a.mp4").read_bytes()[:2000])

    def test_an_unreadable_video_is_replaced_and_named(self):
        self.damage_one()
        *_, index, bad = clips_of_folder()[0, 1]
        assert index == 0 and "b.mp4" in str(bad) and "damaged" in str(bad)

    def test_after_all_tries_a_clip_is_black_and_without_a_label(self):
        """Evaluation tries once."""
        self.damage_one()
        black, _, label, _, bad = clips_of_folder(tries=1)[0, 1]
        assert label == -1 and len(bad) == 1 and not black.any()

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_a_thousand_clips_leave_no_open_files_or_memory_behind(self):
        self.damage_one()
        clips, used = clips_of_folder(), []
        for i in range(1000):
            clips[i, i % 2]
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used.append((len(os.listdir("/proc/self/fd")), pages))
        assert used[-1][0] == used[500][0] and used[-1][1] < used[500][1] + 2000

    def test_each_pass_has_every_video_once_over_all_ranks(self):
        """What a step sees does not depend on how many processes share it, nor on a stop."""
        one = list(islice(data.endless_order(50, 8), 200))
        passes = [[video for _, video in one[i:i + 50]] for i in range(0, 200, 50)]
        assert all(sorted(order) == list(range(50)) for order in passes) and passes[0] != passes[1]
        ranks = [list(islice(data.endless_order(50, 4, rank, world=2), 100)) for rank in range(2)]
        assert [key for i in range(0, 100, 4) for rank in ranks for key in rank[i:i + 4]] == one
        assert list(islice(data.endless_order(50, 8, start=160), 40)) == one[160:]

    def test_the_linear_probe_is_ridge_regression_on_standardised_features(self):
        """What could not be read, label -1, has no part in it."""
        x, labels, test = torch.randn(60, 5) * 3 + 1, torch.arange(60) % 4 - 1, torch.randn(9, 5)
        found = evaluate.linear_probe(x, labels, test)
        x, y = x[labels >= 0], F.one_hot(labels[labels >= 0]).float()
        x, test = (x - x.mean(dim=0)) / x.std(dim=0), (test - x.mean(dim=0)) / x.std(dim=0)
        rows, wanted = torch.cat([x, 10 ** 0.5 * torch.eye(5)]), torch.zeros(5, 3)
        weight = torch.linalg.lstsq(rows, torch.cat([y - y.mean(dim=0), wanted])).solution
        assert torch.allclose(found, test @ weight + y.mean(dim=0), atol=1e-4)

    def test_k_nearest_neighbours_vote_by_their_cosine(self):
        """One that is near outvotes two that are not; what could not be read has no vote."""
        x = torch.tensor([[2.0, 0.1], [1, 1], [1, 1.1], [5, 0], [-1, 0]])
        scores = evaluate.nearest_neighbours(x, torch.tensor([0, 1, 1, -1, 2]), x[3:4], k=3)
        cosines = F.normalize(x, dim=1)[:, 0]
        wanted = (cosines / 0.07).exp() * torch.tensor([1, 1, 1, 0, 0])
        assert torch.allclose(scores, torch.stack([wanted[0], wanted[1:].sum(), x.new_zeros(())]))
        assert scores.argmax() == 0

    def test_the_toy_set_is_the_same_for_the_same_seed(self, here, tmp_path):
        path, label = data.find_videos("data/toy")[0][-1]
        toy.render((tmp_path / "again.mp4", label, int(Path(path).stem)))
        assert (tmp_path / "again.mp4").read_bytes() == Path(path).read_bytes()

    def test_no_single_frame_of_a_toy_clip_tells_its_class(self):
        labels, generator = torch.arange(3000) % 8, torch.Generator().manual_seed(0)
        clips = torch.stack([toy.toy_clip(label, generator) for label in labels.tolist()]).float()
        for t in (0, 7):
            pixels = F.avg_pool2d(clips[:, t].permute(0, 3, 1, 2), 4).flatten(1)
            scores = evaluate.linear_probe(pixels[:2000], labels[:2000], pixels[2000:])
            assert evaluate.accuracy(scores, labels[2000:]) < 0.167  # 0.125 + 4 standard deviations


RUN = "--epochs 10 --batch-size 16 --accum 2 --seed 3 --eval-every 4 --keep-every 5".split()
OUT = "run"  # of RUN, which takes 20 steps of 32 clips
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
STOP_SIGNALS = "SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"
TROUBLES = {
    "none": lambda: None, "bug": lambda: 1 / 0, "stall": lambda: time.sleep(999),
    "kill": lambda: os.kill(os.getpid(), SIGKILL), "term": lambda: os.kill(os.getpid(), SIGTERM),
    **{name: lambda name=name: to_all(signal.Signals[name]) for name in STOP_SIGNALS},
    "later": lambda: to_all(SIGTERM, running.GRACE + 0.5) or time.sleep(999),
    "rival": lambda: print(subprocess.run([sys.executable, train.__file__, "--epochs", "999",
                                           "--out", "shared", "--max-steps", "2"]))}


def to_all(number, gap=0):
    """A signal to all processes of a run, twice."""
    os.killpg(0, number)
    time.sleep(gap)
    os.killpg(0, number)


def troubled(trouble, position, log_steps, save_seconds, *flags):
    """A training process that gets into trouble before it reads the clip at a position of the
    order."""
    for number in running.STOP_SIGNALS:  # a run respects what nohup or a shell's & set it to ignore
        signal.signal(number, signal.SIG_DFL)
    running.LOG_STEPS, running.SAVE_SECONDS = int(log_steps), int(save_seconds)
    running.GRACE = 1
    read = data.Clips.__getitem__

    def read_or_fail(clips, key):
        if key[0] == int(position):
            TROUBLES[trouble]()
        return read(clips, key)
    data.Clips.__getitem__ = read_or_fail
    return running.launch(train.main, flags)


def run(script, *arguments):
    """The exit code of a script's command line, in this process."""
    try:
        return running.launch(script.main, [str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's
        return end.code


# Processes are forked from one that has imported what takes seconds, and has done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torchvision.models", "train"])


def session(pipe, start_method, work, arguments):
    """work(*arguments) as the first process of a new group, which writes to a pipe."""
    os.setsid()
    multiprocessing.set_start_method(start_method, force=True)  # of its own workers
    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    pipe.close()
    sys.exit(work(*arguments))


def start_apart(work, *arguments):
    """A process that does work(*arguments), and the pipe that it writes to."""
    pipe, writing = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=session, args=(
        writing, multiprocessing.get_start_method(), work, arguments))
    process.start()
    writing.close()
    return process, pipe


def apart(work, *arguments):
    """Exit code and output of work(*arguments) in a process of its own, when it and all that share
    its output have ended."""
    process, pipe = start_apart(work, *arguments)
    parts = []
    while pipe.poll(30) and (part := os.read(pipe.fileno(), 2 ** 16)):
        parts.append(part)
    process.join(30)
    if process.exitcode is None:  # it hangs
        os.killpg(process.pid, SIGKILL)
    return process.exitcode, b"".join(parts).decode()


def run_apart(out, *flags, trouble="none", at=-1, log_steps=10, save_seconds=600, ranks=1):
    """Exit code and output of a troubled process (see there), or of torchrun's, when it and all
    that share its output have ended."""
    words = [*map(str, (trouble, at, log_steps, save_seconds)), "--epochs", "999", "--out", out,
             *flags]
    if ranks == 1:
        return apart(troubled, *words)
    result = subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={ranks}", __file__, "troubled", *words], timeout=90,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return result.returncode, result.stdout


def serve():
    """A rank that does what the lines of its input ask for."""
    for line in sys.stdin:
        module, name, folder, os.environ["MASTER_PORT"], arguments = json.loads(line)
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            work = getattr(importlib.import_module(module), name)
            code = running.launch(work, arguments)
        print(json.dumps([code, shown.getvalue()]), flush=True)


@functools.cache
def ranks():
    """Two processes as torchrun starts them, which live as long as this one."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "PYTHONPATH": str(HERE)}
    return [subprocess.Popen([sys.executable, __file__, "serve"], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE,
                             env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"]


def in_two_processes(work, *arguments):
    """What two ranks print that do work, a function of a module that takes such flags."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = [work.__module__, work.__name__, os.getcwd(), port, [str(word) for word in arguments]]
    for process in ranks():
        print(json.dumps(job), file=process.stdin, flush=True)
    answers = [json.loads(process.stdout.readline()) for process in ranks()]
    assert [code for code, _ in answers] == [0, 0]
    return "".join(shown for _, shown in answers)


def log_of(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def saved(path):
    """What torch.save has written to a file, or a run to its folder."""
    path = Path(path)
    return torch.load(path / "last.pt" if path.is_dir() else path, weights_only=True)


def read_json(out, file="results.json"):
    return json.loads(Path(out, file).read_text())


def half_of_the_batch(argv):
    """Saves what each of two ranks finds for its half."""
    running.set_up()
    rank, model = torch.distributed.get_rank(), small()
    part = slice(2 * rank, 2 * rank + 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss, stats = parallel(VIDEO[part], MASK[part])
    loss.backward()
    alone = sinkhorn(SCORES.chunk(2)[rank], group=torch.distributed.new_subgroups(1)[0])
    gradients = [p.grad for p in model.parameters()]
    torch.save((loss.detach(), stats, alone, gradients), f"{rank}.pt")


def two_limits():
    """Says how a block within its time limit ends, and one that takes too long."""
    def give_up():
        print("gave up", flush=True)
        sys.exit()
    with running.time_limit(1.5, give_up):
        print("started", flush=True)
        time.sleep(0.5)
    print("done", flush=True)
    with running.time_limit(0.5, give_up):
        time.sleep(9)


class TestTraining:
    def test_a_run_learns(self, here):
        log = log_of(OUT)
        assert log[-1]["step"] == 20 and log[-1]["loss"] < log[0]["loss"]

    def test_probes_come_when_they_are_asked_for_and_at_the_end(self, here):
        results = read_json(OUT)
        assert [line["epoch"] for line in log_of(OUT) if "knn" in line] == [4, 8]
        assert {"linear_probe", "knn"} == set(results["untrained"]) == set(results["trained"])
        assert results["untrained"] != results["trained"]

    def test_checkpoints_are_kept_when_asked_for(self, here):
        assert sorted(path.name for path in Path(OUT).glob("epoch*")) == [
            "epoch-0005.pt", "epoch-0010.pt"]
        assert saved(f"{OUT}/epoch-0005.pt")["clips_seen"] == 5 * 64

    def test_a_finished_run_shows_its_results(self, here, capsys):
        assert run(train, *RUN, "--out", OUT) == 0
        assert str(read_json(OUT)["trained"]["knn"]) in capsys.readouterr().out

    def test_a_stopped_or_killed_run_resumes_bit_for_bit(self, here):
        """Killed with SIGKILL at any moment; the log has each step once; no drafts are left."""
        for at, seconds in ((100, 600), (333, 0)):  # the position of a clip; from save to save
            run_apart("killed", *RUN, trouble="kill", at=at, log_steps=1, save_seconds=seconds)
        assert run(train, *RUN, "--out", "killed", "--max-steps", 15) == 0
        assert run(train, *RUN, "--out", "killed") == 0
        whole, killed = ((x["model"], x["optimizer"]["state"]) for x in map(saved, (OUT, "killed")))
        torch.testing.assert_close(whole, killed, rtol=0, atol=0)
        steps = [line["step"] for line in log_of("killed")]
        assert steps == sorted(set(steps)) and steps[-1] == 20
        assert not list(Path("killed").glob("*unfinished*"))

    def test_a_run_from_weights_resumes_without_naming_them_again(self, here):
        """Or by another spelling of the same folder."""
        flags = [*RUN, "--out", "warm", "--max-steps"]
        assert run(train, *flags, 1, "--init", OUT) == 0  # the first step's rate is 0
        old, new = (saved(out)["model"]["encoder.norm.weight"] for out in (OUT, "warm"))
        assert torch.equal(old, new) and run(train, *flags, 2) == 0
        assert run(train, *flags, 3, "--init", f"./{OUT}/") == 0
        assert saved("warm")["clips_seen"] == 3 * 32
        assert run(train, *flags, 4, "--init", "other") == 2

    @pytest.mark.parametrize("name", STOP_SIGNALS)
    def test_a_signal_to_all_processes_saves_and_ends(self, name, here):
        """Twice at once, as under Slurm, where torchrun passes on what each process gets anyway."""
        code, text = run_apart(name, "--workers", "2", trouble=name, at=384)
        assert code == 0 and "to resume" in text
        assert saved(name)["clips_seen"] == 64 * log_of(name)[-1]["step"] > 0

    def test_a_later_second_signal_ends_a_waiting_run_with_its_workers(self, here):
        code, _ = run_apart("waits", "--workers", "2", trouble="later", at=64)
        assert code == -SIGTERM

    @pytest.mark.parametrize("trouble", ["kill", "stall", "bug"])
    def test_dead_or_stalled_workers_end_in_a_sentence_bugs_do_not(self, trouble, here):
        code, text = run_apart("fails", "--workers", "2", "--timeout", "3", trouble=trouble, at=3)
        assert code == 1 and ("error: " in text) == (trouble != "bug") == ("Traceback" not in text)

    def test_a_probe_leaves_the_loader_its_time_limit(self, here):
        """And a save stands before it: torchrun may kill at any moment after a signal."""
        code, text = run_apart("probed", "--timeout", "3", "--eval-every", "1", trouble="stall",
                               at=64, log_steps=99)
        assert code == 1 and "in 3 s" in text and saved("probed")["clips_seen"] == 64

    def test_main_leaves_handlers_as_they_were_and_runs_in_any_thread(self, here):
        numbers = [*running.STOP_SIGNALS, SIGALRM, SIGCHLD]
        before, flags = [*map(signal.getsignal, numbers)], ["--max-steps", 1, "--workers", 1]
        assert run(train, *flags, "--out", "handlers") == 0
        assert [*map(signal.getsignal, numbers)] == before
        with ThreadPoolExecutor() as threads:
            assert threads.submit(run, train, *flags, "--out", "thread").result() == 0

    def test_two_runs_do_not_share_a_folder(self, here):
        """The second ends in a sentence; the first continues."""
        code, text = run_apart("shared", "--max-steps", "2", trouble="rival", at=64)
        assert code == 0 and saved("shared")["clips_seen"] == 2 * 64
        assert "returncode=2" in text and "another process is at work in shared" in text

    @pytest.mark.parametrize("name, value, word", [
        ("WORLD_SIZE", "2", "MASTER_ADDR"), ("RANK", "", "RANK=''"), ("RANK", "3", "RANK=3"),
        ("WORLD_SIZE", "two", "two")])
    def test_half_an_environment_of_torchrun_is_named(self, name, value, word, monkeypatch):
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(running, "RANK", running.from_launcher("RANK", 0))
        monkeypatch.setattr(running, "WORLD", running.from_launcher("WORLD_SIZE", 1))
        with pytest.raises(UserError, match=word):
            running.set_up()

    def test_a_non_finite_loss_stops_and_keeps_the_good_checkpoint(self, here, capsys):
        assert run(train, *RUN, "--out", "nan", "--max-steps", 2) == 0
        checkpoint = saved("nan")
        checkpoint["model"]["encoder.norm.bias"][0] = math.nan
        torch.save(checkpoint, "nan/last.pt")
        assert run(train, *RUN, "--out", "nan") == 1 and "step 3" in capsys.readouterr().err
        assert saved("nan")["clips_seen"] == 2 * 32

    def test_files_have_the_mode_that_the_umask_asks_for(self, here):
        umask = os.umask(0o027)
        try:
            assert run(train, "--max-steps", 1, "--out", "modes") == 0
            running.write_json("modes/results.json", {})
        finally:
            os.umask(umask)
        modes = {path.name: path.stat().st_mode & 0o777 for path in Path("modes").iterdir()}
        assert {"last.pt", "log.jsonl", "skipped.txt", "results.json"} <= modes.keys()
        assert set(modes.values()) == {0o640}

    def test_a_run_resumes_in_another_precision(self, here):
        """A loss scaler starts anew where the checkpoint has none."""
        for steps, amp in enumerate(("off", "fp16", "bf16", "fp16"), start=1):
            assert run(train, *RUN, "--out", "precisions", "--max-steps", steps, "--amp", amp) == 0

    def test_time_in_which_a_process_is_suspended_does_not_count(self):
        process, pipe = start_apart(two_limits)
        lines = open(pipe.fileno(), closefd=False)  # a line may come in parts
        assert lines.readline() == "started\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.7)
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert [lines.readline() for _ in range(2)] == ["done\n", "gave up\n"]

    @pytest.mark.parametrize("rank, words", [(1, "1600"), (2, "abc")])
    def test_ranks_with_other_data_stop_at_the_start(self, rank, words, monkeypatch):
        values = [(1600, "abc")] * rank + [(1599, "abd")]
        monkeypatch.setattr(running, "gather", lambda value: values)
        with pytest.raises(UserError, match=f"rank {rank} .*1599") as error:
            running.same_for_all("the videos", None)
        assert words in str(error.value)

    def test_a_run_is_not_resumed_with_another_number_of_videos(self, here, capsys):
        paths = [path for path, _ in data.find_videos("data/toy")[0]]
        flags = "--model tiny --size 32 --frames 8 --stride 1 --out out --data list.csv".split()
        for number, code in ((40, 0), (39, 2)):
            Path("list.csv").write_text("\n".join(paths[:number]))
            assert run(train, *flags, "--max-steps", 2 - code // 2) == code
        assert "40 videos, there are now 39" in capsys.readouterr().err

    def test_the_hash_of_videos_knows_their_labels_and_order_but_not_their_place(self):
        videos = [("/a/1.mp4", 0), ("/a/2.mp4", 1)]
        one, *others = (running.hash_of(data.Clips(x, frames=4, stride=1, size=32)) for x in (
            videos, [("/b/1.mp4", 0), ("/b/2.mp4", 1)], videos[::-1], [("/a/1.mp4", 0)] * 2))
        assert [one == other for other in others] == [True, False, False]

    def test_a_folder_that_only_some_nodes_see_is_named(self, here, monkeypatch):
        monkeypatch.setattr(running, "gather", lambda seen: [seen, False])
        with pytest.raises(UserError, match="share"):
            running.saved_run(train.parse(["--out", OUT]))

    def test_an_overflow_in_fp16_is_answered_with_another_precision_first(self, here, capsys,
                                                                          monkeypatch):
        """Before a lower learning rate, which would not help in the first forward pass."""
        monkeypatch.setattr(train.SIGMA, "forward", lambda self, *_: (
            self.mask_token.sum() * math.inf, {}))
        for amp, named in (("fp16", True), ("off", False)):
            assert run(train, "--amp", amp, "--out", f"over-{amp}", "--max-steps", 1) == 1
            assert ("--amp off or bf16" in capsys.readouterr().err) == named

    def test_a_full_disk_leaves_the_checkpoint_that_was_there(self, monkeypatch):
        Path("last.pt").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", lambda _: Path("/dev/full").write_bytes(b"new"))
        with pytest.raises(UserError, match="last.pt can't be written .*No space"):
            running.save_atomically("last.pt", {"step": 3})
        assert os.listdir() == ["last.pt"] and Path("last.pt").read_bytes() == b"old"

    @pytest.mark.parametrize("flags, world, videos, wanted", [
        ("", 6, 9999, (35, 3)), ("", 64, 9999, (10, 1)), ("", 1, 12, (12, 1)),
        ("--batch-size 20", 8, 9999, (20, 4)), ("--batch-size 32", 64, 9999, (32, 1)),
        ("--accum 8", 4, 9999, (20, 8)), ("--repeat 4", 16, 9999, (40, 1))])
    def test_the_recipe_fixes_the_global_batch(self, flags, world, videos, wanted):
        args = train.parse(["--data", "k400", *flags.split()])
        assert train.split_batch(args, world, videos) == wanted

    @pytest.mark.parametrize("flags, wanted", [
        ("k400", [16, 4, 800, 0.05, 640]), ("ssv2", [16, 2, 800, 0.03, 512]),
        ("ssv2 --model small", [16, 2, 2400, 0.05, 128])])
    def test_recipes_are_as_published(self, flags, wanted):
        args = train.parse(["--data", *flags.split()])
        assert [args.frames, args.stride, args.epochs, args.eps, args.global_batch] == wanted
        assert args.prototypes == 3000 and args.ratio == 0.9 and args.warmup == 40

    def test_a_run_is_named_after_data_model_and_target(self):
        assert train.parse(["--data", "a/b.csv"]).out == "out/b-base-mlp"

    def test_the_learning_rate_rises_linearly_and_falls_like_a_cosine(self):
        rate = [train.learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
        assert rate[0] == 0 and rate[3] == pytest.approx(3 / 9) and rate[9] == rate[10] == 1
        assert rate[55] == pytest.approx(0.55) and rate[-1] == pytest.approx(0.1, abs=1e-3)

    def test_the_optimizer_s_groups_are_the_published_ones_by_name(self):
        model = build_model("tiny", depth=1, decoder_depth=1)
        optimizer = train.make_optimizer(model)
        names = {p: name for name, p in model.named_parameters()}
        decay, no_decay = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
        blocks = [f"{part}.blocks.0.{name}" for part in ("encoder", "decoder") for name in (
            "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")]
        assert decay == {*blocks, "prototypes", "encoder.patch_embed.proj.weight",
                         "encoder_to_decoder.weight", "decoder.head.weight", "projector.0.weight",
                         "projector.2.weight"}
        assert "mask_token" in no_decay and no_decay == set(names.values()) - decay
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}

    def test_the_learning_rate_is_scaled_by_the_clips_of_a_step(self, here):
        args, line = train.parse(RUN), log_of(OUT)[0]  # of steps of 32 clips, 20 in all
        peak, final = args.lr * 32 / 256, args.final_lr * 32 / 256
        assert line["lr"] == pytest.approx(
            train.learning_rate(line["step"] - 1, 20, 2, peak, final))

    def test_accumulated_batches_give_the_gradient_of_one_large_batch(self, here):
        """Of the pixel target, since Sinkhorn balances each batch alone."""
        for out, batch, accum in (("large", 32, 1), ("small", 8, 4)):
            assert run(train, "--target", "pixel", "--batch-size", batch, "--accum", accum,
                       "--out", out, "--max-steps", 1) == 0
        large, small = log_of("large")[0], log_of("small")[0]
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-4)

    @pytest.mark.parametrize("change, tubes, wanted", [
        ({}, 50_000, False), (dict(video_entropy=6), 1000, False),  # few tubes
        (dict(projection_entropy=4.5), 50_000, True), (dict(video_term=8.01), 50_000, True),
        (dict(projection_term=0.1), 50_000, True)])
    def test_collapsed_features_are_told_by_a_log_line(self, change, tubes, wanted):
        healthy = dict(projection_term=7.1, video_term=7.4, video_entropy=7.8,
                       projection_entropy=7.8)
        assert running.collapsed(healthy | change, 2981, tubes) == wanted

    @pytest.mark.parametrize("size, calls", [("large", 2), ("base", 1)])
    def test_blocks_of_large_sizes_are_computed_again_for_their_gradient(
            self, size, calls, here, monkeypatch):
        counted = []

        class Counting(sigma.SIGMA):
            def __init__(self, **sizes):
                super().__init__(**sizes)
                self.encoder.blocks[0].norm1.register_forward_hook(lambda *_: counted.append(1))
        monkeypatch.setitem(sigma.SIZES, size, sigma.SIZES["tiny"])  # under another name
        train.main(["--model", size, "--max-steps", "1", "--out", "out"], model_class=Counting)
        assert len(counted) == calls

    def test_collapsed_features_are_said_once(self, here, capsys, monkeypatch):
        monkeypatch.setattr(running, "LOG_STEPS", 1)
        monkeypatch.setattr(running, "collapsed", lambda *_: True)
        assert run(train, "--epochs", 13, "--out", "collapsed") == 0
        assert capsys.readouterr().out.count("have collapsed") == 1

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_autocast_trains_too_and_the_log_is_json(self, here, amp, monkeypatch):
        """Gradients that overflow in fp16 are null there."""
        scaler = torch.amp.GradScaler(running.DEVICE.type, 2.0 ** 60, enabled=amp == "fp16")
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **options: scaler)
        assert run(train, "--epochs", 4, "--max-steps", 2, "--amp", amp, "--out", amp) == 0
        text = Path(amp, "log.jsonl").read_text()
        assert "Infinity" not in text and ("null" in text) == (amp == "fp16")

    @pytest.mark.parametrize("flags, word", [
        ("--data nowhere", "nowhere"), ("--data bad.csv", "line 1"), ("--init nowhere", "nowhere"),
        ("--init bad.csv", "bad.csv"), (f"--init {OUT} --target pixel", "decoder.head"),
        ("--val nowhere", "nowhere"), ("--out bad.csv", "bad.csv"), ("--epochs 0", "from 1"),
        ("--amp int8", "amp"), ("--bogus", "bogus"), ("--lr nan", "lr"), ("--size 8", "ratio"),
        ("--size 30", "multiples"), ("--root x --data mine", "--root"), ("--teacher x", "teacher"),
        ("--target dino --teacher bad.csv", "bad.csv"), ("--ratio 1", "ratio"),
        ("--repeat 3 --batch-size 64", "--repeat"),
        ("--data data/toy/val/6_up --model tiny --size 32 --eval-every 1", "eval-every"),
        (f"{' '.join(RUN)} --out {OUT} --lr 0.5", "--lr 0.5 (the run has 0.0")])
    def test_wrong_usage_ends_in_one_sentence_and_code_2(self, here, capsys, flags, word):
        Path("bad.csv").write_text("nothing.mp4 0\n")
        assert run(train, "--out", "never", *flags.split()) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in error and word in error and not Path("never").exists()

    def test_too_many_unreadable_videos_end_the_run_by_name(self, here, capsys):
        touch(*(f"mine/bad{i}.mp4" for i in [*range(7), "\udcff"]))  # the last is not UTF-8
        write_numbered("mine/good.mp4")
        flags = "--data mine --model tiny --size 32 --frames 8 --stride 1 --epochs 99 --out bad"
        assert run(train, *flags.split()) == 1
        out, error = capsys.readouterr()
        assert all(out.count(f"bad{i}.mp4: ") == 1 for i in range(7))
        assert "udcff.mp4" in out and "8 of" in error and Path("bad/last.pt").exists()

    def test_sigma_dino_trains_and_its_teacher_is_downloaded_once(self, here, monkeypatch):
        hashes, weights = [], dino(side=14)[1]
        monkeypatch.setenv("TORCH_HOME", "torch-home")
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, sha, **_:
                            hashes.append(sha) or torch.save(weights, path))
        for out in ("dino-1", "dino-2"):
            assert run(train, "--target", "dino", "--max-steps", 1, "--out", out) == 0
        kept = saved("dino-1")["model"]
        assert kept["prototypes"].shape == (64, 128) and not any("vit" in name for name in kept)
        assert hashes == ["bf34ad0f42"]  # that the file must have

    def test_a_run_refuses_another_teacher_of_the_same_width(self, here, capsys):
        for name in ("one", "two"):
            torch.save({"teacher": {f"module.backbone.{n}": w for n, w in dino(4)[1].items()}},
                       f"{name}.pth")
        flags = "--target dino --out taught --max-steps".split()
        assert run(train, *flags, 1, "--teacher", "one.pth") == 0
        os.rename("one.pth", "renamed.pth")
        assert run(train, *flags, 2, "--teacher", "renamed.pth") == 0
        assert run(train, *flags, 3, "--teacher", "two.pth") == 2
        assert "teacher" in capsys.readouterr().err and saved("taught")["clips_seen"] == 2 * 64

    def test_files_that_only_lie_beside_videos_are_not_missing(self):
        Path("set/a").mkdir(parents=True)
        for name in ("a/1.mp4", "a/notes.txt", "a/thumb.jpg", "2.mp4"):
            Path("set", name).touch()
        videos, _, skipped = data.find_videos("set")
        found = evaluate.missing(skipped)
        assert (len(videos), len(skipped), found["missing"]) == (1, 3, 1)
        assert found["first_missing"].startswith("set/2.mp4: ")

    def test_a_set_too_large_to_probe_is_thinned_and_the_accuracy_says_so(self, monkeypatch):
        monkeypatch.setattr(evaluate, "EVAL_CLIPS", 2)
        videos, options = [(f"{i}.mp4", 0) for i in range(5)], dict(frames=4, stride=1, size=32)
        sets, share = evaluate.probe_sets(videos, videos[:3], [], **options)
        assert [len(clips) for clips in sets] == [2, 2] and "one in 2 of 3" in share

    def test_test_videos_that_are_missing_are_counted_and_named(self, here):
        """In the log, in results.json, and all of them in skipped.txt."""
        paths = sorted(Path("data/toy/val").rglob("*.mp4"))[::4]
        lines = [f"{path.absolute()} {i % 8}" for i, path in enumerate(paths)]
        Path("missing.csv").write_text("\n".join([*lines, *(f"gone{i}.mp4 1" for i in range(6))]))
        flags = "--data data/toy/train --model tiny --size 32 --frames 8 --stride 1 --epochs 1"
        assert run(train, *flags.split(), "--val", "missing.csv", "--out", "missing") == 0
        results = read_json("missing")
        assert results["tests"] == f"of {len(paths)} videos, {len(paths) + 6} named"
        skipped = Path("missing/skipped.txt").read_text()
        assert all(f"gone{i}.mp4" in skipped for i in range(6))

    @pytest.mark.parametrize("largest, code", [(1e6, None), (math.inf, 1)])
    def test_outputs_that_are_not_finite_are_no_features(self, largest, code, here, capsys):
        """What overflows in fp16 is computed again in float32; what does so there ends the run."""
        videos = data.find_videos("data/toy")[0][:2]
        clips = data.Clips(videos, frames=8, stride=1, size=32, tube=(4, 8, 8), ratio=None, tries=1)

        def forward(video):
            half = torch.is_autocast_enabled("cpu")
            return torch.full((len(video), 3), math.nan if half else largest)
        if code:
            with pytest.raises(running.RunError, match="not finite"):
                evaluate.collect(forward, clips, "fp16")
        else:
            assert (evaluate.collect(forward, clips, "fp16")[0] == largest).all()
            assert "float32" in capsys.readouterr().out

    def test_small_sets_get_as_many_steps_as_the_recipe_asks_for(self, here, capsys):
        """Unless --epochs says how many passes there are to be."""
        flags = "--data data/toy/train --model tiny --size 32 --frames 8 --stride 1 --max-steps 1"
        for more, steps in (([], "1,600 steps"), (["--epochs", 3], "6 steps")):
            assert run(train, *flags.split(), *more, "--out", f"steps{len(more)}") == 0
            assert steps in capsys.readouterr().out

    def test_the_core_needs_nothing_that_windows_lacks(self, here):
        """Simulated: fewer signals, no file locks, no C library, no fork, text in a code page."""
        code = """if True:
            import ctypes, multiprocessing, os, signal, sys
            for name in "SIGHUP SIGUSR1 SIGALRM setitimer alarm".split():
                delattr(signal, name)
            for name in ("fork", "killpg", "mkfifo"):
                delattr(os, name)
            sys.modules["fcntl"] = None
            def CDLL(name, *_, load=ctypes.CDLL, **options):
                if name is None:
                    raise TypeError("there is none")
                return load(name, *_, **options)
            ctypes.CDLL = CDLL
            if __name__ == "__main__":
                multiprocessing.set_start_method("spawn")
                from extras.run import launch
                import train
                flags = ["--out", "windows", "--max-steps"]
                code = launch(train.main, [*flags, "2", "--workers", "1"])
                sys.exit(code or launch(train.main, [*flags, "3"]))
        """
        Path("windows.py").write_text(code)
        result = subprocess.run(
            [sys.executable, "-X", "warn_default_encoding", "windows.py"], text=True,
            capture_output=True,
            env=os.environ | {"PYTHONPATH": str(HERE), "PYTHONUTF8": "0", "LC_ALL": "C"})
        assert result.returncode == 0, result.stderr
        ours = [line for line in result.stderr.splitlines() if "EncodingWarning" in line
                and str(HERE) in line]
        assert not ours and saved("windows")["clips_seen"] == 64 * 3

    def test_walk_and_readme_snippets_print_what_they_say(self, here, capsys):
        sigma.walk()
        assert re.findall(r"^\d", capsys.readouterr().out, re.M) == list("123456")
        snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
        assert snippets
        for snippet in snippets:
            exec(snippet, {})
            said = re.findall(r"^print\(.*\) +# (.*)$", snippet, re.M)
            assert said and capsys.readouterr().out.splitlines() == said

    def test_two_processes_give_what_one_gives(self):
        """Loss, gradients and assignments of the whole batch; a group of one balances alone."""
        in_two_processes(half_of_the_batch)
        losses, stats, alone, gradients = zip(*(torch.load(f"{i}.pt") for i in (0, 1)))
        model = small()
        loss, wanted = model(VIDEO, MASK)
        loss.backward()
        assert torch.allclose(sum(losses) / 2, loss, rtol=1e-12)
        for name in ("video_assignment", "projection_assignment"):
            assert torch.equal(torch.cat([half[name] for half in stats]), wanted[name])
        for p, *parts in zip(model.parameters(), *gradients):
            assert all(torch.allclose(part, p.grad, rtol=1e-9, atol=1e-14) for part in parts)
        assert torch.equal(alone[1], sinkhorn(SCORES[350:]))

    def test_two_processes_resume_where_one_stopped(self, here):
        """The same steps on the same clips: another number of processes changes rounding alone."""
        flags = ["--epochs", "3", "--out"]
        assert run(train, *flags, "one") == run(train, *flags, "more", "--max-steps", 2) == 0
        assert "2 processes x 32" in in_two_processes(train.main, *flags, "more")
        one, more = saved("one"), saved("more")
        assert one["clips_seen"] == more["clips_seen"] == 3 * 64
        assert all(torch.allclose(w, more["model"][n], atol=1e-4) for n, w in one["model"].items())

    @pytest.mark.parametrize("trouble, steps", [("term", 7), ("kill", 0)])
    def test_a_signal_to_one_rank_ends_all_at_that_step(self, trouble, steps, here):
        """SIGTERM saves first, without waiting for a log line; if a rank dies, the job ends."""
        out, at = f"rank-{trouble}", 440  # a clip of rank 1, in step 7
        code, _ = run_apart(out, ranks=2, log_steps=99, trouble=trouble, at=at)
        assert (code == 0) == (trouble == "term") and saved(out)["clips_seen"] == 64 * steps


@pytest.mark.skipif(not (GPUS and any(Path("/dev").glob("nvidia[0-9]*"))), reason="there is no GPU")
class TestOnAGPU:
    """Each run is a process of its own, which sees the GPUs that are hidden from the others."""

    def on_gpu(self, out, *flags, launcher=(sys.executable,)):
        env = {n: x for n, x in os.environ.items() if n != "CUDA_VISIBLE_DEVICES"}
        env |= {} if GPUS == "all" else {"CUDA_VISIBLE_DEVICES": GPUS}
        result = subprocess.run([*launcher, train.__file__, "--out", out, *flags], env=env,
                                capture_output=True, text=True)
        assert result.returncode == 0 and "cuda" in result.stdout, result.stderr
        return log_of(out)

    @pytest.mark.parametrize("flags", [f"{amp}{flag}" for amp in ("off", "bf16", "fp16")
                                       for flag in ("", " --compile")])
    def test_a_step_in_each_precision(self, flags, here):
        line, = self.on_gpu(f"gpu-{flags}", "--max-steps", "1", "--amp", *flags.split())
        assert run(train, "--max-steps", 1, "--out", f"cpu-{flags}", "--amp", "off") == 0
        wanted = log_of(f"cpu-{flags}")[0]["loss"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-3 if "off" in flags else 2e-2)

    def test_one_nccl_process_stops_and_resumes(self, here):
        torchrun = [*TORCHRUN, "--nproc_per_node=1"]
        for steps in ("2", "4"):
            log = self.on_gpu("nccl", "--max-steps", steps, launcher=torchrun)
        assert [line["step"] for line in log] == [2, 4] and math.isfinite(log[-1]["loss"])


if __name__ == "__main__":  # a process that a test has started: the name of a function, its words
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
