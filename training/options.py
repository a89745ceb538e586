"""Command-line options that the training scripts share. The functions' arguments set what differs between the scripts.

A script creates a Parser, calls these functions and adds its own options to the groups that they return.
Needs: the standard library only, so that --help answers at once.
"""
import importlib

from loading.errors import UserError
from loading.files import check_folder
from loading.options import BATCH, SEED, Number, below_one, integer, positive_int

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "trapezoid")

def add_data_options(p, default: str | None = None, what: str = "", crop: str | None = "center", captions: bool = True,
                     cache: str | None = None):
    """Adds --data and the options for images and captions. Returns the group, to which the script adds --resolution.

    default: default of --data; if it is None, --data is required. what: text added to the help of --data. crop: default
    of --crop. captions: whether the script uses captions and buckets. cache: what --cache stores; None: no --cache.
    """
    g = p.add_argument_group("data")
    g.add_argument("--data", default=default, required=default is None,
                   help="a folder of images with captions in NAME.txt or metadata.jsonl/.csv; tar shards, "
                        "'a/{000..031}.tar'; FILE.parquet; a folder of datasets' save_to_disk; hub:NAME[:SPLIT]; "
                        "scenes:OBJECTS:NUMBER:SEED; see training/data.py"
                        + what)
    if captions:
        g.add_argument("--max-ratio", type=Number(1, 100), default=2.0,
                       help="widest shape of the buckets that images are sorted into; 1: all are cropped to squares")
    g.add_argument("--max-samples", type=positive_int,
                   help="use only so many images, drawn by --seed, to try something out (default: all)")
    g.add_argument("--crop", choices=["center", "random"], default=crop,
                   help="the part of an image that is kept if its shape is not that of its bucket (default: "
                        f"{crop or 'random'})")
    g.add_argument("--random-flip", action="store_true",
                   help="mirror half of the images; not for data where left and right matter")
    if captions:
        g.add_argument("--caption-dropout", type=below_one, default=0.05,
                       help="share of captions that are replaced by the empty one, each drawn separately")
        g.add_argument("--caption-column", metavar="NAME",
                       help="column of a table, or key of metadata and .json, with the captions (default: the first "
                            "of text, caption, captions, prompt, prompts, description, txt)")
    g.add_argument("--image-column", metavar="NAME",
                   help="column of a table with the images (default: image or another usual name, or the only one); "
                        "for a folder with metadata, the key of the file names (default: file_name)")
    g.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset of the Hub")
    g.add_argument("--filter", action="append", default=[], metavar="min_KEY=NUMBER",
                   help="keep only samples whose .json has KEY of at least (min_) or at most (max_) a number")
    if cache:
        g.add_argument("--cache", help=f"folder for {cache}, computed once and shared between runs")
        g.add_argument("--cache-dtype", choices=["fp16", "fp32"], default="fp16", help="dtype in which they are kept")
    g.add_argument("--workers", type=integer(0, 1024), help="processes that read images (default: 2; with GPUs, as "
                   "many as there are cores per GPU, less one, up to 8)")
    return g


def add_schedule_options(g, steps: int, lr: float | None, schedule: str, warmup: int, lr_note: str = "",
                         epochs: bool = False) -> None:
    """Adds options for the learning rate, --steps and, if `epochs`, --epochs. lr_note: text for the help of --lr."""
    length = g.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive_int, default=steps,
                        help="optimizer steps in total, resumed ones included")
    if epochs:
        length.add_argument("--epochs", type=integer(1, 10 ** 6),
                            help="instead of --steps: how often each image is seen")
    g.add_argument("--lr", type=Number(0), default=lr, help=f"peak learning rate{lr_note}")
    g.add_argument("--schedule", choices=SCHEDULES, default=schedule,
                   help="course of the learning rate after the warm-up; constant and constant_with_warmup are the "
                        "same; trapezoid: it falls in the last fifth")
    g.add_argument("--warmup", type=integer(0), default=warmup, help="optimizer steps in which the learning rate rises")
    g.add_argument("--lr-cycles", type=positive_int, default=1, help="cosines of cosine_with_restarts")
    g.add_argument("--lr-power", type=Number(0), default=1.0, help="exponent of polynomial; 1: linear")


