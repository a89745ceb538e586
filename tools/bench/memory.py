"""Measures, at official size on Linux, the loading of Stage C, and the memory for an image with one part at a time."""
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from loading import weights
from loading.text_encoder import TextEncoder
from stage_a import StageA
from stage_b import StageB
from stage_c import StageC
from tools.bench.measure import in_own_process, memory, peak_memory, seconds_of
from tools.bench.models import random_network, random_text_model
from tools.bench.report import PROMPT, ROOT, Row
from wuerstchen import Wuerstchen


def measure(args) -> tuple[str, list[Row]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_official_files(folder)
        loading, reading = in_own_process(loading_times, folder)
        rows = [Row("loading Stage C, float16, next to reading its file", f"{loading:.2f} s", f"{reading:.2f} s",
                    loading / reading, "from the system's memory of files; medians of 5")]
        # {part: number of its parameters}: the size of its file / 2, because a float16 parameter takes 2 bytes.
        files = {path.parent.name: path.stat().st_size / 2 for path in folder.rglob("*.safetensors")}
        for what, action, dtype, parameters, whose in (
                ("loading Stage C, float16", load_stage_c, torch.float16, files["prior_prior"], "its"),
                ("loading Stage C, float32", load_stage_c, torch.float32, files["prior_prior"], "its"),
                *((f"text to image at 1024 px, one part at a time, {dtype}", generate, getattr(torch, dtype),
                   max(files.values()), "the largest") for dtype in ("float32", "bfloat16"))):
            peak, size = in_own_process(peak_of, action, folder, args.device, dtype), parameters * dtype.itemsize
            together = f"all parts together, as in diffusers: {sum(files.values()) * dtype.itemsize / 1e6:.0f} MB"
            rows.append(Row(what, f"{peak / 1e6:.0f} MB", f"{size / 1e6:.0f} MB, {whose} weights", peak / size,
                            together if action is generate else ""))
    return "Memory", rows


def write_official_files(folder: Path) -> None:
    """Writes random float16 weights, 6.3 GB, with the names, sizes and folders of diffusers' combined pipeline."""
    for part, stage in dict(prior_prior=StageC, decoder=StageB, vqgan=StageA).items():
        weights.save_model(random_network(stage, {}, "cpu", torch.float16), folder / part)
    tokenizer = weights.load_tokenizer(ROOT / "models" / "tiny" / "tokenizer")           # any tokenizer would do
    for prefix, *size in (("prior_", 1280, 32, 20), ("", 1024, 24, 16)):
        encoder = TextEncoder(tokenizer, random_text_model(*size, "cpu", torch.float16))
        weights.save_text_encoder(encoder, folder / f"{prefix}text_encoder", folder / f"{prefix}tokenizer")


# ----- functions that run in their own process -------------------------------------------------------

def loading_times(folder: Path) -> list[float]:
    """Returns two medians, in seconds: the time to load Stage C in float16, and the time to read its file."""
    file = next((folder / "prior_prior").glob("*.safetensors"))
    file.read_bytes()                                    # warm up: later reads come from the system's file cache
    times = [(seconds_of(lambda: load_stage_c(folder, "cpu", torch.float16)), seconds_of(file.read_bytes))
             for _ in range(5)]
    return [median(column) for column in zip(*times)]


def peak_of(action: Callable, folder: Path, device: str, dtype: torch.dtype) -> int:
    """Returns the peak memory of action(folder, device, dtype) in bytes, minus that of imports and a first product."""
    import tokenizers as _
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    before = memory("VmRSS")
    action(folder, device, dtype)
    return peak_memory(device, before)


def load_stage_c(folder: Path, device: str, dtype: torch.dtype) -> None:
    weights.load(StageC, folder / "prior_prior", dtype).to(device)


def generate(folder: Path, device: str, dtype: torch.dtype) -> None:
    Wuerstchen.load(str(folder), device, dtype, low_memory=True)(PROMPT, steps_c=2, steps_b=2)
