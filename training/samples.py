"""How an image becomes part of a sample: its pixels or cached latents, its caption.

Needs: torch, numpy; data.py.
"""
import torch
from torch import Tensor


def to_tensor(pixels, device="cpu") -> Tensor:
    """(B,H,W,3) uint8, an array or a tensor -> (B,3,H,W) float32 in [0, 1], in channels-last memory like the pixels."""
    return torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float() / 255
