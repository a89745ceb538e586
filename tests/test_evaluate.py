"""The judge must be right about images whose content is known, and must not be kind."""
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from loading.errors import exit_on_user_error
from tiny import evaluate, judge as judging, sharpness
from tiny.evaluate import degrade, fixed_prompts, real_image, score
from tiny.judge import verdict
from training.scenes import CAPTIONED, COLOURS, RELATIONS, Scene, held_out, render

FACTS = fixed_prompts()


@pytest.fixture(scope="module")
def judge():
    return judging.Judge()


def fact(objects, relation=None, colour="red", size=None):
    return {"kind": "pair_seen" if relation else "single", "objects": objects,
            "relation": relation, "colour": colour, "size": size, "prompt": ""}


CAT_LEFT_OF_KEY = render(Scene(("cat", "key"), (44, 48), ((32, 60), (96, 66)), "red", "left of"))


# ----- the prompts -----------------------------------------------------------------------------------

def test_half_of_the_prompts_are_held_out_pairs():
    """The question of the evaluation: does the model compose what it never saw together?"""
    kinds = [f["kind"] for f in FACTS]
    assert [kinds.count(k) for k in ("pair_held_out", "pair_seen", "single")] == [128, 64, 64]
    for f in FACTS:
        if f["kind"] != "single":
            assert held_out(*f["objects"]) == (f["kind"] == "pair_held_out")
    assert {f["objects"] for f in FACTS if f["kind"] == "single"} == {(name,) for name in CAPTIONED}


def test_prompts_are_fixed_distinct_and_balanced():
    """Figures of two models are comparable only if both drew the same things."""
    assert fixed_prompts() == FACTS and len({f["prompt"] for f in FACTS}) == 256
    assert all(f["objects"][0] in f["prompt"] and f["colour"] in f["prompt"] for f in FACTS)
    for colour in COLOURS:
        assert sum(f["colour"] == colour for f in FACTS) == 32
    for relation in RELATIONS:
        assert 40 <= sum(f["relation"] == relation for f in FACTS) <= 56


def test_the_first_prompts_are_a_fair_sample():
    """So that --prompts 32 is a quick look at all kinds."""
    kinds = [f["kind"] for f in FACTS[:32]]
    assert [kinds.count(k) for k in ("pair_held_out", "pair_seen", "single")] == [16, 8, 8]


def test_prompts_about_one_object_are_fixed_distinct_and_balanced():
    """What a LoRA learned: the object by itself, in all colours and sizes, and beside 40 others."""
    facts = evaluate.prompts_of("unicorn")
    assert facts == evaluate.prompts_of("unicorn") and len({f["prompt"] for f in facts}) == 64
    assert all("unicorn" in f["objects"] and " unicorn " in f["prompt"] for f in facts)
    pairs = [f for f in facts if f["kind"] == "pair"]
    assert len(pairs) == 40 and sum(f["objects"][0] == "unicorn" for f in pairs) == 20
    assert all(sum(f["relation"] == relation for f in pairs) == 10 for relation in RELATIONS)
    assert all(sum(f["colour"] == colour for f in facts) == 8 for colour in COLOURS)


def test_an_object_is_found_whatever_else_the_image_shows(monkeypatch, tmp_path):
    """A LoRA that paints its object into every image has learned it, and gets the other figures wrong."""
    unicorn = render(Scene(("unicorn", "key"), (48, 48), ((32, 64), (96, 64)), "red", "left of"))
    cat = render(Scene(("cat",), (48,), ((64, 64),), "red"))
    monkeypatch.setattr(evaluate, "sample", lambda args, prompts: [unicorn, cat, cat, cat])
    out = tmp_path / "eval.json"
    evaluate.main(evaluate.parse_args(["--object", "unicorn", "--prompts", "4", "--out", str(out)]))
    figures = json.loads(out.read_text())["runs"][0]["figures"]
    assert figures["unicorn found"] == {"right": 0.25, "n": 4} and figures["pair_objects"]["right"] == 0


# ----- the judge is right ----------------------------------------------------------------------------

