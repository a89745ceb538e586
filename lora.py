"""LoRA: fine-tunes a large model by training a small addition to some of its layers.

  W' = W + (alpha / rank) * up @ down    W (out, in) frozen; down (rank, in), up (out, rank) trained

Why a low rank is enough: fine-tuning adds some D (out, in) to a weight W. Each gradient step adds
outer products g x^T of the gradient at the layer's output and the layer's input. Similar images
give similar products, so D is close to a matrix of low rank. LoRA writes D as up @ down, with rank
* (in + out) numbers, not in * out: 1 % for a 1536 x 1536 layer of Stage C and rank 8. The
gradients and the optimizer's two averages shrink to the same share.
Why up starts at 0: with y = W x + s up h and h = down x, the gradient of up is s g h^T, and that of
down is s (up^T g) x^T. If both were 0, both gradients would stay 0. So up = 0 and down is random:
training starts exactly at the base model; step 1 changes up, step 2 also changes down.
s = alpha / rank keeps a learning rate useful when the rank changes. The default is alpha = rank, so
s = 1. Source: Hu et al., arXiv:2106.09685.
rsLoRA (arXiv:2312.03732) uses s = alpha / sqrt(rank), which keeps high ranks learning. This is the
same formula with alpha * sqrt(rank) as alpha, and it is stored that way. DoRA: see Adapter.

  names = add_lora(model, rank=8, targets="attention")       # 128 layers of Stage C, rest frozen
  optimizer = torch.optim.AdamW(lora_parameters(model), ...) # float32 in any model; no weight decay
  save_lora(model, "style.safetensors")                      # a file that diffusers loads as well
  load_lora(model, "other.safetensors", "other", scale=0.8)  # a second LoRA, named "other"
  merge(model); unmerge(model); remove(model)                # add LoRAs to weights; undo; remove

A LoRALayer replaces each layer that gets a LoRA, as print(model) shows. It computes the formula.
(Hooks would not show in print(model). A parametrization would build W' in each forward and leave no
place for dropout.) The price: "query.weight" is called "query.base.weight" until remove(model)
restores the old layers.
Any nn.Module works; only the names in files are specific to Stage C. Linear and Conv2d can have a
LoRA. Grouped convolutions cannot: down and up would mix the groups, which no merge can express.

Other programs' files: loading/lora_formats.py. Command line: python -m tools.lora.
Needs: torch; safetensors for files. This file works when copied alone.
"""
if __name__ == "__main__":
    raise SystemExit("lora.py defines LoRA layers. To generate images: python sample.py --help")

import functools
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# add_lora's `targets` is a key of PRESETS, or a regular expression for a part of layers' names.
PRESETS = {
    "attention":     r"(^|\.)(query|key|value|out)$",      # Stage C: 4 layers in each of 32 blocks
    "attention+mlp": r"(^|\.)(query|key|value|out|text_mapper|expand|contract)$",
    "all":           r"",                                  # every Linear, every ungrouped Conv2d
}


# ----- the layers --------------------------------------------------------------------------------

class Adapter(nn.Module):
    """One LoRA of one layer. Parameters are always float32: bfloat16 would lose small updates.

    DoRA writes W' = m V / |V| with V = W + s up @ down, where |V| (out,) are the lengths of V's
    rows, and also trains m (out,). |V| counts as constant in the gradient, which saves memory and
    changes little (arXiv:2402.09353).
    `scale` is the strength that the user sets: y = base output + scale * (change by this LoRA).
    """
    def __init__(self, down: Tensor, up: Tensor, alpha: float, magnitude: Tensor | None = None,
                 dropout: float = 0.0):
        super().__init__()
        self.rank, self.alpha, self.dropout = len(down), float(alpha), dropout
        self.scale, self.enabled, self.merged = 1.0, True, False
        # down (rank, in), up (out, rank); for a convolution (rank, in, k, k) and (out, rank, 1, 1)
        for name, tensor in (("down", down), ("up", up), ("magnitude", magnitude)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(
                tensor.detach().to(torch.float32, copy=True)))

    def product(self, weight: Tensor) -> Tensor:
        """Computes (alpha / rank) up @ down in `weight`'s shape, in float32 even under autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            product = self.up.flatten(1) @ self.down.flatten(1)                # (out, in * k * k)
            return product.view(weight.shape) * (self.alpha / self.rank)

    def gain(self, weight: Tensor) -> Tensor:
        """Computes DoRA's factor m / |V|, see Adapter: (out,), or (out,1,1) for a convolution."""
        with torch.no_grad():
            norms = (weight.float() + self.product(weight)).flatten(1).norm(dim=1)     # (out,)
        return (self.magnitude / norms).view(-1, *(1,) * (weight.ndim - 2))

    def delta(self, weight: Tensor) -> Tensor:
        """Computes the change W' - W of the base layer's `weight`, in its shape and in float32."""
        if self.magnitude is None:
            return self.product(weight)
        weight = weight.float()
        return self.gain(weight).unsqueeze(1) * (weight + self.product(weight)) - weight


