"""Stage B of Würstchen v1: network and sampler compute what the released code computes; the pipeline generates images.

The recorded cases in golden/paella_v1 come from the authors' code, with all its random draws.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from extras.editing import InitImage, encode_image, generate, image_size, interpolate, reconstruct
from extras.previews import Previews
from loading.errors import WeightsError
from loading import weights
from helpers import HostReads, SMALL_V1, TINY, build, capture, golden, manifest, rel, small_v1, under
from stage_a import StageA
from speed.fast import accelerate, bind_b_v1
from stage_b import AttentionBlock, ResBlock, TimestepBlock, TinyImageEncoder, timestep_embedding
from stage_c import StageC
from v1 import sampling
from v1.losses import loss_weight, training_levels, training_loss
from v1.pipeline import TokenSampling, WuerstchenV1
from v1.sampling import MODES, add_noise, choose, per_step, sample
from v1.stage_b import SkipResBlock, StageBV1
from wuerstchen import Noise, Sampling, Wuerstchen, scale_semantic, unscale_semantic

pytestmark = pytest.mark.filterwarnings("ignore:.*not what these weights were trained on")


@pytest.fixture(scope="module")
def recorded():
    """The recorded model, its data and its settings."""
    data, config = golden("paella_v1")
    assert config["model"]["c_in"] == config["model"].pop("c_out")       # here one width, c_token
    return build(StageBV1, config["model"], under("sd/original/", data)), data, config


@torch.no_grad()
def small(**sizes) -> StageBV1:
    """Random in all its parameters: much of what starts at zero would not be seen."""
    model = StageBV1(**dict(codebook_size=32, c_token=6, c_timestep=8, c_cond=8, c_hidden=(8, 12), heads=(-1, 3),
                            blocks=(1, 2), levels=("CT", "CTA"),
                            c_semantic=3, c_text=5) | sizes)
    for p in model.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return model.eval()


# --- the network -------------------------------------------------------------------------------------

@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_network_equals_the_original(recorded, i):
    """Non-square grids, semantic latents of 2 x 2 and 3 x 4, texts of 1 and 5 tokens or none, noise levels up to 1."""
    model, data, _ = recorded
    x, t, semantic, text = (data[f"in/set{i}/{name}"] for name in ("x", "r", "effnet", "byt5"))
    for logits in (model(x.long(), t, semantic, text), bind_b_v1(model, semantic, text)(x.long(), t)):
        assert rel(logits, data[f"out/set{i}/logits"]) < 1e-5
    assert rel(model(x.long(), t, semantic), data[f"out/set{i}/logits_without_text"]) < 1e-5


@torch.no_grad()
def test_a_new_model_knows_which_tokens_look_alike():
    """The nearer two codes, the more similar their embeddings, of mean length 1; scores start from the same numbers."""
    codes = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + 3
    model = small(codebook_size=64, c_token=64)
    model.init_tokens(codes)
    e, z = model.embed_token.weight, (codes - codes.mean(0)) / codes.std(0)
    assert torch.equal(e, model.classify.weight) and e.square().sum(1).mean() == pytest.approx(63 / 64, abs=1e-5)
    of_codes, of_embeddings = (torch.cdist(x, x)[torch.triu_indices(64, 64, 1).unbind()] for x in (z, e))
    ranks = torch.stack([of_codes.argsort().argsort(), of_embeddings.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7
    # "near m, give or take s" is a linear function of the features, and so are all tokens' scores.
    wanted = -(z - z[5]).square().sum(1) / 2
    features = torch.cat([e, torch.ones(64, 1)], dim=1)[:, [*range(14), 64]]
    assert (features @ torch.linalg.lstsq(features, wanted[:, None]).solution)[:, 0] == pytest.approx(wanted.tolist(),
                                                                                                      abs=1e-3)
    model = small(codebook_size=64, c_token=6)          # too narrow for all of them: the first
    model.init_tokens(codes)
    assert model.embed_token.weight.isfinite().all() and not torch.equal(model.embed_token.weight[0],
                                                                         model.embed_token.weight[1])


def test_official_size():
    """The defaults are the released sizes; their names and shapes are compared in test_weights.py."""
    with torch.device("meta"):
        model = StageBV1()
    assert model.multiple == 8 and sum(p.numel() for p in model.parameters()) == 730_814_336
    assert sum(math.prod(shape) for shape, _ in manifest("stage_b_v1").values()) == 730_814_336


def test_untrained_network_holds_all_tokens_for_alike():
    """A zero output layer: the loss starts at log K, whatever the noise, not above."""
    model = StageBV1(codebook_size=32, c_token=6, c_timestep=8, c_cond=8, c_hidden=(8, 12), heads=(-1, 3),
                     blocks=(1, 2), levels=("CT", "CTA"),
                     c_semantic=3, c_text=5)
    tokens, t = torch.randint(32, (2, 8, 4)), torch.tensor([0.1, 1.0])
    logits = model(tokens, t, torch.randn(2, 3, 2, 2), torch.randn(2, 4, 5))
    assert logits.shape == (2, 32, 8, 4) and torch.equal(logits, torch.zeros_like(logits))
    loss = training_loss(logits, tokens, t, torch.rand(2, 8, 4) < 0.5)
    assert loss.item() == pytest.approx(math.log(32), rel=1e-6)
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0        # and goes down from there


@torch.no_grad()
def test_activations_stay_channels_last():
    """What runs from block to block is a contiguous (B,H,W,C): a copy or transposition costs time at every block."""
    model = small()
    blocks = {name: module for name, module in model.named_modules()
              if isinstance(module, (ResBlock, TimestepBlock, AttentionBlock))}
    outputs = capture(blocks)
    model(torch.randint(32, (2, 12, 8)), torch.rand(2), torch.randn(2, 3, 2, 3), torch.randn(2, 4, 5))
    assert len(outputs) == len(blocks) == 16 and sum(isinstance(block, SkipResBlock) for block in blocks.values()) == 1
    for name, x in outputs.items():
        assert x.ndim == 4 and x.is_contiguous(), f"{name} gives strides {x.stride()} for shape {tuple(x.shape)}"


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    """An image must not depend on the others in its batch."""
    model = small()
    args = torch.randint(32, (3, 8, 12)), torch.rand(3), torch.randn(3, 3, 2, 3), torch.randn(3, 4, 5)
    alone = torch.cat([model(*(arg[i:i + 1] for arg in args)) for i in range(3)])
    assert rel(alone, model(*args)) < 1e-5


@torch.no_grad()
def test_noise_levels_survive_half_precision():
    """In bfloat16 t * 10000 is rounded to steps of 64: the network could not see its noise level. t stays float32."""
    model, tokens, t = small().bfloat16(), torch.randint(32, (1, 8, 8)), torch.tensor([0.501])
    condition = torch.zeros(1, 3, 2, 2).bfloat16()
    assert model(tokens, t, condition).dtype == torch.bfloat16
    embeddings = [timestep_embedding(level, 8) for level in (t, t.bfloat16().float())]
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.1            # so it would matter
    outputs = capture({"mapper": model.down_blocks[0][1].mapper})
    model(tokens, t, condition)
    assert torch.equal(outputs["mapper"], model.down_blocks[0][1].mapper(embeddings[0].bfloat16()))


@pytest.mark.parametrize("shape", [(1, 8, 6), (1, 6, 8), (1, 1, 8, 8)])
def test_wrong_shapes_are_explained(shape):
    """What came, what was expected, what to do, instead of an error from deep inside."""
    with pytest.raises(ValueError, match=r"Stage B of v1 got tokens of shape .*multiples of 4: images need sides that "
                                         r"are multiples of 16"):
        small()(torch.zeros(shape, dtype=torch.int64), torch.rand(1), torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="'CTF' has an unknown letter 'F': use C, T and A"):
        small(levels=("CT", "CTF"))


# --- training ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("i", [0, 1])
def test_noise_weight_and_loss_equal_the_original(recorded, i):
    """Replacement by given masks and by recorded uniform numbers; the loss: weighted mean of each image, then all."""
    model, data, _ = recorded
    given, out = under(f"in/set{i}/", data), under(f"out/set{i}/", data)
    tokens, t, mask = given["x"].long(), given["r"], given["mask"].bool()
    noised, drawn = add_noise(tokens, t, given["auto_random_x"].long(), given["auto_uniform"])
    assert torch.equal(noised, out["auto_x"].long()) and torch.equal(drawn, out["auto_mask"].bool())
    assert torch.equal(add_noise(tokens, t, given["random_x"].long(), 1.0 - 2.0 * mask)[0].long(),
                       out["add_noise"].long())
    assert rel(loss_weight(t, mask), out["loss_weight"]) < 1e-6
    errors = F.cross_entropy(out["logits"], tokens, label_smoothing=0.1, reduction="none")
    assert rel(errors, out["training_ce"]) < 1e-5
    assert rel(training_loss(out["logits"], tokens, t, mask), out["training_loss"]) < 1e-6


def test_the_share_of_replaced_tokens_is_the_noise_level():
    """At t = 1 all are random, at 0 none; a random token may be the true one, so that slightly fewer than t change."""
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    tokens, random = torch.randint(8, (5, 256, 256)), torch.randint(8, (5, 256, 256))
    u = torch.rand(5, 256, 256).clamp(min=1e-9)
    noised, mask = add_noise(tokens, t, random, u)
    assert (mask.float().mean(dim=(1, 2)) - t).abs().max() < 0.01       # a standard deviation is 0.002
    assert ((noised != tokens).float().mean(dim=(1, 2)) - t * 7 / 8).abs().max() < 0.01
    assert torch.equal(noised[mask], random[mask]) and torch.equal(noised[~mask], tokens[~mask])
    assert not mask[0].any() and mask[4].all()


def test_loss_weight_in_closed_form():
    """1 for what was replaced; for the rest 1 at t = 1 and 0.3 at t = 0."""
    mask = torch.tensor([[[True, False]]]).expand(3, 1, 2)
    weight = loss_weight(torch.tensor([0.0, 0.5, 1.0]), mask)
    torch.testing.assert_close(weight[:, 0], torch.tensor([[1, 0.3], [1, 0.65], [1, 1]]))


def test_images_count_alike_in_the_loss():
    """An image at t = 0.05 has little weight in each of its tokens, but not in all: its mean is taken first."""
    logits, tokens = torch.randn(2, 5, 4, 4), torch.randint(5, (2, 4, 4))
    t, mask = torch.tensor([0.05, 0.95]), torch.rand(2, 4, 4) < 0.5
    loss = 0.0
    for row in range(2):
        p = logits[row].softmax(0)
        above = below = 0.0
        for y in range(4):
            for x in range(4):
                weight = 1.0 if mask[row, y, x] else 1 - (1 - t[row]) * 0.7
                target = torch.full((5,), 0.1 / 5)
                target[tokens[row, y, x]] += 0.9
                above, below = above - weight * (target * p[:, y, x].log()).sum(), below + weight
        loss += above / below / 2
    torch.testing.assert_close(training_loss(logits, tokens, t, mask), loss)


def test_training_visits_t_1_where_sampling_starts():
    """7.5 % exactly there, none below 0.001, evenly between."""
    t = training_levels((torch.arange(10000) + 0.5) / 10000)
    assert (t == 1).float().mean().item() == pytest.approx(0.075, abs=2e-4)
    assert t.min() >= 0.001 and t.max() == 1
    inside = t[t < 1].sort().values
    torch.testing.assert_close(inside, torch.linspace(inside[0], 1, len(inside) + 1)[:-1], rtol=0, atol=2e-4)


# --- choosing tokens ---------------------------------------------------------------------------------

def test_multinomial_draws_by_probability():
    """Evenly spread u give each token the share that softmax(logits / temperature) says, to within one draw."""
    logits, n = torch.randn(1, 7, 1, 1).expand(1, 7, 1, 10000), 10000
    u = ((torch.arange(n) + 0.5) / n)[None, None]
    for temperature in (1.0, 0.6):
        shares = choose(logits, "multinomial", temperature, u).flatten().bincount(minlength=7) / n
        torch.testing.assert_close(shares, (logits[0, :, 0, 0] / temperature).softmax(0), rtol=0, atol=1.1 / n)


def test_multinomial_stays_inside_the_codebook():
    """u = 0 and u = 1, which rounding can make of numbers near them, and probabilities that vanish in float32."""
    logits = torch.full((1, 4, 1, 2), -1000.0)
    logits[0, 1] = 0
    for value in (1e-8, 0.5, 1.0):
        assert (choose(logits, "multinomial", 1.0, torch.full((1, 1, 2), value)) == 1).all()
    assert (choose(torch.zeros(1, 3, 1, 2), "multinomial", 1.0,
                   torch.tensor([[[0.0, 1.0]]])) == torch.tensor([[[0, 2]]])).all()


def test_a_low_temperature_is_argmax():
    logits, u = torch.randn(2, 9, 4, 4), torch.rand(2, 4, 4)
    likeliest = logits.argmax(1)
    assert torch.equal(choose(logits, "argmax", 1.0, u), likeliest)
    assert torch.equal(choose(logits, "multinomial", 1e-4, u), likeliest)
    assert not torch.equal(choose(logits, "multinomial", 1.0, u), likeliest)


def test_quant_takes_the_code_nearest_to_the_mean():
    logits, codes = torch.randn(2, 9, 4, 4), torch.randn(9, 3)
    mean = torch.einsum("bkhw,kc->bhwc", (logits / 0.5).softmax(1), codes)
    expected = torch.cdist(mean.flatten(0, 2), codes).argmin(1).view(2, 4, 4)
    assert torch.equal(choose(logits, "quant", 0.5, torch.rand(2, 4, 4), codes), expected)


# --- the sampler -------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", ["argmax", "multinomial", "quant", "mixed"])
def test_sampler_equals_the_original(recorded, run, monkeypatch):
    """Four recorded runs: every token after every step and every renoising, with the original's random draws."""
    model, data, config = recorded
    settings = dict(steps=12, temperature=[0.7, 0.3], cfg=[8.0, 8.0], mode="multinomial", t_start=1.0,
                    t_end=0.0) | config["sample_runs"][run]
    steps, given, out = settings["steps"], under(f"in/sample/{run}/", data), under(f"out/sample/{run}/", data)
    semantic, text, without = (data[f"in/sample/{name}"] for name in ("effnet", "byt5", "byt5_uncond"))
    network = bind_b_v1(model, torch.cat([semantic, torch.zeros_like(semantic)]), torch.cat([text, without]))
    draws = iter([u for k in range(steps) for u in (torch.full((2, 8, 16), 0.5),
                                                    *given["uniform"][k:k + 1])] + [None] * steps)
    drawn, states, scores = iter(given.get("drawn", [])), [], []

    def predict(tokens, t, guided):
        assert guided
        if scores:
            states.append(tokens)                # what the last step left, noised again
        return network(torch.cat([tokens, tokens]), torch.cat([t, t]))

    def recorded_choice(logits, mode, temperature, u, codes):
        scores.append((logits / temperature).softmax(1))
        states.append(next(drawn).long() if mode == "multinomial" else choose(logits, mode, temperature, u, codes))
        return states[-1]
    monkeypatch.setattr(sampling, "choose", recorded_choice)
    quant_from = settings.get("sampling_quant_steps", steps)
    tokens = sample(predict, given["init_noise"].long(), lambda: next(draws),
                    torch.linspace(settings["t_start"], settings["t_end"], steps + 1),
                    settings["temperature"], settings["cfg"], [settings["mode"] if i < quant_from else "quant"
                                                               for i in range(steps)],
                    settings.get("renoise_steps"), data["in/codebook"])
    assert torch.equal(tokens, out["tokens"].long())
    for found, reference in ((scores[0], out["scores_first"]), (scores[-1], out["scores_last"])):
        # As logarithms, that is as guided logits: the exponential of up to 27 times a logit would magnify the rounding.
        assert rel(found.clamp(min=1e-30).log(), reference.clamp(min=1e-30).log()) < 1e-5
    if settings.get("renoise_steps") is None:
        assert torch.equal(torch.stack(states), out["intermediate"].long())


