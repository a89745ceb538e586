"""The command line: the files it writes, and the errors it reports, each in one line.

Most tests call sample.main in this process, because each new one imports torch and transformers for seconds. The
smallest weights, PUBLISHED, generate noise. That is enough if images are compared with each other. The weights that
ship also encode images.
"""
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tokenizers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import loading.files
import sample
from extras import cli, editing, modes
from extras.metadata import read_settings, save_png
from helpers import PUBLISHED, SMALL_V1, small_v1
from loading import pipeline
from speed import memory
from v1.pipeline import TokenSampling
from wuerstchen import Sampling, Wuerstchen, latent_sizes

QUICK = ["--weights", str(PUBLISHED), "--width", "128", "--height", "128", "--steps-c", "3", "--steps-b", "2"]
SIZE = "warning: 128 x 128 px is not what these weights were trained on"         # 1024 px is assumed for theirs
LONG = "the old red house by the lake at night, the old red house by the lake at night, and much MORE of it"
TINY = Path(sample.__file__).parent / "models" / "tiny"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


LOADED = {}


@pytest.fixture(autouse=True)
def weights_are_loaded_once(monkeypatch):
    """Loading takes longer than sampling with weights this small. Those that a test may damage are loaded each time."""
    load = Wuerstchen.load

    @functools.wraps(load)
    def once(weights, *args, **options):
        if weights not in (None, "tiny", str(PUBLISHED)):
            return load(weights, *args, **options)
        key = str((weights, args, sorted(options.items())))
        if key not in LOADED:
            LOADED[key] = load(weights, *args, **options)
        return copy.copy(LOADED[key])        # --tile and previews are set on the pipeline itself
    monkeypatch.setattr(Wuerstchen, "load", once)


def run(*argv: str) -> None:
    sample.main([*QUICK, *argv])


def tiny(*argv: str) -> None:
    """With the weights that ship, in few steps: enough to be different from each other."""
    sample.main(["--steps-c", "3", "--steps-b", "2", *argv])


def parse_args(*argv: str) -> list:
    return cli.parse_args(sample.parser(), list(argv))


def files() -> list[str]:
    return sorted(str(path) for path in Path(".").rglob("*") if path.is_file())


def text_of(path: str) -> dict:
    with Image.open(path) as image:
        return image.text


def pixels(path: str) -> np.ndarray:
    """(H,W,3)"""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def difference(a: str, b: str) -> int:
    return np.abs(pixels(a) - pixels(b)).max()


def same_files(a: str, b: str) -> bool:
    return Path(a).read_bytes() == Path(b).read_bytes()


RED, BLUE = (230, 60, 30), (74, 119, 206)


def photo(name: str = "photo.png", size: tuple = (128, 128), colour: tuple = RED) -> str:
    """Almost an apple on blue, which the shipped weights know."""
    image = Image.new("RGB", size, BLUE)
    ImageDraw.Draw(image).ellipse([size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4], colour)
    image.save(name)
    return name


