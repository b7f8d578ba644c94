"""What every test shares: offline, deterministic, with shapes and types of `twig` checked at run time."""

import os
from pathlib import Path

# NOTE: before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Deterministic matrix products on CUDA need this before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import jaxtyping
import pytest

# NOTE: before anything imports twig. Every function and dataclass of the package is then checked against its
# annotations.
jaxtyping.install_import_hook("twig", "typecheck.checked")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all but their own tests: the others compare with what a CPU computes."""
    if "gpu" not in (config.option.markexpr or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
