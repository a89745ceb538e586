"""Diffusion in plain functions: noise schedule, three samplers, guidance, and the loop that ties them together.

  x_0 (data) -add_noise-> x_t;   noise -denoise, many times predict + step-> x_0

These functions work on tensors of any shape (B,...) and know no network: `predict` is any function that
guesses the noise in x_t. Stages C and B, image to image and inpainting all go through `denoise`.
Surprise: noise levels t are real numbers in [0, 1], 0 = clean, 1 = noise, not integers 0..999; and the
signal's share alphas_cumprod is a function of t, so that any list of falling levels is a schedule.
Schedule: arXiv:2102.09672. Samplers: arXiv:2006.11239, 2010.02502, 2211.01095. Guidance: 2207.12598.
Needs: torch only.
"""
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ----- noise schedule ---------------------------------------------------------------------------------


def alphas_cumprod(t: Tensor, s: float = 0.008) -> Tensor:
    """Share of the variance at noise level t that is still signal: the cosine schedule in continuous time.

    t any shape, in [0, 1], 0 = clean, 1 = noise.  Returns float32 of the same shape, clamped to
    [1e-4, 1 - 1e-4] because the steps below divide by sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod);
    so t = 0 is not quite clean, and t = 1 not quite pure noise.
    Raises ValueError for t outside [0, 1], the usual sign of integer timesteps 0..999. On a GPU, where the host would have to
    wait for the numbers, in every step of a sampler, only for integers.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    if t.device.type == "cpu" and t.numel() and not (t.min() >= 0 and t.max() <= 1):
        raise ValueError(f"noise levels must lie in [0, 1], got {t.min().item():g} to {t.max().item():g}: "
                         f"divide integer timesteps by their number first.")
    if t.device.type != "cpu" and not t.is_floating_point():
        raise ValueError(f"noise levels must lie in [0, 1], got {t.dtype}: divide integer timesteps by their number first.")
    s = torch.full((), s, device=t.device)     # float32 from here on, as the released models were trained
    start = torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
    return (torch.cos((t.float() + s) / (1 + s) * torch.pi * 0.5) ** 2 / start).clamp(1e-4, 1 - 1e-4)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B,1,1,...), so that row i of x meets value i."""
    return values.view(-1, *[1] * (x.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Forward diffusion: x_0 and eps (B,...), t (B,) -> x_t (B,...).  arXiv:2006.11239, eq. 4."""
    ab = per_row(alphas_cumprod(t), x_0)
    return ab.sqrt() * x_0 + (1 - ab).sqrt() * eps


def predict_x_0(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """add_noise solved for x_0: what is clean if eps is the noise.  x_t, eps (B,...), t (B,) -> (B,...)."""
    ab = per_row(alphas_cumprod(t), x_t)
    return (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()


# ----- samplers: one step from noise level t down to t_prev < t --------------------------------------
# All take x_t, eps and fresh noise (B,...); t and t_prev (B,); `last` = (t, x_0) as the step before this
# one saw them, None in the first; and return float32 (B,...). What a sampler does not need it ignores.

def ddpm_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor, last=None) -> Tensor:
    """The sampler of the original model: remove predicted noise, add a little fresh noise.

    The last step, to t_prev = 0, adds none.  Source: arXiv:2006.11239, algorithm 2, with the smaller
    of its two variances.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    alpha = ab / ab_prev
    mean = (1 / alpha).sqrt() * (x_t - (1 - alpha) * eps / (1 - ab).sqrt())
    std = ((1 - alpha) * (1 - ab_prev) / (1 - ab)).sqrt()
    return mean + std * noise * per_row(t_prev != 0, x_t)


def ddim_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor | None = None, last=None,
              eta: float = 0.0) -> Tensor:
    """Guess x_0, then put the same noise back, less of it.  arXiv:2010.02502, eq. 12 and 16.

    eta 0: no chance involved after the start. eta 1: the same distribution as ddpm_step.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    x_0 = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
    if eta == 0:
        return ab_prev.sqrt() * x_0 + (1 - ab_prev).sqrt() * eps
    std = eta * ((1 - ab_prev) / (1 - ab)).sqrt() * (1 - ab / ab_prev).sqrt()
    x = ab_prev.sqrt() * x_0 + (1 - ab_prev - std ** 2).clamp(min=0).sqrt() * eps
    return x + std * noise * per_row(t_prev != 0, x_t)


def dpm_solver_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor | None = None,
                    last: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """DPM-Solver++(2M): DDIM with a memory. The change of x_0 since the last step is expected to go on.

    x_0 is taken at the middle of the step in lam = log(signal / noise), on the line through the last two
    guesses: an error of second order in the step, where DDIM's is of first. So fewer steps do. The first
    step and that to t_prev = 0, over which lam changes most, are DDIM's.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    lam, lam_prev = (torch.logit(a) / 2 for a in (ab, ab_prev))                          # log(sqrt(ab) / sqrt(1 - ab))
    x_0 = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
    if last is not None:
        t_last, x_0_last = last
        h_last = lam - torch.logit(per_row(alphas_cumprod(t_last), x_t)) / 2
        # Near t = 1 alphas_cumprod is clamped: lam may not have moved at all, and then tells nothing.
        r = torch.where(h_last > 0, ((lam_prev - lam) / (2 * h_last)).clamp(max=1), 0) * per_row(t_prev != 0, x_t)
        x_0 = x_0 + r * (x_0 - x_0_last)
    # For constant x_0 the noise shrinks by sqrt(1 - ab_prev) / sqrt(1 - ab), and the signal is what it must be.
    shrink = ((1 - ab_prev) / (1 - ab)).sqrt()
    return shrink * x_t + (ab_prev.sqrt() - shrink * ab.sqrt()) * x_0


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm++": dpm_solver_step}

# ----- guidance ---------------------------------------------------------------------------------------


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: away from what is likely anyway, towards what the text asks for.

    scale 0: ignores the text; 1: plain prediction; above: exaggerates.  arXiv:2207.12598, eq. 6, where
    their w is our scale - 1. torch.lerp rather than the formula: the released samplers round like that.
    rescale in [0, 1]: how far the standard deviation, which guidance raises, goes back to that of the
    conditional prediction; each image by its own (arXiv:2305.08891, sec. 3.4).
    """
    guided = torch.lerp(unconditional, conditional, scale)
    if rescale == 0:
        return guided
    std, std_guided = (per_row(y.flatten(1).std(dim=1), y) for y in (conditional, guided))
    return guided * (rescale * std / std_guided + 1 - rescale)


@dataclass(frozen=True)
class Guidance:
    """How strongly to guide at which noise level; see `guide` for scale and rescale.

    scale: a number, or a pair (at t = 1, at t = 0) with a straight line between. interval: guidance acts
    for t in it, ends included; outside, the unconditional prediction is not even computed.
    Raises ValueError for impossible numbers.  Intervals: Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    scale: float | tuple[float, float] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self):
        scales = self.scale if isinstance(self.scale, (tuple, list)) else (self.scale,)
        if not 1 <= len(scales) <= 2 or not all(math.isfinite(s) for s in scales):
            raise ValueError(f"the guidance scale is {self.scale}, expected a number, or two for start and end: 1 is none, 4 is usual for Stage C.")
        interval = self.interval if isinstance(self.interval, (tuple, list)) else (self.interval,)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"the guidance interval is {' to '.join(f'{t:g}' for t in interval)}, expected two noise levels, the lower first, within 0 and 1.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale is {self.rescale:g}, expected a number from 0, none, to 1.")

    def at(self, t: float) -> float:
        """The scale at noise level t; 1 where there is nothing to do."""
        low, high = self.interval
        if not low - 1e-6 <= t <= high + 1e-6:
            return 1.0
        scales = self.scale if isinstance(self.scale, (tuple, list)) else (self.scale,)
        start, end = scales[0], scales[-1]
        return start if start == end else end + (start - end) * t


