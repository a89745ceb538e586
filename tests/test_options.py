"""The options of the training scripts: what a user of diffusers' guides looks for, and what a typing error comes to."""
import argparse
import json
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import get_scheduler

import train_a
import train_b
import train_c
from loading.errors import UserError, exit_on_user_error
from tiny import train_encoder, train_text
from loading import options
from training import optim
from training.checkpoints import Log, settings_of
from training.data import open_dataset, read_prompts
from training.processes import Processes
from training.results import push, settings_table
from training.samples import open_data
from wuerstchen import Wuerstchen

ROOT = Path(__file__).parents[1]
SCRIPTS = dict(train_a=train_a, train_b=train_b, train_c=train_c, train_text=train_text, train_encoder=train_encoder)
REQUIRED = dict(train_c=["--data", "x"], train_text=["--image-encoder", "x"])
C = ["--weights", "tiny", "--prior", "tests/golden/runs/prior", "--data", "examples/unicorn", "--batch", "2",
     "--workers", "0", "--device", "cpu", "--val-every", "0"]


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    found = []
    monkeypatch.setattr(options.Parser, "parse_args", lambda self, argv=None: found.append(self) or argparse.Namespace(
        v1=False, weights="tiny"))
    SCRIPTS[script].parse_args([])
    monkeypatch.undo()
    return found[0]


def parse(script: str, *more: str) -> argparse.Namespace:
    return SCRIPTS[script].parse_args([*REQUIRED.get(script, []), "--out", "y", *more])


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


# ----- help, headers, typing errors ------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_every_default(script, monkeypatch):
    """Of each option that takes a value and is not required: the number itself, or in words what it depends on."""
    p = parser_of(script, monkeypatch)
    formatter = p._get_formatter()
    for action in p._actions:
        text = formatter._expand_help(action)
        if action.nargs != 0 and not action.required:
            assert "default" in text, action.option_strings
            if action.default not in (None, "", []) and "default: %" not in action.help:
                assert str(action.default).replace(f"{ROOT}/", "") in text.partition("default")[2], text


@pytest.mark.parametrize("script", ["train_a", "train_b", "train_c"])
def test_the_examples_of_a_header_can_be_run(script):
    """Their options exist, and the files that they name are in the repository, or come from an earlier example."""
    text = SCRIPTS[script].__doc__.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if f"{script}.py " in line and "--" in line]
    assert len(lines) >= 4
    for words in lines:
        args = SCRIPTS[script].parse_args(words[words.index(f"{script}.py") + 1:])
        SCRIPTS[script].check(args)
        for word in words:
            if word.startswith(("models/", "examples/")) or word.endswith(".json"):
                assert Path(word).exists(), f"{' '.join(words)}: there is no {word}"
    assert parse(script, "--sample-every", "7").sample_every == 7


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("typed, meant", [("--stepz", "did you mean --steps?"), ("--log_every", "mean --log-every?"),
                                          ("--save_every=3", "mean --save-every?"),
                                          ("--xyzzy", "--help lists all options"),
                                          ("--max_train_steps", "--steps is what diffusers' option is called here")])
