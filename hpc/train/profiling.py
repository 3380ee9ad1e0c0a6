"""A trace of a few training steps, for torch's profiler: open it in https://ui.perfetto.dev or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP, STEPS = 3, 2, 10  # steps that are passed over, run with the profiler but not kept, kept


class Trace:
    """Writes profile/trace-<rank>.json, with the first steps of this process after a warm-up. Trainer owns one.

    Args:
        folder: The stage's directory.
        rank: This process's rank.
        enabled: If false, nothing is measured.
    """

    def __init__(self, folder: Path, rank: int, enabled: bool):
        self.path, self._profile, self._left = folder / "profile" / f"trace-{rank}.json", None, WAIT + WARM_UP + STEPS
        if enabled:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = schedule(wait=WAIT, warmup=WARM_UP, active=STEPS, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True)
            self._profile.start()

    def step(self) -> None:
        """Notes the end of a training step."""
        if self._profile:
            self._profile.step()
            self._left -= 1
            if not self._left:
                self.close()

    def close(self) -> None:
        """Ends the measurement. A training that ends before the last step leaves no trace."""
        if self._profile:
            self._profile.stop()
            self._profile = None

    def _write(self, found: profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.path))
        print(f"profile of {STEPS} steps: {self.path}", flush=True)
