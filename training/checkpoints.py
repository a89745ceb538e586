"""Checkpoints and the log of a run. A run can be stopped after any step, and a resumed run gives the same result.

  checkpoints.find(args) -> path;  checkpoints.load(path, ...) -> state -load_full_state-> model, optimizer, ...
  model, optimizer, ... -full_state-> state -checkpoints.save-> out/checkpoints/step_00000100.pt

A checkpoint contains no random state, because all randomness is derived from (seed, step, sample), see order.py.
Needs: torch, numpy, pillow; loading/.
"""
import contextlib
import errno
import functools
import json
import os
import platform
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)

from loading.errors import UserError, tell
from loading.files import (check_folder, disk_errors, fcntl, is_finite, parsed, reading, tensors_in, write_atomically,
                           write_tensors)

FULL = dict(full_state_dict=True, cpu_offload=True)      # gather full weights on the CPU if FSDP splits them

# Options that concern only this machine or are secret. Checkpoints, model cards and --report-to services omit them.
PRIVATE = ("out", "resume", "workers", "device", "push_to_hub", "hub_token")


def settings_of(args) -> dict:
    """Returns {option: value} of all options on which the result may depend: all except the PRIVATE ones."""
    return {name: value for name, value in vars(args).items()
            if name not in PRIVATE}


def check_finite(content: dict, what: str) -> None:
    """Raises UserError if a tensor in `content`, at any depth, has NaN or infinity. what: its name in the message."""
    for name, tensor in tensors_in(content):
        if not is_finite(tensor):
            raise UserError(f"{what} has NaN or infinity in {name} and is not written: resume from an earlier "
                            f"checkpoint with a lower --lr, or with --dtype bf16 or fp32")


LOCKS = weakref.WeakValueDictionary()                    # {path: the open file with which this process holds the lock}


