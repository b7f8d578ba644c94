"""Finds the adapter of a run: the one it ended with, or that of the newest checkpoint if it stopped.

A checkpoint holds an adapter's weights under other names, without the file that describes them; both are
written to a temporary folder in PEFT's format.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from twig.common.errors import UserError
from twig.config.load import Settings, load
from twig.runs import checkpoint
from twig.runs.reader import ADAPTER, BEST, CHECKPOINTS, is_finished, passed_parts, read_json, read_summary


@dataclass(frozen=True)
class RunAdapter:
    """An adapter of a run, in PEFT's format in `folder`, which may be temporary.

    `place` is where it is from: a folder of the run. `state` is that of the checkpoint if it is from one.
    """

    folder: Path
    place: Path
    state: Mapping[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None if it is from none."""
        return None if self.state is None else self.state["standing"]["step"]


@contextmanager
def adapter_of(run: Path, best: bool = False) -> Iterator[RunAdapter]:
    """Yields the newest adapter of a run, or that of its best evaluation.

    Raises UserError if it has none.
    """
    newest = None if best else checkpoint.newest_valid(run / CHECKPOINTS).path
    if newest is not None and not _is_done(run, newest):
        with tempfile.TemporaryDirectory(prefix="twig-") as draft:
            state = _write(newest, load(str(run)), run, Path(draft))
            yield RunAdapter(Path(draft), newest, state)
        return
    for name in (BEST,) if best else (ADAPTER, BEST):
        if (run / name / CONFIG_NAME).is_file():
            yield RunAdapter(run / name, run / name)
            return
    problem = "no evaluation since training began" if best else "no adapter and no checkpoint yet"
    raise UserError(str(run), f"it has {problem}", f"Run twig train {run} --resume")


def _is_done(run: Path, newest: Path) -> bool:
    """Returns whether a run finished, and was not resumed since for more steps."""
    summary = read_summary(run)
    step = int(newest.name.removeprefix("step-"))
    return summary is not None and is_finished(summary) and summary["steps"] >= step


def _write(path: Path, settings: Settings, run: Path, draft: Path) -> dict[str, Any]:
    """Writes the adapter of the checkpoint at `path` to `draft`; returns the checkpoint's state."""
    tensors, state = checkpoint.load(path)
    try:
        weights = {re.sub(r"(lora_\w+)\.default\b", r"\1", key): v for key, v in tensors["adapter"].items()}
        _ = state["standing"]["step"]
    except (KeyError, TypeError) as error:
        problem = f"not a checkpoint of a run (it lacks {error})"
        raise UserError(str(path), problem, "Remove it to use the one before") from error
    save_file(weights, draft / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config = _config(weights, settings, run)
    (draft / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return state


def _config(weights: Mapping[str, Tensor], settings: Settings, run: Path) -> dict[str, Any]:
    """Returns the content of adapter_config.json: as the run wrote it once, else from its settings."""
    for name in (BEST, ADAPTER):
        config = read_json(run / name / CONFIG_NAME)
        if config is not None:
            return config
    passed = "model" in passed_parts(run)
    if settings.model.adapter is not None:
        config = cast(Any, PeftConfig.from_pretrained(settings.model.adapter))
    else:
        layers = {int(match[1]) for key in weights if (match := re.search(r"\.(\d+)\.", key))}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora.r,
            lora_alpha=cast(int, settings.lora.alpha),
            target_modules=list(settings.lora.target_modules),
            layers_to_transform=sorted(layers),
        )
    config.base_model_name_or_path = None if passed else settings.model.name
    values = config.to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
