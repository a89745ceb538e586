"""Notebooks are read more often than run, so the stored outputs must be complete and come from the current code.

The last test runs each in a fresh kernel and needs notebooks/requirements.txt. All others only read the files.
"""
import ast
import copy
import functools
import importlib
import inspect
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from loading.errors import UserError
from test_docs import anchors

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROOMS = {package.parent.name for package in ROOT.glob("*/__init__.py")}
# {"wuerstchen": its path, "training.scenes": its path, ...}
OURS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]}
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
    """Local links to files that are not there, and labels that name another file than the link, or what the file does
    not define: `extras/editing.py: generate` (with the whole path), notebook 3. A link to a page names its section."""
    broken = [f"no link: {mention}" for mention in re.findall(r"(?<!\[)\b[Nn]otebook \d", text)]
    for label, target in LINK.findall(text):
        if re.match(r"https?://|#", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / "notebooks" / path).resolve()
        name, number = re.fullmatch(r"`([\w/]+\.py): ([\w.]+)`", label), re.fullmatch(r"[Nn]otebook (\d)", label)
        if not file.exists():
            broken.append(f"there is no {target}")
        elif name and (file != ROOT / name[1] or name[2] not in defined_in(file)):
            broken.append(f"{target} is not {name[1]}, or does not define {name[2]}")
        elif number and not file.name.startswith(f"0{number[1]}_"):
            broken.append(f"{target} is not {label}")
        elif file.suffix == ".md" and (found := anchors(file.read_text())) and anchor not in found:
            broken.append(f"{target} names no section of that page, expected #one of {', '.join(found)}")
    return broken


def unquoted(text: str) -> list[str]:
    """Decimal numbers in a sentence with a link to a section of a page that are not in this section."""
    missing = []
    for sentence in re.split(r"(?<=[.:?])\s", text):
        for path, anchor in re.findall(r"\]\(([\w./-]+\.md)#([\w-]+)\)", sentence):
            page = (ROOT / "notebooks" / path).read_text()
            _, *parts = re.split(r"(?m)^(?=##+ )", page)
            section = next(part for part in parts if anchors(part) == [anchor])
            missing += [f"{number} is not in {path}#{anchor}" for number in re.findall(r"\d+\.\d+", sentence)
                        if number not in section]
    return missing


def sections(notebook: dict) -> list[list[str]]:
    """For each heading "## ..." but the two at the end: its markdown cells."""
    found = []
    for text in markdown_cells(notebook):
        if text.startswith(("## Your turn", "## What you know now")):
            return found
        if text.startswith("## "):
            found.append([text])
        elif found:
            found[-1].append(text)
    return found


def badly_labelled(cell: dict) -> bool:
    """Does a cell draw without saying what? Needs a title, and names for both axes unless it shows images."""
    code = run.source(cell)
    if not (run.DRAWS.search(code) or run.images_of(cell)):
        return False
    axes = all(re.search(rf"\b(set_)?{axis}\(|\b{axis}=", code) for axis in ("xlabel", "ylabel"))
    finished = [len(node.args) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "finish"]
    return not (re.search(r"\b(img_grid|activations)\(", code) or 3 in finished
                or axes and (re.search(r"title", code) or finished))


# ----- what cells call, though nobody runs them ------------------------------------------------------
# Cells tagged "download" need the official weights. Without these one cannot show that they would run, but one can show
# that every name in them exists. All other cells are checked as well: it must be true of them, because they run.

class Missing(Exception):
    """A name that our files do not have."""


