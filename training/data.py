"""Captioned images from any source, each cut to one of a few shapes.

  folder | tar shards | pipe:... | tables | hub:... | scenes -open_dataset-> ImageDataset: read(i), captions(i), key(i)
  sizes (N,2) -nearest_bucket-> buckets (N,): to which of bucket_sizes each image is cut
  read(i) (H,W,3) uint8 -fit-> (h,w,3) uint8;  order.py decides which images make up a training step

A resolution always means pixels of the image. The image encoder sees 0.75 times as many per side.
Surprise: nothing is dropped silently. Files that cannot be used are counted and named. Files that turn out to be broken
later are named on stderr and replaced by the next readable one, which depends only on the files, so a resumed run
replaces them in the same way.
Needs: numpy, pillow; sources.py, extras/; scenes.py for `scenes`.
"""
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from extras.images import decoding, open_header, open_image, pixels_of, read_image, to_srgb
from extras.jobs import prompt_lines
from loading.errors import UserError, printable, tell
from loading.options import SEED, Number, integer
from training.sources import SUFFIXES, Chosen, Found, Place, content_of, samples_of


class BrokenImage(UserError):
    """A file that turned out not to be a complete image when it was read; the message names it."""


# ----- opening -------------------------------------------------------------------------------------------------------

def open_dataset(source: str | Path, *, min_side: int = 64, captions_required: bool = True,
                 index_folder: str | Path | None = None, require_keys: bool = False, image_column: str | None = None,
                 caption_column: str | None = None, dataset_config: str | None = None,
                 skipped: list[tuple[str, str]] | None = None, **filters: float) -> "ImageDataset":
    """Finds all images of a source and their captions, from headers and text only.

    source  FOLDER, with everything below it: NAME.jpg (or another of SUFFIXES) next to NAME.txt (a caption per line),
            NAME.caption (one) or NAME.json; or metadata.jsonl, .csv or .parquet with file_name and text, which take
            precedence.  {a,b} and data/*: several folders
            data/*.tar, data/{000..031}.tar: uncompressed tar files of the same; also a folder that contains only these
            pipe:COMMAND: COMMAND's output is such a tar file; kept in index_folder.  Braces as above
            FILE.parquet, FILE.arrow or a folder of datasets' save_to_disk (need pyarrow), hub:NAME[:SPLIT] (needs
            datasets): rewritten once into index_folder
            scenes[:captioned|uncaptioned|all][:N][:SEED]: N (24000) emoji scenes.  ./scenes is a folder of that name
    min_side           px: images with a shorter side are skipped
    captions_required  skip images without a caption; False: they get the caption ""
    index_folder       where indexes and copies of remote shards go (default: an index stands next to its shard)
    image_column       column of a table with the images (default: the first of tables.IMAGE_COLUMNS, or the only one),
                       or the key of metadata with the file names (default: file_name)
    caption_column     column or key with the captions, also in .json (default: the first of sources.CAPTION_KEYS that
                       has one)
    dataset_config     configuration of a dataset of the Hub
    skipped            a list to which (name, reason) of all unusable files is added, also if an error is raised
    filters            min_KEY, max_KEY: inclusive bounds on numbers in .json or metadata, such as max_punsafe=0.99.
                       An image without such a number, or with null, stays unless require_keys.
    Raises ValueError, in one line, for a source that cannot be read, and, with what was found, if no image is left.
    """
    text, folder = str(source), Path(index_folder) if index_folder else None
    limits, found, known, skipped = _limits(filters), Found(), set(), [] if skipped is None else skipped
    chosen = Chosen(image_column, caption_column, dataset_config)
    if text.split(":")[0] == "scenes":
        if limits:
            raise ValueError(f"{text} has no keys to filter by: remove {', '.join(filters)}")
        return SceneDataset(text)

    def kept() -> Iterator[dict]:                # a million samples pass through here one at a time
        for sample in samples_of(text, folder, found, chosen):
            known.update(sample.get("numbers", ()))
            problem = sample["problem"] or _problem(sample, min_side, captions_required, limits, require_keys)
            if problem:
                skipped.append((printable(sample["name"]), printable(problem)))
            else:
                yield sample

    dataset = ImageDataset(text, kept(), skipped, folder / "keys.txt" if folder else None)
    dataset.notes = found.notes()
    if not len(dataset):
        captions = " with a caption in NAME.txt, NAME.caption, NAME.json or metadata.jsonl/.csv" * captions_required
        files = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.files.most_common(8))
        raise ValueError(f"{text}: no image to train on. Looked for {' '.join(SUFFIXES)}{captions}; "
                         f"found {files or 'no file'}; {_listed(skipped)}")
    if unknown := sorted(limits.keys() - known):           # otherwise a typo would let everything through
        raise ValueError(f"{text}: no image has a number {unknown[0]!r} to filter by, "
                         f"found: {', '.join(sorted(known)) or 'none'}")
    if caption_column and not found.captions[caption_column]:
        raise ValueError(f"{text}: --caption-column {caption_column} has no caption, "
                         f"found: {', '.join(sorted(found.keys)) or 'no named captions, which .txt files do not have'}")
    if image_column and not found.images and not found.files.keys() & {".jsonl", ".csv", ".parquet"}:
        raise ValueError(f"{text}: --image-column {image_column} is for tables and metadata files, and there are none")
    return dataset


