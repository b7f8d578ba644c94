"""Compares the training runs of two versions of the source, byte for byte.

    python scripts/compare_checkouts.py HEAD .          # each a folder that holds src/twig, or a commit

Each case is the quickstart with some settings. Both versions run it in separate processes on one thread.
Compared are the adapter's files, the completions (ids, log-probs, entropies, weights, texts), the rows of
metrics except times and memory, the evaluations problem by problem, and the optimizer's state in the last
checkpoint. Prints a line per case; the exit status is 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "grpo with kl, two iterations": [
        "algorithm.name=grpo",
        "algorithm.beta=0.05",
        "algorithm.num_iterations=2",
    ],
    "s-grpo": ["algorithm.name=s-grpo", "algorithm.alpha=8", "algorithm.k=24"],
    "s-grpo unbiased": [
        "algorithm.name=s-grpo",
        "algorithm.alpha=8",
        "algorithm.k=24",
        "algorithm.unbiased=true",
    ],
    "t-spmo": [],
    "t-spmo with replay": ["algorithm.replay.probability=0.5"],
}
# Settings of every case: few problems to evaluate, completions every few steps, a checkpoint at the end.
COMMON = [
    "eval.limit=100",
    "eval.steps=10",
    "log.completions_steps=5",
    "log.progress=quiet",
    "train.save_steps=10",
]
ADAPTER = "adapter/adapter_model.safetensors"
BYTES = ("adapter/adapter_config.json",)
MACHINE = ("time/", "memory/", "seconds", "peak_memory_bytes", "predicted_peak_bytes")  # these vary


def main(argv: list[str] | None = None) -> int:
    """Runs the cases with both versions and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", help="a folder that holds src/twig, or a commit")
    parser.add_argument("after", help="a folder that holds src/twig, or a commit")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    options = parser.parse_args(argv)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            source(version, Path(folder) / f"source-{n}")
            for n, version in enumerate((options.before, options.after))
        ]
        for name in options.case or CASES:
            overrides = [*COMMON, f"train.max_steps={options.steps}", *CASES[name]]
            runs = [run(src, Path(folder) / f"{name}-{n}", overrides) for n, src in enumerate(sources)]
            differing = differences(*map(contents, runs))
            wrong += bool(differing)
            print(f"{name}: {'; '.join(differing) or 'identical, ' + fingerprint(runs[0])}", flush=True)
    return 1 if wrong else 0


def source(version: str, folder: Path) -> Path:
    """Returns the src folder of a checkout; unpacks a commit into `folder` first."""
    if (Path(version) / "src" / "twig").is_dir():
        return Path(version).resolve() / "src"
    done = subprocess.run(["git", "archive", version, "src"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(done.stdout)) as file:
        file.extractall(folder, filter="data")
    return folder / "src"


def run(src: Path, folder: Path, overrides: list[str]) -> Path:
    """Trains with the source in `src` on one thread, and returns the run's folder."""
    environ = os.environ | {"PYTHONPATH": str(src), "HF_HUB_OFFLINE": "1"}
    environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    code = f"import twig; assert twig.__file__.startswith({str(src)!r}), twig.__file__"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    command = [sys.executable, "-m", "twig", "train", "quickstart", *overrides, "--output", str(folder)]
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL, cwd=folder.parent)
    return folder


def tensors(path: Path) -> dict[str, bytes]:
    """Returns the tensors of a safetensors file by name."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}


def contents(folder: Path) -> dict[str, Any]:
    """Returns what is compared, by name."""
    from pyarrow import parquet

    values: dict[str, Any] = {
        name: (folder / name).read_bytes() for name in BYTES if (folder / name).exists()
    }
    for path in sorted((folder / "completions").glob("*.parquet")):
        for column, rows in parquet.read_table(path).to_pydict().items():
            values[f"completions/{path.name} {column}"] = repr(rows)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        values |= {f"step {row['step']} {k}": v for k, v in row.items() if not k.startswith(MACHINE)}
    values["evaluations.jsonl"] = (folder / "evaluations.jsonl").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    values |= {f"summary.json {key}": value for key, value in summary.items() if not key.startswith(MACHINE)}
    newest = max(
        (folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))
    )
    states = [newest / "adapter.safetensors", newest / "optimizer.safetensors"]
    for path in [folder / ADAPTER, folder / "adapter-best" / Path(ADAPTER).name, *states]:
        if path.exists():
            values |= {f"{path.relative_to(folder)} {key}": value for key, value in tensors(path).items()}
    assert sum(name.startswith("completions/") for name in values) > 10, "completions were written"
    return values


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the names of what differs, at most five.

    A column of the completions, or a metric, that only the second state writes is an addition, and no
    difference.
    """
    names = [
        name
        for name in (before | after)
        if (name not in before and not name.startswith(("completions/", "step ")))
        or (name in before and (name not in after or before[name] != after[name]))
    ]
    more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
    return [*names[:5], *more]


def fingerprint(folder: Path) -> str:
    """Returns the beginning of the adapter's checksum."""
    digest = hashlib.sha256(b"".join(value for _, value in sorted(tensors(folder / ADAPTER).items())))
    return f"adapter {digest.hexdigest()[:12]}"


if __name__ == "__main__":
    sys.exit(main())
