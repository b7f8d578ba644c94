"""Turns a YAML file of TRL's command line (`trl grpo --config FILE`) into a YAML file of settings.

Such a file mixes the fields of `GRPOConfig` with those of its script and of its model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from twig.common.errors import UserError
from twig.config.from_peft import lora_values
from twig.config.from_trl import Around, Translation, quantization, translate
from twig.config.load import Settings, parse_yaml
from twig.config.schema import Model
from twig.config.trl_names import INSTEAD, MAPPED, MEANINGLESS, REFUSED
from twig.engine.load import load_config

_FIELDS = {*MAPPED, *REFUSED, *INSTEAD, *MEANINGLESS}
# TRL's fields for script and model: the setting, and TRL's default if it says something.
_SCRIPT: dict[str, tuple[str, Any]] = {
    "model_name_or_path": ("model.name", None),
    "model_revision": ("model.revision", "main"),
    "dtype": ("model.dtype", None),
    "dataset_name": ("task.path", None),
    "dataset_config": ("task.subset", None),
    "dataset_train_split": ("task.train_split", None),
}
_LORA = {
    "lora_r": ("r", 16),
    "lora_alpha": ("lora_alpha", 32),
    "lora_dropout": ("lora_dropout", 0.05),
    "lora_target_modules": ("target_modules", None),
    "lora_modules_to_save": ("modules_to_save", None),
    "lora_task_type": ("task_type", "CAUSAL_LM"),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}
_ELSEWHERE = (
    "use_peft",
    "reward_funcs",
    "dataset_test_split",
    "attn_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
_UNUSED = ("ignore_bias_buffers", "bnb_4bit_quant_storage", "env", "config")


def settings_of_yaml(path: Path) -> str:
    """Returns the text of the settings, with what happens in another way as comments above.

    Raises one UserError for everything that has no equal.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or 'no text in UTF-8'})"
        raise UserError(f"--from {path}", problem, "Name a YAML file for `trl grpo --config`") from error
    if not isinstance(values, dict):
        raise UserError(f"--from {path}", "it is no mapping of fields", "Name a file for `trl grpo --config`")
    done = translated(values)
    done.check(f"--from {path}")
    settings = Settings.from_dict(done.settings, label=str(path))
    notes = "".join(f"# {line}\n" for line in done.notes)
    own = {name: group for name, group in done.settings.items() if group}
    resolved = settings.model_dump()
    chosen = {name: {key: resolved[name][key] for key in group} for name, group in own.items()}
    output = values.get("output_dir")
    command = "" if output is None else f"# twig train FILE --output {output}\n"
    return notes + command + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)


def translated(values: Mapping[str, Any]) -> Translation:
    """Returns the settings that the fields of a file mean."""
    fields = {name: value for name, value in values.items() if name in _FIELDS}
    if values.get("attn_implementation") is not None:
        own = {"attn_implementation": values["attn_implementation"]}
        fields["model_init_kwargs"] = {**own, **(fields.get("model_init_kwargs") or {})}
    done = translate(fields, Around())
    for name, (setting, usual) in _SCRIPT.items():
        if values.get(name, usual) != usual:
            done.put(setting, values[name])
    if "path" not in done.settings["task"]:
        done.refuse("dataset_name", values.get("datasets"), "name one data set")
    if values.get("eval_strategy", "no") not in ("no", False):
        done.put("task.eval_split", values.get("dataset_test_split", "test"))
    _rewards(values.get("reward_funcs"), done)
    _adapter(values, done)
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        quantization(dict(values), done)
    known = {*_FIELDS, *_SCRIPT, *_LORA, *_ELSEWHERE, *_UNUSED, "dataset_streaming", "datasets"}
    for name in sorted(set(values) - known):
        done.refuse(name, values[name], "Twig does not know this field")
    return done


def _rewards(names: Any, done: Translation) -> None:
    names = [names] if isinstance(names, str) else list(names or [])
    dotted = [name.rpartition(".") for name in names if "." in name]
    files = {module for module, _, _ in dotted}
    if names and len(dotted) == len(names) and len(files) == 1:
        file = f"{files.pop().replace('.', '/')}.py"
        done.put("task.reward_file", f"{file}:{','.join(function for _, _, function in dotted)}")
    elif names:
        listed = ", ".join(names)
        done.notes.append(f"reward_funcs={listed}: set task.reward_file to a file that imports them")


def _adapter(values: Mapping[str, Any], done: Translation) -> None:
    if not values.get("use_peft"):
        done.refuse("use_peft", False, "TRL then trains all weights: set it to true")
        return
    given = {ours: values.get(theirs, usual) for theirs, (ours, usual) in _LORA.items()}
    modules = given["target_modules"]
    if modules in (["all-linear"], "all-linear"):
        given["target_modules"] = "all-linear"

    def family() -> str:
        return load_config(Model(**done.settings["model"])).model_type

    try:
        done.settings["lora"] = lora_values(LoraConfig(**given), family, done.notes.append)
    except UserError as error:
        done.refused.append(f"{error.key} ({error.problem})")
