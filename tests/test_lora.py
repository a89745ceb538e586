"""LoRA: its formula, that nothing else changes, and that files mean the same in every program that reads them."""
import copy
import importlib
import inspect
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from loading import files
import lora
from loading import weights
from loading.lora_formats import base_hash, base_state_dict, load_lora, save_lora
from loading.names import config_to_diffusers, name_table, to_diffusers
from helpers import manifest, rel
from lora import (LoRALayer, add_lora, disable, enable, lora_parameters, lora_state_dict, merge, remove, set_scale,
                  unmerge)
from tools import lora as tool
from stage_c import StageC

SIZES = dict(c_in=4, c=16, c_cond=12, c_timestep=8, depth=2, heads=2, dropout=0.0)
ATTENTION = [f"attention_blocks.{i}.{part}" for i in range(2) for part in ("query", "key", "value", "out")]
FORMATS = ["diffusers", "kohya", "comfy", "original", "ours"]


@torch.no_grad()
def prior(seed=0, **sizes) -> StageC:
    """A tiny Stage C with numbers everywhere: the zeros it starts with would hide most of it."""
    torch.manual_seed(seed)
    model = StageC(**{**SIZES, **sizes})
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(parameter[0].numel(), 4)))
    model.head.weight[SIZES["c_in"]:] *= 0.2             # keeps |1 - b|, by which is divided, away from zero
    model.head.bias[SIZES["c_in"]:] = -0.3
    return model.eval()


def inputs(dtype=torch.float32):
    """x_t (2, 4, 3, 5), t (2,), text (2, 6, 12)."""
    random = torch.Generator().manual_seed(7)
    return (torch.randn(2, 4, 3, 5, generator=random).to(dtype), torch.tensor([0.25, 0.75]).to(dtype),
            torch.randn(2, 6, 12, generator=random).to(dtype))


def base_output() -> torch.Tensor:
    """Of the model without LoRA. Frozen, as torch's convolutions choose another kernel, which rounds otherwise, if not."""
    return prior().requires_grad_(False)(*inputs())


@torch.no_grad()
def train_a_little(model, name=None, size=0.1):
    """Numbers in `up` (and DoRA's magnitudes), as training would leave them: the LoRA then does something."""
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


# ----- the formula -----------------------------------------------------------------------------------

def test_the_start_is_the_base_model_bit_for_bit():
    """up = 0: whatever the settings, step 0 paints the untouched model's pictures."""
    expected = base_output()
    for options in (dict(), dict(targets="all"), dict(rslora=True), dict(dora=True, targets="all"), dict(dropout=0.5)):
        model = prior()
        add_lora(model, **options)
        assert torch.equal(model(*inputs()), expected), options


def test_linear_equals_the_formula():
    """y = W x + b + alpha / rank * up down x, written out; alpha / rank is not 1 here."""
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
    """down (k x k, with the base's stride, padding and dilation), then up (1 x 1), is one convolution with up @ down."""
    model = nn.Sequential(nn.Conv2d(4, 6, **options))
    plain = copy.deepcopy(model[0])
    add_lora(model, rank=2, alpha=3.0, targets="0")
    train_a_little(model)
    adapter, x = model[0].adapters["default"], torch.randn(2, 4, 7, 8)
    weight = plain.weight + 1.5 * torch.einsum("or,rikl->oikl", adapter.up[:, :, 0, 0], adapter.down)
    expected = F.conv2d(x, weight, plain.bias, plain.stride, plain.padding, plain.dilation)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_alpha_is_the_rank_unless_given():
    """OneTrainer and kohya have 1: at rank 16 a LoRA of theirs starts out 16 times weaker than one expects."""
    model = prior()
    add_lora(model, rank=4)
    add_lora(model, rank=4, alpha=1.0, name="weak")
    layer = model.attention_blocks[0].query
    assert layer.adapters["default"].alpha == 4 and layer.adapters["weak"].alpha == 1


def test_rslora_divides_by_the_root_of_the_rank():
    """It is stored as another alpha, so that alpha / rank is right in every file."""
    model = prior()
    add_lora(model, rank=4, alpha=3.0, rslora=True)
    adapter = model.attention_blocks[0].query.adapters["default"]
    assert adapter.alpha / adapter.rank == 3.0 / math.sqrt(4)


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Conv2d(5, 7, 3, padding=1)])
def test_dora_equals_its_formula(layer):
    """W' = m V / |V| with V = W + s up @ down, by rows; m's gradient is that of this formula, V's has |V| as a constant."""
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
    """And only in front of `down`: the base sees its whole input."""
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
    """A new module starts in training mode: with dropout, an eval model would then paint other pictures each time."""
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
    assert same(base_state_dict(model), before)
    assert all(p.grad is not None and p.grad.any() for p in parameters), gradients


