"""train_a.py: each term of the loss against a closed form or torch, the same work on any number of processes, a resumed
run equal to an unbroken one, and a decoder that is fine-tuned without changing a latent.

All with a model of a few thousand parameters on images of 32 px.
"""
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import train_a
from training import scenes
from loading.errors import UserError
from training import optim
from training.processes import Processes, SynchronisedBatchNorm
from helpers import lines, main_of, newest, same, together
from stage_a import Codebook, StageA
from training.codebook import CodebookAverages, CodebookUpdates, count, perplexity
from training.data import open_dataset
from training.order import BatchSampler
from training.validation import mean_over
from training.vqgan_losses import (PatchDiscriminator, VGGFeatures, adaptive_weight, discriminator_loss,
                                   generator_loss, perceptual_loss)
from loading.weights import load_stage_a, save_model

ROOT = Path(train_a.__file__).parent
TINY = ROOT / "models" / "tiny" / "vqgan"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve images of 64 px, without captions."""
    out = tmp_path_factory.mktemp("images")
    for i, image in enumerate(scenes.EmojiScenes("varied", seed=5).batch(0, 12)[0]):
        Image.fromarray(image).resize((64, 64), Image.BICUBIC).save(out / f"{i:02d}.png")
    return out


SMALL = ["--width", "8", "--bottleneck-blocks", "1", "--codebook-size", "32", "--resolution", "32", "--workers", "0",
         "--val-every", "0", "--val-count", "4", "--sample-every", "0", "--log-every", "1", "--device", "cpu",
         "--warmup", "2", "--lr", "1e-2", "--batch", "4", "--revive-every", "2"]
GAN = ["--gan-start", "2"]
LEARNED = ("model", "averaged", "optimizer", "scaler", "usage", "step", "updates")


def samples_of(folder, args) -> train_a.StageASamples:
    dataset = open_dataset(folder, captions_required=False)
    dataset.bucket = np.zeros(len(dataset), int)
    return train_a.StageASamples(dataset, [(args.resolution, args.resolution)], args)


def train(folder, out, *options, steps: int = 4) -> Path:
    train_a.main(train_a.parse_args([*SMALL, "--data", str(folder), "--out", str(out), "--steps", str(steps),
                                     *options]))
    return out


# --- a run and its result ------------------------------------------------------------------------------

def test_thirty_steps_on_one_batch_cut_the_loss_to_a_third(folder, tmp_path):
    """Always the same four images, which any working trainer learns."""
    four = tmp_path / "four"
    four.mkdir()
    for path in sorted(folder.iterdir())[:4]:
        (four / path.name).write_bytes(path.read_bytes())
    losses = [line["loss"] for line in lines(train(four, tmp_path / "run", "--lr", "2e-2", steps=30))]
    assert losses[-1] < losses[0] / 3


def test_a_run_leaves_a_vqgan_curves_samples_and_a_log(folder, tmp_path, capsys):
    """vqgan/ can be loaded, its latents have unit variance, and PSNR is measured with and without quantisation."""
    out = train(folder, tmp_path / "run", "--val-every", "2", "--sample-every", "4", "--val-data", str(folder), steps=4)
    assert {path.name for path in out.iterdir()} >= {"vqgan", "README.md", "log.jsonl", "curves.png", "samples",
                                                     "checkpoints"}
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["step_000000.png", "step_000004.png"]
    images = torch.stack([torch.from_numpy(np.array(Image.open(path).resize((32, 32))))
                          for path in sorted(folder.iterdir())[:12]])
    latents = load_stage_a(out / "vqgan").encode(images.permute(0, 3, 1, 2).float() / 255)
    assert 0.8 < latents.std() < 1.2
    step, validation = lines(out)[1], lines(out)[-1]
    assert step.keys() >= {"loss", "l1", "l2", "codebook", "commitment", "grad_norm", "lr", "images_per_second",
                           "codes_used", "perplexity", "bad_steps"}
    assert validation.keys() >= {"val_psnr", "val_psnr_quantised", "val_codes_used", "val_perplexity"}
    psnr = f"not quantised {validation['val_psnr']:.2f} dB, quantised {validation['val_psnr_quantised']:.2f} dB"
    assert psnr in capsys.readouterr().out and psnr in (out / "README.md").read_text()


def test_the_shipped_model_reconstructs_unseen_scenes():
    """Measured on these 64 images: 30.0 dB, through the codebook 28.7 dB."""
    images = torch.from_numpy(scenes.EmojiScenes("all", seed=987654321).batch(0, 64)[0]).permute(0, 3, 1, 2)
    values = train_a.validate(load_stage_a(TINY), images, train_a.parse_args(["--out", "unused"]),
                              Processes("cpu"))
    assert values["val_psnr"] > 29.8 and values["val_psnr_quantised"] > 28.5


def test_the_shipped_file_is_small():
    assert (TINY / "diffusion_pytorch_model.safetensors").stat().st_size < 2 * 2 ** 20


def test_psnr_is_that_of_the_mean_squared_error(folder):
    """-10 log10 of the mean over all images, clamped to [0, 1], with a decoder that returns grey."""
    model = StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=4).eval()
    model.decode_raw = lambda z: torch.full((len(z), 3, 32, 32), 0.5)
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    values = train_a.validate(model, images, train_a.parse_args(["--out", "unused", "--batch", "4"]),
                              Processes("cpu"))
    expected = -10 * (images.double() / 255 - 0.5).square().mean().log10()
    assert values["val_psnr"] == pytest.approx(expected.item(), abs=1e-4) == values["val_psnr_quantised"]


# --- the terms of the loss ---------------------------------------------------------------------------

def first_line(folder, out, *options) -> tuple[dict, StageA, torch.Tensor, torch.Tensor]:
    """The first line of a log; the model before that step; its images, and which of them are quantised."""
    line = lines(train(folder, out, *options, steps=1))[0]
    args = train_a.parse_args([*SMALL, "--data", str(folder), "--out", "unused", *options])
    args.crop = "random"
    torch.manual_seed(0)
    model = train_a.build_model(args).train()
    samples = samples_of(folder, args)
    positions, indices, _ = BatchSampler(np.zeros(12, int), args.batch, args.seed).step(0)
    items = [samples[int(position), int(index), 0] for position, index in zip(positions, indices)]
    images = torch.stack([item["pixels"] for item in items]).permute(0, 3, 1, 2).float() / 255
    return line, model, images, torch.tensor([item["quantise"] for item in items])


def test_the_loss_is_the_weighted_sum_of_its_terms(folder, tmp_path):
    """L1, L2, commitment and codebook loss, as torch computes them from parts of the model."""
    line, model, images, quantise = first_line(folder, tmp_path / "run", "--l1", "0.5", "--l2", "3", "--commitment",
                                               "0.7")
    with torch.no_grad():
        z = model.encode_raw(images)                                                         # (4, 8, 8, 4)
        distances = torch.cdist(z.flatten(0, 2), model.codebook.codes)                       # (256, 32)
        q = model.codebook.codes[distances.argmin(1)].view_as(z)
        fake = model.decode_raw(torch.where(quantise.view(-1, 1, 1, 1), q, z))
    expected = dict(l1=F.l1_loss(fake, images), l2=F.mse_loss(fake, images), codebook=F.mse_loss(q, z),
                    commitment=F.mse_loss(q, z))
    assert quantise.any() and not quantise.all()
    for name, value in expected.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-4), name
    total = 0.5 * expected["l1"] + 3 * expected["l2"] + expected["codebook"] + 0.7 * expected["commitment"]
    assert line["loss"] == pytest.approx(total.item(), rel=1e-4)


def test_the_codebook_loss_pulls_codes_and_the_commitment_loss_latents():
    """d/dx of the mean of (x - y)^2 is 2 (x - y) / N: for the code with y constant, and for the latent."""
    book, z = Codebook(5, 4), torch.randn(1, 2, 2, 4, requires_grad=True)
    _, indices, codebook, commitment = book(z)
    codebook.backward()
    assert z.grad is None
    expected = torch.zeros(5, 4).index_add_(0, indices.flatten(),
                                            2 * (book.codes[indices] - z).detach().flatten(0, 2) / z.numel())
    torch.testing.assert_close(book.codes.grad, expected)
    book.codes.grad = None
    commitment.backward()
    assert book.codes.grad is None
    torch.testing.assert_close(z.grad, 2 * (z - book.codes[indices]).detach() / z.numel())


def test_codes_become_running_means_of_their_latents():
    """arXiv:1711.00937, eq. 6 to 8: N and m are running means and the code is m / N. After many equal steps it is the
    mean of its latents."""
    codes, z = torch.randn(3, 4), torch.randn(50, 4)
    indices = torch.randint(2, (50,))                                # the third code is never used
    averages = CodebookAverages(codes, decay=0.9)
    n, m, moved = torch.ones(3), codes.clone(), codes.clone()
    for _ in range(3):
        counts, sums = count(z, indices, 3).split([1, 4], dim=1)
        averages.update(moved, counts[:, 0], sums)
        for k in range(3):
            n[k] = 0.9 * n[k] + 0.1 * (indices == k).sum()
            m[k] = 0.9 * m[k] + 0.1 * z[indices == k].sum(0)
    torch.testing.assert_close(moved, m / n[:, None], rtol=1e-4, atol=1e-5)      # smoothing moves them by 1e-5
    for _ in range(300):
        averages.update(moved, counts[:, 0], sums)
    torch.testing.assert_close(moved[:2], torch.stack([z[indices == k].mean(0) for k in range(2)]), rtol=1e-3,
                               atol=1e-3)
    assert moved.isfinite().all()


def test_smoothing_is_laplaces():
    """N'_i = (N_i + e) / (n + K e) n with e = 1e-5: the sum of the sizes is the same, and none is 0."""
    averages, codes = CodebookAverages(torch.ones(2, 1), decay=0.0), torch.ones(2, 1)
    averages.update(codes, torch.tensor([4.0, 0.0]), torch.tensor([[8.0], [0.0]]))
    torch.testing.assert_close(codes, torch.tensor([[8 / ((4 + 1e-5) / (4 + 2e-5) * 4)], [0.0]]), rtol=1e-6, atol=0)


