"""Würstchen, put together: noise schedule, sampling steps, guidance, and the pipeline from text to picture.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

  from wuerstchen import Wuerstchen
  picture = Wuerstchen.load("tiny")("a red apple on a blue background", seed=1)[0]     # a PIL image

The first half of this file is diffusion in plain functions: they work on tensors of any shape and
know no network. The second half, class Wuerstchen, calls text encoders, stages C, B and A in turn.
Two things are easily missed. Noise levels t are real numbers in [0, 1], not integers 0..999. And
Stage C works on (raw + 1) / 42 of what the image encoder gives and Stage B takes: see to_raw.
Paper: arXiv:2306.00637; schedule: arXiv:2102.09672; steps: arXiv:2006.11239, arXiv:2010.02502.
Needs: torch, numpy, pillow, tqdm; transformers for the text encoders; stage_a/b/c.py, weights.py, files.py, hub.py.
"""
import gc
import math
import warnings
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch import Tensor

# ----- diffusion ------------------------------------------------------------------------------------


def alphas_cumprod(t: Tensor, s: float = 0.008) -> Tensor:
    """Share of the variance at noise level t that is still signal: the cosine schedule in continuous time.

    t any shape, in [0, 1], 0 = clean, 1 = noise.  Returns float32 of the same shape, clamped to
    [1e-4, 1 - 1e-4] because the steps below divide by sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod);
    so t = 0 is not quite clean, and t = 1 not quite pure noise.
    Raises ValueError for t outside [0, 1], the usual sign of integer timesteps 0..999.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    if t.numel() and not (t.min() >= 0 and t.max() <= 1):
        raise ValueError(f"noise levels must lie in [0, 1], got {t.min().item():g} to {t.max().item():g}: "
                         f"divide integer timesteps by their number first.")
    s = torch.tensor(s, device=t.device)       # float32 from here on, as the released models were trained
    start = torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
    return (torch.cos((t.float() + s) / (1 + s) * torch.pi * 0.5) ** 2 / start).clamp(1e-4, 1 - 1e-4)


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B,1,1,...), so that row i of x meets value i."""
    return values.view(-1, *[1] * (x.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Forward diffusion: x_0 and eps (B,...), t (B,) -> x_t (B,...).  arXiv:2006.11239, eq. 4."""
    ab = per_row(alphas_cumprod(t), x_0)
    return ab.sqrt() * x_0 + (1 - ab).sqrt() * eps


def p2_weight(t: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Loss weight (k + SNR)^-gamma, t (B,) -> (B,).  With k = gamma = 1 it is 1 - alphas_cumprod.

    Plain noise prediction spends itself on the nearly clean levels, where little is decided;
    this turns it to the noisy ones.  Source: Choi et al. 2022, arXiv:2204.00227, eq. 8.
    """
    ab = alphas_cumprod(t)
    return (k + ab / (1 - ab)) ** -gamma


def v_weight(t: Tensor, least: float = 0.01) -> Tensor:
    """Loss weight 1 / alphas_cumprod, t (B,) -> (B,): the squared error of noise becomes that of v-prediction.

    In terms of the clean x_0 that is an error weight of 1 / (1 - alphas_cumprod), where p2 has
    alphas_cumprod: nothing at high noise. There a prediction rests on the condition alone, so
    this is what makes a network listen to its condition early in training. Capped at 1 / least.
    Source: Salimans & Ho 2022, arXiv:2202.00512, sec. 4 ("SNR+1 weighting").
    """
    return 1 / alphas_cumprod(t).clamp(min=least)


def ddpm_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor) -> Tensor:
    """One step from t down to t_prev < t, with fresh noise.  x_t, eps, noise (B,...); t, t_prev (B,).

    The last step, to t_prev = 0, adds none. Returns float32.  Source: arXiv:2006.11239, algorithm 2,
    with the smaller of its two variances.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    alpha = ab / ab_prev
    mean = (1 / alpha).sqrt() * (x_t - (1 - alpha) * eps / (1 - ab).sqrt())
    std = ((1 - alpha) * (1 - ab_prev) / (1 - ab)).sqrt()
    return mean + std * noise * per_row(t_prev != 0, x_t)


def ddim_step(x_t: Tensor, eps: Tensor, t: Tensor, t_prev: Tensor, noise: Tensor | None = None) -> Tensor:
    """The same step without chance: guess x_0, then put the same noise back, less of it.  arXiv:2010.02502, eq. 12, eta = 0.

    `noise` is not used; it is there so that both steps are called alike.
    """
    ab, ab_prev = per_row(alphas_cumprod(t), x_t), per_row(alphas_cumprod(t_prev), x_t)
    x_0 = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
    return ab_prev.sqrt() * x_0 + (1 - ab_prev).sqrt() * eps


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from what is likely anyway, towards what the text asks for.

    scale 0: ignores the text; 1: plain prediction; above: exaggerates.  arXiv:2207.12598, eq. 6, where
    their w is our scale - 1. torch.lerp rather than the formula: the released samplers round like that.
    """
    return torch.lerp(unconditional, conditional, scale)


def linear_timesteps(steps: int) -> Tensor:
    """Evenly spaced noise levels, 1 to 0: (steps + 1,) float32."""
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}.")
    return torch.linspace(1, 0, steps + 1)


