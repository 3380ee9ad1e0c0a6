"""Progress bars on terminals, sparse lines in logs."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str = "img", initial: int = 0, shown: bool = True) -> tqdm:
    """A bar over `total` units of work. In a log file it writes a line at most every 30 s."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        disable=not shown,
        mininterval=0.2 if live else 30.0,
        maxinterval=1.0 if live else 30.0,
        dynamic_ncols=live,
        ncols=None if live else 110,
        unit_scale=total > 100_000,
    )