def test_perplexity_counts_codes():
    """K codes used equally often: K. Only one: 1."""
    assert perplexity(torch.full((32,), 7.0)).item() == pytest.approx(32, rel=1e-5)
    assert perplexity(F.one_hot(torch.tensor(3), 32).float()).item() == pytest.approx(1)


def test_hinge_losses():
    """A discriminator that is right and beyond the margin has loss 0; at logits of 0 it is 1. The generator's loss is
    minus the mean logit."""
    real, fake = torch.tensor([1.5, 2.0]), torch.tensor([-1.0, -3.0])
    assert discriminator_loss(real, fake) == 0 and discriminator_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert discriminator_loss(fake, real).item() == pytest.approx(0.5 * ((2 + 4) / 2 + (2.5 + 3) / 2))
    assert generator_loss(fake) == 2


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    """With it, both losses have gradients of equal norm at the last layer. A vanishing gradient does not make it
    infinite."""
    w = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(5, 4)
    reconstruction, g_loss = (x @ w.T).square().mean(), 0.01 * (x @ w.T).sum()
    weight = adaptive_weight(reconstruction, g_loss, w)
    a, b = (torch.autograd.grad(loss, w)[0] for loss in (reconstruction, g_loss))
    assert weight.item() == pytest.approx((a.norm() / (b.norm() + 1e-6)).item(), rel=1e-5) and not weight.requires_grad
    assert adaptive_weight((x @ w.T).square().mean(), (x @ w.T).sum() * 1e-12, w) == 1e4


