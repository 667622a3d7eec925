"""SIGMA: Sinkhorn-Guided Masked Video Modeling, the whole method in one file.

Paper: Salehi, Dorkenwald, Thoker, Gavves, Snoek, Asano, ECCV 2024, arXiv 2407.15447.

    model = build_model("base")                                 # or SIGMA(dim=..., ...) for any size
    video = torch.randn(2, 3, 16, 224, 224)                     # normalised with ImageNet's mean and deviation
    loss, stats = model(video, tube_mask(2, (8, 14, 14)))       # pretrain: 90% of the tubes are hidden
    features = model.encoder(video)                             # use: (2, 1568, 768), one token for each tube
    model = load_model("checkpoint.pth")                        # published weights, or a run's: see load_model

`python sigma.py` walks one clip through the method and prints each step. The parts stand in order, small to large;
each can be copied together with the parts it names. `tube_mask`, `sinkhorn` and `symmetric_loss` need torch alone.

Shapes    B clips of 3 x T x H x W pixels    N tubes of a clip = V visible + M hidden    P pixel values of a tube
          D width of the tokens              E width of features and prototypes          K prototypes
"""
import argparse
import json
import math
import re
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- Tubes: the clip in pieces of 2 frames x 16 x 16 pixels, where each one stands, and which are hidden --------------

