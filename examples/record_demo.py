"""Pictures of the demo for the README: runs `examples.demo`, watches its dashboard in Chromium, writes PNG files and a GIF.

python -m examples.record_demo docs --seconds 120        needs Chromium, playwright and pillow
"""

from __future__ import annotations

import argparse
import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from tqdm import tqdm

from tests.browser.browser import FLAGS, LOOKS, chromium_path

EVERY_S = 2.5
LINGER_S = 75
SHOWN_MS = 350
VIEW = {"width": 1240, "height": 1490}
GIF_WIDTH = 820
COLOURS = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args()
    command = [sys.executable, "-m", "examples.demo", "--seconds", str(args.seconds), "--linger", str(LINGER_S)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert demo.stdout is not None
    url = ""
    while not url:
        line = demo.stdout.readline()
        if not line:
            raise SystemExit("the demo ended before it began")
        print(line, end="")
        url = (re.findall(r"http://\S+/dashboard#key=\S+", line) or [""])[0]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
            frames = _watch(browser, url, args.folder, args.seconds)
            browser.close()
    except BaseException:
        demo.send_signal(signal.SIGINT)  # it stops its cluster
        demo.wait(90)
        raise
    print(demo.stdout.read())
    _write_gif(frames, args.folder / "demo.gif")
    return demo.wait()


def _open(browser: Any, url: str, look: dict[str, Any]) -> Any:
    page = browser.new_context(**look).new_page()
    page.goto(url)
    page.wait_for_selector("body.drawn")
    page.locator("#range input[value='300']").check(force=True)
    return page


def _watch(browser: Any, url: str, folder: Path, seconds: float) -> list[bytes]:
    """A frame every EVERY_S; the still pictures come last, when all of it can be seen in the curves."""
    page = _open(browser, url, {"viewport": VIEW, "color_scheme": "light"})
    frames: list[bytes] = []
    started = time.monotonic()
    with tqdm(total=round(seconds), desc="recording", unit="s", disable=None, leave=False) as bar:
        while (now := time.monotonic() - started) < seconds - 1:
            frames.append(page.screenshot(type="jpeg", quality=92))
            bar.update(round(now) - bar.n)
            page.wait_for_timeout(max(0.0, 1000 * (EVERY_S * len(frames) - (time.monotonic() - started))))
    _stills(browser, url, folder)
    return frames


def _stills(browser: Any, url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, look in LOOKS.items():
        page = _open(browser, url, look)
        page.locator("#requests").scroll_into_view_if_needed()
        page.wait_for_selector(".request", timeout=20_000)
        chosen = page.locator(".request:has(.good)")  # one that was resumed, if there is one
        (chosen if chosen.count() else page.locator(".request:has(.ph.decode)")).first.click()
        try:
            page.wait_for_selector(".fall .lane", timeout=15_000)
        except TimeoutError:  # a picture without it is still a picture
            tqdm.write(f"{name}: no waterfall: {page.locator('#detail').inner_text()!r}")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(400)
        if name == "phone":
            page.screenshot(path=folder / "dashboard-phone.png")
        else:
            page.set_viewport_size({"width": look["viewport"]["width"], "height": VIEW["height"]})
            page.wait_for_timeout(1200)
            _save(page.screenshot(), folder / f"dashboard-{name}.png")
            _save(page.locator("#requests").screenshot(), folder / f"dashboard-{name}-request.png")
        page.context.close()


def _save(png: bytes, path: Path) -> None:
    """A quarter of the size, and no difference to be seen."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def _write_gif(frames: list[bytes], path: Path) -> None:
    height = round(VIEW["height"] * GIF_WIDTH / VIEW["width"])
    images = [
        Image.open(io.BytesIO(frame)).convert("RGB").resize((GIF_WIDTH, height), Image.Resampling.LANCZOS) for frame in frames
    ]
    # One palette for all frames. An octree keeps the few strongly coloured pixels that a median cut would average away.
    palette = images[2 * len(images) // 3].quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    small[0].save(path, save_all=True, append_images=small[1:], duration=SHOWN_MS, loop=0, optimize=True)
    print(f"{path}: {len(small)} frames, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
