"""Reads LoRA files of other programs into lora.py's names, and writes LoRA files for other programs.

All programs store the same two matrices for a layer, under different names. The original code, and programs built on
it, stack query, key and value in one matrix `in_proj`. We `split` its LoRA into three LoRAs, and `fuse` them again.

  load_lora(model, source, name, scale)           # like lora.load_lora, for a file of any program
  save_lora(model, path, name, to="kohya")        # or diffusers, comfy, original, ours
  weights, metadata = read_lora(source)           # without a model: {layer's name: LoRAWeights}

If any tensor of a file is unknown, nothing is loaded, and the error counts and names such tensors. If we skipped them,
a LoRA might have no effect. With lora_partial=True the known layers are read, and a warning lists the other tensors.
alpha comes from the layer's own tensor, or else from the configuration in the header or next to the file. If both are
missing, alpha = rank is assumed, with a warning, because a wrong alpha changes the strength of the LoRA.
Needs: torch, safetensors, numpy; lora.py, loading/errors.py, loading/files.py.
"""
import contextlib
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import lora
from loading.errors import WeightsError, printable, warn
from loading.files import (is_safetensors, is_table, listing, parsed, read_json, reading_weights, reason_of,
                           write_tensors)
from loading.hub import LORA_FILES, fetch_lora, is_reference


class LoRAWeights(NamedTuple):
    """The LoRA of one layer. For a convolution: down (rank, in, k, k) and up (out, rank, 1, 1)."""
    down: Tensor                       # (rank, in)
    up: Tensor                         # (out, rank)
    alpha: float
    magnitude: Tensor | None = None    # (out,), only in a DoRA


# Formats to write: {format: (prefix of the layers' names, index of the tensors' endings in lora.ROLES)}.
FORMATS = {
    "diffusers": ("prior.", 1),              # alpha is in the metadata; other formats have a tensor {layer}.alpha
    "kohya":     ("lora_unet_", 0),          # layers' names have _ instead of .
    "comfy":     ("diffusion_model.", 1),
    "original":  ("", 0),                    # query, key and value are stacked in one layer, in_proj
    "ours":      ("", 0),                    # layers have our names, as in checkpoints
}
# Formats to read: a tensor's name is one of PREFIXES + the layer's name + one of ENDINGS.
PREFIXES = ("prior.", "diffusion_model.", "lora_unet_", "lora_prior_unet_", "lora_prior_unet.", "unet.",
            "base_model.model.", "")
ENDINGS = {
    "down":      (".lora_A.weight", ".lora_down.weight", "_lora.down.weight", ".lora.down.weight"),
    "up":        (".lora_B.weight", ".lora_up.weight", "_lora.up.weight", ".lora.up.weight"),
    "alpha":     (".alpha",),
    "magnitude": (".lora_magnitude_vector.weight", ".lora_magnitude_vector"),
}
# Parts of names to remove: added by torch.compile, by DDP, and by peft for adapters (lora_A.default.weight).
WRAPPERS = re.compile(r"(?<![^.])module\.|_orig_mod[._]|(?<=\.lora_[AB])\.(?!weight$)\w+(?=\.weight$)"
                      r"|(?<=\.lora_magnitude_vector)\.(?!weight$)\w+(?=(\.weight)?$)")
