"""Text: prompts to embeddings, and the checks of what a user may give in their place.

  prompts -tokenizer-> ids (n,77) -CLIP-> (n,77,D), one vector per token: D = 1280 for Stage C, 1024 for Stage B

Both stages attend to all positions, padding included; "without condition" is the embedding of the empty
prompt, as in training, not zeros.
Needs: torch; TextEncoder is given a tokenizer and model of transformers.
"""
import warnings

import torch
from torch import Tensor


class TextEncoder:
    """A CLIP tokenizer and text model from transformers: prompts -> one vector per token."""
    def __init__(self, tokenizer, model):
        self.tokenizer, self.model = tokenizer, model
        self.length = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    def __call__(self, prompts: list[str]) -> Tensor:
        """n prompts -> (n, N, D) float, N = 77 for the official encoders. Warns of what did not fit.

        The attention mask matters: without it, the vectors at padding positions, which Stages B and C
        do attend to, differ by half their size.
        """
        for prompt, ids in zip(prompts, self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"]):
            if len(ids) > self.length:
                # The last token kept is the end mark, so the first one lost is number length - 1. Its place in the
                # prompt tells what was lost in the user's own words; decoded tokens would be lower case.
                places = self.tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
                warnings.warn(f"a prompt is longer than the {self.length} tokens that the text encoder takes; "
                              f"this part was cut off: {prompt[places[self.length - 1][0]:]!r}")
        batch = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        batch = batch.to(self.model.device)
        return self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


EMPTY = "the prompt is empty: say what to paint, for example \"a red apple on a blue background\"."


class Texts:
    """What the stages are told: texts("c") and texts("b") -> embeddings with and without condition, each (images,N,D).

    Prompts and embeddings are checked at once, encoded when they are asked for. rows: the number of prompts.
    stages: those that will ask, "cb" or one of them. optional: where nothing is said, the empty prompt will do.
    silent: that is so.
    """
    NAMES = ("prompt_c", "negative_c", "prompt_b", "negative_b")

    def __init__(self, model: "Wuerstchen", prompt, negative, embeddings: dict[str, Tensor], num_images: int, stages: str, optional: bool):
        self.model, self.given, self.num_images, self.encoded = model, dict(embeddings), num_images, {}
        unknown = set(embeddings) - set(self.NAMES)
        if unknown:
            raise ValueError(f"there are no embeddings called {', '.join(sorted(unknown))}: expected some of {', '.join(self.NAMES)}.")
        one_encoder = model.sources["text_encoder_b"] is model.sources["text_encoder_c"]
        for name in ("prompt", "negative") if one_encoder else ():       # what Stage C is told serves Stage B, too
            if f"{name}_c" in embeddings:
                self.given.setdefault(f"{name}_b", embeddings[f"{name}_c"])
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt) if prompt is not None else None
        if self.prompts is None:
            lacks = [f"prompt_{stage}" for stage in stages if f"prompt_{stage}" not in self.given]
            if lacks and {"prompt_c", "prompt_b"} & set(self.given):     # one stage would be told something, the other nothing
                raise ValueError(f"there is no {lacks[0]} among the embeddings, and no prompt to make it from: give one of them.")
            if lacks and not optional:
                raise ValueError(EMPTY)
        elif not self.prompts or not all(isinstance(p, str) and (optional or p.strip()) for p in self.prompts):
            raise ValueError(EMPTY)
        self.rows = len(self.prompts) if self.prompts is not None else max([len(e) for e in self.given.values()], default=1)
        self.prompts = self.prompts or [""] * self.rows
        self.silent = not any(p.strip() for p in self.prompts) and not {"prompt_c", "prompt_b"} & set(self.given)
        self.negatives = [negative or ""] * self.rows if isinstance(negative, str | None) else list(negative)
        if len(self.negatives) != self.rows:
            raise ValueError(f"got {len(self.negatives)} negative prompts for {self.rows} prompts: give one for all, or one for each.")
        for name, embedding in self.given.items():
            stage, key = ("stage_c", "c_cond") if name.endswith("_c") else ("stage_b", "c_text")
            width = model.config(stage)[key] if model.sources[stage] is not None else embedding.shape[-1]
            if embedding.ndim != 3 or len(embedding) not in (1, self.rows) or embedding.shape[2] != width:
                raise ValueError(f"embeddings {name} have shape {tuple(embedding.shape)}, expected ({self.rows} or 1, tokens, {width}).")

    def __call__(self, stage: str) -> tuple[Tensor, Tensor]:
        names = (f"prompt_{stage}", f"negative_{stage}")
        if not all(name in self.given for name in names):
            encoder = self.model.sources[f"text_encoder_{stage}"]
            if encoder not in self.encoded:                      # one encoder may serve both stages
                self.encoded[encoder] = self.model.encode_text(getattr(self.model, f"text_encoder_{stage}"), self.prompts, self.negatives, 1)
        pair = [self.given[name] if name in self.given else self.encoded[encoder][i] for i, name in enumerate(names)]
        if pair[0].shape[1:] != pair[1].shape[1:]:
            raise ValueError(f"embeddings of {names[0]} and {names[1]} differ in shape, {tuple(pair[0].shape)} and {tuple(pair[1].shape)}: "
                             f"they must come from the same encoder.")
        return tuple(e.to(self.model.device, self.model.dtype).expand(self.rows, -1, -1).repeat_interleave(self.num_images, 0) for e in pair)
