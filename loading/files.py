"""Files of weights and configurations: read piece by piece, written completely or not at all. Knows no model.

  TensorFile(path): names and shapes at once, values one tensor at a time, from .safetensors, .bin or .pt
  write_atomically(path, write): nobody ever finds half a file, and no file is lost to another of its name

Reading a model takes hardly more memory than the model itself: a file is mapped, not loaded, and freed memory goes
back to the operating system at once (return_freed_memory). A file that cannot be used is a WeightsError of one line.
Needs: torch and safetensors, imported only where tensors are touched, so that `--help` of a script stays fast.
"""
from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loading.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"      # diffusers' name for weight files, and so ours; transformers' are called "model"
CHUNK = 128 * 2 ** 20                 # bytes read before a file is mapped again, see TensorFile


# ----- reading -------------------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict:
    """A JSON file with one object. Raises WeightsError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: str | Path) -> dict:
    """folder/config.json as a dict. Raises WeightsError if it is missing or cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder: expected one with config.json and the weights")
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} is missing: found {listing(folder)}")
    return read_json(path)


def listing(folder: Path) -> str:
    """The first names in a folder, for error messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing in the folder"


def find_file(path: str | Path, stems: tuple[str, ...]) -> Path:
    """A file itself; in a folder, the first of {stem}.safetensors, {stem}.fp16.safetensors, {stem}.bin, ..."""
    path = Path(path)
    if path.is_file():
        return path
    paths = [path / f"{stem}{half}{suffix}" for suffix in (".safetensors", ".bin") for half in ("", ".fp16")
             for stem in stems]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise WeightsError(f"{paths[0]} is missing: found {listing(path)}" if path.is_dir()
                           else f"{path}: there is no such file or folder")
    return found


class TensorFile:
    """A .safetensors, .bin or .pt file: names and shapes at once, values one tensor at a time.

    The file is mapped into memory, so only what is read takes space. But what was read stays in memory until the
    mapping ends. So the file is mapped again after every CHUNK bytes, and readers must copy what they keep.
    sections: names of tables, if the file may hold several; the first one found is read.
    Nothing in a file is executed. Raises WeightsError unless it is a complete file of tensors.
    """
    def __init__(self, path: Path, sections: tuple[str, ...] = ()):
        self.path, self.sections = path, sections
        with open(path, "rb") as file:
            start = file.read(512)
        if start.startswith(b"version https://git-lfs"):
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights: "
                               f"fetch the file itself with `git lfs pull`")
        if start.lstrip()[:1] == b"<":
            raise WeightsError(f"{path} is a web page, not weights: the download failed, try it again")
        self.shapes = {name: tuple(shape) for name, shape in self._open()}

    def _open(self) -> list[tuple[str, tuple]]:
        """Maps the file, again if it was mapped before -> (name, shape) of each tensor."""
        import torch
        try:
            if self.path.suffix == ".safetensors":
                from safetensors import safe_open
                self._tensors = safe_open(self.path, "pt")
                return [(name, self._tensors.get_slice(name).get_shape()) for name in self._tensors.keys()]
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:               # files older than 2020 are not zip archives and cannot be mapped
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:             # each library raises its own kinds, and RuntimeError, EOFError, ...
            reason = str(error).split("\n")[0][:200]
            raise WeightsError(f"{self.path} cannot be read, presumably it is cut off or not a file of weights: "
                               f"{reason}") from error
        if isinstance(content, dict):
            content = next((content[key] for key in self.sections if isinstance(content.get(key), dict)), content)
        if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
            raise WeightsError(f"{self.path} does not hold a table of tensors" + (
                f", nor one called {' or '.join(self.sections)}" if self.sections else ""))
        self._tensors = content
        return [(name, tensor.shape) for name, tensor in content.items()]

    def __iter__(self):
        """(name, tensor) of each tensor. A tensor is valid until the next one is read."""
        read = 0
        for name in self.shapes:
            if read > CHUNK:
                self._tensors, read = None, 0
                self._open()
            tensor = self._tensors.get_tensor(name) if self.path.suffix == ".safetensors" else self._tensors[name]
            read += tensor.nbytes
            yield name, tensor
        self._tensors = None


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity? Minimum and maximum tell, and are found much faster than isfinite() of all values."""
    import torch
    return tensor.numel() == 0 or torch.stack(torch.aminmax(tensor)).isfinite().all().item()