def mask(name: str = "mask.png", size: tuple = (128, 128)) -> str:
    """White in the left half."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    image.save(name)
    return name


def error_of(capsys, *argv: str, by=run) -> str:
    """The line on stderr with which the program ends, without "error: ". Before it only warnings and progress."""
    with pytest.raises(SystemExit) as end:
        by(*argv)
    out, err = capsys.readouterr()
    *others, line = err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and "Traceback" not in err
    assert out == "" and all(other.startswith(("Stage", "\rStage", "warning: ")) or not other for other in others), err
    return line.removeprefix("error: ")


def without_torch(monkeypatch):
    """From now on, importing torch, or what imports it, is an error."""
    for module in ("torch", "transformers", "wuerstchen", "weights", "images"):
        monkeypatch.setitem(sys.modules, module, None)


def passed_on(monkeypatch) -> list[dict]:
    """From now on nothing is loaded or generated: a list of the arguments of load, then of each call."""
    calls = []

    class Model:
        paths, loras, dtype, device, c, b = {}, {}, torch.float32, torch.device("cpu"), Sampling(), Sampling()

        def __call__(self, prompt, negative_prompt, **options):
            calls.append(dict(prompt=prompt, negative_prompt=negative_prompt) | options)
            return [Image.new("RGB", (128, 128))]

    def load(weights, device, dtype, **options):
        calls.append(dict(weights=weights, device=device, dtype=dtype) | options)
        return Model()
    monkeypatch.setattr(Wuerstchen, "load", load)
    monkeypatch.setattr(editing, "generate", lambda model, *args, **options: Model.__call__(model, *args, **options))
    monkeypatch.setattr(memory, "tile", lambda model, size: calls.append(size))
    return calls


# --- before anything heavy ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [([], "example: python sample.py --prompt"),
                                            (["--help"], "--negative-prompt")])
def test_help_and_usage_import_neither_torch_nor_transformers(argv, expected):
    """They take seconds to import, and help should appear at once. Exit code 0, on stdout."""
    code = ("import sys, runpy; sys.modules.update(torch=None, transformers=None, numpy=None); "
            f"sys.argv = {['sample.py', *argv]}; sys.path.insert(0, {str(TINY.parents[1])!r}); "
            f"runpy.run_path({sample.__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and expected in done.stdout and done.stdout.startswith("usage:")


def test_every_option_is_explained():
    for action in sample.parser()._actions:
        assert action.help and not action.help.endswith("."), action.option_strings


def test_help_begins_with_examples_and_the_options_that_are_used_most():
    """The text is for users: it names no file of the code. What holds for all options of Stage B is said once."""
    text = " ".join(sample.parser().format_help().split())
    first = text[:text.index("several images, and images as input:")]
    for option in ("prompt", "negative-prompt", "num-images", "seed", "out", "width", "height", "init", "strength",
                   "weights", "steps-c", "guidance-c"):
        assert f" --{option} " in first, option
    assert first.count(" --") < 50 and "python sample.py --like out/image.png --seed 8" in first
    assert "extras/" not in text and "torch takes" not in text and "as for Stage C" not in text
    assert not any(action.help.startswith("as --") for action in sample.parser()._actions)


EMPTY = 'the prompt is empty: describe the image, for example --prompt "a red apple on a blue background"'
ERRORS = [
    (["--seed", "1"], EMPTY),
    (["--prompt", ""], EMPTY),
    (["--prompt", " \t"], EMPTY),
    (["--prompt", "cat\udcff"], "--prompt contains bytes that are not UTF-8 text"),
    (["--prompt", "cat", "--num-images", "0"],
     "argument --num-images: expected a whole number from 1 to 10000, got '0'"),
    (["--prompt", "cat", "--steps-c", "0"],
     "argument --steps-c: expected something like 29 (steps), 2/3:20,0:10 (segments), 1,0.5,0 (noise levels)"),
    (["--prompt", "cat", "--steps-b", "-2"], "got '-2'"),
    (["--prompt", "cat", "--steps-b", "many"], "got 'many'"),
    (["--prompt", "cat", "--steps-b", "0.5:3:2"], "got '0.5:3:2'"),
    (["--prompt", "cat", "--steps-b", "1,0.5,"], "got '1,0.5,'"),
    (["--prompt", "cat", "--steps-c", "1,0.5,0.6"],
     "the noise levels of Stage C are 1,0.5,0.6, expected each to be lower"),
    (["--prompt", "cat", "--steps-b", "0:3,0.5:2"],
     "the noise levels of Stage B are 1,0,0.5, expected each to be lower"),
    (["--prompt", "cat", "--steps-c", "1.5,0"], "got '1.5,0'"),
    (["--prompt", "cat", "--t-start-c", "2"],
     "argument --t-start-c: expected a number such as 0.5 or 2/3, from 0 to 1, got '2'"),
    (["--prompt", "cat", "--t-start-b", "0.2", "--t-end-b", "1/2"],
     "the noise levels of Stage B are 0.2,0.5, expected each to be lower"),
    (["--prompt", "cat", "--steps-c", "1,0", "--t-end-c", "0.1"],
     "--t-start-c and --t-end-c are for a number of steps: 1,0 contains its own"),
    (["--prompt", "cat", "--seed", "-1"], "argument --seed: expected a whole number from 0 to 4294967295, got '-1'"),
    (["--prompt", "cat", "--seed", "one"], "argument --seed: expected a whole number from 0 to 4294967295, got 'one'"),
    (["--prompt", "cat", "--seed", "4294967295", "--num-images", "2"],
     "--seed is 4294967295, expected a number from 0 to 4294967294"),
    (["--prompt", "cat", "--guidance-c", "nan"],
     "argument --guidance-c: expected a number such as 0.5 or 2/3, got 'nan'"),
    (["--prompt", "cat", "--guidance-b", "inf"],
     "argument --guidance-b: expected a number such as 0.5 or 2/3, got 'inf'"),
    (["--prompt", "cat", "--guidance-b", "1/0"], "got '1/0'"),
    (["--prompt", "cat", "--guidance-b", "1e999"], "got '1e999'"),
    (["--prompt", "cat", "--guidance-c", "1,2,3"],
     "argument --guidance-c: expected 1 or 2 numbers with commas between, got '1,2,3'"),
    (["--prompt", "cat", "--interval-c", "0.5"],
     "argument --interval-c: expected 2 numbers with commas between, got '0.5'"),
    (["--prompt", "cat", "--interval-b", "0.8,0.2"], "--interval-b is 0.8,0.2, expected the lower noise level first"),
    (["--prompt", "cat", "--rescale-c", "1.5"],
     "argument --rescale-c: expected a number such as 0.5 or 2/3, from 0 to 1, got '1.5'"),
    (["--prompt", "cat", "--eta-b", "0.5"], "--eta-b is for --sampler-b ddim, not for ddpm"),
    (["--prompt", "cat", "--sampler-c", "euler"], "argument --sampler-c: invalid choice: 'euler'"),
    (["--prompt", "cat", "--width", "40"],
     "argument --width: expected a whole number of px from 64 to 16384, got '40'"),
    (["--prompt", "cat", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    (["--prompt", "cat", "--colour", "red"], "unrecognized arguments: --colour red; --help lists all options"),
    (["--promt", "a cat"], "unrecognized arguments: --promt a cat; did you mean --prompt?"),
    (["--prompt", "cat", "--guidanse-c=4"], "unrecognized arguments: --guidanse-c=4; did you mean --guidance-c?"),
    (["--prompt", "cat", "--guidance=4"], "ambiguous option: --guidance=4 could match --guidance-c, --guidance-b. "
     "Stage C decides what is in the image, --guidance-c; Stage B adds detail, --guidance-b"),
    (["--prompt", "cat", "--steps", "20"], "Stage C decides what is in the image, --steps-c; Stage B adds detail"),
    (["--seed", "1", "a cat"],
     'unrecognized arguments: a cat; did you mean --prompt "a cat"? A text of several words needs quotes'),
    (["--prompt", "a", "cat"], 'unrecognized arguments: cat; did you mean --prompt "a cat"?'),
    (["--prompt", "cat", "--steps-c", "2/3:20,2/3:10,0:5"],
     "argument --steps-c: expected segments that each end at another noise level, got '2/3:20,2/3:10,0:5'"),
    (["--prompt", "cat", "--steps-b", "1/2:3,0.5:2"], "got '1/2:3,0.5:2'"),
    (["--prompt", "cat", "--lora", "a.pt:0.5,a.pt"], "argument --lora: a.pt is given twice"),
    (["--prompt", "cat", "--out", "image.avif"], "images are saved as PNG, JPEG or WebP, name a .png, .jpg or .webp"),
    (["--prompt", "cat", "--out", "image.gif"], "images are saved as PNG, JPEG or WebP"),
    (["--prompt", "cat", "--mask", "m.png"], "--mask requires --init"),
    (["--prompt", "cat", "--strength", "0"], "--strength requires --init"),
    (["--prompt", "cat", "--outpaint", "1,1,1,1"], "--outpaint requires --init"),
    (["--init", "a.png", "--outpaint", "1,1,1"],
     "argument --outpaint: expected 4 numbers with commas between, got '1,1,1'"),
    (["--init", "a.png", "--mask", "m.png", "--outpaint", "1,1,1,1"],
     "--mask and --outpaint cannot be used together: choose one"),
    (["--init", "a.png", "--strength", "1.1"],
     "argument --strength: expected a number such as 0.5 or 2/3, from 0 to 1, got '1.1'"),
    (["--init", "a.png", "--reconstruct", "b.png"], "--reconstruct and --init cannot be used together: choose one"),
    (["--prompt", "cat", "--interpolate-to", "dog", "--grid", "1,2"],
     "--grid and --interpolate-to cannot be used together: choose one"),
    (["--init", "a.png", "--interpolate-to", "dog"], EMPTY),
    (["--prompt", "cat", "--interpolate-to", "dog", "--frames", "1"],
     "argument --frames: expected a whole number from 2 to 1000, got '1'"),
    (["--prompt", "cat", "--to-seed", "0"], "--to-seed requires --interpolate-to or --to-latent"),
    (["--prompt", "cat", "--to-latent", "b"], "--to-latent requires --from-latent"),
    (["--prompt", "cat", "--grid", "1,2", "--from-latent", "a"],
     "--grid and --from-latent cannot be used together: choose one"),
    (["--prompt", "cat", "--grid", "1,2", "--save-latent"],
     "--save-latent and --grid cannot be used together: choose one"),
    (["--reconstruct", "a.png", "--preview-every", "1"],
     "--preview-every and --reconstruct cannot be used together: choose one"),
    (["--from-latent", "a", "--num-images", "2"],
     "--from-latent without --seed is one image: for --num-images, give a --seed"),
    (["--prompt", "cat", "--low-memory", "--offload"],
     "--low-memory and --offload cannot be used together: choose one"),
    (["--prompt", "cat", "--prompt-file", "a.txt"], "--prompt and --prompt-file are both given: choose one"),
]


@pytest.mark.parametrize("argv, message", ERRORS, ids=[f"{i} {argv[-2]}" for i, (argv, _) in enumerate(ERRORS)])
def test_errors_in_arguments_are_one_line_at_once(argv, message, capsys, monkeypatch):
    """Found without torch, so within a blink, and before weights are loaded for a minute."""
    without_torch(monkeypatch)
    assert message in error_of(capsys, *argv)
    assert files() == []


def test_the_command_line_rejects_the_sizes_that_the_library_rejects(capsys):
    """The rule stands in both, since the library's cannot be imported without torch."""
    for side in (-1, 0, 1, 42, 63, 64, 65, 100, 127, 128, 1000, 1025):
        for name, size in (("height", (side, 128)), ("width", (128, side))):
            argv = ["--prompt", "cat", f"--{name}", str(side)]
            try:
                latent_sizes(*size)
            except ValueError:
                assert error_of(capsys, *argv).startswith(
                    f"argument --{name}: expected a whole number of px from 64 to 16384")
            else:
                assert getattr(parse_args(*argv)[0], name) == side


# Arguments of the library under another name, and those that do not exist on the command line.
ELSEWHERE = dict(given="tensors", edit="init", image="init", callback="preview_every")
IN_PYTHON_ONLY = {"model", "output", "progress", "parts", "fast", "files", "sampling", "options", "a", "b"}


def test_the_command_line_has_the_options_and_defaults_of_the_library():
    """One to one, so who knows one knows the other; except for the seed, which is random here."""
    ours = vars(parse_args("--prompt", "", "--init", "a.png")[0]) | dict(init=None, prompt=None)
    for function in (pipeline.load, editing.generate, editing.interpolate, editing.InitImage, memory.tile):
        for name, parameter in inspect.signature(function).parameters.items():
            name = "tile" if (function, name) == (memory.tile, "size") else name
            if name in ELSEWHERE or name in IN_PYTHON_ONLY:
                assert name not in ELSEWHERE or ours[ELSEWHERE[name]] is None
            elif name != "seed" and (function, name) != (editing.interpolate, "batch"):
                default = None if parameter.default is parameter.empty else parameter.default
                assert ours[name] == (default or ours[name]), name
                assert type(ours[name]) is type(default) or not ours[name], name
    for kind, stages in ((Sampling, "cb"), (TokenSampling, "b")):
        for name in {field.name: field for field in dataclasses.fields(kind)}.keys() - {"early"}:
            for stage in stages:
                assert ours[f"{name}_{stage}"] in (None, getattr(kind(), name)), name
    assert set(cli.FILES) < set(ours)


@pytest.mark.parametrize("text, value", [
    ("29", 29), ("1,0.5,0", (1.0, 0.5, 0.0)), ("2/3:20,0:10", {2 / 3: 20, 0.0: 10}),
    ("2/3:20, 0:10", {2 / 3: 20, 0.0: 10}),
    ("1,2/3,0", (1.0, 2 / 3, 0.0)), ("DEFAULT_STAGE_C_TIMESTEPS", "DEFAULT_STAGE_C_TIMESTEPS")])
def test_steps_can_be_given_in_all_forms_of_the_library(text, value):
    """And written back, to the last bit, as in the settings of an image."""
    assert cli.steps(text) == value and type(cli.steps(text)) is type(value)
    assert cli.steps(cli.as_text(value)) == value


@pytest.mark.parametrize("text, value", [("a.safetensors", {"a.safetensors": 1.0}),
                                         ("a:0.8,b.pt", {"a": 0.8, "b.pt": 1.0}),
                                         ("C:folder:-1", {"C:folder": -1.0}), ("C:folder", {"C:folder": 1.0})])
def test_loras_are_given_with_their_scales(text, value):
    assert cli.loras(text) == value and cli.loras(cli.as_text(value)) == value


