"""train_b.py --v1: the loss in closed form, tokens kept exactly, the same work on any number of processes, exact
resumes.

On a token model of a few thousand parameters, with the tiny VQGAN's 1024 codes. What both versions share is in
test_train_b.py.
"""
import contextlib
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from training import cache
from training import data, order
from loading import hub
from v1 import stage_b as stage_b_v1
from v1 import training as tokens
from v1.pipeline import TokenSampling, WuerstchenV1
import train_b
from loading import weights
from loading.files import read_config
from loading.layouts import locate
from loading.names import config_to_ours
from loading.errors import UserError, WeightsError
from helpers import TINY, lines, newest, same
from stage_a import StageA
from stage_b import EfficientNetEncoder, TinyImageEncoder
from v1.losses import training_errors, training_levels
from v1.stage_b import StageBV1
# noqa: F401 (folder is a fixture)
from test_train_b import FROZEN, LEARNED, SMALL, folder, losses, torchrun, train
from training import models, samples as training_samples, validation
from training.processes import Processes
from training.sheets import Reconstructions
from wuerstchen import Wuerstchen, add_noise, scale_semantic, unscale_semantic

DECODER = dict(_class_name="Paella", num_labels=1024, c_in=8, c_r=8, patch_size=2, c_cond=16, c_hidden=[8, 16],
               nhead=[-1, 2], blocks=[1, 1],
               level_config=["CT", "CTA"], effnet_embd=16, byt5_embd=128, kernel_size=3, dropout=0.1)
CODES = dict(codebook_size=1024)
ENCODER = dict(_class_name="TinyImageEncoder", c_semantic=16, c_hidden=[4, 8, 8, 8], blocks=[1, 1, 1, 1])


def sizes(out: Path, **changed) -> Path:
    for part, content in (("decoder", DECODER | changed), ("image_encoder", ENCODER)):
        (out / part).mkdir(parents=True)
        (out / part / "config.json").write_text(json.dumps(content))
    return out


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> list[str]:
    return ["--v1", "--weights", "tiny", "--init", "random", "--config",
            str(sizes(tmp_path_factory.mktemp("config") / "sizes"))]


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> list[str]:
    """The same without dropout, which each process draws for itself, and without text: it must learn the same however
    the work is shared out."""
    return ["--v1", "--weights", "tiny", "--init", "random", "--config",
            str(sizes(tmp_path_factory.mktemp("still") / "sizes", dropout=0.0)), "--text-encoder", "none"]


def few(folder, out: Path) -> Path:
    out.mkdir()
    for path in sorted(folder.iterdir())[:8]:
        (out / path.name).write_bytes(path.read_bytes())
    return out


# --- it learns, and what it writes ---------------------------------------------------------------------

def test_a_few_steps_on_four_images_lower_their_loss(folder, new, tmp_path):
    """From random weights, encoder included: it starts at log 1024, all tokens alike, and loses a third in 30 steps."""
    out = train(few(folder, tmp_path / "few"), tmp_path / "run", *new, "--lr", "1e-2", "--ema", "0", "--val-every",
                "30", "--val-count", "4", steps=30)
    first, last = (line for line in lines(out) if "val_loss" in line)
    assert first["val_loss"] == pytest.approx(math.log(1024), rel=1e-5) and last["val_loss"] < 2 / 3 * first["val_loss"]
    assert first["val_accuracy_t_0.95"] < 0.1 < last["val_accuracy_t_0.95"]


