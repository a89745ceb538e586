"""The fixed judge: how often does a generated picture show what its prompt asked for?

  fixed_prompts -> 256 prompts -Wuerstchen-> pictures -Judge-> objects, places, colour -> score

The world of scenes.py is known exactly, so no classifier is trained: the judge knows every sprite and
asks which sprite, at which size and place, explains the picture best (maximum likelihood for
Gaussian errors). Half of the prompts name a pair of objects that no training picture shows.
In   pictures, uint8 RGB of any square size, and the facts of their prompts
Out  fractions: background, single_object, pair_seen, pair_held_out (both objects and relation), ...
Surprise: a picture that shows more than its prompt says is wrong, too.
The judge is right on 512 of 512 real scenes (two seeds), and on 511 of them blurred by 0.8 px with
noise of sigma 10/255. --real measures 256 of each again.
Needs: torch, numpy, pillow, scenes.py, sample.py; wuerstchen.py for sampling.

  python -m tiny.evaluate --real                                      # the judge's own accuracy
  python -m tiny.evaluate --weights tiny --out eval.json --grid eval.png
  python -m tiny.evaluate --weights tiny --prompts 32                 # a quick look
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sample import SAMPLERS, number, several, steps
from training.scenes import (CANVAS, CAPTIONED, COLOURS, OBJECTS, RELATIONS, held_out, place_pair,
                    place_single, plain_caption, render, sprite)

SIDE = 64                      # px at which the judge compares: half of a scene
# Sizes the judge tries, px of SIDE: steps of about 11 %, so a true size is off by 6 % at most.
SIZES = (14, 16, 18, 20, 22, 24, 27, 30, 33, 37, 41, 45)
SLACK = 1                      # px of SIDE by which two found boxes may overlap
BACKGROUND_TOLERANCE = 40      # RGB distance; the two nearest of COLOURS are 84 apart
MIN_EXPLAINED = 0.25           # see Judge.find
SMALL_UP_TO, LARGE_FROM = 51, 71       # px of a scene; between scenes.py's size classes


# ---- the prompts -----------------------------------------------------------------------------

def fixed_prompts(seed: int = 0) -> list[dict]:
    """256 prompts in plain words: 128 held-out pairs, 64 seen pairs, each captioned object alone.

    Returns dicts of prompt, kind ("pair_held_out", "pair_seen", "single"), objects, relation,
    size ("small", "large" or None) and colour.  The kinds alternate, so that the first N prompts
    are a fair sample; colours and relations are balanced.
    """
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
        kind, source = [("pair_held_out", held), ("pair_seen", seen),
                        ("pair_held_out", held), ("single", single)][i % 4]
        fact = {"kind": kind, "objects": next(source), "relation": relation, "size": None,
                "colour": colour}
        if kind == "single":
            fact |= {"relation": None, "size": (None, "small", "large")[i // 4 % 3]}
        prompt = plain_caption(fact["objects"], colour, fact["relation"], fact["size"])
        facts.append({"prompt": prompt} | fact)
    return facts


def real_picture(fact: dict, rng: np.random.Generator) -> np.ndarray:
    """A true picture of a prompt's facts, (128,128,3) uint8: what a perfect model would draw."""
    if fact["relation"]:
        return render(place_pair(rng, *fact["objects"], fact["relation"], fact["colour"]))
    size = fact["size"] or ("small", "medium", "large")[rng.integers(3)]
    return render(place_single(rng, fact["objects"][0], size, fact["colour"]))


# ---- the judge -------------------------------------------------------------------------------