def vgg_file(path: Path) -> Path:
    """VGG16's convolutions with random weights, in torchvision's names."""
    shapes, c = {}, 3
    for i, width in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, 128, 128, 256, 256, 256, 512, 512,
                                                                           512, 512, 512, 512)):
        shapes |= {f"features.{i}.weight": (width, c, 3, 3), f"features.{i}.bias": (width,)}
        c = width
    save_file({name: torch.randn(shape) * (2 / (9 * shape[1])) ** 0.5 if len(shape) > 1 else torch.zeros(shape)
               for name, shape in shapes.items()}, path)
    return path


@torch.no_grad()
def test_the_perceptual_loss_is_lpips_without_its_weights(tmp_path):
    """Features of torchvision's VGG16, normalised at each position, squared differences; 0 for the same image."""
    torchvision = pytest.importorskip("torchvision", reason="VGG16 is torchvision's")
    vgg = VGGFeatures(str(vgg_file(tmp_path / "vgg.safetensors")))
    theirs = torchvision.models.vgg16().features.eval()
    theirs.load_state_dict({name.removeprefix("features."): tensor
                            for name, tensor in load_file(tmp_path / "vgg.safetensors").items()})
    a, b = torch.rand(2, 2, 3, 32, 32)

    def features(x):
        x, found = (x - vgg.mean) / vgg.std, []
        for i, layer in enumerate(theirs):
            x = layer(x)
            found += [x.clone()] if i in (3, 8, 15, 22, 29) else []
        return found
    expected = 0
    for x, y in zip(features(a), features(b)):
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        expected = expected + (x - y).square().sum(1).mean()
    assert [tuple(f.shape[1:]) for f in vgg(a)] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    torch.testing.assert_close(perceptual_loss(vgg(a), vgg(b)), expected, rtol=1e-4, atol=1e-6)
    assert perceptual_loss(vgg(a), vgg(a)) == 0


