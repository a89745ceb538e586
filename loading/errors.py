"""Defines errors that the user can fix, and prints messages. Such an error ends a script with one line on stderr.

The message of a UserError says what was wrong, what was expected and what to do. Any other exception except OSError is
a bug of ours and keeps its traceback. A WeightsError is a UserError about a file or folder of weights.
Note: file names, keys and captions are not trusted: they may contain control characters that a terminal executes. So
all messages pass through `printable`: in UserError for errors, in `tell` and `warn` for other messages.
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
    """An error that the user can fix. Scripts show its message as one line, without a traceback."""
    def __str__(self) -> str:
        return printable(super().__str__())


class WeightsError(UserError):
    """Raised for a file or folder of weights that cannot be used. The message says what was expected."""


def printable(text: str) -> str:
    """Returns text with control characters, which a terminal would execute, escaped as \\x1b, \\n, ..."""
    text = str(text)
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell(message: str) -> None:
    """Prints one line for the user to stderr, with control characters escaped."""
    with contextlib.suppress(OSError):               # stderr may be a file on a full disk
        print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Issues a Python warning: scripts print it as one line, and programs that import this code can catch it."""
    warnings.warn(printable(message), stacklevel=3)


@contextlib.contextmanager
def as_user_error():
    """Context manager that turns a ValueError into a UserError. It wraps calls that check values given by the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def memory_ran_out(error: Exception) -> bool:
    """Returns whether an exception means that memory ran out, or that the system killed a DataLoader worker."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED",
                                          "is killed by signal"))


@contextlib.contextmanager
def exit_on_user_error(hint: str | None = None, memory: str = "close other programs, or use a larger machine"):
    """Context manager for a whole script. A UserError, an OSError or a lack of memory ends the script with one line and
    exit code 2, Ctrl-C with exit code 130, SIGTERM with 143. Each warning is shown once, as one line.

    hint: what to do after Ctrl-C, for example RESUME_HINT. memory: what to do if the memory runs out.
    """
    def terminated(number, frame):
        tell("stopped by SIGTERM" + (f": {hint}" if hint else ""))
        sys.exit(143)
    before = None
    with contextlib.suppress(ValueError):            # raised by signal.signal outside the main thread
        before = signal.signal(signal.SIGTERM, terminated)
    # functools.cache shows each warning once, although some files are read twice: before and after fetching models.
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
    """Returns the hint "did you mean X?", where X is the most similar of `names`; "" if no name is similar."""
    near = difflib.get_close_matches(name, [*names], 1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else ""
