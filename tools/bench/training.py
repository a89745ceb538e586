"""How long training steps of Stage C take, and how much memory, next to diffusers and peft: random weights (Linux).

Each setting runs in a process of its own, in turns.
"""
import sys
import time
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import lora
from stage_c import StageC
from tools.bench.measure import in_own_process, memory, peak_memory, products_of, ratio, seconds_of
from tools.bench.models import random_pair
from tools.bench.report import Row


class Run(NamedTuple):
    """who: "ours" or "diffusers"; full: all of Stage C, or a LoRA of rank 8 on attention; checkpointing: None, "blocks"
    or, only ours, "products"."""
    who: str
    full: bool
    checkpointing: str | None


RUNS = [Run(who, full, how) for full in (False, True)
        for who, hows in (("diffusers", (None, "blocks")), ("ours", (None, "products", "blocks"))) for how in hows]


def measure(args) -> tuple[str, list[Row], str]:
    side, results = args.side or 512, {run: [] for run in RUNS}
    # On a CPU, all of Stage C with gradients and moments does not fit next to the rest: fewer blocks, for the ratio.
    depths = {False: args.depth, True: max(1, args.depth // 4) if args.device == "cpu" else args.depth}
    for _ in range(args.repeats):
        for run in RUNS:
            results[run].append(in_own_process(fresh_steps, run, depths[run.full], side, args.batch, args.device))
            print(run, results[run][-1], file=sys.stderr, flush=True)
    rows, sizes, shares = [], [], []
    for run in RUNS:
        # Our "products" takes as long as a plain step and has no counterpart, so diffusers' plain step is next to it.
        other = results["diffusers", run.full, "blocks" if run.checkpointing == "blocks" else None]
        if run.who == "ours":
            rows += rows_of(run, results[run], other)
        else:                                            # of all of Stage C: weights, gradients and two moments
            sizes.append(other[0]["size"])
            shares.append((4 if run.full else 1) * sizes[-1] / median(result["peak"] for result in other))
    note = (f"One step of a LoRA of rank 8 on attention, Stage C of depth {depths[False]} (weights {sizes[0]:.2f} GB), "
            f"and one of all of Stage C, of depth {depths[True]} ({sizes[2]:.2f} GB): {side} px, batch {args.batch}. "
            f"Ratios: of time and of memory. Without activations the weights would remain, {shares[0]:.2f} of "
            f"diffusers' memory ({shares[1]:.2f} with checkpointing); for all of Stage C with gradients and two "
            f"moments {shares[2]:.2f} ({shares[3]:.2f}).")
    return "Training at 1024 px" if side == 1024 else "Training", rows, note


def rows_of(run: Run, ours: list[dict], theirs: list[dict]) -> list[Row]:
    """What was measured of a run of ours, and of its counterpart."""
    title = ("full" if run.full else "LoRA") + f", `--checkpointing {run.checkpointing}`" * bool(run.checkpointing)
    other = "diffusers" + " + peft" * (not run.full) + ", checkpointed" * (run.checkpointing == "blocks")
    losses, rows = f"losses {ours[0]['loss']:.6f} and {theirs[0]['loss']:.6f}", []
    for name, key, text in (("time", "seconds", "{:.2f} s"), ("memory", "peak", "{:.2f} GB")):
        our_values, their_values = ([result[key] for result in results] for results in (ours, theirs))
        rows.append(Row(f"{title}, {name}", text.format(median(our_values)),
                        f"{text.format(median(their_values))}, {other}", ratio(our_values, their_values), losses))
    if not run.checkpointing:
        seconds, products = ([result[key] for result in ours] for key in ("seconds", "products"))
        share = ratio(products, [result["seconds"] for result in theirs])
        rows.append(Row(f"{title}, only its products", rows[0].ours, f"{median(products):.2f} s",
                        ratio(products, seconds), "share of the time that matrix products and attention take by "
                        f"themselves; without the rest {share:.2f} of diffusers' time"))
    return rows


# ----- runs in a process of its own ------------------------------------------------------------------

def fresh_steps(run: Run, *sizes) -> dict:
    """training_steps after a step of a small model: what torch and peft load at first use is not memory of a step."""
    training_steps(run, 1, 128, 1, sizes[-1], width=64)
    return training_steps(run, *sizes)


def training_steps(run: Run, depth: int, side: int, batch: int, device: str, width: int = 1536, steps: int = 3) -> dict:
    """Optimizer steps as train_c.py and diffusers' training script make them, on random weights.

    -> seconds of the median step after the first; products, the seconds of only the products of ours; the first loss;
    peak, the most GB held beyond those before; size, the GB of the weights.
    """
    before = memory("VmRSS")
    model = build(run, depth, device, width).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
    generator, seconds, losses = torch.Generator(device).manual_seed(0), [], []
    shape = batch, 16, side * 3 // 128, side * 3 // 128

    def noise(*shape: int):
        return torch.randn(shape, generator=generator, device=device)
    for _ in range(steps):
        x_t, eps = noise(*shape), noise(*shape)
        t, text = torch.rand(batch, generator=generator, device=device), noise(batch, 77, 1280)
        start = time.perf_counter()
        loss = (model(x_t, t, text) - eps).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())                       # waits for a GPU
        seconds.append(time.perf_counter() - start)
    peak, products = peak_memory(device, before), None
    if run.who == "ours" and not run.checkpointing:
        alone = products_of(lambda: (model(x_t, t, text) - eps).square().mean().backward())
        products = seconds_of(alone, device)
    return dict(seconds=median(seconds[1:]), products=products, loss=losses[0], peak=peak / 1e9,
                size=sum(p.nbytes for p in model.parameters()) / 1e9)


def build(run: Run, depth: int, device: str, width: int) -> nn.Module:
    """Without dropout, so that both compute the same."""
    config = dict(c_in=16, c=width, c_cond=1280, c_timestep=64, depth=depth, heads=width // 64, dropout=0.0)
    ours, theirs = random_pair(StageC, "prior", config, device)
    model = ours if run.who == "ours" else theirs
    if run.full:
        model.requires_grad_(True)
    if run.who == "ours":
        model.checkpointing = run.checkpointing
        if not run.full:
            lora.add_lora(model, 8)
        return model
    if run.checkpointing:
        model.enable_gradient_checkpointing()
    if not run.full:
        from peft import LoraConfig
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model
