"""Implements modes of sample.py other than prompt to image: input files, previews, latents, grids, interpolations.

  jobs that differ only in prompt and seed, sampling options -make_images-> an image for each job

A job contains all options, the seed and the paths of one image; cli.parse_jobs makes jobs from the command line.
Needs: torch, safetensors; editing.py, images.py, previews.py.
"""
import argparse
import contextlib
import functools
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from extras import editing
from extras.editing import InitImage
from extras.images import cover, enlarge, grid, psnr, read_image, strip
from extras.previews import Previews
from loading.errors import UserError, warn
from loading.files import is_finite, parsed, reading, write_atomically, write_tensors, write_unused
from loading.hub import hashes
from loading.pipeline import FILES
from wuerstchen import Noise, Wuerstchen, latent_sizes, to_pil

# Tensors in a file of --save-latent: semantic latents (1,16,h,w), noise generator's state (1,bytes), image size (2,).
LATENT = ("semantic", "states", "size")
ORIGIN = "wuerstchen"            # key in the metadata of a file of --save-latent: the result of origin_of


def make_images(model, jobs: list[argparse.Namespace], options: dict) -> list:
    """Returns a list with an image for each job: a PIL image or, for a .gif, a list of its frames. The jobs differ only
    in prompt and seed. options: more arguments of editing.generate."""
    job = jobs[0]
    options |= dict(width=job.width, height=job.height)
    for latent in filter(None, (job.from_latent, job.to_latent)):
        check_origin(latent, model, job)
    if job.reconstruct:
        return [reconstruction(model, job, options)]
    if job.grid:
        return [guidance_grid(model, job, options)]
    if job.interpolate_to or job.to_latent:
        return [interpolation(model, job, options)]
    if job.preview_every:
        previews = previews_of(model)
        previews.show = functools.partial(write_previews, jobs)
        options["callback"] = previews
    if not job.save_latent and job.seed is not None:
        return generate(model, jobs, [job.seed for job in jobs], options)
    noise = Noise([job.seed or 0 for job in jobs], model.device)
    if job.seed is None:                         # continue with the noise generator's state after Stage C
        state = read_tensors(job.from_latent, *LATENT)["states"][0]
        for generator in noise.generators:
            generator.set_state(state.clone())
    if not job.save_latent:
        return generate(model, jobs, noise, options)
    semantic = generate(model, jobs, noise, options | dict(output="semantic"))             # (n, 16, h, w)
    states = [generator.get_state() for generator in noise.generators]
    images = generate(model, jobs, noise, options, semantic)
    for job, latent, state, image in zip(jobs, semantic.split(1), states, images):
        job.latent = dict(zip(LATENT, (latent.cpu().clone(), state[None], torch.tensor([image.height, image.width]))))
        job.origin = origin_of(model, job)
    return images


def save_latent(job: argparse.Namespace, path: Path) -> Path:
    """Writes the tensors job.latent to `path`. Returns it. Raises FileExistsError if it exists, unless --overwrite."""
    metadata = {ORIGIN: json.dumps(job.origin)}
    write_tensors(path, job.latent, metadata, job.overwrite)
    return path


def origin_of(model, job: argparse.Namespace) -> dict:
    """Describes the loaded weights. Returns {"weights": name, "kind": "tiny", "v1" or "v2", "hashes": {part: hash}}."""
    raw = model.scale_semantic is not Wuerstchen.scale_semantic
    kind = "tiny" if model.size == 128 else "v1" if raw else "v2"        # weights decode only latents of their own kind
    known = {part: value for part, value in hashes(model.paths).items() if part in ("decoder", "vqgan", "text_encoder")}
    weights = job.weights or ("v2" if any(getattr(job, part) for part in FILES) else "tiny")
    return dict(weights=Path(weights).name, kind=kind, hashes=known)


def check_origin(path: str, model, job: argparse.Namespace) -> None:
    """Warns if the latents in file `path` are from other weights. Raises ValueError if the model cannot decode them."""
    try:
        with reading(path), safe_open(path, "pt") as file:
            then = parsed((file.metadata() or {})[ORIGIN])
            weights, kind, parts = then["weights"], then["kind"], dict(then["hashes"])
    except UserError:
        return                                   # an older file without ORIGIN; read_tensors reports damaged files
    now = origin_of(model, job)
    if kind != now["kind"]:
        raise UserError(f"{path} is a latent of the weights {weights} (kind {kind}), in which {now['weights']} (kind "
                        f"{now['kind']}) would see something else: choose weights or a latent of the other's kind")
    if other := [part for part, value in parts.items() if now["hashes"].get(part, value) != value]:
        warn(f"{path} is a latent of the weights {weights}, from which {now['weights']} differs "
             f"({', '.join(other)}): this is another image")