def test_sampler_with_a_given_random_stream_equals_the_algorithm_written_out():
    """Position by position in plain Python: guided logits, softmax, the cumulated probability that u passes,
    replacement below t."""
    model, k = small(), 32
    semantic, text = torch.randn(1, 3, 2, 2), torch.randn(1, 4, 5)
    stream = torch.rand(6, 1, 4, 4)
    noise, levels = torch.randint(k, (1, 4, 4)), [1.0, 0.7, 0.2, 0.0]

    def predict(tokens, t, both):
        conditional = model(tokens, t, semantic, text)
        return torch.cat([conditional, model(tokens, t, semantic * 0, text * 0)]) if both else conditional
    draws = iter(stream)
    found = sample(predict, noise, lambda: next(draws), torch.tensor(levels), (0.9, 0.5), (3.0, 1.0))

    tokens, stream = noise.clone(), iter(stream)
    with torch.no_grad():
        for i, (temperature, scale) in enumerate(((0.9, 3.0), (0.7, 2.0), (0.5, 1.0))):
            t = torch.tensor([levels[i]])
            with_text, without = model(tokens, t, semantic, text)[0], model(tokens, t, semantic * 0, text * 0)[0]
            p = ((without + scale * (with_text - without)) / temperature).softmax(0)                     # (K, 4, 4)
            u, again = next(stream)[0], next(stream)[0]
            for y in range(4):
                for x in range(4):
                    token, height = 0, p[0, y, x]
                    while height < u[y, x]:
                        token += 1
                        height = height + p[token, y, x]
                    replaced = i < 2 and again[y, x] <= levels[i + 1]
                    tokens[0, y, x] = noise[0, y, x] if replaced else token
    assert torch.equal(found, tokens)