def read_filters(texts: list[str]) -> dict[str, float]:
    """["min_aesthetic=5", ...], the values of --filter -> {"min_aesthetic": 5.0, ...}.  Raises ValueError."""
    try:
        return {name: Number()(value) for name, _, value in (text.partition("=") for text in texts)}
    except ValueError:
        raise ValueError(f"--filter {' '.join(texts)}: expected something like min_aesthetic=5") from None


def read_prompts(file: str | Path) -> list[str]:
    """A prompt per line of a text file, without empty lines and # comments, as in those of sample.py.

    Raises ValueError if there are none, or the file cannot be read.
    """
    prompts = [settings["prompt"].strip() for _, settings in prompt_lines(Path(file)) if settings.get("prompt")]
    if not any(prompts):
        raise ValueError(f"{file} contains no prompts: expected one per line")
    return prompts


def _limits(filters: dict) -> dict[str, tuple[float, float]]:
    """{"max_punsafe": 0.9} -> {"punsafe": (-inf, 0.9)}"""
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
    """Why a sample is skipped, or None."""
    height, width = sample["size"]
    if min(height, width) < min_side:
        return f"{width} x {height} px, fewer than {min_side}"
    if captions_required and not sample["captions"]:
        keys = ", ".join(sample.get("keys", ()))
        return "no caption" + f" among its keys {keys}: --caption-column chooses one" * bool(keys)
    for key, (low, high) in limits.items():
        value = sample["numbers"].get(key)       # None only if there is none: 0.0 is a number, often the best one
        if value is None and require_keys:
            return f"no number {key}"
        if value is not None and not low <= value <= high:
            return f"{key} {value:g}"
    return None


def _listed(skipped: list[tuple[str, str]]) -> str:
    names = ", ".join(f"{name} ({why})" for name, why in skipped[:5])
    return f"{len(skipped)} skipped" + (f": {names}" if names else "") + (", ..." if len(skipped) > 5 else "")


# ----- images and captions -------------------------------------------------------------------------------------------

