"""Reads tables with an image in each row (parquet and arrow files, datasets of the Hub) and writes them as tar files.

  path -open_table-> Table;  "NAME:SPLIT" -hub_table-> Table;  Table -write_tar-> a tar file, an image per row

Note: a row may contain the name of an image file instead of an image. Such a row is skipped: reading the file would let
the table's author choose what is read from this disk. Only files in the caches of the Hub and of the package datasets
are read, because that package stores images there. A Hub dataset that names local data files is an error.
Needs: pyarrow for parquet and arrow files, datasets for the Hub.
"""
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loading.errors import printable
from loading.files import reason_of
from loading.hub import limit_waits

TABLES = (".parquet", ".arrow")
NOT_USABLE = ".skipped"          # suffix of tar members that contain the reason why a row has no image
# Names of the column with the images, in order of preference. Another name is possible if only one column has images.
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "photo", "picture")

PLAIN = (str, int, float, type(None))            # other columns keep only values, or lists of values, of these types


@dataclass
class Table:
    """A table of images. columns: {name: whether the column may contain images}. folders: image files that a row names
    are read only if they are in these folders."""
    name: str
    columns: dict[str, bool]
    rows: Iterable[dict]
    folders: list[Path] = field(default_factory=list)


def open_table(file, name: str) -> Table:
    """Opens a parquet or arrow `file` (path or file object) as a Table. Raises ValueError if it cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name} needs the package pyarrow: pip install pyarrow") from None

    def checked(read: Iterator) -> Iterator:
        try:
            yield from read
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{name} cannot be read as a table: {reason_of(error)}") from error

    def opened() -> Iterator:                    # yields the schema, then the rows
        if name.lower().endswith(".parquet"):
            table = pyarrow.parquet.ParquetFile(file)
            yield table.schema_arrow
            batches = table.iter_batches(batch_size=16)
        else:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            yield stream.schema
            batches = (batch.slice(start, 16) for batch in stream for start in range(0, len(batch), 16))
        for batch in batches:
            yield from batch.to_pylist()

    def may_hold_images(kind) -> bool:           # true if the cells are bytes, or dict(bytes, path) as on the Hub
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    rows = checked(opened())
    return Table(name, {column.name: may_hold_images(column.type) for column in next(rows)}, rows)


def hub_table(name_and_split: str, config: str | None = None) -> Table:
    """Opens a dataset of the Hub, NAME[:SPLIT], as a Table. Raises ValueError if it cannot be loaded."""
    name, _, split = name_and_split.partition(":")
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise ValueError(f"hub:{name} needs the package datasets: pip install datasets") from None
    limit_waits()
    try:
        builder = datasets.load_dataset_builder(name, *[config] * bool(config))
        for files in (getattr(builder.config, "data_files", None) or {}).values():
            for file in files:
                if not re.match("(hf|https?)://", file.split("::")[-1]):
                    raise ValueError(f"it names {printable(file)}, which is not a file of the Hub, and is not read")
        rows = datasets.load_dataset(name, *[config] * bool(config), split=split or "train")
    except Exception as error:                   # datasets raises many kinds of errors: not found, no network, ...
        configs = re.search(r"available configs: (\[.*?\])", str(error))
        more = f" It has the configurations {configs[1]}: choose one with --dataset-config" if configs else ""
        raise ValueError(f"hub:{name} cannot be loaded: {reason_of(error)}{more}") from error
    columns = {column: isinstance(kind, datasets.Image) or isinstance(kind, dict) and "bytes" in kind
               or getattr(kind, "dtype", None) in ("binary", "large_binary") for column, kind in rows.features.items()}
    # Reads the rows without decoding them, because decoding an image column would open files that its cells name.
    stored = (row for batch in rows.with_format("arrow").iter(16) for row in batch.to_pylist())
    caches = [getattr(getattr(datasets, "config", None), cache, None)
              for cache in ("DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH")]
    caches.append(Path(constants.HF_HUB_CACHE, f"datasets--{(builder.repo_id or name).replace('/', '--')}"))
    return Table(f"hub:{name}", columns, stored, [Path(cache).resolve() for cache in caches if cache])


def write_tar(table: Table, path: Path, asked: str | None = None) -> None:
    """Writes a table as a tar file. A row becomes NUMBER.COLUMN.jpg and NUMBER.COLUMN.json or, if it has no image,
    NUMBER.skipped, which contains the reason. asked: the user's name of the image column, or None. Raises ValueError
    if the table has no such column."""
    column = image_column(table, asked)
    label = re.sub(r"[^\w-]+", "-", column)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(table.rows):
            facts = {key: value for key, value in row.items() if key != column and all(
                isinstance(item, PLAIN) for item in (value if isinstance(value, list) else [value]))}
            # Pillow recognizes images by their content, not by their name, so all images can be named .jpg.
            try:
                members = {f".{label}.jpg": content_of_cell(row[column], table.folders),
                           f".{label}.json": json.dumps(facts, default=str).encode()}
            except (ValueError, OSError) as error:
                members = {NOT_USABLE: f"column {column}: {reason_of(error)}".encode(errors="backslashreplace")}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def image_column(table: Table, asked: str | None) -> str:
    """Returns the name of the image column: `asked` or, if that is None, the first of IMAGE_COLUMNS that may contain
    images, or else the only column that may. Raises ValueError if there is no such column, or more than one."""
    names = ", ".join(table.columns)
    candidates = [name for name, usable in table.columns.items() if usable]
    if asked is not None:
        if asked not in candidates:
            problem = "holds no images" if asked in table.columns else "is not there"
            raise ValueError(f"{table.name}: --image-column {asked} {problem}: expected a column of bytes, "
                             f"found {names}")
        return asked
    if not candidates:
        raise ValueError(f"{table.name}: row 0 has no image: expected a column of bytes, found {names}")
    lower = {name.lower(): name for name in reversed(candidates)}
    usual = [lower[name] for name in IMAGE_COLUMNS if name in lower]
    if not usual and len(candidates) > 1:
        raise ValueError(f"{table.name} has several columns of images, {', '.join(candidates)}: "
                         f"choose one with --image-column")
    return (usual or candidates)[0]


def content_of_cell(cell, folders: list[Path]) -> bytes:
    """Returns the image in a cell as bytes. Raises ValueError if there is none or it is a file outside of `folders`."""
    path = cell if isinstance(cell, str) else None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not path or not isinstance(path, str):
        raise ValueError("it is null")
    if not any(Path(path).resolve().is_relative_to(folder) for folder in folders):
        raise ValueError(f"it only names the file {printable(path)}, and files that a table names are not read")
    return Path(path).read_bytes()
