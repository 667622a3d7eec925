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
import re
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the core, wherever this is started
from extras import huggingface
from extras.evaluate import clip_of, plain_weights
from extras.huggingface import renamed
from extras.run import launch, save_atomically
from sigma import DINO_WIDTHS, SIGMA, SIZES, Encoder, UserError, depth_of, fill, read_file
from train import at_least, parser_with

CLIP = {"num_frames": "frames", "sampling_rate": "stride", "input_size": "size",
        "image_size": "size"}  # their settings and ours
FILES = ("last.pt", "pytorch_model.bin", "model.safetensors")  # what to look for in a folder


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


def our_names(weights):
    """Weights in the names of Hugging Face's code, the authors' or ours -> in ours."""
    weights = renamed(huggingface.our_names(weights), [
        (part, f"encoder.{part}") for part in ("patch_embed.", "blocks.", "norm.")])
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


def refuse_others(weights, theirs, path):
    """Raises UserError if weights, in our names and in theirs, are of no network that we build."""
    if getattr(weights.get("encoder.patch_embed.proj.weight"), "ndim", 0) != 5:
        raise UserError(f"{path} holds no SIGMA or VideoMAE, but {', '.join(theirs)[:500]}")
    if "head.weight" in weights and "fc_norm.weight" not in weights:
        raise UserError(f"{path} is a classifier without mean pooling (no fc_norm): not supported")
    if "mask_token" in weights and "encoder.norm.weight" not in weights:
        raise UserError(f"{path} has no norm after its encoder: transformers leaves it out if use_"
                        "mean_pooling is True, its default; the published networks have one")


def heads_of(sizes, given, config, path):
    """The numbers of heads, by their names in sizes: given ones, else config.json's, else those in
    sizes. Raises UserError if there are none, or they don't fit."""
    found = {}
    for part in [part for part in ("", "decoder_") if f"{part}dim" in sizes]:
        name, width = f"{part}heads", sizes[f"{part}dim"]
        number = given.get(name) or config.get(f"{part}num_attention_heads") or sizes[name]
        if not number or width % number:
            raise UserError(f"{path} needs --{name.replace('_', '-')} that divide {width}")
        found[name] = number
    return found


def empty_network(sizes, last_norm):
    """The network of our sizes, without its memory. last_norm: whether the encoder has one, as all
    have but classifiers, which have another after the mean."""
    with torch.device("meta"):
        if "decoder_dim" in sizes:
            return SIGMA(**sizes)
        own = {name: size for name, size in sizes.items() if name != "classes"}
        network = nn.ModuleDict({"encoder": Encoder(**own)})
        if not last_norm:
            network.encoder.norm = nn.Identity()
        if "classes" in sizes:
            network.fc_norm = nn.LayerNorm(sizes["dim"])
            network.head = nn.Linear(sizes["dim"], sizes["classes"])
    return network


def convert(path, **heads):
    """A checkpoint of any layout -> {"model": weights in our names, "sizes": their network's,
    "args": its clips' frames, stride and size, as far as it tells}. heads, decoder_heads: default
    config.json's, or the paper's for networks as wide. Raises UserError."""
    path, content = read(path)
    theirs = plain_weights(content, path)
    weights = our_names(theirs)
    refuse_others(weights, theirs, path)
    sizes, args, config = content.get("sizes"), content.get("args", {}), {}
    if not sizes:  # it is not ours
        sizes = sizes_of(weights)
        stated = vars(args) if isinstance(args, argparse.Namespace) else args
        if any("layernorm_before" in name for name in theirs):
            stated = config = huggingface.read_config(path.with_name("config.json"), sizes)
        args = {ours: stated[name] for name, ours in CLIP.items()
                if isinstance(stated.get(name), int)}
    sizes = sizes | heads_of(sizes, heads, config, path)
    network = empty_network(sizes, "encoder.norm.weight" in weights)
    fill(network, {name: w.to("meta") for name, w in weights.items()}, path)  # do all of them fit?
    return {"model": weights, "sizes": sizes, "args": args}


def import_(args):
    """Turns other people's checkpoint into one that any --init takes."""
    content = convert(args.source, heads=args.heads, decoder_heads=args.decoder_heads)
    if lost := {"frames", "stride", "size"} - clip_of(content).keys():
        print(f"{args.source} does not tell its clips' {', '.join(sorted(lost))}: give them as "
              "flags where you use it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(args.out, content)
    return args.out


def export(args):
    """Turns one of ours into Hugging Face's folder, or the authors' file."""
    content = convert(args.source)
    if args.to == "hf":
        return huggingface.write_folder(args.out, *huggingface.theirs_of(content))
    pair = ("encoder.", "") if "classes" in content["sizes"] else ("projector.", "head.")
    clip = clip_of(content)
    flags = {name: clip[ours] for name, ours in CLIP.items()
             if name != "image_size" and ours in clip}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(args.out, {"model": renamed(content["model"], [pair]), "args": flags})
    return args.out


def make_parser():
    """The parser of both commands' flags."""
    parser = parser_with(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work in (("import", import_), ("export", export)):
        command = commands.add_parser(name, help=work.__doc__, description=work.__doc__)
        command.set_defaults(work=work, to=None)
        command.add_argument("source", help="a checkpoint, or the folder of a run or of "
                             "Hugging Face's")
        command.add_argument("out", type=Path, help="the file to write, for hf the folder")
        if work is export:
            command.add_argument("--to", choices=["hf", "authors"], required=True, help="whose "
                                 "names: Hugging Face's or the authors'")
        else:
            command.add_argument("--heads", type=at_least(1), help="attention heads of the encoder "
                                 "(default: config.json's, or the paper's for its width)")
            command.add_argument("--decoder-heads", type=at_least(1), help="the same, decoder's")
    return parser


def main(argv=None):
    """import or export, from the flags to the file."""
    args = make_parser().parse_args(argv)
    inside = [args.out / name for name in huggingface.CONFIGS + FILES]
    if there := [path for path in (inside if args.to == "hf" else [args.out]) if path.exists()]:
        raise UserError(f"{there[0]} is there already: choose another place")
    print(f"wrote {args.work(args)}")


if __name__ == "__main__":
    sys.exit(launch(main))
