"""Int8: the large linear layers of a network in a quarter of the memory, and about twice as fast on a CPU.

  model.requires_grad_(False)
  to_int8(model)                           # in place; or before loading, on the meta device: see quantised

A layer's y = W x + b becomes  y = s_x s_w (W8 x8) + b.  W8 are whole numbers and s_w one scale per output, made once; x8 and s_x,
one scale per row (a row is a position of the picture), are made at every call, since activations change: "dynamic". Where a layer
does not widen, x8 counts not from 0 but from the row's least number: behind GELU, where nearly all is above 0, that is twice as fine.
Layers that a network names in `int8_fine` take their input in 16 bits, as two planes of 8: twice the work, and only the weight's error is left.

In   any module tree of nn.Linear, float32
Out  the same with Int8Linear in place of those that have at least `least` inputs and outputs. Small ones stay: they cost
     nothing, and the first and last of a network are small, where rounding hurts most
Surprise: on some processors weights go from -64 to 64 and not to 127. Those with AVX2 but without VNNI add products of 8 bits in pairs,
     in 16 bits that stop at 32767: 255 * 127 * 2 does not fit, and the sum is wrong without a word; 255 * 64 * 2 does. `finest` tries it.
Only to paint with: nothing can be learned in int8. LoRAs belong into the float weights before, see lora.merge_and_unload.
Source of the idea of a scale per row and per output: LLM.int8(), arXiv:2208.07339.
Needs: torch only, with oneDNN (on x86 it has that). This file works when copied alone.
"""
from typing import Iterable, Iterator

import torch
import torch.nn as nn
from torch import Tensor


