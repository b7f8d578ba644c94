"""A whole run: load, evaluate, train, save, evaluate again.

Everything that is decided once per run is here; what happens in a step is in `trainer.py`. Ctrl-C, SIGTERM
and crashes leave a run folder that `resume=True` goes on from.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from twig import checkpoint
from twig.config import Settings, load
from twig.evaluate import evaluate_policy
from twig.from_peft import lora_values
from twig.memory import with_sizes
from twig.models import (
    end_ids,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    quantization_of,
    suppressed_ids,
)
from twig.policy import Policy, adapter_shape, attach
from twig.progress import Progress
from twig.records import UserError
from twig.runlog import RunLog
from twig.samples import completion_rows
from twig.settings import Lora
from twig.signals import Stop, stoppable
from twig.sizing import size_run
from twig.tasks import Task, load_task
from twig.tasks.rewards import RewardError
from twig.trackers import Report, reporting, require
from twig.trainer import Trainer
from twig.usage import PeakMemory

SCHEMA_VERSION = 1
CHECKPOINTS = "checkpoints"
# Settings that may differ between a run and its continuation: they change what is shown and saved, not what
# is learned.
_HARMLESS = ("train.max_steps", "train.save_steps", "train.save_total_limit", "eval.", "log.")


@dataclass
class Run:
    """A finished or stopped run: its folder, the trained model (PEFT, on its base), tokenizer and
    summary.json."""

    folder: Path
    model: PeftModel
    tokenizer: Any
    summary: dict[str, Any]


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
) -> Run:
    """Trains by `settings` (a recipe's name, a dict of groups, or Settings) and returns the run.

    `model` and `tokenizer` take the place of `model.name`'s; reward functions (TRL's signature) and data sets
    take the place of the task's; PEFT's `LoraConfig` takes the place of the settings `lora`, and what of it
    has no equal here is refused. The run folder is `output`, by default a new one below runs/. `resume` goes
    on from the newest valid checkpoint in `output`, or from the beginning where there is none; a finished run
    is returned as it is. Where there is nothing to evaluate on, the accuracies are None. The first SIGINT or
    SIGTERM ends the run after the step, saved, with the status "stopped"; a second one raises
    KeyboardInterrupt. Raises UserError for what can be fixed.
    """
    settings = _settings(settings)
    if peft_config is not None:
        settings = _with_lora(settings, peft_config, model)
    progress = progress or Progress()
    require(settings.log.report_to)
    log, start = _open(settings, output, resume, progress)
    settings = with_sizes(settings, log.settings.flat())
    device = pick_device(settings.model.device) if model is None else model.device
    try:
        with PeakMemory(str(device)) as memory:
            session = _Session(settings, log, progress, memory)
            session.prepare(start is None, model, tokenizer, reward_funcs, train_dataset, eval_dataset)
            return session.run(start)
    except Exception as error:
        if isinstance(error, RewardError) and error.traceback_text:
            path = log.save_traceback(error.traceback_text)
            raise UserError(f"{error} (traceback: {path})") from error
        raise


def _settings(given: Settings | dict[str, Any] | str) -> Settings:
    if isinstance(given, Settings):
        return given
    return load(given) if isinstance(given, str) else Settings.from_dict(given)


def _with_lora(settings: Settings, peft_config: Any, model: PreTrainedModel | None) -> Settings:
    def family() -> str:
        return (load_config(settings.model) if model is None else model.config).model_type

    values = {**settings.model_dump(), "lora": lora_values(peft_config, family)}
    return Settings.from_dict(values, label="peft_config")


def _open(
    settings: Settings, output: str | Path | None, resume: bool, progress: Progress
) -> tuple[RunLog, Path | None]:
    """The run's log, and the checkpoint to go on from (None: from the beginning)."""
    if not resume:
        return RunLog.create(output, settings), None
    if output is None:
        raise UserError("--resume: which run? write --output runs/NAME, the folder of the run to go on with")
    log = RunLog.open(output)
    _refuse_changes(log.settings, settings)
    found, skipped = checkpoint.newest_valid(log.folder / CHECKPOINTS)
    for path in skipped:
        log.warn(f"{path} is damaged and not used")
    if found is None:
        if _is_finished(log.summary()):
            raise UserError(
                f"--resume: {log.folder} is finished and has no checkpoint to go on from; "
                "write another --output and leave --resume out"
            )
        progress.message(f"{log.folder} has no checkpoint yet: the run starts from the beginning")
    return log, found


def _is_finished(summary: dict[str, Any] | None) -> bool:
    return summary is not None and summary.get("status") == "finished"


def _refuse_changes(before: Settings, now: Settings) -> None:
    old, new = before.flat(), with_sizes(now, before.flat()).flat()
    changed = [k for k in new if new[k] != old[k] and not k.startswith(_HARMLESS)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{key}: {new[key]!r} here, but the run began with {old[key]!r}; "
            f"write {key}={old[key]} or another --output"
        )


