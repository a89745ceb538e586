"""int8.py: the numbers of a product written out, small errors, a quarter of the memory, and one line if impossible."""
import copy

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import lora
import sample
from loading import weights
from extras.editing import generate
from helpers import TINY
from speed.fast import bind_b, bind_c
from speed.int8 import (ROWS, Int8Linear, check, finest, large, one_image_at_a_time, pack, product, quantise_weight,
                        quantised, to_int8)
from stage_b import StageB
from stage_c import StageC
from wuerstchen import Wuerstchen, add_noise, ddpm_step


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def l2(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).norm() / reference.norm()).item()


def random_layer(inputs: int, outputs: int) -> tuple[nn.Linear, Int8Linear]:
    model = nn.Sequential(nn.Linear(inputs, outputs))
    layer = model[0]
    to_int8(model, 1)
    return layer, model[0]


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 16, 8), (7, 130, 33), (300, 192, 768)])
def test_the_product_is_exact_in_whole_numbers(rows, inputs, outputs):
    """Up to the largest possible numbers: in 16 bits, as AVX2 adds pairs, 255 * 64 * 2 fits, 255 * 127 * 2 does not."""
    n = finest()
    for draw8, draw_weight in ((lambda: torch.randint(0, 256, (rows, inputs)),
                                lambda: torch.randint(-n, n + 1, (outputs, inputs))),
                               (lambda: torch.full((rows, inputs), 255), lambda: torch.full((outputs, inputs), n)),
                               (lambda: torch.full((rows, inputs), 255), lambda: torch.full((outputs, inputs), -n))):
        x8, weight8, scale = draw8(), draw_weight(), 2.0 ** torch.randint(-3, 3, (outputs,))
        exact = ((x8 - 128) @ weight8.T) * scale                                         # int64: whole numbers
        assert torch.equal(product(x8.to(torch.uint8), weight8.to(torch.int8), scale), exact)


@pytest.mark.parametrize("n", [64, 127])
def test_a_layer_is_what_its_docstring_says(n, monkeypatch):
    """y = s_x s_w (W8 x8) + b, with a scale per row and per output; written out in float64. Weights as fine as the
    processor allows."""
    if n > finest():
        pytest.skip("this processor's int8 product is exact up to weights of 64: no VNNI")
    monkeypatch.setattr("speed.int8.finest", lambda: n)
    layer, layer8 = random_layer(24, 40)
    x = torch.randn(3, 5, 24) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    s_x, s_w = x.abs().amax(-1, keepdim=True) / 127, layer.weight.abs().amax(1) / n
    x8, w8 = (x / s_x).double().add(0.5).floor(), (layer.weight / s_w[:, None]).double().round()
    expected = (x8 @ w8.T) * s_x * s_w + layer.bias
    torch.testing.assert_close(layer8(x), expected.float(), rtol=2e-6, atol=2e-6 * 1e4)
    for row, row8, true in zip(layer8(x), expected.float(), layer(x)):
        assert l2(row, row8) < 1e-6 and l2(row, true) < 0.03         # small rows are as exact as large ones beside them


def test_weights_go_only_as_far_as_sums_are_exact(monkeypatch):
    """A processor without VNNI: pairs of products are added in 16 bits, which stop at 32767."""
    def in_16_bits(x8, weight8, scale):
        # (M, N, K / 2)
        pairs = (x8[:, None].int() * weight8.int()).unflatten(-1, (-1, 2)).sum(-1).clamp(-2 ** 15, 2 ** 15 - 1)
        return (pairs.sum(-1) - 128 * weight8.int().sum(1)) * scale
    monkeypatch.setattr("speed.int8.product", in_16_bits)
    assert finest() == 64
    _, layer8 = random_layer(16, 8)
    assert layer8.weight.abs().max() == 64