def test_up_learns_in_step_1_and_down_from_step_2():
    """The gradient of down is up^T g: 0 at first, and no more once up has moved. Were both 0, neither ever would."""
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
    """diffusers' script leaves them in bfloat16, which has 3 digits: Adam's small steps are rounded to nothing."""
    model = prior().to(dtype)
    add_lora(model, rank=2, targets="all", dora=True)
    train_a_little(model, size=0.05)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert model(*inputs(dtype)).dtype == dtype
    model(*inputs(dtype)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora_parameters(model))
    # the same in float32, to see that it is right and not only runs
    full = prior()
    add_lora(full, rank=2, targets="all", dora=True)
    full.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    assert rel(model(*inputs(dtype)).float(), full(*(x.to(dtype).float() for x in inputs()))) < 0.1


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_changes_the_result_by_rounding_only(dora):
    """Under autocast too, gradients arrive in float32 parameters."""
    model = with_lora(dora=dora)
    expected = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs())
    assert rel(found.float(), expected) < 0.1
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))


def test_activation_checkpointing_gives_the_same_gradients():
    """Blocks may be recomputed in the backward pass. use_reentrant=False, as no input of the first block needs a gradient."""
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
    """No graph break in a wrapped layer, or compiling would gain nothing. (No C++ compiler is needed for this backend.)"""
    model = with_lora(dora=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-5)


def test_down_starts_by_kaimings_rule():
    """Uniform, within 1/sqrt(inputs), as nn.Linear; Stable Cascade's trainer draws `up` from N(0, 1), and so starts in noise."""
    model = nn.Sequential(nn.Linear(400, 10))
    add_lora(model, rank=8, targets="0")
    down = model[0].adapters["default"].down
    assert down.abs().max() <= 1 / 20 and down.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


# ----- which layers ----------------------------------------------------------------------------------

def test_presets_mean_exactly_these_layers():
    """Names, not numbers of layers: what is trained must be seen."""
    mlp = [f"attention_blocks.{i}.text_mapper" for i in range(2)] + \
          [f"res_blocks.{i}.{part}" for i in range(2) for part in ("expand", "contract")]
    rest = ["embed", "embed_text.0", "embed_text.2", "head"] + [f"timestep_blocks.{i}.mapper" for i in range(2)]
    assert sorted(add_lora(prior(), targets="attention")) == sorted(ATTENTION)
    assert sorted(add_lora(prior(), targets="attention+mlp")) == sorted(ATTENTION + mlp)
    assert sorted(add_lora(prior(), targets="all")) == sorted(ATTENTION + mlp + rest)


def test_a_regular_expression_chooses_layers():
    """Searched in names; what it does not match stays a plain layer."""
    model = prior()
    assert add_lora(model, targets=r"blocks\.1\.(query|mapper)$") == ["timestep_blocks.1.mapper",
                                                                      "attention_blocks.1.query"]
    assert isinstance(model.attention_blocks[0].query, nn.Linear)


def test_the_table_of_names_is_that_of_weights():
    """lora.py carries its own, to be copied alone; here it is held against the one that weights.py loads models by."""
    model = prior(depth=3)
    table = {ours: (theirs, kind) for theirs, (ours, kind) in name_table(model).items()}
    for name in lora.find_layers(model)[0]:
        found = lora.diffusers_name(name)
        assert (f"{found}.weight", "1x1" if found in lora.CONVOLUTIONS else "") == table[f"{name}.weight"]


def test_official_attention_is_128_layers_and_256_tensors():
    """And its parameters are 1 % of the model's. On the meta device, without memory."""
    with torch.device("meta"):
        model = StageC()
    names = add_lora(model, rank=8)
    count = sum(p.numel() for p in lora_parameters(model))
    assert len(names) == 128 and len(lora_parameters(model)) == 256 and count == 128 * 8 * 2 * 1536
    assert count / sum(p.numel() for p in model.parameters()) < 0.01


def test_targets_that_match_nothing_stop_and_say_what_there_is():
    """A silent no-op looks like training: OneTrainer's presets for U-Nets, say, match nothing here."""
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
    """OneTrainer trains a full convolution beside a depthwise one, which no merge can represent."""
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
    """A model with LoRAs "a" and "b", on different layers, which have some in common."""
    model = prior()
    add_lora(model, rank=2, alpha=3.0, name="a")
    add_lora(model, rank=3, targets="attention+mlp", name="b")
    return train_a_little(model)


def layer_of_two(dora=False):
    """One layer with LoRAs "a" and "b", in which contributions can be added up."""
    model = nn.Sequential(nn.Linear(6, 5))
    add_lora(model, rank=2, targets="0", name="a", dora=dora)
    add_lora(model, rank=3, targets="0", name="b")
    return train_a_little(model), torch.randn(4, 6)


