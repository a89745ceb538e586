"""Paints pictures from a prompt on the command line and saves them as PNG files.

  python sample.py --prompt "a red apple on a blue background"
  python sample.py --prompt "a cat left of a moon on a green background" --num-images 4 --seed 7 --out cats
  python sample.py --prompt "an astronaut riding a horse" --weights PATH --width 1536

This file is only the way in: arguments, checks, files. What happens between prompt and picture is in
wuerstchen.py. A picture carries the settings that made it, as PNG text:
  python -c "from PIL import Image; print(Image.open('FILE').text)"
Surprise: torch and transformers, which take seconds to import, come in only after the arguments have
been found to make sense.
Needs: what wuerstchen.py needs.
"""
import argparse
import itertools
import math
import os
import random
import re
import sys
import tempfile
import warnings
from pathlib import Path

HOW_TO = """usage:   python sample.py --prompt "..." [options]
example: python sample.py --prompt "a red apple on a blue background" --seed 1
All options: python sample.py --help"""


def fail(message):
    """Ends the program for a user's mistake: one line on stderr, exit code 2, no traceback."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


FILES = ("prior", "decoder", "vqgan", "image_encoder", "prior_text_encoder", "text_encoder")     # parts that may come from elsewhere


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail                               # argparse would print its usage, too: many lines for one mistake
    g = p.add_argument_group("picture")
    g.add_argument("--prompt", required=True, help="what to paint")
    g.add_argument("--negative-prompt", default="",
                   help="what to steer away from (default: nothing); has no effect where guidance is 1")
    g.add_argument("--num-images", type=positive, default=1, help="pictures to paint, all at once: fewer if memory runs out (default: 1)")
    g.add_argument("--seed", type=int, default=None,
                   help="0 to 2^32 - 1; the same seed and settings give the same picture, the next picture has the next "
                        "seed (default: drawn at random, and printed)")
    g.add_argument("--width", type=int, default=None, help="px, a multiple of 128 (default: 128 for the tiny weights, 1024 for others)")
    g.add_argument("--height", type=int, default=None, help="px, a multiple of 128; far from the default, pictures get worse")
    g = p.add_argument_group("sampling")
    g.add_argument("--steps-c", type=positive, default=29, help="steps of Stage C, which decides what is in the picture; more: slower and finer (default: 29)")
    g.add_argument("--steps-b", type=positive, default=12, help="steps of Stage B, which adds detail (default: 12)")
    g.add_argument("--guidance-c", type=float, default=4.0,
                   help="how strongly Stage C follows the prompt: 1 is plain sampling, in half the time; raise it where the "
                        "prompt is ignored, lower it where colours glare (default: 4)")
    g.add_argument("--guidance-b", type=float, default=None,
                   help="the same for Stage B, which rarely needs it unless it is small (default: 4 for the tiny weights, 1 for others)")
    g = p.add_argument_group("weights and machine")
    g.add_argument("--weights", default=None,
                   help="\"tiny\", which ships with the code; \"v2\", \"v2-base\" or \"v2-aesthetic\", 12 GB fetched once, half of it where float16 is wanted and offered; or a folder, of "
                        "diffusers' layout or of the original .pt files (default: tiny; v2 if a part is given below)")
    for part, what in (("prior", "Stage C"), ("decoder", "Stage B"), ("vqgan", "Stage A"), ("image-encoder", "the image encoder"),
                       ("prior-text-encoder", "Stage C's text encoder"), ("text-encoder", "Stage B's text encoder")):
        g.add_argument(f"--{part}", default=None, help=f"{what} from this folder" + (" or file" if "text" not in part else "") + " instead")
    g.add_argument("--revision", default=None, help="branch, tag or commit on the hub in place of the tested ones; REPO=NAME for one repository")
    g.add_argument("--offline", action="store_true", help="never use the network: what is not in the cache is an error")
    g.add_argument("--low-memory", action="store_true", default=None, help="keep one part in memory at a time (default: if they do not all fit)")
    g.add_argument("--device", default=None, help="cuda, cuda:1, cpu, mps (default: cuda where there is one, else cpu)")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default=None,
                   help="numbers to compute in: fp32 is exact, the others need half the memory (default: bf16 on a GPU, else fp32)")
    g = p.add_argument_group("output")
    g.add_argument("--out", default="out",
                   help="a .png file, or a folder, made if needed, where files are named after prompt and seed; with several "
                        "pictures, FILE.png becomes FILE_SEED.png. Nothing is overwritten (default: out)")
    args = p.parse_args(argv)

    if not args.prompt.strip():
        fail("the prompt is empty: say what to paint, for example --prompt \"a red apple on a blue background\"")
    for name in ("prompt", "negative_prompt", "weights", *FILES):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError:
            fail(f"--{name.replace('_', '-')} holds bytes that are no UTF-8 text: check the terminal's encoding")
    for name in ("height", "width"):
        side = getattr(args, name)
        if side is not None and (side < 128 or side % 128):      # as latent_sizes does, which cannot be imported without torch
            below = max(side // 128 * 128, 128)
            nearest = f"{below} or {below + 128}" if side > 128 else "128"
            fail(f"{name} {side} is not possible, pictures have sides that are multiples of 128 px: use {nearest}.")
    for name in ("guidance_c", "guidance_b"):
        if getattr(args, name) is not None and not math.isfinite(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number such as 1 or 4")
    last = 2 ** 32 - args.num_images
    if args.seed is None:
        args.seed = random.randrange(10 ** 6)
    elif not 0 <= args.seed <= last:
        fail(f"--seed is {args.seed}, expected a number from 0 to {last}")
    return args


# ----- files ----------------------------------------------------------------------------------------

def targets(args: argparse.Namespace) -> list[Path]:
    """Where each picture goes. Ends the program if that cannot be, while nothing has been computed yet."""
    seeds = range(args.seed, args.seed + args.num_images)
    out = Path(args.out)
    if any(len(os.fsencode(part)) > 240 for part in out.parts):      # file systems take 255 bytes, and write_atomically adds some
        fail(f"cannot write to {out}: the name is too long")
    try:
        if out.suffix.lower() == ".png" and not out.is_dir():
            paths = [out] if args.num_images == 1 else [out.with_stem(f"{out.stem}_{seed}") for seed in seeds]
            for path in paths:
                if path.exists():
                    fail(f"{path} exists already and will not be overwritten: choose another --out, or remove it")
        elif not out.is_dir() and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
            fail(f"--out {out} is not possible: pictures are saved as PNG, name a .png file or a folder")
        else:
            slug = re.sub(r"\W+", "-", args.prompt.lower()).strip("-")[:50].strip("-") or "picture"
            paths = [out / f"{slug}_{seed}.png" for seed in seeds]
        # Files that are gone when closed: the test leaves nothing behind. Missing folders are made at the end.
        folder = paths[0].parent
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fail(f"cannot write to {out}: {(error.strerror or str(error)).lower()}")
    return paths


def free(path: Path) -> Path:
    """The path itself, or the first of name_2.png, name_3.png, ... that does not exist."""
    numbered = (path.with_stem(f"{path.stem}_{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def save(image, path: Path, settings: dict) -> None:
    """A PIL image -> a PNG file with the settings as text, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo
    from files import write_atomically
    text = PngInfo()
    for name, value in settings.items():
        text.add_text(name, str(value))
    write_atomically(path, lambda temporary: image.save(temporary, pnginfo=text))