def test_where_a_layer_does_not_widen_numbers_count_from_the_least():
    """GELU's output is hardly ever below 0: x = least + s_x x8 with x8 from 0 to 255. Written out in float64; and the
    gain."""
    layer, layer8 = random_layer(160, 40)
    x = nn.functional.gelu(torch.randn(50, 160)) * torch.logspace(-4, 4, 50)[:, None]
    least, s_w = x.amin(-1, keepdim=True), layer.weight.abs().amax(1) / finest()
    s_x = (x.amax(-1, keepdim=True) - least) / 255
    x8, w8 = ((x - least) / s_x).double().add(0.5).floor(), (layer.weight / s_w[:, None]).double().round()
    expected = ((x8 * s_x + least) @ w8.T) * s_w + layer.bias
    assert l2(layer8(x), expected.float()) < 1e-6
    from_zero = (x / (x.amax(-1, keepdim=True) / 127)).round() * (x.amax(-1, keepdim=True) / 127)
    true, weights_alone = x.double() @ layer.weight.double().T, x.double() @ (w8 * s_w[:, None]).T
    assert l2((x8 * s_x + least) @ (w8 * s_w[:, None]).T,
              weights_alone) < 0.6 * l2(from_zero.double() @ (w8 * s_w[:, None]).T, weights_alone)
    assert l2(layer8(x) - layer.bias, true) < 0.012


@pytest.mark.parametrize("inputs, outputs", [(40, 160), (160, 40)])
def test_a_fine_layer_takes_its_input_in_16_bits(inputs, outputs):
    """The error of x is gone, only the weight's is left: y is the rounded weight's product with x. In parts too."""
    layer, layer8 = random_layer(inputs, outputs)
    coarse, layer8.fine = layer8(x := torch.randn(50, inputs) * torch.logspace(-4, 4, 50)[:, None]), True
    s_w = layer.weight.abs().amax(1) / finest()
    weights_alone = x.double() @ ((layer.weight / s_w[:, None]).double().round() * s_w[:, None]).T
    parts = layer8.part(x[:, :24], 0) + layer8.part(x[:, 24:], 24)
    for row, row8, of_parts, expected in zip(layer8(x) - layer.bias, coarse - layer.bias, parts - layer.bias,
                                             weights_alone):
        if expected.norm() > layer.bias.norm():
            assert max(l2(row, expected), l2(of_parts, expected)) < 1e-4 < 2e-3 < l2(row8, expected)


def test_a_network_names_its_fine_layers():
    """Over Stage C's 32 blocks rounding adds up to more than 1 %; Stage B stays at 0.2 % in 8 bits."""
    def fine(model):
        to_int8(model, 32)
        return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Int8Linear)
                and module.fine}
    assert fine(weights.load_stage_c(TINY / "prior")) == {"expand"}
    assert fine(weights.load_stage_b(TINY / "decoder")) == set()


def test_rows_of_one_number_and_far_from_zero_stay_exact():
    """The step from least to most is then 0, or far smaller than the numbers themselves."""
    layer, layer8 = random_layer(64, 16)
    for x in (torch.full((1, 64), 3.0), torch.full((1, 64), -3.0), 1000 + torch.randn(1, 64),
              -1e6 + torch.randn(1, 64)):
        assert l2(layer8(x), layer(x)) < 0.03


def test_a_row_does_not_depend_on_the_rows_beside_it():
    """An image must not depend on the batch it is painted in: so no scale for all rows together."""
    _, layer8 = random_layer(64, 64)
    x = torch.randn(5, 64)
    assert torch.equal(layer8(x)[:2], layer8(torch.cat([x[:2], 100 * x[2:]]))[:2])


def test_parts_of_an_input_add_up():
    """The fast ResBlocks multiply parts separately: columns 0..24 with the bias, columns 24..64 without. Slices are not
    contiguous, which must not matter."""
    x = torch.randn(9, 64)
    for outputs in (48, 80):
        layer, layer8 = random_layer(64, outputs)
        parts = layer8.part(x[:, :24], 0) + layer8.part(x[:, 24:], 24)
        assert l2(parts, layer(x)) < 0.02 and l2(parts, layer8(x)) < 0.02
    torch.testing.assert_close(layer8.part(x[:, 24:], 24) + layer8.bias,
                               layer8(torch.cat([torch.zeros(9, 24), x[:, 24:]], 1)))


