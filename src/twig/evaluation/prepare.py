"""Builds what an evaluation and a training run work with: task, tokenizer, model and policy.

Knows nothing of training steps or run folders.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.python_files import file_checksum
from twig.common.tokenizer import Tokenizer
from twig.config.from_peft import dropout_note
from twig.config.load import Settings, load
from twig.config.schema import Model
from twig.config.sizes import with_values
from twig.engine.base_policy import BasePolicy
from twig.engine.build import build_policy
from twig.engine.load import end_ids, load_model, load_tokenizer, remote_code_warning, vocabulary_of
from twig.engine.lora import adapter_checksum, adopt, attach, base_of_adapter, saved_dropout
from twig.engine.model_files import Source, source_of
from twig.engine.sampler import SamplingParams
from twig.planner.choose import Sized
from twig.runs.reader import is_adapter
from twig.tasks.base import Task
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt


@dataclass(frozen=True)
class Given:
    """What a caller passes in place of what the settings name; None: take that of the settings."""

    model: PreTrainedModel | PeftModel | None = None
    tokenizer: Tokenizer | None = None
    reward_funcs: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None

    @property
    def base(self) -> PreTrainedModel | None:
        """The model that was passed, of a PEFT model its base."""
        model = self.model
        return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what was passed."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


def settings_for(settings: Settings | dict[str, Any] | str, model: Any) -> Settings | dict[str, Any]:
    """Returns the settings with the name of a model that was passed.

    `model` is a name, a folder (of an adapter too), or a model object: its own name is taken if the settings
    have none.
    """
    if isinstance(model, str | Path):
        named = _names_of(str(model))
    elif model is not None and isinstance(settings, dict) and "name" not in (settings.get("model") or {}):
        named = {"name": getattr(model.config, "_name_or_path", "") or "model"}
    else:
        return load(settings) if isinstance(settings, str) else settings
    if isinstance(settings, dict):
        return {**settings, "model": {**(settings.get("model") or {}), **named}}
    settings = load(settings) if isinstance(settings, str) else settings
    return with_values(settings, {f"model.{key}": value for key, value in named.items()})


def _names_of(model: str) -> dict[str, str]:
    """Returns the settings `model` that a name or a folder means."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() or not is_adapter(folder):
        return {"name": model}
    return {"name": base_of_adapter(folder), "adapter": model}


@dataclass(frozen=True)
class Parts:
    """What an evaluation or a run works with: `sized` has the settings with every size set.

    `sampling` is how completions are sampled while training; `passed` are the names of what the caller
    passed; `reward_file_sha256` is the checksum of `task.reward_file` as it was run (None: there is none, or
    other rewards were passed); `model_sha256` and `adapter_sha256` those of the
    weights of a base and of the adapter to continue from, in local files or passed with the model.
    """

    sized: Sized
    task: Task
    tokenizer: Tokenizer
    policy: BasePolicy
    sampling: SamplingParams
    passed: tuple[str, ...] = ()
    reward_file_sha256: str | None = None
    model_sha256: str | None = None
    adapter_sha256: str | None = None

    @property
    def settings(self) -> Settings:
        return self.sized.settings


def prepare(
    settings: Settings,
    given: Given,
    size: Callable[[Settings, Task, Tokenizer, PreTrainedModel | None], Sized],
    progress: Progress,
    model_settings: Model | None = None,
) -> Parts:
    """Loads everything that can fail before anything is computed; raises UserError for what can be fixed.

    `size` chooses the sizes from settings, task, tokenizer and the model that was passed, before a model is
    loaded. `model_settings` are those to load the model by (None: as in the settings).
    """
    progress.phase("loading")
    reward_file = settings.task.reward_file if given.reward_funcs is None else None
    checksum = None if reward_file is None else file_checksum(reward_file, "task.reward_file")
    datasets = given.train_dataset, given.eval_dataset
    task = load_task(settings, *datasets, given.reward_funcs, progress.notice)
    tokenizer = _tokenizer(settings, given, progress)
    sized = size(settings, task, tokenizer, given.base)
    settings, model, weights = sized.settings, given.model, None
    if model is None:
        chosen = model_settings or settings.model
        model, _ = load_model(chosen, tokenizer)
        weights = source_of(chosen).fetched(chosen.revision).checksum()
    peft_model, begun_from = _adapted(model, settings)
    if settings.model.adapter is not None and (rate := saved_dropout(settings.model.adapter)):
        progress.message(dropout_note(settings.model.adapter, rate))
    base = cast(PreTrainedModel, peft_model.get_base_model())
    _refuse_ids_without_row(task, base, tokenizer)
    if given.model is None:  # the name of the base, not the folder that it lies in on this machine
        for config in peft_model.peft_config.values():
            config.base_model_name_or_path = settings.model.name
    ends = end_ids(base, tokenizer)
    policy = build_policy(peft_model, settings)
    if policy.sharing_refusal:
        progress.message(
            "note: sampling copies each prompt to its completions and takes more memory than planned: "
            + policy.sharing_refusal
        )
    sampling = SamplingParams.of(settings, tokenizer, ends)
    return Parts(sized, task, tokenizer, policy, sampling, given.names, checksum, weights, begun_from)


def _adapted(model: PreTrainedModel | PeftModel, settings: Settings) -> tuple[PeftModel, str | None]:
    """Returns the model with its adapter, and the checksum of one that is trained on."""
    adapter = settings.model.adapter
    if isinstance(model, PeftModel):
        if adapter is not None:
            raise UserError("model.adapter", "the model that was passed has an adapter", "Leave one out")
        return adopt(model), adapter_checksum(model)
    begun_from = None if adapter is None else Source(adapter).checksum()
    # A new adapter changes nothing until it is trained.
    return attach(model, **dict(settings.lora), seed=settings.train.seed, adapter=adapter), begun_from


def _refuse_ids_without_row(task: Task, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Raises UserError if a prompt has a token that the model has no embedding for.

    Only the prompts of a tokenizer that has such tokens are read.
    """
    rows = vocabulary_of(model)
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is not None and max(vocabulary().values(), default=0) < rows:
        return
    for example in (*task.train, *task.eval):
        outside = [int(i) for i in encode_prompt(task, example, tokenizer) if i >= rows]
        if outside:
            raise UserError(
                f"task {task.name}",
                f"a prompt has token {outside[0]} ({tokenizer.decode([outside[0]])!r}), and the model has "
                f"only {rows} tokens",
                "Save the model after model.resize_token_embeddings(len(tokenizer)), or leave such rows out",
            )


def _tokenizer(settings: Settings, given: Given, progress: Progress) -> Tokenizer:
    """Returns the tokenizer: the one that was passed, or that of the model."""
    if given.model is None:
        if settings.model.trust_remote_code:
            progress.notice(remote_code_warning(settings.model))
        return given.tokenizer or load_tokenizer(settings.model)
    if given.tokenizer is None:
        raise UserError("tokenizer", "a model was passed without its tokenizer", "Pass tokenizer=")
    tuned = any(isinstance(module, BaseTunerLayer) for module in given.model.modules())
    if tuned and not isinstance(given.model, PeftModel):
        raise UserError(
            "model",
            "it is the base inside a PEFT model",
            "Pass the PEFT model itself (as run.model is), or a model loaded again",
        )
    return given.tokenizer
