"""Who trains beside whom: our trainer and a plain TRL script, each run in a process of its own.

``python -m benchmarks.training.contenders CONTENDER CASE`` trains a case given as JSON and prints when its first step
began.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import read_model_shape
from finetune.planning.models import TrainingPlan, TrialConfig
from finetune.training.data import TrainingData, read_training_data, training_order
from finetune.training.micro_batches import micro_batches

# The first steps also fill caches.
SKIPPED_STEPS = 2
_RANK, _ALPHA = 16, 32


@dataclass(frozen=True)
class Case:
    """One training that both sides do.

    `records` and `held_out` are JSON Lines files. A step has `micro_batch` x `accumulation` records. Without
    `held_out` the adapter is not scored.
    """

    model: str
    records: str
    held_out: str | None
    max_length: int
    micro_batch: int
    steps: int
    accumulation: int = 1
    learning_rate: float = 1e-3
    precision: Literal["fp32", "bf16"] = "fp32"
    packing: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What a run took.

    Attributes:
        began: when the first step did (`time.time`).
        seconds: of each step but the first two and the last.
        cpu_seconds: the processors' in the same steps.
        tokens: of the same steps, padding apart.
        train_loss: the mean of all steps.
        held_out_loss: per token, on the held-out records.
        device: "cpu" or the GPU's name.
        peak_gb: what the GPU had to have, in GB (10^9 bytes); 0 without one.
    """

    began: float
    seconds: list[float]
    cpu_seconds: list[float]
    tokens: int
    train_loss: float
    held_out_loss: float | None
    device: str
    peak_gb: float

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second, padding apart."""
        return self.tokens / sum(self.seconds)

    @property
    def tokens_per_cpu_second(self) -> float:
        """The same by the processors' time: other programs disturb it less."""
        return self.tokens / sum(self.cpu_seconds)


def ours(case: Case, scratch: Path) -> Run:
    """Our trainer, from the file of records to the published adapter."""
    from transformers import trainer

    from finetune.training.request import request_for_file
    from finetune.training.sft import train_adapter

    begins, stamp = _stamps()
    trainer.DEFAULT_CALLBACKS.append(stamp)
    adapter = scratch / "adapter"
    result = train_adapter(
        request_for_file(Path(case.records), plan=_plan(case), base_model=_base(case), output=adapter)
    )
    trial = trial_of(case)
    data = read_training_data(Path(case.records), RecordEncoder.load(Path(case.model)), case.max_length)
    tokens = data.lengths[training_order(len(data), trial)].reshape(-1, trial.effective_batch).sum(axis=1)
    train_loss = sum(point.loss for point in result.loss_curve) / len(result.loss_curve)
    return _run(case, begins, tokens.tolist(), train_loss, adapter)