def test_a_weight_is_packed_once_and_kept_once(monkeypatch):
    """Packing took half of a step. The plain weight goes once all columns are packed, and comes back for a file, a copy
    or other columns, the same to the bit."""
    packs = []
    monkeypatch.setattr("speed.int8.pack", lambda weight8: packs.append(weight8.shape) or pack(weight8))
    layer, layer8 = random_layer(64, 48)
    weight, x = layer8.weight.clone(), torch.randn(ROWS + 9, 64)
    packs.clear()
    y = layer8(x)
    assert torch.equal(layer8(x), y) and packs == [(48, 64)] and layer8.weight is None
    torch.testing.assert_close(layer8(x[ROWS:]), y[ROWS:], rtol=0, atol=0)                  # in pieces of ROWS rows
    parts = [layer8.part(x[:, :24], 0), layer8.part(x[:, 24:], 24)]
    assert packs[1:] == [(48, 24), (48, 40)] and layer8.weight is None and len(layer8.parts) == 2
    other = copy.deepcopy(layer8)
    for one in (layer8, other):
        assert torch.equal(one.state_dict()["weight"], weight) and not one.parts
        assert torch.equal(one.part(x[:, :24], 0), parts[0]) and one.weight is not None     # other columns may follow
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_rounded_away(value):
    """The sampler stops at NaN with a clear line; numbers of 8 bits have none."""
    _, layer8 = random_layer(16, 8)
    x = torch.randn(2, 16)
    x[0, 3] = value
    y = layer8(x)
    assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_rows_and_outputs_of_zeros_give_the_bias():
    """0 / 0 would be NaN: the last layer of a network starts at zero."""
    model = nn.Sequential(nn.Linear(16, 8))
    nn.init.zeros_(model[0].weight[:4])
    bias = model[0].bias.detach().clone()
    to_int8(model, 1)
    assert torch.equal(model(torch.zeros(3, 16)), bias.expand(3, 8))
    assert torch.equal(model(torch.randn(3, 16))[:, :4], bias[:4].expand(3, 4))


def test_small_layers_stay_as_they_are():
    """They cost nothing; the first and last of a network are small, and there rounding hurts most."""
    model = StageC(c=128, c_cond=128, c_timestep=8, depth=1, heads=2)
    names = to_int8(model)
    assert "res_blocks.0.expand" in names and "attention_blocks.0.query" in names
    assert all(type(layer) is nn.Linear for layer in (model.embed, model.head, model.timestep_blocks[0].mapper))
    assert not large(model)


@pytest.fixture(scope="module")
def tiny():
    """-> the tiny pipeline, the same in int8; for Stages C and B: both networks, a clean latent, noise, conditions."""
    model, model8 = Wuerstchen.load("tiny", "cpu"), Wuerstchen.load("tiny", "cpu", int8=True)
    prompt, generator = "a rocket left of a moon on a blue background", torch.Generator().manual_seed(0)
    with torch.no_grad():
        semantic, latents = (generate(model, prompt, seed=1, output=output, steps_c=8, steps_b=4)
                             for output in ("semantic", "latents_b"))
        text_c, text_b = (model.encode_text(stage, [prompt], [""])[0] for stage in "cb")
    c = (model.part("stage_c"), model8.part("stage_c"), model.scale_semantic(semantic),
         torch.randn(semantic.shape, generator=generator), (text_c,))
    b = (model.part("stage_b"), model8.part("stage_b"), latents, torch.randn(latents.shape, generator=generator),
         (semantic, text_b))
    return model, model8, dict(c=c, b=b)


@pytest.mark.parametrize("stage", ["c", "b"])
@torch.no_grad()
def test_one_step_differs_by_about_one_percent(tiny, stage):
    """From noise level t to t - 1/12, at t from 1 to 0.2: the latents after the step, relative L2. And at t = 0.5 the
    predicted noise itself. The plain form, and the one that samples by default.

    Measured: 0.1 to 1.2 %, and 1.1 % (C), 1.0 % (B). At lower noise the predicted noise differs by more, 2.7 % at
    t = 0.05, where it counts less.
    """
    float_net, plain8, clean, eps, condition = tiny[2][stage]
    bind = bind_c if stage == "c" else bind_b
    predict, fast8 = (bind(network, *condition) for network in (float_net, plain8))
    fresh = torch.randn_like(eps)
    for t in (1.0, 0.8, 0.5, 0.2):
        level, following = torch.tensor([t]), torch.tensor([t - 1 / 12])
        x_t = add_noise(clean, eps, level)
        predictions = (predict(x_t, level), plain8(x_t, level, *condition), fast8(x_t, level))
        expected, *found = (ddpm_step(x_t, prediction, level, following, fresh) for prediction in predictions)
        assert all(0 < l2(x, expected) < 0.015 for x in found)
    x_t, level = add_noise(clean, eps, torch.tensor([0.5])), torch.tensor([0.5])
    for prediction in (plain8(x_t, level, *condition), fast8(x_t, level)):
        assert 0 < l2(prediction, predict(x_t, level)) < 0.02


