"""TRAINING_BACKEND=h2o from the sensor's tick to the Modelfile: real HTTP, a real gateway process, real training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.base_model.models import BaseModelRef
from finetune.errors import RemoteError
from finetune.evaluation.models import EvalReport
from finetune.export.models import GgufExport, LmStudioExport, MergedModel, OllamaExport
from finetune.publishing import read_manifest
from finetune.registry.models import RegisteredVersion
from finetune.training.models import TrainingResult
from lora_assets.cli.demo import EXAMPLES
from resources.h2o.protocol import Timing
from resources.h2o_trainer import H2OTrainer
from resources.postgres import EmbeddedPostgres
from tests.e2e.conftest import Loop, data_root, new_loop
from tests.h2o_gateway.process import KEY, REAL, GatewayProcess
from tests.resources.h2o_training import request_in, train

pytestmark = pytest.mark.e2e
DATE = "2026-06-01"
# What is set in the environment of the whole run, and must stand in nothing that it writes.
SENTINELS = {
    "HF_TOKEN": "hf_4f1c-sentinel",
    "ALERT_WEBHOOK_URL": "http://127.0.0.1:9/services/9b2e-sentinel",
    "DATABASE_URL": "6d0a-sentinel",
}

# The sensor looks twice, as the daemon would let it, and what it asks for is done.
PROGRAM = """
import json
import dagster as dg
from lora_assets.definitions import defs
from lora_assets.partitions import dataset_dates
sensor = defs.resolve_sensor_def("export_arrival")
with dg.DagsterInstance.get() as instance:
    first = sensor(dg.build_sensor_context(instance=instance))
    second = sensor(dg.build_sensor_context(instance=instance, cursor=first.cursor))
    [request] = second.run_requests
    [addition] = second.dynamic_partitions_requests
    instance.add_dynamic_partitions(addition.partitions_def_name, addition.partition_keys)
    for event in second.asset_events:
        instance.report_runless_asset_event(event)
    result = defs.resolve_job_def(sensor.job_name).execute_in_process(
        instance=instance, partition_key=request.partition_key, raise_on_error=False
    )
    checks = {
        event.asset_check_evaluation_data.check_name: event.asset_check_evaluation_data.passed
        for event in result.all_events
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    }
    run = instance.get_run_by_id(result.run_id)
