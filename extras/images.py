"""Reads image files; resizes, blends and arranges images. Uses no model.

  any file, array or tensor -read_image-> (3,H,W) -cover-> (3,height,width)      the input of the model
  PIL images (wuerstchen.to_pil) -strip, grid-> one image to look at             metadata.py saves it with its settings

Within this repository, an image is a tensor (3,H,W), float32, 0 black to 1 white; a mask is (H,W), 1 where new content
goes. Note: Pillow's convert("RGB") reads five kinds of files wrongly. Photos lie on their side, because it ignores the
EXIF orientation. Colours are wrong if the profile is Display P3 or Adobe RGB instead of sRGB. Transparent pixels get
the colour that is stored for them, often black. 16-bit values are clipped at 255 instead of scaled. 32-bit floats from
0 to 1 become black. pixels_of reads all five correctly.
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

# After resizing or sharpening, float images have values a little outside of [0, 1], so values from DARK to BRIGHT are
# accepted and clipped. An image of 0 to 255 is still rejected, unless it has no value above 2, so is almost black.
DARK, BRIGHT = -0.1, 2.0
LARGEST = 2 ** 30                # largest image file that is read, in bytes
TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
         6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}    # {EXIF orientation: operation that undoes it}
PNG, IEND = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"              # first and last bytes of a PNG file
PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"wuerstchen")  # names of texts that open_png keeps


# ----- reading -------------------------------------------------------------------------------------------------------

def read_image(source) -> Tensor:
    """Reads an image to a tensor (3,H,W) float32 in [0, 1], upright and in sRGB. Transparent pixels become white.

    source  a path; a PIL image; a numpy array (H,W), (H,W,3) or (H,W,4), uint8, bool or float in [0, 1];
            or a tensor (3,H,W), (1,3,H,W) or (H,W), float in [0, 1] or bool
    Of an animation, the first frame is read. PIL images of mode I are read as 16 bits; of mode F as 0 to 1, or as 0 to
    255 if any pixel is above 2. Floats that are a little outside of [0, 1], see DARK and BRIGHT, are clipped.
    Raises ValueError, in one line, for files that are missing, cut off or not images, and for other shapes and numbers.
    """
    colours, opacity = _channels(source)
    return colours * opacity + (1 - opacity)


def read_pair(source, mask_source) -> tuple[Tensor, Tensor]:
    """Reads an image (3,H,W) by read_image and a mask (H,W) by read_mask. Inside the mask, transparent pixels of the
    image get colours from around them, so that no white edge remains. Raises ValueError if the sizes differ."""
    colours, opacity = _channels(source)
    mask = read_mask(mask_source)
    if mask.shape != opacity.shape:
        raise ValueError(f"the mask has {mask.shape[1]} x {mask.shape[0]} px, its image {opacity.shape[1]} x "
                         f"{opacity.shape[0]}: they must be the same.")
    image, solid = colours * opacity + (1 - opacity), opacity >= 0.5
    # Edges of transparent holes are partly transparent. If the mask covers all holes, fill edges even outside of it.
    theirs = opacity < 1 if (solid | (mask > 0)).all() else (opacity < 1) & (mask > 0)
    return torch.where(theirs, fill(colours, solid), image), mask


def fill(colours: Tensor, known: Tensor) -> Tensor:
    """Returns colours (3,H,W) with unknown pixels replaced by the mean of known pixels near them. known: (H,W) bool.

    The means are computed in images of half, a quarter, ... of the size. If no pixel is known, the result is white."""
    if known.all() or not known.any():
        return colours if known.any() else torch.ones_like(colours)
    means = F.avg_pool2d(torch.cat([colours * known, known[None]])[None], 2, ceil_mode=True)[0]    # (4, H/2, W/2)
    coarse = fill(means[:3] / means[3].clamp(min=0.25), means[3] > 0)                              # (3, H/2, W/2)
    return torch.where(known, colours, F.interpolate(coarse[None], known.shape, mode="bilinear")[0])


def read_mask(source) -> Tensor:
    """Reads a mask to a tensor (H,W) float32: 1 where new content goes (white, or transparent holes), else 0.

    source: see read_image. Raises ValueError for sources that read_image rejects, and if nothing is marked.
    """
    colours, opacity = _channels(source, "the mask")
    # Many editors export a mask as an image of one arbitrary colour, or as the photo itself, with transparent holes
    # where new content goes. So if there are holes, they are the mask, whatever colours are stored in and around them.
    hole = opacity < 0.5                                                # (H, W)
    if hole.any():
        sheet = colours[:, ~hole]                                       # (3, n)
        if not (sheet == sheet[:, :1]).all():
            warn(f"{_name(source, 'the mask')} has transparent holes and more than one colour: the holes "
                 "are the mask, the colours do not count")
        return hole.float()
    red, green, blue = colours * opacity + (1 - opacity)                # 3 x (H, W)
    # Luminance as defined by ITU-R BT.601, which Pillow and JPEG also use.
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    if (grey - 0.5).abs().lt(0.4).float().mean() > 0.25:                # more grey than in a mask with soft edges
        warn(f"{_name(source, 'the mask')} is neither black nor white in many places, like a photo: what is lighter "
             "than the middle grey counts as white")
    mask = (grey > 0.5).float()
    if not mask.any():
        raise ValueError(f"{_name(source, 'the mask')} marks nothing: "
                         "expected white where new content goes, black elsewhere")
    return mask


def _channels(source, what: str = "the image") -> tuple[Tensor, Tensor]:
    """Returns an image's colours (3,H,W) and opacity (H,W), float32 in [0, 1]. source: see read_image."""
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
    """Reads an image file to an array (H,W,3) or (H,W,4) uint8, see pixels_of. Raises UserError if that fails."""
    with reading(path, most=LARGEST), decoding(), open_image(Path(path).read_bytes()) as image:
        return pixels_of(image)


