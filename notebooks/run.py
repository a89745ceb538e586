"""Executes notebooks in place, in a fresh kernel, and stores a checksum of the code next to its outputs.

  python notebooks/run.py                        # all of them, 5 minutes
  python notebooks/run.py 04_diffusion.ipynb     # one

The notebooks are committed with their images, so that they can be read without running them. A changed code cell makes
its outputs stale: tests/test_notebooks.py compares the checksum and asks for this script. Text may change freely.
Cells tagged "download" are not run; they keep their old outputs. The folded solutions of "Your turn" are run after the
last cell: each ends with an assert. tests/test_notebooks.py runs all of it again and compares: see `differences`.
Needs: notebooks/requirements.txt; `checksum` and `problems` need nothing, so they can be tested everywhere.
"""
import argparse
import base64
import hashlib
import io
import json
import re
import resource
import sys
from pathlib import Path

HERE = Path(__file__).parent
WAIT, BYTES = 300, 2_400_000  # limits: seconds of a cell, size of a notebook on disk
# a cell whose output must contain an image
DRAWS = re.compile(r"\b(img_grid|activations)\(|\bplt\.(subplots|figure|plot|scatter|bar|imshow|hist)\(")
SOLUTION = re.compile(r"<summary>Solution</summary>\n\n```python\n(.*?)```", re.DOTALL)
TIME = re.compile(r" *\d+(\.\d+)? ?(ms|s|seconds|minutes)\b")                 # what may differ in a text


def source(cell: dict) -> str:
    """A cell's text: a list of lines on disk, one string in nbformat."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def checksum(notebook: dict) -> str:
    """Checksum of the code cells only: text may be improved without running anything again."""
    return hashlib.sha256(json.dumps([source(cell) for cell in code_cells(notebook)]).encode()).hexdigest()[:16]


def solutions(notebook: dict) -> list[str]:
    """The code of the folded solutions."""
    return [code for cell in notebook["cells"] if cell["cell_type"] == "markdown"
            for code in SOLUTION.findall(source(cell))]


def text_of(cell: dict) -> str:
    """All that a code cell printed, and the descriptions of its images; times are left out."""
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell["outputs"]]
    return TIME.sub("TIME", "\n".join("".join(text).strip() for text in texts))


def images_of(cell: dict) -> list[bytes]:
    """The images that a code cell output, as PNG files."""
    found = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
    return [base64.b64decode("".join(data)) for data in found]


def is_blank(png: bytes) -> bool:
    """Every pixel the same: nothing was drawn."""
    from PIL import Image
    return all(low == high for low, high in Image.open(io.BytesIO(png)).convert("RGB").getextrema())


def problems(notebook: dict) -> list[str]:
    """The problems of a notebook's outputs, one line each; empty if all is well."""
    found = []
    for i, cell in enumerate(code_cells(notebook), start=1):
        if "download" in tags(cell):
            continue
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"code cell {i} failed: {output['ename']}: {output['evalue']}")
            if output.get("name") == "stderr":
                found.append(f"code cell {i} wrote to stderr: {''.join(output['text']).strip()[:200]}")
        images = images_of(cell)
        if DRAWS.search(source(cell)) and not images:
            found.append(f"code cell {i} draws, but its output has no image")
        if any(is_blank(png) for png in images):
            found.append(f"code cell {i} drew an empty image")
    return found


def differences(stored: dict, fresh: dict) -> list[str]:
    """What a new run shows that the stored one does not, one line each. Texts must be equal but for times; images have
    99 % of their values within 2 of 255, because torch and matplotlib are not pinned."""
    import numpy as np
    from PIL import Image
    found = []
    for i, (old, new) in enumerate(zip(code_cells(stored), code_cells(fresh)), start=1):
        if "download" in tags(new):
            continue
        if text_of(old) != text_of(new):
            found.append(f"code cell {i} printed {text_of(new)[:200]!r}, stored is {text_of(old)[:200]!r}")
        pairs = [[np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int) for png in pair]
                 for pair in zip(images_of(old), images_of(new))]
        if len(images_of(old)) != len(images_of(new)) or any(a.shape != b.shape for a, b in pairs):
            found.append(f"code cell {i} drew another number or size of images than are stored")
            continue
        near = min(((abs(a - b) <= 2).mean() for a, b in pairs), default=1)
        if near < 0.99:
            found.append(f"code cell {i} drew an image of which {near:.1%} is as stored, expected 99 %")
    return found


def execute(path: Path):
    """-> (nbformat's notebook with the outputs of a fresh kernel, its CPU seconds). Raises nbclient's errors."""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    cells = len(notebook["cells"])
    notebook["cells"] += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = NotebookClient(notebook, timeout=WAIT, kernel_name="python3", skip_cells_with_tag="download",
                            coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    del notebook["cells"][cells:]
    return notebook, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def smaller(png: bytes) -> bytes:
    """Large images, which show noise, with values rounded to multiples of 5: half of the size, no visible difference,
    and still within 2 of the values of a new run."""
    from PIL import Image
    if len(png) < 100_000:
        return png
    file = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB").point(lambda value: (value + 2) // 5 * 5)
    image.save(file, "png", optimize=True)
    return min(png, file.getvalue(), key=len)


def tidy(notebook: dict) -> None:
    """Makes images smaller, and removes what differs between runs or machines, so that git shows only real changes."""
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                            "language_info": {"name": "python"}, "checksum": checksum(notebook)}
    for cell in notebook["cells"]:
        cell["metadata"] = {"tags": tags(cell)} if tags(cell) else {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = base64.b64encode(smaller(base64.b64decode("".join(data["image/png"])))).decode()


def main(names: list[str]) -> None:
    for name in names:
        if not (HERE / name).is_file():
            sys.exit(f"{name} is not a notebook in {HERE.name}/; give names of files there, or none for all of them")
    try:
        import nbformat
        from nbclient.exceptions import CellExecutionError, CellTimeoutError
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; run `pip install -r notebooks/requirements.txt`")
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        try:
            notebook, seconds = execute(path)
        except CellExecutionError as error:
            sys.exit(f"{path.name} is unchanged:\n{error}")
        except CellTimeoutError as error:
            cell = str(error).partition("cell contents:")[2].strip(" -\n").partition("\n")[0]
            sys.exit(f"{path.name} is unchanged: a cell takes longer than {WAIT} s, make it do less: {cell}")
        found = problems(notebook)
        tidy(notebook)
        text = nbformat.writes(notebook) + "\n"
        if len(text) > BYTES:
            found.append(f"it would have {len(text) / 1e6:.1f} MB, the limit is {BYTES / 1e6:g}: draw fewer or smaller "
                         "images")
        if found:
            sys.exit(f"{path.name} is unchanged:\n  " + "\n  ".join(found))
        path.write_text(text)
        print(f"{path.name}: {seconds:.0f} s, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK", help="files in notebooks/ (default: all of them)")
    main(parser.parse_args().names)
