"""Captioned pictures from anywhere, and an order of training that can be taken up at any step.

  folder | tar shards | pipe:... | parquet | hub:... | scenes -open_dataset-> ImageDataset: read(i), captions(i), key(i), sizes
  sizes (N,2) -nearest_bucket-> buckets (N,): to which of bucket_sizes each picture is cut
  buckets -BatchSampler-> step k: positions (batch,), indices (batch,) -split-> the share of one GPU -read, fit-> (h,w,3) uint8

What cannot be used is left out, counted and named, never silently. A resolution always means pixels of the picture; of
those the image encoder sees 0.75 x as many.
Surprise: nothing here has a state. Which pictures make up step k is a function of (seed, k), and what is drawn for a
sample (crop, caption, noise) one of (seed, its position in the stream, purpose). So a run that is resumed opens no
picture to find its place, and two GPUs see together in a step what one would have seen, whatever ran before.
Needs: torch, numpy, pillow; sources.py, images.py; scenes.py for `scenes`.
"""
import bisect
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from extras.images import read_image
from training.sources import SUFFIXES, Place, content_of, reason, samples_of


class BrokenImage(ValueError):
    """A file that turned out to be no whole picture when it was read; the message names it."""


# ----- opening ---------------------------------------------------------------------------------------

def open_dataset(source: str | Path, *, min_side: int = 64, captions_required: bool = True,
                  index_folder: str | Path | None = None, require_keys: bool = False, **filters: float) -> "ImageDataset":
    """Finds all pictures of a source and their captions, from headers and text only.

    source  FOLDER, with all below it: NAME.jpg (or .jpeg .png .webp .bmp .gif .tif) beside NAME.txt (a caption per line),
            NAME.caption (one) or NAME.json; or metadata.jsonl / metadata.csv with file_name and text, which come first
            data/*.tar, data/{000..031}.tar: uncompressed tar files of the same; a folder that holds only such will do, too
            pipe:COMMAND: COMMAND's output is such a tar file; kept in index_folder.  Braces as above
            FILE.parquet (needs pyarrow), hub:NAME[:SPLIT] (needs datasets): rewritten once into index_folder
            scenes[:captioned|uncaptioned|all][:N][:SEED]: N (24000) emoji scenes.  ./scenes is a folder of that name
    min_side           px: pictures with a shorter side are left out
    captions_required  leave out pictures without a caption; False: they get the caption ""
    index_folder       where indexes and copies of remote shards go (default: an index stands beside its shard)
    filters            min_KEY, max_KEY: bounds, included, on numbers in .json or metadata, such as max_punsafe=0.99. A picture
                       without such a number, or with null, stays unless require_keys.
    Raises ValueError, in one line, for a source that cannot be read, and if no picture is left: what was found instead.
    """
    text, folder = str(source), Path(index_folder) if index_folder else None
    limits, found, known, skipped = _limits(filters), Counter(), set(), []
    if text.split(":")[0] == "scenes":
        if limits:
            raise ValueError(f"{text} has no keys to filter by: leave {', '.join(filters)} away")
        return SceneDataset(text)

    def kept() -> Iterator[dict]:                # a million samples pass through here one at a time
        for sample in samples_of(text, folder, found):
            known.update(sample.get("numbers", ()))
            problem = sample["problem"] or _problem(sample, min_side, captions_required, limits, require_keys)
            if problem:
                skipped.append((sample["name"], problem))
            else:
                yield sample

    pictures = ImageDataset(text, kept(), skipped, folder / "keys.txt" if folder else None)
    if not len(pictures):
        files = ", ".join(f"{count} {suffix or 'without suffix'}"
                          for suffix, count in found.most_common(8)) or "no file"
        raise ValueError(f"{text}: no picture to train on. Looked for {' '.join(SUFFIXES)}"
                         + " with a caption in NAME.txt, "
                         "NAME.caption, NAME.json or metadata.jsonl/.csv" * captions_required
                         + f"; found {files}; {_listed(skipped)}")
    if unknown := sorted(limits.keys() - known):           # a slip of the pen would otherwise let everything through
        raise ValueError(f"{text}: no picture has a number {unknown[0]!r} to filter by, found: {', '.join(sorted(known)) or 'none'}")
    return pictures


