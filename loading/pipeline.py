"""Loads a whole pipeline: finds the parts, checks that they fit each other, loads the networks, makes them fast.

  a name or a folder -locate-> paths of the parts -weights.load-> networks -> Wuerstchen, or WuerstchenV1 for v1

Names, shapes and widths are checked before any tensor is read. Files that do not fit raise an error of one line.
Needs: torch, safetensors; tokenizers for the text encoders.
"""
import functools
import math
from pathlib import Path

import torch

from loading import hub
from loading import weights as w
from loading.arguments import adapter_name, check_options, dtype_of, has_bf16, install, lora_scales, usable_device
from loading.errors import WeightsError, tell, warn
from loading.files import TensorFile, find_file
from loading.layouts import locate, official_name
from loading.lora_formats import load_lora, read_lora
from loading.words import warn_of_unknown_words
from speed.fast import accelerate
from speed.int8 import check as check_int8, one_image_at_a_time, to_int8
from speed.memory import free_memory, offload as offload_networks, one_at_a_time, tile
from wuerstchen import Sampling, Wuerstchen

LARGE = 1e8                                    # models with more parameters than this are faster in bfloat16 on a CPU
tell_once = functools.cache(tell)
FILES = ("prior", "decoder", "vqgan", "image_encoder", "prior_text_encoder", "text_encoder")   # names in load's **files


def load(weights: str | Path | None = None, device: str | None = None, dtype: torch.dtype | str | None = None, *,
         parts: tuple[str, ...] | None = None, offline: bool = False, revision: str | None = None,
         fast: bool = True, low_memory: bool | None = None, offload: bool = False, compile: bool = False,
         int8: bool = False, lora: str | Path | list | dict[str | Path, float] | None = None,
         lora_partial: bool = False, **files) -> Wuerstchen:
    """Loads a pipeline, ready to generate images.

    weights     "tiny" or "tiny-v1", which ship with the code; "v1", "v2", "v2-base" or "v2-aesthetic", fetched if
                not in the cache; a folder in any of diffusers' layouts, or with the original .pt files (see
                layouts.find_parts); or any repository, "hub:owner/name" (see hub.Repository)
    files       single parts to use instead of parts of `weights`, each a folder, a file or "hub:owner/name": prior,
                decoder, vqgan, image_encoder, prior_text_encoder, text_encoder; `weights` is then "v2" by default
    device      default: cuda if there is one. dtype: such as "bf16", or "auto" (fast); default: fp32 on CPUs, else bf16
    parts       the parts to load, no others: hub.TEXT_TO_IMAGE (default), hub.RECONSTRUCTION, or a list of names
    offline, revision   see hub.fetch
    fast        use the faster implementations in speed/fast.py; compile: also use torch.compile
    int8        store large layers of Stages B and C in 8 bits, on a CPU: a quarter of their memory, see speed/int8.py
    low_memory  keep one network in memory at a time, and read it again when needed; default: if memory is too small
    offload     keep one network on the device at a time, the others in main memory
    lora        LoRAs for Stage C: a file or "hub:owner/name", a list, or {file: scale}, where 1 is the trained scale;
                to change later: arguments.set_loras. lora_partial: skip unknown layers with a warning, not an error
    Raises WeightsError (a ValueError) if files cannot be used, UserError if the device is not available.
    """
    check_options(weights, files, FILES, load.__annotations__)
    device = usable_device(device)
    asked, dtype, lora = dtype or int8, choose_dtype(dtype, device, int8), lora_scales(lora)
    lora = fetch_loras(lora, lora_partial, offline, revision)
    weights = official_name(weights or ("v2" if files else "tiny"))
    parts = hub.TEXT_TO_IMAGE if parts is None else parts
    paths = locate(weights, files, parts, dtype != torch.float32, offline, revision)
    warn_of_unused_lora(weights, files.get("prior"))
    empty = build_all(paths)
    if not asked and device.type == "cpu" and has_bf16(device):
        suggest_bf16(empty)
    loaders = loaders_of(paths, empty, torch.device("cpu") if offload else device, dtype, int8, lora, lora_partial)
    own = files.get("image_encoder") or "image_encoder" in parts
    if hub.is_reference(weights) and not own if paths["image_encoder"] else weights in hub.NAMES:
        loaders["image_encoder"] = fetch_encoder_later(weights, empty, device, files, offline, revision)
    model = warn_of_unknown_words(pipeline_for(paths, empty, loaders, device, dtype), paths["prior"],
                                  lora or paths.get("lora"))
    # extras/ and arguments.set_loras use these attributes. load_stage_c: the function that loads Stage C, or None.
    model.paths, model.int8, model.load_stage_c = paths, int8, loaders.get("stage_c")
    install(model, weights, files, lora, lora_partial)
    model.preview_file = preview_file_of(model, weights, files, paths["vqgan"])
    if low_memory is None and not offload:
        low_memory = 1.25 * bytes_needed(paths, empty, dtype, int8) > free_memory(device)    # 25 % more for activations
    model.low_memory = bool(low_memory)
    if low_memory:
        one_at_a_time(model)
    else:
        for name in loaders.keys() - {"image_encoder"}:      # load networks now, to report damaged files early
            model.part(name)
    if offload:
        offload_networks(model)
    if fast or compile:
        accelerate(model, compile=compile, keep_shares=not low_memory, offload=offload)
    if int8:
        one_image_at_a_time(model)
    tile(model, None)
    return model


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device, int8: bool) -> torch.dtype:
    """Returns the dtype to use. On a CPU, the default is float32: a seed's image then depends little on the machine."""
    if dtype is None or int8 and dtype == "auto":
        dtype = "fp32" if device.type == "cpu" else "bf16"
    dtype = dtype_of(dtype, device)
    if int8:
        check_int8([device], dtype)
    return dtype


