"""What holds for any corpus: nothing lost, nothing leaked, the same bytes however the work is shared out."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from finetune.dataset.bulk import _Record, plain_records
from finetune.dataset.discovery import ExportFile, discover_exports
from finetune.dataset.index import FileIndex
from finetune.dataset.models import PreparedDataset
from finetune.dataset.normalization import Contents, content_key, normalized
from finetune.dataset.prepare import PrepareParameters, prepare_dataset
from finetune.dataset.reading import Fingerprint
from finetune.dataset.records import as_messages, prompt_text
from finetune.dataset.rules import ANSWER_FIELDS, INPUT_FIELDS, PROMPT_FIELDS, RejectedError, checked_turns
from finetune.dataset.scan import RECORD, Limits, _examine, _split, loads
from finetune.dataset.selection import first_occurrences
from finetune.errors import DatasetError
from finetune.layout import DataLayout

# Flushing to a real disk is most of the time that a small preparation takes.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
LIMITS = Limits(max_line_bytes=4096, max_depth=8)
PARAMETERS = PrepareParameters(eval_fraction=0.5, max_line_bytes=LIMITS.max_line_bytes, max_depth=LIMITS.max_depth)
FAST = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Few different words, so that prompts and contents meet again; some that normalise to one.
texts = st.sampled_from(["a", "b", "a b", "a \t b ", "їжа", " їжа", "é", "e\u0301", "\u2028", "😀", "x" * 700, "", " "])
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "bot"]), "content": texts})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
records = st.one_of(
    st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts, "meta": values}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts}, optional={"system": texts}),
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=3)}),
    st.fixed_dictionaries({"text": texts}, optional={"x": values}),
    values,
)


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    line = json.dumps(draw(records), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    damage = draw(st.integers(0, 9))
    if damage == 0 and line:
        cut = draw(st.integers(0, len(line)))
        line = line[:cut] + draw(st.binary(max_size=3)).replace(b"\n", b"") + line[cut + draw(st.integers(0, 3)) :]
    elif damage == 1:
        line = draw(st.sampled_from([b"", b" ", b"\xef\xbb\xbf" + line, line + line, b"[" * 40, b"y" * 5000]))
    return line


files = st.lists(
    st.tuples(st.lists(json_lines(), max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans()), max_size=3
)


@contextmanager
def exports(corpus: list[tuple[list[bytes], bytes, bool]]) -> Iterator[DataLayout]:
    """The corpus as files, with enough good records that both sides of the split hold some."""
    root = Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        layout = DataLayout(root)
        layout.exports.mkdir(parents=True)
        good = b"".join(b'{"text":"good %d"}\n' % n for n in range(30))
        (layout.exports / "brain_dataset_2026-05-31.jsonl").write_bytes(good)
        for number, (lines, line_break, ended) in enumerate(corpus, 1):
            path = layout.exports / f"brain_dataset_2026-06-0{number}.jsonl"
            path.write_bytes(line_break.join(lines) + (line_break if ended else b""))
        yield layout
    finally:
        shutil.rmtree(root)


def run(layout: DataLayout, **options: Any) -> PreparedDataset:
    found = discover_exports(layout.exports)
    return prepare_dataset(found, date="2099-01-01", layout=layout, parameters=PARAMETERS, **options)


def outputs(dataset: PreparedDataset) -> list[bytes]:
    return [path.read_bytes() for path in (dataset.train_path, dataset.eval_path, dataset.rejects_path)]


@FAST
@given(files, st.integers(1, 200))
def test_ranges_of_any_size_give_the_same_bytes_and_lose_no_line(
    corpus: list[tuple[list[bytes], bytes, bool]], range_bytes: int
) -> None:
    with exports(corpus) as layout:
        whole = run(layout)
        expected = outputs(whole)
        shutil.rmtree(layout.root / "prepared")
        pieces = run(layout, range_bytes=range_bytes)

        assert outputs(pieces) == expected
        assert pieces == whole
        content = [path.read_bytes() for path in layout.exports.iterdir()]
        lines = sum(text.count(b"\n") + (not text.endswith(b"\n") and text != b"") for text in content)
        counts = pieces.counts
        assert lines == counts.lines == counts.kept + counts.duplicates + counts.rejected + counts.blank


@FAST
@given(files)
def test_no_prompt_stands_on_both_sides_and_no_content_twice(corpus: list[tuple[list[bytes], bytes, bool]]) -> None:
    with exports(corpus) as layout:
        train, held_out, _ = outputs(run(layout))

    sides = [[orjson.loads(line) for line in side.split(b"\n")[:-1]] for side in (train, held_out)]
    prompts = [{normalized(prompt_text(record)) for record in side} for side in sides]
    assert not prompts[0] & prompts[1]
    contents = [
        tuple((role, normalized(text)) for role, text in checked_turns(record)) for side in sides for record in side
    ]
    assert len(contents) == len(set(contents))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans())), min_size=1, max_size=3),
    st.integers(1, 40),
)
def test_the_first_of_equal_hashes_wins_though_half_of_the_hash_is_shared(
    corpus: list[list[tuple[int, int, bool]]], partition_records: int
) -> None:
    seen, expected = set(), []
    for *content, passed_over in itertools.chain(*corpus):
        expected.append(not passed_over and tuple(content) not in seen)
        if not passed_over:
            seen.add(tuple(content))
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        indexes = []
        for number, records in enumerate(corpus):
            path = Path(directory) / str(number)
            path.mkdir()
            (path / "records.bin").write_bytes(
                np.array([((content[0], content[1]), 0, 0, 0) for *content, _ in records], RECORD).tobytes()
            )
            file, fingerprint = ExportFile(Path(directory), str(number), "2026-06-01", 0, 0), Fingerprint(0, "", 1, ())
            indexes.append(FileIndex(file, fingerprint, path, 0, 0, len(records), {}))
        passed = np.array([passed_over for *_, passed_over in itertools.chain(*corpus)], np.bool_)

        assert first_occurrences(indexes, passed, partition_records).tolist() == expected


@FAST
@given(files, st.integers(0, 3))
def test_records_never_change_sides_when_other_files_come_or_go(
    corpus: list[tuple[list[bytes], bytes, bool]], removed: int
) -> None:
    with exports(corpus) as layout:
        before = [
            {normalized(prompt_text(orjson.loads(line))) for line in side.split(b"\n")[:-1]}
            for side in outputs(run(layout))[:2]
        ]
        paths = sorted(layout.exports.iterdir())
        if removed and removed < len(paths):
            paths[removed].unlink()
        after = [
            {normalized(prompt_text(orjson.loads(line))) for line in side.split(b"\n")[:-1]}
            for side in outputs(run(layout))[:2]
        ]

    assert not before[0] & after[1]
    assert not before[1] & after[0]


@settings(FAST, max_examples=4)
@given(files, st.integers(1, 400), st.integers(2, 4))
def test_processes_of_any_number_and_a_repeated_run_give_the_same_bytes_of_any_corpus(
    corpus: list[tuple[list[bytes], bytes, bool]], range_bytes: int, workers: int
) -> None:
    with exports(corpus) as layout:
        alone = run(layout)
        expected = outputs(alone)
        for _ in range(2):
            shutil.rmtree(layout.root / "prepared")
            assert run(layout, range_bytes=range_bytes, workers=workers) == alone
            assert outputs(alone) == expected


def test_processes_of_any_number_give_the_same_bytes(prepare: Any, pairs: Any, layout: DataLayout) -> None:
    corpus = {
        f"brain_dataset_2026-06-0{day}.jsonl": pairs(*range(day * 40, day * 40 + 60)) + b"\xff\n{}\n\n" + b"z" * 900
        for day in range(1, 6)
    }
    results = []
    for workers in (1, 2, 3):
        shutil.rmtree(layout.root / "prepared", ignore_errors=True)
        results.append(outputs(prepare(corpus, workers=workers, range_bytes=256)))

    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("blank", [b" " * 200, b"\t" * 101, b"\xef\xbb\xbf" + b" " * 98])
def test_white_space_longer_than_a_line_may_be_is_the_same_for_ranges_of_any_size(
    prepare: Any, layout: DataLayout, blank: bytes
) -> None:
    good = b"".join(b'{"text":"good %d"}\n' % n for n in range(30))
    results = []
    for range_bytes in (8, 150, 1 << 20):
        shutil.rmtree(layout.root / "prepared", ignore_errors=True)
        dataset = prepare(
            {"brain_dataset_2026-06-01.jsonl": good + blank + b"\n" + good},
            parameters={"max_line_bytes": 100},
            range_bytes=range_bytes,
        )
        results.append((dataset.counts, dataset.rejects_path.read_bytes()))

    assert results[0] == results[1] == results[2]
    assert dataset.rejects_by_reason == {"over_long": 1}


def reference(line: bytes) -> list[tuple[str, str]] | None:
    """What the standard library's parser and the rules accept: slow, plain, and independent of the fast way."""

    def no_constant(name: str) -> float:
        raise ValueError(name)

    def finite(number: str) -> float:
        if abs(float(number)) == float("inf"):
            raise ValueError(number)
        return 0.0

    def depth(value: object) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    strict = {"parse_constant": no_constant, "parse_int": finite, "parse_float": finite}
    try:
        text = line.decode()
        # Objects as lists of all their names and values, those that a later one of the same name replaces included.
        whole = json.loads(text, **strict, object_pairs_hook=lambda pairs: [part for pair in pairs for part in pair])
        again = json.dumps(whole, ensure_ascii=False)
        again.encode()
        if (
            "\\u0000" in again.replace("\\\\", "")
            or depth(whole) > LIMITS.max_depth
            or len(line) > LIMITS.max_line_bytes
        ):
            return None
        return checked_turns(json.loads(text, **strict))
    except (ValueError, RecursionError):
        return None


