"""One training step: prompts, completions, rewards, tries, credit, packs, gradient, optimizer.

Data flows down this file once per step. What lives from step to step is the adapter, the optimizer, the
position in the data and the queue of restarts. Knows nothing of files, checkpoints or displays.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, get_scheduler

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES, Sizes, with_sizes
from twig.core.algorithms.base import Objective
from twig.core.credit import Scored, assign
from twig.core.objective import shrink
from twig.core.replay import Restart, choose_restart
from twig.core.rng import CREDIT, CURRICULUM, DATA, REPLAY, generator
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Group
from twig.engine.base_policy import BasePolicy
from twig.engine.sampler import Drawn, Request, Sampled, SamplingParams, sample, take_fallback
from twig.engine.update import LogProbs, Passes
from twig.runtime.processes import ALONE, Processes
from twig.tasks.base import Task
from twig.tasks.prompts import encode_prompt, refuse_too_long
from twig.tasks.rewards import Rewarding, Rewards, is_graded, joined, judge
from twig.training.batch import Batch, Outcomes, gaps
from twig.training.metrics import batch_metrics


@dataclass(frozen=True)
class _Asked:
    """A prompt's number in the data, and what to sample for it."""

    prompt_index: int
    request: Request

    def whole(self, completion: Completion) -> np.ndarray:
        """Returns the ids of a completion from its beginning, kept prefix included."""
        return np.concatenate([self.request.prefix, completion.ids])


@dataclass(frozen=True)
class _Answers:
    """What one process sampled: completions by prompt; rewards, answered and right by completion."""

    completions: list[list[Completion]]
    rewards: Rewards
    answered: np.ndarray | None
    right: np.ndarray


@dataclass(frozen=True)
class _Totals:
    """Sums of an update: loss, tokens run, rows of the head, weighted KL and its weights; the largest gap."""

    loss: float = 0.0
    tokens: int = 0
    rows: int = 0
    largest_gap: float = 0.0
    kl: float = 0.0
    kl_weight: float = 0.0


