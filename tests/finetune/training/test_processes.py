"""A training in two processes over gloo, started by torchrun."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigurationError, RemoteError, TransientError
from finetune.progress import ProgressEvent
from finetune.publishing import read_manifest
from finetune.training.checkpoints import newest_complete
from finetune.training.models import TrainingRequest, TrainingResult
from finetune.training.processes import refuse_wrong_split
from finetune.training.sft import train_adapter

MakeRequest = Callable[..., TrainingRequest]


def test_two_processes_learn_what_one_does_also_when_they_were_stopped_in_between(make_request: MakeRequest) -> None:
    settings: dict[str, Any] = {"micro_batch": 2, "accumulation": 4, "checkpoint_seconds": 0.0}
    asked: list[int] = []

    def still_mine_but_told_to_end() -> bool:
        asked.append(len(asked))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    alone = train_adapter(make_request(place="alone", **settings))
    request = make_request(place="two", **settings).model_copy(update={"processes": 2})
    with pytest.raises(TransientError, match=r"asked to end after step (\d) of 9"):
        train_adapter(request, still_mine=still_mine_but_told_to_end)
    newest = newest_complete(request.work_dir / "checkpoints")
    assert newest is not None
    states = {file.name for file in newest[0].glob("rng_state_*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}, "otherwise one process trained"
    assert not request.adapter_dir.exists()

    together = train_adapter(request)
    assert 0 < together.resumed_from_step == len(newest[1]["points"]) < together.training_steps == 9
    assert [point.loss for point in together.loss_curve] == pytest.approx(
        [point.loss for point in alone.loss_curve], abs=1e-4
    )
    assert (together.tokens_seen, together.trainable_params) == (alone.tokens_seen, alone.trainable_params)
    assert (alone.processes, together.processes) == (1, 2)
    assert read_manifest(request.adapter_dir, kind="adapter", verify="hashes").results["training_steps"] == 9


# A base model with code of its own, whose second process runs out of memory at a step, as long as the micro-batch is
# large; it tells what it saw.
SMALL_MEMORY = """
import os
import torch
from transformers import LlamaForCausalLM

steps = 0

def strike(model, arguments, inputs):
    global steps
    steps += model.training
    if steps == 4 and not os.path.exists(SEEN):
        weights = [p for p in model.layers.parameters() if not p.requires_grad]
        here = sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)
        with open(SEEN, "a") as file:
            print(here, file=file)
        raise torch.OutOfMemoryError("no room")