def test_the_result_is_a_folder_that_generates_images_with_the_tiny_models_other_parts(folder, new, tmp_path):
    """A new token model on the tiny image encoder, frozen, whose Stage C fits: base.json says so. Its latents are
    scaled as in v2."""
    out = train(folder, tmp_path / "run", *new, *FROZEN, steps=2)
    assert json.loads((out / "base.json").read_text())["weights"] == "tiny"
    model = Wuerstchen.load(out, "cpu")
    assert type(model) is WuerstchenV1 and (model.size, model.b.steps, model.b.guidance) == (128, 8, 2.0)
    assert model.scale_semantic is Wuerstchen.scale_semantic
    assert model.paths["prior"] == TINY / "prior" and model.paths["decoder"] == out / "decoder"
    assert model.preview_file == TINY / "preview.json"
    learned = newest(out)["averaged"]
    for name, tensor in model.part("stage_b").state_dict().items():
        torch.testing.assert_close(tensor, learned[f"decoder.{name}"], rtol=1e-3, atol=1e-6)         # float16 on disk
    assert model("a cat", seed=1, steps_c=2, steps_b=2)[0].size == (128, 128)
    # and can be fine-tuned
    again = train(folder, tmp_path / "again", "--v1", "--weights", str(out), "--freeze-encoder", steps=1)
    assert Wuerstchen.load(again, "cpu").part("stage_b").config == model.part("stage_b").config


def test_base_json_is_written_only_if_stage_c_fits(folder, new, tmp_path):
    """An encoder that learned with Stage B, or another than that of --weights, has no Stage C yet."""
    out = train(folder, tmp_path / "joint", *new, steps=1)
    assert (out / "decoder").is_dir() and (out / "image_encoder").is_dir() and not (out / "base.json").exists()
    out = train(folder, tmp_path / "other", *new, "--freeze-encoder", "--image-encoder", str(out / "image_encoder"),
                steps=1)
    assert not (out / "base.json").exists()


def test_a_new_decoder_starts_with_stage_a_s_codes_and_a_trained_one_with_its_own(folder, tmp_path, new, monkeypatch):
    given = []
    monkeypatch.setattr(StageBV1, "init_tokens", lambda self, codes: given.append(codes))
    out = train(folder, tmp_path / "new", *new, "--freeze-encoder", "--image-encoder", str(TINY / "image_encoder"),
                steps=1)
    assert len(given) == 1 and torch.equal(given[0], weights.load_stage_a(TINY / "vqgan").codebook.codes)
    train(folder, tmp_path / "on", "--v1", "--weights", str(out), "--freeze-encoder", steps=1)
    assert len(given) == 1


def test_tiny_v1_shares_everything_except_stage_b_with_tiny(monkeypatch):
    """3 to 5 million parameters, less than 16 MiB in float16, as many tokens as the tiny VQGAN has codes."""
    places = locate(TINY.parent / "tiny-v1", parts=(*hub.TEXT_TO_IMAGE, "image_encoder"))
    assert places["decoder"] == TINY.parent / "tiny-v1" / "decoder"
    assert weights.stage_b_of(places["decoder"]) is StageBV1
    assert all(places[part] == TINY / part for part in ("prior", "vqgan", "image_encoder", "text_encoder", "tokenizer"))
    with torch.device("meta"):
        model = StageBV1(**config_to_ours(read_config(places["decoder"]), StageBV1))
    n = sum(p.numel() for p in model.parameters())
    assert 3e6 < n < 5e6 and 2 * n < 16 * 2 ** 20
    assert model.codebook_size == read_config(TINY / "vqgan")["num_vq_embeddings"] and model.multiple == 8
    args = train_b.parse_args(["--v1", "--weights", "tiny", "--init", "random", "--config",
                               str(TINY.parent / "tiny-v1"), "--out", "x"])
    decoder, encoder = models.load_models(args, tokens, torch.float32, Processes("cpu"))[:2]
    # whose sizes stand in models/tiny, as base.json says
    assert decoder.config == model.config and type(encoder) is TinyImageEncoder


# --- the loss ------------------------------------------------------------------------------------------

