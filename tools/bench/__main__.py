"""Measures this code on this machine, next to something it can be compared with, and writes BENCHMARKS.md.

  python -m tools.bench                                  # the bundled weights: start and networks, a few minutes
  python -m tools.bench --repeats 9 --skip-start         # only the networks
  python -m tools.bench --weights PATH --side 128        # other weights, images smaller than their default
  python -m tools.bench --official                       # steps at official size and 1024 px, random weights; 9 GB, half
                                                         # an hour on 2 cores; on a GPU bfloat16 and 1, 4, 8 images
  python -m tools.bench --official --no-compile          # without torch.compile, which needs a C++ compiler on a CPU
  python -m tools.bench --official --plain               # also the networks as the stage files have them
  python -m tools.bench --memory                         # memory at official size; 7 GB of disk, some minutes
  python -m tools.bench --training --repeats 1           # training steps at official size and 512 px; 12 GB of memory,
                                                         # 10 minutes for the LoRA alone
  python -m tools.bench --training --side 1024 --batch 1 --depth 8 --repeats 1       # at 1024 px, a quarter of the blocks
  python -m tools.bench --epoch --repeats 1              # an epoch with --cache, and reading files; 13 GB, 4 minutes
  python -m tools.bench --int8                           # memory saved and images got wrong by int8; 10 minutes

start      from `python sample.py` to the image on disk, next to a Python that only imports torch and transformers' CLIP,
           the lower bound for any program that uses both; and `--help`
networks   one step of Stage C (guided: two rows), one of Stage B (one row), one decoding by Stage A, next to diffusers
           with the same weights and inputs, if it is installed; and 16 images in one batch
official   the same calls at official size, also compiled and in int8; and how much of the time matrix products and
           attention take by themselves
memory     peak memory in a process of its own: loading Stage C, and a whole image with low_memory=True, two steps each,
           next to the size of what is loaded. On a CPU this includes pages of files
training   steps (forward, backward, clip, AdamW) of a LoRA and of all of Stage C, next to diffusers, with peft, from the
           same weights and inputs
epoch      200 images of 768 px, added up from a LoRA's step at official size, the encoders and reading
int8       weights at official size, and what tiny/evaluate.py finds right in 4 x 256 images, next to float32 with the
           same noise

Our networks run as `Wuerstchen.load` sets them up by default, in their fast form (speed/fast.py).
Whatever is compared runs in turns, A B A B ..., so that a slow phase of the machine slows both. Times are medians; a
ratio is the median of the ratios of neighbouring runs. Each command replaces only its own sections of the file.
Operations are those that torch counts in products and convolutions. The peak is the speed of one large matrix product in
the same dtype, measured in turns with the rest. Nothing is asserted: a figure belongs to its machine.
Needs: what wuerstchen.py needs; diffusers and peft for the comparisons.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("error: run the benchmark from the repository's folder as: python -m tools.bench")

import argparse
import sys
from pathlib import Path

from tools.bench.report import DTYPES, FILE, write


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="tiny",
                   help="\"tiny\", which ships with the code, or a folder of weights (default: tiny)")
    p.add_argument("--side", type=int, help="side of the square image in px (default: the weights' own size)")
    p.add_argument("--repeats", type=int, default=5,
                   help="runs of everything, of which the median counts; raise it if figures jump (default: 5)")
    p.add_argument("--calls", type=int, default=10,
                   help="calls of a network per run; lower it for large weights (default: 10)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one, else cpu)")
    p.add_argument("--plain", action="store_true",
                   help="also measure the networks in their plain form, as the stage files have them")
    p.add_argument("--official", action="store_true",
                   help="measure networks of official size, with random weights, instead of --weights")
    p.add_argument("--dtype", choices=DTYPES, help="dtype for --official (default: bf16 on a GPU, else fp32)")
    p.add_argument("--pictures", type=int, nargs="+", help="for --official: images per batch; several numbers are "
                   "measured one after another (default: 1, on a GPU 1 4 8)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="for --official: also measure Stages B and C under torch.compile (default: yes)")
    p.add_argument("--memory", action="store_true",
                   help="measure memory instead of time: random weights of official size (Linux only)")
    p.add_argument("--training", action="store_true",
                   help="measure training steps instead of sampling: random weights of official size (Linux only)")
    p.add_argument("--epoch", action="store_true",
                   help="measure an epoch of training with and without a cache, and reading its images")
    p.add_argument("--int8", action="store_true", help="measure what int8 saves and costs, instead of time")
    p.add_argument("--batch", type=int, default=4, help="images per training step (default: 4)")
    p.add_argument("--depth", type=int, default=32,
                   help="blocks of Stage C in --official and --training, and of Stage B in proportion; lower it if "
                   "memory or time is short (default: 32, the official depth)")
    p.add_argument("--out", type=Path, default=FILE, help="file whose sections are replaced (default: BENCHMARKS.md)")
    p.add_argument("--skip-start", action="store_true", help="do not measure program starts, which take longest")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.typed = sys.argv[1:] if argv is None else list(argv)
    import torch                                         # only now, so that --help answers at once
    from tools.bench import epoch, int8, memory, networks, official, start, training
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        questions = [memory]
    elif args.training:
        questions = [training]
    elif args.epoch:
        questions = [epoch]
    elif args.int8:
        questions = [int8]
    elif args.official:
        questions = [official]
    else:
        questions = [networks] if args.skip_start else [start, networks]
    for question in questions:
        write(args, *question.measure(args))


if __name__ == "__main__":
    main()
