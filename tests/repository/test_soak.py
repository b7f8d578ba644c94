"""The soak script: it sees a leak and a slowdown, and Twig has neither over some hundred steps."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growth_and_slowdown_are_seen_behind_the_first_steps(soak):
    steps = 1000
    warm = [0.5] * 100  # the first tenth, when caches fill
    flat = [*warm, *[1.0] * 900]
    assert soak.verdict(flat, flat) == (0.0, 0.0)
    leak = [1.0 + step / steps for step in range(steps)]
    growth, slowdown = soak.verdict(leak, flat)
    assert growth == pytest.approx(1.999 / 1.399 - 1) and slowdown == 0
    slower = [*[1.0] * 700, *[1.1] * 300]
    assert soak.verdict(flat, slower)[1] == pytest.approx(0.1)
    spike = [*[1.0] * 900, 50.0, *[1.0] * 99]
    assert soak.verdict(flat, spike)[1] == 0, "one slow step is none"


@pytest.mark.slow
def test_memory_is_flat_over_some_hundred_steps(soak, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak.py", "--steps", "400"])
    monkeypatch.setattr(soak, "MOST_SLOWDOWN", 1.0)  # a machine with other work says little about so few
    assert soak.main() == 0
    assert "memory" in capsys.readouterr().out
