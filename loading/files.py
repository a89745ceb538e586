"""Reads and writes files of weights and configurations of any model.

  with reading(path): wraps code that reads a possibly damaged file; any error becomes a message of one line
  TensorFile(path): reads names and shapes first, then one tensor at a time, from .safetensors, .bin or .pt
  write_atomically(path, write): writes a file that is complete or missing, and overwrites no other file by accident

Reading a model takes hardly more memory than the model itself: its file is memory-mapped, and freed memory goes back
to the operating system at once (return_freed_memory). A file that cannot be used raises WeightsError, in one line.
Needs: torch and safetensors, imported only where tensors are touched, so that `--help` of a script stays fast.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loading.errors import UserError, WeightsError

try:
    import fcntl
except ImportError:                   # Windows has no fcntl
    fcntl = None

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"      # name of diffusers' and our weight files; transformers' files are called "model"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
OWN_CONFIG = "wuerstchen_config"      # key of the configuration in a weight file, for use without config.json
CHUNK = 128 * 2 ** 20                 # number of bytes after which TensorFile maps its file again
LARGEST = 2 ** 28                     # size in bytes of the largest text file that is read
EXPLAINED = {RecursionError: "it is nested too deeply", MemoryError: "memory does not suffice for what it contains",
             FileNotFoundError: "there is no such file", IsADirectoryError: "it is a folder, expected a file"}


# ----- reading -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def reading(path: str | Path, kind: type = UserError, failed: str = "cannot be read", most: float = math.inf,
            advice: str = ""):
    """Context manager for code that reads a file. Turns any error into a `kind`, an exception with one line of text.

    Files of more than `most` bytes are errors, and so are pipes and devices, because reading them may never end. A
    UserError is not changed, because it names the file already. failed, advice: parts of the message, after the path.
    """
    try:
        check_file(path, most)
        yield
    except UserError:
        raise
    except Exception as error:         # each library raises its own exceptions
        raise kind(f"{path} {failed}: {reason_of(error)}{advice}") from error


def check_file(path: str | Path, most: float = math.inf) -> None:
    """Raises ValueError or OSError unless `path` is a regular file of at most `most` bytes. Messages lack the path."""
    state = os.stat(path)
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is a pipe or a device, expected a file")
    if state.st_size > most:
        raise ValueError(f"it has {state.st_size} bytes, expected at most {most:.0f}")


def reason_of(error: Exception) -> str:
    """Returns a library's message as one line. Omits torch's advice to load a file in a way that executes its code."""
    for explained, text in EXPLAINED.items():
        if isinstance(error, explained) and (not isinstance(error, OSError) or error.errno or not error.args):
            return text
    if getattr(error, "strerror", None):                 # the operating system's message, such as "permission denied"
        return error.strerror.lower()
    if "weights only" in str(error).lower().replace("_", " "):
        return "it holds more than tensors and plain values, and nothing in a file is executed"
    return (str(error).splitlines() or [type(error).__name__])[0][:1000]


def read_text(path: str | Path, kind: type = UserError, failed: str = "cannot be read") -> str:
    """Returns the content of a UTF-8 text file, with or without a byte order mark. Raises `kind` if reading fails."""
    with reading(path, kind, failed, LARGEST):
        return decoded(Path(path).read_bytes())


def decoded(content: bytes) -> str:
    """Decodes UTF-8, with or without a byte order mark. Line ends become \\n. Raises ValueError for other content."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise ValueError(f"{error}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("it contains zero bytes: save it as UTF-8")
    return text


def parsed(text: str, finite: bool = False):
    """Returns the value of a JSON text. Raises ValueError if the JSON is invalid, if an object has a key twice, if the
    nesting is too deep for Python and, if `finite`, for NaN and infinity."""
    try:
        return json.loads(text, object_pairs_hook=no_name_twice, **dict.fromkeys(
            ("parse_float", "parse_constant") if finite else (), finite_number))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def no_name_twice(pairs: list[tuple[str, object]]) -> dict:
    """Returns the dict of a JSON object's pairs. Raises ValueError if a key occurs twice: json would keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)} is in it twice")
    return found


def finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it contains {text[:20]}, expected no NaN or infinity")
    return value


def read_json(path: str | Path) -> dict:
    """Returns the object in a JSON file as a dict. Raises WeightsError if the file cannot be read or has no object."""
    with reading(path, WeightsError, most=LARGEST):
        content = parsed(decoded(Path(path).read_bytes()), finite=True)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: str | Path) -> dict:
    """Returns folder/config.json as a dict. Raises WeightsError if the file is missing or cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder: expected one with config.json and the weights")
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{path} is missing: found {listing(folder)}")
    return read_json(path)


