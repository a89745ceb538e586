"""A run with many images: lines of a prompt file that fail, and the bar for all of them.

As in test_sample.py, most tests call sample.main in this process, with the smallest weights.
"""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from helpers import PUBLISHED
from loading import hub, layouts
from wuerstchen import Wuerstchen

QUICK = ["--weights", str(PUBLISHED), "--width", "128", "--height", "128", "--steps-c", "3", "--steps-b", "2"]
TINY = ["--weights", "tiny", "--steps-c", "2", "--steps-b", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(pattern: str = "*.png") -> list[str]:
    return sorted(str(path) for path in Path("out").rglob(pattern))


def prompt_file(*lines: dict) -> list[str]:
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["--prompt-file", "p.jsonl"]


def errors(capsys, argv: list[str], code: int, weights: list[str] = QUICK) -> list[str]:
    """The lines on stderr that begin with "error: ", without it."""
    with pytest.raises(SystemExit) as end:
        sample.main([*weights, *argv])
    err = capsys.readouterr().err.replace("\r", "\n")
    assert end.value.code == code and "Traceback" not in err, err
    return [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


# --- lines that fail ---------------------------------------------------------------------------------

def test_one_bad_line_does_not_lose_the_rest(capsys):
    """Its guidance leads to NaN, which nobody knows before. The others are the same as in a file without it."""
    argv = prompt_file(dict(prompt="a cat"), dict(prompt="a dog", guidance_c=1e30), dict(prompt="a fox"))
    message, = errors(capsys, [*argv, "--seed", "7"], 1)
    assert message.startswith("p.jsonl, line 2: Stage C came to NaN or infinity in step ")
    assert files() == ["out/a-cat_7.png", "out/a-fox_9.png"]
    sample.main([*QUICK, "--prompt", "a fox", "--seed", "9", "--out", "alone.png"])
    assert Path("alone.png").read_bytes() == Path("out/a-fox_9.png").read_bytes()


def test_bad_lines_are_named_before_the_first_image_and_skipped(capsys, monkeypatch):
    """Five kinds. Those below keep their seeds, so repairing a line does not change the other images."""
    Image.new("RGB", (128, 128), "red").save("red.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    save_file(dict(semantic=torch.zeros(1, 16, 3, 3)), "latent.safetensors")
    argv = prompt_file(dict(prompt="a cat"), dict(prompt="a dog", colour=3), dict(prompt="a dog", steps_c="many"),
                       dict(prompt="a dog", init="red.png", mask="mask.png"), dict(prompt="a dog", init="missing.png"),
                       dict(prompt="a dog", from_latent="latent.safetensors"), dict(prompt="", num_images=2),
                       dict(prompt="a fox"))
    said, load = [], Wuerstchen.load
    monkeypatch.setattr(Wuerstchen, "load", lambda *args, **options: said.append(capsys.readouterr().err)
                        or load(*args, **options))
    assert errors(capsys, [*argv, "--seed", "7"], 1, TINY) == [] and files() == ["out/a-cat_7.png", "out/a-fox_15.png"]
    expected = ["2: colour cannot be set for one line; possible: ", "3: argument --steps-c: expected something like",
                "4: the mask has 64 x 64 px, its image 128 x 128: they must be the same",
                "5: missing.png cannot be read: there is no such file",
                "6: latent.safetensors contains semantic, expected semantic, states, size", "7: the prompt is empty"]
    lines = said[0].splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected):
        assert line.startswith(f"error: p.jsonl, line {start}")


def test_a_file_without_a_good_line_is_refused(capsys):
    argv = prompt_file(dict(prompt=""), dict(prompt="a dog", seed=-1))
    messages = errors(capsys, argv, 2)
    assert [message[:16] for message in messages] == ["p.jsonl, line 1:", "p.jsonl, line 2:"] and files() == []


def test_the_others_of_a_batch_are_generated(capsys, monkeypatch):
    """The batch fails as a whole, so its images are computed one by one. With several seeds, the error has the seed."""
    encode = Wuerstchen.encode_text

    def fail(self, stage, prompts, negatives):
        if "a dog" in prompts:
            raise MemoryError
        return encode(self, stage, prompts, negatives)
    monkeypatch.setattr(Wuerstchen, "encode_text", fail)
    argv = prompt_file(dict(prompt="a cat"), dict(prompt="a dog", num_images=2), dict(prompt="a fox"))
    assert [message[:39] for message in errors(capsys, [*argv, "--seed", "7", "--batch", "4"], 1)] == [
        "p.jsonl, line 2: seed 8: memory ran out", "p.jsonl, line 2: seed 9: memory ran out"]
    assert files() == ["out/a-cat_7.png", "out/a-fox_10.png"]


def test_weights_that_fail_end_the_run_at_once(capsys):
    """All lines need them."""
    Path("broken").mkdir()
    messages = errors(capsys, prompt_file(dict(prompt="a cat"), dict(prompt="a dog")), 2, ["--weights", "broken"])
    assert len(messages) == 1 and messages[0].startswith("broken does not hold weights in a known layout")


# --- progress ----------------------------------------------------------------------------------------

def test_a_bar_shows_which_prompt_it_is_at(capsys):
    """With a time estimate. One image has only the bars of its stages."""
    sample.main([*QUICK, *prompt_file(dict(prompt="a cat"), dict(prompt="a dog on a very blue background, at night"))])
    err = capsys.readouterr().err
    assert "line 1: a cat:   0%|" in err and "line 2: a dog on a very blue backgroun...:  50%|" in err
    assert "| 2/2 [" in err and "<00:00" in err
    sample.main([*QUICK, "--prompt", "a cat", "--num-images", "2", "--seed", "7"])
    assert "seed 8: a cat:  50%|" in capsys.readouterr().err
    sample.main([*QUICK, "--prompt", "a cat"])
    assert "image/s" not in capsys.readouterr().err


# --- before anything is loaded -----------------------------------------------------------------------

LATENT = dict(semantic=torch.zeros(1, 16, 3, 3), states=torch.Generator().get_state()[None],
              size=torch.tensor([128, 128]))
INIT = ["--init", "red.png", "--prompt", "cat"]
LATE = [
    (["--lora", "missing.safetensors"], "missing.safetensors: there is no such file"),
    (["--lora", "text.safetensors"], "text.safetensors is not a file of weights: expected"),
    (["--lora", "latent.safetensors"], "latent.safetensors: 3 of 3 tensors belong to no layer of this model"),
    (["--device", "gpu"], "device 'gpu' cannot be used here"),
    (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["--device", "cpu", "--int8", "--dtype", "bf16"], "int8 computes in float32 between its products"),
    (["--prior", "nowhere"], "prior: nowhere: there is no such file or folder"),
    (["--prior", "text.safetensors"], "text.safetensors is not a file of weights: expected a .safetensors, .bin or"),
    (["--vqgan", "red.png"], "red.png is not a file of weights but an image: expected"),
    (["--prior-text-encoder", "."], "config.json is missing: found "),
    (["--weights", "text.safetensors"], "there are no weights called 'text.safetensors', and it is a file: expect"),
    (["--temperature-b", "0.5"], "--temperature-b is only for v1, because Stage B of v1 generates tokens: remove it"),
    (["--sampler-b", "quant"], "Stage B: sampler is 'quant', expected one of ddpm, ddim, dpm++."),
    (["--weights", "v1", "--rescale-b", "0.5"], "--rescale-b is only for v2"),
    (["--weights", "v1", "--sampler-b", "ddim"], "Stage B: sampler is 'ddim', expected one of multinomial, argmax"),
    ([*INIT, "--mask", "mask.png"], "the mask has 64 x 64 px, its image 128 x 256: they must be the same"),
    ([*INIT, "--height", "100"], "width is 50, expected a whole number of px from 64 to 16384"),
    (["--from-latent", "latent.safetensors", "--to-latent", "wide.safetensors", "--seed", "1"],
     "latent.safetensors and wide.safetensors belong to images of different sizes, expected the same"),
    (["--from-latent", "latent.safetensors", "--width", "256"],
     "latent.safetensors is for 128 x 128 px, not 256 x 128: remove --width"),
    (["--from-latent", "latent.safetensors", "--height", "300", "--width", "200"],
     "latent.safetensors is for 128 x 128 px, not 200 x 300: remove --width and --height"),
    (["--tensors", "latent.safetensors"],
     "latent.safetensors is a latent of --save-latent, which is not for --tensors: give it to --from-latent"),
    (["--lora", "red.png"], "red.png is not a file of weights but an image: expected a .safetensors, .bin or .pt file"),
    (["--device", "tpu"], "device 'tpu' cannot be used here: expected cpu, cuda, cuda:1 or mps. \"cpu\" always works."),
    (["--weights", "v1", *INIT, "--mask", "mask.png"], "--mask is only for v2, because Stage B of v1 generates tokens"),
    (["--weights", "tiny-v1", *INIT, "--outpaint", "0,0,9,0"], "--outpaint is only for v2, because Stage B of v1"),
    (["--from-latent", "odd.safetensors"], "odd.safetensors cannot be used: its size and states have shapes (3,) and"),
    (["--tensors", "x.safetensors"], "x.safetensors: prompt_x cannot be given: expected some of prompt_c"),
    (["--tensors", "flat.safetensors"], "embeddings prompt_b have shape (1, 1280), expected (1, tokens, width)"),
    (["--tensors", "start.safetensors", *INIT],
     "start.safetensors: latents_c specify where Stage C starts, and so do an image and"),
    (["--tensors", "start.safetensors", "--width", "128", "--height", "300"],
     "latents_c has shape (1, 16, 3, 3), expected (1, 16, 8, 3)")]


@pytest.mark.parametrize("argv, message", LATE, ids=[f"{i} {' '.join(argv[:2])}" for i, (argv, _) in enumerate(LATE)])
def test_what_is_known_from_options_and_small_files_is_checked_before_weights_are_fetched(argv, message, capsys,
                                                                                         monkeypatch):
    """They may be 12 GB."""
    def fetch(*_, **__):
        raise AssertionError("weights are fetched")
    for module in (hub, layouts):
        monkeypatch.setattr(module, "fetch", fetch)
    Image.new("RGB", (128, 256), "red").save("red.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    Path("text.safetensors").write_text("not a file of weights")
    for name, tensors in dict(
            latent=LATENT, x=dict(prompt_x=torch.zeros(1, 2, 3)),
            wide=LATENT | dict(semantic=torch.zeros(1, 16, 3, 6), size=torch.tensor([128, 256])),
            odd=LATENT | dict(size=torch.zeros(3)), flat=dict(prompt_b=torch.zeros(1, 1280)),
            start=dict(latents_c=torch.zeros(1, 16, 3, 3))).items():
        save_file(tensors, f"{name}.safetensors")
    weights = [] if "--weights" in argv else ["--weights", "v2"]
    assert errors(capsys, ["--prompt", "cat", *argv], 2, weights)[0].startswith(message) and files("*") == []
