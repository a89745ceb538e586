"""What kills leave behind: every file is whole, or as it was before, and the next run removes what was half written.

Each job runs in a child process that dies inside the writer, at a moment that is counted and not timed: before the
n-th operation on a name in its folder (open, mkdir, rename, link, remove), by SIGKILL; or in the middle of a write, in
C and Python alike, because the kernel ends a process whose file grows past a limit (SIGXFSZ).
"""
import argparse
import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lora
import train_a
from extras.images import save_gif
from extras.metadata import save_image, save_png
from extras.modes import save_latent
from loading import files
from loading.errors import UserError
from loading.errors import MEMORY_HINT, exit_on_user_error
from loading.lora_formats import save_lora
from loading.weights import save_model
from stage_a import StageA
from stage_c import StageC
from tools.lora import merge
from tools.weights import convert
from training.cache import Cache
from training.checkpoints import Checkpoints, Log
from training.data import open_dataset
from training.report import draw_curves
from training.results import write_stage_a

VQGAN = Path(train_a.__file__).parent / "models" / "tiny" / "vqgan"
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
SMALL_C = dict(c=64, c_cond=64, depth=1, nhead=2)


def args_of(folder: Path) -> argparse.Namespace:
    return train_a.parse_args(["--data", "scenes", "--out", str(folder), "--keep", "1", "--steps", "3",
                               "--resume", "auto"])


def small_a(seed: int = 0) -> StageA:
    torch.manual_seed(seed)
    return StageA(bottleneck_blocks=1, c_hidden=8, codebook_size=8).eval()


def with_lora() -> StageC:
    torch.manual_seed(0)
    model = StageC(c=64, c_cond=64, depth=1, heads=2)
    lora.add_lora(model, 2)
    for parameter in lora.lora_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


def checkpoint(folder: Path, step: int = 3) -> None:
    checkpoints = Checkpoints(args_of(folder), ())
    checkpoints.find("auto")
    checkpoints.save(step, dict(step=step, model={"w": torch.arange(5000.0)},
                                optimizer=dict(state={0: torch.ones(500)})))


def log(folder: Path) -> None:
    written = Log(folder, 2)
    for step in (3, 4):
        written.write(step, loss=1 / step, lr=0.1, words="x" * 600)
    draw_curves(written.lines(), ["loss"], folder / "curves.png")


def prepare_merge(folder: Path) -> None:
    model = with_lora()
    save_lora(model, folder / "lora.safetensors")
    lora.remove(model)
    files.write_files(SMALL_C, model.state_dict(), folder / "prior", files.STEM)


def latent(folder: Path) -> None:
    job = argparse.Namespace(latent={"semantic": torch.arange(400.0)}, origin={}, overwrite=False)
    save_latent(job, folder / "a.safetensors")


def cache(folder: Path) -> None:
    entries = Cache(folder, "encoder", {"kind": "latents"})
    for key in "ab":
        entries.put(key, np.arange(2000.0))


def tar_of(folder: Path) -> None:
    for i in range(2):
        Image.fromarray(NOISE).resize((128, 128)).save(folder / f"{i}.png")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for i in range(2):
            tar.add(folder / f"{i}.png", f"{i}.png")
    os.utime(folder / "shard.tar", (0, 0))       # the index contains it


JOBS = {      # name: (what is there before, what is killed)
    "checkpoint": (lambda folder: checkpoint(folder, 2), checkpoint),
    "result": (lambda folder: save_model(small_a(1), folder / "vqgan"), lambda folder: write_stage_a(
        args_of(folder), small_a(), torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        dict(val_psnr=1.0, val_psnr_quantised=1.0), 2)),
    "LoRA": (lambda folder: None, lambda folder: save_lora(with_lora(), folder / "lora.safetensors")),
    "LoRA, lora.py alone": (lambda folder: None, lambda folder: lora.save_lora(with_lora(), folder / "a.safetensors")),
    "merge": (prepare_merge, lambda folder: merge(folder / "prior", folder / "lora.safetensors", folder / "out", 1.0)),
    "merge to a file": (prepare_merge, lambda folder: merge(folder / "prior", folder / "lora.safetensors",
                                                            folder / "out.safetensors", 1.0)),
    "convert": (lambda folder: None, lambda folder: convert(VQGAN, folder / "out", "ours")),
    "convert to .pt": (lambda folder: None, lambda folder: convert(VQGAN, folder / "out.pt", "original")),
    "PNG": (lambda folder: None, lambda folder: save_png(Image.fromarray(NOISE), folder / "a.png", dict(seed=1))),
    "PNG over another": (lambda folder: (folder / "a.png").write_bytes(b"old"), lambda folder: save_png(
        Image.fromarray(NOISE), folder / "a.png", dict(seed=1), overwrite=True)),
    "JPEG": (lambda folder: None, lambda folder: save_image(Image.fromarray(NOISE), folder / "a.jpg", dict(seed=1))),
    "GIF": (lambda folder: None, lambda folder: save_gif([Image.fromarray(NOISE), Image.fromarray(255 - NOISE)],
                                                         folder / "a.gif")),
    "latent": (lambda folder: None, latent),
    "cache": (lambda folder: None, cache),
    "index": (tar_of, lambda folder: open_dataset(folder / "shard.tar", captions_required=False)),
    "log and curves": (lambda folder: Log(folder, 0).write(1, loss=1.0, lr=0.1), log),
}