class ImageDataset:
    """Images and captions by number, 0 to N - 1, always in the same order.

    sizes (N,2) int32: height and width as shown, after EXIF orientation.  skipped: (name, reason) of unusable files.
    """
    def __init__(self, source: str, samples: Iterable[dict], skipped: list[tuple[str, str]], key_file: Path | None):
        self.source, self.skipped, self.notes = source, skipped, []
        # All texts in one block of memory, not in a million objects. Looking at a Python object writes its reference
        # count, so every worker process would sooner or later hold its own copy of them all.
        records, ends, sizes = bytearray(), array("q", [0]), array("i")
        for sample in samples:
            records += json.dumps([printable(sample["name"]), sample["place"], sample["captions"]]).encode()
            ends.append(len(records))
            sizes.extend(sample["size"])
        self._records, self._ends = bytes(records), np.array(ends)
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)                  # (N, 2)
        self._key_file, self._keys = key_file, None

    def __len__(self) -> int:
        return len(self.sizes)

    def _record(self, i: int) -> tuple[str, Place, list[str]]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return json.loads(self._records[self._ends[i]:self._ends[i + 1]])

    def name(self, i: int) -> str:
        return self._record(i)[0]

    def captions(self, i: int) -> list[str]:
        """At least one; [""] for an image without."""
        return self._record(i)[2] or [""]

    def select(self, numbers: np.ndarray) -> None:
        """From now on, the images with these numbers are all there are."""
        records = [self._records[self._ends[i]:self._ends[i + 1]] for i in numbers]
        self._records, self._ends = b"".join(records), np.cumsum([0, *map(len, records)])
        self.sizes = self.sizes[numbers]

    def key(self, i: int) -> str:
        """sha256, in hex, of the image's bytes and of what is done to its colours: the name of its pixels in a cache.

        With an index_folder, unchanged files are read for it only once.
        """
        file, offset, length = self._record(i)[1]
        stat = os.stat(file)         # as make does: same name, size and modification time, same content
        version = f"{os.path.abspath(file)} {offset} {length} {stat.st_size} {stat.st_mtime_ns} in sRGB"
        known_as = hashlib.sha256(os.fsencode(version)).hexdigest()[:24]
        if self._keys is None:
            known = self._key_file and self._key_file.exists()
            lines = self._key_file.read_text(errors="replace").split("\n") if known else []
            self._keys = dict(line.split() for line in lines if re.fullmatch("[0-9a-f]{24} [0-9a-f]{64}", line))
        if known_as not in self._keys:
            content = content_of((file, offset, length))
            digest = hashlib.sha256(content)
            with contextlib.suppress(Exception), open_header(io.BytesIO(content), 0, len(content)) as image:
                if to_srgb(image):   # latents cached by versions that ignored colour profiles must not be found
                    digest.update(b" in sRGB")
            self._keys[known_as] = digest.hexdigest()
            if self._key_file:       # one short write at the end of the file: lines of several processes do not mix
                with contextlib.suppress(OSError):       # a full disk: computed again next time
                    self._key_file.parent.mkdir(parents=True, exist_ok=True)
                    with open(self._key_file, "ab", buffering=0) as out:
                        out.write(f"{known_as} {self._keys[known_as]}\n".encode())
        return self._keys[known_as]

    def read(self, i: int) -> np.ndarray:
        """(H,W,3) uint8, sRGB: upright, and over white where it is transparent.  Raises BrokenImage."""
        name, place, _ = self._record(i)
        try:
            with decoding(), open_image(content_of(place)) as image:
                pixels = pixels_of(image)                                      # (H, W, 3 or 4)
        except ValueError as error:
            raise BrokenImage(f"{name} cannot be read: {error}") from error
        if pixels.shape[2] == 3:     # without the detour through floats: half the time
            return pixels
        return (read_image(pixels) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()

    def read_or_next(self, i: int, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """read(i) and i. If that file is broken, the next number in `allowed`, ascending, and from its start again.

        The replacement depends only on the files, so all runs agree. The broken file is added to `skipped`, but only in
        this process: with worker processes, compare the number with i. Raises BrokenImage if none can be read.
        """
        allowed = np.asarray(allowed)
        for j in itertools.chain([i], allowed[allowed > i], allowed[allowed < i]):
            try:
                return self.read(int(j)), int(j)
            except BrokenImage as error:
                name = self.name(int(j))
                entry = name, str(error).removeprefix(f"{name} cannot be read: ")
                if entry not in self.skipped:
                    self.skipped.append(entry)
        raise BrokenImage(f"{self.source}: none of {len(allowed)} images of this size can be read; "
                          f"{_listed(self.skipped)}")

    def read_or_replace(self, i: int, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """read_or_next, then among all images. Broken ones are named on stderr, once by each process that meets them.

        Raises BrokenImage if no image at all can be read.
        """
        known = len(self.skipped)
        try:
            image, j = self.read_or_next(i, allowed)
        except BrokenImage:
            image, j = self.read_or_next(i, np.arange(len(self)))
        for name, why in self.skipped[known:]:
            print(file=sys.stderr)               # after a progress bar
            tell(f"{name} cannot be read and is replaced: {why}")
        return image, j

    def describe(self) -> str:
        """One line: how many, from where, what was taken and what was skipped."""
        return "; ".join([f"{len(self)} images in {self.source}", *self.notes]
                         + [_listed(self.skipped)] * bool(self.skipped))


class SceneDataset(ImageDataset):
    """Emoji scenes with the same interface; each is drawn when it is requested."""
    def __init__(self, source: str):
        from training.scenes import CANVAS, EmojiScenes
        _, *words = source.split(":")
        self._objects = words.pop(0) if words and not words[0].isdecimal() else "captioned"
        try:
            count, seed = words + ["24000", "0"][len(words):]
            count, self._seed = integer(1, 10 ** 7)(count), SEED(seed)
        except ValueError:
            raise ValueError(f"cannot read {source!r}: expected scenes[:captioned|uncaptioned|all][:N][:SEED], "
                             "such as scenes:all:500:1, and N of 10 million at most") from None
        self.source, self.skipped, self.notes = source, [], []
        self._scenes = EmojiScenes(self._objects, seed=self._seed)
        self.sizes = np.full((count, 2), CANVAS, np.int32)

    def _record(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return f"scene {i}", None, [self._scenes.caption(i)]

    def select(self, numbers: np.ndarray) -> None:
        self.sizes = self.sizes[numbers]         # so many scenes; the first are as good as any others

    def key(self, i: int) -> str:
        return hashlib.sha256(f"scene {self._seed} {self._objects} {i}".encode()).hexdigest()

    def read(self, i: int) -> np.ndarray:
        return self._scenes.batch(i, 1)[0][0]    # (128, 128, 3)


# ----- shapes --------------------------------------------------------------------------------------------------------

def bucket_sizes(resolution: int, step: int = 128, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of the shapes that images are cut to: multiples of `step` px, each of about resolution^2 px.

    128 px, because 0.75 x 128 = 96 = 3 x 32: 3 whole positions of the semantic latent. The longer side is at most
    max_ratio times the shorter. Shapes whose area differs by more than a quarter are omitted, so that a batch of each
    takes about the same memory; up to 256 px only the square remains.

    Raises ValueError unless step divides resolution.
    """
    n = resolution // step                       # from here on in units of step
    if n < 1 or resolution % step:
        raise ValueError(f"a resolution of {resolution} px: expected a multiple of {step}, such as {max(1, n) * step}")
    shapes = {(n, n)}
    for a in range(1, n * n + 1):
        b = min(n * n // a, n * n // a + 1, key=lambda b: abs(a * b - n * n))
        if max(a, b) <= max_ratio * min(a, b) and 0.8 <= a * b / n ** 2 <= 1.25:
            shapes |= {(a, b), (b, a)}
    return sorted((a * step, b * step) for a, b in shapes)


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """sizes (N,2) of images -> (N,) which bucket is nearest in shape.

    By the logarithm of height / width, because a crop removes a share: 1:2 is as far from 1:1 as 2:1. By the ratio
    itself, 0.5 and 2, wide images would be pushed towards the square.
    """
    shapes, targets = (np.log(np.asarray(x, float)) @ [1, -1] for x in (sizes, buckets))    # (N,), (M,)
    return np.abs(shapes[:, None] - targets).argmin(axis=1)                                 # (N,)


def fit(image: np.ndarray, size: tuple[int, int], crop: str = "center", flip: bool = False,
        rng: np.random.Generator | None = None) -> np.ndarray:
    """image (H,W,3) uint8 -> (h,w,3) uint8: the largest crop of that shape, resized, and mirrored if flip is true.

    crop  "center", or "random": anywhere along the side that is too long, drawn from rng
    flip  whether to mirror; any coin toss is the caller's, who may have to remember its result
    Raises ValueError for other crops and arrays.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of shape {image.shape} and {image.dtype}, expected (H,W,3) of uint8")
    if crop not in ("center", "random"):
        raise ValueError(f"unknown crop {crop!r}, expected center or random")
    (height, width), (h, w) = image.shape[:2], size
    scale = min(height / h, width / w)           # px of the image per px of the result
    box_height, box_width = min(h * scale, height), min(w * scale, width)      # min: h * (height / h) may round up
    where = rng.random(2) if crop == "random" else (0.5, 0.5)
    # Whole pixels, so that an image of the right scale is cropped and not resampled.
    top, left = (int(share * (int(spare) + 1)) for share, spare in zip(where, (height - box_height, width - box_width)))
    # Pillow's bicubic widens its kernel when it shrinks an image: no pixel is skipped, in any version of any library.
    # Sharper than bilinear, without most of the ringing of Lanczos.
    result = Image.fromarray(image).resize((w, h), Image.BICUBIC, box=(left, top, left + box_width, top + box_height))
    return np.ascontiguousarray(np.asarray(result)[:, ::-1] if flip else np.asarray(result))
