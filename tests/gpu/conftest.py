"""The engine's tests on a CUDA device, in float32 and in bfloat16.

    python -m pytest tests/gpu -m gpu                 # the tier, about a minute on 8 workers
    python -m pytest tests/gpu -m "gpu or slow"       # each attention and cut of every family, twice
    TWIG_TEST_DEVICE=cpu python -m pytest tests/gpu -m gpu

Most modules here import the tests of the module that they are named for, so nothing is written twice;
`tests/numerics.py` has the bounds. Without a GPU they are skipped, or with TWIG_TEST_DEVICE=cpu run on the
CPU in the same precisions, all but what needs CUDA itself. TWIG_TEST_DEVICE=there runs them on a made-up
device that refuses to mix with the CPU (`tests/there.py`). The tier has all that a CPU runs by default, but
in bfloat16 one attention of each family.
"""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Where the tests are that are run again here.
sys.path += [str(HERE.parent / package) for package in ("engine", "core", "training")]


def pytest_generate_tests(metafunc):
    """Each test in the precisions of its module; those named for float32 in that one only."""
    names = getattr(metafunc.module, "PRECISIONS", ["float32", "bfloat16"])
    if "float32" in metafunc.function.__name__:
        names = ["float32"]
    metafunc.parametrize("precision", names, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Leaves out what is slow unless the marker expression asks for it, and all of it unless it asks for
    `gpu`."""
    asked = (config.option.markexpr or "").replace("not gpu", "").replace("not slow", "")
    kept, left = [], []
    for item in items:
        if HERE in item.path.parents:
            # shown, and no error: a device's libraries warn of what no test here can change
            item.add_marker(pytest.mark.filterwarnings("default"))
        out = HERE in item.path.parents and (
            "gpu" not in asked or ("slow" not in asked and (item.get_closest_marker("slow") or _again(item)))
        )
        (left if out else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _again(item):
    """Whether the test is one in bfloat16 that another attention stands for."""
    import tiny

    values = item.callspec.params if hasattr(item, "callspec") else {}
    if values.get("precision") != "bfloat16":
        return False
    return values.get("attention") == "eager" and tiny.has_sdpa(values["family"])


@pytest.fixture(autouse=True)
def precision(request):
    """Inside, models are built on the device, in the precision that the test is run in."""
    import numerics
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has two interfaces to this, and warns of the other one
        torch.set_float32_matmul_precision("highest")  # no TF32
    # As users run it: deterministic algorithms lack a running sum on CUDA.
    torch.use_deterministic_algorithms(False)
    name, around = os.environ.get("TWIG_TEST_DEVICE", "cuda"), nullcontext()
    if name == "there":
        import there

        if there.cannot_run(request.node.name):
            pytest.skip("tensors of a made-up device cannot do this")
        there.register()
        around = there.Device()
    with around, numerics.use(numerics.ON_A_DEVICE[request.param], name):
        yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def cuda():
    """For what only CUDA does."""
    import numerics

    if numerics.place().type != "cuda":
        pytest.skip("needs CUDA itself, and TWIG_TEST_DEVICE is another device")