@pytest.mark.parametrize("dora", [False, True])
def test_several_loras_add_up(dora):
    """y = base + scale_a (a - base) + scale_b (b - base): the order in which they were added does not matter."""
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
    """Switched off, the base is bit for bit itself; so a picture without LoRA needs no second model."""
    model, expected = two_loras(), base_output()
    assert not torch.allclose(model(*inputs()), expected)
    disable(model)
    assert torch.equal(model(*inputs()), expected)
    enable(model)
    set_scale(model, 0)
    assert torch.equal(model(*inputs()), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_equals_unmerged_and_unmerge_returns_the_bits(dora):
    """W + D - D is not W in floating point: the old weights are kept, not computed."""
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
    set_scale(model, 0.0)                                # possible again, and has its effect
    assert torch.equal(model(*inputs()), base_output())


def test_merging_one_of_two_and_then_the_other_is_merging_both():
    """The sum is always made from the old weights, so there is no rounding on the way."""
    model = two_loras()
    expected = model(*inputs())
    merge(model, "a")
    assert rel(model(*inputs()), expected) < 1e-5
    merge(model, "b")
    found = base_state_dict(model)
    other = two_loras()
    merge(other)
    assert same(found, base_state_dict(other))


def test_a_half_precision_merge_is_rounded_once_and_undone_exactly():
    """float16 weights: the float32 sum, rounded."""
    model = with_lora().half()
    before = bits(model)
    layer = model.attention_blocks[1].key
    expected = (layer.base.weight.float() + layer.adapters["default"].delta(layer.base.weight)).half()
    merge(model)
    assert torch.equal(layer.base.weight, expected)
    unmerge(model)
    assert same(bits(model), before)


def test_what_would_have_no_effect_while_merged_is_refused():
    """The weights hold the old sum: a new scale would change nothing, and nobody would notice."""
    model = two_loras()
    merge(model)
    for call in (lambda: set_scale(model, 0.5), lambda: enable(model), lambda: disable(model, "a"),
                 lambda: base_hash(model),
                 lambda: add_lora(model, name="c"), lambda: load_lora(model, {}, "c")):
        with pytest.raises(ValueError, match="unmerge"):
            call()
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(model)
    model, _ = layer_of_two(dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        merge(model, "b")


def test_remove_gives_the_plain_model_back():
    """Old names, old bits, old classes: for saving, or for the next LoRA. Merged or not."""
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


def test_base_state_dict_has_the_old_names_while_wrapped():
    """For saving the base beside the LoRA, and for base_hash."""
    assert same(base_state_dict(two_loras()), bits(prior()))
    assert list(base_state_dict(two_loras())) == list(prior().state_dict())


def test_base_hash_knows_weights_not_precision_or_lora():
    """A file says on which model it was trained; a float16 file and a float32 copy of it are the same model."""
    half = prior().half()
    assert base_hash(half) == base_hash(copy.deepcopy(half).float())
    assert base_hash(prior()) == base_hash(two_loras()) != base_hash(prior(seed=1))


def test_wrong_names_are_refused():
    """One line each, with the names there are."""
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
    """To train on top of a LoRA, or to keep averaged ones in the model: nothing but the base is frozen by adding one."""
    model = prior()
    add_lora(model, name="first")
    for parameter in lora_parameters(model, "first"):
        parameter.requires_grad_(False)
    add_lora(model, name="second")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lora_parameters(model, "second")}


def test_a_copy_of_the_model_has_its_own_lora():
    """copy.deepcopy is how averaged weights are made."""
    model = with_lora()
    ema, expected = copy.deepcopy(model), model(*inputs())
    train_a_little(model)
    assert torch.equal(ema(*inputs()), expected)


# ----- files -----------------------------------------------------------------------------------------

def loaded(source, scale=1.0, **sizes) -> StageC:
    model = prior(**sizes)
    load_lora(model, source, scale=scale)
    return model


def alphas(model) -> list:
    """The different ones, in order."""
    return sorted({adapter.alpha for _, adapter in lora.adapters(model)})


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_comes_back_as_it_was(to, targets, tmp_path):
    """alpha is not the rank and not a round number: a format that lost it would show."""
    model = with_lora(alpha=math.pi, targets=targets)
    save_lora(model, tmp_path / "l.safetensors", to=to)
    back = loaded(tmp_path / "l.safetensors")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(*inputs()), model(*inputs())) and alphas(back) == pytest.approx(alphas(model), rel=1e-15)
    assert alphas(back) == alphas(model) or to == "original"      # there it is multiplied by 3, for rank 3r