def test_the_judge_accepts_real_scenes_clean_or_degraded(judge):
    """Its own errors must not count against a model: 512 of 512 clean ones and 512 degraded ones were right."""
    rng = np.random.default_rng(0)
    images = [real_image(f, rng) for f in FACTS[:32]]
    images = images[:20] + [degrade(image, rng) for image in images[20:]]
    figures = score(images, FACTS[:32], judge)
    assert set(figures) == {"background", "single_object", "single_size", "pair_seen",
                            "pair_seen_objects", "pair_held_out", "pair_held_out_objects"}
    assert figures["background"]["n"] == 32 and figures["pair_held_out"]["n"] == 16
    assert all(figure["right"] == 1.0 for figure in figures.values()), figures


def test_size_and_position_are_found_within_a_few_pixels(judge):
    """Relations and size words are judged by them; sizes come in steps of 11 %."""
    found, colour = judge.find(CAT_LEFT_OF_KEY)
    assert colour == "red" and {name for name, *_ in found} == {"cat", "key"}
    truth = {"cat": (44, (32, 60)), "key": (48, (96, 66))}
    for name, size, center, explained in found:
        assert abs(size - truth[name][0]) <= 6 and explained > judging.MIN_EXPLAINED
        assert np.abs(np.subtract(center, truth[name][1])).max() <= 4


@pytest.mark.parametrize("upper, lower, both, colour", [("robot", "dog", "owl", "black"),
                                                         ("fish", "cat", "pineapple", "blue")])
def test_two_objects_are_not_taken_for_one_that_covers_both(judge, upper, lower, both, colour):
    """Blurred, they resemble one large object: this sprite explains most of the image, though not as much as two."""
    scene = Scene((upper, lower), (56, 56), ((60, 36), (68, 92)), colour, "above")
    blurred = np.asarray(Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(3)))
    pixels = np.asarray(Image.fromarray(blurred).resize((64, 64), Image.BOX), np.float32) / 255
    gain, sprite_at, _ = judge._search(pixels, pixels[0, 0])
    assert judge.objects[sprite_at.ravel()[gain.argmax()]] == both
    assert {name for name, *_ in judge.find(blurred)[0]} == {upper, lower}


def test_the_gain_is_the_drop_in_squared_error(judge):
    """The closed form by FFT against placing the sprite and subtracting, at one odd position."""
    s, y, x = 3, 21, 30
    k = judging.SIZES[s]
    halved = Image.fromarray(CAT_LEFT_OF_KEY).resize((64, 64), Image.BOX)
    pixels = np.asarray(halved, np.float32) / 255
    background = pixels[0, 0]
    sprite = judging.half_size_sprite("key", k)
    D = (pixels - background).transpose(2, 0, 1)
    R = np.zeros_like(D)
    R[:, y:y + k, x:x + k] = sprite[:3] - sprite[3:] * background[:, None, None]
    expected = (D ** 2).sum() - ((D - R) ** 2).sum()
    alone = judging.Judge(objects=["key"])          # the search keeps only the best of its objects
    gain, _, explained = alone._search(pixels, background)
    assert gain[s, y, x] == pytest.approx(expected, abs=1e-2)
    assert explained[s, y, x] == pytest.approx(expected / (R ** 2).sum(), abs=1e-3)


# ----- and not kind ----------------------------------------------------------------------------------

@pytest.mark.parametrize("wanted, wrong", [
    (fact(("cat", "key"), "left of"), []),
    (fact(("key", "cat"), "right of"), []),
    (fact(("cat", "key"), "right of"), ["relation"]),
    (fact(("key", "cat"), "left of"), ["relation"]),
    (fact(("cat", "key"), "above"), ["relation"]),
    (fact(("cat", "crown"), "left of"), ["objects", "relation"]),
    (fact(("cat",)), ["objects"]),
    (fact(("cat", "key"), "left of", colour="orange"), ["background"]),
], ids=["true", "true, the other way round", "other side", "swapped", "other axis", "other object",
        "one object too many", "other colour"])
def test_an_image_that_differs_from_its_prompt_is_wrong(judge, wanted, wrong):
    """Each prompt against one image: a cat left of a key on red."""
    seen = verdict(*judge.find(CAT_LEFT_OF_KEY), wanted)
    assert [key for key, value in seen.items() if value is False] == wrong


def test_a_missing_object_is_wrong(judge):
    """A pair prompt answered with one object fails in objects and so in the relation."""
    alone = render(Scene(("cat",), (48,), ((40, 64),), "red"))
    seen = verdict(*judge.find(alone), fact(("cat", "key"), "left of"))
    assert seen["objects"] is False and seen["relation"] is False
    assert verdict(*judge.find(alone), fact(("cat",)))["objects"]


