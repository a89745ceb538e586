"""The small model that ships: its images show what the prompt asks for, and diffusers also reads its folder."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extras.editing import encode_image, generate
from tiny.evaluate import fixed_prompts
from tiny.judge import Judge, verdict
from training.samples import to_tensor
from training.scenes import Scene, render
from wuerstchen import Wuerstchen

TINY = Path(__file__).parent.parent / "models" / "tiny"
TINY_V1 = TINY.parent / "tiny-v1"


@pytest.fixture(scope="module")
def tiny() -> Wuerstchen:
    return Wuerstchen.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def tiny_v1() -> Wuerstchen:
    return Wuerstchen.load("tiny-v1", device="cpu")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_the_weights_are_small_enough_to_ship():
    """Nobody should need a download for the first image: < 16 MiB a file, < 40 MiB in all."""
    sizes = [path.stat().st_size for folder in (TINY, TINY_V1) for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < 16 * 2 ** 20 and sum(sizes) < 40 * 2 ** 20


def test_the_weights_are_stored_in_float16():
    """As their page says. Training from random weights gives float32, twice as large; only statistics keep it."""
    files = [*TINY.rglob("*.safetensors"), *TINY_V1.rglob("*.safetensors")]
    stored = {name: tensor.dtype for file in files for name, tensor in load_file(file).items()
              if tensor.is_floating_point() and "running_" not in name}
    assert len(files) == 6 and set(stored.values()) == {torch.float16}


def test_images_of_twelve_fixed_prompts_are_right(tiny, judge):
    """Objects, their relation and the background, as the judge sees them; at least 10 of 12."""
    facts = fixed_prompts()[:12]
    images = tiny([fact["prompt"] for fact in facts], seed=0)
    verdicts = [verdict(*judge.find(image), fact).values() for image, fact in zip(images, facts)]
    right = [all(value is not False for value in values) for values in verdicts]         # None: not in the prompt
    assert sum(right) >= 10, [fact["prompt"] for fact, ok in zip(facts, right) if not ok]


def test_the_background_is_always_right(tiny, judge):
    """The colour in the caption is the colour of the image: 12 of 12."""
    facts = fixed_prompts()[:12]
    images = tiny([fact["prompt"] for fact in facts], seed=0)
    assert [judge.find(image, most=0)[1] for image in images] == [fact["colour"] for fact in facts]


def test_an_image_survives_its_semantic_latent(tiny, judge):
    """128 x 128 x 3 numbers through 3 x 3 x 16 and back: the same objects on the same background."""
    scene = Scene(("rocket", "moon"), (56, 56), ((36, 68), (92, 60)), "blue", "left of")
    semantic = encode_image(tiny, to_tensor(render(scene)[None]))                        # (1, 16, 3, 3)
    assert semantic.shape == (1, 16, 3, 3)
    image, = generate(tiny, given={"semantic": semantic}, seed=0)
    found, colour = judge.find(image)
    assert colour == "blue" and {name for name, *_ in found} == {"rocket", "moon"}


def test_v1_generates_tokens_that_show_what_the_prompt_asks_for(tiny_v1, judge):
    """9 of the 12 are right; of all 256, three quarters. The background is always right."""
    facts = fixed_prompts()[:12]
    images = tiny_v1([fact["prompt"] for fact in facts], seed=0)
    verdicts = [verdict(*judge.find(image), fact) for image, fact in zip(images, facts)]
    assert all(seen["background"] for seen in verdicts)
    right = [all(value is not False for value in seen.values()) for seen in verdicts]
    assert sum(right) >= 7, [fact["prompt"] for fact, ok in zip(facts, right) if not ok]


def test_v1_and_v2_generate_from_the_same_semantic_latent(tiny, tiny_v1, judge):
    """Both share Stage C; they differ in how Stage B turns its latent into Stage A's."""
    prompt = "a penguin above a turtle on a purple background"
    semantic = generate(tiny, prompt, seed=10, output="semantic")                        # (1, 16, 3, 3)
    assert torch.equal(generate(tiny_v1, prompt, seed=10, output="semantic"), semantic)
    for model in (tiny, tiny_v1):
        found, colour = judge.find(generate(model, prompt, given={"semantic": semantic}, seed=10)[0])
        assert colour == "purple"
        assert {name: y > 64 for name, _, (_, y), _ in found} == {"penguin": False, "turtle": True}


@pytest.mark.parametrize("folder, least", [(TINY, dict(background=0.98, single_object=0.95, pair_held_out=0.80)),
                                           (TINY_V1, dict(background=0.98, pair_held_out=0.70))])
def test_the_recorded_evaluation_reaches_the_goals(folder, least):
    """All 256 prompts, as `python -m tiny.evaluate --weights NAME --out ...` wrote it with default settings."""
    report = json.loads((folder / "evaluation.json").read_text())
    settings, run = report["settings"], report["runs"][0]
    assert settings["weights"] == folder.name and settings["prompts"] == len(run["pictures"]) == 256
    assert all(settings[f"{name}_{stage}"] is None for name in ("steps", "sampler", "guidance") for stage in "cb")
    assert all(run["figures"][name]["right"] >= fraction for name, fraction in least.items())


def test_diffusers_generates_the_same_image_from_the_same_folder(tiny):
    """Component by component, as its combined loader looks for a module that has moved; same seed, same draws."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: it is the oracle of this test")
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
    from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen import WuerstchenDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import (
        DEFAULT_STAGE_C_TIMESTEPS, WuerstchenPriorPipeline)
    from diffusers.schedulers import DDPMWuerstchenScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    def load(kind, name):
        return kind.from_pretrained(TINY / name, torch_dtype=torch.float32) if kind is not CLIPTokenizer \
            else kind.from_pretrained(TINY / name)
    tokenizer, text = load(CLIPTokenizer, "tokenizer"), load(CLIPTextModel, "text_encoder").eval()
    scheduler = DDPMWuerstchenScheduler.from_pretrained(TINY / "scheduler")
    prior = WuerstchenPriorPipeline(tokenizer=tokenizer, text_encoder=text, prior=load(WuerstchenPrior, "prior"),
                                    scheduler=scheduler)
    decoder = WuerstchenDecoderPipeline(tokenizer=tokenizer, text_encoder=text, scheduler=scheduler,
                                        decoder=load(WuerstchenDiffNeXt, "decoder"), vqgan=load(PaellaVQModel, "vqgan"))
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)

    prompt, generator = "a red apple on a blue background", torch.Generator().manual_seed(3)
    embedding = prior(prompt, height=128, width=128, timesteps=DEFAULT_STAGE_C_TIMESTEPS, guidance_scale=2.0,
                      generator=generator).image_embeddings
    theirs = decoder(embedding, prompt, num_inference_steps=12, guidance_scale=4.0, generator=generator,
                     output_type="np").images[0]
    ours = np.asarray(tiny(prompt, seed=3, guidance_b=4.0)[0]) / 255   # theirs takes no guidance that falls
    assert np.abs(ours - theirs).max() < 2 / 255
