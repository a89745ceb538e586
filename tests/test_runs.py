"""What a run survives, in all three scripts: signals, failed sheets, torn checkpoints, NaN, a damaged cache, resuming
with other options. And what it refuses: to overwrite a result, or to write weights that are not finite.

All with networks of a few thousand parameters or a LoRA, so only the promises matter, not what is learned.
"""
import json
import os
import platform
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train_a
import train_b
import train_c
from helpers import lines, main_of, newest, same, start, together
from loading.errors import RESUME_HINT, UserError, exit_on_user_error
from stage_a import StageA
from stage_b import StageB
from stage_c import StageC
from tiny import train_encoder, train_text
from training import optim, scenes
from training.checkpoints import Checkpoints, lock_run
from training.processes import Processes
from training.samples import ImageReader

ROOT = Path(train_a.__file__).parent
TINY = ROOT / "models" / "tiny"
DECODER = dict(c_in=4, c_out=4, c_r=8, patch_size=2, c_cond=8, c_hidden=[8, 16], nhead=[-1, 2], blocks=[1, 1],
               level_config=["CT", "CTA"], inject_effnet=[False, True], effnet_embd=16, clip_embd=128, kernel_size=3,
               dropout=0.1)
ENCODER = dict(_class_name="TinyImageEncoder", c_semantic=16, c_hidden=[4, 8, 8, 8], blocks=[1, 1, 1, 1])
SMALL = ["--workers", "0", "--val-every", "0", "--sample-every", "0", "--log-every", "1", "--device", "cpu", "--warmup",
         "2", "--batch", "2", "--val-count", "2"]
