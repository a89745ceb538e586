"""The judge: finds out which objects an emoji scene shows, where they are, and which colour the background has.

Scenes are drawn from the sprites of training/scenes.py, so no classifier is trained. The judge knows every sprite and
finds which sprite, at which size and position, explains the image best (maximum likelihood for Gaussian errors).
In   images, uint8 RGB of any square size
Out  objects with their sizes and positions, the colour of the background; verdict() compares them with a prompt
Note: an image that shows more objects than its prompt asks for is wrong.
Accuracy: right on 512 of 512 real scenes (two seeds), also after a blur of 0.8 px and noise of sigma 10/255.
`python -m tiny.evaluate --real` repeats the measurement with 256 scenes.
Needs: torch, numpy, pillow, training/scenes.py.
"""
import numpy as np
from PIL import Image

from training.scenes import COLOURS, OBJECTS, sprite

SIDE = 64                              # images are compared at SIDE x SIDE px, half of a scene's side
# Sizes at which sprites are searched, in px at SIDE: half of those in scenes (40, 56 and 80 px), and others, because a
# model can draw a wrong size. Steps are 10 to 14 %, so the nearest size is at most 7 % off.
SIZES = (14, 16, 18, 20, 22, 25, 28, 31, 35, 40, 45)
SLACK = 1                              # px, after scaling to SIDE, by which boxes of two objects may overlap
BACKGROUND_TOLERANCE = 40              # largest RGB distance of a background to its colour; COLOURS are >= 84 apart
MIN_EXPLAINED = 0.25                   # smallest gain of an object, as a share of a perfect match's gain
SMALL_UP_TO, LARGE_FROM = 51, 68       # side of an object in a scene: to 51 px "small" in prompts, from 68 px "large"


