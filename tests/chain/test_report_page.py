"""The report in a real browser: axe-core finds no serious fault, nothing is wider than a telephone, and it prints.

The tests install Chromium from Debian if it is missing and they may, and get axe-core from npm.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lesiongen.evaluation.report import page
from tests import evaluations
from tests.chain.browser import browse

pytestmark = pytest.mark.long

# Runs in the page: checks it, and sends what was found to the page around it.
CHECK = """
addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const found = await axe.run(document, {resultTypes: ["violations"]});
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({
    width: innerWidth, needed: root.scrollWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    checked: found.passes.length,
    violations: found.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html.slice(0, 150))]),
  }), "*");
});
"""
# A window of headless Chromium has at least 500 px, so the page stands in a frame, which may be narrower.
FRAME = """<!doctype html><html lang="en" style="color-scheme: light dark"><title>frame</title><body>
<iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>
<script>addEventListener("message", e => {{ const p = document.createElement("pre"); p.id = "found"; p.textContent = e.data;
document.body.append(p); }});</script></body></html>"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """Returns the script of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("needs npm, for axe-core")
    got = subprocess.run([npm, "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, text=True, timeout=200)
    if got.returncode:
        pytest.skip(f"npm cannot get axe-core: {got.stderr[-200:]}")
    shutil.unpack_archive(next(folder.glob("axe-core-*.tgz")), folder, "gztar", filter="data")
    return (folder / "package" / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Returns the page of a complete run, the copy to share, and a page of a run of which nothing was measured."""
    metrics, shown = evaluations.complete(), evaluations.shown()
    empty = dict.fromkeys(metrics) | {"data": evaluations.data()}
    return {
        "whole": page("ham10000", metrics, *shown),
        "shared": page("ham10000", metrics, *shown, share=True),
        "empty": page("ham10000", empty, {}, {"": (None, None)}),
    }


def check(chromium: str, folder: Path, html: str, axe: str, width: int, dark: bool) -> dict:
    """Opens a page in a frame of a width, in the light or dark scheme, and returns what CHECK finds."""
    (folder / "page.html").write_text(html.replace("</body>", f"<script>{axe}</script><script>{CHECK}</script></body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dumped = browse(chromium, folder, "--window-size=1500,1000", scheme, "--dump-dom", (folder / "frame.html").as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    assert found, f"the check did not end: {dumped[-500:]}"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("which", ["whole", "shared", "empty"])
def test_anyone_can_read_it(chromium, axe, pages, tmp_path, which, width, dark):
    found = check(chromium, tmp_path, pages[which], axe, width, dark)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["checked"] > 15
    assert [v for v in found["violations"] if v[0] in ("serious", "critical")] == []
    assert found["needed"] <= width, "the page scrolls sideways"


def test_the_check_can_fail(chromium, axe, pages, tmp_path):
    """A picture without text, pale letters and a wide line must be found."""
    bad = '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw="><p style="color:#ccc;background:#fff">pale</p>'
    bad += '<div style="width:900px">wide</div>'
    found = check(chromium, tmp_path, pages["empty"].replace("</main>", f"{bad}</main>"), axe, 390, False)
    assert {v[1] for v in found["violations"]} >= {"image-alt", "color-contrast"}
    assert found["needed"] > 390


def test_it_prints(chromium, pages, tmp_path):
    (tmp_path / "page.html").write_text(pages["whole"])
    browse(
        chromium,
        tmp_path,
        f"--print-to-pdf={tmp_path / 'page.pdf'}",
        "--no-pdf-header-footer",
        (tmp_path / "page.html").as_uri(),
    )
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 5
