"""Turns the fields of TRL's `GRPOConfig` into settings: every field is in one of the tables below.

A field has a setting (`MAPPED`), none but another way to the same end (`INSTEAD`, the run goes on and says
so), none at all (`REFUSED`), or says nothing that matters here (`WITHOUT_MEANING`). Imports nothing of TRL:
values come in as a dict of what differs from TRL's defaults. Names no algorithm: each says by itself which of
TRL's losses it is (`Algorithm.trl_losses`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from twig.common.errors import UserError
from twig.common.text import either
from twig.config.schema import Log, Train
from twig.core.algorithms.base import Algorithm
from twig.core.algorithms.registry import class_for, shipped

_BATCH = "rollout.prompts_per_step"
_PUSH = "trainer.push_to_hub()"
_ON_LOG = "callbacks' on_log"

# Field: its default in TRL, the setting (or what else of ours it sets), and a remark for the page.
MAPPED: dict[str, tuple[Any, str, str]] = {
    "output_dir": (None, "output", "the run folder"),
    "resume_from_checkpoint": (None, "resume", "the newest checkpoint in `output_dir`"),
    "per_device_train_batch_size": (8, _BATCH, "see Batches"),
    "gradient_accumulation_steps": (1, _BATCH, "see Batches"),
    "steps_per_generation": (None, _BATCH, "see Batches"),
    "generation_batch_size": (None, _BATCH, "see Batches"),
    "num_generations": (8, "rollout.num_generations", ""),
    "max_completion_length": (512, "rollout.max_completion_length", ""),
    "temperature": (1.0, "rollout.temperature", ""),
    "chat_template_kwargs": (None, "task.chat_template_kwargs", ""),
    "reward_weights": (None, "task.reward_weights", ""),
    "loss_type": ("dapo", "algorithm.name", "see Loss"),
    "importance_sampling_level": ("token", "algorithm.name", "see Loss"),
    "beta": (0.0, "algorithm.beta", ""),
    "use_bias_correction_kl": (True, "algorithm.use_bias_correction_kl", ""),
    "epsilon": (0.2, "algorithm.epsilon", ""),
    "epsilon_high": (None, "algorithm.epsilon_high", "see Loss for `cispo`"),
    "num_iterations": (1, "algorithm.num_iterations", ""),
    "scale_rewards": ("group", "algorithm.scale_rewards", "`group`, `batch` or `none`"),
    "top_entropy_quantile": (1.0, "algorithm.top_entropy_quantile", ""),
    "mask_truncated_completions": (False, "algorithm.mask_truncated_completions", ""),
    "learning_rate": (1e-6, "train.learning_rate", ""),
    "max_steps": (-1, "train.max_steps", "divided by `num_iterations`"),
    "num_train_epochs": (3.0, "train.num_train_epochs", ""),
    "lr_scheduler_type": ("linear", "train.lr_scheduler_type", ""),
    "warmup_steps": (0, "train.warmup_steps", "below 1 a share of the steps, as in TRL"),
    "optim": ("adamw_torch_fused", "train.optim", "every kind of AdamW is `adamw_torch`"),
    "weight_decay": (0.0, "train.weight_decay", ""),
    "adam_beta1": (0.9, "train.adam_beta1", ""),
    "adam_beta2": (0.999, "train.adam_beta2", ""),
    "adam_epsilon": (1e-8, "train.adam_epsilon", ""),
    "max_grad_norm": (1.0, "train.max_grad_norm", ""),
    "seed": (42, "train.seed", ""),
    "save_strategy": ("steps", "train.save_steps", "`no`: only at the end"),
    "save_steps": (500, "train.save_steps", ""),
    "save_total_limit": (None, "train.save_total_limit", ""),
    "eval_strategy": ("no", "eval.steps", "`no`: nothing is evaluated"),
    "eval_steps": (None, "eval.steps", "None: `logging_steps`, as in TRL"),
    "eval_on_start": (False, "eval.before", ""),
    "per_device_eval_batch_size": (8, "eval.batch_size", "planned unless it is set"),
    "report_to": ("none", "log.report_to", "tensorboard, wandb, trackio"),
    "log_completions": (False, "log.completions_steps", "every `logging_steps` steps, in the run folder"),
    "logging_strategy": ("steps", _ON_LOG, "`metrics.jsonl` has every step"),
    "logging_steps": (10, _ON_LOG, "means over so many steps, as in TRL"),
    "logging_first_step": (False, _ON_LOG, ""),
    "disable_tqdm": (None, "progress display", "a bar, or printed rows"),
    "trust_remote_code": (False, "model.trust_remote_code", ""),
    "model_init_kwargs": (None, "model", "revision, dtype, attn_implementation, quantization_config"),
    "bf16": (None, "model.dtype", "True: `auto`, which takes bfloat16 on a GPU that has it"),
    "fp16": (False, "model.dtype", "True: `float16`"),
    "use_cpu": (False, "model.device", "True: `cpu`"),
    "push_to_hub": (False, _PUSH, "after training"),
    "hub_model_id": (None, _PUSH, "None: the name of `output_dir`"),
    "hub_private_repo": (None, _PUSH, "private unless it is False"),
}

_SAMPLES = "training samples from the model's full distribution"
_NO_TOOLS = "without tools there is nothing to limit"

# Field: what TRL's default is, and why another value has no equal.
REFUSED: dict[str, tuple[Any, str]] = {
    "top_p": (1.0, _SAMPLES),
    "top_k": (0, _SAMPLES),
    "min_p": (None, _SAMPLES),
    "repetition_penalty": (1.0, _SAMPLES),
    "generation_kwargs": (None, _SAMPLES),
    "delta": (None, "the ratio has one upper bound, epsilon_high"),
    "entropy_coef": (0.0, "there is no entropy term"),
    "use_adaptive_entropy": (False, "there is no entropy term"),
    "off_policy_mask_threshold": (None, "every batch is sampled by the policy that it trains"),
    "multi_objective_aggregation": ("sum_then_normalize", "rewards are summed before they are normalised"),
    "sync_ref_model": (False, "the reference is where the run began"),
    "router_aux_loss_coef": (None, "there is no loss for a router"),
    "lr_scheduler_kwargs": (None, "schedules have no further options"),
    "optim_args": (None, "the optimizer has no further options"),
    "optim_target_modules": (None, "the optimizer has no further options"),
    "neftune_noise_alpha": (None, "what is sampled and what is trained are one distribution"),
    "parallelism_config": (None, "a sequence is not split over devices"),
}

_PLANNED = "memory is planned (`memory.budget`), and layers are run again only if it is needed"
_WHOLE = "the base is held whole, on one device"
_NAMED = "the run is named after `output_dir`, below the project `twig`"
_BEST = "the adapter of the best evaluation is in `adapter-best/` of the run folder"
_OWN_SAMPLER = "Twig samples by itself, from the weights that it trains"

# Field: what TRL's default is, and what happens instead if it has another value.
INSTEAD: dict[str, tuple[Any, str]] = {
    "use_vllm": (False, _OWN_SAMPLER),
    "use_transformers_continuous_batching": (False, _OWN_SAMPLER),
    "use_transformers_paged": (False, _OWN_SAMPLER),
    "cache_implementation": (None, _OWN_SAMPLER),
    "deepspeed": (None, _WHOLE),
    "fsdp": (None, _WHOLE),
    "use_liger_kernel": (False, "the update has kernels of its own"),
    "torch_compile": (False, "`rollout.decode=compiled` compiles the sampling"),
    "shuffle_dataset": (True, "the data is always shuffled, by `train.seed`"),
    "data_seed": (None, "`train.seed` orders the data too"),
    "train_sampling_strategy": ("random", "the data is shuffled by `train.seed`"),
    "num_generations_eval": (None, "an evaluation samples one greedy answer per problem"),
    "eval_delay": (0, "evaluations begin with the first `eval.steps` steps"),
    "load_best_model_at_end": (False, _BEST),
    "metric_for_best_model": (None, "the best evaluation is that of the highest accuracy"),
    "greater_is_better": (None, "the best evaluation is that of the highest accuracy"),
    "log_completions_hub_repo": (None, "completions are in the run folder"),
    "run_name": (None, _NAMED),
    "project": ("huggingface", _NAMED),
    "trackio_space_id": (None, "trackio gets no space; its metrics stay on this machine"),
    "save_only_model": (False, "a checkpoint always has the optimizer, and can be resumed"),
    "hub_strategy": ("every_save", "only the finished adapter is uploaded"),
    "hub_always_push": (False, "only the finished adapter is uploaded"),
    "hub_revision": (None, "the adapter goes to the main branch"),
    "hub_token": (None, "the token of `hf auth login` is taken"),
}

# Fields that have no effect on a run here, whatever they say.
WITHOUT_MEANING: dict[str, tuple[str, ...]] = {
    _PLANNED: (
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "auto_find_batch_size",
        "eval_accumulation_steps",
        "batch_eval_metrics",
        "skip_memory_metrics",
        "use_cache",
    ),
    "adapter, log-probabilities and loss are float32 whatever the base is, and nothing is dropped out": (
        "cast_lm_head_to_fp32",
        "disable_dropout",
        "bf16_full_eval",
        "fp16_full_eval",
        "tf32",
    ),
    "it belongs to vLLM, DeepSpeed or an option of theirs": (
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
        "transformers_continuous_batching_config",
        "ds3_gather_for_generation",
        "fsdp_config",
        "liger_kernel_config",
        "torch_compile_backend",
        "torch_compile_mode",
    ),
    "it belongs to a loss or a method that is refused": (
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "vespo_k_pos",
        "vespo_lambda_pos",
        "vespo_k_neg",
        "vespo_lambda_neg",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
        "max_tool_calling_iterations",
        "label_smoothing_factor",
        "label_names",
        "log_multimodal",
    ),
    "prompts are not padded and need no data loader": (
        "pad_to_multiple_of",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "remove_unused_columns",
        "length_column_name",
        "ignore_data_skip",
        "accelerator_config",
    ),
    "Twig has its own processes, and their gradients are summed over all tokens": (
        "average_tokens_across_devices",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "local_rank",
    ),
    "`metrics.jsonl` and the run folder have it all, or it is about how something is shown": (
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_nan_inf_filter",
        "include_num_input_tokens_seen",
        "num_completions_to_print",
        "log_unique_prompts",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "debug",
        "save_on_each_node",
        "enable_jit_checkpoint",
        "restore_callback_states_from_checkpoint",
    ),
    "a run's numbers are those of one evaluation, made whole": (
        "prediction_loss_only",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "include_for_metrics",
    ),
    "`train()` and `evaluate()` say what is done; a run with one seed always gives the same numbers": (
        "do_train",
        "do_eval",
        "do_predict",
        "full_determinism",
    ),
}
MEANINGLESS = frozenset(name for names in WITHOUT_MEANING.values() for name in names)

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
    _batch(values, around, done)
    _length(values, around, done)
    _optimizer(values, done)
    _algorithm(values, changed, around, done)
    _saving_and_evaluating(values, changed, around, done)
    _logging(values, done)
    _model(values, changed, done)
    return done


def prompts_of(values: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the completions of an optimizer step and those of a generation batch."""
    micro = values["per_device_train_batch_size"]
    step = micro * values["gradient_accumulation_steps"]
    steps = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    return step, values["generation_batch_size"] or micro * steps