class Judge:
    """Finds sprites in a picture by maximum likelihood.

    With D = picture - background, placing a sprite adds R = alpha (T - background), T its colours.
    It lowers the squared error by   |D|^2 - |D - R|^2 = 2 sum(D R) - sum(R^2),   its gain. The
    highest gain over all sprites, sizes and places is the best explanation. Split by R = P - alpha
    background with P = alpha T, only P and alpha have to be prepared, whatever the background:
      sum(D R) = sum(D P) - background sum(D alpha)           correlations, all places at once: FFT
      sum(R R) = sum(P P) - 2 background sum(P alpha) + background^2 sum(alpha alpha)
    Objects in a scene do not overlap, so that one search finds them all: the best explanation, then
    the best one beside it, and so on.
    """
    def __init__(self, objects=OBJECTS, device="cpu"):
        import torch                          # here, so that --help answers at once
        self.torch, self.device, self.objects = torch, device, list(objects)
        self.fft, self.P_P, self.P_alpha, self.alpha_alpha = [], [], [], []    # per size
        for k in SIZES:
            template = torch.zeros(len(objects), 4, SIDE, SIDE)     # P (3 channels) and alpha
            for n, name in enumerate(objects):
                template[n, :, :k, :k] = torch.from_numpy(half_size_sprite(name, k))
            P, alpha = template.to(device).split([3, 1], dim=1)     # (N,3,64,64), (N,1,64,64)
            self.P_P.append(P.square().sum((1, 2, 3)))              # (N,)
            self.P_alpha.append((P * alpha).sum((2, 3)))            # (N, 3)
            self.alpha_alpha.append(alpha.square().sum((1, 2, 3)))  # (N,)
            F = torch.fft.rfft2(torch.cat([P, alpha], dim=1))       # (N, 4, 64, 33)
            self.fft.append(F.conj().resolve_conj())                # correlation = conjugate

    def find(self, image, most: int = 3):
        """What a picture shows.

        image uint8 RGB, square: array or PIL image.
        Returns (found, colour).  found: up to `most` of (name, size, (x, y), explained), highest
        gain first, in px of a 128 px scene; explained: gain / sum(R R), 1 for a perfect match.
        colour: name of the background, or None if it is near none of COLOURS.
        """
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.dtype != np.uint8:
            raise ValueError(f"The judge got {pixels.dtype} of shape {pixels.shape}, expected a "
                             f"square RGB picture, (H,H,3) uint8.")
        pixels = Image.fromarray(pixels).resize((SIDE, SIDE), Image.BOX)
        pixels = np.asarray(pixels, np.float32) / 255               # (64, 64, 3)
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        background = np.median(rim, axis=0)                         # (3,)
        distance = {name: np.linalg.norm(background * 255 - rgb) for name, rgb in COLOURS.items()}
        colour = min(distance, key=distance.get)
        if distance[colour] > BACKGROUND_TOLERANCE:
            colour = None

        gain, sprite_at, explained = self._search(pixels, background)
        # Measured on 200 drawn scenes: true sprites explain 48 % or more of their own energy (less
        # between two SIZES), degraded ones 44 %; bare background gave no positive gain at
        # all. Stains in a bad picture lie between; below a quarter they count as nothing.
        gain = np.where(explained >= MIN_EXPLAINED, gain, -np.inf)
        found = []
        while len(found) < most and gain.max() > -np.inf:
            s, y, x = (int(i) for i in np.unravel_index(gain.argmax(), gain.shape))
            k, name = SIZES[s], self.objects[sprite_at[s, y, x]]
            found.append((name, 2 * k, (2 * x + k, 2 * y + k), float(explained[s, y, x])))
            for s2, k2 in enumerate(SIZES):      # what overlaps its box is explained already
                top, left = max(0, y - k2 + 1 + SLACK), max(0, x - k2 + 1 + SLACK)
                gain[s2, top:y + k - SLACK, left:x + k - SLACK] = -np.inf
        return found, colour

    def _search(self, pixels, background):
        """Best sprite for each size and place: its gain, its index in self.objects, its explained
        share; each (S,64,64), place = top left corner of the box, gain -inf where it sticks out."""
        torch = self.torch
        background = torch.from_numpy(background).to(self.device)                    # (3,)
        D = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1) - background[:, None, None]
        F = torch.fft.rfft2(D)                                                       # (3, 64, 33)
        F = torch.cat([F, -(background[:, None, None] * F).sum(0, keepdim=True)])    # (4, 64, 33)
        best = torch.full((3, len(SIZES), SIDE, SIDE), -torch.inf)
        for s, k in enumerate(SIZES):
            # An FFT correlation wraps around the edges, but not at the places kept here, where the
            # sprite is wholly inside: no padding is needed.
            inside = SIDE - k + 1
            D_R = torch.fft.irfft2((self.fft[s] * F).sum(1))[:, :inside, :inside]   # (N,65-k,65-k)
            R_R = (self.P_P[s] - 2 * self.P_alpha[s] @ background
                   + background.square().sum() * self.alpha_alpha[s])                # (N,)
            gain, n = (2 * D_R - R_R[:, None, None]).max(dim=0)                      # (65-k, 65-k)
            best[:, s, :inside, :inside] = torch.stack([gain, n, gain / R_R[n]]).cpu()
        gain, n, explained = best.numpy()
        return gain, np.where(gain > -np.inf, n, 0).astype(int), explained


