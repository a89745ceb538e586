"""What is costly to compute and always comes out the same, kept on disk: semantic latents and text embeddings.

  array = cache.get(key);  if array is None: cache.put(key, array := compute())
  folder/KIND-HASH/ab/abcdef...npy     one entry; HASH is of the settings and the encoder, so other ones never meet

A key is any text that says what was computed from: a caption itself (so each is kept once, however many pictures share
it), or a picture's hash with all that was done to it, such as "3f2a... 1024x768 center flipped".
Any number of processes may use a folder at once: an entry is written under another name and then renamed, so it is there
whole or not at all, and whoever comes second replaces it by the same. The work is shared by missing(keys)[rank::world].
Surprise: nothing is flushed to the disk (fsync), which would take longer than the rest. A power cut may leave entries of
zeros; each carries a checksum of key and content, and one that does not fit is removed and computed again.
Needs: torch, numpy.
"""
import hashlib
import io
import json
import os
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

# bytes of a sha256 at the end of an entry; np.load(path) reads what stands before it and is content
CHECKSUM = 32


class Cache:
    """Arrays by key, for one encoder and one set of settings.

    settings   whatever else the arrays depend on, as JSON can hold it. "kind" names the folder ("latents", "text"), "dtype"
               is "float16", half the size, or "float32", or of whole numbers "int16" or "int32", which are kept exactly; these
               are the defaults: kind "entries", dtype "float16".
    Raises ValueError for another dtype, TypeError for settings that JSON cannot hold.
    """
    def __init__(self, folder: str | Path, encoder_hash: str, settings: dict):
        settings = {"kind": "entries", "dtype": "float16", **settings}
        if settings["dtype"] not in ("float16", "float32", "int16", "int32"):
            raise ValueError(f"a cache of {settings['dtype']}, expected float16, float32, int16 or int32")
        self.dtype = np.dtype(settings["dtype"])
        self._identity = json.dumps([encoder_hash, settings], sort_keys=True)
        self.folder = Path(folder) / f"{settings['kind']}-{_sha256(self._identity)[:16]}"
        self._writing = self.folder / "writing"            # on the same disk, so that a rename is one step
        self._writing.mkdir(parents=True, exist_ok=True)
        for path in self._writing.iterdir():               # what killed runs have left
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        if not (self.folder / "info.json").exists():       # for people; the program never reads it
            text = json.dumps({"encoder": encoder_hash, "settings": settings}, indent=2, sort_keys=True)
            self._write(self.folder / "info.json", (text + "\n").encode())

    def path(self, key: str) -> Path:
        name = _sha256(f"{self._identity} {key}")
        # 256 folders, as file systems slow down with a million in one
        return self.folder / name[:2] / f"{name}.npy"

    def get(self, key: str, shape: tuple | None = None) -> np.ndarray | None:
        """The array of this key, None if there is none. One that is damaged, or not of `shape`, is removed with a warning."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        problem, array = "its checksum does not fit", None
        if content[-CHECKSUM:] == _checksum(path, content[:-CHECKSUM]):
            array = np.load(io.BytesIO(content[:-CHECKSUM]), allow_pickle=False)
            problem = self._problem(array, shape)
        if problem is None:
            return array
        warnings.warn(f"{path} is removed and computed again: {problem}", stacklevel=2)
        path.unlink(missing_ok=True)                       # another process may have been quicker
        return None

    def put(self, key: str, array: np.ndarray) -> None:
        """Keeps an array.  Raises ValueError if it holds NaN or infinity, also if only after rounding to float16, and for whole
        numbers that do not fit."""
        with np.errstate(over="ignore"):
            stored = np.asarray(array, self.dtype, order="C")
        problem = self._problem(stored, None)
        if self.dtype.kind == "i" and not np.array_equal(stored, array):
            problem = f"it holds numbers that do not fit {self.dtype}"           # they would come back as others
        if problem:
            raise ValueError(f"cannot keep {key[:80]!r}: {problem}; its largest number is {np.abs(array).max():g}")
        buffer = io.BytesIO()
        np.save(buffer, stored, allow_pickle=False)
        path = self.path(key)
        self._write(path, buffer.getvalue() + _checksum(path, buffer.getvalue()))

    def missing(self, keys: list[str]) -> list[str]:
        """Those of the keys that have no entry yet, each once, in their order.  Damaged ones show only when they are read."""
        paths = {key: self.path(key) for key in keys}
        present = set()
        # a listing of each: far fewer calls than one per key
        for folder in {path.parent for path in paths.values()}:
            if folder.exists():
                present.update(os.listdir(folder))
        return [key for key, path in paths.items() if path.name not in present]

    def _problem(self, array: np.ndarray, shape: tuple | None) -> str | None:
        if array.dtype != self.dtype:
            return f"it holds {array.dtype}, expected {self.dtype}"
        if shape is not None and array.shape != tuple(shape):
            return f"it has shape {array.shape}, expected {tuple(shape)}"
        return None if np.isfinite(array).all() else f"it holds numbers that are NaN or beyond {self.dtype}"

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        temporary = self._writing / uuid.uuid4().hex       # not the process's number: machines may share the folder
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: Path, content: bytes) -> bytes:
    # with the name, which stands for the key: an entry
    return hashlib.sha256(path.stem.encode() + content).digest()
                                                                         # under the wrong name is found out, too

def hash_of(module: nn.Module) -> str:
    """sha256, in hex, of all parameters and buffers of a model: names, types, shapes and bytes.  1 GB takes a second or two.

    The same on every device. What is not in tensors, such as train() or eval(), does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class CachedTexts:
    """Captions -> embeddings (B,N,D) of a frozen encoder: each caption once, by itself, so that no batch changes it.

    encoder: a TextEncoder; None once all captions are in `cache`, a Cache. most: captions that memory holds as well.
    """
    def __init__(self, encoder, cache=None, most: int = 2000):
        self.encoder, self.cache, self.most, self.memory = encoder, cache, most, {}

    def one(self, caption: str):
        if caption not in self.memory:
            found = self.cache.get("text " + caption) if self.cache is not None else None
            if found is None:
                with torch.no_grad():
                    found = self.encoder([caption])[0].float().cpu().numpy()             # (N, D)
                if self.cache is not None:   # and read again: rounded, as every later run sees it
                    self.cache.put("text " + caption, found)
                    found = self.cache.get("text " + caption)
            if len(self.memory) >= self.most:
                self.memory.pop(next(iter(self.memory)))
            self.memory[caption] = torch.from_numpy(found).float()
        return self.memory[caption]

    def __call__(self, captions: list[str]):
        return torch.stack([self.one(caption) for caption in captions])
