"""One process's work on a run: its parts, where it stands, and what it writes.

Ctrl-C, SIGTERM and crashes leave a run folder that can be gone on with. What happens in a step is in
`trainer.py`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet  # noqa: F401  (with what it takes before memory is measured, and not in the middle of a run)
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.sizes import SIZE_KEYS
from twig.engine.load import (
    end_ids,
    load_model,
    load_tokenizer,
    quantization_of,
    remote_code_words,
    suppressed_ids,
)
from twig.engine.lora import adapter_shape, attach, refuse_another_shape
from twig.engine.policy import Policy
from twig.evaluation.evaluate import evaluate_policy
from twig.planner.choose import size_run
from twig.report.diagnosis import LiveWarnings
from twig.report.page import report_of_run
from twig.runs import checkpoint
from twig.runs.reader import is_finished
from twig.runs.resume import CHECKPOINTS, Start, decided_by_main, decisions
from twig.runs.trackers import Report, reporting
from twig.runtime.memory_use import PeakMemory, out_of_memory
from twig.runtime.processes import ALONE, Processes
from twig.runtime.rng_state import random_states, restore_random_states, seed_all
from twig.runtime.stop import Clock, Stop, stoppable
from twig.tasks.base import Task, data_revision
from twig.tasks.load import load_task
from twig.tasks.prompts import refuse_too_long
from twig.tasks.reward_functions import reward_file_checksum
from twig.training.batch import Batch, completion_rows
from twig.training.state import TOTALS, RunState
from twig.training.trainer import Trainer

SCHEMA_VERSION = 1
# Decode steps from which compiling them pays: on an H100 it takes 8 s and saves 2 ms a step.
COMPILED_FROM = 10_000
NOT_FINITE = "nonfinite"  # the folder of batches whose gradient was not


@dataclass
class Run:
    """A finished or stopped run: its folder, the trained model (PEFT, on its base), tokenizer and
    summary.json."""

    folder: Path
    model: PeftModel
    tokenizer: Any
    summary: dict[str, Any]


def decode_of(chosen: str, found: str, steps: int) -> str:
    """Returns how a run of `steps` decode steps samples: `auto` compiles what is captured if that pays.

    `chosen` is `rollout.decode`, `found` what the policy made of it on its device.
    """
    return "compiled" if (chosen, found) == ("auto", "graph") and steps >= COMPILED_FROM else found


class Session:
    """One process's work on a run: its parts, and where it stands."""

    def __init__(
        self,
        settings: Settings,
        start: Start,
        progress: Progress,
        memory: PeakMemory,
        clock: Clock,
        processes: Processes = ALONE,
    ) -> None:
        self.processes, self.peak = processes, 0
        self.settings, self.start, self.log = settings, start, start.log
        self.progress, self.memory, self.clock = progress, memory, clock
        self.log.on_trouble = self._warn
        self.stop, self.live, self.run_state = Stop(), LiveWarnings(), RunState()
        self.report: Report = lambda step, metrics: None
        self.after: dict[str, Any] | None = None

    def prepare(
        self, model: Any, tokenizer: Any, reward_funcs: Any, train_dataset: Any, eval_dataset: Any
    ) -> None:
        """Loads everything that can fail before anything is computed."""
        settings = self.settings
        given = {"model": model, "tokenizer": tokenizer, "reward_funcs": reward_funcs}
        given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self.passed = ", ".join(name for name, value in given.items() if value is not None)
        self.progress.phase("loading")
        own = reward_funcs is None and settings.task.reward_file is not None
        self.code = reward_file_checksum(settings.task.reward_file) if own else None
        given_data = train_dataset, eval_dataset
        self.task: Task = load_task(settings, *given_data, reward_funcs, self.progress.notice)
        loaded = model is None
        if loaded:
            if settings.model.trust_remote_code:
                self.progress.notice(remote_code_words(settings.model))
            tokenizer = tokenizer or load_tokenizer(settings.model)
        elif tokenizer is None:
            raise UserError("tokenizer: a model was passed without its tokenizer; pass tokenizer=")
        elif any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError(
                "model: it has an adapter already, perhaps of an earlier run; "
                "pass run.model.unload(), or load it anew"
            )
        self.tokenizer = tokenizer
        begins = self.start.checkpoint is None
        options = {"begins": begins, "beside": self.processes.local_size}
        sized = size_run(settings, self.task, tokenizer, model, self.memory, **options)
        self.sized = self.processes.from_main(sized)
        self.settings = settings = self.sized.settings
        if loaded:
            model, _ = load_model(decided_by_main(settings, self.start, self.processes), tokenizer)
        peft_model = self._attach(model)
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
            decode=settings.rollout.decode,
        )
        if self.sized.warning is not None:  # now that the model is known to be one that can be trained
            self._warn(self.sized.warning)
        longest, context = self.sized.longest_prompt, self.policy.context_length
        refuse_too_long(self.task, longest, context)
        if context is not None and longest + settings.rollout.max_completion_length > context:
            self._warn(
                f"a prompt of {longest} tokens and its completion may be longer than the {context} of the "
                f"model's context; write rollout.max_completion_length={context - longest}"
            )
        self.processes.check_device(self.policy.device)
        self.processes.copy_from_main(list(self.policy.parameters.values()))
        known = (self.policy, tokenizer, self.task, self.end_ids, self.progress, self.processes)
        self.trainer = Trainer(settings, *known)
        steps = self.trainer.total_steps * settings.rollout.max_completion_length
        self.policy.decode = decode_of(settings.rollout.decode, self.policy.decode, steps)

    def _attach(self, model: Any) -> PeftModel:
        settings = self.settings
        started = {"seed": settings.train.seed, "adapter": settings.model.adapter}
        peft_model = attach(model, **dict(settings.lora), **started)
        if settings.model.adapter is not None:
            refuse_another_shape(settings, adapter_shape(peft_model))
        return peft_model

    # ---- the run

    def run(self) -> Run:
        seed_all(self.settings.train.seed)
        if self.start.checkpoint is not None:
            self._restore(self.start.checkpoint)
        summary, step = self.processes.from_main(self.log.summary()), self.run_state.step
        if is_finished(summary) and summary["steps"] == step and self._is_over():
            self.progress.done(summary)
            return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)
        with self._saving("the run folder"):
            self.log.rewind(step)
            self.log.save_settings(self.settings)
            self._save_environment()
        if not self.task.eval:
            self.progress.message(
                f"task {self.task.name}: nothing to evaluate on, so no accuracy; pass eval_dataset, or write "
                "task.eval_split"
            )
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

    def _work(self) -> bool:
        """Evaluates, trains and evaluates; whether it came to the end."""
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
        if time_is_up and not asked:
            self.progress.message(f"train.max_time={self.settings.train.max_time} is up: stopping")
        if asked or time_is_up:
            return False
        self.after = self._evaluate("after")
        return True

    def _any(self, here: bool) -> bool:
        """Whether it is so in any of the processes: each has to decide the same."""
        return any(self.processes.gather(here))

    def _is_over(self) -> bool:
        """Whether the last step is done: the number of steps or of tokens is reached."""
        limit, run_state = self.settings.train.max_tokens, self.run_state
        enough = limit is not None and run_state.totals["tokens_sampled"] >= limit
        return enough or run_state.step >= self.trainer.total_steps

    def _expected_steps(self) -> int:
        """How many steps it will be, as far as can be told from those done (at least one)."""
        total, limit, run_state = self.trainer.total_steps, self.settings.train.max_tokens, self.run_state
        if limit is None:
            return total
        left = max(limit - run_state.totals["tokens_sampled"], 0)
        more = math.ceil(left * run_state.step / max(run_state.totals["tokens_sampled"], 1))
        return min(total, run_state.step + more)

    def _step(self) -> None:
        began, step = time.perf_counter(), self.run_state.step + 1
        batch, metrics = self.trainer.step(step)
        seconds = time.perf_counter() - began
        self.run_state.add_step(metrics, seconds)
        self.peak = max(self.processes.gather(self.memory.peak()))
        memory = {"peak_bytes": self.peak, "predicted_peak_bytes": self.sized.peak}
        metrics |= {"time/step": seconds, **{f"memory/{name}": value for name, value in memory.items()}}
        self._log(metrics)
        self.progress.step(step, self._expected_steps(), metrics)
        every = self.settings.log.completions_steps
        if every and (step == 1 or step % every == 0):
            self.log.save_completions(step, completion_rows(batch, self.tokenizer))
        for words in self.live.warnings(metrics):
            self._warn(words)
        if metrics["optimizer/skipped"]:
            self._skipped(batch)
        every = self.settings.eval.steps
        if every and step % every == 0 and not self._is_over():
            result = self._evaluate(f"step {step}")
            if result is not None:
                named = {"accuracy": "value", "found": "found", "right_lenient": "right_lenient"}
                self._log({f"eval/{name}": result[key] for name, key in named.items()})

    def _skipped(self, batch: Batch) -> None:
        """Says that a step was skipped; raises UserError where it was the last of too many."""
        step, train, many = self.run_state.step, self.settings.train, self.trainer.skipped_in_a_row
        self._warn(f"step {step} was skipped: its loss or gradient is not finite")
        if many >= train.max_skipped_steps:
            path = self.log.save_completions(step, completion_rows(batch, self.tokenizer), NOT_FINITE)
            raise UserError(
                f"train.max_skipped_steps: the loss or gradient of {many} steps in a row is not finite (the "
                f"last batch: {path}); write a smaller train.learning_rate than {train.learning_rate:g}, or "
                "model.dtype=float32"
            )

    def _log(self, metrics: dict[str, Any]) -> None:
        self.log.log(self.run_state.step, metrics)
        self.report(self.run_state.step, metrics)

    def _warn(self, words: str) -> None:
        self.log.warn(words)
        self.progress.message(f"warning: {words}")

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
            processes=self.processes,
        )
        self.stop.at_once = False
        self.log.save_evaluation(self.run_state.step, measured.each())
        result = measured.as_dict()
        self.progress.evaluation(when, result)
        if self.run_state.add_evaluation(result):
            self._save_adapter("adapter-best")
        return result

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
            "accuracy_before": run_state.before,
            "accuracy_after": self.after,
            "accuracy_best": run_state.best,
            **{total: totals[total] for total in TOTALS},
            "peak_memory_bytes": max(self.peak, self.memory.peak()),
            "predicted_peak_bytes": self.sized.peak,
            "seconds": totals["seconds"],
        }
        self.log.flush()
        with self._saving("summary.json"):
            self.log.save_summary(summary)
        if self.processes.main:
            report_of_run(self.log.folder, self.progress.message)
        self.progress.done(summary)
        return Run(self.log.folder, self.policy.peft_model, self.tokenizer, summary)

    # ---- saving

    def _save(self) -> None:
        if not self.processes.main:
            return
        self.log.flush()  # a checkpoint stands for the rows up to it
        tensors, state = self.trainer.state()
        tensors["random"] = random_states()
        state |= {"standing": self.run_state.as_dict(), "decided": decisions(self.policy.model)}
        keep = self.settings.train.save_total_limit
        with self._saving("a checkpoint"):
            checkpoint.save(self.log.folder / CHECKPOINTS, self.run_state.step, tensors, state, keep)

    def _restore(self, path: Path) -> None:
        tensors, state = self.processes.from_main(checkpoint.load(path) if self.processes.main else None)
        values = self.settings.flat()
        # What memory had room for goes on; a size that is written now does too.
        wanted = {key.rpartition(".")[2]: values[key] for key in SIZE_KEYS if key in self.start.changed}
        try:
            sizes = {name: wanted.get(name, size) for name, size in state["sizes"].items()}
            self.trainer.restore(tensors, state | {"sizes": sizes})
            self.run_state = RunState(**state["standing"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"{path}: not a checkpoint of this run ({type(error).__name__}: {error}); remove it to go on "
                "from the one before"
            ) from error
        summary = self.processes.from_main(self.log.summary())
        if is_finished(summary) and summary["steps"] == self.run_state.step and summary["accuracy_after"]:
            self.run_state.add_evaluation(summary["accuracy_after"])  # made when the checkpoint was there
        restore_random_states(tensors["random"])
        self.progress.message(f"going on from step {self.run_state.step} ({path})")

    def _save_adapter(self, name: str) -> None:
        if not self.processes.main:
            return
        with self._saving(f"{name}/"):
            checkpoint.save_adapter(self.policy.peft_model, self.log.folder / name)

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """Inside, what cannot be written ends the run with one line: its last checkpoint is whole."""
        try:
            yield
        except OSError as error:
            folder = self.log.folder
            raise UserError(
                f"{folder}: {what} cannot be written ({error.strerror or error}); free the space or make it "
                f"writable, then twig train {folder} --resume"
            ) from error

    def _save_environment(self) -> None:
        model, device = self.policy.model, self.policy.device
        self.log.save_environment(
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            dtype=str(model.dtype),
            quantization=quantization_of(model.config),
            model_revision=getattr(model.config, "_commit_hash", None),  # None: not from the Hub
            data_revision=data_revision(self.task),
            passed=self.passed or None,
            reward_file_sha256=self.code,
            processes=self.processes.size,
        )
