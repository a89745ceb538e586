"""The command line: what it writes, what it refuses, and that it says so in one line.

Most tests call sample.main in this process, since every new one imports torch and transformers for seconds.
"""
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from helpers import PUBLISHED
from wuerstchen import Wuerstchen, latent_sizes

QUICK = ["--weights", str(PUBLISHED), "--width", "128", "--height", "128", "--steps-c", "3", "--steps-b", "2"]
LONG = "the old red house by the lake at night, the old red house by the lake at night, and much MORE of it"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv: str) -> None:
    sample.main([*QUICK, *argv])


def files() -> list[str]:
    return sorted(str(path) for path in Path(".").rglob("*") if path.is_file())


def error_of(capsys, *argv: str) -> str:
    """The one line on stderr with which the program ends, without "error: "."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and "Traceback" not in err
    assert out == "" and (len(err.splitlines()) == 1 or "Stage" in err), err
    return line.removeprefix("error: ")


def without_torch(monkeypatch):
    """From now on, importing torch, or what imports it, is an error."""
    for module in ("torch", "transformers", "wuerstchen", "weights"):
        monkeypatch.setitem(sys.modules, module, None)


# --- before anything heavy ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [([], "example: python sample.py --prompt"), (["--help"], "--negative-prompt")])
def test_help_and_usage_import_neither_torch_nor_transformers(argv, expected):
    """They take seconds to import, and help is asked for more often than pictures. Exit code 0, on stdout."""
    code = "import sys, runpy; sys.modules.update(torch=None, transformers=None, numpy=None); " \
           f"sys.argv = {['sample.py', *argv]}; runpy.run_path({sample.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and expected in done.stdout and done.stdout.startswith("usage:")


MISTAKES = [
    (["--seed", "1"], "the following arguments are required: --prompt"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", " \t"], "the prompt is empty"),
    (["--prompt", "cat\udcff"], "--prompt holds bytes that are no UTF-8 text"),
    (["--prompt", "cat", "--num-images", "0"], "argument --num-images: expected a whole number of at least 1, got '0'"),
    (["--prompt", "cat", "--steps-c", "0"], "argument --steps-c: expected a whole number of at least 1, got '0'"),
    (["--prompt", "cat", "--steps-b", "-2"], "argument --steps-b: expected a whole number of at least 1, got '-2'"),
    (["--prompt", "cat", "--steps-b", "many"], "argument --steps-b: expected a whole number of at least 1, got 'many'"),
    (["--prompt", "cat", "--seed", "-1"], "--seed is -1, expected a number from 0 to 4294967295"),
    (["--prompt", "cat", "--seed", "4294967295", "--num-images", "2"], "--seed is 4294967295, expected a number from 0 to 4294967294"),
    (["--prompt", "cat", "--guidance-c", "nan"], "--guidance-c is nan, expected a number"),
    (["--prompt", "cat", "--guidance-b", "inf"], "--guidance-b is inf, expected a number"),
    (["--prompt", "cat", "--width", "100"], "width 100 is not possible"),
    (["--prompt", "cat", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    (["--prompt", "cat", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["--prompt", "cat", "--out", "picture.jpg"], "pictures are saved as PNG"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[f"{i} {argv[-2]}" for i, (argv, _) in enumerate(MISTAKES)])
def test_mistakes_in_arguments_are_one_line_at_once(argv, message, capsys, monkeypatch):
    """Found without torch, so within a blink, and before weights are loaded for a minute."""
    without_torch(monkeypatch)
    assert message in error_of(capsys, *argv)
    assert files() == []


def test_the_command_line_refuses_the_sizes_that_the_library_refuses(capsys, monkeypatch):
    """The rule stands in both, since the library's cannot be imported without torch."""
    for side in (*range(-128, 1300, 37), *range(0, 1300, 128)):
        for name, size in (("height", (side, 128)), ("width", (128, side))):
            argv = ["--prompt", "cat", f"--{name}", str(side)]
            try:
                latent_sizes(*size)
            except ValueError as error:
                assert error_of(capsys, *argv) == str(error)
            else:
                assert getattr(sample.parse_args(argv), name) == side


