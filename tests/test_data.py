"""What training relies on: every captioned image is found and counted, and the order never depends on processes."""
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from extras.images import read_image
from training import data, order, sources, tables
from training.data import BrokenImage, bucket_sizes, fit, nearest_bucket, open_dataset
from training.order import BatchSampler, sample_rng, split
from training.scenes import EmojiScenes


def noise_image(seed: int = 0, width: int = 80, height: int = 64) -> Image.Image:
    """Coarse noise: no two are alike, and JPEG does not change it much."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.NEAREST)


def encoded(image: Image.Image, suffix: str = ".png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    return buffer.getvalue()


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()[6:]


def swapped_srgb() -> bytes:
    """The profile of sRGB with the names of its red and its blue light exchanged."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return icc.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


SWAPPED = swapped_srgb()


def write(folder, files: dict[str, bytes | str]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(path, files: dict[str, bytes | str], **options):
    with tarfile.open(path, "w", **options) as shard:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def pairs(count: int, first: int = 0) -> dict[str, bytes | str]:
    """0.png, 0.txt, 1.png, ..."""
    return {name: content for i in range(first, first + count)
            for name, content in ((f"{i:03d}.png", encoded(noise_image(i))), (f"{i:03d}.txt", f"image {i}"))}


def captions_of(dataset) -> list[list[str]]:
    return [dataset.captions(i) for i in range(len(dataset))]


def names_of(dataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


# ----- folders ---------------------------------------------------------------------------------------

def test_a_folder_is_read_with_its_subfolders_in_the_order_of_names(tmp_path):
    """The order of a directory listing is arbitrary; a seed would mean something else on every machine."""
    write(tmp_path,
          {f"{name}.png": encoded(noise_image(i)) for i, name in enumerate(("b", "a", "sub/c", "sub/deep/d", "B"))})
    dataset = open_dataset(tmp_path, captions_required=False)
    assert names_of(dataset) == ["B.png", "a.png", "b.png", "sub/c.png", "sub/deep/d.png"]
    np.testing.assert_array_equal(dataset.read(1), np.asarray(noise_image(1)))
    assert dataset.sizes.dtype == np.int32 and dataset.sizes.tolist() == [[64, 80]] * 5
    assert captions_of(dataset) == [[""]] * 5
    with pytest.raises(IndexError):
        dataset.read(5)


def test_captions_stand_next_to_images_one_per_line_or_as_a_whole(tmp_path):
    """Of several captions, training draws one per visit."""
    image = encoded(noise_image())
    write(tmp_path, {"a.png": image, "a.txt": "\ufeffone\r\n\r\n  two  words \n", "b.PNG": image,
                     "b.caption": "a tale\nof two lines",
                     "c.png": image, "c.json": json.dumps({"caption": "from json", "width": 3}), "d.e.png": image,
                     "d.e.txt": "dotted",
                     "f.png": image, "f.txt": "text wins", "f.caption": "no", "f.json": '{"caption": "no"}',
                     "README.txt": "not a caption"})
    assert captions_of(open_dataset(tmp_path)) == [["one", "two words"], ["a tale of two lines"], ["from json"],
                                                    ["dotted"], ["text wins"]]


def test_metadata_takes_precedence_and_the_nearest_file_counts(tmp_path):
    """The Hub's ImageFolder layout; U+2028 inside a text does not end a line."""
    image = encoded(noise_image())
    rows = [{"file_name": "a.png", "text": "from\u2028metadata"}, {"file_name": "sub/b.png", "text": "too far"},
            {"file_name": "c.png", "captions": ["x", "y", ""]}, {"file_name": "gone.png", "text": "?"}]
    write(tmp_path, {"a.png": image, "a.txt": "beside", "sub/b.png": image, "c.png": image, "d.png": image,
                     "d.txt": "beside d",
                     "metadata.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"})
    with open(tmp_path / "sub" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "captions"],
                                    ["b.png", json.dumps(['near, with "commas"', "and\nlines"])]])
    dataset = open_dataset(tmp_path)
    assert captions_of(dataset) == [["from metadata"], ["x", "y"], ["beside d"], ['near, with "commas"', "and lines"]]
    assert dataset.skipped == [("gone.png", "named in metadata.jsonl, but not there")]


@pytest.mark.parametrize("name, text, message", [
    ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": ',
     "metadata.jsonl, row 2: .*expected file_name and text"),
    ("metadata.jsonl", '{"image": "a.png"}', "metadata.jsonl, row 1: 'file_name'"),
    ("metadata.jsonl", '["a.png"]', "metadata.jsonl, row 1"),
    ("metadata.csv", "name,text\na.png,hello", "metadata.csv, row 1: 'file_name'"),
])
def test_metadata_that_cannot_be_read_stops_with_its_row(tmp_path, name, text, message):
    """Continuing without it would train on other captions."""
    write(tmp_path, {"a.png": encoded(noise_image()), name: text})
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_hidden_images_are_left_out_counted_and_named(tmp_path, packed):
    """macOS puts ._x.png next to x.png on foreign disks, and file managers make folders of thumbnails."""
    write(tmp_path / "data", {"x.png": encoded(noise_image()), "x.txt": "a cat", "._x.png": b"not an image",
                              "._x.txt": "no caption", ".DS_Store": b"", ".thumbs/x.png": encoded(noise_image())})
    if packed:
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            for name in ("x.png", "x.txt", "._x.png", ".DS_Store"):
                tar.add(tmp_path / "data" / name, name)
    dataset = open_dataset(tmp_path / ("data.tar" if packed else "data"))
    names = {name.split("/")[-1]: why for name, why in dataset.skipped}
    assert len(dataset) == 1 and names.keys() == ({"._x.png"} if packed else {"._x.png", ".thumbs"})
    assert all(why.startswith("hidden") for why in names.values())


@pytest.mark.parametrize("options, message", [
    (dict(caption_column="text"), "--caption-column text has no caption, found: no named captions"),
    (dict(image_column="image"), "--image-column image is for tables and metadata files, and there are none")])
def test_a_column_of_a_folder_without_columns_is_refused(tmp_path, options, message):
    """It would do nothing, and nobody would know."""
    write(tmp_path, {"x.png": encoded(noise_image()), "x.txt": "a cat"})
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, **options)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_sizes_are_of_the_upright_image(tmp_path, suffix):
    """Read from the header, and the same as in read(): phones store most photos lying on their side."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(tmp_path, {f"{orientation}{suffix}": encoded(noise_image(), suffix, exif=exif)})
    dataset = open_dataset(tmp_path, captions_required=False)
    for i in range(8):
        assert tuple(dataset.sizes[i]) == dataset.read(i).shape[:2] == ((64, 80) if i < 4 else (80, 64))


@pytest.mark.parametrize("kind, content", [
    (b"eXIf", exif_of(6)), (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  26\n" + exif_of(6).hex().encode()))],
    ids=("eXIf", "XMP", "raw"))
@pytest.mark.parametrize("damage", [0, 1], ids=("whole", "damaged"))
@pytest.mark.parametrize("place", [33, -12], ids=("before", "behind"))
def test_index_and_reader_agree_on_the_orientation_of_a_png(kind, content, damage, place, tmp_path):
    """It may be stored before the pixels or behind them; with a wrong checksum it does not count, for either."""
    chunk = (struct.pack(">I", len(content)) + kind + content
             + struct.pack(">I", zlib.crc32(kind + content) ^ damage))
    png = encoded(noise_image())
    write(tmp_path, {"a.png": png[:place] + chunk + png[place:]})
    tar(tmp_path / "a.tar", {"a.png": png[:place] + chunk + png[place:], "b.png": png})
    for source in (tmp_path / "a.png").parent, tmp_path / "a.tar":
        dataset = open_dataset(source, captions_required=False)
        assert tuple(dataset.sizes[0]) == dataset.read(0).shape[:2] == ((64, 80) if damage else (80, 64))


def test_metadata_that_is_broken_or_too_large_costs_no_image(tmp_path):
    """Neither when the index is made nor in a training step."""
    content = b"note\0\0" + zlib.compress(bytes(2 ** 21))
    text = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    png = encoded(noise_image())
    write(tmp_path, {"a.png": png[:33] + text + png[33:], "b.png": png[:-12] + text + png[-12:],
                     "c.png": encoded(noise_image(), exif=b"Exif\0\0garbage"),
                     "d.webp": encoded(noise_image(), ".webp", exif=b"garbage", lossless=True)})
    dataset = open_dataset(tmp_path, captions_required=False)
    assert names_of(dataset) == ["a.png", "b.png", "c.png", "d.webp"]
    for i in range(4):
        np.testing.assert_array_equal(dataset.read(i), np.asarray(noise_image()))
        assert dataset.key(i) == hashlib.sha256((tmp_path / dataset.name(i)).read_bytes()).hexdigest()


def test_files_with_an_image_like_suffix_are_read_or_named(tmp_path):
    """JFIF is JPEG, as some browsers save it. A folder of a phone's HEIC files must not look empty."""
    write(tmp_path, {"a.JFIF": encoded(noise_image(), ".jpg", quality=100, subsampling="4:4:4"),
                     "b.avif": encoded(noise_image(), ".avif", quality=100, subsampling="4:4:4"),
                     "c.heic": "?", "d.CR2": "?", "e.xyz": "?", "f.avif": "not an image"})
    dataset = open_dataset(tmp_path, captions_required=False)
    assert names_of(dataset) == ["a.JFIF", "b.avif"]
    assert dict(dataset.skipped) == {"c.heic": ".heic files cannot be read: save it as .png or .jpg",
                                     "d.CR2": ".cr2 files cannot be read: save it as .png or .jpg",
                                     "f.avif": "it is not an image in a known format"}
    for i in range(2):
        assert np.abs(dataset.read(i).astype(int) - np.asarray(noise_image())).mean() < 3