def test_files_have_the_names_that_other_programs_expect(tmp_path):
    """One name of each kind per format; in diffusers' it is 8 tensors per block, 256 at the official size."""
    model = with_lora(targets="all")
    expected = {
        "diffusers": ["prior.blocks.2.attention.to_q.lora_A.weight", "prior.blocks.5.attention.to_out.0.lora_B.weight",
                      "prior.blocks.3.channelwise.4.lora_A.weight", "prior.blocks.4.mapper.lora_B.weight",
                      "prior.blocks.2.kv_mapper.1.lora_A.weight", "prior.projection.lora_A.weight",
                      "prior.cond_mapper.2.lora_B.weight"],
        "kohya": ["lora_unet_blocks_2_attention_to_q.lora_down.weight",
                  "lora_unet_blocks_5_attention_to_out_0.lora_up.weight",
                  "lora_unet_blocks_2_attention_to_k.alpha", "lora_unet_out_1.lora_down.weight"],
        "comfy": ["diffusion_model.blocks.2.attention.to_q.lora_A.weight",
                  "diffusion_model.blocks.2.attention.to_q.alpha"],
        "original": ["blocks.2.attention.attn.in_proj.lora_down.weight",
                     "blocks.5.attention.attn.out_proj.lora_up.weight",
                     "blocks.5.attention.attn.in_proj.alpha", "blocks.0.channelwise.0.lora_down.weight"],
        "ours": ["attention_blocks.0.query.lora_down.weight", "attention_blocks.1.out.alpha"]}
    for to, names in expected.items():
        save_lora(model, tmp_path / f"{to}.safetensors", to=to)
        assert set(names) <= load_file(tmp_path / f"{to}.safetensors").keys(), to
    file = load_file(tmp_path / "diffusers.safetensors")
    assert file["prior.projection.lora_A.weight"].shape == (4, 4, 1, 1)
    assert file["prior.projection.lora_B.weight"].shape == (16, 4, 1, 1)
    assert file["prior.blocks.2.attention.to_q.lora_A.weight"].shape == (4, 16)
    save_lora(with_lora(), tmp_path / "attention.safetensors")
    assert len(load_file(tmp_path / "attention.safetensors")) == 8 * SIZES["depth"]


def rename(tensors: dict, *pairs: tuple) -> dict:
    result = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        result[name] = tensor
    return result


OLD = [(f"attention.{new}.lora_{a}", f"attention.processor.{old}_lora.{b}") for a, b in (("A", "down"), ("B", "up"))
       for new, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))]
