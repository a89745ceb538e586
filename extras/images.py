"""Reads image files; resizes, blends and arranges images. Uses no model.

  any file, array or tensor -read_image-> (3,H,W) -cover-> (3,height,width)      the input of the model
  PIL images (wuerstchen.to_pil) -strip, grid-> one image to look at             metadata.py saves it with its settings

Inside, an image is a tensor (3,H,W), float32, 0 black to 1 white. A mask is (H,W), 1 where new content goes.
Note: a plain convert("RGB") reads five kinds of files wrongly. Photos lie on their side, because it ignores the EXIF
orientation. Colours are off if the profile is Display P3 or Adobe RGB instead of sRGB. Transparent pixels turn black,
or whatever colour is stored under them. 16-bit values are clipped at 255 instead of scaled. 32-bit floats from 0 to 1
come out black. pixels_of reads all five correctly.
Needs: torch, numpy, pillow (11.3 or newer), loading/files.py.
"""
import bisect
import contextlib
import functools
import io
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from loading.errors import UserError, warn
from loading.files import reading, reason_of, write_atomically

# Resizing, sharpening and highlights take float images a little outside of [0, 1], so numbers from DARK to BRIGHT are
# accepted and clipped. They cannot be meant as 0 to 255: an image with numbers up to 2 would be almost black.
DARK, BRIGHT = -0.1, 2.0
LARGEST = 2 ** 30                # largest image file that is read, in bytes
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}       # {EXIF orientation: what undoes it}
PNG, IEND = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"              # how a PNG file begins and ends
PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"wuerstchen")  # texts to keep: orientation, our settings


# ----- reading -------------------------------------------------------------------------------------------------------

def read_image(source) -> Tensor:
    """An image from any source -> (3,H,W) float32 in [0, 1]: upright, in sRGB, over white where it is transparent.

    source  a path; a PIL image; a numpy array (H,W), (H,W,3) or (H,W,4), uint8, bool or float in [0, 1];
            or a tensor (3,H,W), (1,3,H,W) or (H,W), float in [0, 1] or bool
    Of an animation, the first frame is read. PIL images of mode I are read as 16 bits; of mode F as 0 to 1, or as 0 to
    255 if any pixel is above 2. Floats that are a little outside of [0, 1], see DARK and BRIGHT, are clipped.
    Raises ValueError, in one line, for files that are missing, cut off or not images, and for other shapes and numbers.
    """
    colours, opacity = _channels(source)
    return colours * opacity + (1 - opacity)


def read_pair(source, mask_source) -> tuple[Tensor, Tensor]:
    """-> image (3,H,W) and mask (H,W), as read_image and read_mask. Transparent pixels that the mask replaces are not
    white but continue their surroundings, so that no white edge remains. Raises ValueError, also if sizes differ."""
    colours, opacity = _channels(source)
    mask = read_mask(mask_source)
    if mask.shape != opacity.shape:
        raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} px, its image {opacity.shape[1]} x "
                         f"{opacity.shape[0]}: they must be the same.")
    image, solid = colours * opacity + (1 - opacity), opacity >= 0.5
    # Holes have partly transparent edges. If the mask covers all holes, all transparent pixels belong to the holes.
    theirs = opacity < 1 if (solid | (mask > 0)).all() else (opacity < 1) & (mask > 0)
    return torch.where(theirs, fill(colours, solid), image), mask


def fill(colours: Tensor, known: Tensor) -> Tensor:
    """colours (3,H,W), known (H,W) bool -> (3,H,W), in which unknown pixels get the mean of known pixels near them.

    The means come from images of half, a quarter, ... of the size. If no pixel is known, the result is white.
    """
    if known.all() or not known.any():
        return colours if known.any() else torch.ones_like(colours)
    means = F.avg_pool2d(torch.cat([colours * known, known[None]])[None], 2, ceil_mode=True)[0]    # (4, H/2, W/2)
    coarse = fill(means[:3] / means[3].clamp(min=0.25), means[3] > 0)                              # (3, H/2, W/2)
    return torch.where(known, colours, F.interpolate(coarse[None], known.shape, mode="bilinear")[0])


