"""--like: the settings in a PNG file as options, over which the command line stands; "" undoes any of them."""
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from extras import cli, like
from extras.metadata import save_png
from helpers import PUBLISHED
from loading.hub import digest

TINY = Path(sample.__file__).parent / "models" / "tiny"
FULL = dict(                                     # settings of a PNG in which every option is set, as far as possible
    prompt="cat", negative_prompt="dog", seed=7, num_images=2, width=192, height=128, init="photo.png", strength=0.7,
    mask="mask.png", outpaint="1,2,3,4", from_latent="a.safetensors", tensors="t.safetensors", reconstruct="photo.png",
    interpolate_to="dog", to_seed=9, frames=5, grid="1,2", to_latent="b.safetensors", weights="tiny-v1", prior="p",
    decoder="p", vqgan="p", image_encoder="p", prior_text_encoder="p", text_encoder="p", lora="l.safetensors:0.5",
    lora_partial=True, revision="main", dtype="bf16", allow_tf32=True, int8=True, tile=20, temperature_b="0.5",
    **{f"{name}_{stage}": value for stage in "cb" for name, value in dict(
        steps=5, sampler="ddim", guidance="7,1", interval="0.1,0.9", rescale=0.5, eta=0.3, t_start=0.9,
        t_end=0.1).items()})
# What else goes, because it could not stand alone.
ALONG = dict(init={"strength", "mask", "outpaint"}, from_latent={"to_latent"}, sampler_c={"eta_c"},
             sampler_b={"eta_b"})


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def photo(path: str = "photo.png", size: tuple = (128, 128), colour: tuple = (230, 60, 30)) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def png(path: str = "a.png", **settings) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_png(Image.new("RGB", (8, 8)), path, settings, overwrite=True)
    return path


def options(*argv: str) -> dict:
    args, = cli.parse_args(sample.parser(), list(argv))
    return {name: value for name, value in vars(args).items() if name not in ("like", "given", "like_hashes", "line")}


def tiny(*argv: str) -> None:
    sample.main(["--device", "cpu", "--steps-c", "3", "--steps-b", "2", *argv])


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        sample.main([*argv])
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    return line.removeprefix("error: ")


# --- "" undoes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*cli.PER_IMAGE, *cli.PER_RUN])
def test_any_option_of_a_png_can_be_undone(name, monkeypatch):
    """As if it had never been set, with all that depends on it. A seed is drawn again."""
    for file in ("photo.png", "mask.png", "a.safetensors", "b.safetensors", "t.safetensors", "l.safetensors", "p"):
        Path(file).touch()
    monkeypatch.setattr(cli, "check", lambda args: None)                     # all options at once make no sense
    monkeypatch.setattr(like, "is_v1", lambda args: None)
    monkeypatch.setattr(cli, "random_seed", lambda: 1234)
    monkeypatch.setattr(cli, "needs_seed", lambda args: True)
    monkeypatch.setattr(like, "own_size", lambda *args: (1, 1))              # so 192 x 128 px was asked for
    assert FULL.keys() == {*cli.PER_IMAGE, *cli.PER_RUN}
    without = {other: value for other, value in FULL.items() if other not in {name} | ALONG.get(name, set())}
    for undo in ([cli.as_option(name), ""], [f"{cli.as_option(name)}="]):
        found = options("--like", png(**FULL), *undo)
        assert found == options("--like", png("b.png", **without))
    typed = options("--like", png(**FULL), cli.as_option(name), "", "--batch", "3")
    assert typed | dict(batch=1) == found


@pytest.mark.parametrize("name", sorted({action.dest for action in sample.parser()._actions} - {"help", "prompt"}))
def test_any_option_can_be_undone_on_the_command_line(name):
    """Scripts pass "$SEED" whether it is set or not."""
    found, expected = (options("--prompt", "cat", *more) for more in ([cli.as_option(name), ""], []))
    assert found.pop("seed") is not None and expected.pop("seed") is not None and found == expected


def test_a_later_option_counts_and_abbreviations_can_be_undone():
    assert options("--prompt", "cat", "--seed", "", "--seed", "5")["seed"] == 5
    assert options("--prompt", "cat", "--seed", "5", "--strength", "0.5", "--streng", "", "--init", "a.png",
                   "--ini=")["init"] is None


def test_a_line_of_a_prompt_file_undoes_what_is_above_it():
    photo()
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "init": "", "seed": ""}')
    a, b = cli.parse_args(sample.parser(), ["--init", "photo.png", "--strength", "0.5", "--seed", "5", "--prompt-file",
                                            "p.jsonl"])
    assert (a.init, a.strength, a.seed) == ("photo.png", 0.5, 5) and (b.init, b.strength, b.seed) == (None, None, 6)


def test_what_was_typed_is_not_undone_silently(capsys):
    photo()
    message = error_of(capsys, "--like", png(prompt="a", init="photo.png"), "--init", "", "--strength", "0.5")
    assert message == "--strength requires --init"


