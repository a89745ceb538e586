"""The networks compute what the released code computes.

The references in golden/ were made by two public implementations, the authors' and diffusers, from random
weights of both namings. rel = largest deviation / largest value; tolerances are those of golden/README.md.
"""
import warnings

import pytest
import torch
import torch.nn.functional as F

from loading.names import config_to_ours, name_table, to_original
from helpers import build, capture, draw, golden, manifest, rel, under, weights_from_names
from extras.editing import generate
from speed.fast import bind_b, bind_b_v1, bind_c
from stage_a import StageA, VQResBlock
from stage_b import (AttentionBlock, EfficientNetEncoder, GlobalResponseNorm, ResBlock, StageB, TimestepBlock,
                     TinyImageEncoder, channels_first, layer_norm, preprocess, resize_semantic, timestep_embedding)
from stage_c import StageC
from v1.stage_b import StageBV1
from wuerstchen import Wuerstchen

NAMINGS = ["original", "diffusers"]


def model_from(stage, name, naming="diffusers"):
    data, config = golden(name)
    return build(stage, config["model"], under(f"sd/{naming}/", data)), data, config


# --- Stage C -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("naming", NAMINGS)
def test_stage_c_equals_both_peers(naming):
    """Four latent sizes, among them 1 x 1 and odd ones, from one token to 77, noise levels from 0 to 1."""
    model, data, config = model_from(StageC, "prior", naming)
    for i in range(len(config["sets"])):
        x_t, t, text = (data[f"in/set{i}/{key}"] for key in ("x", "r", "c"))
        for eps in (model(x_t, t, text), bind_c(model, text)(x_t, t)):
            for peer in NAMINGS:
                assert rel(eps, data[f"out/set{i}/{peer}"]) < 1e-5


@torch.no_grad()
def test_stage_c_agrees_block_by_block():
    """A mistake in one block shows here, in that block, and not only as a wrong output."""
    model, data, config = model_from(StageC, "prior")
    blocks = [block for three in zip(model.res_blocks, model.timestep_blocks, model.attention_blocks)
              for block in three]
    outputs = capture(dict(projection=model.embed, c_embed=model.embed_text, out_ab=model.head,
                           **{f"block{i}": block for i, block in enumerate(blocks)}))
    model(data["in/set0/x"], data["in/set0/r"], data["in/set0/c"])
    assert outputs.keys() | {"r_embed"} == under("mid/set0/", data).keys()
    for name, output in outputs.items():
        assert rel(output if output.ndim == 3 else channels_first(output), data[f"mid/set0/{name}"]) < 1e-5, name
    assert rel(timestep_embedding(data["in/set0/r"], model.c_timestep), data["mid/set0/r_embed"]) < 1e-6


@pytest.mark.parametrize("naming", NAMINGS)
def test_stage_c_edges(naming):
    """Odd timestep width; a divisor of exactly 1e-5 (channel 0), a lost sign of 1 - b (channel 1). Each channel has its
    own scale, 10^5 apart, so each is compared on its own."""
    model, data, _ = model_from(StageC, "prior_edges", naming)
    eps = model(data["in/set0/x"], data["in/set0/r"], data["in/set0/c"])
    for channel in range(eps.shape[1]):
        assert rel(eps[:, channel], data["out/set0/original"][:, channel]) < 1e-5


def test_untrained_stage_c_returns_its_input():
    """Zero output layer => a = b = 0 => eps = x_t / (1 + 1e-5): a small loss at high noise from the start."""
    model = StageC(c_in=16, c=32, c_cond=24, depth=1, heads=4).eval()
    x_t = torch.randn(2, 16, 12, 12)
    torch.testing.assert_close(model(x_t, torch.rand(2), torch.randn(2, 7, 24)), x_t, rtol=2e-5, atol=0)


