"""Int8: stores large linear layers in a quarter of the memory, and computes them about twice as fast on a CPU.

  model.requires_grad_(False)
  to_int8(model)                           # in place; or before loading, on the meta device: see quantised

A layer's y = W x + b becomes y = s_x s_w (W8 x8) + b. W8 are whole numbers, s_w is one scale per output; both are
computed once. x8 are whole numbers, s_x is one scale per row, that is, per position of the image; both are computed at
every call ("dynamic quantization"), because activations change. If a layer has at least as many inputs as outputs,
x8 = 0 stands for the row's minimum. After GELU, where almost all numbers are above 0, this halves the rounding errors.
Layers in FINE take their input in 16 bits. This needs two products of 8 bits, but hardly rounds the input.

In   any model in float32
Out  the same model, with an Int8Linear for every nn.Linear with at least `least` inputs and outputs. Small layers stay
     float32: they take little time, and rounding harms most in the first and last layers of a network, which are small
Note: on some processors weights range from -64 to 64 instead of 127. Processors with AVX2 but without VNNI add products
     of 8 bits in pairs, in 16 bits that saturate at 32767. 255 * 127 * 2 is larger, so the sum would be silently wrong;
     255 * 64 * 2 is not. `finest` tests the processor.
Only for sampling: int8 weights cannot be trained. First merge LoRAs into the float weights: lora.merge_and_unload.
One scale per row and one per output are an idea of LLM.int8(), arXiv:2208.07339.
Needs: torch only, with oneDNN, which torch has on x86. This file needs no other file of this repository.
"""
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

# {class of the network: layers whose input is taken in 16 bits instead of 8}. Over Stage C's 32 blocks, rounding errors
# add up to 1.2 % if the inputs of all layers are in 8 bits, and to 0.9 % if the inputs of `expand` are in 16 bits.
# Stage B needs no such layer: its errors add up to only 0.2 %.
FINE = {"StageC": ("expand",)}
ROWS = 512       # rows to compute at a time: so few that intermediate results stay in the processor's cache


def pack(weight8: Tensor) -> Tensor:
    """Returns weight8 (N,K) int8 in the order that `product` needs on this processor; the result's to_dense() is (K,N).
    Packing takes as long as 0.04 (AVX2), 0.5 (AVX-512), 1.1 (VNNI) or 4 (AMX) calls of `product` with 1152 rows.
    """
    return torch.ops.onednn.qlinear_prepack(weight8.contiguous(), None)      # because qlinear_prepack ignores strides


def product(x8: Tensor, weight8: Tensor, scale: Tensor) -> Tensor:
    """Returns scale * (x8 - 128) @ weight8.T, (M,N) float32, of x8 (M,K) uint8, weight8 (N,K) int8, scale (N,).

    weight8 may be packed. torch has several int8 products. For (256,1536) x (1536,1536) on one thread with AVX2, this
    one is 2.3 times as fast as float32, torch._int_mm 28 times slower, and _weight_int8pack_mm 1.3 times slower.
    quantized.linear_dynamic is 2.5 times as fast, but has one scale for all rows: an image would depend on its batch.
    """
    packed = weight8 if weight8.is_mkldnn else pack(weight8)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(x8, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none",
                                              [], "")


# For torch.compile, the product is one opaque operation, which packs the weight at the first call. The operation gets a
# layer's number, and finds the layer in LAYERS. (The decorator torch.library.custom_op would be one line, but its first
# call takes seconds.)
LAYERS, numbers = weakref.WeakValueDictionary(), itertools.count()
library = torch.library.Library("wuerstchen", "FRAGMENT")
library.define("int8_product(Tensor x8, Tensor scale, int layer, int start) -> Tensor")
library.impl("int8_product", lambda x8, scale, layer, start:
             product(x8, LAYERS[layer].packed(start, start + x8.shape[1]), scale), "CPU")
library.impl("int8_product", lambda x8, scale, layer, start: scale.new_empty(len(x8), len(scale)), "Meta")


def is_exact(n: int) -> bool:
    """Returns whether this processor's int8 product is exact for weights from -n to n. Tests the largest sums."""
    x8 = torch.tensor([[255] * 64, [0] * 64], dtype=torch.uint8)
    return product(x8, torch.full((64, 64), n, dtype=torch.int8),
                   torch.ones(64))[:, 0].tolist() == [127 * n * 64, -128 * n * 64]


