"""Writes and reads PNG, JPEG and WebP files that contain the settings of their image.

  settings {"prompt": ..., "seed": ...} -save_image-> "parameters" (for other programs) and "wuerstchen" (JSON)
  file -read_settings-> the same settings

  PNG         two text chunks with these names
  JPEG, WebP  "parameters" is the EXIF tag UserComment, where other programs expect it; "wuerstchen" is in XMP

Note: PNG has two kinds of text. Every reader understands tEXt, but it contains only Latin-1; other letters need iTXt.
"parameters" has the format of AUTOMATIC1111's web UI, see its modules/infotext_utils.py and processing.py.
Needs: pillow; reading also images.py.
"""
import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loading.errors import warn
from loading.files import parsed, reading, write_atomically

CHUNK = "wuerstchen"             # name of the PNG text that read_settings reads
SPACE = "https://arxiv.org/abs/2306.00637"       # namespace of the XMP property that read_settings reads
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">\
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:{name}="{space}">\
<{name}:settings>{json}</{name}:settings></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
# Pillow's options for lossy formats with hardly visible loss. JPEG stores colours in full resolution, WebP in half.
FORMATS = {".jpg": dict(format="JPEG", quality=95, subsampling="4:4:4", comment=b""),
           ".webp": dict(format="WEBP", quality=95)}
FORMATS[".jpeg"] = FORMATS[".jpg"]
LARGEST = {"JPEG": 65500, "WEBP": 16383}         # {format: longest possible side in px}


def save_image(image: Image.Image, path: str | Path, settings: dict | None, overwrite: bool = False) -> None:
    """Writes a PIL image and, unless they are None, its settings to a file. Writes it completely or not at all.

    The suffix .jpg, .jpeg or .webp sets the format; with any other suffix the file is PNG. For `settings` and errors,
    see save_png. Settings too long for a JPEG file (over 65 kB as EXIF or XMP data) are omitted with a warning.
    """
    options = FORMATS.get(Path(path).suffix.lower())
    if options is None:
        return save_png(image, path, settings, overwrite)
    info = {}
    if settings is not None:
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters_text(settings).encode("utf-16-be")
        xmp = XMP.format(name=CHUNK, space=SPACE, json=escape(json.dumps(settings, sort_keys=True)))
        info = dict(exif=exif.tobytes(), xmp=xmp.encode())
        for name in [name for name, data in info.items() if options["format"] == "JPEG" and len(data) > 65_000]:
            warn(f"{path}: the settings do not fit the {name.upper()} data of a JPEG file: save a PNG file to "
                 "keep them")
            del info[name]
    data = io.BytesIO()      # encode in memory, because Pillow does not notice a full disk when it writes a JPEG file
    image.save(data, **options, **info)
    write_atomically(path, lambda temporary: temporary.write_bytes(data.getvalue()), overwrite, len(data.getvalue()))


def save_png(image: Image.Image, path: str | Path, settings: dict | None, overwrite: bool = False) -> None:
    """Writes a PIL image to a PNG file, with its settings in two texts. Writes the file completely or not at all.

    "parameters" is for other programs, see parameters_text; "wuerstchen" has all settings as JSON, for read_settings.
    settings: {name: value that JSON can represent}, or None to write no text.
    Raises FileExistsError if the file exists, unless `overwrite`, and OSError if the file cannot be written.
    """
    text = PngInfo()
    if settings is not None:
        for name, value in (("parameters", parameters_text(settings)),
                            (CHUNK, json.dumps(settings, ensure_ascii=False, sort_keys=True))):
            latin = all(ord(letter) < 256 for letter in value)
            text.add_text(name, value) if latin else text.add_itxt(name, value)
    # Pillow's default compress_level, 6, makes files 1/6 to 1/4 smaller, but takes 3 to 5 times as long as level 1.
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text, compress_level=1),
                     overwrite)


def path_for(image: Image.Image, path: Path) -> Path:
    """Returns the path or, if its format cannot store an image of this size, the path of a PNG file, with a warning."""
    kind = FORMATS.get(path.suffix.lower(), {}).get("format")
    if max(image.size) <= LARGEST.get(kind, math.inf):
        return path
    warn(f"{path} becomes a PNG file: the image has {image.width} x {image.height} px, and {kind} can hold at "
         f"most {LARGEST[kind]} per side")
    return path.with_suffix(".png")


def parameters_text(settings: dict) -> str:
    """Returns the settings in the format of AUTOMATIC1111's web UI, which other programs and Civitai read:

      a cat on a blue background
      Negative prompt: dog
      Steps: 29, Sampler: DDPM, CFG scale: 4.0, Seed: 7, Size: 128x128, Model: tiny, Model hash: 0123456789, \
Version: wuerstchen

    All other settings follow under their own names ("steps_b" as "Steps b"), without lists, dicts, None and empty text.
    Steps, sampler and CFG scale are those of Stage C, because it decides what is in the image.
    """
    values = {name: value for name, value in settings.items() if isinstance(value, (str, int, float)) and value != ""}
    prompt, negative = str(values.pop("prompt", "")), str(values.pop("negative_prompt", ""))
    hashes = settings.get("hashes")
    fields = {"Steps": values.pop("steps_c", None),      # must be first: Civitai looks for a line that begins with it
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
        # Omits a setting with the name of a field above: other programs would read it as this field's value.
        fields.setdefault(name.replace("_", " ").capitalize(), value)
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
    return "\n".join([prompt] * bool(prompt) + [f"Negative prompt: {negative}"] * bool(negative) + [line])


def _quoted(value: str) -> str:
    """Returns the value, as a JSON string if it contains characters that have a meaning in the web UI's format."""
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ',:"\n') else value


def read_settings(path: str | Path) -> dict:
    """Returns the settings that save_image wrote into a file. Raises ValueError, in one line, if there are none."""
    from extras.images import LARGEST, decoding, open_image
    with reading(path, most=LARGEST), decoding(), open_image(Path(path).read_bytes()) as image:
        text = image.text.get(CHUNK) if image.format == "PNG" else _from_xmp(image.info.get("xmp"))
    missing = f"{path} contains no settings of this program"
    if text is None:
        raise ValueError(f"{missing}: expected a PNG, JPEG or WebP file just as it was saved; editors and web sites "
                         "drop such text")
    try:
        settings = parsed(text, finite=True)
    except ValueError as error:
        raise ValueError(f"{missing}: its text {CHUNK!r} is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{missing}: its text {CHUNK!r} is not a JSON object")
    return settings


def _from_xmp(xmp: bytes | None) -> str | None:
    """Returns the JSON text of the settings in XMP data, or None if they are missing or the data are damaged."""
    try:
        return next((element.text for element in ElementTree.fromstring(xmp or b"").iter(f"{{{SPACE}}}settings")), None)
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
