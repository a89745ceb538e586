"""Paints pictures on the command line and saves them as PNG files: from text, from pictures, from latents.

  python sample.py --prompt "a red apple on a blue background"
  python sample.py --prompt "a cat left of a moon on a green background" --num-images 4 --seed 7 --out cats
  python sample.py --prompt "an astronaut riding a horse" --weights v2 --width 1536 --sampler-c dpm++ --steps-c 14
  python sample.py --prompt "a moon on a blue background" --init apple.png --strength 0.9     # without --prompt: variations
  python sample.py --prompt "a rose on a blue background" --init apple.png --mask white-where-new.png
  python sample.py --reconstruct photo.png                             # through all stages and back
  python sample.py --prompt "a dog" --interpolate-to "a cat" --frames 12 --out morph.gif
  python sample.py --prompt "a dog" --grid 1,2,4,8 --num-images 3      # seeds x guidance
  python sample.py --prompt-file prompts.txt --batch 8
  python sample.py --like out/picture.png --seed 8                     # its settings, but this seed

This file is only the way in: arguments, checks, files. Things happen in wuerstchen.py, whose arguments have the
names of the options here. A picture carries its settings as PNG text (--no-metadata: none).
Surprise: torch, which takes seconds to import, comes in only after the arguments have been found to make sense.
Needs: what wuerstchen.py needs.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

HOW_TO = """usage:   python sample.py --prompt "..." [options]
example: python sample.py --prompt "a red apple on a blue background" --seed 1
All options: python sample.py --help"""


# ----- arguments ------------------------------------------------------------------------------------

def whole(least: int):
    """For argparse: whole numbers from `least` on."""
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)
    return read


def number(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """For argparse: 0.5 or 2/3."""
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):        # 1/0, 1e999
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected a number such as 0.5 or 2/3{f', from {low} to {high}' if high == 1 else ''}, got {text!r}")
    return value


share = functools.partial(number, low=0, high=1)


def several(kind, *counts: int):
    """For argparse: numbers with commas between, as many as one of `counts`; a single one as itself if 1 is among them."""
    def read(text: str):
        values = tuple(map(kind, text.split(",")))
        if counts and len(values) not in counts:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(map(str, counts))} numbers with commas between, got {text!r}")
        return values[0] if counts and len(values) == 1 else values
    return read


def steps(text: str) -> int | str | dict | tuple:
    """For argparse: 29; 2/3:20,0:10 (segments); 1,0.6,0.3,0 (the levels themselves); or a name."""
    try:
        if text == "DEFAULT_STAGE_C_TIMESTEPS":
            return text
        if ":" in text:
            return {share(end): whole(1)(count) for end, count in (part.split(":") for part in text.split(","))}
        return several(share)(text) if "," in text else whole(1)(text)
    except (ValueError, argparse.ArgumentTypeError):
        forms = "29 (steps), 2/3:20,0:10 (segments), 1,0.5,0 (noise levels) or DEFAULT_STAGE_C_TIMESTEPS"
        raise argparse.ArgumentTypeError(f"expected something like {forms}, got {text!r}") from None


def loras(text: str) -> dict[str, float]:
    """For argparse: a.safetensors:0.8,b.safetensors -> {"a.safetensors": 0.8, "b.safetensors": 1.0}."""
    result = {}
    for part in text.split(","):
        file, colon, scale = part.rpartition(":")
        try:
            result.update({file: number(scale)} if colon and file else {part: 1.0})
        except argparse.ArgumentTypeError:           # a colon inside the name
            result[part] = 1.0
    return result


def as_text(value) -> str:
    """The inverse of the above: a value as it would stand on the command line."""
    if isinstance(value, dict):
        return ",".join(f"{as_text(end)}:{count}" for end, count in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


# Options that there are twice, --steps-c and --steps-b: what they take, the defaults for Stages C and B, help. Defaults that
# depend on the weights are known when these are loaded; here they are text.
SAMPLING = dict(
    steps=(steps, "29; for v1 60", "12; for v1 8", "a number, more are slower and finer; or segments, 2/3:20,0:10 for 20 steps from noise level 1 down to 2/3 and 10 to 0; "
           "or the levels themselves, 1,0.6,0.3,0; or DEFAULT_STAGE_C_TIMESTEPS, 29 steps"),
    sampler=(str, "ddpm", "ddpm; for v1 multinomial", "ddpm, the original's; ddim, without chance; or dpm++, of second order, for which half as many steps do"),
    guidance=(several(number, 1, 2), "4; for v1 6", "1; for v1 2, for the tiny weights 4", "how strongly the text is followed: 1 is plain sampling, in half the time; raise it where the prompt is "
              "ignored, lower it where colours glare; two numbers, 8,2: at noise level 1 and at 0"),
    interval=(several(share, 2), (0.0, 1.0), (0.0, 1.0), "noise levels LOW,HIGH between which guidance acts; outside it costs nothing"),
    rescale=(share, 0.0, 0.0, "0 to 1: how far to undo the contrast that guidance adds"),
    eta=(share, 0.0, 0.0, "0 to 1: chance in ddim, 1 is as much as in ddpm"),
    t_start=(share, 1.0, 1.0, "noise level to start at"),
    t_end=(share, 0.0, 0.0, "noise level to stop at"))
SAMPLERS = dict(c=("ddpm", "ddim", "dpm++"), b=("ddpm", "ddim", "dpm++", "multinomial", "argmax", "quant"))
FILES = dict(prior="Stage C", decoder="Stage B", vqgan="Stage A", image_encoder="the image encoder",
             prior_text_encoder="Stage C's text encoder", text_encoder="Stage B's text encoder")      # parts that may come from elsewhere
DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16")
LATENT = ("semantic", "states", "size")          # what --save-latent writes: (1,16,h,w); where the noise stands (1,bytes); height and width
INPUTS = ("init", "mask", "reconstruct", "from_latent", "to_latent", "tensors")
# What is saved with a picture and taken over by --like; the former may differ from line to line of --prompt-file.
OF_A_PICTURE = ("prompt", "negative_prompt", "seed", "num_images", "width", "height", "init", "strength", "mask", "outpaint", "from_latent",
                "tensors", *(f"{name}_{stage}" for stage in "cb" for name in SAMPLING), "temperature_b")
OF_A_RUN = ("reconstruct", "interpolate_to", "to_seed", "frames", "grid", "to_latent", "weights", *FILES, "lora", "revision", "dtype", "int8", "tile")


def refuse(message: str) -> None:
    raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(usage='python sample.py --prompt "..." [options]', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse                             # argparse would print its usage, too: many lines for one mistake
    add = p.add_argument_group("picture").add_argument
    add("--prompt", metavar="TEXT", help="what to paint")
    add("--prompt-file", metavar="FILE", help="many prompts: a text file with one per line; or .jsonl, with an object per line of settings for it "
        'alone, named as options are: {"prompt": "a cat", "seed": 3, "guidance_c": 6}')
    add("--negative-prompt", metavar="TEXT", default="", help="what to steer away from (default: nothing); has no effect where guidance is 1")
    add("--num-images", metavar="N", type=whole(1), default=1, help="pictures of each prompt, each with its own seed (default: 1)")
    add("--seed", metavar="N", type=whole(0), help="the same seed and settings give the same picture; of several, the next has the next seed "
        "(default: drawn at random, and printed)")
    add("--width", metavar="PX", type=whole(64), help="any from 64 on; far from what the weights were trained on, pictures get worse (default: 128 for "
        "the tiny weights, 512 for v1, 1024 for others; with --init, its shape, outpainted if so, the shorter side that long)")
    add("--height", metavar="PX", type=whole(64), help="as --width")
    add("--like", metavar="PNG", help='all settings of this picture, made by this program; options beside it prevail, and "" undoes one: --mask ""')

    add = p.add_argument_group("from pictures and latents").add_argument
    add("--init", metavar="PICTURE", help="start from this one, in place of noise; without --prompt: variations of it")
    add("--strength", metavar="X", type=share, help="how much of --init is lost to noise: 0 nothing, 1 all of it (default: 0.6, with a mask 1, without a prompt 0.3)")
    add("--mask", metavar="PICTURE", help="as large as --init, white where it is to be painted anew, black where it stays")
    add("--outpaint", metavar="L,T,R,B", type=several(whole(0), 4), help="px to add to --init: left, top, right, bottom, and to paint, in place of --mask")
    add("--reconstruct", metavar="PICTURE", help="send this one through image encoder, Stages B and A; saves both, prints how close they are (PSNR)")
    add("--interpolate-to", metavar="TEXT", help="another prompt: --frames pictures on the way to it, as a strip, or moving where --out names a .gif")
    add("--to-seed", metavar="N", type=whole(0), help="interpolate the noise, too, from --seed to this one")
    add("--frames", metavar="N", type=whole(2), default=8, help="pictures of an interpolation, both ends included (default: 8)")
    add("--grid", metavar="X,X,...", type=several(number), help="one picture: a column for each of these --guidance-c, a row for each of --num-images seeds")
    add("--save-latent", action="store_true", help="also save the semantic latent, what Stage C made, beside the picture as .safetensors")
    add("--from-latent", metavar="FILE", help="start from such a file, without Stage C; the same --prompt without --seed gives the same picture")
    add("--to-latent", metavar="FILE", help="another such file: interpolate between the two")
    add("--tensors", metavar="FILE", help=".safetensors with any of prompt_c, negative_c, prompt_b, negative_b (embeddings in place of text, "
        "1 x tokens x width) and latents_c, latents_b (in place of the first noise, 1 x channels x height x width)")

    modes = "as for Stage C; and for v1, whose Stage B draws tokens: multinomial, by chance; argmax, the likeliest; quant, the nearest to their mean"
    for i, (stage, what) in enumerate((("c", "Stage C, which decides what is in the picture"), ("b", "Stage B, which adds detail"))):
        add = p.add_argument_group(f"sampling: {what}").add_argument
        for name, (kind, *defaults, text) in SAMPLING.items():
            default = defaults[i]
            add(f"--{name.replace('_', '-')}-{stage}", type=kind, default=None if isinstance(default, str) else default,
                metavar=name.upper().replace("_", "-"), choices=SAMPLERS[stage] if name == "sampler" else None,
                help=f"{text if stage == 'c' else modes if name == 'sampler' else 'as for Stage C'} (default: {as_text(default)})")
    add("--temperature-b", metavar="T", type=several(number, 1, 2), help="for v1: below 1 tokens are drawn from the likelier ones, which is cleaner and poorer; "
        "two numbers, 1,0.6: in the first step and the last (default: 1,0.6)")

    add = p.add_argument_group("weights and machine").add_argument
    add("--weights", metavar="NAME", help='"tiny" and "tiny-v1", which ship with the code; "v2", "v2-base" or "v2-aesthetic", 12 GB fetched once, half of it where '
        'float16 is wanted and offered; "v1", for 512 px; or a folder, of diffusers\' layout or of the original .pt files (default: tiny; v2 if a part is given below)')
    for part, what in FILES.items():
        add(f"--{part.replace('_', '-')}", metavar="PATH", help=f"{what} from this folder" + " or file" * ("text" not in part) + " instead")
    add("--lora", metavar="FILE:SCALE", type=loras, help="LoRA for Stage C, in any of the usual formats; several with commas between; SCALE is how "
        "strongly it counts (default: 1)")
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub in place of the tested ones; REPO=NAME for one repository")
    add("--offline", action="store_true", help="never use the network: what is not in the cache is an error")
    add("--batch", metavar="N", type=whole(1), default=1, help="pictures computed at a time: more is faster on a GPU, with other roundings (default: 1)")
    add("--low-memory", action="store_true", default=None, help="keep one part in memory at a time (default: if they do not all fit)")
    add("--offload", action="store_true", help="keep one part on the GPU at a time, the others in main memory")
    add("--compile", action="store_true", help="torch.compile for Stages B and C: a minute or more at the start, then faster on a GPU; on a CPU much the same")
    add("--int8", action="store_true", default=None, help="on a CPU: Stages B and C in 8 bits, 1.6 to 2 times as fast and a quarter of their memory; "
        "pictures differ a little from those in float32")
    add("--tile", metavar="N", type=whole(1), help="decode in tiles of so many latents, 4 px each (default: all at once if memory allows)")
    add("--device", help="cuda, cuda:1, cpu, mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="numbers: fp32 is exact, the others need half the memory (default: bf16 on a GPU, else fp32)")

    add = p.add_argument_group("output").add_argument
    add("--out", metavar="PATH", default="out", help="a .png file (.gif for an interpolation), or a folder, made if needed, where files are named "
        "after prompt and seed; with several pictures, FILE.png becomes FILE_SEED.png (default: out)")
    add("--overwrite", action="store_true", help="replace files that exist; without it nothing is ever overwritten")
    add("--no-metadata", action="store_true", help="save the picture alone, without the settings that made it")
    add("--preview-every", metavar="N", type=whole(1), help="every so many steps, write NAME_preview.png: roughly what it will become")
    return p


def as_options(settings: dict, allowed: tuple) -> list[str]:
    """{"seed": 3, "int8": True, ...} -> ["--seed=3", "--int8", ...]; what is not allowed, or None, is left out."""
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={as_text(value)}") for name, value in settings.items() if name in allowed and value is not None]


def parse_args(argv: list[str]) -> list[argparse.Namespace]:
    """-> the arguments, once for each prompt: most often a list of one. Raises ValueError for what makes no sense."""
    p = parser()
    args = typed = p.parse_args(argv)
    then = {}
    if typed.like is not None:
        from extras.metadata import read_settings
        settings = read_settings(typed.like)
        # A prompt file brings prompts of its own; and from a latent, the noise goes on from where it stood, not from a seed.
        settings |= {"prompt": None} if typed.prompt_file else {"seed": None} if typed.from_latent else {}
        argv = as_options(settings, OF_A_PICTURE + OF_A_RUN) + argv
        args = p.parse_args(argv)
        if isinstance(settings.get("hashes"), dict):
            then = {name: value for name, value in settings["hashes"].items()
                    if getattr(typed, name, None) is None and not (typed.weights and name in FILES)}
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given: choose one of them")
    lines = [("", {})] if args.prompt_file is None else prompt_lines(Path(args.prompt_file))
    jobs, seed = [], random.randrange(10 ** 6) if args.seed is None else args.seed
    for where, line in lines:
        try:
            unknown = [name for name in line if name not in OF_A_PICTURE]
            if unknown:
                raise ValueError(f"{', '.join(unknown)} cannot be set for one line; possible: {', '.join(OF_A_PICTURE)}")
            job = p.parse_args(argv + as_options(line, OF_A_PICTURE))
            job.made_from_then = then
            if "seed" not in line and (args.seed is not None or not job.from_latent or job.to_latent):
                job.seed, seed = seed, seed + job.num_images
            check(job)
        except ValueError as error:
            raise ValueError(where + str(error)) from None
        jobs.append(job)
    return jobs


def prompt_lines(path: Path) -> list[tuple[str, dict]]:
    """-> for each line that is not empty: where it stands, and its settings."""
    try:
        text = path.read_text(encoding="utf-8-sig")      # some editors begin with a mark of their own
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text file: {getattr(error, 'strerror', None) or error}") from None
    result = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        settings = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                settings = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {i}: this is no JSON ({error})") from None
        if not isinstance(settings, dict) or not isinstance(settings.get("prompt", ""), str):
            raise ValueError(f'{path}, line {i}: expected an object with one prompt, such as {{"prompt": "a cat", "seed": 3}}')
        result.append((f"{path}, line {i}: ", settings))
    if not result:
        raise ValueError(f"{path} holds no prompts: expected one per line")
    return result


SEVERAL_IN_ONE = ("reconstruct", "grid", "interpolate_to", "to_latent")         # these make one picture of several
APART = (("mask", "outpaint"), ("low_memory", "offload"), ("prompt_file", "reconstruct"), ("reconstruct", "init"), ("reconstruct", "from_latent"),
         ("grid", "from_latent"), ("interpolate_to", "from_latent"), ("save_latent", "from_latent"), ("tensors", "interpolate_to"),
         *itertools.combinations(SEVERAL_IN_ONE, 2), *itertools.product(("save_latent", "preview_every"), SEVERAL_IN_ONE))
NEEDS = (("mask", "init"), ("outpaint", "init"), ("strength", "init"), ("to_latent", "from_latent"), ("to_seed", "interpolate_to", "to_latent"))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not go together, or make no sense."""
    def option(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    def given(name: str) -> bool:
        return getattr(args, name) not in (None, "") and getattr(args, name) is not False           # 0 is given, too
    for name in OF_A_PICTURE + OF_A_RUN:
        if re.search("[\ud800-\udfff]", str(getattr(args, name))):
            raise ValueError(f"{option(name)} holds bytes that are no UTF-8 text: check the terminal's encoding")
    for names in APART:
        if all(map(given, names)):
            raise ValueError(f"{' and '.join(map(option, names))} do not go together: choose one of them")
    for name, *others in NEEDS:
        if given(name) and not any(map(given, others)):
            raise ValueError(f"{option(name)} needs {' or '.join(map(option, others))} beside it")
    args.prompt = args.prompt if (args.prompt or "").strip() else ""
    if not args.prompt and (given("interpolate_to") or not any(map(given, ("init", "reconstruct", "from_latent", "tensors")))):
        raise ValueError("the prompt is empty: say what to paint, for example --prompt \"a red apple on a blue background\"")
    last = 2 ** 32 - args.num_images
    for name in ("seed", "to_seed"):
        if given(name) and getattr(args, name) > last:
            raise ValueError(f"{option(name)} is {getattr(args, name)}, expected a number from 0 to {last}")
    if args.seed is None and args.num_images > 1:
        raise ValueError("--from-latent without --seed is one picture: for --num-images, give a --seed")
    for stage in "cb":
        levels, sampler, _, interval, _, eta, start, end = (getattr(args, f"{name}_{stage}") for name in SAMPLING)
        if eta and sampler != "ddim":
            raise ValueError(f"--eta-{stage} is for --sampler-{stage} ddim, not for {sampler or SAMPLERS[stage][0]}")
        if levels is not None and not isinstance(levels, int) and (end != 0 or start != 1 and not isinstance(levels, dict)):
            raise ValueError(f"--t-start-{stage} and --t-end-{stage} are for a number of steps: {as_text(levels)} says itself where to go")
        path = levels if isinstance(levels, tuple) else (start, *levels) if isinstance(levels, dict) else (start, end)
        if any(a <= b for a, b in itertools.pairwise(path)):
            raise ValueError(f"Stage {stage.upper()} is to visit the noise levels {as_text(path)}: expected each to be lower than the one before")
        if interval[0] > interval[1]:
            raise ValueError(f"--interval-{stage} is {as_text(interval)}, expected the lower noise level first")


# ----- files ----------------------------------------------------------------------------------------

def plan(jobs: list[argparse.Namespace]) -> list[tuple[argparse.Namespace, int | None, Path]]:
    """-> (arguments, seed, file) of each picture. Raises ValueError where nothing can be written, before anything is computed."""
    args, out, shots = jobs[0], Path(jobs[0].out), {}
    many = [(job, None if job.seed is None else job.seed + i) for job in jobs for i in range(1 if args.grid else job.num_images)]
    suffixes = (".png", ".gif") if args.interpolate_to or args.to_latent else (".png",)
    try:
        if any(len(os.fsencode(part)) > 230 for part in out.parts):      # file systems take 255 bytes, and some are added here and there
            raise OSError("the name is too long")
        named = out.suffix.lower() in suffixes and not out.is_dir()
        if not named and not out.is_dir() and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
            raise ValueError(f"--out {out} is not possible: pictures are saved as PNG, name a .png file or a folder")
        for job, seed in many:
            path = out if named else out / f"{slug(job)}.png"
            if seed is not None and (len(many) > 1 or not named):
                path = path.with_stem(f"{path.stem}_{seed}")
            there = [file for file in files_of(job, path) if file.exists()]
            if named and there and not args.overwrite:
                raise ValueError(f"{there[0]} exists already and will not be overwritten: choose another --out, remove it, or add --overwrite")
            shots[free(path, job, shots)] = job, seed
        # A file that is gone when closed: the test leaves nothing behind. Missing folders are made at the end.
        folder = path.parent
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {(error.strerror or str(error)).lower()}") from None
    return [(job, seed, path) for path, (job, seed) in shots.items()]


def slug(args: argparse.Namespace) -> str:
    """A file name's beginning: what the picture shows, or where it comes from."""
    source = args.prompt or Path(args.init or args.reconstruct or args.from_latent or "picture").stem
    return re.sub(r"\W+", "-", source.lower()).strip("-")[:50].strip("-") or "picture"


def files_of(args: argparse.Namespace, path: Path) -> list[Path]:
    """A picture's own file, and those beside it: latent and preview."""
    latent, preview = path.with_suffix(".safetensors"), path.with_name(f"{path.stem}_preview.png")
    return [path] + [latent] * args.save_latent + [preview] * bool(args.preview_every)


def free(path: Path, args: argparse.Namespace, taken=()) -> Path:
    """The path itself, or the first of name_2.png, name_3.png, ... that neither exists nor is taken."""
    numbered = itertools.chain([path], (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2)))
    return next(p for p in numbered if p not in taken and (args.overwrite or not any(file.exists() for file in files_of(args, p))))


