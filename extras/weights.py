"""Other people's checkpoints into ours, and ours into theirs: the same weights, bit for bit.

    python extras/weights.py import FILE_OR_FOLDER videomae.pt
    python extras/weights.py export out/k400-base-mlp --to authors sigma.pth
    python extras/weights.py export out/k400-base-pixel --to hf FOLDER

import takes Hugging Face's VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification
(a folder, or a .bin, .pt or .safetensors file) and the files of the authors' and VideoMAE's code,
also fine-tuned ones. The file it writes fits sigma.load_model and the --init of train.py,
extras/finetune.py and extras/features.py; pretraining files of the authors fit without it.

export takes a run or any file that import takes. --to authors: the names of their code. --to hf:
pytorch_model.bin with config.json beside it, a VideoMAEForPreTraining if the target is pixels, a
VideoMAEForVideoClassification if there is a classifier, else the encoder as a VideoMAEModel.
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

STARTS = {  # how names begin, ours and Hugging Face's
    "encoder.patch_embed.proj.": "videomae.embeddings.patch_embeddings.projection.",
    "encoder.blocks.": "videomae.encoder.layer.", "encoder.norm.": "videomae.layernorm.",
    "decoder.blocks.": "decoder.decoder_layers.", "head.": "classifier."}
PARTS = {  # what follows in a block; replaced in this order, in both directions
    ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.output.dense.", ".attn.": ".attention.attention.",
    ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense."}


# --- Import ---------------------------------------------------------------------------------------

def read(path):
    """The weights of a file, or of a folder (a run's or Hugging Face's), by name, and a dictionary
    of what else it says. Runs no code from it. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        names = ("last.pt", "pytorch_model.bin", "model.safetensors")
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # flags in older files
                content = torch.load(path, map_location="cpu", weights_only=True)
        keys = [key for key in ("model", "module", "state_dict") if key in content]
        content = content if keys else {"model": content}
        weights = content.pop(keys[0] if keys else "model")
        weights = {name.removeprefix("module."): w.detach() for name, w in weights.items()}  # DDP's
        config = path.with_name("config.json")
        if any("layernorm_before" in name for name in weights) and config.is_file():
            content["config"] = dict(json.loads(config.read_text()))
    except ImportError as error:
        raise UserError(f"to read {path}, pip install safetensors") from error
    except Exception as error:  # whatever a damaged or foreign file brings about
        asks = re.search(r"GLOBAL \S+", str(error))  # for code
        reason = asks[0] if asks else str(error).partition("\n")[0][:200]
        raise UserError(f"{path} can't be read as a checkpoint ({reason})") from error
    return weights, content


def renamed(name, starts, parts):
    """A name with its beginning, and then its parts, replaced as the two lists of pairs say."""
    for old, new in starts:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    for old, new in parts:
        name = name.replace(old, new)
    return name


def our_names(weights):
    """The weights in the names of sigma.py, from those of Hugging Face's or the authors' code."""
    if any("layernorm_before" in name for name in weights):  # Hugging Face's
        prefix = "" if any(name.startswith("videomae.") for name in weights) else "videomae."
        starts, parts = ([(theirs, ours) for ours, theirs in table.items()]
                         for table in (STARTS, PARTS))
        parts += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # in memory, from 5.0 on
        weights = {renamed(prefix + name, starts, parts): w for name, w in weights.items()}
        for query in [name for name in weights if name.endswith(".attn.query.weight")]:
            names = [query.replace("query", part) for part in ("query", "key", "value")]
            shapes = {weights[name].shape if name in weights else None for name in names}
            if len(shapes) == 1:
                qkv = torch.cat([weights.pop(name) for name in names])
                weights[query.replace("query", "qkv")] = qkv
    elif any(name.startswith("blocks.") for name in weights):  # the authors', fine-tuned
        weights = {name if name.startswith(("fc_norm.", "head.")) else f"encoder.{name}": w
                   for name, w in weights.items()}
    return {re.sub(r"^head\.(?=\d)", "projector.", name): w for name, w in weights.items()}