def read_mask(source) -> Tensor:
    """A mask, from any source of read_image -> (H,W) float32: 1 where new content goes (white, or a hole), else 0.

    Raises ValueError for everything read_image rejects, and if nothing is marked.
    """
    colours, opacity = _channels(source, "the mask")
    # Many editors export a mask as an image of one arbitrary colour, or as the photo itself, with transparent holes
    # where new content goes. So if there are holes, opacity decides. The colour stored in the holes is arbitrary.
    hole = opacity < 0.5                                                # (H, W)
    if hole.any():
        sheet = colours[:, ~hole]                                       # (3, n)
        if not (sheet == sheet[:, :1]).all():
            warn(f"{_name(source, 'the mask')} has transparent holes and more than one colour: the holes "
                 "are the mask, the colours do not count")
        return hole.float()
    red, green, blue = colours * opacity + (1 - opacity)                # 3 x (H, W)
    # luminance as in Pillow and JPEG: ITU-R BT.601
    mask = (0.299 * red + 0.587 * green + 0.114 * blue > 0.5).float()
    if not mask.any():
        raise ValueError(f"{_name(source, 'the mask')} marks nothing: "
                         "expected white where new content goes, black elsewhere")
    return mask


def _channels(source, what: str = "the image") -> tuple[Tensor, Tensor]:
    """Returns colours (3,H,W) and opacity (H,W), float32 in [0, 1]."""
    try:
        if isinstance(source, (str, Path)):
            array = read_file(source)
        elif isinstance(source, Image.Image):
            with decoding():
                array = pixels_of(source)
        elif isinstance(source, Tensor):
            array = _array_of(source)
        elif isinstance(source, np.ndarray):
            array = source
        else:
            raise ValueError(f"got {type(source).__name__}, expected a path, a PIL image, an array or a tensor")
        pixels = _checked(array)                                        # (H, W, 3 or 4)
    except UserError:
        raise
    except ValueError as error:
        raise ValueError(f"{_name(source, what)} cannot be read: {error}") from error
    pixels = torch.from_numpy(pixels).clamp(0, 1).permute(2, 0, 1).contiguous()       # (3 or 4, H, W)
    return pixels[:3], pixels[3] if len(pixels) == 4 else torch.ones_like(pixels[0])


def read_file(path: str | Path) -> np.ndarray:
    """Reads an image file -> (H,W,3) or (H,W,4) uint8, see pixels_of. Raises UserError."""
    with reading(path, most=LARGEST), decoding(), open_image(Path(path).read_bytes()) as image:
        return pixels_of(image)


@contextlib.contextmanager
def decoding():
    """Turns any error that Pillow raises in the `with` block into a ValueError of one line.

    Each of Pillow's decoders raises other errors for a damaged file: OSError, SyntaxError, struct.error, EOFError, ...
    """
    try:
        yield
    except Exception as error:
        text, clear = reason_of(error), (FileNotFoundError, IsADirectoryError, UnidentifiedImageError, ValueError,
                                         Image.DecompressionBombError)
        if isinstance(error, UnidentifiedImageError):
            text = "it is not an image in a known format"
        elif not isinstance(error, clear) and not getattr(error, "strerror", None):
            text = f"presumably it is cut off or damaged ({text})"
        raise ValueError(text) from error


def open_image(content: bytes) -> Image.Image:
    """The content of a file -> a PIL image with loaded pixels. Raises whatever Pillow raises."""
    image = open_header(io.BytesIO(content), 0, len(content), pixels=True)
    image.load()
    return image


def open_header(file: BinaryIO, start: int, end: int, pixels: bool = False) -> Image.Image:
    """Bytes `start` to `end` of a file -> a PIL image with its size, profile and orientation.

    pixels: whether its pixels can be loaded; without them, less of a PNG file is read. Raises whatever Pillow raises.
    """
    file.seek(start)
    if file.read(len(PNG)) == PNG:
        return open_png(file, start, end, pixels)
    file.seek(start)
    content = file.read(end - start)
    try:
        return Image.open(io.BytesIO(content))
    except Exception:
        if content[4:11] != b"ftypavi":
            raise
        # Pillow rejects AVIF files with damaged EXIF data, but ignores items of an unknown type: rename the item.
        return Image.open(io.BytesIO(content.replace(b"Exif", b"none", 1)))


