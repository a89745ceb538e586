"""The networks that the benchmark compares: ours and diffusers', with the same weights, loaded or random."""
import importlib
from collections.abc import Callable

import torch
from torch import nn

from loading.names import config_to_diffusers, to_diffusers
from speed.int8 import quantised, to_int8


def diffusers_classes() -> dict[str, type]:
    """{"prior", "decoder", "vqgan": diffusers' class}; empty if diffusers is not installed."""
    for package in ("pipelines.deprecated.wuerstchen", "pipelines.wuerstchen"):          # later versions moved it
        try:
            theirs = importlib.import_module(f"diffusers.{package}")
        except ImportError:
            continue
        return dict(prior=theirs.modeling_wuerstchen_prior.WuerstchenPrior,
                    decoder=theirs.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
                    vqgan=theirs.modeling_paella_vq_model.PaellaVQModel)
    return {}


@torch.no_grad()
def randomize(model: nn.Module, device: str, dtype=torch.float32) -> nn.Module:
    """A model from the meta device gets random weights, always the same."""
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        # The output of the last layer is a divisor, see StageC.forward. A head of 1e-3 would return x_t and hide what
        # is compared; with 0.02 the quotient is ill-conditioned.
        tensor.normal_(std=5e-3 if "head" in name else 0.02) if tensor.is_floating_point() else tensor.zero_()
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.to(dtype).eval()


def random_pair(stage: type, part: str, config: dict, device: str, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """Ours with random weights, and diffusers' with the very same tensors, which are in memory only once."""
    with torch.device("meta"):
        ours = stage(**config)
        theirs = diffusers_classes()[part](**{key: value for key, value in config_to_diffusers(ours).items()
                                              if key[0] != "_"})
    randomize(ours, device, dtype)
    theirs.load_state_dict({name: tensor.contiguous()
                            for name, tensor in to_diffusers(ours.state_dict(), ours).items()}, assign=True)
    return ours, theirs.requires_grad_(False).eval()


def int8_copy(network: nn.Module) -> nn.Module:
    """The network in int8. What stays in float shares its memory."""
    with torch.device("meta"):
        result = type(network)(**network.config)
    result.load_state_dict(dict(quantised(network.state_dict().items(), to_int8(result))), assign=True)
    return result.eval()


def noise(device: str, dtype=torch.float32) -> Callable:
    """-> noise(*shape), the same on all devices and at each call."""
    return lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


# until speed/fast.py has them
def bind_c(network: nn.Module, text: torch.Tensor) -> Callable:
    prepared = network.prepare(text)
    return lambda x_t, t: network(x_t, t, prepared)


def bind_b(network: nn.Module, semantic: torch.Tensor, text: torch.Tensor) -> Callable:
    prepared = []

    def step(x_t, t):
        if not prepared:
            prepared.append(network.prepare(x_t.shape[2:], semantic, text))
        return network(x_t, t, prepared[0])
    return step