def settings_of(args: argparse.Namespace, model, seed: int | None, image) -> dict:
    """All that is needed to make the picture again, and what made it. Warns if that is not what made the picture of --like."""
    import torch
    import transformers
    from loading.hub import hashes
    from wuerstchen import OWN
    files = {name: getattr(args, name) for name in INPUTS if getattr(args, name)} | {f"lora {Path(file).name}": file for file in model.loras}
    made_from = hashes(model.places) | {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()}
    changed = [name for name, value in made_from.items() if args.made_from_then.get(name, value) != value]
    if changed:
        warnings.warn(f"{', '.join(changed)} changed since {args.like} was made: so this is another picture")
    dtypes = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}
    values = {name: getattr(args, name) for name in OF_A_PICTURE + OF_A_RUN}
    values |= dict(seed=seed, dtype=dtypes[model.dtype], weights=args.weights or ("v2" if any(values[part] for part in FILES) else "tiny"))
    values |= {name: getattr(model, name) for name in OWN if values[name] is None}
    if not any(values[name] for name in SEVERAL_IN_ONE):
        values |= dict(width=image.width, height=image.height)
    for name, used in (("num_images", args.grid), ("frames", args.interpolate_to or args.to_latent)):       # others have a file and seed each
        values[name] = values[name] if used else None
    values = {name: as_text(value) if isinstance(value, (tuple, dict)) else value for name, value in values.items() if value not in (None, "")}
    return values | dict(device=model.device.type, batch=args.batch, compile=args.compile, hashes=made_from,
                         versions=dict(torch=torch.__version__, transformers=transformers.__version__), software="wuerstchen, sample.py")


