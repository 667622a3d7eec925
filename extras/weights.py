"""Other people's checkpoints into ours, and ours into theirs; the weights stay the same to the bit.

    python extras/weights.py import FILE_OR_FOLDER videomae.pt
    python extras/weights.py export out/k400-base-mlp --to authors sigma.pth
    python extras/weights.py export out/k400-base-pixel --to hf FOLDER

import takes Hugging Face's VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification
(a folder, or a .bin, .pt or .safetensors file), and files of the authors' and VideoMAE's code, fine-
tuned ones too. What it writes fits sigma.load_model and any --init. export takes these and runs.
Its --to hf is pytorch_model.bin with config.json beside it: a VideoMAEForPreTraining if the target
is pixels, a VideoMAEForVideoClassification of a classifier, else the encoder as a VideoMAEModel.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started

from sigma import SIGMA, Encoder, UserError, fill, sizes_of
from train import RECIPE, launch, save_atomically

NAMES = [  # ours and Hugging Face's, in this order: how names begin, then parts within blocks
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."), ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."), ("head.", "classifier."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense.")]
QKV = ("query", "key", "value")  # three weights of theirs in the order of our one


def renamed(name, pairs):
    """A name with old parts replaced by new ones: anywhere if they begin with a dot."""
    for old, new in pairs:
        if old[0] == "." or name.startswith(old):
            name = name.replace(old, new)
    return name


def from_hugging_face(weights):
    """Weights in Hugging Face's names -> in ours."""
    prefix = "" if any(name.startswith("videomae.") for name in weights) else "videomae."
    pairs = [(theirs, ours) for ours, theirs in NAMES]
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # in memory, transformers 5
    found = {renamed(prefix + name, pairs): w for name, w in weights.items()}
    for name in [name for name in found if name.endswith(".query.weight")]:
        qkv = torch.cat([found.pop(name.replace("query", part)) for part in QKV])
        found[name.replace("query", "qkv")] = qkv
    return found


def read(path):
    """The weights of a file or folder, in our names, and what else it tells, such as "sizes": two
    dictionaries. Runs no code from it. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("last.pt", "pytorch_model.bin", "model.safetensors")]
        path = next(filter(Path.is_file, files), files[0])
    config = path.with_name("config.json")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # flags in older files
                content = torch.load(path, map_location="cpu", weights_only=True)
        key = next(filter(content.__contains__, ("model", "module", "state_dict")), None)
        weights, about = (content[key], content) if key else (content, {})
        weights = {name.removeprefix("module."): w.detach() for name, w in weights.items()}  # DDP's
        weights = {re.sub(r"^head\.(?=\d)", "projector.", n): w for n, w in weights.items()}
        if any("layernorm_before" in name for name in weights):
            weights = from_hugging_face(weights)
            if config.is_file():
                about = json.loads(config.read_text())
                about["args"] = dict(frames=about["num_frames"], size=about["image_size"],
                                     stride=RECIPE["stride"])  # the stride is nowhere
        elif any(name.startswith("blocks.") for name in weights):  # the authors', fine-tuned
            weights = {name if name.startswith(("fc_norm.", "head.")) else f"encoder.{name}": w
                       for name, w in weights.items()}
        return weights, {"sizes": sizes_of(weights)} | about
    except ImportError as error:
        raise UserError(f"{path} takes a package: pip install safetensors") from error
    except KeyError as error:
        raise UserError(f"{path} is no complete SIGMA or VideoMAE: it lacks {error}") from error
    except Exception as error:  # whatever a damaged or foreign file brings about
        asks = re.search(r"GLOBAL \S+", str(error))  # for code
        reason = asks[0] if asks else str(error).partition("\n")[0][:200]
        raise UserError(f"{path} can't be read as a checkpoint ({reason})") from error


def convert(path, heads=None, decoder_heads=None):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": their network's}, and
    "args" with frames, size and stride of its clips if it tells them.

    heads, decoder_heads: by default config.json's, or the paper's for this width. Raises UserError,
    with what differs, unless every weight has its place.
    """
    weights, about = read(path)
    sizes = {name: number for name, number in about["sizes"].items() if name != "classes"}
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} is a classifier without mean pooling (no fc_norm): not supported")
    for part, given in (("", heads), ("decoder_", decoder_heads)):
        if width := sizes.get(f"{part}dim"):
            number = given or about.get(f"{part}num_attention_heads") or sizes[f"{part}heads"]
            if not number or width % number:
                raise UserError(f"{path} doesn't tell how many heads share a width of {width}: "
                                f"give --{part.replace('_', '-')}heads, a divisor of it")
            sizes[f"{part}heads"] = number
    with torch.device("meta"):  # the network without its memory: does every weight fit?
        model = nn.ModuleDict({"encoder": Encoder(**sizes)}) if "target" not in sizes else SIGMA(**sizes)
        if "encoder.norm.weight" not in weights:
            model.encoder.norm = nn.Identity()
        if "fc_norm.weight" in weights:
            sizes["classes"] = len(weights.get("head.weight", ()))
            model.fc_norm = nn.LayerNorm(sizes["dim"])
            model.head = nn.Linear(sizes["dim"], sizes["classes"])
    fill(model, {name: w.to("meta") for name, w in weights.items()}, path)
    content = {"model": weights, "sizes": sizes}
    if isinstance(about.get("args"), dict):
        content["args"] = about["args"]
    return content


