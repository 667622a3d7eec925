"""Other people's checkpoints into ours, and ours into theirs; the weights stay the same to the bit.

    python extras/weights.py import FILE_OR_FOLDER videomae.pt
    python extras/weights.py export out/k400-base-pixel --to hf FOLDER     or: --to authors FILE.pth

import takes Hugging Face's VideoMAEModel, VideoMAEForPreTraining, VideoMAEForVideoClassification (a
folder; .bin, .pt; .safetensors with that package), and files of the authors' and VideoMAE's code,
fine-tuned ones too. It writes what sigma.load_model and any --init take. export takes these and
runs; hf is weights and config.json, of the encoder alone if the target is not pixels or classes.
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
from train import RECIPE, at_least, launch, parser_with, save_atomically

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
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # of transformers 5
    weights = renamed(weights, pairs)
    for name in [name for name in weights if name.endswith(".query.weight")]:
        qkv = torch.cat([weights.pop(name.replace("query", part)) for part in QKV])
        weights[name.replace("query", "qkv")] = qkv
    return {re.sub(r"^head\.(?=\d)", "projector.", n): w.detach() for n, w in weights.items()}


def convert(path, heads=None, decoder_heads=None):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": their network's,
    "args": frames and size of its clips, if it tells}. heads, decoder_heads: default config.json's,
    or the paper's for networks as wide. Runs no code of the file. Raises UserError if weights are
    missing or left over, with their names."""
    names = ("last.pt", "pytorch_model.bin", "model.safetensors")  # in a folder
    path = next((Path(path, name) for name in names if Path(path, name).is_file()), Path(path))
    beside, config = path.with_name("config.json"), {}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # flags in older files
                content = torch.load(path, map_location="cpu", weights_only=True)
        theirs = content.get("model", content.get("module", content))
        weights = our_names(theirs)
        sizes = content.get("sizes") or sizes_of(weights)
        args = content["args"] if "sizes" in content else {}  # the authors' is a Namespace
        if beside.is_file() and any("layernorm_before" in name for name in theirs):
            config = json.loads(beside.read_text())
            args = dict(frames=config["num_frames"], size=config["image_size"])
    except Exception as error:  # whatever a damaged or foreign file brings about
        reason = re.findall(r"^.*|GLOBAL \S+", str(error))[-1][:200]  # GLOBAL: code it asks for
        raise UserError(f"{path} holds no complete SIGMA or VideoMAE ({reason})") from error
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} is a classifier without mean pooling (no fc_norm): not supported")
    with torch.device("meta"):  # the network without its memory: does each weight fit?
        if "decoder_dim" in sizes:
            net = SIGMA(**sizes)
        else:
            sizes = {name: sizes[name] for name in ("dim", "depth", "heads", "tube")}
            net = nn.ModuleDict({"encoder": Encoder(**sizes)})
            if "encoder.norm.weight" not in weights:  # classifiers have another behind the mean
                net.encoder.norm = nn.Identity()
        if "head.weight" in weights:
            net.fc_norm = nn.LayerNorm(sizes["dim"])
            net.head = nn.Linear(sizes["dim"], len(weights["head.weight"]))
    fill(net, {name: w.to("meta") for name, w in weights.items()}, path)
    for part, given in (("", heads), ("decoder_", decoder_heads)):
        number = given or config.get(f"{part}num_attention_heads") or sizes.get(f"{part}heads")
        if width := sizes.get(f"{part}dim"):
            if not number or width % number:
                raise UserError(f"{path} needs --{part.replace('_', '-')}heads that divide {width}")
            sizes[f"{part}heads"] = number
    return {"model": weights, "sizes": sizes, "args": args}


def to_hugging_face(content):
    """What convert returns -> weights in Hugging Face's names, and the contents of config.json."""
    weights, sizes, clip = content["model"], content["sizes"], RECIPE | content["args"]
    kind, pairs = "Model", NAMES
    if "head.weight" in weights:
        kind = "ForVideoClassification"
    elif sizes.get("target") == "pixel":
        kind = "ForPreTraining"
    else:
        print("the encoder alone: the rest, if any, has no place there")
        weights = {name: w for name, w in weights.items() if name.startswith("encoder.")}
        pairs = NAMES + [("videomae.", "")]
    theirs = renamed(weights, pairs)
    for name in [name for name in theirs if name.endswith(".qkv.weight")]:
        for part, rows in zip(QKV, theirs.pop(name).chunk(3)):
            theirs[name.replace("qkv", part)] = rows.clone()
    config = dict(model_type="videomae", architectures=[f"VideoMAE{kind}"], layer_norm_eps=1e-6,
                  num_frames=clip["frames"], image_size=clip["size"], tubelet_size=sizes["tube"][0],
                  patch_size=sizes["tube"][1], num_labels=len(weights.get("head.weight", "01")),
                  use_mean_pooling="encoder.norm.weight" not in weights)
    for part in ("", "decoder_"):
        if width := sizes.get(f"{part}dim"):
            config |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width,
                       f"{part}num_hidden_layers": sizes[f"{part}depth"],
                       f"{part}num_attention_heads": sizes[f"{part}heads"]}
    return theirs, config


def main(argv=None):
    parser = parser_with(__doc__)
    parser.add_argument("command", choices=["import", "export"])
    parser.add_argument("source", help="a checkpoint, or the folder of a run or of Hugging Face's")
    parser.add_argument("out", type=Path, help="the file to write, for hf the folder")
    parser.add_argument("--to", choices=["hf", "authors"], help="for export: whose names")
    parser.add_argument("--heads", type=at_least(1), help="of attention, if the file can't tell")
    parser.add_argument("--decoder-heads", type=at_least(1), help="the same for the decoder")
    args = parser.parse_args(argv)
    if (args.command == "export") != bool(args.to):
        parser.error("export takes --to hf or --to authors, import does not")
    out, beside = args.out, args.out / "config.json"
    if args.to == "hf":
        out = args.out / "pytorch_model.bin"
    if out.exists() or beside.exists():
        raise UserError(f"{out} or {beside} is there already: choose another place")
    content = convert(args.source, args.heads, args.decoder_heads)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.to == "authors":
        pair = ("encoder.", "") if "head.weight" in content["model"] else ("projector.", "head.")
        content = {"model": renamed(content["model"], [pair])}
    elif args.to == "hf":
        content, config = to_hugging_face(content)
        beside.write_text(json.dumps(config, indent=2) + "\n")
    save_atomically(out, content)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(launch(main))
