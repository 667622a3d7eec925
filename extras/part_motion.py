# --- motion.py ------------------------------------------------------------------------------------

def still_motion(t, h, w, down=0.0, right=0.0):
    return torch.tensor([down, right]).expand(t, h, w, 2)


def test_without_motion_the_mask_is_the_tube_mask():
    for seed in range(5):
        grid = (8, 14, 14)
        tube = tube_mask(1, grid, 0.9, data.seeded(seed))[0]
        found = motion.motion_mask(still_motion(*grid), grid, 0.9, data.seeded(seed))
        assert torch.equal(found, tube)


def test_visible_places_pan_with_the_picture():
    """By one tube a slice; those that leave are replaced, each slice shows as many."""
    grid = t, h, w = 6, 8, 10
    mask = motion.motion_mask(still_motion(t, h, w, right=1.0), grid, 0.7, data.seeded(0))
    mask = mask.view(t, h, w)
    assert (mask.flatten(1).sum(dim=1) == int(0.7 * 80)).all()
    for before, now in zip(~mask[:-1, :, :-1], ~mask[1:, :, 1:]):  # now: one column further
        followed_on, followed_back = (now >= before).all(), (before >= now).all()
        assert followed_on or followed_back
    again = motion.motion_mask(still_motion(t, h, w, right=1.0), grid, 0.7, data.seeded(0))
    assert torch.equal(again.view_as(mask), mask)


def test_places_that_meet_leave_one_and_a_free_one():
    field = torch.zeros(1, 4, 2)
    field[0, 0, 1], field[0, 2, 1] = 1, -1  # both go to column 1
    places = motion.follow([(0.0, 0.0), (0.0, 2.0)], field, data.seeded(0))
    tubes = {round(column) for _, column in places}
    assert len(tubes) == 2 and 1 in tubes


def write_pan(path, down=2, right=3, options=None):
    """Forty frames of a window that pans over a picture, encoded as prepare does it."""
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=data.seeded(0)), (480, 640),
                            mode="bicubic")[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    options = options or {"preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32",
                          "keyint_min": "32", "sc_threshold": "0", "bf": "3",
                          "x264-params": "b-pyramid=none:b-adapt=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(40):
            frame = picture[down * i:down * i + 240, right * i:right * i + 320].contiguous()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def test_vectors_of_a_known_pan_are_right_nine_times_of_ten(tmp_path):
    """Within half a pixel a frame; the content moves against the window."""
    watch = motion.Watch()
    data.decode(write_pan(tmp_path / "v.mp4"), lambda n: list(range(0, 32, 2)), watch=watch)
    vectors = torch.cat([field.flatten(0, 1) for _, field in watch.fields])
    vectors = vectors[vectors.isfinite().all(dim=1)]
    right = ((vectors - torch.tensor([-2.0, -3.0])).abs() <= 0.5).all(dim=1)
    assert len(vectors) > 10_000 and right.float().mean() > 0.9


def test_crop_resize_and_flip_transform_the_motion():
    field = torch.tensor([4.0, -8.0]).expand(30, 40, 2)  # pixels a frame, of 240 x 320
    whole = motion.tube_motion([field], (0, 0, 240, 320), (1, 15, 20))
    assert torch.allclose(whole, torch.tensor([0.25, -0.5]).expand(15, 20, 2))
    half = motion.tube_motion([field], (60, 80, 120, 160), (1, 15, 20))  # enlarged twice
    assert torch.allclose(half, 2 * whole)
    left = torch.zeros(30, 40, 2)
    left[:, :20] = torch.tensor([0.0, 16.0])
    mirrored = motion.tube_motion([left], (0, 0, 240, 320), (1, 15, 20), flip=True)
    assert (mirrored[:, 10:, 1] == -1).all() and not mirrored[:, :10].any()
    missing = torch.full((30, 40, 2), float("nan"))
    assert not motion.tube_motion([missing], (0, 0, 240, 320), (1, 15, 20)).any()


def test_motion_clips_are_the_same_in_any_worker(tmp_path):
    for i in range(3):
        write_pan(tmp_path / f"{i}.mp4", right=i)
    options = dict(frames=16, stride=2, size=64, tube=(2, 8, 8), ratio=0.75)
    videos, keys = data.find_videos(tmp_path), [(0, 0), (1, 1), (2, 2), (3, 2)]
    clips = motion.MotionClips(videos, **options)
    alone, shared = (next(iter(data.loader(clips, 4, keys, workers))) for workers in (0, 2))
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    plain = next(iter(data.loader(data.Clips(videos, **options), 4, keys, 0)))
    assert torch.equal(plain[0], alone[0]) and not torch.equal(plain[1][3], alone[1][3])
    slices = alone[1][3].view(8, -1)
    assert (slices != slices[:1]).any() and (slices.sum(dim=1) == 48).all()
    kept = motion.MotionClips(videos, **options, cache={})
    assert torch.equal(kept[3, 2][1], kept[3, 2][1]) and kept[3, 2][1].shape == (1, 512)


def test_training_with_motion_masks_resumes_exactly(work, capsys):
    flags = ["--mask", "motion", "--epochs", "2", "--batch-size", "16", "--accum", "1"]
    assert run(train, *flags, "--out", "whole") == 0
    assert run(train, *flags, "--out", "parts", "--max-steps", 3) == 0
    assert run(train, *flags, "--out", "parts") == 0
    whole, parts = (torch.load(f"{out}/last.pt", weights_only=True)["model"]
                    for out in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "64 videos" in capsys.readouterr().out


def test_a_set_without_vectors_goes_on_with_tube_masks(tmp_path):
    write_pan(tmp_path / "v.mp4", options={"preset": "veryfast", "g": "1"})  # intra frames alone
    said, videos = [], data.find_videos(tmp_path)
    assert motion.clips_for(videos, said.append) is data.Clips and len(said) == 1
