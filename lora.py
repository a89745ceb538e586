"""LoRA: fine-tunes a large model by training a small addition to some of its layers, which themselves stay as they are.

  W' = W + (alpha / rank) * up @ down          W (out, in) frozen; down (rank, in) and up (out, rank) are trained

Fine-tuning adds some D (out, in) to a layer's weight W. A gradient step adds outer products g x^T of a gradient at the
output and an input; similar pictures give similar ones, so D is close to a matrix of low rank. Hence it is written as
one: rank * (in + out) numbers instead of in * out, for Stage C's 1536 x 1536 at rank 8 one percent, and as little for
the gradients and the optimizer's two averages.
With y = W x + s up h and h = down x, the gradient of up is s g h^T, that of down s (up^T g) x^T. Were both 0 at the
start, both gradients would be 0 for ever. So up = 0 and down is random: training starts exactly at the base model, up
moves in step 1 and down from step 2 on. s = alpha / rank keeps a learning rate useful when the rank is changed; here
alpha = rank, s = 1, unless you say otherwise. Source: Hu et al., arXiv:2106.09685, sec. 4.1.
Two refinements. rsLoRA (arXiv:2312.03732): s = alpha / sqrt(rank), which keeps high ranks learning; that is nothing but
another alpha, alpha * sqrt(rank), and is stored as that. DoRA (arXiv:2402.09353): see Adapter.
The first half of this file is LoRA; the second, from "names in files" on, is what makes its files fit everywhere.

  names = add_lora(model, rank=8, targets="attention")         # wraps 128 layers of Stage C, freezes all else
  optimizer = torch.optim.AdamW(lora_parameters(model), ...)   # float32, whatever the model is in; no weight decay
  save_lora(model, "style.safetensors")                        # a file that diffusers loads, too
  load_lora(model, "other.safetensors", "other", scale=0.8)    # several at once, each under its name
  merge(model); unmerge(model); remove(model)                  # into the weights; back, to the bit; gone

A layer is replaced by a LoRALayer, in plain sight in print(model), whose forward is the formula. (Hooks would hide it;
a parametrization would build W' in every pass and have no place for dropout.) The price: "query.weight" is called
"query.base.weight" meanwhile; base_state_dict(model) has the old names, remove(model) brings back the old layers.
Works on any tree of modules: only the names in files are about Stage C. Linear and Conv2d can have a LoRA; grouped
convolutions cannot, for down and up would mix what the groups keep apart, and no merge could represent that.

  python lora.py info FILE                                     # ranks, alphas, layers, and what the trainer wrote
  python lora.py convert IN OUT --to kohya                     # or diffusers, comfy, original, ours
  python lora.py merge PRIOR LORA OUT --scale 0.8              # a prior for any program, without LoRA
  python lora.py extract BASE TUNED OUT --rank 16              # the LoRA closest to a full fine-tuning

Needs: torch; safetensors for files, numpy for base_hash. Works when copied alone; merge and extract need weights.py.
"""
import json
import math
import os
import re
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# What `targets` may be besides a regular expression. Layers are found by re.search on their names.
PRESETS = {
    "attention":     r"(^|\.)(query|key|value|out)$",                        # Stage C: 4 layers in each of 32 blocks
    "attention+mlp": r"(^|\.)(query|key|value|out|text_mapper|expand|contract)$",
    "all":           r"",                                                    # every Linear, every ungrouped Conv2d
}


# ----- the layers ------------------------------------------------------------------------------------

class Part(NamedTuple):
    """The LoRA of one layer as tensors. For a convolution, down is (rank, in, k, k) and up (out, rank, 1, 1)."""
    down: Tensor                       # (rank, in)
    up: Tensor                         # (out, rank)
    alpha: float
    magnitude: Tensor | None = None    # (out,), DoRA alone