def test_the_perceptual_loss_is_part_of_a_run(folder, tmp_path):
    """Its gradient reaches the decoder even if it is the only loss. VGG16 is not saved."""
    pytest.importorskip("torchvision", reason="VGG16 is torchvision's")
    file = vgg_file(tmp_path / "vgg.safetensors")
    out = train(folder, tmp_path / "run", "--perceptual", str(file), "--perceptual-weight", "0.5", "--l1", "0",
                "--l2", "0", "--commitment", "0", "--codebook", "ema", "--batch", "2", steps=2)
    line = lines(out)[0]
    assert line["loss"] == pytest.approx(0.5 * line["perceptual"], rel=1e-5) and line["grad_norm"] > 0
    state, plain = newest(out), newest(train(folder, tmp_path / "plain", steps=1))
    assert not any("vgg" in name for name in state) and len(state["model"]) == len(plain["model"])


def test_batchnorm_keeps_its_statistics_after_norm_steps(folder, tmp_path):
    """Until then its statistics follow the batches. After that they stay the same to the bit, while the encoder and its
    affine weights continue to learn."""
    two, four, six = (newest(train(folder, tmp_path / f"{steps}", "--norm-steps", "4", "--schedule", "constant",
                                   steps=steps))["model"] for steps in (2, 4, 6))
    assert not torch.equal(two["norm_latent.running_mean"], four["norm_latent.running_mean"])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(four[f"norm_latent.{name}"], six[f"norm_latent.{name}"]), name
    for name in ("norm_latent.weight", "embed.weight"):
        assert not torch.equal(four[name], six[name]), name


def test_quantisation_is_skipped_for_each_image_separately(folder):
    """Drawn for each image as a function of (seed, position), not once for the whole batch."""
    args = train_a.parse_args([*SMALL, "--data", str(folder), "--out", "unused", "--quantise", "0.25", "--crop",
                               "center"])
    samples = samples_of(folder, args)
    drawn = np.array([samples[position, 0, 0]["quantise"] for position in range(400)])
    assert 0.18 < drawn.mean() < 0.32 and len(set(drawn.reshape(-1, 4).mean(1).tolist())) >= 4
    assert np.array_equal(drawn[:50], [samples[position, 0, 0]["quantise"] for position in range(50)])


# --- the codebook ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_unused_codes_are_moved_to_latents(folder, tmp_path, kind):
    """Codes far from all latents have no gradient. After --revive-every steps they are latents, also in the
    averages."""
    far = StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=32, scale_factor=1.0)
    far.codebook.codes.data[4:] += 1000
    save_model(far, tmp_path / "far")
    codes = {steps: newest(train(folder, tmp_path / f"{steps}", "--init", str(tmp_path / "far"), "--codebook", kind,
                                 steps=steps))
             for steps in (1, 2)}
    dead = torch.arange(32) >= 4
    assert codes[1]["model"]["codebook.codes"][dead].abs().min() > 900
    revived = codes[2]["model"]["codebook.codes"][dead]
    assert revived.abs().max() < 10 and len(revived.unique(dim=0)) > 14                      # latents after BatchNorm
    if kind == "gradient":
        assert torch.equal(codes[2]["averaged"]["codebook.codes"][dead], revived)
    else:
        assert torch.equal(codes[2]["codebook"]["sums"][dead], revived)
        assert (codes[2]["codebook"]["sizes"][dead] == 1).all()
    assert (codes[2]["usage"][0] == 0).all() and codes[1]["usage"][0].sum() == 4 * 64


def test_an_ema_codebook_learns_without_an_optimizer(folder, tmp_path):
    """No gradient, no moments of AdamW, no weight decay; but the codes move."""
    first, third = (newest(train(folder, tmp_path / f"{steps}", "--codebook", "ema", "--revive-every", "100",
                                 steps=steps)) for steps in (1, 3))
    assert "codebook.codes" not in first["averaged"]
    assert not torch.equal(first["model"]["codebook.codes"], third["model"]["codebook.codes"])
    shapes = [tuple(state["exp_avg"].shape) for state in third["optimizer"]["state"].values()]
    assert (32, 4) not in shapes


# --- only the decoder --------------------------------------------------------------------------------

