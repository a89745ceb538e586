"""What a call can do beyond text to image: each thing it offers, on the small model that ships.

Where it matters what is in an image, the judge of tiny/judge.py looks, and half of the usual steps do: HALF. Where it
does not, a few do: QUICK.
"""
import itertools
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import wuerstchen
from extras import previews
from extras.editing import InitImage, encode_image, generate, interpolate, reconstruct, slerp
from extras.previews import Previews, preview_maps
from loading import hub
from speed import memory
from tiny.evaluate import fixed_prompts
from tiny.judge import Judge, relation_of, verdict
from helpers import COMBINED, rel
from extras.images import psnr
from training.scenes import Scene, place_pair, place_single, plain_caption, render
from stage_a import StageA
from wuerstchen import (SAMPLERS, Noise, Sampling, Wuerstchen, add_noise, nan_advice, scale_semantic,
                        unscale_semantic)

# 128 px are all that the small model was trained on; and the text encoders of random weights take 20 short tokens.
pytestmark = [pytest.mark.filterwarnings("ignore:.*not what these weights were trained on"),
              pytest.mark.filterwarnings("ignore:a prompt is longer than the 20 tokens")]

TINY = Path(__file__).parent.parent / "models" / "tiny"
CAT, DOG, STAR = "a cat on a blue background", "a dog on a yellow background", "a star on a red background"
QUICK, HALF = dict(steps_c=3, steps_b=2), dict(steps_c=14, steps_b=6)
C, B = (16, 3, 3), (4, 32, 32)               # the latents of 128 x 128 px


@pytest.fixture(scope="module")
def tiny() -> Wuerstchen:
    """With the plain networks, whose calls can be recorded. tests/test_fast.py compares them with the fast forms."""
    return Wuerstchen.load("tiny", "cpu", fast=False)


@pytest.fixture(scope="module")
def two_encoders() -> Wuerstchen:
    """Random weights, but a text encoder for each stage, as in the official ones."""
    model = Wuerstchen.load(COMBINED, "cpu", fast=False)
    model.size = 128
    return model


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture
def seen(judge):
    """What an image shows: the names of its objects from left to right, and the colour of its background."""
    def seen(picture) -> tuple[list[str], str]:
        found, colour = judge.find(picture)
        return [name for name, _, place, _ in sorted(found, key=lambda one: one[2])], colour
    return seen


class Recorder:
    """The positional inputs of each call of a network."""
    def __init__(self, module: torch.nn.Module):
        self.calls = []
        self.hook = module.register_forward_pre_hook(lambda module, args: self.calls.append(args))

    def __enter__(self) -> list:
        return self.calls

    def __exit__(self, *_):
        self.hook.remove()


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def same(a, b) -> bool:
    return np.array_equal(pixels(a), pixels(b))


def alike(a, b) -> bool:
    """Another batch size may add up in another order: 2 of 255 levels are allowed for that."""
    return np.abs(pixels(a) - pixels(b)).max() <= 2


def pair(seed: int, *what) -> np.ndarray:
    """A drawn scene of two objects, (128, 128, 3) uint8."""
    return render(place_pair(np.random.default_rng(seed), *what))


def single(seed: int, *what) -> np.ndarray:
    return render(place_single(np.random.default_rng(seed), *what))


# --- prompts as embeddings ---------------------------------------------------------------------------

def embeddings_of(model: Wuerstchen, prompts: list[str], negatives: list[str], stages: str = "cb") -> dict[str, Tensor]:
    pairs = {s: model.encode_text(s, prompts, negatives) for s in stages}
    return {f"{name}_{s}": pairs[s][i] for s in stages for i, name in enumerate(("prompt", "negative"))}


@pytest.mark.parametrize("model", ["tiny", "two_encoders"])
def test_embeddings_give_the_image_of_the_text_they_came_from(model, request):
    """To the bit, each prompt with a negative one of its own: so what is mixed or learned can take the place of
    words."""
    model = request.getfixturevalue(model)
    embeddings = embeddings_of(model, [CAT, DOG], ["a moon", "a key"])
    texts = generate(model, [CAT, DOG], ["a moon", "a key"], seed=5, guidance_b=2, **QUICK)
    assert all(map(same, texts, generate(model, given=embeddings, seed=5, guidance_b=2, **QUICK)))
    assert not alike(texts[0], model([CAT, DOG], seed=5, guidance_b=2, **QUICK)[0])


def test_where_both_stages_share_an_encoder_one_embedding_serves_both(tiny):
    embeddings = embeddings_of(tiny, [CAT], ["a moon"], stages="c")
    assert same(generate(tiny, CAT, "a moon", seed=5, **QUICK)[0], generate(tiny, given=embeddings, seed=5, **QUICK)[0])
    del embeddings["negative_c"]                        # then the negative prompt, here "", is used
    assert same(tiny(CAT, seed=5, **QUICK)[0], generate(tiny, given=embeddings, seed=5, **QUICK)[0])


def test_one_negative_embedding_serves_all_prompts_and_all_their_images(tiny):
    negative = {"negative_c": tiny.encode_text("c", ["a moon"], [""])[0]}               # (1, N, D)
    texts = tiny([CAT, DOG], "a moon", num_images=2, seed=5, **QUICK)
    embeddings = generate(tiny, [CAT, DOG], num_images=2, seed=5, given=negative, **QUICK)
    assert len(texts) == 4 and all(map(same, texts, embeddings))


def test_no_stage_is_told_nothing_in_silence(two_encoders):
    """With an embedding for Stage C alone, diffusers gives Stage B the empty prompt: its image is off, and nobody
    knows why."""
    embeddings = embeddings_of(two_encoders, [CAT], [""])
    for name, lacking in (("prompt_c", "prompt_b"), ("prompt_b", "prompt_c")):
        with pytest.raises(ValueError, match=f"no {lacking} among the embeddings, and no prompt to make it from"):
            generate(two_encoders, given={name: embeddings[name]}, **QUICK)
    texts, = two_encoders(CAT, seed=5, **QUICK)
    assert same(texts, generate(two_encoders, CAT, given={"prompt_c": embeddings["prompt_c"]}, seed=5, **QUICK)[0])


def test_a_stage_that_is_not_used_needs_not_be_told(two_encoders):
    embeddings = embeddings_of(two_encoders, [CAT], [""])
    semantic = generate(two_encoders, given={"prompt_c": embeddings["prompt_c"]}, seed=5, output="semantic", **QUICK)
    images = generate(two_encoders, given={**{"prompt_b": embeddings["prompt_b"]}, "semantic": semantic}, seed=5,
                      **QUICK)
    assert same(images[0], generate(two_encoders, CAT, given={"semantic": semantic}, seed=5, **QUICK)[0])


def test_no_negative_prompt_is_the_empty_one(tiny):
    assert same(generate(tiny, CAT, None, seed=5, **QUICK)[0], tiny(CAT, seed=5, **QUICK)[0])


# --- seeds and noise ---------------------------------------------------------------------------------

def test_every_image_draws_from_its_own_seed():
    """The numbers of seed 2 are the same next to any other seed, at any place."""
    assert torch.equal(Noise([1, 2])(3, 4)[1], Noise([2, 7, 9])(3, 4)[0]) and len(Noise([1, 2])(3)) == 2
    assert torch.equal(Noise([np.int64(2)])(3), Noise([2])(3))