Found = tuple[bytes, int] | None


def key(turns: list[tuple[str, str]] | None) -> Found:
    if turns is None:
        return None
    content, prompt = content_key(turns)
    return xxh3_128_digest(content), xxh3_64_intdigest(prompt)


def found_at_once(lines: list[bytes]) -> list[Found]:
    """The hashes of those lines that are taken for records without being looked at one by one."""
    # (The brackets of 64 bytes count for both lines that share them, and many rare characters for all lines.)
    apart = [line + b" " * (1023 - (len(line) % 64)) + b"\n" for line in lines]
    found = _split(b"".join(apart), 0, 0, LIMITS)
    numbers, hashes = plain_records(found.lines, np.flatnonzero(~found.looks.unusual).tolist())
    records: list[Found] = [None] * len(lines)
    for number, content, prompt in zip(numbers, hashes.contents, hashes.prompts, strict=True):
        records[number] = content.tobytes(), int(prompt)
    return records


def fast_and_exact(line: bytes) -> tuple[list[tuple[str, str]] | None, list[tuple[str, str]] | None]:
    try:
        fast = checked_turns(loads(line, LIMITS))
    except ValueError:
        fast = None
    try:
        exact = _examine(line, len(line), True, LIMITS)
    except RejectedError:
        exact = None
    return fast, exact


