"""The code location: what it holds, and what loading it must not bring along."""

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from finetune.errors import ConfigurationError

HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "matplotlib", "polars"]
UNCONFIGURED = ["dagster_k8s", "dagster_postgres", "sqlalchemy", "alembic", "optuna"]


def modules_after_loading(environment: dict[str, str]) -> list[str]:
    code = "import lora_assets.definitions, sys, json; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin", **environment},
    )
    return list(json.loads(out.stdout))


def test_loading_the_code_location_imports_no_heavy_library() -> None:
    loaded = modules_after_loading({})
    assert "dagster" in loaded, "otherwise the test looks at nothing"
    assert [name for name in HEAVY + UNCONFIGURED if name in loaded] == []


def test_the_kubernetes_executor_loads_only_in_a_pod() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "BASE_MODEL_NAME": "llama3-8b", "DATABASE_URL": "postgresql://h/d"}
    loaded = modules_after_loading(pod)
    assert "dagster_k8s" in loaded
    assert [name for name in HEAVY if name in loaded] == []


@pytest.fixture(scope="module")
def defs() -> dg.Definitions:
    from lora_assets.definitions import defs

    return defs


GRAPH = {
    "merged_dataset": {"brain_exports"},
    "dataset_profile": {"merged_dataset"},
    "training_plan": {"dataset_profile", "merged_dataset"},
    "adapter": {"merged_dataset", "training_plan"},
    "eval_report": {"adapter", "merged_dataset", "training_plan"},
    "registered_adapter": {"adapter", "eval_report", "merged_dataset", "training_plan"},
    "promoted_adapter": {"adapter", "eval_report", "merged_dataset", "training_plan"},
    "merged_model": {"promoted_adapter", "merged_dataset"},
    "gguf": {"merged_model", "promoted_adapter", "merged_dataset"},
    "modelfile": {"gguf"},
    "lmstudio_export": {"gguf"},
    "drift_report": {"registered_adapter", "brain_exports"},
    "hpo_study": {"merged_dataset", "dataset_profile"},
    "ensemble_adapter": {"merged_dataset", "dataset_profile"},
    "curriculum_adapter": {"merged_dataset", "dataset_profile"},
    "continual_report": {"merged_dataset", "dataset_profile"},
    "ablation_report": {"merged_dataset", "dataset_profile"},
}


