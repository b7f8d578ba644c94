"""The completions of a step as a file: columns, texts of single tokens, no secrets, Parquet.

Knows the columns of `completions/step-N.parquet` and how a tokenizer decodes; nothing of training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.redact import without_secrets
from twig.common.text import storable

_COLUMNS = {
    "step": "int64",
    "prompt_index": "int64",
    "completion_index": "int64",
    "prompt": "string",
    "answer": "string",
    "completion": "string",
    "prefix_length": "int64",
    "token_ids": "list<int64>",
    "tokens": "list<string>",
    "logps": "list<double>",
    "entropies": "list<double>",
    "weights": "list<double>",
    "plus": "list<double>",
    "minus": "list<double>",
    "divisor": "double",
    "finished": "bool",
    "reward": "double",
    "rewards": "string",
    "extra": "string",
    "right": "bool",
}


def public_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows without secrets, in texts that UTF-8 can hold.

    If a completion had a secret in it, its tokens spell it too: they are blanked, and their ids are 0.
    """
    texts = [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]
    public = []
    for row, before, after in zip(rows, texts, without_secrets(texts), strict=True):
        row = row | {key: storable(text) for key, text in after.items()}
        if "tokens" in row:
            row["tokens"] = [storable(token) for token in row["tokens"]]
        if before.get("completion") != after.get("completion"):
            for key, blank in (("tokens", ""), ("token_ids", 0)):
                row[key] = [blank] * len(row.get(key, ()))
        public.append(row)
    return public


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Returns a Parquet file of completions, one row each; a column that a row lacks is empty there."""
    import pyarrow
    from pyarrow import parquet

    names = {
        "int64": pyarrow.int64(),
        "string": pyarrow.string(),
        "bool": pyarrow.bool_(),
        "double": pyarrow.float64(),
        "list<int64>": pyarrow.list_(pyarrow.int64()),
        "list<string>": pyarrow.list_(pyarrow.string()),
        "list<double>": pyarrow.list_(pyarrow.float64()),
    }
    schema = pyarrow.schema([(column, names[kind]) for column, kind in _COLUMNS.items()])
    assert all(set(row) <= set(_COLUMNS) for row in rows), "a column without a type; add it to _COLUMNS"
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


# Without these a row cannot be shown; older files lack others.
_NEEDED = ("prompt_index", "completion_index", "prompt", "completion", "reward", "right")


def read_completions(path: Path) -> list[list[dict[str, Any]]]:
    """Returns the rows of a file of completions by problem, in their order; a missing column is None.

    Raises UserError for a file that is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError):
        rows = None
    if rows is None or any(key not in row for row in rows for key in _NEEDED):
        raise UserError(str(path), "damaged, not a file of completions", "Name another step, or remove it")
    problems: list[list[dict[str, Any]]] = []
    for row in rows:
        if row["completion_index"] == 0 or not problems:
            problems.append([])
        problems[-1].append(dict.fromkeys(_COLUMNS) | row)
    return problems


_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character yet


def texts_after(
    prompt_ids: Sequence[int] | np.ndarray, decode: Callable[[list[int]], str]
) -> Callable[[Sequence[int]], list[str]]:
    """Returns a function from the ids of a completion of one prompt to the text that each token adds.

    Laid end to end the texts are the decoded completion. A token that ends inside a character adds "", the
    one that completes the character adds it whole.

    >>> texts_after([1], lambda ids: "".join("abcd"[i] for i in ids))([2, 3])
    ['c', 'd']
    """
    # Decoding is not a sum over tokens: a first token may lose its space, and only together do bytes make a
    # character. So every token is decoded behind another one. What each adds there is nearly always what it
    # adds here, and is kept; if the sum is not the text, the text is decoded token by token.
    before = [int(prompt_ids[-1])]
    start, cache = len(decode(before)), {}

    def alone(token: int) -> str:
        if token not in cache:
            cache[token] = decode([*before, token])[start:]
        return cache[token]

    def texts(ids: Sequence[int]) -> list[str]:
        each = [alone(token) for token in ids]
        if "".join(each) == decode([*before, *ids])[start:] and _INCOMPLETE not in "".join(each):
            return each
        return _one_by_one(before, ids, decode)

    return texts


def _one_by_one(before: list[int], ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    texts, shown = [], decode(before)
    for end in range(1, len(ids) + 1):
        text = decode([*before, *ids[:end]])
        if text.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")  # the character is not complete yet
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts
