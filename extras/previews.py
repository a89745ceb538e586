"""Computes previews, which are approximate images of latents, by a linear map from the latent vector to a colour.

  latents (N,C,h,w), their images -fit_linear-> matrix (C+1,3);  latents (B,C,h,w) -apply_linear-> images (B,3,h,w)
  model("a cat", callback=Previews(model, show))           # show("C" or "B", step, images (n,3,h,w)) after every step

Needs: torch; editing.py.
"""
import contextlib
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from loading.errors import UserError
from loading.files import read_json, reading, write_atomically


def fit_linear(latents: Tensor, images: Tensor) -> Tensor:
    """Fits the linear map from latents (N,C,h,w) to the colours of their images (N,3,H,W) in [0, 1] by least squares.

    Returns a matrix (C+1,3) float32, on the CPU, for apply_linear. It minimizes |X matrix - Y|^2: a row of X is the
    vector of a latent position and a 1, a row of Y is the mean colour of the image patch at this position. Raises
    ValueError for other shapes.
    """
    if latents.ndim != 4 or images.ndim != 4 or len(latents) != len(images) or images.shape[1] != 3:
        raise ValueError(f"got latents of shape {tuple(latents.shape)} for images of shape {tuple(images.shape)}: "
                         "expected (N,C,h,w) and (N,3,H,W)")
    # Computes in float64, because squares of numbers of very different sizes are summed, and on the CPU, because only
    # its solver accepts linearly dependent columns of X, such as a channel that is always 0.
    colours = F.adaptive_avg_pool2d(images.detach().float(), tuple(latents.shape[2:]))  # (N, 3, h, w)
    X = latents.detach().double().cpu().movedim(1, -1).flatten(0, 2)                    # (N*h*w, C)
    X = torch.cat([X, torch.ones_like(X[:, :1])], dim=1)                                # (N*h*w, C + 1)
    Y = colours.double().cpu().movedim(1, -1).flatten(0, 2)                             # (N*h*w, 3)
    return torch.linalg.lstsq(X, Y).solution.float()                                    # (C + 1, 3)


def apply_linear(latents: Tensor, matrix: Tensor) -> Tensor:
    """Returns small images (B,3,h,w) float32 in [0, 1] of latents (B,C,h,w). matrix (C+1,3): from fit_linear.

    Raises ValueError if the matrix is for another number of channels.
    """
    if latents.ndim != 4 or matrix.shape != (latents.shape[1] + 1, 3):
        raise ValueError(f"got latents of shape {tuple(latents.shape)} and a matrix of shape {tuple(matrix.shape)}: "
                         "expected (B,C,h,w) and (C+1,3)")
    matrix = matrix.to(latents.device)
    colours = latents.float().movedim(1, -1) @ matrix[:-1] + matrix[-1]                 # (B, h, w, 3)
    return colours.movedim(-1, 1).clamp(0, 1)                                           # (B, 3, h, w)


class Previews:
    """A callback for the pipeline: after each step, calls show(stage, step, previews (n,3,h,w)), then `callback`."""
    def __init__(self, model, show: Callable[[str, int, Tensor], None], callback: Callable | None = None):
        self.maps, self.show, self.callback = preview_maps(model), show, callback

    def __call__(self, stage: str, step: int, t: float, x: Tensor, x_0: Tensor):
        if stage in self.maps:
            self.show(stage, step, apply_linear(x_0.cpu(), self.maps[stage]))
        return None if self.callback is None else self.callback(stage, step, t, x, x_0)


@torch.no_grad()
def preview_maps(model) -> dict[str, Tensor]:
    """Returns each stage's matrix for apply_linear: {"C": (17,3), "B": (5,3)}; without an image encoder, only "B".

    The matrices are fitted to smooth images of random colours and stored in model.preview_file, for the next call.
    """
    if model.preview_file is not None and model.preview_file.is_file():
        with contextlib.suppress(UserError), reading(model.preview_file):      # if the file is unusable, fit again
            maps = {stage: torch.tensor(matrix) for stage, matrix in read_json(model.preview_file).items()}
            if maps["B"].shape == (5, 3) and all(matrix.shape[1:] == (3,) for matrix in maps.values()):
                return maps
    colours = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return fit_preview(model, F.interpolate(colours, size=(model.size, model.size), mode="bicubic").clamp(0, 1))


@torch.no_grad()
def fit_preview(model, images: Tensor) -> dict[str, Tensor]:
    """Fits the matrices of preview_maps to images (N,3,H,W) of values from 0 to 1. Returns and stores the matrices."""
    from extras.editing import encode_image, encode_latents
    maps = {"B": fit_linear(torch.cat([encode_latents(model, image[None]).cpu() for image in images]), images)}
    if model.networks.get("image_encoder") is not None:
        semantic = [model.scale_semantic(encode_image(model, image[None])).cpu() for image in images]
        maps["C"] = fit_linear(torch.cat(semantic), images)
    if model.preview_file is not None:
        rounded = {stage: [[round(v, 5) for v in row] for row in matrix.tolist()] for stage, matrix in maps.items()}
        with contextlib.suppress(OSError):                   # the folder may be read-only
            write_atomically(model.preview_file, lambda path: path.write_text(json.dumps(rounded) + "\n"))
    return maps
