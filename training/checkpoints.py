"""Checkpoints and the log of a run, so that a run can be stopped after any step and resumed without a trace.

  checkpoints.find(args.resume) -> path;  checkpoints.load(path, ...) -> state -load_full_state-> model, optimizer, ...
  model, optimizer, ... -full_state-> state -checkpoints.save-> out/checkpoints/step_00000100.pt

A checkpoint holds no random state, because all randomness is a function of (seed, step, sample); see order.py.
Needs: torch; loading/.
"""
import contextlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)

from loading.errors import UserError
from loading.files import write_atomically

FULL = dict(full_state_dict=True, cpu_offload=True)      # gathered from all processes if they are split


def settings_of(args) -> dict:
    """The options that decide what is learned: without paths and what concerns only this machine."""
    return {name: value for name, value in vars(args).items()
            if name not in ("out", "resume", "workers", "device", "push_to_hub")}


class Checkpoints:
    """folder/step_00000100.pt, ...: the newest `keep` of a run. Each file is complete or not there at all."""
    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def find(self, resume: str | None) -> Path | None:
        """The file that --resume means: None, "auto" (the newest, or None if there is none yet), or a file.

        Raises UserError for a file that does not exist, and for a run that would be overwritten.
        """
        found = self.all()
        if resume is None:
            if found:
                raise UserError(f"{found[-1]} exists already: "
                                f"add --resume auto to continue from it, or choose another --out")
            return None
        if resume == "auto":
            return found[-1] if found else None
        if not Path(resume).is_file():
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"--resume {resume}: there is no such file; the checkpoints here are {names}")
        return Path(resume)

    def save(self, step: int, content: dict) -> Path:
        path = self.folder / f"step_{step:08d}.pt"
        write_atomically(path, lambda temporary: torch.save(content, temporary))
        for old in self.all()[:-self.keep]:
            old.unlink()
        return path

    @staticmethod
    def load(path: Path, script: str, settings: dict, flags: tuple[str, ...] = ()) -> dict:
        """The content of a checkpoint. Settings that differ from those of now are named on stderr.

        Raises UserError for a torn file, for a checkpoint of another script, and if one of `flags` was set differently.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:       # torch raises many kinds: EOFError, RuntimeError, UnpicklingError ...
            raise UserError(f"{path} cannot be read, it is probably cut off or not a checkpoint: "
                            f"{str(error).splitlines()[0][:150]}") from error
        found = content.get("script") if isinstance(content, dict) else None
        if found != script:
            raise UserError(f"{path} is not a checkpoint of {script}{f' but of {found}' if found else ''}: "
                            f"choose another --resume")
        then = content["settings"]
        for flag in flags:
            if then.get(flag, False) != settings[flag]:
                what = f"without --{flag}: remove it" if settings[flag] else f"with --{flag}: add it"
                raise UserError(f"{path} was made {what}, or choose another --resume")
        for name in sorted(settings.keys() & then.keys()):
            if settings[name] != then[name]:
                print(f"resuming with --{name.replace('_', '-')} {settings[name]}, the checkpoint has {then[name]}",
                      file=sys.stderr)
        return content


def full_state(model, optimizer, scaler, ema) -> dict:
    """What a run has learned, for a checkpoint. All processes must call this: each may hold a part of the weights.

    Frozen parameters are left out. Buffers, such as BatchNorm's statistics, are averages already and have no EMA.
    """
    learned = StateDictOptions(**FULL, ignore_frozen_params=True)
    with ema.applied():                  # a copy, because the tensors may be views of the live weights
        averaged = {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=learned).items()}
    return dict(model=get_model_state_dict(model, options=learned), averaged=averaged, updates=ema.updates,
                optimizer=get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FULL)),
                scaler=scaler.state_dict())


def load_full_state(state: dict, model, optimizer, scaler, ema) -> None:
    """The opposite of full_state. On all processes, whether as many as before or not."""
    partial = StateDictOptions(**FULL, strict=False)     # frozen parameters are not in it
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(**FULL))
    scaler.load_state_dict(state["scaler"])
    ema.updates = state["updates"]
    set_model_state_dict(model, state["averaged"], options=partial)
    ema.swap()
    set_model_state_dict(model, state["model"], options=partial)


def full_weights(model) -> dict:
    """All tensors of a model, frozen ones included, gathered from all processes, which must all call this."""
    return get_model_state_dict(model, options=StateDictOptions(**FULL))


def state_of(parts: dict, ema=None) -> dict:
    """The state of parts that every process holds in full: name -> module, optimizer, scaler ..."""
    averages = {} if ema is None else dict(averaged=ema.mean, updates=ema.updates)
    return {name: part.state_dict() for name, part in parts.items()} | averages


def load_state(path: Path, state: dict, parts: dict, ema=None) -> None:
    """The opposite of state_of. Parts that the checkpoint does not have stay as they are, so a part may join a run.

    Raises UserError if a part does not fit.
    """
    try:
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(state[name])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit: {str(error).splitlines()[0]}: resume with the sizes it was made with "
                        f"and the same frozen parameters") from error
    if ema is not None:
        ema.updates = state["updates"]
        for name, mean in ema.mean.items():
            mean.copy_(state["averaged"].get(name, ema.live[name]))


class Log:
    """out/log.jsonl, a line per call, and the service that --report-to names.

    step: where the run starts. Later lines, left by a run that was killed, are dropped. enabled: False for all
    processes except the main one; then nothing is written.
    """
    def __init__(self, out: str | Path, step: int, report_to: str | None = None, settings: dict | None = None,
                 enabled: bool = True):
        self.path, self.enabled, self.report = Path(out) / "log.jsonl", enabled, lambda values, step: None
        if not enabled:
            return
        kept = [line for line in self.lines() if step and line["step"] <= step]
        write_atomically(self.path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        try:
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(str(out))
                self.report = lambda values, step: [writer.add_scalar(name, value, step)
                                                    for name, value in values.items() if isinstance(value, float)]
            elif report_to == "wandb":
                import wandb
                wandb.init(project="wuerstchen", config=settings, dir=str(out))
                self.report = lambda values, step: wandb.log(values, step=step)
        except ImportError:
            raise UserError(f"--report-to {report_to} needs a package: pip install {report_to}") from None

    def lines(self) -> list[dict]:
        """The lines so far; none if not enabled. A last line that was cut off is skipped."""
        result = []
        for line in self.path.read_text().splitlines() if self.enabled and self.path.exists() else []:
            with contextlib.suppress(ValueError):
                result.append(json.loads(line))
        return result

    def write(self, step: int, **values) -> None:
        if self.enabled:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")
            self.report(values, step)
