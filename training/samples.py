"""Makes training samples from images: opens datasets, reads pixels or cached latents, draws captions and resolutions.

The scripts add the rest of a sample (noise, noise level). `rng` is a function that returns the random generator for one
purpose, such as rng("crop"), seeded with (seed, position in the stream of samples, purpose), see order.sample_rng.
Needs: torch, numpy; data.py, order.py, cache.py.
"""
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loading.errors import UserError, as_user_error
from loading.files import write_atomically
from loading.weights import load_text_encoder
from stage_b import preprocess
from training.cache import Cache, hash_of, latent_key
from training.data import bucket_sizes, candidates, fit, nearest_bucket, open_dataset, read_filters
from training.order import BatchSampler, sample_rng
from wuerstchen import scale_semantic


def to_tensor(pixels, device="cpu") -> Tensor:
    """Converts pixels (B,H,W,3) uint8, an array or tensor, to channels-last images (B,3,H,W) float32 in [0, 1]."""
    return torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float() / 255


def encoder_input(images: Tensor) -> Tensor:
    """Resizes images (B,3,H,W) in [0, 1] to (B,3,3H/4,3W/4) and normalizes them with `preprocess`, for the encoder."""
    return preprocess(images, tuple(side * 3 // 4 for side in images.shape[2:]))


@torch.no_grad()
def semantic_latents(encoder: torch.nn.Module, pixels: Tensor, device) -> Tensor:
    """Encodes pixels (B,H,W,3) uint8 as semantic latents (B,16,h,w) float32, scaled to about unit variance."""
    return scale_semantic(encoder(encoder_input(to_tensor(pixels, device))))


def no_text(config: dict, device: torch.device, captions: list[str]) -> Tensor:
    """Returns embeddings (B,1,c_text) for a Stage B without text: a zero token per caption. config: Stage B's."""
    return torch.zeros(len(captions), 1, config["c_text"], device=device)


def open_data(args, processes, captions_required: bool = True, unseen: str | None = None) -> tuple:
    """Returns the datasets for training (--data) and validation (--val-data).

    Without --val-data, the validation uses --data or, if --data is emoji scenes, `unseen`, the name of other scenes.
    captions_required: whether images without a caption are skipped. One process of each machine opens the files. With
    --dry-run, writes skipped.tsv, a list of all skipped files with reasons.
    """
    index, val_data = Path(getattr(args, "cache", None) or args.out) / "index", args.val_data
    if args.data.split(":")[0] == "scenes":
        val_data = val_data or unseen
    options = dict(captions_required=captions_required, index_folder=index, image_column=args.image_column,
                   caption_column=getattr(args, "caption_column", None))
    skipped, of_validation = ([], []) if args.dry_run else (None, None)

    def opened() -> tuple:
        dataset = open_dataset(args.data, dataset_config=args.dataset_config, skipped=skipped, **options,
                               **read_filters(args.filter))
        config = args.dataset_config if str(val_data).startswith("hub:") else None
        validation = (open_dataset(val_data, dataset_config=config, skipped=of_validation, **options)
                      if val_data else dataset)
        if args.max_samples and args.max_samples < len(dataset):
            numbers = np.random.Generator(np.random.PCG64(args.seed)).random(len(dataset)).argsort()[:args.max_samples]
            dataset.select(np.sort(numbers))
        return dataset, validation
    try:
        with as_user_error():
            dataset, validation = processes.once_per_node(opened)
    finally:
        if args.dry_run and processes.is_main and (skipped := skipped + of_validation):
            lines = "".join(f"{name}\t{why}\n" for name, why in skipped)
            write_atomically(Path(args.out, "skipped.tsv"), lambda path: path.write_text(lines, encoding="utf-8"))
            processes.print(f"{args.out}/skipped.tsv names all {len(skipped)} that were skipped, with the reasons")
    processes.print(dataset.describe())
    if validation is not dataset:
        processes.print(f"validation: {validation.describe()}")
    return dataset, validation


def steps_of(args, dataset, processes) -> int:
    """Returns the number of training steps: --steps or, if --epochs is given, as many as these epochs need."""
    if not args.epochs:
        return args.steps
    batch = args.batch * args.grad_accum * processes.world
    steps = math.ceil(args.epochs * len(dataset) / batch)
    processes.print(f"--epochs {args.epochs}: {steps} steps of {batch} images")
    return steps


def open_cache(args, encoder: torch.nn.Module, **settings) -> Cache:
    """Returns a Cache in the folder --cache for the outputs of `encoder`. settings: what else they depend on."""
    dtype = dict(fp16="float16", fp32="float32")[args.cache_dtype]
    return Cache(args.cache, hash_of(encoder), dict(dtype=dtype) | settings)


def draw_caption(dataset, index: int, rng: Callable, dropout: float) -> tuple[str, bool]:
    """Returns a random caption of image `index`, and whether to use the empty caption instead. This has probability
    `dropout`, because classifier-free guidance, arXiv:2207.12598, also needs predictions without a caption."""
    captions = dataset.captions(index)
    return captions[rng("caption").integers(len(captions))], bool(rng("caption dropout").random() < dropout)


def embed_once(paths: dict, dtype: torch.dtype, captions: list[str]) -> Tensor:
    """Returns embeddings (B,N,D) of captions without a cache entry. Loads the encoder in each call: calls are rare."""
    files = paths["prior_text_encoder"], paths["prior_tokenizer"]
    return load_text_encoder(*files, dtype)(captions)


class ImageReader:
    """A function (index, number, rng) -> (index, dict) that reads image `index`, cut to sizes[number], or its latents.

    pixels: whether the dict has "pixels" (h,w,3) uint8. caches: {name in the dict: Cache of latents}. replaced: {index
    of an unreadable image: index of another image}, see cache.fill_cache. If an image or its cache entry cannot be
    read, the next image of its bucket is used, and its index returned. The next run computes a lost entry again."""
    def __init__(self, dataset, sizes: list[tuple[int, int]], args, pixels: bool, caches: dict, replaced: dict):
        self.dataset, self.sizes, self.args, self.pixels = dataset, sizes, args, pixels
        self.caches, self.replaced = caches, replaced

    def __call__(self, index: int, number: int, rng: Callable) -> tuple[int, dict[str, Tensor]]:
        size, args = self.sizes[number], self.args
        flip = bool(args.random_flip and rng("flip").random() < 0.5)
        index = self.replaced.get(index, index)
        bucket = self.dataset.bucket

        def others() -> np.ndarray:              # a large array: computed only if an image or a cache entry is broken
            return np.flatnonzero(bucket == bucket[index])
        for index in candidates(index, others):
            if self.pixels:
                pixels, index = self.dataset.read_or_replace(index, others)              # (H, W, 3)
            key = latent_key(self.dataset, index, size, flip)
            item = {name: cache.get(key) for name, cache in self.caches.items()}
            if all(latents is not None for latents in item.values()):
                break
        else:
            raise UserError(f"--cache {args.cache}: the entries of all {len(others())} images of one shape were "
                            f"damaged or removed during the run: start again with --resume auto")
        for name, latents in item.items():
            tokens = latents.dtype.kind == "i"
            item[name] = torch.from_numpy(latents).long() if tokens else torch.from_numpy(latents).float()
        if self.pixels:
            item["pixels"] = torch.from_numpy(np.array(fit(pixels, size, args.crop, flip, rng("crop"))))
        return index, item


class MultiSizeSampler(BatchSampler):
    """A BatchSampler that draws a resolution for each step: instead of a bucket, step() returns an index into `sizes`.

    The resolution of step k depends only on (seed, k). Buckets are the shapes of the largest resolution, which has the
    most shapes. At a smaller resolution, a bucket gets the nearest shape that this resolution has.
    Index into sizes = index of the resolution * len(shapes) + bucket.
    """
    def __init__(self, image_sizes: np.ndarray, resolutions: list[int], max_ratio: float, batch: int, seed: int,
                 folder: Path | None = None):
        self.resolutions = sorted(set(resolutions), reverse=True)
        self.shapes = bucket_sizes(self.resolutions[0], max_ratio=max_ratio)
        self.sizes = [*self.shapes]
        for resolution in self.resolutions[1:]:
            smaller = bucket_sizes(resolution, max_ratio=max_ratio)
            self.sizes += [smaller[i] for i in nearest_bucket(self.shapes, smaller)]
        self.bucket = nearest_bucket(image_sizes, self.shapes)                           # (N,)
        super().__init__(self.bucket, batch, seed, folder)

    def sizes_of(self, index: int) -> list[tuple[int, int]]:
        """Returns all (height, width) to which image `index` may be cut, one per resolution."""
        return self.sizes[self.bucket[index]::len(self.shapes)]

    def step(self, k: int) -> tuple[np.ndarray, np.ndarray, int]:
        positions, indices, bucket = super().step(k)
        drawn = sample_rng(self.seed, k, "resolution").integers(len(self.resolutions))
        return positions, indices, int(drawn) * len(self.shapes) + bucket
