"""Implements the command line of sample.py: reads the advanced options, turns them into jobs, and saves images.

  argv -parse_jobs-> a list of jobs -batches-> lists of jobs whose images are generated in one call
  image, job -save-> a PNG, JPEG or WebP file that contains the image and the settings that made it

A job is an argparse.Namespace with all options, the seed and the path of one image. Most options are passed on to the
pipeline as arguments of the same name. modes.py implements grids, interpolation, reconstruction, latents and previews.
Note: options come from three sources: the command line, the image of --like, and the lines of --prompt-file. like.py
turns options of the last two sources into words of a command line, so that all are checked in the same way.
Needs: the standard library, so that `--help` and error messages appear at once.
"""
import argparse
import contextlib
import functools
import itertools
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from extras.jobs import Run, place_of, prompt_lines, remove_preview, skip_line, without_mark
from extras.like import (COMBINED, DTYPES, FILES, INPUTS, NAMED, OF_STAGES, ONLY_V1, PER_IMAGE, PER_RUN,
                         REQUIRES, SAMPLERS, SAMPLING, Options, as_option, as_text, flat, merge, of_other_version,
                         options_like, settings_of, split, typed)
from loading.errors import UserError
from loading.files import check_folder, numbered
from loading.options import CELLS, FRAMES, SEED, SIDE, STEPS, Number, integer, nearest_option, positive_int, unit_float

PUBLISHED_STEPS = "DEFAULT_STAGE_C_TIMESTEPS"    # diffusers' name for the noise levels of Sampling(29, early=True)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")    # formats in which images are saved, see metadata.py

SPECIAL = {*COMBINED, "outpaint", "from_latent", "tensors", "save_latent", "preview_every"}    # options for modes.py
CONFLICTS = (("mask", "outpaint"), ("low_memory", "offload"), ("prompt_file", "reconstruct"), ("reconstruct", "init"),
             ("reconstruct", "from_latent"), ("grid", "from_latent"), ("interpolate_to", "from_latent"),
             ("save_latent", "from_latent"), ("tensors", "interpolate_to"), *itertools.combinations(COMBINED, 2),
             *itertools.product(("save_latent", "preview_every"), COMBINED))


def error(message: str) -> None:
    option = message.removeprefix("ambiguous option: ").partition(" ")[0].partition("=")[0]
    if f"{option}-c, {option}-b" in message:
        message += f". Stage C decides what is in the image, {option}-c; Stage B adds detail, {option}-b"
    raise UserError(message)