def lock_run(out: Path):
    """Locks a run's folder against other processes, also on other machines, while the returned file is open.

    The lock ends with the process. Raises UserError if another process holds it. Returns None if the operating system
    or the file system has no locks. Worker processes may live for seconds after their run was killed. So the lock is
    made with lockf: they do not inherit it. They would inherit a lock made with flock, as in loading/files.py.
    """
    path = out.resolve() / ".lock"
    if fcntl is None or path in LOCKS:
        return LOCKS.get(path)
    out.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None                                  # this file system has no locks
        file.seek(0)
        raise UserError(f"--out {out} is in use by another run, {file.read().strip() or 'which starts just now'}: "
                        f"wait for its end, stop it, or choose another --out") from None
    if not os.fstat(file.fileno()).st_nlink:             # another run has just removed this file: try again
        return lock_run(out)
    with disk_errors(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    LOCKS[path] = file
    return file


def remove_unused(out: Path, lock) -> None:
    """Removes a run's folder if it has only the lock file: the run wrote nothing. lock: that file, open until now."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == [".lock"]:
            (out / ".lock").unlink()
            out.rmdir()


# {key: type} of every checkpoint's content, and of the entries that train_a.py, train_b.py and train_c.py add to it.
PARTS = dict(settings=dict, step=int, model=dict, optimizer=dict)
PARTS_OF_THREE = dict(averaged=dict, updates=int, scaler=dict, bad=int, bad_in_all=int)


class TornCheckpoint(UserError):
    """Raised for a file that is not a complete checkpoint."""


class Checkpoints:
    """Manages a run's newest `keep` checkpoints, out/checkpoints/step_00000100.pt, ... Each is written atomically.

    results: names of the files and folders that the script finally writes to --out; no other run may overwrite them.
    """
    def __init__(self, args, results: tuple[str, ...]):
        self.out, self.folder, self.keep = Path(args.out), Path(args.out) / "checkpoints", args.keep
        self.results, self.auto, self.dry_run = results, args.resume == "auto", getattr(args, "dry_run", False)

    def lock(self) -> None:
        new, self._lock = not self.out.exists(), lock_run(self.out)
        if new:
            weakref.finalize(self, remove_unused, self.out, self._lock)

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def find(self, resume: str | None, processes=None) -> Path | None:
        """Returns the checkpoint to resume from, or None for a new run. Locks --out, unless this is a dry run.

        resume: None, "auto" (the newest checkpoint, if there is one) or a file. Raises UserError for a file that does
        not exist, if another run or its result would be overwritten, and if another run is writing to --out.
        """
        check_folder(self.out)
        if not self.dry_run:
            processes.on_main(self.lock) if processes else self.lock()
        found, card = self.all(), self.out / "README.md"
        results = [self.out / name for name in self.results if (self.out / name).exists()]
        if card.is_file() and "| `--steps` |" in card.read_text(encoding="utf-8", errors="replace"):
            results.append(card)         # whichever script wrote it: two runs must not share card, log and base.json
        if resume is None and found:
            raise UserError(f"{found[-1]} exists already: "
                            f"add --resume auto to continue from it, or choose another --out")
        if resume not in (None, "auto") and not Path(resume).is_file():
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"--resume {resume}: there is no such file; the checkpoints here are {names}")
        foreign = not found if resume in (None, "auto") else Path(resume).resolve().parent != self.folder.resolve()
        if foreign and (results or found):
            raise UserError(f"{[*results, *found][0]} is of another run and would be overwritten: choose another --out")
        return (found[-1] if found else None) if resume in (None, "auto") else Path(resume)

    def save(self, step: int, content: dict, rotate: bool = True) -> None:
        """Writes a checkpoint of `content`. rotate: whether to remove old checkpoints. After a step with NaN,
        callers pass False, because the weights in this checkpoint may be the reason.

        Raises UserError for weights that are not finite. Renames checkpoints of later steps, because --resume auto
        would choose them. Such files exist if they were torn and skipped, or if --resume named an earlier checkpoint.
        """
        path = self.folder / f"step_{step:08d}.pt"
        check_finite(content, f"the state after step {step}")
        for later in [other for other in self.all() if other.name > path.name]:
            for path_or_lora in filter(Path.exists, (later, later.with_suffix(".safetensors"))):
                path_or_lora.rename(f"{path_or_lora}.old")
            tell(f"{later} is not what this run continues: renamed to {later.name}.old")
        for half in self.folder.glob(".step_*.pt"):                              # incomplete files of a killed run
            half.unlink(missing_ok=True)
        write_tensors(path, content)
        for old in self.all()[:-self.keep] if rotate else ():
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)          # the LoRA that write_lora saved with it

    def finished(self, resumed: Path | None, steps: int) -> bool:
        """Returns whether a run that resumes from checkpoint `resumed` (None: a new run) has done all its `steps` and
        written its result: README.md, the last file of a result, must state this number of steps."""
        card = self.out / "README.md"
        return resumed is not None and resumed.name == f"step_{steps:08d}.pt" and card.exists() and \
            f"| `--steps` | {steps} |" in card.read_text(encoding="utf-8", errors="replace") and \
            all((self.out / name).exists() for name in self.results)

    def load(self, path: Path, script: str, settings: dict, fixed: tuple[str, ...] = (), processes=None) -> dict:
        """Returns the content of a checkpoint. Prints to stderr which settings differ between checkpoint and this run.

        If the newest checkpoint is torn, --resume auto uses the previous one. Raises UserError for a torn file, for a
        checkpoint of another script or of more steps, and if one of the options `fixed` had another value.
        processes: only rank 0 reads the file. The others get its content without tensors, which load_full_state sends.
        """
        if processes is not None and processes.many:
            content = {}
            with processes.together(processes.patient):
                if processes.is_main:
                    content = self.load(path, script, settings, fixed)
            small = [content | dict(model={}, averaged={}, optimizer={})]
            dist.broadcast_object_list(small, group=processes.patient)
            return small[0] | content
        older = [other for other in self.all() if other.name < path.name] if self.auto else []
        try:
            content = self.read(path, script)
        except TornCheckpoint as error:
            if not older:
                raise
            tell(f"{error}; resuming from {older[-1].name}, the one before")
            return self.load(older[-1], script, settings, fixed)
        then = content["settings"]
        for name in fixed:
            option, before, now = f"--{name.replace('_', '-')}", then.get(name, False), settings[name]
            if name == "lora_weights":                   # compare only whether it is given: its path may change
                before, now = bool(before), bool(now)
            if before != now:
                what = f"with {option} {before}, not {now}: resume with that" if not isinstance(now, bool) else (
                    f"without {option}: remove it" if now else f"with {option}: add it")
                raise UserError(f"{path} was made {what}, or choose another --resume")
        if content["step"] > settings["steps"]:
            raise UserError(f"{path} has {content['step']} steps, more than --steps {settings['steps']}: raise --steps")
        for name in sorted(settings.keys() & then.keys()):
            if settings[name] != then[name]:
                tell(f"resuming with --{name.replace('_', '-')} {settings[name]}, the checkpoint has {then[name]}")
        return content

    @staticmethod
    def read(path: Path, script: str) -> dict:
        with reading(path, TornCheckpoint, "cannot be read, it is probably cut off or not a checkpoint"):
            content = torch.load(path, map_location="cpu", weights_only=True)    # mmap=True would not check checksums
        found = content.get("script") if isinstance(content, dict) else None
        if not isinstance(found, str) or found != script:
            of = f" but of {found}" if isinstance(found, str) else ""
            raise UserError(f"{path} is not a checkpoint of {script}{of}: choose another --resume")
        parts = PARTS if script in ("train_encoder.py", "train_text.py") else PARTS | PARTS_OF_THREE
        missing = [part for part, kind in parts.items()
                   if not isinstance(content.get(part), kind) or kind is int and content[part] < 0]
        if not missing:
            moments = content["optimizer"].get("state")          # {parameter: state} of AdamW or AdamW8bit
            whole = isinstance(moments, dict) and all(
                isinstance(state, dict) and ({"exp_avg", "exp_avg_sq", "step"} <= state.keys() or "state1" in state)
                for state in moments.values()) and (moments or not content.get("updates", 1))
            missing = [part for part in ("settings", "model") if not content[part]] + ["optimizer"] * (not whole)
        if missing:
            what = f"{'state of the ' * (parts[missing[0]] is dict)}{missing[0]}"
            raise TornCheckpoint(f"{path} has no {what}: it is not a whole checkpoint")
        return content


def full_state(model, optimizer, scaler, ema) -> dict:
    """Returns the state of a run for a checkpoint. All processes must call this: each may have a part of the weights.

    Frozen parameters are omitted. Buffers, such as BatchNorm's statistics, have no EMA: they are averages already.
    """
    learned = StateDictOptions(**FULL, ignore_frozen_params=True)
    with ema.applied():                  # clone: `applied` restores the weights, whose memory these tensors may share
        averaged = {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=learned).items()}
    return dict(model=get_model_state_dict(model, options=learned), averaged=averaged, updates=ema.updates,
                optimizer=get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL)),
                scaler=scaler.state_dict())


fitting = functools.partial(reading, failed="does not fit", advice=(
    ": resume with the sizes it was made with and the same frozen parameters, or choose another --resume"))


def check_shapes(now: dict, found: dict) -> None:
    """Raises ValueError unless the dicts `now` and `found` contain tensors of the same names and shapes."""
    now, found = ({name: tuple(getattr(tensor, "shape", "?")) for name, tensor in part.items()}
                  for part in (now, found))
    if now != found:
        name = min(name for name in now | found if now.get(name) != found.get(name))
        raise ValueError(f"{name} is {found.get(name, 'missing')}, now {now.get(name, 'it is frozen')}")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if AdamW's moments differ in shape from their parameters. load_state_dict does not check it."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq") if "state1" not in state else ():    # AdamW8bit (state1) is not checked
            if state[name].shape != parameter.shape:
                raise ValueError(f"its {name} of {tuple(state[name].shape)} for {tuple(parameter.shape)}")


@contextlib.contextmanager
def own_options(optimizer: torch.optim.Optimizer):
    """Context manager that restores an optimizer's options at its end, because loading a state overwrites them."""
    own = [{name: group[name] for name in ("weight_decay", "share", "betas", "eps") if name in group}
           for group in optimizer.param_groups]
    yield
    for group, options in zip(optimizer.param_groups, own):
        group.update(options)


def load_full_state(path: Path, state: dict, model, optimizer, scaler, ema, processes) -> None:
    """Loads `state`, a result of full_state from the checkpoint `path`. All processes must call this; their number may
    have changed, and only rank 0 needs the tensors. Raises UserError if the state does not fit, because of other sizes
    or other frozen parameters."""
    sent = dict(full_state_dict=True, broadcast_from_rank0=processes.many)
    partial = StateDictOptions(**sent, strict=False)     # the checkpoint has no frozen parameters
    now = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with processes.together(), fitting(path):            # check first: if rank 0 failed in loading, others would wait
        if processes.is_main:
            for part in ("model", "averaged"):
                check_shapes(now, state[part])
            for moment in ("exp_avg", "exp_avg_sq"):     # AdamW8bit, which has state1 instead, is not checked
                found = {name: part[moment] for name, part in state["optimizer"]["state"].items() if moment in part}
                check_shapes(found and learned, found)
    with fitting(path):
        with own_options(optimizer):
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(**sent))
        if state["scaler"]:              # the saved state is empty if the saved run did not use fp16
            scaler.load_state_dict(state["scaler"])
        ema.updates = state["updates"]
        set_model_state_dict(model, state["averaged"], options=partial)
        ema.swap()
        set_model_state_dict(model, state["model"], options=partial)