# ----- files as input ------------------------------------------------------------------------------------------------

def generate(model, jobs: list[argparse.Namespace], seed, options: dict, semantic: Tensor | None = None):
    """Calls editing.generate with the prompts and input files of the jobs. Returns its result. seed: a list of seeds or
    a Noise. options: more arguments. semantic: the output of Stage C if it has run already, else None."""
    inputs, n = read_inputs(jobs[0]), len(jobs)
    given = inputs["given"]
    embeddings = {name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in given.items()
                  if name not in editing.LATENTS}
    prompts = [job.prompt for job in jobs]
    if not jobs[0].prompt and (embeddings or "edit" not in inputs and "semantic" not in given):
        prompts = None                           # generate then uses the embeddings or, without any, raises an error
    if semantic is not None:
        given = {name: tensor for name, tensor in given.items() if name != "latents_c"} | dict(semantic=semantic)
    return editing.generate(model, prompts, [job.negative_prompt for job in jobs], seed=seed,
                            **options | inputs | dict(given=given | embeddings))


def read_inputs(job: argparse.Namespace) -> dict:
    """Reads all input files of a job. Returns arguments of editing.generate. Raises ValueError for unusable files."""
    inputs, given = {}, {}
    if job.init or job.reconstruct:
        image, mask = InitImage(job.init or job.reconstruct, mask=job.mask or None).read() # (3, H, W), (H, W) or None
        if job.outpaint:
            image, mask = enlarge(image, *job.outpaint)
        inputs["edit"] = InitImage(image, 0.0 if job.reconstruct else job.strength, mask)
    if job.from_latent:
        latent = read_tensors(job.from_latent, *LATENT)
        given["semantic"] = latent["semantic"]                                             # (1, 16, h, w)
        height, width = latent["size"].tolist()
        inputs |= dict(height=job.height or height, width=job.width or width)
    if job.tensors:
        tensors = read_tensors(job.tensors)
        if tensors.keys() >= {*LATENT}:
            raise UserError(f"{job.tensors} is a latent of --save-latent, which is not for --tensors: give it to "
                            f"--from-latent")
        if integers := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
            raise UserError(f"{job.tensors}: {integers[0]} has numbers of {tensors[integers[0]].dtype}, expected "
                            f"floating point")
        if any(tensor.shape[:1] != (1,) for tensor in tensors.values()):
            raise UserError(f"{job.tensors} contains tensors for several images, expected 1 row of each: "
                            f"use a file for each image")
        given |= tensors
    return inputs | dict(given=given)


def check_inputs(job: argparse.Namespace) -> None:
    """Raises ValueError for unusable input files. Checks only what can be checked before the weights are loaded."""
    inputs = read_inputs(job)
    given, edit = inputs["given"], inputs.get("edit")
    try:
        editing.check_given(given, edit)
    except ValueError as problem:
        raise UserError(f"{job.tensors or job.from_latent}: {problem}" if given else str(problem)) from None
    height, width = (inputs.get(side, getattr(job, side)) for side in ("height", "width"))
    if edit is not None and (height or width):
        height, width = editing.both_sides(height, width, edit.image)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    for name, shape in shapes.items():
        if name in editing.EMBEDDINGS and len(shape) != 3:
            raise UserError(f"embeddings {name} have shape {shape}, expected (1, tokens, width).")
    if height and width:
        size_c, size_b = latent_sizes(height, width)
        typed = " and ".join(f"--{side}" for side in ("width", "height") if getattr(job, side))
        if job.from_latent and typed and shapes["semantic"][2:] != size_c:
            own = read_tensors(job.from_latent, *LATENT)["size"].tolist()
            raise UserError(f"{job.from_latent} is for {own[1]} x {own[0]} px, not {width} x {height}: remove {typed}")
        for name, channels, size in (("semantic", 16, size_c), ("latents_c", 16, size_c), ("latents_b", 4, size_b)):
            if name in given:
                editing.fitting(1, given[name].device, name, given[name], (channels, *size))
    if job.to_latent and read_tensors(job.to_latent, *LATENT)["semantic"].shape != shapes["semantic"]:
        raise UserError(f"{job.from_latent} and {job.to_latent} belong to images of different sizes, "
                        f"expected the same")


