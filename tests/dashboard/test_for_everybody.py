"""The dashboard for every eye, hand and screen: names, headings, contrast, keyboard, narrow and dark."""

import itertools
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.conftest import BUDGET_MS, Agent, Visit

expect.set_options(timeout=BUDGET_MS)
Open = Callable[..., Visit]

CONTRAST_MIN = 4.5  # WCAG 2.2, 1.4.3

CONTRASTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (channels) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest(".hidden, script, noscript")) continue;
    const [one, other] = [light(rgba(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([Math.round(ratio * 100) / 100, node.data.trim().slice(0, 40)]);
  }
  return found;
}
"""
STICKING_OUT = """
(width) => [...document.querySelectorAll("main *")]
  .filter((e) => e.checkVisibility() && !e.closest(".scroll, .hidden, .header, svg"))
  .filter((e) => e.getBoundingClientRect().right > width + 1)
  .map((e) => e.className || e.tagName)
"""
HEIGHTS = """
(all) => all.filter((e) => e.checkVisibility()).map((e) => [e.getBoundingClientRect().height, e.id || e.textContent])
"""
FOCUSED = """
() => {
  const at = document.activeElement, box = at.getBoundingClientRect(), style = getComputedStyle(at);
  const name = at.getAttribute("aria-label") || at.id || at.textContent.trim();
  return [name, style.outlineStyle + parseFloat(style.outlineWidth), box.width > 0 && box.top >= 0];
}
"""
DANGLING = """
() => [...document.querySelectorAll("[aria-labelledby]")]
  .map((e) => e.getAttribute("aria-labelledby")).filter((id) => !document.getElementById(id))
"""
COUNT_SHIFTS = """
window.shift = 0;
new PerformanceObserver((list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.shift += e.value; }))
  .observe({type: "layout-shift", buffered: true});
"""


def full(page: Page, agent: Agent) -> None:
    """A page with something in each of its parts."""
    lease = agent.grant("somebody-with-a-long-name-" + "x" * 60, tokens=30_000)
    expect(page.locator("#leases")).to_have_text("1")
    page.locator("#find-id").fill(lease.lease_id)
    page.keyboard.press("Enter")
    expect(page.locator(".words li").first).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(visit: Open, broker_url: str, agent: Agent, scheme: str) -> None:
    page = visit(color_scheme=scheme).open(broker_url)
    agent.http.post("/v1/engines/d1/drain")
    full(page, agent)
    expect(page.locator("[data-engine=d1] .badge")).to_contain_text("draining")
    page.get_by_role("button", name="Undrain d1").click()
    texts = page.evaluate(CONTRASTS)
    agent.http.post("/v1/engines/d1/undrain")
    assert len(texts) > 80
    assert [text for text in texts if text[0] < CONTRAST_MIN] == []


def test_dark_follows_the_system_until_somebody_chooses(visit: Open, broker_url: str) -> None:
    window = visit(color_scheme="dark")
    page = window.open(broker_url)

    def ground() -> int:
        return page.evaluate("Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0])")

    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert ground() < 40
    page.get_by_role("button", name="Switch to light colours").click()
    assert ground() > 200
    page.reload()
    page.get_by_role("button", name="Switch to dark colours").wait_for()
    assert ground() > 200


def test_nothing_sticks_out_of_a_narrow_screen(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit(viewport={"width": 360, "height": 740}).open(broker_url)
    full(page, agent)
    for width in (360, 560, 800, 1100):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKING_OUT, width) == []
    page.set_viewport_size({"width": 360, "height": 740})
    small = page.locator("button, input").evaluate_all(HEIGHTS)
    assert [each for each in small if each[0] < 24] == []  # WCAG 2.2, 2.5.8
    expect(page.get_by_role("button", name="Drain d0")).to_be_visible()


def test_all_of_it_by_keyboard(visit: Open, broker_url: str) -> None:
    page = visit().open(broker_url)
    expect(page.locator("[data-engine]")).to_have_count(3)
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outline, inside = page.evaluate(FOCUSED)
        seen.append(name)
        assert outline == "solid3", name
        assert inside, name
        if name == "find-id":
            break
    assert seen == ["Skip to the fleet", "Switch to dark colours", "Drain d0", "Drain d1", "Drain p0", "find-id"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Drain d0?")
    expect(dialog).to_be_visible()
    assert page.evaluate("document.activeElement.textContent") == "Cancel"  # the harmless one first
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.ariaLabel") == "Drain d0"


def test_focus_stays_while_figures_change(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    page.get_by_role("button", name="Drain d1").focus()
    agent.grant("elsewhere")
    expect(page.locator("#leases")).to_have_text("1")
    assert page.evaluate("document.activeElement.ariaLabel") == "Drain d1"


def test_what_a_screen_reader_is_told(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    full(page, agent)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [node for node in tree if not node.get("ignored")]

    def of(*roles: str) -> list[dict]:
        return [node for node in nodes if node["role"]["value"] in roles]

    def name(node: dict) -> str:
        return node.get("name", {}).get("value", "")

    controls = of("button", "link", "searchbox", "textbox", "image", "dialog")
    assert len(controls) >= 14
    assert [node["role"]["value"] for node in controls if not name(node)] == []
    assert [len(of(role)) for role in ("main", "banner", "contentinfo", "search")] == [1, 1, 1, 1]
    assert {name(node) for node in of("region")} >= {"Fleet", "Over time", "Waiting queue", "One lease in words"}
    levels = [
        int(part["value"]["value"]) for node in of("heading") for part in node["properties"] if part["name"] == "level"
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(of("columnheader")) >= 9
    assert len(of("row")) >= 4
    charts = [name(node) for node in of("image") if "per minute" in name(node) or "no figures" in name(node)]
    assert len(charts) == 6
    assert page.locator("#strip").get_attribute("role") == "status"
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(DANGLING) == []


def test_nothing_jumps_while_it_loads(visit: Open, broker_url: str) -> None:
    window = visit()
    window.page.add_init_script(COUNT_SHIFTS)
    page = window.open(broker_url)
    expect(page.locator("[data-engine]")).to_have_count(3)
    expect(page.locator("#grants")).not_to_have_text("\u2013")
    assert page.evaluate("window.shift") < 0.1  # Core Web Vitals call this good