def test_a_frozen_encoder_leaves_every_latent_as_it_was(folder, tmp_path):
    """Stages B and C were trained on these latents: encoder, BatchNorm's statistics, codebook and scale stay the same
    to the bit, while the decoder learns."""
    out = train(folder, tmp_path / "run", "--init", str(TINY), "--freeze-encoder", *GAN, "--codebook", "ema",
                "--resolution", "64", steps=4)
    before, after = load_stage_a(TINY), load_stage_a(out / "vqgan")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(before.encode(images), after.encode(images))
    assert torch.equal(before.encode_indices(images), after.encode_indices(images))
    assert after.scale_factor == before.scale_factor and not torch.equal(before.decode(before.encode(images)),
                                                                         after.decode(after.encode(images)))
    learned = {name for name, p in before.state_dict().items() if not torch.equal(p, after.state_dict()[name])}
    assert learned and all(name.startswith(("from_latent", "decoder", "to_pixels")) for name in learned)


def test_frozen_weights_of_full_precision_are_not_rounded(folder, tmp_path):
    """The result is usually float16, but not if that would change latents."""
    from loading.files import STEM, write_files
    from loading.names import config_to_diffusers, to_diffusers
    model = StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=32)
    write_files(config_to_diffusers(model),
                {name: t.contiguous() for name, t in to_diffusers(model.state_dict(), model).items()},
                tmp_path / "full", STEM)
    after = load_stage_a(train(folder, tmp_path / "run", "--init", str(tmp_path / "full"), "--freeze-encoder",
                               steps=1) / "vqgan")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval().encode(images), after.encode(images))


# --- the same run, however it is computed --------------------------------------------------------------

def train_on_two(folder, out, *options, steps: int) -> Path:
    together(2, Path(out).parent, main_of, "train_a", [*SMALL, "--data", str(folder), "--out", str(out), "--steps",
                                                       str(steps), *options])
    return out


# The gradient of a bias just before BatchNorm is 0 except for rounding, and AdamW turns any gradient into a whole step.
# So the steps are small.
TRAINED = ["--init", str(TINY), "--lr", "1e-4"]


@pytest.mark.parametrize("options", [[], [*GAN, "--gan-start", "0", "--codebook", "ema"]],
                         ids=["plain", "gan and ema codebook"])
def test_one_process_and_two_do_the_same_work(folder, tmp_path, options):
    """8 images, or 2 x 4, with BatchNorm, moved codes and discriminator: the same weights, statistics and codes up to
    rounding."""
    one = train(folder, tmp_path / "one", *options, *TRAINED, "--batch", "8", steps=3)
    two = train_on_two(folder, tmp_path / "two", *options, *TRAINED, "--batch", "4", steps=3)
    names = ["model", "averaged", "usage", *(["discriminator", "codebook"] if options else [])]
    same({name: newest(one)[name] for name in names}, {name: newest(two)[name] for name in names}, 1e-5)
    for k, (a, b) in enumerate(zip(lines(one), lines(two))):
        for name in ("loss", "codes_used", "perplexity", "grad_norm"):
            # Two steps agree to 3e-7. Then the biases mentioned at TRAINED differ by 5e-6, and with AVX-512 grad_norm
            # by 2e-4.
            assert a[name] == pytest.approx(b[name], rel=1e-5 if k < 2 else 5e-4), (k, name)


@pytest.mark.parametrize("rest", [["--freeze-encoder"], ["--norm-steps", "0"]], ids=["frozen", "after --norm-steps"])
def test_accumulation_is_exact_if_batchnorm_keeps_its_statistics(folder, tmp_path, rest):
    """Twice 4 is not the same as 8 while BatchNorm takes its statistics from one pass. Afterwards it is, also on two
    processes."""
    options = [*TRAINED, *rest]
    one = train(folder, tmp_path / "one", *options, "--batch", "8", steps=2)
    twice = train(folder, tmp_path / "twice", *options, "--batch", "4", "--grad-accum", "2", steps=2)
    both = train_on_two(folder, tmp_path / "both", *options, "--batch", "2", "--grad-accum", "2", steps=2)
    same(newest(one)["model"], newest(twice)["model"], 1e-5)
    same(newest(one)["model"], newest(both)["model"], 1e-5)


def gloo_threads() -> int:
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def work_and_count_threads() -> None:
    def work():
        processes = Processes("cpu")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        assert processes.sum(torch.ones(())) == 2 and gloo_threads() > 0
        processes.close()
    work()
    assert gloo_threads() == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(),
                    reason="threads that are not Python's are counted in Linux's /proc")
def test_no_thread_of_a_finished_run_is_left_behind(tmp_path):
    """A thread of gloo that releases a tensor while the interpreter ends would abort a run that has done all its
    work."""
    together(2, tmp_path, work_and_count_threads)


