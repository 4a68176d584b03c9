"""Who calls, and what a Role lets them do; every call is written down for the comparison with that Role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.kubernetes_double.refusals import Json, Refused


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks for, as the API server's authorizer sees it."""

    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str = ""
    dry_run: bool = False

    @property
    def full_resource(self) -> str:
        """`pods/log` where there is a subresource: so a Role spells it."""
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource

    @property
    def right(self) -> tuple[str, str, str]:
        """Group, resource and verb: what a rule would have to name."""
        return self.group, self.full_resource, self.verb


@dataclass(frozen=True)
class Account:
    """A user of the API. `rules` by namespace, as Roles write them; None may do everything."""

    name: str = "system:admin"
    rules: Mapping[str, Sequence[Json]] | None = None

    def may(self, call: Call) -> bool:
        if self.rules is None or call.resource.startswith("selfsubject"):
            return True
        return any(_allows(rule, call) for rule in self.rules.get(call.namespace, ()))

    def check(self, call: Call) -> None:
        """Pass, or raise.

        Raises:
            Refused: 403.
        """
        if not self.may(call):
            name = f' "{call.name}"' if call.name else ""
            raise Refused(
                403,
                "Forbidden",
                f'{call.resource}{name} is forbidden: User "{self.name}" cannot {call.verb} resource '
                f'"{call.full_resource}" in API group "{call.group}" in the namespace "{call.namespace}"',
            )


def _allows(rule: Json, call: Call) -> bool:
    def named(words: Iterable[str], word: str) -> bool:
        return "*" in words or word in words

    names = rule.get("resourceNames")
    return (
        named(rule.get("apiGroups") or [""], call.group)
        and named(rule["resources"], call.full_resource)
        and named(rule["verbs"], call.verb)
        and (not names or call.name in names)
    )


@dataclass
class Accounts:
    """Bearer tokens and whose they are. None in `tokens`: nobody is asked for one."""

    tokens: dict[str, Account] = field(default_factory=dict)
    anonymous: Account | None = None

    def of(self, authorization: str) -> Account:
        """The account that this header proves.

        Raises:
            Refused: 401, the token is unknown or has expired.
        """
        token = authorization.removeprefix("Bearer ")
        account = self.tokens.get(token, None if authorization else self.anonymous)
        if account is None:
            raise Refused(401, "Unauthorized", "Unauthorized")
        return account
