"""Explanations on the search page, in a real Chromium: bars, words, an address that keeps them.

pytest tests/serve/test_page_explain.py            RAYDR_SHOTS=/tmp/shots keeps a picture of each state
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pages import site_in_process, watched_page
from test_explain import QUERY, vdr  # noqa: F401 (a fixture)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(vdr: Path) -> Iterator[str]:  # noqa: F811
    with site_in_process(vdr) as address:
        yield address


def test_a_hit_shows_its_words(browser, site, request):
    body = {"query": QUERY, "explain": True}
    hits = httpx.post(f"{site}v1/search", json=body, timeout=30).raise_for_status().json()["hits"]
    with watched_page(browser, site, request.node.name) as page:
        page.goto(f"/?q={QUERY}")
        page.locator("main[aria-busy=false] .hit").first.wait_for()
        assert page.locator(".matches").count() == 0
        page.get_by_label("Explain").check()
        page.locator(".hit .matches").first.wait_for()
        assert "explain=1" in page.url
        for number, hit in enumerate(hits):
            why, shown = hit["explanation"], page.locator(".hit").nth(number)
            tokens = [match["token"] for match in why["matches"]] + (["other words"] if why["rest"] > 0 else [])
            assert shown.locator(".matches dt").all_inner_texts() == tokens
            widths = shown.locator(".matches i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
            weights = [match["weight"] for match in why["matches"]] + ([why["rest"]] if why["rest"] > 0 else [])
            assert widths == pytest.approx([100 * weight / max(weights) for weight in weights], abs=0.1)
        first = page.locator(".hit").first
        assert not first.locator(".cloud li").first.is_visible()
        first.locator(".cloud summary").click()
        words = first.locator(".cloud li")
        assert set(words.all_inner_texts()) == {word["token"] for word in hits[0]["explanation"]["passage"]}
        page.reload()
        page.locator(".hit .matches").first.wait_for()
        assert page.get_by_label("Explain").is_checked()


def test_a_dense_index_offers_none(browser, animals, request):
    with site_in_process(animals) as site, watched_page(browser, site, request.node.name) as page:
        page.goto("/?q=cat&explain=0")
        page.locator("main[aria-busy=false] .hit").first.wait_for()
        assert page.get_by_label("Explain").is_hidden()
