"""Trains runs of the study with TRL's GRPOTrainer in place of Twig, and evaluates them as Twig does.

    python scripts/study_trl.py RUN_FOLDER     # by the settings in its config.yaml, to the end

The settings mean what they mean in Twig: the model, the new adapter, problems, rewards, sampling, optimizer
and the number of tokens. The order of the problems and the noise of sampling are TRL's own. The whole batch
is one micro-batch, the quickest on a CPU. Evaluations are made by Twig on a second copy of the model, which
gets the trained adapter; their time is not counted. The run folder has the files that `twig.study.tables`
reads. A finished run is left as it is; any other starts over.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.config.load import Settings, load
from twig.config.sizes import Sizes
from twig.core.algorithms.grpo import Grpo
from twig.engine.load import pick_device
from twig.evaluation.evaluate import Evaluation, evaluate_policy
from twig.evaluation.prepare import Given, Parts, prepare
from twig.planner.choose import Machine, Sized, size_run
from twig.runs.folder import RunLog
from twig.runs.reader import is_finished
from twig.runtime.memory_use import PeakMemory
from twig.tasks.base import Task, data_checksums, data_revision
from twig.tasks.prompts import encode_prompt, render_prompt
from twig.tasks.rewards import score_completions

_ENDLESS = 10**6  # steps: the run ends by its number of tokens
_SAME_REWARD = 1e-9  # rewards as close as this give no credit


def main(argv: list[str] | None = None) -> int:
    """Trains the run in the folder unless it is finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    train_run(parser.parse_args(argv).folder)
    return 0


def train_run(folder: Path) -> None:
    """Trains the run of which `folder` has the config.yaml, from the beginning unless it is finished."""
    log = RunLog.open(folder)
    try:
        if is_finished(log.summary()):
            return
        log.rewind(-1)
        settings = load(str(folder))
        parts = _parts(settings)
        log.save_environment(
            device="cpu",
            dtype="torch.float32",
            data_revision=data_revision(data_checksums(parts.task)),
            processes=1,
        )
        watch = _Watch(log, parts)
        with tempfile.TemporaryDirectory() as unused:
            trainer = _trainer(parts, watch, unused)
            watch.begin(trainer.model)
            trainer.train()
        log.save_summary(watch.summary())
    finally:
        log.close()


def _parts(settings: Settings) -> Parts:
    """Returns the task, and the model with a new adapter that evaluates and that training starts from."""
    with PeakMemory(str(pick_device(settings.model.device))) as memory:

        def size(settings: Settings, task: Task, tokenizer: Any, model: Any) -> Sized:
            return size_run(settings, task, tokenizer, model, Machine(memory), strict=False)

        return prepare(settings, Given(), size, Progress())


