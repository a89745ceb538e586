"""Draws emoji scenes, captioned images for training. Nothing is downloaded.

  (seed, i) -random_scene-> Scene -render-> (128,128,3) uint8     the image
                                  -caption-> "a cat left of a red apple on a blue background"

A scene is one or two emojis on a plain background. These scenes are simple enough to be learned in an hour and rich
enough to test whether a model understands objects, sizes, colours and relations. About a tenth of all pairs of objects
is held out of training: a model that generates these pairs correctly has learned to compose, not to remember.
  80 objects     64 captioned: Stage C learns their names. 16 uncaptioned: only Stages A and B are trained on them, so
                 their names are new words for a later fine-tuning.
  3 sizes        SIZES, with edges at multiples of GRID px. Stage B has to remember each object at each size and shift:
                 the fewer there are, the sharper are the images of a small Stage B.
  8 colours      of the background, exact RGB values in COLOURS
The varied scenes, from which tiny/train.sh starts, show 48 more objects, in all sizes of SIZE_CLASSES, at any place.
Out  EmojiScenes.batch(start, n) -> images (n,128,128,3) uint8, RGB; captions. In data.py "scenes:OBJECTS:NUMBER:SEED".
Note: image i depends only on (seed, i), so the set is endless, and a training that resumes sees the same images.
Emojis: Noto Color Emoji, assets/OFL.txt, sheet made by tools/make_sprites.py.  Needs: numpy, pillow.
"""
import difflib
import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[1] / "assets"
CANVAS, CELL, COLUMNS = 128, 80, 16       # side of a scene and of a sheet's cell in px; the sprite sheet's columns

# The colours are muted, so that a red apple is visible on red. Any two are at least 84 apart in RGB space.
COLOURS = {"white": (245, 245, 245), "black": (26, 26, 30), "red": (176, 44, 52), "orange": (236, 142, 62),
           "yellow": (250, 222, 110), "green": (84, 158, 92), "blue": (72, 122, 204), "purple": (146, 90, 178)}
_TABLE = json.loads((ASSETS / "emoji.json").read_text())     # one entry per cell of the sprite sheet, in order
CELLS = [row["name"] for row in _TABLE]
CAPTIONED = [row["name"] for row in _TABLE if row["set"] == "captioned"]
UNCAPTIONED = [row["name"] for row in _TABLE if row["set"] == "uncaptioned"]
OBJECTS = CAPTIONED + UNCAPTIONED         # the other names in CELLS are only in varied scenes

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SIZES = {"small": 40, "medium": 56, "large": 80}    # px of a single object; captions never call an object medium
PAIR_SIZE = 56
GRID = 8           # px: a position of Stage B's finest level
MARGIN = 2         # px at each edge of a scene that always show only the background
PAIR_STRAY = 5     # px that a pair's centers may be off the middle: vertically for "left of", horizontally for "above"

# Varied scenes: {size class: (smallest size, largest size, largest distance of the center from the middle) in px}.
# Sizes are even, which halves the number of cached sprites. The gaps make "small" and "large" unambiguous.
SIZE_CLASSES = {"small": (40, 46, 10), "medium": (56, 62, 8), "large": (80, 88, 6)}
PAIR_SIZES = (50, 58)
STRAY = 12         # like the distances in SIZE_CLASSES, for scenes that are not varied


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background. relation: position of objects[0] relative to objects[1], as in RELATIONS."""
    objects: tuple[str, ...]
    sizes: tuple[int, ...]                    # side, in px, of the square that each object fills
    centers: tuple[tuple[int, int], ...]      # (x, y) in px, y points down
    colour: str
    relation: str | None = None

    def __post_init__(self):
        for name in self.objects:
            check_name(name, CELLS, "object")
        check_name(self.colour, COLOURS, "colour")
        if self.relation is not None:
            check_name(self.relation, RELATIONS, "relation")

    @property
    def size_class(self) -> str | None:
        """Returns "small", "medium" or "large" for a scene of one object, None for a scene of two."""
        if len(self.objects) == 2:
            return None
        return next((name for name, (low, high, _) in SIZE_CLASSES.items() if low <= self.sizes[0] <= high), "medium")


def check_name(name: str, known: Sequence[str], kind: str) -> None:
    """Raises ValueError, which suggests similar names, if `name`, a `kind` such as "colour", is not one of `known`."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3) or list(known)[:3]
        raise ValueError(f"unknown {kind} {name!r}, expected for example {', '.join(near)}")


