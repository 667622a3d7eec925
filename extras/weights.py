"""Other people's checkpoints into ours, and ours into theirs; the weights stay the same to the bit.

    python extras/weights.py import FILE_OR_FOLDER videomae.pt
    python extras/weights.py export out/k400-base-pixel --to hf FOLDER     or: --to authors FILE.pth

import takes Hugging Face's VideoMAEModel, VideoMAEForPreTraining, VideoMAEForVideoClassification (a
folder; .bin, .pt; .safetensors with that package), and files of the authors' and VideoMAE's code,
fine-tuned ones too. It writes what sigma.load_model and any --init take. export takes these and
runs; hf is a file and its config.json, of the encoder alone if the target is not pixels or classes.
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
QKV = ("query", "key", "value")  # three weights of theirs, in the order of our one


def renamed(weights, pairs):
    """The weights with old parts of their names made new: anywhere if they begin with a dot."""
    for old, new in pairs:
        weights = {name.replace(old, new) if old[0] == "." or name.startswith(old) else name: w
                   for name, w in weights.items()}
    return weights


def our_names(weights):
    """Weights in the names of Hugging Face's code, the authors' or ours -> in ours."""
    pairs = [("module.", ""), ("videomae.", "")]  # DDP's; all but VideoMAEModel's
    pairs += [(part, f"encoder.{part}") for part in ("patch_embed.", "blocks.", "norm.")]
    pairs += [(theirs.removeprefix("videomae."), ours) for ours, theirs in NAMES]
    newer = [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # in memory, transformers 5
    weights = renamed(weights, pairs + newer)
    for name in [name for name in weights if name.endswith(".query.weight")]:
        qkv = torch.cat([weights.pop(name.replace("query", part)) for part in QKV])
        weights[name.replace("query", "qkv")] = qkv
    return {re.sub(r"^head\.(?=\d)", "projector.", n): w.detach() for n, w in weights.items()}


def convert(path, heads=None, decoder_heads=None):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": their network's,
    "args": frames, size and stride of its clips if it tells them}. heads, decoder_heads: by default
    config.json's, or the paper's for networks as wide. Runs no code of the file. Raises UserError,
    with what differs, unless each weight has its place."""
    names = ("last.pt", "pytorch_model.bin", "model.safetensors")  # in a folder
    path = next((Path(path, name) for name in names if Path(path, name).is_file()), Path(path))
    config = path.with_name("config.json")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            about = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # flags in older files
                about = torch.load(path, map_location="cpu", weights_only=True)
        theirs = about.get("model", about.get("module", about))
        weights = our_names(theirs)
        if any("layernorm_before" in name for name in theirs) and config.is_file():
            about = json.loads(config.read_text())
        if "mask_token" in weights:
            weights["decoder.head.weight"]  # KeyError, as sizes_of takes it for an encoder
        sizes = about.get("sizes") or sizes_of(weights)
    except KeyError as error:
        raise UserError(f"{path} is no complete SIGMA or VideoMAE: it lacks {error}") from error
    except Exception as error:  # whatever a damaged or foreign file brings about
        reason = re.findall(r"^.*|GLOBAL \S+", str(error))[-1][:200]  # GLOBAL: code it asks for
        raise UserError(f"{path} can't be read as a checkpoint ({reason})") from error
    sizes = {name: value for name, value in sizes.items() if name != "classes"}
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} is a classifier without mean pooling (no fc_norm): not supported")
    for part, given in (("", heads), ("decoder_", decoder_heads)):
        if width := sizes.get(f"{part}dim"):
            number = given or about.get(f"{part}num_attention_heads") or sizes[f"{part}heads"]
            if not number or width % number:
                raise UserError(f"{path} needs --{part.replace('_', '-')}heads that divide {width}")
            sizes[f"{part}heads"] = number
    with torch.device("meta"):  # the network without its memory: does each weight fit?
        net = SIGMA(**sizes) if "target" in sizes else nn.ModuleDict({"encoder": Encoder(**sizes)})
        if "encoder.norm.weight" not in weights:
            net.encoder.norm = nn.Identity()
        if "fc_norm.weight" in weights:
            sizes["classes"] = len(weights.get("head.weight", ()))
            net.fc_norm = nn.LayerNorm(sizes["dim"])
            net.head = nn.Linear(sizes["dim"], sizes["classes"])
    fill(net, {name: w.to("meta") for name, w in weights.items()}, path)
    args = about["args"] if isinstance(about.get("args"), dict) else {}  # not a Namespace
    if {"num_frames", "image_size"} <= about.keys():  # config.json tells all but the stride
        args = dict(frames=about["num_frames"], size=about["image_size"], stride=RECIPE["stride"])
    return {"model": weights, "sizes": sizes} | ({"args": args} if args else {})