@cache                                                # made once for each size and device; never trained, never saved
def positions(n, dim, device=None):
    """Fixed sinusoids of the tubes' flattened (t h w) index, (n, dim) float32: even columns sine, odd columns cosine.

    Row p is the same for every n: a longer clip has more rows. Don't write into the result: all callers share it.
    """
    column = torch.arange(dim)
    frequency = 10000 ** (-2 * (column // 2).double() / dim)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency                                            # n dim
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float().to(device)


def tube_mask(batch, grid, ratio=0.9, generator=None):
    """Random tube masks (paper, method section; VideoMAE): (batch, t*h*w) bool on the CPU, True where hidden.

    Each clip hides int(ratio * h*w) places of its own choice, the same in all t time slices, so that a hidden tube
    can't be copied from the slice before. Every clip hides the same number: the visible ones form one dense batch.
    grid: the clip's size (t, h, w) in tubes. ratio: above 0, below 1. generator: a torch.Generator on the CPU.
    """
    t, h, w = grid
    hidden = int(ratio * h * w)
    if not 0 < hidden < h * w:
        raise ValueError(f"a mask must hide some places and leave some: ratio {ratio} hides {hidden} of {h * w}")
    places = torch.rand(batch, h * w, generator=generator).argsort(dim=1)[:, :hidden]
    return torch.zeros(batch, h * w, dtype=torch.bool).scatter_(1, places, True).repeat(1, t)                      # B N


def split_mask(mask, device):
    """Mask (B, N), True where hidden -> indices of the visible tubes (B, V) and of the hidden ones (B, M), ascending.

    Python must know how many are hidden. A mask on the CPU tells at once; one on a GPU makes the program wait for it.
    """
    hidden = mask.bool().sum(dim=1).tolist()
    if len(set(hidden)) != 1:
        raise ValueError(f"every clip of a batch must hide the same number of tubes, found {sorted(set(hidden))}")
    order = mask.to(device, non_blocking=True).bool().byte().argsort(dim=1, stable=True)            # visible ones first
    return order.split([mask.shape[1] - hidden[0], hidden[0]], dim=1)


def take_tubes(video, tube, index=None):
    """The tubes of a video (B, 3, T, H, W) at index (B, n), or all of them: (B, n, 3, p, q, r), tube = (p, q, r)."""
    if any(size % step for size, step in zip(video.shape[2:], tube)):
        raise ValueError(f"frames, height and width must be divisible by the tube {tuple(tube)}, "
                         f"found {tuple(video.shape[2:])}: resize the clip or choose another tube")
    p, q, r = tube
    cut = rearrange(video, "b c (t p) (h q) (w r) -> b t h w c p q r", p=p, q=q, r=r)      # a view: nothing is copied
    if index is None:
        return rearrange(cut, "b t h w c p q r -> b (t h w) c p q r")
    (h, w), clip = cut.shape[2:4], torch.arange(len(video), device=video.device)[:, None]
    return cut[clip, index // (h * w), index // w % h, index % w]                                          # B n 3 p q r


def standardise(x, dim):
    """Zero mean and unit variance (unbiased) along dim; 1e-6 keeps constant tubes finite."""
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)


# --- The video model: a ViT that sees the visible tubes, a light decoder that predicts features of the hidden ones ----

class Attention(nn.Module):
    """Multi-head self-attention over (B, n, dim). Queries and values have a bias, keys have none."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                                                                # B n 3D
        q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)                                                       # B heads n d
        return self.proj(rearrange(x, "b heads n d -> b n (heads d)"))                                           # B n D


class MLP(nn.Module):
    """Two linear layers with a GELU between; the hidden one is four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. drop_path (stochastic depth): how often, in training, a clip skips one of its halves;
    0 in pretraining, the kept ones are scaled so that the mean stays."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = 0.0

    def skip(self, half):
        if not self.training or self.drop_path == 0:
            return half
        return half * F.dropout(half.new_ones(len(half), 1, 1), self.drop_path)                  # one number for a clip

    def forward(self, x):
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


class TubeEmbedding(nn.Module):
    """A Conv3d whose kernel and stride are one tube, computed as a linear layer of just the tubes it is given."""

    def __init__(self, dim, tube):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=tube, stride=tube)

    def forward(self, tubes):                                                                             # B n 3 p q r
        return F.linear(tubes.flatten(2), self.proj.weight.flatten(1), self.proj.bias)                           # B n D


def init_linear(module):
    """Xavier-uniform weights and zero biases for every linear layer within; LayerNorm already starts at 1 and 0."""
    for layer in (layer for layer in module.modules() if isinstance(layer, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def run(blocks, x, recompute):
    """Tokens (B, n, dim) through the blocks. With recompute a block's activations are not kept for the backward pass
    but computed again in it: a third more arithmetic, memory for one block instead of for all."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


class Encoder(nn.Module):
    """ViT on space-time tubes. Without a mask it embeds all tubes; with one, it never touches the hidden ones."""

    def __init__(self, *, dim, depth, heads, tube=(2, 16, 16), norm=True):
        super().__init__()
        self.tube, self.dim, self.recompute = tuple(tube), dim, False
        self.patch_embed = TubeEmbedding(dim, self.tube)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        init_linear(self)

    def forward(self, video, mask=None):
        """video (B, 3, T, H, W), each size divisible by the tube's; mask (B, N) bool, True where hidden.

        Returns the final tokens, (B, N, D) without a mask, (B, V, D) with one; tubes count in (t h w) order.
        """
        if mask is None:
            tubes = take_tubes(video, self.tube)                                                          # B N 3 p q r
            x = self.patch_embed(tubes) + positions(tubes.shape[1], self.dim, video.device)                      # B N D
        else:
            expected = (len(video), math.prod(video.shape[2:]) // math.prod(self.tube))
            if mask.shape != expected:
                raise ValueError(f"the mask of these clips must have the shape {expected}, found {tuple(mask.shape)}")
            visible, _ = split_mask(mask, video.device)                                                            # B V
            place = positions(mask.shape[1], self.dim, video.device)                                               # N D
            x = self.patch_embed(take_tubes(video, self.tube, visible)) + place[visible]                         # B V D
        return self.norm(run(self.blocks, x, self.recompute))


class Decoder(nn.Module):
    """Light transformer on all tokens (B, N, D), the hidden ones last; its head returns (B, M, E) for those alone."""

    def __init__(self, *, dim, depth, heads, out):
        super().__init__()
        self.dim, self.recompute = dim, False
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out)
        init_linear(self)

    def forward(self, x, hidden):
        return self.head(self.norm(run(self.blocks, x, self.recompute)[:, -hidden:]))


# --- Prototypes: balanced assignments by Sinkhorn, and the loss: each branch predicts the other's assignment ----------

def projector(pixels, dim, widths=(1024, 1024, 512)):
    """The projection network of SIGMA-MLP: P standardised pixel values of a tube -> a feature of `dim` numbers."""
    layers = []
    for width in widths:
        layers += [nn.Linear(pixels, width), nn.GELU()]
        pixels = width
    return nn.Sequential(*layers, nn.Linear(pixels, dim))


class Teacher(nn.Module):
    """The projection network of SIGMA-DINO: a frozen image ViT on each tubelet's first frame (paper, method section).

    vit: torchvision's, with as many patches in a row as a frame has tubes; frames are resized to fit, which the default
    clip needs not. It is no part of SIGMA, so it is in no checkpoint and no optimiser; it never trains.
    """

    def __init__(self, vit, tube):
        super().__init__()
        self.vit, self.frames, self.dim = vit, tube[0], vit.hidden_dim
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, video):
        """video (B, 3, T, H, W), normalised -> the patch tokens of the last LayerNorm, (B, N, E) in (t h w) order.

        In float32 whatever the autocast, and without TF32: no one has shown that less would do.
        """
        side, patch, precision = self.vit.image_size, self.vit.patch_size, torch.get_float32_matmul_precision()
        frames = rearrange(video[:, :, ::self.frames], "b c t h w -> (b t) c h w").to(self.vit.class_token.dtype)
        if frames.shape[-2:] != (side, side):
            frames = F.interpolate(frames, (side, side), mode="bilinear", antialias=True)
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.autocast(video.device.type, enabled=False):
                patches = rearrange(frames, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
                x = F.linear(patches, self.vit.conv_proj.weight.flatten(1), self.vit.conv_proj.bias)
                x = torch.cat([self.vit.class_token.expand(len(x), -1, -1), x], dim=1)
                x = self.vit.encoder(x)[:, 1:]                                               # without the class token
        finally:
            torch.set_float32_matmul_precision(precision)
        return rearrange(x, "(b t) n e -> b (t n) e", b=len(video))


DINO = {                    # width, published weights, the beginning of their SHA-256 (of the small ones none is known)
    "dino": (768, "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
             "bf34ad0f424b9029"),
    "dino-s": (384, "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", ""),
}
DINO_NAMES = (("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj", "conv_proj"),
              ("blocks.", "encoder.layers.encoder_layer_"), ("norm1", "ln_1"), ("norm2", "ln_2"),
              ("attn.qkv.", "self_attention.in_proj_"), ("attn.proj", "self_attention.out_proj"),
              ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"), ("norm.", "encoder.ln."))              # DINO's, torchvision's


def download_dino(name="dino"):
    """DINO's published weights, name in DINO, from torch's cache or its address; no code. The hash of a download is
    checked. Raises OSError or RuntimeError if that fails."""
    _, url, digits = DINO[name]
    file = Path(url).stem + f"-{digits}" * bool(digits) + ".pth"                           # torch checks what it says
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=bool(digits), file_name=file,
                                              weights_only=True)


def load_teacher(weights, grid, tube, heads=None):
    """A Teacher from DINO's weights for clips of grid = (t, h, w) tubes. Its positions are interpolated to h x w.

    Width, depth and patch size are read off the weights, heads are 64 wide as all of DINO's. Raises WeightsError.
    """
    if grid[1] != grid[2]:
        raise WeightsError(f"expected as many tubes down as across for DINO, found {grid[1]} x {grid[2]}: take square "
                           "clips and tubes")
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}    # of its own training
    lacking = [name for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
               if name not in weights]
    if lacking or math.isqrt(weights["pos_embed"].shape[1] - 1) ** 2 != weights["pos_embed"].shape[1] - 1:
        raise WeightsError("expected a ViT with DINO's names and a square of positions as teacher, found no "
                           f"{', '.join(lacking) or 'square'}: give the file of the backbone alone")
    (width, _, patch, _), depth = weights["patch_embed.proj.weight"].shape, blocks_in(weights, "blocks.")
    vit = VisionTransformer(image_size=patch * grid[1], patch_size=patch, num_layers=depth, hidden_dim=width,
                            num_heads=heads or max(1, width // 64), mlp_dim=len(weights["blocks.0.mlp.fc1.weight"]))
    vit.heads = nn.Identity()
    return Teacher(fill(vit, interpolate_embeddings(patch * grid[1], patch, renamed(weights, DINO_NAMES))), tube)


def at_least_fp32(x):
    """x in float32 if it has fewer bits, else as it is (float64 stays float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()                                                     # an assignment is a target: no gradient through it
def sinkhorn(scores, eps=0.05, iters=10):
    """Soft assignment of N tubes to K prototypes that uses all prototypes equally (paper, method section; SwAV).

    scores: (N, K), cosines in [-1, 1], or a list of several such; those share each iteration's all-reduce. Under
    torch.distributed N is this rank's part, and balance holds over all ranks' tubes. Returns the same shape(s), in
    float32 or better whatever the autocast: rows sum to 1, columns to about N / K over the whole batch.

    The assignment is diag(u) kernel diag(v) with kernel = exp(scores / eps). Only the vectors u and v change, so an
    iteration is two products of one fixed matrix with a vector, and nothing N x K is rewritten. A constant factor on v
    is undone by the next u, so the prototypes' equal totals need not be 1/K: v is scaled to a largest value of 1.
    """
    branches = [scores] if isinstance(scores, torch.Tensor) else scores
    branches = [s.to(torch.promote_types(s.dtype, torch.float32)) for s in branches]
    parallel = dist.is_available() and dist.is_initialized()
    with torch.autocast(branches[0].device.type, enabled=False):
        # exp(2 / 0.005) overflows. A factor taken out of a column belongs to v, which the first step computes afresh;
        # one taken out of a row is given back by u. So column and row maxima go, exactly, and each line keeps a 1.
        peaks = torch.stack([s.amax(dim=0) for s in branches])                                            # branches x K
        if parallel:
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        kernels, us = [], []
        for s, peak in zip(branches, peaks):
            kernel, u = torch.empty_like(s), s.new_empty(len(s))                                             # N K and N
            for rows, out, top in zip(s.split(512), kernel.split(512), u.split(512)):    # blocks that stay in the cache
                torch.amax(torch.sub(rows, peak, out=out), dim=1, out=top)
                out.sub_(top[:, None]).div_(eps).exp_()
            kernels.append(kernel)
            us.append(u.div_(eps).exp_())
        for _ in range(iters):
            totals = torch.stack([u @ kernel for u, kernel in zip(us, kernels)])                          # branches x K
            if parallel:
                dist.all_reduce(totals)
            vs = totals.amin(dim=1, keepdim=True) / totals      # now every prototype has the same total, over all ranks
            us = [1 / (kernel @ v) for kernel, v in zip(kernels, vs)]                   # now every tube's row sums to 1
        soft = [kernel.mul_(v).mul_(u[:, None]) for kernel, v, u in zip(kernels, vs, us)]
    return soft[0] if isinstance(scores, torch.Tensor) else soft


def symmetric_loss(video_scores, target_scores, video_assignment, target_assignment, temperature=0.1):
    """Each branch predicts the other's prototype (paper, method section): cross-entropy both ways, means over tubes.

    Scores (N, K) are cosines to the prototypes, assignments (N,) the index of each tube's prototype, temperature > 0.
    Returns the loss and its two terms {"target_term", "video_term"}, detached, each about ln K at the start.
    """
    target_term = F.cross_entropy(target_scores / temperature, video_assignment)   # trains the projector and prototypes
    video_term = F.cross_entropy(video_scores / temperature, target_assignment)               # trains the video model
    return target_term + video_term, {"target_term": target_term.detach(), "video_term": video_term.detach()}


def usage(assignment, k):
    """How many of k prototypes the assignment (N,) uses, and the entropy of that use, at most ln k: 0-d tensors."""
    one = torch.full((len(assignment),), 1 / len(assignment), device=assignment.device)
    share = one.new_zeros(k).index_add_(0, assignment, one)
    return (share > 0).sum(), -torch.special.xlogy(share, share).sum()


# --- SIGMA ------------------------------------------------------------------------------------------------------------

TARGETS = ("mlp", "pixel", *DINO)


class SIGMA(nn.Module):
    """The two networks, the prototypes between them, and the loss.

    target, what the projection network sees: "mlp" (the hidden tubes' pixels, through a trained MLP), "dino", "dino-s"
    (features of a Teacher, `target_dim` wide, no trained projector) or "pixel" (VideoMAE: regress the pixels, no
    prototypes). eps, iters: Sinkhorn's. temperature: of the cross-entropies. norm: whether the encoder ends with its
    LayerNorm. Initialisation as published.
    """

    def __init__(self, *, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads, tube=(2, 16, 16), target="mlp",
                 target_dim=256, prototypes=3000, eps=0.05, iters=10, temperature=0.1,
                 projector_widths=(1024, 1024, 512), norm=True):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f'target must be one of {", ".join(TARGETS)}, found "{target}"')
        self.target, self.eps, self.iters, self.temperature = target, eps, iters, temperature
        pixels = 3 * math.prod(tube)                                                  # P: 1536 for tubes of 2 x 16 x 16
        out = pixels if target == "pixel" else target_dim
        self.encoder = Encoder(dim=dim, depth=depth, heads=heads, tube=tube, norm=norm)
        self.encoder_to_decoder = nn.Linear(dim, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder = Decoder(dim=decoder_dim, depth=decoder_depth, heads=decoder_heads, out=out)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if target == "mlp":
            self.projector = projector(pixels, target_dim, projector_widths)
        if target != "pixel":
            self.prototypes = nn.Parameter(torch.randn(prototypes, target_dim))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None, None], persistent=False)

    def forward(self, video, mask, features=None):
        """One pretraining step's loss.

        video (B, 3, T, H, W), normalised with ImageNet's mean and deviation; mask (B, N) bool, True where hidden, best
        on the CPU (see split_mask); features (B, N, E), only for DINO's targets: the Teacher's, of all tubes.
        Returns the loss and a dict of detached tensors: the loss's terms, and for the targets with prototypes log_k,
        prototypes_used and entropy (of the video branch's assignment), target_entropy and both assignments (B*M,).
        Ranks' losses average to the loss of the whole batch; counts and entropies are this rank's.
        """
        visible, hidden = split_mask(mask, video.device)                           # 1. hide most of the tubes: B V, B M
        predicted = self.predict(video, mask, visible, hidden)                     # 2. the video model's guess:   B M E
        target = self.embed(video, hidden, features)                               # 3. the projection network:    B M E
        if self.target == "pixel":
            loss = F.mse_loss(at_least_fp32(predicted), target)
            return loss, {"pixel_term": loss.detach()}
        video_scores, target_scores = self.compare(predicted, target)             # 4. cosines to prototypes: B*M K each
        video_assignment, target_assignment = [soft.argmax(dim=1) for soft in       # 5. balanced assignments:  B*M each
                                               sinkhorn([video_scores, target_scores], self.eps, self.iters)]
        loss, stats = symmetric_loss(video_scores, target_scores, video_assignment,      # 6. each predicts the other's
                                     target_assignment, self.temperature)
        k = len(self.prototypes)
        used, entropy = usage(video_assignment, k)
        return loss, stats | {"log_k": torch.full_like(entropy, math.log(k)), "prototypes_used": used,
                              "entropy": entropy, "target_entropy": usage(target_assignment, k)[1],
                              "video_assignment": video_assignment,
                              "target_assignment": target_assignment}

    def predict(self, video, mask, visible, hidden):
        """The video model: features predicted for the hidden tubes from the visible ones, (B, M, E)."""
        tokens = self.encoder_to_decoder(self.encoder(video, mask))                                             # B V D'
        place = positions(mask.shape[1], self.decoder.dim, video.device)                                          # N D'
        tokens = torch.cat([tokens + place[visible], self.mask_token + place[hidden]], dim=1)                   # B N D'
        return self.decoder(tokens, hidden.shape[1])                                                             # B M E

    def embed(self, video, hidden, features=None):
        """The projection network: the true content of the tubes at hidden (B, M) as features, (B, M, E)."""
        if self.target in DINO:
            n, found = math.prod(video.shape[2:]) // math.prod(self.encoder.tube), getattr(features, "shape", None)
            if found != (expected := (len(video), n, self.prototypes.shape[1])):
                raise ValueError(f'target "{self.target}" needs features of all tubes, shape {expected}, '
                                 f"found {found and tuple(found)}")
            features = standardise(at_least_fp32(features.detach()), dim=1)              # per clip and channel: B N E
            return features.take_along_dim(hidden[..., None], dim=1)                                             # B M E
        pixels = at_least_fp32(take_tubes(video, self.encoder.tube, hidden)) * self.std + self.mean       # B M 3 p q r
        pixels = rearrange(pixels, "b m c p q r -> b m (p q r) c")                                       # RGB in [0, 1]
        pixels = standardise(pixels, dim=2).flatten(2)                        # per tube and channel: B M P, P = p q r c
        return pixels if self.target == "pixel" else self.projector(pixels)

    def compare(self, predicted, target):
        """Cosines of both branches' features (B, M, E) to the prototypes, (B*M, K) each, float32 or better."""
        self.prototypes.data.copy_(F.normalize(self.prototypes.data, dim=1))      # rescaled in place, outside the graph
        with torch.autocast(predicted.device.type, enabled=False):     # in bf16 over 1% of the assignments would change
            predicted, target = (F.normalize(at_least_fp32(x).flatten(0, 1), dim=1) for x in (predicted, target))
            # Detached: the prototypes learn from the projection network's side alone, else both sides drift together.
            return predicted @ self.prototypes.detach().T, target @ self.prototypes.T


class Classifier(nn.Module):
    """The encoder with a classifier, for fine-tuning and linear probes: mean over all tokens, LayerNorm, linear layer.

    As published the LayerNorm stands behind the mean, in place of the encoder's last one, and the head starts near 0.
    encoder: an Encoder, which it takes over. drop_path: of the last block; it grows linearly from 0 in the first. The
    names of its weights are those of the published fine-tuned models, with "encoder." before the encoder's.
    """

    def __init__(self, encoder, classes, drop_path=0.0):
        super().__init__()
        self.encoder, encoder.norm = encoder, nn.Identity()
        for block, rate in zip(encoder.blocks, torch.linspace(0, drop_path, len(encoder.blocks)).tolist()):
            block.drop_path = rate
        self.fc_norm = nn.LayerNorm(encoder.dim, eps=1e-6)
        self.head = nn.Linear(encoder.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(0.001)
        nn.init.zeros_(self.head.bias)

    def pooled(self, video):
        """video (B, 3, T, H, W), normalised -> features of whole clips (B, D)."""
        return self.fc_norm(self.encoder(video).mean(dim=1))

    def forward(self, video):
        """video (B, 3, T, H, W), normalised -> logits (B, classes)."""
        return self.head(self.pooled(video))


SIZES = {
    #             encoder: width, blocks, heads    decoder: width, blocks, heads
    "tiny":  dict(dim=128, depth=4, heads=4, decoder_dim=64, decoder_depth=2, decoder_heads=2, tube=(4, 8, 8),
                  prototypes=128, eps=0.03, target_dim=64, projector_widths=(256,)),   # not in the paper: the toy set's
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base":  dict(dim=768, depth=12, heads=12, decoder_dim=384, decoder_depth=4, decoder_heads=6),
    "large": dict(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_depth=4, decoder_heads=8),
    "huge":  dict(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_depth=4, decoder_heads=8),
}


def options(size, target="mlp", **changes):
    """Keyword arguments of SIGMA for a size in SIZES; changes overrule the table. Prototypes are as wide as DINO."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, found {size}")
    width = dict(target_dim=DINO[target][0]) if target in DINO else {}
    return dict(tube=(2, 16, 16)) | SIZES[size] | width | dict(target=target) | changes


def build_model(size="base", **changes):
    """SIGMA of a size in SIZES; keyword arguments of SIGMA overrule the table, as in build_model("small", tube=...)."""
    return SIGMA(**options(size, **changes))


# --- Weights of others in our names, and ours in theirs ---------------------------------------------------------------

class WeightsError(ValueError):
    """Weights that don't fit; the message says what was expected, what was found and what to do."""


HEADS = {s[part + "dim"]: s[part + "heads"] for s in SIZES.values() for part in ("", "decoder_")}     # for each width
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")                            # as Hugging Face calls its weights
ENCODER = ("dim", "depth", "heads", "tube", "norm")                                    # the options that an Encoder has
HUGGING_FACE = (("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),       # ours, theirs
                ("encoder.blocks.", "videomae.encoder.layer."), ("decoder.blocks.", "decoder.decoder_layers."),
                (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
                (".attn.proj.", ".attention.output.dense."),
                (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
                (".attn.q_bias", ".attention.attention.q_bias"), (".attn.v_bias", ".attention.attention.v_bias"),
                ("encoder.norm.", "videomae.layernorm."), ("head.", "classifier."))


def renamed(weights, pairs):
    """The weights under other names: in each name the pairs' first parts are replaced by the second ones, in order."""
    found = {}
    for name, value in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def blocks_in(weights, prefix):
    """The number of blocks whose names begin with the prefix."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def fill(model, weights, source="the file"):
    """Puts weights into the model, all of them or none, and returns it. Raises WeightsError with what differs."""
    found, expected = ({name: tuple(value.shape) for name, value in w.items()} for w in (weights, model.state_dict()))
    differ = [f"{name} (expected {expected.get(name)}, found {found.get(name)})"
              for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differ:
        raise WeightsError(f"expected the weights of this network in {source}, found {len(differ)} names that differ: "
                           f"{', '.join(differ[:20])}{', ...' * (len(differ) > 20)}: give another file or its settings")
    model.load_state_dict(weights)
    return model


def read_file(path):
    """Tensors by name from a file, or from a folder as Hugging Face saves it, and what else it holds: two dicts.

    Runs no code of the file. Raises WeightsError.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).exists()), path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            weights, rest = load_file(path), {}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):          # older files hold their flags as one
                weights, rest = torch.load(path, map_location="cpu", weights_only=True), {}
        for key in ("model", "module", "state_dict"):
            if isinstance(weights.get(key), dict):
                weights, rest = weights[key], {name: value for name, value in weights.items() if name != key}
        config = path.with_name("config.json")
        if any("layernorm_before" in name for name in weights):                                   # Hugging Face's names
            rest = {"model_type": "videomae"} | (json.loads(config.read_text()) if config.is_file() else {})
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError("not only tensors by name")
    except FileNotFoundError:
        raise WeightsError(f"expected weights, found no file {path}: give a checkpoint, or a run's folder") from None
    except ImportError:
        raise WeightsError(f"expected the package safetensors to read {path}, found none: pip install safetensors, or "
                           "give the weights as .bin or .pt") from None
    except Exception as error:                                        # whatever a foreign or damaged file brings about
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {foreign[1]}" if foreign else f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise WeightsError(f"expected weights, found something else in {path} ({reason}): give a checkpoint, or a "
                           "run's folder") from None
    return weights, rest


def read_weights(path):
    """read_file's two dicts, but the weights in our names. Recognises what load_model lists. Raises WeightsError."""
    weights, rest = read_file(path)
    if all(name.startswith("module.") for name in weights):                                                     # DDP's
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if rest.get("model_type") == "videomae":
        return from_hugging_face(weights), rest
    if any(name.startswith("blocks.") for name in weights):                                   # the authors', fine-tuned
        return {name if name.startswith(("fc_norm.", "head.")) else f"encoder.{name}": value
                for name, value in weights.items()}, rest
    return {re.sub(r"^head\.(?=\d)", "projector.", name): value for name, value in weights.items()}, rest


def from_hugging_face(weights):
    """Weights of Hugging Face's VideoMAE models in our names; their query, key and value weights are one of ours."""
    whole = ("videomae.", "encoder_to_decoder.", "mask_token", "decoder.", "fc_norm.", "classifier.")
    weights = {name if name.startswith(whole) else f"videomae.{name}": value for name, value in weights.items()}
    found = {}
    for name, value in weights.items():
        if name.endswith("attention.attention.query.weight"):
            parts = [weights.get(name.replace("query", part), value[:0]) for part in ("query", "key", "value")]
            name, value = name.replace("attention.attention.query", "attn.qkv"), torch.cat(parts)
        if not name.endswith(("attention.attention.key.weight", "attention.attention.value.weight")):
            found[name] = value
    return renamed(found, [(theirs, ours) for ours, theirs in HUGGING_FACE])


def to_hugging_face(weights, sizes, frames, size):
    """Weights in our names and sizes_of them -> Hugging Face's weights, their config, and what has no place there.

    A pixel target becomes a VideoMAEForPreTraining, a Classifier a VideoMAEForVideoClassification, else the encoder a
    VideoMAEModel: all three can be opened as VideoMAEModel. frames, size: of the clips. Raises WeightsError.
    """
    if sizes["tube"][1] != sizes["tube"][2]:
        raise WeightsError(f"expected square patches for Hugging Face, found tubes of {sizes['tube']}")
    kind = "ForPreTraining" if sizes.get("target") == "pixel" else "Model"
    kind = "ForVideoClassification" if "classes" in sizes else kind
    kept = {name: value for name, value in weights.items() if kind != "Model" or name.startswith("encoder.")}
    found = {}
    for name, value in renamed(kept, HUGGING_FACE).items():
        name = name.removeprefix("videomae." * (kind == "Model")).replace("decoder.classifier.", "decoder.head.")
        if name.endswith(".attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            found[name] = value
    config = dict(model_type="videomae", architectures=[f"VideoMAE{kind}"], image_size=size, num_frames=frames,
                  patch_size=sizes["tube"][1], tubelet_size=sizes["tube"][0], num_channels=3, hidden_act="gelu",
                  hidden_size=sizes["dim"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["heads"],
                  intermediate_size=4 * sizes["dim"], qkv_bias=True, layer_norm_eps=1e-6, hidden_dropout_prob=0.0,
                  attention_probs_dropout_prob=0.0, use_mean_pooling="encoder.norm.weight" not in weights)
    if kind == "ForPreTraining":
        config |= dict(norm_pix_loss=True, decoder_hidden_size=sizes["decoder_dim"],
                       decoder_num_hidden_layers=sizes["decoder_depth"],
                       decoder_num_attention_heads=sizes["decoder_heads"],
                       decoder_intermediate_size=4 * sizes["decoder_dim"])
    if "classes" in sizes:
        config |= dict(id2label={i: f"LABEL_{i}" for i in range(sizes["classes"])},
                       label2id={f"LABEL_{i}": i for i in range(sizes["classes"])})
    return found, config, sorted({name.split(".")[0] for name in weights.keys() - kept.keys()})


def to_authors(weights):
    """Weights in our names -> in the names of the authors' code, as the value of "model" in their files."""
    if "fc_norm.weight" in weights:
        return {name.removeprefix("encoder."): value for name, value in weights.items()}
    return {name.replace("projector.", "head."): value for name, value in weights.items()}


def sizes_of(weights, about=None, heads=None, decoder_heads=None):
    """What the shapes of weights in our names say: keyword arguments of SIGMA, or of an Encoder, and "classes".

    Shapes don't tell the number of heads: it is given, or stands in about (what else read_weights found), or is that of
    the size in SIZES that has this width. Raises WeightsError.
    """
    about, shape = about or {}, {name: tuple(value.shape) for name, value in weights.items()}
    known = (about.get("config") or {}).get("sizes") or {
        "heads": about.get("num_attention_heads"), "decoder_heads": about.get("decoder_num_attention_heads")}

    def number(width, part, given):
        found = given or known.get(part) or HEADS.get(width)
        if not found or width % found:
            raise WeightsError(f"expected a width of {', '.join(map(str, sorted(HEADS)))}, or a number of {part} that "
                               f"divides it, found a width of {width}" + f" and {found} {part}" * bool(found)
                               + f": give load_model(..., {part}=...), or config.json beside a Hugging Face file")
        return found

    dim, _, *tube = shape.get("encoder.patch_embed.proj.weight", (0, 0, 0, 0, 0))
    if not dim or len(tube) != 3:
        raise WeightsError("expected the weights of a SIGMA, VideoMAE or fine-tuned network, found no tube embedding "
                           f"among {len(weights)} names, first {next(iter(weights), 'none')}: give another file")
    sizes = dict(dim=dim, depth=blocks_in(weights, "encoder.blocks."), heads=number(dim, "heads", heads),
                 tube=tuple(tube), norm=about.get("model_type") != "videomae" or "encoder.norm.weight" in shape)
    if "fc_norm.weight" in shape:
        return sizes | dict(classes=shape.get("head.weight", (0,))[0], norm=False)
    if "decoder.head.weight" not in shape:
        return sizes
    out, width = shape["decoder.head.weight"]
    sizes |= dict(decoder_dim=width, decoder_depth=blocks_in(weights, "decoder.blocks."),
                  decoder_heads=number(width, "decoder_heads", decoder_heads))
    if "prototypes" not in shape:
        return sizes | dict(target="pixel")
    layers = sorted((name for name in shape if name.startswith("projector.") and name.endswith(".bias")),
                    key=lambda name: int(name.split(".")[1]))
    target = "mlp" if layers else next((name for name, (width, *_) in DINO.items() if width == out), "dino")
    return sizes | dict(target=target, target_dim=out, prototypes=shape["prototypes"][0],
                        **dict(projector_widths=tuple(shape[name][0] for name in layers[:-1])) if layers else {})


def load_model(path, heads=None, decoder_heads=None):
    """The network of a checkpoint, with all its weights: SIGMA, a Classifier, or a module with `encoder` alone.

    Recognises our own checkpoints; the authors' pretraining ones (all targets), VideoMAE's, and those fine-tuned from
    them; Hugging Face's VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification (.bin, .pt, and
    .safetensors with that package; or their folder). Sizes, tubes, target and number of prototypes are read off the
    weights, see sizes_of. Whatever the file, model.encoder(video) gives tokens, for clips of any length and size.
    Raises WeightsError, with the list of differences if not everything fits.
    """
    weights, about = read_weights(path)
    sizes = sizes_of(weights, about, heads, decoder_heads)
    if "target" in sizes:
        return fill(SIGMA(**sizes), weights, path)
    encoder = Encoder(**{name: sizes[name] for name in ENCODER})
    model = Classifier(encoder, sizes["classes"]) if "classes" in sizes else nn.ModuleDict({"encoder": encoder})
    return fill(model, weights, path)


def walk():
    """One clip through the method, step by step: what `python sigma.py` prints."""
    torch.manual_seed(0)
    model, mask = build_model("small"), tube_mask(1, (8, 14, 14))
    clip = F.interpolate(torch.randn(1, 3, 16, 14, 14), size=(16, 224, 224), mode="trilinear")        # smooth, no noise
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    with torch.no_grad():
        visible, hidden = split_mask(mask, clip.device)
        predicted, target = model.predict(clip, mask, visible, hidden), model.embed(clip, hidden)
        scores = model.compare(predicted, target)
        soft, plain = sinkhorn(list(scores)), (scores[1] / model.eps).softmax(dim=1)
        hard = [s.argmax(dim=1) for s in soft]
        loss, terms = symmetric_loss(*scores, *hard)
    largest = [q.mean(dim=0).max().item() * len(model.prototypes) for q in (soft[1], plain)]
    for step, x, fact in (
            ("clip", clip, f"{clip.numel():,} numbers, normalised RGB"),
            ("tubes of 2 x 16 x 16", mask, "8 x 14 x 14 of them, 1536 numbers each"),
            ("  hidden by the tube mask", hidden, f"{mask.float().mean():.1%}, the same places in all 8 slices"),
            ("1 encoder: the visible tubes", model.encoder(clip, mask), f"{size['encoder']:,} parameters"),
            ("2 decoder: features predicted", predicted, f"{size['decoder']:,} parameters"),
            ("3 projector: features of pixels", target, f"{size['projector']:,} parameters"),
            ("4 cosines, video to prototypes", scores[0], f"from {scores[0].min():+.2f} to {scores[0].max():+.2f}"),
            ("  cosines, target to prototypes", scores[1], f"from {scores[1].min():+.2f} to {scores[1].max():+.2f}"),
            ("5 Sinkhorn: balanced assignment", soft[1], "largest prototype: {:.2f} times its share (plain softmax: "
             "{:.0f} times)".format(*largest)),
            ("  hard: its argmax", hard[1], f"{len(hard[1].unique())} prototypes in use"),
            ("6 each predicts the other's", loss, f"loss {terms['target_term']:.2f} + {terms['video_term']:.2f} = "
             f"{loss:.2f}; by chance 2 ln K = {2 * math.log(len(model.prototypes)):.2f}")):
        print(f"{step:34}{str(tuple(x.shape)):22}{fact}")


if __name__ == "__main__":
    walk()