def read_tensors(path: str, *needed: str) -> dict[str, Tensor]:
    """Reads a .safetensors file to {name: tensor}. Raises ValueError if that fails or one of `needed` is missing."""
    with reading(path, failed="cannot be read as a .safetensors file"):
        tensors = load_file(path)
    if not set(needed) <= tensors.keys():
        raise UserError(f"{path} contains {', '.join(tensors) or 'nothing'}, expected {', '.join(needed)}: "
                        f"was it written by --save-latent?")
    if needed == LATENT:
        check_latent(path, tensors)
    return tensors


def check_latent(path: str, latent: dict[str, Tensor]) -> None:
    """Raises UserError if `latent`, the tensors of a file, cannot have been written by --save-latent."""
    semantic, states, size = (latent[name] for name in LATENT)
    found = "its states are of another kind"
    if not (size.shape == (2,) and states.ndim == 2 and len(states) == 1 and states.dtype == torch.uint8):
        found = f"its size and states have shapes {tuple(size.shape)} and {tuple(states.shape)}"
    elif size.is_floating_point() or size.min() < 64 or size.max() > 2 ** 15:
        found = f"its size is {size.tolist()}"
    elif semantic.shape != (1, 16, *latent_sizes(*size.tolist())[0]) or not semantic.is_floating_point():
        found = f"its semantic latents have shape {tuple(semantic.shape)}"
    elif not is_finite(semantic):
        found = "its semantic latents contain NaN or infinity"
    else:
        with contextlib.suppress(RuntimeError):
            torch.Generator().set_state(states[0].clone())
            return
    raise UserError(f"{path} cannot be used: {found}: was it written by --save-latent?")


# ----- previews ------------------------------------------------------------------------------------------------------

@functools.lru_cache(1)
def previews_of(model) -> Previews:
    """Returns a Previews for the model. Creates only one, because fitting its matrices may take long."""
    return Previews(model, None)


def write_previews(jobs: list[argparse.Namespace], stage: str, step: int, images: Tensor) -> None:
    """Every --preview-every steps, enlarges images (n,3,h,w) and writes one NAME_preview.png for each job."""
    if (step + 1) % jobs[0].preview_every:
        return
    scale = {"C": 128 / 3, "B": 4}[stage]        # px of the image per latent position
    for job, image in zip(jobs, to_pil(images)):
        write = image.resize((round(image.width * scale), round(image.height * scale))).save
        if job.preview is not None:
            write_atomically(job.preview, write)
        else:
            job.preview = write_unused(job.preview_path, write, job.overwrite)


# ----- one image out of several --------------------------------------------------------------------------------------

def reconstruction(model, job: argparse.Namespace, options: dict):
    """Returns an image: the original next to its reconstruction from semantic latents. Prints PSNR and compression."""
    result = generate(model, [job], [job.seed], options | dict(output="pt")).cpu()         # (1, 3, height, width)
    height, width = result.shape[-2:]
    original = cover(read_image(job.reconstruct), height, width)[None]                     # (1, 3, height, width)
    h, w = latent_sizes(height, width)[0]
    print(f"PSNR {psnr(result, original):.2f} dB; {width} x {height} px became {w} x {h} positions of 16 numbers: "
          f"{math.sqrt(height * width / (h * w)):.1f} : 1 per side, {3 * height * width / (16 * h * w):.0f} : 1 in "
          f"numbers")
    return strip([*to_pil(original), *to_pil(result)], ["original", "reconstruction"])


def guidance_grid(model, job: argparse.Namespace, options: dict):
    """Returns one image with a column for each guidance scale of --grid and a row for each seed."""
    seeds, columns = range(job.seed, job.seed + job.num_images), []
    for scale in job.grid:
        columns.append([])
        for i in range(0, len(seeds), job.batch):
            batch = [*seeds[i:i + job.batch]]
            columns[-1] += generate(model, [job] * len(batch), batch, options | dict(guidance_c=scale))
    images = [image for row in zip(*columns) for image in row]
    return grid(images, len(columns), [f"guidance {scale:g}" for scale in job.grid], [f"seed {seed}" for seed in seeds])


def interpolation(model, job: argparse.Namespace, options: dict):
    """Returns --frames interpolated images: as a list for a .gif, else as one image, in a row."""
    options |= read_inputs(job) | dict(negative_prompt=job.negative_prompt)
    ends = job.prompt, job.interpolate_to
    if job.to_latent:
        ends = options["given"].pop("semantic"), read_tensors(job.to_latent, *LATENT)["semantic"]
        options["prompt"] = job.prompt
    images = editing.interpolate(model, *ends, job.frames, seed=job.seed, to_seed=job.to_seed, batch=job.batch,
                                 **options)
    return images if job.path.suffix.lower() == ".gif" else strip(images)