def suggest_bf16(networks: dict[str, torch.nn.Module]) -> None:
    if sum(p.numel() for network in networks.values() for p in network.parameters()) > LARGE:
        tell_once('hint: this processor has instructions for bfloat16: with --dtype auto (in Python dtype="auto") '
                  'images take about half the time and half the memory, and differ a little')


def fetch_loras(lora: dict[str, float], partial: bool, offline: bool, revision: str | None) -> dict[str, float]:
    """Fetches the LoRAs in {file or "hub:owner/name": scale}. Returns {path: scale}. partial: ignore unknown layers."""
    found = {str(hub.fetch_lora(source, offline, revision)): scale for source, scale in lora.items()}
    for file in found:
        read_lora(file, partial)                 # report errors before 12 GB of weights are fetched
    return found


def fetch_encoder_later(weights: str | Path, empty: dict, device: torch.device, files: dict, offline: bool,
                        revision: str | None):
    """Returns a function that fetches and loads the image encoder. It is only called if something needs the encoder."""
    if weights in hub.NAMES:
        weights = "v1" if isinstance(empty.get("decoder"), w.StageBV1) else "v2"
    return lambda: w.load_image_encoder(locate(weights, files, ("image_encoder",), offline=offline, revision=revision)
                                        ["image_encoder"]).to(device)


def warn_of_unused_lora(weights: str | Path, prior: str | Path | None) -> None:
    """Warns if the folder `weights` has a LoRA that is not used, because the user gave another prior."""
    if prior and (Path(weights) / "lora.safetensors").is_file():
        warn(f"the LoRA of {weights} is not used, because it was trained on another prior than {prior}: "
             f"to use it all the same, add --lora {weights} (in Python lora=...)")


def preview_file_of(model: Wuerstchen, weights: str | Path, files: dict, vqgan: Path | None) -> Path | None:
    """Returns the file for preview matrices, see extras/previews.py, or None for hub:owner/name or mixed weights."""
    folder = hub.own_cache() if weights in hub.NAMES else vqgan.parent if vqgan else None
    own = not (files.get("vqgan") or files.get("image_encoder") or hub.is_reference(weights)) and folder is not None
    raw = model.scale_semantic is not Wuerstchen.scale_semantic
    return folder / f"preview{'_v1' * raw}.json" if own else None


def build_all(paths: dict) -> dict[str, torch.nn.Module]:
    """Returns {part: model on the meta device} for Stages A, B and C. Raises WeightsError if files do not match."""
    stages = dict(vqgan=w.StageA, decoder=w.stage_b_of(paths["decoder"]) if paths["decoder"] else None, prior=w.StageC)
    empty = {part: w.build_empty(stage, paths[part])[0] for part, stage in stages.items() if paths[part]}
    for part, key, encoder, name in (("prior", "c_cond", "prior_text_encoder", "Stage C"),
                                     ("decoder", "c_text", "text_encoder", "Stage B")):
        if part in empty and paths[encoder]:
            w.check_widths(empty[part].config[key], paths[encoder], name)
    decoder, vqgan = empty.get("decoder"), empty.get("vqgan")
    if isinstance(decoder, w.StageBV1) and vqgan and decoder.codebook_size != vqgan.config["codebook_size"]:
        raise WeightsError(f"Stage B of v1 generates {decoder.codebook_size} tokens, the VQGAN {paths['vqgan']} has "
                           f"{vqgan.config['codebook_size']}: they belong to different weights")
    return empty


