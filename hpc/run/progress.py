"""Progress bars: live on a terminal, a line from time to time in a log file. Progress is a beat for the watchdog."""

import sys

from tqdm import tqdm

from hpc import watchdog


class _ProgressBar(tqdm):
    """A progress bar that tells the watchdog of each update, also where nothing is shown."""

    def update(self, n: float | None = 1) -> bool | None:
        watchdog.beat()
        return super().update(n)


def progress_bar(total: int, description: str, unit: str = "img", initial: int = 0, shown: bool = True) -> tqdm:
    """Makes a progress bar on stderr. In a log file it writes a line at most every 30 s.

    Args:
        total: Units of work in all.
        description: Text before the bar.
        unit: Name of a unit.
        initial: Units that are done already, such as samples before a resume.
        shown: Whether anything is written; False on all ranks but one.
    """
    live = sys.stderr.isatty()
    return _ProgressBar(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not shown,
        mininterval=0.2 if live else 30.0,
        maxinterval=1.0 if live else 30.0,
        dynamic_ncols=live,
        ncols=None if live else 110,
        unit_scale=total > 100_000,
    )
