"""Würstchen, put together: the pipeline from text, or from a picture, to pictures.

  caption -CLIP-> (B,77,1280) -[C]-> (B,16,24,24) -[B]-> (B,4,256,256) -[A]-> (B,3,1024,1024)

  from wuerstchen import Wuerstchen
  model = Wuerstchen.load("tiny")
  picture = model("a red apple on a blue background", seed=1)[0]                       # a PIL image
  other = model("a rocket on a blue background", init=picture, strength=0.9)[0]        # image to image

Schedule, samplers and guidance are in diffusion.py, the networks in stage_*.py; here they are called in turn.
Easily missed: Stage C works on (raw + 1) / 42 of what the image encoder gives and Stage B takes: see to_raw.
Of Würstchen v1 two things differ, and are told by the weights: Stage B makes tokens (v1_b: sample_b_v1 in place of
sample_b), and Stage C works on the raw latents (v1_c).
Paper: arXiv:2306.00637.
Needs: torch, numpy, pillow, tqdm; transformers for the text encoders; our other files but the scripts.
"""
import contextlib
import functools
import gc
import json
import math
import warnings
from pathlib import Path
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from v1 import stage_b as stage_b_v1
from diffusion import (SAMPLERS, Guidance, Keep, Noise, add_noise, cut_timesteps, ddim_step, ddpm_step, default_timesteps_c, denoise,
                       linear_timesteps, slerp, timesteps)
from extras.images import cover, feather, fitting_size, read_image, read_mask, to_pil
from extras.previews import apply_linear, fit_linear
from latents import crop, extend, latent_sizes, to_raw, to_stored
from text import TextEncoder, Texts

class Stopped(Exception):
    """A callback has asked to stop."""


# ----- pipeline -------------------------------------------------------------------------------------

def usable_device(name: str | torch.device) -> torch.device:
    """Raises ValueError where torch does not know the name or cannot compute there, before anything is loaded."""
    try:
        torch.ones(1, device=name).tolist()                # "meta" is a device, too, but has no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:        # torch has several for what is not there
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    raise ValueError(f"device {name!r} cannot be used here: {reason}. \"cpu\" always works.")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on a device; infinite where there is no telling."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()           # Linux; "available" counts caches, too
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def network(part: "torch.nn.Module | TextEncoder") -> torch.nn.Module:
    return part.model if isinstance(part, TextEncoder) else part


PARTS = ("stage_a", "stage_b", "stage_c", "text_encoder_c", "text_encoder_b", "image_encoder")
OWN = ("steps_c", "sampler_c", "guidance_c", "steps_b", "sampler_b", "guidance_b", "temperature_b")      # what weights have defaults of their own for


