"""Weights: loads, checks and saves one model at a time, in the released format.

  folder/config.json + folder/diffusion_pytorch_model.safetensors  <->  StageA, StageB, StageBV1, StageC, image encoders
  text_encoder/config.json, model.safetensors; tokenizer/          <->  text encoder, in transformers' format

Loading is strict, because weights in the wrong place raise no error later but give bad images: every tensor must be
known, present, of the right shape and free of NaN. Any problem with a file raises WeightsError, a message of one line.
names.py translates names, files.py reads and writes files. Nothing is downloaded, and code in a file is not executed.
Needs: torch, safetensors; tokenizers for text encoders.
"""
import json
from functools import partial
from pathlib import Path
from typing import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from loading.errors import UserError, WeightsError
from loading.files import (STEM, TOKENIZER_FILES, TensorFile, find_file, is_finite, own_config, read_config,
                           read_json, read_text, reading, return_freed_memory, to_half, write_atomically, write_files)
from loading.names import (FORMATS, check_fit, check_names, config_to_diffusers, config_to_ours, describe,
                           in_our_words, recognise, signature_shape, to_diffusers, translate)
from loading.text_encoder import CLIPTextModel, TextEncoder, Tokenizer
from speed.int8 import quantised, to_int8
from speed.memory import free_memory
from stage_a import StageA
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder
from stage_c import StageC
from v1.stage_b import StageBV1


# ----- loading -------------------------------------------------------------------------------------------------------

