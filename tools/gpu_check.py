"""Checks and measures, on a GPU and within 6 minutes, what this repository claims about GPUs.

  python -m tools.gpu_check                  # prints the sections "GPU" and "GPU equality" for BENCHMARKS.md
  python -m tools.gpu_check --rehearse       # tests this script on the CPU, with small sizes; ignore the figures

equality   compares an image of the small model with the CPU's: float32, compiled, CUDA graphs, bfloat16, float16
training   seconds and memory of a training step of a LoRA and of all of Stage C, official size, 512 and 1024 px, bf16
networks   a step of Stage C and of Stage B, and a decoding by Stage A: official size, random weights, 1024 px, batch 1
           and 8, compared with diffusers, eager and (batch 1) compiled. Their sum is the time of a whole image.
waiting    runs the test that no sampling step makes the CPU wait for the GPU

Each part runs in its own process with a time budget, and prints each figure as soon as it is known. If a part fails or
takes too long, only its remaining figures are missing, and a line names them.
This script has not run on a GPU yet. Exit code: 0; 1 if a part failed or an image differs; 2 without a GPU.
Needs: what wuerstchen.py needs; diffusers and peft for the comparisons; pytest for `waiting`.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/.."      # so that `python tools/gpu_check.py` finds our modules

import gc
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

from loading.errors import UserError, exit_on_user_error, tell
from loading.files import reason_of
from loading.options import Parser
from tools.bench.report import PROMPT, ROOT, Row, machine, table, verdict

LIMIT = 350              # seconds for all parts of BUDGETS together
BATCHES = (1, 8)
BUDGETS = {"equality": 75, "training": 45, "Stage C step": 75, "Stage B step": 85, "Stage A decode": 25,
           "Stage C step, 8 images": 50, "Stage B step, 8 images": 60, "waiting": 30}
FORMS = {"fp32": dict(dtype="fp32"), "bf16": dict(dtype="bf16"), "fp16": dict(dtype="fp16"),
         # With offload=True, weights move between CPU and GPU, so torch.compile is used without CUDA graphs.
         "compiled": dict(dtype="fp32", compile=True, offload=True), "CUDA graphs": dict(dtype="fp32", compile=True)}
SMALL = dict(vqgan=dict(c_hidden=16), prior=dict(c=64, heads=2),             # network sizes for --rehearse
             decoder=dict(c_cond=64, c_hidden=(32, 64, 64, 64), heads=(-1, 2, 2, 2)))


def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m tools.gpu_check")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, where compiling is left out")
    p.add_argument("--part", choices=BUDGETS, help="only this part, as lines of JSON")
    return p.parse_args(argv)


def sizes(rehearse: bool) -> SimpleNamespace:
    """Returns the sizes of all measurements (small ones to `rehearse`), and options that tools/bench reads."""
    real = dict(device="cuda", side=1024, depth=32, repeats=3, calls=5, width=1536, sides=(512, 1024), small=None,
                steps={})
    tiny = dict(device="cpu", side=128, depth=1, repeats=1, calls=1, width=64, sides=(128,), small=SMALL,
                steps=dict(steps_c=4, steps_b=4, width=128, height=128))
    return SimpleNamespace(dtype="bf16", compile=True, plain=False, official=False, **(tiny if rehearse else real))


# ----- the parts: each yields (section, Row); networks also yield (name, figures) -------------------------------------

def equality(at: SimpleNamespace) -> Iterator[tuple[str, Row]]:
    import numpy as np

    from wuerstchen import Wuerstchen

    def image(device: str, **options) -> np.ndarray:
        return np.asarray(Wuerstchen.load("tiny", device, **options)(PROMPT, seed=0, **at.steps)[0], float)
    reference = image("cpu", dtype="fp32")
    for form, options in FORMS.items():
        rms = float(np.sqrt(np.square(image(at.device, **options) - reference).mean()))
        yield "GPU equality", Row(f"the small model's image, {form}", f"{rms:.2f} of 255", "float32 on the CPU", rms,
                                  "root of the mean squared difference")


def training(at: SimpleNamespace) -> Iterator[tuple[str, Row]]:
    import torch

    from tools.bench.training import Run, training_steps
    for side, batch in zip(at.sides, (4, 1)):
        for full in (False, True):
            if at.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = training_steps(Run("ours", full, None, True), at.depth, side, batch, at.device, at.width)
            yield "GPU", Row(f"{'full' if full else 'LoRA'} step, {side} px, batch {batch}",
                             f"{found['seconds']:.3f} s", "", float("nan"),
                             f"{found['peak']:.1f} GB at the peak; its products take {found['products']:.3f} s")
            gc.collect()


def network(title: str, batches: tuple[int, ...], at: SimpleNamespace) -> Iterator[tuple[str, Row | dict]]:
    """Measures `title`, such as "Stage C step". Yields ("GPU", Row), and (call's name, figures) for whole_images."""
    import torch

    from tools.bench.measure import Call, compare
    from tools.bench.official import calls_of_stage
    from tools.bench.report import DTYPES
    at.pictures = batches
    calls = calls_of_stage(title, at, at.small)
    if at.device == "cuda":
        for name, call in [item for item in calls.items() if not item[1].eager]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                call.ours()
            yield "GPU", Row(f"{name}, memory", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB", "", float("nan"))
    for name, call in calls.items():                     # one at a time: if time runs out, the first are kept
        eager = {"eager": Call(call.eager, None)} if call.eager else {}      # compares compiled calls with eager ones
        rows, found, peak = compare(eager | {name: call}, at.repeats, at.device, getattr(torch, DTYPES[at.dtype]),
                                    at.calls)
        yield from (("GPU", row) for row in rows if row.what != "eager")
        yield name, dict(found[name]._asdict(), peak=peak)


def waiting(at: SimpleNamespace) -> Iterator[tuple[str, Row]]:
    file, test, last = "tests/test_sampling.py", "test_on_a_gpu_no_step_makes_the_host_wait", "is there"
    if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
        raise UserError(f"{test} is no longer in {file}")
    if at.device == "cuda":
        run = subprocess.run([sys.executable, "-m", "pytest", "-q", f"{file}::{test}"], cwd=ROOT, capture_output=True,
                             text=True)
        last = (run.stdout + run.stderr).strip().splitlines()[-1]
        if run.returncode:
            raise UserError(f"{test}: {last}")
    yield "GPU equality", Row("the host never waits within a sampling", last, test, float("nan"))


def part(name: str, at: SimpleNamespace) -> Iterator[tuple[str, Row | dict]]:
    if name in (others := dict(equality=equality, training=training, waiting=waiting)):
        return others[name](at)
    title, _, batch = name.partition(", ")
    return network(title, BATCHES if title == "Stage A decode" else BATCHES[1:] if batch else BATCHES[:1], at)


# ----- running all parts ----------------------------------------------------------------------------------------------

def in_own_process(name: str, seconds: float) -> tuple[list[tuple], str | None]:
    """Runs a part in its own process. Returns a list of its results, and why some are missing (None if complete)."""
    problem = None
    try:
        run = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--part", name], cwd=ROOT, capture_output=True,
                             timeout=seconds)
        output = run.stdout
        if run.returncode:
            lines = run.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {run.returncode}"]
            problem = lines[-1][:300]
    except subprocess.TimeoutExpired as error:
        output, problem = error.stdout or b"", f"not done in its {seconds:.0f} seconds"
    lines = [json.loads(line) for line in output.decode().splitlines() if line.startswith("[") and line.endswith("]")]
    return [(kind, Row(*value) if isinstance(value, list) else value) for kind, value in lines], problem


def rehearsed(name: str, _: float) -> tuple[list[tuple], str | None]:
    import torch
    found = []
    try:
        with torch.compiler.set_stance("force_eager"):
            found += part(name, sizes(rehearse=True))
    except Exception as error:
        return found, reason_of(error)
    return found, None


def check_all(do: Callable, device: str) -> int:
    """Runs all parts by `do`, in_own_process or rehearsed. Prints their sections. Returns the exit code."""
    from statistics import median

    from tools.bench.measure import Measured
    from tools.bench.official import whole_images
    rows, networks, problems, end = {"GPU": [], "GPU equality": []}, {}, [], time.monotonic() + LIMIT
    for name, budget in BUDGETS.items():
        tell(f"{name}, at most {budget} seconds")
        found, problem = do(name, min(budget, max(end - time.monotonic(), 1)))
        for kind, value in found:
            rows[kind].append(value) if isinstance(value, Row) else networks.update({kind: value})
        problems += [f"{name}: {problem}"] * (problem is not None)
    measured = {name: Measured(*(value for key, value in found.items() if key != "peak"))
                for name, found in networks.items()}
    for n in BATCHES:
        try:
            rows["GPU"] += whole_images(measured, n, median(found["peak"] for found in networks.values()))
        except (KeyError, TypeError, ValueError):        # no figures: a part failed, or diffusers is not installed
            problems.append(f"a whole image, batch {n}: one of its networks was not measured next to diffusers")
    for section, of_section in rows.items():
        failed = "".join(f"\n- Not measured: {problem}" for problem in problems) if section == "GPU" else ""
        print(f"## {section}\n\n`python -m tools.gpu_check`, {machine(device)}.\n\n"
              f"{table(section, of_section)}{failed}\n", flush=True)
    differs = any("no" in verdict("GPU equality", row)[1] for row in rows["GPU equality"])
    return int(bool(problems) or differs)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.rehearse:
        return check_all(rehearsed, "cpu")
    import torch
    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use: run this where there is one, or add --rehearse")
    if args.part:
        for kind, value in part(args.part, sizes(rehearse=False)):
            print(json.dumps([kind, value]), flush=True)
        return 0
    return check_all(in_own_process, "cuda")


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