def half_size_sprite(name: str, k: int) -> np.ndarray:
    """P = alpha T (3 channels) and alpha of a sprite of 2k px, halved as the pictures are:
    (4,k,k) float32 in 0..1."""
    colour, through = sprite(name, 2 * k)                           # (2k, 2k, 3) uint8
    both = np.concatenate([colour, 255 - through[..., :1]], axis=2) / np.float32(255)
    return both.reshape(k, 2, k, 2, 4).mean(axis=(1, 3)).transpose(2, 0, 1)


def relation_of(first, second) -> str:
    """Relation from one center (x, y) to another, along the axis of their larger distance."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def verdict(found, colour: str | None, fact: dict) -> dict:
    """What of a prompt came true: background, objects (the right ones and no other), relation
    (True only if the objects are right), size (None if the prompt names none)."""
    objects = sorted(name for name, *_ in found) == sorted(fact["objects"])
    relation = size = None
    if fact["relation"]:
        center = {name: place for name, _, place, _ in found}
        relation = objects and fact["relation"] == relation_of(*map(center.get, fact["objects"]))
    if fact["size"]:
        px = found[0][1] if objects else None
        size = objects and (px <= SMALL_UP_TO if fact["size"] == "small" else px >= LARGE_FROM)
    return {"background": colour == fact["colour"], "objects": objects, "relation": relation,
            "size": size}


def tally(verdicts: list[dict], facts: list[dict]) -> dict:
    """{figure: {"right": fraction, "n": pictures}}; a figure without pictures is left out."""
    def of(kind, key):
        return [v[key] for v, f in zip(verdicts, facts) if f["kind"] == kind and v[key] is not None]
    figures = {
        "background": [v["background"] for v in verdicts],
        "single_object": of("single", "objects"),
        "single_size": of("single", "size"),
        "pair_seen": of("pair_seen", "relation"),
        "pair_seen_objects": of("pair_seen", "objects"),
        "pair_held_out": of("pair_held_out", "relation"),
        "pair_held_out_objects": of("pair_held_out", "objects"),
    }
    return {name: {"right": sum(v) / len(v), "n": len(v)} for name, v in figures.items() if v}


def score(images, facts: list[dict], judge: Judge | None = None) -> dict:
    """Judges pictures by the facts of their prompts, see tally() for the figures.

    images n square uint8 RGB pictures; facts n dicts of fixed_prompts().
    """
    if len(images) != len(facts):
        raise ValueError(f"Got {len(images)} images for {len(facts)} prompts; give one per prompt.")
    judge = judge or Judge()
    return tally([verdict(*judge.find(image), fact) for image, fact in zip(images, facts)], facts)


# ---- script ----------------------------------------------------------------------------------

def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slight blur (0.8 px) and noise (sigma 10 of 255), as by a fair but imperfect model."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    return np.clip(blurred + rng.normal(0, 10, blurred.shape), 0, 255).astype(np.uint8)


def print_table(title: str, figures: dict) -> None:
    print(f"\n{title}")
    for name, figure in figures.items():
        print(f"  {name:24s}{figure['right']:7.1%}   of {figure['n']}")


def draw_grid(images, facts: list[dict], verdicts: list[dict], columns: int = 8) -> Image.Image:
    """Pictures with their prompts below, in green if all of the prompt came true, else in red."""
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
        right = all(value is not False for value in seen.values())
        draw.text((x, y + CANVAS + 2), "\n".join(lines), fill="green" if right else "red",
                  font=font, spacing=1)
    return grid


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is judged")
    g.add_argument("--weights", default="tiny", help="weights that Wuerstchen.load understands: a name or a folder")
    g.add_argument("--real", action="store_true",
                   help="judge drawn scenes instead of samples: the judge's own accuracy, clean and degraded")
    g.add_argument("--prompts", type=int, default=256,
                   help="judge the first N of the 256 prompts; fewer is faster, kinds keep their shares")
    g = p.add_argument_group("sampling; what is not given is left to Wuerstchen")
    for stage in "cb":
        g.add_argument(f"--steps-{stage}", type=steps,
                       help=f"sampling steps of Stage {stage.upper()}, in any form that sample.py takes")
        g.add_argument(f"--sampler-{stage}", choices=SAMPLERS[stage], help=f"sampler of Stage {stage.upper()}")
        g.add_argument(f"--guidance-{stage}", type=several(number, 1, 2),
                       help=f"classifier-free guidance scale of Stage {stage.upper()}, or two for start and end; "
                       "higher follows the prompt more closely, varies less")
    g.add_argument("--temperature-b", type=several(number, 1, 2),
                   help="for v1: the temperature at which Stage B draws tokens, or those of its first and last step")
    g.add_argument("--int8", action="store_true", help="Stages B and C in 8 bits, as sample.py --int8 has them")
    g.add_argument("--batch", type=int, default=32, help="pictures sampled at a time; less if memory runs out")
    g.add_argument("--seed", type=int, default=0,
                   help="seed of the noise (--real: of the layouts); the prompts stay the same")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="JSON file for figures, settings and what was found in each picture")
    g.add_argument("--grid", help="PNG file for the first 64 pictures with their prompts")
    args = p.parse_args(argv)
    if not 1 <= args.prompts <= 256:
        p.error(f"--prompts is {args.prompts}, expected 1 to 256.")
    for path in filter(None, (args.out, args.grid)):
        if Path(path).exists():
            p.error(f"{path} exists already and will not be overwritten: choose another name, or remove it.")
    return args


def sample(args, prompts: list[str]) -> list[Image.Image]:
    from tqdm import tqdm                     # here, so that --help and --real start at once
    from wuerstchen import Wuerstchen
    model = Wuerstchen.load(args.weights, int8=args.int8)
    names = [f"{name}_{stage}" for name in ("steps", "sampler", "guidance") for stage in "cb"] + ["temperature_b"]
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    images = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="sampling", unit="batch"):
        # Picture i of a call starts from the noise of seed + i, so picture n of all gets seed + n:
        # the same one whatever --batch is.
        images += model(prompts[start:start + args.batch], seed=args.seed + start, **options)
    return images


def main(args):
    from loading.files import write_atomically
    facts = fixed_prompts()[:args.prompts]
    if args.real:
        rng = np.random.default_rng(args.seed)
        clean = [real_picture(fact, rng) for fact in facts]
        runs = {"real scenes": clean, "real scenes, degraded": [degrade(p, rng) for p in clean]}
    else:
        try:
            runs = {args.weights: sample(args, [fact["prompt"] for fact in facts])}
        except (ValueError, OSError) as error:       # weights that are none, settings that do not fit them
            sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    judge = Judge()
    # What decides the figures; where they are written does not, and a path would tell of a machine.
    report = {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "grid")}, "runs": []}
    for title, images in runs.items():
        seen = [judge.find(image) for image in images]
        verdicts = [verdict(found, colour, fact) for (found, colour), fact in zip(seen, facts)]
        figures = tally(verdicts, facts)
        print_table(title, figures)
        pictures = [fact | {"found": found, "found_colour": colour} | {"verdict": v}
                    for fact, (found, colour), v in zip(facts, seen, verdicts)]
        report["runs"].append({"title": title, "figures": figures, "pictures": pictures})
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    if args.grid:                             # of the last run
        grid = draw_grid(images[:64], facts, verdicts)
        write_atomically(args.grid, grid.save)


if __name__ == "__main__":
    main(parse_args())