def row_norms(weight: Tensor) -> Tensor:
    """Length of each output's row: (out, in, ...) -> (out,)."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


class Adapter(nn.Module):
    """One LoRA of one layer. Its parameters are float32 in any model: small steps would be rounded away in bfloat16.

    DoRA writes W' = m V / |V|, V = W + s up @ down, |V| (out,) the lengths of V's rows, and trains m (out,), too. |V|
    counts as constant in the gradient, which saves memory and changes little (arXiv:2402.09353, sec. 4.3).
    `scale` is for the user: y = base + scale * (what this LoRA changes), so that 0 is off, for DoRA as well.
    """
    def __init__(self, part: Part, device: torch.device, dropout: float = 0.0):
        super().__init__()
        self.rank, self.alpha, self.dropout = len(part.down), part.alpha, dropout
        self.scale, self.enabled, self.merged = 1.0, True, False
        for name in ("down", "up", "magnitude"):
            tensor = getattr(part, name)
            self.register_parameter(name, None if tensor is None else
                                    nn.Parameter(tensor.detach().to(device, torch.float32, copy=True)))

    def product(self, weight: Tensor) -> Tensor:
        """s up @ down in the shape of `weight`; in float32 under autocast, too."""
        with torch.autocast(weight.device.type, enabled=False):
            return (self.up.flatten(1) @ self.down.flatten(1)).view(weight.shape) * (self.alpha / self.rank)

    def gain(self, weight: Tensor) -> Tensor:
        """DoRA's m / |V|: (out,), or (out, 1, 1) for a convolution."""
        with torch.no_grad():
            norms = row_norms(weight.float() + self.product(weight))                     # (out,)
        return (self.magnitude / norms).view(-1, *(1,) * (weight.ndim - 2))

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W in float32, in the shape of `weight`."""
        if self.magnitude is None:
            return self.product(weight)
        return self.gain(weight).unsqueeze(1) * (weight.float() + self.product(weight)) - weight.float()


class LoRALayer(nn.Module):
    """A frozen Linear or Conv2d and its LoRAs: y = base(x) + sum_i scale_i (alpha_i / rank_i) up_i(down_i(dropout(x))).

    Shapes are those of the base: (..., in) -> (..., out), or (B, in, H, W) -> (B, out, H', W').
    """
    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.original = None           # the base's weight while LoRAs are merged into it; no buffer, for no file has it

    def forward(self, x: Tensor) -> Tensor:
        base = y = self.base(x)                                                          # (..., out)
        for adapter in self.adapters.values():
            if adapter.enabled and not adapter.merged:
                y = self.plus(adapter, y, x, base)                                       # (..., out)
        return y

    def plus(self, adapter: Adapter, total: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """total + what one LoRA adds to base = self.base(x). In x's dtype, as the base is; only the parameters are float32."""
        if self.training and adapter.dropout:
            x = F.dropout(x, adapter.dropout)
        down, up = adapter.down.to(x.dtype), adapter.up.to(x.dtype)
        s = adapter.scale * adapter.alpha / adapter.rank
        if isinstance(self.base, nn.Linear):
            h = F.linear(x, down)                                                        # (..., rank)
            if adapter.magnitude is None:      # product and sum in one: on large layers reading and writing is what costs
                return torch.addmm(total.flatten(end_dim=-2), h.flatten(end_dim=-2), up.T, alpha=s).view_as(total)
            y = F.linear(h * s, up)                                                      # (..., out)
        else:   # `down` sees what the base sees, `up` mixes channels: together one convolution with up @ down
            h = F.conv2d(x, down, None, self.base.stride, self.base.padding, self.base.dilation)     # (B, rank, H', W')
            y = F.conv2d(h * s, up)                                                      # (B, out, H', W')
        if adapter.magnitude is None:
            return total + y
        # DoRA: g V x - W x = (g - 1) W x + g s up down x, with g = m / |V|; W x is the base's output without its bias.
        g = adapter.gain(self.base.weight)                                               # (out,) or (out, 1, 1)
        if self.base.bias is not None:
            base = base - self.base.bias.to(base.dtype).view(g.shape)
        return total + (adapter.scale * (g - 1)).to(y.dtype) * base + g.to(y.dtype) * y


# ----- finding layers, adding LoRAs ------------------------------------------------------------------

def find_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """-> ({name: Linear or Conv2d that can have a LoRA}, {name: why this one cannot}); names as they are without LoRA."""
    fit, unfit = {}, {}
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        name = path.removesuffix(".base") if isinstance(parent, LoRALayer) else path
        if not name or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if getattr(module, "groups", 1) > 1:
            unfit[name] = f"is a convolution in {module.groups} groups, which a LoRA would mix"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            unfit[name] = f"is a convolution with padding_mode {module.padding_mode!r}, of which only 'zeros' is supported"
        elif isinstance(parent, nn.MultiheadAttention):
            unfit[name] = "belongs to an nn.MultiheadAttention, which reads its weight and never calls it"
        else:
            fit[name] = module
    return fit, unfit


def condense(names) -> str:
    """Many names in one line: "attention_blocks.N.query x32, ..."."""
    counts = Counter(re.sub(r"\d+", "N", name) for name in names)
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items())


