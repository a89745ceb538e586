"""Measures networks of official size with random weights: compares calls with diffusers', adds up a whole image."""
import gc
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from speed.fast import bind_b, bind_c, decode, step_b, step_c
from stage_a import StageA
from stage_b import StageB
from stage_c import StageC
from tools.bench.measure import Call, Measured, compare
from tools.bench.models import int8_copy, noise, random_pair
from tools.bench.networks import decode_calls, step_calls
from tools.bench.report import DTYPES, Row, goals_of
from wuerstchen import latent_sizes

STEPS = {"Stage C step": 29, "Stage B step": 12, "Stage A decode": 1}        # {name of a call: calls per image}


def suffix_of(n: int) -> str:
    return "" if n == 1 else f", {n} images"


def measure(args) -> tuple[str, list[Row], str]:
    gpu, rows, found, peaks = args.device.startswith("cuda"), [], {}, []
    args.dtype, args.side = args.dtype or ("bf16" if gpu else "fp32"), args.side or 1024
    args.pictures, args.calls = args.pictures or ([1, 4, 8] if gpu else [1]), args.calls if gpu else 1
    for title in STEPS:                                  # one network at a time, to save memory
        new_rows, new, peak = compare(calls_of_stage(title, args), args.repeats, args.device,
                                      getattr(torch, DTYPES[args.dtype]), args.calls)
        gc.collect()
        print("\n".join(" ".join(map(str, row)) for row in new_rows), file=sys.stderr, flush=True)   # shows progress
        rows, found, peaks = rows + new_rows, found | new, peaks + [peak]
    if args.dtype == "fp32":
        for title, form, field in (("largest deviation from diffusers", "", "difference"),
                                   ("error of int8, relative L2", "int8", "l2")):
            values = [getattr(call, field) for what, call in found.items()
                      if form == next((form for form in ("int8", "bf16") if form in what), "")]
            rows += [Row(title, f"{max(values):.0e}", "", max(values))] if values else []
    rows += [row for n in args.pictures for row in whole_images(found, n, median(peaks))]
    note = f"{DTYPES[args.dtype]}, {args.side} px. Peak {median(peaks):.0f} GFLOP/s."
    if (args.side, args.depth) != (1024, 32):
        note += f" **Not the official size: {args.side} px, depth {args.depth}.**"
    if not gpu:
        note += f"\n\nOn a GPU the same command writes a section of its own. Its goals: {'; '.join(goals_of('GPU'))}."
    return "GPU" if gpu else "Official size", rows, note


