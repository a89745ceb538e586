"""What the code did before it moved into folders: images, losses, checkpoints, caches, LoRA files, settings, options.

Commit 769a5a8 wrote the files in tests/golden/runs; the README there says how. The tests go through the scripts'
command lines, so they do not depend on where a function is defined.
They ask for equality on the kind of CPU and the version of torch that made the files, where computing twice gives the
same bits. Another CPU or torch adds in another order, so the tolerances are wider there (measured in the README).
"""
import argparse
import contextlib
import gzip
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
FOLDER = Path("tests/golden/runs")           # relative to ROOT, since checkpoints record the paths they were given

# ----- the runs ---------------------------------------------------------------------------------------

COMMON = (f"--data {FOLDER}/images --steps 20 --batch 2 --workers 0 --device cpu --seed 3 --lr 1e-3 --warmup 5 "
          "--log-every 1 --val-every 10 --val-count 2 --sample-every 0 --save-every 15")
C, B = f"--weights tiny {COMMON}", f"--weights tiny --init random {COMMON}"
A = f"--width 8 --bottleneck-blocks 1 --codebook-size 32 --resolution 32 --revive-every 4 {COMMON}"
FROZEN = "--freeze-encoder --image-encoder models/tiny/image_encoder --cache CACHE"
RUNS = dict(        # name: (script, options)
    c_lora=("train_c", f"{C} --prior {FOLDER}/prior --lora --rank 2 --cache CACHE"),
    c_full=("train_c", f"{C} --init random --config {FOLDER}/prior_dropout.json --grad-accum 2 --crop random "
                       "--random-flip --loss-weight min-snr --offset-noise 0.1 --schedule trapezoid "
                       "--checkpointing products"),
    c_preserve=("train_c", f"{C} --prior {FOLDER}/prior --preserve 0.5 --preserve-prompts {FOLDER}/prompts.txt "
                           "--loss-weight v --cache CACHE"),
    b_joint=("train_b", f"{B} --config {FOLDER}/v2 --loss head --blind 3 --high-noise 1.5 --loss-weight v"),
    b_frozen=("train_b", f"{B} --config {FOLDER}/v2 --loss eps --blind 0 --even-contrast --random-flip {FROZEN}"),
    b_v1=("train_b", f"--v1 {B} --config {FOLDER}/v1 --guide-attention 0.3 {FROZEN}"),
    a_gan=("train_a", f"{A} --gan-start 8"),
    a_ema=("train_a", f"{A} --codebook ema --norm-steps 10 --random-flip --l2 1 --quantise 0.7"))
WITH_CHECKPOINT = [name for name in RUNS if name != "a_gan"]     # its discriminator would take 1.3 MB
DEPENDS_ON_TIME = {"images_per_second", "memory_gib"}


def train(name: str, out: Path, cache: Path, *more: str) -> list[dict]:
    """Runs the script in this process -> its log, without what depends on time."""
    script, options = RUNS[name]
    module = importlib.import_module(script)
    argv = [str(cache) if word == "CACHE" else word for word in options.split()]
    module.main(module.parse_args([*argv, "--out", str(out), *more]))
    return log(out)


def log(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in DEPENDS_ON_TIME} for line in lines]


def key_tree(content: dict) -> dict:
    """What a checkpoint holds: its keys and those of the parts that are named after parameters."""
    return {key: sorted(content[key]) if key in ("model", "averaged", "discriminator", "codebook") else None
            for key in sorted(content)}


# ----- images -----------------------------------------------------------------------------------------

PROMPTS = {1: "a cat", 2: "a rocket left of a moon on a blue background", 3: "a large tree on a white background"}
IMAGES = {f"{weights}_{seed}": ["--weights", weights, "--prompt", prompt, "--seed", str(seed)]
          for weights in ("tiny", "tiny-v1") for seed, prompt in PROMPTS.items()}
IMAGES["lora"] = ["--prior", f"{FOLDER}/prior", "--lora", f"{FOLDER}/lora.safetensors:0.7", "--weights", "tiny",
                  "--prompt", "a unicorn", "--seed", "4"]
LIKE = dict(       # these keep their metadata
    like="--weights tiny --prompt sun --negative-prompt moon --seed 5 --width 192 --height 128 --steps-c 2/3:6,0:3 "
         "--sampler-c dpm++ --guidance-c 6,2 --rescale-c 0.5 --interval-c 0.1,0.9 --steps-b 5 --sampler-b ddim "
         "--eta-b 0.3".split(),
    like_v1="--weights tiny-v1 --prompt sun --seed 6 --steps-c 8 --steps-b 4 --sampler-b argmax "
            "--temperature-b 0.8".split())


def generate(out: Path, *options: str) -> np.ndarray:
    import sample
    sample.main([*options, "--device", "cpu", "--out", str(out)])
    return np.asarray(Image.open(out))


# ----- options ----------------------------------------------------------------------------------------

SCRIPTS = dict(sample="sample", train_a="train_a", train_b="train_b", train_c="train_c", lora="tools.lora",
               weights="tools.weights", hub="loading.hub", bench="tools.bench", evaluate="tiny.evaluate",
               train_encoder="tiny.train_encoder", train_text="tiny.train_text")     # name then: module now


