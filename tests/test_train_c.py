"""train_c.py: the same work on any number of processes, exact resumes, and mistakes that other trainers make.

All runs use the tiny weights and few steps. What they learn does not matter here, but every bit must be right.
"""
import ast
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from training import data
import sample
from training import scenes
import train_c
from loading import lora_formats
from loading.errors import UserError
from loading.layouts import locate
from loading.text_encoder import CLIPTextModel
from training import optim
from training.preserve import Teacher, TeacherLatents
from training.checkpoints import Checkpoints
from training.losses import LOSS_WEIGHTS
from training.processes import Processes
from helpers import count_messages, lines, main_of, newest, same, start, together
from stage_b import TinyImageEncoder
from stage_c import StageC

ROOT = Path(train_c.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images of an object whose name Stage C does not know, with captions."""
    out = tmp_path_factory.mktemp("unicorns")
    rng = np.random.default_rng(0)
    for i in range(12):
        scene = scenes.place_single(rng, "unicorn", ("small", "medium", "large")[i % 3], list(scenes.COLOURS)[i % 5])
        Image.fromarray(scenes.render(scene)).save(out / f"{i:02d}.png")
        (out / f"{i:02d}.txt").write_text(scenes.plain_caption(scene.objects, scene.colour) + "\n")
    return out


SMALL = ["--weights", "tiny", "--workers", "0", "--val-every", "0", "--log-every", "1", "--device", "cpu", "--warmup",
         "2", "--lr", "1e-3"]
LORA = ["--lora", "--rank", "2"]


def train(folder, out, *options, steps: int = 4):
    train_c.main(train_c.parse_args([*SMALL, "--data", str(folder), "--out", str(out), "--steps", str(steps),
                                     *options]))
    return out


LEARNED = ("model", "averaged", "optimizer", "step", "updates", "scaler")


# --- a run and its result ----------------------------------------------------------------------------

def test_a_lora_run_writes_a_folder_that_generates_images(folder, tmp_path):
    """base.json says where the other parts are. The LoRA file with --lora gives the same image, the base another."""
    out = train(folder, tmp_path / "run", *LORA, "--lr", "0.05", "--sample-every", "4", "--val-every", "2", steps=4)
    assert {path.name for path in out.iterdir()} >= {"lora.safetensors", "base.json", "README.md", "log.jsonl",
                                                     "curves.png", "samples", "checkpoints"}
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["step_000000.png", "step_000004.png"]
    for name, options in (("folder", ["--weights", str(out)]),
                          ("file", ["--weights", "tiny", "--lora", f"{out}/lora.safetensors"]),
                          ("off", ["--weights", "tiny", "--lora", f"{out}/lora.safetensors:0"]),
                          ("base", ["--weights", "tiny"])):
        sample.main([*options, "--prompt", "a unicorn on a red background", "--seed", "1", "--steps-c", "3",
                     "--steps-b", "2",
                     "--out", str(tmp_path / f"{name}.png")])
    pixels = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    # Frozen weights use another kernel.
    assert np.array_equal(pixels["folder"], pixels["file"]) and np.abs(pixels["off"] - pixels["base"]).max() <= 1
    assert np.abs(pixels["file"] - pixels["base"]).max() > 10
    with safe_open(out / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert [metadata[name] for name in ("rank", "alpha", "steps", "images")] == ["2", "2", "4", "12"]
    assert len(metadata["base_hash"]) == 64
    with Image.open(tmp_path / "file.png") as image:
        settings = json.loads(image.text["wuerstchen"])
    assert settings["lora"].endswith("lora.safetensors:1.0") and "lora lora.safetensors" in settings["hashes"]


def test_a_lora_run_as_weights_is_continued_or_refused(folder, tmp_path):
    """Without --lora-weights its LoRA would be lost in training and come back in sampling, on a prior trained without
    it. Continued, the first validation is the last one of the first run, with its rank, alpha and layers."""
    options = ["--val-every", "2", "--val-count", "1", "--ema", "0", "--lr", "0.02"]
    first = train(folder, tmp_path / "first", *LORA, "--alpha", "3", "--targets", "query", *options, steps=2)
    for more in (LORA, [], ["--train-text"]):
        with pytest.raises(UserError, match=r"is a LoRA on .*prior, .*python -m tools.lora merge .*prior .*first/lora."
                                            "safetensors FOLDER, then add --prior.* add --lora --lora-weights .*first"):
            train(folder, tmp_path / "no", "--weights", str(first), *more)
    for weights, file in ((first, first), ("tiny", first / "lora.safetensors")):
        out = train(folder, tmp_path / f"second {file.name}", "--weights", str(weights), "--lora", "--lora-weights",
                    str(file), "--lora-dropout", "0.1", *options, steps=2)
        before, after = ([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                         for run in (first, out))
        losses = [[line["val_loss"] for line in lines if "val_loss" in line] for lines in (before, after)]
        assert losses[1][0] == losses[0][-1] != losses[0][0] and losses[1][-1] != losses[1][0]
        weights, metadata = lora_formats.read_lora(out)
        assert [metadata[name] for name in ("rank", "alpha", "targets")] == ["2", "3", "attention_blocks.N.query x6"]
        assert "| `--targets` | attention_blocks.N.query x6 |" in (out / "README.md").read_text()
        assert locate(out)["lora"] == out / "lora.safetensors"       # and not that of the first run as well


@pytest.mark.parametrize("options, message", [
    (["--lora-weights", "x"], "add --lora"), (["--lora", "--lora-weights", "x"], "x: there is no such file"),
    *((["--lora", "--lora-weights", "x", *more], "brings its own rank, alpha, targets") for more in (
        ["--rank", "8"], ["--alpha", "2"], ["--targets", "attention"], ["--targets", "all"],
        ["--rslora"], ["--dora"]))], ids=str)
def test_a_lora_that_continues_brings_its_own_settings(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(folder, tmp_path / "run", *options)


def test_a_prior_never_inherits_the_lora_of_another(tmp_path):
    """A run that started from a LoRA run, with --init random or another prior, has a prior without that LoRA."""
    def run(name: str, weights, lora=None, prior=False, **files) -> Path:
        out = tmp_path / name
        out.mkdir()
        if prior:
            shutil.copytree(ROOT / "models" / "tiny" / "prior", out / "prior")
        base = dict(weights=str(weights), files={part: str(path) for part, path in files.items()})
        (out / "base.json").write_text(json.dumps(base | (dict(lora=lora) if lora else {})))
        return out

    prior = ROOT / "models" / "tiny" / "prior"
    first = run("first", "tiny", "lora.safetensors")
    assert locate(first)["lora"] == first / "lora.safetensors" and locate(first)["prior"] == prior
    assert locate(run("decoder", first))["lora"] == first / "lora.safetensors"       # as train_b.py leaves it
    assert "lora" not in locate(first, {"prior": prior})                             # --weights first --prior OTHER
    assert locate(first, {"decoder": prior})["lora"] and locate(first, {"prior": None})["lora"]
    full = run("full", first, prior=True)
    assert "lora" not in locate(full) and locate(full)["prior"] == full / "prior"
    assert "lora" not in locate(run("decoder of full", full))
    again = run("again", first, "lora.safetensors", prior=prior)                     # a LoRA on --prior OTHER
    assert locate(again)["lora"] == again / "lora.safetensors" and locate(again)["prior"] == prior
    stale = run("stale", "tiny", "lora.safetensors", prior=True)                     # prior/ is from an earlier run
    assert locate(stale)["prior"] == prior


def test_full_fine_tuning_writes_a_prior_that_replaces_the_base(folder, tmp_path):
    out = train(folder, tmp_path / "run", steps=2)
    before, after = (load_file(path / "prior" / "diffusion_pytorch_model.safetensors")
                     for path in (ROOT / "models" / "tiny", out))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)
    sample.main(["--weights", str(out), "--prompt", "a cat", "--seed", "1", "--steps-c", "2", "--steps-b", "1", "--out",
                 str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").stat().st_size > 1000
    diffusers = pytest.importorskip("diffusers", reason="opens the result in diffusers: pip install diffusers")
    wuerstchen = diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior
    theirs = wuerstchen.WuerstchenPrior.from_pretrained(out / "prior", low_cpu_mem_usage=False)
    assert all(torch.equal(tensor, after[name].float()) for name, tensor in theirs.state_dict().items())


def test_training_from_random_weights_takes_its_sizes_from_a_config(folder, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(dict(c=32, depth=1, nhead=2, c_cond=128, c_r=32, dropout=0.0)))
    out = train(folder, tmp_path / "run", "--init", "random", "--config", str(tmp_path / "small.json"), steps=1)
    assert json.loads((out / "prior" / "config.json").read_text())["c"] == 32


def test_the_text_encoder_learns_only_on_request(folder, tmp_path):
    """Stage B uses the same encoder, so its embeddings must not change by default. One that learns starts with the same
    embeddings, which depend on the mask of the padding."""
    losses = []
    for name, options in (("off", []), ("on", ["--train-text"])):
        out = train(folder, tmp_path / name, *options, "--caption-dropout", "0", steps=2)
        assert (out / "text_encoder").exists() is (name == "on")
        assert any(part.startswith("text.") for part in newest(out)["model"]) is (name == "on")
        losses.append([line["loss"] for line in lines(out)])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and losses[0][1] != losses[1][1]


# --- what a step gets --------------------------------------------------------------------------------

def samples(folder, *options, n: int = 400, **more) -> list[dict]:
    args = train_c.parse_args([*SMALL, "--data", str(folder), "--out", "unused", *options])
    dataset = data.open_dataset(folder)
    dataset.bucket = np.zeros(len(dataset), int)
    every = train_c.StageCSamples(dataset, [(128, 128)], args, {}, {}, **more)
    return [every[position, position % len(dataset), 0] for position in range(n)]


def test_noise_levels_are_the_original_ones(folder):
    """(1 - u) 1.08 + 0.001, clamped: 7 % at exactly t = 1, where sampling starts and where other trainers never train.
    In float32, while others draw one of 256 bfloat16 numbers."""
    t = np.array([item["t"] for item in samples(folder)])
    assert t.dtype == np.float32 and 0.04 < (t == 1).mean() < 0.12 and t.min() >= 0.001 and len(np.unique(t)) > 350


def test_captions_are_dropped_one_by_one(folder):
    """Other trainers drop whole batches or nothing, and guidance breaks."""
    dropped = np.array([item["caption"] == "" for item in samples(folder, "--caption-dropout", "0.25")])
    assert 0.18 < dropped.mean() < 0.32
    batches = dropped.reshape(-1, 4).mean(1)
    assert len(set(batches.tolist())) >= 4                                       # 0, 1, 2, 3 of 4, not all or none
    default = np.mean([item["caption"] == "" for item in samples(folder)])       # 5 %
    assert 0.03 < default < 0.075
    assert not any(item["caption"] == "" for item in samples(folder, "--caption-dropout", "0", n=50))


def test_every_sample_has_its_own_noise(folder):
    """In other trainers, all GPUs draw the same noise from the same seed."""
    first, again, other = (samples(folder, "--seed", seed, n=3) for seed in ("0", "0", "1"))
    noise = [item["eps"] for item in first]
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1]) < 0.4
    same([item["eps"] for item in first], [item["eps"] for item in again])
    assert not torch.equal(first[0]["eps"],
                           other[0]["eps"]) and not torch.equal(noise[0], samples(folder, n=13)[12]["eps"])


def test_targets_are_float32_with_any_dtype(folder, tmp_path, monkeypatch):
    """The image encoder's BatchNorm statistics do not survive half precision, and its errors would be learned."""
    seen = []
    forward = TinyImageEncoder.forward
    monkeypatch.setattr(TinyImageEncoder, "forward", lambda self, x: seen.append((x.dtype, self.training))
                        or forward(self, x))
    train(folder, tmp_path / "run", *LORA, "--dtype", "bf16", steps=1)
    assert set(seen) == {(torch.float32, False)}


def test_weight_decay_spares_norms_biases_and_loras():
    """Decay would pull a LoRA back to 0. Biases and norms have no scale that decay could regularise."""
    args = train_c.parse_args([*SMALL, "--data", "x", "--out", "y"])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decay = {tuple(p.shape): group["weight_decay"] for group in optim.build_optimizer(model, args).param_groups
             for p in group["params"]}
    assert decay == {(4, 3): 0.01, (4,): 0.0}
    args.lora = True
    assert {group["weight_decay"] for group in optim.build_optimizer(model, args).param_groups} == {0.0}


def test_learning_rates():
    args = train_c.parse_args([*SMALL, "--data", "x", "--out", "y", "--lr", "1", "--warmup", "10", "--steps", "110"])
    for schedule, at_60, at_end in (("constant", 1, 1), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.0002),
                                    ("trapezoid", 1, 1 / 22)):
        args.schedule = schedule
        assert optim.learning_rate(0, args) == pytest.approx(0.1) and optim.learning_rate(9, args) == pytest.approx(1)
        assert optim.learning_rate(60, args) == pytest.approx(at_60)
        assert optim.learning_rate(109, args) == pytest.approx(at_end, rel=0.3)