def default_timesteps_c(steps: int = 29) -> Tensor:
    """Stage C's schedule: two thirds of the steps in the noisiest third, where the picture is decided.  (steps + 1,) float32.

    29 steps are diffusers' DEFAULT_STAGE_C_TIMESTEPS: 19 steps from 1 to 2/3, 10 from there to 0.
    Other numbers keep the proportion.
    """
    if steps < 2:
        return linear_timesteps(steps)
    first = min(max(round(steps * 19 / 29), 1), steps - 1)
    # Made in float64, as the published list was, then rounded once.
    return torch.cat([torch.linspace(1, 2 / 3, first + 1, dtype=torch.float64),
                      torch.linspace(2 / 3, 0, steps - first + 1, dtype=torch.float64)[1:]]).float()


def sample(predict: Callable[[Tensor, Tensor], Tensor], draw: Callable[[], Tensor], timesteps: Tensor,
           step: Callable = ddpm_step, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """From noise to data.  predict(x_t, t) -> eps; draw() -> fresh Gaussian noise (B,...); timesteps (n + 1,) falling to 0.

    Noise is drawn once to start and once in each step, also in the last, where it is not used: so a
    seed gives the same numbers here as in the published pipelines. x stays float32 throughout, whatever
    the network computes in.  Raises ValueError for timesteps that do not fall.
    """
    if timesteps.ndim != 1 or len(timesteps) < 2 or not (timesteps[1:] < timesteps[:-1]).all():
        raise ValueError(f"timesteps must be a list of at least two strictly falling numbers, got {timesteps.tolist()}.")
    x = draw().float()                                                                   # (B, ...)
    timesteps = timesteps.to(x.device)
    for i in progress(range(len(timesteps) - 1)):
        t, t_prev = timesteps[i].expand(len(x)), timesteps[i + 1].expand(len(x))         # (B,), (B,)
        x = step(x, predict(x, t).float(), t, t_prev, draw())                            # (B, ...)
    return x


# ----- latents and sizes ----------------------------------------------------------------------------

LATENT_SHIFT, LATENT_SCALE = 1.0, 42.0     # fixed by the released weights


def to_stored(raw: Tensor) -> Tensor:
    """What the image encoder gives -> what Stage C is trained on, of about unit variance."""
    return (raw + LATENT_SHIFT) / LATENT_SCALE


def to_raw(stored: Tensor) -> Tensor:
    """What Stage C makes -> what Stage B takes. The inverse of to_stored; applied exactly once."""
    return stored * LATENT_SCALE - LATENT_SHIFT


def latent_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Picture size in px -> ((h, w) of Stage C's latent, (h, w) of Stage B's).  1024 -> 24 and 256; 128 -> 3 and 32.

    Raises ValueError for sides that are not multiples of 128. Others would be computed on the next
    multiple anyway (Stage C positions are 42 2/3 px wide, Stage B's U-Net halves its input 4 times).
    """
    for name, side in (("height", height), ("width", width)):
        if side < 128 or side % 128:
            below = max(side // 128 * 128, 128)
            nearest = f"{below} or {below + 128}" if side > 128 else "128"
            raise ValueError(f"{name} {side} is not possible, pictures have sides that are multiples of 128 px: use {nearest}.")
    return (height * 3 // 128, width * 3 // 128), (height // 4, width // 4)


# ----- pipeline -------------------------------------------------------------------------------------

def usable_device(name: str | torch.device) -> torch.device:
    """Raises ValueError where torch does not know the name or cannot compute there, before anything is loaded."""
    try:
        torch.ones(1, device=name).tolist()                # "meta" is a device, too, but has no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:        # torch has several for what is not there
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    raise ValueError(f"device {name!r} cannot be used here: {reason}. \"cpu\" always works.")


class TextEncoder:
    """A CLIP tokenizer and text model from transformers: prompts -> one vector per token."""
    def __init__(self, tokenizer, model):
        self.tokenizer, self.model = tokenizer, model
        self.length = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    def __call__(self, prompts: list[str]) -> Tensor:
        """n prompts -> (n, N, D) float, N = 77 for the official encoders. Warns of what did not fit.

        The attention mask matters: without it, the vectors at padding positions, which Stages B and C
        do attend to, differ by half their size.
        """
        for prompt, ids in zip(prompts, self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"]):
            if len(ids) > self.length:
                # The last token kept is the end mark, so the first one lost is number length - 1. Its place in the
                # prompt tells what was lost in the user's own words; decoded tokens would be lower case.
                places = self.tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
                warnings.warn(f"a prompt is longer than the {self.length} tokens that the text encoder takes; "
                              f"this part was cut off: {prompt[places[self.length - 1][0]:]!r}")
        batch = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        batch = batch.to(self.model.device)
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on a device; infinite where there is no telling."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()           # Linux; "available" counts caches, too
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


PARTS = ("stage_a", "stage_b", "stage_c", "text_encoder_c", "text_encoder_b", "image_encoder")


class Wuerstchen:
    """Text to picture. Load it with Wuerstchen.load, call it with a prompt.

    The parts are plain attributes: stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b (the same
    object where the weights share it) and image_encoder (None where the weights have none). Each may be
    given as a function that loads it, to be called when the part is first needed; with low_memory, all
    other parts are let go just before. size (px) and guidance_b are these weights' own defaults.
    """
    def __init__(self, stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b, image_encoder=None, size: int = 1024,
                 guidance_b: float = 1.0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                 low_memory: bool = False):
        self.sources = dict(zip(PARTS, (stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b, image_encoder)))
        self.loaded = {}
        self.size, self.guidance_b, self.low_memory = size, guidance_b, low_memory
        self.device, self.dtype = torch.device(device), dtype

    def __getattr__(self, name: str):
        """Only called for what is no ordinary attribute: the parts."""
        if name not in PARTS:
            raise AttributeError(f"a Wuerstchen has no {name!r}; its parts are {', '.join(PARTS)}")
        if name not in self.loaded:
            source = self.sources[name]
            if source is None and name != "image_encoder":
                raise ValueError(f"{name} is needed for this, but was not among the parts that were loaded.")
            if self.low_memory:
                self.loaded.clear()
                gc.collect()                                   # transformers' models hold themselves, in circles
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            shared = next((other for other in self.loaded if self.sources[other] is source), None)
            part = self.loaded[shared] if shared else source
            if part is not None and not shared:
                part = part if isinstance(part, (torch.nn.Module, TextEncoder)) else part()
                (part.model if isinstance(part, TextEncoder) else part).to(self.device)
            self.loaded[name] = part
        return self.loaded[name]

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | None = None, dtype: torch.dtype | None = None, *,
             parts: tuple[str, ...] | None = None, offline: bool = False, revision: str | None = None,
             low_memory: bool | None = None, **files) -> "Wuerstchen":
        """weights: "tiny", which ships with the code; "v2", "v2-base", "v2-aesthetic", fetched if need be; or a folder in any
        of diffusers' layouts, or of the original .pt files (see hub.find_parts).

        device: default cuda where there is one, else cpu. dtype of the networks: default float32 on a CPU, bfloat16 on
        a GPU. files: single parts from elsewhere, each a folder or a file: prior, decoder, vqgan, image_encoder,
        prior_text_encoder, text_encoder; the rest then comes from `weights`, by default "v2". parts: what will be needed,
        hub.TEXT_TO_IMAGE (the default) or hub.RECONSTRUCTION; nothing else is fetched. offline, revision: see hub.fetch.
        low_memory: one part in memory at a time; default: if they do not all fit.
        Raises files.WeightsError (a ValueError) for what will not do, ValueError for devices that are not there.
        """
        import hub
        import weights as w
        from files import TensorFile, find_file
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        weights = weights or ("v2" if files else "tiny")
        places = hub.locate(weights, files, parts or hub.TEXT_TO_IMAGE, half=dtype != torch.float32, offline=offline, revision=revision)
        # Before the first number is read: do the files fit the models, and the models each other?
        plans = {part: w.plan(stage, places[part])[0]
                 for part, stage in (("vqgan", w.StageA), ("decoder", w.StageB), ("prior", w.StageC)) if places[part]}
        for part, key, encoder, name in (("prior", "c_cond", "prior_text_encoder", "Stage C"), ("decoder", "c_text", "text_encoder", "Stage B")):
            if part in plans and places[encoder]:
                w.check_widths(plans[part].config[key], places[encoder], name)

        def text_c():
            return TextEncoder(*w.load_text_encoder(places["prior_text_encoder"], places["prior_tokenizer"], dtype))

        def text_b():
            return TextEncoder(*w.load_text_encoder(places["text_encoder"], places["tokenizer"], dtype))

        def image_encoder():
            # In float32: BatchNorm's statistics do not survive half precision.
            place = places["image_encoder"] or hub.fetch("v2", ("image_encoder",), offline=offline, revision=revision)["image_encoder"]
            return w.load_image_encoder(place)

        def source(part: str, load: Callable):
            return load if places[part] else None
        shared = places["text_encoder"] == places["prior_text_encoder"]
        # A small Stage B hesitates between objects; guidance makes it follow the semantic latent more resolutely.
        tiny = places["image_encoder"] and w.is_tiny(places["image_encoder"])
        self = cls(source("vqgan", lambda: w.load_stage_a(places["vqgan"], dtype)),
                   source("decoder", lambda: w.load_stage_b(places["decoder"], dtype)),
                   source("prior", lambda: w.load_stage_c(places["prior"], dtype)),
                   source("prior_text_encoder", text_c), source("text_encoder", text_c if shared else text_b),
                   image_encoder if places["image_encoder"] or weights in hub.NAMES else None,
                   **(dict(size=128, guidance_b=4.0) if tiny else {}), device=device, dtype=dtype)
        if low_memory is None:
            numbers = sum(p.numel() for model in plans.values() for p in model.parameters())
            numbers += sum(math.prod(shape) for place in {places["prior_text_encoder"], places["text_encoder"]} - {None}
                           for shape in TensorFile(find_file(place, ("model", "pytorch_model"))).shapes.values())
            low_memory = 1.25 * numbers * dtype.itemsize > free_memory(device)       # a quarter more, for activations
        self.low_memory = low_memory
        if not low_memory:
            for part in PARTS[:-1]:                                      # what is wrong with a file is said now
                if self.sources[part] is not None:
                    getattr(self, part)
        return self

    @torch.no_grad()
    def __call__(self, prompt: str | list[str], negative_prompt: str | list[str] = "", *, seed: int | list[int] = 0,
                 num_images: int = 1, steps_c: int = 29, steps_b: int = 12, guidance_c: float = 4.0, guidance_b: float | None = None,
                 width: int | None = None, height: int | None = None, progress: bool = False) -> list:
        """Prompts -> a list of PIL images, num_images for each prompt, in order.

        negative_prompt  what guidance steers away from; one for all, or one for each prompt.
        seed             0 to 2^32 - 1. Image i uses seed + i, or the i-th of a list: its noise is drawn on the
                         CPU from its own generator, so it does not depend on the images beside it.
        steps_c, steps_b sampling steps of Stages C and B.
        guidance_c, _b   guidance scales, see `guide`. 1 switches guidance off and halves the work; default of
                         Stage B: 4 for the tiny weights, 1 for others.
        width, height    px, multiples of 128; default 128 for the tiny weights, 1024 for others.
        Raises ValueError for empty prompts, impossible sizes and numbers, lists that do not fit together: all
        of it before the first step; and for pictures that came out as NaN.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("the prompt is empty: say what to paint, for example \"a red apple on a blue background\".")
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each.")
        if num_images < 1:
            raise ValueError(f"the number of images must be at least 1, got {num_images}.")
        guidance_b = self.guidance_b if guidance_b is None else guidance_b
        for name, scale in (("guidance_c", guidance_c), ("guidance_b", guidance_b)):
            if not math.isfinite(scale):
                raise ValueError(f"{name} is {scale}, expected a number: 1 is no guidance, 4 is usual for Stage C.")
        timesteps_c, timesteps_b = default_timesteps_c(steps_c), linear_timesteps(steps_b)
        size_c, size_b = latent_sizes(self.size if height is None else height, self.size if width is None else width)
        n = len(prompts) * num_images
        seeds = [seed + i for i in range(n)] if isinstance(seed, int) else list(seed)
        if len(seeds) != n:
            raise ValueError(f"got {len(seeds)} seeds for {n} images: give one for all, or one for each.")
        if not all(0 <= s < 2 ** 32 for s in seeds):
            # torch takes larger ones, but its generator only looks at 32 bits: 2^32 + 1 would be 1 again.
            raise ValueError(f"seeds must lie between 0 and 2^32 - 1 = {2 ** 32 - 1}, got {min(seeds)} to {max(seeds)}.")
        generators = [torch.Generator().manual_seed(s) for s in seeds]

        def noise(channels: int, size: tuple[int, int]) -> Callable[[], Tensor]:
            return lambda: torch.stack([torch.randn(channels, *size, generator=g) for g in generators]).to(self.device)

        text, unconditional = self.encode_text(self.text_encoder_c, prompts, negatives, num_images)
        semantic = self.sample_c(text, unconditional, noise(self.stage_c.config["c_in"], size_c),
                                 timesteps_c, guidance_c, progress)
        if self.sources["text_encoder_b"] is not self.sources["text_encoder_c"]:
            text, unconditional = self.encode_text(self.text_encoder_b, prompts, negatives, num_images)
        latents = self.sample_b(semantic, text, unconditional, noise(self.stage_b.config["c_in"], size_b),
                                timesteps_b, guidance_b, progress)
        return to_pil(self.decode(latents))

    @torch.no_grad()
    def encode_text(self, encoder: TextEncoder, prompts: list[str], negatives: list[str], num_images: int) -> tuple[Tensor, Tensor]:
        """-> embeddings of the prompts and of the negative prompts, each (len(prompts) * num_images, N, D)."""
        text, unconditional = encoder(prompts + negatives).chunk(2)
        return text.repeat_interleave(num_images, 0), unconditional.repeat_interleave(num_images, 0)

    @torch.no_grad()
    def sample_c(self, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor], timesteps: Tensor,
                 guidance: float = 4.0, progress: bool = False) -> Tensor:
        """Text embeddings (B,N,D) -> raw semantic latents (B,16,h,w) for Stage B. draw() gives noise of that shape."""
        both = torch.cat([text, unconditional]) if guidance != 1 else text

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if guidance == 1:
                return self.stage_c(x, t, both)
            # One pass for both: rows 0..B-1 with the text, rows B..2B-1 without.
            return guide(*self.stage_c(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2), guidance)
        return to_raw(sample(predict, draw, timesteps, progress=self.bar("Stage C", progress)))

    @torch.no_grad()
    def sample_b(self, semantic: Tensor, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor], timesteps: Tensor,
                 guidance: float = 1.0, progress: bool = False) -> Tensor:
        """Raw semantic latents (B,16,h,w) and text embeddings (B,N,D) -> VQGAN latents (B,4,h',w').

        Without condition means: the negative prompt's embedding, and zeros in place of the semantic latent.
        """
        semantic = semantic.to(self.dtype)
        if guidance != 1:
            text, semantic = torch.cat([text, unconditional]), torch.cat([semantic, torch.zeros_like(semantic)])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if guidance == 1:
                return self.stage_b(x, t, semantic, text)
            return guide(*self.stage_b(torch.cat([x, x]), torch.cat([t, t]), semantic, text).chunk(2), guidance)
        return sample(predict, draw, timesteps, progress=self.bar("Stage B", progress))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """VQGAN latents (B,4,h,w) -> images (B,3,4h,4w) float32 in [0, 1]. Raises ValueError for NaN and infinity."""
        stage_a = self.stage_a
        images = stage_a.decode(latents.to(next(stage_a.parameters()).dtype)).float()
        if not images.isfinite().all() and self.dtype == torch.float16:
            # Inside the VQGAN numbers can pass 65504, where float16 ends. It is small: from now on in float32.
            images = stage_a.float().decode(latents.float())
        if not images.isfinite().all():      # in 8 bits it would be a black picture
            raise ValueError(f"the picture came out as NaN or infinity in {self.dtype}. float16 ends at 65504: "
                             f"use bfloat16 or float32, or a lower guidance scale.")
        return images.clamp(0, 1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> raw semantic latents (B,16,h,w): what Stage C would have to paint to get them.

        In float32: the encoder's BatchNorm statistics do not survive half precision.
        Raises ValueError for sides that are not multiples of 128 px, and for weights without image encoder.
        """
        from stage_b import preprocess
        if self.sources["image_encoder"] is None:
            raise ValueError("these weights hold no image encoder, which encoding a picture needs.")
        latent_sizes(*images.shape[-2:])       # for its error message
        return self.image_encoder(preprocess(images.float().to(self.device), min(images.shape[-2:]) * 3 // 4))

    @staticmethod
    def bar(name: str, show: bool) -> Callable[[Iterable], Iterable]:
        if not show:
            return iter
        from tqdm import tqdm
        return lambda steps: tqdm(steps, desc=name, unit="step")


def to_pil(images: Tensor) -> list:
    """images (B,3,H,W) in [0, 1] -> PIL images of 8 bits, rounded (cutting off would darken by half a step)."""
    from PIL import Image
    return [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
