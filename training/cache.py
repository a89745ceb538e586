"""On-disk cache of arrays that are expensive to compute and never change: latents and text embeddings.

  array = cache.get(key);  if array is None: cache.put(key, array := compute())
  folder/KIND-HASH/ab/abcdef...npy     one entry. HASH depends on settings and encoder: each combination has a folder
  CachedTexts: embeds captions, each only once
  fill_cache: computes the latents and embeddings of a whole dataset; each process does its share

A key is a text that specifies what the array was computed from: a caption, or an image's hash with the size to which
the image was cut, see latent_key. A caption's embedding is stored once, even if many images have this caption.
Any number of processes may use a folder at once. An entry is written under another name and then renamed, so it is
complete or does not exist. If two processes write the same entry, the second replaces it by the same content.
Note: entries are not flushed to the disk (fsync), because that would take longer than everything else. A power cut may
leave entries of zeros. So each entry contains a checksum of key and content. An entry whose checksum does not match is
removed and computed again.
Needs: torch, numpy, tqdm; loading/, training/data.py.
"""
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from loading.errors import tell, warn
from loading.files import disk_errors, sweep, temporary_path
from speed.memory import to_device
from training.data import BrokenImage, ImageDataset, fit

CHECKSUM = 32    # an entry is a .npy file followed by a sha256 of 32 bytes, which np.load(path) ignores