@contextlib.contextmanager
def return_freed_memory():
    """Memory allocated inside goes back to the operating system as soon as it is freed.

    glibc keeps freed blocks of up to 32 MB for later, and most weights are smaller. Its heap then fills with holes,
    gigabytes at official size. Inside, blocks from 1 MB are mapped one by one instead. Other C libraries stay as
    they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    threshold = -3                                       # M_MMAP_THRESHOLD
    mallopt(threshold, 2 ** 20)
    try:
        yield
    finally:                                             # the value glibc's own adjustment ends up with:
        mallopt(threshold, 32 * 2 ** 20)                 # activations are faster in the heap


# ----- writing -------------------------------------------------------------------------------------------------------

def write_atomically(path: str | Path, write: Callable[[Path], object], overwrite: bool = True) -> None:
    """Calls write(temporary_path), then renames: a file is complete or missing, even after a power cut.

    Raises FileExistsError if the file exists, unless `overwrite`; also if it appeared only while `write` was running.
    """
    path, taken = Path(path), f"{path} exists already and will not be overwritten: choose another name, or remove it"
    if path.exists() and not overwrite:
        raise FileExistsError(taken)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")    # machines may share the folder
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                      # the name must not reach the disk before the content
        if overwrite:
            os.replace(temporary, path)
        elif not rename_if_unused(temporary, path):
            raise FileExistsError(taken)
    finally:
        temporary.unlink(missing_ok=True)


def rename_if_unused(temporary: Path, path: Path) -> bool:
    """Gives a file its name unless another has it -> whether it did. Of two programs that try, one succeeds."""
    try:
        try:
            os.link(temporary, path)                     # unlike os.replace, this fails if the name is taken
        except FileExistsError:
            raise
        except OSError:                                  # no hard links: FAT, some network drives
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))     # an empty file keeps the name for us
            os.replace(temporary, path)
    except FileExistsError:
        return False
    return True


def write_unused(path: Path, write: Callable[[Path], object], overwrite: bool = False) -> Path:
    """write_atomically, with the first of the `numbered` names that does not exist -> that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in numbered(path):
        with contextlib.suppress(FileExistsError):       # perhaps written by another program in this moment
            write_atomically(name, write, overwrite)
            return name


def numbered(path: Path) -> Iterator[Path]:
    """name.png, name_2.png, name_3.png, ... without end: to find a name that is not used yet."""
    yield path
    yield from (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2))


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 copies on the CPU, like the released weights. Counters stay integers. BatchNorm's running statistics
    stay float32: they are few, and float16 is worst at holding a small variance.

    Raises WeightsError for values that float16 cannot hold.
    """
    import torch
    result = {}
    for name, tensor in tensors.items():
        keep = not tensor.is_floating_point() or name.endswith(("running_mean", "running_var"))
        result[name] = tensor.detach().to("cpu", tensor.dtype if keep else torch.float16).contiguous()
        if not is_finite(result[name]):
            raise WeightsError(f"{name} cannot be saved in float16, whose largest number is 65504: "
                               f"its largest is {tensor.abs().max().item():g}")
    return result


def write_files(config: dict, tensors: dict[str, Tensor], folder: str | Path, stem: str) -> None:
    """folder/config.json and folder/{stem}.safetensors, the tensors unchanged."""
    from safetensors.torch import save_file
    write_atomically(Path(folder) / f"{stem}.safetensors",
                     lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(Path(folder) / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
