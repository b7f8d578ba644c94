"""Runs a whole training: load, evaluate, train, save, evaluate again.

Brings settings, folder and processes together; the work is in `session.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from peft import PeftModel
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.python_files import FileError
from twig.common.tokenizer import Tokenizer
from twig.config.from_peft import lora_values
from twig.config.load import Settings, as_settings
from twig.config.sizes import as_begun
from twig.core.algorithms.base import Algorithm
from twig.core.algorithms.registry import load_algorithm, passed_algorithm
from twig.engine.load import load_config, pick_device
from twig.engine.lora import trained_config
from twig.evaluation.prepare import Given, settings_for
from twig.report.progress import showing
from twig.runs.folder import NoLog, with_traceback
from twig.runs.resume import Start, decided_by_main, open_run
from twig.runs.trackers import require
from twig.runtime.failures import Ended
from twig.runtime.memory_use import PeakMemory
from twig.runtime.processes import Processes, together
from twig.runtime.stop import Clock
from twig.training.run import Run
from twig.training.session import Callback, Callbacks, Session, prepare_run


class Passed(TypedDict, total=False):
    """What `train` takes by keyword in place of what the settings name.

    `reward_funcs`: reward functions with TRL's signature; `train_dataset`, `eval_dataset`: a `Dataset` or a
    list of dicts; `algorithm`: an object in place of the group `algorithm`; `peft_config`: PEFT's
    `LoraConfig` in place of the group `lora` (unsupported fields raise UserError); `processes`: from
    `twig.runtime.processes.together`, if the caller has more to do as one of several processes.
    `on_step(step, metrics)` and `on_evaluation(step, result)` are called in process 0 with what metrics.jsonl
    and summary.json get; if one returns True, the run ends there, finished.
    """

    reward_funcs: Callable | Sequence[Callable] | None
    train_dataset: Any
    eval_dataset: Any
    algorithm: Algorithm | None
    peft_config: Any
    processes: Processes | None
    on_step: Callback | None
    on_evaluation: Callback | None


def train(
    settings: Settings | dict[str, Any] | str,
    model: PreTrainedModel | PeftModel | str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **passed: Unpack[Passed],
) -> Run:
    """Trains by `settings` (a recipe's name, a dict of groups, or Settings) and returns the run.

    `model` and `tokenizer` replace those of `model.name`; a name or a folder is put there, and a folder of an
    adapter into `model.adapter`. By keyword: `reward_funcs`, `train_dataset`, `eval_dataset`, `algorithm`,
    `peft_config`, `processes`, `on_step` and `on_evaluation`, see `Passed`. The run folder is `output`, by
    default a new one below runs/. `resume` resumes from the newest valid checkpoint in `output`, or starts
    from the beginning if there is none; a finished run is returned as it is. If there is nothing to evaluate
    on, the accuracies are None. `log.progress` says how progress is shown, unless `progress` is passed
    (`twig.Progress()` shows nothing).

    The first SIGINT or SIGTERM stops the run after the step, saved, with the status "stopped"; a second one
    raises KeyboardInterrupt. Raises UserError for what can be fixed, TypeError for an unknown keyword.

    If a launcher started several processes, each calls this and takes its share; settings, output and resume
    are those of process 0, which alone writes and reports. Raises Ended if another process failed.
    """
    unknown = sorted(passed.keys() - Passed.__annotations__)
    if unknown:
        raise TypeError(f"train() got an unexpected keyword argument {unknown[0]!r}")
    data = (passed.get(name) for name in ("reward_funcs", "train_dataset", "eval_dataset"))
    given = Given(None if isinstance(model, str | Path) else model, tokenizer, *data)
    with ExitStack() as stack:
        processes = stack.enter_context(together(passed.get("processes")))
        own, shown = None, Progress()
        if processes.main:
            own = as_settings(settings_for(settings, model))
            shown = progress if progress is not None else stack.enter_context(showing(own.log.progress))
        return _train(own, given, (output, resume), passed, shown, processes)


def _train(
    own: Settings | None,
    given: Given,
    folder: tuple[str | Path | None, bool],
    passed: Passed,
    progress: Progress,
    processes: Processes,
) -> Run:
    """Runs one process's share; `own` are process 0's settings. See `train`."""
    begun = agreed = None
    algorithm = passed.get("algorithm")
    callbacks = Callbacks(passed.get("on_step"), passed.get("on_evaluation"))
    if own is not None:
        own = _with_lora(own, passed.get("peft_config"), given.model, progress)
        own = _with_algorithm(own, algorithm, progress)
        require(own.log.report_to)
        begun = open_run(own, *folder, progress)
        own = as_begun(own, begun.log.settings)
        newest = None if begun.checkpoint is None else str(begun.checkpoint)
        agreed = (own, str(begun.log.folder), newest, begun.changed)
    same, path, newest, changed = processes.from_main(agreed, Settings)
    clock = Clock(same.train.max_time if processes.main else None)
    if not processes.main:
        same = _with_algorithm(same, algorithm, progress)
    start = begun or Start(NoLog(Path(path), same), None if newest is None else Path(newest), changed)
    try:
        decided = decided_by_main(same, start, processes) if given.model is None else None
        device = pick_device(decided.device if decided else str(cast(PreTrainedModel, given.model).device))
        with PeakMemory(str(device)) as memory:
            parts = prepare_run(same, start, given, progress, memory, processes, decided)
            return Session(parts, start, progress, memory, clock, processes, callbacks).run()
    except (FileError, Ended) as error:
        reported = with_traceback(error, start.log)
        if reported is error:
            raise
        raise reported from error
    finally:
        start.log.close()


def _with_lora(
    settings: Settings, peft_config: Any, model: PreTrainedModel | PeftModel | None, progress: Progress
) -> Settings:
    """Returns the settings with the adapter of `peft_config`, or with that of a PEFT model."""
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise UserError("peft_config", "the model that was passed has an adapter", "Leave one out")
        peft_config = trained_config(model)
    if peft_config is None:
        return settings

    def family() -> str:
        return (load_config(settings.model) if model is None else model.config).model_type

    values = {**settings.model_dump(), "lora": lora_values(peft_config, family, progress.message)}
    return Settings.from_dict(values, label="peft_config")


def _with_algorithm(settings: Settings, algorithm: Algorithm | None, progress: Progress) -> Settings:
    """Returns the settings with the algorithm that was passed, or with that of `algorithm.file` loaded."""
    chosen = algorithm or load_algorithm(settings.algorithm, progress.notice)
    if algorithm is not None or chosen.file is None:
        chosen = passed_algorithm(chosen)
    return settings.model_copy(update={"algorithm": chosen.resolved(settings.rollout.max_completion_length)})
