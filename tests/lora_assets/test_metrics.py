"""Figures of runs as Prometheus reads them, by file and by push, and the dashboard that shows them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import promql_parser
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from finetune.adapter_files import adapter_hash
from finetune.dataset.models import Counts, PreparedDataset
from finetune.evaluation.models import ChampionComparison
from finetune.registry.promotion import promote
from finetune.registry.store import register_adapter
from finetune.training.models import TrainingResult
from h2o_gateway.app import create_app
from h2o_gateway.settings import Settings as GatewaySettings
from lora_assets.metrics import publish_metrics
from lora_assets.settings import Settings, load_settings
from resources.run_log import RunLog
from tests.e2e.conftest import data_root
from tests.finetune.registry.test_champion import report
from tests.resources.webhook_server import WebhookServer

ROOT = Path(__file__).parents[2]
DATE = "2026-06-01"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    assert len(set(re.findall(r"^# TYPE (\S+)", text, re.M))) == text.count("# TYPE "), "a name is told of once"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return f"lora_assets_{name}", tuple(sorted(labels.items()))


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A data root on which a date was trained and its version reigns."""
    from safetensors.numpy import save_file

    with data_root() as path:
        made = {
            "merged_dataset": PreparedDataset(
                path=path,
                date=DATE,
                fingerprint="f",
                window_dates=[DATE],
                counts=Counts(lines=100, train=80, eval=10, duplicates=3, rejected=7, blank=0),
                rejects_by_reason={"invalid_json": 7},
                rejects_by_file={},
            ),
            "adapter": TrainingResult(
                status="completed",
                run_id="r1",
                backend="hf-peft",
                adapter_path=path,
                adapter_hash="h",
                training_steps=5,
                gpu_hours=0.25,
                final_loss=0.5,
                tokens_seen=4000,
                tokens_per_second=80.0,
            ),
            "eval_report": report(
                champion=ChampionComparison(
                    version="v0", adapter_hash="o", champion_loss=1.5, delta_vs_champion=-0.5, delta_ci95=(-0.6, -0.4)
                )
            ),
        }
        for name, value in made.items():
            target = path / "assets" / "brain" / name / f"{DATE}.json"
            target.parent.mkdir(parents=True)
            target.write_text(value.model_dump_json())
        adapter = path / "an-adapter"
        adapter.mkdir()
        save_file({"base_model.model.l.lora_A.weight": np.zeros((2, 2))}, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        facts: dict[str, Any] = {"trial_id": "t", "metrics": {"eval_loss": 1.0}, "tags": {}, "lineage": {}}
        registry = path / "registry" / "brain"
        register_adapter(registry, adapter_path=adapter, adapter_hash=adapter_hash(adapter), run_id="r1", **facts)
        promote(registry, "v1", reason="first", by="test")
        log = RunLog(data_dir=str(path))
        row: dict[str, Any] = {"dataset_paths": ["a"], "base_model": "tiny", "backend": "hf-peft"}
        for run_id in ("r1", "r2"):
            metrics = {"gpu_hours": 0.25, "tokens_seen": 4000, "final_loss": 0.5}
            log.complete(log.start(run_id=run_id, **row), "/adapter", metrics)
        log.fail(log.start(run_id="r3", **row), "no")
        log.close()
        yield path


@pytest.fixture
def settings(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(root))
    monkeypatch.setenv("METRICS_TEXTFILE_DIR", str(tmp_path / "textfile"))
    return load_settings()


@dg.op
def step() -> None:
    """Nothing."""


@dg.job
def train() -> None:
    step()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def ended(instance: dg.DagsterInstance, date: str = DATE) -> dg.DagsterRun:
    return train.execute_in_process(instance=instance, tags={"dagster/partition": date}).dagster_run


def test_a_file_for_node_exporter_tells_of_run_dataset_training_evaluation_and_champion(
    settings: Settings, instance: dg.DagsterInstance
) -> None:
    failed = instance.create_run_for_job(train)
    instance.report_run_failed(failed)
    run = ended(instance)
    publish_metrics(settings, instance, run)
    assert settings.metrics_textfile_dir is not None
    [file] = settings.metrics_textfile_dir.iterdir()
    assert file.name == "lora_assets_brain.prom"
    seen = parsed(file.read_text())
    record = instance.get_run_record_by_id(run.run_id)
    assert record is not None
    assert seen[of("run_end_timestamp_seconds", pipeline="brain", status="SUCCESS")] == record.end_time
    assert of("run_end_timestamp_seconds", pipeline="brain", status="FAILURE") in seen, "and the last success stays"
    assert seen[of("run_duration_seconds", pipeline="brain", status="SUCCESS")] > 0
    assert seen[of("run_queue_seconds", pipeline="brain", status="SUCCESS")] >= 0
    for name, value in {
        "dataset_lines": 100,
        "dataset_rejected_lines": 7,
        "dataset_train_records": 80,
        "dataset_eval_records": 10,
        "eval_loss": 1.0,
        "eval_delta_vs_base": -2.0,
        "eval_delta_vs_champion": -0.5,
        "champion_version": 1,
        "champion_eval_loss": 1.0,
    }.items():
        assert seen[of(name, pipeline="brain")] == value
    for name, value in {"gpu_hours": 0.25, "tokens": 4000, "tokens_per_second": 80, "loss": 0.5}.items():
        assert seen[of(f"training_{name}", pipeline="brain", backend="hf-peft")] == value
    completed = {"backend": "hf-peft", "status": "COMPLETED"}
    assert seen[of("trainings_total", **completed)] == 2
    assert seen[of("trainings_total", backend="hf-peft", status="FAILED")] == 1
    assert seen[of("trainings_gpu_hours_total", **completed)] == 0.5
    assert seen[of("trainings_tokens_total", **completed)] == 8000


def test_dates_and_runs_are_no_labels(settings: Settings, instance: dg.DagsterInstance) -> None:
    for date in (DATE, "2026-06-02", "2026-06-03"):
        publish_metrics(settings, instance, ended(instance, date))
    assert settings.metrics_textfile_dir is not None
    [file] = settings.metrics_textfile_dir.iterdir()
    assert {name for _, labels in parsed(file.read_text()) for name, _ in labels} <= {"pipeline", "status", "backend"}


def test_figures_are_pushed_to_a_pushgateway(
    settings: Settings, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WebhookServer()
    monkeypatch.setenv("METRICS_PUSHGATEWAY_URL", server.address)
    publish_metrics(load_settings(), instance, ended(instance))
    server.close()
    assert server.paths == ["/metrics/job/lora_assets/pipeline/brain"]
    assert parsed(server.bodies[0])[of("champion_version", pipeline="brain")] == 1


def test_what_cannot_be_written_pushed_or_read_costs_the_run_nothing(
    settings: Settings, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = WebhookServer([500])
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("METRICS_TEXTFILE_DIR", str(tmp_path / "file"))
    for url in (server.address, "http://127.0.0.1:1"):
        monkeypatch.setenv("METRICS_PUSHGATEWAY_URL", url)
        publish_metrics(load_settings(), instance, ended(instance))
    assert len(server.paths) == 1, "otherwise nothing failed"
    server.close()
    monkeypatch.setenv("METRICS_TEXTFILE_DIR", str(tmp_path / "textfile"))
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    publish_metrics(load_settings(), instance, ended(instance))
    seen = parsed((tmp_path / "textfile" / "lora_assets_brain.prom").read_text())
    assert of("champion_version", pipeline="brain") in seen
    assert not any(name.startswith("lora_assets_trainings") for name, _ in seen)


BOARD = json.loads((ROOT / "deploy" / "grafana" / "lora-assets.json").read_text())
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$__range": "1h", "$pipeline": "brain"}


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """What an expression asks for; one that is none raises."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def expressions() -> list[str]:
    targets = [target["expr"] for panel in PANELS for target in panel["targets"]]
    for name, value in VARIABLES.items():
        targets = [expression.replace(name, value) for expression in targets]
    return targets


def test_every_panel_asks_for_what_is_exported_and_the_docs_tell_of_all_of_it(
    settings: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    publish_metrics(settings, instance, ended(instance))
    text = (tmp_path / "textfile" / "lora_assets_brain.prom").read_text()
    client = TestClient(create_app(GatewaySettings(data_dir=tmp_path), "key"))
    assert client.get("/health").status_code == 503, "nobody started its threads"
    exported: dict[str, set[str]] = {}
    for name, labels in [*parsed(text), *parsed(client.get("/metrics").text)]:
        exported.setdefault(name, set()).update(label for label, _ in labels)
    asked = [selector for expression in expressions() for selector in selectors(expression)]
    assert len(asked) >= len(PANELS)
    for selector in asked:
        assert selector.name in exported
        assert {matcher.name for matcher in selector.matchers.matchers} <= exported[selector.name]
    told = set(re.findall(r"`((?:lora_assets|h2o_gateway)_[a-z_0-9]+)`", OPERATIONS))
    own = {name for name in exported if not name.endswith(("_created", "_bucket"))}
    assert {name.removesuffix("_count").removesuffix("_sum") for name in own} == told


def test_the_dashboard_has_the_form_that_grafana_imports() -> None:
    assert BOARD["uid"] == "lora-assets"
    assert BOARD["schemaVersion"] >= 39
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in own) < 24
        assert not own & cells, f"{panel['title']} overlaps another panel"
        cells |= own
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
        used = set(re.findall(r"\$(?!__)(\w+)", json.dumps(panel["targets"])))
        assert used <= variables