def test_the_command_line_has_the_defaults_of_the_library():
    library = {name: p.default for name, p in inspect.signature(Wuerstchen.__call__).parameters.items()}
    ours = vars(sample.parse_args(["--prompt", "cat"]))
    shared = ("negative_prompt", "num_images", "steps_c", "steps_b", "guidance_c", "guidance_b", "width", "height")
    assert {name: ours[name] for name in shared} == {name: library[name] for name in shared}


@pytest.mark.parametrize("out", ["file/cat.png", "file", "file/folder/deeper", "cat" * 100 + ".png"])
def test_where_nothing_can_be_written_nothing_is_computed(out, capsys, monkeypatch):
    """After a minute of sampling, a picture that has no place to go would be lost."""
    without_torch(monkeypatch)
    Path("file").write_text("not a folder")
    assert error_of(capsys, "--prompt", "cat", "--out", out).startswith(f"cannot write to {out}: ")
    assert files() == ["file"]


# --- pictures ----------------------------------------------------------------------------------------

def test_one_png_is_written_and_nothing_else(capsys):
    """Named after prompt and seed; both stages show their progress."""
    run("--prompt", "A red cat, by the MOON!", "--seed", "7")
    out, err = capsys.readouterr()
    path = Path("out/a-red-cat-by-the-moon_7.png")
    assert files() == [str(path)] and out == f"seed 7: {path}\n"
    assert "Stage C: 100%" in err and "Stage B: 100%" in err and "error" not in err and "warning" not in err
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))


def test_a_seed_decides_the_picture_to_the_last_byte():
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        run("--prompt", "cat", "--seed", seed, "--out", f"{name}.png")
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c


def test_a_picture_tells_how_it_was_made_and_can_be_made_again():
    """As PNG text, in any script: the settings read from a file give the same file."""
    prompt, negative = "naïve café 日本語 😀", "blurry — dull"
    run("--prompt", prompt, "--negative-prompt", negative, "--seed", "7", "--guidance-c", "2.5", "--out", "a.png")
    with Image.open("a.png") as image:
        text = image.text
    assert text == dict(prompt=prompt, negative_prompt=negative, seed="7", weights=str(PUBLISHED), steps_c="3", steps_b="2",
                        guidance_c="2.5", guidance_b="1.0", width="128", height="128", device=text["device"], dtype=text["dtype"],
                        software="wuerstchen, sample.py")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in text.items() if name not in ("dtype", "software")]
    sample.main([*options, "--out", "b.png"])
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_without_a_seed_one_is_drawn_and_told(capsys):
    run("--prompt", "cat")
    path, = files()
    seed = path.removeprefix("out/cat_").removesuffix(".png")
    assert capsys.readouterr().out == f"seed {seed}: {path}\n"
    with Image.open(path) as image:
        assert image.text["seed"] == seed
    assert sample.parse_args(["--prompt", "cat"]).seed != sample.parse_args(["--prompt", "cat"]).seed


def test_several_pictures_go_to_a_file_each_and_have_a_seed_each(capsys):
    """So that the one that came out well can be made again alone."""
    run("--prompt", "cat", "--seed", "7", "--num-images", "3", "--out", "cats.png")
    assert files() == ["cats_7.png", "cats_8.png", "cats_9.png"]
    assert capsys.readouterr().out.splitlines() == [f"seed {seed}: cats_{seed}.png" for seed in (7, 8, 9)]
    run("--prompt", "cat", "--seed", "9", "--out", "alone.png")
    with Image.open("cats_9.png") as one_of_three, Image.open("alone.png") as alone:
        assert one_of_three.text["seed"] == "9"
        difference = np.asarray(one_of_three).astype(int) - np.asarray(alone)
    assert np.abs(difference).max() <= 2           # another batch size may round another way


def test_folders_are_made_and_names_stay_short():
    run("--prompt", "cat " * 18, "--seed", "7", "--out", "new/er")
    path, = files()
    assert path.startswith("new/er/cat-cat-") and len(path) < 80
    run("--prompt", "???", "--seed", "7", "--out", "new/er")
    assert "new/er/picture_7.png" in files()


# --- nothing is overwritten --------------------------------------------------------------------------

@pytest.mark.parametrize("existing, more", [("a.png", []), ("a_8.png", ["--num-images", "2"])])
def test_a_file_that_was_named_is_never_overwritten(existing, more, capsys, monkeypatch):
    without_torch(monkeypatch)
    Path(existing).write_text("dear to someone")
    assert error_of(capsys, "--prompt", "cat", "--seed", "7", "--out", "a.png", *more).startswith(f"{existing} exists already")
    assert Path(existing).read_text() == "dear to someone" and files() == [existing]


