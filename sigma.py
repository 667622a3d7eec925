"""SIGMA: Sinkhorn-Guided Masked Video Modeling, the whole method in one file.

Paper: Salehi, Dorkenwald, Thoker, Gavves, Snoek, Asano, ECCV 2024, arXiv 2407.15447.

    model = build_model("base")                            # or SIGMA(dim=..., ...) for any size
    video = torch.randn(2, 3, 16, 224, 224)                # normalised with ImageNet's mean and std
    loss, stats = model(video, tube_mask(2, (8, 14, 14)))  # pretrain: 90% of the tubes are hidden
    features = model.encoder(video)                        # use: (2, 1568, 768), a token per tube

`python sigma.py` walks one clip through the method. The parts are defined from small to large;
`tube_mask`, `sinkhorn` and `symmetric_loss` can each be copied alone.

Shapes   B clips of 3 x T x H x W pixels   N tubes of a clip = V visible + M hidden
         D width of a token   E width of features and prototypes   K prototypes   P values of a tube
"""
import argparse
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UserError(Exception):
    """A user's error: scripts show its sentence, without a traceback, and exit with this code."""
    code = 2


class RunError(UserError):
    """A run that can't go on; its message says why and what is left."""
    code = 1


def fill(model, weights, source):
    """Loads weights into a model and returns it. Raises UserError with what differs, if any."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # names that are missing, left over, or of another shape
        differ = " ".join(str(error).split()[6:])[:2000]
        raise UserError(f"the weights in {source} don't fit: {differ}") from error
    return model


def depth_of(weights, prefix):
    """How many blocks a network with these weights has at the prefix."""
    return len({n[len(prefix) + 1:].split(".")[0] for n in weights if n.startswith(prefix + ".")})


# --- Tubes: a clip in pieces of 2 frames x 16 x 16 pixels, their positions, which are hidden ------

def positions(n, dim, device=None):
    """Fixed sinusoids over the flattened (t h w) index of a tube: (n, dim) float32, never trained.

    angle(p, j) = p / 10000^(2 floor(j/2) / dim); even columns j are sines, odd ones cosines.
    """
    frequency = 10000 ** (-2 * torch.arange((dim + 1) // 2, device=device).double() / dim)
    angle = torch.arange(n, device=device)[:, None] * frequency  # n dim/2
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim].float()  # n dim


def tube_mask(batch, grid, ratio=0.9, generator=None):
    """Random tube masks (paper, method section; VideoMAE): (batch, t*h*w) bool, True where hidden.

    Each clip hides int(ratio * h*w) positions of its own, the same in all t time slices, so that a
    hidden tube can't be copied from the slice before. All hide the same number, so the visible
    tubes form one dense batch. grid: the clip's size (t, h, w) in tubes. generator: on the CPU.
    """
    t, h, w = grid
    hidden = int(ratio * h * w)
    if not 0 < hidden < h * w:
        raise ValueError(f"ratio {ratio} hides {hidden} of {h * w} tubes in a slice: all or none")
    chosen = torch.rand(batch, h * w, generator=generator).argsort(dim=1)[:, :hidden]
    mask = torch.zeros(batch, h * w, dtype=torch.bool).scatter_(1, chosen, True)  # one slice
    return mask.repeat(1, t)  # B N


def split_mask(mask, device=None):
    """Mask (B, N), True where hidden -> ascending indices of visible (B, V), hidden tubes (B, M).

    Give it on the CPU: V and M are Python numbers, and a mask on a GPU would make us wait.
    """
    hidden = mask.sum(dim=1).tolist()
    if len(set(hidden)) != 1:
        raise ValueError(f"all clips of a batch must hide the same number of tubes, not {hidden}")
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)  # visible first
    return order.split([mask.shape[1] - hidden[0], hidden[0]], dim=1)


def take_tubes(video, tube, index=None):
    """Video (B, 3, T, H, W) -> its tubes of size tube = (p, q, r), those at index (B, n) or all N:
    (B, n, 3, p, q, r)."""
    if any(size % step for size, step in zip(video.shape[2:], tube)):
        raise ValueError(f"clips of {tuple(video.shape[2:])} frames, rows and columns can't be cut "
                         f"into tubes of {tuple(tube)}")
    p, q, r = tube
    grid = rearrange(video, "b c (t p) (h q) (w r) -> b t h w c p q r", p=p, q=q, r=r)  # a view
    if index is None:
        return grid.flatten(1, 3)
    (h, w), clip = grid.shape[2:4], torch.arange(len(video), device=video.device)[:, None]
    return grid[clip, index // (h * w), index // w % h, index % w]  # copies the chosen tubes alone


def standardise(x, dim):
    """Zero mean and unit (unbiased) variance along dim; 1e-6 keeps constant tubes finite."""
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)


def at_least_fp32(x):
    """x in float32 if it has fewer bits; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- The video model: a ViT sees the visible tubes, a light decoder predicts features of the rest -