@pytest.mark.parametrize("value, text", [(4, "4"), (4.0, "4"), (2 / 3, "0.6666666666666666"), ((8.0, 2.5), "8,2.5"),
                                         ({0.5: 3, 0.0: 2}, "0.5:3,0:2"),
                                         (["1", 0.5], "1,0.5"), ({"2/3": 3}, "2/3:3"), ("a, b", "a, b")])
def test_values_are_written_as_one_would_type_them(value, text):
    """Short, but exact; also lists and objects of a prompt file."""
    assert cli.as_text(value) == text


@pytest.mark.parametrize("out", ["file/cat.png", "file", "file/folder/deeper", "cat" * 100 + ".png",
                                 "cat" * 100 + "/cat.png"])
def test_where_nothing_can_be_written_nothing_is_computed(out, capsys, monkeypatch):
    """After a minute of sampling, an image that cannot be saved would be lost."""
    without_torch(monkeypatch)
    Path("file").write_text("not a folder")
    assert error_of(capsys, "--prompt", "cat", "--out", out).startswith(f"cannot write to {out}: ")
    assert files() == ["file"]


# --- what arrives in the library ---------------------------------------------------------------------

def test_options_of_sampling_arrive_as_they_were_given(monkeypatch):
    calls = passed_on(monkeypatch)
    sample.main("--prompt cat --negative-prompt dog --seed 7 --width 100 --tile 16 --sampler-c dpm++ "
                "--steps-c 2/3:2,0:1 --guidance-c 8,2 --interval-c 0.2,2/3 --rescale-c 0.7 --sampler-b ddim "
                "--eta-b 0.5 --steps-b 1,0.5,0.1 --guidance-b 1.5".split())
    sample.main("--prompt cat --t-start-c 0.9 --t-end-b 0.1".split())
    sample.main("--prompt cat --steps-b DEFAULT_STAGE_C_TIMESTEPS".split())
    assert calls[1] == 16                        # tile
    assert calls[2] == dict(
        prompt=["cat"], negative_prompt=["dog"], seed=[7], width=100, height=None, edit=None, progress=True,
        steps_c={2 / 3: 2, 0.0: 1}, sampler_c="dpm++", guidance_c=(8.0, 2.0), interval_c=(0.2, 2 / 3), rescale_c=0.7,
        steps_b=(1.0, 0.5, 0.1), sampler_b="ddim", guidance_b=1.5, eta_b=0.5)
    assert {name: value for name, value in calls[4].items() if name[-2:] in ("_c", "_b")} == dict(t_start_c=0.9,
                                                                                                 t_end_b=0.1)
    assert torch.equal(calls[6]["steps_b"], Sampling(29, early=True).levels)


def test_options_of_the_machine_arrive_as_they_were_given(monkeypatch):
    calls = passed_on(monkeypatch)
    sample.main("--prompt cat --weights v2 --prior mine --device cpu --dtype bf16 --offload --compile --offline "
                "--revision main --lora a.safetensors:0.8,b.safetensors".split())
    sample.main("--prompt cat --low-memory".split())
    parts = calls[0].pop("parts")
    assert calls[0] == dict(weights="v2", device="cpu", dtype=torch.bfloat16, prior="mine", offline=True,
                            revision="main", low_memory=None,
                            offload=True, compile=True, int8=False, lora={"a.safetensors": 0.8, "b.safetensors": 1.0})
    assert "prior" in parts and "image_encoder" not in parts
    assert (calls[2]["low_memory"], calls[2]["offload"], calls[2]["compile"],
            calls[2]["weights"]) == (True, False, False, None)


@pytest.mark.parametrize("argv, needed, not_needed", [
    (["--init", "photo.png"], {"image_encoder", "prior"}, set()),
    (["--prompt-file", "p.jsonl"], {"image_encoder", "prior"}, set()),
    (["--reconstruct", "photo.png"], {"image_encoder"}, {"prior", "prior_text_encoder"}),
    (["--from-latent", "a.safetensors"], {"decoder", "text_encoder"}, {"prior", "image_encoder"})])
def test_only_the_parts_that_a_run_needs_are_loaded(argv, needed, not_needed, monkeypatch):
    """Stage C of v2 and its text encoder are 8 of 12 GB. Of a prompt file, any line may need a part."""
    calls = passed_on(monkeypatch)
    photo()
    Path("p.jsonl").write_text('{"prompt": "cat"}\n{"init": "photo.png"}\n{"from_latent": "a.safetensors"}')
    save_file(dict(semantic=torch.zeros(1, 16, 3, 3), states=torch.Generator().get_state()[None],
                   size=torch.tensor([128, 128])), "a.safetensors")
    try:
        sample.main([*argv, "--seed", "1"])
    except AttributeError:
        assert argv[0] == "--reconstruct"            # the stand-in returns PIL images, not tensors
    assert needed <= set(calls[0]["parts"]) and not not_needed & set(calls[0]["parts"])


# --- images ------------------------------------------------------------------------------------------

def test_one_png_is_written_and_nothing_else(capsys):
    """Named after prompt and seed; both stages show their progress."""
    tiny("--prompt", "A red cat, under the MOON!", "--seed", "7")
    out, err = capsys.readouterr()
    path = Path("out/a-red-cat-under-the-moon_7.png")
    assert files() == [str(path)] and out == f"seed 7: {path}\n"
    assert "Stage C: 100%" in err and "Stage B: 100%" in err and "error" not in err and "warning" not in err
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))


def test_a_seed_determines_the_image_to_the_last_byte():
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        run("--prompt", "cat", "--seed", seed, "--out", f"{name}.png")
    assert same_files("a.png", "b.png") and not same_files("a.png", "c.png")


def test_without_a_seed_a_random_one_is_used_and_printed(capsys):
    run("--prompt", "cat")
    path, = files()
    seed = path.removeprefix("out/cat_").removesuffix(".png")
    assert capsys.readouterr().out == f"seed {seed}: {path}\n"
    assert str(read_settings(path)["seed"]) == seed
    assert parse_args("--prompt", "cat")[0].seed != parse_args("--prompt", "cat")[0].seed


def test_each_of_several_images_has_its_own_file_and_seed(capsys):
    """So the best one can be generated again on its own."""
    run("--prompt", "cat", "--seed", "7", "--num-images", "3", "--out", "cats.png")
    assert files() == ["cats_7.png", "cats_8.png", "cats_9.png"]
    assert capsys.readouterr().out.splitlines() == [f"seed {seed}: cats_{seed}.png" for seed in (7, 8, 9)]
    run("--prompt", "cat", "--seed", "9", "--out", "alone.png")
    assert same_files("cats_9.png", "alone.png")


def test_a_batch_gives_the_same_images_up_to_rounding(monkeypatch):
    """Batch sizes may round differently, by at most 2 of 255. 5 images, 2 at a time: the last batch has one."""
    sizes, decode = [], Wuerstchen.decode
    monkeypatch.setattr(Wuerstchen, "decode", lambda self, x: sizes.append(len(x)) or decode(self, x))
    for size, name in (("1", "a"), ("2", "b")):
        run("--prompt", "cat", "--seed", "7", "--num-images", "5", "--batch", size, "--out", f"{name}.png")
    assert sizes == [1] * 5 + [2, 2, 1]
    for seed in range(7, 12):
        assert difference(f"a_{seed}.png", f"b_{seed}.png") <= 2 and read_settings(f"b_{seed}.png")["batch"] == 2
    assert difference("a_7.png", "a_8.png") > 20


def test_any_size_comes_out_exactly(capsys):
    """A warning says what to expect; tiles make no difference."""
    tiny("--prompt", "cat", "--seed", "7", "--width", "101", "--height", "65", "--out", "a.png")
    assert "warning: 101 x 65 px is not what these weights were trained on (128 px only)" in capsys.readouterr().err
    assert pixels("a.png").shape == (65, 101, 3)
    tiny("--prompt", "cat", "--seed", "7", "--width", "101", "--height", "65", "--tile", "5", "--out", "b.png")
    assert difference("a.png", "b.png") <= 2


def test_folders_are_made_and_names_stay_short():
    run("--prompt", "cat " * 18, "--seed", "7", "--out", "new/er")
    path, = files()
    assert path.startswith("new/er/cat-cat-") and len(path) < 80
    run("--prompt", "???", "--seed", "7", "--out", "new/er")
    assert "new/er/image_7.png" in files()


# --- prompt files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_line_of_a_text_is_a_prompt(mark, capsys):
    """Empty lines and comments are skipped. Each image has the next seed, and is the same as one generated on its own.
    Some editors begin a file with a mark, and joined files have it in the middle."""
    Path("p.txt").write_text(f"{mark}# two\ncat\n\n{mark}  ein Käse \r\n{mark} # end", encoding="utf-8")
    run("--prompt-file", "p.txt", "--seed", "7", "--num-images", "2")
    assert files() == ["out/cat_7.png", "out/cat_8.png", "out/ein-käse_10.png", "out/ein-käse_9.png", "p.txt"]
    run("--prompt", "ein Käse", "--seed", "9", "--out", "alone.png")
    assert same_files("out/ein-käse_9.png", "alone.png")
    run("--prompt", f"{mark}ein Käse", "--seed", "9", "--out", "marked.png")
    assert same_files("out/ein-käse_9.png", "marked.png")


