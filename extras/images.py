"""Picture files: reading them, fitting them, laying them side by side, saving them with their settings. Knows no model.

  any file, array or tensor -read_image-> (3,H,W) -cover-> (3,height,width)      what goes into the model
  (B,3,H,W) -to_pil-> pictures -strip, grid-> one picture to look at -save_png-> a file that says how it was made

Inside, a picture is a tensor (3,H,W), float32, 0 black to 1 white, and a mask (H,W), 1 where new content goes.
Surprise: a plain convert("RGB") gets four kinds of files wrong. Photos lie on their side (their EXIF data says
how to turn them), what is transparent turns black, or whatever colour happens to be stored there, 16 bits are
cut off at 255 instead of scaled, and 32-bit floats from 0 to 1 come out black. See _pixels_of.
Text in PNG files follows AUTOMATIC1111's web UI, modules/infotext_utils.py and processing.py.
Needs: torch, numpy, pillow (10.1 or newer), files.py.
"""
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

CHUNK = "wuerstchen"             # name of the PNG text that read_settings reads back
TOLERANCE = 1e-3                 # by which floats may leave [0, 1]: the first float16 above 1 is 1.00098


# ----- reading ---------------------------------------------------------------------------------------

def read_image(source) -> Tensor:
    """A picture from anywhere -> (3,H,W) float32 in [0, 1]: upright, and over white where it is transparent.

    source  a path; a PIL image; a numpy array (H,W), (H,W,3) or (H,W,4), uint8, bool or float in [0, 1];
            or a tensor (3,H,W), (1,3,H,W) or (H,W), float in [0, 1] or bool
    Of an animation, the first frame. Mode I counts as 16 bits, mode F as 0 to 1 or, with larger numbers, 0 to 255.
    Raises ValueError, in one line, for files that are missing, cut off or no pictures, and for other shapes and numbers.
    """
    colours, opacity = _channels(source)
    return colours * opacity + (1 - opacity)


def read_mask(source) -> Tensor:
    """A mask from the same sources -> (H,W) float32, exactly 1 where new content goes (white, or a hole), else 0.

    Raises ValueError for what read_image refuses, and if nothing is marked.
    """
    colours, opacity = _channels(source)
    # Many editors export a mask as a sheet of one colour, whichever, with holes where to repaint. Over white, the
    # holes of a white sheet would be lost, so there opacity decides. Only what is opaque counts as the sheet:
    # which colour a file stores under full transparency is chance.
    hole = opacity < 0.5                                                # (H, W)
    sheet = colours[:, ~hole]                                           # (3, n)
    if hole.any() and (sheet == sheet[:, :1]).all():
        return hole.float()
    red, green, blue = colours * opacity + (1 - opacity)                # 3 x (H, W)
    # luminance as Pillow and JPEG have it: ITU-R BT.601
    mask = (0.299 * red + 0.587 * green + 0.114 * blue > 0.5).float()
    if not mask.any():
        raise ValueError(f"{_name(source, 'the mask')} marks nothing: expected white where new content goes, black elsewhere")
    return mask


