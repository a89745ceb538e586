"""Draws docs/breaks/: what the small model generates after one mistake each. docs/WHAT_BREAKS.md says which, and why.

  python notebooks/what_breaks.py

Each mistake is made from outside, on a pipeline or its input, so none of it is in our files.
Needs: torch, pillow; the rest of the repository.
"""
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import wuerstchen  # noqa: E402
from extras.editing import encode_latents, generate  # noqa: E402
from extras.images import grid  # noqa: E402
from training.samples import to_tensor  # noqa: E402
from training.scenes import EmojiScenes  # noqa: E402
from wuerstchen import Wuerstchen, scale_semantic, to_pil  # noqa: E402

PROMPTS = ["a cat left of a red apple on a blue background", "an owl above a guitar on an orange background",
           "a frog on a yellow background"]


def older_schedule(t, s=0.008):
    """DDPM's schedule of 1000 steps, where the model was trained with a cosine."""
    ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)
    return ab[(t * 999).long()].clamp(1e-4, 1 - 1e-4)


def semantic(model):
    """Raw semantic latents (3, 16, 3, 3), as they should be."""
    return generate(model, PROMPTS, seed=[1, 2, 3], output="semantic")


def from_semantic(model, raw):
    return generate(model, PROMPTS, seed=[1, 2, 3], given={"semantic": raw})


def text(model, change):
    """Images whose text embeddings for Stage C went through `change`."""
    embeddings = change(model.part("text_encoder_c")(PROMPTS))
    return generate(model, PROMPTS, seed=[1, 2, 3], given={"prompt_c": embeddings})


def half_loaded(model):
    """Stage C as load_state_dict(strict=False) leaves it if half of the names do not match."""
    torch.manual_seed(0)
    fresh = type(model.part("stage_c"))(**model.part("stage_c").config).eval()
    state = model.part("stage_c").state_dict()
    fresh.load_state_dict({name: value for name, value in state.items() if "blocks.3" not in name}, strict=False)
    with mock.patch.dict(model.networks, stage_c=fresh):
        return generate(model, PROMPTS, seed=[1, 2, 3])


def with_schedule(model):
    with mock.patch.object(wuerstchen, "alphas_cumprod", older_schedule):
        return generate(model, PROMPTS, seed=[1, 2, 3])


def without_factor(model):
    latents = generate(model, PROMPTS, seed=[1, 2, 3], output="latents_b")
    return to_pil(model.decode(latents / model.part("stage_a").scale_factor))


def range_of_images(model):
    """Stage A, there and back, with images in [-1, 1] instead of [0, 1]."""
    images = to_tensor(EmojiScenes("captioned", seed=8).batch(0, 3)[0])
    return to_pil(model.decode(encode_latents(model, images * 2 - 1)))


BREAKS = {
    "right": lambda model: generate(model, PROMPTS, seed=[1, 2, 3]),
    "schedule": with_schedule,
    "semantic_not_unscaled": lambda model: from_semantic(model, scale_semantic(semantic(model))),
    "factor_forgotten": without_factor,
    "zeros_for_empty_prompt": lambda model: generate(model, PROMPTS, seed=[1, 2, 3],
                                                     given={"negative_c": torch.zeros(1, 20, 128)}),
    "text_cut": lambda model: text(model, lambda embeddings: embeddings * (torch.arange(20) < 10)[:, None]),
    "half_loaded": half_loaded,
    "image_range": range_of_images}


@torch.no_grad()
def draw(name: str, model: Wuerstchen):
    """-> a row of three images, 128 px each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return grid(BREAKS[name](model), 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = ROOT / "docs" / "breaks"
    folder.mkdir(exist_ok=True)
    pipeline = Wuerstchen.load("tiny", fast=False)
    for name in BREAKS:
        draw(name, pipeline).save(folder / f"{name}.png", optimize=True)
        print(folder / f"{name}.png")