def flat(tokens, t, both, k=16):
    """A predict that knows nothing."""
    return torch.zeros(len(tokens) * (1 + both), k, *tokens.shape[1:])


def run_flat(steps=4, predict=flat, **options):
    levels = torch.linspace(1, 0, steps + 1)
    return sample(predict, torch.randint(16, (2, 4, 4)), lambda: torch.rand(2, 4, 4), levels, **options)


def test_temperature_and_guidance_in_closed_form(monkeypatch):
    """From the first number in the first step to the second in the last, evenly; one number is for all steps; a list
    has one for each."""
    temperatures, scales = [], []
    monkeypatch.setattr(sampling, "choose",
                        lambda logits, mode, temperature, u, codes: temperatures.append(temperature)
                        or logits.argmax(1))
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda a, b, scale: scales.append(scale) or lerp(a, b, scale))
    run_flat(5, temperature=(1.0, 0.6), guidance=(8.0, 2.0))
    assert temperatures == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])
    assert scales == pytest.approx([8.0, 6.5, 5.0, 3.5, 2.0])
    assert per_step("x", 3, 2) == [3, 3] and per_step("x", (4.0, 2.0), 1) == [4.0]
    assert per_step("x", [1, 5, 2], 3) == [1, 5, 2]
    assert per_step("x", "quant", 2) == per_step("x", ["quant", "quant"], 2) == ["quant", "quant"]


