"""Unknown words: a prompt with one warns, in one line, and never where the model may know the word after all."""
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lora
import sample
from extras.editing import generate
from loading.words import FILE, nearest_phrases, read_words, unknown_words
from training import results
from training.scenes import CAPTIONED, UNCAPTIONED, EmojiScenes, vocabulary
from wuerstchen import Wuerstchen

ROOT = Path(sample.__file__).parent
PRIOR = ROOT / "models" / "tiny" / "prior"
KNOWN = read_words(PRIOR)
QUICK = dict(steps_c=1, steps_b=1, guidance_c=1, guidance_b=1)
MESSAGE = "the model does not know "


@pytest.fixture
def model() -> Wuerstchen:
    return Wuerstchen.load("tiny", "cpu")


def warnings_of(function, *args, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        function(*args, **options)
    return [str(warning.message) for warning in record if MESSAGE in str(warning.message)]


# ----- the lists -----------------------------------------------------------------------------------------------------

def test_the_list_of_the_weights_is_what_the_captions_say():
    """Words that no caption has are unknown; words that some have are known: both differences are empty."""
    assert KNOWN == vocabulary(CAPTIONED) and len(KNOWN["objects"]) == 64 and len(KNOWN["colours"]) == 8
    captions = EmojiScenes("captioned").batch(0, 4096)[1]
    words = {word for phrases in KNOWN.values() for phrase in phrases for word in phrase.split()}
    assert {word for caption in captions for word in caption.split()} == words


def test_the_card_lists_the_words():
    """A list in prose is forgotten when the scenes change. README.md names their numbers."""
    text = (ROOT / "models" / "tiny" / "README.md").read_text()
    assert "64 objects" in (readme := (ROOT / "README.md").read_text()) and "8 background colours" in readme
    for kind, title in (("objects", "Objects:"), ("colours", "Backgrounds:"), ("sizes", "Sizes"),
                        ("relations", "Relations")):
        listed = re.search(rf"\*\*{title}\*\*(?:, of a single object:| of two objects:)?([^.]+)\.", text)[1]
        names = [" ".join(name.removeprefix(" also ").split()) for name in listed.replace(";", ",").split(",")]
        assert sorted(name.removeprefix("also ") for name in names) == sorted(KNOWN[kind])


@pytest.mark.parametrize("prompt, unknown", [
    ("ein Apfel auf blau", ["ein", "Apfel", "auf", "blau"]), ("A Red Apple, on the “blue” background…", []),
    ("a cat left of a moon on a green background.", []), ("", []), ("a unicorn, a UNICORN", ["unicorn", "UNICORN"]),
    ("🍎 on blue", ["🍎"]), ("2 cats", ["2", "cats"]), ("apple red on left", []), ("a teddy-cat", ["teddy"])])
def test_words_are_compared_without_case_and_punctuation(prompt, unknown):
    assert unknown_words(prompt, KNOWN) == unknown


@pytest.mark.parametrize("unknown, near", [
    (["Apfel", "blau"], ["red apple", "blue", "rocket"]), (["zebra"], ["rocket", "moon", "red apple"]),
    (["smal", "caat"], ["small", "cat", "rocket"])])
def test_three_known_words_are_suggested_the_nearest_first(unknown, near):
    assert nearest_phrases(unknown, KNOWN) == near


# ----- the warning ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights", ["tiny", "tiny-v1"])
def test_a_prompt_with_an_unknown_word_warns_once(weights):
    model = Wuerstchen.load(weights, "cpu")
    message, = warnings_of(model, "ein Apfel on a blue background", **QUICK)
    assert message == (f'{MESSAGE}"ein", "Apfel": it knows for example penguin, red apple, rocket; all its 64 objects '
                       f'and its other words are in {PRIOR / FILE}')
    assert warnings_of(model, ["an Apfel", "an apfel and a cat"], **QUICK) == [message.replace(
        '"ein", "Apfel"', '"and"').replace("penguin, red apple, rocket", "panda, rocket, moon")]
    assert not warnings_of(model, "a cat left of a moon on a red background", "a dog", **QUICK)


def test_editing_and_negative_prompts_warn_as_well(model):
    assert [re.findall('"(.*?)"', message) for message in warnings_of(
        generate, model, ["a zebra on a blue background", "a cat"], ["blurry", "a dog"], **QUICK)] == [
            ["zebra"], ["blurry"]]


def test_the_command_line_prints_one_line(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a zebra on a blue background\na cat\na zebra\n")
    quick = ["--steps-c", "1", "--steps-b", "1", "--out", str(tmp_path)]
    sample.main(["--prompt-file", str(tmp_path / "prompts.txt"), *quick])
    sample.main(["--prompt", "a cat", "--interpolate-to", "a yak", "--frames", "2", *quick])
    lines = [line for line in capsys.readouterr().err.splitlines() if MESSAGE in line]
    assert [line.partition(":")[0] for line in lines] == ["warning"] * 2
    assert '"zebra"' in lines[0] and '"yak"' in lines[1]


# ----- no warning where a word may have been learned -----------------------------------------------------------------

def test_a_lora_silences_it(model, tmp_path):
    """It may have been trained on any word, and its file does not list them."""
    lora.add_lora(model.part("stage_c"), rank=1, targets="attention")
    lora.save_lora(model.part("stage_c"), tmp_path / "unicorn.safetensors")
    assert not warnings_of(model, "a unicorn", **QUICK)                                  # added to a loaded model
    lora.remove(model.part("stage_c"))
    assert warnings_of(model, "a unicorn", **QUICK)
    loaded = Wuerstchen.load("tiny", "cpu", lora={tmp_path / "unicorn.safetensors": 1.0})
    assert not warnings_of(loaded, "a unicorn", **QUICK)


def test_another_prior_without_a_list_silences_it(tmp_path):
    folder = tmp_path / "prior"
    folder.mkdir()
    for file in PRIOR.iterdir():
        if file.name != FILE:
            (folder / file.name).symlink_to(file)
    assert not warnings_of(Wuerstchen.load("tiny", "cpu", prior=folder), "a unicorn", **QUICK)


@pytest.mark.parametrize("options, objects", [
    (dict(init="random", data="scenes"), CAPTIONED), (dict(init="random", data="scenes:all:64:1"), CAPTIONED),
    (dict(init="random", data="scenes:uncaptioned"), UNCAPTIONED), (dict(data="scenes:captioned:64"), CAPTIONED),
    (dict(data="scenes:uncaptioned:64"), CAPTIONED + UNCAPTIONED), (dict(data="./scenes"), None),
    (dict(init="random", data="photos"), None), (dict(data="scenes", prior="PLAIN"), None)])
def test_a_training_of_stage_c_writes_the_words_only_if_it_knows_them_all(options, objects, tmp_path):
    """Captions of a folder may hold any word: then no list is written, and one of an earlier run is removed."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / FILE).write_text("{}")
    args = dict(out=tmp_path, weights="tiny", init="weights") | dict.fromkeys(results.FILES_C) | options
    args["prior"] = tmp_path / "plain" if args["prior"] else None
    results.write_words(SimpleNamespace(**args))
    if objects is None:
        assert not (tmp_path / "prior" / FILE).exists()
    else:
        assert json.loads((tmp_path / "prior" / FILE).read_text()) == vocabulary(objects)


def test_the_warning_changes_no_embedding(model):
    prompts = ["a zebra on a blue background", "a cat"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.encode_text("c", prompts, ["", "a dog"])
    plain = Wuerstchen.encode_text(model, "c", prompts, ["", "a dog"])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
