"""Command-line options that the training scripts share, each declared once. What differs is an argument.

A script adds its own options to the groups that it gets back.
Needs: the standard library only, so that --help answers at once.
"""
import math

from loading.errors import UserError

LEAST = dict(steps=1, batch=1, grad_accum=1, lr=0, warmup=0, weight_decay=0, clip=0, max_bad_steps=1, workers=0,
             save_every=1, keep=1, log_every=1, val_every=0, val_count=1, sample_every=0, seed=0)


def add_data_options(p, default: str | None = None, what: str = "", crop: str | None = "center", captions: bool = True,
                     cache: str | None = None):
    """--data and how an image becomes a sample. Returns the group, to which the script adds --resolution.

    default: of --data, which is required without one; what: added to its help. captions: the script uses captions and
    sorts images into buckets by shape. cache: what --cache keeps; None: there is no such option.
    """
    g = p.add_argument_group("data")
    g.add_argument("--data", default=default, required=default is None,
                   help="a folder of images with captions in NAME.txt or metadata.jsonl/.csv; tar shards, "
                        "'a/{000..031}.tar'; FILE.parquet; hub:NAME; scenes:OBJECTS:NUMBER:SEED; see training/data.py"
                        + what)
    if captions:
        g.add_argument("--max-ratio", type=float, default=2.0,
                       help="widest shape of the buckets that images are sorted into; 1: all are cropped to squares")
    g.add_argument("--crop", choices=["center", "random"], default=crop,
                   help="the part of an image that is kept if its shape is not that of its bucket (default: "
                        f"{crop or 'random'})")
    g.add_argument("--random-flip", action="store_true",
                   help="mirror half of the images; not for data where left and right matter")
    if captions:
        g.add_argument("--caption-dropout", type=float, default=0.05,
                       help="share of captions that are replaced by the empty one, each drawn separately")
    g.add_argument("--filter", action="append", default=[], metavar="min_KEY=NUMBER",
                   help="keep only samples whose .json has KEY of at least (min_) or at most (max_) a number")
    if cache:
        g.add_argument("--cache", help=f"folder for {cache}, computed once and shared between runs")
        g.add_argument("--cache-dtype", choices=["fp16", "fp32"], default="fp16", help="dtype in which they are kept")
    g.add_argument("--workers", type=int, default=2, help="processes that read images")
    return g


def add_schedule_options(g, steps: int, lr: float | None, schedule: str, warmup: int, lr_note: str = "") -> None:
    """--steps, --lr, --schedule and --warmup. lr_note: added to the help of --lr."""
    g.add_argument("--steps", type=int, default=steps, help="optimizer steps in total, resumed ones included")
    g.add_argument("--lr", type=float, default=lr, help=f"peak learning rate{lr_note}")
    g.add_argument("--schedule", choices=["constant", "cosine", "linear", "trapezoid"], default=schedule,
                   help="course of the learning rate after the warm-up; trapezoid: it falls in the last fifth")
    g.add_argument("--warmup", type=int, default=warmup, help="optimizer steps in which the learning rate rises")


def add_optimization_options(p, *, steps: int, batch: int | None, lr: float | None, schedule: str, warmup: int,
                             weight_decay: float, ema: float | None, batch_note: str = "", lr_note: str = "",
                             decay_note: str = "not for norms and biases", ema_note: str = "", large: bool = True,
                             title: str = "optimization"):
    """Optimizer steps, batch, precision, processes. *_note: added to the help of an option whose default is None.

    large: the script also has --compile and --fsdp. Returns the group.
    """
    g = p.add_argument_group(title)
    add_schedule_options(g, steps, lr, schedule, warmup, lr_note)
    g.add_argument("--batch", type=int, default=batch,
                   help="images per process and forward pass; if memory runs out, halve it and double --grad-accum"
                        + batch_note)
    g.add_argument("--grad-accum", type=int, default=1,
                   help="forward passes per optimizer step; the effective batch is batch x grad-accum x processes")
    g.add_argument("--weight-decay", type=float, default=weight_decay, help=f"of AdamW; {decay_note}")
    g.add_argument("--clip", type=float, default=1.0,
                   help="norm of the gradient, over all processes, above which it is scaled down; 0: never")
    g.add_argument("--ema", type=float, default=ema,
                   help=f"decay of the averaged weights, which are the ones kept; 0: no averaging{ema_note}")
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16"],
                   help="dtype of autocast (default: bf16 on a GPU, else fp32)")
    if large:
        g.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
        g.add_argument("--fsdp", action="store_true",
                       help="split weights and optimizer over the processes, for models that do not fit on one GPU")
    g.add_argument("--max-bad-steps", type=int, default=10,
                   help="stop after this many steps in a row whose loss or gradient is NaN or infinite")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if available)")
    g.add_argument("--seed", type=int, default=0, help="seed of everything random")
    return g


def add_checkpoint_options(g, save_every: int, keep: int = 2) -> None:
    """--resume, --save-every and --keep."""
    g.add_argument("--resume", help="auto: from the newest checkpoint in --out, if there is one; or a file")
    g.add_argument("--save-every", type=int, default=save_every,
                   help="steps between checkpoints; SIGTERM and Ctrl-C save one as well")
    g.add_argument("--keep", type=int, default=keep, help="number of checkpoints to keep")


def add_output_options(p, *, result: str, save_every: int, log_every: int, val_every: int, val_count: int,
                       sample_every: int, samples: str, val_note: str = "", val_data: str = ""):
    """--out, checkpoints, log, validation, samples. Returns the group.

    result: what is in --out in the end; samples: what --sample-every makes; val_note, val_data: added to the help of
    --val-count and --val-data.
    """
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True,
                   help=f"folder for checkpoints/, samples/, log.jsonl, curves.png and, in the end, {result}")
    add_checkpoint_options(g, save_every)
    g.add_argument("--log-every", type=int, default=log_every, help="steps between lines of log.jsonl")
    g.add_argument("--val-every", type=int, default=val_every, help="steps between validations; 0: none")
    g.add_argument("--val-data", help="images to validate on, as for --data (default: some of --data, which then show "
                                      f"how well it is fitted{val_data})")
    g.add_argument("--val-count", type=int, default=val_count, help=f"images in a validation{val_note}")
    g.add_argument("--sample-every", type=int, default=sample_every,
                   help=f"steps between {samples}, step 0 included; 0: none")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="also log to this service, if it is installed")
    g.add_argument("--dry-run", action="store_true",
                   help="print what would be trained on what, with memory and the first captions, and stop")
    g.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository of the Hugging Face hub")
    return g


# ----- checks -----------------------------------------------------------------------------------------

def check_at_least(args, **least: float) -> None:
    """Raises UserError for options below their least value: those of LEAST that args has, and those given here. NaN and
    infinity are refused as well. Options that are None are not checked."""
    for name, low in (LEAST | least).items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {low}"
                            f"{' and a finite number' if not math.isfinite(value) else ''}")


def check_shares(args, *names: str) -> None:
    """Raises UserError for options that are not in [0, 1). Options that are None are not checked."""
    for name in names:
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number from 0 to below 1")