@functools.cache
def held_out(a: str, b: str) -> bool:
    """Returns whether training never shows the objects a and b together, which holds for a tenth of all pairs. A
    checksum of the two names decides, so the held-out pairs are the same for every seed, version and machine."""
    return zlib.crc32(f"{min(a, b)}|{max(a, b)}".encode()) % 10 == 0


# ----- drawing scenes at random --------------------------------------------------------------------------------------

def random_scene(rng: np.random.Generator, objects: Sequence[str] = CAPTIONED, held_out_pairs: bool = False,
                 varied: bool = False) -> Scene:
    """Draws a scene with one of `objects` (in 40 % of all cases) or with two different ones whose pair is not held out.
    held_out_pairs=True draws a test scene: always two objects, whose pair is held out. varied: see the file's top."""
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    if not held_out_pairs and (len(objects) == 1 or rng.random() < 0.4):
        name = objects[rng.integers(len(objects))]
        return place_single(rng, name, list(SIZES)[rng.integers(len(SIZES))], colour, varied)
    a, b = _draw_pair(rng, objects, held_out_pairs)
    return place_pair(rng, a, b, RELATIONS[rng.integers(len(RELATIONS))], colour, varied)


def _draw_pair(rng, objects, held_out_pairs) -> tuple[str, str]:
    for _ in range(10_000):                   # about 10 draws are needed for a held-out pair, fewer for others
        a, b = (objects[i] for i in rng.integers(len(objects), size=2))
        if a != b and held_out(a, b) == held_out_pairs:
            return a, b
    kind = "held-out" if held_out_pairs else "training"
    raise ValueError(f"no {kind} pair among these {len(objects)} objects: give more objects")