def calls_of_stage(title: str, args, small: dict | None = None) -> dict[str, Call]:
    """Returns {name: Call} for `title`, a key of STEPS. small: {part: sizes instead of the official ones} or None."""
    (size_c, size_b), dtype = latent_sizes(args.side, args.side), getattr(torch, DTYPES[args.dtype])
    random = noise(args.device, dtype)
    blocks = tuple(max(1, n * args.depth // 32) for n in (4, 4, 14, 4))

    def pair(stage: type, part: str, **config) -> Callable[..., tuple[nn.Module, nn.Module]]:
        return partial(random_pair, stage, part, config | (small or {}).get(part, {}), args.device)
    if title == "Stage C step":          # with guidance, an image takes 2 rows of the batch
        return calls_of(title, args, bind_c, step_c, lambda n: (random(2 * n, 16, *size_c), random(2 * n, 77, 1280)),
                        pair(StageC, "prior", depth=args.depth))
    if title == "Stage B step":
        return calls_of(title, args, bind_b, step_b, lambda n: (
            random(n, 4, *size_b), random(n, 16, *size_c) * 42 - 1, random(n, 77, 1024)),
            pair(StageB, "decoder", blocks=blocks))
    calls, build = {}, pair(StageA, "vqgan")
    for form, dtype in forms_of(args).items():
        networks = build(dtype)
        for n in args.pictures:
            calls |= decode_calls(form + suffix_of(n), args, networks, partial(decode, networks[0]),
                                  random(n, 4, *size_b).to(dtype))
    return calls


def forms_of(args) -> dict[str, torch.dtype]:
    """Returns the dtypes to measure, by suffix of a call's name: args.dtype and, if it is fp32 on a CPU, bfloat16."""
    more = {", bf16": torch.bfloat16} if args.device == "cpu" and args.dtype == "fp32" else {}
    return {"": getattr(torch, DTYPES[args.dtype])} | more


@torch.no_grad()
def calls_of(title: str, args, bind: Callable, step: Callable, inputs: Callable[[int], tuple],
             build: Callable[..., tuple[nn.Module, nn.Module]]) -> dict[str, Call]:
    """Returns {name: Call} for Stage C or B in all forms to measure, such as int8. bind, step: the stage's functions in
    speed/fast.py. inputs(n) returns x_t and conditions for n images, build(dtype) our network and diffusers'."""
    def compiled(function: Callable) -> Callable:
        mode = dict(mode="reduce-overhead") if args.device.startswith("cuda") else {}
        return torch.compile(function, dynamic=False, **mode)
    forms = {form: (dtype, build(dtype)) for form, dtype in forms_of(args).items()}
    ours, theirs = forms[""][1]
    calls, step_compiled, theirs_compiled = {}, compiled(step), compiled(theirs)
    ours_in_int8 = int8_copy(ours) if len(forms) > 1 else None
    for n in args.pictures:
        suffix = suffix_of(n)
        for form, (dtype, pair) in forms.items():
            x, *conditions = (tensor.to(dtype) for tensor in inputs(n))
            calls |= step_calls(title + form, suffix, args, pair, bind(pair[0], *conditions), x, *conditions)
        fast, (_, *conditions) = calls[title + suffix], inputs(n)
        if args.compile:
            other = partial(theirs_compiled, *fast.theirs.args) if n == 1 else None      # only n = 1: compiling is slow
            calls[f"{title}, compiled{suffix}"] = Call(
                partial(bind(ours, *conditions, step_compiled), *fast.ours.args), other, eager=fast.ours)
        if ours_in_int8:
            calls[f"{title}, int8{suffix}"] = fast._replace(
                ours=partial(bind(ours_in_int8, *conditions), *fast.ours.args), alone=False)
    return calls


def whole_images(found: dict[str, Measured], n: int, peak: float) -> list[Row]:
    """Returns rows for n images: sums of calls in `found`. If a call lacks a form, such as int8, the default counts."""
    def added(form: str, field: str) -> float:
        calls = (found.get(f"{title}{form}{suffix}", found[title + suffix]) for title in STEPS)
        return sum(count * getattr(call, field) for call, count in zip(calls, STEPS.values()))
    suffix, rows = suffix_of(n), []
    theirs = added("", "theirs")
    for form, their_form in (("", ""), (", plain", ""), (", int8", ""), (", bf16", ""), (", bf16", ", bf16")):
        if f"Stage C step{form}{suffix}" in found:
            ours, other = added(form, "ours"), added(their_form, "theirs")
            what = f"whole image, added up{form}{', next to diffusers in bf16' * bool(their_form)}{suffix}"
            rows.append(Row(what, f"{ours:.3g} s", f"{other:.3g} s, diffusers", ours / other,
                            "29 guided steps of C, 12 unguided of B, one decoding" * (form == "")))
    if f"Stage C step, compiled{suffix}" in found:
        ours = added(", compiled", "ours")
        what = "an image, compiled" if n == 1 else f"an image of {n}, compiled"
        rows += [Row(f"{what}, seconds", f"{ours / n:.3g} s", "", ours / n),
                 Row(f"{what}, next to diffusers", f"{ours:.3g} s", f"{theirs:.3g} s", ours / theirs)]
        if n == 1:
            compiled = added(", compiled", "theirs")
            rows.append(Row(f"{what}, next to diffusers compiled", f"{ours:.3g} s", f"{compiled:.3g} s",
                            ours / compiled))
        rows += [Row(f"{what}, share of the peak", "", "", added(", compiled", "flops") / ours / 1e9 / peak)]
    return rows