def imported(tree: ast.AST) -> dict:
    """Name -> module, function or class of ours, by the import statements. Raises Missing."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names
                      if alias.name in OURS}
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:          # from loading import hub
            for alias in node.names:
                if f"{node.module}.{alias.name}" not in OURS:
                    raise Missing(f"{node.module}/ has no {alias.name}.py")
                names[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.ImportFrom) and node.module in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    raise Missing(f"{node.module} has no {alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ROOMS:
            raise Missing(f"there is no {node.module}")
    return names


def resolve(node: ast.AST, names: dict):
    """The meaning of an expression such as `hub.fetch` or `model.decode`; None if it is not ours. Raises Missing."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = resolve(node.value, names) if isinstance(node, ast.Attribute) else None
    if owner is None:
        return None
    kind = owner if isinstance(owner, (type, types.ModuleType)) else type(owner)
    if hasattr(owner, node.attr):
        return getattr(owner, node.attr)
    if isinstance(kind, type) and re.search(rf"\bself\.{node.attr}\b", inspect.getsource(kind)):
        return None                                                      # set in __init__
    loading = OURS["loading.pipeline"].read_text()
    if kind.__name__ == "Wuerstchen" and re.search(rf"\bmodel\.{node.attr}\b.* = ", loading):
        return None                                                      # set by Wuerstchen.load
    raise Missing(f"{kind.__name__} has no {node.attr}")


def blank_objects(tree: ast.AST, names: dict) -> dict:
    """Variable -> an object of our class that it is given, by `x = Class(...)` or `x = Wuerstchen.load(...)`, without
    __init__."""
    found = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        target, value = node.targets[0], node.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        for name, given in zip(target.elts, value.elts) if several else [(target, value)]:
            made = resolve(given.func, names) if isinstance(given, ast.Call) else None
            if getattr(made, "__name__", "") == "load" and isinstance(getattr(made, "__self__", None), type):
                made = made.__self__
            if isinstance(name, ast.Name) and isinstance(made, type):
                found[name.id] = object.__new__(made)
    return found


def keywords_of(function) -> set[str] | None:
    """The keywords that a function with **options takes because it passes them to another; None if it is not known."""
    from extras.editing import generate, interpolate, reconstruct
    from loading.layouts import ONE_FOLDER
    from loading.pipeline import load
    from wuerstchen import Sampling, Wuerstchen

    def own(f) -> set[str]:
        return {name for name, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}
    sampling = {f"{name}_{stage}" for name in own(Sampling) for stage in "cb"}
    all_of = {Wuerstchen.__call__: sampling, Wuerstchen.load.__func__: own(load) | {*ONE_FOLDER}, generate: sampling,
              reconstruct: own(generate) | sampling, interpolate: own(generate) | sampling}
    passed_on = all_of.get(getattr(function, "__func__", function))
    return None if passed_on is None else own(function) | passed_on


def check_arguments(call: ast.Call, function) -> None:
    """Raises Missing or TypeError for a keyword that neither the function nor the one it passes them to takes."""
    signature = inspect.signature(function)
    if not isinstance(function, type) and not hasattr(function, "__name__"):             # an object, like a Wuerstchen
        function = type(function).__call__
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    open_ended = any(isinstance(arg, ast.Starred) for arg in call.args) or any(k.arg is None for k in call.keywords)
    bind = signature.bind_partial if open_ended else signature.bind
    bind(*[None] * sum(not isinstance(arg, ast.Starred) for arg in call.args), **keywords)
    known = keywords_of(function)
    for keyword in sorted(keywords.keys() - known) if known is not None else ():
        raise Missing(f"{function.__name__}() has no argument {keyword}")


def check_options(parse_args, argv: list[str]) -> None:
    """Raises Missing if a script does not take these options."""
    try:
        parse_args(argv)
    except UserError:
        raise Missing(f"{parse_args.__module__}.py does not take {shlex.join(argv)}") from None


def wrong_calls(code: str) -> list[str]:
    """What the code uses of our files although they do not have it. Options of scripts as well, if given as text."""
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
            text = re.match(r"'(.*?)'\.split\(\)", ast.unparse(node.args[0])) if node.args else None
            if getattr(function, "__name__", "") == "parse_args" and text:
                check_options(function, text[1].replace("\\n", " ").split())
        except (Missing, TypeError) as error:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)[:80]}: {error}")
    return wrong