class Attention(nn.Module):
    """Multi-head self-attention over (B, n, D). Queries and values have a bias, keys have none."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # B n 3D
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # B heads n d
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # B n D


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_linear(layer):
    """Xavier-uniform weights and zero biases; LayerNorms start at 1 and 0 as they are."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class TubeEmbedding(nn.Module):
    """A Conv3d with the tube as kernel and stride, computed as a linear layer on chosen tubes."""

    def __init__(self, dim, tube):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=tube, stride=tube)

    def forward(self, tubes):  # B n 3 p q r
        return F.linear(tubes.flatten(2), self.proj.weight.flatten(1), self.proj.bias)  # B n D


class Encoder(nn.Module):
    """ViT on space-time tubes. Given the visible ones, it never touches the hidden ones."""

    def __init__(self, *, dim, depth, heads, tube=(2, 16, 16)):
        super().__init__()
        self.dim, self.tube = dim, tuple(tube)
        self.patch_embed = TubeEmbedding(dim, self.tube)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_linear)

    def forward(self, video, visible=None):
        """video (B, 3, T, H, W), of any size that the tube divides; visible (B, V), see split_mask.

        Returns tokens in (t h w) order, of all tubes (B, N, D) or of the visible ones (B, V, D).
        """
        tokens = self.patch_embed(take_tubes(video, self.tube, visible))
        n = math.prod(video.shape[2:]) // math.prod(self.tube)
        position = positions(n, self.dim, video.device)  # N D
        position = position if visible is None else position[visible]
        return self.norm(self.blocks(tokens + position))


class Decoder(nn.Module):
    """Light transformer on tokens (B, N, D') with the M hidden ones last -> their (B, M, E)."""

    def __init__(self, *, dim, depth, heads, out):
        super().__init__()
        self.dim = dim
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out)
        self.apply(init_linear)

    def forward(self, x, hidden):
        return self.head(self.norm(self.blocks(x)[:, -hidden:]))


# --- The projection network: an MLP on pixels (SIGMA-MLP), or a frozen image ViT (SIGMA-DINO) -----

def projector(pixels, dim, widths=(1024, 1024, 512)):
    """The projection network of SIGMA-MLP: P standardised pixel values of a tube -> E numbers."""
    layers = []
    for width in widths:
        layers += [nn.Linear(pixels, width), nn.GELU()]
        pixels = width
    return nn.Sequential(*layers, nn.Linear(pixels, dim))