def test_noise_may_come_from_anywhere(tiny):
    """noise(C, h, w) is asked for the start of Stage C, once in each of its steps, and the same for Stage B."""
    seeds, asked = Noise([5]), []

    def noise(*shape):
        asked.append(shape)
        return seeds(*shape)
    assert same(generate(tiny, CAT, seed=noise, **QUICK)[0], tiny(CAT, seed=5, **QUICK)[0])
    assert asked == [C] * 4 + [B] * 3


def test_noise_for_another_number_of_images_is_refused(tiny):
    """There is no telling whose it is."""
    message = "what the source of noise returned has shape (3, 16, 3, 3), expected (2 or 1, 16, 3, 3)"
    with Recorder(tiny.part("stage_c")) as calls, pytest.raises(ValueError, match=re.escape(message)):
        generate(tiny, [CAT, DOG], seed=Noise([1, 2, 3]), **QUICK)
    assert not calls


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_given_latents_are_where_the_stages_start(tiny, sampler):
    """These samplers use no noise but the start, so an image is repeated from its two starts under any seed."""
    how = dict(sampler_c=sampler, sampler_b=sampler, **QUICK)
    noise = Noise([5])
    # three more, unused, are drawn in Stage C's steps
    latents_c, latents_b = [noise(*C) for _ in range(4)][0], noise(*B)
    expected, = tiny(CAT, seed=5, **how)
    first, second = generate(tiny, CAT, seed=[8, 9], num_images=2,
                             given={"latents_c": latents_c, "latents_b": latents_b}, **how)
    assert same(first, second) and alike(first, expected)
    assert same(generate(tiny, CAT, seed=8, given={"latents_c": latents_c, "latents_b": latents_b}, **how)[0], expected)
    assert not alike(expected, generate(tiny, CAT, seed=8, given={"latents_c": latents_c}, **how)[0])


# --- schedules ---------------------------------------------------------------------------------------

SCHEDULES = [
    (dict(steps_c=6), Sampling(6, early=True).levels),
    (dict(steps_c=29), Sampling({2 / 3: 19, 0.0: 10}).levels),
    (dict(steps_c={2 / 3: 4, 0.0: 2}), torch.tensor([1, 11 / 12, 10 / 12, 9 / 12, 2 / 3, 1 / 3, 0])),
    (dict(steps_c=[1.0, 0.5, 0.25]), torch.tensor([1, 0.5, 0.25])),
    (dict(steps_c=torch.tensor([0.9, 0.1])), torch.tensor([0.9, 0.1])),
    (dict(steps_c=2, t_start_c=0.6, t_end_c=0.2), torch.tensor([0.6, 0.4, 0.2])),
    (dict(steps_c={0.25: 2}, t_start_c=0.75), torch.tensor([0.75, 0.5, 0.25])),
    (dict(steps_b=5), Sampling(5).levels),
    (dict(steps_b={0.5: 1, 0.0: 2}), torch.tensor([1, 0.5, 0.25, 0])),
    (dict(steps_b=3, t_start_b=0.9, t_end_b=0.3), torch.tensor([0.9, 0.7, 0.5, 0.3])),
]


@pytest.mark.parametrize("arguments, levels", SCHEDULES, ids=[str(list(a.values())) for a, _ in SCHEDULES])
def test_any_way_to_say_a_schedule_arrives_at_the_networks(tiny, arguments, levels):
    """Seen from inside: the noise level of each call. The last one is where a stage ends, and no input."""
    stage = tiny.part("stage_c") if "steps_c" in arguments else tiny.part("stage_b")
    with Recorder(stage) as calls:
        tiny(CAT, **QUICK | arguments)
    torch.testing.assert_close(torch.stack([args[1][0] for args in calls]), levels[:-1], rtol=0, atol=1e-6)


# --- samplers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [
    dict(sampler_c="dpm++", steps_c=12, steps_b=6),
    dict(sampler_c="dpm++", steps_c=12, sampler_b="dpm++", steps_b=6),
    dict(sampler_c="ddim", steps_c=14, sampler_b="ddim", steps_b=6),
], ids=["dpm++", "dpm++ in both", "ddim in both"])
def test_every_sampler_generates_what_it_is_told(tiny, judge, how):
    """As the default in test_tiny.py, but with half of the steps: objects, relation and background, at least 10 of
    12."""
    facts = fixed_prompts()[:12]
    verdicts = [verdict(*judge.find(picture), fact).values()
                for picture, fact in zip(tiny([fact["prompt"] for fact in facts], seed=0, **how), facts)]
    assert sum(all(value is not False for value in values) for values in verdicts) >= 10


def test_eta_says_how_much_chance_there_is_in_ddim(tiny):
    """0: the start decides. Above: what is drawn on the way counts as well, and the more the larger eta is."""
    def painted(eta: float, seed: int) -> Tensor:
        start = Noise([5])(*C)
        return generate(tiny, CAT, seed=seed, given={"latents_c": start}, sampler_c="ddim", eta_c=eta, steps_c=8,
                        output="semantic")
    spread = [rel(painted(eta, 1), painted(eta, 2)) for eta in (0.0, 0.1, 1.0)]
    assert spread[0] == 0 and 0 < spread[1] < spread[2]


# --- guidance ----------------------------------------------------------------------------------------

def test_outside_its_interval_guidance_costs_nothing(tiny):
    """Counted in rows that go through the networks: two for each image inside, one outside. Both ends belong to it."""
    levels = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    with Recorder(tiny.part("stage_c")) as calls_c, Recorder(tiny.part("stage_b")) as calls_b:
        tiny([CAT, DOG], steps_c=levels, interval_c=(0.4, 0.8), steps_b=levels, interval_b=(0.5, 1))
    assert [len(x) for x, *_ in calls_c] == [2, 4, 4, 4, 2]
    assert [len(x) for x, *_ in calls_b] == [4, 4, 4, 2, 2]


def test_a_pair_of_scales_goes_from_start_to_end(tiny, monkeypatch):
    """Over the noise level, not the number of the step; Stage B by a pair of its own."""
    scales, guide = [], wuerstchen.guide
    monkeypatch.setattr(wuerstchen, "guide", lambda *args: scales.append(args[2]) or guide(*args))
    tiny(CAT, steps_c=[1, 0.75, 0.5, 0], guidance_c=(6, 2), steps_b=[1, 0.5, 0], guidance_b=(3, 5))
    assert scales == [6, 5, 4, 3, 4]


def test_rescale_takes_back_the_contrast_of_each_image_by_itself(tiny):
    """Guidance of 15 makes latents 40 % too large: rescale brings them down. To the bit the same whoever is in the
    batch: one of the other samplers takes the standard deviation of the whole batch."""
    def latents(rescale: float, beside: str) -> Tensor:
        return generate(tiny, [CAT, beside], seed=5, guidance_c=15, rescale_c=rescale, output="semantic")
    plain, rescaled = latents(0, DOG).flatten(1).std(dim=1), latents(1, DOG)
    assert (rescaled.flatten(1).std(dim=1) < 0.85 * plain).all()
    assert torch.equal(rescaled[0], latents(1, STAR)[0])


