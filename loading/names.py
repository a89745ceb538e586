"""Names: translates tensor names, shapes and config.json of the released weights into ours, and back.

  "projection.weight" (C,16,1,1), as released  <->  "embed.weight" (C,16), in our StageC

The released weights come in two namings: "original", from the authors' training code, and "diffusers", from the
Hugging Face library. Their attention layers differ: the original has one fused matrix for query, key and value,
diffusers has three matrices. The name of the codebook differs too. Our models use a third, more readable naming
("expand" instead of "channelwise.0"). A list of rules maps our name of each layer to diffusers' name. Values never
change, so translating there and back gives the same file.

Shapes differ in two places, because our models are channels-last: a released 1x1 convolution (D,C,1,1) is a Linear
(D,C) here, and the released parameters of GlobalResponseNorm have the shape (1,1,1,C), here (C,).
Needs: torch; the stage files.
"""
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from loading.errors import WeightsError, warn
from stage_a import StageA
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder
from stage_c import StageC
from v1.stage_b import StageBV1


# ----- rules: our name, diffusers' name, and how the shape differs --------------------------------------------------
# A rule covers one layer with all its tensors (weight, bias, running_mean, ...), or a single tensor.
# Third column: "1x1" is a Linear here, a 1x1 convolution in diffusers; "grn" is (C,) here, (1,1,1,C) in diffusers.

RES_BLOCK = [
    ("depthwise",   "depthwise",          ""),
    ("expand",      "channelwise.0",      ""),       # channelwise.1, GELU, has no weights
    ("grn",         "channelwise.2",      "grn"),    # channelwise.3, Dropout, has no weights
    ("contract",    "channelwise.4",      ""),
]
TIMESTEP_BLOCK = [
    ("mapper",      "mapper",             ""),
]
ATTENTION_BLOCK = [
    ("text_mapper", "kv_mapper.1",        ""),       # kv_mapper.0, SiLU, has no weights
    ("query",       "attention.to_q",     ""),
    ("key",         "attention.to_k",     ""),
    ("value",       "attention.to_v",     ""),
    ("out",         "attention.to_out.0", ""),       # to_out.1, Dropout, has no weights
]
VQ_RES_BLOCK = [
    ("depthwise",   "depthwise.1",        ""),       # depthwise.0, the padding, has no weights
    ("expand",      "channelwise.0",      ""),
    ("contract",    "channelwise.2",      ""),
    ("gammas",      "gammas",             ""),
]
BLOCKS = {"C": RES_BLOCK, "T": TIMESTEP_BLOCK, "A": ATTENTION_BLOCK}     # {letter in a pattern such as "CTA": rules}


def inside(ours: str, theirs: str, block: list) -> list:
    """Prefixes the rules `block`, such as RES_BLOCK, with a block's name: `ours` here, `theirs` in diffusers."""
    return [(f"{ours}.{a}", f"{theirs}.{b}", kind) for a, b, kind in block]


def rules_a(levels: int, bottleneck_blocks: int, **_) -> list:
    """Returns a StageA's rules. In diffusers, its lists of blocks also contain to_latent, norm_latent, from_latent."""
    encoder = ["block"] + ["downsample", "block"] * (levels - 1)
    decoder = ["block"] * bottleneck_blocks + ["upsample", "block"] * (levels - 1)
    rules = [
        ("embed",          "in_block.1",                    "1x1"),      # in_block.0, PixelUnshuffle, has no weights
        ("to_latent",      f"down_blocks.{len(encoder)}.0", "1x1"),
        ("norm_latent",    f"down_blocks.{len(encoder)}.1", ""),
        ("codebook.codes", "vquantizer.embedding.weight",   ""),
        ("from_latent",    "up_blocks.0.0",                 "1x1"),
        ("to_pixels",      "out_block.0",                   "1x1"),
    ]
    layers = [(f"encoder.{i}", f"down_blocks.{i}", kind) for i, kind in enumerate(encoder)]
    layers += [(f"decoder.{i}", f"up_blocks.{i + 1}", kind) for i, kind in enumerate(decoder)]
    for ours, theirs, kind in layers:
        rules += inside(ours, theirs, VQ_RES_BLOCK) if kind == "block" else [(ours, theirs, "")]
    return rules


