"""The search page in a real Chromium, against the really served application, without Ray.

Notable: the corpus holds a passage that tries to be markup and one whose highlights lie behind an emoji; every answer
of the page is compared with what the HTTP API gives for the same request. Only failures that cannot be caused here
(a lost connection, a bug in the server) are put in the way of the request by the browser. Skipped where there is no
Chromium, failed for it in CI.

    pytest tests/serve/test_page.py            RAYDR_SHOTS=/tmp/shots keeps a picture of each state
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pages import CONTRAST, site_in_process, watched_page

from raydr.serve.errors import ApiError

pytestmark = pytest.mark.browser

KEY = "a key for this test"
PASSAGES = [  # id, title, text, kind
    ("cat", "Cat", "A small furry animal that purrs and hunts mice at night.", "animal"),
    ("dog", "Dog", "A loyal animal that barks, guards the house and follows people.", "animal"),
    ("compass", "Compass", "An instrument whose magnetic needle points north and guides sailors.", "thing"),
    ("faiss", "", "A library for nearest neighbour search among dense vectors.", "software"),
    ("moon", "Moon", "The natural satellite of the Earth; its pull causes the tides.", "thing"),
    ("ray", "Cluster computing", "A system that runs Python functions on many machines.", "software"),
]
HOSTILE = {
    "_id": "hostile<b>id</b>",
    "title": '<img src=x onerror="window.pwned = 1"> markup',
    "text": "<script>window.pwned = 1</script> hostile markup &amp; \N{PARTY POPPER} a harmless sentence",
    "kind": "<i onclick=alert(1)>odd</i>",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index over the passages above, made by the verbs."""
    from raydr.config import validate
    from raydr.verbs import embed, index
    from raydr.verbs.config import RunConfig

    folder = tmp_path_factory.mktemp("page")
    rows = [{"_id": id_, "title": title, "text": text, "kind": kind} for id_, title, text, kind in PASSAGES]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, HOSTILE]), encoding="utf-8")
    config = {"out": folder / "out", "runtime": "local", "data": {"path": str(folder)}, "index": {"num_shards": 2}}
    run = validate(RunConfig, config, where="this test")
    embed.embed(run)
    return index.index(run).path


@pytest.fixture(scope="module")
def site(index: Path) -> Iterator[str]:
    """Address of the page; test_serve_run_ray.py has it from Ray Serve."""
    path = "raydr.encoders.cross_encoder:CrossEncoderReranker"  # on an encoder its head is new: some order or other
    rerankers = {"cross-encoder": {"import_path": path, "args": {"model": "minilm", "precision": "float32"}}}
    with site_in_process(index, rerankers=rerankers) as address:
        yield address


