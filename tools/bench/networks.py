"""How fast the networks of some weights are, call by call next to diffusers, and how fast a batch of images is."""
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from loading.layouts import find_parts
from tools.bench.measure import Call, compare, in_turns
from tools.bench.models import diffusers_classes, noise
from tools.bench.report import PROMPT, ROOT, Row
from wuerstchen import Wuerstchen, latent_sizes


@torch.no_grad()
def measure(args) -> tuple[str, list[Row], str]:
    model = Wuerstchen.load(args.weights, args.device)
    paths = find_parts(ROOT / "models" / "tiny" if args.weights == "tiny" else args.weights)
    # low_cpu_mem_usage would need another library, and warn about it at length.
    theirs = {part: kind.from_pretrained(paths[part], torch_dtype=model.dtype, low_cpu_mem_usage=False).to(args.device)
              for part, kind in diffusers_classes().items()}
    rows, _, peak = compare(calls_of(model, theirs, args), args.repeats, args.device)
    seconds = median(in_turns({"batch": lambda: model([PROMPT] * 16, seed=list(range(16)), width=args.side,
                                                      height=args.side)}, args.repeats)["batch"])
    rows.append(Row("16 images in a batch, per second", f"{seconds:.2f} s", "", 16 / seconds))
    return "Networks", rows, (f"Ratios: how many times as fast. Weights: {args.weights}. Peak {peak:.0f} GFLOP/s."
                              + " diffusers is not installed, so there is no comparison with it." * (not theirs))


def calls_of(model: Wuerstchen, theirs: dict, args) -> dict[str, Call]:
    random, (size_c, size_b) = noise(args.device, model.dtype), latent_sizes(*[args.side or model.size] * 2)
    text_c = torch.cat(model.encode_text("c", [PROMPT], [""]))                           # (2, N, D)
    text_b, _ = model.encode_text("b", [PROMPT], [""])                                   # (1, N, D)
    x_c, x_b = random(2, model.channels_c, *size_c), random(1, model.channels_b, *size_b)
    semantic = model.unscale(random(1, model.channels_c, *size_c))
    calls, vqgan = {}, theirs.get("vqgan")

    def add(title: str, part: str, step: Callable, network: nn.Module, x: torch.Tensor, *conditions) -> None:
        t = torch.full((len(x),), 0.5, device=args.device)
        other = partial(theirs[part], x, t.to(x.dtype), *conditions) if theirs else None
        calls[title] = Call(partial(step, x, t), other, args.calls)
        if args.plain:
            calls[f"{title}, plain"] = Call(partial(network, x, t, *conditions), other, args.calls)
    add("Stage C step", "prior", model.bind_c(text_c), model.part("stage_c"), x_c, text_c)
    # Outside the guidance interval nothing unconditional is computed.
    add("Stage C step, unguided", "prior", model.bind_c(text_c[:1]), model.part("stage_c"), x_c[:1], text_c[:1])
    add("Stage B step", "decoder", model.bind_b(semantic, text_b), model.part("stage_b"), x_b, semantic, text_b)
    other = (lambda: vqgan.decode(x_b * vqgan.config.scale_factor).sample) if theirs else None
    calls["Stage A decode"] = Call(lambda: model.decode_one(x_b), other, args.calls)
    if args.plain:
        calls["Stage A decode, plain"] = Call(lambda: model.part("stage_a").decode(x_b), other, args.calls)
    return calls