@torch.no_grad()
def test_prepared_products_change_nothing(tiny):
    """The products of the semantic latent are products with slices of int8 weights: once or in every step, the same."""
    _, net8, _, eps, condition = tiny[2]["b"]
    once, every = (bind_b(net8, *condition, keep_shares=keep)(eps, torch.tensor([0.5])) for keep in (True, False))
    assert torch.equal(once, every)


def test_weights_take_a_quarter(tiny):
    """By bytes of state. The tiny Stage B has a third of its numbers in small layers and convolutions; the official
    sizes, by shape, take 0.256 and 0.272."""
    model, model8, _ = tiny
    for name, share in (("stage_c", 0.29), ("stage_b", 0.36)):
        assert nbytes(model8.part(name)) < share * nbytes(model.part(name))
    for stage, share in ((StageC, 0.26), (StageB, 0.28)):
        with torch.device("meta"):
            official = stage()
        before = nbytes(official)
        to_int8(official)
        assert nbytes(official) < share * before


def test_loading_gives_the_bits_of_converting(tiny):
    """Loaded, layers are converted one by one while the file is read, so that the float network is never there."""
    model, model8, _ = tiny
    converted, loaded = copy.deepcopy(model.part("stage_c")), model8.part("stage_c").state_dict()
    assert to_int8(converted) and converted.state_dict().keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in converted.state_dict().items())


def test_the_vqgan_stays_as_it_is(monkeypatch):
    """It is small, and one step of rounding at every pixel would be seen."""
    asked, load = {}, weights.load

    def recorded(stage, path, dtype, int8):
        asked[stage.__name__] = int8
        return load(stage, path, dtype, int8)
    monkeypatch.setattr(weights, "load", recorded)
    Wuerstchen.load("tiny", "cpu", int8=True)
    assert asked == dict(StageA=False, StageB=True, StageC=True)


def test_while_loading_one_float_layer_is_there_at_a_time():
    """quantised is lazy: it asks for a tensor only when it has given the one before."""
    asked = []

    def tensors():
        for i in range(3):
            asked.append(i)
            yield f"{i}.weight", torch.randn(8, 4)
    pairs = quantised(tensors(), ["0", "2"])
    assert next(pairs)[0] == "0.weight" and next(pairs)[0] == "0.scale" and asked == [0]
    assert [(name, tensor.dtype) for name, tensor in pairs] == [("1.weight", torch.float32), ("2.weight", torch.int8),
                                                                ("2.scale", torch.float32)]


def test_a_lora_is_merged_before_rounding(tmp_path):
    """LoRAs work on float weights. Rounded after, the merged weights have one scale of their own."""
    torch.manual_seed(1)
    prior = weights.load_stage_c(TINY / "prior")
    lora.add_lora(prior, rank=2)
    for parameter in lora.lora_parameters(prior):
        nn.init.normal_(parameter, std=0.1)
    lora.save_lora(prior, tmp_path / "a.safetensors")
    model8 = Wuerstchen.load("tiny", "cpu", int8=True, lora={tmp_path / "a.safetensors": 0.5})
    expected = weights.load_stage_c(TINY / "prior")
    lora.load_lora(expected, tmp_path / "a.safetensors", scale=0.5)
    lora.merge(expected)
    merged = expected.get_submodule("attention_blocks.0.query").base.weight
    layer8 = model8.part("stage_c").attention_blocks[0].query
    assert isinstance(layer8, Int8Linear) and torch.equal(layer8.weight, quantise_weight(merged, finest())[0])


