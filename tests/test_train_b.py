"""train_b.py: losses in closed form, what each sample draws, the same work on any number of processes, exact resumes.

Most runs use a decoder and an image encoder of a few thousand parameters, with the tiny VQGAN. What they learn does not
matter here, but every bit must be right.
"""
import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from training import data, order
import sample
from training import scenes
import train_b
from training import optim
from training.losses import p2_weight, v_weight
from loading.errors import UserError, WeightsError
from helpers import count_messages, lines, main_of, newest, same, together
from stage_a import StageA
from stage_b import EfficientNetEncoder, ResBlock, StageB, TinyImageEncoder
from training import models, samples as training_samples
from training.models import block_groups
from training.processes import compile_blocks
from v1.stage_b import StageBV1
from wuerstchen import add_noise, alphas_cumprod, scale_semantic, unscale_semantic

ROOT = Path(train_b.__file__).parent
TINY = ROOT / "models" / "tiny"
DECODER = dict(c_in=4, c_out=4, c_r=8, patch_size=2, c_cond=8, c_hidden=[8, 16], nhead=[-1, 2], blocks=[1, 1],
               level_config=["CT", "CTA"],
               inject_effnet=[False, True], effnet_embd=16, clip_embd=128, kernel_size=3, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve small images with captions."""
    out = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        scene = scenes.place_single(rng, scenes.OBJECTS[i], ("small", "medium", "large")[i % 3],
                                    list(scenes.COLOURS)[i % 5])
        Image.fromarray(scenes.render(scene)).save(out / f"{i:02d}.png")
        (out / f"{i:02d}.txt").write_text(scenes.plain_caption(scene.objects, scene.colour) + "\n")
    return out


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Sizes of a Stage B and an image encoder that take milliseconds."""
    out = tmp_path_factory.mktemp("config")
    for part, content in (("decoder", DECODER), ("image_encoder", dict(_class_name="TinyImageEncoder", c_semantic=16,
                                                                       c_hidden=[4, 8, 8, 8], blocks=[1, 1, 1, 1]))):
        (out / part).mkdir()
        (out / part / "config.json").write_text(json.dumps(content))
    return out


@pytest.fixture
def new(config) -> list[str]:
    return ["--weights", "tiny", "--init", "random", "--config", str(config)]


# On an AMD CPU, runs with and without a cache differ by some 1e-6 after Adam. On an Intel CPU they are equal.
CPUINFO = Path("/proc/cpuinfo")
ROUNDING = 1e-5 if CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text() else 0.0
SMALL = ["--workers", "0", "--val-every", "0", "--sample-every", "0", "--log-every", "1", "--device", "cpu", "--warmup",
         "2", "--lr", "1e-3", "--batch", "4",
         "--blind", "0"]
FROZEN = ["--freeze-encoder", "--image-encoder", str(TINY / "image_encoder")]


def train(folder, out, *options, steps: int = 4):
    train_b.main(train_b.parse_args([*SMALL, "--data", str(folder), "--out", str(out), "--steps", str(steps),
                                     *options]))
    return out


def weights_file(folder, part: str) -> bytes:
    return (Path(folder) / part / "diffusion_pytorch_model.safetensors").read_bytes()


EPS, HEAD = SimpleNamespace(loss="eps"), SimpleNamespace(loss="head")
LEARNED = ("model", "averaged", "optimizer", "step", "updates", "scaler")


# --- it learns, and what it writes ---------------------------------------------------------------------

@pytest.mark.parametrize("loss, falls", [("head", 0.5), ("eps", 0.25)])
def test_a_few_steps_on_four_images_lower_their_loss(folder, new, tmp_path, loss, falls):
    """From random weights, encoder included, 30 steps lower the loss at fixed noise and levels by a half or a quarter.

    The plain loss of the noise starts higher and falls more slowly, as docs/TRAINING.md says.
    """
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.iterdir())[:8]:
        (few / path.name).write_bytes(path.read_bytes())
    out = train(few, tmp_path / "run", *new, "--loss", loss, "--lr", "1e-2", "--ema", "0", "--val-every", "30",
                "--val-count", "4", steps=30)
    first, last = (line["val_loss"] for line in lines(out) if "val_loss" in line)
    assert last < (1 - falls) * first


def test_a_decoder_fine_tuned_for_a_domain_is_a_folder_that_generates_images(folder, tmp_path):
    """base.json says where Stage C is. It still fits, because the encoder did not change. A new Stage B makes a new
    image."""
    out = train(folder, tmp_path / "run", "--weights", "tiny", "--freeze-encoder", "--lr", "1e-2", steps=2)
    for name, weights in (("new", str(out)), ("old", "tiny")):
        sample.main(["--weights", weights, "--prompt", "a cat on a red background", "--seed", "1", "--steps-c", "2",
                     "--steps-b", "1", "--out", str(tmp_path / f"{name}.png")])
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("new", "old"))
    assert np.abs(a - b).max() > 3
    assert f"python sample.py --weights ./{out.name} --prompt 'a " in (out / "README.md").read_text()
    assert weights_file(out, "image_encoder") == weights_file(TINY, "image_encoder")
    assert weights_file(out, "decoder") != weights_file(TINY, "decoder")