def test_small_is_not_large(judge):
    """The size word counts only if the prompt has one."""
    seen = judge.find(render(Scene(("cat",), (34,), ((60, 64),), "red")))
    assert verdict(*seen, fact(("cat",), size="small"))["size"] is True
    assert verdict(*seen, fact(("cat",), size="large"))["size"] is False
    assert verdict(*seen, fact(("cat",)))["size"] is None


def test_an_empty_image_shows_nothing_and_gray_is_not_a_colour(judge):
    """In an empty image nothing may be found, noise included."""
    empty = np.full((128, 128, 3), COLOURS["blue"], np.uint8)
    noisy = np.clip(empty + np.random.default_rng(0).normal(0, 10, empty.shape), 0, 255)
    assert judge.find(empty) == ([], "blue") and judge.find(noisy.astype(np.uint8)) == ([], "blue")
    assert judge.find(np.full((128, 128, 3), 128, np.uint8)) == ([], None)


# ----- how sharp -------------------------------------------------------------------------------------

def test_the_place_of_an_object_is_found_to_a_quarter_of_a_pixel(judge):
    """The judge's sizes are 11 % apart and its places 2 px; a wrong place would count as blur."""
    found, colour = judge.find(CAT_LEFT_OF_KEY)
    for name, place in (("cat", (44, 32, 60)), ("key", (48, 96, 66))):
        seen = sharpness.compare(CAT_LEFT_OF_KEY, found, name, colour)
        assert np.abs(np.subtract(seen["place"], place)).max() <= 0.25, seen
        assert seen["psnr"] > 45 and seen["distance"] < 1e-3
    assert sharpness.compare(CAT_LEFT_OF_KEY, found, "owl", colour) is None
    half = sharpness.draw("cat", (45.5, 60.5, 64.25), "red", (0, 0, 128, 128))           # between the pixels
    image = (half * 255).round().astype(np.uint8)
    seen = sharpness.compare(image, judge.find(image)[0], "cat", "red")
    assert seen["place"] == (45.5, 60.5, 64.25) and seen["psnr"] > 50


def test_blur_and_dabs_cost_psnr_and_raise_the_distance(judge):
    """The more, the worse; of two images with the same PSNR the blurred one, which lacks edges, is further away."""
    found, colour = judge.find(CAT_LEFT_OF_KEY)
    blurred = [np.asarray(Image.fromarray(CAT_LEFT_OF_KEY).filter(ImageFilter.GaussianBlur(px))) for px in (0.5, 1, 2)]
    seen = [sharpness.compare(image, found, "key", colour) for image in (CAT_LEFT_OF_KEY, *blurred)]
    assert np.diff([s["psnr"] for s in seen]).max() < -1 and np.diff([s["distance"] for s in seen]).min() > 0.002
    brighter = np.clip(CAT_LEFT_OF_KEY + np.sqrt(np.square(blurred[2] * 1.0 - CAT_LEFT_OF_KEY).mean()), 0, 255)
    assert 2 * sharpness.distance(brighter / 255, CAT_LEFT_OF_KEY / 255) < \
        sharpness.distance(blurred[2] / 255, CAT_LEFT_OF_KEY / 255)


def test_the_distance_is_zero_for_equal_images_and_one_for_opposite_ones():
    """Structure by hand: an image and its negative have the same texture and the opposite structure."""
    image = np.random.default_rng(0).random((40, 40, 3))
    assert sharpness.distance(image, image) == pytest.approx(0, abs=1e-6)
    assert sharpness.distance(image, 1 - image) == pytest.approx(1, abs=0.06)
    assert 0.8 < sharpness.distance(image, 0 * image) < 1                                # nothing to be seen


def test_the_least_contrast_and_the_worst_objects_are_counted():
    """Ten facts with one object each: one of them, white on white, is the tenth; the name that fails is the other."""
    facts = [fact((name,), colour="white") for name in ("ghost", *["spider"] * 8, "key")]
    found = [[("ghost", 40, (64, 64), 1.0)], *[[("spider", 40, (64, 64), 1.0)]] * 8, []]
    tenths = sharpness.worst_tenths(found, facts)
    assert sharpness.contrast("ghost", "white") < 0.6 * sharpness.contrast("spider", "white")
    assert tenths["least_contrast"] == {"right": 1.0, "n": 1}
    assert tenths["worst_objects"] == {"right": 0.0, "n": 1, "names": ["key"]}


