"""Frozen networks: teachers from other people's files; features of a set on all ranks, linear probe
and k-NN; and what a run says of its data: videos to test on, what was skipped, of how many videos
an accuracy is.
"""
import hashlib
import math
import os
import re
import socket
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (SPLITS, Clips, centre_crop, centre_frames, check_labels, find_videos, normalise,
                  progress)
from extras.run import (DEVICE, GPU, RANK, WORLD, RunError, autocast, draft_of, gather, gather_dict,
                        loader, log, one_first)
from sigma import Teacher, UserError, read_file

# --- Teachers -------------------------------------------------------------------------------------

DINO = {  # target: (address of its weights, how their SHA-256 begins; not known for ViT-S)
    "dino": ("https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/"
             "dino_vitbase16_pretrain.pth", "bf34ad0f42"),
    "dino-s": ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
               "dino_deitsmall16_pretrain.pth", "")}
UNUSED = r"(head|head_dist|mask_token|masked_embed|decoder_\w+)(\.|$)"  # by a teacher
NOT_PLAIN = {r"mlp\.(w\d|fc1_[gx])": "SwiGLU", r"rope|freqs": "rotary positions, as DINOv3 has,",
             r"[qk]_norm": "norms of queries and keys", r"norm_pre|ln_pre|pre_layrnorm":
             "a norm before its first block, as CLIP has,"}


def plain_weights(content, path):
    """The state dict in a file's content, without what training code wraps around it: keys such as
    "teacher" or "state_dict", names that begin with "module." and the like. Raises UserError."""
    keys = "teacher", "state_dict", "model", "module"
    while inner := [content[key] for key in keys if isinstance(content.get(key), dict)]:
        content = inner[0]
    for part in ("teacher.", "backbone."):  # beside them there are students and heads
        content = {name: w for name, w in content.items() if part in name} or content
    weights = {re.sub(r"^((module|model|backbone|teacher|_orig_mod)\.)+|\b_orig_mod\.", "", name): w
               for name, w in content.items()}
    others = [name for name, w in weights.items() if not isinstance(w, torch.Tensor)]
    if others or not weights:
        raise UserError(f"{path} holds no weights, or not weights alone: {', '.join(others[:20])}")
    if bad := [n for n, w in weights.items() if w.is_floating_point() and not w.isfinite().all()]:
        raise UserError(f"{path} holds weights that are not finite: {', '.join(bad[:5])}")
    return weights


def dino_weights(weights):
    """The state dict of a plain ViT, in the names that DINO, DINOv2, iBOT, MAE and timm share, as
    Teacher takes it: in DINO's own, without heads, LayerScale folded into the layers whose outputs
    it multiplies. Raises UserError with the name of what Teacher can't compute.
    """
    for name, (pattern, part) in ((n, pair) for n in weights for pair in NOT_PLAIN.items()):
        if re.search(pattern, name):
            raise UserError(f"the teacher has {part} ({name}), but can only be a plain ViT")
    weights = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): w.float()  # DINOv2's chunks
               for name, w in weights.items() if not re.match(UNUSED, name)}
    for scale, layer in ((r"ls1\.gamma|gamma_1", "attn.proj"), (r"ls2\.gamma|gamma_2", "mlp.fc2")):
        for name in [name for name in weights if re.search(f"({scale})$", name)]:
            layer_name, gamma = re.sub(scale, layer, name), weights.pop(name)
            weights[f"{layer_name}.weight"] = weights[f"{layer_name}.weight"] * gamma[:, None]
            weights[f"{layer_name}.bias"] = weights[f"{layer_name}.bias"] * gamma
    for name in [name for name in weights if name.endswith("qkv.weight")]:
        if name.replace("qkv.weight", "q_bias") not in weights:  # BEiT's names are Encoder's
            weights.setdefault(name.replace("weight", "bias"), torch.zeros(len(weights[name])))
    if "pos_embed" in weights:  # else Teacher says what it misses
        position, named = weights["pos_embed"], {"cls_token", "dist_token"} & weights.keys()
        tokens = torch.cat([position[:, :0], *map(weights.pop, sorted(named))], dim=1)
        if math.isqrt(position.shape[1]) ** 2 == position.shape[1]:  # timm's: of patches alone
            position = F.pad(position, (0, 0, tokens.shape[1], 0))
        weights |= {"cls_token": tokens, "pos_embed": position}
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
    return weights


