"""Everything that a GPU would run, on the pretend one of pretend_cuda.py: nothing is on the wrong device, and inside
the loops the host waits only for what is listed here. Nothing here has seen a real GPU.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "pretend_cuda.py"
SCENARIOS = ("text_to_image", "image_to_image", "inpainting", "v1", "train_a", "train_b", "train_c", "autocast")
NO_WAITING = "asynchronous copy to cuda"

# A whole sampling by Stages C and B: the noise levels travel once, and in the end all numbers are checked to be finite.
CONTINUOUS = {"blocking copy to cuda wuerstchen.py:denoise": 2,
              "sync: _local_scalar_dense wuerstchen.py:check_finite": 2}
WAITS = dict(
    text_to_image=CONTINUOUS, image_to_image=CONTINUOUS, inpainting=CONTINUOUS,
    v1={place: 1 for place in (*CONTINUOUS, "blocking copy to cuda v1/sampling.py:sample",
                               "sync: _local_scalar_dense v1/sampling.py:sample")})
# Two steps, and one line of the log: the loss, losses by level, the gradient's norm, and which steps were bad.
LOG_LINE = {f"sync: {what}": 1 for what in ("_local_scalar_dense training/report.py:values",
                                            "tolist training/report.py:values", "tolist training/optim.py:look")}
WAITS |= {f"train_{x}": LOG_LINE | {f"sync: _local_scalar_dense train_{x}.py:main": 1} for x in "abc"}
WAITS["train_a"] |= {"sync: tolist train_a.py:main": 1, "sync: _local_scalar_dense training/codebook.py:used": 2}


@pytest.fixture(scope="module")
def waits(tmp_path_factory) -> dict[str, dict]:
    """Scenario -> {what the host waited for, with its place: how often}."""
    run = subprocess.run([sys.executable, SCRIPT, tmp_path_factory.mktemp("runs"), *SCENARIOS], capture_output=True,
                         text=True, cwd=SCRIPT.parent.parent)
    if "has changed under the pretend device" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr[-3000:]
    found = {name: {} for name in SCENARIOS}
    for name, kind, place, count in json.loads(run.stdout.splitlines()[-2]):
        found[name][f"{kind} {place}"] = count
    return found


def test_under_autocast_wide_activations_stay_in_half_precision(waits):
    """Of a ResBlock and an AttentionBlock. Float32 are the inputs of norms, the residual stream, and the pretend
    attention inside (its softmax, bmm, mul and three casts). To bfloat16 go the inputs of the convolution, of `expand`,
    of query, key and value together, and what attention returns."""
    assert waits["autocast"] == {
        "_to_copy torch.bfloat16": 4, "_to_copy torch.float32": 4, "add torch.float32": 2, "_softmax torch.float32": 1,
        "bmm torch.float32": 2, "mul torch.float32": 1}


@pytest.mark.parametrize("name", SCENARIOS[:-1])
def test_the_host_waits_only_for_what_is_listed(waits, name):
    assert any(what.startswith(NO_WAITING) for what in waits[name])        # noise, batches: something does travel
    assert {what: n for what, n in waits[name].items() if not what.startswith(NO_WAITING)} == WAITS[name]
