"""LoRA files mean the same in every program that reads them. Also tests the command line, tools/lora.py."""
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
from helpers import manifest, rel
from loading import files, lora_formats, weights
from loading.lora_formats import base_hash, base_state_dict, load_lora, save_lora
from loading.names import config_to_diffusers, to_diffusers
from lora import add_lora, lora_parameters, lora_state_dict, merge, set_scale
from stage_c import StageC
from test_lora import (SIZES, bits, inputs, loaded as loaded_by, oracle, prior, same, train_a_little, two_loras,
                       with_lora)
from tools import lora as tool
from wuerstchen import Wuerstchen

ROOT = Path(lora.__file__).parent
FORMATS = ["diffusers", "kohya", "comfy", "original", "ours"]


def loaded(source, scale=1.0, **sizes) -> StageC:
    return loaded_by(source, scale, load_lora, **sizes)


def alphas(model) -> list:
    """All different values, in order."""
    return sorted({adapter.alpha for _, adapter in lora.adapters(model)})


# ----- files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_comes_back_as_it_was(to, targets, tmp_path):
    """alpha is neither the rank nor a round number, so losing it would show."""
    model = with_lora(alpha=math.pi, targets=targets)
    save_lora(model, tmp_path / "l.safetensors", to=to)
    back = loaded(tmp_path / "l.safetensors")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(*inputs()), model(*inputs())) and alphas(back) == pytest.approx(alphas(model), rel=1e-15)
    assert alphas(back) == alphas(model) or to == "original"      # which multiplies it by 3, for rank 3r


def test_files_have_the_names_that_other_programs_expect(tmp_path):
    """One name of each kind per format. diffusers has 8 tensors per block, 256 at the official size."""
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
VARIANTS = {     # formats found elsewhere: the nearest that we write, and how names differ
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
    "of a compiled model": ("diffusers", [("prior.blocks.", "prior._orig_mod.blocks."), (".to_q", "._orig_mod.to_q")]),
    "of a compiled model, flat": ("kohya", [("lora_unet_", "lora_unet__orig_mod_")]),
    "of several GPUs": ("comfy", [("diffusion_model.", "module.diffusion_model.")]),
    "of several GPUs, compiled": ("comfy", [("diffusion_model.", "module._orig_mod.")]),
    "peft's adapter": ("diffusers", [("prior.", "base_model.model."), (".weight", ".default.weight")]),
    "peft's adapter of another name": ("diffusers", [("prior.", ""), (".weight", ".my_style.weight")]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_other_programs_are_read(variant, tmp_path):
    """alpha = rank here, because some of these formats cannot store another."""
    to, pairs = VARIANTS[variant]
    model = with_lora(alpha=4.0)
    save_lora(model, tmp_path / "l.safetensors", to=to)
    tensors = rename(load_file(tmp_path / "l.safetensors"), *pairs)
    assert tensors.keys() != load_file(tmp_path / "l.safetensors").keys()
    assert torch.equal(loaded(tensors)(*inputs()), model(*inputs()))


def test_pickled_files_and_folders_are_read(tmp_path):
    """Files older than safetensors, and folders as diffusers saves them. No code in them is executed."""
    model = with_lora(alpha=4.0)
    save_lora(model, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    torch.save(load_file(tmp_path / "folder" / "pytorch_lora_weights.safetensors"), tmp_path / "l.bin")
    for path in (tmp_path / "folder", tmp_path / "l.bin"):
        assert torch.equal(loaded(path)(*inputs()), model(*inputs()))


def test_a_half_precision_file_is_loaded_into_float32_and_converted_as_it_is(tmp_path):
    """So its training can continue. A conversion changes names and keeps values."""
    save_file({name: t.half() for name, t in lora_state_dict(with_lora()).items()}, tmp_path / "l.safetensors")
    assert {p.dtype for p in lora_parameters(loaded(tmp_path / "l.safetensors"))} == {torch.float32}
    tool.convert(tmp_path / "l.safetensors", tmp_path / "m.safetensors", "original")
    found = load_file(tmp_path / "m.safetensors")
    assert {t.dtype for name, t in found.items() if not name.endswith(".alpha")} == {torch.float16}
    assert torch.equal(loaded(tmp_path / "m.safetensors")(*inputs()), loaded(tmp_path / "l.safetensors")(*inputs()))


def test_alpha_of_each_layer_survives_in_metadata_and_tensors(tmp_path):
    """Ranks and alphas may differ by layer. diffusers stores patterns in the metadata, others one tensor each."""
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


def test_alpha_is_the_rank_if_a_file_has_none_or_0():
    """As in diffusers and kohya."""
    tensors = lora_state_dict(with_lora())
    for alpha in (torch.tensor(0.0), None):
        changed = {name: alpha if name.endswith(".alpha") else t for name, t in tensors.items()}
        assert alphas(loaded({name: t for name, t in changed.items() if t is not None})) == [4.0]


def test_rslora_in_metadata_is_read_as_its_alpha(tmp_path):
    """With use_rslora, peft divides by sqrt(rank)."""
    model = with_lora()
    save_lora(model, tmp_path / "l.safetensors")
    config = {"prior.r": 4, "prior.lora_alpha": 3, "prior.use_rslora": True}
    save_file(load_file(tmp_path / "l.safetensors"), tmp_path / "rs.safetensors",
              {"lora_adapter_metadata": json.dumps(config)})
    assert torch.equal(loaded(tmp_path / "rs.safetensors")(*inputs()), model(*inputs()))     # 3 / sqrt(4) = 6 / 4


@torch.no_grad()
def peft_folder(folder, **config) -> StageC:
    """Writes a LoRA of peft's Trainer, as a folder -> a model with our names and layers that has the same one."""
    model, options = with_lora(**{"alpha": 12.0, **config}), dict(r=4, lora_alpha=12, use_rslora=False)
    options |= {"use_rslora": config.get("rslora", False), "use_dora": config.get("dora", False)}
    save_lora(model, folder / "own.safetensors")
    tensors = rename(load_file(folder / "own.safetensors"), ("prior.", "base_model.model."))
    (folder / "own.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", init_lora_weights=True, **options)))
    return model


@pytest.mark.parametrize("options", [{}, dict(rslora=True), dict(dora=True)], ids=str)
@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "style.safetensors"])
def test_the_folder_of_peft_has_its_alpha_next_to_the_file(name, options, tmp_path):
    """The file alone has none: with alpha = rank this one would have a third of its strength."""
    model = peft_folder(tmp_path, **options)
    if name.startswith("style"):
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    assert rel(loaded(tmp_path / name)(*inputs()), model(*inputs())) < 1e-6
    assert alphas(loaded(tmp_path / name)) == pytest.approx(alphas(model))