def in_child(job, folder: Path, operation: int | None = None, size: int | None = None) -> int:
    """job(folder) in a process that dies before this operation on a name in it, or when a file has this size -> how
    many operations there were; -1 if it died."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:                               # no return to pytest from here
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2), os.dup2(null.fileno(), 1)
        count = 0

        def watch(event: str, given: tuple) -> None:
            nonlocal count
            if event in OPERATIONS and any(str(folder) in os.fsdecode(name) for name in given
                                           if isinstance(name, (str, bytes, os.PathLike))):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        try:
            try:
                job(folder)
            except (FileExistsError, UserError) as error:                        # it was killed after the last rename
                if "exists already" not in str(error):
                    raise
            os.write(write, b"%d" % count)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
    assert killed or status == 0, f"the job failed, status {status}"
    return -1 if killed else int(answer)


def content(path: Path):
    """Comparable; of torch.save's files, which hold their temporary name, only the values."""
    if path.suffix == ".pt":
        return str([(name, tensor.tolist()) for name, tensor in files.tensors_in(torch.load(path, weights_only=True))])
    return path.read_bytes()


def state(folder: Path) -> tuple[dict, list[Path]]:
    """The files, and those that are hidden: temporary ones."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    hidden = [path for path in folder.rglob("*") if path.name[0] == "." and path.name != ".lock"
              or path.suffix == ".half"]
    return {path: content(path) for path in found if not any(path.is_relative_to(half) for half in hidden)}, hidden


@pytest.mark.parametrize("name", JOBS)
def test_a_kill_leaves_whole_files_and_the_next_run_nothing_else(name, tmp_path):
    """By default 2 operations and one size of each kind, drawn by a seed; WUERSTCHEN_SLOW=1 takes all of them."""
    folder, prepared, (prepare, job), rng = tmp_path / "out", tmp_path / "prepared", JOBS[name], random.Random(name)
    folder.mkdir()
    in_child(prepare, folder)
    shutil.copytree(folder, prepared)            # with the times of its files, which an index contains
    before = state(folder)[0]
    operations = in_child(job, folder)
    after, hidden = state(folder)
    assert operations > 1 and not hidden and after != before
    largest = max(len(path.read_bytes()) for path in after if after[path] != before.get(path))
    moments = [dict(operation=n) for n in range(1, operations + 1)]
    moments += [dict(size=size) for size in (0, *sorted(rng.sample(range(1, largest), 5)))]
    if not os.environ.get("WUERSTCHEN_SLOW"):
        moments = [*rng.sample(moments[:operations], 2), rng.choice(moments[operations:])]
    killed, left = 0, 0
    for moment in moments:
        shutil.rmtree(folder)
        shutil.copytree(prepared, folder)
        killed += in_child(job, folder, **moment) == -1
        found, hidden = state(folder)
        left += bool(hidden)
        for path, value in found.items():
            torn = value not in (before.get(path), after.get(path))
            assert not torn or path.suffix == ".jsonl" and after[path].startswith(value), f"{moment}: {path} is torn"
        assert before.keys() <= found.keys() | after.keys() ^ before.keys(), f"{moment}: lost a file"
        in_child(job, folder)
        found, hidden = state(folder)
        assert not hidden and found == after, f"{moment}: {hidden} or other files after the next run"
    assert killed >= len(moments) - 1 and (left or len(moments) < 9), f"{killed} kills, temporary files after {left}"


# --- full disks --------------------------------------------------------------------------------------

ON_ITS_OWN = ("LoRA, lora.py alone", "index")    # the first knows nothing of us; an index is read again next time


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ON_ITS_OWN])
def test_a_full_disk_ends_in_one_line_and_changes_nothing(name, tmp_path):
    """Here a limit on the size of files, which fails in the same places: in C, Rust and Python."""
    def job(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        with pytest.raises(OSError) as error, contextlib.redirect_stdout(io.StringIO()):     # pytest's is a file
            JOBS[name][1](folder)
        needs = "" if name == "log and curves" else r": it needs (about|more than) [\d.]+ MiB"
        pattern = rf"{folder}/[\w/.-]+ cannot be written: File too large{needs}; what was there is unchanged"
        assert re.fullmatch(pattern, str(error.value)) and ".tmp-" not in str(error.value)
    folder = tmp_path / "out"
    folder.mkdir()
    in_child(JOBS[name][0], folder)
    before = state(folder)[0]
    in_child(job, folder)
    found, hidden = state(folder)
    assert found == before and not hidden


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    """The size of tensors is known: 16 GB need not be written to find out."""
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: argparse.Namespace(total=1e12, free=2e9))
    monkeypatch.setattr(files, "write_safetensors", lambda *_: pytest.fail("begun"))
    for path in ("a.safetensors", "folder/a.pt"):
        with pytest.raises(OSError) as error:
            files.write_tensors(tmp_path / path, dict(part={"w": torch.empty(10 ** 9, device="meta")})
                                if path.endswith("pt") else {"w": torch.empty(10 ** 9, device="meta")})
        assert str(error.value) == (f"{tmp_path / path} cannot be written: No space left on device: it needs about "
                                    "3.73 GiB, 1.86 GiB are free; what was there is unchanged")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_other_errors_in_a_writer_stay_what_they_are(tmp_path):
    """A bug of ours is no full disk."""
    def fail(path: Path) -> None:
        raise RuntimeError("unexpected pos 576 vs 534")
    with pytest.raises(RuntimeError, match="^unexpected pos 576 vs 534$"):
        files.write_atomically(tmp_path / "a.pt", fail)
    assert not [*tmp_path.iterdir()]


def test_only_temporary_files_without_a_living_process_are_swept(tmp_path, monkeypatch):
    """Nor are other programs' files, nor young ones of other machines, whose locks may be invisible."""
    names = {f".a.tmp-{files.HOST}-00000000.png": False, ".a.tmp-ffffffff-00000000.png": True, ".a.12345678.png": True,
             f"a.tmp-{files.HOST}-00000000.png": True, f".b.tmp-{files.HOST}-0123abcd": False}
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".old.tmp-ffffffff-00000000.png").write_bytes(b"half")
    os.utime(tmp_path / ".old.tmp-ffffffff-00000000.png", (0, 0))
    with files.temporary_path(tmp_path / "c.png") as living:
        monkeypatch.setattr(files, "SWEPT", set())
        files.write_atomically(tmp_path / "d.txt", lambda path: path.write_text("new"))
        assert {path.name for path in tmp_path.iterdir()} == {"d.txt", living.name, *(n for n in names if names[n])}