def listing(folder: Path) -> str:
    """Returns the first names in a folder as text, for error messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "nothing in the folder"


def pick_weights(names: Iterable[str], stems: tuple[str, ...], half: bool = False) -> str | None:
    """Returns the name of the weight file to read, or of the index of its shards; None if `names` contain neither.

    Prefers, in this order of importance: .safetensors to .bin; the right variant (fp16 if `half`, else none; unknown
    variants last); a single file to shards. names: files in a folder. stems: names without suffix, best first."""
    variants = ("fp16", "bf16", "", "fp32") if half else ("", "fp32", "fp16", "bf16")
    pattern = re.compile(rf"({'|'.join(stems)})(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?")

    def rank(match: re.Match) -> tuple:
        stem, variant, kind, index, of_index = match.groups(default="")
        variant = variant or of_index                    # diffusers' name of an index is X.safetensors.index.fp16.json
        place = variants.index(variant) if variant in variants else len(variants)
        return kind == "bin", place, variant, index, stems.index(stem)
    best = min(filter(None, map(pattern.fullmatch, names)), key=rank, default=None)
    return best and best[0]


def find_file(path: str | Path, stems: tuple[str, ...]) -> Path:
    """Returns `path` if it is a file, else the file in it that pick_weights chooses. Raises WeightsError if none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: there is no such file or folder")
    name = pick_weights((file.name for file in path.iterdir() if file.is_file()), stems)
    if name is None:
        raise WeightsError(f"{path / stems[0]}.safetensors is missing: found {listing(path)}")
    return path / name


