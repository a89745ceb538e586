"""Loss weights: factors of the squared error at noise level t, for a network that predicts the noise.

Unweighted errors are largest at low noise levels, where the image is almost clean and little of it is left to decide.
  p2       1 - alphas_cumprod: more weight on high noise levels; used in the authors' script for Stage C
  v        1 / alphas_cumprod: even more weight on high noise levels; equals the error of v-prediction
  min-snr  between p2 and v;  none: weight 1 at all levels
All functions take noise levels t (B,) in [0, 1] and return weights (B,).  Needs: torch; alphas_cumprod.
"""
import torch
from torch import Tensor

from wuerstchen import alphas_cumprod


def p2_weight(t: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Returns (k + SNR)^-gamma; by default, this is 1 - alphas_cumprod. Source: Choi et al. 2022, arXiv:2204.00227."""
    ab = alphas_cumprod(t)
    return (k + ab / (1 - ab)) ** -gamma


def v_weight(t: Tensor, least: float = 0.01) -> Tensor:
    """Returns 1 / alphas_cumprod, at most 1 / least: the squared error of the noise becomes that of v-prediction.

    Expressed as weights of the squared error of x_0, v is 1 / (1 - alphas_cumprod), and p2 is alphas_cumprod, which is
    almost 0 at high noise. At high noise, a prediction can depend only on the condition. So a network that is trained
    with v learns early to use its condition. Source: Salimans & Ho 2022, arXiv:2202.00512 ("SNR+1 weighting").
    """
    return 1 / alphas_cumprod(t).clamp(min=least)


def min_snr_weight(t: Tensor, gamma: float = 5.0) -> Tensor:
    """Returns min(SNR, gamma) / SNR. Source: Hang et al. 2023, arXiv:2303.09556, sec. 3.4, for noise prediction."""
    snr = alphas_cumprod(t) / (1 - alphas_cumprod(t))
    return snr.clamp(max=gamma) / snr


LOSS_WEIGHTS = {"p2": p2_weight, "v": v_weight, "min-snr": min_snr_weight, "none": torch.ones_like}
