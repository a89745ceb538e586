"""How long an epoch of training takes with and without a cache, added up from its parts; and how fast it reads files."""
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from stage_b import EfficientNetEncoder, preprocess
from tools.bench.measure import in_own_process, seconds_of
from tools.bench.models import randomize
from tools.bench.report import PROMPT, Row
from tools.bench.training import Run, fresh_steps


def measure(args) -> tuple[str, list[Row], str]:
    """Added up, because 200 images at official size take too long on a CPU."""
    side, count, found = args.side or 768, 200, []
    for _ in range(args.repeats):
        step = in_own_process(fresh_steps, Run("ours", False, None), args.depth, side, args.batch, args.device)
        found.append((step["seconds"], in_own_process(encoding, side, args.batch, args.device),
                      in_own_process(reading, side, args.batch)))
    step, more, read = (median(values) for values in zip(*found))
    steps = count / args.batch
    rows = [Row(f"{count} images, LoRA, `--cache`", f"{steps * step:.0f} s", f"{steps * (step + more):.0f} s, without",
                (step + more) / step, f"the image encoder and CLIP take {more:.2f} s of a step of {step + more:.2f} s, "
                "which is all that a cache can save"),
            Row("reading a batch, 2 workers", f"{read:.3f} s", f"{step + more:.2f} s, a step without a cache",
                read / (step + more))]
    return "Epoch", rows, (f"LoRA of rank 8 on attention, Stage C of depth {args.depth}, {side} px, "
                           f"batch {args.batch}, image files of {side * 4 // 3} px.")


# ----- each of these runs in a process of its own ----------------------------------------------------

@torch.no_grad()
def encoding(side: int, batch: int, device: str) -> float:
    """Seconds of what --cache saves in a step: the image encoder and CLIP-bigG, of official size, random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        text_model = CLIPTextModel(CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
                                                  intermediate_size=5120, hidden_act="gelu"))
    randomize(text_model, device)
    for buffer in text_model.buffers():                  # there is only one: positions 0, 1, 2, ...
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    encoder, ids = EfficientNetEncoder().eval().to(device), torch.arange(77, device=device).expand(batch, -1)
    images = torch.rand(batch, 3, side, side, device=device)
    seconds = [seconds_of(lambda: (encoder(preprocess(images, side * 3 // 4)), text_model(input_ids=ids)), device)
               for _ in range(3)]
    return median(seconds[1:])


def reading(side: int, batch: int, files: int = 64) -> float:
    """Seconds in which two workers read a batch as train_c.py's loop gets it, from JPEGs a third larger than `side`."""
    import train_c
    from training.data import open_dataset
    from training.order import BatchSampler, batches
    from training.processes import Processes
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(files):
            rough = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
            rough.resize((side * 4 // 3, side * 4 // 3), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=95)
            Path(folder, f"{i}.txt").write_text(PROMPT, encoding="utf-8")
        args = train_c.parse_args(["--data", folder, "--out", folder, "--batch", f"{batch}", "--workers", "2"])
        dataset = open_dataset(folder)
        dataset.bucket = np.zeros(len(dataset), int)
        loader = batches(train_c.Samples(dataset, [(side, side)], args), BatchSampler(dataset.bucket, batch, 0),
                         Processes("cpu"), args)
        for _ in range(8):                               # until the workers run and have used up what they read ahead
            next(loader)
        return seconds_of(lambda: [next(loader) for _ in range(16)]) / 16
