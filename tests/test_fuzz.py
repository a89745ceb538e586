"""Hostile files: every reader of a file that the user or a stranger made, times every way in which a file can be wrong.

  READERS: a valid file, and the command that reads it   x   kinds of spoiling   ->   one case, one id

A case fails on anything but one line on stderr with the file's name and exit code 2: a traceback, a file that is taken
as if nothing were wrong, more than SECONDS, more than MEMORY, a character that a terminal obeys, or a file that was
written anywhere but in --out. Readers that may go on without the file (a sample of a data set, a log) must go on.
All is in one process, so that hundreds of cases take minutes. Random kinds are drawn from the case's name.
"""
import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import sample
import train_a
import train_b
import train_c
from loading.errors import as_user_error, exit_on_user_error
from lora import add_lora, save_lora
from loading.weights import load_stage_c
from tiny import train_encoder
from tools import lora as lora_tool, weights as weights_tool
from training.data import open_dataset

pytestmark = pytest.mark.slow
TINY = Path(sample.__file__).parent / "models" / "tiny"
SECONDS, MEMORY = 60, 3 * 2 ** 30
EVIL = "\x1b]0;owned\x07\x9b2J\u202e\n\r"          # sets a window's title, clears the screen, turns the text around
SCENES = ["--data", "scenes:captioned:8", "--steps", "1", "--batch", "2", "--workers", "0", "--val-every", "0",
          "--device", "cpu", "--sample-every", "0"]


# ----- readers: a valid file, and what reads it ----------------------------------------------------------------------

class Reader(NamedTuple):
    """prepare(folder) writes what is valid -> the file that will be spoiled; run(folder, out) reads it.

    kinds: the groups of KINDS. goes_on: without the file. fields: of its JSON object, each with wrong values.
    """
    prepare: Callable[[Path], Path]
    run: Callable[[Path, Path], None]
    kinds: str
    goes_on: bool = False
    fields: dict = {}


def paint(*argv) -> Callable:
    """sample.py, in one step. "@x" stands for a file in the folder."""
    return lambda folder, out: sample.main(["--steps-c", "1", "--steps-b", "1", *map(str, expand(argv, folder)),
                                            "--out", str(out)])


def train(module, *argv) -> Callable:
    def run(folder: Path, out: Path) -> None:
        with exit_on_user_error():
            module.main(module.parse_args([*map(str, expand(argv, folder)), "--out", str(out)]))
    return run


def tool(module, *argv) -> Callable:
    def run(folder: Path, out: Path) -> None:
        sys.argv = ["tool", *map(str, expand(argv, folder, out))]
        with exit_on_user_error():
            module.main()
    return run


def expand(argv, folder: Path, out: Path | None = None) -> list:
    return [word.replace("@@", str(out)).replace("@", f"{folder}/") for word in argv]


def part(name: str, file: str) -> Callable[[Path], Path]:
    """A part of the tiny weights, in a folder of its own, weights as links."""
    def prepare(folder: Path) -> Path:
        for place in (name, *["tokenizer"] * (name == "text_encoder")):
            (folder / place).mkdir()
            for source in (TINY / place).iterdir():
                copy = shutil.copy if source.suffix == ".json" or source.name == file else os.symlink
                copy(source, folder / place / source.name)
        return folder / name / file
    return prepare


def written(name: str, content) -> Callable[[Path], Path]:
    """A file of text, bytes or JSON."""
    def prepare(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode() if isinstance(content, str)
                         else json.dumps(content).encode())
        return path
    return prepare


def tokenizer_of(file: str) -> Callable[[Path], Path]:
    """A file of the tokenizer next to a text encoder."""
    return lambda folder: part("text_encoder", "config.json")(folder).parents[1] / "tokenizer" / file


def several(first: Callable, *others: Callable) -> Callable[[Path], Path]:
    """All are prepared, the first is spoiled."""
    def prepare(folder: Path) -> Path:
        return [one(folder) for one in (first, *others)][0]
    return prepare


def stored(name: str, place: str | None = None) -> Callable[[Path], Path]:
    """A copy of a file that the fixture `store` made once."""
    def prepare(folder: Path) -> Path:
        (folder / (place or name)).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(STORE / name, folder / (place or name)))
    return prepare


def run_folder(folder: Path) -> Path:
    """What train_c.py leaves: a LoRA next to base.json."""
    stored("lora.safetensors", "run/lora.safetensors")(folder)
    return written("run/base.json", dict(weights="tiny", files={}, lora="lora.safetensors"))(folder)


def whole_folder(folder: Path) -> Path:
    for source in TINY.iterdir():
        if source.name != "scheduler" and source.is_dir():
            os.symlink(source, folder / source.name)
    (folder / "scheduler").mkdir()
    return Path(shutil.copy(TINY / "scheduler" / "scheduler_config.json", folder / "scheduler"))


def sharded(folder: Path) -> Path:
    shutil.copytree(TINY / "prior", folder / "prior")
    tensors = load_file(TINY / "prior" / "diffusion_pytorch_model.safetensors")
    os.rename(folder / "prior" / "diffusion_pytorch_model.safetensors", folder / "prior" / "one.safetensors")
    return written("prior/diffusion_pytorch_model.safetensors.index.json",
                   dict(metadata={}, weight_map=dict.fromkeys(tensors, "one.safetensors")))(folder)


def prior_pt(folder: Path) -> Path:
    shutil.copy(TINY / "prior" / "config.json", folder)
    return stored("prior.pt")(folder)


