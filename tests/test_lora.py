"""LoRA: the formula, training it changes nothing else, merging, and its own files. For other files see
test_lora_formats.py."""
import copy
import importlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import lora
from helpers import rel
from loading import lora_formats
from loading.names import config_to_diffusers, name_table, to_diffusers
from lora import (LoRALayer, add_lora, disable, enable, load_lora, lora_parameters, lora_state_dict, merge, remove,
                  save_lora, set_scale, unmerge)
from stage_c import StageC

SIZES = dict(c_in=4, c=16, c_cond=12, c_timestep=8, depth=2, heads=2, dropout=0.0)
ATTENTION = [f"attention_blocks.{i}.{part}" for i in range(2) for part in ("query", "key", "value", "out")]


@torch.no_grad()
def prior(seed=0, **sizes) -> StageC:
    """A tiny Stage C with random values everywhere: its initial zeros would hide most errors."""
    torch.manual_seed(seed)
    model = StageC(**{**SIZES, **sizes})
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(parameter[0].numel(), 4)))
    model.head.weight[SIZES["c_in"]:] *= 0.2             # keeps the divisor |1 - b| away from zero
    model.head.bias[SIZES["c_in"]:] = -0.3
    return model.eval()


def inputs(dtype=torch.float32):
    """x_t (2, 4, 3, 5), t (2,), text (2, 6, 12)."""
    random = torch.Generator().manual_seed(7)
    return (torch.randn(2, 4, 3, 5, generator=random).to(dtype), torch.tensor([0.25, 0.75]).to(dtype),
            torch.randn(2, 6, 12, generator=random).to(dtype))


def base_output() -> torch.Tensor:
    """Output of the model without LoRA. Frozen, because for trained weights torch chooses convolutions that round
    differently."""
    return prior().requires_grad_(False)(*inputs())


@torch.no_grad()
def train_a_little(model, name=None, size=0.1):
    """Adds noise to `up` and the other parameters, like training would: now the LoRA changes the output."""
    for parameter in lora_parameters(model, name):
        parameter += size * torch.randn_like(parameter)
    return model


def with_lora(seed=0, **options) -> StageC:
    model = prior(seed)
    add_lora(model, **{"rank": 4, "alpha": 6.0, **options})
    return train_a_little(model)