@contextlib.contextmanager
def decoding():
    """Context manager that turns any error of Pillow in its block into a ValueError of one line.

    For a damaged file, Pillow's decoders raise many kinds of errors: OSError, SyntaxError, struct.error, EOFError, ...
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
    """Returns a file's content as a PIL image with loaded pixels. Raises any error that Pillow raises."""
    image = open_header(io.BytesIO(content), 0, len(content), pixels=True)
    image.load()
    return image


def open_header(file: BinaryIO, start: int, end: int, pixels: bool = False) -> Image.Image:
    """Opens bytes `start` to `end` of a file as a PIL image, which has at least size, colour profile and orientation.

    pixels: whether the pixels are also needed. If not, less of a PNG file is read. Raises any error of Pillow.
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
        # Pillow rejects AVIF files with damaged EXIF data, but ignores unknown items, so rename the EXIF item.
        return Image.open(io.BytesIO(content.replace(b"Exif", b"none", 1)))


def open_png(file: BinaryIO, start: int, end: int, pixels: bool) -> Image.Image:
    """Does what open_header does, but for PNG files only. Pillow gets a copy of the file with only the usable chunks.

    EXIF data that follow the pixels are moved before them. Without `pixels`, finding them reads a few hundred bytes.
    Pillow rejects the whole file if a text or a profile is damaged, or larger than 1 MiB when decompressed. So damaged
    profiles, damaged EXIF data and all texts except PNG_TEXTS are omitted here.
    """
    def chunk_at(at: int) -> tuple[int, bytes]:          # returns the length of the chunk's content, and its kind
        file.seek(at)
        return struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))

    header, data, profile, kind, at = b"", [], None, b"", start + len(PNG)
    while kind != b"IEND" and at < end:
        length, kind = chunk_at(at)
        size = length + 12                               # size of the whole chunk, with length, kind and checksum
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
                with contextlib.suppress(zlib.error):   # content is name, zero byte, method, data (at most 64 MiB)
                    profile = zlib.decompressobj().decompress(content.partition(b"\0")[2][1:], 2 ** 26)
            elif kind in (b"IHDR", b"PLTE") or (_is_usable(header + chunk) if kind in (b"tRNS", b"eXIf")
                                                or content.partition(b"\0")[0] in PNG_TEXTS else False):
                header += chunk
        at += size
    end_mark = IEND * (not pixels or kind == b"IEND")    # omitted if the file is cut off, so that Pillow reports it
    image = Image.open(io.BytesIO(b"".join((PNG, header, *data, end_mark))))
    if profile:
        image.info["icc_profile"] = profile
    return image


def _is_usable(chunks: bytes) -> bool:
    """Returns whether Pillow accepts a PNG file that consists of these chunks."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(PNG + chunks + IEND)):
        return True
    return False


def orientation(image: Image.Image) -> int:
    """Returns the orientation of an image, 1 to 8 (see TURNS), from its EXIF or XMP data; 1 if none can be read."""
    with contextlib.suppress(Exception):                 # damaged data may raise any error
        return Image.Image.getexif(image).get(0x0112, 1)           # PngImageFile's own getexif would decode the pixels
    return 1