def make_teacher(args, tube):
    """The frozen Teacher of args.target, dino or dino-s, for a video model's tube: from the file
    args.teacher, or if that is None downloaded into torch's cache. Raises UserError."""
    if args.teacher:
        weights = plain_weights(read_file(args.teacher), args.teacher)
        return Teacher(dino_weights(weights), tube)
    url, sha = DINO[args.target]
    name = Path(url).stem + (f"-{sha}.pth" if sha else ".pth")  # torch checks such a hash
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torch.hub has no limit of its own
    try:
        weights = one_first(lambda: torch.hub.load_state_dict_from_url(
            url, map_location="cpu", weights_only=True, check_hash=bool(sha), file_name=name))
    except (OSError, RuntimeError) as error:
        raise UserError(f"DINO's weights can't be downloaded ({error}): get {url} elsewhere and "
                        "give the file with --teacher") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return Teacher(weights, tube)


def fingerprint(module):
    """A hash of a module's weights, to tell networks apart."""
    found = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# --- Data -----------------------------------------------------------------------------------------

EVAL_CLIPS = 10_000  # of each split, for probe and k-NN
PROTOCOL = ("top-1, frozen encoder, mean over tokens, one centre clip per video; probe: ridge "
            "regression (10) on standardised features; k-NN: cosine, k = 20, temperature 0.07")
NO_PROBE = ("a probe needs labelled videos to train and to test on: train and val (or test) of "
            "--data, or --val")


def told(skipped):
    """How many files or lines were skipped, and the first, for a line of the log."""
    first = f", first {skipped[0]}" if skipped else ""
    return f"; {len(skipped):,} files or lines skipped{first}"


def missing(skipped):
    """What results hold of videos that were named but are not there: how many, and the first. Files
    that only lie beside videos, as notes do, were not named as such."""
    lines = [line for line in skipped if ": most files here are " not in line]
    return dict(missing=len(lines), first_missing=next(iter(lines), None))


def share_of(used, named, every=1):
    """What stands after an accuracy: of how many videos it is, and how many were named; every: of
    how many of these one was taken."""
    part = f"one in {every} of " if every > 1 else ""
    return f"of {used:,} videos, {part}{max(used, named):,} named"


def probe_sets(videos, tests, lacking, **options):
    """Clips to fit probe and k-NN on and to test them on, one from the middle of each video, at
    most EVAL_CLIPS of a split, None if there is nothing to test on; and share_of the tests, of
    which `lacking` were skipped. options: of Clips."""
    if not tests:
        return None, "none"
    every = [math.ceil(len(part) / EVAL_CLIPS) for part in (videos, tests)]
    sets = [Clips(part[::step], **options, ratio=None, tries=1, choose=centre_frames,
                  crop=centre_crop) for part, step in zip((videos, tests), every)]
    return sets, share_of(len(sets[1]), len(tests) + missing(lacking)["missing"], every[1])


def clip_of(content):
    """Frames, stride and size of the clips of a checkpoint's run, as far as it tells."""
    args = content.get("args", {})
    return {name: args[name] for name in ("frames", "stride", "size") if args.get(name)}


def start_folder(out, skipped):
    """Makes a run's folder, without results of an earlier run, and writes what was skipped, and
    why, to skipped.txt there."""
    if RANK == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "results.json").unlink(missing_ok=True)
        with draft_of(Path(out, "skipped.txt")) as draft:  # names need not be UTF-8
            draft.write_bytes(os.fsencode("\n".join([*skipped, ""])))


def held_out(videos, classes, root, val=None, required=False):
    """Labelled videos to test on, of val, or else of the folder root, and what was skipped there,
    each with the reason: nothing if there is none, or the training videos have no labels. required:
    raises UserError if there are none, or if a training or test video lacks its label."""
    tests, lacking, several = [], [], any(isinstance(label, tuple) for _, label in videos)
    if required or any(label not in (-1, ()) for _, label in videos):
        splits = (*SPLITS["val"], "") if val else SPLITS["val"]
        tests, _, lacking = find_videos(val or root, splits, classes, several)
        check_labels(videos + tests, val or root)
    unlabelled = [all(label == () for _, label in part) or any(label == -1 for _, label in part)
                  for part in (videos, tests)]  # of several labels one video may have none
    if required and any(unlabelled):
        raise UserError("give labelled videos to train and to test on, as class folders or lines "
                        "`path label`: train and val in --data, or --data and --val")
    lacking += [f"{path}: it has no label" for path, label in tests if label == -1]
    return [video for video in tests if video[1] != -1], lacking


# --- Probe and k-NN -------------------------------------------------------------------------------

@torch.no_grad()
def finite(forward, video, amp, names):
    """forward of clips (B, 3, T, S, S) uint8, in float32. What is not finite in the precision amp
    is computed again in float32, which the log says, with the videos' names. Raises RunError if an
    output is not finite there either."""
    for precision in dict.fromkeys((amp, "off")):
        with autocast(precision):
            output = forward(normalise(video, DEVICE)).float()
        if output.isfinite().all():
            return output
        log(f"not finite with --amp {precision}: {names}"
            + ", now in float32" * (precision != "off"))
    raise RunError("the network's outputs are not finite: its weights are damaged, or its "
                   f"activations are beyond float32's range, at {names}")


