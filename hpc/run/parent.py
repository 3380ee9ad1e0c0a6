"""Ends a process whose parent has ended: ranks, data workers and packing processes. Imports nothing slow."""

import multiprocessing
import os
import threading
import time


def exit_with_parent(parent: int) -> None:
    """Starts a thread that ends this process soon after its parent process ends, or at once if the parent has ended already.

    Otherwise an orphaned rank would keep the stage's lock, and the stage could not be started again. The parent must be given:
    a process whose parent was killed during its imports has another parent by now.

    The thread ends this process's data workers first: while they import, which takes seconds, they do not watch their parent
    yet.

    Args:
        parent: Process id of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
