"""Sample sheets of a Stage C in training: images from the whole pipeline, with the network that is being trained in it.

Needs: torch, pillow; lora.py, wuerstchen.py, loading/, images.py.
"""
from PIL import Image

import lora
from extras.images import grid
from loading.errors import as_user_error
from loading.files import write_atomically
from loading.pipeline import pipeline_for
from loading.weights import load_stage_a, load_stage_b, load_text_encoder
from training.data import read_prompts
from wuerstchen import TextEncoder, Wuerstchen


class SampleSheets:
    """out/samples/step_000500.png, ...: a row for each prompt, always from the same noise.

    stage_c: in training; under FSDP the module at its root. Under a LoRA, sheets after step 0 have a column without it and one with it. Stages A and
    B are loaded for each sheet and freed again, because training needs the memory. Under FSDP all processes take part.
    """
    def __init__(self, args, stage_c, text_encoder: TextEncoder, paths: dict, dataset, autocast, dtype, processes):
        self.args, self.stage_c, self.text_encoder, self.paths = args, stage_c, text_encoder, paths
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
                    lora.enable(self.stage_c, on=on)
                columns[title] = [pipeline(prompt, seed=self.args.seed)[0] for prompt in self.prompts]
        rows = [image for row in zip(*columns.values()) for image in row]
        return grid(rows, len(columns), [*columns] if compare else None, self.prompts)

    def pipeline(self) -> Wuerstchen:
        """The plain pipeline with Stage C as it is now."""
        paths, device, dtype = self.paths, self.processes.device, self.dtype
        networks = dict(stage_a=lambda: load_stage_a(paths["vqgan"], dtype).to(device), stage_c=self.stage_c,
                        stage_b=lambda: load_stage_b(paths["decoder"], dtype).to(device),
                        text_encoder_c=self.text_encoder, text_encoder_b=self.text_encoder)
        if paths["text_encoder"] != paths["prior_text_encoder"]:
            networks["text_encoder_b"] = TextEncoder(*load_text_encoder(paths["text_encoder"], paths["tokenizer"], dtype))
        return pipeline_for(paths, {}, networks, device, dtype)