VARIANTS = {     # what else is found: a format that we write, and how its names differ
    "diffusers of 2023": ("diffusers", OLD),
    "diffusers' U-Net saver": ("diffusers", [("prior.", "unet.")]),
    "peft": ("diffusers", [("prior.", "base_model.model.")]),
    "OneTrainer, original": ("comfy", [("diffusion_model.", "")]),
    "OneTrainer, internal": ("comfy", [("diffusion_model.", "prior."), ("lora_A", "lora_down"), ("lora_B", "lora_up")]),
    "OneTrainer of 2025": ("comfy", [("diffusion_model.", "lora_prior_unet."), ("lora_A", "lora_down"),
                                     ("lora_B", "lora_up")]),
    "OneTrainer of 2024": ("kohya", [("lora_unet_", "lora_prior_unet_")]),
    "thirds of in_proj": ("comfy", [("to_q", "attn.in_proj.0"), ("to_k", "attn.in_proj.1"), ("to_v", "attn.in_proj.2"),
                                    ("to_out.0", "attn.out_proj")]),
    "in_proj_weight": ("original", [("in_proj", "in_proj_weight")]),
    "with prefix": ("original", [("blocks.", "diffusion_model.blocks.")]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_other_programs_are_read(variant, tmp_path):
    """alpha = rank here, as some of them have no place for another."""
    to, pairs = VARIANTS[variant]
    model = with_lora(alpha=4.0)
    save_lora(model, tmp_path / "l.safetensors", to=to)
    tensors = rename(load_file(tmp_path / "l.safetensors"), *pairs)
    assert tensors.keys() != load_file(tmp_path / "l.safetensors").keys()
    assert torch.equal(loaded(tensors)(*inputs()), model(*inputs()))


def test_pickled_files_and_folders_are_read(tmp_path):
    """Files from before safetensors, and folders as diffusers saves them. Nothing in them is executed."""
    model = with_lora(alpha=4.0)
    save_lora(model, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    torch.save(load_file(tmp_path / "folder" / "pytorch_lora_weights.safetensors"), tmp_path / "l.bin")
    for path in (tmp_path / "folder", tmp_path / "l.bin"):
        assert torch.equal(loaded(path)(*inputs()), model(*inputs()))


def test_a_half_precision_file_is_loaded_into_float32_and_converted_as_it_is(tmp_path):
    """Its training can go on; and who only changes names changes no numbers."""
    save_file({name: t.half() for name, t in lora_state_dict(with_lora()).items()}, tmp_path / "l.safetensors")
    assert {p.dtype for p in lora_parameters(loaded(tmp_path / "l.safetensors"))} == {torch.float32}
    tool.convert(tmp_path / "l.safetensors", tmp_path / "m.safetensors", "original")
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for name, t in found.items() if not name.endswith(".alpha")} == {torch.float16}
    assert torch.equal(loaded(tmp_path / "m.safetensors")(*inputs()), loaded(tmp_path / "l.safetensors")(*inputs()))


def test_alpha_of_each_layer_survives_in_metadata_and_tensors(tmp_path):
    """Ranks and alphas may differ by layer: diffusers' metadata then has patterns, the other formats a tensor each."""
    model = with_lora()
    tensors = lora_state_dict(model)
    tensors["attention_blocks.0.key.alpha"] = torch.tensor(1.25)
    tensors["attention_blocks.1.out.lora_down.weight"] = tensors["attention_blocks.1.out.lora_down.weight"][:3]
    tensors["attention_blocks.1.out.lora_up.weight"] = tensors["attention_blocks.1.out.lora_up.weight"][:, :3]
    model = loaded(tensors)
    assert alphas(model) == [1.25, 6.0]
    for to in FORMATS:
        save_lora(model, tmp_path / f"{to}.safetensors", to=to)
        assert rel(loaded(tmp_path / f"{to}.safetensors")(*inputs()), model(*inputs())) < 1e-5, to
    with safe_open(tmp_path / "diffusers.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["prior.lora_alpha"] == 6 and config["prior.alpha_pattern"] == {"^blocks.2.attention.to_k": 1.25}
    assert config["prior.r"] == 4 and config["prior.rank_pattern"] == {"^blocks.5.attention.to_out.0": 3}


def test_alpha_is_the_rank_where_a_file_has_none_or_0():
    """What diffusers and kohya take it to be."""
    tensors = lora_state_dict(with_lora())
    for alpha in (torch.tensor(0.0), None):
        changed = {name: alpha if name.endswith(".alpha") else t for name, t in tensors.items()}
        assert alphas(loaded({name: t for name, t in changed.items() if t is not None})) == [4.0]


def test_rslora_in_metadata_is_read_as_its_alpha(tmp_path):
    """peft divides by sqrt(rank) if use_rslora says so."""
    model = with_lora()
    save_lora(model, tmp_path / "l.safetensors")
    config = {"prior.r": 4, "prior.lora_alpha": 3, "prior.use_rslora": True}
    save_file(load_file(tmp_path / "l.safetensors"), tmp_path / "rs.safetensors",
              {"lora_adapter_metadata": json.dumps(config)})
    assert torch.equal(loaded(tmp_path / "rs.safetensors")(*inputs()), model(*inputs()))     # 3 / sqrt(4) = 6 / 4


def test_fused_in_proj_is_exact_in_both_directions(tmp_path):
    """Split -> fused: rank 3r, block-diagonal. Fused -> split: rows. Each product is compared with the matrix itself."""
    model = with_lora()
    save_lora(model, tmp_path / "fused.safetensors", to="original")
    file = load_file(tmp_path / "fused.safetensors")
    down, up = (file[f"blocks.2.attention.attn.in_proj.lora_{part}.weight"] for part in ("down", "up"))
    assert down.shape == (12, 16) and up.shape == (48, 12)
    block = model.attention_blocks[0]
    expected = torch.cat([layer.adapters["default"].delta(layer.base.weight)
                          for layer in (block.query, block.key, block.value)])
    scale = file["blocks.2.attention.attn.in_proj.alpha"] / 12
    torch.testing.assert_close((scale * (up @ down)).float(), expected.detach())
    # and ranks as before
    assert same(lora_state_dict(loaded(tmp_path / "fused.safetensors")), lora_state_dict(model))


def test_a_lora_trained_on_the_fused_matrix_is_split_by_rows(tmp_path):
    """And fused again, it is what it was: the three share `down`, so the rank stays r and does not become 3r."""
    down, up, name = torch.randn(4, 16), torch.randn(48, 4), "blocks.2.attention.attn.in_proj"
    alpha = torch.tensor(2.0, dtype=torch.float64)
    fused = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    model = loaded(fused)
    block = model.attention_blocks[0]
    rows = torch.cat([layer.adapters["default"].delta(layer.base.weight)
                      for layer in (block.query, block.key, block.value)])
    torch.testing.assert_close(rows.detach(), 0.5 * up @ down)
    save_lora(model, tmp_path / "again.safetensors", to="original")
    assert same(load_file(tmp_path / "again.safetensors"), fused)


def test_a_lora_of_the_query_alone_can_be_fused(tmp_path):
    """The rows of key and value are then 0, and come back with nothing to do."""
    model = with_lora(targets="query")
    save_lora(model, tmp_path / "l.safetensors", to="original")
    assert torch.equal(loaded(tmp_path / "l.safetensors")(*inputs()), model(*inputs()))


def test_dora_is_kept_by_diffusers_format_and_refused_by_the_others(tmp_path):
    """A file without the magnitudes would load everywhere, and be another LoRA."""
    model = with_lora(dora=True, targets="all")
    for to in ("diffusers", "ours"):
        save_lora(model, tmp_path / f"{to}.safetensors", to=to)
        assert rel(loaded(tmp_path / f"{to}.safetensors")(*inputs()), model(*inputs())) < 1e-6
    for to in ("kohya", "comfy", "original"):
        with pytest.raises(ValueError, match="DoRA"):
            save_lora(model, tmp_path / f"{to}.safetensors", to=to)


def test_metadata_says_what_the_file_is(tmp_path):
    """All strings, as safetensors wants them; facts of the training beside what is always there."""
    model = with_lora()
    facts = dict(base_hash=base_hash(model), steps=100, images=24, trigger_words=["a zorp"])
    save_lora(model, tmp_path / "l.safetensors", metadata=facts)
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata | dict(format="pt", format_version="1", rank="4", alpha="6", base_hash=base_hash(prior()),
                           steps="100",
                           images="24", trigger_words='["a zorp"]') == metadata
    assert metadata["targets"] == ", ".join(f"attention_blocks.N.{part} x2"
                                            for part in ("query", "key", "value", "out"))


def test_loading_into_a_live_lora_copies_into_it():
    """diffusers' script, resumed, trains one adapter and loads another. Here the optimizer's own parameters get the numbers."""
    model = prior()
    add_lora(model, rank=4, alpha=6.0, dropout=0.25)
    parameters = lora_parameters(model)
    source = with_lora(rslora=True)
    load_lora(model, lora_state_dict(source))
    assert all(a is b for a, b in zip(lora_parameters(model), parameters))
    assert all(torch.equal(a, b) for a, b in zip(parameters, lora_parameters(source)))
    assert alphas(model) == alphas(source)
    assert model.attention_blocks[0].query.adapters["default"].dropout == 0.25
    with pytest.raises(ValueError, match="8 layers of rank 4, the file 8 of rank 2"):
        load_lora(model, lora_state_dict(with_lora(rank=2)))
    load_lora(model, lora_state_dict(with_lora(rank=2)), name="beside", scale=0.5)
    assert model.attention_blocks[0].query.adapters["beside"].scale == 0.5


def test_a_generic_model_keeps_its_own_names(tmp_path):
    """Only Stage C has a table of names; everything else goes by its own, in dotted and flattened formats."""
    def model():
        torch.manual_seed(1)
        return nn.ModuleDict(dict(embed=nn.Linear(3, 5), conv=nn.Sequential(nn.Conv2d(2, 4, 3))))

    for to in FORMATS:
        there, back = model(), model()
        add_lora(there, rank=2, targets="all")
        train_a_little(there)
        save_lora(there, tmp_path / f"{to}.safetensors", to=to)
        load_lora(back, tmp_path / f"{to}.safetensors")
        assert same(there.state_dict(), back.state_dict())


# ----- files that are refused ------------------------------------------------------------------------

def refused(tensors, match, **sizes):
    """Refused, and the model is as it was."""
    model = prior(**sizes)
    with pytest.raises(ValueError, match=match) as error:
        load_lora(model, tensors)
    assert "\n" not in str(error.value) and "nothing was loaded" in str(error.value)
    assert same(bits(model), bits(prior(**sizes)))


def test_a_file_with_anything_unknown_is_refused_with_counts():
    """diffusers drops what it does not know, and all of a kohya file, with a warning at most: the image is unchanged."""
    tensors = lora_state_dict(with_lora())
    refused({**tensors, "attention_blocks.2.query.lora_down.weight": torch.zeros(4, 16)},
            r"1 of 25 tensors belong to no layer of this model \(attention_blocks.2.query.lora_down.weight\)")
    refused({}, "it is empty")
    refused(tensors, "8 of 8 layers do not fit: attention_blocks.0.query is .24, 24., the file has down .4, 16., .*; ...", c=24)
    refused({name: t for name, t in tensors.items() if "0.query.lora_up" not in name},
            "attention_blocks.0.query is .16, 16., the file has down .4, 16.; nothing was loaded")
    refused({**tensors, "attention_blocks.0.query.lora_up.weight": torch.zeros(16, 3)},
            "1 of 8 layers do not fit: attention_blocks.0.query is .16, 16., the file has down .4, 16., up .16, 3.")
    refused({**tensors, "attention_blocks.0.query.lora_up.weight": torch.zeros(4, 16)},
            "attention_blocks.0.query is .16, 16., the file has down .4, 16., up .4, 16.")
    refused({**tensors, "attention_blocks.0.out.lora_up.weight": torch.full((16, 4), math.nan)},
            "attention_blocks.0.out has NaN")
    refused({**tensors, "prior.blocks.2.attention.to_q.lora_A.weight": torch.zeros(4, 16)},
            "0.query is in the file twice")
    refused({**tensors, "blocks.2.attention.attn.in_proj.lora_down.weight": torch.zeros(4, 16),
             "blocks.2.attention.attn.in_proj.lora_up.weight": torch.zeros(48, 4)},
            "is in the file twice, alone and fused")


@pytest.mark.parametrize("name, looks", [
    ("lora_unet_blocks_2_attention_to_q.hada_w1_a", "another method than LoRA"),
    ("lora_unet_blocks_2_attention_to_q.lokr_w1", "another method than LoRA"),
    ("lora_unet_blocks_2_attention_to_q.dora_scale", "a DoRA in LyCORIS' form"),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "changes a text encoder"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "changes a text encoder"),
    ("bundle_emb.word.clip_g", "learned words"),
    ("weights.0.lora_down", "Stable Cascade's trainer"),
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "for Stable Diffusion"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "for Flux"),
    ("lora_prior_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight", "for Stable Cascade"),
    ("lora_unet_blocks_0_depthwise.lora_down.weight", "grouped convolutions"),
    ("prior.something.lora_A.weight", "for another model"),
    ("cond_mapper.0.weight", "a whole model, not a LoRA")])
def test_a_refused_file_says_what_it_looks_like(name, looks):
    """Alone, or among tensors that do fit: half a LoRA is not what was trained."""
    refused({name: torch.zeros(4, 16)}, f"1 of 1 tensors.*{looks}")
    refused({**lora_state_dict(with_lora()), name: torch.zeros(4, 16)}, f"1 of 25 tensors.*{looks}")


def test_whole_models_are_recognised():
    """Of any stage, some of whose layers have the names that LoRAs of other models have."""
    for model in ("stage_c_v2", "stage_b_v2", "stage_a_vqgan", "text_encoder_bigg"):
        refused({name: torch.zeros(1) for name in manifest(model)}, "it looks like a whole model, not a LoRA")


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    """With the file's name."""
    (tmp_path / "cut.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    torch.save(dict(step=3), tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    save_file(lora_state_dict(with_lora()), tmp_path / "broken.safetensors", {"lora_adapter_metadata": "{"})
    for name in ("cut.safetensors", "other.pt", "empty", "absent.safetensors", "broken.safetensors"):
        refused(tmp_path / name, name)


# ----- the command line ------------------------------------------------------------------------------

def run(capsys, *args) -> str:
    tool.main([str(arg) for arg in args])
    return capsys.readouterr().out


def fails(capsys, match, *args):
    with pytest.raises(SystemExit) as error:
        tool.main([str(arg) for arg in args])
    text = capsys.readouterr().err
    assert error.value.code == 2 and text.count("\n") == 1 and match in text, text


@pytest.mark.parametrize("to", FORMATS)
def test_convert_needs_no_model_and_keeps_the_facts(to, tmp_path, capsys):
    """From every format to every other and back; un-flattening goes by the table of names alone."""
    model = with_lora(targets="all")
    save_lora(model, tmp_path / "a.safetensors", to=to, metadata=dict(steps=7))
    for other in FORMATS:
        run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors", "--to", other)
        assert torch.equal(loaded(tmp_path / f"{other}.safetensors")(*inputs()), model(*inputs()))
        assert "steps: 7" in run(capsys, "info", tmp_path / f"{other}.safetensors")
    fails(capsys, "exists already", "convert", tmp_path / "a.safetensors", tmp_path / "kohya.safetensors", "--to",
          "kohya")
    fails(capsys, ".safetensors", "convert", tmp_path / "a.safetensors", tmp_path / "b.bin", "--to", "kohya")


def test_convert_keeps_dora_where_it_can(tmp_path, capsys):
    """1x1 convolutions there have magnitudes of another shape than our Linear layers."""
    model = with_lora(targets="all", dora=True)
    save_lora(model, tmp_path / "a.safetensors")
    run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "ours")
    run(capsys, "convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "diffusers")
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors"))
    fails(capsys, "DoRA", "convert", tmp_path / "a.safetensors", tmp_path / "d.safetensors", "--to", "kohya")


def test_info_shows_what_is_inside(tmp_path, capsys):
    """Also of a file that says nothing about itself."""
    save_file(lora_state_dict(with_lora()), tmp_path / "l.safetensors")
    text = run(capsys, "info", tmp_path / "l.safetensors")
    assert "rank: 4" in text and "alpha: 6" in text and "layers: 8\n" in text and "attention_blocks.N.query x2" in text
    assert "tensors: 24, torch.float32" in text
    fails(capsys, "no such file", "info", tmp_path / "absent.safetensors")


def save_prior(model, folder):
    """In its own dtype; save_model always writes float16."""
    tensors = {name: t.contiguous() for name, t in to_diffusers(model.state_dict(), model).items()}
    files.write_files(config_to_diffusers(model), tensors, folder, files.STEM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_writes_the_sum_in_the_dtype_of_the_source(dtype, tmp_path, capsys):
    """Exact in float32; in half precision, the float32 sum, rounded once. Tensors without LoRA keep their bits."""
    base = prior().to(dtype)
    save_prior(base, tmp_path / "prior")
    model = base.float()
    add_lora(model, rank=2, alpha=3.0)
    train_a_little(model)
    save_lora(model, tmp_path / "l.safetensors", to="kohya", metadata=dict(base_hash=base_hash(model)))
    text = run(capsys, "merge", tmp_path / "prior", tmp_path / "l.safetensors", tmp_path / "out", "--scale", "0.5")
    assert "8 layers merged at scale 0.5" in text and "note" not in text
    set_scale(model, 0.5)
    merge(model)
    written = load_file(tmp_path / "out" / f"{files.STEM}.safetensors")
    assert {t.dtype for t in written.values()} == {dtype}
    found = weights.load_stage_c(tmp_path / "out").state_dict()
    assert same(found, {name: t.to(dtype).float() for name, t in base_state_dict(model).items()})
    fails(capsys, "exists already", "merge", tmp_path / "prior", tmp_path / "l.safetensors", tmp_path / "out")
    run(capsys, "merge", tmp_path / "prior", tmp_path / "l.safetensors", tmp_path / "one.safetensors", "--scale", "0.5")
    assert same(load_file(tmp_path / "one.safetensors"), written)
    assert "trained on other weights" in run(capsys, "merge", tmp_path / "out", tmp_path / "l.safetensors",
                                             tmp_path / "twice")
    if dtype == torch.float16:
        fails(capsys, "cannot hold", "merge", tmp_path / "prior", tmp_path / "l.safetensors", tmp_path / "x",
              "--scale=1e6")


def test_extract_finds_the_lora_that_was_merged(tmp_path, capsys):
    """A difference of rank 4 is kept whole by rank 4, and the LoRA does what the fine-tuning did."""
    base, tuned = prior(), with_lora(targets="attention+mlp")
    expected = tuned(*inputs())
    merge(tuned)
    base_copy = prior()
    base_copy.load_state_dict(base_state_dict(tuned))
    save_prior(base, tmp_path / "base")
    save_prior(base_copy, tmp_path / "tuned")
    text = run(capsys, "extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "l.safetensors", "--rank", 4)
    assert "in 14 layers: 1.0000" in text and "whole" not in text
    model = loaded(tmp_path / "l.safetensors")
    assert rel(model(*inputs()), expected) < 1e-5
    fails(capsys, "do not differ", "extract", tmp_path / "base", tmp_path / "base", tmp_path / "m.safetensors")
    fails(capsys, "rank 0", "extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "m.safetensors", "--rank", 0)
    fails(capsys, "exists already", "extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "l.safetensors")


def test_extract_reports_what_a_small_rank_loses():
    """The share of the r largest singular values; and the same of the whole difference, biases and all."""
    base, tuned = prior(), prior()
    difference = torch.randn(16, 16)
    with torch.no_grad():
        tuned.attention_blocks[0].query.weight += difference
        tuned.attention_blocks[0].query.bias += 1.0
    parts, text = tool.nearest_lora(base, tuned, 3, "all")
    s = torch.linalg.svdvals(difference).square()
    assert f"in 1 layers: {s[:3].sum() / s.sum():.4f}" in text
    assert f"whole difference: {s[:3].sum() / (s.sum() + 16):.4f}" in text
    assert "attention_blocks.N.query.bias" in text and list(parts) == ["attention_blocks.0.query"]


def test_help_says_what_there_is(capsys):
    """Also that of each command."""
    for args in ([], ["info"], ["convert"], ["merge"], ["extract"]):
        with pytest.raises(SystemExit) as error:
            tool.main([*args, "--help"])
        assert error.value.code == 0
    assert "--rank" in capsys.readouterr().out


# ----- diffusers and peft as oracles -----------------------------------------------------------------

def oracle(model: StageC):
    """diffusers' prior with the same weights. The module moved to `deprecated` in a later version."""
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
    """alpha is not the rank: it arrives through the metadata, which diffusers' own trainer does not write."""
    theirs, model = oracle(prior()), with_lora(**options)
    without = theirs(*inputs())
    save_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_adapter(str(tmp_path), prefix="prior", weight_name="pytorch_lora_weights.safetensors")
    assert rel(model(*inputs()), theirs(*inputs())) < 1e-5
    assert rel(theirs(*inputs()), without) > 1e-2


@torch.no_grad()
def test_diffusers_pipeline_loads_our_file(tmp_path):
    """pipeline.load_lora_weights, as a user would call it, with layers of different ranks and alphas."""
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
    """peft's LoRA on diffusers' prior, saved by diffusers: the same output here."""
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
    # as pipelines save
    importlib.import_module("diffusers.loaders").StableDiffusionLoraLoaderMixin.write_lora_layers(
        {f"prior.{name}": tensor for name, tensor in tensors.items()}, str(tmp_path), is_main_process=True,
        weight_name="prior.safetensors", save_function=None, safe_serialization=True,
        lora_adapter_metadata={f"prior.{key}": value for key, value in config.items()})
    for name in ("bare", "prior"):
        assert rel(loaded(tmp_path / f"{name}.safetensors")(*inputs()), theirs(*inputs())) < 1e-5


@torch.no_grad()
def test_our_layers_work_on_diffusers_model_too(tmp_path):
    """Any tree of modules: its own names are the file's, and 1x1 convolutions are convolutions there."""
    model, theirs = with_lora(targets="all"), oracle(prior())
    save_lora(model, tmp_path / "l.safetensors", to="kohya")
    load_lora(theirs, tmp_path / "l.safetensors")
    assert rel(model(*inputs()), theirs(*inputs())) < 1e-5
    save_lora(theirs, tmp_path / "m.safetensors")
    assert rel(loaded(tmp_path / "m.safetensors")(*inputs()), theirs(*inputs())) < 1e-5


def test_gradients_equal_pefts():
    """Not only the forward: what is trained is the same, too, DoRA's detached norm included."""
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