def to_hugging_face(weights, sizes, frames, size):
    """Weights in our names, their sizes, frames and size of the clips -> Hugging Face's weights,
    config, and the parts that have no place there."""
    kind = "ForVideoClassification" if "classes" in sizes else "Model"
    kind = "ForPreTraining" if sizes.get("target") == "pixel" else kind
    kept = {n: w for n, w in weights.items() if kind != "Model" or n.startswith("encoder.")}
    found = renamed(kept, NAMES + [("videomae.", "")] if kind == "Model" else NAMES)
    for name in [name for name in found if name.endswith(".qkv.weight")]:
        for part, rows in zip(QKV, found.pop(name).chunk(3)):
            found[name.replace("qkv", part)] = rows.clone()
    config = dict(model_type="videomae", architectures=[f"VideoMAE{kind}"], num_frames=frames,
                  image_size=size, tubelet_size=sizes["tube"][0], patch_size=sizes["tube"][1],
                  hidden_act="gelu", layer_norm_eps=1e-6, num_labels=sizes.get("classes", 2),
                  qkv_bias=True, use_mean_pooling="encoder.norm.weight" not in weights)
    for part in ("", "decoder_") if kind == "ForPreTraining" else ("",):
        width = sizes[f"{part}dim"]
        config |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width,
                   f"{part}num_hidden_layers": sizes[f"{part}depth"],
                   f"{part}num_attention_heads": sizes[f"{part}heads"]}
    return found, config, sorted({name.split(".")[0] for name in weights.keys() - kept.keys()})


def to_authors(weights):
    """Weights in our names -> in the names of the authors' code."""
    pair = ("encoder.", "") if "fc_norm.weight" in weights else ("projector.", "head.")
    return renamed(weights, [pair])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["import", "export"])
    parser.add_argument("source", help="a checkpoint, or the folder of a run or of Hugging Face's")
    parser.add_argument("out", type=Path, help="the file to write; for hf a folder will do")
    parser.add_argument("--to", choices=["hf", "authors"], help="for export: whose names")
    parser.add_argument("--heads", type=int, help="of attention, where the file can't tell")
    parser.add_argument("--decoder-heads", type=int, help="the same for the decoder")
    args = parser.parse_args(argv)
    if (args.command == "export") != bool(args.to):
        parser.error("export takes --to hf or --to authors, import does not")
    content, out, config = convert(args.source, args.heads, args.decoder_heads), args.out, None
    weights, sizes, clip = content["model"], content["sizes"], RECIPE | content.get("args", {})
    if args.to == "authors":
        content = {"model": to_authors(weights)}
    elif args.to == "hf":
        out = out if out.suffix else out / "pytorch_model.bin"
        content, config, left = to_hugging_face(weights, sizes, clip["frames"], clip["size"])
    beside = out.with_name("config.json")
    if out.exists() or config and beside.exists():
        raise UserError(f"{out} or {beside} is there already: choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(out, content)
    if config:
        beside.write_text(json.dumps(config, indent=2) + "\n")
        print(f"left out, as it has no place there: {', '.join(left) or 'nothing'}")
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
