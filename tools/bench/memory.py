"""How much memory official sizes take: loading Stage C, and a whole image with one part in memory at a time (Linux)."""
import tempfile
from pathlib import Path
from statistics import median

import torch

from loading import weights
from stage_a import StageA
from stage_b import StageB
from stage_c import StageC
from tools.bench.measure import in_own_process, memory, peak_memory, seconds_of
from tools.bench.models import randomize
from tools.bench.report import PROMPT, ROOT, Row
from wuerstchen import Wuerstchen

STAGES = dict(prior_prior=StageC, decoder=StageB, vqgan=StageA)


def measure(args) -> tuple[str, list[Row]]:
    def megabytes(size: float) -> str:
        return f"{size / 1e6:.0f} MB"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_official_files(folder)
        loading, reading = in_own_process(loading_times, folder)
        rows = [Row("loading Stage C, float16, next to reading its file", f"{loading:.2f} s", f"{reading:.2f} s",
                    loading / reading, "from the system's memory of files; medians of 5")]
        for dtype in ("float16", "float32"):
            peak, size = in_own_process(peak_of_loading, folder, args.device, dtype)
            rows.append(Row(f"loading Stage C, {dtype}", megabytes(peak), f"{megabytes(size)}, its weights",
                            peak / size))
        numbers = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2         # they are float16
        for dtype in ("float32", "bfloat16"):
            peak, size = in_own_process(peak_of_generating, folder, args.device, dtype)
            together = megabytes(numbers * getattr(torch, dtype).itemsize)
            rows.append(Row(f"text to image at 1024 px, one part at a time, {dtype}", megabytes(peak),
                            f"{megabytes(size)}, the largest weights", peak / size,
                            f"all parts together, as in diffusers: {together}"))
    return "Memory", rows


# ----- each of these runs in a process of its own ----------------------------------------------------

def loading_times(folder: Path) -> list[float]:
    """Median seconds of loading Stage C in float16, and of reading its file."""
    file = next((folder / "prior_prior").glob("*.safetensors"))
    file.read_bytes()                                    # once from the disk; from then on from memory
    times = [(seconds_of(lambda: weights.load(StageC, folder / "prior_prior", torch.float16)),
              seconds_of(file.read_bytes)) for _ in range(5)]
    return [median(column) for column in zip(*times)]


def memory_before(device: str) -> int:
    """Bytes after everything that a process needs only once: imports, and the first product."""
    from transformers import CLIPTextModel as _
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    return memory("VmRSS")


def peak_of_loading(folder: Path, device: str, dtype: str) -> tuple[int, int]:
    """-> bytes at the peak, bytes of the weights."""
    before = memory_before(device)
    model = weights.load(StageC, folder / "prior_prior", getattr(torch, dtype)).to(device)
    return peak_memory(device, before), sum(tensor.nbytes for tensor in model.state_dict().values())


def peak_of_generating(folder: Path, device: str, dtype: str) -> tuple[int, int]:
    """-> bytes at the peak, bytes of the larger one of Stages B and C."""
    before, dtype = memory_before(device), getattr(torch, dtype)
    Wuerstchen.load(str(folder), device, dtype, low_memory=True)(PROMPT, steps_c=2, steps_b=2)
    models = [weights.build_empty(STAGES[part], folder / part)[0] for part in ("prior_prior", "decoder")]
    largest = max(sum(p.numel() for p in model.parameters()) for model in models)
    return peak_memory(device, before), largest * dtype.itemsize


# ----- files -----------------------------------------------------------------------------------------

def write_official_files(folder: Path) -> None:
    """Random weights with the official names, sizes and folders of diffusers' combined pipeline: float16, 6.3 GB."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    for part, stage in STAGES.items():
        with torch.device("meta"):
            model = stage()
        weights.save_model(randomize(model, "cpu", torch.float16), folder / part)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "tiny" / "tokenizer")            # any words will do
    for prefix, width, layers, heads in (("prior_", 1280, 32, 20), ("", 1024, 24, 16)):
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=width, num_hidden_layers=layers,
                                                 num_attention_heads=heads, intermediate_size=4 * width,
                                                 hidden_act="gelu"))
        weights.save_text_encoder(tokenizer, randomize(model, "cpu", torch.float16), folder / f"{prefix}text_encoder",
                                  folder / f"{prefix}tokenizer")
