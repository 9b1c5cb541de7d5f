"""The report in a real browser: no console message, no request, the picture is not blank."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from vlm_jax.report import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LOADER = 101845102  # Chromium's id of requests made by a page, not by itself

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")


def look(file, folder, *flags):
  """Opens a file headless: its DOM, console messages, and the URLs that it asked for."""
  log = folder / "net.json"
  done = subprocess.run(
    [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
     "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
     "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
     "--enable-logging=stderr", f"--log-net-log={log}", *flags, file.as_uri()],
    capture_output=True, text=True, timeout=120, check=True)
  asked = re.findall(rf'"traffic_annotation":{LOADER},"url":"([^"]*)"', log.read_text())
  return done.stdout, re.findall(r"CONSOLE.*", done.stderr), asked


def test_nothing_is_said_and_nothing_is_asked_for(run, tmp_path):
  file = page.write(run, outside=True)
  dom, console, asked = look(file, tmp_path, "--dump-dom")
  assert "One packed row" in dom and dom.count("<svg") > 8
  assert console == [] and asked == []


def test_twin_a_page_that_talks_and_asks(tmp_path):
  file = tmp_path / "bad.html"
  file.write_text('<!doctype html><meta charset="utf-8"><img src="http://127.0.0.1:9/x.png">'
                  "<script>console.error('boo')</script>")
  _, console, asked = look(file, tmp_path, "--dump-dom")
  assert any("boo" in line for line in console) and asked == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("width,scheme", [(1280, 1), (390, 0)])
def test_screenshot(run, tmp_path, width, scheme):
  shot = tmp_path / "shot.png"
  look(page.write(run, outside=True), tmp_path, f"--window-size={width},2000", "--hide-scrollbars",
       f"--screenshot={shot}", f"--blink-settings=preferredColorScheme={scheme}")
  pixels = np.asarray(Image.open(shot).convert("L"), float)
  assert pixels.shape[1] == width and pixels.std() > 5
  assert (np.median(pixels) > 200) == (scheme == 1)  # light ground, and dark where it is wanted
