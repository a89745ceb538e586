"""Schedule, steps, guidance and the whole way from prompt to image.

References are in golden/, made by the authors' code and by diffusers (see golden/README.md). A number of
tests pin down what other implementations get wrong; their docstrings say what happens there.
"""
import json
import math
import shutil
import subprocess
import sys
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loading import hub
from loading import weights
from tools.weights import convert
import loading.pipeline
import wuerstchen
from helpers import COMBINED, GOLDEN, PUBLISHED, golden, rel
from stage_b import TinyImageEncoder
from extras.editing import encode_image, generate, warn_of_size
from loading.pipeline import usable_device
from wuerstchen import (Noise, Sampling, Wuerstchen, crop, latent_sizes, scale_semantic, to_pil, unscale_semantic)

# The golden pipelines are small ones that carry no word of it: 128 px are far from the official sizes.
pytestmark = pytest.mark.filterwarnings("ignore:.*not what these weights were trained on")

LAYOUTS = {"combined": COMBINED, "published": PUBLISHED}
RUNS = ["pipeline_two_prompts", "pipeline_wide_decoder_cfg", "pipeline_two_images_no_cfg"]
CAT, HOUSE = "a photo of a cat", "the old red house by the lake"
QUICK = dict(steps_c=4, steps_b=2, width=128, height=128)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Wuerstchen]:
    """With the plain networks, whose calls can be recorded. tests/test_fast.py compares them with the fast forms."""
    return {name: Wuerstchen.load(folder, "cpu", fast=False) for name, folder in LAYOUTS.items()}


@pytest.fixture(scope="module")
def pipe(pipes) -> Wuerstchen:
    """Random weights: its images show nothing, but every part of it is at work."""
    return pipes["combined"]


@pytest.fixture(scope="module")
def schedule() -> dict[str, Tensor]:
    return golden("scheduler")[0]


def draws(first: Tensor, others: Tensor):
    """A `draw` that gives recorded noise, and fails where more is drawn than was recorded."""
    noise = iter([first, *others])
    return lambda: next(noise)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a, b) -> bool:
    return np.array_equal(pixels(a), pixels(b))


def alike(a, b) -> bool:
    """Another batch size may add up in another order: 2 of 255 levels are allowed for that."""
    return np.abs(pixels(a) - pixels(b)).max() <= 2


class Recorder:
    """Forward hook that keeps the positional inputs of each call."""
    def __init__(self, module: torch.nn.Module):
        self.calls = []
        self.hook = module.register_forward_pre_hook(lambda module, args, kwargs: self.calls.append((args, kwargs)),
                                                     with_kwargs=True)

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self.hook.remove()


def bound(monkeypatch, pipe: Wuerstchen, method: str) -> list[tuple]:
    """The conditions of each bind_c or bind_b, where a network meets what is the same at all steps."""
    calls, bind = [], getattr(pipe, method)
    monkeypatch.setattr(pipe, method, lambda *args: calls.append(args) or bind(*args))
    return calls


# --- latents and sizes -------------------------------------------------------------------------------

def test_the_latent_scale_is_undone_exactly_once():
    """Stage C sees (raw + 1) / 42, Stage B raw: in the authors' repository the factor moved from one file to another,
    and older weights would be scaled wrongly."""
    raw = torch.randn(2, 16, 3, 3) * 42
    torch.testing.assert_close(unscale_semantic(scale_semantic(raw)), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale_semantic(torch.tensor([-1.0, 41.0])), torch.tensor([0.0, 1.0]))


def test_multiples_of_128_get_the_published_latent_sizes():
    sizes = json.loads((GOLDEN / "image_sizes.json").read_text())
    assert sizes["by_pixels_columns"] == ["requested", "prior_latent", "stage_b_latent", "image_side", "stage_b_runs"]
    for requested, c, b, image, runs in sizes["by_pixels_multiples_of_8"]:
        if requested % 128 == 0:
            assert latent_sizes(requested, 128) == ((c, 3), (b, 32))
            assert latent_sizes(128, requested) == ((3, c), (32, b))
            assert image == requested and runs


