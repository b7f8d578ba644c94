"""Rows as a run's files hold them: JSON's kinds of value, texts without secrets, a table of completions."""

import math
from typing import Any

from twig.escape import storable
from twig.redact import without_secrets

_COLUMNS = {
    "step": "int64",
    "prompt_index": "int64",
    "completion_index": "int64",
    "prompt": "string",
    "completion": "string",
    "prefix_length": "int64",
    "token_ids": "list<int64>",
    "tokens": "list<string>",
    "logps": "list<double>",
    "entropies": "list<double>",
    "weights": "list<double>",
    "finished": "bool",
    "reward": "double",
    "rewards": "string",
    "right": "bool",
}


def plain(value: Any) -> Any:
    """The value in JSON's kinds: arrays, numpy and torch numbers become lists and numbers; NaN and infinity,
    None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def public_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without secrets, in texts that UTF-8 can hold. Where a completion had a secret in it, its
    tokens spell it too: they are blanked, and their ids are 0."""
    texts = [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]
    found = []
    for row, before, after in zip(rows, texts, without_secrets(texts), strict=True):
        row = row | {key: storable(text) for key, text in after.items()}
        if "tokens" in row:
            row["tokens"] = [storable(token) for token in row["tokens"]]
        if before.get("completion") != after.get("completion"):
            for key, blank in (("tokens", ""), ("token_ids", 0)):
                row[key] = [blank] * len(row.get(key, ()))
        found.append(row)
    return found


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file of completions, one row each; a column that a row lacks is empty there."""
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