class Captured(BaseException):
    """Not an Exception, so that no script turns it into a message."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that `python -m module` uses, caught at the moment when it is about to read the command line."""
    def parse(self, *args, **kwargs):
        raise Captured(self)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # the module may have been imported before
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [module, "-"])           # without any option, sample.py explains itself
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{module} reads no command line")


def options_of(parser: argparse.ArgumentParser, command: str = "") -> dict[str, dict]:
    """{"--steps": {"nargs": ..., "choices": ..., "default": ...}, ...}; a command stands before its options."""
    options = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                options |= options_of(sub, f"{command}{name} ")
        elif not isinstance(action, argparse._HelpAction):
            name = command + (" ".join(action.option_strings) or action.dest)
            entry = dict(kind=type(action).__name__.strip("_"), nargs=action.nargs, const=action.const,
                         default=action.default, required=action.required,
                         choices=action.choices and list(action.choices))
            options[name] = {key: plain(value) for key, value in entry.items() if not (value is None or value is False)}
    return options


def plain(value):
    """As JSON has it; paths inside the repository from its root."""
    if isinstance(value, (str, Path)):
        return str(value).replace(f"{ROOT}{os.sep}", "")
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


# ----- the tests --------------------------------------------------------------------------------------

GOLDEN = json.loads((ROOT / FOLDER / "losses.json").read_text())


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def cache(tmp_path) -> Path:
    shutil.unpack_archive(FOLDER / "cache.zip", tmp_path / "cache")
    return tmp_path / "cache"


def entries(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*")
            if path.is_file() and path.parent.name != "index"}


