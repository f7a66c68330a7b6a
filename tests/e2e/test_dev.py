"""The real webserver and daemon: an export is dropped, the sensor sees it, the graph materializes, a person looks."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from finetune.base_model.models import BaseModelRef
from lora_assets.cli.demo import EXAMPLES
from tests.e2e.conftest import PROGRAM, Loop, data_root, new_loop

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.e2e
DATE = "2026-06-01"
CHROMIUM = shutil.which("chromium")
# Where the README's picture is written when it shall be taken anew.
PICTURES = os.environ.get("PICTURES")
SELECTOR = {"repositoryLocationName": "lora_assets.definitions", "repositoryName": "__repository__"}


@dataclass
class Dev:
    loop: Loop
    url: str
    log: Path

    def query(self, query: str, **variables: Any) -> Any:
        answer = httpx.post(f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=60).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def wait(self, what: str, condition: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(1)
        raise AssertionError(f"{what} did not happen in {seconds:.0f} s:\n{self.log.read_text()[-6000:]}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def dev(tiny_model: BaseModelRef) -> Iterator[Dev]:
    with data_root() as root:
        yield from serve(new_loop(root, tiny_model))


def serve(loop: Loop) -> Iterator[Dev]:
    """The UI and daemon on a data root, until the caller is done."""
    loop.environment |= {"SENSOR_INTERVAL_SECONDS": "1"}
    log, port = loop.root / "dev.log", free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [PROGRAM, "dev", "--port", str(port)],
            env=loop.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Dev(loop, f"http://127.0.0.1:{port}", log)

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{server.url}/server_info", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    try:
        server.wait("the webserver's start", up, 300)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def browser_page(width: int) -> "Iterator[Page]":
    """A page of a real browser; whatever it is asked to find may take a while on a busy machine."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=120_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


RUNS = """query { runsOrError { ... on Runs { results {
    id status tags { key value } assetMaterializations { assetKey { path } partition } } } } }"""
PARTITIONS = """query($key: [String!]!) { assetNodeOrError(assetKey: {path: $key}) { ... on AssetNode {
    partitionKeys assetMaterializations { partition } } } }"""


@pytest.fixture(scope="module")
def run(dev: Dev) -> dict[str, Any]:
    """What the sensor made of the first date's files; they arrive while it watches."""
    started = dev.query(
        """mutation($selector: SensorSelector!) { startSensor(sensorSelector: $selector) {
            __typename ... on PythonError { message } } }""",
        selector={**SELECTOR, "sensorName": "export_arrival"},
    )
    assert started["startSensor"]["__typename"] == "Sensor", started
    for file in sorted(EXAMPLES.glob(f"*{DATE}*")):
        shutil.copy(file, dev.loop.layout.exports)

    def over() -> dict[str, Any] | None:
        results = dev.query(RUNS)["runsOrError"]["results"]
        ended = [result for result in results if result["status"] in ("SUCCESS", "FAILURE", "CANCELED")]
        return ended[0] if ended else None

    return dict(dev.wait("the run's end", over, 900))


def test_the_sensor_adds_the_partition_and_the_whole_graph_materializes(dev: Dev, run: dict[str, Any]) -> None:
    assert run["status"] == "SUCCESS", dev.log.read_text()[-6000:]
    made = {(asset["assetKey"]["path"][-1], asset["partition"]) for asset in run["assetMaterializations"]}
    assert made == {
        (name, DATE)
        for name in (
            "merged_dataset",
            "dataset_profile",
            "training_plan",
            "adapter",
            "eval_report",
            "registered_adapter",
            "promoted_adapter",
            "merged_model",
            "gguf",
            "modelfile",
            "lmstudio_export",
        )
    }
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    assert tags["dagster/sensor_name"] == "export_arrival"
    assert tags["dagster/partition"] == DATE
    node = dev.query(PARTITIONS, key=["brain", "brain_exports"])["assetNodeOrError"]
    assert node["partitionKeys"] == [DATE]
    assert [each["partition"] for each in node["assetMaterializations"]] == [DATE], "the arrival is reported once"


def test_the_sensor_asks_for_no_second_run_while_nothing_changes(dev: Dev, run: dict[str, Any]) -> None:
    ticks = """query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) { ... on Sensor {
        sensorState { ticks(limit: 1000) { id status } } } } }"""
    selector = {**SELECTOR, "sensorName": "export_arrival"}

    def count() -> int:
        return len(dev.query(ticks, selector=selector)["sensorOrError"]["sensorState"]["ticks"])

    before = count()
    dev.wait("two more ticks", lambda: count() >= before + 2, 180)
    assert len(dev.query(RUNS)["runsOrError"]["results"]) == 1


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_person_sees_the_lineage_and_an_assets_figures_in_a_browser(
    dev: Dev, run: dict[str, Any], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    pictures = Path(PICTURES) if PICTURES else tmp_path
    with browser_page(1900) as page:
        groups = ",".join(f"global@global:{group}" for group in ("dataset", "training", "export"))
        page.goto(f"{dev.url}/asset-groups?expanded={quote(groups)}")
        for name in ("brain_exports", "merged_dataset", "adapter", "gguf", "lmstudio_export"):
            expect(page.get_by_text(name, exact=True).first).to_be_visible()
        page.wait_for_timeout(2000)
        page.screenshot(path=pictures / "lineage.png")
        page.goto(f"{dev.url}/assets/brain/eval_report?view=partitions&partition={DATE}")
        for text in ("eval_report", "delta_vs_base_loss", "base_loss", DATE):
            expect(page.get_by_text(text).first).to_be_visible()
        page.screenshot(path=pictures / "asset.png")
        page.goto(f"{dev.url}/assets/brain/dataset_profile")
        page.get_by_text("[Show Markdown]").first.click()
        histogram = page.locator("img[src^='data:image/png']").first
        expect(histogram).to_be_visible()
        assert histogram.evaluate("image => image.naturalWidth") > 100
        page.screenshot(path=pictures / "histogram.png")
    assert (pictures / "lineage.png").stat().st_size > 20_000