def _channels(source) -> tuple[Tensor, Tensor]:
    """-> colours (3,H,W) and opacity (H,W), float32 in [0, 1]."""
    try:
        if isinstance(source, (str, Path)):
            with _decoding(), Image.open(source) as image:
                array = _pixels_of(image)
        elif isinstance(source, Image.Image):
            with _decoding():
                array = _pixels_of(source)
        elif isinstance(source, Tensor):
            array = _array_of(source)
        elif isinstance(source, np.ndarray):
            array = source
        else:
            raise ValueError(f"got {type(source).__name__}, expected a path, a PIL image, an array or a tensor")
        pixels = _checked(array)                                        # (H, W, 3 or 4)
    except ValueError as error:
        raise ValueError(f"{_name(source, 'the image')} cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(pixels).clamp(0, 1).permute(2, 0, 1).contiguous()       # (3 or 4, H, W)
    return pixels[:3], pixels[3] if len(pixels) == 4 else torch.ones_like(pixels[0])


@contextlib.contextmanager
def _decoding():
    """Whatever Pillow raises inside comes out as a ValueError of one line.

    Each of its decoders raises its own kinds for a damaged file: OSError, SyntaxError, struct.error, EOFError, ...
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError("it is a folder, expected a file") from error
    except UnidentifiedImageError as error:
        raise ValueError("it holds no picture in a known format") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if getattr(error, "strerror", None):             # the operating system's word, such as: permission denied
            reason = error.strerror.lower()
        elif not isinstance(error, (ValueError, Image.DecompressionBombError)):
            reason = f"presumably it is cut off or damaged ({reason})"
        raise ValueError(reason) from error


def _pixels_of(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode -> (H,W,3) uint8, or (H,W,4) if it knows of transparency."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} px, expected at least 1 x 1")
    image = ImageOps.exif_transpose(image)               # a copy: the caller's image stays as it is
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F -> L, scaled; convert("L") would clip them."""
    values = np.asarray(image).astype(np.float64)        # (H, W)
    low, high = values.min(), values.max()               # NaN if there is one
    if image.mode == "F":
        # Floats do not say what white is: presumably 1 where none is larger, while what Pillow makes of 8 bits goes up
        # to 255.
        white = 1 if high <= 1 else 255
    else:
        # for mode I, too: 16-bit PGM files come as I, and with older versions of Pillow 16-bit PNG files
        white = 65535
    if not (low >= 0 and high <= white):
        raise ValueError(f"its pixels (mode {image.mode}) run from {low:g} to {high:g}, expected 0 to {white}")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _array_of(tensor: Tensor) -> np.ndarray:
    """(3,H,W), (1,3,H,W) or (H,W) -> (H,W,3) or (H,W), float32."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if not (tensor.ndim == 3 and len(tensor) == 3 or len(shape) == 2) or 0 in shape:
        raise ValueError(f"a tensor of shape {shape}, expected (3,H,W), (1,3,H,W) or (H,W)")
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        raise ValueError(f"a tensor of {tensor.dtype}, expected floats from 0 to 1")
    return tensor.detach().float().cpu().movedim(0, -1 if tensor.ndim == 3 else 0).numpy()


def _checked(array: np.ndarray) -> np.ndarray:
    """Any array -> (H,W,3) or (H,W,4) float32, within TOLERANCE of [0, 1], or a ValueError."""
    shape = array.shape
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)   # (H, W, 3)  grey
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, expected (H,W), (H,W,3) or (H,W,4), colours last")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype}, expected uint8 from 0 to 255 or floats from 0 to 1")
    array = array.astype(np.float32)                     # a copy in this machine's byte order, as torch wants it
    if not np.isfinite(array).all():
        raise ValueError("it holds numbers that are NaN or infinite, expected 0 to 1")
    if array.min() < -TOLERANCE or array.max() > 1 + TOLERANCE:
        raise ValueError(f"its numbers run from {array.min():g} to {array.max():g}, expected floats from 0 to 1: scale them first")
    return array


def _name(source, otherwise: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else otherwise


# ----- fitting and blending --------------------------------------------------------------------------

def to_pil(images: Tensor) -> list:
    """images (B,3,H,W) in [0, 1] -> PIL images of 8 bits, rounded (cutting off would darken by half a step)."""
    return [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def cover(image: Tensor, height: int, width: int, nearest: bool = False) -> Tensor:
    """image (C,H,W) -> (C,height,width): resized in its own shape until it covers that, the rest cut off evenly.

    nearest: for masks, which stay 0 or 1. An image that has the size already is returned as it is, bit for bit.
    Raises ValueError for other shapes and sizes below 1.
    """
    if image.ndim != 3 or min(image.shape) < 1 or min(height, width) < 1:
        raise ValueError(f"cannot bring shape {tuple(image.shape)} to {height} x {width} px: expected (C,H,W) and sizes of at least 1")
    scale = max(height / image.shape[1], width / image.shape[2])
    size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
    if size != tuple(image.shape[1:]):
        # nearest-exact takes the pixel at the middle of the new one, as bilinear does. torch's "nearest" takes that at
        # its
        # corner, which would move a mask against its picture by up to half a pixel.
        how = dict(mode="nearest-exact") if nearest else dict(mode="bilinear", antialias=True, align_corners=False)
        image = F.interpolate(image[None], size, **how)[0]             # (C, *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top:top + height, left:left + width]                # (C, height, width)


def enlarge(image: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """image (3,H,W) -> itself with so many px around it, its edges repeated, and a mask, 1 where they are: for outpainting.

    Raises ValueError if nothing is added.
    """
    if max(left, top, right, bottom) < 1:
        raise ValueError("nothing is added around the picture: at least one side must be larger than 0 px")
    # (H + top + bottom, W + left + right)
    mask = F.pad(torch.zeros_like(image[0]), (left, right, top, bottom), value=1.0)
    return F.pad(image[None], (left, right, top, bottom), mode="replicate")[0], mask    # (3, same, same), (same, same)


def fitting_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) scaled so that the shorter side is `shorter` px; the shape is kept up to rounding."""
    return round(height * shorter / min(height, width)), round(width * shorter / min(height, width))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1], in dB: -10 log10 of the mean squared error; inf if equal.

    Raises ValueError if their shapes differ: broadcasting would compare something else.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: bring them to one size first")
    error = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def feather(mask: Tensor, radius: int) -> Tensor:
    """mask (H,W) of 0 and 1 -> weights (H,W) float32, exactly 0 outside the mask, rising to 1 inside it.

    The n-th pixel from the edge gets n / (radius + 1), at most 1, so that blending with these weights leaves no seam and
    never touches what is not masked. The picture's own borders are no edges. radius 0 returns the mask.
    Raises ValueError for other shapes and negative radii.
    """
    if mask.ndim != 2 or radius < 0:
        raise ValueError(f"cannot feather a mask of shape {tuple(mask.shape)} by {radius} px: expected (H,W) and 0 or more")
    # The mean of the mask and of what is left after eroding it 1, 2, ... radius times. A blur, clipped so that it is 0
    # outside, would be quicker, but it wipes out strokes thinner than the radius: here they only stay below 1.
    eroded, total = mask.float()[None], mask.float()                    # (1, H, W), (H, W)
    for _ in range(radius):
        # (1, H, W)  minimum of 3 x 3; beyond the border nothing counts
        eroded = -F.max_pool2d(-eroded, 3, stride=1, padding=1)
        total = total + eroded[0]                                       # (H, W)
    return total / (radius + 1)