@dataclass
class _Watch(TrainerCallback):
    """Rewards completions, counts tokens, evaluates, writes the run folder, and ends the run."""

    log: RunLog
    parts: Parts
    model: Any = None
    began: float = 0.0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def begin(self, model: Any) -> None:
        """Gives the trainer's model the adapter that a run of Twig begins with, and evaluates it."""
        self.model = model
        own = self._adapter()
        assert own.keys() == self.parts.policy.parameters.keys(), "TRL trains another adapter"
        for name, value in self.parts.policy.parameters.items():
            own[name].data.copy_(value.data)
        if self.parts.settings.eval.before:
            self._evaluate()

    def reward(
        self, completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """Rewards the completions of a step by the task's own rewards."""
        task, rows = self.parts.task, columns["row"]
        examples = [task.train[row] for row in rows]
        total = score_completions(task, examples, completions, completion_ids).total
        groups = total.reshape(-1, self.parts.settings.rollout.num_generations)
        credited = (abs(groups - groups.mean(1, keepdims=True)) > _SAME_REWARD).reshape(-1)
        lengths = [len(ids) for ids in completion_ids]
        prompts = [len(encode_prompt(task, example, self.parts.tokenizer)) for example in examples]
        self.rows.append(
            {
                "reward": float(total.mean()),
                "tokens/sampled": sum(lengths),
                "tokens/selected": sum(n for n, counts in zip(lengths, credited, strict=True) if counts),
                "tokens/nodes_run": sum(lengths) + sum(prompts),
            }
        )
        return total.tolist()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A step has ended: TRL logs each of them, and at the end its totals."""
        if state.global_step == self.step:
            return
        self.step = state.global_step
        assert len(self.rows) == self.step, "a step is one batch and one optimizer step"
        row = self.rows[-1]
        row |= {"entropy": logs["entropy"], "loss": logs["loss"], "grad_norm": logs["grad_norm"]}
        row["time/step"] = time.perf_counter() - self.began
        self.log.log(self.step, row)
        control.should_training_stop = self._is_over()
        every = self.parts.settings.eval.steps
        if self._is_over() or (every and self.step % every == 0):
            self._evaluate()
        self.began = time.perf_counter()

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json."""
        before = next((figures for step, figures in self.evaluations if step == 0), None)
        return {
            "schema_version": 1,
            "status": "finished",
            "algorithm": "grpo",
            "trl": version("trl"),
            "task": self.parts.task.name,
            "steps": self.step,
            "accuracy_before": before,
            "accuracy_after": self.evaluations[-1][1],
            "tokens_sampled": self._sum("tokens/sampled"),
            "tokens_selected": self._sum("tokens/selected"),
            "nodes_run": self._sum("tokens/nodes_run"),
            "update_flops": None,
            "seconds": self._sum("time/step"),
        }

    def _is_over(self) -> bool:
        train = self.parts.settings.train
        return self._sum("tokens/sampled") >= (train.max_tokens or float("inf"))

    def _sum(self, column: str) -> Any:
        return sum(row[column] for row in self.rows)

    def _adapter(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _evaluate(self) -> None:
        """Evaluates the adapter as it is now, as Twig does."""
        settings, policy = self.parts.settings, self.parts.policy
        for name, value in self._adapter().items():
            policy.parameters[name].data.copy_(value.data)
        sampling = replace(self.parts.sampling, wave_size=Sizes.of(settings).eval_batch_size)
        measured: Evaluation = evaluate_policy(
            policy, self.parts.tokenizer, self.parts.task, sampling, limit=settings.eval.limit
        )[0]
        self.log.save_evaluation(self.step, measured.each())
        self.evaluations.append((self.step, measured.as_dict()))
        print(f"step {self.step}: accuracy {measured.value:.3f}", flush=True)


def _trainer(parts: Parts, watch: _Watch, output: str) -> GRPOTrainer:
    """Returns TRL's trainer with the settings of the run; it saves nothing in `output`, but needs it."""
    settings, task = parts.settings, parts.task
    asset = files("twig") / "assets" / settings.model.name
    base = str(asset) if asset.is_dir() else settings.model.name
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = next(iter(parts.policy.peft_model.peft_config.values()))
    assert isinstance(adapter, LoraConfig)
    disable_progress_bars()
    data = [
        {"prompt": render_prompt(task, example, tokenizer), "row": row}
        for row, example in enumerate(task.train)
    ]
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        reward_funcs=watch.reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(data),
        callbacks=[watch],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            target_modules=adapter.target_modules,
            layers_to_transform=adapter.layers_to_transform,
        ),
        args=_arguments(settings, output),
    )


def _arguments(settings: Settings, output: str) -> GRPOConfig:
    """Returns the settings as TRL has them."""
    train, rollout, algorithm = settings.train, settings.rollout, settings.algorithm
    if type(algorithm) is not Grpo or algorithm.num_iterations != 1:
        raise UserError("algorithm.name", "only GRPO with one iteration is set up", "Set algorithm.name=grpo")
    return GRPOConfig(
        output_dir=output,
        loss_type="grpo",
        scale_rewards=algorithm.scale_rewards,
        beta=algorithm.beta,
        top_entropy_quantile=algorithm.top_entropy_quantile,
        epsilon=algorithm.epsilon,
        epsilon_high=algorithm.epsilon_high,
        mask_truncated_completions=algorithm.mask_truncated_completions,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        per_device_train_batch_size=rollout.num_generations * rollout.prompts_per_step,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        optim=train.optim,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        max_steps=_ENDLESS,
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    sys.exit(main())
