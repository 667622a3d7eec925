"""The toy set: 9,792 small clips of a shape that drifts in one of eight directions, the class.

Rendered once into data/toy, in a minute; `toy_clip` draws one, `make_toy` writes them all. With it
what else makes material, for scripts as well: `write_video`, `in_parallel`, `random_dino`.
"""
import math
import os
import shutil
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from data import progress, seeded
from sigma import Encoder

TOY_CLASSES = ("0_right", "1_down_right", "2_down", "3_down_left", "4_left", "5_up_left", "6_up",
               "7_up_right")
TOY_FRAMES, TOY_SIZE, TOY_TRAIN, TOY_VAL = 8, 32, 8192, 1600


def toy_clip(label, generator):
    """A clip (TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3) uint8 of a shape drifting at 45 degrees x label.

    A lobed, striped shape of random looks on a smooth background, on a plane that wraps around: no
    single frame tells the class. No pixel noise, since nothing could predict it.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    size, turn = TOY_SIZE, 2 * math.pi
    travelled = uniform(2, 3.5) * torch.arange(TOY_FRAMES)[:, None, None]  # pixels
    pixel = torch.arange(size) + 0.5
    x = pixel - uniform(0, size) - travelled * math.cos(label * turn / 8)  # from the shape's centre
    y = pixel[:, None] - uniform(0, size) - travelled * math.sin(label * turn / 8)  # T S 1
    x, y = ((distance + size / 2) % size - size / 2 for distance in (x, y))  # wraps around
    radius, angle = uniform(math.log(7), math.log(18)).exp(), uniform(0, turn)
    along = (x * angle.cos() + y * angle.sin()) / radius  # in the shape's own coordinates: T S S
    across = (y * angle.cos() - x * angle.sin()) / radius
    lobes, depth = torch.randint(2, 6, (), generator=generator), uniform(0.15, 0.35)
    outline = 1 - depth + depth * torch.cos(lobes * torch.atan2(across, along))
    inside = ((outline - along.hypot(across)) * radius + 0.5).clamp(0, 1)  # edge: one pixel wide
    angle = uniform(0, turn)
    stripes = torch.sin(uniform(2, 4) * (along * angle.cos() + across * angle.sin())
                        + uniform(0, turn))
    texture = uniform(0, 1, 3) + uniform(-0.5, 0.5, 3) * stripes[..., None]  # T S S 3
    background = F.interpolate(uniform(0, 1, 1, 3, 2, 2), (size, size), mode="bilinear",
                               align_corners=True)[0].permute(1, 2, 0)  # S S 3
    return (background.lerp(texture.clamp(0, 1), inside[..., None]) * 255).round().byte()


def write_video(path, frames, rate=8):
    """Writes frames (T, H, W, 3) uint8 as H.264 in mp4; H and W even."""
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "10", "x264-params": "partitions=all:subme=2"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def in_parallel(work, items, workers, title, unit=" videos"):
    """Yields (item, work(item)) in order, with a progress bar; worker processes do the work."""
    results = DataLoader(items, batch_size=None, collate_fn=work, num_workers=workers)
    bar = progress(results, title, len(items), unit=unit)
    yield from ((item, result) for result, item in zip(bar, items))  # the bar first: to its end


def render(job):
    """Writes a toy clip to path, of a class and from a seed: job = (path, label, seed)."""
    path, label, seed = job
    write_video(path, toy_clip(label, seeded(seed)))


def make_toy(root, train=TOY_TRAIN, val=TOY_VAL):
    """Renders the toy set into root/{train,val}/<class>/*.mp4 on all cores, unless it is there.

    It works in a folder of another name until all is written: root is complete or not there.
    """
    root = Path(root)
    if root.is_dir():
        return
    draft, jobs = root.with_name(f"{root.name}.unfinished-{os.getpid()}"), []
    for split, numbers in (("train", range(train)), ("val", range(TOY_TRAIN, TOY_TRAIN + val))):
        for label, name in enumerate(TOY_CLASSES):
            (draft / split / name).mkdir(parents=True)
            jobs += [(draft / split / name / f"{i:05}.mp4", label, i) for i in numbers[label::8]]
    list(in_parallel(render, jobs, os.cpu_count(), "rendering the toy set"))
    try:
        draft.rename(root)
    except OSError:  # another process was faster: its set is the same
        shutil.rmtree(draft)


def random_dino(width, depth=12):
    """A random state dict in the names of DINO's ViTs, patches of 16: a teacher that teaches
    nothing, but takes as long as the real one."""
    weights = Encoder(dim=width, depth=depth, heads=width // 64, tube=(1, 16, 16)).state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0]
    return weights | {"cls_token": torch.randn(1, 1, width),
                      "pos_embed": torch.randn(1, 1 + 14 ** 2, width)}
