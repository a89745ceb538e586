"""Notebooks are read more often than run, so what is committed must be whole, and must be what the code gives today.

The last test runs each in a fresh kernel, and needs notebooks/requirements.txt; all others read the files alone.
"""
import ast
import copy
import functools
import importlib
import inspect
import json
import re
import shlex
import types
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
            names |= {f"{node.name}.{inner.name}" for inner in ast.walk(node) if inner is not node
                      and isinstance(inner, ast.FunctionDef)}
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


# ----- what cells call, though nobody runs them ------------------------------------------------------
# Cells tagged "download" need the official weights. That they would run cannot be shown without these; that they use
# nothing
# which does not exist can. The same is asked of all other cells, where it must be true, as they run.

class Missing(Exception):
    """A name that our files do not have."""


def imported(tree: ast.AST) -> dict:
    """Name -> module, function or class of ours, by the import statements. Raises Missing."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names
                      if alias.name in OURS}
        elif isinstance(node, ast.ImportFrom) and node.module in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise Missing(f"{node.module}.py has no {alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


def resolve(node: ast.AST, names: dict):
    """What an expression such as `hub.fetch` or `model.reconstruct` means, None if it is none of ours. Raises Missing."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = resolve(node.value, names) if isinstance(node, ast.Attribute) else None
    if owner is None:
        return None
    kind = owner if isinstance(owner, (type, types.ModuleType)) else type(owner)
    if node.attr in importlib.import_module("wuerstchen").PARTS:
        return None                                                      # a network, of some class or other
    if hasattr(owner, node.attr):
        return getattr(owner, node.attr)
    if isinstance(kind, type) and re.search(rf"\bself\.{node.attr}\b", inspect.getsource(kind)):
        return None                                                      # set in __init__ or load
    raise Missing(f"{kind.__name__} has no {node.attr}")


def blank_objects(tree: ast.AST, names: dict) -> dict:
    """Variable -> an object of our class that it is given, for `x = Class(...)` and `x = Wuerstchen.load(...)`; never initialised."""
    found = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        target, value = node.targets[0], node.value
        pairs = zip(target.elts,
                    value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
        for name, value in pairs:
            made = resolve(value.func, names) if isinstance(value, ast.Call) else None
            made = made.__self__ if getattr(made, "__name__",
                                            "") == "load" and isinstance(getattr(made, "__self__", None),
                                                                         type) else made
            if isinstance(name, ast.Name) and isinstance(made, type):
                found[name.id] = object.__new__(made)
    return found


def check_arguments(call: ast.Call, function) -> None:
    """Raises Missing or TypeError for a keyword that the function, or what it hands its keywords on to, does not know."""
    from training.report import FILES
    from wuerstchen import Wuerstchen
    signature, name = inspect.signature(function), getattr(function, "__name__", "")
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    open_ended = any(isinstance(arg, ast.Starred)
                     for arg in call.args) or any(keyword.arg is None for keyword in call.keywords)
    (signature.bind_partial if open_ended
     else signature.bind)(*[None] * sum(not isinstance(arg, ast.Starred) for arg in call.args), **keywords)
    further = dict(load=FILES, reconstruct=inspect.signature(Wuerstchen.__call__).parameters,
                   interpolate=inspect.signature(Wuerstchen.__call__).parameters)
    for keyword in keywords.keys() - signature.parameters.keys() if name in further else ():
        if keyword not in further[name]:
            raise Missing(f"{name}() has no argument {keyword}")


def check_options(parse_args, argv: list[str]) -> None:
    """Raises Missing if a script does not take these options."""
    try:
        parse_args(argv)
    except SystemExit as end:
        if end.code:
            raise Missing(f"{parse_args.__module__}.py does not take {shlex.join(argv)}") from None


def wrong_calls(code: str) -> list[str]:
    """What of our files the code uses, but they do not have; options of scripts included, where these are given as text."""
    tree, wrong = ast.parse(code), []
    try:
        names = imported(tree)
    except Missing as error:
        return [str(error)]
    names |= blank_objects(tree, names)
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.Attribute):
                resolve(node, names)
            function = resolve(node.func, names) if isinstance(node, ast.Call) else None
            if function is None or (getattr(function, "__module__", None) or type(function).__module__) not in OURS:
                continue
            check_arguments(node, function)
            if getattr(function, "__name__",
                       "") == "parse_args" and (text := re.match(r"'(.*?)'\.split\(\)", ast.unparse(node.args[0]))):
                check_options(function, text[1].replace("\\n", " ").split())
        except (Missing, TypeError) as error:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)[:80]}: {error}")
    return wrong