def peft(folder: Path) -> Path:
    stored("peft.safetensors", "peft/adapter_model.safetensors")(folder)
    return written("peft/adapter_config.json", dict(peft_type="LORA", r=2, lora_alpha=4))(folder)


def in_header(name: str, key: str) -> Callable[[Path], Path]:
    """JSON in the header of a .safetensors file: spoiled as NAME.json, which `run` puts back."""
    def prepare(folder: Path) -> Path:
        stored(f"{name}.safetensors")(folder)
        return written(f"{name}.json", json.loads(header_of(STORE / f"{name}.safetensors")[key]))(folder)
    return prepare


def with_header(name: str, key: str, run: Callable) -> Callable:
    def put_back(folder: Path, out: Path) -> None:
        text = (folder / f"{name}.json").read_bytes().decode("utf-8", "surrogateescape")
        text = text.encode("utf-8", "replace").decode()
        save_file(load_file(STORE / f"{name}.safetensors"), out.parent / "spoiled" / f"{name}.safetensors",
                  header_of(STORE / f"{name}.safetensors") | {key: text})
        run(out.parent / "spoiled", out)
    return put_back


def header_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def images(folder: Path) -> None:
    for i in range(3):
        Image.new("RGB", (128, 128), (80 * i, 0, 99)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")


def data(prepare: Callable) -> Callable[[Path], Path]:
    """Three images with captions, and the file that is spoiled among them."""
    def both(folder: Path) -> Path:
        (folder / "data").mkdir()
        images(folder / "data")
        return prepare(folder / "data")
    return both


def open_data(source: str) -> Callable:
    """The data set alone. What it skips is printed, and all that is left is read."""
    def run(folder: Path, out: Path) -> None:
        with exit_on_user_error(), as_user_error():
            dataset = open_dataset(f"{folder}/{source}", index_folder=out / "index")
            for i in range(len(dataset)):
                dataset.key(i), dataset.read_or_replace(i, range(len(dataset)))
            print(dataset.describe())
            assert len(dataset)
    return run


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as file:
        for path in sorted((folder).glob("*.[pt][nx][gt]")):
            file.add(path, path.name)
            path.unlink()
    return folder / "a.tar"


def rows_in(name: str, **columns: list) -> Callable[[Path], Path]:
    """A table of pyarrow with images and texts, or with these columns and texts."""
    def prepare(folder: Path) -> Path:
        pytest.importorskip("pyarrow", reason="tables need pyarrow")
        image = (STORE / "red.png").read_bytes()
        return write_rows(folder / name, columns or dict(image=[dict(bytes=image, path="a.png")] * 2))
    return prepare


def write_rows(path: Path, columns: dict, types: dict | None = None) -> Path:
    """Columns, and a caption in each row, as a parquet file or an arrow stream; types: where pyarrow guesses wrong."""
    import pyarrow
    import pyarrow.parquet
    n = len(next(iter(columns.values())))
    made = {key: pyarrow.array(value, (types or {}).get(key)) for key, value in columns.items()}
    table = pyarrow.table(dict(text=["a cat"] * n) | made)
    if path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def rows(change: Callable[[bytes], dict], **types: str) -> Callable[[Path], None]:
    """The table with other columns: change(bytes of an image) -> columns."""
    def spoil(path: Path) -> None:
        import pyarrow
        write_rows(path, change((STORE / "red.png").read_bytes()),
                   {key: getattr(pyarrow, kind)() for key, kind in types.items()})
    return spoil


def tar_index(folder: Path) -> Path:
    tar(folder)
    open_dataset(f"{folder}/a.tar")
    return folder / "a.tar.index.json"


CAT = ["--prompt", "a cat"]
TINY_CAT = [*CAT, "--weights", "tiny"]
TOKENIZER = paint(*TINY_CAT, "--text-encoder", "@text_encoder")
PRIOR = dict(c=[0, -5], c_cond=[-5], depth=[0, 10 ** 9], nhead=[0, -1, 5, 1.5], dropout=[-1, "nan", 1.0], c_r=[0],
             _class_name=["WuerstchenDiffNeXt", None, [1]])
READERS = dict(
    # JSON that says what the weights are
    prior_config=Reader(part("prior", "config.json"), paint(*TINY_CAT, "--prior", "@prior"), "path json", fields=PRIOR),
    decoder_config=Reader(part("decoder", "config.json"), paint(*TINY_CAT, "--decoder", "@decoder"), "path json",
                          fields=dict(
                              blocks=[[4, 4], [4, 4, -1], [4, 4, 10 ** 9]], nhead=[[-1, 4, 5], [-1, 4, 0], [0.5, 4, 4]],
                              c_hidden=[[32, 128, "x"]], level_config=[["CT", "CT", 3]], kernel_size=[2],
                              inject_effnet=[[False, True, "no"]], dropout=["inf"])),
    vqgan_config=Reader(part("vqgan", "config.json"), paint(*TINY_CAT, "--vqgan", "@vqgan"), "path json", fields=dict(
        scale_factor=[0, -1, "nan", "1e999"], levels=[0, 10 ** 6], bottleneck_blocks=[10 ** 9], in_channels=[4])),
    encoder_config=Reader(part("image_encoder", "config.json"),
                          paint(*TINY_CAT, "--image-encoder", "@image_encoder", "--init", "@red.png"),
                          "path json", fields=dict(blocks=[[1, 2, 2]], c_hidden=[[32, 64, 128, 10 ** 9]])),
    text_config=Reader(part("text_encoder", "config.json"), paint(*TINY_CAT, "--text-encoder",
                                                                  "@text_encoder"), "path json", fields=dict(
        hidden_size=[64, "x", -1], num_hidden_layers=[10 ** 9, 0, 2], num_attention_heads=[5, 0], vocab_size=[10, -1],
        max_position_embeddings=[10 ** 12, -2], layer_norm_eps=["x", "nan"], hidden_act=["evil", None])),
    tokenizer=Reader(tokenizer_of("tokenizer.json"), TOKENIZER, "path json"),
    tokenizer_config=Reader(tokenizer_of("tokenizer_config.json"), TOKENIZER, "json"),
    words=Reader(part("prior", "words.json"), paint(*TINY_CAT, "--prior", "@prior"), "path json",
                 fields=dict(objects=[3, [3], [], None, {}], colours=["red"])),
    scheduler=Reader(whole_folder, paint(*CAT, "--weights", "@"), "path json", fields=dict(s=[1, "x", None, []],
                                                                                         scaler=["nan", 2])),
    base=Reader(run_folder, paint(*CAT, "--weights", "@run"), "path json", fields=dict(
        weights=["", 3, None, "nowhere", "@run", "\0"], files=[[], dict(evil="tiny"), dict(prior=3), "x"],
        lora=["../lora.safetensors", "..", 3, "none.safetensors"])),
    shards=Reader(sharded, paint(*TINY_CAT, "--prior", "@prior"), "path json", fields=dict(
        weight_map=[[], {}, 3, dict(a=3), dict(a="../x.safetensors"), dict(a="gone.safetensors")])),
    adapter_config=Reader(peft, tool(lora_tool, "info", "@peft"), "path json", fields=dict(
        lora_alpha=["nan", "1e999", "-1e999", "x", [], None, 10 ** 400], alpha_pattern=[[1], {"(": 1}, {".*": []}],
        peft_type=["LOHA", 3], use_rslora=["no"])),
    new_prior=Reader(written("c.json", json.loads((TINY / "prior" / "config.json").read_text())),
                     train(train_c, "--weights", "tiny", "--init", "random", "--config", "@c.json", "--dry-run",
                           *SCENES),
                     "path json", fields=PRIOR | dict(c=[0, 10 ** 5 * 6])),
    new_decoder=Reader(written("c.json", json.loads((TINY / "decoder" / "config.json").read_text())),
                       train(train_b, "--weights", "tiny", "--init", "random", "--config", "@c.json", "--image-encoder",
                             str(TINY / "image_encoder"), "--dry-run", *SCENES), "path json"),
    new_vqgan=Reader(written("c.json", json.loads((TINY / "vqgan" / "config.json").read_text())),
                     train(train_a, "--config", "@c.json", "--dry-run", *SCENES), "path json"),
    new_encoder=Reader(written("c/config.json", json.loads((TINY / "image_encoder" / "config.json").read_text())),
                       train(train_encoder, "--config", "@c", "--steps", "1", "--batch", "2"), "path json"),
    # JSON in other files
    lora_header=Reader(in_header("lora", "lora_adapter_metadata"), with_header(
        "lora", "lora_adapter_metadata", tool(lora_tool, "info", "@lora.safetensors")), "json",
        fields={"prior.lora_alpha": ["nan", "1e999", "x", [], None], "prior.alpha_pattern": [[1], {"(": 1}]}),
    latent_header=Reader(in_header("latent", "wuerstchen"), with_header("latent", "wuerstchen", paint(
        *CAT, "--from-latent", "@latent.safetensors")), "json", goes_on=True),
    preview=Reader(lambda folder: whole_folder(folder) and written("preview.json", json.loads(
        (TINY / "preview.json").read_text()))(folder),
        paint(*CAT, "--weights", "@", "--preview-every", "1"), "json", goes_on=True),
    prompts_jsonl=Reader(written("p.jsonl", dict(prompt="a cat", seed=1)), paint("--prompt-file", "@p.jsonl"),
                         "path json", fields=dict(
        seed=["x", -1, 1.5, [], 2 ** 40, "1e999"], prompt=[3, [], ""], width=[-1, "nan", 10], init=["no.png"],
        steps_c=[0, -1, [], "x"], guidance_c=["nan", "x", {}], weights=["tiny"])),
    # text
    prompts=Reader(written("p.txt", "a cat\n"), paint("--prompt-file", "@p.txt"), "path text"),
    sample_prompts=Reader(written("p.txt", "a cat\n"), train(train_c, "--weights", "tiny", "--lora", *SCENES[:-1], "1",
                                                            "--sample-prompts", "@p.txt"), "path text"),
    preserve=Reader(written("p.txt", "a cat\n"), train(train_c, "--weights", "tiny", "--lora", *SCENES, "--preserve",
                                                      "0.5", "--preserve-prompts", "@p.txt"), "path text"),
    # weights
    prior=Reader(part("prior", "diffusion_pytorch_model.safetensors"), paint(*TINY_CAT, "--prior", "@prior"),
                 "path binary tensors"),
    prior_pt=Reader(prior_pt, paint(*TINY_CAT, "--prior", "@prior.pt"), "path binary pickle"),
    vqgan=Reader(part("vqgan", "diffusion_pytorch_model.safetensors"), paint(*TINY_CAT, "--vqgan", "@vqgan"),
                 "path binary tensors"),
    text_encoder=Reader(part("text_encoder", "model.safetensors"), paint(
        *TINY_CAT, "--text-encoder", "@text_encoder"), "path binary tensors"),
    convert=Reader(prior_pt, tool(weights_tool, "convert", "@prior.pt", "@@/x", "--to", "ours"),
                   "path binary pickle"),
    lora=Reader(stored("lora.safetensors"), paint(*CAT, "--lora", "@lora.safetensors"), "path binary tensors"),
    lora_info=Reader(stored("lora.safetensors"), tool(lora_tool, "info", "@lora.safetensors"), "path binary tensors"),
    lora_bin=Reader(stored("lora.bin"), tool(lora_tool, "info", "@lora.bin"), "path binary pickle"),
    lora_merge=Reader(stored("lora.safetensors"), tool(
        lora_tool, "merge", str(TINY / "prior"), "@lora.safetensors", "@@/x"), "path binary tensors"),
    lora_weights=Reader(stored("lora.safetensors"), train(
        train_c, "--weights", "tiny", "--lora", "--lora-weights", "@lora.safetensors", "--dry-run", *SCENES),
        "path binary tensors"),
    backbone=Reader(stored("prior.pt", "b.pth"), train(
        train_b, "--weights", "tiny", "--init", "random", "--config", str(TINY / "decoder" / "config.json"),
        "--backbone", "@b.pth", *SCENES), "path binary pickle"),
    perceptual=Reader(stored("prior.pt", "b.pth"), train(train_a, "--perceptual", "@b.pth", "--width", "8", *SCENES),
                      "path binary pickle"),
    checkpoint=Reader(stored("step_00000001.pt"), train(
        train_c, "--weights", "tiny", "--lora", "--rank", "2", "--resume", "@step_00000001.pt",
        *[word if word != "1" else "2" for word in SCENES]), "path binary pickle checkpoint"),
    latent=Reader(stored("latent.safetensors"), paint(*CAT, "--from-latent", "@latent.safetensors"),
                  "path binary tensors latent"),
    to_latent=Reader(several(stored("latent.safetensors", "b.safetensors"), stored("latent.safetensors")), paint(
        *CAT, "--seed", "1", "--from-latent", "@latent.safetensors", "--to-latent", "@b.safetensors", "--frames", "2"),
        "path binary tensors latent"),
    tensors=Reader(stored("tensors.safetensors"), paint("--tensors", "@tensors.safetensors", *CAT),
                   "path binary tensors"),
    # images
    init=Reader(stored("red.png"), paint(*CAT, "--init", "@red.png"), "path binary image"),
    mask=Reader(several(stored("mask.png"), stored("red.png")), paint(
        *CAT, "--init", "@red.png", "--mask", "@mask.png"), "path binary image"),
    reconstruct=Reader(stored("red.png"), paint("--reconstruct", "@red.png"), "path binary image"),
    like=Reader(stored("like.png"), paint("--like", "@like.png"), "path binary image settings"),
    # data sets
    image=Reader(data(stored("red.png", "x.png")), open_data("data"), "path binary image", goes_on=True),
    caption=Reader(data(written("2.txt", "a cat")), open_data("data"), "path text", goes_on=True),
    sidecar=Reader(data(written("2.json", dict(text="a cat"))), open_data("data"), "path json", goes_on=True),
    metadata_jsonl=Reader(data(written("metadata.jsonl", dict(file_name="0.png", text="a cat"))), open_data("data"),
                          "json", fields=dict(file_name=[3, None, [], {}])),
    metadata_csv=Reader(data(written("metadata.csv", "file_name,text\n0.png,a cat\n")), open_data("data"),
                        "text"),
    tar=Reader(data(tar), open_data("data/a.tar"), "path binary tar"),
    tar_index=Reader(data(tar_index), open_data("data/a.tar"), "json", goes_on=True),
    parquet=Reader(rows_in("a.parquet"), open_data("a.parquet"), "path binary parquet"),
    parquet_rows=Reader(rows_in("a.parquet"), open_data("a.parquet"), "rows", goes_on=True),
    arrow=Reader(rows_in("a.arrow"), open_data("a.arrow"), "binary"),
    metadata_parquet=Reader(data(rows_in("metadata.parquet", file_name=["0.png", "1.png"])), open_data("data"),
                            "binary"),
)


# ----- kinds: how a valid file is spoiled ----------------------------------------------------------------------------

def rng_of(path: Path) -> random.Random:
    return random.Random(f"{path.name} {path.stat().st_size}")


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda path: [path.unlink(), path.write_bytes(content)]


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: [path.unlink(), make(path)]


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = path.read_bytes()
        path.unlink()                    # it may be a link to the weights
        path.write_bytes(change(content))
    return spoil


def some_bytes(path: Path) -> None:
    """Eight random bytes among the first 40; a zip archive has nothing there that is read."""
    rng, content = rng_of(path), bytearray(path.read_bytes())
    most = 200 if content.startswith(b"PK") else 40
    for _ in range(8):
        content[rng.randrange(min(most, len(content)))] = rng.randrange(128, 256)
    path.unlink()
    path.write_bytes(content)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Of a .safetensors file; change(tensors) in place."""
    def spoil(path: Path) -> None:
        found, metadata = load_file(path), header_of(path)
        change(found)
        path.unlink()
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path, metadata)
    return spoil


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Of a .safetensors file; change(header) in place, or a text instead of it."""
    def spoil(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        text = change(entries)
        text = (text if isinstance(text, str) else json.dumps(entries)).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]
    return changed(spoil)


def first(entries: dict) -> str:
    """A tensor of floats, which every reader needs: of tensors the largest, of a header the first."""
    floats = [name for name, entry in sorted(entries.items()) if name != "__metadata__" and (
        entry["dtype"][0] == "F" if isinstance(entry, dict) else entry.is_floating_point())]
    return max(floats, key=lambda name: entries[name].numel() if isinstance(entries[name], torch.Tensor) else 0)


def table(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Of a file of torch.save: change(table) in place, or something else instead of it."""
    def spoil(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)
    return spoil


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def deep_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


def value(tensor: torch.Tensor, number: float) -> None:
    tensor.view(-1)[0] = number


def sized(width: int, height: int) -> Callable[[Path], None]:
    """A PNG file that claims another size."""
    def change(content: bytes) -> bytes:
        start = content[12:16] + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + start + struct.pack(">I", zlib.crc32(start)) + content[33:]
    return changed(change)


KINDS = dict(
    path=dict(
        empty=replaced(b""), huge=lambda path: [changed(lambda content: content)(path), os.truncate(path, 5 * 2 ** 29)],
        missing=os.unlink, folder=instead(os.mkdir), pipe=instead(os.mkfifo),
        zeros=instead(lambda path: path.symlink_to("/dev/zero")), loop=instead(lambda path: path.symlink_to(path.name)),
        dangling=instead(lambda path: path.symlink_to("gone"))),
    binary=dict(
        page=replaced(b"<!doctype html><html><body>404</body></html>"),
        pointer=replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
        noise=lambda path: replaced(rng_of(path).randbytes(500))(path), some_bytes=some_bytes,
        cut=changed(lambda content: content[:len(content) // 2]), zero_bytes=replaced(bytes(1000))),
    json=dict(
        deep=replaced(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), deep_list=replaced(b"[" * 100_000),
        list=replaced(b"[1, 2]"), text=replaced(b'"x"'), number=replaced(b"3"), null=replaced(b"null"),
        twice=changed(lambda content: content.rstrip()[:-1] + b', "a": 1, "a": 2}'), digits=changed(
            lambda content: content.rstrip()[:-1] + b', "a": ' + b"9" * 5000 + b"}"),
        utf16=changed(lambda content: content.decode().encode("utf-16")), latin=changed(
            lambda content: content.rstrip()[:-1] + ', "ä": 1}'.encode("latin-1")),
        after=changed(lambda content: content + b"}"), half=changed(lambda content: content.rstrip()[:-1])),
    text=dict(utf16=changed(lambda content: content.decode().encode("utf-16")),
              utf16_without_mark=changed(lambda content: content.decode().encode("utf-16-le")),
              latin=replaced("Käse\n".encode("latin-1"))),
    tensors=dict(
        length=changed(lambda content: b"\xff" * 7 + b"\x7f" + content[8:]), no_json=header(lambda entries: "{" * 99),
        deep=header(lambda entries: '{"a":' * 9999),
        dtype=header(lambda entries: entries[first(entries)].update(dtype="X")),
        shape=header(lambda entries: entries[first(entries)].update(shape=[2 ** 40, 2 ** 40])),
        negative=header(lambda entries: entries[first(entries)].update(shape=[-1, -1])),
        offsets=header(lambda entries: entries[first(entries)].update(data_offsets=[0, 2 ** 60])),
        nan=tensors(lambda found: value(found[first(found)], float("nan"))),
        infinity=tensors(lambda found: value(found[first(found)], float("inf"))),
        less=tensors(lambda found: found.pop(first(found))), more=tensors(lambda found: found.update(
            {f"x{EVIL}": torch.zeros(1)})),
        vector=tensors(lambda found: found.update({first(found): found[first(found)].flatten()})),
        numbers=tensors(lambda found: found.update({first(found): found[first(found)].int()})),
        none=tensors(dict.clear)),
    pickle=dict(
        code=lambda path: path.write_bytes(pickle.dumps({"a": Code()})), deep=deep_pickle,
        list=table(lambda found: [1]), number=table(lambda found: 3), keys=table(lambda found: {3: torch.zeros(1)}),
        nested=table(lambda found: {"state_dict": {"a": {"b": torch.zeros(1)}}}),
        terabytes=table(lambda found: {name: torch.zeros(1).expand(10 ** 6, 10 ** 6) for name in found}),
        sparse=table(lambda found: {name: torch.zeros(3, 3).to_sparse() for name in found}),
        meta=table(lambda found: {name: torch.zeros(3, 3, device="meta") for name in found}),
        evil=table(lambda found: {f"x{EVIL}": torch.zeros(1)})),
    checkpoint={f"{kind}_{key}": table(lambda found, key=key, new=new: found.update({key: new}))
                for key in ("step", "settings", "model", "optimizer", "averaged", "bad", "updates", "scaler", "script")
                for kind, new in (("none", None), ("text", EVIL), ("list", [1]), ("less", -1))
                if (key, kind) != ("updates", "less")},
    latent=dict(
        size_of_others=tensors(lambda found: found.update(size=torch.tensor([128, 4096]))),
        size_0=tensors(lambda found: found.update(size=torch.tensor([0, 0]))),
        size_huge=tensors(lambda found: found.update(size=torch.tensor([2 ** 40, 2 ** 40]))),
        size_nan=tensors(lambda found: found.update(size=torch.tensor([float("nan")] * 2))),
        size_3=tensors(lambda found: found.update(size=torch.tensor([128, 128, 3]))),
        states_0=tensors(lambda found: found["states"].zero_()), states_short=tensors(
            lambda found: found.update(states=found["states"][:, :9])),
        states_float=tensors(lambda found: found.update(states=found["states"].float())),
        no_states=tensors(lambda found: found.pop("states")), channels=tensors(
            lambda found: found.update(semantic=found["semantic"][:, :8])),
        rows=tensors(lambda found: found.update(semantic=found["semantic"].repeat(3, 1, 1, 1)))),
    image=dict(
        bomb=sized(30_000, 30_000), no_pixels=sized(0, 128), wide=sized(2 ** 31 - 1, 1),
        no_end=changed(lambda content: content[:-40]), cut_header=changed(lambda content: content[:20])),
    parquet=dict(                                        # tables from which no image comes
        no_rows=rows(lambda image: dict(image=[]), image="binary"), none=rows(lambda image: dict(image=[None, None])),
        no_image=rows(lambda image: dict(width=[3, 4])), of_numbers=rows(lambda image: dict(image=[1.5, 2.5])),
        of_texts=rows(lambda image: dict(image=["a.png", "../red.png"])), of_lists=rows(lambda image: dict(
            image=[[1, 2], [3]])), two=rows(lambda image: dict(one=[image], two=[image])), broken=rows(
            lambda image: dict(image=[image[:50], b""])), paths=rows(lambda image: dict(
                image=[dict(bytes=None, path="/etc/passwd"), dict(bytes=None, path="../in/red.png")])),
        no_text=rows(lambda image: dict(image=[image], text=[None])), text_of_numbers=rows(
            lambda image: dict(image=[image], text=[3])), evil_name=rows(lambda image: {f"x{EVIL}": ["a"]}),
        no_footer=changed(lambda content: content[:-8]), other_footer=changed(
            lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1")),
    rows=dict(                                           # one row is good
        null=rows(lambda image: dict(image=[image, None])), broken=rows(lambda image: dict(image=[image, image[:50]])),
        path=rows(lambda image: dict(image=[dict(bytes=image, path=None), dict(bytes=None, path="/etc/passwd")])),
        large=rows(lambda image: dict(image=[image]), image="large_binary"), case=rows(
            lambda image: dict(IMAGE=[image], Other=[b"x"])), one_of_two=rows(
            lambda image: dict(image=[image], conditioning_image=[image])),
        more_texts=rows(lambda image: dict(image=[image], text=[["one", "two"]])), odd=rows(lambda image: dict(
            image=[image], nan=[float("nan")], deep=[[[1]]], evil=[EVIL])),
        half=rows(lambda image: {"image": [image], "a/b\n": [EVIL], "": ["x"]})),
    tar=dict(
        twisted=changed(lambda content: content[:100] + b"x" * 300 + content[400:]),
        gzip=replaced(b"\x1f\x8b" + bytes(99))),
)
# A tar file ends in zeros, however many; files that need not be there.
FINE = {("huge", "tar"), ("cut", "tar"), ("more", "latent"), ("more", "to_latent"),
        ("more", "lora_info"), ("latin", "lora_header"),
        *((kind, name) for kind in ("missing", "loop", "dangling") for name in ("words", "adapter_config"))}
WRONG = dict(nan="NaN", inf="Infinity", **{"1e999": "1e999", "-1e999": "-1e999"})


def field(name: str, wrong) -> Callable[[Path], None]:
    """Another value for one name of a JSON object."""
    text = WRONG.get(wrong, json.dumps(wrong)) if isinstance(wrong, str | int | float | None) else json.dumps(wrong)
    return changed(lambda content: json.dumps(json.loads(content) | {name: "@@@"}).replace('"@@@"', text).encode())


def cases():
    for name, reader in READERS.items():
        if name not in ("backbone", "perceptual"):       # which would be large
            yield name, "valid", None
        for group in reader.kinds.split():
            for kind, spoil in KINDS.get(group, {}).items():
                yield name, kind, spoil
        for key, values in reader.fields.items():
            for wrong in values:
                yield name, f"{key}={wrong!r:.20}", field(key, wrong)


CASES = [pytest.param(*case, id="-".join(map(str, case[:2]))) for case in cases()]


# ----- the test ------------------------------------------------------------------------------------------------------

class Hang(BaseException):
    """No `except Exception` swallows it."""


@contextlib.contextmanager
def limits():
    def hang(*_):
        raise Hang
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder: Path) -> dict[str, tuple]:
    return {str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    """Valid files that take a second to make, once."""
    global STORE
    STORE = tmp_path_factory.mktemp("store")
    torch.manual_seed(0)
    prior = load_stage_c(TINY / "prior")
    torch.save(load_file(TINY / "prior" / "diffusion_pytorch_model.safetensors"), STORE / "prior.pt")
    add_lora(prior, 2)
    for name, parameter in prior.named_parameters():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.01)
    save_lora(prior, STORE / "lora.safetensors")
    tensors = load_file(STORE / "lora.safetensors")
    torch.save(tensors, STORE / "lora.bin")
    save_file({f"base_model.model.{name.removeprefix('prior.')}": tensor for name, tensor in tensors.items()},
              STORE / "peft.safetensors")
    Image.new("RGB", (128, 128), "red").save(STORE / "red.png")
    Image.new("L", (128, 128), 255).save(STORE / "mask.png")
    paint(*CAT, "--seed", "1", "--save-latent")(STORE, STORE / "like.png")
    os.rename(STORE / "like.safetensors", STORE / "latent.safetensors")
    save_file(dict(latents_c=torch.randn(1, 16, 3, 3)), STORE / "tensors.safetensors")
    train(train_c, "--weights", "tiny", "--lora", "--rank", "2", *SCENES)(STORE, STORE / "run")
    os.rename(STORE / "run" / "checkpoints" / "step_00000001.pt", STORE / "step_00000001.pt")


@pytest.mark.parametrize("name, kind, spoil", CASES)
def test_a_bad_file_is_one_line(name, kind, spoil, tmp_path, monkeypatch, capsys):
    reader, folder, out = READERS[name], tmp_path / "in", tmp_path / "out"
    for place in (folder, tmp_path / "cwd", tmp_path / "spoiled"):
        place.mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["x"])
    stored("red.png")(folder)
    path, code = reader.prepare(folder), 0
    if spoil is not None:
        spoil(path)
    before, weights = tree(tmp_path), tree(TINY)
    capsys.readouterr()
    with limits():
        try:
            reader.run(folder, out)
        except SystemExit as stop:
            code = stop.code
    output = capsys.readouterr()
    text = "".join(output)
    assert all(letter.isprintable() or letter in "\n\r" for letter in text), repr(text)
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    if spoil is None or reader.goes_on or (kind, name) in FINE:
        assert (code or 0) == 0 and not errors, text
    else:
        assert code == 2 and len(errors) == 1 and len(output.err.splitlines()) < 9, text
        names = [path.name, path.stem, path.parent.name]
        assert any(word in errors[0] for word in names), f"{names} are not in: {errors[0]}"
    after = {file: state for file, state in tree(tmp_path).items() if not file.startswith(("out", "spoiled"))}
    allowed = {"in/preview.json"} if name == "preview" else set()
    assert {file for file in after.keys() | before.keys() if after.get(file) != before.get(file)} <= allowed
    assert tree(TINY) == weights



# ----- names and texts of strangers ----------------------------------------------------------------------------------

def evil_image(folder: Path) -> None:
    text = PngInfo()
    settings = {"prompt": EVIL, "weights": f"no{EVIL}", "seed": EVIL, EVIL: EVIL}
    text.add_text("wuerstchen", json.dumps(settings))
    Image.new("RGB", (64, 64)).save(folder / "like.png", pnginfo=text)


def evil_checkpoint(folder: Path) -> None:
    state = torch.load(stored("step_00000001.pt")(folder), weights_only=True)
    state["settings"] |= {"lr": EVIL, EVIL: 3}
    torch.save(state, folder / "step_00000001.pt")


def evil_data(folder: Path) -> None:
    data(written(f"x{EVIL}.png", b"no image"))(folder)
    written(f"data/y{EVIL}.txt", f"{EVIL} a caption")(folder)
    shutil.copy(folder / "data" / "0.png", folder / "data" / f"y{EVIL}.png")
    written("data/0.json", {EVIL: 3, "text": EVIL, "score": 1})(folder)
    image = (folder / "data" / "0.png").read_bytes()
    (folder / "data" / f"z{EVIL}.png").write_bytes(image[:-30])              # found out when it is read
    written(f"data/z{EVIL}.txt", "cut off")(folder)


def evil_config(folder: Path) -> None:
    path = part("prior", "config.json")(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {EVIL: EVIL}))
    written("prior/words.json", dict(objects=[EVIL, "cat"]))(folder)


NAME = f"@no{EVIL}"
STRANGERS = dict(
    init=(None, paint(*CAT, "--init", f"{NAME}.png")), lora=(None, paint(*CAT, "--lora", f"{NAME}.safetensors")),
    prior=(None, paint(*TINY_CAT, "--prior", NAME)), weights=(None, paint(*CAT, "--weights", NAME)),
    prompt_file=(None, paint("--prompt-file", f"{NAME}.txt")), like=(None, paint("--like", f"{NAME}.png")),
    latent=(None, paint(*CAT, "--from-latent", f"{NAME}.safetensors")), option=(None, paint(*CAT, f"--x{EVIL}", EVIL)),
    number=(None, paint(*CAT, "--guidance-c", EVIL)), prompt=(None, paint("--prompt", f"a {EVIL}", "--seed", "1")),
    line=(written("p.jsonl", {EVIL: 1, "prompt": EVIL}), paint("--prompt-file", "@p.jsonl")),
    prompts=(written("p.jsonl", f'{json.dumps(dict(prompt=EVIL))}\n{json.dumps(dict(prompt=EVIL, init=EVIL))}\n'),
             paint("--prompt-file", "@p.jsonl")),
    settings=(evil_image, paint("--like", "@like.png")), config=(evil_config, paint(
        "--prompt", "a zebra", "--weights", "tiny", "--prior", "@prior")),
    base=(written("run/base.json", dict(weights=f"no{EVIL}")), paint(*CAT, "--weights", "@run")),
    shards=(lambda folder: sharded(folder).write_text(json.dumps(dict(weight_map={EVIL: f"{EVIL}.bin"}))),
            paint(*TINY_CAT, "--prior", "@prior")),
    metadata=(lambda folder: save_file(load_file(STORE / "lora.safetensors"), folder / "l.safetensors", {
        f"note{EVIL}": EVIL, "ss_network_alpha": "1"}), tool(lora_tool, "info", "@l.safetensors")),
    checkpoint=(evil_checkpoint, train(train_c, "--weights", "tiny", "--lora", "--rank", "2", "--resume",
                                       "@step_00000001.pt", *[word if word != "1" else "2" for word in SCENES])),
    resume=(None, train(train_c, "--weights", "tiny", "--lora", "--resume", f"{NAME}.pt", *SCENES)),
    no_config=(None, train(train_a, "--config", f"{NAME}.json", *SCENES)),
    no_data=(None, train(train_a, "--data", NAME, *SCENES[2:])),
    no_option=(None, train(train_c, "--data", "x", f"--lr{EVIL}", EVIL)),
    data=(evil_data, train(train_c, "--weights", "tiny", "--lora", "--data", "@data", "--dry-run", *SCENES[2:])),
    broken=(evil_data, train(train_a, "--data", "@data", "--width", "8", "--batch", "4", "--resolution", "64",
                             *[word for word in SCENES[2:] if word != "--batch" and word != "2"])),
    filters=(evil_data, train(train_a, "--data", "@data", "--filter", f"min_{EVIL}=9", *SCENES[2:])))


@pytest.mark.parametrize("name", STRANGERS)
def test_text_of_strangers_is_printable(name, tmp_path, monkeypatch, capsys):
    """In errors, warnings, progress and lists of what was found."""
    prepare, run = STRANGERS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "in").mkdir()
    if prepare:
        prepare(tmp_path / "in")
    capsys.readouterr()
    with limits(), contextlib.suppress(SystemExit):
        run(tmp_path / "in", tmp_path / "out")
    text = "".join(capsys.readouterr())
    assert all(letter.isprintable() or letter in "\n\r" for letter in text), repr(text)
    assert "owned" in text


# ----- numbers of the command lines ----------------------------------------------------------------------------------

OF_ALL = {"--lr": "nan inf -1 x", "--warmup": "-5 nan 1.5", "--steps": "0 -1 1e3 99999999999999", "--batch": "0 -3 x",
          "--grad-accum": "0 x", "--clip": "nan -1 inf", "--weight-decay": "nan -1 inf", "--workers": "-1 99999",
          "--seed": f"-1 {2 ** 80} 0.5", "--ema": "nan 2 -1", "--max-samples": "0 -1", "--save-every": "0 -1",
          "--keep": "0 -1", "--log-every": "0", "--val-every": "-1", "--val-count": "0 -1", "--adam-beta1": "nan 1 -1",
          "--adam-eps": "nan -1", "--max-bad-steps": "0", "--resolution": "0 -8 130 nan x", "--device": "evil cuda:99",
          "--lr-power": "nan -1", "--lr-cycles": "0", "--sample-every": "-1", "--epochs": "0 -1 nan"}
NUMBERS = {train_a: OF_ALL | {"--width": "0 -1 x", "--l1": "nan -1", "--codebook-size": "0", "--quantise": "nan 2"},
           train_b: OF_ALL | {"--max-ratio": "0.5 nan -1", "--caption-dropout": "nan 2 -1", "--high-noise": "0 nan -1",
                              "--semantic-noise": "nan 2 -1"},
           train_c: OF_ALL | {"--max-ratio": "0.5 nan -1", "--rank": "0 -1 nan", "--alpha": "nan inf", "--lora-dropout":
                              "nan 2 -1", "--offset-noise": "nan -1 inf", "--preserve": "nan 2 -1"},
           sample: {"--seed": f"-1 {2 ** 80} x", "--num-images": "0 -1 99999999999", "--width": "63 x 99999999 nan",
                    "--steps-c": "0 -1 nan 99999999999", "--guidance-c": "nan inf x 1,2,3", "--strength": "nan 2 -1",
                    "--frames": "1 99999999999", "--batch": "0 x", "--interval-c": "1,0 nan,1", "--eta-c": "nan 2",
                    "--t-start-c": "nan 2", "--grid": "nan x 1,inf", "--tile": "0 x", "--outpaint": "1,2,3 -1,0,0,0",
                    "--rescale-b": "nan 2", "--preview-every": "0 -1", "--temperature-b": "nan x"}}


@pytest.mark.parametrize("module, option, number", [
    pytest.param(module, option, number, id=f"{module.__name__}{option}={number}")
    for module, options in NUMBERS.items() for option, numbers in options.items() for number in numbers.split()])
def test_a_bad_number_is_one_line(module, option, number, tmp_path, monkeypatch, capsys):
    """The option is named, before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    weights = [] if module is train_a else ["--weights", "tiny", *["--lora"] * (module is train_c)]
    command, out = [*weights, *SCENES, "--dry-run", f"{option}={number}"], tmp_path / "out"
    if option in ("--preserve", "--epochs"):         # they need, or exclude, another one
        command = [word for word in command if option == "--preserve" or word not in ("--steps", "1")]
        command += ["--preserve-prompts", "p.txt"] * (option == "--preserve")
    run = paint(*TINY_CAT, f"{option}={number}") if module is sample else train(module, *command)
    with limits(), pytest.raises(SystemExit) as stop:
        run(tmp_path, out)
    error = capsys.readouterr().err
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, error
    assert option[2:] in errors[0] or option[2:].replace("-", "_") in errors[0], errors[0]
    assert not out.exists()


def test_memory():
    """After all the others."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MEMORY
