"""Manages a run of sample.py with one job or many: reads prompt files, shows progress, and handles errors.

  prompt_lines(path)              returns the settings of each line of a .txt or .jsonl file
  with exit_on_error() as run:    wraps the whole script; `run` reports errors and shows progress

If a line of a prompt file fails, the error names the line, the run continues, and the exit code is 1. Any other error
that a user can fix ends the run with a message of one line and exit code 2.
Note: a batch that fails is computed again image by image, because any of its images may be the reason.
Needs: the standard library; tqdm once images are computed.
"""
import argparse
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from loading.errors import UserError, WeightsError, memory_ran_out, printable, tell
from loading.files import parsed, read_text

KNOWN = (ValueError, OSError, RuntimeError, MemoryError)             # errors that a user may be able to fix


# ----- prompt files --------------------------------------------------------------------------------------------------

def prompt_lines(path: Path) -> list[tuple[int, dict]]:
    """Returns [(line number, settings)] of a prompt file, without empty lines and # comments. Raises ValueError if
    the file cannot be read or has no prompts, or if a line of a .jsonl file is invalid."""
    text = read_text(path, failed="cannot be read as a text file")
    result, is_json = [], path.suffix.lower() == ".jsonl"
    for i, line in enumerate(without_mark(text).split("\n"), 1):
        if not line.strip() or not is_json and line.lstrip().startswith("#"):
            continue
        settings = {"prompt": line.strip()}
        if is_json:
            try:
                settings = parsed(line, finite=True)
            except ValueError as problem:
                raise UserError(f"{path}, line {i}: this is not JSON ({problem})") from None
        if not isinstance(settings, dict) or not isinstance(settings.get("prompt", ""), str):
            raise UserError(f'{path}, line {i}: expected an object with one prompt, such as {{"prompt": "a cat", '
                            f'"seed": 3}}')
        result.append((i, settings))
    if not result:
        raise UserError(f"{path} contains no prompts: expected one per line")
    return result


def without_mark(text: str) -> str:
    """Removes byte-order marks, which would become tokens. Joined files have them also in the middle of the text."""
    return text.replace("\ufeff", "")


# ----- the run -------------------------------------------------------------------------------------------------------

class Run:
    """The state of a run. jobs: one per image. saved: paths of finished images. failed: number of reported errors."""
    def __init__(self):
        self.jobs, self.saved, self.failed, self.bar = [], [], 0, None

    def print(self, *words: str, file=None) -> None:
        """Prints one line, above the progress bars."""
        with self.bar.external_write_mode() if self.bar else contextlib.nullcontext():
            print(printable(" ".join(words)), file=file, flush=True)

    def report(self, message: str) -> None:
        """Prints and counts an error after which the run continues."""
        self.failed += 1
        self.print("error:", message, file=sys.stderr)

    def finished(self, job: argparse.Namespace, path: Path) -> None:
        self.saved.append(path)
        self.print(str(path) if job.seed is None else f"seed {job.seed}: {path}")

    def progress(self, batches: Iterable[list]) -> Iterator[list]:
        """Yields the batches. For several images, shows a progress bar: current prompt, finished images, time left."""
        if len(self.jobs) == 1:
            yield from batches
            return
        from tqdm import tqdm
        with tqdm(total=len(self.jobs), unit="image") as self.bar:
            for batch in batches:
                job = batch[0]
                what = job.prompt or Path(job.init or job.from_latent or job.tensors or "").name
                place = f"line {job.line}" if job.line else f"seed {job.seed}"
                self.bar.set_description(printable(f"{place}: {what[:30]}{'...' * (len(what) > 30)}"))
                yield batch
                self.bar.update(len(batch))
        self.bar = None

    def attempt(self, make: Callable[[list], list], batch: list) -> list[tuple]:
        """Returns pairs (job, image) for the images of make(batch). If `make` fails for jobs of a prompt file, tries
        them one by one and reports those that fail. Raises the error for other jobs, and if the weights are wrong."""
        try:
            return [*zip(batch, make(batch))]
        except KNOWN as problem:
            message = one_line(problem)
            if not batch[0].line or isinstance(problem, WeightsError):       # with bad weights, all lines would fail
                raise
        if len(batch) > 1:
            return [pair for job in batch for pair in self.attempt(make, [job])]
        job, = batch
        self.report(place_of(job) + f"seed {job.seed}: " * (job.num_images > 1) + message)
        return []


def place_of(job: argparse.Namespace) -> str:
    """Returns the beginning of an error message: prompt file and line, or "" if the job is not from a file."""
    return f"{job.prompt_file}, line {job.line}: " if job.line else ""


def skip_line(args: argparse.Namespace, problem: ValueError, bad: dict[int, str] | None) -> None:
    """Stores the message of `problem` in bad[args.line]. If args.line or bad is None, raises a UserError instead."""
    if not args.line or bad is None:
        raise UserError(place_of(args) + str(problem)) from None
    bad[args.line] = place_of(args) + str(problem)


@contextlib.contextmanager
def exit_on_error() -> Iterator[Run]:
    """Context manager for the whole script. Prints an error that a user can fix as one line and exits with code 2.
    Other errors keep their traceback. The exit code is 1 if errors were reported and the run continued, and 130 after
    Ctrl-C. Each warning is printed as one line. Previews are removed at the end."""
    run = Run()
    try:
        with warnings.catch_warnings():
            # Prints each warning once: input files are read several times, and each time may give the same warning.
            warn = functools.cache(lambda text: run.print("warning:", *text.split(), file=sys.stderr))
            warnings.showwarning = lambda message, *_: warn(str(message))
            yield run
    except KeyboardInterrupt:
        print(file=sys.stderr)                           # ends the line of the progress bar
        tell(f"stopped: {len(run.saved)} of {len(run.jobs)} images are finished, each in its file")
        raise SystemExit(130) from None
    except KNOWN as problem:
        kept = f"; {len(run.saved)} of {len(run.jobs)} images are finished, each in its file" if run.saved else ""
        tell(f"error: {one_line(problem)}{kept}")
        raise SystemExit(2) from None
    finally:
        for job in run.jobs:
            remove_preview(job)
    if run.failed:
        tell(f"{len(run.saved)} images are finished, each in its file; see the errors above")
        raise SystemExit(1)


def one_line(problem: Exception) -> str:
    """Returns an exception's message as one line. A RuntimeError is a bug and raised again, unless memory ran out."""
    message = " ".join(str(problem).split())
    if memory_ran_out(problem):
        return "memory ran out: generate fewer or smaller images at a time, or try --dtype bf16 or --low-memory"
    if isinstance(problem, RuntimeError):
        raise problem
    return message


def remove_preview(job: argparse.Namespace) -> None:
    if job.preview is not None:
        job.preview.unlink(missing_ok=True)