def read_filters(texts: list[str]) -> dict[str, float]:
    """["min_aesthetic=5", ...], as --filter has them -> {"min_aesthetic": 5.0, ...}.  Raises ValueError."""
    try:
        return {name: float(value) for name, _, value in (text.partition("=") for text in texts)}
    except ValueError:
        raise ValueError(f"--filter {' '.join(texts)}: expected something like min_aesthetic=5") from None


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a text file that are not empty.  Raises ValueError if there are none."""
    prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompts: expected one per line")
    return prompts


def _limits(filters: dict) -> dict[str, tuple[float, float]]:
    """{"max_punsafe": 0.9} -> {"punsafe": (-inf, 0.9)}"""
    limits = {}
    for name, bound in filters.items():
        side, _, key = name.partition("_")
        if side not in ("min", "max") or not key:
            raise ValueError(f"unknown option {name!r}: expected a filter min_KEY or max_KEY, such as max_pwatermark=0.5")
        low, high = limits.get(key, (-math.inf, math.inf))
        limits[key] = (float(bound), high) if side == "min" else (low, float(bound))
    return limits


def _problem(sample: dict, min_side: int, captions_required: bool, limits: dict, require_keys: bool) -> str | None:
    """Why a sample is left out, or None."""
    height, width = sample["size"]
    if min(height, width) < min_side:
        return f"{width} x {height} px, fewer than {min_side}"
    if captions_required and not sample["captions"]:
        return "no caption"
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


# ----- pictures --------------------------------------------------------------------------------------

class ImageDataset:
    """Pictures and captions by number, 0 to N - 1, always in the same order.

    sizes (N,2) int32: height and width as shown, after EXIF orientation.  skipped: name and reason of what was left out.
    """
    def __init__(self, source: str, samples: Iterable[dict], skipped: list[tuple[str, str]], key_file: Path
                 | None = None):
        self.source, self.skipped = source, skipped
        # All texts in one piece of memory, not a million objects: to look at a Python object is to write its reference
        # count, so every worker process would sooner or later hold a copy of them all.
        records, ends, sizes = bytearray(), array("q", [0]), array("i")
        for sample in samples:
            records += json.dumps([sample["name"], sample["place"], sample["captions"]]).encode()
            ends.append(len(records))
            sizes.extend(sample["size"])
        self._records, self._ends = bytes(records), np.array(ends)
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)                  # (N, 2)
        self._key_file, self._keys = key_file, None

    def __len__(self) -> int:
        return len(self.sizes)

    def _record(self, i: int) -> tuple[str, Place, list[str]]:
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return json.loads(self._records[self._ends[i]:self._ends[i + 1]])

    def name(self, i: int) -> str:
        return self._record(i)[0]

    def captions(self, i: int) -> list[str]:
        """At least one; [""] for a picture without."""
        return self._record(i)[2] or [""]

    def key(self, i: int) -> str:
        """sha256 of the picture's bytes, in hex.  With an index_folder, files that stay as they are are read for it only once."""
        file, offset, length = self._record(i)[1]
        stat = os.stat(file)         # as make does: same name, size and time of change, same content
        version = f"{os.path.abspath(file)} {offset} {length} {stat.st_size} {stat.st_mtime_ns}"
        known_as = hashlib.sha256(version.encode()).hexdigest()[:24]
        if self._keys is None:
            lines = self._key_file.read_text().split("\n") if self._key_file and self._key_file.exists() else []
            self._keys = dict(line.split() for line in lines if re.fullmatch("[0-9a-f]{24} [0-9a-f]{64}", line))
        if known_as not in self._keys:
            self._keys[known_as] = hashlib.sha256(content_of((file, offset, length))).hexdigest()
            if self._key_file:       # one short write at the end of the file: lines of several processes do not mix
                self._key_file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._key_file, "ab", buffering=0) as out:
                    out.write(f"{known_as} {self._keys[known_as]}\n".encode())
        return self._keys[known_as]

    def read(self, i: int) -> np.ndarray:
        """(H,W,3) uint8, RGB: upright, and over white where it is transparent.  Raises BrokenImage."""
        name, place, _ = self._record(i)
        try:
            return _decode(content_of(place))
        except Exception as error:               # each of Pillow's decoders raises its own kinds for a damaged file
            raise BrokenImage(f"{name} cannot be read: {reason(error)}") from error

    def read_or_next(self, i: int, allowed: np.ndarray) -> tuple[np.ndarray, int]:
        """read(i) and i; if that file is broken, the same of the next one among `allowed`, ascending, round from the end.

        Which one it is depends on the files alone, so all runs agree. The broken one is remembered in `skipped`: of this
        process, so whoever reads in worker processes should look for j != i. Raises BrokenImage if none can be read.
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
        raise BrokenImage(f"{self.source}: none of {len(allowed)} pictures of this size can be read; {_listed(self.skipped)}")

    def describe(self) -> str:
        """One line: how many, from where, what was left out."""
        return f"{len(self)} pictures in {self.source}" + (f"; {_listed(self.skipped)}" if self.skipped else "")


class SceneDataset(ImageDataset):
    """Emoji scenes in the same dress: drawn when they are asked for."""
    def __init__(self, source: str):
        from training.scenes import CANVAS, EmojiScenes
        _, *words = source.split(":")
        self._objects = words.pop(0) if words and not words[0].isdecimal() else "captioned"
        if len(words) > 2 or not all(word.isdecimal() for word in words) or words[:1] == ["0"]:
            raise ValueError(f"cannot read {source!r}: expected scenes[:captioned|uncaptioned|all][:N][:SEED], "
                             "such as scenes:all:500:1")
        count, self._seed = (int(word) for word in (words + ["24000", "0"][len(words):]))
        self.source, self.skipped, self._scenes = source, [], EmojiScenes(self._objects, seed=self._seed)
        self.sizes = np.full((count, 2), CANVAS, np.int32)

    def _record(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        return f"scene {i}", None, [self._scenes.caption(i)]

    def key(self, i: int) -> str:
        return hashlib.sha256(f"scene {self._seed} {self._objects} {i}".encode()).hexdigest()

    def read(self, i: int) -> np.ndarray:
        return self._scenes.batch(i, 1)[0][0]    # (128, 128, 3)


def _decode(content: bytes) -> np.ndarray:
    """A file's content -> (H,W,3) uint8, the same as images.read_image."""
    with Image.open(io.BytesIO(content)) as image:
        if image.has_transparency_data or image.mode.startswith("I") or image.mode == "F":
            return (read_image(image) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        # without the way through floats: half the time
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


# ----- shapes ----------------------------------------------------------------------------------------

def bucket_sizes(resolution: int, step: int = 128, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of the shapes that pictures are cut to: multiples of `step` px, each of about resolution^2 px.

    128 px, as 0.75 x 128 = 96 = 3 x 32: 3 positions of the semantic latent, none of them cut. The longer side is at most
    max_ratio times the shorter. Shapes whose area is off by more than a quarter are left out, so that a batch of each
    takes about the same memory; up to 256 px only the square remains.  Raises ValueError unless step divides resolution.
    """
    n = resolution // step                       # from here on in units of step
    if n < 1 or resolution % step:
        raise ValueError(f"a resolution of {resolution} px: expected a multiple of {step}, such as {max(1, n) * step}")
    shapes = {(n, n)}
    for a in range(1, n * n + 1):
        b = min(range(1, n * n + 1), key=lambda b: abs(a * b - n * n))
        if max(a, b) <= max_ratio * min(a, b) and 0.8 <= a * b / n ** 2 <= 1.25:
            shapes |= {(a, b), (b, a)}
    return sorted((a * step, b * step) for a, b in shapes)


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """sizes (N,2) of pictures -> (N,) which bucket is nearest in shape.

    By the logarithm of height / width: what is cut off is a share, and 1:2 is as far from 1:1 as 2:1 is. By the ratio
    itself, 0.5 and 2, flat pictures would be pushed towards the square.
    """
    shapes, targets = (np.log(np.asarray(x, float)) @ [1, -1] for x in (sizes, buckets))    # (N,), (M,)
    return np.abs(shapes[:, None] - targets).argmin(axis=1)                                 # (N,)


def fit(image: np.ndarray, size: tuple[int, int], crop: str = "center", flip: bool = False,
        rng: np.random.Generator | None = None) -> np.ndarray:
    """image (H,W,3) uint8 -> (h,w,3) uint8: the largest piece of that shape, resized, and mirrored if flip is true.

    crop  "center", or "random": anywhere along the side that is too long, drawn from rng
    flip  mirror or not; a coin, if there is one, is the caller's, who may have to remember how it fell
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
    # Whole pixels, so that a picture of the right scale is cut and not resampled.
    top, left = (int(share * (int(spare) + 1)) for share, spare in zip(where, (height - box_height, width - box_width)))
    # Pillow's bicubic widens its kernel when it shrinks a picture: no pixel is passed over, in any version of any
    # library.
    # Sharper than bilinear, without most of the ringing of Lanczos.
    result = Image.fromarray(image).resize((w, h), Image.BICUBIC, box=(left, top, left + box_width, top + box_height))
    return np.ascontiguousarray(np.asarray(result)[:, ::-1] if flip else np.asarray(result))


# ----- order -----------------------------------------------------------------------------------------

def sample_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Chance for one sample and one purpose ("crop", "caption", "noise", ...), a function of these three alone.

    position: the sample's place in the stream of BatchSampler. It differs from visit to visit, and between all samples of a step,
    so two GPUs never draw the same noise. Whoever draws more for one purpose changes nothing for the others.
    """
    return np.random.Generator(np.random.PCG64([seed, position, zlib.crc32(purpose.encode())]))


class BatchSampler:
    """Which samples make up which optimizer step, for ever, as a function of (buckets, batch, seed).

    Epoch after epoch, each in an order of its own, the samples form one stream of positions 0, 1, 2, ... Each goes to the
    queue of its bucket; a queue that holds `batch` samples, all of one size, is the next step. What is left in the queues
    at the end of an epoch stays there, so nothing is dropped, however rare its shape. The batch is that of the whole
    step: how many GPUs and micro-steps share it makes no difference, see `split`.

    buckets (N,) integers, one per picture; with one bucket, steps are consecutive pieces of the stream.
    """
    def __init__(self, buckets: np.ndarray, batch: int, seed: int):
        buckets = np.asarray(buckets)
        if buckets.ndim != 1 or not len(buckets) or batch < 1:
            raise ValueError(f"got buckets of shape {buckets.shape} and a batch of {batch}: expected (N,), one per picture, "
                             "and at least 1")
        self.batch, self.seed, self._n = batch, seed, len(buckets)
        self._buckets, codes, self._counts = np.unique(buckets, return_inverse=True, return_counts=True)
        # (N,) sorted five times faster as small integers
        self._codes = codes.astype(np.min_scalar_type(len(self._buckets)))
        self._starts = np.cumsum(self._counts) - self._counts
        self._epochs = {}                        # the last few, see _epoch

    def epoch_of(self, position: int) -> int:
        return position // self._n

    def steps(self, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """step(start), step(start + 1), ... without end."""
        return map(self.step, itertools.count(start))

    def step(self, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        """-> positions (batch,) in the stream, ascending; indices (batch,) of the pictures; the bucket they share.

        For any k at once, no step before it is gone through: every epoch holds the same number of each bucket, count, so
        count * e of them have come before epoch e, and that makes count * e // batch steps.
        """
        # The last epoch that begins with at most k steps done. The queues hold back less than a step per bucket.
        latest = (k + len(self._buckets) + 1) * self.batch // self._n + 2
        epoch = bisect.bisect_right(range(latest), k, key=self._steps_before) - 1
        _, _, step_buckets, step_numbers = self._epoch(epoch)
        i = k - self._steps_before(epoch)
        code, number = step_buckets[i], step_numbers[i]
        count, start = self._counts[code], self._starts[code]
        # (batch,) the bucket's samples, counted from the beginning
        members = number * self.batch + np.arange(self.batch)
        epochs = members // count                                # (batch,) more than one where something was left over
        positions, indices = np.empty_like(members), np.empty_like(members)
        for e in range(epochs[0], epochs[-1] + 1):
            order, by_bucket, _, _ = self._epoch(e)
            inside = by_bucket[start + members[epochs == e] - e * count]
            positions[epochs == e], indices[epochs == e] = e * self._n + inside, order[inside]
        return positions, indices, int(self._buckets[code])

    def _steps_before(self, epoch: int) -> int:
        return int((epoch * self._counts // self.batch).sum())

    def _epoch(self, e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """-> order (N,), the pictures of epoch e; by_bucket (N,), places in it, one bucket after the other; and of the steps
        that are completed in it, in order, bucket and number (counted per bucket, from the beginning)."""
        if e not in self._epochs:
            while len(self._epochs) > 3:         # a million samples take 0.3 s to lay out, and 16 MB
                del self._epochs[next(iter(self._epochs))]
            # Raw bits, sorted: numpy promises never to change those, as it may permutation().
            order = np.argsort(sample_rng(self.seed, e, "epoch").bit_generator.random_raw(self._n), kind="stable")
            by_bucket = np.argsort(self._codes[order], kind="stable")
            # A bucket's step n ends with its sample (n + 1) * batch - 1, counted from the beginning.
            numbers = [np.arange(e * count // self.batch, (e + 1) * count // self.batch) for count in self._counts]
            ends = [by_bucket[start + (n + 1) * self.batch - 1 - e * count]
                    for n, start, count in zip(numbers, self._starts, self._counts)]
            codes = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
            by_end = np.argsort(np.concatenate(ends))
            self._epochs[e] = order, by_bucket, codes[by_end], np.concatenate(numbers)[by_end]
        return self._epochs[e]


def split(positions: np.ndarray, micro: int, rank: int, world: int, micro_batch: int) -> slice:
    """The part of a step's samples that one GPU computes in micro-step `micro`: positions[split(...)], (micro_batch,).

    All parts together are the step, each once.  Raises ValueError if they cannot be of the same size.
    """
    parts, rest = divmod(len(positions), micro_batch * world)
    if rest or not parts:
        raise ValueError(f"a step of {len(positions)} samples cannot be shared by {world} GPUs in micro-steps of {micro_batch}: "
                         f"expected a multiple of {micro_batch * world}")
    if not (0 <= micro < parts and 0 <= rank < world):
        raise ValueError(f"micro-step {micro} of {parts}, rank {rank} of {world}: expected to count from 0")
    start = (micro * world + rank) * micro_batch
    return slice(start, start + micro_batch)


def _stack(items: list[dict]) -> dict:
    """Outside batches(), as processes that are not forked must find it by its name."""
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: values if isinstance(values[0], str) else torch.stack([torch.as_tensor(value) for value in values])
            for name, values in columns.items()}


def _outlive_signals(worker: int) -> None:
    """A scheduler and Ctrl-C signal all processes of a run; a reader that died of it would take down the step that is to be saved.
    A second SIGTERM ends it, which is how torch gets rid of those that are stuck."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def batches(samples: torch.utils.data.Dataset, plan: BatchSampler, processes, args, start: int = 0) -> Iterator[dict]:
    """This process's micro-batches, args.grad_accum for each step of `plan` from `start` on, for ever.

    samples    item (position, index, bucket) -> a dict, a function of these three and the seed alone
    processes  its rank, world and device; see training.py
    args       batch (samples of a micro-batch), grad_accum, workers (processes that read)
    -> dicts of the same names: strings as a list, all else stacked to a tensor.
    """
    class Order:
        """For each micro-batch, which samples. The same for any number of processes, but for who computes which."""
        def __iter__(self):
            for positions, indices, bucket in plan.steps(start):
                for micro in range(args.grad_accum):
                    part = split(positions, micro, processes.rank, processes.world, args.batch)
                    yield [(int(p), int(i), bucket) for p, i in zip(positions[part], indices[part])]

    return iter(torch.utils.data.DataLoader(samples, batch_sampler=Order(), collate_fn=_stack, num_workers=args.workers,
                                            pin_memory=processes.device.type == "cuda", persistent_workers=False,
                                            worker_init_fn=_outlive_signals))


# ----- what need be computed only once --------------------------------------------------------------

def latent_key(pictures: ImageDataset, index: int, size: tuple[int, int], flip: bool) -> str:
    """What a latent was computed from, for a Cache."""
    return f"{pictures.key(index)} {size[0]}x{size[1]}{' flipped' * flip}"


def fill_cache(pictures: ImageDataset, sizes: Callable[[int], list[tuple[int, int]]], flips: bool, caches: dict,
               encoders: dict, texts, processes) -> dict[int, int]:
    """The latents of all pictures and the embeddings of all captions into their caches, each process its share.

    sizes     of picture i, (height, width), centered crops; flips: mirrored, too
    caches    name -> Cache;  encoders: the same name -> function of pixels (1,h,w,3) uint8 to a latent (1,C,h',w')
    texts     a CachedTexts, or None
    -> for each picture that cannot be read, the next one of its bucket (pictures.bucket), to be used in its place.
    Raises ValueError if there is none.
    """
    keys = {latent_key(pictures, i, size, flip): (i, size, flip) for i in range(len(pictures)) for size in sizes(i)
            for flip in (False, True)[:1 + flips]}
    missing = list(dict.fromkeys(key for cache in caches.values()
                                 for key in cache.missing([*keys])))[processes.rank::processes.world]
    processes.wait()                                                     # all have looked before the first is written
    for key in tqdm(missing, desc="caching latents", unit="picture", disable=processes.rank > 0 or not missing):
        i, size, flip = keys[key]
        with contextlib.suppress(BrokenImage):
            pixels = torch.from_numpy(np.array(fit(pictures.read(i), size, "center", flip)))[None]       # (1, h, w, 3)
            for name, cache in caches.items():
                cache.put(key, encoders[name](pixels)[0].cpu().numpy())
    if texts is not None:
        captions = sorted({""} | {caption for i in range(len(pictures)) for caption in pictures.captions(i)})
        for caption in tqdm(captions[processes.rank::processes.world], desc="caching captions",
                            disable=processes.rank > 0):
            texts.one(caption)
    processes.wait()
    broken = {keys[key][0] for cache in caches.values() for key in cache.missing([*keys])}
    if broken and processes.rank == 0:
        print(f"{len(broken)} pictures cannot be read: {', '.join(pictures.name(i) for i in sorted(broken)[:5])}",
              file=sys.stderr)
    replaced = {}
    for i in broken:
        others = [int(j) for j in np.flatnonzero(pictures.bucket == pictures.bucket[i]) if int(j) not in broken]
        if not others:
            raise ValueError(f"no picture like {pictures.name(i)} can be read: nothing can take its place")
        replaced[i] = next((j for j in others if j > i), others[0])
    return replaced