@torch.no_grad()
def test_untrained_networks_give_the_same_at_all_noise_levels():
    """The layers that take the noise level start at zero, as the originals' do."""
    common = dict(c_timestep=8, c_cond=8, c_hidden=(8, 16), heads=(-1, 2), blocks=(1, 1), levels=("CT", "CTA"))
    text, semantic = torch.randn(1, 3, 8), torch.randn(1, 16, 3, 3)
    for model, x, *condition in (
            (StageC(c_in=16, c=16, c_cond=8, c_timestep=8, depth=2, heads=2), torch.randn(1, 16, 3, 3), text),
            (StageB(**common, inject=(False, True), c_text=8), torch.randn(1, 4, 16, 16), semantic, text),
            (StageBV1(**common, codebook_size=9, c_token=4, c_text=8), torch.randint(9, (1, 16, 16)), semantic, text)):
        torch.nn.init.normal_(model.head.weight)                 # it starts at zero as well, which would hide all
        one, other = (model.eval()(x, torch.tensor([t]), *condition) for t in (0.1, 0.9))
        assert one.std() > 0 and torch.equal(one, other)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features == model.config["c_timestep"]:
                torch.nn.init.normal_(module.weight)
        assert not torch.equal(one, model(x, torch.tensor([0.9]), *condition))


