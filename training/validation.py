"""Computes the validation loss, each time on the same images, noise levels and noise, so that values can be compared.

The training loss cannot be compared between steps, because it mostly depends on the noise levels drawn: the unweighted
error at t = 0.05 is 100 times the error at t = 0.95. Needs: torch, numpy; data.py, order.py, samples.py, wuerstchen.py.
"""
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from training.data import fit, nearest_bucket
from training.order import sample_rng
from training.samples import encoder_input, to_tensor
from wuerstchen import unscale_semantic

T_GRID = [0.05 + 0.1 * i for i in range(10)]             # noise levels of the validation


def random_images(dataset, sizes: list[tuple[int, int]], rng: np.random.Generator,
                  count: int) -> Iterator[tuple[Tensor, str]]:
    """Yields (pixels (1,h,w,3) uint8, first caption) of `count` random images, each cut to the nearest of `sizes`."""
    nearest = nearest_bucket(dataset.sizes, sizes)                                       # (N,)
    rng.shuffle(numbers := np.arange(len(dataset), dtype=np.uint32))                     # (N,)
    for i in numbers[:count].tolist():
        pixels, j = dataset.read_or_replace(i, lambda: np.flatnonzero(nearest == nearest[i]))
        yield torch.from_numpy(np.array(fit(pixels, sizes[nearest[i]])))[None], dataset.captions(j)[0]


def fixed_images(dataset, sizes: list[tuple[int, int]], args) -> list[tuple[Tensor, str]]:
    """Returns [(pixels, caption)] of args.val_count images for the validation, which args.seed determines."""
    return list(random_images(dataset, sizes, np.random.default_rng([args.seed, 1]), args.val_count))


def fixed_noise(i: int, shape: tuple[int, ...], args) -> Tensor:
    """Returns the noise (10, *shape) for the validation's image i: one row per noise level of T_GRID."""
    rng = sample_rng(args.seed, i, "validation")
    return torch.from_numpy(rng.standard_normal((len(T_GRID), *shape), dtype="float32"))


@torch.no_grad()
def mean_over(count: int, measure: Callable[[int], Tensor], args, processes, shape: tuple = (len(T_GRID),)) -> Tensor:
    """Returns the mean of measure(0), ..., measure(count - 1), tensors of `shape`. Each process computes its share of
    them. Under FSDP, each process computes all of them, because a forward pass needs every process."""
    values, n = torch.zeros(shape, device=processes.device), torch.zeros((), device=processes.device)
    for i in range(count):
        if args.fsdp or i % processes.world == processes.rank:
            values += measure(i)
            n += 1
    if not args.fsdp:
        processes.sum(values), processes.sum(n)
    return values / n


def by_level(values: Tensor, name: str) -> dict[str, float]:
    """Returns values (10,) at the noise levels of T_GRID as entries of the log, {"NAME_t_0.05": value, ...}."""
    return {f"{name}_t_{level:.2f}": value for level, value in zip(T_GRID, values.tolist())}


# ----- Stage B ------------------------------------------------------------------------------------------

def fixed_set(dataset, side: int, encoders: dict, args, device) -> SimpleNamespace:
    """Returns train_b.py's validation set, N images cut to squares (r = `side` px): pixels (N,r,r,3) uint8, captions,
    latents x_0 (N,...), and source: raw semantic latents (N,16,h',w') or, if their encoder is trained, its input.
    encoders: functions from pixels to latents: "x_0" and, if the image encoder is frozen, "stored"."""
    pixels, captions = zip(*fixed_images(dataset, [(side, side)], args))
    x_0 = torch.cat([encoders["x_0"](row) for row in pixels])
    if "stored" in encoders:
        source = unscale_semantic(torch.cat([encoders["stored"](row) for row in pixels]))
    else:
        source = encoder_input(to_tensor(torch.cat(pixels), device))
    return SimpleNamespace(pixels=torch.cat(pixels), captions=list(captions), x_0=x_0, source=source)


def validate(model, fixed, embed: Callable, weight: Callable, stage, autocast, args, processes) -> dict[str, float]:
    """Returns {name in the log: value}: Stage B's unweighted loss at each noise level of T_GRID, their weighted
    mean and, for v1, the shares of correct tokens. Unlike in training, no conditions are dropped or get noise. fixed:
    the result of fixed_set. weight: a function from noise levels to weights. stage: train_b or v1.training."""
    levels, config = torch.tensor(T_GRID, device=processes.device), model.decoder.config         # (10,)

    def measure(i: int) -> Tensor:
        x_0, source, values = fixed.x_0[i:i + 1], fixed.source[i:i + 1], []
        rng = sample_rng(args.seed, i, "validation")
        with autocast:
            semantic, text = model(source), embed([fixed.captions[i]])
        for t in levels.split(stage.LEVELS_AT_ONCE):
            x_0_t, semantic_t, text_t = (part.repeat(len(t), *[1] * (part.ndim - 1)) for part in (x_0, semantic, text))
            drawn = [stage.draw_noise(rng, *x_0.shape[-2:], config) for _ in t]
            noise = {name: torch.stack([item[name] for item in drawn]).to(x_0.device) for name in drawn[0]}
            x_t, target = stage.corrupt(noise, x_0_t, t, blind=False)
            with autocast:
                output = model(semantic_t, x_t, t, text_t)
            loss = stage.raw_losses(output, x_0_t, x_t, target, t, args)
            found = stage.accuracy(output, x_0_t, target) if args.v1 else torch.zeros_like(t)
            values.append(torch.stack([loss, found]))                                    # (2, levels at once)
        return torch.cat(values, dim=1)                                                  # (2, 10)
    raw, found = mean_over(len(fixed.captions), measure, args, processes, (2, len(T_GRID)))
    values = dict(val_loss=(raw * weight(levels)).mean().item()) | by_level(raw, "val_loss")
    return values | (by_level(found, "val_accuracy") if args.v1 else {})
