"""What tests of the search page share: the application without Ray, and a page that is watched for faults."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import free_port


@contextmanager
def site_in_process(index: Path, *, change: Callable[[Any], None] = lambda _: None, **args: Any) -> Iterator[str]:
    """The address of the whole application over `index`, in this process; `change` may put something else into its
    searcher.
    """
    import uvicorn

    from raydr.serve.colocated import colocated_searcher
    from raydr.serve.config import AppArgs
    from raydr.serve.http import build_http

    settings = AppArgs.model_validate({"index": index, **args})
    searcher = colocated_searcher(settings, num_shard_deployments=2)
    change(searcher)
    app = build_http(searcher, settings)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))

    async def run() -> None:
        await searcher.use(str(index))
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@contextmanager
def watched_page(browser: Any, site: str, name: str) -> Iterator[Any]:
    """A page in a fresh profile; a script error, a missing file or a breach of the CSP on it fails the test.

    RAYDR_SHOTS: a folder that keeps a picture of it as it is in the end, under `name`.
    """
    context = browser.new_context(base_url=site, viewport={"width": 1100, "height": 860}, color_scheme="light")
    context.set_default_timeout(120_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("response", lambda response: faults.append(response.url) if response.status == 404 else None)
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    if shots := os.environ.get("RAYDR_SHOTS"):
        page.screenshot(path=Path(shots) / f"{name}.png")
    context.close()
    assert not faults


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 || !element.parentElement ? colour : ground(element.parentElement);
  };
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const texts = [...document.querySelectorAll("body *")].filter(hasText);
  return texts.filter((element) => element.checkVisibility()).map((element) => {
    const pair = [luminance(rgba(getComputedStyle(element).color)), luminance(ground(element))];
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.outerHTML];
  });
}"""
"""The contrast ratio of every visible text with the ground behind it, as WCAG defines it."""
