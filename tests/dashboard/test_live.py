"""What the dashboard shows, as it happens: grants, the queue, receipts, drains, and a broker that goes and comes."""

import signal
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.broker.broker_process import BrokerProcess
from tests.dashboard.conftest import BUDGET_MS, Agent, Visit

expect.set_options(timeout=BUDGET_MS)
Open = Callable[..., Visit]


def row(page: Page, engine: str):
    return page.locator(f"[data-engine={engine}]")


def test_it_shows_the_fleet(visit: Open, broker_url: str) -> None:
    page = visit().open(broker_url)
    expect(page.locator("#link")).to_have_attribute("data-link", "live")
    expect(page.locator("#link-text")).to_contain_text("Live, ")
    expect(page.locator("#strip")).to_have_text("All well: new conversations are served.")
    expect(page.locator("#role")).to_have_text("alone")
    expect(page.locator("#preset")).to_have_text("paper")
    expect(page.locator("[data-engine]")).to_have_count(3)
    d0 = row(page, "d0")
    expect(d0.locator(".badge")).to_have_text("●ready")
    expect(d0.locator("small").first).to_have_text("decoder · H200 · emulated")
    expect(d0.locator(".kv")).to_contain_text("of 40.0k tokens")
    expect(page.locator("#queue-empty")).to_contain_text("Nobody waits")
    expect(page.locator(".chart")).to_have_count(6)


def test_the_page_and_its_parts_are_locked_up(visit: Open, broker_url: str) -> None:
    window = visit()
    page, window.origin = window.page, broker_url
    answers = {}
    page.on("response", lambda response: answers.setdefault(response.url.removeprefix(broker_url), response))
    page.goto(broker_url + "/")
    expect(page.locator("[data-engine]")).to_have_count(3)
    policy = answers["/"].headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert {"/dashboard/app.js", "/dashboard/style.css", "/dashboard/charts.js"} <= set(answers)
    assert all(answer.ok for path, answer in answers.items() if path.startswith("/dashboard/"))
    # Nothing from outside could run: neither by markup nor by a script of its own.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in window.errors.pop()