@torch.no_grad()
def collect(forward, clips, amp="off", workers=0):
    """(outputs (n, ...), labels (n,)) of all clips in order, on every rank; ranks share the work.

    forward: normalised clips (B, 3, T, S, S) -> (B, ...), averaged over the clips of a video. A
    video that can't be read is named, and its label is -1, which no prediction equals. What is not
    finite in lower precision is computed again in float32. Raises UserError if none can be read,
    RunError if an output is not finite.
    """
    batch = max(1, 64 // clips.repeat) if GPU or clips.size < 64 else 1
    keys = [(0, i) for i in range(RANK, len(clips), WORLD)]
    found, unreadable = [], {}
    bar = progress(loader(clips, batch, keys, workers), "evaluating", math.ceil(len(keys) / batch),
                   leave=False, disable=RANK > 0, unit="batch")
    for samples in bar:
        names = ", ".join(clips.videos[i][0] for i in samples.index.tolist())
        output = finite(forward, samples.video, amp, names)
        output = output.unflatten(0, (len(samples.labels), -1)).mean(dim=1)
        found.append((samples.index, samples.labels, output.cpu()))
        unreadable |= samples.bad
    unreadable = gather_dict(unreadable)
    for path, reason in unreadable.items():
        log(f"unreadable video {path}: {reason}")
    if len(unreadable) == len({path for path, _ in clips.videos}):
        raise UserError("none of the videos can be read")
    index, labels, output = map(torch.cat, zip(*(row for rows in gather(found) for row in rows)))
    order = index.argsort()
    return output[order], labels[order]


def accuracy(scores, labels, k=1):
    """Share of rows of scores (n, classes) whose k largest hold the label (n,)."""
    hits = scores.topk(min(k, scores.shape[1])).indices == labels[:, None]
    return hits.any(dim=1).float().mean().item()


def mean_average_precision(scores, truth):
    """Average precision of scores (n, classes), mean over the classes that occur in truth, 0 and 1
    (n, classes): for each video of a class the share of its videos among all that score as high."""
    found = []
    for score, true in zip(scores.T, truth.T.bool()):
        as_high = score >= score[true, None]  # as each video of the class
        shares = as_high[:, true].sum(dim=1) / as_high.sum(dim=1)
        found.append(shares.mean())  # nan without videos
    return torch.stack(found).nanmean().item()


def linear_probe(train, labels, test):
    """Class scores (m, classes) of test features (m, D), from training features (n, D) and labels
    (n,), -1 for none: ridge regression, of strength 10, from standardised features to one-hot."""
    train, labels = train[labels >= 0], labels[labels >= 0]
    mean, std = train.mean(dim=0), train.std(dim=0).nan_to_num() + 1e-6  # one has no std
    train, test, targets = (train - mean) / std, (test - mean) / std, F.one_hot(labels).float()
    gram = train.T @ train + 10 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(gram, train.T @ (targets - targets.mean(dim=0)))
    return test @ weight + targets.mean(dim=0)


def nearest_neighbours(train, labels, test, k=20, temperature=0.07):
    """Class scores (m, classes) of test features, as linear_probe: the votes of the k nearest
    training features, each weighted by exp(cosine / temperature)."""
    train, labels = F.normalize(train[labels >= 0], dim=1), labels[labels >= 0]
    votes = torch.zeros(len(test), int(labels.max()) + 1)
    for rows, part in zip(votes.split(1024), F.normalize(test, dim=1).split(1024)):
        cosines, index = (part @ train.T).topk(min(k, len(train)), dim=1)
        rows.scatter_add_(1, labels[index], (cosines / temperature).exp())
    return votes


def evaluate(encoder, sets, amp, workers, title, share):
    """Accuracy of probe and k-NN, with a line of the log that title begins. sets and share: as
    probe_sets gives them."""
    (train, labels), (test, truth) = (
        collect(lambda video: encoder(video).mean(dim=1), clips, amp, workers) for clips in sets)
    probe = accuracy(linear_probe(train, labels, test), truth)
    knn = accuracy(nearest_neighbours(train, labels, test), truth)
    unreadable = int((truth < 0).sum())
    log(f"{title:10}linear probe {probe:.1%}, k-NN {knn:.1%} {share}"
        + (f"; {unreadable:,} can't be read" if unreadable else ""))
    return {"linear_probe": probe, "knn": knn}