def test_every_size_gets_the_next_grids_that_cover_it():
    """Elsewhere 1000 px become 1024 in silence, and 720 or 1080 px end in a shape error deep inside Stage B."""
    assert latent_sizes(1000, 1080) == ((24, 26), (256, 272)) and latent_sizes(64, 65) == ((2, 2), (16, 32))
    for side in range(64, 2049):
        (c, _), (b, _) = latent_sizes(side, side)
        assert 0 <= c * 128 / 3 - side < 128 / 3 and 0 <= 4 * b - side < 64 and b % 16 == 0


@pytest.mark.parametrize("side", [63, 0, -128, 128.0, "128"])
def test_sizes_that_are_none_are_refused(pipe, side):
    for name, size in (("height", (side, 128)), ("width", (128, side))):
        with pytest.raises(ValueError, match=f"^{name} is {side!r}, expected a whole number of px from 64 to 16384"):
            latent_sizes(*size)


@pytest.mark.parametrize("width, height", [(64, 64), (100, 77), (129, 255), (200, 64), (720, 128)])
def test_images_have_exactly_the_size_that_was_asked_for(pipe, width, height):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, = pipe(CAT, **QUICK | dict(width=width, height=height))
    assert image.size == (width, height)


def test_what_is_rendered_beyond_the_image_is_cropped_on_both_sides(pipe):
    """100 x 77 px are the middle of the 128 x 128 that Stage B renders. Stage C's grid, 3 x 2, differs from that of 128
    x 128."""
    semantic, latents = torch.randn(1, 16, 2, 3), torch.randn(1, 4, 32, 32)
    options = dict(given=dict(semantic=semantic, latents_b=latents), steps_b=2, width=100, height=77)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = generate(pipe, CAT, output="pt", **options)
        whole = pipe.decode(generate(pipe, CAT, output="latents_b", **options))
    assert whole.shape[-2:] == (128, 128) and torch.equal(small, whole[..., 25:102, 14:114])


def test_sizes_the_weights_were_not_made_for_are_a_warning(pipe):
    """As errors they would forbid what sometimes works; in silence they look like a bad model."""
    for size, expected in (((1024, 1024), None), ((2048, 1536), None), ((1024, 2048), None),
                           ((512, 512), "blurred or crowded"),
                           ((2048, 2048), "repeated"), ((1024, 3000), "repeated")):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            warn_of_size(*size, pipe.size)
        assert [expected in str(w.message) and "1024 to 1536 px" in str(w.message)
                for w in record] == [True] * (expected is not None)


# --- text --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["prior", "decoder"])
def test_text_embeddings_equal_the_published_pipelines(pipes, layout, side):
    """Six prompts, empty, odd, and too long. Ids and the mask of padding as well: without the mask, which one of the
    other trainers forgets, embeddings differ by half their size at the padding, where the stages do look."""
    data, _ = golden("pipeline_text")
    with safe_open(GOLDEN / "pipeline_text.safetensors", "pt") as file:
        texts = json.loads(file.metadata()["texts"])
    encoder = pipes[layout].part("text_encoder_c" if side == "prior" else "text_encoder_b")
    with Recorder(encoder.model) as calls, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        embeddings = encoder(texts)
    (ids, mask), _ = calls[0]
    assert torch.equal(ids, data[f"text/{side}/input_ids"].long())
    assert torch.equal(mask, data[f"text/{side}/attention_mask"].long())
    assert rel(embeddings, data[f"text/{side}/last_hidden_state"]) < 1e-5


def test_what_does_not_fit_is_named_in_the_users_own_words(pipe):
    """Elsewhere a long prompt is cut silently, or is an error from the depths of the text encoder."""
    prompt = "the old red house by the lake at night, the old red house by the Lake at NIGHT — naïve"
    with pytest.warns(UserWarning, match="longer than the 20 tokens") as record:
        pipe.encode_text("c", [prompt], [""])
    assert str(record[0].message).endswith("this part was cut off: 'NIGHT — naïve'")
    with pytest.warns(UserWarning), torch.no_grad():
        whole = pipe.part("text_encoder_c")([prompt])
    assert torch.equal(whole, pipe.part("text_encoder_c")([prompt.removesuffix("NIGHT — naïve")]))


