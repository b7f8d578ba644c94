"""`twig eval`: a model or run is loaded, answers its problems, and what came out is recorded."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from twig.adapter import attach
from twig.answers import answer_text
from twig.config import Settings
from twig.evaluate import (
    Evaluation,
    SampledEvaluation,
    checksum_of,
    evaluate_policy,
    judge_all,
    sample_policy,
)
from twig.evaluations import Written
from twig.machine import environment
from twig.measures import Comparison, mcnemar
from twig.models import end_ids, load_model, remote_code_words, suppressed_ids
from twig.policy import Policy
from twig.progress import Progress
from twig.records import Completion, Example, UserError
from twig.sizing import size_run
from twig.tasks import Task, load_task
from twig.usage import PeakMemory


@dataclass(frozen=True)
class Measured:
    """An evaluation: greedy figures, those of the samples if any were asked for, and a row per completion."""

    settings: Settings
    greedy: Evaluation
    sampled: SampledEvaluation | None
    problems: str
    rows: list[dict[str, Any]]
    revision: str | None

    def as_dict(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        settings = self.settings
        return {
            "model": settings.model.name,
            "model_revision": self.revision,
            "adapter": settings.model.adapter,
            "task": settings.task.name,
            "problems": self.problems,
            "greedy": self.greedy.as_dict(),
            "sampled": None if self.sampled is None else self.sampled.as_dict(),
            "settings": settings.model_dump(include={"model", "task", "rollout", "eval", "train"}),
            "versions": environment()["versions"],
        }

    def compare(self, other: Written) -> Comparison:
        """McNemar's test of the greedy answers; raises UserError where the problems are not the same."""
        if other.problems != self.problems:
            raise UserError(
                f"--against: {other.folder} answered other problems; evaluate both with the same task, data "
                "and --limit"
            )
        return mcnemar(np.array([r["right"] for r in self.rows if r["sample"] is None], bool), other.right)


def measure_model(
    settings: Settings, samples: int | None = None, progress: Progress | None = None
) -> Measured:
    """Evaluates the model (with `model.adapter`, if set) that the settings name on its task's evaluation
    problems, as many at once as memory has room for. Raises UserError for what can be fixed."""
    progress = progress or Progress()
    progress.phase("loading")
    task = load_task(settings, notice=progress.notice)
    if not task.eval:
        raise UserError(f"task {task.name}: nothing to evaluate on; write task.eval_split= the split to use")
    if settings.model.trust_remote_code:
        progress.notice(remote_code_words(settings.model))
    policy, tokenizer, ends = _load(settings)
    with PeakMemory(str(policy.device)) as memory:
        asked = {"begins": False, "samples": samples or 1}
        settings = size_run(settings, task, tokenizer, policy.model, memory, **asked).settings
        if settings.rollout.decode == "plain":  # captured steps may leave too little room
            policy.decode = "plain"
        common = {
            "end_ids": ends,
            "max_completion_length": settings.rollout.max_completion_length,
            "limit": settings.eval.limit,
            "batch_size": settings.eval.batch_size,
            "stop": settings.rollout.stop,
            "progress": progress,
        }
        of = (policy, tokenizer, task, settings.task)
        greedy, completions = evaluate_policy(*of, **common)
        sampled, found = None, []
        if samples is not None:
            sampled, found = sample_policy(*of, samples=samples, seed=settings.train.seed, **common)
    examples = list(task.eval[: len(completions)])
    rows = _rows(task, examples, completions, [None] * len(examples), range(len(examples)))
    for number, (example, group) in enumerate(zip(examples, found, strict=False)):
        own = [example] * len(group)
        rows += _rows(task, own, group, list(range(len(group))), [number] * len(group))
    revision = getattr(policy.model.config, "_commit_hash", None)
    return Measured(settings, greedy, sampled, checksum_of(examples), rows, revision)


def _load(settings: Settings) -> tuple[Policy, Any, list[int]]:
    model, tokenizer = load_model(settings.model)
    vocabulary = len(model.get_output_embeddings().weight)
    suppressed = suppressed_ids(model, settings.rollout.suppress_tokens, vocabulary)
    ends = end_ids(model, tokenizer)
    # A new adapter adds nothing until it is trained: without model.adapter this is the model itself.
    peft_model = attach(model, **dict(settings.lora), adapter=settings.model.adapter)
    policy = Policy(
        peft_model,
        temperature=settings.rollout.temperature,
        suppress_tokens=suppressed,
        plain=settings.model.engine == "plain",
        decode=settings.rollout.decode,
    )
    return policy, tokenizer, ends


def _rows(
    task: Task, examples: list[Example], completions: list[Completion], samples: list, numbers: Any
) -> list[dict[str, Any]]:
    right = judge_all(task, examples, completions)
    lenient = task.score_lenient
    return [
        {
            "problem": number,
            "sample": which,  # null: the greedy answer
            "prompt": example.prompt,
            "answer": example.columns.get("answer"),
            "completion": completion.text,
            "tokens": len(completion),
            "finished": completion.finished,
            "read": None if task.score is None else answer_text(completion.text),
            "right": bool(r),
            "right_lenient": None if lenient is None else lenient(completion.text, example).right,
        }
        for number, which, example, completion, r in zip(
            numbers, samples, examples, completions, right, strict=True
        )
    ]
