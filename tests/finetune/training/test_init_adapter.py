"""Trainings that begin with the weights of an adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ArtifactError, ConfigurationError
from finetune.progress import ignore_progress
from finetune.publishing import publish_directory, read_manifest
from finetune.training.attempt import LOG_NAME
from finetune.training.init_adapter import plan_like, read_init_adapter
from finetune.training.models import InitAdapter, TrainingRequest
from finetune.training.sft import dry_run, train_adapter
from resources.h2o_trainer import H2OTrainer
from tests.finetune.training.test_faults import TRAIN

MakeRequest = Callable[..., TrainingRequest]

# So small a step changes nothing that can be seen.
STILL = {"learning_rate": 1e-12, "max_steps": 1}
OTHER_RECORDS = [{"instruction": f"Which number follows {i}?", "output": f"{i + 1} does."} for i in range(24)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, make_request_at: MakeRequest) -> TrainingRequest:
    """A LoRA that was trained on other records than those of the trainings that begin with it."""
    request = make_request_at(tmp_path_factory.mktemp("first"), records=OTHER_RECORDS)
    train_adapter(request)
    return request


def starting_from(request: TrainingRequest, adapter: Path) -> TrainingRequest:
    return request.model_copy(update={"init_adapter": read_init_adapter(adapter)})


def weights_of(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    # qlora's are in bfloat16, which NumPy has not.
    return {name: tensor.float().numpy() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"method": "ia3"},
        {"method": "prefix", "virtual_tokens": 4},
        {"method": "qlora"},
    ],
    ids=["lora", "dora", "rslora", "ia3", "prefix", "qlora"],
)
def test_a_training_begins_where_the_adapter_ended(make_request: MakeRequest, kind: dict[str, Any]) -> None:
    import numpy as np

    before = make_request(place="before", records=OTHER_RECORDS, max_steps=2, **kind)
    train_adapter(before)
    request = starting_from(make_request(place="after", **kind, **STILL), before.adapter_dir)
    result = train_adapter(request)
    old, new = weights_of(before.adapter_dir), weights_of(request.adapter_dir)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        np.testing.assert_allclose(new[name], tensor, atol=1e-9, err_msg=name)
    assert result.trainable_params == sum(tensor.size for tensor in old.values())


def test_what_the_adapter_has_learned_need_not_be_learned_again(
    first: TrainingRequest, make_request: MakeRequest
) -> None:
    losses = [point["loss"] for point in map(json.loads, (first.adapter_dir / LOG_NAME).read_text().splitlines())]
    again = starting_from(make_request(records=OTHER_RECORDS, max_steps=1), first.adapter_dir)
    assert train_adapter(again).loss_curve[0].loss < (losses[0] + losses[-1]) / 2


def test_what_pissa_made_is_gone_on_with_as_the_plain_lora_of_twice_the_rank_that_it_is(
    make_request: MakeRequest,
) -> None:
    before = make_request(place="before", records=OTHER_RECORDS, max_steps=2, use_pissa=True)
    train_adapter(before)
    method, like = plan_like(before.adapter_dir)
    assert (method, like.lora_rank, like.use_pissa) == ("lora", 8, False)
    same = {name: value for name, value in like.model_dump(exclude_none=True).items() if name != "use_pissa"}
    request = starting_from(make_request(place="after", **STILL, **same), before.adapter_dir)
    train_adapter(request)
    for name, tensor in weights_of(before.adapter_dir).items():
        assert abs(weights_of(request.adapter_dir)[name] - tensor).max() < 1e-9


def test_manifest_and_card_say_what_the_training_began_with(first: TrainingRequest, make_request: MakeRequest) -> None:
    request = starting_from(make_request(max_steps=1), first.adapter_dir)
    train_adapter(request)
    init = request.init_adapter
    assert init is not None
    assert init.run_id == first.run_id
    told = read_manifest(request.adapter_dir, kind="adapter").inputs["init_adapter"]
    assert told == {"run_id": init.run_id, "adapter_hash": init.adapter_hash}
    card = (request.adapter_dir / "README.md").read_text()
    assert f"Training began with the weights of `{init.run_id}` (adapter `{init.adapter_hash[:16]}`)." in card


def test_a_killed_training_that_began_with_an_adapter_goes_on_and_ends_bit_identical(
    first: TrainingRequest, make_request: MakeRequest
) -> None:
    settings: dict[str, Any] = {"lora_dropout": 0.1, "epochs": 4, "checkpoint_seconds": 0.0}
    request = starting_from(make_request(place="killed", **settings), first.adapter_dir)
    mark = request.work_dir / "checkpoints" / "checkpoint-4" / "complete.json"
    child = subprocess.Popen(
        [sys.executable, "-c", TRAIN, request.model_dump_json()], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not mark.exists():
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not request.adapter_dir.exists()
    resumed = train_adapter(request)
    assert 4 <= resumed.resumed_from_step < resumed.training_steps == 12

    uninterrupted = train_adapter(starting_from(make_request(place="whole", **settings), first.adapter_dir))
    assert uninterrupted.resumed_from_step == 0
    assert resumed.loss_curve == uninterrupted.loss_curve
    assert resumed.adapter_hash == uninterrupted.adapter_hash


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"lora_rank": 8}, "r is 4 there, 8 here"),
        ({"lora_alpha": 32}, r"lora_alpha is 16(\.0)? there, 32(\.0)? here"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['down_proj', .*\] there, \['q_proj'\] here"),
        ({"use_rslora": True}, "use_rslora is False there, True here"),
        ({"use_dora": True}, "use_dora is False there, True here"),
        ({"use_pissa": True}, "PiSSA starts from the base model's singular vectors"),
        ({"method": "prefix"}, "peft_type is 'LORA' there, 'PREFIX_TUNING' here"),
        ({"method": "ia3"}, "peft_type is 'LORA' there, 'IA3' here"),
    ],
)
def test_an_adapter_of_another_kind_or_size_is_refused_before_anything_is_loaded(
    first: TrainingRequest, make_request: MakeRequest, other: dict[str, Any], why: str
) -> None:
    request = starting_from(make_request(**other), first.adapter_dir)
    for attempt in (dry_run, train_adapter):
        with pytest.raises(ConfigurationError, match=f"cannot start from {first.run_id}: .*{why}"):
            attempt(request)
    assert not request.work_dir.exists()


def test_an_adapter_of_another_base_model_is_refused(first: TrainingRequest, make_request: MakeRequest) -> None:
    other = first.base_model.model_copy(update={"name": "other", "fingerprint": "1" * 64})
    request = starting_from(make_request(base_model=other), first.adapter_dir)
    with pytest.raises(ConfigurationError, match="trained on another base model than other"):
        train_adapter(request)


def copied(adapter: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """An adapter of somebody else's, without a manifest, whose configuration and tensors were changed."""
    from safetensors.numpy import save_file

    target.mkdir()
    config, weights = json.loads((adapter / "adapter_config.json").read_text()), weights_of(adapter)
    change(config, weights)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, target / "adapter_model.safetensors")
    return target


