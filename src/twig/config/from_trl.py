"""Turns the fields of TRL's `GRPOConfig` into settings, by the tables of `trl_names.py`.

Imports nothing of TRL: values come in as a dict of what differs from TRL's defaults. Names no algorithm: each
says by itself which of TRL's losses it is (`Algorithm.trl_losses`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from twig.common.errors import UserError
from twig.common.text import either
from twig.config.schema import Tracker, Train
from twig.config.trl_names import BATCH, BEST, INSTEAD, MAPPED, MEANINGLESS, REFUSED
from twig.core.algorithms.base import Algorithm
from twig.core.algorithms.registry import class_for, shipped

# Fields whose value is that of the setting of the same meaning.
_AS_IT_IS = (
    "num_generations",
    "max_completion_length",
    "temperature",
    "reward_weights",
    "learning_rate",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "save_total_limit",
    "trust_remote_code",
)


@dataclass
class Translation:
    """Settings as nested groups; lines about what is refused, and about what happens instead."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Sets a dotted key."""
        group, _, name = key.partition(".")
        self.settings.setdefault(group, {})[name] = value

    def refuse(self, name: str, value: Any, reason: str) -> None:
        """Adds a line for a field whose value has no equal."""
        self.refused.append(f"{name}={written(value)} ({reason})")

    def check(self, key: str) -> None:
        """Raises one UserError for everything that is refused; `key` says of what."""
        if self.refused:
            many = "these have no equal" if len(self.refused) > 1 else "it has no equal"
            raise UserError(
                key, f"{many} in Twig: {'; '.join(self.refused)}", "Leave out or change what is listed"
            )


@dataclass(frozen=True)
class Around:
    """What a translation needs to know beside the fields.

    `algorithm` is the group chosen in place of `loss_type` (None: that decides), `num_prompts` the length of
    the training data (None: unknown).
    """

    algorithm: Mapping[str, Any] | None = None
    num_prompts: int | None = None


def written(value: Any) -> str:
    """Returns a value as it is written in Python, cut to a readable length."""
    text = repr(getattr(value, "value", value))
    return text if len(text) <= 60 else text[:57] + "..."


def translate(changed: Mapping[str, Any], around: Around | None = None) -> Translation:
    """Returns what the fields of a `GRPOConfig` mean here; `changed` has those that are not at their default.

    Never raises: what has no equal is in `refused`.
    """
    around = around or Around()
    done = Translation()
    values = {name: default for name, (default, *_) in MAPPED.items()}
    for name, value in changed.items():
        value = getattr(value, "value", value)  # of an enumeration
        if name in MAPPED:
            values[name] = value
        elif name in REFUSED:
            if value != REFUSED[name][0] and value not in (None, {}):
                done.refuse(name, value, REFUSED[name][1])
        elif name in INSTEAD:
            if value not in (INSTEAD[name][0], None, {}, ""):
                done.notes.append(f"{name}={written(value)}: {INSTEAD[name][1]}")
        elif name not in MEANINGLESS:
            done.refuse(name, value, "Twig does not know this field")
    meaningless = sorted(changed.keys() & MEANINGLESS)
    if meaningless:
        done.notes.append(f"without meaning here: {', '.join(meaningless)}")
    for name in _AS_IT_IS:
        done.put(MAPPED[name][1], values[name])
    done.put("task.name", "custom")
    done.put("task.chat_template_kwargs", values["chat_template_kwargs"] or {})
    _batch(values, done)
    _length(values, around, done)
    _optimizer(values, done)
    _algorithm(values, changed, around, done)
    _saving_and_evaluating(values, changed, around, done)
    _logging(values, done)
    _model(values, changed, done)
    return done


