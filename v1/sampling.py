"""The sampler of v1's Stage B, which generates tokens, not latents.

  random tokens (B,h,w) -[predict, choose, replace some at random] x 8-> tokens (B,h,w)

The header of v1/stage_b.py explains the differences from v2.
Paper: arXiv:2211.07292 (Paella).  Needs: torch; stage_b.py.
"""
import math
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stage_b import channels_last

MODES = ("multinomial", "argmax", "quant")


def add_noise(tokens: Tensor, t: Tensor, random_tokens: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces each of `tokens` (B,h,w) with probability t (B,) by the one of `random_tokens` (B,h,w) at its position.
    u (B,h,w): random numbers, uniform in [0, 1]; a token is replaced if u <= t.

    Returns the noised tokens, and a mask that is True where a token was replaced, each (B,h,w). The mask is for the
    loss; the network does not get it."""
    mask = u <= t[:, None, None]
    return torch.where(mask, random_tokens, tokens), mask


def choose(logits: Tensor, mode: str, temperature: float, u: Tensor, codes: Tensor | None = None) -> Tensor:
    """Returns tokens (B,h,w), chosen from logits (B,K,h,w). mode is one of:

    multinomial  draws from the probabilities softmax(logits / temperature): low temperatures favour likely tokens.
    argmax       takes the likeliest token.
    quant        takes the code nearest to the expected code, the mean of all codes (K,c) weighted by probability, which
                 gives smooth, slightly blurred images.
    u (B,h,w): random numbers for multinomial, uniform in [0, 1]. codes: Stage A's codebook, for quant.
    """
    logits = channels_last(logits)                                                       # (B, h, w, K)
    if mode == "argmax":
        return logits.argmax(-1)
    scores = (logits.float() / temperature).softmax(-1)                                  # (B, h, w, K)
    if mode == "quant":
        mean, codes = scores @ codes.float(), codes.float()                              # (B, h, w, c)
        return (codes.square().sum(1) - 2 * mean @ codes.T).argmin(-1)          # nearest code, as in Codebook.nearest
    # Inverse transform sampling: take the token at which the cumulative probability exceeds u. Unlike
    # torch.multinomial, this works with given random numbers, so each image of a batch can have its own seed.
    heights = scores.cumsum(-1)                                                          # (B, h, w, K)
    return torch.searchsorted(heights, u[..., None] * heights[..., -1:])[..., 0]         # (B, h, w)


def per_step(name: str, value, steps: int) -> list:
    """Returns a list of one value per step. value: one value for all steps, a pair (of the first and last step, linear
    in between), or a list with a value per step. Raises ValueError, with `name` in it, for a list of another length."""
    if isinstance(value, (str, float, int)):
        return [value] * steps
    if len(value) == 2 and not isinstance(value[0], str):
        return torch.linspace(*value, steps).tolist()
    if len(value) != steps:
        raise ValueError(f"{name} has {len(value)} values for {steps} steps: give one, one for each step, or the first "
                         f"and the last.")
    return list(value)


def temperatures(value, steps: int) -> list[float]:
    """Returns a temperature for each step, see per_step. Raises ValueError if one is not positive and finite."""
    values = per_step("temperature", value, steps)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"the temperature is {min(values):g}, expected more than 0, and finite; "
                         f"mode argmax is what 0 would mean.")
    return values


@torch.no_grad()
def sample(predict: Callable[[Tensor, Tensor, bool], Tensor], noise: Tensor, uniform: Callable[[], Tensor],
           levels: Tensor, temperature: float | Sequence[float] = (1.0, 0.6),
           guidance: float | Sequence[float] = 2.0, mode: str | Sequence[str] = "multinomial",
           renoise_steps: int | None = None, codes: Tensor | None = None, start: Tensor | None = None,
           watch: Callable | None = None, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Returns tokens (B,h,w) of images, sampled from the random tokens `noise` (B,h,w).

    predict(tokens, t, guided) returns conditional logits (B,K,h,w); if guided, also unconditional logits: (2B,K,h,w).
    uniform() returns random numbers (B,h,w) in [0, 1]. It is called twice in every step, even if they are not used.
    levels            (n + 1,) falling noise levels, the first at most 1. The original's 8 steps: linspace(1, 0, 9).
    temperature, guidance, mode   see choose; each may change from step to step, see per_step. Guidance acts on logits;
                      scale 1 means no guidance, and takes half the time.
    renoise_steps     the number of steps that end with random replacement; default: all except the last.
    codes             Stage A's codebook (K,c), for mode quant.
    start             tokens to start from, instead of `noise`, if levels[0] < 1.
    watch(i, t, tokens)  called after step i with the next noise level and the chosen tokens; may return others.
    Raises ValueError for invalid settings. Raises FloatingPointError if logits are not finite: on a CPU after the step
    that computes them, on a GPU after the last step.
    """
    steps = len(levels) - 1
    if steps < 1 or not (levels[1:] < levels[:-1]).all() or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"levels must be at least two strictly falling numbers in [0, 1], got {levels.tolist()}.")
    temperature, guidance, mode = (temperatures(temperature, steps), per_step("guidance", guidance, steps),
                                   per_step("mode", mode, steps))
    if not set(mode) <= set(MODES):
        raise ValueError(f"the mode is {(set(mode) - set(MODES)).pop()!r}, expected one of {', '.join(MODES)}.")
    if "quant" in mode and codes is None:
        raise ValueError("mode quant needs Stage A's codebook: give its vectors as codes.")
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    tokens, finite, rows = noise if start is None else start, [], levels.to(noise.device)[:, None].repeat(1, len(noise))
    for i in progress(range(steps)):
        logits = predict(tokens, rows[i], guidance[i] != 1)                              # (B, K, h, w) or (2B, K, h, w)
        if guidance[i] != 1:
            conditional, unconditional = logits.chunk(2)
            logits = torch.lerp(unconditional, conditional, guidance[i])                 # (B, K, h, w)
        finite.append((logits.abs() < torch.inf).all())                                  # NaN < inf is False
        # On a GPU, `finite` is read only after the last step, because reading makes the CPU wait and the GPU idle.
        if (tokens.device.type == "cpu" or i == steps - 1) and not (all_finite := torch.stack(finite)).all():
            k = all_finite.tolist().index(False)
            raise FloatingPointError(f"step {k + 1} of {steps} (t = {levels[k]:.3f})")
        tokens = choose(logits, mode[i], temperature[i], uniform(), codes)               # (B, h, w)
        changed = watch(i, levels[i + 1].item(), tokens) if watch is not None else None
        tokens, u = tokens if changed is None else changed.to(tokens), uniform()
        if i < renoise_steps:
            # Every step uses the same random tokens (`noise`), as in the authors' code.
            tokens, _ = add_noise(tokens, rows[i + 1], noise, u)
    return tokens
