"""Odd settings and configs are refused or their numbers are right: seeds of `scripts/scan_odd_inputs.py`."""

import odd_inputs
import pytest

FEW, MANY = range(40), range(40, 400)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_odd_settings_are_refused_or_planned(seeds):
    outcomes = [odd_inputs.check_settings(seed) for seed in seeds]
    assert len(set(outcomes)) > 1, "some of each kind"


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_odd_configs_are_refused_or_counted_right(seeds, tmp_path):
    outcomes = [odd_inputs.check_config(seed, tmp_path) for seed in seeds]
    assert {"config refused", "config planned and counted"} <= set(outcomes), "some of each kind"
