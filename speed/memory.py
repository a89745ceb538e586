"""Less memory: one network at a time, networks that wait in main memory, images decoded in tiles.

  one_at_a_time(model)     reads each network again when it is needed and forgets the one before
  offload(model)           keeps one network on the GPU, the others in main memory
  tile(model, 64)          decodes images in tiles of 64 x 64 latents; None: only when memory is short

Each is called once, on a loaded pipeline, and replaces one of its methods. Loading does that: Wuerstchen.load(...,
low_memory=True, offload=True). Needs: torch.
"""
import gc
import math
from collections.abc import Callable
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """tensor.to(device). A GPU's host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def one_at_a_time(model) -> None:
    """model.networks holds functions that load: each network is loaded for as long as no other is asked for."""
    plain, held = model.part, {}

    def part(name: str):
        load = model.networks.get(name)
        if load is None or isinstance(load, torch.nn.Module):
            return plain(name)
        if load not in held:
            held.clear()
            gc.collect()                       # what was loaded may contain reference cycles
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            held[load] = load()
        return held[load]
    model.part = part


def offload(model) -> None:
    """The network that is asked for goes to the model's device, the one before it back to main memory."""
    plain, on_device = model.part, []

    def part(name: str):
        network = plain(name)
        if network not in on_device:
            while on_device:
                on_device.pop().to("cpu")
            network.to(model.device)
            on_device.append(network)
        return network
    model.part = part


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a device; infinite if there is no way to know."""
    if device.type == "cuda":
        # and what torch's allocator has reserved, but not given to a tensor
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()       # Linux; "available" includes caches
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def tile(model, size: int | None) -> None:
    """Decodes in tiles of size x size latents. None: in tiles of 64 if all at once would not fit into memory."""
    if size is not None and (not isinstance(size, Integral) or isinstance(size, bool) or size < 1):
        raise ValueError(f"tile is {size!r}, expected at least 1 latent per side; 64 need little memory.")
    plain = model.decode_one

    def decode_one(latents: Tensor) -> Tensor:
        stage_a = model.part("stage_a")
        dtype = next(stage_a.parameters()).dtype
        # Measured on a CPU, official size: 22 to 30 numbers per channel and latent at the peak, fewer if larger.
        needed = 24 * stage_a.config["c_hidden"] * latents[0, 0].numel() * dtype.itemsize
        tiled = size or (64 if needed > 0.8 * free_memory(model.device) else None)
        return plain(latents) if tiled is None else decode_tiled(stage_a, latents.to(dtype), tiled, plain)
    model.decode_one = decode_one


def decode_tiled(stage_a, latents: Tensor, tile: int = 64, decode: Callable | None = None) -> Tensor:
    """The same images as stage_a.decode, in tiles of `tile` x `tile` latents: memory as for one tile.

    decode: another function that decodes a tile, default stage_a.decode.

    Nothing in the decoder looks at the whole image, so a tile is right if it is decoded with as many neighbours around
    it as the decoder looks far: one for each block and one for each upsampling. The tiles then fit together without
    blending, equal to `decode` except for the rounding of larger products.
    """
    decode, (h, w) = decode or stage_a.decode, latents.shape[-2:]
    reach, up = len(stage_a.decoder) + 1, stage_a.downscale
    images = latents.new_empty(len(latents), 3, h * up, w * up)
    for y in range(0, h, tile):
        for x in range(0, w, tile):
            top, left = max(y - reach, 0), max(x - reach, 0)
            part = decode(latents[..., top:y + tile + reach, left:x + tile + reach])
            part = part[..., (y - top) * up:(y - top + tile) * up, (x - left) * up:(x - left + tile) * up]
            images[..., y * up:(y + tile) * up, x * up:(x + tile) * up] = part
    return images                                                                          # (B, 3, H, W)
