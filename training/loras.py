"""The LoRA that train_c.py trains: a new one, or one that continues from a file.

If --weights is the output folder of a LoRA run, --lora-weights is required, or a --prior that contains the LoRA. The
weights of Stage C that the folder refers to do not contain the LoRA, so the training would start without it.
Needs: torch; lora.py, loading/, results.py.
"""
from pathlib import Path

import torch

import lora
from loading.errors import UserError, as_user_error
from loading.layouts import locate
from loading.lora_formats import describe, load_lora, read_lora
from training.results import FILES_C, files_given


def check_lora(args) -> None:
    """Raises UserError for LoRA options that conflict. Sets defaults of args.rank, alpha and targets, if not given."""
    own = (args.rank, args.alpha, args.targets, args.rslora or None, args.dora or None)
    if args.lora_weights and not args.lora:
        raise UserError("--lora-weights continues a LoRA: add --lora")
    if args.lora_weights and own != (None,) * 5:
        raise UserError("--lora-weights brings its own rank, alpha, targets, --rslora and --dora: remove these options")
    args.rank, args.targets = 8 if args.rank is None else args.rank, args.targets or "attention"
    args.alpha = float(args.rank) if args.alpha is None else args.alpha
    if args.lora_weights:
        read_lora(args.lora_weights)


def locate_start(args, parts: tuple[str, ...]) -> dict[str, Path | None]:
    """Returns the weights to start from, {part: path or None}. Raises UserError if a LoRA in them would be ignored."""
    paths = locate(args.weights, files_given(args, FILES_C), parts)
    if paths.get("lora") and args.init == "weights" and not args.lora_weights:
        raise UserError(
            f"--weights {args.weights} is a LoRA on {paths['prior']}, which training would start without. Merge it: "
            f"python -m tools.lora merge {paths['prior']} {paths['lora']} FOLDER, then add --prior FOLDER; "
            f"or continue it: add --lora --lora-weights {args.weights}")
    return paths


def start_lora(prior: torch.nn.Module, args) -> None:
    """Adds a new LoRA to Stage C, or loads --lora-weights and sets args.rank, alpha, targets, dora to its values."""
    with as_user_error():
        if not args.lora_weights:
            lora.add_lora(prior, args.rank, args.alpha, args.lora_dropout, args.targets, rslora=args.rslora,
                          dora=args.dora)
            return
        load_lora(prior, args.lora_weights)
    layers = dict(lora.adapters(prior))
    for layer in layers.values():
        layer.dropout = args.lora_dropout
    args.rank, args.alpha, args.targets = (describe(layers)[name] for name in ("rank", "alpha", "targets"))
    args.dora = any(layer.magnitude is not None for layer in layers.values())