class SmallMemory(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        if os.environ.get("RANK") == "1":
            self.model.register_forward_pre_hook(strike, with_kwargs=True)
"""


def test_two_processes_that_share_the_weights_and_run_out_of_memory_go_on_from_the_checkpoint_with_half_the_batch(
    make_request: MakeRequest, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    alone = train_adapter(make_request(place="alone", max_steps=6))
    request = make_request(place="two", max_steps=6, checkpoint_seconds=0.0)
    directory = shutil.copytree(request.base_model.path, tmp_path / "model")
    (directory / "small_memory.py").write_text(f"SEEN = {str(seen)!r}\n{SMALL_MEMORY}")
    config = json.loads((directory / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "small_memory.SmallMemory"}}
    (directory / "config.json").write_text(json.dumps(config | named))
    base_model = request.base_model.model_copy(update={"path": directory, "trust_remote_code": True})
    events: list[ProgressEvent] = []
    together = train_adapter(
        request.model_copy(update={"processes": 2, "sharding": "fsdp", "base_model": base_model}),
        on_progress=events.append,
    )
    assert seen.read_text() == "0.5\n", "otherwise memory did not run out, or the weights were whole"
    assert [event.done for event in events if event.stage.startswith("out of memory")] == [4]
    assert (together.micro_batch, together.out_of_memory, together.resumed_from_step) == (2, [4], 3)
    assert [point.loss for point in together.loss_curve] == pytest.approx(
        [point.loss for point in alone.loss_curve], abs=1e-4
    )
    assert (together.tokens_seen, together.trainable_params) == (alone.tokens_seen, alone.trainable_params)
    from safetensors.numpy import load_file

    learned, expected = (load_file(place / "adapter_model.safetensors") for place in adapters(together, alone))
    assert learned.keys() == expected.keys()
    for name, tensor in expected.items():
        assert learned[name].shape == tensor.shape
        assert abs(learned[name] - tensor).max() < 1e-3


def adapters(*results: TrainingResult) -> list[Path]:
    return [result.adapter_path for result in results if result.adapter_path is not None]


@pytest.mark.parametrize("trial", [{"method": "qlora"}, {"use_dora": True}, {"use_pissa": True}], ids=str)
def test_methods_that_need_whole_weights_are_refused_where_weights_are_shared(
    make_request: MakeRequest, trial: dict[str, Any]
) -> None:
    request = make_request(**trial).model_copy(update={"processes": 2, "sharding": "fsdp"})
    with pytest.raises(ConfigurationError, match=r"whole in every process \[TRAIN_SHARDING=fsdp\].*ddp"):
        train_adapter(request)
    assert not request.work_dir.exists()


def test_a_step_that_cannot_be_shared_is_refused() -> None:
    refuse_wrong_split(8, 1)
    with pytest.raises(ConfigurationError, match=r"8 records a step cannot be shared by 3 processes.*MICRO_BATCH"):
        refuse_wrong_split(8, 3)


def launchers() -> list[int]:
    """The torchruns that this process has started."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    return [int(pid) for pid in children if b"torch.distributed" in Path(f"/proc/{pid}/cmdline").read_bytes()]


AGREE = """
import sys
import torch.distributed as dist
from finetune.errors import ConfigurationError
from finetune.training.ranks import agree_on_micro_batch

meeting, rank, training, micro_batch = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
try:
    print(agree_on_micro_batch(training, int(micro_batch)))
except ConfigurationError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("second", "answer"),
    [("one (ddp)", "2"), ("one (fsdp)", "asked for different trainings: one (ddp), one (fsdp)")],
    ids=["the same", "another"],
)
def test_nodes_take_the_smallest_micro_batch_of_one_training_and_refuse_another(
    tmp_path: Path, second: str, answer: str
) -> None:
    nodes = [
        subprocess.Popen([sys.executable, "-c", AGREE, tmp_path / "meeting", *asked], stdout=subprocess.PIPE, text=True)
        for asked in (("0", "one (ddp)", "4"), ("1", second, "2"))
    ]
    told = [node.communicate(timeout=120)[0] for node in nodes]
    assert all(answer in text for text in told), told


def test_a_request_to_end_that_comes_before_the_workers_have_come_is_not_lost(make_request: MakeRequest) -> None:
    request = make_request().model_copy(update={"processes": 2})
    asked: list[int] = []

    def ask_as_soon_as_there_is_a_launcher() -> None:
        while not asked:
            asked.extend(launchers())
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_as_soon_as_there_is_a_launcher, daemon=True).start()
    with pytest.raises(TransientError, match=r"ended with status|asked to end"):
        train_adapter(request)
    assert asked
    assert not request.adapter_dir.exists()


def test_a_worker_s_error_reaches_its_parent_whole() -> None:
    error = pickle.loads(pickle.dumps(RemoteError("no answer", where="the database", remedy="Wait")))
    assert isinstance(error, RemoteError)
    assert str(error) == "no answer [the database]. Wait"


def test_workers_that_are_killed_are_worth_another_try(make_request: MakeRequest) -> None:
    request = make_request(checkpoint_seconds=0.0).model_copy(update={"processes": 2})

    def kill_workers(event: ProgressEvent) -> None:
        if event.stage == "reading records":
            (launcher,) = launchers()
            workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            killed.extend(int(pid) for pid in workers)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    killed: list[int] = []
    with pytest.raises(TransientError, match="the 2 processes of the training ended with status"):
        train_adapter(request, on_progress=kill_workers)
    assert len(killed) == 2