def test_guidance_1_asks_no_unconditional_prediction_and_may_change_from_step_to_step():
    """In the original, guidance for the first steps only ends in an error of shapes, and none at all in another."""
    asked = []

    def predict(tokens, t, both):
        asked.append(both)
        return flat(tokens, t, both)
    run_flat(4, predict, guidance=[2.0, 2.0, 1.0, 1.0])
    run_flat(2, predict, guidance=1.0)
    assert asked == [True, True, False, False, False, False]


def test_the_last_tokens_are_not_noised_and_renoise_steps_ends_it_earlier():
    """levels[i + 1] of the tokens are replaced after step i; after the last, and after renoise_steps, none."""
    for renoise, rates in ((None, [0.75, 0.5, 0.25]), (1, [0.75, 0, 0]), (0, [0, 0, 0])):
        seen = []

        def predict(tokens, t, both):
            seen.append((tokens != 3).float().mean().item())
            # sure of token 3
            return F.one_hot(torch.full_like(tokens, 3), 16).movedim(-1, 1) * 100.0
        noise = torch.full((1, 64, 64), 5)
        tokens = sample(predict, noise, lambda: torch.rand(1, 64, 64), torch.linspace(1, 0, 5), guidance=1.0,
                        renoise_steps=renoise)
        assert (tokens == 3).all() and seen == pytest.approx([1.0, *rates], abs=0.03)