# --- kinds of output ---------------------------------------------------------------------------------

def test_pil_numpy_and_torch_are_the_same_image(tiny):
    pil, array, tensor = (generate(tiny, [CAT, DOG], seed=5, width=128, height=96, output=output, **QUICK)
                          for output in ("pil", "np", "pt"))
    assert array.shape == (2, 96, 128, 3) and array.dtype == np.float32 and tensor.shape == (2, 3, 96, 128)
    assert tensor.dtype == torch.float32
    assert [image.size for image in pil] == [(128, 96)] * 2 and 0 <= tensor.min() and tensor.max() <= 1
    for i, image in enumerate(pil):
        assert np.array_equal(array[i], tensor[i].permute(1, 2, 0).numpy()) and same(image, (array[i] * 255).round())


def test_the_semantic_latent_is_a_place_to_stop_and_to_go_on(tiny):
    """With the noise that was left there the image is the same to the bit; so Stage B can be repeated, with other
    settings."""
    noise = Noise([5, 6])
    semantic = generate(tiny, [CAT, DOG], seed=noise, output="semantic", **QUICK)
    assert semantic.shape == (2, *C)
    with Recorder(tiny.part("stage_c")) as calls:
        images = generate(tiny, [CAT, DOG], given={"semantic": semantic}, seed=noise, **QUICK)
    assert not calls and all(map(same, images, tiny([CAT, DOG], seed=5, **QUICK)))


@pytest.mark.parametrize("how", [dict(steps_c=3), dict(steps_c={0.5: 2, 0: 1}, sampler_c="dpm++"),
                                 dict(steps_c=3, width=170), dict(steps_c=3, negative_prompt=DOG)])
def test_two_calls_with_the_same_seed_give_the_image_of_one(tiny, how):
    """Stage C's noise is skipped, so Stage B draws what it would have drawn; of several images, each its own."""
    how = dict(seed=5, num_images=2, steps_b=2) | how
    semantic = generate(tiny, CAT, output="semantic", **how)
    for images in (generate(tiny, CAT, given={"semantic": semantic}, **how),
                   generate(tiny, [CAT] * 2, given={"semantic": semantic}, **how | dict(seed=[5, 6], num_images=1))):
        assert all(map(same, images, generate(tiny, CAT, **how)))
    other = generate(tiny, CAT, given={"semantic": semantic}, **how | dict(seed=6))
    assert not alike(other[0], images[0])


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_two_calls_give_the_image_of_one_also_with_an_image_to_start_from(tiny, strength):
    """Fewer steps of Stage C draw less noise, none draws none: a reconstruction skips nothing."""
    how = dict(seed=5, edit=InitImage(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)), strength),
               **QUICK)
    semantic = generate(tiny, CAT, output="semantic", **how)
    assert same(generate(tiny, CAT, given={"semantic": semantic}, **how)[0], generate(tiny, CAT, **how)[0])


def test_a_semantic_latent_says_the_size_of_its_image(tiny):
    semantic = generate(tiny, CAT, width=170, height=128, output="semantic", **QUICK)                # (1, 16, 3, 4)
    assert generate(tiny, CAT, given={"semantic": semantic}, **QUICK)[0].size == (170, 128)
    assert generate(tiny, CAT, given={"semantic": semantic}, width=150, **QUICK)[0].size == (150, 128)


def test_latents_of_stage_b_are_what_stage_a_decodes(tiny):
    latents = generate(tiny, CAT, seed=5, output="latents_b", **QUICK)
    assert latents.shape == (1, *B)
    assert torch.equal(tiny.decode(latents), generate(tiny, CAT, seed=5, output="pt", **QUICK))


# --- callback ----------------------------------------------------------------------------------------

def test_the_callback_sees_every_step_in_order(tiny):
    """With the latents that the step has made, and their noise level: 0 in the end."""
    told, levels = [], [1.0, 0.5, 0.2, 0.0]
    picture, = tiny(CAT, seed=5, steps_c=levels, steps_b=2, callback=lambda *args: told.append(args))
    assert [(stage, i, round(t, 4), tuple(x.shape)) for stage, i, t, x, _ in told] == [
        ("C", 0, 0.5, (1, *C)), ("C", 1, 0.2, (1, *C)), ("C", 2, 0.0, (1, *C)), ("B", 0, 0.5, (1, *B)),
        ("B", 1, 0.0, (1, *B))]
    # who only looks changes nothing
    assert same(picture, tiny(CAT, seed=5, steps_c=levels, steps_b=2)[0])
    semantic = generate(tiny, CAT, seed=5, steps_c=levels, output="semantic")
    torch.testing.assert_close(unscale_semantic(told[2][3]), semantic, rtol=0, atol=0)


def test_the_callback_may_change_the_latents(tiny):
    """What it returns is what continues. In the last step of Stage B that is the image itself."""
    picture, = tiny(CAT, seed=5, **QUICK)
    for stage in "CB":
        assert not alike(picture, tiny(CAT, seed=5, callback=lambda s, i, t, x, x_0: x * 0 if s == stage and i == 0
                                       else None, **QUICK)[0])
    black = generate(tiny, CAT, seed=5, output="pt", **QUICK,
                     callback=lambda s, i, t, x, x_0: x * 0 if s == "B" else None)
    assert torch.equal(black, tiny.decode(torch.zeros(1, *B)))


@pytest.mark.parametrize("stage, rows_c, rows_b", [("C", 2, 0), ("B", 3, 2)])
def test_the_callback_may_stop_and_nothing_more_is_computed(tiny, stage, rows_c, rows_b):
    with Recorder(tiny.part("stage_c")) as calls_c, Recorder(tiny.part("stage_b")) as calls_b:
        assert generate(tiny, CAT, steps_c=3, steps_b=3, callback=lambda s, i, t, x, x_0: False if (s, i) == (stage, 1)
                    else None) == []
    assert (len(calls_c), len(calls_b)) == (rows_c, rows_b)


@pytest.mark.parametrize("answer, shown", [(True, "True"), (torch.zeros(1, 16, 2, 2), "tensor"),
                                           (torch.full((1, *C), math.nan), "tensor")],
                         ids=["True", "another shape", "NaN"])
def test_what_a_callback_may_not_return_is_said(tiny, answer, shown):
    with pytest.raises(ValueError,
                       match=re.escape("a callback may return None, False, or finite latents of shape "
                                         "(1, 16, 3, 3), not " + shown)):
        generate(tiny, CAT, callback=lambda *args: answer, **QUICK)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_errors_of_a_callback_come_through_as_they_are(tiny, error):
    def callback(*args):
        raise error("of its own")
    with pytest.raises(error, match="of its own"):
        tiny(CAT, callback=callback, **QUICK)


# --- numbers that are none ---------------------------------------------------------------------------

@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("stage, where", [("stage_c", "Stage C came to NaN or infinity in step 2 of 3 (t = 0.667)"),
                                          ("stage_b", "Stage B came to NaN or infinity in step 2 of 2 (t = 0.500)")])
