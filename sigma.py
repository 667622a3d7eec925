"""SIGMA: Sinkhorn-Guided Masked Video Modeling, the whole method in one file.

Paper: Salehi, Dorkenwald, Thoker, Gavves, Snoek, Asano, ECCV 2024, arXiv 2407.15447.

Masked video models such as VideoMAE predict the pixels of what is hidden, and learn texture. SIGMA
predicts features, of a second network that is trained jointly (or of DINO, which is frozen). Two
networks that learn from each other could agree on a constant. So:

    1. A clip is cut into space-time tubes, and 90% of them are hidden            tube_mask
    2. The video model predicts a feature of each hidden tube from the rest       SIGMA.predict
    3. The projection network computes one from the hidden tube's true content    SIGMA.embed
    4. Both features are compared with K learned prototypes                       compare
    5. Sinkhorn assigns the tubes to prototypes such that all are used equally;
       to predict that, features must tell tubes apart, and a constant can't      sinkhorn
    6. Each network predicts the assignment that the other one got                symmetric_loss

    model = build_model("base")                            # or SIGMA(dim=..., ...) for any size
    video = torch.randn(2, 3, 16, 224, 224)                # normalised with ImageNet's mean and std
    loss, stats = model(video, tube_mask(2, (8, 14, 14)))  # pretrain
    features = model.encoder(video)                        # use: (2, 1568, 768), a token per tube

`SIGMA.forward` is these six steps; `python sigma.py` walks one clip through them, and test_sigma.py
writes the loss out by hand. `tube_mask`, `compare`, `sinkhorn` and `symmetric_loss` can be copied.

Shapes   B clips of 3 x T x H x W pixels   N tubes of a clip = V visible + M hidden
         D width of the encoder's tokens, D' of the decoder's   E width of features and prototypes
         K prototypes   P pixel values of a tube   (t, h, w) a clip in tubes: t slices of h x w
"""
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


# --- Step 1: tubes of 2 frames x 16 x 16 pixels, their positions, which of them are hidden --------

def take_tubes(video, tube, index=None):
    """Video (B, 3, T, H, W) -> its tubes of size tube = (p, q, r), those at index (B, n) or all N:
    (B, n, 3, p, q, r)."""
    if any(size % step for size, step in zip(video.shape[2:], tube)):
        raise ValueError(f"clips of {tuple(video.shape[2:])} frames, rows and columns can't be cut "
                         f"into tubes of {tuple(tube)}")
    p, q, r = tube
    tubes = rearrange(video, "b c (t p) (h q) (w r) -> b t h w c p q r", p=p, q=q, r=r)  # a view
    if index is None:
        return tubes.flatten(1, 3)
    (h, w), clip = tubes.shape[2:4], torch.arange(len(video), device=video.device)[:, None]
    return tubes[clip, index // (h * w), index // w % h, index % w]  # copies only the chosen tubes


def positions(n, dim, device=None):
    """Fixed sinusoids over the flattened (t h w) index of a tube: (n, dim) float32, never trained.

    angle(p, j) = p / 10000^(2 floor(j/2) / dim); even columns j are sines, odd ones cosines.
    """
    frequency = 10000 ** (-2 * torch.arange((dim + 1) // 2, device=device).double() / dim)
    angle = torch.arange(n, device=device)[:, None] * frequency  # n dim/2
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim].float()  # n dim


def tube_mask(batch, grid, ratio=0.9, generator=None):
    """Random tube masks (paper, method section; VideoMAE): (batch, t*h*w) bool, True where hidden.

    Each clip hides int(ratio * h*w) positions of its own, the same in all t slices, so that a
    hidden tube can't be copied from the slice before. All hide the same number, so the visible
    tubes form one dense batch. grid: the clip's size (t, h, w) in tubes. generator: on the CPU.
    """
    t, h, w = grid
    number = int(ratio * h * w)
    if not 0 < number < h * w:
        raise ValueError(f"ratio {ratio} hides {number} of {h * w} tubes in a slice: all or none")
    chosen = torch.rand(batch, h * w, generator=generator).argsort(dim=1)[:, :number]
    mask = torch.zeros(batch, h * w, dtype=torch.bool).scatter_(1, chosen, True)  # one slice
    return mask.repeat(1, t)  # B N


def split_mask(mask, device=None):
    """Mask (B, N), True where hidden -> ascending indices of visible (B, V), hidden tubes (B, M).

    Pass a CPU mask: V and M are needed as ints, and reading them from a GPU would force a sync.
    """
    numbers = mask.sum(dim=1).tolist()
    if len(set(numbers)) != 1:
        raise ValueError(f"all clips of a batch must hide the same number of tubes, not {numbers}")
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)  # visible first
    return order.split([mask.shape[1] - numbers[0], numbers[0]], dim=1)


# --- Step 2: the video model: a ViT sees the visible tubes, a light decoder predicts the rest -----

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
    """Light transformer on tokens (B, N, D') whose last `number` are asked for: (B, number, E)."""

    def __init__(self, *, dim, depth, heads, out):
        super().__init__()
        self.dim = dim
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out)
        self.apply(init_linear)

    def forward(self, x, number):
        return self.head(self.norm(self.blocks(x)[:, -number:]))