def test_prompts_that_fit_bring_no_warning(pipe):
    """18 words of one token each, a start and an end mark: exactly 20."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode_text("c", ["the old red house by the lake at night the old red house by the lake at night"],
                         [""])


# --- whole pipelines against the published ones ------------------------------------------------------

def reference_run(name: str):
    """Recorded numbers and our arguments: prompts, negatives, images per prompt, timesteps and guidance of both
    stages."""
    data, run = golden(name)
    prompts = [run["prompt"]] if isinstance(run["prompt"], str) else run["prompt"]
    negatives = run.get("negative_prompt", "")
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
    early = run.get("prior_timesteps") == "default"
    # Without guidance, diffusers' decoder has scale 0; in our convention, and in its prior's, that is 1.
    guidance_b = run["decoder_guidance_scale"] or 1.0
    prompts, negatives = ([text for text in texts for _ in range(run.get("num_images_per_prompt", 1))]
                          for texts in (prompts, negatives))
    return data, run["seed"], (prompts, negatives), \
        Sampling(29 if early else run["prior_num_inference_steps"], guidance=run["prior_guidance_scale"],
                 early=early), \
        Sampling(run["num_inference_steps"], guidance=guidance_b)


def run_through(pipe: Wuerstchen, text, stage_c, stage_b, draw_c, draw_b):
    semantic = pipe.sample_c(*pipe.encode_text("c", *text), draw_c, stage_c)
    latents = pipe.sample_b(semantic, *pipe.encode_text("b", *text), draw_b, stage_b)
    return semantic, latents, pipe.decode(latents)


def assert_as_published(data: dict, semantic: Tensor, latents: Tensor, images: Tensor):
    assert rel(semantic, data["out/image_embeddings"]) < 1e-4
    assert rel(latents, data["out/decoder_latents"]) < 1e-4
    if "out/image" in data:
        torch.testing.assert_close(images, data["out/image"], rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(images[..., ::4, ::4], data["out/image_every_4th"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_images_equal_those_of_the_published_pipelines(pipes, layout, name):
    """Two prompts at once, guidance in both stages, a wide image, two images of a prompt: from text to pixels, with
    the noise that was recorded there. Two prompts at once are an error in diffusers' Stage B: the reference made them
    one by one."""
    data, _, text, stage_c, stage_b = reference_run(name)
    pipe = pipes[layout]
    with Recorder(pipe.part("stage_c")) as calls:
        results = run_through(pipe, text, stage_c, stage_b, draws(data["in/prior_latents"], data["in/prior_noises"]),
                              draws(data["in/decoder_latents"], data["in/decoder_noises"]))
    assert_as_published(data, *results)
    # And step by step: what step i + 1 is given is what step i made.
    for i, ((x, *_), _) in enumerate(calls[1:]):
        assert rel(x[:len(results[0])], data["out/prior_steps"][i]) < 1e-4, f"step {i}"


@pytest.mark.parametrize("name", ["pipeline_wide_decoder_cfg", "pipeline_two_images_no_cfg"])
def test_a_seed_draws_the_noise_that_it_draws_in_the_published_pipelines(pipe, name):
    """One generator for everything: start and steps of Stage C, then those of Stage B, the unused last noise
    included."""
    data, seed, text, stage_c, stage_b = reference_run(name)
    generator = torch.Generator().manual_seed(seed)
    results = run_through(pipe, text, stage_c, stage_b,
                          lambda: torch.randn(data["in/prior_latents"].shape, generator=generator),
                          lambda: torch.randn(data["in/decoder_latents"].shape, generator=generator))
    assert_as_published(data, *results)


def test_one_call_gives_the_image_that_the_published_pipelines_give_for_its_seed(pipe):
    """For a single image our generators and theirs are the same. That run has evenly spaced steps in Stage C."""
    data, seed, (prompts, negatives), stage_c, stage_b = reference_run(RUNS[1])
    image, = pipe(prompts[0], negatives[0], seed=seed, steps_c=stage_c.levels, steps_b=stage_b.steps,
                  guidance_c=stage_c.guidance, guidance_b=stage_b.guidance, height=128, width=256)
    reference, = to_pil(data["out/image"])
    assert image.size == (256, 128) and np.abs(pixels(image) - pixels(reference)).max() <= 1


# --- one call: prompts, seeds, batches ---------------------------------------------------------------

def test_the_same_seed_gives_the_same_image_and_another_seed_another(pipe):
    torch.manual_seed(1)
    first, = pipe(CAT, seed=5, **QUICK)
    torch.manual_seed(2)          # the global generator has no say
    second, other = pipe(CAT, seed=5, **QUICK)[0], pipe(CAT, seed=6, **QUICK)[0]
    assert same(first, second) and not alike(first, other)


def test_num_images_are_different_images_with_consecutive_seeds(pipe, monkeypatch):
    """Elsewhere all images of a prompt share one result of Stage C, and differ in detail only."""
    conditions = bound(monkeypatch, pipe, "bind_b")
    images = pipe(CAT, seed=5, num_images=3, **QUICK)
    semantic, _ = conditions[0]                                                          # (3, 16, 3, 3)
    assert len(images) == 3 and all(rel(a, b) > 0.1 for a, b in pairwise(semantic))
    for i, image in enumerate(images):
        assert alike(image, pipe(CAT, seed=5 + i, **QUICK)[0])


def test_an_image_does_not_depend_on_its_neighbours(pipe):
    """To the bit where the batch is of the same size, whoever is in it; at guidance 4, with conditional and
    unconditional rows in one batch. One of the other samplers rescales by a standard deviation over the whole batch."""
    a = generate(pipe, [CAT, HOUSE], ["blurry", ""], seed=[5, 6], **QUICK)
    b = generate(pipe, [CAT, "An astronaut"], ["blurry", "the moon"], seed=[5, 77], **QUICK)
    assert same(a[0], b[0]) and not alike(a[1], b[1])
    assert alike(a[0], pipe(CAT, "blurry", seed=5, **QUICK)[0])


def test_several_images_of_several_prompts(pipe):
    """In order, each as if generated alone. diffusers' Stage B pairs such embeddings wrongly and ends in a shape
    error."""
    images = generate(pipe, [CAT, HOUSE], num_images=2, seed=[5, 6, 7, 8], guidance_b=1.5, **QUICK)
    assert len(images) == 4
    for image, prompt, seed in zip(images, [CAT, CAT, HOUSE, HOUSE], [5, 6, 7, 8]):
        assert alike(image, pipe(prompt, seed=seed, guidance_b=1.5, **QUICK)[0])


def test_one_negative_prompt_serves_all_prompts(pipe):
    """In diffusers a string does not go with a list of prompts."""
    one, each = (generate(pipe, [CAT, HOUSE], negative, seed=5, **QUICK)
                 for negative in ("blurry", ["blurry", "blurry"]))
    assert all(map(same, one, each))
    assert not same(one[0], pipe([CAT, HOUSE], seed=5, **QUICK)[0])


# --- guidance ----------------------------------------------------------------------------------------

def test_unconditional_is_the_encoding_of_the_empty_prompt(pipe, monkeypatch):
    """Not zeros, which the authors' sampler takes if told nothing: the networks never saw them. For Stage B, whose
    semantic latent was dropped in training, zeros in its place are right."""
    bound_c, bound_b = bound(monkeypatch, pipe, "bind_c"), bound(monkeypatch, pipe, "bind_b")
    with Recorder(pipe.part("stage_c")) as calls_c, Recorder(pipe.part("stage_b")) as calls_b, torch.no_grad():
        pipe(CAT, seed=5, guidance_c=4, guidance_b=1.5, **QUICK)
        empty_c, empty_b = pipe.part("text_encoder_c")([""]), pipe.part("text_encoder_b")([""])
    assert len(bound_c) == len(bound_b) == 1               # not at every step
    for args, _ in (*calls_c, *calls_b):
        assert len(args[0]) == len(args[1]) == 2
    assert rel(bound_c[0][0][1:], empty_c) < 1e-5
    semantic, text = bound_b[0]
    assert rel(text[1:], empty_b) < 1e-5 and semantic[0].abs().sum() > 0 and semantic[1].abs().sum() == 0


def test_guidance_1_is_plain_sampling_at_half_the_work(pipe):
    with Recorder(pipe.part("stage_c")) as calls_c, Recorder(pipe.part("stage_b")) as calls_b:
        plain = pipe(CAT, "blurry", seed=5, guidance_c=1, guidance_b=1, **QUICK)
    assert {len(args[0]) for args, _ in calls_c + calls_b} == {1}
    assert same(plain[0], pipe(CAT, "the moon", seed=5, guidance_c=1, guidance_b=1, **QUICK)[0])


def test_guidance_below_1_is_used(pipe):
    """diffusers takes every scale up to 1 for "off"; as a lerp, 0.5 is halfway and 0 does not know the prompt."""
    half, plain = (pipe(CAT, seed=5, guidance_c=scale, **QUICK)[0] for scale in (0.5, 1))
    assert not alike(half, plain)
    no_text = dict(seed=5, guidance_c=0, guidance_b=0, **QUICK)
    assert same(pipe(CAT, **no_text)[0], pipe(HOUSE, **no_text)[0])


# --- half precision ----------------------------------------------------------------------------------

def test_in_half_precision_the_networks_get_exact_noise_levels():
    """bfloat16 has no number between 0.98 and 0.984: rounded like that, t = 2/3 would be another step's level. And the
    image must have a value everywhere."""
    pipe = Wuerstchen.load(COMBINED, "cpu", torch.bfloat16, fast=False)
    with Recorder(pipe.part("stage_c")) as calls:
        image, = pipe(CAT, seed=5, **QUICK)
    levels = torch.stack([args[1][0] for args, _ in calls])
    # The noisy latents stay in float32: rounded, they would be most of the error of eps = (x_t - a) / b.
    assert {(args[0].dtype, args[2].dtype) for args, _ in calls} == {(torch.float32, torch.bfloat16)}
    assert image.size == (128, 128)
    assert torch.equal(levels, Sampling(4, early=True).levels[:-1])


def test_overflow_is_an_error_and_not_a_black_image(pipe):
    """NaN in 8 bits is 0."""
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinity in torch.float32: check weights"):
            pipe.decode(torch.full((1, 4, 32, 32), value))


def test_the_vqgan_stays_in_float32_where_float16_would_end():
    """Numbers beyond 65504 inside the VQGAN: an image as in float32, not the black one of published half-precision
    pipelines."""
    pipe = Wuerstchen.load(COMBINED, "cpu", torch.float16)
    stage_a, latents = pipe.part("stage_a"), 100 * torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        stage_a.from_latent.weight *= 4096                # large inside, ordinary outside
        stage_a.to_pixels.weight /= 4096
        image, expected = pipe.decode(latents), stage_a.decode(latents).clamp(0, 1)
        half = stage_a.half().decode(latents.half())
    assert not half.isfinite().all()
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert image.std() > 0.1


def test_8_bits_are_rounded():
    """Cutting off, as one implementation does, darkens by half a level."""
    levels = torch.arange(256).float().repeat(3, 1)[None, :, None] / 255                 # (1, 3, 1, 256)
    for shift in (0, 0.49 / 255, -0.49 / 255):
        assert np.array_equal(np.asarray(to_pil((levels + shift).clamp(0, 1))[0])[0, :, 0], np.arange(256))


# --- parts from elsewhere ----------------------------------------------------------------------------

def test_single_parts_in_any_naming_are_mixed_freely(tmp_path):
    """Stage C as the authors' .pt, Stage B in our own names, the rest from the folder: the same image."""
    tiny = Path(wuerstchen.__file__).parent / "models" / "tiny"
    for part, name, naming in (("prior", "prior.pt", "original"), ("decoder", "decoder.safetensors", "ours")):
        convert(tiny / part, tmp_path / part / name, naming)
        shutil.copy(tiny / part / "config.json", tmp_path / part)          # without it: the official sizes
    mixed = Wuerstchen.load("tiny", "cpu", prior=tmp_path / "prior/prior.pt",
                            decoder=tmp_path / "decoder/decoder.safetensors")
    assert same(mixed(CAT, seed=5, **QUICK)[0], Wuerstchen.load("tiny", "cpu")(CAT, seed=5, **QUICK)[0])