def script_of(target: str) -> str | None:
    """The module behind `python {target}` or `python -m {target}`, None for notebooks/run.py. Raises Missing."""
    name = target.removesuffix(".py")
    if name != target and name.split("/")[0] in ROOMS:
        raise Missing(f"it is run as python -m {name.replace('/', '.')}")
    if name != target and "/" in name:                                   # notebooks/run.py
        if not (ROOT / target).exists():
            raise Missing("there is no such script")
        return None
    for module in (name, f"{name}.__main__"):
        if module in OURS:
            return module
    raise Missing("there is no such script")


def wrong_commands(text: str) -> list[str]:
    """Commands in the text, in a block or within a line, that would not be understood: `python NAME.py ...`,
    `python -m ROOM.NAME ...`, `torchrun NAME.py ...`."""
    wrong = []
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
             for line in block.replace("\\\n", " ").splitlines()]
    program = r"(?:python(?: -m)?|torchrun(?: --nproc-per-node \d+)?)"
    for line in lines + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        command = re.match(rf"{program} ([\w/]+\.py|[\w.]+)(.*)", line.strip())
        try:
            module = script_of(command[1]) if command else None
            script = importlib.import_module(module) if module else None
            if hasattr(script, "parse_args"):
                check_options(script.parse_args, shlex.split(command[2], comments=True))
        except Missing as error:
            wrong.append(f"{line.strip()[:80]}: {error}")
    return wrong


# ----- what is in the files ---------------------------------------------------------------------------

@each_notebook
def test_committed_outputs_belong_to_the_present_code(path):
    """Otherwise a reader sees an image that the code above it never drew."""
    notebook = read(path)
    assert notebook["metadata"].get("checksum") == run.checksum(notebook), f"run: python notebooks/run.py {path.name}"
    assert all(cell["outputs"] or not run.DRAWS.search(run.source(cell)) or "download" in run.tags(cell)
               for cell in run.code_cells(notebook))


@each_notebook
def test_committed_outputs_are_whole_and_small(path):
    """No error, no warning, no empty image; and a repository is not a place for megabytes."""
    assert run.problems(read(path)) == []
    assert path.stat().st_size < run.BYTES


@each_notebook
def test_a_notebook_starts_with_its_title(path):
    """In a list of files and on the web, that is what the reader sees first."""
    first = read(path)["cells"][0]
    assert first["cell_type"] == "markdown" and run.source(first).startswith("# ")


@each_notebook
def test_every_figure_says_what_it_shows(path):
    """Title and axis labels; images a title."""
    unclear = [run.source(cell) for cell in run.code_cells(read(path)) if badly_labelled(cell)]
    assert not unclear, unclear[0]


@each_notebook
def test_code_cells_are_short(path):
    """One idea, one cell: 15 lines at most, of at most 100 characters, with one statement each; no loop hidden in a
    text that is built within a call. Figures end in one call."""
    for cell in run.code_cells(read(path)):
        code, tree = run.source(cell), ast.parse(run.source(cell))
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        hidden = [inner for call in ast.walk(tree) if isinstance(call, ast.Call) for text in ast.walk(call)
                  if isinstance(text, ast.JoinedStr) for inner in ast.walk(text)
                  if isinstance(inner, (ast.ListComp, ast.GeneratorExp))]
        assert len(code.splitlines()) <= 15 and max(map(len, code.splitlines())) <= 100, code
        assert len(lines) == len(set(lines)) and not hidden and "plt.show" not in code, code


@each_notebook
def test_names_that_are_imported_are_used(path):
    """In what is run or shown, solutions included."""
    code = [run.source(cell) for cell in run.code_cells(read(path))] + run.solutions(read(path))
    tree = ast.parse("\n".join(code))
    names = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert names <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@each_notebook