MODULES = dict(a=train_a, b=train_b, c=train_c)
RESULTS = dict(a="vqgan", b="decoder", c="lora.safetensors")
LEARNED = ("model", "averaged", "optimizer", "step", "updates", "scaler")
each_script = pytest.mark.parametrize("script", ["a", "b", "c"])


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict[str, list[str]]:
    """For each script the options of a run that takes seconds."""
    data, config = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("config")
    rng = np.random.default_rng(0)
    for i in range(6):
        scene = scenes.place_single(rng, scenes.OBJECTS[i], "large", "red")
        Image.fromarray(scenes.render(scene)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(scenes.plain_caption(scene.objects, scene.colour) + "\n")
    for part, content in (("decoder", DECODER), ("image_encoder", ENCODER)):
        (config / part).mkdir()
        (config / part / "config.json").write_text(json.dumps(content))
    own = dict(a=["--width", "8", "--bottleneck-blocks", "1", "--codebook-size", "32", "--resolution", "32"],
               b=["--weights", "tiny", "--init", "random", "--config", str(config), "--blind", "0"],
               c=["--weights", "tiny", "--lora", "--rank", "2"])
    return {script: [*SMALL, "--lr", "1e-3", "--data", str(data), *more] for script, more in own.items()}


def train(script, options, out, *more, steps: int = 3) -> Path:
    module = MODULES[script]
    module.main(module.parse_args([*options[script], "--out", str(out), "--steps", str(steps), *more]))
    return out


def checkpoints(out) -> list[str]:
    """Names of the checkpoints, without the LoRAs next to them."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if ".safetensors" not in path.name)


# --- 0 is not "nothing given" ------------------------------------------------------------------------

@each_script
def test_clip_0_does_not_clip(options, tmp_path, script):
    """It once scaled all gradients to 0, and trained nothing to the end."""
    never, high, low = (train(script, options, tmp_path / clip, "--clip", clip) for clip in ("0", "1e9", "1e-4"))
    same(newest(never)["model"], newest(high)["model"])
    moments = [max(state["exp_avg"].abs().max() for state in newest(out)["optimizer"]["state"].values())
               for out in (never, low)]
    assert moments[0] > 2 * moments[1] > 0


@each_script
def test_lr_0_changes_no_weight(options, tmp_path, script):
    out = train(script, options, tmp_path / "run", "--lr", "0", "--save-every", "1", "--ema", "0")
    first, last = (torch.load(out / "checkpoints" / name, weights_only=True) for name in checkpoints(out))
    assert first["step"] < last["step"] and last["settings"]["lr"] == 0
    learned = [name for name, _ in first["model"].items() if "running" not in name and "num_batches" not in name]
    same({name: first["model"][name] for name in learned}, {name: last["model"][name] for name in learned})


@pytest.mark.parametrize("script, more, message", [
    *((script, more, message) for script in "abc" for more, message in (
        (["--lr", "nan"], "--lr: expected a number such as 0.5 or 2/3, from 0, got 'nan'"),
        (["--lr", "inf"], "--lr: expected a number such as 0.5 or 2/3, from 0, got 'inf'"),
        (["--lr", "-1"], "--lr: expected a number such as 0.5 or 2/3, from 0, got '-1'"),
        (["--weight-decay", "nan"], "--weight-decay: expected a number .* from 0, got 'nan'"),
        (["--clip", "-1"], "--clip: expected a number .* from 0, got '-1'"),
        (["--ema", "nan"], "--ema: expected a number .* from 0 to below 1, got 'nan'"),
        (["--val-every", "-1"], "--val-every: expected a whole number from 0 to 1000000000, got '-1'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got '-1'"),
        (["--max-bad-steps", "0"], "--max-bad-steps: expected a whole number from 1 to 1000000000, got '0'"))),
    ("b", ["--high-noise", "nan"], "--high-noise: expected a number .* above 0, got 'nan'"),
    ("c", ["--alpha", "0"], "--alpha: expected a number .* above 0, got '0'"),
    ("c", ["--max-ratio", "0.5"], "--max-ratio: expected a number .* from 1 to 100, got '0.5'"),
    ("c", ["--adam-eps", "0"], "--adam-eps: expected a number .* above 0, got '0'"),
    ("c", ["--resolution", "0"], "--resolution: expected a multiple of 128 from 128 to 4096, got '0'"),
    ("c", ["--offset-noise", "nan"], "--offset-noise: expected a number .* from 0, got 'nan'"),
], ids=str)
def test_numbers_that_make_no_sense_are_refused(options, tmp_path, script, more, message):
    with pytest.raises(UserError, match=message) as error:
        train(script, options, tmp_path / "run", *more)
    assert "\n" not in str(error.value)


def test_the_small_scripts_refuse_them_too(tmp_path):
    for module, more in ((train_encoder, []), (train_text, ["--image-encoder", "x"])):
        with pytest.raises(UserError, match="--lr: expected a number .* from 0, got 'nan'"):
            module.main(module.parse_args(["--out", str(tmp_path / "run"), "--lr", "nan", *more]))


# --- sample sheets -----------------------------------------------------------------------------------

@each_script
def test_a_failed_sheet_is_a_warning_and_the_checkpoint_stands(options, tmp_path, monkeypatch, capsys, script):
    """A sheet is drawn after the checkpoint of its step is saved. Its failure (memory, NaN in fp16) changes nothing."""
    out, seen = tmp_path / "run", []

    def fail(*args, **more):
        seen.append(checkpoints(out)[-1] if (out / "checkpoints").exists() else None)
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
    for target in dict(a=["train_a.sample_sheet"], b=["training.sheets.Reconstructions.reconstruct"],
                       c=["wuerstchen.Wuerstchen.__call__"])[script]:
        monkeypatch.setattr(target, fail)
    train(script, options, out, "--sample-every", "1", "--save-every", "1", "--keep", "9")
    assert seen == [None, "step_00000001.pt", "step_00000002.pt", "step_00000003.pt"]
    errors = capsys.readouterr().err
    for step in range(4):
        assert f"no samples after step {step}, the training continues: CUDA out of memory." in errors
    assert (out / RESULTS[script]).exists()
    without = train(script, options, tmp_path / "without", "--save-every", "1")
    same(newest(out)["model"], newest(without)["model"])


@each_script
def test_validation_and_samples_are_those_of_the_result(options, tmp_path, script):
    """All three use the averaged weights: the last validation and sheet of a run are the first of a run that starts
    from its result. The weights that learn are elsewhere."""
    more = ["--lr", "1e-3" if script == "c" else "1e-2", "--val-every", "9", "--sample-every", "9"]
    begin = dict(a=options["a"], b=options["b"][:-6], c=options["c"][:-3])      # without --init random, without --lora
    if script == "c":
        options, more = begin, [*more, "--sample-prompt", "a cat on a red background"]
    out = train(script, options, tmp_path / "run", *more)
    result = dict(a=["--init", f"{out}/vqgan"], c=["--prior", f"{out}/prior"],
                  b=["--decoder", f"{out}/decoder", "--image-encoder", f"{out}/image_encoder"])[script]
    again = train(script, begin, tmp_path / "again", *result, *more, steps=1)
    last, first = ([value for line in lines(run) for name, value in line.items() if name in ("val_loss", "val_psnr")]
                   for run in (out, again))
    assert first[0] == pytest.approx(last[-1], rel=5e-4)           # the result is in half precision
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (out / "samples" / "step_000003.png",
                                                                  again / "samples" / "step_000000.png"))
    assert np.abs(a - b).max() <= 1


# --- stopped runs ------------------------------------------------------------------------------------

@each_script
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_does_not_end_like_a_finished_one(options, tmp_path, monkeypatch, capsys, script, name, code):
    """`&&` and schedulers look at the exit code. A signal in the last step finds the work done: exit code 0."""
    update = optim.EMA.update

    def at(step):
        def update_and_warn(self, *skip):
            update(self, *skip)
            if self.updates == step:
                os.kill(os.getpid(), getattr(signal, name))
        return update_and_warn
    monkeypatch.setattr(optim.EMA, "update", at(2))
    with pytest.raises(SystemExit) as end:
        train(script, options, tmp_path / "run")
    assert end.value.code == code and "stopped after step 2 and saved: --resume auto" in capsys.readouterr().err
    monkeypatch.setattr(optim.EMA, "update", at(3))
    train(script, options, tmp_path / "run", "--resume", "auto")
    assert (tmp_path / "run" / RESULTS[script]).exists() and "stopped" not in capsys.readouterr().err


def test_sigterm_before_the_first_step_is_said_as_well(capsys):
    """While models load and caches fill there is nothing to save, so the program ends at once."""
    with pytest.raises(SystemExit) as end, exit_on_user_error(RESUME_HINT):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 143 and capsys.readouterr().err == f"stopped by SIGTERM: {RESUME_HINT}\n"


def program(script: str) -> list[str]:
    """A script in another process, with one thread: the command."""
    code = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.set_num_threads(1)\n" \
           f"import train_{script} as t\nfrom loading.errors import exit_on_user_error\n" \
           "with exit_on_user_error('resume'): t.main(t.parse_args(sys.argv[1:]))"
    return [sys.executable, "-c", code]


def test_all_processes_of_a_stopped_run_end_alike(options, tmp_path):
    """Only rank 1 gets the signal. Both save after the same step and end with 143."""
    out = tmp_path / "run"
    runs = start(2, tmp_path, main_of, "train_c", [*options["c"], "--out", "run", "--steps", "100000"])
    try:
        wait_for_lines(lambda: not runs[0].is_alive(), out, 2)
        os.kill(runs[1].pid, signal.SIGTERM)
        for run in runs:
            run.join(120)
    finally:
        for run in runs:
            run.kill()
    errors = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert [run.exitcode for run in runs] == [143, 143], errors
    assert [error.count("and saved") for error in errors] == [1, 0] and newest(out)["step"] >= 2


def wait_until(done, seconds: float = 180) -> None:
    end = time.time() + seconds
    while not done() and time.time() < end:
        time.sleep(0.01)


def wait_for_lines(ended, out, count: int) -> None:
    log = out / "log.jsonl"
    wait_until(lambda: ended() or log.exists() and log.read_text().count('"grad_norm"') >= count)


def stopped(command: list[str], out: Path, name: str, rng: random.Random) -> int | None:
    """Starts a run, stops it at a random moment, a third of the time before its first step -> exit code, None if it had
    finished before."""
    log = out / "log.jsonl"
    before = log.read_text().count('"grad_norm"') if log.exists() else 0
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        if rng.random() < 1 / 3:
            end, as_before = time.time() + rng.uniform(0.5, 5), log.stat().st_mtime if log.exists() else 0
            while time.time() < end and (log.stat().st_mtime if log.exists() else 0) == as_before:
                time.sleep(0.01)
        else:
            wait_for_lines(lambda: run.poll() is not None, out, before + rng.randint(1, 4))
            time.sleep(rng.uniform(0, 0.3))
        run.send_signal(getattr(signal, name))
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert "Traceback" not in errors or "KeyboardInterrupt" in errors, errors[-2000:]
    return None if run.returncode == 0 else run.returncode


@pytest.mark.slow
@each_script
@pytest.mark.parametrize("name, codes", [("SIGTERM", {143, -15}), ("SIGINT", {130, -2}), ("SIGKILL", {-9})])
def test_runs_stopped_at_random_moments_resume_to_the_bit(options, tmp_path, script, name, codes):
    """Six stops in each of nine runs, 54 in all, at moments that a seed draws: the weights of the end are those of an
    unbroken run, and so is the result. Minus 15 and minus 2: the signal came while Python still imported torch."""
    steps, rng, out = 300, random.Random(f"{script} {name}"), tmp_path / "run"
    more = ["--steps", str(steps), "--save-every", "3", "--resume", "auto"]
    unbroken = train(script, options, tmp_path / "unbroken", *more[2:], steps=steps)
    command = [*program(script), *options[script], "--out", str(out), *more]
    found = [stopped(command, out, name, rng) for _ in range(6)]
    assert set(found) <= codes, f"exit codes {found}, expected {codes}; None: finished before the signal"
    subprocess.run(command, check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    same({key: newest(unbroken)[key] for key in LEARNED}, {key: newest(out)[key] for key in LEARNED})
    result = RESULTS[script] + "/diffusion_pytorch_model.safetensors" * (script != "c")
    assert (unbroken / result).read_bytes() == (out / result).read_bytes()
    logs = [[(line["step"], line["loss"]) for line in lines(run)] for run in (unbroken, out)]
    assert logs[0] == logs[1] and len(logs[0]) == steps


# --- what fails in one process ------------------------------------------------------------------------

@each_script
def test_samples_that_cannot_be_read_lose_no_step(options, tmp_path, monkeypatch, script):
    """Such as those of one shape, if all their entries in the cache were damaged. What was learned before is saved."""
    order, taken = sys.modules["training.order"], []

    def read(self, where):
        taken.append(where)
        return self.samples[where] if len(taken) <= 4 else UserError("all entries were damaged")
    unbroken = train(script, options, tmp_path / "unbroken", steps=4)
    monkeypatch.setattr(order.ErrorsAsItems, "__getitem__", read)
    with pytest.raises(UserError, match="all entries were damaged"):
        train(script, options, tmp_path / "run", steps=4)
    assert checkpoints(tmp_path / "run") == ["step_00000002.pt"]
    monkeypatch.undo()
    out = train(script, options, tmp_path / "run", "--resume", "auto", steps=4)
    same({key: newest(unbroken)[key] for key in LEARNED}, {key: newest(out)[key] for key in LEARNED})


TOGETHER = '''
import sys, types
from loading.errors import UserError
from training.order import micro_batches
from training.processes import Processes
processes, saved, ends = Processes("cpu", minutes=1), [], []

def index(failing):
    def make():
        if processes.rank == failing:
            raise UserError(f"rank {failing}")
        return processes.rank
    assert processes.once_per_node(make) == processes.rank

def samples(failing):
    yield {}
    yield {}
    if processes.rank == failing:
        raise UserError(f"rank {failing}")
    yield from [{}] * 9

def steps(failing):
    batches = samples(failing)
    for step in range(3):
        micro_batches(batches, types.SimpleNamespace(grad_accum=1), processes, saved.append, step)

for case in (index, steps):
    for failing in (0, 1, None):
        try:
            case(failing)
            ends.append("done")
        except UserError as error:
            ends.append(str(error))
        except SystemExit as error:
            ends.append(error.code)
processes.local_rank = processes.rank            # from here on both are on one machine
print(ends, saved, processes.once_per_node(lambda: processes.rank))
processes.close()
'''


def test_if_one_process_fails_the_others_do_not_wait(tmp_path):
    """While data are indexed, once per machine, and while samples are read. They end with 2, and the one that failed
    says why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=str(ROOT))
    runs = [subprocess.Popen([sys.executable, "-c", TOGETHER], stdout=subprocess.PIPE, text=True,
                             env=env | dict(RANK=str(rank), LOCAL_RANK="0")) for rank in range(2)]
    try:
        found = [run.communicate(timeout=120)[0].strip() for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert found == ["['rank 0', 2, 'done', 'rank 0', 2, 'done'] [2, 2] 0",
                     "[2, 'rank 1', 'done', 2, 'rank 1', 'done'] [2, 2] 0"]


# --- checkpoints -------------------------------------------------------------------------------------

def test_a_checkpoint_has_its_name_only_when_it_is_complete(options, tmp_path, monkeypatch):
    """A run that is killed, or whose disk is full, in the middle of writing leaves the older ones, and none torn."""
    out = train("c", options, tmp_path / "run", steps=1)

    def half(content, file):
        file.write(b"half")
        assert checkpoints(out)[-1] == "step_00000001.pt"
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            train("c", options, out, "--resume", "auto", steps=2)
    assert checkpoints(out) == ["step_00000001.pt"]


@each_script
def test_a_torn_newest_checkpoint_gives_way_to_the_one_before(options, tmp_path, capsys, script):
    """It is set aside, so that no later one is rotated out in its favour. The run ends as the unbroken one."""
    unbroken = train(script, options, tmp_path / "unbroken", "--save-every", "1")
    out = train(script, options, tmp_path / "run", "--save-every", "1", "--keep", "3")
    (out / RESULTS[script]).rename(out / "elsewhere")
    for number in (2, 3):
        path = out / "checkpoints" / f"step_0000000{number}.pt"
        path.write_bytes(path.read_bytes()[:-2000 if number == 3 else 0])         # 2: empty
    train(script, options, out, "--save-every", "1", "--keep", "1", "--resume", "auto")
    errors = capsys.readouterr().err
    assert re.search("step_00000003.pt cannot be read, .*; resuming from step_00000002.pt, the one before", errors)
    assert re.search("step_00000002.pt cannot be read, .*; resuming from step_00000001.pt, the one before", errors)
    assert "step_00000003.pt is not what this run continues: renamed to step_00000003.pt.old" in errors
    assert checkpoints(out) == ["step_00000003.pt", "step_00000003.pt.old"]
    same({key: newest(unbroken)[key] for key in LEARNED}, {key: newest(out)[key] for key in LEARNED})


def test_what_a_killed_run_left_half_written_is_removed(options, tmp_path):
    """At the official size it is 12 GB, each time."""
    out = train("c", options, tmp_path / "run", steps=1)
    (out / "checkpoints" / ".step_00000002.0123abcd.pt").write_bytes(b"half")
    train("c", options, out, "--resume", "auto", steps=2)
    assert checkpoints(out) == ["step_00000001.pt", "step_00000002.pt"]


def test_a_torn_only_checkpoint_is_an_error_and_stays(options, tmp_path):
    out = train("c", options, tmp_path / "run")
    path = out / "checkpoints" / "step_00000003.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read, it is probably cut off") as error:
        train("c", options, out, "--resume", "auto", steps=4)
    assert "\n" not in str(error.value) and path.stat().st_size == 1000