def wrong_commands(text: str) -> list[str]:
    """Commands in the text, `python NAME.py ...` in a block or within a line, that would not be understood."""
    wrong = []
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
             for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        command = re.match(r"(?:python|torchrun(?: --nproc-per-node \d+)?) ([\w/]+\.py)(.*)", line.strip())
        if not command:
            continue
        script = ROOT / command[1]
        module = importlib.import_module(script.stem) if script.parent == ROOT and script.exists() else None
        try:
            if not script.exists():
                raise Missing("there is no such script")
            if hasattr(module, "parse_args"):
                check_options(module.parse_args, shlex.split(command[2], comments=True))
        except Missing as error:
            wrong.append(f"{line.strip()[:80]}: {error}")
    return wrong


# ----- what is in the files ---------------------------------------------------------------------------

@each_notebook
def test_committed_outputs_belong_to_the_present_code(path):
    """Otherwise a reader sees a picture that the code above it never drew."""
    notebook = read(path)
    assert notebook["metadata"].get("checksum") == run.checksum(notebook), f"run: python notebooks/run.py {path.name}"
    assert all(cell["outputs"] or not run.DRAWS.search(run.source(cell)) or "download" in run.tags(cell)
               for cell in run.code_cells(notebook))


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
    assert not any(isinstance(node, ast.ClassDef)
                   for node in ast.walk(tree)), "networks and other classes belong into our files"


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


@each_notebook
def test_what_cells_call_exists(path):
    """Names, arguments and options of scripts: of cells that are not run this is all that can be known."""
    assert wrong_calls("\n".join(run.source(cell) for cell in run.code_cells(read(path)))) == []


@each_notebook
def test_commands_in_the_text_are_understood(path):
    """A reader copies them."""
    assert wrong_commands("\n".join(markdown_cells(read(path)))) == []


@each_notebook
def test_cells_that_need_the_official_weights_say_so_and_are_not_alone(path):
    """Who has no weights must see at once which cells to leave out, and must have another that runs, in every section."""
    notebook, section = read(path), []
    for cell in [*notebook["cells"], {"cell_type": "markdown", "source": "## end", "metadata": {}}]:
        if cell["cell_type"] == "markdown" and run.source(cell).startswith("## "):
            downloads = [cell for cell in section if "download" in run.tags(cell)]
            assert all(run.source(cell).startswith("# needs the official weights") for cell in downloads)
            assert not downloads or len(downloads) < len(section), run.source(downloads[0])
            section = []
        elif cell["cell_type"] == "code":
            section.append(cell)


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
    ("1 / 0", dict(output_type="error", ename="ZeroDivisionError", evalue="division by zero"),
     "failed: ZeroDivisionError"),
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


