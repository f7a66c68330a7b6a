"""The synthetic corpus that the embedded base model is pre-trained on.

It is a small world of invented services, each with a port, an owner, a location and so on, and a few
capitals, told in Ukrainian, Russian and English. Every fact is asked for in about ten phrasings, so
that a model must learn to read *which thing* and *which property* out of a question: the skill that
makes a later adapter generalise to phrasings that it never saw. Other conversations are about services
that are named but once: there the model learns to spell any name, and to say that it does not know.
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
# Of the conversations about a service that no other names, the share that tells the fact beforehand.
_TOLD = 0.75
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


def _word(rng: random.Random, phrases: dict[str, Any]) -> str:
    """An invented name of two or three syllables that only letters make up."""
    consonants, vowels = phrases["consonants"].split(), phrases["vowels"].split()
    syllables: list[str] = [rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 3)))]
    if rng.random() < 0.5:
        syllables.append(rng.choice(consonants))
    return "".join(syllables).capitalize()


def _value(rng: random.Random, phrases: dict[str, Any], attribute: dict[str, Any]) -> str:
    match attribute.get("pattern"):
        case "port":
            return str(rng.randrange(3000, 9999))
        case "seconds":
            return str(rng.randrange(2, 90))
        case "days":
            return str(rng.randrange(5, 800))
        case "limit":
            return str(rng.randrange(2, 90) * 10)
        case "version":
            return f"{rng.randrange(1, 9)}.{rng.randrange(35)}.{rng.randrange(20)}"
        case "window":
            time = f"{rng.randrange(24):02}:{rng.randrange(0, 60, 5):02}"
            return str(phrases["window"].format(day=rng.choice(phrases["weekdays"]), time=time))
        case _:
            value = str(rng.choice(attribute["values"]))
            # Invented words in place of common ones: a model that can spell anything learns new names sooner.
            return value if rng.random() < 0.3 else " ".join(_word(rng, phrases) for _ in value.split())


def _service_fact(language: str, name: str, attribute: dict[str, Any], rng: random.Random) -> Fact:
    phrases = _phrases()[language]
    subject = phrases["kind"] + name
    wh = attribute.get("wh", "")
    words = {"e": subject, "n": name, "np": attribute["np"], "acc": attribute.get("acc", ""), "wh": wh}
    return Fact(
        language=language,
        subject=name,
        questions=tuple(
            template.format(**words, wh2=wh.lower()) for template in [*phrases["frames"], *attribute["questions"]]
        ),
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
    """All facts that the model shall know.

    Args:
        seed: decides names and values; equal seeds give equal facts.
        services: how many services there are in each language.
    """
    facts: list[Fact] = []
    for language in LANGUAGES:
        phrases = _phrases()[language]
        rng = random.Random(f"{seed}-{language}")  # noqa: S311 - must repeat, need not be secret
        for _ in range(services):
            name = _word(rng, phrases)
            facts.extend(_service_fact(language, name, attribute, rng) for attribute in phrases["attributes"].values())
        facts.extend(_capital_facts(language))
    return facts


def _question(fact: Fact, rng: random.Random) -> Message:
    phrases = _phrases()[fact.language]
    question = rng.choice(phrases["openers"]) + rng.choice(fact.questions)
    if rng.random() < 0.06:
        question = f"{rng.choice(phrases['instructions'])}\n\n{question}"
    return {"role": "user", "content": question}


def _known(fact: Fact, rng: random.Random) -> Conversation:
    turns = [_question(fact, rng), {"role": "assistant", "content": fact.answer}]
    if rng.random() < 0.1:
        turns.insert(0, {"role": "system", "content": rng.choice(_phrases()[fact.language]["systems"])})
    return turns


def _unheard(rng: random.Random) -> Conversation:
    """A question about a service that is named once: told in the system message, or not known."""
    language = rng.choice(LANGUAGES)
    phrases = _phrases()[language]
    name = _word(rng, phrases)
    fact = _service_fact(language, name, rng.choice(list(phrases["attributes"].values())), rng)
    if rng.random() < _TOLD:
        return [
            {"role": "system", "content": fact.answer},
            _question(fact, rng),
            {"role": "assistant", "content": fact.answer},
        ]
    return [_question(fact, rng), {"role": "assistant", "content": phrases["unknown"].format(n=name)}]


def make_conversations(facts: list[Fact], *, rounds: int, unheard: float, seed: int) -> list[Conversation]:
    """Conversations in which every fact is asked for `rounds` times.

    Beside each of them stand, on average, `unheard` conversations about something that no other names:
    there the model learns to copy a name letter by letter. One in ten goes on to a second question.
    """
    rng = random.Random(seed)  # noqa: S311 - must repeat, need not be secret
    conversations: list[Conversation] = []
    for _ in range(rounds):
        for fact in rng.sample(facts, len(facts)):
            known = _known(fact, rng)
            if conversations and known[0]["role"] == "user" and rng.random() < 0.1:
                conversations[-1].extend(known)
            else:
                conversations.append(known)
            if rng.random() < unheard:
                conversations.append(_unheard(rng))
    return conversations
