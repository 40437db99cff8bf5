"""The page in Chromium, as a reader sees it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from helpers.html_page import HtmlPage
from helpers.samples import FIGURES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
# The report has no script, so another page loads it in two frames, as wide as a phone and a desktop, and measures it.
LOOK = """<!DOCTYPE html><body><script>
const widths = [390, 1280];
const found = {};
// Pairs of texts in a figure whose boxes share more than a pixel in both directions.
const overlaps = figure => {
  const texts = [...figure.querySelectorAll("svg text")].map(text => [text.textContent, text.getBoundingClientRect()])
    .filter(([, box]) => box.height > 0);
  return texts.flatMap(([one, a], at) => texts.slice(at + 1)
    .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
    .map(([other]) => `${one} / ${other}`));
};
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900;
  frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument;
    const shown = [...page.querySelectorAll("figure")].filter(figure =>
      [...figure.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 40).length == 1);
    const small = [...page.querySelectorAll("svg text")].filter(text => {
      const box = text.getBoundingClientRect();
      return box.height > 0 && box.height < 9;
    });
    found[width] = {
      figures: shown.map(figure => figure.id),
      overflow: page.documentElement.scrollWidth - width,
      small: small.map(text => text.textContent),
      overlaps: shown.flatMap(overlaps),
    };
    if (Object.keys(found).length == widths.length) {
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify(found);
      document.body.replaceChildren(result);
    }
  };
  document.body.append(frame);
}
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_every_figure_is_visible_on_phone_and_desktop(whole, tmp_path):
    """The console stays empty, nothing is wider than the screen, and labels neither are too small nor overlap."""
    page = json.dumps(whole.html).replace("</", "<\\/")
    (tmp_path / "look.html").write_text(LOOK.replace("PAGE", page), "utf-8")

    run = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", f"file://{tmp_path / 'look.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert "CONSOLE" not in run.stderr
    (result,) = [element for element in HtmlPage.parse(run.stdout).elements if element.attributes.get("id") == "result"]
    for width, seen in json.loads(result.text).items():
        assert set(seen["figures"]) == FIGURES, width
        assert seen["overflow"] <= 0, width
        assert seen["small"] == [], width
        assert seen["overlaps"] == [], width