def test_files_of_tensors_are_those_of_safetensors(tmp_path):
    """All dtypes, no dimension, no element; sorted metadata; readable by whoever may read the folder."""
    tensors = {f"{dtype}"[6:]: torch.arange(5).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)}
    tensors |= dict(number=torch.tensor(2.5), empty=torch.empty(0, 3), turned=torch.arange(6.0).view(2, 3).T)
    files.write_tensors(tmp_path / "a.safetensors", tensors, dict(b="1", a="ü"))
    files.write_tensors(tmp_path / "b.safetensors", tensors, dict(a="ü", b="1"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == dict(a="ü", b="1")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- a lack of memory --------------------------------------------------------------------------------

@pytest.mark.parametrize("fail", [
    lambda: torch.empty(10 ** 15), lambda: np.empty(10 ** 15), lambda: bytearray(10 ** 15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")),
    lambda: (_ for _ in ()).throw(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))])
def test_a_lack_of_memory_ends_in_one_line(fail, capsys):
    with pytest.raises(SystemExit) as end, exit_on_user_error("--resume auto", MEMORY_HINT):
        fail()
    found = capsys.readouterr().err
    assert end.value.code == 2 and found.count("\n") == 1
    assert found.startswith("error: memory ran out: halve --batch and double --grad-accum; --resume auto (")


def test_bugs_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_on_user_error():
        raise RuntimeError("a bug")