def test_a_typing_error_gets_the_nearest_option(script, typed, meant, capsys):
    """Also if another option is missing, which argparse would complain about first. One line, exit code 2."""
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        SCRIPTS[script].parse_args([typed, "1"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and len(message.splitlines()) == 1 and typed in message and meant in message


def test_an_option_without_its_value_says_what_it_takes():
    with pytest.raises(UserError, match="^argument --resume: expected one argument: auto, for the newest checkpoint"):
        train_c.parse_args(["--data", "x", "--resume", "--out", "y"])


def test_grad_accum_with_underscores_suggests_the_option(capsys):
    with pytest.raises(SystemExit), exit_on_user_error():
        parse("train_c", "--grad_accum", "2")
    assert capsys.readouterr().err == "error: unrecognized arguments: --grad_accum; did you mean --grad-accum?\n"


def test_options_may_still_be_shortened_and_values_have_dashes():
    args = parse("train_c", "--grad", "2", "--trigger=--x", "--filter", "min_a=-1")
    assert (args.grad_accum, args.trigger, args.filter) == (2, "--x", ["min_a=-1"])


# ----- docs/FINETUNE.md ------------------------------------------------------------------------------

# The options of diffusers' two scripts, and three of their siblings for other models.
DIFFUSERS = """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column
    checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name dataset_name
    gradient_accumulation_steps hub_model_id hub_token image_column learning_rate local_rank logging_dir lr_scheduler
    lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision num_train_epochs output_dir
    pretrained_decoder_model_name_or_path pretrained_prior_model_name_or_path push_to_hub rank report_to resolution
    resume_from_checkpoint seed snr_gamma tracker_project_name train_batch_size train_data_dir use_8bit_adam use_ema
    validation_epochs validation_prompts
    gradient_checkpointing noise_offset enable_xformers_memory_efficient_attention""".split()


def rows() -> dict[str, tuple[str, str]]:
    """diffusers' option -> ours or none, and what differs."""
    text = (ROOT / "docs" / "FINETUNE.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `--")]
    cells = [row for row in cells if len(row) == 3]
    return {theirs.strip(" `-"): (ours.strip(" `"), more.strip(" |")) for theirs, ours, more in cells}


def test_every_option_of_diffusers_scripts_has_a_row():
    """With our name, which exists, or a reason why there is none."""
    table, parsed = rows(), vars(parse("train_c"))
    assert sorted(table) == sorted(DIFFUSERS)
    for theirs, (ours, more) in table.items():
        if ours == "none":
            assert len(more) > 20, theirs
        else:
            assert ours[2:].replace("-", "_") in parsed, ours
        for word in re.findall(r"`(--[a-z0-9-]+)", more):
            assert word[2:].replace("-", "_") in parsed, word


def test_hints_and_table_agree():
    table = rows()
    assert all(table[theirs][0] == f"--{ours}" for theirs, ours in options.FROM_DIFFUSERS.items())
    renamed = {theirs for theirs, (ours, _) in table.items() if ours not in ("none", f"--{theirs.replace('_', '-')}")}
    assert renamed - {"dataset_config_name"} == options.FROM_DIFFUSERS.keys()


def test_the_guides_command_can_be_typed():
    text = (ROOT / "docs" / "FINETUNE.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("torchrun train_c.py"))
    args = train_c.parse_args(shlex.split(line)[2:])
    assert (args.steps, args.lr, args.sample_prompt, args.checkpointing) == (15000, 1e-5, ["A robot"], "blocks")


# ----- epochs and part of the data -------------------------------------------------------------------

def test_epochs_become_steps(tmp_path):
    """24 images in batches of 2 x 2: 12 steps are 2 epochs."""
    args = train_c.parse_args([*C, "--epochs", "2", "--grad-accum", "2", "--lora", "--rank", "1", "--out",
                               str(tmp_path / "run"), "--schedule", "linear", "--warmup", "0", "--lr", "1",
                               "--log-every", "1"])
    train_c.main(args)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[-1]["epoch"] == 2
    assert [line["lr"] for line in lines] == pytest.approx([1 - i / 12 for i in range(12)])
    content = torch.load(tmp_path / "run" / "checkpoints" / "step_00000012.pt", weights_only=True)
    assert content["settings"]["steps"] == 12
    assert "| `--steps` | 12 |" in (tmp_path / "run" / "README.md").read_text()


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(UserError, match="not allowed with"):
        parse("train_c", "--epochs", "2", "--steps", "500")


@pytest.mark.parametrize("script", ["train_a", "train_b"])
def test_epochs_of_the_other_scripts(script, tmp_path, capsys):
    """9 scenes in batches of 2 are 5 steps: every image is seen at least once."""
    more = dict(train_a=["--width", "8", "--bottleneck-blocks", "1"], train_b=["--weights", "tiny", "--freeze-encoder"])
    args = SCRIPTS[script].parse_args([*more[script], "--data", "scenes:all:9", "--epochs", "1", "--batch", "2",
                                       "--device", "cpu", "--dry-run", "--out", str(tmp_path)])
    SCRIPTS[script].main(args)
    assert args.steps == 5 and "5 steps are 1.1 epochs" in capsys.readouterr().out


def test_max_samples_is_a_part_of_the_data_that_depends_on_the_seed(tmp_path):
    def chosen(count, seed):
        args = parse("train_c", "--max-samples", str(count), "--seed", str(seed), "--data", "examples/unicorn")
        args.out = str(tmp_path)
        dataset, validation = open_data(args, Processes("cpu"))
        assert validation is dataset and dataset.sizes.shape == (len(dataset), 2)
        return [(dataset.name(i), dataset.captions(i), dataset.key(i)) for i in range(len(dataset))]
    everything = chosen(100, 0)
    five = chosen(5, 0)
    assert len(everything) == 24 and len(five) == 5 and set(map(str, five)) < set(map(str, everything))
    assert five == chosen(5, 0) != chosen(5, 1)
    assert five == sorted(five, key=everything.index)


def test_max_samples_of_scenes():
    dataset = open_dataset("scenes:all:50:3")
    before = [dataset.captions(i) for i in range(4)]
    dataset.select(np.array([7, 9, 20, 41]))
    assert len(dataset) == 4 and [dataset.captions(i) for i in range(4)] == before
    with pytest.raises(IndexError):
        dataset.name(4)


# ----- prompts of sample sheets ----------------------------------------------------------------------

def test_prompt_files_have_comments_and_marks(tmp_path):
    """As those of sample.py. A byte-order mark would become a token."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# two of them\r\n a cat \r\n\r\n  # not this\r\n\ufeffa dog\r\n".encode())
    assert read_prompts(file) == ["a cat", "a dog"]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="contains no prompts: expected one per line"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        read_prompts(file)


def test_prompts_from_the_command_line_and_a_file(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    seen = []
    monkeypatch.setattr(Wuerstchen, "__call__", lambda self, prompt, seed: seen.append(prompt) or [
        Image.new("RGB", (128, 128))])
    train_c.main(train_c.parse_args([*C, "--steps", "1", "--lora", "--sample-every", "1", "--sample-prompt", "a cat",
                                     "--sample-prompt", "# moon", "--sample-prompts", str(tmp_path / "prompts.txt"),
                                     "--out", str(tmp_path / "run")]))
    assert seen == ["a cat", "# moon", "a dog"] * 3           # before, and without the LoRA and with it


@pytest.mark.parametrize("option", ["--sample-prompt", "--sample-prompts"])
def test_prompts_without_sheets_are_refused(option):
    with pytest.raises(UserError, match="add --sample-every 500"):
        train_c.check(parse("train_c", option, "x"))


# ----- optimizer and learning rate -------------------------------------------------------------------

@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                                  "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedules_are_those_of_transformers(name, warmup):
    """Their warm-up is a step behind: the first of theirs has learning rate 0, and is lost."""
    if name == "constant" and warmup:
        pytest.skip("theirs has no warm-up")
    args = parse("train_c", "--schedule", name, "--warmup", str(warmup), "--lr", "2e-4", "--steps", "100")
    theirs = get_scheduler(name, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4), warmup, 100)
    theirs = theirs.lr_lambdas[0]
    expected = [2e-4 * theirs(step + 1 if step < warmup else step) for step in range(100)]
    assert [optim.learning_rate(step, args) for step in range(100)] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name, ours, specific", [
    ("cosine_with_restarts", ["--lr-cycles", "3"], dict(num_cycles=3)),
    ("polynomial", ["--lr-power", "2.5"], dict(power=2.5))])
def test_cycles_and_power_are_those_of_transformers(name, ours, specific):
    args = parse("train_c", "--schedule", name, "--warmup", "0", "--lr", "2e-4", "--steps", "100", *ours)
    theirs = get_scheduler(name, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4), 0, 100,
                           scheduler_specific_kwargs=specific).lr_lambdas[0]
    expected = [2e-4 * theirs(step) for step in range(100)]
    assert [optim.learning_rate(step, args) for step in range(100)] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert len(set(expected)) > 30


@pytest.mark.parametrize("script, beta2", [("train_a", 0.99), ("train_b", 0.99), ("train_c", 0.999)])
def test_adams_numbers_reach_the_optimizer(script, beta2):
    model = torch.nn.Linear(2, 2)
    defaults = optim.build_optimizer(model, parse(script, "--lr", "1")).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.9, beta2), 1e-8)
    args = parse(script, "--lr", "1", "--adam-beta1", "0.8", "--adam-beta2", "0.95", "--adam-eps", "1e-6")
    defaults = optim.build_optimizer(model, args).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.8, 0.95), 1e-6)
    with pytest.raises(UserError, match="--adam-beta2: expected a number .*, from 0 to below 1, got '1'"):
        SCRIPTS[script].check(parse(script, "--adam-beta2", "1"))


def stand_in_for_bitsandbytes(monkeypatch) -> list[dict]:
    """A module whose AdamW8bit is torch's AdamW; returns what it was called with."""
    calls = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups, **more):
            calls.append(more)
            super().__init__(groups, **more)
    package, optimizers = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    package.optim, optimizers.AdamW8bit = optimizers, AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optimizers)
    return calls


