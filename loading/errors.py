"""Errors a user can repair. Each ends a script with one line on stderr instead of a traceback.

A UserError says what was wrong, what was expected and what to do. Any other exception except OSError is
a bug of ours and keeps its traceback. A WeightsError is a UserError about a file or folder of weights.
Surprise: file names, keys and captions come from strangers, and a terminal obeys some characters in them. So all
messages are `printable`: errors by themselves, others through `tell` and `warn`.
Needs: the standard library only, so that `--help` stays fast.
"""
import contextlib
import difflib
import functools
import signal
import sys
import warnings
from collections.abc import Iterable

RESUME_HINT = "--resume auto continues from the last checkpoint"
MEMORY_HINT = "halve --batch and double --grad-accum"


class UserError(ValueError):
    """The user can repair this. Its message is the one line that is shown."""
    def __str__(self) -> str:
        return printable(super().__str__())


class WeightsError(UserError):
    """A file or folder of weights that cannot be used. The message says what was expected."""


def printable(text: str) -> str:
    """text without what a terminal would obey: control characters from a stranger's file as \\x1b, \\n, ..."""
    text = str(text)
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell(message: str) -> None:
    """One line for the user, on stderr. Everything that is printed there comes through here."""
    with contextlib.suppress(OSError):               # stderr goes to a file on a full disk
        print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A warning, also for those who call us from Python."""
    warnings.warn(printable(message), stacklevel=3)


@contextlib.contextmanager
def as_user_error():
    """Turns each ValueError raised inside into a UserError. For calls that check the user's own values."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def memory_ran_out(error: Exception) -> bool:
    """Whether that is what an exception means: each library has its own. The last: a reader whom the system killed."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED",
                                          "is killed by signal"))


@contextlib.contextmanager
def exit_on_user_error(hint: str | None = None, memory: str = "close other programs, or use a larger machine"):
    """Runs a whole script: a UserError, an OSError or a lack of memory ends it with one line and exit code 2, Ctrl-C
    with code 130, SIGTERM with 143. Warnings are one line each, and each is shown once.

    hint: what to do after Ctrl-C, for example RESUME_HINT. memory: what to do if it runs out.
    """
    def terminated(number, frame):
        tell("stopped by SIGTERM" + (f": {hint}" if hint else ""))
        sys.exit(143)
    before = None
    with contextlib.suppress(ValueError):            # not the main thread
        before = signal.signal(signal.SIGTERM, terminated)
    # Each once, though a file is read before the models are fetched, and again when they are there.
    shown = functools.cache(lambda text: tell(f"warning: {text}"))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: shown(" ".join(str(message).split()))
            yield
    except (UserError, OSError) as error:
        tell(f"error: {error}" + f"; {hint}" * bool(hint and "cannot be written" in str(error)))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        reason = (str(error).splitlines() or ["no details"])[0][:250]
        tell(f"error: memory ran out: {'; '.join(filter(None, (memory, hint)))} ({reason})")
        sys.exit(2)
    except KeyboardInterrupt:
        tell("stopped" + (f": {hint}" if hint else ""))
        sys.exit(130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the one of `names` that was probably meant; "" if none was."""
    near = difflib.get_close_matches(name, [*names], 1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else ""
