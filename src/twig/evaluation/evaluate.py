"""Measures accuracy on problems that are not trained on, with a confidence interval; `twig eval`.

Greedy answers, one per problem, and several sampled ones: pass@k and the majority's answer. Knows nothing of
training.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.tokenizer import Tokenizer
from twig.config.load import Settings
from twig.config.sizes import Sizes, with_values
from twig.core.types import Completion, Example
from twig.engine.base_policy import BasePolicy
from twig.engine.kernels import obstacle
from twig.engine.load import pick_device
from twig.engine.sampler import SamplingParams, sample, take_fallback
from twig.evaluation.prepare import Given, prepare
from twig.evaluation.record import Written
from twig.evaluation.statistics import Comparison, bootstrap, majority, mcnemar, pass_at_k, wilson
from twig.planner.choose import Machine, Sized, size_run
from twig.runtime.machine import environment
from twig.runtime.memory_use import PeakMemory
from twig.runtime.processes import ALONE, Processes
from twig.tasks.answers import answer_text
from twig.tasks.base import Task, as_json
from twig.tasks.prompts import encode_prompt, refuse_too_long
from twig.tasks.rewards import Rewards, is_graded, joined, judge, score_completions


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on `n` problems: `value` in [0, 1] with its 95 % Wilson interval `low` .. `high`.

    `found` is the share of completions with an answer (None if the task cannot tell), `right_lenient` the
    accuracy if the last number of each text were its answer (None if that means nothing), `reward` the mean
    of the rewards given (None if there is none), `mean_length` in tokens, `truncated` the share cut off by
    the length limit. `graded` says that the rewards are more than right or wrong: then their mean is the
    result, not `value`. `right` and `answered` [problems] say for each problem whether its answer is right
    and whether there is one (None if the task cannot tell); `rewards` [problems] are what the answers got,
    NaN where there is none (None if the task itself tells right from wrong); `problems` is the checksum of
    them all.
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
    graded: bool = False
    right: np.ndarray | None = field(default=None, repr=False, compare=False)
    answered: np.ndarray | None = field(default=None, repr=False, compare=False)
    rewards: np.ndarray | None = field(default=None, repr=False, compare=False)
    problems: str | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures, without what they are computed from."""
        each = ("right", "answered", "rewards", "problems")
        return {k: v for k, v in asdict(self).items() if k not in each}

    def each(self) -> dict[str, Any]:
        """Returns what the figures are computed from, as a row of evaluations.jsonl."""
        right, answered = (None if a is None else _digits(a) for a in (self.right, self.answered))
        given = [] if self.rewards is None else self.rewards.tolist()
        rewards = [None if reward != reward else float(f"{reward:.6g}") for reward in given] or None
        return {"problems": self.problems, "right": right, "answered": answered, "rewards": rewards}


def _digits(flags: np.ndarray) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def problems_checksum(examples: Sequence[Example]) -> str:
    """Returns the checksum of problems in their order.

    A problem is its prompt and its answer; without a column `answer`, any other may be what it is judged by.
    """
    digest = hashlib.sha256()
    for example in examples:
        columns = example.columns
        row = [example.prompt, str(columns["answer"]) if "answer" in columns else columns]
        digest.update(as_json(row) + b"\n")
    return f"sha256:{digest.hexdigest()}"