def rules_b(levels, blocks, inject, **_) -> list:
    """Returns a StageB's rules. In diffusers, the lists of blocks also contain down- and upsampling layers, and
    up_blocks are numbered from the coarsest level. Here up_blocks.i belongs to level i, where level 0 is the finest."""
    n = len(levels)
    rules = [
        ("embed",      "embedding.1", "1x1"),        # embedding.0, PixelUnshuffle, has no weights
        ("embed_text", "clip_mapper", ""),
        ("head",       "clf.1",       "1x1"),        # clf.0, the norm, has no weights
    ]
    for i in range(n):
        up = n - 1 - i                               # diffusers' number of level i in up_blocks
        pattern = levels[i] * blocks[i]
        if inject[i]:
            rules += [(f"semantic_down.{i}", f"effnet_mappers.{i}",      "1x1"),
                      (f"semantic_up.{i}",   f"effnet_mappers.{n + up}", "1x1")]
        if i > 0:                                    # diffusers: element 0 is a norm without weights, 1 is our layer
            rules += [(f"downsample.{i}",    f"down_blocks.{i}.0.1",                ""),
                      (f"upsample.{i}",      f"up_blocks.{up}.{len(pattern)}.1",    "")]
        for k, letter in enumerate(pattern):
            first = 1 if i > 0 else 0                # in diffusers, element 0 of levels 1, 2, ... is the downsampling
            rules += inside(f"down_blocks.{i}.{k}", f"down_blocks.{i}.{first + k}", BLOCKS[letter])
            rules += inside(f"up_blocks.{i}.{k}",   f"up_blocks.{up}.{k}",          BLOCKS[letter])
    return rules


def rules_b_v1(levels, blocks, **_) -> list:
    """Returns StageBV1's rules. Levels are numbered as in rules_b. "byt5_mapper" was named after an earlier encoder."""
    unet = rules_b(levels, blocks, inject=[False] * len(levels))
    return [rule for rule in unet if rule[0] != "embed_text"] + [
        ("embed_token",    "in_mapper.0",   ""),     # in_mapper.1, the norm, has no weights
        ("embed_semantic", "effnet_mapper", ""),
        ("embed_text",     "byt5_mapper",   ""),
        ("classify",       "out_mapper.1",  "1x1"),  # out_mapper.0, the norm, has no weights
    ]


def rules_c(depth: int, **_) -> list:
    """Returns a StageC's rules. In diffusers, all its blocks are in one list, in the order in which they run."""
    rules = [
        ("embed",        "projection",    "1x1"),
        ("embed_text.0", "cond_mapper.0", ""),
        ("embed_text.2", "cond_mapper.2", ""),
        ("head",         "out.1",         "1x1"),    # out.0, the norm, has no weights
    ]
    for i in range(depth):
        rules += inside(f"res_blocks.{i}",       f"blocks.{3 * i}",     RES_BLOCK)
        rules += inside(f"timestep_blocks.{i}",  f"blocks.{3 * i + 1}", TIMESTEP_BLOCK)
        rules += inside(f"attention_blocks.{i}", f"blocks.{3 * i + 2}", ATTENTION_BLOCK)
    return rules


# ----- formats: what the released files look like, for each of our models -------------------------------------------

class Format(NamedTuple):
    """Describes the released files of one model: names of its tensors and keys of its config.json."""
    description: str
    rules: Callable[..., list]     # rules(**model.config) returns the list of rules
    class_name: str                # _class_name in config.json
    arguments: dict                # {our argument: (key in config.json, the default in diffusers)}
    fixed: dict = {}               # {key in config.json that our class lacks: the only supported value}
    signature: tuple = ()          # (released name, our name) of a tensor that only this model has
    # Keys under which an original .pt file may hold the state dict. The first key found is read: EMA weights, if any.
    sections: tuple = ()