def test_one_step_in_closed_form(folder, new, tmp_path, monkeypatch):
    """t = 1.08 (1 - u) + 0.001, clamped; tokens are replaced with probability t; -sum of 0.9 [k = x_0] + 0.1 / K times
    log p, for replaced tokens with weight 1, for others 0.3 + 0.7 t; mean of each image, then of all."""
    seen, asked = [], []
    monkeypatch.setattr(tokens, "training_errors", lambda *given: seen.append(given) or training_errors(*given))
    forward = StageBV1.forward
    monkeypatch.setattr(StageBV1, "forward", lambda self, *given: asked.append(given) or forward(self, *given))
    # The second step, because in the first all tokens are alike.
    out = train(folder, tmp_path / "run", *new, "--lr", "1e-2", "--guide-attention", "0", steps=2)
    (logits, x_0, t, mask), (x_t, t_seen, _, _) = seen[1], asked[1]
    (positions, indices, _), = [training_samples.MultiSizeSampler(np.full((12, 2), 128), [128], 2.0, 4, 0).step(1)]
    drawn = [tokens.draw_noise(order.sample_rng(0, p, "noise"), 32, 32, CODES) for p in positions.tolist()]
    chance = torch.tensor([np.float32(order.sample_rng(0, p, "timestep").random()) for p in positions.tolist()])
    torch.testing.assert_close(t, training_levels(chance), rtol=0, atol=1e-6)
    vqgan, dataset = weights.load_stage_a(TINY / "vqgan"), data.open_dataset(folder)
    loss = 0.0
    for i in range(4):
        pixels = torch.from_numpy(dataset.read(int(indices[i])).copy()).permute(2, 0, 1)[None].float() / 255
        assert torch.equal(x_0[i], vqgan.encode_indices(pixels)[0])
        replaced = drawn[i]["u"] <= t[i]
        assert torch.equal(x_t[i], torch.where(replaced, drawn[i]["random_tokens"], x_0[i]))
        assert torch.equal(mask[i], replaced)
        log_p = logits[i].detach().double().log_softmax(0)                               # (1024, 32, 32)
        errors = -0.9 * log_p.gather(0, x_0[i][None])[0] - 0.1 * log_p.mean(0)           # (32, 32)
        weight = torch.where(replaced, 1.0, 0.3 + 0.7 * t[i].double())
        loss += (errors * weight).sum() / weight.sum() / 4
    assert torch.equal(t_seen, t) and losses(out)[1] == pytest.approx(loss.item(), rel=1e-5)


# --- the guide of attention ---------------------------------------------------

def test_shares_are_linear_between_centers():
    """3 vectors over 6 places: their centers are at 1/6, 1/2, 5/6, those of the places at 1/12, 3/12, ... Before the
    first and after the last center, only these count."""
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0.75, 0.25], [0, 0.25, 0.75], [0, 0, 1]]
    torch.testing.assert_close(tokens.share_over(3, 6), torch.tensor(expected))
    assert torch.equal(tokens.share_over(4, 4), torch.eye(4)) and torch.equal(tokens.share_over(1, 5), torch.ones(5, 1))
    torch.testing.assert_close(tokens.share_over(5, 7).sum(1), torch.ones(7))


def guided_net(heads: int = 3) -> tuple[StageBV1, tokens.AttentionGuide, tuple]:
    """-> a small network with two attention blocks, its guide, and the inputs of its forward: 2 x 3 semantic vectors, 5
    of text, 16 x 24 tokens."""
    torch.manual_seed(0)
    net = StageBV1(codebook_size=16, c_token=8, c_timestep=8, c_cond=16, c_hidden=(8, 24), heads=(-1, heads),
                   blocks=(1, 1), levels=("CT", "CTA"), c_text=12, dropout=0.0)
    inputs = torch.randint(16, (2, 16, 24)), torch.rand(2), torch.randn(2, 16, 2, 3), torch.randn(2, 5, 12)
    return net, tokens.AttentionGuide(net), inputs


