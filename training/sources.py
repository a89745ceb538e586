"""Finds captioned images in folders, tar shards, pipes, parquet files and datasets of the Hub.

  source -parts_of-> folders and tar files
  -samples_of-> one dict per image: name, place (file, offset, bytes), size (height, width), captions, numbers;
                for a file that cannot be used: name and problem
  place -content_of-> the bytes at that place; places can be read in any order
  Chosen: columns and keys that the user named; Found: columns and keys that exist or were used

Only headers of images are read here. Later code treats folders and tar files alike: both are a dict of file names and
the places of their content. A tar file is read once, and its places are stored in an index next to it. Sources without
such places (a pipe, a table such as a parquet file, a dataset of the Hub) are first rewritten as a tar file, once.
Note: a tar file has no table of contents, and Python's tarfile takes a damaged header for the end of the file. So an
incomplete download would look like a smaller shard; _tar_places detects this.
Layouts: https://huggingface.co/docs/datasets/image_dataset (folders), https://github.com/webdataset/webdataset (tar).
Needs: loading/files.py, extras/images.py, tables.py.
"""
import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import os
import posixpath
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from extras.images import LARGEST, decoding, open_header, orientation
from loading.files import check_file, decoded, parsed, reading, reason_of, write_atomically
from training.tables import NOT_USABLE, TABLES, Table, hub_table, open_table, write_tar

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
HIDDEN = "hidden, as thumbnails of other programs are: rename it if it is meant"
UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".jpe", ".apng", ".psd", ".svg", ".tga", ".exr", ".ppm", ".ico",
              ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")  # not read: reported as skipped
# Keys of metadata, .json and tables that may have the captions: the first one that exists is used. Case is ignored.
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "prompts", "description", "txt")
HEAD = 2 ** 15                   # bytes of an image that are read first to find its size
SHARDS = 10 ** 6                 # most shards in a range; more must be a typing error: large datasets have 200,000
INDEX_VERSION = 4                # version of the index that _tar_samples writes; a new number rebuilds all indexes

Place = tuple[str, int, int]     # where content can be read: file, offset, number of bytes (-1: up to the file's end)


@dataclass(frozen=True)
class Chosen:
    """Names that the user gave for columns and keys. None: use the first usual name that exists."""
    image: str | None = None     # a table's column with the images, or the metadata's key with the file names
    caption: str | None = None   # the column, or the key of metadata and .json, with the captions
    config: str | None = None    # the configuration of a dataset of the Hub


@dataclass
class Found:
    """Counts what a source contains: files by suffix; images and captions by the column or key that has them."""
    files: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    captions: Counter = field(default_factory=Counter)
    keys: set = field(default_factory=set)       # all keys of samples that have no caption under the expected key
    numbered: set = field(default_factory=set)   # names of folders such as 10_cat, whose number is ignored

    def notes(self) -> list[str]:
        """Returns notes for the user: which columns and keys were used, and that numbers of folders were ignored."""
        def listed(counts):
            return ", ".join(f"{name} ({n})" if len(counts) > 1 else name for name, n in counts.most_common())
        notes = [f"images from column {listed(self.images)}"] * bool(self.images)
        notes += [f"captions from {listed(self.captions)}"] * bool(self.captions)
        if self.numbered:
            notes.append(f"the number in {', '.join(sorted(self.numbered))} is not used: no image is repeated")
        return notes


def samples_of(parts: list[tuple[Path, str]], index_folder: Path | None, found: Found, chosen: Chosen = Chosen()
               ) -> Iterator[dict]:
    """Yields the samples (dicts, see _samples) of `parts`, the result of parts_of, in fixed order. Counts files and
    keys in `found`. index_folder: for indexes of tar files, None: next to them. Raises ValueError for a broken part."""
    for path, label in parts:
        if os.path.isdir(path):
            prefix = f"{label}/" if len(parts) > 1 else ""
            for sample in _folder_samples(str(path), found, chosen):
                yield dict(sample, name=f"{prefix}{sample['name']}")
        else:
            for sample in _tar_samples(path, label, index_folder, found, chosen):
                _count(sample, found)
                yield sample


