"""Draws examples/unicorn: 24 captioned images of an object whose name Stage C of the tiny weights has never seen.

  python -m tools.make_example

The unicorn is one of the 64 objects that Stages A and B were trained on without captions. So the tiny model can
generate a unicorn, but does not know its name. The images show a unicorn alone or next to another object, on five of
the eight backgrounds. Each image has one or two true captions, one per line. In pairs, "unicorn" is the first object of
one caption and the second of the other, so the model learns the word independently of its position.
Needs: numpy, pillow, training/scenes.py.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # run by its path: python tools/make_example.py

from pathlib import Path

import numpy as np
from PIL import Image

from loading.errors import exit_on_user_error
from loading.files import check_output
from loading.options import Parser
from training.scenes import OPPOSITE, RELATIONS, place_pair, place_single, plain_caption, render

BACKGROUNDS = ("white", "red", "yellow", "green", "blue")
COMPANIONS = ("cat", "banana", "house", "star", "tree", "robot", "crab", "key", "gift", "umbrella", "penguin", "moon",
              "frog", "car", "mushroom", "balloon")


def main(folder: Path) -> None:
    rng = np.random.default_rng(5)
    check_output(folder, "")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(24):
        if i < 8:
            scene = place_single(rng, "unicorn", ("small", "medium", "large")[i % 3], BACKGROUNDS[i % 5])
            lines = [plain_caption(scene.objects, scene.colour, size_word=word) for word in (None, scene.size_class)
                     if word != "medium"]
        else:
            scene = place_pair(rng, "unicorn", COMPANIONS[i - 8], RELATIONS[i % 4], BACKGROUNDS[i % 5])
            lines = [plain_caption(scene.objects, scene.colour, scene.relation),
                     plain_caption(scene.objects[::-1], scene.colour, OPPOSITE[scene.relation])]
        Image.fromarray(render(scene)).save(folder / f"{i:02d}.png", optimize=True)
        (folder / f"{i:02d}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        Parser(__doc__, prog="python -m tools.make_example").parse_args()
        main(Path(__file__).parents[1] / "examples" / "unicorn")