def open_png(file: BinaryIO, start: int, end: int, pixels: bool) -> Image.Image:
    """open_header for PNG files.

    EXIF data may follow the pixels in the file; here it is moved before them. Finding it takes a few hundred bytes.
    Pillow rejects the whole file if a text or a profile is damaged, or larger than 1 MiB when decompressed. So damaged
    profiles, damaged EXIF data and all texts except PNG_TEXTS are omitted here.
    """
    def chunk_at(at: int) -> tuple[int, bytes]:          # length of the content, kind
        file.seek(at)
        return struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))

    header, data, profile, kind, at = b"", [], None, b"", start + len(PNG)
    while kind != b"IEND" and at < end:
        length, kind = chunk_at(at)
        size = length + 12                               # with length, kind and checksum
        if kind == b"IDAT" and not pixels:
            # Encoders write the pixels as chunks of equal length, so a binary search finds the last of these chunks.
            following = range(at + size, end, size)
            at += size * bisect.bisect_left(following, True, key=lambda place: chunk_at(place) != (length, kind))
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            file.seek(at)
            chunk = file.read(min(size, end - at))
            content = chunk[8:-4]
            if kind == b"IDAT":
                data.append(chunk)
            elif kind == b"iCCP":
                with contextlib.suppress(zlib.error):    # content: name, 0, method, data. At most 64 MiB
                    profile = zlib.decompressobj().decompress(content.partition(b"\0")[2][1:], 2 ** 26)
            elif kind in (b"IHDR", b"PLTE") or (_is_usable(header + chunk) if kind in (b"tRNS", b"eXIf")
                                                or content.partition(b"\0")[0] in PNG_TEXTS else False):
                header += chunk
        at += size
    end_mark = IEND * (not pixels or kind == b"IEND")    # "" if the file is cut off
    image = Image.open(io.BytesIO(b"".join((PNG, header, *data, end_mark))))
    if profile:
        image.info["icc_profile"] = profile
    return image


def _is_usable(chunks: bytes) -> bool:
    """Whether Pillow accepts a PNG file that begins with these chunks."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(PNG + chunks + IEND)):
        return True
    return False


def orientation(image: Image.Image) -> int:
    """The orientation of an image, 1 to 8 (see TURNS), from its EXIF or XMP data; 1 if none can be read."""
    with contextlib.suppress(Exception):                 # damaged data may raise any error
        return Image.Image.getexif(image).get(0x0112, 1)           # getexif of PNG images would decode the pixels
    return 1


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform from an image's colour profile to sRGB; None without a profile, or if the pixels are sRGB already.

    A profile that is damaged, or for another colour space than the image's, is ignored: the pixels count as sRGB.
    """
    profile, mode = image.info.get("icc_profile"), image.mode
    if not isinstance(profile, bytes) or not profile:
        return None
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    return _transform(profile, mode if mode in ("CMYK", "LAB") else "L" if grey else "RGB")


@functools.lru_cache(64)                                 # most photos of a data set share a few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if mode == "L" and space == "RGB":               # a grey image whose profile expects three equal channels
            mode = "RGB"
        if space != {"L": "GRAY"}.get(mode, mode):
            return None
        # As in photo editors: white stays white and black stays black.
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION)
        if mode == "CMYK":
            return transform
        # Many profiles for sRGB exist, which differ by rounding. Images with one of them keep their exact pixels.
        colours = np.indices((16,) * 3).reshape(3, 1, -1).T * 17 if mode == "RGB" else np.arange(256)[None]
        probe = Image.fromarray(colours.astype(np.uint8))
        change = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
        return transform if np.abs(change).max() > 2 else None
    return None


def pixels_of(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode -> (H,W,3) uint8, or (H,W,4) if it stores transparency: upright, in sRGB."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} px, expected at least 1 x 1")
    image.load()                                         # first: EXIF data may follow the pixels
    transform, turn = to_srgb(image), TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)                    # a copy: the caller's image does not change
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if transform is not None:
        opacity = pixels.getchannel("A") if pixels.mode == "RGBA" else None
        pixels = image if image.mode == "CMYK" else pixels.convert(transform.input_mode)
        pixels = ImageCms.applyTransform(pixels, transform)
        if opacity is not None:
            pixels.putalpha(opacity)
    return np.array(pixels)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F -> L, scaled; convert("L") would clip them."""
    values = np.asarray(image).astype(np.float64)        # (H, W)
    low, high = values.min(), values.max()               # NaN if any pixel is NaN
    # Pillow opens 16-bit PGM files as mode I, and older versions also 16-bit PNG files. For floats, white is taken as 1
    # if no pixel is above BRIGHT, else as 255: Pillow converts 8-bit images to floats up to 255.
    white = 65535 if image.mode != "F" else 1 if high <= BRIGHT else 255
    least, most = (DARK, BRIGHT) if white == 1 else (0, white)
    if not (low >= least and high <= most):
        raise ValueError(f"its pixels (mode {image.mode}) run from {low:g} to {high:g}, expected 0 to {white}")
    return Image.fromarray(np.round(values.clip(0, white) * (255 / white)).astype(np.uint8))


def _array_of(tensor: Tensor) -> np.ndarray:
    """A tensor (3,H,W), (1,3,H,W) or (H,W) -> an array (H,W,3) or (H,W), float32. Raises ValueError."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if not (tensor.ndim == 3 and len(tensor) == 3 or len(shape) == 2) or 0 in shape:
        raise ValueError(f"a tensor of shape {shape}, expected (3,H,W), (1,3,H,W) or (H,W)")
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        raise ValueError(f"a tensor of {tensor.dtype}, expected floats from 0 to 1")
    return tensor.detach().float().cpu().movedim(0, -1 if tensor.ndim == 3 else 0).numpy()