def test_a_notebook_runs_on_colab_or_says_what_is_missing(path, tmp_path, monkeypatch):
    """The first code cell is the same everywhere; without the rest of the repository it ends in one line."""
    first, *others = [run.source(cell) for cell in run.code_cells(read(path))]
    setup = "\n".join(others[:[cell["cell_type"] for cell in read(path)["cells"][2:]].index("markdown")])
    lines = {line for node in ast.parse(setup).body if not isinstance(node, (ast.Import, ast.ImportFrom))
             for line in range(node.lineno, node.end_lineno + 1)}
    assert len(first.splitlines()) <= 7 and len(lines) <= 3, "one helper: notebooks/show.py"
    assert first == run.source(run.code_cells(read(FILES[0]))[0])
    assert f"colab.research.google.com/github/OWNER/wuerstchen/blob/main/notebooks/{path.name})" in \
        run.source(read(path)["cells"][0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="needs the whole repository: clone it"):
        exec(first, {})
    ran = []
    monkeypatch.setattr("os.system", lambda command: ran.append(command))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    (tmp_path / "wuerstchen" / "notebooks").mkdir(parents=True)                           # what git would make
    exec(first, {})
    assert [command.split()[0] for command in ran] == ["git", "pip"] and Path.cwd().parent.name == "wuerstchen"


@each_notebook
def test_a_reader_predicts_first_and_works_in_the_end(path):
    """Each section asks before it shows; then two tasks with the figure to reach, three lines, and the next number."""
    notebook = read(path)
    for cells in sections(notebook):
        reading = cells[0].startswith(("## Glossary", "## The whole way"))
        assert reading or "**Before you run this:**" in "".join(cells), cells[0]
    tasks, know = markdown_cells(notebook)[-2:]
    assert tasks.startswith("## Your turn") and len(re.findall("Figures? to reach", tasks)) == 2
    assert ["assert" in code for code in run.solutions(notebook)] == [True, True]
    assert know.startswith("## What you know now") and len(re.findall(r"(?m)^- ", know)) == 3
    number = int(path.name[:2])
    follows = [other.name for other in FILES if int(other.name[:2]) == number + 1]
    assert "Next: " in know and LINK.findall(know.split("Next: ")[1])[:1] == [(f"notebook {number + 1}", name)
                                                                           for name in follows] or not follows


@each_notebook
def test_images_have_a_description(path):
    """For readers who cannot see them, and for those who search."""
    for cell in run.code_cells(read(path)):
        for output in (output for output in cell["outputs"] if "image/png" in output.get("data", {})):
            assert len(output["metadata"]["image/png"]["alt"]) > 10
    for text in markdown_cells(read(path)):
        assert not re.search(r"!\[\]\(", text)


@each_notebook
def test_notebooks_use_our_code_and_never_redefine_it(path):
    """What is shown must be what runs in training and sampling, not a copy that may have drifted."""
    tree = ast.parse("\n".join(run.source(cell) for cell in run.code_cells(read(path))))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported & OURS.keys(), "nothing is imported from our files"
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    taken = set().union(*map(defined_in, OURS.values()))
    assert not own & taken, f"defined again: {own & taken}"
    assert not any(isinstance(node, ast.ClassDef)
                   for node in ast.walk(tree)), "networks and other classes belong into our files"


@each_notebook
def test_every_section_ends_with_a_question_and_a_folded_answer(path):
    """Reading along is easy; a question shows whether it was understood."""
    parts = sections(read(path))
    assert parts
    for cells in parts:
        text, heading = cells[-1], cells[0].splitlines()[0]
        assert all(part in text for part in ("**Question", "<details>", "<summary>", "</details>")), heading
        assert text.index("**Question") < text.index("<details>")


@each_notebook
def test_links_lead_to_files_and_functions_that_exist(path):
    """A renamed function, section or figure must be renamed in the text as well."""
    text = "\n".join(markdown_cells(read(path)))
    assert broken_links(text) == [] and unquoted(text) == []


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
    """A reader without weights must see at once which cells to skip, and each section must have another that runs."""
    notebook, section = read(path), []
    for cell in [*notebook["cells"], {"cell_type": "markdown", "source": "## end", "metadata": {}}]:
        if cell["cell_type"] == "markdown" and run.source(cell).startswith("## "):
            downloads = [cell for cell in section if "download" in run.tags(cell)]
            assert all(run.source(cell).startswith("# needs the official weights") for cell in downloads)
            assert not downloads or len(downloads) < len(section), run.source(downloads[0])
            section = []
        elif cell["cell_type"] == "code":
            section.append(cell)


def test_the_lessons_follow_the_prompt_of_the_first_command():
    """One example everywhere: what a reader has generated is what is taken apart."""
    prompt = re.search('sample.py --prompt "(.*?)"', (ROOT / "README.md").read_text())[1]
    users = {path.name[:2] for path in FILES if any(prompt in run.source(cell) for cell in run.code_cells(read(path)))}
    assert {"01", "02", "04", "06", "08"} <= users


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
    ("img_grid(x, 'title')", dict(output_type="stream", name="stdout", text=["done"]), "its output has no image"),
    ("plt.plot(x)", dict(output_type="display_data", data={"image/png": "WHITE"}), "drew an empty image")])
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


