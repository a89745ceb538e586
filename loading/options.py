"""Defines the command-line parser of all scripts, and types for numbers within a range.

  p.add_argument("--frames", type=FRAMES)   # argument --frames: expected a whole number from 2 to 1000, got '1'
  FRAMES.check("frames", frames)            # checks the same range for an argument in Python

An invalid value raises UserError, with one line. Upper limits are far above any real use. They reject typing errors
that could cost hours.
Needs: the standard library only, so that --help is fast.
"""
import argparse
import contextlib
import math
import re
import sys
from dataclasses import dataclass
from numbers import Integral, Real

from loading.errors import UserError, nearest

# {option of diffusers' training scripts for Würstchen: our option}. docs/FINETUNE.md explains each.
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
    """Adds the default value to the help text of each option that takes a value, unless the text mentions a default."""
    def _get_help_string(self, action):
        if "default" in action.help or action.required or not action.option_strings or action.nargs == 0:
            return action.help
        return f"{action.help} (default: {'none' if action.default in (None, '', []) else '%(default)s'})"


USED_MOST = ("data", "out", "weights", "lora", "steps", "lr", "batch", "resolution", "cache", "resume", "sample_prompt",
             "sample_every")          # listed first in --help of training scripts


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help shows `docstring` and all defaults, and whose errors suggest a similar option."""
    def __init__(self, docstring: str = "", **more):
        super().__init__(description=docstring, formatter_class=HelpFormatter, **more)

    def parse_known_args(self, args=None, namespace=None):
        options = option_strings(self)
        # Reports unknown options first, because argparse would report a misspelled required option only as missing.
        # Skips parsers with subcommands: they do not know the subcommands' options.
        for word in () if self._subparsers else sys.argv[1:] if args is None else args:
            name = word.partition("=")[0]
            if re.fullmatch(r"--\w[\w-]*", name) and not any(option.startswith(name) for option in options):
                theirs = FROM_DIFFUSERS.get(name[2:].replace("-", "_"))
                self.error(f"unrecognized arguments: {word}; " + (
                    f"--{theirs} is what diffusers' option is called here, see docs/FINETUNE.md"
                    if f"--{theirs}" in options else nearest_option(self, name)))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:       # replaces argparse's error(), which also prints the usage
        if option := re.fullmatch("argument (--[^/ ]*).*: expected one argument", message):
            message += f": {self._option_string_actions[option[1]].help}"
        raise UserError(message)

    def format_help(self) -> str:
        """Returns the text of --help. In training scripts, it starts with one line of usage and USED_MOST options."""
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
    """Returns a hint for the option `unknown`: the most similar option of `parser`, else the advice to use --help."""
    name = unknown.partition("=")[0].replace("_", "-")
    return nearest(name, option_strings(parser)) or "--help lists all options"


# ----- numbers -------------------------------------------------------------------------------------------------------

class NumberError(UserError, argparse.ArgumentTypeError):
    """The error for an invalid number. Because it is an ArgumentTypeError, argparse adds the option's name to it."""


@dataclass(frozen=True)
class Number:
    """A range of numbers from `low` to `high`. As `type` of an option, it converts a text to a number in this range.

    whole: only whole numbers. step: only multiples of step. above: excludes `low` itself. below: excludes `high`.
    The default limits are about those of float32. unit: a text for messages, such as " of px".
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

    def __contains__(self, value) -> bool:       # False for NaN
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high) and (not self.whole or value % self.step == 0)

    def __call__(self, text: str) -> float:
        """Converts a text to a number in this range, else raises NumberError. Checks a pattern first, because int() and
        float() also accept 1_000. Fraction() is not used, because it would take almost forever for 1e-999999999."""
        text = text.strip()
        value, (top, slash, bottom) = math.nan, text.partition("/")
        with contextlib.suppress(ValueError, ArithmeticError):
            if re.fullmatch("[+-]?[0-9]{1,20}" if self.whole else "[-+.0-9eE]+/?[.0-9]*", text):
                value = int(text) if self.whole else float(top) / (float(bottom) if slash else 1)
        if value not in self:
            raise NumberError(f"expected {self}, got {text!r:.80}")
        return value

    def check(self, name: str, value) -> float:
        """Returns `value` as a Python number. Raises TypeError, or UserError if out of range; both mention `name`."""
        value = plain(value)
        if not isinstance(value, Integral if self.whole else Real):
            raise TypeError(f"{name} is {value!r:.80}, expected {self}.")
        if value not in self:
            raise UserError(f"{name} is {value!r:.80}, expected {self}.")
        return int(value) if self.whole else value


def plain(value):
    """Converts a single number of numpy or torch to a Python number. Any other value is returned unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def integer(low: int, high: int = 10 ** 9, step: int = 1, unit: str = "") -> Number:
    return Number(low, high, True, step, unit)


positive_int, unit_float, below_one = integer(1), Number(0, 1), Number(0, 1, below=True)
SEED = integer(0, 2 ** 32 - 1)
IMAGES, BATCH = integer(1, 10_000), integer(1, 10_000)               # images per prompt; images per batch
SIDE = integer(64, 2 ** 14, unit=" of px")       # width or height of a generated image
STEPS, FRAMES, CELLS = integer(1, 10_000), integer(2, 1_000), 1_000  # sampling steps; interpolation frames; grid cells
RESOLUTION = integer(128, 2 ** 12, 128)          # px of training images for Stages B and C