def test_an_adapter_that_is_no_plain_one_is_refused(
    first: TrainingRequest, make_request: MakeRequest, tmp_path: Path
) -> None:
    def patterned(config: dict[str, Any], weights: dict[str, Any]) -> None:
        config["rank_pattern"] = {"q_proj": 2}

    foreign = copied(first.adapter_dir, tmp_path / "foreign", patterned)
    with pytest.raises(ConfigurationError, match="it has rank_pattern"):
        train_adapter(starting_from(make_request(), foreign))


def test_an_adapter_whose_tensors_do_not_fit_is_refused(
    first: TrainingRequest, make_request: MakeRequest, tmp_path: Path
) -> None:
    """PEFT itself only warns of a tensor that is missing."""

    def torn(config: dict[str, Any], weights: dict[str, Any]) -> None:
        del weights[sorted(weights)[0]]

    request = starting_from(make_request(), copied(first.adapter_dir, tmp_path / "torn", torn))
    with pytest.raises(ArtifactError, match="does not fit the base model: 1 tensors differ, such as base_model"):
        train_adapter(request)
    assert not request.adapter_dir.exists()


def test_an_adapter_that_was_altered_since_it_was_chosen_is_refused(
    first: TrainingRequest, make_request: MakeRequest, tmp_path: Path
) -> None:
    chosen = copied(first.adapter_dir, tmp_path / "chosen", lambda config, weights: None)
    request = starting_from(make_request(), chosen)
    altered = weights_of(chosen)
    altered[sorted(altered)[0]][:] = 1
    from safetensors.numpy import save_file

    save_file(altered, chosen / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="the adapter to start from has the hash"):
        train_adapter(request)


def test_a_registered_version_names_the_training_and_the_method_that_made_it(
    first: TrainingRequest, tmp_path: Path
) -> None:
    with publish_directory(tmp_path / "v1", kind="registered_adapter") as staging:
        copied(first.adapter_dir, staging.path / "tensors", lambda config, weights: None)
        for file in (staging.path / "tensors").iterdir():
            file.rename(staging.path / file.name)
        (staging.path / "tensors").rmdir()
        told = {"run_id": "20260601-abc", "inputs": {"base_model_fingerprint": "f", "plan": {"method": "qlora"}}}
        (staging.path / "experiment_manifest.json").write_text(json.dumps(told))
    assert read_init_adapter(tmp_path / "v1").run_id == "20260601-abc"
    assert plan_like(tmp_path / "v1")[0] == "qlora"
    assert plan_like(first.adapter_dir)[0] == "lora"


def test_h2o_does_not_train_from_an_adapter_and_says_so(first: TrainingRequest, make_request: MakeRequest) -> None:
    request = make_request().model_copy(
        update={"init_adapter": InitAdapter(path=first.adapter_dir, run_id="r", adapter_hash="h")}
    )
    trainer = H2OTrainer(api_url="http://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="the H2O server cannot start a training from an adapter"):
        trainer.train(request, on_progress=ignore_progress, on_external_run=lambda run, url: None)
