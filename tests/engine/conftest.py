"""What the engine's tests share."""

import pytest

from twig.engine import wave_cache


@pytest.fixture(autouse=True)
def hold_short_prompts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the short prompts of these tests be held once, as long ones are."""
    monkeypatch.setattr(wave_cache, "HELD_FROM", 1)


@pytest.fixture(autouse=True)
def read_few_prompts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the few prompts of these tests be read in parts, as many are."""
    monkeypatch.setattr(wave_cache, "READ_AT_ONCE", 24)