def parts_of(source: str, index_folder: Path | None, chosen: Chosen = Chosen()) -> list[tuple[Path, str]]:
    """Returns [(folder of images or tar file, its name for messages)] for a source: folders, shards (path, glob or
    {000..031}), pipe:COMMAND, hub:NAME[:SPLIT]. Rewrites tables as tar files. Raises ValueError if this fails."""
    return [(_as_tar(path, index_folder, chosen), label) for part, name in _parts(source, index_folder, chosen)
            for path, label in (_in_folder(part, name) if os.path.isdir(part) else [(part, name)])]


def content_of(place: Place) -> bytes:
    """Returns the bytes at `place`, which is (file, offset, number of bytes)."""
    file, offset, length = place
    check_file(file)
    with open(file, "rb") as handle:     # opened for each place, because worker processes cannot share an open file
        handle.seek(offset)
        return handle.read(length)


# ----- images and the files next to them -----------------------------------------------------------------------------

def _in_folder(folder: Path, label: str) -> list[tuple[Path, str]]:
    """Returns [(path, name for messages)] of a folder's shards or, if it has images or no shards, of the folder."""
    places, _ = _folder_places(str(folder))
    if "dataset_dict.json" in places:            # the package datasets writes this file if there are several splits
        splits = sorted({name.split("/")[0] for name in places if name.endswith("/state.json")})
        if "train" not in splits and len(splits) != 1:
            raise ValueError(f"{folder} has the splits {', '.join(splits) or 'none'} and no split train: "
                             f"give the folder of one of them")
        return _in_folder(folder / ("train" if "train" in splits else splits[0]), label)
    inside = _shards_among(places)
    if not inside or any(_split(name)[1] in SUFFIXES for name in places):
        return [(folder, label)]
    paths = [folder / name for name in inside                                # skips cache files of the package datasets
             if not re.fullmatch(r"(cache|indices)-.*\.arrow", posixpath.basename(name))]
    return [(path, str(path)) for path in paths]


def _shards_among(places: dict[str, Place]) -> list[str]:
    return [name for name in places
            if _split(name)[1] in (".tar", *TABLES) and posixpath.basename(name) != "metadata.parquet"]


def _folder_samples(folder: str, found: Found, chosen: Chosen) -> Iterator[dict]:
    """Yields a sample (a dict, see _samples) for each image or unusable file in a folder. Counts keys in `found`."""
    places, hidden = _folder_places(folder)
    found.files.update(Counter(_split(name)[1] for name in places))
    yield from (dict(name=name, problem="a shard next to images: give it as a source of its own")
                for name in _shards_among(places))
    yield from (dict(name=name, problem=HIDDEN) for name in hidden)
    for sample in _samples(places, chosen):
        parent = posixpath.basename(posixpath.dirname(sample["name"])) or os.path.basename(os.path.abspath(folder))
        # kohya's trainer would use each image of a folder "10_cat" 10 times. Here the number is ignored, with a note.
        if re.match(r"\d{1,3}_", parent):
            found.numbered.add(parent)
        _count(sample, found)
        yield sample


def _count(sample: dict, found: Found) -> None:
    found.captions.update([sample["key"]] if "key" in sample else [])
    found.keys.update(sample.get("keys", ()))