def test_the_assets_depend_on_each_other_as_designed(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    found = {
        key.path[-1]: {parent.path[-1] for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    assert found == GRAPH


def test_without_a_target_that_needs_gguf_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORT_TARGETS", "vllm")
    from lora_assets.definitions import build_definitions
    from lora_assets.settings import load_settings

    merged_alone = build_definitions(load_settings())
    found = {key.path[-1] for key in merged_alone.resolve_asset_graph().materializable_asset_keys}
    assert found == GRAPH.keys() - {"gguf", "modelfile", "lmstudio_export"}
    dg.Definitions.validate_loadable(merged_alone)


def test_every_asset_has_what_a_person_reads_in_the_ui(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert node.owners, key
        assert node.kinds, key
        assert node.group_name in {"dataset", "training", "export", "monitoring", "research"}, key
        # The champion is one, whatever its date.
        assert (node.partitions_def is None) == (node.group_name == "monitoring"), key
        if node.is_materializable:
            assert node.code_version, key


def test_gates_block_and_a_lost_comparison_does_not(defs: dg.Definitions) -> None:
    blocking = {spec.key.name: spec.blocking for checks in defs.asset_checks or [] for spec in checks.check_specs}
    assert blocking == {
        "dataset_whole_and_not_empty": True,
        "reject_rate_under_threshold": True,
        "no_prompt_on_both_sides": True,
        "adapter_whole_and_finite": True,
        "adapter_beats_base": False,
        "combination_beats_best_member": False,
        "champion_drift": False,
        "version_unaltered": True,
        "merged_equals_base_plus_adapter": True,
        "gguf_answers_like_merged_model": True,
    }


def test_secrets_are_references_in_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:very-secret@127.0.0.1/db")
    monkeypatch.setenv("TRAINING_BACKEND", "h2o")
    monkeypatch.setenv("H2O_API_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("H2O_API_KEY", "key-very-secret")
    from lora_assets.definitions import build_definitions
    from lora_assets.settings import load_settings

    for name, resource in (build_definitions(load_settings()).resources or {}).items():
        assert "very" not in repr(resource), name
        assert "very" not in str(getattr(resource, "_resolved_config_dict", "")), name


def test_a_metadata_table_may_be_empty() -> None:
    from lora_assets.assets.common import table

    assert table([]).records == []
    assert table([{"reason": "nul", "lines": None}]).records[0].data == {"reason": "nul", "lines": ""}


@pytest.mark.parametrize(
    ("backend", "gpu_steps", "kinds"),
    [
        (
            "hf-peft",
            {
                "adapter",
                "eval_report",
                "drift_report",
                "work_on_trials",
                "ablation_report",
                "ensemble_adapter",
                "curriculum_adapter",
                "continual_report",
            },
            ["huggingface", "pytorch"],
        ),
        ("h2o", {"eval_report", "drift_report"}, ["h2o"]),
    ],
)
def test_a_gpu_is_asked_for_by_the_steps_that_compute_on_one(
    backend: str, gpu_steps: set[str], kinds: list[str]
) -> None:
    code = """
import json
from lora_assets.assets.training import adapter
from lora_assets.definitions import defs
jobs = defs.resolve_all_job_defs()
steps = {op.name: op for job in jobs for op in job.all_node_defs if hasattr(op, "pool")}
print(json.dumps({name.removeprefix("brain__"): [dict(op.tags), op.pool] for name, op in steps.items()}))
print(json.dumps(sorted(next(iter(adapter.specs)).kinds)))
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin", "TRAINING_BACKEND": backend, "H2O_API_URL": "http://127.0.0.1:1"},
    )
    steps, shown = map(json.loads, out.stdout.splitlines())
    assert shown == kinds
    assert {"merged_dataset", "adapter", "eval_report", "merged_model", "gguf"} <= set(steps)
    asking = {name for name, (tags, _) in steps.items() if "nvidia.com/gpu" in str(tags)}
    assert asking == gpu_steps
    assert {name for name, (_, pool) in steps.items() if pool == "gpu"} == gpu_steps
    for name in gpu_steps:
        asked = json.loads(steps[name][0]["dagster-k8s/config"])
        assert asked["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert asked["container_config"]["volume_mounts"] == [{"name": "shm", "mount_path": "/dev/shm"}]
        pod = asked["pod_spec_config"]
        assert pod["volumes"][0]["empty_dir"] == {"medium": "Memory", "size_limit": "8Gi"}
        assert pod["node_selector"] == {"nvidia.com/gpu.present": "true"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def test_a_training_in_several_processes_asks_for_a_gpu_each() -> None:
    code = """
from lora_assets.assets.training import adapter
print(adapter.op.tags["dagster-k8s/config"])
"""
    environment = {"PATH": "/usr/bin", "TRAIN_PROCESSES": "4"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(out.stdout)["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_the_remote_servers_names_waits_and_limits_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINING_BACKEND", "h2o")
    monkeypatch.setenv("H2O_API_URL", "https://h2o-llm.internal")
    monkeypatch.setenv("H2O_CA_FILE", "certs/ca.pem")
    monkeypatch.setenv(
        "H2O_PROTOCOL",
        '{"datasets_route": "/v2/data", "finished_statuses": ["done", "ok"], "status_field": "state"}',
    )
    monkeypatch.setenv("H2O_TIMING", '{"poll": 2, "stalled": 60}')
    monkeypatch.setenv("H2O_LIMITS", '{"files": 10}')
    from lora_assets.definitions import build_trainer
    from lora_assets.settings import load_settings
    from resources.h2o.protocol import Limits, Protocol, Timing
    from resources.h2o_trainer import H2OTrainer

    trainer = build_trainer(load_settings()).process_config_and_initialize()
    assert isinstance(trainer, H2OTrainer)
    assert trainer.protocol == Protocol(
        datasets_route="/v2/data", finished_statuses=["done", "ok"], status_field="state"
    )
    assert trainer.timing == Timing(poll=2, stalled=60)
    assert trainer.limits == Limits(files=10)
    assert trainer.ca_file == str(Path("certs/ca.pem").absolute())


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("H2O_PROTOCOL", '{"route": "/x"}', r"unknown field route \[H2O_PROTOCOL\].*datasets_route"),
        ("H2O_PROTOCOL", '{"queued_statuses": "new"}', r"queued_statuses.*list.*H2O_PROTOCOL"),
        ("H2O_TIMING", '{"poll": 0}', r"poll: .*greater than 0.*H2O_TIMING"),
        ("H2O_LIMITS", '{"files": "few"}', r"files: .*integer.*H2O_LIMITS"),
    ],
)
def test_a_wrong_name_or_value_among_them_is_told(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv("TRAINING_BACKEND", "h2o")
    monkeypatch.setenv("H2O_API_URL", "https://h2o-llm.internal")
    monkeypatch.setenv(variable, value)
    from lora_assets.definitions import build_trainer
    from lora_assets.settings import load_settings

    with pytest.raises(ConfigurationError, match=told):
        build_trainer(load_settings())


def test_the_specifications_routes_are_the_defaults() -> None:
    from resources.h2o.protocol import Protocol

    protocol = Protocol()
    assert (protocol.datasets_route, protocol.experiments_route) == ("/api/datasets", "/api/experiments")
    assert protocol.experiment_route == "/api/experiments/{id}"
    assert protocol.download_route == "/api/experiments/{id}/download"


def test_the_page_on_remote_training_tells_of_every_name_wait_and_limit() -> None:
    from resources.h2o.protocol import Limits, Protocol, Timing

    page = (Path(__file__).parents[2] / "docs" / "h2o.md").read_text(encoding="utf-8")
    for kind in (Protocol, Timing, Limits):
        for name, field in kind.model_fields.items():
            value = field.default
            shown = ", ".join(value) if isinstance(value, list) else f"{value:g}" if kind is Timing else str(value)
            assert f"| `{name}` | `{shown}` | {field.description} |" in page