def test_the_guides_loss_in_closed_form():
    """Cross-entropy between the attention of 2 of 3 heads, over all keys, and the shares of 6 vectors over 4 x 6
    places."""
    net, guide, inputs = guided_net()
    seen = []
    for block in (net.down_blocks[1][2], net.up_blocks[1][2]):
        block.register_forward_pre_hook(lambda block, inputs: seen.append((block, *inputs)))
    net(*inputs)
    errors = []
    for block, x, sequence in seen:
        places = torch.nn.functional.layer_norm(x, (24,), eps=1e-6).reshape(2, 24, 24)
        words = block.text_mapper(torch.nn.functional.silu(sequence))
        q, k = block.query(places), block.key(torch.cat([words, places], dim=1))
        for b in range(2):
            for head in range(2):
                part = slice(8 * head, 8 * head + 8)
                attention = (q[b, :, part] @ k[b, :, part].T / 8 ** 0.5).softmax(-1)     # (24, 6 + 5 + 24)
                for i in range(4):
                    for j in range(6):
                        # (6,)
                        share = torch.outer(tokens.share_over(2, 4)[i], tokens.share_over(3, 6)[j]).flatten()
                        errors.append(-(share * attention[6 * i + j, :6].log()).sum())
    assert len(seen) == 2 and guide.loss().item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_attention_learns_where_vectors_belong():
    """From random tokens and 6 vectors that differ. At first a place attends anywhere, -log(1/35) = 3.6. After 60 steps
    on this loss only, it attends mostly to its own vector."""
    net, guide, inputs = guided_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        net(*inputs)
        values.append(guide.loss())
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[0] > 3 and values[-1] < 1.2


def test_the_guides_loss_is_added_with_its_weight(folder, new, tmp_path, monkeypatch):
    """In training, but not in the validations between the steps."""
    given, asked, errors, loss = [], [], [], tokens.AttentionGuide.loss
    monkeypatch.setattr(tokens.AttentionGuide, "loss", lambda self: asked.append(len(self.errors))
                        or given.append(loss(self)) or given[-1])

    def noted(*inputs):
        error = training_errors(*inputs)
        errors.extend([error] if error.requires_grad else [])
        return error
    monkeypatch.setattr(tokens, "training_errors", noted)
    out = train(folder, tmp_path / "run", *new, "--guide-attention", "0.7", "--val-every", "1", "--val-count", "2",
                steps=3)
    assert asked == [2, 2, 2]                                            # its two attention blocks
    assert losses(out) == pytest.approx([error.mean().item() + 0.7 * guide.item()
                                         for error, guide in zip(errors, given)], rel=1e-5)


def test_every_sample_has_its_own_random_numbers():
    """All codes are equally likely; a function of seed and position only. There are no random numbers of v2."""
    args = train_b.parse_args([*SMALL, "--v1", "--weights", "tiny", "--data", "scenes:all:16:1", "--out", "unused"])
    dataset = data.open_dataset("scenes:all:16:1", captions_required=False)
    dataset.bucket = np.zeros(16, int)
    samples = train_b.StageBSamples(dataset, [(128, 128)], args, {}, {}, partial(tokens.draw_noise, config=CODES))
    items = [samples[position, position % 16, 0] for position in range(48)]
    random = torch.stack([item["random_tokens"] for item in items])
    assert random.dtype == torch.int64 and random.min() == 0 and random.max() == 1023
    assert random.float().mean().item() == pytest.approx(511.5, abs=5)
    u = torch.stack([item["u"] for item in items])
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1 and u.mean().item() == pytest.approx(0.5, abs=0.01)
    # 21: the same image
    assert torch.equal(samples[5, 5, 0]["u"], u[5]) and not torch.equal(u[5], u[21]) and "eps" not in items[0]
    assert {"t_semantic", "eps_semantic", "dropped", "caption", "chance"} <= items[0].keys()


def test_blind_steps_show_random_tokens_only():
    args = train_b.parse_args(["--v1", "--out", "x", "--blind", "3", "--high-noise", "1"])
    chance = torch.rand(100)
    assert (tokens.noise_levels(chance, True, args) == 1).all()
    torch.testing.assert_close(tokens.noise_levels(chance, False, args), training_levels(chance), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c_text", [128, 1024])
def test_noise_on_the_semantic_latents_has_the_scale_of_stage_c(c_text):
    """The authors' v1, whose texts have width 1024, works on raw latents of variance 1; a v1 Stage B with v2's Stage C
    on (raw + 1) / 42."""
    seen = []
    decoder = StageBV1(**config_to_ours(DECODER | dict(byt5_embd=c_text), StageBV1))
    decoder.forward = lambda x_t, t, semantic, text: seen.append(semantic)
    encoder = models.new_encoder(TinyImageEncoder, None, tokens.semantic_scale(decoder)[1],
                                 **{k: v for k, v in ENCODER.items() if k[0] != "_"})
    assert (encoder.norm.weight[0].item(), encoder.norm.bias[0].item()) == ((42, -1) if c_text == 128 else (1, 0))
    raw, eps, level = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3), torch.tensor([0.0, 0.4])
    model, x_t = train_b.EncoderAndDecoder(decoder, None, tokens), torch.zeros(2, 32, 32, dtype=torch.int64)
    model(raw, x_t, torch.rand(2), None, level, eps, torch.tensor([False, False]))
    expected = add_noise(raw, eps, level)
    if c_text == 128:
        expected = unscale_semantic(add_noise(scale_semantic(raw), eps, level))
    assert torch.equal(seen[0][0], raw[0])
    torch.testing.assert_close(seen[0][1], expected[1])


