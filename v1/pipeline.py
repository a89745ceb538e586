"""The pipeline of Würstchen v1: a Wuerstchen whose Stage B generates tokens.

  prompt -CLIP-> (B,77,1024) -[C]-> (B,16,12,12) -[B]-> tokens (B,128,128) -codebook, [A]-> (B,3,512,512)

Two things differ from v2. Stage B is discrete diffusion over the VQGAN's tokens (see stage_b.py), so it has its own
sampling settings, TokenSampling. And the released Stage C works on the raw semantic latents, not on (raw + 1) / 42.
As in v2, noise is drawn from a normal distribution. Discrete diffusion needs uniform random numbers, so the cumulative
distribution function of the normal distribution converts the noise.
Needs: torch; wuerstchen.py, v1/stage_b.py, v1/sampling.py.
"""
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from v1.sampling import MODES, sample, temperatures
from wuerstchen import Sampling, Wuerstchen, nan_advice

DEFAULT_C = Sampling(60, guidance=6.0)                       # as in the authors' notebook for v1


@dataclass(frozen=True)
class TokenSampling:
    """Settings for sampling v1's Stage B. Raises ValueError for impossible settings.

    sampler        "multinomial" draws tokens, "argmax" takes the likeliest, "quant" the one nearest the expected code
    temperature    below 1 makes likely tokens likelier: cleaner images, less detail; a pair: first and last step
    other fields   as in wuerstchen.Sampling; guidance acts on the logits
    """
    steps: int | dict[float, int] | Sequence[float] | Tensor = 8
    sampler: str = "multinomial"
    guidance: float | tuple[float, float] = 2.0
    interval: tuple[float, float] = (0.0, 1.0)
    t_start: float = 1.0
    t_end: float = 0.0
    temperature: float | tuple[float, float] = (1.0, 0.6)

    def __post_init__(self):
        if self.sampler not in MODES:
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {', '.join(MODES)} for Stage B of v1.")
        temperatures(self.temperature, len(self.continuous.levels) - 1)

    @functools.cached_property
    def continuous(self) -> Sampling:
        """Returns a Sampling with the settings that v2 also has. Creating it checks their values."""
        return Sampling(self.steps, guidance=self.guidance, interval=self.interval, t_start=self.t_start,
                        t_end=self.t_end)


class WuerstchenV1(Wuerstchen):
    """A Wuerstchen with v1's Stage B. raw: whether Stage C generates raw semantic latents, as in the released v1."""
    channels_b = 1                                           # Stage B's noise: one random number per token

    def __init__(self, networks: dict, size: int = 512, device="cpu", dtype=torch.float32, c: Sampling = DEFAULT_C,
                 b: TokenSampling | None = None, raw: bool = True):
        super().__init__(networks, size, device, dtype, c, b or TokenSampling())
        if raw:
            self.scale_semantic = self.unscale_semantic = lambda x: x

    @torch.no_grad()
    def sample_b(self, semantic: Tensor, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor],
                 sampling: TokenSampling | None = None, x: Tensor | None = None, keep: None = None,
                 callback: Callable | None = None, progress: bool = False) -> Tensor:
        """Generates the VQGAN's latents (n,4,h',w') like Wuerstchen.sample_b, but as tokens, which it converts to
        latents at the end. draw() returns normally distributed noise (n,1,h',w'); x: the first such noise.
        callback gets tokens (n,h',w') instead of latents, and their latents as x_0. It may return other tokens."""
        sampling, stage_a, semantic = sampling or self.b, self.part("stage_a"), semantic.to(self.dtype)
        codes, scale_factor = stage_a.codebook.codes.detach().clone(), stage_a.scale_factor
        conditions = [(semantic, torch.zeros_like(semantic)), (text, unconditional)]
        logits = self.predictor(self.bind_b, conditions)

        def predict(tokens: Tensor, t: Tensor, guided: bool) -> Tensor:
            return logits(tokens, t, guided).float()

        def uniform(x: Tensor | None = None) -> Tensor:
            return torch.special.ndtr(draw() if x is None else x)[:, 0]                    # (n, h', w')

        def to_latents(tokens: Tensor) -> Tensor:
            return F.embedding(tokens, codes).permute(0, 3, 1, 2) / scale_factor           # (n, 4, h', w')

        def watch(i: int, t: float, tokens: Tensor) -> Tensor | None:
            changed = callback("B", i, t, tokens, to_latents(tokens).float())
            if changed is not None and not (changed.dtype == torch.int64 and 0 <= changed.min()
                                            and changed.max() < len(codes)):
                raise ValueError(f"a callback may return tokens for v1's Stage B, whole numbers from 0 to "
                                 f"{len(codes) - 1}.")
            return changed
        levels = sampling.continuous.levels
        noise = (uniform(x) * len(codes)).long().clamp(max=len(codes) - 1)                 # (n, h', w')
        scales = [sampling.continuous.guidance_at(t) for t in levels[:-1].tolist()]
        bar = functools.partial(tqdm, desc="Stage B", unit="step") if progress else iter
        try:
            return to_latents(sample(predict, noise, uniform, levels, temperatures(sampling.temperature, len(scales)),
                                     scales, [sampling.sampler] * len(scales), codes=codes,
                                     watch=watch if callback else None, progress=bar))
        except FloatingPointError as error:
            raise ValueError(f"Stage B came to NaN or infinity in {error}, computing in {self.dtype}: "
                             f"{nan_advice(self.dtype, sampling)}") from None