def evaluate_policy(
    policy: BasePolicy,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> tuple[Evaluation, list[Completion]]:
    """Returns the greedy accuracy on the first `limit` evaluation problems, and the completions behind it.

    The task has at least one such problem. With several processes each answers its share of them, and the
    result is that of all.
    """
    assert task.eval, "there is something to evaluate on"
    asked: list[Example] = list(task.eval[: limit or len(task.eval)])
    examples = list(processes.share(asked))
    answers = _Answers(policy, tokenizer, replace(params, greedy=True), progress or Progress())
    own = [completion for (completion,) in answers.draw(task, examples, 1)]
    judged = processes.gather(_judged(task, examples, own), _Judged, Completion, Rewards)
    parts = [part for part in judged if part is not None]
    return _summarise(task, asked, parts), [completion for part in parts for completion in part.completions]


@dataclass(frozen=True)
class SampledEvaluation:
    """`samples` answers to each of `n` problems.

    Each figure is (value, low, high) in [0, 1] with a 95 % interval: `mean` accuracy and `pass_at` k (by
    resampling problems), and `vote`, the share of problems of which the most frequent answer is right
    (Wilson; None if the task reads no answers).
    """

    n: int
    samples: int
    mean: tuple[float, float, float]
    pass_at: dict[int, tuple[float, float, float]]
    vote: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_policy(
    policy: BasePolicy,
    tokenizer: Tokenizer,
    task: Task,
    params: SamplingParams,
    *,
    samples: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> tuple[SampledEvaluation, list[list[Completion]]]:
    """Summarises `samples` answers to each of the first `limit` evaluation problems.

    They are drawn at the policy's temperature. Also returns the completions, per problem.
    """
    examples: list[Example] = list(task.eval[: limit or len(task.eval)])
    groups = _Answers(policy, tokenizer, params, progress or Progress()).draw(task, examples, samples)
    flat = [completion for group in groups for completion in group]
    right = judge_all(task, [e for e in examples for _ in range(samples)], flat).reshape(-1, samples)

    def figure(values: np.ndarray) -> tuple[float, float, float]:
        return float(values.mean()), *bootstrap(values)

    counts = right.sum(1)
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    pass_at = {k: figure(np.array([pass_at_k(int(c), samples, k) for c in counts])) for k in ks}
    vote = None
    if task.score is not None:
        won = sum(_vote_is_right(group, row) for group, row in zip(groups, right, strict=True))
        vote = (won / len(examples), *wilson(won, len(examples)))
    mean = figure(right.mean(1))
    return SampledEvaluation(len(examples), samples, mean, pass_at, vote), groups


def _vote_is_right(completions: list[Completion], right: np.ndarray) -> bool:
    answers = [answer_text(completion.text) for completion in completions]
    voted = majority(answers)
    return voted is not None and bool(right[answers.index(voted)])


def judge_all(task: Task, examples: Sequence[Example], completions: Sequence[Completion]) -> np.ndarray:
    """Returns which of N completions are right, the n-th one an answer to the n-th example; bool [N]."""
    texts = [c.text for c in completions]
    totals = score_completions(task, examples, texts, [c.ids for c in completions]).total
    return judge(task, examples, texts, totals).right


@dataclass(frozen=True)
class _Answers:
    """Answers to problems: who gives them, how they are sampled, and who hears of progress."""

    policy: BasePolicy
    tokenizer: Tokenizer
    params: SamplingParams
    progress: Progress

    def draw(self, task: Task, examples: list[Example], num: int) -> list[list[Completion]]:
        """Returns `num` completions of each example."""
        self.progress.phase("evaluating", len(examples))
        prompts = [encode_prompt(task, example, self.tokenizer) for example in examples]
        refuse_too_long(task, max(map(len, prompts), default=0), self.policy.context_length)
        order = np.argsort([len(p) for p in prompts], kind="stable")  # similar lengths together: less padding
        params = replace(self.params, record=False)
        answers: list[list[Completion]] = [[] for _ in examples]
        problems, finished = max(params.wave_size // num, 1), 0

        def advance(count: int) -> None:
            nonlocal finished
            before, finished = finished // num, finished + count
            self.progress.advance(finished // num - before)

        for start in range(0, len(order), problems):
            chosen = order[start : start + problems]
            requests = [params.request(prompts[i], num, int(i)) for i in chosen]
            drawn = sample(self.policy, requests, params, on_finished=advance)
            for i, completions in zip(chosen, drawn.completions, strict=True):
                answers[i] = completions
            if (fallback := take_fallback(self.policy)) is not None:
                self.progress.message(fallback)
        return answers


@dataclass(frozen=True)
class _Judged:
    """Completions, their rewards, whether each has an answer (None: the task cannot tell) and a right one."""

    completions: list[Completion]
    rewards: Rewards
    answered: np.ndarray | None
    right: np.ndarray


def _judged(task: Task, examples: list[Example], completions: list[Completion]) -> _Judged | None:
    """Judges completions; None if there is none."""
    if not completions:
        return None
    texts = [c.text for c in completions]
    rewards = score_completions(task, examples, texts, [c.ids for c in completions])
    judged = judge(task, examples, texts, rewards.total)
    return _Judged(completions, rewards, judged.answered, judged.right)


def _summarise(task: Task, examples: list[Example], parts: list[_Judged]) -> Evaluation:
    completions = [completion for part in parts for completion in part.completions]
    rewards = joined([part.rewards for part in parts])
    right = np.concatenate([part.right for part in parts])
    flags = [part.answered for part in parts if part.answered is not None]
    answered = np.concatenate(flags) if flags else None
    low, high = wilson(int(right.sum()), len(right))
    given = rewards.total[~np.isnan(rewards.total)]
    return Evaluation(
        value=float(right.mean()),
        low=low,
        high=high,
        n=len(right),
        found=None if answered is None else float(answered.mean()),
        right_lenient=rewards.metrics.get("answers/right_lenient"),
        reward=float(given.mean()) if len(given) else None,
        mean_length=float(np.mean([len(c) for c in completions])),
        truncated=float(np.mean([not c.finished for c in completions])),
        graded=is_graded(task, rewards.total),
        right=right,
        answered=answered,
        rewards=rewards.total if task.score is None else None,
        problems=problems_checksum(examples),
    )


@dataclass(frozen=True)
class Measured:
    """An evaluation: greedy figures, those of the samples if there are any, and a row per completion."""

    settings: Settings
    greedy: Evaluation
    sampled: SampledEvaluation | None
    problems: str
    rows: list[dict[str, Any]]
    revision: str | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of evaluation.json."""
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
        """Tests the greedy answers by McNemar's test; raises UserError if the problems are not the same."""
        if other.problems != self.problems:
            problem = f"{other.folder} answered other problems"
            raise UserError("--against", problem, "Evaluate both with the same task, data and --limit")
        return mcnemar(np.array([r["right"] for r in self.rows if r["sample"] is None], bool), other.right)


def measure_model(
    settings: Settings, samples: int | None = None, progress: Progress | None = None
) -> Measured:
    """Evaluates the model that the settings name, `model.adapter` included, on its task's problems.

    As many are answered at once as fit into memory. Raises UserError for what can be fixed.
    """
    progress = progress or Progress()
    with PeakMemory(str(pick_device(settings.model.device))) as memory:

        def size(
            settings: Settings, task: Task, tokenizer: Tokenizer, model: PreTrainedModel | None
        ) -> Sized:
            if not task.eval:
                problem = f"task {task.name} has nothing to evaluate on"
                raise UserError("task.eval_split", problem, "Set task.eval_split= the split to use")
            machine = Machine(memory)
            if settings.model.kernels == "onednn" and (obstacle() or not memory.device.startswith("cpu")):
                settings = with_values(settings, {"model.kernels": "torch"})  # trained on another machine
            return size_run(settings, task, tokenizer, model, machine, strict=False, samples=samples or 1)

        parts = prepare(settings, Given(), size, progress)
        settings, task, limit = parts.settings, parts.task, parts.settings.eval.limit
        params = replace(parts.sampling, wave_size=Sizes.of(settings).eval_batch_size)
        of = (parts.policy, parts.tokenizer, task, params)
        greedy, completions = evaluate_policy(*of, limit=limit, progress=progress)
        sampled, groups = None, []
        if samples is not None:
            sampled, groups = sample_policy(*of, samples=samples, limit=limit, progress=progress)
    examples = list(task.eval[: len(completions)])
    rows = _rows(task, examples, completions, [None] * len(examples), range(len(examples)))
    for number, (example, group) in enumerate(zip(examples, groups, strict=False)):
        own = [example] * len(group)
        rows += _rows(task, own, group, list(range(len(group))), [number] * len(group))
    revision = getattr(parts.policy.model.config, "_commit_hash", None)
    return Measured(settings, greedy, sampled, problems_checksum(examples), rows, revision)


def _rows(
    task: Task,
    examples: list[Example],
    completions: list[Completion],
    samples: Iterable[int | None],
    numbers: Iterable[int],
) -> list[dict[str, Any]]:
    """Returns rows of completions.jsonl; `samples` are the numbers of the answers (None: the greedy one)."""
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
