"""The page by itself, before a made-up cluster: first paint, memory, keys, narrow screens, colours, locks and empty rooms."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.browser import artefacts, chromium, heap_bytes, page_at, running, until
from tests.browser.fake_cluster import FakeCluster, build

pytestmark = [pytest.mark.more, pytest.mark.timeout(300)]

FIRST_PAINT_MS = 1000
HOUR = 3600


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(build(FakeCluster(), pace_s=1.0)) as url:
        yield url


def jump(url: str, **asked: Any) -> None:
    body = json.dumps(asked).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/fake", body, {"Content-Type": "application/json"}), timeout=120).read()


def test_the_first_paint_is_quick(browser: Any, url: str) -> None:
    """Three cold caches; the slowest counts."""
    paints = []
    for _ in range(3):
        with page_at(browser, url) as page:
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    print(f"\nfirst contentful paint: {', '.join(f'{paint:.0f}' for paint in paints)} ms")
    assert max(paints) < FIRST_PAINT_MS


def test_an_hour_of_updates_leaves_the_heap_as_it_was(browser: Any) -> None:
    """A full hour fills what the page keeps; two more must add nothing that lasts."""
    with running(build(FakeCluster(is_empty=False), pace_s=3600.0)) as url, page_at(browser, url) as page:
        page.wait_for_selector(".request")
        heaps = []
        for _ in range(3):
            jump(url, ticks=HOUR)
            expected = json.load(urllib.request.urlopen(f"{url}/dashboard/data"))["now"]
            until(page, f"tandemPage.snapshot().now >= {expected}", 120)
            page.wait_for_timeout(500)
            heaps.append(heap_bytes(page))
        nodes = page.evaluate("document.querySelectorAll('*').length")
        points = page.evaluate("tandemPage.points()")
    print(f"\nheap after 1, 2, 3 hours: {', '.join(f'{heap / 1e6:.2f}' for heap in heaps)} MB; {nodes} elements, {points} points")
    assert points == 720
    assert nodes < 6000
    assert heaps[0] < 30e6
    assert heaps[2] < heaps[0] + 1e6, heaps


def test_it_follows_the_clock(browser: Any, url: str) -> None:
    with page_at(browser, url) as page:
        before = page.evaluate("tandemPage.snapshot().now")
        until(page, f"tandemPage.snapshot().now >= {before + 2}")
        assert page.locator("#live").inner_text() == "live"


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_it_can_be_read(browser: Any, url: str, look: str) -> None:
    """Nothing scrolls sideways, text has contrast, and there is a picture to look at."""
    with page_at(browser, url, look) as page:
        page.locator(".request").nth(2).click()
        page.wait_for_selector(".fall .ph.decode")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(400)
        page.screenshot(path=artefacts() / f"page-{look}.png", full_page=True)
        assert not page.evaluate(LOW_CONTRAST)
        if look == "phone":
            assert page.locator(".chart").first.bounding_box()["width"] > 300


# Text whose colour and the first opaque background behind it differ by less than WCAG AA asks (4.5; 3 for large text).
LOW_CONTRAST = r"""() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); const d = canvas.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255]; };
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue;
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    if (!box.width || style.visibility === "hidden" || node.closest(".sr, .skip, dialog:not([open]), svg, option, :disabled")) continue;
    let behind = [255, 255, 255, 1];
    for (let up = node; up; up = up.parentElement) { const colour = parse(getComputedStyle(up).backgroundColor); if (colour[3] > .85) { behind = colour; break; } }
    const a = light(parse(style.color)), b = light(behind), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${node.tagName}.${node.className}: ${node.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found.length ? found.slice(0, 8).join(" | ") : "";
}"""  # noqa: E501


def test_hands_may_stay_on_the_keyboard(browser: Any, url: str) -> None:
    with page_at(browser, url) as page:
        page.wait_for_selector(".request")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("4")
        page.keyboard.press("j")
        page.keyboard.press("j")
        second = page.evaluate("document.activeElement.dataset.id")
        page.keyboard.press("Enter")
        page.wait_for_selector(".fall .lane")
        assert second
        assert page.locator("#detail h3").first.inner_text() == second
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "by-id"
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        assert page.locator("#keys").is_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        page.keyboard.press("p")
        page.keyboard.type(" and why?")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#stop:not(:disabled)")


def test_a_request_can_be_found_and_its_why_read(browser: Any, url: str) -> None:
    with page_at(browser, url) as page:
        row = page.locator(".request").nth(5)
        row.wait_for()
        name = row.get_attribute("data-id")
        page.locator("#by-id").fill(name)
        page.locator("#by-id").press("Enter")
        page.wait_for_selector(".why tr.chosen")
        assert page.locator(".request").count() == 1
        assert "prefill:0" in page.locator(".why").first.inner_text()
        page.locator("#by-id").fill("")
        page.locator("#by-tenant").select_option("globex")
        until(
            page,
            "[...document.querySelectorAll('.request .id small')].every(node => node.textContent.startsWith('globex'))",
        )


def test_a_prompt_streams_while_its_waterfall_appears(browser: Any, url: str) -> None:
    with page_at(browser, url) as page:
        page.locator("#send").click()
        page.wait_for_selector("#play-fall .tick")
        early = len(page.locator("#answer").inner_text())
        assert not page.locator("#send").is_enabled()
        page.wait_for_selector("#play-fall[data-from=server] .ph.prefill", timeout=20_000)
        assert len(page.locator("#answer").inner_text()) > early > 0
        assert page.locator("#send").is_enabled()
        page.locator("#playground").screenshot(path=artefacts() / "page-playground.png")


def test_the_key_is_asked_for_once_and_kept_in_the_tab(browser: Any) -> None:
    with (
        running(build(FakeCluster(key="sk-right"), pace_s=1.0)) as url,
        page_at(browser, url, ready=False, may_say="401") as page,
    ):
        for given in ("sk-wrong", "sk-right"):
            page.wait_for_selector("#locked[open]")
            page.locator("#key").fill(given)
            page.locator("#key").press("Enter")
        page.wait_for_selector("body.drawn")
        page.reload()
        page.wait_for_selector("body.drawn")
        assert not page.locator("#locked").is_visible()
        kept = page.evaluate("[sessionStorage.length, JSON.stringify(localStorage) + document.cookie + location.href]")
        assert kept[0] == 1
        assert "sk-" not in kept[1]


def test_a_key_in_the_fragment_is_taken_out_of_the_address(browser: Any) -> None:
    with running(build(FakeCluster(key="sk-right"))) as url, page_at(browser, url, ready=False, may_say="401") as page:
        page.goto("about:blank")
        page.goto(f"{url}/dashboard#key=sk-right")
        page.wait_for_selector("body.drawn")
        assert "sk-right" not in page.evaluate("location.href")


def test_an_empty_room_says_what_to_do(browser: Any) -> None:
    with running(build(FakeCluster(is_empty=True))) as url, page_at(browser, url) as page:
        told = page.locator("#empty").inner_text()
        assert f"curl {url}/v1/chat/completions" in told
        assert "nobody has asked yet" in told
        assert "Nobody has asked for anything yet" in page.locator("#sla").inner_text()
        page.screenshot(path=artefacts() / "page-empty.png")


def test_a_lost_connection_is_said_and_mended(browser: Any) -> None:
    with contextlib.ExitStack() as first:
        url = first.enter_context(running(build(FakeCluster())))
        port = int(url.rsplit(":", 1)[1])
        with page_at(browser, url, may_say="ERR_") as page:
            first.close()
            page.wait_for_selector("#live[data-state=lost]", timeout=15_000)
            with running(build(FakeCluster()), port):
                page.wait_for_selector("#live[data-state=live]", timeout=15_000)
