"""What processes send each other comes back as it was, and nothing but what the receiver expects."""

import json
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from safetensors.numpy import load, save

from twig.config.load import Settings
from twig.config.load import load as load_settings
from twig.config.sizes import DEFAULT_SIZES, Sizes
from twig.core.types import Completion
from twig.runtime.codec import decode, encode


@dataclass(frozen=True)
class Part:
    completions: list[Completion]
    right: np.ndarray


class Harmful:
    """An object that would run code if it were unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def same(one, other):
    """Whether two values are equal in type and content, arrays in dtype and shape too."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and np.array_equal(one, other, equal_nan=True)
        )
    return type(one) is type(other) and (one == other or (one != one and other != other))


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, (2.5, "x"), {}], 3: True, "dict": {"tuple": [1]}},
        [0.1 + 0.2, -0.0, math.inf, -math.inf, math.nan, 2**80],
        "half a pair: \ud800\n\0",
        b"\x80\0bytes",
        [np.zeros((0, 3)), np.array(3.5), np.arange(6, dtype=np.int32).reshape(2, 3).T, np.array([True])],
        np.array([np.nan, 1e-310], np.float64),
        np.arange(4, dtype=np.float16)[::2],
        np.array([1, 2], ">i4"),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value):
    restored = decode(encode(value))
    if isinstance(value, np.ndarray):
        value = value.astype(value.dtype.newbyteorder("="))
    assert same(value, restored), restored


def test_records_and_settings_come_back_if_they_are_listed():
    ids = np.array([3, 1])
    part = Part([Completion(ids, np.array([-0.5, -1.0]), np.zeros(2), True, "3")], np.array([True]))
    restored = decode(encode(part, (Part, Completion)), (Part, Completion))
    assert type(restored) is Part and type(restored.completions[0]) is Completion
    assert same(vars(restored.completions[0]), vars(part.completions[0]))
    settings = load_settings("quickstart", ["train.max_steps=3"])
    assert decode(encode((settings, DEFAULT_SIZES), (Settings, Sizes)), (Settings, Sizes)) == (
        settings,
        DEFAULT_SIZES,
    )
    with pytest.raises(TypeError, match="Completion"):
        encode(part, (Part,))


@pytest.mark.parametrize(
    "value",
    [Harmful(), {1, 2}, 1j, np.float32(1), np.array([Harmful()]), np.array(["text"]), len],
    ids=lambda value: type(value).__name__,
)
def test_what_is_neither_plain_nor_an_array_is_refused(value):
    with pytest.raises(TypeError, match="not sent to other processes"):
        encode({"nested": [value]})


@pytest.mark.parametrize("content", [{"record": [0, {"dict": []}]}, {"call": "os.system"}, {"array": "7"}])
def test_what_the_receiver_does_not_expect_is_refused(content):
    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    with pytest.raises((LookupError, AssertionError)):
        decode(save({"text": text}))


def test_nothing_is_unpickled():
    with pytest.raises(Exception, match="(?i)header|deserializ"):
        decode(pickle.dumps(Harmful()))
    assert load(encode([1, b"x"])).keys() == {"text", "0"}, "plain data of the format safetensors"
