"""Headless Chromium, for tests that look at pages. Installed from Debian if it is missing and the tests may."""

import os
import shutil
import subprocess
from pathlib import Path


def find_chromium() -> str | None:
    """Returns the path of Chromium; None if it cannot be installed."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found and shutil.which("apt-get") and os.getuid() == 0:
        install = ["apt-get", "install", "-y", "-qq", "chromium"]
        subprocess.run(
            install, capture_output=True, timeout=280, check=False, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        )
        found = shutil.which("chromium")
    return found


def browse(chromium: str, folder: Path, *options: str) -> str:
    """Runs headless Chromium on a page and returns what it prints. Its profile is in `folder`, so that no other is touched."""
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=100000"]
    command += [f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
