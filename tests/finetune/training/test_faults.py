from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import BaseModelError, ConfigurationError, DatasetError, TrainingError, TransientError
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.training import monitor
from finetune.training.checkpoints import newest_complete, step_of
from finetune.training.memory import note_out_of_memory
from finetune.training.models import TrainingRequest
from finetune.training.sft import dry_run, train_adapter

MakeRequest = Callable[..., TrainingRequest]

TRAIN = """
import sys
from finetune.training import monitor
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter
train_adapter(TrainingRequest.model_validate_json(sys.argv[1]))
"""


def stop_after_first_step(event: ProgressEvent) -> None:
    if event.stage == "training" and event.done == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_training_goes_on_and_ends_bit_identical(make_request: MakeRequest) -> None:
    settings: dict[str, Any] = {"lora_dropout": 0.1, "epochs": 4, "checkpoint_seconds": 0.0}
    request = make_request(place="killed", **settings)
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

    uninterrupted = train_adapter(make_request(place="whole", **settings))
    assert uninterrupted.resumed_from_step == 0
    assert resumed.loss_curve == uninterrupted.loss_curve
    assert resumed.adapter_hash == uninterrupted.adapter_hash
    weights = "adapter_model.safetensors"
    assert (request.adapter_dir / weights).read_bytes() == (
        request.adapter_dir.parents[1] / "whole" / "adapter" / weights
    ).read_bytes()


def test_sigterm_saves_a_checkpoint_and_the_next_attempt_goes_on_from_it(make_request: MakeRequest) -> None:
    request = make_request()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TransientError, match="asked to end after step 1 of 9"):
        train_adapter(request, on_progress=stop_after_first_step)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not request.adapter_dir.exists()
    assert train_adapter(request).resumed_from_step == 1


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(checkpoint_seconds=0.0)

    def stop_at_three(event: ProgressEvent) -> None:
        checkpoints = request.work_dir / "checkpoints"
        if (checkpoints / "checkpoint-3").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(monitor, "_REPORT_SECONDS", 0.0)
    with pytest.raises(TransientError):
        train_adapter(request, on_progress=stop_at_three)
    checkpoints = request.work_dir / "checkpoints"
    found = newest_complete(checkpoints)
    assert found is not None
    newest = found[0]
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = newest_complete(checkpoints)
    assert before is not None
    assert step_of(before[0]) == step_of(newest) - 1
    assert train_adapter(request).resumed_from_step == step_of(newest) - 1


def test_a_named_checkpoint_is_gone_on_from_unless_it_is_damaged_or_of_another_training(
    make_request: MakeRequest,
) -> None:
    stopped = make_request()
    with pytest.raises(TransientError):
        train_adapter(stopped, on_progress=stop_after_first_step)
    checkpoint = stopped.work_dir / "checkpoints" / "checkpoint-1"
    elsewhere = make_request(place="elsewhere").model_copy(update={"resume_from": checkpoint})
    with pytest.raises(ConfigurationError, match=r"belongs to the training 20260601-0123456789, not to other"):
        train_adapter(elsewhere.model_copy(update={"run_id": "other"}))
    with pytest.raises(ConfigurationError, match="no whole checkpoint here"):
        train_adapter(elsewhere.model_copy(update={"resume_from": checkpoint.parent}))
    resumed = train_adapter(elsewhere)
    assert resumed.resumed_from_step == 1
    assert resumed.adapter_hash == train_adapter(make_request(place="whole")).adapter_hash
    (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="no whole checkpoint here"):
        train_adapter(make_request(place="again").model_copy(update={"resume_from": checkpoint}))


