"""What an ablation trains, and what its report says of figures that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.base_model.models import BaseModelRef
from finetune.dataset.models import Counts, PreparedDataset
from finetune.errors import ConfigurationError
from finetune.evaluation.losses import RecordLosses
from finetune.planning.history import Measurement
from finetune.publishing import read_manifest
from finetune.reproduction.manifest import experiment_manifest
from finetune.search.ablation.report import (
    AblationResult,
    ArmRun,
    conclusion_of,
    figures_of,
    publish_ablation,
    read_ablation,
    step_result,
)
from finetune.search.ablation.spec import AblationSpec, Arm, arms_of, dry_run, shown
from finetune.search.candidates import Bench
from finetune.search.spec import read_spec, spec_of
from tests.profiles import PROFILE

# Of nothing: what it says is tested where trainings are.
MANIFEST = experiment_manifest(
    kind="ablation_report",
    name="ablation-1",
    configuration={},
    seed=42,
    trainings={},
    exports=Path(),
    environment={},
    secrets=[],
    figures={},
)
FIXED = {"max_steps": 4, "micro_batch": 1, "accumulation": 1, "max_length": 64}


@pytest.fixture
def bench(tiny_model: BaseModelRef, tmp_path: Path) -> Bench:
    return Bench(
        dataset=PreparedDataset(
            path=tmp_path,
            date="2026-06-01",
            fingerprint="d" * 16,
            window_dates=[],
            counts=Counts(lines=24, train=24, eval=0, duplicates=0, rejected=0, blank=0),
            rejects_by_reason={},
            rejects_by_file={},
            records_by_file={},
        ),
        profile=PROFILE,
        base_model=tiny_model,
        device="cpu",
        price_per_gpu_hour=2.0,
    )


def spec(**fields: Any) -> AblationSpec:
    return spec_of({"fixed": FIXED, **fields}, AblationSpec, where="here")


def test_an_ablation_is_read_and_its_name_is_that_of_what_it_trains(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "parameters: {lora_alpha: [16, 32], target_modules: [all-linear, [q_proj]]}\ndataset_path: records.jsonl\n"
    )
    read = read_spec(tmp_path / "a.yaml", AblationSpec)
    assert read.parameters == {"lora_alpha": [16.0, 32.0], "target_modules": ["all-linear", ["q_proj"]]}
    assert read.dataset_path == tmp_path / "records.jsonl"
    first = spec(parameters={"lora_alpha": [16]}).name("data", "model")
    assert first == spec(parameters={"lora_alpha": [16.0]}, goal="why", tokens_per_second=5.0).name("data", "model")
    others = [
        spec(parameters={"lora_alpha": [16]}, seeds=4).name("data", "model"),
        spec(parameters={"lora_alpha": [17]}).name("data", "model"),
        spec(parameters={"lora_alpha": [16]}).name("data", "other"),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"parameters": {}}, "parameters.*at least 1"),
        ({"parameters": {"lora_rank": []}}, "lora_rank has no values"),
        ({"parameters": {"lora_rnk": [1]}}, "no parameter of a training: lora_rnk"),
        ({"parameters": {"lora_rank": [4, 0]}}, "lora_rank 0: .*greater than or equal to 1"),
        ({"parameters": {"lora_rank": ["4"]}}, "lora_rank 4: .*valid integer"),
        ({"parameters": {"lora_rank": [4, 4]}}, "a value of lora_rank stands there twice"),
        ({"parameters": {"seed": [1, 2]}}, "the same seeds"),
        ({"parameters": {"lora_rank": [4]}, "fixed": {"seed": 1}}, "not in fixed"),
        ({"parameters": {"lora_rank": [4]}, "seeds": 1}, "seeds.*greater than or equal to 2"),
        ({"parameters": {"lora_rank": [4]}, "method": "prefix"}, "lora_rank decides nothing in trainings by prefix"),
        ({"parameters": {"virtual_tokens": [4]}}, "virtual_tokens decides nothing in trainings by lora"),
        ({"parameters": {"epochs": [1.0, 2.0]}}, "epochs decides nothing where max_steps is given"),
    ],
)
def test_a_wrong_field_or_value_is_named(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        spec(**fields)


def test_each_parameter_is_varied_alone_from_a_base_that_is_trained_once(bench: Bench) -> None:
    arms = arms_of(spec(parameters={"lora_rank": [4, 8, 16], "learning_rate": [1e-3]}, seeds=2), bench)
    base = arms[0].trial
    assert [shown(arm.changed) for arm in arms[1:]] == [
        *(f"lora_rank {rank}" for rank in (4, 8, 16) if rank != base.lora_rank),
        "learning_rate 0.001",
    ]
    assert arms[0].changed == {}
    for arm in arms:
        assert [plan.trial_config.seed for plan in arm.plans] == [42, 43]
        differing = {
            name
            for name, value in arm.plans[1].trial_config
            if value != getattr(base, name) and name not in ("seed", "trial_id")
        }
        # Also what a plan would choose by it, such as alpha by rank, stays.
        assert differing == set(arm.changed)
    names = [plan.trial_config.trial_id for arm in arms for plan in arm.plans]
    assert len(set(names)) == len(names)


def test_a_grid_varies_them_together(bench: Bench) -> None:
    arms = arms_of(spec(parameters={"lora_rank": [2, 4], "use_rslora": [False, True]}, grid=True, seeds=2), bench)
    assert [shown(arm.changed) for arm in arms] == [
        "the base configuration",
        "lora_rank 2, use_rslora off",
        "lora_rank 2, use_rslora on",
        "lora_rank 4, use_rslora off",
        "lora_rank 4, use_rslora on",
    ]


def test_what_contradicts_or_does_not_fit_is_refused_all_at_once(bench: Bench) -> None:
    asked = spec(parameters={"attention": ["sdpa", "flash"], "target_modules": [["q_proj"], ["nose"]]})
    with pytest.raises(ConfigurationError, match=r"attention flash_attention_2: .*GPU.*; target_modules nose: .*nose"):
        arms_of(asked, bench)
    tight = Bench(**{**vars(bench), "vram_limit_gb": 0.02})
    with pytest.raises(ConfigurationError, match=r"micro_batch 4096: the training needs about"):
        arms_of(spec(parameters={"micro_batch": [4096], "lora_rank": [4]}), tight)
    base = arms_of(spec(parameters={"lora_rank": [2]}), bench)[0].trial
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        arms_of(spec(parameters={"lora_rank": [base.lora_rank]}), bench)


def test_measurements_change_the_price_and_no_configuration(bench: Bench) -> None:
    asked = spec(parameters={"lora_rank": [2]}, seeds=2)
    unknown = dry_run(asked, arms_of(asked, bench))
    assert unknown.metadata["estimated_gpu_hours"] is None
    assert "unknown time" in unknown.output_text
    took = Measurement(method="lora", device="cpu", estimated_memory_gb=0.1, peak_memory_gb=0.7, tokens_per_second=60.0)
    measured = arms_of(asked, bench.measured([took]))
    priced = dry_run(asked, measured)
    hours = sum(row["gpu_hours"] for row in priced.data["proposed"])
    assert priced.metadata["estimated_gpu_hours"] == pytest.approx(hours)
    assert priced.metadata["estimated_price"] == pytest.approx(2 * hours)
    assert [arm.trial for arm in measured] == [arm.trial for arm in arms_of(asked, bench)]


def found(bench: Bench, directory: Path, effects: dict[str, float], *, failed: str = "") -> AblationResult:
    """An ablation of ranks whose losses differ as they are told to, by name of the configuration."""
    asked = spec(parameters={"lora_rank": [2, 32, 64]}, goal="<b>which rank</b>")
    arms = arms_of(asked, bench)
    drawn = np.random.default_rng(5)
    tokens = drawn.integers(5, 40, size=30)
    losses: dict[str, RecordLosses] = {}

    def run(arm: Arm, seed: int, run_id: str) -> ArmRun:
        if shown(arm.changed) == failed and seed == 43:
            return ArmRun(seed=seed, run_id=run_id, reason="the loss diverged")
        effect = effects[shown(arm.changed)]
        means = 2.0 + effect + (0.02 * drawn.normal(size=30) if effect else 0.01 * (seed - 42))
        nats = (tokens * means).tolist()
        losses[run_id] = RecordLosses(lines=list(range(30)), tokens=tokens.tolist(), base_nats=nats, nats=nats)
        return ArmRun(
            seed=seed,
            run_id=run_id,
            loss=sum(nats) / tokens.sum(),
            adapter_hash="a" * 64,
            evaluation=directory / run_id,
            evaluation_sha256="e" * 64,
        )

    runs = [[run(arm, plan.trial_config.seed, plan.trial_config.trial_id) for plan in arm.plans] for arm in arms]
    figures = figures_of(arms, runs, losses)
    return AblationResult(
        name="ablation-1",
        spec=asked,
        dataset_fingerprint="data",
        dataset_sha256="f" * 64,
        base_model="tiny",
        base_model_fingerprint="model",
        max_length=64,
        records=30,
        gpu_hours=0.1,
        arms=figures,
        conclusion=conclusion_of(asked, figures),
    )


BASE = "the base configuration"


def test_the_conclusion_says_what_the_figures_do(bench: Bench, tmp_path: Path) -> None:
    result = found(bench, tmp_path, {BASE: 0.0, "lora_rank 2": 0.3, "lora_rank 32": -0.2, "lora_rank 64": 0.0})
    base = result.base.trial_config.lora_rank
    assert [arm.verdict for arm in result.arms] == ["base", "worse", "better", "same"]
    better = result.arms[2]
    assert better.difference is not None
    assert better.difference.ci95 is not None
    low, high = better.difference.ci95
    assert f"lora_rank 32 is better than {base} by {-better.difference.mean:.4g} [{-high:.4g}, {-low:.4g}]" in (
        result.conclusion
    )
    assert result.conclusion.index("better") < result.conclusion.index("worse")
    assert better.p_corrected is not None
    assert better.difference.p_value is not None
    # Two of three comparisons are smaller than one that says nothing; the larger of them counts twice.
    assert better.p_corrected == pytest.approx(2 * better.difference.p_value)
    assert f"nats per token, p = {better.p_corrected:.3f}; lora_rank 2" in result.conclusion
    assert "lora_rank 64 changed no loss at all" in result.conclusion


def test_where_chance_explains_a_difference_none_is_told(bench: Bench, tmp_path: Path) -> None:
    effects = {BASE: 0.0, "lora_rank 2": 1e-4, "lora_rank 32": -1e-4, "lora_rank 64": 2e-4}
    result = found(bench, tmp_path, effects)
    assert {arm.verdict for arm in result.arms[1:]} == {"open"}
    assert result.conclusion.startswith(
        "no difference from the base configuration can be told for lora_rank 2, lora_rank 32 and lora_rank 64"
    )


def test_a_configuration_that_failed_is_a_row_with_its_reason_and_is_tried_again(bench: Bench, tmp_path: Path) -> None:
    effects = {BASE: 0.0, "lora_rank 2": 0.3, "lora_rank 32": -0.2, "lora_rank 64": 0.0}
    result = found(bench, tmp_path, effects, failed="lora_rank 32")
    assert [arm.verdict for arm in result.arms] == ["base", "worse", "failed", "same"]
    assert result.arms[2].difference is None
    assert "with lora_rank 32 1 of 3 trainings failed: the loss diverged" in result.conclusion
    publish_ablation(tmp_path / "report", result, MANIFEST)
    assert read_ablation(tmp_path / "report", "data", "model") is None
    nothing = found(bench, tmp_path, effects, failed=BASE)
    assert nothing.conclusion.startswith("nothing can be told: of the base configuration 1 of 3 trainings failed")
    assert {arm.verdict for arm in nothing.arms[1:]} == {"open"}


def test_a_grid_of_which_nothing_ended_has_a_report_too(bench: Bench, tmp_path: Path) -> None:
    asked = spec(parameters={"lora_rank": [2, 4], "use_rslora": [True]}, grid=True, seeds=2)
    arms = arms_of(asked, bench)
    runs = [
        [ArmRun(seed=seed, run_id=f"r{index}-{seed}", reason="out of memory") for seed in (42, 43)]
        for index in range(len(arms))
    ]
    figures = figures_of(arms, runs, {})
    assert {(arm.verdict, arm.mean, arm.ci95) for arm in figures} == {("failed", None, None)}
    result = AblationResult(
        name="ablation-2",
        spec=asked,
        dataset_fingerprint="data",
        dataset_sha256="f" * 64,
        base_model="tiny",
        base_model_fingerprint="model",
        max_length=64,
        records=0,
        gpu_hours=0.0,
        arms=figures,
        conclusion=conclusion_of(asked, figures),
    )
    assert result.conclusion.startswith("nothing can be told: of the base configuration 2 of 2 trainings failed")
    assert "with lora_rank 4, use_rslora on 2 of 2 trainings failed: out of memory" in result.conclusion
    publish_ablation(tmp_path / "report", result, MANIFEST)
    assert "configurations.png" in read_manifest(tmp_path / "report", kind="ablation", verify="hashes").outputs


def test_a_report_is_published_with_every_figure_and_what_it_was_made_from(bench: Bench, tmp_path: Path) -> None:
    result = found(bench, tmp_path, {BASE: 0.0, "lora_rank 2": 0.3, "lora_rank 32": -0.2, "lora_rank 64": 0.0})
    directory = tmp_path / "report"
    publish_ablation(directory, result, MANIFEST)
    manifest = read_manifest(directory, kind="ablation", verify="hashes")
    assert set(manifest.outputs) == {"experiment_manifest.json", "lora_rank.png", "report.html", "report.json"}
    assert manifest.results["conclusion"] == result.conclusion
    assert read_ablation(directory, "data", "model") == result
    assert read_ablation(directory, "other data", "model") is None
    stored = json.loads((directory / "report.json").read_text())
    for arm in stored["arms"]:
        for run in arm["runs"]:
            assert run["run_id"]
            assert (run["adapter_hash"], run["evaluation_sha256"]) == ("a" * 64, "e" * 64)
    page = (directory / "report.html").read_text()
    assert result.conclusion in page.replace("&lt;", "<")
    assert "&lt;b&gt;which rank" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    told = step_result(result, directory)
    assert told.metadata["trainings"] == 12
    assert told.output_text.splitlines()[-1] == result.conclusion
    assert len(told.output_text.splitlines()) == len(result.arms) + 1