def test_8_bit_adam_takes_the_same_options_and_trains(tmp_path, monkeypatch):
    calls, losses = stand_in_for_bitsandbytes(monkeypatch), []
    for name, more in (("plain", []), ("8bit", ["--adam-8bit"])):
        train_c.main(train_c.parse_args([*C, *more, "--steps", "2", "--lora", "--lr", "1e-2", "--warmup", "0",
                                         "--log-every", "1", "--out", str(tmp_path / name)]))
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    assert calls == [dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8)]


def test_8_bit_adam_is_refused_with_fsdp(monkeypatch):
    stand_in_for_bitsandbytes(monkeypatch)
    with pytest.raises(UserError, match="remove it or --fsdp"):
        train_c.check(parse("train_c", "--adam-8bit", "--fsdp"))


# ----- services --------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["train_a", "train_b", "train_c"])
@pytest.mark.parametrize("more, module, message", [
    (["--report-to", "wandb"], "wandb", "--report-to wandb needs a package: pip install wandb"),
    (["--report-to", "tensorboard"], "torch.utils.tensorboard", "pip install tensorboard"),
    (["--adam-8bit"], "bitsandbytes", "--adam-8bit needs a package: pip install bitsandbytes"),
    (["--push-to-hub", "me/x"], "huggingface_hub", "--push-to-hub needs a package: pip install huggingface_hub")])
