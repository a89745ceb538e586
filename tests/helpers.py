"""What several test files need: reference data, the measure of deviation, weights made from names."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import weights

HERE = Path(__file__).parent
GOLDEN, MANIFESTS = HERE / "golden", HERE / "manifests"
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
        model = stage(**weights.config_to_ours(config, stage))
    return weights.fill(model, weights.to_ours(state_dict, model).items(), dtype)


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
