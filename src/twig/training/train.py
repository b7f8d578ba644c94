"""A whole run: load, evaluate, train, save, evaluate again.

Where a run's settings, folder and processes come together; its work is in `session.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from twig.common.progress import Progress
from twig.config.from_peft import lora_values
from twig.config.load import Settings, as_settings
from twig.config.sizes import with_sizes
from twig.engine.load import load_config, pick_device
from twig.runs.folder import NoLog, with_traceback
from twig.runs.resume import Start, decided_by_main, open_run
from twig.runs.trackers import require
from twig.runtime.lifeline import Ended
from twig.runtime.memory_use import PeakMemory
from twig.runtime.processes import Processes, together
from twig.runtime.stop import Clock
from twig.tasks.reward_functions import RewardError
from twig.training.session import Run, Session


def train(
    settings: Settings | dict[str, Any] | str,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    reward_funcs: Callable | Sequence[Callable] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *,
    peft_config: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Run:
    """Trains by `settings` (a recipe's name, a dict of groups, or Settings) and returns the run.

    `model` and `tokenizer` take the place of `model.name`'s; reward functions (TRL's signature) and data sets
    take the place of the task's; PEFT's `LoraConfig` takes the place of the settings `lora`, and what of it
    has no equal here is refused. The run folder is `output`, by default a new one below runs/. `resume` goes
    on from the newest valid checkpoint in `output`, or from the beginning where there is none; a finished run
    is returned as it is. Where there is nothing to evaluate on, the accuracies are None. The first SIGINT or
    SIGTERM ends the run after the step, saved, with the status "stopped"; a second one raises
    KeyboardInterrupt. Raises UserError for what can be fixed.

    Where a launcher started several processes, each calls this and takes its share; settings, output and
    resume are those of process 0, which alone writes and reports. `processes`: from
    `twig.runtime.processes.together` where the caller has more to do as one of them. Ended is raised where
    another process failed.
    """
    with together(processes) as processes:
        progress = progress if progress is not None and processes.main else Progress()
        start = None
        if processes.main:
            settings = as_settings(settings)
            if peft_config is not None:
                settings = _with_lora(settings, peft_config, model)
            require(settings.log.report_to)
            start = open_run(settings, output, resume, progress)
            settings = with_sizes(settings, start.log.settings.flat())
        clock = Clock(settings.train.max_time if processes.main else None)
        told = (settings, start.log.folder, start.checkpoint, start.changed) if start else None
        settings, folder, *known = processes.from_main(told)
        start = start or Start(NoLog(folder, settings), *known)
        try:
            device = (
                pick_device(decided_by_main(settings, start, processes).device)
                if model is None
                else model.device
            )
            with PeakMemory(str(device)) as memory:
                session = Session(settings, start, progress, memory, clock, processes)
                session.prepare(model, tokenizer, reward_funcs, train_dataset, eval_dataset)
                return session.run()
        except (RewardError, Ended) as error:
            found = with_traceback(error, start.log)
            if found is error:
                raise
            raise found from error
        finally:
            start.log.close()


def _with_lora(settings: Settings, peft_config: Any, model: PreTrainedModel | None) -> Settings:
    def family() -> str:
        return (load_config(settings.model) if model is None else model.config).model_type

    values = {**settings.model_dump(), "lora": lora_values(peft_config, family)}
    return Settings.from_dict(values, label="peft_config")
