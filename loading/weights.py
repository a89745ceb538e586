"""Weights: loads and saves the released format, and translates the released names into ours.

  folder/config.json + folder/diffusion_pytorch_model.safetensors  <->  StageA, StageB, StageBV1, StageC

The released weights exist in two namings. "original" is that of the authors' training code,
"diffusers" that of the Hugging Face library; they differ in the attention layers, whose query, key
and value are one fused matrix in the first and three in the second, and in the name of the codebook.
Our models use a third one, meant for readers ("expand" instead of "channelwise.0"), so a table stands
between: for every part of a model, what it is called here and what it is called there. The numbers
are never changed, and the way back gives the same file again.

Shapes differ in two places, since we work channels-last: what others write as a 1x1 convolution
(D,C,1,1) is a Linear (D,C) here, and the vectors of GlobalResponseNorm are (1,1,1,C) there, (C,) here.

Loading is strict, as weights in the wrong place make pictures that are merely bad: every tensor must
be known, present, of the right shape and free of NaN. What is wrong with a file is a WeightsError of
one line. Nothing is downloaded, and nothing in a file is executed.
Needs: torch, safetensors; transformers for text encoders; stage_a.py, stage_b.py, stage_b_v1.py, stage_c.py, files.py.
"""
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from loading.errors import WeightsError
from loading.files import (STEM, TensorFile, find_file, is_finite, return_freed_memory, read_config, write_atomically,
                           write_files, write_model)
from speed.int8 import quantised, to_int8
from stage_a import StageA
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder
from v1.stage_b import StageBV1
from stage_c import StageC


# ----- names: ours, diffusers', and how the shape differs --------------------------------------------
# A rule stands for a part with all its tensors (weight, bias, running_mean, ...) or for one tensor.
# Third column: "1x1" is a Linear here and a 1x1 convolution there, "grn" has three leading ones there.

RES_BLOCK = [
    ("depthwise",   "depthwise",          ""),
    ("expand",      "channelwise.0",      ""),       # channelwise.1 is GELU
    ("grn",         "channelwise.2",      "grn"),    # channelwise.3 is Dropout
    ("contract",    "channelwise.4",      ""),
]
TIMESTEP_BLOCK = [
    ("mapper",      "mapper",             ""),
]
ATTENTION_BLOCK = [
    ("text_mapper", "kv_mapper.1",        ""),       # kv_mapper.0 is SiLU
    ("query",       "attention.to_q",     ""),
    ("key",         "attention.to_k",     ""),
    ("value",       "attention.to_v",     ""),
    ("out",         "attention.to_out.0", ""),       # to_out.1 is Dropout
]
VQ_RES_BLOCK = [
    ("depthwise",   "depthwise.1",        ""),       # depthwise.0 is the padding
    ("expand",      "channelwise.0",      ""),
    ("contract",    "channelwise.2",      ""),
    ("gammas",      "gammas",             ""),
]
BLOCKS = {"C": RES_BLOCK, "T": TIMESTEP_BLOCK, "A": ATTENTION_BLOCK}     # the letters of Stage B's level patterns


def inside(ours: str, theirs: str, block: list) -> list:
    """The rules of a block, for the block called `ours` here and `theirs` there."""
    return [(f"{ours}.{a}", f"{theirs}.{b}", kind) for a, b, kind in block]


def rules_a(levels: int, bottleneck_blocks: int, **_) -> list:
    """Stage A. Encoder and decoder are flat lists there, with the latent layers at one end of each."""
    encoder = (["block"] + ["downsample", "block"] * (levels - 1))
    decoder = ["block"] * bottleneck_blocks + ["upsample", "block"] * (levels - 1)
    rules = [
        ("embed",          "in_block.1",                   "1x1"),       # in_block.0 is PixelUnshuffle
        ("to_latent",      f"down_blocks.{len(encoder)}.0", "1x1"),
        ("norm_latent",    f"down_blocks.{len(encoder)}.1", ""),
        ("codebook.codes", "vquantizer.embedding.weight",  ""),
        ("from_latent",    "up_blocks.0.0",                "1x1"),
        ("to_pixels",      "out_block.0",                  "1x1"),
    ]
    for i, layer in enumerate(encoder):
        rules += inside(f"encoder.{i}", f"down_blocks.{i}", VQ_RES_BLOCK) if layer == "block" else \
            [(f"encoder.{i}", f"down_blocks.{i}", "")]
    for i, layer in enumerate(decoder):
        rules += inside(f"decoder.{i}", f"up_blocks.{i + 1}", VQ_RES_BLOCK) if layer == "block" else \
            [(f"decoder.{i}", f"up_blocks.{i + 1}", "")]
    return rules