@each_script
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_checkpoint_without_weights_or_optimizer_is_refused(options, tmp_path, script, part):
    out = train(script, options, tmp_path / "run", steps=2)
    path = out / "checkpoints" / "step_00000002.pt"
    state = torch.load(path, weights_only=True)
    for empty in ({}, dict(state[part], state={})) if part == "optimizer" else ({},):
        torch.save(state | {part: empty}, path)
        with pytest.raises(UserError, match=f"step_00000002.pt has no state of the {part}: it is not a whole"):
            train(script, options, out, "--resume", "auto")


OTHER = [("c", ["--rank", "4"], "with --rank 2, not 4: resume with that"),
         ("c", ["--targets", "attention[+]mlp"], "with --targets attention, not attention[+]mlp: resume with that"),
         ("c", ["--alpha", "5"], "with --alpha 2.0, not 5.0: resume with that"),
         ("c", ["--rslora"], "without --rslora: remove it"),
         ("c", ["--dora"], "without --dora: remove it"),
         ("b", ["--config", str(TINY)], "does not fit: "),
         ("a", ["--width", "16"], "does not fit: "),
         ("a", ["--codebook", "ema"], "with --codebook gradient, not ema: resume with that")]


@pytest.mark.parametrize("script, more, message", OTHER, ids=str)
def test_resuming_with_other_parameters_is_refused_in_one_line(options, tmp_path, script, more, message):
    out = train(script, options, tmp_path / "run", steps=1)
    more = [word.replace("[+]", "+") for word in more]
    with pytest.raises(UserError, match=re.escape(message).replace(r"\[\+\]", r"\+")) as error:
        train(script, options, out, "--resume", "auto", *more)
    assert "\n" not in str(error.value) and newest(out)["step"] == 1


