"""The shape of the repository: what stands at the top, how long and wide it is, and which room may import which.

A reader should find the story in nine files, and everything else behind a folder's name. Each entry of a failure
names file and line. A limit that stands in the way of a better text may be raised, with the reason in the commit.
"""
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("stage_a.py", "stage_b.py", "stage_c.py")
SCRIPTS = ("sample.py", "train_a.py", "train_b.py", "train_c.py")
TOP = (*STAGES, "lora.py", "wuerstchen.py", *SCRIPTS)
ROOMS = ("speed", "v1", "loading", "extras", "training", "tiny", "tools")
# Imports point to the left only. The files of the first entry import none of the others.
ORDER = ({*STAGES, "lora.py"}, {"wuerstchen.py"}, *({room} for room in ROOMS[:-1]), set(SCRIPTS), {"tools"})
# The one exception, so that Wuerstchen.load exists: it imports the loading code when it is called.
UPWARDS = {("wuerstchen.py", "loading/pipeline.py")}

# What the files have since the move, rounded up. A longer text needs a reason; a shorter one lowers its limit.
# Three lines more in five of them: run by mistake, a file says which one to run.
LINES = {"wuerstchen.py": 511, "stage_a.py": 193, "stage_b.py": 398, "stage_c.py": 247, "lora.py": 530,
         "sample.py": 180, "train_a.py": 420, "train_b.py": 500, "train_c.py": 420, "loading/text_encoder.py": 160}
LINES_OF_NINE, LINES_OF_PRODUCT = 3340, 17_620
WIDTH_OF_NINE, WIDTH = 100, 120
FUNCTION, TRAINING_MAIN, PARAMETERS = 60, 180, 14

PRODUCT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
           for path in sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])}
TREES = {file: ast.parse(text) for file, text in PRODUCT.items()}


# --- files and their size ----------------------------------------------------------------------------

def test_nine_files_stand_at_the_top():
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(TOP)


def test_every_other_python_file_is_in_a_known_room():
    """Rooms have an __init__.py with a docstring, which says what they are about."""
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py") if not path.parts[-2].startswith(".")}
    assert folders <= {*ROOMS, "tests", "notebooks"}
    assert all(ast.get_docstring(TREES[f"{room}/__init__.py"]) for room in ROOMS)


def test_files_keep_their_length():
    """A reader should get through the nine files in an afternoon."""
    lengths = {file: len(text.splitlines()) for file, text in PRODUCT.items()}
    problems = [f"{file} has {lengths[file]} lines, at most {most}"
                for file, most in LINES.items() if lengths.get(file, 0) > most]
    for name, files, most in (("the nine files", TOP, LINES_OF_NINE), ("the product", PRODUCT, LINES_OF_PRODUCT)):
        total = sum(lengths.get(file, 0) for file in files)
        problems += [f"{name}: {total} lines, at most {most}"] * (total > most)
    assert not problems, "\n".join(problems)