@torch.no_grad()
def test_peft_itself_is_the_oracle_of_its_folder(tmp_path):
    """Ranks and alphas that differ by layer, divided by the root of the rank, saved by peft's own save_pretrained."""
    peft, theirs = pytest.importorskip("peft"), oracle(prior())
    model = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["to_q", "to_v", "to_out.0"], use_rslora=True, rank_pattern={"to_q": 2},
        alpha_pattern={"^blocks.2.attention.to_v": 3, "to_q": 5}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "run"))
    expected = theirs(*inputs())
    assert rel(loaded(tmp_path / "run")(*inputs()), expected) < 1e-5 < rel(prior()(*inputs()), expected)
    assert len(alphas(loaded(tmp_path / "run"))) == 3


@pytest.mark.parametrize("key", ["ss_network_alpha", "network_alpha", "lora_alpha", "alpha"])
def test_alpha_in_the_header_of_other_programs(key, tmp_path, recwarn):
    save_file({n: t for n, t in lora_state_dict(with_lora()).items() if ".alpha" not in n}, tmp_path / "l.safetensors",
              {key: "6.0"})
    assert torch.equal(loaded(tmp_path / "l.safetensors")(*inputs()), with_lora()(*inputs())) and not len(recwarn)


def test_an_assumed_alpha_is_said_once_with_the_files_name(tmp_path, capsys):
    """Not for files that store it, in whichever way."""
    tensors = {n: t for n, t in lora_state_dict(with_lora()).items() if ".alpha" not in n}
    save_file(tensors, tmp_path / "l.safetensors", {"alpha": "None"})
    with pytest.warns(UserWarning, match="l.safetensors does not store alpha: assumed alpha = rank = 4;"):
        loaded(tmp_path / "l.safetensors")
    with pytest.warns(UserWarning, match="does not store alpha: assumed the rank"):
        loaded_by(tensors)
    tool.main(["convert", str(tmp_path / "l.safetensors"), str(tmp_path / "m.safetensors"), "--to", "diffusers"])
    assert capsys.readouterr().err.count("assumed alpha = rank = 4") == 1
    tool.main(["info", str(tmp_path / "m.safetensors")])
    assert capsys.readouterr().err == ""


