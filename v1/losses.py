"""The loss of v1's Stage B: cross-entropy with the clean tokens, weighted by what was replaced.

  tokens -some replaced at random, sampling.add_noise-> (B,h,w) -[B]-> logits (B,K,h,w) -> cross-entropy with tokens

Papers: arXiv:2211.07292 (Paella); label smoothing: arXiv:1512.00567.  Needs: torch; stage_b.py.
"""
import torch.nn.functional as F
from torch import Tensor

from stage_b import channels_last


def training_levels(u: Tensor) -> Tensor:
    """Uniform u in [0, 1) -> noise levels for training: almost even, and 7.5 % at t = 1, where sampling starts."""
    return ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)


def loss_weight(t: Tensor, mask: Tensor, least: float = 0.3) -> Tensor:
    """t (B,), mask (B,h,w) of add_noise -> (B,h,w): 1 for tokens that were replaced.

    The others have from 1 at t = 1 down to `least` at t = 0, because repeating the input is easily learned.
    """
    return 1 - ~mask * ((1 - t) * (1 - least))[:, None, None]


def training_errors(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """logits (B,K,h,w) for noised tokens, clean tokens (B,h,w), t (B,), mask (B,h,w) -> error of each image (B,).

    Cross-entropy against 0.9 of the true token and 0.1 of all tokens equally (arXiv:1512.00567): many of 8192
    codes look the same, and to be sure of one would be wrong. Weighted mean over each image, so images count equally.
    """
    weight = loss_weight(t, mask)                                                        # (B, h, w)
    # With the tokens' scores side by side, as they are in memory: a quarter of the time that (B,K,h,w) would take.
    scores = channels_last(logits).flatten(0, 2).float()                                 # (B*h*w, K)
    errors = F.cross_entropy(scores, tokens.flatten(), reduction="none", label_smoothing=smoothing)
    return (errors.view_as(weight) * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))    # (B,)


def training_loss(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """The mean of training_errors over the images: a scalar."""
    return training_errors(logits, tokens, t, mask, smoothing).mean()
