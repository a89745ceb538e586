"""The order of training as a function of the seed: which samples make up which step, and each sample's random numbers.

  buckets (N,) -BatchSampler-> step k: positions (batch,), indices (batch,), bucket -split-> the samples of one GPU
  (seed, position, purpose) -sample_rng-> the random numbers of one sample, for its crop, caption, noise, ...
  batches: reads the samples of a dataset in this order, in worker processes -> an endless stream of micro-batches

Position is a sample's number in the stream of all epochs; index is its image's number in the dataset.
Note: with given buckets and batch, step k depends only on (seed, k). A sample's random numbers depend only on (seed,
position, purpose). So a resumed run reads no images of earlier steps, and two GPUs together see the step of one GPU.
For datasets of LARGE images or more, the order of an epoch is computed once per machine and stored in a file, which all
processes of the machine memory-map.
Needs: torch, numpy, loading/.
"""
import atexit
import bisect
import contextlib
import hashlib
import io
import itertools
import mmap
import os
import signal
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from loading.errors import UserError
from loading.files import lock, write_atomically

LARGE = 2 ** 20      # with this many images or more, the order is stored in files; also the default size of pieces()


def pieces(n: int, size: int | None = None) -> Iterator[slice]:
    """Yields slices of at most `size` (default: LARGE) that cover 0 to n - 1, so that temporary arrays stay small."""
    size = size or LARGE
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def sample_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Returns the random generator of one sample for one purpose ("crop", "caption", "noise", ...).

    position: the sample's number in the stream of BatchSampler. It differs between epochs and between the samples of a
    step, so two GPUs never draw the same noise. Drawing more for one purpose changes nothing for the others.
    """
    return np.random.Generator(np.random.PCG64([seed, position, zlib.crc32(purpose.encode())]))


class BatchSampler:
    """Determines the samples of each optimizer step, in an endless sequence, as a function of (buckets, batch, seed).

    The samples of all epochs, each epoch in its own order, form one stream of positions 0, 1, ... Each sample goes to
    the queue of its bucket. A queue with `batch` samples, all of one size, is the next step. Samples left in the queues
    at the end of an epoch stay there, so nothing is dropped, however rare its shape. batch: samples of the whole step,
    whatever the number of GPUs and micro-steps that share the step, see `split`.

    buckets (N,): an integer for each image; if all are the same, steps are consecutive slices of the stream.
    folder: for files with the order of large datasets, shared by all processes; None: the order is kept in memory.
    """
    def __init__(self, buckets: np.ndarray, batch: int, seed: int, folder: Path | None = None):
        buckets = np.asarray(buckets)
        if buckets.ndim != 1 or not len(buckets) or batch < 1:
            raise ValueError(f"got buckets of shape {buckets.shape} and a batch of {batch}: "
                             "expected (N,), one per image, and at least 1")
        self.batch, self.seed, self._n, self._of_image = batch, seed, len(buckets), buckets
        # self.counts: {bucket: number of images in it}
        self.counts, digest = {}, hashlib.sha256(f"{seed} {batch} {buckets.dtype}".encode())
        for piece in pieces(self._n):
            digest.update(np.ascontiguousarray(buckets[piece]))
            for bucket, count in zip(*(found.tolist() for found in np.unique(buckets[piece], return_counts=True))):
                self.counts[bucket] = self.counts.get(bucket, 0) + count
        self._buckets, self._counts = np.array(sorted(self.counts.items())).T.copy()
        self._starts = np.cumsum(self._counts) - self._counts
        self._files = folder and self._n >= LARGE and Path(folder) / f"order-{digest.hexdigest()[:16]}"
        self._epochs = {}                        # {epoch: arrays that _epoch returns}, for the last few epochs

    def epoch_of(self, position: int) -> int:
        return position // self._n

    def steps(self, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yields step(start), step(start + 1), ... without end."""
        return map(self.step, itertools.count(start))

    def step(self, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns the samples' positions (batch,) in the stream, ascending; their image indices (batch,); their bucket.

        Step k is found directly, without computing the steps before it. Every epoch contains the same number of samples
        of each bucket, `count`. So before epoch e, a bucket has count * e samples and count * e // batch steps.
        """
        # Finds the last epoch that begins after at most k steps. `latest` is an upper bound for its number.
        latest = (k + len(self._buckets) + 1) * self.batch // self._n + 2
        epoch = bisect.bisect_right(range(latest), k, key=self._steps_before) - 1
        _, _, step_buckets, step_numbers = self._epoch(epoch)
        i = k - self._steps_before(epoch)
        code, number = step_buckets[i], step_numbers[i]
        count, start = self._counts[code], self._starts[code]
        # (batch,) numbers of the step's samples, counted within their bucket from the beginning of training
        members = number * self.batch + np.arange(self.batch)
        epochs = members // count                # (batch,) each sample's epoch: queues may hold earlier epochs' samples
        positions, indices = np.empty_like(members), np.empty_like(members)
        for e in range(epochs[0], epochs[-1] + 1):
            order, by_bucket, _, _ = self._epoch(e)
            inside = by_bucket[start + members[epochs == e] - e * count].astype(np.int64)
            positions[epochs == e], indices[epochs == e] = e * self._n + inside, order[inside]
        return positions, indices, int(self._buckets[code])

    def _steps_before(self, epoch: int) -> int:
        return int((epoch * self._counts // self.batch).sum())

    def _epoch(self, e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns four arrays for epoch e: order (N,), its images; by_bucket (N,), positions in `order`, sorted by
        bucket; and for each step that it completes, (steps,), the bucket's index and the number among its steps."""
        if e not in self._epochs:
            while len(self._epochs) > 3:         # keep 4 epochs: each takes 0.3 s and 8 MB per million samples
                del self._epochs[next(iter(self._epochs))]
            if self._files:
                with open(self._in_file(e), "rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                self._lay_out(e, content := io.BytesIO())
                content = content.getvalue()
            self._epochs[e] = tuple(np.frombuffer(content, dtype, size, offset)
                                    for offset, size, dtype in self._parts(e))
        return self._epochs[e]

    def _parts(self, e: int) -> list[tuple[int, int, np.dtype]]:
        """Returns (offset, length, dtype) of _epoch's arrays in the file of epoch e. int64 is first, for alignment."""
        steps, index = self._steps_before(e + 1) - self._steps_before(e), np.min_scalar_type(self._n)
        code, end = np.min_scalar_type(len(self._buckets)), 8 * steps + 2 * self._n * index.itemsize
        return [(8 * steps, self._n, index), (8 * steps + self._n * index.itemsize, self._n, index),
                (end, steps, code), (0, steps, np.dtype(np.int64))]

    def _in_file(self, e: int) -> Path:
        """Returns the file of epoch e. The first process that needs the file writes it, while the others wait."""
        path = self._files.with_name(f"{self._files.name}-{e}")
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = lock(path.parent, wait=True)
        try:
            with contextlib.suppress(FileExistsError):     # another machine has just written the file
                if not path.exists():
                    def write(temporary: Path) -> None:
                        with open(temporary, "wb") as out:
                            self._lay_out(e, out)
                    write_atomically(path, write, overwrite=False)
                    path.with_name(f"{self._files.name}-{e - 4}").unlink(missing_ok=True)
        finally:
            if opened is not None:
                os.close(opened)
        return path

    def _lay_out(self, e: int, out) -> None:
        """Writes the arrays of epoch e to the file `out`, in parts to save memory. A part has the images whose random
        bits, see _order, are in one range."""
        done, written, filled = 0, 0, np.zeros_like(self._counts)
        (at_order, _, index), (at_bucket, _, _), (at_code, _, code), (at_number, _, _) = self._parts(e)

        def write(offset: int, array: np.ndarray, dtype) -> None:
            out.seek(offset)
            out.write(array.astype(dtype).tobytes())
        parts = min(-(-self._n // LARGE), 64)
        for part in range(parts):
            order = self._order(e, 2 ** 64 * part // parts, 2 ** 64 * (part + 1) // parts - 1)               # (P,)
            codes = np.searchsorted(self._buckets, self._of_image[order]).astype(code)
            by_bucket = np.argsort(codes, kind="stable")                                                     # (P,)
            counts = np.bincount(codes, minlength=len(self._counts))
            ends = np.cumsum(counts)
            write(at_order + done * index.itemsize, order, index)
            number = np.empty_like(by_bucket)    # (P,) each sample's number in its bucket, counted over all epochs
            for bucket in range(len(counts)):
                members, before = by_bucket[ends[bucket] - counts[bucket]:ends[bucket]], filled[bucket]
                write(at_bucket + (self._starts[bucket] + before) * index.itemsize, done + members, index)
                number[members] = np.arange(before, before + len(members)) + e * self._counts[bucket]
            # In each bucket, the sample with the number (n + 1) * batch - 1 completes this bucket's step n.
            full = np.flatnonzero((number + 1) % self.batch == 0)
            write(at_code + written * code.itemsize, codes[full], code)
            write(at_number + written * 8, number[full] // self.batch, np.int64)
            done, written, filled = done + len(order), written + len(full), filled + counts

    def _order(self, e: int, low: int, high: int) -> np.ndarray:
        """Returns the images of epoch e whose 64 random bits are a number from low to high, sorted by these numbers."""
        # Images are sorted by raw bits, which are the same in every version of numpy. permutation() may change.
        bits, values, indices = sample_rng(self.seed, e, "epoch").bit_generator, [], []
        for piece in pieces(self._n):
            raw = bits.random_raw(piece.stop - piece.start)
            inside = np.flatnonzero((raw >= np.uint64(low)) & (raw <= np.uint64(high)))
            values.append(raw[inside])
            indices.append(inside + piece.start)
        return np.concatenate(indices)[np.argsort(np.concatenate(values), kind="stable")]


def split(positions: np.ndarray, micro: int, rank: int, world: int, micro_batch: int) -> slice:
    """Returns the slice of `positions`, a step's samples, that process `rank` of `world` takes in micro-step `micro`.
    All slices together contain each sample once. Raises ValueError if they cannot all have micro_batch samples."""
    parts, rest = divmod(len(positions), micro_batch * world)
    if rest or not parts:
        raise ValueError(f"a step of {len(positions)} samples cannot be shared by {world} GPUs in micro-steps of "
                         f"{micro_batch}: expected a multiple of {micro_batch * world}")
    if not (0 <= micro < parts and 0 <= rank < world):
        raise ValueError(f"micro-step {micro} of {parts}, rank {rank} of {world}: expected numbers counted from 0")
    start = (micro * world + rank) * micro_batch
    return slice(start, start + micro_batch)


def batches(samples: torch.utils.data.Dataset, sampler: BatchSampler, processes, args, start: int = 0
            ) -> Iterator[dict]:
    """Yields this process's micro-batches, args.grad_accum for each step of `sampler` from `start` on, without end.

    samples    a dataset: samples[position, index, bucket] -> a dict that depends only on these three and the seed
    processes  an object with rank, world and device, see processes.py
    args       batch (samples of a micro-batch), grad_accum, workers (processes that read; None: default_workers)
    A micro-batch is a dict with the keys of a sample: strings are in a list, other values are stacked to a tensor.
    """
    class MicroBatches:
        """A batch sampler for DataLoader: yields the list of keys in `samples` for each micro-batch of this process."""
        def __iter__(self):
            for positions, indices, bucket in sampler.steps(start):
                for micro in range(args.grad_accum):
                    part = split(positions, micro, processes.rank, processes.world, args.batch)
                    yield [(int(p), int(i), bucket) for p, i in zip(positions[part], indices[part])]

    workers = default_workers(processes.device) if args.workers is None else args.workers
    found = _checked(iter(torch.utils.data.DataLoader(
        ErrorsAsItems(samples), batch_sampler=MicroBatches(), collate_fn=_stack, num_workers=workers,
        pin_memory=processes.device.type == "cuda", worker_init_fn=_outlive_signals)))
    # An error that ends the script keeps stack frames alive, which keep the workers alive. At exit, Python would send
    # each worker a SIGTERM, which workers ignore once, and wait for them forever. So atexit closes the iterator first.
    weak = weakref.ref(found)
    atexit.register(lambda: weak() and weak().close())
    return found


def default_workers(device: torch.device) -> int:
    """Returns the number of worker processes that read images for a training process: on a CPU 2, as training needs the
    cores; on a GPU 2 to 8, cores per GPU - 1. (A worker reads 65 images of 1024 px per second; an H200 needs 350.)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    return 2 if device.type == "cpu" else min(max(cores // on_this_machine - 1, 2), 8)


def micro_batches(samples: Iterator[dict], args, processes, save: Callable, step: int) -> list[dict]:
    """Returns the micro-batches of a step. samples: the result of `batches`. If a process cannot read its samples, all
    processes save the state before this step, by save(step), and end."""
    failure = None
    try:
        found = [next(samples) for _ in range(args.grad_accum)]
    except Exception as error:
        failure = error
    if processes.any(failure is not None):
        if step:
            save(step)
        raise failure or SystemExit(2)           # exit status 2: another process failed and reports why
    return [processes.to_device(batch) for batch in found]


class ErrorsAsItems(torch.utils.data.Dataset):
    """A dataset that returns UserErrors as items, because torch adds a traceback to an error raised in a worker."""
    def __init__(self, samples: torch.utils.data.Dataset):
        self.samples = samples

    def __getitem__(self, where: tuple) -> dict | UserError:
        try:
            return self.samples[where]
        except UserError as error:
            return error


def _checked(loader: Iterator) -> Iterator[dict]:
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del loader                               # deleting the DataLoader's iterator ends its workers


def _stack(items: list[dict | UserError]) -> dict | UserError:
    """Collates samples to a batch or, if one of them is a UserError, returns the error."""
    for item in items:
        if isinstance(item, UserError):
            return item
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: values if isinstance(values[0], str) else torch.stack([torch.as_tensor(value) for value in values])
            for name, values in columns.items()}


def _outlive_signals(worker: int) -> None:
    """Makes a worker ignore Ctrl-C and the first SIGTERM: both are sent to all processes of a run, and without workers
    the last step before saving would fail. The second SIGTERM ends the worker: torch stops stuck workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
