"""Where captioned images come from: folders, tar shards, pipes, parquet files, the Hub.

  source -samples_of-> one dict per image: name, place (file, offset, bytes), size (height, width), captions, numbers;
                       for a file that cannot be used: name and problem
  place -content_of-> its bytes, in any order

Only headers of images are read here. To everything that follows, a folder and a tar file are the same: names, and the
places of their content. A tar file's headers are read once, and the result is kept in an index next to it. Sources
without such places (a pipe, a parquet file, a dataset of the Hub) are first rewritten as a tar file, once.
Surprise: a tar file has no table of contents, and Python's tarfile takes a damaged header for its end. So half a
download would pass for a smaller shard; see _tar_places.
Layouts: https://huggingface.co/docs/datasets/image_dataset (folders), https://github.com/webdataset/webdataset (tar).
Needs: loading/files.py, extras/images.py; pyarrow for parquet files, datasets for the Hub.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from extras.images import decoding, open_header, orientation, reason
from loading.files import write_atomically

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".jpe", ".apng", ".psd", ".svg", ".tga", ".exr", ".ppm", ".ico",
              ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")      # named, not silently ignored
CAPTION_KEYS = ("text", "caption", "captions")
HEAD = 2 ** 15                   # bytes of an image that are read to learn its size
INDEX_VERSION = 2                # of the index that _tar_samples writes; a new number rebuilds all indexes

Place = tuple[str, int, int]     # file, offset, bytes (-1: up to the end): where something can be read


def samples_of(source: str, index_folder: Path | None, found: Counter) -> Iterator[dict]:
    """The samples of a folder, of shards (name, glob, {000..031}), of pipe:COMMAND or hub:NAME[:SPLIT], in fixed order.

    found: counts the files, by suffix.  Raises ValueError, in one line, for a source that cannot be read.
    """
    shards = None
    if os.path.isdir(source):
        places = _folder_places(source)
        kinds = Counter(_split(name)[1] for name in places)
        inside = [name for name in places if _split(name)[1] in (".tar", ".parquet")]
        if not inside or kinds.keys() & set(SUFFIXES):
            found.update(kinds)
            yield from (dict(name=name, problem="a shard next to images: give it as a source of its own")
                        for name in inside)
            yield from _samples(places)
            return
        shards = [Path(source, name) for name in inside]
    for shard in _shards(source, index_folder) if shards is None else shards:
        if shard.suffix.lower() == ".parquet":
            shard = _parquet_as_tar(shard, index_folder)
        yield from _tar_samples(shard, index_folder, found)


def content_of(place: Place, limit: int = -1) -> bytes:
    """The bytes at a place, or its first `limit` bytes."""
    file, offset, length = place
    with open(file, "rb") as handle:             # opened each time: an open file cannot be passed to worker processes
        handle.seek(offset)
        return handle.read(length if limit < 0 else limit if length < 0 else min(limit, length))


# ----- images and the files next to them -----------------------------------------------------------------------------

def _folder_places(folder: str) -> dict[str, Place]:
    """Names, relative to the folder, of all files below it, sorted -> their places.  Dot files and folders: skipped."""
    def stop(error):                             # os.walk on its own skips a folder that it may not read
        raise error
    places, seen = {}, set()
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(root) in seen:
            raise ValueError(f"{root} is a link to a folder that is already below {folder}: remove the link")
        seen.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                places[Path(root, name).relative_to(folder).as_posix()] = (os.path.join(root, name), 0, -1)
    return dict(sorted(places.items()))


def _split(name: str) -> tuple[str, str]:
    """"a/B.JPG" -> "a/B", ".jpg" """
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def _samples(places: dict[str, Place]) -> Iterator[dict]:
    """The images among files, name -> place, each with the files of the same name.

    Every sample has a name and a problem, None or why it cannot be used. Without a problem it also has place, size
    (height, width), captions and numbers. All of it can be written as JSON.
    """
    rows = _metadata_rows(places)
    for name in sorted(rows.keys() - places.keys()):
        yield dict(name=name, problem=f"named in {rows[name]['']}, but not there")
    by_stem = {_split(name): place for name, place in places.items()}
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
            captions, numbers = _texts(stem, by_stem, rows.get(name, {}))
        except ValueError as error:              # not UTF-8, not JSON
            yield dict(name=name, problem=f"its text cannot be read: {reason(error)}")
            continue
        yield dict(name=name, problem=None, place=place, size=size, captions=captions, numbers=numbers)


def _size_of(place: Place) -> tuple[int, int]:
    """Height and width as shown, with as little reading as possible.  Raises whatever Pillow does."""
    file, start, length = place
    with open(file, "rb") as handle:
        end = start + length if length >= 0 else os.fstat(handle.fileno()).st_size
        handle.seek(start)
        # JPEG stores it first, unless a preview or a colour profile precedes it; other formats may at the end.
        short = [min(start + HEAD, end)] * (handle.read(2) == b"\xff\xd8")
        for stop in (*short, end):
            try:
                with open_header(handle, start, stop) as image:
                    turned = orientation(image) in (5, 6, 7, 8)
                    # For a TIFF file, newer versions of Pillow return the upright size, so it is taken from the tags.
                    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
                    return (width, height) if turned else (height, width)
            except Exception:                    # of many kinds: what the first bytes lack, the whole file may have
                if stop == end:
                    raise


def _texts(stem: str, by_stem: dict[tuple[str, str], Place], row: dict) -> tuple[list[str], dict[str, float]]:
    """Captions and numbers of an image: from its row of metadata, else .txt, else .caption, else .json."""
    facts = json.loads(_text(by_stem[stem, ".json"])) if (stem, ".json") in by_stem else {}
    if not isinstance(facts, dict):
        raise ValueError("its .json is not an object")
    captions = _captions_in(row)
    if not captions and (stem, ".txt") in by_stem:
        captions = _cleaned(_text(by_stem[stem, ".txt"]).split("\n"))
    if not captions and (stem, ".caption") in by_stem:
        captions = _cleaned([_text(by_stem[stem, ".caption"])])
    return captions or _captions_in(facts), {**_numbers_in(facts), **_numbers_in(row)}


def _text(place: Place) -> str:
    return content_of(place).decode("utf-8-sig")           # -sig: some editors begin a file with a mark


def _captions_in(row: dict) -> list[str]:
    value = next((row[key] for key in CAPTION_KEYS if row.get(key)), [])
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):    # a list in a column of a CSV file; or a caption that begins with "["
            value = json.loads(value)
    return _cleaned(value if isinstance(value, list) else [value])


def _cleaned(captions: list) -> list[str]:
    """Without empty ones, each on one line with single spaces, as CLIP's tokenizer would make them anyway."""
    return [" ".join(text.split()) for text in captions if isinstance(text, str) and text.strip()]


