"""One training step: prompts, completions, rewards, tries, credit, packs, gradient, optimizer.

Data flows down this file once per step. What lives from step to step is the adapter, the optimizer, the
position in the data and the queue of restarts. Knows nothing of files, checkpoints or displays.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerState, get_scheduler

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings
from twig.config.sizes import DEFAULT_SIZES, Sizes, with_sizes
from twig.core.algorithms.assign import assign, entropy_at_quantile
from twig.core.objective import Surrogate, shrink
from twig.core.replay import Restart, choose_restart
from twig.core.rng import CREDIT, DATA, REPLAY, generator
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Group
from twig.engine.policy import Policy
from twig.engine.sampler import Drawn, Request, Sampled, sample
from twig.engine.update import Passes
from twig.runtime.processes import ALONE, Processes
from twig.tasks.base import Task
from twig.tasks.prompts import encode_prompt, refuse_too_long
from twig.tasks.rewards import Rewarding, Rewards, joined, judge
from twig.training.batch import Batch, gaps


class Trainer:
    """Trains `policy` on `task` step by step; `seconds` of each phase of the last step are in its metrics."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        tokenizer: Any,
        task: Task,
        end_ids: list[int],
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        if not task.train:
            raise UserError(
                f"task {task.name}: there is nothing to train on; write task.path=FILE or another split"
            )
        self.settings, self.policy, self.tokenizer, self.task = settings, policy, tokenizer, task
        self.end_ids, self.progress, self.processes = end_ids, progress, processes
        train = settings.train
        self.num_prompts = settings.rollout.prompts_per_step
        if self.num_prompts < processes.size:
            raise UserError(
                f"rollout.prompts_per_step: {self.num_prompts} cannot be shared out among {processes.size} "
                f"processes; write rollout.prompts_per_step={processes.size} or more, or start fewer"
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
        self.skipped_in_a_row = 0  # steps up to now whose gradient was not finite
        self.seconds: dict[str, float] = {}

    # ---- one step
    # ------------------------------------------------------------------------------------------------

    def step(self, step: int) -> tuple[Batch, dict[str, Any]]:
        """Samples and updates; returns what was sampled and the step's metrics. `step` counts from 1."""
        self.seconds = {}
        batch = self.sample(step)
        with self._timed("credit"):
            self.assign_credit(batch, step)
        with self._timed("update"):
            updated = self.update(batch, self.rate_at(step))
        self._queue_restarts(batch, step)
        self._use_smallest_sizes()
        return batch, {**self._measure(batch), **updated, **{f"time/{k}": v for k, v in self.seconds.items()}}

    def sample(self, step: int) -> Batch:
        """The groups of a step, with rewards: restarts that wait come first, the rest are the next prompts.

        With several processes each samples and rewards its share of the prompts.
        """
        chosen = [self._request(slot, restart) for slot, restart in enumerate(self._next_prompts())]
        own = self.processes.share(range(len(chosen)))
        drawn, judged = self._draw([chosen[slot] for slot in own], step)
        parts = self.processes.gather((drawn.completions, *judged))
        rewards = joined([part[1] for part in parts])
        totals = rewards.total.reshape(len(chosen), -1)
        completions = [found for part in parts for found in part[0]]
        cells = dict(zip(own, drawn.prompt_cells, strict=True))
        groups = [
            Group(
                self.task.train[i],
                i,
                request.prompt_ids,
                completions[slot],
                totals[slot],
                request.prefix_length,
                cells.get(slot, np.empty(0, np.int64)),
            )
            for slot, (i, request) in enumerate(chosen)
        ]
        for group in groups:
            length = np.mean([group.prefix_length + len(c) for c in group.completions])
            self.lengths[group.prompt_index] = float(length)
        found = None if parts[0][2] is None else np.concatenate([part[2] for part in parts])
        right = np.concatenate([part[3] for part in parts])
        return Batch(groups, drawn.boundary, rewards, found, right, own=own)

    def _request(self, slot: int, restart: Restart) -> tuple[int, Request]:
        """A prompt's number in the data, and what to sample for it."""
        rollout, prefix = self.settings.rollout, restart.prefix
        ids = np.concatenate([self._prompt_ids(restart.prompt_index), np.array(prefix, np.int64)])
        left = rollout.max_completion_length - len(prefix)
        expected = self._expected_length(restart.prompt_index) - len(prefix)
        return restart.prompt_index, Request(ids, rollout.num_generations, left, slot, len(prefix), expected)

    def _draw(
        self, asked: list[tuple[int, Request]], step: int
    ) -> tuple[Sampled, tuple[Rewards, np.ndarray | None, np.ndarray]]:
        """The completions; their rewards, whether an answer was found, and whether it is right."""
        rollout = self.settings.rollout
        requests = [request for _, request in asked]
        state = TrainerState(global_step=step - 1, max_steps=self.total_steps)
        rewarding = Rewarding(self.task, state)

        def begin_rewards(wave: list[Drawn]) -> None:
            rewarding.start(
                [each.request * rollout.num_generations + each.number for each in wave],
                [self.task.train[asked[each.request][0]] for each in wave],
                [each.completion.text for each in wave],
                [_whole(requests[each.request], each.completion) for each in wave],
            )

        self.progress.phase("sampling", len(requests) * rollout.num_generations)
        with self._timed("sample"):
            drawn = sample(
                self.policy,
                requests,
                end_ids=self.end_ids,
                decode=self._decode,
                seed=self.settings.train.seed,
                step=step,
                wave_size=self.sizes.wave_size,
                stop=rollout.stop,
                on_wave=begin_rewards,
            )
        if self.policy.decode_refusal is not None:
            why, self.policy.decode_refusal = self.policy.decode_refusal, None
            self.progress.message(f"sampling goes on with rollout.decode={self.policy.decode}: {why}")
        if drawn.wave_size < self.sizes.wave_size:
            self.sizes = replace(self.sizes, wave_size=drawn.wave_size)
            self.progress.message(
                f"memory ran out while sampling: going on with rollout.wave_size={drawn.wave_size}, "
                "results stay the same"
            )
        pairs = zip(requests, drawn.completions, strict=True)
        flat = [(request, c) for request, completions in pairs for c in completions]
        examples = [self.task.train[i] for i, request in asked for _ in range(request.num)]
        with self._timed("reward"):
            texts = [c.text for _, c in flat]
            rewards = rewarding.finish(examples, texts, [_whole(*each) for each in flat])
            return drawn, (rewards, *judge(self.task, examples, texts, rewards.total))

    def assign_credit(self, batch: Batch, step: int) -> None:
        """Fills in the batch's tries and credits, one per group that has any reward."""
        options = self.settings.algorithm
        trained = []
        for slot, group in enumerate(batch.groups):
            group = group.where(~np.isnan(group.rewards))
            if not group.completions:
                continue
            ids, entropies = zip(*((c.ids, c.entropies) for c in group.completions), strict=True)
            finished = np.array([c.finished for c in group.completions])
            batch.slots.append(slot)
            trained.append(finished if options.mask_truncated_completions else np.ones(len(ids), bool))
            batch.rewarded.append(group)
            batch.tries.append(PrefixTrie.build(ids, group.rewards, entropies))
        floor = None  # of the whole step, as in the paper
        if options.top_entropy_quantile < 1:
            floor = entropy_at_quantile(batch.tries, trained, options.top_entropy_quantile)
        for slot, trie, kept in zip(batch.slots, batch.tries, trained, strict=True):
            rng = generator(self.settings.train.seed, CREDIT, slot, step)
            batch.credits.append(assign(trie, options, rng, len(batch.groups), kept, floor))

    def update(self, batch: Batch, learning_rate: float) -> dict[str, Any]:
        """Takes `num_iterations` optimizer steps on the batch; returns their metrics.

        Where nothing has weight there is no step and no decay: Adam would move the adapter on a zero
        gradient. A loss or gradient that is not finite moves nothing either, and ends the iterations on the
        batch.
        """
        options, policy, limit = self.settings.algorithm, self.policy, self.settings.train.max_grad_norm
        parts = batch.own_parts()
        passes = Passes(policy, self.sizes, self.progress, *parts, batch.boundary)
        metrics: dict[str, Any] = {
            "learning_rate": learning_rate,
            "tokens/selected": sum(int(c.weighted.sum()) for c in batch.credits),
            "tokens/nodes_run": 0,
            "loss": 0.0,
            "grad_norm": 0.0,
            "optimizer/skipped": 0,
        }
        if not metrics["tokens/selected"]:
            return metrics
        self.progress.phase("updating", len(passes.packs) * options.num_iterations)
        surrogate = Surrogate(
            options.epsilon,
            options.epsilon_high,
            options.beta,
            bias_correction=options.use_bias_correction_kl,
        )
        old = passes.logps() if options.num_iterations > 1 else None
        ref = None
        if options.beta > 0:
            with policy.base():
                ref = passes.logps()
        for iteration in range(options.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            logps, loss = passes.backward(surrogate, old, ref)
            self.processes.sum_gradients(self.parameters)
            done = (loss, passes.num_tokens, passes.num_rows, *gaps(*parts, logps, ref))
            losses, runs, rows, *found = zip(*self.processes.gather(done), strict=True)
            loss = sum(losses)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit or math.inf))
            if iteration == 0:
                metrics |= {"loss": loss, "grad_norm": norm, "sampling/logp_gap": max(found[0])}
                if ref is not None:
                    metrics["kl"] = sum(found[1]) / max(sum(found[2]), 1e-12)
            if not (math.isfinite(norm) and math.isfinite(loss)):
                metrics["optimizer/skipped"] = 1
                break
            self._optimize(learning_rate, options.l2)
        self.sizes = passes.sizes  # the smaller ones, where memory ran out
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["optimizer/skipped"] else 0
        metrics["tokens/nodes_run"] = sum(runs) * (iteration + 1)
        without_gradient = (old is not None) + (ref is not None)
        flops = policy.update_flops(sum(runs), sum(rows), iteration + 1, without_gradient)
        if flops is not None:
            metrics["flops/update"] = flops
        return metrics

    def _use_smallest_sizes(self) -> None:
        """Where memory ran out in one process, all go on with its sizes, so that each could save the run."""
        found = self.processes.gather(self.sizes)
        sizes = replace(
            self.sizes,
            wave_size=min(each.wave_size for each in found),
            pack_size=min(each.pack_size for each in found),
            head_chunk=min(each.head_chunk for each in found),
            checkpoint_layers=any(each.checkpoint_layers for each in found),
        )
        if sizes != self.sizes:
            self.progress.message(
                f"memory ran out in another process: going on with rollout.wave_size={sizes.wave_size}, "
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
    # -------------------------------------------------------------------------------------------------

    def _next_prompts(self) -> list[Restart]:
        """The prompts of the next step; fresh ones are restarts from the beginning."""
        chosen, self.restarts = self.restarts[: self.num_prompts], []
        while len(chosen) < self.num_prompts:
            epoch, at = divmod(self.drawn_prompts, len(self.task.train))
            chosen.append(Restart(int(self._order(epoch)[at]), []))
            self.drawn_prompts += 1
        return chosen

    @lru_cache(maxsize=1)  # noqa: B019 - one trainer lives as long as its run
    def _order(self, epoch: int) -> np.ndarray:
        return generator(self.settings.train.seed, DATA, epoch).permutation(len(self.task.train))

    @lru_cache(maxsize=1024)  # noqa: B019
    def _prompt_ids(self, index: int) -> np.ndarray:
        ids = encode_prompt(self.task, self.task.train[index], self.tokenizer, self.settings.task)
        refuse_too_long(self.task, len(ids), self.policy.context_length)
        return ids

    def _expected_length(self, index: int) -> float:
        """Tokens that a prompt's completions are likely to have; without any the limit."""
        if index in self.lengths:
            return self.lengths[index]
        known = self.lengths.values()
        return sum(known) / len(known) if known else self.settings.rollout.max_completion_length

    def _queue_restarts(self, batch: Batch, step: int) -> None:
        options = self.settings.algorithm.replay
        if options.probability == 0:
            return
        right = batch.right.reshape(len(batch.groups), -1)
        for slot, group in enumerate(batch.groups):
            rng = generator(self.settings.train.seed, REPLAY, slot, step)
            restart = choose_restart(group, right[slot], options, rng)
            if restart is not None:
                self.restarts.append(restart)

    def _decode(self, rows: list[np.ndarray]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    # ---- measuring
    # -----------------------------------------------------------------------------------------------

    def _measure(self, batch: Batch) -> dict[str, Any]:
        completions = [c for g in batch.groups for c in g.completions]
        lengths = np.array([len(c) for c in completions])
        rewards = np.array([g.rewards for g in batch.groups])
        given = rewards[~np.isnan(rewards)]
        flat = [bool(len(r := row[~np.isnan(row)]) == 0 or r.min() == r.max()) for row in rewards]
        metrics = {
            "reward": float(given.mean()) if len(given) else None,
            "reward_std": float(
                np.mean([g.rewards.std(ddof=1) for g in batch.rewarded if len(g.rewards) > 1] or [0.0])
            ),
            **batch.rewards.metrics,
            "frac_reward_zero_std": float(np.mean(flat)),
            "answers/right": float(batch.right.mean()),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": int(lengths.min()),
            "completions/max_length": int(lengths.max()),
            "completions/clipped_ratio": float(np.mean([not c.finished for c in completions])),
            "entropy": float(np.concatenate([c.entropies for c in completions]).mean()),
            "tokens/sampled": int(lengths.sum()),
            "replay/groups": sum(g.prefix_length > 0 for g in batch.groups),
        }
        if batch.found is not None:
            metrics["answers/found"] = float(batch.found.mean())
        return metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    # ---- state
    # ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything the next step depends on: (tensors by file, plain values)."""
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
        self.skipped_in_a_row = state["skipped_in_a_row"]


def _whole(request: Request, completion: Completion) -> np.ndarray:
    """The ids of a completion from its beginning, whatever of it the request's prompt holds."""
    return np.concatenate([request.prefix, completion.ids])


def _optimizer(settings: Settings, parameters: list[Tensor]) -> torch.optim.Optimizer:
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


def _schedule(settings: Settings, optimizer: torch.optim.Optimizer, total: int):
    """The learning rate as a function of the step (from 1), by transformers' own schedules; it holds no
    state."""
    train = settings.train
    scheduler = get_scheduler(train.lr_scheduler_type, optimizer, train.warmup_steps, total)
    factor = scheduler.lr_lambdas[0]
    return lambda step: train.learning_rate * factor(step - 1)
