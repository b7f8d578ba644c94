"""`GRPOTrainer` with TRL's arguments and methods; Twig trains.

What the arguments mean is in `config/from_trl.py`. Everything that has no equal is refused at once, when the
trainer is made; what happens in another way is said in one message.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from twig.common.errors import UserError
from twig.config.from_peft import lora_values
from twig.config.from_trl import (
    Around,
    Translation,
    epoch_steps,
    log_every,
    optimizer_steps,
    quantization,
    translate,
)
from twig.config.load import Settings
from twig.config.schema import Model
from twig.config.trl_names import MAPPED
from twig.core.algorithms.base import Algorithm
from twig.engine.load import load_config, pick_device
from twig.export.export import export_run
from twig.export.upload import Push
from twig.runs.reader import CHECKPOINTS, is_run, read_metrics
from twig.training.session import Run
from twig.training.train import train
from twig.trl.arguments import changed_fields, default_config, progress_callback, trainer_methods
from twig.trl.evaluating import evaluate_run, evaluate_untrained
from twig.trl.events import Events, metrics_of, never_called

logger = logging.getLogger("twig.trl")

_IMAGES = ("image", "images")


class More(TypedDict, total=False):
    """What `GRPOTrainer` takes by keyword, beside its first six arguments.

    `callbacks`, `peft_config` and `quantization_config` as in TRL. `algorithm` is Twig's: a name, a dict of
    the group `algorithm`, or an object, in place of `loss_type`. The others of TRL are refused.
    """

    callbacks: Sequence[Any] | None
    peft_config: Any
    quantization_config: Any
    algorithm: str | dict[str, Any] | Algorithm | None
    reward_processing_classes: Any
    optimizers: tuple[Any, Any]
    tools: Any
    rollout_func: Any
    environment_factory: Any


# What TRL takes and Twig does not, and why.
_REFUSED_ARGUMENTS = {
    "reward_processing_classes": "reward models are not loaded: pass a function that runs the model",
    "tools": "completions are sampled in one turn, without tools",
    "rollout_func": "Twig samples by itself",
    "environment_factory": "completions are sampled in one turn, without an environment",
}


class GRPOTrainer:
    """Trains with Twig what a script hands to TRL's `GRPOTrainer`.

    Raises one UserError for everything that has no equal. `run` is the finished run (None before `train`).
    """

    adapter_if_none: Any = None  # in place of a missing `peft_config`; None: that is refused

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Callable | Sequence[Callable | str] | str | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **more: Unpack[More],
    ) -> None:
        unknown = sorted(more.keys() - More.__annotations__)
        if unknown:
            raise TypeError(f"GRPOTrainer() got an unexpected keyword argument {unknown[0]!r}")
        self.args: Any = args if args is not None else default_config(f"{_name_of(model)}-GRPO")
        self.reward_funcs, self.processing_class = reward_funcs, processing_class
        self.train_dataset, self.eval_dataset = _split(train_dataset, "train"), eval_dataset
        self.run: Run | None = None
        self._given, self._more = model, more
        changed = changed_fields(self.args)
        values = {name: default for name, (default, *_) in MAPPED.items()}
        values |= {name: getattr(self.args, name) for name in values if hasattr(self.args, name)}
        around = Around(self._algorithm_group(), _length(self.train_dataset))
        translation = translate(changed, around)
        self._translate_arguments(translation)
        callbacks = [progress_callback(self.args), *(more.get("callbacks") or ())]
        translation.notes += never_called(callbacks)
        translation.check("GRPOTrainer")
        if translation.notes:
            logger.warning("What Twig does in another way: %s.", "; ".join(translation.notes))
        self.settings = Settings.from_dict(translation.settings, label="GRPOTrainer")
        self._log_every = log_every(values, around)
        self._events = Events(
            self.args, callbacks, self._log_every, epoch_steps(values, around), optimizer_steps(values)
        )

    # ---- what the arguments mean

    def _algorithm_group(self) -> dict[str, Any] | None:
        chosen = self._more.get("algorithm")
        if chosen is None or isinstance(chosen, dict):
            return chosen
        return {"name": chosen} if isinstance(chosen, str) else chosen.model_dump()

    def _translate_arguments(self, done: Translation) -> None:
        more = cast(dict[str, Any], self._more)
        for name, reason in _REFUSED_ARGUMENTS.items():
            if more.get(name) not in (None, []):
                done.refuse(name, _short(more[name]), reason)
        if any(each is not None for each in more.get("optimizers") or ()):
            done.refuse("optimizers", "...", "the optimizer is made of `optim` and its options")
        if getattr(self.args, "world_size", 1) > 1:
            reason = "a trainer is one process: start it without accelerate or torchrun"
            done.refuse("WORLD_SIZE", self.args.world_size, reason)
        for name in _overridden(type(self)):
            done.refuse(f"{type(self).__name__}.{name}", "...", "Twig does not call a method of a subclass")
        self._translate_rewards(done)
        self._translate_data(done)
        self._translate_model(done)
        if hasattr(self.processing_class, "image_processor"):
            done.refuse("processing_class", _short(self.processing_class), "models read only text")

    def _translate_rewards(self, done: Translation) -> None:
        functions = self.reward_funcs
        if functions is None:
            done.refuse("reward_funcs", None, "pass a function or several")
        functions = functions if isinstance(functions, list | tuple) else [functions]
        for function in functions:
            if isinstance(function, str | PreTrainedModel):
                reason = "a reward model is not loaded: pass a function that runs it"
                done.refuse("reward_funcs", _short(function), reason)

    def _translate_data(self, done: Translation) -> None:
        if self.train_dataset is None:
            done.refuse("train_dataset", None, "pass a Dataset or a list of dicts")
            return
        columns = list(getattr(self.train_dataset, "column_names", None) or ())
        done.refused += [f"column {name!r} (models read only text)" for name in columns if name in _IMAGES]
        first = next(iter(self.train_dataset), None)
        if isinstance(first, Mapping) and isinstance(first.get("prompt"), str):
            done.put("task.chat", "never")  # TRL puts only messages through the chat template
        if _length(self.train_dataset) is None:
            steps = done.settings["train"].get("max_steps")
            if steps is None:
                done.refuse("train_dataset", "a stream", "set max_steps, for it has no length")
                return
            done.put("task.train_size", steps * done.settings["rollout"]["prompts_per_step"])

    def _translate_model(self, done: Translation) -> None:
        model, config = self._given, self._more.get("peft_config")
        quantization(self._more.get("quantization_config"), done)
        done.put("model.name", _source_of(model))
        if isinstance(model, PeftModel):
            if config is not None:
                done.refuse("peft_config", _short(config), "the model has an adapter already")
            return
        if config is None and self.adapter_if_none is not None:
            config = self.adapter_if_none
            done.notes.append(
                f"peft_config=None: TRL trains all weights, Twig an adapter of rank {config.r} on every "
                "linear layer, which needs a higher learning rate"
            )
        if config is None:
            reason = "TRL then trains all weights: pass LoraConfig, or import from twig.trl.with_lora"
            done.refuse("peft_config", None, reason)
            return
        try:
            done.settings["lora"] = lora_values(config, lambda: self._family(done), done.notes.append)
        except UserError as error:
            done.refused.append(f"{error.key} ({error.problem})")

    def _family(self, done: Translation) -> str:
        if isinstance(self._given, str):
            return load_config(Model(**done.settings["model"])).model_type
        return self._given.config.model_type

    # ---- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **ignored: Any) -> TrainOutput:
        """Trains, and returns what TRL returns; `run` is then the run.

        `resume_from_checkpoint` (True, or a checkpoint below `output_dir`) resumes from the newest valid
        checkpoint there.
        """
        resume = self._resumes(resume_from_checkpoint)
        output = Path(self.args.output_dir)
        events = self._events
        if resume:
            events.rows_before = lambda: read_metrics(output)
        model, tokenizer = self._loaded()
        chosen = self._more.get("algorithm")
        try:
            self.run = train(
                self.settings,
                cast(Any, model),
                tokenizer,
                output=output,
                resume=resume,
                progress=events,
                reward_funcs=cast(Any, self.reward_funcs),
                train_dataset=self.train_dataset,
                eval_dataset=self._evaluated_while_training(),
                algorithm=chosen if isinstance(chosen, Algorithm) else None,
                on_step=events.stops,
            )
        except UserError as error:
            raise _named_as_in_trl(error) from error
        summary = events.finish()
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(self.state.global_step, summary["train_loss"], summary)

    def _resumes(self, asked: str | bool | None) -> bool:
        output = Path(self.args.output_dir)
        if isinstance(asked, str | Path) and not Path(asked).resolve().is_relative_to(output.resolve()):
            raise UserError(
                "resume_from_checkpoint",
                f"{asked} is not in output_dir ({output})",
                "Set output_dir to the folder of the run, or train an adapter further: pass it as the model",
            )
        if not asked:
            return False
        if not (is_run(output) and (output / CHECKPOINTS).is_dir()):
            raise UserError(
                "resume_from_checkpoint",
                f"{output} holds no checkpoint of Twig",
                "Call train() without it",
            )
        return True

    def _loaded(self) -> tuple[PreTrainedModel | PeftModel | None, Any]:
        """Returns the model and tokenizer to train; None for those that the settings name."""
        if isinstance(self._given, str):
            return None, self.processing_class
        model = cast(PreTrainedModel, self._given)
        tokenizer = self.processing_class
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(_source_of(model))
        if not getattr(model, "is_quantized", False):
            model.to(cast(Any, pick_device(self.settings.model.device)))
        return model, tokenizer

    def _evaluated_while_training(self) -> Any:
        if str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) == "no":
            return None
        return _joined(self.eval_dataset)

    # ---- after training

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the mean reward and the greedy accuracy on the evaluation data.

        A dict of data sets is evaluated one by one, each with its name in the prefix.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise UserError("evaluate", "there is no eval_dataset", "Pass eval_dataset=")
        if isinstance(data, Mapping):
            each = {n: self.evaluate(d, None, f"{metric_key_prefix}_{n}") for n, d in data.items()}
            return {key: value for metrics in each.values() for key, value in metrics.items()}
        if self.run is not None:
            result = evaluate_run(self.run, data, self.reward_funcs)
        else:
            model, tokenizer = self._loaded()
            result = evaluate_untrained(self.settings, (model, tokenizer), data, self.reward_funcs)
        metrics = metrics_of(result, metric_key_prefix)
        self._events.evaluated(metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter in PEFT's format and the tokenizer, by default to the run folder."""
        run = self._finished("save_model")
        folder = str(output_dir or self.args.output_dir)
        run.model.save_pretrained(folder, save_embedding_layers=False)
        run.tokenizer.save_pretrained(folder)

    def push_to_hub(self, commit_message: str | None = None, **ignored: Any) -> str | None:
        """Uploads the adapter with its card, and returns the address of its page."""
        run = self._finished("push_to_hub")
        push = Push(self.hub_model_id, public=self.args.hub_private_repo is False)
        folder = run.folder / "export"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier upload
        return export_run(run.folder, folder, push=push).url

    @property
    def hub_model_id(self) -> str:
        """The repository on the Hub: `hub_model_id`, or the name of `output_dir` below the user's own."""
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        if "/" in name:
            return name
        from huggingface_hub import whoami

        return f"{whoami()['name']}/{name}"

    def _finished(self, method: str) -> Run:
        if self.run is None:
            raise UserError(method, "nothing is trained yet", "Call train() first")
        return self.run

    # ---- what scripts ask a trainer for

    @property
    def model(self) -> Any:
        """The trained PEFT model; before training, the model as it was passed."""
        return self.run.model if self.run is not None else self._given

    @property
    def state(self) -> Any:
        """TRL's state: `global_step`, `epoch`, `log_history`."""
        return self._events.state

    @property
    def control(self) -> Any:
        """The flags that callbacks set."""
        return self._events.control

    @property
    def accelerator(self) -> Any:
        """An `Accelerator` of this one process, for scripts that print with it."""
        from accelerate import Accelerator

        return Accelerator(cpu=self.args.use_cpu)

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, an object or a class."""
        self._events.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop_callback(self, callback: Any) -> Any:
        """Removes a callback, given as an object or a class, and returns it (None if it is not there)."""
        for each in self._events.callbacks:
            if each is callback or (isinstance(callback, type) and isinstance(each, callback)):
                self._events.callbacks.remove(each)
                return each
        return None

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback, given as an object or a class."""
        self.pop_callback(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds a row to `state.log_history` and tells the callbacks."""
        self._events.log(logs)

    def is_world_process_zero(self) -> bool:
        """Returns True: there is one process."""
        return True

    def is_local_process_zero(self) -> bool:
        """Returns True: there is one process."""
        return True

    def end(self) -> None:
        """Does nothing: trackers end with the training."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Twig's GRPOTrainer has no {name!r}; docs/from-trl.md lists what it has, and `run` is the run"
        )


