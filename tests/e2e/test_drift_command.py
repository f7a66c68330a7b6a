"""`lora-assets drift`, as a CronJob starts it: nobody looks at what it prints."""

import dagster as dg
import pytest

from lora_assets.logs import TAGS
from lora_assets.runner import DAGSTER_YAML
from tests.e2e.conftest import Loop
from tests.resources.webhook_server import WebhookServer

pytestmark = pytest.mark.e2e


def test_a_look_that_fails_is_told_of_and_one_that_was_killed_keeps_no_slot(loop: Loop) -> None:
    home = loop.root / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_bytes(DAGSTER_YAML.read_bytes())
    with dg.DagsterInstance.from_config(str(home)) as instance:
        killed = instance.create_run_for_job(
            dg.GraphDefinition(name="champion_drift").to_job(), tags=TAGS, status=dg.DagsterRunStatus.STARTED
        ).run_id
        instance.event_log_storage.set_concurrency_slots("gpu", 1)
        assert instance.event_log_storage.claim_concurrency_slot("gpu", killed, "drift").is_claimed
    webhook = WebhookServer()
    try:
        done = loop.run("drift", ALERT_WEBHOOK_URL=webhook.url)
    finally:
        webhook.close()
    assert done.returncode == 1, done.stderr
    assert "no version reigns yet" in done.stderr
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert {run.run_id == killed: run.status.value for run in instance.get_runs()} == {
            True: "FAILURE",
            False: "FAILURE",
        }
        assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots
    assert any("no version reigns yet" in text for text in webhook.texts), webhook.texts