class Wuerstchen:
    """Text to picture. Load it with Wuerstchen.load, call it with a prompt.

    The parts are plain attributes: stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b (the same
    object where the weights share it) and image_encoder (None where the weights have none). Each may be
    given as a function that loads it, to be called when the part is first needed; with low_memory, all
    other parts are let go just before; with offload, they wait in main memory. size (px) and guidance_b are
    these weights' own defaults. v1_c, v1_b: these stages are of Würstchen v1, whose defaults are its notebook's.
    """
    def __init__(self, stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b, image_encoder=None, size: int = 1024,
                 guidance_b: float | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                 low_memory: bool = False, offload: bool = False, compiled: bool = False, preview_file: Path | None = None,
                 v1_c: bool = False, v1_b: bool = False):
        self.sources = dict(zip(PARTS, (stage_a, stage_b, stage_c, text_encoder_c, text_encoder_b, image_encoder)))
        self.loaded, self.configs, self.on_device, self.maps = {}, {}, None, None
        self.size, self.preview_file, self.v1_c, self.v1_b = size, preview_file, v1_c, v1_b
        self.steps_c, self.sampler_c, self.guidance_c = (60, "ddpm", 6.0) if v1_c else (29, "ddpm", 4.0)
        self.steps_b, self.sampler_b, self.guidance_b, self.temperature_b = (8, "multinomial", 2.0, (1.0, 0.6)) if v1_b else (12, "ddpm", 1.0, None)
        self.guidance_b = self.guidance_b if guidance_b is None else guidance_b
        self.low_memory, self.offload, self.compiled = low_memory, offload, compiled
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
                self.on_device = None
                gc.collect()                                   # transformers' models hold themselves, in circles
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
            shared = next((other for other in self.loaded if self.sources[other] is source), None)
            part = self.loaded[shared] if shared else source
            if part is not None and not shared:
                part = part if isinstance(part, (torch.nn.Module, TextEncoder)) else part()
                if not self.offload:
                    network(part).to(self.device)
                if self.compiled and name in ("stage_b", "stage_c"):
                    # At the first call, which then takes a minute. On a GPU the whole network is recorded, and played back as one; not with
                    # --offload, as a recording knows its weights by their addresses, which change when they are moved.
                    part.compile(**dict(mode="reduce-overhead") if self.device.type == "cuda" and not self.offload else {})
            self.loaded[name] = part
        part = self.loaded[name]
        if self.offload and part is not None and part is not self.loaded.get(self.on_device):
            if self.on_device is not None:
                network(self.loaded[self.on_device]).to("cpu")
            network(part).to(self.device)
            self.on_device = name
        return part

    def config(self, name: str) -> dict:
        """The sizes of a stage; known from the files before its numbers are read."""
        return self.configs.get(name) or getattr(self, name).config

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | None = None, dtype: torch.dtype | None = None, *,
             parts: tuple[str, ...] | None = None, offline: bool = False, revision: str | None = None,
             low_memory: bool | None = None, offload: bool = False, compile: bool = False, int8: bool = False,
             lora: dict[str | Path, float] | None = None, **files) -> "Wuerstchen":
        """weights: "tiny" and "tiny-v1", which ship with the code; "v1", "v2", "v2-base", "v2-aesthetic", fetched if need be; or a folder in any
        of diffusers' layouts, or of the original .pt files (see hub.find_parts).

        device: default cuda where there is one, else cpu. dtype of the networks: default float32 on a CPU, bfloat16 on
        a GPU. files: single parts from elsewhere, each a folder or a file: prior, decoder, vqgan, image_encoder,
        prior_text_encoder, text_encoder; the rest then comes from `weights`, by default "v2". parts: what will be needed,
        hub.TEXT_TO_IMAGE (the default) or hub.RECONSTRUCTION; nothing else is fetched. offline, revision: see hub.fetch.
        low_memory: one part in memory at a time, read again when needed; default: if they do not all fit.
        offload: one part on the device at a time, the others wait in main memory. compile: torch.compile for Stages B and C.
        int8: the large layers of Stages B and C in 8 bits, on a CPU: a quarter of their memory, 1.5 to 2 times as fast, nearly the same
        pictures; see int8.py. lora: LoRA files for Stage C and their scales, 1 as trained; see lora.py.
        Raises WeightsError (a ValueError) for what will not do, ValueError for devices that are not there.
        """
        from loading import hub
        from loading import weights as w
        from loading.errors import WeightsError
        from loading.files import TensorFile, find_file
        from speed.int8 import check as int8_check, to_int8
        from lora import bake, load_lora
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if int8:
            if dtype != torch.float32:
                raise ValueError(f"int8 computes in float32 between its products: it does not go with {str(dtype).removeprefix('torch.')}, leave out one of them")
            int8_check([device])
        weights = weights or ("v2" if files else "tiny")
        places = hub.locate(weights, files, parts or hub.TEXT_TO_IMAGE, half=dtype != torch.float32, offline=offline, revision=revision)
        # Before the first number is read: do the files fit the models, and the models each other?
        stage_b = w.stage_b_of(places["decoder"]) if places["decoder"] else w.StageB
        plans = {part: w.build_empty(stage, places[part])[0]
                 for part, stage in (("vqgan", w.StageA), ("decoder", stage_b), ("prior", w.StageC)) if places[part]}
        for part, key, encoder, name in (("prior", "c_cond", "prior_text_encoder", "Stage C"), ("decoder", "c_text", "text_encoder", "Stage B")):
            if part in plans and places[encoder]:
                w.check_widths(plans[part].config[key], places[encoder], name)
        if stage_b is w.StageBV1 and places["vqgan"] and plans["decoder"].codebook_size != plans["vqgan"].config["codebook_size"]:
            raise WeightsError(f"Stage B of v1 makes {plans['decoder'].codebook_size} tokens, the VQGAN {places['vqgan']} has "
                                 f"{plans['vqgan'].config['codebook_size']}: they belong to different weights")

        def text_c():
            return TextEncoder(*w.load_text_encoder(places["prior_text_encoder"], places["prior_tokenizer"], dtype))

        def text_b():
            return TextEncoder(*w.load_text_encoder(places["text_encoder"], places["tokenizer"], dtype))

        loras = ({places["lora"]: 1.0} if places.get("lora") else {}) | (lora or {})

        def stage_c():
            model = w.load_stage_c(places["prior"], dtype, int8 and not loras)
            for i, (file, scale) in enumerate(loras.items()):
                load_lora(model, file, f"lora_{i}", scale)
            if int8 and loras:                   # a LoRA works on float weights: merged first, rounded then
                bake(model)
                to_int8(model)
            return model.eval()

        def image_encoder():
            # In float32: BatchNorm's statistics do not survive half precision.
            place = places["image_encoder"] or hub.fetch("v1" if v1_b else "v2", ("image_encoder",), offline=offline, revision=revision)["image_encoder"]
            return w.load_image_encoder(place)

        def source(part: str, load: Callable):
            return load if places[part] else None
        shared = places["text_encoder"] == places["prior_text_encoder"]
        # A small Stage B hesitates between objects; guidance makes it follow the semantic latent more resolutely.
        tiny = places["image_encoder"] and w.is_tiny(places["image_encoder"])
        v1_b = stage_b is w.StageBV1
        # Only v1 has texts of CLIP-H's width in both stages; a v1 Stage B of one's own may stand on v2's scaled latents.
        v1_c = v1_b and (plans["prior"].config["c_cond"] if "prior" in plans else plans["decoder"].config["c_text"]) == 1024
        own = dict(size=512) if v1_b and not tiny else dict(size=128, guidance_b=None if v1_b else 4.0) if tiny else {}
        self = cls(source("vqgan", lambda: w.load_stage_a(places["vqgan"], dtype)),
                   source("decoder", lambda: (w.load_stage_b_v1 if v1_b else w.load_stage_b)(places["decoder"], dtype, int8)),
                   source("prior", stage_c),
                   source("prior_text_encoder", text_c), source("text_encoder", text_c if shared else text_b),
                   image_encoder if places["image_encoder"] or weights in hub.NAMES else None,
                   **own, v1_c=v1_c, v1_b=v1_b, device=device, dtype=dtype, offload=offload, compiled=compile,
                   preview_file=(hub.own_cache() if weights in hub.NAMES else places["vqgan"].parent) / f"preview{'_v1' * v1_c}.json")
        if files.get("vqgan") or files.get("image_encoder"):
            self.preview_file = None                                     # what is there was fitted to others
        self.places, self.loras, self.configs = places, loras, {
            stage: plans[part].config for part, stage in (("decoder", "stage_b"), ("prior", "stage_c")) if part in plans}
        if low_memory is None and not offload:
            for part in ("decoder", "prior"):
                if int8 and part in plans:
                    to_int8(plans[part])
            needed = sum(tensor.numel() * (1 if tensor.dtype == torch.int8 else dtype.itemsize) for model in plans.values() for tensor in model.state_dict().values())
            needed += sum(math.prod(shape) * dtype.itemsize for place in {places["prior_text_encoder"], places["text_encoder"]} - {None}
                          for shape in TensorFile(find_file(place, ("model", "pytorch_model"))).shapes.values())
            low_memory = 1.25 * needed > free_memory(device)     # a quarter more, for activations
        self.low_memory = bool(low_memory)
        if not self.low_memory:
            for part in PARTS[:-1]:                                      # what is wrong with a file is said now
                if self.sources[part] is not None:
                    getattr(self, part)
        return self

    # ----- the whole way ----------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, negative_prompt: str | list[str] = "", *, seed: int | list[int] = 0,
                 num_images: int = 1, width: int | None = None, height: int | None = None, init=None, strength: float | None = None,
                 mask=None, steps_c=None, t_start_c: float = 1.0, t_end_c: float = 0.0, sampler_c: str | None = None, eta_c: float = 0.0,
                 guidance_c: float | tuple | None = None, interval_c: tuple = (0.0, 1.0), rescale_c: float = 0.0,
                 steps_b=None, t_start_b: float = 1.0, t_end_b: float = 0.0, sampler_b: str | None = None, eta_b: float = 0.0,
                 guidance_b: float | tuple | None = None, interval_b: tuple = (0.0, 1.0), rescale_b: float = 0.0, temperature_b=None,
                 embeddings: dict[str, Tensor] | None = None, semantic: Tensor | None = None, latents_c: Tensor | None = None,
                 latents_b: Tensor | None = None, noise: Callable | None = None, output: str = "pil", tile: int | None = None,
                 callback: Callable | None = None, preview: Callable | None = None, progress: bool = False):
        """Prompts -> a list of PIL images, num_images for each prompt, in order.

        negative_prompt  what guidance steers away from; one for all, or one for each prompt.
        seed             0 to 2^32 - 1. Image i uses seed + i, or the i-th of a list, see Noise.
        width, height    px, any from 64 on; default: the picture in `init`, its shorter side at the weights' own size; else that size.
        init             a picture (see images.read_image): its semantic latent, noised to level `strength`, is where Stage C starts.
                         0 is a reconstruction, 1 keeps nothing; default 0.6, with a mask 1. The prompt may then be left out:
                         variations, default 0.3, as beyond that nothing holds the object.
        mask             a picture, white where `init` is to be painted anew; the rest stays as it is.
        steps_           a number of steps between t_start_ and t_end_, segments such as {2/3: 20, 0.0: 10}, the levels themselves,
                         or "DEFAULT_STAGE_C_TIMESTEPS": see diffusion.timesteps. _c and _b: for Stages C and B.
        sampler_, eta_   "ddpm", "ddim" (its chance: eta), or "dpm++", which needs half as many steps. For v1's Stage B a mode of
                         stage_b_v1.choose, "multinomial", "argmax" or "quant".
        guidance_, interval_, rescale_   see diffusion.Guidance; 1 is no guidance, in half the time.
        temperature_b    of v1's Stage B alone: one number, or those of the first and the last step.
                         Steps, guidance, sampler and temperature have these weights' own defaults, see OWN.
        embeddings       in place of text: any of prompt_c, negative_c, prompt_b, negative_b, each (prompts or 1, N, D).
        semantic         raw semantic latents (images or 1,16,h,w), as output="semantic" gives them: Stage C is not used. With a mask,
                         `init` still says what stays.
        latents_c, _b    what the stages start from, in place of noise: (images or 1,C,h,w).
        noise            where random numbers come from in place of the seeds: noise(C, h, w) -> (images or 1,C,h,w).
        output           "pil"; "np" (images,H,W,3) or "pt" (images,3,H,W) in [0, 1]; "semantic" or "latents_b": what Stage C or B made.
        tile             latents per side of a tile in which Stage A decodes; default: all at once if memory allows.
        callback         callback("C" or "B", step, t, latents) after each step; may return other latents, or False to stop: [] is returned.
        preview          preview("C" or "B", step, images (images,3,h,w)): a rough picture of what it will become, after each step.
        Raises ValueError for what does not fit together, nearly all of it before the first step; and as soon as latents are NaN.
        """
        given = (steps_c, sampler_c, guidance_c, steps_b, sampler_b, guidance_b, temperature_b)
        steps_c, sampler_c, guidance_c, steps_b, sampler_b, guidance_b, temperature_b = (
            getattr(self, name) if value is None else value for name, value in zip(OWN, given))
        how_c = self.how("guidance_c", steps_c, t_start_c, t_end_c, sampler_c, eta_c, guidance_c, interval_c, rescale_c,
                         linear_timesteps if self.v1_c else default_timesteps_c)
        how_b = self.how("guidance_b", steps_b, t_start_b, t_end_b, sampler_b, eta_b, guidance_b, interval_b, rescale_b, linear_timesteps,
                         stage_b_v1.MODES if self.v1_b else SAMPLERS)
        if self.v1_b:
            if mask is not None or latents_b is not None or rescale_b:
                raise ValueError("Stage B of v1 makes tokens, for which mask, latents_b and rescale_b do not exist: leave them away.")
            how_b["temperature"] = stage_b_v1.temperatures(temperature_b, len(how_b["levels"]) - 1)
        elif temperature_b is not None:
            raise ValueError("temperature_b is for v1, whose Stage B makes tokens: leave it away.")
        if output not in ("pil", "np", "pt", "semantic", "latents_b"):
            raise ValueError(f"output is {output!r}, expected \"pil\", \"np\", \"pt\", \"semantic\" or \"latents_b\".")
        if num_images < 1:
            raise ValueError(f"the number of images must be at least 1, got {num_images}.")
        if tile is not None and tile < 1:
            raise ValueError(f"tile is {tile}, expected at least 1 latent per side; 64 need little memory.")
        if semantic is not None and semantic.ndim != 4:
            raise ValueError(f"semantic has shape {tuple(semantic.shape)}, expected (images or 1, 16, h, w).")
        stages = ("c" if semantic is None else "") + ("b" if output != "semantic" else "")
        texts = Texts(self, prompt, negative_prompt, embeddings or {}, num_images, stages, optional=init is not None or semantic is not None)
        n = texts.rows * num_images
        if noise is None:
            seeds = list(seed) if isinstance(seed, Iterable) else [seed + i for i in range(n)]
            if len(seeds) != n:
                raise ValueError(f"got {len(seeds)} seeds for {n} images: give one for all, or one for each.")
            noise = Noise(seeds)
        if init is None and (mask is not None or strength is not None):
            raise ValueError("a mask or a strength needs a picture to start from: give it as init.")
        if latents_c is not None and (init is not None or semantic is not None):
            raise ValueError("latents_c say where Stage C starts, and so do init and semantic: give one of them.")
        init = None if init is None else read_image(init)                                # (3, H0, W0)
        height, width = self.picture_size(height, width, init, semantic)
        size_c, size_b = latent_sizes(height, width)
        known = None
        if init is not None:
            if strength is None:
                strength = 1.0 if mask is not None else 0.3 if texts.silent else 0.6
            how_c["levels"] = cut_timesteps(how_c["levels"], strength)
            known = Known(self, init, mask, height, width)                               # from here on, pictures are encoded

        def checked(name: str, tensor: Tensor, *shape: int) -> Tensor:
            if tuple(tensor.shape[1:]) != shape or len(tensor) not in (1, n):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({n} or 1, {', '.join(map(str, shape))}).")
            tensor = tensor.float()
            if self.device.type == "cuda" and tensor.device.type == "cpu":
                # Travels while the host goes on: so random numbers are there before the GPU has come to them.
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            return tensor.to(self.device).expand(n, *shape)

        def draw(stage: str, size: tuple[int, int]) -> Callable[[], Tensor]:
            channels = self.config(stage).get("c_in", 1)                                 # v1's Stage B: a number per token
            return lambda: checked("what noise() gave", noise(channels, *size), channels, *size)

        # Stage C takes a minute: what is wrong with something for Stage B is said before.
        if semantic is not None:
            semantic = checked("semantic", semantic, self.config("stage_b")["c_semantic"], *size_c)
        if latents_b is not None:
            latents_b = checked("latents_b", latents_b, self.config("stage_b")["c_in"], *size_b)
        told_b = None if output == "semantic" else texts("b")
        try:
            if semantic is None and len(how_c["levels"]) == 1:                           # strength 0: nothing to do for Stage C
                semantic = self.to_raw(known.semantic).expand(n, -1, -1, -1)
            elif semantic is None:
                told_c, draw_c = texts("c"), draw("stage_c", size_c)
                x = draw_c() if latents_c is None else checked("latents_c", latents_c, self.config("stage_c")["c_in"], *size_c)
                keep = None
                if known is not None:                                                    # x (n, 16, h, w)
                    keep, x = known.keep_c(x), known.noised_c(x, how_c["levels"][0])
                semantic = self.sample_c(*told_c, draw_c, x=x, keep=keep, progress=progress, watch=self.watch("C", callback, preview), **how_c)
            if output == "semantic":
                return semantic
            draw_b = draw("stage_b", size_b)
            x = draw_b() if latents_b is None else latents_b                             # (n, 4, h', w')
            sample_b = self.sample_b_v1 if self.v1_b else self.sample_b
            latents = sample_b(semantic, *told_b, draw_b, x=x, keep=known and known.keep_b(x), progress=progress,
                               watch=self.watch("B", callback, preview), **how_b)
        except Stopped:
            return []
        if output == "latents_b":
            return latents
        images = crop(self.decode(latents, tile), height, width)                         # (n, 3, height, width)
        if known is not None:
            images = known.paste(images)
        return {"pil": to_pil, "pt": lambda x: x, "np": lambda x: x.permute(0, 2, 3, 1).cpu().numpy()}[output](images)

    def reconstruct(self, image, prompt: str = "", **options):
        """A picture (see images.read_image) -> what is left of it after the way through the semantic latent and back."""
        return self(prompt, init=image, strength=0.0, **options)

    @torch.no_grad()
    def interpolate(self, a: str | Tensor, b: str | Tensor, frames: int = 8, *, seed: int = 0, to_seed: int | None = None,
                    batch: int = 1, **options) -> list:
        """`frames` PIL images on the way from a to b, two prompts or two semantic latents (1,16,h,w); both ends included.

        What the stages are told, or start from, moves along a sphere (slerp). to_seed: the noise moves, too, from that of
        `seed`. batch: images computed at a time. options: as of __call__.
        """
        if frames < 2:
            raise ValueError(f"the number of frames must be at least 2, got {frames}.")
        if isinstance(a, str) != isinstance(b, str):
            raise ValueError("one end is a prompt and the other a latent: interpolation needs two of a kind.")
        if not isinstance(a, str) and not (a.ndim == 4 and len(a) == 1 and a.shape == b.shape):
            raise ValueError(f"the ends have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected twice the same: (1, 16, h, w).")
        ends = {}
        if isinstance(a, str):
            for stage in ("c", "b"):
                if stage == "c" or self.sources["text_encoder_b"] is not self.sources["text_encoder_c"]:
                    encoder = getattr(self, f"text_encoder_{stage}")
                ends[f"prompt_{stage}"] = self.encode_text(encoder, [a], [b], 1)
        images = []
        for part in torch.linspace(0, 1, frames).split(batch):
            k, first = len(part), Noise([seed] * len(part))
            last = None if to_seed is None else Noise([to_seed] * k)
            moved = {name: slerp(*(end.expand(k, -1, -1) for end in pair), part) for name, pair in ends.items()}
            where = dict(embeddings=moved) if moved else dict(semantic=slerp(a.expand(k, -1, -1, -1), b.expand(k, -1, -1, -1), part))
            painted = self(noise=first if last is None else lambda *shape: slerp(first(*shape), last(*shape), part),
                           **(dict(num_images=k) if not moved else {}), **where, **options)
            images += painted
            if len(painted) < k:                                                         # a callback has stopped it
                break
        return images

    # ----- one after another ------------------------------------------------------------------------

    @staticmethod
    def how(name: str, steps, t_start: float, t_end: float, sampler: str, eta: float, scale, interval, rescale: float, default: Callable,
            samplers: Iterable[str] = SAMPLERS) -> dict:
        """How a stage is to be sampled, checked: arguments for sample_c, sample_b and sample_b_v1."""
        if sampler not in samplers:
            raise ValueError(f"there is no sampler {sampler!r}: expected one of {', '.join(samplers)}.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta:g}, expected a number from 0, no chance, to 1, as much as DDPM.")
        try:
            guidance = Guidance(scale, interval, rescale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        # v1's modes are no functions, and stay names.
        step = SAMPLERS.get(sampler, sampler) if eta == 0 or sampler != "ddim" else lambda *args: ddim_step(*args, eta=eta)
        return dict(levels=timesteps(steps, t_start, t_end, default), step=step, guidance=guidance)

    def picture_size(self, height: int | None, width: int | None, init: Tensor | None, semantic: Tensor | None) -> tuple[int, int]:
        """Fills in what was left open, see __call__, and warns of sizes that the weights were not made for."""
        if init is not None:
            h, w = init.shape[-2:]
            if height is None and width is None:
                height, width = fitting_size(h, w, self.size)
            elif height is None:
                height = round(width * h / w)
            elif width is None:
                width = round(height * w / h)
        elif semantic is not None:
            height, width = (side * 128 // 3 if given is None else given for given, side in zip((height, width), semantic.shape[-2:]))
        height, width = (self.size if given is None else given for given in (height, width))
        latent_sizes(height, width)              # for its error messages
        sides, one_size = sorted((height, width)), self.size in (128, 512)
        trained = f"{self.size} px only" if one_size else "1024 to 1536 px, one side up to 2048"
        if sides != [self.size] * 2 if one_size else not (1024 <= sides[0] <= 1536 and sides[1] <= 2048):
            what = "blurred or crowded" if sides[0] < self.size else "repeated"
            warnings.warn(f"{width} x {height} px is not what these weights were trained on ({trained}): expect {what} objects")
        return height, width

    def watch(self, stage: str, callback: Callable | None, preview: Callable | None) -> Callable | None:
        """callback and preview as `denoise` wants them."""
        if callback is None and preview is None:
            return None
        maps = self.preview_maps() if preview is not None else {}

        def watch(i: int, t: float, x: Tensor, x_0: Tensor) -> Tensor | None:
            if stage in maps:
                preview(stage, i, apply_linear(x_0.cpu(), maps[stage]))
            answer = callback(stage, i, t, x) if callback is not None else None
            if answer is False:
                raise Stopped
            if answer is not None and not (isinstance(answer, Tensor) and answer.shape == x.shape and answer.isfinite().all()):
                raise ValueError(f"a callback may return None, False, or finite latents of shape {tuple(x.shape)}, not {answer!r:.80}.")
            return answer
        return watch

    @torch.no_grad()
    def encode_text(self, encoder: TextEncoder, prompts: list[str], negatives: list[str], num_images: int) -> tuple[Tensor, Tensor]:
        """-> embeddings of the prompts and of the negative prompts, each (len(prompts) * num_images, N, D).

        Each text once and by itself, so that its numbers do not depend on the texts beside it.
        """
        encoded = {text: encoder([text]) for text in dict.fromkeys(prompts + negatives)}                 # (1, N, D) each
        return tuple(torch.cat([encoded[text] for text in texts]).repeat_interleave(num_images, 0) for texts in (prompts, negatives))

    @torch.no_grad()
    def sample_c(self, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor], levels: Tensor, step: Callable = ddpm_step,
                 guidance: Guidance = Guidance(4.0), x: Tensor | None = None, keep: Callable | None = None,
                 watch: Callable | None = None, progress: bool = False) -> Tensor:
        """Text embeddings (B,N,D) -> raw semantic latents (B,16,h,w) for Stage B.

        draw() gives noise of that shape; x: the start, default noise. The rest: see diffusion.denoise.
        """
        # What does not depend on the noise level, once for all steps.
        told = functools.cache(lambda both: self.stage_c.prepare(torch.cat([text, unconditional]) if both else text))

        def predict(x: Tensor, t: Tensor, both: bool) -> Tensor:
            x = x.to(self.dtype)
            # One pass for both: rows 0..B-1 with the text, rows B..2B-1 without.
            return self.stage_c(torch.cat([x, x]), torch.cat([t, t]), told(True)) if both else self.stage_c(x, t, told(False))
        with self.said_clearly("Stage C"):
            return self.to_raw(denoise(predict, draw() if x is None else x, draw, levels, step, guidance, keep, watch,
                                       self.bar("Stage C", progress)))

    @torch.no_grad()
    def sample_b(self, semantic: Tensor, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor], levels: Tensor,
                 step: Callable = ddpm_step, guidance: Guidance = Guidance(1.0), x: Tensor | None = None, keep: Callable | None = None,
                 watch: Callable | None = None, progress: bool = False) -> Tensor:
        """Raw semantic latents (B,16,h,w) and text embeddings (B,N,D) -> VQGAN latents (B,4,h',w'). The rest: as for sample_c.

        Without condition means: the negative prompt's embedding, and zeros in place of the semantic latent.
        """
        semantic = semantic.to(self.dtype)
        both_texts, both_semantic = torch.cat([text, unconditional]), torch.cat([semantic, torch.zeros_like(semantic)])

        @functools.cache
        def told(size: tuple[int, int], both: bool) -> list:
            """What does not depend on the noise level, once for all steps."""
            return self.stage_b.prepare(size, *((both_semantic, both_texts) if both else (semantic, text)), shares=not self.low_memory)

        def predict(x: Tensor, t: Tensor, both: bool) -> Tensor:
            x, prepared = x.to(self.dtype), told(tuple(x.shape[2:]), both)
            return self.stage_b(torch.cat([x, x]), torch.cat([t, t]), prepared) if both else self.stage_b(x, t, prepared)
        with self.said_clearly("Stage B"):
            return denoise(predict, draw() if x is None else x, draw, levels, step, guidance, keep, watch, self.bar("Stage B", progress))

    @torch.no_grad()
    def sample_b_v1(self, semantic: Tensor, text: Tensor, unconditional: Tensor, draw: Callable[[], Tensor], levels: Tensor, step: str,
                    guidance: Guidance, temperature: list[float], x: Tensor, keep: None = None, watch: Callable | None = None,
                    progress: bool = False) -> Tensor:
        """As sample_b, with the tokens of v1: chosen in mode `step`, then looked up in Stage A's codebook.

        Random numbers are uniform here, by the normal distribution's integral, so that draw() is the same for both.
        """
        stage_a, semantic = self.stage_a, semantic.to(self.dtype)
        codes, scale_factor = stage_a.codebook.codes.detach(), stage_a.scale_factor
        both_texts, both_semantic = torch.cat([text, unconditional]), torch.cat([semantic, torch.zeros_like(semantic)])
        told = functools.cache(lambda both: self.stage_b.prepare(*((both_semantic, both_texts) if both else (semantic, text))))

        def uniform(x: Tensor | None = None) -> Tensor:
            return torch.special.ndtr(draw() if x is None else x)[:, 0]                  # (B, h', w')

        def predict(tokens: Tensor, t: Tensor, both: bool) -> Tensor:
            return (self.stage_b(torch.cat([tokens, tokens]), torch.cat([t, t]), told(True)) if both else self.stage_b(tokens, t, told(False))).float()

        def to_latents(tokens: Tensor) -> Tensor:
            return F.embedding(tokens, codes).permute(0, 3, 1, 2) / scale_factor         # (B, 4, h', w')

        def watch_tokens(i: int, t: float, tokens: Tensor) -> Tensor | None:
            changed = watch(i, t, tokens, to_latents(tokens).float())
            if changed is not None and not (changed.dtype == torch.int64 and 0 <= changed.min() and changed.max() < len(codes)):
                raise ValueError(f"a callback may return tokens for v1's Stage B, whole numbers from 0 to {len(codes) - 1}.")
            return changed
        noise = (uniform(x) * len(codes)).long().clamp(max=len(codes) - 1)               # (B, h', w')
        with self.said_clearly("Stage B"):
            return to_latents(stage_b_v1.sample(
                predict, noise, uniform, levels, temperature, [guidance.at(t) for t in levels[:-1].tolist()], [step] * len(temperature),
                codes=codes, watch=watch and watch_tokens, progress=self.bar("Stage B", progress)))

    def to_raw(self, stored: Tensor) -> Tensor:
        """What Stage C makes -> what Stage B takes."""
        return stored if self.v1_c else to_raw(stored)

    def to_stored(self, raw: Tensor) -> Tensor:
        """What the image encoder gives -> what Stage C works on."""
        return raw if self.v1_c else to_stored(raw)

    @contextlib.contextmanager
    def said_clearly(self, stage: str):
        try:
            yield
        except FloatingPointError as error:
            raise ValueError(f"{stage} came to NaN or infinity in {error}, computing in {self.dtype}: "
                             f"use bfloat16 or float32, or a lower guidance scale.") from None

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """VQGAN latents (B,4,h,w) -> images (B,3,4h,4w) float32 in [0, 1], one at a time, in tiles if memory is short.

        Raises ValueError for NaN and infinity.
        """
        return torch.cat([self.decode_one(row, tile) for row in latents.split(1)])

    def decode_one(self, latents: Tensor, tile: int | None) -> Tensor:
        stage_a = self.stage_a
        dtype = next(stage_a.parameters()).dtype
        # Measured on a CPU, official size: 22 to 30 numbers per channel and latent at the peak, fewer the larger the picture.
        needed = 24 * stage_a.config["c_hidden"] * latents[0, 0].numel() * dtype.itemsize
        if tile is None and needed > 0.8 * free_memory(self.device):
            tile = 64

        def decoded(dtype: torch.dtype) -> Tensor:
            z = latents.to(dtype)
            return (stage_a.decode_tiled(z, tile) if tile else stage_a.decode(z)).float()
        images = decoded(dtype)
        if not images.isfinite().all() and self.dtype == torch.float16:
            # Inside the VQGAN numbers can pass 65504, where float16 ends. It is small: from now on in float32.
            stage_a.float()
            images = decoded(torch.float32)
        if not images.isfinite().all():      # in 8 bits it would be a black picture
            raise ValueError(f"the picture came out as NaN or infinity in {self.dtype}. float16 ends at 65504: "
                             f"use bfloat16 or float32, or a lower guidance scale.")
        return images.clamp(0, 1)

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1], sides multiples of 4 -> latents (B,4,H/4,W/4) float32, what Stage B would have to paint."""
        if self.dtype == torch.float16:
            self.stage_a.float()             # see decode_one
        return self.stage_a.encode(images.to(self.device, next(self.stage_a.parameters()).dtype)).float()

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> raw semantic latents (B,16,h,w): what Stage C would have to paint to get them.

        In float32: the encoder's BatchNorm statistics do not survive half precision. h and w: see latent_sizes; the
        picture, extended to Stage B's grid, is resized to 32 px for each of their positions, 0.75 of its size or nearly.
        Raises ValueError for sides below 64 px, and for weights without image encoder.
        """
        from stage_b import preprocess
        if self.sources["image_encoder"] is None:
            raise ValueError("these weights hold no image encoder, which encoding a picture needs.")
        (h, w), (h_b, w_b) = latent_sizes(*images.shape[-2:])
        images = torch.stack([extend(image, 4 * h_b, 4 * w_b) for image in images.float().to(self.device)])
        return self.image_encoder(preprocess(images, (32 * h, 32 * w)))

    @torch.no_grad()
    def preview_maps(self) -> dict[str, Tensor]:
        """"C": (17,3), "B": (5,3): for each stage, from a latent vector and a 1 to the colour of its place.

        Fitted once, on smooth pictures of random colours, and kept beside the weights. "C" only with an image encoder.
        """
        if self.maps is None and self.preview_file is not None and self.preview_file.is_file():
            maps = json.loads(self.preview_file.read_text())
            self.maps = {stage: torch.tensor(matrix) for stage, matrix in maps.items()}
        if self.maps is None:
            colours = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
            self.fit_preview(F.interpolate(colours, size=(self.size, self.size), mode="bicubic").clamp(0, 1))
        return self.maps

    @torch.no_grad()
    def fit_preview(self, images: Tensor) -> dict[str, Tensor]:
        """images (N,3,H,W) in [0, 1] -> maps as preview_maps gives them, written to preview_file."""
        from loading.files import write_atomically
        latents = torch.cat([self.encode_latents(image[None]).cpu() for image in images])
        maps = {"B": fit_linear(latents, images)}
        if self.sources["image_encoder"] is not None:
            maps["C"] = fit_linear(torch.cat([self.to_stored(self.encode_image(image[None])).cpu() for image in images]), images)
        if self.preview_file is not None:
            text = json.dumps({stage: [[round(v, 5) for v in row] for row in matrix.tolist()] for stage, matrix in maps.items()})
            with contextlib.suppress(OSError):                   # read-only weights: fitted again next time
                write_atomically(self.preview_file, lambda path: path.write_text(text + "\n"))
        self.maps = maps
        return maps

    @staticmethod
    def bar(name: str, show: bool) -> Callable[[Iterable], Iterable]:
        if not show:
            return iter
        from tqdm import tqdm
        return lambda steps: tqdm(steps, desc=name, unit="step")