def add_optimization_options(p, *, steps: int, batch: int | None, lr: float | None, schedule: str, warmup: int,
                             weight_decay: float, ema: float | None, beta2: float = 0.99, lr_note: str = "",
                             large: bool = True, title: str = "optimization", **notes: str):
    """Adds options for optimizer steps, batch, precision and processes. Returns the group.

    batch_note, ema_note, decay_note: for the help of --batch, --ema, --weight-decay. beta2: default of --adam-beta2.
    0.99 suits short runs from random weights, whose gradients shrink fast at the start. large: whether to add --compile
    and --fsdp."""
    g = p.add_argument_group(title)
    add_schedule_options(g, steps, lr, schedule, warmup, lr_note, epochs=True)
    g.add_argument("--batch", type=BATCH, default=batch,
                   help="images per process and forward pass; if memory runs out, halve it and double --grad-accum"
                        + notes.get("batch_note", ""))
    g.add_argument("--grad-accum", type=BATCH, default=1,
                   help="forward passes per optimizer step; the effective batch is batch x grad-accum x processes")
    g.add_argument("--weight-decay", type=Number(0), default=weight_decay, help="of AdamW; "
                   + notes.get("decay_note", "not for norms and biases"))
    g.add_argument("--adam-beta1", type=below_one, default=0.9, help="AdamW's decay of the mean gradient")
    g.add_argument("--adam-beta2", type=below_one, default=beta2, help="and of the mean squared gradient")
    g.add_argument("--adam-eps", type=Number(0, above=True), default=1e-8, help="AdamW's term against division by zero")
    g.add_argument("--adam-8bit", action="store_true", help="AdamW of the package bitsandbytes, whose state takes a "
                   "quarter of the memory; not tried on a GPU yet")
    g.add_argument("--clip", type=Number(0), default=1.0,
                   help="norm of the gradient, over all processes, above which it is scaled down; 0: never")
    g.add_argument("--ema", type=below_one, default=ema,
                   help="decay of the averaged weights, which are the ones kept; 0: no averaging"
                   + notes.get("ema_note", ""))
    g.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "auto"],
                   help="dtype of autocast; auto: bf16 where the device has instructions for it, also on a CPU "
                        "(default: bf16 on a GPU, else fp32)")
    g.add_argument("--allow-tf32", action="store_true", help="on a GPU, let float32 products and convolutions round "
                   "their inputs to 10 bits: faster, and no longer exact; not tried on a GPU yet")
    if large:
        g.add_argument("--compile", action="store_true", help="torch.compile for the blocks: minutes at the start, "
                       "then faster; not tried on a GPU yet")
        g.add_argument("--fsdp", action="store_true",
                       help="split weights and optimizer over the processes, for models that do not fit on one GPU; "
                       "not tried on GPUs yet")
    g.add_argument("--max-bad-steps", type=positive_int, default=10,
                   help="stop after this many steps in a row whose loss or gradient is NaN or infinite")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if available)")
    g.add_argument("--seed", type=SEED, default=0, help="seed of everything random")
    return g


def add_checkpoint_options(g, save_every: int, keep: int = 2) -> None:
    """Adds --resume, --save-every and --keep."""
    g.add_argument("--resume", help="auto, for the newest checkpoint in --out if there is one, or a file")
    g.add_argument("--save-every", type=positive_int, default=save_every,
                   help="steps between checkpoints; SIGTERM and Ctrl-C save one as well")
    g.add_argument("--keep", type=positive_int, default=keep, help="number of checkpoints to keep")


