"""Opens a run: in a new folder, or at the newest valid checkpoint of one that stopped.

A run resumes with the settings, code, data and weights that its checkpoint says (`contents.py`).
A setting may differ between a run and its continuation if it does not affect results (`config.load.affects`).
Keeps what `auto` stood for. Knows nothing of training.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings, affects
from twig.config.messages import write
from twig.config.schema import Model
from twig.config.sizes import as_begun
from twig.core.algorithms.registry import Unloaded
from twig.runs import checkpoint
from twig.runs.contents import code_checksums, contents_of, may_be_written_as, refuse_changed
from twig.runs.folder import NoLog, RunLog
from twig.runs.reader import ADAPTER, BEST, CHECKPOINTS, damage, is_finished
from twig.runtime.processes import Processes

# With these schedules the learning rate does not depend on where the run ends.
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
# `auto` in one of these is decided when the model is loaded.
_DECIDED = ("device", "dtype", "attn_implementation")


@dataclass(frozen=True)
class Start:
    """A run about to begin or resume.

    `checkpoint` is the one to resume from (None: start from the beginning); `changed` are the settings that
    changed since the run began, `contents` the checksums of what it began with.
    """

    log: RunLog | NoLog
    checkpoint: Path | None = None
    changed: tuple[str, ...] = ()
    contents: Mapping[str, str] = field(default_factory=dict)


def open_run(settings: Settings, output: str | Path | None, resume: bool, progress: Progress) -> Start:
    """Opens the run's folder for writing and finds where to start; reports what changed.

    Raises UserError if the folder holds something else, another process has it, or a setting changed that
    affects results.
    """
    if not resume:
        return Start(RunLog.create(output, settings))
    if output is None:
        raise UserError(
            "--resume", "it needs the folder of the run", "Add --output runs/NAME, the run to resume"
        )
    log = RunLog.open(output)
    try:
        return _resume(log, settings, progress)
    except BaseException:
        log.close()
        raise


def _resume(log: RunLog, settings: Settings, progress: Progress) -> Start:
    newest, damaged = checkpoint.newest_valid(log.folder / CHECKPOINTS)
    state = {} if newest is None else checkpoint.load_state(newest)
    contents, code = contents_of(state, log.environment()), code_checksums(settings)
    refuse_changed(contents, code, settings)
    changed = changes(log.settings, settings, state.get("decided", {}), contents)
    for text in [*(f"{path} is damaged and not used" for path in damaged), *_damage(log, newest)]:
        log.warn(text)
        progress.message(f"warning: {text}")
    if newest is None:
        if is_finished(log.summary()):
            raise UserError(
                "--resume",
                f"{log.folder} is finished and has no checkpoint to resume from",
                "Use another --output without --resume",
            )
        lack = "valid checkpoint" if damaged else "checkpoint yet"
        progress.message(f"{log.folder} has no {lack}: the run starts from the beginning")
    for key, (old, new) in changed.items():
        line = f"{key}: {new} from here on, it was {old}"
        log.warn(line)
        progress.message(line)
    return Start(log, newest, tuple(changed), contents)


def _damage(log: RunLog, newest: Path | None) -> list[str]:
    """Returns a line for each part of the run that was written up to its newest checkpoint and is lost."""
    if newest is None:
        return []
    standing = checkpoint.load_state(newest).get("standing", {})
    adapters = [ADAPTER] if is_finished(log.summary()) else []
    adapters += [BEST] if any(each["step"] > 0 for each in standing.get("evaluations", [])) else []
    return damage(log.folder, standing.get("step", 0), adapters)


def changes(
    before: Settings, now: Settings, decided: dict[str, str], contents: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Returns the settings that differ and may: key to old and new value.

    `decided` says what `auto` stood for when the run began; setting that explicitly is no change. What
    names one of `contents`, whose checksums are compared, may be written differently. Raises UserError for
    any other setting that affects results, and for one that affects the length if the learning rate depends
    on it.
    """
    old, new = before.flat(), as_begun(now, before).flat()
    # The class was not loaded when the folder was made: its defaults are no change.
    fresh = set(new) - set(old) if isinstance(before.algorithm, Unloaded) else set()
    differing = {
        key: (old.get(key), new.get(key))
        for key in {**old, **new}
        if key not in fresh
        and new.get(key) != old.get(key)
        and not (old.get(key) == "auto" and new.get(key) == decided.get(key))
    }
    for key, (was, value) in differing.items():
        before_that = decided.get(key, was)
        began = f"{value!r} here, but the run began with {before_that!r}"
        fix = f"Set {key}={write(before_that)} or use another --output"
        if affects(key) == "results" and not may_be_written_as(key, was, value, contents):
            raise UserError(key, began, fix)
        schedule = now.train.lr_scheduler_type
        if affects(key) == "length" and schedule not in _SCHEDULES_WITHOUT_END:
            reason = f"{began}, and with train.lr_scheduler_type={schedule} every learning rate depends on it"
            raise UserError(key, reason, fix)
    return differing


def decided_model(model: Model, start: Start) -> Model:
    """Returns the settings of the model with what its `auto`s stood for when the run began."""
    if start.checkpoint is None:
        return model
    decided = checkpoint.load_state(start.checkpoint).get("decided", {})
    values = {name: decided.get(f"model.{name}") for name in _DECIDED}
    return model.model_copy(
        update={name: v for name, v in values.items() if v is not None and getattr(model, name) == "auto"}
    )


def decisions(model: Any, settings: Settings) -> dict[str, str]:
    """Returns what `auto` stands for in a loaded model, by setting, for `decided_model`."""
    values = (model.device.type, str(model.dtype).removeprefix("torch."), model.config._attn_implementation)
    of_model = {f"model.{name}": value for name, value in zip(_DECIDED, values, strict=True)}
    return of_model | {"model.kernels": settings.model.kernels}


def decided_by_main(settings: Settings, start: Start, processes: Processes) -> Any:
    """Returns the model's settings as process 0 decided them; each process keeps its own device."""
    decided = processes.from_main(decided_model(settings.model, start) if processes.main else None, Model)
    return decided if processes.size == 1 else decided.model_copy(update={"device": settings.model.device})