@pytest.mark.parametrize("script", ["a", "c"])
def test_a_checkpoint_that_lacks_or_bends_a_part_is_refused_in_one_line(options, tmp_path, script):
    """Broadcasting and strict=False would accept some of these, and training would fail or forget later."""
    out = train(script, options, tmp_path / "run", steps=1)
    path = out / "checkpoints" / "step_00000001.pt"
    whole = torch.load(path, weights_only=True)
    name, number = min(whole["averaged"]), min(whole["optimizer"]["state"])
    moments = whole["optimizer"]["state"][number]
    bent = {key: {other: value for other, value in whole.items() if other != key}
            for key in (*LEARNED, "settings", "bad", "bad_in_all", *["usage"] * (script == "a"))}
    bent |= dict(negative=whole | dict(step=-1), words=whole | dict(updates="3"), no_settings=whole | dict(settings={}),
                 average=whole | dict(averaged=whole["averaged"] | {name: torch.zeros(1)}),
                 one_average=whole | dict(averaged={key: x for key, x in whole["averaged"].items() if key != name}))
    for what, other in dict(shape=moments | dict(exp_avg=torch.zeros(1)), lost={}).items():
        state = whole["optimizer"]["state"] | {number: other}
        bent[what] = whole | dict(optimizer=whole["optimizer"] | dict(state=state))
    for what, content in bent.items():
        torch.save(content, path)
        with pytest.raises(UserError, match="it is not a whole checkpoint|does not fit: ") as error:
            train(script, options, out, "--resume", "auto", steps=2)
        assert "\n" not in str(error.value) and str(path) in str(error.value), what


