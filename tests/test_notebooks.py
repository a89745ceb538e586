"""Notebooks are read more often than run, so what is committed must be whole, and must be what the code gives today.

The last test runs each in a fresh kernel, and needs notebooks/requirements.txt; all others read the files alone.
"""
import ast
import copy
import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {path.stem for path in ROOT.glob("*.py")}
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
each_notebook = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

spec = importlib.util.spec_from_file_location("notebooks_run", ROOT / "notebooks" / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def markdown_cells(notebook: dict) -> list[str]:
    return [run.source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


@functools.cache
def defined_in(path: Path) -> set[str]:
    """Functions, classes, methods as "Class.method", and constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in ast.walk(node) if inner is not node and isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def broken_links(text: str) -> list[str]:
    """Local links to files that are not there, and labels such as `diffusion.py: ddpm_step` that name what the file does not define."""
    broken = []
    for label, target in LINK.findall(text):
        if re.match(r"https?://|#", target):
            continue
        file = ROOT / "notebooks" / target.split("#")[0]
        name = re.fullmatch(r"`(\w+\.py): ([\w.]+)`", label)
        if not file.exists():
            broken.append(f"there is no {target}")
        elif name and (file.name != name[1] or name[2] not in defined_in(file)):
            broken.append(f"{target} does not define {name[2]}")
    return broken


def sections(notebook: dict) -> list[list[str]]:
    """For each heading "## ...": its markdown cells."""
    found = []
    for text in markdown_cells(notebook):
        if text.startswith("## "):
            found.append([text])
        elif found:
            found[-1].append(text)
    return found


def badly_labelled(cell: dict) -> bool:
    """Does a cell draw without saying what? Needs a title, and names for both axes unless it shows pictures."""
    code = run.source(cell)
    if not (run.DRAWS.search(code) or run.images_of(cell)):
        return False
    axes = all(re.search(rf"\b(set_)?{axis}\(|\b{axis}=", code) for axis in ("xlabel", "ylabel"))
    return not (re.search(r"\bpictures\(", code) or axes and re.search(r"title", code))


# ----- what is in the files ---------------------------------------------------------------------------

@each_notebook
def test_committed_outputs_belong_to_the_present_code(path):
    """Otherwise a reader sees a picture that the code above it never drew."""
    notebook = read(path)
    assert notebook["metadata"].get("checksum") == run.checksum(notebook), f"run: python notebooks/run.py {path.name}"
    assert all(cell["outputs"] or not run.DRAWS.search(run.source(cell)) for cell in run.code_cells(notebook))


@each_notebook
def test_committed_outputs_are_whole_and_small(path):
    """No error, no warning, no empty picture; and a repository is not a place for megabytes."""
    assert run.problems(read(path)) == []
    assert path.stat().st_size < run.BYTES


@each_notebook
def test_a_notebook_starts_with_its_title(path):
    """In a list of files and on the web, that is what the reader sees first."""
    first = read(path)["cells"][0]
    assert first["cell_type"] == "markdown" and run.source(first).startswith("# ")


@each_notebook
def test_every_figure_says_what_it_shows(path):
    """Title and axis labels; pictures a title."""
    unclear = [run.source(cell) for cell in run.code_cells(read(path)) if badly_labelled(cell)]
    assert not unclear, unclear[0]


@each_notebook
def test_code_cells_are_short(path):
    """One idea, one cell: 15 lines at most, of at most 150 characters."""
    for cell in run.code_cells(read(path)):
        lines = run.source(cell).splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 150, run.source(cell)


@each_notebook
def test_notebooks_use_our_code_and_never_redefine_it(path):
    """What is shown must be what runs in training and sampling, not a copy that may have drifted."""
    tree = ast.parse("\n".join(run.source(cell) for cell in run.code_cells(read(path))))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & OURS, "nothing is imported from our files"
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    taken = set().union(*(defined_in(ROOT / f"{module}.py") for module in OURS))
    assert not own & taken, f"defined anew: {own & taken}"
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)), "networks and other classes belong into our files"


@each_notebook
def test_every_section_ends_with_a_question_and_a_folded_answer(path):
    """Reading along is easy; a question shows whether it was understood."""
    parts = sections(read(path))
    assert parts
    for cells in parts:
        text = cells[-1]
        assert "**Question" in text and "<details>" in text and "<summary>" in text and "</details>" in text, cells[0].splitlines()[0]
        assert text.index("**Question") < text.index("<details>")


@each_notebook
def test_links_lead_to_files_and_functions_that_exist(path):
    """A renamed function must be renamed in the text, too."""
    assert broken_links("\n".join(markdown_cells(read(path)))) == []


def test_the_index_names_every_notebook():
    """And nothing that is not there."""
    text = (ROOT / "notebooks" / "README.md").read_text()
    assert broken_links(text) == []
    assert {target for _, target in LINK.findall(text) if target.endswith(".ipynb")} == {path.name for path in FILES}


# ----- can these checks fail? --------------------------------------------------------------------------

def a_notebook(code: str, *outputs: dict) -> dict:
    return {"metadata": {}, "cells": [{"cell_type": "code", "metadata": {}, "source": [code], "outputs": list(outputs)},
                                      {"cell_type": "markdown", "metadata": {}, "source": ["text"]}]}


def test_the_checksum_is_of_the_code_and_of_nothing_else():
    """A better sentence needs no new run; a changed number does, whether the file is split into lines or not."""
    notebook = a_notebook("x = 1\ny = 2")
    before, changed = run.checksum(notebook), copy.deepcopy(notebook)
    changed["cells"][1]["source"], changed["cells"][0]["outputs"], changed["metadata"] = ["better"], [{}], {"a": 1}
    changed["cells"][0]["source"] = ["x = 1\n", "y = 2"]
    assert run.checksum(changed) == before
    changed["cells"][0]["source"] = ["x = 1\n", "y = 3"]
    assert run.checksum(changed) != before


@pytest.mark.parametrize("code, output, message", [
    ("1 / 0", dict(output_type="error", ename="ZeroDivisionError", evalue="division by zero"), "failed: ZeroDivisionError"),
    ("f()", dict(output_type="stream", name="stderr", text=["UserWarning: old"]), "wrote to stderr: UserWarning"),
    ("pictures(x, 'title')", dict(output_type="stream", name="stdout", text=["done"]), "gave no picture"),
    ("plt.plot(x)", dict(output_type="display_data", data={"image/png": "WHITE"}), "empty picture")])
def test_broken_outputs_are_found(code, output, message):
    """Each in one line that names the cell."""
    if "data" in output:
        import base64
        import io
        from PIL import Image
        file = io.BytesIO()
        Image.new("RGB", (8, 8), "white").save(file, "png")
        output = output | {"data": {"image/png": base64.b64encode(file.getvalue()).decode()}}
    found, = run.problems(a_notebook(code, output))
    assert found.startswith("code cell 1 ") and message in found


def test_cells_that_download_are_not_judged():
    """They are not run, so that nothing can be said of their outputs."""
    notebook = a_notebook("pictures(x, 'title')")
    notebook["cells"][0]["metadata"] = {"tags": ["download"]}
    assert run.problems(notebook) == []


@pytest.mark.parametrize("code, bad", [("plt.plot(x); plt.title('a'); plt.xlabel('b'); plt.ylabel('c')", False), ("plt.plot(x); plt.title('a'); plt.xlabel('b')", True),
                                       ("ax.set(xlabel='a', ylabel='b', title='c'); plt.subplots()", False), ("plt.subplots()", True),
                                       ("pictures(x, 'title')", False), ("x = 1", False)])
def test_figures_without_labels_are_found(code, bad):
    """In both of matplotlib's ways of saying it."""
    assert badly_labelled(a_notebook(code)["cells"][0]) == bad


@pytest.mark.parametrize("link, broken", [("[`diffusion.py: ddpm_step`](../diffusion.py)", 0), ("[`diffusion.py: Noise.states`](../diffusion.py)", 0),
                                          ("[`diffusion.py: ddpm_leap`](../diffusion.py)", 1), ("[`diffusion.py: guide`](../stage_c.py)", 1),
                                          ("[here](../nowhere.py)", 1), ("[paper](https://arxiv.org/abs/2306.00637)", 0)])
def test_broken_links_are_found(link, broken):
    assert len(broken_links(f"see {link}.")) == broken


# ----- do they run? ------------------------------------------------------------------------------------

@each_notebook
def test_a_notebook_runs_in_a_fresh_kernel(path):
    """As a reader would run it: from top to bottom, in notebooks/, within 3 minutes; and nothing on stderr."""
    for package in ("nbclient", "ipykernel", "matplotlib.pyplot"):       # the last also makes its list of fonts now, not in the kernel
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r notebooks/requirements.txt")
    notebook, seconds = run.execute(path)
    assert run.problems(notebook) == []
    assert seconds < run.SECONDS
