"""Computes the same outputs as stage_a.py, stage_b.py and stage_c.py in less time, for sampling.

  accelerate(model)                                          # a Wuerstchen; Wuerstchen.load calls it
  predict = bind_c(stage_c, text); eps = predict(x_t, t)     # = stage_c(x_t, t, text), at every step of a sampling

The stage files are simple, not fast. A sampler calls a network 10 to 60 times with the same condition. So here:
- everything that does not depend on the noise level is computed once: keys and values of the text for each attention
  block, and the products of the semantic latents in Stage B, which are 18 % of a step's multiplications;
- inputs are not concatenated: W [x; y] = W_x x + W_y y, where W_x and W_y are columns of W;
- a GPU launches fewer kernels, because a launch takes longer than a small operation: query, key and value are one
  product, stored next to the text's keys and values; all scales and shifts of a sampling are one product (untried);
- on a CPU, where allocation takes time, wide activations are computed in place, and Stage A in bands of rows.

bind_c, bind_b and bind_b_v1 return functions for one sampling. These functions call the layers of the network, so LoRAs
and int8 layers work as usual. If a LoRA is added, scaled, switched or removed between two steps, the prepared tensors
are computed again. The functions compute no gradients, so they are only for sampling.
Needs: torch; stage_a.py, stage_b.py, stage_c.py, lora.py, int8.py.
"""
import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from lora import LoRALayer
from speed.int8 import Int8Linear
from stage_a import StageA, VQResBlock, run
from stage_b import (AttentionBlock, ResBlock, StageB, TimestepBlock, channels_first, channels_last, layer_norm,
                     narrow, resize_semantic, timestep_embedding, widen)
from stage_c import StageC


# ----- blocks ----------------------------------------------------------------------------------------

def gelu_grn(norm: nn.Module, x: Tensor) -> Tensor:
    """Computes norm(gelu(x)) for a GlobalResponseNorm and x (B,H,W,C). On a CPU it overwrites x, except in float16.

    A CPU needs time to allocate memory, and to read x again once it has left the cache. So x is overwritten, in steps
    of 512 positions. In bfloat16, torch's norm over positions takes three times as long as this whole function.
    """
    if few_launches(x.device) and not torch.compiler.is_compiling() and x.dtype == norm.gamma.dtype:
        h = F.gelu(x)                          # this branch launches 6 kernels, norm(gelu(x)) 8
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        energy = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True, dtype=dtype)      # (B, 1, 1, C)
        mean, epsilon, one = constants(x.shape[-1], dtype, x.device)
        n = (energy / F.linear(energy, mean, epsilon)).to(x.dtype)                       # (B, 1, 1, C)
        return torch.addcmul(norm.beta, h, torch.addcmul(one.to(x.dtype), norm.gamma, n))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype == torch.float16:
        return norm(F.gelu(x))
    energy = x.new_zeros(len(x), 1, 1, x.shape[-1], dtype=torch.float32)                 # (B, 1, 1, C)
    for image, squares in zip(x, energy):
        for rows in image.view(-1, x.shape[-1]).split(512):
            F.gelu(rows, out=rows)
            squares += rows.square().sum(0)
    energy = energy.sqrt_()
    n = energy / (energy.mean(-1, keepdim=True) + 1e-6)                                  # (B, 1, 1, C)
    return torch.addcmul(norm.beta, x, (1 + norm.gamma * n).to(x.dtype), out=x)          # (B, H, W, C)


def few_launches(device: torch.device) -> bool:
    """Returns whether to join matrix products for fewer kernels; False on a CPU, where rounding would change images."""
    return device.type != "cpu"