def test_stage_c_training_step_equals_the_original():
    """Features, noise, prediction, weighted loss, gradients, clipping, one AdamW step: as in the authors' loop."""
    from training.losses import p2_weight
    from wuerstchen import add_noise, scale_semantic
    data, config = golden("training_stage_c")
    model = build(StageC, {**config["model"], "dropout": 0.0}, under("sd/original/", data)).train()
    latents = scale_semantic(data["in/raw_features"])
    t = ((1 - data["in/u"]) * 1.08 + 0.001).clamp(0.001, 1)
    x_t = add_noise(latents, data["in/noise"], t)
    eps = model(x_t, t, data["in/c"])
    per_row = F.mse_loss(eps, data["in/noise"], reduction="none").mean((1, 2, 3))        # (B,)
    loss = (per_row * p2_weight(t)).mean()
    for name, value in dict(latents=latents, t=t, noised=x_t, p2_weight=p2_weight(t), loss_per_row=per_row,
                            loss_plain_mse=per_row.mean(), loss_adjusted=loss).items():
        assert rel(value, data[f"out/{name}"]) < 1e-6, name
    assert rel(eps, data["out/pred"]) < 1e-5
    loss.backward()

    def compare(tensors, prefix, tolerance):
        found, wanted = to_original(tensors, model), under(prefix, data)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            reference = wanted[name]
            if name.endswith("in_proj_bias"):
                # A bias on all keys adds the same to all scores, which softmax ignores. Its gradient is zero but for
                # rounding, and AdamW makes steps of up to lr even of that.
                (q, k, v), (q_ref, k_ref, v_ref) = tensor.chunk(3), reference.chunk(3)
                assert (k - k_ref).abs().max() < 2 * config["lr"]
                tensor, reference = torch.cat([q, v]), torch.cat([q_ref, v_ref])
            assert rel(tensor, reference) < tolerance, name

    compare({name: p.grad.clone() for name, p in model.named_parameters()}, "out/grad/", 1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert rel(norm, data["out/grad_norm"]) < 1e-4
    optimizer.step()
    # The first step is lr * g / (|g| + 1e-8): where g is that small, its rounding shows. 1e-5 is some 5 % of a step.
    compare({name: p.detach() for name, p in model.named_parameters()}, "out/after_adamw/", 1e-5)


def test_ema_is_the_lerp_of_the_training_scripts():
    """beta 0.9: 1 * 0.9 + 3 * 0.1, the form in which train_*.py write it."""
    data, _ = golden("training_stage_c")
    assert torch.tensor(1.0).lerp_(torch.tensor(3.0),
                                   1 - 0.9) == pytest.approx(data["out/ema_of_1_and_3_beta_0.9"].item(), rel=1e-6)


# --- Stage B -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["diffnext", "diffnext_three_levels"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_stage_b_equals_both_peers(name, naming):
    """Semantic latents smaller and larger than the levels they go to, non-square images, three and four levels; also
    the fast form, which computes everything that does not depend on the noise level once."""
    model, data, config = model_from(StageB, name, naming)
    for i in range(len(config["sets"])):
        x_t, t, semantic, text = (data[f"in/set{i}/{key}"] for key in ("x", "r", "effnet", "clip"))
        fast = [bind_b(model, semantic, text, keep_shares=keep) for keep in (True, False)]
        for eps in (model(x_t, t, semantic, text), *(predict(x_t, t) for predict in fast)):
            for peer in NAMINGS:
                assert rel(eps, data[f"out/set{i}/{peer}"]) < 1e-5


@pytest.mark.parametrize("name", ["diffnext", "diffnext_three_levels"])
@torch.no_grad()
def test_stage_b_agrees_level_by_level(name):
    """Levels are numbered from the finest here, on both ways; there the way up counts from the deepest."""
    model, data, _ = model_from(StageB, name)
    n = len(model.down_blocks)
    modules = dict(clip_embed=model.embed_text, embedding=model.embed, ab=model.head)
    for i in range(n):
        up = n - 1 - i
        modules[f"down{i}"] = model.down_blocks[i][-1]
        modules[f"up{up}"] = model.upsample[i] if i > 0 else model.up_blocks[i][-1]
        if model.semantic_down[i] is not None:
            modules[f"effnet_c{i}"], modules[f"effnet_c{n + up}"] = model.semantic_down[i], model.semantic_up[i]
    outputs = capture(modules)
    model(*(data[f"in/set0/{key}"] for key in ("x", "r", "effnet", "clip")))
    a, b = F.pixel_shuffle(channels_first(outputs.pop("ab")), model.patch_size).chunk(2, 1)
    assert rel(a, data["out/set0/original_a"]) < 1e-5
    assert rel(b.sigmoid() * (1 - 2e-3) + 1e-3, data["out/set0/original_b"]) < 1e-5
    outputs["clip_embed"], outputs["embedding"] = layer_norm(outputs["clip_embed"]), layer_norm(outputs["embedding"])
    assert outputs.keys() == under("mid/set0/", data).keys()
    for key, output in outputs.items():
        if output.ndim == 4 and key not in [f"up{j}" for j in range(n - 1)]:    # upsampling gives channels first
            output = channels_first(output)
        assert rel(output, data[f"mid/set0/{key}"]) < 1e-5, key


def test_stage_b_resizes_the_semantic_latent_like_the_peers():
    """Bicubic with antialias and align_corners has its own kernel in torch; all sizes of Stage B and some odd ones."""
    data, config = golden("interpolate")
    for (h, w), outputs in config["sizes"]:
        for H, W in outputs:
            assert rel(channels_first(resize_semantic(data[f"in/{h}x{w}"], (H, W))),
                       data[f"out/{h}x{w}/{H}x{W}"]) < 1e-6


def test_the_interpolation_can_be_learned_through_when_compiled():
    """With sizes that vary, torch.compile cannot differentiate F.interpolate(mode="bicubic", antialias=True): training
    the image encoder with --compile failed at its second size."""
    compiled = torch.compile(resize_semantic, backend="aot_eager", fullgraph=True, dynamic=True)

    def gradient(resize, raw, size):
        return torch.autograd.grad(resize(raw, size).pow(3).sum(), raw)[0]
    for h, w in ((3, 3), (3, 5)):
        raw = draw("semantic", 2, 16, h, w).requires_grad_()
        expected = gradient(resize_semantic, raw, (4 * h, 4 * w))
        assert rel(gradient(compiled, raw, (4 * h, 4 * w)), expected) < 1e-6


def test_stage_b_has_no_plain_feed_forward_blocks():
    """The original has a letter F, which no released weights use: an error is better than a block nobody can check."""
    _, config = golden("diffnext_original_only")
    with pytest.raises(ValueError, match="'CTF' has an unknown letter 'F': use C, T and A"), warnings.catch_warnings():
        warnings.simplefilter("ignore")          # config_to_ours also warns of self_attn
        StageB(**config_to_ours(config["model"], StageB))


# --- Stage A -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vqgan", "vqgan_three_levels"])
@pytest.mark.parametrize("naming", NAMINGS)
@torch.no_grad()
def test_stage_a_equals_both_peers(name, naming):
    """Encoding, with and without the codebook, decoding, from latents and from indices, and the losses."""
    model, data, config = model_from(StageA, name, naming)
    for i in range(len(config["sets"])):
        image, latents, out = data[f"in/set{i}/image"], data[f"in/set{i}/latents"], under(f"out/set{i}/", data)
        scale = model.scale_factor
        assert rel(model.encode(image), out["original_encode_x"]) < 1e-5
        assert rel(model.encode(image, quantise=True), out["original_encode_qe"]) < 1e-5
        assert rel(model.encode(image) * scale, out["diffusers_encode"]) < 1e-5
        assert torch.equal(model.encode_indices(image), out["indices"])
        assert rel(model.decode(latents), out["original_decode"]) < 1e-5
        assert rel(model.decode(latents), out["diffusers_decode_of_scaled"]) < 1e-5
        assert rel(model.decode_indices(out["indices"]), out["original_decode_indices"]) < 1e-5
        assert rel(model.decode(model.encode(image)), out["diffusers_forward"]) < 1e-5
        losses = model(image)
        vq_loss = losses["codebook"] + 0.25 * losses["commitment"]
        assert rel(vq_loss, out["original_encode_loss"]) < 1e-5
        assert rel(vq_loss, out["diffusers_vq_loss"]) < 1e-5


@torch.no_grad()
def test_stage_a_forward_can_quantise_row_by_row():
    """quantise as one bool for each row mixes both kinds of training in a batch; each row is as if it were alone."""
    model, data, _ = model_from(StageA, "vqgan")
    image = data["in/set0/image"]
    mixed = model(image, torch.tensor([True, False]))["images"]
    assert rel(mixed[0], model.decode(model.encode(image, quantise=True))[0]) < 1e-5
    assert rel(mixed[1], model.decode(model.encode(image))[1]) < 1e-5


def test_stage_a_passes_gradients_through_the_codebook():
    """argmin has no gradient; without the straight-through estimate the encoder would learn nothing from images."""
    model, data, _ = model_from(StageA, "vqgan")
    model.train()(data["in/set0/image"])["reconstruction"].backward()
    assert model.embed.weight.grad.abs().max() > 0
    assert model.codebook.codes.grad is None or model.codebook.codes.grad.abs().max() == 0


def test_untrained_vq_blocks_return_their_input():
    """gammas start at zero: an untrained autoencoder is only its resampling layers, which learn first."""
    x = torch.randn(2, 5, 3, 8)
    assert torch.equal(VQResBlock(8)(x), x)


# --- image encoders ----------------------------------------------------------------------------------

@torch.no_grad()
def test_image_encoder_equals_the_original():
    """The whole encoder of official size with weights made from names, and its last layers on given features."""
    pytest.importorskip("torchvision", reason="the official image encoder is torchvision's EfficientNetV2-S")
    data, _ = golden("effnet")
    encoder = build(EfficientNetEncoder, {}, weights_from_names(manifest("effnet_v2")))
    stages = capture({str(i): stage for i, stage in enumerate(encoder.backbone)})
    for tag, shape in (("a", (1, 3, 96, 64)), ("b", (2, 3, 75, 100))):
        raw = encoder(draw(f"efficientnet_v2_s.{tag}", *shape))
        assert rel(raw, data[f"out/efficientnet_v2_s/{tag}/mapper"]) < 1e-5
        for i, x in stages.items():
            facts = torch.stack([x.mean(), x.std(), x.flatten()[0]])
            assert rel(facts, data[f"mid/efficientnet_v2_s/{tag}/stage{i}_mean_std_first"]) < 1e-5
    head = {name.replace("/", ".", 1): tensor for name, tensor in under("sd/", data).items()}       # "mapper/0.weight"
    mapper = {ours: head[theirs] for theirs, (ours, _) in name_table(encoder).items() if theirs in head}
    encoder.load_state_dict(mapper, strict=False)
    raw = encoder.norm(encoder.to_semantic(data["in/head/features"]))
    assert rel(raw, data["out/head/mapper"]) < 1e-5
    from wuerstchen import scale_semantic
    assert rel(scale_semantic(raw), data["out/head/scaled"]) < 1e-5


def test_preprocess_equals_the_original_where_both_keep_the_pixel():
    """The original crops the middle square, we keep the longer side, in multiples of 32: compare what is in both."""
    data, _ = golden("effnet")
    ours = preprocess(data["in/preprocess/32_50x70"], 32)                                # resized to 32 x 44
    assert rel(ours, data["out/preprocess/32_50x70"]) < 1e-5
    ours = preprocess(data["in/preprocess/384_60x90"], 384)                              # (1, 3, 384, 576)
    assert rel(ours[..., 96:480][..., ::16, ::16], data["out/preprocess/384_60x90_every_16th"]) < 1e-5
    ours = preprocess(data["in/preprocess/48_40x40"], 48)                                # (1, 3, 32, 32)
    assert rel(ours, data["out/preprocess/48_40x40"][..., 8:40, 8:40]) < 1e-5


@torch.no_grad()
def test_tiny_image_encoder_reduces_32_times():
    """It stands in for EfficientNet, so it must give the same shape, for non-square images too."""
    encoder = TinyImageEncoder(c_hidden=(8, 8, 8, 8), blocks=(1, 1, 1, 1)).eval()
    assert encoder(torch.randn(2, 3, 96, 64)).shape == (2, 16, 3, 2)


# --- properties --------------------------------------------------------------------------------------

def small_b():
    model = StageB(c_timestep=8, c_cond=8, c_hidden=(8, 12), heads=(2, 3), blocks=(1, 2), levels=("CT", "CTA"),
                   inject=(False, True), c_semantic=3, c_text=5)
    return randomise(model).eval()


def small_c():
    return randomise(StageC(c_in=3, c=16, c_cond=5, c_timestep=8, depth=2, heads=2)).eval()


@torch.no_grad()
def randomise(model):
    """Initial values hide mistakes: much of what starts at zero would not be seen."""
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("which", ["a", "b", "c"])
@torch.no_grad()
def test_activations_stay_channels_last(which):
    """What runs from block to block is a contiguous (B,H,W,C): a copy or transposition costs time at every block."""
    if which == "a":
        model, args = randomise(StageA(2, 2, 16, 4, 32)), (torch.rand(2, 3, 12, 20),)
    elif which == "b":
        model, args = small_b(), (torch.randn(2, 4, 12, 20), torch.rand(2), torch.randn(2, 3, 2, 3),
                                  torch.randn(2, 4, 5))
    else:
        model, args = small_c(), (torch.randn(2, 3, 5, 7), torch.rand(2), torch.randn(2, 4, 5))
    kinds = (VQResBlock,) if which == "a" else (ResBlock, TimestepBlock, AttentionBlock)
    blocks = {name: module for name, module in model.named_modules()
              if type(module).__name__ in [k.__name__ for k in kinds]}
    outputs = capture(blocks)
    model(*args)
    assert len(outputs) == len(blocks) >= 5
    for name, x in outputs.items():
        assert x.ndim == 4 and x.is_contiguous(), f"{name} gives strides {x.stride()} for shape {tuple(x.shape)}"


@torch.no_grad()
def test_signal_and_scale_are_the_two_parts_of_the_output():
    """What train_b.py may teach one by one is what forward() divides: eps = (x_t - a) / scale, to the last bit."""
    t, text, semantic = torch.tensor([0.2, 0.9]), draw("text", 2, 4, 5), draw("semantic", 2, 3, 3, 3)
    model, x_t = small_b(), draw("x_t", 2, 4, 12, 20)
    a, scale = model.signal_and_scale(x_t, t, semantic, text)
    assert scale.min() > 0 and torch.equal((x_t - a) / scale, model(x_t, t, semantic, text))


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    """An image must not depend on the others in its batch: every row by itself has the same result."""
    c, b = small_c(), small_b()
    a = model_from(StageA, "vqgan")[0]
    x, t, text = torch.randn(3, 3, 5, 7), torch.rand(3), torch.randn(3, 4, 5)
    x_b, semantic, images = torch.randn(3, 4, 12, 20), torch.randn(3, 3, 2, 3), torch.rand(3, 3, 12, 20)
    for model, args in ((c, (x, t, text)), (b, (x_b, t, semantic, text)), (a.encode, (images,)),
                        (a.decode, (torch.randn(3, 4, 3, 5),))):
        together = model(*args)
        alone = torch.cat([model(*(arg[i:i + 1] for arg in args)) for i in range(3)])
        assert rel(alone, together) < 1e-5


@torch.no_grad()
def test_text_padding_is_seen():
    """No token is masked: the released weights were trained with the padding in view, so it must change the result."""
    c, b = small_c(), small_b()
    x, t, text = torch.randn(1, 3, 5, 7), torch.rand(1), torch.randn(1, 4, 5)
    changed = text.clone()
    changed[:, -1] += 1
    assert not torch.allclose(c(x, t, text), c(x, t, changed))
    x, semantic = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 2, 2)
    assert not torch.allclose(b(x, t, semantic, text), b(x, t, semantic, changed))


