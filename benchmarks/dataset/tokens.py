"""Counting tokens with byte-level BPE: ours (tiktoken on the model's own merges) beside `tokenizers`.

    python benchmarks/dataset/tokens.py [--megabytes 10] [--rounds 5] [--tokenizer FILE]

Without a ``tokenizer.json`` one with Llama 3's pattern is trained first, on the texts of Python's standard
library and synthetic exports in Ukrainian, Russian and English; both are then given other parts of the same
texts. Every round runs both, one after the other, so that noise meets them alike; figures are medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import orjson  # noqa: E402
from generator import write_exports  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from finetune.dataset.fast_tokens import FastTokenizer  # noqa: E402

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT_CHARACTERS = 2000
_TRAINED_ON = 5_000_000


def texts(size: int) -> list[str]:
    """About `size` characters in pieces of 2,000, in no order: half of them real, half synthetic."""
    pieces: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        pieces += [text[start : start + _TEXT_CHARACTERS] for start in range(0, len(text), _TEXT_CHARACTERS)]
    with tempfile.TemporaryDirectory() as directory:
        write_exports(Path(directory) / "exports", 2 * size, clean=True)
        for path in sorted((Path(directory) / "exports").iterdir()):
            pieces += ["\n".join(_strings(orjson.loads(line))) for line in path.read_bytes().splitlines()]
    random.Random(0).shuffle(pieces)
    return pieces[: size // _TEXT_CHARACTERS]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for each in value for text in _strings(each)] if isinstance(value, list) else []


def train(sample: list[str]) -> Tokenizer:
    """A byte-level tokenizer with 32,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return tokenizer


def measure(tokenizer: Tokenizer | FastTokenizer, batch: list[str]) -> tuple[float, float]:
    """Seconds of wall clock and of CPU, all threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(batch), 1024):
        tokenizer.encode_batch(batch[start : start + 1024], add_special_tokens=False)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the table; end with an error if the tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    arguments = parser.parse_args()
    size = arguments.megabytes * 1_000_000
    pieces = texts(size + _TRAINED_ON)
    sample, batch = pieces[: _TRAINED_ON // _TEXT_CHARACTERS], pieces[_TRAINED_ON // _TEXT_CHARACTERS :]
    own = Tokenizer.from_file(str(arguments.tokenizer)) if arguments.tokenizer else train(sample)
    fast = FastTokenizer.of(own)
    if fast is None:
        raise SystemExit("this tokenizer is no plain byte-level BPE: its tokens are counted by tokenizers itself")
    for first, second in zip(
        own.encode_batch(batch, add_special_tokens=False),
        fast.encode_batch(batch, add_special_tokens=False),
        strict=True,
    ):
        if first.ids != second.ids:
            raise SystemExit("the tokens differ")
    megabytes = sum(len(text.encode()) for text in batch) / 1e6
    contenders = {"tokenizers": own, "ours": fast}
    rounds = [{name: measure(each, batch) for name, each in contenders.items()} for _ in range(arguments.rounds)]
    print(f"{megabytes:.1f} MB in {len(batch)} texts, the same tokens from both\n")
    print("| tokenizer | wall MB/s | MB per CPU-second |\n| --- | ---: | ---: |")
    for name in contenders:
        wall, cpu = (statistics.median(each[name][part] for each in rounds) for part in (0, 1))
        print(f"| {name} | {megabytes / wall:.1f} | {megabytes / cpu:.1f} |")
    for part, unit in enumerate(("wall clock", "CPU")):
        ratio = statistics.median(each["tokenizers"][part] / each["ours"][part] for each in rounds)
        print(f"\nours is {ratio:.1f} times as fast by {unit}", end="")
    print()


if __name__ == "__main__":
    main()