@functools.cache
def constants(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three tensors: weight and bias of a Linear that computes the mean of `width` inputs + 1e-6; and a 1."""
    return (torch.full((1, width), 1 / width, dtype=dtype, device=device),
            torch.full((1,), 1e-6, dtype=dtype, device=device), torch.ones((), dtype=dtype, device=device))


def text_kv(block: AttentionBlock, text: Tensor, lean: bool) -> tuple:
    """Returns keys and values of the text, each (B,N,C). If lean: keys and values in one tensor (B,N,2C), and the joint
    weight and bias of query, key and value, whose own weights become views of them, so nothing is stored twice."""
    kv, layers = block.text_kv(text), (block.query, block.key, block.value)
    if not lean or any(type(layer) is not nn.Linear for layer in layers):
        return kv
    weight, bias = (torch.cat([getattr(layer, name).detach() for layer in layers]) for name in ("weight", "bias"))
    for layer, *own in zip(layers, weight.chunk(3), bias.chunk(3)):
        layer.weight.data, layer.bias.data = own
    return torch.cat(kv, dim=-1), weight, bias                                           # (B, N, 2C), (3C, C), (3C,)


def attend(block: AttentionBlock, x: Tensor, kv: tuple) -> Tensor:
    """Computes what block.attend computes, for x (B,H,W,C). kv: the result of the function text_kv above."""
    if len(kv) == 2:
        return block.attend(x, kv)
    text, weight, bias = kv
    tokens = layer_norm(x, weight.dtype).flatten(1, 2)                                   # (B, n, C)
    rows, n, c = tokens.shape
    joint = tokens.new_empty(rows, n + text.shape[1], 3 * c)                             # (B, n + N, 3C)
    torch.baddbmm(bias, tokens, weight.T.expand(rows, -1, -1), out=joint[:, :n])
    joint[:, n:, c:] = text
    q, k, v = (y.unflatten(-1, (block.heads, -1)).transpose(1, 2) for y in joint.chunk(3, dim=-1))
    h = F.scaled_dot_product_attention(q[:, :, :n], k, v)                                # (B, heads, n, C / heads)
    return x + block.out(h.transpose(1, 2).flatten(2)).view_as(x)                        # (B, H, W, C)


def all_mappers(network: nn.Module, blocks: list[TimestepBlock], lean: bool, levels: Tensor | None) -> tuple | None:
    """Joins the layers `mapper` of all blocks. Returns a function from t (B,) to all scales and shifts, and the widths
    of the blocks; None if not lean or a layer is not a Linear. levels: falling t to compute in advance, or None."""
    layers = [block.mapper for block in blocks]
    if not lean or any(type(layer) is not nn.Linear for layer in layers):
        return None
    weight, bias = (torch.cat([half for i in (0, 1) for layer in layers
                               for half in getattr(layer, name).chunk(2)[i:i + 1]]) for name in ("weight", "bias"))

    def joint(t: Tensor) -> Tensor:
        return F.linear(timestep_embedding(t, network.c_timestep).to(weight.dtype), weight, bias)
    widths, rising = [layer.out_features // 2 for layer in layers], None if levels is None else levels.flip(0)
    table = None if levels is None else joint(rising)                                    # (levels, all scales + shifts)
    return joint if levels is None else lambda t: table[torch.searchsorted(rising, t)], widths


def all_scales(network: nn.Module, blocks: list[TimestepBlock], mappers: tuple | None, t: Tensor, dtype) -> list:
    """Returns one function per block: from x (B,H,W,C) to block(x, embedding of t). mappers: see all_mappers."""
    if mappers is None:
        t_embedding = timestep_embedding(t, network.c_timestep).to(dtype)                # (B, c_timestep)
        return [functools.partial(block, t_embedding=t_embedding) for block in blocks]
    joint, widths = mappers
    scales, shifts = joint(t)[:, None, None].chunk(2, dim=-1)
    pairs = zip((scales + 1).split(widths, dim=-1), shifts.split(widths, dim=-1))        # 2 x (B, 1, 1, C_i) each
    return [lambda x, scale=scale, shift=shift: torch.addcmul(shift, x, scale) for scale, shift in pairs]


def timestep_blocks(network: nn.Module) -> list[TimestepBlock]:
    """Returns the TimestepBlocks of a Stage B, in the order in which they run."""
    levels = (*network.down_blocks, *reversed(network.up_blocks))
    return [block for level in levels for block in level if isinstance(block, TimestepBlock)]


def can_split(layer: nn.Module) -> bool:
    """Returns whether `part` works for a layer. Others, such as LoRALayers, need the whole input at once."""
    return type(layer) in (nn.Linear, Int8Linear)


def part(layer: nn.Linear | Int8Linear, x: Tensor, start: int = 0) -> Tensor:
    """Returns what a slice x (...,C') of inputs adds to layer(inputs). start: its first index; if 0, adds the bias."""
    if isinstance(layer, Int8Linear):
        return layer.part(x, start)
    return F.linear(x, layer.weight[:, start:start + x.shape[-1]], None if start else layer.bias)


def res_block(block: ResBlock, x: Tensor, skip: Tensor | None = None, condition: Tensor | None = None,
              share: Tensor | None = None) -> Tensor:
    """Computes block(x, skip, condition) for x (B,H,W,C). skip: the skip connection. condition: the semantic latents.
    share (B,H,W,4C): the result of `part` for them, if computed before; condition is then None. Each may be None."""
    extras = [extra for extra in (skip, condition) if extra is not None]
    mixed = x
    if block.depthwise.in_channels > x.shape[-1]:          # v1's SkipResBlock: the skip connection is convolved too
        mixed, extras = torch.cat([x, skip], dim=-1), []                                 # (B, H, W, 2C)
    h = channels_last(block.depthwise(channels_first(mixed)))                            # (B, H, W, C)
    h = layer_norm(h, block.grn.gamma.dtype)
    extras = [narrow(extra, h.dtype) for extra in extras]
    if share is None and not (extras and can_split(block.expand)):
        h = block.expand(torch.cat([h, *extras], dim=-1) if extras else h)               # (B, H, W, 4C)
    else:
        start, h = h.shape[-1], part(block.expand, h)                                    # (B, H, W, 4C)
        for extra in extras:
            h += part(block.expand, extra, start)
            start += extra.shape[-1]
        if share is not None:
            h += share
    h = F.dropout(gelu_grn(block.grn, h), block.dropout, block.training)                 # (B, H, W, 4C)
    return x + block.contract(h)                                                         # (B, H, W, C)


# ----- one sampling ----------------------------------------------------------------------------------

def bind(network: nn.Module, step: Callable, prepare: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns forward(x_t, t) = step(network, x_t, t, prepare(size)), where size is (h,w) of x_t.
    prepare is called only at the first step, and after a change of the size or of the network's LoRAs. If step has an
    attribute `fixed`, see at_fixed, all samplings share tensors, so prepare is also called after another sampling."""
    parents = [module for module in network.modules() if module._modules]
    before, prepared, token, fixed = None, None, object(), getattr(step, "fixed", None)

    def state() -> tuple[list, list]:          # runs at each step in 0.1 ms; module.children() would take 2 ms
        layers = [layer for parent in parents for layer in parent._modules.values()]
        loras = [lora for layer in layers if isinstance(layer, LoRALayer) for lora in layer.adapters.values()]
        return layers, [(lora, lora.scale, lora.enabled, lora.merged) for lora in loras]

    @torch.no_grad()
    def forward(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal before, prepared
        now = (x_t.shape[-2:], state())
        if now != before or fixed and step.user is not token:     # user: the sampling that wrote `fixed` last
            before, prepared = now, prepare(x_t.shape[-2:])
            if fixed is not None:
                prepared, step.user = at_fixed(fixed, prepared), token
        return step(network, x_t, t.contiguous(), prepared)   # for a t with stride 0, torch.compile would compile again
    return forward


def at_fixed(fixed: dict, prepared: tuple) -> tuple:
    """Copies tensors to fixed addresses, those of an earlier sampling with the same shapes, if any; returns `prepared`.

    A CUDA graph reads its inputs from the addresses at which it was recorded. torch would copy tensors from other
    addresses at every step (0.7 GB for Stage B in float32 at 1024 px); this function copies once per sampling. fixed:
    {shapes: tensors} for the last two sets of shapes, such as with and without guidance. Not yet tried on a GPU."""
    tensors = [x for x in tree_iter(prepared) if isinstance(x, Tensor)]
    key = tuple(x.shape for x in tensors)
    fixed[key] = fixed.pop(key, tensors)                     # keys are in the order of their last use
    for x, new in zip(fixed[key], tensors):
        torch._dynamo.mark_static_address(x.copy_(new), guard=False)
    for old in [*fixed][:-2]:
        del fixed[old]
    kept = iter(fixed[key])
    return tree_map_only(Tensor, lambda _: next(kept), prepared)


# ----- Stage C ---------------------------------------------------------------------------------------

def bind_c(network: StageC, text: Tensor, step: Callable | None = None,
           levels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns forward(x_t, t) = network(x_t, t, text) for one sampling. text (B,N,c_cond). step: a compiled step_c.
    levels: None, or the sampling's falling noise levels, to compute results in advance. Each t must be one of them."""
    def prepare(size: tuple[int, int]) -> tuple[list[tuple], tuple | None]:
        embedded = network.embed_text(text)                                              # (B, N, C)
        return ([text_kv(block, embedded, lean) for block in network.attention_blocks],
                all_mappers(network, network.timestep_blocks, lean, levels))
    lean = step in (None, step_c) and few_launches(text.device)         # if compiled, torch joins kernels itself
    return bind(network, step or step_c, prepare)


def step_c(network: StageC, x_t: Tensor, t: Tensor, prepared: tuple[list[tuple], tuple | None]) -> Tensor:
    """Computes StageC.forward. prepared: (list of text_kv's result for each attention block, result of all_mappers)."""
    dtype = next(network.parameters()).dtype
    x = widen(network.embed(channels_last(x_t).to(dtype)))                               # (B, h, w, C)
    kvs, mappers = prepared
    timesteps = all_scales(network, network.timestep_blocks, mappers, t, dtype)
    for res, timestep, attention, kv in zip(network.res_blocks, timesteps, network.attention_blocks, kvs):
        x = attend(attention, timestep(res_block(res, x)), kv)                           # (B, h, w, C)
    a, b = channels_first(network.head(layer_norm(x, dtype))).to(x_t.dtype).chunk(2, dim=1)        # 2 x (B, 16, h, w)
    return (x_t - a) / ((1 - b).abs() + 1e-5)                                            # (B, 16, h, w)


# ----- Stage B, of v2 and of v1 ----------------------------------------------------------------------

def bind_b(network: StageB, semantic: Tensor, text: Tensor, step: Callable | None = None,
           keep_shares: bool = True, levels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns forward(x_t, t) = network(x_t, t, semantic, text). semantic (B,16,h',w'), text (B,N,c_text). step: a
    compiled step_b. levels: see bind_c.

    keep_shares: whether to keep the products of the semantic latents (0.7 GB in float32 at 1024 px) for all steps.
    """
    def prepare(size: tuple[int, int]) -> tuple[list[tuple], tuple | None]:
        embedded = layer_norm(network.embed_text(text))                                  # (B, N, c_cond)
        parts = [*enumerate(zip(network.down_blocks, network.semantic_down))]
        parts += reversed([*enumerate(zip(network.up_blocks, network.semantic_up))])
        prepared = []
        for i, (blocks, mapper) in parts:
            sides = tuple(side // network.patch_size // 2 ** i for side in size)
            condition = None if mapper is None else mapper(resize_semantic(semantic, sides))       # (B, H, W, c_cond)
            for block in blocks:
                if isinstance(block, AttentionBlock):
                    prepared.append(text_kv(block, embedded, lean))
                elif isinstance(block, ResBlock):
                    expand, share = block.expand, None
                    if condition is not None and keep_shares and can_split(expand):
                        share = part(expand, condition, expand.in_features - condition.shape[-1])  # (B, H, W, 4C)
                    prepared.append((condition if share is None else None, share))
        return prepared, all_mappers(network, timestep_blocks(network), lean, levels)
    lean = step in (None, step_b) and few_launches(text.device)
    return bind(network, step or step_b, prepare)


def step_b(network: StageB, x_t: Tensor, t: Tensor, prepared: tuple) -> Tensor:
    """Computes StageB.forward. prepared: a list with one entry for each attention block and ResBlock, in the order in
    which they run, and all_mappers' result; see bind_b."""
    dtype = next(network.parameters()).dtype
    x = network.embed(channels_last(F.pixel_unshuffle(x_t.to(dtype), network.patch_size)))         # (B, h/2, w/2, C0)
    x = u_net(network, layer_norm(x), t, prepared)                                       # (B, h/2, w/2, C0)
    x = channels_first(network.head(x)).to(x_t.dtype)                                    # (B, 32, h/2, w/2)
    a, b = F.pixel_shuffle(x, network.patch_size).chunk(2, dim=1)
    return (x_t - a) / (b.sigmoid() * (1 - 2e-3) + 1e-3)                                 # (B, 4, h, w)


def bind_b_v1(network: nn.Module, semantic: Tensor, text: Tensor,
              step: Callable | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns forward(tokens, t) = network(tokens, t, semantic, text), logits of v1's Stage B. step: see bind_b."""
    def prepare(size: tuple[int, int]) -> tuple[list[tuple], tuple | None]:
        sequence = network.condition(semantic, text)                                     # (B, h'*w' + N, c_cond)
        blocks = (block for level in (*network.down_blocks, *reversed(network.up_blocks)) for block in level)
        return ([text_kv(block, sequence, lean) if isinstance(block, AttentionBlock) else () for block in blocks
                 if not isinstance(block, TimestepBlock)], all_mappers(network, timestep_blocks(network), lean, None))
    lean = step in (None, step_b_v1) and few_launches(text.device)
    return bind(network, step or step_b_v1, prepare)


def step_b_v1(network: nn.Module, tokens: Tensor, t: Tensor, prepared: tuple) -> Tensor:
    """Computes StageBV1.forward, the logits (B,8192,h,w) of tokens (B,h,w). prepared: see step_b."""
    x = channels_first(layer_norm(network.embed_token(tokens)))                          # (B, c_token, h, w)
    x = layer_norm(network.embed(channels_last(F.pixel_unshuffle(x, network.patch_size))))
    x = u_net(network, x, t, prepared)                                                   # (B, h/2, w/2, C0)
    x = F.pixel_shuffle(channels_first(network.head(x)), network.patch_size)             # (B, c_token, h, w)
    return channels_first(network.classify(layer_norm(channels_last(x))))                # (B, 8192, h, w)


def u_net(network: nn.Module, x: Tensor, t: Tensor, prepared: tuple) -> Tensor:
    """Runs the U-Net of Stage B, v2's or v1's: down through all levels, up again, and the norm before the head. Returns
    (B,h/2,w/2,C0), the shape of x. prepared: see step_b."""
    inputs, dtype, x = iter(prepared[0]), x.dtype, widen(x)
    timesteps = iter(all_scales(network, timestep_blocks(network), prepared[1], t, dtype))

    def run_level(blocks: nn.ModuleList, x: Tensor, skip: Tensor | None = None) -> Tensor:
        for k, block in enumerate(blocks):
            if isinstance(block, TimestepBlock):
                x = next(timesteps)(x)
            elif isinstance(block, AttentionBlock):
                x = attend(block, x, next(inputs))
            else:
                x = res_block(block, x, skip if k == 0 else None, *next(inputs))
        return x                                                                         # (B, H, W, C_i)

    skips, depth = [], len(network.down_blocks)
    for i in range(depth):
        if i > 0:
            x = widen(channels_last(network.downsample[i](channels_first(layer_norm(x, dtype)))))
        x = run_level(network.down_blocks[i], x)
        skips.append(x)
    skips[-1] = None
    for i in reversed(range(depth)):
        x = run_level(network.up_blocks[i], x, skips[i])
        if i > 0:
            x = widen(channels_last(network.upsample[i](channels_first(layer_norm(x, dtype)))))
    return layer_norm(x, dtype)


# ----- Stage A ---------------------------------------------------------------------------------------

@torch.no_grad()
def decode(stage_a: StageA, latents: Tensor) -> Tensor:
    """Computes stage_a.decode(latents). On a CPU, blocks with large inputs are computed in bands of rows, which
    is 8 % faster at the official size."""
    wrong = latents.shape[1] != stage_a.config["c_latent"]              # in this case, stage_a.decode raises an error
    if wrong or latents.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return stage_a.decode(latents)
    x = stage_a.from_latent(channels_last(latents * stage_a.scale_factor))               # (B, h, w, C)
    for layer in stage_a.decoder:
        large = isinstance(layer, VQResBlock) and x.numel() > 2 ** 19   # a smaller x fits the CPU's cache without bands
        x = in_bands(layer, x) if large else run(layer, x)
    return F.pixel_shuffle(channels_first(stage_a.to_pixels(x)), 2)                      # (B, 3, H, W)


def in_bands(block: VQResBlock, x: Tensor) -> Tensor:
    """Computes block(x) for x (B,H,W,C) in bands of rows, each of about 2^20 numbers, and the block's MLP for 512
    positions at a time. So intermediate results fit the cache, and memory is allocated only once, which saves time."""
    height, n = x.shape[1], max(1, 2 ** 20 // x[0, 0].numel())
    y, wide = torch.empty(x.shape, dtype=x.dtype), x.new_empty(512, block.expand.out_features)
    scale, shift, gate = block.gammas[3:]
    for image, result in zip(x, y):
        for top in range(0, height, n):
            # The convolution needs one more row above and below the band. At the border of the image, the first or last
            # row is repeated, which is also how the convolution pads.
            rows = torch.arange(top - 1, min(top + n, height) + 1).clamp(0, height - 1)
            band = block.mix(image[rows][None])[0, 1:-1].flatten(0, 1)                   # (n * W, C)
            for positions, out in zip(band.split(512), result[top:top + n].flatten(0, 1).split(512)):
                h = wide[:len(positions)]                                                # (512, 4C)
                torch.addmm(block.expand.bias, block.norm(positions, scale, shift), block.expand.weight.T, out=h)
                torch.addcmul(positions, block.contract(F.gelu(h, out=h)), gate, out=out)
    return y


# ----- the whole pipeline ----------------------------------------------------------------------------

def accelerate(model, compile: bool = False, keep_shares: bool = True, offload: bool = False) -> None:
    """Replaces methods of a Wuerstchen by the fast forms in this file: bind_c, bind_b, decode_one and sample.

    The networks are looked up when a sampling begins, because with low_memory they are loaded again. compile: use
    torch.compile for the steps of Stages B and C; the first step then takes a minute, later prompts take no extra time.
    keep_shares: see bind_b. offload: avoid CUDA graphs, because they store addresses of weights, and weights move.
    """
    steps = dict(c=step_c, b=step_b, b_v1=step_b_v1)
    if compile:
        # On a GPU, "reduce-overhead" records a whole step as a CUDA graph. fullgraph is not used, because torch keeps
        # only a few compiled variants (sizes, LoRA scales). More variants run slowly; with fullgraph, they would fail.
        mode = "reduce-overhead" if model.device.type == "cuda" and not offload else None
        steps = {name: torch.compile(step, mode=mode) for name, step in steps.items()}
        for step in steps.values() if mode else ():
            step.fixed = {}

    def bind_b_of_model(semantic: Tensor, text: Tensor, levels=None) -> Callable[[Tensor, Tensor], Tensor]:
        network = model.part("stage_b")
        if type(network).__name__ == "StageBV1":           # StageBV1 is not imported here, because v1/ imports speed/
            return bind_b_v1(network, semantic, text, steps["b_v1"])
        return bind_b(network, semantic, text, steps["b"], keep_shares, levels)

    def decode_one(latents: Tensor) -> Tensor:
        stage_a = model.part("stage_a")
        return decode(stage_a, latents.to(next(stage_a.parameters()).dtype))

    def sample(stage: str, bind: Callable, conditions: list, draw: Callable, sampling, **options) -> Tensor:
        bind = functools.partial(bind, levels=sampling.levels.to(model.device))
        return plain(stage, bind, conditions, draw, sampling, **options)
    plain, model.sample = model.sample, sample
    model.bind_c = lambda text, levels=None: bind_c(model.part("stage_c"), text, steps["c"], levels)
    model.bind_b, model.decode_one = bind_b_of_model, decode_one