def to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from an image's colour profile to sRGB, or None if it has no profile or is sRGB already.

    A profile that is damaged, or for another colour space than the image's, is ignored: the pixels count as sRGB.
    """
    profile, mode = image.info.get("icc_profile"), image.mode
    if not isinstance(profile, bytes) or not profile:
        return None
    grey = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
    return _transform(profile, mode if mode in ("CMYK", "LAB") else "L" if grey else "RGB")


@functools.lru_cache(64)                                 # the images of a dataset usually share a few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if mode == "L" and space == "RGB":               # treat a grey image with an RGB profile as RGB
            mode = "RGB"
        if space != {"L": "GRAY"}.get(mode, mode):
            return None
        # The same options as in photo editors: white stays white, and black stays black.
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION)
        if mode == "CMYK":
            return transform
        # Many sRGB profiles exist, which differ by rounding. Omit a transform that changes values by at most 2 of 255.
        colours = np.indices((16,) * 3).reshape(3, 1, -1).T * 17 if mode == "RGB" else np.arange(256)[None]
        probe = Image.fromarray(colours.astype(np.uint8))
        change = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
        return transform if np.abs(change).max() > 2 else None
    return None


def pixels_of(image: Image.Image) -> np.ndarray:
    """Returns the pixels of a PIL image of any mode, upright and in sRGB: (H,W,3) uint8, or (H,W,4) with opacity."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} px, expected at least 1 x 1")
    image.load()                                       # first, because this also reads EXIF data that follow the pixels
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
    """Converts images of mode I;16, I or F to mode L. Scales the values; Pillow's convert("L") would clip them."""
    values = np.asarray(image).astype(np.float64)        # (H, W)
    low, high = values.min(), values.max()               # NaN if any pixel is NaN: then the check below fails
    # White is 65535 in mode I, in which Pillow opens 16-bit PGM files (older versions also PNG files). In mode F, white
    # is 1 if no pixel is above BRIGHT, else 255, because Pillow converts 8-bit images to floats up to 255.
    white = 65535 if image.mode != "F" else 1 if high <= BRIGHT else 255
    least, most = (DARK, BRIGHT) if white == 1 else (0, white)
    if not (low >= least and high <= most):
        raise ValueError(f"its pixels (mode {image.mode}) run from {low:g} to {high:g}, expected 0 to {white}")
    return Image.fromarray(np.round(values.clip(0, white) * (255 / white)).astype(np.uint8))


def _array_of(tensor: Tensor) -> np.ndarray:
    """Converts tensor (3,H,W), (1,3,H,W) or (H,W) to array (H,W,3) or (H,W) float32. Raises ValueError for others."""
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if not (tensor.ndim == 3 and len(tensor) == 3 or len(shape) == 2) or 0 in shape:
        raise ValueError(f"a tensor of shape {shape}, expected (3,H,W), (1,3,H,W) or (H,W)")
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        raise ValueError(f"a tensor of {tensor.dtype}, expected floats from 0 to 1")
    return tensor.detach().float().cpu().movedim(0, -1 if tensor.ndim == 3 else 0).numpy()