def test_a_line_of_jsonl_has_settings_of_its_own(capsys):
    """Files equal those generated one by one, byte for byte. A line with a seed does not change the others' seeds."""
    lines = [dict(prompt="cat"), dict(prompt="dog", seed=3, guidance_c=[6, 1], steps_c={"2/3": 2, "0": 1}),
             dict(prompt="cat", num_images=2),
             dict(prompt="cow", negative_prompt="cat", steps_b=[1, 0.5, 0], sampler_c="ddim", eta_c=0.5, width=100)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("--prompt-file", "p.jsonl", "--seed", "7", "--steps-b", "1")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["7:", "3:", "8:", "9:", "10:"]
    for path, argv in {"cat_7": ["--prompt", "cat"], "cat_9": ["--prompt", "cat"],
                       "dog_3": ["--prompt", "dog", "--guidance-c", "6,1", "--steps-c", "2/3:2,0:1"],
                       "cow_10": ["--prompt", "cow", "--negative-prompt", "cat", "--steps-b", "1,0.5,0", "--sampler-c",
                                  "ddim", "--eta-c", "0.5",
                                  "--width", "100"]}.items():
        run("--steps-b", "1", *argv, "--seed", path.split("_")[1], "--out", f"{path}.png")
        assert same_files(f"out/{path}.png", f"{path}.png"), path


def test_lines_are_batched_if_possible():
    """Prompts with the same settings are one batch, and give the same images as one by one."""
    Path("p.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "dog", "negative_prompt": "cat"}\n'
                               '{"prompt": "cow", "steps_c": 1}\n')
    for size, name in (("1", "a"), ("8", "b")):
        run("--prompt-file", "p.jsonl", "--seed", "7", "--batch", size, "--out", name)
    for name in ("cat_7", "dog_8", "cow_9"):
        assert difference(f"a/{name}.png", f"b/{name}.png") <= 2


def test_the_same_prompt_twice_is_two_images(capsys):
    """Even with --overwrite, which is about older files."""
    Path("p.txt").write_text("cat\ncat")
    run("--prompt-file", "p.txt", "--seed", "7", "--overwrite")
    Path("p.jsonl").write_text('{"prompt": "cat", "seed": 1}\n' * 2)
    run("--prompt-file", "p.jsonl", "--overwrite", "--out", "a.png")
    assert files() == ["a_1.png", "a_1_2.png", "out/cat_7.png", "out/cat_8.png", "p.jsonl", "p.txt"]


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "missing.txt cannot be read as a text file: there is no such file"),
    ("latin.txt", "Käse".encode("latin-1"), "latin.txt cannot be read as a text file: 'utf-8' codec can't decode"),
    ("empty.txt", b" \n\n", "empty.txt contains no prompts: expected one per line"),
    ("a.jsonl", b'{"prompt": "cat"}\n\n{"prompt": "dog",}', "a.jsonl, line 3: this is not JSON ("),
    ("a.jsonl", b'"cat"',
     'a.jsonl, line 1: expected an object with one prompt, such as {"prompt": "a cat", "seed": 3}'),
    ("A.JSONL", b'"cat"', "A.JSONL, line 1: expected an object with one prompt"),
    ("a.jsonl", b'{"prompt": "cat", "seed": 1, "seed": 2}', "a.jsonl, line 1: this is not JSON (seed is in it twice)"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: this is not JSON ("),
    ("wide.txt", "cat".encode("utf-16"), "wide.txt cannot be read as a text file: 'utf-8' codec can't decode byte 0xff "
     "in position 0: invalid start byte: save it as UTF-8"),
    ("empty.txt", b"# cat\n  # dog", "empty.txt contains no prompts: expected one per line"),
    ("a.jsonl", b'{"prompt": ["cat", "dog"]}', "a.jsonl, line 1: expected an object with one prompt"),
    ("a.jsonl", b'{"prompt": "cat", "colour": 3, "out": "b.png"}',
     "a.jsonl, line 1: colour, out cannot be set for one line; possible: prompt,"),
    ("a.jsonl", b'{"seed": 3}', f"a.jsonl, line 1: {EMPTY}"),
    ("a.jsonl", b'{"prompt": "cat\\ud800"}', "a.jsonl, line 1: --prompt contains bytes that are not UTF-8 text"),
    ("a.jsonl", b'{"prompt": "cat", "seed": "x"}',
     "a.jsonl, line 1: argument --seed: expected a whole number from 0 to 4294967295, got 'x'"),
    ("a.jsonl", b'{"prompt": "cat", "steps_c": true}', "a.jsonl, line 1: argument --steps-c: expected"),
    ("a.jsonl", b'{"prompt": "cat", "mask": "m.png"}', "a.jsonl, line 1: --mask requires --init")])
def test_errors_in_prompt_files_name_the_line(name, content, message, capsys, monkeypatch):
    """A file that cannot be parsed, and one without a line that can be used, is refused whole, without an image. If
    only some lines cannot be used: test_prompt_files.py."""
    without_torch(monkeypatch)
    if content is not None:
        Path(name).write_bytes(content)
    assert error_of(capsys, "--prompt-file", name).startswith(message)
    assert files() == [name] * (content is not None)


# --- how an image was made ---------------------------------------------------------------------------

# Options that do not change the image, except for rounding. The last three are saved with it anyway.
NOT_SAVED = {"help", "prompt_file", "like", "save_latent", "offline", "low_memory", "offload", "out",
                      "overwrite", "no_metadata",
                      "preview_every", "batch", "compile", "device"}


def test_every_option_that_changes_the_image_is_saved_with_it():
    """A new option must be put into PER_IMAGE or PER_RUN, or else --like would give another image."""
    options = {action.dest for action in sample.parser()._actions}
    assert options == {*cli.PER_IMAGE, *cli.PER_RUN} | NOT_SAVED