def read_tensors(path: str, *needed: str) -> dict:
    """A .safetensors file as a dict of tensors. Raises ValueError if it cannot be read, or lacks what is needed."""
    from safetensors.torch import load_file
    try:
        tensors = load_file(path)
    except Exception as error:       # FileNotFoundError, SafetensorError, ...
        raise ValueError(f"{path} cannot be read as a .safetensors file: {str(error).splitlines()[0]}") from None
    if not set(needed) <= tensors.keys():
        raise ValueError(f"{path} holds {', '.join(tensors) or 'nothing'}, expected {', '.join(needed)}: is it a file written by --save-latent?")
    return tensors


# ----- painting -------------------------------------------------------------------------------------

def load_model(args: argparse.Namespace, jobs: list[argparse.Namespace]):
    """The pipeline, with no more of it than this run needs."""
    import torch
    from loading import hub
    from wuerstchen import Wuerstchen
    parts = hub.RECONSTRUCTION if args.reconstruct else hub.TEXT_TO_IMAGE
    if all(job.from_latent for job in jobs):
        parts = tuple(part for part in parts if not part.startswith("prior"))
    if any(job.init for job in jobs):
        parts = (*parts, "image_encoder")
    return Wuerstchen.load(args.weights, args.device, getattr(torch, DTYPES[args.dtype]) if args.dtype else None, parts=parts, offline=args.offline,
                           revision=args.revision, low_memory=args.low_memory, offload=args.offload, compile=args.compile,
                           int8=bool(args.int8), lora=args.lora,
                           **{part: getattr(args, part) for part in FILES if getattr(args, part)})