def test_a_run_of_ours_is_a_folder_too(tmp_path):
    """The first of the known names counts; an unknown one is not guessed, but listed."""
    model = with_lora()
    save_lora(model, tmp_path / "run" / "lora.safetensors")
    assert torch.equal(loaded(tmp_path / "run")(*inputs()), model(*inputs()))
    (tmp_path / "run" / "lora.safetensors").rename(tmp_path / "run" / "other.safetensors")
    refused(tmp_path / "run", "the folder holds no LoRA: expected lora.safetensors, .*; found other.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_files_are_read(dtype, tmp_path, capsys):
    """As exact as they are: the values of the file in float32. Integers, which need a scale, are refused."""
    tensors = {name: t if name.endswith(".alpha") else t.to(dtype) for name, t in lora_state_dict(with_lora()).items()}
    save_file(tensors, tmp_path / "l.safetensors")
    expected = loaded({name: t.float() for name, t in tensors.items()})
    assert torch.equal(loaded(tmp_path / "l.safetensors")(*inputs()), expected(*inputs()))
    assert str(dtype) in run(capsys, "info", tmp_path / "l.safetensors")
    run(capsys, "convert", tmp_path / "l.safetensors", tmp_path / "k.safetensors", "--to", "kohya")
    assert torch.equal(loaded(tmp_path / "k.safetensors")(*inputs()), expected(*inputs()))
    refused({name: t if name.endswith(".alpha") else t.char() for name, t in lora_state_dict(with_lora()).items()},
            "8 of 8 layers do not fit: attention_blocks.0.query has numbers of torch.int8")


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_lora_is_the_same_file_to_the_byte(to, tmp_path):
    """safetensors alone writes metadata in random order. Converting, also there and back, is as reproducible."""
    model = with_lora(targets="all")
    for name in "ab":
        save_lora(model, tmp_path / f"{name}.safetensors", to=to, metadata=dict(steps=7, images=3, trigger="x"))
        tool.convert(tmp_path / "a.safetensors", tmp_path / f"{name}.kohya.safetensors", "kohya")
    tool.convert(tmp_path / "a.kohya.safetensors", tmp_path / "c.safetensors", to)
    a, b, kohya, again, back = ((tmp_path / f"{name}.safetensors").read_bytes()
                                for name in ("a", "b", "a.kohya", "b.kohya", "c"))
    assert a == b and kohya == again and (back == a or to == "original")      # whose fused alpha is another
    lora.save_lora(model, tmp_path / "core.safetensors")
    first = (tmp_path / "core.safetensors").read_bytes()
    lora.save_lora(model, tmp_path / "core.safetensors")
    assert (tmp_path / "core.safetensors").read_bytes() == first
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert [*file.metadata()] and (int.from_bytes(a[:8], "little")) % 8 == 0


def test_fused_in_proj_is_exact_in_both_directions(tmp_path):
    """Fusing makes rank 3r, block-diagonal; splitting takes rows. The products are compared with the full matrix."""
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
    # ranks are the old ones again
    assert same(lora_state_dict(loaded(tmp_path / "fused.safetensors")), lora_state_dict(model))


def test_a_lora_trained_on_the_fused_matrix_is_split_by_rows(tmp_path):
    """Fused again, it is the same as before: the three share `down`, so the rank stays r and does not become 3r."""
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
    """The rows of key and value are 0 in the fused matrix, and come back as LoRAs that change nothing."""
    model = with_lora(targets="query")
    save_lora(model, tmp_path / "l.safetensors", to="original")
    assert torch.equal(loaded(tmp_path / "l.safetensors")(*inputs()), model(*inputs()))


def test_dora_is_kept_by_diffusers_format_and_refused_by_the_others(tmp_path):
    """A file without the magnitudes would load everywhere, but as a different LoRA."""
    model = with_lora(dora=True, targets="all")
    for to in ("diffusers", "ours"):
        save_lora(model, tmp_path / f"{to}.safetensors", to=to)
        assert rel(loaded(tmp_path / f"{to}.safetensors")(*inputs()), model(*inputs())) < 1e-6
    for to in ("kohya", "comfy", "original"):
        with pytest.raises(ValueError, match="DoRA"):
            save_lora(model, tmp_path / f"{to}.safetensors", to=to)


def test_metadata_says_what_the_file_is(tmp_path):
    """All values are strings, because safetensors requires it. Rank, alpha, targets and version are always there."""
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
    """A resumed run of diffusers' script trains one adapter and loads another. Here the optimizer's parameters get the
    values."""
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
    """Only Stage C has a table of names. Other models keep their names, with dots or flattened."""
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
    """The file is refused, and the model is as before."""
    model = prior(**sizes)
    with pytest.raises(ValueError, match=match) as error:
        load_lora(model, tensors)
    assert "\n" not in str(error.value) and "nothing was loaded" in str(error.value)
    assert same(bits(model), bits(prior(**sizes)))


def test_a_file_with_anything_unknown_is_refused_with_counts():
    """diffusers drops unknown tensors, and all of a kohya file, with a warning at most: the image does not change."""
    tensors = lora_state_dict(with_lora())
    refused({**tensors, "attention_blocks.2.query.lora_down.weight": torch.zeros(4, 16)},
            r"1 of 25 tensors belong to no layer of this model \(attention_blocks.2.query.lora_down.weight\)")
    refused({}, "it is empty")
    refused(tensors, "8 of 8 layers do not fit: attention_blocks.0.query is .24, 24., the file has down .4, 16., "
                     ".*; ...", c=24)
    refused({name: t for name, t in tensors.items() if "0.query.lora_up" not in name},
            "1 of 8 layers do not fit: attention_blocks.0.query has no up; nothing was loaded")
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
    """Even if all other tensors fit: half a LoRA is not what was trained."""
    refused({name: torch.zeros(4, 16)}, f"1 of 1 tensors.*{looks}")
    refused({**lora_state_dict(with_lora()), name: torch.zeros(4, 16)}, f"1 of 25 tensors.*{looks}")


PARTS = [("lora_unet_blocks_0_depthwise.lora_down.weight", "grouped convolutions"),
         ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "a text encoder"),
         ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "a text encoder"),
         ("bundle_emb.word.clip_g", "learned words")]