@pytest.mark.parametrize("more, message", [
    (["--alpha", "1"], "with --alpha 2.0, not 1.0: resume with that"), (["--rslora"], "without --rslora: remove it"),
    (["--lora-weights", "{}"], "without --lora-weights: remove it")], ids=str)
def test_a_lora_keeps_its_scale_when_it_is_resumed(options, tmp_path, more, message):
    """It is not in the parameters: the same ones would count half as much."""
    out = train("c", options, tmp_path / "run", steps=1)
    more = [word.format(out / "lora.safetensors") for word in more]
    at = options["c"].index("--rank")
    without_rank = dict(c=options["c"][:at] + options["c"][at + 2:])
    with pytest.raises(UserError, match=re.escape(message)):
        train("c", options if more[0] != "--lora-weights" else without_rank, out, "--resume", "auto", *more, steps=2)


def in_another_process(do) -> tuple[int, int]:
    """do() in a child that then waits to be killed -> its number, and whether it raised nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            do()
            os.write(write, b"1")
        except BaseException:
            traceback.print_exc()
            os.write(write, b"0")
        time.sleep(60)
        os._exit(0)
    answer = int(os.read(read, 1))
    os.close(read), os.close(write)
    return child, answer


@each_script
def test_two_runs_do_not_share_a_folder(options, tmp_path, capsys, script):
    """A dry run may look at it; a killed run has lost it; a run that has ended, even by an error, as well."""
    out = tmp_path / "run"
    child, locked = in_another_process(lambda: globals().update(held=lock_run(out)))
    assert locked
    with pytest.raises(UserError) as error:
        train(script, options, out)
    assert str(error.value) == (f"--out {out} is in use by another run, process {child} on {platform.node()}: wait for "
                                "its end, stop it, or choose another --out")
    assert [path.name for path in out.iterdir()] == [".lock"]
    train(script, options, out, "--dry-run")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train(script, options, out, steps=1)
    del error
    child, locked = in_another_process(lambda: globals().update(held=lock_run(out)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert locked


@each_script
def test_a_full_disk_keeps_the_last_checkpoint(options, tmp_path, script):
    """A limit on the size of files stands in for it. Afterwards the run continues."""
    out = train(script, options, tmp_path / "run", "--save-every", "1", "--keep", "1", steps=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match="step_00000002.pt cannot be written: File too large: it needs") as error:
            train(script, options, out, "--save-every", "1", "--keep", "1", "--resume", "auto", steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value) and checkpoints(out) == ["step_00000001.pt"]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    train(script, options, out, "--save-every", "1", "--keep", "1", "--resume", "auto", steps=2)
    assert checkpoints(out) == ["step_00000002.pt"]


def test_a_lora_run_is_not_resumed_without_lora_nor_the_reverse(options, tmp_path):
    without = dict(c=[word for word in options["c"] if word != "--lora"])
    lora, full = train("c", options, tmp_path / "lora", steps=1), train("c", without, tmp_path / "full", steps=1)
    with pytest.raises(UserError, match="was made with --lora: add it, or choose another --resume"):
        train("c", without, lora, "--resume", "auto")
    with pytest.raises(UserError, match="was made without --lora: remove it, or choose another --resume"):
        train("c", options, full, "--resume", "auto")


@each_script
def test_fp16_may_follow_fp32_and_the_reverse(options, tmp_path, script, capsys):
    """The checkpoint of a run in fp32 has no state of a loss scaler: it starts as in a new run."""
    out = train(script, options, tmp_path / "run", steps=1)
    train(script, options, out, "--resume", "auto", "--dtype", "fp16", steps=2)
    assert newest(out)["scaler"]["_growth_tracker"] + newest(out)["bad_in_all"] >= 0
    train(script, options, out, "--resume", "auto", steps=3)
    assert newest(out)["step"] == 3 and newest(out)["scaler"] == {}
    assert "resuming with --dtype fp16, the checkpoint has fp32" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["a", "b"])
def test_another_weight_decay_holds_after_resuming(options, tmp_path, script):
    """The optimizer's state brings the one it was made with."""
    out = train(script, options, tmp_path / "run", "--weight-decay", "0", steps=1)
    train(script, options, out, "--resume", "auto", "--weight-decay", "0.5", steps=2)
    assert {group["weight_decay"] for group in newest(out)["optimizer"]["param_groups"]} == {0.0, 0.5}


