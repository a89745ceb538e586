"""README.md, docs/ and the model cards: links, commands, options, file names and numbers that can go stale.

A failure names the page and what is wrong in it. Most tests read files only; two generate small images.
"""
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train_a
import train_b
import train_c
from tiny import evaluate, train_encoder, train_text
from extras.images import grid
from tools import lora, make_images

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").glob("*.md")),
          *sorted((ROOT / "models").glob("*/README.md")), ROOT / "notebooks" / "README.md")}
README, DOCS = PAGES["README.md"], [page for page in PAGES if page.startswith("docs/")]
PARSERS = {"sample.py": sample.parser().parse_args, "train_a.py": train_a.parse_args, "train_b.py": train_b.parse_args,
           "train_c.py": train_c.parse_args, "tiny.evaluate": evaluate.parse_args,
           "tiny.train_encoder": train_encoder.parse_args, "tiny.train_text": train_text.parse_args,
           "tools.lora": lora.parser().parse_args}
WITH_HELP = (*PARSERS, "tools.weights", "tools.bench", "loading.hub")
each_page, each_doc = pytest.mark.parametrize("page", PAGES), pytest.mark.parametrize("page", DOCS)


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def anchors(text: str) -> list[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^##+ (.*)$", prose(text), re.M)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def commands(text: str) -> list[list[str]]:
    """Words of each command in a block for the shell."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S)
    lines = "\n".join(block for language, block in blocks if language in ("", "bash")).replace("\\\n", " ").split("\n")
    parts = [part for line in lines for part in re.split(r" && ", line.strip())]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


@functools.cache
def help_of(program: str) -> str:
    module = ["-m", program] if "." in program.removesuffix(".py") else [program]
    run = subprocess.run([sys.executable, *module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout


def options() -> set[str]:
    """Of all programs."""
    found = {"--nproc-per-node", "--help"}
    for program in WITH_HELP:
        found |= set(re.findall(r"--[a-z0-9][\w-]*", help_of(program)))
    return found | set(re.findall(r"--[a-z0-9][\w-]*", "".join(
        path.read_text() for path in (ROOT / "tools" / "lora.py", ROOT / "tools" / "weights.py"))))


# --- the front page ----------------------------------------------------------------------------------

def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1600


def test_continuous_integration_runs_the_first_commands():
    """The README's lines, word for word; the second script may add options."""
    ci = (ROOT / ".ci" / "run").read_text()
    first, second = re.findall("^pip install -r requirements.txt && (.*)$", README, re.M)
    assert "pip install -r requirements.txt\n" in ci and first in ci and second in ci


def test_the_readme_says_what_has_not_been_tried():
    status = re.search(r"^> \*\*Status.*?\n\n", README, re.M | re.S)[0]
    assert "random weights" in status and "**not**" in status and "GPU" in status
    assert README.index(status) < README.index("\n## ")


def test_the_readme_lists_every_notebook_and_every_manual():
    linked = set(re.findall(r"\]\(([\w./]+)[)#]", README))
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= linked
    assert set(DOCS) <= linked


def test_the_readme_lists_every_file_at_the_top_and_every_room():
    table = README[README.index("\n## Files"):]
    names = {path.name for path in ROOT.glob("*.py")} | {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert not [name for name in names if f"`{name}`" not in table]


def test_the_images_at_the_top_are_those_of_the_prompts_below_it():
    """Three are made again; other machines round differently. `python -m tools.make_images samples` makes it."""
    prompts = make_images.prompts()
    found = grid(make_images.generate(prompts[:3]), 3, gap=0)
    with Image.open(make_images.SAMPLES) as stored:
        assert len(prompts) == 8 and stored.size == (8 * found.height, found.height)
        difference = np.abs(np.asarray(stored.convert("RGB"), float)[:, :found.width] - np.asarray(found, float))
    assert difference.mean() < 2


def test_the_unicorns_are_those_of_the_tool():
    """One of the first row is made again. The second needs a LoRA that is not in the repository."""
    captions = {line for file in (ROOT / "examples" / "unicorn").glob("*.txt") for line in file.read_text().split("\n")}
    assert captions.isdisjoint(make_images.UNICORNS) and len(make_images.UNICORNS) == 8
    sheet = grid([Image.new("RGB", (128, 128))] * 16, 8, row_labels=["before", "LoRA"])
    with Image.open(make_images.UNICORN) as stored:
        assert stored.size == sheet.size
        cat = stored.convert("RGB").crop((sheet.width - 260, 0, sheet.width - 132, 128))
    found = make_images.generate(make_images.UNICORNS[6:7])[0]
    assert np.abs(np.asarray(cat, float) - np.asarray(found, float)).mean() < 2


# --- links, commands, names --------------------------------------------------------------------------

@each_doc
def test_the_contents_list_every_section(page):
    listed = re.findall(r"^ *- \[.*?\]\(#(.*?)\)$", PAGES[page], re.M)
    assert listed == anchors(PAGES[page])


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not target.startswith("https://") and (
                not file.exists() or anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@each_page
def test_commands_are_understood(page):
    """A reader copies them. Values are checked as well: by the scripts' own parsers."""
    for words in commands(PAGES[page]):
        if words[0] not in ("python", "torchrun"):
            continue
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m")
        program, arguments = words[at], words[at + 1:]
        assert program == "pytest" or (ROOT / program).exists() or (ROOT / f"{program.replace('.', '/')}.py").exists()
        missing = [word for word in words if re.match(r"(models|examples|tests|docs)/", word) and
                   not (ROOT / word).exists()]
        assert not missing, missing
        if program in PARSERS:
            try:
                PARSERS[program](arguments)
            except SystemExit:
                pytest.fail(f"{page}: {' '.join(words)}")


@each_page
def test_options_in_prose_exist(page):
    """In backticks. A first cell of "From diffusers" has theirs; tests/test_options.py holds that table."""
    text = "\n".join(re.sub(r"^\| `--[\w-]+` \|", "|", line) for line in prose(PAGES[page]).splitlines())
    named = {option for code in re.findall("`([^`\n]+)`", text)
             for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= options(), named - options()


@each_page
def test_files_in_prose_exist(page):
    """In backticks, with a folder or a suffix of ours: from the top or from the page's folder."""
    named = [code for code in re.findall("`([^`\n]+)`", prose(PAGES[page]))
             if not code.startswith("train_text_to_image") and                 # diffusers' scripts
             re.fullmatch(r"[\w./*-]+(\.py|\.md|\.sh)|(docs|examples|extras|loading|models|notebooks|speed|tests|tiny|"
                             r"tools|training|v1|assets)/[\w./*-]*", code)]
    missing = [name for name in named if not any(folder.glob(name) and [*folder.glob(name)]
                                                 for folder in (ROOT, (ROOT / page).parent))]
    assert not missing


STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >> "$LOG"
while [ "$1" != --out ]; do shift; done
case "$2" in *.json) touch "$2" ;;
*) mkdir -p "$2"/{vqgan,decoder,image_encoder,prior,scheduler,text_encoder,tokenizer}
   touch "$2/decoder/of_$(basename "$2")" ;; esac
"""


def test_the_script_that_trains_the_bundled_model_is_understood(tmp_path):
    """All its commands, run with a python that only notes them; a second run leaves the model as it is."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    for commands_so_far in (13, 25):                                    # the second time it is judged already
        subprocess.run(["bash", ROOT / "tiny" / "train.sh", tmp_path / "out"], env=environment, check=True,
                       capture_output=True)
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) == commands_so_far
        for words in (shlex.split(line.replace(".json", "_.json")) for line in lines):       # the others exist
            program = words[1] if words[0] == "-m" else words[0]
            PARSERS[program](words[words.index(program) + 1:])
            assert "--resume" in words or program == "tiny.evaluate"
        assert (tmp_path / "out" / "model" / "decoder" / "of_b_sharper").exists()


# --- numbers that stand in more than one place -------------------------------------------------------

def cells(text: str, start: str) -> list[str]:
    """The first row of a table that starts so."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip(" *") for cell in row.strip("| ").split("|")]


@pytest.mark.parametrize("page, row, benchmark", [
    ("README.md", "official-size steps, random weights, largest deviation", "largest deviation from diffusers"),
    ("README.md", "bundled model, start to image, busy machine", "start to PNG, next to transformers"),
    ("README.md", "official size, one image of 1024 px", "whole image, added up"),
    ("README.md", "official size, one LoRA step, time", "LoRA, time"),
    ("README.md", "official size, one LoRA step, memory", "LoRA, memory"),
    ("docs/WEIGHTS.md", "loading Stage C in float16", "loading Stage C, float16"),
    ("docs/WEIGHTS.md", "loading Stage C in float32", "loading Stage C, float32"),
    ("docs/WEIGHTS.md", "text to image at 1024 px, `--low-memory`, float32",
     "text to image at 1024 px, one part at a time, float32"),
    ("docs/WEIGHTS.md", "text to image at 1024 px, `--low-memory`, bfloat16",
     "text to image at 1024 px, one part at a time, bfloat16")])
def test_measurements_are_those_of_the_benchmarks(page, row, benchmark):
    """What `python -m tools.bench` writes, the pages quote: after a new run, change them as well."""
    quoted, measured = cells(PAGES[page], row)[1:], cells(PAGES["BENCHMARKS.md"], benchmark)[1:3]
    for value in quoted[:2]:
        number = re.match(r"[\d.e-]+ ?\w*", value)
        assert number is None or any(cell.startswith(number[0]) for cell in measured), (value, measured)


def test_times_and_memory_of_the_official_size_agree():
    """README's small table with the big ones."""
    bench = PAGES["BENCHMARKS.md"]
    for start, source in (("2 CPU cores, float32", "whole image, added up"),
                          ("the same with `--low-memory`", "text to image at 1024 px, one part at a time, float32"),
                          ("the same with `--low-memory --dtype bf16`",
                           "text to image at 1024 px, one part at a time, bfloat16")):
        quoted, measured = cells(README, start)[1:], cells(bench, source)[1]
        if measured.endswith("MB"):
            assert quoted[1].startswith(f"{int(measured.split()[0]) / 1000:.1f} GB"), (quoted, measured)
        else:
            assert quoted[0] == measured
    together = int(re.search(r"(\d+) MB", cells(bench, "text to image at 1024 px, one part at a time, float32")[-1])[1])
    assert cells(README, "2 CPU cores, float32")[2].startswith(f"{together / 1000:.1f} GB")


@pytest.mark.parametrize("row, benchmark", [
    ("ours", "LoRA, {}"), ("ours, `--checkpointing products`", "LoRA, `--checkpointing products`, {}"),
    ("ours, `--checkpointing blocks`", "LoRA, `--checkpointing blocks`, {}")])
def test_the_cost_of_a_lora_step_is_that_of_the_benchmarks(row, benchmark):
    quoted = cells(PAGES["docs/FINETUNE.md"], row)
    for column, what, decimals in ((1, "time", 1), (3, "memory", 2)):
        measured = float(cells(PAGES["BENCHMARKS.md"], benchmark.format(what))[1].split()[0])
        assert quoted[column].split()[0] == f"{measured:.{decimals}f}"


@pytest.mark.parametrize("weights", ["tiny", "tiny-v1"])
def test_the_cards_have_the_figures_of_the_evaluation(weights):
    figures = json.loads((ROOT / "models" / weights / "evaluation.json").read_text())["runs"][0]["figures"]
    for row, key in (("background", "background"), ("single object", "single_object"),
                     ("pair seen, both objects and relation", "pair_seen"),
                     ("pair held out, both objects and relation", "pair_held_out")):
        _, right, of, *_ = cells(PAGES[f"models/{weights}/README.md"], row)
        assert float(right.strip(" %")) == pytest.approx(100 * figures[key]["right"], abs=0.051)
        assert int(of) == figures[key]["n"]


@pytest.mark.parametrize("page, row, weights", [
    ("docs/TRAINING.md", "the bundled weights: all trainings above, 2026-11-30", "tiny"),
    ("docs/TRAINING.md", "37,000 steps, the fourth command", "tiny-v1"),
    ("docs/SAMPLING.md", "DDPM (the original's) | 29", "tiny")])
def test_tables_in_the_manuals_end_where_the_evaluation_does(page, row, weights):
    """Single objects, seen and held-out pairs of the bundled weights with default settings."""
    figures = json.loads((ROOT / "models" / weights / "evaluation.json").read_text())["runs"][0]["figures"]
    found = [float(cell.strip(" %")) for cell in cells(PAGES[page], row) if cell.endswith("%")]
    expected = [100 * figures[name]["right"] for name in ("single_object", "pair_seen", "pair_held_out")]
    found = found[1:] if found[0] == 100 else found
    assert found[:3] == pytest.approx(expected, abs=0.051)


def test_the_unicorn_of_the_readme_is_that_of_the_manual():
    manual = PAGES["docs/FINETUNE.md"]
    for start, source in (("before", "before"), ("with the LoRA", "**at 1.3**")):
        quoted, measured = cells(README, start), cells(manual, source)
        assert quoted[1:] == [measured[1], measured[-1]]


def test_no_sentence_stands_in_two_pages():
    """One place for each fact; the others link to it. Commands and headings may repeat."""
    seen, twice = {}, []
    for page, text in PAGES.items():
        plain = re.sub(r"^(\||#|- \[| *<|!\[).*$", "", prose(text), flags=re.M)
        for sentence in re.split(r"(?<=[.:?!])\s+", " ".join(plain.split())):
            if len(sentence.split()) >= 8 and seen.setdefault(sentence, page) != page:
                twice.append(f"{seen[sentence]}, {page}: {sentence}")
    assert not twice, "\n".join(twice)


# --- sources -----------------------------------------------------------------------------------------

CHECKED = {                                  # section or equation -> where it was checked
    "arXiv:2006.11239, eq. 4": "diffusers, scheduling_repaint.py", "arXiv:2006.11239, algorithm 2": "the same",
    "arXiv:2102.09672, eq. 17": "github.com/beresandras/clear-diffusion-keras, issue 2",
    "arXiv:2010.02502, eq. 12 and 16": "diffusers, scheduling_ddim.py and scheduling_repaint.py",
    "arXiv:2305.08891, sec. 3.4": "diffusers, rescale_noise_cfg",
    "arXiv:2303.09556, sec. 3.4": "diffusers, train_text_to_image.py",
    "arXiv:2301.00808. Its eq. 2": "github.com/facebookresearch/ConvNeXt-V2, issues 14 and 76"}


def test_sections_and_equations_of_papers_are_those_that_were_checked():
    """Others name only the paper: a wrong number sends a reader on a search."""
    found, rooms = set(), [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        found |= set(re.findall(r"arXiv:[\d.]+\w(?:,|\. Its) (?:eq\.|sec\.|algorithm|appendix) [\d.]*\d(?: and \d+)?",
                                text))
    assert found == CHECKED.keys()


# --- the guided walk ---------------------------------------------------------------------------------

def test_the_walk_shows_lines_that_are_in_the_code():
    """Eight stops with five lines each, in the order of their file."""
    stops = re.split(r"^## ", PAGES["docs/READING.md"], flags=re.M)[1:]
    assert len(stops) == 8
    for stop in stops:
        files = set(re.findall(r"`(\w+\.py)`", stop.split("**Question")[0]))
        code = "\n".join((ROOT / file).read_text() for file in files)
        lines = re.search("```python\n(.*?)```", stop, re.S)[1].splitlines()
        assert len(lines) == 5 and not [line for line in lines if line not in code]
        names = re.findall(r"`(?:\w+\.)?(\w+)`", stop.split("```")[0])
        assert not [name for name in names if name not in code]


# --- plain English -----------------------------------------------------------------------------------

FOREIGN = (r"in place of|anew|shall|dear|hence|nearly|by way of|at hand|besides?|but for|all but|nothing but|"
           r"paint\w*|pictures?|goes on|going on|is told|are told|, too\b|lea(?:ve|ft) \w+ away|thousand million")


def sentences(text: str) -> list[str]:
    """Of paragraphs and list items, without tables, headings, images and lists of names."""
    plain = re.sub(r"`[^`\n]*`", "X", prose(text))
    plain = re.sub(r"^ *(\||#|!\[|\[|- \[).*$", "\n", plain, flags=re.M)
    plain = re.sub(r"^ *(- |\d\. |> )", "\n\n", plain, flags=re.M)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", plain)]
    return [sentence for part in paragraphs if not part.startswith(("<sub>", "**Objects:**"))
            for sentence in re.split(r"(?<=[.!?:;])(?:\*\*)?\s+", part) if len(sentence.split()) > 3]


@each_page
def test_pages_are_in_plain_english(page):
    """The field's words, and sentences that are read once: 18 words on average, none over 35."""
    found = re.findall(rf"\b(?:{FOREIGN})\b", re.sub(r"`[^`\n]*`", "", prose(PAGES[page])), re.I)
    lengths = [len(sentence.split()) for sentence in sentences(PAGES[page])]
    assert not found and sum(lengths) <= 18 * len(lengths)
    assert max(lengths) <= 35, [sentence for sentence in sentences(PAGES[page]) if len(sentence.split()) > 35]