class LoRALayer(nn.Module):
    """A frozen Linear or Conv2d with its LoRAs. Shapes of input and output are those of the layer.

    y = base(x) + sum_i scale_i (alpha_i / rank_i) up_i(down_i(dropout(x)))
    """
    def __init__(self, base: nn.Linear | nn.Conv2d):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.original = None     # the base weight before a merge; None if not merged

    def forward(self, x: Tensor) -> Tensor:
        base = y = self.base(x)                                # (..., out) or (B, out, H', W')
        for adapter in self.adapters.values():
            if adapter.enabled and not adapter.merged:
                y = self.apply_adapter(adapter, x, base, y)
        return y

    def apply_adapter(self, adapter: Adapter, x: Tensor, base: Tensor, y: Tensor) -> Tensor:
        """Returns y plus one LoRA's change for input x. base: self.base(x), without any LoRA."""
        if self.training and adapter.dropout:
            x = F.dropout(x, adapter.dropout)
        down, up = adapter.down.to(x.dtype), adapter.up.to(x.dtype)
        s = adapter.scale * adapter.alpha / adapter.rank
        if isinstance(self.base, nn.Linear):
            h = F.linear(x, down)                                              # (..., rank)
            if adapter.magnitude is None:
                # One call for product and sum, because memory traffic dominates on large layers.
                return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T, alpha=s).view_as(y)
            change = F.linear(h * s, up)                                       # (..., out)
        else:
            # `down` is a convolution like the base, `up` a 1x1 convolution. Together they equal one
            # convolution with the weight up @ down.
            settings = self.base.stride, self.base.padding, self.base.dilation
            h = F.conv2d(x, down, None, *settings)                             # (B, rank, H', W')
            change = F.conv2d(h * s, up)                                       # (B, out, H', W')
        if adapter.magnitude is None:
            return y + change
        # DoRA: with V = W + s up down and g = m / |V|, the output changes by g V x - W x =
        # (g - 1) W x + g s up down x. W x is the base's output without its bias.
        g = adapter.gain(self.base.weight)                                     # (out,), (out, 1, 1)
        if self.base.bias is not None:
            base = base - self.base.bias.to(base.dtype).view(g.shape)
        return y + (adapter.scale * (g - 1)).to(y.dtype) * base + g.to(y.dtype) * change


# ----- finding layers, adding LoRAs --------------------------------------------------------------

