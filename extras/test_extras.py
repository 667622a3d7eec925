"""What the scripts in extras/ must do, as short tests: python -m pytest -q."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bench
import data
import features
import finetune
import motion
import pictures
import segment
import sigma
import train
import videos
import weights
from data import decode, find_videos, normalise
from finetune import Classifier
from sigma import Encoder, UserError, build_model, load_model, tube_mask


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a small toy set, and a pretraining run of one step, `run`."""
    folder = tmp_path_factory.mktemp("work")
    data.make_toy(folder / "data" / "toy", train=64, val=32)
    os.chdir(folder)
    assert run(train, "--max-steps", 1, "--out", "run") == 0
    return folder


@pytest.fixture
def work(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


def run(script, *arguments):
    """The exit code of a script's command line."""
    try:
        return train.launch(script.main, [str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's
        return end.code


def two_processes(script, *arguments):
    """What a script prints under torchrun, with two processes."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         script.__file__, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def grey_videos(folder, count, bad=()):
    """Videos (path, label) whose grey value is 20 times their label; those in bad can't be read."""
    for i in range(count):
        data.write_video(folder / f"{i}.mp4", torch.full((8, 32, 32, 3), 20 * i).byte())
        if i in bad:
            (folder / f"{i}.mp4").write_bytes(b"no video")
    return [(str(folder / f"{i}.mp4"), i) for i in range(count)]


def weights_of(out):
    return torch.load(f"{out}/last.pt", weights_only=True)["model"]


def results_of(out):
    return json.loads(Path(out, "results.json").read_text())




# --- features.py ----------------------------------------------------------------------------------

def test_features_come_in_list_order_for_readable_videos(work, tmp_path, capsys):
    paths, encoder = [p for p, _ in grey_videos(tmp_path, 6, bad=[4])], load_model("run").encoder
    (tmp_path / "list.csv").write_text("".join(f"{paths[i]} {i}\n" for i in (5, 2, 4, 0)))
    flags = ["--init", "run", "--data", tmp_path / "list.csv", "--out", tmp_path / "out"]
    assert run(features, *flags) == 0 and "4.mp4" in capsys.readouterr().out
    assert run(features, *flags) == 2  # nothing is overwritten
    assert run(features, *flags[:-1], tmp_path / "tokens", "--tokens") == 0
    tokens, pooled = (torch.load(tmp_path / out / "features.pt", weights_only=True)
                      for out in ("tokens", "out"))
    assert pooled["paths"] == [paths[i] for i in (5, 2, 0)] and pooled["labels"][1] == 2
    clips = torch.stack([decode(path, lambda n: [range(n)])[0] for path in pooled["paths"]])
    wanted = encoder(normalise(clips.transpose(1, 2), "cpu"))
    assert torch.allclose(tokens["features"], wanted, atol=1e-4)
    assert torch.allclose(pooled["features"], wanted.mean(dim=1), atol=1e-4)


def test_windows_slide_over_each_whole_video(work, tmp_path, capsys):
    data.write_video(tmp_path / "v.mp4", torch.randint(256, (20, 32, 32, 3)).byte())
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    flags = ["--init", "run", "--data", tmp_path, "--stride", 1, "--out", "windows"]
    assert run(features, *flags, "--window", 8, "--step", 4) == 0
    assert "bad.mp4" in capsys.readouterr().out
    written = torch.load(*Path("windows").glob("*.pt"), weights_only=True)
    assert written["starts"].tolist() == [0, 4, 8, 12] and written["features"].shape == (4, 128)
    clip = decode(tmp_path / "v.mp4", lambda n: [range(8, 16)])[0].transpose(0, 1)[None]
    wanted = load_model("run").encoder(normalise(clip, "cpu")).mean(dim=1)
    assert torch.allclose(written["features"][2:3], wanted, atol=1e-4)
    assert run(features, *flags, "--knn", "--val", tmp_path) == 2  # no labels


# --- finetune.py ----------------------------------------------------------------------------------

def test_a_classifier_its_drop_path_and_its_learning_rates():
    encoder = Encoder(dim=32, depth=2, heads=2, tube=(2, 8, 8))
    model, video = Classifier(encoder, 5, 0.25).double(), torch.randn(2, 3, 4, 32, 32).double()
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    first, last, x = *(block.attn for block in encoder.blocks), torch.randn(1, 3, 32).double()
    kept = (last(x.expand(4000, -1, -1)) / last.eval()(x)).flatten(1)
    assert set(kept[:, 0].round(decimals=6).tolist()) == {0, round(1 / 0.75, 6)}
    assert torch.allclose(kept, kept[:, :1]) and kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(first(x), first.eval()(x))
    tokens = encoder.patch_embed(sigma.take_tubes(video, (2, 8, 8))) + sigma.positions(32, 32)
    pooled = F.layer_norm(encoder.blocks.eval()(tokens).mean(dim=1), (32,), eps=1e-6)
    assert torch.allclose(model.eval()(video), pooled @ model.head.weight.T, atol=1e-12)
    rates = {p: (group["scale"], group["weight_decay"])
             for group in finetune.make_optimizer(model).param_groups for p in group["params"]}
    assert rates.keys() == set(model.parameters()) and rates[model.head.weight] == (1, 0.05)
    assert rates[first.q_bias] == (0.75 ** 2, 0)
    assert rates[encoder.patch_embed.proj.weight] == (0.75 ** 3, 0.05)


def test_mixed_labels_sum_to_one_and_frames_stay_alike(monkeypatch):
    """A still clip stays still, whatever distorts, erases and mixes it; mirrored only if asked."""
    still = torch.randint(256, (6, 3, 1, 16, 16)).byte().expand(-1, -1, 4, -1, -1)
    video, shares = map(torch.cat, zip(*(
        finetune.augment(still, torch.arange(6), 7, flip=True) for _ in range(20))))
    assert torch.allclose(video, video[:, :, :1].expand_as(video))
    assert torch.allclose(shares.sum(dim=1), torch.ones(120)) and shares.min() >= 0
    assert shares.amax(dim=1).median() < 0.99
    monkeypatch.setattr(finetune.v2, "RandAugment", lambda *_, **__: finetune.v2.Identity())
    ramp = torch.arange(32).mul(8).byte().expand(32, 3, 2, 32, 32)  # brighter to the right
    for flip in (False, True):
        columns = finetune.augment(ramp, torch.arange(32) % 4, 4, flip)[0].mean(dim=(1, 2, 3))
        assert (columns[:, 24:].sum(1) > columns[:, :8].sum(1)).all() == (not flip)


def test_frames_and_crops_to_train_and_to_test_on(tmp_path):
    for n in range(65, 365, 3):
        one, two = (finetune.dense_frames(n, 16, 4, data.seeded(n)) for _ in range(2))
        assert one == two == [min(int(one[0] + i * 64 / 15), one[0] + 63) for i in range(16)]
        parts = [index // 3 for index in finetune.segment_frames(50, 16, 2, data.seeded(n))]
        assert parts == list(range(16))
    assert finetune.dense_frames(30, 16, 4) == [0, 5, 10, 15, 20, 25] + [29] * 10
    assert finetune.segment_frames(4, 16, 2) == sorted([0, 1, 2, 3] * 4)
    areas = [height * width / 48 / 64 for _, _, height, width in (
        finetune.random_crop(48, 64, data.seeded(seed)) for seed in range(200))]
    assert 0.07 < min(areas) < 0.2 < 0.8 < max(areas) <= 1
    dense = finetune.view_frames(300, 16, 4, 5, "dense")  # every 4th: 75 frames
    assert [view[0] // 4 for view in dense] == [int(c * (75 - 16) / 4) for c in range(5)]
    assert finetune.view_frames(20, 16, 4, 5, "dense") == [[0, 4, 8, 12] + [16] * 12] * 5
    assert finetune.view_frames(9, 3, 2, 2, "segments") == [[0, 3, 6], [1, 4, 7]]
    path, chosen = str(tmp_path / "v.mp4"), [[0, 2, 4, 6], [1, 1, 1, 1]]
    data.write_video(path, torch.randint(256, (20, 48, 64, 3)).byte())
    views, *_ = finetune.Views([(path, 0)], frames=4, stride=2, size=24, tube=(2, 8, 8), repeat=6,
                               choose=lambda *_: chosen)[0, 0]
    clips = torch.stack(decode(path, lambda n: chosen)).transpose(1, 2)
    clips = data.transform.resize(clips, [24], antialias=False)  # 2 3 4 24 32
    wanted = torch.stack([clips[..., left:left + 24] for left in (0, 4, 8)], dim=1)
    assert torch.equal(views, wanted.flatten(0, 1))


def test_the_probe_moves_no_weight_of_the_encoder(work, capsys):
    flags = ["--freeze", "--init", "run", "--epochs", 2, "--limit", 40, "--out", "probe"]
    assert run(finetune, *flags) == 0 and "a new head" in capsys.readouterr().out
    before, after, results = weights_of("run"), weights_of("probe"), results_of("probe")
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("encoder."))
    assert after["head.weight"].abs().max() > 2e-4 and results["videos"] == 32
    Path("probe/results.json").write_text(json.dumps(results | {"summary": "as before"}))
    assert run(finetune, *flags) == 0 and "as before" in capsys.readouterr().out
    assert run(finetune, "--init", "probe", "--max-steps", 1, "--out", "on") == 0
    assert "head.weight" in capsys.readouterr().out
    for wrong in (["--model", "small"], ["--size", 30], ["--val", "data/toy/val/0_right"]):
        assert run(finetune, "--init", "run", "--out", "never", *wrong) == 2  # or: no labels


def test_fine_tuning_resumes_exactly_though_it_mixes(work, monkeypatch, capsys):
    monkeypatch.setitem(finetune.RECIPES["toy"], "augment", True)
    common = ["--epochs", 3, "--batch-size", 16, "--repeat", 2, "--accum", 1, "--out"]
    for flags in (["whole"], ["parts", "--max-steps", 5], ["parts"]):
        assert run(finetune, *common, *flags) == 0
    assert all(map(torch.equal, weights_of("whole").values(), weights_of("parts").values()))
    assert run(finetune, *common, "parts", "--views", 2, 1) == 0
    assert results_of("parts")["args"]["views"] == [2, 1]  # tested once more
    assert run(finetune, *common, "parts", "--lr", 0.5) == 2 and "0.5" in capsys.readouterr().err

    def fit(args, model, optimizer, clips, loss_of, **_):
        batch = data.collate([clips[0, 0], clips[0, 63]])  # of the first and the last class
        assert loss_of(lambda video: 99 * F.one_hot(torch.tensor([0, 0, 7, 7])), batch)[0] < 9.9
    monkeypatch.setattr(finetune, "fit", fit)
    assert run(finetune, "--no-augment", "--repeat", 2, "--out", "never") == 0


def test_recipes_are_the_published_ones_and_limits_are_fair(work):
    def of(*flags):
        args, _ = finetune.parse(["--data", *flags])
        return args.epochs, args.lr, args.global_batch, args.views, args.sampling
    assert of("k400") == (100, 1e-3, 256, [5, 3], "dense")
    assert of("ssv2") == (40, 1e-3, 32, [2, 3], "segments")
    assert of("ssv2", "--freeze")[:3] == (30, 1e-3, 384)
    assert of("mine", "--init", "run")[:3] == (10, 4e-3, 64)  # a tiny network takes toy's
    videos = list(enumerate([0] * 50 + [1] * 20 + [2] * 5))
    labels = [label for _, label in set(finetune.limit(videos, 40, seed=0))]
    assert sorted(map(labels.count, range(3))) == [5, 17, 18]


def test_two_processes_with_uneven_shares_get_one_s_accuracy(tmp_path, work):
    lines = [f"{path} {label % 3}" for path, label in grey_videos(tmp_path, 11, bad=[6])]
    (tmp_path / "train.csv").write_text("\n".join(lines[:5]))
    (tmp_path / "val.csv").write_text("\n".join(lines))
    flags = ["--data", tmp_path, "--init", "run", "--workers", 0, "--out"]
    probe = ["--freeze", "--lr", 1, "--batch-size"]  # drop path would draw other numbers
    for script, key, one, two in ((finetune, "top1", [*probe, 4], [*probe, 2]),
                                  (features, "knn", ["--knn"], ["--knn"])):
        assert run(script, *flags, f"{key}-1", *one) == 0
        assert "6.mp4" in two_processes(script, *flags, f"{key}-2", *two)
        one, two = results_of(f"{key}-1"), results_of(f"{key}-2")
        assert one[key] == two[key] and (two["videos"], two["unreadable"]) == (11, 1)




# --- videos.py ------------------------------------------------------------------------------------

ROWS = "label,youtube_id,time_start,time_end,split\n"
LAYOUTS = {  # files, None stands for a video; training and validation labels
    "k400": ({
        "x/abcdefghijk_000010_000020.mp4": None, "-bcdefghijk_000001_000011.mp4": None,
        "zzz_000000_000010.mp4": None, "t/train.csv": ROWS + "zumba,abcdefghijk,10,20,train\n"
        'abseiling,-bcdefghijk,1,11,train\n"a, b",gone,5,15,train\n',
        "t/val.csv": ROWS + "zumba,zzz,0,10,validate\n"}, [2, 1], [2]),
    "ssv2": ({
        "v/1.webm": None, "v/2.webm": None, "l/labels.json": '{"Hold a": "0", "Move a up": "1"}',
        "l/train.json": '[{"id": "1", "template": "Move [a] up"}, {"id": "9", "template": "Hold '
        '[a]"}]', "l/validation.json": '[{"id": "2", "template": "Hold [a]"}]'}, [1], [0]),
    "ucf101": ({
        "UCF-101/Yo/v_Yo_g01_c01.avi": None, "UCF-101/Kayak/v_Kayak_g01_c01.avi": None,
        "ucf/classInd.txt": "1 Kayak\r\n2 Yo\r\n",
        "ucf/trainlist01.txt": "Yo/v_Yo_g01_c01.avi 2\r\nYo/v_gone.avi 2\r\n",
        "ucf/testlist01.txt": "Kayak/v_Kayak_g01_c01.avi\r\n"}, [1], [0]),
    "hmdb51": ({
        "clap/a.avi": None, "clap/b.avi": None, "wave/a.avi": None,
        "splits/wave_test_split1.txt": "a.avi 1 \nd.avi 0 \n",
        "splits/clap_test_split1.txt": "a.avi 2 \nb.avi 1 \nc.avi 1 \n"}, [0, 1], [0])}


def put(root, files):
    """Writes texts by name, or tiny videos, None or a shade of grey."""
    for path, content in ((root / name, content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            data.write_video(root / "v.mp4", torch.full((8, 32, 48, 3), content or 0).byte())
            (root / "v.mp4").rename(path)


def labels_of(place, split="train"):
    return [label for _, label in find_videos(place, (split, ""))[0]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_tables_become_lists_that_train(name, tmp_path, capsys):
    files, *labels = LAYOUTS[name]
    out = tmp_path / "lists"
    put(tmp_path / "set", dict(list(files.items())[:-1]))  # a table lacks: no list is written
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 2 and not out.exists()
    assert "layout" in capsys.readouterr().err
    put(tmp_path / "set", files)
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 0
    assert [labels_of(out), labels_of(out, "val")] == labels
    assert len((out / "missing.txt").read_text().splitlines()) == 1
    assert run(train, "--data", name, "--root", out, "--model", "small", "--size", 32, "--frames",
               4, "--max-steps", 1, "--workers", 0, "--out", tmp_path / "run") == 0
    assert run(videos, "lists", name, tmp_path / "set", "--out", out) == 2  # not twice


def test_check_lists_the_good_and_names_the_bad(tmp_path):
    put(tmp_path / "set", {"train/a/1.mp4": 30, "train/b/2 2.mp4": 30, "train/b/3.mp4": "",
                           "val/b/4.mp4": 30, "train/b/notes.txt": ""})
    out = tmp_path / "checked"
    assert run(videos, "check", tmp_path / "set", "--out", out, "--workers", 2) == 0
    bad = (out / "bad.txt").read_text()
    assert "3.mp4: it can't be read" in bad and "notes.txt" in bad and bad.count("\n") == 2
    assert labels_of(out) == [0, 1] and labels_of(out, "val") == [1]
    assert run(videos, "check", tmp_path / "set", "--out", tmp_path / "set") == 2


def test_prepare_keeps_names_and_times_and_overwrites_nothing(tmp_path):
    """Of x.avi and x.mp4 each its own; lists find the new names, absolute paths lead to copies."""
    source, target = tmp_path / "a", tmp_path / "b"
    put(source, {"x/1.webm": 30, "bad.mp4": "text", "x.avi": 60, "x.mp4": 200, "list.csv":
                 f"x/1.webm 3\nx.avi 0\nx.mp4 1\n{source.resolve()}/x.mp4 2\n"})
    frames = torch.arange(80)[:, None, None, None].expand(80, 256, 342, 3).byte() * 3
    data.write_video(source / "long.mp4", frames, rate=25)
    assert run(videos, "prepare", source, target, "--workers", 2) == 0
    assert "bad.mp4: Invalid data" in (target / "bad.txt").read_text()
    with av.open(str(target / "long.mp4")) as container:
        stream, found = container.streams.video[0], list(container.decode(video=0))
        assert (stream.height, stream.width, len(container.streams)) == (256, 342, 1)
    assert [i for i, frame in enumerate(found) if frame.key_frame] == [0, 32, 64]
    assert sum(frame.pict_type == av.video.frame.PictureType.B for frame in found) >= 54
    assert [float(f.time) for f in found] == pytest.approx([i / 25 for i in range(80)], abs=1e-3)
    paths = [path for path, _ in find_videos(target / "list.csv")[0]]
    names = ["x/1.mp4", "x.avi", "x.mp4", "x.mp4"]
    assert paths == [str(target / name) for name in names]
    shades = [decode(path, lambda n: [[n - 1]])[0].float().mean().item()
              for path in [*paths, target / "long.mp4"]]
    assert shades == pytest.approx([30, 60, 200, 200, 237], abs=5)
    put(target, {"x.mp4": "mine", "list.csv": "mine"})
    (target / "x" / "1.mp4").unlink()
    assert run(videos, "prepare", source, target, "--workers", 0) == 0
    assert (target / "x" / "1.mp4").exists()
    assert [(target / name).read_text() for name in ("x.mp4", "list.csv")] == ["mine", "mine"]
    assert run(videos, "prepare", source, source / "x") == 2
    assert run(videos, "prepare", source / "x", source) == 2


def test_prepare_killed_leaves_only_complete_files(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(4):
        data.write_video(tmp_path / f"a/{i}.mp4", torch.randint(256, (60, 96, 128, 3)).byte())
    process = subprocess.Popen([sys.executable, videos.__file__, "prepare", tmp_path / "a",
                                tmp_path / "b", "--workers", "0"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("b/*.mp4")):
        with pytest.raises(subprocess.TimeoutExpired):  # it still runs
            process.wait(0.05)
    process.kill()
    process.wait()
    done = list(tmp_path.glob("b/*.mp4"))
    assert len(done) < 4 and all(len(decode(p, lambda n: [range(n)])[0]) == 60 for p in done)


# --- weights.py -----------------------------------------------------------------------------------

HUGGING_FACE = {  # parts of our names and theirs
    "encoder.patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "encoder.blocks": "videomae.encoder.layer", "encoder.norm": "videomae.layernorm",
    "decoder.blocks": "decoder.decoder_layers", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "attn": "attention.attention", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def theirs_of(model, target):
    """A model's weights as the authors' code names them, and as Hugging Face's does."""
    authors, hugging_face = {}, {}
    for name, weight in model.state_dict().items():
        prefix = "encoder." if target == "classes" else ""
        authors[name.removeprefix(prefix).replace("projector.", "head.")] = weight
        if target in ("pixel", "classes") or name.startswith("encoder."):
            for ours, theirs in HUGGING_FACE.items():
                name = name.replace(ours, theirs)
            if target in ("mlp", "dino"):
                name = name.removeprefix("videomae.")
            parts = ("query", "key", "value") if "qkv" in name else ("",)
            for part, rows in zip(parts, weight.chunk(len(parts))):
                hugging_face[name.replace("qkv", part)] = rows.clone()
    if target == "classes":
        for part in ("weight", "bias"):
            hugging_face[f"classifier.{part}"] = hugging_face.pop(f"head.{part}")
    return authors, hugging_face


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("target", ["mlp", "dino", "pixel", "classes"])
def test_every_layout_gives_the_same_network(target, tmp_path, monkeypatch):
    """Bit for bit, there and back. Heads come from flags, then from config.json."""
    monkeypatch.chdir(tmp_path)
    model = build_model("tiny", target=target.replace("classes", "mlp"), heads=8).eval()
    if target == "classes":
        model = Classifier(model.encoder, 5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    authors, hugging_face = theirs_of(model, target)
    clip, ours = torch.randn(1, 3, 8, 16, 16), model.state_dict()
    torch.save({"module": authors, "args": argparse.Namespace(lr=1e-3)}, "a.pth")
    torch.save(hugging_face, "b.bin")
    for source, flags in (("a.pth", ["--heads", 8]), ("b.bin", ["--heads", 8]), ("hf-a.pth", [])):
        assert run(weights, "import", source, f"{source}.pt", *flags) == 0
        kept = ours
        if source != "a.pth" and target in ("mlp", "dino"):
            kept = {name: w for name, w in ours.items() if name.startswith("encoder.")}
        assert same(torch.load(f"{source}.pt", weights_only=True)["model"], kept)
        assert torch.equal(load_model(f"{source}.pt").encoder(clip), model.encoder(clip))
        for to in ("authors", "hf"):
            export = ("export", f"{source}.pt", "--to", to, f"{to}-{source}")
            assert [run(weights, *export), run(weights, *export)] == [0, 2]  # not twice
        found = torch.load(f"hf-{source}/pytorch_model.bin", weights_only=True)
        assert same(found, hugging_face)
    assert same(torch.load("authors-a.pth", weights_only=True)["model"], authors)
    os.remove("hf-a.pth/pytorch_model.bin")  # config.json is not overwritten either
    assert run(weights, "export", "a.pth.pt", "--to", "hf", "hf-a.pth") == 2


def test_files_that_do_not_fit_stop_and_run_no_code(tmp_path, capsys):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    whole = build_model("tiny").state_dict()
    _, classifier = theirs_of(Classifier(build_model("tiny").encoder, 5), "classes")
    for content, missing, word in (
            (classifier, "fc_norm.", "mean pooling"), (classifier, "layer.0.layernorm", "norm1"),
            (classifier | {"extra": torch.zeros(1)}, "-", "extra"),
            (whole, "decoder.head.weight", "decoder.head.weight"),
            (whole | {"step": 1}, "-", "complete"), ({}, "-", "complete"),
            (whole | {"harm": Harmful()}, "-", "mkdir")):
        torch.save({n: w for n, w in content.items() if missing not in n}, tmp_path / "theirs.pt")
        assert run(weights, "import", tmp_path / "theirs.pt", tmp_path / "ours.pt") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "harm").exists() and not (tmp_path / "ours.pt").exists()


# --- bench.py -------------------------------------------------------------------------------------

def test_bench_names_the_bottleneck(work, capsys, monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work: work() is None or 1)  # once, as if in 1 s
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert run(bench, "--data", "toy", "--batch-size", 8, "--target", "dino-s") == 0
    shown = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert shown["training step"][0] == "8.00" and shown["bottleneck"][0] == "model"
    assert {"teacher", "Sinkhorn", "peak memory", "hours of the recipe"} <= set(shown)


# --- pictures.py ----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 64])  # finer than tubes in the small one
def test_painting_puts_each_tube_at_its_place(tmp_path, size):
    t, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (8, size, size)), indexing="ij")
    video, tube = (8 * t + y / 4 + 128 / size * x).expand(1, 3, -1, -1, -1), (4, 8, 8)
    maps = pictures.slide(video, tube, lambda x: sigma.take_tubes(x, tube).mean(dim=(3, 4, 5)))
    film = pictures.paint(tmp_path / "a.png", video, maps)[:, 16:-16].float()
    error = (film[:, :, 16:112] - film[:, :, 144:240]).abs().mean(dim=(1, 2, 3))
    assert error[2:6].max() < 6 if size == 32 else error.max() < 20


def test_the_framed_tube_is_at_its_place():
    video = torch.zeros(3, 8, 32, 32, dtype=torch.uint8)
    video[:, 7, 8:16, 16:24] = 99  # the last frame of the tube in slice 1, row 1, column 2
    image = pictures.frame_tube(video, torch.tensor(16 + 4 + 2), (4, 8, 8))[0]
    rows, columns = (image == 255).nonzero().float().mean(dim=0).tolist()
    assert (rows, columns) == pytest.approx((48, 80), abs=1)
    assert not image[128:, :64].any() and (image[128:, 64:] == 99).all()


def test_pictures_and_a_film_that_plays_are_written(work):
    """An encoder with pixel targets has no prototypes to show."""
    assert run(train, "--target", "pixel", "--max-steps", 1, "--out", "pixel") == 0
    names = {"masks.png", "components.png"}
    for out in ("pixel", "run"):
        assert run(pictures, out, "--split", "val", "--out", f"{out}-shown") == 0
        assert {path.name for path in Path(f"{out}-shown").iterdir()} == names
        names |= {"prototypes.png", "clusters.png", "clusters.mp4"}
    assert decode("run-shown/clusters.mp4", lambda n: [range(n)])[0].shape == (8, 3, 512, 256)


# --- motion.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("right", [0, 1])
def test_visible_places_pan_with_the_picture(right):
    """By one tube a slice; those that leave are replaced. Without motion it is the tube mask."""
    grid = t, h, w = 6, 8, 10
    pan = torch.tensor([0.0, right]).expand(t, h, w, 2)
    mask, again = (motion.motion_mask(pan, grid, 0.7, data.seeded(0)) for _ in range(2))
    assert torch.equal(mask, again)
    assert torch.equal(mask, tube_mask(1, grid, 0.7, data.seeded(0))[0]) == (right == 0)
    visible = ~mask.view(grid)
    for before, now in zip(visible[:-1, :, :w - right], visible[1:, :, right:]):
        assert (now >= before).all() or (before >= now).all()  # followed onwards or backwards
    busy = motion.motion_mask(2 * torch.randn(t, h, w, 2), grid, 0.7)  # places leave, or meet
    for found in (mask, busy):
        assert (found.view(t, h * w).sum(dim=1) == int(0.7 * 80)).all()


def write_pan(path, right=3):
    """Forty frames of a window that pans over a picture, encoded as prepare does it."""
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=data.seeded(0)), (480, 640),
                            mode="bicubic")[0].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    options = {"preset": "veryfast", "crf": "22", "tune": "fastdecode", "g": "32", "bf": "3",
               "x264-params": "b-pyramid=none:b-adapt=0:scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuv420p"
        for i in range(40):
            frame = picture[2 * i:2 * i + 240, right * i:right * i + 320].contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_vectors_of_a_known_pan_are_right_nine_times_of_ten(tmp_path):
    """Within half a pixel a frame; the content moves against the window."""
    watch = motion.Watch()
    write_pan(tmp_path / "v.mp4")
    decode(tmp_path / "v.mp4", lambda n: [range(0, 32, 2)], watch=watch)
    vectors = torch.cat([field[field.isfinite().all(dim=2)] for _, field in watch.fields])
    right = ((vectors - torch.tensor([-2.0, -3.0])).abs() <= 0.5).all(dim=1)
    assert len(vectors) > 10_000 and right.float().mean() > 0.9


def test_crop_resize_and_flip_transform_the_motion():
    def moved(field, *box, **options):  # from frame 0 to frame 2
        return motion.displacements([(1.0, field)], [0, 2], box, (2, 15, 20), **options)[1]

    field = torch.tensor([4.0, -8.0]).expand(30, 40, 2)  # pixels a frame, of 240 x 320
    whole = moved(field, 0, 0, 240, 320)
    assert torch.allclose(whole, torch.tensor([0.5, -1.0]).expand(15, 20, 2))
    assert torch.allclose(moved(field, 60, 80, 120, 160), 2 * whole)  # enlarged twice
    half = torch.cat([field[:, :20], torch.full((30, 20, 2), float("nan"))], dim=1)
    mirrored = moved(half, 0, 0, 240, 320, flip=True)
    assert (mirrored[:, 10:, 1] == 1).all() and not mirrored[:, :10].any()


def test_motion_clips_are_the_same_in_any_worker(tmp_path):
    """Their frames are those of plain Clips, who may have decoded a kept video before."""
    for i in range(3):
        write_pan(tmp_path / f"{i}.mp4", right=i)
    videos, keys, cache = find_videos(tmp_path)[0], [(0, 0), (1, 1), (2, 2), (3, 2)], {}
    options = dict(frames=16, stride=2, size=64, tube=(2, 8, 8), ratio=0.75)
    plain = data.Clips(videos, **options, cache=cache)
    clips, kept = (motion.MotionClips(videos, **options, cache=some)
                   for some in (None, cache))
    still, alone, shared, again, third = (
        next(iter(data.loader(some, 4, keys, workers)))[:2]
        for some, workers in ((plain, 0), (clips, 0), (clips, 2), (kept, 0), (kept, 0)))
    assert all(torch.equal(video, still[0]) for video, _ in (alone, shared, again, third))
    assert all(torch.equal(mask, alone[1]) for _, mask in (shared, again, third))
    assert not torch.equal(alone[1], still[1])


def test_training_with_motion_masks_resumes_exactly(work, capsys):
    flags = ["--mask", "motion", "--epochs", "2", "--batch-size", "16", "--accum", "1", "--out"]
    assert run(train, *flags, "moved") == 0
    assert run(train, *flags, "stopped", "--max-steps", 3) == run(train, *flags, "stopped") == 0
    whole, parts = weights_of("moved"), weights_of("stopped")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "follow motion" in capsys.readouterr().out
    assert run(motion, "--out", "motion.png") == 0 and Path("motion.png").exists()


def test_a_set_without_vectors_goes_on_with_tube_masks(tmp_path):
    save_image(torch.rand(3, 32, 32), tmp_path / "a.png")
    assert motion.clips_for(find_videos(tmp_path)[0], print) is data.Clips
    assert run(motion, "--data", tmp_path) == 2


# --- segment.py -----------------------------------------------------------------------------------

def write_png(path, rows, form):
    """A PNG of (H, W) numbers, "gray" or with a palette, "pal8"."""
    image, palette = rows.byte().numpy(), torch.arange(1024).byte().view(256, 4).numpy()
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *rows.shape, form
        content = (image, palette) if form == "pal8" else image
        container.mux(stream.encode(av.VideoFrame.from_ndarray(content, format=form)))
        container.mux(stream.encode(None))


SQUARES = torch.zeros(48, 48, dtype=torch.long)  # three segments: 0, and two rectangles
SQUARES[:24, :24], SQUARES[24:, 16:] = 1, 2


def test_annotations_are_read_as_indices_not_colours(tmp_path):
    void = torch.where(torch.arange(48 * 48).view(48, 48) == 47, 255, SQUARES)
    write_png(tmp_path / "palette.png", void, "pal8")
    write_png(tmp_path / "grey.png", (SQUARES == 1) * 255, "gray")
    assert torch.equal(segment.read_mask(tmp_path / "palette.png"), SQUARES)
    assert torch.equal(segment.read_mask(tmp_path / "grey.png"), (SQUARES == 1).long())
    save_image(torch.rand(3, 8, 8), tmp_path / "colours.png")
    with pytest.raises(UserError, match="colours"):
        segment.read_mask(tmp_path / "colours.png")


def test_tokens_that_know_their_segment_give_100_percent():
    true = SQUARES.expand(2, 48, 48)
    tokens = F.one_hot(true[:, ::8, ::8], 16).float()  # a token for 8 x 8 pixels
    tokens += 0.2 * torch.randn(tokens.shape, generator=data.seeded(0))
    found = segment.maps(tokens, 3, argparse.Namespace(restarts=5, size=48), data.seeded(0))
    found = found[:, 4::8, 4::8].repeat_interleave(8, 1).repeat_interleave(8, 2)
    for order in ([0, 1, 2], [2, 0, 1]):  # the numbers mean nothing
        renamed = torch.tensor(order)[true]
        assert torch.equal(segment.clustering(found, renamed, 3), renamed)


def test_a_small_example_by_hand():
    true = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = segment.clustering(torch.tensor([1, 1, 1, 2, 2, 2, 0, 2]), true, 3)
    _, ious = segment.compare(found, true, 3, 3)
    assert ious.diagonal().tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 2])
    over = torch.tensor([3, 3, 4, 4, 0, 1, 2, 2])
    assert torch.equal(segment.overclustering(over, true, 5, 3), true)
    greedy = torch.tensor([[0.9, 0.8], [0.8, 0.0]])  # the best pair alone is not the best sum
    assert segment.match(greedy) == [1, 0]


def test_videos_of_any_length_and_missing_segments(tmp_path, work):
    """One object leaves; frames without annotation; two processes give what one gives."""
    for video, length in (("a", 3), ("b", 9)):
        folders = [tmp_path / kind / "480p" / video for kind in ("JPEGImages", "Annotations")]
        for i in range(length):
            rows = torch.where((SQUARES == 2) & torch.tensor(i > 3), 0, SQUARES)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            save_image(0.2 + 0.3 * rows.float().expand(3, -1, -1), folders[0] / f"{i:05}.jpg")
            if i % 4 != 3:
                write_png(folders[1] / f"{i:05}.png", rows, "pal8")
    flags = ["--root", tmp_path, "--model", "tiny", "--frames", 4, "--size", 32, "--out"]
    assert run(segment, *flags, tmp_path / "one", "--pictures") == 0
    one = results_of(tmp_path / "one")
    assert set(one["videos"]) == {"a", "b"} and 0 < one["clustering"][0] <= 1
    assert decode(tmp_path / "one" / "b.mp4", lambda n: [[0]])[0].shape[-2:] == (32, 128)
    assert two_processes(segment, *flags, tmp_path / "two").count("mIoU") == 2
    assert results_of(tmp_path / "two")["videos"] == one["videos"]
    assert run(segment, "--root", tmp_path / "one") == 2
