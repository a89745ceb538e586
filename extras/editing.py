"""Generates images from more than a prompt: from images, masks, embeddings and latents, with a loaded model.

  generate(model, "a cat", edit=InitImage("apple.png", strength=0.9))             # image to image
  generate(model, "a rose", edit=InitImage("apple.png", mask="mask.png"))         # inpainting: white is new content
  generate(model, edit=InitImage("apple.png"))                                    # variations: no prompt
  generate(model, given={"prompt_c": a, "prompt_b": b})                           # embeddings instead of text
  reconstruct(model, "photo.png");  interpolate(model, "a dog", "a cat", frames=12)

`generate` is Wuerstchen.__call__ with more kinds of input and output. It calls the same methods: encode_text, sample_c,
sample_b, decode. images.py reads the images; its function enlarge returns the image and the mask for outpainting.
Needs: torch; wuerstchen.py, stage_b.py (preprocess), images.py.
"""
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.images import cover, feather, fitting_size, read_image, read_pair
from loading.arguments import checked, random_seed, tensor_of, texts_of, warn_of_size
from loading.errors import warn
from loading.options import BATCH, FRAMES, IMAGES, SEED, SIDE, plain
from stage_b import preprocess
from wuerstchen import Noise, Sampling, Wuerstchen, add_noise, crop, latent_sizes, per_row, to_pil

EMBEDDINGS = ("prompt_c", "negative_c", "prompt_b", "negative_b")
LATENTS = ("semantic", "latents_c", "latents_b")
FORMATS = {"pil": to_pil, "np": lambda images: images.permute(0, 2, 3, 1).cpu().numpy(), "pt": lambda images: images}
OUTPUTS = (*FORMATS, "semantic", "latents_b")
LONGEST = 4                      # by default, an edited image's longer side is at most 4 times its shorter side


class Stopped(Exception):
    """Raised when a callback returns False, to stop the generation."""


@dataclass(frozen=True)
class InitImage:
    """An image to start from. image, mask: anything that images.read_image takes, both of the same size.

    strength   the noise level to which the image's semantic latents are noised, and at which Stage C starts: 0
               reconstructs the image, 1 keeps nothing of it. Default: 1 with a mask; otherwise 0.6 with a prompt, and
               0.3 without a prompt, because at higher levels the image's object is lost
    mask       white, or transparent, where new content is generated; elsewhere the image is kept
    Source of image to image: SDEdit, arXiv:2108.01073.
    """
    image: Any
    strength: float | None = None
    mask: Any = None

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Returns two values: the image (3,H,W), and the mask (H,W) or, if there is no mask, None."""
        return (read_image(self.image), None) if self.mask is None else read_pair(self.image, self.mask)

    def strength_for(self, silent: bool) -> float:
        """Returns the strength or, if it is None, its default. silent: whether there is no prompt."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.mask is not None else 0.3 if silent else 0.6