# ----- laying out ------------------------------------------------------------------------------------

def strip(images: list, labels: list[str] | None = None, gap: int = 4) -> Image.Image:
    """PIL images of equal size -> one row of them, labels above; otherwise as grid."""
    return grid(images, len(images), labels, gap=gap)


def grid(images: list, columns: int, column_labels: list[str] | None = None, row_labels: list[str] | None = None,
         gap: int = 4) -> Image.Image:
    """PIL images of equal size -> one RGB picture of them, row by row, with white gaps of `gap` px between them.

    Labels stand above the columns and left of the rows, each a gap away, and end in an ellipsis where they are wider
    than a cell. The cells begin in the top left corner if there are none, and end in the bottom right one in any case.
    Raises ValueError without images or columns, for sizes that differ, and for labels that are not one per column or row.
    """
    width, height = _common_size(images)
    if columns < 1:
        raise ValueError(f"got {columns} columns, expected at least 1")
    rows = -(-len(images) // columns)
    for labels, expected, what in ((column_labels, columns, "columns"), (row_labels, rows, "rows")):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"got {len(labels)} labels for {expected} {what}, expected one for each")

    # A 24th of the cell's width, so that about 45 letters fit, but 11 px at least, below which letters are hard to
    # read.
    # Pillow's own font is there on every machine, but knows little more than ASCII: other letters come out as boxes.
    font = ImageFont.load_default(size=max(11, round(width / 24)))
    above = [_shortened(label, width, font) for label in column_labels or []]
    beside = [_shortened(label, width, font) for label in row_labels or []]
    line = sum(font.getmetrics())                                       # ascent and descent: the height of a line
    top = line + gap if above else 0
    left = math.ceil(max(map(font.getlength, beside))) + gap if beside else 0

    picture = Image.new("RGB", (left + columns * (width + gap) - gap, top + rows * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        picture.paste(image, (left + i % columns * (width + gap), top + i // columns * (height + gap)))
    # anchors: "mm" its middle, "rm" the middle of its right end
    for i, label in enumerate(above):
        draw.text((left + i * (width + gap) + width / 2, line / 2), label, "black", font, anchor="mm")
    for i, label in enumerate(beside):
        draw.text((left - gap, top + i * (height + gap) + height / 2), label, "black", font, anchor="rm")
    return picture


def _common_size(images: list) -> tuple[int, int]:
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"got {len(images)} pictures of sizes {sorted(sizes)}: expected at least one, and all of one size")
    return sizes.pop()


def _shortened(text: str, width: int, font) -> str:
    text = " ".join(text.split())                                       # one line, whatever a prompt holds
    if font.getlength(text) <= width:
        return text
    letters = 0
    # ends before the text does, which is wider by itself
    while font.getlength(f"{text[:letters + 1]}…") <= width:
        letters += 1
    return f"{text[:letters].rstrip()}…" if letters else ""


# ----- saving ----------------------------------------------------------------------------------------

def save_png(image: Image.Image, path: str | Path, settings: dict | None, overwrite: bool = False) -> None:
    """A PIL image -> a PNG file, whole or not at all, that carries the settings it was made with as two texts.

    "parameters" is for other programs (parameters_text), "wuerstchen" the same in JSON, complete, for read_settings.
    settings: names and plain values; None for no text at all.
    Raises FileExistsError unless `overwrite`, and OSError if the file cannot be written.
    """
    text = PngInfo()
    if settings is not None:
        for name, value in (("parameters", parameters_text(settings)),
                            (CHUNK, json.dumps(settings, ensure_ascii=False, sort_keys=True))):
            # PNG knows tEXt, in Latin-1, which every reader understands, and iTXt, in UTF-8, for everything else.
            latin = all(ord(letter) < 256 for letter in value)
            text.add_text(name, value) if latin else text.add_itxt(name, value)
    _write(path, overwrite, lambda temporary: image.save(temporary, format="PNG", pnginfo=text))


def save_gif(images: list, path: str | Path, seconds_per_frame: float = 0.15, overwrite: bool = False) -> None:
    """PIL images of equal size -> a GIF file that plays for ever, whole or not at all.

    GIF counts in hundredths of a second, and Pillow joins equal frames in a row into one that is shown longer.
    Raises FileExistsError unless `overwrite`, and ValueError without images or if their sizes differ.
    """
    _common_size(images)
    _write(path, overwrite, lambda temporary: images[0].save(
        temporary, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 * seconds_per_frame),
        loop=0))


def _write(path: str | Path, overwrite: bool, write) -> None:
    from loading.files import write_atomically
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists already and will not be overwritten: choose another name, or remove it")
    write_atomically(path, write)


def parameters_text(settings: dict) -> str:
    """Settings in the words of AUTOMATIC1111's web UI, which other programs and Civitai read:

      a cat on a blue background
      Negative prompt: dog
      Steps: 29, Sampler: DDPM, CFG scale: 4.0, Seed: 7, Size: 128x128, Model: tiny, Model hash: 0123456789, Version: wuerstchen

    What these names do not cover follows under its own name ("steps_b" as "Steps b"), without lists, dicts, None and
    empty text. Steps, sampler and CFG scale are those of Stage C, which decides what is in the picture.
    """
    values = {name: value for name, value in settings.items() if isinstance(value, (str, int, float)) and value != ""}
    prompt, negative = str(values.pop("prompt", "")), str(values.pop("negative_prompt", ""))
    fields = {"Steps": values.pop("steps_c", None)}      # first: Civitai looks for a line that begins with "Steps: "
    fields["Sampler"] = str(values.pop("sampler_c", "")).upper() or None
    fields["CFG scale"] = values.pop("guidance_c", None)
    fields["Seed"] = values.pop("seed", None)
    if "width" in values and "height" in values:
        fields["Size"] = f"{values.pop('width')}x{values.pop('height')}"
    fields["Model"] = values.pop("weights", None)
    hashes = settings.get("hashes")
    fields["Model hash"] = str(hashes.get("prior") or "")[:10] or None if isinstance(hashes, dict) else None
    fields["Version"] = "wuerstchen"
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in values.items():
        # A name that readers know keeps the value they expect there; "wuerstchen" holds the other.
        fields.setdefault(name.replace("_", " ").capitalize(), value)
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())
    return "\n".join([prompt] * bool(prompt) + [f"Negative prompt: {negative}"] * bool(negative) + [line])


def _quoted(value: str) -> str:
    """As JSON where a reader would take a part of the value for the next field, or quotes in it for its own."""
    return json.dumps(value, ensure_ascii=False) if any(letter in value for letter in ',:"\n') else value


def read_settings(path: str | Path) -> dict:
    """The settings that save_png wrote into a PNG file. Raises ValueError, in one line, if there are none to be read."""
    try:
        with _decoding(), Image.open(path) as image:
            # .text decodes the whole picture, as text may come after the pixels: so it finds files that are cut off,
            # too.
            text = image.text.get(CHUNK) if image.format == "PNG" else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if text is None:
        raise ValueError(f"{path} carries no settings of this program: expected a PNG file just as it was saved; "
                         "editors and web sites drop such text")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:        # RecursionError: thousands of brackets, not by accident
        raise ValueError(f"{path} carries no settings of this program: its text {CHUNK!r} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries no settings of this program: its text {CHUNK!r} is no JSON object")
    return settings


# ----- latents as pictures ---------------------------------------------------------------------------

def fit_linear(latents: Tensor, images: Tensor) -> Tensor:
    """The linear map from latents to colours that fits best: a quick look at latents without a decoder.

    latents (N,C,h,w) of images (N,3,H,W) in [0, 1].  Returns (C+1, 3) float32, on the CPU: what apply_linear takes. It
    minimizes |X matrix - Y|^2, a row of X being a latent vector and a 1, that of Y the mean colour of its patch.
    Raises ValueError unless there is one image per latent.
    """
    if latents.ndim != 4 or images.ndim != 4 or len(latents) != len(images) or images.shape[1] != 3:
        raise ValueError(f"got latents of shape {tuple(latents.shape)} for images of shape {tuple(images.shape)}: "
                         "expected (N,C,h,w) and (N,3,H,W)")
    # float64, as squares of latents of very different sizes are summed; on the CPU, whose solver takes columns of X
    # that
    # depend on each other, too (a channel that is always 0 is such a one).
    colours = F.adaptive_avg_pool2d(images.detach().float(), tuple(latents.shape[2:]))  # (N, 3, h, w)
    X = latents.detach().double().cpu().movedim(1, -1).flatten(0, 2)                    # (N*h*w, C)
    X = torch.cat([X, torch.ones_like(X[:, :1])], dim=1)                                # (N*h*w, C + 1)
    Y = colours.double().cpu().movedim(1, -1).flatten(0, 2)                             # (N*h*w, 3)
    return torch.linalg.lstsq(X, Y).solution.float()                                    # (C + 1, 3)


def apply_linear(latents: Tensor, matrix: Tensor) -> Tensor:
    """latents (B,C,h,w), matrix (C+1,3) from fit_linear -> small pictures (B,3,h,w) float32 in [0, 1].

    Raises ValueError if the matrix is for another number of channels.
    """
    if latents.ndim != 4 or matrix.shape != (latents.shape[1] + 1, 3):
        raise ValueError(f"got latents of shape {tuple(latents.shape)} and a matrix of shape {tuple(matrix.shape)}: "
                         "expected (B,C,h,w) and (C+1,3)")
    matrix = matrix.to(latents.device)
    colours = latents.float().movedim(1, -1) @ matrix[:-1] + matrix[-1]                 # (B, h, w, 3)
    return colours.movedim(-1, 1).clamp(0, 1)                                           # (B, 3, h, w)
