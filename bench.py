"""Measures how long things take on this machine, each beside something it can be compared with.

  python bench.py                                  # the tiny weights, a few minutes at most
  python bench.py --repeats 9 --skip-start         # only the networks
  python bench.py --weights PATH --side 128        # other weights, smaller pictures than their default

start      from `python sample.py` to the picture on disk; beside it, a Python that does nothing but
           import torch and transformers' CLIP, the floor for any program that uses both
stages     one step of Stage C (guided: two rows), one of Stage B (one row), one decoding by Stage A
diffusers  the same calls with the same weights and inputs there, where diffusers is installed

What is compared is run in turns, A B A B ..., so that whatever slows the machine down for a while slows
both. Figures are medians. They are printed, nothing is asserted: a figure belongs to its machine.
Needs: what wuerstchen.py needs; diffusers for the comparison.
"""
import argparse
import importlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Callable

PROMPT = "a red apple on a blue background"
FLOOR = "import torch, transformers; from transformers import CLIPTextModel, CLIPTokenizer"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny", help="\"tiny\", which ships with the code, or a folder of weights (default: tiny)")
    p.add_argument("--side", type=int, default=None, help="px of the square picture (default: that of the weights)")
    p.add_argument("--repeats", type=int, default=5, help="runs of everything, of which the median counts; more where figures jump (default: 5)")
    p.add_argument("--calls", type=int, default=10, help="calls of a network per run; fewer for large weights (default: 10)")
    p.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one, else cpu)")
    p.add_argument("--skip-start", action="store_true", help="do not measure program starts, which take longest")
    return p.parse_args(argv)


def in_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Runs all actions once to warm up, then `repeats` times in turns -> median seconds of each."""
    seconds = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def start_to_picture(args) -> dict[str, float]:
    """Seconds of a whole program, and of its floor."""
    def program(*argv: str):
        subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(__file__).parent / "sample.py"), "--prompt", PROMPT, "--seed", "1", "--weights", args.weights,
                   "--out", folder]
        if args.side:
            command += ["--width", str(args.side), "--height", str(args.side)]
        if args.device:
            command += ["--device", args.device]
        return in_turns({"sample.py": lambda: program(*command), "floor": lambda: program("-c", FLOOR)}, args.repeats)


def their_networks(parts: dict, model) -> dict | None:
    """diffusers' networks with the same weights, on the same device; None where diffusers is not installed."""
    for package in ("pipelines.deprecated.wuerstchen", "pipelines.wuerstchen"):      # it moved in a later version
        try:
            theirs = importlib.import_module(f"diffusers.{package}")
            break
        except ImportError:
            theirs = None
    if theirs is None:
        return None
    classes = dict(prior=theirs.modeling_wuerstchen_prior.WuerstchenPrior, decoder=theirs.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
                   vqgan=theirs.modeling_paella_vq_model.PaellaVQModel)
    # low_cpu_mem_usage would need another library, and say so at length.
    return {part: kind.from_pretrained(parts[part], torch_dtype=model.dtype, low_cpu_mem_usage=False).to(model.device) for part, kind in classes.items()}


def networks(args) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """-> milliseconds per call: {what: {"ours": ms, "diffusers": ms}}, and the largest relative difference of the results."""
    import torch
    from weights import find_parts
    from wuerstchen import Wuerstchen, latent_sizes

    model = Wuerstchen.load(args.weights, args.device)
    folder = Path(__file__).parent / "models" / "tiny" if args.weights == "tiny" else args.weights
    theirs = their_networks(find_parts(folder), model)
    size_c, size_b = latent_sizes(*[args.side or model.size] * 2)

    def noise(*shape: int):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)

    text_c = torch.cat(model.encode_text(model.text_encoder_c, [PROMPT], [""], 1))       # (2, N, D)
    text_b, _ = model.encode_text(model.text_encoder_b, [PROMPT], [""], 1)               # (1, N, D)
    x_c, t_c = noise(2, model.stage_c.config["c_in"], *size_c), torch.full((2,), 0.5, device=model.device)
    x_b, t_b = noise(1, model.stage_b.config["c_in"], *size_b), torch.full((1,), 0.5, device=model.device)
    semantic = noise(1, model.stage_b.config["c_semantic"], *size_c) * 42 - 1
    calls = {"Stage C step": {"ours": lambda: model.stage_c(x_c, t_c, text_c)},
             "Stage B step": {"ours": lambda: model.stage_b(x_b, t_b, semantic, text_b)},
             "Stage A decode": {"ours": lambda: model.stage_a.decode(x_b)}}
    if theirs:
        scale = theirs["vqgan"].config.scale_factor
        calls["Stage C step"]["diffusers"] = lambda: theirs["prior"](x_c, t_c, text_c)
        calls["Stage B step"]["diffusers"] = lambda: theirs["decoder"](x_b, t_b, semantic, text_b)
        calls["Stage A decode"]["diffusers"] = lambda: theirs["vqgan"].decode(x_b * scale).sample

    def repeated(call):
        def action():
            for _ in range(args.calls):
                call()
            if model.device.type == "cuda":
                torch.cuda.synchronize()         # calls return before the GPU is done
        return action

    with torch.no_grad():
        times = {what: {who: 1000 / args.calls * seconds for who, seconds in
                        in_turns({who: repeated(call) for who, call in both.items()}, args.repeats).items()}
                 for what, both in calls.items()}
        differences = {}
        for what, both in calls.items():
            if "diffusers" in both:
                a, b = both["ours"]().float(), both["diffusers"]().float()
                differences[what] = ((a - b).abs().max() / b.abs().max()).item()
    return times, differences


def main(argv=None):
    args = parse_args(argv)
    import torch
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""      # Windows has none
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs{load}, "
          f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"weights {args.weights}, medians of {args.repeats}\n")
    if not args.skip_start:
        start = start_to_picture(args)
        print(f"start to picture   {start['sample.py']:8.2f} s    imports alone {start['floor']:8.2f} s     "
              f"ratio {start['sample.py'] / start['floor']:.2f}")
    times, differences = networks(args)
    for what, ms in times.items():
        line = f"{what:18} {ms['ours']:8.2f} ms"
        if "diffusers" in ms:
            line += f"   diffusers     {ms['diffusers']:8.2f} ms    ratio {ms['ours'] / ms['diffusers']:.2f}   results differ by {differences[what]:.0e}"
        print(line)
    if not differences:
        print("diffusers is not installed, so there is no comparison with it: pip install diffusers")


if __name__ == "__main__":
    main()
