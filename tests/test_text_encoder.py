"""The text encoder from scratch: transformers, which Würstchen was trained with, is the oracle."""
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import COMBINED, TINY, rel, same
from loading import weights
from loading.errors import WeightsError
from loading.text_encoder import ACTIVATIONS, CLIPTextModel, Tokenizer

ROOT = TINY.parents[1]
ODD = ["", "  A  CAT\n\t naïve — NIGHT’s they'll 12345", "<|endoftext|> x <|startoftext|>",
       "日本語 🦄🏽 e\u0301 ﬁ", "a " * 60,
       "don't DON'T can't've", "a\u200bb \x00 c", "\u0130stanbul ß ǅ", "\ufeffa cat"]


def any_text(rng: random.Random) -> str:
    """Letters, marks of all scripts and emoji in any order."""
    kinds = [(32, 126), (32, 126), (0, 0x2FFF), (0x1F300, 0x1F9FF), (39, 39)]
    return "".join(chr(rng.randint(*rng.choice(kinds))) for _ in range(rng.randint(0, 30)))


def theirs_of(model: CLIPTextModel):
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs
    theirs = Theirs(CLIPTextConfig(**model.config, bos_token_id=0, eos_token_id=1)).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("vocabulary_files", [False, True], ids=["tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_ids_and_masks_are_those_of_transformers(vocabulary_files, tmp_path):
    """On 300 texts, most of them odd: a token off is another prompt."""
    from transformers import CLIPTokenizer
    if vocabulary_files:
        model = json.loads((TINY / "tokenizer" / "tokenizer.json").read_text())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]))
        shutil.copy(TINY / "tokenizer" / "tokenizer_config.json", tmp_path)
    rng = random.Random(0)
    texts = [*ODD, *(any_text(rng) for _ in range(300))]
    ids, mask = Tokenizer.load(tmp_path if vocabulary_files else TINY / "tokenizer")(texts)
    theirs = CLIPTokenizer.from_pretrained(TINY / "tokenizer")(texts, padding="max_length", truncation=True,
                                                               return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])


@pytest.mark.parametrize("pad", ["!", {"content": "!", "lstrip": False}])
def test_a_pad_token_of_its_own_is_used(pad, tmp_path):
    """Some CLIP folders pad with "!", and only special_tokens_map.json says so; the pad decides what C and B see."""
    from transformers import CLIPTokenizer
    shutil.copytree(TINY / "tokenizer", tmp_path, dirs_exist_ok=True)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(dict(pad_token=pad)))
    ids, mask = Tokenizer.load(tmp_path)(["a cat"])
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(["a cat"], padding="max_length", return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])
    assert len(ids[0].unique()) == 5                                # start, a, cat, end, and a pad that is none of them


@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_embeddings_are_those_of_transformers(activation):
    """At the official width, with padding, and with a text that fills all 77 places."""
    model = CLIPTextModel(1000, 1280, 5120, num_hidden_layers=2, num_attention_heads=20, hidden_act=activation)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.02)         # biases and norms, too
    ids, mask = torch.randint(0, 1000, (3, 77)), (torch.arange(77) < torch.tensor([[77], [5], [40]])).long()
    expected = theirs_of(model)(ids, attention_mask=mask).last_hidden_state
    assert rel(model(ids, mask), expected) < 1e-6
    assert rel(model(ids, torch.ones_like(mask))[1], expected[1]) > 0.01          # without the mask it is another text


def test_it_starts_as_transformers_does():
    """The spread of the first weights, by which a training from nothing is stable; biases are zero."""
    sizes = dict(vocab_size=500, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4)
    ours = CLIPTextModel(**sizes)
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs
    theirs = Theirs(CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1)).state_dict()
    for name, tensor in ours.state_dict().items():
        if tensor.ndim == 2:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
        else:
            assert torch.equal(tensor, theirs[name]), name


def test_gradients_reach_every_weight():
    """For --train-text. The last positions' weights are not used by short texts, and get zeros."""
    model = CLIPTextModel(50, 16, 32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6)
    model(torch.randint(0, 50, (2, 6)), torch.ones(2, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("change, message", [
    (dict(num_attention_heads=5), "is not a multiple of its 5 heads"), (dict(hidden_act="relu"), "'relu'"),
    (dict(hidden_size="wide"), "cannot be used"), (dict(num_attention_heads=0), "cannot be used"),
    (dict(vocab_size=-1), "cannot be used")])
def test_a_configuration_that_cannot_be_is_one_line(change, message, tmp_path):
    shutil.copytree(TINY / "text_encoder", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=message) as error:
        weights.load_text_encoder(tmp_path, TINY / "tokenizer")
    assert "\n" not in str(error.value) and "config.json cannot be used" in str(error.value)


def test_no_start_values_are_drawn_on_the_meta_device():
    """And those of a real device are drawn: a training from nothing must not start from garbage."""
    with torch.device("meta"), weights.NoStartValues():
        assert torch.nn.Embedding(3, 4).weight.is_meta
    torch.manual_seed(0)
    expected = torch.nn.Embedding(3, 4).state_dict()
    torch.manual_seed(0)
    with weights.NoStartValues():
        pass
    same(torch.nn.Embedding(3, 4).state_dict(), expected)


def test_an_image_needs_neither_transformers_nor_a_compiler(tmp_path):
    """Their imports took a second or more of each start."""
    code = ("import sys, sample; sample.main(['--prompt', 'a cat', '--steps-c', '1', '--steps-b', '1', '--seed', '0', "
            f"'--out', {str(tmp_path / 'cat.png')!r}]); "
            "print({'transformers', 'sympy', 'torch._dynamo', 'torchvision'} & sys.modules.keys())")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "set()", run.stdout + run.stderr


def test_the_small_pipelines_of_the_reference_load_too():
    for part in ("", "prior_"):
        encoder = weights.load_text_encoder(COMBINED / f"{part}text_encoder", COMBINED / f"{part}tokenizer")
        assert encoder(["a cat"]).shape[:2] == (1, 20)
