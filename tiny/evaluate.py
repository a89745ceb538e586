"""Measures how often a generated image shows what its prompt asks for: 256 fixed prompts, judged by judge.py.

  fixed_prompts -> 256 prompts -Wuerstchen-> images -Judge-> objects, positions, colour -> score

Half of the prompts name a pair of objects that no training image shows together (held-out pairs).
Out  fractions of correct images: background, single_object, pair_seen, pair_held_out (objects and relation), ...
Needs: numpy, pillow, torch; wuerstchen.py for sampling.

  python -m tiny.evaluate --real                                      # the judge's own accuracy
  python -m tiny.evaluate --weights tiny --out eval.json --grid eval.png
  python -m tiny.evaluate --weights tiny --prompts 32                 # only 32 prompts: faster, less exact
  python -m tiny.evaluate --weights tiny --seeds 4 --sharp            # also sharpness, and how much each stage loses
  python -m tiny.evaluate --lora runs/unicorn/lora.safetensors --object unicorn      # did the LoRA learn its object?
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tiny/evaluate.py` finds our modules

import argparse
import json

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from extras.cli import DTYPES, OF_STAGES, SAMPLERS, comma_list, loras, sampling_options, steps
from loading.errors import as_user_error, exit_on_user_error
from loading.files import check_output, write_atomically
from loading.options import BATCH, SEED, Number, Parser, integer
from tiny.judge import Judge, verdict
from training.scenes import (CANVAS, CAPTIONED, COLOURS, OBJECTS, RELATIONS, held_out, place_pair, place_single,
                             plain_caption, render)


# ----- prompts ---------------------------------------------------------------------------------------

def fixed_prompts(seed: int = 0) -> list[dict]:
    """Returns 256 prompts: 128 about pairs that are held out of training, 64 about other pairs, 64 about one object.

    Each prompt is a dict: prompt (the text), kind ("pair_held_out", "pair_seen", "single"), objects (names in
    CAPTIONED), relation (None for "single"), size ("small", "large" or None) and colour. The kinds alternate, so the
    first N prompts contain all kinds in the same shares. Colours and relations are balanced."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for i, a in enumerate(CAPTIONED) for b in CAPTIONED[i + 1:]]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    held = iter([pair for pair in pairs if held_out(*pair)])
    seen = iter([pair for pair in pairs if not held_out(*pair)])
    single = iter([(CAPTIONED[i],) for i in rng.permutation(len(CAPTIONED))])
    colours = np.concatenate([rng.permutation(list(COLOURS)) for _ in range(32)]).tolist()
    relations = np.concatenate([rng.permutation(RELATIONS) for _ in range(64)]).tolist()
    facts = []
    for i, (colour, relation) in enumerate(zip(colours, relations)):
        kind, source = [("pair_held_out", held), ("pair_seen", seen), ("pair_held_out", held),
                        ("single", single)][i % 4]
        fact = {"kind": kind, "objects": next(source), "relation": relation, "size": None, "colour": colour}
        if kind == "single":
            fact |= {"relation": None, "size": (None, "small", "large")[i // 4 % 3]}
        prompt = plain_caption(fact["objects"], colour, fact["relation"], fact["size"])
        facts.append({"prompt": prompt} | fact)
    return facts


def prompts_of(name: str, seed: int = 0) -> list[dict]:
    """Returns 64 prompts, see fixed_prompts, about object `name`: 24 only of it (8 colours x 3 sizes), 40 pairs."""
    rng = np.random.default_rng(seed)
    others = [other for other in rng.permutation(CAPTIONED).tolist() if other != name][:40]
    sizes, colours = [None, "small", "large"] * 8, sorted(COLOURS) * 8
    facts = [{"kind": "single", "objects": (name,), "relation": None, "size": size, "colour": colour}
             for size, colour in zip(sizes, colours)]
    facts += [{"kind": "pair", "objects": (name, other) if i % 2 else (other, name), "relation": RELATIONS[i // 2 % 4],
               "size": None, "colour": colour} for i, (other, colour) in enumerate(zip(others, colours))]
    return [{"prompt": plain_caption(f["objects"], f["colour"], f["relation"], f["size"])} | f
            for f in (facts[i] for i in rng.permutation(64))]


def real_image(fact: dict, rng: np.random.Generator) -> np.ndarray:
    """Draws an image (128,128,3) uint8 that shows what a prompt asks for. fact: the prompt, a dict of fixed_prompts."""
    if fact["relation"]:
        return render(place_pair(rng, *fact["objects"], fact["relation"], fact["colour"]))
    size = fact["size"] or ("small", "medium", "large")[rng.integers(3)]
    return render(place_single(rng, fact["objects"][0], size, fact["colour"]))


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds slight blur (0.8 px) and noise (sigma 10 of 255), like the faults of generated images."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    return np.clip(blurred + rng.normal(0, 10, blurred.shape), 0, 255).astype(np.uint8)


# ----- score -----------------------------------------------------------------------------------------

def tally(verdicts: list[dict], facts: list[dict]) -> dict:
    """Returns {name, such as "pair_seen": {"right": share of correct images, "n": number of images}}, without names
    with n = 0. verdicts, facts: for each image, the result of judge.verdict and the prompt's dict."""
    def of(kind, key):
        return [v[key] for v, f in zip(verdicts, facts) if f["kind"] == kind and v[key] is not None]
    figures = {"background": [v["background"] for v in verdicts],
               "single_object": of("single", "objects"), "single_size": of("single", "size")}
    for kind in ("pair_seen", "pair_held_out", "pair"):
        figures |= {kind: of(kind, "relation"), f"{kind}_objects": of(kind, "objects")}
    return {name: {"right": sum(v) / len(v), "n": len(v)} for name, v in figures.items() if v}


def score(images, facts: list[dict], judge: Judge | None = None) -> dict:
    """Judges whether images show what their prompts ask for. Returns the shares of correct images, see tally.
    images: n square uint8 RGB images; facts: their n prompts, as in fixed_prompts. Raises ValueError if n differs."""
    if len(images) != len(facts):
        raise ValueError(f"Got {len(images)} images for {len(facts)} prompts; give one per prompt.")
    judge = judge or Judge()
    return tally([verdict(*judge.find(image), fact) for image, fact in zip(images, facts)], facts)


def print_table(title: str, figures: dict) -> None:
    print(f"\n{title}")
    for name, figure in figures.items():
        print(f"  {name:24s}{figure['right']:7.1%}   of {figure['n']}")


def draw_grid(images, facts: list[dict], verdicts: list[dict], columns: int = 8) -> Image.Image:
    """Draws a grid of images, each above its prompt, which is green if the verdict has no False, else red."""
    width, height = CANVAS + 8, CANVAS + 44
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=10)
    for i, (image, fact, seen) in enumerate(zip(images, facts, verdicts)):
        x, y = i % columns * width + 4, i // columns * height + 4
        grid.paste(Image.fromarray(np.asarray(image)).resize((CANVAS, CANVAS)), (x, y))
        lines = [""]
        for word in fact["prompt"].split():
            fits = draw.textlength(f"{lines[-1]} {word}", font) <= CANVAS
            lines = lines[:-1] + [f"{lines[-1]} {word}".strip()] if fits else lines + [word]
        colour = "red" if False in seen.values() else "green"
        draw.text((x, y + CANVAS + 2), "\n".join(lines), fill=colour, font=font, spacing=1)
    return grid


# ----- script ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m tiny.evaluate")
    g = p.add_argument_group("what is judged")
    g.add_argument("--weights", default="tiny", help="a name or a folder, as for Wuerstchen.load (default: tiny)")
    g.add_argument("--lora", metavar="FILE:SCALE", type=loras, help="LoRA for Stage C, as for sample.py")
    g.add_argument("--object", metavar="NAME", help="64 prompts about this object instead of the 256 (--prompts); also "
                   "counts how often it is found, whatever else the image shows")
    g.add_argument("--real", action="store_true",
                   help="judge drawn scenes instead of samples: the judge's own accuracy, clean and degraded")
    g.add_argument("--prompts", type=integer(1, 256), default=256,
                   help="judge the first N of the 256 prompts; fewer is faster, kinds keep their shares")
    g.add_argument("--seeds", type=integer(1, 100), default=1, metavar="N",
                   help="judge N images of each prompt, each from its own noise")
    g.add_argument("--sharp", action="store_true", help="also measure how sharp the objects are, next to what Stage A "
                   "and Stage B make of true images: see tiny/sharpness.py")
    g = p.add_argument_group("sampling; the weights have defaults for all of it")
    for stage in "cb":
        g.add_argument(f"--steps-{stage}", type=steps,
                       help=f"sampling steps of Stage {stage.upper()}, in any form that sample.py takes "
                       "(default: the weights')")
        g.add_argument(f"--sampler-{stage}", choices=SAMPLERS[stage],
                       help=f"sampler of Stage {stage.upper()} (default: the weights')")
        g.add_argument(f"--guidance-{stage}", type=comma_list(Number(), 1, 2),
                       help=f"classifier-free guidance scale of Stage {stage.upper()}, or two for start and end; "
                       "higher follows the prompt more closely, varies less (default: the weights')")
    g.add_argument("--temperature-b", type=comma_list(Number(), 1, 2),
                   help="for v1: the temperature at which Stage B draws tokens, or those of its first and last step "
                        "(default: the weights')")
    g.add_argument("--int8", action="store_true", help="Stages B and C in 8 bits, as with sample.py --int8")
    g.add_argument("--dtype", choices=[*DTYPES, "auto"], help="precision, as with sample.py --dtype")
    g.add_argument("--batch", type=BATCH, default=32, help="images sampled at a time; less if memory runs out")
    g.add_argument("--seed", type=SEED, default=0,
                   help="seed of the noise (--real: of the layouts); the prompts stay the same")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="JSON file for figures, settings and what was found in each image")
    g.add_argument("--grid", help="PNG file for the first 64 images with their prompts")
    args = p.parse_args(argv)
    if args.object not in (None, *OBJECTS):
        p.error(f"--object {args.object} is unknown, expected one that the judge knows: {', '.join(OBJECTS)}.")
    for path, suffix in ((args.out, ".json"), (args.grid, ".png")):
        if path:
            check_output(path, suffix)
    return args


def load(args):
    """Loads the weights in args. Returns the model and a dict of the sampling options that the user gave."""
    from wuerstchen import Wuerstchen                    # imported here, so that --help and --real start fast
    model = Wuerstchen.load(args.weights, dtype=args.dtype, int8=args.int8, lora=args.lora)
    return model, sampling_options(argparse.Namespace(**dict.fromkeys(OF_STAGES) | vars(args)), model)


def sample(args, prompts: list[str]) -> list[Image.Image]:
    from tqdm import tqdm
    (model, options), images = load(args), []
    for start in tqdm(range(0, len(prompts), args.batch), desc="sampling", unit="batch"):
        # In each call, the model uses the seed `seed + i` for image i. So --batch does not change an image's seed.
        images += model(prompts[start:start + args.batch], seed=args.seed + start, **options)
    return images


def sharpness_of(args, run: dict, facts: list[dict], judge: Judge) -> dict:
    """Prints and returns the sharpness of objects: {title: result of sharpness.summary}. run: {title: images} to
    measure. Without --real, the result includes real images after Stage A and after Stage B, see sharpness.stages."""
    from tiny.sharpness import stages, summary
    (title, images), rows = *run.items(), {}
    if not args.real:
        asked, rng = facts[:len(facts) // args.seeds], np.random.default_rng(args.seed)
        model, options = load(args)
        true = np.stack([real_image(fact, rng) for fact in asked])
        options = {name: value for name, value in options.items() if not name.endswith("_c")}
        run = stages(model, asked, true, args.seed, args.batch, **options) | run
    for name, images in run.items():
        rows[name] = summary(images, [judge.find(image)[0] for image in images], facts[:len(images)])
    print(f"\n{title}: objects against their sprites{'PSNR':>12s}{'distance':>12s}")
    for name, row in rows.items():
        print(f"  {name:32s}{row['psnr']:11.2f} dB{row['distance']:11.4f}   of {row['objects']} that were found")
    return rows


def main(args):
    facts = (prompts_of(args.object) if args.object else fixed_prompts())[:args.prompts] * args.seeds
    if args.real:
        rng = np.random.default_rng(args.seed)
        clean = [real_image(fact, rng) for fact in facts]
        runs = {"real scenes": clean, "real scenes, degraded": [degrade(image, rng) for image in clean]}
    else:
        with exit_on_user_error(), as_user_error():      # reports wrong weights or options in one line
            runs = {args.weights: sample(args, [fact["prompt"] for fact in facts])}
    judge = Judge()
    # The settings omit the output paths, which do not influence figures and would reveal folders of this machine.
    report = {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "grid")}, "runs": []}
    for title, images in runs.items():
        seen = [judge.find(image) for image in images]
        verdicts = [verdict(found, colour, fact) for (found, colour), fact in zip(seen, facts)]
        figures = tally(verdicts, facts)
        if args.object:
            hits = [any(name == args.object for name, *_ in found) for found, _ in seen]
            figures = {f"{args.object} found": {"right": sum(hits) / len(hits), "n": len(hits)}} | figures
        if args.sharp:
            from tiny.sharpness import worst_tenths
            figures |= worst_tenths([found for found, _ in seen], facts)
        print_table(title, figures)
        judged = [fact | {"found": found, "found_colour": colour} | {"verdict": v}
                  for fact, (found, colour), v in zip(facts, seen, verdicts)]
        report["runs"].append({"title": title, "figures": figures, "pictures": judged})
        if args.sharp:
            report["runs"][-1]["sharpness"] = sharpness_of(args, {title: images}, facts, judge)
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"), overwrite=False)
    if args.grid:                                        # --real has two runs; the grid shows the last one
        grid = draw_grid(images[:64], facts, verdicts)
        write_atomically(args.grid, grid.save, overwrite=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_args())