# target: (width of its features, weights, how their SHA-256 begins; not known for ViT-S)
_URL = "https://dl.fbaipublicfiles.com/dino/"
DINO = {"dino": (768, _URL + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "bf34ad0f42"),
        "dino-s": (384, _URL + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", "")}
TARGETS = ("mlp", "pixel", *DINO)


class Teacher(nn.Module):
    """The projection network of SIGMA-DINO: a frozen ViT on the first frame of each tubelet.

    weights: DINO's state dict; width, depth and patch size are read off it, heads are 64 wide as in
    all of DINO's. tube: the video model's; frames are resized so that each tube is one patch. Not a
    part of SIGMA, so it is in no checkpoint. Raises UserError if the weights don't fit.
    """

    def __init__(self, weights, tube=(2, 16, 16)):
        super().__init__()
        weights = {n: w for n, w in weights.items() if not n.startswith("head.")}  # of its training
        position, token = weights.pop("pos_embed"), weights.pop("cls_token")
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, None]
        dim, _, *patch = weights["patch_embed.proj.weight"].shape  # E 3 1 patch patch
        for name in [name for name in weights if name.endswith("qkv.bias")]:
            query, _, value = weights.pop(name).chunk(3)  # a bias of keys cancels in the softmax
            weights |= {name.replace("qkv.", "q_"): query, name.replace("qkv.", "v_"): value}
        vit = Encoder(dim=dim, depth=depth_of(weights, "blocks"), heads=dim // 64, tube=patch)
        self.vit = fill(vit, weights, "the teacher's file").requires_grad_(False)
        self.tube, self.dim = tuple(tube), dim
        self.register_buffer("token", token + position[:, :1])  # 1 1 E
        self.register_buffer("position", rearrange(  # 1 E side side
            position[:, 1:], "1 (h w) e -> 1 e h w", h=math.isqrt(position.shape[1])))

    @torch.no_grad()
    def forward(self, video):
        """video (B, 3, T, H, W), normalised -> its patch tokens (B, N, E), in (t h w) order."""
        frames, patch = video[:, :, ::self.tube[0]].float(), self.vit.tube[1:]  # B 3 t H W
        h, w = (size // step for size, step in zip(video.shape[3:], self.tube[1:]))
        if self.tube[1:] != patch:  # t stays: bilinear in space
            size = (frames.shape[2], h * patch[0], w * patch[1])
            frames = F.interpolate(frames, size, mode="trilinear")
        position, side = self.position, self.position.shape[-1]
        if (h, w) != (side, side):  # as DINO does it, 0.1 included
            scale = ((h + 0.1) / side, (w + 0.1) / side)
            position = F.interpolate(position, scale_factor=scale, mode="bicubic")
        with torch.autocast(video.device.type, enabled=False):  # lower precision is untested
            x = self.vit.patch_embed(take_tubes(frames, self.vit.tube))  # B N E
            x = rearrange(x, "b (t n) e -> (b t) n e", n=h * w) + position.flatten(2).mT
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            x = self.vit.norm(self.vit.blocks(x))[:, 1:]  # no class token
        return rearrange(x, "(b t) n e -> b (t n) e", b=len(video))


# --- Prototypes: balanced assignments by Sinkhorn, and the loss -----------------------------------

@torch.no_grad()  # an assignment is a target: no gradient flows through it
def sinkhorn(scores, eps=0.05, iters=10, group=None):
    """Soft assignment of N tubes to K prototypes that uses all prototypes equally (paper, method
    section; Sinkhorn-Knopp as in SwAV).

    scores: (N, K) cosines in [-1, 1], or a list of such matrices, each balanced by itself, with one
    all-reduce per iteration for all.
    eps: entropic regularisation, 0.005 and more. group: of torch.distributed; under it N is this
    rank's part, and the balance holds over all ranks' tubes. Returns the same shape(s), float32 or
    better: rows sum to 1, columns to about N / K over the whole batch.

    The assignment is diag(u) A diag(v) with A = exp(scores / eps). Only the vectors u and v change:
    an iteration is two products of A with a vector, and nothing N x K is rewritten.
    """
    branches = [scores] if isinstance(scores, torch.Tensor) else scores
    branches = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in branches]
    parallel = dist.is_available() and dist.is_initialized()
    with torch.autocast(branches[0].device.type, enabled=False):
        # exp(2 / 0.005) overflows. A column's factor belongs to v, which the first iteration sets;
        # a row's to u. So column and row maxima can go, exactly, and each row of A keeps a 1.
        peaks = torch.stack([s.amax(dim=0) for s in branches])  # branches K
        if parallel:
            dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
        kernels = [s - peak for s, peak in zip(branches, peaks)]  # N K each
        rows = [kernel.amax(dim=1, keepdim=True) for kernel in kernels]  # N 1 each
        us = [row.div(eps).exp_().squeeze(1) for row in rows]  # N each
        kernels = [kernel.sub_(row).div_(eps).exp_() for kernel, row in zip(kernels, rows)]
        for _ in range(iters):
            totals = torch.stack([u @ kernel for u, kernel in zip(us, kernels)])  # branches K
            if parallel:
                dist.all_reduce(totals, group=group)
            # All prototypes get the same total over all ranks. The next u undoes any factor of v,
            # so v need not make it 1 / K, but is scaled to a largest value of 1.
            vs = totals.amin(dim=1, keepdim=True) / totals
            us = [(kernel @ v).reciprocal_() for kernel, v in zip(kernels, vs)]  # rows sum to 1
        soft = [kernel.mul_(v).mul_(u[:, None]) for kernel, u, v in zip(kernels, us, vs)]
    return soft[0] if isinstance(scores, torch.Tensor) else soft


def symmetric_loss(video_scores, target_scores, video_assignment, target_assignment,
                   temperature=0.1):
    """Each branch predicts the other's prototype (paper, method section): two cross-entropies.

    Scores (N, K) are cosines, assignments (N,) the number of each tube's prototype. Returns the
    loss and its terms, detached means over tubes, each about ln K at the start of training.
    """
    target_term = F.cross_entropy(target_scores / temperature, video_assignment)
    video_term = F.cross_entropy(video_scores / temperature, target_assignment)
    terms = {"target_term": target_term.detach(), "video_term": video_term.detach()}
    return target_term + video_term, terms


def usage(assignment, k):
    """How many of k prototypes an assignment (N,) uses, and the entropy of their use (<= ln k)."""
    one = torch.full_like(assignment, 1 / len(assignment), dtype=torch.float32)
    share = one.new_zeros(k).index_add_(0, assignment, one)
    return (share > 0).sum(), torch.special.entr(share).sum()


# --- SIGMA ----------------------------------------------------------------------------------------

class SIGMA(nn.Module):
    """The two networks, the prototypes between them, and the loss.

    target, what the projection network sees: "mlp" (pixels of the hidden tubes, through a trained
    MLP), "dino" or "dino-s" (a Teacher's features, target_dim wide; nothing to train), or "pixel"
    (VideoMAE, the baseline: regress the pixels, no prototypes). eps, iters: Sinkhorn's.
    temperature: the cross-entropies'. Weights start as in the published code.
    """

    def __init__(self, *, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads,
                 tube=(2, 16, 16), target="mlp", target_dim=256, prototypes=3000, eps=0.05,
                 iters=10, temperature=0.1, projector_widths=(1024, 1024, 512)):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"the target must be one of {', '.join(TARGETS)}, not {target!r}")
        self.target, self.eps, self.iters, self.temperature = target, eps, iters, temperature
        pixels = 3 * math.prod(tube)  # P, 1536 for 2 x 16 x 16
        out = pixels if target == "pixel" else target_dim
        self.encoder = Encoder(dim=dim, depth=depth, heads=heads, tube=tube)
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder = Decoder(dim=decoder_dim, depth=decoder_depth, heads=decoder_heads, out=out)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if target == "mlp":
            self.projector = projector(pixels, target_dim, projector_widths)
        if target != "pixel":
            self.prototypes = nn.Parameter(torch.randn(prototypes, target_dim))

    def forward(self, video, mask, features=None):
        """One pretraining step's loss.

        video (B, 3, T, H, W), normalised; mask (B, N) bool, True where hidden, on the CPU;
        features (B, N, E), for DINO's targets alone: the Teacher's, of all tubes.
        Returns the loss and a dictionary of detached statistics; means over ranks are those of the
        whole batch, but prototypes_used and the entropies count this rank's tubes.
        """
        shape = len(video), math.prod(video.shape[2:]) // math.prod(self.encoder.tube)
        if mask.shape != shape:
            raise ValueError(f"these clips need a mask of shape {shape}, not {tuple(mask.shape)}")
        visible, hidden = split_mask(mask, video.device)  # 1. hide most of the tubes: B V, B M
        predicted = self.predict(video, visible, hidden)  # 2. the video model's guess: B M E
        target = self.embed(video, hidden, features)  # 3. the projection network: B M E
        if self.target == "pixel":
            loss = F.mse_loss(at_least_fp32(predicted), target)
            return loss, {"pixel_term": loss.detach()}
        scores = self.compare(predicted, target)  # 4. cosines to the prototypes: two of (B*M K)
        video_assignment, target_assignment = (  # 5. balanced assignments: two of (B*M)
            soft.argmax(dim=1) for soft in sinkhorn(scores, self.eps, self.iters))
        loss, stats = symmetric_loss(  # 6. each branch predicts the other's
            *scores, video_assignment, target_assignment, self.temperature)
        used, entropy = usage(video_assignment, len(self.prototypes))
        _, target_entropy = usage(target_assignment, len(self.prototypes))
        return loss, stats | dict(
            video_assignment=video_assignment, target_assignment=target_assignment, entropy=entropy,
            target_entropy=target_entropy, prototypes_used=used,
            log_k=torch.full_like(entropy, math.log(len(self.prototypes))))

    def predict(self, video, visible, hidden):
        """The video model: features of the hidden tubes from the visible ones, (B, M, E)."""
        tokens = self.encoder_to_decoder(self.encoder(video, visible))  # B V D'
        n = visible.shape[1] + hidden.shape[1]
        position = positions(n, self.decoder.dim, video.device)  # N D'
        tokens = torch.cat([tokens + position[visible], self.mask_token + position[hidden]], dim=1)
        return self.decoder(tokens, hidden.shape[1])  # B N D' -> B M E

    def embed(self, video, hidden, features=None):
        """The projection network: the true content of the hidden tubes as features, (B, M, E)."""
        if self.target in DINO:
            n = math.prod(video.shape[2:]) // math.prod(self.encoder.tube)
            shape = (len(video), n, self.prototypes.shape[1])
            if features is None or features.shape != shape:
                raise ValueError(f"target {self.target} needs a Teacher's features, shape {shape}")
            features = standardise(at_least_fp32(features.detach()), dim=1)  # over a clip's tubes
            return features.take_along_dim(hidden[..., None], dim=1)  # B M E
        tubes = at_least_fp32(take_tubes(video, self.encoder.tube, hidden))  # B M 3 p q r
        pixels = torch.stack([channel * std + mean for channel, mean, std in zip(  # RGB in [0, 1]
            tubes.flatten(3).unbind(2), IMAGENET_MEAN, IMAGENET_STD)], dim=3)  # B M pqr 3
        pixels = standardise(pixels, dim=2).flatten(2)  # per tube and channel: B M P
        return pixels if self.target == "pixel" else self.projector(pixels)

    def compare(self, predicted, target):
        """Cosines of both branches' features (B, M, E) to the prototypes: [(B*M, K), (B*M, K)].

        The prototypes learn from the projection network's side alone: the video model's scores see
        them detached, else both sides would drift together.
        """
        if self.training:  # made unit length in place, outside the graph, as published
            self.prototypes.data.copy_(F.normalize(self.prototypes.data, dim=1))
        prototypes = self.prototypes if self.training else F.normalize(self.prototypes, dim=1)
        with torch.autocast(predicted.device.type, enabled=False):  # bf16 changes 1% of assignments
            predicted, target = (F.normalize(at_least_fp32(x).flatten(0, 1), dim=1)
                                 for x in (predicted, target))
            return [predicted @ prototypes.detach().T, target @ prototypes.T]


SIZES = {
    "tiny": dict(dim=128, depth=4, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=2,
                 tube=(4, 8, 8), prototypes=128, target_dim=64, projector_widths=(256,)),  # toy's
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "large": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=4, decoder_heads=8),
    "huge": dict(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_depth=4, decoder_heads=8),
}