def shards(index: Path) -> list[str]:
    """Returns the names of the shards in an index file. Raises WeightsError if it is invalid or names other folders."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise WeightsError(f"{index} is not an index of weight files: expected a weight_map from tensors to files")
    names = sorted(set(table.values()))
    for name in names:                                   # a malicious index might name files in other folders
        if not re.fullmatch(r"[^/\\]+\.(safetensors|bin)", name):
            raise WeightsError(f"{index} names {name!r}: expected only .safetensors or .bin files in the same folder")
    return names


reading_weights = functools.partial(
    reading, kind=WeightsError, failed="cannot be read, presumably it is cut off or not a file of weights")


class TensorFile:
    """Reads a .safetensors, .bin or .pt file, or the shards of an index. Iteration yields (name, tensor).

    The file is memory-mapped. A tensor takes memory from when it is read until the mapping ends. So the file is mapped
    again after every CHUNK bytes, and callers must copy the tensors that they keep.
    shapes: {name: shape}. sections: keys under which the file may have the state dict; the first key found is used.
    The prefixes that DDP and torch.compile add to names (module., _orig_mod.) are removed.
    Code in a file is never executed. Raises WeightsError unless it is a complete file of tensors.
    """
    def __init__(self, path: Path, sections: tuple[str, ...] = ()):
        self.path, self.sections, self.shards, self.shapes, self.in_file = path, sections, [], {}, {}
        if path.suffix == ".json":
            names = shards(path)
            if missing := [name for name in names if not (path.parent / name).is_file()]:
                raise WeightsError(f"{path} names files that are missing: {', '.join(missing)}")
            self.shards = [TensorFile(path.parent / name, sections) for name in names]
            pairs = [(name, name, shape) for shard in self.shards for name, shape in shard.shapes.items()]
        else:
            self.safe = is_safetensors(path)
            pairs = [(re.sub(r"^(module\.|_orig_mod\.)+|\b_orig_mod\.", "", name), name, shape)
                     for name, shape in self._open()]
        for name, in_file, shape in pairs:
            if name in self.shapes:
                raise WeightsError(f"{path} holds {name} twice")
            self.shapes[name], self.in_file[name] = shape, in_file

    def _open(self) -> list[tuple[str, tuple]]:
        """Maps the file, or maps it again. Returns [(name in the file, shape)] of its tensors."""
        import torch
        with reading_weights(self.path):
            if self.safe:
                from safetensors import safe_open
                self._tensors = safe_open(self.path, "pt")
                return [(name, tuple(self._tensors.get_slice(name).get_shape())) for name in self._tensors.keys()]
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:               # torch's files before 2020 are not zip archives and cannot be mapped
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            content = next((content[key] for key in self.sections if isinstance(content.get(key), dict)), content)
        if not is_table(content):
            raise WeightsError(f"{self.path} does not hold a table of tensors" + (
                f", nor one called {' or '.join(self.sections)}" if self.sections else ""))
        self._tensors = content
        return [(name, tuple(tensor.shape)) for name, tensor in content.items()]

    def __iter__(self):
        """Yields (name, tensor). A tensor is valid only until the next one is read."""
        for shard in self.shards:
            yield from shard
        if self.shards:
            return
        read = 0
        for name, in_file in self.in_file.items():
            if read > CHUNK:
                self._tensors, read = None, 0
                self._open()
            with reading_weights(self.path):
                tensor = self._tensors.get_tensor(in_file) if self.safe else self._tensors[in_file]
            read += tensor.nbytes
            yield name, tensor
        self._tensors = None


def read_tensors(path: str | Path, start: str) -> dict[str, Tensor]:
    """Returns {name without `start`: tensor} of all tensors in a file whose names begin with `start`. Raises
    WeightsError if the file is invalid or one of these tensors contains NaN or infinity."""
    tensors = {name.removeprefix(start): tensor.clone() for name, tensor in TensorFile(Path(path))
               if name.startswith(start)}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise WeightsError(f"{path}: {start}{name} contains NaN or infinity")
    return tensors


def is_table(content) -> bool:
    """Returns whether content is a state dict of dense CPU tensors, each with storage for all its values. This rejects
    malicious small files whose tensors of terabytes repeat one value or have no data."""
    import torch
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        and tensor.layout == torch.strided and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes() for name, tensor in content.items())


def own_config(path: Path) -> dict | None:
    """Returns the configuration in a weight file, stored under OWN_CONFIG, or None if it is missing or unreadable."""
    import torch
    from safetensors import safe_open
    try:
        if is_safetensors(path):
            with safe_open(path, "pt") as file:
                config = parsed((file.metadata() or {}).get(OWN_CONFIG, "null"), finite=True)
        else:
            config = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(OWN_CONFIG)
    except Exception:         # the error is reported later, when the tensors are read
        return None
    return config if isinstance(config, dict) else None


def is_safetensors(path: Path) -> bool:
    """Returns whether to read a file as .safetensors. Raises WeightsError if its start fits no format."""
    with reading_weights(path), open(path, "rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":                               # .safetensors begins with 8 bytes of length, then JSON
        return True
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: fetch the file itself with `git lfs pull`")
    if start.lstrip()[:1] == b"<":
        raise WeightsError(f"{path} is a web page, not weights: the download failed, try it again")
    if start and not start.startswith((b"PK", b"\x80")):         # torch's files are zip archives, before 2020 pickles
        image = start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"))
        raise WeightsError(f"{path} is not a file of weights{' but an image' * image}: expected a .safetensors, .bin "
                           "or .pt file")
    return path.suffix == ".safetensors"


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor has no NaN or infinity. Tests only its minimum and maximum, which is much faster."""
    import torch
    return tensor.numel() == 0 or torch.stack(torch.aminmax(tensor)).isfinite().all().item()


