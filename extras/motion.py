"""Motion-guided masks, `train.py --mask motion`: a visible place moves with the picture.

    python train.py --data ssv2 --root DIR --mask motion
    python extras/motion.py --data DIR      which videos hold motion vectors, and a picture of masks

The paper's 71.2% on Something-Something v2 takes motion guidance, which has no public code. Here
places are followed along the motion from one random time slice to the others, the idea of MGMAE
(Huang et al., ICCV 2023); motion is read from the vectors that H.264, MPEG-4 and MPEG-2 files hold
already, as in MGM (Fan et al., ICCV 2023, arXiv 2308.12962): no optical flow network.

Approximate: a vector tells where its block was predicted from, not when that was shown. Vectors to
the past are taken to span the time to the nearest I- or P-frame before: right without B-frames or
with one reference, as in files of extras/videos.py prepare, not always in others. Frames that the
decoder may skip, intra blocks, and codecs without vectors (VP9, AV1, HEVC) are missing; a tube with
none counts as still. The median over a tube's area and the frames between two slices helps.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the core is
from data import Clips, VideoError, decode, find_videos, resize_crop
from sigma import UserError, tube_mask
from train import launch, locate, parser_with, recipe

CELL = 8  # pixels of a field's cell; the blocks of most files are as large or larger
I_FRAME, P_FRAME = 1, 2


def read_vectors(frame):
    """How far the content of each cell of a decoded frame has moved since its reference frame.

    Returns (rows, columns, 2): downwards and to the right, in pixels, NaN where no vector points to
    the past. A vector says where content was, so the content moves by its opposite.
    """
    rows, columns = math.ceil(frame.height / CELL), math.ceil(frame.width / CELL)
    field = torch.full((rows, columns, 2), math.nan)
    data = frame.side_data.get("MOTION_VECTORS")
    if data is not None:
        v = data.to_ndarray()
        v = {name: torch.from_numpy(v[name].astype("float32")) for name in v.dtype.names}
        moved = -torch.stack([v["motion_y"], v["motion_x"]], dim=1) / v["motion_scale"][:, None]
        for i, j in ((-1, -1), (-1, 1), (1, -1), (1, 1)):  # the quarters of each block
            row = ((v["dst_y"] + i * v["h"] / 4) // CELL).long()
            column = ((v["dst_x"] + j * v["w"] / 4) // CELL).long()
            inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            inside &= v["source"] < 0
            field[row[inside], column[inside]] = moved[inside]
    return field


class Watch:
    """Collects from data.decode the motion of each frame: [(position, field in pixels a frame)]."""

    def __init__(self):
        self.fields, self.anchor = [], None

    def __call__(self, frame, position):
        field = read_vectors(frame)
        if self.anchor is not None and field.isfinite().any():
            self.fields.append((position, field / (position - self.anchor)))
        if frame.pict_type in (I_FRAME, P_FRAME):
            self.anchor = position


def tube_motion(fields, box, grid, flip=False):
    """The motion of each tube of a slice, (h, w, 2) in tubes a frame: the median over its area and
    the fields, 0 where all are missing. box: the crop (top, left, height, width) in pixels, that is
    resized to the clip, grid (t, h, w) tubes. flip: the clip is mirrored."""
    (top, left, height, width), (_, h, w) = box, grid
    if not fields:
        return torch.zeros(h, w, 2)
    rows = ((top + (torch.arange(4 * h) + 0.5) * height / (4 * h)) // CELL).long()
    columns = ((left + (torch.arange(4 * w) + 0.5) * width / (4 * w)) // CELL).long()
    samples = torch.stack([field[rows][:, columns] for field in fields])  # 4 x 4 points a tube
    samples = rearrange(samples, "f (h a) (w b) c -> h w (f a b) c", a=4, b=4)
    motion = samples.nanmedian(dim=2).values.nan_to_num() * torch.tensor([h / height, w / width])
    return motion.flip(1) * torch.tensor([1, -1]) if flip else motion


def displacements(fields, indices, box, grid):
    """How far each tube has moved since the slice before, (t, h, w, 2) in tubes; 0 for the first.

    fields: a Watch's. indices: the clip's frames in the video, t groups of tubelets.
    """
    starts = indices[::len(indices) // grid[0]]
    motion = [torch.zeros(grid[1], grid[2], 2)]
    for before, now in zip(starts, starts[1:]):
        between = [field for position, field in fields if before < position < now + 0.5]
        motion.append(tube_motion(between, box, grid) * (now - before))
    return torch.stack(motion)


def motion_mask(motion, grid, ratio=0.9, generator=None):
    """A mask whose visible places move with the picture: (t*h*w,) bool, True where hidden.

    motion (t, h, w, 2): displacements, in tubes. A tube mask's visible places are those of one
    random slice, followed from there through the others; one that leaves the frame or meets another
    is replaced by a random free place. So each slice shows as many; without motion it is the tube
    mask that tube_mask draws from the same generator.
    """
    t, h, w = grid
    mask = tube_mask(1, grid, ratio, generator)[0].view(t, h * w)
    if not motion.any():
        return mask.flatten()
    start = int(torch.randint(t, (1,), generator=generator))
    visible = [divmod(place, w) for place in (~mask[0]).nonzero()[:, 0].tolist()]
    for slices, sign in ((range(start + 1, t), 1), (range(start - 1, -1, -1), -1)):
        places = [(float(row), float(column)) for row, column in visible]
        for s in slices:
            field = sign * motion[s if sign > 0 else s + 1]
            places = follow(places, field, generator)
            mask[s] = True
            mask[s, [round(row) * w + round(column) for row, column in places]] = False
    return mask.flatten()


def follow(places, motion, generator):
    """Places [(row, column)] moved by motion (h, w, 2), each in a tube of its own."""
    (h, w, _), taken, moved = motion.shape, set(), []
    for row, column in places:
        down, right = motion[round(row), round(column)].tolist()
        row, column = row + down, column + right
        tube = round(row), round(column)
        inside = 0 <= tube[0] < h and 0 <= tube[1] < w
        moved.append((row, column) if inside and tube not in taken else None)
        if inside:
            taken.add(tube)
    free = [(row, column) for row in range(h) for column in range(w) if (row, column) not in taken]
    order = iter(torch.randperm(len(free), generator=generator).tolist())
    return [place or tuple(map(float, free[next(order)])) for place in moved]


class MotionClips(Clips):
    """Clips with motion_mask in place of tube_mask. Vectors are kept where decoded videos are."""

    def __init__(self, videos, **options):
        super().__init__(videos, **options)
        self.fields = {}

    def read(self, path, generator):
        indices, watch = [], Watch()

        def choose(n):
            indices.extend(self.choose(n, self.frames, self.stride, generator)
                           for _ in range(self.repeat))
            return indices

        frames = self.frames_of(path, choose, watch)
        fields = self.fields.get(path, watch.fields)
        if self.cache is not None:
            self.fields[path] = fields
        clips, masks = [], []
        for clip, chosen in zip(frames, indices):
            box = self.crop(*clip.shape[-2:], generator)
            clips.append(resize_crop(clip, box, self.size))
            motion = displacements(fields, chosen, box, self.grid)
            masks.append(motion_mask(motion, self.grid, self.ratio, generator))
        return torch.stack(clips), torch.stack(masks)


def count_with_vectors(videos, most=16):
    """(videos with motion vectors, videos that were tried), spread over the set."""
    tried = videos.spread(most).paths
    found = 0
    for path in tqdm(tried, desc="looking for motion vectors", leave=False):
        watch = Watch()
        try:
            decode(path, lambda n: list(range(min(n, 16))), watch=watch)
        except VideoError:
            continue
        found += bool(watch.fields)
    return found, len(tried)


def clips_for(videos, log):
    """MotionClips, or Clips where no video that is tried has motion vectors; says which."""
    found, tried = count_with_vectors(videos)
    if not found:
        log(f"masks     of tubes: none of {tried} videos tried holds motion vectors")
        return Clips
    log(f"masks     follow motion: {found} of {tried} videos tried hold motion vectors")
    return MotionClips


def draw(path, clips, number=4):
    """Clips, and below each what its mask leaves visible: one frame of each slice, as PNG."""
    rows = []
    for index in [i * len(clips) // number for i in range(number)]:
        video, mask, *_ = clips[0, index]
        step = clips.frames // clips.grid[0]
        frames = video[0, :, ::step].transpose(0, 1).float() / 255  # t 3 S S
        hidden = mask[0].view(clips.grid)[:, None].float()
        hidden = F.interpolate(hidden, frames.shape[-2:]).bool()
        rows += [frames, frames.lerp(torch.tensor(0.5), hidden * 0.85)]
    scale = max(1, 128 // clips.size)
    images = F.interpolate(torch.cat(rows), scale_factor=scale)
    save_image(images, path, nrow=clips.grid[0], padding=2, pad_value=1)


def main(argv=None):
    parser = parser_with(__doc__, "data", "root")
    parser.add_argument("--out", default="motion.png", help="the picture (default: motion.png)")
    args = parser.parse_args(argv)
    videos = find_videos(locate(args.data, args.root))
    found, tried = count_with_vectors(videos)
    print(f"{found} of {tried} videos tried hold motion vectors")
    if not found:
        raise UserError("without motion vectors --mask motion masks tubes; extras/videos.py "
                        "prepare writes H.264, which has them")
    own = recipe(args.data, "base")
    tube = (2, 8, 8) if args.data == "toy" else (2, 16, 16)
    clips = MotionClips(videos, frames=own["frames"], stride=own["stride"], size=own["size"],
                        ratio=own["ratio"], tube=tube)
    draw(args.out, clips)
    print(f"wrote {args.out}: clips, and below each what its mask leaves visible")


if __name__ == "__main__":
    sys.exit(launch(main))
