"""Generates assets/samples.png from the prompts below that image in README.md, with seed 1 and the bundled model.

  python -m tools.make_samples

Needs: what wuerstchen.py needs.
"""
import re
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # run by its path: python tools/make_samples.py

from pathlib import Path

from loading.errors import exit_on_user_error
from loading.files import write_atomically
from loading.options import Parser

ROOT = Path(__file__).parents[1]
FILE = ROOT / "assets" / "samples.png"


def prompts() -> list[str]:
    """Returns the prompts of the sample image: the quoted texts below it in README.md."""
    caption = re.search(r"<sub>(.*?)</sub>", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    return re.findall('"(.*?)"', caption)


def strip(prompts: list[str]):
    """Generates an image for each prompt. Returns a single PIL image with all of them side by side."""
    from PIL import Image
    from wuerstchen import Wuerstchen
    model = Wuerstchen.load("tiny", "cpu")
    images = [model(prompt, seed=1)[0] for prompt in prompts]
    whole = Image.new("RGB", (len(images) * images[0].width, images[0].height))
    for i, image in enumerate(images):
        whole.paste(image, (i * image.width, 0))
    return whole


if __name__ == "__main__":
    with exit_on_user_error():
        Parser(__doc__, prog="python -m tools.make_samples").parse_args()
        write_atomically(FILE, lambda path: strip(prompts()).save(path, format="PNG"))
