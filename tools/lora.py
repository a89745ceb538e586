"""LoRA files on the command line.

  python -m tools.lora info FILE                               # ranks, alphas, layers, and what its trainer wrote
  python -m tools.lora convert IN OUT --to kohya               # or diffusers, comfy, original, ours
  python -m tools.lora merge PRIOR LORA OUT --scale 0.8        # a prior for any program, without LoRA
  python -m tools.lora extract BASE TUNED OUT --rank 16        # the LoRA closest to a full fine-tuning

Needs: torch, safetensors, numpy; loading/.
"""
import argparse
import sys
from pathlib import Path

if not __package__:
    sys.exit("this script runs as a module: python -m tools.lora")

from loading.errors import UserError, as_user_error, exit_on_user_error

FORMATS = ("diffusers", "kohya", "comfy", "original", "ours")    # those of loading/lora_formats.py


def check_new(path: Path, suffix: str = "") -> None:
    """Raises UserError if a file exists already, or does not have the ending that is written."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already and is not overwritten: choose another name")
    if path.suffix != (suffix or path.suffix):
        raise UserError(f"{path} should end in {suffix}, the only kind of file that is written")


def info(file: str) -> str:
    """What a LoRA file holds, as text."""
    from loading import lora_formats
    weights, metadata = lora_formats.read_lora(file)
    tensors, (one, *_) = lora_formats.open_lora(file)[0], weights.values()
    metadata |= lora_formats.describe(weights) | dict(
        tensors=f"{len(tensors)}, {one.down.dtype}, for example {max(tensors)}", layers=len(weights),
        dora=one.magnitude is not None)
    return "\n".join(f"{key}: {value}" for key, value in sorted(metadata.items()))


def convert(source: str, target: Path, to: str) -> str:
    """Rewrites a LoRA of Stage C in another format. Its numbers do not change."""
    from loading import lora_formats
    from lora import DIFFUSERS_NAMES
    ...


def load_prior(path: str):
    """A prior, as folder or file in any naming -> (Stage C in float32, {tensor's name: its dtype in the file})."""
    import torch
    from stage_c import StageC
    from loading.weights import fill, plan, translate
    model, file = plan(StageC, path)
    dtypes = {}

    def noted(pairs):
        for name, tensor in pairs:
            dtypes[name] = tensor.dtype
            yield name, tensor
    return fill(model, noted(translate(file, file.shapes.keys(), model)), torch.float32), dtypes