_OWN = frozenset(name for name in vars(GRPOTrainer) if not name.startswith("__"))


def _overridden(kind: type) -> list[str]:
    """Returns the methods that a subclass replaces, of Twig's trainer or of TRL's."""
    above = kind.__mro__[: kind.__mro__.index(GRPOTrainer)]
    theirs = trainer_methods() if above else frozenset()
    names = {name for each in above for name in vars(each) if name in _OWN | theirs}
    return sorted(names - {"__init__", "adapter_if_none"})


def _named_as_in_trl(error: UserError) -> UserError:
    if not error.key.startswith("--output"):
        return error
    fix = "Set another output_dir, remove that folder, or call train(resume_from_checkpoint=True)"
    return UserError(error.key.replace("--output", "output_dir", 1), error.problem, fix)


def _name_of(model: Any) -> str:
    return _source_of(model).rstrip("/").split("/")[-1]


def _source_of(model: Any) -> str:
    if isinstance(model, str):
        return model
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _short(value: Any) -> Any:
    return value if isinstance(value, str) else type(value).__name__


def _split(data: Any, name: str) -> Any:
    """Returns a split of a `DatasetDict`; other data as it is."""
    return data[name] if isinstance(data, Mapping) and name in data else data


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _joined(data: Any) -> Any:
    """Returns one data set of a dict of them: what is evaluated while training has one accuracy."""
    if not isinstance(data, Mapping):
        return data
    return [dict(row) for each in data.values() for row in each]
