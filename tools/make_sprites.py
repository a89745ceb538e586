"""Draws the sprite sheet assets/emoji.png and its table assets/emoji.json.  Run once, its output is kept.

  font glyph 109 px -crop to its alpha-> square -LANCZOS-> 80 x 80 RGBA -> cell of a 16 x 8 sheet

  python -m tools.make_sprites --font NotoColorEmoji.ttf

Rows 1 to 4 are the 64 captioned objects, rows 5 to 8 the 64 uncaptioned ones (training/scenes.py says why).
The sheet is kept in the repository because another version of the font draws other images, and trained weights
remember these.
Surprise: the font holds bitmaps of one size, so 109 is the only size that loads.
Needs: pillow and Noto Color Emoji (Debian: fonts-noto-color-emoji; SIL OFL 1.1, assets/OFL.txt).
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run this as: python -m tools.make_sprites")

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, COLUMNS = 80, 16
FONT_SIZE = 109

# One "codepoint name" per entry. Chosen by eye to differ in shape and colour even at 30 px.
CAPTIONED = """
1F680 rocket, 1F319 moon, 1F34E red apple, 1F34C banana, 1F353 strawberry, 1F349 watermelon, 1F34D pineapple,
1F955 carrot, 1F344 mushroom, 1F354 hamburger, 1F355 pizza slice, 1F369 donut, 1F366 ice cream cone,
1F382 birthday cake, 2615 coffee cup, 1F373 fried egg, 1F431 cat, 1F436 dog, 1F438 frog, 1F43C panda, 1F98A fox,
1F427 penguin, 1F989 owl, 1F420 fish, 1F433 whale, 1F419 octopus, 1F980 crab, 1F422 turtle, 1F40C snail,
1F98B butterfly, 1F41E ladybug, 1F577 spider, 1F333 tree, 1F335 cactus, 1F33B sunflower, 1F339 rose, 1F340 clover,
2744 snowflake, 2600 sun, 2B50 star, 1F308 rainbow, 2601 cloud, 2602 umbrella, 1F525 flame, 26C4 snowman, 1F3E0 house,
1F3F0 castle, 1F697 car, 1F68C bus, 1F6B2 bicycle, 2708 airplane, 26F5 sailboat, 1F388 balloon, 26BD soccer ball,
1F3C0 basketball, 1F3B8 guitar, 1F3BA trumpet, 1F511 key, 23F0 alarm clock, 1F451 crown, 2764 heart, 1F47B ghost,
1F916 robot, 1F381 gift
"""
UNCAPTIONED = """
1F347 grape bunch, 1F34B lemon, 1F352 cherry, 1F351 peach, 1F951 avocado, 1F33D corn cob, 1F346 eggplant, 1F968 pretzel,
1F950 croissant, 1F9C0 cheese wedge, 1F36D lollipop, 1F36A cookie, 1FAD6 teapot, 1F377 wine glass, 1F418 elephant,
1F992 giraffe, 1F437 pig, 1F42E cow, 1F981 lion, 1F435 monkey, 1F428 koala, 1F430 rabbit, 1F425 chick, 1F99C parrot,
1F9A9 flamingo, 1F42C dolphin, 1F40D snake, 1F995 dinosaur, 1F984 unicorn, 1F41D bee, 1F982 scorpion, 1F334 palm tree,
1F332 pine tree, 1F341 maple leaf, 1F338 cherry blossom, 1F383 pumpkin, 1FA90 ringed planet, 1F30D globe, 1F30B volcano,
26FA tent, 1F3A1 ferris wheel, 1F69C tractor, 1F681 helicopter, 1F682 locomotive, 2693 anchor, 1F6A6 traffic light,
1F528 hammer, 270F pencil, 1F4D5 book, 1F4A1 light bulb, 1F512 padlock, 1F514 bell, 1F4F7 camera, 260E telephone,
1F4FA television, 1F941 drum, 1F3BE tennis racket, 1F3C6 trophy, 1F3AF dartboard, 1F9F8 teddy bear, 1F3A9 top hat,
1F48E diamond, 1F9F2 magnet, 1F480 skull
"""


def parse(text: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(None, 1)) for entry in " ".join(text.split()).split(", ")]


def draw(codepoint: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph as an RGBA image of 80 x 80: as large as fits, centred, undistorted."""
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), chr(int(codepoint, 16)), font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"The font has no glyph for U+{codepoint}; choose another object.")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((CELL, CELL), Image.LANCZOS)


def main():
    p = argparse.ArgumentParser(prog="python -m tools.make_sprites", description=__doc__.splitlines()[0])
    p.add_argument("--font", required=True, help="path of NotoColorEmoji.ttf (the bitmap version)")
    p.add_argument("--out", default="assets", help="folder that gets emoji.png and emoji.json")
    args = p.parse_args()

    captioned, uncaptioned = parse(CAPTIONED), parse(UNCAPTIONED)
    entries = captioned + uncaptioned
    names = [name for _, name in entries]
    assert len(captioned) == len(uncaptioned) == 64 and len(set(names)) == 128, (
        f"expected 64 + 64 different names, got {len(captioned)} + {len(uncaptioned)}")
    font = ImageFont.truetype(args.font, FONT_SIZE)
    sheet = Image.new("RGBA", (CELL * COLUMNS, CELL * len(entries) // COLUMNS))
    for i, (codepoint, _) in enumerate(entries):
        sheet.paste(draw(codepoint, font), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    sheet.save(Path(args.out, "emoji.png"), optimize=True)
    table = [{"name": name, "codepoint": f"U+{codepoint}", "captioned": i < len(captioned)}
             for i, (codepoint, name) in enumerate(entries)]
    rows = ",\n".join(" " + json.dumps(row) for row in table)     # one object per line
    Path(args.out, "emoji.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