def find_targets(model: nn.Module, targets: str) -> list[str]:
    """Names of the layers that a preset or a regular expression means. Raises ValueError if there are none."""
    fit, unfit = find_layers(model)
    try:
        pattern = re.compile(PRESETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets {targets!r} is neither {', '.join(PRESETS)} nor a regular expression: {error}") from error
    names = [name for name in fit if pattern.search(name)]
    if not names:
        refused = "".join(f"; {name} {reason}" for name, reason in unfit.items() if pattern.search(name))
        raise ValueError(f"targets {targets!r} match no layer that can have a LoRA{refused[:200]}. There are: {condense(fit)}")
    return names


def attach(model: nn.Module, name: str, adapter_name: str, adapter: Adapter) -> None:
    """Hangs an adapter on the layer called `name`, which is wrapped if it is not yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALayer):
        layer = LoRALayer(layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    layer.adapters[adapter_name] = adapter
    layer.train(layer.base.training)                     # new modules start in training mode, their model may not be


def check_name(model: nn.Module, name: str) -> None:
    """Raises ValueError if no LoRA of this name can be added now."""
    refuse_merged(model)
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot name a LoRA: use letters, digits, _ and -, and no attribute of nn.ModuleDict")


def add_lora(model: nn.Module, rank: int = 8, alpha: float | None = None, dropout: float = 0.0, targets: str = "attention",
             name: str = "default", rslora: bool = False, dora: bool = False) -> list[str]:
    """Gives layers of `model` a LoRA to train, freezes everything else, and returns the layers' names: show them.

    rank: 4 to 16 for a style or an object; alpha: strength, `rank` if not given; dropout: share of a layer's inputs
    dropped in front of down, in training; targets: a preset or a regular expression; rslora, dora: see the top.
    Grouped convolutions are left out. Raises ValueError if nothing else matches, and for impossible settings.
    """
    alpha = float(rank if alpha is None else alpha)
    if int(rank) != rank or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank}, alpha {alpha}, dropout {dropout}: expected rank 1, 2, ..., alpha > 0, dropout in [0, 1)")
    check_name(model, name)
    taken = [path for path, layer in wrapped(model) if name in layer.adapters]
    if taken:
        raise ValueError(f"there is a LoRA {name!r} already, on {condense(taken)}: choose another name, or remove it first")
    layers, names = find_layers(model)[0], find_targets(model, targets)
    for path in names:
        weight = layers[path].weight.detach()                                            # (out, in) or (out, in, k, k)
        # Kaiming's rule as nn.Linear has it: uniform in +-1/sqrt(inputs). Drawn on the CPU: the same on every device.
        down = torch.empty(int(rank), *weight.shape[1:], device="cpu", dtype=torch.float32)
        down.uniform_(-1, 1).div_(math.sqrt(weight[0].numel()))
        up = torch.zeros(len(weight), int(rank), *(1,) * (weight.ndim - 2), device="cpu")
        part = Part(down, up, alpha * math.sqrt(rank) if rslora else alpha, row_norms(weight.float()) if dora else None)
        attach(model, path, name, Adapter(part, weight.device, dropout))
    freeze_base(model)
    return names


def freeze_base(model: nn.Module) -> None:
    """requires_grad = False for all but the LoRAs' parameters."""
    trained = {id(parameter) for parameter in lora_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


# ----- using them ------------------------------------------------------------------------------------

def wrapped(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """(name, layer) of every wrapped layer, in the model's order."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALayer)]


def adapters(model: nn.Module, name: str | None = None) -> list[tuple[str, Adapter]]:
    """(layer's name, adapter) of the LoRA called `name`, or of all. Raises ValueError if there is none."""
    every = [(path, key, adapter) for path, layer in wrapped(model) for key, adapter in layer.adapters.items()]
    if not any(name in (None, key) for _, key, _ in every):
        there = sorted({key for _, key, _ in every})
        raise ValueError(f"the model has no LoRA called {name!r}, only {', '.join(there)}" if there else
                         "the model has no LoRA: use add_lora or load_lora first")
    return [(path, adapter) for path, key, adapter in every if name in (None, key)]


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one LoRA, or of all: what the optimizer gets."""
    return [parameter for _, adapter in adapters(model, name) for parameter in adapter.parameters()]


def parts_of(model: nn.Module, name: str) -> dict[str, Part]:
    return {path: Part(a.down, a.up, a.alpha, a.magnitude) for path, a in adapters(model, name)}


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Copies of one LoRA's tensors in our own names, for a checkpoint: {layer}.lora_down.weight, ...; load_lora reads it."""
    return to_tensors(parts_of(model, name), {}, "ours")


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict() without LoRAs, in the names it has without them; what is merged is in the weights."""
    layers = [path + "." for path, _ in wrapped(model)]
    result = {}
    for name, tensor in model.state_dict().items():
        layer = next((layer for layer in layers if name.startswith(layer)), "")
        if not layer or name.startswith(layer + "base."):
            result[layer + name.removeprefix(layer and layer + "base.")] = tensor
    return result


def base_hash(model: nn.Module) -> str:
    """sha256 of the model without LoRA, in float32: the same for float16 weights and for a float32 copy of them."""
    import hashlib
    refuse_merged(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state_dict(model).items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def refuse_merged(model: nn.Module) -> None:
    """Raises ValueError while LoRAs are merged: a change would have no effect, as they are in the weights already."""
    if any(layer.original is not None for _, layer in wrapped(model)):
        raise ValueError("a LoRA is merged into the weights: call unmerge(model) first, change it, and merge again")


def set_scale(model: nn.Module, scale: float, name: str | None = None) -> None:
    """How strongly one LoRA, or each, counts: 1 as trained, 0 not at all."""
    refuse_merged(model)
    for _, adapter in adapters(model, name):
        adapter.scale = float(scale)


def enable(model: nn.Module, name: str | None = None, on: bool = True) -> None:
    """Switches one LoRA, or all, on or off: without any, the model is the base model, bit for bit."""
    refuse_merged(model)
    for _, adapter in adapters(model, name):
        adapter.enabled = on


def disable(model: nn.Module, name: str | None = None) -> None:
    """enable(model, name, on=False)."""
    enable(model, name, on=False)


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None) -> None:
    """Adds one LoRA, or all that are on, at their scales to the weights: from then on they cost no time.

    Summed in float32, rounded once. Subtracting again would not give the old bits, so the old weights are kept, in CPU
    memory: as much as the wrapped layers weigh, 0.6 GB for Stage C's attention in float16. Raises ValueError.
    """
    waiting = [adapter for _, adapter in adapters(model) if adapter.enabled and not adapter.merged]
    chosen = {id(adapter) for _, adapter in adapters(model, name)} & {id(adapter) for adapter in waiting}
    if not chosen:
        raise ValueError("there is nothing to merge: the LoRA is merged already, or switched off")
    if any(adapter.magnitude is not None and id(adapter) not in chosen for adapter in waiting):
        raise ValueError("a DoRA is defined on the unmerged weights: merge it together with the others, or disable it")
    for _, layer in wrapped(model):
        here = [adapter for adapter in layer.adapters.values() if adapter.merged or id(adapter) in chosen]
        if here:
            weight = layer.base.weight
            layer.original = weight.detach().to("cpu", copy=True) if layer.original is None else layer.original
            original = layer.original.to(weight.device)                                  # (out, in, ...)
            weight.copy_(original.float() + sum(adapter.scale * adapter.delta(original) for adapter in here))
        for adapter in here:
            adapter.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Undoes every merge: the weights have their old bits again, and the LoRAs are computed beside them as before."""
    for _, layer in wrapped(model):
        if layer.original is not None:
            layer.base.weight.copy_(layer.original)
        layer.original = None
        for adapter in layer.adapters.values():
            adapter.merged = False


def remove(model: nn.Module, name: str | None = None) -> None:
    """Takes one LoRA, or all, off the model, after undoing every merge. A layer without any is the plain one again.

    The weights stay frozen: call model.requires_grad_() to train them.
    """
    adapters(model, name)                                # raises ValueError if there is none
    unmerge(model)
    for path, layer in wrapped(model):
        for key in [key for key in layer.adapters if name in (None, key)]:
            del layer.adapters[key]
        if not layer.adapters:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)


def bake(model: nn.Module) -> None:
    """Merges all LoRAs for good: a model of plain layers, without the way back that merge keeps, and without its memory."""
    merge(model)
    for _, layer in wrapped(model):
        layer.original = None
    remove(model)


# ----- names in files --------------------------------------------------------------------------------
# All programs store the same two matrices, under other names. First the layers of Stage C, ours and diffusers'; i is
# the block, of whose three parts there is one list there. The original's are diffusers', but for the attention: `fuse`.

STAGE_C = {
    "embed":                            "projection",                        # a 1x1 convolution there
    "embed_text.0":                     "cond_mapper.0",
    "embed_text.2":                     "cond_mapper.2",
    "res_blocks.{i}.expand":            "blocks.{res}.channelwise.0",
    "res_blocks.{i}.contract":          "blocks.{res}.channelwise.4",
    "timestep_blocks.{i}.mapper":       "blocks.{time}.mapper",
    "attention_blocks.{i}.text_mapper": "blocks.{att}.kv_mapper.1",
    "attention_blocks.{i}.query":       "blocks.{att}.attention.to_q",
    "attention_blocks.{i}.key":         "blocks.{att}.attention.to_k",
    "attention_blocks.{i}.value":       "blocks.{att}.attention.to_v",
    "attention_blocks.{i}.out":         "blocks.{att}.attention.to_out.0",
    "head":                             "out.1",                             # a 1x1 convolution there
}
CONVOLUTIONS_THERE = ("projection", "out.1")

FORMATS = {     # what is written: the two tensors of a layer, {} its name
    "diffusers": ("prior.{}.lora_A.weight", "prior.{}.lora_B.weight"),       # alpha in the metadata; for the others, {}.alpha
    "kohya":     ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),      # with _ for . in {}
    "comfy":     ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "original":  ("{}.lora_down.weight", "{}.lora_up.weight"),               # query, key and value are one layer, in_proj
    "ours":      ("{}.lora_down.weight", "{}.lora_up.weight"),               # our own names, for checkpoints
}
# What is read: the name of a layer with one of these in front and one of those behind.
PREFIXES = ("prior.", "diffusion_model.", "lora_unet_", "lora_prior_unet_", "lora_prior_unet.", "unet.", "base_model.model.", "")
ENDINGS = {
    "down":      (".lora_A.weight", ".lora_down.weight", "_lora.down.weight", ".lora.down.weight"),
    "up":        (".lora_B.weight", ".lora_up.weight", "_lora.up.weight", ".lora.up.weight"),
    "alpha":     (".alpha",),
    "magnitude": (".lora_magnitude_vector.weight", ".lora_magnitude_vector"),
}
FOREIGN = {     # what a file is that is not read: the first of these found among the names that are not known
    r"\A(?!.*(lora|lycoris|hada_|lokr_|bundle_emb))": "no LoRA, presumably a whole model",
    r"hada_|lokr_|oft_|glora": "another method than LoRA (LoHa, LoKr, OFT, ...)",
    r"dora_scale": "a DoRA in LyCORIS' form, which does not say whether its scale is per input or per output",
    r"^(lora_te|lora_prior_te|text_encoder)": "a LoRA that also changes a text encoder",
    r"^(bundle_emb|embeddings\.)": "a LoRA with learned words, for which no model here has a place",
    r"^weights\.\d": "a LoRA of Stable Cascade's trainer, which numbers the layers and does not name them",
    r"double_blocks|single_transformer_blocks|joint_blocks": "a LoRA for Flux or Stable Diffusion 3",
    r"transformer_blocks|attentions_\d|attn1|input_blocks": "a LoRA for Stable Diffusion",
    r"down_blocks|up_blocks": "a LoRA for Stable Cascade (Würstchen v3) or for Stage B",
    r"depthwise": "a LoRA that was also trained on grouped convolutions, which nothing can apply as it was trained",
    r"": "a LoRA for another model",
}


def their_name(ours: str) -> str:
    """A layer of Stage C -> its name in diffusers; other names stay as they are."""
    number = re.search(r"(?<=_blocks\.)\d+", ours)
    i = int(number[0]) if number else 0
    return STAGE_C.get(ours.replace(f"_blocks.{i}.", "_blocks.{i}."), ours).format(res=3 * i, time=3 * i + 1, att=3 * i + 2)


def their_names(names) -> dict[str, str]:
    """{our name: diffusers' name} of a model's layers. What is not Stage C is stored under its own names."""
    stage_c = any(name.startswith("attention_blocks.") for name in names)
    return {name: their_name(name) if stage_c else name for name in names}


def aliases(theirs: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """{a layer's name in any file, without prefix: (our name,)}; three of ours for the fused query, key and value."""
    lookup = {}
    for name, their in theirs.items():
        block, _, part = their.partition(".attention.")
        same = [name, their]
        if part == "to_out.0":                           # older diffusers, the original
            same += [f"{block}.attention.processor.to_out", f"{block}.attention.to_out", f"{block}.attention.attn.out_proj"]
        elif part in ("to_q", "to_k", "to_v"):           # older diffusers, OneTrainer's thirds of the fused matrix
            third = ("to_q", "to_k", "to_v").index(part)
            same += [f"{block}.attention.processor.{part}", f"{block}.attention.attn.in_proj.{third}"]
        lookup |= {alias: (name,) for alias in same}
        if part == "to_q":
            trio = tuple(name.removesuffix("query") + one for one in ("query", "key", "value"))
            lookup |= {f"{block}.attention.attn.in_proj": trio, f"{block}.attention.attn.in_proj_weight": trio}
    # kohya flattens names, and "a_b" could be a.b or a_b: hence a table of all names there are, and no guessing.
    return {alias.replace(".", "_"): names for alias, names in lookup.items()} | lookup


# ----- reading ---------------------------------------------------------------------------------------

def open_lora(source: str | Path | dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file, a folder as diffusers saves it, or tensors -> (tensors, metadata). Raises ValueError."""
    if isinstance(source, dict):
        return source, {}
    path = Path(source)
    if path.is_dir():
        path = max(path.glob("pytorch_lora_weights.*"), default=path)        # .safetensors rather than .bin
    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:         # each library raises its own kinds
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"it cannot be read, presumably it is cut off or not a file of weights: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("it does not hold a table of tensors, which a LoRA is")
    return tensors, {}


def place(name: str, lookup: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...] | None, str]:
    """A tensor's name in a file -> (our layers, "down", "up", "alpha" or "magnitude"), or (None, "") if it is not known."""
    for role, endings in ENDINGS.items():
        for ending in (ending for ending in endings if name.endswith(ending)):
            for prefix in (prefix for prefix in PREFIXES if name.startswith(prefix)):
                if (layer := name.removesuffix(ending).removeprefix(prefix)) in lookup:
                    return lookup[layer], role
    return None, ""


def alpha_from(config: dict, layer: str, rank: int) -> float:
    """alpha by what diffusers and peft write beside the tensors; the rank if they do not. rsLoRA's: see the top."""
    config = {key.removeprefix("prior."): value for key, value in config.items()}
    patterns = config.get("alpha_pattern") or {}
    alpha = next((alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)),   # as peft does
                 config.get("lora_alpha", rank))
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)


def split(part: Part, n: int) -> list[Part]:
    """A LoRA of n layers whose rows were stacked into one matrix -> n LoRAs: the same down, and each its rows of up.

    Rows of down that only the others use are dropped, so that the block form which `fuse` writes comes back as it was.
    """
    if n == 1:
        return [part]
    result, magnitudes = [], [None] * n if part.magnitude is None else part.magnitude.chunk(n)
    for up, magnitude in zip(part.up.chunk(n), magnitudes):                              # up (out, rank)
        used = up.any(0) if up.any() else torch.ones(up.shape[1], dtype=torch.bool)      # (rank,)
        result.append(Part(part.down[used], up[:, used], part.alpha * int(used.sum()) / len(used), magnitude))
    return result


def listing(piece: dict[str, Tensor]) -> str:
    return ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in piece.items())


def read_layer(piece: dict[str, Tensor], n: int, config: dict, layer: str, shapes: list[tuple] | None) -> list[Part]:
    """One layer in a file -> its n Parts, in the shapes that weights of `shapes` need. Raises ValueError if it does not fit.

    A 1x1 convolution there may be a Linear here, or the other way round: then only ones at the end differ.
    """
    down, up, magnitude = (piece.get(role) for role in ("down", "up", "magnitude"))
    if down is None or up is None or min(down.ndim, up.ndim) < 2 or not up.shape[1] == len(down) > 0 or \
            any(role == "alpha" and tensor.numel() != 1 for role, tensor in piece.items()):
        raise ValueError(f"has {listing(piece)}")
    if not all(tensor.isfinite().all() for tensor in piece.values()):
        raise ValueError("has NaN or infinity")
    alpha = float(piece["alpha"]) if "alpha" in piece else alpha_from(config, layer, len(down))
    parts = split(Part(down, up, alpha or float(len(down)), magnitude), n)
    for i, shape in enumerate(shapes or []):
        down, up, alpha, magnitude = parts[i]
        if down[0].numel() != math.prod(shape[1:]) or up.numel() != shape[0] * len(down) or \
                (magnitude is not None and magnitude.numel() != shape[0]):
            raise ValueError(f"is {shape}, the file has {listing(piece)}")
        parts[i] = Part(down.reshape(len(down), *shape[1:]), up.reshape(shape[0], len(down), *(1,) * (len(shape) - 2)), alpha,
                        None if magnitude is None else magnitude.flatten())
    return parts


def read_lora(source: str | Path | dict[str, Tensor],
              shapes: dict[str, tuple] | None = None) -> tuple[dict[str, Part], dict[str, str]]:
    """A LoRA in any format -> ({our layer's name: Part}, metadata): all of it, or none.

    shapes: {name: weight's shape} of a model's layers, which the parts must fit; without it, any Stage C will do.
    alpha is the layer's own if the file has one, else that of diffusers' metadata, else the rank, as it is for 0.
    Raises ValueError with counts and the first names: loaders that skip what they do not know end up loading nothing.
    """
    try:
        tensors, metadata = open_lora(source)
        config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
        biggest = max(map(int, re.findall(r"\d{1,3}", " ".join(tensors))), default=0)    # as many blocks, mostly too many
        theirs = their_names([ours.format(i=i) for i in range(biggest + 1) for ours in STAGE_C] if shapes is None else shapes)
        layers, parts, misfits = by_layer(tensors, aliases(theirs)), {}, []
        for names, piece in layers.items():
            if parts.keys() & set(names):
                raise ValueError(f"{names[0]} stands in it twice, alone and fused")
            try:
                wanted = None if shapes is None else [shapes[name] for name in names]
                parts |= zip(names, read_layer(piece, len(names), config, theirs[names[0]], wanted))
            except ValueError as error:
                misfits.append(f"{names[0]} {error}")
        if misfits:
            more = "; ..." * (len(misfits) > 3)
            raise ValueError(f"{len(misfits)} of {len(layers)} layers do not fit: {'; '.join(misfits[:3])}{more}")
    except (ValueError, TypeError, AttributeError, re.error) as error:       # the last three: impossible metadata
        raise ValueError(f"{'the LoRA' if isinstance(source, dict) else source}: {error}; nothing was loaded") from error
    return parts, metadata


def by_layer(tensors: dict[str, Tensor], lookup: dict) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Tensors of a file -> {our layers: {"down": tensor, "up": tensor, ...}}. Raises ValueError if one belongs nowhere."""
    unknown, layers = [], {}
    for name, tensor in tensors.items():
        names, role = place(name, lookup)
        if names is None:
            unknown.append(name)
        elif role in layers.setdefault(names, {}):
            raise ValueError(f"{names[0]} stands in it twice, the second time as {name}")
        else:
            layers[names][role] = tensor
    if not tensors:
        raise ValueError("it is empty")
    if unknown:
        text = "\n".join(unknown)
        looks = next(kind for pattern, kind in FOREIGN.items() if re.search(pattern, text, re.DOTALL | re.MULTILINE))
        raise ValueError(f"{len(unknown)} of {len(tensors)} tensors belong to no layer of this model ({', '.join(unknown[:4])}"
                         f"{', ...' * (len(unknown) > 4)}): it looks like {looks}")
    return layers


def load_lora(model: nn.Module, source: str | Path | dict[str, Tensor], name: str = "default", scale: float = 1.0) -> list[str]:
    """Adds the LoRA in a file (or a folder, or a dict of tensors), in any format, to the model; returns its layers' names.

    If the model has a LoRA of this name, that one gets the numbers, for going on with its training; it must have the
    same layers and ranks. Everything but LoRAs is frozen. Raises ValueError, and then the model is as it was.
    """
    check_name(model, name)
    layers, _ = find_layers(model)
    parts, _ = read_lora(source, {path: tuple(layer.weight.shape) for path, layer in layers.items()})
    live = {path: layer.adapters[name] for path, layer in wrapped(model) if name in layer.adapters}
    wanted, found = ({(path, len(a.down), a.magnitude is None) for path, a in which.items()} for which in (live, parts))
    if live and wanted != found:
        raise ValueError(f"the model's LoRA {name!r} has {len(live)} layers of rank {ranks(live)}, the file {len(parts)} of rank "
                         f"{ranks(parts)}, and they are not the same: remove(model, {name!r}) first, or choose another name")
    for path, part in parts.items():
        adapter = Adapter(part, layers[path].weight.device)
        if live:
            live[path].load_state_dict(adapter.state_dict())         # copies: the optimizer holds these very parameters
            live[path].alpha, adapter = adapter.alpha, live[path]
        else:
            attach(model, path, name, adapter)
        adapter.scale = float(scale)
    freeze_base(model)
    return list(parts)


# ----- writing ---------------------------------------------------------------------------------------

def span(numbers) -> str:
    """"8", or "8 to 16" where layers differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def ranks(parts: dict) -> str:
    return span([len(part.down) for part in parts.values()])


def peft_config(parts: dict[str, Part]) -> str:
    """What diffusers and peft read alpha from, as JSON: rank and alpha of most layers, and patterns for the others.

    Versions of diffusers that do not read it take alpha = rank: with that, the default here, nothing is lost.
    """
    r = Counter(len(part.down) for part in parts.values()).most_common(1)[0][0]
    alpha = Counter(part.alpha for part in parts.values()).most_common(1)[0][0]
    config = dict(r=r, lora_alpha=alpha, target_modules=[*parts],
                  rank_pattern={f"^{name}": len(part.down) for name, part in parts.items() if len(part.down) != r},
                  alpha_pattern={f"^{name}": part.alpha for name, part in parts.items() if part.alpha != alpha},
                  use_dora=any(part.magnitude is not None for part in parts.values()))
    return json.dumps({f"prior.{key}": value for key, value in config.items()})


def fuse(parts: dict[str, Part]) -> dict[str, Part]:
    """diffusers' names -> the original's, where query, key and value are the rows of one matrix, in_proj.

    Their LoRAs become one, exactly: down = [q; k; v] stacked, up = block diagonal, with the sum of the ranks; or, if
    all have the same down, because they came from such a matrix, up = [q; k; v] stacked, with their rank.
    """
    result = {}
    for name, part in parts.items():
        block, _, layer = name.partition(".attention.")
        fused = f"{block}.attention.attn.in_proj"
        if layer not in ("to_q", "to_k", "to_v"):
            result[f"{block}.attention.attn.out_proj" if layer == "to_out.0" else name] = part
        elif fused not in result:
            nothing = Part(part.down[:0], part.up[:, :0], 0.0)                           # rank 0, for one that has no LoRA
            trio = [parts.get(f"{block}.attention.{one}", nothing) for one in ("to_q", "to_k", "to_v")]
            s = part.alpha / len(part.down)              # one for all; where another has another, the rest goes into its up
            ups = [one.up * (one.alpha / max(len(one.down), 1) / s) for one in trio]     # (out, rank) each
            if all(torch.equal(one.down, part.down) for one in trio):
                down, up = part.down, torch.cat(ups)                                     # (rank, in), (3 out, rank)
            else:
                down = torch.cat([one.down for one in trio])                             # (sum of ranks, in)
                up = torch.block_diag(*ups)                                              # (3 out, sum of ranks)
            result[fused] = Part(down, up, s * len(down))
    return result


def to_tensors(parts: dict[str, Part], theirs: dict[str, str], to: str) -> dict[str, Tensor]:
    """Parts by our names -> the tensors of a file; theirs: {our name: name there}. Raises ValueError for what has no place."""
    if to not in FORMATS:
        raise ValueError(f"{to!r} is no format: expected one of {', '.join(FORMATS)}")
    doras = sum(part.magnitude is not None for part in parts.values())
    if doras and (to not in ("diffusers", "ours") or doras < len(parts)):
        raise ValueError(f"{doras} of {len(parts)} layers are DoRA: only diffusers' format has that, for all layers or none")
    parts = {theirs.get(name, name) if to != "ours" else name: part for name, part in parts.items()}
    tensors = {}
    for name, part in (fuse(parts) if to == "original" else parts).items():
        ones = [1, 1] if name in CONVOLUTIONS_THERE else part.down.shape[2:]
        down, up = (key.format(name.replace(".", "_") if to == "kohya" else name) for key in FORMATS[to])
        tensors[down] = part.down.view(*part.down.shape[:2], *ones)                      # (rank, in) or (rank, in, k, k)
        tensors[up] = part.up.view(*part.up.shape[:2], *(1 for _ in ones))               # (out, rank) or (out, rank, 1, 1)
        layer = down.rpartition(".lora_")[0]
        if to != "diffusers":
            tensors[f"{layer}.alpha"] = torch.tensor(part.alpha, dtype=torch.float64)    # as exact as Python's
        if part.magnitude is not None:                   # (out,), of convolutions (1, out, 1, 1): peft's shapes
            tensors[f"{layer}.lora_magnitude_vector"] = part.magnitude.view((1, -1, 1, 1) if ones else -1)
    # Copies: safetensors refuses tensors that share memory, as the thirds of a fused matrix do.
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def write_atomically(path: str | Path, write) -> None:
    """Calls write(temporary_path), then renames: a file is either whole or not there, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")    # machines may share the folder
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                      # the name must not reach the disk before the numbers do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lora(path: str | Path, parts: dict[str, Part], theirs: dict[str, str], to: str, facts: dict) -> int:
    """Writes a .safetensors file in one of FORMATS -> the number of its tensors. facts: see save_lora. Raises ValueError."""
    from safetensors.torch import save_file
    tensors = to_tensors(parts, theirs, to)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    metadata |= dict(format="pt", format_version="1", rank=ranks(parts), alpha=span([part.alpha for part in parts.values()]),
                     targets=condense(parts))
    if to == "diffusers":
        metadata["lora_adapter_metadata"] = peft_config({theirs[name]: part for name, part in parts.items()})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return len(tensors)


def save_lora(model: nn.Module, path: str | Path, name: str = "default", to: str = "diffusers",
              facts: dict | None = None) -> None:
    """Writes one LoRA as a .safetensors file in one of FORMATS. The user's `scale` is not part of it. Raises ValueError.

    facts: what else its metadata should say, for example dict(base_hash=base_hash(model), steps=1000, images=24,
    trigger_words=["a zorp"]). rank, alpha, targets and format_version are in it always.
    """
    write_lora(path, parts_of(model, name), their_names(find_layers(model)[0]), to, facts or {})


# ----- python lora.py ... ----------------------------------------------------------------------------

def refuse_existing(path: Path, suffix: str = "") -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already and is not overwritten: choose another name")
    if path.suffix != (suffix or path.suffix):
        raise ValueError(f"{path} should end in {suffix}, the only kind of file that is written")


def info(file: str) -> str:
    """What a LoRA file holds, as text."""
    parts, metadata = read_lora(file)
    tensors, (part, *_) = open_lora(file)[0], parts.values()
    metadata |= dict(tensors=f"{len(tensors)}, {part.down.dtype}, for example {max(tensors)}", layers=len(parts),
                     targets=condense(parts), rank=ranks(parts), alpha=span([part.alpha for part in parts.values()]),
                     dora=part.magnitude is not None)
    return "\n".join(f"{key}: {value}" for key, value in sorted(metadata.items()))


def convert(source: str, target: Path, to: str) -> str:
    """Rewrites a LoRA of Stage C in another format; the numbers stay as they are."""
    refuse_existing(target, ".safetensors")
    parts, facts = read_lora(source)
    facts.pop("lora_adapter_metadata", None)             # belongs to diffusers' format, and is written anew for it
    count = write_lora(target, parts, {name: their_name(name) for name in parts}, to, facts)
    return f"{count} tensors for {len(parts)} layers written to {target}"


def load_prior(path: str) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """A prior, as folder or file in any naming -> (Stage C in float32, {tensor's name: its dtype in the file})."""
    from stage_c import StageC
    from loading.weights import build_empty, fill, translate
    model, file = build_empty(StageC, path)
    dtypes = {}

    def noted(pairs):
        for name, tensor in pairs:
            dtypes[name] = tensor.dtype
            yield name, tensor
    return fill(model, noted(translate(file, file.shapes.keys(), model)), torch.float32), dtypes


def merge_files(prior: str, lora: str, out: Path, scale: float) -> str:
    """Writes a prior with the LoRA in it: summed in float32, rounded once, to the dtype that the prior had."""
    from safetensors.torch import save_file
    from loading.files import STEM, write_files
    from loading.names import config_to_diffusers, to_diffusers
    refuse_existing(out)
    model, dtypes = load_prior(prior)
    trained_on = read_lora(lora)[1].get("base_hash")
    note = "\nnote: the LoRA was trained on other weights than these" if trained_on not in (None, base_hash(model)) else ""
    names = load_lora(model, lora, scale=scale)
    merge(model)
    merged = {name: tensor.to(dtypes[name], copy=True) for name, tensor in base_state_dict(model).items()}
    remove(model)                                        # the plain layers again, for their names
    too_large = [f"{name} in {tensor.dtype}" for name, tensor in merged.items() if not tensor.isfinite().all()]
    if too_large:
        raise ValueError(f"{too_large[0]} cannot hold the sum: use a smaller --scale, or a prior in float32")
    tensors = {name: tensor.contiguous() for name, tensor in to_diffusers(merged, model).items()}
    if out.suffix == ".safetensors":
        write_atomically(out, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    else:
        write_files(config_to_diffusers(model), tensors, out, STEM)
    return f"{len(names)} layers merged at scale {scale:g}, {len(tensors)} tensors written to {out}{note}"


@torch.no_grad()
def extract(base: nn.Module, tuned: nn.Module, rank: int, targets: str) -> tuple[dict[str, Part], str]:
    """The LoRA of this rank that is nearest to tuned - base in each layer -> (parts, how near it is, as text).

    The best approximation of a matrix by one of rank r are its r largest singular values and their vectors (Eckart and
    Young, 1936). How near it is: the energy, the sum of squares, that they keep. Raises ValueError without a difference.
    """
    layers, after = find_layers(base)[0], tuned.state_dict()
    energy = {name: (after[name].double() - before.double()).square().sum().item()
              for name, before in base.state_dict().items()}
    parts, kept = {}, {}                                                                 # kept: {tensor's name: energy}
    for path in find_targets(base, targets):
        name, shape = f"{path}.weight", layers[path].weight.shape                        # (out, in) or (out, in, k, k)
        if energy[name]:
            u, s, v = torch.linalg.svd((after[name] - layers[path].weight).flatten(1), full_matrices=False)
            u, s, v = u[:, :rank], s[:rank], v[:rank]                                    # (out, rank), (rank,), (rank, in)
            kept[name] = s.double().square().sum().item()
            # The root of s in both: none is much larger than the other, as training would leave them.
            parts[path] = Part((s.sqrt()[:, None] * v).view(-1, *shape[1:]),
                               (u * s.sqrt()).view(*u.shape, *(1,) * (len(shape) - 2)), float(len(s)))
    left = [name for name in energy if energy[name] and name not in kept]
    if not parts:
        raise ValueError(f"the two models do not differ in any layer of {targets!r}" + f", only in {condense(left)}" * bool(left))
    worst = min(kept, key=lambda name: kept[name] / energy[name])
    total = sum(kept.values())
    text = (f"energy of the difference kept in {len(parts)} layers: {total / sum(energy[name] for name in kept):.4f}; "
            f"in the worst, {worst}: {kept[worst] / energy[worst]:.4f}")
    if left:
        text += (f"\nof the whole difference: {total / sum(energy.values()):.4f}, for {len(left)} tensors that the LoRA "
                 f"does not cover differ, too: {condense(left)}")
    return parts, text


def extract_files(base: str, tuned: str, out: Path, rank: int, targets: str) -> str:
    """Writes the LoRA between two priors. At official size the SVDs take ten minutes on two cores."""
    refuse_existing(out, ".safetensors")
    if rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number >= 1")
    (base, _), (tuned, _) = load_prior(base), load_prior(tuned)
    if base.config != tuned.config:
        raise ValueError(f"the two priors have different sizes: {base.config} and {tuned.config}")
    parts, text = extract(base, tuned, rank, targets)
    write_lora(out, parts, their_names(parts), "diffusers", dict(base_hash=base_hash(base), made_by="extract"))
    return f"{text}\nwritten to {out}"


def main(argv: list[str] | None = None) -> None:
    import argparse
    import sys
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("info", help="what is inside a LoRA file")
    c.add_argument("file", help=".safetensors, .bin or .pt file, or a folder with pytorch_lora_weights.safetensors")
    c = commands.add_parser("convert", help="rewrite a LoRA for another program; the numbers stay as they are")
    c.add_argument("source", help="the LoRA, in any format")
    c.add_argument("target", type=Path, help=".safetensors file to write; must not exist yet")
    c.add_argument("--to", required=True, choices=FORMATS, help="diffusers: peft too; kohya: OneTrainer too; comfy: ComfyUI; "
                                                                "original: the authors' code; ours: this repository's names")
    c = commands.add_parser("merge", help="add a LoRA to a prior, for good")
    c.add_argument("prior", help="folder with config.json, or a file, as for weights.py")
    c.add_argument("lora", help="the LoRA, in any format")
    c.add_argument("out", type=Path, help="folder or .safetensors file to write, in diffusers' names; must not exist yet")
    c.add_argument("--scale", type=float, default=1.0, help="how strongly the LoRA counts (default 1: as trained)")
    c = commands.add_parser("extract", help="the LoRA nearest to the difference of two priors, and how near it is")
    c.add_argument("base", help="the prior before fine-tuning, folder or file")
    c.add_argument("tuned", help="the prior after it")
    c.add_argument("out", type=Path, help=".safetensors file to write; must not exist yet")
    c.add_argument("--rank", type=int, default=16, help="of every layer (default 16): more keeps more, in a larger file")
    c.add_argument("--targets", default="all", help=f"{', '.join(PRESETS)}, or a regular expression for our names (default all)")
    args = vars(p.parse_args(argv))
    run = dict(info=info, convert=convert, merge=merge_files, extract=extract_files)[args.pop("command")]
    try:
        print(run(**args))
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