@pytest.fixture(scope="module")
def keyed_site(index: Path) -> Iterator[str]:
    """The same behind an API key with a rate limit."""
    key = {"name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "requests_per_minute": 20, "burst": 6}
    with site_in_process(index, api_keys=[key]) as address:
        yield address


@pytest.fixture(scope="module")
def failing_site(index: Path) -> Iterator[str]:
    """The same with a reranker whose language model is gone."""
    with site_in_process(index, rerankers={"gone": {"import_path": "tiny_serving:FailingReranker"}}) as address:
        yield address


@pytest.fixture(scope="module")
def halved_site(index: Path) -> Iterator[str]:
    """The same without its second shard."""

    def without_the_second(searcher: Any) -> None:
        searcher._shards[1] = Lost(searcher._shards[1])

    with site_in_process(index, change=without_the_second) as address:
        yield address


class Lost:
    """The handle of a Shard deployment whose replica came up and then died for good."""

    def __init__(self, handle: Any) -> None:
        self.prepare, self.broadcast = handle.prepare, handle.broadcast
        self.search = SimpleNamespace(remote=self._search)

    async def _search(self, *_: Any) -> None:
        raise ApiError(503, "unavailable", "a part of this server is restarting", retry_after_s=1.0)


@pytest.fixture
def page(browser, site, request):
    with watched_page(browser, site, request.node.name) as page:
        yield page


def ask(site: str, **request) -> list[dict]:
    """The hits the API gives for the same request."""
    return httpx.post(f"{site}v1/search", json=request, timeout=30).raise_for_status().json()["hits"]


def hit_ids(page) -> list[str]:
    page.locator(".hit").first.wait_for()
    return page.locator(".hit").evaluate_all("hits => hits.map(hit => hit.dataset.id)")


def search(page, text: str) -> None:
    page.get_by_role("searchbox", name="Query").fill(text)
    page.keyboard.press("Enter")


def test_a_search_shows_what_the_api_answers(page, site):
    page.goto("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.get_by_role("heading", name="Search 7 passages").wait_for()
    search(page, "a pet that catches mice")
    hits = ask(site, query="a pet that catches mice")
    assert hit_ids(page) == [hit["id"] for hit in hits]
    first = page.locator(".hit").first
    assert first.get_by_role("button", name=hits[0]["title"]).is_visible()
    assert first.locator(".score").inner_text() == f"{hits[0]['score']:.4f}"
    assert page.get_by_role("status").inner_text() == f"{len(hits)} results for a pet that catches mice"
    assert page.title().startswith("a pet that catches mice")
    assert "encode" in page.locator("#legend").inner_text()
    widths = page.locator("#stages i").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    assert sum(widths) == pytest.approx(page.locator("#stages").bounding_box()["width"], abs=len(widths) + 1)


@pytest.mark.parametrize("mode", ["bm25", "hybrid"])
def test_switching_the_mode_searches_again(page, site, mode):
    page.goto("/?q=needle+of+a+compass")
    dense = hit_ids(page)
    page.get_by_label({"bm25": "BM25", "hybrid": "Hybrid"}[mode]).check(force=True)
    page.wait_for_url(f"**mode={mode}**")
    page.locator("main[aria-busy=false]").wait_for()
    hits = ask(site, query="needle of a compass", mode=mode)
    assert hit_ids(page) == [hit["id"] for hit in hits]
    assert dense == [hit["id"] for hit in ask(site, query="needle of a compass")]


def test_a_reranker_can_be_switched_on(page, site):
    page.goto("/?q=needle+of+a+compass")
    dense = ask(site, query="needle of a compass")
    assert hit_ids(page) == [hit["id"] for hit in dense]
    page.get_by_label("Rerank").select_option("cross-encoder")
    page.wait_for_url("**rerank=cross-encoder**")
    page.locator("main[aria-busy=false]").wait_for()
    hits = ask(site, query="needle of a compass", rerank=True)
    assert hit_ids(page) == [hit["id"] for hit in hits]
    assert sorted(hit_ids(page)) == sorted(hit["id"] for hit in dense)
    assert page.locator(".hit .score").first.get_attribute("title").startswith("reranker's score; found with")
    assert "rerank" in page.locator("#legend").inner_text()
    page.go_back()
    page.locator("main[aria-busy=false]").wait_for()
    assert page.get_by_label("Rerank").input_value() == ""


def test_a_reranker_that_fails_leaves_the_first_order_and_says_so(page, failing_site):
    page.goto(f"{failing_site}?q=needle+of+a+compass&rerank=gone")
    page.get_by_role("heading", name="Not reranked").wait_for()
    assert "has stopped" in page.locator("#notice").inner_text()
    assert hit_ids(page) == [hit["id"] for hit in ask(failing_site, query="needle of a compass")]


def test_a_shard_that_fails_leaves_the_hits_of_the_others_and_says_so(page, halved_site):
    page.goto(f"{halved_site}?q=needle+of+a+compass")
    page.get_by_role("heading", name="Not everything was searched").wait_for()
    body = {"query": "needle of a compass", "on_shard_failure": "partial"}
    answer = httpx.post(f"{halved_site}v1/search", json=body, timeout=30).json()
    (missing,) = answer["missing_shards"]
    shown = page.locator("#notice").inner_text()
    assert f"Shard 1 did not answer, so {missing['num_passages']} passages are not among these results." in shown
    assert hit_ids(page) == [hit["id"] for hit in answer["hits"]]
    assert page.get_by_role("button", name="Try again").is_enabled()


def test_a_link_is_a_search_and_back_returns_to_the_one_before(page, site):
    filters = json.dumps({"kind": "animal"})
    page.goto(f"/?q=dog&mode=bm25&k=5&filters={filters}")
    assert hit_ids(page) == [hit["id"] for hit in ask(site, query="dog", mode="bm25", k=5, filters={"kind": "animal"})]
    assert page.get_by_label("BM25").is_checked()
    assert page.get_by_label("Results", exact=True).locator("visible=true").first.is_visible()
    assert page.locator("#k").input_value() == "5"
    assert page.locator("#filters").inner_text() == "kind: animal"
    search(page, "cat")
    page.wait_for_url("**q=cat**")
    page.go_back()
    page.wait_for_url("**q=dog**")
    assert page.locator("#q").input_value() == "dog"
    assert hit_ids(page)[0] == "dog"


def test_a_chip_filters_and_is_taken_away_again(page, site):
    page.goto("/?q=an+animal+at+night")
    everything = hit_ids(page)
    page.get_by_title("Only kind: animal").first.click()
    page.locator("#filters button").wait_for()
    page.locator("main[aria-busy=false]").wait_for()
    assert set(hit_ids(page)) == {"cat", "dog"}
    page.locator("#filters button").click()
    page.locator("#filters button").wait_for(state="detached")
    page.locator("main[aria-busy=false]").wait_for()
    assert hit_ids(page) == everything


def test_the_keyboard_is_enough(page):
    page.goto("/?q=an+animal")
    page.locator(".hit").first.wait_for()
    ranks = "document.activeElement.closest('.hit')?.querySelector('.rank').textContent"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(ranks) == "1"
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(ranks) == "3"
    page.keyboard.press("k")
    assert page.evaluate(ranks) == "2"
    opened = page.locator(".hit").nth(1).locator("[aria-expanded]")
    page.keyboard.press("Enter")
    assert opened.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Enter")
    assert opened.get_attribute("aria-expanded") == "false"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "q"
    page.locator(".hit .open").first.focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    assert page.locator("#q").input_value() == "an animal"
    page.keyboard.press("Escape")
    assert page.locator("#q").input_value() == ""
    assert page.locator(".hit").count() == 0


def test_highlights_are_where_the_server_says(page, site):
    page.goto("/?q=harmless+markup&mode=bm25")
    (hit,) = ask(site, query="harmless markup", mode="bm25")
    words = [hit["text"][start:end] for start, end in hit["highlights"]["text"]]
    assert "harmless" in words
    page.locator(".hit .open").click()
    assert page.locator(".text mark").all_inner_texts() == words
    assert page.locator(".text").evaluate("element => element.textContent") == hit["text"]


def test_text_from_the_corpus_never_becomes_markup(page, site):
    policy = httpx.get(site).headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    page.goto("/?q=hostile+markup&mode=bm25")
    page.locator(".hit .open").click()
    hit = page.locator(".hit")
    assert hit.locator("h2").inner_text() == HOSTILE["title"]
    assert hit.locator(".id").inner_text() == HOSTILE["_id"]
    assert hit.locator(".chips button").first.inner_text() == f"kind: {HOSTILE['kind']}"
    assert page.evaluate("window.pwned") is None
    assert page.locator("#results :is(img, script, b, i)").count() == 0
    page.goto(f"/?q={'<img src=x onerror=window.pwned=1>'}&filters=" + json.dumps({"<b>": "<i>"}))
    page.locator("#notice h2").wait_for()
    assert page.evaluate("window.pwned") is None


def test_nothing_found_says_so(page):
    page.goto("/?q=zzyzx&mode=bm25")
    page.get_by_role("heading", name="Nothing found").wait_for()
    assert page.locator(".hit").count() == 0


def test_a_server_with_keys_is_asked_with_one(page, keyed_site):
    page.goto(f"{keyed_site}?q=dog")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="refused").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    assert hit_ids(page)[0] == "dog"
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    assert hit_ids(page)[0] == "dog"


def test_too_many_requests_says_when_to_come_back(page, keyed_site):
    page.goto(keyed_site)
    page.evaluate("key => sessionStorage.setItem('raydr-api-key', key)", KEY)
    for count in range(8):
        search(page, f"dog {count}")
        page.locator("main[aria-busy=false]").wait_for()
        if page.get_by_role("heading", name="Too many requests").is_visible():
            break
    retry = page.get_by_role("button", name=re.compile(r"^Try again in \d+ s$"))
    assert retry.is_disabled()
    page.get_by_role("button", name=re.compile("^Try again$")).click()
    assert hit_ids(page)[0] == "dog"


def test_a_lost_connection_and_a_bug_of_the_server_are_told_apart(page):
    page.route("**/v1/search", lambda route: route.abort())
    page.goto("/?q=dog")
    page.get_by_role("heading", name="No connection").wait_for()
    body = {"error": {"message": "Internal error", "type": "server_error", "param": None, "code": "internal_error"}}
    page.unroute("**/v1/search")
    page.route("**/v1/search", lambda route: route.fulfill(status=500, json=body, headers={"X-Request-ID": "r-17"}))
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("Internal error (request r-17)", exact=True).wait_for()
    page.unroute("**/v1/search")
    page.get_by_role("button", name="Try again").click()
    assert hit_ids(page)[0] == "dog"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_in_both_schemes(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto("/?q=an+animal&filters=" + json.dumps({"kind": "animal"}))
    page.locator(".hit .open").first.click()
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 20
    assert min(ratios)[0] >= 4.5, min(ratios)  # WCAG AA


def test_the_theme_follows_the_system_until_the_button_is_pressed(page):
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.goto("/")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.get_by_role("button", name="Switch between light and dark").click()
    assert ground() == light
    page.reload()
    assert ground() == light


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_sticks_out_at_any_width(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    page.goto("/?q=markup+of+a+hostile+animal&filters=" + json.dumps({"kind": [HOSTILE["kind"], "animal", "thing"]}))
    page.locator(".hit .open").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