def _checked(array: np.ndarray) -> np.ndarray:
    """Converts an image array to (H,W,3) or (H,W,4) float32. Raises ValueError for wrong shapes, types and values."""
    shape = array.shape
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)   # (H, W, 3)  grey
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in shape:
        raise ValueError(f"an array of shape {shape}, expected (H,W), (H,W,3) or (H,W,4), colours last")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype}, expected uint8 from 0 to 255 or floats from 0 to 1")
    array = array.astype(np.float32)                     # also sets this machine's byte order, which torch requires
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
    """Resizes image (C,H,W), without distortion, to cover height x width. Returns its middle (C,height,width).

    nearest: use nearest-neighbour interpolation, which keeps the values 0 and 1 of a mask. An image that already has
    this size is not changed at all. Raises ValueError for other shapes and for sizes below 1.
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
        # "nearest-exact" samples at the centre of each new pixel, like bilinear. torch's "nearest" samples at a corner,
        # which would shift a mask against its image by up to half a pixel.
        mode = dict(mode="nearest-exact") if nearest else dict(mode="bilinear", antialias=True, align_corners=False)
        image = F.interpolate(image[None], size, **mode)[0]             # (C, *size)
    return middle_of(image, height, width)                              # (C, height, width)


def middle_of(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top:top + height, left:left + width]


def enlarge(image: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """Adds a border for outpainting to image (3,H,W). Returns the larger image (3,H',W'), whose border repeats the edge
    pixels, and a mask (H',W'), which is 1 on the border. left, top, right, bottom: px to add. Raises ValueError if
    nothing is added."""
    if max(left, top, right, bottom) < 1:
        raise ValueError("nothing is added around the image: at least one side must be larger than 0 px")
    border = left, right, top, bottom
    mask = F.pad(torch.zeros_like(image[0]), border, value=1.0)         # (H + top + bottom, W + left + right)
    return F.pad(image[None], border, mode="replicate")[0], mask        # (3, same, same), (same, same)


def fitting_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Returns (height, width), scaled so that the shorter side is `shorter` px. Keeps the aspect ratio, and rounds."""
    return round(height * shorter / min(height, width)), round(width * shorter / min(height, width))


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of two images: -10 log10 of the mean squared error, in dB; inf if equal.

    a, b: images with values from 0 to 1. Raises ValueError if their shapes differ: broadcasting would hide that.
    """
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: "
                         "bring them to one size first")
    error = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def feather(mask: Tensor, radius: int) -> Tensor:
    """Returns weights (H,W) float32 to blend images at a mask (H,W) of 0 and 1: 0 outside it, rising to 1 inside it.

    The n-th pixel from the mask's edge gets n / (radius + 1), at most 1. Blending with these weights leaves no seam and
    never changes unmasked pixels. The borders of the image do not count as edges. With radius 0, the result is the
    mask. Raises ValueError for other shapes and negative radii.
    """
    if mask.ndim != 2 or radius < 0:
        raise ValueError(f"cannot feather a mask of shape {tuple(mask.shape)} by {radius} px: "
                         "expected (H,W) and 0 or more")
    # Computes the mean of the mask and of the mask eroded 1, 2, ... radius times. A blur that is clipped to 0 outside
    # would be faster, but would remove strokes thinner than the radius. The mean keeps them, with weights below 1.
    eroded, total = mask.float()[None], mask.float()                    # (1, H, W), (H, W)
    for _ in range(radius):
        # Minimum of 3 x 3 pixels. max_pool2d pads with -inf, so pixels beyond the border do not count.
        eroded = -F.max_pool2d(-eroded, 3, stride=1, padding=1)         # (1, H, W)
        total = total + eroded[0]                                       # (H, W)
    return total / (radius + 1)


# ----- laying out ----------------------------------------------------------------------------------------------------

def strip(images: list, labels: list[str] | None = None, gap: int = 4) -> Image.Image:
    """Returns one image with a row of PIL images of equal size and labels above them. gap: see grid."""
    return grid(images, len(images), labels, gap=gap)


def grid(images: list, columns: int, column_labels: list[str] | None = None, row_labels: list[str] | None = None,
         gap: int = 4) -> Image.Image:
    """Returns one RGB image with PIL images of equal size, `columns` in each row, and white gaps of `gap` px.

    Labels stand above the columns and left of the rows, each a gap away. Labels wider than an image end in an ellipsis.
    Without labels the images begin in the top left corner; they always end in the bottom right corner. Raises
    ValueError without images or columns, for sizes that differ, and unless there is one label per column or row.
    """
    width, height = _common_size(images)
    if columns < 1:
        raise ValueError(f"got {columns} columns, expected at least 1")
    rows = -(-len(images) // columns)
    for labels, expected, what in ((column_labels, columns, "columns"), (row_labels, rows, "rows")):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"got {len(labels)} labels for {expected} {what}, expected one for each")

    # The font size is a 24th of an image's width, so that about 45 letters fit, but at least 11 px, to be readable.
    # Pillow's own font exists on every machine. It contains little more than ASCII: other letters are drawn as boxes.
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
    # anchor: the point of the text that is at the given position: "mm" its middle, "rm" the middle of its right edge.
    for i, label in enumerate(above):
        draw.text((left + i * (width + gap) + width / 2, line / 2), label, "black", font, anchor="mm")
    for i, label in enumerate(left_of):
        draw.text((left - gap, top + i * (height + gap) + height / 2), label, "black", font, anchor="rm")
    return sheet


def save_gif(images: list, path: str | Path, seconds_per_frame: float = 0.15, overwrite: bool = False) -> None:
    """Writes PIL images of equal size to a GIF file that loops forever; writes it completely or not at all.

    seconds_per_frame is rounded to 1/100. Pillow joins equal consecutive frames into one that is shown longer.
    Raises FileExistsError if the file exists, unless `overwrite`; ValueError without images or if their sizes differ.
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
    text = " ".join(text.split())                                       # a prompt may contain line breaks
    if font.getlength(text) <= width:
        return text
    letters = 0
    # The loop ends before all letters fit, because the whole text is too wide even without the ellipsis.
    while font.getlength(f"{text[:letters + 1]}…") <= width:
        letters += 1
    return f"{text[:letters].rstrip()}…" if letters else ""
