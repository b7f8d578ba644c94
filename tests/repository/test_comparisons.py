"""The benchmarks against TRL: its products on Twig's kernel, and the tables of both columns."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twig.engine.kernels import obstacle
from twig.engine.lora import attach

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEEDS = {"seconds_per_step": 1.0, "tokens_per_second": 10.0, "above_loaded_mib": 2.0}
ADAPTER = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "layers": [2, 3]}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("products", "tables", "gpu_tables", "update", "shapes", "common"):
        sys.modules.pop(name, None)


class Factors(TorchDispatchMode):
    """Collects the shapes of the factors of each of torch's own products."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0] in ("mm", "addmm", "addmm_", "bmm"):
            self.shapes.append([tuple(each.shape) for each in args if isinstance(each, torch.Tensor)])
        return func(*args, **(kwargs or {}))


def logps_and_gradient(model, ids):
    """Log-probs by TRL's head and the adapter's gradient, and torch's own products on the way."""
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with Factors() as factors:
        logps = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        gradient = torch.autograd.grad(logps.square().sum(), parameters)
    return logps.detach(), gradient, factors.shapes


@pytest.mark.slow  # imports TRL
@pytest.mark.skipif(obstacle() is not None, reason="no oneDNN here")
def test_all_frozen_products_of_trl_run_on_onednn_with_equal_gradients():
    pytest.importorskip("trl", reason="TRL is in the dev extra")
    from products import trl_products
    from trl.trainer.utils import add_fused_lm_head

    base = tiny.build_model("qwen2-tied", dtype=torch.float32)
    add_fused_lm_head(base)
    model = attach(base, **ADAPTER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, expected, _ = logps_and_gradient(model, ids)
    with trl_products(model, "onednn"):
        logps, gradient, shapes = logps_and_gradient(model, ids)
    torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    # what is left has the rank as a size: the adapter's own
    assert shapes and all(any(ADAPTER["r"] in factor for factor in factors) for factors in shapes)


def ratios(number):
    return {"median": number, "low": number, "high": number}


def an_update(fastest, times):
    """A record of update.json with one GRPO case and one of T-SPMO; `times` are TRL's by column."""
    cases = ("GRPO, layers checkpointed", "T-SPMO, layers checkpointed")
    by_column = {
        column: {case: {"seconds": ratios(time), "mib": ratios(4.0)} for case in cases}
        for column, time in times.items()
    }
    return {
        "medians": {name: {"seconds": 1.0, "mib": 2.0} for name in ("TRL", *cases)},
        "trl_fastest": fastest,
        "trl_smallest": fastest,
        "trl_over_twig": by_column,
        "gradient_gaps": {"GRPO, layers checkpointed": 1e-6},
    }


@pytest.fixture
def records(monkeypatch):
    import tables

    monkeypatch.setattr(tables, "whole_step", lambda record: "7.2")
    fastest = {"same kernel": "TRL, same kernel", "as it comes": "TRL"}
    sides = {"same kernel": "trl-same-kernel", "as it comes": "trl"}
    return {
        "update": an_update(fastest, {"same kernel": 2.5, "as it comes": 50.0}),
        "step": {
            "medians": {side: SPEEDS for side in ("twig", *sides.values())},
            "trl_sides": sides,
            "trl_over_twig_seconds": {"same kernel": ratios(2.8), "as it comes": ratios(3.2)},
        },
        "gpu": {},
    }


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_tables_show_both_columns(records):
    import tables

    update = {row[0]: row[3:] for row in cells(tables.update(records["update"]))}
    assert update["GRPO, layers checkpointed"] == ["**2.50**", "**4.00**", "**50.00**", "**4.00**"]
    assert update["TRL"] == [""] * 4
    step = {row[0]: row[1] for row in cells(tables.step(records["step"]))}
    assert step["TRL / Twig, same kernel"] == "**2.80**" and step["TRL / Twig, as it comes"] == "**3.20**"


def test_the_summary_begins_with_the_same_products(records):
    import tables

    head, _, *body = cells(tables.summary(records))
    assert len(head) == 4
    assert [row[1:] for row in body] == [
        ["2.8", "3.2", "1.0"],
        ["2.5", "50", "4.0"],
        ["2.5", "50", "4.0"],
        ["7.2", "7.2", "-"],
    ]


def test_a_step_whose_products_are_torchs_is_compared_once(records):
    import tables

    record = records["step"]
    record["trl_sides"] = {"same kernel": "trl", "as it comes": "trl"}
    record["trl_over_twig_seconds"] = {column: ratios(3.2) for column in record["trl_sides"]}
    compared = [row[:2] for row in cells(tables.step(record)) if row[0].startswith("TRL /")]
    assert compared == [["TRL / Twig", "**3.20**"]]


@pytest.mark.parametrize(
    ("kernels", "columns", "trl"),
    [
        ("onednn", ["same kernel", "as it comes"], 4),
        ("onednn", ["same kernel"], 2),
        ("torch", ["same kernel", "as it comes"], 2),
    ],
)
def test_trl_is_measured_only_as_the_columns_need_it(kernels, columns, trl):
    from types import SimpleNamespace

    import update

    options = SimpleNamespace(columns=columns, cases=list(update.CASES), shape="tiny", length=200)
    sides = update.sides_of(options, kernels)
    assert sum(name.startswith("TRL") for name in sides) == trl
    assert (update.REFERENCE in sides) == (kernels == "onednn")
    for name, words in sides.items():
        expected = "torch" if name in (update.REFERENCE, *update.TRL) else kernels
        assert words[words.index("--kernels") + 1] == expected and words.count("--kernels") == 1