# ----- timesteps: which noise levels a sampler visits -------------------------------------------------

def linear_timesteps(steps: int, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    """Evenly spaced noise levels, t_start to t_end: (steps + 1,) float32."""
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}.")
    return torch.linspace(t_start, t_end, steps + 1)


def segmented_timesteps(segments: dict[float, int], t_start: float = 1.0) -> Tensor:
    """The original's form: {2/3: 20, 0.0: 10} is 20 even steps from t_start down to 2/3, then 10 down to 0.  float32."""
    levels = [torch.tensor([t_start], dtype=torch.float64)]
    for t_end, steps in segments.items():
        if steps < 1:
            raise ValueError(f"the number of steps must be at least 1, got {steps} for the part down to {t_end:g}.")
        # Made in float64, as the published lists were, then rounded once.
        levels.append(torch.linspace(levels[-1][-1], t_end, steps + 1, dtype=torch.float64)[1:])
    return torch.cat(levels).float()


DEFAULT_STAGE_C_TIMESTEPS = segmented_timesteps({2 / 3: 19, 0.0: 10})      # diffusers' list of that name: 29 steps


def default_timesteps_c(steps: int = 29, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    """Stage C's schedule: two thirds of the steps in the noisiest third, where the picture is decided.  (steps + 1,) float32.

    29 steps from 1 to 0 are DEFAULT_STAGE_C_TIMESTEPS, 30 are the authors' {2/3: 20, 0: 10}; other
    numbers keep the proportion.
    """
    noisy, rest = max(t_start - 2 / 3, 0) * 3 * 19, max(2 / 3 - t_end, 0) * 1.5 * 10                 # how many of 29 steps lie there
    first = round(steps * noisy / (noisy + rest))
    if not 0 < first < steps:
        return linear_timesteps(steps, t_start, t_end)
    return segmented_timesteps({2 / 3: first, t_end: steps - first}, t_start)


def timesteps(spec: int | dict | str | Sequence[float] | Tensor, t_start: float = 1.0, t_end: float = 0.0,
              default: Callable = linear_timesteps) -> Tensor:
    """Any way to say which levels to visit -> (n + 1,) float32, strictly falling.

    spec: a number of steps, spread by `default` over t_start .. t_end; segments, from t_start on; the levels
    themselves; or "DEFAULT_STAGE_C_TIMESTEPS".  Raises ValueError for levels that do not fall or leave [0, 1].
    """
    if not 0 <= t_end < t_start <= 1:
        raise ValueError(f"t_start is {t_start:g} and t_end {t_end:g}, expected 1 >= t_start > t_end >= 0.")
    if isinstance(spec, str):
        if spec != "DEFAULT_STAGE_C_TIMESTEPS":
            raise ValueError(f"there are no timesteps called {spec!r}: the only name is DEFAULT_STAGE_C_TIMESTEPS.")
        levels = DEFAULT_STAGE_C_TIMESTEPS.clone()
    elif isinstance(spec, dict):
        levels = segmented_timesteps(spec, t_start)
    else:
        levels = default(spec, t_start, t_end) if isinstance(spec, int) else torch.as_tensor(spec, dtype=torch.float32)
    check_timesteps(levels)
    return levels


def check_timesteps(levels: Tensor) -> None:
    """Raises ValueError unless they are at least two strictly falling numbers in [0, 1]."""
    if levels.ndim != 1 or len(levels) < 2 or not (levels[1:] < levels[:-1]).all() or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"timesteps must be a list of at least two strictly falling numbers in [0, 1], got {levels.tolist()}.")


