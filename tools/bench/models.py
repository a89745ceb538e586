"""The networks that the benchmark compares: ours and diffusers', with the same random weights."""
from collections.abc import Callable

import torch
from torch import nn

from loading.names import config_to_diffusers, to_diffusers
from loading.text_encoder import CLIPTextModel
from loading.weights import NoStartValues
from speed.int8 import quantised, to_int8


def diffusers_classes() -> dict[str, type]:
    """Returns diffusers' classes of "prior", "decoder" and "vqgan", by name, or {} if diffusers is not installed."""
    try:
        from diffusers.pipelines.deprecated import wuerstchen as theirs
    except ImportError:
        return {}
    return dict(prior=theirs.modeling_wuerstchen_prior.WuerstchenPrior,
                decoder=theirs.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
                vqgan=theirs.modeling_paella_vq_model.PaellaVQModel)


@torch.no_grad()
def random_network(kind: Callable, config: dict, device: str, dtype=torch.float32) -> nn.Module:
    """Builds kind(**config) with random weights, which are the same in every call."""
    with torch.device("meta"), NoStartValues():
        model = kind(**config)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        # StageC.forward divides by part of the head's output. If the head's weights had a std of 1e-3, the result would
        # be almost x_t and hide differences between networks; with 0.02, the division would be ill-conditioned.
        tensor.normal_(std=5e-3 if "head" in name else 0.02) if tensor.is_floating_point() else tensor.zero_()
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.to(dtype).eval()


def random_pair(stage: type, part: str, config: dict, device: str, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    """Returns our network stage(**config) with random weights, and diffusers' network `part`, which shares them."""
    ours = random_network(stage, config, device, dtype)
    with torch.device("meta"):
        theirs = diffusers_classes()[part](**{key: value for key, value in config_to_diffusers(ours).items()
                                              if key[0] != "_"})
    theirs.load_state_dict({name: tensor.contiguous()
                            for name, tensor in to_diffusers(ours.state_dict(), ours).items()}, assign=True)
    return ours, theirs.requires_grad_(False).eval()


def random_text_model(width: int, layers: int, heads: int, device: str, dtype=torch.float32) -> nn.Module:
    """Builds a CLIP text model. width, layers, heads: 1280, 32, 20 for CLIP-bigG; 1024, 24, 16 for CLIP-H."""
    return random_network(CLIPTextModel, dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                              intermediate_size=4 * width, hidden_act="gelu"), device, dtype)


def int8_copy(network: nn.Module) -> nn.Module:
    """Returns a copy of a network with int8 layers. Layers that stay in float32 share memory with the original."""
    with torch.device("meta"):
        result = type(network)(**network.config)
    result.load_state_dict(dict(quantised(network.state_dict().items(), to_int8(result))), assign=True)
    return result.eval()


def noise(device: str, dtype=torch.float32) -> Callable:
    """Returns a function that draws a tensor of a given shape, with the same random numbers on every device."""
    return lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
