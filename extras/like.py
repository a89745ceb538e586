"""Collects the settings of an image for its file, and reads them for --like as command line options.

  job, model, image -settings_of-> settings -metadata.save_image-> PNG, JPEG or WebP file
  file -options_like-> {"seed": ["--seed=3"], ...}, overridden by the command line's options -flat-> argv

The type `Options` is {name of an option: its words on the command line}. The list of words is empty if the user typed
--option "", which removes the option. Note: if the user did not choose a setting, the weights' default is stored, so
that the image stays the same if defaults change. If --like is used with other weights, these defaults are omitted.
Paths are stored relative to the working folder and searched in all folders above the image, so that folders can be
moved. Needs: the standard library; torch to write settings, and for some images to read them.
"""
import argparse
import os
from collections.abc import Callable
from pathlib import Path

from loading.errors import UserError, WeightsError, warn
from loading.hub import NAMES, digest, hashes
from loading.layouts import is_name, locate

DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16")
# {sampling setting of a stage: default of its option}. None: the default depends on the weights.
SAMPLING = dict(steps=None, sampler=None, guidance=None, interval=(0.0, 1.0), rescale=0.0, eta=0.0, t_start=1.0,
                t_end=0.0, temperature=None)
# {part that can be replaced by an option of the same name: the part's name in messages}
FILES = dict(prior="Stage C", decoder="Stage B", vqgan="Stage A", image_encoder="the image encoder",
             prior_text_encoder="Stage C's text encoder", text_encoder="Stage B's text encoder")
# {value of --weights: whether these weights are v1}, for weights whose version is known without loading them.
NAMED = {None: False, "tiny": False, "tiny-v1": True, "v1": True, "v2": False, "v2-base": False, "v2-aesthetic": False}
# Options for weights of v1 only or of v2 only, whose Stages B differ. SAMPLERS: {stage: samplers of v1 and v2}.
ONLY_V1, ONLY_V2 = ("temperature_b",), ("mask", "outpaint", "rescale_b", "eta_b")
SAMPLERS = dict(c=("ddpm", "ddim", "dpm++"), b=("ddpm", "ddim", "dpm++", "multinomial", "argmax", "quant"))
INPUTS = ("init", "mask", "reconstruct", "from_latent", "to_latent", "tensors")      # options that name input files

# Settings that are saved with an image and read by --like. PER_IMAGE: these may differ between lines of a prompt file.
OF_STAGES = tuple(f"{name}_{stage}" for stage in "cb" for name in SAMPLING if (name, stage) != ("temperature", "c"))
PER_IMAGE = ("prompt", "negative_prompt", "seed", "num_images", "width", "height", "init", "strength", "mask",
             "outpaint", "from_latent", "tensors", *OF_STAGES)
PER_RUN = ("reconstruct", "interpolate_to", "to_seed", "frames", "grid", "to_latent", "weights", *FILES, "lora",
           "lora_partial", "revision", "dtype", "allow_tf32", "int8", "tile")

COMBINED = ("reconstruct", "grid", "interpolate_to", "to_latent")         # options whose output combines several images
REQUIRES = (("mask", "init"), ("outpaint", "init"), ("strength", "init"), ("to_latent", "from_latent"),
            ("to_seed", "interpolate_to", "to_latent"))                      # the first option needs one of the others
Options = dict[str, list[str]]


# ----- options -------------------------------------------------------------------------------------------------------

def as_text(value) -> str:
    """Returns the value of an option as the text that a user would type on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{as_text(end)}:{count}" for end, count in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def typed(settings: dict) -> Options:
    """Converts settings to Options, and omits those that are None. For {"seed": 3, "int8": True, "mask": ""}, returns
    {"seed": ["--seed=3"], "int8": ["--int8"], "mask": []}."""
    return {name: [] if value == "" else [as_option(name) + ("" if value is True else f"={as_text(value)}")]
            for name, value in settings.items() if value is not None}


def split(p: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Converts argv to Options. If an option is given twice, the last one counts. p: the parser of these options."""
    strings = {string: action.dest for action in p._actions for string in action.option_strings}
    options, name = {}, ""
    for word in argv:
        option, equals, value = word.partition("=")
        names = {strings[string] for string in strings if string.startswith(option)} if option[:2] == "--" else ()
        if option in strings or len(names) == 1:                             # argparse accepts unique abbreviations
            name = strings.get(option) or names.pop()
            options[name] = [word]
        else:
            options.setdefault(name, []).append(word)
        if equals and not value or options[name][1:] == [""]:
            options[name] = []
    return options


def flat(options: Options) -> list[str]:
    return [word for words in options.values() for word in words]


def is_possible(name: str, args: argparse.Namespace) -> bool:
    """Returns whether the option `name` can be used together with the other options in `args`."""
    if needed := next((others for first, *others in REQUIRES if first == name), None):
        return any(getattr(args, other) for other in needed)
    stage = name[-1]
    if name in ("eta_c", "eta_b"):
        return getattr(args, f"sampler_{stage}") == "ddim"
    if name in ("t_start_c", "t_start_b", "t_end_c", "t_end_b"):
        steps = getattr(args, f"steps_{stage}")              # a dict sets t_end; a tuple sets t_start and t_end
        return steps is None or isinstance(steps, (int, dict) if "start" in name else int)
    return True


