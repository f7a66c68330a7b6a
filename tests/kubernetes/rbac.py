"""Who may do what: service accounts by their tokens, and the rules of their Role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.kubernetes.objects import RefusedError


@dataclass
class Accounts:
    """Service accounts: each has a token and the rules that are bound to it."""

    rules: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def token(self, account: str) -> str:
        return f"token-of-{account}"

    def check(self, authorization: str | None, verb: str, group: str, resource: str) -> None:
        """See that the bearer of a token may do this.

        Raises:
            RefusedError: 401 for who is unknown, 403 for what no rule allows.
        """
        account = next((name for name in self.rules if authorization == f"Bearer {self.token(name)}"), None)
        if account is None:
            raise RefusedError(401, "Unauthorized", "Unauthorized")
        for rule in self.rules[account]:
            if group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]:
                return
        raise RefusedError(
            403, "Forbidden", f'User "system:serviceaccount:{account}" cannot {verb} resource "{resource}" in "{group}"'
        )
