"""Measures how long things take on this machine, each beside something it can be compared with, and writes BENCHMARKS.md.

  python -m tools.bench                                  # the tiny weights, a few minutes at most
  python -m tools.bench --repeats 9 --skip-start         # only the networks
  python -m tools.bench --weights PATH --side 128        # other weights, smaller pictures than their default
  python -m tools.bench --official                       # steps at official size and 1024 px, random weights; 9 GB, half an hour on 2 cores; on a GPU
                                                   # bfloat16, 1, 4 and 8 pictures
  python -m tools.bench --official --no-compile          # without torch.compile, which needs a C++ compiler on a CPU
  python -m tools.bench --memory                         # what official sizes take; needs 7 GB of disk and some minutes
  python -m tools.bench --training --repeats 1           # training steps at official size and 512 px; 12 GB of memory, 10 minutes for the LoRA alone
  python -m tools.bench --training --side 1024 --batch 1 --depth 8 --repeats 1             # the same at 1024 px, a quarter of the blocks; 3 minutes
  python -m tools.bench --epoch --repeats 1              # what --cache saves of an epoch, and whether two workers read fast enough; 13 GB, 4 minutes
  python -m tools.bench --int8                           # what it saves of the weights and costs the tiny model in right pictures; 10 minutes

start      from `python sample.py` to the picture on disk; beside it, a Python that does nothing but
           import torch and transformers' CLIP, the floor for any program that uses both; and `--help`
networks   one step of Stage C (guided: two rows), one of Stage B (one row), one decoding by Stage A, beside diffusers with the
           same weights and inputs, where it is installed; and 16 pictures in one batch
official   the same calls at official size, plain, with what does not change from step to step prepared, compiled, and in int8; and
           the share of the time that matrix products and attention would take by themselves
memory     the most that was taken at any time, in a process of its own: loading Stage C, and a whole picture with
           --low-memory, two steps each; beside it, the size of what is loaded. On a CPU that includes pages of files
training   steps (forward, backward, clip, AdamW) of a LoRA and of all of Stage C beside diffusers, with peft, same weights and inputs
epoch      200 pictures of 768 px, added up from a LoRA's step at official size, what the encoders take, and what reading takes
int8       weights of official size, and what evaluate.py finds right in 4 times 256 pictures, beside float32 with the same noise

What is compared is run in turns, A B A B ..., so that whatever slows the machine down for a while slows both. Times are
medians; a ratio is the median of the ratios of neighbours, pair by pair. Each run replaces its own sections of the file.
Operations are those that torch counts in products and convolutions; the peak is a product of two large matrices of the same
numbers, taken in turns with the rest. Nothing is asserted: a figure belongs to its machine.
Needs: what wuerstchen.py needs; diffusers for the comparison.
"""
import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

PROMPT = "a red apple on a blue background"
FLOOR = "import torch, transformers; from transformers import CLIPTextModel, CLIPTokenizer"
FILE = Path(__file__).parents[1] / "BENCHMARKS.md"
DTYPES = dict(fp32="float32", bf16="bfloat16", fp16="float16")
# their order in the file
SECTIONS = ("Start", "Networks", "Official size", "GPU", "Memory", "Training", "Training at 1024 px", "Epoch", "Int8")
# (section, what) -> the ratio is to be at least, or at most, this. Speeds: for 2 CPU cores in float32.
GOALS = {
    ("Start", "`--help`, seconds"): ("at most", 0.3),
    ("Start", "start to PNG"): ("at most", 1.6),
    ("Networks", "16 pictures in a batch, per second"): ("at least", 4.0),
    ("Official size", "Stage C step, prepared"): ("at least", 1.4),
    ("Official size", "Stage B step, prepared"): ("at least", 1.5),
    ("Official size", "Stage A decode"): ("at least", 1.7),
    ("Official size", "Stage C step, prepared, its products alone"): ("at least", 0.85),
    ("Official size", "Stage B step, prepared, its products alone"): ("at least", 0.85),
    ("Official size", "Stage A decode, its products alone"): ("at least", 0.85),
    ("Official size", "Stage C step, compiled, beside eager"): ("at least", 1.0),
    ("Official size", "Stage B step, compiled, beside eager"): ("at least", 1.0),
    ("Official size", "Stage C step, int8"): ("at least", 2.0),
    ("Official size", "Stage B step, int8"): ("at least", 2.0),
    ("Official size", "whole picture, added up"): ("at least", 1.45),
    ("Official size", "largest deviation from diffusers"): ("at most", 1e-5),
    ("Official size", "error of int8, relative L2"): ("at most", 0.01),
    ("GPU", "a picture, compiled, seconds"): ("at most", 0.35),
    ("GPU", "a picture, compiled, beside diffusers"): ("at least", 2.5),
    ("GPU", "a picture, compiled, beside diffusers compiled"): ("at least", 1.25),
    ("GPU", "a picture of 8, compiled, share of the peak"): ("at least", 0.5),
    ("Memory", "loading Stage C, float16, beside reading its file"): ("at most", 1.3),
    **{("Memory", f"text to image at 1024 px, one part at a time, {dtype}"): ("at most", 1.25)
       for dtype in ("float32", "bfloat16")},
    **{(section, f"{what}{how}, {quantity}"): ("at most", goal) for section in SECTIONS[5:7]
       for what, goal in (("LoRA", 0.75), ("full", 0.8))
       for how in ("", ", `--checkpointing products`", ", `--checkpointing blocks`")
       for quantity in ("time", "memory")},
    ("Epoch", "200 pictures, LoRA, `--cache`"): ("at least", 1.3),
    ("Epoch", "reading a batch, 2 workers"): ("at most", 1.0),
    ("Int8", "weights of Stage C"): ("at most", 0.25),
    ("Int8", "weights of Stage B"): ("at most", 0.25),
    ("Int8", "wrong instead of right, points"): ("at most", 1.0),
}