class Known:
    """A picture to start from, and what of it stays: for image to image and inpainting."""
    def __init__(self, model: "Wuerstchen", image: Tensor, mask, height: int, width: int):
        """image (3,H,W) is resized and cropped to cover height x width; mask: see images.read_mask, resized like it."""
        self.image = cover(image, height, width).to(model.device)                        # (3, height, width)
        (h, w), (h_b, w_b) = latent_sizes(height, width)
        self.semantic = model.to_stored(model.encode_image(self.image[None]))            # (1, 16, h, w)
        self.mask = None
        if mask is None:
            return
        mask = read_mask(mask)                                                           # (H0, W0)
        if mask.shape != image.shape[-2:]:
            raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} px, its picture {image.shape[2]} x {image.shape[1]}: they must be the same.")
        self.mask = cover(mask[None], height, width, nearest=True)[0].to(model.device)   # (height, width)
        canvas = extend(self.mask[None], 4 * h_b, 4 * w_b)
        # A latent that has any part in the mask is made anew.
        self.mask_c, self.mask_b = (F.adaptive_max_pool2d(canvas, size)[None].bool() for size in ((h, w), (h_b, w_b)))
        self.latents = model.encode_latents(extend(self.image, 4 * h_b, 4 * w_b)[None])  # (1, 4, h_b, w_b)

    def noised_c(self, eps: Tensor, t: Tensor) -> Tensor:
        """Where Stage C starts: (n,16,h,w) noise -> the picture's semantic latent at noise level t."""
        return eps if t == 1 else add_noise(self.semantic.expand_as(eps), eps, t.to(eps.device).expand(len(eps)))

    def keep_c(self, eps: Tensor) -> Keep | None:
        return None if self.mask is None else Keep(self.semantic.expand_as(eps), self.mask_c, eps)

    def keep_b(self, eps: Tensor) -> Keep | None:
        return None if self.mask is None else Keep(self.latents.expand_as(eps), self.mask_b, eps)

    def paste(self, images: Tensor) -> Tensor:
        """The known pixels over the painted ones, with a soft edge inside the mask: outside it nothing changes."""
        if self.mask is None:
            return images
        return torch.lerp(self.image.expand_as(images), images, feather(self.mask, min(images.shape[-2:]) // 64))