@pytest.mark.parametrize("weights", ["tiny", "tiny-v1"])
def test_an_image_is_the_same_to_the_bit_alone_and_in_any_batch(weights):
    """Float32 products round differently for another number of rows, on some processors, and rounding to 8 bits makes
    that visible: up to 93 of 255. Here a layer in between depends on the rows on every processor."""
    model = Wuerstchen.load(weights, "cpu", int8=True)
    for stage in ("stage_c", "stage_b"):
        model.part(stage).embed.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-6 * len(output)))
    prompts, seeds = ["a moon on a red background", "a blue fish on a white background", "a red apple"], [3, 4, 5]
    few = dict(steps_c=3, steps_b=2, output="pt")
    together = generate(model, prompts, seed=seeds, **few)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        assert torch.equal(generate(model, prompt, seed=seed, **few)[0], together[i])
    assert torch.equal(generate(model, prompts[1:], seed=seeds[1:], **few), together[1:])


def test_one_image_at_a_time_keeps_the_order_of_rows():
    """Those with text, then those without, as guidance expects; each with its own noise level and conditions."""
    def bind(text, semantic):
        return lambda x, t: x + 10 * t.view(-1, 1) + 100 * text + semantic
    model = Wuerstchen({})
    conditions = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])), (torch.full((2, 1), 0.5),) * 2]
    x, t = torch.tensor([[0.1], [0.2]]), torch.tensor([0.3, 0.4])
    expected = [model.predictor(bind, conditions)(x, t, guided) for guided in (False, True)]
    one_image_at_a_time(model)
    found = [model.predictor(bind, conditions)(x, t, guided) for guided in (False, True)]
    assert len(found[0]) == 2 and len(found[1]) == 4
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_it_goes_with_low_memory():
    """Parts that are let go and read again are converted again."""
    plain, frugal = (Wuerstchen.load("tiny", "cpu", int8=True, low_memory=low) for low in (False, True))
    a, b = (generate(model, "a moon on a red background", seed=3, steps_c=2, steps_b=2, output="pt")
            for model in (plain, frugal))
    assert torch.allclose(a, b, atol=1e-4)


def test_it_goes_with_compile():
    """torch.compile knows oneDNN's product only with packed constants: here it is one operation that stays closed."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    to_int8(model, 32)
    x = torch.randn(4, 32)
    # the same way to the product, without a minute of C++
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_what_does_not_go_is_said_in_one_line(monkeypatch, capsys):
    with pytest.raises(ValueError, match="int8 is for CPUs, not for cuda: use float16 or bfloat16 there"):
        check([torch.device("cuda")])
    with pytest.raises(ValueError, match="between its products, not in torch.bfloat16: remove one of them"):
        Wuerstchen.load("tiny", "cpu", torch.bfloat16, int8=True)
    with pytest.raises(SystemExit) as end:
        sample.main(["--prompt", "cat", "--int8", "--dtype", "bf16", "--device", "cpu", "--out", "never"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: int8 computes in float32 between its products")
    wrong = lambda x8, weight8, scale: torch.zeros(len(x8), len(weight8))                # noqa: E731
    monkeypatch.setattr("speed.int8.product", wrong)
    with pytest.raises(ValueError, match="this processor's int8 product is not exact"):
        to_int8(nn.Sequential(nn.Linear(128, 128)))

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'")
    monkeypatch.setattr("speed.int8.product", missing)
    with pytest.raises(ValueError, match="has no int8 product for this processor: '_OpNamespace' 'onednn'"):
        to_int8(nn.Sequential(nn.Linear(128, 128)))


def test_an_image_says_that_it_was_made_in_int8(tmp_path):
    """8 bits change the image: so it is among the settings that are saved with it, and taken over by --like."""
    from extras.metadata import read_settings
    few = ["--steps-c", "2", "--steps-b", "2", "--device", "cpu"]
    sample.main(["--prompt", "a moon on a red background", "--seed", "1", "--int8", *few, "--out",
                 str(tmp_path / "a.png")])
    assert read_settings(tmp_path / "a.png")["int8"] is True
    sample.main(["--like", str(tmp_path / "a.png"), "--device", "cpu", "--out", str(tmp_path / "b.png")])
    from PIL import Image
    a, b = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert a.tobytes() == b.tobytes() and read_settings(tmp_path / "b.png")["int8"] is True
