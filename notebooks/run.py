"""Executes notebooks in place, in a fresh kernel, and stores a checksum of the code next to its outputs.

  python notebooks/run.py                        # all of them, 6 minutes
  python notebooks/run.py 03_diffusion.ipynb     # one

The notebooks are committed with their images, so that they can be read without running them. A changed code cell makes
its outputs stale: tests/test_notebooks.py compares the checksum and asks for this script. Text may change freely.
Cells tagged "download" are not run; they keep their old outputs.
Needs: notebooks/requirements.txt; `checksum` and `problems` need nothing, so they can be tested everywhere.
"""
import argparse
import base64
import hashlib
import io
import json
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SECONDS, BYTES = 180, 2_000_000            # limits for a notebook: to run, and on disk
# a cell whose output must contain an image
DRAWS = re.compile(r"\bpictures\(|\bplt\.(subplots|figure|plot|scatter|bar|imshow|hist)\(")


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


def execute(path: Path):
    """-> (nbformat's notebook with the outputs of a fresh kernel, seconds). Raises nbclient's errors."""
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", skip_cells_with_tag="download",
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    return notebook, time.perf_counter() - start


def smaller(png: bytes) -> bytes:
    """Large images, which show noise, get a palette of 256 colours: a third of the size, and no visible difference.

    In other images smooth colours would become bands.
    """
    from PIL import Image
    if len(png) < 250_000:
        return png
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
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
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; run `pip install -r notebooks/requirements.txt`")
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        try:
            notebook, seconds = execute(path)
        except CellExecutionError as error:
            sys.exit(f"{path.name} is unchanged:\n{error}")
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
