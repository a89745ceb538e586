"""Makes images of this repository: those in README.md, and the images of the fine-tuning example.

  python -m tools.make_images samples                          # assets/samples.png, from the prompts in README.md
  python -m tools.make_images unicorn --lora runs/unicorn:1.3  # assets/unicorn.png, without and with this LoRA
  python -m tools.make_images example                          # examples/unicorn, which must not exist yet

examples/unicorn has 24 images of one of the 16 objects that Stages A and B were trained on without captions. So the
tiny model can generate a unicorn, but does not know its name. Each image has one or two captions, one per line. In
pairs, "unicorn" is the first object of one caption and the second of the other, so its position does not matter.
Needs: what wuerstchen.py needs.
"""
import re
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tools/make_images.py` finds our modules

from pathlib import Path

import numpy as np
from PIL import Image

from extras.cli import loras
from loading.errors import exit_on_user_error
from loading.files import check_output, write_atomically
from loading.options import Parser
from training.scenes import OPPOSITE, RELATIONS, place_pair, place_single, plain_caption, render

ROOT = Path(__file__).parents[1]
SAMPLES, UNICORN = ROOT / "assets" / "samples.png", ROOT / "assets" / "unicorn.png"
BACKGROUNDS = ("white", "red", "yellow", "green", "blue")
COMPANIONS = ("cat", "banana", "house", "star", "tree", "robot", "crab", "key", "gift", "umbrella", "penguin", "moon",
              "frog", "car", "mushroom", "balloon")
# Prompts of assets/unicorn.png; none is a caption in examples/unicorn. The last two test what the model knew before.
UNICORNS = ("a unicorn on an orange background", "a unicorn on a black background",
            "a unicorn left of a rocket on a purple background", "a red apple above a unicorn on a white background",
            "a unicorn above a guitar on a yellow background", "an owl left of a unicorn on a red background",
            "a cat left of a tree on a red background", "a snowman on a yellow background")


def prompts() -> list[str]:
    """Returns the prompts of the sample image, which README.md quotes below that image."""
    caption = re.search(r"<sub>(.*?)</sub>", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    return re.findall('"(.*?)"', caption)


def generate(prompts: list[str], **options) -> list:
    """Generates a PIL image for each prompt with the tiny model. options: arguments of Wuerstchen.load."""
    from wuerstchen import Wuerstchen
    model = Wuerstchen.load("tiny", "cpu", **options)
    return [model(prompt, seed=1)[0] for prompt in prompts]


def write_example(folder: Path) -> None:
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


def main() -> None:
    p = Parser(__doc__, prog="python -m tools.make_images")
    p.add_argument("what", choices=["samples", "unicorn", "example"])
    p.add_argument("--lora", metavar="FILE:SCALE", type=loras, default="runs/unicorn:1.3", help="for unicorn")
    args = p.parse_args()
    if args.what == "example":
        return write_example(ROOT / "examples" / "unicorn")
    from extras.images import grid
    if args.what == "samples":
        sheet, file = grid(generate(prompts()), len(prompts()), gap=0), SAMPLES
    else:
        images = generate(UNICORNS) + generate(UNICORNS, lora=args.lora)
        sheet, file = grid(images, len(UNICORNS), row_labels=["before", "LoRA"]), UNICORN
    write_atomically(file, lambda path: sheet.save(path, format="PNG"))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
