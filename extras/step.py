"""A training step on random clips, to time it or to count its memory; extras/bench.py does both.

args: the flags of bench.py, data, target and amp; name: of a size in sigma.SIZES.
"""
from types import SimpleNamespace
from unittest.mock import patch

import torch

from data import normalise
from extras.run import DEVICE
from extras.toy import random_dino
from sigma import DINO_WIDTHS, SIGMA, Teacher, sizes_for, split_mask, tube_mask
from train import make_optimizer, set_blocks, settings_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def random_mask(args, name, batch):
    """A mask for each of `batch` clips, (batch, N), in the recipe of --data."""
    own, (p, q, r) = settings_for(args.data, name), sizes_for(name)["tube"]
    grid = own["frames"] // p, own["size"] // q, own["size"] // r
    return tube_mask(batch, grid, own["ratio"])


def training_step(args, name, mask, device=DEVICE):
    """model, teacher (or None), optimizer, and random clips as video (uint8), one for each of the
    masks, in the recipe of --data; and step(n), which trains on n of them."""
    own, sizes, batch = settings_for(args.data, name), sizes_for(name, args.target), len(mask)
    shape = batch, 3, own["frames"], own["size"], own["size"]
    video = torch.randint(256, shape, dtype=torch.uint8)
    video = video.pin_memory() if device.type == "cuda" else video
    with device:
        model, teacher = SIGMA(**sizes), None
        if args.target in DINO_WIDTHS:
            teacher = Teacher(random_dino(sizes["target_dim"]), sizes["tube"])
    optimizer = make_optimizer(model)

    def step(n=batch):
        x = normalise(video[:n], device)
        with torch.autocast(device.type, DTYPES[args.amp], enabled=args.amp != "off"):
            loss, _ = model(x, mask[:n], teacher(x) if teacher else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return SimpleNamespace(model=model, teacher=teacher, optimizer=optimizer, video=video,
                           step=step)


def recompute(model, name, compiled=False):
    """As train.py does it: blocks of large and huge keep no activations, but compute them again.
    compiled: blocks are compiled, too."""
    set_blocks([*model.encoder.blocks, *model.decoder.blocks], name in ("large", "huge"), compiled)


def count_memory(args, name, batch):
    """Peak memory of a training step in bytes, by MemTracker's kinds, and "Total". Nothing
    is computed: the tensors have shapes, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # private: they may move
    from torch.distributed._tools.mem_tracker import MemTracker

    mask = random_mask(args, name, batch)
    index = split_mask(mask)  # before tensors have no data: it reads numbers of theirs
    with (FakeTensorMode(allow_non_fake_inputs=True), patch("torch.nn.init.trunc_normal_"),
          patch("sigma.split_mask", lambda *_: [torch.zeros_like(x) for x in index])):
        trained = training_step(args, name, mask, torch.device("cpu"))
        recompute(trained.model, name)
        for weight in trained.model.parameters():  # Adam's state is there from the first step on
            weight.grad = torch.zeros_like(weight)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        tracker = MemTracker()
        tracker.track_external(trained.model, trained.optimizer, trained.video)
        with tracker:
            trained.step()
    peak, found = tracker.get_tracker_snapshot("peak"), {}
    for kind, number in (pair for kinds in peak.values() for pair in kinds.items()):
        name = str(getattr(kind, "value", kind))
        found[name] = found.get(name, 0) + number
    return found
