"""Evaluates for `GRPOTrainer`: a finished run's model, or a model before training."""

from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from twig.common.progress import Progress
from twig.common.tokenizer import Tokenizer
from twig.config.load import Settings, load
from twig.config.sizes import Sizes
from twig.engine.build import build_policy
from twig.engine.load import end_ids, pick_device
from twig.engine.sampler import SamplingParams
from twig.evaluation.evaluate import evaluate_policy
from twig.evaluation.prepare import Given, prepare
from twig.planner.choose import Machine, Sized, size_run
from twig.runtime.memory_use import PeakMemory
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.training.session import Run


def evaluate_run(run: Run, data: Any, reward_funcs: Any) -> dict[str, Any]:
    """Returns the evaluation of the model of a finished run."""
    settings = load(str(run.folder))
    task = load_task(settings, None, data, reward_funcs)
    policy = build_policy(run.model, settings)
    ends = end_ids(cast(PreTrainedModel, run.model.get_base_model()), run.tokenizer)
    sampling = SamplingParams.of(settings, run.tokenizer, ends)
    params = replace(sampling, wave_size=Sizes.of(settings).eval_batch_size)
    return evaluate_policy(policy, run.tokenizer, task, params, limit=settings.eval.limit)[0].as_dict()


def evaluate_untrained(
    settings: Settings, model: tuple[PreTrainedModel | PeftModel | None, Any], data: Any, reward_funcs: Any
) -> dict[str, Any]:
    """Returns the evaluation of a model before training; one that was passed is as it was afterwards."""
    given = Given(cast(Any, model[0]), model[1], reward_funcs, None, data)
    with PeakMemory(str(pick_device(settings.model.device))) as memory:

        def size(
            settings: Settings, task: Task, tokenizer: Tokenizer, model: PreTrainedModel | None
        ) -> Sized:
            return size_run(settings, task, tokenizer, model, Machine(memory), strict=False)

        parts = prepare(settings, given, size, Progress())
        params = replace(parts.sampling, wave_size=Sizes.of(parts.settings).eval_batch_size)
        of = (parts.policy, parts.tokenizer, parts.task, params)
        measured = evaluate_policy(*of, limit=settings.eval.limit)[0]
    if given.model is not None and not isinstance(given.model, PeftModel):
        parts.policy.peft_model.unload()
    return measured.as_dict()
