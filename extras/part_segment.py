# --- segment.py -----------------------------------------------------------------------------------

def write_png(path, rows, palette):
    """An 8-bit PNG of (H, W) numbers, with a palette (colour type 3) or grey (0)."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    height, width = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3 if palette else 0, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(row) for row in rows.tolist())
    colours = chunk(b"PLTE", bytes(i * 37 % 256 for i in range(768))) if palette else b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def squares(height=48, width=50):
    """Three segments: 0, and two rectangles."""
    rows = torch.zeros(height, width, dtype=torch.long)
    rows[8:24, 8:24], rows[32:40, 32:48] = 1, 2
    return rows


def test_annotations_are_read_as_indices_not_colours(tmp_path):
    rows = squares()
    rows[0, 0] = 255  # void
    write_png(tmp_path / "palette.png", rows, palette=True)
    assert torch.equal(segment.read_mask(tmp_path / "palette.png"), squares())
    write_png(tmp_path / "grey.png", (squares() == 1) * 255, palette=False)
    assert torch.equal(segment.read_mask(tmp_path / "grey.png"), (squares() == 1).long())
    save_image(torch.rand(3, 8, 8), tmp_path / "colours.png")
    with pytest.raises(UserError, match="colours"):
        segment.read_mask(tmp_path / "colours.png")


def test_tokens_that_know_their_segment_give_100_percent():
    """And the numbers of segments and clusters mean nothing."""
    true = squares(48, 48).expand(2, 48, 48)
    args = argparse.Namespace(restarts=5, size=48)
    tokens = F.one_hot(true[:, ::8, ::8], 3).float()  # a token for 8 x 8 pixels
    for order in ([0, 1, 2], [2, 0, 1]):
        renamed = torch.tensor(order)[true]
        found = segment.maps(tokens, 3, args, data.seeded(0))
        found = F.one_hot(found[:, 4::8, 4::8], 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
        scores, same = segment.clustering(found.argmax(-1), renamed, 3)
        assert torch.equal(scores, torch.ones(3)) and torch.equal(same, renamed)


def test_random_clusters_give_what_chance_gives():
    generator = data.seeded(0)
    true = torch.randint(2, (4, 100, 100), generator=generator)
    found = torch.randint(2, (4, 100, 100), generator=generator)
    scores, _ = segment.clustering(found, true, 2)
    assert scores.tolist() == pytest.approx([1 / 3] * 2, abs=0.02)  # 1/4 shared of 3/4
    found = torch.randint(10, (4, 100, 100), generator=generator)
    scores, merged = segment.overclustering(found, true, 10, 2)
    for i in range(2):
        both, either = ((merged == i) & (true == i)).sum(), ((merged == i) | (true == i)).sum()
        assert scores[i].item() == pytest.approx((both / either).item())


def test_a_small_example_by_hand():
    true = torch.tensor([[[0, 0, 0, 0, 1, 1, 2, 2]]])
    found = torch.tensor([[[1, 1, 1, 0, 0, 0, 2, 0]]])
    scores, _ = segment.clustering(found, true, 3)
    assert scores.tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 2])
    over = torch.tensor([[[3, 3, 4, 4, 0, 1, 2, 2]]])
    assert segment.overclustering(over, true, 5, 3)[0].tolist() == [1, 1, 1]
    greedy = torch.tensor([[0.9, 0.8], [0.8, 0.0]])  # the best pair alone is not the best sum
    assert segment.match(greedy) == [1, 0]


def test_videos_of_any_length_and_missing_segments(tmp_path, work, capsys):
    """One object leaves; frames without annotation; two processes give what one gives."""
    for video, length in (("a", 3), ("b", 9)):
        for i in range(length):
            rows = squares() * ((squares() != 2) | torch.tensor(i < 4))
            image = 0.2 + 0.3 * rows.float().expand(3, -1, -1)
            folder = tmp_path / "JPEGImages" / "480p" / video
            folder.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / f"{i:05}.jpg")
            if i % 4 != 3:
                mask = tmp_path / "Annotations" / "480p" / video / f"{i:05}.png"
                write_png(mask, rows, palette=True)
    flags = ["--root", str(tmp_path), "--model", "tiny", "--frames", 4, "--size", 32, "--pictures"]
    assert run(segment, *flags, "--out", tmp_path / "one") == 0
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(one["videos"]) == {"a", "b"} and 0 < one["clustering"][0] <= 1
    assert decode(str(tmp_path / "one" / "b.mp4"), range).shape[-2:] == (32, 128)
    result = subprocess.run([*TORCHRUN, str(HERE / "segment.py"), *map(str, flags), "--out",
                             str(tmp_path / "two")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["videos"] == one["videos"] and result.stdout.count("mIoU") == 2
    assert run(segment, "--root", tmp_path / "one") == 2
    with pytest.raises(SystemExit):
        run(segment, *flags[:4], "--size", 30)