def convert(path, heads=None, decoder_heads=None):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": those of the network},
    and "args" with frames, size and stride of its clips if it tells the frames.

    heads, decoder_heads: by default what config.json says, or as in the paper's network of that
    width. Raises UserError, with what differs, unless all weights have their place.
    """
    weights, about = read(path)
    weights, config = our_names(weights), about.get("config", {})
    embedding = weights.get("encoder.patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 5:
        raise UserError(f"{path} is no SIGMA or VideoMAE: among its {len(weights)} weights none "
                        "embeds space-time tubes")
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} classifies by the first token: only classifiers with mean pooling "
                        "are supported, which have an fc_norm")
    try:
        sizes = dict(about.get("sizes") or sizes_of(weights))
    except (KeyError, UnboundLocalError) as error:
        raise UserError(f"{path} has prototypes, but lacks decoder.head.* or a projector's weight "
                        f"({error})") from error
    if "fc_norm.weight" in weights:
        sizes["classes"] = len(weights.get("head.weight", ()))
    given = {"heads": heads or config.get("num_attention_heads"),
             "decoder_heads": decoder_heads or config.get("decoder_num_attention_heads")}
    sizes |= {name: number for name, number in given.items() if number and name in sizes}
    for name, width in (("heads", "dim"), ("decoder_heads", "decoder_dim")):
        if name in sizes and (not sizes[name] or sizes[width] % sizes[name]):
            raise UserError(f"{path} doesn't tell how many attention heads share its width of "
                            f"{sizes[width]}: give --{name.replace('_', '-')}, a divisor of it")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has {config['hidden_act']} as activation, our networks have gelu")
    fill(network(sizes, weights), {name: w.to("meta") for name, w in weights.items()}, path)
    content, flags = {"model": weights, "sizes": sizes}, about.get("args", {})
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    told = {"sampling_rate": RECIPE["stride"], "image_size": flags.get("input_size"), **flags,
            **config}
    if told.get("num_frames"):
        content["args"] = {"frames": told["num_frames"], "size": told["image_size"],
                           "stride": told["sampling_rate"]}
    return content


def network(sizes, weights):
    """The network that weights are for, without memory of its own."""
    with torch.device("meta"):
        if "decoder.head.weight" in weights:
            model = SIGMA(**sizes)
        else:
            parts = {name: sizes[name] for name in ("dim", "depth", "heads", "tube")}
            model = nn.ModuleDict({"encoder": Encoder(**parts)})
        if "fc_norm.weight" in weights:
            model["fc_norm"] = nn.LayerNorm(sizes["dim"])
            model["head"] = nn.Linear(sizes["dim"], sizes["classes"])
        if "encoder.norm.weight" not in weights:
            model.encoder.norm = nn.Identity()
    return model


# --- Export ---------------------------------------------------------------------------------------

def to_authors(weights):
    """Weights in our names -> in those of the authors' code, the "model" of their files."""
    if "fc_norm.weight" in weights:
        return {name.removeprefix("encoder."): w for name, w in weights.items()}
    return {name.replace("projector.", "head."): w for name, w in weights.items()}


def to_hugging_face(weights, sizes, frames, size):
    """Weights in our names -> (Hugging Face's weights, their config, names that have no place).

    frames, size: of the clips. Raises UserError unless patches are square.
    """
    if sizes["tube"][1] != sizes["tube"][2]:
        raise UserError(f"Hugging Face's models have square patches, not tubes of {sizes['tube']}")
    kind = "Model"
    if "classes" in sizes:
        kind = "ForVideoClassification"
    elif sizes.get("target") == "pixel":
        kind = "ForPreTraining"
    config = dict(
        model_type="videomae", architectures=[f"VideoMAE{kind}"], image_size=size,
        num_frames=frames, patch_size=sizes["tube"][1], tubelet_size=sizes["tube"][0],
        num_channels=3, hidden_act="gelu", hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"], num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["dim"], qkv_bias=True, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        use_mean_pooling="encoder.norm.weight" not in weights)
    if kind == "ForPreTraining":
        config |= dict(norm_pix_loss=True, decoder_hidden_size=sizes["decoder_dim"],
                       decoder_num_hidden_layers=sizes["decoder_depth"],
                       decoder_num_attention_heads=sizes["decoder_heads"],
                       decoder_intermediate_size=4 * sizes["decoder_dim"])
    if kind == "ForVideoClassification":
        labels = [f"LABEL_{i}" for i in range(sizes["classes"])]
        config |= dict(id2label=dict(enumerate(labels)),
                       label2id={label: i for i, label in enumerate(labels)})
    kept = {n: w for n, w in weights.items() if kind != "Model" or n.startswith("encoder.")}
    found = {}
    for name, w in kept.items():
        theirs = renamed(name, STARTS.items(), PARTS.items())
        if kind == "Model":
            theirs = theirs.removeprefix("videomae.")
        if name.endswith(".attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), w.chunk(3)):
                found[theirs.replace("qkv", part)] = rows.clone()
        else:
            found[theirs] = w
    return found, config, sorted({name.split(".")[0] for name in weights.keys() - kept.keys()})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in ("import", "export"):
        add = tasks.add_parser(task, help="see above").add_argument
        add("source", help="a checkpoint, a run's folder, or Hugging Face's")
        add("target", help="new file; for --to hf also a new folder")
        add("--heads", type=int, help="of the encoder (default: the paper's for its width)")
        add("--decoder-heads", type=int, help="of the decoder (likewise)")
        if task == "export":
            add("--to", choices=["hf", "authors"], required=True, help="whose names")
    args = parser.parse_args(argv)
    target, config, left = Path(args.target), None, []
    content = convert(args.source, args.heads, args.decoder_heads)
    if args.task == "export" and args.to == "authors":
        content = {"model": to_authors(content["model"])}
    elif args.task == "export":
        clips = content.get("args", {})
        target = target if target.suffix else target / "pytorch_model.bin"
        content, config, left = to_hugging_face(content["model"], content["sizes"],
                                                clips.get("frames", 16), clips.get("size", 224))
    for path in (target, target.with_name("config.json")) if config else (target,):
        if path.exists():
            raise UserError(f"{path} is there already: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(target, content)
    if config:
        target.with_name("config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {target}" + (" and config.json beside it" if config else "")
          + (f"; no place there for {', '.join(left)}" if left else ""))


if __name__ == "__main__":
    sys.exit(launch(main))