def batchnorm_of_a_part() -> None:
    """Rank 0 has rows 0 and 1, rank 1 the others -> found0.pt, found1.pt."""
    processes, given = Processes("cpu"), torch.load("given.pt")
    part = slice(0, 2) if processes.rank == 0 else slice(2, 6)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    norm[0].load_state_dict(given["state"])
    SynchronisedBatchNorm.convert(norm)
    x = given["x"][part].requires_grad_()
    y = norm(x)
    (y * given["weight"][part]).sum().backward()
    found = dict(y=y.detach(), x=x.grad, weight=norm[0].weight.grad, bias=norm[0].bias.grad, state=norm[0].state_dict())
    torch.save(found, f"found{processes.rank}.pt")
    processes.close()


def test_synchronised_batchnorm_is_batchnorm_of_all(tmp_path):
    """Outputs, gradients and running statistics of two processes with unequal halves of a batch, against torch's own on
    the whole batch. Means are far from 0, since the variance must not be a difference of squares."""
    torch.manual_seed(1)
    x = torch.randn(6, 4, 3, 5) * 0.1 + torch.tensor([0.0, 10.0, -3.0, 100.0]).view(4, 1, 1)
    weight = torch.randn(6, 4, 3, 5)
    reference = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        reference.weight.copy_(torch.randn(4)), reference.bias.copy_(torch.randn(4))
    torch.save(dict(x=x, weight=weight, state=reference.state_dict()), tmp_path / "given.pt")
    together(2, tmp_path, batchnorm_of_a_part)
    x.requires_grad_()
    y = reference(x)
    (y * weight).sum().backward()
    a, b = (torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1))
    for found, expected in ((torch.cat([a["y"], b["y"]]), y.detach()), (torch.cat([a["x"], b["x"]]), x.grad),
                            (a["weight"] + b["weight"], reference.weight.grad),
                            (a["bias"] + b["bias"], reference.bias.grad)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)        # float32 near 100 has steps of 1e-5
    same(dict(a["state"]), dict(reference.state_dict()), 1e-5)
    same(dict(b["state"]), dict(a["state"]))


