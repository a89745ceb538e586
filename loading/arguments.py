"""Converts arguments of `load` and of a loaded model to one form, checks them, and explains wrong names.

  lora="a.safetensors", dtype="bf16", seed=np.int64(3), steps_c=torch.tensor(15)  ->  the form that the code uses
  model(prompt, num_inference_steps=15)  ->  TypeError: ... steps_c for Stage C, steps_b for Stage B

`install` adds these checks to the methods `accept` and `settings` of a pipeline; wuerstchen.py itself has none of them.
An invalid value raises an error of one sentence, before the first step. CALL, LOAD and METHODS map names of diffusers'
Würstchen pipelines to our names; docs/SAMPLING.md has the same table with examples.
Needs: torch, numpy; lora.py, lora_formats.py, wuerstchen.py.
"""
import functools
import math
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lora
from loading.errors import UserError, WeightsError, nearest, warn
from loading.lora_formats import find_lora, load_lora
from loading.options import IMAGES, plain
from wuerstchen import Wuerstchen, ddim_step, latent_sizes

DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16", float="float32", half="float16")
STEPS = "steps_c for Stage C (also a list of noise levels), steps_b for Stage B"
CALLBACK = "callback(stage, step, t, latents, x_0), called after each step of both stages"
GENERATE = "extras.editing.generate(model, prompt, ...), which has it"
# {argument of diffusers' pipelines, or of extras.editing.generate: what a call of our model takes instead}.
CALL = dict(
    num_inference_steps=STEPS, timesteps=STEPS, prior_num_inference_steps="steps_c", num_images_per_prompt="num_images",
    prior_timesteps="steps_c, which takes noise levels as well", decoder_timesteps="steps_b, which takes noise levels",
    guidance_scale="guidance_c and guidance_b, where 1 is no guidance", prior_guidance_scale="guidance_c",
    decoder_guidance_scale="guidance_b, where 1 is no guidance and their 0.0 would ignore the text",
    generator="seed, a whole number; or in generate seed=lambda *shape: torch.randn(1, *shape, generator=generator)",
    latents='given={"latents_c": ...} in extras.editing.generate; "latents_b" for Stage B',
    prompt_embeds='given={"prompt_c": ..., "prompt_b": ...} in extras.editing.generate',
    negative_prompt_embeds='given={"negative_c": ..., "negative_b": ...} in extras.editing.generate',
    image_embeddings='given={"semantic": ...} in extras.editing.generate',
    output_type='output="pil", "np", "pt" or "latents_b" in extras.editing.generate',
    return_dict="not needed: the result is the list of images itself", steps=STEPS, sampler="sampler_c and sampler_b",
    guidance="guidance_c and guidance_b", **dict.fromkeys(("edit", "given", "output"), GENERATE),
    **{prior + name: CALLBACK for prior in ("", "prior_") for name in (
        "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps")}, prior_callback=CALLBACK)
LOAD = dict(
    torch_dtype='dtype="bf16", "fp16" or "fp32"', variant='dtype="fp16", which fetches the smaller files by itself',
    use_safetensors="not needed: .safetensors are preferred, .bin are read as well", cache_dir="set HF_HOME instead",
    local_files_only="offline=True", force_download="not needed: a broken download continues",
    pretrained_model_name_or_path="weights, the first argument", prior_prior="prior=FOLDER_OR_FILE",
    device_map="device, and offload=True or low_memory=True", low_cpu_mem_usage="low_memory=True",
    scheduler='sampler_b="ddpm", "ddim" or "dpm++" of each call', prior_scheduler="sampler_c of each call",
    tokenizer="text_encoder=FOLDER, with the tokenizer in it or next to it",
    prior_tokenizer="prior_text_encoder=FOLDER, with the tokenizer in it or next to it",
    **dict.fromkeys(("token", "use_auth_token"), "`hf auth login`, once"),
    **dict.fromkeys(("latent_dim_scale", "latent_mean", "latent_std", "resolution_multiple"), "fixed by the weights"))