# --- Step 3: the projection network: an MLP on pixels (SIGMA-MLP) or a frozen ViT (SIGMA-DINO) ----

def standardise(x, dim):
    """Zero mean and unit (unbiased) variance along dim; 1e-6 keeps constant tubes finite."""
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)


def at_least_fp32(x):
    """x in float32 if it has fewer bits; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def projector(pixels, dim, widths=(1024, 1024, 512)):
    """The projection network of SIGMA-MLP: P standardised pixel values of a tube -> E numbers."""
    layers = []
    for width in widths:
        layers += [nn.Linear(pixels, width), nn.GELU()]
        pixels = width
    return nn.Sequential(*layers, nn.Linear(pixels, dim))


class Teacher(nn.Module):
    """The projection network of SIGMA-DINO: a frozen ViT on the first frame of each slice.

    weights: a state dict in DINO's names, perhaps with DINOv2's register_tokens (dino_weights in
    extras/evaluate.py turns other ViTs into it); width, depth and patch size are inferred from it;
    heads are 64 wide, in ViT-H (1280) 80. tube: the video model's; frames are resized so that each
    tube is one patch. Not a part of SIGMA, so it is in no checkpoint. Raises UserError if the
    weights don't fit.
    """

    def __init__(self, weights, tube=(2, 16, 16)):
        super().__init__()
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= weights.keys():
            raise UserError("the teacher's weights are no ViT's in the names of DINO (cls_token, "
                            "pos_embed, patch_embed.proj.weight): Hugging Face's differ")
        weights = {name: w.float() for name, w in weights.items() if not name.startswith("head")}
        token, position = weights.pop("cls_token"), weights.pop("pos_embed")
        registers = weights.pop("register_tokens", token[:, :0])  # they have no position
        self.antialias = registers.shape[1] > 0
        first, position = position[:, :token.shape[1]], position[:, token.shape[1]:]
        side = math.isqrt(position.shape[1])
        if side ** 2 != position.shape[1] or weights["patch_embed.proj.weight"].ndim != 4:
            raise UserError("the teacher's patches or positions are not those of square images")
        for name in [name for name in weights if name.endswith("qkv.bias")]:
            query, _, value = weights.pop(name).chunk(3)  # a bias of keys cancels in the softmax
            weights |= {name.replace("qkv.bias", "q_bias"): query,
                        name.replace("qkv.bias", "v_bias"): value}
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, None]
        self.tube, (self.dim, _, *patch) = tuple(tube), weights["patch_embed.proj.weight"].shape
        if self.dim % 64:
            raise UserError(f"the teacher is {self.dim} wide, which heads of 64 do not divide")
        vit = Encoder(dim=self.dim, depth=depth_of(weights, "blocks"),
                      heads=16 if self.dim == 1280 else self.dim // 64, tube=patch)
        self.vit = fill(vit, weights, "the teacher's file").requires_grad_(False)
        self.register_buffer("tokens", torch.cat([token + first, registers], dim=1))  # 1 R E
        self.register_buffer("position", rearrange(position, "1 (h w) e -> 1 e h w", h=side))

    @torch.no_grad()  # frozen
    def forward(self, video):
        """video (B, 3, T, H, W), normalised -> its patch tokens (B, N, E), in (t h w) order."""
        frames, patch = video[:, :, ::self.tube[0]].float(), self.vit.tube[1:]  # B 3 t H W
        h, w = (size // step for size, step in zip(video.shape[3:], self.tube[1:]))
        if self.tube[1:] != patch:  # t stays: bilinear in space
            size = (frames.shape[2], h * patch[0], w * patch[1])
            frames = F.interpolate(frames, size, mode="trilinear")
        with torch.autocast(video.device.type, enabled=False):  # no lower precision: untested
            x = self.vit.patch_embed(take_tubes(frames, self.vit.tube))  # B N E
            x = rearrange(x, "b (t n) e -> (b t) n e", n=h * w)
            x = x + self.positions_for(h, w).flatten(2).mT
            x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)
            x = self.vit.norm(self.vit.blocks(x))[:, self.tokens.shape[1]:]  # patches alone
        return rearrange(x, "(b t) n e -> b (t n) e", b=len(video))

    def positions_for(self, h, w):
        """Positions of h x w patches (1, E, h, w), interpolated as DINO and DINOv2 do it (0.1
        included), or DINOv2 with registers (antialiased)."""
        position, side = self.position, self.position.shape[-1]
        if (h, w) == (side, side):
            return position
        if self.antialias:
            return F.interpolate(position, (h, w), mode="bicubic", antialias=True)
        scale = (h + 0.1) / side, (w + 0.1) / side
        return F.interpolate(position, scale_factor=scale, mode="bicubic")


# --- Step 4: features are compared with the prototypes --------------------------------------------

def compare(predicted, embedded, prototypes):
    """Cosines of both networks' features (B, M, E) to the prototypes (K, E), of unit length: two of
    (B*M, K) (paper, method section).

    The projection network's scores alone teach the prototypes: the video model's see them detached,
    as published. Float32 also under autocast: bf16 would change 1% of the assignments.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        video, projection = (
            F.normalize(x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32)), dim=1)
            for x in (predicted, embedded))  # B*M E
        return video @ prototypes.detach().T, projection @ prototypes.T