@contextlib.contextmanager
def return_freed_memory():
    """Context manager in which freed memory goes back to the operating system at once.

    glibc keeps freed blocks of up to 32 MB for reuse, and most weights are smaller. The heap then becomes fragmented:
    at official size, gigabytes are wasted. Inside this context, each block of 1 MB or more has its own mapping, which
    is returned when the block is freed. Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    threshold = -3                                       # value of M_MMAP_THRESHOLD in malloc.h
    mallopt(threshold, 2 ** 20)
    try:
        yield
    finally:         # sets glibc's largest threshold, so that activations come from the heap again, which is faster
        mallopt(threshold, 32 * 2 ** 20)


# ----- writing -------------------------------------------------------------------------------------------------------
# While a file is written, it has the name .NAME.tmp-HOST-RANDOM.SUFFIX and is locked. So the next program that writes
# into the folder can distinguish the files of a killed program, which are not locked, from those of a running program.

def check_output(path: str | Path, *suffixes: str) -> None:
    """Raises UserError if an output path exists and is not an empty folder, cannot be written, or ends in none of
    `suffixes` ("" for a folder). Programs call it before their work."""
    path = Path(path)
    if path.parent.is_dir():
        sweep(path.parent)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already and will not be overwritten: choose another name, or remove it")
    suffix = path.suffix.lower() if re.match(r"\.[a-z]", path.suffix.lower()) else ""  # a folder v1.2 has no suffix
    if suffix not in suffixes:
        expected = " or ".join(kind or "nothing, for a folder" for kind in suffixes)
        raise UserError(f"{path} should end in {expected}: no other kind of file is written")
    check_folder(path.parent, path)


def check_folder(folder: str | Path, shown: str | Path | None = None) -> None:
    """Raises UserError unless files can be written to a folder, which may not exist yet. shown: path in the message."""
    folder = Path(folder)
    try:                                     # TemporaryFile deletes its file when it is closed
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as problem:
        raise UserError(f"cannot write to {shown or folder}: {(problem.strerror or str(problem)).lower()}") from None


HOST = f"{zlib.crc32(platform.node().encode()):08x}"
TEMPORARY = re.compile(r"\..+\.tmp-([0-9a-f]{8})-[0-9a-f]{8}(\.\w+)?")
SWEPT = set()                                            # folders for which this process has called sweep()


def write_atomically(path: str | Path, write: Callable[[Path], object], overwrite: bool = True, size: int = 0,
                     folder: bool = False) -> None:
    """Calls write(temporary_path), then renames that file, so `path` is never incomplete, even after a power cut.

    size: bytes that `write` needs, if known. If the disk has less free space, `write` is not called.
    folder: `write` gets a new folder, which it fills by write_atomically. Only an empty folder is ever replaced.
    Raises FileExistsError if the path exists and may not be replaced, even if it appeared while `write` was running.
    Raises OSError, in one line, if the disk is full.
    """
    path, taken = Path(path), f"{path} exists already and will not be overwritten: choose another name, or remove it"
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    if path.exists() and not overwrite and not folder:
        raise FileExistsError(taken)
    with temporary_path(path, folder) as temporary, disk_errors(path, temporary, size):
        usage = shutil.disk_usage(path.parent)
        if size > usage.free and usage.total:            # some network drives report a total of 0 bytes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(temporary)
        if folder:
            try:
                return os.rename(temporary, path)        # fails if `path` exists and is not an empty folder
            except OSError as error:
                raise FileExistsError(taken) if path.exists() else error from None
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())                      # writes the content to the disk before the rename
        if overwrite:
            os.replace(temporary, path)
        elif not rename_if_unused(temporary, path):
            raise FileExistsError(taken)


@contextlib.contextmanager
def temporary_path(path: Path, folder: bool = False) -> Iterator[Path]:
    """Context manager that yields the path of a new file or folder, to be renamed to `path`. Removes it in the end."""
    while True:
        temporary = path.with_name(f".{path.stem}.tmp-{HOST}-{uuid.uuid4().hex[:8]}{path.suffix}")
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError):     # another program's sweep() has removed it: try again
            opened = lock(temporary, wait=True)
            if opened is None or os.fstat(opened).st_nlink:
                break
    try:
        yield temporary
    finally:
        remove(temporary)
        if opened is not None:
            os.close(opened)


def sweep(folder: Path) -> None:
    """Removes temporary files of killed programs from a folder, once per process. Locks of other machines may be
    invisible on this machine, so temporary files of other machines are removed only after an hour."""
    if os.path.abspath(folder) in SWEPT:
        return
    SWEPT.add(os.path.abspath(folder))
    for entry in os.scandir(folder):
        if match := TEMPORARY.fullmatch(entry.name):
            with contextlib.suppress(OSError):           # we have no permission, or another process has removed it
                known = match[1] == HOST or time.time() - entry.stat().st_mtime > 3600
                if known and (opened := lock(Path(entry.path))) is not None:
                    remove(Path(entry.path))
                    os.close(opened)


def lock(path: Path, wait: bool = False) -> int | None:
    """Opens and locks a file or folder. Returns the descriptor; closing it or the end of the process ends the lock.
    Returns None if another program has the lock (unless `wait`) or if locks are unsupported (Windows, some drives)."""
    if fcntl is None:
        return None
    opened = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(opened)
        return None
    return opened


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path, temporary: Path | None = None, size: int = 0):
    """Context manager for code that writes a file. Turns any library's exception for a full disk into an OSError of one
    line: the file, the space that it needs and the free space. Exceptions not caused by the disk stay unchanged.
    temporary: the file that is written before it is renamed to `path`. size: bytes to write, 0 if unknown."""
    try:
        yield
    except Exception as error:
        problem = error
        if not isinstance(error, OSError) and temporary is not None:  # torch.save raises RuntimeError for a full disk
            try:
                with open(temporary, "ab") as file:      # tests whether the disk is full
                    file.write(bytes(2 ** 20))
            except OSError as cause:
                problem = cause
        if isinstance(error, OSError) and error.errno is None and str(temporary) in str(error):
            raise OSError(str(error).replace(str(temporary), str(path))) from error      # name the final folder
        full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and getattr(problem, "filename", None) != str(temporary):
            raise
        used = temporary.stat().st_blocks * 512 if temporary and temporary.exists() else 0
        needs = f"about {bytes_text(size)}" if size > used else f"more than {bytes_text(used)}"
        sizes = [f"it needs {needs}"] * bool(full and (size or used))
        if problem.errno == errno.ENOSPC:
            sizes += [f"{bytes_text(shutil.disk_usage(path.parent).free + used)} are free"]
        raise OSError(f"{path} cannot be written: {problem.strerror}{': ' * bool(sizes)}{', '.join(sizes)}; what was "
                      "there is unchanged") from error


def bytes_text(number: float) -> str:
    return f"{number / 2 ** 30:.2f} GiB" if number >= 2 ** 30 else f"{number / 2 ** 20:.2f} MiB"


def rename_if_unused(temporary: Path, path: Path) -> bool:
    """Renames `temporary` to `path` unless that exists. Returns whether it did. Of two programs, only one succeeds."""
    try:
        try:
            os.link(temporary, path)                     # unlike os.replace, this fails if the name is taken
        except FileExistsError:
            raise
        except OSError:                                  # FAT and some network drives have no hard links
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))     # an empty file reserves the name
            os.replace(temporary, path)
    except FileExistsError:
        return False
    return True


def write_unused(path: Path, write: Callable[[Path], object], overwrite: bool = False) -> Path:
    """Writes a file by write_atomically at the first unused path of numbered(path). Returns this path. overwrite:
    write to `path` itself, even if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in numbered(path):
        with contextlib.suppress(FileExistsError):       # if another program has just created it, try the next
            write_atomically(name, write, overwrite)
            return name


