"""What can go wrong, and the exit code each kind of ending has."""

DONE, FAILED, USAGE, RESUMABLE, HANG, DIVERGED = 0, 1, 2, 75, 76, 77


class UserError(ValueError):
    """A mistake the user can mend. The message is one paragraph: what is wrong, where, what to do."""


class Stopped(Exception):
    """Stopped early by a signal or the end of the allocation; everything is saved, run it again to go on."""


class Diverged(Exception):
    """Too many non-finite steps in a row: going on would waste the machine."""