# --- the same run, however it is computed ------------------------------------------------------------

def test_tokens_are_kept_exactly_and_a_cache_changes_nothing(folder, new, tmp_path, monkeypatch):
    """In float16 integers end at 2048, so tokens of the official 8192 would come back as their neighbours. The weights
    are the same with and without a cache, to the bit; in a second run the VQGAN does no work. Two sizes, and flips."""
    options = [*new, *FROZEN, "--random-flip", "--batch", "1", "--resolution", "128", "256", "--text-encoder", "none"]
    plain = train(folder, tmp_path / "plain", *options, steps=3)
    options += ["--cache", str(tmp_path / "cache"), "--cache-dtype", "fp32"]
    cached = train(folder, tmp_path / "cached", *options, steps=3)
    same(newest(plain)["model"], newest(cached)["model"])
    kept = [np.load(path) for path in (tmp_path / "cache").glob("tokens-*/??/*.npy")]
    assert {array.shape for array in kept} == {(32, 32), (64, 64)}
    assert {array.dtype for array in kept} == {np.dtype("int16")} and len(kept) == 48
    monkeypatch.setattr(StageA, "encode_indices", lambda *_: pytest.fail("an image was encoded"))
    again = train(folder, tmp_path / "again", *options, steps=3)
    same(newest(cached)["model"], newest(again)["model"])


def test_a_cache_of_integers_returns_what_was_put(tmp_path):
    """And raises an error if a number does not fit, instead of wrapping around."""
    for codes, dtype in ((1024, "int16"), (8192, "int16"), (2 ** 15, "int16"), (2 ** 15 + 1, "int32"),
                         (2 ** 18, "int32")):
        assert tokens.cache_settings(SimpleNamespace(config=dict(codebook_size=codes)))["dtype"] == dtype
        kept = cache.Cache(tmp_path, "vqgan", dict(kind=f"tokens{codes}", dtype=dtype))
        array = np.linspace(0, codes - 1, 4097).astype(np.int64)
        kept.put("a", array)
        assert np.array_equal(kept.get("a"), array) and kept.get("a").dtype == dtype
    with pytest.raises(ValueError, match="it contains numbers that do not fit int16"):
        cache.Cache(tmp_path, "vqgan", dict(dtype="int16")).put("a", np.array([2 ** 15]))


def test_two_processes_learn_what_one_does_encoder_included(folder, still, tmp_path):
    one = train(folder, tmp_path / "one", *still, "--batch", "8", "--val-every", "3", "--val-count", "3", steps=3)
    two = torchrun(2, folder, tmp_path / "two", *still, "--batch", "4", "--val-every", "3", "--val-count", "3", steps=3)
    a, b = newest(one), newest(two)
    # A shift before BatchNorm changes nothing. The gradient there is only rounding, which Adam turns into full steps.
    shifts = {name for name, moments in a["optimizer"]["state"].items() if moments["exp_avg"].abs().max() < 1e-9
              and name.startswith("encoder.")}
    assert shifts <= {"encoder.blocks.3.0.grn.beta", "encoder.blocks.3.0.contract.bias"}
    for part in ("model", "averaged"):
        same(*({name: tensor for name, tensor in state[part].items() if name not in shifts} for state in (a, b)), 1e-5)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    values = [[value for line in lines(out) for name, value in line.items() if name.startswith("val_")]
              for out in (one, two)]
    assert len(values[0]) == 2 * 21 and values[0] == pytest.approx(values[1], rel=1e-3)