def bits(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loaded(source, scale=1.0, read=lora.load_lora, **sizes) -> StageC:
    """A fresh prior with the LoRA from a file or a dict of tensors."""
    model = prior(**sizes)
    read(model, source, scale=scale)
    return model


# ----- the formula -----------------------------------------------------------------------------------

def test_the_start_is_the_base_model_bit_for_bit():
    """up = 0: with any settings, step 0 generates the same images as the base model."""
    expected = base_output()
    for options in (dict(), dict(targets="all"), dict(rslora=True), dict(dora=True, targets="all"), dict(dropout=0.5)):
        model = prior()
        add_lora(model, **options)
        assert torch.equal(model(*inputs()), expected), options


def test_linear_equals_the_formula():
    """y = W x + b + alpha / rank * up down x, written out. alpha / rank is not 1 here."""
    model = nn.Sequential(nn.Linear(5, 7))
    plain = copy.deepcopy(model[0])
    add_lora(model, rank=3, alpha=12.0, targets="0")
    train_a_little(model)
    adapter, x = model[0].adapters["default"], torch.randn(2, 4, 5)
    torch.testing.assert_close(model(x), plain(x) + 4.0 * x @ adapter.down.T @ adapter.up.T)


@pytest.mark.parametrize("options", [dict(kernel_size=1), dict(kernel_size=3, stride=2, padding=1),
                                     dict(kernel_size=3, dilation=2),
                                     dict(kernel_size=3, padding="same"), dict(kernel_size=(1, 3), bias=False)])
def test_convolution_equals_one_with_the_summed_weight(options):
    """down (k x k, with the base's stride, padding, dilation), then up (1 x 1), is one convolution with up @ down."""
    model = nn.Sequential(nn.Conv2d(4, 6, **options))
    plain = copy.deepcopy(model[0])
    add_lora(model, rank=2, alpha=3.0, targets="0")
    train_a_little(model)
    adapter, x = model[0].adapters["default"], torch.randn(2, 4, 7, 8)
    weight = plain.weight + 1.5 * torch.einsum("or,rikl->oikl", adapter.up[:, :, 0, 0], adapter.down)
    expected = F.conv2d(x, weight, plain.bias, plain.stride, plain.padding, plain.dilation)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_alpha_is_the_rank_unless_given():
    """OneTrainer and kohya use 1: at rank 16 their LoRAs start 16 times weaker than expected."""
    model = prior()
    add_lora(model, rank=4)
    add_lora(model, rank=4, alpha=1.0, name="weak")
    layer = model.attention_blocks[0].query
    assert layer.adapters["default"].alpha == 4 and layer.adapters["weak"].alpha == 1


def test_rslora_divides_by_the_root_of_the_rank():
    """It is stored as another alpha, so alpha / rank is right in every file."""
    model = prior()
    add_lora(model, rank=4, alpha=3.0, rslora=True)
    adapter = model.attention_blocks[0].query.adapters["default"]
    assert adapter.alpha / adapter.rank == 3.0 / math.sqrt(4)


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Conv2d(5, 7, 3, padding=1)])
def test_dora_equals_its_formula(layer):
    """W' = m V / |V| with V = W + s up @ down, by rows. In the gradients |V| is a constant."""
    model = nn.Sequential(copy.deepcopy(layer))
    add_lora(model, rank=2, alpha=3.0, targets="0", dora=True)
    train_a_little(model)
    down, up, m = (p.detach().clone().requires_grad_() for p in lora_parameters(model))
    v = layer.weight.detach() + 1.5 * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    weight = (m / v.detach().flatten(1).norm(dim=1)).view(-1, *[1] * (v.ndim - 1)) * v
    x = torch.randn(2, 5, 6, 5)
    expected = F.linear(x, weight, layer.bias) if isinstance(layer, nn.Linear) else F.conv2d(x, weight, layer.bias,
                                                                                             padding=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    model(x).square().sum().backward()
    for found, reference in zip(lora_parameters(model), (down, up, m)):
        torch.testing.assert_close(found.grad, reference.grad, rtol=1e-3, atol=1e-3)


def test_dropout_works_in_training_only():
    """And only before `down`: the base gets its whole input."""
    model = with_lora(dropout=0.5)
    expected = prior()
    add_lora(expected, rank=4, alpha=6.0)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs()), expected(*inputs()))
    model.train()
    assert not torch.equal(model(*inputs()), model(*inputs()))
    set_scale(model, 0.0)
    assert torch.equal(model(*inputs()), base_output())


def test_a_lora_takes_the_mode_of_its_model():
    """A new module is in training mode. With dropout, a model in eval mode would generate other images each time."""
    model = prior()
    add_lora(model, dropout=0.5)
    assert not any(module.training for module in model.modules())
    model = prior().train()
    add_lora(model, dropout=0.5)
    assert all(module.training for module in model.modules())


# ----- training --------------------------------------------------------------------------------------

def train_step(model, optimizer):
    loss = model(*inputs()).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("dora", [False, True])
def test_training_moves_the_lora_and_nothing_else(dora):
    """The base keeps every bit, gets no gradient, and is not among the parameters."""
    model = prior().train()
    before, gradients = bits(model), []
    add_lora(model, rank=2, targets="attention+mlp", dora=dora)
    parameters = lora_parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    losses = [train_step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert same(lora_formats.base_state_dict(model), before)
    assert all(p.grad is not None and p.grad.any() for p in parameters), gradients


def test_up_learns_in_step_1_and_down_from_step_2():
    """The gradient of down is up^T g: 0 until up has moved. If both were 0, neither would ever move."""
    model = prior().train()
    add_lora(model, rank=2)
    adapters = [module.adapters["default"] for module in model.modules() if isinstance(module, LoRALayer)]
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    train_step(model, optimizer)
    assert all(a.up.grad.any() and not a.down.grad.any() for a in adapters)
    train_step(model, optimizer)
    assert all(a.up.grad.any() and a.down.grad.any() for a in adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_float32_in_a_half_precision_model(dtype):
    """diffusers' script leaves them in bfloat16, which has 3 digits: Adam's small steps are rounded away."""
    model = prior().to(dtype)
    add_lora(model, rank=2, targets="all", dora=True)
    train_a_little(model, size=0.05)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert model(*inputs(dtype)).dtype == dtype
    model(*inputs(dtype)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora_parameters(model))
    # the same in float32, to see that the result is right
    full = prior()
    add_lora(full, rank=2, targets="all", dora=True)
    full.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    assert rel(model(*inputs(dtype)).float(), full(*(x.to(dtype).float() for x in inputs()))) < 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_changes_the_result_by_rounding_only(dora):
    """Under autocast the float32 parameters get float32 gradients."""
    model = with_lora(dora=dora)
    expected = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs())
    assert rel(found.float(), expected) < 0.1
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))