class Row(NamedTuple):
    """A line of a table. ratio: what a goal speaks of; where that is a quantity by itself, such as seconds, this."""
    what: str
    ours: str
    other: str
    ratio: float
    more: str = ""


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny",
                   help="\"tiny\", which ships with the code, or a folder of weights (default: tiny)")
    p.add_argument("--side", type=int, default=None, help="px of the square picture (default: that of the weights)")
    p.add_argument("--repeats", type=int, default=5,
                   help="runs of everything, of which the median counts; more where figures jump (default: 5)")
    p.add_argument("--calls", type=int, default=10,
                   help="calls of a network per run; fewer for large weights (default: 10)")
    p.add_argument("--device", default=None, help="cuda, cpu, ... (default: cuda where there is one, else cpu)")
    p.add_argument("--official", action="store_true",
                   help="measure networks of official size, with random weights, in place of --weights")
    p.add_argument("--dtype", choices=DTYPES, help="numbers of --official (default: bf16 on a GPU, else fp32)")
    p.add_argument("--pictures", type=int, nargs="+",
                   help="of --official: how many at a time, several are taken one after another (default: 1, on a GPU 1 4 8)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="of --official: Stages B and C by torch.compile, too (default: yes)")
    p.add_argument("--memory", action="store_true",
                   help="measure memory in place of time: random weights of official size (Linux only)")
    p.add_argument("--training", action="store_true",
                   help="measure training steps in place of sampling: random weights of official size (Linux only)")
    p.add_argument("--epoch", action="store_true",
                   help="measure what an epoch of training takes with and without a cache, and its reading")
    p.add_argument("--int8", action="store_true", help="measure what 8 bits save and cost in place of time")
    p.add_argument("--batch", type=int, default=4, help="pictures per training step (default: 4)")
    p.add_argument("--depth", type=int, default=32,
                   help="blocks of Stage C in --official and --training, and of Stage B in proportion; fewer where memory or time is short (default: 32, the official depth)")
    p.add_argument("--out", type=Path, default=FILE, help="file whose sections are replaced (default: BENCHMARKS.md)")
    p.add_argument("--skip-start", action="store_true", help="do not measure program starts, which take longest")
    return p.parse_args(argv)


def status(line: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the memory of this process now, VmHWM the most it had."""
    return next(int(text.split()[1]) * 1024 for text in open("/proc/self/status") if text.startswith(line))


def in_turns(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Runs all actions once to warm up, then `repeats` times in turns -> the seconds of each."""
    seconds = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# ----- the file --------------------------------------------------------------------------------------

def ratio(above: list[float], below: list[float]) -> float:
    """Pair by pair: a machine that is slow for a while is so for both of a pair, and the median forgets pairs where it was not."""
    return median(a / b for a, b in zip(above, below, strict=True))


def verdict(section: str, row: Row) -> tuple[str, str]:
    """-> the goal in words, and whether it is met; empty where there is no goal."""
    if (section, row.what) not in GOALS:
        return "", ""
    kind, goal = GOALS[section, row.what]
    return f"{kind} {goal:g}", "yes" if (row.ratio >= goal if kind == "at least" else row.ratio <= goal) else "**no**"


def table(section: str, rows: list[Row], note: str = "") -> str:
    """The section in Markdown, without its title."""
    lines = ["| what | ours | compared with | ratio | goal | met | |", "|---|---:|---:|---:|---:|---|---|"]
    for row in rows:
        number = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}" if row.ratio >= 0.095 else f"{row.ratio:.1e}"
        lines.append(f"| {' | '.join((row.what, row.ours, row.other, number, *verdict(section, row), row.more))} |")
    # A goal that nothing speaks of is not to be forgotten.
    missing = [f"{what} ({kind} {goal:g})" for (of, what), (kind, goal) in GOALS.items() if of == section
               and what not in {row.what for row in rows}]
    notes = [note] * bool(note) + [f"Goals that were not measured: {', '.join(missing)}."] * bool(missing)
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def replace_section(text: str, title: str, body: str) -> str:
    """The file's text with this section, a "## title" and what follows up to the next, replaced; or added, in the order of SECTIONS."""
    head, *parts = re.split(r"(?m)^## ", text)
    sections = dict(part.split("\n", 1) for part in parts) | {title: f"\n{body.strip()}\n"}
    head = head.strip() or "# Benchmarks\n\nWritten by `python -m tools.bench`, which says what is measured and how. Each section has its own date and machine."
    order = [*(name for name in SECTIONS if name in sections), *(name for name in sections if name not in SECTIONS)]
    return "\n\n".join([head, *(f"## {name}\n\n{sections[name].strip()}" for name in order)]) + "\n"


def machine(args) -> str:
    """What a figure belongs to."""
    import torch
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("transformers", "diffusers", "peft"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    name = torch.cuda.get_device_name() if (args.device
                                            or "cuda").startswith("cuda") and torch.cuda.is_available() else next(
        (line.split(":")[1].strip() for line in (open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else ())
         if line.startswith("model name")), platform.machine())
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""      # Windows has none
    return f"{date.today()}; {name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{load}; {', '.join(versions)}"


def write(args, section: str, rows: list[Row], note: str = "") -> None:
    """Prints a section, and puts it into the file."""
    from loading.files import write_atomically
    command = " ".join(["python -m tools.bench", *args.typed]).split(" --out")[0]
    # nothing there is taken that often
    medians = "" if section in ("Memory", "Int8") else f"; medians of {args.repeats}"
    body = f"`{command}`, {machine(args)}{medians}.\n\n{table(section, rows, note)}"
    print(f"## {section}\n\n{body}", flush=True)
    text = replace_section(args.out.read_text(encoding="utf-8") if args.out.exists() else "", section, body)
    write_atomically(args.out, lambda path: path.write_text(text, encoding="utf-8"))


# ----- start -----------------------------------------------------------------------------------------

def start_to_picture(args) -> list[Row]:
    """Seconds of a whole program, of its floor, and of its help."""
    def program(*argv: str):
        subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    script = str(Path(__file__).parents[1] / "sample.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [script, "--prompt", PROMPT, "--seed", "1", "--weights", args.weights, "--out", folder]
        if args.side:
            command += ["--width", str(args.side), "--height", str(args.side)]
        if args.device:
            command += ["--device", args.device]
        seconds = in_turns({"ours": lambda: program(*command), "floor": lambda: program("-c", FLOOR),
                            "help": lambda: program(script, "--help")}, args.repeats)
    times = {name: median(values) for name, values in seconds.items()}
    return [Row("start to PNG", f"{times['ours']:.2f} s", f"{times['floor']:.2f} s, imports alone",
                ratio(seconds["ours"], seconds["floor"])),
            Row("`--help`, seconds", f"{times['help']:.2f} s", "", times["help"])]


# ----- networks --------------------------------------------------------------------------------------

class Call(NamedTuple):
    """What is measured: our call, diffusers' or None, how often in a run, whether its products are to be taken alone, too; and, where ours is
    compiled, another of the calls that does the same eagerly, for the comparison, and for the operations, which cannot be counted in ours."""
    ours: Callable
    theirs: Callable | None
    repeat: int = 1
    alone: bool = False
    eager: Callable | None = None


class Measured(NamedTuple):
    """Median seconds of our call, and of diffusers', and the operations of ours."""
    ours: float
    theirs: float | None
    flops: int


def products_of(call: Callable) -> Callable:
    """-> a call that multiplies as many numbers as this one, in the same order, shapes and strides, and does nothing else.

    It runs the matrix products, the convolutions that are such products (not those channel by channel), and the attentions, on numbers
    of its own. Tensors of the same shape are the same there, so that it is, if anything, too fast.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    aten = torch.ops.aten
    attention = [kind for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention",
                                   "cudnn_attention")
                 if (kind := getattr(aten, f"_scaled_dot_product_{name}", None))]
    products, tensors, seen = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, *attention}, {}, []

    def twin(tensor):
        key = tensor.shape, tensor.stride(), tensor.dtype
        if key not in tensors:               # not zeros, with which some processors are faster
            length = 1 + sum((n - 1) * stride for n, stride in zip(*key[:2]))            # strides of 0 are possible
            tensors[key] = torch.randn(length, device=tensor.device).to(tensor.dtype).as_strided(*key[:2])
        return tensors[key]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kind = function.overloadpacket
            if kind in products and not (kind is aten.convolution and args[8] > 1):      # groups
                seen.append((function, *tree_map_only(torch.Tensor, twin, (args, kwargs or {}))))
            return function(*args, **(kwargs or {}))
    with Watch():
        call()

    def alone():
        for function, args, kwargs in seen:
            function(*args, **kwargs)
    return alone


def measured(calls: dict[str, Call], repeats: int, device, dtype=None) -> tuple[list[Row], dict[str, Measured], float]:
    """-> rows; what was measured of each call; and GFLOP/s of a large product of this dtype (default: float32), all taken in turns.

    Calls that share diffusers' side (the same function) have it measured once, and their ratios are with that one.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    # a CPU without half precision takes minutes
    n = 8192 if device.type == "cuda" else 2048 if dtype in (None, torch.float32) else 256
    a = torch.randn(n, n, device=device, dtype=dtype)
    actions, key = {}, {}

    def repeated(call: Callable, times: int) -> Callable:
        def action():
            for _ in range(times):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()         # calls return before the GPU is done
        return action
    with torch.no_grad():
        flops, results = {}, {}
        for what, call in calls.items():
            actions[what] = repeated(call.ours, call.repeat)
            if call.theirs:
                key[what] = next((other for other in key if calls[other].theirs is call.theirs), what)
                actions["theirs " + key[what]] = repeated(call.theirs, call.repeat)
            if call.alone:
                actions["products of " + what] = repeated(products_of(call.ours), call.repeat)
            with FlopCounterMode(display=False) as counter:
                (call.eager or call.ours)()
            # a recorded graph writes there again
            flops[what], results[what] = counter.get_total_flops(), call.ours().float().clone()
        seconds = in_turns(actions | {"peak": repeated(lambda: a @ a, 1)}, repeats)
        peak = 2 * n ** 3 / median(seconds["peak"]) / 1e9
        rows, found = [], {}
        for what, call in calls.items():
            ours, theirs = seconds[what], seconds["theirs " + key[what]] if call.theirs else None
            found[what] = Measured(median(ours) / call.repeat, median(theirs) / call.repeat if theirs else None,
                                   flops[what])
            speed = flops[what] / found[what].ours / 1e9
            # int8's products are not among the operations that torch knows.
            more = "" if "int8" in what else f"{flops[what] / 1e9:.4g} GFLOP, {speed:.0f} GFLOP/s, {speed / peak:.0%} of the peak"
            if theirs:
                reference = call.theirs().float()
                difference = ((results[what] - reference).abs().max() / reference.abs().max()).item()
                more += f"{'; ' * bool(more)}differs by {difference:.0e}, L2 {((results[what] - reference).norm() / reference.norm()).item():.0e}"
            rows.append(Row(what, f"{1000 * found[what].ours:.2f} ms", f"{1000 * found[what].theirs:.2f} ms, diffusers"
                            if theirs else "",
                            ratio(theirs, ours) if theirs else float("nan"), more))
            if call.eager:
                eager = seconds[next(other for other in calls if calls[other].ours is call.eager)]
                rows.append(Row(f"{what}, beside eager", rows[-1].ours, f"{1000 * median(eager) / call.repeat:.2f} ms",
                                ratio(eager, ours)))
            if call.alone:
                alone = seconds["products of " + what]
                limit = f"; if they were all, {ratio(theirs, alone):.2f} times as fast as diffusers" if theirs else ""
                rows.append(Row(f"{what}, its products alone", rows[-1].ours,
                                f"{1000 * median(alone) / call.repeat:.2f} ms", ratio(alone, ours),
                                f"share that matrix products and attention would take by themselves{limit}"))
    return rows, found, peak


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
    classes = dict(prior=theirs.modeling_wuerstchen_prior.WuerstchenPrior,
                   decoder=theirs.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
                   vqgan=theirs.modeling_paella_vq_model.PaellaVQModel)
    # low_cpu_mem_usage would need another library, and say so at length.
    return {part: kind.from_pretrained(parts[part], torch_dtype=model.dtype, low_cpu_mem_usage=False).to(model.device)
            for part, kind in classes.items()}


def networks(args) -> tuple[list[Row], str]:
    """-> rows and a note."""
    import torch
    from loading.layouts import find_parts
    from wuerstchen import Wuerstchen, latent_sizes

    model = Wuerstchen.load(args.weights, args.device)
    folder = Path(__file__).parents[1] / "models" / "tiny" if args.weights == "tiny" else args.weights
    theirs = their_networks(find_parts(folder), model)
    size_c, size_b = latent_sizes(*[args.side or model.size] * 2)

    def noise(*shape: int):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)

    text_c = torch.cat(model.encode_text(model.text_encoder_c, [PROMPT], [""], 1))       # (2, N, D)
    text_b, _ = model.encode_text(model.text_encoder_b, [PROMPT], [""], 1)               # (1, N, D)
    x_c, t_c = noise(2, model.stage_c.config["c_in"], *size_c), torch.full((2,), 0.5, device=model.device)
    x_b, t_b = noise(1, model.stage_b.config["c_in"], *size_b), torch.full((1,), 0.5, device=model.device)
    semantic = noise(1, model.stage_b.config["c_semantic"], *size_c) * 42 - 1

    def beside(ours: Callable, part: str, call: Callable) -> Call:
        return Call(ours, (lambda: call(theirs[part])) if theirs else None, args.calls)
    calls = {"Stage C step": beside(lambda: model.stage_c(x_c, t_c, text_c), "prior",
                                    lambda net: net(x_c, t_c, text_c)),
             # What a step costs outside of the guidance interval, where nothing unconditional is computed.
             "Stage C step, unguided": beside(lambda: model.stage_c(x_c[:1], t_c[:1], text_c[:1]), "prior",
                                              lambda net: net(x_c[:1], t_c[:1], text_c[:1])),
             "Stage B step": beside(lambda: model.stage_b(x_b, t_b, semantic, text_b), "decoder",
                                    lambda net: net(x_b, t_b, semantic, text_b)),
             "Stage A decode": beside(lambda: model.stage_a.decode(x_b), "vqgan",
                                      lambda net: net.decode(x_b * net.config.scale_factor).sample)}
    rows, _, peak = measured(calls, args.repeats, model.device)
    seconds = median(in_turns({"batch": lambda: model([PROMPT] * 16, seed=list(range(16)), width=args.side,
                                                      height=args.side)}, args.repeats)["batch"])
    rows.append(Row("16 pictures in a batch, per second", f"{seconds:.2f} s", "", 16 / seconds))
    return rows, f"Ratios: how many times as fast. Weights: {args.weights}. Peak {peak:.0f} GFLOP/s." + (
        "" if theirs else " diffusers is not installed, so there is no comparison with it.")


# ----- official size ---------------------------------------------------------------------------------

def official_pair(stage: type, kind: type, config: dict, device, dtype):
    """Ours with random weights, and diffusers' with the very same tensors: their memory is there once."""
    import torch
    from loading.names import config_to_diffusers, to_diffusers
    with torch.device("meta"):
        ours = stage(**config)
        theirs = kind(**{key: value for key, value in config_to_diffusers(ours).items() if key[0] != "_"})
    # A head of 1e-3 would give back x_t, and hide what is to be compared; with 0.02 the quotient is ill-conditioned.
    random_model(ours, device, head=5e-3)
    for name, buffer in ours.named_buffers():
        buffer.normal_(std=0.02) if buffer.is_floating_point() else buffer.zero_()
        if name.endswith("running_var"):
            buffer.abs_().add_(0.5)
    ours.to(dtype)
    theirs.load_state_dict({name: tensor.contiguous()
                            for name, tensor in to_diffusers(ours.state_dict(), ours).items()}, assign=True)
    return ours.eval(), theirs.eval()


def in_int8(network):
    """A copy in int8, beside the network: the float weights are there once."""
    import torch
    from speed.int8 import quantised, to_int8
    with torch.device("meta"):
        result = type(network)(**network.config)
    result.load_state_dict(dict(quantised(network.state_dict().items(), to_int8(result))), assign=True)
    return result.eval()


def official(args) -> tuple[list[Row], str]:
    """-> rows and a note. One network at a time."""
    import gc
    import torch
    from diffusers.pipelines.deprecated import wuerstchen as theirs_in
    from wuerstchen import latent_sizes
    from stage_a import OFFICIAL as A, StageA
    from stage_b import OFFICIAL as B, StageB
    from stage_c import OFFICIAL as C, StageC
    device, side, gpu = torch.device(args.device), args.side or 1024, args.device.startswith("cuda")
    dtype, numbers = getattr(torch, DTYPES[args.dtype]), args.pictures or ([1, 4, 8] if gpu else [1])
    (h, w), (h_b, w_b) = latent_sizes(side, side)

    def noise(*shape: int):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def compiled(network):
        return torch.compile(network, dynamic=False, **dict(mode="reduce-overhead") if gpu else {})

    # Each -> its title, our network, diffusers', and what gives the inputs of n pictures: ours; ours with all that does
    # not change from
    # step to step prepared by a network; and diffusers'.
    def stage_c():
        def inputs(network, n: int):
            x, t, text = noise(2 * n, 16, h, w), torch.full((2 * n,), 0.5, device=device), noise(2 * n, 77, 1280)
            return (x, t, text), (x, t, network.prepare(text)), (x, t.to(dtype), text)
        return "Stage C step", *official_pair(StageC, theirs_in.modeling_wuerstchen_prior.WuerstchenPrior,
                                              C | dict(depth=args.depth), device, dtype), inputs

    def stage_b():
        def inputs(network, n: int):
            x, t, text, semantic = noise(n, 4, h_b, w_b), torch.full((n,), 0.5,
                                                                     device=device), noise(n, 77, 1024), noise(n, 16, h,
                                                                                                               w) * 42 - 1
            return (x, t, semantic, text), (x, t, network.prepare(x.shape[2:], semantic,
                                                                  text)), (x, t.to(dtype), semantic, text)
        blocks = tuple(max(1, n * args.depth // 32) for n in B["blocks"])
        return "Stage B step", *official_pair(StageB, theirs_in.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt,
                                              B | dict(blocks=blocks), device, dtype), inputs

    def calls_of(title: str, ours, theirs, inputs: Callable, more: dict) -> dict[str, Call]:
        calls = {}
        for n in numbers:
            plain, prepared, their_inputs = inputs(ours, n)
            eager, now = partial(theirs, *their_inputs), partial(ours, *prepared)
            calls[named(title, n)] = Call(partial(ours, *plain), eager, repeat)
            calls[named(f"{title}, prepared", n)] = Call(now, eager, repeat, alone=True)
            if "compiled" in more:
                fast, their_fast = more["compiled"]
                calls[named(f"{title}, compiled", n)] = Call(partial(fast, *prepared),
                                                             partial(their_fast, *their_inputs), repeat, eager=now)
            if "int8" in more:
                calls[named(f"{title}, int8", n)] = Call(partial(more["int8"], *inputs(more["int8"], n)[1]), eager,
                                                         repeat)
        return calls

    def named(title: str, n: int) -> str:
        return title if n == 1 else f"{title}, {n} pictures"

    rows, found, peaks, repeat = [], {}, [], args.calls if gpu else 1
    with torch.no_grad():
        for stage in (stage_c, stage_b, None):
            if stage:
                title, ours, theirs, inputs = stage()
                more = (dict(compiled=(compiled(ours), compiled(theirs))) if args.compile else {}) | (
                    dict(int8=in_int8(ours)) if not gpu and dtype == torch.float32 else {})
                calls = calls_of(title, ours, theirs, inputs, more)
            else:
                ours, theirs = official_pair(StageA, theirs_in.modeling_paella_vq_model.PaellaVQModel, A, device, dtype)
                calls = {named("Stage A decode", n): Call(partial(ours.decode, x := noise(n, 4, h_b, w_b)),
                                                          lambda x=x: theirs.decode(x * A["scale_factor"]).sample,
                                                          repeat, alone=True) for n in numbers}
            found_rows, of_calls, peak = measured(calls, args.repeats, device, dtype)
            rows, found, peaks = rows + found_rows, found | of_calls, peaks + [peak]
            # a long way to the table
            print("\n".join(" ".join(map(str, row)) for row in found_rows), file=sys.stderr, flush=True)
            del ours, theirs, calls
            more = inputs = None
            gc.collect()
    if dtype == torch.float32:
        for title, kind, which in (("largest deviation from diffusers", "differs by", lambda what: "int8" not in what),
                                   ("error of int8, relative L2", "L2", lambda what: "int8" in what)):
            values = [float(said[1]) for row in rows if which(row.what)
                      and (said := re.search(kind + r" (\S+?)(,|$)", row.more))]
            rows += [Row(title, f"{max(values):.0e}", "", max(values))] if values else []
    rows += [row for n in numbers for row in whole_pictures(found, lambda title: named(title, n), n, median(peaks))]
    small = "" if (side, args.depth) == (1024, 32) else f" **Not the official size: {side} px, depth {args.depth}.**"
    goals = "; ".join(f"{what} ({kind} {goal:g})" for (section, what), (kind, goal) in GOALS.items() if section
                      == "GPU")
    no_gpu = "" if gpu else f"\n\nOn a GPU the same command writes a section of its own, whose goals are: {goals}."
    return rows, f"Ratios: how many times as fast, {DTYPES[args.dtype]}, {side} px. Peak {median(peaks):.0f} GFLOP/s.{small}{no_gpu}"


def whole_pictures(found: dict[str, Measured], named: Callable[[str], str], n: int, peak: float) -> list[Row]:
    """Rows for n pictures at a time, added up: 29 guided steps of C, 12 unguided ones of B, one decoding. peak: GFLOP/s."""
    def added(how: str, field: str) -> float:
        return sum(steps * getattr(found[named(title)], field)
                   for steps, title in ((29, f"Stage C step{how}"), (12, f"Stage B step{how}"), (1, "Stage A decode")))
    ours, theirs = added(", prepared", "ours"), added("", "theirs")
    rows = [Row(named("whole picture, added up"), f"{ours:.3g} s", f"{theirs:.3g} s, diffusers", theirs / ours,
                "29 guided steps of C, 12 unguided of B, one decoding")]
    if named("Stage C step, compiled") in found:
        fast, their_fast = added(", compiled", "ours"), added(", compiled", "theirs")
        what = "a picture, compiled" if n == 1 else f"a picture of {n}, compiled"
        share = added(", compiled", "flops") / fast / 1e9 / peak
        rows += [Row(f"{what}, seconds", f"{fast / n:.3g} s", "", fast / n),
                 Row(f"{what}, beside diffusers", f"{fast:.3g} s", f"{theirs:.3g} s", theirs / fast),
                 Row(f"{what}, beside diffusers compiled", f"{fast:.3g} s", f"{their_fast:.3g} s", their_fast / fast),
                 Row(f"{what}, share of the peak", "", "", share)]
    return rows


# ----- memory ----------------------------------------------------------------------------------------

# Each runs in a process of its own and prints two numbers: bytes at the peak and bytes of what was loaded, or the
# seconds of loading and of
# reading. Linux keeps the peak of a process as VmHWM; what importing torch took before is not counted.
MEASURED = """
import sys, torch, weights, wuerstchen
from transformers import CLIPTextModel
folder, device, dtype = sys.argv[1], torch.device(sys.argv[2]), getattr(torch, sys.argv[3])
def memory(line):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(line))
torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
before = memory("VmRSS")
{what}
print(torch.cuda.max_memory_allocated() if device.type == "cuda" else memory("VmHWM") - before, size)
"""
LOADING = """
model = weights.load_stage_c(folder + "/prior_prior", dtype).to(device)
size = sum(tensor.nbytes for tensor in model.state_dict().values())
"""
READING = """
import time, pathlib, statistics
file = next(pathlib.Path(folder, "prior_prior").glob("*.safetensors"))
def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
seconds(file.read_bytes)                         # from the disk, once; then from memory
times = [(seconds(lambda: weights.load_stage_c(folder + "/prior_prior", dtype)), seconds(file.read_bytes)) for _ in range(5)]
print(*(statistics.median(column) for column in zip(*times)))
sys.exit()
"""
PAINTING = f"""
model = wuerstchen.Wuerstchen.load(folder, str(device), dtype, low_memory=True)
model({PROMPT!r}, steps_c=2, steps_b=2)
size = max(sum(p.numel() for p in weights.build_empty(stage, folder + "/" + part)[0].parameters()) * dtype.itemsize
           for part, stage in (("prior_prior", weights.StageC), ("decoder", weights.StageB)))
"""


def official_files(folder: Path) -> None:
    """Random weights with the official names, sizes and places, in float16, 6.3 GB, in the layout of diffusers' combined pipeline."""
    import shutil
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel
    from loading import weights as w
    from loading.files import STEM, write_files
    from loading.names import config_to_diffusers, to_diffusers

    def random_tensor(name: str, shape: tuple) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float16).normal_(std=0.02)
        return values.abs() + 0.5 if name.endswith("running_var") else values
    for part, stage in (("prior_prior", w.StageC), ("decoder", w.StageB), ("vqgan", w.StageA)):
        with torch.device("meta"):
            model = stage()
        tensors = {name: random_tensor(name, tensor.shape) if tensor.is_floating_point()
                   else torch.zeros(tensor.shape, dtype=tensor.dtype)
                   for name, tensor in model.state_dict().items()}
        write_files(config_to_diffusers(model),
                      {n: t.contiguous() for n, t in to_diffusers(tensors, model).items()}, folder / part, STEM)
    tokenizer = Path(__file__).parents[1] / "models" / "tiny" / "tokenizer"         # its words do not matter here
    for side, width, layers, heads in (("prior_", 1280, 32, 20), ("", 1024, 24, 16)):
        config = CLIPTextConfig(vocab_size=49408, hidden_size=width, num_hidden_layers=layers,
                                num_attention_heads=heads,
                                intermediate_size=4 * width, hidden_act="gelu")
        with torch.device("meta"):
            model = CLIPTextModel(config)
        tensors = {name: random_tensor(name, tensor.shape) for name, tensor in model.state_dict().items()
                   if not name.endswith("position_ids")}
        write_files(config.to_dict(), tensors, folder / f"{side}text_encoder", "model")
        shutil.copytree(tokenizer, folder / f"{side}tokenizer")


def memory(args) -> list[Row]:
    """The peaks beside the sizes."""
    import torch
    rows = []
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        official_files(Path(folder))
        def figures(what: str, dtype: str) -> list[float]:
            run = subprocess.run([sys.executable, "-c", MEASURED.format(what=what), folder, device, dtype],
                                 cwd=Path(__file__).parents[1],
                                 stdout=subprocess.PIPE, text=True, check=True)
            return [float(number) for number in run.stdout.split()[-2:]]
        loading, raw = figures(READING, "float16")
        rows.append(Row("loading Stage C, float16, beside reading its file", f"{loading:.2f} s", f"{raw:.2f} s",
                        loading / raw, "from the system's memory of files; medians of 5"))
        together = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))          # in float16
        for title, what, dtype in (("loading Stage C", LOADING, "float16"), ("loading Stage C", LOADING, "float32"),
                                   *(("text to image at 1024 px, one part at a time", PAINTING, dtype)
                                     for dtype in ("float32", "bfloat16"))):
            peak, size = figures(what, dtype)
            rows.append(Row(f"{title}, {dtype}", f"{peak / 1e6:.0f} MB",
                            f"{size / 1e6:.0f} MB, {'its' if what is LOADING else 'the largest'} weights", peak / size,
                            f"all parts together, as in diffusers: {together * getattr(torch, dtype).itemsize / 2e6:.0f} MB" if what is PAINTING else ""))
    return rows


# ----- training --------------------------------------------------------------------------------------

def random_model(model, device: str, names: dict[str, str] | None = None, head: float = 1e-3):
    """A model from the meta device, with random weights that are a function of their names; names: ours -> the model's."""
    import torch
    model.to_empty(device=device)
    for name, tensor in model.named_parameters():
        name = names[name] if names else name
        # The last layer is small: its output stands in a divisor, see stage_c.py.
        tensor.data.view(-1).normal_(std=head if "head" in name else 0.02,
                                     generator=torch.Generator(device).manual_seed(zlib.crc32(name.encode())))
    return model.requires_grad_(False)


def training_steps(who: str, full: bool, checkpointing: str | None, depth: int, side: int, batch: int, device: str,
                   width: int = 1536, steps: int = 3) -> dict:
    """Optimizer steps of Stage C as train_c.py and diffusers' training script make them, on random weights: of all of it (full), or of a
    LoRA of rank 8 on attention.

    who: "ours", or "diffusers", for LoRA with peft. -> seconds of the median step after the first, and of ours the seconds of its products
    by themselves; the first loss; and bytes: the most that was taken beyond what was there before, and the weights alone.
    """
    import torch
    from stage_c import StageC
    from loading.names import config_to_diffusers, to_diffusers
    # without dropout both compute the same
    config = dict(c_in=16, c=width, c_cond=1280, c_timestep=64, depth=depth, heads=width // 64, dropout=0.0)
    before = status("VmRSS")
    with torch.device("meta"):
        model = StageC(**config)
    if who == "ours":
        random_model(model, device)
        model.checkpointing = checkpointing
    else:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
        names = dict(zip(to_diffusers(model.state_dict(), model), model.state_dict()))       # both in the same order
        with torch.device("meta"):
            model = WuerstchenPrior(**{key: value for key, value in config_to_diffusers(model).items()
                                       if key[0] != "_"})
        random_model(model, device, names)
        if checkpointing:
            model.enable_gradient_checkpointing()
    if full:
        model.requires_grad_(True)
    elif who == "ours":
        import lora
        lora.add_lora(model, 8)
    else:
        from peft import LoraConfig
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0, fused=True)
    generator, seconds, losses = torch.Generator(device).manual_seed(0), [], []

    def noise(*shape: int):
        return torch.randn(shape, generator=generator, device=device)
    model.train()
    for _ in range(steps):
        x_t, eps = noise(batch, 16, side * 3 // 128,
                         side * 3 // 128), noise(batch, 16, side * 3 // 128, side * 3 // 128)
        t, text = torch.rand(batch, generator=generator, device=device), noise(batch, 77, 1280)
        start = time.perf_counter()
        loss = (model(x_t, t, text) - eps).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())               # waits for a GPU, too
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before
    products = None
    if who == "ours" and not checkpointing:
        alone = products_of(lambda: (model(x_t, t, text) - eps).square().mean().backward())
        start = time.perf_counter()
        alone()
        if device == "cuda":
            torch.cuda.synchronize()
        products = time.perf_counter() - start
    return dict(seconds=median(seconds[1:]), products=products, loss=losses[0], peak=peak,
                size=sum(p.nbytes for p in model.parameters()))


def alone(call: str, device: str) -> dict:
    """What a function of this file, called in a process of its own, returns."""
    # A step of a small model first: what torch and peft load when they are first used is no memory of a step.
    code = f"import json, bench; bench.training_steps('ours', False, None, 1, 128, 1, {device!r}, 64); print(json.dumps(bench.{call}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def training(args) -> tuple[list[Row], str]:
    """-> rows of time and memory, and a note, of training steps at official size, each in a process of its own, in turns."""
    import torch
    device, side = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.side or 512
    # On a CPU all of Stage C with its gradients and moments does not fit beside the rest: fewer blocks, for the ratio.
    depths = {False: args.depth, True: args.depth if device != "cpu" else max(1, args.depth // 4)}
    # Our "products" has no counterpart: it takes no more time than a plain step, and so stands beside diffusers' plain
    # one.
    runs = [(who, full, how) for full in (False, True) for who, hows in (("diffusers", (None, "blocks")),
                                                                         ("ours", (None, "products", "blocks")))
            for how in hows]
    results, rows = {run: [] for run in runs}, []
    for _ in range(args.repeats):
        for who, full, how in runs:
            results[who, full,
                    how].append(alone(f"training_steps({who!r}, {full}, {how!r}, {depths[full]}, {side}, {args.batch}, {device!r})", device))
            print(who, "full" if full else "LoRA", how, results[who, full, how][-1], file=sys.stderr, flush=True)
    for who, full, how in runs:
        if who == "ours":
            counterpart = results["diffusers", full, "blocks" if how == "blocks" else None]
            for name, key, text in (("time", "seconds", lambda v: f"{v:.2f} s"),
                                    ("memory", "peak", lambda v: f"{v / 1e9:.2f} GB")):
                ours, theirs = ([run[key] for run in of] for of in (results[who, full, how], counterpart))
                rows.append(Row(f"{'full' if full else 'LoRA'}{f', `--checkpointing {how}`' if how else ''}, {name}",
                                text(median(ours)),
                                f"{text(median(theirs))}, diffusers{'' if full else ' + peft'}{', checkpointed' if how == 'blocks' else ''}", ratio(ours, theirs),
                                f"losses {results[who, full, how][0]['loss']:.6f} and {counterpart[0]['loss']:.6f}"))
            if not how:
                ours, theirs, products = ([run[key] for run in of]
                                          for of, key in ((results[who, full, how], "seconds"),
                                                          (counterpart, "seconds"),
                                                          (results[who, full, how], "products")))
                rows.append(Row(f"{'full' if full else 'LoRA'}, its products alone", f"{median(ours):.2f} s",
                                f"{median(products):.2f} s", ratio(products, ours),
                                f"share that matrix products and attention would take by themselves; if they were all, {ratio(products, theirs):.2f} of diffusers' time"))
    sizes = [results["ours", full, None][0]["size"] / 1e9 for full in (False, True)]
    note = (f"One step of a LoRA of rank 8 on attention, Stage C of depth {depths[False]} (weights {sizes[0]:.2f} GB), and one of all of Stage C, of depth "
            f"{depths[True]} ({sizes[1]:.2f} GB): {side} px, batch {args.batch}. Ratios: of time and of memory.")
    peaks = [median(run["peak"] for run in results["diffusers", full, how]) / 1e9 for full in (False, True)
             for how in (None, "blocks")]
    note += (" Without activations there would be the weights, {:.2f} of diffusers' memory ({:.2f} of that with checkpointing); for all of Stage C with gradients "
             "and two moments {:.2f} ({:.2f}).".format(*(size / peak
                                                         for size, peak in zip((sizes[0], sizes[0], 4 * sizes[1],
                                                                                4 * sizes[1]), peaks))))
    return rows, note


# ----- an epoch --------------------------------------------------------------------------------------

def encoding(side: int, batch: int, device: str) -> dict:
    """Seconds for what --cache saves in a step: the image encoder's and CLIP-bigG's part, at official size with random weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel
    from stage_b import EfficientNetEncoder, preprocess
    with torch.device("meta"):
        text_model = CLIPTextModel(CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
                                                  intermediate_size=5120, hidden_act="gelu"))
    encoder = EfficientNetEncoder().eval().to(device)
    text_model.to_empty(device=device)
    for p in text_model.parameters():
        p.data.normal_(std=0.02)
    ids = torch.arange(77, device=device).expand(batch, -1)
    for buffer in text_model.buffers():
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))        # the only one: positions 0, 1, 2, ...
    images, seconds = torch.rand(batch, 3, side, side, device=device), []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            (encoder(preprocess(images, side * 3 // 4)).sum() + text_model(input_ids=ids).last_hidden_state.sum()).item()
            seconds.append(time.perf_counter() - start)
    return dict(seconds=median(seconds[1:]))


def reading(side: int, batch: int, files: int = 64) -> dict:
    """Seconds in which two workers read a batch as train_c.py's loop gets it: JPEGs a third larger than `side`, decoded, resized, cropped."""
    import numpy as np
    from PIL import Image
    import train_c
    from training.data import open_dataset
    from training.order import BatchSampler, batches
    from training.processes import Processes
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(files):
            rough = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
            rough.resize((side * 4 // 3, side * 4 // 3), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=95)
            Path(folder, f"{i}.txt").write_text(PROMPT, encoding="utf-8")
        args = train_c.parse_args(["--data", folder, "--out", folder, "--batch", f"{batch}", "--workers", "2"])
        pictures = open_dataset(folder)
        pictures.bucket = np.zeros(len(pictures), int)
        loader = batches(train_c.Samples(pictures, [(side, side)], args), BatchSampler(pictures.bucket, batch, 0),
                         Processes("cpu"), args)
        for _ in range(8):                       # until the workers run, and what they read ahead is used up
            next(loader)
        start, count = time.perf_counter(), 16
        for _ in range(count):
            next(loader)
        return dict(seconds=(time.perf_counter() - start) / count)


def epoch(args) -> tuple[list[Row], str]:
    """-> rows and a note. Added up: nobody waits for 200 pictures at official size on a CPU."""
    import torch
    device, side, count = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.side or 768, 200
    parts = dict(step=f"training_steps('ours', False, None, {args.depth}, {side}, {args.batch}, {device!r})",
                 encoding=f"encoding({side}, {args.batch}, {device!r})", reading=f"reading({side}, {args.batch})")
    found = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, call in parts.items():
            found[name].append(alone(call, device)["seconds"])
    step, more, read = (median(found[name]) for name in parts)
    steps = count / args.batch
    rows = [Row(f"{count} pictures, LoRA, `--cache`", f"{steps * step:.0f} s",
                f"{steps * (step + more):.0f} s, without", (step + more) / step,
                f"the image encoder and CLIP take {more:.2f} s of a step of {step + more:.2f} s, which is all that a cache can save"),
            Row("reading a batch, 2 workers", f"{read:.3f} s", f"{step + more:.2f} s, a step without a cache",
                read / (step + more))]
    return rows, f"LoRA of rank 8 on attention, Stage C of depth {args.depth}, {side} px, batch {args.batch}, pictures of {side * 4 // 3} px."


# ----- int8 ------------------------------------------------------------------------------------------

def in_8_bits(args, seeds: int = 4) -> tuple[list[Row], str]:
    """-> rows and a note."""
    import torch
    from tiny import evaluate
    from speed.int8 import to_int8
    from stage_b import StageB
    from stage_c import StageC

    def size(model) -> int:
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    rows = []
    for title, stage in (("Stage C", StageC), ("Stage B", StageB)):
        with torch.device("meta"):
            model = stage()
        full = size(model)
        to_int8(model)
        rows.append(Row(f"weights of {title}", f"{size(model) / 1e6:.0f} MB", f"{full / 1e6:.0f} MB, float32",
                        size(model) / full,
                        "what resamples, and products of few numbers, stay in float32"))
    facts, right = evaluate.fixed_prompts(), {}
    for int8 in (False, True):
        figures = [evaluate.score(evaluate.sample(evaluate.parse_args(["--weights", args.weights, "--seed",
                                                                       f"{1000 * seed}", *["--int8"] * int8]),
                                                  [fact["prompt"] for fact in facts]), facts) for seed in range(seeds)]
        right[int8] = sum(figure[kind]["right"] * figure[kind]["n"] for figure in figures
                          for kind in ("single_object", "pair_seen", "pair_held_out"))
    n = seeds * len(facts)
    rows.append(Row("wrong instead of right, points", f"{right[True] / n:.1%} right",
                    f"{right[False] / n:.1%} right, float32", 100 * (right[False] - right[True]) / n,
                    f"objects and places in {n} pictures"))
    return rows, f"Pictures: weights {args.weights}, default settings, the 256 prompts of evaluate.py, with {seeds} noises each."


def main(argv=None):
    args = parse_args(argv)
    args.typed = sys.argv[1:] if argv is None else list(argv)
    if args.memory:
        return write(args, "Memory", memory(args))
    if args.training:
        return write(args, "Training at 1024 px" if args.side == 1024 else "Training", *training(args))
    if args.epoch:
        return write(args, "Epoch", *epoch(args))
    if args.int8:
        return write(args, "Int8", *in_8_bits(args))
    if args.official:
        import torch
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpu = args.device.startswith("cuda")
        args.dtype = args.dtype or ("bf16" if gpu else "fp32")
        return write(args, "GPU" if gpu else "Official size", *official(args))
    if not args.skip_start:
        write(args, "Start", start_to_picture(args))
    write(args, "Networks", *networks(args))


if __name__ == "__main__":
    main()
