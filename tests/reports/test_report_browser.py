"""The report in a real browser: it fits phones and desktops, moves or keeps still, and is drawn in light and dark."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.report_runs import make_run
from world_distill.reports import report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<!DOCTYPE html><body><script>
const page = %s, widths = [320, 360, 390, 768, 1280], found = [];
for (const width of widths) {
  const frame = document.createElement('iframe');
  frame.style.cssText = `border:0;height:800px;width:${width}px`;
  frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument, films = inside.querySelectorAll('.film');
    const closed = inside.documentElement.scrollWidth;
    for (const part of inside.querySelectorAll('details')) part.open = true;
    found.push({width, closed, open: inside.documentElement.scrollWidth, films: films.length,
      moving: inside.getAnimations().length, sizes: [...films].map(f => f.getBoundingClientRect().width),
      button: inside.getElementById('motion').textContent});
    frame.remove();
    if (found.length == widths.length) document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
  };
  document.body.append(frame);
}
</script>"""


def browse(folder, url, *flags):
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000", f"--user-data-dir={folder / 'profile'}",
         *flags, url],
        capture_output=True, timeout=180,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"{BROWSER} does not start here: {done.stderr[-300:]!r}")
    return done.stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
@pytest.mark.parametrize("still", [False, True], ids=["moving", "reduced motion"])
def test_page_fits_phones_and_desktops(tmp_path, still):
    make_run(tmp_path / "run", text=" " + "unbreakable" * 12)
    text = report.build(tmp_path / "run").read_text()
    (tmp_path / "measure.html").write_text(MEASURE % json.dumps(text).replace("</", "<\\/"))
    flags = ["--dump-dom", *(["--force-prefers-reduced-motion"] if still else [])]
    out = browse(tmp_path, f"file://{tmp_path}/measure.html", *flags)
    found = json.loads(html.unescape(re.search(r"FOUND(.*)END", out)[1]))
    assert sorted(f["width"] for f in found) == [320, 360, 390, 768, 1280]
    for frame in found:
        assert max(frame["closed"], frame["open"]) <= frame["width"], frame
        # Films outside of the view do not run.
        assert frame["films"] >= 12 and (0 if still else 1) <= frame["moving"] <= (0 if still else frame["films"])
        assert frame["button"] == ("Play the clips" if still else "Stop the clips")
        if frame["width"] >= 360:
            assert set(frame["sizes"]) <= {150, 300}, "every pixel of a clip is a whole square"


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")
def test_page_is_drawn(tmp_path):
    make_run(tmp_path / "run")
    path = report.build(tmp_path / "run")
    colours = {}
    for theme, flag in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{theme}.png"
        flags = [f"--screenshot={shot}", "--window-size=1280,900", f"--blink-settings=preferredColorScheme={flag}"]
        browse(tmp_path, path.as_uri(), *flags)
        image = Image.open(shot).convert("RGB")
        assert image.size == (1280, 900) and len(image.getcolors(1 << 24)) > 50
        colours[theme] = image.getpixel((2, 2))
    assert min(colours["light"]) > 220 and max(colours["dark"]) < 50
