"""The three training scripts, from random weights to a folder that paints, at sizes that take seconds."""
import json
import runpy
from pathlib import Path

import pytest
import torch

import sample
import train_a
import train_b
import train_c
import train_text
import training
from training import learning_rate, log_losses, save_grid, to_tensor

SMALL = ["--batch", "2", "--log-every", "1", "--save-every", "2", "--sample-every", "100", "--device", "cpu"]
TEXT = ["--batch", "4", "--width", "32", "--depth", "1", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The README's sequence A, B, text, C with 2 steps each, every script reading what the one before wrote."""
    folder = tmp_path_factory.mktemp("runs")
    train_a.main(train_a.parse_args([*SMALL, "--out", f"{folder}", "--steps", "2", "--width", "16", "--workers", "0", "--val-count", "2"]))
    train_b.main(train_b.parse_args([*SMALL, "--out", f"{folder}", "--steps", "2", "--vqgan", f"{folder}/vqgan", "--encoder-warmup", "2",
                                     "--blind", "1", "--c-text", "32"]))
    train_text.main(train_text.parse_args([*TEXT, "--image-encoder", f"{folder}/image_encoder", "--out", f"{folder}/text", "--steps", "2"]))
    for part in ("text_encoder", "tokenizer"):     # one folder for all, so that it ends as a pipeline's
        (folder / "text" / part).rename(folder / part)
    (folder / "small.json").write_text(json.dumps(dict(c=32, depth=1, nhead=2, c_cond=32, c_r=32, dropout=0.0)))
    train_c.main(train_c.parse_args(["--weights", "tiny", "--init", "random", "--config", f"{folder}/small.json", "--image-encoder", f"{folder}/image_encoder",
                                     "--prior-text-encoder", f"{folder}/text_encoder", "--data", "scenes:captioned:64", "--out", f"{folder}/c",
                                     "--batch", "2", "--steps", "2", "--workers", "0", "--val-every", "0", "--device", "cpu"]))
    for part in ("prior", "scheduler"):
        (folder / "c" / part).rename(folder / part)
    return folder


def test_the_scripts_write_a_folder_that_paints(runs, tmp_path):
    """A, B and C agree on every file: what three scripts wrote is one pipeline, and sample.py opens it."""
    assert {path.name for path in runs.iterdir()} >= {"vqgan", "decoder", "image_encoder", "prior", "text_encoder", "tokenizer"}
    sample.main(["--weights", str(runs), "--prompt", "a cat on a red background", "--steps-c", "2", "--steps-b", "1",
                 "--seed", "0", "--out", str(tmp_path / "cat.png"), "--device", "cpu"])
    assert (tmp_path / "cat.png").stat().st_size > 1000


def test_stage_b_can_be_tuned_with_the_image_encoder_frozen(runs, tmp_path):
    """Stage C was trained on this encoder's latents: tuning Stage B afterwards must not move it by a bit."""
    train_b.main(train_b.parse_args([*SMALL, "--vqgan", f"{runs}/vqgan", "--init", str(runs), "--freeze-encoder",
                                     "--text-encoder", str(runs), "--out", str(tmp_path), "--steps", "3", "--cache", "4", "--even-contrast"]))
    def read(folder):
        return (folder / "image_encoder" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert read(tmp_path) == read(runs)


def test_pictures_of_little_contrast_count_more():
    """A fish on its own orange is as wrong as a panda on white, though its squared error is a fraction of that."""
    scenes = torch.randn(3, 4, 32, 32) * torch.tensor([0.03, 0.3, 1.5]).sqrt().view(3, 1, 1, 1) + 2
    weight = train_b.contrast_weight(scenes)
    assert weight.mean() == pytest.approx(1) and torch.equal(weight, train_b.contrast_weight(scenes + 5))
    assert weight[0] / weight[1] == pytest.approx(0.45 / 0.18, rel=0.05) and weight[1] / weight[2] == pytest.approx(1.65 / 0.45, rel=0.05)


def test_the_text_encoder_learns_from_pictures(runs):
    """What stands for CLIP's pre-training: it starts at the latents' variance, about 1, and its loss is kept."""
    lines = [json.loads(line) for line in (runs / "text" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and 0.5 < lines[-1]["loss"] < 4


def test_a_resumed_text_encoder_is_the_unbroken_one(runs, tmp_path, capsys):
    """Stopped after 2 of 4 steps: the same weights to the bit; a run in --out is not overwritten."""
    def train(out, steps, *options):
        train_text.main(train_text.parse_args([*TEXT, "--image-encoder", f"{runs}/image_encoder", "--out", str(out), "--steps", str(steps),
                                               "--schedule", "constant", *options]))
        return (out / "text_encoder" / "model.safetensors").read_bytes()
    unbroken, half = train(tmp_path / "unbroken", 4), train(tmp_path / "broken", 2)
    with pytest.raises(training.Mistake, match="exists already: add --resume auto"):
        train(tmp_path / "broken", 4)
    assert train(tmp_path / "broken", 4, "--resume", "auto") == unbroken != half


def test_a_resumed_run_is_the_unbroken_run(runs, tmp_path, monkeypatch):
    """Killed after step 2 of 4 and resumed: the same weights to the last bit, since data, noise and optimizer go on exactly."""
    def train(out, *resume):
        train_b.main(train_b.parse_args([*SMALL, "--out", str(out), "--steps", "4", "--vqgan", f"{runs}/vqgan", "--encoder-warmup", "1", *resume]))
        return torch.load(out / "checkpoint.pt", weights_only=True)["parts"]

    unbroken = train(tmp_path / "unbroken")
    save = training.save_checkpoint

    def save_and_die(args, step, parts):
        save(args, step, parts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", save_and_die)
        train(tmp_path / "broken")
    resumed = train(tmp_path / "broken", "--resume")
    for part in ("model", "ema"):
        for key, value in unbroken[part].items():
            assert torch.equal(value, resumed[part][key]), f"{part}.{key} differs"


@pytest.mark.parametrize("frozen, encoded", [(False, 4), (True, 2)])
def test_a_cache_keeps_only_what_does_not_change(frozen, encoded, runs, tmp_path, monkeypatch):
    """4 steps over 2 cached batches: VQGAN latents once per batch, but those of an encoder that learns at each step."""
    from stage_a import StageA
    from stage_b import TinyImageEncoder
    calls = {StageA.encode: 0, TinyImageEncoder.forward: 0}

    def counted(function):
        def call(self, x, *args, **kwargs):
            calls[function] += len(x) == 2                  # batches of 2; the sample grid has 16 pictures
            return function(self, x, *args, **kwargs)
        return call
    monkeypatch.setattr(StageA, "encode", counted(StageA.encode))
    monkeypatch.setattr(TinyImageEncoder, "forward", counted(TinyImageEncoder.forward))
    train_b.main(train_b.parse_args([*SMALL, "--vqgan", f"{runs}/vqgan", "--init", str(runs), "--out", str(tmp_path), "--steps", "4",
                                     "--cache", "4", *["--freeze-encoder"] * frozen]))
    assert list(calls.values()) == [2, encoded]


def test_both_losses_of_stage_b_teach_the_same_noise(runs, tmp_path, monkeypatch):
    """A head that is right has a loss of 0, whether measured in eps or in the head's two outputs."""
    import diffusion
    from stage_b import StageB
    seen, add_noise = {}, diffusion.add_noise

    def spy(x_0, eps, t):
        seen.setdefault("x_0", x_0)                          # the first call of a step noises the picture's latents
        return add_noise(x_0, eps, t)

    def perfect(self, x_t, t, semantic, text):
        ab = diffusion.per_row(diffusion.alphas_cumprod(t), x_t)
        zero = next(self.parameters()).sum() * 0             # the loss needs something to differentiate
        return ab.sqrt() * seen["x_0"] + zero, (1 - ab).sqrt().expand_as(x_t)
    monkeypatch.setattr(diffusion, "add_noise", spy)
    monkeypatch.setattr(StageB, "signal_and_scale", perfect)
    monkeypatch.setattr(StageB, "forward", lambda self, x_t, *rest: x_t)                # the sample grid's, not the loss's
    monkeypatch.setattr(training, "log_losses", lambda args, step, **values: seen.update(values))
    for loss in ("eps", "head"):
        seen.pop("x_0", None)
        train_b.main(train_b.parse_args([*SMALL, "--vqgan", f"{runs}/vqgan", "--init", str(runs), "--freeze-encoder", "--blind", "0",
                                         "--out", str(tmp_path / loss), "--steps", "1", "--loss", loss]))
        assert seen.pop("loss") < 1e-4


def test_a_run_is_never_overwritten_silently(runs, tmp_path, capsys):
    """A forgotten --out must not cost a night of training: one line says what to do, exit code 2."""
    (tmp_path / "checkpoint.pt").write_bytes(b"a night of training")
    with pytest.raises(SystemExit) as stop:
        train_b.main(train_b.parse_args([*SMALL, "--out", str(tmp_path), "--steps", "1", "--vqgan", f"{runs}/vqgan"]))
    assert stop.value.code == 2
    assert "exists already: add --resume" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"a night of training"


@pytest.mark.parametrize("script, options", [("train_b.py", ["--vqgan"]), ("train_text.py", ["--image-encoder"]),
                                             ("train_c.py", ["--data=scenes", "--weights"])])
def test_an_unknown_folder_ends_a_script_in_one_line(script, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, *options, str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(Path(__file__).parent.parent / script, run_name="__main__")
    assert stop.value.code == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stop, training.mistakes_in_one_line():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and "--resume goes on" in capsys.readouterr().err


def test_resuming_nothing_says_so(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_b.main(train_b.parse_args([*SMALL, "--out", str(tmp_path), "--steps", "1", "--vqgan", f"{runs}/vqgan", "--resume"]))
    assert stop.value.code == 2
    assert "which is not there: leave --resume away" in capsys.readouterr().err


def test_the_learning_rate_warms_up_stays_and_decays():
    """And until the decay starts it does not depend on the number of steps, so that a run can be lengthened."""
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71 and rates[90] == 0.5 and rates[99] == 0.05
    assert [learning_rate(step, 1000, 1.0, 10) for step in range(80)] == rates[:80]


def test_the_loss_file_of_a_resumed_run_has_no_doubled_lines(tmp_path):
    """A run cut after step 30 whose checkpoint was at 20 writes 30 again: the old line goes."""
    args = train_a.parse_args(["--out", str(tmp_path)])
    for step in (10, 20, 30, 30, 40):
        log_losses(args, step, loss=step / 10)
    assert (tmp_path / "loss.csv").read_text().split() == ["step,loss", "10,1", "20,2", "30,3", "40,4"]


def test_a_grid_shows_the_pictures_row_by_row(tmp_path):
    from PIL import Image
    images = torch.zeros(4, 3, 8, 8)
    images[1, 0] = images[2, 1] = 1.0                # second picture red, third green
    save_grid(tmp_path / "grid.png", images, columns=2)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (16, 16) and grid.getpixel((12, 4)) == (255, 0, 0) and grid.getpixel((4, 12)) == (0, 255, 0)


def test_pictures_become_tensors_without_rounding():
    import numpy as np
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    tensor = to_tensor(pictures)
    assert tensor.shape == (2, 3, 4, 4)
    assert (tensor * 255).round().byte().permute(0, 2, 3, 1).numpy().tolist() == pictures.tolist()
