"""What the command lines of all scripts share: the parser, and numbers that know their range.

  p.add_argument("--frames", type=FRAMES)   # argument --frames: expected a whole number from 2 to 1000, got '1'
  FRAMES.check("frames", frames)            # the same range for an argument in Python

A mistake is a UserError, in one line. Upper limits are far above any use: what is beyond is a typing error that would
take hours.
Needs: the standard library only, so that --help answers at once.
"""
import argparse
import contextlib
import math
import re
import sys
from dataclasses import dataclass
from numbers import Integral, Real

from loading.errors import UserError, nearest

# Options of diffusers' training scripts for Würstchen -> ours. docs/FINETUNE.md explains each.
FROM_DIFFUSERS = dict(
    pretrained_prior_model_name_or_path="weights", pretrained_decoder_model_name_or_path="weights",
    dataset_name="data", train_data_dir="data", max_train_samples="max-samples", validation_prompts="sample-prompt",
    validation_epochs="sample-every", output_dir="out", train_batch_size="batch", num_train_epochs="epochs",
    max_train_steps="steps",
    gradient_accumulation_steps="grad-accum", gradient_checkpointing="checkpointing", learning_rate="lr",
    lr_scheduler="schedule", lr_warmup_steps="warmup", snr_gamma="loss-weight", use_8bit_adam="adam-8bit",
    use_ema="ema", dataloader_num_workers="workers", adam_weight_decay="weight-decay", adam_epsilon="adam-eps",
    max_grad_norm="clip", hub_model_id="push-to-hub", mixed_precision="dtype", checkpointing_steps="save-every",
    checkpoints_total_limit="keep", resume_from_checkpoint="resume", noise_offset="offset-noise",
    tracker_project_name="project")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends the help of each option that takes a value with its default, unless the text has it already."""
    def _get_help_string(self, action):
        if "default" in action.help or action.required or not action.option_strings or action.nargs == 0:
            return action.help
        return f"{action.help} (default: {'none' if action.default in (None, '', []) else '%(default)s'})"


USED_MOST = ("data", "out", "weights", "lora", "steps", "lr", "batch", "resolution", "cache", "resume", "sample_prompt",
             "sample_every")          # what --help of a training script lists first


class Parser(argparse.ArgumentParser):
    """Shows the docstring of a script and all defaults in --help. A mistake is a UserError, with the nearest option."""
    def __init__(self, docstring: str = "", **more):
        super().__init__(description=docstring, formatter_class=HelpFormatter, **more)

    def parse_known_args(self, args=None, namespace=None):
        options = option_strings(self)
        # Before argparse finds that another one is missing. Subcommands have options of their own.
        for word in () if self._subparsers else sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if re.fullmatch(r"--\w[\w-]*", name) and not any(option.startswith(name) for option in options):
                theirs = FROM_DIFFUSERS.get(name[2:].replace("-", "_"))
                self.error(f"unrecognized arguments: {word}; " + (
                    f"--{theirs} is what diffusers' option is called here, see docs/FINETUNE.md"
                    if f"--{theirs}" in options else nearest_option(self, name)))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:       # argparse would print its usage as well
        raise UserError(message)

    def format_help(self) -> str:
        """For training scripts: a usage of one line, and the everyday options first."""
        if any(action.dest == "data" for action in self._actions):
            first = self.add_argument_group("used most")
            first._group_actions = sorted((action for action in self._actions if action.dest in USED_MOST),
                                          key=lambda action: USED_MOST.index(action.dest))
            for group in self._action_groups[:-1]:
                group._group_actions = [a for a in group._group_actions if a.dest not in USED_MOST]
            self._action_groups.insert(1, self._action_groups.pop())
            self.usage = "python %(prog)s --data DATA --out OUT [options]"
        return super().format_help()


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def nearest_option(parser: argparse.ArgumentParser, unknown: str) -> str:
    """A hint for an option that `parser` does not have: the one that was probably meant."""
    name = unknown.partition("=")[0].replace("_", "-")
    return nearest(name, option_strings(parser)) or "--help lists all options"


# ----- numbers -------------------------------------------------------------------------------------------------------

class NumberError(UserError, argparse.ArgumentTypeError):
    """Its message is what argparse shows after the name of the option."""


@dataclass(frozen=True)
class Number:
    """A range of numbers. Called with a text, as `type` of an option, it reads one.

    whole: whole numbers only; step: only multiples of it; above, below: without `low`, without `high` itself. A range
    that is not stated is that of float32.
    """
    low: float = -1e38
    high: float = 1e38
    whole: bool = False
    step: int = 1
    unit: str = ""
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        kind = f"a multiple of {self.step}" if self.step > 1 else "a whole number" if self.whole else \
            "a number such as 0.5 or 2/3,"
        low = f"{' above' if self.above else ' from'} {self.low}" * (self.low > -1e38)
        high = f" to{' below' * self.below} {self.high}" * (self.high < 1e38)
        return f"{kind}{self.unit}{low}{high}".rstrip(",")

    def __contains__(self, value) -> bool:       # false for NaN
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high) and (not self.whole or value % self.step == 0)

    def __call__(self, text: str) -> float:
        """Not int() and Fraction(), which also take 1_000, and forever for 1e-999999999."""
        text = text.strip()
        value, (top, slash, bottom) = math.nan, text.partition("/")
        with contextlib.suppress(ValueError, ArithmeticError):
            if re.fullmatch("[+-]?[0-9]{1,20}" if self.whole else "[-+.0-9eE]+/?[.0-9]*", text):
                value = int(text) if self.whole else float(top) / (float(bottom) if slash else 1)
        if value not in self:
            raise NumberError(f"expected {self}, got {text!r:.80}")
        return value

    def check(self, name: str, value) -> float:
        """An argument in Python -> the number. Raises TypeError or ValueError."""
        value = plain(value)
        if not isinstance(value, Integral if self.whole else Real):
            raise TypeError(f"{name} is {value!r:.80}, expected {self}.")
        if value not in self:
            raise UserError(f"{name} is {value!r:.80}, expected {self}.")
        return int(value) if self.whole else value


def plain(value):
    """A single number of numpy or torch -> Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def integer(low: int, high: int = 10 ** 9, step: int = 1, unit: str = "") -> Number:
    return Number(low, high, True, step, unit)


positive_int, unit_float, below_one = integer(1), Number(0, 1), Number(0, 1, below=True)
SEED = integer(0, 2 ** 32 - 1)
IMAGES, BATCH = integer(1, 10_000), integer(1, 10_000)               # of a prompt; at a time
SIDE = integer(64, 2 ** 14, unit=" of px")       # of a generated image, see wuerstchen.latent_sizes
STEPS, FRAMES, CELLS = integer(1, 10_000), integer(2, 1_000), 1_000  # of sampling; of an interpolation; of a grid
RESOLUTION = integer(128, 2 ** 12, 128)          # px of images that Stages B and C are trained on
