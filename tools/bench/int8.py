"""Measures the size of int8 weights at official size, and how many more images of the tiny model are wrong in int8."""
import torch
from torch import nn

from speed.int8 import to_int8
from stage_b import StageB
from stage_c import StageC
from tiny import evaluate
from tools.bench.report import Row


def measure(args, seeds: int = 4) -> tuple[str, list[Row], str]:
    rows = [row_of_weights(title, stage) for title, stage in (("Stage C", StageC), ("Stage B", StageB))]
    facts = evaluate.fixed_prompts()
    plain, int8 = (sum(count_right(args.weights, form, 1000 * seed, facts) for seed in range(seeds))
                   for form in ([], ["--int8"]))
    n = seeds * len(facts)
    rows.append(Row("wrong instead of right, points", f"{int8 / n:.1%} right", f"{plain / n:.1%} right, float32",
                    100 * (plain - int8) / n, f"objects and places in {n} images"))
    return "Int8", rows, (f"Images: weights {args.weights}, default settings, the 256 prompts of tiny/evaluate.py, "
                          f"with {seeds} noises each.")


def row_of_weights(title: str, stage: type) -> Row:
    def size(model: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    with torch.device("meta"):
        model = stage()
    full = size(model)
    to_int8(model)
    return Row(f"weights of {title}", f"{size(model) / 1e6:.0f} MB", f"{full / 1e6:.0f} MB, float32",
               size(model) / full, "layers that resample, and small products, stay in float32")


def count_right(weights: str, options: list[str], seed: int, facts: list[dict]) -> float:
    args = evaluate.parse_args(["--weights", weights, "--seed", f"{seed}", *options])
    figures = evaluate.score(evaluate.sample(args, [fact["prompt"] for fact in facts]), facts)
    return sum(figures[kind]["right"] * figures[kind]["n"] for kind in ("single_object", "pair_seen", "pair_held_out"))
