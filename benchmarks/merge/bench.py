"""Our streaming merge beside peft's merge-and-save and a plain copy of the bytes.

    python benchmarks/merge/bench.py [--rounds 5] [--layers 26] [--threads 2]

A random Llama of about 475 million bfloat16 parameters in two shards, and a LoRA adapter of rank 16 on all linear
layers; then, in one round, the same model with tied embeddings, and an adapter that was trained with added tokens and
embeddings of its own, so that the ends part. Every round starts a fresh process for each contender, one after the
other, with nothing left to be flushed from the one before, so that noise meets them alike. peft's side loads base and
adapter, merges and saves. Ours does in addition what publishing needs: SHA-256 of the adapter and of every output, a
check that every merged number is finite, and a flush to the disk. Importing the libraries counts on both sides; `work`
is the time without it.

The results must be equal to the bit, ours must take at most 0.6 times peft's wall time, and its peak memory must be
at most the largest shard + 300 MB; else the exit code is 1.
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

MAKE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=int(sys.argv[3]),
    num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=bool(int(sys.argv[4])))
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size="500MB")
print(sum(parameter.numel() for parameter in model.parameters()))
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
if int(sys.argv[4]):
    # peft saves embeddings with new rows only where it knows the base's directory.
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    model.resize_token_embeddings(config.vocab_size + int(sys.argv[4]), mean_resizing=False)
    lora.modules_to_save = ["embed_tokens"]
get_peft_model(model, lora).save_pretrained(sys.argv[2])
"""
PEFT = """
import torch, transformers.models.llama.modeling_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
if int(sys.argv[4]):
    model.resize_token_embeddings(model.config.vocab_size + int(sys.argv[4]), mean_resizing=False)
model = PeftModel.from_pretrained(model, sys.argv[2])
with torch.no_grad():
    model.merge_and_unload().save_pretrained(sys.argv[3])
"""
OURS = """
import torch, safetensors.torch
from pathlib import Path
from finetune.base_model.models import BaseModelRef
from finetune.export.merge import merge_adapter
started = time.perf_counter()
base = BaseModelRef(name="bench", path=Path(sys.argv[1]), revision=None, fingerprint="0" * 32)
merged = merge_adapter(base_model=base, adapter_path=Path(sys.argv[2]), output_dir=Path(sys.argv[3]), run_id="bench")
assert merged.method == "streaming"
"""
COPY = """
import shutil
started = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[3])
"""
MEASURE = """
import sys, time
{body}
work = time.perf_counter() - started
import resource
usage = resource.getrusage(resource.RUSAGE_SELF)
print(work, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
"""
CONTENDERS = {"peft": PEFT, "ours": OURS, "copy": COPY}
FIGURES = ("wall", "work", "cpu", "memory")


def measure(body: str, *arguments: str) -> dict[str, float]:
    """Seconds of a fresh process (wall, without imports, CPU) and its peak memory in MB."""
    os.sync()
    began = os.times().elapsed
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE.format(body=body), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    wall = os.times().elapsed - began
    return dict(zip(FIGURES, (wall, *map(float, done.stdout.split()[-3:])), strict=True))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two models hold the same tensors, to the bit."""
    import torch
    from safetensors import safe_open

    def tensors(model: Path) -> dict[str, Path]:
        found = {}
        for shard in model.glob("*.safetensors"):
            with safe_open(shard, "pt") as stream:
                found |= dict.fromkeys(stream.keys(), shard)
        return found

    ours, theirs = tensors(one), tensors(other)
    if ours.keys() != theirs.keys():
        return False
    for name in ours:
        with safe_open(ours[name], "pt") as left, safe_open(theirs[name], "pt") as right:
            if not torch.equal(left.get_tensor(name).view(torch.uint8), right.get_tensor(name).view(torch.uint8)):
                return False
    return True


def compare(title: str, *, layers: int, rounds: int, added: int) -> dict[str, bool]:
    """Print one table; returns which bounds hold. With `added` tokens the embeddings are tied, and part."""
    with tempfile.TemporaryDirectory(prefix="lora-assets-bench-") as scratch:
        root = Path(scratch)
        base, adapter = root / "base", root / "adapter"
        made = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MAKE, str(base), str(adapter), str(layers), str(added)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, body in CONTENDERS.items():
                shutil.rmtree(root / name, ignore_errors=True)
                runs[name].append(measure(body, str(base), str(adapter), str(root / name), str(added)))
        equal = same_tensors(root / "ours", root / "peft")
        largest = max(shard.stat().st_size for shard in base.glob("*.safetensors")) / 2**20
        size = sum(shard.stat().st_size for shard in base.glob("*.safetensors")) / 2**20
    medians = {
        name: {figure: statistics.median(run[figure] for run in found) for figure in FIGURES}
        for name, found in runs.items()
    }
    ours, peft, copy = (medians[name] for name in ("ours", "peft", "copy"))
    print(
        f"{title}: {int(made.stdout.split()[-1]) / 1e6:.0f} million bfloat16 parameters, {size:.0f} MB, largest shard "
        f"{largest:.0f} MB; medians of {rounds}.\n"
    )
    print("| | wall s | without imports s | CPU s | peak MB | wall / peft's | without imports / peft's | / copy's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, label in (("peft", "peft, merge and save"), ("ours", "ours"), ("copy", "a plain copy")):
        row = medians[name]
        print(
            f"| {label} | {row['wall']:.2f} | {row['work']:.2f} | {row['cpu']:.2f} | {row['memory']:.0f} "
            f"| {row['wall'] / peft['wall']:.2f} | {row['work'] / peft['work']:.2f} "
            f"| {row['work'] / copy['work']:.2f} |"
        )
    bounds = {
        "equal to the bit": equal,
        "at most 0.6 times peft's wall time": ours["wall"] <= 0.6 * peft["wall"],
        f"at most {largest + 300:.0f} MB": ours["memory"] <= largest + 300,
    }
    print("\n" + "; ".join(f"{bound}: {'yes' if holds else 'NO'}" for bound, holds in bounds.items()) + "\n")
    return bounds


def main() -> None:
    """Print the tables; exit with 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    plain = compare("LoRA", layers=arguments.layers, rounds=arguments.rounds, added=0)
    grown = compare("Added tokens, tied ends that part", layers=arguments.layers, rounds=1, added=64)
    sys.exit(not all((*plain.values(), *grown.values())))


if __name__ == "__main__":
    main()
