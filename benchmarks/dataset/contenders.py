"""The same work by several tools: read exports, drop bad lines and duplicates, split, write two files.

``python benchmarks/dataset/contenders.py NAME SOURCE TARGET`` runs one of them, for `bench` to measure.
The tools that fail on a bad line are given a corpus without any. All but the plain loop do the whole of the job
that docs/dataset.md tells, each in its own fast way: texts are compared in NFC with white space folded, the first of
equal records stays, the prompt's hash alone decides the split, and a manifest has the SHA-256 of what was read and
written. `bench` checks that the tuned loop ends with the same files as we do.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from unicodedata import normalize

EVAL_FRACTION = 0.1


def _ours(workers: int, source: Path, target: Path) -> None:
    from finetune.dataset.discovery import discover_exports
    from finetune.dataset.prepare import prepare_dataset
    from finetune.layout import DataLayout

    files = discover_exports(source)
    prepare_dataset(files, date=files[-1].date, layout=DataLayout(target), workers=workers)


def ours(source: Path, target: Path) -> None:
    """This project, in one process."""
    _ours(1, source, target)


def ours_two_workers(source: Path, target: Path) -> None:
    """This project, with two validating processes."""
    _ours(2, source, target)


def plain_loop(source: Path, target: Path) -> None:
    """What one would write by hand: parse, check, drop repeated texts, split, write."""
    from hashlib import sha256

    import orjson

    seen: set[bytes] = set()
    with (target / "train.jsonl").open("wb") as train, (target / "eval.jsonl").open("wb") as held_out:
        for path in sorted(source.iterdir()):
            for line in path.open("rb"):
                try:
                    record = orjson.loads(line)
                    if "messages" in record:
                        texts = [turn["content"] for turn in record["messages"]]
                        prompt = next(turn["content"] for turn in record["messages"] if turn["role"] == "user")
                    else:
                        texts = [record["instruction"], record["output"]]
                        prompt = record["instruction"]
                    if not all(text.strip() for text in texts):
                        continue
                except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                    continue
                key = sha256(" ".join(" ".join(texts).split()).encode()).digest()
                if key in seen:
                    continue
                seen.add(key)
                side = int.from_bytes(sha256(prompt.encode()).digest()[:8]) / 2**64
                (held_out if side < EVAL_FRACTION else train).write(orjson.dumps(record) + b"\n")


def tuned_loop(source: Path, target: Path) -> None:
    """The same by someone who knows: the fastest hashes, raw lines; the very same two files as ours, and rejects."""
    import orjson
    from xxhash import xxh3_128_digest

    seen: set[bytes] = set()
    with (
        (target / "train.jsonl").open("wb") as train,
        (target / "eval.jsonl").open("wb") as held_out,
        (target / "rejects.jsonl").open("wb") as rejects,
    ):
        for path in sorted(source.iterdir()):
            for number, line in enumerate(path.open("rb"), 1):
                if line.isspace():
                    continue
                try:
                    record = orjson.loads(line)
                    if "messages" in record:
                        turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
                    else:
                        turns = [("user", record["instruction"]), ("assistant", record["output"])]
                    if not all(role in ("system", "user", "assistant") and text.strip() for role, text in turns):
                        raise ValueError("bad role or empty text")
                    prompt = next(text for role, text in turns if role == "user")
                except (ValueError, KeyError, TypeError, StopIteration) as error:
                    rejects.write(orjson.dumps({"file": path.name, "line": number, "reason": repr(error)}) + b"\n")
                    continue
                key = xxh3_128_digest(b"\0".join(b"%b\0%b" % (role.encode(), _folded(text)) for role, text in turns))
                if key in seen:
                    continue
                seen.add(key)
                (held_out if _held_out(_folded(prompt)) else train).write(line)
    _manifest(source, target)


def _folded(text: str) -> bytes:
    return b" ".join(normalize("NFC", text).encode().split())


def _manifest(source: Path, target: Path) -> None:
    """The SHA-256 of what was read and written."""
    digests = {}
    for path in (*sorted(source.iterdir()), target / "train.jsonl", target / "eval.jsonl"):
        with path.open("rb") as stream:
            digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    (target / "manifest.json").write_text(json.dumps(digests))


def _held_out(prompt: bytes) -> bool:
    """The same split as ours, on Python's integers."""
    from xxhash import xxh3_64_intdigest

    mixed, mask = xxh3_64_intdigest(prompt) ^ xxh3_64_intdigest(b""), 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor & mask
    return mixed ^ (mixed >> 31) < int(EVAL_FRACTION * 2**64)


def polars_scan(source: Path, target: Path) -> None:
    """Polars' own reader; memory grows with the corpus."""
    import polars as pl

    def folded(column: str) -> pl.Expr:
        return pl.col(column).str.normalize("NFC").str.replace_all(r"[ \t\n\r\x0b\x0c]+", " ").str.strip_chars()

    frame = (
        pl.scan_ndjson(source / "*.jsonl")
        .with_columns(folded("instruction").alias("_prompt"), folded("output").alias("_answer"))
        .filter(pl.col("_prompt") != "", pl.col("_answer") != "")
        .unique(["_prompt", "_answer"], keep="first", maintain_order=True)
        .with_columns((pl.col("_prompt").hash(1) < int(EVAL_FRACTION * 2**64)).alias("_eval"))
        .drop("_prompt", "_answer")
        .collect()
    )
    for name, chosen in (("train", ~pl.col("_eval")), ("eval", pl.col("_eval"))):
        frame.filter(chosen).drop("_eval").write_ndjson(target / f"{name}.jsonl")
    _manifest(source, target)


def hugging_face(source: Path, target: Path) -> None:
    """The datasets library: load, choose row by row in batches, write."""
    from datasets import disable_progress_bars, load_dataset
    from xxhash import xxh3_128_digest

    disable_progress_bars()
    data = load_dataset("json", data_files=sorted(map(str, source.iterdir())), cache_dir=str(target), split="train")
    seen: set[bytes] = set()
    chosen: dict[str, list[int]] = {"train": [], "eval": []}
    number = 0
    for batch in data.select_columns(["instruction", "output"]).iter(batch_size=1000):
        for instruction, output in zip(batch["instruction"], batch["output"], strict=True):
            prompt, answer = _folded(instruction), _folded(output)
            key = xxh3_128_digest(prompt + b"\0" + answer)
            if prompt and answer and key not in seen:
                seen.add(key)
                chosen["eval" if _held_out(prompt) else "train"].append(number)
            number += 1
    for name, rows in chosen.items():
        data.select(rows).to_json(target / f"{name}.jsonl")
    _manifest(source, target)


CONTENDERS = {
    "ours": ours,
    "ours, 2 workers": ours_two_workers,
    "orjson loop": plain_loop,
    "orjson loop, tuned": tuned_loop,
    "polars scan_ndjson": polars_scan,
    "datasets": hugging_face,
}
NEEDS_CLEAN = {"polars scan_ndjson", "datasets"}
SAME_FILES = {"ours", "ours, 2 workers", "orjson loop, tuned"}
# These hold the corpus in memory, or take minutes a gigabyte.
UP_TO_MEGABYTES = {"polars scan_ndjson": 1000, "datasets": 1000}

if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