# --- memory ------------------------------------------------------------------------------------------

def test_low_memory_holds_one_part_at_a_time(pipe, monkeypatch):
    """Each part is gone before the next is loaded, and the image is the same."""
    alive, found = weakref.WeakSet(), []

    def counting(load):
        def counted(*args, **options):
            found.append(len(alive))
            loaded = load(*args, **options)
            alive.add(loaded)
            return loaded
        return counted
    for name in ("load_text_encoder", "load"):
        monkeypatch.setattr(weights, name, counting(getattr(weights, name)))
    frugal = Wuerstchen.load(COMBINED, "cpu", low_memory=True, fast=False)
    assert found == []                                             # nothing yet: only names and shapes were looked at
    assert same(frugal(CAT, seed=5, **QUICK)[0], pipe(CAT, seed=5, **QUICK)[0])
    assert found == [0, 0, 0, 0, 0]                                # text encoder, C, text encoder, B, A


@pytest.mark.parametrize("free, low", [(0, True), (math.inf, False)])
def test_low_memory_is_the_default_where_not_all_fits(free, low, monkeypatch):
    monkeypatch.setattr(loading.pipeline, "free_memory", lambda device: free)
    assert Wuerstchen.load("tiny", "cpu").low_memory is low
    assert Wuerstchen.load("tiny", "cpu", low_memory=not low).low_memory is not low