def test_watch_sees_every_choice_and_may_change_it():
    seen = []

    def watch(i, t, tokens):
        seen.append((i, t, tokens.shape))
        return torch.full_like(tokens, 7) if i == 3 else None
    assert (run_flat(4, watch=watch) == 7).all()
    assert seen == [(i, 0.75 - i / 4, (2, 4, 4)) for i in range(4)]


def test_sampling_may_start_from_tokens():
    """Then the noise only fills what is replaced."""
    start, first = torch.randint(16, (2, 4, 4)), []
    sample(lambda tokens, t, both: first.append(tokens) or flat(tokens, t, both),
           torch.zeros(2, 4, 4, dtype=torch.int64),
           lambda: torch.rand(2, 4, 4), torch.tensor([0.5, 0.0]), guidance=1.0, start=start)
    assert torch.equal(first[0], start)


@pytest.mark.parametrize("options, message", [
    (dict(mode="best"), "the mode is 'best', expected one of multinomial, argmax, quant"),
    (dict(mode=["argmax"] * 3), "mode has 3 values for 4 steps"),
    (dict(mode="quant"), "mode quant needs Stage A's codebook"),
    (dict(temperature=0.0), "the temperature is 0, expected more than 0"),
    (dict(temperature=(1.0, -0.5)), "the temperature is -0.5, expected more than 0"),
    (dict(guidance=(1.0, 2.0, 3.0)), "guidance has 3 values for 4 steps"),
    (dict(steps=0), "levels must be at least two strictly falling numbers")])
def test_settings_that_make_no_sense_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        run_flat(**options)


def test_numbers_that_are_none_are_found_at_once():
    """argmax of NaN is a token like any other: the image would be of one colour, and nothing would tell why."""
    with pytest.raises(FloatingPointError, match=r"step 1 of 4 \(t = 1.000\)"):
        run_flat(predict=lambda *args: flat(*args) * float("nan"))