def test_more_steps_than_wanted_are_refused(options, tmp_path):
    """The result would carry the name of fewer steps than it had."""
    out = train("c", options, tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="step_00000002.pt has 2 steps, more than --steps 1: raise --steps"):
        train("c", options, out, "--resume", "auto", steps=1)


@pytest.mark.parametrize("script, more", [("a", []), ("a", ["--gan-start", "1"]), ("a", ["--ema", "0"]), ("b", []),
                                          ("c", []), ("c", ["--ema", "0"])], ids=str)
def test_a_dry_run_knows_the_size_of_a_checkpoint(options, tmp_path, capsys, script, more):
    train(script, options, tmp_path / "run", "--dry-run", "--keep", "3", *more)
    number, unit, kept = re.search(r"([\d.]+) ([GM])iB for a checkpoint, ([\d.]+) [GM]iB for the 3 of --keep",
                                   capsys.readouterr().out).groups()
    out = train(script, options, tmp_path / "run", *more, steps=2)
    size = sum(path.stat().st_size for path in (out / "checkpoints").iterdir()) / 2 ** dict(M=20, G=30)[unit]
    assert float(number) == pytest.approx(size, rel=0.1, abs=0.02) and float(kept) == pytest.approx(3 * float(number),
                                                                                                 abs=0.02)


# --- many processes -----------------------------------------------------------------------------------

def wait_for_one_that_never_comes(minutes: float) -> None:
    processes = Processes("cpu", minutes)
    if processes.rank == 0:
        with pytest.raises(RuntimeError, match="(?i)timed? ?out"):
            processes.wait()
        Path("gave up").write_text("")
    wait_until(Path("gave up").exists)


def test_a_process_waits_for_another_as_long_as_sampling_may_take(tmp_path, monkeypatch):
    """Half an hour, where NCCL would give up after 10 minutes; and not for ever."""
    together(2, tmp_path, wait_for_one_that_never_comes, 0.02)
    assert (tmp_path / "gave up").exists()
    given = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr("torch.distributed.new_group", lambda backend, timeout: (backend, timeout.days))
    processes = Processes("cpu")
    assert given["timeout"].total_seconds() == 30 * 60
    assert processes.patient == ("gloo", 7)                # while another reads an index of 10^8 images


# --- a finished result -------------------------------------------------------------------------------

@each_script
def test_a_finished_result_is_not_overwritten(options, tmp_path, capsys, script):
    """Not by another run in the same folder, nor by the same run again; a longer one continues it."""
    out = train(script, options, tmp_path / "run", steps=2)
    readme = (out / "README.md").read_text() + "\nMy own words.\n"
    (out / "README.md").write_text(readme)
    train(script, options, out, "--resume", "auto", steps=2)
    assert (out / "README.md").read_text() == readme
    assert f"2 steps are done and the result is in {out}: raise --steps to continue" in capsys.readouterr().err
    other = train(script, options, tmp_path / "other", steps=1)
    with pytest.raises(UserError, match=f"{out}/{RESULTS[script]} is of another run and would be overwritten: choose"):
        train(script, options, out, "--resume", str(other / "checkpoints" / "step_00000001.pt"))
    train(script, options, out, "--resume", "auto", steps=3)
    assert "| `--steps` | 3 |" in (out / "README.md").read_text() and newest(out)["step"] == 3
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(UserError, match=f"{RESULTS[script]} is of another run and would be overwritten"):
            train(script, options, out, *more)