class _Session:
    """One process's work on a run: its parts, and where it stands."""

    def __init__(self, settings: Settings, log: RunLog, progress: Progress, memory: PeakMemory) -> None:
        self.settings, self.log, self.progress, self.memory = settings, log, progress, memory
        self.stop = Stop()
        self.report: Report = lambda step, metrics: None
        self.step = 0
        self.totals = {"tokens_sampled": 0, "tokens_selected": 0, "nodes_run": 0, "seconds": 0.0}
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def prepare(
        self, begins: bool, model: Any, tokenizer: Any, reward_funcs: Any, train_dataset: Any, eval_data: Any
    ) -> None:
        """Loads everything that can fail before anything is computed."""
        settings = self.settings
        given = {"model": model, "tokenizer": tokenizer, "reward_funcs": reward_funcs}
        given |= {"train_dataset": train_dataset, "eval_dataset": eval_data}
        self.passed = ", ".join(name for name, value in given.items() if value is not None)
        self.progress.phase("loading")
        self.task: Task = load_task(settings, train_dataset, eval_data, reward_funcs)
        loaded = model is None
        if loaded:
            tokenizer = tokenizer or load_tokenizer(settings.model)
        elif tokenizer is None:
            raise UserError("tokenizer: a model was passed without its tokenizer; pass tokenizer=")
        elif any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError(
                "model: it has an adapter already, perhaps of an earlier run; "
                "pass run.model.unload(), or load it anew"
            )
        self.tokenizer = tokenizer
        self.sized = size_run(settings, self.task, tokenizer, model, self.memory, begins=begins)
        self.settings = settings = self.sized.settings
        if self.sized.warning is not None:
            self.progress.message(self.sized.warning)
            self.log.warn(self.sized.warning)
        if loaded:
            model, _ = load_model(settings.model, tokenizer)
        lora = settings.lora
        peft_model = attach(
            model,
            r=lora.r,
            alpha=lora.alpha,
            target_modules=lora.target_modules,
            layers=lora.layers,
            seed=settings.train.seed,
            adapter=settings.model.adapter,
        )
        if settings.model.adapter is not None:
            _refuse_another_shape(settings, adapter_shape(peft_model))
        if loaded:  # not the folder that it lies in on this machine
            for config in peft_model.peft_config.values():
                config.base_model_name_or_path = settings.model.name
        self.end_ids = end_ids(model, tokenizer)
        vocab = model.get_output_embeddings().weight.shape[0]
        self.policy = Policy(
            peft_model,
            temperature=settings.rollout.temperature,
            suppress_tokens=suppressed_ids(model, settings.rollout.suppress_tokens, vocab),
            plain=settings.model.engine == "plain",
            head_chunk=settings.train.head_chunk,
            checkpoint_layers=settings.train.checkpoint_layers,
        )
        self.trainer = Trainer(settings, self.policy, tokenizer, self.task, self.end_ids, self.progress)

    # ---- the run
    # -------------------------------------------------------------------------------------------------

    def run(self, start: Path | None) -> Run:
        if start is not None:
            self._restore(start)
        summary = self.log.summary()
        if _is_finished(summary) and summary["steps"] == self.step >= self.trainer.total_steps:
            self.progress.done(summary)
            return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)
        self.log.rewind(self.step)
        self.log.save_settings(self.settings)
        self._save_environment()
        if not self.task.eval:
            self.progress.message(
                f"task {self.task.name}: nothing to evaluate on, so no accuracy; pass eval_dataset, or write "
                "task.eval_split"
            )
        tracked = (self.settings.log.report_to, self.log.folder, self.settings.model_dump(), self.step)
        with reporting(*tracked) as self.report, stoppable() as self.stop:
            try:
                return self._finish("finished" if self._work() else "stopped")
            except KeyboardInterrupt:
                if not self.stop.at_once:
                    raise
                return self._finish("stopped")

    def _work(self) -> bool:
        """Evaluates, trains and evaluates; whether it came to the end."""
        total, stop, every = self.trainer.total_steps, self.stop, self.settings.train.save_steps
        if self.step == 0 and self.settings.eval.before:
            self.before = self._evaluate("before")
        while self.step < total and not stop.asked:
            self._step(total)
            if stop.asked or self.step == total or (every and self.step % every == 0):
                self._save()
        if stop.asked:
            return False
        self.after = self._evaluate("after")
        self._save()
        return True

    def _step(self, total: int) -> None:
        began = time.perf_counter()
        batch, metrics = self.trainer.step(self.step + 1)
        self.step += 1
        seconds = time.perf_counter() - began
        self.totals["seconds"] += seconds
        for key, name in (
            ("tokens_sampled", "sampled"),
            ("tokens_selected", "selected"),
            ("nodes_run", "nodes_run"),
        ):
            self.totals[key] += metrics[f"tokens/{name}"]
        memory = {"peak_bytes": self.memory.peak(), "predicted_peak_bytes": self.sized.peak}
        metrics |= {"time/step": seconds, **{f"memory/{name}": value for name, value in memory.items()}}
        self._log(metrics)
        self.progress.step(self.step, total, metrics)
        every = self.settings.log.completions_steps
        if every and (self.step == 1 or self.step % every == 0):
            self.log.save_completions(self.step, completion_rows(batch, self.tokenizer))
        every = self.settings.eval.steps
        if every and self.step % every == 0 and self.step < total:
            result = self._evaluate(f"step {self.step}")
            if result is not None:
                named = {"accuracy": "value", "found": "found", "right_lenient": "right_lenient"}
                self._log({f"eval/{name}": result[key] for name, key in named.items()})

    def _log(self, metrics: dict[str, Any]) -> None:
        self.log.log(self.step, metrics)
        self.report(self.step, metrics)

    def _evaluate(self, when: str) -> dict[str, Any] | None:
        """An evaluation as summary.json has it, None where there is nothing to evaluate on.

        Nothing is lost where one before or after training is broken off, so there a signal stops at once.
        """
        settings = self.settings
        if not self.task.eval:
            return None
        self.stop.at_once = when in ("before", "after")
        measured, _ = evaluate_policy(
            self.policy,
            self.tokenizer,
            self.task,
            settings.task,
            end_ids=self.end_ids,
            max_completion_length=settings.rollout.max_completion_length,
            limit=settings.eval.limit,
            batch_size=settings.eval.batch_size,
            stop=settings.rollout.stop,
            progress=self.progress,
        )
        self.stop.at_once = False
        result = measured.as_dict()
        self.progress.evaluation(when, result)
        if when != "before" and (self.best is None or result["value"] > self.best["value"]):
            self.best = result | {"step": self.step}
            self._save_adapter("adapter-best")
        return result

    def _finish(self, status: str) -> Run:
        if status == "finished":
            self._save_adapter("adapter")
        summary = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "algorithm": self.settings.algorithm.name,
            "task": self.settings.task.name,
            "steps": self.step,
            "accuracy_before": self.before,
            "accuracy_after": self.after,
            "accuracy_best": self.best,
            **{k: self.totals[k] for k in ("tokens_sampled", "tokens_selected", "nodes_run")},
            "peak_memory_bytes": self.memory.peak(),
            "predicted_peak_bytes": self.sized.peak,
            "seconds": self.totals["seconds"],
        }
        self.log.save_summary(summary)
        self.progress.done(summary)
        return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)

    # ---- saving
    # --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors, state = self.trainer.state()
        state |= {
            "step": self.step,
            "totals": self.totals,
            "before": self.before,
            "best": self.best,
        }
        keep = self.settings.train.save_total_limit
        checkpoint.save(self.log.folder / CHECKPOINTS, self.step, tensors, state, keep)

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        self.trainer.restore(tensors, state)
        self.step, self.totals = state["step"], state["totals"]
        self.before, self.best = state["before"], state["best"]
        self.progress.message(f"going on from step {self.step} ({path})")

    def _save_adapter(self, name: str) -> None:
        target, draft = self.log.folder / name, self.log.folder / f".{name}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        self.policy.peft_model.save_pretrained(draft, save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # an empty form, with paths of this machine
        shutil.rmtree(target, ignore_errors=True)
        os.replace(draft, target)

    def _save_environment(self) -> None:
        model, device = self.policy.model, self.policy.device
        self.log.save_environment(
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            dtype=str(model.dtype),
            quantization=quantization_of(model.config),
            model_revision=getattr(model.config, "_commit_hash", None),  # None: not from the Hub
            data_revision=_data_revision(self.task),
            passed=self.passed or None,
        )


def _refuse_another_shape(settings: Settings, has: dict[str, Any]) -> None:
    """Raises UserError where a setting asks for a shape that the adapter gone on with has not.

    A setting that has its default asks for nothing: whether somebody wrote it cannot be told.
    """
    for key, info in Lora.model_fields.items():
        value = getattr(settings.lora, key)
        wanted = sorted(set(value)) if isinstance(value, list) else value
        if value != info.default and wanted != has[key]:
            raise UserError(
                f"lora.{key}: {value} here, but {has[key]} in {settings.model.adapter}, which keeps its "
                f"shape; leave lora.{key} out"
            )


def _data_revision(task: Task) -> str:
    """A checksum of the problems in their order, wherever they came from."""
    digest = hashlib.sha256()
    for examples in (task.train, task.eval):
        for example in examples:
            row = [example.prompt, example.columns]
            text = json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