def _checked(array: np.ndarray) -> np.ndarray:
    """An array -> (H,W,3) or (H,W,4) float32, from DARK to BRIGHT. Raises ValueError for other arrays."""
    shape = array.shape
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)   # (H, W, 3)  grey
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, expected (H,W), (H,W,3) or (H,W,4), colours last")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype}, expected uint8 from 0 to 255 or floats from 0 to 1")
    array = array.astype(np.float32)                     # a copy in this machine's byte order, as torch requires
    if not np.isfinite(array).all():
        raise ValueError("it contains NaN or infinity, expected numbers from 0 to 1")
    if array.min() < DARK or array.max() > BRIGHT:
        raise ValueError(f"its numbers run from {array.min():g} to {array.max():g}, "
                         "expected floats from 0 to 1: scale them first")
    return array


def _name(source, otherwise: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else otherwise


# ----- fitting and blending ------------------------------------------------------------------------------------------

def cover(image: Tensor, height: int, width: int, nearest: bool = False) -> Tensor:
    """image (C,H,W) -> (C,height,width): resized without distortion to cover this size, then cropped to the middle.

    nearest: for masks, which stay 0 or 1. An image that has the size already is returned as it is, bit for bit.
    Raises ValueError for other shapes and sizes below 1.
    """
    if image.ndim != 3 or min(image.shape) < 1 or min(height, width) < 1:
        raise ValueError(f"cannot bring shape {tuple(image.shape)} to {height} x {width} px: "
                         "expected (C,H,W) and sizes of at least 1")
    scale = max(height / image.shape[1], width / image.shape[2])
    size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
    # Crop a very long image to its middle before resizing, because the whole resized image could fill the memory.
    middle = tuple(min(side, 2 * math.ceil(needed / scale) + 2 + side % 2)
                   for side, needed in zip(image.shape[1:], (height, width)))
    if size[0] * size[1] > 16 * height * width and middle != image.shape[1:]:
        return cover(middle_of(image, *middle), height, width, nearest)
    if size != tuple(image.shape[1:]):
        # nearest-exact samples at the centre of each new pixel, like bilinear. torch's "nearest" samples at its corner,
        # which would shift a mask against its image by up to half a pixel.
        mode = dict(mode="nearest-exact") if nearest else dict(mode="bilinear", antialias=True, align_corners=False)
        image = F.interpolate(image[None], size, **mode)[0]             # (C, *size)
    return middle_of(image, height, width)                              # (C, height, width)


def middle_of(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top:top + height, left:left + width]


def enlarge(image: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """Adds a border for outpainting: image (3,H,W) -> (3,H',W') with its edges repeated, mask (H',W'), 1 on the border.

    The four widths of the border are in px.  Raises ValueError if nothing is added.
    """
    if max(left, top, right, bottom) < 1:
        raise ValueError("nothing is added around the image: at least one side must be larger than 0 px")
    border = left, right, top, bottom
    mask = F.pad(torch.zeros_like(image[0]), border, value=1.0)         # (H + top + bottom, W + left + right)
    return F.pad(image[None], border, mode="replicate")[0], mask        # (3, same, same), (same, same)


def fitting_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) scaled so that the shorter side is `shorter` px; the shape is kept up to rounding."""
    return round(height * shorter / min(height, width)), round(width * shorter / min(height, width))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two images in [0, 1], in dB: -10 log10 of the mean squared error; inf if equal.

    Raises ValueError if their shapes differ: broadcasting would hide the difference.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: "
                         "bring them to one size first")
    error = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def feather(mask: Tensor, radius: int) -> Tensor:
    """mask (H,W) of 0 and 1 -> weights (H,W) float32, exactly 0 outside the mask, rising to 1 inside it.

    The n-th pixel from the edge gets n / (radius + 1), at most 1. Blending with these weights leaves no seam and never
    touches unmasked pixels. The borders of the image do not count as edges. radius 0 returns the mask.
    Raises ValueError for other shapes and negative radii.
    """
    if mask.ndim != 2 or radius < 0:
        raise ValueError(f"cannot feather a mask of shape {tuple(mask.shape)} by {radius} px: "
                         "expected (H,W) and 0 or more")
    # The mean of the mask and of the mask eroded 1, 2, ... radius times. A blur, clipped so that it is 0 outside, would
    # be faster, but would remove strokes thinner than the radius. Here the weights of such strokes only stay below 1.
    eroded, total = mask.float()[None], mask.float()                    # (1, H, W), (H, W)
    for _ in range(radius):
        # minimum of 3 x 3; max_pool2d pads with -inf, so nothing beyond the border counts
        eroded = -F.max_pool2d(-eroded, 3, stride=1, padding=1)         # (1, H, W)
        total = total + eroded[0]                                       # (H, W)
    return total / (radius + 1)


# ----- laying out ----------------------------------------------------------------------------------------------------

def strip(images: list, labels: list[str] | None = None, gap: int = 4) -> Image.Image:
    """PIL images of equal size -> one row of them, with labels above; see grid."""
    return grid(images, len(images), labels, gap=gap)


def grid(images: list, columns: int, column_labels: list[str] | None = None, row_labels: list[str] | None = None,
         gap: int = 4) -> Image.Image:
    """PIL images of equal size -> one RGB image of them, row by row, with white gaps of `gap` px between them.

    Labels stand above the columns and left of the rows, each a gap away. Labels wider than a cell end in an ellipsis.
    Without labels the cells begin in the top left corner; they always end in the bottom right corner.
    Raises ValueError without images or columns, for sizes that differ, and unless there is one label per column or row.
    """
    width, height = _common_size(images)
    if columns < 1:
        raise ValueError(f"got {columns} columns, expected at least 1")
    rows = -(-len(images) // columns)
    for labels, expected, what in ((column_labels, columns, "columns"), (row_labels, rows, "rows")):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"got {len(labels)} labels for {expected} {what}, expected one for each")

    # A 24th of the cell's width, so that about 45 letters fit, but at least 11 px: smaller letters are hard to read.
    # Pillow's own font exists on every machine, but contains little more than ASCII: other letters come out as boxes.
    font = ImageFont.load_default(size=max(11, round(width / 24)))
    above = [_shortened(label, width, font) for label in column_labels or []]
    left_of = [_shortened(label, width, font) for label in row_labels or []]
    line = sum(font.getmetrics())                                       # ascent and descent: the height of a line
    top = line + gap if above else 0
    left = math.ceil(max(map(font.getlength, left_of))) + gap if left_of else 0

    sheet = Image.new("RGB", (left + columns * (width + gap) - gap, top + rows * (height + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        sheet.paste(image, (left + i % columns * (width + gap), top + i // columns * (height + gap)))
    # The anchor is the point of the text at the given position: "mm" its middle, "rm" the middle of its right end.
    for i, label in enumerate(above):
        draw.text((left + i * (width + gap) + width / 2, line / 2), label, "black", font, anchor="mm")
    for i, label in enumerate(left_of):
        draw.text((left - gap, top + i * (height + gap) + height / 2), label, "black", font, anchor="rm")
    return sheet


def save_gif(images: list, path: str | Path, seconds_per_frame: float = 0.15, overwrite: bool = False) -> None:
    """Writes PIL images of equal size to a GIF file that loops forever; writes it completely or not at all.

    GIF counts in hundredths of a second, and Pillow joins equal consecutive frames into one that is shown longer.
    Raises FileExistsError unless `overwrite`, and ValueError without images or if their sizes differ.
    """
    _common_size(images)
    write_atomically(path, lambda temporary: images[0].save(
        temporary, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 * seconds_per_frame),
        loop=0), overwrite)


def _common_size(images: list) -> tuple[int, int]:
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"got {len(images)} images of sizes {sorted(sizes)}: expected at least one, all of one size")
    return sizes.pop()


def _shortened(text: str, width: int, font) -> str:
    text = " ".join(text.split())                                       # one line, whatever a prompt contains
    if font.getlength(text) <= width:
        return text
    letters = 0
    # The loop ends before the end of the text, because the whole text is too wide even without the ellipsis.
    while font.getlength(f"{text[:letters + 1]}…") <= width:
        letters += 1
    return f"{text[:letters].rstrip()}…" if letters else ""
