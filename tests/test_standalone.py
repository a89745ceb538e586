"""The stage files, wuerstchen.py, lora.py and int8.py each work when copied into another project alone; the blocks that
stage files copy from each other are the same."""
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stage_a
import stage_b
import stage_c

ROOT = Path(stage_a.__file__).parent

# A fresh interpreter that knows only torch, from which each script is forked: torch is imported once, not ten times.
FRESH = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    script, folder = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
# Runs in a folder that holds one stage file. What torch itself imports is known once torch has been imported; from then
# on, anything else that is not in the standard library is refused.
GUARD = """
import sys
import torch
allowed = set(sys.stdlib_module_names) | {name.partition(".")[0] for name in sys.modules}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed | {STAGE} | ALSO:
            raise ImportError(f"{STAGE}.py wants {name}")

assert not {"torchvision", "transformers", "diffusers", "safetensors"} & allowed
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, FOLDER)
"""
FORWARD = {
    "stage_a": "from stage_a import StageA\n"
               "m = StageA(2, 1, 8, 4, 16).eval()\n"
               "x = m(torch.rand(1, 3, 8, 12))['images']\n"
               "assert x.shape == m.decode(m.encode(x)).shape == (1, 3, 8, 12)\n",
    "stage_b": "from stage_b import StageB, TinyImageEncoder, preprocess\n"
               "m = StageB(4, 4, 8, 2, 8, (8, 12), (2, 3), (1, 1), ('CT', 'CTA'), (False, True), 16, 5).eval()\n"
               "semantic = TinyImageEncoder(c_hidden=(4, 4, 4, 4)).eval()(preprocess(torch.rand(1, 3, 128, 128), 96))\n"
               "x = m(torch.randn(1, 4, 8, 12), torch.rand(1), semantic, torch.randn(1, 3, 5))\n"
               "assert x.shape == (1, 4, 8, 12)\n",
    "stage_c": "from stage_c import StageC\n"
               "m = StageC(16, 16, 5, 8, 1, 2).eval()\n"
               "assert m(torch.randn(1, 16, 3, 5), torch.rand(1), torch.randn(1, 3, 5)).shape == (1, 16, 3, 5)\n",
    "lora": "from lora import add_lora, load_lora, lora_state_dict, merge, remove, unmerge\n"
            "m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv2d(2, 2, 3))\n"
            "add_lora(m, rank=2, targets='all'); s = lora_state_dict(m); remove(m)\n"
            "load_lora(m, s); merge(m); unmerge(m)\n",
    "int8": "from int8 import to_int8\n"
            "m = torch.nn.Sequential(torch.nn.Linear(64, 64)); x = torch.randn(3, 64); y = m(x)\n"
            "assert to_int8(m, 64) == ['0'] and (m(x) - y).abs().max() < 0.05\n",
    "wuerstchen": "from wuerstchen import Sampling, denoise\n"
                  "def predict(x, t, guided): return torch.cat([x] * (1 + guided))\n"
                  "x = denoise(predict, torch.randn(2, 3), lambda: torch.randn(2, 3), Sampling(3, guidance=2.0))\n"
                  "assert x.shape == (2, 3) and x.isfinite().all()\n",
}

PATHS = {"int8": "speed/int8"}
ALSO = {"wuerstchen": {"numpy", "PIL", "tqdm"}}            # what a file may import, besides torch


@pytest.fixture(scope="module")
def alone():
    """(script, folder) -> its exit code and what it wrote to stderr."""
    fresh = subprocess.Popen([sys.executable, "-I", "-c", FRESH], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)

    def run(script: str, folder: Path) -> tuple[int, str]:
        print(json.dumps([script, str(folder)]), file=fresh.stdin, flush=True)
        return int(fresh.stdout.readline()), (folder / "stderr").read_text()
    yield run
    fresh.communicate()


@pytest.mark.parametrize("stage", FORWARD)
def test_file_works_when_copied_alone(stage, tmp_path, alone):
    """Nothing of ours, nothing but torch and the standard library; for Stage B not even torchvision."""
    shutil.copy(ROOT / f"{PATHS.get(stage, stage)}.py", tmp_path / f"{stage}.py")
    script = f"STAGE, FOLDER, ALSO = {stage!r}, {str(tmp_path)!r}, {ALSO.get(stage, set())!r}\n{GUARD}{FORWARD[stage]}"
    code, errors = alone(script, tmp_path)
    assert code == 0, errors


@pytest.mark.parametrize("stage, name, part", [("stage_a", "StageA", "vqgan"), ("stage_b", "StageB", "decoder"),
                                               ("stage_c", "StageC", "prior")])
def test_a_copied_stage_is_filled_as_its_header_says(stage, name, part, tmp_path, alone):
    """Converted once to our names, the released weights need only torch and safetensors: config.json has the
    constructor's arguments. The outputs are those of the weights loaded by this repository."""
    from loading.weights import load
    from tools.weights import convert
    header = next(line for line in inspect.getdoc(sys.modules[stage]).splitlines() if "tools.weights" in line)
    assert header.startswith("Weights: ") and "--to ours" in header
    convert(ROOT / "models" / "tiny" / part, tmp_path / "new", "ours")
    shutil.copy(ROOT / f"{stage}.py", tmp_path)
    script = f"""import json, sys
sys.path.insert(0, {str(tmp_path)!r})
import torch
from safetensors.torch import load_file
from {stage} import {name}
model = {name}(**json.load(open("new/config.json")))
model.load_state_dict(load_file("new/diffusion_pytorch_model.safetensors"))
assert not {{"loading", "numpy.testing", "transformers"}} & sys.modules.keys()
torch.save(model.state_dict(), "filled.pt")
"""
    code, errors = alone(script, tmp_path)
    assert code == 0, errors
    wanted = load(getattr(sys.modules[stage], name), ROOT / "models" / "tiny" / part).state_dict()
    filled = torch.load(tmp_path / "filled.pt")
    assert filled.keys() == wanted.keys() and all(torch.equal(filled[key], wanted[key]) for key in wanted)


def test_stage_b_needs_torchvision_only_for_efficientnet(tmp_path, alone):
    """And the guard of the test above works: the same import is refused there."""
    shutil.copy(ROOT / "stage_b.py", tmp_path)
    script = f"STAGE, FOLDER, ALSO = 'stage_b', {str(tmp_path)!r}, set()\n{GUARD}" \
             "from stage_b import EfficientNetEncoder\nEfficientNetEncoder()\n"
    assert "ImportError: stage_b.py wants torchvision" in alone(script, tmp_path)[1]


def definitions(module) -> dict:
    """The functions and classes written in a file, not those it imports."""
    return {name: thing for name, thing in vars(module).items()
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module.__name__}


STAGES = [definitions(module) for module in (stage_a, stage_b, stage_c)]
COPIED = sorted(name for name in set().union(*STAGES) if sum(name in stage for stage in STAGES) > 1)


@pytest.mark.parametrize("name", COPIED)
def test_copied_blocks_have_not_drifted(name):
    """Each stage file must work alone, so it carries its own copy; the copies must be identical, comments included.

    A class that has to differ gets another name. New copies are found by themselves.
    """
    sources = {inspect.getsource(stage[name]) for stage in STAGES if name in stage}
    assert len(sources) == 1, f"{name} differs between stage_a.py, stage_b.py and stage_c.py"


def test_the_known_copies_are_found():
    """Guards the test above: a search that finds nothing would pass."""
    assert {"channels_first", "channels_last", "layer_norm", "timestep_embedding", "GlobalResponseNorm", "ResBlock",
            "TimestepBlock", "AttentionBlock"} <= set(COPIED)