PIPELINE = "one model for both stages: model(prompt), or model.sample_c and model.sample_b"
METHODS = dict(
    to='Wuerstchen.load(..., device="cuda", dtype="bf16")', cuda='Wuerstchen.load(..., device="cuda")',
    cpu='Wuerstchen.load(..., device="cpu")', half='Wuerstchen.load(..., dtype="fp16")',
    from_pretrained='Wuerstchen.load("v2")', images="the result of a call is the list of images itself",
    enable_model_cpu_offload="Wuerstchen.load(..., offload=True)",
    enable_sequential_cpu_offload="Wuerstchen.load(..., low_memory=True), which keeps one network in memory at a time",
    enable_xformers_memory_efficient_attention="not needed: torch's own attention needs as little memory",
    enable_attention_slicing="not needed: torch's own attention needs as little memory",
    enable_vae_tiling="speed.memory.tile(model, 64)", enable_vae_slicing="not needed: images are decoded one by one",
    set_progress_bar_config="progress=True in each call", progress_bar="progress=True in each call",
    load_lora_weights='loading.arguments.set_loras(model, {"FILE": 1.0})',
    set_adapters="loading.arguments.set_loras(model, {FILE: scale})",
    unload_lora_weights="loading.arguments.set_loras(model, None)",
    fuse_lora="lora.merge(model.stage_c)", unfuse_lora="lora.unmerge(model.stage_c)",
    save_pretrained="python -m tools.weights convert", encode_prompt='model.encode_text("c", prompts, negatives)',
    prior_pipe=PIPELINE, decoder_pipe=PIPELINE, prior="model.stage_c", prior_prior="model.stage_c",
    decoder="model.stage_b", vqgan="model.stage_a", text_encoder="model.text_encoder_b",
    prior_text_encoder="model.text_encoder_c", tokenizer="model.text_encoder_b.tokenizer",
    prior_tokenizer="model.text_encoder_c.tokenizer", scheduler="sampler_c and sampler_b of each call",
    components="model.networks")
FIELDS = dict(steps="a number such as 29, a list of noise levels, or {level: number}", guidance="a number, or two",
              sampler="a name", interval="two noise levels", temperature="a number, or two")
CALL_ITSELF = ("prompt", "negative_prompt", "seed", "num_images", "width", "height", "callback", "progress")
SENTENCES = ("not needed", "set ", "the result", "one model", "fixed by")  # advice() adds no "use" if a hint begins so


# ----- values --------------------------------------------------------------------------------------------------------

def advice(hint: str) -> str:
    """Turns a hint from CALL, LOAD or METHODS into the end of a sentence: adds "use" if it names a replacement."""
    return hint if hint.startswith(SENTENCES) else f"use {hint}"


def texts_of(name: str, value) -> list:
    """Converts a text, several texts, or None to a list. Does not check the types of its items. Raises TypeError for
    other values, and ValueError for a text with half a character (a lone surrogate)."""
    if isinstance(value, (dict, bytes)) or not isinstance(value, Iterable | None):
        raise TypeError(f"{name} is {value!r:.80}, expected a text or a list of texts.")
    texts = [] if value is None else [value] if isinstance(value, str) else list(value)
    for text in texts:
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{name} is {text!r:.80}, expected text: \\ud800 to \\udfff are halves of characters.")
    return texts


def random_seed() -> int:
    """Draws a random seed with torch's generator, so that torch.manual_seed makes it repeatable."""
    return int(torch.randint(2 ** 31, ()))


def tensor_of(name: str, value) -> Tensor:
    """Converts a tensor, an array, or lists of numbers or tensors to a tensor. Raises TypeError unless it is real."""
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(row, Tensor) for row in value):
            value = torch.cat([*value])              # a list of one tensor per prompt, as in diffusers
        if (torch.is_complex if isinstance(value, Tensor) else np.iscomplexobj)(value):
            raise TypeError
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, np.float32))
    except (TypeError, ValueError, RuntimeError):
        shown = " ".join(repr(value).split())        # in one line; an array's repr has several lines
        raise TypeError(f"{name} is {shown:.80}, expected a tensor, an array or lists of real numbers.") from None


