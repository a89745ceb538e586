"""Trains in one or several processes with DDP or FSDP: sums over processes, synchronises BatchNorm, handles signals.

One process runs the same code as several, so a training loop needs no second version. This works with any model.
Needs: torch; loading/.
"""
import contextlib
import datetime
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loading.arguments import usable_device
from loading.errors import RESUME_HINT, tell


class Processes:
    """Represents this process and communicates with the other processes of torchrun. Without torchrun, there are none.

    world: number of processes; rank: this one's number, 0 to world - 1; is_main: whether rank is 0, which writes files;
    device: this process's device; many: whether torchrun was used.
    """
    def __init__(self, device: str | None = None, minutes: float = 30):
        """minutes: a process fails if it waits longer than this for another one, such as one that samples images."""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main, self.many, self.patient, self.host = self.rank == 0, "RANK" in os.environ, None, None
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{self.local_rank}"
        self.device = usable_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.many:
            # Import torch.distributed.nn before a group exists: its functions keep the current group as a default
            # argument. If DistributedDataParallel imported it later, the functions would keep our group, and gloo's
            # threads would run on after close(). A thread that frees a tensor while Python ends aborts the process.
            from torch.distributed import nn as _
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(minutes=minutes))
            # A group on the CPU for long waits, while another process downloads or reads indexes of 100 million images.
            self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
            if self.device.type == "cuda":       # a group for flags on the CPU, so that no flag waits for the GPU
                self.host = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=minutes))

    def close(self) -> None:
        if self.many:
            self.patient = self.host = None
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sums values over all processes, in place, and returns them."""
        if self.many:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, group=None) -> bool:
        """Returns whether the flag is true in any process. All processes get the same answer, so that all take the same
        branch; otherwise some would wait forever. group: self.patient if processes may wait for hours, else None."""
        return bool(self.largest(int(flag), group))

    def largest(self, number: int, group=None) -> int:
        """Returns the largest `number` of all processes, without waiting for the GPU. group: see `any`."""
        value = torch.tensor(number)
        if self.many:
            dist.all_reduce(value, dist.ReduceOp.MAX, group or self.host)
        return int(value)

    def anywhere(self, flag: Tensor) -> Tensor:
        """Returns as a tensor whether the scalar tensor flag is true in any process. The CPU does not wait for it."""
        return self.sum(flag.float()) > 0

    def to_device(self, batch: dict) -> dict:
        """Returns the batch with its tensors on the device. Pinned memory is copied while the CPU continues."""
        return {name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()}

    def wait(self) -> None:
        if self.many:
            dist.barrier()

    @contextlib.contextmanager
    def together(self, group=None):
        """Context manager that waits at its end for all processes. If one fails, the others exit with code 2."""
        try:
            yield
        except Exception:
            self.any(True, group)
            raise
        if self.any(False, group):
            sys.exit(2)                          # only the process that failed reports the error

    def on_main(self, do: Callable, *args) -> None:
        """Calls do(*args) on the main process while the others wait. If do fails, the others exit with code 2."""
        with self.together():
            if self.is_main:
                do(*args)

    def print(self, message: str) -> None:
        """Prints a message to stderr, on the main process only."""
        if self.is_main:
            tell(message)

    def once_per_node(self, make: Callable):
        """Calls make() in one process per machine, first in rank 0. Returns the result in all processes of the machine.

        make() does work whose result stays on disk, such as an index or a download. Its return value is pickled. The
        other processes wait for it without a time limit.
        """
        made = None
        for turn in (self.is_main, self.local_rank == 0 and not self.is_main):
            with self.together(self.patient):
                if turn:
                    made = make()
        if not self.many:
            return made
        everywhere = [None] * self.world
        dist.all_gather_object(everywhere, made, self.patient)
        return everywhere[self.rank - self.local_rank]

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """Returns the module to call in training: `model` wrapped for DDP or, without torchrun, `model` itself.

        Buffers are not broadcast, because they are the same in all processes: BatchNorm is synchronised.
        """
        if not self.many:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def split_weights(self, model: nn.Module, groups: Iterable[Iterable[nn.Module]], dtype: torch.dtype) -> None:
        """Splits the model's float32 weights over processes (FSDP). Each group of blocks is gathered in one message
        when the group runs, in bfloat16 if dtype is bfloat16. Gradients are summed in float32.

        Gathering in bfloat16 only changes GlobalResponseNorm's gamma, because autocast rounds all other weights anyway.
        Weights outside of `groups` are gathered in float32: embeddings, BatchNorm, the one whose dtype forward uses.
        """
        if self.many:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
            mesh = init_device_mesh(self.device.type, (self.world,))
            narrow = torch.bfloat16 if dtype == torch.bfloat16 else None
            # Inputs are not cast here: autocast does that for each operation, as with one process.
            policy = MixedPrecisionPolicy(narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for group in groups:
                fully_shard([*group], mesh=mesh, mp_policy=policy)
            # By default, FSDP would keep the model's gathered weights until a backward pass. Validation has none, and
            # uses EMA weights. So the next training step would compute with EMA weights.
            fully_shard(model, mesh=mesh, reshard_after_forward=True)


def compile_blocks(groups: Iterable[Iterable[nn.Module]], checkpointing: dict | None = None) -> None:
    """Compiles each block of `groups` by itself, equal blocks only once. Call this before FSDP splits the weights, so
    that FSDP's hooks are not compiled. checkpointing: options of torch's `checkpoint`, compiled with each block, or
    None for no checkpointing."""
    torch._dynamo.config.recompile_limit = 64    # default 8; Stage B's blocks get 7 shapes, in training and validation
    torch._dynamo.config.optimize_ddp = False    # DDPOptimizer would split blocks, which `checkpoint` does not allow
    for block in [block for group in groups for block in group]:
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):         # inductor cannot differentiate it on views of varying sizes
                layer.register_forward_pre_hook(lambda _, given: given[0].contiguous())
        forward = block.forward
        if checkpointing is not None:
            forward = functools.partial(checkpoint, type(block).forward, block, use_reentrant=False, **checkpointing)
        block.forward = torch.compile(forward)


@contextlib.contextmanager
def no_sync(model: nn.Module):
    """Context manager in which backward does not average gradients over processes; the next backward outside does.

    Forward must be inside as well: DDP decides in forward whether the following backward communicates. For FSDP,
    no_sync calls set_requires_gradient_sync; for a model in one process, it does nothing.
    """
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
            yield


class SumOverProcesses(torch.autograd.Function):
    """Computes the sum of x over all processes, with gradients. The result of every process depends on every x, so the
    gradient of x is the sum of the gradients of all processes' results."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverProcesses.apply(gradient.contiguous())


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all processes' batches; a plain BatchNorm2d in eval mode or without torchrun.

    BatchNorm makes the output for an image depend on the other images of its batch. With separate statistics, each of
    64 GPUs with 4 images would train a different and noisier function than the saved one, which has the running
    statistics of rank 0. torch.nn.SyncBatchNorm does the same, but only on GPUs; this class also works on a CPU.
    """
    @staticmethod
    def convert(model: nn.Module) -> None:
        """Changes the class of each BatchNorm2d in `model` to SynchronisedBatchNorm. Its weights stay the same."""
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SynchronisedBatchNorm

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (B,C,H,W). Returns the same shape and dtype; in training, computes in float32."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = SumOverProcesses.apply(torch.cat([wide.sum((0, 2, 3)), count]))               # (C + 1,)
        n, mean = sums[-1], sums[:-1] / sums[-1]                                             # (), (C,)
        # The variance needs a second all_reduce. Sums of squares would need only one, but a small variance would lose
        # all its digits in the difference of two large numbers.
        centred = wide - mean[:, None, None]                                                 # (B, C, H, W)
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n               # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()                                  # (C,)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)       # (B, C, H, W)


class GracefulExit:
    """Handles SIGTERM (a scheduler's last warning) and Ctrl-C: sets `received` to the signal's number, so that a loop
    can finish its step, save, and call `leave`. Create it just before the loop: earlier, there is nothing to save.
    A second Ctrl-C ends the program at once. restore() sets the previous signal handlers."""
    def __init__(self):
        self.received, self.before = 0, {}
        for name in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):            # outside the main thread, signals cannot be handled
                self.before[name] = signal.signal(name, self)

    def restore(self) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def leave(self, number: int, step: int, processes: Processes | None = None) -> None:
        """Ends the program after `step` steps because of signal `number`. The exit code is 143 for SIGTERM or 130
        for Ctrl-C, as in shells, so that a scheduler or a shell's && does not take the run for finished."""
        self.restore()
        if processes is None or processes.is_main:
            tell(f"stopped after step {step} and saved: {RESUME_HINT}")
        if processes is not None:
            processes.close()
        sys.exit(128 + number)

    def __call__(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = int(number)
