"""Sample sheets of a Stage C in training: images from the whole pipeline, with the network that is being trained in it.

Needs: pillow; lora.py, wuerstchen.py, weights.py, images.py.
"""
from PIL import Image

import lora
from extras.images import grid
from loading.errors import as_user_error
from loading.files import write_atomically
from loading.weights import is_tiny, load_stage_a, load_stage_b, load_text_encoder
from text import TextEncoder
from training.data import read_prompts
from wuerstchen import Wuerstchen


class SampleSheets:
    """out/samples/step_000500.png, ...: a row for each prompt, always from the same noise.

    prior: Stage C, in training. Under a LoRA, sheets after step 0 have a column without it and one with it. Stages A and
    B are loaded for each sheet and freed again, because training needs the memory. Under FSDP all processes take part.
    """
    def __init__(self, args, prior, text_encoder: TextEncoder, paths: dict, dataset, autocast, dtype, processes):
        self.args, self.prior, self.text_encoder, self.paths = args, prior, text_encoder, paths
        self.autocast, self.dtype, self.processes = autocast, dtype, processes
        if args.sample_prompts:
            with as_user_error():
                self.prompts = read_prompts(args.sample_prompts)
        else:
            captions = (dataset.captions(i)[0] for i in range(min(len(dataset), 100)))
            self.prompts = list(dict.fromkeys(captions))[:4]

    def write(self, step: int) -> None:
        if self.processes.is_main or self.args.fsdp:
            sheet = self.draw(compare=self.args.lora and step > 0)
        if self.processes.is_main:
            write_atomically(f"{self.args.out}/samples/step_{step:06d}.png", sheet.save)

    def draw(self, compare: bool) -> Image.Image:
        pipeline, columns = self.pipeline(), {}
        with self.autocast:
            for title, on in (("without LoRA", False), ("with LoRA", True)) if compare else (("", True),):
                if self.args.lora:
                    (lora.enable if on else lora.disable)(self.prior)
                columns[title] = [pipeline(prompt, seed=self.args.seed)[0] for prompt in self.prompts]
        rows = [image for row in zip(*columns.values()) for image in row]
        return grid(rows, len(columns), [*columns] if compare else None, self.prompts)

    def pipeline(self) -> Wuerstchen:
        """The plain pipeline with Stage C as it is now."""
        paths, dtype = self.paths, self.dtype
        shared = paths["text_encoder"] == paths["prior_text_encoder"]

        def text_b() -> TextEncoder:
            return TextEncoder(*load_text_encoder(paths["text_encoder"], paths["tokenizer"], dtype))
        return Wuerstchen(lambda: load_stage_a(paths["vqgan"], dtype), lambda: load_stage_b(paths["decoder"], dtype),
                          self.prior, self.text_encoder, self.text_encoder if shared else text_b,
                          device=self.processes.device, dtype=dtype,
                          **(dict(size=128, guidance_b=4.0) if is_tiny(paths["image_encoder"]) else {}))
