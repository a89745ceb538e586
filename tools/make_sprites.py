"""Draws the sprite sheet assets/emoji.png from the glyphs that assets/emoji.json lists.

  font glyph 109 px -crop to its alpha-> square -LANCZOS-> 80 x 80 RGBA -> cell of a 16 x 8 sheet

  python -m tools.make_sprites --font NotoColorEmoji.ttf --out FOLDER

emoji.json lists a glyph for each cell, chosen by eye to differ in shape and colour even at 30 px. It also says which
scenes show it: rows 1 to 4 of the sheet are the 64 captioned objects, see training/scenes.py.
The repository contains the sheet, because the weights were trained on it, and other versions of the font have other
glyphs.
Note: the font contains bitmaps of one size, so it loads only with size 109.
Needs: numpy, pillow and Noto Color Emoji (Debian: fonts-noto-color-emoji; SIL OFL 1.1, assets/OFL.txt).
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tools/make_sprites.py` finds our modules

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from loading.errors import UserError, exit_on_user_error
from loading.files import check_output, reading, write_atomically
from loading.options import Parser
from training.scenes import ASSETS, CELL, COLUMNS

FONT_SIZE = 109


def draw(codepoint: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws one glyph, such as "U+1F680", as large as possible and centred, as an RGBA image of 80 x 80 px."""
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), chr(int(codepoint[2:], 16)), font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise UserError(f"the font has no glyph for {codepoint}: expected the bitmap version of NotoColorEmoji.ttf")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((CELL, CELL), Image.LANCZOS)


def main(argv=None):
    p = Parser(__doc__.splitlines()[0], prog="python -m tools.make_sprites")
    p.add_argument("--font", required=True, help="path of NotoColorEmoji.ttf (the bitmap version)")
    p.add_argument("--out", default=str(ASSETS), help="folder that gets emoji.png, which is never overwritten "
                   "(default: assets)")
    args = p.parse_args(argv)
    out = Path(args.out, "emoji.png")
    check_output(out, ".png")

    table = json.loads((ASSETS / "emoji.json").read_text())
    with reading(args.font, failed="cannot be read as the bitmap version of NotoColorEmoji.ttf"):
        font = ImageFont.truetype(args.font, FONT_SIZE)
    sheet = Image.new("RGBA", (CELL * COLUMNS, CELL * len(table) // COLUMNS))
    for i, row in enumerate(table):
        sheet.paste(draw(row["codepoint"], font), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    write_atomically(out, lambda path: sheet.save(path, optimize=True), overwrite=False)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
