"""Reads the words that a small model knows, and warns if a prompt has unknown words.

  prior/words.json + "a zebra on a blue background"  ->  warning: the model does not know "zebra"; ...

A model generates an image for any text, so it cannot detect an unknown word. words.json lists all words of the captions
that Stage C was trained on; train_c.py writes it for emoji scenes. Other weights, such as v2 or a fine-tune on other
captions, have no words.json, so they cause no warning. A model with a LoRA does not warn: the LoRA may add words.
Needs: lora.py; torch.
"""
import difflib
import re
from pathlib import Path

import torch

from loading.errors import WeightsError, warn
from loading.files import read_json
from lora import lora_layers
from wuerstchen import Wuerstchen

FILE = "words.json"            # {"objects": ["red apple", ...], "colours": [...], ...}: known phrases by kind
# A word: letters and digits, or symbols such as emoji. Punctuation, ASCII or typographic, is not part of a word.
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s!-~\u2010-\u205e]+")


def read_words(prior: Path | None) -> dict[str, list[str]]:
    """Returns {kind: known phrases} of Stage C's words.json, {} without this file. Raises WeightsError if it is bad."""
    if not prior or not (path := Path(prior) / FILE).exists():
        return {}
    words = read_json(path)
    if not words.get("objects") or not all(isinstance(phrases, list) and all(isinstance(one, str) for one in phrases)
                                           for phrases in words.values()):
        raise WeightsError(f"{path} cannot be used: expected lists of phrases, one called objects")
    return words


def unknown_words(prompt: str, known: dict[str, list[str]]) -> list[str]:
    """Returns the words of a prompt that are in no phrase of `known`, {kind: phrases}. The comparison ignores case."""
    words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
    return [word for word in dict.fromkeys(WORD.findall(prompt)) if word.lower() not in words]


def nearest_phrases(unknown: list[str], known: dict[str, list[str]], n: int = 3) -> list[str]:
    """Returns up to n phrases of `known`: those with a word similar to an unknown word, then objects in list order."""
    phrase_of = {word: phrase for phrases in reversed(known.values()) for phrase in reversed(phrases)
                 for word in phrase.split() if len(word) > 2}     # {word of 3 letters or more: first phrase with it}
    near = [phrase_of[match] for word in unknown for match in difflib.get_close_matches(word.lower(), phrase_of, n=1)]
    return list(dict.fromkeys([*near, *known["objects"]]))[:n]


def warn_of_unknown_words(model: Wuerstchen, prior: Path | None, loras: dict) -> Wuerstchen:
    """Makes a model without LoRAs warn once for each unknown word. Returns the model. prior: folder of Stage C."""
    known, seen, encode_text = read_words(prior), set(), model.encode_text
    if not known or loras:
        return model

    def encode_and_check(stage: str, prompts: list[str], negatives: list[str]) -> tuple:
        network = model.networks.get("stage_c")
        if not (model.loras or isinstance(network, torch.nn.Module) and lora_layers(network)):    # a LoRA may add words
            for text in [*prompts, *negatives]:
                unknown = [word for word in unknown_words(text, known) if word.lower() not in seen]
                seen.update(map(str.lower, unknown))
                if unknown:
                    quoted = ", ".join(f'"{word}"' for word in unknown[:4]) + ", ..." * (len(unknown) > 4)
                    warn(f"the model does not know {quoted}: it knows for example "
                         f"{', '.join(nearest_phrases(unknown, known))}; all its {len(known['objects'])} "
                         f"objects and its other words are in {Path(prior) / FILE}")
        return encode_text(stage, prompts, negatives)
    model.encode_text = encode_and_check
    return model
