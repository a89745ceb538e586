"""What train_a.py, train_b.py and train_c.py must agree on: processes, checkpoints, logs, pictures of both.

The loops themselves stand in the scripts, each in full; here is only what would otherwise be written
three times and could drift. Nothing in here knows a model.
A run can be stopped at any step and resumed without a trace. Checkpoints hold nothing random, since all
randomness is a function of (seed, step, sample), see data.py.
Needs: torch, numpy; files.py.
"""
import contextlib
import datetime
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from loading.errors import UserError
from loading.files import write_atomically


# ----- processes --------------------------------------------------------------------------------------

class Processes:
    """This process among all that torchrun started; alone if there is no torchrun.

    rank 0 .. world - 1; device: this process's own.
    """
    def __init__(self, device: str | None = None, minutes: float = 30):
        """minutes: how long any process waits for another before it gives up, for example while rank 0 paints samples."""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.many = "RANK" in os.environ
        if self.many:
            # Before there is a group: this module's functions have the group of the time of its import as a default
            # argument, and
            # DistributedDataParallel imports it. Held by them, gloo's threads would outlive close(), and one that then
            # lets go of a
            # tensor while the interpreter ends aborts the process, after all its work.
            from torch.distributed import nn as _
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(minutes=minutes))

    def close(self) -> None:
        if self.many:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.many:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool | Tensor) -> bool:
        """Is it so in any process? All get the same answer, so that all go the same way: one that went its own would
        leave the others waiting for it for ever."""
        value = torch.as_tensor(flag, dtype=torch.float32, device=self.device)
        return bool(self.sum(value) > 0)

    def wait(self) -> None:
        if self.many:
            dist.barrier()

    @contextlib.contextmanager
    def one_after_another(self):
        """Rank 0 first, then the others: for work whose result is left on disk."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()


class SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, with a gradient: x of each adds to what all get, so its gradient is the sum of all gradients."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverProcesses.apply(gradient.contiguous())


class SynchronisedBatchNorm(torch.nn.BatchNorm2d):
    """BatchNorm2d over the batches of all processes. Alone, or in eval mode, it is BatchNorm2d.

    BatchNorm makes what a picture becomes depend on those beside it. With statistics of its own, each of 64 GPUs with 4
    pictures would train another function, a noisier one, than the one that is saved, whose running statistics are rank 0's.
    torch.nn.SyncBatchNorm does the same on GPUs only; this one does it anywhere, so that a test without a GPU tests it.
    """
    @staticmethod
    def convert(model: torch.nn.Module) -> None:
        """Every BatchNorm2d inside model, in place: the same module with the same weights, of which only forward changes."""
        for module in model.modules():
            if type(module) is torch.nn.BatchNorm2d:
                module.__class__ = SynchronisedBatchNorm

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W), in its type; sums are float32."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = SumOverProcesses.apply(torch.cat([wide.sum((0, 2, 3)), count]))               # (C + 1,)
        n, mean = sums[-1], sums[:-1] / sums[-1]                                             # (), (C,)
        # A second message, where one of squares would do: the difference of two large squares loses all digits of a
        # small one.
        centred = wide - mean[:, None, None]                                                 # (B, C, H, W)
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n               # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()                                  # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)       # (B, C, H, W)


class StopSignal:
    """SIGTERM (a scheduler's last warning) and Ctrl-C become a flag, so that the step under way is finished and saved.
    A second Ctrl-C ends the program at once."""
    def __init__(self):
        self.received, self.before = False, {}
        for name in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):            # not the main thread: a notebook, perhaps
                self.before[name] = signal.signal(name, self)

    def restore(self) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def __call__(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


# ----- optimizer ---------------------------------------------------------------------------------------

def build_optimizer(model, args, betas: tuple[float, float] = (0.9, 0.999)):
    """AdamW. Weight decay pulls matrices to zero; norms and biases have no business there, nor has a LoRA, which starts there."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    lora = getattr(args, "lora", False)
    decayed = [p for name, p in named if p.ndim >= 2 and not lora]
    rest = [p for name, p in named if p.ndim < 2 or lora]
    groups = [dict(params=params, weight_decay=decay) for params, decay in ((decayed, args.weight_decay), (rest, 0.0))
              if params]
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=True)


