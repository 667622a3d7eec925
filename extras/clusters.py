"""Clusters of tokens and the segments that they are: k-means, matching, intersection over union.

    true, s = number_segments(masks, 224)          # t of (H, W) -> segments (t, 224, 224), how many
    found = maps(tokens, s, 224, 5, generator)     # (t, h, w, D) -> clusters (t, 224, 224)
    mean_iou(clustering(found, true, s), true, s)  # with background, and without

Only extras/segment.py uses this file; it needs nothing but torch and torchvision.
"""
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform


def kmeans(tokens, k, generator, restarts=5, rounds=50):
    """Clusters tokens (n, D) by cosine: the cluster of each, (n,), of the best of the restarts."""
    tokens, best = F.normalize(tokens, dim=1), (-2.0, None)
    for _ in range(restarts):
        centres = tokens[torch.randint(len(tokens), (1,), generator=generator)]
        while len(centres) < k:  # k-means++: a far token is likely to be the next centre
            distance = (1 - (tokens @ centres.T).amax(dim=1)).clamp(min=1e-9)
            chosen = torch.multinomial(distance, 1, generator=generator)
            centres = torch.cat([centres, tokens[chosen]])
        cluster = torch.empty(0)
        for _ in range(rounds):
            before, (cosine, cluster) = cluster, (tokens @ centres.T).max(dim=1)
            if torch.equal(before, cluster):
                break
            sums = torch.zeros_like(centres).index_add_(0, cluster, tokens)
            centres = torch.where(sums.any(dim=1, keepdim=True), F.normalize(sums, dim=1), centres)
        best = max(best, (cosine.mean().item(), cluster), key=lambda result: result[0])
    return best[1]


def maps(tokens, k, size, restarts, generator):
    """Tokens (t, h, w, D) of a clip -> the k-means cluster of each pixel (t, size, size)."""
    cluster = kmeans(tokens.flatten(0, 2), k, generator, restarts).view(tokens.shape[:3])
    shares = F.one_hot(cluster, k).permute(0, 3, 1, 2).float()
    return F.interpolate(shares, (size, size), mode="bilinear").argmax(dim=1)


def number_segments(masks, size):
    """Annotations (H, W), of one clip -> (t, size, size), their numbers replaced by 0 (background),
    1, 2 and so on in the same order; and how many there are."""
    true = torch.cat([transform.resize(mask[None], [size, size], InterpolationMode.NEAREST)
                      for mask in masks])
    numbers = torch.tensor(sorted({0, *true.unique().tolist()}))
    return torch.searchsorted(numbers, true), len(numbers)


def overlaps(found, true, k, s):
    """Of maps of one shape, what each of k clusters has of each of s segments: the pixels that they
    share, and intersection over union; two of (k, s)."""
    shared = (found.flatten() * s + true.flatten()).bincount(minlength=k * s).view(k, s).float()
    return shared, shared / (shared.sum(dim=1, keepdim=True) + shared.sum(dim=0) - shared).clamp(1)


def match(scores):
    """The segment of each cluster, one to one, such that the sum of scores (s clusters, s segments)
    is largest, a list: the Hungarian algorithm, by shortest augmenting paths (Jonker and Volgenant,
    1987)."""
    cost, (s, _) = 1 - scores.T.double(), scores.shape  # segments, clusters
    price, owner = torch.zeros(s).double(), [-1] * s  # of each cluster; -1: nobody
    for segment in range(s):
        # Dijkstra: a chain in which the new segment takes a cluster, its owner another, and so on.
        length, before = torch.full((s,), torch.inf).double(), torch.full((s,), -1)
        visited, taker, last, so_far = torch.zeros(s).bool(), segment, -1, 0.0
        while taker >= 0:
            net = cost[taker] - price
            way = so_far + net - (net[last] if last >= 0 else 0)
            shorter = (way < length) & ~visited
            length, before = way.where(shorter, length), before.masked_fill(shorter, last)
            last = int(length.masked_fill(visited, torch.inf).argmin())
            visited[last], so_far, taker = True, length[last], owner[last]
        price[visited] += length[visited] - so_far
        while last >= 0:  # back along the chain everyone takes the cluster found for them
            given = int(before[last])
            owner[last], last = owner[given] if given >= 0 else segment, given
    return owner


def clustering(found, true, s):
    """The map of clusters with the number of each one's segment, matched one to one."""
    return torch.tensor(match(overlaps(found, true, s, s)[1]))[found]


def overclustering(found, true, k, s):
    """The map of clusters with the number of the segment that each overlaps most."""
    return overlaps(found, true, k, s)[0].argmax(dim=1)[found]


def mean_iou(found, true, s):
    """The mean IoU over the s segments, with background and without (nan if there is no other)."""
    ious = overlaps(found, true, s, s)[1].diagonal()
    return torch.stack([ious.mean(), ious[1:].mean()])