@each_script
def test_a_result_is_not_mixed_with_that_of_another_script(options, tmp_path, script):
    """Without the checkpoints its card still tells whose it is. Any other README.md does not."""
    other = dict(a="b", b="c", c="a")[script]
    out = train(other, options, tmp_path / "run", steps=1)
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    card = (out / "README.md").read_bytes()
    with pytest.raises(UserError, match="is of another run and would be overwritten: choose another --out"):
        train(script, options, out, steps=1)
    assert (out / "README.md").read_bytes() == card and not (out / RESULTS[script]).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("My notes\n")
    args = MODULES[script].parse_args(["--data", "x", "--out", str(tmp_path / "mine")])
    assert Checkpoints(args, ()).find(None) is None


def test_a_run_that_died_while_it_wrote_its_result_writes_it(options, tmp_path):
    """The card is written last."""
    out = train("c", options, tmp_path / "run", steps=2)
    (out / "README.md").unlink()
    (out / "lora.safetensors").write_bytes(b"half")
    train("c", options, out, "--resume", "auto", steps=2)
    assert (out / "README.md").exists() and (out / "lora.safetensors").stat().st_size > 1000


@each_script
def test_an_evaluation_that_a_stop_prevented_is_made_up_for(options, tmp_path, script):
    """A run is stopped between a checkpoint and the evaluation after it. Evaluations are in the log once each."""
    more = ["--val-every", "2", "--save-every", "2", "--keep", "9"]
    unbroken = train(script, options, tmp_path / "unbroken", *more, steps=4)
    out = train(script, options, tmp_path / "run", *more, steps=4)
    (out / "checkpoints" / "step_00000004.pt").unlink()
    kept = [line for line in (out / "log.jsonl").read_text().splitlines() if '"grad_norm"' in line]
    (out / "log.jsonl").write_text("\n".join(kept) + "\n")
    train(script, options, out, *more, "--resume", "auto", steps=4)
    values = [[(line["step"], *(value for key, value in line.items() if key.startswith("val_")))
               for line in lines(run) if "grad_norm" not in line] for run in (unbroken, out)]
    assert [line[0] for line in values[0]] == [0, 2, 4] and values[0][1:] == values[1]


# --- NaN ---------------------------------------------------------------------------------------------

def spoil_and_train(script: str, argv: list[str]) -> None:
    """Rank 1 has a NaN in step 2 and rank 0 in step 4, each only there. Writes which updates this process made."""
    rank, calls, updates = int(os.environ["RANK"]), [], []
    stage, name = dict(a=(StageA, "decode_raw"), b=(StageB, "signal_and_scale"), c=(StageC, "forward"))[script]
    forward, update = getattr(stage, name), optim.EMA.update

    def sometimes(self, *given):
        calls.append(1)
        output, factor = forward(self, *given), float("nan") if len(calls) == (4, 2)[rank] else 1.0
        return tuple(part * factor for part in output) if isinstance(output, tuple) else output * factor

    def note(self, *skip):
        update(self, *skip)
        updates.append([float(mean.sum()) for mean in self.mean.values()])
    setattr(stage, name, sometimes)
    optim.EMA.update = note
    MODULES[script].main(MODULES[script].parse_args(argv))
    Path(f"updates{rank}.json").write_text(json.dumps(updates))


