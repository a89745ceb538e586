"""What several test files need: reference data, the measure of deviation, weights made from names."""
import importlib
import json
import multiprocessing
import os
import socket
import time
import zlib
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from loading import weights
from loading.names import check_fit, config_to_ours, to_original, translate
from loading.text_encoder import CLIPTextModel, TextEncoder
from stage_a import StageA
from v1.stage_b import StageBV1
from stage_c import StageC

HERE = Path(__file__).parent
GOLDEN, MANIFESTS = HERE / "golden", HERE / "manifests"
TINY = HERE.parent / "models" / "tiny"
COMBINED, PUBLISHED = GOLDEN / "tiny_pipeline" / "combined", GOLDEN / "tiny_pipeline" / "published"


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Inputs, outputs and weights of the reference implementations, and the configuration (see golden/README.md)."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), json.loads(metadata.get("config") or metadata.get("run") or "{}")


def under(prefix: str, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose name starts with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in data.items() if name.startswith(prefix)}


def manifest(name: str) -> dict[str, tuple[tuple, str]]:
    """Names of the official tensors -> (shape, dtype)."""
    entries = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {tensor: (tuple(entry["shape"]), entry["dtype"]) for tensor, entry in entries.items()}


def build(stage: type, config: dict, state_dict: dict[str, Tensor], dtype=torch.float32):
    """A model of ours in eval mode from a configuration in diffusers' words and weights in either official naming."""
    with torch.device("meta"):
        model = stage(**config_to_ours(config, stage))
    check_fit({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, model)
    return weights.fill(model, translate(state_dict.items(), state_dict.keys(), model), dtype)


def rel(found: Tensor, reference: Tensor) -> float:
    """Largest deviation, relative to the largest value of the reference."""
    assert found.shape == reference.shape, f"shape {tuple(found.shape)}, reference {tuple(reference.shape)}"
    return ((found - reference).abs().max() / reference.abs().max()).item()


def capture(modules: dict[str, torch.nn.Module]) -> dict[str, Tensor]:
    """Forward hooks: after the next forward, the returned dict holds what each module gave."""
    outputs = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
    return outputs


def draw(name: str, *shape: int) -> Tensor:
    """Normally distributed numbers that depend on the name alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(int(np.prod(shape))).astype(np.float32)).view(shape)


def weights_from_names(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """Weights for models too large to store: every tensor is drawn from its original name (see golden/README.md)."""
    def tensor(name: str, shape: tuple) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        values = draw(name, *shape)
        if name.endswith("running_var"):
            return (0.2 * values).exp()
        if len(shape) > 1:
            return values.div_(float(np.sqrt(np.float32(np.prod(shape[1:])))))
        return 1 + 0.1 * values if name.endswith(".weight") else 0.1 * values
    return {name: tensor(name, shape) for name, (shape, _) in shapes.items()}


# v1 as its authors published it, but small; only the width of the text must be CLIP-H's, by which its Stage C is known.
SMALL_V1 = {StageA: dict(levels=2, bottleneck_blocks=1, c_hidden=8, c_latent=4, codebook_size=32),
            StageBV1: dict(codebook_size=32, c_token=4, c_timestep=8, c_cond=8, c_hidden=(8, 8), heads=(-1, 2),
                           blocks=(1, 1), levels=("CT", "CTA"), c_text=1024),
            StageC: dict(c=8, c_cond=1024, c_timestep=8, depth=1, heads=2)}


def small_v1(folder: Path) -> Path:
    """Writes the authors' three files, in their names and tables, and a text encoder of width 1024 with its
    tokenizer."""
    torch.manual_seed(0)
    for name, section, stage in (("vqgan_f4_v1_500k.pt", "state_dict", StageA),
                                 ("model_stage_b.pt", "state_dict", StageBV1),
                                 ("model_stage_c_ema.pt", "ema_state_dict", StageC)):
        model = stage(**SMALL_V1[stage])
        others = {"effnet_state_dict": {"x": torch.zeros(1)}, "iter": 7} if stage is StageBV1 else {}
        torch.save({section: to_original(model.state_dict(), model), **others}, folder / name)
    tokenizer = weights.load_tokenizer(TINY / "tokenizer")
    model = CLIPTextModel(tokenizer.bpe.get_vocab_size(), 1024, 8, num_hidden_layers=1, num_attention_heads=16,
                          max_position_embeddings=tokenizer.length)
    weights.save_text_encoder(TextEncoder(tokenizer, model), folder / "text_encoder", folder / "tokenizer")
    return folder


# ----- runs of the training scripts ------------------------------------------------------------------

def newest(out: Path) -> dict:
    """The newest checkpoint of a run."""
    return torch.load(sorted((out / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def lines(out: Path) -> list[dict]:
    """The log of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b, tolerance: float = 0.0) -> None:
    """Two nested dicts of tensors and numbers are equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key], tolerance)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            same(x, y, tolerance)
    else:
        assert a == b


def main_of(script: str, argv: list[str]) -> None:
    """train_a.main(...) and the like."""
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))


def count_messages(script: str, argv: list[str]) -> None:
    """main_of, and how often gradients were averaged over processes, in the file `calls`."""
    class Counted(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, lambda state, bucket: calls.append(1) or allreduce_hook(state, bucket))
    calls, torch.nn.parallel.DistributedDataParallel = [], Counted
    main_of(script, argv)
    Path("calls").write_text(str(len(calls)))


def start(count: int, folder: Path, function: Callable, *args) -> list[multiprocessing.Process]:
    """function(*args), which must have a module, in `count` processes with what torchrun sets, in `folder`. What rank 1
    prints is in folder/1.txt.

    A server that has imported torch forks them: torchrun's would take 8 s of imports, each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "train_a", "train_b", "train_c", "tiny.train_text"])
    with mock.patch.dict(os.environ, PYTHONPATH=f"{HERE.parent}:{HERE}", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_join, args=(rank, count, port, str(folder), function, *args))
                 for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def _join(rank: int, count: int, port: int, folder: str, function: Callable, *args) -> None:
    os.chdir(folder)
    os.environ |= dict(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{count}", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=f"{port}")
    file = os.open(f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    function(*args)


def together(count: int, folder: Path, function: Callable, *args, seconds: float = 180) -> None:
    """`start`, and all processes end well. If one does not, or they wait for each other, the others are ended."""
    processes, end = start(count, folder, function, *args), time.time() + seconds
    while any(process.is_alive() for process in processes) and time.time() < end:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill(), process.join()
    printed = [(Path(folder) / f"{rank}.txt") for rank in range(count)]
    assert codes == [0] * count, "\n".join([f"exit codes {codes}, None: they waited for {seconds} s",
                                            *(file.read_text()[-3000:] for file in printed if file.exists())])


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on a GPU. Views and allocations do not. `device` stands for the GPU:
    with "meta", operations on CPU tensors are not counted."""
    VIEWS = {"view", "t", "transpose", "permute", "expand", "unsqueeze", "slice", "select", "split", "detach", "alias",
             "as_strided", "chunk", "_unsafe_view", "squeeze", "split_with_sizes", "new_empty", "empty", "unbind"}

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name not in self.VIEWS and any(isinstance(x, Tensor) and x.device.type == self.device
                                          for x in tree_iter((args, kwargs, result))):
            self.names.append(name)
        return result


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read from the meta device into Python, where a GPU's host would have to wait. There
    are none there: every answer is True."""
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.count += 1
            return True
        return function(*args, **(kwargs or {}))


def theirs(file: str, name: str):
    """A class of diffusers. The module moved to `deprecated` in a later version."""
    pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed: pip install diffusers")
    for package in ("pipelines.deprecated", "pipelines"):
        try:
            return getattr(importlib.import_module(f"diffusers.{package}.wuerstchen.{file}"), name)
        except ImportError:
            continue
    pytest.skip("this version of diffusers has no Würstchen any more")