def _folder_places(folder: str) -> tuple[dict[str, Place], list[str]]:
    """Returns {name relative to the folder: place} of all files below it, sorted; and the names of folders and images
    that are hidden, because their names begin with a dot. macOS and file managers create such files for thumbnails."""
    def stop(error):                             # without this, os.walk skips folders that it is not allowed to read
        raise error
    places, hidden, seen = {}, [], set()
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in seen:
            raise ValueError(f"{root} is a link to a folder that is already below {folder}: remove the link")
        seen.add(os.path.realpath(root))
        hidden += [Path(root, name).relative_to(folder).as_posix() for name in (*folders, *names)
                   if name.startswith(".") and (name in folders or _split(name)[1] in SUFFIXES)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                places[Path(root, name).relative_to(folder).as_posix()] = (os.path.join(root, name), 0, -1)
    return dict(sorted(places.items())), sorted(hidden)


def _split(name: str) -> tuple[str, str]:
    """Returns the name without its suffix, and the suffix in lower case: "a/B" and ".jpg" for "a/B.JPG"."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def _samples(places: dict[str, Place], chosen: Chosen) -> Iterator[dict]:
    """Yields a sample for each image among the files `places`, {name: place}. Captions come from the files next to it.

    A sample is a dict. All samples have "name" and "problem", the reason why the sample cannot be used, or None. Usable
    ones also have "place", "size" (height, width), "captions" and "numbers" (for filters); "key", the captions' key in
    metadata or .json; and "keys", all keys, if the expected key has no caption. All values can be stored as JSON."""
    rows, doubled = _metadata_rows(places, chosen.image)
    for name in sorted(rows):
        if name not in places:
            yield dict(name=name, problem=f"named in {rows[name]['']}, but not there")
        elif _split(name)[1] not in (*SUFFIXES, *UNREADABLE):
            yield dict(name=name, problem=f"named in {rows[name]['']}, but not an image")
    yield from (dict(name=name, problem=f"twice in {table}, the last row counts") for name, table in doubled)
    by_stem = {_split(name): place for name, place in places.items()}
    for name in places:
        if not name.isascii():
            by_stem.setdefault(_split(_composed(name)), places[name])
    for name, place in places.items():
        stem, suffix = _split(name)
        if suffix in UNREADABLE:
            yield dict(name=name, problem=f"{suffix} files cannot be read: save it as .png or .jpg")
        if suffix not in SUFFIXES:
            continue
        try:
            with decoding():
                size = _size_of(place)
        except ValueError as error:
            yield dict(name=name, problem=str(error))
            continue
        try:
            texts = _texts(stem, by_stem, rows.get(name, {}), chosen.caption)
        except (ValueError, OSError) as error:   # the text is not UTF-8 or not JSON, or its file is a broken link
            yield dict(name=name, problem=f"its text cannot be read: {reason_of(error)}")
            continue
        yield dict(name=name, problem=None, place=place, size=size, **texts)


def _composed(name: str) -> str:
    """Returns the name in Unicode form NFC, because macOS writes "é" as two characters, but other systems as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _size_of(place: Place) -> tuple[int, int]:
    """Returns an image's (height, width) after EXIF orientation. Raises errors of any kind for a damaged image."""
    file, start, length = place
    check_file(file)
    with open(file, "rb") as handle:
        end = start + length if length >= 0 else os.fstat(handle.fileno()).st_size
        if end - start > LARGEST:
            raise ValueError(f"it has {end - start} bytes, expected at most {LARGEST}")
        handle.seek(start)
        # Of a JPEG, first read only HEAD bytes: its size is near the start. In other formats, the size may come later.
        short = [min(start + HEAD, end)] * (handle.read(2) == b"\xff\xd8")
        for stop in (*short, end):
            try:
                with open_header(handle, start, stop) as image:
                    turned = orientation(image) in (5, 6, 7, 8)
                    # For TIFF, newer versions of Pillow return the size after rotation, so read the stored size.
                    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
                    return (width, height) if turned else (height, width)
            except Exception:     # if HEAD bytes were too few, which raises many kinds of errors, try the whole file
                if stop == end:
                    raise


def _texts(stem: str, by_stem: dict[tuple[str, str], Place], row: dict, column: str | None) -> dict:
    """Returns a dict of an image's captions, numbers, key, keys, see _samples. Captions come from its metadata, `row`,
    else .txt, else .caption, else .json. With `column`, the user's choice of key, .json precedes .txt.

    stem: the image's name without suffix. by_stem: {(stem, suffix): place of the file}. Raises ValueError or OSError if
    a file cannot be read."""
    def beside(suffix: str) -> str | None:
        place = by_stem.get((stem, suffix)) or by_stem.get((_composed(stem), suffix))
        return place and _text(place)
    text = beside(".json")
    facts = {} if text is None else parsed(text)
    if not isinstance(facts, dict):
        raise ValueError("its .json is not an object")
    key, captions = _captions_in(row, column)
    if not captions and column:
        key, captions = _captions_in(facts, column)
    if not captions and (text := beside(".txt")) is not None:
        captions = _cleaned(text.split("\n"))
    if not captions and (text := beside(".caption")) is not None:
        captions = _cleaned([text])
    if not captions:
        key, captions = _captions_in(facts, column)
    for caption in captions:
        # JSON may contain half of a surrogate pair, which UTF-8 and tokenizers cannot represent.
        if half := not caption.isascii() and re.search("[\ud800-\udfff]", caption):
            raise ValueError(f"half a character, \\u{ord(half[0]):04x}, such as half an emoji, in its caption")
    found = dict(captions=captions, numbers={**_numbers_in(facts), **_numbers_in(row)})
    if key is not None:
        found["key"] = key
    if not captions or column and key is None:
        keys = sorted(key for key in {*row, *facts} - {"", None, "file_name"})
        found |= dict(keys=keys) if keys else {}
    return found


def _text(place: Place, most: int = 2 ** 24) -> str:
    size = place[2] if place[2] >= 0 else os.stat(place[0]).st_size
    if size > most:
        raise ValueError(f"it has {size} bytes, expected at most {most}")
    return decoded(content_of(place))


def _captions_in(row: dict, column: str | None) -> tuple[str | None, list[str]]:
    """Returns the first key of `row` that has captions, and the list of its captions; (None, []) if no key has any.
    Tries only the key `column` or, if column is None, all CAPTION_KEYS."""
    if not row:                                  # the usual case, without metadata, must be fast
        return None, []
    lower = {} if column else {key.lower(): key for key in row}
    for key in [column] if column else [lower.get(key) for key in CAPTION_KEYS]:
        value = row.get(key)
        if isinstance(value, str) and value.startswith("["):
            with contextlib.suppress(ValueError):      # raised for a caption that begins with "[" but is not a list
                value = parsed(value)
        if captions := _cleaned(value if isinstance(value, list) else [value]):
            return key, captions
    return None, []


def _cleaned(captions: list) -> list[str]:
    """Removes empty captions and replaces line breaks and repeated spaces by one space, as CLIP's tokenizer does."""
    return [" ".join(text.split()) for text in captions if isinstance(text, str) and text.strip()]


def _numbers_in(row: dict) -> dict[str, float]:
    """Returns {key: number} for values of `row` that filters can compare: numbers, also as text, except NaN."""
    numbers = {}
    for key, value in row.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not math.isnan(number := float(value)):
                numbers[key] = number
    return numbers


def _metadata_rows(places: dict[str, Place], column: str | None) -> tuple[dict[str, dict], list[tuple[str, str]]]:
    """Returns {image: its row in the nearest metadata.jsonl, .csv or .parquet above it}, where row[""] is the name of
    that file; and [(image, metadata file)] for images with several rows. column: the key whose values name images."""
    rows, doubled, key = {}, [], column or "file_name"
    tables = [name for name in places
              if posixpath.basename(name) in ("metadata.jsonl", "metadata.csv", "metadata.parquet")]
    composed = {_composed(name): name for name in places if not name.isascii()} if tables else {}
    for table in sorted(tables, key=lambda name: name.count("/")):   # the rows of deeper files replace the others
        folder, number = posixpath.dirname(table), 0
        try:
            for number, row in enumerate(_rows(table, places[table]), 1):
                row = parsed(row) if isinstance(row, str) else row
                if not isinstance(row, dict):
                    raise ValueError("it is not an object")
                row = {name: value for name, value in row.items() if name is not None}  # csv's key of surplus cells
                if key not in row:
                    raise ValueError(f"{key!r} is not among its keys {', '.join(row) or '(none)'}, "
                                     "and --image-column names no other")
                name = posixpath.normpath(posixpath.join(folder, row[key]))
                name = name if name in places else composed.get(_composed(name), name)
                doubled += [(name, table)] * (rows.get(name, {}).get("") == table)
                rows[name] = {**row, "": table}
        except Exception as error:               # csv, pyarrow and deeply nested JSON raise errors of other kinds
            raise ValueError(f"{places[table][0]}, row {number}: {reason_of(error)}; "
                             f"expected {key} and text in each row") from error
    return rows, doubled


def _rows(table: str, place: Place) -> Iterator[dict | str]:
    """Yields the rows of the metadata file `table` (a name) at `place`: dicts or, for .jsonl, lines of text."""
    if table.endswith(".parquet"):
        yield from open_table(io.BytesIO(content_of(place)), table).rows
        return
    text = _text(place, 2 ** 32)
    if table.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    # splitlines() would also split at U+2028, which a JSON text may contain.
    yield from filter(str.strip, text.split("\n"))


# ----- shards --------------------------------------------------------------------------------------------------------

def _parts(source: str, index_folder: Path | None, chosen: Chosen) -> list[tuple[Path, str]]:
    """Returns [(folder or shard, its name for messages)] of a source. Stores data of pipe: and hub: as tar files."""
    if chosen.config and not source.startswith("hub:"):
        raise ValueError(f"{source} has no configurations: remove --dataset-config, or give hub:NAME")
    if source.startswith("pipe:"):
        return [(tar, str(tar)) for tar in
                (_spooled(f"pipe:{command}", command.split("/")[-1], index_folder,
                          lambda tar, command=command: _run(command, tar)) for command in _expand(source[5:]))]
    if source.startswith("hub:"):
        return [(_table_as_tar(source, source[4:], lambda: hub_table(source[4:], chosen.config), index_folder, chosen),
                 source)]
    if re.match(r"\w+://", source):              # a URL may need credentials, so the user gives a command, pipe:COMMAND
        raise ValueError(f"{source} is not on this disk: "
                         f"give the command that fetches it, such as 'pipe:curl -sfL {source}'{_hub_hint(source)}")
    files, missing = [], []
    for pattern in [source] if os.path.exists(source) else _expand(source):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files, missing = files + matches, missing + [pattern] * (not matches)
    if missing:
        more = f", and {len(missing) - 1} more of {source} are missing" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: there is no such folder or file{more}{_hub_hint(source)}")
    return [(Path(file), file) for file in files]


def _hub_hint(source: str) -> str:
    name = re.fullmatch(r"(?:https://huggingface\.co/datasets/)?(\w[\w.-]*/\w[\w.-]*)", source)
    return f"; a dataset of the Hub is given as hub:{name[1]}" if name else ""


def _expand(pattern: str) -> list[str]:
    """Expands braces as in "a{000..031}.tar" and "{a,b}.tar" like a shell, but not in ${NAME}."""
    match = re.search(r"(?<!\$)\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    if math.prod(1 + int(b) - int(a) for a, b in re.findall(r"\{(\d{1,20})\.\.(\d{1,20})\}", pattern)) > SHARDS:
        raise ValueError(f"{pattern} names more than {SHARDS} shards: correct its range")
    first, last, words = match.groups()
    if words is None:
        words = ",".join(f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        if not words:
            raise ValueError(f"{pattern}: the range {match[0]} is empty, expected the smaller number first")
    return [text for word in words.split(",")
            for text in _expand(pattern[:match.start()] + word + pattern[match.end():])]


def _as_tar(path: Path, index_folder: Path | None, chosen: Chosen) -> Path:
    """Returns `path` or, if it leads to a table, the path of a tar file of its images, 000000012.COLUMN.jpg, ..."""
    with reading(path) if not os.path.isdir(path) else contextlib.nullcontext():
        stat = path.stat()
    if path.suffix.lower() not in TABLES or os.path.isdir(path):
        return path
    known_as = f"{path.absolute()} ({stat.st_size} bytes of {stat.st_mtime_ns})"
    return _table_as_tar(known_as, path.stem, lambda: open_table(path, str(path)), index_folder, chosen)


def _tar_samples(path: Path, label: str, index_folder: Path | None, found: Found, chosen: Chosen) -> Iterator[dict]:
    """Yields the samples (see _samples) of a tar file, from its index. Writes the index if it is missing or old."""
    stat, of_table = path.stat(), path.name.endswith(".table.tar")
    stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    if chosen.caption or chosen.image:           # the samples in the index depend on these choices of the user
        stamp += [chosen.caption, chosen.image]
    known_as = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:12]
    index = (index_folder / f"{path.stem}-{known_as}.index.json" if index_folder
             else path.with_name(f"{path.name}.index.json"))
    content = {}
    with contextlib.suppress(OSError, ValueError):         # there is no index yet, or it is incomplete
        content = parsed(index.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("stamp") != stamp:
        places, unusable, whole = _tar_places(path)
        samples = [dict(sample, place=sample["place"][1:]) if "place" in sample else sample
                   for sample in _samples(places, chosen)]
        samples += unusable
        samples += [dict(name="...", problem=f"cut off or damaged after {len(places)} files")] * (not whole)
        if of_table:
            samples += [dict(name=_split(name)[0], problem=_text(place)) for name, place in places.items()
                        if name.endswith(NOT_USABLE)]
        kinds = Counter(_split(name)[1] for name in places if not name.endswith(NOT_USABLE))
        content = dict(stamp=stamp, found=kinds, samples=samples)
        with contextlib.suppress(OSError):       # without permission to write, the tar file is read again next time
            write_atomically(index, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))
    found.files.update(content["found"])
    for sample in content["samples"]:
        if "place" in sample:
            sample["place"] = (str(path), *sample["place"])
            if of_table:
                found.images.update([_split(_split(sample["name"])[0])[1][1:]])
        yield dict(sample, name=f"{label}/{sample['name']}")


def _tar_places(path: Path) -> tuple[dict[str, Place], list[dict], bool]:
    """Returns, for an uncompressed tar file, {member's name: place of its content}; a list of samples, with only name
    and problem, of unusable members; and whether the tar file is complete."""
    with open(path, "rb") as file:
        if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):   # gzip, bzip2, xz, zstd
            raise ValueError(f"{path} is compressed, so it could only be read from its beginning: unpack it to a plain "
                             ".tar, which is hardly larger, because images are compressed already")
        places, links, unusable, end, size = {}, {}, [], 0, os.fstat(file.fileno()).st_size
        with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()              # otherwise tarfile keeps all members in memory
                name, complete = posixpath.normpath(member.name), member.offset_data + member.size <= size
                if member.isdir() or not complete:
                    continue
                if posixpath.basename(name).startswith("."):
                    unusable += [dict(name=name, problem=HIDDEN)] * (_split(name)[1] in SUFFIXES)
                    continue
                if name in places:
                    unusable.append(dict(name=name, problem="twice in the shard, the last one counts"))
                    links.pop(name, None)
                places[name] = (str(path), member.offset_data, member.size)
                if member.islnk() or member.issym():       # a hard link names a member, a symbolic link a relative path
                    folder = posixpath.dirname(name) * member.issym()
                    links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
                elif not member.isreg() or member.issparse():
                    unusable.append(dict(name=name, problem="neither a file nor a link, or with holes in it"))
                    del places[name]
            end = tar.offset
        file.seek(end)
        whole = file.read(512) == bytes(512)     # a complete file has zeros at `end`, where tarfile has stopped
    for name in links:
        target = links[name]
        for _ in range(40):                      # follow links to links; more than 40 must be a cycle, as in Linux
            target = links.get(target, target)
        places[name] = places[target] if target in places and target not in links else None
        if places[name] is None:
            unusable.append(dict(name=name, problem=f"a link to {target}, which is not in the shard"))
    places = {name: place for name, place in places.items() if place}
    if not places and not whole:
        image = _split(path.name)[1] in (*SUFFIXES, *UNREADABLE)
        found = "is a single image" if image else "cannot be read as a tar file"
        raise ValueError(f"{path} {found}: "
                         "expected a folder of images, a complete .tar or a .parquet file")
    return places, unusable, whole


# ----- sources that are rewritten as tar files first -----------------------------------------------------------------

def _spooled(known_as: str, label: str, folder: Path | None, write: Callable[[Path], None],
             suffix: str = ".tar") -> Path:
    """Returns the path of the tar file in `folder` for the source `known_as`. If missing, write(path) creates it."""
    if folder is None:
        raise ValueError(f"{known_as} needs an index_folder, where its content is kept")
    label = re.sub(r"[^\w.-]+", "-", label.removesuffix(".tar"))[-40:].lstrip("-.")
    path = folder / f"{label}-{hashlib.sha256(os.fsencode(known_as)).hexdigest()[:12]}{suffix}"
    if not path.exists():
        write_atomically(path, write)
    return path


def _run(command: str, path: Path) -> None:
    """Writes a command's output to `path`. Raises ValueError if the command fails or its output is incomplete."""
    with open(path, "wb") as file:
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
    message = (done.stderr.decode(errors="replace").strip().splitlines() or ["it gave no message"])[-1]
    if done.returncode:
        raise ValueError(f"pipe:{command} failed with exit status {done.returncode}: {message}")
    try:
        whole = _tar_places(path)[2]     # may be False: if a fails in a | b, the shell returns only b's exit status
    except ValueError as error:
        raise ValueError(f"pipe:{command}: {str(error).replace(str(path), 'its output')} ({message})") from None
    if not whole:
        raise ValueError(f"pipe:{command}: its output of {path.stat().st_size} bytes is cut off ({message})")


def _table_as_tar(known_as: str, label: str, table: Callable[[], Table], index_folder: Path | None, chosen: Chosen
                  ) -> Path:
    """Returns the path of a tar file with the rows of table(), one for each image column and configuration."""
    known_as = " ".join([known_as, *(f"{name} {value}" for name, value in (("image", chosen.image),
                                                                           ("config", chosen.config)) if value)])
    return _spooled(known_as, label, index_folder, lambda tar: write_tar(table(), tar, chosen.image), ".table.tar")
