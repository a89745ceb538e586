"""The networks that train_b.py starts from: Stage B and its image encoder, loaded or with random weights.

The second part has v2's version of the functions that differ between v1 and v2. v1/training.py has v1's version.
Needs: torch; stage_b.py, loading/, wuerstchen.py; torchvision for EfficientNet.
"""
from pathlib import Path

import torch
from torch import nn

from loading.errors import UserError, as_user_error
from loading.files import read_tensors, reading
from loading.layouts import locate
from loading.weights import (check_widths, is_tiny, load, load_image_encoder, load_stage_a, load_text_encoder,
                             new_model, stage_b_of)
from stage_b import EfficientNetEncoder, StageB, TinyImageEncoder
from training.processes import SynchronisedBatchNorm
from training.results import FILES_B, files_given
from wuerstchen import Sampling, Wuerstchen, scale_semantic, unscale_semantic


def load_models(args, stage, dtype: torch.dtype, processes) -> tuple:
    """Returns (Stage B, image encoder, VQGAN, text encoder or None). stage: the module with the functions of v1 or v2.

    Frozen networks stay in eval mode, because BatchNorm's statistics must not change. The VQGAN and the image encoder
    are in float32, so that the latents they compute are exact.
    """
    device, parts = processes.device, ["vqgan"] + ["decoder", "image_encoder"] * (args.init == "weights")
    parts += ["text_encoder", "tokenizer"] * (args.text_encoder != "none")
    paths = locate(args.weights, files_given(args, FILES_B), tuple(parts))
    if args.init == "weights" and paths["image_encoder"] is None:
        raise UserError(f"{args.weights} has no image encoder: add --image-encoder FOLDER")
    decoder, encoder = build_stage_b(args, paths, stage)
    vqgan = load_stage_a(paths["vqgan"]).to(device).requires_grad_(False)
    with as_user_error():
        stage.match_vqgan(decoder, vqgan, new=args.init == "random")
    text_encoder = None
    if args.text_encoder != "none":
        check_widths(decoder.config["c_text"], paths["text_encoder"], "Stage B")
        text_encoder = load_text_encoder(paths["text_encoder"], paths["tokenizer"], dtype)
        text_encoder.to(device).requires_grad_(False)
    encoder.to(device).train(not args.freeze_encoder).requires_grad_(not args.freeze_encoder)
    encoder.norm.requires_grad_(False)               # its weight and bias, 42 and -1 in v2, set the latents' scale
    if processes.many and not args.freeze_encoder:
        SynchronisedBatchNorm.convert(encoder)
    decoder.checkpointing = args.checkpointing
    return decoder.to(device).train(), encoder, vqgan, text_encoder


def build_stage_b(args, paths: dict, stage) -> tuple[nn.Module, nn.Module]:
    """Returns Stage B and the image encoder in float32: in 16 bits, rounding would undo the optimizer's small steps.

    stage: this module or v1/training.py, with NETWORK, the class of Stage B. paths: {part: path or None}.
    """
    if args.init == "weights":
        if stage_b_of(paths["decoder"]) is not stage.NETWORK:
            found = "v2, --v1 trains that of v1: remove it" if args.v1 else "v1: add --v1"
            raise UserError(f"{paths['decoder']} is a Stage B of {found}, or use --init random for a new one")
        return load(stage.NETWORK, paths["decoder"]), load_image_encoder(paths["image_encoder"])
    config, kind, encoder_config = None if args.config == "official" else args.config, EfficientNetEncoder, None
    if config and Path(config).is_dir():
        with as_user_error():
            encoder_config = locate(config, parts=("image_encoder",))["image_encoder"]
            kind = TinyImageEncoder if encoder_config and is_tiny(encoder_config) else EfficientNetEncoder
        config = Path(config) / "decoder"
    decoder = new_model(stage.NETWORK, config)
    if args.image_encoder:
        return decoder, load_image_encoder(paths["image_encoder"])
    return decoder, new_encoder(kind, args.backbone, stage.semantic_scale(decoder)[1], encoder_config)


def new_encoder(kind: type = EfficientNetEncoder, backbone: str | None = None, unscale=unscale_semantic,
                config: Path | None = None, **sizes):
    """Returns a new image encoder with random weights, or with those of `backbone`, a file of torchvision's
    efficientnet_v2_s. config, sizes: see new_model.

    Its last norm gives the latents mean 0 and variance 1 after the scaling for Stage C, whose inverse is `unscale`.
    """
    encoder = new_model(kind, config, **sizes)
    nn.init.constant_(encoder.norm.weight, unscale(1.0) - unscale(0.0))                  # 42 by default
    nn.init.constant_(encoder.norm.bias, unscale(0.0))                                   # -1 by default
    if backbone:
        if kind is not EfficientNetEncoder:
            raise UserError(f"--backbone is for EfficientNetV2-S, --config asks for a {kind.__name__}")
        with reading(backbone, failed="cannot be used as --backbone, expected torchvision's efficientnet_v2_s"):
            encoder.backbone.load_state_dict(read_tensors(backbone, "features."))
    return encoder


def block_groups(decoder) -> list[list[nn.Module]]:
    """Returns Stage B's blocks in groups. Each level repeats a pattern of blocks, such as [ResBlock, TimestepBlock,
    AttentionBlock], and each repetition is a group."""
    return [[*level[i:i + len(pattern)]] for part in (decoder.down_blocks, decoder.up_blocks)
            for level, pattern in zip(part, decoder.config["levels"]) for i in range(0, len(level), len(pattern))]


# ----- Stage B of v2: it generates latents ------------------------------------------------------------

NETWORK = StageB
LEVELS_AT_ONCE = 10          # noise levels per forward pass in validation


def match_vqgan(decoder: StageB, vqgan, new: bool) -> None:
    """Does nothing, because every VQGAN fits: all have 4 latent channels. The function of this name for v1 checks."""


def semantic_scale(decoder: StageB) -> tuple:
    """Returns two functions: one scales semantic latents for Stage C, the other is its inverse."""
    return scale_semantic, unscale_semantic


def pipeline(vqgan, small: bool, device) -> Wuerstchen:
    """Returns the pipeline for sample images, without a Stage B: sheets.py sets its bind_b. small: whether Stage B is
    small. A small one is often undecided between objects, and guidance makes it follow the semantic latents."""
    return Wuerstchen(dict(stage_a=vqgan), device=device, b=Sampling(12, guidance=4.0 if small else 1.0))


def cache_settings(vqgan) -> dict:
    return dict(kind="vqgan")


def encode(vqgan, images):
    """Encodes images (B,3,H,W), values in [0, 1], to latents x_0 (B,4,H/4,W/4) float32, which are not quantised."""
    return vqgan.encode(images)


def decode(vqgan, x_0):
    return vqgan.decode(x_0)