def a_png(*values: int, low: int = 0) -> str:
    import base64
    import io
    from PIL import Image
    image, file = Image.new("L", (100, 10), low), io.BytesIO()
    image.putdata([*values] + [low] * (1000 - len(values)))
    image.convert("RGB").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("new, message", [
    (dict(text="loss 0.5 after 13.7 s"), None), (dict(text="loss 0.6 after 12 s"), "printed 'loss 0.6"),
    (dict(png=a_png(*[3] * 10)), None), (dict(png=a_png(*[3] * 11)), "98.9% is as stored"),
    (dict(png=a_png(low=2)), None), (dict(png=a_png(low=3)), "0.0% is as stored"),
    (dict(png=None), "another number or size")])
def test_a_stale_output_is_found(new, message):
    """Times may differ; values of an image by 2 of 255, and one in a hundred by more."""
    def notebook(text="loss 0.5 after 12 s", png=a_png()):
        image = dict(output_type="display_data", data={"image/png": png, "text/plain": "a"} if png else {})
        return a_notebook("f()", dict(output_type="stream", name="stdout", text=[text]), image)
    found = run.differences(notebook(), notebook(**new))
    if message is None or "png" in new and new["png"] is None:
        found = [line for line in found if "printed" not in line]
    assert (message is None and found == []) or (len(found) == 1 and message in found[0])


def test_large_images_shrink_and_still_count_as_what_was_drawn():
    """A photo of noise, 300 x 200: rounding must stay within the tolerance of the comparison."""
    import base64
    import io
    import numpy as np
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype="uint8")).save(file, "png")
    stored = run.smaller(file.getvalue())
    pair = [a_notebook("f()", dict(output_type="display_data", data={"image/png": base64.b64encode(png).decode()}))
            for png in (stored, file.getvalue())]
    assert len(stored) < 0.9 * len(file.getvalue()) and run.differences(*pair) == []


