from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune.chat.encode import RecordEncoder
from finetune.dataset.models import DatasetProfile, PreparedDataset
from finetune.dataset.plots import token_histogram_png
from finetune.dataset.profile import MAX_LENGTHS, analyze, profile_dataset
from finetune.dataset.scripts import count_letters
from finetune.errors import ArtifactError, DatasetError

Prepare = Callable[..., PreparedDataset]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> RecordEncoder:
    """A byte-level tokenizer with a chat template, as a base model's directory holds them."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question and answer ", "Питання та відповідь "] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return RecordEncoder.load(directory)


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


RECORDS: list[dict[str, object]] = [
    {"id": n, "instruction": f"Питання {n}", "output": "answer " * (1 + n * n % 50)} for n in range(300)
]


def test_token_statistics_are_exact_over_all_records(tmp_path: Path, encoder: RecordEncoder) -> None:
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", RECORDS), encoder=encoder, tokenizer="mine")

    encoded = encoder.encode(RECORDS)
    lengths = np.array([len(record.input_ids) for record in encoded])
    assert profile.total_samples == 300
    assert profile.total_tokens == lengths.sum()
    assert profile.avg_tokens == pytest.approx(lengths.mean())
    assert profile.max_tokens == lengths.max()
    assert profile.trained_token_share == sum(sum(record.trained_mask) for record in encoded) / lengths.sum()
    assert profile.tokenizer == "mine"
    for percent in (50, 90, 95, 99):
        value = profile.percentiles[f"p{percent}"]
        assert value in lengths
        assert (lengths < value).mean() < percent / 100 <= (lengths <= value).mean()
    assert sum(count for _, _, count in profile.histogram) == 300
    for low, high, count in profile.histogram:
        assert count == ((lengths >= low) & (lengths < high)).sum()
    assert [cut.max_length for cut in profile.truncation] == list(MAX_LENGTHS)
    for cut in profile.truncation:
        assert cut.records == (lengths > cut.max_length).sum()
        assert cut.token_share == pytest.approx(np.maximum(lengths - cut.max_length, 0).sum() / lengths.sum())
    assert [record.tokens for record in profile.longest] == sorted(lengths, reverse=True)[:10]
    longest = profile.longest[0]
    assert longest.where == f"a.jsonl:{lengths.argmax() + 1}"
    assert longest.id == str(lengths.argmax())


def test_one_record_far_longer_than_all_others_does_not_flatten_the_histogram(
    tmp_path: Path, encoder: RecordEncoder
) -> None:
    records = [*RECORDS, {"instruction": "long", "output": "x " * 20_000}]
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", records), encoder=encoder)

    low, high, count = profile.histogram[-1]
    assert (count, high) == (1, (profile.max_tokens or 0) + 1)
    assert low < 1000
    assert sum(count > 0 for _, _, count in profile.histogram) > 10


def test_a_prepared_dataset_is_profiled_with_what_is_known_of_its_files(
    prepare: Prepare, encoder: RecordEncoder
) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in [*RECORDS[:60], RECORDS[3]]]
    lines += [
        '{"text":"Plain"}',
        "broken",
        '{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}',
    ]
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": "\n".join(lines).encode() + b"\n"})

    profile = profile_dataset(dataset, encoder=encoder)

    assert profile.total_samples == dataset.counts.kept == 62
    assert (profile.duplicates_found, profile.rejected) == (1, 1)
    assert profile.records_per_file == {"brain_dataset_2026-06-01.jsonl": 62}
    assert profile.record_formats == {"instruction": 60, "text": 1, "messages": 1}
    assert set(profile.columns) == {"id", "instruction", "output", "text", "messages"}
    assert profile.format_detected == "jsonl"
    assert analyze(dataset.path, encoder=encoder) == profile


def test_lines_are_rejected_as_preparation_rejects_them(tmp_path: Path, prepare: Prepare) -> None:
    lines = [json.dumps(record) for record in RECORDS[:20]]
    lines += [
        "",
        "broken",
        '{"text":"\\u0000"}',
        '{"text":"\\ud800"}',
        '{"text":"a","x":' + "[" * 80 + "]" * 80 + "}",
        "7",
    ]
    content = "\n".join([*lines, json.dumps({"text": "x" * 2**20})]).encode()
    (tmp_path / "a.jsonl").write_bytes(content)

    assert analyze(tmp_path / "a.jsonl").rejected == 6
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": content})
    assert dataset.counts.rejected == 6
    # What longer lines were allowed to bring is profiled too.
    longer = prepare({"brain_dataset_2026-06-01.jsonl": content}, parameters={"max_line_bytes": 2**21})
    assert profile_dataset(longer).total_samples == 21


def test_a_file_that_lost_records_is_noticed(prepare: Prepare) -> None:
    content = "\n".join(json.dumps(record) for record in RECORDS[:20]).encode()
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": content})
    dataset.train_path.write_bytes(b"")

    with pytest.raises(ArtifactError, match="records where the manifest counts 20"):
        profile_dataset(dataset)


def test_without_a_tokenizer_nothing_is_said_of_tokens(tmp_path: Path) -> None:
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", [*RECORDS, *RECORDS[:7]]))

    assert (profile.avg_tokens, profile.max_tokens, profile.total_tokens, profile.trained_token_share) == (None,) * 4
    assert (profile.total_samples, profile.duplicates_found) == (307, 7)
    assert profile.has_instruction
    assert profile.has_output


def test_plain_texts_have_neither_instruction_nor_output(tmp_path: Path) -> None:
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", [{"text": "Plain"}]))

    assert not profile.has_instruction
    assert not profile.has_output


def test_shares_of_scripts_are_of_all_letters(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"instruction": "Привіт 42", "output": "hi!"}, {"text": "漢字 й"}]
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", records))

    assert profile.script_shares == {"cyrillic": 7 / 11, "latin": 2 / 11, "other": 2 / 11}


def test_percentiles_are_the_nearest_ranks_and_shares_of_the_truncated_are_of_all(
    tmp_path: Path, encoder: RecordEncoder
) -> None:
    records: list[dict[str, object]] = [{"text": "answer " * (2 * n + 1)} for n in range(100)]
    profile = analyze(write_jsonl(tmp_path / "a.jsonl", records[::-1]), encoder=encoder)

    lengths = [len(record.input_ids) for record in encoder.encode(records)]
    assert lengths == sorted(set(lengths)), "otherwise ranks cannot be told apart"
    assert profile.percentiles == {f"p{percent}": lengths[percent - 1] for percent in (50, 90, 95, 99)}
    for cut in profile.truncation:
        assert cut.record_share == sum(length > cut.max_length for length in lengths) / 100
    assert 0 < profile.truncation[0].record_share < 1


def test_letters_are_counted_by_script() -> None:
    assert count_letters(["Привіт, world! 42 漢字", "é ё", ""]).tolist() == [7, 6, 2]


COLUMNS = {
    "id": [1, 2, 3, 4],
    "prompt": ["Питання", "Question, with comma", "two\nlines", None],
    "completion": ["Відповідь", 'with "quotes"', "ok", "no question"],
}


def save_table(form: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        import polars as pl

        getattr(pl.DataFrame(COLUMNS), f"write_{form}")(path)

    return save


def save_hf(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict(COLUMNS).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "form", "write"),
    [
        ("t.csv", "csv", save_table("csv")),
        ("t.parquet", "parquet", save_table("parquet")),
        ("t.jsonl", "jsonl", save_table("ndjson")),
        ("without_a_suffix", "jsonl", save_table("ndjson")),
        ("also_without", "parquet", save_table("parquet")),
        ("saved", "hf", save_hf),
    ],
)
def test_every_format_gives_the_same_profile(
    tmp_path: Path, encoder: RecordEncoder, name: str, form: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    profile = analyze(tmp_path / name, encoder=encoder)

    rows = zip(*COLUMNS.values(), strict=True)
    records = [dict(zip(COLUMNS, row, strict=True)) for row in rows][:3]
    assert profile.format_detected == form
    assert (profile.total_samples, profile.rejected) == (3, 1)
    assert profile.columns == ["id", "prompt", "completion"]
    assert profile.total_tokens == sum(len(record.input_ids) for record in encoder.encode(records))


def test_conversations_in_parquet_and_saved_datasets_are_read_as_such(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = Dataset.from_dict({"messages": [turns, turns]})
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "t.parquet"))

    saved, table = analyze(tmp_path / "saved"), analyze(tmp_path / "t.parquet")

    assert (saved.total_samples, saved.format_detected, saved.record_formats) == (4, "hf", {"messages": 4})
    assert (table.total_samples, table.format_detected, table.duplicates_found) == (2, "parquet", 1)


def test_a_directory_of_mixed_files_is_profiled_as_one(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    save_table("csv")(tmp_path / "t.csv")
    write_jsonl(tmp_path / "below" / "a.jsonl", RECORDS[:5])
    (tmp_path / "notes.md").write_text("no data")

    profile = analyze(tmp_path)

    assert (profile.format_detected, profile.total_samples) == ("mixed", 8)
    assert profile.records_per_file == {"below/a.jsonl": 5, "t.csv": 3}
    assert analyze(tmp_path, format="csv").total_samples == 3


def test_a_directory_may_hold_all_formats_and_files_of_one_name(tmp_path: Path, encoder: RecordEncoder) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", [{"id": folder, "text": folder * 9}])
    (tmp_path / "two" / "B.CSV").write_text("prompt,completion\nq,a\n")
    save_table("parquet")(tmp_path / "t.parquet")
    save_hf(tmp_path / "saved")
    write_jsonl(tmp_path / "saved" / "beside.jsonl", RECORDS[:2])

    profile = analyze(tmp_path, encoder=encoder)

    assert profile.records_per_file == {
        "one/a.jsonl": 1,
        "saved/beside.jsonl": 2,
        "saved/data-00000-of-00001.arrow": 3,
        "t.parquet": 3,
        "two/B.CSV": 1,
        "two/a.jsonl": 1,
    }
    assert {"one/a.jsonl:1", "two/a.jsonl:1"} <= {record.where for record in profile.longest}
    assert analyze(tmp_path, format="hf").total_samples == 3


def test_what_looks_like_an_escaped_nul_and_is_none_is_profiled_as_it_was_prepared(
    tmp_path: Path, prepare: Prepare
) -> None:
    lines = [json.dumps({"id": n, "text": f"{n} is written \\u0000 in C#"}) for n in range(20)]
    assert "\\\\u0000" in lines[0]
    content = "\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)

    assert (analyze(tmp_path / "a.jsonl").total_samples, analyze(tmp_path / "a.jsonl").rejected) == (20, 0)
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": content})
    assert profile_dataset(dataset).total_samples == dataset.counts.kept == 20


def test_what_may_not_be_read_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    for name in ("closed.jsonl", "closed", "tree/a.jsonl", "tree/below/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": "a"}])
    for name in ("closed.jsonl", "closed", "tree/below"):
        (tmp_path / name).chmod(0o000)
    tmp_path.chmod(0o755)
    # Root may read everything, so a child gives that up first.
    program = (
        "import os, sys, pathlib; from finetune.dataset.profile import analyze\n"
        "os.chdir(sys.argv[1]); os.getuid() or os.setuid(65534)\n"
        "for name in sys.argv[2:]:\n"
        "    try: analyze(pathlib.Path(name))\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    asked = ["closed.jsonl", "closed", "tree", "tree/below", "tree/below/b.jsonl"]
    done = subprocess.run([sys.executable, "-c", program, tmp_path, *asked], capture_output=True, text=True, check=True)
    (tmp_path / "tree" / "below").chmod(0o700)

    told = done.stdout.splitlines()
    assert len(told) == len(asked)
    for line, name in zip(told, ["closed.jsonl", "closed", "tree/below", "tree/below", "tree/below"], strict=True):
        assert line.startswith(f"DatasetError cannot be read: Permission denied [{name}")


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("absent", None, "auto", "no such file"),
        ("a.json", b'[{"text":"a"}]', "auto", "a JSON array"),
        ("a.bin", b"\x00\x01", "auto", "format cannot be told.*--format"),
        ("empty.jsonl", b"", "auto", "none of the 0 rows"),
        ("bad.jsonl", b"nope\n{}\n", "auto", "none of the 2 rows"),
        ("a.parquet", b"PAR1 nonsense", "auto", "cannot be read as parquet"),
        ("empty.csv", b"", "auto", "cannot be read as csv"),
        ("a.csv", b"x,y\n1,2\n", "auto", r"none of the 1 rows is a record \(columns: x, y\)"),
        ("a.jsonl", b"{}", "hf", "is a directory"),
        ("directory/", None, "auto", "no data files in this directory"),
        ("directory/", None, "hf", "state.json is missing"),
        ("state.json/", b"{", "auto", "damaged: state.json does not name its files"),
        ("state.json/", b"{}", "hf", "damaged: state.json does not name its files"),
        ("state.json/", b'{"_data_files":[{"filename":"gone.arrow"}]}', "auto", "cannot be read: No such file"),
        ("link.jsonl/", b"", "auto", "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_profiled_gives_a_clear_error(
    tmp_path: Path, name: str, content: bytes | None, form: str, message: str
) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
        if name == "link.jsonl/":
            (path / name[:-1]).symlink_to(tmp_path / "gone")
        elif content is not None:
            (path / name[:-1]).write_bytes(content)
    elif content is not None:
        path.write_bytes(content)

    with pytest.raises(DatasetError, match=message) as caught:
        analyze(path, format=form)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_the_histogram_is_a_png_also_without_tokens(tmp_path: Path, encoder: RecordEncoder) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*RECORDS, {"instruction": "long", "output": "x " * 20_000}])
    profiles: list[DatasetProfile] = [analyze(path, encoder=encoder), analyze(path)]

    for profile in profiles:
        picture = token_histogram_png(profile)
        assert picture.startswith(b"\x89PNG")
        assert picture[16:24] == (960).to_bytes(4) + (480).to_bytes(4)