def find_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns {name: layer that can get a LoRA} and {name of another layer: why it cannot}."""
    fit, unfit = {}, {}
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        name = path.removesuffix(".base") if isinstance(parent, LoRALayer) else path
        if not name or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        if getattr(module, "groups", 1) > 1:
            unfit[name] = f"is a convolution in {module.groups} groups, which a LoRA would mix"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            unfit[name] = f"is a convolution with padding_mode {module.padding_mode!r}, not 'zeros'"
        elif isinstance(parent, nn.MultiheadAttention):
            unfit[name] = "is part of an nn.MultiheadAttention, which never calls it"
        else:
            fit[name] = module
    return fit, unfit


def summary(names) -> str:
    """Shortens a list of names to one line: "attention_blocks.N.query x32, ..."."""
    counts = Counter(re.sub(r"\d+", "N", name) for name in names)
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items())


def find_targets(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """Returns {name: layer} of layers that `targets` matches. Raises ValueError if none does."""
    fit, unfit = find_layers(model)
    try:
        pattern = re.compile(PRESETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets {targets!r} is neither {', '.join(PRESETS)} nor a regular "
                         f"expression: {error}") from error
    found = {name: layer for name, layer in fit.items() if pattern.search(name)}
    if not found:
        reasons = "".join(f"; {name} {why}" for name, why in unfit.items() if pattern.search(name))
        raise ValueError(f"targets {targets!r} match no layer that can have a LoRA{reasons[:200]}. "
                         f"Choose from: {summary(fit)}")
    return found


def add_lora(model: nn.Module, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
             targets: str = "attention", name: str = "default", rslora: bool = False,
             dora: bool = False) -> list[str]:
    """Adds an untrained LoRA, freezes all except LoRAs, and returns the names of the LoRA's layers.

    rank: 4 to 16 for a style or an object. alpha: strength, by default `rank`. dropout: share of a
    layer's inputs dropped before `down`, in training. targets: a preset or a regular expression.
    rslora, dora: variants, see the file's header. Raises ValueError if a setting is invalid, the
    name is taken, or no layer matches."""
    alpha = float(rank if alpha is None else alpha)
    if int(rank) != rank or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank}, alpha {alpha}, dropout {dropout}: expected rank 1, 2, ..., "
                         "alpha > 0, dropout in [0, 1)")
    check_name(model, name)
    taken = [path for path, layer in lora_layers(model) if name in layer.adapters]
    if taken:
        raise ValueError(f"there is a LoRA {name!r} already, on {summary(taken)}: choose another "
                         "name, or remove it first")
    alpha, new = alpha * math.sqrt(rank) if rslora else alpha, {}
    for path, layer in find_targets(model, targets).items():
        weight = layer.weight.detach()                               # (out, in) or (out, in, k, k)
        # `down` starts like nn.Linear's weight, uniform in +-1/sqrt(inputs). It is drawn on the
        # CPU, so that it is the same on every device.
        down = torch.empty(int(rank), *weight.shape[1:], device="cpu", dtype=torch.float32)
        down.uniform_(-1, 1).div_(math.sqrt(weight[0].numel()))
        up = torch.zeros(len(weight), int(rank), *(1,) * (weight.ndim - 2), device="cpu")
        magnitude = weight.float().flatten(1).norm(dim=1) if dora else None    # (out,)
        new[path] = Adapter(down, up, alpha, magnitude, dropout)
    inject(model, name, new)
    return list(new)


def check_name(model: nn.Module, name: str) -> None:
    """Raises ValueError if `name` is not a valid name, or if a LoRA is merged at the moment."""
    check_unmerged(model)
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot name a LoRA: use letters, digits, _ and -, and no "
                         "attribute of nn.ModuleDict")


def inject(model: nn.Module, name: str, new: dict[str, Adapter]) -> None:
    """Adds a LoRA called `name` and freezes all except LoRAs. new: {layer's name: Adapter}."""
    for path, adapter in new.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            layer = LoRALayer(layer)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        layer.adapters[name] = adapter.to(layer.base.weight.device)
        layer.train(layer.base.training)     # the mode of its base; a new module is in train mode
    for parameter in set(model.parameters()) - set(lora_parameters(model)):
        parameter.requires_grad_(False)


# ----- using LoRAs -------------------------------------------------------------------------------

def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """Lists (name, layer) for every layer that has a LoRA, in the model's order."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALayer)]


def adapters(model: nn.Module, name: str | None = None) -> list[tuple[str, Adapter]]:
    """Lists (layer's name, Adapter) of LoRA `name`, or of all; raises ValueError if none exists."""
    every = [(path, *item) for path, layer in lora_layers(model) for item in layer.adapters.items()]
    found = [(path, adapter) for path, key, adapter in every if name in (None, key)]
    if not found:
        existing = ", ".join(sorted({key for _, key, _ in every}))
        raise ValueError(f"the model has no LoRA called {name!r}, only {existing}" if existing else
                         "the model has no LoRA: use add_lora or load_lora first")
    return found


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Returns the parameters of LoRA `name`, or of all LoRAs if name is None, for the optimizer."""
    return [parameter for _, adapter in adapters(model, name) for parameter in adapter.parameters()]


def signature(model: nn.Module) -> tuple:
    """Returns a tuple that changes if a LoRA or a weight changes, for code that caches results."""
    states = [(adapter, adapter.scale, adapter.enabled, adapter.merged)
              for _, layer in lora_layers(model) for adapter in layer.adapters.values()]
    # _version counts a tensor's in-place changes; tensors made in inference mode have no count.
    return *states, sum(p._version for p in model.parameters() if not p.is_inference())


def check_unmerged(model: nn.Module) -> None:
    """Raises ValueError if a LoRA is merged: changes to it would not change the merged weights."""
    if any(layer.original is not None for _, layer in lora_layers(model)):
        raise ValueError("a LoRA is merged into the weights: call unmerge(model) first, change it, "
                         "and merge again")


def set_scale(model: nn.Module, scale: float, name: str | None = None) -> None:
    """Sets the strength of LoRA `name`, or of all LoRAs: 1 is as trained, 0 is off."""
    check_unmerged(model)
    for _, adapter in adapters(model, name):
        adapter.scale = float(scale)


def enable(model: nn.Module, name: str | None = None, on: bool = True) -> None:
    """Turns LoRA `name`, or all, on or off. If all are off, the output is the base model's."""
    check_unmerged(model)
    for _, adapter in adapters(model, name):
        adapter.enabled = on


disable = functools.partial(enable, on=False)        # call: disable(model, name=None)


@torch.no_grad()
def merge(model: nn.Module, name: str | None = None) -> None:
    """Merges LoRA `name`, or all enabled LoRAs, into the weights, which makes forward faster.

    New weights are computed in float32 and rounded once. Subtraction would not restore the old ones
    exactly, so they are kept in CPU memory: 0.6 GB for Stage C's attention in float16.
    Raises ValueError if there is nothing to merge, or if an enabled DoRA would stay unmerged.
    """
    chosen = [a for _, a in adapters(model, name) if a.enabled and not a.merged]
    if not chosen:
        raise ValueError("there is nothing to merge: the LoRA is merged already, or turned off")
    if any(a.magnitude is not None and a.enabled and not a.merged and a not in chosen
           for _, a in adapters(model)):
        raise ValueError("a DoRA is defined on the unmerged weights: merge it together with the "
                         "others, or disable it")
    for adapter in chosen:
        adapter.merged = True
    for _, layer in lora_layers(model):
        merged, weight = [a for a in layer.adapters.values() if a.merged], layer.base.weight
        if merged:
            if layer.original is None:
                layer.original = weight.detach().to("cpu", copy=True)
            original = layer.original.to(weight.device)                        # (out, in, ...)
            weight.copy_(original.float() + sum(a.scale * a.delta(original) for a in merged))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restores the weights from before all merges, exactly. forward then applies LoRAs again."""
    for _, layer in lora_layers(model):
        if layer.original is not None:
            layer.base.weight.copy_(layer.original)
        layer.original = None
        for adapter in layer.adapters.values():
            adapter.merged = False


def remove(model: nn.Module, name: str | None = None) -> None:
    """Undoes all merges and removes LoRA `name`, or all. Layers without LoRAs become plain again.

    The weights stay frozen: call model.requires_grad_() to train them.
    """
    adapters(model, name)                               # raises ValueError if there is no such LoRA
    unmerge(model)
    for path, layer in lora_layers(model):
        for key in [key for key in layer.adapters if name in (None, key)]:
            del layer.adapters[key]
        if not layer.adapters:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)


def merge_and_unload(model: nn.Module) -> None:
    """Merges all enabled LoRAs permanently, and replaces each LoRALayer by its plain layer."""
    merge(model)
    for _, layer in lora_layers(model):
        layer.original = None
    remove(model)


# ----- files -------------------------------------------------------------------------------------
# Files use diffusers' names, lora_state_dict ours; load_lora reads both. diffusers has one list:
# our res_blocks[i], timestep_blocks[i], attention_blocks[i] are blocks 3 i, 3 i + 1, 3 i + 2 there.

DIFFUSERS_NAMES = {     # {name of a layer of our Stage C: diffusers' name}
    "embed":                            "projection",
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
    "head":                             "out.1",
}
CONVOLUTIONS = ("projection", "out.1")     # 1x1 convolutions in diffusers, Linear here
ROLES = {       # {role: endings of tensors' names (ours, diffusers', others that load_lora reads)}
    "down":      (".lora_down.weight", ".lora_A.weight"),
    "up":        (".lora_up.weight", ".lora_B.weight"),
    "magnitude": (".lora_magnitude_vector",) * 2 + (".lora_magnitude_vector.weight",),
    "alpha":     (".alpha", ".alpha"),
}


def diffusers_name(name: str) -> str:
    """Returns diffusers' name of a layer of our Stage C. Any other name is returned unchanged."""
    i = int((re.findall(r"_blocks\.(\d+)\.", name) or [0])[0])
    theirs = DIFFUSERS_NAMES.get(re.sub(r"(?<=_blocks\.)\d+", "{i}", name), name)
    return theirs.format(res=3 * i, time=3 * i + 1, att=3 * i + 2)


def diffusers_names(names) -> dict[str, str]:
    """Returns {our name: diffusers' name} for a model's layers. Only names of Stage C differ."""
    stage_c = any(name.startswith("attention_blocks.") for name in names)
    return {name: diffusers_name(name) if stage_c else name for name in names}


def to_tensors(weights: dict[str, Adapter], prefix: str = "", naming: int = 0) -> dict[str, Tensor]:
    """Converts {layer: Adapter} to a state dict. prefix: of names. naming: 0 ours, 1 diffusers'."""
    tensors = {}
    for layer, a in weights.items():
        ones = (1, 1) if layer in CONVOLUTIONS else a.down.shape[2:]
        values = dict(down=a.down.view(*a.down.shape[:2], *ones),
                      up=a.up.view(*a.up.shape[:2], *(1 for _ in ones)),
                      alpha=torch.tensor(a.alpha, dtype=torch.float64))  # float64 keeps alpha exact
        if a.magnitude is not None:      # peft's shapes: (out,), for a convolution (1, out, 1, 1)
            values["magnitude"] = a.magnitude.view((1, -1, 1, 1) if ones else -1)
        tensors |= {prefix + layer + ROLES[role][naming]: x for role, x in values.items()}
    # Copies, because safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in tensors.items()}


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns copies of one LoRA's tensors under our names, for a checkpoint or load_lora."""
    return to_tensors(dict(adapters(model, name)))


def to_diffusers(weights: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a LoRA file. weights: {diffusers' name: Adapter}.

    diffusers and peft read alpha from the metadata: a default, and patterns for layers that differ.
    Versions that do not read the metadata take alpha = rank, which is the default here.
    """
    ranks = {layer: len(a.down) for layer, a in weights.items()}
    alphas = {layer: a.alpha for layer, a in weights.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = dict(r=rank, lora_alpha=alpha, target_modules=[*weights],
                  rank_pattern={f"^{layer}": r for layer, r in ranks.items() if r != rank},
                  alpha_pattern={f"^{layer}": a for layer, a in alphas.items() if a != alpha},
                  use_dora=any(a.magnitude is not None for a in weights.values()))
    config = json.dumps({f"prior.{key}": value for key, value in config.items()})
    tensors = to_tensors(weights, "prior.", naming=1)
    return ({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")},
            dict(format="pt", lora_adapter_metadata=config))


def write_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file. The metadata is sorted, so that equal contents give equal files.
    Format: the header's length in 8 bytes, the header in JSON, the values."""
    from safetensors.torch import save
    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    header = dict(__metadata__=dict(sorted(metadata.items()))) | json.loads(data[8:end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                 # the values start at a multiple of 8 bytes
    half = Path(f"{path}.half")          # temporary, so that `path` is never incomplete
    half.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    half.replace(path)


def save_lora(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Writes one LoRA as a .safetensors file in diffusers' format. `scale` is not stored."""
    names = diffusers_names(find_layers(model)[0])
    tensors, metadata = to_diffusers({names[layer]: a for layer, a in adapters(model, name)})
    write_file(tensors, path, metadata)


def alpha_from(config: dict, layer: str, rank: int) -> float:
    """Returns a layer's alpha from `config` (diffusers' or peft's), or `rank` if it has none."""
    try:
        config = {key.removeprefix("prior."): value for key, value in config.items()}
        patterns = (config.get("alpha_pattern") or {}).items()         # {regular expression: alpha}
        alphas = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", layer)]
        alpha = float([*alphas, config.get("lora_alpha", rank)][0])
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise ValueError("its configuration cannot be used, expected a number lora_alpha and an "
                         f"alpha_pattern {{layer: number}}: {error}") from error
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def to_adapter(layer: str, shape: tuple, values: dict) -> Adapter:
    """Builds an Adapter from {key of ROLES: tensor} for a weight of `shape`. layer: for errors."""
    rank = len(values.get("down", ()))
    shapes = dict(down=(rank, *shape[1:]), up=(shape[0], rank, *(1 for _ in shape[2:])),
                  magnitude=shape[:1])
    tensors = {role: values[role] for role in shapes if role in values}
    alpha = torch.as_tensor(values["alpha"], dtype=torch.float64)
    valid = alpha.numel() == 1 and bool(alpha.isfinite())
    try:     # reshape: a 1x1 convolution in the file may be a Linear here, or the reverse
        if tensors["up"].shape[1] == rank > 0 and valid:
            return Adapter(alpha=alpha.item() or rank,         # in a file, alpha 0 means the rank
                           **{role: x.reshape(shapes[role]) for role, x in tensors.items()})
    except (KeyError, IndexError, RuntimeError):
        pass
    found = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items())
    found += f", alpha {str(alpha.tolist())[:20]}" * (not valid)
    raise ValueError(f"{layer} is {tuple(shape)}, the file has {found}")


def load_lora(model: nn.Module, source: str | Path | dict[str, Tensor], name: str = "default",
              scale: float = 1.0) -> list[str]:
    """Adds a LoRA from a .safetensors file in diffusers' format or from lora_state_dict's tensors.

    If the model has a LoRA of this name, its parameters get the new values, to continue training.
    Freezes everything except LoRAs. Returns the names of the LoRA's layers. Raises ValueError if
    any tensor does not fit; the model is then unchanged, because part of a LoRA is useless.
    """
    check_name(model, name)
    tensors, config = source, {}
    if not isinstance(source, dict):
        from safetensors import safe_open
        with safe_open(source, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            config = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
    layers, new, left = find_layers(model)[0], {}, dict(tensors)
    for path, theirs in diffusers_names(layers).items():
        values = {role: left.pop(alias + ending) for role, endings in ROLES.items()
                  for ending in endings for alias in (path, theirs, f"prior.{theirs}")
                  if alias + ending in left}
        if values:
            if "alpha" not in values and not config:
                warnings.warn("the LoRA does not store alpha: assumed the rank")
            values.setdefault("alpha", alpha_from(config, theirs, len(values.get("down", ()))))
            new[path] = to_adapter(path, layers[path].weight.shape, values)
    if left or not tensors:
        raise ValueError(f"{len(left)} of {len(tensors)} tensors belong to no layer of this model "
                         f"by diffusers' names ({', '.join([*left][:4])}): for files of other "
                         "programs use load_lora of loading/lora_formats.py")
    old = {key: x.adapters[name] for key, x in lora_layers(model) if name in x.adapters}
    sizes = [{(path, a.rank, a.magnitude is None) for path, a in x.items()} for x in (old, new)]
    if old and sizes[0] != sizes[1]:
        ranks = [", ".join(map(str, sorted({a.rank for a in x.values()}))) for x in (old, new)]
        raise ValueError(f"the model's LoRA {name!r} has {len(old)} layers of rank {ranks[0]}, the "
                         f"file {len(new)} of rank {ranks[1]}, and they are not the same: "
                         f"remove(model, {name!r}) first, or choose another name")
    for path, adapter in old.items():    # in place, because an optimizer may hold the parameters
        adapter.load_state_dict(new[path].state_dict())
        adapter.alpha = new[path].alpha
    if not old:
        inject(model, name, new)
    set_scale(model, scale, name)
    return list(new)