@pytest.mark.parametrize("name, looks", PARTS)
def test_lora_partial_loads_the_rest_and_lists_what_is_left_out(name, looks, tmp_path):
    """Without it, the error says how many layers it would load. Files of OneTrainer are like this by default."""
    tensors = {**lora_state_dict(with_lora()), name: torch.zeros(4, 16)}
    refused(tensors, f"1 of 25 tensors.*{looks}.*; --lora-partial .* loads the other 8 layers without them")
    model = prior()
    with pytest.warns(UserWarning, match="left out 1 of 25 tensors: " + name.replace("0", "N")):
        assert len(load_lora(model, tensors, lora_partial=True)) == 8
    assert torch.equal(model(*inputs()), with_lora()(*inputs()))


@pytest.mark.parametrize("ending", ["dora_scale", "lora_mid.weight", "lora_B.bias", "lora_E", "diff_b"])
def test_a_layer_with_something_unknown_is_left_out_as_a_whole(ending):
    """Without its dora_scale, a layer would be another one than was trained."""
    tensors = {**lora_state_dict(with_lora()), f"attention_blocks.0.query.{ending}": torch.zeros(4, 16)}
    refused(tensors, "loads the other 7 layers")
    model = prior()
    with pytest.warns(UserWarning, match="left out 4 of 25 tensors: attention_blocks.N.query"):
        assert "attention_blocks.0.query" not in load_lora(model, tensors, lora_partial=True)


