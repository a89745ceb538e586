"""Measures how sharp objects are: compares each object in an image with its sprite at the best position and size.

  image -Judge-> rough position -refine-> position to 1/4 px -draw-> the sprite on its background -> PSNR, distance

PSNR is measured within the object's box. It penalizes blur little, so a second measure is a distance in the form of
DISTS (arXiv:2004.07728): for each feature map, the similarity of its mean (texture) and its variations (structure).
DISTS uses VGG's features. VGG learned from photographs, but these images are drawn. Features that we train could share
the faults of the model they judge. So the feature maps are derivatives of Gaussians up to the second order at three
scales, which respond to edges, corners and lines like VGG's first layers. Equal images have distance 0.
Note: objects that the judge did not find are left out of the means, so read the means together with the judge's score.
Needs: numpy, pillow, torch; stages() also the model's networks.
"""
import functools
import itertools

import numpy as np
from PIL import Image

from training.scenes import CANVAS, CELL, COLOURS, sprite

EDGE = 6               # px by which the compared region exceeds the box that the judge found
VISIBLE = 1e-4         # added to squares of contrasts, so that contrasts below 1 % count little
BEST = 1e-6            # minimum of the mean squared error: limits PSNR to 60 dB


@functools.cache
def _cell(name: str) -> Image.Image:
    """Returns an object's sprite in its stored size, with a transparent border as wide as the sprite on all sides."""
    colour, through = sprite(name, CELL)
    cell = np.concatenate([colour, 255 - through[..., :1]], axis=2)
    cell = np.pad(cell, ((CELL, CELL), (CELL, CELL), (0, 0)))
    return Image.frombytes("RGBa", cell.shape[:2], cell.tobytes())


def draw(name: str, place, colour: str, box) -> np.ndarray:
    """Draws a scene of one object. Returns its part `box` (left, top, right, bottom), (h,w,3) float32 in [0, 1]. place:
    (size, x, y) of the object in px, floats; (x, y) is the object's center. colour: name of the background's colour."""
    size, x, y = place
    left, top, right, bottom = box
    source = [(edge - center) * CELL / size + 1.5 * CELL for edge, center in zip(box, (x, y, x, y))]
    rgba = np.asarray(_cell(name).resize((right - left, bottom - top), Image.LANCZOS, box=source), np.float32) / 255
    # Lanczos resampling overshoots at edges. Colour times alpha must not exceed alpha, so it is clamped to alpha.
    alpha = rgba[..., 3:]
    return np.minimum(rgba[..., :3], alpha) + (1 - alpha) * (np.array(COLOURS[colour], np.float32) / 255)


def refine(image: np.ndarray, name: str, place, colour: str) -> tuple[float, float, float]:
    """Returns the (size, x, y) near `place` at which the drawn object differs least from image (128,128,3) uint8."""
    size, x, y = place
    half = size // 2 + EDGE
    box = max(0, x - half), max(0, y - half), min(CANVAS, x + half), min(CANVAS, y + half)
    seen = image[box[1]:box[3], box[0]:box[2]] / np.float32(255)
    error = functools.cache(lambda place: np.square(draw(name, place, colour, box) - seen).sum())
    best, last = (float(size), float(x), float(y)), None
    for step in (2, 1, 0.5, 0.25):
        while best != last:
            moves = itertools.product((0, -step, step), repeat=3)
            near = [tuple(map(sum, zip(best, move))) for move in moves]
            last, best = best, min((p for p in near if abs(p[0] / size - 1) < 0.15), key=error)
        last = None
    return best


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns a perceptual distance similar to DISTS, 0 for equal images. a, b (h,w,3): images, values in [0, 1]."""
    import torch
    import torch.nn.functional as F
    x = torch.from_numpy(np.stack([a, b]).astype(np.float32)).permute(0, 3, 1, 2).flatten(0, 1)[:, None]   # (6,1,h,w)
    likeness = []
    for sigma in (1, 2, 4):
        u = torch.arange(-3 * sigma, 3 * sigma + 1) / sigma
        gauss = torch.exp(-u ** 2 / 2) / torch.exp(-u ** 2 / 2).sum()
        order = [gauss, u * gauss, (u ** 2 - 1) * gauss]
        bank = torch.stack([torch.outer(order[i], order[j]) for i in range(3) for j in range(3 - i)])[:, None]
        maps = F.conv2d(F.pad(x, (3 * sigma,) * 4, mode="replicate"), bank)           # (6, 6 filters, h, w)
        p, q = maps.flatten(2).unflatten(0, (2, 3))                                   # (3, 6, h w) each
        texture = [m.abs().mean(-1) for m in (p, q)]
        p, q = (m - m.mean(-1, keepdim=True) for m in (p, q))
        for both, squares in ((texture[0] * texture[1], texture[0] ** 2 + texture[1] ** 2),
                              ((p * q).mean(-1), (p * p + q * q).mean(-1))):
            likeness.append((2 * both + VISIBLE) / (squares + VISIBLE))
    return 1 - torch.stack(likeness).mean().item()


def compare(image, found: list, name: str, colour: str) -> dict | None:
    """Compares the object `name` in an image with its sprite. Returns a dict of name, place (size, x, y), psnr in dB,
    distance; or None if `found`, the list of Judge.find, lacks the object. colour: name of the background's colour."""
    image = np.asarray(Image.fromarray(np.asarray(image)).resize((CANVAS, CANVAS), Image.BOX))
    places = [(size, *center) for other, size, center, _ in found if other == name]
    if not places:
        return None
    size, *center = place = refine(image, name, places[0], colour)
    low, high = ([int(np.clip(round(c + side * size / 2), 0, CANVAS)) for c in center] for side in (-1, 1))
    ideal = draw(name, place, colour, (*low, *high))
    seen = image[low[1]:high[1], low[0]:high[0]] / np.float32(255)
    psnr = -10 * np.log10(max(np.square(seen - ideal).mean(), BEST))
    return dict(name=name, place=place, psnr=float(psnr), distance=distance(seen, ideal))