def plain(case: Case, scratch: Path, our_batches: bool = False) -> Run:
    """A plain TRL script on the same tokens: shuffled and padded, as is TRL's default, or in our batches."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    begins, stamp = _stamps()
    data = read_training_data(Path(case.records), RecordEncoder.load(Path(case.model)), case.max_length)
    rows = _rows(data)
    if our_batches:
        order = training_order(len(data), trial_of(case))
        rows = [rows[index] for index in order]
        sampler = micro_batches(data.lengths[order], case.micro_batch * case.accumulation, case.micro_batch)
    half = case.precision == "bf16"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.bfloat16 if half else torch.float32),
        args=SFTConfig(
            output_dir=str(scratch / "output"),
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.accumulation,
            max_steps=case.steps,
            learning_rate=case.learning_rate,
            lr_scheduler_type="constant",
            bf16=half,
            gradient_checkpointing=case.gradient_checkpointing,
            padding_free=case.packing and our_batches,
            # The rows are tokens already, cut to the maximal length.
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            seed=case.seed,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case.model),
        peft_config=LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[stamp],
    )
    if our_batches:
        trainer._get_train_sampler = lambda dataset: sampler
    collate, sizes = trainer.data_collator, list[int]()

    def counted(batch: list[dict[str, Any]]) -> Any:
        sizes.append(sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer.data_collator = counted
    train_loss = trainer.train().training_loss
    adapter = scratch / "adapter"
    trainer.save_model(str(adapter))
    tokens = [sum(sizes[step * case.accumulation :][: case.accumulation]) for step in range(case.steps)]
    return _run(case, begins, tokens, train_loss, adapter)


def plain_in_our_batches(case: Case, scratch: Path) -> Run:
    """The plain TRL script on the very batches that our trainer makes: what differs is ours."""
    return plain(case, scratch, our_batches=True)


def _stamps() -> tuple[list[tuple[float, float]], Any]:
    """A list that gets the time and the processors' time at which each step begins, and the callback that writes it."""
    from transformers import TrainerCallback

    begins: list[tuple[float, float]] = []

    class Stamp(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begins.append((time.time(), time.process_time()))

    return begins, Stamp()


def _run(case: Case, begins: list[tuple[float, float]], tokens: list[int], train_loss: float, adapter: Path) -> Run:
    device, peak_gb = _device_and_peak()
    # From one step's begin to the next: all that either side does between them counts.
    seconds, cpu_seconds = (
        [after - before for before, after in itertools.pairwise(clock)][SKIPPED_STEPS:]
        for clock in zip(*begins, strict=True)
    )
    return Run(
        began=begins[0][0],
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        tokens=sum(tokens[SKIPPED_STEPS : case.steps - 1]),
        train_loss=train_loss,
        held_out_loss=_held_out_loss(case, adapter) if case.held_out else None,
        device=device,
        peak_gb=peak_gb,
    )


def _held_out_loss(case: Case, adapter: Path) -> float:
    from finetune.evaluation.heldout import read_heldout
    from finetune.evaluation.measure import measure
    from finetune.evaluation.tasks import EvalTasks

    encoder = RecordEncoder.load(Path(case.model))
    found = measure(
        _base(case),
        adapter,
        champion=None,
        encoder=encoder,
        held_out=read_heldout(Path(case.held_out or ""), encoder, max_length=case.max_length),
        questions=[],
        cases=[],
        tasks=EvalTasks([]),
        on_progress=lambda event: None,
    )
    return float(found.adapter.nats.sum() / found.adapter.tokens.sum())


def _device_and_peak() -> tuple[str, float]:
    import torch

    if not torch.cuda.is_available():
        return "cpu", 0.0
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()
    return torch.cuda.get_device_name(), peak / 1e9


def _rows(data: TrainingData) -> list[dict[str, list[int]]]:
    spans = itertools.pairwise(data.offsets.tolist())
    return [{"input_ids": data.input_ids[a:b].tolist(), "labels": data.labels[a:b].tolist()} for a, b in spans]


def _base(case: Case) -> BaseModelRef:
    return BaseModelRef(name="bench", path=Path(case.model), revision=None, fingerprint="0" * 32)


def trial_of(case: Case) -> TrialConfig:
    """The case as our plan says it."""
    return TrialConfig(
        trial_id="bench",
        lora_rank=_RANK,
        lora_alpha=_ALPHA,
        learning_rate=case.learning_rate,
        lr_schedule="constant",
        warmup_ratio=0,
        micro_batch=case.micro_batch,
        accumulation=case.accumulation,
        max_steps=case.steps,
        max_length=case.max_length,
        packing=case.packing,
        precision=case.precision,
        gradient_checkpointing=case.gradient_checkpointing,
        seed=case.seed,
    )


def _plan(case: Case) -> TrainingPlan:
    trial = trial_of(case)
    return TrainingPlan(
        trial_config=trial,
        search_space={},
        memory_estimate=estimate_memory(read_model_shape(Path(case.model)), trial),
        explanations=[],
        estimated_steps=case.steps,
        estimated_tokens=None,
    )


CONTENDERS = {"ours": ours, "plain": plain, "plain in our batches": plain_in_our_batches}


def train(contender: str, case: Case) -> Run:
    """One run, in a scratch directory that goes with it; what the libraries print is not shown."""
    with (
        tempfile.TemporaryDirectory(prefix="lora-assets-bench-") as scratch,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        return CONTENDERS[contender](case, Path(scratch))


if __name__ == "__main__":
    print(train(sys.argv[1], Case(**json.loads(sys.argv[2]))).began)
