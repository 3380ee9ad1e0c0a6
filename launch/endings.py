"""How a process of lesiongen ends: the exit code and the printed message for each kind of error.

The codes are those of hpc/errors.py. The command line (launch/__main__.py) and every rank (launch/rank.py) call the functions.
"""

import atexit
import contextlib
import errno
import io
import os
import sys
import traceback
from typing import NoReturn

from hpc import errors
from launch import slurm

# Texts by which libraries report a write that failed because the disk is full, without raising OSError.
DISK_FULL_TEXTS = ("No space left", "os error 28", "PytorchStreamWriter", "file write failed", "unexpected pos")


def print_in_any_encoding() -> None:
    """Lets this process print every text: a character that the terminal's encoding lacks is printed as "?".

    Otherwise print() would raise UnicodeEncodeError, for example for a file's name in an ASCII terminal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have replaced it
            stream.reconfigure(errors="replace")


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error, or an error that caused it, means that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    cause = error.__cause__ or error.__context__
    return any(text in str(error) for text in DISK_FULL_TEXTS) or (cause is not None and is_disk_full(cause))


def is_refused(error: BaseException) -> bool:
    """Returns whether the file system refuses an access: permissions, or a file system that is mounted read-only."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and bool(error.filename)


def exit_code_of(error: BaseException) -> int:
    """Returns the exit code for an error. A Slurm job tries again what a user must wait for or clear."""
    if is_disk_full(error) or isinstance(error, errors.Busy):
        return errors.BLOCKED if slurm.inside_job() else errors.USAGE
    if is_refused(error):
        return errors.USAGE
    codes = {
        errors.UserError: errors.USAGE,
        errors.Stopped: errors.RESUMABLE,
        errors.Diverged: errors.DIVERGED,
        KeyboardInterrupt: errors.RESUMABLE,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), errors.FAILED)


def print_error(error: BaseException) -> None:
    """Prints an error to stderr: one paragraph if the user can act on it, a traceback otherwise. Never raises OSError."""
    with contextlib.suppress(OSError):  # stderr may be a log on a full disk
        _print_error(error)


def _print_error(error: BaseException) -> None:
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `lesiongen logs RUN | head`
        return
    if isinstance(error, (errors.UserError, errors.Stopped, errors.Diverged, TimeoutError)):
        print(f"lesiongen: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        print("lesiongen: interrupted; run the same command again to resume", file=sys.stderr, flush=True)
    elif is_disk_full(error):
        text = "the disk is full. Everything that was finished is intact. Free some space and run the same command again."
        print(f"lesiongen: {text} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
    elif is_refused(error):
        print(
            f"lesiongen: {error.filename}: {error.strerror}. Correct the permissions, or use another directory.",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)


def exit_process(code: int) -> NoReturn:
    """Ends the process at once, without the interpreter's shutdown.

    A thread of gloo, of a queue or of another library that wakes up during the shutdown aborts the process, and a
    successful command would end with an error code.
    """
    atexit._run_exitfuncs()  # these stop the data workers
    with contextlib.suppress(OSError):  # the reader of our output may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