# --- Step 5: balanced assignments -----------------------------------------------------------------

@torch.no_grad()  # an assignment is a target: no gradient flows through it
def sinkhorn(scores, eps=0.05, iters=10, group=None, hard=False):
    """Assignment of N tubes to K prototypes that uses all prototypes equally (paper, method
    section; Sinkhorn-Knopp as in SwAV).

    scores: (N, K), cosines; any finite numbers up to 1e35 give a finite result. eps: 0.005 or more;
    smaller is closer to a hard assignment. iters: 1 or more. group: of torch.distributed; under it
    N is this rank's part, and the balance holds over all ranks' tubes. Returns (N, K), float32 or
    better: rows sum to 1, and all columns, summed over the ranks, to about the same. hard: each
    row's largest entry instead, (N,) indices, which saves one scaling of the N x K matrix.

    In exact arithmetic, it is

        A = (scores / eps).exp()
        for _ in range(iters):
            A = A / A.sum(dim=0)                # prototypes get the same total
            A = A / A.sum(dim=1, keepdim=True)  # each tube gives 1 away

    So the result is diag(u) A diag(v) of the first A. Here only the vectors u and v change: an
    iteration is two products of A with a vector, and nothing N x K is rewritten.
    """
    def over_ranks(x, op=dist.ReduceOp.SUM):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(x, op, group=group)
        return x

    with torch.autocast(scores.device.type, enabled=False):
        # exp(2 / 0.005) overflows. Subtracting each column's, then each row's maximum changes
        # nothing: v undoes the one, u the other. And each row of A keeps a 1.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        A = scores - over_ranks(scores.amax(dim=0), dist.ReduceOp.MAX)  # N K
        top = A.amax(dim=1, keepdim=True)  # N 1
        u, A = (top / eps).exp().squeeze(1), A.sub_(top).div_(eps).exp_()  # N; N K
        for _ in range(iters):
            # All prototypes get the same total over all ranks, which need not be 1 / K: the next u
            # undoes any factor of v. v's largest entry is 2^60, and none underflows to 0 for good.
            totals = over_ranks(A.T @ u)  # K; u @ A would be rounded to TF32 on GPUs
            v = (2.0 ** 60 * totals.amin() / totals).clamp_(min=2.0 ** -100)  # K
            u = (A @ v).reciprocal_()  # N: each tube's row sums to 1
        return A.mul_(v).argmax(dim=1) if hard else A.mul_(v).mul_(u[:, None])