@each_script
def test_all_processes_skip_the_steps_in_which_one_has_a_nan(options, tmp_path, script):
    """In fp16: there an infinite gradient is no reason, and the loss of each process is its own. One that did not skip
    would have other averages than the others, or wait for them without end."""
    argv = [*options[script], "--out", "run", "--steps", "5", "--dtype", "fp16"]
    together(2, tmp_path, spoil_and_train, script, argv)
    one, other = (json.loads((tmp_path / f"updates{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and len(one) == 3
    state = newest(tmp_path / "run")
    assert (state["bad_in_all"], state["bad"], state["updates"]) == (2, 0, 3)
    assert [line["step"] for line in lines(tmp_path / "run") if line.get("bad_step")] == [2, 4]


@each_script
def test_a_host_that_looks_late_finds_the_same(options, tmp_path, monkeypatch, script):
    """On a GPU bad steps are skipped there, and the host looks when a line of the log is due: the same weights, the
    same lines, and after too many in a row the state of before them, although the steps went on."""
    def run(name: str, bad: set, late: bool, *more) -> Path:
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(MODULES[script], "clip_gradients", lambda model, limit: calls.append(1) or clip(
                model, limit) * (float("nan") if len(calls) in bad else 1))
            if late:
                patch.setattr(optim.NanSteps, "skip", skip_and_look_away)
            return train(script, options, tmp_path / name, *more, "--log-every", "6", steps=6)

    def skip_and_look_away(self, *args, **batch):
        with mock.patch.object(self, "look"):
            return skip(self, *args, **batch)
    clip, skip = optim.clip_gradients, optim.NanSteps.skip
    early, late = (run(f"one {late}", {2}, late) for late in (False, True))
    for name in ("model", "averaged", "optimizer", "updates", "bad", "bad_in_all"):
        same(newest(early)[name], newest(late)[name])
    assert [[line["step"] for line in lines(out)] for out in (early, late)] == [[2, 6]] * 2
    assert newest(late)["updates"] == 5 and newest(late)["bad_in_all"] == 1
    for looks_late in (False, True):
        with pytest.raises(UserError, match="3 steps in a row came to NaN or infinity, up to step 4; "):
            run(f"many {looks_late}", {2, 3, 4}, looks_late, "--max-bad-steps", "3")
    early, late = (newest(tmp_path / f"many {looks_late}") for looks_late in (False, True))
    assert early["step"] == late["step"] == 3 and early["bad"] == late["bad"] == 3
    same(early["model"], late["model"]), same(early["averaged"], late["averaged"])


@each_script
def test_weights_that_are_not_finite_are_never_written(options, tmp_path, script):
    """Such a run once ended with exit code 0 and NaN weights. The checkpoint of before stays."""
    out = train(script, options, tmp_path / "run", "--save-every", "1", steps=2)
    (out / RESULTS[script]).rename(out / "elsewhere")
    with pytest.raises(UserError, match="NaN or infinity") as error:
        train(script, options, out, "--lr", "1e38", "--save-every", "1", "--keep", "1", "--resume", "auto", steps=6)
    assert "\n" not in str(error.value) and "lower --lr" in str(error.value)
    assert not (out / RESULTS[script]).exists()
    assert "step_00000002.pt" in checkpoints(out)
    for path in (out / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in (*state["model"].values(), *state["averaged"].values()))


@each_script
def test_good_checkpoints_stay_while_steps_are_bad(options, tmp_path, monkeypatch, script):
    """With --keep 1 the checkpoint of step 2, the last before all losses are NaN, is there in the end; and a run whose
    last steps were bad has no result."""
    clip, calls = optim.clip_gradients, []

    def from_step_3(model, limit):
        calls.append(1)
        return clip(model, limit) * (float("nan") if len(calls) > 2 else 1)
    monkeypatch.setattr(MODULES[script], "clip_gradients", from_step_3)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="3 steps in a row came to NaN or infinity, up to step 5; the last good state"):
        train(script, options, out, "--save-every", "1", "--keep", "1", steps=5)
    assert "step_00000002.pt" in checkpoints(out) and not (out / RESULTS[script]).exists()


def test_a_result_that_is_not_finite_is_refused(options, tmp_path, monkeypatch):
    """Checked again when it is written: checkpoints hold only what learns."""
    check = Checkpoints.save

    def spoil(self, step, content, rotate=True):
        check(self, step, content, rotate)
        for tensor in spoiled:
            tensor.fill_(float("nan"))
    spoiled, build = [], train_a.build_model

    def build_and_keep(args):
        model = build(args)
        spoiled.append(model.norm_latent.running_mean)
        return model
    monkeypatch.setattr(train_a, "build_model", build_and_keep)
    monkeypatch.setattr(Checkpoints, "save", spoil)
    with pytest.raises(UserError, match="the result has NaN or infinity in norm_latent.running_mean and is not"):
        train("a", options, tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "vqgan").exists()


# --- the cache ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["b", "c"])
def test_a_cache_entry_damaged_during_a_run_does_not_end_it(options, tmp_path, monkeypatch, script, recwarn):
    """Bits flip, or another program tidies up. The next image of its shape takes the place, and the next run computes
    the entry again. A text is computed at once."""
    cache, batches = tmp_path / "cache", MODULES[script].batches

    def damage_and_begin(*args):
        for kind, count in (("latents", 3), ("vqgan", 3), ("texts", 99)):
            for path in sorted(cache.glob(f"{kind}-*/??/*.npy"))[:count]:
                path.write_bytes(path.read_bytes()[:-40])
        return batches(*args)
    monkeypatch.setattr(MODULES[script], "batches", damage_and_begin)
    seen, read = [], ImageReader.__call__

    def note(self, index, number, rng):
        found, item = read(self, index, number, rng)
        seen.append((index, found))
        return found, item
    monkeypatch.setattr(ImageReader, "__call__", note)
    out = train(script, options, tmp_path / "run", "--cache", str(cache), steps=6)
    assert newest(out)["step"] == 6 and newest(out)["updates"] == 6
    assert len({index for index, found in seen if index != found}) == 3 and len({found for _, found in seen}) == 3
    assert any("is removed and computed again" in str(warning.message) for warning in recwarn)


def test_a_damaged_entry_of_preserved_prompts_gives_way_to_the_next(options, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a tree\na cat\na moon\n")
    cache, batches, drawn = tmp_path / "cache", train_c.batches, []

    def damage_and_begin(samples, *args):
        for path in sorted(cache.glob("painted-*/??/*.npy"))[:2]:
            path.unlink()
        draw = samples.preserved.draw
        samples.preserved.draw = lambda *given: drawn.append(draw(*given)[0]) or draw(*given)
        return batches(samples, *args)
    monkeypatch.setattr(train_c, "batches", damage_and_begin)
    train("c", options, tmp_path / "run", "--cache", str(cache), "--preserve", "0.9", "--preserve-prompts",
          str(tmp_path / "prompts.txt"), steps=4)
    assert len({prompt for prompt in drawn if prompt}) == 1
