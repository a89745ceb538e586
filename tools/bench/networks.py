"""Measures the networks of given weights: compares each call with diffusers', and times a batch of 16 images."""
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from loading.layouts import find_parts
from tools.bench.measure import Call, compare, in_turns
from tools.bench.models import diffusers_classes, noise
from tools.bench.report import PROMPT, ROOT, Row
from wuerstchen import Wuerstchen, latent_sizes


@torch.no_grad()
def measure(args) -> tuple[str, list[Row], str]:
    model = Wuerstchen.load(args.weights, args.device)
    paths = find_parts(ROOT / "models" / "tiny" if args.weights == "tiny" else args.weights)
    # Without low_cpu_mem_usage=False, diffusers warns that it needs the package accelerate.
    theirs = {part: kind.from_pretrained(paths[part], torch_dtype=model.dtype, low_cpu_mem_usage=False).to(args.device)
              for part, kind in diffusers_classes().items()}
    rows, _, peak = compare(calls_of(model, theirs, args), args.repeats, args.device, times=args.calls)
    seconds = median(in_turns({"batch": lambda: model(PROMPT, num_images=16, width=args.side, height=args.side)},
                              args.repeats)["batch"])
    rows.append(Row("an image in a batch of 16, seconds", f"{seconds:.2f} s for all", "", seconds / 16))
    return "Networks", rows, (f"Weights: {args.weights}. Peak {peak:.0f} GFLOP/s."
                              + " diffusers is not installed, so there is no comparison with it." * (not theirs))


def calls_of(model: Wuerstchen, theirs: dict, args) -> dict[str, Call]:
    random, (size_c, size_b) = noise(args.device, model.dtype), latent_sizes(*[args.side or model.size] * 2)
    text_c = torch.cat(model.encode_text("c", [PROMPT], [""]))                           # (2, N, D)
    text_b, _ = model.encode_text("b", [PROMPT], [""])                                   # (1, N, D)
    x_c, x_b = random(2, model.channels_c, *size_c), random(1, model.channels_b, *size_b)
    semantic = model.unscale_semantic(random(1, model.channels_c, *size_c))
    networks_c, networks_b, networks_a = ((model.part(ours), theirs.get(part)) for ours, part in (
        ("stage_c", "prior"), ("stage_b", "decoder"), ("stage_a", "vqgan")))
    return {**step_calls("Stage C step", "", args, networks_c, model.bind_c(text_c), x_c, text_c),
            # A step outside the guidance interval needs no unconditional prediction, so its batch is 1 instead of 2.
            **step_calls("Stage C step, unguided", "", args, networks_c, model.bind_c(text_c[:1]), x_c[:1], text_c[:1]),
            **step_calls("Stage B step", "", args, networks_b, model.bind_b(semantic, text_b), x_b, semantic, text_b),
            **decode_calls("", args, networks_a, model.decode_one, x_b)}


def step_calls(title: str, suffix: str, args, networks: tuple[nn.Module, nn.Module | None], fast: Callable, x: Tensor,
               *conditions: Tensor) -> dict[str, Call]:
    """Returns {name: Call} for a step at t = 0.5 by `fast`, which the pipeline calls, and with --plain also by our
    network. A name is title + suffix. networks: ours, and diffusers' or None. conditions: their inputs after x, t."""
    (ours, theirs), t = networks, torch.full((len(x),), 0.5, device=args.device)
    other = theirs and partial(theirs, x, t.to(x.dtype), *conditions)
    plain = {f"{title}, plain{suffix}": Call(partial(ours, x, t, *conditions), other)} if args.plain else {}
    return {title + suffix: Call(partial(fast, x, t), other, args.official)} | plain


def decode_calls(suffix: str, args, networks: tuple[nn.Module, nn.Module | None], fast: Callable,
                 x: Tensor) -> dict[str, Call]:
    """Returns {name: Call} for decoding latents x by Stage A. For the other arguments, see step_calls."""
    ours, theirs = networks
    other = theirs and (lambda: theirs.decode(x * ours.scale_factor).sample)
    plain = {f"Stage A decode, plain{suffix}": Call(partial(ours.decode, x), other)} if args.plain else {}
    return {f"Stage A decode{suffix}": Call(partial(fast, x), other, args.official)} | plain
