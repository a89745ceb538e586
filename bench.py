"""Measures how long things take on this machine, each beside something it can be compared with.

  python bench.py                                  # the tiny weights, a few minutes at most
  python bench.py --repeats 9 --skip-start         # only the networks
  python bench.py --weights PATH --side 128        # other weights, smaller pictures than their default
  python bench.py --memory                         # what official sizes take; needs 7 GB of disk and some minutes
  python bench.py --training --repeats 1           # LoRA steps at official size and 512 px; 12 GB of memory, 10 minutes

start      from `python sample.py` to the picture on disk; beside it, a Python that does nothing but
           import torch and transformers' CLIP, the floor for any program that uses both
stages     one step of Stage C (guided: two rows), one of Stage B (one row), one decoding by Stage A
diffusers  the same calls with the same weights and inputs there, where diffusers is installed
memory     the most that was taken at any time, in a process of its own: loading Stage C, and a whole picture with
           --low-memory, two steps each; beside it, the size of what is loaded. On a CPU that includes pages of files
training   LoRA steps (forward, backward, clip, AdamW) beside diffusers with peft, same weights and inputs

What is compared is run in turns, A B A B ..., so that whatever slows the machine down for a while slows
both. Figures are medians. They are printed, nothing is asserted: a figure belongs to its machine.
Needs: what wuerstchen.py needs; diffusers for the comparison.
"""
import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
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
    p.add_argument("--memory", action="store_true", help="measure memory in place of time: random weights of official size (Linux only)")
    p.add_argument("--training", action="store_true", help="measure LoRA steps in place of sampling: random weights of official size (Linux only)")
    p.add_argument("--batch", type=int, default=4, help="pictures per training step (default: 4)")
    p.add_argument("--depth", type=int, default=32, help="blocks of Stage C in training; fewer where memory is short (default: 32, the official depth)")
    p.add_argument("--skip-start", action="store_true", help="do not measure program starts, which take longest")
    return p.parse_args(argv)