def summary(images, found: list[list], facts: list[dict]) -> dict:
    """Returns a dict. psnr, distance: means over the objects in the images that the judge found. objects: their number.
    of: number of all objects in the prompts. found: of each image, the list of Judge.find. facts: prompts' dicts."""
    objects = [compare(image, seen, name, fact["colour"])
               for image, seen, fact in zip(images, found, facts) for name in fact["objects"]]
    values = [(o["psnr"], o["distance"]) for o in objects if o]
    psnr, far = np.mean(values, axis=0).tolist() if values else (0.0, 1.0)
    return dict(objects=len(values), of=len(objects), psnr=psnr, distance=far)


# ----- difficult objects: those with the least contrast, and those that are found least often --------

@functools.cache
def contrast(name: str, colour: str) -> float:
    """Returns a number from 0 to 1: the root mean squared difference between a sprite's pixels and a background."""
    image, behind = draw(name, (CELL, 64, 64), colour, (24, 24, 104, 104)), np.array(COLOURS[colour]) / 255
    alpha = 1 - sprite(name, CELL)[1] / 255
    return float(np.sqrt(np.square(image - behind).sum() / alpha.sum()))


def worst_tenths(found: list[list], facts: list[dict]) -> dict:
    """Returns two figures in the form of evaluate.tally: the shares of difficult objects that the judge found.
    least_contrast is about the tenth of all objects in the prompts with the least contrast to their background;
    worst_objects about all objects whose name is in the tenth of names found least often. Arguments: see summary."""
    asked = [(contrast(name, fact["colour"]), name, any(other == name for other, *_ in seen))
             for seen, fact in zip(found, facts) for name in fact["objects"]]
    rates = {}
    for _, name, ok in asked:
        rates.setdefault(name, []).append(ok)
    names = sorted(rates, key=lambda name: np.mean(rates[name]))[:max(1, len(rates) // 10)]
    least = [ok for *_, ok in sorted(asked, key=lambda one: one[0])[:max(1, len(asked) // 10)]]
    worst = [ok for name in names for ok in rates[name]]
    return {"least_contrast": {"right": sum(least) / len(least), "n": len(least)},
            "worst_objects": {"right": sum(worst) / len(worst), "n": len(worst), "names": names}}


# ----- how much sharpness each stage loses ------------------------------------------------------------

def stages(model, facts: list[dict], pixels: np.ndarray, seed: int = 0, batch: int = 32, **options) -> dict:
    """Reconstructs images, pixels (n,128,128,3) uint8, in three ways. Returns {title: n images}: from Stage A's
    latents, from quantised ones, from semantic latents by Stage B. facts: the prompts' dicts. options: of sampling."""
    import torch
    from extras.editing import encode_image, generate
    from training.samples import to_tensor
    from wuerstchen import to_pil
    titles = ("Stage A's round trip", "Stage A, through the codebook", "Stage B, true semantic latents")
    images, stage_a = {title: [] for title in titles}, model.part("stage_a")
    with torch.no_grad():
        for start in range(0, len(facts), batch):
            true, prompts = to_tensor(pixels[start:start + batch]), [f["prompt"] for f in facts[start:start + batch]]
            for title, quantise in zip(titles, (False, True)):
                images[title] += to_pil(model.decode(stage_a.encode(true.to(model.device, model.dtype), quantise)))
            semantic = encode_image(model, true)
            images[titles[2]] += generate(model, prompts, given={"semantic": semantic}, seed=seed + start, **options)
    return images
