"""Measures this code on this machine, compares it with other code, and writes BENCHMARKS.md.

  python -m tools.bench                                  # the bundled weights: start and networks, a few minutes
  python -m tools.bench --official                       # official size; 9 GB; 30 min on 2 cores, less by --no-compile
  python -m tools.bench --memory                         # 7 GB of disk, some minutes
  python -m tools.bench --training --repeats 1           # 12 GB of memory; its LoRA part takes 10 minutes
  python -m tools.bench --training --side 1024 --batch 1 --depth 8 --repeats 1     # a quarter of the blocks
  python -m tools.bench --epoch --repeats 1              # 13 GB, 4 minutes
  python -m tools.bench --int8                           # 10 minutes

start      the time from `python sample.py` to the image on disk, compared with a Python process that only imports
           torch and tokenizers, the lower bound for any program that uses both; and the time of `--help`
networks   one step of Stage C (guided: batch 2), one of Stage B (batch 1) and one decoding by Stage A, compared with
           diffusers, if it is installed, with the same weights and inputs; and 16 images in one batch

Our networks run as `Wuerstchen.load` sets them up by default, in their fast form (speed/fast.py).
Compared calls run in turns, A B A B ..., so that a slow phase of the machine slows both. Times are medians. A ratio is
ours / theirs, the median over pairs of neighbouring runs; below 1, ours is faster or needs less memory. The floor is
the share of our time that matrix products and attention take by themselves. The tables also give GFLOP, the operations
that torch counts in products and convolutions, and the speed as a share of the peak, which is the speed of one large
matrix product in the same dtype, measured in turns with the networks. A command replaces only its own sections of the
file. No test checks the figures, because they depend on the machine.
Needs: what wuerstchen.py needs; diffusers and peft for the comparisons.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.path[0] += "/../.."      # so that `python tools/bench` finds our modules

import argparse
from pathlib import Path

from loading.errors import exit_on_user_error
from loading.files import check_folder
from loading.options import BATCH, IMAGES, SIDE, Parser, integer
from tools.bench.report import DTYPES, FILE, write

QUESTIONS = {
    "memory": "peak memory at official size (Linux): of loading Stage C, and of a whole image with low_memory=True, "
              "two steps each; next to the size of what is loaded. On a CPU this includes pages of files",
    "training": "training steps (forward, backward, clip, AdamW) of a LoRA and of all of Stage C at official size and "
                "512 px, next to diffusers and peft with the same weights and inputs (Linux)",
    "epoch": "an epoch, 200 images of 768 px, with and without --cache, added up from a LoRA's step at official size "
             "and the encoders; and whether two workers read fast enough",
    "int8": "the weights at official size in int8, and how many of 4 x 256 images tiny/evaluate.py finds right, next "
            "to float32 with the same noise",
    "official": "networks of official size with random weights at 1024 px; also compiled, in bfloat16 and in int8; and "
                "how much of the time matrix products and attention take by themselves",
}


def parse_args(argv=None):
    p = Parser(__doc__, prog="python -m tools.bench")
    g = p.add_argument_group("what is measured instead of start and networks")
    for name, text in QUESTIONS.items():
        g.add_argument(f"--{name}", action="store_true", help=text)
    g.add_argument("--skip-start", action="store_true", help="do not measure program starts, which take longest")
    g.add_argument("--plain", action="store_true", help="also measure networks in plain form, as in the stage files")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="for --official: also measure Stages B and C under torch.compile (default: yes)")
    g = p.add_argument_group("how")
    g.add_argument("--weights", default="tiny", help="tiny, which ships with the code, or a folder")
    g.add_argument("--side", type=SIDE, help="side of the square image in px (default: the weights' own size)")
    g.add_argument("--repeats", type=IMAGES, default=5, help="runs of everything; raise it if figures jump")
    g.add_argument("--calls", type=IMAGES, default=10, help="calls per run; lower it for large weights")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one, else cpu)")
    g.add_argument("--dtype", choices=DTYPES, help="dtype for --official (default: bf16 on a GPU, else fp32)")
    g.add_argument("--pictures", type=IMAGES, nargs="+",
                   help="for --official: images per batch, one or several numbers (default: 1, on a GPU 1 4 8)")
    g.add_argument("--batch", type=BATCH, default=4, help="images per training step")
    g.add_argument("--depth", type=integer(1, 100), default=32,
                   help="blocks of Stage C in --official and --training, and of Stage B in proportion; lower it if "
                        "memory or time is short (default: 32, the official depth)")
    g.add_argument("--out", type=Path, default=FILE, help="file whose sections are replaced (default: BENCHMARKS.md)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.typed = sys.argv[1:] if argv is None else list(argv)
    check_folder(args.out.parent, args.out)
    from loading.arguments import usable_device          # imported here, so that --help is fast
    from tools.bench import int8, memory, networks, official, start, training
    args.device = str(usable_device(args.device))
    answers = dict(memory=memory.measure, training=training.measure, epoch=training.measure_epoch, int8=int8.measure,
                   official=official.measure)
    chosen = [answers[name] for name in QUESTIONS if getattr(args, name)]
    for measure in chosen or [start.measure, networks.measure][args.skip_start:]:
        write(args, *measure(args))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