def test_out_of_memory_halves_the_micro_batch_and_goes_on_from_the_last_checkpoint_and_learns_the_same(
    make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaModel

    request = make_request(place="little", checkpoint_seconds=0.0)
    third = request.work_dir / "checkpoints" / "checkpoint-3" / "complete.json"
    forward = LlamaModel.forward
    struck, taken = [], []
    room = math.inf

    def small_memory(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
        if input_ids.numel() > room and third.exists():
            struck.append(len(input_ids))
            raise torch.OutOfMemoryError("no room")
        taken.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", small_memory)
    expected = [point.loss for point in train_adapter(make_request(place="plenty")).loss_curve]
    room = min(records * tokens for records, tokens in taken) - 1
    taken.clear()
    result = train_adapter(request)
    assert len(struck) == 1
    # Eight records a step before and after.
    records = [records for records, _ in taken]
    assert [sum(records[at : at + 2]) for at in range(0, 6, 2)] == [8] * 3
    assert [sum(records[at : at + 4]) for at in range(6, 30, 4)] == [8] * 6
    assert (result.resumed_from_step, result.micro_batch, result.out_of_memory) == (3, 2, [4])
    assert [point.loss for point in result.loss_curve] == pytest.approx(expected, abs=1e-4)
    assert read_manifest(request.adapter_dir).results["out_of_memory"] == [4]


def test_a_micro_batch_that_was_too_large_is_not_tried_again_by_the_next_attempt(
    make_request: MakeRequest,
) -> None:
    request = make_request(max_steps=1)
    note_out_of_memory(request.work_dir, 4)
    result = train_adapter(request)
    assert (result.micro_batch, result.out_of_memory) == (2, [4])


def test_answers_that_truncation_eats_are_refused_before_the_first_step(make_request: MakeRequest) -> None:
    fine = {"instruction": "Why?", "output": "So."}
    long = {"instruction": "Why? " * 100, "output": "So."}
    with pytest.raises(TrainingError, match=r"1 of 2 records .* max_length 64: line 2 \(the answer begins at token"):
        train_adapter(make_request(records=[fine, long], max_length=64))


def test_records_whose_labels_are_all_ignored_are_named_before_the_first_step(
    own_model: TrainingRequest, make_request: MakeRequest
) -> None:
    text = "{% for m in messages %}{{ m.role }}: {% if m.content == 'So.' %}{% generation %}So.{% endgeneration %}"
    marks_one_answer = text + "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    (own_model.base_model.path / "chat_template.jinja").write_text(marks_one_answer)
    records = [{"instruction": "Why?", "output": output} for output in ("So.", "Because.", "So.", "Thus.")]
    request = make_request(base_model=own_model.base_model, records=records)
    with pytest.raises(TrainingError, match=r"2 of 4 records .*: line 2 \(no answer\), line 4 \(no answer\)"):
        train_adapter(request)
    assert not request.work_dir.exists()


def test_what_is_no_training_record_is_named(make_request: MakeRequest) -> None:
    silent = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
    with pytest.raises(DatasetError, match="record 2: not a training record: no_assistant_turn"):
        train_adapter(make_request(records=[{"instruction": "Why?", "output": "So."}, silent]))


def test_a_template_without_generation_markers_that_writes_earlier_turns_anew_is_refused_with_the_record_named(
    own_model: TrainingRequest, make_request: MakeRequest
) -> None:
    forgetful = "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '...' }}\n{% endfor %}"
    (own_model.base_model.path / "chat_template.jinja").write_text(forgetful)
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    fine = {"instruction": "Why?", "output": "So."}
    # Behind more records than are encoded at once.
    request = make_request(base_model=own_model.base_model, records=[*[fine] * 2050, {"messages": turns}])
    with pytest.raises(DatasetError, match=r"record 1: .*no generation markers.*Put \{% generation %\}"):
        train_adapter(request)
    late = forgetful.replace("loop.last", "loop.last or loop.index < 3")
    (own_model.base_model.path / "chat_template.jinja").write_text(late)
    with pytest.raises(DatasetError, match=r"record 2051: .*no generation markers"):
        train_adapter(request)


def test_a_long_answer_is_cut_on_purpose_and_counted(make_request: MakeRequest) -> None:
    request = make_request(records=[{"instruction": "Why?", "output": "So. " * 100}], max_length=64, max_steps=1)
    train_adapter(request)
    assert read_manifest(request.adapter_dir).inputs["truncated_records"] == 1


def test_an_empty_dataset_is_refused(make_request: MakeRequest) -> None:
    with pytest.raises(TrainingError, match=r"no record to train on.*train\.jsonl"):
        train_adapter(make_request(records=[]))


@pytest.fixture
def own_model(make_request: MakeRequest, tmp_path: Path) -> TrainingRequest:
    request = make_request()
    copy = shutil.copytree(request.base_model.path, tmp_path / "model")
    return make_request(base_model=request.base_model.model_copy(update={"path": copy}))


def test_a_truncated_weight_file_gives_one_clear_error(own_model: TrainingRequest) -> None:
    weights = own_model.base_model.path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(BaseModelError, match=r"cannot be loaded.*Download the base model again"):
        train_adapter(own_model)
    assert not own_model.adapter_dir.exists()


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(own_model: TrainingRequest) -> None:
    from safetensors.torch import load_file, save_file

    weights = own_model.base_model.path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        train_adapter(own_model)


def test_code_of_the_base_model_runs_only_if_it_is_trusted(
    own_model: TrainingRequest, make_request: MakeRequest, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaForCausalLM\n"
    code += "class OurLlama(LlamaForCausalLM):\n    pass\n"
    (own_model.base_model.path / "modeling_ours.py").write_text(code)
    config = own_model.base_model.path / "config.json"
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_ours.OurLlama"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    train_adapter(make_request(place="untrusted", base_model=own_model.base_model, max_steps=1))
    assert not ran.exists()
    trusted = own_model.base_model.model_copy(update={"trust_remote_code": True})
    train_adapter(make_request(place="trusted", base_model=trusted, max_steps=1))
    assert ran.exists()


def test_what_needs_a_gpu_is_refused_without_one(make_request: MakeRequest) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigurationError, match=r"paged_adamw_8bit needs a GPU"):
        train_adapter(make_request(optimizer="paged_adamw_8bit"))


@pytest.mark.parametrize(
    "trial",
    [{"method": "prefix", "packing": True}, {"method": "qlora", "use_pissa": True}],
    ids=lambda trial: trial["method"],
)
def test_a_plan_changed_by_hand_whose_choices_exclude_each_other_is_refused(
    make_request: MakeRequest, trial: dict[str, Any]
) -> None:
    request = make_request(**trial)
    for begin in (train_adapter, dry_run):
        with pytest.raises(ConfigurationError, match=r"does not work with packed records|4-bit weights"):
            begin(request)
    assert not request.work_dir.exists()


def test_wrong_labels_of_the_trainer_are_noticed(make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling.torch_call

    def learn_everything(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        batch["labels"] = batch["input_ids"].clone()
        return batch

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", learn_everything)
    with pytest.raises(TrainingError, match="other tokens of line"):
        train_adapter(make_request())


def test_attention_that_leaks_between_packed_records_is_noticed(
    make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling.torch_call

    def one_long_record(self: Any, examples: Any) -> Any:
        batch = collate(self, examples)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", one_long_record)
    with pytest.raises(TrainingError, match="packed records see each other"):
        train_adapter(make_request(packing=True))


FULL_DISK = """
import sys
from pathlib import Path
import subprocess
from finetune.errors import StorageFullError
from finetune.training import monitor
from finetune.training.models import TrainingRequest
from finetune.training.sft import train_adapter
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "none", disk], check=True)
request = TrainingRequest.model_validate_json(sys.argv[1])
try:
    train_adapter(request)
except StorageFullError as error:
    print("FULL", error)
assert not request.adapter_dir.exists()
assert not [path for path in disk.rglob("*") if ".tmp-" in path.name]
subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
print("THEN", train_adapter(request).status)
"""


def test_a_full_disk_is_named_and_the_same_call_succeeds_when_there_is_room(
    make_request: MakeRequest, tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("the kernel allows no user namespaces here")
    disk = tmp_path / "disk"
    disk.mkdir()
    request = make_request(max_steps=2)
    request = request.model_copy(update={"adapter_dir": disk / "adapter", "work_dir": disk / "work"})
    arguments = [request.model_dump_json(), str(disk)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FULL no space left on the disk" in done.stdout, done.stderr
    assert "THEN completed" in done.stdout, done.stderr
