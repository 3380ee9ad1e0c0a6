"""The errors that end a stage, and the exit codes of processes. launch/endings.py maps each error to its code."""

DONE = 0
FAILED = 1  # an unexpected error, such as a crash; trying again may help
USAGE = 2  # the user must change something first: a UserError, or a full disk
BLOCKED = 74  # in a Slurm job: the disk is full, or another process uses the stage; the job is tried again later
RESUMABLE = 75  # stopped early, state saved; the same command resumes
HANG = 76  # the watchdog ended a training that made no progress
DIVERGED = 77  # the training diverged; the same command would diverge again
IN_WORDS = {
    FAILED: "failed",
    USAGE: "refused, something has to be changed",
    BLOCKED: "blocked by a full disk or another process",
    RESUMABLE: "stopped early",
    HANG: "hung",
    DIVERGED: "diverged",
}


class UserError(ValueError):
    """A mistake that the user can correct. The message is one paragraph: what is wrong, where, what to do."""


class Busy(UserError):
    """Another process works in a stage's directory. The same command works once that process has ended."""


class LeaderFailed(RuntimeError):
    """An unexpected error on rank 0 ended work that the other ranks waited for. Raised on the other ranks."""


class Stopped(Exception):
    """A signal or the end of the allocation stopped the training early. All state is saved; the same command resumes."""


class Diverged(Exception):
    """The training gives no finite result, for example after too many non-finite steps in a row."""