def machine() -> dict[str, str]:
    """What rounding depends on. With the same instructions, MKL sums in another order on another vendor's CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    vendor = re.search(r"vendor_id\s*: (\w+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return dict(torch=".".join(torch.__version__.split(".")[:2]), cpu=torch.backends.cpu.get_cpu_capability(),
                vendor=vendor[1] if vendor else "unknown")


SAME_MACHINE, SAME_FOR_IMAGES = (GOLDEN[made] == machine() for made in ("made with", "images made with"))


def close(found: list[dict], expected: list[dict]) -> None:
    """The same steps with the same entries: the loss to 1e-6; gradient norms, losses by noise level and whatever else
    varies more with rounding to 1e-5."""
    loss, others = (1e-6, 1e-5) if SAME_MACHINE else (1e-5, 1e-3)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, then in zip(found, expected):
        assert line.keys() == then.keys()
        for key, value in then.items():
            rel = loss if key == "loss" else others
            assert line[key] == pytest.approx(value, rel=rel, abs=rel / 10), f"step {then['step']}: {key}"


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_have_the_losses_they_had_and_what_was_cached_is_read(name, tmp_path, cache):
    """Losses, validations, learning rates, bad steps, epochs; the keys of the checkpoint; no new entry in the cache."""
    before = entries(cache)
    close(train(name, tmp_path / "run", cache), GOLDEN[name]["log"])
    newest = torch.load(tmp_path / "run" / "checkpoints" / "step_00000020.pt", weights_only=True)
    assert key_tree(newest) == GOLDEN[name]["keys"]
    assert entries(cache) == before
    if name == "c_lora":
        found, then = (safe_open(folder / "lora.safetensors", "pt") for folder in (tmp_path / "run", FOLDER))
        with found, then:
            assert set(found.keys()) == set(then.keys()) and found.metadata() == then.metadata()


@pytest.mark.parametrize("name", WITH_CHECKPOINT)
def test_an_old_checkpoint_is_resumed_with_the_losses_that_followed(name, tmp_path, cache):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    content = gzip.decompress((FOLDER / "checkpoints" / f"{name}.pt.gz").read_bytes())
    (checkpoints / "step_00000015.pt").write_bytes(content)
    found = train(name, tmp_path / "run", cache, "--resume", "auto")
    expected = [line for line in GOLDEN[name]["log"] if line["step"] > 15]
    for line in (*found, *expected):         # a running mean of the log, which starts again on resume
        line.pop("smooth_loss", None)
    close(found, expected)


@pytest.mark.parametrize("name", ["c_lora", "b_joint"])
def test_two_processes_have_the_losses_of_one(name, tmp_path, cache):
    """Each process gets one image of every two. For Stage A see test_train_a.py."""
    script, options = RUNS[name]
    argv = [str(cache) if word == "CACHE" else word for word in options.replace("--batch 2", "--batch 1").split()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, f"{script}.py", *argv, "--out", str(tmp_path / "run")], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = {line["step"]: line["loss"] for line in log(tmp_path / "run") if "loss" in line}
    assert found == pytest.approx({line["step"]: line["loss"] for line in GOLDEN[name]["log"] if "loss" in line},
                                  rel=1e-5)


def assert_same_pixels(found: np.ndarray, expected: np.ndarray,
                       share: float = 0.0 if SAME_FOR_IMAGES else 0.001) -> None:
    """Values differ on at most this share, by at most 1 of 255."""
    assert found.shape == expected.shape
    off = np.abs(found.astype(int) - expected)
    message = (f"{(off > 0).mean():.4%} of the values differ, by up to {off.max()} of 255. The same operations in "
               "another order change at most 0.02 % of them, by 1.")
    assert off.max() <= 1 and (off > 0).mean() <= share, message


def skip_v1_elsewhere(name: str) -> None:
    if "v1" in name and not SAME_FOR_IMAGES:
        pytest.skip("v1 draws tokens, and rounding may change one and thereby all that follow: this needs the kind of "
                    "CPU and the version of torch that made the files")


@pytest.mark.parametrize("name", [*IMAGES, *LIKE])
def test_images_have_the_same_pixels(name, tmp_path):
    skip_v1_elsewhere(name)
    options = IMAGES[name] if name in IMAGES else LIKE[name]
    assert_same_pixels(generate(tmp_path / "image.png", *options), np.asarray(Image.open(FOLDER / f"{name}.png")))


@pytest.mark.parametrize("name", ["tiny_1", "tiny_2", "tiny_3", "tiny-v1_1", "tiny-v1_2"])
def test_plain_networks_give_the_same_images(name):
    """As the stage files have them, without speed/fast.py: another rounding. In tiny-v1_3 it changes a token, and
    thereby all that follow."""
    from wuerstchen import Wuerstchen
    skip_v1_elsewhere(name)
    weights, seed = name.split("_")
    image, = Wuerstchen.load(weights, "cpu", fast=False)(PROMPTS[int(seed)], seed=int(seed))
    expected = np.asarray(Image.open(FOLDER / f"{name}.png"))
    assert_same_pixels(np.asarray(image), expected, 0.0002 if SAME_FOR_IMAGES else 0.001)


@pytest.mark.parametrize("name", LIKE)
def test_the_settings_in_an_old_png_give_its_pixels_again(name, tmp_path):
    skip_v1_elsewhere(name)
    assert_same_pixels(generate(tmp_path / "image.png", "--like", f"{FOLDER}/{name}.png"),
                       np.asarray(Image.open(FOLDER / f"{name}.png")))


@pytest.mark.parametrize("name", LIKE)
def test_the_settings_in_a_png_are_written_as_they_were(name, tmp_path):
    generate(tmp_path / "image.png", *LIKE[name])
    with Image.open(tmp_path / "image.png") as found, Image.open(FOLDER / f"{name}.png") as expected:
        assert found.text.keys() == expected.text.keys()
        now, then = (json.loads(image.text["wuerstchen"]) for image in (found, expected))
        assert now.pop("versions").keys() == {"torch", "tokenizers"} and then.pop("versions") and now == then


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_still_there(script):
    """Names, values and defaults. Help texts may change, and options may be added."""
    expected = json.loads((FOLDER / "options.json").read_text())[script]
    today = options_of(parser_of(SCRIPTS[script]))
    assert {name: today.get(name) for name in expected} == expected


# ----- how the files were made ------------------------------------------------------------------------

def make() -> None:
    """Writes everything in tests/golden/runs again, with the code of this checkout. Do this only on purpose."""
    import tempfile
    torch.set_num_threads(1)
    os.chdir(ROOT)
    (FOLDER / "checkpoints").mkdir(exist_ok=True)
    cache, result = Path(tempfile.mkdtemp()) / "cache", {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            lines = train(name, out, cache)
            newest = torch.load(out / "checkpoints" / "step_00000020.pt", weights_only=True)
            result[name] = dict(keys=key_tree(newest), log=lines)
            if name in WITH_CHECKPOINT:
                content = (out / "checkpoints" / "step_00000015.pt").read_bytes()
                (FOLDER / "checkpoints" / f"{name}.pt.gz").write_bytes(gzip.compress(content, mtime=0))
            if name == "c_lora":
                shutil.copy(out / "lora.safetensors", FOLDER / "lora.safetensors")
    shutil.rmtree(cache / "index")       # it knows the files by their path and time
    shutil.make_archive(str(FOLDER / "cache"), "zip", cache)
    shutil.rmtree(cache.parent)
    rows = [f'{{"made with": {json.dumps(machine())},', f'"images made with": {json.dumps(machine())},']
    for name, run in result.items():
        lines = ",\n".join(json.dumps(line) for line in run["log"])
        rows.append(f'"{name}": {{"keys": {json.dumps(run["keys"])}, "log": [\n{lines}]}},')
    (FOLDER / "losses.json").write_text("\n".join(rows).removesuffix(",") + "\n}\n")
    for name, options in (IMAGES | LIKE).items():
        generate(FOLDER / f"{name}.png", *options, *(["--no-metadata"] if name in IMAGES else []), "--overwrite")
    options = {script: options_of(parser_of(module)) for script, module in SCRIPTS.items()}
    rows = [f'"{script}": {{\n' + ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in entries.items()) + "}"
            for script, entries in options.items()]
    (FOLDER / "options.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    make()