CONFIG = "lora_adapter_metadata"       # diffusers' header key for peft's configuration in JSON
ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")     # keys for alpha in other programs' headers
# With these init_lora_weights, peft changes the base weights before training, so the LoRA fits only the changed ones.
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
# {pattern: what the file probably is}, for error messages. The first pattern that matches the unknown names counts.
FOREIGN = {
    r"\A(?!.*(lora|lycoris|hada_|lokr_|bundle_emb))": "a whole model, not a LoRA",
    r"hada_|lokr_|oft_|glora": "another method than LoRA (LoHa, LoKr, OFT, ...)",
    r"dora_scale": "a DoRA in LyCORIS' form, which does not say whether its scale is per input or per output",
    r"^(lora_te|lora_prior_te|text_encoder)": "a LoRA that also changes a text encoder",
    r"^(bundle_emb|embeddings\.)": "a LoRA with learned words, which no model here can take",
    r"^weights\.\d": "a LoRA of Stable Cascade's trainer, which numbers the layers instead of naming them",
    r"double_blocks|single_transformer_blocks|joint_blocks": "a LoRA for Flux or Stable Diffusion 3",
    r"transformer_blocks|attentions_\d|attn1|input_blocks": "a LoRA for Stable Diffusion",
    r"down_blocks|up_blocks": "a LoRA for Stable Cascade (Würstchen v3) or for Stage B",
    r"depthwise": "a LoRA that was also trained on grouped convolutions, which no program can apply as it was trained",
    r"": "a LoRA for another model",
}


# ----- reading ---------------------------------------------------------------------------------------

def find_lora(path: str | Path) -> Path:
    """Returns the first of LORA_FILES that exists in the folder `path`. Returns any other path unchanged."""
    return next((Path(path) / name for name in LORA_FILES if (Path(path) / name).is_file()), Path(path))


def open_lora(source: str | Path | dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors, metadata) of a LoRA. source: a file, a folder with one of LORA_FILES, "hub:owner/name", or a
    state dict. Adds peft's configuration, a separate file, to the metadata. Raises ValueError for invalid files."""
    if isinstance(source, dict):
        return source, {}
    path, metadata = find_lora(fetch_lora(source) if is_reference(source) else source), {}
    if path.is_dir():
        raise ValueError(f"the folder holds no LoRA: expected {', '.join(LORA_FILES)}; found {listing(path)}")
    if not path.is_file():
        raise ValueError("there is no such file")
    with reading_weights(path):
        if is_safetensors(path):
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not is_table(tensors):
        raise ValueError("it does not contain a table of tensors, so it is not a LoRA")
    config = path.parent / "adapter_config.json"
    of_peft = path.stem == "adapter_model" or any(name.startswith("base_model.model.") for name in tensors)
    if CONFIG not in metadata and of_peft and config.exists():
        metadata[CONFIG] = json.dumps(read_json(config))
    return tensors, metadata


def read_config(metadata: dict[str, str]) -> dict:
    """Returns peft's configuration (alpha, ...) in the metadata, or {}. Raises ValueError if it cannot be used."""
    config = parsed(metadata.get(CONFIG) or "{}")
    if not isinstance(config, dict):
        raise ValueError(f"its {CONFIG} is not a JSON object")
    config = {re.sub(r"^(prior|unet)\.", "", key): value for key, value in config.items()}
    start, kind = config.get("init_lora_weights"), config.get("peft_type")
    if isinstance(start, str) and start.startswith(OTHER_BASES):
        raise ValueError(f"it starts from {start}, which changes the base weights: save it as a plain LoRA, with "
                         "peft's path_initial_model_for_weight_conversion")
    if kind not in (None, "LORA"):
        raise ValueError(f"its configuration is for {kind}, expected LORA")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(f"use_rslora is {config['use_rslora']!r}, expected true or false")
    for key in ALPHAS:
        if not config and re.fullmatch(r"[-+.\deE]+|nan|inf", metadata.get(key, "")):   # ignores "1 to 8", "None"
            config = dict(lora_alpha=float(metadata[key]))
    return config


