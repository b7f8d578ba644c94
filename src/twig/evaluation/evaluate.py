"""Accuracy on problems that are not trained on, with a confidence interval; `twig eval`.

Greedy answers, one per problem, and several sampled ones: pass@k and the majority's answer. Knows nothing of
training.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.core.types import Completion, Example
from twig.engine.load import end_ids, load_model, remote_code_words, suppressed_ids
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import Request, sample
from twig.evaluation.record import Written
from twig.evaluation.statistics import Comparison, bootstrap, majority, mcnemar, pass_at_k, wilson
from twig.planner.choose import size_run
from twig.runtime.machine import environment
from twig.runtime.memory_use import PeakMemory
from twig.runtime.processes import ALONE, Processes
from twig.tasks.answers import answer_text
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt, refuse_too_long
from twig.tasks.rewards import joined, judge, score_completions


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on `n` problems: `value` in [0, 1] with its 95 % Wilson interval `low` .. `high`.

    `found` is the share in which an answer was found at all (None where the task cannot tell),
    `right_lenient` the accuracy if the last number of each text were its answer (None where that means
    nothing), `reward` the mean of the rewards that were given (None where none was), `mean_length` in tokens,
    `truncated` the share cut off by the length limit. `right` and `answered` [problems] say of each problem
    whether its answer is right and whether there is one (None where the task cannot tell); `problems` is the
    checksum of them all.
    """

    value: float
    low: float
    high: float
    n: int
    found: float | None
    right_lenient: float | None
    reward: float | None
    mean_length: float
    truncated: float
    right: np.ndarray | None = field(default=None, repr=False, compare=False)
    answered: np.ndarray | None = field(default=None, repr=False, compare=False)
    problems: str | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures, without what they are made from."""
        return {k: v for k, v in asdict(self).items() if k not in ("right", "answered", "problems")}

    def each(self) -> dict[str, Any]:
        """What the figures are made from, as evaluations.jsonl has it."""
        right, answered = (None if a is None else _digits(a) for a in (self.right, self.answered))
        return {"problems": self.problems, "right": right, "answered": answered}


def _digits(flags: np.ndarray) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def problems_checksum(examples: Sequence[Example]) -> str:
    """The checksum of problems and their answers, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.prompt, str(example.columns.get("answer"))]
        digest.update(json.dumps(row).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def evaluate_policy(
    policy: Policy,
    tokenizer: Any,
    task: Task,
    task_settings: Any,
    *,
    end_ids: Sequence[int],
    max_completion_length: int,
    limit: int | None = None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> tuple[Evaluation, list[Completion]]:
    """The greedy accuracy on the first `limit` evaluation problems (there is at least one), and the
    completions behind it. With several processes each answers its share of them, and the result is that of
    all."""
    assert task.eval, "there is something to evaluate on"
    asked: list[Example] = list(task.eval[: limit or len(task.eval)])
    examples = list(processes.share(asked))
    how = {"end_ids": end_ids, "stop": stop, "greedy": True}
    found = _answers(
        policy, tokenizer, task, task_settings, examples, 1, max_completion_length, batch_size, progress, how
    )
    own = [completion for (completion,) in found]
    parts = [part for part in processes.gather(_judged(task, examples, own)) if part is not None]
    completions = [completion for part in parts for completion in part[0]]
    return _summarise(asked, parts), completions


@dataclass(frozen=True)
class SampledEvaluation:
    """`samples` answers to each of `n` problems. Each figure is (value, low, high) in [0, 1] with a 95 %
    interval: `mean` accuracy and `pass_at` k (by resampling problems), and `vote`, the share of problems of
    which the most frequent answer is right (Wilson; None where the task reads no answers)."""

    n: int
    samples: int
    mean: tuple[float, float, float]
    pass_at: dict[int, tuple[float, float, float]]
    vote: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_policy(
    policy: Policy,
    tokenizer: Any,
    task: Task,
    task_settings: Any,
    *,
    samples: int,
    end_ids: Sequence[int],
    max_completion_length: int,
    limit: int | None = None,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[SampledEvaluation, list[list[Completion]]]:
    """`samples` answers to each of the first `limit` evaluation problems at the policy's temperature, summed
    up; and the completions, per problem."""
    examples: list[Example] = list(task.eval[: limit or len(task.eval)])
    how = {"end_ids": end_ids, "stop": stop, "seed": seed}
    found = _answers(
        policy,
        tokenizer,
        task,
        task_settings,
        examples,
        samples,
        max_completion_length,
        batch_size,
        progress,
        how,
    )
    flat = [completion for group in found for completion in group]
    right = judge_all(task, [e for e in examples for _ in range(samples)], flat).reshape(-1, samples)

    def figure(values: np.ndarray) -> tuple[float, float, float]:
        return float(values.mean()), *bootstrap(values)

    counts = right.sum(1)
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    pass_at = {k: figure(np.array([pass_at_k(int(c), samples, k) for c in counts])) for k in ks}
    vote = None
    if task.score is not None:
        won = sum(_vote_is_right(group, row) for group, row in zip(found, right, strict=True))
        vote = (won / len(examples), *wilson(won, len(examples)))
    mean = figure(right.mean(1))
    return SampledEvaluation(len(examples), samples, mean, pass_at, vote), found


def _vote_is_right(completions: list[Completion], right: np.ndarray) -> bool:
    answers = [answer_text(completion.text) for completion in completions]
    voted = majority(answers)
    return voted is not None and bool(right[answers.index(voted)])


def judge_all(task: Task, examples: Sequence[Example], completions: Sequence[Completion]) -> np.ndarray:
    """Which of N completions are right, the n-th one an answer to the n-th example; bool [N]."""
    texts = [c.text for c in completions]
    totals = score_completions(task, examples, texts, [c.ids for c in completions]).total
    return judge(task, examples, texts, totals)[1]


def _answers(
    policy: Policy,
    tokenizer: Any,
    task: Task,
    task_settings: Any,
    examples: list[Example],
    num: int,
    max_completion_length: int,
    batch_size: int | None,
    progress: Progress | None,
    how: dict[str, Any],
) -> list[list[Completion]]:
    """`num` completions of each example, `batch_size` at a time."""
    progress = progress or Progress()
    progress.phase("evaluating", len(examples))
    prompts = [encode_prompt(task, example, tokenizer, task_settings) for example in examples]
    refuse_too_long(task, max(map(len, prompts), default=0), policy.context_length)
    order = np.argsort([len(p) for p in prompts], kind="stable")  # like lengths together: less padding
    size = batch_size or 128
    found: list[list[Completion]] = [[] for _ in examples]
    problems = max(size // num, 1)
    for start in range(0, len(order), problems):
        chosen = order[start : start + problems]
        drawn = sample(
            policy,
            [Request(prompts[i], num, max_completion_length, int(i)) for i in chosen],
            decode=lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True),
            wave_size=size,
            record=False,
            **how,
        )
        for i, completions in zip(chosen, drawn.completions, strict=True):
            found[i] = completions
        progress.advance(len(chosen))
    return found


def _judged(task: Task, examples: list[Example], completions: list[Completion]) -> tuple | None:
    """The completions, their rewards, whether an answer was found and whether it is right; None for none."""
    if not completions:
        return None
    texts = [c.text for c in completions]
    rewards = score_completions(task, examples, texts, [c.ids for c in completions])
    return completions, rewards, *judge(task, examples, texts, rewards.total)


def _summarise(examples: list[Example], parts: list[tuple]) -> Evaluation:
    drawn, shares, founds, rights = zip(*parts, strict=True)
    completions = [completion for each in drawn for completion in each]
    rewards, right = joined(shares), np.concatenate(rights)
    found = None if founds[0] is None else np.concatenate(founds)
    low, high = wilson(int(right.sum()), len(right))
    given = rewards.total[~np.isnan(rewards.total)]
    return Evaluation(
        value=float(right.mean()),
        low=low,
        high=high,
        n=len(right),
        found=None if found is None else float(found.mean()),
        right_lenient=rewards.metrics.get("answers/right_lenient"),
        reward=float(given.mean()) if len(given) else None,
        mean_length=float(np.mean([len(c) for c in completions])),
        truncated=float(np.mean([not c.finished for c in completions])),
        right=right,
        answered=found,
        problems=problems_checksum(examples),
    )


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
    return Measured(settings, greedy, sampled, problems_checksum(examples), rows, revision)


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
