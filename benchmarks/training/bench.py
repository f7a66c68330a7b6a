"""Our trainer beside a plain TRL script: the same model, tokens, effective batch and seed.

    python -m benchmarks.training.bench [--rounds 6] [--seeds 6] [--threads 1]

The records of `examples/exports` under the embedded model and under a random Llama of about 30 million parameters with
the usual vocabulary of 32,000 tokens; LoRA of rank 16 on all linear layers. Every run is a process of its own, in turn
with those that it is compared with; the libraries are imported before it is forked, except where starting is measured.

1. Overhead: both train the very same batches; what differs is what ours does beside (a log line and TensorBoard's
   figures per step, the watch over divergence, checkpoints and SIGTERM). Each step counts with its fastest of all
   rounds. At most 2 %.
2. Layout: ours, every step cut by length into micro-batches, padded and packed, beside TRL's default, shuffled and
   padded, eight at a time; a seed a round. Trained tokens per second, padding apart, in the median at least 1.5 times;
   the held-out loss must not differ beyond chance (Student's paired test over the seeds, p below 0.05) by more than
   0.5 %.
3. Start: from the process's start to its first step, libraries, model, data and all.

With a GPU (in bfloat16) the cases are instead a random Llama of the shape of Llama 3.1 8B on synthetic exports of
about 540 tokens a record: overhead and layout as above without held-out losses, MFU, and the peak of the memory beside
the plan's estimate. Elsewhere they are skipped by name.

Exit code 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.dataset.generator import write_exports
from benchmarks.training.contenders import Case, Run, train, trial_of
from finetune.base_model.embedded import make_embedded_model
from finetune.dataset.discovery import discover_exports
from finetune.dataset.models import PreparedDataset
from finetune.dataset.parameters import PrepareParameters
from finetune.dataset.prepare import prepare_dataset
from finetune.layout import DataLayout
from finetune.planning import rules
from finetune.planning.memory import estimate_memory
from finetune.planning.model_config import read_model_shape

ROOT = Path(__file__).parents[2]
OVERHEAD, LAYOUT, SAME_LOSS, CHANCE = 0.02, 1.5, 0.005, 0.05
DEFAULT = "TRL's default, padded"
# What is run, and whether it packs.
LAYOUTS = {DEFAULT: ("plain", False), "ours, cut by length": ("ours", False), "ours, packed": ("ours", True)}
EIGHT_BILLION = "a random Llama, 8 billion, bf16"
IMPORTED_BEFORE = [
    "benchmarks.training.contenders",
    "finetune.training.sft",
    "peft",
    "torch.utils.tensorboard",
    "trl.trainer.sft_trainer",
]
LLAMA_30M = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 11,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_8B = ROOT / "benchmarks/memory/models/llama-3.1-8b/config.json"
# Dense bfloat16 operations per second by the manufacturers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "L40S": 362e12, "RTX 4090": 165e12}
MAKE = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.for_model(**json.loads(sys.argv[1]))
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sys.argv[3]))
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Contest:
    """What is compared on one model: records a step and steps of the first table, steps and seeds of the second."""

    name: str
    case: Case
    overhead_batch: int
    overhead_steps: int
    layout_steps: int
    seeds: int


class Pool:
    """Runs trainings, each in a fresh process that has the libraries imported already."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_BEFORE)
        self._executor = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)

    def run(self, contender: str, case: Case) -> Run:
        """One training, waited for."""
        return self._executor.submit(train, contender, case).result()

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown()


def overhead(pool: Pool, contest: Contest, rounds: int) -> bool:
    """Print a line of the first table; whether the bound holds."""
    batch = dataclasses.replace(contest.case, micro_batch=contest.overhead_batch, accumulation=1)
    case = dataclasses.replace(_as_planned(batch), steps=contest.overhead_steps, held_out=None)
    ours: list[Run] = []
    plain: list[Run] = []
    turns = [("plain in our batches", plain), ("ours", ours)]
    for _ in range(rounds):
        for contender, runs in turns:
            runs.append(pool.run(contender, case))
        # Whoever comes first is not always the same.
        turns.reverse()
    plain_step, our_step = (_fastest([run.seconds for run in runs]) for runs in (plain, ours))
    plain_cpu, our_cpu = (_fastest([run.cpu_seconds for run in runs]) for runs in (plain, ours))
    ratio = our_step / plain_step - 1
    print(
        f"| {contest.name} | {case.micro_batch} x {case.accumulation} | {len(ours[0].seconds)} "
        f"| {plain_step * 1e3:.1f} ms | {our_step * 1e3:.1f} ms | {ratio:+.1%} | {our_cpu / plain_cpu - 1:+.1%} "
        f"| {abs(ours[0].train_loss - plain[0].train_loss):.0e} |",
        flush=True,
    )
    return ratio <= OVERHEAD


