"""An ensemble with real trainings: what is combined, what is published, and what is not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_hash
from finetune.base_model.models import BaseModelRef
from finetune.errors import ConfigurationError, TrainingError
from finetune.evaluation.losses import read_losses
from finetune.planning.history import Measurement
from finetune.progress import ignore_progress
from finetune.publishing import publish_directory, read_manifest, sha256_file
from finetune.reproduction.models import ExperimentManifest
from finetune.search.candidates import plan_of
from finetune.search.ensemble.judging import halves
from finetune.search.ensemble.report import publish_report
from finetune.search.ensemble.result import EnsembleResult
from finetune.search.ensemble.spec import EnsembleSpec
from lora_assets.ensembles import propose, run_ensemble
from lora_assets.laboratory import Laboratory, make_bench, train
from lora_assets.settings import Settings
from resources.run_log import RunLog
from tests.lora_assets.ensemble_records import FIXED, records

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A data root whose path is short enough for the socket of an embedded server."""
    with tempfile.TemporaryDirectory(prefix="la-", dir="/tmp") as short:
        yield Path(short)


@dataclass(frozen=True)
class Place:
    """Where ensembles run whose members are these trainings."""

    laboratory: Laboratory
    spec: EnsembleSpec
    adapters: list[Path]

    def run(self, **changes: Any) -> EnsembleResult:
        """The ensemble with some fields changed."""
        spec = EnsembleSpec.model_validate({**self.spec.model_dump(exclude_unset=True), **changes})
        return run_ensemble(self.laboratory, spec, ignore_progress)


@pytest.fixture(scope="module")
def place(root: Path, tiny_model: BaseModelRef) -> Iterator[Place]:
    """Three members: one trained but for noise, the same with the opposite noise, and garbage."""
    settings = Settings(data_root=root / "data", base_model_name=str(tiny_model.path), eval_fraction=0.4)
    spec = EnsembleSpec(dataset_path=records(root / "records.jsonl"), n_members=3, fixed=FIXED)
    bench = make_bench(settings, spec, ignore_progress, weights=True)
    run_log = RunLog(data_dir=str(settings.data_root))
    laboratory = Laboratory(bench, settings, run_log, "ensemble")
    adapters = [
        train(laboratory, plan_of(spec, bench, each.params, method="lora"), on_progress=ignore_progress)
        for each in spec.members
    ]
    paths = [each.request.adapter_dir for each in adapters]
    trained = load(paths[0])

    def plus(factor: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda name, tensor: trained[name] + (factor * noise(name, tensor) if "lora_B" in name else 0)

    replace_weights(paths[0], plus(0.4))
    replace_weights(paths[1], plus(-0.4))
    replace_weights(paths[2], lambda name, tensor: 3 * noise(name, tensor))
    yield Place(laboratory, spec, paths)
    run_log.close()


def noise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))


def load(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path / WEIGHTS_NAME)