def test_lora_partial_needs_something_to_load_and_forgives_nothing_else():
    """A LoRA for another model stays refused, and so do shapes that do not fit, and NaN."""
    model = prior()
    for tensors, match in (
            ({"lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight": torch.zeros(4, 16)}, "1 of 1 tensors"),
            ({**lora_state_dict(with_lora(targets="head")), "head.dora_scale": torch.zeros(8)}, "1 of 4 tensors"),
            ({**lora_state_dict(with_lora()), "x": torch.zeros(1), "attention_blocks.0.query.lora_up.weight":
              torch.zeros(16, 3)}, "1 of 8 layers do not fit")):
        with pytest.raises(ValueError, match=match) as error:
            load_lora(model, tensors, lora_partial=True)
        assert "--lora-partial" not in str(error.value)
    assert same(bits(model), bits(prior()))


@pytest.mark.parametrize("config, match", [
    (dict(lora_alpha=math.nan), "NaN or inf"), (dict(lora_alpha=math.inf), "NaN or inf"),
    (dict(lora_alpha=None), "cannot be used"), (dict(lora_alpha="x"), "cannot be used"),
    (dict(lora_alpha=[1]), "cannot be used"), (dict(lora_alpha=10 ** 400), "cannot be used"),
    (dict(alpha_pattern=[1]), "cannot be used"), (dict(alpha_pattern={"(": 1}), "cannot be used"),
    (dict(alpha_pattern={".*": "x"}), "cannot be used"), ([], "not a JSON object"), ("x", "not a JSON object"),
    (dict(use_rslora="no"), "use_rslora is 'no', expected true or false"),
    (dict(init_lora_weights="pissa"), "starts from pissa, which changes the base weights"),
    (dict(peft_type="LOHA"), "is for LOHA, expected LORA")], ids=str)
def test_a_nonsense_configuration_is_one_line(config, match, tmp_path):
    """In the header of a file of diffusers, and next to a file of peft."""
    peft_folder(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    refused(tmp_path / "l.safetensors", f"l.safetensors: .*{match}")
    refused(tmp_path, match.removeprefix("not a "))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"], ids=["cut", "deep", "no text"])
def test_a_configuration_that_cannot_be_read_is_one_line(text, tmp_path):
    peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, "cannot be read|maximum recursion")


def test_rank_0_and_impossible_alphas_are_one_line():
    """Also in the fused matrix, whose rows are divided by rank."""
    for layer, rows in (("blocks.2.attention.to_q", 16), ("blocks.2.attention.attn.in_proj", 48)):
        refused({f"{layer}.lora_down.weight": torch.zeros(0, 16), f"{layer}.lora_up.weight": torch.zeros(rows, 0)},
                "1 of 1 layers|3 of 3 layers")
    tensors = lora_state_dict(with_lora())
    for alpha in (torch.tensor(math.nan), torch.tensor([1.0, 2.0]), torch.zeros(0)):
        refused({**tensors, "attention_blocks.0.query.alpha": alpha},
                "1 of 8 layers do not fit: attention_blocks.0.query (has NaN|.*, alpha [[])")
        with pytest.raises(ValueError, match="attention_blocks.0.query"):
            lora.load_lora(prior(), {**tensors, "attention_blocks.0.query.alpha": alpha})


def test_text_of_a_strangers_file_does_not_reach_the_terminal(tmp_path, capsys):
    """ESC and BEL could rename the window or hide a line: in metadata, names, values of a configuration."""
    evil = "\x1b]0;owned\x07\x9b2J\u202e\nx"
    tensors = lora_state_dict(with_lora())
    save_file(tensors, tmp_path / "l.safetensors", {"note" + evil: evil})
    save_file({**tensors, evil + "x": torch.zeros(1)}, tmp_path / "m.safetensors")
    save_file({**tensors, "attention_blocks.0.query.lora_up.weight" + evil: torch.zeros(1)}, tmp_path / "n.safetensors",
              {"lora_adapter_metadata": json.dumps({"peft_type": evil})})
    text = run(capsys, "info", tmp_path / "l.safetensors")
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e\\nx" in text
    for name in "lmn":
        for args in (["info"], ["convert", "--to", "kohya", tmp_path / f"{name}.out.safetensors"],
                     ["convert", "--lora-partial", "--to", "kohya", tmp_path / f"{name}.part.safetensors"]):
            try:
                tool.main([str(arg) for arg in (args[0], tmp_path / f"{name}.safetensors", *args[1:][::-1])])
            except SystemExit:
                pass
            out = "".join(capsys.readouterr())
            assert not set(evil) & set(out) - set("]0;owned2Jx\n"), out
            assert len(out.splitlines()) < 14