def test_weights_split_over_processes_and_accumulation_learn_the_same(folder, still, tmp_path):
    """8 at once by one process; --fsdp on two, in 2 micro-steps of 2, with the encoder frozen. Resumed by one process
    that holds all of it."""
    options = [*still, *FROZEN, "--clip", "0.1"]
    one = train(folder, tmp_path / "one", *options, "--batch", "8", steps=3)
    split = torchrun(2, folder, tmp_path / "split", *options, "--fsdp", "--batch", "2", "--grad-accum", "2",
                     "--val-every", "2", "--val-count", "2",
                     "--sample-every", "2", steps=2)
    assert weights.stage_b_of(split / "decoder") is StageBV1
    train(folder, split, *options, "--batch", "4", "--grad-accum", "2", "--resume", "auto", steps=3)
    same(newest(one)["model"], newest(split)["model"], 1e-5)
    same(newest(one)["averaged"], newest(split)["averaged"], 1e-5)


RESUMED = {
    "joint, dropout, accumulation, flips, crops": ["--grad-accum", "2", "--random-flip", "--crop", "random",
                                                   "--semantic-dropout", "0.3"],
    "blind, a worker, cache": ["--blind", "4", "--workers", "1", "--cache", "CACHE"],
    "frozen, cache, two sizes": [*FROZEN, "--cache", "CACHE", "--resolution", "128", "256"],
    "bf16 and checkpointing": ["--dtype", "bf16", "--checkpointing"],
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(folder, new, tmp_path, options):
    options = [*new, "--batch", "2", *(str(tmp_path / "cache") if option == "CACHE" else option for option in options),
               "--save-every", "1", "--keep", "9"]
    unbroken = train(folder, tmp_path / "unbroken", *options, steps=4)
    out = train(folder, tmp_path / "broken", *options, steps=4)
    # The schedule depends on --steps, so the run is not ended early but loses its last checkpoints.
    for path in sorted((out / "checkpoints").iterdir())[2:]:
        path.unlink()
    train(folder, out, *options, "--resume", "auto", steps=4)
    same({name: newest(unbroken)[name] for name in LEARNED}, {name: newest(out)[name] for name in LEARNED})


def test_gradient_checkpointing_changes_nothing_but_memory(folder, new, tmp_path, monkeypatch):
    calls, checkpoint = [], stage_b_v1.checkpoint
    monkeypatch.setattr(stage_b_v1, "checkpoint", lambda *args, **kwargs: calls.append(1)
                        or checkpoint(*args, **kwargs))
    a, b = (train(folder, tmp_path / name, *new, *options, steps=2)
            for name, options in (("a", []), ("b", ["--checkpointing"])))
    same(newest(a)["model"], newest(b)["model"], 1e-6)
    # each of C T, C T A, C T A, C T in each step
    assert len(calls) == 2 * 10


def test_a_nan_step_is_skipped(folder, new, tmp_path, monkeypatch):
    calls, forward = [], StageBV1.forward

    def sometimes(self, *given):
        calls.append(1)
        return forward(self, *given) * (float("nan") if len(calls) == 2 else 1.0)
    monkeypatch.setattr(StageBV1, "forward", sometimes)
    out = train(folder, tmp_path / "run", *new, steps=3)
    assert [line["step"] for line in lines(out) if line.get("bad_step")] == [2]
    assert newest(out)["updates"] == 2 and all(tensor.isfinite().all() for tensor in newest(out)["model"].values())


# --- validation and samples -----------------------------------------------------------------------------------------

class Oracle:
    """A token model that is quite sure of one answer: of `answer(x_t)`."""
    def __init__(self, answer):
        self.decoder, self.answer = SimpleNamespace(config=CODES), answer

    def __call__(self, source, x_t=None, t=None, text=None):
        return source if x_t is None else torch.nn.functional.one_hot(self.answer(x_t).expand_as(x_t),
                                                                      1024).movedim(-1, 1) * 30.0


@pytest.fixture
def fixed():
    x_0 = torch.randint(1024, (1, 32, 32)).expand(3, -1, -1)
    return SimpleNamespace(captions=["a", "b", "c"], x_0=x_0, source=torch.randn(3, 16, 3, 3),
                           pixels=torch.zeros(3, 128, 128, 3, dtype=torch.uint8))


def run_args(*options):
    return train_b.parse_args(["--v1", "--out", "x", "--batch", "2", *options])


def embed(captions):
    return torch.zeros(len(captions), 1, 8)


def test_validation_counts_replaced_tokens_only(fixed):
    """A model that repeats its input finds 1 in 1024 of the replaced tokens. A model that knows the image finds all."""
    right, wrong = (validation.validate(Oracle(answer), fixed, embed, torch.ones_like, tokens, contextlib.nullcontext(),
                                        run_args(), Processes("cpu"))
                    for answer in (lambda x_t: fixed.x_0[0], lambda x_t: x_t))
    assert all(right[f"val_accuracy_t_{t:.2f}"] == 1 and wrong[f"val_accuracy_t_{t:.2f}"] < 0.02
               for t in validation.T_GRID)
    # With label smoothing, certainty has a cost.
    sure = math.log1p(1023 * math.exp(-30)) + 0.1 * 30 * 1023 / 1024
    assert right["val_loss"] == pytest.approx(sure, rel=1e-5)
    assert wrong["val_loss_t_0.95"] > wrong["val_loss_t_0.05"] > sure
    assert right["val_loss"] == pytest.approx(np.mean([right[f"val_loss_t_{t:.2f}"] for t in validation.T_GRID]))


def test_images_come_back_if_the_model_knows_them(fixed):
    """Through v1's own sampler, guided or not, from noise that is always the same."""
    vqgan = weights.load_stage_a(TINY / "vqgan")
    with torch.no_grad():
        expected = vqgan.decode_indices(fixed.x_0).clamp(0, 1)
    def reconstruct(answer, scale: float, steps: int):
        sheets = Reconstructions(run_args(), Oracle(answer), tokens, vqgan, True, fixed, embed,
                                 contextlib.nullcontext(), Processes("cpu"))
        return sheets.reconstruct(TokenSampling(steps, guidance=scale))
    for scale, steps in ((1.0, 4), (2.0, 2)):
        torch.testing.assert_close(reconstruct(lambda x_t: fixed.x_0[0], scale, steps), expected)
    seen = []
    for _ in range(2):
        reconstruct(lambda x_t: seen.append(x_t) or x_t, 1.0, 2)
    # two parts of the batch, two steps, twice
    assert len(seen) == 8 and torch.equal(seen[0], seen[4])
    assert not torch.equal(seen[0][0], seen[0][1]) and seen[0].float().mean().item() == pytest.approx(511.5, abs=30)


def test_validation_and_grids_are_the_same_work_every_time(folder, new, tmp_path):
    """At step 0 of two runs with different training: the same values, one per noise level, guidance and number of
    steps."""
    values = []
    for name, options in (("a", []), ("b", ["--batch", "2", "--lr", "1e-2", "--cache", str(tmp_path / "cache"),
                                            "--semantic-dropout", "0.5"])):
        out = train(folder, tmp_path / name, *new, *FROZEN, "--text-encoder", "none", "--val-every", "1", "--val-count",
                    "2", "--sample-every", "1", *options, steps=1)
        values.append([{key: value for key, value in line.items() if key.startswith(("val", "psnr"))}
                       for line in lines(out) if {"val_loss", "psnr_a"} & line.keys()])
    (val, shown), (other_val, other_shown) = values[0][:2], values[1][:2]
    assert val == pytest.approx(other_val, rel=1e-5) and shown == pytest.approx(other_shown, rel=1e-4)
    assert values[0][2] != values[1][2]
    assert set(shown) == {"psnr_a", *(f"psnr_guidance_{g}_steps_{s}" for g in (1, 2) for s in (4, 8))}
    assert set(val) == {"val_loss", *(f"val_{name}_t_{t:.2f}" for name in ("loss", "accuracy")
                                      for t in validation.T_GRID)}
    with Image.open(tmp_path / "a" / "samples" / "step_000001.png") as grid:
        assert grid.size[0] >= 6 * 128
    assert (tmp_path / "a" / "curves.png").exists()


def test_a_dry_run_names_the_tokens(folder, new, tmp_path, capsys):
    train(folder, tmp_path / "run", *new, "--dry-run")
    assert "step 0: semantic (4, 16, 3, 3), random_tokens (4, 32, 32), u (4, 32, 32)" in capsys.readouterr().out


# --- errors ------------------------------------------------------------------------------------------

ERRORS = [
    (["--v1", "--loss", "head"], "--loss is for v2, whose Stage B generates latents; --v1 has its own loss"),
    (["--v1", "--loss", "eps"], "--loss is for v2"),
    (["--v1", "--loss-weight", "v"], "--loss-weight is for v2"),
    (["--v1", "--even-contrast"], "--even-contrast is for v2"),
    (["--guide-attention", "5"], "--guide-attention is for --v1: in v2 the semantic latents lie over the image"),
    (["--v1", "--guide-attention", "-1"], "--guide-attention: expected a number .* from 0, got '-1'"),
    (["--v1"],
     "models/tiny/decoder is a Stage B of v2, --v1 trains that of v1: remove it, or use --init random for a new one"),
    (["--weights", str(TINY.parent / "tiny-v1")],
     "models/tiny-v1/decoder is a Stage B of v1: add --v1, or use --init random"),
    (["--v1", "--init", "random", "--config", str(TINY)],
     "cannot be used: it describes a WuerstchenDiffNeXt, expected a Paella"),
    (["--v1", "--init", "random", "--image-encoder", str(TINY / "image_encoder"), "--config", "EIGHT"],
     "the VQGAN has 1024 tokens, Stage B is for 8: give it another --config"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options[:3]) for options, _ in ERRORS])