# ----- generation ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model: Wuerstchen, prompt: str | list[str] | None = None, negative_prompt: str | list[str] = "", *,
             seed: int | list[int] | Callable = 0, num_images: int = 1, width: int | None = None,
             height: int | None = None, edit: InitImage | None = None, given: dict[str, Tensor] | None = None,
             output: str = "pil", callback: Callable | None = None, progress: bool = False, **sampling):
    """Generates images like Wuerstchen.__call__. These arguments are new, or accept more values:

    prompt         may be omitted if `edit` or `given` specify the image
    seed           as in __call__, a list of seeds, or a function seed(C, h, w) -> noise (n or 1,C,h,w) for n images.
                   With given["semantic"], Stage C's noise is drawn and discarded, unless seed is a function. So
                   Stages C and B in two calls with the same seed generate the same image as in one call
    edit           an InitImage: the image to start from or to change
    width, height  in px. Default: derived from `edit` or given["semantic"], see image_size; else the weights' size
    given          {name: tensor}. prompt_c, negative_c, prompt_b, negative_b: embeddings (prompts or 1,N,D) instead of
                   text. semantic: raw latents (n or 1,16,h,w), as from output="semantic"; Stage C is then skipped.
                   latents_c, latents_b: start of Stages C and B (n or 1,C,h,w) instead of noise
    output         "pil"; "np" (n,H,W,3) or "pt" (n,3,H,W) in [0, 1]; "semantic" or "latents_b": latents of Stage C or B
    callback       may also return False, which stops the generation: the result is then []
    Raises ValueError for arguments that do not fit together, in most cases before the first step.
    """
    c, b = model.settings(sampling)
    given, num_images = check_arguments(model, given, edit, output), IMAGES.check("num_images", num_images)
    embeddings = {name: tensor for name, tensor in given.items() if name in EMBEDDINGS}
    semantic, latents_c, latents_b = (given.get(name) for name in LATENTS)
    stages = ("c" if semantic is None else "") + ("b" if output != "semantic" else "")
    optional = edit is not None or semantic is not None
    texts = PromptBatch(model, prompt, negative_prompt, embeddings, num_images, stages, optional)
    n = texts.rows * num_images
    image, mask = (None, None) if edit is None else edit.read()                            # (3, H0, W0), (H0, W0)
    height, width = image_size(model, height, width, image, semantic)
    size_c, size_b = latent_sizes(height, width)
    shape_c, shape_b = (model.channels_c, *size_c), (model.channels_b, *size_b)
    known = None if edit is None else KnownImage(model, image, mask, height, width)
    levels = c.levels if known is None else cut_levels(c.levels, edit.strength_for(texts.silent))
    if len(levels) > 1:
        c = replace(c, steps=levels)
    elif semantic is None:                                                                 # strength 0: skip Stage C
        semantic = model.unscale_semantic(known.semantic)
    skipped = [shape_c] * len(levels) * ("semantic" in given and len(levels) > 1)          # shapes of Stage C's noise
    draw_c, draw_b = draws_from(seed, n, model.device, skipped, shape_c, shape_b)
    # Stage C may take a minute, so the inputs of Stage B are checked before it.
    fit = functools.partial(fitting, n, model.device)
    semantic = None if semantic is None else fit("semantic", semantic, (16, *size_c))
    latents_b = None if latents_b is None else fit("latents_b", latents_b, shape_b)
    text_b = None if output == "semantic" else texts("b")
    options = dict(callback=checked(callback, "None, False,", Stopped()), progress=progress)
    try:
        if semantic is None:
            text_c, x = texts("c"), draw_c() if latents_c is None else fit("latents_c", latents_c, shape_c)
            keep, x = (None, x) if known is None else (known.keep_c(x), known.start_c(x, c.levels[0]))
            semantic = model.sample_c(*text_c, draw_c, c, x=x, keep=keep, **options)       # (n, 16, h, w)
        if output == "semantic":
            return semantic
        x = draw_b() if latents_b is None else latents_b                                   # (n, 4, h', w')
        latents = model.sample_b(semantic, *text_b, draw_b, b, x=x, keep=known and known.keep_b(x), **options)
    except Stopped:
        return []
    if output == "latents_b":
        return latents
    images = crop(model.decode(latents), height, width)                                    # (n, 3, height, width)
    return FORMATS[output](images if known is None else known.paste(images))


def reconstruct(model: Wuerstchen, image, prompt: str = "", **options):
    """Encodes an image to semantic latents and decodes these with Stages B and A. Returns what `generate` returns."""
    return generate(model, prompt, edit=InitImage(image, 0.0), **options)