@pytest.mark.parametrize("mode", ["multinomial", "argmax", "quant"])
def test_no_step_waits_for_the_numbers_of_another_device(mode):
    """As for v2, see test_diffusion.py."""
    with HostReads() as reads:
        tokens = sample(lambda tokens, t, both: torch.empty(4 if both else 2, 16, 4, 4, device="meta"),
                        torch.empty(2, 4, 4, dtype=torch.int64, device="meta"),
                        lambda: torch.empty(2, 4, 4, device="meta"), torch.linspace(1, 0, 5), mode=mode,
                        codes=torch.empty(16, 4, device="meta"))
    assert tokens.is_meta and reads.count == 1


# --- the pipeline ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def v1() -> WuerstchenV1:
    """Small, random, of v1 in every way, and fast; the text encoder is that of the tiny weights."""
    torch.manual_seed(0)
    text = weights.load_text_encoder(TINY / "text_encoder", TINY / "tokenizer")
    stage_c = StageC(c_in=16, c=16, c_cond=128, c_timestep=8, depth=1, heads=2)
    torch.nn.init.normal_(stage_c.head.weight, std=0.1)
    model = WuerstchenV1(dict(
        stage_a=StageA(2, 1, 8, 4, 32).eval(), stage_b=small(c_semantic=16, c_text=128), stage_c=stage_c.eval(),
        text_encoder_c=text, text_encoder_b=text, image_encoder=TinyImageEncoder(c_hidden=(4, 4, 4, 4)).eval()),
        size=128)
    accelerate(model)
    model.preview_file = None
    return model


QUICK = dict(steps_c=2, steps_b=3)


def test_v1_has_its_notebook_s_defaults(v1, monkeypatch):
    """60 even steps at guidance 6, then 8 at guidance 2, temperature 1 to 0.6: for these only. v2 keeps its own."""
    assert (v1.c, v1.b) == (Sampling(60, guidance=6.0), TokenSampling(8, "multinomial", 2.0, temperature=(1.0, 0.6)))
    v2 = Wuerstchen(v1.networks)
    assert (v2.c, v2.b, v2.size) == (Sampling(29, guidance=4.0, early=True), Sampling(12), 1024)
    used = {}
    monkeypatch.setattr(v1, "sample_c", lambda *args, **options: used.update(c=args[3]) or torch.zeros(1, 16, 3, 3))
    monkeypatch.setattr(v1, "sample_b", lambda *args, **options: used.update(b=args[4]) or torch.zeros(1, 4, 32, 32))
    v1("a cat")
    assert used == dict(c=v1.c, b=v1.b)
    assert torch.equal(v1.c.levels, torch.linspace(1, 0, 61))
    assert torch.equal(v1.b.continuous.levels, torch.linspace(1, 0, 9))


def test_v1_s_latents_are_not_scaled(v1):
    """(x + 1) / 42 came with v2. With scaled latents v1's Stage B generates nothing recognisable, without an error."""
    raw = torch.randn(1, 16, 3, 3)
    assert v1.scale_semantic(raw) is raw and v1.unscale_semantic(raw) is raw
    seen, given = [], dict(latents_c=raw)
    generate(v1, "a cat", given=given, output="semantic", **QUICK,
             callback=lambda stage, i, t, x, x_0: seen.append(x.clone()) if stage == "C" else None)
    assert torch.equal(seen[-1], generate(v1, "a cat", given=given, output="semantic", **QUICK))
    v2 = WuerstchenV1(v1.networks, size=128, raw=False)                 # v1's Stage B can learn on v2's latents
    assert v2.scale_semantic is scale_semantic and v2.unscale_semantic is unscale_semantic


def test_an_image_is_made_of_codes(v1):
    """Stage A decodes vectors of its codebook, divided by its scale: they come back as tokens and as the same image."""
    latents, stage_a = generate(v1, "a cat", seed=3, output="latents_b", **QUICK), v1.part("stage_a")
    z = latents.permute(0, 2, 3, 1) * stage_a.scale_factor                               # (1, 32, 32, 4)
    tokens = stage_a.codebook.nearest(z)
    torch.testing.assert_close(F.embedding(tokens, stage_a.codebook.codes), z)
    assert len(tokens.unique()) > 3
    with torch.no_grad():
        image = stage_a.decode_indices(tokens).clamp(0, 1)
    torch.testing.assert_close(generate(v1, "a cat", seed=3, output="pt", **QUICK), image, rtol=0, atol=1e-5)


def test_random_numbers_of_any_size_are_tokens(v1):
    """The normal distribution's integral rounds to 1 at 6 standard deviations: the last token, not one behind it."""
    semantic, text, seen = torch.zeros(1, 16, 3, 3), torch.zeros(1, 5, 128), []
    v1.sample_b(semantic, text, text, lambda: torch.full((1, 1, 32, 32), 7.0), TokenSampling(2, temperature=1.0),
                callback=lambda stage, i, t, tokens, x_0: seen.append(tokens.unique().tolist()))
    assert seen == [[31], [31]]


