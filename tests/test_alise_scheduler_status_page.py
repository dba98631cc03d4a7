"""The status page in a real browser: what it shows, and that it stays quick and harmless.

Needs Chromium on the PATH (Debian: `apt-get install chromium`), and the Python package `playwright`
of the extra `dev`, which drives it; nothing is downloaded.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alise_scheduler.quality import Quality
from alise_scheduler.v1 import scheduler_pb2 as pb
from scheduler_fakes import FakePredictor, finished, progress
from status_harness import STEP, MadeUpEngine, sidecar_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra 'dev' (playwright)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium (or another one on PATH)"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page; a complaint of the browser about it fails the test."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            message.type == "error"
            and "Failed to load resource" not in message.text
            and complaints.append(message.text)
        ),
    )
    yield page
    assert not complaints
    context.close()


def expect(page: Any, selector: str, text: str) -> None:
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=60_000)


def test_it_follows_the_queue(page: Any, tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        page.goto(engine.url)
        expect(page, "#empty", "No engine is connected.")
        engine.connect(slots=2)
        expect(page, "#empty", "the engine is idle")
        engine.send(
            engine.arrive("<b>long</b>", ago_s=20, tokens=900),
            engine.arrive("short", ago_s=10, tokens=5),
            progress("short", 2, new=2),
        )
        expect(page, "#rows tr:nth-child(1)", "short")
        expect(page, "#rows tr:nth-child(1)", "▲ 1")
        expect(page, "#rows tr:nth-child(2)", "<b>long</b>")  # as text
        expect(page, "#rows tr:nth-child(2)", "passed by 1 that came later: short")
        expect(page, "#running", "1 of 2 slots")
        assert "predicted 450 to 1800, median 900" in page.locator(
            "#rows tr:nth-child(2) .track"
        ).get_attribute("aria-label")
        engine.send(finished("short", 4))
        expect(page, "#running-note", "1 finished")


def test_ten_thousand_jobs_stay_quick(page: Any, tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.crowd(10_000)
        page.goto(engine.url)
        expect(page, "#range", "1 to 50 of 10,000")
        assert page.locator("#rows tr").count() == 50
        page.get_by_role("button", name="Next").click()
        expect(page, "#range", "51 to 100 of 10,000")
        page.locator('label:has-text("Queue")').click()
        expect(page, "#range", "1 to 50 of 9,996")
        page.get_by_label("Job id").fill("09999")
        expect(page, "#range", "1 to 1 of 1")
        expect(page, "#rows", "09999")
        # What a refresh costs the reader's browser; the bound is loose, as machines differ.
        page.get_by_label("Job id").fill("")
        expect(page, "#range", "1 to 50 of 9,996")
        render_ms = page.evaluate(
            "() => { const t = performance.now(); for (let i = 0; i < 20; i++) render(view.last);"
            " document.body.offsetHeight; return (performance.now() - t) / 20 }"
        )
        assert render_ms < 200


def test_it_is_used_with_the_keyboard_alone(page: Any, tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        engine.connect()
        engine.crowd(60)
        page.goto(engine.url)
        expect(page, "#range", "1 to 50 of 60")
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.id || document.activeElement.name")
            )
        assert {"pause", "state", "search", "next"} <= set(reached)
        page.locator("input[name=state]").first.focus()
        page.keyboard.press("ArrowRight")
        expect(page, "#range", "1 to 4 of 4")


def test_a_sidecar_that_goes_away_is_noticed_and_found_again(page: Any, tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        page.goto(engine.url)
        expect(page, "#link", "live")
    expect(page, "#link", "no answer")
    expect(page, "#notice", "The engine serves on")


def test_pausing_stops_the_questions(page: Any, tmp_path: Path) -> None:
    with sidecar_page(tmp_path) as engine:
        page.goto(engine.url)
        expect(page, "#link", "live")
        page.get_by_role("button", name="Pause").click()
        expect(page, "#link", "paused")
        page.wait_for_timeout(200)  # a question that was under way
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(2500)
        assert not asked


def draw(engine: MadeUpEngine, rng: random.Random, jobs: int = 70, slots: int = 16) -> None:
    """Make up a busy engine with some history."""
    ids = [f"chatcmpl-{rng.getrandbits(128):032x}" for _ in range(jobs)]
    tokens = [int(min(rng.lognormvariate(4.9, 0.8), 900)) + 4 for _ in ids]
    engine.send(*[pb.Event(step=STEP)] * 40)
    engine.send(
        *(engine.arrive(j, ago_s=(jobs - i) * 0.7, tokens=tokens[i]) for i, j in enumerate(ids))
    )
    busy = [*range(slots - 5), *sorted(range(slots, jobs), key=lambda i: tokens[i])[:5]]
    engine.send(*(progress(ids[i], rng.randint(1, tokens[i])) for i in busy))
    out = busy[:2]
    engine.send(
        *(pb.Event(preempted=pb.JobPreempted(job_id=ids[i], output_tokens=900)) for i in out)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_in_light_and_dark(browser: Any, tmp_path: Path, scheme: str) -> None:
    predictor = FakePredictor(model_version=7)
    predictor.model_trained_unix_s, predictor.sample_count = time.time() - 840, 4120
    predictor.quality = lambda: Quality(500, 0.547, 61.2, 0.52, 0.91, False)
    with sidecar_page(tmp_path, predictor) as engine:
        engine.connect(slots=16)
        draw(engine, random.Random(4))
        for width in (1440, 800, 400):
            page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
            page.goto(engine.url)
            expect(page, "#range", "of 70")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width
            folder = os.environ.get("ALISE_SCREENSHOTS")
            if folder:
                page.wait_for_timeout(4000)
                page.screenshot(path=Path(folder) / f"status-{scheme}-{width}.png")
            page.close()