def test_a_missing_package_is_named_before_anything_is_loaded(script, more, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        SCRIPTS[script].main(parse(script, *more))


@pytest.mark.parametrize("name", ["unicorn", "me/un/corn", "me/a unicorn", "me/-x", "me/x--y", "me/", "/x",
                                  "https://huggingface.co/me/x", "me/" + "x" * 100])
def test_a_bad_name_of_a_repository_is_refused_before_the_training(name, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(UserError, match="is not the name of a repository, expected USER/NAME") as error:
        train_c.main(parse("train_c", "--push-to-hub", name))
    assert "\n" not in str(error.value)


def test_an_upload_without_a_token_is_refused_before_the_training(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="--push-to-hub needs a token: run `hf auth login`"):
        train_c.check(parse("train_c", "--push-to-hub", "me/x"))
    train_c.check(parse("train_c", "--push-to-hub", "me/x", "--hub-token", "hf_x"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        train_c.check(parse("train_c", "--push-to-hub", "me/x", "--hub-token", "hf_x"))


def test_a_token_reaches_the_hub_and_nothing_else(tmp_path, monkeypatch):
    """Not checkpoints, cards and services, which others read."""
    args, made = parse("train_c", "--push-to-hub", "me/x", "--hub-token", "hf_secret"), []
    args.out = str(tmp_path)
    (tmp_path / "README.md").write_text("# x\n")

    class Api:
        def __init__(self, token):
            made.append(token)

        def create_repo(self, *args, **more):
            pass
        create_commit = create_repo
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    push(args)
    assert made == ["hf_secret"]
    assert "hf_secret" not in str(settings_of(args)) and "hf_secret" not in settings_table(args)


def test_wandb_gets_numbers_images_and_the_projects_name(tmp_path, monkeypatch):
    logged, wandb = [], types.ModuleType("wandb")
    wandb.init = lambda **more: logged.append(more["project"])
    wandb.log = lambda values, step: logged.append((step, values))
    wandb.Image = lambda image: np.asarray(image)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_a.main(train_a.parse_args(["--width", "8", "--bottleneck-blocks", "1", "--codebook-size", "16",
                                     "--resolution", "32", "--data", "scenes:all:8", "--batch", "2", "--steps", "2",
                                     "--workers", "0", "--val-count", "2", "--val-every", "0", "--log-every", "1",
                                     "--sample-every", "1", "--device", "cpu", "--report-to", "wandb",
                                     "--project", "emoji", "--out", str(tmp_path)]))
    assert logged[0] == "emoji"
    images = {step: values["samples"] for step, values in logged[1:] if "samples" in values}
    assert [*images] == [0, 1, 2]
    with Image.open(tmp_path / "samples" / "step_000002.png") as sheet:
        assert np.array_equal(images[2], np.asarray(sheet.convert("RGB")))
    assert [step for step, values in logged[1:] if "loss" in values] == [1, 2]


def test_tensorboard_gets_numbers_and_images(tmp_path, monkeypatch):
    calls, module = [], types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def add_image(self, name, image, step, dataformats):
            calls.append((name, image.shape, step, dataformats))

        def flush(self):
            pass
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Log(tmp_path, 0, "tensorboard")
    log.write(3, loss=0.5)
    log.images(3)                                # a sheet that failed
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "samples" / "step_000003.png")
    log.images(3)
    assert calls == [("loss", 0.5, 3), ("samples", (20, 40, 3), 3, "HWC")]


# ----- LoRAs next to checkpoints ---------------------------------------------------------------------

def test_every_checkpoint_of_a_lora_run_is_also_a_lora(tmp_path):
    """With the averaged weights, as lora.safetensors at the end: the last two are the same file."""
    args = train_c.parse_args([*C, "--lora", "--rank", "2", "--steps", "6", "--save-every", "2", "--keep", "2", "--lr",
                               "1e-2", "--warmup", "0", "--trigger", "horn", "--out", str(tmp_path)])
    train_c.main(args)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_0000000{step}.{suffix}" for step in (4, 6) for suffix in ("pt", "safetensors")]
    last, final = (load_file(tmp_path / name) for name in ("checkpoints/step_00000006.safetensors", "lora.safetensors"))
    earlier = load_file(tmp_path / "checkpoints/step_00000004.safetensors")
    assert last.keys() == final.keys() == earlier.keys()
    assert all(torch.equal(last[name], final[name]) for name in last)
    assert any(not torch.equal(last[name], earlier[name]) for name in last)
    model = Wuerstchen.load("tiny", "cpu", prior="tests/golden/runs/prior",
                            lora={tmp_path / "checkpoints/step_00000004.safetensors": 1.0})
    assert len(model.loras) == 1


def test_a_full_run_has_no_loras(tmp_path):
    train_c.main(train_c.parse_args([*C, "--steps", "1", "--out", str(tmp_path)]))
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [".pt"]
