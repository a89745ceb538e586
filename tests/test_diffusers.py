"""Live comparison with diffusers, if it is installed: random sizes, random weights, and each other's files.

golden/ holds a few configurations that were chosen; here they are drawn. diffusers is needed by this file alone.
"""
import math
import random

import pytest
import torch

from loading import weights
from helpers import build, rel, theirs
from speed.fast import bind_b
from stage_a import StageA
from stage_b import StageB, timestep_embedding
from stage_c import StageC


@torch.no_grad()
def randomise(model):
    """Every tensor drawn at random: their initial zeros would hide most of the network."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn_like(tensor)
        if name.endswith("running_var"):
            tensor.copy_((0.3 * noise).exp())
        elif name.endswith(("gamma", "beta", "gammas")):
            tensor.copy_(0.5 * noise)
        elif tensor.ndim > 1 and "embedding.weight" not in name:
            tensor.copy_(noise / math.sqrt(tensor[0].numel()))
        else:
            tensor.copy_(0.2 * noise + (1 if name.endswith(".weight") else 0))
    return model.eval()


def random_prior(draw):
    heads = draw.randint(1, 4)
    config = dict(c_in=draw.randint(1, 6), c=heads * draw.choice([4, 8, 10]), c_cond=draw.randint(1, 20),
                  c_r=draw.randint(4, 20), depth=draw.randint(1, 3), nhead=heads)
    model = randomise(theirs("modeling_wuerstchen_prior", "WuerstchenPrior")(**config))
    with torch.no_grad():      # keeps |1 - b|, by which is divided, away from zero
        model.out[1].weight[config["c_in"]:] *= 0.2
        model.out[1].bias[config["c_in"]:] = -0.3
    return model, config


def prior_inputs(config, draw, b, dtype=torch.float32):
    """Latents of 5 x 7 and other sizes, noise levels that are exact in every dtype."""
    h, w = draw.choice([(5, 7), (1, 9), (4, 4), (7, 3)])
    return (torch.randn(b, config["c_in"], h, w).to(dtype),
            torch.tensor([draw.randint(0, 64) / 64 for _ in range(b)]).to(dtype),
            torch.randn(b, draw.randint(1, 9), config["c_cond"]).to(dtype))


def random_decoder(draw):
    depth = draw.randint(2, 4)
    heads = [draw.randint(1, 3) for _ in range(depth)]
    channels = draw.randint(1, 5)
    config = dict(c_in=channels, c_out=channels, c_r=draw.randint(4, 12), patch_size=draw.choice([1, 2]),
                  c_cond=draw.randint(4, 9),
                  c_hidden=[n * draw.choice([4, 6]) for n in heads], nhead=heads,
                  blocks=[draw.randint(1, 2) for _ in range(depth)],
                  level_config=[draw.choice(["C", "CT", "CTA", "CA", "CTC", "TC", "CAT"]) for _ in range(depth)],
                  inject_effnet=[draw.random() < 0.6 for _ in range(depth)], effnet_embd=draw.randint(1, 5),
                  clip_embd=draw.randint(1, 9), kernel_size=draw.choice([3, 3, 5]))
    return randomise(theirs("modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt")(**config)), config


def decoder_inputs(config, draw, b, dtype=torch.float32):
    """Non-square latents, semantic latents smaller and larger than the levels."""
    multiple = config["patch_size"] * 2 ** (len(config["c_hidden"]) - 1)
    h, w = draw.choice([(1, 2), (3, 2), (2, 1)])
    return (torch.randn(b, config["c_in"], h * multiple, w * multiple).to(dtype),
            torch.tensor([draw.randint(0, 64) / 64 for _ in range(b)]).to(dtype),
            torch.randn(b, config["effnet_embd"], draw.randint(1, 9), draw.randint(1, 9)).to(dtype),
            torch.randn(b, draw.randint(1, 9), config["clip_embd"]).to(dtype))


SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_stage_c_equals_diffusers(seed):
    draw = random.Random(seed)
    reference, config = random_prior(draw)
    model = build(StageC, config, reference.state_dict())
    for b in (1, 2, 3):
        x, t, text = prior_inputs(config, draw, b)
        assert rel(model(x, t, text), reference(x, t, text)) < 1e-5, config


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_stage_b_equals_diffusers(seed):
    draw = random.Random(seed)
    reference, config = random_decoder(draw)
    model = build(StageB, config, reference.state_dict())
    for b in (1, 2, 3):
        x, t, semantic, text = decoder_inputs(config, draw, b)
        assert rel(model(x, t, semantic, text), reference(x, t, semantic, text)) < 1e-5, config


@pytest.mark.parametrize("levels", [("AC", "CTA"), ("ACT", "CT"), ("TCA", "A"), ("A", "AT")])
@pytest.mark.parametrize("inject", [[False, True], [True, False]])
@torch.no_grad()
def test_levels_that_begin_without_a_res_block_equal_diffusers(levels, inject):
    """The skip of a level joins its first block. If that is an AttentionBlock or a TimestepBlock, diffusers leaves the
    skip out, also of the first ResBlock, whose weights have no columns for it. Plain and fast."""
    draw = random.Random(0)
    config = dict(c_r=8, c_cond=8, c_hidden=[8, 12], nhead=[2, 3], blocks=[2, 1], level_config=[*levels],
                  inject_effnet=inject, effnet_embd=3, clip_embd=5, c_in=4, c_out=4, patch_size=2)
    reference = randomise(theirs("modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt")(**config))
    model = build(StageB, config, reference.state_dict())
    x, t, semantic, text = decoder_inputs(config, draw, 2)
    expected = reference(x, t, semantic, text)
    assert rel(model(x, t, semantic, text), expected) < 1e-5 > rel(bind_b(model, semantic, text)(x, t), expected)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_stage_a_equals_diffusers(seed):
    """diffusers never scales, so its latents are ours times scale_factor."""
    draw = random.Random(seed)
    levels = draw.randint(1, 3)
    config = dict(levels=levels, bottleneck_blocks=draw.randint(1, 3), embed_dim=draw.choice([8, 16, 24]),
                  latent_channels=draw.randint(1, 5), num_vq_embeddings=draw.randint(4, 40),
                  scale_factor=draw.uniform(0.2, 2))
    reference = randomise(theirs("modeling_paella_vq_model", "PaellaVQModel")(**config))
    model = build(StageA, config, reference.state_dict())
    for b in (1, 2, 3):
        images = torch.rand(b, 3, draw.randint(1, 4) * 2 ** levels, draw.randint(1, 4) * 2 ** levels)
        raw = reference.encode(images).latents
        assert rel(model.encode(images) * model.scale_factor, raw) < 1e-5, config
        assert rel(model.decode(raw / model.scale_factor), reference.decode(raw).sample) < 1e-5, config
        quantised, _, (_, _, indices) = reference.vquantizer(raw)
        assert torch.equal(model.encode_indices(images).flatten(), indices), config
        assert rel(model.encode(images, quantise=True) * model.scale_factor, quantised) < 1e-5, config


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", ["b", "c"])
@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_diffusers(stage, seed, monkeypatch):
    """Both are compared with float32; ours may round in other places, but not more.

    diffusers multiplies t by 10000 in bfloat16, whose steps are 32 to 64 there, so the sines it feeds its network are
    unrelated to those of training. To compare the rest, it gets our embedding, computed in float32.
    """
    draw = random.Random(100 + seed)
    reference, config = (random_decoder if stage == "b" else random_prior)(draw)
    full = build(StageB if stage == "b" else StageC, config, reference.state_dict())
    half = build(StageB if stage == "b" else StageC, config, reference.state_dict(), torch.bfloat16)
    inputs = (decoder_inputs if stage == "b" else prior_inputs)(config, draw, 2, torch.bfloat16)
    # Both networks in float32 see the weights and inputs that bfloat16 can hold: what is left is rounding on the way.
    full.load_state_dict({name: t.float() for name, t in half.state_dict().items()})
    exact = full(*(x.float() for x in inputs))
    monkeypatch.setattr(type(reference), "gen_r_embedding", lambda self, r: timestep_embedding(r, self.c_r).to(r.dtype))
    error_ours = (half(*inputs).float() - exact).square().mean().sqrt().item()
    error_theirs = (reference.bfloat16()(*inputs).float() - exact).square().mean().sqrt().item()
    scale = exact.square().mean().sqrt().item()
    assert error_ours < 1.5 * error_theirs + 1e-3 * scale, (config, error_ours / scale, error_theirs / scale)


@torch.no_grad()
def test_files_are_exchanged_with_diffusers_both_ways(tmp_path):
    """Folders that diffusers wrote load here; folders that we wrote load there and give the same."""
    draw = random.Random(5)
    prior, config_c = random_prior(draw)
    decoder, config_b = random_decoder(draw)
    config_a = dict(levels=2, bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16, scale_factor=0.5)
    vqgan = randomise(theirs("modeling_paella_vq_model", "PaellaVQModel")(**config_a))
    image = torch.rand(1, 3, 8, 12)
    latents = vqgan.encode(image).latents
    def forward(model, *args):
        return model(*args)

    for reference, load, save, args, ours, peer in (
            (prior, weights.load_stage_c, weights.save_model, prior_inputs(config_c, draw, 2), forward, forward),
            (decoder, weights.load_stage_b, weights.save_model, decoder_inputs(config_b, draw, 2), forward, forward),
            (vqgan, weights.load_stage_a, weights.save_model, (latents,),
             lambda model, z: model.decode(z / 0.5), lambda model, z: model.decode(z).sample)):
        name = type(reference).__name__
        reference.save_pretrained(tmp_path / f"{name}.theirs")
        model = load(tmp_path / f"{name}.theirs")
        assert rel(ours(model, *args), peer(reference, *args)) < 1e-5
        save(model, tmp_path / f"{name}.ours")
        back, info = type(reference).from_pretrained(tmp_path / f"{name}.ours", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert rel(ours(load(tmp_path / f"{name}.ours"), *args), peer(back.float().eval(), *args)) < 1e-5
