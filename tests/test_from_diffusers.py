"""docs/SAMPLING.md for those who come from diffusers: each row is tried, some against diffusers if it is installed.

The code in a row's column "here" runs on the small model, with few steps; Wuerstchen.load only checks its arguments
there and returns that model. An argument or method of diffusers that does not exist here must be an error that names
ours.
"""
import functools
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lora
import sample
from extras import cli, editing
from helpers import COMBINED, rel, theirs
from loading import arguments, hub, pipeline
from loading.arguments import set_loras
from speed.memory import tile
from wuerstchen import Sampling, Wuerstchen, latent_sizes

pytestmark = [pytest.mark.filterwarnings("ignore:.*not what these weights were trained on"),
              pytest.mark.filterwarnings("ignore:the model does not know")]
DOC = (Path(__file__).parents[1] / "docs" / "SAMPLING.md").read_text(encoding="utf-8")
QUICK, PROMPT = dict(steps_c=2, steps_b=1, height=128, width=128), "a cat on a blue background"


def section(title: str) -> str:
    return re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", DOC, re.M | re.S)[1]


def rows(title: str) -> list[list[str]]:
    return cells([line for line in section(title).splitlines() if line.startswith("|")][2:])


def cells(table: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def code(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


CALL, LOAD, METHODS = rows("Arguments of a call"), rows("Classes and loading"), rows("Methods and attributes")
TRIED = [(row[0], row[2]) for row in CALL] + [(row[0], row[1]) for row in LOAD + METHODS]


@pytest.fixture(scope="module")
def tiny() -> Wuerstchen:
    return Wuerstchen.load("tiny", "cpu")


@pytest.fixture
def names(tiny, monkeypatch) -> dict:
    """What the code of the document may use."""
    class Quick:
        def __call__(self, *args, **options):
            return tiny(*args, **QUICK | options)

        def __getattr__(self, name):
            return getattr(tiny, name)

    def generate(model, *args, **options):
        sizes = {} if options.get("given", {}).keys() & {"semantic"} else QUICK
        return editing.generate(tiny, *args, **QUICK | sizes | options)

    def load(weights, *args, **options):
        assert weights in hub.NAMES
        inspect.signature(pipeline.load).bind(weights, *args, **options)
        assert options.keys() <= inspect.signature(pipeline.load).parameters.keys() | set(pipeline.FILES)
        return Quick()

    class Loader:
        pass
    Loader.load = load
    monkeypatch.setenv("HF_HOME", os.environ.get("HF_HOME", ""))
    text = tiny.encode_text("c", [PROMPT], [""])[0]
    names = dict(Wuerstchen=Loader, model=Quick(), generate=generate, prompt=PROMPT, os=os, torch=torch, lora=lora,
                 latent_sizes=latent_sizes, text_c=text, text_b=text, latents_c=torch.randn(1, 16, 3, 3),
                 semantic=generate(None, PROMPT, output="semantic"),
                 set_loras=lambda model, loras: set_loras(tiny, loras),
                 tile=lambda model, size: inspect.signature(tile).bind(model, size))
    exec(re.search(r"```python\n(def later.*?)```", DOC, re.S)[1], names)
    return names


# --- each row is tried -------------------------------------------------------------------------------

@pytest.mark.parametrize("theirs, here", TRIED, ids=[re.sub(r"\W+", " ", theirs)[:40] for theirs, _ in TRIED])
def test_the_code_of_each_row_runs(names, theirs, here):
    expression, = code(here)
    result = eval(expression, names)
    assert result is not None or expression.startswith("set_loras")
    if expression.startswith("model(prompt") and isinstance(result, list):
        assert all(image.size == (128, 128) for image in result)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", section("The documented examples"), re.S))
def test_the_documented_examples_run(names, block):
    small = block.replace("width=1536, height=1024", "width=192, height=128").replace("steps_c=29", "steps_c=3")
    exec(small, names)
    if "images" in small:
        assert {image.size for image in names["images"]} == {(192, 128)} and len(names["images"]) in (2, 4)


OURS = {"prompt", "negative_prompt", "height", "width", "image_embeddings"}


@pytest.mark.parametrize("theirs", [name for row in CALL for name in code(row[0]) if name not in OURS])
def test_an_argument_of_theirs_is_an_error_that_names_ours(tiny, theirs):
    for call in (tiny, functools.partial(editing.generate, tiny)):
        with pytest.raises(TypeError, match=f"there is no argument {theirs} here: ") as error:
            call(PROMPT, **{theirs: None})
    row, = (row for row in CALL if theirs in code(row[0]))
    ours = set(re.findall(r'(\w+)=|"(\w+)":|(\[0\])', row[2]))
    said = str(error.value)
    assert any(name in said for names in ours for name in names if name) or theirs in ("return_dict", "callback") \
        or "callback(" in said


@pytest.mark.parametrize("theirs", [name for row in LOAD for name in code(row[0]) if name in arguments.LOAD])
def test_an_option_of_their_loading_is_an_error_that_names_ours(theirs):
    with pytest.raises(TypeError, match=f"load has no option {theirs}: "):
        Wuerstchen.load("tiny", "cpu", **{theirs: "x"})


@pytest.mark.parametrize("theirs", ["to"] + [name for row in METHODS for name in code(row[0])
                                             if name != "torch.compile"])
def test_a_method_of_theirs_is_an_error_that_names_ours(tiny, theirs):
    with pytest.raises(AttributeError, match=f"Wuerstchen has no {theirs}: ") as error:
        getattr(tiny, theirs)
    assert arguments.METHODS[theirs] in str(error.value)


# --- nothing of theirs is missing --------------------------------------------------------------------

PIPELINES = dict(pipeline_wuerstchen_combined="WuerstchenCombinedPipeline",
                 pipeline_wuerstchen_prior="WuerstchenPriorPipeline", pipeline_wuerstchen="WuerstchenDecoderPipeline")


@pytest.mark.parametrize("file, name", PIPELINES.items())
def test_each_class_and_argument_has_its_row(file, name):
    cls = theirs(file, name)
    documented = {name for row in CALL + LOAD + METHODS for name in code(row[0])}
    same_here = {"decoder", "vqgan", "text_encoder", "prior_text_encoder", "prior"}      # parts, options of load
    assert name in documented
    for function in (cls.__call__, cls.__init__):
        for argument in inspect.signature(function).parameters.keys() - {"self", "kwargs"} - same_here:
            assert argument in documented, f"{argument} of {name} has no row"


def test_their_defaults_are_as_the_table_says():
    """combined / prior / decoder, in the order of PIPELINES; one value where only one has it or all have the same."""
    signatures = [inspect.signature(theirs(*item).__call__).parameters for item in PIPELINES.items()]
    for row in CALL:
        for name in code(row[0]):
            found = [str(parameters[name].default) for parameters in signatures
                     if name in parameters and parameters[name].default is not inspect.Parameter.empty]
            said = [part.strip() for part in row[1].split("/") if part.strip()]
            found = [re.sub(r"[\['\]]", "", value) for value in found]
            if found and said:
                assert said in (found, list(dict.fromkeys(found))), (name, found)


# --- the same numbers --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair():
    """The small combined pipeline of golden/, in diffusers and here. Random weights: only numbers are compared."""
    combined = theirs("pipeline_wuerstchen_combined", "WuerstchenCombinedPipeline")
    from diffusers import DDPMWuerstchenScheduler
    from transformers import AutoTokenizer, CLIPTextModel
    classes = dict(decoder=theirs("modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt"),
                   vqgan=theirs("modeling_paella_vq_model", "PaellaVQModel"),
                   prior_prior=theirs("modeling_wuerstchen_prior", "WuerstchenPrior"))
    parts = {name: cls.from_pretrained(COMBINED / name, low_cpu_mem_usage=False) for name, cls in classes.items()}
    for prefix in ("", "prior_"):
        parts |= {f"{prefix}text_encoder": CLIPTextModel.from_pretrained(COMBINED / f"{prefix}text_encoder"),
                  f"{prefix}tokenizer": AutoTokenizer.from_pretrained(COMBINED / f"{prefix}tokenizer"),
                  f"{prefix}scheduler": DDPMWuerstchenScheduler()}
    reference = combined(**parts)
    reference.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    model = Wuerstchen.load(COMBINED, "cpu")
    model.size = 128
    return reference, model


LEVELS_C, LEVELS_B = [1.0, 0.8, 0.5, 0.0], [1.0, 0.5, 0.0]
THERE = dict(prompt="a photo of a cat", height=128, width=128, prior_timesteps=LEVELS_C, decoder_timesteps=LEVELS_B,
             output_type="pt")
HERE = dict(steps_c=LEVELS_C, steps_b=LEVELS_B, output="pt", guidance_c=4.0, guidance_b=1)


def noise(seed: int, n: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(n, *shape, generator=generator)


CASES = dict(
    generator=(lambda g: dict(generator=g), lambda: dict(seed=5)),
    prior_guidance_scale=(lambda g: dict(generator=g, prior_guidance_scale=8.0), lambda: dict(seed=5, guidance_c=8.0)),
    guidance_0=(lambda g: dict(generator=g, decoder_guidance_scale=0.0), lambda: dict(seed=5, guidance_b=1)),
    guidance_2=(lambda g: dict(generator=g, decoder_guidance_scale=2.0), lambda: dict(seed=5, guidance_b=2.0)),
    negative_prompt=(lambda g: dict(generator=g, negative_prompt="the moon"), lambda: dict(seed=5,
                                                                                           negative_prompt="the moon")),
    num_images_per_prompt=(lambda g: dict(generator=g, num_images_per_prompt=2),
                           lambda: dict(seed=noise(5, 2), num_images=2)),
    latents=(lambda g: dict(generator=g, latents=noise(9, 1)(16, 3, 3)),
             lambda: dict(seed=noise(5, 1), given={"latents_c": noise(9, 1)(16, 3, 3)})),
    output_type=(lambda g: dict(generator=g, output_type="latent"), lambda: dict(seed=5, output="latents_b")),
    callback=(lambda g: dict(generator=g, prior_callback_on_step_end=lambda pipe, i, t, kwargs:
                             {"latents": kwargs["latents"] * 0.9}),
              lambda: dict(seed=5, callback=lambda stage, i, t, x, x_0: x * 0.9 if stage == "C" else None)))


@pytest.mark.parametrize("name", CASES)
def test_theirs_and_ours_give_the_same_images(pair, name):
    """For one image their generator and our seed draw the same numbers; for several, seed is a function that draws."""
    reference, model = pair
    there, here = CASES[name]
    options = HERE | here()
    result = editing.generate(model, THERE["prompt"], **options)
    expected = reference(**THERE | there(torch.Generator().manual_seed(5)))[0] if name == "output_type" else \
        reference(**THERE | there(torch.Generator().manual_seed(5)), return_dict=False)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert result.shape == expected.shape and rel(result, expected) < 1e-4


def test_embeddings_and_two_pipelines_are_theirs(pair):
    """Their prior's image_embeddings are our semantic latents, and prompt_embeds our prompt_c."""
    reference, model = pair
    embeds, negative = model.encode_text("c", ["a photo of a dog"], [""])
    generator = torch.Generator().manual_seed(5)
    expected = reference.prior_pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, height=128, width=128,
                                    timesteps=LEVELS_C, guidance_scale=4.0, generator=generator).image_embeddings
    semantic = editing.generate(model, seed=5, given={"prompt_c": embeds, "negative_c": negative}, steps_c=LEVELS_C,
                                output="semantic", height=128, width=128)
    assert rel(semantic, expected) < 1e-4
    expected = reference.decoder_pipe(expected, "a photo of a dog", timesteps=LEVELS_B, generator=generator,
                                      output_type="pt").images
    image = editing.generate(model, "a photo of a dog", seed=5, given={"semantic": semantic}, **HERE)
    assert rel(image, expected) < 1e-4


def test_the_text_can_change_on_the_way(names):
    """What their callbacks do with embeddings takes two calls here. The image is that of neither text."""
    whole = dict(steps_c=[1.0, 0.75, 0.5, 0.25, 0.0], steps_b=1)
    dog = "a dog on a red background"
    later, generate = names["later"], names["generate"]
    mixed, first, second = (np.asarray(images[0]).astype(int) for images in (
        later(None, PROMPT, dog), generate(None, PROMPT, **whole), generate(None, dog, **whole)))
    assert min(np.abs(mixed - first).mean(), np.abs(mixed - second).mean()) > 1


# --- where an option lives ---------------------------------------------------------------------------

def test_each_option_of_the_command_line_is_where_the_page_says():
    options = {action.dest for action in sample.parser()._actions} - {"help"}
    table = DOC[DOC.index("| where | options |"):].split("\n\n")[0].splitlines()[2:]
    listed = {where: set(code(names)) for where, names in cells(table)}
    load, call, functions, only = listed.values()
    call |= {name[:-2] + "_b" for name in call if name.endswith("_c")}
    together = [*load, *call, *functions, *only]
    assert len(together) == len(set(together)) and set(together) == options
    assert load <= inspect.signature(pipeline.load).parameters.keys() | set(pipeline.FILES)
    arguments_of_call = inspect.signature(Wuerstchen.__call__).parameters.keys()
    fields = {f"{name}_{stage}" for name in Sampling.__dataclass_fields__ for stage in "cb"} | {"temperature_b"}
    assert call <= arguments_of_call | fields and set(cli.OF_STAGES) <= call
    assert not (functions | only) & (arguments_of_call | inspect.signature(pipeline.load).parameters.keys())


def test_the_seed_is_0_in_python_and_random_on_the_command_line():
    assert inspect.signature(Wuerstchen.__call__).parameters["seed"].default == 0
    assert inspect.signature(editing.generate).parameters["seed"].default == 0
    assert sample.parser().get_default("seed") is None
    assert re.search(r"seed is 0.*?command\s+line.*?random", DOC, re.S | re.I)
