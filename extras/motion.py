"""Motion-guided masks for pretraining: a visible place moves with the picture.

    python extras/motion.py train --data ssv2 --root DIR    train.py with such masks, its flags
    python extras/motion.py --data DIR    which videos hold motion vectors, and a picture of masks

The paper's 71.2% on Something-Something v2 takes motion guidance, which has no public code. Here
places are followed along the motion from one random time slice to the others, the idea of MGMAE
(Huang et al., ICCV 2023); motion is read from the vectors that H.264, MPEG-4 and MPEG-2 files hold
already, as in MGM (Fan et al., ICCV 2023, arXiv 2308.12962): no optical flow network.

Approximate: a vector tells where its block was predicted from, not when that was shown. Only those
of P-frames are read, and taken to span the time to the I- or P-frame before: so do 94 to 100% in a
panned picture, fewer where an encoder looks further back. (Of B-frames by x264's defaults 69% do,
and FFmpeg tells none of MPEG-4's.) A tube counts as still if it has no vectors, as in intra blocks
and in codecs that export none (VP9, AV1, HEVC). The median over its area and several frames helps.
"""
import math
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from einops import rearrange
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
import train
from data import Clips, collate, decode, find_videos, resize_crop
from extras.reader import VideoError
from extras.run import draft_of, launch, log
from sigma import UserError, tube_mask

CELL = 8  # pixels of a field's cell; the blocks of most files are as large or larger
I_FRAME, P_FRAME = 1, 2


class MotionRecorder:
    """Collects motion while decode reads a video: fields, triples (start, end, field).

    A field (rows, columns, 2) holds how far the content of each cell of the upright picture moves,
    downwards and to the right, in pixels a frame, from one position to the other; NaN where no
    vector points to the past.
    """

    def __init__(self):
        self.fields, self.anchor = [], math.inf

    def __call__(self, frame, position, turns):
        if position < self.anchor:  # decode starts, perhaps again
            self.__init__()
        vectors = frame.side_data.get("MOTION_VECTORS")
        if vectors is not None and frame.pict_type == P_FRAME and position > self.anchor:
            field = motion_field(vectors.to_ndarray(), frame.height, frame.width, turns)
            self.fields.append((self.anchor, position, field / (position - self.anchor)))
        if frame.pict_type in (I_FRAME, P_FRAME):
            self.anchor = position