# --- Step 6: the symmetric loss -------------------------------------------------------------------

def symmetric_loss(video_scores, projection_scores, video_assignment, projection_assignment,
                   temperature=0.1):
    """Each branch predicts the other's prototype (paper, method section): two cross-entropies.

    Scores (N, K) are cosines, assignments the index of each tube's prototype (N,), or its shares of
    all (N, K). Returns the loss and its two terms, detached, means over tubes, at first about ln K.
    """
    projection_term = F.cross_entropy(projection_scores / temperature, video_assignment)
    video_term = F.cross_entropy(video_scores / temperature, projection_assignment)
    terms = {"projection_term": projection_term.detach(), "video_term": video_term.detach()}
    return projection_term + video_term, terms


# --- What to watch, and all six together ----------------------------------------------------------

def usage(assignment, k):
    """Number of the k prototypes in use, and the entropy of their use in nats (at most ln k), of an
    assignment: indices (N,), or shares (N, k), whose largest counts."""
    assignment = assignment.argmax(dim=1) if assignment.ndim == 2 else assignment
    one = torch.full_like(assignment, 1 / len(assignment), dtype=torch.float32)
    share = one.new_zeros(k).index_add_(0, assignment, one)
    return (share > 0).sum(), torch.special.entr(share).sum()


def spreads(predicted, embedded):
    """Standard deviation of both networks' features (B, M, E) over all tubes: 0 if collapsed."""
    both = {"video_std": predicted, "projection_std": embedded}
    return {name: x.detach().float().flatten(0, 1).std(dim=0).mean() for name, x in both.items()}


DINO_WIDTHS = {"dino": 768, "dino-s": 384}  # of the features of DINO's own two ViTs
BASELINES = ("pixel", "l2")  # without prototypes and Sinkhorn
TARGETS = ("mlp", *DINO_WIDTHS, *BASELINES)


