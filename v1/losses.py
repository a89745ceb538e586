"""Computes the loss of v1's Stage B: cross-entropy with the clean tokens, less weighted for tokens without noise.

  tokens -some replaced at random, sampling.add_noise-> (B,h,w) -[B]-> logits (B,K,h,w) -> cross-entropy with tokens

Papers: arXiv:2211.07292 (Paella); label smoothing: arXiv:1512.00567.  Needs: torch; stage_b.py.
"""
import torch.nn.functional as F
from torch import Tensor

from stage_b import channels_last


def training_levels(u: Tensor) -> Tensor:
    """Converts uniform u to noise levels for training: 7.5 % are 1, where sampling starts; the rest is uniform."""
    return ((1 - u) * 1.08 + 0.001).clamp(0.001, 1.0)


def loss_weight(t: Tensor, mask: Tensor, least: float = 0.3) -> Tensor:
    """Returns the tokens' loss weights (B,h,w), given noise levels t (B,) and the mask (B,h,w) of replaced tokens.

    Tokens that add_noise replaced have weight 1. The weight of other tokens falls from 1 at t = 1 to `least` at t = 0,
    because a network easily learns to copy them.
    """
    return 1 - ~mask * ((1 - t) * (1 - least))[:, None, None]


def training_errors(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """Returns errors (B,), one per image, of logits (B,K,h,w) for clean tokens (B,h,w). t (B,), mask: see loss_weight.

    The error is cross-entropy with label smoothing (arXiv:1512.00567): the target is 0.9 for the true token plus 0.1
    spread over all tokens, because many of the 8192 codes look the same. The mean over an image uses loss_weight.
    """
    weight = loss_weight(t, mask)                                                        # (B, h, w)
    # channels_last makes the scores of a position adjacent in memory, so cross_entropy takes a quarter of the time.
    scores = channels_last(logits).flatten(0, 2).float()                                 # (B*h*w, K)
    errors = F.cross_entropy(scores, tokens.flatten(), reduction="none", label_smoothing=smoothing)
    return (errors.view_as(weight) * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))    # (B,)


def training_loss(logits: Tensor, tokens: Tensor, t: Tensor, mask: Tensor, smoothing: float = 0.1) -> Tensor:
    """Returns the mean of training_errors over the images, a scalar."""
    return training_errors(logits, tokens, t, mask, smoothing).mean()