def numbered(path: Path) -> Iterator[Path]:
    """Yields `path`, such as name.png, then name_2.png, name_3.png, ... without end, to find an unused name."""
    yield path
    yield from (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2))


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to the CPU in float16, like the released weights. Integers stay integers. BatchNorm's running
    statistics keep their dtype: they are few, and float16 is too inexact for a small variance. Raises WeightsError for
    values that float16 cannot hold."""
    import torch
    result = {}
    for name, tensor in tensors.items():
        keep = not tensor.is_floating_point() or name.endswith(("running_mean", "running_var"))
        result[name] = tensor.detach().to("cpu", tensor.dtype if keep else torch.float16).contiguous()
        if not is_finite(result[name]):
            raise WeightsError(f"{name} cannot be saved in float16, whose largest number is 65504: "
                               f"its largest is {tensor.abs().max().item():g}")
    return result


def tensors_in(content, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of all tensors in nested dicts and lists; names are joined with dots."""
    if hasattr(content, "untyped_storage"):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from tensors_in(value, f"{name}.{key}".lstrip("."))


def write_tensors(path: str | Path, content: dict, metadata: dict[str, str] | None = None, overwrite: bool = True
                  ) -> None:
    """Writes a .safetensors file of {name: tensor}. If the path has another suffix, torch.save writes any `content`."""
    import torch

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            return write_safetensors(temporary, content, metadata or {"format": "pt"})
        with open(temporary, "wb") as file:              # given a path, torch.save would store its name in the file
            torch.save(content, file)
    path = Path(path)
    write_atomically(path, write, overwrite, sum(tensor.nbytes for _, tensor in tensors_in(content)))


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file like safetensors' save_file: 8 bytes with the header's length, the header in JSON, the values.
    save_file itself is not used, because it orders metadata at random and leaves a temporary file if it is killed."""
    import torch
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
             torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)), 0  # big items first, for alignment
    header = dict(__metadata__=dict(sorted(metadata.items())))
    for name in names:
        tensor = tensors[name]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=[*tensor.shape], data_offsets=[end, end + tensor.nbytes])
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_files(config: dict, tensors: dict[str, Tensor], folder: str | Path, stem: str) -> None:
    """Writes folder/config.json and folder/{stem}.safetensors. The tensors are stored unchanged."""
    write_tensors(Path(folder) / f"{stem}.safetensors", tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(Path(folder) / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
