"""The page in a real browser, opened from disk."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vlm_budget.eval.report import write_report

from .conftest import HOSTILE, hostile_summary

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser, none of {', '.join(NAMES)} is on the path")

WRAPPER = """<!DOCTYPE html><title>waiting</title>
<iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe"), root = frame.contentDocument.documentElement;
  document.title = [root.scrollWidth, frame.contentWindow.pwned, frame.contentDocument.images.length,
    frame.contentDocument.querySelectorAll(".plot").length].join(" ");
}}</script>"""


def look(page: Path, width: int, profile: Path) -> list[str]:
    """Width of the page's content in a window, what a script left behind, and the numbers of images and plots."""
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(WRAPPER.format(page=page.name, width=width))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] != "waiting", done.stderr[-2000:]
    return title[1].split(" ")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_of_the_window(report: Path, tmp_path: Path, width: int) -> None:
    wide, pwned, images, drawings = look(report / "report.html", width, tmp_path)
    assert int(wide) <= width
    assert (pwned, images, drawings) == ("", "5", "8")


def test_hostile_texts_neither_run_nor_stick_out_even_without_the_policy(tmp_path: Path) -> None:
    text = " ".join(HOSTILE)
    write_report(hostile_summary(tmp_path, text), tmp_path, formats=("html",))
    page = tmp_path / "report.html"
    policy = '<meta http-equiv="Content-Security-Policy"'
    before = page.read_text(encoding="utf-8")
    assert before.count(policy) == 1
    page.write_text(before.replace(policy, "<meta"), encoding="utf-8")
    wide, pwned, images, _ = look(page, 360, tmp_path / "profile")
    assert int(wide) <= 360
    assert (pwned, images) == ("", "0")