def test_synchronised_batchnorm_of_one_process_is_batchnorm():
    """The same parameters and outputs in train and eval mode; convert() changes nothing else."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x), model.eval()(x)
    names = [name for name, _ in model.named_parameters()]
    model[1].reset_running_stats()
    SynchronisedBatchNorm.convert(model.train())
    assert isinstance(model[1], SynchronisedBatchNorm)
    assert [name for name, _ in model.named_parameters()] == names
    same(expected, (model(x), model.eval()(x)))


@pytest.mark.parametrize("options", [[], ["--codebook", "ema", "--revive-every", "4"],
                                     [*GAN, "--grad-accum", "2", "--random-flip"],
                                     ["--workers", "1", "--norm-steps", "4"],
                                     ["--dtype", "bf16"], ["--dtype", "fp16", *GAN],
                                     ["--init", str(TINY), "--freeze-encoder"]],
                         ids=["plain", "ema codebook", "gan", "a worker", "bf16", "fp16", "frozen"])
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(folder, tmp_path, options):
    """Stopped after steps 3 and 5 of 6, in the middle of an epoch: everything that learns or counts continues
    exactly."""
    options = [*options, "--schedule", "constant"]           # the trapezoid's end depends on --steps
    unbroken = newest(train(folder, tmp_path / "unbroken", *options, steps=6))
    out = tmp_path / "broken"
    for steps in (3, 5, 6):
        train(folder, out, *options, "--resume", "auto", steps=steps)
    assert unbroken.keys() == newest(out).keys() >= set(LEARNED)
    same({name: value for name, value in unbroken.items() if name != "settings"},
         {name: value for name, value in newest(out).items() if name != "settings"})


def test_a_run_continues_with_another_number_of_processes(folder, tmp_path):
    unbroken = train(folder, tmp_path / "unbroken", *TRAINED, "--batch", "4", "--schedule", "constant", steps=4)
    out = train(folder, tmp_path / "run", *TRAINED, "--batch", "4", "--schedule", "constant", steps=2)
    train_on_two(folder, out, *TRAINED, "--batch", "2", "--schedule", "constant", "--resume", "auto", steps=4)
    same(newest(unbroken)["model"], newest(out)["model"], 1e-5)


def test_a_discriminator_may_join_on_resume(folder, tmp_path, capsys):
    """Users decide on one when the reconstruction no longer improves. But a codebook cannot change its kind."""
    out = train(folder, tmp_path / "run", steps=2)
    train(folder, out, "--resume", "auto", *GAN, steps=4)
    assert "resuming with --gan-start 2, the checkpoint has None" in capsys.readouterr().err
    assert lines(out)[-1]["discriminator"] > 0
    with pytest.raises(UserError, match="was made with --codebook gradient"):
        train(folder, out, "--resume", "auto", "--codebook", "ema", steps=6)


def test_the_discriminator_does_not_learn_from_the_generators_loss(folder, tmp_path):
    """Its first step follows only its hinge loss. The gradients of the generator's loss would have the opposite
    sign."""
    options = ["--gan-start", "0", "--clip", "1e9"]
    _, model, images, quantise = first_line(folder, tmp_path / "run", *options)
    torch.manual_seed(0)
    StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=32, scale_factor=1.0)
    discriminator = PatchDiscriminator()
    fake = model(images, quantise)["images"].detach()
    discriminator_loss(discriminator(images), discriminator(fake)).backward()
    found = newest(tmp_path / "run")["d_optimizer"]["state"]
    for i, p in enumerate(discriminator.parameters()):
        torch.testing.assert_close(found[i]["exp_avg"], 0.5 * p.grad, rtol=1e-3, atol=1e-6)      # (1 - beta1) g


def test_the_discriminator_learns_once_per_step_from_the_start_on(folder, tmp_path):
    """Its optimizer steps once for all micro-steps. Before --gan-start it neither learns nor adds to the loss."""
    state = newest(out := train(folder, tmp_path / "run", *GAN, "--grad-accum", "3", steps=5))
    assert {int(entry["step"]) for entry in state["d_optimizer"]["state"].values()} == {3}
    assert ["generator" in line for line in lines(out)] == [False, False, True, True, True]
    torch.manual_seed(0)
    StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=32, scale_factor=1.0)      # comes first in the stream
    same(dict(PatchDiscriminator().state_dict()),
         dict(newest(train(folder, tmp_path / "early", *GAN, steps=2))["discriminator"]))


def test_a_signal_finishes_the_step_and_saves(folder, tmp_path, monkeypatch, capsys):
    unbroken = train(folder, tmp_path / "unbroken", steps=4)
    update = optim.EMA.update

    def update_and_warn(self, *skip):
        update(self, *skip)
        if self.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(optim.EMA, "update", update_and_warn)
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            train(folder, tmp_path / "run", steps=4)
    assert end.value.code == 143
    assert newest(out)["step"] == 2 and "stopped after step 2" in capsys.readouterr().err
    assert not (out / "vqgan").exists()
    train(folder, out, "--resume", "auto", steps=4)
    same(newest(unbroken)["model"], newest(out)["model"])


# --- NaN and infinity ----------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [[], ["--codebook", "ema", *GAN], ["--dtype", "fp16"]],
                         ids=["plain", "ema codebook and gan", "fp16"])
def test_a_nan_step_leaves_no_trace(folder, tmp_path, monkeypatch, options):
    """One NaN would spoil all weights, and BatchNorm's running statistics, which already change in the forward pass."""
    calls, encode = [], StageA.encode_raw

    def sometimes(self, images):
        calls.append(1)
        return encode(self, images * (float("nan") if len(calls) == 3 else 1.0))
    monkeypatch.setattr(StageA, "encode_raw", sometimes)
    out = train(folder, tmp_path / "run", *options, steps=5)
    bad, = (line for line in lines(out) if line.get("bad_step"))
    assert bad["step"] == 3 and len(bad["positions"]) == 4
    state = newest(out)
    assert (state["bad_in_all"], state["bad"], state["updates"]) == (1, 0, 4)
    for name in ("model", "averaged", *(["codebook", "discriminator"] if GAN[0] in options else [])):
        assert all(tensor.isfinite().all() for tensor in state[name].values()), name
    assert state["model"]["norm_latent.num_batches_tracked"] == 4


def test_too_many_nan_steps_in_a_row_stop_the_run_with_its_last_good_state(folder, tmp_path, monkeypatch):
    decode = StageA.decode_raw
    monkeypatch.setattr(StageA, "decode_raw", lambda self, z: decode(self, z) * float("nan"))
    message = "3 steps in a row came to NaN or infinity, up to step 3; the last good state is in .*lower --lr"
    with pytest.raises(UserError, match=message):
        train(folder, tmp_path / "run", "--max-bad-steps", "3", steps=9)
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "run")["model"].values())


# --- data, sizes and errors ----------------------------------------------------------------------------

