"""Other people's checkpoints into ours, and ours into theirs; the weights stay the same to the bit.

    python extras/weights.py import FILE_OR_FOLDER videomae.pt
    python extras/weights.py export out/k400-base-pixel --to hf FOLDER     or: --to authors FILE.pth

import takes files of the authors' and VideoMAE's code, pretraining and fine-tuned ones, and Hugging
Face's VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification, a file or a folder
with its config.json; .safetensors with that package. It writes what any --init takes, complete or
not at all. export takes such a file or a run. For hf it writes a folder that from_pretrained and
pipelines read, with the encoder alone if the target is neither pixels nor classes.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from extras.run import draft_of, launch, save_atomically
from sigma import (DINO_WIDTHS, IMAGENET_MEAN, IMAGENET_STD, SIGMA, SIZES, Encoder, UserError,
                   depth_of, fill, plain_weights, read_file)
from train import DEFAULTS, at_least, parser_with

NAMES = [  # ours and Hugging Face's, in this order: how names begin, then parts within blocks
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."), ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."), ("head.", "classifier."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense.")]
QKV = ("query", "key", "value")  # three weights of theirs, in the order of our one
CLIP = {"num_frames": "frames", "sampling_rate": "stride", "input_size": "size",
        "image_size": "size"}  # their settings and ours
FILES = ("last.pt", "pytorch_model.bin", "model.safetensors")  # what to look for in a folder
CONFIGS = ("config.json", "preprocessor_config.json")  # Hugging Face's, beside the weights


def read(path):
    """(the file that was read, its content). Runs no code of it. Raises UserError."""
    found = [file for file in map(Path(path).joinpath, FILES) if file.is_file()]
    path = found[0] if found else Path(path)
    if path.is_dir():
        raise UserError(f"{path} has none of {', '.join(FILES)}")
    if path.suffix != ".safetensors":
        with torch.serialization.safe_globals([argparse.Namespace]):  # flags in the authors' files
            return path, read_file(path)
    try:
        import safetensors.torch
        return path, safetensors.torch.load_file(path)
    except ImportError as error:
        raise UserError(f"to read {path} do: pip install safetensors") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def renamed(weights, pairs):
    """The weights with old parts of their names made new: anywhere if they begin with a dot."""
    for old, new in pairs:
        weights = {name.replace(old, new) if old[0] == "." or name.startswith(old) else name: w
                   for name, w in weights.items()}
    return weights


def our_names(weights):
    """Weights in the names of Hugging Face's code, the authors' or ours -> in ours."""
    pairs = [("videomae.", "")]  # all but VideoMAEModel's
    pairs += [(part, f"encoder.{part}") for part in ("patch_embed.", "blocks.", "norm.")]
    pairs += [(theirs.removeprefix("videomae."), ours) for ours, theirs in NAMES]
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # of transformers 5
    weights = renamed(weights, pairs)
    for name in [name for name in weights if name.endswith(".query.weight")]:
        parts = [name.replace("query", part) for part in QKV]
        if weights.keys() >= set(parts):  # else they are listed as not fitting
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(n) for n in parts])
    return {re.sub(r"^head\.(?=\d)", "projector.", n): w.detach() for n, w in weights.items()}


def sizes_of(weights):
    """The sizes of a SIGMA, a classifier or an encoder with these weights. Shapes tell all but the
    number of heads: that of the entry in SIZES with this width, or None."""
    dim, _, *tube = weights["encoder.patch_embed.proj.weight"].shape
    row = next((row for row in SIZES.values() if row["dim"] == dim), {})
    sizes = dict(dim=dim, depth=depth_of(weights, "encoder.blocks"), heads=row.get("heads"),
                 tube=tuple(tube))
    if "mask_token" not in weights:
        classes = {"classes": len(weights["head.weight"])} if "head.weight" in weights else {}
        return sizes | classes
    sizes |= dict(decoder_dim=weights["mask_token"].shape[-1], target="pixel",
                  decoder_depth=depth_of(weights, "decoder.blocks"),
                  decoder_heads=row.get("decoder_heads"))
    widths = [len(w) for name, w in weights.items() if re.match(r"projector\.\d+\.bias", name)]
    if widths:
        sizes |= dict(target="l2", target_dim=widths[-1], projector_widths=widths[:-1])
    if "prototypes" in weights:
        number, width = weights["prototypes"].shape
        dino = "dino-s" if width == DINO_WIDTHS["dino-s"] else "dino"
        sizes |= dict(target="mlp" if widths else dino, target_dim=width, prototypes=number)
    return sizes


def read_config(path, sizes):
    """Hugging Face's config.json with transformers' defaults, {} if there is none. Raises UserError
    if it describes another network than ours of these sizes."""
    if not path.is_file():
        print(f"there is no {path}: taken to be built like VideoMAE's published ones")
        return {}
    try:
        config = dict(num_attention_heads=12, decoder_num_attention_heads=6, num_frames=16,
                      image_size=224) | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # no JSON, or a list
        raise UserError(f"{path} can't be read: {error}") from error
    wanted = dict(model_type="videomae", hidden_act="gelu", qkv_bias=True, qv_bias=True,
                  num_channels=3, tubelet_size=sizes["tube"][0], hidden_size=sizes["dim"],
                  num_hidden_layers=sizes["depth"], intermediate_size=4 * sizes["dim"])
    if width := sizes.get("decoder_dim"):
        wanted |= dict(decoder_hidden_size=width, decoder_intermediate_size=4 * width,
                       decoder_num_hidden_layers=sizes["decoder_depth"], norm_pix_loss=True)
    differ = [f"{name} is {config[name]!r}, not {value!r}" for name, value in wanted.items()
              if config.get(name, value) != value]
    if config.get("layer_norm_eps", 0) > 1e-6:  # less changes outputs by less than 1e-5
        differ.append(f"layer_norm_eps is {config['layer_norm_eps']}, not 1e-06 or less")
    if isinstance(sides := config["image_size"], list):
        config["image_size"] = sides[0]
        differ += [f"image_size is {sides}, not square"] if len(set(sides)) > 1 else []
    if differ:
        raise UserError(f"{path} describes a network that is not built here: {'; '.join(differ)}")
    return config


def convert(path, heads=None, decoder_heads=None):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": their network's,
    "args": its clips' frames, stride and size, as far as it tells}. heads, decoder_heads: default
    config.json's, or the paper's for networks as wide. Raises UserError."""
    path, content = read(path)
    theirs = plain_weights(content, path)
    weights = our_names(theirs)
    if getattr(weights.get("encoder.patch_embed.proj.weight"), "ndim", 0) != 5:
        raise UserError(f"{path} holds no SIGMA or VideoMAE, but {', '.join(theirs)[:500]}")
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} is a classifier without mean pooling (no fc_norm): not supported")
    if "mask_token" in weights and "encoder.norm.weight" not in weights:
        raise UserError(f"{path} has no norm behind its encoder: transformers leaves it out if use_"
                        "mean_pooling is True, its default; the published networks have one")
    sizes, args, config = content.get("sizes"), content.get("args", {}), {}
    if not sizes:
        sizes = sizes_of(weights)
        told = vars(args) if isinstance(args, argparse.Namespace) else args
        if any("layernorm_before" in name for name in theirs):
            told = config = read_config(path.with_name("config.json"), sizes)
        args = {ours: told[name] for name, ours in CLIP.items() if isinstance(told.get(name), int)}
    for part, given in (("", heads), ("decoder_", decoder_heads)):
        number = given or config.get(f"{part}num_attention_heads") or sizes.get(f"{part}heads")
        if width := sizes.get(f"{part}dim"):
            if not number or width % number:
                raise UserError(f"{path} needs --{part.replace('_', '-')}heads that divide {width}")
            sizes[f"{part}heads"] = number
    with torch.device("meta"):  # the network without its memory
        if "decoder_dim" in sizes:
            net = SIGMA(**sizes)
        else:
            own = {name: size for name, size in sizes.items() if name != "classes"}
            net = nn.ModuleDict({"encoder": Encoder(**own)})
        if "encoder.norm.weight" not in weights:  # classifiers have another after the mean
            net.encoder.norm = nn.Identity()
        if "classes" in sizes:
            net.fc_norm = nn.LayerNorm(sizes["dim"])
            net.head = nn.Linear(sizes["dim"], sizes["classes"])
    fill(net, {name: w.to("meta") for name, w in weights.items()}, path)  # do all of them fit?
    return {"model": weights, "sizes": sizes, "args": args}


