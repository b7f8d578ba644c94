"""Where a run begins: in a new folder, or at the newest valid checkpoint of one that stopped.

Says which settings may differ between a run and its continuation, and keeps what `auto` stood for. Knows
nothing of training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.schema import Model
from twig.config.sizes import SIZE_KEYS, with_sizes
from twig.runs import checkpoint
from twig.runs.folder import NoLog, RunLog
from twig.runs.reader import is_finished
from twig.runtime.processes import Processes

CHECKPOINTS = "checkpoints"
# What may change when a run goes on. These decide what is shown, measured, saved and waited for, not what is
# learned.
_SHOWN = ("train.save_steps", "train.save_total_limit", "train.max_time", "train.max_skipped_steps")
_SHOWN += ("task.reward_timeout",)
_SHOWN_GROUPS = ("eval.", "log.")
# These decide how much is computed at once: results stay the same but for rounding.
_SPEED = (*SIZE_KEYS, "memory.budget", "model.num_threads", "rollout.decode")
# These decide where the run ends; so may some schedules of the learning rate, at every step.
_LENGTH = ("train.max_steps", "train.max_tokens", "train.num_train_epochs")
_SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
# `auto` in one of these is decided when the model is loaded.
_DECIDED = ("device", "dtype", "attn_implementation")


@dataclass(frozen=True)
class Start:
    """A run about to begin or go on: its log, the checkpoint to go on from (None: from the beginning), and
    the settings that changed since it began."""

    log: RunLog | NoLog
    checkpoint: Path | None = None
    changed: tuple[str, ...] = ()


def open_run(settings: Settings, output: str | Path | None, resume: bool, progress: Progress) -> Start:
    """The run's folder, ready to be written, and where the run stands in it; says what is to be known.

    Raises UserError where the folder holds something else, another process has it, or a setting changed that
    must not.
    """
    if not resume:
        return Start(RunLog.create(output, settings))
    if output is None:
        raise UserError("--resume: which run? write --output runs/NAME, the folder of the run to go on with")
    log = RunLog.open(output)
    try:
        return _go_on(log, settings, progress)
    except BaseException:
        log.close()
        raise


def _go_on(log: RunLog, settings: Settings, progress: Progress) -> Start:
    found, damaged = checkpoint.newest_valid(log.folder / CHECKPOINTS)
    decided = {} if found is None else checkpoint.load_state(found).get("decided", {})
    changed = changes(log.settings, settings, decided)
    log.refuse_another_reward_file(settings)
    for path in damaged:
        log.warn(f"{path} is damaged and not used")
        progress.message(f"warning: {path} is damaged and not used")
    if found is None:
        if is_finished(log.summary()):
            raise UserError(
                f"--resume: {log.folder} is finished and has no checkpoint to go on from; "
                "write another --output and leave --resume out"
            )
        lack = "valid checkpoint" if damaged else "checkpoint yet"
        progress.message(f"{log.folder} has no {lack}: the run starts from the beginning")
    for key, (old, new) in changed.items():
        words = f"{key}: {new} from here on, it was {old}"
        log.warn(words)
        progress.message(words)
    return Start(log, found, tuple(changed))


def changes(before: Settings, now: Settings, decided: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and may: key to old and new value. Raises UserError for one that must not.

    `decided` says what `auto` stood for when the run began; writing that out is no change.
    """
    old, new = before.flat(), with_sizes(now, before.flat()).flat()
    found = {
        key: (old[key], new[key])
        for key in new
        if new[key] != old[key] and not (old[key] == "auto" and new[key] == decided.get(key))
    }
    for key, (was, value) in found.items():
        if key in _SHOWN + _SPEED or key.startswith(_SHOWN_GROUPS):
            continue
        if key not in _LENGTH:
            raise UserError(
                f"{key}: {value!r} here, but the run began with {decided.get(key, was)!r}; "
                f"write {key}={decided.get(key, was)} or another --output"
            )
        if now.train.lr_scheduler_type not in _SCHEDULES_WITHOUT_END:
            raise UserError(
                f"{key}: {value!r} here, but the run began with {was!r}, and with train.lr_scheduler_type="
                f"{now.train.lr_scheduler_type} every learning rate depends on it; write {key}={was} or "
                "another --output"
            )
    return found


def decided_model(wanted: Model, start: Start) -> Model:
    """`wanted` with what its `auto`s stood for when the run began."""
    if start.checkpoint is None:
        return wanted
    decided = checkpoint.load_state(start.checkpoint).get("decided", {})
    values = {name: decided.get(f"model.{name}") for name in _DECIDED}
    return wanted.model_copy(
        update={name: v for name, v in values.items() if v is not None and getattr(wanted, name) == "auto"}
    )


def decisions(model: Any) -> dict[str, str]:
    """What `auto` stands for in a loaded model, by setting, for `decided_model`."""
    values = (model.device.type, str(model.dtype).removeprefix("torch."), model.config._attn_implementation)
    return {f"model.{name}": value for name, value in zip(_DECIDED, values, strict=True)}


def decided_by_main(settings: Settings, start: Start, processes: Processes) -> Any:
    """The settings of the model as process 0 decided them; each of several has a device of its own."""
    found = processes.from_main(decided_model(settings.model, start) if processes.main else None)
    return found if processes.size == 1 else found.model_copy(update={"device": settings.model.device})
