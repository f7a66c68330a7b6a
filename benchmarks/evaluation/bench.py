"""Evaluating base and adapter on one load, beside two runs of the plain trainer.

    python benchmarks/evaluation/bench.py [--rounds 3] [--threads 2]

The held-out records of `examples/exports` under the embedded model and under a random Llama of about 30 million
parameters with the usual vocabulary of 32,000 tokens. The trainer's side is transformers' `Trainer.evaluate` in batches
of 8 (its default), a fresh process for the base and one for the adapter. Ours is one fresh process that evaluates both
and makes the whole report: confidence interval, accuracy, groups, plots, HTML, hashes; greedy answers, which the
trainer does not give, are left out. Importing the libraries counts on both sides.

The trainer averages means of batches; ours counts every token once. So that its losses can be compared, they are
computed again from our records' losses in its batches. They must agree to 1e-6, and ours must take at most 0.6 times
the wall time of the two runs; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from finetune.base_model.embedded import make_embedded_model  # noqa: E402
from finetune.dataset.discovery import discover_exports  # noqa: E402
from finetune.dataset.parameters import PrepareParameters  # noqa: E402
from finetune.dataset.prepare import prepare_dataset  # noqa: E402
from finetune.layout import DataLayout  # noqa: E402

_MAX_LENGTH = 1024
_BATCH = 8
MAKE = """
import sys, shutil, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
source, base, adapter, small_adapter = map(Path, sys.argv[1:])
torch.manual_seed(0)
shutil.copytree(source, base, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=11,
    num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True)).save_pretrained(base)
for path, target in ((base, adapter), (source, small_adapter)):
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    model.save_pretrained(target)
"""
TRAINER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from finetune.chat.encode import RecordEncoder
base, dataset, adapter, length, batch, output = sys.argv[1:]
encoder = RecordEncoder.load(Path(base))
records = encoder.encode([json.loads(line) for line in Path(dataset).read_bytes().splitlines()])
rows = [
    {"input_ids": r.input_ids[:int(length)],
     "labels": [i if t else -100 for i, t in zip(r.input_ids, r.trained_mask)][:int(length)]}
    for r in records
]
def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": encoder.pad_token_id, "labels": -100, "attention_mask": 0}
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [fill[k]] * (width - len(row[k])) for row in rows]) for k in fill}
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if adapter != "-":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
arguments = TrainingArguments(output_dir=output, per_device_eval_batch_size=int(batch), report_to="none",
    prediction_loss_only=True, remove_unused_columns=False, disable_tqdm=True)
print(Trainer(model, arguments, eval_dataset=rows, data_collator=collate).evaluate()["eval_loss"])
"""
OURS = """
import sys
from pathlib import Path
from finetune.base_model.models import BaseModelRef
from finetune.evaluation.evaluate import evaluate_adapter
base, dataset, adapter, length, batch, output = sys.argv[1:]
report = evaluate_adapter(
    base_model=BaseModelRef(name="bench", path=Path(base), revision=None, fingerprint="0" * 32),
    adapter_path=Path(adapter), dataset=Path(dataset), output_dir=Path(output), run_id="bench",
    max_length=int(length), sample_answers=0)
print(report.delta_vs_base_loss)
"""
# Not timed: our losses by record, averaged as the trainer averages.
LOSSES = """
import sys
from pathlib import Path
from finetune.base_model.models import BaseModelRef
from finetune.chat.encode import RecordEncoder
from finetune.evaluation.heldout import read_heldout
from finetune.evaluation.measure import measure
from finetune.evaluation.tasks import EvalTasks
base, dataset, adapter, length, batch, output = sys.argv[1:]
encoder = RecordEncoder.load(Path(base))
held_out = read_heldout(Path(dataset), encoder, max_length=int(length))
found = measure(BaseModelRef(name="bench", path=Path(base), revision=None, fingerprint="0" * 32), Path(adapter),
    champion=None, encoder=encoder, held_out=held_out, questions=[], cases=[], tasks=EvalTasks([]),
    on_progress=lambda event: None)
def as_the_trainer(scores):
    size, count = int(batch), len(scores.nats)
    batches = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    return sum(scores.nats[b].sum() / scores.tokens[b].sum() * (b.stop - b.start) for b in batches) / count
print(as_the_trainer(found.base), as_the_trainer(found.adapter))
"""


def run(program: str, *arguments: str) -> tuple[float, list[float]]:
    """Wall seconds of a fresh process, and the numbers on its last line."""
    began = os.times().elapsed
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return os.times().elapsed - began, [float(number) for number in done.stdout.splitlines()[-1].split()]


def compare(base: Path, adapter: Path, dataset: Path, scratch: Path, rounds: int) -> tuple[list[float], float]:
    """Median seconds of (trainer on the base, trainer on the adapter, ours), and the largest difference of a loss."""

    def arguments(adapter: Path | str) -> list[str]:
        shutil.rmtree(scratch, ignore_errors=True)
        return [str(base), str(dataset), str(adapter), str(_MAX_LENGTH), str(_BATCH), str(scratch)]

    times: list[list[float]] = []
    for _ in range(rounds):
        plain, (base_loss,) = run(TRAINER, *arguments("-"))
        adapted, (adapter_loss,) = run(TRAINER, *arguments(adapter))
        ours, _ = run(OURS, *arguments(adapter))
        times.append([plain, adapted, ours])
    _, losses = run(LOSSES, *arguments(adapter))
    difference = max(abs(losses[0] - base_loss), abs(losses[1] - adapter_loss))
    return [statistics.median(column) for column in zip(*times, strict=True)], difference


def main() -> None:
    """Print the table; exit with 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-assets"
    embedded = make_embedded_model(cache).path
    with tempfile.TemporaryDirectory(prefix="lora-assets-bench-") as scratch:
        root = Path(scratch)
        exports = discover_exports(ROOT / "examples/exports", "brain_dataset_*.jsonl")
        prepared = prepare_dataset(
            exports, date="2026-06-15", layout=DataLayout(root), parameters=PrepareParameters(eval_fraction=0.9)
        )
        dataset = prepared.eval_path
        base, adapter, small_adapter = root / "base", root / "adapter", root / "small-adapter"
        run(MAKE + "\nprint(0)", str(embedded), str(base), str(adapter), str(small_adapter))
        cases = {
            "the embedded model": (embedded, small_adapter),
            "a random Llama": (base, adapter),
        }
        failed = False
        print(f"{prepared.counts.eval} records of at most {_MAX_LENGTH} tokens; medians of {options.rounds}.\n")
        print("| | parameters | trainer, base | trainer, adapter | ours, both | ratio | largest difference of a loss |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, (model, lora) in cases.items():
            (plain, adapted, ours), difference = compare(model, lora, dataset, root / "out", options.rounds)
            ratio = ours / (plain + adapted)
            failed |= ratio > 0.6 or difference > 1e-6
            print(
                f"| {name} | {_parameters(model) / 1e6:.1f} million | {plain:.1f} s | {adapted:.1f} s | {ours:.1f} s "
                f"| {ratio:.2f} | {difference:.1e} |"
            )
    sys.exit(failed)


def _parameters(model: Path) -> int:
    from finetune.export.safetensors_files import read_safetensors_header, shard_paths

    return sum(tensor.size // 4 for shard in shard_paths(model) for tensor in read_safetensors_header(shard).values())


if __name__ == "__main__":
    main()
