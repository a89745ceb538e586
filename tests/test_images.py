"""Any kind of image file is read the way its user sees it; saved files are complete and say how they were made."""
import io
import json
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from extras import images
from extras.images import (cover, enlarge, feather, fitting_size, grid, psnr, read_image, read_mask, read_pair,
                           save_gif, strip)
from extras.metadata import parameters_text, path_for, read_settings, save_image, save_png
from extras.previews import apply_linear, fit_linear
from wuerstchen import to_pil

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
# (2, 3, 3) uint8, all six pixels different: no turning or mirroring leaves it as it is
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, BLACK, (255, 128, 0)]], np.uint8)


def pixels(image) -> list:
    """(3,H,W) in [0, 1] -> rows of RGB in 0..255, as one writes them down."""
    return (image * 255).round().int().permute(1, 2, 0).tolist()


def plain(colour, size=(8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


# ----- reading: what files hold ----------------------------------------------------------------------

@pytest.mark.parametrize("orientation, stored", [
    (1, UPRIGHT), (2, UPRIGHT[:, ::-1]), (3, UPRIGHT[::-1, ::-1]), (4, UPRIGHT[::-1]),
    (5, UPRIGHT.transpose(1, 0, 2)), (6, np.rot90(UPRIGHT)), (7, np.rot90(UPRIGHT.transpose(1, 0, 2), 2)),
    (8, np.rot90(UPRIGHT, -1))])
def test_photos_are_read_upright(orientation, stored, tmp_path):
    """Cameras store what the sensor saw; the EXIF data say how to turn it: 6 and 8 held upright, 3 upside down."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    assert pixels(read_image(tmp_path / "photo.png")) == UPRIGHT.tolist()


def test_a_jpeg_from_a_phone_is_read_upright(tmp_path):
    """The usual case: held upright, so wider than high in the file. Red on the left of the file is at the top."""
    stored = Image.new("RGB", (64, 32), BLUE)
    stored.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = read_image(str(tmp_path / "photo.jpg"))
    assert image.shape == (3, 64, 32)
    assert image[0, :28].min() > 0.95 and image[0, 36:].max() < 0.05


def test_a_16_bit_png_is_scaled(tmp_path):
    """convert("RGB") would make everything above 255 of 65535 white."""
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").mul(255).tolist() == [[[0, 1, 128, 255]]] * 3


def test_a_16_bit_pgm_is_scaled(tmp_path):
    """Pillow gives it mode I, of 32 bits, and so did older versions with 16-bit PNG files."""
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 65535\n" + bytes([0, 0, 128, 128, 255, 255]))
    with Image.open(tmp_path / "deep.pgm") as image:
        assert image.mode == "I"
    assert read_image(tmp_path / "deep.pgm")[0].mul(255).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("values", [[0, 0.2, 1], [0, 51, 255]])
def test_floats_are_read_from_0_to_1_or_from_0_to_255(values, tmp_path):
    """Both are in use, and convert("RGB") makes the first kind black."""
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tiff")
    assert read_image(tmp_path / "float.tiff")[0].mul(255).round().tolist() == [[0, 51, 255]]


def test_floats_a_little_outside_of_0_to_1_are_clipped(tmp_path):
    """As resizing and highlights leave them: one such pixel must not make the others black. Above 2, 255 is white."""
    values = np.array([[0.5, 1.0005, 1.9, -0.05]], np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    for source in (tmp_path / "float.tiff", Image.fromarray(values), values, torch.from_numpy(values)):
        assert read_image(source)[0].mul(255).round().tolist()[0] in ([127, 255, 255, 0], [128, 255, 255, 0])
    with pytest.raises(ValueError, match="^the image cannot be read: its numbers run from 0.5 to 2.5, expected floats"):
        read_image(np.array([[0.5, 2.5]]))
    with pytest.raises(ValueError, match=r"its pixels \(mode F\) run from -1 to 1, expected 0 to 1$"):
        read_image(Image.fromarray(np.array([[-1, 1]], np.float32)))


@pytest.mark.parametrize("values, problem", [
    (np.array([[0, 70000]], np.int32), r"its pixels \(mode I\) run from 0 to 70000, expected 0 to 65535"),
    (np.array([[-1, 9]], np.int32), r"its pixels \(mode I\) run from -1 to 9, expected 0 to 65535"),
    (np.array([[0, 300]], np.float32), r"its pixels \(mode F\) run from 0 to 300, expected 0 to 255"),
    (np.array([[0, np.nan]], np.float32), r"its pixels \(mode F\) run from nan to nan, expected 0 to 255")])
def test_numbers_without_a_known_white_are_rejected(values, problem):
    """Better than guessing a scale and generating from an image that nobody has seen."""
    with pytest.raises(ValueError, match=f"^the image cannot be read: {problem}$"):
        read_image(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_turn_white(mode):
    """As on the page of a browser; dropping alpha shows whatever colour is stored underneath, mostly black."""
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))              # a fifth black, four fifths white
    assert pixels(read_image(image.convert(mode))) == [[[0] * 3, [255] * 3, [204] * 3]]


def test_a_palette_with_a_transparent_entry_turns_white_there(tmp_path):
    """GIF and small PNG files; without a warning of Pillow's on the user's screen."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([*RED, *GREEN, *BLUE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in (1, bytes([255, 0, 255])):   # as one entry of GIF's and as a table of PNG's
            image.save(tmp_path / "palette.png", transparency=transparency)
            assert pixels(read_image(tmp_path / "palette.png")) == [[[255, 0, 0], [255] * 3, [0, 0, 255]]]


def test_a_transparent_colour_of_an_rgb_png_turns_white(tmp_path):
    """Transparency without an alpha channel: PNG can name one colour instead."""
    Image.fromarray(UPRIGHT[:1]).save(tmp_path / "named.png", transparency=GREEN)
    assert pixels(read_image(tmp_path / "named.png")) == [[[255, 0, 0], [255] * 3, [0, 0, 255]]]


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    """From print shops; Pillow's JPEG files of this kind are stored inverted, as Adobe's are."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg")            # magenta and yellow: red
    red, green, blue = read_image(tmp_path / "print.jpg").mean((1, 2)).tolist()
    assert red > 0.98 and green < 0.02 and blue < 0.02


def test_one_bit_and_grey_images_get_three_equal_channels(tmp_path):
    """1 is white, not 1 of 255."""
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    Image.fromarray(np.array([[255, 7]], np.uint8)).save(tmp_path / "grey.png")
    assert pixels(read_image(tmp_path / "bits.png")) == [[[255] * 3, [0] * 3]]
    assert pixels(read_image(tmp_path / "grey.png")) == [[[255] * 3, [7] * 3]]


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "RGBa"])
def test_other_modes_are_converted(mode):
    """Rare, but no reason to fail; orange comes back within 2 of 255."""
    image = plain((255, 128, 0)).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    assert np.abs(np.array(pixels(read_image(image))) - (255, 128, 0)).max() <= 2


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    """GIF, WebP and APNG files are mostly opened by mistake; the first frame is what a file manager shows."""
    save_gif([plain(RED), plain(GREEN)], tmp_path / "moving.gif")
    assert pixels(read_image(tmp_path / "moving.gif"))[0][0] == [255, 0, 0]


def test_images_in_memory_are_left_as_they_are():
    """The caller may still use them."""
    image, array = Image.fromarray(UPRIGHT), UPRIGHT.copy()
    image.getexif()[0x0112] = 3
    assert read_image(image).shape == (3, 2, 3)
    assert (np.asarray(image) == UPRIGHT).all() and image.getexif()[0x0112] == 3
    read_image(array).zero_()
    assert (array == UPRIGHT).all()


# ----- reading: colour profiles ----------------------------------------------------------------------

def chunk(kind: bytes, content: bytes, damage: int = 0) -> bytes:
    """Of a PNG file."""
    return (struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content) ^ damage))


def profile(space: bytes, **tags: bytes) -> bytes:
    """A minimal ICC profile, version 2: a header, a table of tags, their contents."""
    tags = {name.encode(): tag for name, tag in tags.items()} | {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    header = (struct.pack(">I4sI", 132 + len(table) - 4 + len(body), b"none", 0x02100000) + b"mntr" + space + pcs
              + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249))
    return header.ljust(128, b"\0") + table + body


def fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))


def matrix_profile(primaries, gamma: float = 2.2) -> bytes:
    """RGB by the colours (XYZ under D50) of its three lights, and one exponent."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    lights = {f"{light}XYZ": b"XYZ " + bytes(4) + fixed(*xyz) for light, xyz in zip("rgb", primaries)}
    return profile(b"RGB ", rTRC=curve, gTRC=curve, bTRC=curve, **lights)


# Published for D50: the lights of sRGB, Display P3 and Adobe RGB.
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
COLOURS = np.array([[(200, 60, 40), (120, 180, 60), (220, 180, 150), (30, 60, 90), (255, 255, 255), (128, 128, 128)]])


def stored_as(lights, gamma: float = 2.2) -> Image.Image:
    """COLOURS, which are sRGB, in the numbers of another space: by formula, without Pillow."""
    linear = np.where(COLOURS <= 0.04045 * 255, COLOURS / 255 / 12.92, ((COLOURS / 255 + 0.055) / 1.055) ** 2.4)
    other = np.clip(linear @ np.array(SRGB) @ np.linalg.inv(np.array(lights)), 0, 1) ** (1 / gamma)
    return Image.fromarray((other * 255).round().astype(np.uint8)).resize((96, 64), Image.NEAREST)


def worst(image: torch.Tensor, colours=COLOURS) -> int:
    """How far an image of six columns is from these colours, of 255."""
    middles = np.array(pixels(image))[32, 8::16]
    return int(np.abs(middles - colours[0]).max())


@pytest.mark.parametrize("lights", [P3, ADOBE])
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg", "avif"])
def test_colours_of_a_profile_become_srgb(lights, suffix, tmp_path):
    """Photos of a phone are Display P3, those of a camera may be Adobe RGB. Lossy formats keep these large areas."""
    lossy = dict(quality=100, subsampling="4:4:4") if suffix in ("jpg", "avif") else dict(lossless=True)
    image, icc = stored_as(lights), matrix_profile(lights)
    image.save(tmp_path / f"tagged.{suffix}", icc_profile=icc, **lossy if suffix not in ("png", "tiff") else {})
    image.save(tmp_path / "bare.png")
    assert worst(read_image(tmp_path / f"tagged.{suffix}")) <= 3
    assert worst(read_image(tmp_path / "bare.png")) > 15                          # the same numbers, taken as sRGB
    with Image.open(tmp_path / f"tagged.{suffix}") as opened:                     # opened by the caller
        assert worst(read_image(opened)) <= 3


def test_profiles_reach_every_mode(tmp_path):
    """Palettes, opacity, grey: the profile is of the colours, and opacity stays as it is."""
    image, icc = stored_as(ADOBE), matrix_profile(ADOBE)
    image.quantize(6).save(tmp_path / "palette.png", icc_profile=icc)
    assert worst(read_image(tmp_path / "palette.png")) <= 3
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: 255 if value > 99 else 51))
    image.save(tmp_path / "alpha.png", icc_profile=icc)
    read = read_image(tmp_path / "alpha.png")
    assert worst(read) <= 3 and np.abs(np.array(pixels(read))[2, 8::16] - (COLOURS[0] * 0.2 + 204)).max() <= 3