def test_lines_keep_their_width():
    """Narrow enough to read two files next to each other."""
    files = {file: (text, WIDTH_OF_NINE if file in TOP else WIDTH) for file, text in PRODUCT.items()}
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")):
        files[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8"), WIDTH
    problems = [f"{file}:{number}: {len(line)} columns, at most {most}" for file, (text, most) in files.items()
                for number, line in enumerate(text.splitlines(), 1) if len(line) > most]
    assert not problems, "\n".join(problems)


def test_functions_fit_on_a_screen_and_take_few_parameters():
    """Longer: the options of a script, declared in one place, and the main of a training script, which tells it all."""
    problems = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                main = node.name == "main" and Path(file).name.startswith("train_")
                most = TRAINING_MAIN if main else FUNCTION
                if length > most and node.name not in ("parse_args", "parser"):
                    problems.append(f"{file}:{node.lineno}: {node.name} has {length} lines, at most {most}")
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                number = len([a for a in arguments if a.arg not in ("self", "cls")])
                if number > PARAMETERS:
                    problems.append(f"{file}:{node.lineno}: {node.name} has {number} parameters, at most {PARAMETERS}")
    assert not problems, "\n".join(problems)


# --- imports -----------------------------------------------------------------------------------------

def imports(node: ast.AST) -> list[tuple[int, str]]:
    """(line, module) of each import below a node; "from a import b" gives a and a.b."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [(child.lineno, alias.name) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import, write the whole name"
            found += [(child.lineno, child.module)]
            found += [(child.lineno, f"{child.module}.{alias.name}") for alias in child.names]
    return found


def files_imported(file: str) -> list[tuple[int, str]]:
    """(line, file of ours) for each import in a file, also inside functions."""
    found = [(line, module.replace(".", "/") + ".py") for line, module in imports(TREES[file])]
    return [(line, other) for line, other in found if other in PRODUCT]


def rank(file: str) -> int:
    """The place in ORDER; a new file at the top counts as a script."""
    room = file.partition("/")[0]
    return next((i for i, group in enumerate(ORDER) if room in group), ORDER.index(set(SCRIPTS)))


def test_imports_point_one_way():
    """Stages, lora < wuerstchen < speed < v1 < loading < extras < training < tiny < the scripts at the top < tools."""
    problems = [f"{file}:{line}: imports {other}, which stands to its right in the order of rooms"
                for file in PRODUCT for line, other in files_imported(file)
                if rank(other) > rank(file) and (file, other) not in UPWARDS]
    problems += [f"{file}:{line}: imports {other}, but must work when copied alone"
                 for file in ORDER[0] for line, other in files_imported(file)]
    assert not problems, "\n".join(problems)


def test_the_pipeline_imports_loading_code_only_when_it_loads():
    found = {(line, other) for line, other in files_imported("wuerstchen.py")}
    load = next(node for node in ast.walk(TREES["wuerstchen.py"])
                if isinstance(node, ast.FunctionDef) and node.name == "load")
    outside = [f"wuerstchen.py:{line}: imports {other}" for line, other in found
               if not load.lineno <= line <= load.end_lineno]
    assert not outside, "\n".join(outside)


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count as well: there a circle would run, but hide what depends on what."""
    done, path = set(), []

    def visit(file: str) -> None:
        if file in path:
            pytest.fail("circle: " + " -> ".join([*path[path.index(file):], file]))
        if file not in done:
            path.append(file)
            for _, other in files_imported(file):
                if other != file and (file, other) not in UPWARDS:     # a script may import itself to run main
                    visit(other)
            done.add(path.pop())
    for file in PRODUCT:
        visit(file)


@pytest.mark.parametrize("file, allowed", [
    *((file, {"torch"}) for file in (*STAGES, "lora.py")), ("wuerstchen.py", {"torch", "numpy", "PIL", "tqdm"})])
def test_files_to_copy_need_few_packages(file, allowed):
    """At module level. A function may import what only it needs, such as torchvision or safetensors."""
    allowed = allowed | set(sys.stdlib_module_names)
    inside = {line for node in ast.walk(TREES[file]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
              for line in range(node.lineno, node.end_lineno + 1)}
    problems = [f"{file}:{line}: imports {module}" for line, module in imports(TREES[file])
                if line not in inside and module.partition(".")[0] not in allowed]
    assert not problems, "\n".join(problems)


# --- scripts -----------------------------------------------------------------------------------------

def module_of(file: str) -> str:
    """The name after `python -m`."""
    return file.removesuffix(".py").removesuffix("/__main__").replace("/", ".")


def is_script(tree: ast.Module) -> bool:
    """Whether a file runs by itself; `and not __package__` only finds our other files."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
               and not isinstance(node.body[0], ast.Raise) for node in tree.body)


ALL_SCRIPTS = [file for file, tree in TREES.items() if is_script(tree)]
HELP = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(json.dumps([end.code, sorted({"torch", "torchvision", "transformers", "diffusers"} & sys.modules.keys())]))
"""


def test_the_scripts_are_found():
    """Guards the tests below: a search that finds nothing would pass."""
    known = {*SCRIPTS, "loading/hub.py", "tools/weights.py", "tools/bench/__main__.py", "tiny/evaluate.py"}
    assert known <= set(ALL_SCRIPTS)


@pytest.mark.parametrize("file", ALL_SCRIPTS)
def test_help_imports_no_torch(file):
    """Importing torch takes seconds, and help should appear at once."""
    run = subprocess.run([sys.executable, "-c", HELP, module_of(file)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [0, []] and "usage: " in run.stdout


@pytest.mark.parametrize("file", [*STAGES, "lora.py", "wuerstchen.py"])
def test_a_file_with_nothing_to_run_says_so_in_one_line(file):
    run = subprocess.run([sys.executable, file, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "" and len(run.stderr.splitlines()) == 1
    assert file in run.stderr and "python sample.py --help" in run.stderr


@pytest.mark.parametrize("file", ["train_a.py", "train_b.py", "train_c.py"])
def test_help_of_training_starts_with_the_everyday_options(file):
    run = subprocess.run([sys.executable, file, "--help"], cwd=ROOT, capture_output=True, text=True)
    text = run.stdout
    assert text.startswith(f"usage: python {file} --data DATA --out OUT [options]\n")
    everyday = text[text.index("used most:"):text.index("\nmodel:")]
    assert all(f"  {name}" in everyday for name in ("--data", "--out", "--steps", "--lr", "--batch", "--resume"))
    assert text.count("\n  --steps ") == 1


@pytest.mark.parametrize("file", [file for file in ALL_SCRIPTS if "/" in file])
def test_a_script_in_a_room_can_be_run_by_its_path(file, tmp_path):
    """In any folder. Python puts the script's own folder on the path, in which our other files are not."""
    run = subprocess.run([sys.executable, ROOT / file, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith(f"usage: python -m {module_of(file)} "), run.stderr


@pytest.mark.parametrize("file", [file for file in PRODUCT if file not in ALL_SCRIPTS])
def test_where_there_is_nothing_to_run_nothing_happens(file):
    """Such a file only defines things, so `python -m loading.files --help` ends at once, as with Python's modules."""
    defines = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    others = [node for node in TREES[file].body if not isinstance(node, defines)]
    assert ast.get_docstring(TREES[file]) and others.pop(0) is TREES[file].body[0]
    allowed = ("if __name__ == '__main__':\n    raise SystemExit", "if TYPE_CHECKING:", "try:\n    import fcntl",
               "library.")
    assert not [ast.unparse(node) for node in others if not ast.unparse(node).startswith(allowed)]
