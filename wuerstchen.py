"""Generates images from prompts with Würstchen: noise schedule, samplers, guidance, pipeline.

  prompt -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

  from wuerstchen import Wuerstchen
  model = Wuerstchen.load("tiny")                         # or "v2", or a folder of weights
  model("a red apple on a blue background", seed=1)[0]    # a PIL image

Two diffusion models run in a row, Stages C and B, each in the same loop, `denoise`. It starts with
Gaussian noise and steps down a list of noise levels; at each, a network predicts the noise in x_t.
Note: noise levels t are real numbers in [0, 1], 0 = clean, 1 = noise, not integers 0..999. The
signal's share is a function of t, so any falling list of levels is a schedule. Stage C works on
(raw + 1) / 42, where raw are the semantic latents of the image encoder, the input of Stage B.
Wuerstchen.load uses speed/fast.py for faster networks; fast=False keeps the plain networks.
See extras/ for editing and previews, speed/memory.py for less memory, and v1/ for Würstchen v1.
Paper: arXiv:2306.00637.  Needs: torch, numpy, pillow, tqdm; tokenizers.
"""
if __name__ == "__main__":
    raise SystemExit("wuerstchen.py is a module. To generate images: python sample.py --help")

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

LATENT_SHIFT, LATENT_SCALE = 1.0, 42.0     # fixed by the released weights
S = torch.tensor(0.008, device="cpu")      # offset s of the cosine schedule, float32 as in training
START = torch.cos(S / (1 + S) * torch.pi * 0.5) ** 2


def scale_semantic(raw: Tensor) -> Tensor:
    """Converts the image encoder's output to Stage C's latents, which have about unit variance."""
    return (raw + LATENT_SHIFT) / LATENT_SCALE


def unscale_semantic(x: Tensor) -> Tensor:
    """Converts Stage C's output to Stage B's input. This is the inverse of scale_semantic."""
    return x * LATENT_SCALE - LATENT_SHIFT


# ----- noise schedule -----------------------------------------------------------------------------

def alphas_cumprod(t: Tensor) -> Tensor:
    """Computes ab, the signal's share of the variance at noise level t: a squared cosine of t.

    t any shape, in [0, 1]. Returns float32 of that shape, clamped to [1e-4, 1 - 1e-4] because the
    samplers divide by sqrt(ab) and sqrt(1 - ab): t = 0 is not quite clean, t = 1 not quite noise.
    Raises ValueError for t outside [0, 1], such as integer timesteps 0..999. On a GPU it only
    checks that t is not of an integer type, because reading values would make the host wait.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    on_cpu = t.device.type == "cpu"
    if not (all(0 <= v <= 1 for v in t.flatten().tolist()) if on_cpu else t.is_floating_point()):
        found = f"{t.min():g} to {t.max():g}" if on_cpu else t.dtype
        raise ValueError(f"noise levels must lie in [0, 1], got {found}: "
                         f"divide integer timesteps by their number first.")
    ab = torch.cos((t.float() + S) / (1 + S) * torch.pi * 0.5) ** 2 / START
    return ab.clamp(1e-4, 1 - 1e-4)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """Reshapes values (B,) to (B,1,1,...), so that value i is for row i of x. A scalar is kept."""
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Returns x_t: x_0 with noise eps, each (B,...), at level t (B,).  arXiv:2006.11239, eq. 4."""
    ab = per_row(alphas_cumprod(t), x_0)
    return ab.sqrt() * x_0 + (1 - ab).sqrt() * eps