def test_a_latent_that_is_no_number_stops_the_run_in_that_step(tiny, stage, where, value):
    """Elsewhere the run continues for a minute and ends in a black or grey image."""
    calls = []

    def broken(module, args, output):
        calls.append(args)
        return output * value if len(calls) == 2 else output
    hook = tiny.part(stage).register_forward_hook(broken)
    try:
        with pytest.raises(ValueError) as error:
            tiny([CAT, DOG], steps_c=[1, 2 / 3, 1 / 3, 0], steps_b=2)
    finally:
        hook.remove()
    assert len(calls) == 2
    advice = {"stage_c": "use a lower guidance scale.", "stage_b": nan_advice(torch.float32, tiny.b)}[stage]
    assert str(error.value) == f"{where}, computing in torch.float32: {advice}"


def test_nan_advice_never_proposes_what_is_already_set():
    """For each dtype with guidance and without; a guidance that only begins above 1 counts."""
    guided, plain, falling = Sampling(2, guidance=4), Sampling(2), Sampling(2, guidance=(3, 1))
    lower, other = "use a lower guidance scale", "check weights, LoRAs and given latents for NaN."
    assert nan_advice(torch.float16, guided) == f"use bfloat16 or float32, or {lower}."
    assert nan_advice(torch.float16, plain) == nan_advice(torch.float16) == "use bfloat16 or float32."
    assert nan_advice(torch.bfloat16, falling) == f"use float32, or {lower}."
    assert nan_advice(torch.bfloat16, plain) == "use float32."
    assert nan_advice(torch.float32, guided) == f"{lower}."
    assert nan_advice(torch.float32, plain) == nan_advice(torch.float32) == other


def test_a_single_broken_weight_is_noticed_at_once(tiny):
    """In the first step, though it is one number of millions."""
    bias = tiny.part("stage_c").head.bias
    kept = bias[0].item()
    try:
        with torch.no_grad():
            bias[0] = math.nan
        with pytest.raises(ValueError, match="Stage C came to NaN or infinity in step 1 of 3"):
            tiny(CAT, **QUICK)
    finally:
        with torch.no_grad():
            bias[0] = kept


# --- image to image ----------------------------------------------------------------------------------

PAIRS = [("rocket", "moon", "left of", "blue"), ("dog", "cat", "left of", "green"),
         ("house", "tree", "left of", "yellow"),
         ("crab", "star", "left of", "red")]


@pytest.mark.parametrize("i, what", list(enumerate(PAIRS)), ids=[what[0] for what in PAIRS])
def test_a_reconstruction_shows_what_the_image_shows(tiny, seen, i, what):
    """49152 numbers through 144 and back, and Stage B gets no other condition: the same objects, background, and much
    of the pixels."""
    scene = pair(i, *what)
    picture, = reconstruct(tiny, scene)
    assert seen(picture) == ([what[0], what[1]], what[3])
    assert psnr(torch.from_numpy(pixels(picture) / 255), torch.from_numpy(scene / 255)) > 20


def test_strength_0_is_the_reconstruction(tiny):
    """To the bit, and Stage C is not asked."""
    scene = pair(0, *PAIRS[0])
    with Recorder(tiny.part("stage_c")) as calls:
        picture, = generate(tiny, CAT, edit=InitImage(scene, 0), seed=5, **QUICK)
    assert not calls and same(picture, reconstruct(tiny, scene, CAT, seed=5, **QUICK)[0])
    assert not alike(picture, reconstruct(tiny, scene, seed=5, **QUICK)[0])                  # Stage B does listen


def test_strength_1_keeps_nothing(tiny):
    """To the bit what the prompt alone gives."""
    assert same(generate(tiny, CAT, edit=InitImage(pair(0, *PAIRS[0]), 1), seed=5, **QUICK)[0],
                tiny(CAT, seed=5, **QUICK)[0])


def test_strength_says_where_the_schedule_is_entered(tiny):
    """From the image's latent with exactly so much noise, and only through the levels below."""
    scene, levels = single(1, "cat", "large", "green"), [1, 0.8, 0.5, 0.2, 0]
    with Recorder(tiny.part("stage_c")) as calls:
        generate(tiny, CAT, edit=InitImage(scene, 0.6), seed=5, steps_c=levels, steps_b=2)
    assert [round(t[0].item(), 4) for _, t, _ in calls] == [0.6, 0.5, 0.2]
    clean = scale_semantic(encode_image(tiny, torch.from_numpy(scene / 255).permute(2, 0, 1)[None]))
    torch.testing.assert_close(calls[0][0][:1], add_noise(clean, Noise([5])(*C), torch.tensor([0.6])),
                               rtol=1e-4, atol=1e-4)


def test_the_less_strength_the_nearer_to_the_image(tiny):
    scene, prompt = single(1, "cat", "large", "green"), "a cat on a green background"
    none, some, more, all_ = (generate(tiny, prompt, edit=InitImage(scene, strength), num_images=2, output="pt", **HALF)
                              for strength in (0, 0.2, 0.6, 1))
    nearness = [psnr(images, none) for images in (some, more, all_)]
    assert nearness[0] > nearness[1] > nearness[2], nearness


def test_a_new_object_comes_where_the_old_one_was(tiny, judge):
    """That is the use of it: the prompt says what, the image where. A star at the upper left or the lower right
    becomes a cat."""
    places = []
    for place in ((40, 40), (88, 88)):
        scene = render(Scene(("star",), (60,), (place,), "red"))
        found = [judge.find(picture)[0] for picture in generate(tiny, "a cat on a red background",
                                                                edit=InitImage(scene, 0.6), num_images=4, **HALF)]
        assert [[name for name, *_ in objects] for objects in found] == [["cat"]] * 4
        places.append(np.mean([objects[0][2] for objects in found], axis=0))
    assert (places[0] + 6 < places[1]).all(), places


@pytest.mark.parametrize("what", [("cat", "large", "green"), ("penguin", "large", "red"), ("rocket", "large", "blue")],
                         ids=lambda what: what[0])
def test_without_a_prompt_an_image_gets_variations(tiny, seen, what):
    """The same object on the same background, each time another image. With the strength of 0.6 that a prompt would
    get, it is mostly another object: nothing says what to generate where so little is left of the image."""
    variations = generate(tiny, edit=InitImage(single(1, *what)), num_images=4, **HALF)
    assert [seen(picture) for picture in variations] == [([what[0]], what[2])] * 4
    assert all(np.abs(pixels(a) - pixels(b)).mean() > 3 for a, b in itertools.combinations(variations, 2))


@pytest.mark.parametrize("given, expected", [(dict(), (197, 128)), (dict(width=100), (100, 65)),
                                             (dict(height=64), (98, 64)),
                                             (dict(width=150, height=150), (150, 150)),
                                             (dict(width=64, height=201), (64, 201))])
def test_an_image_of_any_size_gives_one_of_any_size(tiny, given, expected):
    """Of 200 x 130 px: what is not given follows the image's shape, with the weights' own size for the shorter
    side."""
    gradient = np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None].repeat(130, 0).repeat(3, 2)
    assert reconstruct(tiny, gradient, steps_b=2, **given)[0].size == expected