def test_a_size_that_came_from_the_image_goes_with_it():
    """But not one that was asked for."""
    photo(size=(200, 100)), photo("tall.png", (100, 200))
    settings = dict(prompt="a", init="photo.png", weights="tiny", width=256, height=128)
    for argv in (["--init", ""], ["--init", "tall.png"], ["--outpaint", "9,9,9,9"]):
        found = options("--like", png(**settings), *argv)
        assert found["width"] is None and found["height"] is None
    assert options("--like", png(**settings))["width"] == 256
    found = options("--like", png(**settings | dict(width=300)), "--init", "")
    assert (found["width"], found["height"]) == (300, 128)


# --- other weights -----------------------------------------------------------------------------------

KINDS = dict(
    tiny=dict(width=128, height=128, steps_c=29, sampler_c="ddpm", guidance_c=2.0, steps_b=12, sampler_b="ddpm",
              guidance_b="4,1", device="cpu", dtype="fp32"),
    v2=dict(width=1024, height=1024, steps_c=29, sampler_c="ddpm", guidance_c=4.0, steps_b=12, sampler_b="ddpm",
            guidance_b=1.0, device="cuda", dtype="bf16"),
    v1=dict(width=512, height=512, steps_c=60, sampler_c="ddpm", guidance_c=6.0, steps_b=8, sampler_b="multinomial",
            guidance_b=2.0, temperature_b="1,0.6", device="cuda", dtype="bf16"))
KINDS["tiny-v1"] = KINDS["tiny"] | {name: KINDS["v1"][name] for name in KINDS["v1"] if name.endswith("_b")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [["--weights", "v2-base"], ["--weights", ""], ["--decoder", "d"]])
def test_with_other_weights_only_wishes_are_taken_over(kind, other):
    """Their own defaults: 128 px on v2, guidance 4 to 1 in Stage B, the sampler ddpm on v1 were asked for by nobody."""
    defaults = {name: value for name, value in KINDS[kind].items() if name != "device"}
    found = options("--like", png(prompt="a", seed=3, weights=kind, **KINDS[kind]), *other)
    assert found == options("--prompt", "a", "--seed", "3", *(["--weights", kind] if "--decoder" in other else []),
                            *other)
    for name in defaults.keys() - {"height", "width"}:
        wish = {"sampler_b": "ddim" if "v1" not in kind else "quant", "sampler_c": "dpm++", "dtype": "fp16",
                "temperature_b": "0.5"}.get(name, 5)
        lost = "v1" in kind and "--weights" in other and name in ("sampler_b", "temperature_b")     # only v1 has them
        with pytest.warns(match=f"cannot use {cli.as_option(name)} of a.png") if lost else warnings.catch_warnings():
            found = options("--like", png(prompt="a", weights=kind, **KINDS[kind] | {name: wish}), *other)
        assert cli.as_text(found[name]) == ("None" if lost else str(wish))
    found = options("--like", png(prompt="a", weights=kind, **KINDS[kind] | dict(width=192)), *other)
    assert (found["width"], found["height"]) == (192, KINDS[kind]["height"])


@pytest.mark.parametrize("weights", ["tiny", "tiny-v1", str(TINY)])
def test_the_defaults_are_those_of_the_weights(weights):
    """What sample.py stores in a PNG is taken for a default when it was one."""
    sample.main(["--prompt", "a cat", "--weights", weights, "--seed", "1", "--out", "a.png"])
    found = options("--like", "a.png", "--weights", "v2")
    assert found == options("--prompt", "a cat", "--seed", "1", "--weights", "v2")


def test_an_image_of_v2_can_be_made_with_v1():
    png(prompt="a cat", weights="tiny", seed=3, **KINDS["tiny"])
    tiny("--like", "a.png", "--weights", "tiny-v1", "--out", "b.png")
    tiny("--prompt", "a cat", "--weights", "tiny-v1", "--seed", "3", "--out", "c.png")
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


@pytest.mark.parametrize("settings, weights, gone", [
    (dict(weights="v1", sampler_b="argmax", temperature_b=0.5), "tiny", "--temperature-b, --sampler-b"),
    (dict(weights="tiny", rescale_b=0.5, sampler_b="ddim", eta_b=0.3), "tiny-v1", "--rescale-b, --eta-b, --sampler-b"),
    (dict(weights="tiny-v1", temperature_b=0.5), str(TINY), "--temperature-b"),
    (dict(weights="tiny", init="photo.png", mask="mask.png", rescale_c=0.3), "tiny-v1", "--mask")])
def test_what_other_weights_cannot_have_is_dropped_with_a_warning(settings, weights, gone):
    """Nobody typed it, so nobody can remove it. What was typed stays an error."""
    photo(), photo("mask.png", colour=(255, 255, 255))
    png(**settings | dict(prompt="cat", seed=7))
    with pytest.warns(UserWarning, match=f"^weights of v[12] cannot use {gone} of a.png: left out"):
        args, = cli.parse_args(sample.parser(), ["--like", "a.png", "--weights", weights])
    fresh, = cli.parse_args(sample.parser(), ["--prompt", "cat"])
    for option in gone.split(", "):
        name = option[2:].replace("-", "_")
        assert getattr(args, name) == getattr(fresh, name)
    assert args.rescale_c == settings.get("rescale_c", 0) and args.seed == 7