# ----- the program ----------------------------------------------------------------------------------

def paint(args: argparse.Namespace) -> tuple[list, dict]:
    """-> PIL images, and the settings they share. Ends the program for weights, sizes and devices that will not do."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")       # its advice is for programmers
    import torch
    from wuerstchen import Wuerstchen
    try:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
        files = {part: getattr(args, part) for part in FILES if getattr(args, part)}
        model = Wuerstchen.load(args.weights, args.device, dtype, offline=args.offline, revision=args.revision,
                                low_memory=args.low_memory, **files)
        images = model(args.prompt, args.negative_prompt, seed=args.seed, num_images=args.num_images,
                       steps_c=args.steps_c, steps_b=args.steps_b, guidance_c=args.guidance_c, guidance_b=args.guidance_b,
                       width=args.width, height=args.height, progress=True)
    except (ValueError, OSError) as error:      # OSError: files that may not be read
        fail(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        fail("memory ran out: paint fewer or smaller pictures, or try --dtype bf16")
    return images, dict(prompt=args.prompt, negative_prompt=args.negative_prompt, weights=args.weights or ("v2" if files else "tiny"),
                        steps_c=args.steps_c, steps_b=args.steps_b, guidance_c=args.guidance_c,
                        guidance_b=model.guidance_b if args.guidance_b is None else args.guidance_b,
                        width=images[0].width, height=images[0].height, device=model.device,
                        dtype=str(model.dtype).removeprefix("torch."), software="wuerstchen, sample.py")


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(HOW_TO)
        return
    args = parse_args(argv)
    paths = targets(args)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print("warning:", " ".join(str(message).split()), file=sys.stderr)
        images, settings = paint(args)
    for i, (image, path) in enumerate(zip(images, paths)):
        path = free(path)       # it may have come into being in the meantime
        try:
            save(image, path, {**settings, "seed": args.seed + i})
        except OSError as error:
            fail(f"{path} cannot be written: {(error.strerror or str(error)).lower()}")
        print(f"seed {args.seed + i}: {path}")


if __name__ == "__main__":
    main()