def has_bf16(device: torch.device) -> bool:
    """Returns whether a device has bfloat16 instructions. On a CPU without them, float32 is far faster."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # On x86, _is_mkldnn_bf16_supported() is not used: it is true with AVX-512, even without bfloat16 instructions.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_of(value, device: torch.device | None = None) -> torch.dtype:
    """Converts a floating-point dtype or its name ("bf16", "bfloat16", "torch.bfloat16") to a dtype. If a device is
    given, "auto" is allowed: bfloat16 if it is fast there; otherwise float32 on a CPU, float16 on other devices.
    Raises ValueError for other names."""
    if device is not None and value == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32 if device.type == "cpu" else torch.float16
    name = str(value).lower().removeprefix("torch.")
    dtype = getattr(torch, DTYPES.get(name, name), None)
    if not isinstance(value, (str, torch.dtype)) or dtype not in (torch.float16, torch.bfloat16, torch.float32,
                                                                  torch.float64):
        hint = "; int8=True is an option of its own" * (name == "int8")
        raise ValueError(f"dtype is {value!r}, expected one of {', '.join(DTYPES)}, auto, or torch.bfloat16 and so "
                         f"on{hint}.")
    return dtype


def set_tf32(allowed: bool) -> None:
    """Sets whether a GPU may use TF32, which rounds the inputs of float32 products and convolutions to 10 bits. By
    default torch allows it for convolutions but not for products, so float32 would be exact only in part."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def usable_device(name: str | torch.device | None) -> torch.device:
    """Returns the device `name`; for None, cuda if it exists, else cpu. Turns TF32 off. Raises UserError if torch does
    not know the name or cannot compute on the device."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        torch.ones(1, device=name).tolist()                # tolist() fails on the device "meta", which has no data
        set_tf32(False)                                    # exact float32; callers may allow TF32 later
        return torch.device(name)
    except (RuntimeError, AssertionError, TypeError) as error:        # torch raises various errors for missing devices
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    if "Expected one of" in reason:                                  # torch's message lists all device types
        reason = "expected cpu, cuda, cuda:1 or mps"
    raise UserError(f"device {name!r} cannot be used here: {reason}. \"cpu\" always works.")


def lora_scales(value) -> dict[str, float]:
    """Converts None, LoRA files or folders, or {file: scale} to {file: scale}. Raises ValueError for duplicates."""
    if value is None or isinstance(value, (str, Path)):
        value = [value] if value else []
    pairs = [*value.items()] if isinstance(value, dict) else [
        (file, 1.0) for file in (value if isinstance(value, (list, tuple, set)) else [value])]
    scales, names = {}, set()
    for file, scale in pairs:
        if not isinstance(file, (str, Path)) or not isinstance(plain(scale), Real) or not math.isfinite(scale):
            raise TypeError(f"lora is {value!r:.100}, expected a file, a list of files, or {{\"FILE\": scale}}.")
        file = str(find_lora(file))
        if adapter_name(file) in names:              # a model cannot have two LoRAs of the same name
            raise WeightsError(f"LoRA {file} is given twice, expected once: add up its scales, {{\"FILE\": 2.0}}")
        scales[file] = float(scale)
        names.add(adapter_name(file))
    return scales


def check_options(weights, files: dict, allowed: Iterable[str], options: Iterable[str]) -> None:
    """Raises TypeError if a name in `files` is not in `allowed`, or if `weights` or a value in `files` is not a text, a
    path or None. options: other options of `load`, which the message may suggest."""
    for name in sorted(files.keys() - set(allowed)):
        if name in LOAD:
            raise TypeError(f"load has no option {name}: {advice(LOAD[name])}.")
        raise TypeError(f"there is no option {name}: expected an option of load, or one of {', '.join(allowed)}; "
                        f"{nearest(name, (*options, *allowed))}".removesuffix("; "))
    for name, value in dict(weights=weights, **files).items():
        if not isinstance(value, str | os.PathLike | None):
            raise TypeError(f"{name} is {value!r:.80}, expected a name such as \"tiny\", a folder or "
                            f"\"hub:owner/name\": a text or a Path.")


# ----- a call --------------------------------------------------------------------------------------------------------

def install(model, weights, files: dict, loras: dict[str, float], lora_partial: bool) -> None:
    """Adds checks of arguments to a pipeline's methods encode_text, accept and settings. Stores what was loaded."""
    model.weights = ", ".join([str(weights), *(f"{part} {path}" for part, path in files.items() if path is not None)])
    model.loras, model.lora_partial = loras, lora_partial
    model.elsewhere = {name: advice(hint) for name, hint in METHODS.items()}
    encode = model.encode_text
    model.encode_text = lambda stage, prompts, negatives: encode(stage, texts_of("prompts", prompts),
                                                                 texts_of("negatives", negatives))
    model.accept = functools.partial(accept, model, model.accept)
    model.settings = functools.partial(settings, model, model.settings)


