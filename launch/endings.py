"""How a process ends: every kind of ending has an exit code, and an explanation for people."""

import atexit
import contextlib
import errno
import os
import sys
import traceback
from typing import NoReturn

from hpc import errors


def disk_full(error: BaseException) -> bool:
    """ENOSPC or a quota, however the library that met it puts it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    cause = error.__cause__ or error.__context__
    words = ("No space left", "os error 28", "PytorchStreamWriter", "file write failed", "unexpected pos")
    return any(w in str(error) for w in words) or (cause is not None and disk_full(cause))


def code_of(error: BaseException) -> int:
    if disk_full(error):
        return errors.USAGE
    kinds = {
        errors.UserError: errors.USAGE,
        errors.Stopped: errors.RESUMABLE,
        errors.Diverged: errors.DIVERGED,
        KeyboardInterrupt: errors.RESUMABLE,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), errors.FAILED)


def explain(error: BaseException) -> None:
    """One paragraph for what a person can mend, a traceback for what only we can."""
    if isinstance(error, BrokenPipeError):  # `lesiongen logs RUN | head`
        return
    if isinstance(error, (errors.UserError, errors.Stopped, errors.Diverged, TimeoutError)):
        print(f"lesiongen: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt):
        print("lesiongen: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    elif disk_full(error):
        text = "the disk is full. What was finished is intact; free some space and run the same command again."
        print(f"lesiongen: {text} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def end(code: int) -> NoReturn:
    """Ends the process without taking the interpreter apart: a thread of gloo, of a queue or of a library that wakes up
    in the midst of that aborts it, after all its work was done."""
    atexit._run_exitfuncs()  # data workers are sent home
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