@torch.no_grad()
def interpolate(model: Wuerstchen, a: str | Tensor, b: str | Tensor, frames: int = 8, *, seed: int | None = 0,
                to_seed: int | None = None, batch: int = 1, **options) -> list:
    """Returns `frames` PIL images from a to b, both ends included. a, b: prompts, or semantic latents (1,16,h,w).

    The prompts' embeddings, or the latents, are interpolated along a sphere (slerp). to_seed: if given, the noise is
    interpolated from that of `seed` to that of `to_seed`. batch: images computed at a time. options: for `generate`."""
    frames, batch = FRAMES.check("frames", frames), BATCH.check("batch", batch)
    seed = random_seed() if seed is None else SEED.check("seed", seed)
    to_seed = None if to_seed is None else SEED.check("to_seed", to_seed)
    if isinstance(a, str) != isinstance(b, str):
        raise ValueError("one end is a prompt and the other a latent: interpolation needs two of a kind.")
    if not isinstance(a, str):
        a, b = tensor_of("a", a).float(), tensor_of("b", b).float()
    if not isinstance(a, str) and not (a.ndim == 4 and len(a) == 1 and a.shape == b.shape):
        raise ValueError(f"the ends have shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                         f"expected twice the same: (1, 16, h, w).")
    ends = {"semantic": (a, b)} if not isinstance(a, str) else {
        f"prompt_{stage}": model.encode_text(stage, [a], [b]) for stage in "cb"}
    images, given = [], check_given(options.pop("given", None), options.get("edit"))
    for part in torch.linspace(0, 1, frames).split(batch):
        k = len(part)
        moved = {name: slerp(*(end.expand(k, *end.shape[1:]) for end in pair), part) for name, pair in ends.items()}
        count = dict(num_images=k) if "semantic" in moved else {}
        done = generate(model, seed=FrameNoise(seed, to_seed, part), given=given | moved, **count, **options)
        images += done
        if len(done) < k:                                                                  # a callback returned False
            break
    return images


# ----- arguments -----------------------------------------------------------------------------------------------------

def check_arguments(model: Wuerstchen, given: dict | None, edit: InitImage | None, output: str) -> dict[str, Tensor]:
    """Returns `given` with values converted to tensors. Raises ValueError for arguments of `generate` that conflict."""
    given = check_given(given, edit)
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, expected one of {', '.join(OUTPUTS)}.")
    if not isinstance(model.b, Sampling) and ("latents_b" in given or edit is not None and edit.mask is not None):
        raise ValueError("Stage B of v1 generates tokens: there are neither masks nor latents_b for it, remove them.")
    return given


def check_given(given: dict | None, edit: InitImage | None) -> dict[str, Tensor]:
    """Does the checks of check_arguments that need no model. Returns `given` with values converted to tensors."""
    if not isinstance(given, dict | None) or not isinstance(edit, InitImage | None):
        raise TypeError(f"got given {given!r:.80} and edit {edit!r:.80}, expected {{\"semantic\": tensor}} with any of "
                        f"{', '.join(EMBEDDINGS + LATENTS)}, and InitImage(image, strength, mask).")
    if unknown := [name for name in given or {} if name not in EMBEDDINGS + LATENTS]:
        raise ValueError(f"{unknown[0]} cannot be given: expected some of {', '.join(EMBEDDINGS + LATENTS)}.")
    given = {name: tensor_of(name, value) for name, value in (given or {}).items() if value is not None}
    for name, tensor in given.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity, expected finite numbers.")
    if "semantic" in given and given["semantic"].ndim != 4:
        raise ValueError(f"semantic has shape {tuple(given['semantic'].shape)}, expected (images or 1, 16, h, w).")
    if "latents_c" in given and (edit is not None or "semantic" in given):
        raise ValueError("latents_c specify where Stage C starts, and so do an image and semantic: give one of them.")
    return given


def prompt_lists(prompt, negative, optional: bool) -> tuple[list[str], list[str]]:
    """Returns two lists of equal length: prompts and negative prompts. prompt, negative: a text or a list of texts.
    Raises ValueError if the lengths do not match, or if a prompt is empty and prompts are not `optional`."""
    prompts, negatives = texts_of("prompt", prompt), texts_of("negative_prompt", negative) or [""]
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    if not prompts or not all(isinstance(p, str) and (optional or p.strip()) for p in prompts):
        raise ValueError("the prompt is empty: describe the image, "
                         "for example \"a red apple on a blue background\".")
    if not all(isinstance(negative, str) for negative in negatives):
        raise ValueError(f"got negative prompts {negatives!r:.80}, expected texts.")
    if len(negatives) != len(prompts):
        raise ValueError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts: "
                         f"give one for all, or one for each.")
    return prompts, negatives