def test_whole_models_are_recognised():
    """Models of any stage. Some of their layers have the names that LoRAs of other models use."""
    for model in ("stage_c_v2", "stage_b_v2", "stage_a_vqgan", "text_encoder_bigg"):
        refused({name: torch.zeros(1) for name in manifest(model)}, "it looks like a whole model, not a LoRA")


def test_files_that_are_not_loras_are_refused_in_one_line(tmp_path):
    """The line contains the file's name."""
    (tmp_path / "cut.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    torch.save(dict(step=3), tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    save_file(lora_state_dict(with_lora()), tmp_path / "broken.safetensors", {"lora_adapter_metadata": "{"})
    for name in ("cut.safetensors", "other.pt", "empty", "absent.safetensors", "broken.safetensors"):
        refused(tmp_path / name, name)


def test_the_pipeline_takes_a_run_as_a_lora_and_no_file_twice(tmp_path, monkeypatch):
    """The same file, as the LoRA of --weights and of --lora and however its path is written, has one scale."""
    def scales(weights, **options) -> list:
        model = Wuerstchen.load(weights, "cpu", fast=False, low_memory=False, **options)
        found = [[a.scale for a in layer.adapters.values()] for _, layer in lora.lora_layers(model.stage_c)]
        assert found == found[:1] * len(found)
        return found[0] if found else []

    prior_folder, run_folder = ROOT / "models" / "tiny" / "prior", tmp_path / "run"
    model = weights.load_stage_c(prior_folder, torch.float32)
    add_lora(model, targets="query")
    save_lora(model, run_folder / "lora.safetensors")
    (run_folder / "base.json").write_text(json.dumps(dict(weights="tiny", lora="lora.safetensors")))
    monkeypatch.chdir(tmp_path)
    assert scales("tiny", lora="run") == scales("run") == [1.0]
    assert scales(run_folder, lora={"run": 0.5}) == scales("run", lora={run_folder / "lora.safetensors": 0.5}) == [0.5]
    with pytest.warns(UserWarning, match="the LoRA of run is not used, .* another prior .* add --lora run"):
        assert scales("run", prior=prior_folder) == []
    text_part = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 16)}
    save_file(load_file(run_folder / "lora.safetensors") | text_part, "both.safetensors", {"alpha": "2"})
    with pytest.raises(ValueError, match="1 of 13 .* --lora-partial .* the other 6 layers"):
        Wuerstchen.load("tiny", "cpu", lora="both.safetensors")
    with pytest.warns(UserWarning, match="left out 1 of 13 tensors: lora_te_text_model"):
        assert scales("tiny", lora="both.safetensors", lora_partial=True) == [1.0]


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
    """From every format to every other. Flattened names are restored with the table of names only."""
    model = with_lora(targets="all")
    save_lora(model, tmp_path / "a.safetensors", to=to, metadata=dict(steps=7))
    for other in FORMATS:
        run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors", "--to", other)
        assert torch.equal(loaded(tmp_path / f"{other}.safetensors")(*inputs()), model(*inputs()))
        assert "steps: 7" in run(capsys, "info", tmp_path / f"{other}.safetensors")
    fails(capsys, "exists already", "convert", tmp_path / "a.safetensors", tmp_path / "kohya.safetensors", "--to",
          "kohya")
    fails(capsys, ".safetensors", "convert", tmp_path / "a.safetensors", tmp_path / "b.bin", "--to", "kohya")