def test_with_another_encoder_nothing_claims_that_stage_c_fits(folder, new, tmp_path):
    """Even if neither encoder changed, and Stage B started from --weights."""
    other = train(folder, tmp_path / "other", "--weights", "tiny", steps=1) / "image_encoder"
    for encoder, fits in ((other, False), (TINY / "image_encoder", True)):
        out = train(folder, tmp_path / f"run_{fits}", "--weights", "tiny", "--freeze-encoder", "--image-encoder",
                    str(encoder), steps=1)
        assert (out / "base.json").exists() == fits


def test_if_the_encoder_learned_nothing_claims_that_stage_c_fits(folder, new, tmp_path):
    out = train(folder, tmp_path / "run", *new, "--sample-every", "1", steps=1)
    card, psnr = (out / "README.md").read_text(), next(line["psnr_a"] for line in reversed(lines(out))
                                                       if "psnr_a" in line)
    assert "train it again" in card and f"| Stage A only | {psnr:.2f} |" in card
    assert "samples/step_000001.png" in card
    assert f"--decoder ./{out.name}/decoder --image-encoder ./{out.name}/image_encoder --reconstruct photo.png" in card
    assert (out / "decoder").is_dir() and (out / "image_encoder").is_dir() and not (out / "base.json").exists()
    assert json.loads((out / "image_encoder" / "config.json").read_text())["c_hidden"] == [4, 8, 8, 8]


def test_a_frozen_encoder_does_not_change_by_a_bit(folder, new, tmp_path, monkeypatch):
    """Gradients could change it, and BatchNorm's running statistics would, in train mode, without being noticed."""
    modes, forward = [], TinyImageEncoder.forward
    monkeypatch.setattr(TinyImageEncoder, "forward", lambda self, x: modes.append((self.training, x.dtype))
                        or forward(self, x))
    out = train(folder, tmp_path / "run", *new, *FROZEN, "--dtype", "bf16", steps=2)
    assert set(modes) == {(False, torch.float32)}
    assert weights_file(out, "image_encoder") == weights_file(TINY, "image_encoder")
    assert not any(name.startswith("encoder.") for name in newest(out)["model"])


def test_an_encoder_that_learns_keeps_its_scale(folder, new, tmp_path):
    """Weight 42 and bias -1 of its last BatchNorm: scale_semantic, Stage C and Stage B rely on them. Its statistics
    move."""
    out = train(folder, tmp_path / "run", *new, steps=3)
    state = models.load_image_encoder(out / "image_encoder").norm.state_dict()
    assert (state["weight"] == 42).all() and (state["bias"] == -1).all()
    assert state["num_batches_tracked"] == 3 and not torch.equal(state["running_mean"], torch.zeros(16))