def seed_list(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """Returns n seeds. seed: a list of n seeds, or the first of n consecutive seeds; None: a random first seed. Raises
    TypeError for values of other types, and ValueError for another number of seeds."""
    seed = random_seed() if seed is None else plain(seed)
    expected = f"seed is {seed!r:.80}, expected a whole number, one for each image, a function or None."
    if not isinstance(seed, Integral | Iterable) or isinstance(seed, str):
        raise TypeError(expected)
    seeds = [seed + i for i in range(n)] if isinstance(seed, Integral) else [plain(one) for one in seed]
    if any(isinstance(one, str) for one in seeds):
        raise TypeError(expected)
    if len(seeds) != n:
        raise ValueError(f"got {len(seeds)} seeds for {n} images: give one for all, or one for each.")
    return seeds


def draws_from(seed, n: int, device: torch.device, skipped: list[tuple], *shapes: tuple) -> list[Callable]:
    """Returns a list with a function for each shape in `shapes`, which draws noise (n, *shape). seed: see `generate`.
    skipped: shapes of the noise of steps that do not run. It is drawn and discarded, so that later steps have the same
    noise as in a full run. If seed is a user's function, it is not drawn."""
    noise = seed if callable(seed) else Noise(seed_list(seed, n), device)
    for shape in skipped if noise is not seed or isinstance(seed, FrameNoise) else ():
        noise(*shape)
    return [lambda shape=shape: fitting(n, device, "what the source of noise returned", noise(*shape), shape)
            for shape in shapes]


def rows(n: int) -> str:
    """Returns a text for error messages: the number of rows that a tensor for n images may have, such as "4 or 1"."""
    return "1" if n == 1 else f"{n} or 1"


def fitting(n: int, device: torch.device, name: str, tensor: Tensor, shape: tuple) -> Tensor:
    """Expands `tensor` (n or 1, *shape) to (n, *shape), float32 on the device. Raises ValueError for other shapes."""
    tensor = tensor_of(name, tensor)
    if tuple(tensor.shape[1:]) != shape or len(tensor) not in (1, n):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({rows(n)}, {', '.join(map(str, shape))}).")
    return tensor.float().to(device).expand(n, *shape)


def image_size(model: Wuerstchen, height: int | None, width: int | None, image: Tensor | None,
               semantic: Tensor | None) -> tuple[int, int]:
    """Returns (height, width) of the images to generate. With an `image`, a side that is None follows from the other
    side and the image's aspect ratio, up to 4 : 1; if both are None, the shorter side is model.size. Without an image,
    a side that is None follows from `semantic` (n,16,h,w) or else is model.size. Warns of untrained sizes."""
    height, width = (None if side is None else SIDE.check(name, side)
                     for name, side in (("height", height), ("width", width)))
    if image is not None:
        h, w = image.shape[-2:]
        if (height is None or width is None) and max(h, w) > LONGEST * min(h, w):
            warn(f"the image has {w} x {h} px, a shape beyond {LONGEST} : 1: only its middle is used, "
                 f"cut to {LONGEST} : 1; width and height together override this")
            h, w = min(h, LONGEST * w), min(w, LONGEST * h)
        if height is None and width is None:
            height, width = fitting_size(h, w, model.size)
        height, width = both_sides(height, width, image)
    elif semantic is not None:
        height, width = (side * 128 // 3 if given is None else given
                         for given, side in zip((height, width), semantic.shape[-2:]))
    height, width = (model.size if side is None else side for side in (height, width))
    latent_sizes(height, width)                                           # raises ValueError for impossible sizes
    warn_of_size(height, width, model.size)
    return height, width


def both_sides(height: int | None, width: int | None, image: Tensor) -> tuple[int, int]:
    """Returns (height, width). If one is None, computes it from the other and the image's aspect ratio, up to 4 : 1."""
    h, w = image.shape[-2:]
    h, w = min(h, LONGEST * w), min(w, LONGEST * h)
    return round(width * h / w) if height is None else height, round(height * w / h) if width is None else width


class PromptBatch:
    """Embeds prompts. After texts = PromptBatch(...), texts("c") returns the embeddings of prompts and of negative
    prompts for Stage C, each (images,N,D); texts("b") returns those for Stage B. embeddings: {"prompt_c": tensor, ...},
    used instead of text. stages: the stages that will run, "c", "b" or "cb". optional: whether prompts may be empty.
    rows: the number of prompts. silent: whether there is no prompt, neither as text nor as embeddings."""
    def __init__(self, model: Wuerstchen, prompt, negative, embeddings: dict[str, Tensor], num_images: int, stages: str,
                 optional: bool):
        self.model, self.num_images, self.embeddings = model, num_images, dict(embeddings)
        networks = model.networks
        if networks.get("text_encoder_c") is networks.get("text_encoder_b"):    # the stages share a text encoder
            for name in ("prompt", "negative"):
                if f"{name}_c" in embeddings:
                    self.embeddings.setdefault(f"{name}_b", embeddings[f"{name}_c"])
        if prompt is None:
            missing = [f"prompt_{stage}" for stage in stages if f"prompt_{stage}" not in self.embeddings]
            if missing and {"prompt_c", "prompt_b"} & set(self.embeddings):
                raise ValueError(f"there is no {missing[0]} among the embeddings, and no prompt to make it from: "
                                 f"give one of them.")
            prompt = [""] * max([len(e) for e in self.embeddings.values()], default=1)
            optional = optional or not missing
        self.prompts, self.negatives = prompt_lists(prompt, negative, optional)
        self.rows = len(self.prompts)
        self.silent = not any(p.strip() for p in self.prompts) and not {"prompt_c", "prompt_b"} & set(self.embeddings)
        for name, embedding in self.embeddings.items():
            if embedding.ndim != 3 or len(embedding) not in (1, self.rows):
                raise ValueError(f"embeddings {name} have shape {tuple(embedding.shape)}, "
                                 f"expected ({rows(self.rows)}, tokens, width).")
            self.check_width(name, embedding)

    def check_width(self, name: str, embedding: Tensor) -> None:
        stage, key = ("stage_c", "c_cond") if name.endswith("_c") else ("stage_b", "c_text")
        # A stage may be a function that loads its network. If it has no config, the width is not checked here.
        config = getattr(self.model.networks.get(stage), "config", None)
        if config is not None and embedding.shape[2] != config[key]:
            raise ValueError(f"embeddings {name} have shape {tuple(embedding.shape)}, "
                             f"expected ({rows(self.rows)}, tokens, {config[key]}).")

    def __call__(self, stage: str) -> tuple[Tensor, Tensor]:
        names = (f"prompt_{stage}", f"negative_{stage}")
        encoded = (None, None)
        if not all(name in self.embeddings for name in names):
            encoded = self.model.encode_text(stage, self.prompts, self.negatives)
        pair = [self.embeddings.get(name, e) for name, e in zip(names, encoded)]
        if pair[0].shape[1:] != pair[1].shape[1:]:
            raise ValueError(f"embeddings of {names[0]} and {names[1]} differ in shape, {tuple(pair[0].shape)} and "
                             f"{tuple(pair[1].shape)}: they must come from the same encoder.")
        return tuple(e.to(self.model.device, self.model.dtype).expand(self.rows, -1, -1)
                     .repeat_interleave(self.num_images, 0) for e in pair)


# ----- images as input -----------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_latents(model: Wuerstchen, images: Tensor) -> Tensor:
    """Encodes images (n,3,H,W) with values from 0 to 1 to latents (n,4,H/4,W/4) float32 of the VQGAN."""
    stage_a = model.part("stage_a")
    return stage_a.encode(images.to(model.device, next(stage_a.parameters()).dtype)).float()


@torch.no_grad()
def encode_image(model: Wuerstchen, images: Tensor) -> Tensor:
    """Encodes images (n,3,H,W) with values from 0 to 1 to raw (unscaled) semantic latents (n,16,h,w) float32.

    The images are extended to the size that Stage B generates, then resized to about 3/4, so that each latent position
    covers 32 x 32 px. Raises ValueError for sides below 64 px, and if the model has no image encoder.
    """
    encoder = model.part("image_encoder")
    (h, w), (h_b, w_b) = latent_sizes(*images.shape[-2:])
    images = extend(images.float().to(model.device), 4 * h_b, 4 * w_b)
    return encoder(preprocess(images, (32 * h, 32 * w)))


def extend(images: Tensor, height: int, width: int) -> Tensor:
    """Enlarges images to (n,C,height,width) by repeating the pixels at the edges. wuerstchen.crop undoes this."""
    top, left = (height - images.shape[-2]) // 2, (width - images.shape[-1]) // 2
    right, bottom = width - images.shape[-1] - left, height - images.shape[-2] - top
    return F.pad(images, (left, right, top, bottom), mode="replicate")


def cut_levels(levels: Tensor, strength: float) -> Tensor:
    """Cuts a schedule of n + 1 noise levels for image to image, so that it starts at noise level `strength`. Returns
    m + 1 levels, m <= n. If strength is 0 or below the schedule's last level, returns one level: no steps."""
    strength = plain(strength)
    if not isinstance(strength, Real) or not 0 <= strength <= 1:
        shown = f"{strength:g}" if isinstance(strength, Real) else f"{strength!r:.80}"
        raise ValueError(f"strength is {shown}, expected a number from 0, nothing changes, to 1, nothing is kept.")
    start = max(min(strength, levels[0].item()), levels[-1].item())
    return torch.cat([levels.new_tensor([start]), levels[levels < start - 1e-6]])


class KnownImage:
    """An encoded InitImage: Stage C starts from it and, with a mask, both stages keep a part of it (inpainting)."""
    def __init__(self, model: Wuerstchen, image: Tensor, mask: Tensor | None, height: int, width: int):
        """Resizes and crops image (3,H,W) and mask (H,W), see InitImage.read, to height x width, and encodes them."""
        self.image = cover(image, height, width).to(model.device)                          # (3, height, width)
        (h, w), (h_b, w_b) = latent_sizes(height, width)
        self.semantic = model.scale_semantic(encode_image(model, self.image[None]))                 # (1, 16, h, w)
        self.mask = None
        if mask is None:
            return
        self.mask = cover(mask[None], height, width, nearest=True)[0].to(model.device)     # (height, width)
        canvas = extend(self.mask[None, None], 4 * h_b, 4 * w_b)
        # A latent position becomes new content if any of its pixels is in the mask.
        self.mask_c, self.mask_b = (F.adaptive_max_pool2d(canvas, size).bool() for size in ((h, w), (h_b, w_b)))
        self.latents = encode_latents(model, extend(self.image[None], 4 * h_b, 4 * w_b))   # (1, 4, h_b, w_b)

    def start_c(self, eps: Tensor, t: Tensor) -> Tensor:
        """Returns the first x_t of Stage C (n,16,h,w): the image's semantic latents with noise eps of level t."""
        return eps if t == 1 else add_noise(self.semantic.expand_as(eps), eps, t.to(eps.device).expand(len(eps)))

    def keep_c(self, eps: Tensor) -> "InpaintMask | None":
        return None if self.mask is None else InpaintMask(self.semantic.expand_as(eps), self.mask_c, eps)

    def keep_b(self, eps: Tensor) -> "InpaintMask | None":
        return None if self.mask is None else InpaintMask(self.latents.expand_as(eps), self.mask_b, eps)

    def paste(self, images: Tensor) -> Tensor:
        """Returns `images` with the known image outside the mask. Inside the mask, blends both along the edge."""
        if self.mask is None:
            return images
        return torch.lerp(self.image.expand_as(images), images, feather(self.mask, min(images.shape[-2:]) // 64))


class InpaintMask:
    """For inpainting: in each step, replaces the known part of x_t by the known latents with noise of level t.

    known: x_0 (B,...). mask: broadcast over x_0, True where new content goes. eps: the noise of the known part, used at
    every step, so that this part moves to x_0 along one path, as multistep samplers (dpm++) require.
    Source: RePaint, arXiv:2201.09865, without its resampling."""
    def __init__(self, known: Tensor, mask: Tensor, eps: Tensor):
        self.known, self.mask, self.eps = known, mask, eps

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        known = torch.where(per_row(t == 0, x_t), self.known, add_noise(self.known, self.eps, t))
        return torch.where(self.mask, x_t, known)


class FrameNoise:
    """Draws noise for n frames, interpolated at f (n,) from the noise of `seed` (f = 0) to the noise of `to_seed`
    (f = 1). If to_seed is None, all frames get the noise of `seed`."""
    def __init__(self, seed: int, to_seed: int | None, f: Tensor):
        self.f, self.ends = f, [Noise([end] * len(f)) for end in (seed, to_seed) if end is not None]

    def __call__(self, *shape: int) -> Tensor:
        ends = [noise(*shape) for noise in self.ends]                                      # (n, *shape) each
        return slerp(*ends, self.f) if len(ends) == 2 else ends[0]


def slerp(a: Tensor, b: Tensor, f: float | Tensor) -> Tensor:
    """Interpolates each row along a sphere, from a (B,...) at f = 0 to b (B,...) at f = 1. f: a number or (B,).

    Halfway, a linear interpolation of two noise tensors would have variance 1/2, but the network expects 1.
    Source: Shoemake 1985, "Animating rotation with quaternion curves"."""
    f = per_row(torch.as_tensor(f, dtype=a.dtype, device=a.device).expand(len(a)), a)
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).view_as(f).clamp(-1, 1)
    angle = cosine.arccos()
    straight = angle.sin() < 1e-4                            # a and b are parallel: interpolate linearly
    angle = angle.where(~straight, 1)
    arc = ((1 - f) * angle).sin() / angle.sin() * a + (f * angle).sin() / angle.sin() * b
    return torch.where(straight, torch.lerp(a, b, f), arc)