def _numbers_in(row: dict) -> dict[str, float]:
    """The values that filters can compare: numbers, also as text, as in CSV files.  null and NaN count as missing."""
    numbers = {}
    for key, value in row.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not math.isnan(number := float(value)):
                numbers[key] = number
    return numbers


def _metadata_rows(places: dict[str, Place]) -> dict[str, dict]:
    """Name of an image -> its row of the nearest metadata.jsonl or .csv above it; under "", the name of that file."""
    rows = {}
    tables = [name for name in places if posixpath.basename(name) in ("metadata.jsonl", "metadata.csv")]
    for table in sorted(tables, key=lambda name: name.count("/")):             # deeper ones later, so that they win
        folder, number = posixpath.dirname(table), 0
        try:
            text = _text(places[table])
            # Not splitlines(): a JSON text may contain U+2028, which splitlines() takes for the end of a line.
            lines = (csv.DictReader(io.StringIO(text, newline="")) if table.endswith(".csv")
                     else filter(str.strip, text.split("\n")))
            for number, line in enumerate(lines, 1):
                row = json.loads(line) if isinstance(line, str) else line
                rows[posixpath.normpath(posixpath.join(folder, row["file_name"]))] = {**row, "": table}
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(f"{places[table][0]}, row {number}: {reason(error)}; "
                             "expected file_name and text in each row") from error
    return rows


# ----- shards --------------------------------------------------------------------------------------------------------

def _shards(source: str, index_folder: Path | None) -> list[Path]:
    """Tar or parquet files of a source that is not a folder, in order.  Remote ones are fetched first."""
    if source.startswith("pipe:"):
        return [_spooled(f"pipe:{command}", command.split("/")[-1], index_folder,
                         lambda tar, command=command: _run(command, tar))
                for command in _expand(source[5:])]
    if source.startswith("hub:"):
        return [_spooled(source, source[4:], index_folder, lambda tar: _write_tar(_hub_rows(source[4:]), tar))]
    if re.match(r"\w+://", source):              # never guessed: which program would fetch it, with which credentials?
        raise ValueError(f"{source} is not on this disk: "
                         f"give the command that fetches it, such as 'pipe:curl -sfL {source}'")
    files, missing = [], []
    for pattern in [source] if os.path.exists(source) else _expand(source):
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files, missing = files + matches, missing + [pattern] * (not matches)
    if missing:
        more = f", and {len(missing) - 1} more of {source} are missing" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: there is no such folder or file{more}")
    return [Path(file) for file in files]