def test_cells_that_download_are_not_run(tmp_path):
    """Here one that would fail; the cell below it is run."""
    nbformat = pytest.importorskip("nbformat",
                                   reason="nbformat is not installed: pip install -r notebooks/requirements.txt")
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r notebooks/requirements.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r notebooks/requirements.txt")
    cells = [nbformat.v4.new_code_cell(code) for code in ("1 / 0", "print('here')")]
    cells[0]["metadata"]["tags"] = ["download"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    notebook, _ = run.execute(tmp_path / "a.ipynb")
    assert [len(cell["outputs"]) for cell in notebook["cells"]] == [0, 1]


LOAD = "from wuerstchen import Wuerstchen\nmodel, n = Wuerstchen.load('v2'), 1\n"


@pytest.mark.parametrize("code, message", [
    ("from wuerstchen import Wurst", "wuerstchen.py has no Wurst"), ("import hub\nhub.fetsch('v2')", "has no fetsch"),
    ("import hub\nprint(hub.REKONSTRUCTION)", "has no REKONSTRUCTION"),
    ("from wuerstchen import Wuerstchen\nWuerstchen.lod('v2')", "has no lod"),
    ("from wuerstchen import Wuerstchen\nWuerstchen.load('v2', low_mem=True)", "no argument low_mem"),
    (LOAD + "model('a fox', guidance=4.0)", "unexpected keyword argument 'guidance'"),
    (LOAD + "model.reconstruct('photo.jpg', prompts='a')", "no argument prompts"),
    (LOAD + "model.reconstruct()", "missing a required argument"), (LOAD + "model.loras_of", "has no loras_of"),
    (LOAD + "model(*['a'], sead=1)", "sead"),
    ("import train_c\ntrain_c.parse_args('--data a --out b --rang 8'.split())", "does not take"),
    ("from stage_c import StageC\nStageC(depht=3)", "depht")])
def test_calls_of_what_does_not_exist_are_found(code, message, capsys):
    """A renamed function, argument or option leaves its old name in cells that nobody runs."""
    found = wrong_calls(code)
    assert len(found) >= 1 and message in found[0]


@pytest.mark.parametrize("code", [LOAD + "model.encode_image(model.stage_a.decode(model.places))",
                                  LOAD + "model(init='a.jpg', strength=0.5, **options)",
                                  LOAD + "model.reconstruct('a.jpg', seed=1)",
                                  "from wuerstchen import Wuerstchen\nWuerstchen.load('v2', prior='x', lora={'y': 1.0})",
                                  "import train_c\ntrain_c.main(train_c.parse_args('--data a --out b --lora'.split()))",
                                  "import numpy\nnumpy.nothing(a=1)"])
def test_calls_of_what_exists_are_not_complained_about(code):
    """A check that cries wolf is soon switched off."""
    assert wrong_calls(code) == []


@pytest.mark.parametrize("text, wrong", [("```\npython train_a.py --out a \\\n    --steps 5\n```", 0),
                                         ("```\npython train_a.py --out a \\\n    --stebs 5\n```", 1),
                                         ("`python nothing.py`", 1), ("`python sample.py --help`", 0),
                                         ("`python -m tools.lora merge`", 0), ("`--steps 3`", 0),
                                         ("```\ntorchrun --nproc-per-node 8 train_c.py --data 'a/{0..3}.tar' --out c   # comment\n```", 0)])
def test_wrong_commands_are_found(text, wrong, capsys):
    """In blocks, over several lines, and within a line."""
    assert len(wrong_commands(text)) == wrong


@pytest.mark.parametrize("code, bad", [("plt.plot(x); plt.title('a'); plt.xlabel('b'); plt.ylabel('c')", False),
                                       ("plt.plot(x); plt.title('a'); plt.xlabel('b')", True),
                                       ("ax.set(xlabel='a', ylabel='b', title='c'); plt.subplots()", False),
                                       ("plt.subplots()", True),
                                       ("pictures(x, 'title')", False), ("x = 1", False)])
def test_figures_without_labels_are_found(code, bad):
    """In both of matplotlib's ways of saying it."""
    assert badly_labelled(a_notebook(code)["cells"][0]) == bad


@pytest.mark.parametrize("link, broken", [("[`diffusion.py: ddpm_step`](../diffusion.py)", 0),
                                          ("[`diffusion.py: Noise.states`](../diffusion.py)", 0),
                                          ("[`diffusion.py: ddpm_leap`](../diffusion.py)", 1),
                                          ("[`diffusion.py: guide`](../stage_c.py)", 1),
                                          ("[here](../nowhere.py)", 1), ("[paper](https://arxiv.org/abs/2306.00637)",
                                                                         0)])
def test_broken_links_are_found(link, broken):
    assert len(broken_links(f"see {link}.")) == broken


# ----- do they run? ------------------------------------------------------------------------------------

@each_notebook
def test_a_notebook_runs_in_a_fresh_kernel(path):
    """As a reader would run it: from top to bottom, in notebooks/, within 3 minutes; and nothing on stderr."""
    # the last also makes its list of fonts now, not in the kernel
    for package in ("nbclient", "ipykernel", "matplotlib.pyplot"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r notebooks/requirements.txt")
    notebook, seconds = run.execute(path)
    assert run.problems(notebook) == []
    assert seconds < run.SECONDS