# --- half precision ----------------------------------------------------------------------------------

def network_and_inputs(stage):
    """-> a small network, x_t or tokens, t and its conditions, and its fast form, bound like a function."""
    torch.manual_seed(0)
    t, text, semantic = torch.tensor([0.5, 0.9]), torch.randn(2, 4, 5), torch.randn(2, 3, 3, 3)
    if stage == "c":
        return small_c(), torch.randn(2, 3, 6, 6), t, (text,), bind_c
    if stage == "b":
        return small_b(), torch.randn(2, 4, 8, 8), t, (semantic, text), bind_b
    model = StageBV1(codebook_size=16, c_token=8, c_timestep=8, c_cond=8, c_hidden=(8, 12), heads=(2, 3), blocks=(1, 2),
                     levels=("CT", "CTA"), c_semantic=3, c_text=5)
    return randomise(model).eval(), torch.randint(0, 16, (2, 8, 8)), t, (semantic, text), bind_b_v1


@pytest.mark.parametrize("stage", ["c", "b", "b_v1"])
@torch.no_grad()
def test_float16_survives_activations_beyond_its_end(stage):
    """Blocks may add up to more than 65504. In the small weights that ship x (1 + scale) reaches 178,971 in Stage B.
    Here each level's last TimestepBlock multiplies by up to 2e5, before float16 begins: plain and fast, next to
    float32."""
    model, x, t, conditions, bind = network_and_inputs(stage)
    largest = []
    for block in [m for m in model.modules() if type(m).__name__ == "TimestepBlock"][-1:]:
        block.mapper.bias += 60000
        block.register_forward_hook(lambda module, inputs, output: largest.append(output.abs().max().item()))
    exact = model(x, t, *conditions)
    assert largest[0] > 70000
    model.half()
    halves = [condition.half() for condition in conditions]
    plain, fast = model(x, t, *halves), bind(model, *halves)(x, t)
    assert max(largest) > 70000
    for found in (plain, fast):
        assert found.isfinite().all() and (found - exact).norm() < 0.01 * exact.norm()