def test_an_image_contains_how_it_was_made():
    """As JSON, complete, in any script; in the words of other programs; with the sha256 of all files involved."""
    prompt, negative = "naïve café 日本語 😀", "blurry — dull"
    tiny("--prompt", prompt, "--negative-prompt", negative, "--seed", "7", "--guidance-c", "2.5", "--interval-c",
         "0.2,1", "--init", photo(),
         "--out", "a.png")

    def sha256(path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    settings, model = read_settings("a.png"), "diffusion_pytorch_model.safetensors"
    assert settings == dict(
        prompt=prompt, negative_prompt=negative, seed=7, width=128, height=128, init="photo.png", weights="tiny",
        steps_c=3, sampler_c="ddpm", guidance_c=2.5, interval_c="0.2,1", rescale_c=0.0, eta_c=0.0, t_start_c=1.0,
        t_end_c=0.0,
        steps_b=2, sampler_b="ddpm", guidance_b="4,1", interval_b="0,1", rescale_b=0.0, eta_b=0.0, t_start_b=1.0,
        t_end_b=0.0,
        dtype=settings["dtype"], device=settings["device"], batch=1, compile=False, software="wuerstchen, sample.py",
        versions=dict(torch=torch.__version__, tokenizers=tokenizers.__version__), hashes=settings["hashes"])
    expected = dict(prior=TINY / "prior" / model, decoder=TINY / "decoder" / model, vqgan=TINY / "vqgan" / model,
                    init=Path("photo.png"),
                    prior_text_encoder=TINY / "text_encoder" / "model.safetensors",
                    text_encoder=TINY / "text_encoder" / "model.safetensors")
    assert {name: settings["hashes"][name] for name in expected} == {name: sha256(path)
                                                                     for name, path in expected.items()}
    lines = text_of("a.png")["parameters"].splitlines()
    assert lines[:2] == [prompt, f"Negative prompt: {negative}"]
    assert lines[2].startswith("Steps: 3, Sampler: DDPM, CFG scale: 2.5, Seed: 7, Size: 128x128, Model: tiny, "
                               f"Model hash: {settings['hashes']['prior'][:10]}, Version: wuerstchen, ")


def test_an_image_can_be_saved_without_settings():
    """The pixels stay the same."""
    run("--prompt", "cat", "--seed", "7", "--no-metadata", "--out", "a.png")
    run("--prompt", "cat", "--seed", "7", "--out", "b.png")
    assert text_of("a.png") == {} and difference("a.png", "b.png") == 0


INPAINT = ["--init", "photo.png", "--mask", "mask.png", "--prompt", "a rose"]
KINDS = {
    "text": ["--prompt", "ein Käse 日本, \"quoted\": --seed=8", "--negative-prompt", "dog"],
    "sampling": ["--prompt", "cat", "--steps-c", "2/3:2,0:1", "--sampler-c", "ddim", "--eta-c", "1/3", "--guidance-c",
                 "7,1.1", "--interval-c", "0.1,0.9",
                 "--rescale-c", "2/3", "--steps-b", "1,0.4,0.1", "--sampler-b", "dpm++", "--guidance-b", "1.7",
                 "--tile", "20"],
    "size": ["--prompt", "cat", "--width", "77", "--height", "131"],
    "image to image": ["--init", "photo.png", "--strength", "0.7", "--prompt", "a moon"],
    "variation": ["--init", "photo.png"],
    "inpainting": INPAINT,
    "outpainting": ["--init", "photo.png", "--outpaint", "20,0,40,10", "--prompt", "a rose"],
    "reconstruction": ["--reconstruct", "photo.png"],
    "grid": ["--prompt", "cat", "--grid", "1,2.5", "--num-images", "2"],
    "interpolation": ["--prompt", "cat", "--interpolate-to", "dog", "--to-seed", "9", "--frames", "3"],
    "latent": ["--from-latent", "latent.safetensors", "--prompt", "cat"],
    "latents": ["--from-latent", "latent.safetensors", "--to-latent", "latent.safetensors", "--frames", "2"]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_can_be_made_again_to_the_last_byte(kind):
    """Whatever it was made from, and also if its seed was random."""
    photo(), mask()
    if "latent" in kind:
        run("--prompt", "cat", "--seed", "7", "--save-latent", "--out", "latent.png")
    generate = tiny if "photo.png" in KINDS[kind] else run
    generate(*KINDS[kind], "--out", "a.png")
    sample.main(["--like", "a.png", "--out", "b.png"])
    assert same_files("a.png", "b.png")


def test_any_setting_can_be_changed_when_an_image_is_made_again():
    """The result is the same as with all options typed. An empty option removes a setting."""
    photo(), mask()
    tiny(*INPAINT, "--seed", "7", "--out", "a.png")
    sample.main(["--like", "a.png", "--seed", "8", "--steps-c", "2", "--guidance-b", "1", "--out", "b.png"])
    tiny(*INPAINT, "--seed", "8", "--steps-c", "2", "--guidance-b", "1", "--out", "c.png")
    assert same_files("b.png", "c.png")
    sample.main(["--like", "a.png", "--init", "", "--mask", "", "--out", "d.png"])
    tiny("--prompt", "a rose", "--seed", "7", "--out", "e.png")
    assert same_files("d.png", "e.png")
    Path("p.txt").write_text("a rose\na cat")
    sample.main(["--like", "a.png", "--prompt-file", "p.txt", "--out", "f.png"])
    assert same_files("f_7.png", "a.png") and read_settings("f_8.png")["prompt"] == "a cat"


def test_files_that_changed_are_reported(capsys):
    """Another file under the same name, or other weights, give another image, and nobody would know why."""
    tiny("--init", photo(), "--seed", "7", "--out", "a.png")
    photo(colour=(0, 128, 0))
    sample.main(["--like", "a.png", "--out", "b.png"])
    assert "warning: init changed since a.png was made: this is another image" in capsys.readouterr().err
    photo("other.png", colour=(0, 128, 0))
    # on purpose
    sample.main(["--like", "a.png", "--init", "other.png", "--weights", str(TINY), "--out", "c.png"])
    assert "changed" not in capsys.readouterr().err
    settings = read_settings("a.png")
    settings["hashes"]["decoder"] = "0" * 64
    settings["init"] = "other.png"
    save_png(Image.open("a.png"), "forged.png", settings)
    sample.main(["--like", "forged.png", "--out", "d.png"])
    assert "warning: decoder, init changed since forged.png was made" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, message", [
    ("foreign.png", None, "foreign.png contains no settings of this program: expected a PNG, JPEG or WebP file"),
    ("text.png", b"not an image", "text.png cannot be read: it is not an image in a known format"),
    ("missing.png", None, "missing.png cannot be read: there is no such file"),
    ("forged.png", {"steps_c": "many"}, "argument --steps-c: expected something like 29"),
    ("forged.png", {"prompt": "cat", "hashes": 3, "seed": -5}, "argument --seed: expected a whole number"),
    ("forged.png", {"out": "/elsewhere"}, EMPTY)])
def test_images_that_cannot_be_made_again(name, content, message, capsys):
    """One line. Settings in a file are checked like options that a user types, and never decide where to write."""
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        save_png(Image.new("RGB", (8, 8)), name, content)
    elif name == "foreign.png":
        photo(name)
    assert error_of(capsys, "--like", name, by=lambda *argv: sample.main(list(argv))).startswith(message)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_jpeg_and_webp_by_the_name_and_like_reads_them_back(suffix):
    """The same image as the PNG file up to compression, and all its settings."""
    tiny("--prompt", "cat", "--seed", "7", "--out", "a.png")
    tiny("--prompt", "cat", "--seed", "7", "--num-images", "2", "--save-latent", "--out", f"a.{suffix}")
    assert files() == sorted(["a.png", f"a_7.{suffix}", f"a_8.{suffix}", "a_7.safetensors", "a_8.safetensors"])
    assert np.abs(pixels(f"a_7.{suffix}") - pixels("a.png")).mean() < 3
    assert read_settings(f"a_7.{suffix}") == read_settings("a.png")
    sample.main(["--like", f"a_7.{suffix}", "--out", "again.png"])
    assert same_files("again.png", "a.png")
    tiny("--prompt", "cat", "--seed", "7", "--no-metadata", "--out", f"bare.{suffix}")
    with Image.open(f"bare.{suffix}") as image:
        assert not image.getexif() and "xmp" not in image.info
    tiny("--prompt", "a dog", "--interpolate-to", "a cat", "--frames", "2", "--seed", "7", "--out", f"strip.{suffix}")
    assert pixels(f"strip.{suffix}").shape == (128, 260, 3)


# --- nothing is overwritten --------------------------------------------------------------------------

@pytest.mark.parametrize("existing, more", [("a.png", []), ("a_8.png", ["--num-images", "2"]),
                                            ("a.safetensors", ["--save-latent"]),
                                            ("a_preview.png", ["--preview-every", "1"])])
def test_a_file_that_was_named_is_never_overwritten(existing, more, capsys, monkeypatch):
    """Neither is a latent or preview next to it."""
    without_torch(monkeypatch)
    Path(existing).write_text("dear to someone")
    message = error_of(capsys, "--prompt", "cat", "--seed", "7", "--out", "a.png", *more)
    assert message == (f"{existing} exists already and will not be overwritten: choose another --out, remove the file, "
                       "or add --overwrite")
    assert Path(existing).read_text() == "dear to someone" and files() == [existing]


def test_overwrite_replaces_files():
    for name in ("a.png", "a.safetensors", "a_preview.png"):
        Path(name).write_text("old")
    tiny("--prompt", "cat", "--seed", "7", "--save-latent", "--preview-every", "1", "--overwrite", "--out", "a.png")
    assert files() == ["a.png", "a.safetensors"] and pixels("a.png").shape == (128, 128, 3)
    assert "semantic" in load_file("a.safetensors")


def test_a_name_of_our_own_gets_a_number(capsys):
    """So do its latent and preview."""
    for _ in range(3):
        run("--prompt", "cat", "--seed", "7")
    assert files() == ["out/cat_7.png", "out/cat_7_2.png", "out/cat_7_3.png"]
    assert capsys.readouterr().out.splitlines()[-1] == "seed 7: out/cat_7_3.png"
    for _ in range(2):
        run("--prompt", "dog", "--seed", "7", "--save-latent", "--out", "dog")
    assert [path for path in files() if "dog" in path] == ["dog/dog_7.png", "dog/dog_7.safetensors", "dog/dog_7_2.png",
                                                           "dog/dog_7_2.safetensors"]


OTHERS = {                                       # options, the file of another program, the files of this one
    "image": (["--out", "a.png"], "a.png", ["a_2.png"]),
    "folder": (["--out", "."], "cat_7.png", ["cat_7_2.png"]),
    "latent": (["--out", "a.png", "--save-latent"], "a.safetensors", ["a_2.png", "a_2.safetensors"]),
    "image of a latent": (["--out", "a.png", "--save-latent"], "a.png", ["a_2.png", "a_2.safetensors"]),
    "animation": (["--out", "a.gif", "--interpolate-to", "dog", "--frames", "2"], "a.gif", ["a_2.gif"])}