def cut_timesteps(levels: Tensor, strength: float) -> Tensor:
    """The part of a schedule below noise level `strength`, which becomes its start: for image to image.

    Returns (m + 1,), m <= n; for strength 0 or the schedule's end, a single level: no step at all.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength:g}, expected a number from 0, nothing changes, to 1, nothing is kept.")
    start = max(min(strength, levels[0].item()), levels[-1].item())
    return torch.cat([levels.new_tensor([start]), levels[levels < start - 1e-6]])


# ----- the loop ---------------------------------------------------------------------------------------

class Keep:
    """Inpainting: holds what is known in place while the rest is sampled around it.

    known x_0 (B,...); mask, broadcast over it, True where new content goes; eps, the noise that the known part
    is given: always the same, so that it moves towards x_0 on one straight path, also for samplers with a memory.
    """
    def __init__(self, known: Tensor, mask: Tensor, eps: Tensor):
        self.known, self.mask, self.eps = known, mask, eps

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        known = torch.where(per_row(t == 0, x_t), self.known, add_noise(self.known, self.eps, t))
        return torch.where(self.mask, x_t, known)


def check_finite(finite: list[Tensor], levels: Tensor) -> None:
    """finite: for each step up to now, whether what came out of it was finite. Raises FloatingPointError, which names the first that was not."""
    said = torch.stack(finite)
    if not said.all():
        i = said.tolist().index(False)
        raise FloatingPointError(f"step {i + 1} of {len(levels) - 1} (t = {levels[i]:.3f})")


def denoise(predict: Callable[[Tensor, Tensor, bool], Tensor], x: Tensor, draw: Callable[[], Tensor], levels: Tensor,
            step: Callable = ddpm_step, guidance: Guidance = Guidance(), keep: Callable | None = None,
            watch: Callable | None = None, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """x (B,...) at noise level levels[0] -> x at levels[-1], in float32, whatever the network computes in.

    predict(x_t, t, both) -> eps (B,...) for the text; if `both`, that and below it eps without the text: (2B,...).
    draw() -> fresh Gaussian noise (B,...), called once in every step, also where it is not used: so a seed
    gives the same numbers here as in the published pipelines, whatever the sampler.
    keep(x_t, t) -> x_t: for inpainting, see Keep. watch(i, t, x, x_0) -> None or another x: called after
    step i with the new x, its level t and the step's guess of x_0; may raise to stop.
    Raises ValueError for levels that do not fall, and FloatingPointError if x is no longer finite: as soon as that is so,
    on a GPU in the end.
    """
    x, last, finite = x.float(), None, []
    on_device = levels.to(x.device)          # all at once: at every copy to a GPU the host waits for it
    if levels.ndim != 1 or len(levels) != 1:
        check_timesteps(levels)
    for i in progress(range(len(levels) - 1)):
        t, t_prev = (on_device[k].expand(len(x)) for k in (i, i + 1))                    # (B,), (B,)
        if keep is not None:
            x = keep(x, t)
        scale = guidance.at(levels[i].item())
        eps = predict(x, t, scale != 1).float()                                          # (B, ...) or (2B, ...)
        if scale != 1:
            eps = guide(*eps.chunk(2), scale, guidance.rescale)                          # (B, ...)
        x_0 = predict_x_0(x, eps, t)
        x, last = step(x, eps, t, t_prev, draw(), last), (t, x_0)                        # (B, ...)
        finite.append(x.isfinite().all())
        if x.device.type == "cpu" or i == len(levels) - 2:     # a GPU that is asked in every step has nothing to do until the next arrives
            check_finite(finite, levels)
        if watch is not None:
            changed = watch(i, levels[i + 1].item(), x, x_0)
            x = x if changed is None else changed.to(x)
    return x if keep is None else keep(x, on_device[-1].expand(len(x)))


# ----- random numbers ---------------------------------------------------------------------------------

def slerp(a: Tensor, b: Tensor, f: float | Tensor) -> Tensor:
    """Spherical interpolation from a (f = 0) to b (f = 1), of each row by itself: (B,...), (B,...), f a number or (B,) -> (B,...).

    A straight line between two noises would be too quiet in its middle: the network has seen unit variance only.
    Source: Shoemake 1985, "Animating rotation with quaternion curves", sec. 3.3.
    """
    f = torch.as_tensor(f, dtype=a.dtype, device=a.device).expand(len(a)).view(-1, *[1] * (a.ndim - 1))
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).view_as(f).clamp(-1, 1)
    angle = cosine.arccos()
    straight = angle.sin() < 1e-4                          # the same direction: no arc to go along
    angle = angle.where(~straight, 1)
    arc = ((1 - f) * angle).sin() / angle.sin() * a + (f * angle).sin() / angle.sin() * b
    return torch.where(straight, torch.lerp(a, b, f), arc)


class Noise:
    """The random numbers of several images, each from a generator of its own, on the CPU: noise(C, h, w) -> (n,C,h,w).

    So an image depends neither on the images beside it nor on the device. Raises ValueError for impossible seeds.
    """
    def __init__(self, seeds: Sequence[int]):
        if not all(isinstance(s, Integral) and 0 <= s < 2 ** 32 for s in seeds):
            # torch takes larger ones, but its generator only looks at 32 bits: 2^32 + 1 would be 1 again.
            raise ValueError(f"seeds must lie between 0 and 2^32 - 1 = {2 ** 32 - 1}, got {', '.join(map(str, seeds))}.")
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators])

    def __len__(self) -> int:
        return len(self.generators)

    @property
    def states(self) -> Tensor:
        """Where the generators stand, (n, bytes) uint8: what comes next can be drawn again."""
        return torch.stack([g.get_state() for g in self.generators])

    @states.setter
    def states(self, states: Tensor) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state.clone())         # a row of a larger tensor would be a segmentation fault (torch 2.15)
