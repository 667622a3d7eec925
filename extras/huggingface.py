"""VideoMAE as Hugging Face's transformers has it: names of weights, config.json, a folder to load.

Everything here turns ours into theirs or theirs into ours; only extras/weights.py uses it. The
layout is that of VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification
(transformers, src/transformers/models/videomae); sizes are the keyword arguments of sigma.SIGMA, or
of sigma.Encoder with `classes`.
"""
import json

import torch

from extras.evaluate import clip_of
from extras.run import draft_of, save_atomically, write_json
from sigma import IMAGENET_MEAN, IMAGENET_STD, UserError
from train import DEFAULTS

NAMES = [  # ours and theirs, in this order: how names begin, then parts within blocks
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."), ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."), ("head.", "classifier."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."), (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense.")]
QKV = ("query", "key", "value")  # three weights of theirs, in the order of our one
CONFIGS = ("config.json", "preprocessor_config.json")  # beside the weights


def renamed(weights, pairs):
    """The weights with old parts of their names made new: anywhere if they begin with a dot."""
    for old, new in pairs:
        weights = {name.replace(old, new) if old[0] == "." or name.startswith(old) else name: w
                   for name, w in weights.items()}
    return weights


def our_names(weights):
    """Weights in their names -> in ours; other names stay as they are."""
    pairs = [("videomae.", "")]  # all but VideoMAEModel's
    pairs += [(theirs.removeprefix("videomae."), ours) for ours, theirs in NAMES]
    pairs += [(".query.bias", ".q_bias"), (".value.bias", ".v_bias")]  # of transformers 5
    weights = renamed(weights, pairs)
    for name in [name for name in weights if name.endswith(".query.weight")]:
        parts = [name.replace("query", part) for part in QKV]
        if weights.keys() >= set(parts):  # else they are listed as not fitting
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(n) for n in parts])
    return weights


def config_of(sizes):
    """What their config.json says of a network of our sizes."""
    config = dict(model_type="videomae", tubelet_size=sizes["tube"][0])
    for part in ("", "decoder_"):
        if width := sizes.get(f"{part}dim"):
            config |= {f"{part}hidden_size": width, f"{part}intermediate_size": 4 * width,
                       f"{part}num_hidden_layers": sizes[f"{part}depth"],
                       f"{part}num_attention_heads": sizes[f"{part}heads"]}
    return config


def read_config(path, sizes):
    """Their config.json with transformers' defaults, {} if there is none. Raises UserError
    if it describes another network than ours of these sizes."""
    if not path.is_file():
        print(f"there is no {path}: taken to be built like VideoMAE's published ones")
        return {}
    try:
        config = dict(num_attention_heads=12, decoder_num_attention_heads=6, num_frames=16,
                      image_size=224) | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:  # no JSON, or a list
        raise UserError(f"{path} can't be read: {error}") from error
    wanted = config_of(sizes) | dict(hidden_act="gelu", qkv_bias=True, qv_bias=True, num_channels=3)
    wanted |= {"norm_pix_loss": True} if "decoder_dim" in sizes else {}
    differ = [f"{name} is {config[name]!r}, not {value!r}" for name, value in wanted.items()
              if config.get(name, value) != value and not name.endswith("heads")]  # these it tells
    if config.get("layer_norm_eps", 0) > 1e-6:  # less changes outputs by less than 1e-5
        differ.append(f"layer_norm_eps is {config['layer_norm_eps']}, not 1e-06 or less")
    if isinstance(sides := config["image_size"], list):
        config["image_size"] = sides[0]
        differ += [f"image_size is {sides}, not square"] if len(set(sides)) > 1 else []
    if differ:
        raise UserError(f"{path} describes a network that is not built here: {'; '.join(differ)}")
    return config


def theirs_of(content):
    """A checkpoint of ours -> weights in their names, and the contents of both CONFIGS."""
    weights, sizes, clip = content["model"], content["sizes"], DEFAULTS | clip_of(content)
    pairs, (_, q, r), side = NAMES, sizes["tube"], clip["size"]
    kind = ("ForVideoClassification" if "classes" in sizes else
            "ForPreTraining" if sizes.get("target") == "pixel" else "Model")
    if kind == "Model":
        print("only the encoder is exported: VideoMAEModel has no place for the rest")
        weights = {name: w for name, w in weights.items() if name.startswith("encoder.")}
        pairs = NAMES + [("videomae.", "")]
    theirs = renamed(weights, pairs)
    for name in [name for name in theirs if name.endswith(".qkv.weight")]:
        for part, rows in zip(QKV, theirs.pop(name).chunk(3)):
            theirs[name.replace("qkv", part)] = rows.clone()
    stride = {"sampling_rate": clip["stride"]} if "stride" in clip_of(content) else {}
    config = config_of(sizes) | stride | dict(
        architectures=[f"VideoMAE{kind}"], layer_norm_eps=1e-6, num_frames=clip["frames"],
        image_size=side, patch_size=q if q == r else (q, r), num_labels=sizes.get("classes", 2),
        use_mean_pooling="encoder.norm.weight" not in weights)
    return theirs, config, dict(
        image_processor_type="VideoMAEImageProcessor", do_resize=True, resample=2,  # bilinear
        size=dict(shortest_edge=side), do_center_crop=True, crop_size=dict(height=side, width=side),
        do_rescale=True, do_normalize=True, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def write_folder(folder, weights, *configs):
    """Writes a folder for from_pretrained, the weights last, and returns their path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(CONFIGS, configs):
        write_json(folder / name, content)
    try:
        from safetensors.torch import save
    except ImportError:
        print("safetensors is not installed: writing pytorch_model.bin instead")
        save_atomically(folder / "pytorch_model.bin", weights)
        return folder / "pytorch_model.bin"
    weights = {name: w.contiguous() for name, w in weights.items()}
    with draft_of(folder / "model.safetensors") as draft:
        draft.write_bytes(save(weights, {"format": "pt"}))  # its save_file ignores the umask
    return folder / "model.safetensors"