def test_a_photo_that_lies_on_its_side_is_set_upright_before_its_size_is_taken(tiny, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (200, 130, 3), dtype=np.uint8)      # 130 px wide
    exif = Image.Exif()
    exif[0x0112] = 6                                    # stored lying: a quarter turn to the right sets it upright
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "photo.png", exif=exif)
    picture, = reconstruct(tiny, tmp_path / "photo.png", steps_b=2)
    assert picture.size == (128, 197) and same(picture, reconstruct(tiny, upright, steps_b=2)[0])


# --- inpainting --------------------------------------------------------------------------------------

RIGHT, LOWER = ((np.indices((128, 128))[axis] >= 64).astype(np.uint8) * 255 for axis in (1, 0))
PAINTED_ANEW = [("dog", "cat", "rose", "left of", "green"), ("rocket", "moon", "banana", "left of", "green"),
                ("car", "bus", "heart", "left of", "white"), ("tree", "house", "castle", "above", "yellow"),
                ("penguin", "owl", "star", "above", "blue")]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("i, what", list(enumerate(PAINTED_ANEW)), ids=[what[2] for what in PAINTED_ANEW])
def test_what_is_masked_becomes_what_the_prompt_says(tiny, judge, i, what, sampler):
    """The other object is still there, in its relation to the new one, and not a pixel outside the mask has changed."""
    kept, old, new, relation, colour = what
    scene, mask = pair(i, kept, old, relation, colour), RIGHT if relation == "left of" else LOWER
    picture, = generate(tiny, plain_caption((kept, new), colour, relation), edit=InitImage(scene, mask=mask),
                        sampler_c=sampler, sampler_b=sampler, **HALF)
    found, background = judge.find(picture)
    places = {name: place for name, _, place, _ in found}
    assert set(places) == {kept, new} and background == colour and relation_of(places[kept], places[new]) == relation
    assert np.array_equal(np.asarray(picture)[mask == 0], scene[mask == 0])


def test_a_mask_of_any_shape_keeps_every_pixel_outside_it(tiny):
    """Also where it cuts through latents of Stage C, which are 43 px wide; and in every one of several images."""
    rows, columns = np.indices((100, 150))
    mask = (rows - 50) ** 2 + (columns - 40) ** 2 < 20 ** 2                                 # a disc
    picture = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    for painted in generate(tiny, CAT, edit=InitImage(picture, mask=mask), width=150, height=100, num_images=2,
                            **QUICK):
        assert np.array_equal(np.asarray(painted)[~mask],
                              picture[~mask]) and not np.array_equal(np.asarray(painted)[mask], picture[mask])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_is_held_in_the_latents_of_both_stages(tiny, sampler):
    """Pasting alone would bring the pixels back, but what is new would not have been generated to fit them. A latent of
    Stage C that the mask touches is made again, here the two right columns of three; in Stage B it is the right
    half."""
    scene = pair(0, "dog", "cat", "left of", "green")
    image = torch.from_numpy(scene / 255).float().permute(2, 0, 1)[None]
    how = dict(edit=InitImage(scene, mask=RIGHT), sampler_c=sampler, sampler_b=sampler, **QUICK)
    semantic, latents = (generate(tiny, CAT, output=output, **how) for output in ("semantic", "latents_b"))
    with torch.no_grad():
        for made, known, new in ((semantic, encode_image(tiny, image), 1),
                                 (latents, tiny.part("stage_a").encode(image), 16)):
            torch.testing.assert_close(made[..., :new], known[..., :new], rtol=1e-4, atol=1e-4)
            assert rel(made[..., new:], known[..., new:]) > 0.1


@pytest.mark.parametrize("filler", [0, 255], ids=["black", "white"])
def test_an_image_is_continued_beyond_its_edge(tiny, seen, filler):
    """Outpainting is a mask around it. Whatever lies under the mask must not shine through."""
    scene = pair(0, "dog", "cat", "left of", "green").copy()
    scene[:, 64:] = filler
    picture, = generate(tiny, "a dog left of a rose on a green background", edit=InitImage(scene, mask=RIGHT), **HALF)
    assert seen(picture) == (["dog", "rose"], "green")


@pytest.mark.parametrize("mask, message", [
    (np.ones((128, 64)), "the mask has 64 x 128 px, its image 128 x 128: they must be the same"),
    (np.zeros((128, 128)), "the mask marks nothing: expected white where new content goes, black elsewhere")])
def test_masks_that_do_not_fit_are_refused(tiny, mask, message):
    with Recorder(tiny.part("stage_c")) as calls, pytest.raises(ValueError, match=message):
        generate(tiny, CAT, edit=InitImage(pair(0, *PAIRS[0]), mask=mask), **QUICK)
    assert not calls


# --- interpolation -----------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["tiny", "two_encoders"])
def test_the_ends_of_an_interpolation_are_the_pure_prompts(model, request):
    """To the bit, with a negative prompt as well."""
    model = request.getfixturevalue(model)
    frames = interpolate(model, CAT, DOG, 4, seed=5, negative_prompt="a moon", **QUICK)
    assert len(frames) == 4
    for frame, prompt in ((frames[0], CAT), (frames[-1], DOG)):
        assert same(frame, model(prompt, "a moon", seed=5, **QUICK)[0])


def test_between_two_prompts_the_image_changes_once(tiny, seen):
    """A cat, then a dog, on the same background all the way: no third thing in between."""
    frames = [seen(frame) for frame in interpolate(tiny, CAT, "a dog on a blue background", 5, seed=2, batch=5, **HALF)]
    changes = [key for key, _ in itertools.groupby(frames)]
    assert changes == [(["cat"], "blue"), (["dog"], "blue")]


def test_between_two_semantic_latents(tiny, seen):
    """Images may be interpolated as well, as they have such latents. Stage B gets no condition, or one prompt for
    all."""
    cat, dog = (generate(tiny, prompt, seed=3, output="semantic", **HALF) for prompt in (CAT, DOG))
    frames = interpolate(tiny, cat, dog, 3, seed=5, steps_b=6)
    assert seen(frames[0]) == (["cat"], "blue") and seen(frames[-1]) == (["dog"], "yellow") and len(frames) == 3
    assert same(frames[0], generate(tiny, given={"semantic": cat}, seed=5, steps_b=6)[0])
    assert same(frames[-1], generate(tiny, given={"semantic": dog}, seed=5, steps_b=6)[0])
    moved = interpolate(tiny, cat, dog, 2, seed=5, to_seed=7, steps_b=6)
    assert same(moved[0], frames[0]) and same(moved[-1], generate(tiny, given={"semantic": dog}, seed=7, steps_b=6)[0])
    assert same(interpolate(tiny, cat, dog, 2, seed=5, prompt=STAR, **QUICK)[0],
                generate(tiny, STAR, given={"semantic": cat}, seed=5, **QUICK)[0])


def test_the_noise_may_move_from_one_seed_to_another(tiny):
    frames = interpolate(tiny, CAT, CAT, 3, seed=5, to_seed=9, **QUICK)
    assert same(frames[0], tiny(CAT, seed=5, **QUICK)[0]) and same(frames[-1], tiny(CAT, seed=9, **QUICK)[0])
    assert not alike(frames[1], frames[0]) and not alike(frames[1], frames[-1])