def read_options(p: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses argv like p.parse_args, but raises ValueError with a hint for unknown options."""
    args, unknown = p.parse_known_args(argv)
    if unknown:
        hint = nearest_option(p, unknown[0])
        if not unknown[0].startswith("-"):
            prompt = " ".join([args.prompt or "", *unknown]).strip()
            hint = f'did you mean --prompt "{prompt}"? A text of several words needs quotes'
        error(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    return args


# ----- types for argparse: each function parses the value of an option -----------------------------------------------

def comma_list(read_one, *counts: int):
    """Returns a function that parses comma-separated values to a tuple. read_one: parses one value. counts: the numbers
    of values that are allowed, by default any. If 1 is in counts, a single value is returned without a tuple."""
    def read(text: str):
        values = tuple(map(read_one, text.split(",")))
        if counts and len(values) not in counts:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(map(str, counts))} numbers with commas between, "
                                             f"got {text!r}")
        return values[0] if counts and len(values) == 1 else values
    return read


def steps(text: str) -> int | str | dict | tuple:
    """Parses the value of --steps-c or --steps-b: "29" (steps) to an int, "2/3:20,0:10" (segments) to a dict, or
    "1,0.6,0.3,0" (noise levels) to a tuple. Returns the text PUBLISHED_STEPS unchanged."""
    try:
        if text == PUBLISHED_STEPS:
            return text
        if ":" in text:
            segments = [part.split(":") for part in text.split(",")]
            levels = {unit_float(end): STEPS(count) for end, count in segments}
        else:
            return comma_list(unit_float)(text) if "," in text else STEPS(text)
    except ValueError:
        forms = f"29 (steps), 2/3:20,0:10 (segments), 1,0.5,0 (noise levels) or {PUBLISHED_STEPS}"
        raise argparse.ArgumentTypeError(f"expected something like {forms}, got {text!r}") from None
    if len(levels) < len(segments):                  # some segments have the same end, so the dict kept only one
        raise argparse.ArgumentTypeError(f"expected segments that each end at another noise level, got {text!r}")
    return levels


def loras(text: str) -> dict[str, float]:
    """Parses the value of --lora: "a.safetensors:0.8,b.safetensors" to {"a.safetensors": 0.8, "b.safetensors": 1.0}."""
    result = {}
    for part in text.split(","):
        file, colon, scale = part.rpartition(":")
        try:
            file, scale = (file, Number()(scale)) if colon and file not in ("", "hub") else (part, 1.0)
        except argparse.ArgumentTypeError:           # no scale follows the colon, so the colon belongs to the name
            file, scale = part, 1.0
        if file in result:
            raise argparse.ArgumentTypeError(f"{file} is given twice, expected once: add up its scales")
        result[file] = scale
    return result


# ----- options -------------------------------------------------------------------------------------------------------

def add_input_options(p: argparse.ArgumentParser) -> None:
    """Adds the advanced options for inputs (prompt files, images, latents, embeddings) and for combining images."""
    add = p.add_argument_group("several images, and images as input").add_argument
    add("--prompt-file", metavar="FILE", help="many prompts: a text file with one per line, without those that begin "
        'with #; or .jsonl, with an object of settings per line, named like options: {"prompt": "a cat", "seed": 3, '
        '"guidance_c": 6}. A line that is not JSON stops the file; other lines that cannot be used are reported and '
        'skipped')
    add("--like", metavar="IMAGE", help="all settings of this image, made by this program, and options on the command "
        'line override them. "" undoes any option and what depends on it: --mask "", or --seed "" for a new one. With '
        "other --weights, the old ones' own defaults are not taken over, nor what only v1 or only v2 has. Files are "
        "looked for from the image's folder "
        "and those above it, then from here")
    add("--mask", metavar="IMAGE", help="as large as --init, white where new content is generated, black where it "
        "stays; or the image itself, with transparent holes for new content")
    add("--outpaint", metavar="L,T,R,B", type=comma_list(integer(0, SIDE.high), 4), help="px to add to --init and to "
        "generate: left, top, right, bottom; instead of --mask")
    add("--reconstruct", metavar="IMAGE", help="encode and decode this image: image encoder, Stages B and A. Saves "
        "both side by side and prints how similar they are (PSNR)")
    add("--interpolate-to", metavar="TEXT", help="another prompt: --frames images on the way to it, as a strip, or as "
        "an animation if --out names a .gif")
    add("--to-seed", metavar="N", type=SEED, help="also interpolate the noise, from --seed to this seed")
    add("--frames", metavar="N", type=FRAMES, default=8, help="images of an interpolation, including both ends "
        "(default: 8)")
    add("--grid", metavar="X,X,...", type=comma_list(Number()), help="one image: a column for each of these "
        "--guidance-c, a row for each of --num-images seeds")
    add = p.add_argument_group("latents and embeddings").add_argument
    add("--save-latent", action="store_true", help="also save the semantic latents, the output of Stage C, as "
        ".safetensors next to the image")
    add("--from-latent", metavar="FILE", help="start from such a file, without Stage C; the same --prompt without "
        "--seed gives the same image")
    add("--to-latent", metavar="FILE", help="another such file: interpolate between the two")
    add("--tensors", metavar="FILE", help=".safetensors with any of prompt_c, negative_c, prompt_b, negative_b "
        "(embeddings instead of text, 1 x tokens x width), latents_c, latents_b (instead of the first noise, 1 x "
        "channels x height x width)")


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    """Adds the advanced sampling options of both stages."""
    add = p.add_argument_group("more about sampling", "-c for Stage C, -b the same for Stage B").add_argument
    for name, read, text in (
            ("interval", comma_list(unit_float, 2), "noise levels LOW,HIGH between which guidance acts; outside of "
             "them it costs nothing"),
            ("rescale", unit_float, "0 to 1: how far to undo the contrast that guidance adds"),
            ("eta", unit_float, "0 to 1: randomness of ddim; 1 is as random as ddpm"),
            ("t_start", unit_float, "noise level to start at"), ("t_end", unit_float, "noise level to stop at")):
        for stage in "cb":
            add(as_option(f"{name}_{stage}"), metavar=name.upper().replace("_", "-"), type=read, default=SAMPLING[name],
                help=f"{text} (default: {as_text(SAMPLING[name])})" if stage == "c" else
                f"default: {as_text(SAMPLING[name])}")
    add("--temperature-b", metavar="T", type=comma_list(Number(), 1, 2), help="for v1: below 1 likelier tokens are "
        "drawn: cleaner and less varied; two numbers, 1,0.6: in the first and the last step (default: 1,0.6)")


def add_output_options(p: argparse.ArgumentParser) -> None:
    """Adds the advanced options for weights, memory, speed and saving."""
    add = p.add_argument_group("more about weights, memory and speed").add_argument
    add("--lora", metavar="FILE:SCALE", type=loras, help="LoRA for Stage C: a file in any of the usual formats, a "
        "folder of a run or of peft, or hub:OWNER/NAME; several with commas; SCALE: how strongly it counts (default 1)")
    add("--lora-partial", action="store_true", default=None, help="of a LoRA that also changes what is not in Stage C, "
        "such as a text encoder, load the rest and list what is left out")
    for part, what in FILES.items():
        add(as_option(part), metavar="PATH",
            help=f"{what} from this folder{', file' * ('text' not in part)} or hub:OWNER/NAME")
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub instead of the tested ones; REPO=NAME for "
        "one repository")
    add("--offline", action="store_true", help="never use the network: what is not in the cache is an error")
    add("--low-memory", action="store_true", default=None, help="keep one network in memory at a time (default: if "
        "they do not all fit)")
    add("--offload", action="store_true", help="keep one network on the GPU at a time, the others in main memory")
    add("--compile", action="store_true", help="torch.compile for Stages B and C: a minute or more at the start, then "
        "faster on a GPU; hardly faster on a CPU")
    add("--allow-tf32", action="store_true", default=None, help="on a GPU with --dtype fp32: faster, since "
        "products and convolutions are rounded to 10 bits; not tried on a GPU yet")
    add("--int8", action="store_true", default=None, help="on a CPU: Stages B and C in 8 bits: faster, and about a "
        "quarter of their memory, see BENCHMARKS.md; images differ a little from those in float32")
    add("--tile", metavar="N", type=positive_int, help="decode in tiles of N x N latents, 4 px each (default: all at "
        "once if memory allows)")

    add = p.add_argument_group("more about output").add_argument
    add("--overwrite", action="store_true", help="replace existing files; without it nothing is ever overwritten")
    add("--no-metadata", action="store_true", help="save only the image, without the settings that made it")
    add("--preview-every", metavar="N", type=positive_int, help="every N steps, write NAME_preview.png, roughly what "
        "the image will become; it is removed when the image is there")


# ----- from the command line to jobs ---------------------------------------------------------------------------------

def parse_jobs(p: argparse.ArgumentParser, argv: list[str], run: Run) -> list[argparse.Namespace]:
    """Returns a job for each image that the command line argv requests. Raises ValueError for unusable options or input
    files. `run` reports unusable lines of a prompt file, which are skipped. If no line is usable, raises ValueError."""
    bad = {}                                     # {number of a line in the prompt file: what is wrong with it}
    prompts = parse_args(p, argv, bad)
    jobs = [argparse.Namespace(**vars(args) | dict(seed=None if args.seed is None else args.seed + i))
            for args in prompts for i in range(1 if args.grid else args.num_images)]
    for job, path in zip(jobs, output_paths(jobs) if jobs else ()):
        job.path, job.preview_path, job.preview = path, files_of(job, path)[-1], None  # write_previews sets job.preview
    for args in prompts:
        if not args.given.isdisjoint(INPUTS):    # check input files first, because loading the weights takes long
            from extras.modes import check_inputs
            try:
                check_inputs(args)
            except ValueError as problem:
                skip_line(args, problem, bad)
    run.jobs = [job for job in jobs if job.line not in bad]
    messages = [bad[line] for line in sorted(bad)]
    for message in messages if run.jobs else messages[:-1]:
        run.report(message)
    return run.jobs or error(messages[-1])


def parse_args(p: argparse.ArgumentParser, argv: list[str], bad: dict[int, str] | None = None) -> list:
    """Parses the command line argv. Returns an argparse.Namespace with all options for each prompt. Raises ValueError
    for unusable options. bad: collects {line of a prompt file: error}; if it is None, raises these errors as well."""
    read, options, hashes = functools.partial(read_options, p), split(p, argv), {}
    args = read(flat(options))
    if args.like is not None:
        options, hashes = options_like(read, args, options)
        args = read(flat(options))
    if args.prompt is not None and args.prompt_file is not None:
        error("--prompt and --prompt-file are both given: choose one of them")
    if args.prompt_file is not None:
        prompts = read_prompt_file(read, options, args, bad)
    else:
        args.line = None
        args.seed = random_seed() if args.seed is None and needs_seed(args) else args.seed
        check(args)
        prompts = [args]
    for args in prompts:
        args.like_hashes = hashes
    return prompts


def random_seed() -> int:
    return random.randrange(10 ** 6)


def needs_seed(args: argparse.Namespace) -> bool:
    """Returns whether a job needs a seed. --from-latent without --to-latent restores the generator's state instead."""
    return not args.from_latent or bool(args.to_latent)


def read_prompt_file(read: Callable, options: Options, args: argparse.Namespace,
                     bad: dict[int, str] | None) -> list[argparse.Namespace]:
    """Returns the options for each line of args.prompt_file: those of the command line, overridden by the line. read:
    parses words to an argparse.Namespace. options, args: the command line, as words and parsed. bad: see parse_args."""
    prompts, seed = [], random_seed() if args.seed is None else args.seed
    for number, settings in prompt_lines(Path(args.prompt_file)):
        args.line, first = number, seed
        try:
            if unknown := [name for name in settings if name not in PER_IMAGE]:
                error(f"{', '.join(unknown)} cannot be set for one line; possible: {', '.join(PER_IMAGE)}")
            line = read(flat(merge(read, options, typed(settings))))
            line.line = number
            if settings.get("seed") in (None, "") and (args.seed is not None or needs_seed(line)):
                line.seed, seed = seed, seed + line.num_images
            check(line)
            prompts.append(line)
        except ValueError as problem:            # a line with an error also takes a seed, so later seeds do not shift
            seed += seed == first and settings.get("seed") in (None, "")
            skip_line(args, problem, bad)
    return prompts


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be used. Sets args.given to the names of the options that are given."""
    for name in PER_IMAGE + PER_RUN:
        if re.search("[\ud800-\udfff]", str(getattr(args, name))):
            error(f"{as_option(name)} contains bytes that are not UTF-8 text: check the terminal's encoding")
    # An option counts as given if its value is 0, but not if it is None, "" or False.
    args.given = {name for name, value in vars(args).items() if value not in (None, "") and value is not False}
    for names in CONFLICTS:
        if args.given.issuperset(names):
            error(f"{' and '.join(map(as_option, names))} cannot be used together: choose one of them")
    for name, *others in REQUIRES:
        if name in args.given and args.given.isdisjoint(others):
            error(f"{as_option(name)} requires {' or '.join(map(as_option, others))}")
    for name in ("prompt", "negative_prompt", "interpolate_to"):
        if getattr(args, name) is not None:
            setattr(args, name, without_mark(getattr(args, name)))
    args.prompt = args.prompt if (args.prompt or "").strip() else ""
    if not args.prompt and ("interpolate_to" in args.given
                            or args.given.isdisjoint(("init", "reconstruct", "from_latent", "tensors"))):
        error('the prompt is empty: describe the image, for example --prompt "a red apple on a blue background"')
    if args.grid and len(args.grid) * args.num_images > CELLS:
        error(f"--grid is for {len(args.grid)} x {args.num_images} images, expected {CELLS} at most: a column for each "
              f"number, a row for each of --num-images")
    last = 2 ** 32 - args.num_images
    for name in args.given & {"seed", "to_seed"}:
        if getattr(args, name) > last:
            error(f"{as_option(name)} is {getattr(args, name)}, expected a number from 0 to {last}")
    if args.seed is None and args.num_images > 1:
        error("--from-latent without --seed is one image: for --num-images, give a --seed")
    for stage in "cb":
        check_sampling(args, stage)
    if args.weights in NAMED and not args.decoder:
        v1 = NAMED[args.weights]
        for name in of_other_version(args, v1):
            if name != "sampler_b":
                only_for(name)
            error(f"Stage B: sampler is {args.sampler_b!r}, expected one of "
                  + (f"{', '.join(SAMPLERS['b'][3:])} for Stage B of v1." if v1 else f"{', '.join(SAMPLERS['c'])}."))


def only_for(name: str) -> None:
    """Raises ValueError with the message that only weights of the other version (v1 or v2) can use option `name`."""
    error(f"{as_option(name)} is only for {'v1' if name in ONLY_V1 else 'v2'}, because Stage B of v1 generates "
          f"tokens: remove it")


def check_sampling(args: argparse.Namespace, stage: str) -> None:
    """Raises ValueError for sampling options of `stage`, "c" or "b", that cannot be used."""
    levels, sampler, interval, eta, start, end = (
        getattr(args, f"{name}_{stage}") for name in ("steps", "sampler", "interval", "eta", "t_start", "t_end"))
    if eta and sampler != "ddim":
        error(f"--eta-{stage} is for --sampler-{stage} ddim, not for {sampler or SAMPLERS[stage][0]}")
    segments = isinstance(levels, dict)
    if levels is not None and not isinstance(levels, int) and (end != 0 or start != 1 and not segments):
        error(f"--t-start-{stage} and --t-end-{stage} are for a number of steps: {as_text(levels)} contains its own "
              f"start and end")
    path = levels if isinstance(levels, tuple) else (start, *levels) if segments else (start, end)
    if any(a <= b for a, b in itertools.pairwise(path)):
        error(f"the noise levels of Stage {stage.upper()} are {as_text(path)}, expected each to be lower than the one "
              f"before")
    if interval[0] > interval[1]:
        error(f"--interval-{stage} is {as_text(interval)}, expected the lower noise level first")


# ----- paths ---------------------------------------------------------------------------------------------------------

def output_paths(jobs: list[argparse.Namespace]) -> list[Path]:
    """Returns a list with the path of each job's image. Raises ValueError if a path cannot be written to."""
    args, out, taken = jobs[0], Path(jobs[0].out), {}
    suffixes = (*SUFFIXES, ".gif") if args.interpolate_to or args.to_latent else SUFFIXES
    try:
        if any(len(os.fsencode(part)) > 200 for part in out.parts):  # file systems allow 255 bytes; suffixes come later
            raise OSError("the name is too long")
        is_file = out.suffix.lower() in suffixes and not out.is_dir()
        others = (".gif", ".bmp", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".jxl")
        if not is_file and not out.is_dir() and out.suffix.lower() in others:
            error(f"--out {out} is not possible: images are saved as PNG, JPEG or WebP, name a .png, .jpg or .webp "
                  "file, or a folder")
        for job in jobs:
            path = out if is_file else out / f"{slug(job)}.png"
            if job.seed is not None and (len(jobs) > 1 or not is_file):
                path = path.with_stem(f"{path.stem}_{job.seed}")
            existing = [file for file in files_of(job, path) if file.exists()]
            if is_file and existing and not job.overwrite:
                error(f"{existing[0]} exists already and will not be overwritten: choose another --out, remove the "
                      f"file, or add --overwrite")
            taken[unused_path(path, job, taken)] = job
        check_folder(path.parent, out)
    except OSError as problem:
        error(f"cannot write to {out}: {(problem.strerror or str(problem)).lower()}")
    return [*taken]


def slug(job: argparse.Namespace) -> str:
    """Returns the beginning of an image's file name, made from the prompt or, without one, the input file's name."""
    source = job.prompt or Path(job.init or job.reconstruct or job.from_latent or "image").stem
    return re.sub(r"\W+", "-", source.lower()).strip("-")[:50].strip("-") or "image"


def files_of(job: argparse.Namespace, path: Path) -> list[Path]:
    """Returns the paths of all files that are written for a job whose image is at `path`: image, latents, preview."""
    latent, preview = path.with_suffix(".safetensors"), path.with_name(f"{path.stem}_preview.png")
    return [path] + [latent] * job.save_latent + [preview] * bool(job.preview_every)


def unused_path(path: Path, job: argparse.Namespace, taken=()) -> Path:
    """Returns the first of `path`, name_2.png, ... that is not in `taken` and, unless --overwrite, not used on disk."""
    return next(p for p in numbered(path) if p not in taken
                and (job.overwrite or not any(file.exists() for file in files_of(job, p))))


# ----- what sample.main calls ----------------------------------------------------------------------------------------

def load_options(jobs: list[argparse.Namespace]) -> dict:
    """Returns arguments of Wuerstchen.load: the advanced options, and in `parts` the networks that are needed."""
    from loading import hub
    args = jobs[0]
    parts = hub.RECONSTRUCTION if args.reconstruct else hub.TEXT_TO_IMAGE
    if all(job.from_latent for job in jobs):
        parts = tuple(part for part in parts if not part.startswith("prior"))
    if any(job.init for job in jobs):
        parts = (*parts, "image_encoder")
    return dict(parts=parts, offline=args.offline, revision=args.revision, low_memory=args.low_memory,
                offload=args.offload, compile=args.compile, int8=bool(args.int8),
                **dict(lora_partial=True) if args.lora_partial else {},
                **{part: getattr(args, part) for part in FILES if getattr(args, part)})


def batches(jobs: list[argparse.Namespace]) -> Iterator[list[argparse.Namespace]]:
    """Yields lists of at most --batch consecutive jobs that differ only in prompt and seed."""
    def settings(job: argparse.Namespace) -> dict:
        varied = dict.fromkeys(("prompt", "negative_prompt", "num_images", "line", "path", "preview_path", "preview",
                                "given"))
        return vars(job) | varied | dict(seed=job.seed is None)
    for _, group in itertools.groupby(jobs, settings):
        group = list(group)
        size = group[0].batch if group[0].given.isdisjoint(COMBINED) else 1
        for i in range(0, len(group), size):
            yield group[i:i + size]


def sampling_options(args: argparse.Namespace, model) -> dict:
    """Returns {name: value} of sampling options that are not the default. Raises ValueError if the model lacks one."""
    options = {}
    for name in ("mask", "outpaint"):
        if not hasattr(model.b, "rescale") and getattr(args, name, None):     # tiny.evaluate's args have neither option
            only_for(name)
    for name in OF_STAGES:
        field, value = name[:-2], getattr(args, name)
        if value in (None, SAMPLING[field]):
            continue
        if not hasattr(model.c if name.endswith("c") else model.b, field):
            only_for(name)
        if value == PUBLISHED_STEPS:
            from wuerstchen import Sampling
            value = Sampling(29, early=True).levels
        options[name] = value
    return options


def save(image, job: argparse.Namespace, model) -> Path:
    """Writes an image or, if it is a list, a GIF, and with --save-latent the latents. Returns the path of the image.
    Raises ValueError if a file cannot be written."""
    from extras.metadata import path_for
    settings = None if job.no_metadata else settings_of(job, model, image)
    path = wanted = job.path if job.path.suffix.lower() == ".gif" else path_for(image, job.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for path in numbered(wanted):
            with contextlib.suppress(FileExistsError):   # another program has written the file: try the next name
                write_image(image, job, path, settings)
                remove_preview(job)
                return path
    except OSError as problem:
        known = "cannot be written" in str(problem)
        error(place_of(job) + (str(problem) if known else f"{path} cannot be written: {problem.strerror or problem}"))


def write_image(image, job: argparse.Namespace, path: Path, settings: dict | None) -> None:
    """Writes an image, with `settings` unless they are None, and for --save-latent the latents: both files or neither.
    Raises FileExistsError if a file exists and --overwrite is not given, and OSError if a file cannot be written."""
    from extras.images import save_gif
    from extras.metadata import save_image
    latent = None
    if job.save_latent:
        from extras.modes import save_latent
        latent = save_latent(job, files_of(job, path)[1])
    try:
        if path.suffix.lower() == ".gif":
            save_gif(image, path, overwrite=job.overwrite)
        else:
            save_image(image, path, settings, job.overwrite)
    except BaseException:
        if latent:
            latent.unlink()
        raise