class Trainer:
    """Trains `policy` on `task` step by step; `seconds` of each phase of the last step are in its metrics."""

    def __init__(
        self,
        settings: Settings,
        policy: BasePolicy,
        tokenizer: Any,
        task: Task,
        sampling: SamplingParams,
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        if not task.train:
            raise UserError(
                f"task {task.name}", "there is nothing to train on", "Set task.path=FILE or another split"
            )
        self.settings, self.policy, self.tokenizer, self.task = settings, policy, tokenizer, task
        self.sampling, self.progress, self.processes = sampling, progress, processes
        train = settings.train
        self.num_prompts = settings.rollout.prompts_per_step
        if self.num_prompts < processes.size:
            raise UserError(
                "rollout.prompts_per_step",
                f"{self.num_prompts} cannot be shared out among {processes.size} processes",
                f"Set rollout.prompts_per_step={processes.size} or more, or start fewer processes",
            )
        self.total_steps = train.max_steps or math.ceil(
            train.num_train_epochs * len(task.train) / self.num_prompts
        )
        self.parameters = list(policy.parameters.values())
        self.optimizer = _optimizer(settings, self.parameters)
        self.rate_at = _schedule(settings, self.optimizer, self.total_steps)
        # for who calls this without a plan
        self.sizes = Sizes.of(with_sizes(settings, DEFAULT_SIZES.by_key()))
        self.drawn_prompts = 0  # position in the data: prompts taken so far
        self.restarts: list[Restart] = []
        self.lengths: dict[int, float] = {}  # of a prompt's completions, the last time it was sampled
        self.graded = False  # rewards were more than right or wrong: see `tasks.rewards.is_graded`
        self.settled: set[int] = set()  # problems whose last group was all right or all wrong
        self.passed_over = 0  # problems whose turn passed in this step (`rollout.curriculum`)
        self.skipped_in_a_row = 0  # steps up to now whose gradient was not finite
        self.seconds: dict[str, float] = {}

    # ---- one step

    def step(self, step: int) -> tuple[Batch, dict[str, Any]]:
        """Samples and updates; returns what was sampled and the step's metrics. `step` counts from 1."""
        self.seconds, self.passed_over = {}, 0
        batch = self.sample(step)
        with self._timed("credit"):
            self.assign_credit(batch, step)
        with self._timed("update"):
            updated = self.update(batch, self.rate_at(step))
        # whatever is not skipped ends the row, a step without any signal too
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if updated["optimizer/skipped"] else 0
        self._queue_restarts(batch, step)
        self._use_smallest_sizes()
        if self.settings.rollout.curriculum < 1:
            updated["curriculum/passed_over"] = self.passed_over
        return batch, {**batch_metrics(batch), **updated, **{f"time/{k}": v for k, v in self.seconds.items()}}

    def sample(self, step: int) -> Batch:
        """Returns the groups of a step with their rewards: waiting restarts first, then the next prompts.

        While there are groups without signal, the next prompts take their place, up to `rollout.redraw`
        times.
        """
        batch = self._sample(self._next_prompts(), step, 0)
        for redraw in range(1, self.settings.rollout.redraw + 1):
            places = batch.kept.without_signal
            if not places:
                break
            batch = batch.without(places)
            fresh = self._sample([self._fresh_prompt() for _ in places], step, redraw * self.num_prompts)
            batch = batch.with_groups(places, fresh)
        return batch

    def _sample(self, prompts: Sequence[Restart], step: int, first_slot: int) -> Batch:
        """Samples and rewards a group per prompt; `first_slot` names the noise of the first.

        With several processes each samples and rewards its share of the prompts.
        """
        asked = [self._asked(first_slot + n, restart) for n, restart in enumerate(prompts)]
        own = self.processes.share(range(len(asked)))
        mine = [asked[place] for place in own]
        rewarding = Rewarding(self.task, TrainerState(global_step=step - 1, max_steps=self.total_steps))
        drawn = self._draw(mine, step, rewarding)
        answers = self._answer(mine, drawn, rewarding) if mine else None
        gathered = self.processes.gather(answers, _Answers, Completion, Rewards)
        parts = [part for part in gathered if part is not None]
        rewards = joined([part.rewards for part in parts])
        totals = rewards.total.reshape(len(asked), -1)
        completions = [each for part in parts for each in part.completions]
        cells = dict(zip(own, drawn.prompt_cells, strict=True))
        groups = [
            Group(
                self.task.train[each.prompt_index],
                each.prompt_index,
                each.request.prompt_ids,
                completions[place],
                totals[place],
                each.request.prefix_length,
                cells.get(place, np.empty(0, np.int64)),
            )
            for place, each in enumerate(asked)
        ]
        for group in groups:
            length = np.mean([group.prefix_length + len(c) for c in group.completions])
            self.lengths[group.prompt_index] = float(length)
        answered = [part.answered for part in parts if part.answered is not None]
        right = np.concatenate([part.right for part in parts])
        self.graded = self.graded or is_graded(self.task, rewards.total)
        flags = np.concatenate(answered) if answered else None
        judged = Outcomes(groups, rewards, flags, right, self.graded)
        self._keep_settled(judged)
        return Batch(judged, drawn.boundary, own=own)

    def _asked(self, slot: int, restart: Restart) -> _Asked:
        prefix = restart.prefix
        ids = np.concatenate([self._prompt_ids(restart.prompt_index), np.array(prefix, np.int64)])
        expected = self._expected_length(restart.prompt_index) - len(prefix)
        num = self.settings.rollout.num_generations
        return _Asked(restart.prompt_index, self.sampling.request(ids, num, slot, len(prefix), expected))

    def _draw(self, asked: list[_Asked], step: int, rewarding: Rewarding) -> Sampled:
        """Samples completions, and starts the rewards of each wave while the next one is sampled."""
        num = self.settings.rollout.num_generations

        def begin_rewards(wave: list[Drawn]) -> None:
            rewarding.start(
                [each.request * num + each.number for each in wave],
                [self.task.train[asked[each.request].prompt_index] for each in wave],
                [each.completion.text for each in wave],
                [asked[each.request].whole(each.completion) for each in wave],
            )

        self.progress.phase("sampling", len(asked) * num)
        with self._timed("sample"):
            drawn = sample(
                self.policy,
                [each.request for each in asked],
                replace(self.sampling, wave_size=self.sizes.wave_size),
                step=step,
                on_finished=self.progress.advance,
                on_wave=begin_rewards,
            )
        if (fallback := take_fallback(self.policy)) is not None:
            self.progress.message(fallback)
        if drawn.wave_size < self.sizes.wave_size:
            self.sizes = replace(self.sizes, wave_size=drawn.wave_size)
            self.progress.message(
                f"out of memory while sampling: continuing with rollout.wave_size={drawn.wave_size}; "
                "results stay the same"
            )
        return drawn

    def _answer(self, asked: list[_Asked], drawn: Sampled, rewarding: Rewarding) -> _Answers:
        """Rewards and judges the completions."""
        flat = [
            (each, completion)
            for each, completions in zip(asked, drawn.completions, strict=True)
            for completion in completions
        ]
        examples = [self.task.train[each.prompt_index] for each, _ in flat]
        with self._timed("reward"):
            texts = [completion.text for _, completion in flat]
            rewards = rewarding.finish(examples, texts, [each.whole(c) for each, c in flat])
            judged = judge(self.task, examples, texts, rewards.total)
        return _Answers(drawn.completions, rewards, judged.answered, judged.right)

    def assign_credit(self, batch: Batch, step: int) -> None:
        """Fills in the batch's scored groups, one per group in which a completion has a reward."""
        algorithm = self.settings.algorithm
        rewarded, tries = {}, []
        for slot, group in enumerate(batch.groups):
            group = group.where(~np.isnan(group.rewards))
            if group.completions:
                rewarded[slot] = group
                tries.append(_trie(group, algorithm.mask_truncated_completions))
        rngs = [generator(self.settings.train.seed, CREDIT, slot, step) for slot in rewarded]
        credits, scale = assign(algorithm, tries, rngs, len(batch.groups))
        batch.divisor = float(scale.divisor)
        batch.scored = [
            Scored(group, trie, credit, slot)
            for (slot, group), trie, credit in zip(rewarded.items(), tries, credits, strict=True)
        ]

    def update(self, batch: Batch, learning_rate: float) -> dict[str, Any]:
        """Takes `num_iterations` optimizer steps on the batch; returns their metrics.

        If nothing has weight there is no step and no decay: Adam would move the adapter on a zero gradient. A
        loss or gradient that is not finite moves nothing either, and ends the iterations on the batch.
        """
        algorithm, policy = self.settings.algorithm, self.policy
        objective, scored = algorithm.objective(), batch.own_scored
        passes = Passes(policy, self.sizes, self.progress, scored, batch.boundary)
        metrics: dict[str, Any] = {
            "learning_rate": learning_rate,
            "tokens/selected": sum(int(each.credit.weighted.sum()) for each in batch.scored),
            "tokens/nodes_run": 0,
            "loss": 0.0,
            "grad_norm": 0.0,
            "optimizer/skipped": 0,
        }
        if not metrics["tokens/selected"]:
            return metrics
        self.progress.phase("updating", len(passes.packs) * algorithm.num_iterations)
        given = LogProbs(passes.logps() if algorithm.num_iterations > 1 else None)
        if objective.beta > 0:
            with policy.reference():
                given = replace(given, ref=passes.logps())
        num_forward = (given.old is not None) + (given.ref is not None)
        totals, iteration = _Totals(), 0
        for iteration in range(algorithm.num_iterations):
            if objective.kind == "sequence ratio" and given.old is not None:
                given = replace(given, current=passes.logps() if iteration else given.old)
                num_forward += iteration > 0
            self.optimizer.zero_grad(set_to_none=True)
            totals = self._backward(passes, objective, given)
            limit = self.settings.train.max_grad_norm or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
            if iteration == 0:
                metrics |= {"loss": totals.loss, "grad_norm": norm, "sampling/logp_gap": totals.largest_gap}
                if given.ref is not None:
                    metrics["kl"] = totals.kl / max(totals.kl_weight, 1e-12)
            if not (math.isfinite(norm) and math.isfinite(totals.loss)):
                metrics["optimizer/skipped"] = 1
                break
            self._optimize(learning_rate, algorithm.l2_weight)
        self.sizes = passes.sizes  # smaller ones after out-of-memory
        self.optimizer.zero_grad(set_to_none=True)
        metrics["tokens/nodes_run"] = totals.tokens * (iteration + 1)
        flops = policy.update_flops(totals.tokens, totals.rows, iteration + 1, num_forward)
        if flops is not None:
            metrics["flops/update"] = flops
        return metrics

    def _backward(self, passes: Passes, objective: Objective, given: LogProbs) -> _Totals:
        """Sums the gradient of the batch over all processes; returns what else they sum up."""
        logps, loss = passes.backward(objective, given)
        self.processes.sum_gradients(self.parameters)
        gap = gaps(passes.scored, logps, given.ref)
        own = _Totals(loss, passes.num_tokens, passes.num_rows, gap.largest, gap.kl, gap.kl_weight)
        parts = self.processes.gather(own, _Totals)
        return _Totals(
            sum(part.loss for part in parts),
            sum(part.tokens for part in parts),
            sum(part.rows for part in parts),
            max(part.largest_gap for part in parts),
            sum(part.kl for part in parts),
            sum(part.kl_weight for part in parts),
        )

    def _use_smallest_sizes(self) -> None:
        """After out-of-memory in one process all continue with its sizes, so that any could save the run."""
        every = self.processes.gather(self.sizes, Sizes)
        sizes = replace(
            self.sizes,
            wave_size=min(each.wave_size for each in every),
            pack_size=min(each.pack_size for each in every),
            head_chunk=min(each.head_chunk for each in every),
            checkpoint_layers=any(each.checkpoint_layers for each in every),
        )
        if sizes != self.sizes:
            self.progress.message(
                f"out of memory in another process: continuing with rollout.wave_size={sizes.wave_size}, "
                f"train.pack_size={sizes.pack_size}, train.head_chunk={sizes.head_chunk} and "
                f"train.checkpoint_layers={str(sizes.checkpoint_layers).lower()}; results stay the same"
            )
            self._use(sizes)

    def _use(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.policy.head_chunk, self.policy.checkpoint_layers = sizes.head_chunk, sizes.checkpoint_layers

    def _optimize(self, learning_rate: float, l2: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        shrink(self.parameters, learning_rate, l2)
        self.optimizer.step()

    # ---- prompts

    def _next_prompts(self) -> list[Restart]:
        """Returns the prompts of the next step; a fresh one is a restart from the beginning."""
        chosen, self.restarts = self.restarts[: self.num_prompts], []
        while len(chosen) < self.num_prompts:
            chosen.append(self._fresh_prompt())
        return chosen

    def _fresh_prompt(self) -> Restart:
        while True:
            epoch, at = divmod(self.drawn_prompts, len(self.task.train))
            self.drawn_prompts += 1
            index = int(self._order(epoch)[at])
            if index not in self.settled or self._has_another_turn():
                return Restart(index, [])
            self.passed_over += 1

    def _has_another_turn(self) -> bool:
        """Returns whether the problem of this turn is sampled although its last group taught nothing."""
        chance = self.settings.rollout.curriculum
        return generator(self.settings.train.seed, CURRICULUM, self.drawn_prompts).random() < chance

    def _keep_settled(self, judged: Outcomes) -> None:
        """Keeps which problems' last group was all right or all wrong; restarts show only a part of one."""
        if self.settings.rollout.curriculum == 1:
            return
        without_signal = set(judged.without_signal)
        for place, group in enumerate(judged.groups):
            if group.prefix_length == 0:
                change = self.settled.add if place in without_signal else self.settled.discard
                change(group.prompt_index)

    @lru_cache(maxsize=1)  # noqa: B019 - one trainer lives as long as its run
    def _order(self, epoch: int) -> np.ndarray:
        return generator(self.settings.train.seed, DATA, epoch).permutation(len(self.task.train))

    @lru_cache(maxsize=1024)  # noqa: B019
    def _prompt_ids(self, index: int) -> np.ndarray:
        ids = encode_prompt(self.task, self.task.train[index], self.tokenizer)
        refuse_too_long(self.task, len(ids), self.policy.context_length)
        return ids

    def _expected_length(self, index: int) -> float:
        """Returns how long a prompt's completions were, else the mean of all, else the limit."""
        if index in self.lengths:
            return self.lengths[index]
        lengths = self.lengths.values()
        return sum(lengths) / len(lengths) if lengths else self.settings.rollout.max_completion_length

    def _queue_restarts(self, batch: Batch, step: int) -> None:
        options = self.settings.algorithm.restarts
        if options.probability == 0:
            return
        right = batch.kept.right.reshape(len(batch.groups), -1)
        for slot, group in enumerate(batch.groups):
            rng = generator(self.settings.train.seed, REPLAY, slot, step)
            restart = choose_restart(group, right[slot], options, rng)
            if restart is not None:
                self.restarts.append(restart)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    # ---- state

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Returns everything the next step depends on: tensors by file, and plain values."""
        moments = {}
        for name, parameter in self.policy.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}|{key}"] = torch.as_tensor(value)
        tensors = {"adapter": dict(self.policy.parameters), "optimizer": moments}
        sizes = asdict(self.sizes)
        del sizes["eval_batch_size"]  # no step depends on it
        return tensors, {
            "drawn_prompts": self.drawn_prompts,
            "sizes": sizes,
            "restarts": [r.as_dict() for r in self.restarts],
            "lengths": list(self.lengths.items()),
            "settled": sorted(self.settled),
            "graded": self.graded,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        with torch.no_grad():
            for name, parameter in self.policy.parameters.items():
                parameter.copy_(tensors["adapter"][name])
        for key, value in tensors["optimizer"].items():
            name, _, moment = key.rpartition("|")
            parameter = self.policy.parameters[name]
            place = "cpu" if moment == "step" else parameter.device
            self.optimizer.state[parameter][moment] = value.to(place)
        self.drawn_prompts = state["drawn_prompts"]
        self._use(replace(self.sizes, **state["sizes"]))
        self.restarts = [Restart(**r) for r in state["restarts"]]
        self.lengths = {int(index): length for index, length in state["lengths"]}
        self.settled = set(state.get("settled", []))
        self.graded = state.get("graded", False)
        self.skipped_in_a_row = state["skipped_in_a_row"]


def _trie(group: Group, mask_truncated: bool) -> PrefixTrie:
    """Returns the trie of a group whose completions all have rewards."""
    completions = group.completions
    finished = np.array([c.finished for c in completions])
    return PrefixTrie.build(
        [c.ids for c in completions],
        group.rewards,
        [c.entropies for c in completions],
        finished if mask_truncated else None,
    )


def _optimizer(settings: Settings, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    train = settings.train
    if train.optim == "sgd":
        return torch.optim.SGD(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def _schedule(settings: Settings, optimizer: torch.optim.Optimizer, total: int) -> Callable[[int], float]:
    """Returns the learning rate as a stateless function of the step (from 1), by transformers' schedules."""
    train = settings.train
    scheduler = get_scheduler(train.lr_scheduler_type, optimizer, train.warmup_steps, total)
    assert isinstance(scheduler, LambdaLR), "the schedules in the settings are functions of the step"
    factor = scheduler.lr_lambdas[0]
    return lambda step: train.learning_rate * factor(step - 1)