def replace_weights(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Publish an adapter anew with other weights, as if its training had come to them."""
    from safetensors.torch import save_file

    manifest, tensors = read_manifest(path), load(path)
    config = (path / CONFIG_NAME).read_bytes()
    with publish_directory(path, kind="adapter") as staging:
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, staging.path / WEIGHTS_NAME)
        (staging.path / CONFIG_NAME).write_bytes(config)
        staging.inputs, staging.parameters, staging.results = manifest.inputs, manifest.parameters, manifest.results


def updates(path: Path) -> Tensors:
    config, tensors = json.loads((path / CONFIG_NAME).read_bytes()), load(path)
    scale = config["lora_alpha"] / config["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def test_a_combination_that_a_bad_member_spoils_is_not_published(place: Place) -> None:
    result = place.run(weighting="uniform")
    assert result.status == "not_published"
    assert result.adapter_path is None
    assert not place.laboratory.settings.layout.adapter(result.name).exists()
    assert result.verdict is not None
    assert result.verdict.delta is not None
    assert result.verdict.delta > 0
    assert "the combination is worse" in result.reason
    assert [member.weight for member in result.members] == pytest.approx([1 / 3] * 3)
    assert all(member.gpu_hours and member.gpu_hours > 0 for member in result.members)
    # What was found is there all the same, and says why.
    assert result.path is not None
    assert "Not published: against the best member" in (result.path / "report.html").read_text()
    assert set(read_manifest(result.path, kind="ensemble", verify="hashes").outputs) == {
        "experiment_manifest.json",
        "losses.png",
        "report.html",
        "report.json",
    }


def test_the_greedy_soup_leaves_the_bad_member_out_and_is_published(place: Place, tiny_model: BaseModelRef) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = place.run()
    assert result.status == "published", result.model_dump_json(indent=1)
    assert [member.weight for member in result.members] == [0.5, 0.5, 0.0]
    assert [(taste.member, taste.kept) for taste in result.tastes][-1] == (2, False)
    assert result.adapter_path is not None
    # The opposite noise of both members is gone from the combination.
    one, two, both = (updates(path) for path in (*place.adapters[:2], result.adapter_path))
    for name, update in both.items():
        assert torch.allclose(update, (one[name] + two[name]) / 2, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path)
    loaded = PeftModel.from_pretrained(base, str(result.adapter_path))
    assert loaded.peft_config["default"].r == 8
    manifest = read_manifest(result.adapter_path, kind="adapter", verify="hashes")
    assert manifest.results["adapter_hash"] == adapter_hash(result.adapter_path)
    assert [member["weight"] for member in manifest.inputs["members"]] == [0.5, 0.5]
    card = (result.adapter_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"`{result.members[0].run_id}` | 0.5000" in card


def test_every_figure_is_computed_from_the_evaluations_that_the_report_names(place: Place) -> None:
    result = place.run()
    assert result.path is not None
    told = json.loads((result.path / "report.json").read_text())
    dataset = place.laboratory.bench.dataset
    assert told["dataset_fingerprint"] == dataset.fingerprint
    evaluated = [member["evaluated"] for member in told["members"]] + [told["combination"]]
    of_run = {}
    for each in evaluated:
        report = Path(each["report_path"]) / "report.json"
        assert sha256_file(report) == each["report_sha256"]
        found = json.loads(report.read_text())
        assert (found["run_id"], found["adapter_hash"]) == (each["run_id"], each["adapter_hash"])
        losses = read_losses(report.parent)
        split = halves(dataset.eval_path, losses.lines)
        for half in ("selection", "judging"):
            rows = getattr(split, half)
            mean = sum(losses.nats[row] for row in rows) / sum(losses.tokens[row] for row in rows)
            assert each["figures"][f"{half}_loss"] == pytest.approx(mean, rel=1e-12)
        of_run[each["run_id"]] = each["figures"]["judging_loss"]
    best = next(member for member in told["members"] if member["name"] == told["best_member"])
    assert told["verdict"]["delta"] == pytest.approx(of_run[told["name"]] - of_run[best["run_id"]])
    assert told["verdict"]["delta"] < 0
    assert told["selection_records"] + told["judging_records"] == len(losses.lines)


def test_run_again_an_ensemble_is_taken_as_it_is_and_a_lost_report_repeats_no_training(place: Place) -> None:
    log = place.laboratory.run_log
    first = place.run()
    rows = log.recent(100)
    again = place.run()
    assert again.reused
    assert again.model_copy(update={"reused": False}) == first.model_copy(update={"reused": False})
    assert first.path is not None
    shutil.rmtree(first.path)
    anew = place.run()
    assert not anew.reused
    assert anew.verdict == first.verdict
    assert [row.id for row in log.recent(100)] == [row.id for row in rows]
    assert not place.laboratory.settings.layout.work(first.name).exists()


def test_a_member_whose_training_failed_is_tried_again_and_what_was_published_without_it_withdrawn(
    place: Place,
) -> None:
    spoilt = place.run(weighting="uniform")
    assert spoilt.path is not None
    adapter = place.laboratory.settings.layout.adapter(spoilt.name)
    shutil.copytree(place.adapters[0], adapter)
    failed = spoilt.members[2].model_copy(update={"fault": "out of memory", "adapter_path": None, "evaluated": None})
    manifest = ExperimentManifest.model_validate_json((spoilt.path / "experiment_manifest.json").read_bytes())
    publish_report(spoilt.path, spoilt.model_copy(update={"members": [*spoilt.members[:2], failed]}), manifest)
    again = place.run(weighting="uniform")
    assert not again.reused
    assert again.members == spoilt.members
    assert again.status == "not_published"
    assert not adapter.exists()


def test_a_member_whose_losses_are_no_numbers_is_left_out_of_every_weighting(place: Place) -> None:
    import torch

    before = load(place.adapters[2])
    replace_weights(place.adapters[2], lambda name, tensor: torch.full_like(tensor, torch.nan))
    try:
        result = place.run(weighting="inverse_loss", goal="with a member of NaN", seed=place.spec.seed)
    finally:
        replace_weights(place.adapters[2], lambda name, tensor: before[name])
    assert "no numbers" in result.members[2].fault
    assert result.members[2].weight == 0
    assert sum(member.weight for member in result.members) == pytest.approx(1)
    assert result.status == "published"
    assert result.path is not None
    assert "no numbers" in (result.path / "report.html").read_text()


def test_a_soup_of_one_member_is_not_published(place: Place) -> None:
    result = place.run(weighting="softmax_loss", temperature=1e-6)
    assert result.status == "not_published"
    assert result.combination is None
    assert "alone has a weight" in result.reason


def test_members_that_all_diverge_are_an_error(place: Place) -> None:
    fixed = {**FIXED, "learning_rate": 1e30, "warmup_ratio": 0.0}
    with pytest.raises(TrainingError, match="no member can be used"):
        place.run(fixed=fixed, n_members=2)


def test_members_that_would_take_too_long_together_are_refused_before_any_is_trained(place: Place) -> None:
    lab = place.laboratory
    hurried = replace(lab, settings=lab.settings.model_copy(update={"max_gpu_hours": 1e-9}))
    spec = EnsembleSpec(n_members=5, fixed=FIXED, tokens_per_second=1000)
    with pytest.raises(ConfigurationError, match="2 trainings need about"):
        run_ensemble(hurried, spec, ignore_progress)


def test_measurements_change_the_price_and_no_configuration(place: Place) -> None:
    spec, bench = EnsembleSpec(n_members=2, fixed={**FIXED, "gradient_checkpointing": False}), place.laboratory.bench
    needed = plan_of(spec, bench, spec.members[0].params, method="lora").memory_estimate.vram_gb
    tight = replace(bench, vram_limit_gb=1.1 * needed)
    assert propose(spec, tight).gpu_hours is None
    took = Measurement(method="lora", device="cpu", estimated_memory_gb=1.0, peak_memory_gb=3.0, tokens_per_second=60.0)
    with pytest.raises(ConfigurationError, match="needs about"):
        plan_of(spec, tight.measured([took]), spec.members[0].params, method="lora")
    assert propose(spec, tight.measured([took])).gpu_hours