def test_a_cell_over_its_time_limit_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """Not in a traceback of the client."""
    nbformat = pytest.importorskip("nbformat",
                                   reason="nbformat is not installed: pip install -r notebooks/requirements.txt")
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r notebooks/requirements.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r notebooks/requirements.txt")
    cells = [nbformat.v4.new_code_cell("import time; time.sleep(60)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    monkeypatch.setattr(run, "WAIT", 1)
    monkeypatch.setattr(run, "HERE", tmp_path)
    with pytest.raises(SystemExit) as error:
        run.main(["a.ipynb"])
    assert str(error.value) == ("a.ipynb is unchanged: a cell takes longer than 1 s, make it do less: "
                                "import time; time.sleep(60)")


def test_a_folded_solution_is_run_and_leaves_nothing_behind(tmp_path):
    """After the last cell, with its variables; a wrong figure in it stops the run."""
    nbformat = pytest.importorskip("nbformat",
                                   reason="nbformat is not installed: pip install -r notebooks/requirements.txt")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: see notebooks/requirements.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r notebooks/requirements.txt")
    for figure in (4, 5):
        text = f"<details><summary>Solution</summary>\n\n```python\nassert x == {figure}\n```\n</details>"
        cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("x = 4")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
        if figure == 4:
            assert len(run.execute(tmp_path / "a.ipynb")[0]["cells"]) == 2
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        run.execute(tmp_path / "a.ipynb")


def test_cells_that_download_are_not_judged():
    """They are not run, so that nothing can be said of their outputs."""
    notebook = a_notebook("img_grid(x, 'title')")
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


LOAD = """from extras.editing import InitImage, generate, reconstruct
from wuerstchen import Wuerstchen
model, n = Wuerstchen.load('v2'), 1
"""


@pytest.mark.parametrize("code, message", [
    ("from wuerstchen import Wurst", "wuerstchen has no Wurst"), ("from loading import hug", "loading/ has no hug.py"),
    ("from training.scene import render", "there is no training.scene"),
    ("from loading import hub\nhub.fetsch('v2')", "has no fetsch"),
    ("from loading import hub\nprint(hub.REKONSTRUCTION)", "has no REKONSTRUCTION"),
    ("from wuerstchen import Wuerstchen\nWuerstchen.lod('v2')", "has no lod"),
    ("from wuerstchen import Wuerstchen\nWuerstchen.load('v2', low_mem=True)", "no argument low_mem"),
    (LOAD + "model('a fox', guidance=4.0)", "no argument guidance"), (LOAD + "model.loras_of", "has no loras_of"),
    (LOAD + "model(init='photo.jpg', prompt='a')", "no argument init"),
    (LOAD + "reconstruct(model, 'photo.jpg', prompts='a')", "no argument prompts"),
    (LOAD + "reconstruct(model)", "missing a required argument"),
    (LOAD + "generate(model, 'a', steps=3)", "no argument steps"),
    (LOAD + "model(*['a'], sead=1)", "sead"),
    ("import train_c\ntrain_c.parse_args('--data a --out b --rang 8'.split())", "does not take"),
    ("from stage_c import StageC\nStageC(depht=3)", "depht")])
def test_calls_of_what_does_not_exist_are_found(code, message, capsys):
    """A renamed function, argument or option leaves its old name in cells that nobody runs."""
    found = wrong_calls(code)
    assert len(found) >= 1 and message in found[0]


@pytest.mark.parametrize("code", [
    LOAD + "model.part('stage_a').decode(model.paths)",
    LOAD + "model('a', steps_c=3, guidance_b=1.0, seed=1, **options)",
    LOAD + "generate(model, edit=InitImage('a.jpg', strength=0.5), steps_c=3)",
    LOAD + "reconstruct(model, 'a.jpg', seed=1)",
    "from wuerstchen import Wuerstchen\nWuerstchen.load('v2', prior='x', lora={'y': 1.0})",
    "import train_c\ntrain_c.main(train_c.parse_args('--data a --out b --lora'.split()))",
    "import numpy\nnumpy.nothing(a=1)"])
def test_calls_of_what_exists_are_not_complained_about(code):
    """A check that cries wolf is soon switched off."""
    assert wrong_calls(code) == []


@pytest.mark.parametrize("text, wrong", [
    ("```\npython train_a.py --out a \\\n    --steps 5\n```", 0),
    ("```\npython train_a.py --out a \\\n    --stebs 5\n```", 1),
    ("`python nothing.py`", 1), ("`python sample.py --help`", 0), ("`python notebooks/run.py`", 0), ("`--steps 3`", 0),
    ("`python -m tools.lora merge`", 0), ("`python -m tools.nothing`", 1), ("`python -m tools.bench`", 0),
    ("`python -m tiny.evaluate --prompts 3`", 0), ("`python -m tiny.evaluate --promts 3`", 1),
    ("`python tiny/evaluate.py`", 1), ("`python notebooks/walk.py`", 1),
    ("```\ntorchrun --nproc-per-node 8 train_c.py --data 'a/{0..3}.tar' --out c   # comment\n```", 0)])
def test_wrong_commands_are_found(text, wrong, capsys):
    """In blocks, over several lines, and within a line."""
    assert len(wrong_commands(text)) == wrong


@pytest.mark.parametrize("code, bad", [("plt.plot(x); plt.title('a'); plt.xlabel('b'); plt.ylabel('c')", False),
                                       ("plt.plot(x); plt.title('a'); plt.xlabel('b')", True),
                                       ("ax.set(xlabel='a', ylabel='b', title='c'); plt.subplots()", False),
                                       ("plt.subplots()", True),
                                       ("img_grid(x, 'title')", False), ("x = 1", False)])
def test_figures_without_labels_are_found(code, bad):
    """In both of matplotlib's ways of saying it."""
    assert badly_labelled(a_notebook(code)["cells"][0]) == bad


@pytest.mark.parametrize("link, broken", [
    ("[`wuerstchen.py: ddpm_step`](../wuerstchen.py)", 0), ("[`wuerstchen.py: Wuerstchen.load`](../wuerstchen.py)", 0),
    ("[`extras/editing.py: generate`](../extras/editing.py)", 0), ("[`editing.py: generate`](../extras/editing.py)", 1),
    ("[`wuerstchen.py: ddpm_leap`](../wuerstchen.py)", 1), ("[`wuerstchen.py: guide`](../stage_c.py)", 1),
    ("[notebook 3](03_stage_a_vqgan.ipynb)", 0), ("[notebook 4](03_stage_a_vqgan.ipynb)", 1), ("notebook 5", 1),
    ("[README](../README.md)", 1), ("[README](../README.md#use-it)", 0), ("[README](../README.md#nothing)", 1),
    ("[breaks](../docs/WHAT_BREAKS.md)", 0), ("[here](../nowhere.py)", 1),
    ("[paper](https://arxiv.org/abs/2306.00637)", 0)])
def test_broken_links_are_found(link, broken):
    assert len(broken_links(f"see {link}.")) == broken


@pytest.mark.parametrize("number, missing", [("7.30", 0), ("7.4", 1)])
def test_a_number_that_its_page_does_not_have_is_found(number, missing):
    assert len(unquoted(f"It is 9.99. It takes {number} GB, see [it](../docs/FINETUNE.md#memory-and-time).")) == missing


# ----- do they run? ------------------------------------------------------------------------------------

@each_notebook
def test_a_notebook_runs_in_a_fresh_kernel(path):
    """As a reader would run it: from top to bottom, in notebooks/; nothing on stderr.
    Then what it shows is what is stored: a changed example, weight or figure leaves no notebook stale."""
    # the last also makes its list of fonts now, not in the kernel
    for package in ("nbclient", "ipykernel", "matplotlib.pyplot"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -r notebooks/requirements.txt")
    notebook, _ = run.execute(path)                      # notebooks/run.py prints the seconds: no test decides by time
    assert run.problems(notebook) == []
    assert run.differences(read(path), notebook) == [], f"run: python notebooks/run.py {path.name}"


# ----- docs/WHAT_BREAKS.md ---------------------------------------------------------------------------------

def pixels(name: str):
    import numpy as np
    from PIL import Image
    return np.asarray(Image.open(ROOT / "docs" / "breaks" / f"{name}.png").convert("RGB"), dtype=int)


def test_the_page_of_mistakes_shows_each_and_is_not_stale():
    """Every mistake has its row and an image that differs; the first row is what the weights generate today."""
    import numpy as np
    spec = importlib.util.spec_from_file_location("what_breaks", ROOT / "notebooks" / "what_breaks.py")
    breaks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(breaks)
    shown = re.findall(r"\]\(breaks/(\w+)\.png\)", (ROOT / "docs" / "WHAT_BREAKS.md").read_text())
    assert sorted(shown) == sorted(breaks.BREAKS)
    for name in shown[1:]:
        assert np.abs(pixels(name) - pixels("right")).mean() > 1, name
    drawn = np.asarray(breaks.draw("right", breaks.Wuerstchen.load("tiny", fast=False)), dtype=int)
    assert (np.abs(drawn - pixels("right")) <= 2).mean() >= 0.99, "run: python notebooks/what_breaks.py"