@pytest.mark.parametrize("moment", ["while the image is computed", "between check and rename"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_appears_in_the_meantime_is_not_overwritten(kind, moment, monkeypatch):
    """Two programs, one name: the later image gets a number, and so does its latent. Nothing is lost."""
    argv, other, ours = OTHERS[kind]

    def appear(*_):
        if not Path(other).exists():
            Path(other).write_text("dear to someone")
    target, name = (Wuerstchen, "decode") if moment.startswith("while") else (loading.files.os, "fsync")
    usual = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *args: (appear(), usual(*args))[1])
    run("--prompt", "cat", "--seed", "7", *argv)
    assert files() == sorted([other, *ours]) and Path(other).read_text() == "dear to someone"


def test_a_preview_of_another_program_is_neither_overwritten_nor_removed(monkeypatch):
    """It appears after the paths were checked."""
    sample_c = Wuerstchen.sample_c

    def meanwhile(self, *args, **options):
        Path("a_preview.png").write_text("dear to someone")
        return sample_c(self, *args, **options)
    monkeypatch.setattr(Wuerstchen, "sample_c", meanwhile)
    tiny("--prompt", "cat", "--seed", "7", "--preview-every", "1", "--out", "a.png")
    assert files() == ["a.png", "a_preview.png"] and Path("a_preview.png").read_text() == "dear to someone"


# --- from images -------------------------------------------------------------------------------------

def test_a_reconstruction_stands_next_to_its_original(capsys):
    """Any mode and size; PSNR and the compression are printed. It is image to image of strength 0."""
    photo("wide.jpg", (300, 150))
    tiny("--reconstruct", "wide.jpg", "--seed", "7", "--out", "a.png")
    first, second = capsys.readouterr().out.splitlines()
    assert second == "seed 7: a.png"
    assert first.startswith("PSNR ")
    assert first.endswith(" dB; 256 x 128 px became 6 x 3 positions of 16 numbers: 42.7 : 1 per side, 341 : 1 in "
                          "numbers")
    tiny("--init", "wide.jpg", "--strength", "0", "--seed", "7", "--out", "b.png")
    both, alone = pixels("a.png"), pixels("b.png")
    assert both.shape[1] == 2 * 256 + 4 and alone.shape == (128, 256, 3)
    assert (both[-128:, -256:] == alone).all()
    original, result = both[-128:, :256], both[-128:, -256:]
    # it went through JPEG
    assert abs(original[64, 128] - RED).max() < 10 and abs(original[5, 5] - BLUE).max() < 10
    assert float(first.split()[1]) == pytest.approx(-10 * np.log10(((original - result) ** 2).mean() / 255 ** 2),
                                                    abs=0.05)


@pytest.mark.parametrize("size, given, result", [
    ((1, 500), [], (128, 512)), ((500, 1), [], (512, 128)), ((30, 900), ["--width", "64"], (64, 256)),
    ((30, 150), ["--width", "64", "--height", "320"], (64, 320))])
def test_an_endless_image_is_cut_to_4_to_1(size, given, result, capsys):
    """In its own shape, 1 x 500 px would be 128 x 64000. --width and --height together allow other shapes."""
    photo("long.png", size)
    tiny("--init", "long.png", "--prompt", "cat", "--seed", "7", *given, "--out", "a.png")
    err = capsys.readouterr().err
    assert pixels("a.png").shape == (*result[::-1], 3)
    assert (f"warning: the image has {size[0]} x {size[1]} px, a shape beyond 4 : 1: only its middle is used, cut to "
            f"4 : 1; width and height together override this" in err) == (len(given) < 4)


def test_a_photo_with_a_hole_as_mask(capsys):
    """The hole becomes new content and nothing bright does; a line says that the colours do not count."""
    image = Image.open(photo("photo.png", colour=(255, 250, 240))).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 24, 24))
    image.save("hole.png")
    tiny("--init", "photo.png", "--mask", "hole.png", "--prompt", "cat", "--seed", "7", "--out", "a.png")
    assert capsys.readouterr().err.count("warning: hole.png has transparent holes and more than one colour") == 1
    change = np.abs(pixels("a.png") - pixels("photo.png")).max(2)
    assert change[:24, :24].max() > 10 and change[24:].max() == change[:, 24:].max() == 0


def test_image_to_image_keeps_what_its_strength_leaves():
    """0: the apple stays, whatever the prompt is. 1: the same as without an image."""
    photo()
    argv = ["--steps-b", "6", "--prompt", "a moon on a black background", "--seed", "7"]
    for strength in ("0", "1"):
        tiny(*argv, "--init", "photo.png", "--strength", strength, "--out", f"{strength}.png")
    tiny(*argv, "--out", "without.png")
    kept, lost = (np.abs(pixels(f"{strength}.png") - pixels("photo.png")).mean() for strength in "01")
    assert kept < 25 < lost
    assert difference("1.png", "without.png") == 0


def test_inpainting_keeps_what_is_black_in_the_mask():
    photo(), mask()
    tiny(*INPAINT, "--seed", "7", "--out", "a.png")
    change = np.abs(pixels("a.png") - pixels("photo.png"))
    assert change[:, 64:].max() <= 2 and change[:, :60].max() > 50


def test_outpainting_keeps_the_image_inside_its_border():
    """64 px left and right of 128: still 128 high. With pixels above and below it shrinks to the size of the weights,
    or to --height."""
    photo()
    tiny("--init", "photo.png", "--outpaint", "64,0,64,0", "--prompt", "a rose", "--seed", "7", "--out", "a.png")
    assert pixels("a.png").shape == (128, 256, 3)
    assert np.abs(pixels("a.png")[:, 64:192] - pixels("photo.png")).max() <= 2
    tiny("--init", "photo.png", "--outpaint", "0,64,0,64", "--prompt", "a rose", "--seed", "7", "--width", "64",
         "--height", "128", "--out", "b.png")
    assert pixels("b.png").shape == (128, 64, 3)


@pytest.mark.parametrize("argv, message", [
    (["--init", "missing.png"], "missing.png cannot be read: there is no such file"),
    (["--init", "text.png"], "text.png cannot be read: it is not an image"),
    (["--reconstruct", "text.png"], "text.png cannot be read: it is not an image"),
    (["--init", "photo.png", "--mask", "black.png"], "black.png marks nothing: expected white"),
    (["--init", "photo.png", "--mask", "text.png"], "text.png cannot be read"),
    (["--init", "photo.png", "--outpaint", "0,0,0,0"], "nothing is added around the image"),
    (["--from-latent", "missing.safetensors"],
     "missing.safetensors cannot be read as a .safetensors file: there is no such file"),
    (["--from-latent", "photo.png"], "photo.png cannot be read as a .safetensors file"),
    (["--from-latent", "rows.safetensors"],
     "rows.safetensors contains latents_c, expected semantic, states, size: was it written by --save-latent?"),
    (["--tensors", "rows.safetensors"], "rows.safetensors contains tensors for several images, expected 1 row of each"),
    (["--prompt-file", "p.jsonl"], "p.jsonl, line 1: missing.png cannot be read")])
def test_files_that_cannot_be_used_are_found_before_weights_are_loaded(argv, message, capsys, monkeypatch):
    """The weights may be 12 GB that must be fetched first."""
    monkeypatch.setattr(Wuerstchen, "load", None)
    photo()
    Image.new("L", (128, 128)).save("black.png")
    Path("text.png").write_text("not an image")
    Path("p.jsonl").write_text('{"prompt": "cat", "init": "missing.png"}')
    save_file(dict(latents_c=torch.zeros(2, 16, 3, 3)), "rows.safetensors")
    assert error_of(capsys, *argv, by=tiny).startswith(message)


def test_a_mask_must_have_the_size_of_its_image(capsys):
    photo(), mask(size=(64, 64))
    assert error_of(capsys, *INPAINT,
                    by=tiny).startswith("the mask has 64 x 64 px, its image 128 x 128: they must be the same")


# --- latents and embeddings --------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [[], ["--width", "100", "--height", "70"], INPAINT],
                         ids=["plain", "size", "inpainting"])
def test_a_saved_latent_gives_the_same_image_without_stage_c(argv, monkeypatch):
    """To the bit, because the state of the noise is saved as well. With the same seed, Stage C's noise is skipped;
    with another one, Stage B generates other details."""
    photo(), mask()
    generate, argv = tiny if argv is INPAINT else run, [*argv, "--prompt", "a rose"]
    generate(*argv, "--seed", "7", "--out", "plain.png")
    generate(*argv, "--seed", "7", "--save-latent", "--out", "a.png")
    assert same_files("a.png", "plain.png")
    monkeypatch.setattr(Wuerstchen, "sample_c", None)
    # without size, which is in the file
    weights = QUICK[:2] if generate is run else []
    sample.main([*weights, "--steps-b", "2", *argv, "--from-latent", "a.safetensors", "--out", "b.png"])
    generate(*argv, "--from-latent", "a.safetensors", "--seed", "7", "--num-images", "2", "--out", "c.png")
    assert difference("a.png", "b.png") == 0
    assert difference("a.png", "c_7.png") == 0 and difference("c_7.png", "c_8.png") > 2
    sample.main(["--like", "a.png", "--from-latent", "a.safetensors", "--out", "d.png"])
    assert difference("a.png", "d.png") == 0