@torch.no_grad()
def test_float16_convolves_and_sums_beyond_its_end():
    """What a ResBlock reads may be that large, and a norm over many positions is, of numbers that are not."""
    torch.manual_seed(0)
    block, x = randomise(ResBlock(8)), 1e5 * torch.randn(1, 6, 6, 8)
    exact, norm = block(x), randomise(GlobalResponseNorm(8))
    torch.testing.assert_close(block.half()(x), exact, rtol=1e-3, atol=0.02)
    x = 2000 + torch.randn(1, 64, 64, 8)                        # the norm of one channel is 128,000
    torch.testing.assert_close(norm.half()(x.half()).float(), norm.float()(x), rtol=3e-3, atol=0)


def test_tiny_weights_run_in_float16():
    """Stage B came to NaN in its first step. Now an image as in float32, to one step of 255 on average."""
    found, expected = (generate(Wuerstchen.load("tiny", "cpu", dtype), "a red apple on a blue background", seed=1,
                                steps_c=8, steps_b=3, output="pt") for dtype in (torch.float16, torch.float32))
    assert (found - expected).abs().mean() < 1 / 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", ["c", "b"])
@torch.no_grad()
def test_noisy_latents_stay_in_float32_for_the_last_formula(stage, dtype):
    """eps = (x_t - a) / b: rounding x_t, or the quotient, is most of the error. Against float32 with the same weights:
    half of it at least is gone; plain and fast."""
    model, x, t, conditions, bind = network_and_inputs(stage)
    model.head.weight.mul_(0.1)                                    # a is small, as at high noise in a trained network
    model.to(dtype)
    halves = [condition.to(dtype) for condition in conditions]
    before = model(x.to(dtype), t, *halves)
    plain, fast = model(x, t, *halves), bind(model, *halves)(x, t)
    exact = model.float()(x, t, *(half.float() for half in halves))
    assert plain.dtype == fast.dtype == torch.float32
    assert max((y - exact).norm() for y in (plain, fast)) < 0.5 * (before.float() - exact).norm()


