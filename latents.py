"""Latents and sizes: how big they are for a picture, and the scale that Stage C sees them in.

  picture (H,W) px <-> Stage C's latent ceil(3 H / 128) x ..., Stage B's 16 ceil(H / 64) x ...

Needs: torch only.
"""
import torch.nn.functional as F
from torch import Tensor

LATENT_SHIFT, LATENT_SCALE = 1.0, 42.0     # fixed by the released weights


def to_stored(raw: Tensor) -> Tensor:
    """What the image encoder gives -> what Stage C is trained on, of about unit variance."""
    return (raw + LATENT_SHIFT) / LATENT_SCALE


def to_raw(stored: Tensor) -> Tensor:
    """What Stage C makes -> what Stage B takes. The inverse of to_stored; applied exactly once."""
    return stored * LATENT_SCALE - LATENT_SHIFT


def latent_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Picture size in px -> ((h, w) of Stage C's latent, (h, w) of Stage B's).  1024 -> 24 and 256; 128 -> 3 and 32.

    Any size from 64 px: the next grids that cover it. Stage C's positions are 42 2/3 px wide; Stage B's U-Net
    halves its input up to 4 times, so that its side is a multiple of 16, that is 64 px. What is rendered
    beyond the picture is cropped. Raises ValueError for less, and for what is no whole number.
    """
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or side < 64:
            raise ValueError(f"{name} {side} is not possible, pictures have sides of 64 px or more, in whole pixels.")
    return tuple(-(-side * 3 // 128) for side in (height, width)), tuple(-(-side // 64) * 16 for side in (height, width))


def crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle of images (...,H,W) -> (...,height,width)."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top:top + height, left:left + width]


def extend(image: Tensor, height: int, width: int) -> Tensor:
    """(C,H,W) -> (C,height,width), its edges repeated: crop undoes it."""
    top, left = (height - image.shape[-2]) // 2, (width - image.shape[-1]) // 2
    return F.pad(image[None], (left, width - image.shape[-1] - left, top, height - image.shape[-2] - top), mode="replicate")[0]
