"""Measures for the benchmark: times actions in turns, finds peak memory in fresh processes, and compares networks."""
import math
import multiprocessing
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tools.bench.report import Row


def seconds_of(action: Callable, device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None     # waits until the GPU is done
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def in_turns(actions: dict[Hashable, Callable], repeats: int) -> dict[Hashable, list[float]]:
    """Runs all actions once to warm up, then `repeats` times in turns. Returns {name: [seconds of each run]}."""
    seconds = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            taken = seconds_of(action)
            if repeat > 0:
                seconds[name].append(taken)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Returns the median of above / below over pairs of runs, because a slow phase of the machine slows both runs."""
    return median(a / b for a, b in zip(above, below, strict=True))


def in_own_process(function: Callable, *args):
    """Runs function(*args) in a fresh process, so that its peak memory is only the function's. Returns its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory(line: str) -> int:
    """Returns this process's memory in bytes. line: "VmRSS" (now) or "VmHWM" (peak), a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))


def peak_memory(device: str, before: int) -> int:
    """Returns the peak memory of this process in bytes: on a GPU that of its tensors, else main memory - `before`."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else memory("VmHWM") - before


# ----- networks --------------------------------------------------------------------------------------

class Call(NamedTuple):
    """A comparison to measure. ours: our function. theirs: diffusers' function, or None. alone: whether to also measure
    products_of(ours). eager: the eager form of `ours` if `ours` is compiled. It is measured for comparison, and
    operations are counted in it, because torch cannot count them in a compiled function."""
    ours: Callable
    theirs: Callable | None
    alone: bool = False
    eager: Callable | None = None


class Measured(NamedTuple):
    """The figures of a Call. ours, theirs: median seconds of our and of diffusers' function. flops: operations of ours.
    difference: largest difference of their results, relative to the largest value. l2: in the L2 norm."""
    ours: float
    theirs: float | None
    flops: int
    difference: float | None = None
    l2: float | None = None


def products_of(call: Callable) -> Callable:
    """Returns a function that runs only the products of `call`, in the same order, with the same shapes and strides.

    Products are matrix products, convolutions (except depthwise ones) and attention. Their inputs are random numbers.
    Inputs of equal shape and stride are the same tensor, so the processor's caches may make them faster than in `call`.
    """
    aten = torch.ops.aten
    attention = [getattr(aten, f"_scaled_dot_product_{name}", None) for name in
                 ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")]
    products, tensors, seen = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, *attention}, {}, []

    def twin(tensor):
        shape, stride, dtype = key = tensor.shape, tensor.stride(), tensor.dtype
        if key not in tensors:                           # random numbers, because some processors are faster with zeros
            length = 1 + sum((n - 1) * step for n, step in zip(shape, stride))   # elements in memory
            tensors[key] = torch.randn(length, device=tensor.device).to(dtype).as_strided(shape, stride)
        return tensors[key]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kind = function.overloadpacket
            if kind in products and not (kind is aten.convolution and args[8] > 1):  # args[8]: groups, > 1 if depthwise
                seen.append((function, *tree_map_only(torch.Tensor, twin, (args, kwargs or {}))))
            return function(*args, **(kwargs or {}))
    with Watch():
        call()

    def alone():
        for function, args, kwargs in seen:
            function(*args, **kwargs)
    return alone


@torch.no_grad()
def compare(calls: dict[str, Call], repeats: int, device: str, dtype=torch.float32,
            times: int = 1) -> tuple[list[Row], dict[str, Measured], float]:
    """Measures all calls in turns. Returns table rows, {name: Measured}, and the GFLOP/s of a large product in dtype.

    times: calls per run. If several calls have the same function `theirs`, it is measured once, and all their ratios
    use this measurement.
    """
    # In 16 bits on a CPU, n is small: if the CPU has no 16-bit instructions, a larger product would take minutes.
    n = 8192 if device.startswith("cuda") else 2048 if dtype == torch.float32 else 256
    a = torch.randn(n, n, device=device, dtype=dtype)
    functions, alone, flops, results = [product := lambda: a @ a], {}, {}, {}
    for what, call in calls.items():
        # Calls ours() before operations are counted, because the first call may compute tensors that later calls reuse.
        # The result is cloned, because a CUDA graph overwrites its output.
        results[what] = call.ours().float().clone()
        if call.alone:
            alone[what] = products_of(call.ours)
        functions += [call.ours, call.theirs, alone.get(what)]
        with FlopCounterMode(display=False) as counter:
            (call.eager or call.ours)()
        flops[what] = counter.get_total_flops()
    runs = in_turns({function: partial(seconds_of, lambda f=function: [f() for _ in range(times)], device)
                     for function in functions if function is not None}, repeats)
    seconds = {function: [run / times for run in of] for function, of in runs.items()}         # seconds per call
    peak, rows, found = 2 * n ** 3 / median(seconds[product]) / 1e9, [], {}
    for what, call in calls.items():
        theirs, errors = seconds.get(call.theirs), ()
        if theirs:
            reference = call.theirs().float()
            error = results[what] - reference
            errors = (error.abs().max() / reference.abs().max()).item(), (error.norm() / reference.norm()).item()
        found[what] = Measured(median(seconds[call.ours]), theirs and median(theirs), flops[what], *errors)
        rows += rows_of(what, call, found[what], seconds, seconds.get(alone.get(what)), peak)
    return rows, found, peak


def rows_of(what: str, call: Call, found: Measured, seconds: dict[Hashable, list[float]], alone: list[float] | None,
            peak: float) -> list[Row]:
    """Returns the table rows of a call, named `what`. found: its figures. seconds: {function: seconds of each run}.
    alone: seconds of only the call's products, or None. peak: GFLOP/s of a large product."""
    def text(values: list[float]) -> str:
        return f"{median(values):.2f} s" if median(values) >= 1 else f"{1000 * median(values):.2f} ms"
    ours, theirs, speed, more = seconds[call.ours], seconds.get(call.theirs), found.flops / found.ours / 1e9, []
    if "int8" not in what and "bf16" not in what:        # torch cannot count int8 products; `peak` is float32's
        more.append(f"{found.flops / 1e9:.4g} GFLOP, {speed:.0f} GFLOP/s, {speed / peak:.0%} of the peak")
    if theirs:
        more.append(f"differs by {found.difference:.0e}, L2 {found.l2:.0e}")
    if alone:
        more.append(f"products alone {text(alone)}" + (f", {ratio(alone, theirs):.2f} of diffusers" if theirs else ""))
    rows = [Row(what, text(ours), f"{text(theirs)}, diffusers" if theirs else "",
                ratio(ours, theirs) if theirs else math.nan, "; ".join(more),
                ratio(alone, ours) if alone else math.nan)]
    if call.eager:
        eager = seconds[call.eager]
        rows.append(Row(f"{what}, next to eager", text(ours), text(eager), ratio(ours, eager)))
    return rows