def _batch(values: dict[str, Any], around: Around, done: Translation) -> None:
    completions, sampled = prompts_of(values)
    group = values["num_generations"]
    if completions % group:
        done.refuse(
            "per_device_train_batch_size",
            values["per_device_train_batch_size"],
            f"an optimizer step of {completions} completions holds no whole groups of {group}: make "
            "per_device_train_batch_size x gradient_accumulation_steps a multiple of num_generations",
        )
        return
    done.put(_BATCH, completions // group)
    if sampled > completions:
        done.notes.append(
            f"a generation batch of {sampled} completions for {sampled // completions} optimizer steps: Twig "
            f"samples {completions} new ones for each step"
        )


def _in_steps(count: float, values: Mapping[str, Any], around: Around, share_of: str | None = None) -> int:
    """Returns a number of optimizer steps as steps of ours; below 1 it is a share of the whole run."""
    if 0 < count < 1 and share_of is not None:
        total = total_steps(values, around)
        return max(math.ceil(count * total), 1) if total is not None else 0
    return math.ceil(count / values["num_iterations"])


def total_steps(values: Mapping[str, Any], around: Around) -> int | None:
    """Returns the steps of a run (None: the length of the data is unknown)."""
    if values["max_steps"] > 0:
        return math.ceil(values["max_steps"] / values["num_iterations"])
    epoch = epoch_steps(values, around)
    return None if epoch is None else max(math.ceil(values["num_train_epochs"] * epoch), 1)


def epoch_steps(values: Mapping[str, Any], around: Around) -> float | None:
    """Returns the steps of a pass over the data (None: its length is unknown)."""
    prompts = max(prompts_of(values)[0] / values["num_generations"], 1)
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
    done.put("train.warmup_steps", _in_steps(warmup, values, around, "train"))


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
            done.notes.append(f"{name}='best': {_BEST}")
            return 0
        return _in_steps(steps, values, around, name)

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
    return max(_in_steps(steps, values, around, "logging_steps"), 1)


def _logging(values: dict[str, Any], done: Translation) -> None:
    names = values["report_to"]
    names = [names] if isinstance(names, str) else list(names or [])
    known = get_args(get_args(Log.model_fields["report_to"].annotation)[0])
    chosen = [name for name in names if name not in ("none", "all")]
    other = [name for name in chosen if name not in known]
    if other and "all" not in names:
        done.refuse("report_to", other, f"the trackers are {either(list(known))}")
    done.put("log.report_to", [name for name in chosen if name in known])
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


# ---- names that people type --------------------------------------------------------------------------------

# What is typed as a setting here and is none, beside the names of TRL's fields.
_SHORT = {
    "lr": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "group_size": "rollout.num_generations",
    "num_samples": "rollout.num_generations",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "max_prompt_length": "rollout.max_completion_length",
    "model_name_or_path": "model.name",
    "dataset_name": "task.path",
    "dataset_config": "task.subset",
    "dataset_train_split": "task.train_split",
    "dataset_test_split": "task.eval_split",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.target_modules",
    "rank": "lora.r",
    "kl_coef": "algorithm.beta",
    "clip_range": "algorithm.epsilon",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "output_dir": "--output",
    "resume_from_checkpoint": "--resume",
}


def hint(key: str) -> str | None:
    """Returns what to write instead of a setting named as TRL or habit names it, None if it is no such name.

    >>> hint("train.lr"), hint("rollout.per_device_train_batch_size")
    ('Write train.learning_rate', 'Write rollout.prompts_per_step, which counts prompts and not completions')
    >>> hint("rollout.top_p")
    "TRL's top_p has no equal: training samples from the model's full distribution. Leave it out"
    """
    name = key.rpartition(".")[2].lstrip("-")
    if name in _SHORT:
        return _write(_SHORT[name])
    if name in MAPPED:
        setting = MAPPED[name][1]
        return _write(setting) if "." in setting and setting[0].islower() and "(" not in setting else None
    if name in REFUSED:
        return f"TRL's {name} has no equal: {REFUSED[name][1]}. Leave it out"
    if name in INSTEAD:
        return f"TRL's {name} has no equal: {INSTEAD[name][1].replace('`', '')}. Leave it out"
    reason = next((text for text, names in WITHOUT_MEANING.items() if name in names), None)
    return None if reason is None else f"TRL's {name} has no meaning here: {reason.replace('`', '')}"


def _write(setting: str) -> str:
    return (
        f"Write {setting}, which counts prompts and not completions"
        if setting == _BATCH
        else f"Write {setting}"
    )


# ---- the page ----------------------------------------------------------------------------------------------


def table(defaults: Mapping[str, str]) -> str:
    """Returns the tables of docs/from-trl.md; `defaults` are ours, by setting, as they are written."""
    lines = ["| `GRPOConfig` | its default | here | its default | |", "|---|---|---|---|---|"]
    for name, (default, setting, remark) in MAPPED.items():
        own = f"`{defaults[setting]}`" if setting in defaults else ""
        lines.append(f"| `{name}` | `{default!r}` | `{setting}` | {own} | {remark} |")
    lines += [
        "",
        "Refused, unless they are at their default:",
        "",
        "| `GRPOConfig` | its default | |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | `{default!r}` | {why} |" for name, (default, why) in REFUSED.items()]
    lines += ["", "Without an equal; the run says what happens instead:", ""]
    lines += ["| `GRPOConfig` | its default | instead |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default!r}` | {what} |" for name, (default, what) in INSTEAD.items()]
    lines += [
        "",
        "Without meaning here; the run names those that were set:",
        "",
        "| `GRPOConfig` | because |",
    ]
    lines += ["|---|---|"]
    lines += [f"| {', '.join(f'`{n}`' for n in names)} | {why} |" for why, names in WITHOUT_MEANING.items()]
    return "\n".join(lines) + "\n"
