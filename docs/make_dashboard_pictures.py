"""Takes the pictures of Ray's dashboard and of Prometheus in docs/watching.md while raydr runs.

Notable: what they show was really running, so jobs, datasets, trainings, deployments and rates are real. The demo does
everything in one cluster; it says its dashboard's address, and stays while it has a terminal.

    raydr demo size=1000 first=false                                                (in one terminal)
    prometheus --config.file=cluster/prometheus.yaml --storage.tsdb.path=/tmp/prometheus        (in another)
    python docs/make_dashboard_pictures.py --dashboard http://127.0.0.1:8265 --job 01000000     (in a third)

Needs Chromium (`apt-get install chromium`, or the path in CHROMIUM) and Pillow, which keeps the files small.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import FloatRect, Page, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
SHOWN = {"ray_datasets": "Ray Data Overview", "ray_serve": "Ingress"}
"""What stands on a page once it is there."""
PATIENCE_MS = 6000
"""Charts and tables come later, and nothing says that they have."""
TOKEN = Path("~/.ray/auth_token").expanduser()
QUERIES = {
    "prometheus_training": "sum by (phase) (rate(ray_raydr_train_seconds_total[1m]))",
    "prometheus_stages": "histogram_quantile(0.95, sum by (le, stage) (rate(ray_raydr_stage_latency_ms_bucket[1m])))",
}
"""Two of the Grafana dashboard's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="address of Ray's dashboard")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--job", default="01000000", help="Ray's id of the job to show")
    parser.add_argument("--range", default="15m", help="time that Prometheus shows")
    parser.add_argument("--only", nargs="*", help="names of the pictures to take (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    pages = {
        "ray_datasets": f"{arguments.dashboard}/#/jobs/{arguments.job}",
        "ray_serve": f"{arguments.dashboard}/#/serve/applications/raydr",
    }
    for name, query in QUERIES.items():
        asked = urlencode({"g0.expr": query, "g0.tab": 0, "g0.range_input": arguments.range})
        pages[name] = f"{arguments.prometheus}/classic/graph?{asked}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 880})
        page.set_default_timeout(120_000)
        if TOKEN.is_file():
            _sign_in(page, arguments.dashboard)
        for name in arguments.only or pages:
            page.goto(pages[name])
            if name in SHOWN:
                page.get_by_text(SHOWN[name]).first.wait_for()
            page.wait_for_timeout(PATIENCE_MS)
            file = arguments.out / f"{name}.png"
            page.screenshot(path=file, clip=_datasets(page) if name == "ray_datasets" else None)
            Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)
            print(file, file.stat().st_size)
        browser.close()


def _datasets(page: Page) -> FloatRect:
    """Opens the part of a job's page that Ray Data has; where it lies."""
    page.get_by_text("Ray Data Overview").click()
    page.wait_for_timeout(PATIENCE_MS)
    top = page.get_by_text("Ray Data Overview").evaluate("e => e.getBoundingClientRect().top")
    end = page.get_by_text("Ray Core Overview").evaluate("e => e.getBoundingClientRect().top")
    return {"x": 60, "y": top - 20, "width": 1140, "height": min(end, 880) - top}


def _sign_in(page: Page, dashboard: str) -> None:
    """As the dashboard's own form does."""
    token = TOKEN.read_text(encoding="utf-8").strip()
    page.request.post(f"{dashboard}/api/authenticate", headers={"Authorization": f"Bearer {token}"})


if __name__ == "__main__":
    main()