def options_of(args: argparse.Namespace) -> dict:
    """Arguments of Wuerstchen.__call__, but for prompts and noise. Raises ValueError for files that cannot be read."""
    from extras.images import enlarge, read_image, read_mask
    names = ("width", "height", "strength", "tile", "temperature_b", *(f"{name}_{stage}" for stage in "cb" for name in SAMPLING))
    options = {name: getattr(args, name) for name in names} | dict(progress=True)
    if args.init or args.reconstruct:
        options["init"] = read_image(args.init or args.reconstruct)                      # (3, H, W)
    if args.mask:
        options["mask"] = read_mask(args.mask)                                           # (H, W)
    elif args.outpaint:
        options["init"], options["mask"] = enlarge(options["init"], *args.outpaint)
    if args.from_latent:
        latent = read_tensors(args.from_latent, *LATENT)
        options["semantic"] = latent["semantic"]                                         # (1, 16, h, w)
        for name, side in zip(("height", "width"), latent["size"].tolist()):
            options[name] = options[name] or side
    if args.tensors:
        embeddings = read_tensors(args.tensors)
        if any(tensor.shape[:1] != (1,) for tensor in embeddings.values()):
            raise ValueError(f"{args.tensors} holds tensors for several pictures, expected 1 row of each: put them into files of their own")
        options |= {name: embeddings.pop(name) for name in ("latents_c", "latents_b") if name in embeddings}
        options |= dict(embeddings=embeddings) if embeddings else {}
    return options