def accept(model, then: Callable, prompt, negative_prompt, seed, num_images, height, width, callback) -> tuple:
    """Converts and checks arguments of a call of the model. Returns the result of `then`, which is Wuerstchen.accept.
    Raises TypeError for wrong types, and ValueError for empty prompts and impossible sizes."""
    prompts, num_images = texts_of("prompt", prompt), IMAGES.check("num_images", num_images)
    seed = random_seed() if seed is None else plain(seed)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"got prompts {prompts!r:.100}, expected texts such as \"a red apple on a blue background\".")
    for name, value, kind, expected in (("negative_prompt", negative_prompt, str | None, "one text"),
                                        ("seed", seed, Integral, "one whole number, or None")):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.80}, expected {expected}: extras/editing.py takes lists of them.")
    texts_of("negative_prompt", negative_prompt)
    prompts, seed, height, width, callback = then([str(p) for p in prompts], negative_prompt, int(seed),
                                                  num_images, plain(height), plain(width), callback)
    latent_sizes(height, width)                      # raises ValueError for impossible sizes
    warn_of_size(height, width, model.size)
    return prompts, seed, height, width, checked(callback)


def checked(callback: Callable | None, kinds: str = "None", stop: Exception | None = None) -> Callable | None:
    """Returns `callback` with a check of its result. For False, raises `stop`, if given. For any other result than None
    and finite latents of unchanged shape, raises ValueError. kinds: the other allowed results, for its message."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"callback is {callback!r:.80}, expected a function: {CALLBACK}.")

    def ask(stage: str, step: int, t: float, x: Tensor, x_0: Tensor) -> Tensor | None:
        answer = callback(stage, step, t, x, x_0)
        if answer is False and stop is not None:
            raise stop
        if answer is not None and not (isinstance(answer, Tensor) and answer.shape == x.shape
                                       and answer.isfinite().all()):
            hint = ". To stop, raise an exception, or use extras.editing.generate" * (answer is False)
            raise ValueError(f"a callback may return {kinds} or finite latents of shape {tuple(x.shape)}, "
                             f"not {answer!r:.80}{hint}.")
        return answer
    return ask


def settings(model, then: Callable, given: dict) -> tuple:
    """Converts and checks sampling options. Returns the result of `then`, which is Wuerstchen.settings. Raises
    TypeError for unknown names, with our name for one of diffusers, and wrong types; ValueError for wrong values."""
    given = {name: plain(value) for name, value in given.items()}
    given |= {name: int(value) for name, value in given.items() if isinstance(value, bool) and name[:-2] != "early"}
    for name, value in given.items():
        if name in CALL:
            raise TypeError(f"there is no argument {name} here: {advice(CALL[name])}.")
        try:
            if any(isinstance(one, complex) for one in (value if isinstance(value, (list, tuple)) else [value])):
                raise TypeError
            then({name: value})
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, ValueError) and re.search("expected|give", str(error)):
                continue                             # the value may be valid together with others: checked below
            if f"no option {name}" in str(error):
                ours = [f"{field}_{stage}" for stage in "cb" for field in vars(getattr(model, stage))]
                raise TypeError(f"{error}; {nearest(name, (*CALL_ITSELF, *ours))}".removesuffix("; ")) from None
            expected = FIELDS.get(name[:-2], "a number from 0 to 1")
            raise TypeError(f"{name} is {value!r:.80}, expected {expected}.") from None
    for stage in "cb":
        try:
            sampling = then({name: value for name, value in given.items() if name[-1] == stage})["cb".index(stage)]
        except ValueError as error:
            raise ValueError(f"Stage {stage.upper()}: {error}") from None
        check_used(stage, sampling, given)
        if given.get(f"guidance_{stage}") is not None and ((0 <= np.ravel(sampling.guidance))
                                                           & (np.ravel(sampling.guidance) < 1)).any():
            ignored = "the text" if stage == "c" else "the text and the semantic latents"
            warn(f"guidance_{stage} is below 1: here 1 is no guidance, and 0 ignores {ignored}; in diffusers "
                 f"0.0 to 1.0 is no guidance. For no guidance: guidance_{stage}=1, or --guidance-{stage} 1")
    return then(given)


def check_used(stage: str, sampling, given: dict) -> None:
    """Raises ValueError if a setting of the stage has no effect because of another one. sample.py checks the same."""
    if given.get(f"eta_{stage}") and sampling.sampler not in ("ddim", ddim_step):
        raise ValueError(f"eta_{stage} is {given[f'eta_{stage}']!r}, expected sampler_{stage}=\"ddim\" with it: "
                         f"{sampling.sampler!r:.80} has no eta.")
    segments = isinstance(sampling.steps, dict)
    if not isinstance(sampling.steps, Integral) and (sampling.t_end != 0 or sampling.t_start != 1 and not segments):
        raise ValueError(f"t_start_{stage} and t_end_{stage} are for a number of steps: "
                         f"{sampling.steps!r:.80} contains its own start and end.")


def warn_of_size(height: int, width: int, trained: int) -> None:
    """Warns if the image size (px) is not one that the weights were trained on. trained: their usual size, in px."""
    only = trained in (128, 512)               # tiny and v1 weights were trained on one size, v2 on many
    if (height, width) != (trained,) * 2 if only else not (
            1024 <= min(height, width) <= 1536 and max(height, width) <= 2048):
        small = min(height, width)
        effect = "a mosaic instead of" if small <= trained / 3 else "blurred or crowded" if small < trained \
            else "repeated"
        sizes = f"{trained} px only" if only else "1024 to 1536 px, one side up to 2048"
        warn(f"{width} x {height} px is not what these weights were trained on ({sizes}): "
             f"expect {effect} objects")


# ----- LoRAs of a loaded model ---------------------------------------------------------------------------------------

def adapter_name(file: str) -> str:
    """Returns the name of a file's LoRA in the model: a hash of the real path, so that no file is added twice."""
    return f"lora_{zlib.crc32(os.path.realpath(file).encode()):08x}"


