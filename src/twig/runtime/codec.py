"""Turns values into bytes that processes send each other: JSON and safetensors, no pickle.

The bytes can only become plain values, numpy arrays and the records that the receiver lists.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from pydantic import BaseModel
from safetensors.numpy import load, save

_TEXT = "text"  # the name of the JSON among the arrays, whose names are numbers


def encode(value: Any, records: Sequence[type] = ()) -> bytes:
    """Returns a value as bytes: None, bool, int, float, str, bytes, array, list, tuple, dict, or a record.

    `records` lists the dataclasses and pydantic models that may occur in the value. Raises TypeError for
    anything else.

    >>> decode(encode({"a": (1, [0.5, None]), 2: np.array([True])}))
    {'a': (1, [0.5, None]), 2: array([ True])}
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(_plain(value, records, arrays))
    arrays[_TEXT] = np.frombuffer(text.encode(), np.uint8)
    return save(arrays)


def decode(data: bytes, records: Sequence[type] = ()) -> Any:
    """Returns the value that `encode` was given, with the same `records`."""
    arrays = load(data)
    return _restored(json.loads(arrays[_TEXT].tobytes()), records, arrays)


def _plain(value: Any, records: Sequence[type], arrays: dict[str, np.ndarray]) -> Any:
    """Returns the value in JSON's kinds, and adds its arrays to `arrays`.

    Everything but lists and scalars becomes a dict whose one key says what it was.
    """

    def put(kind: str, array: np.ndarray) -> dict[str, str]:
        name = str(len(arrays))
        arrays[name] = array
        return {kind: name}

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, records, arrays) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[_plain(part, records, arrays) for part in pair] for pair in value.items()]}
    if type(value) in records:
        if isinstance(value, BaseModel):
            values = value.model_dump()
        else:
            values = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"record": [records.index(type(value)), _plain(values, records, arrays)]}
    if isinstance(value, bytes):
        return put("bytes", np.frombuffer(value, np.uint8))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return put("array", np.asarray(value, order="C"))
    raise TypeError(f"{type(value).__name__} is not sent to other processes; send plain values or arrays")


def _restored(value: Any, records: Sequence[type], arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_restored(item, records, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content]
    if kind == "bytes":
        return arrays[content].tobytes()
    if kind == "tuple":
        return tuple(_restored(content, records, arrays))
    if kind == "dict":
        return dict(_restored(content, records, arrays))
    assert kind == "record", f"unknown kind {kind!r}"
    record, values = records[content[0]], _restored(content[1], records, arrays)
    return record.model_validate(values) if issubclass(record, BaseModel) else record(**values)
