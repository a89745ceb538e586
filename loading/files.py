"""Files of weights and configurations: read in small pieces, written whole or not at all. Knows no model.

  TensorFile(path): names and shapes at once, numbers one tensor at a time, from .safetensors, .bin or .pt
  write_atomically(path, write): nobody ever finds half a file

Reading a model takes hardly more memory than the model: a file is mapped, not loaded, and what is freed goes
back to the operating system at once (return_freed_memory). What is wrong with a file is a WeightsError of one line.
Needs: torch, safetensors.
"""
import contextlib
import ctypes
import json
import os
import sys
import uuid
from pathlib import Path

import torch
from torch import Tensor

from loading.errors import WeightsError

STEM = "diffusion_pytorch_model"      # diffusers' name for weight files, and so ours; transformers' are called "model"
CHUNK = 128 * 2 ** 20                 # bytes read between two openings of a file, see TensorFile


# ----- reading ---------------------------------------------------------------------------------------

def read_config(folder: str | Path) -> dict:
    """folder/config.json as a dict. Raises WeightsError if there is none that can be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder: expected one with config.json and the weights")
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} is missing: found {listing(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return config


def listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing in the folder"


class TensorFile:
    """A .safetensors, .bin or .pt file: names and shapes at once, the numbers one tensor at a time.

    The file is mapped into memory, so that only what is read takes space. But what was read stays there
    until the mapping ends: hence a new mapping every CHUNK bytes, and copies of what is handed out.
    Nothing in a file is executed. Raises WeightsError if it is not a whole file of tensors.
    """
    def __init__(self, path: Path, sections: tuple[str, ...] = ()):
        self.path, self.sections = path, sections
        with open(path, "rb") as file:
            start = file.read(512)
        if start.startswith(b"version https://git-lfs"):
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights: fetch the file itself with `git lfs pull`")
        if start.lstrip()[:1] == b"<":
            raise WeightsError(f"{path} is a web page, not weights: the download went wrong")
        self.shapes = {name: tuple(shape) for name, shape in self._open()}

    def _open(self):
        """Maps the file anew -> (name, shape) of every tensor."""
        try:
            if self.path.suffix == ".safetensors":
                from safetensors import safe_open
                self._tensors = safe_open(self.path, "pt")
                return [(name, self._tensors.get_slice(name).get_shape()) for name in self._tensors.keys()]
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:                     # files older than 2020 are no zip archives and cannot be mapped
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:     # each library raises its own kinds, and RuntimeError, EOFError, KeyError ...
            reason = str(error).split("\n")[0][:200]
            raise WeightsError(f"{self.path} cannot be read, presumably it is cut off or not a file of weights: {reason}") from error
        if isinstance(content, dict):
            content = next((content[key] for key in self.sections if isinstance(content.get(key), dict)), content)
        if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
            raise WeightsError(f"{self.path} does not hold a table of tensors" + (
                f", nor one called {' or '.join(self.sections)}" if self.sections else ""))
        self._tensors = content
        return [(name, tensor.shape) for name, tensor in content.items()]

    def __iter__(self):
        """(name, tensor) of every tensor; a tensor is valid until the next one is asked for: copy it."""
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
    """No NaN and no infinity in it? The least and the largest number tell, and are found 40 times as fast as isfinite() looks at all."""
    return tensor.numel() == 0 or torch.stack(torch.aminmax(tensor)).isfinite().all().item()


def find_file(path: str | Path, stems: tuple[str, ...]) -> Path:
    """A file itself; of a folder, the first of {stem}.safetensors, {stem}.fp16.safetensors, {stem}.bin, ... that exists."""
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


@contextlib.contextmanager
def return_freed_memory():
    """What is allocated inside stands apart from the heap, and so goes back to the operating system as soon as it is freed.

    glibc keeps freed pieces of up to 32 MB, which most weights are, for later, in a heap that ends up full of holes: up to
    1.5 GB more while Stage C is loaded, 2 GB more at the peak with low_memory. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    threshold = -3                                       # M_MMAP_THRESHOLD
    mallopt(threshold, 2 ** 20)
    try:
        yield
    finally:
        # where glibc's own adjustment ends up; activations are quicker in the heap
        mallopt(threshold, 32 * 2 ** 20)


# ----- writing ---------------------------------------------------------------------------------------

def write_atomically(path: str | Path, write) -> None:
    """Calls write(temporary_path), then renames: a file is either whole or not there, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")    # machines may share the folder
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                      # the name must not reach the disk before the numbers do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float16 copies on the CPU, as released weights are. Counters stay integers, and BatchNorm's running
    statistics float32: they are few, and a small variance is what float16 holds worst.

    Raises WeightsError for numbers that float16 cannot hold.
    """
    result = {}
    for name, tensor in tensors.items():
        keep = not tensor.is_floating_point() or name.endswith(("running_mean", "running_var"))
        result[name] = tensor.detach().to("cpu", tensor.dtype if keep else torch.float16).contiguous()
        if not is_finite(result[name]):
            raise WeightsError(f"{name} cannot be saved in float16, whose largest number is 65504: "
                               f"its largest is {tensor.abs().max().item():g}")
    return result


def write_files(config: dict, tensors: dict[str, Tensor], folder: str | Path, stem: str) -> None:
    """folder/config.json and folder/{stem}.safetensors, the tensors as they are."""
    from safetensors.torch import save_file
    write_atomically(Path(folder) / f"{stem}.safetensors",
                     lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(Path(folder) / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_model(config: dict, tensors: dict[str, Tensor], folder: str | Path, stem: str) -> None:
    """The same, in float16; converts before it writes, so that an error leaves the old files."""
    write_files(config, to_half(tensors), folder, stem)