def completions_of(values: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the completions of an optimizer step of TRL, and those of a step of ours.

    They are the same if the first holds whole groups. Else ours is the whole generation batch.
    """
    micro = values["per_device_train_batch_size"]
    step = micro * values["gradient_accumulation_steps"]
    steps = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    sampled = values["generation_batch_size"] or micro * steps
    return step, step if step % values["num_generations"] == 0 else sampled


def optimizer_steps(values: Mapping[str, Any]) -> float:
    """Returns how many optimizer steps of TRL a step of ours stands for."""
    step, ours = completions_of(values)
    return values["num_iterations"] * ours / step


def _batch(values: dict[str, Any], done: Translation) -> None:
    step, ours = completions_of(values)
    group = values["num_generations"]
    if ours % group:
        done.refuse(
            "per_device_train_batch_size",
            values["per_device_train_batch_size"],
            f"a batch of {ours} completions holds no whole groups of {group}: make it times "
            "gradient_accumulation_steps a multiple of num_generations",
        )
        return
    done.put(BATCH, ours // group)
    sampled = values["generation_batch_size"] or 0
    steps = values["steps_per_generation"] or 0
    sampled = max(sampled, values["per_device_train_batch_size"] * steps)
    if ours != step:
        done.notes.append(
            f"an optimizer step of {step} completions holds no whole group of {group}: Twig takes one step "
            f"on all {ours} of a generation batch, and fewer of them"
        )
    elif sampled > step:
        done.notes.append(
            f"a generation batch of {sampled} completions for {sampled // step} optimizer steps: Twig "
            f"samples {step} new ones for each step"
        )


def _in_steps(count: float, values: Mapping[str, Any], around: Around, share: bool = False) -> int:
    """Returns a number of optimizer steps as steps of ours; below 1 it may be a `share` of the whole run."""
    if 0 < count < 1 and share:
        total = total_steps(values, around)
        return max(math.ceil(count * total), 1) if total is not None else 0
    return math.ceil(count / optimizer_steps(values))


def total_steps(values: Mapping[str, Any], around: Around) -> int | None:
    """Returns the steps of a run (None: the length of the data is unknown)."""
    if values["max_steps"] > 0:
        return math.ceil(values["max_steps"] / optimizer_steps(values))
    epoch = epoch_steps(values, around)
    return None if epoch is None else max(math.ceil(values["num_train_epochs"] * epoch), 1)


def epoch_steps(values: Mapping[str, Any], around: Around) -> float | None:
    """Returns the steps of a pass over the data (None: its length is unknown)."""
    prompts = max(completions_of(values)[1] / values["num_generations"], 1)
    return None if around.num_prompts is None else around.num_prompts / prompts


def _length(values: dict[str, Any], around: Around, done: Translation) -> None:
    if values["max_steps"] > 0:
        done.put("train.max_steps", _in_steps(values["max_steps"], values, around))
    if values["max_completion_length"] is None:
        done.refuse("max_completion_length", None, "a completion has a longest length")
    kinds = get_args(Train.model_fields["lr_scheduler_type"].annotation)
    schedule = values["lr_scheduler_type"]
    if schedule not in kinds:
        done.refuse("lr_scheduler_type", schedule, f"the schedules are {either(list(kinds))}")
        return
    done.put("train.lr_scheduler_type", schedule)
    warmup = values["warmup_steps"] or 0
    if warmup and schedule == "constant":
        done.notes.append(f"warmup_steps={written(warmup)}: lr_scheduler_type=constant has none, in TRL too")
        return
    if 0 < warmup < 1 and total_steps(values, around) is None:
        done.refuse("warmup_steps", warmup, "a share of an unknown number of steps: set max_steps")
        return
    done.put("train.warmup_steps", _in_steps(warmup, values, around, True))


def _optimizer(values: dict[str, Any], done: Translation) -> None:
    name = str(values["optim"])
    if name == "sgd":
        done.put("train.optim", name)
    elif "adamw" in name:
        done.put("train.optim", "adamw_torch")
        if name not in ("adamw_torch", "adamw_torch_fused"):
            done.notes.append(f"optim={name!r}: AdamW with float32 states, of the adapter alone")
    else:
        done.refuse("optim", name, "the optimizers are AdamW and SGD")


# ---- the algorithm -----------------------------------------------------------------------------------------

_OF_ALGORITHM = tuple(
    name for name, (_, key, _) in MAPPED.items() if key.startswith("algorithm.") and key != "algorithm.name"
)


def losses() -> dict[tuple[str, str], type[Algorithm]]:
    """Returns TRL's losses that are here: `loss_type` and `importance_sampling_level` to the algorithm."""
    return {pair: kind for kind in shipped().values() for pair in kind.trl_losses}


def _algorithm(values: dict[str, Any], changed: Mapping[str, Any], around: Around, done: Translation) -> None:
    values["scale_rewards"] = {True: "group", False: "none"}.get(
        values["scale_rewards"], values["scale_rewards"]
    )
    if around.algorithm is not None:
        _chosen_algorithm(values, changed, around.algorithm, done)
        return
    loss, level = values["loss_type"], values["importance_sampling_level"]
    kind = losses().get((loss, level))
    if kind is None:
        own = [name for name, at in losses() if at == level]
        done.refuse("loss_type", loss, f"with importance_sampling_level={level!r} there are {either(own)}")
        return
    if loss == "bnpo" and values["gradient_accumulation_steps"] > 1:
        reason = "it divides by the tokens of each micro-batch: set gradient_accumulation_steps=1, memory is "
        done.refuse("loss_type", loss, reason + "planned")
        return
    try:
        own = kind.of_trl(values)
    except UserError as error:
        done.refuse(error.key, values.get(error.key), error.problem)
        return
    _refuse_lacking(kind, {name: values[name] for name in _OF_ALGORITHM}, done)
    name = kind.model_fields["name"].default
    done.settings["algorithm"] = {"name": name} | own


def _chosen_algorithm(
    values: dict[str, Any], changed: Mapping[str, Any], chosen: Mapping[str, Any], done: Translation
) -> None:
    """Puts the group that was chosen, with the fields of TRL that were changed and that it has."""
    kind = class_for(dict(chosen))
    own = {name: values[name] for name in _OF_ALGORITHM if name in changed}
    _refuse_lacking(kind, own, done)
    for name in ("loss_type", "importance_sampling_level"):
        if name in changed and changed[name] != MAPPED[name][0]:
            done.notes.append(f"{name}={written(changed[name])}: `algorithm` was passed in its place")
    done.settings["algorithm"] = {k: v for k, v in own.items() if k in kind.model_fields} | dict(chosen)


def _refuse_lacking(kind: type[Algorithm], values: Mapping[str, Any], done: Translation) -> None:
    for name, value in values.items():
        if name not in kind.model_fields and value != MAPPED[name][0]:
            title = kind.title or kind.__name__
            done.refuse(name, value, f"the algorithm {title} does not have it")


# ---- everything else ---------------------------------------------------------------------------------------


def _saving_and_evaluating(
    values: dict[str, Any], changed: Mapping[str, Any], around: Around, done: Translation
) -> None:
    def every(strategy: Any, steps: Any, name: str) -> int:
        if strategy == "no":
            return 0
        if strategy == "epoch":
            epoch = epoch_steps(values, around)
            return 0 if epoch is None else max(math.ceil(epoch), 1)
        if strategy == "best":
            done.notes.append(f"{name}='best': {BEST}")
            return 0
        return _in_steps(steps, values, around, True)

    done.put("train.save_steps", every(values["save_strategy"], values["save_steps"], "save_strategy"))
    steps = values["eval_steps"] or values["logging_steps"]
    done.put("eval.steps", every(values["eval_strategy"], steps, "eval_strategy"))
    done.put("eval.before", bool(values["eval_on_start"]))
    if "per_device_eval_batch_size" in changed:
        done.put("eval.batch_size", values["per_device_eval_batch_size"])


def log_every(values: Mapping[str, Any], around: Around) -> int:
    """Returns after how many steps `on_log` is called; 0: never."""
    strategy, steps = values["logging_strategy"], values["logging_steps"]
    if getattr(strategy, "value", strategy) == "no":
        return 0
    if getattr(strategy, "value", strategy) == "epoch":
        return max(math.ceil(epoch_steps(values, around) or 1), 1)
    return max(_in_steps(steps, values, around, True), 1)


def _logging(values: dict[str, Any], done: Translation) -> None:
    names = values["report_to"]
    names = [names] if isinstance(names, str) else list(names or [])
    chosen = "all" if "all" in names else [name for name in names if name != "none"]
    other = [name for name in chosen if name not in get_args(Tracker)] if chosen != "all" else []
    if other:
        done.refuse("report_to", other, f"the trackers are {either(list(get_args(Tracker)))}")
    done.put("log.report_to", chosen)
    if values["log_completions"]:
        every = values["logging_steps"]
        done.put("log.completions_steps", max(int(every), 1) if every >= 1 else 1)


# How `model_init_kwargs` names what is here; `device_map` and the like are about where weights lie.
_OF_LOADING = ("device_map", "low_cpu_mem_usage", "use_cache", "torch_dtype", "dtype", "use_safetensors")


def _model(values: dict[str, Any], changed: Mapping[str, Any], done: Translation) -> None:
    given = dict(values["model_init_kwargs"] or {})
    dtype = given.get("dtype", given.get("torch_dtype"))
    if dtype is None and values["fp16"]:
        dtype = "float16"
    elif dtype is None and changed.get("bf16") is False:
        dtype = "float32"
    if dtype is not None:
        done.put("model.dtype", str(dtype).removeprefix("torch."))
    if values["use_cpu"]:
        done.put("model.device", "cpu")
    if given.pop("revision", None) is not None:
        done.put("model.revision", values["model_init_kwargs"]["revision"])
    if given.pop("trust_remote_code", False):
        done.put("model.trust_remote_code", True)
    attention = given.pop("attn_implementation", None)
    if attention in ("sdpa", "eager"):
        done.put("model.attn_implementation", attention)
    elif attention is not None:
        done.notes.append(f"attn_implementation={attention!r}: Twig's attention over the prefix trie")
    quantization(given.pop("quantization_config", None), done)
    for name, value in given.items():
        if name not in _OF_LOADING and value is not None:
            done.refuse(f"model_init_kwargs[{name!r}]", value, "load the model yourself and pass it")


def quantization(config: Any, done: Translation) -> None:
    """Translates a `BitsAndBytesConfig`, or its dict; None is none."""
    if config is None:
        return
    values = config if isinstance(config, dict) else vars(config)

    def get(name: str, default: Any = False) -> Any:
        return values.get(name, values.get(f"_{name}", default))

    if get("load_in_4bit"):
        done.put("model.quantization", "nf4")
        kind = get("bnb_4bit_quant_type", "nf4")
        if kind != "nf4":
            done.notes.append(f"bnb_4bit_quant_type={kind!r}: 4 bits are nf4 here")
    elif get("load_in_8bit"):
        done.put("model.quantization", "int8")
    else:
        done.refuse("quantization_config", type(config).__name__, "bases are in 4 or 8 bits of bitsandbytes")
