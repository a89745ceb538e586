"""Writes the sections of BENCHMARKS.md. Each has the command, date and machine, and a table of figures and goals."""
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
# The titles of the sections of BENCHMARKS.md, in their order.
SECTIONS = ("Start", "Networks", "Official size", "GPU", "GPU equality", "Memory", "Training", "Training at 1024 px",
            "Epoch", "Int8")
# {(section, row): (kind, goal)}. kind: "at least" or "at most" for the row's ratio, "floor at least" for its floor.
GOALS = {
    ("Start", "`--help`, seconds"): ("at most", 0.3),
    ("Start", "start to PNG"): ("at most", 1.6),
    ("Networks", "an image in a batch of 16, seconds"): ("at most", 0.25),
    **{("Official size", what): ("floor at least", share)
       for what, share in (("Stage C step", 0.95), ("Stage B step", 0.95), ("Stage A decode", 0.9))},
    **{("Official size", f"whole image, added up{form}"): ("at most", share) for form, share in (
        ("", 0.77), (", int8", 0.45), (", bf16", 0.45), (", bf16, next to diffusers in bf16", 0.83))},
    ("Official size", "largest deviation from diffusers"): ("at most", 1e-5),
    ("Official size", "error of int8, relative L2"): ("at most", 0.01),
    ("GPU", "an image, compiled, seconds"): ("at most", 0.35),
    ("GPU", "an image, compiled, next to diffusers"): ("at most", 0.4),
    ("GPU", "an image, compiled, next to diffusers compiled"): ("at most", 0.8),
    ("GPU", "an image of 8, compiled, share of the peak"): ("at least", 0.5),
    **{("GPU equality", f"the small model's image, {form}"): ("at most", rms) for form, rms in (
        ("fp32", 0.5), ("compiled", 0.5), ("CUDA graphs", 0.5), ("bf16", 4), ("fp16", 1))},
    ("Memory", "loading Stage C, float16, next to reading its file"): ("at most", 1.3),
    ("Memory", "text to image at 1024 px, one part at a time, float32"): ("at most", 1.25),
    ("Memory", "text to image at 1024 px, one part at a time, bfloat16"): ("at most", 1.25),
    **{(section, what): ("at most", goal) for section in ("Training", "Training at 1024 px") for what, goal in (
        ("LoRA, time", 0.88), ("LoRA, bf16, time", 0.5), ("full, time", 0.95),
        ("LoRA, `--checkpointing products`, memory", 0.75))},
    ("Epoch", "reading a batch, 2 workers"): ("at most", 1.0),
    **{("Int8", f"weights of Stage {stage}"): ("at most", 0.25) for stage in "CB"},
    ("Int8", "wrong instead of right, points"): ("at most", 1.0),
}


class Row(NamedTuple):
    """A row of a table. what: its name. ours, other: two values as text. ratio: ours / other, or another number with a
    goal. more: remarks. floor: the share of our time that matrix products and attention take by themselves."""
    what: str
    ours: str
    other: str
    ratio: float
    more: str = ""
    floor: float = math.nan


def goals_of(section: str, but: set[str] = frozenset()) -> list[str]:
    """Returns the goals of a section as texts, except those of the rows whose names are in `but`."""
    return [f"{what} ({kind} {goal:g})" for (of, what), (kind, goal) in GOALS.items()
            if of == section and what not in but]


def verdict(section: str, row: Row) -> tuple[str, str]:
    """Returns a row's goal as text, and whether the row meets it, "yes" or "no". Both are "" if the row has no goal."""
    if (section, row.what) not in GOALS:
        return "", ""
    kind, goal = GOALS[section, row.what]
    value = row.floor if kind.startswith("floor") else row.ratio
    return f"{kind} {goal:g}", "yes" if (value <= goal if kind == "at most" else value >= goal) else "no"


def table(section: str, rows: list[Row], note: str = "") -> str:
    """Returns a section as Markdown, without its title: the table, the note, and the goals that were not measured."""
    floor = any(row.floor == row.floor for row in rows)                  # whether any is a number: NaN != NaN
    lines = [f"| what | ours | compared with | ratio |{' floor |' * floor} goal | met | |",
             f"|---|---:|---:|---:|{'---:|' * floor}---:|---|---|"]
    for row in rows:
        numbers = ("" if math.isnan(x) else f"{x:.2f}" if x >= 0.095 else f"{x:.1e}"
                   for x in (row.ratio, row.floor)[:1 + floor])
        lines.append(f"| {' | '.join((row.what, row.ours, row.other, *numbers, *verdict(section, row), row.more))} |")
    missing = goals_of(section, but={row.what for row in rows})          # goals whose row is missing or was renamed
    notes = [note] * bool(note) + [f"Goals that were not measured: {', '.join(missing)}."] * bool(missing)
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def replace_section(text: str, title: str, body: str) -> str:
    """Replaces or adds the section "## title" in the text. Returns the new text, with sections in order of SECTIONS."""
    head, *parts = re.split(r"(?m)^## ", text)
    sections = dict(part.split("\n", 1) for part in parts) | {title: f"\n{body.strip()}\n"}
    head = head.strip() or ("# Benchmarks\n\nWritten by `python -m tools.bench`; its `--help` says what is measured "
                            "and how. Each section has its own date and machine.")
    order = [*(name for name in SECTIONS if name in sections), *(name for name in sections if name not in SECTIONS)]
    return "\n\n".join([head, *(f"## {name}\n\n{sections[name].strip()}" for name in order)]) + "\n"


def machine(device: str) -> str:
    """Returns the conditions of a measurement as text: date, processor or GPU, load, versions of packages."""
    import torch
    installed = {part.name: part.version for part in importlib.metadata.distributions()}
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}",
                *(f"{name} {installed[name]}" for name in ("transformers", "diffusers", "peft") if name in installed)]
    cpus = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu[1] if cpu else platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""      # Windows has no load
    return (f"{date.today()}; {name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{load}; "
            f"{', '.join(versions)}")


def write(args, section: str, rows: list[Row], note: str = "") -> None:
    """Prints a section, and writes it to the file args.out, where it replaces its old version."""
    from loading.files import write_atomically
    command = " ".join(["python -m tools.bench", *args.typed]).split(" --out")[0]
    medians = "" if section in ("Memory", "Int8") else f"; medians of {args.repeats}"          # these ignore --repeats
    body = f"`{command}`, {machine(args.device)}{medians}.\n\n{table(section, rows, note)}"
    print(f"## {section}\n\n{body}", flush=True)
    text = replace_section(args.out.read_text(encoding="utf-8") if args.out.exists() else "", section, body)
    write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))