class SIGMA(nn.Module):
    """The two networks, the prototypes between them, and the loss.

    target, what the video model learns to predict: "mlp" (an MLP's features of the hidden tubes'
    pixels; it is trained jointly), "dino" or "dino-s" (a Teacher's features, target_dim wide;
    nothing to train), and two baselines without prototypes: "pixel" (VideoMAE: regress the pixels)
    and "l2" (regress the MLP's features: constants are a solution). eps, iters: Sinkhorn's.
    temperature: the cross-entropies'. Weights start as in the published code. For another idea
    override `embed` or `assign`, see extras/ideas.md.
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
        if target in ("mlp", "l2"):
            self.projector = projector(pixels, target_dim, projector_widths)
        if target not in BASELINES:
            self.prototypes = nn.Parameter(torch.randn(prototypes, target_dim))

    def forward(self, video, mask, features=None):
        """One pretraining step's loss.

        video (B, 3, T, H, W), normalised; mask (B, N) bool, True where hidden, on the CPU;
        features (B, N, E), for DINO's targets alone: the Teacher's, of all tubes.
        Returns the loss and a dictionary of detached statistics: the loss's terms, scalars that
        describe this rank's tubes, and both assignments (B*M,).
        """
        shape = len(video), math.prod(video.shape[2:]) // math.prod(self.encoder.tube)
        if mask.shape != shape:
            raise ValueError(f"these clips need a mask of shape {shape}, not {tuple(mask.shape)}")
        visible, hidden = split_mask(mask, video.device)  # 1. hide most of the tubes: B V, B M
        predicted = self.predict(video, visible, hidden)  # 2. the video model's guess: B M E
        embedded = self.embed(video, hidden, features)  # 3. the projection network: B M E
        if self.target in BASELINES:  # the baselines end here; l2 trains both networks
            loss = F.mse_loss(at_least_fp32(predicted), embedded)
            return loss, {f"{self.target}_term": loss.detach(), **spreads(predicted, embedded)}
        scores = compare(predicted, embedded, self.unit_prototypes())  # 4. cosines: two of (B*M K)
        video_assignment, projection_assignment = map(self.assign, scores)  # 5. balanced: (B*M)
        loss, terms = symmetric_loss(  # 6. each branch predicts the other's
            *scores, video_assignment, projection_assignment, self.temperature)
        used, entropy = usage(video_assignment, len(self.prototypes))
        _, projection_entropy = usage(projection_assignment, len(self.prototypes))
        return loss, terms | spreads(predicted, embedded) | dict(
            video_entropy=entropy, projection_entropy=projection_entropy, prototypes_used=used,
            video_assignment=video_assignment, projection_assignment=projection_assignment)

    def unit_prototypes(self):
        """The prototypes (K, E), of unit length: in training rescaled in place, as published."""
        if not self.training:
            return F.normalize(self.prototypes, dim=1)
        self.prototypes.data.copy_(F.normalize(self.prototypes.data, dim=1))
        return self.prototypes

    def assign(self, scores):
        """Scores (B*M, K) -> each tube's prototype (B*M,), or its shares of all (B*M, K)."""
        return sinkhorn(scores.detach(), self.eps, self.iters, hard=True)

    def predict(self, video, visible, hidden):
        """The video model: features of hidden tubes, all or some, from the visible: (B, M, E)."""
        tokens = self.encoder_to_decoder(self.encoder(video, visible))  # B V D'
        n = math.prod(video.shape[2:]) // math.prod(self.encoder.tube)
        position = positions(n, self.decoder.dim, video.device)  # N D'
        tokens = torch.cat([tokens + position[visible], self.mask_token + position[hidden]], dim=1)
        return self.decoder(tokens, hidden.shape[1])  # B N D' -> B M E

    def embed(self, video, hidden, features=None):
        """The projection network: the true content of the hidden tubes as features, (B, M, E)."""
        if self.target in DINO_WIDTHS:
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
    width = {"target_dim": DINO_WIDTHS[target]} if target in DINO_WIDTHS else {}
    return {"tube": (2, 16, 16), "prototypes": 3000, "target": target, **SIZES[size], **width,
            **changes}


def build_model(size="base", **changes):
    """SIGMA of a size in SIZES; keyword arguments of SIGMA replace the table's values."""
    return SIGMA(**sizes_for(size, **changes))


# --- Checkpoints of this code; extras/weights.py turns everybody else's into ours -----------------

class UserError(Exception):
    """An error the user can fix: printed without a traceback; code is the exit code."""
    code = 2


def depth_of(weights, prefix):
    """Number of transformer blocks under `prefix` in a state dict."""
    return len({n[len(prefix) + 1:].split(".")[0] for n in weights if n.startswith(prefix + ".")})