def preview_to(args: argparse.Namespace, paths: tuple):
    """A preview for Wuerstchen.__call__ that writes NAME_preview.png for each picture, every so many steps."""
    from loading.files import write_atomically
    from wuerstchen import to_pil

    def preview(stage: str, step: int, images) -> None:
        for image, path in zip(to_pil(images), paths) if (step + 1) % args.preview_every == 0 else ():
            pixels = {"C": 128 / 3, "B": 4}[stage]       # per latent: a preview is as large as the picture, or nearly
            write_atomically(files_of(args, path)[-1], image.resize((round(image.width * pixels), round(image.height * pixels))).save)
    return preview


def paint(model, shots: list[tuple]):
    """Shots as plan gives them. Yields (arguments, seed, file, picture, latent to be saved or None) of each, batch by batch."""
    def alike(shot) -> list:                     # those of one kind can be computed together
        job = vars(shot[0]) | dict.fromkeys(("prompt", "negative_prompt", "num_images")) | dict(seed=shot[1] is None)
        return sorted((name, str(value)) for name, value in job.items())
    for _, group in itertools.groupby(shots, key=alike):
        group = list(group)
        for i in range(0, len(group), group[0][0].batch):
            batch = group[i:i + group[0][0].batch]
            yield from ((*shot, *result) for shot, result in zip(batch, paint_batch(model, *zip(*batch))))


