"""tiny/train_encoder.py: its labels are true, it learns, a resumed run is the unbroken one, train_b.py reads the
result."""
import json
import os
import signal

import numpy as np
import pytest
import torch

import train_b
from helpers import TINY, lines, newest, same
from loading.errors import UserError, WeightsError
from loading.layouts import locate
from loading.weights import load_image_encoder
from stage_b import TinyImageEncoder
from tiny import train_encoder
from training import models
from training.processes import Processes
from training.scenes import CELLS, COLOURS, EmojiScenes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Sizes that take milliseconds."""
    out = tmp_path_factory.mktemp("config")
    (out / "config.json").write_text(json.dumps(dict(_class_name="TinyImageEncoder", c_semantic=16,
                                                     c_hidden=[4, 8, 8, 8], blocks=[1, 1, 1, 1])))
    return out


def train(out, config, *options, steps: int = 4):
    train_encoder.main(train_encoder.parse_args(["--out", str(out), "--config", str(config), "--batch", "8",
                                                 "--log-every", "1", "--device", "cpu", "--steps", str(steps),
                                                 *options]))
    return out


def weights_file(out) -> bytes:
    return (out / "image_encoder" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_labels_say_where_the_objects_are():
    """Cells row by row, 42.67 px wide; the place within the cell; sizes in units of 64 px; the rest is nothing."""
    scenes = EmojiScenes("varied", seed=3).scenes(0, 40)
    objects, places, colours = train_encoder.labels_of(scenes)
    for scene, found, where, colour in zip(scenes, objects, places, colours):
        assert list(COLOURS)[colour] == scene.colour and (found != len(CELLS)).sum() == len(scene.objects)
        for name, size, (x, y) in zip(scene.objects, scene.sizes, scene.centers):
            k = next(k for k in range(9) if found[k] == CELLS.index(name))
            center = np.array([k % 3, k // 3]) + where[k, :2]                    # in cells
            assert center * 128 / 3 == pytest.approx([x, y], abs=1e-3) and where[k, 2] * 64 == pytest.approx(size)


def test_it_learns(config, tmp_path):
    """In 60 steps the loss falls by a fifth; and the log has the values that docs/TRAINING.md names."""
    log = lines(train(tmp_path / "run", config, "--lr", "1e-2", "--warmup", "5", "--schedule", "constant", steps=60))
    assert np.mean([line["loss"] for line in log[-10:]]) < 0.8 * np.mean([line["loss"] for line in log[:10]])
    assert set(log[0]) == {"step", "loss", "lr", "objects_right", "place_error", "colour_right"}


def test_a_resumed_run_is_the_unbroken_run_to_the_bit(config, tmp_path):
    """Weights, BatchNorm's statistics, head, optimizer, and the noise, which is a function of (seed, step)."""
    options = ["--save-every", "1", "--keep", "9"]
    unbroken = train(tmp_path / "unbroken", config, *options, steps=5)
    out = train(tmp_path / "run", config, *options, steps=5)
    # The schedule depends on --steps, so the run is not ended early but loses its last checkpoints.
    for path in sorted((out / "checkpoints").iterdir())[2:]:
        path.unlink()
    (out / "image_encoder" / "diffusion_pytorch_model.safetensors").unlink()
    train(out, config, *options, "--resume", "auto", steps=5)
    same(newest(unbroken), newest(out))
    assert weights_file(unbroken) == weights_file(out) and [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5]
    other = train(tmp_path / "other", config, "--seed", "1", steps=5)
    assert weights_file(other) != weights_file(out)


def test_a_signal_finishes_the_step_and_saves(config, tmp_path, monkeypatch, capsys):
    unbroken, rate = train(tmp_path / "unbroken", config), train_encoder.learning_rate

    def rate_and_warn(step, args):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, args)
    with monkeypatch.context() as patch:
        patch.setattr(train_encoder, "learning_rate", rate_and_warn)
        out = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            train(tmp_path / "run", config)
    assert end.value.code == 143
    assert newest(out)["step"] == 2 and "stopped after step 2" in capsys.readouterr().err
    assert not (out / "image_encoder").exists()
    assert weights_file(train(out, config, "--resume", "auto")) == weights_file(unbroken)


def test_the_result_is_an_image_encoder_in_the_right_units(config, tmp_path):
    """locate finds it and train_b.py continues with it. Its last BatchNorm has 42 and -1, and running statistics in
    float32."""
    out = train(tmp_path / "run", config)
    path = locate("tiny", dict(image_encoder=out / "image_encoder"), ("image_encoder",))["image_encoder"]
    encoder, learned = load_image_encoder(path), newest(out)["model"]
    assert type(encoder) is TinyImageEncoder and (encoder.norm.weight == 42).all() and (encoder.norm.bias == -1).all()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(encoder.norm, name), learned[f"norm.{name}"])
    assert encoder.norm.num_batches_tracked == 4
    args = train_b.parse_args(["--weights", "tiny", "--init", "random", "--config", str(TINY), "--image-encoder",
                               str(out / "image_encoder"), "--out", "unused"])
    _, taken, _, _ = models.load_models(args, train_b, torch.float32, Processes("cpu"))
    same(dict(taken.state_dict()), dict(encoder.state_dict()))


def test_defaults_are_what_models_tiny_was_trained_with():
    args = train_encoder.parse_args(["--out", "x"])
    assert (args.steps, args.batch, args.lr, args.warmup, args.schedule) == (1200, 64, 1.5e-3, 100, "trapezoid")
    with pytest.raises(UserError, match="unrecognized arguments: --encoder-warmup"):
        train_b.parse_args(["--out", "x", "--encoder-warmup", "5"])


@pytest.mark.parametrize("options, message", [
    (["--steps", "0"], "--steps: expected a whole number from 1 to 1000000000, got '0'"),
    (["--config", "nowhere"], "--config nowhere cannot be used: nowhere cannot be read: there is no such file"),
    (["--config", str(TINY / "decoder")],
     "cannot be used: it describes a WuerstchenDiffNeXt, expected a TinyImageEncoder"),
    (["--resume", "nowhere.pt"], "--resume nowhere.pt: there is no such file")])
def test_user_errors_are_one_line(config, tmp_path, options, message):
    with pytest.raises((UserError, WeightsError), match=message) as error:
        train(tmp_path / "run", config, *options)
    assert "\n" not in str(error.value)


def test_other_checkpoints_are_refused(config, tmp_path):
    out = train(tmp_path / "run", config)
    with pytest.raises(UserError, match="exists already: add --resume auto"):
        train(out, config)
    torch.save(dict(script="train_text.py"), tmp_path / "text.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train_encoder.py but of train_text.py"):
        train(tmp_path / "other", config, "--resume", str(tmp_path / "text.pt"))
