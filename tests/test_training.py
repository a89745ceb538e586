"""The training scripts, from random weights to a folder that generates images, at sizes that take seconds."""
import gc
import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sample
import train_a
import train_b
import train_c
from tiny import train_encoder
from tiny import train_text
from loading.arguments import set_tf32, usable_device
from loading.errors import RESUME_HINT, UserError, exit_on_user_error
from training import optim
from training.checkpoints import Log
from training.samples import to_tensor

SMALL = ["--batch", "2", "--log-every", "1", "--save-every", "2", "--sample-every", "100", "--device", "cpu"]
SMALL_B = ["--workers", "0", "--val-every", "0", "--sample-every", "0", "--data", "scenes:all:16:1"]
TEXT = ["--batch", "4", "--width", "32", "--depth", "1", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The sequence of tiny/train.sh, A, image encoder, B, text, C, with 2 steps each. Every script reads what
    the one before wrote."""
    folder = tmp_path_factory.mktemp("runs")
    train_a.main(train_a.parse_args([*SMALL, "--out", f"{folder}", "--steps", "2", "--width", "16", "--workers", "0",
                                     "--val-count", "2"]))
    for part in ("decoder", "image_encoder"):
        (folder / "sizes" / part).mkdir(parents=True)
        text = (Path(__file__).parent.parent / "models" / "tiny" / part / "config.json").read_text()
        (folder / "sizes" / part / "config.json").write_text(text.replace('"clip_embd": 128', '"clip_embd": 32'))
    shutil.rmtree(folder / "checkpoints")          # both would be taken for this script's, which may not be overwritten
    (folder / "README.md").unlink()
    train_encoder.main(train_encoder.parse_args(["--out", f"{folder}/encoder", "--steps", "2", "--batch", "4",
                                                 "--device", "cpu"]))
    train_b.main(train_b.parse_args([*SMALL, *SMALL_B, "--out", f"{folder}", "--steps", "2", "--init", "random",
                                     "--config", f"{folder}/sizes",
                                     "--vqgan", f"{folder}/vqgan", "--image-encoder", f"{folder}/encoder/image_encoder",
                                     "--text-encoder", "none", "--blind", "1"]))
    train_text.main(train_text.parse_args([*TEXT, "--image-encoder", f"{folder}/image_encoder", "--out",
                                           f"{folder}/text", "--steps", "2"]))
    for part in ("text_encoder", "tokenizer"):     # one folder for all, so that it ends as a pipeline's
        (folder / "text" / part).rename(folder / part)
    (folder / "small.json").write_text(json.dumps(dict(c=32, depth=1, nhead=2, c_cond=32, c_r=32, dropout=0.0)))
    train_c.main(train_c.parse_args(["--weights", "tiny", "--init", "random", "--config", f"{folder}/small.json",
                                     "--image-encoder", f"{folder}/image_encoder",
                                     "--prior-text-encoder", f"{folder}/text_encoder", "--data", "scenes:captioned:64",
                                     "--out", f"{folder}/c",
                                     "--batch", "2", "--steps", "2", "--workers", "0", "--val-every", "0", "--device",
                                     "cpu"]))
    for part in ("prior", "scheduler"):
        (folder / "c" / part).rename(folder / part)
    return folder


def test_the_scripts_write_a_folder_that_generates_images(runs, tmp_path):
    """A, B and C agree on every file. The output of three scripts is one pipeline, and sample.py opens it."""
    assert {path.name for path in runs.iterdir()} >= {"vqgan", "decoder", "image_encoder", "prior", "text_encoder",
                                                      "tokenizer"}
    sample.main(["--weights", str(runs), "--prompt", "a cat on a red background", "--steps-c", "2", "--steps-b", "1",
                 "--seed", "0", "--out", str(tmp_path / "cat.png"), "--device", "cpu"])
    assert (tmp_path / "cat.png").stat().st_size > 1000


def test_stage_b_can_be_tuned_with_a_frozen_image_encoder(runs, tmp_path):
    """Stage C was trained on this encoder's latents, so tuning Stage B afterwards must not change it by a bit."""
    train_b.main(train_b.parse_args([*SMALL, *SMALL_B, "--weights", str(runs), "--freeze-encoder", "--text-encoder",
                                     f"{runs}/text_encoder",
                                     "--out", str(tmp_path), "--steps", "3", "--cache", f"{tmp_path}/cache",
                                     "--even-contrast"]))
    def read(folder):
        return (folder / "image_encoder" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert read(tmp_path) == read(runs)


def test_the_text_encoder_learns_from_images(runs):
    """It replaces CLIP's pre-training. Its loss starts at the latents' variance, about 1, and is logged."""
    lines = [json.loads(line) for line in (runs / "text" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and 0.5 < lines[-1]["loss"] < 4


def test_a_resumed_text_encoder_is_the_unbroken_one(runs, tmp_path, capsys):
    """Stopped after 2 of 4 steps: the same weights to the bit; a run in --out is not overwritten."""
    def train(out, steps, *options):
        train_text.main(train_text.parse_args([*TEXT, "--image-encoder", f"{runs}/image_encoder", "--out", str(out),
                                               "--steps", str(steps),
                                               "--schedule", "constant", *options]))
        return (out / "text_encoder" / "model.safetensors").read_bytes()
    unbroken, half = train(tmp_path / "unbroken", 4), train(tmp_path / "broken", 2)
    with pytest.raises(UserError, match="exists already: add --resume auto"):
        train(tmp_path / "broken", 4)
    assert train(tmp_path / "broken", 4, "--resume", "auto") == unbroken != half


@pytest.mark.parametrize("script, options", [("train_b", ["--vqgan"]), ("tiny.train_text", ["--image-encoder"]),
                                             ("train_c", ["--data=scenes", "--weights"])])
def test_an_unknown_folder_ends_a_script_in_one_line(script, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, *options, str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(script, run_name="__main__")
    assert stop.value.code == 2
    del stop            # the process would end here, and with it what its frames held
    gc.collect()
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--steps", "--batch", "--depth", "--log-every", "--save-every", "--keep"])
def test_zero_is_refused_by_the_text_encoders_training(option, tmp_path):
    """Before anything is loaded or written."""
    with pytest.raises(UserError, match=f"{option}: expected a whole number from 1 to [0-9]+, got '0'"):
        train_text.main(train_text.parse_args(["--image-encoder", "nowhere", "--out", str(tmp_path / "out"), option,
                                               "0"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("service, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_service_that_is_not_installed_is_named(service, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--report-to {service} needs a package: pip install {service}"):
        Log(tmp_path, 0, service)


def test_a_warning_is_one_line_and_said_once(capsys):
    """A LoRA is read before the models are fetched and again when they are there: once without alpha is enough."""
    with exit_on_user_error():
        for text in ("no alpha", "no alpha", "another"):
            warnings.warn(text)
    assert capsys.readouterr().err == "warning: no alpha\nwarning: another\n"


def test_ctrl_c_says_how_to_continue(capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error(RESUME_HINT):
        raise KeyboardInterrupt
    assert stop.value.code == 130 and "--resume auto continues" in capsys.readouterr().err


def test_the_learning_rate_warms_up_stays_and_decays():
    """Until the decay starts it does not depend on the number of steps, so a run can be lengthened."""
    args = train_a.parse_args(["--out", "x", "--lr", "1", "--warmup", "10", "--steps", "100"])
    rates = [optim.learning_rate(step, args) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71 and rates[90] == 0.5 and rates[99] == 0.05
    args.steps = 1000
    assert [optim.learning_rate(step, args) for step in range(80)] == rates[:80]


def test_pixels_become_tensors_without_rounding():
    import numpy as np
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    tensor = to_tensor(pixels)
    assert tensor.shape == (2, 3, 4, 4)
    assert (tensor * 255).round().byte().permute(0, 2, 3, 1).numpy().tolist() == pixels.tolist()


@pytest.mark.parametrize("options, allowed", [([], False), (["--allow-tf32"], True)])
def test_float32_is_exact_unless_tf32_is_allowed(options, allowed):
    """torch allows it in convolutions. On a CPU the flags do nothing, and can be set all the same."""
    args = train_c.parse_args(["--data", "x", "--out", "y", *options])
    set_tf32(not allowed)
    optim.set_precision(args, torch.device("cpu"))
    assert [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32] == [allowed] * 2
    usable_device("cpu")                                                       # as loading a pipeline does
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_sampling_allows_tf32_on_request(tmp_path):
    options = ["--prompt", "a cat", "--seed", "1", "--steps-c", "1", "--steps-b", "1", "--out", str(tmp_path / "a.png")]
    try:
        sample.main([*options, "--allow-tf32"])
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        set_tf32(False)