def test_user_errors_are_one_line(folder, tmp_path, options, message):
    if "EIGHT" in options:
        options = [*options[:-1], str(sizes(tmp_path / "eight", num_labels=8))]
    with pytest.raises((UserError, WeightsError, OSError), match=message) as error:
        train(folder, tmp_path / "run", "--weights", "tiny", *options)
    assert "\n" not in str(error.value)


def test_v1_and_v2_refuse_each_others_checkpoints(folder, new, tmp_path):
    """Their tensors have other names. If loaded leniently, they would be skipped silently."""
    v1 = train(folder, tmp_path / "v1", *new, steps=1)
    with pytest.raises(UserError, match="was made with --v1: add it, or choose another --resume"):
        train(folder, v1, "--weights", "tiny", "--resume", "auto", steps=2)
    v2 = train(folder, tmp_path / "v2", "--weights", "tiny", steps=1)
    with pytest.raises(UserError, match="was made without --v1: remove it, or choose another --resume"):
        train(folder, v2, *new, "--resume", "auto", steps=2)


def test_defaults_of_v1():
    """Its loss, noise levels, 512 px, released weights. With the small encoder, the learning rates suit emoji
    scenes."""
    def defaults(small: bool, *options) -> tuple:
        args = train_b.parse_args(["--v1", "--out", "x", *options])
        train_b.set_defaults(args, small)
        return tuple(getattr(args, name) for name in ("weights", "resolution", "batch", "lr", "blind",
                                                      "guide_attention", "high_noise", "loss", "loss_weight"))
    assert defaults(False) == ("v1", [512], 4, 1e-5, 0, 0, 1.0, "ce", "none")
    assert defaults(True, "--weights", "tiny") == ("tiny", [128], 32, 1.5e-3, 0, 0.3, 1.0, "ce", "none")
    assert defaults(True, "--weights", "tiny", "--init", "random") == ("tiny", [128], 32, 1.5e-3, 0, 0.3, 1.0, "ce",
                                                                       "none")
    assert models.new_encoder(EfficientNetEncoder, unscale=lambda x: x).norm.weight[0] == 1
