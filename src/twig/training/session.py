"""Runs one training process: set-up, steps, evaluations, checkpoints.

Ctrl-C, SIGTERM and crashes leave a run folder that can be resumed. What happens in a step is in `trainer.py`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet  # noqa: F401  (so that their memory is in use before a run measures its own)
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.python_files import FileError, file_checksum
from twig.common.redact import without_secrets
from twig.common.text import one_line
from twig.common.tokenizer import Tokenizer
from twig.common.user_code import is_ours, message_from, traceback_from
from twig.config.load import Settings
from twig.config.schema import Model
from twig.config.sizes import SIZE_KEYS, Sizes, with_values
from twig.core.algorithms.base import PASSED
from twig.core.types import Completion
from twig.engine.load import quantization_of
from twig.engine.lora import adapter_shape, refuse_another_shape
from twig.evaluation.evaluate import Evaluation, evaluate_policy
from twig.evaluation.prepare import Given, Parts, prepare
from twig.planner.choose import Machine, Sized, size_run
from twig.report.diagnosis import LiveWarnings
from twig.report.page import NAME, End, report_if_missing, report_of_run
from twig.runs import checkpoint
from twig.runs.contents import refuse_changed
from twig.runs.folder import with_traceback
from twig.runs.reader import is_finished
from twig.runs.resume import CHECKPOINTS, Start, decisions
from twig.runs.trackers import Report, reporting
from twig.runtime.failures import failure_of
from twig.runtime.memory_use import PeakMemory, out_of_memory
from twig.runtime.processes import ALONE, Processes, Several
from twig.runtime.rng_state import random_states, restore_random_states, seed_all
from twig.runtime.stop import Clock, Stop, stoppable
from twig.tasks.base import Task, data_checksums, data_revision
from twig.tasks.prompts import refuse_too_long, written_twice
from twig.tasks.reward_functions import RewardError
from twig.training.answers import Answered, answers_after, answers_before
from twig.training.batch import Batch, completion_rows
from twig.training.run import Run
from twig.training.state import TOTALS, RunState
from twig.training.trainer import Trainer

SCHEMA_VERSION = 1
REPORT_SECONDS = 120.0  # between two reports of a run that trains, at least
_REPORT_SHARE = 0.01  # of the time, which writing them may take
# Decode steps from which compiling them pays: on an H100 it takes 8 s and saves 2 ms a step.
COMPILED_FROM = 10_000
NOT_FINITE = "nonfinite"  # the folder of batches whose gradient was not


Callback = Callable[[int, dict[str, Any]], Any]


@dataclass(frozen=True)
class Callbacks:
    """What is called in process 0 after a step with its metrics, and after an evaluation with its result.

    Each gets the number of the step first. If one returns True, the run ends there, finished.
    """

    on_step: Callback | None = None
    on_evaluation: Callback | None = None

    def call(self, name: str, step: int, values: dict[str, Any]) -> bool:
        """Calls one of them, if there is one; returns whether the run is to end."""
        function = getattr(self, name)
        try:
            return function is not None and function(step, dict(values)) is True
        except BaseException as error:
            if is_ours(error):
                raise
            problem = f"it raised {type(error).__name__}: {message_from(error)}"
            fix = "Correct it, then call twig.train again with resume=True"
            raise FileError(name, problem, fix, traceback_from(error)) from error


def decode_of(chosen: str, resolved: str, steps: int) -> str:
    """Returns how a run of `steps` decode steps samples: `auto` compiles captured steps if that pays.

    `chosen` is `rollout.decode`, `resolved` what the policy made of it on its device.
    """
    return "compiled" if (chosen, resolved) == ("auto", "graph") and steps >= COMPILED_FROM else resolved


def prepare_run(
    settings: Settings,
    start: Start,
    given: Given,
    progress: Progress,
    memory: PeakMemory,
    processes: Processes = ALONE,
    model_settings: Model | None = None,
) -> Parts:
    """Loads everything that can fail before the run begins, the same in every process.

    `model_settings`: as in `evaluation.prepare.prepare`.
    """

    def size(settings: Settings, task: Task, tokenizer: Tokenizer, model: PreTrainedModel | None) -> Sized:
        machine, new = Machine(memory, processes.local_size), start.checkpoint is None
        if not processes.main and settings.model.kernels == "auto":
            settings = with_values(settings, {"model.kernels": "torch"})  # process 0 measures for all
        own = size_run(settings, task, tokenizer, model, machine, strict=new)
        sized = processes.from_main(replace(own, plan=None), Sized, Settings)
        same = {"algorithm": settings.algorithm}  # it may be a class of the user's
        return replace(sized, settings=sized.settings.model_copy(update=same))

    parts = prepare(settings, given, size, progress, model_settings)
    if settings.model.adapter is not None:
        refuse_another_shape(settings, adapter_shape(parts.policy.peft_model))
    if settings.model.adapter is not None or isinstance(given.model, PeftModel):
        parts.policy.keep_reference()
    refuse_too_long(parts.task, parts.sized.longest_prompt, parts.policy.context_length)
    processes.check_device(parts.policy.device)
    processes.copy_from_main(list(parts.policy.parameters.values()))
    return parts


class Session:
    """One process's work on a run: its parts and its state."""

    def __init__(
        self,
        parts: Parts,
        start: Start,
        progress: Progress,
        memory: PeakMemory,
        clock: Clock,
        processes: Processes = ALONE,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.parts, self.processes, self.peak = parts, processes, 0
        self.callbacks = callbacks or Callbacks()
        self.ended_by: str | None = None  # the setting or callback, if not the last step
        self.latest: tuple[int, Evaluation, list[Completion]] | None = None  # evaluation, with its step
        self.settings = parts.settings
        self.task = replace(
            parts.task, reward_limit=replace(parts.task.reward_limit, save=self._save_before_the_end)
        )
        self.policy, self.tokenizer = parts.policy, parts.tokenizer
        self.start, self.log = start, start.log
        self.progress, self.memory, self.clock = progress, memory, clock
        self.log.on_trouble = self._warn
        self.stop, self.live, self.run_state = Stop(), LiveWarnings(), RunState()
        self.report: Report = lambda step, metrics: None
        self.contents: dict[str, str] = {}
        self.after: dict[str, Any] | None = None
        self.answers: list[dict[str, Any]] = []  # before and after training, for summary.json
        self.next_report = time.monotonic() + REPORT_SECONDS
        self.before: tuple[dict[str, Any], dict[str, Any]] | None = None  # the state before a step under way
        self._warn_of_sizes()
        self.trainer = Trainer(
            parts.settings, parts.policy, parts.tokenizer, self.task, parts.sampling, progress, processes
        )
        steps = self.trainer.total_steps * self.settings.rollout.max_completion_length
        self.policy.decode = decode_of(self.settings.rollout.decode, self.policy.decode, steps)

    def _warn_of_sizes(self) -> None:
        """Warns if the run may not fit into memory, or a text into the model's context or template."""
        sized, context = self.parts.sized, self.policy.context_length
        if sized.warning is not None:
            self._warn(sized.warning)
        longest = sized.longest_prompt
        if context is not None and longest + self.settings.rollout.max_completion_length > context:
            self._warn(
                f"a prompt of {longest} tokens and its completion may be longer than the {context} of the "
                f"model's context; set rollout.max_completion_length={context - longest}"
            )
        if (marker := written_twice(self.task, self.tokenizer)) is not None:
            self._warn(
                f"a prompt already holds {marker}, which the chat template writes too; set task.chat=never "
                "if the prompts are as the model is to see them, else remove it from them"
            )

    # ---- the run

    def run(self) -> Run:
        """Trains to the end or to a stop, from the checkpoint to resume from if there is one."""
        seed_all(self.settings.train.seed)
        self._refuse_other_contents()
        self._refuse_stopping_unmeasured()
        if self.start.checkpoint is not None:
            self._restore(self.start.checkpoint)
        summary, step = self.processes.from_main(self.log.summary()), self.run_state.step
        if is_finished(summary) and summary["steps"] == step and self._is_over():
            if self.processes.main:
                report_if_missing(self.log.folder, self.progress.message)
            self.progress.done(summary)
            return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)
        with self._saving("the run folder"):
            self.log.rewind(step)
            self.log.save_settings(self.settings)
            self._save_environment()
        if not self.task.eval:
            self.progress.message(
                f"task {self.task.name}: nothing to evaluate on, so no accuracy; pass eval_dataset, or set "
                "task.eval_split"
            )
        self.progress.ready(self.policy.peft_model, self.tokenizer, self.trainer.total_steps)
        names = self.settings.log.report_to if self.processes.main else []
        tracked = (names, self.log.folder, self.settings.model_dump(), step, self._warn)
        with reporting(*tracked) as self.report, stoppable() as self.stop:
            try:
                return self._finish("finished" if self._work() else "stopped")
            except KeyboardInterrupt:
                if not self.stop.at_once:
                    raise
                self.processes.interrupted()
                return self._finish("stopped")
            except Exception as error:
                self._report_failure(error)
                raise

    def _work(self) -> bool:
        """Evaluates, trains and evaluates; returns whether it came to the end."""
        run_state, stop = self.run_state, self.stop
        every = self.settings.train.save_steps
        if run_state.step == 0 and self.settings.eval.before:
            self._evaluate("before")
        time_is_up = False
        asked = self._any(stop.asked)
        while not (self._is_over() or asked or time_is_up):
            began = time.perf_counter()
            self._step()
            time_is_up = self._any(self.clock.ends_before_another(time.perf_counter() - began))
            asked = self._any(stop.asked)
            ends = asked or time_is_up or self._is_over()
            if ends or (every and run_state.step % every == 0):
                self._save()
        asked = asked or self._any(stop.asked)
        self.ended_by = None if asked or time_is_up else self._ended_by()
        if self.ended_by is not None:
            self.progress.message(f"{self.ended_by} ends the run after step {run_state.step}")
        if time_is_up and not asked:
            self.progress.message(f"train.max_time={self.settings.train.max_time} is up: stopping")
        if asked or time_is_up:
            return False
        self.after = self._evaluate("after")
        return True

    def _any(self, here: bool) -> bool:
        """Returns whether it is so in any of the processes: each has to decide the same."""
        return any(self.processes.gather(here))

    def _is_over(self) -> bool:
        """Returns whether the last step is done, of all or by what ends a run before."""
        limit, run_state = self.settings.train.max_tokens, self.run_state
        enough = limit is not None and run_state.totals["tokens_sampled"] >= limit
        return enough or run_state.step >= self.trainer.total_steps or self._ended_by() is not None

    def _ended_by(self) -> str | None:
        """Returns the setting or callback by which the run ends before its last step."""
        return self.run_state.ended_by(self.settings.train.stop_when)

    def _call(self, name: str, values: dict[str, Any]) -> None:
        """Calls a callback in process 0; all processes end if it says so."""
        main = self.processes.main
        asked = self._any(main and self.callbacks.call(name, self.run_state.step, values))
        if asked and not self._is_over():
            self.run_state.ended = name

    def _expected_steps(self) -> int:
        """Estimates the number of steps from those done (at least one)."""
        total, limit, run_state = self.trainer.total_steps, self.settings.train.max_tokens, self.run_state
        if limit is None:
            return total
        left = max(limit - run_state.totals["tokens_sampled"], 0)
        more = math.ceil(left * run_state.step / max(run_state.totals["tokens_sampled"], 1))
        return min(total, run_state.step + more)

    def _step(self) -> None:
        began, step = time.perf_counter(), self.run_state.step + 1
        self.before = None if self.task.reward_limit.seconds is None else self._state()
        batch, metrics = self.trainer.step(step)
        self.before = None
        seconds = time.perf_counter() - began
        self.run_state.add_step(metrics, seconds)
        self.peak = max(self.processes.gather(self.memory.peak()))
        memory = {"peak_bytes": self.peak, "predicted_peak_bytes": self.parts.sized.peak}
        metrics |= {"time/step": seconds, **{f"memory/{name}": value for name, value in memory.items()}}
        self._log(metrics)
        self.progress.step(step, self._expected_steps(), metrics)
        every = self.settings.log.completions_steps
        if every and (step == 1 or step % every == 0):
            self.log.save_completions(step, self._completion_rows(batch))
        for text in self.live.warnings(metrics):
            self._warn(text)
        if metrics["optimizer/skipped"]:
            self._skipped(batch)
        self._call("on_step", metrics)
        self._refresh_report()
        every = self.settings.eval.steps
        if every and step % every == 0 and not self._is_over():
            result = self._evaluate(f"step {step}")
            if result is not None:
                columns = {"found": "found", "right_lenient": "right_lenient", "reward": "reward"}
                row = {f"eval/{name}": result[key] for name, key in columns.items()}
                self._log({"eval/accuracy": None if result["graded"] else result["value"], **row})

    def _completion_rows(self, batch: Batch) -> list[dict[str, Any]]:
        return completion_rows(batch, self.tokenizer, self.task.train)

    def _skipped(self, batch: Batch) -> None:
        """Warns that a step was skipped; raises UserError if it was the last of too many."""
        step, train, many = self.run_state.step, self.settings.train, self.trainer.skipped_in_a_row
        self._warn(f"step {step} was skipped: its loss or gradient is not finite")
        if many >= train.max_skipped_steps:
            path = self.log.save_completions(step, self._completion_rows(batch), NOT_FINITE)
            raise UserError(
                "train.max_skipped_steps",
                f"the loss or gradient of {many} steps in a row is not finite (the last batch: {path})",
                f"Set a smaller train.learning_rate than {train.learning_rate:g}, or model.dtype=float32",
            )

    def _refresh_report(self) -> None:
        """Writes the report of the run so far, every few minutes and in at most a hundredth of the time."""
        began = time.monotonic()
        if not self.processes.main or began < self.next_report:
            return
        report_of_run(self.log.folder, lambda reason: None, End("running"))
        ended = time.monotonic()
        self.next_report = ended + max(REPORT_SECONDS, (ended - began) / _REPORT_SHARE)

    def _report_failure(self, error: Exception) -> None:
        """Leaves the reason in the folder of a run that began, and a report that says that it failed."""
        if self.processes.main and self.run_state.step > 0:
            if isinstance(error, UserError) and not isinstance(error, FileError):
                with suppress(UserError):  # its folder may be gone
                    self.log.save_traceback(str(error))
            report_of_run(self.log.folder, self.progress.message, End("failed", one_line(error)))

    def _log(self, metrics: dict[str, Any]) -> None:
        self.log.log(self.run_state.step, metrics)
        self.report(self.run_state.step, metrics)

    def _warn(self, text: str) -> None:
        self.log.warn(text)
        self.progress.message(f"warning: {text}")

    def _evaluate(self, when: str) -> dict[str, Any] | None:
        """Evaluates; returns the result for summary.json, None if there is nothing to evaluate on.

        A signal stops an evaluation before or after training immediately: there is no progress to save.
        """
        settings = self.settings
        if not self.task.eval:
            return None
        if when == "after" and self.latest is not None and self.latest[0] == self.run_state.step:
            _, measured, completions = self.latest
            self.progress.evaluation(when, measured.as_dict())
            self._keep_answers(when, measured, completions)
            return measured.as_dict()
        self.stop.at_once = when in ("before", "after")
        measured, completions = evaluate_policy(
            self.policy,
            self.tokenizer,
            self.task,
            replace(self.parts.sampling, wave_size=Sizes.of(settings).eval_batch_size),
            limit=settings.eval.limit,
            progress=self.progress,
            processes=self.processes,
        )
        self.stop.at_once = False
        self.log.save_evaluation(self.run_state.step, measured.each())
        result = measured.as_dict()
        self.progress.evaluation(when, result)
        if self.run_state.add_evaluation(result):
            self._save_adapter("adapter-best")
        self._keep_answers(when, measured, completions)
        self.latest = self.run_state.step, measured, completions
        self._call("on_evaluation", result)
        return result

    def _keep_answers(self, when: str, measured: Evaluation, completions: list[Completion]) -> None:
        """Keeps the answers of an evaluation before or after training, if they are to be compared."""
        right, seed = measured.right, self.settings.train.seed
        if right is None or when not in ("before", "after"):
            return
        asked = self.task.eval[: measured.n]
        answered = Answered(asked, [completion.text for completion in completions], right.tolist())
        if when == "before":
            self.run_state.answers = without_secrets(answers_before(answered, seed))
        elif self.run_state.before is not None:  # it asked the same problems
            self.answers = without_secrets(answers_after(self.run_state.answers, answered, seed))

    def _finish(self, status: str) -> Run:
        self.policy.release()
        if status == "finished":
            self._save_adapter("adapter")
        run_state, totals = self.run_state, self.run_state.totals
        summary = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "algorithm": self.settings.algorithm.name,
            "task": self.settings.task.name,
            "steps": run_state.step,
            "ended_by": self.ended_by,
            "accuracy_before": run_state.before,
            "accuracy_after": self.after,
            "accuracy_best": run_state.best,
            "answers": self.answers,
            **{total: totals[total] for total in TOTALS},
            "peak_memory_bytes": max(self.peak, self.memory.peak()),
            "predicted_peak_bytes": self.parts.sized.peak,
            "seconds": totals["seconds"],
        }
        self.log.flush()
        with self._saving("summary.json"):
            if self.processes.main:
                (self.log.folder / NAME).unlink(missing_ok=True)  # it is that of an older summary
            self.log.save_summary(summary)
        if self.processes.main:
            report_of_run(self.log.folder, self.progress.message, End(status))
        self.progress.done(summary)
        return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)

    # ---- saving

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what `trainer.restore` takes, and the random states."""
        tensors, state = self.trainer.state()
        tensors["random"] = random_states()
        return tensors, state

    def _save_before_the_end(self, error: RewardError) -> BaseException:
        """Saves the run as it was before this step, and returns the error to end with.

        Called while the main thread may be inside a reward function that does not return.
        """
        several = self.processes if isinstance(self.processes, Several) else None
        if several is not None:
            several.fail(failure_of(several.rank, error))
        if self.run_state.step > 0:
            self._save()
        reported = with_traceback(error, self.log)
        if several is not None:
            several.leave()
        return reported

    def _save(self) -> None:
        if not self.processes.main:
            return
        self.log.flush()  # a checkpoint belongs to the rows up to it
        tensors, state = self.before or self._state()
        state |= {
            "standing": self.run_state.as_dict(),
            "decided": decisions(self.policy.model, self.settings),
            "settings": self.settings.to_yaml(),
            "contents": self.contents,
        }
        keep = self.settings.train.save_total_limit
        with self._saving("a checkpoint"):
            checkpoint.save(self.log.folder / CHECKPOINTS, self.run_state.step, tensors, state, keep)
        self.progress.saved(self.run_state.step)

    def _restore(self, path: Path) -> None:
        files, state = self.processes.from_main(checkpoint.read(path) if self.processes.main else None)
        tensors = checkpoint.tensors_of(files)
        values = self.settings.flat()
        # Sizes that fitted into memory are kept, unless they were set explicitly for this resume.
        changed = {key.rpartition(".")[2]: values[key] for key in SIZE_KEYS if key in self.start.changed}
        try:
            sizes = {name: changed.get(name, size) for name, size in state["sizes"].items()}
            self.trainer.restore(tensors, state | {"sizes": sizes})
            self.run_state = RunState(**state["standing"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            problem = f"not a checkpoint of this run ({type(error).__name__}: {error})"
            raise UserError(str(path), problem, "Remove it to resume from the one before") from error
        summary = self.processes.from_main(self.log.summary())
        if is_finished(summary) and summary["steps"] == self.run_state.step and summary["accuracy_after"]:
            self.run_state.add_evaluation(summary["accuracy_after"])  # made when the checkpoint was there
        restore_random_states(tensors["random"])
        self.progress.resumed(self.run_state.totals)
        self.progress.message(f"resuming from step {self.run_state.step} ({path})")

    def _save_adapter(self, name: str) -> None:
        if not self.processes.main:
            return
        with self._saving(f"{name}/"):
            checkpoint.save_adapter(self.policy.peft_model, self.log.folder / name)

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """Ends the run with a UserError if something cannot be written: its last checkpoint is whole."""
        self.log.refuse_vanished()
        try:
            yield
        except OSError as error:
            folder = self.log.folder
            raise UserError(
                str(folder),
                f"{what} cannot be written ({error.strerror or error})",
                f"Free the space or make it writable, then run twig train {folder} --resume",
            ) from error

    def _refuse_stopping_unmeasured(self) -> None:
        """Raises UserError if the run is to end by an accuracy that is never measured."""
        key = self.settings.train.stop_when.key
        if key is not None and not self.task.eval:
            fix = "Set task.eval_split, or pass eval_dataset"
            raise UserError(key, "there is nothing to evaluate on", fix)

    def _refuse_other_contents(self) -> None:
        """Raises UserError if code, data or weights are not those that the run began with."""
        begun, parts = self.processes.from_main(dict(self.start.contents)), self.parts
        now = {
            "reward_file": parts.reward_file_sha256,
            "algorithm_file": self._algorithm_checksum(),
            **data_checksums(self.task),
            "base": parts.model_sha256 or getattr(self.policy.model.config, "_commit_hash", None),
            "adapter": parts.adapter_sha256,
        }
        refuse_changed(begun, now, self.settings, self.start.changed)
        self.contents = begun | {name: checksum for name, checksum in now.items() if checksum is not None}

    def _algorithm_checksum(self) -> str | None:
        file = self.settings.algorithm.file
        return None if file in (None, PASSED) else file_checksum(file, "algorithm.file")

    def _save_environment(self) -> None:
        model, device = self.policy.model, self.policy.device
        self.log.save_environment(
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            dtype=str(model.dtype),
            quantization=quantization_of(model.config),
            model_revision=getattr(model.config, "_commit_hash", None),  # None: not from the Hub
            data_revision=data_revision(self.contents),
            passed=", ".join(self.parts.passed) or None,
            model_sha256=self.parts.model_sha256,
            reward_file_sha256=self.parts.reward_file_sha256,
            algorithm_file_sha256=self._algorithm_checksum(),
            processes=self.processes.size,
        )