def _near_middle(rng, size: int, stray: int, varied: bool) -> list[int]:
    # Returns random x and y of a center, at most `stray` px off the middle. Unless varied, the edges are on the grid.
    if varied:
        return (CANVAS // 2 + rng.integers(-stray, stray + 1, size=2)).tolist()
    centers = [edge + size // 2 for edge in range(0, CANVAS, GRID) if abs(edge + size // 2 - CANVAS // 2) <= stray]
    return [centers[rng.integers(len(centers))] for _ in "xy"]


def place_single(rng: np.random.Generator, name: str, size_class: str, colour: str, varied: bool = False) -> Scene:
    """Draws a scene of the object `name`, at a random place near the middle. varied: the size is random as well."""
    check_name(size_class, list(SIZES), "size class")
    low, high, stray = SIZE_CLASSES[size_class] if varied else (SIZES[size_class], SIZES[size_class], STRAY)
    size = int(rng.integers(low // 2, high // 2 + 1)) * 2
    return Scene((name,), (size,), (tuple(_near_middle(rng, size, stray, varied)),), colour)


def place_pair(rng: np.random.Generator, a: str, b: str, relation: str, colour: str, varied: bool = False) -> Scene:
    """Draws a scene "a RELATION b". Each object is in its own half of the image, so they cannot overlap."""
    low, high, margin = (*PAIR_SIZES, MARGIN) if varied else (PAIR_SIZE, PAIR_SIZE, GRID)
    sizes = (rng.integers(low // 2, high // 2 + 1, size=2) * 2).tolist()
    half = CANVAS // 2
    # Along the relation's axis (x for "left of"), an object is anywhere in its half; along the other, near the middle.
    first = int(rng.integers(margin + sizes[0] // 2, half - sizes[0] // 2 + 1))
    second = int(rng.integers(half + sizes[1] // 2, CANVAS - margin - sizes[1] // 2 + 1))
    across = _near_middle(rng, PAIR_SIZE, PAIR_STRAY, varied)
    if relation in ("right of", "below"):     # mirrors both centers, so that a is in the right or lower half
        first, second = CANVAS - first, CANVAS - second
    centers = ((first, across[0]), (second, across[1]))
    if relation in ("above", "below"):
        centers = tuple((x, y) for y, x in centers)
    return Scene((a, b), tuple(sizes), centers, colour, relation)


# ----- image ---------------------------------------------------------------------------------------------------------

@functools.cache
def _sheet() -> Image.Image:
    # "RGBa" is RGB multiplied by alpha. So when resizing averages pixels, the hidden colour of transparent pixels does
    # not count.
    return Image.open(ASSETS / "emoji.png").convert("RGBa")


@functools.cache
def sprite(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two arrays (size,size,3) uint8 of an object's image: its colours times alpha / 255, and 255 - alpha."""
    check_name(name, CELLS, "object")
    column, row = CELLS.index(name) % COLUMNS * CELL, CELLS.index(name) // COLUMNS * CELL
    cell = _sheet().crop((column, row, column + CELL, row + CELL))  # crop first: resizing would blend adjacent cells
    rgba = np.array(cell.resize((size, size), Image.LANCZOS))
    alpha = rgba[..., 3:]
    # Lanczos overshoots at edges. Clipping colours to alpha keeps the sum in render() within 255.
    return np.minimum(rgba[..., :3], alpha), np.repeat(255 - alpha, 3, axis=2)


@functools.cache
def _background(colour: str) -> np.ndarray:
    return np.full((CANVAS, CANVAS, 3), COLOURS[colour], np.uint8)


def render(scene: Scene) -> np.ndarray:
    """Returns the image of a scene, (128,128,3) uint8 RGB. Raises ValueError if an object extends beyond the edge."""
    image = _background(scene.colour).copy()
    for name, k, (x, y) in zip(scene.objects, scene.sizes, scene.centers):
        left, top = x - k // 2, y - k // 2
        if min(left, top) < 0 or max(left, top) + k > CANVAS:
            raise ValueError(f"{name!r} of {k} px at {(x, y)} extends beyond the {CANVAS} px canvas: "
                             "make it smaller or move it to the middle")
        colour, transparency = sprite(name, k)
        window = image[top:top + k, left:left + k]           # a view: assigning to it changes `image`
        # Divides by 255 in 16 bits and without division: round(v / 255) is (v + 128 + (v + 128 >> 8)) >> 8 for all v up
        # to 255 * 255.
        behind = np.multiply(window, transparency, dtype=np.uint16) + np.uint16(128)          # (k, k, 3)
        window[:] = colour + (behind + (behind >> 8) >> 8).astype(np.uint8)
    return image


# ----- caption -------------------------------------------------------------------------------------------------------

# Plain grammar:  a [small|large] OBJECT on a COLOUR background
#                 a OBJECT left of|right of|above|below a OBJECT on a COLOUR background
# 15 % of the captions use one of VARIANTS instead, so that the model understands prompts in other words.
VARIANT_SHARE = 0.15
VARIANTS = {
    "left of": ("to the left of", "on the left of"),
    "right of": ("to the right of", "on the right of"),
    "above": ("over", "on top of"),
    "below": ("under", "beneath"),
    "{things} on {a_colour} background": (
        "{things} on {colour} background",
        "{things} in front of {a_colour} background",
        "{a_colour} background with {things}",
    ),
}
LAYOUT = "{things} on {a_colour} background"


def article(words: str) -> str:
    """Returns "an WORDS" if `words` begin with a vowel letter, else "a WORDS". The only exception is "a unicorn"."""
    return f"an {words}" if words[0] in "aeiou" and words != "unicorn" else f"a {words}"


def plain_caption(objects: Sequence[str], colour: str, relation: str | None = None,
                  size_word: str | None = None, layout: str = LAYOUT) -> str:
    """Returns a caption such as "a small cat on a blue background". objects: two if a relation is given, else one.
    layout: LAYOUT or one of its VARIANTS."""
    if relation is None:
        things = article(f"{size_word} {objects[0]}" if size_word else objects[0])
    else:
        things = f"{article(objects[0])} {relation} {article(objects[1])}"
    return layout.format(things=things, colour=colour, a_colour=article(colour))


def vocabulary(objects: Sequence[str] = CAPTIONED) -> dict[str, list[str]]:
    """Returns {kind: words}, all words in captions of `objects`, which a Stage C trained on such captions knows."""
    relations = [words for plain in RELATIONS for words in (plain, *VARIANTS[plain])]
    other = " ".join(["a an", LAYOUT, *VARIANTS[LAYOUT]]).split()
    return dict(objects=list(objects), colours=list(COLOURS), sizes=["small", "large"], relations=relations,
                other=[word for word in dict.fromkeys(other) if word[0] != "{"])


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a true caption of the scene. Order of the objects, mention of the size, and wording are random."""
    objects, relation, size_word, layout = scene.objects, scene.relation, None, LAYOUT
    if relation is None and scene.size_class != "medium" and rng.random() < 0.5:
        size_word = scene.size_class
    if relation is not None and rng.random() < 0.5:
        objects, relation = objects[::-1], OPPOSITE[relation]
    if rng.random() < VARIANT_SHARE:
        if relation is not None and rng.random() < 0.5:
            relation = VARIANTS[relation][rng.integers(len(VARIANTS[relation]))]
        else:
            layout = VARIANTS[LAYOUT][rng.integers(len(VARIANTS[LAYOUT]))]
    return plain_caption(objects, scene.colour, relation, size_word, layout)


# ----- dataset -------------------------------------------------------------------------------------------------------

class EmojiScenes:
    """An endless sequence of scenes. Scene i depends only on (seed, i).

    objects  "captioned" (to train Stage C), "uncaptioned" (to fine-tune), "all" (to train Stages A and B), or "varied"
             (to train them first). With the last two, a scene with an object that is not captioned gets the caption
             "", so that no stage learns the object's name.
    varied   whether sizes and places are varied; they always are if objects is "varied"."""
    def __init__(self, objects: str = "all", seed: int = 0, varied: bool = False):
        choices = {"all": OBJECTS, "captioned": CAPTIONED, "uncaptioned": UNCAPTIONED, "varied": CELLS}
        check_name(objects, list(choices), "set of objects")
        self.objects, self.seed, self.varied = choices[objects], seed, varied or objects == "varied"
        self.captioned = frozenset(self.objects if objects == "uncaptioned" else CAPTIONED)

    def _draw(self, i: int) -> tuple[Scene, str]:
        rng = np.random.default_rng([self.seed, i])          # nothing else is random: scene i depends only on (seed, i)
        scene = random_scene(rng, self.objects, varied=self.varied)
        return scene, caption(scene, rng) if self.captioned.issuperset(scene.objects) else ""

    def caption(self, i: int) -> str:
        return self._draw(i)[1]

    def scenes(self, start: int, n: int) -> list[Scene]:
        return [self._draw(i)[0] for i in range(start, start + n)]

    def batch(self, start: int, n: int) -> tuple[np.ndarray, list[str]]:
        """Returns the images (n,128,128,3) uint8 of the scenes start to start + n - 1, and their n captions."""
        scenes, captions = zip(*(self._draw(i) for i in range(start, start + n)))
        return np.stack([render(scene) for scene in scenes]), list(captions)