def test_activation_checkpointing_gives_the_same_gradients():
    """Blocks may be recomputed in the backward pass. use_reentrant=False, because no input of the first block needs a
    gradient."""
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *x):
            return checkpoint(self.block, *x, use_reentrant=False)

    model = with_lora(targets="all")
    model(*inputs()).square().mean().backward()
    expected = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad()
    for blocks in (model.res_blocks, model.attention_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = Checkpointed(block)
    model(*inputs()).square().mean().backward()
    found = [p.grad for p in lora_parameters(model)]
    assert len(found) == len(expected) and all(any(torch.equal(f, e) for e in expected) for f in found)


def test_torch_compile_sees_one_graph():
    """A graph break in each LoRALayer would undo what compiling gains. This backend needs no C++ compiler."""
    model = with_lora(dora=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)


def test_down_starts_by_kaimings_rule():
    """Uniform within 1/sqrt(inputs), like nn.Linear. Stable Cascade's trainer draws `up` from N(0, 1), so it starts
    with noise."""
    model = nn.Sequential(nn.Linear(400, 10))
    add_lora(model, rank=8, targets="0")
    down = model[0].adapters["default"].down
    assert down.abs().max() <= 1 / 20 and down.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


# ----- which layers ----------------------------------------------------------------------------------

def test_presets_mean_exactly_these_layers():
    """The names are tested, not only their number: a reader must see what is trained."""
    mlp = [f"attention_blocks.{i}.text_mapper" for i in range(2)] + \
          [f"res_blocks.{i}.{part}" for i in range(2) for part in ("expand", "contract")]
    rest = ["embed", "embed_text.0", "embed_text.2", "head"] + [f"timestep_blocks.{i}.mapper" for i in range(2)]
    assert sorted(add_lora(prior(), targets="attention")) == sorted(ATTENTION)
    assert sorted(add_lora(prior(), targets="attention+mlp")) == sorted(ATTENTION + mlp)
    assert sorted(add_lora(prior(), targets="all")) == sorted(ATTENTION + mlp + rest)


def test_a_regular_expression_chooses_layers():
    """It is searched in the names. Layers that it does not match stay plain."""
    model = prior()
    assert add_lora(model, targets=r"blocks\.1\.(query|mapper)$") == ["timestep_blocks.1.mapper",
                                                                      "attention_blocks.1.query"]
    assert isinstance(model.attention_blocks[0].query, nn.Linear)


def test_the_table_of_names_agrees_with_the_one_for_weights():
    """lora.py has its own table, so that it works when copied alone. loading/names.py has the one for whole models."""
    model = prior(depth=3)
    table = {ours: (theirs, kind) for theirs, (ours, kind) in name_table(model).items()}
    for name in lora.find_layers(model)[0]:
        found = lora.diffusers_name(name)
        assert (f"{found}.weight", "1x1" if found in lora.CONVOLUTIONS else "") == table[f"{name}.weight"]


def test_official_attention_is_128_layers_and_256_tensors():
    """And 1 % of the model's parameters. On the meta device, without memory."""
    with torch.device("meta"):
        model = StageC()
    names = add_lora(model, rank=8)
    count = sum(p.numel() for p in lora_parameters(model))
    assert len(names) == 128 and len(lora_parameters(model)) == 256 and count == 128 * 8 * 2 * 1536
    assert count / sum(p.numel() for p in model.parameters()) < 0.01


def test_targets_that_match_nothing_stop_and_say_what_there_is():
    """A silent no-op looks like training. For example, OneTrainer's presets for U-Nets match nothing here."""
    with pytest.raises(ValueError,
                       match=r"'down_blocks' match no layer.*res_blocks.N.expand x2.*attention_blocks.N.query x2"):
        add_lora(prior(), targets="down_blocks")
    with pytest.raises(ValueError, match="neither attention, .* nor a regular expression"):
        add_lora(prior(), targets="(")
    with pytest.raises(ValueError, match="rank 0"):
        add_lora(prior(), rank=0)
    with pytest.raises(ValueError, match="alpha"):
        add_lora(prior(), alpha=-1.0)


def test_grouped_convolutions_are_refused_or_left_out():
    """OneTrainer adds a full convolution to a depthwise one, which no merge can represent."""
    with pytest.raises(ValueError, match="res_blocks.0.depthwise is a convolution in 16 groups"):
        add_lora(prior(), targets="depthwise")
    assert not any("depthwise" in name for name in add_lora(prior(), targets="all"))
    assert not any("depthwise" in name for name in add_lora(prior(), targets="res_blocks"))


def test_layers_that_are_never_called_are_refused():
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj: a LoRA there would do nothing."""
    model = nn.ModuleDict(dict(attn=nn.MultiheadAttention(8, 2), mlp=nn.Linear(8, 8)))
    assert add_lora(model, targets="all") == ["mlp"]
    with pytest.raises(ValueError, match="nn.MultiheadAttention"):
        add_lora(nn.ModuleDict(dict(attn=nn.MultiheadAttention(8, 2))), targets="all")
    with pytest.raises(ValueError, match="'reflect'"):
        add_lora(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), targets="all")


# ----- several, on, off, merged, removed -------------------------------------------------------------

def two_loras():
    """A model with LoRAs "a" and "b". They share some layers."""
    model = prior()
    add_lora(model, rank=2, alpha=3.0, name="a")
    add_lora(model, rank=3, targets="attention+mlp", name="b")
    return train_a_little(model)


def layer_of_two(dora=False):
    """One layer with LoRAs "a" and "b", whose contributions can be added up."""
    model = nn.Sequential(nn.Linear(6, 5))
    add_lora(model, rank=2, targets="0", name="a", dora=dora)
    add_lora(model, rank=3, targets="0", name="b")
    return train_a_little(model), torch.randn(4, 6)


@pytest.mark.parametrize("dora", [False, True])
def test_several_loras_add_up(dora):
    """y = base + scale_a (a - base) + scale_b (b - base). The order of adding does not matter."""
    model, x = layer_of_two(dora)
    disable(model)
    base = model(x)
    enable(model, "a")
    a = model(x) - base
    disable(model, "a")
    enable(model, "b")
    b = model(x) - base
    enable(model)
    torch.testing.assert_close(model(x), base + a + b)
    set_scale(model, 0.5, "a")
    set_scale(model, -2.0, "b")
    torch.testing.assert_close(model(x), base + 0.5 * a - 2 * b)


def test_scale_0_and_disabled_are_the_base_model():
    """Bit for bit, so an image without LoRA needs no second model."""
    model, expected = two_loras(), base_output()
    assert not torch.allclose(model(*inputs()), expected)
    disable(model)
    assert torch.equal(model(*inputs()), expected)
    enable(model)
    set_scale(model, 0)
    assert torch.equal(model(*inputs()), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_unmerged_and_unmerge_returns_the_bits(dora):
    """W + D - D is not W in floating point, so the old weights are kept, not computed."""
    model = two_loras()
    add_lora(model, rank=2, targets="all", name="c", dora=dora)
    train_a_little(model, "c")
    set_scale(model, 0.7, "c")
    before, expected = bits(model), model(*inputs())
    merge(model)
    assert rel(model(*inputs()), expected) < 1e-5
    assert not same(bits(model), before)
    unmerge(model)
    assert same(bits(model), before) and torch.equal(model(*inputs()), expected)
    set_scale(model, 0.0)                                # possible again, and changes the output
    assert torch.equal(model(*inputs()), base_output())


def test_merging_one_of_two_and_then_the_other_is_merging_both():
    """The sum always starts from the old weights, so no rounding accumulates."""
    model = two_loras()
    expected = model(*inputs())
    merge(model, "a")
    assert rel(model(*inputs()), expected) < 1e-5
    merge(model, "b")
    found = lora_formats.base_state_dict(model)
    other = two_loras()
    merge(other)
    assert same(found, lora_formats.base_state_dict(other))


def test_a_half_precision_merge_is_rounded_once_and_undone_exactly():
    """float16 weights become the float32 sum, rounded."""
    model = with_lora().half()
    before = bits(model)
    layer = model.attention_blocks[1].key
    expected = (layer.base.weight.float() + layer.adapters["default"].delta(layer.base.weight)).half()
    merge(model)
    assert torch.equal(layer.base.weight, expected)
    unmerge(model)
    assert same(bits(model), before)


def test_what_would_have_no_effect_while_merged_is_refused():
    """The weights contain the old sum: a new scale would change nothing, and nobody would notice."""
    model = two_loras()
    merge(model)
    for call in (lambda: set_scale(model, 0.5), lambda: enable(model), lambda: disable(model, "a"),
                 lambda: lora_formats.base_hash(model), lambda: lora_formats.load_lora(model, {}, "c"),
                 lambda: add_lora(model, name="c"), lambda: load_lora(model, {}, "c")):
        with pytest.raises(ValueError, match="unmerge"):
            call()
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)
    model, _ = layer_of_two(dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        merge(model, "b")


def test_remove_gives_the_plain_model_back():
    """Old names, old bits, old classes, whether it was merged or not: for saving, or for the next LoRA."""
    for merged in (False, True):
        model, before = two_loras(), bits(prior())
        if merged:
            merge(model)
        remove(model, "a")
        assert not same(bits(model), before) and isinstance(model.res_blocks[0].expand, LoRALayer)
        remove(model)
        assert same(bits(model), before) and list(model.state_dict()) == list(before)
        assert not any(isinstance(module, LoRALayer) for module in model.modules())
        assert to_diffusers(model.state_dict(), model)


def test_the_signature_changes_with_every_change():
    """Code that keeps results of the layers compares it. After a merge for good the model is plain, but different."""
    model, seen = prior(), []

    def changed(call=lambda: None, yes=True):
        call()
        seen.append(lora.signature(model))
        assert seen[-1] == lora.signature(model) and (seen[-1] not in seen[:-1]) == yes
    changed()
    changed(lambda: add_lora(model, name="a"))
    changed(lambda: add_lora(model, name="b"))
    changed(lambda: train_a_little(model))
    changed(lambda: set_scale(model, 0.5, "a"))
    changed(lambda: set_scale(model, 0.5, "a"), yes=False)
    changed(lambda: disable(model, "b"))
    changed(lambda: merge(model))
    changed(lambda: unmerge(model))
    changed(lambda: load_lora(model, lora_state_dict(model, "a"), "a", scale=0.5))
    changed(lambda: remove(model, "b"))
    changed(lambda: (remove(model, "a"), add_lora(model, name="a"), set_scale(model, 0.5)))
    changed(lambda: lora.merge_and_unload(model))
    assert not isinstance(model.attention_blocks[0].query, LoRALayer)
    model(*inputs())
    changed(yes=False)


def test_wrong_names_are_refused():
    """The error is one line with the existing names."""
    model = two_loras()
    with pytest.raises(ValueError, match="no LoRA called 'c', only a, b"):
        set_scale(model, 1.0, "c")
    with pytest.raises(ValueError, match="there is a LoRA 'a' already"):
        add_lora(model, name="a")
    for name in ("a.b", "", "keys", "pop"):
        with pytest.raises(ValueError, match="cannot name a LoRA"):
            add_lora(model, name=name)
    with pytest.raises(ValueError, match="use add_lora or load_lora first"):
        lora_parameters(prior())


def test_a_frozen_lora_stays_frozen_beside_another():
    """Adding a LoRA freezes only the base. So one can train on top of a LoRA, or keep an EMA of it in the model."""
    model = prior()
    add_lora(model, name="first")
    for parameter in lora_parameters(model, "first"):
        parameter.requires_grad_(False)
    add_lora(model, name="second")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lora_parameters(model, "second")}


def test_a_copy_of_the_model_has_its_own_lora():
    """The EMA is made by copy.deepcopy."""
    model = with_lora()
    ema, expected = copy.deepcopy(model), model(*inputs())
    train_a_little(model)
    assert torch.equal(ema(*inputs()), expected)


# ----- its own files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(targets="all"), dict(targets="all", dora=True)], ids=str)
def test_a_saved_lora_comes_back_as_it_was(options, tmp_path):
    """From a file and from lora_state_dict. alpha is neither the rank nor a round number, so losing it would show."""
    model = with_lora(alpha=math.pi, **options)
    save_lora(model, tmp_path / "l.safetensors")
    for source in (tmp_path / "l.safetensors", str(tmp_path / "l.safetensors"), lora_state_dict(model)):
        back = loaded(source)
        assert same(back.state_dict(), model.state_dict()) and torch.equal(back(*inputs()), model(*inputs()))
        assert {adapter.alpha for _, adapter in lora.adapters(back)} == {math.pi}


def test_both_writers_write_the_same_tensors(tmp_path):
    """lora.py is enough for a file of diffusers. The writer for all formats only adds entries to the metadata."""
    model = with_lora(targets="all", dora=True)
    save_lora(model, tmp_path / "a.safetensors")
    lora_formats.save_lora(model, tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))
    with safe_open(tmp_path / "a.safetensors", "pt") as a, safe_open(tmp_path / "b.safetensors", "pt") as b:
        assert a.metadata() == {key: b.metadata()[key] for key in ("format", "lora_adapter_metadata")}


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    """The error is one line. For files of other programs it names the function that reads them."""
    model, tensors = prior(), lora_state_dict(with_lora())
    before = bits(model)
    lora_formats.save_lora(with_lora(), tmp_path / "kohya.safetensors", to="kohya")
    shape = r"attention_blocks.0.query is \(16, 16\), the file has down \(4, 16\)"
    up = "attention_blocks.0.query.lora_up.weight"
    for source, match in ((tmp_path / "kohya.safetensors", "24 of 24 tensors .*loading/lora_formats.py"),
                          ({}, "0 of 0 tensors"), ({**tensors, "more": torch.zeros(1)}, r"1 of 25 tensors .*\(more\)"),
                          ({**tensors, up: torch.zeros(16, 3)}, shape + r", up \(16, 3\)$"),
                          ({**tensors, up: torch.zeros(4, 16)}, shape + r", up \(4, 16\)$"),
                          ({name: t for name, t in tensors.items() if name != up}, shape + "$")):
        with pytest.raises(ValueError, match=match) as error:
            load_lora(model, source)
        assert "\n" not in str(error.value) and same(bits(model), before)


def test_lora_py_saves_and_loads_when_copied_alone(tmp_path):
    """With safetensors and nothing of ours: a Stage C of any origin, in the names that diffusers expects.

    test_standalone.py shows that adding, merging and lora_state_dict need torch only.
    """
    shutil.copy(lora.__file__, tmp_path)
    script = """
import sys
import torch, safetensors.torch
sys.path.insert(0, ".")
import lora
from torch import nn
def model():
    torch.manual_seed(0)
    block = nn.ModuleDict(dict(query=nn.Linear(4, 4), out=nn.Linear(4, 4)))
    return nn.ModuleDict(dict(head=nn.Linear(4, 2), attention_blocks=nn.ModuleList([block])))
a, b, x = model(), model(), torch.randn(3, 4)
lora.add_lora(a, rank=2, alpha=3.0, targets="all")
for parameter in lora.lora_parameters(a):
    nn.init.normal_(parameter)
lora.save_lora(a, "a.safetensors")
names = set(safetensors.torch.load_file("a.safetensors"))
assert {"prior.out.1.lora_A.weight", "prior.blocks.2.attention.to_q.lora_B.weight"} < names and len(names) == 6
assert lora.load_lora(b, "a.safetensors") == ["head", "attention_blocks.0.query", "attention_blocks.0.out"]
query = [m.attention_blocks[0]["query"](x) for m in (a, b)]
assert torch.equal(*query) and not torch.equal(query[0], model().attention_blocks[0]["query"](x))
lora.merge_and_unload(b)
torch.testing.assert_close(b.attention_blocks[0]["query"](x), query[0])
"""
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ----- diffusers and peft as oracles -----------------------------------------------------------------

def oracle(model: StageC):
    """diffusers' prior with the same weights. Later versions have the module in `deprecated`."""
    pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed: pip install diffusers")
    pytest.importorskip("peft", reason="compares with peft, which is not installed: pip install peft")
    for package in ("pipelines.deprecated", "pipelines"):
        try:
            kind = importlib.import_module(f"diffusers.{package}.wuerstchen.modeling_wuerstchen_prior").WuerstchenPrior
        except ImportError:
            continue
        theirs = kind(**{key: value for key, value in config_to_diffusers(model).items()
                         if not key.startswith("_")})
        theirs.load_state_dict(to_diffusers(model.state_dict(), model))
        return theirs.eval()
    pytest.skip("this version of diffusers has no Würstchen any more")


@pytest.mark.parametrize("options", [dict(alpha=6.0), dict(alpha=3.0, rslora=True), dict(alpha=6.0, dora=True),
                                     dict(alpha=6.0, targets="all"), dict(alpha=6.0, targets="all", dora=True)],
                         ids=str)
@torch.no_grad()
def test_diffusers_loads_our_file_and_gives_the_same(options, tmp_path):
    """alpha is not the rank here. diffusers reads it from the metadata, which its own trainer does not write."""
    theirs, model = oracle(prior()), with_lora(**options)
    without = theirs(*inputs())
    save_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_adapter(str(tmp_path), prefix="prior", weight_name="pytorch_lora_weights.safetensors")
    assert rel(model(*inputs()), theirs(*inputs())) < 1e-5
    assert rel(theirs(*inputs()), without) > 1e-2


@torch.no_grad()
def test_diffusers_pipeline_loads_our_file(tmp_path):
    """pipeline.load_lora_weights, as a user calls it, with layers of different ranks and alphas."""
    theirs = oracle(prior())
    pipelines = importlib.import_module(type(theirs).__module__.rpartition(".")[0])
    scheduler = importlib.import_module("diffusers").DDPMWuerstchenScheduler()
    pipeline = pipelines.WuerstchenPriorPipeline(tokenizer=None, text_encoder=None, prior=theirs, scheduler=scheduler)
    tensors = lora_state_dict(with_lora())
    tensors["attention_blocks.0.key.alpha"] = torch.tensor(1.25)
    tensors["attention_blocks.1.out.lora_down.weight"] = tensors["attention_blocks.1.out.lora_down.weight"][:3]
    tensors["attention_blocks.1.out.lora_up.weight"] = tensors["attention_blocks.1.out.lora_up.weight"][:, :3]
    model = loaded(tensors)
    save_lora(model, tmp_path / "l.safetensors")
    pipeline.load_lora_weights(str(tmp_path), weight_name="l.safetensors")
    assert rel(model(*inputs()), theirs(*inputs())) < 1e-5


@pytest.mark.parametrize("config", [dict(lora_alpha=6), dict(lora_alpha=3, use_rslora=True),
                                    dict(lora_alpha=6, use_dora=True)],
                         ids=str)
@torch.no_grad()
def test_we_load_what_peft_and_diffusers_wrote(config, tmp_path):
    """peft's LoRA on diffusers' prior, saved by diffusers, gives the same output here."""
    theirs = oracle(prior())
    from peft import LoraConfig
    theirs.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config),
                       adapter_name="style")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_lora_adapter(str(tmp_path), adapter_name="style", weight_name="bare.safetensors")
    with safe_open(tmp_path / "bare.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"])
    # as diffusers' pipelines save
    importlib.import_module("diffusers.loaders").StableDiffusionLoraLoaderMixin.write_lora_layers(
        {f"prior.{name}": tensor for name, tensor in tensors.items()}, str(tmp_path), is_main_process=True,
        weight_name="prior.safetensors", save_function=None, safe_serialization=True,
        lora_adapter_metadata={f"prior.{key}": value for key, value in config.items()})
    for name in ("bare", "prior"):
        assert rel(loaded(tmp_path / f"{name}.safetensors")(*inputs()), theirs(*inputs())) < 1e-5


def test_gradients_equal_pefts():
    """Training is the same as well, including DoRA's detached norm."""
    for dora in (False, True):
        theirs, model = oracle(prior()), prior()
        from peft import LoraConfig
        theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, use_dora=dora,
                                      target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        add_lora(model, rank=4, alpha=6.0, dora=dora)
        train_a_little(model)
        ours = {lora.diffusers_name(path): adapter for path, adapter in lora.adapters(model)}
        kinds = {"lora_A.default.weight": "down", "lora_B.default.weight": "up",
                 "lora_magnitude_vector.default.weight": "magnitude"}
        pairs = [(parameter, getattr(ours[name.removesuffix("." + kind)], attribute))
                 for name, parameter in theirs.named_parameters() for kind, attribute in kinds.items()
                 if name.endswith(kind)]
        assert len(pairs) == len(lora_parameters(model))
        with torch.no_grad():
            for parameter, mine in pairs:
                parameter.copy_(mine.view_as(parameter))
        for network in (theirs, model):
            network(*inputs()).square().mean().backward()
        for parameter, mine in pairs:
            torch.testing.assert_close(mine.grad.view_as(parameter), parameter.grad, rtol=1e-3, atol=1e-6)