def predict_x_0(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Solves add_noise for x_0. The result is the clean x_0 if eps is the noise in x_t."""
    ab = per_row(alphas_cumprod(t), x_t)
    return (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()


# ----- samplers: one step from noise level t down to t_prev < t -----------------------------------
# Arguments: x_t, eps, fresh noise (B,...); t, t_prev () or (B,); `last`, (t, x_0) of the previous
# step or None in the first step. Returned: x at t_prev, float32 (B,...). To add a sampler, add a
# function to SAMPLERS; for the command line, add its name to SAMPLERS of extras/like.py.

def ddpm_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor, last=None):
    """Takes a step of the original sampler: removes predicted noise, adds a little fresh noise.

    The last step, to t_prev = 0, adds no noise.  Source: arXiv:2006.11239, algorithm 2, with the
    smaller of its two variances.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    alpha = ab / ab_prev
    mean = (1 / alpha).sqrt() * (x_t - (1 - alpha) * eps / (1 - ab).sqrt())
    std = ((1 - alpha) * (1 - ab_prev) / (1 - ab)).sqrt()
    return mean + std * noise * per_row(t_prev != 0, x_t)


def ddim_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise=None, last=None, eta=0.0):
    """Predicts x_0, then adds predicted noise at level t_prev.  arXiv:2010.02502, eq. 12 and 16.

    eta 0: no fresh noise, so the first x_t decides the result. eta 1: ddpm_step's distribution.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    x_0 = predict_x_0(x_t, eps, t)
    if eta == 0:
        return ab_prev.sqrt() * x_0 + (1 - ab_prev).sqrt() * eps
    std = eta * ((1 - ab_prev) / (1 - ab)).sqrt() * (1 - ab / ab_prev).sqrt()
    x = ab_prev.sqrt() * x_0 + (1 - ab_prev - std ** 2).clamp(min=0).sqrt() * eps
    return x + std * noise * per_row(t_prev != 0, x_t)


def dpm_solver_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise=None, last=None):
    """Takes a DPM-Solver++(2M) step: like DDIM, but extrapolates x_0's change since the last step.

    x_0 is extrapolated to the middle of the step in lam = log(signal / noise), along the line
    through the last two predictions. The error is of second order in the step, DDIM's of first, so
    half as many steps suffice. DDIM takes the first step, which has no earlier x_0, and the step to
    t_prev = 0, because lam changes most there.  Source: Lu et al. 2022, arXiv:2211.01095.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    lam, lam_prev = (torch.logit(a) / 2 for a in (ab, ab_prev))    # log(sqrt(ab) / sqrt(1 - ab))
    x_0 = predict_x_0(x_t, eps, t)
    if last is not None:
        t_last, x_0_last = last
        h_last = lam - torch.logit(per_row(alphas_cumprod(t_last), x_t)) / 2
        # Near t = 1 alphas_cumprod is clamped. So h_last may be 0: then nothing is extrapolated.
        r = torch.where(h_last > 0, ((lam_prev - lam) / (2 * h_last)).clamp(max=1), 0)
        x_0 = x_0 + r * per_row(t_prev != 0, x_t) * (x_0 - x_0_last)
    shrink = ((1 - ab_prev) / (1 - ab)).sqrt()   # noise's std at t_prev, relative to its std at t
    return shrink * x_t + (ab_prev.sqrt() - shrink * ab.sqrt()) * x_0


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm++": dpm_solver_step}


# ----- guidance and the loop ----------------------------------------------------------------------

