"""Measures time and memory of training steps of Stage C next to diffusers and peft, and estimates an epoch's time.

It works only on Linux. Each setting runs in its own process, with random weights. The settings run in turns.
"""
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import lora
from stage_b import EfficientNetEncoder, preprocess
from stage_c import StageC
from tools.bench.measure import in_own_process, memory, peak_memory, products_of, ratio, seconds_of
from tools.bench.models import random_pair, random_text_model
from tools.bench.report import PROMPT, Row


class Run(NamedTuple):
    """A setting to measure. who: "ours" or "diffusers". full: whether to train all of Stage C; else a LoRA of rank 8 on
    attention. checkpointing: None, "blocks" or (only ours) "products". bf16: whether ours trains with --dtype bf16."""
    who: str
    full: bool
    checkpointing: str | None
    bf16: bool = False


RUNS = [Run(*run) for full in (False, True) for run in (
    ("diffusers", full, None), ("diffusers", full, "blocks"), ("ours", full, None), ("ours", full, None, True),
    ("ours", full, "products"), ("ours", full, "blocks"))]


def measure(args) -> tuple[str, list[Row], str]:
    side, results, rows = args.side or 512, {run: [] for run in RUNS}, []
    # On a CPU, all of Stage C with gradients and moments does not fit in memory. Fewer blocks are enough for a ratio.
    depths = {False: args.depth, True: max(1, args.depth // 4) if args.device == "cpu" else args.depth}
    for _ in range(args.repeats):
        for run in RUNS:
            results[run].append(in_own_process(fresh_steps, run, depths[run.full], side, args.batch, args.device))
            print(run, results[run][-1], file=sys.stderr, flush=True)
    for run in RUNS:
        if run.who == "ours":
            # diffusers has no checkpointing like "products", so that is compared with its step without checkpointing.
            how = "blocks" if run.checkpointing == "blocks" else None
            rows += rows_of(run, results[run], results[Run("diffusers", run.full, how)])
    note = (f"One step of a LoRA of rank 8 on attention, Stage C of depth {depths[False]}, and one of all of Stage C, "
            f"of depth {depths[True]}: {side} px, batch {args.batch}.")
    return "Training at 1024 px" if side == 1024 else "Training", rows, note


def rows_of(run: Run, ours: list[dict], theirs: list[dict]) -> list[Row]:
    """Returns table rows that compare `ours`, our results for a setting, with `theirs`, the results of diffusers."""
    title = ("full" if run.full else "LoRA") + f", `--checkpointing {run.checkpointing}`" * bool(run.checkpointing)
    title += ", bf16" * run.bf16
    other = "diffusers" + " + peft" * (not run.full) + ", checkpointed" * (run.checkpointing == "blocks")
    seconds, their_seconds, peak, their_peak = ([result[key] for result in results] for key in ("seconds", "peak")
                                                for results in (ours, theirs))
    size = ours[0]["size"]
    least = f"weights, gradients and moments {4 * size:.2f}" if run.full else f"weights {size:.2f}"
    more, floor = f"losses {ours[0]['loss']:.6f} and {theirs[0]['loss']:.6f}", math.nan
    if not run.checkpointing:
        products = [result["products"] for result in ours]
        more += f"; products alone {median(products):.2f} s, {ratio(products, their_seconds):.2f} of diffusers"
        floor = ratio(products, seconds)
    return [Row(f"{title}, time", f"{median(seconds):.2f} s", f"{median(their_seconds):.2f} s, {other}",
                ratio(seconds, their_seconds), more, floor),
            Row(f"{title}, memory", f"{median(peak):.2f} GB", f"{median(their_peak):.2f} GB, {other}",
                ratio(peak, their_peak), f"of this {least} GB")]


def measure_epoch(args) -> tuple[str, list[Row], str]:
    """Estimates the time of an epoch of 200 images, with and without --cache, from the time of a step: an epoch would
    take hours on a CPU. Returns the section's title, rows and note."""
    side, steps, found = args.side or 768, 200 / args.batch, []
    for _ in range(args.repeats):
        step = in_own_process(fresh_steps, Run("ours", False, None), args.depth, side, args.batch, args.device)
        found.append((step["seconds"], in_own_process(encoding, side, args.batch, args.device),
                      in_own_process(reading, side, args.batch)))
    step, more, read = (median(values) for values in zip(*found))
    rows = [Row("200 images, LoRA, `--cache`", f"{steps * step:.0f} s", f"{steps * (step + more):.0f} s, without",
                step / (step + more), f"the image encoder and CLIP take {more:.2f} s of a step of {step + more:.2f} s, "
                "which is all that a cache can save"),
            Row("reading a batch, 2 workers", f"{read:.3f} s", f"{step + more:.2f} s, a step without a cache",
                read / (step + more))]
    return "Epoch", rows, (f"LoRA of rank 8 on attention, Stage C of depth {args.depth}, {side} px, "
                           f"batch {args.batch}, image files of {side * 4 // 3} px.")


# ----- functions that run in their own process -------------------------------------------------------


def fresh_steps(run: Run, *sizes) -> dict:
    """Returns training_steps(run, *sizes). Runs a small model first, so memory allocated only once is not measured."""
    training_steps(run, 1, 128, 1, sizes[-1], width=64)
    return training_steps(run, *sizes)


def training_steps(run: Run, depth: int, side: int, batch: int, device: str, width: int = 1536, steps: int = 3) -> dict:
    """Runs optimizer steps like train_c.py and diffusers' training script, with random weights.

    Returns a dict. seconds: the median step, without the first. products: seconds of our matrix products and attention
    (None for diffusers and with checkpointing). loss: the first loss. peak: peak_memory in GB. size: weights in GB."""
    before = memory("VmRSS")
    model = build(run, depth, device, width).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)
    generator, seconds, losses = torch.Generator(device).manual_seed(0), [], []
    shape = batch, 16, side * 3 // 128, side * 3 // 128

    def noise(*shape: int):
        return torch.randn(shape, generator=generator, device=device)

    def loss_of(x_t, t, text, eps) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=run.bf16):
            return (model(x_t, t, text).float() - eps).square().mean()
    for _ in range(steps):
        x_t, eps = noise(*shape), noise(*shape)
        t, text = torch.rand(batch, generator=generator, device=device), noise(batch, 77, 1280)
        start = time.perf_counter()
        loss = loss_of(x_t, t, text, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())                       # waits for the GPU, so that the step's time is complete
        seconds.append(time.perf_counter() - start)
    peak, products = peak_memory(device, before), None
    if run.who == "ours" and not run.checkpointing:
        alone = products_of(lambda: loss_of(x_t, t, text, eps).backward())
        products = seconds_of(alone, device)
    return dict(seconds=median(seconds[1:]), products=products, loss=losses[0], peak=peak / 1e9,
                size=sum(p.nbytes for p in model.parameters()) / 1e9)


