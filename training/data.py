"""Datasets of captioned images from any source, and the shapes (buckets) to which images are cut.

  folder | tar shards | pipe:... | tables | hub:... | scenes -open_dataset-> ImageDataset: read(i), captions(i), key(i)
  sizes (N,2) -nearest_bucket-> buckets (N,): for each image, the index in bucket_sizes of the size to which it is cut
  read(i) (H,W,3) uint8 -fit-> (h,w,3) uint8;  order.py decides which images make up a training step

A resolution is always in pixels of the image. The input of the image encoder has 3/4 of the image's width and height.
Note: no file is dropped silently. Files that cannot be used are counted and named. Files that turn out to be broken
later are named on stderr and replaced by the next readable file. The replacement depends only on the files, so it is
the same in a resumed run. The index of a large dataset is written once and then memory-mapped from a folder in
index_folder, so that the next start takes seconds, and all processes of a machine share one copy.
Needs: numpy, pillow; sources.py, extras/; scenes.py for `scenes`.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from extras.images import decoding, open_header, open_image, pixels_of, read_image, to_srgb
from extras.jobs import prompt_lines
from loading.errors import UserError, printable, tell
from loading.files import write_atomically
from loading.options import RESOLUTION, SEED, Number, integer
from training.order import LARGE, pieces
from training.sources import INDEX_VERSION, SUFFIXES, Chosen, Found, Place, content_of, parts_of, samples_of


class BrokenImage(UserError):
    """Raised if a file turns out not to be a complete image when it is read. The message names the file."""


# ----- opening -------------------------------------------------------------------------------------------------------

def open_dataset(source: str | Path, *, min_side: int = 64, captions_required: bool = True,
                 index_folder: str | Path | None = None, require_keys: bool = False, image_column: str | None = None,
                 caption_column: str | None = None, dataset_config: str | None = None,
                 skipped: list[tuple[str, str]] | None = None, **filters: float) -> "ImageDataset":
    """Finds all images of a source and their captions. Reads only headers and text, no pixels.

    source  FOLDER, with everything below it: NAME.jpg (or another of SUFFIXES) next to NAME.txt (a caption per line),
            NAME.caption (one) or NAME.json; or metadata.jsonl, .csv or .parquet with file_name and text, which take
            precedence.  {a,b} and data/*: several folders
            data/*.tar, data/{000..031}.tar: uncompressed tar files of such files; also a folder with only tar files
            pipe:COMMAND: COMMAND's output is such a tar file and is stored in index_folder.  Braces as above
            FILE.parquet, FILE.arrow or a folder of datasets' save_to_disk (need pyarrow), hub:NAME[:SPLIT] (needs
            datasets): rewritten once as a tar file in index_folder
            scenes[:OBJECTS][:N][:SEED]: N (24000) emoji scenes, see scenes.py.  ./scenes is a folder of that name
    min_side           px: images with a shorter side are skipped
    captions_required  skip images without a caption; False: they get the caption ""
    index_folder       where indexes and copies of remote shards go (default: an index stands next to its shard)
    image_column       column of a table with the images (default: the first of tables.IMAGE_COLUMNS, or the only one),
                       or the key of metadata with the file names (default: file_name)
    caption_column     column or key with the captions, also in .json (default: the first of sources.CAPTION_KEYS that
                       has one)
    dataset_config     configuration of a dataset of the Hub
    skipped            a list to which (name, reason) of all unusable files is added, also if an error is raised. With
                       such a list, a stored index is not used, because it does not contain all names
    filters            min_KEY, max_KEY: inclusive bounds on numbers in .json or metadata, such as max_punsafe=0.99.
                       An image without such a number, or with null, stays unless require_keys.
    Raises ValueError, with a message of one line, if the source cannot be read or has no image that can be used.
    """
    text, folder = str(source), Path(index_folder) if index_folder else None
    limits, found, known = _limits(filters), Found(), set()
    chosen = Chosen(image_column, caption_column, dataset_config)
    if text.split(":")[0] == "scenes":
        if limits:
            raise ValueError(f"{text} has no keys to filter by: remove {', '.join(filters)}")
        return SceneDataset(text)
    parts = parts_of(text, folder, chosen)
    options = [text, min_side, captions_required, require_keys, *vars(chosen).values(), sorted(filters.items())]
    stored = stored_in(folder, options, parts) if folder else None
    if stored and stored.exists() and skipped is None:
        return ImageDataset(text, (), [], folder, stored)
    skipped = [] if skipped is None else skipped

    def kept() -> Iterator[dict]:                # yields the usable samples: a list of millions would fill the memory
        for sample in samples_of(parts, folder, found, chosen):
            known.update(sample.get("numbers", ()))
            problem = sample["problem"] or _problem(sample, min_side, captions_required, limits, require_keys)
            if problem:
                skipped.append((printable(sample["name"]), printable(problem)))
            else:
                yield sample

    dataset = ImageDataset(text, kept(), skipped, folder)
    dataset.notes = found.notes()
    if not len(dataset):
        captions = " with a caption in NAME.txt, NAME.caption, NAME.json or metadata.jsonl/.csv" * captions_required
        files = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.files.most_common(8))
        raise ValueError(f"{text}: no image to train on. Looked for {' '.join(SUFFIXES)}{captions}; "
                         f"found {files or 'no file'}; {_listed(skipped)}")
    check_choices(text, chosen, found, sorted(limits.keys() - known), known)
    return dataset.store(stored)


def check_choices(text: str, chosen: Chosen, found: Found, unknown: list[str], known: set[str]) -> None:
    """Raises ValueError if no image has a chosen column or a filter's key, because a misspelt one would do nothing.
    text: the source. unknown: keys of filters that no image has. known: all keys of numbers that images have."""
    if unknown:
        raise ValueError(f"{text}: no image has a number {unknown[0]!r} to filter by, "
                         f"found: {', '.join(sorted(known)) or 'none'}")
    if chosen.caption and not found.captions[chosen.caption]:
        raise ValueError(f"{text}: --caption-column {chosen.caption} has no caption, "
                         f"found: {', '.join(sorted(found.keys)) or 'no named captions, which .txt files do not have'}")
    if chosen.image and not found.images and not found.files.keys() & {".jsonl", ".csv", ".parquet"}:
        raise ValueError(f"{text}: --image-column {chosen.image} is for tables and metadata files, and there are none")


def stored_in(folder: Path, options: list, parts: list[tuple[Path, str]]) -> Path | None:
    """Returns the path of the folder for a dataset's index, whose name is a hash of the options and of the path, size
    and time of change of each tar file in `parts`. Returns None if a part is a folder: any file in it may change."""
    if any(os.path.isdir(path) for path, _ in parts):
        return None
    digest = hashlib.sha256(json.dumps([INDEX_VERSION, options]).encode())
    for path, _ in parts:
        stat = path.stat()
        digest.update(os.fsencode(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns} "))
    return folder / f"images-{digest.hexdigest()[:16]}"


def read_filters(texts: list[str]) -> dict[str, float]:
    """Converts values of --filter, such as ["min_x=5"], to {"min_x": 5.0}. Raises ValueError for other texts."""
    try:
        return {name: Number()(value) for name, _, value in (text.partition("=") for text in texts)}
    except ValueError:
        raise ValueError(f"--filter {' '.join(texts)}: expected something like min_aesthetic=5") from None


def read_prompts(file: str | Path) -> list[str]:
    """Returns a file's prompts, one per line, without empty lines and # comments. Raises ValueError if it has none."""
    prompts = [settings["prompt"].strip() for _, settings in prompt_lines(Path(file)) if settings.get("prompt")]
    if not any(prompts):
        raise ValueError(f"{file} contains no prompts: expected one per line")
    return prompts


def _limits(filters: dict) -> dict[str, tuple[float, float]]:
    """Converts {"max_x": 0.9} to bounds, {"x": (-inf, 0.9)}. Raises ValueError for names without min_ or max_."""
    limits = {}
    for name, bound in filters.items():
        side, _, key = name.partition("_")
        if side not in ("min", "max") or not key:
            raise ValueError(f"unknown option {name!r}: "
                             "expected a filter min_KEY or max_KEY, such as max_pwatermark=0.5")
        low, high = limits.get(key, (-math.inf, math.inf))
        limits[key] = (float(bound), high) if side == "min" else (low, float(bound))
    return limits


def _problem(sample: dict, min_side: int, captions_required: bool, limits: dict, require_keys: bool) -> str | None:
    """Returns the reason why a sample is skipped, or None if it is kept. limits: the result of _limits."""
    height, width = sample["size"]
    if min(height, width) < min_side:
        return f"{width} x {height} px, fewer than {min_side}"
    if captions_required and not sample["captions"]:
        keys = ", ".join(sample.get("keys", ()))
        return "no caption" + f" among its keys {keys}: --caption-column chooses one" * bool(keys)
    for key, (low, high) in limits.items():
        value = sample["numbers"].get(key)       # None if the image has no such number
        if value is None and require_keys:
            return f"no number {key}"
        if value is not None and not low <= value <= high:
            return f"{key} {value:g}"
    return None


def _listed(skipped: list[tuple[str, str]], more: int = 0) -> str:
    names, number = ", ".join(f"{name} ({why})" for name, why in skipped[:5]), len(skipped) + more
    return f"{number} skipped" + (f": {names}" if names else "") + (", ..." if number > 5 else "")


def candidates(index: int, others: np.ndarray | Callable[[], np.ndarray]) -> Iterator[int]:
    """Yields `index`, then the greater numbers in others (N,), then the smaller ones. If others is a function, which
    returns these numbers, it is called only when a second number is requested."""
    yield index
    others = np.asarray(others() if callable(others) else others)
    yield from others[others > index].tolist()
    yield from others[others < index].tolist()


# ----- images and captions -------------------------------------------------------------------------------------------

class ImageDataset:
    """Images and captions, numbered from 0 to N - 1 in an order that is always the same.

    sizes (N,2) int32: height and width after EXIF orientation.  skipped: (name, reason) of unusable files.
    """
    def __init__(self, source: str, samples: Iterable[dict], skipped: list[tuple[str, str]], folder: Path | None,
                 stored: Path | None = None):
        """Reads samples, dicts from sources.samples_of, or, if it is not None, stored, a folder that the method `store`
        has written. folder: index_folder of open_dataset, or None."""
        self.source, self.skipped, self.unlisted, self.notes = source, skipped, 0, []
        self.folder, self._stored, self._keys, self._numbers = folder, None, None, None
        if stored:
            return self._map(stored)
        # All texts are in one block of memory instead of a million Python objects. Reading a Python object changes its
        # reference count, so a worker process would soon have its own copy of each memory page that it shares.
        there = folder and next(path for path in (folder, *folder.parents) if path.exists())
        records = tempfile.SpooledTemporaryFile(2 ** 28 * bool(folder), dir=there)  # on disk above 256 MiB (0: never)
        ends, sizes = array("q", [0]), array("i")
        for sample in samples:
            record = json.dumps([printable(sample["name"]), sample["place"], sample["captions"]]).encode()
            records.write(record)
            ends.append(ends[-1] + len(record))
            sizes.extend(sample["size"])
        records.seek(0)
        self._ends, self.sizes = np.array(ends), np.array(sizes, np.int32).reshape(-1, 2)            # (N + 1,), (N, 2)
        if folder and len(self.sizes) >= LARGE:
            self._records = records              # the method `store` moves the records to a file
        else:
            with records:
                self._records = np.frombuffer(records.read(), np.uint8)

    def store(self, path: Path | None) -> "ImageDataset":
        """If the dataset is large, writes its index (records, sizes) to the folder `path` and memory-maps the index. If
        path is None, the folder is in index_folder, and its name is a hash of the content. Returns self."""
        if not self.folder or len(self) < LARGE:
            return self

        def write(folder: Path) -> None:
            with self._records, open(folder / "records", "wb") as out:
                shutil.copyfileobj(self._records, out, 2 ** 20)
            np.save(folder / "ends.npy", self._ends)
            np.save(folder / "sizes.npy", self.sizes)
            facts = dict(skipped=self.skipped[:5], number=len(self.skipped), notes=self.notes)
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        if path is None:
            digest = hashlib.sha256(self.sizes)
            for block in iter(partial(self._records.read, 2 ** 20), b""):
                digest.update(block)
            self._records.seek(0)
            path = self.folder / f"images-{digest.hexdigest()[:16]}"
        with contextlib.suppress(FileExistsError):         # raised if another run or machine has written the folder
            write_atomically(path, write, folder=True)
        self._map(path)
        return self

    def _map(self, stored: Path) -> None:
        facts = json.loads((stored / "facts.json").read_text(encoding="utf-8"))
        self.skipped, self.notes = [(name, why) for name, why in facts["skipped"]], facts["notes"]
        self.unlisted, self._stored = facts["number"] - len(self.skipped), stored
        self._map_arrays()

    def _map_arrays(self) -> None:
        self._records = np.asarray(np.memmap(self._stored / "records", np.uint8, "r"))
        self._ends, self.sizes = (np.asarray(np.load(self._stored / f"{name}.npy", mmap_mode="r"))
                                  for name in ("ends", "sizes"))
        if self._numbers is not None:
            self.sizes = self.sizes[self._numbers]

    def __getstate__(self) -> dict:
        """Returns the state for pickling, without memory-mapped arrays, because other processes map the same files."""
        mapped = ("_records", "_ends", "sizes") if self._stored else ()
        return {name: value for name, value in vars(self).items() if name not in mapped}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self._stored:
            self._map_arrays()

    def __len__(self) -> int:
        return len(self.sizes)

    def _record(self, i: int) -> tuple[str, Place, list[str]]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i = i if self._numbers is None else self._numbers[i]
        return json.loads(self._records[self._ends[i]:self._ends[i + 1]].tobytes())

    def name(self, i: int) -> str:
        return self._record(i)[0]

    def captions(self, i: int) -> list[str]:
        """Returns the captions of image i, or [""] if it has none."""
        return self._record(i)[2] or [""]

    def select(self, numbers: np.ndarray) -> None:
        """Keeps only the images with these numbers (n,) and numbers them again from 0."""
        self._numbers = numbers if self._numbers is None else self._numbers[numbers]
        self.sizes = self.sizes[numbers]

    def key(self, i: int) -> str:
        """Returns image i's key in a cache: the sha256, in hex, of its bytes (and of a mark if colours are converted).

        Keys are stored in index_folder, if there is one, so that each file is read only once to compute its key.
        """
        file, offset, length = self._record(i)[1]
        stat = os.stat(file)         # a file with the same name, size and time counts as unchanged
        version = f"{os.path.abspath(file)} {offset} {length} {stat.st_size} {stat.st_mtime_ns} in sRGB"
        known_as = hashlib.sha256(os.fsencode(version)).hexdigest()[:24]
        key_file = self.folder and self.folder / "keys.txt"
        if self._keys is None:
            lines = key_file.read_text(errors="replace").split("\n") if key_file and key_file.exists() else []
            self._keys = dict(line.split() for line in lines if re.fullmatch("[0-9a-f]{24} [0-9a-f]{64}", line))
        if known_as not in self._keys:
            content = content_of((file, offset, length))
            digest = hashlib.sha256(content)
            with contextlib.suppress(Exception), open_header(io.BytesIO(content), 0, len(content)) as image:
                if to_srgb(image):   # use another key than older code, which cached latents of unconverted colours
                    digest.update(b" in sRGB")
            self._keys[known_as] = digest.hexdigest()
            if key_file:             # append the line in one short write, so that lines of several processes do not mix
                with contextlib.suppress(OSError):       # if the disk is full, the key is computed again next time
                    key_file.parent.mkdir(parents=True, exist_ok=True)
                    with open(key_file, "ab", buffering=0) as out:
                        out.write(f"{known_as} {self._keys[known_as]}\n".encode())
        return self._keys[known_as]

    def read(self, i: int) -> np.ndarray:
        """Returns image i, (H,W,3) uint8 in sRGB, upright, drawn over white. Raises BrokenImage if it is unreadable."""
        name, place, _ = self._record(i)
        try:
            with decoding(), open_image(content_of(place)) as image:
                pixels = pixels_of(image)                                      # (H, W, 3 or 4)
        except ValueError as error:
            raise BrokenImage(f"{name} cannot be read: {error}") from error
        if pixels.shape[2] == 3:     # no transparency: skipping the conversion to floats saves half of the time
            return pixels
        return (read_image(pixels) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()

    def read_or_next(self, i: int, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns image i and the number i. If image i is broken, returns the next readable image in `allowed` and its
        number; after the end of `allowed`, the search continues at its start. Raises BrokenImage if none is readable.

        The replacement depends only on the files, so it is the same in all runs. A broken file is added to `skipped`,
        but only in this process. Callers need the number to find the replacement's caption and cache entries.
        allowed: (n,) ascending numbers, or a function that returns them, which is called if image i is broken.
        """
        for j in candidates(i, allowed):
            try:
                return self.read(int(j)), int(j)
            except BrokenImage as error:
                name = self.name(int(j))
                entry = name, str(error).removeprefix(f"{name} cannot be read: ")
                if entry not in self.skipped:
                    self.skipped.append(entry)
        raise BrokenImage(f"{self.source}: none of {len(allowed() if callable(allowed) else allowed)} images of this "
                          f"size can be read; {_listed(self.skipped, self.unlisted)}")

    def read_or_replace(self, i: int, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """Does what read_or_next does, but if no image in `allowed` can be read, also searches all other images. Names
        broken images on stderr, once per process. Raises BrokenImage only if no image of the dataset can be read."""
        known = len(self.skipped)
        try:
            image, j = self.read_or_next(i, allowed)
        except BrokenImage:
            image, j = self.read_or_next(i, lambda: np.arange(len(self)))
        for name, why in self.skipped[known:]:
            print(file=sys.stderr)               # end the line of a progress bar
            tell(f"{name} cannot be read and is replaced: {why}")
        return image, j

    def describe(self) -> str:
        """Describes the dataset in a line: number of images, source, columns and keys used, files that were skipped."""
        return "; ".join([f"{len(self)} images in {self.source}", *self.notes]
                         + [_listed(self.skipped, self.unlisted)] * bool(self.skipped))


class SceneDataset(ImageDataset):
    """Dataset of emoji scenes, drawn when they are read. source: "scenes[:OBJECTS][:N][:SEED]", see scenes.py."""
    folder = _stored = None

    def __init__(self, source: str):
        from training.scenes import CANVAS, EmojiScenes
        _, *words = source.split(":")
        self._objects = words.pop(0) if words and not words[0].isdecimal() else "captioned"
        try:
            count, seed = words + ["24000", "0"][len(words):]
            count, self._seed = integer(1, 10 ** 7)(count), SEED(seed)
        except ValueError:
            raise ValueError(f"cannot read {source!r}: expected scenes[:captioned|uncaptioned|all|varied][:N][:SEED], "
                             "such as scenes:all:500:1, and N of 10 million at most") from None
        self.source, self.skipped, self.unlisted, self.notes = source, [], 0, []
        self._scenes = EmojiScenes(self._objects, seed=self._seed)
        self.sizes = np.full((count, 2), CANVAS, np.int32)

    def _record(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return f"scene {i}", None, [self._scenes.caption(i)]

    def select(self, numbers: np.ndarray) -> None:
        self.sizes = self.sizes[numbers]         # keep the first len(numbers) scenes: all are random, so any will do

    def key(self, i: int) -> str:      # contains the scene, because scenes.py may draw others one day
        text = f"scene {self._seed} {self._objects} {i} {self._scenes.scenes(i, 1)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, i: int) -> np.ndarray:
        return self._scenes.batch(i, 1)[0][0]    # (128, 128, 3)


# ----- shapes --------------------------------------------------------------------------------------------------------

def bucket_sizes(resolution: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Returns the sizes (height, width) to which images are cut: multiples of 128 px, with about resolution^2 px each.

    The image encoder resizes 128 px to 96 = 3 x 32 px, which are exactly 3 latent positions of Stage C. The longer side
    is at most max_ratio times the shorter. Sizes whose area differs by more than a factor of 1.25 are omitted, so that
    all batches take about the same memory. With a max_ratio of 2, only the square remains up to a resolution of 256 px.

    Raises ValueError unless resolution is a multiple of 128.
    """
    step = RESOLUTION.step
    n = resolution // step                       # below, lengths are in units of `step`
    if n < 1 or resolution % step:
        raise ValueError(f"a resolution of {resolution} px: expected a multiple of {step}, such as {max(1, n) * step}")
    shapes = {(n, n)}
    for a in range(1, n * n + 1):
        b = min(n * n // a, n * n // a + 1, key=lambda b: abs(a * b - n * n))
        if max(a, b) <= max_ratio * min(a, b) and 0.8 <= a * b / n ** 2 <= 1.25:
            shapes |= {(a, b), (b, a)}
    return sorted((a * step, b * step) for a, b in shapes)


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Returns indices (N,), in the smallest sufficient dtype, of the buckets nearest in shape to images of sizes (N,2).

    Distances are differences of log(height / width), so that 1:2 is as far from 1:1 as 2:1. With height / width itself,
    the square would get too many tall images: 1.45 is nearer to 1 than to 2, although 2 / 1.45 is less than 1.45.
    """
    sizes, targets = np.asarray(sizes), np.log(np.asarray(buckets, float)) @ [1, -1]                 # (N, 2), (M,)
    nearest = np.empty(len(sizes), np.min_scalar_type(len(buckets)))                                 # (N,)
    for piece in pieces(len(sizes), 2 ** 14):
        shapes = np.log(sizes[piece].astype(float)) @ [1, -1]
        nearest[piece] = np.abs(shapes[:, None] - targets).argmin(axis=1)
    return nearest


def fit(image: np.ndarray, size: tuple[int, int], crop: str = "center", flip: bool = False,
        rng: np.random.Generator | None = None) -> np.ndarray:
    """Crops image (H,W,3) uint8 to the largest area with the shape of `size`, (h,w), and resizes it to (h,w,3) uint8.

    crop  "center", or "random": anywhere along the side that is too long, drawn from rng
    flip  whether to mirror the result
    Raises ValueError for another value of `crop`, and if image is not (H,W,3) uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of shape {image.shape} and {image.dtype}, expected (H,W,3) of uint8")
    if crop not in ("center", "random"):
        raise ValueError(f"unknown crop {crop!r}, expected center or random")
    (height, width), (h, w) = image.shape[:2], size
    scale = min(height / h, width / w)           # px of the image per px of the result
    box_height, box_width = min(h * scale, height), min(w * scale, width)      # rounding may make h * scale > height
    where = rng.random(2) if crop == "random" else (0.5, 0.5)
    # Offsets are whole pixels, so that an image that already has the right scale is only cropped, not resampled.
    top, left = (int(share * (int(spare) + 1)) for share, spare in zip(where, (height - box_height, width - box_width)))
    # Pillow's bicubic widens its kernel when it shrinks an image, so no pixel is skipped. It is sharper than bilinear,
    # without most of the ringing of Lanczos.
    result = Image.fromarray(image).resize((w, h), Image.BICUBIC, box=(left, top, left + box_width, top + box_height))
    return np.ascontiguousarray(np.asarray(result)[:, ::-1] if flip else np.asarray(result))