def test_each_stage_loses_something(tmp_path, monkeypatch):
    """The shipped weights: Stage A's round trip is sharper than the same through the codebook, and than Stage B."""
    out = tmp_path / "eval.json"
    cat = evaluate.real_image(FACTS[0], np.random.default_rng(1))
    monkeypatch.setattr(evaluate, "sample", lambda args, prompts: [cat] * len(prompts))
    options = ["--prompts", "1", "--seeds", "2", "--sharp", "--steps-b", "2", "--out", str(out)]
    evaluate.main(evaluate.parse_args(options))
    run, = json.loads(out.read_text())["runs"]
    a, codes, b, generated = run["sharpness"].values()
    assert generated["objects"] == generated["of"] == len(run["pictures"]) * 2 == 4 and a["of"] == 2
    assert generated["psnr"] > 40 > a["psnr"] > codes["psnr"] > 15 and b["psnr"] < a["psnr"]
    assert generated["distance"] < a["distance"] < codes["distance"]


# ----- the script ------------------------------------------------------------------------------------

def test_the_script_judges_real_scenes_and_writes_figures_and_grid(tmp_path, capsys):
    """--real needs no weights; its report must be complete enough to look into failures."""
    out, grid = tmp_path / "eval.json", tmp_path / "eval.png"
    evaluate.main(evaluate.parse_args(["--real", "--prompts", "4", "--out", str(out),
                                       "--grid", str(grid)]))
    report = json.loads(out.read_text())
    assert "pair_held_out" in capsys.readouterr().out
    assert [run["title"] for run in report["runs"]] == ["real scenes", "real scenes, degraded"]
    assert len(report["runs"][0]["pictures"]) == 4 and report["settings"]["prompts"] == 4
    assert Image.open(grid).size[0] == 8 * 136


def test_sampling_does_not_depend_on_the_batch_size(monkeypatch):
    """Image n gets seed + n; and options not given stay with the model."""
    calls = []

    class Wuerstchen:
        c = b = types.SimpleNamespace(guidance=1.0)

        @classmethod
        def load(cls, weights, dtype, int8, lora):
            return cls()

        def __call__(self, prompts, **options):
            calls.append((len(prompts), options))
            return list(prompts)

    monkeypatch.setitem(sys.modules, "wuerstchen", types.SimpleNamespace(Wuerstchen=Wuerstchen))
    args = evaluate.parse_args(["--batch", "2", "--seed", "7", "--guidance-c", "3"])
    assert evaluate.sample(args, ["a", "b", "c"]) == ["a", "b", "c"]
    assert calls == [(2, {"seed": 7, "guidance_c": 3.0}), (1, {"seed": 9, "guidance_c": 3.0})]


def test_help_needs_no_torch():
    root = Path(evaluate.__file__).parents[1]
    code = "import sys; from tiny.evaluate import parse_args\ntry: parse_args(['--help'])\n" \
           "except SystemExit: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)


@pytest.mark.parametrize("arguments, message", [
    (["--weights", "no-such-weights"],
     "error: there are no weights called 'no-such-weights', and there is no such folder: expected tiny, "),
    (["--temperature-b", "1"],
     "error: --temperature-b is only for v1, because Stage B of v1 generates tokens: remove it"),
    (["--object", "zebra"], "error: --object zebra is unknown, expected one that the judge knows: "),
    (["--sampler-b", "quant"], "error: Stage B: sampler is 'quant', expected one of ddpm, ddim, dpm++."),
])
def test_an_error_in_the_settings_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        evaluate.main(evaluate.parse_args(["--prompts", "1", *arguments]))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith(message), error


def test_wrong_input_is_refused_in_one_line(judge):
    """A float image in 0..1 would look black; a missing image would shift all verdicts."""
    with pytest.raises(ValueError, match=r"float32 of shape \(128, 128, 3\), expected .* uint8"):
        judge.find(np.zeros((128, 128, 3), np.float32))
    with pytest.raises(ValueError, match="Got 1 images for 2 prompts"):
        score([CAT_LEFT_OF_KEY], FACTS[:2], judge)