def test_random_crops_differ_from_visit_to_visit(tmp_path):
    """A function of (seed, position): at another position of the stream, the same image is cropped elsewhere."""
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[..., 0] = np.arange(256)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    args = train_a.parse_args([*SMALL, "--data", str(tmp_path), "--out", "unused", "--crop", "random"])
    samples = samples_of(tmp_path, args)
    means = [samples[position, 0, 0]["pixels"].float().mean().item() for position in range(8)]
    assert len(set(means)) > 5 and means[3] == samples[3, 0, 0]["pixels"].float().mean().item()


def test_the_official_size_is_a_word_away(tmp_path):
    args = train_a.parse_args(["--out", "unused", "--config", "official"])
    with torch.device("meta"):
        assert sum(p.numel() for p in train_a.build_model(args).parameters()) == 18_406_894
    (tmp_path / "small.json").write_text(json.dumps(dict(embed_dim=8, bottleneck_blocks=2, num_vq_embeddings=16)))
    args = train_a.parse_args(["--out", "unused", "--config", str(tmp_path / "small.json")])
    assert train_a.build_model(args).config | dict(scale_factor=0) == dict(levels=2, bottleneck_blocks=2, c_hidden=8,
                                                                           c_latent=4, codebook_size=16, scale_factor=0)


def test_a_dry_run_prints_what_would_be_trained_and_stops(folder, tmp_path, capsys):
    train(folder, tmp_path / "run", "--dry-run")
    output = capsys.readouterr().out
    assert "parameters learn" in output and "GiB" in output and "32x32 px 12" in output
    assert "checkpointing" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_is_not_overwritten_and_foreign_checkpoints_are_refused(folder, tmp_path):
    out = train(folder, tmp_path / "run", steps=1)
    with pytest.raises(UserError,
                       match="exists already: add --resume auto to continue from it, or choose another --out"):
        train(folder, out)
    torch.save(dict(script="train_b.py"), tmp_path / "b.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_a.py but of train_b.py"):
        train(folder, tmp_path / "other", "--resume", str(tmp_path / "b.pt"))
    with pytest.raises(UserError, match="does not fit: .*resume with the sizes"):
        train(folder, out, "--resume", "auto", "--width", "16", steps=2)


ERRORS = [
    (["--steps", "0"], "--steps: expected a whole number from 1 to 1000000000, got '0'"),
    (["--quantise", "1.5"], "--quantise: expected a number .* from 0 to 1, got '1.5'"),
    (["--codebook-decay", "1"], "--codebook-decay: expected a number .* from 0 to below 1, got '1'"),
    (["--resolution", "30"], "--resolution: expected a multiple of 4 from 4 to 4096, got '30'"),
    (["--freeze-encoder"], "--freeze-encoder needs a trained encoder: add --init FOLDER"),
    (["--init", "x", "--config", "official"], "--init brings its own sizes: remove --config"),
    (["--init", "nowhere"], "nowhere"),
    (["--config", "nowhere.json"], "nowhere.json"),
    (["--width", "1"], "--width: expected a whole number from 2 to 8192, got '1'"),
    (["--l1", "0", "--l2", "0"],
     "--l1 and --l2 are both 0, so no loss compares images: set one of them, or --perceptual"),
    (["--data", "nowhere"], "nowhere"),
    (["--perceptual", "nowhere.pth"],
     "--perceptual nowhere.pth: .*expected vgg16, or a file of torchvision's VGG16 weights"),
    (["--perceptual", "x", "--resolution", "8"],
     "--resolution is 8, but --perceptual halves images four times, so it needs at least 16"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_user_errors_are_one_line(folder, tmp_path, options, message):
    with pytest.raises((UserError, ValueError, OSError), match=message) as error:
        train(folder, tmp_path / "run", *options)
    assert "\n" not in str(error.value)


def test_a_log_line_tells_of_the_codes_since_the_line_before():
    torch.manual_seed(0)
    model = SimpleNamespace(codebook=Codebook(8, 4))
    updates = CodebookUpdates(model, None, SimpleNamespace(codebook="loss", freeze_encoder=False, revive_every=100),
                              Processes("cpu"))
    for step, codes in enumerate(([0, 1, 2, 3], [5, 5, 5, 5])):
        updates.add(torch.zeros(1, 2, 2, 4), torch.tensor(codes).view(1, 2, 2))
        updates.update(step, skip=False)
        assert updates.used() == dict(codes_used=len({*codes}), perplexity=pytest.approx(len({*codes})))


def test_the_validation_is_a_mean_over_its_images():
    values = mean_over(4, lambda i: torch.tensor([float(i), 1.0]), SimpleNamespace(fsdp=False), Processes("cpu"), (2,))
    assert values.tolist() == [1.5, 1]
