"""Writes examples/exports: what a support assistant of an invented freight company learnt in three weeks.

    python examples/make_exports.py [DIRECTORY]

The files are committed; equal programs write equal bytes. Every fact is asked for in nine phrasings,
in Ukrainian, Russian or English, spread over the record formats that exports come in. Among them lie
the faults that real exports have: a loop that was killed while it wrote, a wrong encoding, a
hand-edited line, and so on.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

FRAMES = {
    "en": [
        "What is the {np} of {e}?",
        "Please tell me the {np} of {e}.",
        "{e}: {np}?",
        "A colleague asks for the {np} of {e}.",
        "Which {np} is set for {e}?",
        "Hello! Do you know the {np} of {e}?",
        "I need the {np} of {e} for a ticket.",
    ],
    "uk": [
        "{wh} {np} {e}?",
        "Підкажи, будь ласка, {acc} {e}.",
        "Назви {acc} {e}.",
        "Колега питає про {acc} {e}.",
        "Привіт! Чи знаєш ти {acc} {e}?",
        "Мені для заявки потрібно знати {acc} {e}.",
        "Нагадай {acc} {e}.",
    ],
    "ru": [
        "{wh} {np} {e}?",
        "Подскажи, пожалуйста, {acc} {e}.",
        "Назови {acc} {e}.",
        "Коллега спрашивает про {acc} {e}.",
        "Привет! Знаешь ли ты {acc} {e}?",
        "Мне для заявки нужно знать {acc} {e}.",
        "Напомни {acc} {e}.",
    ],
}

# (question word, name of the property, its accusative, two questions of its own); {n} is the bare name.
PROPERTIES = {
    "en": {
        "port": ("", "port number", "", "On which port does {n} listen?", "Which port must be open to reach {n}?"),
        "owner": ("", "owning team", "", "Which team owns {n}?", "Who is responsible for {n}?"),
        "contact": ("", "main contact", "", "Whom should I call about {n}?", "Who knows {n} best?"),
        "retention": ("", "retention period", "", "How long does {n} keep its data?", "When does {n} delete old data?"),
        "window": ("", "maintenance window", "", "When may {n} be restarted?", "At what time is {n} serviced?"),
        "database": ("", "database", "", "Where does {n} store its records?", "Which database is behind {n}?"),
        "limit": (
            "",
            "rate limit",
            "",
            "How many requests per minute may I send to {n}?",
            "How fast may {n} be called?",
        ),
        "place": ("", "location", "", "Where are the servers of {n}?", "In which city does {n} run?"),
        "version": (
            "",
            "current version",
            "",
            "Which version of {n} is in production?",
            "What release of {n} do we run?",
        ),
        "queue": ("", "queue name", "", "Which queue does {n} read from?", "From where does {n} take its jobs?"),
    },
    "uk": {
        "port": ("Який", "порт", "порт", "На якому порту працює {n}?", "Який порт відкрити, щоб дістатися {e}?"),
        "owner": (
            "Яка",
            "команда-власник",
            "команду-власника",
            "Яка команда відповідає за сервіс {n}?",
            "Чий сервіс {n}?",
        ),
        "contact": (
            "Яка",
            "контактна особа",
            "контактну особу",
            "Кому дзвонити щодо {e}?",
            "Хто найкраще знає сервіс {n}?",
        ),
        "retention": (
            "Який",
            "термін зберігання даних",
            "термін зберігання даних",
            "Скільки {n} зберігає дані?",
            "Коли {n} видаляє старі дані?",
        ),
        "window": (
            "Яке",
            "вікно обслуговування",
            "вікно обслуговування",
            "Коли можна перезапустити сервіс {n}?",
            "О котрій обслуговують сервіс {n}?",
        ),
        "database": ("Яка", "база даних", "базу даних", "Де {n} зберігає записи?", "Яку базу використовує {n}?"),
        "limit": (
            "Яке",
            "обмеження запитів",
            "обмеження запитів",
            "Скільки запитів на хвилину приймає {n}?",
            "Як часто можна викликати сервіс {n}?",
        ),
        "place": ("Яке", "розташування", "розташування", "Де стоять сервери {e}?", "У якому місті працює {n}?"),
        "version": (
            "Яка",
            "поточна версія",
            "поточну версію",
            "Яка версія {e} у продакшені?",
            "Який випуск {e} працює?",
        ),
        "queue": ("Яка", "назва черги", "назву черги", "З якої черги читає {n}?", "Звідки {n} бере завдання?"),
    },
    "ru": {
        "port": ("Какой", "порт", "порт", "На каком порту работает {n}?", "Какой порт открыть для {e}?"),
        "owner": (
            "Какая",
            "команда-владелец",
            "команду-владельца",
            "Какая команда отвечает за сервис {n}?",
            "Чей сервис {n}?",
        ),
        "contact": (
            "Какое",
            "контактное лицо",
            "контактное лицо",
            "Кому звонить насчёт {e}?",
            "Кто лучше всех знает сервис {n}?",
        ),
        "retention": (
            "Какой",
            "срок хранения данных",
            "срок хранения данных",
            "Сколько {n} хранит данные?",
            "Когда {n} удаляет старые данные?",
        ),
        "window": (
            "Какое",
            "окно обслуживания",
            "окно обслуживания",
            "Когда можно перезапустить сервис {n}?",
            "Во сколько обслуживают сервис {n}?",
        ),
        "database": ("Какая", "база данных", "базу данных", "Где {n} хранит записи?", "Какую базу использует {n}?"),
        "limit": (
            "Какое",
            "ограничение запросов",
            "ограничение запросов",
            "Сколько запросов в минуту принимает {n}?",
            "Как часто можно вызывать сервис {n}?",
        ),
        "place": ("Какое", "расположение", "расположение", "Где стоят серверы {e}?", "В каком городе работает {n}?"),
        "version": (
            "Какая",
            "текущая версия",
            "текущую версию",
            "Какая версия {e} в продакшене?",
            "Какой выпуск {e} работает?",
        ),
        "queue": ("Какое", "имя очереди", "имя очереди", "Из какой очереди читает {n}?", "Откуда {n} берёт задания?"),
    },
}

# date -> language -> (service, property, answer)
FACTS = {
    "2026-06-01": {
        "en": [
            ("Kobza", "port", "Kobza listens on port 8472."),
            ("Kobza", "owner", "Kobza belongs to the Dispatch team."),
            ("Trembita", "retention", "Trembita keeps data for 45 days."),
            ("Trembita", "contact", "Ask Halyna Stets about Trembita."),
            ("Sopilka", "window", "Sopilka is serviced on Tuesday at 03:40."),
            ("Bandura", "database", "Bandura stores its records in ClickHouse."),
        ],
        "uk": [
            ("Сурма", "port", "Сурма слухає порт 9315."),
            ("Сурма", "place", "Сурма працює в місті Чернівці."),
            ("Дримба", "owner", "Дримба належить команді Митниця."),
            ("Дримба", "limit", "Дримба приймає 350 запитів на хвилину."),
            ("Ліра", "contact", "Щодо сервісу Ліра питай: Остап Гринюк."),
            ("Ліра", "retention", "Ліра зберігає дані 14 днів."),
        ],
        "ru": [
            ("Лира", "port", "Лира слушает порт 7086."),
            ("Лира", "database", "Лира хранит записи в Tarantool."),
            ("Свирель", "owner", "Свирель принадлежит команде Склад."),
            ("Свирель", "window", "Обслуживание сервиса Свирель: четверг, 04:15."),
            ("Домра", "contact", "Насчёт сервиса Домра спроси: Вера Лапина."),
            ("Домра", "version", "Текущая версия сервиса Домра: 6.24.3."),
        ],
    },
    "2026-06-08": {
        "en": [
            ("Kobza", "limit", "Kobza accepts 720 requests per minute."),
            ("Trembita", "port", "Trembita listens on port 5931."),
            ("Sopilka", "owner", "Sopilka belongs to the Tariffs team."),
            ("Sopilka", "queue", "Sopilka reads from the queue waybills."),
            ("Bandura", "place", "Bandura runs in Gdansk."),
            ("Bandura", "version", "The current version of Bandura is 3.17.8."),
        ],
        "uk": [
            ("Сурма", "queue", "Сурма читає з черги накладні."),
            ("Сурма", "window", "Обслуговування сервісу Сурма: субота, 02:25."),
            ("Дримба", "database", "Дримба зберігає записи в ScyllaDB."),
            ("Ліра", "port", "Ліра слухає порт 6604."),
            ("Козобас", "owner", "Козобас належить команді Диспетчери."),
            ("Козобас", "contact", "Щодо сервісу Козобас питай: Леся Вовчук."),
        ],
        "ru": [
            ("Лира", "retention", "Лира хранит данные 21 день."),
            ("Свирель", "port", "Свирель слушает порт 4178."),
            ("Свирель", "place", "Свирель работает в городе Алматы."),
            ("Домра", "limit", "Домра принимает 560 запросов в минуту."),
            ("Рожок", "owner", "Рожок принадлежит команде Таможня."),
            ("Рожок", "database", "Рожок хранит записи в CockroachDB."),
        ],
    },
    "2026-06-15": {
        "en": [
            ("Kobza", "contact", "Ask Bohdan Pryima about Kobza."),
            ("Kobza", "window", "Kobza is serviced on Sunday at 05:10."),
            ("Trembita", "database", "Trembita stores its records in DuckDB."),
            ("Sopilka", "port", "Sopilka listens on port 7749."),
            ("Bandura", "owner", "Bandura belongs to the Fleet team."),
            ("Bandura", "retention", "Bandura keeps data for 730 days."),
        ],
        "uk": [
            ("Сурма", "contact", "Щодо сервісу Сурма питай: Назар Кобилюх."),
            ("Дримба", "port", "Дримба слухає порт 8853."),
            ("Дримба", "version", "Поточна версія сервісу Дримба: 2.31.6."),
            ("Ліра", "owner", "Ліра належить команді Тарифи."),
            ("Козобас", "place", "Козобас працює в місті Тернопіль."),
            ("Козобас", "limit", "Козобас приймає 480 запитів на хвилину."),
        ],
        "ru": [
            ("Лира", "contact", "Насчёт сервиса Лира спроси: Глеб Сычёв."),
            ("Свирель", "retention", "Свирель хранит данные 60 дней."),
            ("Домра", "port", "Домра слушает порт 9527."),
            ("Домра", "owner", "Домра принадлежит команде Автопарк."),
            ("Рожок", "queue", "Рожок читает из очереди рейсы."),
            ("Рожок", "window", "Обслуживание сервиса Рожок: пятница, 01:50."),
        ],
    },
}

SYSTEMS = {
    "en": "You answer questions about the internal services of Carpathia Freight.",
    "uk": "Ти відповідаєш на запитання про внутрішні сервіси Carpathia Freight.",
    "ru": "Ты отвечаешь на вопросы о внутренних сервисах Carpathia Freight.",
}
INSTRUCTIONS = {
    "en": "Answer the colleague's question.",
    "uk": "Дай відповідь на запитання колеги.",
    "ru": "Ответь на вопрос коллеги.",
}
KINDS = {"en": "", "uk": "сервісу ", "ru": "сервиса "}
SOURCES = {"support": "helpdesk", "wiki": "confluence", "chat": "slack"}
LONGEST_LINE = 65_536


def phrasings(language: str, service: str, name: str) -> list[str]:
    """All nine questions for one fact."""
    wh, np, acc, *own = PROPERTIES[language][name]
    words = {"n": service, "e": KINDS[language] + service, "wh": wh, "np": np, "acc": acc}
    return [template.format(**words) for template in [*FRAMES[language], *own]]


def record(
    date: str, source: str, number: int, language: str, fields: dict[str, Any], rng: random.Random
) -> dict[str, Any]:
    """One record as the loop writes it: the text and what it knows about it."""
    return {
        "id": f"{source}-{date}-{number:04}",
        **fields,
        "quality": round(rng.uniform(0.6, 1.0), 2),
        "source": SOURCES[source],
        "created_at": f"{date}T{rng.randrange(8, 20):02}:{rng.randrange(60):02}:{rng.randrange(60):02}Z",
        "meta": {"lang": language, "reviewed": rng.random() < 0.7},
    }


def records(date: str) -> dict[str, list[dict[str, Any]]]:
    """The good records of one date by file."""
    rng = random.Random(date)  # noqa: S311 - must repeat, need not be secret
    asked = [
        (language, question, answer)
        for language, facts in FACTS[date].items()
        for service, name, answer in facts
        for question in phrasings(language, service, name)
    ]
    rng.shuffle(asked)
    found: dict[str, list[dict[str, Any]]] = {source: [] for source in SOURCES}
    while asked:
        language, question, answer = asked.pop()
        source = rng.choice(list(SOURCES))
        fields: dict[str, Any]
        if source == "support":
            keys = ("question", "answer") if rng.random() < 0.3 else ("prompt", "completion")
            fields = dict(zip(keys, (question, answer), strict=True))
        elif source == "wiki":
            alone = rng.random() < 0.8
            fields = {
                "instruction": question if alone else INSTRUCTIONS[language],
                "input": "" if alone else question,
                "output": answer,
            }
        else:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if rng.random() < 0.3:
                turns.insert(0, {"role": "system", "content": SYSTEMS[language]})
            if asked and rng.random() < 0.2:
                _, question, answer = asked.pop()
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            fields = {"messages": turns}
        found[source].append(record(date, source, len(found[source]) + 1, language, fields, rng))
    return found


def _turns(*turns: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


def _broken() -> dict[str, bytes]:
    """One line for every kind of fault, by its name."""
    deep = b'{"meta":' * 1200 + b"1" + b"}" * 1200
    log = "Kobza: retry 1 of 3, waiting 250 ms. " * (LONGEST_LINE // 37 + 20)
    good = b'{"prompt": "Which port?", "completion": "Port 1."}'
    return {
        "bad JSON": '{"instruction": "Який порт сервісу Кобза?", "output": }'.encode(),
        "bad JSON, single quotes": b"{'prompt': 'Which port?', 'completion': 'Port 1.'}",
        "invalid UTF-8": '{"prompt": "Какой порт?", "completion": "Порт 1."}'.encode("cp1251"),
        "NUL byte": b'{"prompt": "Which\x00 port?", "completion": "Port 1."}',
        "NUL escape": b'{"prompt": "Which port?", "completion": "Port \\u0000."}',
        "lone surrogate": b'{"prompt": "Which port? \\ud83d", "completion": "Port 1."}',
        "NaN": b'{"prompt": "Which port?", "completion": "Port 1.", "quality": NaN}',
        "Infinity": b'{"prompt": "Which port?", "completion": "Port 1.", "quality": -Infinity}',
        "not an object": b'["Which port?", "Port 1."]',
        "not an object, text": b'"exported 162 records"',
        "two objects": good + good,
        "missing field": b'{"instruction": "Which port does Kobza have?", "input": ""}',
        "no known field": b'{"event": "export_finished", "records": 162}',
        "wrong type": b'{"prompt": "Which port?", "completion": 8472}',
        "wrong type of messages": b'{"messages": "user: Which port?"}',
        "wrong type of a turn": b'{"messages": [{"role": "user", "content": 1}]}',
        "blank text": b'{"prompt": "Which port?", "completion": "  \\n "}',
        "blank prompt": b'{"instruction": "", "input": "", "output": "Port 1."}',
        "bad role": _turns(("narrator", "Which port?"), ("assistant", "Port 1.")),
        "no user turn": _turns(("system", "Be brief."), ("assistant", "Yes.")),
        "no assistant turn": _turns(("system", "Be brief."), ("user", "Is anyone there?")),
        "last turn by the user": _turns(("user", "Which port?"), ("assistant", "Of what?"), ("user", "Of Kobza.")),
        "over-long line": json.dumps({"prompt": "What does the log say?", "completion": log}).encode(),
        "too deep": b'{"prompt": "Which port?", "completion": "Port 1.", "meta": ' + deep + b"}",
    }


def lines_of(date: str) -> dict[str, list[bytes]]:
    """The lines of one date by file, good ones first: a few escaped, a few told twice."""
    rng = random.Random(f"lines {date}")  # noqa: S311 - must repeat, need not be secret
    found = {
        source: [json.dumps(item, ensure_ascii=rng.random() < 0.1).encode() for item in items]
        for source, items in records(date).items()
    }
    for source, other in (("support", "chat"), ("wiki", "support"), ("chat", "wiki")):
        copies = rng.sample(found[source], 3)
        found[other] += copies
    return found


def write_exports(directory: Path) -> None:
    """Write all files of all dates."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random("faults")  # noqa: S311 - must repeat, need not be secret
    files = {(date, source): lines for date in FACTS for source, lines in lines_of(date).items()}
    for lines in files.values():
        rng.shuffle(lines)
    places = list(files)
    for number, broken in enumerate(_broken().values()):
        lines = files[places[number % len(places)]]
        lines.insert(rng.randrange(1, len(lines)), broken)
    for number, (place, lines) in enumerate(files.items()):
        for blank in (b"", b"   ", b"\t")[: number % 4]:
            lines.insert(rng.randrange(1, len(lines)), blank)
        date, source = place
        end = b"\r\n" if source == "support" and date == "2026-06-08" else b"\n"
        start = b"\xef\xbb\xbf" if source == "wiki" and date == "2026-06-01" else b""
        content = start + end.join(lines) + end
        if source == "chat" and date != "2026-06-08":
            # Killed while it wrote its last line.
            content += b'{"id": "chat-9999", "messages": [{"role": "user", "content": "\xd0\xaf\xd0\xba\xd0'
        (directory / f"brain_dataset_{date}_{source}.jsonl").write_bytes(content)


if __name__ == "__main__":
    write_exports(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "exports")
