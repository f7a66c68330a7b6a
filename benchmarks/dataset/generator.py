"""Synthetic exports that look like real ones: about 1.9 KB a record, Cyrillic and English, duplicates, bad lines.

``python benchmarks/dataset/generator.py DIRECTORY --megabytes 100``
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import orjson

DUPLICATES = 0.05
BAD_LINES = 0.01
FILES = 5
_WORDS = {
    "uk": "модель навчання дані відповідь питання система користувач приклад тексту перевірка якість мова є її ґанок",
    "ru": "модель обучение данные ответ вопрос система пользователь пример текста проверка качество язык это её объём",
    "en": "model training data answer question system user example text check quality language this its volume code",
}


def write_exports(directory: Path, size: int, *, seed: int = 0, clean: bool = False) -> None:
    """Write `size` bytes of exports over several dates; the same seed gives the same bytes.

    Args:
        directory: is made.
        size: in bytes, reached to within a record.
        seed: of everything random.
        clean: without bad lines and with one record format, for readers that stop at the first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = _lines(random.Random(seed), clean)
    for number in range(FILES):
        left = size // FILES
        with (directory / f"brain_dataset_2026-06-{number + 1:02}.jsonl").open("wb", buffering=1 << 20) as stream:
            while left > 0:
                left -= stream.write(next(lines))


def _lines(chance: random.Random, clean: bool) -> Iterator[bytes]:
    recent: list[bytes] = []
    number = 0
    while True:
        number += 1
        if recent and chance.random() < DUPLICATES:
            yield chance.choice(recent)
            continue
        line = orjson.dumps(_record(chance, number, clean)) + b"\n"
        if not clean and chance.random() < BAD_LINES:
            yield _damaged(chance, line)
            continue
        if len(recent) < 1000:
            recent.append(line)
        else:
            recent[chance.randrange(1000)] = line
        yield line


def _text(chance: random.Random, words: list[str], characters: int) -> str:
    sentences = []
    while characters > 0:
        sentence = " ".join(chance.choices(words, k=chance.randint(6, 18))).capitalize() + ". "
        characters -= len(sentence)
        sentences.append(sentence + ("\n" if chance.random() < 0.1 else ""))
    return "".join(sentences)


def _record(chance: random.Random, number: int, clean: bool) -> dict[str, object]:
    words = _WORDS[chance.choice(("uk", "ru", "en", "en"))].split()
    meta = {"id": number, "source": "chat", "quality": round(chance.random(), 3)}
    question = f"{number}: {_text(chance, words, chance.randint(40, 250))}"
    answer = _text(chance, words, int(chance.lognormvariate(6.72, 0.6)))
    if clean or chance.random() < 0.6:
        return {"instruction": question, "input": "", "output": answer, "meta": meta}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": "You are helpful."}, *turns], "meta": meta}


def _damaged(chance: random.Random, line: bytes) -> bytes:
    kind = chance.randrange(5)
    if kind == 0:
        return line[: len(line) // 2] + b"\n"
    if kind == 1:
        return line.replace(b"e", b"\xff", 1).replace("а".encode(), b"\xd0", 1)
    if kind == 2:
        return b'{"instruction":"","output":"x"}\n'
    if kind == 3:
        return line[:-1] + line
    return b"\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--clean", action="store_true")
    options = parser.parse_args()
    write_exports(options.directory, options.megabytes * 10**6, clean=options.clean)