def full_weights(model) -> dict:
    """Returns all tensors of a model, also frozen ones, gathered from all processes. All processes must call this."""
    return get_model_state_dict(model, options=StateDictOptions(**FULL))


def state_of(parts: dict, ema=None) -> dict:
    """Returns {part's name: state dict} and the EMA's state. parts: {name: module, optimizer, scaler}, without FSDP."""
    averages = {} if ema is None else dict(averaged=ema.mean, updates=ema.updates)
    return {name: part.state_dict() for name, part in parts.items()} | averages


def load_state(path: Path, state: dict, parts: dict, ema=None, **tensors: torch.Tensor) -> None:
    """Loads `state`, a result of state_of, into `parts`. A part that `state` lacks stays unchanged, so that a resumed
    run may add parts. path: the checkpoint, for messages. tensors: {name: tensor to fill with the values state[name]}.
    Raises UserError if names or shapes in `state` differ from those of a part, the EMA or a tensor.
    """
    with fitting(path):
        for name, part in parts.items():
            if state.get(name) or name in state and name != "scaler":    # a scaler's saved state is empty without fp16
                is_optimizer = isinstance(part, torch.optim.Optimizer)
                with own_options(part) if is_optimizer else contextlib.nullcontext():
                    part.load_state_dict(state[name])
                if is_optimizer:
                    check_moments(part)
        saved = {name: state[name] for name in tensors}
        if ema is not None:
            ema.updates, tensors = state["updates"], tensors | ema.mean
            saved |= state["averaged"] or ema.live       # if the saved run had no EMA, start it from the weights
        for name, tensor in tensors.items():
            check_shapes({name: tensor}, {name: saved[name]})
            tensor.copy_(saved[name])