def test_an_image_does_not_depend_on_its_neighbours(v1):
    """Each has a generator of its own, from which its tokens are drawn as well: a seed means an image, in any batch."""
    together = generate(v1, ["a cat", "a dog", "a cat"], seed=[5, 6, 7], output="latents_b", **QUICK)
    for i, (prompt, seed) in enumerate((("a cat", 5), ("a dog", 6), ("a cat", 7))):
        assert torch.equal(generate(v1, prompt, seed=seed, output="latents_b", **QUICK)[0], together[i])
    assert not torch.equal(together[0], together[2])


def test_stage_b_of_v1_is_called_without_condition_as_in_training(v1, monkeypatch):
    """The negative prompt's text, and zeros for the semantic latent; first rows with the condition, then without."""
    conditions, steps, bind_b = [], [], v1.bind_b

    def recorded(*args):
        predict = bind_b(*args)
        conditions.append(args)
        return lambda tokens, t: steps.append((tokens, t)) or predict(tokens, t)
    monkeypatch.setattr(v1, "bind_b", recorded)
    semantic = torch.randn(1, 16, 3, 3)
    generate(v1, "a cat", "a dog", given=dict(semantic=semantic), **QUICK)
    (semantics, texts), (tokens, t) = conditions[0], steps[1]
    text = v1.encode_text("b", ["a cat"], ["a dog"])
    assert torch.equal(semantics, torch.cat([semantic, semantic * 0])) and torch.equal(texts, torch.cat(text))
    assert torch.equal(tokens[0], tokens[1]) and t.tolist() == pytest.approx([2 / 3] * 2)
    assert len(steps) == 3 and len(conditions) == 1      # three steps, with one condition for all of them
    generate(v1, "a cat", given=dict(semantic=semantic), interval_b=(0.5, 1), **QUICK)
    assert [len(tokens) for tokens, _ in steps[3:]] == [2, 2, 1]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates(v1, mode):
    """With a preview, a list of levels and guidance for part of the way."""
    previews = []
    image, = v1("a cat", steps_c=2, steps_b=[1, 0.6, 0.2], sampler_b=mode, guidance_b=(3, 1), temperature_b=0.8,
                callback=Previews(v1, lambda stage, i, images: previews.append((stage, i, tuple(images.shape)))))
    assert image.size == (128, 128)
    assert previews == [("C", 0, (1, 3, 3, 3)), ("C", 1, (1, 3, 3, 3)), ("B", 0, (1, 3, 32, 32)),
                        ("B", 1, (1, 3, 32, 32))]


def test_images_can_be_the_input(v1):
    """Image to image, variations, reconstruction only concern Stage C, interpolation noise and text: v1 has them."""
    image = torch.rand(3, 128, 128)
    assert generate(v1, edit=InitImage(image), **QUICK)[0].size == (128, 128)
    assert generate(v1, "a cat", edit=InitImage(image, 0.5), **QUICK)[0].size == (128, 128)
    assert torch.equal(generate(v1, edit=InitImage(image, 0.0), output="semantic"), encode_image(v1, image[None]))
    assert reconstruct(v1, image, steps_b=2)[0].size == (128, 128)
    assert len(interpolate(v1, "a cat", "a dog", 3, to_seed=4, **QUICK)) == 3


def test_a_callback_may_return_other_tokens(v1):
    """It gets tokens (images,h,w), and must return such."""
    def callback(value):
        return lambda stage, i, t, x, x_0: torch.full_like(x, value) if stage == "B" else None
    latents, stage_a = generate(v1, "a cat", callback=callback(2), output="latents_b", **QUICK), v1.part("stage_a")
    code = (stage_a.codebook.codes[2] / stage_a.scale_factor).detach()                   # (4,)
    torch.testing.assert_close(latents, code[None, :, None, None].expand_as(latents))
    with pytest.raises(ValueError, match="a callback may return tokens for v1's Stage B, whole numbers from 0 to 31"):
        v1("a cat", callback=callback(32), **QUICK)
    assert generate(v1, "a cat", callback=lambda stage, *_: False if stage == "B" else None, **QUICK) == []


@pytest.mark.parametrize("options, message", [
    (dict(sampler_b="ddpm"), "sampler is 'ddpm', expected one of multinomial, argmax, quant"),
    (dict(given=dict(latents_b=torch.zeros(1, 1, 32, 32))), "tokens: there are neither masks nor latents_b"),
    (dict(edit=InitImage(torch.zeros(3, 128, 128), mask=torch.zeros(128, 128))), "Stage B of v1 generates tokens"),
    (dict(rescale_b=0.5), "there is no option rescale_b for these weights"),
    (dict(temperature_b=0), "the temperature is 0, expected more than 0"),
    (dict(temperature_b=(1, 0.8, 0.6)), "temperature has 3 values for 8 steps"),
    (dict(guidance_b=(1, 2, 3)), r"guidance is \(1, 2, 3\), expected")])
