"""The validation: the same images, noise levels and noise every time, so that its numbers can be compared.

The training loss says little: at t = 0.05 the raw error is a hundred times that at t = 0.95, so the levels that were
drawn decide it. Needs: torch, numpy; data.py.
"""
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.data import fit, nearest_bucket
from training.order import sample_rng

T_GRID = [0.05 + 0.1 * i for i in range(10)]             # noise levels


def fixed_images(dataset, sizes: list[tuple[int, int]], args) -> list[tuple[Tensor, str]]:
    """The images of the validation, always the same ones: pixels (1,h,w,3) uint8 in the nearest of `sizes`, and caption."""
    chosen, result = np.random.default_rng([args.seed, 1]).permutation(len(dataset))[:args.val_count], []
    for i in chosen.tolist():
        size = sizes[nearest_bucket(dataset.sizes[i:i + 1], sizes)[0]]
        pixels, i = dataset.read_or_next(i, np.arange(len(dataset)))
        result.append((torch.from_numpy(np.array(fit(pixels, size)))[None], dataset.captions(i)[0]))
    return result


def fixed_noise(i: int, shape: tuple[int, ...], args) -> Tensor:
    """The noise (10, *shape) of image i, a row for each level of T_GRID."""
    rng = sample_rng(args.seed, i, "validation")
    return torch.from_numpy(rng.standard_normal((len(T_GRID), *shape), dtype="float32"))


@torch.no_grad()
def mean_over(count: int, measure: Callable[[int], Tensor], args, processes, shape: tuple = (len(T_GRID),)) -> Tensor:
    """The mean of measure(0), ..., measure(count - 1), each of `shape`. Each process computes its share, but under FSDP
    all of them, because a forward pass needs every process."""
    values, n = torch.zeros(shape, device=processes.device), torch.zeros((), device=processes.device)
    for i in range(count):
        if args.fsdp or i % processes.world == processes.rank:
            values += measure(i)
            n += 1
    if not args.fsdp:
        processes.sum(values), processes.sum(n)
    return values / n


def by_level(values: Tensor, name: str) -> dict[str, float]:
    """Values (10,) at the levels of T_GRID -> entries of the log."""
    return {f"{name}_t_{level:.2f}": value for level, value in zip(T_GRID, values.tolist())}