def paint_batch(model, jobs: tuple, seeds: tuple, paths: tuple):
    """-> (picture, latent to be saved or None) of each."""
    import torch
    from diffusion import Noise
    args, options = jobs[0], options_of(jobs[0])
    options |= dict(prompt=[job.prompt for job in jobs], negative_prompt=[job.negative_prompt for job in jobs],
                    noise=Noise([seed or 0 for seed in seeds]))
    if "embeddings" in options:
        options["embeddings"] = {name: tensor.expand(len(jobs), *tensor.shape[1:]) for name, tensor in options["embeddings"].items()}
        options["prompt"] = options["prompt"] if args.prompt else None
    if args.preview_every:
        options["preview"] = preview_to(args, paths)
    if args.from_latent and seeds[0] is None:
        options["noise"].states = read_tensors(args.from_latent, *LATENT)["states"].expand(len(jobs), -1)
    if not args.save_latent:
        return [(image, None) for image in model(**options)]
    semantic = model(**options, output="semantic")
    states = options["noise"].states
    images = model(**options | dict(semantic=semantic, latents_c=None))
    return [(image, dict(semantic=latent.cpu().clone(), states=state.clone(), size=torch.tensor([image.height, image.width])))
            for image, latent, state in zip(images, semantic.split(1), states.split(1))]