def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: returns unconditional + scale * (conditional - unconditional).

    scale 0: unconditional; 1: conditional; above 1: exaggerates the text's effect. Source:
    arXiv:2207.12598, whose w is our scale - 1. torch.lerp rounds like the released samplers.
    Guidance raises each image's standard deviation. rescale lowers it again: 0 not at all, 1 to
    that of the conditional prediction (arXiv:2305.08891, sec. 3.4).
    """
    guided = torch.lerp(unconditional, conditional, scale)
    if rescale == 0:
        return guided
    std, std_guided = (per_row(y.flatten(1).std(dim=1), y) for y in (conditional, guided))
    return guided * (rescale * std / std_guided + 1 - rescale)


def denoise(predict: Callable[[Tensor, Tensor, bool], Tensor], x: Tensor,
            draw: Callable[[], Tensor], sampling: "Sampling", keep: Callable | None = None,
            callback: Callable | None = None, progress: Callable[[Iterable], Iterable] = iter):
    """Denoises x (B,...) from the first noise level of `sampling` to the last. Returns float32.

    predict(x_t, t, guided) -> eps (B,...); if guided, followed by eps without the text: (2B,...)
    draw() -> fresh Gaussian noise (B,...), called in every step whether it is used or not, so that
              a seed gives the same numbers as in the published pipelines with any sampler
    keep(x_t, t) -> x_t with its known part replaced, for inpainting: see extras/editing.py
    callback(i, t, x, x_0) -> None or another x: after step i, with the new x and its noise level
    Raises FloatingPointError if x is not finite; on a GPU after the last step, to avoid waiting.
    """
    x, last, finite, levels, step = x.float(), None, [], sampling.levels, sampling.step_function
    rows = levels.to(x.device)[:, None].repeat(1, len(x))    # (n + 1, B), copied to a GPU once
    for i in progress(range(len(levels) - 1)):
        t, t_prev = levels[i], levels[i + 1]   # on the CPU: computing with them launches no kernels
        x = x if keep is None else keep(x, rows[i])
        scale = sampling.guidance_at(t.item())
        eps = predict(x, rows[i], scale != 1).float()                              # (B or 2B, ...)
        if scale != 1:
            eps = guide(*eps.chunk(2), scale, sampling.rescale)                    # (B, ...)
        x_0 = predict_x_0(x, eps, t)
        x, last = step(x, eps, t, t_prev, draw(), last), (t, x_0)                  # (B, ...)
        finite.append((x.abs() < torch.inf).all())                           # NaN < inf is False
        if x.device.type == "cpu" or i == len(levels) - 2:
            check_finite(torch.stack(finite), levels)
        changed = None if callback is None else callback(i, t_prev.item(), x, x_0)
        x = x if changed is None else changed.to(x)
    return x if keep is None else keep(x, rows[-1])


def check_finite(finite: Tensor, levels: Tensor) -> None:
    """Raises FloatingPointError, naming the first step i, if any, at which finite[i] is False."""
    if not finite.all():
        i = finite.tolist().index(False)
        raise FloatingPointError(f"step {i + 1} of {len(levels) - 1} (t = {levels[i]:.3f})")


# ----- settings: which noise levels, how strongly to guide ----------------------------------------

@dataclass(frozen=True)
class Sampling:
    """Settings for sampling one stage. Raises ValueError for impossible settings.

    steps      a number, spread evenly over t_start .. t_end or, if `early`, more at high noise; or
               {2/3: 20, 0: 10}: 20 steps to t = 2/3, then 10 to 0; or a list of all noise levels
    sampler    a name in SAMPLERS, or a function like ddpm_step
    eta        for "ddim", how much fresh noise a step adds: 0 none, 1 as much as "ddpm"
    guidance   1: none, in half the time; two numbers: at t = 1 and t = 0, linear in between
    interval   (low, high): guidance acts only on noise levels between them (arXiv:2404.07724)
    rescale    0 to 1: how far to undo the contrast that guidance adds, see `guide`
    """
    steps: int | dict[float, int] | Sequence[float] | Tensor = 29
    sampler: str | Callable = "ddpm"
    guidance: float | tuple[float, float] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    eta: float = 0.0
    t_start: float = 1.0
    t_end: float = 0.0
    early: bool = False

    def __post_init__(self):
        scales, ends = np.ravel(self.guidance), (self.t_start, self.t_end)
        low, high = self.interval if np.size(self.interval) == 2 else (1, 0)
        steps = [*self.steps.values()] if isinstance(self.steps, dict) else \
            [self.steps if isinstance(self.steps, Integral) else 1]
        levels = self.levels if not isinstance(self.steps, str) and steps and \
            1 <= min(steps) <= sum(steps) <= 10_000 else torch.zeros(0)
        for name, value, possible, expected in (
                ("sampler", self.sampler, callable(self.sampler) or self.sampler in SAMPLERS,
                 f"one of {', '.join(SAMPLERS)}"),
                ("guidance", self.guidance, len(scales) in (1, 2) and np.isfinite(scales).all(),
                 "a number, or two for start and end: 1 is none, 4 is usual for Stage C"),
                ("interval", self.interval, 0 <= low <= high <= 1,
                 "two noise levels in [0, 1], the lower first"),
                ("rescale", self.rescale, 0 <= self.rescale <= 1, "a number from 0, none, to 1"),
                ("eta", self.eta, 0 <= self.eta <= 1, "a number from 0 to 1, where 1 is ddpm's"),
                ("(t_start, t_end)", ends, 0 <= ends[1] < ends[0] <= 1, "1 >= first > second >= 0"),
                ("steps", self.steps, levels.ndim == 1 and len(levels) > 1 and 0 <= levels[-1]
                 and levels[0] <= 1 and (levels.diff() < 0).all(), "at least 1, or at least two "
                 "strictly falling noise levels in [0, 1]; 10000 steps at most")):
            if not possible:
                raise ValueError(f"{name} is {value!r:.200}, expected {expected}.")

    @property
    def levels(self) -> Tensor:
        """Returns the noise levels of n steps, (n + 1,) float32 on the CPU."""
        if not isinstance(self.steps, (Integral, dict)):
            return torch.as_tensor(self.steps, dtype=torch.float32)
        segments = self.steps
        if isinstance(self.steps, Integral):
            # If early, 2/3 of the steps are in the noisiest third, which decides what is shown.
            # 29 steps give diffusers' DEFAULT_STAGE_C_TIMESTEPS, 30 steps the authors' levels.
            noisy = max(self.t_start - 2 / 3, 0) * 3 * 19
            rest = max(2 / 3 - self.t_end, 0) * 1.5 * 10
            first = round(self.steps * noisy / (noisy + rest)) if self.early else 0
            if not 0 < first < self.steps:
                return torch.linspace(self.t_start, self.t_end, max(self.steps, 0) + 1)
            segments = {2 / 3: first, self.t_end: self.steps - first}
        levels = [torch.tensor([self.t_start], dtype=torch.float64)]
        for t_end, steps in segments.items():
            levels.append(torch.linspace(levels[-1][-1], t_end, steps + 1, dtype=torch.float64)[1:])
        return torch.cat(levels).float()       # computed in float64, to equal the published levels

    @property
    def step_function(self) -> Callable:
        """Returns the function that takes one step, such as ddpm_step; ddim_step gets `eta`."""
        step = SAMPLERS.get(self.sampler, self.sampler)
        return functools.partial(step, eta=self.eta) if step is ddim_step else step

    def guidance_at(self, t: float) -> float:
        """Returns the guidance scale at noise level t, which is 1 outside the interval."""
        (low, high), scales = self.interval, np.ravel(self.guidance).tolist()
        start, end = scales[0], scales[-1]
        return end + (start - end) * t if low - 1e-6 <= t <= high + 1e-6 else 1.0


# ----- sizes, random numbers, text ----------------------------------------------------------------

def latent_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns two sizes (h, w), of Stage C's and of Stage B's latents: 24 and 256 for 1024 px.

    The grids are the smallest that cover the image. A latent position of Stage C is 42 2/3 px wide.
    Stage B's sides are multiples of 16 (64 px), because its U-Net halves them up to 4 times.
    """
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, Integral) or not 64 <= side <= 2 ** 14:
            raise ValueError(f"{name} is {side!r}, expected a whole number of px from 64 to 16384.")
    return tuple(-(-side * 3 // 128) for side in (height, width)), \
        tuple(-(-side // 64) * 16 for side in (height, width))


class Noise:
    """Draws noise for n images, each with its own seed: noise(C, h, w) -> (n,C,h,w).
    So an image does not depend on its batch, nor on the device, because the CPU draws the noise."""
    def __init__(self, seeds: Sequence[int], device: str | torch.device = "cpu"):
        if not all(isinstance(seed, Integral) and 0 <= seed < 2 ** 32 for seed in seeds):
            # torch accepts larger seeds, but its generator uses only 32 bits.
            raise ValueError(f"seeds must lie between 0 and 2^32 - 1 = {2 ** 32 - 1}, "
                             f"got {', '.join(map(str, seeds))}.")
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = torch.device(device)

    def __call__(self, *shape: int) -> Tensor:
        noise = torch.stack([torch.randn(*shape, generator=g) for g in self.generators])
        if self.device.type == "cuda":         # pinned memory is copied in the background
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True)


# ----- the pipeline -------------------------------------------------------------------------------

class Wuerstchen:
    """Generates images from text. Each step is a method; __call__ calls them in order.

    networks: {name: a module, or a function that loads it when it is first needed}, for stage_a,
    stage_b, stage_c, text_encoder_c, text_encoder_b, image_encoder; each is also an attribute.
    size: default width and height, px. c, b: default settings of Stages C and B. To make a loaded
    model faster or smaller, speed/ replaces `part`, `predictor`, `bind_c`, `bind_b`, `decode_one`;
    loading/arguments.py adds checks to `accept` and `settings`.
    """
    channels_c, channels_b = 16, 4             # channels of the noise that C and B start from
    weights, loras, elsewhere = None, {}, {}   # set by load; elsewhere: {name in diffusers: advice}

    def __init__(self, networks: dict, size: int = 1024, device="cpu", dtype=torch.float32,
                 c: Sampling = Sampling(29, guidance=4.0, early=True), b: Sampling = Sampling(12)):
        self.networks, self.size, self.c, self.b = networks, size, c, b
        self.device, self.dtype = torch.device(device), dtype

    @classmethod
    def load(cls, weights=None, device=None, dtype=None, **options) -> "Wuerstchen":
        """Loads a pipeline. weights: "tiny", which ships with the code; "v1", "v2", "v2-base" or
        "v2-aesthetic", which are downloaded; or a folder. options: see loading/pipeline.py.
        Raises ValueError, in one line, for weights and devices that cannot be used."""
        from loading.pipeline import load
        return load(weights, device, dtype, **options)

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] = (), negative_prompt: str = "", *,
                 seed: int | None = 0, num_images: int = 1, width: int | None = None,
                 height: int | None = None, callback: Callable | None = None,
                 progress: bool = False, **sampling) -> list[Image.Image]:
        """Returns PIL images, num_images for each prompt, in the order of the prompts.

        negative_prompt  a text that guidance steers away from
        seed             0 to 2^32 - 1; image i uses seed + i; None: a random seed
        width, height    px, any from 64; default: the size in training
        callback         callback("C" or "B", step, t, latents, x_0) after every step -> None or
                         other latents; to stop, raise an exception
        sampling         any field of Sampling for one stage: steps_c=15, guidance_b=2.0, ...
        Raises ValueError for impossible settings, before the first step, and if NaN occurs. Image
        to image, inpainting, lists of seeds, given embeddings, other outputs: extras/editing.py.
        """
        c, b = self.settings(sampling)
        prompts, seed, height, width, callback = self.accept(
            prompt, negative_prompt, seed, num_images, height, width, callback)
        noise = Noise([seed + i for i in range(len(prompts))], self.device)
        size_c, size_b = latent_sizes(height, width)
        text_c, text_b = (self.encode_text(stage, prompts, [negative_prompt or ""] * len(prompts))
                          for stage in "cb")                                       # 2 x (n, 77, D)
        semantic = self.sample_c(*text_c, lambda: noise(self.channels_c, *size_c), c,
                                 callback=callback, progress=progress)             # (n, 16, h, w)
        latents = self.sample_b(semantic, *text_b, lambda: noise(self.channels_b, *size_b), b,
                                callback=callback, progress=progress)              # (n, 4, h', w')
        return to_pil(crop(self.decode(latents), height, width))

    @torch.no_grad()
    def encode_text(self, stage: str, prompts: list[str], negatives: list[str]) -> tuple:
        """Returns embeddings for stage "c" or "b": of prompts and of negatives, each (n,N,D).

        Each text is encoded once and by itself, so that its embedding does not depend on a batch.
        """
        encoder = self.part(f"text_encoder_{stage}")
        encoded = {text: encoder([text]).to(self.device, self.dtype)               # (1, N, D) each
                   for text in dict.fromkeys([*prompts, *negatives])}
        return tuple(torch.cat([encoded[text] for text in texts]) for texts in (prompts, negatives))

    @torch.no_grad()
    def sample_c(self, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor],
                 sampling: Sampling | None = None, **options) -> Tensor:
        """Generates raw semantic latents (n,16,h,w) for Stage B from text embeddings (n,N,D).

        unconditional: negative prompts' embeddings. draw() returns noise (n,16,h,w). options: x,
        keep, callback, progress, see `sample`.
        """
        conditions = [(text, unconditional)]
        x = self.sample("C", self.bind_c, conditions, draw, sampling or self.c, **options)
        return self.unscale_semantic(x)

    @torch.no_grad()
    def sample_b(self, semantic: Tensor, text: Tensor, unconditional: Tensor,
                 draw: Callable[[], Tensor], sampling: Sampling | None = None, **options) -> Tensor:
        """Generates the VQGAN's latents (n,4,h',w') from raw semantic latents (n,16,h,w) and text.

        unconditional: negative prompts' embeddings; used together with zeros as semantic latents.
        """
        semantic = semantic.to(self.dtype)
        conditions = [(semantic, torch.zeros_like(semantic)), (text, unconditional)]
        return self.sample("B", self.bind_b, conditions, draw, sampling or self.b, **options)

    def sample(self, stage: str, bind: Callable, conditions: list[tuple[Tensor, Tensor]], draw,
               sampling: Sampling, x: Tensor | None = None, keep: Callable | None = None,
               callback: Callable | None = None, progress: bool = False) -> Tensor:
        """Runs denoise. bind, conditions: see predictor. x: the first x_t, by default draw()."""
        predict = self.predictor(bind, conditions)
        # leave=None removes the finished bar if it is below another bar, as in sample.py.
        bar = functools.partial(tqdm, desc=f"Stage {stage}", unit="step", leave=None)
        callback = functools.partial(callback, stage) if callback else None
        try:
            return denoise(predict, draw() if x is None else x, draw, sampling, keep, callback,
                           bar if progress else iter)
        except FloatingPointError as error:
            raise ValueError(f"Stage {stage} came to NaN or infinity in {error}, computing in "
                             f"{self.dtype}: {nan_advice(self.dtype, sampling)}") from None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes the VQGAN's latents (n,4,h,w) to images (n,3,4h,4w) float32 in [0, 1], one at a
        time to save memory. Raises ValueError for NaN, which would become a black image."""
        images = torch.cat([self.decode_one(row).float() for row in latents.split(1)])
        if not images.isfinite().all():
            dtype = next(self.part("stage_a").parameters()).dtype
            raise ValueError(f"Stage A came to NaN or infinity in {dtype}: {nan_advice(dtype)}")
        return images.clamp(0, 1)

    # ----- the networks and their input: what speed/, v1/ and loading/ replace --------------------

    def part(self, name: str):
        """Returns the network `name`; loads it if needed. Raises ValueError if there is none."""
        network = self.networks.get(name)
        if network is None:
            raise ValueError(f"{name} is needed for this, but was not loaded.")
        if not isinstance(network, torch.nn.Module):
            names = [other for other, loader in self.networks.items() if loader is network]
            self.networks.update(dict.fromkeys(names, network := network()))
        return network

    def predictor(self, bind: Callable, conditions: list[tuple[Tensor, Tensor]]) -> Callable:
        """Returns denoise's predict. conditions: (with, without text) for each argument of bind."""
        networks = {}                          # {whether guided: the function from bind}

        def predict(x: Tensor, t: Tensor, guided: bool) -> Tensor:
            if guided not in networks:         # a guided batch: with the text, then without it
                networks[guided] = bind(*(torch.cat(c) if guided else c[0] for c in conditions))
            x, t = (torch.cat([x, x]), torch.cat([t, t])) if guided else (x, t)
            return networks[guided](x, t)
        return predict

    def bind_c(self, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the function (x_t, t) -> eps of Stage C for this text."""
        stage_c = self.part("stage_c")
        return lambda x, t: stage_c(x, t, text)

    def bind_b(self, semantic: Tensor, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the function (x_t, t) -> eps of Stage B for these conditions."""
        stage_b = self.part("stage_b")
        return lambda x, t: stage_b(x, t, semantic, text)

    def decode_one(self, latents: Tensor) -> Tensor:
        """Decodes latents (1,4,h,w) to an image (1,3,4h,4w), not clamped to [0, 1]."""
        stage_a = self.part("stage_a")
        return stage_a.decode(latents.to(next(stage_a.parameters()).dtype))

    def __getattr__(self, name: str):          # Python calls it only for missing attributes
        if name in self.__dict__.get("networks", ()):
            return self.part(name)
        raise AttributeError(f"Wuerstchen has no {name}: {self.elsewhere.get(name, 'see dir()')}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.networks]

    def __repr__(self) -> str:
        loras = "".join(f", LoRA {file}: {scale:g}" for file, scale in self.loras.items())
        return f"Wuerstchen({self.weights}, {self.size} px, {self.device}, {self.dtype}{loras})"

    scale_semantic = staticmethod(scale_semantic)
    unscale_semantic = staticmethod(unscale_semantic)

    def accept(self, prompt, negative_prompt, seed, num_images, height, width, callback) -> tuple:
        """Returns (a prompt for each image, seed, height, width, callback), with default sizes."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        height, width = (self.size if side is None else side for side in (height, width))
        return [p for p in prompts for _ in range(num_images)], seed, height, width, callback

    def settings(self, given: dict) -> tuple[Sampling, Sampling]:
        """Returns Sampling of Stages C and B: defaults changed by given, e.g. {"steps_c": 15}."""
        changes = {"c": {}, "b": {}}
        for name, value in given.items():
            if name[-2:] not in ("_c", "_b") or not hasattr(getattr(self, name[-1]), name[:-2]):
                raise TypeError(f"there is no option {name} for these weights: expected one of "
                                f"Sampling and its stage, such as steps_c; see extras/editing.py")
            if value is not None:
                changes[name[-1]][name[:-2]] = value
        return replace(self.c, **changes["c"]), replace(self.b, **changes["b"])


def nan_advice(dtype: torch.dtype, sampling=None) -> str:
    """Returns advice against NaN for the user, without advice that the settings already follow."""
    larger = {torch.float16: ["use bfloat16 or float32"], torch.bfloat16: ["use float32"]}
    guided = sampling is not None and np.max(sampling.guidance) > 1
    advice = larger.get(dtype, []) + ["use a lower guidance scale"] * bool(guided)
    return ", or ".join(advice or ["check weights, LoRAs and given latents for NaN"]) + "."


def crop(images: Tensor, height: int, width: int) -> Tensor:
    """Crops images (...,H,W) to their middle (...,height,width)."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top:top + height, left:left + width]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts images (n,3,H,W) in [0, 1] to PIL images. Rounds: truncation would darken them."""
    images = (images * 255).round().byte().permute(0, 2, 3, 1)                     # (n, H, W, 3)
    return [Image.fromarray(image) for image in images.cpu().numpy()]
