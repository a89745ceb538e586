"""Numbers of all command lines: whatever makes no sense is refused in one line that states the range, before torch is
imported; and the same ranges in Python. Output files that could not be written are refused before any work."""
import argparse
import importlib
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from extras.cli import comma_list, parse_jobs
from extras.jobs import Run
from loading import options
from loading.errors import UserError
from loading.files import check_folder, check_output
from loading.hub import main as hub_main
from loading.options import FRAMES, IMAGES, RESOLUTION, SEED, SIDE, STEPS, Number, integer, unit_float
from training.data import bucket_sizes, open_dataset, read_filters
from training.processes import Processes
from training.sources import SHARDS, _expand
from wuerstchen import Sampling, latent_sizes

ROOT = Path(__file__).parents[1]
SCRIPTS = dict(train_a=[], train_b=[], train_c=["--data", "x"], **{
    "tiny.train_text": ["--image-encoder", "x"], "tiny.train_encoder": [], "tiny.evaluate": [],
    "tools.bench.__main__": [], "tools.lora": [], "sample": []})
NONSENSE = ("nan", "inf", "-inf", "-1", str(2 ** 80), "1e999", "1/0", "", "x", "0x10", "1_000", "٣", "2.5", "0")


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    module, found = importlib.import_module(script), []
    if hasattr(module, "parser"):
        return module.parser()
    monkeypatch.setattr(options.Parser, "parse_args", lambda self, argv=None: found.append(self) or argparse.Namespace(
        v1=False, weights="tiny", out=None, grid=None, object=None))
    module.parse_args([])
    monkeypatch.undo()
    return found[0]


def options_of(p: argparse.ArgumentParser):
    for action in p._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        yield action


# ----- the command lines -----------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_knows_its_range(script, monkeypatch):
    """No script reads a number by int or float, which take NaN, infinity, 2^80, and raise for none of them."""
    kinds = {action.option_strings[0]: action.type for action in options_of(parser_of(script, monkeypatch))
             if action.option_strings}
    assert not [name for name, kind in kinds.items() if kind in (int, float)]
    numbers = {name: kind for name, kind in kinds.items() if isinstance(kind, Number)}
    assert len(numbers) >= 2
    for name, kind in numbers.items():
        for text in NONSENSE:
            try:
                value = kind(text)
            except UserError as error:
                assert str(error).startswith("expected a ") and str(error).endswith(f", got {text!r}"), (name, text)
                assert "\n" not in str(error)
                continue
            assert kind.low <= value <= kind.high and math.isfinite(value), (name, text)
            assert text in (("0",) if kind.whole else ("-1", "2.5", "0", str(2 ** 80))), (name, text)


def test_scripts_that_parse_numbers_use_no_other_types():
    """Also where an argument has no name of its own here: no type=int or type=float in the product."""
    files = [path for path in ROOT.rglob("*.py") if not {"tests", "notebooks"} & {*path.parts}
             and "add_argument(" in path.read_text()]
    assert len(files) >= 10
    assert not [path for path in files for word in ("type=int,", "type=int)", "type=float") if word in path.read_text()]