def build(run: Run, depth: int, device: str, width: int) -> nn.Module:
    """Builds our Stage C or diffusers', prepared for `run`, without dropout, so that both compute the same."""
    config = dict(c_in=16, c=width, c_cond=1280, c_timestep=64, depth=depth, heads=width // 64, dropout=0.0)
    # As in train_c.py, with a LoRA the frozen base weights are stored in the dtype of autocast.
    ours, theirs = random_pair(StageC, "prior", config, device,
                               torch.bfloat16 if run.bf16 and not run.full else torch.float32)
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


@torch.no_grad()
def encoding(side: int, batch: int, device: str) -> float:
    """Returns the seconds of the image encoder and CLIP-bigG at official size: --cache saves this time in each step."""
    encoder, text_model = EfficientNetEncoder().eval().to(device), random_text_model(1280, 32, 20, device)
    images, ids = torch.rand(batch, 3, side, side, device=device), torch.arange(77, device=device).expand(batch, -1)
    mask = torch.ones_like(ids)
    seconds = [seconds_of(lambda: (encoder(preprocess(images, side * 3 // 4)), text_model(ids, mask)), device)
               for _ in range(3)]
    return median(seconds[1:])


def reading(side: int, batch: int, files: int = 64) -> float:
    """Returns the seconds per batch when two workers of train_c.py read JPEG files a third larger than `side`."""
    import train_c
    from training.data import open_dataset
    from training.order import BatchSampler, batches
    from training.processes import Processes
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(files):
            rough = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
            rough.resize((side * 4 // 3, side * 4 // 3), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=95)
            Path(folder, f"{i}.txt").write_text(PROMPT, encoding="utf-8")
        args = train_c.parse_args(["--data", folder, "--out", folder, "--batch", f"{batch}", "--workers", "2"])
        dataset = open_dataset(folder)
        dataset.bucket = np.zeros(len(dataset), int)
        samples = train_c.StageCSamples(dataset, [(side, side)], args, {}, {})
        loader = batches(samples, BatchSampler(dataset.bucket, batch, 0), Processes("cpu"), args)
        for _ in range(8):                               # warm up: start the workers, use up prefetched batches
            next(loader)
        return seconds_of(lambda: [next(loader) for _ in range(16)]) / 16
