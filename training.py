"""What train_a.py, train_b.py and train_c.py must agree on: runs, checkpoints, loss files, pictures.

The loops themselves stand in the scripts, each in full; here is only what would otherwise be written
three times and could drift. Nothing in here knows a model.
Needs: torch, numpy, pillow; weights.py.
"""
import contextlib
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from files import WeightsError, write_atomically


def fail(message: str):
    """Ends the program for a user's mistake: one line on stderr, exit code 2, no traceback."""
    sys.exit(print(f"error: {message}", file=sys.stderr) or 2)


@contextlib.contextmanager
def mistakes_in_one_line():
    """Around a whole script: unusable weights and files, and Ctrl-C, end it with one line and no traceback."""
    try:
        yield
    except (WeightsError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped: --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def check_out(args) -> None:
    """Looks at the folder args.out before any work is done: a run already in it is never overwritten silently.

    Ends the program if there is a checkpoint and --resume was not given, or the other way round.
    """
    path = Path(args.out) / "checkpoint.pt"
    if path.exists() and not args.resume:
        fail(f"{path} exists already: add --resume to go on from it, or choose another --out")
    if args.resume and not path.exists():
        fail(f"--resume needs {path}, which is not there: leave --resume away to start a new run")


def start_run(args, parts: dict) -> int:
    """A fresh run: returns 0. With args.resume: loads `parts` from args.out/checkpoint.pt, returns the step.

    parts maps names to objects with state_dict/load_state_dict.
    """
    if not args.resume:
        return 0
    path = Path(args.out) / "checkpoint.pt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["parts"].keys() != parts.keys():
        fail(f"{path} holds {sorted(checkpoint['parts'])}, expected {sorted(parts)}: it belongs to another script")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    torch.set_rng_state(checkpoint["rng"])
    if torch.cuda.is_available() and "cuda_rng" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    return checkpoint["step"]


def save_checkpoint(args, step: int, parts: dict) -> None:
    """Writes args.out/checkpoint.pt: weights, averages, optimizer states, random states, the number of steps done."""
    checkpoint = dict(step=step, args={k: v for k, v in vars(args).items()}, rng=torch.get_rng_state(),
                      parts={name: part.state_dict() for name, part in parts.items()})
    if torch.cuda.is_available():
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state()
    write_atomically(Path(args.out) / "checkpoint.pt", lambda path: torch.save(checkpoint, path))


def log_losses(args, step: int, name: str = "loss.csv", **values: float) -> None:
    """Appends a line to args.out/NAME. Lines at or after `step`, left by a run that was cut, are dropped first."""
    path = Path(args.out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    rows.append({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})

    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1].keys())
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last fifth of `steps`.

    Until the decay starts the rate does not depend on `steps`, so a run can be lengthened from any
    checkpoint before it without a jump; a cosine over the whole run would not allow that.
    """
    return peak * min((step + 1) / max(warmup, 1), 1.0, (steps - step) / max(steps // 5, 1))


def to_tensor(pictures: np.ndarray, device="cpu") -> Tensor:
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0, 1], in channels-last memory, as the pictures already are."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255


def save_grid(path: str | Path, images: Tensor, columns: int) -> None:
    """images (N,3,H,W), clamped to [0, 1], as one PNG with `columns` pictures in a row."""
    n, c, h, w = images.shape
    assert n % columns == 0, f"{n} pictures do not fill rows of {columns}"
    sheet = images.float().clamp(0, 1).reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)
    sheet = (sheet.reshape(n // columns * h, columns * w, c) * 255).round().byte().cpu().numpy()
    write_atomically(path, lambda temporary: Image.fromarray(sheet).save(temporary))