def fill(module, weights, source):
    """Loads a state dict into a module, all of it, and returns the module. Raises UserError with
    the names of weights that are missing, left over, or of another shape."""
    here, there = ({name: tuple(w.shape) for name, w in x.items()}
                   for x in (module.state_dict(), weights))
    differ = [f"{name} is {there.get(name, 'missing')}, not {here.get(name, 'part of it')}"
              for name in here | there if here.get(name) != there.get(name)]
    if differ:
        raise UserError(f"the weights in {source} don't fit: {'; '.join(differ)[:2000]}")
    module.load_state_dict(weights)
    return module


def read_file(path):
    """The dictionary in a file of torch.save. Runs no code from it. Raises UserError."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except Exception as error:  # whatever a damaged or foreign file brings about
        # GLOBAL: code that it asks for; else what torch says first, without its advice
        reason = (re.search(r"GLOBAL \S+", str(error)) or re.match(r"[^.\n]*", str(error)))[0]
        raise UserError(f"{path} holds no plain weights ({reason})") from error


def read_checkpoint(path):
    """A checkpoint of this code, a file or a run's folder, as a dictionary: "model" has the weights
    by name, "sizes" the network's keyword arguments, "args" the run's flags. Raises UserError."""
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    try:
        content = read_file(path)
        if not {"model", "sizes"} <= content.keys():
            raise UserError(f"{path} was not written by this code")
    except UserError as error:
        others = ", ".join(str(p) for p in sorted(path.parent.glob("*.pt")) if p != path)
        beside = f"; beside it there is {others}" if others else ""
        how = ". Other people's become ours by `python extras/weights.py import`" * path.exists()
        raise UserError(f"{error}{beside}{how}") from error
    return content


def load_model(path):
    """The SIGMA of a pretraining checkpoint; model.encoder(video) gives tokens for clips of any
    size that the tube divides. All weights are loaded, or UserError says what differs."""
    content = read_checkpoint(path)
    if "decoder_dim" not in content["sizes"]:
        raise UserError(f"{path} holds an encoder without its pretraining: sigma.load_encoder "
                        "reads it")
    return fill(SIGMA(**content["sizes"]), content["model"], path)


def load_encoder(path):
    """The Encoder of any checkpoint of this code. Some have no last norm, as fine-tuned ones, whose
    classifier has another after the mean. Raises UserError if weights don't fit."""
    content = read_checkpoint(path)
    sizes = {name: content["sizes"][name] for name in ("dim", "depth", "heads", "tube")}
    encoder = Encoder(**sizes)
    if "encoder.norm.weight" not in content["model"]:
        encoder.norm = nn.Identity()
    weights = {name.removeprefix("encoder."): w for name, w in content["model"].items()
               if name.startswith("encoder.")}
    return fill(encoder, weights, path)


# --- python sigma.py ------------------------------------------------------------------------------

@torch.no_grad()
def walk():
    """One clip through the method, step by step: what `python sigma.py` prints."""
    def show(step, x):
        print(f"{step:70}{tuple(x.shape)}", flush=True)

    torch.manual_seed(0)
    model, mask = build_model("small").eval(), tube_mask(1, (8, 14, 14))
    clip = F.interpolate(torch.randn(1, 3, 16, 14, 14), (16, 224, 224), mode="trilinear")  # smooth
    show("  a clip, normalised RGB", clip)
    visible, hidden = split_mask(mask)
    show("1 90% of its 8 x 14 x 14 tubes are hidden, the same in each slice", hidden)
    predicted = model.predict(clip, visible, hidden)
    show("2 the video model predicts features for them from the others", predicted)
    embedded = model.embed(clip, hidden)
    show("3 the projection network: features of their pixels", embedded)
    scores = compare(predicted, embedded, model.unit_prototypes())
    show("4 cosines of both to the prototypes", scores[0])
    shares = [sinkhorn(x) for x in scores]
    show("5 Sinkhorn: both assigned to prototypes, in equal shares", shares[0])
    loss, _ = symmetric_loss(*scores, *(x.argmax(dim=1) for x in shares))
    show(f"6 each predicts the other's: the loss is {loss:.2f}", loss)


if __name__ == "__main__":
    walk()