def test_parts_that_were_not_loaded_are_named():
    model = Wuerstchen.load("tiny", "cpu", parts=hub.RECONSTRUCTION)
    latent = encode_image(model, torch.rand(1, 3, 128, 128))
    text, _ = model.encode_text("b", [CAT], [""])
    latents = model.sample_b(latent, text, text, lambda: torch.randn(1, 4, 32, 32), Sampling(2))
    assert model.decode(latents).shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="stage_c is needed for this, but was not loaded"):
        model.part("stage_c")


# --- mistakes ----------------------------------------------------------------------------------------

MISTAKES = [
    (dict(prompt=""), "the prompt is empty"),
    (dict(prompt="  \n"), "the prompt is empty"),
    (dict(prompt=[CAT, ""]), "the prompt is empty"),
    (dict(prompt=[]), "the prompt is empty"),
    (dict(prompt=None), "the prompt is empty"),
    (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts: give one for all, or one for each"),
    (dict(num_images=0), "num_images is 0, expected a whole number from 1 to 10000"),
    (dict(steps_c=0), "Stage C: steps is 0, expected at least 1"),
    (dict(steps_b=0), "Stage B: steps is 0, expected at least 1"),
    (dict(guidance_c=math.nan), "Stage C: guidance is nan"),
    (dict(guidance_b=math.inf), "Stage B: guidance is inf"),
    (dict(seed=[1, 2]), "2 seeds for 1 images: give one for all, or one for each"),
    (dict(seed=-1), "seeds must lie between 0 and"),
    (dict(seed=2 ** 32), "seeds must lie between 0 and"),
    (dict(seed=2 ** 32 - 1, num_images=2), "seeds must lie between 0 and"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES,
                         ids=[" ".join(map(str, a)) + f" {i}" for i, (a, _) in enumerate(MISTAKES)])
def test_mistakes_are_found_before_the_first_step(pipe, arguments, message):
    """Stage C takes a minute with the released weights: a mistake about Stage B must not wait for it."""
    with Recorder(pipe.part("stage_c")) as calls, pytest.raises(ValueError, match=message):
        generate(pipe, **dict(prompt=CAT, **QUICK) | arguments)
    assert not calls


def test_seeds_beyond_32_bits_would_repeat_others():
    """The reason why they are refused."""
    def numbers(seed):
        return torch.randn(8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(numbers(1), numbers(1 + 2 ** 32))


@pytest.mark.parametrize("device", ["gpu", "", "meta"] + ([] if torch.cuda.is_available() else ["cuda", "cuda:7"]))
def test_devices_that_are_not_there_are_one_clear_line(device):
    with pytest.raises(ValueError, match="cannot be used here: .*\"cpu\" always works") as error:
        usable_device(device)
    assert "\n" not in str(error.value)


# --- the object --------------------------------------------------------------------------------------

def test_loading_shares_what_the_weights_share_and_keeps_float32_on_a_cpu(pipe):
    """1024 px where the weights do not say otherwise: at diffusers' default of 512 the released models do badly."""
    assert pipe.part("text_encoder_c") is not pipe.part("text_encoder_b")
    assert (pipe.device.type, pipe.dtype, pipe.size) == ("cpu", torch.float32, 1024)
    assert "image_encoder" not in pipe.networks
    assert not any(pipe.part(name).training for name in ("stage_a", "stage_b", "stage_c"))


def test_encoding_an_image_needs_an_image_encoder_and_a_possible_size(pipe):
    with pytest.raises(ValueError, match="image_encoder is needed for this, but was not loaded"):
        encode_image(pipe, torch.rand(1, 3, 128, 128))
    with_encoder = Wuerstchen(pipe.networks | dict(image_encoder=TinyImageEncoder(c_hidden=(4, 4, 4, 4)).eval()))
    assert encode_image(with_encoder, torch.rand(2, 3, 128, 256)).shape == (2, 16, *latent_sizes(128, 256)[0])
    assert encode_image(with_encoder, torch.rand(1, 3, 100, 300)).shape == (1, 16, *latent_sizes(100, 300)[0])
    with pytest.raises(ValueError, match="height is 50, expected a whole number of px from 64 to 16384"):
        encode_image(with_encoder, torch.rand(1, 3, 50, 128))


def test_the_pipeline_can_be_taken_apart(pipe):
    """Its steps, called one by one, give the image of one call."""
    noise, options = Noise([5]), dict(steps_c=4, steps_b=2)
    c, b = pipe.settings(options)
    (size_c, size_b), texts = latent_sizes(100, 128), {s: pipe.encode_text(s, [CAT], ["blurry"]) for s in "cb"}
    semantic = pipe.sample_c(*texts["c"], lambda: noise(16, *size_c), c)
    latents = pipe.sample_b(semantic, *texts["b"], lambda: noise(4, *size_b), b)
    image, = to_pil(crop(pipe.decode(latents), 100, 128))
    assert same(image, pipe(CAT, "blurry", seed=5, height=100, width=128, **options)[0])


ALONE = """
import sys
import torch, numpy, PIL.Image, tqdm
allowed = set(sys.stdlib_module_names) | {name.partition(".")[0] for name in sys.modules} | {"wuerstchen"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"wuerstchen.py wants {name}")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, FOLDER)
from wuerstchen import Noise, Sampling, add_noise, denoise
x_0, noise = torch.randn(1, 3, 4, 4), Noise([1])
def predict(x, t, guided):         # the true noise on the way to x_0, with text and without
    ab = (add_noise(torch.ones(len(t)), torch.zeros(len(t)), t) ** 2)[:, None, None, None]
    eps = (x - ab.sqrt() * x_0) / (1 - ab).sqrt()
    return torch.cat([eps, eps]) if guided else eps
for sampler in ("ddpm", "ddim", "dpm++"):
    sampling = Sampling(12, sampler, guidance=3.0, early=True)
    x = denoise(predict, noise(3, 4, 4), lambda: noise(3, 4, 4), sampling)
    assert (x - x_0).abs().max() < 0.05, sampler
"""


def test_schedule_samplers_and_guidance_work_in_any_project(tmp_path):
    """wuerstchen.py copied alone needs torch, numpy, pillow and tqdm only."""
    shutil.copy(wuerstchen.__file__, tmp_path)
    run = subprocess.run([sys.executable, "-I", "-c", f"FOLDER = {str(tmp_path)!r}\n{ALONE}"], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