# Beside the six that are white space: characters that are not, though their numbers are next to these, or to NUL.
spaced = st.text(alphabet="ab e\u0301\u2003 \t\n\r\x0b\x0c\x01\x08\x0e\x1f!@\x7f\x85\xa0є", max_size=20)
# And texts that could be taken for roles.
folding = spaced | st.sampled_from(["user", "text"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(["system", "assistant", "tool", "user", "text"]), folding))))
def test_white_space_is_folded_in_each_text_and_dropped_at_its_ends(conversations: list[list[tuple[str, str]]]) -> None:
    records = [[*conversation, ("user", "")] for conversation in conversations]
    contents = Contents()
    expected = []
    for turns in records:
        folded = [(role, b" ".join(unicodedata.normalize("NFC", content).encode().split())) for role, content in turns]
        content = b"\0".join(part for role, text in folded for part in (role.encode(), text))
        expected.append((content, next(text for role, text in folded if role in ("user", "text"))))
        contents.add(turns)

        assert [(role, normalized(content)) for role, content in turns] == folded

    assert list(map(content_key, records)) == expected
    hashes = contents.hashes()
    assert hashes.contents.tobytes() == b"".join(xxh3_128_digest(content) for content, _ in expected)
    assert hashes.prompts.tolist() == [xxh3_64_intdigest(prompt) for _, prompt in expected]


def test_a_text_with_nul_is_refused_lest_it_be_taken_for_two() -> None:
    contents = Contents()
    contents.add([("user", "a\0b")])

    with pytest.raises(ValueError, match="NUL"):
        contents.hashes()