def test_dropout_may_differ_from_level_to_level():
    """Legal in diffusers. In eval mode it changes nothing; in training only levels with a rate above 0 drop."""
    sizes = dict(c_timestep=8, c_cond=8, c_hidden=(8, 12), heads=(2, 3), blocks=(1, 2), levels=("CTA", "CTA"),
                 c_text=5, c_semantic=3)
    for model in (StageB(dropout=[0.0, 0.5], inject=(False, True), **sizes),
                  StageBV1(codebook_size=16, c_token=8, dropout=[0.0, 0.5], **sizes)):
        for blocks in (model.down_blocks, model.up_blocks):
            rates = [{block.dropout for block in level if hasattr(block, "dropout")} for level in blocks]
            assert rates == [{0.0}, {0.5}]
        x = torch.randn(1, 4, 8, 8) if isinstance(model, StageB) else torch.randint(0, 16, (1, 8, 8))
        inputs = x, torch.rand(1), torch.randn(1, 3, 2, 2), torch.randn(1, 4, 5)
        randomise(model)
        assert torch.equal(model.eval()(*inputs), model(*inputs))
        assert not torch.equal(model.train()(*inputs), model(*inputs))


# --- shapes and noise levels -------------------------------------------------------------------------

@pytest.mark.parametrize("width", [8, 9, 64])
def test_timestep_embedding_is_float32_whatever_goes_in(width):
    """In half precision t * 10000 is rounded to steps of 32 and the sine is noise: the embedding stays float32."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])                  # exact in bfloat16
    embedding = timestep_embedding(t.bfloat16(), width)
    assert embedding.dtype == torch.float32 and embedding.shape == (4, width)
    assert torch.equal(embedding, timestep_embedding(t, width))
    assert width % 2 == 0 or (embedding[:, -1] == 0).all()


def test_wrong_shapes_are_explained():
    """What came, what was expected, what to do, instead of an error from deep inside a convolution."""
    t, text = torch.rand(1), torch.randn(1, 4, 5)
    with pytest.raises(ValueError, match=r"Stage C got latents of shape \(1, 4, 5, 7\), expected 3 channels"):
        small_c()(torch.randn(1, 4, 5, 7), t, text)
    for shape in ((1, 3, 8, 8), (1, 4, 8, 6), (1, 4, 6, 8)):
        with pytest.raises(ValueError, match=r"Stage B got latents of shape .*multiples of 4"):
            small_b()(torch.randn(shape), t, torch.randn(1, 3, 2, 2), text)
    a = StageA(2, 1, 16, 4, 32)
    for shape in ((1, 4, 8, 8), (1, 3, 8, 6), (1, 3, 10, 8)):
        with pytest.raises(ValueError, match=r"Stage A got images of shape .*multiples of 4: crop or resize"):
            a.encode(torch.rand(shape))
    with pytest.raises(ValueError, match="16 channels are Stage C latents, decode them with Stage B"):
        a.decode(torch.randn(1, 16, 3, 3))


def test_checkpointing_of_products_computes_no_large_product_twice():
    """The point of it: the backward pass recomputes only cheap operations. Counted: products with a weight, by size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.__name__.startswith(("addmm", "mm")):
                counted[min(args[-1].shape) >= 128] += 1
            return function(*args, **(kwargs or {}))
    counts = {}
    for kind in (None, "products", "blocks"):
        torch.manual_seed(0)
        model = StageC(c=128, c_cond=128, c_timestep=16, depth=1, heads=2, dropout=0.0).requires_grad_(False)
        model.embed.weight.requires_grad_(True)
        model.checkpointing = kind
        x_t, t, text = torch.randn(1, 16, 3, 3), torch.rand(1), torch.randn(1, 5, 128)
        counted = {True: 0, False: 0}
        with Count():
            model(x_t, t, text).sum().backward()
        counts[kind] = counted
    assert counts["products"][True] == counts[None][True] < counts["blocks"][True]
    assert counts["products"][False] > counts[None][False]


def test_the_bias_of_keys_changes_nothing():
    """It adds the same to all scores of a query, which softmax ignores. So its gradient is only rounding: see
    tests/test_train_c.py."""
    block = AttentionBlock(16, 8, heads=2)
    x, text = torch.randn(2, 3, 3, 16), torch.randn(2, 5, 8)
    before = block(x, text)
    with torch.no_grad():
        block.key.bias.add_(torch.randn(16))
    torch.testing.assert_close(block(x, text), before, rtol=0, atol=1e-5)