def reconstruct(model, args: argparse.Namespace, seed: int):
    """The picture and what came back of it, side by side. Prints how much that is."""
    from extras.images import cover, psnr, strip
    from wuerstchen import to_pil
    from wuerstchen import latent_sizes
    options = options_of(args) | dict(strength=0.0, seed=seed, output="pt")
    result = model(args.prompt, args.negative_prompt, **options).cpu()
    _, _, height, width = result.shape
    original = cover(options["init"], height, width)[None]                               # (1, 3, height, width)
    h, w = latent_sizes(height, width)[0]
    print(f"PSNR {psnr(result, original):.2f} dB; {width} x {height} px became {w} x {h} positions of 16 numbers: "
          f"{math.sqrt(height * width / (h * w)):.1f} : 1 per side, {3 * height * width / (16 * h * w):.0f} : 1 in numbers")
    return strip([*to_pil(original), *to_pil(result)], ["original", "reconstruction"])


def interpolate(model, args: argparse.Namespace, seed: int, moving: bool):
    """One strip; moving: the list of frames."""
    from extras.images import strip
    options = options_of(args)
    ends = args.prompt, args.interpolate_to
    if args.to_latent:
        ends = options.pop("semantic"), read_tensors(args.to_latent, *LATENT)["semantic"]
        if ends[0].shape != ends[1].shape:
            raise ValueError(f"{args.from_latent} and {args.to_latent} are of pictures of different sizes, expected the same")
        options["prompt"] = args.prompt
    images = model.interpolate(*ends, args.frames, negative_prompt=args.negative_prompt, seed=seed, to_seed=args.to_seed, batch=args.batch, **options)
    return images if moving else strip(images)