def test_a_grant_shows_at_once(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    expect(page.locator("#leases")).to_have_text("0")
    before = int(page.locator("#grants").inner_text())
    lease = agent.grant("watched", tokens=4_000)
    expect(page.locator("#leases")).to_have_text("1")
    expect(page.locator("#lease-note")).to_have_text("busy 1, idle 0, parked 0")
    expect(page.locator("#grants")).to_have_text(str(before + 1))
    held = row(page, lease.decoder.engine_id)
    expect(held.locator(".kv")).to_contain_text("ledger 10 % 4,000")
    assert held.locator(".bar .active").evaluate("part => part.style.width") == "10%"
    report = {"kind": "turn_finished", "token": lease.token, "prompt_tokens": 8_000, "migrated": True}
    agent.http.post("/v1/reports", json={"reports": [report]})
    expect(page.locator("#lease-note")).to_have_text("busy 0, idle 1, parked 0")
    expect(held.locator(".kv")).to_contain_text("ledger 20 % 8,000")
    agent.release_all()
    expect(page.locator("#leases")).to_have_text("0")


def test_who_waits_is_seen_waiting(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    agent.grant("full-0", tokens=30_000)
    agent.grant("full-1", tokens=30_000)
    thread = agent.wait("patient", tokens=20_000)
    expect(page.locator("#waiting")).to_have_text("1")
    expect(page.locator("#queue li")).to_contain_text("patient")
    expect(page.locator("#queue li small")).to_contain_text("needs 20.0k tokens of emulated")
    expect(page.locator("#queue-empty")).to_be_hidden()
    agent.release_all()
    thread.join(BUDGET_MS / 1000)
    expect(page.locator("#queue-empty")).to_be_visible()
    expect(page.locator("#waiting-note")).to_have_text("nobody waits")


def test_a_lease_is_explained_in_words(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    lease = agent.grant("to-explain", tokens=3_000)
    other = agent.grant("another")
    page.get_by_label("Lease or conversation id").fill(lease.lease_id)
    page.keyboard.press("Enter")
    words = page.locator(".words")
    expect(words).to_contain_text("Conversation to-explain")
    expect(words).to_contain_text(f"Its decoder is {lease.decoder.engine_id}, because it had the lowest load")
    expect(words).to_contain_text("The prompt is prefilled on p0, because the preset always uses a prefiller")
    expect(page.locator("tr.chosen")).to_have_count(2)
    page.locator("#find-id").fill("another")
    page.get_by_role("button", name="Explain").click()
    expect(words).to_contain_text("Conversation another")
    expect(page.locator("#found h3").first).to_have_text(other.lease_id)
    page.locator("#find-id").fill("")
    page.keyboard.press("Enter")
    expect(page.locator(".pick")).to_have_count(2)
    page.locator(".pick").first.click()
    expect(words).to_contain_text("Conversation to-explain")
    page.locator("#find-id").fill("<b>nobody</b>")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_contain_text("No live lease has the id or the conversation <b>nobody</b>")


def test_an_engine_is_drained_after_a_question(visit: Open, broker_url: str, agent: Agent) -> None:
    page = visit().open(broker_url)
    agent.grant("on-it")
    button = page.get_by_role("button", name="Drain d0")
    button.click()
    dialog = page.get_by_role("dialog", name="Drain d0?")
    expect(dialog).to_contain_text("It gets no new lease")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    assert not agent.http.get("/v1/engines/d0").json()["draining"]
    button.click()
    dialog.get_by_role("button", name="Drain").click()
    expect(row(page, "d0").locator(".badge")).to_contain_text("draining")
    expect(page.locator("#strip")).to_have_text("d0 is draining.")
    assert agent.http.get("/v1/engines/d0").json()["draining"]
    page.get_by_role("button", name="Undrain d0").click()
    page.get_by_role("dialog").get_by_role("button", name="Undrain").click()
    expect(row(page, "d0").locator(".badge")).to_contain_text("ready")
    assert not agent.http.get("/v1/engines/d0").json()["draining"]


def test_it_asks_for_a_key_where_the_broker_does(
    visit: Open, broker_url: str, with_keys: Callable[[Page, str], None]
) -> None:
    window = visit()
    page = window.page
    window.origin = broker_url
    with_keys(page, "right")
    page.goto(broker_url + "/")
    dialog = page.get_by_role("dialog", name="This broker asks for a key")
    expect(dialog).to_be_visible()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("lacks the scope admin")
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(page.locator("[data-engine]")).to_have_count(3)
    expect(dialog).to_be_hidden()
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "right" not in kept
    page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#strip")).to_contain_text("wants a key with the scope admin")


def test_a_broker_that_goes_and_comes_back(visit: Open, broker_process: BrokerProcess) -> None:
    page = visit().open(broker_process.url)
    expect(page.locator("#strip")).to_have_text("All well: new conversations are served.")
    broker_process.grant("before")
    expect(page.locator("#leases")).to_have_text("1")

    broker_process.signal(signal.SIGSTOP)
    expect(page.locator("#link")).to_have_attribute("data-link", "stale")
    expect(page.locator("#strip")).to_contain_text("No word from the broker for")
    expect(page.locator("#main")).to_have_attribute("data-state", "old")
    broker_process.signal(signal.SIGCONT)
    expect(page.locator("#link")).to_have_attribute("data-link", "live")

    broker_process.kill()
    expect(page.locator("#link")).to_have_attribute("data-link", "lost")
    expect(page.locator("#strip")).to_contain_text("Disconnected")
    expect(page.locator("#strip")).to_contain_text("The figures are from")
    expect(page.locator("#leases")).to_have_text("1")  # what is known stays, and is said to be old
    broker_process.start()
    expect(page.locator("#link")).to_have_attribute("data-link", "live")
    expect(page.locator("#strip")).to_have_text("All well: new conversations are served.")
    broker_process.grant("after")
    expect(page.locator("#leases")).to_have_text("2")