def rules_b(levels, blocks, inject, **_) -> list:
    """Stage B. There, down- and upsampling stand inside the levels' lists of blocks, and everything on
    the way up is counted from the deepest level, n - 1, to the finest, 0; here a level keeps its number."""
    n = len(levels)
    rules = [
        ("embed",      "embedding.1", "1x1"),        # embedding.0 is PixelUnshuffle
        ("embed_text", "clip_mapper", ""),
        ("head",       "clf.1",       "1x1"),        # clf.0 is the norm
    ]
    for i in range(n):
        up = n - 1 - i                               # level i on the way up, in their numbers
        pattern = levels[i] * blocks[i]
        if inject[i]:
            rules += [(f"semantic_down.{i}", f"effnet_mappers.{i}",      "1x1"),
                      (f"semantic_up.{i}",   f"effnet_mappers.{n + up}", "1x1")]
        if i > 0:                                    # .0.0 and .{last}.0 are norms
            rules += [(f"downsample.{i}",    f"down_blocks.{i}.0.1",                ""),
                      (f"upsample.{i}",      f"up_blocks.{up}.{len(pattern)}.1",    "")]
        for k, letter in enumerate(pattern):
            first = 1 if i > 0 else 0                # the downsampler is the level's element 0
            rules += inside(f"down_blocks.{i}.{k}", f"down_blocks.{i}.{first + k}", BLOCKS[letter])
            rules += inside(f"up_blocks.{i}.{k}",   f"up_blocks.{up}.{k}",          BLOCKS[letter])
    return rules


def rules_b_v1(levels, blocks, **_) -> list:
    """Stage B of v1. Its U-Net is numbered as v2's; "byt5" is the text encoder that it was first planned with."""
    unet = rules_b(levels, blocks, inject=[False] * len(levels))
    return [rule for rule in unet if rule[0] != "embed_text"] + [
        ("embed_token",    "in_mapper.0",   ""),     # in_mapper.1 is the norm
        ("embed_semantic", "effnet_mapper", ""),
        ("embed_text",     "byt5_mapper",   ""),
        ("classify",       "out_mapper.1",  "1x1"),  # out_mapper.0 is the norm
    ]


def rules_c(depth: int, **_) -> list:
    """Stage C. There, the three kinds of blocks are one list, in the order in which they run."""
    rules = [
        ("embed",        "projection",    "1x1"),
        ("embed_text.0", "cond_mapper.0", ""),
        ("embed_text.2", "cond_mapper.2", ""),
        ("head",         "out.1",         "1x1"),    # out.0 is the norm
    ]
    for i in range(depth):
        rules += inside(f"res_blocks.{i}",       f"blocks.{3 * i}",     RES_BLOCK)
        rules += inside(f"timestep_blocks.{i}",  f"blocks.{3 * i + 1}", TIMESTEP_BLOCK)
        rules += inside(f"attention_blocks.{i}", f"blocks.{3 * i + 2}", ATTENTION_BLOCK)
    return rules


def rules_efficientnet(**_) -> list:
    """The semantic compressor; `backbone` is torchvision's and keeps its names."""
    return [
        ("backbone",    "backbone", ""),
        ("to_semantic", "mapper.0", ""),
        ("norm",        "mapper.1", ""),
    ]


def rules_tiny(**_) -> list:
    """Ours alone, so there is nothing to translate."""
    return [(name, name, "") for name in ("downsample", "blocks", "to_semantic", "norm")]


