"""Every field of TRL's `GRPOConfig`, and the names that people type: what they are here.

A field has a setting (`MAPPED`), none but another way to the same end (`INSTEAD`, the run goes on and says
so), none at all (`REFUSED`), or says nothing that matters here (`WITHOUT_MEANING`). Data and text only;
`from_trl.py` translates values.
"""

import re
from typing import Any

BATCH = "rollout.prompts_per_step"
_PUSH = "trainer.push_to_hub()"
_ON_LOG = "callbacks' on_log"

# Field: its default in TRL, the setting (or what else of ours it sets), and a remark for the page.
MAPPED: dict[str, tuple[Any, str, str]] = {
    "output_dir": (None, "output", "the run folder"),
    "resume_from_checkpoint": (None, "resume", "the newest checkpoint in `output_dir`"),
    "per_device_train_batch_size": (8, BATCH, "see Batches"),
    "gradient_accumulation_steps": (1, BATCH, "see Batches"),
    "steps_per_generation": (None, BATCH, "see Batches"),
    "generation_batch_size": (None, BATCH, "see Batches"),
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
BEST = "the adapter of the best evaluation is in `adapter-best/` of the run folder"
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
    "load_best_model_at_end": (False, BEST),
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

# ---- names that people type --------------------------------------------------------------------------------

# What is typed as a setting here and is none, beside the names of TRL's fields.
_SHORT = {
    "lr": "train.learning_rate",
    "learning_rate": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "batch_size": BATCH,
    "train_batch_size": BATCH,
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
    if name in _SHORT and _SHORT[name] != key:
        return _write(_SHORT[name])
    if name in MAPPED:
        setting = MAPPED[name][1]
        return _write(setting) if re.fullmatch(r"[a-z]+\.[a-z_]+", setting) and setting != key else None
    if name in REFUSED:
        return f"TRL's {name} has no equal: {REFUSED[name][1]}. Leave it out"
    if name in INSTEAD:
        return f"TRL's {name} has no equal: {INSTEAD[name][1].replace('`', '')}. Leave it out"
    reason = next((text for text, names in WITHOUT_MEANING.items() if name in names), None)
    return None if reason is None else f"TRL's {name} has no meaning here: {reason.replace('`', '')}"


def _write(setting: str) -> str:
    return (
        f"Write {setting}, which counts prompts and not completions"
        if setting == BATCH
        else f"Write {setting}"
    )