FORMATS = {
    StageA: Format(
        "a Stage A (VQGAN)", rules_a, "PaellaVQModel", dict(
            levels=("levels", 2), bottleneck_blocks=("bottleneck_blocks", 12), c_hidden=("embed_dim", 384),
            c_latent=("latent_channels", 4), codebook_size=("num_vq_embeddings", 8192),
            scale_factor=("scale_factor", 0.3764)),
        fixed=dict(in_channels=3, out_channels=3, up_down_scale_factor=2),
        signature=("in_block.1.weight", "codebook.codes"), sections=("state_dict",)),
    StageBV1: Format(                  # diffusers never had this model, so these are the keys of the authors' code
        "a v1 Stage B (Paella, a model of tokens)", rules_b_v1, "Paella", dict(
            codebook_size=("num_labels", 8192), c_token=("c_in", 256), c_timestep=("c_r", 64),
            patch_size=("patch_size", 2), c_cond=("c_cond", 1024), c_hidden=("c_hidden", [640, 1280, 1280]),
            heads=("nhead", [-1, 16, 16]), blocks=("blocks", [4, 12, 4]), levels=("level_config", ["CT", "CTA", "CTA"]),
            c_semantic=("effnet_embd", 16), c_text=("byt5_embd", 1024), kernel_size=("kernel_size", 3),
            dropout=("dropout", 0.1)),
        signature=("byt5_mapper.weight", "embed_token.weight"), sections=("state_dict",)),
    StageB: Format(
        "a Stage B (DiffNeXt)", rules_b, "WuerstchenDiffNeXt", dict(
            c_in=("c_in", 4), c_out=("c_out", 4), c_timestep=("c_r", 64), patch_size=("patch_size", 2),
            c_cond=("c_cond", 1024), c_hidden=("c_hidden", [320, 640, 1280, 1280]), heads=("nhead", [-1, 10, 20, 20]),
            blocks=("blocks", [4, 4, 14, 4]), levels=("level_config", ["CT", "CTA", "CTA", "CTA"]),
            inject=("inject_effnet", [False, True, True, True]), c_semantic=("effnet_embd", 16),
            c_text=("clip_embd", 1024), kernel_size=("kernel_size", 3), dropout=("dropout", 0.1)),
        signature=("clip_mapper.weight", "embed_text.weight"), sections=("state_dict",)),
    StageC: Format(                    # these defaults are not the released sizes, which are in config.json
        "a Stage C", rules_c, "WuerstchenPrior", dict(
            c_in=("c_in", 16), c=("c", 1280), c_cond=("c_cond", 1024), c_timestep=("c_r", 64), depth=("depth", 16),
            heads=("nhead", 16), dropout=("dropout", 0.1)),
        signature=("cond_mapper.0.weight", "embed_text.0.weight"), sections=("ema_state_dict", "state_dict")),
    EfficientNetEncoder: Format(
        "an image encoder (EfficientNet)",       # `backbone` is torchvision's network, whose names we keep
        lambda **_: [("backbone", "backbone", ""), ("to_semantic", "mapper.0", ""), ("norm", "mapper.1", "")],
        "EfficientNetEncoder", dict(
            c_semantic=("c_latent", 16), network=("effnet", "efficientnet_v2_s")),
        fixed=dict(c_cond=1280), signature=("backbone.0.0.weight",), sections=("effnet_state_dict",)),
    TinyImageEncoder: Format(
        "a small image encoder",                 # exists only in this repository, so no names differ
        lambda **_: [(name, name, "") for name in ("downsample", "blocks", "to_semantic", "norm")],
        "TinyImageEncoder", dict(
            c_semantic=("c_semantic", 16), c_hidden=("c_hidden", [32, 64, 128, 256]), blocks=("blocks", [1, 2, 2, 2]))),
}


def recognise(names: Iterable[str]) -> type | None:
    """Returns our class, such as StageA, for weights with these tensor names in any naming; None if no class fits."""
    return next((stage for stage, form in FORMATS.items() if any(name in names for name in form.signature)), None)