@pytest.mark.parametrize("argv, message", [
    ("train_a.py --resolution 130 --out x",
     "argument --resolution: expected a multiple of 4 from 4 to 4096, got '130'"),
    ("train_c.py --resolution 600 --data x --out x",
     "argument --resolution: expected a multiple of 128 from 128 to 4096, got '600'"),
    ("train_b.py --warmup -5 --out x", "argument --warmup: expected a whole number from 0 to 1000000000, got '-5'"),
    ("train_b.py --max-ratio 0.5 --out x",
     "argument --max-ratio: expected a number such as 0.5 or 2/3, from 1 to 100, got '0.5'"),
    ("-m tiny.train_text --workers 1 --image-encoder x --out x", "unrecognized arguments: --workers; --help lists all"),
    ("-m tiny.train_text --width 100 --image-encoder x --out x",
     "argument --width: expected a multiple of 32 from 32 to 8192, got '100'"),
    ("-m tools.lora extract a b c.safetensors --rank 0", "argument --rank: expected a whole number from 1 to 8192"),
    ("-m tools.bench --calls 0", "argument --calls: expected a whole number from 1 to 10000, got '0'"),
    ("-m tiny.evaluate --grid x.txt", "x.txt should end in .png: no other kind of file is written"),
    ("-m loading.hub v3", "argument name: invalid choice: 'v3'"),
], ids=lambda text: text.split(" -")[0][:40])
def test_a_script_ends_in_one_line_before_it_imports_torch(argv, message, tmp_path):
    code = (f"import runpy, sys; words = {argv.split()!r}; m = words[0] == '-m'; sys.argv = words[m:]\n"
            "try: (runpy.run_module(words[1], run_name='__main__', alter_sys=True) if m else\n"
            "      runpy.run_path(words[0], run_name='__main__'))\n"
            "except SystemExit as end: sys.exit(50 if 'torch' in sys.modules else end.code)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and not run.stdout
    assert run.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("argv, message", [
    (["--num-images", "10001"], "--num-images: expected a whole number from 1 to 10000"),
    (["--steps-c", "10001"], "--steps-c: expected something like 29"),
    (["--interpolate-to", "dog", "--frames", "1001"], "--frames: expected a whole number from 2 to 1000"),
    (["--grid", "1,2,3", "--num-images", "400"], "--grid is for 3 x 400 images, expected 1000 at most"),
    (["--width", "99999"], "--width: expected a whole number of px from 64 to 16384"),
    (["--guidance-c", "1e-999999999,nan"], "--guidance-c: expected a number such as 0.5 or 2/3, got 'nan'"),
    (["--seed", str(2 ** 80)], "--seed: expected a whole number from 0 to 4294967295"),
])
def test_a_typing_error_asks_for_no_hours(argv, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        parse_jobs(sample.parser(), ["--prompt", "cat", *argv], Run())
    assert time.monotonic() - start < 2


def test_numbers_are_read_exactly():
    assert Number()("2/3") == 2 / 3 and Number()("-1e-4") == -1e-4 and unit_float("1") == 1
    assert integer(0)("007") == 7 and SEED("4294967295") == 2 ** 32 - 1 and RESOLUTION("768") == 768
    assert comma_list(Number(0), 1, 2)("1,0.5") == (1.0, 0.5)
    assert str(Number(0, above=True)) == "a number such as 0.5 or 2/3, above 0"
    assert 0 not in Number(0, above=True) and 1 not in Number(0, 1, below=True) and 0 in Number(0, 1, below=True)
    assert math.nan not in Number() and math.inf not in Number() and 10 ** 400 not in SEED


# ----- Python ----------------------------------------------------------------------------------------

def test_the_ranges_of_python_are_those_of_the_command_line():
    """The core stands alone, so it has its limits of size and steps itself."""
    for side in (SIDE.low, SIDE.high):
        latent_sizes(side, side)
    for side in (SIDE.low - 1, SIDE.high + 1):
        with pytest.raises(ValueError, match=f"height is {side}, expected {SIDE}"):
            latent_sizes(side, 64)
    assert len(Sampling(STEPS.high).levels) == STEPS.high + 1
    for steps in (STEPS.high + 1, 10 ** 12, {0.5: STEPS.high, 0.0: 1}):
        with pytest.raises(ValueError, match="10000 steps at most"):
            Sampling(steps)


@pytest.mark.parametrize("value", [0, -1, 10_001, 2 ** 80, np.int64(0)])
def test_a_range_checks_arguments(value):
    with pytest.raises(ValueError, match=rf"num_images is \S+, expected a whole number from 1 to 10000\.$"):
        IMAGES.check("num_images", value)


@pytest.mark.parametrize("value", [1.5, "3", None, [3], math.nan])
def test_a_range_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"frames is .*, expected a whole number from 2 to 1000\.$"):
        FRAMES.check("frames", value)


def test_a_range_takes_the_numbers_of_numpy_and_torch():
    assert [FRAMES.check("frames", value) for value in (np.int64(3), np.array(3), torch.tensor(3))] == [3] * 3


# ----- data and devices ------------------------------------------------------------------------------

def test_a_range_of_shards_has_a_limit():
    assert len(_expand("a{0..9}{00..99}.tar")) == 1000 and _expand("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    start = time.monotonic()
    for pattern in ("a{0..99999999}.tar", "a{0..9999}/{0..9999}.tar"):
        with pytest.raises(ValueError, match=f"names more than {SHARDS} shards: correct its range"):
            _expand(pattern)
    with pytest.raises(ValueError, match="N of 10 million at most"):
        open_dataset("scenes:all:99999999999")
    assert time.monotonic() - start < 2


def test_filters_are_numbers():
    assert read_filters(["min_a=-1", "max_b=2/3"]) == dict(min_a=-1, max_b=2 / 3)
    with pytest.raises(ValueError, match="--filter min_a=nan: expected something like"):
        read_filters(["min_a=nan"])


def test_buckets_of_the_largest_resolution_take_no_minutes():
    """As many steps as there are shapes, not their square."""
    start = time.monotonic()
    sizes = bucket_sizes(RESOLUTION.high, max_ratio=100)
    assert time.monotonic() - start < 2 and (RESOLUTION.high, RESOLUTION.high) in sizes


@pytest.mark.parametrize("device", ["gpu", "cud", "", "cuda:999"])
def test_an_unknown_device_is_one_line(device):
    with pytest.raises(UserError, match="cannot be used here: .*\"cpu\" always works.$") as error:
        Processes(device)
    assert "\n" not in str(error.value)


# ----- output files ----------------------------------------------------------------------------------

def test_output_files_are_checked_before_the_work(tmp_path):
    file, full = tmp_path / "a.png", tmp_path / "full"
    check_output(tmp_path / "new" / "b.PNG", ".png")
    check_output(tmp_path / "v1.2", ".safetensors", "")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]       # nothing was left or made
    file.touch()
    full.mkdir()
    (full / "x").touch()
    for path, suffixes, message in (
            (file, (".png",), "a.png exists already and will not be overwritten"),
            (full, ("",), "full exists already"),
            (tmp_path / "b.txt", (".png",), r"b.txt should end in .png: no other kind of file is written"),
            (tmp_path / "b.ckpt", (".pt", ""), r"b.ckpt should end in .pt or nothing, for a folder"),
            (file / "b.png", (".png",), "cannot write to .*a.png/b.png: not a directory")):
        with pytest.raises(UserError, match=message):
            check_output(path, *suffixes)
    with pytest.raises(UserError, match="cannot write to .*a.png: not a directory"):
        check_folder(file)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_training_checks_its_folders_first(option, tmp_path):
    import train_c
    file = tmp_path / "file"
    file.touch()
    argv = dict({"--data": "nowhere", "--out": str(tmp_path / "run")}, **{option: str(file / "x")})
    with pytest.raises(UserError, match="cannot write to .*file/x: not a directory"):
        train_c.main(train_c.parse_args([word for pair in argv.items() for word in pair]))


def test_a_wrong_name_of_weights_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hub", "tiny"])
    with pytest.raises(UserError, match="argument name: invalid choice: 'tiny'"):
        hub_main()
    monkeypatch.setattr(sys, "argv", ["hub", "v2", "--ofline"])
    with pytest.raises(UserError, match="unrecognized arguments: --ofline; did you mean --offline"):
        hub_main()