print(json.dumps({"status": run.status.value, "tags": dict(run.tags), "checks": checks}))
"""


@dataclass
class Chain:
    loop: Loop
    gateway: GatewayProcess
    run: dict[str, Any]


@pytest.fixture(scope="module")
def chain(tiny_model: BaseModelRef) -> Iterator[Chain]:
    with data_root() as root:
        gateway = GatewayProcess(
            root.parent / "gateway", tiny_model.path, TRAIN_COMMAND=REAL, MODELS=f"{tiny_model.name}={tiny_model.path}"
        )
        loop = new_loop(root, tiny_model)
        loop.environment |= {
            "DAGSTER_HOME": str(root / "dagster"),
            "TRAINING_BACKEND": "h2o",
            "H2O_API_URL": gateway.url,
            "H2O_API_KEY": KEY,
            "H2O_TIMING": json.dumps({"poll": 0.3, "poll_ceiling": 1}),
        }
        # The server asks for no password, and the run is given one all the same.
        server = EmbeddedPostgres(root.parent / "server")
        loop.environment |= SENTINELS
        loop.environment["DATABASE_URL"] = server.url.replace("//postgres@", f"//postgres:{SENTINELS['DATABASE_URL']}@")
        (root / "dagster").mkdir()
        loop.layout.exports.mkdir(parents=True)
        for file in EXAMPLES.glob(f"*{DATE}*"):
            shutil.copy(file, loop.layout.exports)
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM],
                env=loop.environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr[-5000:]
            run = json.loads(done.stdout.splitlines()[-1])
            loop.output = done.stderr
            yield Chain(loop, gateway, run)
        finally:
            gateway.close()
            server.close()


def test_the_run_succeeds_and_every_gate_lets_it_through(chain: Chain) -> None:
    assert chain.run["status"] == "SUCCESS", chain.loop.output[-5000:]
    assert set(chain.run["checks"]) == {
        "dataset_whole_and_not_empty",
        "reject_rate_under_threshold",
        "no_prompt_on_both_sides",
        "adapter_whole_and_finite",
        "adapter_beats_base",
        "version_unaltered",
        "merged_equals_base_plus_adapter",
        "gguf_answers_like_merged_model",
    }
    assert all(chain.run["checks"].values()), chain.run["checks"]


def test_it_was_trained_remotely_once(chain: Chain) -> None:
    [experiment] = chain.gateway.http.get("/api/experiments").json()["experiments"]
    assert experiment["status"] == "finished"
    assert experiment["step"] == experiment["total_steps"] > 1
    adapter = chain.loop.value("adapter", DATE, TrainingResult)
    assert (adapter.backend, adapter.external_run_id) == ("h2o", experiment["id"])
    assert experiment["idempotency_key"] == adapter.run_id
    assert chain.run["tags"]["external_run_id"] == experiment["id"]
    assert chain.run["tags"]["training"] == "Remote Training (H2O)"
    [row] = chain.loop.run_json("runs")
    assert (row["status"], row["backend"], row["external_run_id"]) == ("COMPLETED", "h2o", experiment["id"])
    assert row["backend_label"] == "Remote Training (H2O)"
    assert row["metrics"]["final_loss"] == adapter.final_loss


def test_the_adapter_learned_and_is_the_champion(chain: Chain) -> None:
    report = chain.loop.value("eval_report", DATE, EvalReport)
    assert report.delta_vs_base_loss < 0
    assert report.eval_loss < report.base_loss
    version = chain.loop.value("registered_adapter", DATE, RegisteredVersion)
    assert (version.version, version.status) == ("v1", "champion")


def test_nothing_downstream_notices(chain: Chain) -> None:
    loop = chain.loop
    adapter = loop.layout.adapter(loop.value("adapter", DATE, TrainingResult).run_id)
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md", "training_log.jsonl", "loss_curve.png"}
    assert {path.name for path in adapter.iterdir()} == files | {"manifest.json"}
    published = [
        adapter,
        loop.value("eval_report", DATE, EvalReport).path,
        loop.value("merged_model", DATE, MergedModel).path,
        loop.value("gguf", DATE, GgufExport).path,
        loop.value("modelfile", DATE, OllamaExport).path,
        loop.value("lmstudio_export", DATE, LmStudioExport).path,
    ]
    for path in published:
        read_manifest(path, verify="hashes")
    modelfile = (loop.value("modelfile", DATE, OllamaExport).path / "Modelfile").read_text()
    assert modelfile.count("\nADAPTER ") == 1
    assert modelfile.startswith("FROM ")


def test_a_training_is_cancelled_on_the_gateway(chain: Chain, tiny_model: BaseModelRef, tmp_path: Path) -> None:
    request = request_in(tmp_path).model_copy(update={"base_model": tiny_model})
    timing = Timing(poll=0.2, poll_ceiling=0.2, total=1)
    trainer = H2OTrainer(api_url=chain.gateway.url, api_key=KEY, timing=timing)
    with pytest.raises(RemoteError, match="took longer than 1 s"):
        train(trainer, request)
    assert trainer.cancel(request.run_id, request.work_dir)
    [newest, _] = chain.gateway.http.get("/api/experiments").json()["experiments"]
    assert newest["idempotency_key"] == request.run_id
    assert chain.gateway.wait(newest["id"], "stopped")
    assert not trainer.cancel(request.run_id, request.work_dir), "there is nothing left to cancel"


def test_no_secret_is_in_anything_that_the_run_wrote(chain: Chain) -> None:
    """The data root, Dagster's runs, events, run config and output of steps, the run log's server, what was printed."""
    roots = [chain.loop.root, chain.loop.root.parent / "server"]
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in files}
    assert len(files) > 500
    # Otherwise the test looks at nothing.
    assert {"runs.db", "PG_VERSION", "adapter_model.safetensors", "Modelfile"} <= names
    assert any(path.suffix in (".out", ".err") for path in files), "the output of steps"
    assert chain.loop.run_json("runs")[0]["status"] == "COMPLETED", "the run log is the server's"
    secrets = [secret.encode() for secret in (KEY, *SENTINELS.values())]
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []
    assert [secret for secret in secrets if secret.decode() in chain.loop.output] == []
