"""Arguments of `load` and of a call: every form in which people have their values, one sentence for every mistake."""
import functools
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import lora
import sample
from extras.editing import InitImage, generate, interpolate
from loading import pipeline
from loading.arguments import dtype_of, lora_scales, set_loras, warn_of_size
from loading.lora_formats import save_lora
from speed.memory import tile
from wuerstchen import Wuerstchen, ddim_step

CAT, QUICK = "a cat on a blue background", dict(steps_c=3, steps_b=2)


@pytest.fixture(scope="module")
def tiny() -> Wuerstchen:
    return Wuerstchen.load("tiny", "cpu")


@pytest.fixture(scope="module")
def v1() -> Wuerstchen:
    return Wuerstchen.load("tiny-v1", "cpu")


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[str]:
    """Two LoRAs for the small Stage C, strong enough to be seen."""
    folder, files = tmp_path_factory.mktemp("loras"), []
    for seed in (1, 2):
        stage_c = Wuerstchen.load("tiny", "cpu").stage_c
        torch.manual_seed(seed)
        lora.add_lora(stage_c, rank=2)
        for parameter in lora.lora_parameters(stage_c):
            torch.nn.init.normal_(parameter, std=0.2)
        files.append(str(folder / f"lora{seed}.safetensors"))
        save_lora(stage_c, files[-1])
    return files


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a, b) -> bool:
    return np.array_equal(pixels(a[0]), pixels(b[0]))


def difference(a, b) -> float:
    return np.abs(pixels(a[0]) - pixels(b[0])).mean()


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        call()
    return [str(warning.message) for warning in record]


# --- values as people have them ----------------------------------------------------------------------

@pytest.mark.parametrize("value, dtype", [
    ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16), ("fp16", torch.float16),
    ("float16", torch.float16), ("half", torch.float16), ("fp32", torch.float32), ("float", torch.float32),
    (torch.float16, torch.float16)])
def test_a_dtype_may_be_a_name(value, dtype):
    assert dtype_of(value) == dtype


def pretend_cpu(monkeypatch, avx512_bf16=False, amx=False, machine="x86_64", arm=False) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm or machine == "x86_64",
                        raising=False)
    monkeypatch.setattr("platform.machine", lambda: machine)


@pytest.mark.parametrize("device, processor, dtype", [
    ("cpu", {}, torch.float32), ("cpu", dict(avx512_bf16=True), torch.bfloat16),
    ("cpu", dict(amx=True), torch.bfloat16),
    ("cpu", dict(machine="aarch64"), torch.float32), ("cpu", dict(machine="arm64", arm=True), torch.bfloat16),
    ("cuda", dict(supported=True), torch.bfloat16), ("cuda", dict(supported=False), torch.float16)])
def test_auto_is_bf16_where_there_are_instructions_for_it(device, processor, dtype, monkeypatch):
    """On x86 torch's _is_mkldnn_bf16_supported is true for any AVX-512, where bf16 is the slowest of all."""
    if device == "cpu":
        pretend_cpu(monkeypatch, **processor)
    else:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: processor["supported"])
    assert dtype_of("auto", torch.device(device)) == dtype
    assert dtype_of("bf16", torch.device(device)) == torch.bfloat16
    with pytest.raises(ValueError, match="expected one of fp32"):
        dtype_of("auto")                       # of which device?