def add_output_options(p, *, result: str, save_every: int, log_every: int, val_every: int, val_count: int,
                       sample_every: int, samples: str, val_note: str = "", val_data: str = "", prompts: bool = False):
    """Adds options for --out, checkpoints, log, validation and samples. Returns the group.

    Texts for the help: `result` is what --out contains in the end, `samples` is what --sample-every makes. val_note and
    val_data are added to the help of --val-count and --val-data. prompts: whether samples are made from prompts.
    """
    g = p.add_argument_group("output")
    g.add_argument("--out", required=True,
                   help=f"folder for checkpoints/, samples/, log.jsonl, curves.png and, in the end, {result}")
    add_checkpoint_options(g, save_every)
    g.add_argument("--log-every", type=positive_int, default=log_every, help="steps between lines of log.jsonl")
    g.add_argument("--val-every", type=integer(0), default=val_every, help="steps between validations; 0: none")
    g.add_argument("--val-data", help="images to validate on, as for --data (default: some of --data, which then show "
                                      f"how well it is fitted{val_data})")
    g.add_argument("--val-count", type=integer(1, 10 ** 6), default=val_count, help=f"images in a validation{val_note}")
    g.add_argument("--sample-every", type=integer(0), default=sample_every,
                   help=f"steps between {samples}, step 0 included; 0: none")
    if prompts:
        g.add_argument("--sample-prompt", action="append", default=[],
                       help="a prompt of the sample sheets; may be repeated (default: four captions of the data)")
        g.add_argument("--sample-prompts", help="more of them: a text file with one per line; # begins a comment")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="also log to this service, with samples; a "
                   "package to install")
    g.add_argument("--project", default="wuerstchen", help="name of the project in wandb")
    g.add_argument("--dry-run", action="store_true",
                   help="print what would be trained on what, with memory and the first captions, and stop")
    g.add_argument("--push-to-hub", metavar="USER/NAME",
                   help="upload the result to this repository of the Hugging Face hub")
    g.add_argument("--hub-token", help="token for that; other users of the machine may see it, so `hf auth login` "
                                       "is better (default: that login, or HF_TOKEN)")
    return g


# ----- checks -----------------------------------------------------------------------------------------

def check_services(args) -> None:
    """Raises UserError if a package, token or repository is missing that the run needs only after minutes or at its
    end. Also raises UserError for options, shared by the three scripts, that cannot be used together."""
    if getattr(args, "cache", None):
        check_folder(args.cache)
    if args.adam_8bit and getattr(args, "fsdp", False):
        raise UserError("--adam-8bit cannot split its state over processes: remove it or --fsdp")
    for option, module, package in (("--report-to tensorboard", "torch.utils.tensorboard", "tensorboard"),
                                    ("--report-to wandb", "wandb", "wandb"),
                                    ("--adam-8bit", "bitsandbytes", "bitsandbytes"),
                                    ("--push-to-hub", "huggingface_hub", "huggingface_hub")):
        name, _, value = option.partition(" ")
        given = getattr(args, name[2:].replace("-", "_"))
        if given == value if value else given:
            try:
                importlib.import_module(module)
            except ImportError:
                raise UserError(f"{option} needs a package: pip install {package}") from None
    if args.push_to_hub:
        check_repository(args)
    if (getattr(args, "sample_prompt", []) or getattr(args, "sample_prompts", None)) and not args.sample_every:
        raise UserError("prompts of sample sheets need the number of steps between them: add --sample-every 500")


def check_repository(args) -> None:
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(args.push_to_hub)
        if args.push_to_hub.count("/") != 1:
            raise HFValidationError("the name of the user is missing")
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {args.push_to_hub} is not the name of a repository, expected USER/NAME: "
                        f"{' '.join(str(error).split())}") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the network, and HF_HUB_OFFLINE is set: remove one of them")
    if not (args.hub_token or get_token()):
        raise UserError("--push-to-hub needs a token: run `hf auth login`, set HF_TOKEN, or add --hub-token")