class Judge:
    """Finds sprites in an image by maximum likelihood.

    Let D = image - background. A sprite with colours T adds R = alpha (T - background) to the background. Its gain is
    how much it lowers the squared error:   |D|^2 - |D - R|^2 = 2 sum(D R) - sum(R^2).   The sprite, size and position
    with the highest gain explain the image best. R is computed as P - alpha background with P = alpha T, because P
    and alpha do not depend on the background, so that their FFTs are computed only once:
      sum(D R) = sum(D P) - background sum(D alpha)           correlations, all positions at once: FFT
      sum(R R) = sum(P P) - 2 background sum(P alpha) + background^2 sum(alpha alpha)
    Objects in a scene do not overlap, so gains are computed only once, and their sum is the gain of a set of objects.
    For each size, a set starts with the best sprite of this size. Then the best sprite that does not overlap those
    before is added, and so on. The set with the highest gain is the result: otherwise one large sprite, which explains
    a little of two objects, could win over each of them."""
    def __init__(self, objects=OBJECTS, device="cpu"):
        import torch                                      # imported here, so that evaluate.py --help is fast
        self.device, self.objects = device, list(objects)
        self.fft, self.P_P, self.P_alpha, self.alpha_alpha = [], [], [], []    # one item per size
        for k in SIZES:
            template = torch.zeros(len(objects), 4, SIDE, SIDE)     # channels: colour times alpha (3), alpha (1)
            for n, name in enumerate(objects):
                template[n, :, :k, :k] = torch.from_numpy(half_size_sprite(name, k))
            P, alpha = template.to(device).split([3, 1], dim=1)     # (N,3,64,64), (N,1,64,64)
            self.P_P.append(P.square().sum((1, 2, 3)))              # (N,)
            self.P_alpha.append((P * alpha).sum((2, 3)))            # (N, 3)
            self.alpha_alpha.append(alpha.square().sum((1, 2, 3)))  # (N,)
            F = torch.fft.rfft2(torch.cat([P, alpha], dim=1))       # (N, 4, 64, 33)
            # The product of an image's FFT and this conjugate is the FFT of the correlation of image and sprite.
            self.fft.append(F.conj().resolve_conj())

    def find(self, image, most: int = 3):
        """Finds the objects in an image (square, uint8 RGB, an array or PIL image) and the colour of its background.

        Returns (found, colour). found: at most `most` tuples (name, size, (x, y), explained), best match first; size
        and center (x, y) are in px of a 128 px scene; explained is the gain (see Judge) as a share of a perfect one.
        colour: name of the background's colour, or None if it is near none of COLOURS.
        """
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.dtype != np.uint8:
            raise ValueError(f"The judge got {pixels.dtype} of shape {pixels.shape}, expected a square RGB image, "
                             f"(H,H,3) uint8.")
        pixels = Image.fromarray(pixels).resize((SIDE, SIDE), Image.BOX)
        pixels = np.asarray(pixels, np.float32) / 255               # (64, 64, 3)
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        background = np.median(rim, axis=0)                         # (3,)
        distance = {name: np.linalg.norm(background * 255 - rgb) for name, rgb in COLOURS.items()}
        colour = min(distance, key=distance.get)
        if distance[colour] > BACKGROUND_TOLERANCE:
            colour = None

        gain, sprite_at, explained = self._search(pixels, background)
        # A perfect match has an `explained` of 1. In 512 drawn scenes, each object had at least 0.98, after blur and
        # noise at least 0.65. In bad images, a spot without an object can have a small gain, so spots below
        # MIN_EXPLAINED do not count as objects.
        gain = np.where(explained >= MIN_EXPLAINED, gain, -np.inf)
        sets = [self._disjoint(gain.copy(), s, most) for s in range(len(SIZES))]
        best = max(sets, key=lambda chosen: sum(gain[at] for at in chosen))
        found = []
        for s, y, x in sorted(best, key=lambda at: -gain[at]):
            k, name = SIZES[s], self.objects[sprite_at[s, y, x]]
            found.append((name, 2 * k, (2 * x + k, 2 * y + k), float(explained[s, y, x])))
        return found, colour

    @staticmethod
    def _disjoint(gain, first: int, most: int) -> list[tuple[int, int, int]]:
        """Returns (size's index, y, x) of up to `most` sprites that do not overlap, first the best one of the size
        SIZES[first]. gain (S,64,64): from _search, will be changed."""
        chosen, at = [], (first, *np.unravel_index(gain[first].argmax(), gain[first].shape))
        while len(chosen) < most and gain[at] > -np.inf:
            chosen.append(at := tuple(map(int, at)))
            s, y, x = at
            for s2, k2 in enumerate(SIZES):              # exclude boxes that overlap the box just found
                top, left = max(0, y - k2 + 1 + SLACK), max(0, x - k2 + 1 + SLACK)
                gain[s2, top:y + SIZES[s] - SLACK, left:x + SIZES[s] - SLACK] = -np.inf
            at = np.unravel_index(gain.argmax(), gain.shape)
        return chosen

    def _search(self, pixels, background):
        """Finds the best sprite for each of S sizes and each top left corner of its box. Returns three arrays, each
        (S,64,64): the best sprite's gain (-inf if its box exceeds the image), the sprite's index in self.objects, and
        its gain as a share of a perfect match's gain. pixels: (64,64,3), background: (3,); both float32 in [0, 1]."""
        import torch
        background = torch.from_numpy(background).to(self.device)                    # (3,)
        D = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1) - background[:, None, None]
        F = torch.fft.rfft2(D)                                                       # (3, 64, 33)
        F = torch.cat([F, -(background[:, None, None] * F).sum(0, keepdim=True)])    # (4, 64, 33)
        best = torch.full((3, len(SIZES), SIDE, SIDE), -torch.inf)
        for s, k in enumerate(SIZES):
            # An FFT correlation wraps around at the edges. Positions where the sprite lies inside the image are not
            # affected, and only these are kept. So no padding is needed.
            inside = SIDE - k + 1
            D_R = torch.fft.irfft2((self.fft[s] * F).sum(1))[:, :inside, :inside]    # (N, 65-k, 65-k)
            R_R = (self.P_P[s] - 2 * self.P_alpha[s] @ background
                   + background.square().sum() * self.alpha_alpha[s])                # (N,)
            gain, n = (2 * D_R - R_R[:, None, None]).max(dim=0)                      # (65-k, 65-k)
            best[:, s, :inside, :inside] = torch.stack([gain, n, gain / R_R[n]]).cpu()
        gain, n, explained = best.numpy()
        return gain, np.where(gain > -np.inf, n, 0).astype(int), explained


def half_size_sprite(name: str, k: int) -> np.ndarray:
    """Returns a sprite, halved from 2k to k px, (4,k,k) float32 in [0, 1]: colour times alpha in 3 channels, alpha."""
    colour, through = sprite(name, 2 * k)                           # (2k, 2k, 3) uint8
    both = np.concatenate([colour, 255 - through[..., :1]], axis=2) / np.float32(255)
    return both.reshape(k, 2, k, 2, 4).mean(axis=(1, 3)).transpose(2, 0, 1)


def relation_of(first, second) -> str:
    """Returns where `first` (x, y) is relative to `second`, such as "left of", on the axis with the larger distance."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def verdict(found, colour: str | None, fact: dict) -> dict:
    """Compares the result of Judge.find with a prompt's dict, `fact`. Returns a dict: whether background, objects (all
    and no others), relation, size are right; the last two are None if not in the prompt, False if objects are wrong."""
    objects = sorted(name for name, *_ in found) == sorted(fact["objects"])
    relation = size = None
    if fact["relation"]:
        center = {name: position for name, _, position, _ in found}
        relation = objects and fact["relation"] == relation_of(*map(center.get, fact["objects"]))
    if fact["size"]:
        px = found[0][1] if objects else None
        size = objects and (px <= SMALL_UP_TO if fact["size"] == "small" else px >= LARGE_FROM)
    return {"background": colour == fact["colour"], "objects": objects, "relation": relation, "size": size}