def _expand(pattern: str) -> list[str]:
    """Expands "a{000..031}.tar" and "{a,b}.tar" like a shell; ${NAME} stays as it is."""
    match = re.search(r"(?<!\$)\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        words = ",".join(f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        if not words:
            raise ValueError(f"{pattern}: the range {match[0]} is empty, expected the smaller number first")
    return [text for word in words.split(",")
            for text in _expand(pattern[:match.start()] + word + pattern[match.end():])]


def _tar_samples(path: Path, index_folder: Path | None, found: Counter) -> Iterator[dict]:
    """The samples of a tar file, from its index if size and modification time of the file are still the same."""
    stat = path.stat()
    stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
    known_as = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]
    index = (index_folder / f"{path.stem}-{known_as}.index.json" if index_folder
             else path.with_name(f"{path.name}.index.json"))
    content = {}
    with contextlib.suppress(OSError, ValueError):         # no index yet, or an incomplete one
        content = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("stamp") != stamp:
        places, doubled, whole = _tar_places(path)
        samples = [dict(sample, place=sample["place"][1:]) if "place" in sample else sample
                   for sample in _samples(places)]
        samples += [dict(name=name, problem="twice in the shard, the last one counts") for name in doubled]
        samples += [dict(name="...", problem=f"cut off or damaged after {len(places)} files")] * (not whole)
        content = dict(stamp=stamp, found=Counter(_split(name)[1] for name in places), samples=samples)
        with contextlib.suppress(OSError):       # if nothing may be written there, it is read again next time
            write_atomically(index, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))
    found.update(content["found"])
    for sample in content["samples"]:
        if "place" in sample:
            sample["place"] = (str(path), *sample["place"])
        yield dict(sample, name=f"{path}/{sample['name']}")


def _tar_places(path: Path) -> tuple[dict[str, Place], list[str], bool]:
    """Names in an uncompressed tar file -> places of their content; names that occur twice; is the file whole?"""
    with open(path, "rb") as file:
        if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):   # gzip, bzip2, xz, zstd
            raise ValueError(f"{path} is compressed, so it could only be read from its beginning: unpack it to a plain "
                             ".tar, which is hardly larger, because images are compressed already")
        places, doubled, end, size = {}, [], 0, os.fstat(file.fileno()).st_size
        with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()              # tarfile remembers all members it has seen
                name, complete = posixpath.normpath(member.name), member.offset_data + member.size <= size
                if member.isfile() and complete and not posixpath.basename(name).startswith("."):
                    doubled += [name] * (name in places)
                    places[name] = (str(path), member.offset_data, member.size)
            end = tar.offset
        file.seek(end)
        whole = file.read(512) == bytes(512)     # the end is a block of zeros; tarfile also stops at a damaged header
    if not places and not whole:
        raise ValueError(f"{path} cannot be read as a tar file: "
                         "expected a folder of images, a complete .tar or a .parquet file")
    return places, doubled, whole


# ----- sources that are rewritten as tar files first -----------------------------------------------------------------

def _spooled(known_as: str, label: str, folder: Path | None, write: Callable[[Path], None]) -> Path:
    """A tar file in `folder`; write(path) makes it unless it exists."""
    if folder is None:
        raise ValueError(f"{known_as} needs an index_folder, where its content is kept")
    label = re.sub(r"[^\w.-]+", "-", label.removesuffix(".tar"))[-40:].lstrip("-.")
    path = folder / f"{label}-{hashlib.sha256(known_as.encode()).hexdigest()[:12]}.tar"
    if not path.exists():
        write_atomically(path, write)
    return path


def _run(command: str, path: Path) -> None:
    """A command's output -> a file, which must be a complete tar file: a shell hides a failure of a in a | b."""
    with open(path, "wb") as file:
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE)
    message = (done.stderr.decode(errors="replace").strip().splitlines() or ["it gave no message"])[-1]
    if done.returncode:
        raise ValueError(f"pipe:{command} failed with exit status {done.returncode}: {message}")
    try:
        whole = _tar_places(path)[2]
    except ValueError as error:
        raise ValueError(f"pipe:{command}: {str(error).replace(str(path), 'its output')} ({message})") from None
    if not whole:
        raise ValueError(f"pipe:{command}: its output of {path.stat().st_size} bytes is cut off ({message})")


def _parquet_as_tar(path: Path, index_folder: Path | None) -> Path:
    def rows():
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from None
        for batch in ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    stat = path.stat()
    known_as = f"{path.absolute()} ({stat.st_size} bytes of {stat.st_mtime_ns})"
    return _spooled(known_as, path.stem, index_folder, lambda tar: _write_tar(rows(), tar))


def _hub_rows(name_and_split: str) -> Iterator[dict]:
    name, _, split = name_and_split.partition(":")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hub:{name} needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:                   # of a dozen kinds: not found, no network, another split, ...
        raise ValueError(f"hub:{name} cannot be loaded: {reason(error)}") from error
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):     # its bytes unchanged, rather than decoded
            rows = rows.cast_column(column, datasets.Image(decode=False))
    yield from rows


def _write_tar(rows: Iterable[dict], path: Path) -> None:
    """Rows of a table -> a tar file.  The image is the first column of bytes, or of dict(bytes, path) as on the Hub."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            image = next((value for value in row.values()
                          if isinstance(value, bytes) or isinstance(value, dict) and "bytes" in value), None)
            if image is None:
                raise ValueError(f"row {number} has no image: expected a column of bytes, found {', '.join(row)}")
            content = image if isinstance(image, bytes) else image["bytes"] or Path(image["path"]).read_bytes()
            facts = {key: value for key, value in row.items() if isinstance(value, (str, int, float, list))}
            # Pillow recognizes images by their content, not by their name, so .jpg will do for all.
            for suffix, data in ((".jpg", content), (".json", json.dumps(facts, default=str).encode())):
                member = tarfile.TarInfo(f"{number:09d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