def test_a_new_efficientnet_starts_from_imagenet_weights_and_with_the_right_scale(tmp_path):
    """The released encoder has learned its scale. With torch's default, 1, Stage C would see variances of 1 / 42^2."""
    import torchvision
    torch.manual_seed(1)
    theirs = torchvision.models.efficientnet_v2_s(weights=None).state_dict()
    torch.save(theirs, tmp_path / "imagenet.pth")
    encoder = models.new_encoder(EfficientNetEncoder, str(tmp_path / "imagenet.pth"))
    assert torch.equal(encoder.backbone[0][0].weight, theirs["features.0.0.weight"])
    with torch.no_grad():
        stored = scale_semantic(encoder.train()(torch.randn(4, 3, 96, 96)))
    assert abs(stored.mean()) < 1e-3 and stored.std() == pytest.approx(1, abs=0.02)
    torch.save(dict(x=torch.ones(1)), tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected torchvision's efficientnet_v2_s"):
        models.new_encoder(EfficientNetEncoder, str(tmp_path / "other.pth"))


# --- losses and weights in closed form ----------------------------------------------------------------

def test_losses_of_the_noise_and_of_the_head():
    """eps: ((x_t - a) / b - eps)^2. head: ((a - sqrt(ab) x_0)^2 + (b - sqrt(1 - ab))^2) / max(1 - ab, 0.2). Image
    means."""
    x_0, eps, a, t = *(torch.randn(3, 4, 8, 8) for _ in range(3)), torch.tensor([0.05, 0.5, 1.0])
    b = torch.rand(3, 4, 8, 8) + 0.1
    x_t = add_noise(x_0, eps, t)
    for i in range(3):
        ab = alphas_cumprod(t[i]).item()
        expected = (((x_t[i] - a[i]) / b[i] - eps[i]) ** 2).mean()
        assert train_b.raw_losses((a, b), x_0, x_t, eps, t, EPS)[i].item() == pytest.approx(expected.item(), rel=1e-5)
        expected = (((a[i] - ab ** 0.5 * x_0[i]) ** 2 + (b[i] - (1 - ab) ** 0.5) ** 2) / max(1 - ab, 0.2)).mean()
        assert train_b.raw_losses((a, b), x_0, x_t, eps, t, HEAD)[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("args", [EPS, HEAD], ids=["eps", "head"])
def test_both_losses_teach_the_same_noise(args):
    """A head that is right has a loss of 0, measured in eps or in the head's two outputs, even if x_t is empty."""
    x_0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.4, 0.9])
    ab = alphas_cumprod(t).view(-1, 1, 1, 1)
    for x_t in (add_noise(x_0, eps, t), torch.ones_like(x_0)):
        noise = (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()
        output = ab.sqrt() * x_0, (1 - ab).sqrt().expand_as(x_0)
        assert train_b.raw_losses(output, x_0, x_t, noise, t, args).max() < 1e-9


def test_blind_steps_show_nothing_of_the_image(folder, new, tmp_path, monkeypatch):
    """x_t is all ones, the noise levels are medium, and eps is what it would have to be: a perfect head has no loss."""
    seen = []
    monkeypatch.setattr(train_b, "raw_losses", lambda output, x_0, x_t, eps, t, args: seen.append((x_0, x_t, eps, t))
                        or sum(output).square().mean(dim=(1, 2, 3)))
    train(folder, tmp_path / "run", *new, "--blind", "1", steps=2)
    (x_0, x_t, eps, t), ordinary = seen
    assert (x_t == 1).all() and 0.4 <= t.min() and t.max() <= 0.9 and not (ordinary[1] == 1).all()
    for x_0, x_t, eps, t in seen:
        torch.testing.assert_close(add_noise(x_0, eps, t), x_t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, weight", [("v", v_weight), ("p2", p2_weight), ("none", torch.ones_like)])
def test_the_loss_is_the_mean_of_raw_times_weight(folder, new, tmp_path, monkeypatch, name, weight):
    """If all raw losses are 1, the logged loss is the mean weight of the noise levels of its four samples."""
    levels = []
    monkeypatch.setattr(train_b, "raw_losses", lambda output, x_0, x_t, eps, t, args: levels.append(t)
                        or 1 + 0 * sum(output).mean(dim=(1, 2, 3)))
    out = train(folder, tmp_path / "run", *new, "--loss-weight", name, steps=1)
    assert lines(out)[0]["loss"] == pytest.approx(weight(levels[0]).mean().item(), rel=1e-5) and len(levels[0]) == 4


def test_images_of_little_contrast_count_more(folder, new, tmp_path, monkeypatch):
    """A wrong fish on orange is as bad as a wrong panda on white, but its squared error is a fraction of that.

    The weights are relative to the mean over the data, not over the batch. Otherwise an image's weight would depend on
    others in its batch, and two processes would not do what one does.
    """
    latents = torch.randn(3, 4, 32, 32) * torch.tensor([0.03, 0.3, 1.5]).sqrt().view(3, 1, 1, 1) + 2
    weight = train_b.contrast_weight(latents)
    torch.testing.assert_close(weight, train_b.contrast_weight(latents + 5))
    torch.testing.assert_close(weight[1:2], train_b.contrast_weight(latents[1:2]))
    assert weight[0] / weight[1] == pytest.approx(0.45 / 0.18, rel=0.05)
    assert weight[1] / weight[2] == pytest.approx(1.65 / 0.45, rel=0.05)
    used = []
    monkeypatch.setattr(train_b, "raw_losses", lambda output, x_0, x_t, eps, t, args: used.append(x_0)
                        or 1 + 0 * sum(output).mean(dim=(1, 2, 3)))
    # 12 samples: all the data once
    out = train(folder, tmp_path / "run", *new, "--loss-weight", "none", "--even-contrast", steps=3)
    assert np.mean([line["loss"] for line in lines(out)]) == pytest.approx(1, rel=1e-3)
    every = train_b.contrast_weight(torch.cat(used))
    assert lines(out)[0]["loss"] == pytest.approx((every[:4].mean() / every.mean()).item(), rel=1e-3)


# --- what each sample draws ---------------------------------------------------------------------------

def samples(folder, *options, n: int = 600, resolution: tuple = (128, 128)) -> list[dict]:
    args = train_b.parse_args([*SMALL, "--weights", "tiny", "--data", str(folder), "--out", "unused", *options])
    dataset = data.open_dataset(folder, captions_required=False)
    dataset.bucket = np.zeros(len(dataset), int)
    draw = partial(train_b.draw_noise, config=dict(c_in=4))
    every = train_b.StageBSamples(dataset, [resolution], args, {}, {}, draw)
    return [every[position, position % len(dataset), 0] for position in range(n)]


@pytest.fixture(scope="module")
def drawn(folder) -> list[dict]:
    return samples(folder)


def test_semantic_latents_are_dropped_and_noised_one_by_one(drawn):
    """5 % are zeroed, 30 % get noise of a level that is even from 0 to 0.5. Other trainers drop whole batches."""
    dropped, level = np.array([item["dropped"] for item in drawn]), np.array([item["t_semantic"] for item in drawn])
    noisy = level > 0
    assert 0.03 < dropped.mean() < 0.075 and 0.25 < noisy.mean() < 0.35
    assert 0.45 < level.max() < 0.5 and level[noisy].mean() == pytest.approx(0.25, abs=0.03)
    assert np.abs(np.histogram(level[noisy], 5, (0, 0.5))[0] / noisy.sum() - 0.2).max() < 0.1
    assert len(set(noisy.reshape(-1, 4).mean(1).tolist())) >= 4                  # 0, 1, 2, 3 of 4, not all or none


def test_captions_are_dropped_one_by_one_and_independently(folder, drawn):
    empty = np.array([item["caption"] == "" for item in drawn])
    assert 0.03 < empty.mean() < 0.075
    dropped = np.array([item["dropped"] for item in drawn])
    assert (empty & dropped).sum() < 8                                           # 0.25 % of both at once
    more = np.array([item["caption"] == "" for item in samples(folder, "--caption-dropout", "0.25", n=200)])
    assert 0.18 < more.mean() < 0.32 and len(set(more.reshape(-1, 4).mean(1).tolist())) >= 4
    assert all(item["caption"] == "" for item in samples(folder, "--text-encoder", "none", n=5))


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_noise_levels_reach_one_and_lean_towards_it(drawn, exponent):
    """t' = (1 - u) 1.08 + 0.001, clamped, then 1 - (1 - t')^exponent: 7 % at exactly t = 1, where sampling starts."""
    args = train_b.parse_args(["--out", "x", "--blind", "0", "--high-noise", str(exponent)])
    chance = torch.from_numpy(np.array([order.sample_rng(0, position, "timestep").random() for position in range(6000)],
                                       np.float32))
    assert np.array_equal(chance[:600].numpy(), [item["chance"] for item in drawn])
    t = train_b.noise_levels(chance, False, args)
    assert t.dtype == torch.float32 and 0.065 < (t == 1).float().mean() < 0.085 and t.min() >= 0.001
    assert len(t.unique()) > 5000
    # the distribution, against its closed form
    for level in (0.2, 0.5, 0.8):
        expected = (1 - (1 - level) ** (1 / exponent) - 0.001) / 1.08
        assert (t < level).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_every_sample_has_its_own_random_numbers(folder, drawn):
    """A function of (seed, position): the same again, others for another seed, and for the same image elsewhere."""
    again, other = samples(folder, n=13), samples(folder, "--seed", "1", n=13)
    for name in ("eps", "eps_semantic", "chance", "t_semantic", "pixels"):
        assert np.array_equal(again[5][name], drawn[5][name])
    assert not torch.equal(again[0]["eps"], again[12]["eps"]) and not torch.equal(again[0]["eps"], other[0]["eps"])
    assert again[0]["chance"] != again[12]["chance"] and torch.equal(again[0]["pixels"], again[12]["pixels"])
    assert abs(torch.corrcoef(torch.stack([item["eps"].flatten() for item in again[:2]]))[0, 1]) < 0.1
    assert again[0]["eps"].shape == (4, 32, 32) and again[0]["eps_semantic"].shape == (16, 3, 3)


def test_what_was_drawn_is_what_the_decoder_sees():
    """Dropped: zeros. Noised: at the scale of unit variance. The others: unchanged to the bit."""
    seen = []

    class Decoder(torch.nn.Module):
        def signal_and_scale(self, x_t, t, semantic, text):
            seen.append(semantic)
            return x_t, x_t
    raw, eps, level = torch.randn(4, 16, 3, 3) * 42 - 1, torch.randn(4, 16, 3, 3), torch.tensor([0.0, 0.5, 0.3, 0.0])
    x = torch.randn(4, 4, 32, 32)
    model = train_b.EncoderAndDecoder(Decoder(), None, train_b)
    model(raw, x, torch.rand(4), None, level, eps, torch.tensor([False, False, True, True]))
    expected = unscale_semantic(add_noise(scale_semantic(raw), eps, level))
    assert torch.equal(seen[0][0], raw[0]) and (seen[0][2:] == 0).all()
    torch.testing.assert_close(seen[0][1], expected[1])
    assert (expected[1] - raw[1]).abs().mean() > 5


# --- sizes --------------------------------------------------------------------------------------------

def test_each_step_draws_one_of_several_resolutions():
    """A function of (seed, step). All images of a step have one size, near their shape; resolutions are equally
    likely."""
    shapes = np.array([[100, 100], [100, 200], [200, 100]] * 40)
    plan = training_samples.MultiSizeSampler(shapes, [256, 512, 768], 2.0, 8, 3)
    steps = [plan.step(k) for k in range(300)]
    areas = np.array([plan.sizes[number][0] * plan.sizes[number][1] for _, _, number in steps])
    nearest = np.array([256, 512, 768])[np.abs(np.log(areas)[:, None] / 2 - np.log([256, 512, 768])).argmin(1)]
    assert np.abs(np.bincount(nearest)[[256, 512, 768]] / 300 - 1 / 3).max() < 0.1
    again = training_samples.MultiSizeSampler(shapes, [768, 256, 512], 2.0, 8, 3).step(123)
    assert again[2] == steps[123][2] and np.array_equal(again[1], steps[123][1])
    for _, indices, number in steps:
        h, w = plan.sizes[number]
        assert len(set(plan.bucket[indices])) == 1
        if max(h, w) > 256:                                                      # up to 256 px there is only the square
            assert all(np.sign(h - w) == np.sign(shapes[i][0] - shapes[i][1]) for i in indices)


def test_training_on_two_resolutions_and_their_cache(folder, new, tmp_path):
    """Latents of each image are cached in both sizes. What is learned is the same as without the cache."""
    options = [*new, *FROZEN, "--resolution", "128", "256", "--batch", "1"]
    plain = train(folder, tmp_path / "plain", *options, steps=4)
    cached = train(folder, tmp_path / "cached", *options, "--cache", str(tmp_path / "cache"), "--cache-dtype", "fp32",
                   steps=4)
    same(newest(plain)["model"], newest(cached)["model"], ROUNDING)
    shapes = {np.load(path).shape for path in (tmp_path / "cache").glob("*/??/*.npy")}
    assert {(4, 32, 32), (4, 64, 64), (16, 3, 3), (16, 6, 6)} <= shapes


# --- the same run, however it is computed ------------------------------------------------------------

def torchrun(processes: int, folder, out, *options, steps: int) -> Path:
    together(processes, Path(out).parent, main_of, "train_b", [*SMALL, "--data", str(folder), "--out", str(out),
                                                               "--steps", str(steps), *options])
    return out


def losses(out) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


def test_two_processes_learn_what_one_does_encoder_and_batchnorm_included(folder, new, tmp_path):
    """8 at once and 2 x 4: the same samples in each step and statistics over all of them, so the same weights up to
    rounding."""
    options = [*new, "--even-contrast", "--text-encoder", "none"]
    config = Path(new[-1])
    plain = tmp_path / "config"
    for part in ("decoder", "image_encoder"):
        (plain / part).mkdir(parents=True)
        (plain / part / "config.json").write_text((config / part / "config.json").read_text().replace('"dropout": 0.1',
                                                                                                      '"dropout": 0.0'))
    options[options.index(str(config))] = str(plain)
    one = train(folder, tmp_path / "one", *options, "--batch", "8", steps=3)
    two = torchrun(2, folder, tmp_path / "two", *options, "--batch", "4", steps=3)
    a, b = newest(one), newest(two)
    # A shift before BatchNorm changes nothing. The gradient there is only rounding, which Adam turns into full steps.
    shifts = {name for name, moments in a["optimizer"]["state"].items() if moments["exp_avg"].abs().max() < 1e-9
              and name.startswith("encoder.")}
    assert shifts <= {"encoder.blocks.3.0.grn.beta", "encoder.blocks.3.0.contract.bias"}
    for part in ("model", "averaged"):
        same(*({name: tensor for name, tensor in state[part].items() if name not in shifts} for state in (a, b)), 1e-5)
    assert any("running_mean" in name for name in a["model"])
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


@pytest.fixture(scope="module")
def still(config, tmp_path_factory) -> list[str]:
    """A new decoder without dropout on the frozen encoder: it must learn the same however the samples are shared
    out."""
    file = tmp_path_factory.mktemp("still") / "decoder.json"
    file.write_text(json.dumps(DECODER | dict(dropout=0.0)))
    return ["--weights", "tiny", "--init", "random", "--config", str(file), *FROZEN]


def test_with_a_frozen_encoder_accumulation_does_the_same_work(folder, still, tmp_path):
    """8 at once, 4 twice, and 2 processes of 2 twice. An encoder that learns sees only its own forward pass in
    BatchNorm."""
    one = train(folder, tmp_path / "one", *still, "--batch", "8", steps=3)
    twice = train(folder, tmp_path / "twice", *still, "--batch", "4", "--grad-accum", "2", steps=3)
    two = torchrun(2, folder, tmp_path / "two", *still, "--batch", "2", "--grad-accum", "2", steps=3)
    for other in (twice, two):
        same(newest(one)["model"], newest(other)["model"], 1e-5)
        assert losses(one) == pytest.approx(losses(other), rel=1e-5)


def test_weights_split_over_processes_learn_the_same(folder, new, tmp_path):
    """--fsdp, for what does not fit on one GPU, with the encoder learning, and gradients clipped over the norm of all
    parts. Resumed by one process that holds all of it."""
    config = tmp_path / "config"
    for part in ("decoder", "image_encoder"):
        (config / part).mkdir(parents=True)
        text = (Path(new[-1]) / part / "config.json").read_text()
        (config / part / "config.json").write_text(text.replace('"dropout": 0.1', '"dropout": 0.0'))
    options = [*new[:-1], str(config), "--text-encoder", "none", "--clip", "0.1"]
    one = train(folder, tmp_path / "one", *options, "--batch", "8", steps=3)
    split = torchrun(2, folder, tmp_path / "split", *options, "--fsdp", "--batch", "4", "--val-every", "2",
                     "--val-count", "2", steps=2)
    assert (split / "decoder").is_dir() and (split / "image_encoder").is_dir()
    train(folder, split, *options, "--batch", "8", "--resume", "auto", steps=3)
    same(newest(one)["model"], newest(split)["model"], 1e-5)
    same(newest(one)["averaged"], newest(split)["averaged"], 1e-5)


@pytest.mark.parametrize("kind", [StageB, StageBV1])
def test_blocks_of_equal_shape_are_compiled_once(kind):
    """Three times as many blocks need no more programs: levels, skip connections and semantic latents make shapes."""
    from torch._dynamo.testing import CompileCounter
    counts = []
    for blocks in ((1, 2), (3, 6)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = kind(c_hidden=(8, 16), heads=(-1, 2), blocks=blocks, levels=("CT", "CTA"), c_cond=8, c_text=8,
                       **(dict(inject=(False, True)) if kind is StageB else dict(codebook_size=16, c_token=8))).eval()
        groups = block_groups(network)
        assert [len(group) for group in groups] == 2 * ([2] * blocks[0] + [3] * blocks[1])
        x_t = torch.randn(1, 4, 8, 8) if kind is StageB else torch.randint(16, (1, 8, 8))
        given = x_t, torch.rand(1), torch.randn(1, 16, 3, 3), torch.randn(1, 5, 8)
        counter = CompileCounter()
        with torch.no_grad(), mock.patch("torch.compile", partial(torch.compile, backend=counter)):
            plain = network(*given)
            compile_blocks(groups)
            torch.testing.assert_close(network(*given), plain)
        counts.append(counter.frame_count)
    assert counts == [6, 6]


def test_compiled_blocks_learn_at_several_sizes():
    """A ResBlock's convolution gets a view of its input, and inductor cannot keep a view of varying sizes for backward:
    training with --compile failed at the second size, which every Stage B of two levels has. Later, with views that
    backward computes again, it failed at the third."""
    torch.manual_seed(0)
    block, sizes = ResBlock(8), [torch.randn(2, h, w, 8) for h, w in ((3, 3), (4, 6), (5, 3))]

    def gradients():
        return [torch.autograd.grad(block(x).square().sum(), [*block.parameters()]) for x in sizes]
    plain = gradients()
    torch._dynamo.reset()
    compile_blocks([[block]])
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-4)


def test_gradients_travel_once_per_step(folder, still, tmp_path):
    """Forward and backward of all micro-steps except the last are inside no_sync(): DDP decides in forward."""
    together(2, tmp_path, count_messages, "train_b", [*SMALL, *still, "--data", str(folder), "--out", "run", "--steps",
                                                      "2", "--batch", "1", "--grad-accum", "3"])
    # 2 steps, one bucket; without no_sync() 6
    assert (tmp_path / "calls").read_text() == "2"


RESUMED = {
    "joint": [],
    "joint, dropout, accumulation, flips, crops": ["--grad-accum", "2", "--random-flip", "--crop", "random",
                                                   "--semantic-dropout", "0.3"],
    "blind, a worker, cache": ["--blind", "4", "--workers", "1", "--cache", "CACHE", "--even-contrast"],
    "frozen, cache, two sizes": [*FROZEN, "--cache", "CACHE", "--resolution", "128", "256"],
    "bf16 and checkpointing": ["--dtype", "bf16", "--checkpointing", "--loss", "head"],
    "fp16 with a scaler": ["--dtype", "fp16"],
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(folder, new, tmp_path, options):
    """Stopped after steps 3 and 4 of 5, in the middle of an epoch: weights, EMA, BatchNorm, optimizer and data order
    all continue exactly."""
    options = [*new, "--batch", "2", *(str(tmp_path / "cache") if option == "CACHE" else option for option in options),
               "--save-every", "1", "--keep", "9"]
    unbroken = train(folder, tmp_path / "unbroken", *options, steps=5)
    out = tmp_path / "broken"
    # The schedule depends on --steps, so a part is not ended early but loses its last checkpoint.
    for last in (3, 4, 5):
        train(folder, out, *options, "--resume", "auto", steps=5)
        for path in sorted((out / "checkpoints").iterdir())[last:] if last < 5 else []:
            path.unlink()
    train(folder, out, *options, "--resume", "auto", steps=5)
    same({name: newest(unbroken)[name] for name in LEARNED}, {name: newest(out)[name] for name in LEARNED})


def test_a_signal_finishes_the_step_and_saves(folder, new, tmp_path, monkeypatch, capsys):
    """A scheduler sends SIGTERM before it kills a run. Nothing is lost, and the resumed run equals an unbroken one."""
    unbroken = train(folder, tmp_path / "unbroken", *new, steps=4)
    update = optim.EMA.update

    def update_and_warn(self, *skip):
        update(self, *skip)
        if self.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(optim.EMA, "update", update_and_warn)
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            train(folder, tmp_path / "run", *new, steps=4)
    assert end.value.code == 143
    assert newest(out)["step"] == 2 and "stopped after step 2" in capsys.readouterr().err
    assert not (out / "decoder").exists()
    train(folder, out, *new, "--resume", "auto", steps=4)
    same(newest(unbroken)["model"], newest(out)["model"])


def test_gradient_checkpointing_changes_nothing_but_memory(folder, new, tmp_path, monkeypatch):
    import stage_b
    calls, checkpoint = [], stage_b.checkpoint
    monkeypatch.setattr(stage_b, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    a, b = (train(folder, tmp_path / name, *new, *options, steps=2)
            for name, options in (("a", []), ("b", ["--checkpointing"])))
    same(newest(a)["model"], newest(b)["model"], 1e-6)
    # each of C T, C T A, C T A, C T in each step
    assert len(calls) == 2 * 10


def test_a_cache_keeps_only_what_does_not_change(folder, new, tmp_path, monkeypatch):
    """Always the VQGAN's latents; never those of an encoder that learns, which would be outdated at the next step.

    The weights are the same as without. In a second run the VQGAN, or both, do no work at all.
    """
    for name, frozen in (("joint", []), ("frozen", FROZEN)):
        # One image per batch in both runs, so that the rounding is the same.
        options = [*new, *frozen, "--random-flip", "--batch", "1", "--text-encoder", "none"]
        plain = train(folder, tmp_path / f"{name} plain", *options, steps=3)
        options += ["--cache", str(tmp_path / "cache"), "--cache-dtype", "fp32"]
        cached = train(folder, tmp_path / f"{name} cached", *options, steps=3)
        same(newest(plain)["model"], newest(cached)["model"], ROUNDING)
        calls, forward = [], TinyImageEncoder.forward
        with monkeypatch.context() as patch:
            patch.setattr(StageA, "encode", lambda *_: pytest.fail("an image was encoded"))
            patch.setattr(TinyImageEncoder, "forward", lambda self, x: calls.append(1) or forward(self, x))
            again = train(folder, tmp_path / f"{name} again", *options, steps=3)
        same(newest(cached)["model"], newest(again)["model"])
        assert len(calls) == (0 if frozen else 3)


def test_a_broken_image_is_replaced_and_named(folder, new, tmp_path, capsys):
    """It is cut off in the middle. Its header is fine, so it is only found when it is read."""
    broken = tmp_path / "data"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "03.png").write_bytes((folder / "03.png").read_bytes()[:400])
    train(broken, tmp_path / "run", *new, "--cache", str(tmp_path / "cache"), steps=4)
    assert "1 images cannot be read: " in capsys.readouterr().err
    train(broken, tmp_path / "other", *new, "--even-contrast", "--val-every", "4", steps=4)


# --- NaN and infinity ------------------------------------------------------------------------------

def test_a_nan_step_is_skipped_and_leaves_no_trace_in_batchnorm(folder, new, tmp_path, monkeypatch):
    """One NaN would destroy all weights, and the running statistics of the encoder, which no optimizer guards."""
    calls, forward = [], TinyImageEncoder.forward

    def sometimes(self, x):
        calls.append(1)
        return forward(self, x * (float("nan") if len(calls) == 2 else 1.0))
    monkeypatch.setattr(TinyImageEncoder, "forward", sometimes)
    out = train(folder, tmp_path / "run", *new, steps=4)
    bad, = (line for line in lines(out) if line.get("bad_step"))
    assert bad["step"] == 2 and len(bad["captions"]) == 4 and len(bad["positions"]) == 4
    state = newest(out)
    assert (state["bad_in_all"], state["bad"], state["updates"]) == (1, 0, 3)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert state["model"]["encoder.norm.num_batches_tracked"] == 3


def test_too_many_nan_steps_in_a_row_stop_the_run_with_its_last_good_state(folder, new, tmp_path, monkeypatch):
    signal_and_scale = StageB.signal_and_scale
    monkeypatch.setattr(StageB, "signal_and_scale",
                        lambda self, *args: tuple(x * float("nan") for x in signal_and_scale(self, *args)))
    with pytest.raises(UserError, match="3 steps in a row came to NaN or infinity, up to step 3; "
                                        "the last good state is in .*lower --lr"):
        train(folder, tmp_path / "run", *new, "--max-bad-steps", "3", steps=9)
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "run")["model"].values())


# --- validation and samples -----------------------------------------------------------------------------------------

def test_validation_and_psnr_are_the_same_work_every_time(folder, tmp_path):
    """At step 0 of two runs with different training: the same values, one per noise level, guidance and number of
    steps."""
    values = []
    for name, options in (("a", []), ("b", ["--semantic-dropout", "0.5", "--batch", "2", "--lr", "1e-2", "--cache",
                                            str(tmp_path / "cache"), "--cache-dtype", "fp32"])):
        out = train(folder, tmp_path / name, "--weights", "tiny", "--freeze-encoder", "--val-every", "1", "--val-count",
                    "2", "--sample-every", "1", *options, steps=1)
        found = [{key: value for key, value in line.items() if key.startswith(("val", "psnr"))} for line in lines(out)]
        values.append([line for line in found if line])
    (val, psnr), (other_val, other_psnr) = values[0][:2], values[1][:2]
    assert val == pytest.approx(other_val, rel=1e-5) and psnr == pytest.approx(other_psnr, rel=1e-4)
    assert values[0][2] != values[1][2]
    assert set(psnr) == {"psnr_a", *(f"psnr_guidance_{g}_steps_{s}" for g in (1, 4) for s in (4, 12))}
    # B cannot have less error than A.
    assert psnr["psnr_a"] > psnr["psnr_guidance_1_steps_12"] > 15
    assert sum(f"val_loss_t_{t:.2f}" in val for t in train_b.T_GRID) == 10
    assert [path.name for path in sorted((tmp_path / "a" / "samples").iterdir())] == ["step_000000.png",
                                                                                      "step_000001.png"]
    with Image.open(tmp_path / "a" / "samples" / "step_000000.png") as grid:
        # Image, Stage A, guidance 1 and 4 with 4 and 12 steps, of 2 images.
        assert grid.size[0] >= 6 * 128 and 2 * 128 <= grid.size[1] < 3 * 128
    assert (tmp_path / "a" / "curves.png").exists()


def test_emoji_scenes_are_validated_on_unseen_ones(new, tmp_path, monkeypatch):
    opened, open_dataset = [], data.open_dataset
    monkeypatch.setattr(training_samples, "open_dataset", lambda source, **more: opened.append(source)
                        or open_dataset(source, **more))
    train("scenes:all:16:5", tmp_path / "run", *new, "--val-every", "1", "--val-count", "2", steps=1)
    assert opened == ["scenes:all:16:5", "scenes:all:64:1000000000"]


def test_a_dry_run_prints_what_would_happen_and_does_nothing(folder, new, tmp_path, capsys):
    train(folder, tmp_path / "run", *new, "--dry-run")
    output = capsys.readouterr().out
    assert all(words in output for words in ("parameters learn", "GiB", "128x128 px 12", "background"))
    assert "step 0: semantic (4, 16, 3, 3), eps (4, 4, 32, 32)" in output
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- checkpoints and errors ------------------------------------------------------------------------

def test_only_the_newest_checkpoints_are_kept_and_others_are_refused(folder, new, tmp_path, capsys):
    out = train(folder, tmp_path / "run", *new, "--save-every", "1", "--keep", "2", steps=3)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000002.pt", "step_00000003.pt"]
    with pytest.raises(UserError,
                       match="exists already: add --resume auto to continue from it, or choose another --out"):
        train(folder, out, *new)
    torch.save(dict(script="train_c.py"), tmp_path / "c.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_b.py but of train_c.py"):
        train(folder, tmp_path / "other", *new, "--resume", str(tmp_path / "c.pt"))
    train(folder, out, *new, "--resume", "auto", "--semantic-dropout", "0.1", steps=4)
    assert "resuming with --semantic-dropout 0.1, the checkpoint has 0.05" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_is_resumed(folder, new, tmp_path, capsys):
    """An option that is new, at its default, or one that is gone must not stop a long run: only common ones are
    compared."""
    options = [*new, "--save-every", "2", "--resume", "auto"]
    unbroken = train(folder, tmp_path / "unbroken", *options, steps=3)
    out = train(folder, tmp_path / "run", *options, steps=3)
    (out / "checkpoints" / "step_00000003.pt").unlink()
    state = newest(out)
    state["settings"] = {name: value for name, value in state["settings"].items()
                         if name not in ("v1", "even_contrast")} | dict(encoder_warmup=1200)
    torch.save(state, out / "checkpoints" / "step_00000002.pt")
    train(folder, out, *options, steps=3)
    assert "resuming with" not in capsys.readouterr().err
    same(newest(unbroken)["model"], newest(out)["model"])


NEW = ["--init", "random"]
ERRORS = [
    (["--steps", "0"], "--steps: expected a whole number from 1 to 1000000000, got '0'"),
    (["--semantic-dropout", "1"], "--semantic-dropout: expected a number .* from 0 to below 1, got '1'"),
    (["--semantic-noise", "1.5"], "--semantic-noise: expected a number .* from 0 to 1, got '1.5'"),
    (["--high-noise", "0"], "--high-noise: expected a number .* above 0, got '0'"),
    (["--config", "x.json"], "add --init random"),
    (["--backbone", "x.pth"], "--backbone is where a new image encoder starts"),
    ([*NEW, "--decoder", "x"], "remove one of them"),
    ([*NEW, "--freeze-encoder"], "an image encoder that has learned nothing: add --image-encoder"),
    (["--cache", "x", "--crop", "random"], "does not go with --crop random"),
    (["--filter", "min_aesthetic"], "expected something like min_aesthetic=5"),
    (["--resolution", "100"], "expected a multiple of 128"),
    ([*NEW, "--config", "nowhere.json"], "nowhere.json"),
    (["--vqgan", "nowhere"], "vqgan: nowhere: there is no such file or folder"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_user_errors_are_one_line(folder, tmp_path, options, message):
    with pytest.raises((UserError, WeightsError, OSError), match=message) as error:
        train(folder, tmp_path / "run", "--weights", "tiny", *options)
    assert "\n" not in str(error.value)


def test_a_text_encoder_of_another_width_is_refused(folder, new, tmp_path):
    file = tmp_path / "wide.json"
    file.write_text(json.dumps(DECODER | dict(clip_embd=64)))
    with pytest.raises(WeightsError, match="Stage B takes texts of width 64, the text encoder .* gives 128"):
        train(folder, tmp_path / "run", *new[:-1], str(file), *FROZEN)


def test_defaults_suit_the_model():
    """Emoji scenes from random weights: as docs/TRAINING.md found. Released weights: small steps, the original's
    loss."""
    def defaults(small: bool, *options) -> tuple:
        args = train_b.parse_args(["--out", "x", *options])
        train_b.set_defaults(args, small)
        return tuple(getattr(args, name) for name in ("resolution", "batch", "lr", "blind", "high_noise", "loss_weight",
                                                      "ema"))
    assert defaults(True, *NEW) == ([128], 32, 1.5e-3, 2000, 1.5, "v", 0.998)
    assert defaults(True, *NEW, "--image-encoder", "x", "--data",
                    "folder") == ([128], 32, 1.5e-3, 2000, 1.5, "v", 0.998)
    assert defaults(True) == ([128], 32, 1.5e-3, 0, 1.5, "v", 0.998)
    assert defaults(False) == ([1024], 4, 1e-5, 0, 1.0, "p2", 0.999)
    assert defaults(False, *NEW, "--data", "folder", "--lr", "3e-4")[2] == 3e-4