class NoStartValues(torch.overrides.TorchFunctionMode):
    """A context manager that skips normal_ and randn. On the meta device they only import torch's slow compiler."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **(kwargs or {}))


def config_of(path: str | Path) -> dict | None:
    """Returns the configuration of weights: a folder's config.json; for a file, the configuration in it, or else the
    config.json next to it, or None if there is neither. Raises WeightsError if a config.json cannot be read."""
    path = Path(path)
    if path.is_dir():
        return read_config(path)
    own = own_config(path) if path.is_file() else None
    return own or (read_config(path.parent) if (path.parent / "config.json").is_file() else None)


IMPOSSIBLE = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError)   # raised by models for invalid sizes


def new_model(stage: type, config: str | Path | None, **sizes) -> nn.Module:
    """Returns a model of class `stage` with random weights. `sizes` override those in `config`, a config.json or its
    folder. Raises UserError if the sizes are invalid, or if they need more memory than is free."""
    try:
        if config:
            found = read_config(config) if Path(config).is_dir() else read_json(config)
            sizes = config_to_ours(found, stage) | sizes
        with torch.device("meta"), NoStartValues():
            needed = sum(4 * p.numel() for p in stage(**sizes).parameters())
        if needed > free_memory(torch.device("cpu")):
            raise ValueError(f"{needed / 1e9:.0f} GB of parameters, more than there is free memory")
        return stage(**sizes)
    except IMPOSSIBLE as error:
        name = f"--config {config}" if config else "these sizes"
        raise UserError(f"{name} cannot be used: {error}") from error


def official_sizes(stage: type, shapes: dict[str, tuple]) -> dict:
    """Guesses arguments of `stage` from {tensor name: shape}, for weights without config.json: v1's, or {} for v2's."""
    shape = signature_shape(stage, shapes)
    if stage is StageC and shape[1:] == (1024,):
        return dict(c_cond=1024)                             # v1: width of CLIP-H's vectors
    if stage is EfficientNetEncoder and shape[:1] == (32,):
        return dict(network="efficientnet_v2_l")
    return {}


def build_empty(stage: type, path: str | Path) -> tuple[nn.Module, TensorFile]:
    """Builds a model on the meta device and opens its file. Returns both. Checks names and shapes, but reads no values.

    path: the model's folder, or a single file. The sizes are those in config_of(path). If that returns None, as for the
    original .pt files, they are the official sizes of v1 or v2. Raises WeightsError if the file does not fit the sizes.
    """
    def open_file() -> TensorFile:
        return TensorFile(find_file(path, (STEM, "model")), FORMATS[stage].sections)

    config = config_of(path)
    file = open_file() if config is None else None
    try:
        with torch.device("meta"), NoStartValues():
            model = stage(**(official_sizes(stage, file.shapes) if config is None else config_to_ours(config, stage)))
    except IMPOSSIBLE as error:
        raise WeightsError(f"{path}: its config.json cannot be used: {error}") from error
    file = file or open_file()
    try:
        check_fit(file.shapes, model)
    except WeightsError as error:
        looks = describe(file.shapes)
        raise WeightsError(f"{file.path}: {error}" + (f". This looks like {looks}" if looks else "") + (
            "; without a config.json next to it, the official sizes are expected" if config is None else "")) from error
    return model, file


@return_freed_memory()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> nn.Module:
    """Fills a model on the meta device with the tensors in (our name, tensor) pairs, in `dtype`, and sets eval mode.

    A model on the meta device has shapes but no memory, so no time is spent on random weights that are overwritten.
    Tensors are converted one at a time, so the file and the model are never both in memory as a whole.
    Counters (num_batches_tracked) stay integers. Raises WeightsError if a tensor contains NaN or infinity.
    """
    wanted, converted = model.state_dict(), {}
    for name, tensor in tensors:
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            raise WeightsError(f"{name} has numbers of {tensor.dtype}, expected floating point")
        converted[name] = tensor.to(dtype if wanted[name].is_floating_point() else wanted[name].dtype,
                                    copy=True).contiguous()
        if not is_finite(converted[name]):
            raise WeightsError(f"{name} contains NaN or infinity" + (f" in {dtype}" if is_finite(tensor) else ""))
    model.load_state_dict(converted, strict=True, assign=True)
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not empty, f"no file holds these buffers, so they were not filled: {empty}"
    return model.eval()


def load(stage: type, path: str | Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> nn.Module:
    """Loads a model of class `stage` from its folder or file, in eval mode. int8: whether to convert large layers to
    int8 while reading. Raises WeightsError if the file cannot be used."""
    model, file = build_empty(stage, path)
    tensors = translate(file, file.shapes.keys(), model)
    if int8:
        tensors = quantised(tensors, to_int8(model))
    try:
        return fill(model, tensors, dtype)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error


load_stage_a = partial(load, StageA)            # from a `vqgan` folder or a file
load_stage_b = partial(load, StageB)            # from v2's `decoder` folder or a file
load_stage_b_v1 = partial(load, StageBV1)       # from v1's `decoder` folder or model_stage_b.pt
load_stage_c = partial(load, StageC)            # from a `prior` folder or a file


def load_image_encoder(path: str | Path) -> EfficientNetEncoder | TinyImageEncoder:
    """Loads the image encoder from an `image_encoder` folder or a file such as model_v2_stage_b.pt."""
    encoders, config = {stage.__name__: stage for stage in (EfficientNetEncoder, TinyImageEncoder)}, config_of(path)
    if config is None:
        return load(EfficientNetEncoder, path)
    ours = [name for name, stage in encoders.items() if in_our_words(config, stage)]
    name = ours[0] if ours else str(config.get("_class_name")).removeprefix("Wuerstchen")  # added by OneTrainer
    if name not in encoders:
        raise WeightsError(f"{path}: its config.json describes a {name}, expected one of {', '.join(encoders)}")
    return load(encoders[name], path)


def load_text_encoder(folder: str | Path, tokenizer_folder: str | Path,
                      dtype: torch.dtype = torch.float32) -> TextEncoder:
    """Loads a TextEncoder, in eval mode, from the two folders that transformers writes.

    In the published files every tensor's name starts with "text_model."; transformers 5 omits this prefix. Older files
    also contain `position_ids`, which is 0, 1, 2, ... and is ignored. Raises WeightsError if a file cannot be used.
    """
    config, path = read_config(folder), Path(folder) / "config.json"
    for name, most in CLIP_SIZES.items():   # a larger size is a typo; such a model would be built for hours
        if type(config.get(name, 1)) is not int or not 1 <= config.get(name, 1) <= most:
            raise WeightsError(f"{path} cannot be used: {name} is {config[name]!r:.80}, expected 1 to {most}")
    with reading(path, WeightsError, "cannot be used"), torch.device("meta"), NoStartValues():
        if not 0 < config.get("layer_norm_eps", 1e-5) < 0.1:
            raise ValueError(f"layer_norm_eps is {config['layer_norm_eps']!r:.80}, expected something like 1e-05")
        model = CLIPTextModel(**config)
    file = TensorFile(find_file(folder, ("model", "pytorch_model")))
    names = {name: name.removeprefix("text_model.") for name in file.shapes
             if not name.endswith("embeddings.position_ids")}          # {name in the file: our name}
    try:
        check_names({names[name]: file.shapes[name] for name in names},
                    {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        fill(model, ((names[name], tensor) for name, tensor in file if name in names), dtype)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from error
    # This unused buffer makes hash_of equal for our model and transformers' model, which then share training caches.
    positions = torch.arange(model.config["max_position_embeddings"])[None]                                 # (1, 77)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    tokenizer = load_tokenizer(tokenizer_folder)
    if tokenizer.bpe.get_vocab_size() > model.config["vocab_size"]:
        raise WeightsError(f"the tokenizer {tokenizer_folder} has {tokenizer.bpe.get_vocab_size()} tokens, the text "
                           f"encoder {folder} {model.config['vocab_size']}: they belong to different weights")
    return TextEncoder(tokenizer, model).eval()


CLIP_SIZES = dict(num_hidden_layers=1000) | dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"), 2 ** 20)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    found = [path for name in TOKENIZER_FILES if (path := Path(folder) / name).exists()]
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in found):
        raise WeightsError(f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    for path in found:                # only a check, because errors of Tokenizer.load do not name the file
        read_json(path) if path.suffix == ".json" else read_text(path, WeightsError)
    with reading(found[0], WeightsError, "or a tokenizer's file next to it cannot be read"):
        return Tokenizer.load(folder)


# ----- checks of files, without reading the values of tensors ---------------------------------------------------------

def check_widths(width: int, folder: str | Path, stage: str) -> None:
    """Raises WeightsError unless the text encoder in `folder` outputs vectors of the `width` that `stage` expects."""
    found = read_config(folder).get("hidden_size")
    if found != width:
        raise WeightsError(f"{stage} takes texts of width {width}, the text encoder {folder} gives {found}: "
                           f"CLIP bigG (1280) belongs to v2's Stage C, CLIP H (1024) to v2's Stage B and to v1")


def stage_b_of(path: str | Path) -> type:
    """Returns StageB or StageBV1, the class for a decoder's weights, as their config or else tensors' names show."""
    config = config_of(path)
    if config is not None:
        v1 = config.get("_class_name") == FORMATS[StageBV1].class_name or in_our_words(config, StageBV1)
    else:
        v1 = recognise(TensorFile(find_file(path, (STEM, "model")), FORMATS[StageB].sections).shapes) is StageBV1
    return StageBV1 if v1 else StageB


def is_tiny(path: str | Path) -> bool:
    """Returns whether the image encoder at `path` is a TinyImageEncoder, which is made for images of 128 px."""
    config = config_of(path) or {}
    return config.get("_class_name") == "TinyImageEncoder" or in_our_words(config, TinyImageEncoder)


# ----- saving ---------------------------------------------------------------------------------------------------------

def save_model(model: nn.Module, folder: str | Path) -> None:
    """Saves a stage or an image encoder in float16, with diffusers' names (for v1's Stage B: the authors' names).

    Stage A's scale_factor, which is measured after training, goes into config.json.
    """
    if isinstance(model, StageA):
        assert model.config["scale_factor"] == model.scale_factor, "scale_factor was changed in one place only"
    tensors = to_half(to_diffusers(model.state_dict(), model))     # if this fails, no file has changed yet
    write_files(config_to_diffusers(model), tensors, folder, STEM)


def extract_image_encoder(file: str | Path, folder: str | Path) -> None:
    """Copies the image encoder, unchanged, from the original decoder file (6 GB) to a folder (80 MB)."""
    model = load_image_encoder(file)
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(model.state_dict(), model).items()}
    write_files(config_to_diffusers(model), tensors, folder, STEM)


def save_scheduler(folder: str | Path) -> None:
    """Writes the `scheduler` folder that diffusers requires, with the only noise schedule that our code supports."""
    config = dict(_class_name="DDPMWuerstchenScheduler", s=0.008, scaler=1.0)
    write_atomically(Path(folder) / "scheduler_config.json",
                     lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def save_text_encoder(encoder: TextEncoder, folder: str | Path, tokenizer_folder: str | Path) -> None:
    """Saves a text encoder in float16, and its tokenizer, with the names and in the format of transformers."""
    config = dict(architectures=["CLIPTextModel"], model_type="clip_text_model", **encoder.model.config,
                  dtype="float16", torch_dtype="float16")         # keys that transformers 5 and 4 read
    tensors = {f"text_model.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    write_files(config, to_half(tensors), folder, "model")
    for name, content in encoder.tokenizer.files().items():
        write_atomically(Path(tokenizer_folder) / name, lambda path: path.write_text(content, "utf-8"))