class Cache:
    """Stores arrays on disk under keys (texts), for one encoder and one set of settings.

    settings   a dict, for JSON, of everything on which the arrays depend, except the encoder and the key. "kind" names
               the folder: "latents", "texts", ..., by default "entries". "dtype" is "float16" (the default, half the
               size) or "float32"; for integers, which are stored exactly, it is "int16" or "int32".
    Raises ValueError for another dtype, TypeError for settings that JSON cannot represent.
    """
    def __init__(self, folder: str | Path, encoder_hash: str, settings: dict):
        settings = {"kind": "entries", "dtype": "float16", **settings}
        if settings["dtype"] not in ("float16", "float32", "int16", "int32"):
            raise ValueError(f"a cache of {settings['dtype']}, expected float16, float32, int16 or int32")
        self.dtype = np.dtype(settings["dtype"])
        self._identity = json.dumps([encoder_hash, settings], sort_keys=True)
        self.folder = Path(folder) / f"{settings['kind']}-{_sha256(self._identity)[:16]}"
        self._writing = self.folder / "writing"            # unfinished files, on the entries' disk for atomic renaming
        self._writing.mkdir(parents=True, exist_ok=True)
        sweep(self._writing)
        if not (self.folder / "info.json").exists():       # info.json is written for people: no code reads it
            text = json.dumps({"encoder": encoder_hash, "settings": settings}, indent=2, sort_keys=True)
            self._write(self.folder / "info.json", (text + "\n").encode())

    def path(self, key: str) -> Path:
        name = _sha256(f"{self._identity} {key}")
        return self.folder / name[:2] / f"{name}.npy"      # 256 subfolders: a million files in one folder would be slow

    def get(self, key: str, shape: tuple | None = None) -> np.ndarray | None:
        """Returns this key's array, or None if there is none. Removes an entry that is damaged or has another shape."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:                           # the disk may be bad; the caller computes the array again
            warn(f"{path} cannot be read and is computed again: {error}")
            return None
        problem, array = "its checksum does not match", None
        if content[-CHECKSUM:] == _checksum(path, content[:-CHECKSUM]):
            array = np.load(io.BytesIO(content[:-CHECKSUM]), allow_pickle=False)
            problem = self._problem(array, shape)
        if problem is None:
            return array
        warn(f"{path} is removed and computed again: {problem}")
        path.unlink(missing_ok=True)                       # another process may have removed the entry already
        return None

    def put(self, key: str, array: np.ndarray) -> None:
        """Stores an array under this key.

        Raises ValueError if the array contains NaN or infinity, also if rounding to float16 causes them, or integers
        that are too large for the cache's dtype.
        """
        with np.errstate(over="ignore"):
            stored = np.asarray(array, self.dtype, order="C")
        problem = self._problem(stored, None)
        if self.dtype.kind == "i" and not np.array_equal(stored, array):
            problem = f"it contains numbers that do not fit {self.dtype}"        # the cast changed an integer
        if problem:
            raise ValueError(f"cannot store {key[:80]!r}: {problem}; its largest number is {np.abs(array).max():g}")
        buffer = io.BytesIO()
        np.save(buffer, stored, allow_pickle=False)
        path = self.path(key)
        self._write(path, buffer.getvalue() + _checksum(path, buffer.getvalue()))

    def missing(self, keys: list[str]) -> list[str]:
        """Returns the keys that have no entry, in their order, without duplicates. Damaged entries count as present."""
        paths = {key: self.path(key) for key in keys}
        present = set()
        for folder in {path.parent for path in paths.values()}:      # listing folders is faster than one test per key
            if folder.exists():
                present.update(os.listdir(folder))
        return [key for key, path in paths.items() if path.name not in present]

    def _problem(self, array: np.ndarray, shape: tuple | None) -> str | None:
        if array.dtype != self.dtype:
            return f"it contains {array.dtype}, expected {self.dtype}"
        if shape is not None and array.shape != tuple(shape):
            return f"it has shape {array.shape}, expected {tuple(shape)}"
        return None if np.isfinite(array).all() else f"it contains numbers that are NaN or beyond {self.dtype}"

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        with temporary_path(self._writing / path.name) as temporary, disk_errors(path, temporary, len(content)):
            temporary.write_bytes(content)
            os.replace(temporary, path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: Path, content: bytes) -> bytes:
    """Returns a hash of content and file name. The name depends on the key, so the hash also detects renamed files."""
    return hashlib.sha256(path.stem.encode() + content).digest()


def hash_of(module: nn.Module) -> str:
    """Returns the sha256, in hex, of a model's parameters and buffers: names, dtypes, shapes, bytes. Takes 1 s per GB.

    The hash does not depend on the device, nor on anything that is not a tensor, such as the mode set by train().
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class CachedTexts:
    """Computes captions' embeddings (B,N,D) float32 on `device` with a frozen encoder, and caches them.

    Captions without a cached embedding are encoded in batches of `rows` captions, padded with "". The default is 16 on
    a GPU and 1 on a CPU, where larger batches gain little. Matrix products of the same shape use the same kernel, which
    sums each row in the same order. So on one kind of device, a caption's embedding is the same bit for bit, whatever
    captions share its batch. Batches of varying size would change its rounding. Autocast is turned off while encoding.
    encoder: a TextEncoder. cache: a Cache or None. most: largest number of embeddings kept in the device's memory.
    """
    def __init__(self, encoder, device: torch.device, cache=None, most: int = 1000, rows: int | None = None):
        self.encoder, self.device, self.cache, self.most, self.memory = encoder, device, cache, most, {}
        self.rows = rows or (1 if device.type == "cpu" else 16)

    def __call__(self, captions: list[str]) -> torch.Tensor:
        found = {caption: self.memory[caption] for caption in captions if caption in self.memory}
        new = {caption: None for caption in captions if caption not in found}
        if self.cache is not None:
            new = {caption: self._stored(caption) for caption in new}
        missing = [caption for caption, embedding in new.items() if embedding is None]
        for part in (missing[start:start + self.rows] for start in range(0, len(missing), self.rows)):
            new |= zip(part, self._encode(part))
        self.memory |= new
        while len(self.memory) > self.most:
            self.memory.pop(next(iter(self.memory)))
        found |= new
        with torch.autocast(self.device.type, enabled=False):     # under bfloat16 autocast, stacking float16 fails
            return torch.stack([found[caption] for caption in captions]).float()         # (B, N, D)

    def fill(self, captions: list[str], silent: bool = True) -> None:
        """Encodes the captions that the cache does not contain yet."""
        for start in tqdm(range(0, len(captions), self.rows), desc="caching captions", disable=silent):
            self(captions[start:start + self.rows])

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> list[torch.Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            embeddings = self.encoder(captions + [""] * (self.rows - len(captions)))     # (rows, N, D)
        embeddings = [row.clone() for row in embeddings[:len(captions)]]    # a view would keep all rows in memory
        if self.cache is None:
            return embeddings
        for caption, embedding in zip(captions, embeddings):
            self.cache.put("text " + caption, embedding.float().cpu().numpy())
        return [self._stored(caption) for caption in captions]    # rounded by the cache: later runs get the same values

    def _stored(self, caption: str) -> torch.Tensor | None:
        array = self.cache.get("text " + caption)
        return None if array is None else to_device(torch.from_numpy(array), self.device)


# ----- filling a cache before training -------------------------------------------------------------------------------

def latent_key(dataset: ImageDataset, index: int, size: tuple[int, int], flip: bool) -> str:
    """Returns the key of an image's latents: hash, height x width, mirrored or not: "3f2a... 1024x768 flipped"."""
    return f"{dataset.key(index)} {size[0]}x{size[1]}{' flipped' * flip}"


def fill_cache(dataset: ImageDataset, sizes: Callable[[int], list[tuple[int, int]]], flips: bool, caches: dict,
               encoders: dict, texts, processes) -> dict[int, int]:
    """Computes the latents of images and embeddings of captions that are not cached yet. Each process does its share.

    sizes     a function: sizes(i) is a list of all (height, width) to which image i is cut around its center
    flips     whether to also cache the latents of mirrored images;  texts: a CachedTexts, or None for no embeddings
    caches    {name: Cache};  encoders: {name: function from pixels (1,h,w,3) uint8 to latents (1,C,h',w')}
    Returns {index of an unreadable image: index of the image to use instead}: the next readable image in the same
    bucket (dataset.bucket) or, if there is none, in the whole dataset. Raises ValueError if no image can be read.
    """
    def keys_of(i: int, sizes: Callable) -> dict[str, tuple]:
        return {latent_key(dataset, i, size, flip): (i, size, flip) for size in sizes(i)
                for flip in (False, True)[:1 + flips]}

    def fill(images: Iterable[int], sizes: Callable) -> set[str]:
        """Computes the missing entries of images, cut to sizes(i). Returns the keys of images that cannot be read."""
        keys = {key: what for i in images for key, what in keys_of(i, sizes).items()}
        missing = list(dict.fromkeys(key for cache in caches.values() for key in cache.missing([*keys])))
        missing = missing[processes.rank::processes.world]
        processes.wait()                         # all list missing keys before one writes, so that the shares match
        for key in tqdm(missing, desc="caching latents", unit="image", disable=processes.rank > 0 or not missing):
            i, size, flip = keys[key]
            with contextlib.suppress(BrokenImage):         # a broken image gets no entry; _replacements finds another
                pixels = torch.from_numpy(np.array(fit(dataset.read(i), size, "center", flip)))[None]    # (1, h, w, 3)
                for name, cache in caches.items():
                    cache.put(key, encoders[name](pixels)[0].cpu().numpy())
        processes.wait()
        return {key for cache in caches.values() for key in cache.missing([*keys])}

    missing = fill(range(len(dataset)), sizes)
    if texts is not None:
        captions = sorted({""} | {caption for i in range(len(dataset)) for caption in dataset.captions(i)})
        texts.fill(captions[processes.rank::processes.world], silent=processes.rank > 0)
    processes.wait()
    # Search all images for the missing keys, because copies of a broken file have the same keys.
    broken = [i for i in range(len(dataset)) if missing and not missing.isdisjoint(keys_of(i, sizes))]
    return _replacements(dataset, broken, sizes, fill, processes)


def _replacements(dataset: ImageDataset, broken: list[int], sizes: Callable, fill: Callable, processes
                  ) -> dict[int, int]:
    """Returns {index of a broken image: index of its replacement} and caches replacements by `fill`. See fill_cache."""
    def first_after(i: int, usable: np.ndarray) -> int:
        return int(usable[np.searchsorted(usable, i) % len(usable)])

    usable = np.setdiff1d(np.arange(len(dataset)), broken)
    if not len(usable):
        raise ValueError(f"{dataset.source}: none of its {len(broken)} images can be read, such as "
                         f"{dataset.name(broken[0])}")
    if broken and processes.rank == 0:
        tell(f"{len(broken)} images cannot be read: {', '.join(dataset.name(i) for i in broken[:5])}"
             f"{', ...' if len(broken) > 5 else ''}")
    replaced, others = {}, {}
    for i in broken:
        alike = usable[dataset.bucket[usable] == dataset.bucket[i]]
        replaced[i] = first_after(i, alike if len(alike) else usable)
        if not len(alike):               # an image from another bucket has no cached latents in the sizes of i yet
            others.setdefault(replaced[i], []).extend(sizes(i))
    fill([*others], others.get)
    return replaced