def of_other_version(args: argparse.Namespace, v1: bool) -> list[str]:
    """Returns the names of options in `args` that the weights cannot use. v1: whether the weights are v1, not v2."""
    names = [name for name in (ONLY_V2 if v1 else ONLY_V1)
             if getattr(args, name) not in (None, "", SAMPLING.get(name[:-2]))]
    return names + ["sampler_b"] * bool(args.sampler_b and (args.sampler_b in SAMPLERS["c"]) == v1)


def is_v1(args: argparse.Namespace) -> bool | None:
    """Returns whether the weights that `args` selects are v1, or None if this cannot be found out offline."""
    if args.weights in NAMED and not args.decoder:
        return NAMED[args.weights]
    try:
        from loading.weights import StageBV1, stage_b_of
        files = {"decoder": args.decoder} if args.decoder else {}
        return stage_b_of(locate(args.weights or "v2", files, ("decoder",), offline=True)["decoder"]) is StageBV1
    except (WeightsError, OSError, TypeError):
        return None


def merge(read: Callable[[list[str]], argparse.Namespace], base: Options, more: Options) -> Options:
    """Returns base | more, without options of `base` that cannot be used with `more`. For example, if `more` removes
    --init, --mask of `base` is also removed. read: parses command line words to an argparse.Namespace."""
    merged = base | more
    before, after = read(flat(base)), read(flat(merged))
    while gone := [name for name in merged.keys() - more.keys()
                   if is_possible(name, before) and not is_possible(name, after)]:
        merged = {name: words for name, words in merged.items() if name not in gone}
        after = read(flat(merged))
    return merged


# ----- --like --------------------------------------------------------------------------------------------------------

def options_like(read: Callable, args: argparse.Namespace, more: Options) -> tuple[Options, dict[str, str]]:
    """Returns (options, hashes). options: the settings of the image args.like, overridden by `more`, the options of the
    command line. hashes: {option or part: hash} of the image's input files and weights that `more` does not replace.
    read: see merge. args: `more`, parsed. Raises ValueError if the image has no settings or a file is missing."""
    from extras.metadata import read_settings
    stored = read_settings(args.like)
    hashes = stored["hashes"] = stored["hashes"] if isinstance(stored.get("hashes"), dict) else {}
    settings = {name: value for name, value in stored.items() if name in PER_IMAGE + PER_RUN}
    if args.prompt_file:                         # the prompts come from the prompt file
        settings["prompt"] = None
    elif args.from_latent:                       # the noise generator's state comes from the file of the latents
        settings["seed"] = None
    other_weights = more.keys() & FILES or "weights" in more and args.weights != stored.get("weights")
    if other_weights or more.keys() & {"init", "outpaint", "from_latent"}:
        own = own_defaults(args.like, stored)
        same = {name for name, value in own.items() if as_text(value) == as_text(stored.get(name))}
        if not same >= {"width", "height"}:      # if only one side is the default, keep both
            same = same - {"width", "height"}
        settings |= dict.fromkeys(same if other_weights else same & {"width", "height"})
    options = merge(read, typed(settings), more)
    args = read(flat(options))
    for name in {*INPUTS, *FILES, "weights", "lora"} & options.keys() - more.keys():
        value = getattr(args, name)
        place = {find(args.like, name, file, hashes): scale for file, scale in value.items()} if name == "lora" else \
            find(args.like, name, value, hashes)
        options |= typed({name: place})
    if other_weights and (v1 := is_v1(read(flat(options)))) is not None:
        gone = [name for name in of_other_version(args, v1) if name not in more]
        options = {name: words for name, words in options.items() if name not in gone}
        if gone:
            warn(f"weights of {'v1' if v1 else 'v2'} cannot use {', '.join(map(as_option, gone))} of "
                 f"{args.like}: left out, so this is another image")
    replaced = {*more, *(FILES if "weights" in more else ())}
    return options, {name: value for name, value in hashes.items() if name.split()[0] not in replaced}


def own_defaults(image: str, stored: dict) -> dict:
    """Returns {option: its default for the weights in `stored`}, for options whose default depends on the weights."""
    weights = str(stored.get("weights") or "tiny")
    v1, tiny = "temperature_b" in stored, is_tiny(weights) or is_tiny(Path(image).parent / weights)
    height, width = own_size(image, stored, 128 if tiny else 512 if v1 else 1024)
    own = dict(steps_c=60, guidance_c=6.0) if v1 and not tiny else dict(steps_c=29, guidance_c=2.0 if tiny else 4.0)
    own |= dict(steps_b=8, sampler_b="multinomial", guidance_b=2.0, temperature_b=(1.0, 0.6)) if v1 else \
        dict(steps_b=12, sampler_b="ddpm", guidance_b=(4.0, 1.0) if tiny else 1.0)
    dtype = {"cpu": "fp32", None: None}.get(stored.get("device"), "bf16")
    return own | dict(sampler_c="ddpm", height=height, width=width, dtype=dtype)