def aliases(names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns {a layer's name in any format, without prefix: tuple of our names}. The tuple has one name, or three for
    in_proj, which stacks three of our layers.

    names: {our name: diffusers' name}."""
    lookup = {}
    for name, theirs in names.items():
        block, _, layer = theirs.partition(".attention.")
        same = [name, theirs]
        if layer == "to_out.0":                          # add the names of older diffusers and the original code
            same += [f"{block}.attention.{other}" for other in ("processor.to_out", "to_out", "attn.out_proj")]
        elif layer in ("to_q", "to_k", "to_v"):          # add older diffusers' names and OneTrainer's thirds of in_proj
            third = ("to_q", "to_k", "to_v").index(layer)
            same += [f"{block}.attention.processor.{layer}", f"{block}.attention.attn.in_proj.{third}"]
        lookup |= {alias: (name,) for alias in same}
        if layer == "to_q":
            trio = tuple(name.removesuffix("query") + one for one in ("query", "key", "value"))
            lookup |= {f"{block}.attention.attn.in_proj": trio, f"{block}.attention.attn.in_proj_weight": trio}
    # kohya replaces "." by "_", so "a_b" may mean a.b or a_b. Looking up all known names avoids guessing.
    return {alias.replace(".", "_"): names for alias, names in lookup.items()} | lookup


def parse_name(name: str, lookup: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...] | None, str]:
    """Parses a tensor's name. Returns (our names of the layers, key of ENDINGS such as "up"); (None, "") if unknown."""
    for name in dict.fromkeys((name, WRAPPERS.sub("", name))):       # a layer's own name may be "module", so try both
        for role, endings in ENDINGS.items():
            for ending in (ending for ending in endings if name.endswith(ending)):
                for prefix in (prefix for prefix in PREFIXES if name.startswith(prefix)):
                    if (layer := name.removesuffix(ending).removeprefix(prefix)) in lookup:
                        return lookup[layer], role
    return None, ""


def by_layer(tensors: dict[str, Tensor], lookup: dict,
             partial: bool) -> tuple[dict[tuple[str, ...], dict[str, Tensor]], list[str]]:
    """Groups a file's tensors by layer. Returns ({our layers' names: {"down": tensor, ...}}, names of omitted tensors).

    lookup: see aliases. Raises ValueError if a tensor is unknown or, with `partial`, only if no layer can be loaded.
    """
    unknown, layers, used = [], {}, {}                   # used: {our layers' names: names of their tensors in the file}
    for name, tensor in tensors.items():
        names, role = parse_name(name, lookup)
        if names is None:
            unknown.append(name)
        elif role in layers.setdefault(names, {}):
            raise ValueError(f"{names[0]} is in the file twice, the second time as {name}")
        else:
            layers[names][role] = tensor
            used.setdefault(names, []).append(name)
    # If a layer also has an unknown tensor, such as a dora_scale or a bias, its known tensors alone would give wrong
    # results. So omit the whole layer.
    stems = {re.sub(r"[._]lora[._].*|\.alpha$", "", name) for name in unknown}
    stems |= {name.rpartition(".")[0] for name in unknown}
    incomplete = [names for names, of_file in used.items()
                  if stems & {re.sub(r"[._]lora[._].*|\.alpha$", "", name) for name in of_file}]
    if not tensors:
        raise ValueError("it is empty")
    rest = len(layers) - len(incomplete)
    if unknown and not (partial and rest):
        text = "\n".join(unknown)
        kind = next(kind for pattern, kind in FOREIGN.items() if re.search(pattern, text, re.DOTALL | re.MULTILINE))
        hint = f"; --lora-partial (lora_partial=True) loads the other {rest} layers without them" * bool(rest)
        raise ValueError(f"{len(unknown)} of {len(tensors)} tensors belong to no layer of this model "
                         f"({', '.join(unknown[:4])}{', ...' * (len(unknown) > 4)}): it looks like {kind}{hint}")
    for names in incomplete:
        unknown += used.pop(names)
        del layers[names]
    return layers, unknown


def split(values: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """Splits the LoRA of a matrix that stacks n layers into n LoRAs. Each gets `down`, and its layer's rows of `up`.

    Rows of `down` that a layer's `up` multiplies by 0 are omitted from its LoRA. So split is the inverse of `fuse`.
    """
    down, up, magnitude = (values.get(role) for role in ("down", "up", "magnitude"))
    if n == 1 or down is None or up is None or up.ndim < 2 or not up.shape[1] == len(down) > 0 or len(up) % n:
        return [values] * n                              # n is 1, or tensors are invalid, which check_fit will report
    result, magnitudes = [], [None] * n if magnitude is None else magnitude.flatten().chunk(n)
    for up, magnitude in zip(up.chunk(n), magnitudes):                                   # up (out, rank)
        used = up.any(0).flatten() if up.any() else torch.ones(len(down), dtype=torch.bool)        # (rank,)
        alpha = values["alpha"].double() * int(used.sum()) / len(used)
        result.append(dict(down=down[used], up=up[:, used], alpha=alpha)
                      | ({} if magnitude is None else dict(magnitude=magnitude)))
    return result


def read_layers(source, shapes: dict[str, tuple] | None, partial: bool) -> tuple[dict[str, dict], dict[str, str]]:
    """Reads a LoRA in any format. Returns ({our layer's name: {"down": tensor, "up": ..., "alpha": ...}}, metadata).

    shapes: {our layer's name: shape of its weight}. None: accept a Stage C of any size; 1x1 kernels become matrices.
    Layers are returned in the model's order, so converting a LoRA there and back gives the same file. Raises ValueError
    if the file does not fit `shapes`. Warns if alpha is assumed, or if `partial` omits unknown tensors.
    """
    tensors, metadata = open_lora(source)
    tensors = {name: tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor  # of float8
               for name, tensor in tensors.items()}
    config, label = read_config(metadata), "the LoRA" if isinstance(source, dict) else source
    names = shapes
    if shapes is None:     # assume that the last block has the largest number that is in the names
        depth = max(map(int, re.findall(r"\d{1,3}", " ".join(tensors))), default=0) + 1
        groups = itertools.groupby(lora.DIFFUSERS_NAMES, lambda name: name.partition(".{i}")[0])
        names = [name.format(i=i) for _, group in groups for block in [[*group]] for i in range(depth)
                 for name in block]
    theirs, result, assumed = lora.diffusers_names(names), {}, set()
    layers, left_out = by_layer(tensors, aliases(theirs), partial)
    for trio, values in layers.items():
        if result.keys() & set(trio):
            raise ValueError(f"{trio[0]} is in the file twice, alone and fused")
        rank = len(values.get("down", ()))
        if "alpha" not in values:
            assumed |= {rank} if config.get("lora_alpha") is None and not config.get("alpha_pattern") else set()
            values["alpha"] = torch.tensor(lora.alpha_from(config, theirs[trio[0]], rank), dtype=torch.float64)
        if shapes is None:
            values = {role: x.flatten(1) if x.shape[2:] == (1, 1) else x for role, x in values.items()}
        result |= zip(trio, split(values, len(trio)))
    check_fit(result, shapes)
    if left_out:
        warn(f"{label}: left out {len(left_out)} of {len(tensors)} tensors: "
             f"{lora.summary(left_out)}")
    if assumed:
        ranks = ", ".join(map(str, sorted(assumed)))
        warn(f"{label} does not store alpha: assumed alpha = rank = {ranks}; if it was trained with another "
             "alpha, multiply its scale by alpha / rank")
    return {name: result[name] for name in dict.fromkeys(names) if name in result}, metadata


def check_fit(layers: dict[str, dict], shapes: dict[str, tuple] | None) -> None:
    """Raises ValueError if layers contain NaN or do not fit weights of `shapes`. If it is None, accepts any shape."""
    misfits = []
    for name, values in layers.items():
        try:
            if not all(tensor.isfinite().all() for tensor in values.values()):
                raise ValueError(f"{name} has NaN or infinity")
            if min(values["down"].ndim, values["up"].ndim) < 2:
                raise ValueError(f"{name} has a vector instead of a matrix")
            if not (values["down"].is_floating_point() and values["up"].is_floating_point()):
                raise ValueError(f"{name} has numbers of {values['down'].dtype}, expected floating point")
            lora.to_adapter(name, shapes[name] if shapes else (len(values["up"]), *values["down"].shape[1:]), values)
        except KeyError as error:
            misfits.append(f"{name} has no {error.args[0]}")
        except ValueError as error:
            misfits.append(str(error))
    if misfits:
        raise ValueError(f"{len(misfits)} of {len(layers)} layers do not fit: {'; '.join(misfits[:3])}"
                         + "; ..." * (len(misfits) > 3))


@contextlib.contextmanager
def naming_source(source):
    """Context manager that turns any error raised inside it into a WeightsError that names the file."""
    try:
        yield
    except Exception as error:         # invalid files raise errors of many classes
        if isinstance(error, WeightsError) and is_reference(source):
            raise
        name, text = "the LoRA" if isinstance(source, dict) else printable(source), reason_of(error)
        named = text if text.startswith(f"{name} ") else f"{name}: {text}"
        raise WeightsError(f"{named}; nothing was loaded") from error


def load_lora(model: nn.Module, source: str | Path | dict[str, Tensor], name: str = "default",
              scale: float = 1.0, lora_partial: bool = False) -> list[str]:
    """Adds a LoRA to a model, like lora.load_lora, but from a file in any format. Returns the names of its layers.

    lora_partial: load the known layers, and warn of unknown tensors. If the file cannot be used, raises WeightsError
    and does not change the model."""
    lora.check_name(model, name)
    with naming_source(source):
        known = lora.find_layers(model)[0]
        layers, _ = read_layers(source, {name: layer.weight.shape for name, layer in known.items()}, lora_partial)
        tensors = {name + lora.ROLES[role][0]: tensor for name, values in layers.items()
                   for role, tensor in values.items()}
        return lora.load_lora(model, tensors, name, scale)


def read_lora(source: str | Path | dict[str, Tensor],
              lora_partial: bool = False) -> tuple[dict[str, LoRAWeights], dict[str, str]]:
    """Reads a LoRA in any format, for a Stage C of any size. Returns ({our layer's name: LoRAWeights}, metadata)."""
    with naming_source(source):
        layers, metadata = read_layers(source, None, lora_partial)
    return {name: LoRAWeights(**values | dict(alpha=float(values["alpha"]) or float(len(values["down"]))))
            for name, values in layers.items()}, metadata


# ----- writing ---------------------------------------------------------------------------------------

def fuse(weights: dict[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """Converts {diffusers' layer name: LoRAWeights} to the original names, where in_proj stacks query, key and value.

    The three LoRAs of query, key and value become one LoRA, exactly. Its `down` stacks their `down`, its `up` is block
    diagonal, and its rank is the sum of the ranks. If all three have the same `down` (they came from in_proj), only
    `up` is stacked, and the rank stays the same.
    """
    result = {}
    for name, one in weights.items():
        block, _, layer = name.partition(".attention.")
        fused = f"{block}.attention.attn.in_proj"
        if layer not in ("to_q", "to_k", "to_v"):
            result[f"{block}.attention.attn.out_proj" if layer == "to_out.0" else name] = one
        elif fused not in result:
            empty = LoRAWeights(one.down[:0], one.up[:, :0], 0.0)                       # of rank 0, for a missing layer
            trio = [weights.get(f"{block}.attention.{third}", empty) for third in ("to_q", "to_k", "to_v")]
            s = one.alpha / len(one.down)    # alpha / rank of the fused LoRA; other layers' `up` is scaled to match it
            ups = [third.up * (third.alpha / max(len(third.down), 1) / s) for third in trio]       # (out, rank) each
            if all(torch.equal(third.down, one.down) for third in trio):
                down, up = one.down, torch.cat(ups)                                      # (rank, in), (3 out, rank)
            else:
                down = torch.cat([third.down for third in trio])                         # (sum of ranks, in)
                up = torch.block_diag(*ups)                                              # (3 out, sum of ranks)
            result[fused] = LoRAWeights(down, up, s * len(down))
    return result


def to_tensors(weights: dict[str, LoRAWeights], names: dict[str, str], to: str) -> tuple[dict, dict]:
    """Converts {our name: LoRAWeights} to (tensors of a file, its metadata). names: {our name: diffusers' name}.
    to: a key of FORMATS. Raises ValueError if this format cannot hold the LoRA."""
    if to not in FORMATS:
        raise ValueError(f"{to!r} is not a format: expected one of {', '.join(FORMATS)}")
    doras = sum(one.magnitude is not None for one in weights.values())
    if doras and (to not in ("diffusers", "ours") or doras < len(weights)):
        raise ValueError(f"{doras} of {len(weights)} layers are DoRA: only diffusers' format has that, for all layers "
                         "or none")
    if to != "ours":
        weights = {names[name]: one for name, one in weights.items()}
    weights = fuse(weights) if to == "original" else weights
    if to == "diffusers":
        return lora.to_diffusers(weights)
    tensors = lora.to_tensors(weights, *FORMATS[to])
    if to == "kohya":
        tensors = {re.sub(r"\.(?!(lora_down\.|lora_up\.)?weight$|alpha$)", "_", name): tensor
                   for name, tensor in tensors.items()}
    return tensors, dict(format="pt")


def describe(weights: dict[str, LoRAWeights]) -> dict[str, str]:
    """Describes a LoRA for metadata and messages. Returns {"rank": text, "alpha": text, "targets": names of layers}."""
    def span(numbers) -> str:                            # returns "8", or "8 to 16" if layers differ
        low, high = min(numbers), max(numbers)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return dict(rank=span([len(one.down) for one in weights.values()]),
                alpha=span([one.alpha for one in weights.values()]), targets=lora.summary(weights))


def write_lora(path: str | Path, weights: dict[str, LoRAWeights], names: dict[str, str], to: str,
               metadata: dict, overwrite: bool = True) -> int:
    """Writes a LoRA as a .safetensors file. Returns the number of tensors. names, to: see to_tensors. metadata: see
    save_lora."""
    tensors, its_own = to_tensors(weights, names, to)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    metadata |= dict(format_version="1") | describe(weights) | its_own
    write_tensors(path, tensors, metadata, overwrite)
    return len(tensors)


def save_lora(model: nn.Module, path: str | Path, name: str = "default", to: str = "diffusers",
              metadata: dict | None = None) -> None:
    """Writes the LoRA `name` of a model as a .safetensors file in format `to`, one of FORMATS, without its scale.

    metadata: entries in addition to rank, alpha, targets and format_version. For example
    dict(base_hash=base_hash(model), steps=1000, images=24, trigger_words=["a zorp"]). Raises ValueError if the format
    cannot hold this LoRA."""
    names = lora.diffusers_names(lora.find_layers(model)[0])
    write_lora(path, dict(lora.adapters(model, name)), names, to, metadata or {})


# ----- which weights a LoRA was trained on -----------------------------------------------------------

def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns model.state_dict() without the LoRAs' tensors, under the base model's names. Does not undo merges."""
    tensors = model.state_dict()
    for path, _ in lora.lora_layers(model):
        tensors = {f"{path}.{name.removeprefix(f'{path}.base.')}" if name.startswith(f"{path}.base.") else name: tensor
                   for name, tensor in tensors.items() if not name.startswith(f"{path}.adapters.")}
    return tensors


def base_hash(model: nn.Module) -> str:
    """Returns the sha256 of the weights in float32, without LoRAs: equal for float16 weights and their float32 copy."""
    lora.check_unmerged(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state_dict(model).items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