def motion_field(vectors, height, width, turns=0):
    """A field as in MotionRecorder, but in pixels, of a coded frame's vectors. turns: by 90
    degrees anticlockwise, from the coded frame (height, width) to the upright picture."""
    y, x, h, w, down, right, scale = (
        torch.from_numpy(vectors[name][vectors["source"] < 0].astype("float32"))
        for name in ("dst_y", "dst_x", "h", "w", "motion_y", "motion_x", "motion_scale"))
    down, right = -down / scale, -right / scale  # a vector says where the block's content was
    y, x = (torch.cat([centre + i * side / 4 for i in signs])  # of the block's four quarters
            for centre, side, signs in ((y, h, (-1, -1, 1, 1)), (x, w, (-1, 1, -1, 1))))
    for _ in range(turns):
        down, right, y, x, height, width = -right, down, width - x, y, width, height
    rows, columns = math.ceil(height / CELL), math.ceil(width / CELL)
    field = torch.full((rows, columns, 2), math.nan)
    row, column = (y // CELL).long().clamp(0, rows - 1), (x // CELL).long().clamp(0, columns - 1)
    field[row, column] = torch.stack([down, right], dim=1).repeat(4, 1)
    return field


def displacements(fields, indices, box, grid):
    """How far each tube has moved since the slice before, (t, h, w, 2) in tubes, 0 for the first:
    the median over its area and the frames between, 0 where all is missing.

    fields: a MotionRecorder's. indices: the clip's frames. box: the crop (top, left, height, width)
    in pixels that is resized to the clip, of grid (t, h, w) tubes.
    """
    (top, left, height, width), (t, h, w) = box, grid
    rows = ((top + (torch.arange(4 * h) + 0.5) * height / (4 * h)) // CELL).long()
    columns = ((left + (torch.arange(4 * w) + 0.5) * width / (4 * w)) // CELL).long()
    starts, motion = indices[::len(indices) // t], torch.zeros(t, h, w, 2)
    for s, (before, now) in enumerate(zip(starts, starts[1:]), start=1):
        between = [field[rows][:, columns] for start, end, field in fields
                   if start < now - 0.5 and end > before + 0.5]  # 4 x 4 points of each tube
        if between:
            points = rearrange(between, "f (h a) (w b) c -> h w (f a b) c", a=4, b=4)
            motion[s] = points.nanmedian(dim=2).values.nan_to_num() * (now - before)
    return motion * torch.tensor([h / height, w / width])  # pixels -> tubes


def motion_mask(motion, grid, ratio=0.9, generator=None):
    """A mask whose visible places move with the picture: (t*h*w,) bool, True where hidden.

    motion (t, h, w, 2): displacements, in tubes. A tube mask's visible places are those of one
    random slice, followed from there through the others; one that leaves the frame or meets another
    is replaced by a random free place. So every slice keeps the same number visible; without motion
    it is the tube mask that tube_mask draws from the same generator.
    """
    t, h, w = grid
    mask = tube_mask(1, grid, ratio, generator)[0]
    if not motion.any():
        return mask
    mask, start = mask.view(t, h, w), int(torch.randint(t, (1,), generator=generator))
    visible = {(i, j): (i, j) for i, j in (~mask[start]).nonzero().tolist()}
    onwards = [(s, motion[s]) for s in range(start + 1, t)]
    backwards = [(s, -motion[s + 1]) for s in reversed(range(start))]
    for way in (onwards, backwards):
        places = visible
        for s, moved in way:
            places, mask[s] = follow(places, moved, generator), True
            for tube in places:
                mask[s][tube] = False
    return mask.flatten()


def follow(places, motion, generator):
    """Places {(row, column) of a tube: exact (row, column)}, moved by motion (h, w, 2)."""
    (h, w, _), moved = motion.shape, {}
    for tube, (row, column) in places.items():
        down, right = motion[tube].tolist()
        place = row + down, column + right
        tube = round(place[0]), round(place[1])
        if 0 <= tube[0] < h and 0 <= tube[1] < w:
            moved.setdefault(tube, place)
    for i in torch.randperm(h * w, generator=generator).tolist():  # in place of those that are lost
        if len(moved) < len(places):
            moved.setdefault(divmod(i, w), divmod(i, w))
    return moved


class MotionClips(Clips):
    """Clips with motion_mask in place of tube_mask. Vectors are kept where decoded videos are."""

    def read(self, path, generator):
        watch, chosen, cache = MotionRecorder(), [], {} if self.cache is None else self.cache
        if ("motion", path) not in cache:
            cache.pop(path, None)  # decoded by other Clips, without its vectors

        def choose(n):
            chosen.extend(self.choose(n, self.frames, self.stride, generator)
                          for _ in range(self.repeat))
            return chosen

        clips, masks = self.frames_of(path, choose, watch), []
        fields = cache.setdefault(("motion", path), watch.fields)
        boxes = [self.crop(*clip.shape[-2:], generator) for clip in clips]
        for indices, box in zip(chosen, boxes):
            motion = displacements(fields, indices, box, self.grid)
            masks.append(motion_mask(motion, self.grid, self.ratio, generator))
        clips = [resize_crop(clip, box, self.size) for clip, box in zip(clips, boxes)]
        return torch.stack(clips), torch.stack(masks)


def motion_clips(videos, **options):
    """MotionClips, or Clips if none of 16 videos of the set has motion vectors; logs which."""
    tried, found = videos[::math.ceil(len(videos) / 16)], 0
    for path, _ in tried:
        watch = MotionRecorder()
        with suppress(VideoError):
            decode(path, lambda n: [range(min(n, 16))], watch=watch)
        found += bool(watch.fields)
    log(f"masks     {'follow motion' if found else 'of tubes'}: {found} of {len(tried)} videos "
        "tried hold motion vectors")
    return (MotionClips if found else Clips)(videos, **options)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = train.parser_with(__doc__, "root")
    add = parser.add_argument
    add("--data", **train.FLAGS["data"] | {"help": "the videos to try: k400, ssv2, ucf101, hmdb51, "
        "toy (default), a folder or a list"})
    add("--out", default="motion.png", help="the picture (default: motion.png)")
    commands = parser.add_subparsers(dest="command", metavar="train")
    commands.add_parser("train", add_help=False, help="pretrain with such masks; all after it are "
                        "flags of train.py, --help too")
    args, rest = parser.parse_known_args(argv)
    if args.command and argv[0] == "train":
        return train.main(argv[1:], clips_class=motion_clips)
    if args.command or rest:
        parser.error(f"unknown here: {' '.join(rest) or 'flags before train'}; those of train.py "
                     "come after train")
    videos, *_ = find_videos(train.locate(args.data, args.root))
    # The toy model's tubes have four frames; two show the motion better.
    tube = (2, 8, 8) if args.data == "toy" else (2, 16, 16)
    own = train.settings_for(args.data, "base")
    clips = motion_clips(videos, tube=tube, **{name: own[name] for name in (
        "frames", "stride", "size", "ratio")})
    if not isinstance(clips, MotionClips):
        raise UserError("without motion vectors masks are of tubes; extras/videos.py prepare writes"
                        " H.264, which has them")
    video, mask, *_ = collate([clips[0, i * len(clips) // 4] for i in range(4)])
    hidden = F.interpolate(mask.view(-1, 1, *clips.grid).float(), video.shape[2:])
    veiled = video.float().lerp(torch.tensor(128.0), 0.85 * hidden)
    rows = rearrange([video.float(), veiled], "k n c t h w -> (n k) t c h w")[:, ::tube[0]]
    rows = F.interpolate(rows.flatten(0, 1), scale_factor=max(1, 128 // clips.size))
    with TemporaryDirectory() as folder, draft_of(args.out) as draft:
        picture = Path(folder, Path(args.out).name)  # whose suffix tells the format
        save_image(rows / 255, picture, nrow=clips.grid[0], pad_value=1)
        shutil.copyfile(picture, draft)
    print(f"wrote {args.out}: clips, and below each what its mask leaves visible")


if __name__ == "__main__":
    sys.exit(launch(main))