def describe(shapes: dict[str, tuple]) -> str | None:
    """Returns a phrase such as "a v2 Stage C" for a file with these {tensor name: shape}; None if unknown."""
    if any("lora" in name for name in shapes):
        return "a LoRA, which is added to a model and is not a model by itself"
    if any(name.startswith(("clip_txt_mapper.", "clip_txt_pooled_mapper.")) for name in shapes):
        return "Stable Cascade (Würstchen v3), which is another architecture"
    if any(name.endswith("embeddings.token_embedding.weight") for name in shapes):
        return "a CLIP text encoder"
    stage = recognise(shapes)
    width = signature_shape(stage, shapes)[1:] if stage is StageC else ()
    if width:
        return {1024: "a v1 Stage C", 1280: "a v2 Stage C"}.get(width[0], "a Stage C") + f" (text width {width[0]})"
    return FORMATS[stage].description if stage else None


def signature_shape(stage: type, shapes: dict[str, tuple]) -> tuple:
    """Returns from {tensor name: shape} the shape of the tensor by which `stage` is recognised; () if it is missing."""
    return next((shapes[name] for name in FORMATS[stage].signature if name in shapes), ())


# ----- state dicts: from any naming to ours, and back ----------------------------------------------------------------

def name_table(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Returns {diffusers' name: (our name, kind)} of a model's tensors. kind: "1x1", "grn" or "", see RES_BLOCK."""
    parts = {ours: (theirs, kind) for ours, theirs, kind in FORMATS[type(model)].rules(**model.config)}
    table = {}
    for name in model.state_dict():
        part = name
        while part not in parts:                     # the rule for "embed" covers "embed.weight"
            assert part, f"no rule for {name} in {type(model).__name__}"
            part = part.rpartition(".")[0]
        theirs, kind = parts[part]
        table[theirs + name[len(part):]] = (name, kind)
    return table


def original_to_diffusers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict from the original naming to diffusers'. Splits each query-key-value matrix into three."""
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
    """Converts a state dict from diffusers' naming to the original. Stacks query, key and value in one matrix again."""
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
    """Returns a tensor of ours in diffusers' shape, which may have more dimensions of size 1. kind: see name_table."""
    if kind == "1x1" and tensor.ndim == 2:
        return tensor[:, :, None, None]                                                  # (D, C, 1, 1)
    return tensor[None, None, None] if kind == "grn" else tensor                         # (1, 1, 1, C)


def in_our_names(names, model: nn.Module) -> bool:
    """Returns whether more of `names` are ours than diffusers'. It counts all, because some names occur in both."""
    return len(names & model.state_dict().keys()) > len(names & name_table(model).keys())


def translate(tensors: Iterable[tuple[str, Tensor]], names, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Converts (name, tensor) pairs from any of the three namings to our names and shapes. The tensors are views.

    names: the names of all pairs, to recognise the naming before the first pair is read. They must pass check_fit.
    """
    if in_our_names(names, model):
        yield from tensors
        return
    table, wanted = name_table(model), model.state_dict()
    for name, tensor in tensors:
        for theirs, part in original_to_diffusers({name: tensor}).items():
            ours, _ = table[theirs]
            yield ours, part.reshape(wanted[ours].shape)                                 # removes dimensions of size 1


def check_fit(shapes: dict[str, tuple], model: nn.Module) -> None:
    """Raises WeightsError unless {name in any of the three namings: shape} fits the tensors of `model` exactly."""
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    wanted = model.state_dict()
    if not in_our_names(shapes.keys(), model):
        found, wanted = original_to_diffusers(found), to_diffusers(wanted, model)
    check_names(*({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (found, wanted)))


def check_names(found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    """Raises WeightsError, which lists names that do not match, unless found equals wanted, each {name: shape}."""
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


def to_diffusers(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts a state dict of `model`, such as EMA weights, to diffusers' names and shapes. Its tensors are views."""
    return {theirs: add_ones(state_dict[ours], kind) for theirs, (ours, kind) in name_table(model).items()}


def to_original(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts a state dict of `model` to the names and shapes of the original naming."""
    return diffusers_to_original(to_diffusers(state_dict, model))


# ----- config.json: our constructor arguments and diffusers' ---------------------------------------------------------

def config_to_ours(config: dict, stage: type) -> dict:
    """Converts a config.json's content to arguments of `stage`. Raises WeightsError for another class or a bad value.

    A config.json by `tools.weights convert --to ours`, whose keys are our arguments, without _class_name, is accepted.
    """
    class_name, arguments, fixed = FORMATS[stage].class_name, FORMATS[stage].arguments, FORMATS[stage].fixed
    if in_our_words(config, stage):
        arguments, fixed = {name: (name, default) for name, (_, default) in arguments.items()}, {}
    found = config.get("_class_name", class_name)
    if str(found).removeprefix("Wuerstchen") != class_name.removeprefix("Wuerstchen"):
        raise WeightsError(f"it describes a {found}, expected a {class_name}")
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{key} is {config[key]!r}, only {value!r} is supported")
    known = {key for key, _ in arguments.values()} | fixed.keys()
    unknown = [key for key in config if not key.startswith("_") and key not in known]
    if unknown:
        # Only warn: later versions of diffusers add options, and check_fit finds those that change a tensor's shape.
        warn(f"config.json of {class_name} has options that are not used here: {', '.join(unknown)}")
    result = {}
    for argument, (key, default) in arguments.items():
        value = config.get(key, default)
        if key == "dropout" and stage is StageB and isinstance(value, list):
            levels = len(config.get("blocks", arguments["blocks"][1]))
            if len(value) != levels or not all(type(one) in (int, float) for one in value):
                raise WeightsError(f"dropout is {value!r}, expected something like {default!r}, or {levels} of them, "
                                   f"one for each level")
        elif type(value) is not type(default) and not (type(value) is int and type(default) is float):
            raise WeightsError(f"{key} is {value!r:.200}, expected something like {default!r}")
        elif isinstance(value, list) and {*map(type, value)} != {type(default[0])}:
            raise WeightsError(f"{key} is {value!r:.200}, expected something like {default!r}")
        low, high = RANGES.get(argument, (1, 2 ** 17))
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (int, float)) and not low <= one <= high:
                raise WeightsError(f"{key} is {value!r:.200}, expected {low} to {high}")
        result[argument] = tuple(value) if isinstance(value, list) else value
    check_levels(result)
    return result


# {argument: (smallest, largest value)}; other arguments: 1 to 2^17. Values outside are rejected as typing errors.
RANGES = dict(depth=(1, 1000), blocks=(0, 1000), bottleneck_blocks=(0, 1000), levels=(1, 8), heads=(-1, 2 ** 10),
              dropout=(0, 0.99), scale_factor=(1e-6, 1e6), patch_size=(1, 64), kernel_size=(1, 99), inject=(0, 1),
              c_timestep=(4, 2 ** 17))


def check_levels(sizes: dict) -> None:
    """Raises WeightsError if lists in `sizes` differ in length, kernel_size is even, or heads do not divide a width."""
    lists = {name: value for name, value in sizes.items() if isinstance(value, tuple)}
    if len({*map(len, lists.values())}) > 1:
        raise WeightsError("its lists have different lengths, expected one entry for each level: " + ", ".join(
            f"{name} has {len(value)}" for name, value in lists.items()))
    if sizes.get("kernel_size", 1) % 2 == 0:
        raise WeightsError(f"kernel_size is {sizes['kernel_size']}, expected an odd number")
    if "heads" in sizes:
        widths = sizes["c_hidden"] if "levels" in sizes else [sizes["c"]]
        levels, heads = (sizes["levels"], sizes["heads"]) if "levels" in sizes else (["A"], [sizes["heads"]])
        for width, level, n in zip(widths, levels, heads):
            if "A" in level and (n < 1 or width % n):
                raise WeightsError(f"nhead is {sizes['heads']}, expected numbers that divide the widths: {n} heads do "
                                   f"not divide {width}")


def in_our_words(config: dict, stage: type) -> bool:
    """Returns whether the keys of a config.json are our argument names for `stage`, not diffusers' keys."""
    ours, theirs = FORMATS[stage].arguments.keys(), {key for key, _ in FORMATS[stage].arguments.values()}
    return "_class_name" not in config and 0 < len(config) and config.keys() <= ours \
        and (ours == theirs or not config.keys() <= theirs)


def config_to_diffusers(model: nn.Module) -> dict:
    """Converts model.config to the content of a config.json that diffusers reads."""
    form = FORMATS[type(model)]
    values = {key: model.config[argument] for argument, (key, _) in form.arguments.items()}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"_class_name": form.class_name, **form.fixed, **values}
