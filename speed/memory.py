"""Saves memory: keeps one network at a time, moves waiting networks to main memory, decodes images in tiles.

  one_at_a_time(model)     keeps one network in memory, and reads each network again when it is needed
  offload(model)           keeps one network on the GPU, the others in main memory
  tile(model, 64)          decodes images in tiles of 64 x 64 latents; tile(model, None) does so only if memory is short

Each function is called once for a loaded pipeline, and replaces one of its methods. Wuerstchen.load(...,
low_memory=True, offload=True) calls them. Needs: torch.
"""
import gc
import math
from collections.abc import Callable
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns tensor.to(device). If the device is a GPU, the CPU does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def one_at_a_time(model) -> None:
    """Makes a Wuerstchen keep only one network in memory: frees the previous network before it loads the next."""
    plain, held = model.part, {}

    def part(name: str):
        load = model.networks.get(name)
        if load is None or isinstance(load, torch.nn.Module):
            return plain(name)
        if load not in held:
            held.clear()
            gc.collect()                       # frees networks that contain reference cycles
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            held[load] = load()
        return held[load]
    model.part = part


def offload(model) -> None:
    """Makes a Wuerstchen move each requested network to its device, and the previous network back to main memory."""
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
    """Returns the number of bytes that can still be allocated on a device; infinity if it is unknown."""
    if device.type == "cuda":
        # Adds the memory that torch's allocator has reserved, but not given to a tensor.
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()       # only on Linux; MemAvailable includes file caches
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def tile(model, size: int | None) -> None:
    """Makes a Wuerstchen decode in tiles of size x size latents. size None: 64 if memory is short, else no tiles."""
    if size is not None and (not isinstance(size, Integral) or isinstance(size, bool) or size < 1):
        raise ValueError(f"tile is {size!r}, expected at least 1 latent per side; 64 need little memory.")
    plain = model.decode_one

    def decode_one(latents: Tensor) -> Tensor:
        stage_a = model.part("stage_a")
        dtype = next(stage_a.parameters()).dtype
        # At its peak, decoding holds 22 to 30 values per hidden channel and latent position (on a CPU): 24 / 0.8 = 30.
        needed = 24 * stage_a.config["c_hidden"] * latents[0, 0].numel() * dtype.itemsize
        tiled = size or (64 if needed > 0.8 * free_memory(model.device) else None)
        return plain(latents) if tiled is None else decode_tiled(stage_a, latents.to(dtype), tiled, plain)
    model.decode_one = decode_one


def decode_tiled(stage_a, latents: Tensor, tile: int = 64, decode: Callable | None = None) -> Tensor:
    """Returns the images of stage_a.decode(latents), decoded in tiles of `tile` x `tile` latents to save memory.

    decode: the function that decodes a tile, default stage_a.decode.
    A pixel depends only on latents near it. So each tile is decoded together with a border of latents as wide as the
    decoder's receptive field: one latent for each block and one for each upsampling. The tiles then fit together
    without blending, and equal stage_a.decode except for rounding.
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