def test_a_name_of_our_own_gets_a_number(capsys):
    for _ in range(3):
        run("--prompt", "cat", "--seed", "7")
    assert files() == ["out/cat_7.png", "out/cat_7_2.png", "out/cat_7_3.png"]
    assert capsys.readouterr().out.splitlines()[-1] == "seed 7: out/cat_7_3.png"


# --- what can go wrong later -------------------------------------------------------------------------

def test_a_picture_is_written_whole_or_not_at_all(capsys, monkeypatch):
    """Half a file would look like a result to whoever waits for it."""
    def fill_the_disk(image, path, **_):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    assert error_of(capsys, "--prompt", "cat", "--out", "a.png") == "a.png cannot be written: no space left on device"
    assert files() == []


def test_a_long_prompt_is_a_warning_that_names_what_was_lost(capsys):
    run("--prompt", LONG, "--out", "a.png")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].endswith("this part was cut off: 'night, and much MORE of it'")
    assert files() == ["a.png"]


def damaged(part: str, change) -> list[str]:
    """Arguments for a copy of the weights in which `change` was done to one file."""
    shutil.copytree(PUBLISHED, "weights", copy_function=shutil.copyfile)
    change(Path("weights") / part)
    return ["--prompt", "cat", "--out", "a.png", "--weights", "weights"]


def no_picture():
    assert not Path("a.png").exists()


@pytest.mark.parametrize("weights, message", [("nowhere", "there is no such folder"), (".", "holds no weights that are understood"),
                                              ("tiny.png", "there is no such folder")])
def test_folders_that_hold_no_weights(weights, message, capsys):
    assert message in error_of(capsys, "--prompt", "cat", "--out", "a.png", "--weights", weights)
    no_picture()


@pytest.mark.parametrize("part", ["wuerstchen-prior/prior", "wuerstchen/decoder", "wuerstchen/vqgan"])
def test_files_that_are_cut_off(part, capsys):
    def cut(folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be read" in error_of(capsys, *damaged(part, cut))
    no_picture()


@pytest.mark.parametrize("part, name", [("wuerstchen-prior/prior", "diffusion_pytorch_model"), ("wuerstchen/text_encoder", "model")])
def test_weights_with_nan(part, name, capsys):
    """They load without complaint elsewhere, and paint black."""
    def spoil(folder):
        path = folder / f"{name}.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    assert "contains NaN or infinity" in error_of(capsys, *damaged(part, spoil))
    no_picture()


@pytest.mark.parametrize("device", ["gpu"] + ([] if torch.cuda.is_available() else ["cuda"]))
def test_devices_that_are_not_there(device, capsys):
    assert error_of(capsys, "--prompt", "cat", "--out", "a.png", "--device", device).startswith(f"device '{device}' cannot be used here")
    no_picture()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out(error, capsys, monkeypatch):
    monkeypatch.setattr(Wuerstchen, "sample_c", lambda *_: (_ for _ in ()).throw(error))
    assert error_of(capsys, "--prompt", "cat", "--out", "a.png").startswith("memory ran out: paint fewer or smaller pictures")
    no_picture()


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    """One line is for what a user can mend."""
    monkeypatch.setattr(Wuerstchen, "sample_c", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("--prompt", "cat", "--out", "a.png")
    no_picture()


# --- as a program ------------------------------------------------------------------------------------

def test_as_a_program_it_says_nothing_but_its_own_lines():
    """The libraries' own chatter, progress bars of loading for one, would hide the warning."""
    done = subprocess.run([sys.executable, sample.__file__, *QUICK, "--prompt", LONG, "--seed", "7", "--dtype", "bf16"],
                          capture_output=True, text=True)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith("Stage ")]
    assert done.returncode == 0 and len(lines) == 1 and lines[0].startswith("warning: a prompt is longer than the 20 tokens"), done.stderr
    path, = files()
    assert done.stdout == f"seed 7: {path}\n"
    with Image.open(path) as image:
        assert image.text["dtype"] == "bfloat16" and image.text["prompt"] == LONG