def grid_of(model, args: argparse.Namespace, seed: int):
    """One picture of all seeds and guidance scales."""
    from extras.images import grid
    seeds, columns = range(seed, seed + args.num_images), []
    for scale in args.grid:
        job = argparse.Namespace(**vars(args) | dict(guidance_c=scale))
        columns.append([image for *_, image, _ in paint(model, [(job, seed, None) for seed in seeds])])
    images = [image for row in zip(*columns) for image in row]
    return grid(images, len(columns), [f"guidance {scale:g}" for scale in args.grid], [f"seed {seed}" for seed in seeds])


def several_in_one(model, shots: list[tuple]):
    """Yields as paint does."""
    for args, seed, path in shots:
        yield args, seed, path, (reconstruct(model, args, seed) if args.reconstruct else grid_of(model, args, seed) if args.grid else
                                 interpolate(model, args, seed, moving=path.suffix.lower() == ".gif")), None


def main(argv=None) -> None:
    """Exit code 0; 2 for a user's mistake, in one line; 130 after Ctrl-C. Our own bugs keep their traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return print(HOW_TO)
    shots, done = [], 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")       # its advice is for programmers
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print("warning:", " ".join(str(message).split()), file=sys.stderr)
            jobs = parse_args(argv)
            args, shots = jobs[0], plan(jobs)
            from loading.files import write_atomically
            from extras.images import save_gif
            from extras.metadata import save_png
            from safetensors.torch import save_file
            for job in jobs:
                options_of(job)              # reads all files: what is wrong with one is said before weights are loaded for a minute
            painting = several_in_one if any(getattr(args, name) for name in SEVERAL_IN_ONE) else paint
            model = load_model(args, jobs)
            for job, seed, path, image, latent in painting(model, shots):
                path = free(path, job) if path.exists() else path                # it may have come into being in the meantime
                settings = None if args.no_metadata else settings_of(job, model, seed, image)
                try:
                    save_png(image, path, settings, args.overwrite) if path.suffix.lower() == ".png" else save_gif(image, path, overwrite=args.overwrite)
                    if latent is not None:
                        write_atomically(files_of(job, path)[1], lambda temporary: save_file(latent, temporary))
                except OSError as error:
                    raise ValueError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from None
                print(path if seed is None else f"seed {seed}: {path}", flush=True)
                done += 1
    except KeyboardInterrupt:
        print(f"\nstopped: {done} of {len(shots)} pictures are finished, each in its file", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:       # OSError: files that may not be read
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "out of memory" in message or "allocate memory" in message:
            message = "memory ran out: paint fewer or smaller pictures at a time, or try --dtype bf16 or --low-memory"
        elif isinstance(error, RuntimeError):
            raise
        print("error:", message, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
