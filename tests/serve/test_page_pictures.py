"""Pictures on the search page, in a real Chromium: chosen, dropped, pasted, shown; only where the server reads them.

pytest tests/serve/test_page_pictures.py            RAYDR_SHOTS=/tmp/shots keeps a picture of each state
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pages import CONTRAST, site_in_process, watched_page
from PIL import Image
from tiny_pictures import picture, sent

from raydr.types import Query
from raydr.verbs.serve import ask as raydr_ask

pytestmark = pytest.mark.browser

RERANKERS = {"word": {"import_path": "tiny_pictures:WordReranker"}}


@pytest.fixture(scope="module")
def site(pictures: Path) -> Iterator[str]:
    with site_in_process(pictures, rerankers=RERANKERS) as address:
        yield address


@pytest.fixture
def page(browser, site, request):
    with watched_page(browser, site, request.node.name) as page:
        yield page


def ask(site: str, **request) -> list[str]:
    """The ids of the hits the API gives for the same request."""
    answer = httpx.post(f"{site}v1/search", json=request, timeout=30).raise_for_status().json()
    return [hit["id"] for hit in answer["hits"]]


def hit_ids(page) -> list[str]:
    page.locator("main[aria-busy=false] .hit").first.wait_for()
    return page.locator(".hit").evaluate_all("hits => hits.map(hit => hit.dataset.id)")


def choose(page, name: str, content: bytes, kind: str = "image/png") -> None:
    page.get_by_role("button", name="Add a picture to the query").wait_for()
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def give(page, event: str, content: bytes, kind: str = "image/png") -> None:
    """What the browser sends a page where a file is dropped, or pasted."""
    page.get_by_role("button", name="Add a picture to the query").wait_for()
    page.evaluate(
        """([event, content, type]) => {
          const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([bytes], "given.png", { type }));
          const target = document.getElementById("heading");
          const init = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
          if (event === "paste") return target.dispatchEvent(new ClipboardEvent("paste", init));
          for (const name of ["dragover", "drop"]) target.dispatchEvent(new DragEvent(name, init));
        }""",
        [event, sent(content), kind],
    )


@pytest.mark.parametrize("how", ["choose", "drop", "paste"])
def test_a_picture_is_searched_with_however_it_comes(page, site, how):
    page.goto("/")
    if how == "choose":
        choose(page, "red.png", picture("red"))
    else:
        give(page, how, picture("red"))
    assert hit_ids(page) == ask(site, image=sent(picture("red")))
    assert page.get_by_role("status").inner_text() == "6 results for a picture"
    thumbnail = page.get_by_role("img", name="The query's picture: ")
    assert thumbnail.evaluate("image => image.complete && image.naturalWidth") == 48
    assert "red.png" in thumbnail.get_attribute("alt") or how != "choose"
    assert page.evaluate("document.activeElement.id") == "q"
    assert page.locator("body.dropping").count() == 0


def test_a_demo_asks_the_same_of_its_server(site):
    asked = Query("query", "yellow lemon", picture("red"), "Find words.")
    hits = raydr_ask(site.rstrip("/"), asked, k=3)
    expected = {"query": "yellow lemon", "image": sent(picture("red")), "instruction": "Find words.", "k": 3}
    assert [hit["id"] for hit in hits] == ask(site, **expected)
    assert ask(site, **{**expected, "image": sent(picture("blue"))}) != ask(site, **expected)


def test_words_and_an_instruction_are_added_and_back_and_reload_keep_the_picture(page, site):
    page.goto("/")
    choose(page, "red.png", picture("red"))
    alone = hit_ids(page)
    page.get_by_role("searchbox", name="Query").fill("yellow lemon")
    page.get_by_label("Looking for").fill("Find words.")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=yellow+lemon**")
    both = {"query": "yellow lemon", "image": sent(picture("red")), "instruction": "Find words."}
    assert hit_ids(page) == ask(site, **both) != alone
    page.reload()
    assert hit_ids(page) == ask(site, **both)
    page.go_back()
    page.wait_for_url("**/")
    assert hit_ids(page) == alone
    page.go_forward()
    page.wait_for_url("**q=yellow+lemon**")
    page.get_by_role("button", name="Remove the picture").click()
    assert hit_ids(page) == ask(site, query="yellow lemon", instruction="Find words.")
    assert page.locator("#picture").is_hidden()


def test_hits_with_pictures_are_shown_with_them_in_order(page, site):
    page.goto("/?q=the+blue+sea")
    assert hit_ids(page) == ask(site, query="the blue sea")
    shown = page.locator(".hit img")
    assert shown.evaluate_all("images => images.map((image) => image.naturalWidth)") == [40] * 4
    assert set(shown.evaluate_all("images => images.map((image) => image.alt)")) == {
        "An ellipse like the sea.",
        "Meadow",
        "A lemon.",
        "Picture red",
    }
    assert shown.first.get_attribute("loading") == "lazy"
    # Left to right and down: the eye meets them as they rank.
    boxes = page.locator(".hit").evaluate_all("hits => hits.map((hit) => [hit.offsetTop, hit.offsetLeft])")
    assert boxes == sorted(boxes)
    card = page.locator(".hit[data-id=blue]")
    card.get_by_role("button", name="Sea", exact=True).click()
    assert card.get_by_role("button", name="Sea", exact=True).get_attribute("aria-expanded") == "true"
    card.get_by_role("button", name="Search with this picture").click()
    page.get_by_role("button", name="Remove the picture").wait_for()
    page.wait_for_url("**/")
    assert hit_ids(page) == ask(site, image=sent(picture("blue")))
    page.keyboard.press("Escape")
    assert page.locator(".hit").count() == 0
    assert page.locator("#picture").is_hidden()


def test_a_mode_that_searches_by_words_is_not_offered_to_a_picture_alone(page, site):
    page.goto("/?q=noon&mode=bm25")
    assert hit_ids(page) == ["sky"]
    choose(page, "red.png", picture("red"))
    page.locator("#picture").wait_for()
    assert hit_ids(page) == ask(site, query="noon", image=sent(picture("red")))
    assert page.get_by_label("Dense").is_checked()
    assert page.get_by_label("BM25").is_disabled()
    page.get_by_label("Hybrid").check(force=True)
    page.wait_for_url("**mode=hybrid**")
    assert hit_ids(page) == ask(site, query="noon", image=sent(picture("red")), mode="hybrid")
    page.get_by_role("searchbox", name="Query").fill("")
    page.keyboard.press("Enter")
    page.wait_for_url("**/")
    assert hit_ids(page) == ask(site, image=sent(picture("red")))
    assert page.get_by_label("Hybrid").is_disabled()


def test_a_large_picture_is_made_smaller_and_a_transparent_one_white_before_it_is_sent(page):
    large = Image.effect_noise((1300, 900), 80).convert("RGBA")
    large.putalpha(0)
    file = io.BytesIO()
    large.save(file, "PNG", compress_level=0)
    assert len(file.getvalue()) > 4 << 20  # more than the server's body
    page.goto("/")
    with page.expect_request("**/v1/search") as request:
        choose(page, "large.png", file.getvalue())
    head, _, coded = request.value.post_data_json["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(coded)))
    assert seen.size == (1024, 709)
    assert seen.getextrema() == ((255, 255),) * 3
    assert len(hit_ids(page)) == 6


def test_what_is_no_picture_and_what_cannot_be_reranked_is_said(page):
    page.goto("/?rerank=word")
    choose(page, "notes.png", b"no picture")
    page.get_by_text("notes.png is no picture that this browser can read.").first.wait_for()
    choose(page, "red.png", picture("red"))
    page.get_by_role("heading", name="The server refused this search").wait_for()
    assert "reads no pictures" in page.locator("#notice").inner_text()


@pytest.mark.parametrize("width", [320, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_every_text_has_contrast(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.goto("/?q=the+blue+sea&instruction=Find+a+picture.")
    choose(page, "red.png", picture("red"))
    hit_ids(page)
    page.locator(".hit .open").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ratios = page.evaluate(CONTRAST)
    assert min(ratios)[0] >= 4.5, min(ratios)


def test_a_server_of_words_is_offered_no_pictures(browser, animals, request):
    with site_in_process(animals) as site, watched_page(browser, site, request.node.name) as page:
        page.goto("/?q=cat")
        page.get_by_role("heading", name=re.compile("6 passages")).wait_for()
        found = hit_ids(page)
        assert page.get_by_role("button", name="Add a picture to the query").is_hidden()
        assert page.get_by_label("Looking for").is_hidden()
        page.evaluate(
            "dispatchEvent(new ClipboardEvent('paste', {clipboardData: new DataTransfer(), cancelable: true}))"
        )
        assert len(found) == 6
        assert hit_ids(page) == found
        assert page.locator("#results.gallery").count() == 0
