"""Takes the pictures of the search page in the documents from a running server, such as the one a demo leaves.

Notable: the picture shows what was really served, so its passages, scores and timings are real; run it again when the
page or the demo changes. Needs Chromium (`apt-get install chromium`, or the path in CHROMIUM).

    raydr demo                                                      (in one terminal)
    python docs/make_screenshot.py                                  (in another)
    python docs/make_screenshot.py --query "read a csv file" --scheme dark --out /tmp/page.png

    raydr demo-images                                               (with a picture, over its index)
    python docs/make_screenshot.py --mode dense --query "the same with dark skin tone" \
        --picture runs/demo_images/pictures/held_out/NAME.png --out docs/images/search_page_pictures.png
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]  # the rest is Playwright's default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--query", default="join two data frames on a column")
    parser.add_argument("--picture", type=Path, help="a picture to search with, beside the query")
    parser.add_argument("--instruction", default="", help="what is looked for")
    parser.add_argument("--mode", choices=["dense", "bm25", "hybrid"], default="hybrid")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "search_page.png")
    arguments = parser.parse_args()
    state = {"q": arguments.query, "mode": arguments.mode, "instruction": arguments.instruction}
    address = f"{arguments.url}?{urlencode({name: value for name, value in state.items() if value})}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(
            viewport={"width": 1100, "height": 860}, color_scheme=arguments.scheme, device_scale_factor=1.5
        )
        page.goto(address)
        if arguments.picture is not None:
            page.get_by_role("button", name="Add a picture to the query").wait_for()
            page.locator("#file").set_input_files(arguments.picture)
        answered = page.locator("#status").filter(has_text="result" if arguments.picture is None else "a picture")
        answered.wait_for(state="attached")
        page.reload()  # the first answer warms the server up; the picture shows the timings of the second
        answered.wait_for(state="attached")
        page.get_by_text("passages · index").wait_for()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.out)
        browser.close()
    print(arguments.out)


if __name__ == "__main__":
    main()
