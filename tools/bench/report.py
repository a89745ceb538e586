"""The report: rows, goals, and the sections of BENCHMARKS.md, each with its command, date and machine."""
import importlib.metadata
import math
import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FILE = ROOT / "BENCHMARKS.md"
PROMPT = "a red apple on a blue background"
DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16")
# The sections of BENCHMARKS.md, in their order.
SECTIONS = ("Start", "Networks", "Official size", "GPU", "GPU equality", "Memory", "Training", "Training at 1024 px",
            "Epoch", "Int8")
# {(section, row): ("at least" or "at most", the goal for the row's ratio)}. Speeds are for 2 CPU cores in float32.
GOALS = {
    ("Start", "`--help`, seconds"): ("at most", 0.3),
    ("Start", "start to PNG"): ("at most", 1.6),
    ("Networks", "16 images in a batch, per second"): ("at least", 4.0),
    ("Official size", "Stage C step"): ("at least", 1.4),
    ("Official size", "Stage B step"): ("at least", 1.5),
    ("Official size", "Stage A decode"): ("at least", 1.7),
    **{("Official size", f"{what}, only its products"): ("at least", 0.85)
       for what in ("Stage C step", "Stage B step", "Stage A decode")},
    **{("Official size", f"Stage {stage} step, compiled, next to eager"): ("at least", 1.0) for stage in "CB"},
    **{("Official size", f"Stage {stage} step, int8"): ("at least", 2.0) for stage in "CB"},
    ("Official size", "whole image, added up"): ("at least", 1.45),
    ("Official size", "largest deviation from diffusers"): ("at most", 1e-5),
    ("Official size", "error of int8, relative L2"): ("at most", 0.01),
    ("GPU", "an image, compiled, seconds"): ("at most", 0.35),
    ("GPU", "an image, compiled, next to diffusers"): ("at least", 2.5),
    ("GPU", "an image, compiled, next to diffusers compiled"): ("at least", 1.25),
    ("GPU", "an image of 8, compiled, share of the peak"): ("at least", 0.5),
    **{("GPU equality", f"the small model's image, {form}"): ("at most", rms) for form, rms in (
        ("fp32", 0.5), ("compiled", 0.5), ("CUDA graphs", 0.5), ("bf16", 4), ("fp16", 1))},
    ("Memory", "loading Stage C, float16, next to reading its file"): ("at most", 1.3),
    **{("Memory", f"text to image at 1024 px, one part at a time, {dtype}"): ("at most", 1.25)
       for dtype in ("float32", "bfloat16")},
    **{(section, f"{what}{how}, {quantity}"): ("at most", goal)
       for section in ("Training", "Training at 1024 px") for what, goal in (("LoRA", 0.75), ("full", 0.8))
       for how in ("", ", `--checkpointing products`", ", `--checkpointing blocks`")
       for quantity in ("time", "memory")},
    ("Epoch", "200 images, LoRA, `--cache`"): ("at least", 1.3),
    ("Epoch", "reading a batch, 2 workers"): ("at most", 1.0),
    ("Int8", "weights of Stage C"): ("at most", 0.25),
    ("Int8", "weights of Stage B"): ("at most", 0.25),
    ("Int8", "wrong instead of right, points"): ("at most", 1.0),
}


class Row(NamedTuple):
    """A row of a table. ratio: the number that is compared with the goal, sometimes seconds or GB."""
    what: str
    ours: str
    other: str
    ratio: float
    more: str = ""


def goals_of(section: str, but: set[str] = frozenset()) -> list[str]:
    """Returns the goals of a section as texts, except goals of the rows in `but`."""
    return [f"{what} ({kind} {goal:g})" for (of, what), (kind, goal) in GOALS.items()
            if of == section and what not in but]


def verdict(section: str, row: Row) -> tuple[str, str]:
    """Returns (the goal as text, "yes" or "**no**": whether it is met). Both are "" if the row has no goal."""
    if (section, row.what) not in GOALS:
        return "", ""
    kind, goal = GOALS[section, row.what]
    return f"{kind} {goal:g}", "yes" if (row.ratio >= goal if kind == "at least" else row.ratio <= goal) else "**no**"


def table(section: str, rows: list[Row], note: str = "") -> str:
    """Returns a section as Markdown, without its title: the table, the note, and the goals that were not measured."""
    lines = ["| what | ours | compared with | ratio | goal | met | |", "|---|---:|---:|---:|---:|---|---|"]
    for row in rows:
        number = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}" if row.ratio >= 0.095 else f"{row.ratio:.1e}"
        lines.append(f"| {' | '.join((row.what, row.ours, row.other, number, *verdict(section, row), row.more))} |")
    missing = goals_of(section, but={row.what for row in rows})          # goals without a row, which may be renamed
    notes = [note] * bool(note) + [f"Goals that were not measured: {', '.join(missing)}."] * bool(missing)
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def replace_section(text: str, title: str, body: str) -> str:
    """Replaces or adds the section "## title" in the file's text -> the new text, in the order of SECTIONS."""
    head, *parts = re.split(r"(?m)^## ", text)
    sections = dict(part.split("\n", 1) for part in parts) | {title: f"\n{body.strip()}\n"}
    head = head.strip() or ("# Benchmarks\n\nWritten by `python -m tools.bench`; its `--help` says what is measured "
                            "and how. Each section has its own date and machine.")
    order = [*(name for name in SECTIONS if name in sections), *(name for name in sections if name not in SECTIONS)]
    return "\n\n".join([head, *(f"## {name}\n\n{sections[name].strip()}" for name in order)]) + "\n"


def machine(device: str) -> str:
    """Describes the conditions of a measurement: date, processor, load, versions."""
    import torch
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("transformers", "diffusers", "peft"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu[1] if cpu else platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""      # Windows has none
    return (f"{date.today()}; {name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{load}; "
            f"{', '.join(versions)}")


def write(args, section: str, rows: list[Row], note: str = "") -> None:
    """Prints a section, and writes it to the file args.out instead of its old version."""
    from loading.files import write_atomically           # here, because it imports torch
    command = " ".join(["python -m tools.bench", *args.typed]).split(" --out")[0]
    medians = "" if section in ("Memory", "Int8") else f"; medians of {args.repeats}"          # Memory, Int8: one run
    body = f"`{command}`, {machine(args.device)}{medians}.\n\n{table(section, rows, note)}"
    print(f"## {section}\n\n{body}", flush=True)
    text = replace_section(args.out.read_text(encoding="utf-8") if args.out.exists() else "", section, body)
    write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))
