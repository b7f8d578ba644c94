"""Sets up all tests: offline, deterministic, one thread; TWIG_TYPECHECK=1 adds run-time type checks."""

import gc
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

# NOTE: before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Deterministic matrix products on CUDA need this before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import jaxtyping
import pytest
from filelock import FileLock

# NOTE: before anything imports twig. Checks every function and dataclass of the package against its
# annotations, array shapes included. Tests take twice as long with it: only one pass of .ci/run sets it.
if os.environ.get("TWIG_TYPECHECK") == "1":
    jaxtyping.install_import_hook("twig", "typecheck.checked")

# Examples of each property: few by default, many with `--hypothesis-profile thorough`, as in .ci/run.
hypothesis.settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.load_profile("quick")


gc.disable()  # until the tests are collected: nothing of that is garbage


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all but their own tests: the others compare with what a CPU computes."""
    if "gpu" not in (config.option.markexpr or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Leaves what was imported and collected out of every later collection of garbage."""
    gc.enable()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _deterministic_torch() -> None:
    """One thread and deterministic algorithms, so that no result depends on the number of cores."""
    import torch

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _skip_gpu_without_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None or "TWIG_TEST_DEVICE" in os.environ:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns the folder of that name, made by the function once for all workers of the session.

    Tests read it or copy it, and never write into it.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def base(shared) -> Path:
    """The folder of a tiny random model; read only."""
    from saved import save_model

    return shared("base", save_model)


@pytest.fixture
def settings(base) -> Callable:
    """Settings of a small run on that model, with overrides on top."""
    from small_runs import small_settings

    return partial(small_settings, base)


@pytest.fixture
def run(settings, tmp_path: Path) -> Callable:
    """Trains a small run in the folder of that name; further words are overrides."""
    from small_runs import train_small

    def train(name: str, *overrides: str, **options):
        return train_small(settings(*overrides), tmp_path / name, **options)

    return train


@pytest.fixture
def whole(settings, shared) -> Callable[..., Path]:
    """The folder of a small run with these overrides that nothing happened to, shared by all tests."""
    from small_runs import train_small

    def trained(*overrides: str) -> Path:
        return shared("-".join(["run", *overrides]), lambda path: train_small(settings(*overrides), path))

    return trained


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data sets that tests read (SVAMP, GSM8K, a tokenizer), named by TWIG_TEST_DATA.

    Without it these tests are skipped; where CI=true they fail, so that nobody skips them unnoticed.
    """
    value = os.environ.get("TWIG_TEST_DATA")
    if value and Path(value).is_dir():
        return Path(value).resolve()
    reason = f"TWIG_TEST_DATA={value!r} is not a folder" if value else "TWIG_TEST_DATA is not set"
    reason += "; set it to the folder that holds svamp/, gsm8k/ and qwen2_tokenizer/"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def qwen2_tokenizer(test_data: Path):
    """The real Qwen2 tokenizer, which takes a second to load; change only a copy of it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(test_data / "qwen2_tokenizer")
