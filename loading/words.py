"""The words that a small model knows, and a warning for prompts with others.

  prior/words.json + "a zebra on a blue background"  ->  warning: the model does not know "zebra"; ...

Any text gives an image, so a model cannot notice by itself that it never saw a word. The file lists the words of all
captions that Stage C was trained on; train_c.py writes it for emoji scenes. Weights without it, such as v2 or a
fine-tune on other captions, know words that nobody listed: for them there is no warning, and none with a LoRA.
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

FILE = "words.json"            # {"objects": ["red apple", ...], "colours": [...], ...}: phrases by kind
# Letters and digits, or other signs such as emoji; not punctuation, ASCII or typographic.
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s!-~\u2010-\u205e]+")


def read_words(prior: Path | None) -> dict[str, list[str]]:
    """The words that Stage C in this folder knows, by kind; empty if they are not listed. Raises WeightsError."""
    if not prior or not (path := Path(prior) / FILE).exists():
        return {}
    words = read_json(path)
    if not words.get("objects") or not all(isinstance(phrases, list) and all(isinstance(one, str) for one in phrases)
                                           for phrases in words.values()):
        raise WeightsError(f"{path} cannot be used: expected lists of phrases, one called objects")
    return words


def unknown_words(prompt: str, known: dict[str, list[str]]) -> list[str]:
    """The words of a prompt, as they are written there, that are not among the known ones."""
    words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
    return [word for word in dict.fromkeys(WORD.findall(prompt)) if word.lower() not in words]


def nearest_phrases(unknown: list[str], known: dict[str, list[str]], n: int = 3) -> list[str]:
    """n known phrases: those with a word spelled like the unknown ones, then the first objects."""
    phrase_of = {word: phrase for phrases in reversed(known.values()) for phrase in reversed(phrases)
                 for word in phrase.split() if len(word) > 2}     # the first one counts; "to" is no help for "two"
    near = [phrase_of[match] for word in unknown for match in difflib.get_close_matches(word.lower(), phrase_of, n=1)]
    return list(dict.fromkeys([*near, *known["objects"]]))[:n]


def warn_of_unknown_words(model: Wuerstchen, prior: Path | None, loras: dict) -> Wuerstchen:
    """From now on the model warns of each unknown word once. Returns it. Raises WeightsError."""
    known, seen, encode_text = read_words(prior), set(), model.encode_text
    if not known or loras:
        return model

    def encode_and_check(stage: str, prompts: list[str], negatives: list[str]) -> tuple:
        network = model.networks.get("stage_c")
        if not (model.loras or isinstance(network, torch.nn.Module) and lora_layers(network)):     # it knows more words
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
