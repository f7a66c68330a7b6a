from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from finetune.errors import ArtifactError, ConfigurationError
from finetune.planning.models import TrialConfig
from finetune.search.adoption import as_overrides, keep_configuration, read_configuration
from finetune.search.spec import ExperimentSpec, read_spec, spec_of

EVERYTHING = """
goal: a polite assistant
dataset_date: 2026-06-01
base_model: llama3-8b
max_trials: 12
budget_gpu_hours: 2.5
methods: [lora, prefix]
stop_metric: eval_perplexity
stop_threshold: 3
stop_patience: 4
dry_run: false
max_loop_iterations: 30
auto_merge: true
merge_format: gguf
strategy: halving
hyperband: true
seed: 7
workers: 3
search_space:
  learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
fixed: {epochs: 2}
"""


def test_an_experiment_is_read_with_all_its_fields(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(EVERYTHING)
    spec = read_spec(tmp_path / "spec.yaml", ExperimentSpec)
    assert spec.dataset_date == date(2026, 6, 1)
    assert (spec.max_trials, spec.budget_gpu_hours, spec.methods) == (12, 2.5, ["lora", "prefix"])
    assert (spec.stop_metric, spec.stop_threshold, spec.stop_patience) == ("eval_perplexity", 3.0, 4)
    assert (spec.max_loop_iterations, spec.auto_merge, spec.merge_format) == (30, True, "gguf")
    assert spec_of(spec.model_dump(mode="json"), ExperimentSpec, where="itself") == spec


def test_what_is_left_out_is_as_the_contract_says() -> None:
    spec = ExperimentSpec()
    assert (spec.max_trials, spec.budget_gpu_hours, spec.stop_patience, spec.max_loop_iterations) == (10, 5.0, 3, 20)
    assert (spec.stop_metric, spec.stop_threshold, spec.dry_run, spec.auto_merge) == ("eval_loss", None, False, False)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("max_trails: 3", "max_trails.*not permitted"),
        ("max_trials: '3'", "max_trials.*valid integer"),
        ("budget_gpu_hours: 0", "budget_gpu_hours.*greater than 0"),
        ("methods: [full]", "methods.0"),
        ("methods: []", "methods.*at least 1"),
        ("dataset_path: a.jsonl", "exclude each other"),
        ("strategy: random", "hyperband is for strategy halving"),
        ("parameters: [learning_rat]", "no parameter of a training: learning_rat"),
        ("search_space: {epochs: {low: 1, high: 2}}", "epochs cannot be both fixed and searched"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, line: str, fault: str) -> None:
    name = line.partition(":")[0]
    kept = [each for each in EVERYTHING.splitlines() if not each.startswith(f"{name}:")]
    if name == "search_space":
        kept = [each for each in kept if not each.startswith("  learning_rate")]
    (tmp_path / "spec.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigurationError, match=rf"{fault}.*spec\.yaml"):
        read_spec(tmp_path / "spec.yaml", ExperimentSpec)


def test_limits_do_not_make_another_experiment_and_everything_else_does() -> None:
    spec = ExperimentSpec(max_trials=3)
    more = ExperimentSpec(max_trials=30, budget_gpu_hours=9.0, stop_threshold=1.0, workers=4, goal="more")
    assert spec.identity("data", "model") == more.identity("data", "model")
    others = [ExperimentSpec(seed=1), ExperimentSpec(methods=["ia3"]), ExperimentSpec(strategy="random")]
    names = {each.identity("data", "model") for each in [spec, *others]} | {spec.identity("data2", "model")}
    assert len(names) == 5


def test_a_configuration_is_adopted_by_its_hash_whole_or_not_at_all(tmp_path: Path) -> None:
    trial = TrialConfig(trial_id="t", lora_rank=8, learning_rate=3e-4, target_modules=["q_proj"])
    name = keep_configuration(tmp_path, trial)
    assert keep_configuration(tmp_path, trial) == name
    assert read_configuration(tmp_path, name) == trial
    method, overrides = as_overrides(trial)
    assert (method, overrides.lora_rank, overrides.target_modules) == ("lora", 8, ["q_proj"])
    with pytest.raises(ConfigurationError, match="no configuration of this hash"):
        read_configuration(tmp_path, "0" * 64)
    path = tmp_path / f"{name}.json"
    path.write_bytes(path.read_bytes().replace(b'"lora_rank":8', b'"lora_rank":9'))
    with pytest.raises(ArtifactError, match="was altered"):
        read_configuration(tmp_path, name)