def test_what_v1_does_not_have_is_reported_before_anything_is_computed(v1, options, message, monkeypatch):
    monkeypatch.setattr(v1, "sample_c", None)
    with pytest.raises((ValueError, TypeError), match=message):
        generate(v1, "a cat", **options)


def test_temperature_is_only_for_v1(v1):
    with pytest.raises(TypeError, match="there is no option temperature_b for these weights"):
        Wuerstchen(v1.networks, size=128)("a cat", temperature_b=0.8)


def test_sizes_that_v1_was_not_trained_on_are_reported(v1):
    """512 px only: other sizes work, with any sides from 64 px, but are worse."""
    model = WuerstchenV1(v1.networks)
    assert image_size(model, None, None, None, None) == (512, 512)
    with pytest.warns(UserWarning, match=r"1024 x 512 px is not what these weights were trained on \(512 px only\): "
                                         r"expect repeated objects"):
        image_size(model, 512, 1024, None, None)
    with pytest.raises(ValueError, match="height is 63, expected a whole number of px from 64 to 16384"):
        image_size(model, 63, 512, None, None)
    assert v1("a cat", height=100, width=70, **QUICK)[0].size == (70, 100)


def test_numbers_that_are_none_end_in_one_line(v1, monkeypatch):
    bind_b = v1.bind_b
    monkeypatch.setattr(v1, "bind_b", lambda *args: lambda tokens, t: bind_b(*args)(tokens, t) * float("inf"))
    with pytest.raises(ValueError, match=r"Stage B came to NaN or infinity in step 1 of 3 \(t = 1.000\)"):
        v1("a cat", **QUICK)


# --- the files ---------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The authors' files, as they published them but small: without config.json, which means the official sizes."""
    monkeypatch.setattr(weights, "official_sizes", lambda stage, shapes: SMALL_V1[stage])
    return small_v1(tmp_path)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_authors_files_are_loaded_and_generate(folder, low_memory):
    """One text encoder for both stages, a Stage C for CLIP-H and so of v1, a Stage B of tokens; also one at a time."""
    model = Wuerstchen.load(folder, "cpu", low_memory=low_memory)
    assert type(model) is WuerstchenV1 and model.scale_semantic(1) == 1 and model.size == 512
    assert model.paths["prior"].name == "model_stage_c_ema.pt"
    assert model.paths["text_encoder"] == model.paths["prior_text_encoder"] == folder / "text_encoder"
    assert model.preview_file == folder / "preview_v1.json"
    assert type(model.part("stage_b")) is StageBV1 and type(model.part("stage_c")) is StageC
    image, = generate(model, "a cat", width=64, height=64, seed=Noise([0]), **QUICK)
    assert image.size == (64, 64)


def test_another_codebook_is_refused(folder):
    """Tokens would mean other codes in it, or lie beyond its end."""
    with pytest.raises(WeightsError, match="Stage B of v1 generates 32 tokens, the VQGAN .*vqgan has 1024: "
                                           "they belong to different weights"):
        Wuerstchen.load(folder, "cpu", vqgan=TINY / "vqgan")


def test_a_small_v1_of_one_s_own(tmp_path):
    """decoder/ with v1's Stage B among v2's other parts: it is v1's Stage B that is used, with v2's scaled latents."""
    for part in ("prior", "text_encoder", "tokenizer", "image_encoder", "vqgan"):
        (tmp_path / part).symlink_to(TINY / part)
    torch.manual_seed(1)
    codes = weights.load_stage_a(TINY / "vqgan").config["codebook_size"]
    decoder = StageBV1(**SMALL_V1[StageBV1] | dict(codebook_size=codes, c_text=128))
    weights.save_model(decoder, tmp_path / "decoder")
    model = Wuerstchen.load(tmp_path, "cpu")
    assert type(model) is WuerstchenV1 and model.scale_semantic is scale_semantic and model.size == 128
    assert (model.c.steps, model.b.steps, model.b.guidance) == (29, 8, 2.0)
    stage_b = model.part("stage_b")
    assert stage_b.config == decoder.config and model("a cat", **QUICK)[0].size == (128, 128)
    for name, tensor in decoder.state_dict().items():            # float16 on disk
        assert rel(stage_b.state_dict()[name], tensor) < 1e-3 or tensor.abs().max() == 0
