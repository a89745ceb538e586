"""Optimizer, learning rate, gradient clipping, skipped steps and EMA weights, for all training scripts.

Needs: torch; loading/.
"""
import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from loading.arguments import dtype_of
from loading.arguments import set_tf32
from loading.errors import UserError


def build_optimizer(model: nn.Module, args, share: Callable[[str], float] | None = None,
                    betas: tuple[float, float] | None = None) -> torch.optim.Optimizer:
    """Returns AdamW for trainable parameters. Weight decay applies only to matrices, not to norms, biases and LoRAs.

    share: maps a parameter's name to a factor of its learning rate, in group["share"]. betas: by default from args."""
    groups, lora = {}, getattr(args, "lora", False)
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and not lora        # also if --weight-decay is 0: a resumed run needs the same groups
            settings = dict(share=share(name)) if share else {}
            groups.setdefault((decays, *settings.items()), []).append(p)
    groups = [dict(settings, params=params, weight_decay=args.weight_decay if decays else 0.0)
              for (decays, *settings), params in groups.items()]
    options = dict(lr=args.lr, betas=betas or (args.adam_beta1, args.adam_beta2), eps=args.adam_eps)
    if args.adam_8bit:
        from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def learning_rate(step: int, args) -> float:
    """Returns the learning rate of a step: a linear warm-up, then args.schedule, which is constant or falls to 0: by
    cosines, linearly, by a power (polynomial, which ends at 1e-7, as in transformers), or in the last fifth only
    (trapezoid). Before this fifth, a trapezoid does not depend on args.steps, so a resumed run may raise --steps there.
    """
    done = max(step - args.warmup, 0) / max(args.steps - args.warmup, 1)
    left, end = max(1 - done, 0.0), min(1e-7 / args.lr, 1.0) if args.lr else 0.0
    shape = dict(constant=1.0, constant_with_warmup=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2,
                 cosine_with_restarts=(1 + math.cos(math.pi * (args.lr_cycles * done % 1))) / 2,
                 polynomial=end + (1 - end) * left ** args.lr_power,
                 trapezoid=min((args.steps - step) / max(args.steps // 5, 1), 1.0))[args.schedule]
    return args.lr * min((step + 1) / max(args.warmup, 1), 1.0) * shape


def set_precision(args, device: torch.device) -> tuple[torch.dtype, torch.autocast]:
    """Returns dtype and autocast (off in float32) for forward passes. Applies --allow-tf32. Sets args.dtype."""
    set_tf32(args.allow_tf32)
    dtype = dtype_of(args.dtype or ("fp32" if device.type == "cpu" else "bf16"), device)
    args.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradients down to norm `limit` if their norm, over all processes, is larger. With limit 0, does not
    scale them. Returns the norm before scaling, a scalar tensor."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm      # FSDP returns the norm as a DTensor


def too_many_nan_steps(count: int, step: int, args) -> str:
    """Returns the error message after `count` steps in a row, up to `step`, whose loss or gradient was not finite."""
    return (f"{count} steps in a row came to NaN or infinity, up to step {step + 1}; the last good state is in "
            f"{args.out}/checkpoints: lower --lr, or use --dtype bf16 or fp32; what was in these batches is in "
            f"{args.out}/log.jsonl")


class NanSteps:
    """Skips steps whose loss or gradient is not finite, and ends the run after too many of them in a row. The GPU skips
    them. The CPU reads later, in look(), which steps were skipped, so that it does not wait for the GPU in each step.

    in_a_row, in_all: number of skipped steps up to the last look(). state: a checkpoint to continue from, or {}.
    """
    def __init__(self, args, processes, log, state: dict):
        self.args, self.processes, self.log, self.last = args, processes, log, None
        self.in_a_row, self.in_all, self.waiting = state.get("bad", 0), state.get("bad_in_all", 0), []
        self.row = torch.full((), self.in_a_row, device=processes.device)
        self.over = torch.zeros((), dtype=torch.bool, device=processes.device)

    def skip(self, is_nan: Tensor, step: int, statistics: Iterable[tuple[Tensor, Tensor]] = (), **batch) -> Tensor:
        """Returns a scalar bool tensor: whether all processes skip this step. They do if the scalar is_nan is true in
        one of them. After too many skipped steps in a row, they skip all later steps, so that the weights stay as they
        are until look() is called. statistics: pairs of a BatchNorm's buffer and its value before the step. A skipped
        step restores the buffers, because a NaN would stay in them, and logs `batch`. On a CPU, calls look()."""
        skip = self.processes.anywhere(is_nan) | self.over
        self.row = (self.row + 1) * skip
        self.over = self.over | (self.row >= self.args.max_bad_steps)
        self.waiting.append((step, skip, batch))
        for tensor, before in statistics:
            tensor.copy_(torch.where(skip, before, tensor))
        if skip.device.type == "cpu":
            self.look()
        return skip

    def look(self) -> None:
        """Logs the bad steps since the previous call. After too many in a row, sets self.last to the last of them."""
        waiting, self.waiting = self.waiting, []
        flags = torch.stack([skip for _, skip, _ in waiting]).tolist() if waiting else []
        for (step, _, batch), bad in zip(waiting, flags) if self.last is None else ():
            self.in_a_row, self.in_all = (self.in_a_row + 1) * bad, self.in_all + bad
            if bad:
                self.log.write(step + 1, bad_step=True, **{name: part.tolist() if isinstance(part, Tensor) else part
                                                           for name, part in batch.items()})
                if self.in_a_row >= self.args.max_bad_steps:
                    self.last = step
                    break

    def check(self, look: bool, save: Callable[[int], None]) -> None:
        """Ends the run after too many bad steps in a row: saves the state before the last of them, by save(number of
        steps), and raises UserError. Call it after each step. look: whether to call look(), which waits for the GPU."""
        if look:
            self.look()
        if self.last is not None:
            save(self.last)
            raise UserError(too_many_nan_steps(self.in_a_row, self.last, self.args))

    def check_last(self) -> None:
        """Raises UserError if the run ends with bad steps: the weights may be the reason, so no result is written."""
        self.look()
        if self.in_a_row:
            raise UserError(too_many_nan_steps(self.in_a_row, self.args.steps - 1, self.args))


def take_step(optimizers: list, scaler, ema: "EMA", skip: Tensor) -> None:
    """Takes a step of each optimizer and updates the EMA, unless the scalar tensor skip is true. Frees the gradients.

    AdamW reads skip on the GPU. With AdamW8bit or a scaler, the CPU waits for skip. A scaler may also skip a step.
    """
    on_device = not scaler.is_enabled() and all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
    taken = on_device or not skip
    for optimizer in optimizers:
        if on_device:
            optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        if taken:
            scaler.step(optimizer) if scaler.is_enabled() else optimizer.step()
        optimizer.zero_grad(set_to_none=True)        # frees memory before the EMA update, which needs temporary tensors
    if taken:
        ema.update(*[skip] * on_device)


class EMA:
    """Exponential moving averages (EMA) of the trainable weights. With decay 0 there are no averages.

    After n updates, the decay is min(decay, (1 + n) / (10 + n)), so that the initial weights soon count little. This is
    the formula of TensorFlow's ExponentialMovingAverage with num_updates.
    """
    def __init__(self, model: nn.Module, decay: float):
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone().float() for name, p in self.live.items()} if decay else {}
        self.decay = decay
        self.count = torch.zeros((), device=next((p.device for p in self.live.values()), "cpu"))

    @property
    def updates(self) -> int:
        return int(self.count)

    @updates.setter
    def updates(self, number: int) -> None:
        self.count.fill_(number)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Updates the averages, unless the scalar tensor skip is true. The CPU does not wait for a skip on the GPU."""
        done = torch.ones_like(self.count) if skip is None else (~skip).float()
        weight = (9 / (10 + self.count)).clamp(min=1 - self.decay) * done        # 9 / (10 + n) = 1 - (1 + n) / (10 + n)
        self.count += done
        if self.mean:
            means, lives = ([getattr(tensor, "_local_tensor", tensor) for tensor in part.values()]  # FSDP: local shards
                            for part in (self.mean, self.live))
            change = torch._foreach_sub([live.float() for live in lives], means)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(means, change)

    def swap(self) -> None:
        """Exchanges the model's weights and their averages in place. A second call exchanges them back."""
        with torch.no_grad():
            for name, mean in self.mean.items():
                kept = self.live[name].clone()
                self.live[name].copy_(mean)
                mean.copy_(kept)

    @contextlib.contextmanager
    def applied(self):
        """Context manager in which the model has its EMA weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