def rate(step: int, args) -> float:
    """Learning rate of a step: linear warm-up, then constant, or down to 0 by a cosine, a line, or a line in the last fifth.

    Until that fifth a trapezoid does not depend on args.steps: a run can be lengthened from any checkpoint before it.
    """
    gone = max(step - args.warmup, 0) / max(args.steps - args.warmup, 1)
    shape = dict(constant=1.0, linear=1 - gone, cosine=(1 + math.cos(math.pi * gone)) / 2,
                 trapezoid=min((args.steps - step) / max(args.steps // 5, 1), 1.0))[args.schedule]
    return args.lr * min((step + 1) / max(args.warmup, 1), 1.0) * shape


class Averaged:
    """Running means of the weights that learn. decay rises with the number of updates, so that young means forget the start."""
    def __init__(self, model, decay: float):
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone().float() for name, p in self.live.items()} if decay else {}
        self.decay, self.updates = decay, 0

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            for name, mean in self.mean.items():
                mean.lerp_(self.live[name].float(), 1 - decay)

    def swap(self) -> None:
        """Exchanges means and live weights; a second call puts them back."""
        with torch.no_grad():
            for name, mean in self.mean.items():
                kept = self.live[name].clone()
                self.live[name].copy_(mean)
                mean.copy_(kept)


# ----- checkpoints of a run on many processes ----------------------------------------------------------

class Checkpoints:
    """folder/step_000100.pt, ...: the newest `keep` of a run, each whole or not there at all."""
    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.pt"))

    def find(self, resume: str | None) -> Path | None:
        """What --resume means: None, "auto" (the newest, or none if there is none yet), or a file. Raises UserError."""
        found = self.all()
        if resume is None:
            if found:
                raise UserError(f"{found[-1]} exists already: add --resume auto to go on from it, or choose another --out")
            return None
        if resume == "auto":
            return found[-1] if found else None
        if not Path(resume).is_file():
            raise UserError(f"--resume {resume}: there is no such file; the checkpoints here are {', '.join(p.name for p in found) or 'none'}")
        return Path(resume)

    def save(self, step: int, content: dict) -> Path:
        path = self.folder / f"step_{step:08d}.pt"
        write_atomically(path, lambda temporary: torch.save(content, temporary))
        for old in self.all()[:-self.keep]:
            old.unlink()
        return path

    @staticmethod
    def load(path: Path, script: str, settings: dict) -> dict:
        """The content of a checkpoint. Raises UserError if it is torn or another script's; names settings that differ on stderr."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:       # torch has many kinds: EOFError, RuntimeError, UnpicklingError ...
            raise UserError(f"{path} cannot be read, presumably it is cut off or no checkpoint: {str(error).splitlines()[0][:150]}") from error
        if not isinstance(content, dict) or content.get("script") != script:
            found = content.get("script") if isinstance(content, dict) else None
            raise UserError(f"{path} is not a checkpoint of {script}"
                          + (f" but of {found}" if found else "") + ": choose another --resume")
        then = content["settings"]
        for name in sorted(settings.keys() & then.keys()):
            if settings[name] != then[name]:
                print(f"resuming with --{name.replace('_', '-')} {settings[name]}, the checkpoint has {then[name]}",
                      file=sys.stderr)
        return content


# ----- the log ----------------------------------------------------------------------------------------

class Log:
    """out/log.jsonl, a line per call, and whatever --report-to names besides. Lines of a run that was cut are dropped on resume."""
    def __init__(self, out: str | Path, step: int, report_to: str | None = None, settings: dict | None = None):
        self.path, self.report = Path(out) / "log.jsonl", lambda values, step: None
        kept = [line for line in self.lines() if line["step"] <= step]
        write_atomically(self.path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        if report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--report-to tensorboard needs a package: pip install tensorboard") from None
            writer = SummaryWriter(str(out))
            self.report = lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()
                                                if isinstance(value, float)]
        elif report_to == "wandb":
            try:
                import wandb
            except ImportError:
                raise UserError("--report-to wandb needs a package: pip install wandb") from None
            wandb.init(project="wuerstchen", config=settings, dir=str(out))
            self.report = lambda values, step: wandb.log(values, step=step)

    def lines(self) -> list[dict]:
        """What was logged so far; a last line that was cut off is left out."""
        result = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):
                result.append(json.loads(line))
        return result

    def write(self, step: int, **values) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(dict(step=step, **values)) + "\n")
        self.report(values, step)


# ----- pictures ------------------------------------------------------------------------------------------

def to_tensor(pictures: np.ndarray, device="cpu") -> Tensor:
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in [0, 1], in channels-last memory, as the pictures already are."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