def to_hugging_face(weights, sizes, frames, size):
    """Weights in our names, their sizes, frames and size of the clips -> Hugging Face's weights,
    config, and the parts that have no place there. Raises UserError."""
    tubelet, patch, other = sizes["tube"]
    if patch != other:
        raise UserError(f"Hugging Face takes square patches alone, not {patch} x {other}")
    kind = "Model"
    if sizes.get("target") == "pixel":
        kind = "ForPreTraining"
    elif "classes" in sizes:
        kind = "ForVideoClassification"
    kept = [name for name in weights if kind != "Model" or name.startswith("encoder.")]
    found = {renamed(name, NAMES): weights[name] for name in kept}
    for name in [name for name in found if name.endswith(".qkv.weight")]:
        for part, rows in zip(QKV, found.pop(name).chunk(3)):
            found[name.replace("qkv", part)] = rows.clone()
    if kind == "Model":
        found = {name.removeprefix("videomae."): w for name, w in found.items()}
    config = dict(
        model_type="videomae", architectures=[f"VideoMAE{kind}"], image_size=size, qkv_bias=True,
        num_frames=frames, num_channels=3, patch_size=patch, tubelet_size=tubelet,
        hidden_act="gelu", layer_norm_eps=1e-6, num_labels=sizes.get("classes", 2),
        use_mean_pooling="encoder.norm.weight" not in weights)
    for part in ("", "decoder_") if kind == "ForPreTraining" else ("",):
        config |= {f"{part}hidden_size": sizes[f"{part}dim"],
                   f"{part}intermediate_size": 4 * sizes[f"{part}dim"],
                   f"{part}num_hidden_layers": sizes[f"{part}depth"],
                   f"{part}num_attention_heads": sizes[f"{part}heads"]}
    return found, config, sorted({name.split(".")[0] for name in weights.keys() - kept})


def to_authors(weights):
    """Weights in our names -> in the names of the authors' code."""
    prefix = "encoder." if "fc_norm.weight" in weights else ""  # fine-tuned ones have none
    return {renamed(name.removeprefix(prefix), [("projector.", "head.")]): w
            for name, w in weights.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["import", "export"])
    add("source", help="a checkpoint, or the folder of a run or of Hugging Face's")
    add("out", type=Path, help="the file to write; for --to hf it may be a folder")
    add("--to", choices=["hf", "authors"], help="for export: whose names and layout")
    add("--heads", type=int, help="of attention, if neither file nor width tells them")
    add("--decoder-heads", type=int, help="the same for the decoder")
    args = parser.parse_args(argv)
    if (args.command == "export") != bool(args.to):
        parser.error("export takes --to hf or --to authors, import does not")
    content, config, out = convert(args.source, args.heads, args.decoder_heads), None, args.out
    if args.to == "authors":
        content = {"model": to_authors(content["model"])}
    elif args.to == "hf":
        out = out if out.suffix else out / "pytorch_model.bin"
        clip = RECIPE | content.get("args", {})
        content, config, left = to_hugging_face(
            content["model"], content["sizes"], clip["frames"], clip["size"])
        print(f"left out, as it has no place there: {', '.join(left) or 'nothing'}")
    beside = out.with_name("config.json")
    if out.exists() or config and beside.exists():
        raise UserError(f"{out} or {beside.name} beside it is there already: choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(out, content)
    if config:
        beside.write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