def test_auto_loads_bf16_and_a_large_model_is_told_of_it_once(monkeypatch, capfd):
    """Only where it helps: not without the instructions, not if a dtype or int8 is asked for, not for a small model."""
    pretend_cpu(monkeypatch, avx512_bf16=True)
    pipeline.tell_once.cache_clear()
    assert Wuerstchen.load("tiny", "cpu", "auto").dtype == torch.bfloat16
    for options in (dict(dtype="auto", int8=True), {}):
        assert Wuerstchen.load("tiny", "cpu", **options).dtype == torch.float32
    monkeypatch.setattr(pipeline, "LARGE", 1e6)
    for options in (dict(dtype="fp32"), dict(dtype="auto"), dict(int8=True)):
        Wuerstchen.load("tiny", "cpu", **options)
    with monkeypatch.context() as patch:
        pretend_cpu(patch)
        assert Wuerstchen.load("tiny", "cpu", "auto").dtype == Wuerstchen.load("tiny", "cpu").dtype == torch.float32
    assert capfd.readouterr().err == ""
    assert Wuerstchen.load("tiny", "cpu").dtype == Wuerstchen.load("tiny", "cpu").dtype == torch.float32
    error = capfd.readouterr().err
    assert error.startswith("hint: this processor has instructions for bfloat16: with --dtype auto ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["int8", "fp8", 16, "add", torch.int8, np.float32])
def test_what_is_not_a_dtype_is_one_line(value):
    with pytest.raises(ValueError, match=r"^dtype is .*, expected one of fp32, bf16, fp16, .*\.$"):
        Wuerstchen.load("tiny", "cpu", value)


def test_numbers_of_numpy_and_torch_are_numbers(tiny):
    plain = tiny(CAT, seed=7, num_images=1, width=128, height=128, guidance_c=3.0, rescale_c=0.5, **QUICK)
    for whole, real in ((np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, torch.tensor)):
        options = dict(seed=whole(7), num_images=whole(1), width=whole(128), height=whole(128), steps_c=whole(3),
                       steps_b=whole(2), guidance_c=real(3.0), rescale_c=real(0.5))
        assert same(plain, tiny(CAT, **options)) and same(plain, generate(tiny, CAT, **options))


def test_seeds_and_levels_may_be_arrays(tiny):
    two = generate(tiny, CAT, seed=[3, 9], num_images=2, steps_c=[1, 0.5, 0], steps_b=2)
    for array in (np.array, torch.tensor):
        again = generate(tiny, CAT, seed=array([3, 9]), num_images=2, steps_c=array([1, 0.5, 0]), steps_b=2)
        assert all(same([a], [b]) for a, b in zip(two, again))


@pytest.mark.parametrize("form", [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: [*x.split(1)]])
def test_given_tensors_may_be_arrays_or_lists(tiny, form):
    semantic = generate(tiny, CAT, output="semantic", **QUICK)
    text, _ = tiny.encode_text("c", [CAT], [""])
    assert same(generate(tiny, CAT, given=dict(semantic=semantic), **QUICK),
                generate(tiny, CAT, given=dict(semantic=form(semantic)), **QUICK))
    assert same(generate(tiny, CAT, **QUICK), generate(tiny, given=dict(prompt_c=form(text)), **QUICK))


def test_no_seed_is_a_random_one(tiny):
    """As diffusers without a generator: another image each time, and the same again after torch.manual_seed."""
    for call in (tiny, lambda *args, **options: generate(tiny, *args, **options)):
        torch.manual_seed(1)
        first, second = call(CAT, seed=None, **QUICK), call(CAT, seed=None, **QUICK)
        torch.manual_seed(1)
        assert not same(first, second) and same(first, call(CAT, seed=None, **QUICK))


# --- the model tells what it is ----------------------------------------------------------------------

def test_a_model_says_what_was_loaded(tiny, loras):
    assert repr(tiny) == "Wuerstchen(tiny, 128 px, cpu, torch.float32)"
    model = Wuerstchen.load("tiny", "cpu", "bf16", lora={loras[0]: 0.5})
    assert repr(model) == f"Wuerstchen(tiny, 128 px, cpu, torch.bfloat16, LoRA {loras[0]}: 0.5)"


def test_the_parts_are_attributes_and_listed(tiny):
    assert {"stage_a", "stage_b", "stage_c", "text_encoder_c", "text_encoder_b", "image_encoder"} <= set(dir(tiny))
    assert tiny.stage_c is tiny.part("stage_c") and tiny.stage_a is tiny.part("stage_a")
    with pytest.raises(AttributeError, match="Wuerstchen has no unet"):
        tiny.unet


# --- LoRAs of a loaded model -------------------------------------------------------------------------

@pytest.mark.parametrize("form", [str, Path, lambda file: [file], lambda file: {file: 1},
                                  lambda file: {file: np.float32(1)}])
def test_a_lora_is_a_file_or_a_list_or_a_dict(loras, form):
    assert lora_scales(form(loras[0])) == {loras[0]: 1.0}


@pytest.mark.parametrize("value", [5, {"a": "x"}, {"a": float("nan")}, [3], {"a": None}])
def test_what_is_not_a_lora_is_one_line(value):
    with pytest.raises(TypeError, match='expected a file, a list of files, or {"FILE": scale}'):
        lora_scales(value)


@functools.cache
def loaded_with(int8: bool, *loras: tuple[str, float]) -> list:
    """The image of a model that was loaded with these LoRAs."""
    return Wuerstchen.load("tiny", "cpu", lora=dict(loras), int8=int8)(CAT, seed=5, **QUICK)


@pytest.mark.parametrize("options", [dict(), dict(fast=False), dict(low_memory=True), dict(offload=True),
                                     dict(int8=True)], ids=lambda options: str(*options))
def test_loras_of_a_loaded_model_are_those_of_a_new_one(loras, options):
    """Put on, changed in scale, replaced, taken off: each time the image is that of a model loaded so. On int8 as well,
    where a LoRA has to be merged before the weights are rounded."""
    one, other = loras
    model, images = Wuerstchen.load("tiny", "cpu", **options), []
    for wanted in (one, {one: 0.5, other: 1}, other, None):
        model.stage_c                                       # low memory holds it: it must not be taken for the new one
        set_loras(model, wanted)
        images.append(model(CAT, seed=5, **QUICK))
        assert model.loras == lora_scales(wanted)
        assert difference(images[-1], loaded_with("int8" in options, *model.loras.items())) < 0.1, wanted
    assert all(difference(images[-1], image) > 1 for image in images[:-1])


@pytest.mark.parametrize("options", [dict(), dict(low_memory=True)], ids=["in place", "low_memory"])
def test_the_lora_of_the_weights_themselves_stays(loras, options, tmp_path):
    """Named by its file or its run's folder it gets a scale, and without a name its own again: it is never added twice
    and never taken off."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(loras[0], run / "lora.safetensors")
    (run / "base.json").write_text(json.dumps(dict(weights="tiny", files={}, lora="lora.safetensors")))
    model = Wuerstchen.load(run, "cpu", **options)
    for wanted, scales in ((None, {loras[0]: 1.0}), ({run: 0.5}, {loras[0]: 0.5}),
                           ({run / ".." / "run" / "lora.safetensors": 0, loras[1]: 1}, {loras[1]: 1.0}),
                           (loras[1], dict.fromkeys(loras, 1.0)), (None, {loras[0]: 1.0})):
        set_loras(model, wanted)
        assert difference(model(CAT, seed=5, **QUICK), loaded_with(False, *scales.items())) < 0.1, wanted


def test_loras_under_compile(loras, monkeypatch):
    """torch notices the change and traces once more. Here it only traces, which takes seconds."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, mode: compile(step, backend="eager"))
    torch._dynamo.reset()
    model = Wuerstchen.load("tiny", "cpu", compile=True)
    for wanted in ({}, {loras[0]: 1.0}, {loras[0]: 0.5}, {}):
        set_loras(model, wanted)
        assert difference(model(CAT, seed=5, **QUICK), loaded_with(False, *wanted.items())) < 0.1


@pytest.mark.parametrize("options", [dict(), dict(low_memory=True)], ids=["in place", "low_memory"])
def test_a_lora_that_cannot_be_used_changes_nothing(loras, options, tmp_path):
    (tmp_path / "bad.safetensors").write_text("not a LoRA")
    model = Wuerstchen.load("tiny", "cpu", lora=loras[0], **options)
    before = model(CAT, seed=5, **QUICK)
    with pytest.raises(ValueError, match="bad.safetensors is not a file of weights"):
        set_loras(model, [loras[1], tmp_path / "bad.safetensors"])
    assert model.loras == {loras[0]: 1.0} and same(before, model(CAT, seed=5, **QUICK))


def test_without_stage_c_there_is_nothing_to_change(loras):
    from loading import hub
    with pytest.raises(ValueError, match="a LoRA changes Stage C, which was not loaded"):
        set_loras(Wuerstchen.load("tiny", "cpu", parts=hub.RECONSTRUCTION), loras[0])


# --- warnings ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0, 0.0, 0.99, (4, 0.5), np.float32(0)])
@pytest.mark.parametrize("stage", "cb")
@pytest.mark.parametrize("weights", ["tiny", "v1"])
def test_a_guidance_below_1_is_one_warning_that_names_both_conventions(request, weights, stage, scale):
    """0.0, which documents of diffusers pass for "no guidance", ignores the text here: two brown lumps."""
    model = request.getfixturevalue(weights)
    messages = said(lambda: model.settings({f"guidance_{stage}": scale}))
    assert len(messages) == 1 and messages[0].startswith(f"guidance_{stage} is below 1: here 1 is no guidance, and 0 "
                                                          "ignores the text")
    assert "in diffusers 0.0 to 1.0 is no guidance" in messages[0]


@pytest.mark.parametrize("scale", [1, 1.0, 4, (4, 1), None, -1])
def test_other_guidance_is_no_warning(tiny, scale):
    assert said(lambda: tiny.settings(dict(guidance_c=scale, guidance_b=scale))) == []


def test_the_warnings_come_once_in_python_and_on_the_command_line(tiny, tmp_path, capsys):
    options = dict(QUICK, guidance_b=0.0, width=64, height=64)
    for call in (lambda: [tiny(CAT, **options) for _ in range(2)], lambda: generate(tiny, CAT, **options)):
        messages = said(call)
        assert [message[:10] for message in messages] == ["guidance_b", "64 x 64 px"]
    for number, argv in enumerate((["--guidance-b", "0"], ["--guidance-c", "0.5"])):
        sample.main(["--prompt", CAT, "--num-images", "2", "--steps-c", "2", "--steps-b", "1", "--width", "64",
                     "--out", str(tmp_path / str(number)), *argv])
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
        assert len(lines) == 2 and f"{argv[0][2:].replace('-', '_')} is below 1" in lines[0]
        assert "64 x 128 px is not what these weights were trained on" in lines[1]


@pytest.mark.parametrize("size, trained, effect", [
    ((256, 256), 1024, "a mosaic instead of"), ((1024, 256), 1024, "a mosaic"), ((128, 128), 512, "a mosaic"),
    ((512, 512), 1024, "blurred or crowded"), ((2048, 2048), 1024, "repeated")])
def test_a_size_far_below_training_is_said_to_give_mosaics(size, trained, effect):
    message, = said(lambda: warn_of_size(*size, trained))
    assert f"expect {effect}" in message


# --- one sentence for every mistake ------------------------------------------------------------------

ODD = ["abc", 5.5, [], {}, object(), {"a": 1}, [None], [1, "a"], b"cat", torch.Generator()]
PLAIN = ("prompt", "negative_prompt", "seed", "num_images", "width", "height", "callback")
FIELDS = [f"{name}_{stage}" for stage in "cb" for name in (
    "steps", "sampler", "guidance", "interval", "rescale", "eta", "t_start", "t_end")]
V1 = ["steps_b", "sampler_b", "guidance_b", "temperature_b", "interval_b"]
EXPECTED = "expected|got|describe|give"
PYTHONS_OWN = "object is not|not supported between|has no attribute|unhashable|must be real"


def mistakes(call, names, fine=()) -> None:
    for name in names:
        for value in ODD:
            if (name, value) in fine or isinstance(value, str) and "prompt" in name or \
                    value == 5.5 and name[:-2] in ("guidance", "temperature"):
                continue
            with pytest.raises((TypeError, ValueError)) as error:
                call(**dict(prompt=CAT) | {name: value})
            message = str(error.value)
            assert "\n" not in message and len(message) < 400, message
            assert re.search(EXPECTED, message) and not re.search(PYTHONS_OWN, message), (name, value)


def test_wrong_types_of_a_call_are_one_sentence(tiny, v1):
    mistakes(tiny, PLAIN + tuple(FIELDS))
    mistakes(v1, V1)


def test_wrong_types_of_generate_are_one_sentence(tiny):
    def call(**options):
        return generate(tiny, **options)
    mistakes(call, PLAIN + ("edit", "given", "output"), fine=[("negative_prompt", []), ("given", {})])
    black = np.zeros((128, 128, 3), np.uint8)
    mistakes(lambda prompt, strength: generate(tiny, prompt, edit=InitImage(black, strength)), ["strength"])
    mistakes(lambda prompt, tensor: generate(tiny, prompt, given=dict(semantic=tensor)), ["tensor"])


@pytest.mark.parametrize("weights, stage, shape", [("tiny", "C", "(1, 16, 3, 3)"), ("tiny", "B", "(1, 4, 32, 32)"),
                                                   ("v1", "B", "(1, 32, 32)")])
@pytest.mark.parametrize("answer", [False, True, "stop", 0, [1]])
def test_a_callback_that_returns_something_else_is_one_line(request, weights, stage, shape, answer):
    with pytest.raises(ValueError, match=re.escape(f"a callback may return None or finite latents of shape {shape}, "
                                                   f"not {answer!r}")) as error:
        request.getfixturevalue(weights)(CAT, callback=lambda s, *_: answer if s == stage else None, **QUICK)
    assert ("To stop, raise an exception" in str(error.value)) == (answer is False)


LONE = "a \ud800 cat"
NAN, COMPLEX = torch.full((1, 16, 3, 3), float("nan")), torch.zeros(1, 16, 3, 3, dtype=torch.complex64)
IMAGE = np.zeros((128, 128, 3), np.uint8)


@pytest.mark.parametrize("call, message", [
    (lambda m: m(LONE), r"prompt is 'a \ud800 cat', expected text"),
    (lambda m: m(CAT, LONE), r"negative_prompt is 'a \ud800 cat', expected text"),
    (lambda m: generate(m, [CAT, LONE]), r"prompt is 'a \ud800 cat', expected text"),
    (lambda m: interpolate(m, CAT, LONE), r"is 'a \ud800 cat', expected text"),
    (lambda m: m(CAT, steps_c=["a", "b"]), "steps_c is ['a', 'b'], expected a number such as 29"),
    (lambda m: m(CAT, guidance_c=1j), "guidance_c is 1j, expected a number, or two"),
    (lambda m: m(CAT, guidance_b=[1, 1j]), "guidance_b is [1, 1j], expected a number, or two"),
    (lambda m: m(CAT, width="128"), "width is '128', expected a whole number of px"),
    (lambda m: m(CAT, num_images=0), "num_images is 0, expected a whole number from 1 to 10000"),
    (lambda m: m(CAT, seed=1.5), "seed is 1.5, expected one whole number, or None"),
    (lambda m: m(promt=CAT), "there is no option promt for these weights: .*; did you mean prompt\\?$"),
    (lambda m: generate(m, CAT, step_c=3), "there is no option step_c .*; did you mean steps_c\\?$"),
    (lambda m: generate(m, CAT, seed="1"), "seed is '1', expected a whole number"),
    (lambda m: generate(m, CAT, seed="12"), "seed is '12', expected a whole number"),
    (lambda m: generate(m, CAT, seed=["1"]), "seed is ['1'], expected a whole number"),
    (lambda m: generate(m, CAT, edit=InitImage(IMAGE, mask=3)), "the mask cannot be read: got int"),
    (lambda m: generate(m, CAT, given=dict(semantic=NAN)), "semantic contains NaN or infinity, expected"),
    (lambda m: generate(m, CAT, given=dict(latents_b=[[float("inf")]])), "latents_b contains NaN or infinity"),
    (lambda m: generate(m, given=dict(prompt_c=NAN[0])), "prompt_c contains NaN or infinity"),
    (lambda m: generate(m, CAT, given=dict(latents_c=COMPLEX)), "latents_c is tensor(.*, expected a tensor, an array"),
    (lambda m: generate(m, CAT, given=dict(latents_c=COMPLEX.numpy())), "latents_c is array(.*, expected a tensor, an"),
    (lambda m: m(CAT, eta_c=0.9), "eta_c is 0.9, expected sampler_c=\"ddim\" with it: 'ddpm' has no eta"),
    (lambda m: m(CAT, steps_c=[1, 0.5, 0], t_end_c=0.4), "t_start_c and t_end_c are for a number of steps: [1, 0.5"),
    (lambda m: m(CAT, steps_b={0.5: 2, 0: 1}, t_end_b=0.4), "t_start_b and t_end_b are for a number of steps"),
    (lambda m: interpolate(m, CAT, CAT, 2.5), "frames is 2.5, expected a whole number"),
    (lambda m: interpolate(m, CAT, CAT, "3"), "frames is '3', expected a whole number"),
    (lambda m: interpolate(m, CAT, CAT, batch=0), "batch is 0, expected a whole number from 1 to 10000"),
    (lambda m: interpolate(m, CAT, CAT, seed=[1]), "seed is [1], expected a whole number"),
    (lambda m: interpolate(m, CAT, CAT, to_seed="1"), "to_seed is '1', expected a whole number"),
    (lambda m: interpolate(m, CAT, CAT, given=3), "got given 3 and edit None, expected"),
    (lambda m: interpolate(m, 3, 4), "the ends have shapes () and (), expected"),
    (lambda m: interpolate(m, NAN, NAN), "semantic contains NaN or infinity"),
    (lambda m: tile(m, "x"), "tile is 'x', expected at least 1"),
    (lambda m: set_loras("x", None), "model is 'x', expected a loaded model"),
    (lambda m: Wuerstchen.load(3), "weights is 3, expected a name such as \"tiny\""),
    (lambda m: Wuerstchen.load(["tiny"]), "weights is ['tiny'], expected a name"),
    (lambda m: Wuerstchen.load("tiny", prior=3), "prior is 3, expected a name"),
    (lambda m: Wuerstchen.load("tiny", parts="decoder"), "parts is 'decoder', expected a list with some of prior, "),
    (lambda m: Wuerstchen.load("tiny", parts=3), "parts is 3, expected a list with some of prior, "),
    (lambda m: Wuerstchen.load("tiny", parts=("foo",)), "there is no part called 'foo': expected some of prior, "),
    (lambda m: Wuerstchen.load("tiny", dtyp="bf16"), "there is no option dtyp: .*; did you mean dtype\\?$"),
    (lambda m: Wuerstchen.load("tiny", torch_dtype=1), "load has no option torch_dtype: use dtype="),
    (lambda m: Wuerstchen.load("tiny", cache_dir="x"), "load has no option cache_dir: set HF_HOME instead")])
def test_a_mistake_is_one_sentence_that_names_it_before_the_first_step(tiny, call, message, monkeypatch):
    monkeypatch.setattr(tiny, "sample_c", None)
    monkeypatch.setattr(tiny, "sample_b", None)
    pattern = message if message.endswith("$") else ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises((TypeError, ValueError), match=pattern) as error:
        call(tiny)
    assert "\n" not in str(error.value) and not re.search(PYTHONS_OWN, str(error.value))


def test_a_hint_at_another_name_is_a_sentence(tiny):
    for name, hint in dict(to="use Wuerstchen.load", vqgan="use model.stage_a", images="the result of a call is",
                           enable_vae_slicing="not needed").items():
        with pytest.raises(AttributeError, match=f"Wuerstchen has no {name}: {re.escape(hint)}"):
            getattr(tiny, name)


def test_a_lora_given_twice_is_refused(loras, monkeypatch):
    monkeypatch.chdir(Path(loras[0]).parent)
    for value in ([loras[0]] * 2, [loras[0], Path(loras[0])], {loras[0]: 1, Path(loras[0]).name: 0.5}):
        with pytest.raises(ValueError, match=r"LoRA \S*lora1.safetensors is given twice, expected once"):
            lora_scales(value)


def test_settings_that_do_something_are_taken(tiny):
    for sampler in ("ddim", ddim_step):
        assert tiny.settings(dict(eta_c=0.9, sampler_c=sampler))[0].eta == 0.9
    assert tiny.settings(dict(eta_c=0, steps_b={0.5: 2, 0: 1}, t_start_b=0.8))[1].levels[0] == torch.tensor(0.8)


def test_a_text_encoder_brings_its_tokenizer(tiny):
    model = Wuerstchen.load("tiny", "cpu", parts=["prior", "prior_text_encoder"])
    for found, expected in zip(model.encode_text("c", CAT, ""), tiny.encode_text("c", [CAT], [""])):
        assert torch.equal(found, expected)
    assert set(model.networks) >= {"stage_c", "text_encoder_c"} and "stage_b" not in model.networks


def test_a_path_that_is_no_folder_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repr(Wuerstchen.load(Path("tiny"), "cpu")) == "Wuerstchen(tiny, 128 px, cpu, torch.float32)"


def test_interpolate_takes_what_generate_takes(tiny):
    a, b = (generate(tiny, CAT, seed=seed, output="semantic", **QUICK) for seed in (1, 2))
    frames = interpolate(tiny, a, b, 3, **QUICK)
    for form in (lambda x: x.numpy(), lambda x: x.tolist()):
        again = interpolate(tiny, form(a), form(b), np.int64(3), seed=np.int64(0), given=None, **QUICK)
        assert all(same([x], [y]) for x, y in zip(frames, again, strict=True))
    torch.manual_seed(1)
    first, other = interpolate(tiny, a, b, 2, seed=None, **QUICK), interpolate(tiny, a, b, 2, seed=None, **QUICK)
    torch.manual_seed(1)
    assert not same(first, other) and same(first, interpolate(tiny, a, b, 2, seed=None, **QUICK))