def status(line: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the memory of this process now, VmHWM the most it had."""
    return next(int(text.split()[1]) * 1024 for text in open("/proc/self/status") if text.startswith(line))


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
    from hub import find_parts
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
             # What a step costs outside of the guidance interval, where nothing unconditional is computed.
             "the same unguided": {"ours": lambda: model.stage_c(x_c[:1], t_c[:1], text_c[:1])},
             "Stage B step": {"ours": lambda: model.stage_b(x_b, t_b, semantic, text_b)},
             "Stage A decode": {"ours": lambda: model.stage_a.decode(x_b)}}
    if theirs:
        scale = theirs["vqgan"].config.scale_factor
        calls["Stage C step"]["diffusers"] = lambda: theirs["prior"](x_c, t_c, text_c)
        calls["the same unguided"]["diffusers"] = lambda: theirs["prior"](x_c[:1], t_c[:1], text_c[:1])
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


# ----- memory ----------------------------------------------------------------------------------------

# Each runs in a process of its own and prints two numbers, bytes at the peak and bytes of what was loaded. Linux keeps
# the peak of a process as VmHWM; what importing torch took before is not counted.
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
PAINTING = f"""
model = wuerstchen.Wuerstchen.load(folder, str(device), dtype, low_memory=True)
model({PROMPT!r}, steps_c=2, steps_b=2)
size = max(sum(p.numel() for p in weights.plan(stage, folder + "/" + part)[0].parameters()) * dtype.itemsize
           for part, stage in (("prior_prior", weights.StageC), ("decoder", weights.StageB)))
"""


def official_files(folder: Path) -> None:
    """Random weights with the official names, sizes and places, in float16, 6.3 GB, in the layout of diffusers' combined pipeline."""
    import shutil
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel
    import weights as w

    def random_tensor(name: str, shape: tuple) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float16).normal_(std=0.02)
        return values.abs() + 0.5 if name.endswith("running_var") else values
    for part, stage in (("prior_prior", w.StageC), ("decoder", w.StageB), ("vqgan", w.StageA)):
        with torch.device("meta"):
            model = stage()
        tensors = {name: random_tensor(name, tensor.shape) if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype)
                   for name, tensor in model.state_dict().items()}
        w.write_files(w.config_to_diffusers(model), {n: t.contiguous() for n, t in w.to_diffusers(tensors, model).items()}, folder / part, w.STEM)
    tokenizer = Path(__file__).parent / "models" / "tiny" / "tokenizer"         # its words do not matter here
    for side, width, layers, heads in (("prior_", 1280, 32, 20), ("", 1024, 24, 16)):
        config = CLIPTextConfig(vocab_size=49408, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                intermediate_size=4 * width, hidden_act="gelu")
        with torch.device("meta"):
            model = CLIPTextModel(config)
        tensors = {name: random_tensor(name, tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
        w.write_files(config.to_dict(), tensors, folder / f"{side}text_encoder", "model")
        shutil.copytree(tokenizer, folder / f"{side}tokenizer")


def memory(args) -> None:
    """Prints the peaks beside the sizes."""
    import torch
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        official_files(Path(folder))
        for title, what, dtype in (("loading Stage C", LOADING, "float16"), ("loading Stage C", LOADING, "float32"),
                                   ("text to image at 1024 px, one part at a time", PAINTING, "float32" if device == "cpu" else "float16")):
            result = subprocess.run([sys.executable, "-c", MEASURED.format(what=what), folder, device, dtype], cwd=Path(__file__).parent,
                                    stdout=subprocess.PIPE, text=True, check=True)
            peak, size = map(int, result.stdout.split()[-2:])
            print(f"{title}, {dtype}: peak {peak / 1e6:.0f} MB; {'its' if what is LOADING else 'the largest'} weights {size / 1e6:.0f} MB; "
                  f"ratio {peak / size:.2f}", flush=True)


# ----- training --------------------------------------------------------------------------------------

def random_model(model, device: str, names: dict[str, str] | None = None):
    """A model from the meta device, with random weights that are a function of their names; names: ours -> the model's."""
    import torch
    model.to_empty(device=device)
    for name, tensor in model.named_parameters():
        name = names[name] if names else name
        # The last layer is small: its output stands in a divisor, see stage_c.py.
        tensor.data.view(-1).normal_(std=1e-3 if "head" in name else 0.02, generator=torch.Generator(device).manual_seed(zlib.crc32(name.encode())))
    return model.requires_grad_(False)


def lora_steps(who: str, checkpointing: str | None, depth: int, side: int, batch: int, device: str, width: int = 1536, steps: int = 3) -> dict:
    """Optimizer steps of a LoRA of rank 8 on attention, as train_c.py and diffusers' training script make them, on random weights.

    who: "ours", or "diffusers" with peft. -> seconds of the median step after the first, the first loss, and bytes: the
    most that was taken beyond what was there before, and the weights alone.
    """
    import torch
    from stage_c import StageC
    from weights import config_to_diffusers, to_diffusers
    config = dict(c_in=16, c=width, c_cond=1280, c_timestep=64, depth=depth, heads=width // 64, dropout=0.0)     # without dropout both compute the same
    before = status("VmRSS")
    with torch.device("meta"):
        model = StageC(**config)
    if who == "ours":
        import lora
        random_model(model, device)
        lora.add_lora(model, 8)
        model.checkpointing = checkpointing
    else:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
        from peft import LoraConfig
        names = dict(zip(to_diffusers(model.state_dict(), model), model.state_dict()))       # both in the same order
        with torch.device("meta"):
            model = WuerstchenPrior(**{key: value for key, value in config_to_diffusers(model).items() if key[0] != "_"})
        random_model(model, device, names)
        model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        if checkpointing:
            model.enable_gradient_checkpointing()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0, fused=True)
    generator, seconds, losses = torch.Generator(device).manual_seed(0), [], []

    def noise(*shape: int):
        return torch.randn(shape, generator=generator, device=device)
    model.train()
    for _ in range(steps):
        x_t, eps = noise(batch, 16, side * 3 // 128, side * 3 // 128), noise(batch, 16, side * 3 // 128, side * 3 // 128)
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
    return dict(seconds=median(seconds[1:]), loss=losses[0], peak=peak, size=sum(p.nbytes for p in model.parameters()))


def encoding(side: int, batch: int, device: str) -> dict:
    """Seconds for what --cache saves in a step: the image encoder's and CLIP-bigG's part, at official size with random weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel
    from stage_b import EfficientNetEncoder, preprocess
    with torch.device("meta"):
        text_model = CLIPTextModel(CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120, hidden_act="gelu"))
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


def training(args) -> None:
    """Prints time and memory of LoRA steps at official size, each in a process of its own, in turns."""
    import torch
    device, side = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.side or 512
    runs = {"diffusers + peft": ("diffusers", None), "ours": ("ours", None), "ours, --checkpointing products": ("ours", "products"),
            "diffusers + peft, checkpointing": ("diffusers", "blocks"), "ours, --checkpointing blocks": ("ours", "blocks")}

    def alone(call: str) -> dict:
        # A step of a small model first: what torch and peft load when they are first used is no memory of a step.
        code = f"import json, bench; bench.lora_steps('ours', None, 1, 128, 1, {device!r}, 64); print(json.dumps(bench.{call}))"
        run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])
    results = {title: [] for title in runs}
    for _ in range(args.repeats):
        for title, (who, checkpointing) in runs.items():
            results[title].append(alone(f"lora_steps({who!r}, {checkpointing!r}, {args.depth}, {side}, {args.batch}, {device!r})"))
    base = results["diffusers + peft"]
    print(f"One step of a LoRA of rank 8 on attention, Stage C of depth {args.depth} (weights {base[0]['size'] / 1e9:.2f} GB), {side} px, batch {args.batch}:")
    for title, runs in results.items():
        seconds, ratio = median(run["seconds"] for run in runs), median(a["seconds"] / b["seconds"] for a, b in zip(runs, base))
        memory, their_memory = (median(run["peak"] for run in which) for which in (runs, base))
        print(f"{title:32} {seconds:7.2f} s   ratio {ratio:.2f}    {memory / 1e9:6.2f} GB   ratio {memory / their_memory:.2f}    loss {runs[0]['loss']:.6f}", flush=True)
    if args.depth == 32:
        step, more = median(run["seconds"] for run in results["ours"]), alone(f"encoding({side}, {args.batch}, {device!r})")["seconds"]
        print(f"Encoding pictures and captions takes {more:.2f} s a step, which --cache saves: an epoch is {(step + more) / step:.2f} times as fast")


def main(argv=None):
    args = parse_args(argv)
    import torch
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""      # Windows has none
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs{load}, "
          f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"weights {args.weights}, medians of {args.repeats}\n")
    if args.memory:
        return memory(args)
    if args.training:
        return training(args)
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
