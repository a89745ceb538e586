"""Loss weights: how much an error counts at noise level t, for a network that predicts the noise.

The plain squared error of the noise is dominated by almost clean levels, where little of the image is decided.
  p2       1 - alphas_cumprod: more weight on noisy levels; the released models were trained with it
  v        1 / alphas_cumprod: even more weight on noisy levels; the error of v-prediction
  min-snr  between the two;  none: the plain error
All take t (B,) in [0, 1] and return (B,).  Needs: torch; alphas_cumprod.
"""
import torch
from torch import Tensor

from wuerstchen import alphas_cumprod


def p2_weight(t: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """(k + SNR)^-gamma; 1 - alphas_cumprod for k = gamma = 1.  Source: Choi et al. 2022, arXiv:2204.00227."""
    ab = alphas_cumprod(t)
    return (k + ab / (1 - ab)) ** -gamma


def v_weight(t: Tensor, least: float = 0.01) -> Tensor:
    """1 / alphas_cumprod, capped at 1 / least: the squared error of noise becomes that of v-prediction.

    As a weight of the error of x_0 this is 1 / (1 - alphas_cumprod); p2 is alphas_cumprod, which is zero at high noise.
    At high noise a prediction depends only on the condition, so this weight makes a network use its condition early in
    training.  Source: Salimans & Ho 2022, arXiv:2202.00512 ("SNR+1 weighting").
    """
    return 1 / alphas_cumprod(t).clamp(min=least)


def min_snr_weight(t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR.  Source: Hang et al. 2023, arXiv:2303.09556, sec. 3.4, for the prediction of noise."""
    snr = alphas_cumprod(t) / (1 - alphas_cumprod(t))
    return snr.clamp(max=gamma) / snr


LOSS_WEIGHTS = {"p2": p2_weight, "v": v_weight, "min-snr": min_snr_weight, "none": torch.ones_like}