@pytest.mark.parametrize("dtype, white", [(np.uint8, 255), (np.uint16, 65535)])
def test_grey_of_another_gamma_becomes_srgb(dtype, white, tmp_path):
    """Gamma 1: half of the light is 0.5 there, and 188 of 255 in sRGB; in 8 and in 16 bits."""
    icc = profile(b"GRAY", kTRC=b"curv" + bytes(4) + struct.pack(">IH", 1, 256))
    Image.fromarray(np.array([[0, white // 2, white]], dtype)).save(tmp_path / "grey.png", icc_profile=icc)
    assert np.abs(np.array(pixels(read_image(tmp_path / "grey.png"))[0]) - [[0] * 3, [188] * 3, [255] * 3]).max() <= 1
    # a grey image with the profile of an RGB camera: three equal channels of it
    Image.fromarray(np.array([[0, 128, 255]], np.uint8)).save(tmp_path / "rgb.png", icc_profile=matrix_profile(P3, 1.0))
    assert np.abs(np.array(pixels(read_image(tmp_path / "rgb.png"))[0]) - [[0] * 3, [188] * 3, [255] * 3]).max() <= 1


def test_cmyk_is_read_by_its_profile(tmp_path):
    """Ink is never as pure as Pillow's formula: here cyan, yellow, magenta and black give a grey of L = 50."""
    table = bytes([128, 128, 128]) * 15 + bytes([0, 128, 128])                    # all ink together: black
    table = bytes([255, 128, 128]) + table[3:]                                    # none: white
    steps = bytes(range(256))
    icc = profile(b"CMYK", A2B0=b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
                  + steps * 4 + table + steps * 3)
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "ink.jpg", icc_profile=icc, quality=100)
    assert np.abs(np.array(pixels(read_image(tmp_path / "ink.jpg"))) - 119).max() <= 2       # L 50 is 119 in sRGB
    Image.new("CMYK", (16, 16)).save(tmp_path / "paper.jpg", icc_profile=icc, quality=100)
    assert np.array(pixels(read_image(tmp_path / "paper.jpg"))).min() >= 253


@pytest.mark.parametrize("icc", [
    b"", b"garbage" * 30, matrix_profile(P3)[:300], matrix_profile(P3)[:128],
    profile(b"CMYK"), profile(b"GRAY", kTRC=b"curv" + bytes(4) + struct.pack(">IH", 1, 256)),
    ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_that_do_not_fit_leave_the_pixels_alone(icc, mode, tmp_path):
    """Damaged, or for other colours; and sRGB, of which each program ships its own, stays bit for bit."""
    image = Image.fromarray(UPRIGHT).convert("P", palette=Image.ADAPTIVE).convert(mode)
    image.save(tmp_path / "image.png", icc_profile=icc)
    assert pixels(read_image(tmp_path / "image.png")) == UPRIGHT.tolist()


# ----- reading: metadata that is damaged or too large -------------------------------------------------

def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    """UPRIGHT as a PNG file with more chunks, before or behind its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "PNG")
    data, place = buffer.getvalue(), -12 if behind else 33
    return data[:place] + b"".join(chunks) + data[place:]


TURN = Image.Exif()
TURN[0x0112] = 6


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("broken", [
    chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2 ** 21))), chunk(b"iTXt", b"note\0\1\0\0\0garbage"),
    chunk(b"tEXt", b"note\0words", damage=1), chunk(b"eXIf", TURN.tobytes()[6:], damage=1), chunk(b"eXIf", b"garbage"),
    chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2 ** 21))), chunk(b"iCCP", b"name\0\0garbage"),
    chunk(b"iCCP", b"name"), chunk(b"gAMA", b"x"), chunk(b"pHYs", b"x"), chunk(b"acTL", b"x"), chunk(b"tRNS", b"x"),
    chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n\n\n\nno hex"))], ids=range(13))
def test_png_metadata_is_not_worth_an_image(broken, behind, tmp_path):
    """Too large, unreadable, of a wrong checksum: the pixels are complete."""
    (tmp_path / "a.png").write_bytes(png_with(broken, behind=behind))
    assert pixels(read_image(tmp_path / "a.png")) == UPRIGHT.tolist()
    with pytest.raises(ValueError, match="contains no settings of this program"):
        read_settings(tmp_path / "a.png")


def test_a_large_text_hides_neither_orientation_nor_profile_nor_settings(tmp_path):
    """What is needed is read also from a file that Pillow rejects, here with a profile of 2 MB."""
    large = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2 ** 21)))
    icc = matrix_profile(ADOBE) + bytes(2 ** 21)
    (tmp_path / "a.png").write_bytes(png_with(
        chunk(b"iCCP", b"name\0\0" + zlib.compress(icc)), large, chunk(b"eXIf", TURN.tobytes()[6:]),
        chunk(b"tEXt", b'wuerstchen\0{"seed": 7}')))
    turned = Image.fromarray(UPRIGHT).rotate(-90, expand=True)
    turned.info["icc_profile"] = matrix_profile(ADOBE)
    expected = pixels(read_image(turned))
    assert pixels(read_image(tmp_path / "a.png")) == expected and [255, 128, 0] not in sum(expected, [])
    assert read_settings(tmp_path / "a.png") == dict(seed=7)


EXIF_DAMAGES = (b"garbage", TURN.tobytes()[6:-8], b"II*\0\xff\xff\xff\x7f", b"x")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage", EXIF_DAMAGES)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_unreadable_exif_data_is_not_worth_an_image(damage, suffix, tmp_path):
    """Cut off by another program, or never EXIF data at all."""
    plain(RED, (16, 16)).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0" + damage)
    red, green, blue = read_image(tmp_path / f"a.{suffix}").mean((1, 2)).tolist()
    assert red > 0.98 and green < 0.02 and blue < 0.02


def test_the_header_of_a_large_png_is_read_without_its_pixels():
    """EXIF data behind a megabyte of pixels, in 8 kB pieces as most encoders write them, is found in a few reads."""
    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            content = super().read(size)
            self.count += len(content)
            return content

    data = png_with(*(chunk(b"IDAT", bytes(8192)) for _ in range(150)), chunk(b"IDAT", bytes(99)),
                    chunk(b"eXIf", TURN.tobytes()[6:]), behind=True)
    file = Counting(b"before" + data + data)                                      # as in the middle of a tar file
    with images.open_header(file, 6, 6 + len(data)) as image:
        assert image.size == (3, 2) and images.orientation(image) == 6
    assert len(data) > 1_200_000 and file.count < 1000


def test_unreadable_exif_data_of_an_avif_is_not_worth_it_either(tmp_path):
    """Its decoder reads all items first, and rejects the file."""
    exif = Image.Exif()
    exif[0x010F] = "maker"
    plain(RED, (16, 16)).save(tmp_path / "a.avif", exif=exif.tobytes())
    content = (tmp_path / "a.avif").read_bytes()
    assert exif.tobytes()[6:10] in content
    (tmp_path / "a.avif").write_bytes(content.replace(exif.tobytes()[6:10], b"XXXX"))
    red, green, blue = read_image(tmp_path / "a.avif").mean((1, 2)).tolist()
    assert red > 0.98 and green < 0.02 and blue < 0.02


# ----- reading: arrays, tensors, errors --------------------------------------------------------------

@pytest.mark.parametrize("source", [
    UPRIGHT, UPRIGHT.astype(np.float32) / 255, UPRIGHT.astype(np.float64) / 255, (UPRIGHT / 255).astype(">f4"),
    np.dstack([UPRIGHT, np.full((2, 3), 255, np.uint8)]), np.ascontiguousarray(UPRIGHT[::-1])[::-1],
    torch.from_numpy(UPRIGHT).movedim(-1, 0) / 255, torch.from_numpy(UPRIGHT).movedim(-1, 0)[None] / 255,
    (torch.from_numpy(UPRIGHT).movedim(-1, 0) / 255).requires_grad_()])
def test_arrays_and_tensors_of_every_kind_mean_the_same(source):
    """Arrays have their colours last, tensors first, as numpy's and torch's images have."""
    image = read_image(source)
    assert image.dtype == torch.float32 and image.is_contiguous() and not image.requires_grad
    assert pixels(image) == UPRIGHT.tolist()


def test_grey_arrays_and_tensors_and_bools_are_images_too():
    """Masks are mostly that, among them what read_mask returns."""
    grey = np.array([[True, False]])
    for source in (grey, grey * np.uint8(255), grey.astype(np.float16), torch.from_numpy(grey),
                   torch.from_numpy(grey).float()):
        assert read_image(source).tolist() == [[[1, 0]]] * 3


def test_transparent_arrays_lie_over_white():
    """The fourth channel is opacity: half of black over white is grey."""
    assert read_image(np.array([[[0, 0, 0, 0.5]]]))[:, 0, 0].tolist() == [0.5] * 3


def test_8_bits_survive_reading_and_to_pil():
    """An unchanged image is saved unchanged, all 256 values."""
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert (np.asarray(to_pil(read_image(array)[None])[0]) == array).all()


def test_to_pil_rounds():
    """Cutting off would darken by half a step on average: 0.999 of white is white."""
    (image,) = to_pil(torch.tensor([0.999, 0.5, 0.001])[None, :, None, None])
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("source, problem", [
    (np.zeros((5, 5, 2)), r"an array of shape \(5, 5, 2\), expected \(H,W\), \(H,W,3\) or \(H,W,4\), colours last"),
    (np.zeros((3, 5, 5)), r"an array of shape \(3, 5, 5\), expected"),
    (np.zeros((0, 5, 3)), r"an array of shape \(0, 5, 3\), expected"),
    (np.zeros(5), r"an array of shape \(5,\), expected"),
    (np.zeros((5, 5), np.int64), "an array of int64, expected uint8 from 0 to 255 or floats from 0 to 1"),
    (np.full((5, 5), 128.0), "its numbers run from 128 to 128, expected floats from 0 to 1: scale them first"),
    (np.full((5, 5), -1.0), "its numbers run from -1 to -1, expected floats from 0 to 1"),
    (np.full((5, 5), np.nan), "it contains NaN or infinity, expected numbers from 0 to 1"),
    (torch.full((3, 5, 5), math.inf), "it contains NaN or infinity, expected numbers from 0 to 1"),
    (torch.zeros(2, 3, 5, 5), r"a tensor of shape \(2, 3, 5, 5\), expected \(3,H,W\), \(1,3,H,W\) or \(H,W\)"),
    (torch.zeros(5, 5, 3), r"a tensor of shape \(5, 5, 3\), expected"),
    (torch.zeros(3, 0, 5), r"a tensor of shape \(3, 0, 5\), expected"),
    (torch.zeros(3, 5, 5, dtype=torch.uint8), "a tensor of torch.uint8, expected floats from 0 to 1"),
    (Image.new("RGB", (0, 5)), "it has 0 x 5 px, expected at least 1 x 1"),
    (None, "got NoneType, expected a path, a PIL image, an array or a tensor")])
def test_impossible_shapes_and_numbers_are_rejected(source, problem):
    """In one line, which says what was expected."""
    with pytest.raises(ValueError, match=f"^the image cannot be read: {problem}") as error:
        read_image(source)
    assert "\n" not in str(error.value)


def test_floats_just_outside_are_clamped():
    """Resizing and half precision overshoot a little; the caller did nothing wrong."""
    assert read_image(torch.tensor([[-0.0009, 1.0009]]))[0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="its numbers run from 0 to 2.002"):
        read_image(torch.tensor([[0, 2.002]]))


def broken_files(folder):
    """(path, the problem that is reported)"""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "tiff", "webp"):
        noise.save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[:len(data) // 2])
        yield folder / f"cut.{suffix}", r"presumably it is cut off or damaged \("
    (folder / "text.png").write_text("this is not an image")
    yield folder / "text.png", "it is not an image in a known format"
    (folder / "empty.png").touch()
    yield folder / "empty.png", "it is not an image in a known format"
    yield folder / "missing.png", "there is no such file"
    yield folder, "it is a folder, expected a file"


def test_files_that_are_not_images_are_named_in_one_line(tmp_path):
    """Pillow's own errors come in many kinds, some of several lines, some without the file's name."""
    for path, problem in broken_files(tmp_path):
        for read in (read_image, read_mask, str):
            with pytest.raises(ValueError, match=f"^{path} cannot be read: {problem}") as error:
                read(path) if read is not str else read_image(str(path))
            assert "\n" not in str(error.value)


def test_an_image_of_absurd_size_is_rejected(tmp_path, monkeypatch):
    """A file of a few kB can claim to be larger than memory; Pillow's limit is 179 million pixels."""
    plain(RED, (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError,
                       match="bomb.png cannot be read: Image size .10000 pixels. exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    """The operating system's message; monkeypatched, because the tests may run as root, who may read everything."""
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "secret.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match="secret.png cannot be read: permission denied$"):
        read_image(tmp_path / "secret.png")


# ----- masks -----------------------------------------------------------------------------------------

def test_white_is_marked_and_the_mask_is_0_or_1(tmp_path):
    """By luminance: green looks light, blue dark. JPEG's grey fringes must not become half a mask."""
    Image.fromarray(UPRIGHT).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")                                       # orange: 0.3 + 0.587 / 2 = 0.594
    assert mask.dtype == torch.float32 and mask.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert read_mask(mask).equal(mask)


@pytest.mark.parametrize("sheet", [BLACK, WHITE, (255, 0, 0)])
@pytest.mark.parametrize("beneath", [BLACK, WHITE])
def test_a_sheet_of_one_colour_marks_with_its_holes(sheet, beneath):
    """Whatever its colour, and whatever colour the file stores where nothing is visible."""
    image = Image.new("RGBA", (3, 1), (*sheet, 255))
    image.putpixel((1, 0), (*beneath, 0))
    assert read_mask(image).tolist() == [[0, 1, 0]]


def test_holes_in_a_photo_are_the_mask_and_its_colours_do_not_count():
    """Erased with a rubber: its bright parts stay, and so does what is white. A line says so."""
    image = Image.new("RGBA", (4, 1), (*BLACK, 255))
    image.putpixel((1, 0), (*WHITE, 255))
    image.putpixel((2, 0), (250, 240, 200, 255))
    image.putpixel((3, 0), (*BLACK, 0))
    with pytest.warns(UserWarning, match="^the mask has transparent holes and more than one colour: the holes are"):
        assert read_mask(image).tolist() == [[0, 0, 0, 1]]


def test_a_hole_that_gets_new_content_continues_its_surroundings():
    """White there would become a white frame around the new content. Everything else stays as it is, to the bit."""
    rgba = np.full((64, 96, 4), 255, np.uint8)
    rgba[..., :3] = np.where(np.arange(96)[:, None] < 48, (200, 10, 10), (10, 10, 200))
    rgba[20:40, 10:30] = rgba[20:40, 60:80] = 255, 255, 255, 0          # erased, one in each half
    rgba[20:40, 30, 3] = 180                                            # by a soft brush
    image, mask = read_pair(Image.fromarray(rgba), Image.fromarray(rgba))
    rgb = torch.from_numpy(rgba[..., :3].copy()).permute(2, 0, 1) / 255
    assert torch.equal(image[:, mask == 0], rgb[:, mask == 0]) and mask.sum() == 800
    assert pixels(image)[30][12] == [200, 10, 10] and pixels(image)[30][78] == [10, 10, 200]
    assert image[1].max() < 0.05                                        # nowhere white
    left = np.zeros((64, 96), np.float32)
    left[:, :48] = 1
    image, _ = read_pair(Image.fromarray(rgba), left)                   # the other hole stays, over white
    assert pixels(image)[30][70] == [255] * 3 and pixels(image)[30][20] == [200, 10, 10]
    opaque = Image.fromarray(rgba[..., :3])
    assert torch.equal(read_pair(opaque, left)[0], read_image(opaque))
    empty = Image.new("RGBA", (5, 7))
    assert read_pair(empty, empty)[0].min() == 1                        # nothing to continue


def test_an_opaque_alpha_channel_is_not_a_hole():
    """Many editors always save one."""
    image = Image.new("RGBA", (2, 1), (*WHITE, 255))
    assert read_mask(image).tolist() == [[1, 1]]


def test_a_mask_that_marks_nothing_is_rejected(tmp_path):
    """It would run for minutes and change nothing."""
    plain(BLACK).save(tmp_path / "black.png")
    with pytest.raises(ValueError,
                       match="black.png marks nothing: expected white where new content goes, black elsewhere$"):
        read_mask(tmp_path / "black.png")
    with pytest.raises(ValueError, match="^the mask marks nothing"):
        read_mask(torch.zeros(4, 4))


def test_a_photo_as_a_mask_is_reported_and_a_soft_edge_is_not():
    """Grey counts as black or as white, which hardly anybody means who gives a photo."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32).repeat(64).reshape(64, 64)
    with pytest.warns(UserWarning, match="^the mask is neither black nor white in many places, like a photo: what is"):
        assert read_mask(ramp).sum() == 32 * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_mask((ramp * 8 - 3.5).clip(0, 1)).sum() == 32 * 64


# ----- fitting and blending --------------------------------------------------------------------------

def test_cover_returns_the_right_size_bit_for_bit():
    """Resizing, even to the same size, may change the last bit."""
    image = torch.rand(3, 8, 12)
    assert cover(image, 8, 12).equal(image)
    assert cover(image, 8, 6).equal(image[:, :, 3:9])                             # only cut: still no resizing


@pytest.mark.parametrize("height, width", [(128, 128), (64, 200), (7, 5), (333, 100), (1, 1)])
def test_cover_gives_exactly_the_size_asked_for(height, width):
    """Whatever rounding does."""
    assert cover(torch.rand(3, 41, 67), height, width).shape == (3, height, width)


@pytest.mark.parametrize("nearest", [False, True])
def test_of_an_endless_image_only_the_middle_is_resized(nearest, monkeypatch):
    """1 px wide and 100001 long: resized as a whole it would have 1.6 billion px. The middle stays the middle."""
    shapes, interpolate = [], images.F.interpolate
    monkeypatch.setattr(images.F, "interpolate", lambda x, size, **options:
                        shapes.append(size) or interpolate(x, size, **options))
    ramp = torch.linspace(0, 1, 100_001).expand(1, 1, 100_001)
    small = cover(ramp, 128, 512, nearest)
    assert small.shape == (1, 128, 512) and shapes[0][0] * shapes[0][1] < 16 * 128 * 512
    assert (small + small.flip(2) - 1).abs().max() < 1e-5 and 2e-5 < small.max() - small.min() < 5e-5
    assert cover(torch.rand(3, 400, 1), 64, 4096, nearest).shape == (3, 64, 4096)


def test_cover_keeps_the_shape_and_the_middle():
    """A ramp from left to right, twice as wide as asked for: its outer quarters are cut off, and it stays as steep."""
    ramp = torch.linspace(0, 1, 200).expand(3, 100, 200)
    half = cover(ramp, 50, 50)
    expected = 0.25 + (torch.arange(50) + 0.5) / 100
    torch.testing.assert_close(half, expected.expand(3, 50, 50), atol=0.01, rtol=0)


def test_enlarge_leaves_the_image_in_its_middle():
    """Its edges are repeated around it, and marked: an image encoder must see more of the image there, not a frame."""
    image = torch.rand(3, 4, 5)
    larger, mask = enlarge(image, left=1, top=2, right=3, bottom=0)
    assert larger.shape == (3, 6, 9) and mask.shape == (6, 9)
    assert larger[:, 2:, 1:6].equal(image) and mask[2:, 1:6].max() == 0 and mask.sum() == 6 * 9 - 4 * 5
    assert larger[:, 0, 0].equal(image[:, 0, 0]) and larger[:, -1, -1].equal(image[:, -1, -1])
    assert read_mask(mask).equal(mask)
    with pytest.raises(ValueError,
                       match="^nothing is added around the image: at least one side must be larger than 0 px"):
        enlarge(image, 0, 0, 0, 0)


def test_cover_smooths_when_it_shrinks():
    """Antialias: a fine checkerboard turns grey instead of black or white, which plain bilinear would give."""
    board = torch.eye(2).repeat(32, 32)[None]                                     # (1, 64, 64)
    assert (cover(board, 16, 16)[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("size", [5, 16, 48])
def test_a_mask_stays_a_mask_and_lies_on_its_image(size):
    """No grey pixels, and no shift: it stays symmetric, and lies where the smoothly resized image is bright."""
    mask = torch.zeros(1, 20, 20)
    mask[:, 5:15, 5:15] = 1                                                       # symmetric about the middle
    small = cover(mask, size, size, nearest=True)
    assert set(small.unique().tolist()) == {0, 1} and small.equal(small.flip(1, 2))
    assert small.equal((cover(mask, size, size) > 0.5).float())


def test_cover_rejects_what_is_not_an_image():
    """A batch, or a size of 0."""
    with pytest.raises(ValueError, match=r"cannot bring shape \(1, 3, 8, 8\) to 4 x 4 px: expected \(C,H,W\)"):
        cover(torch.rand(1, 3, 8, 8), 4, 4)
    with pytest.raises(ValueError, match="to 0 x 4 px: .* sizes of at least 1"):
        cover(torch.rand(3, 8, 8), 0, 4)


@pytest.mark.parametrize("given, shorter, expected", [
    ((600, 800), 300, (300, 400)), ((800, 600), 300, (400, 300)), ((101, 67), 67, (101, 67)),
    ((1000, 333), 100, (300, 100)),
    ((7, 7), 1024, (1024, 1024))])
def test_fitting_size_makes_the_shorter_side_exact(given, shorter, expected):
    """And the longer one whole."""
    assert fitting_size(*given, shorter) == expected


def test_psnr_is_the_known_formula():
    """An error of a tenth everywhere: mean square 0.01, 20 dB."""
    a = torch.rand(3, 8, 8)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match=r"images of shapes \(3, 8, 8\) and \(3, 8, 1\) cannot be compared"):
        psnr(a, a[:, :, :1])


def test_feather_rises_inside_the_mask_only():
    """Unmarked pixels must come back bit for bit, so their weight is 0, not almost 0."""
    mask = torch.zeros(40, 40)
    mask[10:30, 10:30] = 1
    weights = feather(mask, 3)
    assert (weights[mask == 0] == 0).all() and weights.max() == 1
    assert weights[20, 8:16].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert weights.equal(weights.flip(0)) and weights.equal(weights.T)


def test_the_border_of_the_image_is_not_an_edge():
    """A mask that reaches the border continues beyond it; a fade would keep a frame of the old image."""
    mask = torch.zeros(20, 20)
    mask[:, 10:] = 1
    weights = feather(mask, 4)
    assert (weights[:, 14:] == 1).all() and weights[0, 9:15].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert feather(torch.ones(5, 5), 8).equal(torch.ones(5, 5))


def test_a_stroke_thinner_than_the_radius_does_not_vanish():
    """It is faint, but there; with a clipped blur its weights would all be 0, and nothing would be repainted."""
    mask = torch.zeros(40, 40)
    mask[18:21] = 1
    weights = feather(mask, 8)
    assert weights[17:22, 20].tolist() == pytest.approx([0, 1 / 9, 2 / 9, 1 / 9, 0])


def test_feather_of_radius_0_is_the_mask():
    """A hard edge, for those who want one."""
    mask = (torch.rand(9, 9) > 0.5).float()
    assert feather(mask, 0).equal(mask)
    with pytest.raises(ValueError,
                       match=r"cannot feather a mask of shape \(9, 9\) by -1 px: expected \(H,W\) and 0 or more"):
        feather(mask, -1)


# ----- laying out ------------------------------------------------------------------------------------

def box(image: Image.Image, left: int, top: int, width: int, height: int) -> set:
    """The colours of a part of a image."""
    return {colour for _, colour in image.crop((left, top, left + width, top + height)).getcolors(1000)}


def test_cells_lie_where_they_are_expected():
    """Row by row with white gaps, nothing around them; an unfinished last row ends in white."""
    image = grid([plain(colour) for colour in (RED, GREEN, BLUE, BLACK, RED)], columns=3, gap=2)
    assert image.mode == "RGB" and image.size == (3 * 8 + 2 * 2, 2 * 6 + 2)
    for (left, top), colour in {(0, 0): RED, (10, 0): GREEN, (20, 0): BLUE, (0, 8): BLACK, (10, 8): RED,
                                (20, 8): WHITE}.items():
        assert box(image, left, top, 8, 6) == {colour}
    assert box(image, 8, 0, 2, 14) == box(image, 18, 0, 2, 14) == box(image, 0, 6, 28, 2) == {WHITE}


@pytest.mark.parametrize("side", [64, 128, 1024])
def test_labels_stand_next_to_the_cells_never_on_them(side):
    """Cells end in the bottom right corner; there is text above and left of each, none in the corner between."""
    cells = [plain(colour, (side, side)) for colour in (RED, GREEN, BLUE, RED)]
    image = grid(cells, 2, ["guidance 1", "an endless label " * 20], ["seed 7", "another endless label " * 20], gap=4)
    left, top = image.width - 2 * side - 4, image.height - 2 * side - 4
    for x, y, colour in ((0, 0, RED), (1, 0, GREEN), (0, 1, BLUE), (1, 1, RED)):
        assert box(image, left + x * (side + 4), top + y * (side + 4), side, side) == {colour}
        assert min(box(image, left + x * (side + 4), 0, side, top)) < (64, 64, 64)
        assert min(box(image, 0, top + y * (side + 4), left, side)) < (64, 64, 64)
    # a long label is as wide as a cell at most
    assert 15 <= top <= side / 3 and left <= side + 5
    assert box(image, 0, 0, left, top) == box(image, left + side, 0, 4, top) == {WHITE}
    assert box(image, 0, top - 4, image.width, 4) == box(image, left - 4, 0, 4, top + side) == {WHITE}


def test_long_labels_end_in_an_ellipsis():
    """They fit. A label that fits is only put on one line."""
    font = images.ImageFont.load_default(size=11)
    short = images._shortened("a cat left of a moon on a green background", 128, font)
    assert short.endswith("…") and "a cat left of a moon on a green".startswith(short[:-1])
    assert 100 < font.getlength(short) <= 128
    assert images._shortened(" two\nlines ", 128, font) == "two lines"
    assert images._shortened("no room at all", 3, font) == ""


def test_strip_is_one_row():
    """As in docs/SAMPLING.md: from noise to image."""
    cells = [plain(RED), plain(GREEN), plain(BLUE)]
    image = strip(cells)
    assert image.size == (3 * 8 + 2 * 4, 6)
    assert [box(image, x, 0, 8, 6) for x in (0, 12, 24)] == [{RED}, {GREEN}, {BLUE}]
    labelled = strip([cell.resize((64, 64)) for cell in cells], ["a", "b", "c"], gap=3)
    assert labelled.width == 3 * 64 + 2 * 3 and box(labelled, 0, labelled.height - 64, 64, 64) == {RED}


@pytest.mark.parametrize("arguments, problem", [
    (([], 1), r"got 0 images of sizes \[\]: expected at least one"),
    (([plain(RED), plain(RED, (6, 8))], 1),
     r"got 2 images of sizes \[\(6, 8\), \(8, 6\)\]: expected at least one, all of one size"),
    (([plain(RED)], 0), "got 0 columns, expected at least 1"),
    (([plain(RED)] * 3, 2, ["a"]), "got 1 labels for 2 columns, expected one for each"),
    (([plain(RED)] * 3, 2, None, ["a", "b", "c"]), "got 3 labels for 2 rows, expected one for each")])
def test_impossible_grids_are_rejected(arguments, problem):
    """A label too many means that a image is missing."""
    with pytest.raises(ValueError, match=f"^{problem}"):
        grid(*arguments)


# ----- saving ----------------------------------------------------------------------------------------

SETTINGS = dict(prompt="a cat on a blue background", negative_prompt="dog", steps_c=29, sampler_c="ddpm",
                guidance_c=4.0, seed=7,
                width=128, height=128, weights="tiny", hashes={"prior": "0123456789abcdef", "decoder": "ff"},
                steps_b=12, guidance_b=4.0,
                mask=None, files=["a", "b"])


def test_parameters_are_in_the_words_of_other_programs():
    """To the letter: they take the line apart at commas and colons, and look for one that begins with "Steps: "."""
    assert parameters_text(SETTINGS) == (
        "a cat on a blue background\n"
        "Negative prompt: dog\n"
        "Steps: 29, Sampler: DDPM, CFG scale: 4.0, Seed: 7, Size: 128x128, Model: tiny, Model hash: 0123456789, "
        "Version: wuerstchen, Steps b: 12, Guidance b: 4.0")


def test_parameters_omit_missing_settings():
    """An empty negative prompt, no hashes, one side only, empty text."""
    assert parameters_text(dict(prompt="a\nb", negative_prompt="", steps_c=3, seed=0, width=128, hashes={"prior": None},
                                note="")) == (
        "a\nb\nSteps: 3, Seed: 0, Version: wuerstchen, Width: 128")
    assert parameters_text({}) == "Version: wuerstchen"


@pytest.mark.parametrize("value, written", [
    ("a, b", '"a, b"'), ("C:x", '"C:x"'), ('say "hi"', r'"say \"hi\""'), ("two\nlines", r'"two\nlines"'),
    ("Köln: é", '"Köln: é"'),
    ("plain", "plain")])
def test_values_that_would_break_the_line_are_quoted(value, written):
    """As JSON, the way the web UI does it and undoes it."""
    text = parameters_text(dict(prompt="cat", weights=value, software=value))
    assert text == f"cat\nModel: {written}, Version: wuerstchen, Software: {written}"


def test_a_name_known_to_readers_keeps_its_value():
    """A setting of our own called "model" must not replace the weights."""
    assert parameters_text(dict(weights="tiny", model="other")) == "Model: tiny, Version: wuerstchen"
    assert parameters_text(dict(model="other")) == "Version: wuerstchen, Model: other"


@pytest.mark.parametrize("prompt", ["a cat", "ein Käse für 5 £", "猫 on a 🚲, \"quoted\"\nsecond line: \\n", ""])
def test_settings_survive_in_the_file(prompt, tmp_path):
    """Any script, and numbers as numbers; both texts are there, the readable one as other programs expect it."""
    settings = SETTINGS | dict(prompt=prompt)
    save_png(plain(RED), tmp_path / "new" / "image.png", settings)
    assert read_settings(tmp_path / "new" / "image.png") == settings
    with Image.open(tmp_path / "new" / "image.png") as image:
        assert image.text["parameters"] == parameters_text(settings)
        assert image.text["wuerstchen"] == json.dumps(settings, ensure_ascii=False, sort_keys=True)
        assert image.getpixel((0, 0)) == RED and list(image.text) == ["parameters", "wuerstchen"]


def test_text_is_latin_1_where_it_can_be(tmp_path):
    """tEXt, which the oldest readers know; iTXt, in UTF-8, only for what it cannot hold."""
    for name, prompt, kind in (("a.png", "Käse", b"tEXt"), ("b.png", "猫", b"iTXt")):
        save_png(plain(RED), tmp_path / name, dict(prompt=prompt))
        data = (tmp_path / name).read_bytes()
        assert data.count(kind + b"parameters\0") == data.count(kind + b"wuerstchen\0") == 1
    assert "猫".encode() in data and r"\u" not in data.decode("latin-1")


def photo() -> Image.Image:
    """Smooth, with an edge of two colours, which half a resolution of colours would blur."""
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)]).resize((96, 64))
    image.paste(RED, (30, 20, 61, 45))
    return image


@pytest.mark.parametrize("name, kind, most", [("a.jpg", "JPEG", 1.5), ("a.JPEG", "JPEG", 1.5), ("a.webp", "WEBP", 4)])
@pytest.mark.parametrize("prompt", ["a cat", "猫 on a 🚲, <b>\"quoted\"</b> & more\nsecond line: \\n ]]>"])
def test_jpeg_and_webp_files_carry_settings_and_hardly_lose_anything(name, kind, most, prompt, tmp_path):
    """By the name. UserComment is what other programs read: "UNICODE" and UTF-16, as piexif writes it."""
    settings = SETTINGS | dict(prompt=prompt)
    save_image(photo(), tmp_path / name, settings)
    assert read_settings(tmp_path / name) == settings
    with Image.open(tmp_path / name) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == parameters_text(settings)
        assert image.format == kind
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(photo()))
    assert 0 < difference.mean() < most


def test_an_xmp_of_another_program_is_not_ours(tmp_path):
    """Or one that is damaged."""
    for name, xmp in (("a.webp", b"<x/>"), ("b.webp", b"<x"), ("c.jpg", b"\xff")):
        plain(RED).save(tmp_path / name, xmp=xmp)
        with pytest.raises(ValueError, match="contains no settings of this program"):
            read_settings(tmp_path / name)


def test_settings_that_do_not_fit_a_jpeg_are_left_out_and_the_image_is_saved(tmp_path):
    """64 kB each at most; PNG and WebP have no such limit."""
    settings = dict(prompt="long " * 10_000)                                      # 50 kB, 100 kB in UTF-16
    with pytest.warns(UserWarning, match="a.jpg: the settings do not fit the EXIF data of a JPEG file: save a PNG"):
        save_image(plain(RED), tmp_path / "a.jpg", settings)
    assert read_settings(tmp_path / "a.jpg") == settings
    settings = dict(prompt="long " * 20_000)
    with pytest.warns(UserWarning, match="do not fit"):
        save_image(plain(RED), tmp_path / "b.jpg", settings)
    assert np.abs(np.array(pixels(read_image(tmp_path / "b.jpg"))) - RED).max() < 3
    save_image(plain(RED), tmp_path / "a.webp", settings)
    assert read_settings(tmp_path / "a.webp") == settings


def test_an_image_too_large_for_its_format_becomes_a_png(tmp_path):
    """After minutes of computing it must not be lost."""
    assert path_for(plain(RED, (16383, 1)), tmp_path / "a.webp") == tmp_path / "a.webp"
    with pytest.warns(UserWarning, match="a.webp becomes a PNG file: the image has 16384 x 1 px, and WEBP can hold at"):
        assert path_for(plain(RED, (16384, 1)), tmp_path / "a.webp") == tmp_path / "a.png"
    assert path_for(plain(RED, (16384, 1)), tmp_path / "a.jpg").suffix == ".jpg"
    save_image(plain(RED, (16383, 1)), tmp_path / "a.webp", None)
    save_image(plain(RED, (65500, 1)), tmp_path / "a.jpg", None)


@pytest.mark.parametrize("name", ["bare.jpg", "bare.webp"])
def test_without_settings_no_file_carries_any(name, tmp_path):
    """Nor the metadata of the file that the image came from."""
    image = plain(RED)
    image.info.update(comment=b"private", exif=TURN.tobytes(), xmp=b"private", icc_profile=None)
    save_image(image, tmp_path / name, None)
    assert b"private" not in (tmp_path / name).read_bytes()
    with Image.open(tmp_path / name) as image:
        assert not image.getexif() and image.info.keys().isdisjoint(("exif", "xmp", "comment"))


def test_a_png_is_compressed_quickly_and_exactly(tmp_path):
    """At zlib's level 1, which the first two bytes of its stream tell: 6 takes three to five times as long."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    save_png(image, tmp_path / "a.png", None)
    content = (tmp_path / "a.png").read_bytes()
    assert content[content.index(b"IDAT") + 4:][:2] == b"\x78\x01"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image))


def test_without_settings_a_png_carries_no_text(tmp_path):
    """Not even the text of the file that the image came from: some users do not want to tell how it was made."""
    image = plain(RED)
    image.info.update(parameters="private", wuerstchen="{}")
    save_png(image, tmp_path / "bare.png", None)
    with Image.open(tmp_path / "bare.png") as image:
        assert image.text == {}


@pytest.mark.parametrize("save", [lambda path, **options: save_png(plain(RED), path, SETTINGS, **options),
                                  lambda path, **options: save_gif([plain(RED)], path, **options)])
def test_no_file_is_overwritten_silently(save, tmp_path):
    """Images take minutes, and someone may treasure an old one."""
    path = tmp_path / "image"
    path.write_text("treasured")
    with pytest.raises(FileExistsError,
                       match="image exists already and will not be overwritten: choose another name, or remove it"):
        save(path)
    assert path.read_text() == "treasured"
    save(path, overwrite=True)
    assert pixels(read_image(path))[0][0] == [255, 0, 0]


@pytest.mark.parametrize("save", [lambda path: save_png(plain(RED), path, None, overwrite=True),
                                  lambda path: save_gif([plain(RED)], path, overwrite=True)])
def test_a_save_that_fails_leaves_no_half_file_and_the_old_one(save, tmp_path, monkeypatch):
    """A full disk, say, in the middle of writing."""
    def full(self, path, *args, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    (tmp_path / "old").write_text("treasured")
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "treasured"


def test_missing_settings_are_explained(tmp_path):
    """Which file, and what it is instead; always in one line."""
    plain(RED).save(tmp_path / "bare.png")
    plain(RED).save(tmp_path / "photo.jpg")
    for name, content in (("broken.png", '{"seed": '), ("list.png", "[7]"), ("deep.png", "[" * 100_000)):
        text = PngInfo()
        text.add_text("wuerstchen", content)
        plain(RED).save(tmp_path / name, pnginfo=text)
    save_png(plain(RED, (400, 400)), tmp_path / "cut.png", SETTINGS)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-100])
    (tmp_path / "text.png").write_text("not an image")
    none, unreadable = "contains no settings of this program: ", "cannot be read: "
    for name, problem in {
            "bare.png": f"{none}expected a PNG, JPEG or WebP file just as it was saved",
            "photo.jpg": f"{none}expected a PNG, JPEG or WebP file just as it was saved",
            "broken.png": f"{none}its text 'wuerstchen' is not JSON \\(Expecting value",
            "list.png": f"{none}its text 'wuerstchen' is not a JSON object",
            "deep.png": f"{none}its text 'wuerstchen' is not JSON",
            "cut.png": f"{unreadable}presumably it is cut off",
            "text.png": f"{unreadable}it is not an image in a known format",
            "missing.png": f"{unreadable}there is no such file"}.items():
        with pytest.raises(ValueError, match=f"^{tmp_path / name} {problem}") as error:
            read_settings(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_gif_has_all_frames_and_loops_forever(tmp_path):
    """0.15 s each, and from the start again (loop 0)."""
    save_gif([plain(colour) for colour in (RED, GREEN, BLUE)], tmp_path / "steps.gif")
    with Image.open(tmp_path / "steps.gif") as movie:
        assert (movie.format, movie.n_frames, movie.info["loop"], movie.info["duration"]) == ("GIF", 3, 0, 150)
        for i, colour in enumerate((RED, GREEN, BLUE)):
            movie.seek(i)
            assert movie.convert("RGB").getpixel((0, 0)) == colour
    with pytest.raises(ValueError, match="got 0 images"):
        save_gif([], tmp_path / "none.gif")


# ----- latents as colours ---------------------------------------------------------------------------

def test_a_linear_world_is_found_again():
    """Colours that are a linear map of the latents, plus a constant: the fit returns that map and those colours."""
    latents = torch.randn(3, 4, 5, 6)                                             # (N, C, h, w)
    truth = torch.cat([0.05 * torch.randn(4, 3), torch.full((1, 3), 0.5)])        # (C + 1, 3)
    colours = torch.einsum("nchw,cd->ndhw", latents, truth[:-1]) + truth[-1][:, None, None]
    # (N, 3, 8h, 8w)  each colour a patch of its own
    large = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    matrix = fit_linear(latents, large)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(apply_linear(latents, matrix), colours, atol=1e-5, rtol=0)


def test_no_other_map_fits_better():
    """Any other map has a larger squared error, for colours that are not linear at all."""
    latents, images = torch.randn(4, 2, 6, 6), torch.rand(4, 3, 24, 24)
    matrix, goal = fit_linear(latents, images), torch.nn.functional.avg_pool2d(images, 4)
    best = (apply_linear(latents, matrix) - goal).square().sum()
    for _ in range(10):
        assert (apply_linear(latents, matrix + 0.01 * torch.randn(3, 3)) - goal).square().sum() > best


def test_a_channel_that_is_always_0_does_not_upset_the_fit():
    """Early in training some are; a solver that expects independent columns would give NaN."""
    latents = torch.randn(2, 3, 4, 4)
    latents[:, 1] = 0
    assert fit_linear(latents, torch.rand(2, 3, 8, 8)).isfinite().all()


def test_small_images_stay_within_0_and_1():
    """Latents far out would leave it; half precision is accepted."""
    matrix = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.25]])                   # one channel and the constant
    images = apply_linear(torch.full((1, 1, 2, 2), 9.0, dtype=torch.float16), matrix)
    assert images.dtype == torch.float32 and images[0, :, 0, 0].tolist() == [1, 0, 0.25]


def test_latents_and_images_must_belong_together():
    """One image per latent, one row of the matrix per channel and one for the constant."""
    with pytest.raises(ValueError,
                       match=r"got latents of shape \(2, 4, 4, 4\) for images of shape \(3, 3, 8, 8\): expected"):
        fit_linear(torch.rand(2, 4, 4, 4), torch.rand(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"and a matrix of shape \(4, 3\): expected \(B,C,h,w\) and \(C\+1,3\)"):
        apply_linear(torch.rand(2, 4, 4, 4), torch.rand(4, 3))
