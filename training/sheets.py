"""Sample sheets: images generated during training by the normal pipeline, with the network that is being trained.

Needs: torch, pillow; lora.py, wuerstchen.py, loading/, extras/, samples.py.
"""
import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

import lora
from extras.images import grid, psnr
from loading.errors import as_user_error, tell
from loading.files import write_atomically
from loading.pipeline import pipeline_for
from loading.text_encoder import TextEncoder
from loading.weights import load_stage_a, load_stage_b, load_text_encoder
from training.data import read_prompts
from training.samples import to_tensor
from wuerstchen import Noise, Wuerstchen, to_pil


@contextlib.contextmanager
def failure_is_a_warning(step: int):
    """Context manager that turns a sheet's error, such as NaN or out of memory, into a warning: the run continues."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        tell(f"no samples after step {step}, the training continues: {reason}")
    torch.cuda.empty_cache()             # frees the memory of a failed sheet; does nothing without a GPU


class SampleSheets:
    """Writes train_c.py's sheets OUT/samples/step_000500.png, ...: a row for each prompt, always from the same noise.

    stage_c: the trained module, which contains Stage C. FSDP gathers weights only in this outermost module's forward.
    With a LoRA, sheets after step 0 have a column without the LoRA and a column with it. Stages A and B are loaded for
    each sheet and freed again, because training needs the memory. Under FSDP all processes must call write.
    """
    def __init__(self, args, stage_c, text_encoder: TextEncoder, paths: dict, dataset, autocast, dtype, processes):
        self.args, self.stage_c, self.text_encoder, self.paths = args, stage_c, text_encoder, paths
        self.autocast, self.dtype, self.processes = autocast, dtype, processes
        self.prompts = [*args.sample_prompt]
        if args.sample_prompts:
            with as_user_error():
                self.prompts += read_prompts(args.sample_prompts)
        if not self.prompts:
            captions = (dataset.captions(i)[0] for i in range(min(len(dataset), 100)))
            self.prompts = list(dict.fromkeys(captions))[:4]

    def write(self, step: int) -> None:
        if self.processes.is_main or self.args.fsdp:
            sheet = self.draw(compare=self.args.lora and step > 0)
        if self.processes.is_main:
            write_atomically(f"{self.args.out}/samples/step_{step:06d}.png", sheet.save)

    def draw(self, compare: bool) -> Image.Image:
        pipeline, columns = self.pipeline(), {}
        try:
            with self.autocast:
                for title, on in (("without LoRA", False), ("with LoRA", True)) if compare else (("", True),):
                    if self.args.lora:
                        lora.enable(self.stage_c, on=on)
                    columns[title] = [pipeline(prompt, seed=self.args.seed)[0] for prompt in self.prompts]
        finally:
            if self.args.lora:
                lora.enable(self.stage_c)
        rows = [image for row in zip(*columns.values()) for image in row]
        return grid(rows, len(columns), [*columns] if compare else None, self.prompts)

    def pipeline(self) -> Wuerstchen:
        """Returns the normal pipeline, but with the Stage C that is being trained."""
        paths, device, dtype = self.paths, self.processes.device, self.dtype
        networks = dict(stage_a=lambda: load_stage_a(paths["vqgan"], dtype).to(device), stage_c=self.stage_c,
                        stage_b=lambda: load_stage_b(paths["decoder"], dtype).to(device),
                        text_encoder_c=self.text_encoder, text_encoder_b=self.text_encoder)
        if paths["text_encoder"] != paths["prior_text_encoder"]:
            files = paths["text_encoder"], paths["tokenizer"]
            networks["text_encoder_b"] = lambda: load_text_encoder(*files, dtype).to(device)
        return pipeline_for(paths, {}, networks, device, dtype)


class Reconstructions:
    """Writes train_b.py's sheets OUT/samples/step_000500.png, ...: images of `fixed` (see fixed_set) next to their
    reconstructions from semantic latents, always from the same noise, at several guidance scales and step counts."""
    def __init__(self, args, model, stage, vqgan, small: bool, fixed, embed: Callable, autocast, processes):
        self.args, self.model, self.stage, self.vqgan = args, model, stage, vqgan
        self.fixed, self.embed, self.autocast, self.processes = fixed, embed, autocast, processes
        self.pipeline = stage.pipeline(vqgan, small, processes.device)
        self.pipeline.bind_b = self.bind

    def bind(self, semantic: Tensor, text: Tensor) -> Callable:
        return lambda x, t: self.stage.prediction(self.model(semantic, x, t, text), x)

    @torch.no_grad()
    def write(self, step: int) -> dict[str, float]:
        """Writes the sheet. Returns {name in the log: PSNR of a column}. With FSDP, all processes must call write."""
        if not (self.processes.is_main or self.args.fsdp):
            return {}
        own, rows = self.pipeline.b, self.fixed.x_0.split(self.args.batch)
        real = to_tensor(self.fixed.pixels, self.processes.device)                       # (N, 3, r, r)
        decoded = torch.cat([self.stage.decode(self.vqgan, x_0).clamp(0, 1) for x_0 in rows])
        columns, values = {"image": real, "Stage A only": decoded}, dict(psnr_a=psnr(decoded, real))
        for scale in dict.fromkeys((1.0, own.guidance)):
            for steps in (4, own.steps):
                images = self.reconstruct(replace(own, steps=steps, guidance=scale))
                columns[f"guidance {scale:g}, {steps} steps"] = images
                values[f"psnr_guidance_{scale:g}_steps_{steps}"] = psnr(images, real)
        shown = [to_pil(images[:8]) for images in columns.values()]
        sheet = grid([image for row in zip(*shown) for image in row], len(columns), [*columns])
        if self.processes.is_main:
            write_atomically(f"{self.args.out}/samples/step_{step:06d}.png", sheet.save)
        return values

    @torch.no_grad()
    def reconstruct(self, sampling) -> Tensor:
        """Returns images (N,3,r,r) in [0, 1] that Stages B and A generate from the validation's semantic latents."""
        fixed, result = self.fixed, []
        for rows in torch.arange(len(fixed.captions)).split(self.args.batch):
            captions, size = [fixed.captions[i] for i in rows], fixed.x_0.shape[-2:]
            noise = Noise([self.args.seed + i for i in rows.tolist()], self.processes.device)
            with self.autocast:
                semantic = self.model(fixed.source[rows])                                # (n, 16, h, w)
                latents = self.pipeline.sample_b(
                    semantic, self.embed(captions), self.embed([""] * len(rows)),
                    lambda: noise(self.pipeline.channels_b, *size), sampling)            # (n, 4, h', w')
            result.append(self.pipeline.decode(latents))
        return torch.cat(result)