@settings(max_examples=300, deadline=None)
@given(json_lines())
def test_fast_and_exact_parsers_accept_what_the_reference_accepts(line: bytes) -> None:
    fast, exact = fast_and_exact(line)

    assert fast == exact == reference(line)
    assert found_at_once([line])[0] in (None, key(exact))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]",:\\u0d8cfeE+-.19tns \r\té\0', max_size=30), st.booleans())
def test_parsers_agree_on_lines_made_of_json_and_noise(noise: str, within: bool) -> None:
    line = (f'{{"text":"{noise}"}}' if within else noise).encode()
    fast, exact = fast_and_exact(line)

    assert fast == exact == reference(line)
    assert found_at_once([line])[0] in (None, key(exact))


SEEDS = [
    '{"instruction":"Кафе \\u0454 \\ud83d\\ude00?","input":"","output":"Так\\n","id":1.5e3,"meta":{"a":[true,null]}}',
    '{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}',
    '{"conversations":[{"from":"human","value":"їжа"},{"from":"gpt","value":"\\"так\\""}],"x":[[[[-0.0]]]]}',
    '{"x":[[[[[[[[[[]]]]]]]]]],"x":1,"x":"\\u0000","x":"\\ud83d","x":2,"prompt":"p","completion":"c"}',
    ' {"text" : "a\\\\u0000b", "text2":"\\/" ,"n":123456789012345678901234567890}\t',
    '{"instruction":"\\"Ґанок\\" — 1","context":"і  ще\\t\\n","output":"Καλά  中文\\\\n 🎉 ","system":"«s»",'
    '"n":[-1.5e+30,"3e40"]}',
    '{"messages":[{"role":"user","content":"q\\/\\\\\\"","name":"n"},{"content":"a","role":"assistant"}],"system":null}',
]
# Bytes on which parsers differ.
SPECIAL = b"{}[]\",:\\/ \t\r\x00\x0b\x7f\x80\xbf\xc0\xc3\xed\xa0\xef\xbb\xf4\xff0123456789+-.eEu'NaInfty"


def mutated(chance: random.Random, lines: list[bytes]) -> bytes:
    """A line with a few bytes flipped, put in, taken out, repeated or exchanged for another line's."""
    line = bytearray(chance.choice(lines))
    for _ in range(chance.choice((1, 1, 1, 3))):
        at, size = chance.randrange(len(line) + 1), chance.choice((1, 1, 2, 5, 20))
        match chance.randrange(6):
            case 0 if at < len(line):
                line[at] ^= 1 << chance.randrange(8)
            case 1:
                line[at:at] = bytes(chance.choices(SPECIAL, k=size))
            case 2:
                del line[at : at + size]
            case 3:
                line[at:at] = line[at : at + size] * chance.choice((1, 3))
            case 4:
                other = chance.choice(lines)
                start = chance.randrange(len(other))
                line[at : at + size] = other[start : start + size]
            case _:
                line[at : at + 1] = chance.randbytes(1)
    return bytes(line).replace(b"\n", b" ")


def test_parsers_agree_on_lines_with_bytes_changed() -> None:
    chance = random.Random(20)
    seeds = [line.encode() for line in SEEDS]
    assert [reference(line) is None for line in seeds] == [False, False, False, True, False, False, False]
    lines = [mutated(chance, seeds) for _ in range(15_000)]
    accepted = at_once = 0
    for line, found in zip(lines, found_at_once(lines), strict=True):
        fast, exact = fast_and_exact(line)
        assert exact == reference(line), line
        # The fast way may leave an escaped backslash before u0000 to the exact one, and nothing else.
        assert fast == exact or (fast is None and b"\\\\u0000" in line), line
        assert found in (None, key(exact)), line
        accepted += exact is not None
        at_once += found is not None
    # Otherwise the mutations are too gentle, or too rough, to tell anything.
    assert 1000 < accepted < 10_000
    assert accepted / 4 < at_once < accepted


def test_lines_are_found_side_by_side_as_they_are_alone() -> None:
    chance = random.Random(22)
    seeds = [line.encode() for line in SEEDS]
    lines = [mutated(chance, seeds) if chance.random() < 0.9 else b"" for _ in range(3000)]
    alone = [found_at_once([line])[0] for line in lines]

    # (Whether a line is looked at closely depends on its neighbours too; what is found in it does not.)
    together = found_at_once(lines)
    for line, *found in zip(lines, together, alone, strict=True):
        assert set(found) <= {None, key(fast_and_exact(line)[1])}
    assert sum(None not in pair for pair in zip(together, alone, strict=True)) > 30


