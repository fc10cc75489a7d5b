"""The page at / in a real browser."""

from __future__ import annotations

import browsers
import httpx
import pytest
from serving import chat_ids, serving, text_alone, tiny_model


def test_it_loads_nothing_from_elsewhere(served):
    found = httpx.get(served.url)
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in found.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        part = httpx.get(f"{served.url}/{name}")
        assert part.status_code == 200
        assert "http" not in found.text + part.text.replace("HTTP ${", "")


@pytest.fixture
def opened():
    with browsers.started() as browser:
        page = browser.new_page()
        yield page, browsers.listen(page)


def test_adapters_side_by_side(opened, served, alone, tokenizer):
    page, problems = opened
    page.goto(served.url)
    page.wait_for_selector("#models input")
    assert sorted(page.locator("#models label").all_inner_texts()) == [" base", " blue", " green", " red"]
    page.fill("#prompt", "Who <b>are</b> you?")
    page.fill("#tokens", "12")
    page.locator("#models input[value=green]").uncheck()
    page.click("button")
    page.locator("#answers small.done").nth(2).wait_for()
    found = {
        each.locator("h2").text_content(): each.locator("pre").text_content()
        for each in page.locator("#answers article").all()
    }
    prompt = chat_ids(tokenizer, "Who <b>are</b> you?")
    assert found == {name: text_alone(alone[name], tokenizer, prompt, 12) for name in ("base", "blue", "red")}
    page.fill("#filter", "gre")
    assert page.locator("#models input[value=green]").count() == 1
    page.fill("#tokens", "9999")
    page.click("button")
    page.get_by_text("maximum context length").first.wait_for()
    assert [problem for problem in problems if "400" not in problem] == []


def test_with_a_key(opened, tokenizer, folder):
    page, _ = opened
    with serving(tiny_model(tokenizer), tokenizer, folder, api_keys=("one",)) as served:
        page.goto(served.url)
        page.get_by_text("no valid key").wait_for()
        page.fill("#key", "one")
        page.locator("#prompt").click()
        page.wait_for_selector("#models input")
        assert page.locator("#problem").text_content() == ""