def _fastest(runs: list[list[float]]) -> float:
    """The mean step, each step at its fastest: noise only ever makes one slower."""
    return statistics.fmean(min(step) for step in zip(*runs, strict=True))


def layout(pool: Pool, contest: Contest) -> dict[str, list[Run]]:
    """Every contender's runs, seed after seed."""
    case = dataclasses.replace(contest.case, steps=contest.layout_steps)
    runs: dict[str, list[Run]] = {name: [] for name in LAYOUTS}
    for seed in range(contest.seeds):
        for name, (contender, _) in LAYOUTS.items():
            runs[name].append(pool.run(contender, dataclasses.replace(_laid_out(case, name), seed=seed)))
    return runs


def _laid_out(case: Case, layout: str) -> Case:
    """The case in one of the `LAYOUTS`."""
    contender, packing = LAYOUTS[layout]
    return case if contender == "plain" else dataclasses.replace(_as_planned(case), packing=packing)


def _as_planned(case: Case) -> Case:
    """The case with as many of a step's records at a time as a plan chooses by itself."""
    batch = case.micro_batch * case.accumulation
    micro_batch = rules.micro_batch(batch, case.max_length, "cuda" if case.precision == "bf16" else "cpu")
    return dataclasses.replace(case, micro_batch=micro_batch, accumulation=batch // micro_batch)


def compare_layouts(contest: Contest, runs: dict[str, list[Run]]) -> bool:
    """Print the lines of the second table; whether their bounds hold."""
    from scipy.stats import ttest_1samp

    plain = runs[DEFAULT]
    good = True
    for name, ours in runs.items():
        laid_out = _laid_out(contest.case, name)
        speed = statistics.median(run.tokens_per_second for run in ours)
        ratio = speed / statistics.median(run.tokens_per_second for run in plain)
        cpu_ratio = statistics.median(a.tokens_per_cpu_second / b.tokens_per_cpu_second for a, b in _pairs(ours, plain))
        loss = difference = "-"
        if contest.case.held_out:
            losses = [(a.held_out_loss or 0.0, b.held_out_loss or 0.0) for a, b in _pairs(ours, plain)]
            differences = [a - b for a, b in losses]
            mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
            p = 1.0 if ours is plain else float(ttest_1samp(differences, 0).pvalue)
            loss = f"{statistics.fmean(a for a, _ in losses):.4f}"
            difference = f"{mean:+.4f} ± {error:.4f} (p {p:.2f})"
            good &= p > CHANCE or abs(mean) <= SAME_LOSS * losses[0][1]
        good &= name == DEFAULT or ratio >= LAYOUT
        print(
            f"| {contest.name} | {name} | {laid_out.micro_batch} x {laid_out.accumulation} | {len(ours)} "
            f"| {speed:,.0f} | {ratio:.2f} | {cpu_ratio:.2f} | {loss} | {difference} |",
            flush=True,
        )
    return good


def _pairs(ours: list[Run], plain: list[Run]) -> list[tuple[Run, Run]]:
    return list(zip(ours, plain, strict=True))


def start(case: Case, rounds: int) -> None:
    """Print the third table."""
    case = dataclasses.replace(case, steps=1, held_out=None)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(rounds):
        for contender, taken in seconds.items():
            began = time.time()
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training.contenders", contender]
            done = subprocess.run(
                [*command, json.dumps(dataclasses.asdict(case))],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            taken.append(float(done.stdout.splitlines()[-1]) - began)
    plain, ours = (statistics.median(seconds[name]) for name in ("plain", "ours"))
    print("\n| | a plain TRL script | ours | ratio |\n| --- | --- | --- | --- |")
    print(f"| from process start to first step | {plain:.1f} s | {ours:.1f} s | {ours / plain:.2f} |")


def use_of_the_gpu(case: Case, contenders: dict[str, list[Run]]) -> None:
    """Print the table of MFU and memory.

    A token costs 4 operations per parameter that multiplies it (forward, and backward to the inputs; frozen weights
    have no gradients); attention is left out, so is what checkpointing computes again.
    """
    name = contenders[DEFAULT][0].device
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name.split()), None)
    shape = read_model_shape(Path(case.model))
    looked_up = shape.embedding_parameters if shape.head_parameters else 0
    print(f"\n| {name} | tokens/s | MFU | peak | the plan's estimate | error |\n| --- | --- | --- | --- | --- | --- |")
    for contender, runs in contenders.items():
        speed = statistics.median(run.tokens_per_second for run in runs)
        measured = max(run.peak_gb for run in runs)
        trial = trial_of(_laid_out(case, contender))
        planned = estimate_memory(shape, trial).vram_gb
        mfu = "-" if peak is None else f"{4 * (shape.parameters - looked_up) * speed / peak:.0%}"
        print(
            f"| {contender} | {speed:,.0f} | {mfu} | {measured:.1f} GB | {planned:.1f} GB "
            f"| {planned / measured - 1:+.0%} |"
        )