@pytest.mark.parametrize("to_seed", [None, 9])
def test_frames_are_the_same_in_batches(tiny, to_seed):
    one, three = (interpolate(tiny, CAT, DOG, 5, seed=5, to_seed=to_seed, batch=batch, **QUICK) for batch in (1, 3))
    assert len(one) == len(three) == 5 and all(map(alike, one, three))


def test_an_interpolation_that_is_stopped_keeps_what_is_finished(tiny):
    """And starts no further frame."""
    told = []
    frames = interpolate(tiny, CAT, DOG, 5, callback=lambda *args: False if told.append(args) or len(told) == 8
                              else None, **QUICK)
    assert len(frames) == 1 and len(told) == 8          # five steps a frame: stopped in the second


@pytest.mark.parametrize("a, b, frames, message", [
    (CAT, DOG, 1, "frames is 1, expected a whole number from 2 to 1000"),
    (CAT, torch.zeros(1, *C), 3, "one end is a prompt and the other a latent"),
    (torch.zeros(1, *C), torch.zeros(1, 16, 3, 4), 3,
     r"the ends have shapes \(1, 16, 3, 3\) and \(1, 16, 3, 4\), expected twice the same"),
    (torch.zeros(2, *C), torch.zeros(2, *C), 3,
     r"shapes \(2, 16, 3, 3\) and \(2, 16, 3, 3\), expected twice the same: \(1, 16, h, w\)")])
def test_what_cannot_be_interpolated_is_refused(tiny, a, b, frames, message):
    with pytest.raises(ValueError, match=message):
        interpolate(tiny, a, b, frames)


def test_slerp_ends_exactly_at_its_ends():
    """Otherwise the first and last frame would not be those of the pure prompts."""
    a, b = torch.randn(3, 16, 3, 3), 5 * torch.randn(3, 16, 3, 3)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)


def test_slerp_between_noises_is_noise():
    """Of variance 1 all the way. Halfway along a straight line it is 1/2: (x + y) / 2 has half the variance of x and
    y."""
    a, b = torch.randn(2, 1, 200_000)
    for f in (0.25, 0.5, 0.9):
        assert slerp(a, b, f).var().item() == pytest.approx(1, abs=0.02)
    assert torch.lerp(a, b, 0.5).var().item() == pytest.approx(0.5, abs=0.02)


def test_slerp_moves_on_an_arc_at_constant_speed():
    """From one axis to another: the angle is f times a right angle."""
    f = torch.linspace(0, 1, 7)
    moved = slerp(torch.tensor([[1.0, 0.0]]).expand(7, 2), torch.tensor([[0.0, 1.0]]).expand(7, 2), f)
    torch.testing.assert_close(moved, torch.stack([(f * math.pi / 2).cos(), (f * math.pi / 2).sin()], dim=1), rtol=0,
                               atol=1e-6)