def test_what_was_typed_for_other_weights_stays_an_error(capsys):
    png(prompt="cat", seed=7, weights="v1", temperature_b=0.5)
    assert error_of(capsys, "--like", "a.png", "--weights", "tiny", "--temperature-b", "0.5").startswith(
        "--temperature-b is only for v1")


# --- paths -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("out", ["a.png", "out/deep/a.png"])
def test_files_are_found_from_another_folder(out, monkeypatch, tmp_path, capsys):
    """As seen from the PNG or a folder above it, also after all has moved, before those in the working folder."""
    photo("project/pics/photo.png"), photo("project/mask.png", colour=(255, 255, 255))
    shutil.copytree(TINY, "project/weights")
    monkeypatch.chdir("project")
    tiny("--init", str(tmp_path / "project/pics/photo.png"), "--mask", "mask.png", "--weights", "weights", "--prompt",
         "cat", "--seed", "7", "--out", out)
    assert not any(str(tmp_path) in text for text in Image.open(out).text.values())
    monkeypatch.chdir(tmp_path)
    Path("project").rename("moved"), Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    photo("pics/photo.png", colour=(0, 0, 0)), photo("mask.png", colour=(0, 0, 0))           # others of the same names
    tiny("--like", f"../moved/{out}", "--out", "b.png")
    assert "warning" not in capsys.readouterr().err
    with Image.open("b.png") as found, Image.open(f"../moved/{out}") as expected:
        assert found.tobytes() == expected.tobytes()


def test_the_hash_chooses_between_files_of_one_name():
    photo("x/photo.png", colour=(0, 0, 0)), photo("photo.png")
    for right in ("x/photo.png", "photo.png"):
        png("x/a.png", prompt="a", init="photo.png", hashes=dict(init=digest(right)))
        assert options("--like", "x/a.png")["init"] == right


def test_old_paths_are_found_in_the_working_folder(tmp_path):
    """Where they were when nothing was relative to the PNG; absolute ones as well."""
    photo("pics/photo.png")
    assert options("--like", png("x/a.png", prompt="a", init="pics/photo.png"))["init"] == "pics/photo.png"
    assert options("--like", png("x/a.png", prompt="a", init=str(tmp_path / "pics/photo.png")))["init"] == \
        "pics/photo.png"


def test_a_file_that_is_gone_or_changed_is_named(capsys):
    png(prompt="a", init="photo.png", lora="x/l.safetensors:0.5", strength=0.5)
    assert error_of(capsys, "--like", "a.png", "--lora", "") == (
        "a.png was made from photo.png, which is gone: looked for it from its folder and from the working folder; "
        'name it with --init, or remove it with --init ""')
    assert "a.png was made from x/l.safetensors, which is gone" in error_of(capsys, "--like", "a.png", "--init", "")
    assert options("--like", "a.png", "--init", "", "--lora", "")["strength"] is None
    png("b.png", prompt="a", init=photo("pics/photo.png"), seed=1, hashes=dict(init="0" * 64))
    tiny("--like", "b.png", "--out", "c.png")
    assert ("warning: init changed since b.png was made: this is another image (pics/photo.png)"
            in capsys.readouterr().err)


# --- saved latents -----------------------------------------------------------------------------------

def test_a_saved_latent_says_of_which_weights_it_is(capsys):
    """Weights of the same kind differ in details, which may be intended; others would see something else in it. Files
    without that information are used as they are."""
    def small(*argv: str) -> None:               # of v2's kind, as its name and size say
        sample.main(["--weights", str(PUBLISHED), "--device", "cpu", "--width", "128", "--height", "128", "--steps-b",
                     "2", "--steps-c", "2", *argv])
    tiny("--prompt", "a cat", "--seed", "7", "--save-latent", "--out", "a.png")
    tiny("--from-latent", "a.safetensors", "--prompt", "a cat", "--out", "b.png")
    assert "warning" not in capsys.readouterr().err
    tiny("--from-latent", "a.safetensors", "--prompt", "a cat", "--weights", "tiny-v1", "--out", "c.png")
    assert ("warning: a.safetensors is a latent of the weights tiny, from which tiny-v1 differs (decoder): this is "
            "another image") in capsys.readouterr().err
    for more in (["--from-latent", "a.safetensors"], ["--from-latent", "a.safetensors", "--to-latent",
                                                      "a.safetensors"]):
        with pytest.raises(SystemExit) as end:
            small("--prompt", "a cat", *more, "--out", "d.png")
        assert end.value.code == 2 and not Path("d.png").exists()
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: a.safetensors is a latent of the weights tiny (kind tiny), in which {PUBLISHED.name} (kind v2) "
            "would see something else: choose weights or a latent of the other's kind")
    save_file(load_file("a.safetensors"), "old.safetensors")
    small("--prompt", "a cat", "--from-latent", "old.safetensors", "--out", "d.png")
    assert Path("d.png").exists()