def cpu_contests(root: Path, seeds: int) -> list[Contest]:
    """The embedded model, and the random one of 30 million parameters."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-assets"
    embedded = make_embedded_model(cache).path
    larger = make_model(LLAMA_30M, embedded, root / "larger", "float32")
    data = prepared(ROOT / "examples/exports", root, eval_fraction=0.2)
    case = Case(
        model=str(embedded),
        records=str(data.train_path),
        held_out=str(data.eval_path),
        max_length=1024,
        micro_batch=8,
        accumulation=2,
        steps=1,
    )
    return [
        Contest("the embedded model, 2.5 million", case, 16, overhead_steps=23, layout_steps=40, seeds=seeds),
        Contest(
            "a random Llama, 30 million",
            dataclasses.replace(case, model=str(larger)),
            # Short steps: the machine's own noise is as large as the bound, and only many rounds take it away.
            overhead_batch=4,
            overhead_steps=15,
            # So many that a single long record does not decide.
            layout_steps=24,
            seeds=max(2, seeds // 2),
        ),
    ]


def gpu_contests(root: Path) -> list[Contest]:
    """The shape of Llama 3.1 8B on synthetic exports."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora-assets"
    model = make_model(json.loads(LLAMA_8B.read_bytes()), make_embedded_model(cache).path, root / "8b", "bfloat16")
    write_exports(root / "exports", 2_000_000)
    data = prepared(root / "exports", root, eval_fraction=0.02)
    case = Case(
        model=str(model),
        records=str(data.train_path),
        held_out=None,
        max_length=1024,
        micro_batch=8,
        accumulation=2,
        precision="bf16",
        gradient_checkpointing=True,
        steps=1,
    )
    return [Contest(EIGHT_BILLION, case, 16, overhead_steps=9, layout_steps=15, seeds=2)]


def prepared(exports: Path, root: Path, eval_fraction: float) -> PreparedDataset:
    """The exports of a directory as records to train on and held-out ones."""
    found = discover_exports(exports, "brain_dataset_*.jsonl")
    parameters = PrepareParameters(eval_fraction=eval_fraction)
    return prepare_dataset(found, date="2026-06-15", layout=DataLayout(root / "data"), parameters=parameters)


def make_model(config: dict[str, object], tokenizer_of: Path, target: Path, dtype: str) -> Path:
    """A random model of a configuration, with another one's tokenizer."""
    shutil.copytree(tokenizer_of, target, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    subprocess.run([sys.executable, "-c", MAKE, json.dumps(config), str(target), dtype], check=True)
    return target


def main() -> None:
    """Print the tables; exit with 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of overhead; half as many of the start")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    import torch

    pool, held = Pool(), []
    with tempfile.TemporaryDirectory(prefix="lora-assets-bench-") as scratch:
        on_gpu = torch.cuda.is_available()
        contests = gpu_contests(Path(scratch)) if on_gpu else cpu_contests(Path(scratch), options.seeds)
        print("Overhead per optimizer step, in the same batches:\n")
        print("| | batch | steps | a plain TRL script | ours | overhead | in CPU time | difference of the loss |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        held += [overhead(pool, contest, options.rounds) for contest in contests]
        print("\nTrained tokens per second, and the loss on held-out records:\n")
        print("| | layout | batch | seeds | tokens/s | ratio | in CPU time | held-out loss | difference |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for contest in contests:
            runs = layout(pool, contest)
            held.append(compare_layouts(contest, runs))
            if on_gpu:
                use_of_the_gpu(contest.case, runs)
        start(contests[0].case, max(1, options.rounds // 2))
        if not on_gpu:
            print(f"\nSkipped: {EIGHT_BILLION} (overhead, tokens/s, MFU, peak memory): PyTorch sees no GPU here.")
        pool.close()
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
