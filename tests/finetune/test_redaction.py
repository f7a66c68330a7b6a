"""No secret passes, as it was given or in a form that tells it is one; what is none stays readable."""

import pytest

from finetune.redaction import Redactor

SECRETS = [
    "postgresql://brain:p%40ss%2Fword-77@db.internal:5432/runs?sslpassword=client-key-pw",
    "secret-key-from-vault",
    "hf_AbCdEfGhIjKlMnOp",
    "https://hooks.slack.com/services/T000/B000/xyzzy",
]


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("connection to server failed for p@ss/word-77", "p@ss/word-77"),
        ("DATABASE_URL=postgresql://brain:p%40ss%2Fword-77@db.internal:5432/runs", "p%40ss"),
        ("the key client-key-pw was refused", "client-key-pw"),
        ("Authorization: Bearer secret-key-from-vault", "secret-key"),
        ("401 for token hf_AbCdEfGhIjKlMnOp", "AbCdEf"),
        ("POST https://hooks.slack.com/services/T000/B000/xyzzy failed", "xyzzy"),
        ("https%3A%2F%2Fhooks.slack.com%2Fservices%2FT000%2FB000%2Fxyzzy", "xyzzy"),
        # None of them was given: their form tells.
        ("redis://:other-pw@cache:6379", "other-pw"),
        ("password=other-pw host=db", "other-pw"),
        ("api_key: other-key", "other-key"),
        ("HF_TOKEN=other-token H2O_API_KEY=x", "other-token"),
        ("env: PGPASSWORD=other-pw", "other-pw"),
        ('{"token": "other-token"}', "other-token"),
        ("aws_secret_access_key=other-key", "other-key"),
        ("Bearer other.token-123", "other.token"),
        ("hf_OtherTokenThatNobodyGave", "OtherToken"),
        ("https://hooks.slack.com/services/T1/B1/other", "other"),
    ],
)
def test_a_secret_is_masked(text: str, gone: str) -> None:
    assert gone in text
    shown = Redactor(SECRETS)(text)
    assert gone not in shown
    assert "***" in shown


def test_of_a_secret_that_begins_with_another_nothing_stays() -> None:
    assert Redactor(["abcd", "abcd-efgh"])("abcd-efgh and abcd") == "*** and ***"


def test_what_is_no_secret_stays_as_it_is() -> None:
    text = "max_length=512, 3 tokens: loss 0.5 at https://h2o.internal/api?page=2 [/data/work/ab12]. Free space"
    assert Redactor([*SECRETS, "", "at"])(text) == text