def test_the_ema_forgets_the_start():
    """min(beta, (1 + n) / (10 + n)). With a constant 0.999, the average of a short run would be its first weights."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = optim.EMA(model, 0.999)
    for value in range(1, 31):
        model.weight.data.fill_(value)
        ema.update()
    assert ema.mean["weight"].item() > 20
    ema.swap()
    assert model.weight.item() == ema.mean["weight"].item() + 0 or model.weight.item() > 20
    ema.swap()
    assert model.weight.item() == 30


@pytest.mark.parametrize("name, t, expected", [("none", 0.5, 1.0), ("p2", 1.0, 0.9999), ("min-snr", 1.0, 1.0)])
def test_loss_weights(name, t, expected):
    assert LOSS_WEIGHTS[name](torch.tensor([t])).item() == pytest.approx(expected)


# --- the same run, however it is computed ------------------------------------------------------------

def torchrun(processes: int, folder, out, *options, steps: int) -> Path:
    together(processes, Path(out).parent, main_of, "train_c", [*SMALL, "--data", str(folder), "--out", str(out),
                                                               "--steps", str(steps), *options])
    return out


@pytest.mark.parametrize("kind", [LORA, []], ids=["lora", "full"])
def test_one_process_two_processes_and_accumulation_do_the_same_work(folder, tmp_path, kind):
    """8 at once, 2 x 4, and 4 twice: the same samples in each step, so the same weights up to rounding.

    The biases of keys are excluded. Each shifts all scores of a query equally, which softmax ignores. So the gradients
    are 0 up to rounding, and AdamW turns that into full steps.
    """
    def learned(out) -> dict:
        return {name: tensor for name, tensor in newest(out)["model"].items() if not name.endswith(".key.bias")}
    one = train(folder, tmp_path / "one", *kind, "--batch", "8", steps=3)
    two = torchrun(2, folder, tmp_path / "two", *kind, "--batch", "4", steps=3)
    accumulated = train(folder, tmp_path / "accumulated", *kind, "--batch", "4", "--grad-accum", "2", steps=3)
    for other in (two, accumulated):
        same(learned(one), learned(other), 1e-5)
        losses = [[json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
                  for out in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weights_split_over_processes_learn_the_same(folder, tmp_path):
    """--fsdp, for what does not fit on one GPU, with gradients clipped over the norm of all parts, a validation and a
    sample sheet between the steps. Resumed by one process that holds all of it, and the other way round."""
    (tmp_path / "prompts.txt").write_text("a cat on a red background\n")
    options = ["--clip", "0.1", "--val-every", "1", "--val-count", "2", "--ema", "0.5"]
    one = train(folder, tmp_path / "one", *options, "--batch", "8", "--save-every", "1", "--keep", "9", steps=3)
    split = torchrun(2, folder, tmp_path / "split", *options, "--fsdp", "--batch", "2", "--grad-accum", "2",
                     "--sample-every", "2", "--sample-prompts", f"{tmp_path}/prompts.txt", steps=2)
    assert len([*(split / "samples").iterdir()]) == 2
    train(folder, split, *options, "--batch", "8", "--resume", "auto", steps=3)
    back = tmp_path / "back"
    (back / "checkpoints").mkdir(parents=True)
    (one / "checkpoints" / "step_00000002.pt").rename(back / "checkpoints" / "step_00000002.pt")
    torchrun(2, folder, back, *options, "--fsdp", "--batch", "4", "--resume", "auto", steps=3)
    for run in (split, back):
        for part in ("model", "averaged"):
            same(newest(one)[part], newest(run)[part], 1e-5)
    kinds = ("loss", "val_loss")
    values = [{(line["step"], kind): line[kind] for line in lines(run) for kind in kinds if kind in line}
              for run in (one, split)]
    assert len(values[0]) == 3 + 4 and values[0] == pytest.approx(values[1], abs=1e-5)


def look_at_blocks(argv: list[str]) -> None:
    """main_of train_c, and in the file `seen` FSDP's groups, the dtypes of weights in a block and outside and of
    inputs, and how many programs were compiled."""
    from torch._dynamo.testing import CompileCounter
    split, compiled, counter = Processes.split_weights, torch.compile, CompileCounter()
    seen = dict(block=set(), head=set(), x_t=set(), t=set())

    def look(self, model, *given):
        split(self, model, *given)
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        seen.update(groups=len({module._get_fsdp_state() for module in modules}), depth=len(model.prior.res_blocks))
        model.prior.res_blocks[0].register_forward_hook(lambda block, *_: seen["block"].add(str(block.grn.gamma.dtype)))
        model.prior.register_forward_hook(lambda prior, given, _: [
            seen[name].add(str(tensor.dtype))
            for name, tensor in zip(("head", "x_t", "t"), (prior.head.weight, *given))] and None)
    Processes.split_weights, torch.compile = look, lambda network: compiled(network, backend=counter)
    main_of("train_c", argv)
    if os.environ["RANK"] == "0":
        Path("seen").write_text(repr(seen | dict(programs=counter.frame_count)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fsdp_gathers_bf16_once_per_block_and_learns_what_autocast_learns(folder, tmp_path, compiled):
    """Blocks are gathered in bfloat16, in one group per (res, timestep, attention), and equal ones are compiled once.
    The network's inputs stay float32, as t must."""
    options = ["--dtype", "bf16", "--seed", "1"]
    one = train(folder, tmp_path / "one", *options, "--batch", "4", steps=3)
    together(2, tmp_path, look_at_blocks, [*SMALL, *options, "--data", str(folder), "--out", "two", "--batch", "2",
                                           "--steps", "3", "--fsdp", *["--compile"] * compiled])
    seen, two = ast.literal_eval((tmp_path / "seen").read_text()), tmp_path / "two"
    assert seen["groups"] == seen["depth"] + 1 > 2 and seen["programs"] == 3 * compiled
    assert (seen["block"], seen["head"]) == ({"torch.bfloat16"}, {"torch.float32"})
    assert seen["x_t"] == seen["t"] == {"torch.float32"}
    assert {tensor.dtype for tensor in newest(two)["averaged"].values()} == {torch.float32}
    losses = [[line["loss"] for line in lines(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and len(losses[0]) == 3


@pytest.mark.parametrize("more, programs", [(LORA, 6), (["--checkpointing", "products"], 3)], ids=["lora", "products"])
def test_equal_blocks_are_compiled_once(folder, tmp_path, more, programs):
    """Three programs for all blocks, not three for each of 32 at the official size, also inside DDP. With a LoRA there
    are three more: the input of the first block has no gradient."""
    options = [*more, "--batch", "4"]
    one = train(folder, tmp_path / "one", *options, steps=2)
    together(1, tmp_path, look_at_blocks, [*SMALL, *options, "--data", str(folder), "--out", "two", "--steps", "2",
                                           "--compile"])
    assert ast.literal_eval((tmp_path / "seen").read_text())["programs"] == programs
    losses = [[line["loss"] for line in lines(run)] for run in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def resume_and_count(argv: list[str]) -> None:
    """main_of train_c, and how often this process read a checkpoint, in the file reads0 or reads1."""
    read, reads = Checkpoints.read, []
    Checkpoints.read = staticmethod(lambda path, script: reads.append(path.name) or read(path, script))
    main_of("train_c", argv)
    Path(f"reads{os.environ['RANK']}").write_text(" ".join(reads))


@pytest.mark.parametrize("kind", [LORA, ["--fsdp"]], ids=["lora", "fsdp"])
def test_only_one_process_reads_the_checkpoint(folder, tmp_path, kind):
    """At the official size it is 16 GB. If it is torn, all continue from the one before. To the bit."""
    kind = [*kind, "--batch", "2", "--save-every", "1", "--keep", "9"]
    unbroken, out = torchrun(2, folder, tmp_path / "unbroken", *kind, steps=4), tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for step, end in ((2, None), (3, -2000)):
        name = f"checkpoints/step_{step:08d}.pt"
        (out / name).write_bytes((unbroken / name).read_bytes()[:end])
    together(2, tmp_path, resume_and_count, [*SMALL, *kind, "--data", str(folder), "--out", str(out), "--steps", "4",
                                             "--resume", "auto"])
    assert [(tmp_path / f"reads{rank}").read_text() for rank in (0, 1)] == ["step_00000003.pt step_00000002.pt", ""]
    assert "resuming from step_00000002.pt, the one before" in (tmp_path / "0.txt").read_text()
    same({name: newest(unbroken)[name] for name in LEARNED}, {name: newest(out)[name] for name in LEARNED})


def test_if_the_checkpoint_does_not_fit_no_process_waits(folder, tmp_path):
    """Rank 0 says why, and the other ends as well."""
    out = train(folder, tmp_path / "run", *LORA, steps=1)
    path = out / "checkpoints" / "step_00000001.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | dict(averaged=dict([*state["averaged"].items()][1:])), path)
    runs = start(2, tmp_path, main_of, "train_c", [*SMALL, *LORA, "--data", str(folder), "--out", str(out), "--steps",
                                                   "2", "--resume", "auto"])
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [1, 2]
    assert "does not fit: " in (tmp_path / "0.txt").read_text()


def test_gradients_travel_once_per_step(folder, tmp_path):
    """Forward and backward of all micro-steps except the last are inside no_sync(). In other trainers only backward is,
    which saves nothing, because DDP decides in forward."""
    together(2, tmp_path, count_messages, "train_c", [*SMALL, *LORA, "--data", str(folder), "--out", "run", "--steps",
                                                      "2", "--batch", "1", "--grad-accum", "4"])
    # 2 steps, one bucket. Without no_sync() it would be 8.
    assert (tmp_path / "calls").read_text() == "2"


def test_a_run_continues_with_another_number_of_processes(folder, tmp_path):
    """1 -> 2 -> 1: the data order is a function of the step, so only rounding differs."""
    unbroken = train(folder, tmp_path / "unbroken", *LORA, "--batch", "4", steps=6)
    out = train(folder, tmp_path / "run", *LORA, "--batch", "4", steps=2)
    torchrun(2, folder, out, *LORA, "--batch", "2", "--resume", "auto", steps=4)
    train(folder, out, *LORA, "--batch", "4", "--resume", "auto", steps=6)
    same(newest(unbroken)["model"], newest(out)["model"], 1e-5)


@pytest.mark.parametrize("options", [LORA, [], [*LORA, "--lora-dropout", "0.2", "--grad-accum", "2", "--random-flip"],
                                     [*LORA, "--workers", "1"], ["--train-text"],
                                     [*LORA, "--dtype", "bf16", "--checkpointing"], [*LORA, "--dtype", "fp16"],
                                     [*LORA, "--cache"]],
                         ids=["lora", "full", "dropout and flips", "a worker", "text", "bf16", "fp16", "a new cache"])
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(folder, tmp_path, options):
    """Stopped after steps 3 and 5 of 6, in the middle of an epoch: weights, EMA, optimizer, scaler and data order all
    continue exactly. With a cache, the first run must see rounded values as the second does."""
    def own(name):       # each run has its own cache
        return [str(tmp_path / f"{name}_cache")] if options[-1:] == ["--cache"] else []
    unbroken = train(folder, tmp_path / "unbroken", "--batch", "2", *options, *own("unbroken"), steps=6)
    out = tmp_path / "broken"
    for steps in (3, 5, 6):
        train(folder, out, "--batch", "2", *options, *own("broken"), "--resume", "auto", steps=steps)
    same({name: newest(unbroken)[name] for name in LEARNED}, {name: newest(out)[name] for name in LEARNED})


def test_a_signal_finishes_the_step_and_saves(folder, tmp_path, monkeypatch, capsys):
    """A scheduler sends SIGTERM before it kills a run. Nothing is lost, and the resumed run equals an unbroken one."""
    unbroken = train(folder, tmp_path / "unbroken", *LORA, steps=4)
    update = optim.EMA.update

    def update_and_warn(self, *skip):
        update(self, *skip)
        if self.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(optim.EMA, "update", update_and_warn)
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            train(folder, tmp_path / "run", *LORA, steps=4)
    assert end.value.code == 143
    assert newest(out)["step"] == 2 and "stopped after step 2" in capsys.readouterr().err
    assert not (out / "lora.safetensors").exists()
    train(folder, out, *LORA, "--resume", "auto", steps=4)
    same(newest(unbroken)["model"], newest(out)["model"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_run_saves_too(folder, tmp_path, name):
    """A scheduler and Ctrl-C in a terminal signal all of them. If that ended the readers, the run would fail."""
    out = tmp_path / "run"
    run = subprocess.Popen([sys.executable, str(ROOT / "train_c.py"), *SMALL, *LORA, "--data", str(folder), "--out",
                            str(out), "--steps", "100000", "--workers", "2"],
                           stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ
                           | dict(OMP_NUM_THREADS="1"))
    try:
        # Wait until the readers work.
        while run.poll() is None and not ((out / "log.jsonl").exists()
                                          and (out / "log.jsonl").read_text().count('"grad_norm"') > 2):
            time.sleep(0.2)
        os.killpg(run.pid, getattr(signal, name))
        _, errors = run.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == dict(SIGTERM=143, SIGINT=130)[name] and "Traceback" not in errors, errors[-2000:]
    assert "and saved: --resume auto continues" in errors
    assert newest(out)["step"] >= 1


def test_gradient_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    plain, *others = (newest(train(folder, tmp_path / f"{number}", *options, steps=2))["model"]
                      for number, options in enumerate(([], ["--checkpointing"], ["--checkpointing", "products"])))
    for other in others:
        same(plain, other, 1e-6)


def test_a_cache_changes_nothing_but_time(folder, tmp_path, monkeypatch):
    """Latents and texts are computed once. The weights are the same, and a second run encodes no image."""
    # One image per batch in both runs, so that the rounding is the same.
    options = [*LORA, "--random-flip", "--batch", "1"]
    plain = train(folder, tmp_path / "plain", *options, steps=3)
    options += ["--cache", str(tmp_path / "cache"), "--cache-dtype", "fp32"]
    cached = train(folder, tmp_path / "cached", *options, steps=3)
    same(newest(plain)["model"], newest(cached)["model"])
    monkeypatch.setattr(TinyImageEncoder, "forward", lambda *_: pytest.fail("an image was encoded"))
    again = train(folder, tmp_path / "again", *options, steps=3)
    same(newest(cached)["model"], newest(again)["model"])


def test_with_a_cache_no_encoder_stays_in_memory(folder, tmp_path, monkeypatch):
    """They take 3 GB at the official size. Captions of the validation and of --preserve are cached before."""
    def encoders() -> int:
        gc.collect()
        return sum(type(thing) in (TinyImageEncoder, CLIPTextModel) for thing in gc.get_objects())
    alive, counts, batches = encoders(), [], train_c.batches
    monkeypatch.setattr(train_c, "batches", lambda *args: counts.append(encoders()) or batches(*args))
    (tmp_path / "prompts.txt").write_text("a tree on a red background\n")
    train(folder, tmp_path / "run", *LORA, "--cache", str(tmp_path / "cache"), "--preserve", "0.5",
          "--preserve-prompts", f"{tmp_path}/prompts.txt",
          "--val-every", "1", "--val-data", "scenes:captioned:4:9", "--val-count", "2", steps=2)
    assert counts == [alive]


def test_a_broken_image_is_replaced_and_named(folder, tmp_path, capsys):
    """It is cut off in the middle. Its header is fine, so it is only found when it is read."""
    broken = tmp_path / "data"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "03.png").write_bytes((folder / "03.png").read_bytes()[:400])
    train(broken, tmp_path / "run", *LORA, "--cache", str(tmp_path / "cache"), steps=4)
    assert "1 images cannot be read: " in capsys.readouterr().err
    train(broken, tmp_path / "other", *LORA, steps=4)
    assert re.search("^03.png cannot be read and is replaced: .*truncated", capsys.readouterr().err, re.M)


def test_broken_copies_and_broken_images_of_the_validation_are_replaced(folder, tmp_path, capsys):
    """Copies share their key in the cache: only one of them was replaced, and training ended at the other for ever.
    One of them is the only image of its shape, and the only one of the validation."""
    broken, only = tmp_path / "data", tmp_path / "only"
    for target in (broken, only):
        target.mkdir()
    for path in sorted(folder.iterdir())[:6]:
        (broken / path.name).write_bytes(path.read_bytes())
    content = (folder / "03.png").read_bytes()[:400]
    for name in ("x1", "x2"):
        (broken / f"{name}.png").write_bytes(content)
        (broken / f"{name}.txt").write_text("x")
    Image.new("RGB", (256, 100)).save(broken / "wide.png")
    (broken / "wide.png").write_bytes((broken / "wide.png").read_bytes()[:60])
    (broken / "wide.txt").write_text("wide")
    options = [*LORA, "--resolution", "256", "--max-ratio", "2", "--batch", "1", "--val-every", "9", "--val-count", "9"]
    train(broken, tmp_path / "run", *options, "--cache", str(tmp_path / "cache"), steps=12)
    assert "3 images cannot be read: wide.png, x1.png, x2.png\n" in capsys.readouterr().err
    train(broken, tmp_path / "other", *options, steps=12)
    err = capsys.readouterr().err
    assert all(f"\n{name}.png cannot be read and is replaced: " in err for name in ("x1", "x2", "wide"))
    (only / "a.png").write_bytes(content)
    (only / "a.txt").write_text("a")
    for options in (["--val-data", str(only)], ["--workers", "1"], ["--cache", str(tmp_path / "cache")]):
        with pytest.raises(UserError, match="none of (its )?1 images (of this size )?can be read") as error:
            train(only if "--val-data" not in options else folder, tmp_path / options[0], *LORA, "--val-every",
                  "1" if "--val-data" in options else "0", *options)
        assert len(str(error.value).splitlines()) == 1


def test_data_is_checked_before_models_are_fetched(tmp_path, monkeypatch, capsys):
    """Gigabytes came first, then the error. --dry-run writes all that was skipped, even if nothing is left."""
    monkeypatch.setattr(train_c, "locate_start", None)
    with pytest.raises(UserError, match="ownr/name: there is no such folder or file; .* as hub:ownr/name"):
        train("ownr/name", tmp_path / "run")
    (tmp_path / "data").mkdir()
    for i in range(7):
        (tmp_path / "data" / f"{i}.png").write_text("?")
    with pytest.raises(UserError, match="no image to train on"):
        train(tmp_path / "data", tmp_path / "run", "--dry-run")
    lines = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert lines == [f"{i}.png\tit is not an image in a known format" for i in range(7)]
    assert "skipped.tsv names all 7" in capsys.readouterr().err


def test_preserved_samples_are_compared_with_the_original_model(folder, tmp_path, capsys):
    """A LoRA starts as the base model. If all rows are preserved, the first loss is 0; without --preserve it is not.
    The latents generated at the start are kept, so a resumed run generates none."""
    (tmp_path / "prompts.txt").write_text("a cat on a red background\na tree on a white background\n")
    preserve = ["--preserve-prompts", f"{tmp_path}/prompts.txt", "--preserve"]
    losses = {}
    for name, options in (("lora", [*LORA, *preserve, "0.999"]), ("full", [*preserve, "0.999"]), ("none", LORA)):
        out = train(folder, tmp_path / name, *options, steps=1)
        losses[name] = json.loads((out / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["lora"] < 1e-9 and losses["full"] < 1e-9 < losses["none"]
    assert "generating latents to preserve" in capsys.readouterr().err
    train(folder, tmp_path / "lora", *LORA, *preserve, "0.999", "--resume", "auto", steps=2)
    assert "generating latents to preserve" not in capsys.readouterr().err


def test_preserved_are_other_prompts_and_the_empty_one(folder, tmp_path):
    """A share of the samples, each with the latents of its prompt; and all samples without a caption, for guidance."""
    (tmp_path / "prompts.txt").write_text("a cat\na tree\n")
    options = [*LORA, "--preserve-prompts", f"{tmp_path}/prompts.txt", "--preserve", "0.5", "--cache", str(tmp_path)]
    args = train_c.parse_args(["--data", "x", "--out", "y", *options])
    preserved = TeacherLatents(args, Teacher(torch.nn.Linear(1, 1), False, torch.float32, contextlib.nullcontext()))
    for number, prompt in enumerate(preserved.prompts):
        preserved.cache.put(preserved.key(prompt, (128, 128)), np.full((16, 3, 3), number + 1.0))
    kept = samples(folder, *options, "--caption-dropout", "0.2", n=200, preserved=preserved)
    with_caption = [item for item in kept if item["caption"]]
    assert 0.4 < sum(item["preserve"] for item in with_caption) / len(with_caption) < 0.6
    assert {(item["caption"], item["teacher_latents"].mean().item()) for item in with_caption
            if item["preserve"]} == {("a cat", 1.0), ("a tree", 2.0)}
    assert not any(item["teacher_latents"].any() for item in kept if not item["preserve"])
    without = [item for item in kept if not item["caption"]]
    assert all(item["preserve"] and item["teacher_latents"].mean() in (1, 2) for item in without)
    assert 20 < len(without) < 60


# --- NaN and infinity ------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_nan_step_is_skipped_and_its_batch_named(folder, tmp_path, monkeypatch, dtype):
    """One NaN would destroy all weights. Other trainers replace it by 0, or stop on one process only."""
    calls, forward = [], StageC.forward

    def sometimes(self, x_t, t, text):
        calls.append(1)
        return forward(self, x_t, t, text) * (float("nan") if len(calls) == 2 else 1.0)
    monkeypatch.setattr(StageC, "forward", sometimes)
    out = train(folder, tmp_path / "run", *LORA, "--dtype", dtype, steps=4)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    bad, = (line for line in lines if line.get("bad_step"))
    assert bad["step"] == 2 and len(bad["captions"]) == 4 and len(bad["positions"]) == 4
    state = newest(out)
    assert (state["bad_in_all"], state["bad"], state["updates"]) == (1, 0, 3)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_too_many_nan_steps_in_a_row_stop_the_run_with_its_last_good_state(folder, tmp_path, monkeypatch):
    forward = StageC.forward
    monkeypatch.setattr(StageC, "forward", lambda self, *args: forward(self, *args) * float("nan"))
    with pytest.raises(UserError, match="3 steps in a row came to NaN or infinity, up to step 3; "
                                        "the last good state is in .*lower --lr"):
        train(folder, tmp_path / "run", *LORA, "--max-bad-steps", "3", steps=9)
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "run")["model"].values())


# --- checkpoints and errors ------------------------------------------------------------------------

def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    """And of each its LoRA, a file for sample.py --lora."""
    out = train(folder, tmp_path / "run", *LORA, "--save-every", "1", "--keep", "2", steps=4)
    names = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert names == ["step_00000003.pt", "step_00000003.safetensors", "step_00000004.pt", "step_00000004.safetensors"]


def test_v1_is_not_trained():
    """Its Stage C works on unscaled latents. Training on scaled ones would ruin it without an error."""
    args = train_c.parse_args(["--data", "x", "--out", "y", "--weights", "v1"])
    with pytest.raises(UserError, match="--weights v1 can generate images but not be fine-tuned: .* choose v2-base"):
        train_c.check(args)


def test_a_run_is_not_overwritten_and_foreign_checkpoints_are_refused(folder, tmp_path):
    out = train(folder, tmp_path / "run", *LORA, steps=1)
    with pytest.raises(UserError,
                       match="exists already: add --resume auto to continue from it, or choose another --out"):
        train(folder, out, *LORA)
    with pytest.raises(UserError, match="there is no such file; the checkpoints here are step_00000001.pt"):
        train(folder, out, *LORA, "--resume", "nowhere.pt")
    path = out / "checkpoints" / "step_00000001.pt"
    for content, message in ((path.read_bytes()[:-500], "cannot be read, it is probably cut off"),
                             (b"hello", "cannot be read")):
        (tmp_path / "torn.pt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            train(folder, tmp_path / "other", *LORA, "--resume", str(tmp_path / "torn.pt"))
    torch.save(dict(script="train_b.py"), tmp_path / "b.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_c.py but of train_b.py"):
        train(folder, tmp_path / "other", *LORA, "--resume", str(tmp_path / "b.pt"))


def test_settings_that_differ_from_the_checkpoints_are_named(folder, tmp_path, capsys):
    out = train(folder, tmp_path / "run", *LORA, steps=1)
    train(folder, out, *LORA, "--resume", "auto", "--caption-dropout", "0.1", steps=2)
    assert "resuming with --caption-dropout 0.1, the checkpoint has 0.05" in capsys.readouterr().err


ERRORS = [
    (["--rank", "0"], "--rank: expected a whole number from 1 to 8192, got '0'"),
    (["--caption-dropout", "1"], "--caption-dropout: expected a number .* from 0 to below 1, got '1'"),
    (["--lora", "--init", "random"], "does not go with --train-text or --init random"),
    (["--config", "x.json"], "add --init random"),
    (["--cache", "x", "--crop", "random"], "does not go with --crop random"),
    (["--preserve", "0.5"], "--preserve and --preserve-prompts go together"),
    (["--resolution", "100"], "expected a multiple of 128"),
    (["--filter", "min_aesthetic"], "expected something like min_aesthetic=5"),
    (["--lora", "--targets", "nothing_like_it"], "nothing_like_it"),
    (["--init", "random", "--config", "nowhere.json"], "nowhere.json"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_user_errors_are_one_line(folder, tmp_path, options, message):
    with pytest.raises((UserError, OSError), match=message) as error:
        train(folder, tmp_path / "run", *options)
    assert "\n" not in str(error.value)


def test_a_dry_run_prints_what_would_happen_and_does_nothing(folder, tmp_path, capsys):
    train(folder, tmp_path / "run", *LORA, "--dry-run")
    output = capsys.readouterr().out
    assert all(words in output for words in ("parameters learn", "GiB", "128x128 px 12", "unicorn"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_validation_is_the_same_work_every_time(folder, tmp_path):
    """At step 0 of two runs: the same value, and one per noise level, which can be compared."""
    values = []
    for name in ("a", "b"):
        out = train(folder, tmp_path / name, *LORA, "--val-every", "1", "--val-count", "3",
                    *(["--lr", "1e-2"] if name == "b" else []), steps=1)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if "val_loss" in line]
        values.append(lines)
    assert values[0][0] == values[1][0] and values[0][1] != values[1][1]
    levels = [values[0][0][f"val_loss_t_{t:.2f}"] for t in train_c.T_GRID]
    assert levels[0] > 10 * levels[-1] > 0