def loaders_of(paths: dict, empty: dict, device: torch.device, dtype: torch.dtype, int8: bool, loras: dict,
               lora_partial: bool) -> dict:
    """Returns {name of a network in Wuerstchen: function that loads it onto `device`} for the parts in `paths`.
    empty: the result of build_all. loras: {path: scale}."""
    def stage(part: str, int8: bool) -> torch.nn.Module:
        # Activations of the VQGAN can exceed float16's maximum, 65504. So instead of float16, it is loaded in float32.
        half = dtype == torch.float16 and part == "vqgan"
        return w.load(type(empty[part]), paths[part], torch.float32 if half else dtype, int8)

    def stage_c() -> torch.nn.Module:
        from lora import merge_and_unload
        # Read `loras` only now: set_loras may change it. A file in both dicts is loaded once, at its scale in `loras`.
        both = ({str(paths["lora"]): 1.0} if paths.get("lora") else {}) | loras
        both = {adapter_name(file): (file, scale) for file, scale in both.items()}
        model = stage("prior", int8 and not both)
        for name, (file, scale) in both.items():
            load_lora(model, file, name, scale, lora_partial)
        if int8 and both:                       # LoRAs can only be merged before weights are rounded to int8
            merge_and_unload(model)
            to_int8(model)
        return model.eval()

    def text_encoder(encoder: str, tokenizer: str) -> torch.nn.Module:
        return w.load_text_encoder(paths[encoder], paths[tokenizer], dtype)

    def on_device(load):
        def loader():
            return load().to(device)
        return loader
    shared = paths["text_encoder"] == paths["prior_text_encoder"]
    found = dict(stage_a=("vqgan", lambda: stage("vqgan", False)), stage_b=("decoder", lambda: stage("decoder", int8)),
                 stage_c=("prior", stage_c),
                 text_encoder_c=("prior_text_encoder", lambda: text_encoder("prior_text_encoder", "prior_tokenizer")),
                 text_encoder_b=("text_encoder", lambda: text_encoder("text_encoder", "tokenizer")),
                 # The image encoder stays in float32: half precision is too inexact for BatchNorm's statistics.
                 image_encoder=("image_encoder", lambda: w.load_image_encoder(paths["image_encoder"])))
    loaders = {name: on_device(load) for name, (part, load) in found.items() if paths[part]}
    if shared and "text_encoder_c" in loaders:
        loaders["text_encoder_b"] = loaders["text_encoder_c"]
    for name, part in (("stage_b", "decoder"), ("stage_c", "prior")):
        if part in empty:
            loaders[name].config = empty[part].config        # so that config can be read before the network is loaded
    return loaders


def pipeline_for(paths: dict, empty: dict, loaders: dict, device, dtype) -> Wuerstchen:
    """Returns a Wuerstchen, or WuerstchenV1 if the decoder is v1's, with default settings. loaders: from loaders_of."""
    tiny = bool(paths["image_encoder"]) and w.is_tiny(paths["image_encoder"])
    decoder, prior = empty.get("decoder"), empty.get("prior")
    c = Sampling(29, guidance=2.0 if tiny else 4.0, early=True)   # at 4, small objects become too large
    if not isinstance(decoder, w.StageBV1):
        # A small Stage B often fails to decide between two objects. Guidance at high noise makes it decide.
        return Wuerstchen(loaders, 128 if tiny else 1024, device, dtype, c,
                          Sampling(12, guidance=(4.0, 1.0) if tiny else 1.0))
    from v1.pipeline import WuerstchenV1
    # The released v1 has text width 1024 (CLIP H) and uses raw semantic latents; other v1 models use scaled ones.
    raw = (prior.config["c_cond"] if prior else decoder.config["c_text"]) == 1024
    return WuerstchenV1(loaders, 128 if tiny else 512, device, dtype, raw=raw, **({} if raw else dict(c=c)))


def bytes_needed(paths: dict, empty: dict, dtype: torch.dtype, int8: bool) -> float:
    """Returns how many bytes all networks need. If int8, first converts large layers of Stages B and C in `empty`."""
    for part in ("decoder", "prior"):
        if int8 and part in empty:
            to_int8(empty[part])
    encoders = {paths["prior_text_encoder"], paths["text_encoder"]} - {None}
    files = [TensorFile(find_file(path, ("model", "pytorch_model"))) for path in encoders]
    return sum(tensor.numel() * (1 if tensor.dtype == torch.int8 else dtype.itemsize)
               for model in empty.values() for tensor in model.state_dict().values()) \
        + sum(math.prod(shape) * dtype.itemsize for file in files for shape in file.shapes.values())
