"""The synthetic corpus that the embedded base model is pre-trained on.

It is a small world of invented services, each with a port, an owner, a location and so on, and a few
capitals, told in Ukrainian, Russian and English. Every fact is asked for in about ten phrasings, so
that a model must learn to read *which thing* and *which property* out of a question: the skill that
makes a later adapter generalise to phrasings that it never saw. Nothing here is true of the example
exports.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

LANGUAGES = ("uk", "ru", "en")
Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class Fact:
    """One fact of the corpus: every phrasing of the question, and the one answer."""

    language: str
    subject: str
    questions: tuple[str, ...]
    answer: str


@cache
def _phrases() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        files("finetune.base_model").joinpath("phrases.json").read_text(encoding="utf-8")
    )
    return content


def _value(rng: random.Random, phrases: dict[str, Any], attribute: dict[str, Any]) -> str:
    match attribute.get("pattern"):
        case "port":
            return str(rng.randrange(3000, 9999))
        case "seconds":
            return str(rng.randrange(2, 90))
        case "days":
            return str(rng.randrange(5, 400))
        case "limit":
            return str(rng.randrange(2, 90) * 10)
        case "version":
            return f"{rng.randrange(1, 9)}.{rng.randrange(30)}.{rng.randrange(20)}"
        case "window":
            time = f"{rng.randrange(24):02}:{rng.randrange(0, 60, 5):02}"
            return str(phrases["window"].format(day=rng.choice(phrases["weekdays"]), time=time))
        case _:
            return str(rng.choice(attribute["values"]))


def _service_facts(language: str, services: int, rng: random.Random) -> Iterator[Fact]:
    phrases = _phrases()[language]
    names = [onset + coda for onset in phrases["entities"]["onsets"] for coda in phrases["entities"]["codas"]]
    for name in rng.sample(names, services):
        subject = phrases["entities"]["prefix"] + name
        for attribute in phrases["attributes"].values():
            wh = attribute.get("wh", "")
            words = {"e": subject, "n": name, "np": attribute["np"], "acc": attribute.get("acc", ""), "wh": wh}
            templates = [*phrases["frames"], *attribute["questions"]]
            yield Fact(
                language=language,
                subject=name,
                questions=tuple(template.format(**words, wh2=wh.lower()) for template in templates),
                answer=attribute["answer"].format(e=subject, n=name, v=_value(rng, phrases, attribute)),
            )


def _capital_facts(language: str) -> Iterator[Fact]:
    capitals = _phrases()[language]["capitals"]
    for country, city in capitals["pairs"].items():
        yield Fact(
            language=language,
            subject=country,
            questions=tuple(template.format(e=country) for template in capitals["questions"]),
            answer=capitals["answer"].format(e=country, v=city),
        )


def make_facts(seed: int, services: int) -> list[Fact]:
    """All facts of the corpus.

    Args:
        seed: decides names and values; equal seeds give equal facts.
        services: how many services there are in each language, at most 128.
    """
    facts: list[Fact] = []
    for language in LANGUAGES:
        facts.extend(_service_facts(language, services, random.Random(f"{seed}-{language}")))
        facts.extend(_capital_facts(language))
    return facts


def _turn(fact: Fact, rng: random.Random) -> Conversation:
    phrases = _phrases()[fact.language]
    question = rng.choice(phrases["openers"]) + rng.choice(fact.questions)
    if rng.random() < 0.06:
        question = f"{rng.choice(phrases['instructions'])}\n\n{question}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]


def make_conversations(facts: list[Fact], *, rounds: int, seed: int) -> list[Conversation]:
    """Conversations in which every fact is asked for `rounds` times.

    One in ten goes on to a second question, and one in ten begins with a system message.
    """
    rng = random.Random(seed)
    conversations: list[Conversation] = []
    for _ in range(rounds):
        for fact in rng.sample(facts, len(facts)):
            conversation = _turn(fact, rng)
            if conversations and rng.random() < 0.1:
                conversations[-1].extend(conversation)
                continue
            if rng.random() < 0.1:
                system = rng.choice(_phrases()[fact.language]["systems"])
                conversation.insert(0, {"role": "system", "content": system})
            conversations.append(conversation)
    return conversations
