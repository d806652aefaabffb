"""What clients may send: the bodies of requests, their limits, and errors that name the field."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

BODY = "body"
"""Field of errors that concern the request as a whole."""


# With a length pydantic also refuses halves of surrogate pairs, which no file or answer could hold.
Key = Annotated[str, StringConstraints(max_length=1_000)]
Text = Annotated[str, StringConstraints(max_length=20_000)]

DEFAULT_K = 10
"""Items per list where the request does not say."""


class RequestError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP.
        field: of the request that has to change, such as "histories[2]"; None where there is none.
        message: one sentence.
        headers: of the response.
    """

    def __init__(self, status: int, field: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.message = message
        self.headers = headers

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"field": self.field, "message": self.message}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_body_bytes: size of a body.
        max_histories: histories per request.
        max_history: item keys per history.
        max_k: items per list.
        max_listed: item keys in `allow` and in `deny`.
        max_changed: items that are added or removed at once.
        timeout: seconds from the arrival of a body's first byte to its last, and again until the answer.
    """

    max_body_bytes: int = 8 * 2**20
    max_histories: int = 64
    max_history: int = 1_000
    max_k: int = 100
    max_listed: int = 100_000
    max_changed: int = 1_000
    timeout: float = 10.0


class _Body(BaseModel):
    """A JSON object without fields that nobody reads, and without guesses such as "5" for 5."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RecommendBody(_Body):
    """`POST /recommend`: one `history` or several `histories`, oldest item first; the rest holds for all of them."""

    histories: list[list[Key]] | None = None
    history: list[Key] | None = None
    k: int = Field(DEFAULT_K, ge=1)
    exclude_seen: bool = False
    allow: list[Key] | None = None
    deny: list[Key] | None = None
    users: list[Key | None] | None = None

    def rows(self) -> list[list[str]]:
        """The histories, however many were given."""
        return [self.history] if self.history is not None else self.histories or []

    def field_of(self, row: int) -> str:
        """What the client calls a history."""
        return "history" if self.history is not None else f"histories[{row}]"

    def check(self, limits: Limits) -> None:
        """Raise RequestError for what the types do not say."""
        if (self.history is None) == (self.histories is None):
            raise RequestError(422, "histories", "expected either histories or history.")
        if self.histories is not None:
            at_most("histories", len(self.histories), limits.max_histories, "histories")
            if not self.histories:
                raise RequestError(422, "histories", "expected at least one history, got none.")
        for row, history in enumerate(self.rows()):
            at_most(self.field_of(row), len(history), limits.max_history, "items")
            if not history:
                raise RequestError(422, self.field_of(row), "expected at least one item key, got none.")
        if self.k > limits.max_k:
            raise RequestError(422, "k", f"expected at most {limits.max_k}, got {self.k}.")
        at_most("allow", len(self.allow or ()), limits.max_listed, "item keys")
        at_most("deny", len(self.deny or ()), limits.max_listed, "item keys")
        if self.users is not None and len(self.users) != len(self.rows()):
            message = f"expected one user or null per history, {len(self.rows())} in all, got {len(self.users)}."
            raise RequestError(422, "users", message)


class NewItem(_Body):
    """An item to add, with its `features`, or with the `text` fields that the artifact's encoder reads."""

    item_key: Key = Field(min_length=1)
    title: Text = ""
    category: Text = ""
    features: list[float] | None = None
    text: dict[Key, Text] | None = None


class ItemsBody(_Body):
    """`POST /items`: items to `add`, or item keys to `remove`."""

    add: list[NewItem] | None = None
    remove: list[Key] | None = None

    def check(self, limits: Limits) -> None:
        """Raise RequestError for what the types do not say."""
        if (self.add is None) == (self.remove is None):
            raise RequestError(422, "add", "expected either add or remove; send two requests for both.")
        at_most("add", len(self.add or ()), limits.max_changed, "items")
        at_most("remove", len(self.remove or ()), limits.max_changed, "item keys")
        if not (self.add or self.remove):
            raise RequestError(422, "add" if self.remove is None else "remove", "expected at least one item, got none.")
        for row, item in enumerate(self.add or ()):
            if (item.features is None) == (item.text is None):
                raise RequestError(422, f"add[{row}]", "expected either features or text.")
            if (item.text is None) != (self.add[0].text is None):  # type: ignore[index]
                raise RequestError(422, f"add[{row}]", "expected all items with features or all with text.")


def at_most(field: str, number: int, limit: int, what: str) -> None:
    """RequestError when a list is too long."""
    if number > limit:
        raise RequestError(422, field, f"expected at most {limit:,} {what}, got {number:,}.")


def field_name(location: Iterable[str | int]) -> str:
    """A place in a body as people write it: ("histories", 0, 2) is histories[0][2]."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or BODY
