"""The script for the day when there is a GPU, rehearsed on the CPU."""
import pytest

from loading.errors import UserError
from tools import gpu_check
from tools.bench.report import GOALS


def test_a_rehearsal_measures_everything_that_has_a_goal(capsys):
    """In sizes that mean nothing: what is tried on a GPU for the first time has run before."""
    pytest.importorskip("diffusers", reason="diffusers is what is compared with")
    code, text = gpu_check.main(["--rehearse"]), capsys.readouterr().out
    assert "ot measured" not in text and "nan" not in text
    for section in ("GPU", "GPU equality"):
        part = text.split(f"## {section}\n")[1].split("## ")[0]
        assert all(f"| {what} |" in part for of, what in GOALS if of == section), section
    assert all(f"| {what} |" in text for what in (
        "LoRA step, 128 px, batch 4", "full step, 128 px, batch 4", "Stage B step, compiled, next to eager",
        "Stage C step, compiled, 8 images", "Stage A decode, 8 images", "the host never waits within a sampling"))
    assert "| an image of 8, compiled, next to diffusers compiled |" not in text
    assert code == 0 and "at most 0.35" in text and "at most 0.4" in text


def test_a_part_that_fails_or_is_late_is_one_line_and_the_others_go_on(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUDGETS", dict(training=9, equality=9))

    def training(at):
        yield "GPU", gpu_check.Row("LoRA step", "1 s", "", float("nan"))
        raise RuntimeError("out of memory\nand 40 lines more")

    def equality(at):
        yield "GPU equality", gpu_check.Row("the small model's image, fp32", "9 of 255", "the CPU", 9.0)
    monkeypatch.setattr(gpu_check, "training", training)
    monkeypatch.setattr(gpu_check, "equality", equality)
    assert gpu_check.main(["--rehearse"]) == 1
    text = capsys.readouterr().out
    assert "- Not measured: training: out of memory\n" in text and "40 lines" not in text and "| LoRA step |" in text
    assert "| the small model's image, fp32 | 9 of 255 | the CPU | 9.00 | at most 0.5 | no |" in text
    assert gpu_check.in_own_process("training", 0.01) == ([], "not done in its 0 seconds")


def test_without_a_gpu_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU that torch can use: run this where there is one, or add "):
        gpu_check.main([])
    found, problem = gpu_check.in_own_process("equality", 100)
    assert found == [] and problem.startswith("error: there is no GPU that torch can use")
