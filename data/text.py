"""Item texts: what a text encoder reads, rendered from the item table by a template.

A template is a tuple of sentences with field names in braces, `("{title}.", "Brand: {brand}.")`. A sentence one of
whose fields is null or blank is left out, so that no text says "Brand: None.".
"""

from string import Formatter
from typing import TYPE_CHECKING

from data.schemas import InputError

if TYPE_CHECKING:
    import polars as pl

NO_TEXT = "No description is available for this item."
"""Text of an item for which no sentence of the template applies."""

_TEXT = "rendered text"


def render_texts(items: "pl.DataFrame", template: tuple[str, ...]) -> list[str]:
    """One text per row of `items`, in row order: the sentences that apply, joined by spaces.

    Raises:
        InputError: if the template is empty or malformed, or names a column that is missing or holds nested values.
    """
    import polars as pl

    if isinstance(template, str) or not template:
        raise InputError(f"a text template is a tuple of sentences such as ('Brand: {{brand}}.',), got {template!r}.")
    sentences = [_sentence(items, sentence) for sentence in template]
    text = pl.concat_str(sentences, separator=" ", ignore_nulls=True)
    text = pl.when(text == "").then(pl.lit(NO_TEXT)).otherwise(text)
    return items.with_columns(text.alias(_TEXT))[_TEXT].to_list()


def _sentence(items: "pl.DataFrame", sentence: str) -> "pl.Expr":
    """A string column: the sentence with its fields filled in, null where one of them is null or blank."""
    import polars as pl

    try:
        pieces = list(Formatter().parse(sentence))
    except ValueError as error:
        raise InputError(
            f"text template sentence {sentence!r} is malformed: {error}. Write a literal brace as '{{{{' or '}}}}'."
        ) from error
    parts: list[pl.Expr] = []
    for literal, field, format_spec, conversion in pieces:
        if literal:
            parts.append(pl.lit(literal))
        if field is None:
            continue
        if format_spec or conversion:
            raise InputError(
                f"text template sentence {sentence!r}: write '{{{field}}}' alone, formats are not supported."
            )
        parts.append(_field(items, field, sentence))
    return pl.concat_str(parts) if parts else pl.lit(None, dtype=pl.String)


def _field(items: "pl.DataFrame", field: str, sentence: str) -> "pl.Expr":
    """A column as stripped strings, null where blank."""
    import polars as pl

    if field not in items.columns:
        raise InputError(
            f"text template sentence {sentence!r} uses the unknown field {field!r}; "
            f"columns of the item table: {', '.join(items.columns)}."
        )
    if items.schema[field].is_nested():
        raise InputError(
            f"text template sentence {sentence!r}: column {field!r} holds {items.schema[field]} values; "
            "turn it into a text column first."
        )
    text = pl.col(field).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)