def sizes_for(size="base", target="mlp", **changes):
    """Keyword arguments of SIGMA for a size in SIZES; prototypes are as wide as DINO's features."""
    width = {"target_dim": DINO[target][0]} if target in DINO else {}
    return {"tube": (2, 16, 16), "target": target, **SIZES[size], **width, **changes}


def build_model(size="base", **changes):
    """SIGMA of a size in SIZES; keyword arguments of SIGMA replace the table's values."""
    return SIGMA(**sizes_for(size, **changes))


# --- Checkpoints: ours, and the published pretraining ones ----------------------------------------

def read_checkpoint(path, must_have="encoder.patch_embed.proj.weight"):
    """A checkpoint (a file, or a run's folder) as a dictionary; "model" has the weights by name.

    Accepts the names of this code, the authors' and VideoMAE's; extras/weights.py converts others.
    must_have: the name of a weight. Runs no code from the file. Raises UserError.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    others = ", ".join(str(p) for p in sorted(path.parent.glob("*.pt")) if p != path)
    beside = f"; beside it there is {others}" if others else ""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}{beside}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # older files keep flags in it
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content if "model" in content else {"model": content.get("module", content)}
        weights = {re.sub(r"^head\.(?=\d)", "projector.", name.removeprefix("module.")): weight
                   for name, weight in content["model"].items()}
    except Exception as error:  # whatever a damaged or foreign file brings about
        # GLOBAL: code that it asks for; else the first line
        reason = (re.search(r"GLOBAL \S+", str(error)) or re.match(r".{,200}", str(error)))[0]
        raise UserError(f"{path} can't be read as a checkpoint ({reason}){beside}") from error
    if not isinstance(weights.get(must_have), torch.Tensor):
        raise UserError(f"{path} lacks {must_have}; extras/weights.py converts fine-tuned and "
                        "Hugging Face checkpoints")
    return content | {"model": weights}


def sizes_of(weights):
    """Keyword arguments of SIGMA that fit published weights, or of Encoder if there is no more.

    Shapes tell all but the number of heads: that of the entry in SIZES with this width, or None.
    """
    dim, _, *tube = weights["encoder.patch_embed.proj.weight"].shape
    row = next((row for row in SIZES.values() if row["dim"] == dim), {})
    sizes = dict(dim=dim, depth=depth_of(weights, "encoder.blocks"), heads=row.get("heads"),
                 tube=tuple(tube))
    if "mask_token" not in weights:
        return sizes
    sizes |= dict(decoder_dim=weights["mask_token"].shape[2], target="pixel",
                  decoder_depth=depth_of(weights, "decoder.blocks"),
                  decoder_heads=row.get("decoder_heads"))
    if "prototypes" in weights:
        number, width = weights["prototypes"].shape
        widths = [len(w) for name, w in weights.items() if re.match(r"projector\.\d+\.bias", name)]
        dino = "dino-s" if width == DINO["dino-s"][0] else "dino"
        sizes |= dict(target="mlp" if widths else dino, target_dim=width, prototypes=number,
                      projector_widths=widths[:-1])
    return sizes


def load_model(path, **changes):
    """The SIGMA of a pretraining checkpoint, ours, the authors' or VideoMAE's; of a fine-tuned one
    a module with its `encoder` alone. model.encoder(video) gives tokens for clips of any size that
    the tube divides.

    All weights are loaded, or UserError says what differs. changes: sizes that the file can't tell,
    heads and decoder_heads of networks whose width is not in SIZES.
    """
    content = read_checkpoint(path)
    weights = content["model"]
    sizes = (content.get("sizes") or sizes_of(weights)) | changes
    for heads, dim in (("heads", "dim"), ("decoder_heads", "decoder_dim")):
        if dim in sizes and (not sizes[heads] or sizes[dim] % sizes[heads]):
            raise UserError(f"{path} does not tell how many {heads} it has: give {heads}=")
    if "decoder_dim" in sizes:
        return fill(SIGMA(**sizes), weights, path)
    encoder = Encoder(**{name: sizes[name] for name in ("dim", "depth", "heads", "tube")})
    if "encoder.norm.weight" not in weights:  # fine-tuned: another norm, behind the mean
        encoder.norm = nn.Identity()
    weights = {name: w for name, w in weights.items() if name.startswith("encoder.")}
    return fill(nn.ModuleDict({"encoder": encoder}), weights, path)


@torch.no_grad()
def walk():
    """One clip through the method, step by step: what `python sigma.py` prints."""
    torch.manual_seed(0)
    model, mask = build_model("small").eval(), tube_mask(1, (8, 14, 14))
    clip = F.interpolate(torch.randn(1, 3, 16, 14, 14), (16, 224, 224), mode="trilinear")  # smooth
    visible, hidden = split_mask(mask)
    predicted, target = model.predict(clip, visible, hidden), model.embed(clip, hidden)
    scores = model.compare(predicted, target)
    soft = sinkhorn(scores)
    loss, _ = symmetric_loss(*scores, *(s.argmax(dim=1) for s in soft))
    for step, x in (("  a clip, normalised RGB", clip),
                    ("1 90% of its 8 x 14 x 14 tubes are hidden, the same in each slice", hidden),
                    ("2 the video model predicts features for them from the others", predicted),
                    ("3 the projection network: features of their pixels", target),
                    ("4 cosines of both to the prototypes", scores[0]),
                    ("5 Sinkhorn: both assigned to prototypes, in equal shares", soft[0]),
                    (f"6 each predicts the other's: the loss is {loss:.2f}", loss)):
        print(f"{step:70}{tuple(x.shape)}")


if __name__ == "__main__":
    walk()
