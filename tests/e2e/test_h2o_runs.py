"""Delegated training as an admin meets it: the real webserver, daemon and steps; the remote side is our own server."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from lora_assets.cli.demo import EXAMPLES
from resources.postgres import EmbeddedPostgres
from tests.e2e.conftest import data_root, new_loop
from tests.e2e.test_dev import CHROMIUM, SELECTOR, Dev, browser_page, serve
from tests.resources.h2o_server import KEY, H2OServer, adapter_files, archive

pytestmark = pytest.mark.e2e
DATE = "2026-06-01"
LABEL = "Remote Training (H2O)"

ADD_PARTITION = """mutation($selector: RepositorySelector!, $name: String!, $key: String!) {
    addDynamicPartition(repositorySelector: $selector, partitionsDefName: $name, partitionKey: $key) {
        __typename ... on PythonError { message } } }"""
LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { id } } ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } } } }"""
TERMINATE = """mutation($run: String!, $policy: TerminateRunPolicy) {
    terminateRun(runId: $run, terminatePolicy: $policy) {
        __typename ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
RUN = """query($run: ID!) { runOrError(runId: $run) { ... on Run { status tags { key value }
    eventConnection { events { ... on MessageEvent { message } } } } } }"""


@dataclass
class Site:
    dev: Dev
    server: H2OServer
    database: str

    def launch(self, seed: int, *assets: str) -> str:
        """Start a run whose plan, and so whose experiment, is its own; returns its id when the experiment trains."""
        before = len(self.server.experiments)
        answer = self.dev.query(
            LAUNCH,
            params={
                "selector": {
                    **SELECTOR,
                    "jobName": "train_and_export",
                    "assetSelection": [{"path": ["brain", name]} for name in assets],
                    "assetCheckSelection": [],
                },
                "mode": "default",
                "runConfigData": {"ops": {"brain__training_plan": {"config": {"seed": seed}}}},
                "executionMetadata": {"tags": [{"key": "dagster/partition", "value": DATE}]},
            },
        )["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        self.dev.wait("the experiment's creation", lambda: len(self.server.experiments) > before, 180)
        self.dev.wait("its first steps", lambda: list(self.server.experiments.values())[-1]["step"] > 2, 180)
        return str(answer["run"]["id"])

    def terminate(self, run: str, policy: str) -> None:
        answer = self.dev.query(TERMINATE, run=run, policy=policy)["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def run(self, run: str) -> Any:
        return self.dev.query(RUN, run=run)["runOrError"]

    def row(self) -> dict[str, Any]:
        """The newest row of the run log, with the process that wrote it."""
        import sqlalchemy as sa

        engine = sa.create_engine(self.database, poolclass=sa.NullPool)
        with engine.connect() as connection:
            query = (
                "SELECT * FROM lora_training_runs JOIN lora_training_run_details USING (id) ORDER BY id DESC LIMIT 1"
            )
            return dict(connection.execute(sa.text(query)).mappings().all()[-1])


@pytest.fixture(scope="module")
def site(tiny_model: BaseModelRef) -> Iterator[Site]:
    server = H2OServer()
    server.archive = archive(adapter_files(rank=16))
    server.total_steps = 100_000
    with data_root() as root:
        loop = new_loop(root, tiny_model)
        loop.environment |= {
            "TRAINING_BACKEND": "h2o",
            "H2O_API_URL": server.url,
            "H2O_API_KEY": KEY,
            "H2O_TIMING": json.dumps({"poll": 0.2, "poll_ceiling": 0.5}),
        }
        loop.layout.exports.mkdir(parents=True)
        for file in EXAMPLES.glob(f"*{DATE}*"):
            shutil.copy(file, loop.layout.exports)
        postgres = EmbeddedPostgres(loop.layout.postgres)
        for dev in serve(loop):
            selector = {name: SELECTOR[name] for name in ("repositoryName", "repositoryLocationName")}
            dev.query(ADD_PARTITION, selector=selector, name="brain_dataset_dates", key=DATE)
            yield Site(dev, server, postgres.url)
        postgres.close()
    server.close()


@pytest.fixture(scope="module")
def running(site: Site) -> str:
    """A run whose experiment trains on and on."""
    return site.launch(1, "merged_dataset", "dataset_profile", "training_plan", "adapter")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_while_it_runs_an_admin_sees_in_a_browser_that_it_trains_remotely_and_where(site: Site, running: str) -> None:
    from playwright.sync_api import expect

    url = f"{site.server.url}/api/experiments/exp%2F1"
    with browser_page(1700) as page:
        page.goto(f"{site.dev.url}/runs")
        row = page.get_by_role("row").filter(has_text=running[:8]).or_(page.locator("div").filter(has_text=running[:8]))
        expect(row.get_by_text(LABEL).first).to_be_visible()
        expect(page.get_by_text("Started").first).to_be_visible()
        page.goto(f"{site.dev.url}/assets/brain/adapter")
        expect(page.get_by_text(LABEL, exact=True).first).to_be_visible()
        expect(page.locator(f"a[href='{url}']").first).to_be_visible()
    assert site.run(running)["status"] == "STARTED", "all this was seen while it ran"


def test_while_it_runs_its_progress_and_remote_figures_are_in_the_runs_log_and_lora_assets_runs_shows_it(
    site: Site, running: str
) -> None:
    def told() -> list[str]:
        events = site.run(running)["eventConnection"]["events"]
        return [event["message"] for event in events if "remote training: " in event.get("message", "")]

    site.dev.wait("a second report", lambda: len(told()) > 1, 180)
    first, *_, last = told()
    assert "/100000 steps loss " in first
    assert int(last.split()[2].split("/")[0]) > int(first.split()[2].split("/")[0])
    shown = site.dev.loop.run("runs")
    assert shown.returncode == 0, shown.stderr
    (line,) = [line for line in shown.stdout.splitlines() if DATE in line]
    assert "RUNNING" in line
    assert LABEL in line
    assert site.run(running)["status"] == "STARTED"


def test_a_killed_step_is_retried_by_dagster_and_goes_on_with_its_experiment(site: Site, running: str) -> None:
    before = site.row()
    os.kill(before["pid"], signal.SIGKILL)
    site.dev.wait("the retry", lambda: site.row()["attempts"] == 2, 180)
    step = site.server.experiments["exp/1"]["step"]
    site.dev.wait("the next look at it", lambda: site.server.experiments["exp/1"]["step"] > step, 180)
    row = site.row()
    assert row["pid"] != before["pid"]
    assert (row["id"], row["status"], row["external_run_id"]) == (before["id"], "RUNNING", "exp/1")
    assert len(site.server.experiments) == 1


def test_terminating_the_run_cancels_the_experiment(site: Site, running: str) -> None:
    site.terminate(running, "SAFE_TERMINATE")
    site.dev.wait("the run's end", lambda: site.run(running)["status"] == "CANCELED", 180)
    assert site.server.calls.count("cancel") == 1
    assert site.server.experiments["exp/1"]["status"] == "stopped"
    row = site.row()
    assert (row["status"], row["error_message"]) == ("FAILED", "the run was cancelled; its experiment was cancelled")


def test_a_run_cancelled_when_its_step_is_dead_is_closed_and_its_experiment_cancelled_by_a_sensor(
    site: Site, running: str
) -> None:
    run = site.launch(2, "training_plan", "adapter")
    os.kill(site.row()["pid"], signal.SIGKILL)
    row = site.row()
    assert (row["status"], row["dagster_run_id"]) == ("RUNNING", run), "nobody was left to close it"
    site.terminate(run, "MARK_AS_CANCELED_IMMEDIATELY")
    assert site.run(run)["status"] == "CANCELED"
    site.dev.wait("a sensor's tick", lambda: site.row()["status"] != "RUNNING", 180)
    said = "the run was cancelled; its experiment was cancelled"
    site.dev.wait("the cancellation", lambda: site.row()["error_message"] == said, 180)
    assert site.server.experiments["exp/2"]["status"] == "stopped"
    assert len(site.server.experiments) == 2


def test_the_key_is_in_nothing_that_runs_daemon_and_webserver_wrote(site: Site, running: str) -> None:
    assert f"Bearer {KEY}" in site.server.authorizations
    root = site.dev.loop.root
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    kinds = {path.relative_to(root).parts[0] for path in files}
    assert {"dagster", "postgres", "work", "assets", "dev.log"} <= kinds
    assert any(path.suffix == ".err" for path in files), "the steps' captured output"

    def holding(text: str) -> set[str]:
        """Where the text lies, by folder of the data root; databases write on meanwhile."""
        found = set()
        for path in files:
            with suppress(FileNotFoundError):
                if text.encode() in path.read_bytes():
                    found.add(path.relative_to(root).parts[0])
        return found

    assert holding(LABEL) >= {"dagster"}, "otherwise nothing is found by looking like this"
    assert holding("exp/1") >= {"dagster", "postgres"}
    assert holding(KEY) == set()
    assert KEY not in json.dumps(site.row(), default=str)
    assert KEY not in json.dumps(site.run(running))