def test_convert_keeps_dora_if_the_format_can(tmp_path, capsys):
    """The magnitudes of 1x1 convolutions in diffusers have another shape than those of our Linear layers."""
    model = with_lora(targets="all", dora=True)
    save_lora(model, tmp_path / "a.safetensors")
    run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "ours")
    run(capsys, "convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "diffusers")
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors"))
    fails(capsys, "DoRA", "convert", tmp_path / "a.safetensors", tmp_path / "d.safetensors", "--to", "kohya")


def test_info_shows_what_is_inside(tmp_path, capsys):
    """Also for a file without metadata."""
    save_file(lora_state_dict(with_lora()), tmp_path / "l.safetensors")
    text = run(capsys, "info", tmp_path / "l.safetensors")
    assert "rank: 4" in text and "alpha: 6" in text and "layers: 8\n" in text and "attention_blocks.N.query x2" in text
    assert "tensors: 24, torch.float32" in text
    fails(capsys, "no such file", "info", tmp_path / "absent.safetensors")
    save_file({"blocks.2.attention.to_q.lora_down.weight": torch.zeros(4, 16)}, tmp_path / "half.safetensors")
    fails(capsys, "attention_blocks.0.query has no up", "info", tmp_path / "half.safetensors")


def save_prior(model, folder):
    """In its own dtype; save_model always writes float16."""
    tensors = {name: t.contiguous() for name, t in to_diffusers(model.state_dict(), model).items()}
    files.write_files(config_to_diffusers(model), tensors, folder, files.STEM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_writes_the_sum_in_the_dtype_of_the_source(dtype, tmp_path, capsys):
    """Exact in float32. In half precision it is the float32 sum, rounded once. Other tensors keep their bits."""
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
    """Rank 4 keeps a difference of rank 4 completely, and the LoRA gives the output of the fine-tuned model."""
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
    fails(capsys, "--rank: expected a whole number", "extract", tmp_path / "base", tmp_path / "tuned",
          tmp_path / "m.safetensors", "--rank", 0)
    fails(capsys, "exists already", "extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "l.safetensors")


def test_extract_reports_what_a_small_rank_loses():
    """It reports the share of the r largest singular values, in the covered layers and in the whole model."""
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
    """The help of each command works as well."""
    for args in ([], ["info"], ["convert"], ["merge"], ["extract"]):
        with pytest.raises(SystemExit) as error:
            tool.main([*args, "--help"])
        assert error.value.code == 0
    assert "--rank" in capsys.readouterr().out


def test_help_imports_no_torch_and_names_the_formats():
    """Importing torch takes two seconds. Therefore the formats are written twice, and must be equal."""
    code = ("import runpy, sys\n"
            "for args in ([], ['info'], ['convert'], ['merge'], ['extract']):\n"
            "    sys.argv = ['lora', *args, '--help']\n"
            "    try: runpy.run_module('tools.lora', run_name='__main__', alter_sys=True)\n"
            "    except SystemExit as end: assert end.code == 0\n"
            "assert not {'torch', 'numpy', 'safetensors'} & sys.modules.keys()")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "{" + ",".join(lora_formats.FORMATS) + "}" in run.stdout and FORMATS == list(lora_formats.FORMATS)
    assert "python -m tools.lora convert" in run.stdout and ", ".join(lora.PRESETS) in run.stdout


def test_run_by_its_path_it_does_not_import_itself():
    """Python puts the folder of this tool on the path, in which `import lora` would find the tool itself."""
    run = subprocess.run([sys.executable, "tools/lora.py", "info", "x"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "error: x: there is no such file; nothing was loaded\n"


# ----- the weights below --------------------------------------------------------------------------------

def test_base_state_dict_has_the_old_names_while_wrapped():
    """For base_hash, and for saving the base next to the LoRA."""
    assert same(base_state_dict(two_loras()), bits(prior()))
    assert list(base_state_dict(two_loras())) == list(prior().state_dict())


def test_base_hash_knows_weights_not_precision_or_lora():
    """The file stores which weights it was trained on. A float16 file and a float32 copy of it count as the same."""
    half = prior().half()
    assert base_hash(half) == base_hash(copy.deepcopy(half).float())
    assert base_hash(prior()) == base_hash(two_loras()) != base_hash(prior(seed=1))


@torch.no_grad()
def test_our_layers_work_on_diffusers_model_too(tmp_path):
    """Any tree of modules works. Its names are those of the file, and its 1x1 convolutions are convolutions."""
    model, theirs = with_lora(targets="all"), oracle(prior())
    save_lora(model, tmp_path / "l.safetensors", to="kohya")
    load_lora(theirs, tmp_path / "l.safetensors")
    assert rel(model(*inputs()), theirs(*inputs())) < 1e-5
    save_lora(theirs, tmp_path / "m.safetensors")
    assert rel(loaded(tmp_path / "m.safetensors")(*inputs()), theirs(*inputs())) < 1e-5
