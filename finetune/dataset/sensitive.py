"""Secrets and personal data in texts: where they are, and texts without them.

Secrets are found by the expressions of detect-secrets' plugins: those for keys and tokens of a known form,
not its guesses from entropy or from words such as "password", which lessons about passwords are full of.
Personal data, for which there is no light library, by expressions of our own:

=================  ====================================================================================
kind               what is taken for it
=================  ====================================================================================
``private_key``    a PEM block of a private key, to its end or the text's
``email_address``  local part, ``@``, and a domain of two labels or more
``phone_number``   ``+`` and 9 to 15 digits (E.164), with single spaces, dots, hyphens or brackets between
``payment_card``   13 to 19 digits, in groups or not, whose check digit is right (ISO/IEC 7812, Luhn)
``iban``           two letters, two digits, up to 30 more characters, checksum right (ISO 13616, mod 97)
=================  ====================================================================================
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

_RULES_VERSION = 1
_PLUGINS = (
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "basic_auth.BasicAuthDetector",
    "discord.DiscordBotTokenDetector",
    "github_token.GitHubTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "jwt.JwtTokenDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}")
_PHONE = re.compile(r"(?<![\w+])\+\d(?:[ ().-]{0,2}\d){8,14}(?!\d)")
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
# Some expressions end before the token does.
_REST_OF_TOKEN = re.compile(r"[A-Za-z0-9_+/=-]*")


class Finding(NamedTuple):
    """What kind of thing stands in ``text[start:end]``."""

    start: int
    end: int
    kind: str


def rules() -> str:
    """What a result depends on besides the text: our rules and the release of detect-secrets."""
    # Every validating process imports this module, and that one would take a sixth of its start.
    from importlib.metadata import version

    return f"{_RULES_VERSION}, detect-secrets {version('detect-secrets')}"


def find_sensitive(text: str) -> list[Finding]:
    """All secrets and personal data of a text, from left to right; of overlapping ones, the first's kind."""
    found = [Finding(*match.span(), "private_key") for match in _PRIVATE_KEY.finditer(text)]
    for kind, expression in _secret_expressions():
        for match in expression.finditer(text):
            rest = _REST_OF_TOKEN.match(text, match.end())
            found.append(Finding(match.start(), rest.end() if rest else match.end(), kind))
    found += [Finding(*match.span(), "email_address") for match in _EMAIL.finditer(text)]
    found += [Finding(*match.span(), "phone_number") for match in _PHONE.finditer(text)]
    found += [Finding(*match.span(), "payment_card") for match in _CARD.finditer(text) if _is_card(match[0])]
    found += [Finding(*match.span(), "iban") for match in _IBAN.finditer(text) if _is_iban(match[0])]
    return _without_overlaps(sorted(found, key=lambda finding: (finding.start, -finding.end)))


def masked(text: str, findings: list[Finding]) -> str:
    """The text with each finding replaced by its kind, such as ``[EMAIL_ADDRESS]``."""
    parts, position = [], 0
    for finding in findings:
        parts += [text[position : finding.start], f"[{finding.kind.upper()}]"]
        position = finding.end
    return "".join([*parts, text[position:]])


@lru_cache(maxsize=1)
def _secret_expressions() -> list[tuple[str, re.Pattern[str]]]:
    expressions = []
    for name in _PLUGINS:
        module, _, plugin = name.partition(".")
        detector: Any = getattr(import_module(f"detect_secrets.plugins.{module}"), plugin)
        kind = re.sub(r"\W+", "_", detector.secret_type.lower())
        expressions += [(kind, expression) for expression in detector.denylist]
    return expressions


def _without_overlaps(found: list[Finding]) -> list[Finding]:
    apart: list[Finding] = []
    for finding in found:
        if apart and finding.start < apart[-1].end:
            apart[-1] = apart[-1]._replace(end=max(apart[-1].end, finding.end))
        else:
            apart.append(finding)
    return apart


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()][::-1]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10


def _is_iban(text: str) -> bool:
    compact = text.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1