def set_loras(model, loras) -> None:
    """Replaces the LoRAs of a loaded model by `loras`: None, a file, several files, or {file: scale}.

    LoRAs are added to Stage C, removed, or get a new scale. With int8 or low_memory, Stage C is read again instead.
    If the weights are a folder of train_c.py with a LoRA of their own, that LoRA stays, with scale 1 unless `loras`
    has another scale for it. Raises WeightsError if a file cannot be used; the model is then unchanged."""
    if not isinstance(model, Wuerstchen):
        raise TypeError(f"model is {model!r:.80}, expected a loaded model, and then its LoRAs.")
    wanted, before, network = lora_scales(loras), dict(model.loras), model.networks.get("stage_c")
    own = {adapter_name(model.paths["lora"])} if model.paths.get("lora") else set()
    if network is None:
        raise ValueError("a LoRA changes Stage C, which was not loaded: load the model with its prior.")
    in_place, added = isinstance(network, torch.nn.Module) and not model.int8, []
    try:
        if in_place:
            there = own | {*map(adapter_name, before)}
            for file in [file for file in wanted if adapter_name(file) not in there]:
                load_lora(network, file, adapter_name(file), lora_partial=model.lora_partial)
                added.append(file)
        else:
            read_again(model, wanted)
    except ValueError:
        for file in added:
            lora.remove(network, adapter_name(file))
        if not in_place:
            read_again(model, before)
        raise
    if in_place:
        scales = dict.fromkeys(own, 1.0) | {adapter_name(file): scale for file, scale in wanted.items()}
        for name, scale in scales.items():
            lora.set_scale(network, scale, name)
        for name in {*map(adapter_name, before)} - scales.keys():
            lora.remove(network, name)
        replace_loras(model, wanted)


def replace_loras(model, loras: dict[str, float]) -> None:
    """Replaces the content of the dict model.loras. Keeps the dict itself, because Stage C's loader also has it."""
    model.loras.clear()
    model.loras.update(loras)


def read_again(model, loras: dict[str, float]) -> None:
    """Reads Stage C again, with these LoRAs. Creates a new loader, because speed.memory caches networks by loader."""
    replace_loras(model, loras)
    model.networks["stage_c"] = functools.partial(model.load_stage_c)
    model.networks["stage_c"].config = model.load_stage_c.config         # can be read before the network is loaded
    model.part("stage_c")