def test_slerp_of_parallel_vectors_is_a_straight_line():
    """There is no arc: the formula would divide 0 by 0. The rest of the batch is not touched by it."""
    a, b = torch.randn(4, 50), torch.randn(4, 50)
    b[0], b[1], b[2] = a[0], 2 * a[1], -a[2]
    halfway = slerp(a, b, 0.5)
    torch.testing.assert_close(halfway[:3], torch.stack([a[0], 1.5 * a[1], 0 * a[2]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halfway[3], slerp(a[3:], b[3:], 0.5)[0])
    assert slerp(torch.zeros(1, 5), torch.zeros(1, 5), 0.5).isfinite().all()


# --- preview -----------------------------------------------------------------------------------------

def rim(images: Tensor) -> Tensor:
    """images (B,3,h,w) -> (B,3), the colour of the background: the median along the border."""
    return torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1).median(dim=-1)[0]


def test_previews_come_to_resemble_the_image(tiny):
    """From three middle steps on in Stage C the background is right; in Stage B the image is, but for detail."""
    shown = []
    images = generate(tiny, [CAT, STAR, "a snowman above a car on a yellow background"], seed=7, output="pt",
                      callback=Previews(tiny, lambda stage, i, images: shown.append((stage, i, images))))
    assert [(stage, i) for stage, i, _ in shown] == [("C", i) for i in range(29)] + [("B", i) for i in range(12)]
    for stage, i, preview in shown:
        assert preview.shape == (3, 3, *(C if stage == "C" else B)[1:]) and 0 <= preview.min() and preview.max() <= 1
        if (stage, i) in (("C", 15), ("C", 28), ("B", 3), ("B", 11)):
            small = F.adaptive_avg_pool2d(images, preview.shape[-2:])
            assert (rim(preview) - rim(small)).abs().max() < 0.15, (stage, i)
            for a, b in zip(preview, small):
                assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > (0.8 if stage == "C"
                                                                                        else 0.9), (stage, i)


def test_looking_changes_nothing(tiny):
    assert same(generate(tiny, CAT, seed=5, callback=Previews(tiny, lambda *args: None), **QUICK)[0],
                tiny(CAT, seed=5, **QUICK)[0])


def counted(monkeypatch) -> list:
    """How often the maps were fitted: one entry for each."""
    fits, fit = [], previews.fit_linear
    monkeypatch.setattr(previews, "fit_linear", lambda *args: fits.append(args) or fit(*args))
    return fits


def test_the_maps_are_fitted_once_and_stored_next_to_the_weights(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("preview.json"))
    fits, file = counted(monkeypatch), tmp_path / "copy" / "preview.json"
    model = Wuerstchen.load(tmp_path / "copy", "cpu")
    maps = preview_maps(model)
    assert len(fits) == 2 and file.is_file()
    assert {stage: matrix.shape for stage, matrix in maps.items()} == {"C": (17, 3), "B": (5, 3)}
    again = preview_maps(Wuerstchen.load(tmp_path / "copy", "cpu"))                         # as after a new start
    assert len(fits) == 2 and all((again[stage] - maps[stage]).abs().max() < 1e-4 for stage in maps)


def test_maps_of_other_parts_are_not_taken(tmp_path):
    """A VQGAN or image encoder from elsewhere speaks in other numbers: the stored maps would show wrong colours."""
    assert Wuerstchen.load("tiny", "cpu", low_memory=True).preview_file == TINY / "preview.json"
    for part in ("vqgan", "image_encoder"):
        assert Wuerstchen.load("tiny", "cpu", low_memory=True, **{part: TINY / part}).preview_file is None


def test_weights_in_a_read_only_folder_are_no_error(tiny, tmp_path, monkeypatch):
    """They are fitted for this call, then."""
    (tmp_path / "file").write_text("not a folder")
    model = Wuerstchen(tiny.networks, 128)
    model.preview_file = tmp_path / "file" / "preview.json"
    fits = counted(monkeypatch)
    assert set(preview_maps(model)) == {"C", "B"} and len(fits) == 2


def test_without_an_image_encoder_stage_b_is_shown(two_encoders):
    """How Stage C's latents look is learned from the image encoder's."""
    stages = []
    two_encoders.preview_file = None                    # its folder belongs to the tests: nothing is written there
    generate(two_encoders, CAT, callback=Previews(two_encoders, lambda stage, i, images: stages.append(stage)), **QUICK)
    assert stages == ["B", "B"]


# --- tiles -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tile", [3, 5, 8, 20, 64])
def test_tiles_fit_together_without_seams(tiny, tile):
    """To rounding, not to the eye: each is decoded with as many neighbours as the decoder looks far. 20 x 27 latents,
    so that they do not divide, and one tile is larger than the image."""
    latents = torch.randn(2, 4, 20, 27)
    with torch.no_grad():
        torch.testing.assert_close(memory.decode_tiled(tiny.part("stage_a"), latents, tile),
                                   tiny.part("stage_a").decode(latents), rtol=0,
                                   atol=1e-5)


@pytest.mark.parametrize("levels, blocks", [(1, 3), (2, 4), (3, 2)])
def test_a_tile_has_as_many_neighbours_as_the_decoder_looks_far(levels, blocks):
    """For decoders of other depths as well, and with weights under which each block looks as far as it can; trained
    ones do not."""
    stage_a = StageA(levels, blocks, c_hidden=8, codebook_size=8)
    latents = torch.randn(1, 4, 20, 27)
    with torch.no_grad():
        for parameter in stage_a.parameters():
            if parameter.shape == (6,):                 # the gammas of a block: untrained, they are 0 and switch it off
                parameter.fill_(1)
        torch.testing.assert_close(memory.decode_tiled(stage_a, latents, 5), stage_a.decode(latents), rtol=0, atol=1e-5)


def record_tiles(monkeypatch) -> list[int]:
    """The size of the tiles of every image that is decoded in tiles."""
    tiles, decode_tiled = [], memory.decode_tiled
    monkeypatch.setattr(memory, "decode_tiled", lambda stage_a, z, tile, decode: tiles.append(tile)
                        or decode_tiled(stage_a, z, tile, decode))
    return tiles


def test_a_model_may_be_told_to_use_tiles(tiny, monkeypatch):
    model, tiles = Wuerstchen.load("tiny", "cpu", fast=False), record_tiles(monkeypatch)
    memory.tile(model, 8)
    whole, tiled = (pixels(m(CAT, seed=5, **QUICK)[0]) for m in (tiny, model))
    assert tiles == [8] and np.abs(whole - tiled).max() <= 1


@pytest.mark.parametrize("free, expected", [(0, [64, 64]), (math.inf, [])], ids=["short", "plenty"])
def test_tiles_are_used_by_themselves_where_memory_is_short(tiny, monkeypatch, free, expected):
    latents, tiles = torch.randn(2, 4, 80, 72), record_tiles(monkeypatch)
    whole = tiny.decode(latents)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    torch.testing.assert_close(tiny.decode(latents), whole, rtol=0, atol=1e-5)
    assert tiles == expected


def test_memory_that_torch_holds_free_counts_as_free(monkeypatch):
    """Its allocator keeps what tensors gave back: the driver calls that used, and images would be tiled for nothing."""
    for name, value in (("mem_get_info", (3_000, 80_000)), ("memory_reserved", 50_000), ("memory_allocated", 8_000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 45_000


# --- memory and speed --------------------------------------------------------------------------------

@pytest.fixture
def moves(monkeypatch) -> list:
    """Every move of a whole network to a device, as (network, name of the device)."""
    moves, to = [], torch.nn.Module.to

    def recorded(self, *args, **kwargs):
        if args and isinstance(args[0], str | torch.device):
            moves.append((self, str(args[0])))
        return to(self, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, "to", recorded)
    return moves


def test_offload_keeps_one_part_at_a_time_on_the_device(tiny, moves):
    """The others wait in main memory. Here "cpu:0" plays the device and "cpu" main memory: for torch two names of one
    place."""
    model = Wuerstchen.load("tiny", "cpu:0", offload=True, fast=False)
    names = {id(model.networks[name]): name for name in ("stage_a", "stage_b", "stage_c", "text_encoder_c")}

    def on_device() -> list[str]:
        places = {names[id(part)]: place for part, place in moves if id(part) in names}
        return [name for name, place in places.items() if place == "cpu:0"]
    assert on_device() == []                            # what has not been asked for waits in main memory
    at_work, hooks = [], [part.register_forward_pre_hook(lambda part, args: at_work.append((names[id(part)],
                                                                                            on_device())))
                          for part in (model.part("stage_b"), model.part("stage_c"),
                                       model.part("text_encoder_c"))]
    loading = len(moves)
    picture, = model(CAT, seed=5, **QUICK)
    assert {name for name, _ in at_work} == {"text_encoder_c", "stage_c", "stage_b"}
    assert all(there == [name] for name, there in at_work)
    # Three moves in and three out: a stage is not moved in each of its steps.
    assert [(names[id(part)], place) for part, place in moves[loading:]] == [
        (name, place) for leaves, comes in itertools.pairwise(("text_encoder_c", "stage_c", "stage_b", "stage_a"))
        for name, place in ((leaves, "cpu"), (comes, "cpu:0"))]
    assert on_device() == ["stage_a"] and same(picture, tiny(CAT, seed=5, **QUICK)[0])
    for hook in hooks:
        hook.remove()


def test_offload_moves_the_image_encoder_too(tiny, moves):
    model, scene = Wuerstchen.load("tiny", "cpu:0", offload=True, fast=False,
                                   parts=hub.TEXT_TO_IMAGE), pair(0, *PAIRS[0])
    picture, = generate(model, CAT, edit=InitImage(scene, mask=RIGHT), seed=5, **QUICK)
    assert (model.part("image_encoder"), "cpu:0") in moves and (model.part("image_encoder"), "cpu") in moves
    assert same(picture, generate(tiny, CAT, edit=InitImage(scene, mask=RIGHT), seed=5, **QUICK)[0])


def test_compile_is_for_stages_b_and_c_and_finds_one_graph_in_each(tiny, monkeypatch):
    """Nothing in them breaks the graph, and neither a step nor another prompt asks for another one: a break would cost
    what compiling gains. Here torch only traces, which takes seconds: what it makes of the graph is its own affair."""
    from torch._dynamo.utils import counters
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, mode: compile(step, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    model = Wuerstchen.load("tiny", "cpu", compile=True)
    for prompt in (CAT, DOG):
        image, = model(prompt, seed=5, **QUICK)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        assert alike(image, tiny(prompt, seed=5, **QUICK)[0])


@pytest.mark.slow
def test_a_compiled_model_generates_the_same_image(tiny):
    """Really compiled, for a minute."""
    torch._dynamo.reset()
    assert alike(Wuerstchen.load("tiny", "cpu", compile=True)(CAT, seed=5, **QUICK)[0], tiny(CAT, seed=5, **QUICK)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here, whose host could have to wait")
def test_on_a_gpu_no_step_makes_the_host_wait():
    """What torch itself reports as waiting: as often for many steps as for few. (Without a GPU: test_diffusion.py.)"""
    model = Wuerstchen.load("tiny", "cuda")
    model(CAT, steps_c=2, steps_b=2)                     # what is done once
    counts = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for steps in (2, 9):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model(CAT, steps_c=steps, steps_b=steps)
            counts.append(sum("synchroniz" in str(warning.message) for warning in said))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts[0] == counts[1] > 0                    # the finished image is waited for: torch does report


# --- mistakes ----------------------------------------------------------------------------------------

D = 128                                                  # width of the small model's text embeddings
MISTAKES = [
    (dict(given=dict(prompt=torch.zeros(1, 20, D))),
     "prompt cannot be given: expected some of prompt_c, negative_c,"),
    (dict(given=dict(prompt_c=torch.zeros(20, D))),
     "embeddings prompt_c have shape (20, 128), expected (1, tokens, width)"),
    (dict(given=dict(prompt_c=torch.zeros(3, 20, D))),
     "embeddings prompt_c have shape (3, 20, 128), expected (1, tokens, width)"),
    (dict(given=dict(negative_c=torch.zeros(1, 20, 1280))),
     "embeddings negative_c have shape (1, 20, 1280), expected (1, tokens, 128)"),
    (dict(given=dict(prompt_b=torch.zeros(1, 20, 1024))),
     "embeddings prompt_b have shape (1, 20, 1024), expected (1, tokens, 128)"),
    (dict(given=dict(prompt_b=torch.zeros(1, 9, D))),
     "embeddings of prompt_b and negative_b differ in shape, (1, 9, 128) and (1, 20, 128)"),
    (dict(steps_c=[1, 0.5, 0.7]), "Stage C: steps is [1, 0.5, 0.7], expected at least 1, or at least two strictly "
                                  "falling noise levels in [0, 1]"),
    (dict(steps_b=[1, 0, -1]), "Stage B: steps is [1, 0, -1], expected at least 1, or at least two strictly falling"),
    (dict(steps_b={0.5: 2, 0.7: 2}), "Stage B: steps is {0.5: 2, 0.7: 2}, expected at least 1, or at least two"),
    (dict(steps_c={0.5: 0}), "Stage C: steps is {0.5: 0}, expected at least 1"),
    (dict(steps_c="default"), "Stage C: steps is 'default', expected at least 1"),
    (dict(t_start_c=0.2, t_end_c=0.4), "Stage C: (t_start, t_end) is (0.2, 0.4), expected 1 >= first > second >= 0"),
    (dict(t_start_b=1000), "Stage B: (t_start, t_end) is (1000, 0.0), expected"),
    (dict(sampler_c="euler"), "Stage C: sampler is 'euler', expected one of ddpm, ddim, dpm++"),
    (dict(sampler_b="DDPM"), "Stage B: sampler is 'DDPM', expected one of"),
    (dict(sampler_c="ddim", eta_c=1.5), "Stage C: eta is 1.5, expected a number from 0 to 1"),
    (dict(interval_c=(0.8, 0.2)), "Stage C: interval is (0.8, 0.2), expected two noise levels"),
    (dict(interval_b=(0.5,)), "Stage B: interval is (0.5,), expected two noise levels"),
    (dict(interval_b=0.5), "Stage B: interval is 0.5, expected two noise levels"),
    (dict(guidance_c=(4, 3, 2)), "Stage C: guidance is (4, 3, 2), expected a number, or two"),
    (dict(rescale_b=2), "Stage B: rescale is 2, expected a number from 0"),
    (dict(output="jpg"), "output is 'jpg', expected one of pil, np, pt, semantic, latents_b"),
    (dict(width=0), "width is 0, expected a whole number of px from 64 to 16384"),
    (dict(given=dict(latents_c=torch.zeros(1, 16, 3, 4))),
     "latents_c has shape (1, 16, 3, 4), expected (1, 16, 3, 3)"),
    (dict(given=dict(latents_b=torch.zeros(2, 4, 32, 32))),
     "latents_b has shape (2, 4, 32, 32), expected (1, 4, 32, 32)"),
    (dict(given=dict(semantic=torch.zeros(16, 3, 3))),
     "semantic has shape (16, 3, 3), expected (images or 1, 16, h, w)"),
    (dict(given=dict(semantic=torch.zeros(1, *B)), width=128, height=128),
     "semantic has shape (1, 4, 32, 32), expected (1, 16, 3, 3)"),
    (dict(given=dict(semantic=torch.zeros(1, *C), latents_c=torch.zeros(1, *C))),
     "latents_c specify where Stage C starts, and so do an image and semantic"),
    (dict(edit=InitImage(RIGHT, strength=1.5)),
     "strength is 1.5, expected a number from 0, nothing changes, to 1, nothing is kept"),
    (dict(edit=InitImage(np.zeros((10, 400))), width=200),
     "height is 50, expected a whole number of px from 64 to 16384"),
    (dict(edit=InitImage("no such file.png")), "no such file.png cannot be read: there is no such file"),
    (dict(prompt=[CAT, 3]), "the prompt is empty: describe the image"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES,
                         ids=[f"{' '.join(a)} {i}" for i, (a, _) in enumerate(MISTAKES)])
def test_mistakes_are_found_before_the_first_step(tiny, arguments, message):
    """Those about Stage B as well: with the released weights Stage C takes a minute."""
    with Recorder(tiny.part("stage_c")) as calls_c, Recorder(tiny.part("stage_b")) as calls_b:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            generate(tiny, **dict(prompt=CAT, **QUICK) | arguments)
    assert not calls_c and not calls_b and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["step_c", "init", "temperature_b", "foo"])
def test_an_option_that_does_not_exist_is_refused(tiny, name):
    """Elsewhere a misspelled option is passed on until somebody ignores it."""
    with pytest.raises(TypeError, match=f"there is no option {name} for these weights: expected one of Sampling and"):
        tiny(CAT, **{name: 5})


def test_an_option_of_load_that_does_not_exist_is_refused():
    """As a part from elsewhere it would be ignored, in silence."""
    with pytest.raises(TypeError, match="there is no option priors: expected an option of load, or one of prior, "):
        Wuerstchen.load("tiny", "cpu", priors=TINY / "prior")


def test_true_is_1(tiny):
    """torch refuses to subtract a bool, and says so in the middle of a sampling."""
    assert same(tiny(CAT, seed=5, rescale_c=True, **QUICK)[0], tiny(CAT, seed=5, rescale_c=1, **QUICK)[0])


def test_none_is_the_default_of_the_weights(tiny):
    assert same(tiny(CAT, seed=5, guidance_c=None, **QUICK)[0], tiny(CAT, None, seed=5, **QUICK)[0])


@pytest.mark.parametrize("arguments, error, message", [
    (("",), ValueError, "got prompts [''], expected texts such as"),
    (([],), ValueError, "got prompts [], expected"), ((None,), ValueError, "got prompts [], expected"),
    (([CAT, 3],), ValueError, ", 3], expected texts such as"), ((), ValueError, "got prompts [], expected"),
    ((CAT, ["a"]), TypeError, "negative_prompt is ['a'], expected one text: extras/editing.py takes lists")])
def test_prompts_that_are_none_are_refused(tiny, arguments, error, message):
    with Recorder(tiny.part("stage_c")) as calls, pytest.raises(error, match=re.escape(message)):
        tiny(*arguments, **QUICK)
    assert not calls


def test_every_frame_may_be_of_several_images(tiny):
    assert len(interpolate(tiny, CAT, DOG, 2, num_images=2, **QUICK)) == 4


@pytest.mark.parametrize("tile", [0, -8])
def test_impossible_tiles_are_refused(tiny, tile):
    with pytest.raises(ValueError, match=f"tile is {tile}, expected at least 1 latent per side"):
        memory.tile(tiny, tile)