def name_table(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For a model of ours: name of a tensor in diffusers' naming -> (our name, "1x1", "grn" or "")."""
    rules = {StageA: rules_a, StageB: rules_b, StageBV1: rules_b_v1, StageC: rules_c,
             EfficientNetEncoder: rules_efficientnet,
             TinyImageEncoder: rules_tiny}[type(model)]
    parts = {ours: (theirs, kind) for ours, theirs, kind in rules(**model.config)}
    table = {}
    for name in model.state_dict():
        part = name
        while part not in parts:                     # "embed.weight" belongs to the part "embed"
            assert part, f"no rule for {name} in {type(model).__name__}"
            part = part.rpartition(".")[0]
        theirs, kind = parts[part]
        table[theirs + name[len(part):]] = (name, kind)
    return table


# ----- state dicts: from either naming to ours and back ----------------------------------------------

def naming(state_dict: dict[str, Tensor]) -> str:
    """"original" or "diffusers". Where no tensor tells (neither attention nor codebook), they are the same."""
    tell = (".attn.in_proj_weight", "vquantizer.codebook.weight")
    return "original" if any(name.endswith(tell) for name in state_dict) else "diffusers"


def original_to_diffusers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """nn.MultiheadAttention stacks the rows of query, key and value; diffusers keeps three layers."""
    result = {}
    for name, tensor in state_dict.items():
        if ".attn.in_proj_" in name:                                                     # (3C, C) or (3C,)
            for part, third in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                result[name.replace("attn.in_proj_", f"{part}.")] = third                # (C, C) or (C,)
        else:
            name = name.replace(".attn.out_proj.", ".to_out.0.")
            result[name.replace("vquantizer.codebook.", "vquantizer.embedding.")] = tensor
    return result


def diffusers_to_original(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of original_to_diffusers."""
    result = {}
    for name, tensor in state_dict.items():
        if ".attention.to_q." in name:
            thirds = [state_dict[name.replace(".to_q.", f".{part}.")] for part in ("to_q", "to_k", "to_v")]
            result[name.replace(".to_q.", ".attn.in_proj_")] = torch.cat(thirds)         # (3C, C) or (3C,)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            name = name.replace(".attention.to_out.0.", ".attention.attn.out_proj.")
            result[name.replace("vquantizer.embedding.", "vquantizer.codebook.")] = tensor
    return result


def add_ones(tensor: Tensor, kind: str) -> Tensor:
    """Our shape -> theirs. The bias of a 1x1 convolution is a vector in both."""
    if kind == "1x1" and tensor.ndim == 2:
        return tensor[:, :, None, None]                                                  # (D, C, 1, 1)
    return tensor[None, None, None] if kind == "grn" else tensor                         # (1, 1, 1, C)


def drop_ones(tensor: Tensor, kind: str) -> Tensor:
    """Their shape -> ours."""
    if kind == "1x1" and tensor.ndim == 4:
        return tensor[:, :, 0, 0]                                                        # (D, C)
    return tensor[0, 0, 0] if kind == "grn" else tensor                                  # (C,)


def in_our_names(names, model: nn.Module) -> bool:
    """Do these tensor names look like ours rather than the others'? Some stand in both, for different tensors."""
    return len(names & model.state_dict().keys()) > len(names & name_table(model).keys())


def translate(tensors, names, model: nn.Module):
    """(name, tensor) pairs in any of the three namings, and the names of all -> pairs with our names and shapes. Views."""
    if in_our_names(names, model):
        yield from tensors
        return
    table = name_table(model)
    for name, tensor in tensors:
        for theirs, part in original_to_diffusers({name: tensor}).items():
            ours, kind = table[theirs]
            yield ours, drop_ones(part, kind)


def check_fit(shapes: dict[str, tuple], model: nn.Module) -> None:
    """Do tensors of these names and shapes, in any of the three namings, make up `model`? Raises WeightsError if not."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not in_our_names(shapes.keys(), model):
        wanted = {theirs: tuple(add_ones(torch.empty(wanted[ours], device="meta"), kind).shape)
                  for theirs, (ours, kind) in name_table(model).items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in original_to_diffusers(
            {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}).items()}
    check_names(shapes, wanted)


def to_ours(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict in any naming -> one that model.load_state_dict takes. Tensors are views.

    Raises WeightsError if tensors are missing, unknown or of another shape than `model` needs.
    """
    check_fit({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, model)
    return dict(translate(state_dict.items(), state_dict.keys(), model))


def to_diffusers(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict(), or another one with its names (averaged weights) -> diffusers' naming. Tensors are views."""
    return {theirs: add_ones(state_dict[ours], kind) for theirs, (ours, kind) in name_table(model).items()}


def to_original(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same in the original naming."""
    return diffusers_to_original(to_diffusers(state_dict, model))


def check_names(found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Both: name -> shape. Raises WeightsError with everything that differs, the first few of each kind by name."""
    def some(names: list) -> str:
        return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"

    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    misshapen = [f"{name} is {found[name]}, expected {wanted[name]}"
                 for name in wanted if name in found and found[name] != wanted[name]]
    problems = [f"{label}: {some(names)}" for label, names in
                (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", misshapen)) if names]
    if problems:
        raise WeightsError(f"the weights do not fit the model: {'; '.join(problems)}")


def what_it_is(shapes: dict[str, tuple]) -> str | None:
    """What a file with these names and shapes probably is, for error messages; None if nothing tells."""
    def width(name: str, axis: int = 1) -> int | None:
        return shapes[name][axis] if name in shapes and len(shapes[name]) > axis else None

    if any("lora" in name for name in shapes):
        return "a LoRA, which is added to a model and is none by itself"
    if any(name.startswith(("clip_txt_mapper.", "clip_txt_pooled_mapper.")) for name in shapes):
        return "Stable Cascade (Würstchen v3), which is another architecture"
    if "byt5_mapper.weight" in shapes:
        return "a v1 Stage B (Paella, a model of tokens)"
    text = width("cond_mapper.0.weight")
    if text is not None:
        return {1024: "a v1 Stage C (text width 1024)",
                1280: "a v2 Stage C (text width 1280)"}.get(text, f"a Stage C for texts of width {text}")
    for name, answer in (("clip_mapper.weight", "a Stage B (DiffNeXt)"), ("in_block.1.weight", "a Stage A (VQGAN)"),
                         ("backbone.0.0.weight", "an image encoder (EfficientNet)"),
                         ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
                         ("embeddings.token_embedding.weight", "a CLIP text encoder"),
                         ("embed_text.0.weight", "a Stage C in our own names"),
                         ("embed_token.weight", "a v1 Stage B in our own names"),
                         ("embed_text.weight", "a Stage B in our own names")):
        if name in shapes:
            return answer
    return None


# ----- config.json: our constructor arguments and diffusers' -----------------------------------------
# our argument = (their key, the value that a missing key stands for: the default of diffusers' class)

CONFIGS = {
    StageA: ("PaellaVQModel", dict(
        levels=("levels", 2), bottleneck_blocks=("bottleneck_blocks", 12), c_hidden=("embed_dim", 384),
        c_latent=("latent_channels", 4), codebook_size=("num_vq_embeddings", 8192),
        scale_factor=("scale_factor", 0.3764))),
    StageB: ("WuerstchenDiffNeXt", dict(
        c_in=("c_in", 4), c_out=("c_out", 4), c_timestep=("c_r", 64), patch_size=("patch_size", 2),
        c_cond=("c_cond", 1024), c_hidden=("c_hidden", [320, 640, 1280, 1280]), heads=("nhead", [-1, 10, 20, 20]),
        blocks=("blocks", [4, 4, 14, 4]), levels=("level_config", ["CT", "CTA", "CTA", "CTA"]),
        inject=("inject_effnet", [False, True, True, True]), c_semantic=("effnet_embd", 16),
        c_text=("clip_embd", 1024), kernel_size=("kernel_size", 3), dropout=("dropout", 0.1))),
    StageBV1: ("Paella", dict(             # diffusers never had it: the words are the authors'
        codebook_size=("num_labels", 8192), c_token=("c_in", 256), c_timestep=("c_r", 64), patch_size=("patch_size", 2),
        c_cond=("c_cond", 1024), c_hidden=("c_hidden", [640, 1280, 1280]), heads=("nhead", [-1, 16, 16]),
        blocks=("blocks", [4, 12, 4]), levels=("level_config", ["CT", "CTA", "CTA"]), c_semantic=("effnet_embd", 16),
        c_text=("byt5_embd", 1024), kernel_size=("kernel_size", 3), dropout=("dropout", 0.1))),
    StageC: ("WuerstchenPrior",
             dict(      # these defaults are not the released sizes; the released files spell theirs out
        c_in=("c_in", 16), c=("c", 1280), c_cond=("c_cond", 1024), c_timestep=("c_r", 64), depth=("depth", 16),
        heads=("nhead", 16), dropout=("dropout", 0.1))),
    EfficientNetEncoder: ("EfficientNetEncoder",
                          dict(c_semantic=("c_latent", 16), network=("effnet", "efficientnet_v2_s"))),
    TinyImageEncoder: ("TinyImageEncoder", dict(
        c_semantic=("c_semantic", 16), c_hidden=("c_hidden", [32, 64, 128, 256]), blocks=("blocks", [1, 2, 2, 2]))),
}
# Options of their classes that ours do not have; only these values are possible.
FIXED = {StageA: dict(in_channels=3, out_channels=3, up_down_scale_factor=2),
         EfficientNetEncoder: dict(c_cond=1280)}


def config_to_ours(config: dict, stage: type) -> dict:
    """The content of a config.json -> arguments for `stage`. Raises WeightsError for another class or impossible values."""
    class_name, table = CONFIGS[stage]
    if config.get("_class_name", class_name).removeprefix("Wuerstchen") != class_name.removeprefix("Wuerstchen"):
        raise WeightsError(f"it describes a {config['_class_name']}, expected a {class_name}")
    fixed = FIXED.get(stage, {})
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{key} is {config[key]!r}, only {value!r} is supported")
    known = {key for key, _ in table.values()} | fixed.keys()
    unknown = [key for key in config if not key.startswith("_") and key not in known]
    if unknown:
        # Not an error: later versions add options, and those that change a tensor are caught by its shape.
        warnings.warn(f"config.json of {class_name} has options that are not used here: {', '.join(unknown)}")
    arguments = {}
    for argument, (key, default) in table.items():
        value = config.get(key, default)
        if type(value) is not type(default) and not (type(value) is int and type(default) is float):
            raise WeightsError(f"{key} is {value!r}, expected something like {default!r}")
        arguments[argument] = tuple(value) if isinstance(value, list) else value
    return arguments


def config_to_diffusers(model: nn.Module) -> dict:
    """model.config -> the content of a config.json that diffusers reads."""
    class_name, table = CONFIGS[type(model)]
    values = {key: model.config[argument] for argument, (key, _) in table.items()}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"_class_name": class_name, **FIXED.get(type(model), {}), **values}


# ----- loading: one model from its folder or file ------------------------------------------------------

# The original files hold several tables; this is where each model stands, the averaged weights first.
SECTIONS = {StageA: ("state_dict",), StageB: ("state_dict",), StageBV1: ("state_dict",),
            StageC: ("ema_state_dict", "state_dict"),
            EfficientNetEncoder: ("effnet_state_dict",)}
# A tensor that tells which model a file holds: its name elsewhere, its name here.
SIGNATURES = {StageA: ("in_block.1.weight", "codebook.codes"), StageBV1: ("byt5_mapper.weight", "embed_token.weight"),
             StageB: ("clip_mapper.weight", "embed_text.weight"),
             StageC: ("cond_mapper.0.weight", "embed_text.0.weight"),
             EfficientNetEncoder: ("backbone.0.0.weight",) * 2}


@return_freed_memory()
def fill(model: nn.Module, tensors, dtype: torch.dtype) -> nn.Module:
    """Puts (our name, tensor) pairs, in `dtype`, into a model that was built on the meta device, and sets eval mode.

    A model on "meta" has shapes but no memory: a billion random numbers that would be overwritten are
    never drawn, and what is read is converted tensor by tensor, so that the file never stands in memory
    beside the model. Counters (num_batches_tracked) stay integers. Raises WeightsError for NaN or infinity.
    """
    wanted, converted = model.state_dict(), {}
    for name, tensor in tensors:
        converted[name] = tensor.to(dtype if wanted[name].is_floating_point() else wanted[name].dtype,
                                    copy=True).contiguous()
        if not is_finite(converted[name]):
            raise WeightsError(f"{name} contains NaN or infinity" + (f" in {dtype}" if is_finite(tensor) else ""))
    model.load_state_dict(converted, strict=True, assign=True)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that no file holds were not filled: {left}"
    return model.eval()


def official_sizes(stage: type, shapes: dict[str, tuple]) -> dict:
    """Arguments for `stage` where no config.json tells: the sizes of v2, which are the defaults, unless a shape is v1's."""
    shape = next((shapes[name] for name in SIGNATURES[stage] if name in shapes), ())
    if stage is StageC and shape[1:] == (1024,):
        return dict(c_cond=1024)                             # CLIP-H in place of bigG
    if stage is EfficientNetEncoder and shape[:1] == (32,):
        return dict(network="efficientnet_v2_l")
    return {}


def build_empty(stage: type, path: str | Path) -> tuple[nn.Module, TensorFile]:
    """A model without memory, and the file that fits it by names and shapes, of which no number has been read yet.

    path: its folder, or a single file. A config.json beside the file gives the sizes; without one, as beside
    the original .pt files, they are the official ones, of v1 or v2. Raises WeightsError.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = TensorFile(find_file(path, (STEM, "model")), SECTIONS.get(stage, ())) if not Path(path).is_dir() else None
    config = read_config(folder) if file is None or (folder / "config.json").is_file() else None
    try:
        with torch.device("meta"):
            model = stage(**(config_to_ours(config, stage) if config is not None
                             else official_sizes(stage, file.shapes)))
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:     # impossible numbers in it
        raise WeightsError(f"{folder / 'config.json'} cannot be used: {error}") from error
    file = file or TensorFile(find_file(path, (STEM, "model")), SECTIONS.get(stage, ()))
    try:
        check_fit(file.shapes, model)
    except WeightsError as error:
        looks = what_it_is(file.shapes)
        raise WeightsError(f"{file.path}: {error}" + (f". This looks like {looks}" if looks else "")) from error
    return model, file


def load(stage: type, path: str | Path, dtype: torch.dtype, int8: bool = False) -> nn.Module:
    """One model from its folder or file, see build_empty, in eval mode. int8: its large layers so, converted one by one while they are read."""
    model, file = build_empty(stage, path)
    tensors = translate(file, file.shapes.keys(), model)
    if int8:
        tensors = quantised(tensors, to_int8(model))
    try:
        return fill(model, tensors, dtype)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error


def load_stage_a(folder: str | Path, dtype: torch.dtype = torch.float32) -> StageA:
    """A `vqgan` folder -> the VQGAN in eval mode. Raises WeightsError."""
    return load(StageA, folder, dtype)


def load_stage_b(folder: str | Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> StageB:
    """A `decoder` folder -> the diffusion decoder in eval mode. Raises WeightsError."""
    return load(StageB, folder, dtype, int8)


def load_stage_b_v1(folder: str | Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> StageBV1:
    """A `decoder` folder of v1, or model_stage_b.pt -> the token model in eval mode. Raises WeightsError."""
    return load(StageBV1, folder, dtype, int8)


def load_stage_c(folder: str | Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> StageC:
    """A `prior` folder -> the prior in eval mode. Raises WeightsError."""
    return load(StageC, folder, dtype, int8)


def load_image_encoder(path: str | Path, dtype: torch.dtype = torch.float32) -> EfficientNetEncoder | TinyImageEncoder:
    """An `image_encoder` folder, or a file such as model_v2_stage_b.pt -> the semantic compressor in eval mode. Raises WeightsError."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    stage = EfficientNetEncoder
    if path.is_dir() or (folder / "config.json").is_file():
        name = read_config(folder).get("_class_name")
        encoders = {stage.__name__: stage for stage in (EfficientNetEncoder, TinyImageEncoder)}
        name = str(name).removeprefix("Wuerstchen")      # OneTrainer's name for it
        if name not in encoders:
            raise WeightsError(f"{folder / 'config.json'} describes a {name}, expected one of {', '.join(encoders)}")
        stage = encoders[name]
    return load(stage, path, dtype)


def extract_image_encoder(file: str | Path, folder: str | Path) -> None:
    """Takes the image encoder out of the original decoder file, 6 GB, into a folder of 80 MB, bit by bit the same."""
    model = load_image_encoder(file)
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(model.state_dict(), model).items()}
    write_files(config_to_diffusers(model), tensors, folder, STEM)


def load_text_encoder(encoder_folder: str | Path, tokenizer_folder: str | Path, dtype: torch.dtype = torch.float32):
    """Two folders as transformers writes them -> (tokenizer, CLIPTextModel in eval mode). Raises WeightsError.

    The published files have "text_model." in front of every name, those that transformers 5 writes do
    not, and its model does not either. Older files also hold `position_ids`, which is 0, 1, 2, ...
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    read_config(encoder_folder)                                        # for its error messages
    try:
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig.from_pretrained(encoder_folder, local_files_only=True))
    except Exception as error:
        raise WeightsError(f"{Path(encoder_folder) / 'config.json'} cannot be used: {error}") from error
    path = find_file(encoder_folder, ("model", "pytorch_model"))
    file, wanted = TensorFile(path), {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "text_model." if all(name.startswith("text_model.") for name in wanted) else ""

    def here(name: str) -> str:
        return prefix + name.removeprefix("text_model.")

    def stray(name: str) -> bool:
        return name.endswith("embeddings.position_ids")
    positions = torch.arange(model.config.max_position_embeddings)[None]                 # (1, 77), in no file
    for module in model.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = positions
    try:
        check_names({here(name): shape for name, shape in file.shapes.items() if not stray(name)}, wanted)
        fill(model, ((here(name), tensor) for name, tensor in file if not stray(name)), dtype)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error

    tokenizer_folder = Path(tokenizer_folder)
    if not any((tokenizer_folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise WeightsError(f"{tokenizer_folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except Exception as error:     # tokenizers raises plain Exception
        raise WeightsError(f"the tokenizer in {tokenizer_folder} cannot be read: {error}") from error
    return tokenizer, model


def check_widths(width: int, folder: str | Path, stage: str) -> None:
    """Raises WeightsError if the text encoder in `folder` gives vectors of another width than a stage takes."""
    found = read_config(folder).get("hidden_size")
    if found != width:
        raise WeightsError(f"{stage} takes texts of width {width}, the text encoder {folder} gives {found}: "
                           f"CLIP bigG (1280) belongs to v2's Stage C, CLIP H (1024) to v2's Stage B and to v1")


def stage_b_of(place: str | Path) -> type:
    """StageB or, where this is a decoder of v1, StageBV1: as config.json says, or else the names of the tensors. Raises WeightsError."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    if Path(place).is_dir() or (folder / "config.json").is_file():
        v1 = read_config(folder).get("_class_name") == CONFIGS[StageBV1][0]
    else:
        shapes = TensorFile(find_file(place, (STEM, "model")), SECTIONS[StageB]).shapes
        v1 = any(name in shapes for name in SIGNATURES[StageBV1])
    return StageBV1 if v1 else StageB


def is_tiny(place: str | Path) -> bool:
    """Is this image encoder the small one of models/tiny, for pictures of 128 px?"""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    return (folder / "config.json").is_file() and read_config(folder).get("_class_name") == "TinyImageEncoder"


# ----- saving -----------------------------------------------------------------------------------------

def save_stage_a(model: StageA, folder: str | Path) -> None:
    """Writes the VQGAN as diffusers would, in float16. Its scale_factor goes into config.json."""
    assert model.config["scale_factor"] == model.scale_factor, "scale_factor was changed in one place only"
    write_model(config_to_diffusers(model), to_diffusers(model.state_dict(), model), folder, STEM)


def save_stage_b(model: StageB, folder: str | Path) -> None:
    """Writes the diffusion decoder as diffusers would, in float16."""
    write_model(config_to_diffusers(model), to_diffusers(model.state_dict(), model), folder, STEM)


def save_stage_b_v1(model: StageBV1, folder: str | Path) -> None:
    """Writes the token model, in float16, in the form of the others: diffusers has none of its own."""
    write_model(config_to_diffusers(model), to_diffusers(model.state_dict(), model), folder, STEM)


def save_stage_c(model: StageC, folder: str | Path) -> None:
    """Writes the prior as diffusers would, in float16."""
    write_model(config_to_diffusers(model), to_diffusers(model.state_dict(), model), folder, STEM)


def save_image_encoder(model: EfficientNetEncoder | TinyImageEncoder, folder: str | Path) -> None:
    """Writes the image encoder in float16; EfficientNet in the official names."""
    write_model(config_to_diffusers(model), to_diffusers(model.state_dict(), model), folder, STEM)


def save_scheduler(folder: str | Path) -> None:
    """Writes a `scheduler` folder, so that diffusers too finds all parts: the only schedule there is here."""
    config = dict(_class_name="DDPMWuerstchenScheduler", s=0.008, scaler=1.0)
    write_atomically(Path(folder) / "scheduler_config.json",
                     lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def save_text_encoder(tokenizer, encoder, folder: str | Path, tokenizer_folder: str | Path) -> None:
    """Writes a CLIPTextModel, in float16 and with the published names, and its tokenizer, as transformers reads them."""
    import tempfile
    config = json.loads(encoder.config.to_json_string(use_diff=False))
    config.update(architectures=["CLIPTextModel"], dtype="float16", torch_dtype="float16")   # read by transformers 5, 4
    tensors = {"text_model." + name.removeprefix("text_model."): tensor
               for name, tensor in encoder.state_dict().items()}
    write_model(config, tensors, folder, "model")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for source in Path(temporary).iterdir():
            data = source.read_bytes()
            write_atomically(Path(tokenizer_folder) / source.name, lambda path: path.write_bytes(data))


# ----- python -m loading.weights convert ----------------------------------------------------------------------


def convert(source: str | Path, target: str | Path, to: str) -> int:
    """Rewrites one model in another naming: "ours", "diffusers" or "original"; the numbers stay as they are, bit by bit.

    source, target: a folder with config.json, or a file. A target .pt holds one table as the authors' files do, a
    .safetensors the tensors alone. Returns the number of tensors written. Raises WeightsError.
    """
    from safetensors.torch import save_file
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WeightsError(f"{target} exists already and is not overwritten: choose another name")
    file = TensorFile(find_file(source, (STEM, "model")), sum(SECTIONS.values(), ()))
    stage = next((stage for stage, names in SIGNATURES.items() if any(name in file.shapes for name in names)), None)
    if stage is None:
        raise WeightsError(f"{file.path} holds none of the models that are converted: Stage A, B, C or the image encoder"
                           + (f". This looks like {looks}" if (looks := what_it_is(file.shapes)) else ""))
    model, file = build_empty(stage, source)
    ours = {name: tensor.clone() for name, tensor in translate(file, file.shapes.keys(), model)}
    tensors = {"ours": lambda ours, _: ours, "diffusers": to_diffusers, "original": to_original}[to](ours, model)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if target.suffix in (".pt", ".bin"):
        table = {SECTIONS[stage][0]: tensors} if target.suffix == ".pt" else tensors
        write_atomically(target, lambda path: torch.save(table, path))
    elif target.suffix == ".safetensors":
        write_atomically(target, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    else:
        write_files(config_to_diffusers(model), tensors, target, STEM)
    return len(tensors)


if __name__ == "__main__":
    import argparse
    p = argparse.ArgumentParser(description="Converts one model's weights between the three namings; see the top of weights.py.")
    command = p.add_subparsers(dest="command", required=True).add_parser("convert",
                                                                         help="rewrite a model's names, not its numbers")
    command.add_argument("source", help="folder with config.json, or a .safetensors, .bin or .pt file")
    command.add_argument("target", help="folder, .safetensors, .bin or .pt; must not exist yet")
    command.add_argument("--to", required=True, choices=["ours", "diffusers", "original"], help="the naming to write")
    args = p.parse_args()
    try:
        print(f"{convert(args.source, args.target, args.to)} tensors written to {args.target}")
    except (WeightsError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