class Log:
    """The log of a run: `write` appends a line to out/log.jsonl and sends its values to the service of --report-to.

    step: the step at which the run starts. __init__ removes lines of later steps, left by a killed run, and lines of
    the evaluation at `step`, which this run repeats. enabled: true only on the main process; the others write nothing.
    """
    def __init__(self, out: str | Path, step: int, report_to: str | None = None, settings: dict | None = None,
                 enabled: bool = True):
        self.path, self.enabled, self.report = Path(out) / "log.jsonl", enabled, lambda values, step: None
        self.report_image = lambda image, step: None
        if not enabled:
            return
        kept = [line for line in self.lines() if line["step"] < step or line["step"] == step and "lr" in line]
        write_atomically(self.path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        try:
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(str(out))
                self.report = lambda values, step: [writer.add_scalar(name, value, step)
                                                    for name, value in values.items() if isinstance(value, float)]
                self.report_image = lambda image, step: [
                    writer.add_image("samples", np.asarray(image), step, dataformats="HWC"), writer.flush()]
            elif report_to == "wandb":
                import wandb
                wandb.init(project=settings["project"], config=settings, dir=str(out))
                self.report = lambda values, step: wandb.log(values, step=step)
                self.report_image = lambda image, step: wandb.log(dict(samples=wandb.Image(image)), step=step)
        except ImportError:
            raise UserError(f"--report-to {report_to} needs a package: pip install {report_to}") from None

    def lines(self) -> list[dict]:
        """Returns the lines of the log so far; [] if not enabled. Skips a last line that was cut off."""
        result = []
        for line in self.path.read_text(errors="replace").splitlines() if self.enabled and self.path.exists() else []:
            with contextlib.suppress(ValueError):
                line = parsed(line)
                result += [line] * (isinstance(line, dict) and isinstance(line.get("step"), int))
        return result

    def write(self, step: int, **values) -> None:
        if self.enabled:
            with disk_errors(self.path):
                size = self.path.stat().st_size          # the file exists: __init__ has written it
                try:
                    with open(self.path, "a") as file:
                        file.write(json.dumps(dict(step=step, **values)) + "\n")
                except OSError:                          # the disk is full: remove the part that was written
                    os.truncate(self.path, size)
                    raise
            self.report(values, step)

    def images(self, step: int) -> None:
        """Sends the sample sheet of step `step` to the service of --report-to, if the sheet exists."""
        path = self.path.parent / "samples" / f"step_{step:06d}.png"
        if self.enabled and path.exists():
            with Image.open(path) as image:
                self.report_image(image.convert("RGB"), step)
