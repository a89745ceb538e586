"""How fast networks of official size are, with random weights, call by call next to diffusers; and a whole image."""
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import nn

import stage_a
import stage_b
import stage_c
from tools.bench.measure import Call, Measured, compare
from tools.bench.models import bind_b, bind_c, int8_copy, noise, random_pair
from tools.bench.report import DTYPES, Row, goals_of
from wuerstchen import latent_sizes

STEPS = {"Stage C step": 29, "Stage B step": 12, "Stage A decode": 1}        # of an image; those of C are guided


def named(title: str, n: int) -> str:
    return title if n == 1 else f"{title}, {n} images"


def measure(args) -> tuple[str, list[Row], str]:
    gpu, rows, found, peaks = args.device.startswith("cuda"), [], {}, []
    args.dtype, args.side = args.dtype or ("bf16" if gpu else "fp32"), args.side or 1024
    args.pictures, args.calls = args.pictures or ([1, 4, 8] if gpu else [1]), args.calls if gpu else 1
    for calls in all_calls(args):
        new_rows, new, peak = compare(calls, args.repeats, args.device, getattr(torch, DTYPES[args.dtype]))
        print("\n".join(" ".join(map(str, row)) for row in new_rows), file=sys.stderr, flush=True)   # the end is far
        rows, found, peaks = rows + new_rows, found | new, peaks + [peak]
        del calls
    if args.dtype == "fp32":
        for title, is_int8, field in (("largest deviation from diffusers", False, "difference"),
                                      ("error of int8, relative L2", True, "l2")):
            values = [getattr(call, field) for what, call in found.items() if ("int8" in what) == is_int8]
            rows += [Row(title, f"{max(values):.0e}", "", max(values))] if values else []
    rows += [row for n in args.pictures for row in whole_images(found, n, median(peaks))]
    note = f"Ratios: how many times as fast, {DTYPES[args.dtype]}, {args.side} px. Peak {median(peaks):.0f} GFLOP/s."
    if (args.side, args.depth) != (1024, 32):
        note += f" **Not the official size: {args.side} px, depth {args.depth}.**"
    if not gpu:
        note += f"\n\nOn a GPU the same command writes a section of its own. Its goals: {'; '.join(goals_of('GPU'))}."
    return "GPU" if gpu else "Official size", rows, note


def all_calls(args) -> Iterator[dict[str, Call]]:
    """The calls of Stage C, of Stage B, of Stage A: one network at a time is in memory."""
    (size_c, size_b), dtype = latent_sizes(args.side, args.side), getattr(torch, DTYPES[args.dtype])
    random = noise(args.device, dtype)
    pair = random_pair(stage_c.StageC, "prior", stage_c.OFFICIAL | dict(depth=args.depth), args.device, dtype)
    yield step_calls("Stage C step", args, pair, bind_c,                     # guided, so two rows per image
                     lambda n: (random(2 * n, 16, *size_c), random(2 * n, 77, 1280)))
    del pair
    gc.collect()
    blocks = tuple(max(1, n * args.depth // 32) for n in stage_b.OFFICIAL["blocks"])
    pair = random_pair(stage_b.StageB, "decoder", stage_b.OFFICIAL | dict(blocks=blocks), args.device, dtype)
    yield step_calls("Stage B step", args, pair, bind_b,
                     lambda n: (random(n, 4, *size_b), random(n, 16, *size_c) * 42 - 1, random(n, 77, 1024)))
    del pair
    gc.collect()
    ours, theirs = random_pair(stage_a.StageA, "vqgan", stage_a.OFFICIAL, args.device, dtype)
    scale = stage_a.OFFICIAL["scale_factor"]
    yield {named("Stage A decode", n): Call(partial(ours.decode, x := random(n, 4, *size_b)),
                                            lambda x=x: theirs.decode(x * scale).sample, args.calls, alone=True)
           for n in args.pictures}


@torch.no_grad()
def step_calls(title: str, args, pair: tuple[nn.Module, nn.Module], bind: Callable,
               inputs: Callable[[int], tuple]) -> dict[str, Call]:
    """pair: our network and diffusers'; inputs(n): x_t and conditions for n images."""
    def compiled(function: Callable) -> Callable:
        mode = dict(mode="reduce-overhead") if args.device.startswith("cuda") else {}
        return torch.compile(function, dynamic=False, **mode)
    ours, theirs = pair
    calls, theirs_compiled = {}, compiled(theirs)
    ours_in_int8 = int8_copy(ours) if args.device == "cpu" and args.dtype == "fp32" else None
    for n in args.pictures:
        x, *conditions = inputs(n)
        t = torch.full((len(x),), 0.5, device=args.device)
        step, their_inputs = bind(ours, *conditions), (x, t.to(x.dtype), *conditions)
        eager, other = partial(step, x, t), partial(theirs, *their_inputs)
        calls[named(title, n)] = Call(eager, other, args.calls, alone=True)
        if args.plain:
            calls[named(f"{title}, plain", n)] = Call(partial(ours, x, t, *conditions), other, args.calls)
        if args.compile:
            calls[named(f"{title}, compiled", n)] = Call(
                partial(compiled(step), x, t), partial(theirs_compiled, *their_inputs), args.calls, eager=eager)
        if ours_in_int8:
            calls[named(f"{title}, int8", n)] = Call(partial(bind(ours_in_int8, *conditions), x, t), other, args.calls)
    return calls


def whole_images(found: dict[str, Measured], n: int, peak: float) -> list[Row]:
    """Rows for n images at a time, added up from the measured calls. peak: GFLOP/s."""
    def added(form: str, field: str) -> float:
        return sum(count * getattr(found[named(title + form * ("step" in title), n)], field)
                   for title, count in STEPS.items())
    theirs, rows = added("", "theirs"), []
    for form in ("", ", plain"):
        if named(f"Stage C step{form}", n) in found:
            ours = added(form, "ours")
            rows.append(Row(named(f"whole image, added up{form}", n), f"{ours:.3g} s", f"{theirs:.3g} s, diffusers",
                            theirs / ours, "29 guided steps of C, 12 unguided of B, one decoding"))
    if named("Stage C step, compiled", n) in found:
        ours, compiled = added(", compiled", "ours"), added(", compiled", "theirs")
        what = "an image, compiled" if n == 1 else f"an image of {n}, compiled"
        rows += [Row(f"{what}, seconds", f"{ours / n:.3g} s", "", ours / n),
                 Row(f"{what}, next to diffusers", f"{ours:.3g} s", f"{theirs:.3g} s", theirs / ours),
                 Row(f"{what}, next to diffusers compiled", f"{ours:.3g} s", f"{compiled:.3g} s", compiled / ours),
                 Row(f"{what}, share of the peak", "", "", added(", compiled", "flops") / ours / 1e9 / peak)]
    return rows