def test_latents_of_a_batch_are_saved_one_each():
    run("--prompt", "cat", "--seed", "7", "--num-images", "2", "--batch", "2", "--save-latent", "--out", "a.png")
    for seed in ("7", "8"):
        assert load_file(f"a_{seed}.safetensors")["semantic"].shape[0] == 1
        run("--prompt", "cat", "--from-latent", f"a_{seed}.safetensors", "--out", f"b_{seed}.png")
        assert difference(f"a_{seed}.png", f"b_{seed}.png") <= 2


def test_embeddings_and_latents_can_come_from_a_file():
    """The embeddings of a prompt give that prompt's image, each with its own seed, in batches or not."""
    model = Wuerstchen.load(str(PUBLISHED))
    embeddings = {}
    for stage in "cb":
        pair = model.encode_text(stage, ["cat"], ["dog"])
        embeddings[f"prompt_{stage}"], embeddings[f"negative_{stage}"] = map(torch.clone, pair)
    save_file(embeddings, "e.safetensors")
    for name, argv in {"text": ["--prompt", "cat", "--negative-prompt", "dog"],
                       "tensors": ["--tensors", "e.safetensors"],
                       "batch": ["--tensors", "e.safetensors", "--batch", "2"]}.items():
        run(*argv, "--seed", "7", "--num-images", "2", "--out", f"{name}.png")
    for seed in (7, 8):
        assert difference(f"text_{seed}.png", f"tensors_{seed}.png") == 0
        assert difference(f"text_{seed}.png", f"batch_{seed}.png") <= 2
    save_file(dict(latents_c=torch.randn(1, 16, 3, 3), latents_b=torch.randn(1, 4, 32, 32)), "l.safetensors")
    for seed in ("7", "8"):
        run("--prompt", "cat", "--tensors", "l.safetensors", "--sampler-c", "ddim", "--sampler-b", "ddim", "--seed",
            seed, "--out", f"l{seed}.png")
    assert difference("l7.png", "l8.png") == 0                                                  # nothing is random


@pytest.mark.parametrize("tensors, message", [
    (dict(prompt_x=torch.zeros(1, 2, 3)),
     "t.safetensors: prompt_x cannot be given: expected some of prompt_c, negative_c, prompt_b, negative_b"),
    (dict(latents_c=torch.zeros(1, 16, 5, 5)), "latents_c has shape (1, 16, 5, 5), expected (1, 16, 3, 3)"),
    (dict(prompt_c=torch.zeros(1)), "embeddings prompt_c have shape (1,), expected (1, tokens")])
def test_tensors_that_do_not_fit_are_rejected(tensors, message, capsys):
    save_file(tensors, "t.safetensors")
    assert error_of(capsys, "--prompt", "cat", "--tensors", "t.safetensors").startswith(message)


# --- several images in one ---------------------------------------------------------------------------

def test_a_grid_has_a_row_for_each_seed_and_a_column_for_each_scale(capsys):
    """Its cells are the same images as one by one. Labels stand above and to the left."""
    run("--prompt", "a dog", "--grid", "1,6", "--num-images", "2", "--seed", "7", "--out", "grid.png")
    assert files() == ["grid.png"] and capsys.readouterr().out == "seed 7: grid.png\n"
    whole = pixels("grid.png")
    height, width, _ = whole.shape
    for i, seed in enumerate(("7", "8")):
        for j, scale in enumerate(("1", "6")):
            run("--prompt", "a dog", "--guidance-c", scale, "--seed", seed, "--out", f"{seed} {scale}.png")
            top, left = height - (2 - i) * 132 + 4, width - (2 - j) * 132 + 4
            assert (whole[top:top + 128, left:left + 128] == pixels(f"{seed} {scale}.png")).all()
    assert whole[:height - 260].min() < 64 and whole[:, :width - 260].min() < 64                # dark letters on white


def test_an_interpolation_begins_and_ends_with_the_prompts():
    """A strip of frames, or a GIF; in the middle something else. With --to-seed the last one has that seed's noise."""
    argv = ["--prompt", "a dog", "--interpolate-to", "a cat", "--frames", "3", "--seed", "7"]
    run("--prompt", "a dog", "--seed", "7", "--out", "first.png")
    run("--prompt", "a cat", "--seed", "7", "--out", "last.png")
    run("--prompt", "a cat", "--seed", "9", "--out", "other.png")
    run(*argv, "--out", "strip.png")
    run(*argv, "--to-seed", "9", "--out", "moved.png")
    run(*argv, "--batch", "3", "--out", "strip.gif")
    strip, moved = pixels("strip.png"), pixels("moved.png")
    assert strip.shape == (128, 3 * 128 + 2 * 4, 3)
    assert np.abs(strip[:, :128] - pixels("first.png")).max() <= 2
    assert np.abs(strip[:, -128:] - pixels("last.png")).max() <= 2
    assert np.abs(strip[:, 132:260] - pixels("first.png")).max() > 20
    assert np.abs(strip[:, 132:260] - pixels("last.png")).max() > 20
    assert np.abs(moved[:, :128] - pixels("first.png")).max() <= 2
    assert np.abs(moved[:, -128:] - pixels("other.png")).max() <= 2
    with Image.open("strip.gif") as movie:
        assert (movie.format, movie.n_frames, movie.size) == ("GIF", 3, (128, 128))


def test_latents_can_be_interpolated(capsys):
    """Both ends are the images of the latents, with the seed given here."""
    for seed, size in (("7", "128"), ("8", "128"), ("9", "200")):
        run("--prompt", "a dog", "--seed", seed, "--width", size, "--save-latent", "--out", f"{seed}.png")
    argv = ["--prompt", "a dog", "--seed", "5"]
    for seed in ("7", "8"):
        run(*argv, "--from-latent", f"{seed}.safetensors", "--out", f"end{seed}.png")
    run(*argv, "--from-latent", "7.safetensors", "--to-latent", "8.safetensors", "--frames", "3", "--out", "strip.png")
    strip = pixels("strip.png")
    assert np.abs(strip[:, :128] - pixels("end7.png")).max() <= 2
    assert np.abs(strip[:, -128:] - pixels("end8.png")).max() <= 2
    capsys.readouterr()
    message = error_of(capsys, *argv, "--from-latent", "7.safetensors", "--to-latent", "9.safetensors", by=run)
    assert message == "7.safetensors and 9.safetensors belong to images of different sizes, expected the same"


def test_each_prompt_and_each_seed_has_its_own_image():
    """Grids of a prompt file, strips of several seeds."""
    Path("p.txt").write_text("cat\ndog")
    run("--prompt-file", "p.txt", "--grid", "1,2", "--num-images", "2", "--seed", "7", "--out", "grids")
    run("--prompt", "cat", "--interpolate-to", "dog", "--frames", "2", "--num-images", "2", "--seed", "7", "--out",
        "strips")
    assert files() == ["grids/cat_7.png", "grids/dog_9.png", "p.txt", "strips/cat_7.png", "strips/cat_8.png"]


# --- on the way --------------------------------------------------------------------------------------

def test_a_preview_shows_roughly_what_it_will_become(monkeypatch):
    """As large as the image, from Stage C on. Its file is replaced as the image gets clearer, and removed when
    the image is there."""
    last, write = {}, modes.write_atomically

    def keep(path, write_one, *args):
        write(path, write_one, *args)
        last[str(path)] = pixels(path), text_of(path)
    monkeypatch.setattr(modes, "write_atomically", keep)
    tiny("--prompt", "a red apple on a blue background", "--seed", "7", "--steps-c", "9", "--steps-b", "6",
         "--preview-every", "3", "--out", "a.png")
    assert files() == ["a.png"] and [*last] == ["a_preview.png"]
    (preview, text), image = last["a_preview.png"], pixels("a.png")
    assert text == {} and preview.shape == image.shape and np.abs(preview - image).mean() < 20
    # 2 steps of Stage B: the last is of Stage C
    monkeypatch.setattr(modes, "write_unused", lambda path, *args: keep(path, *args) or path)
    tiny("--prompt", "cat", "--seed", "7", "--preview-every", "3", "--out", "b.png")
    assert last["b_preview.png"][0].shape == (128, 128, 3)


@pytest.mark.parametrize("problem, code", [(KeyboardInterrupt, 130), (MemoryError, 2)])
def test_no_preview_stays_without_its_image(problem, code, monkeypatch):
    def fail(*_):
        assert files() == ["a_preview.png"]
        raise problem
    monkeypatch.setattr(Wuerstchen, "decode", fail)
    with pytest.raises(SystemExit) as end:
        tiny("--prompt", "cat", "--seed", "7", "--preview-every", "1", "--out", "a.png")
    assert end.value.code == code and files() == []


