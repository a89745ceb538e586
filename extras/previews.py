"""Previews: a quick look at latents without a decoder.

  latents (N,C,h,w), their images -fit_linear-> matrix (C+1,3);  latents (B,C,h,w) -apply_linear-> images (B,3,h,w)

Needs: torch.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def fit_linear(latents: Tensor, images: Tensor) -> Tensor:
    """The linear map from latents to colours that fits best.

    latents (N,C,h,w) of images (N,3,H,W) in [0, 1].  Returns (C+1, 3) float32, on the CPU, for apply_linear. It
    minimizes |X matrix - Y|^2: a row of X is a latent vector and a 1, a row of Y is the mean colour of its patch.
    Raises ValueError unless there is one image per latent.
    """
    if latents.ndim != 4 or images.ndim != 4 or len(latents) != len(images) or images.shape[1] != 3:
        raise ValueError(f"got latents of shape {tuple(latents.shape)} for images of shape {tuple(images.shape)}: "
                         "expected (N,C,h,w) and (N,3,H,W)")
    # float64, because squares of latents of very different sizes are summed. On the CPU, whose solver also accepts
    # linearly dependent columns of X (a channel that is always 0 is one).
    colours = F.adaptive_avg_pool2d(images.detach().float(), tuple(latents.shape[2:]))  # (N, 3, h, w)
    X = latents.detach().double().cpu().movedim(1, -1).flatten(0, 2)                    # (N*h*w, C)
    X = torch.cat([X, torch.ones_like(X[:, :1])], dim=1)                                # (N*h*w, C + 1)
    Y = colours.double().cpu().movedim(1, -1).flatten(0, 2)                             # (N*h*w, 3)
    return torch.linalg.lstsq(X, Y).solution.float()                                    # (C + 1, 3)


def apply_linear(latents: Tensor, matrix: Tensor) -> Tensor:
    """latents (B,C,h,w), matrix (C+1,3) from fit_linear -> small images (B,3,h,w) float32 in [0, 1].

    Raises ValueError if the matrix is for another number of channels.
    """
    if latents.ndim != 4 or matrix.shape != (latents.shape[1] + 1, 3):
        raise ValueError(f"got latents of shape {tuple(latents.shape)} and a matrix of shape {tuple(matrix.shape)}: "
                         "expected (B,C,h,w) and (C+1,3)")
    matrix = matrix.to(latents.device)
    colours = latents.float().movedim(1, -1) @ matrix[:-1] + matrix[-1]                 # (B, h, w, 3)
    return colours.movedim(-1, 1).clamp(0, 1)                                           # (B, 3, h, w)