def product_now(x8: Tensor, weight8: Tensor, scale: Tensor) -> Tensor:
    """x8 (M,K) uint8, of which 128 means 0, weight8 (N,K) int8, scale (N,) -> scale * (x8 - 128) @ weight8.T, (M,N) float32.

    torch has several int8 products. Measured with AVX2, 1 thread, (256,1536) x (1536,1536), beside float32: this one is 2.3 times as
    fast; torch._int_mm 28 times slower; _weight_int8pack_mm 1.3 times slower; quantized.linear_dynamic 2.5 times as fast, but it takes
    one scale for all rows, so that a picture would depend on those beside it. Packing anew at each call takes 4 % of its time, and lets the
    weight be an ordinary tensor, of which a slice of columns is as good as the whole.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight8.contiguous(), None)                # strides it does not look at
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(x8, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none",
                                              [], "")


# torch.compile knows the operations inside with weights packed beforehand only: so it is told of one that it does not
# look into. (The
# decorator torch.library.custom_op says the same in one line, but takes seconds at its first call.)
library = torch.library.Library("wuerstchen", "FRAGMENT")
library.define("int8_product(Tensor x8, Tensor weight8, Tensor scale) -> Tensor")
library.impl("int8_product", product_now, "CPU")
library.impl("int8_product", lambda x8, weight8, scale: scale.new_empty(len(x8), len(weight8)), "Meta")
product = torch.ops.wuerstchen.int8_product


def is_exact(n: int) -> bool:
    """Does this processor add up products with weights from -n to n? Tried with the largest sums that there can be."""
    x8 = torch.tensor([[255] * 64, [0] * 64], dtype=torch.uint8)
    return product(x8, torch.full((64, 64), n, dtype=torch.int8),
                   torch.ones(64))[:, 0].tolist() == [127 * n * 64, -128 * n * 64]


def finest() -> int:
    """How far weights go on this processor, 127 or 64. Raises ValueError where int8 would not be exact, or cannot be used at all."""
    try:
        fits = [n for n in (127, 64) if is_exact(n)]
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"int8 cannot be used here, torch {torch.__version__} has no int8 product for this processor: {str(error).splitlines()[0]}") from None
    if not fits:
        raise ValueError("int8 cannot be used here: this processor's int8 product is not exact")
    return fits[0]


def quantise_weight(weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """weight (out,in) -> whole numbers from -n to n, (out,in) int8, and their scales, (out,) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / n                                                     # (out,)
    return (weight / scale.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear with weight (out,in) int8, scale (out,) and bias (out,) float32. Starts empty: see state_of.

    fine: x is taken in 16 bits, in two products.
    total (out,), only where in >= out: the sum of each output's weights, which takes back that x8 does not count from 0.
    """
    def __init__(self, in_features: int, out_features: int, bias: bool = True, fine: bool = False, device=None):
        super().__init__()
        self.in_features, self.out_features, self.fine = in_features, out_features, fine
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, device=device))
        self.register_buffer("total", torch.empty(out_features, device=device) if in_features >= out_features else None)
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x (...,in) float32 -> (...,out); or a part of the input, and the column of the weight at which it starts: see LinearInParts in stage_b.py."""
        rows, weight = x.flatten(0, -2), self.weight[:, start:start + x.shape[-1]]       # (M, C'), (out, C')
        from_least = self.total is not None and x.shape[-1] == self.in_features
        # (M, 1); twice as fast as abs().amax()
        least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        # A conversion to whole numbers cuts off, so half of one is added.
        if from_least:
            # never so small that least / step is not exact
            step = torch.maximum((most - least) / 255, 1e-6 * least.abs()).clamp_min(1e-30)
            x8 = torch.addcmul(0.5 - least / step, rows, 1 / step)                       # (M, C') in 0..255
        else:
            step = torch.maximum(most, -least).clamp_min(1e-30) / 127                    # (M, 1)
            # (M, C') in 1..255, 128 stands for 0
            x8 = torch.addcmul(rows.new_tensor(128.5), rows, 1 / step)
        whole = x8.to(torch.uint8)
        y = product(whole, weight, self.scale)                                           # (M, out)
        if self.fine:
            # what was cut off, less half of one, in steps of 1 / 256
            fine = x8.sub_(whole).mul_(256).to(torch.uint8)
            y = y.add_(product(fine, weight, self.scale), alpha=1 / 256)
        # NaN and infinity in x, of which 8 bits know nothing, come back here with the step.
        y = y * step if start or self.bias is None else torch.addcmul(self.bias, y, step)
        if from_least:
            y = y.addcmul_(least + 128 * step, self.total)
        return y.view(*x.shape[:-1], self.out_features)


def state_of(name: str, weight: Tensor, n: int) -> dict[str, Tensor]:
    """The weight (out,in) of the linear layer of that name -> what an Int8Linear has in its place, by full names."""
    weight8, scale = quantise_weight(weight, n)
    total = {f"{name}.total": scale * weight8.sum(1)} if weight.shape[1] >= weight.shape[0] else {}
    return {f"{name}.weight": weight8, f"{name}.scale": scale, **total}


def large(model: nn.Module, least: int = 128) -> list[str]:
    """Names of the linear layers with at least so many inputs and outputs."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and min(module.in_features, module.out_features) >= least]


@torch.no_grad()
def to_int8(model: nn.Module, least: int = 128) -> list[str]:
    """Replaces the large linear layers, one after another, so that only one is there twice at a time -> their names.

    A model on the meta device gets the layers alone; their numbers then come from `quantised`. Raises ValueError.
    model.int8_fine, where there is such a thing: the layers to be taken in 16 bits, by the last parts of their names.
    """
    names, fine = large(model, least), getattr(model, "int8_fine", ())
    check(model.get_submodule(name).weight.device for name in names)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, child in fine, "meta")
        if not layer.weight.is_meta:
            state = state_of(child, layer.weight, finest()) | ({} if layer.bias is None
                                                               else {f"{child}.bias": layer.bias.detach().float()})
            nn.ModuleDict({child: new}).load_state_dict(state, assign=True)
        setattr(model.get_submodule(parent), child, new.train(layer.training))
    return names


def quantised(tensors: Iterable[tuple[str, Tensor]], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs for a float model -> for the same with these layers in int8. One by one: the float model is never there."""
    weights, n = {f"{name}.weight": name for name in names}, finest()
    for name, tensor in tensors:
        if name in weights:
            yield from state_of(weights[name], tensor, n).items()
        else:
            yield name, tensor


def check(devices: Iterable[torch.device]) -> None:
    """Raises ValueError where int8 would not compute, or not exactly."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"int8 is for CPUs, not for {device.type}: use float16 or bfloat16 there")
    finest()