def test_ctrl_c_keeps_what_is_finished(capsys, monkeypatch):
    """One line, no traceback, no half file; exit code 130, like all programs that are stopped by it."""
    sample_b, calls = Wuerstchen.sample_b, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_b(*args, **options)
    monkeypatch.setattr(Wuerstchen, "sample_b", interrupted)
    with pytest.raises(SystemExit) as end:
        run("--prompt", "cat", "--seed", "7", "--num-images", "3", "--out", "a.png")
    assert end.value.code == 130 and files() == ["a_7.png"]
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "stopped: 1 of 3 images are finished, each in its file" and "Traceback" not in err


# --- what can go wrong later -------------------------------------------------------------------------

def test_an_image_is_written_completely_or_not_at_all(capsys, monkeypatch):
    """Half a file would look like a result to a program that waits for it."""
    def fill_the_disk(image, path, **_):
        Path(path).write_bytes(b"half an image")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    error = error_of(capsys, "--prompt", "cat", "--out", "a.png")
    assert error.startswith("a.png cannot be written: No space left on device: it needs more than 0.00 MiB, ")
    assert error.endswith(" are free; what was there is unchanged")
    assert files() == []


def test_a_long_prompt_is_a_warning_that_names_what_was_lost(capsys):
    run("--prompt", LONG, "--out", "a.png")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2 and lines[0].startswith(SIZE)
    assert lines[1].endswith("this part was cut off: 'night, and much MORE of it'")
    assert files() == ["a.png"]


def damaged(part: str, change) -> list[str]:
    """Arguments for a copy of the weights in which `change` was done to one file."""
    shutil.copytree(PUBLISHED, "weights", copy_function=shutil.copyfile)
    change(Path("weights") / part)
    return ["--prompt", "cat", "--out", "a.png", "--weights", "weights"]


def no_image():
    assert not Path("a.png").exists()


@pytest.mark.parametrize("weights, message", [("nowhere", "there is no such folder"),
                                              (".", "does not hold weights in a known layout"),
                                              ("tiny.png", "there is no such folder")])
def test_folders_that_hold_no_weights(weights, message, capsys):
    assert message in error_of(capsys, "--prompt", "cat", "--out", "a.png", "--weights", weights)
    no_image()


def test_weights_that_cannot_encode_images(capsys):
    """The released ones come without their image encoder."""
    message = error_of(capsys, "--init", photo(), "--out", "a.png")
    assert "image_encoder is needed for this, but was not loaded" in message
    no_image()


@pytest.mark.parametrize("part", ["wuerstchen-prior/prior", "wuerstchen/decoder", "wuerstchen/vqgan"])
def test_files_that_are_cut_off(part, capsys):
    def cut(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be read" in error_of(capsys, *damaged(part, cut))
    no_image()


@pytest.mark.parametrize("part, name", [("wuerstchen-prior/prior", "diffusion_pytorch_model"),
                                        ("wuerstchen/text_encoder", "model")])
def test_weights_with_nan(part, name, capsys):
    """Elsewhere they load without an error, and give black images."""
    def spoil(folder):
        path = folder / f"{name}.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    assert "contains NaN or infinity" in error_of(capsys, *damaged(part, spoil))
    no_image()


@pytest.mark.parametrize("device", ["gpu"] + ([] if torch.cuda.is_available() else ["cuda"]))
def test_devices_that_are_not_there(device, capsys):
    assert error_of(capsys, "--prompt", "cat", "--out", "a.png", "--device",
                    device).startswith(f"device '{device}' cannot be used here")
    no_image()


def broken(monkeypatch, error: Exception) -> None:
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(Wuerstchen, "sample_c", fail)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out(error, capsys, monkeypatch):
    broken(monkeypatch, error)
    assert error_of(capsys, "--prompt", "cat", "--out",
                    "a.png").startswith("memory ran out: generate fewer or smaller images")
    no_image()


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    """One line is for what a user can repair."""
    broken(monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("--prompt", "cat", "--out", "a.png")
    no_image()


def test_numbers_that_explode_give_no_grey_image(capsys):
    """The line names the step, and what to try."""
    assert error_of(capsys, "--prompt", "cat", "--guidance-c", "1e30", "--out",
                    "a.png").startswith("Stage C came to NaN or infinity in step ")
    no_image()


# --- as a program ------------------------------------------------------------------------------------

def test_as_a_program_it_prints_only_its_own_lines():
    """Messages of the libraries, such as progress bars of loading, would hide the warnings."""
    done = subprocess.run([sys.executable, sample.__file__, *QUICK, "--prompt", LONG, "--seed", "7", "--dtype", "bf16"],
                          capture_output=True, text=True)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith("Stage ")]
    assert done.returncode == 0 and len(lines) == 2 and lines[0].startswith(SIZE), done.stderr
    assert lines[1].startswith("warning: a prompt is longer than the 20 tokens")
    path, = files()
    assert done.stdout == f"seed 7: {path}\n"
    settings = read_settings(path)
    assert settings["dtype"] == "bf16" and settings["prompt"] == LONG


# --- v1 ----------------------------------------------------------------------------------------------

@pytest.fixture
def v1(tmp_path, monkeypatch, capsys):
    """Generates with a small v1 in the authors' files, in few steps."""
    from loading import weights
    monkeypatch.setattr(weights, "official_sizes", lambda stage, shapes: SMALL_V1[stage])
    (tmp_path / "v1").mkdir()
    small_v1(tmp_path / "v1")
    capsys.readouterr()
    return lambda *argv: sample.main(["--weights", "v1", "--steps-c", "2", "--steps-b", "2", "--width", "64",
                                      "--height", "64", *argv])


@pytest.fixture
def v1_is_a_folder(monkeypatch):
    """The name "v1" is a folder here, so nothing is fetched."""
    from loading import hub, layouts
    for module in (hub, layouts):
        monkeypatch.setattr(module, "NAMES", {name: parts for name, parts in hub.NAMES.items() if name != "v1"})


@pytest.mark.usefixtures("v1_is_a_folder")
def test_v1_generates_and_its_settings_give_the_same_again(v1):
    """The defaults of its weights are saved: mode, guidance and temperature of the tokens."""
    v1("--prompt", "cat", "--seed", "7", "--out", "a.png")
    settings = read_settings("a.png")
    assert {name: settings[name] for name in ("steps_b", "sampler_b", "guidance_b", "temperature_b", "sampler_c",
                                              "guidance_c")} == dict(
        steps_b=2, sampler_b="multinomial", guidance_b=2.0, temperature_b="1,0.6", sampler_c="ddpm", guidance_c=6.0)
    sample.main(["--like", "a.png", "--out", "b.png"])
    assert difference("a.png", "b.png") == 0
    v1("--prompt", "cat", "--seed", "7", "--sampler-b", "quant", "--temperature-b", "0.5", "--guidance-b", "4,1",
       "--out", "c.png")
    assert difference("a.png", "c.png") > 0 and read_settings("c.png")["temperature_b"] == 0.5
    run("--prompt", "cat", "--seed", "7", "--out", "v2.png")
    assert "temperature_b" not in read_settings("v2.png") and read_settings("v2.png")["sampler_b"] == "ddpm"


@pytest.mark.usefixtures("v1_is_a_folder")
def test_a_latent_of_v1_gives_the_same_image_without_stage_c(v1):
    """The random tokens also continue from their saved state."""
    v1("--prompt", "cat", "--seed", "7", "--save-latent", "--out", "a.png")
    v1("--prompt", "cat", "--from-latent", "a.safetensors", "--out", "b.png")
    assert difference("a.png", "b.png") == 0


@pytest.mark.usefixtures("v1_is_a_folder")
@pytest.mark.parametrize("argv, message", [
    (["--sampler-b", "ddim"],
     "Stage B: sampler is 'ddim', expected one of multinomial, argmax, quant for Stage B of v1."),
    (["--temperature-b", "0"],
     "Stage B: the temperature is 0, expected more than 0, and finite; mode argmax is what 0 would mean."),
    (["--temperature-b", "1,0.8,0.6"],
     "argument --temperature-b: expected 1 or 2 numbers with commas between, got '1,0.8,0.6'"),
    (["--rescale-b", "0.5"],
     "--rescale-b is only for v2, because Stage B of v1 generates tokens: remove it"),
    (["--prior", str(PUBLISHED / "wuerstchen-prior" / "prior")],
     "Stage C takes texts of width 24, the text encoder v1/text_encoder gives 1024: CLIP bigG (1280) belongs to v2")])
def test_what_v1_does_not_have(v1, argv, message, capsys):
    assert error_of(capsys, "--prompt", "cat", *argv, by=v1).startswith(message)


def test_temperature_is_for_v1(capsys):
    assert error_of(capsys, "--prompt", "cat", "--temperature-b",
                    "0.5") == "--temperature-b is only for v1, because Stage B of v1 generates tokens: remove it"
    assert error_of(capsys, "--prompt", "cat", "--sampler-b",
                    "argmax") == "Stage B: sampler is 'argmax', expected one of ddpm, ddim, dpm++."
