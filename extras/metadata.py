"""Images that say how they were made: PNG files with their settings as text, for us and for other programs.

  settings {"prompt": ..., "seed": ...} -save_png-> PNG with "parameters" (for other programs) and "wuerstchen" (JSON)
  PNG -read_settings-> the same settings

Surprise: PNG has two kinds of text. Every reader understands tEXt, which is Latin-1; all other letters need iTXt.
The "parameters" text follows AUTOMATIC1111's web UI, modules/infotext_utils.py and processing.py.
Needs: pillow; reading also images.py.
"""
import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loading.files import write_atomically

CHUNK = "wuerstchen"             # name of the PNG text that read_settings reads


def save_png(image: Image.Image, path: str | Path, settings: dict | None, overwrite: bool = False) -> None:
    """A PIL image -> a PNG file with the settings it was made with as two texts, written whole or not at all.

    "parameters" is for other programs (parameters_text), "wuerstchen" the same in JSON, complete, for read_settings.
    settings: names and plain values; None for no text at all.
    Raises FileExistsError unless `overwrite`, and OSError if the file cannot be written.
    """
    text = PngInfo()
    if settings is not None:
        for name, value in (("parameters", parameters_text(settings)),
                            (CHUNK, json.dumps(settings, ensure_ascii=False, sort_keys=True))):
            latin = all(ord(letter) < 256 for letter in value)
            text.add_text(name, value) if latin else text.add_itxt(name, value)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text), overwrite)


def parameters_text(settings: dict) -> str:
    """Settings in the words of AUTOMATIC1111's web UI, which other programs and Civitai read:

      a cat on a blue background
      Negative prompt: dog
      Steps: 29, Sampler: DDPM, CFG scale: 4.0, Seed: 7, Size: 128x128, Model: tiny, Model hash: 0123456789, \
Version: wuerstchen

    All other settings follow under their own names ("steps_b" as "Steps b"), without lists, dicts, None and empty text.
    Steps, sampler and CFG scale are Stage C's, which decides what is in the image.
    """
    values = {name: value for name, value in settings.items() if isinstance(value, (str, int, float)) and value != ""}
    prompt, negative = str(values.pop("prompt", "")), str(values.pop("negative_prompt", ""))
    hashes = settings.get("hashes")
    fields = {"Steps": values.pop("steps_c", None),      # first: Civitai looks for a line that begins with "Steps: "
              "Sampler": str(values.pop("sampler_c", "")).upper() or None,
              "CFG scale": values.pop("guidance_c", None),
              "Seed": values.pop("seed", None),
              "Size": (f"{values.pop('width')}x{values.pop('height')}"
                       if "width" in values and "height" in values else None),
              "Model": values.pop("weights", None),
              "Model hash": str(hashes.get("prior") or "")[:10] or None if isinstance(hashes, dict) else None,
              "Version": "wuerstchen"}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in values.items():
        # A name that readers know keeps the value they expect there; "wuerstchen" contains the other.
        fields.setdefault(name.replace("_", " ").capitalize(), value)
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
    return "\n".join([prompt] * bool(prompt) + [f"Negative prompt: {negative}"] * bool(negative) + [line])


def _quoted(value: str) -> str:
    """As JSON if a reader would take a part of the value for the next field, or quotes in it for its own."""
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ',:"\n') else value


def read_settings(path: str | Path) -> dict:
    """The settings that save_png wrote into a PNG file.  Raises ValueError, in one line, if there are none to read."""
    from extras.images import decoding
    try:
        with decoding(), Image.open(path) as image:
            # Text may come after the pixels, so .text decodes the whole image, which also finds files that are cut off.
            text = image.text.get(CHUNK) if image.format == "PNG" else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = f"{path} contains no settings of this program"
    if text is None:
        raise ValueError(f"{missing}: expected a PNG file just as it was saved; editors and web sites drop such text")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:        # RecursionError: thousands of brackets, not by accident
        raise ValueError(f"{missing}: its text {CHUNK!r} is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{missing}: its text {CHUNK!r} is not a JSON object")
    return settings