LITERALS = [
    '"a"',
    '"b"',
    '"\\"q\\\\"',
    '" c"',
    '""',
    '" "',
    '"\\f\\bd"',
    '"e\\ff"',
    '"\\n"',
    '"\x85"',
    '"\xa0"',
    '"\u2003"',
]
VALUES = [*LITERALS, "null", "1", "12", "[]"]
CHATS = [
    '[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]',
    '[{"role":"system","content":"s"},{"role":"user","content":"p"},{"role":"assistant","content":"r"}]',
    '[{"role":"user","content":"q"},{"role":"assistant","content":"r"},{"role":"user","content":"u"},'
    '{"role":"assistant","content":"v"}]',
]
FIELDS = (*PROMPT_FIELDS, *INPUT_FIELDS, *ANSWER_FIELDS, "system", "text")


def test_fields_and_values_in_any_mixture_are_read_at_once_as_one_by_one() -> None:
    chance = random.Random(23)
    lines = []
    for _ in range(4000):
        fields = [
            (name, chance.choice(VALUES[:4] if chance.random() < 0.8 else VALUES)) for name in chance.sample(FIELDS, 3)
        ]
        fields += [("prompt", '"a"'), ("output", '"b"')][: chance.randrange(3)]
        if chance.random() < 0.4:
            fields.append(("messages", chance.choice(CHATS)))
        if chance.random() < 0.4:
            fields.append(("conversations", chance.choice(CHATS).replace("role", "from").replace("content", "value")))
        lines.append(("{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}").encode())
    found = found_at_once(lines)

    for line, each in zip(lines, found, strict=True):
        assert each in (None, key(fast_and_exact(line)[1])), line
    assert sum(each is not None for each in found) > 800


def test_the_fields_that_are_read_at_once_are_those_of_the_rules() -> None:
    assert sorted(_Record.__struct_fields__) == sorted([*FIELDS, "messages", "conversations"])


def test_records_read_at_once_and_one_by_one_stand_in_their_order(prepare: Any) -> None:
    def line(number: int, escaped: bool) -> bytes:
        return b'{"text":"%bext %d%b"}' % (b"\\u0074" if escaped else b"t", number, b" of a hundred characters" * 4)

    first, again = ([line(n, (n % 3 == 0) != swapped) for n in range(90)] for swapped in (False, True))
    dataset = prepare({"brain_dataset_2026-06-01.jsonl": b"\n".join([*first, *again, b""])})

    assert dataset.counts.duplicates == 90
    kept = [path.read_bytes().splitlines() for path in (dataset.train_path, dataset.eval_path)]
    assert kept == [[line for line in first if line in side] for side in kept]
    assert sorted(kept[0] + kept[1]) == sorted(first)
    assert {each is None for each in found_at_once(first)} == {True, False}


def test_no_bytes_whatsoever_crash_a_preparation_or_lose_a_line(prepare: Any) -> None:
    chance = random.Random(21)
    seeds = [line.encode() for line in SEEDS]
    content = b"\n".join(mutated(chance, seeds) if chance.random() < 0.9 else chance.randbytes(30) for _ in range(3000))
    good = b"".join(b'{"text":"good %d"}\n' % n for n in range(30))
    options = {"parameters": {"sensitive_data": "mask", "near_duplicates": "report", "min_quality": None}}
    files = {"brain_dataset_2026-06-01.jsonl": good + content}

    plain, screened = prepare(files, range_bytes=997), prepare(files, range_bytes=5003, **options)

    for dataset in (plain, screened):
        counts = dataset.counts
        assert counts.lines == counts.accounted == (good + content + b"\n").count(b"\n")
        assert counts.rejected == len(dataset.rejects_path.read_bytes().splitlines()) > 1000
    assert plain.rejects_by_reason == screened.rejects_by_reason
    assert len(plain.rejects_by_reason) >= 8


@settings(max_examples=200, deadline=None)
@given(records)
def test_messages_are_the_turns_that_validation_saw(record: Any) -> None:
    try:
        seen = checked_turns(record)
    except RejectedError:
        if isinstance(record, dict):
            with pytest.raises(DatasetError):
                as_messages(record)
        return
    messages = as_messages(record)
    assert messages is None if seen[0][0] == "text" else [(m["role"], m["content"]) for m in messages or []] == seen
