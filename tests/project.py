"""Where the project lies, and its modules."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "twig"


def _module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


# Dotted name below twig -> file; a package goes by its own name.
MODULES = {_module_name(path): path for path in sorted(SOURCE.rglob("*.py")) if "assets" not in path.parts}

# These may import torch, transformers or peft as soon as they are imported; all others work without them.
WITH_TORCH = {
    "__main__",
    "core.objective",
    "runtime.rng_state",
    "runs.adapters",
    "runs.checkpoint",
    "runs.resume",
    "evaluation.evaluate",
    "evaluation.prepare",
    "evaluation.stream",
    "training.batch",
    "training.estimate",
    "training.metrics",
    "training.session",
    "training.train",
    "training.trainer",
    "export.export",
    "export.gguf",
    *(name for name in MODULES if name.startswith("trl.")),
    *(name for name in MODULES if name.startswith("engine.") and name != "engine.pack"),
}