def to_hugging_face(content):
    """What convert returns -> weights in Hugging Face's names, and what goes into CONFIGS."""
    weights, sizes, clip = content["model"], content["sizes"], DEFAULTS | content["args"]
    pairs, (p, q, r), side = NAMES, sizes["tube"], clip["size"]
    kind = ("ForVideoClassification" if "classes" in sizes else
            "ForPreTraining" if sizes.get("target") == "pixel" else "Model")
    if kind == "Model":
        print("the encoder alone: the rest, if any, has no place there")
        weights = {name: w for name, w in weights.items() if name.startswith("encoder.")}
        pairs = NAMES + [("videomae.", "")]
    theirs = renamed(weights, pairs)
    for name in [name for name in theirs if name.endswith(".qkv.weight")]:
        for part, rows in zip(QKV, theirs.pop(name).chunk(3)):
            theirs[name.replace("qkv", part)] = rows.clone()
    config = dict(model_type="videomae", architectures=[f"VideoMAE{kind}"], layer_norm_eps=1e-6,
                  num_frames=clip["frames"], image_size=side, tubelet_size=p,
                  **{"sampling_rate": clip["stride"]} if "stride" in content["args"] else {},
                  patch_size=q if q == r else (q, r), num_labels=sizes.get("classes", 2),
                  use_mean_pooling="encoder.norm.weight" not in weights)
    for part in ("", "decoder_"):
        if width := sizes.get(f"{part}dim"):
            config |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width,
                       f"{part}num_hidden_layers": sizes[f"{part}depth"],
                       f"{part}num_attention_heads": sizes[f"{part}heads"]}
    return theirs, config, dict(
        image_processor_type="VideoMAEImageProcessor", do_resize=True, resample=2,  # bilinear
        size=dict(shortest_edge=side), do_center_crop=True, crop_size=dict(height=side, width=side),
        do_rescale=True, do_normalize=True, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def write_hugging_face(folder, weights, *configs):
    """Writes a folder for from_pretrained, the weights last, and returns their path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(CONFIGS, configs):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    try:
        from safetensors.torch import save
    except ImportError:
        print("to get model.safetensors do: pip install safetensors; without it")
        save_atomically(folder / "pytorch_model.bin", weights)
        return folder / "pytorch_model.bin"
    with draft_of(folder / "model.safetensors") as draft:  # save_file's has a mode of its own, 600
        draft.write_bytes(save({n: w.contiguous() for n, w in weights.items()}, {"format": "pt"}))
    return folder / "model.safetensors"


def import_(args):
    """other people's checkpoint -> one for any --init"""
    content = convert(args.source, args.heads, args.decoder_heads)
    if (lost := {"frames", "stride", "size"} - content["args"].keys()):
        print(f"{args.source} does not tell its clips' {', '.join(sorted(lost))}: give them as "
              "flags where you use it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(args.out, content)
    return args.out


def export(args):
    """one of ours -> Hugging Face's folder, or the authors' file"""
    content = convert(args.source)
    if args.to == "hf":
        return write_hugging_face(args.out, *to_hugging_face(content))
    pair = ("encoder.", "") if "classes" in content["sizes"] else ("projector.", "head.")
    told = {name: content["args"][ours] for name, ours in CLIP.items()
            if name != "image_size" and ours in content["args"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(args.out, {"model": renamed(content["model"], [pair]),
                               "args": told})
    return args.out


def main(argv=None):
    """import or export, from the flags to the file."""
    parser = parser_with(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work in (("import", import_), ("export", export)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work, to=None)
        command.add_argument("source", help="a checkpoint, or the folder of a run or of HF's")
        command.add_argument("out", type=Path, help="the file to write, for hf the folder")
        if work is export:
            command.add_argument("--to", choices=["hf", "authors"], required=True,
                                 help="whose names")
        else:
            command.add_argument("--heads", type=at_least(1), help="if the file can't tell")
            command.add_argument("--decoder-heads", type=at_least(1), help="the same, decoder's")
    args = parser.parse_args(argv)
    places = [args.out / name for name in CONFIGS + FILES] if args.to == "hf" else [args.out]
    if there := [path for path in places if path.exists()]:
        raise UserError(f"{there[0]} is there already: choose another place")
    print(f"wrote {args.work(args)}")


if __name__ == "__main__":
    sys.exit(launch(main))