def test_colour_profiles_count_and_so_does_the_key(tmp_path):
    """Latents that were cached from other colours must not be found; those of images without a profile must be."""
    bare, swapped = encoded(noise_image()), encoded(noise_image(), icc_profile=SWAPPED)
    srgb = encoded(noise_image(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    write(tmp_path / "set", {"a.png": bare, "b.png": swapped, "c.png": srgb,
                             "d.png": encoded(noise_image(), icc_profile=b"garbage")})
    dataset = open_dataset(tmp_path / "set", captions_required=False, index_folder=tmp_path / "index")
    # A line of keys.txt as it was written when profiles did not count.
    stat = (tmp_path / "set" / "b.png").stat()
    version = f"{tmp_path / 'set' / 'b.png'} 0 -1 {stat.st_size} {stat.st_mtime_ns}"
    write(tmp_path, {"index/keys.txt": f"{hashlib.sha256(version.encode()).hexdigest()[:24]} {'0' * 64}\n"})
    keys = [dataset.key(i) for i in range(4)]
    files = [hashlib.sha256(content).hexdigest() for content in (bare, swapped, srgb)]
    assert keys[:3] == [files[0], hashlib.sha256(swapped + b" in sRGB").hexdigest(), files[2]] and len({*keys}) == 4
    images = [dataset.read(i).astype(int) for i in range(4)]
    for i in (0, 2, 3):
        np.testing.assert_array_equal(images[i], np.asarray(noise_image()))
    reference = (read_image(tmp_path / "set" / "b.png") * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(images[1], reference)
    assert np.abs(images[1] - images[0][..., ::-1]).max() <= 3                   # red and blue have changed places


@pytest.mark.parametrize("suffix, image", [
    (".png", noise_image().convert("RGBA").rotate(30)), (".png", noise_image().convert("P")),
    (".png", noise_image().convert("L")),
    (".png", Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
    (".png", noise_image().convert("1")),
    (".jpg", noise_image().convert("CMYK")), (".webp", noise_image().convert("RGBA").rotate(30)),
    (".bmp", noise_image()),
    (".tif", noise_image().convert("LA")), (".tif", noise_image().convert("F").point(lambda value: value / 255)),
])
def test_images_of_all_kinds_are_read_as_the_model_would_read_them(tmp_path, suffix, image):
    """Transparent pixels lie over white, 16 bits and floats are scaled: images.read_image is the reference."""
    write(tmp_path, {f"a{suffix}": encoded(image, suffix)})
    found = open_dataset(tmp_path, captions_required=False).read(0)
    expected = (read_image(tmp_path / f"a{suffix}") * 255).round().byte().permute(1, 2, 0).numpy()
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, expected)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [noise_image(i).convert("L") for i in range(3)]
    write(tmp_path, {"a.gif": encoded(frames[0], ".gif", save_all=True, append_images=frames[1:])})
    np.testing.assert_array_equal(open_dataset(tmp_path, captions_required=False).read(0)[..., 0],
                                  np.asarray(frames[0]))


def test_headers_longer_than_the_first_read_are_read_completely(tmp_path):
    """A preview or a colour profile may precede the size; a phone's JPEG file may contain several images."""
    profile = np.random.default_rng(0).bytes(2 * sources.HEAD)
    write(tmp_path, {"a.jpg": encoded(noise_image(), ".jpg", icc_profile=profile),
                     "b.png": encoded(noise_image(), icc_profile=profile),
                     "c.jpg": encoded(noise_image(0, 800, 640), ".mpo", save_all=True,
                                      append_images=[noise_image(1, 800, 640)] * 3, quality=100)})
    assert (tmp_path / "c.jpg").stat().st_size > 2 * sources.HEAD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_dataset(tmp_path, captions_required=False)
    assert dataset.sizes.tolist() == [[64, 80], [64, 80], [640, 800]]


def test_unusable_files_are_counted_and_named(tmp_path):
    """A silent drop looks like training."""
    write(tmp_path, {**pairs(2), "tiny.png": encoded(noise_image(0, 80, 32)), "tiny.txt": "tiny",
                     "mute.png": encoded(noise_image()),
                     "blank.png": encoded(noise_image()), "blank.txt": " \n", "empty.jpg": "", "empty.txt": "x",
                     "text.jpg": "not an image",
                     "latin.png": encoded(noise_image()), "latin.txt": "caf\xe9".encode("latin-1"), "late.tar": "x",
                     "list.png": encoded(noise_image()), "list.json": "[1]", "._000.png": "a Mac's",
                     ".trash/a.png": "deleted"})
    dataset = open_dataset(tmp_path)
    assert names_of(dataset) == ["000.png", "001.png"]
    reasons = dict(dataset.skipped)
    assert reasons.keys() == {"tiny.png", "mute.png", "blank.png", "empty.jpg", "text.jpg", "latin.png", "list.png",
                              "late.tar", "._000.png", ".trash"}
    assert reasons["tiny.png"] == "80 x 32 px, fewer than 64"
    assert reasons["mute.png"] == reasons["blank.png"] == "no caption"
    assert reasons["empty.jpg"] == reasons["text.jpg"] == "it is not an image in a known format"
    assert reasons["late.tar"] == "a shard next to images: give it as a source of its own"
    assert reasons["latin.png"].startswith("its text cannot be read: 'utf-8'")
    assert re.fullmatch(rf"2 images in {re.escape(str(tmp_path))}; 10 skipped: (\S+ \(.*\)(, )?){{5}}\.\.\.",
                        dataset.describe())
    assert len(open_dataset(tmp_path, min_side=32)) == 3


def test_links_are_followed_but_not_in_circles(tmp_path):
    """Large datasets are often assembled from links."""
    write(tmp_path / "elsewhere", pairs(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert names_of(open_dataset(tmp_path / "set")) == ["linked/000.png", "linked/001.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="back is a link to a folder that is already below .*remove the link"):
        open_dataset(tmp_path / "set")


def test_a_truncated_file_is_found_when_it_is_read_and_the_next_of_its_size_replaces_it(tmp_path):
    """The same one in every run, whatever was read before, or a resumed run would differ from an unbroken one."""
    write(tmp_path, pairs(6))
    for i in (2, 5):
        (tmp_path / f"{i:03d}.png").write_bytes(encoded(noise_image(i))[:-200])
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 6 and not dataset.skipped
    with pytest.raises(BrokenImage, match=r"^002.png cannot be read: .*truncated"):
        dataset.read(2)
    allowed = np.array([1, 2, 4, 5])
    for _ in range(2):
        for i, expected in ((1, 1), (2, 4), (5, 1)):       # after the last comes the first
            array, j = dataset.read_or_next(i, allowed)
            assert j == expected
            np.testing.assert_array_equal(array, np.asarray(noise_image(j)))
    assert [name for name, _ in dataset.skipped] == ["002.png", "005.png"] and "truncated" in dataset.skipped[0][1]
    assert len(dataset) == 6                              # numbers stay the same
    with pytest.raises(BrokenImage, match="none of 2 images of this size can be read; 2 skipped: 002.png"):
        dataset.read_or_next(5, np.array([2, 5]))


def test_a_deleted_file_is_a_broken_image(tmp_path):
    dataset = open_dataset(write(tmp_path, pairs(2)))
    (tmp_path / "000.png").unlink()
    with pytest.raises(BrokenImage, match="000.png cannot be read: there is no such file"):
        dataset.read(0)


def test_the_key_is_the_content_and_is_computed_once_per_file(tmp_path, monkeypatch):
    """A cache keyed by names would return old latents for new images; hashing a terabyte at each start takes hours."""
    write(tmp_path / "set", pairs(3))
    write(tmp_path / "set", {"003.png": encoded(noise_image(0)), "003.txt": "the same again"})
    first = open_dataset(tmp_path / "set", index_folder=tmp_path / "index")
    keys = [first.key(i) for i in range(4)]
    assert keys[0] == keys[3] == hashlib.sha256(encoded(noise_image(0))).hexdigest() and len(set(keys)) == 3
    with open(tmp_path / "index" / "keys.txt", "a") as file:
        file.write("0123 torn line")
    write(tmp_path / "set", {"002.png": encoded(noise_image(7))})
    again = open_dataset(tmp_path / "set", index_folder=tmp_path / "index")
    read = []
    monkeypatch.setattr(data, "content_of", lambda place: read.append(place[0]) or sources.content_of(place))
    assert [again.key(i) for i in range(4)] == [*keys[:2], hashlib.sha256(encoded(noise_image(7))).hexdigest(), keys[3]]
    assert read == [str(tmp_path / "set" / "002.png")]


@pytest.mark.parametrize("files, options, message", [
    ({}, {}, "no image to train on. Looked for .jpg .* with a caption in NAME.txt.*; found no file; 0 skipped"),
    ({"a.md": "", "b.md": "", "c.heic": "", "LICENSE": ""}, {}, "found 2 .md, 1 without suffix, 1 .heic; "
     r"1 skipped: c.heic \(.heic files cannot be read: save it as .png or .jpg\)"),
    ({"a.png": encoded(noise_image())}, {}, r"found 1 .png; 1 skipped: a.png \(no caption\)"),
    ({"a.png": encoded(noise_image(0, 16, 16))}, dict(captions_required=False),
     r"Looked for [^,]*\.tiff; .*a.png \(16 x 16 px, fewer than 64\)"),
])
def test_an_empty_dataset_says_what_was_looked_for_and_what_was_found(tmp_path, files, options, message):
    """Otherwise an empty loop would end at once, as if all were well."""
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(write(tmp_path, files), **options)
    assert "\n" not in str(error.value)


# ----- shards ----------------------------------------------------------------------------------------

def test_a_tar_file_equals_the_same_folder(tmp_path):
    """Random access: read by offset, in any order, also by worker processes."""
    files = {**pairs(5), "sub/x.jpg": encoded(noise_image(9), ".jpg"),
             "sub/x.json": '{"text": "from json", "other": null}',
             "n" * 150 + ".webp": encoded(noise_image(8), ".webp"), "n" * 150 + ".caption": "a long name",
             "._000.png": "a Mac's"}
    folder = open_dataset(write(tmp_path / "folder", files))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        shard = pickle.loads(pickle.dumps(open_dataset(tar(tmp_path / f"{form}.tar", files, format=form))))
        in_shard = {name.removeprefix(f"{tmp_path / str(form)}.tar/"): i for i, name in enumerate(names_of(shard))}
        assert len(shard) == len(folder) == 7 and len(shard.skipped) == len(folder.skipped) == 1       # ._000.png
        for i, name in reversed(list(enumerate(names_of(folder)))):
            j = in_shard[name]
            assert folder.captions(i) == shard.captions(j) and folder.key(i) == shard.key(j)
            assert (folder.sizes[i] == shard.sizes[j]).all()
            np.testing.assert_array_equal(folder.read(i), shard.read(j))


def test_a_tar_file_is_scanned_once(tmp_path, monkeypatch):
    """The second time its index is read. An index of another file, or an incomplete one, is rebuilt."""
    path = tar(tmp_path / "a.tar", pairs(3))
    counted = []
    monkeypatch.setattr(sources, "_tar_places", lambda path, original=sources._tar_places: counted.append(path)
                        or original(path))
    first, second = open_dataset(path), open_dataset(path)
    assert len(counted) == 1 and captions_of(first) == captions_of(second)
    assert first.sizes.tolist() == second.sizes.tolist()
    index = tmp_path / "a.tar.index.json"
    for damage in (index.read_text()[:50], "[]", '{"stamp": 3}'):
        index.write_text(damage)
        assert len(open_dataset(path)) == 3
    tar(path, pairs(4))
    assert len(open_dataset(path)) == 4 and len(counted) == 5
    tar(path, pairs(4, first=1))                           # of the same size
    os.utime(path, ns=(0, 10 ** 9))
    assert captions_of(open_dataset(path))[0] == ["image 1"] and len(counted) == 6
    assert len(open_dataset(path, index_folder=tmp_path / "elsewhere")) == 4 and len(counted) == 7
    assert len(list((tmp_path / "elsewhere").glob("a-*.index.json"))) == 1


def test_an_index_contains_everything_found_whatever_the_options(tmp_path):
    """Made under strict options, it must not hide images from lenient ones."""
    path = tar(tmp_path / "a.tar", {**pairs(2), "tiny.png": encoded(noise_image(0, 40, 40)), "tiny.txt": "tiny"})
    assert len(open_dataset(path)) == 2 and len(open_dataset(path, min_side=8)) == 3
    assert len(open_dataset(path, min_side=8)) == 3


def test_shards_in_a_folder_without_write_permission_are_still_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(sources, "write_atomically", refuse)
    assert len(open_dataset(tar(tmp_path / "a.tar", pairs(2)))) == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("source", ["{}/s-*.tar", "{}/s-{{00..02}}.tar", "{}/s-0{{0,1,2}}.tar",
                                    "{}/{{s,}}-{{00..02}}.tar", "{}"])
def test_globs_braces_and_folders_name_shards_in_order(tmp_path, source):
    """The ways to name shards; their order is part of the seed's meaning."""
    for i in (2, 0, 1):
        tar(tmp_path / f"s-0{i}.tar", pairs(2, 2 * i))
        if "{{s," in source:
            tar(tmp_path / f"-0{i}.tar", pairs(2, 2 * i))
    found = captions_of(open_dataset(source.format(tmp_path)))
    assert found == [[f"image {i}"] for i in range(6)] * (2 if "{{s," in source else 1)


@pytest.mark.parametrize("pattern, expected", [
    ("a{8..11}.tar", ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]), ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
    ("${HOME}/{x}", ["${HOME}/{x}"]), ("${A,B}", ["${A,B}"]), ("plain", ["plain"]),
])
def test_braces_are_expanded_as_in_a_shell(pattern, expected):
    assert sources._expand(pattern) == expected


def test_a_truncated_shard_gives_its_complete_files_and_says_so(tmp_path):
    """tarfile takes a damaged header for the end: half a download would pass for a smaller shard."""
    whole = tar(tmp_path / "whole.tar", pairs(4)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    rng = random.Random(0)
    cuts = [512, 700, 1024, *(rng.randrange(512, end) for _ in range(20)), end]
    for cut in cuts:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        try:
            dataset = open_dataset(path, captions_required=False)
        except ValueError as error:              # not even one image is complete
            assert cut < 2000 and ("cut.tar" in str(error))
            continue
        assert "cut off or damaged after" in dict(dataset.skipped)[f"{path}/..."]
        for i in range(len(dataset)):
            np.testing.assert_array_equal(dataset.read(i), np.asarray(noise_image(i)))
    damaged = bytearray(whole)
    at = whole.index(b"002.png")
    damaged[at:at + 512] = b"x" * 512
    path.write_bytes(damaged)
    dataset = open_dataset(path)
    assert len(dataset) == 2 and dict(dataset.skipped) == {f"{path}/...": "cut off or damaged after 4 files"}


def test_a_name_that_occurs_twice_in_a_shard_is_counted(tmp_path):
    """As with tar itself, the last one counts."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for seed in (1, 2):
            member = tarfile.TarInfo("./a.png")
            member.size = len(encoded(noise_image(seed)))
            shard.addfile(member, io.BytesIO(encoded(noise_image(seed))))
    dataset = open_dataset(tmp_path / "a.tar", captions_required=False)
    np.testing.assert_array_equal(dataset.read(0), np.asarray(noise_image(2)))
    assert dataset.skipped == [(f"{tmp_path}/a.tar/a.png", "twice in the shard, the last one counts")]


@pytest.mark.parametrize("make, source, message", [
    (lambda f: (f / "a.tar").write_bytes(gzip.compress(tar(f / "b.tar", pairs(1)).read_bytes())), "{}/a.tar",
     "a.tar is compressed.*unpack it"),
    (lambda f: (f / "a.tar").write_text("<html>404"), "{}/a.tar",
     "a.tar cannot be read as a tar file: expected a folder"),
    (lambda f: (f / "a.tar").write_text(""), "{}/a.tar", "a.tar cannot be read as a tar file"),
    (lambda f: (f / "a.png").write_bytes(encoded(noise_image())), "{}/a.png",
     "a.png is a single image: expected a folder of images"),
    (lambda f: tar(f / "a.tar", {"x.md": ""}), "{}/a.tar", "no image to train on.*found 1 .md"),
    (lambda f: tar(f / "s-1.tar", pairs(1)), "{}/s-{{0..3}}.tar",
     "s-0.tar: there is no such folder or file, and 2 more of .* are missing"),
    (lambda f: None, "{}/*.tar", r"\*.tar: there is no such folder or file$"),
    (lambda f: None, "{}/nowhere", "nowhere: there is no such folder or file$"),
    (lambda f: None, "{}/s-{{3..1}}.tar", r"range \{3..1\} is empty"),
    (lambda f: None, "https://host/a.tar",
     "not on this disk: give the command that fetches it, such as 'pipe:curl -sfL https://host/a.tar'"),
    (lambda f: None, "s3://bucket/a.tar", "not on this disk"),
    (lambda f: None, "pipe:cat a.tar", "pipe:cat a.tar needs an index_folder"),
])
def test_sources_that_cannot_be_read_say_why(tmp_path, make, source, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(source.format(tmp_path))
    assert "\n" not in str(error.value)


# ----- pipes, parquet files, the Hub -----------------------------------------------------------------

def test_the_output_of_a_pipe_is_kept_and_fetched_once(tmp_path):
    """From then on it is a tar file on this disk, read in any order."""
    for i in range(2):
        tar(tmp_path / f"{i}.tar", pairs(2, 2 * i))
    source = f"pipe:echo fetched >> {tmp_path}/log; cat {tmp_path}/{{0..1}}.tar | cat"
    for _ in range(2):
        dataset = open_dataset(source, index_folder=tmp_path / "kept")
        assert captions_of(dataset) == [[f"image {i}"] for i in range(4)]
        np.testing.assert_array_equal(dataset.read(3), np.asarray(noise_image(3)))
    assert (tmp_path / "log").read_text() == "fetched\n" * 2 and len(list((tmp_path / "kept").glob("*.tar"))) == 2


@pytest.mark.parametrize("command, message", [
    ("echo no such host >&2; exit 6", "failed with exit status 6: no such host"),
    ("head -c 3000 {}/a.tar", "its output of 3000 bytes is cut off"),
    ("cat {}/missing.tar | cat", "its output cannot be read as a tar file.*No such file"),
    ("gzip -c {}/a.tar", "its output is compressed"),
    ("true", "its output cannot be read as a tar file.*it gave no message"),
])
def test_a_pipe_that_fails_leaves_nothing_behind(tmp_path, command, message):
    """Half a shard kept under the name of a complete one would be used forever."""
    tar(tmp_path / "a.tar", pairs(3))
    with pytest.raises(ValueError, match=message) as error:
        open_dataset("pipe:" + command.format(tmp_path), index_folder=tmp_path / "kept")
    assert "\n" not in str(error.value) and not list((tmp_path / "kept").iterdir())


def test_no_local_path_is_ever_given_to_a_shell(tmp_path, monkeypatch):
    """Another trainer turned every path into a download command."""
    def refuse(*_, **__):
        raise AssertionError("a command was run")
    monkeypatch.setattr(subprocess, "run", refuse)
    folder = tmp_path / "s3 $(touch oops); `x`"
    folder.mkdir()
    for name in ("a|b.tar", "pipe:x.tar", "[1].tar", "{1,2}.tar"):
        assert len(open_dataset(tar(folder / name, pairs(1)))) == 1
    assert len(open_dataset(folder)) == 4 and not list(tmp_path.glob("**/oops"))


def table(count: int) -> list[dict]:
    return [{"image": {"bytes": encoded(noise_image(i)), "path": None}, "text": f"image {i}", "score": i / 4,
             "note": None} for i in range(count)]


@pytest.fixture
def no_optional_packages(monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("source, message",
                         [("{}/a.parquet", "a.parquet needs the package pyarrow: pip install pyarrow"),
                                             ("{}", "a.parquet needs the package pyarrow"),
                                             ("hub:some/set:test",
                                              "hub:some/set needs the package datasets: pip install datasets")])
def test_a_missing_package_is_named(tmp_path, no_optional_packages, source, message):
    """Few need it, so it is not installed with the rest."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=message):
        open_dataset(source.format(tmp_path), index_folder=tmp_path / "kept")


class HubRows(list):
    """Rows as the package datasets returns them: decoded, which opens the files that they name, unless as arrow."""
    def __init__(self, rows, **features):
        super().__init__(rows)
        self.features = features

    def __iter__(self):
        raise AssertionError("this would decode")

    def with_format(self, name):
        assert name == "arrow"
        return self

    def iter(self, size):
        return (types.SimpleNamespace(to_pylist=lambda start=start: self[start:start + size])
                for start in range(0, len(self), size))


def stand_in_for_datasets(monkeypatch, load_dataset, **data_files):
    builder = types.SimpleNamespace(config=types.SimpleNamespace(data_files=data_files), repo_id=None)
    module = types.SimpleNamespace(load_dataset=load_dataset, Image=int, load_dataset_builder=lambda *_: builder)
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize("file", ["/home/me/x.parquet", "zip://*.png::/home/me/x.zip", "file:///x.tar", "s3://mine/x"])
def test_a_dataset_of_the_hub_that_names_other_files_is_refused(file, tmp_path, monkeypatch):
    """Its README may name any, and the package would read them."""
    stand_in_for_datasets(monkeypatch, None, train=["hf://datasets/a/b@0/x.parquet", file])
    with pytest.raises(ValueError, match=f"hub:a/b cannot be loaded: it names {re.escape(file)}, which is not a"):
        open_dataset("hub:a/b", index_folder=tmp_path)


def test_a_dataset_of_the_hub_becomes_a_tar_file_once(tmp_path, monkeypatch):
    """With a stand-in for the package: images as bytes, and text and numbers in the other columns."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if "/" not in name:
            raise FileNotFoundError("Couldn't find it\nanywhere")
        return HubRows(table(3), image=0, text=None)
    stand_in_for_datasets(monkeypatch, load_dataset)
    for _ in range(2):
        dataset = open_dataset("hub:some/set:test", index_folder=tmp_path, min_score=0.25)
        assert captions_of(dataset) == [["image 1"], ["image 2"]]
        np.testing.assert_array_equal(dataset.read(1), np.asarray(noise_image(2)))
    open_dataset("hub:some/set", index_folder=tmp_path)
    assert asked == [("some/set", "test"), ("some/set", "train")]
    with pytest.raises(ValueError, match="hub:nowhere cannot be loaded: Couldn't find it$"):
        open_dataset("hub:nowhere", index_folder=tmp_path)


def test_parquet_files_become_tar_files_once(tmp_path):
    """A row of a parquet file cannot be read without its neighbors."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    (tmp_path / "set").mkdir()
    for i in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(table(20 + i)), tmp_path / "set" / f"{i}.parquet")
    for source in (tmp_path / "set", f"{tmp_path}/set/*.parquet", f"{tmp_path}/set/{{0..1}}.parquet"):
        dataset = open_dataset(source, index_folder=tmp_path / "kept", max_score=5)
        assert len(dataset) == 41 and dataset.captions(20) == ["image 0"]
        np.testing.assert_array_equal(dataset.read(40), np.asarray(noise_image(20)))
    assert len(list((tmp_path / "kept").glob("*.tar"))) == 2


def test_a_table_without_images_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="row 0 has no image: expected a column of bytes, found url, text"):
        tables.write_tar(tables.Table("a", {"url": False, "text": False}, [{"url": "http://", "text": "x"}]),
                         tmp_path / "a.tar")

# ----- what people's files are like --------------------------------------------------------------------

def test_a_caption_with_half_a_character_and_a_deep_json_cost_one_image(tmp_path):
    """The first was a TypeError in a training step, in every resumed run as well; the second ended the run at once."""
    files = pairs(2)
    for name, text in (("half", '{"text": "a cat \\ud83d on a mat"}'), ("deep", "[" * 100_000),
                       ("list", json.dumps({"text": "[" * 100_000})), ("whole", '{"text": "\\ud83d\\ude00"}')):
        files |= {f"{name}.png": encoded(noise_image()), f"{name}.json": text}
    rows = [{"file_name": "row.png", "text": "\ud83d"}, {"file_name": "\udce9.png", "text": "?"}]
    files |= {"row.png": encoded(noise_image()), "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    for source in (write(tmp_path / "folder", files), tar(tmp_path / "a.tar", files)):
        dataset = open_dataset(source)
        assert captions_of(dataset) == [["image 0"], ["image 1"], ["[" * 100_000], ["\U0001f600"]]
        reasons = {name.removeprefix(f"{source}/"): why for name, why in dataset.skipped}
        assert reasons.keys() == {"half.png", "deep.png", "row.png", "\\udce9.png"}
        assert "half a character, \\ud83d" in reasons["half.png"] and "half a character" in reasons["row.png"]
        assert "nested too deeply" in reasons["deep.png"]
        dataset.describe().encode()
    with pytest.raises(ValueError, match="row 1: its JSON is nested too deeply"):
        open_dataset(write(tmp_path / "rows", {**pairs(1), "metadata.jsonl": "[" * 100_000}))


def test_names_of_files_need_not_be_utf_8(tmp_path):
    """Nothing that is printed or hashed may fail because of a name in Latin-1."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    with open(path, "wb") as file:
        file.write(encoded(noise_image()))
    write(tmp_path, {"b.png": "?"})
    os.rename(tmp_path / "b.png", os.fsdecode(os.fsencode(tmp_path) + b"/b\xe9.png"))
    dataset = open_dataset(tmp_path, captions_required=False)
    assert names_of(dataset) == ["caf\\udce9.png"] and dataset.skipped[0][0] == "b\\udce9.png"
    assert dataset.key(0) == hashlib.sha256(encoded(noise_image())).hexdigest()
    np.testing.assert_array_equal(dataset.read(0), np.asarray(noise_image()))


def test_names_that_differ_only_in_unicode_form_belong_together(tmp_path):
    """macOS writes the accent of é as a character of its own, and metadata from elsewhere does not."""
    one, two, image = "caf\u00e9", "cafe\u0301", encoded(noise_image())
    files = {f"a/{one}.png": image, f"a/{two}.txt": "a", f"b/{two}.png": image, f"b/{one}.txt": "b",
             f"c/{two}.png": image, "c/metadata.jsonl": json.dumps({"file_name": f"{one}.png", "text": "c"}),
             f"d/{one}.png": image, f"d/{two}.png": image, f"d/{one}.txt": "d1", f"d/{two}.txt": "d2"}
    for source in (write(tmp_path / "folder", files), tar(tmp_path / "a.tar", files)):
        dataset = open_dataset(source)
        captions = dict(zip(names_of(dataset), captions_of(dataset)))
        assert sorted(captions.values()) == [["a"], ["b"], ["c"], ["d1"], ["d2"]]
        assert [texts for name, texts in captions.items() if name.endswith(f"d/{two}.png")] == [["d2"]]
        assert not dataset.skipped


def test_several_folders_are_one_source(tmp_path):
    """In braces or by a glob. Images of the same name in two folders are kept apart."""
    for name, first in (("a", 0), ("b", 2)):
        write(tmp_path / name, pairs(2, first))
        (tmp_path / name / "000.txt").write_text("same name")
    tar(tmp_path / "c.tar", pairs(1, 9))
    for source, tail in ((f"{tmp_path}/{{a,b}}", []), (f"{tmp_path}/[ab]", []), (f"{tmp_path}/*", [["image 9"]])):
        dataset = open_dataset(source, index_folder=tmp_path.parent / "index")
        assert captions_of(dataset) == [["same name"], ["image 1"], ["image 2"], ["image 3"], *tail]
        assert names_of(dataset)[:3] == [f"{tmp_path}/a/000.png", f"{tmp_path}/a/001.png", f"{tmp_path}/b/002.png"]


def test_the_numbers_in_names_of_folders_are_named_as_not_used(tmp_path):
    """kohya's scripts take 10_cat for: show each image ten times. A folder 2024_photos must not be seen 2024 times."""
    write(tmp_path / "10_cat", pairs(1))
    write(tmp_path / "sub" / "5_dog", pairs(1))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2
    assert dataset.describe().endswith("; the number in 10_cat, 5_dog is not used: no image is repeated")
    assert "10_cat is not used" in open_dataset(tmp_path / "10_cat").describe()
    assert "not used" not in open_dataset(write(tmp_path / "2024_photos", pairs(1))).describe()


@pytest.mark.parametrize("rows, option, captions, note", [
    ([{"Prompt": "p", "x": 1}], {}, ["p"], "captions from Prompt"),
    ([{"prompt": "p", "text": "t", "caption": None}], {}, ["t"], "captions from text"),
    ([{"prompt": "p", "text": "t"}], dict(caption_column="prompt"), ["p"], "captions from prompt"),
    ([{"title": "p", "text": "t"}], dict(caption_column="title"), ["p"], "captions from title"),
    ([{"title": "p", "text": ""}], {}, None, "no caption among its keys text, title: --caption-column chooses one"),
    ([{"title": "p"}], dict(caption_column="tilte"), None, "no caption among its keys title"),
])
def test_captions_are_taken_from_usual_keys_or_the_one_that_is_chosen(tmp_path, rows, option, captions, note):
    """And what was taken is printed. Of a folder, its .json and metadata; of a shard, its index is made for the key."""
    image = encoded(noise_image())
    sources_ = [write(tmp_path / "json", {"a.png": image, "a.json": json.dumps(rows[0])}),
                write(tmp_path / "rows", {"a.png": image,
                                          "metadata.jsonl": json.dumps({"file_name": "a.png", **rows[0]})}),
                tar(tmp_path / "a.tar", {"a.png": image, "a.json": json.dumps(rows[0])})]
    for source in sources_:
        if captions is None:
            with pytest.raises(ValueError, match=note):
                open_dataset(source, **option)
            continue
        dataset = open_dataset(source, **option)
        assert captions_of(dataset) == [captions] and note in dataset.describe()
    if option and captions:
        found = ", ".join(sorted(rows[0]))
        with pytest.raises(ValueError, match=f"--caption-column no has no caption, found: {found}"):
            open_dataset(sources_[2], captions_required=False, caption_column="no")
        assert captions_of(open_dataset(sources_[2])) == [["t"]]


def test_metadata_names_files_under_the_key_that_is_chosen(tmp_path):
    """Rows for files that are no images, and second rows for one image, are named."""
    rows = [{"img": name, "text": name} for name in ("a.png", "b.mp4", "a.png")]
    write(tmp_path, {"a.png": encoded(noise_image()), "b.mp4": "", "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    with pytest.raises(ValueError, match="row 1: 'file_name' is not among its keys img, text, and --image-column"):
        open_dataset(tmp_path)
    dataset = open_dataset(tmp_path, image_column="img")
    assert captions_of(dataset) == [["a.png"]]
    assert dict(dataset.skipped) == {"b.mp4": "named in metadata.jsonl, but not an image",
                                     "a.png": "twice in metadata.jsonl, the last row counts"}


@pytest.mark.parametrize("source, message", [
    ("owner/name", "there is no such folder or file; a dataset of the Hub is given as hub:owner/name$"),
    ("https://huggingface.co/datasets/owner/name", "a dataset of the Hub is given as hub:owner/name$"),
])
def test_a_dataset_of_the_hub_without_hub_is_explained(source, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(source)


# ----- links in shards -------------------------------------------------------------------------------

def test_links_in_a_tar_file_are_followed_or_named(tmp_path):
    """tar writes the second name of a file as a hard link; a data set assembled from links has symbolic ones."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        def add(name, content=b"", kind=tarfile.REGTYPE, target=""):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, target
            shard.addfile(member, io.BytesIO(content))
        add("sub/early.png", kind=tarfile.SYMTYPE, target="../z.png")           # before what it names
        add("a.png", encoded(noise_image(1)))
        add("b.png", kind=tarfile.LNKTYPE, target="./a.png")
        add("sub/c.png", kind=tarfile.SYMTYPE, target="early.png")              # a link to a link
        add("z.png", encoded(noise_image(2)))
        for name, target in (("gone.png", "nowhere.png"), ("out.png", "/etc/passwd"), ("x.png", "y.png"),
                             ("y.png", "x.png")):
            add(name, kind=tarfile.SYMTYPE, target=target)
        add("pipe.png", kind=tarfile.FIFOTYPE)
    for _ in range(2):                           # the second time from the index
        dataset = open_dataset(tmp_path / "a.tar", captions_required=False)
        names = [name.removeprefix(f"{tmp_path}/a.tar/") for name in names_of(dataset)]
        assert names == ["sub/early.png", "a.png", "b.png", "sub/c.png", "z.png"]
        for i, seed in enumerate((2, 1, 1, 2, 2)):
            np.testing.assert_array_equal(dataset.read(i), np.asarray(noise_image(seed)))
        reasons = {name.removeprefix(f"{tmp_path}/a.tar/"): why for name, why in dataset.skipped}
        assert reasons.keys() == {"gone.png", "out.png", "x.png", "y.png", "pipe.png"}
        assert reasons["out.png"] == "a link to /etc/passwd, which is not in the shard"


def test_a_sparse_member_of_a_tar_file_is_not_read_as_if_it_were_whole(tmp_path):
    """Only the pieces between its holes are stored, so its bytes are not the image."""
    path = tar(tmp_path / "a.tar", {"a.png": encoded(noise_image())}, format=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    size = int(content[124:135], 8)
    content[156:157] = b"S"
    content[386:410] = b"%011o\0%011o\0" % (0, size)
    content[483:495] = b"%011o\0" % size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png .neither a file nor a link, or with holes"):
        open_dataset(path, captions_required=False)


# ----- tables ----------------------------------------------------------------------------------------

def rows_as_table(rows: list[dict], *images: str) -> tables.Table:
    return tables.Table("t", {name: name in images for name in rows[0]}, rows)


@pytest.mark.parametrize("names, asked, expected", [
    (["conditioning_image", "image"], None, "image"), (["conditioning_image", "image"], "conditioning_image",
                                                       "conditioning_image"),
    (["photo", "JPG"], None, "JPG"), (["target_pixels"], None, "target_pixels"),
    (["before", "after"], None, "t has several columns of images, before, after: choose one with --image-column"),
    (["image"], "text", "t: --image-column text holds no images: .* found image, text"),
    (["image"], "imgae", "t: --image-column imgae is not there: .* found image, text"),
])
def test_of_several_columns_of_images_the_usual_one_is_taken_or_the_choice_is_asked_for(names, asked, expected):
    """The first one that held bytes was the conditioning image, and it was trained on with the other's caption."""
    table = rows_as_table([{**dict.fromkeys(names), "text": "x"}], *names)
    if " " not in expected:
        assert tables.image_column(table, asked) == expected
        return
    with pytest.raises(ValueError, match=expected):
        tables.image_column(table, asked)


def test_rows_without_an_image_are_skipped_and_named_and_no_file_of_this_disk_is_read(tmp_path):
    """A null ended the source. A path would let whoever made the table choose what is read."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(noise_image(5)))
    cells = [encoded(noise_image(0)), None, {"bytes": None, "path": None}, {"bytes": None, "path": str(secret)},
             {"bytes": encoded(noise_image(1)), "path": "x.png"}, {"bytes": None, "path": 3}, "a\0b", 7]
    rows = [{"image": cell, "other": None, "text": f"row {i}", "none": None} for i, cell in enumerate(cells)]
    tables.write_tar(rows_as_table(rows, "image", "other"), tmp_path / "t.table.tar")
    dataset = open_dataset(tmp_path / "t.table.tar")
    assert captions_of(dataset) == [["row 0"], ["row 4"]]
    np.testing.assert_array_equal(dataset.read(1), np.asarray(noise_image(1)))
    assert "; images from column image; captions from text; 6 skipped: " in dataset.describe()
    reasons = {name[-9:]: why for name, why in dataset.skipped}
    assert all(reasons[f"00000000{row}"] == "column image: it is null" for row in (1, 2, 5, 7))
    assert reasons["000000003"] == (f"column image: it only names the file {secret}, and files that a table names "
                                    "are not read")
    table = rows_as_table(rows[3:4], "image")
    table.folders = [tmp_path]                   # the cache of datasets, which it fills itself
    tables.write_tar(table, tmp_path / "u.table.tar")
    np.testing.assert_array_equal(open_dataset(tmp_path / "u.table.tar").read(0), np.asarray(noise_image(5)))


def test_a_configuration_of_the_hub_is_passed_on_or_named(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if config is None:
            raise ValueError("Config name is missing.\n"
                             "Please pick one among the available configs: ['small', 'large']\n")
        rows = table(1)
        return HubRows([dict(img=row["image"], **row) for row in rows], image=None, img={"bytes": 0}, text=None)
    stand_in_for_datasets(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match="hub:a/b cannot be loaded: Config name is missing. It has the configurations "
                                         r"\['small', 'large'\]: choose one with --dataset-config"):
        open_dataset("hub:a/b", index_folder=tmp_path)
    dataset = open_dataset("hub:a/b", index_folder=tmp_path, dataset_config="small")
    assert asked[1:] == [("a/b", "small", "train")] and names_of(dataset) == ["hub:a/b/000000000.img.jpg"]
    with pytest.raises(ValueError, match="has no configurations: remove --dataset-config"):
        open_dataset(tmp_path, dataset_config="small")


def test_folders_of_save_to_disk_and_metadata_parquet_are_read(tmp_path):
    """As datasets writes them: a stream of arrow batches, next to results of map() that are not part of the data."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def save(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), content.schema) as stream:
            stream.write_table(content, max_chunksize=20)
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        write(folder, {"state.json": "{}", "dataset_info.json": "{}"})
        save(folder / "data-00000-of-00001.arrow", table(40 if split == "train" else 2))
        save(folder / "cache-12ab.arrow", table(3))
    write(tmp_path / "saved", {"dataset_dict.json": '{"splits": ["train", "test"]}'})
    for source, count in (("saved", 40), ("saved/test", 2)):
        dataset = open_dataset(tmp_path / source, index_folder=tmp_path / "kept")
        assert captions_of(dataset) == [[f"image {i}"] for i in range(count)] and not dataset.skipped
        np.testing.assert_array_equal(dataset.read(1), np.asarray(noise_image(1)))
    (tmp_path / "saved" / "train").rename(tmp_path / "saved" / "valid")
    with pytest.raises(ValueError, match="has the splits test, valid and no split train"):
        open_dataset(tmp_path / "saved", index_folder=tmp_path / "kept")
    write(tmp_path / "images", {name: content for name, content in pairs(2).items() if name.endswith(".png")})
    rows = pyarrow.Table.from_pylist([{"file_name": f"00{i}.png", "text": f"row {i}", "score": i} for i in range(2)])
    parquet.write_table(rows, tmp_path / "images" / "metadata.parquet")
    dataset = open_dataset(tmp_path / "images", min_score=1)
    assert captions_of(dataset) == [["row 1"]] and [why for _, why in dataset.skipped] == ["score 0"]
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(ValueError, match="damaged.parquet cannot be read as a table: ") as error:
        open_dataset(tmp_path / "damaged.parquet", index_folder=tmp_path / "kept")
    assert "\n" not in str(error.value)


def test_all_broken_images_are_named_once_and_another_shape_helps_out(tmp_path, capsys):
    """A broken image that is alone in its shape must not end a run that has others."""
    write(tmp_path, {"a.png": encoded(noise_image(0)), "b.png": encoded(noise_image(1, 320, 64))[:-200],
                     "c.png": encoded(noise_image(2))})
    dataset = open_dataset(tmp_path, captions_required=False)
    for _ in range(2):
        image, j = dataset.read_or_replace(1, np.array([1]))
        assert j == 2 and (image == np.asarray(noise_image(2))).all()
    err = capsys.readouterr().err
    assert err.count("b.png cannot be read and is replaced: ") == 1 and err.count("\n") == 2


# ----- filters ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("facts, filters, kept", [
    ({"pwatermark": 0.0}, dict(max_pwatermark=0.5), True),           # a perfect score is a number, not a missing one
    ({"pwatermark": 0.6}, dict(max_pwatermark=0.5), False), ({"pwatermark": 0.5}, dict(max_pwatermark=0.5), True),
    ({"aesthetic": 4.9}, dict(min_aesthetic=5), False), ({"aesthetic": 5}, dict(min_aesthetic=5), True),
    ({"aesthetic": "5.5"}, dict(min_aesthetic=5), True), ({"aesthetic": 0}, dict(min_aesthetic=-1, max_aesthetic=1),
                                                          True),
    ({"a": 1}, dict(max_pwatermark=0.5), True), ({"pwatermark": None}, dict(max_pwatermark=0.5), True),
    ({"pwatermark": float("nan")}, dict(max_pwatermark=0.5), True),
    ({"pwatermark": "unknown"}, dict(max_pwatermark=0.5), True),
    ({"a": 1}, dict(max_pwatermark=0.5, require_keys=True), False),
    ({"pwatermark": None}, dict(max_pwatermark=0.5, require_keys=True), False),
    ({"pwatermark": 0.0}, dict(max_pwatermark=0.5, require_keys=True), True),
])
def test_filters_compare_only_numbers(tmp_path, facts, filters, kept):
    """`value or 1.0` once rejected the best images, and all that had no .json, silently."""
    files = {**pairs(1), "000.json": json.dumps({"pwatermark": 0, "aesthetic": 1, **{k: 0.0 for k in facts}}),
             "a.png": encoded(noise_image(1)), "a.json": json.dumps({"text": "a", **facts})}
    if "min_aesthetic" in filters:
        files["000.json"] = '{"aesthetic": 5, "pwatermark": 0}' if filters["min_aesthetic"] == 5 else '{"aesthetic": 0}'
    for source in (write(tmp_path / "folder", files), tar(tmp_path / "a.tar", files)):
        dataset = open_dataset(source, **filters)
        assert len(dataset) == 1 + kept and len(dataset.skipped) == 1 - kept
        assert all(re.search("pwatermark|aesthetic", reason) for _, reason in dataset.skipped)


def test_filters_work_on_metadata(tmp_path):
    write(tmp_path, {f"{i}.png": encoded(noise_image(i)) for i in range(4)})
    (tmp_path / "metadata.csv").write_text("file_name,text,punsafe\n"
                                           + "".join(f"{i}.png,t,{value}\n"
                                                     for i, value in enumerate(("0.1", "0.999", "", "0"))))
    dataset = open_dataset(tmp_path, max_punsafe=0.99)
    assert names_of(dataset) == ["0.png", "2.png", "3.png"] and dataset.skipped == [("1.png", "punsafe 0.999")]


@pytest.mark.parametrize("filters, message", [
    (dict(max_pwatermak=0.5), "no image has a number 'pwatermak' to filter by, found: punsafe"),
    (dict(pwatermark=0.5), "unknown option 'pwatermark': expected a filter min_KEY or max_KEY"),
    (dict(max_=0.5), "unknown option 'max_'"),
])
def test_a_filter_that_can_match_nothing_is_rejected(tmp_path, filters, message):
    """A typo would let everything through."""
    write(tmp_path, {**pairs(1), "000.json": '{"punsafe": 0.5}'})
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, **filters)


# ----- scenes ----------------------------------------------------------------------------------------

def test_emoji_scenes_are_images_like_any_other():
    """The tiny model is trained by the same script as the large one."""
    dataset = open_dataset("scenes:all:50:3")
    images, captions = EmojiScenes("all", seed=3).batch(0, 50)
    assert len(dataset) == 50 and (dataset.sizes == 128).all()
    assert dataset.describe() == "50 images in scenes:all:50:3"
    assert captions_of(dataset) == [[text] for text in captions]
    np.testing.assert_array_equal(np.stack([dataset.read(i) for i in range(50)]), images)
    assert dataset.read_or_next(7, np.arange(50))[1] == 7 and dataset.name(7) == "scene 7"
    with pytest.raises(IndexError):
        dataset.captions(50)


def test_scenes_have_keys_without_being_drawn(monkeypatch):
    """The cache needs the keys of all of them."""
    sets = [open_dataset(source) for source in ("scenes", "scenes:500", "scenes:uncaptioned:500", "scenes:500:1",
                                                 "scenes:captioned:500:0")]
    assert [len(dataset) for dataset in sets] == [24000] + [500] * 4
    with monkeypatch.context() as patch:
        patch.setattr("training.scenes.render", lambda scene: pytest.fail("a scene was drawn"))
        name = f"scene 0 captioned 9 {EmojiScenes('captioned').scenes(9, 1)}".encode()
        assert sets[0].key(9) == sets[1].key(9) == sets[4].key(9) == hashlib.sha256(name).hexdigest()
        assert len({dataset.key(i) for dataset in sets[1:4] for i in range(500)}) == 1500


def test_a_scene_that_is_drawn_in_another_way_is_not_taken_from_an_old_cache(monkeypatch):
    """Its name "scenes:all:50:3" stays the same if training/scenes.py changes, and so do seed and number."""
    before = [open_dataset("scenes:all:50:3").key(i) for i in range(50)]
    assert len(set(before)) == 50 and before == [open_dataset("scenes:all:60:3").key(i) for i in range(50)]
    monkeypatch.setattr("training.scenes.SIZES", dict(small=32, medium=48, large=72))
    monkeypatch.setattr("training.scenes.PAIR_SIZE", 48)
    assert not set(before) & {open_dataset("scenes:all:50:3").key(i) for i in range(50)}


@pytest.mark.parametrize("source, message", [("scenes:some", "unknown set of objects 'some'"),
                                             ("scenes:all:x", "cannot read 'scenes:all:x': expected"),
                                             ("scenes:all:1:2:3", "cannot read"), ("scenes:0", "cannot read"),
                                             ("scenes:all:-5", "cannot read")])
def test_scenes_misspelled_are_rejected(source, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(source)
    with pytest.raises(ValueError, match="scenes has no keys to filter by: remove max_x"):
        open_dataset("scenes", max_x=1)


# ----- shapes ----------------------------------------------------------------------------------------

def test_a_resolution_is_pixels_of_the_image():
    """And so is every shape: near resolution^2 in area, on the grid of 128 px, the square among them."""
    for resolution in range(128, 2049, 128):
        shapes = bucket_sizes(resolution)
        assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes) and shapes == sorted(shapes)
        for height, width in shapes:
            assert height % 128 == width % 128 == 0 and 0.5 <= height / width <= 2 and (width, height) in shapes
            assert 0.8 <= height * width / resolution ** 2 <= 1.25
    # With sides of 16 or 17 units, 2 x 16 = 32 and 1 x 17 come nearest to 25, and are too far from it.
    assert not {(256, 2048), (128, 2176)} & {*bucket_sizes(640, max_ratio=20)}
    assert bucket_sizes(128) == [(128, 128)] and bucket_sizes(1024, max_ratio=1) == [(1024, 1024)]
    assert bucket_sizes(1024) == [(768, 1280), (768, 1408), (896, 1152), (1024, 1024), (1152, 896), (1280, 768),
                                  (1408, 768)]


@pytest.mark.parametrize("resolution", [0, 64, 500, 1000])
def test_resolutions_off_the_grid_are_rejected(resolution):
    with pytest.raises(ValueError, match="expected a multiple of 128, such as"):
        bucket_sizes(resolution)


def test_the_nearest_shape_is_found_by_the_logarithm_of_the_ratio():
    """By the ratio itself, 0.7 would be nearer to 1 than to 0.5, though more is cut off; wide and tall would differ."""
    buckets = [(512, 1024), (724, 724), (1024, 512)]
    sizes = np.array([[690, 1000], [1000, 690], [720, 1000], [1000, 720], [100, 1000], [1000, 100], [64, 64]])
    assert nearest_bucket(sizes, buckets).tolist() == [0, 2, 1, 1, 0, 2, 1]
    assert nearest_bucket(np.array([[64, 80]]), bucket_sizes(128)).tolist() == [0]


def test_an_image_of_the_right_size_stays_unchanged_and_a_larger_one_of_the_right_scale_is_only_cropped():
    """Resampling an image that fits would blur it."""
    image = np.random.default_rng(0).integers(0, 256, (128, 200, 3), np.uint8)
    np.testing.assert_array_equal(fit(image, (128, 200)), image)
    np.testing.assert_array_equal(fit(image, (128, 128)), image[:, 36:164])
    np.testing.assert_array_equal(fit(image, (128, 128), flip=True), image[:, 36:164][:, ::-1])
    lefts = set()
    for i in range(400):
        piece = fit(image, (128, 128), "random", rng=np.random.default_rng(i))
        left = next(left for left in range(73) if (piece == image[:, left:left + 128]).all())
        lefts.add(left)
    assert {0, 72} <= lefts and len(lefts) > 60            # both ends are reached


@pytest.mark.parametrize("size, expected", [((64, 64), (1, 1)), ((128, 64), (2, 1)), ((96, 160), (3, 5))])
def test_images_keep_their_proportions(size, expected):
    """A linear ramp in x and y shows the scale of both axes."""
    height, width = 333, 517
    image = np.stack(np.broadcast_arrays(np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width), 0.0),
                     axis=-1).round().astype(np.uint8)
    result = fit(image, size).astype(float)
    assert result.shape == (*size, 3)
    down = (result[-2, :, 0] - result[1, :, 0]).mean() * height
    along = (result[:, -2, 1] - result[:, 1, 1]).mean() * width
    assert down / along == pytest.approx((size[0] - 3) / (size[1] - 3), rel=0.03)


def test_shrinking_skips_no_pixel():
    """A fine checkerboard becomes grey. Without antialiasing it stays black and white, in a false pattern."""
    image = np.repeat(np.indices((1000, 1000)).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    assert np.abs(fit(image, (128, 128)).astype(int) - 127.5).max() < 30
    assert np.abs(fit(image, (128, 128)).astype(int)[8:-8, 8:-8] - 127.5).max() < 8


@pytest.mark.parametrize("arguments, message", [((np.zeros((8, 8, 3)), (4, 4)), "float64, expected .H,W,3. of uint8"),
                                                ((np.zeros((8, 8), np.uint8), (4, 4)), "shape .8, 8."),
                                                ((np.zeros((8, 8, 3), np.uint8), (4, 4), "smart"),
                                                 "unknown crop 'smart', expected center or random")])
def test_fit_says_what_it_expects(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(*arguments)


# ----- large datasets ------------------------------------------------------------------------------------

@pytest.fixture
def all_are_large(monkeypatch):
    """Two images are a large dataset, for which files stand in for memory."""
    monkeypatch.setattr(data, "LARGE", 2)
    monkeypatch.setattr(order, "LARGE", 2)


@pytest.mark.parametrize("kind", ["shard", "folder", "folder of shards"])
def test_a_large_dataset_is_mapped_and_a_finished_index_is_not_read_again(tmp_path, kind, monkeypatch, all_are_large):
    """8 processes that each read the index of 10^8 images wait 25 minutes and hold 260 GB. Now one does, once."""
    files = {**pairs(5), "small.png": encoded(noise_image(0, 40, 40)), "small.txt": "small"}
    (tmp_path / "set").mkdir()
    source = write(tmp_path / "set", files) if kind == "folder" else tar(tmp_path / "set" / "a.tar", files)
    source = source.parent if kind == "folder of shards" else source
    with monkeypatch.context() as small:
        small.setattr(data, "LARGE", 100)
        plain = open_dataset(source)
    read = []
    monkeypatch.setattr(data, "samples_of", lambda *args, original=data.samples_of: read.append(1) or original(*args))
    first = open_dataset(source, index_folder=tmp_path / "index")
    again, copy = open_dataset(source, index_folder=tmp_path / "index"), pickle.loads(pickle.dumps(first))
    assert len(read) == (2 if kind == "folder" else 1) and len([*(tmp_path / "index").glob("images-*")]) == 1
    assert len(pickle.dumps(first)) < 1000 + len(str(tmp_path)) * 4
    for dataset in (first, again, copy):
        assert all(isinstance(array.base, np.memmap) for array in (dataset._records, dataset._ends, dataset.sizes))
        assert names_of(dataset) == names_of(plain) and captions_of(dataset) == captions_of(plain)
        assert (dataset.sizes == plain.sizes).all() and dataset.key(3) == plain.key(3)
        assert dataset.describe() == plain.describe() and "1 skipped: " in dataset.describe()
        dataset.select(np.array([1, 3]))
        dataset = pickle.loads(pickle.dumps(dataset))
        assert captions_of(dataset) == [["image 1"], ["image 3"]] and len(dataset.sizes) == 2
    named = []
    open_dataset(source, index_folder=tmp_path / "index", skipped=named)               # a dry run names all of them
    assert [why for _, why in named] == ["40 x 40 px, fewer than 64"]
    assert len(open_dataset(source, index_folder=tmp_path / "index", min_side=8)) == 6
    tar(tmp_path / "set" / "a.tar", pairs(4)) if kind != "folder" else (tmp_path / "set" / "004.png").unlink()
    assert len(open_dataset(source, index_folder=tmp_path / "index")) == 4


def test_an_error_that_a_first_start_found_is_found_again(tmp_path, all_are_large):
    """A wrong filter must not leave a finished index behind, which the next start would take as it is."""
    path = tar(tmp_path / "a.tar", pairs(3))
    for _ in range(2):
        with pytest.raises(ValueError, match="no image has a number 'score' to filter by"):
            open_dataset(path, index_folder=tmp_path / "index", min_score=1)


def test_the_order_of_a_large_dataset_is_that_of_a_small_one(tmp_path, monkeypatch):
    """Laid out in pieces and in files, which runs of old versions did not have: they resume to the same samples."""
    buckets = np.random.default_rng(0).choice(5, 3000, p=[0.5, 0.2, 0.2, 0.05, 0.05])
    expected = [BatchSampler(buckets, 16, 3).step(k) for k in range(0, 1000, 7)]
    assert expected[1][1].tolist() == [1366, 1426, 1789, 114, 732, 373, 1145, 2611, 2500, 300, 927, 2856, 499, 158, 475,
                                       1186]                                             # of the version of 2026-11-28
    monkeypatch.setattr(order, "LARGE", 100)
    laid_out = []
    monkeypatch.setattr(BatchSampler, "_lay_out", lambda self, e, out, original=BatchSampler._lay_out:
                        laid_out.append(e) or original(self, e, out))
    ranks = [BatchSampler(buckets.astype(np.uint8), 16, 3, tmp_path / "index") for _ in range(2)]
    for k, (positions, indices, bucket) in zip(range(0, 1000, 7), expected):
        for found in [sampler.step(k) for sampler in ranks]:
            assert (found[0] == positions).all() and (found[1] == indices).all() and found[2] == bucket
    assert laid_out == sorted(set(laid_out)) and len(laid_out) == 6 and len([*(tmp_path / "index").iterdir()]) == 4


def test_memory_does_not_grow_with_the_dataset(tmp_path, monkeypatch):
    """Sorting 10^8 images into buckets took 12 GB in each process. Here 2^20 images take less than one array of 64-bit
    integers would, of which it took thirty."""
    monkeypatch.setattr(order, "LARGE", 2 ** 14)
    sizes = np.random.default_rng(0).integers(512, 2048, (2 ** 20, 2), dtype=np.int32)
    np.save(tmp_path / "sizes.npy", sizes)
    sizes, shapes = np.load(tmp_path / "sizes.npy", mmap_mode="r"), bucket_sizes(384)
    BatchSampler(np.zeros(2 ** 15, np.uint8), 64, 0, tmp_path).step(0)               # what is imported at the first use
    tracemalloc.start()
    try:
        buckets = nearest_bucket(sizes, shapes)
        assert buckets.dtype == np.uint8 and buckets.nbytes == 2 ** 20
        sampler = BatchSampler(buckets, 64, 0, tmp_path)
        for k in range(0, 18000, 3000):                    # the second epoch begins with step 16384
            sampler.step(k)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 20 * 8
    finally:
        tracemalloc.stop()


# ----- randomness ----------------------------------------------------------------------------------------

def test_randomness_depends_only_on_seed_position_and_purpose():
    """Not on rank, worker or earlier draws. Another trainer seeded all ranks alike: the same noise on every GPU."""
    draws = {key: tuple(sample_rng(*key).random(4))
             for key in itertools.product((0, 1, 2 ** 40), (0, 1, 10 ** 12), ("crop", "noise"))}
    assert len(set(draws.values())) == len(draws) == 18
    for key in reversed(draws):
        assert tuple(sample_rng(*key).random(4)) == draws[key]
    # one per sample, not per batch
    coins = [sample_rng(0, position, "dropout").random() < 0.05 for position in range(4000)]
    assert 150 < sum(coins) < 250 and sum(map(np.logical_and, coins, coins[1:])) < 30


# ----- order -----------------------------------------------------------------------------------------

def by_queues(sampler: BatchSampler, buckets, batch: int, epochs: int) -> list:
    """The definition, taken literally: one queue per bucket, one sample at a time."""
    queues, steps, position = {bucket: [] for bucket in set(buckets)}, [], 0
    for e in range(epochs):
        for index in sampler._epoch(e)[0]:
            queue = queues[buckets[index]]
            queue.append((position, index))
            position += 1
            if len(queue) == batch:
                steps.append((*map(list, zip(*queue)), buckets[index]))
                queue.clear()
    return steps


@pytest.mark.parametrize("counts, batch", [((40,), 8), ((37,), 8), ((3,), 8), ((1,), 1), ((30, 12, 5), 4),
                                           ((30, 12, 1, 1), 4), ((2, 1, 1), 16), ((5, 5), 1)])
def test_steps_equal_those_of_queues(counts, batch):
    """The closed form equals the process it stands for, also for datasets smaller than a batch, and for shapes so rare
    that their queue takes many epochs to fill."""
    buckets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 3 + 1, counts))
    sampler = BatchSampler(buckets, batch, seed=5)
    expected = by_queues(sampler, buckets, batch, 40)
    assert expected
    for (positions, indices, bucket), step in zip(BatchSampler(buckets, batch, seed=5).steps(), expected):
        assert (positions.tolist(), indices.tolist(), bucket) == step
    for k in random.Random(0).sample(range(len(expected)), min(20, len(expected))):        # and in any order
        positions, indices, bucket = sampler.step(k)
        assert (positions.tolist(), indices.tolist(), bucket) == expected[k]


def test_with_one_bucket_every_epoch_shows_every_image_once():
    """Steps are consecutive pieces of the stream, also across epochs, and every epoch has its own order."""
    steps = list(itertools.islice(BatchSampler(np.zeros(50, int), 8, seed=0).steps(), 25))
    positions, indices = (np.concatenate(parts) for parts in list(zip(*steps))[:2])
    assert positions.tolist() == list(range(200))
    epochs = indices.reshape(4, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and (np.diff(epochs[0]) != 1).any()
    other = BatchSampler(np.zeros(50, int), 8, seed=1)
    assert other.step(0)[1].tolist() != steps[0][1].tolist()
    assert [other.epoch_of(p) for p in (0, 49, 50, 199)] == [0, 0, 1, 3]


def test_with_several_buckets_nothing_is_lost_and_no_step_mixes_sizes():
    """Other trainers drop samples that do not fill a batch at the end of an epoch: always the rarest shapes."""
    buckets = np.random.default_rng(1).choice(4, 500, p=[0.7, 0.2, 0.09, 0.01])
    counts, batch = np.bincount(buckets), 16
    sampler, visits, seen, position = BatchSampler(buckets, batch, 0), np.zeros(500, int), set(), 0
    steps = sampler._steps_before(20)
    for positions, indices, bucket in itertools.islice(sampler.steps(), steps):
        assert (buckets[indices] == bucket).all() and (np.diff(positions) > 0).all() and not seen & set(positions)
        assert positions[-1] > position                    # steps come in the order in which they fill up
        position = positions[-1]
        seen |= set(positions.tolist())
        visits += np.bincount(indices, minlength=500)
    waiting = set(range(20 * 500)) - seen
    assert len(waiting) == sum(counts * 20 % batch) and 20 * 500 - len(seen) < 4 * batch
    assert counts.min() < batch and all(visits[buckets == b].min() >= 20 - -(-batch // counts[b]) for b in range(4))
    assert visits.max() <= 20


def test_a_sampler_continues_from_any_step_and_from_there_again():
    """Also after a second resume: counts belong to the training, not to the run."""
    buckets = np.random.default_rng(0).choice(3, 100, p=[0.8, 0.15, 0.05])
    unbroken = [step[1].tolist() for step in itertools.islice(BatchSampler(buckets, 8, 3).steps(), 60)]
    resumed = []
    for start, stop in ((0, 13), (13, 14), (14, 47), (47, 60)):
        resumed += [step[1].tolist() for step in itertools.islice(BatchSampler(buckets, 8, 3).steps(start),
                                                                  stop - start)]
    assert resumed == unbroken
    copy = pickle.loads(pickle.dumps(BatchSampler(buckets, 8, 3)))
    assert copy.step(59)[1].tolist() == unbroken[59]


def test_a_start_far_into_training_computes_nothing_before_it(monkeypatch):
    """A hundred million steps in: the counts of each bucket are known, so only the epochs of this step are laid out."""
    laid_out = []
    monkeypatch.setattr(order, "sample_rng", lambda *key, original=sample_rng: laid_out.append(key) or original(*key))
    buckets = np.random.default_rng(0).choice(5, 20_000, p=[0.5, 0.2, 0.2, 0.05, 0.05])
    positions, indices, bucket = BatchSampler(buckets, 64, 0).step(10 ** 8)
    assert len(laid_out) <= 2 and (buckets[indices] == bucket).all() and abs(positions[-1] / (64 * 10 ** 8) - 1) < 1e-6


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (2, 4), (1, 4), (4, 1), (8, 1), (2, 2)])
def test_a_step_is_the_same_however_it_is_shared(world, micro_batch):
    """1 process x 8, 2 x 4, 1 x 4 x 2 accumulation steps: the parts of a step are the step, each sample once."""
    sampler = BatchSampler(np.random.default_rng(0).choice(3, 60), 8, 0)
    for positions, indices, _ in itertools.islice(sampler.steps(), 20):
        parts = [indices[split(positions, micro, rank, world, micro_batch)]
                 for micro in range(8 // world // micro_batch) for rank in range(world)]
        assert all(len(part) == micro_batch for part in parts) and np.concatenate(parts).tolist() == indices.tolist()


@pytest.mark.parametrize("arguments, message",
                         [((0, 0, 3, 1),
                           "8 samples cannot be shared by 3 GPUs in micro-steps of 1: expected a multiple of 3"),
                                                ((0, 0, 2, 8), "multiple of 16"), ((2, 0, 2, 2), "micro-step 2 of 2"),
                          ((0, 2, 2, 2), "rank 2 of 2")])
def test_shares_that_do_not_add_up_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(np.arange(8), *arguments)


@pytest.mark.parametrize("buckets, batch", [([], 1), ([0], 0), ([[0, 1]], 1)])
def test_empty_samplers_are_rejected(buckets, batch):
    """The loop over an empty sampler would never end."""
    with pytest.raises(ValueError, match="expected .N,., one per image"):
        BatchSampler(np.array(buckets, int), batch, 0)


class Training(torch.utils.data.Dataset):
    """What a training script does, for one rank: its shares of the steps, one sample per item."""
    def __init__(self, folder, world, rank, micro_batch):
        self.dataset = open_dataset(folder)
        self.shapes = bucket_sizes(384)
        sampler, self.samples = BatchSampler(nearest_bucket(self.dataset.sizes, self.shapes), 4, 0), []
        for positions, indices, bucket in itertools.islice(sampler.steps(), 6):
            for micro in range(4 // world // micro_batch):
                part = split(positions, micro, rank, world, micro_batch)
                self.samples += [(int(p), int(i), bucket) for p, i in zip(positions[part], indices[part])]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, n):
        position, i, bucket = self.samples[n]
        draw = functools.partial(sample_rng, 0, position)
        captions = self.dataset.captions(i)
        image = fit(self.dataset.read(i), self.shapes[bucket], "random", bool(draw("flip").integers(2)), draw("crop"))
        return position, captions[draw("caption").integers(len(captions))], hashlib.sha256(image).hexdigest()


def test_samples_do_not_depend_on_ranks_or_workers(tmp_path):
    """Crop, flip and caption of every position: 1 process, 2 ranks, 2 ranks with 2 micro-steps each, workers."""
    for i in range(10):
        write(tmp_path, {f"{i}.png": encoded(noise_image(i, *((96, 64), (64, 96), (72, 80))[i % 3])),
                         f"{i}.txt": "one\ntwo\nthree"})

    def run(world, micro_batch, workers=0):
        ranks = [Training(tmp_path, world, rank, micro_batch) for rank in range(world)]
        return Counter(tuple(sample) for rank in ranks
                       for sample in torch.utils.data.DataLoader(rank, batch_size=None, num_workers=workers))
    reference = run(1, 4)
    assert len(reference) == 24 and len({caption for _, caption, _ in reference}) == 3
    assert run(2, 2) == run(2, 1) == run(4, 1) == run(1, 2, workers=2) == reference


@pytest.mark.parametrize("device, cores, processes, workers", [
    ("cpu", 2, 1, 2), ("cpu", 64, 1, 2), ("cuda", 2, 1, 2), ("cuda", 1, 1, 2), ("cuda", 6, 1, 5), ("cuda", 16, 1, 8),
    ("cuda", 192, 8, 8), ("cuda", 32, 8, 3), ("cuda", 8, 8, 2)])
def test_workers_by_cores_and_by_processes_of_the_machine(device, cores, processes, workers, monkeypatch):
    """Two read 130 images a second, and a GPU takes 350. Eight GPUs share the cores of their machine."""
    given = []

    class Loader:
        def __init__(self, *_, num_workers, **__):
            given.append(num_workers)

        def __iter__(self):
            return iter(())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{processes}")
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    for asked in (None, 0, 3):
        args = types.SimpleNamespace(batch=1, grad_accum=1, workers=asked)
        order.batches([], BatchSampler(np.zeros(8, int), 1, 0), types.SimpleNamespace(
            rank=0, world=processes, device=torch.device(device)), args)
    assert given == [workers, 0, 3]


@pytest.mark.parametrize("broken", [True, False], ids=("in a worker", "in the loop"))
def test_an_error_ends_a_script_with_workers_in_one_line(broken):
    """torch put 40 lines of a worker's traceback into the message. And workers outlive the SIGTERM with which Python
    ends them while an exception holds them, so it waited without end."""
    script = f"""
import types, numpy, torch
from loading.errors import UserError, exit_on_user_error
from training.order import BatchSampler, batches
class Samples(torch.utils.data.Dataset):
    def __getitem__(self, where):
        if {broken} and where[0] > 5:
            raise UserError("image 6 is broken")
        return dict(position=where[0])
def main():
    args = types.SimpleNamespace(batch=2, grad_accum=1, workers=2)
    processes = types.SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    samples = batches(Samples(), BatchSampler(numpy.zeros(8, int), 2, 0), processes, args)
    for _ in range(5):
        next(samples)
    raise UserError("the loop ended")
with exit_on_user_error():
    main()
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(os.path.dirname(data.__file__)),
                         capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert run.stderr == f"error: {'image 6 is broken' if broken else 'the loop ended'}\n"