def finest() -> int:
    """Returns the largest weight, 127 or 64, with exact int8 products on this processor; if none, raises ValueError."""
    try:
        fits = [n for n in (127, 64) if is_exact(n)]
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"int8 cannot be used here, torch {torch.__version__} has no int8 product for this processor: "
                         f"{str(error).splitlines()[0]}") from None
    if not fits:
        raise ValueError("int8 cannot be used here: this processor's int8 product is not exact, remove int8")
    return fits[0]


def quantise_weight(weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rounds weight (out,in) / scale (out,) to whole numbers from -n to n. Returns the numbers (int8) and the scale."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / n                                                     # (out,)
    return (weight / scale.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear with weight (out,in) int8, scale (out,) and bias (out,) float32. It starts empty; state_of fills it.

    fine: whether the input is taken in 16 bits, by two products of 8 bits.
    Columns of the weight are packed when a product first needs them. Once all are packed, `weight` is None.
    total (out,): sum of each output's weights. of_rows subtracts each row's minimum before it rounds the row to 8 bits,
    and adds minimum * total to the result. None if in < out: of_rows then rounds without subtracting a minimum.
    """
    def __init__(self, in_features: int, out_features: int, bias: bool = True, fine: bool = False, device=None):
        super().__init__()
        self.in_features, self.out_features, self.fine = in_features, out_features, fine
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, device=device))
        self.register_buffer("total", torch.empty(out_features, device=device) if in_features >= out_features else None)
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)
        self.__setstate__({})

    def __setstate__(self, state: dict) -> None:             # called by __init__ and when a layer is copied
        super().__setstate__(state)
        self.parts, self.number = {}, next(numbers)          # {(first column, end): packed columns of the weight}
        LAYERS[self.number] = self

    def __getstate__(self) -> dict:
        self.unpack()
        return self.__dict__

    def _save_to_state_dict(self, *args) -> None:
        self.unpack()
        super()._save_to_state_dict(*args)

    def packed(self, start: int, end: int) -> Tensor:
        """Returns columns start to end (excluded) of the weight in packed form. Packs them at the first call."""
        if (start, end) not in self.parts:
            if self.weight is None:                          # all columns are already packed, in other ranges
                self.unpack()
            self.parts[start, end] = pack(self.weight[:, start:end])
            if sum(end - start for start, end in self.parts) >= self.in_features:
                self.weight = None
        return self.parts[start, end]

    def unpack(self) -> None:
        """Restores `weight` from its packed columns."""
        if self.weight is None:
            self.weight = torch.cat([self.parts[columns].to_dense().T for columns in sorted(self.parts)], dim=1)
        self.parts = {}

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x (...,in) in float32. Returns (...,out)."""
        return self.part(x, 0)

    def part(self, x: Tensor, start: int) -> Tensor:
        """Returns what a slice x (...,C') of inputs adds to the output. start: its first index; if 0, adds the bias."""
        rows = x.flatten(0, -2)                                                          # (M, C')
        if torch.compiler.is_compiling() or len(rows) <= ROWS:
            y = self.of_rows(rows, start)                                                # (M, out)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            for some, result in zip(rows.split(ROWS), y.split(ROWS)):
                result.copy_(self.of_rows(some, start))
        return y.view(*x.shape[:-1], self.out_features)

    def of_rows(self, rows: Tensor, start: int) -> Tensor:
        """Computes the result (M,out) of `part` for rows (M,C')."""
        from_least = self.total is not None and rows.shape[-1] == self.in_features
        least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)            # (M, 1); faster than rows.abs()
        # Conversion to integers truncates, so 0.5 is added to round.
        if from_least:
            # A step below 1e-6 * |least| would make least / step inaccurate.
            step = torch.maximum((most - least) / 255, 1e-6 * least.abs()).clamp_min(1e-30)
            x8 = torch.addcmul(0.5 - least / step, rows, 1 / step)                       # (M, C') in 0..255
        else:
            step = torch.maximum(most, -least).clamp_min(1e-30) / 127                    # (M, 1)
            x8 = torch.addcmul(rows.new_tensor(128.5), rows, 1 / step)                   # (M, C') in 1..255; 128 is 0
        whole = x8.to(torch.uint8)
        product = torch.ops.wuerstchen.int8_product
        y = product(whole, self.scale, self.number, start)                               # (M, out)
        if self.fine:
            # The dropped fraction in units of 1 / 256. The product subtracts 128 units, which are the 0.5 added above.
            fine = x8.sub_(whole).mul_(256).to(torch.uint8)
            y = y.add_(product(fine, self.scale, self.number, start), alpha=1 / 256)
        # x8 cannot hold NaN or infinity. But `step` is NaN or infinite if x is, and so the output is as well.
        y = y.mul_(step) if start or self.bias is None else torch.addcmul(self.bias, y, step, out=y)
        if from_least:
            y = y.addcmul_(least + 128 * step, self.total)
        return y


def state_of(name: str, weight: Tensor, n: int) -> dict[str, Tensor]:
    """Returns the state dict, without bias, of an Int8Linear `name` for this weight (out,in). n: see `finest`."""
    weight8, scale = quantise_weight(weight, n)
    total = {f"{name}.total": scale * weight8.sum(1)} if weight.shape[1] >= weight.shape[0] else {}
    return {f"{name}.weight": weight8, f"{name}.scale": scale, **total}


def large(model: nn.Module, least: int = 128) -> list[str]:
    """Returns the names of the linear layers with at least `least` inputs and `least` outputs."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and min(module.in_features, module.out_features) >= least]


@torch.no_grad()
def to_int8(model: nn.Module, least: int = 128) -> list[str]:
    """Replaces large linear layers by Int8Linear, one by one to save memory. Returns their names. least: see `large`.

    In a model on the meta device, the new layers are empty; fill them with `quantised`. Raises errors of `check`.
    """
    names, fine = large(model, least), FINE.get(type(model).__name__, ())
    check(model.get_submodule(name).weight.device for name in names)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, child in fine, "meta")
        if not layer.weight.is_meta:
            state = state_of(child, layer.weight, finest())
            if layer.bias is not None:
                state[f"{child}.bias"] = layer.bias.detach().float()
            nn.ModuleDict({child: new}).load_state_dict(state, assign=True)
        setattr(model.get_submodule(parent), child, new.train(layer.training))
    return names


def quantised(tensors: Iterable[tuple[str, Tensor]], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) pairs for a model with the layers `names` in int8, converted from a float model's pairs.
    Pairs are converted one by one, so the whole float model is never in memory."""
    weights, n = {f"{name}.weight": name for name in names}, finest()
    for name, tensor in tensors:
        if name in weights:
            yield from state_of(weights[name], tensor, n).items()
        else:
            yield name, tensor


def one_image_at_a_time(model) -> None:
    """Makes a Wuerstchen compute Stages B and C for one image at a time, so that an image is the same to the bit in
    every batch. Replaces the model's method `predictor`.

    The rows of an int8 layer do not depend on each other. But the float32 products between these layers depend on the
    number of rows, because MKL and oneDNN then sum in another order. That may change a rounding to 8 bits.
    """
    plain = model.predictor

    def predictor(bind: Callable, conditions: list[tuple[Tensor, Tensor]]) -> Callable:
        rows = zip(*(tensor.split(1) for pair in conditions for tensor in pair))
        # The copies are needed, because the order of a sum also depends on the address at which a row begins.
        images = [[tensor.clone() for tensor in row] for row in rows]
        each = [plain(bind, [*zip(image[::2], image[1::2])]) for image in images]

        def predict(x: Tensor, t: Tensor, guided: bool) -> Tensor:
            eps = [predict_one(x[i:i + 1].clone(), t[i:i + 1], guided) for i, predict_one in enumerate(each)]
            return torch.stack(eps, dim=1).flatten(0, 1)                 # all predictions with text, then all without
        return predict
    model.predictor = predictor


def check(devices: Iterable[torch.device], dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError unless all devices are CPUs with exact int8 products and dtype, of other layers, is float32."""
    if dtype != torch.float32:
        raise ValueError(f"int8 computes in float32 between its products, not in {dtype}: remove one of them.")
    for device in devices:
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"int8 is for CPUs, not for {device.type}: use float16 or bfloat16 there")
    finest()