def is_tiny(weights: str | Path) -> bool:
    """Returns whether these weights are of a small model, for 128 px; False if they cannot be found."""
    if weights in NAMES:
        return False
    try:
        from loading.weights import is_tiny
        encoder = locate(weights, offline=True)["image_encoder"]
        return encoder is not None and is_tiny(encoder)
    except (WeightsError, OSError):
        return False


def own_size(image: str, stored: dict, size: int) -> tuple[int, int]:
    """Returns the default (height, width) for settings `stored` in the file `image`: that of their --from-latent
    file, or the aspect ratio of their --init image, or else a square. size: the shorter side of these two, in px."""
    from extras import editing, images, modes
    try:
        if latent := stored.get("from_latent"):
            path = find(image, "from_latent", str(latent), stored["hashes"])
            return tuple(modes.read_tensors(path, *modes.LATENT)["size"].tolist())
        if not (init := stored.get("init")):
            return size, size
        height, width = images.read_image(find(image, "init", str(init), stored["hashes"])).shape[-2:]
        left, top, right, bottom = map(int, str(stored.get("outpaint") or "0,0,0,0").split(","))
        h, w = height + top + bottom, width + left + right
        return images.fitting_size(min(h, editing.LONGEST * w), min(w, editing.LONGEST * h), size)
    except ValueError:                           # the file is missing: if a side is `size`, take both for defaults
        now = stored.get("height"), stored.get("width")
        return now if size in now else (size, size)


# ----- paths ---------------------------------------------------------------------------------------------------------

def relative(file: str | Path, folder: Path) -> str:
    """Returns the path of an input file for the settings of an image that is saved in `folder`. The path is relative to
    the working folder if `folder` is inside it, else to `folder`. Names of weights are returned unchanged."""
    if is_name(file):
        return file
    folder = Path(os.path.abspath(folder))
    try:
        return Path(os.path.relpath(file, Path.cwd() if folder.is_relative_to(Path.cwd()) else folder)).as_posix()
    except ValueError:                           # the file is on another drive of Windows
        return Path(file).name


def find(image: str | Path, name: str, stored: str, hashes: dict[str, str]) -> str:
    """Returns the path of the file `stored`, which the settings of `image` name for option `name`. Searches the image's
    folder, those above and the working folder. Prefers one with the stored hash. Raises ValueError if none is found."""
    if is_name(stored):
        return stored
    folders = [*Path(os.path.abspath(image)).parents, Path.cwd()]
    found = [place for place in dict.fromkeys(os.path.normpath(folder / stored) for folder in folders)
             if os.path.exists(place)]
    if not found:
        option = as_option(name)
        raise UserError(f"{image} was made from {stored}, which is gone: looked for it from its folder and "
                        f"from the working folder; name it with {option}, or remove it with {option} \"\"")
    expected = hashes.get(f"lora {Path(stored).name}" if name == "lora" else name)
    place = Path(next((place for place in found if len(found) > 1 and digest(place) == expected), found[0]))
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


# ----- writing -------------------------------------------------------------------------------------------------------

def settings_of(job: argparse.Namespace, model, image) -> dict:
    """Returns all settings that are needed to generate the image again, with file hashes and package versions. Warns if
    a file has changed since the image of --like was generated from it."""
    from importlib.metadata import version
    import torch
    files = {name: getattr(job, name) for name in INPUTS if getattr(job, name)}
    files |= {f"lora {Path(file).name}": file for file in model.loras}
    made_from = hashes(model.paths) | {name: digest(file) for name, file in files.items()}
    if changed := [name for name, value in made_from.items() if job.like_hashes.get(name, value) != value]:
        paths = ", ".join(str((model.paths | files)[name]) for name in changed)
        warn(f"{', '.join(changed)} changed since {job.like} was made: this is another image ({paths})")
    values = {name: getattr(job, name) for name in PER_IMAGE + PER_RUN}
    for name in OF_STAGES:                       # instead of None, store the weights' default
        if values[name] is None:
            values[name] = getattr(model.c if name.endswith("c") else model.b, name[:-2], None)
    values["weights"] = job.weights or ("v2" if any(values[part] for part in FILES) else "tiny")
    for name in (*INPUTS, *FILES, "weights"):
        values[name] = values[name] and relative(values[name], job.path.parent)
    values["lora"] = job.lora and {relative(file, job.path.parent): scale for file, scale in job.lora.items()}
    values["dtype"] = next(name for name, dtype in DTYPES.items() if getattr(torch, dtype) == model.dtype)
    if not any(values[name] for name in COMBINED):
        values |= dict(width=image.width, height=image.height)
    if not job.grid:                             # without --grid, each file has one image
        values["num_images"] = None
    if not job.interpolate_to and not job.to_latent:
        values["frames"] = None
    values = {name: as_text(value) if isinstance(value, (tuple, dict)) else value for name, value in values.items()
              if value not in (None, "")}
    return values | dict(device=model.device.type, batch=job.batch, compile=job.compile, hashes=made_from,
                         versions=dict(torch=torch.__version__, tokenizers=version("tokenizers")),
                         software="wuerstchen, sample.py")
