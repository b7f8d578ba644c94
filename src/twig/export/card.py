"""The model card of a run: results, settings, versions, limits, in Markdown."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from twig import __version__
from twig.common.redact import code, fenced, last_part, public, shown
from twig.common.text import percent
from twig.config.load import Settings
from twig.core.algorithms.citations import METHODS, PAPER, PAPERS
from twig.tasks.load import TASKS

SOFTWARE = """@software{twig,
  title = {Twig: reinforcement learning for language models on small hardware},
  author = {{The Twig maintainers}},
  version = {VERSION},
  license = {Apache-2.0}
}"""

# Settings that name files: only the last part of the name is shown.
_FILES = ("model.adapter", "task.path", "task.reward_file")
_LONGEST_PROMPT = 120  # characters in the example; a longer one is shown below it


@dataclass(frozen=True)
class Base:
    """The base model as others find it: its name, and its id on the Hub where it has one that is known."""

    name: str
    hub_id: str | None = None
    embedded: bool = False


@dataclass(frozen=True)
class Merge:
    """How a merged model differs from base and adapter: `difference` is the largest one between their logits
    on `tokens` tokens, `largest` the largest logit there; `dtype` is that of the weights."""

    dtype: str
    difference: float
    largest: float
    tokens: int


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    `name` is USER/NAME on the Hub, or the folder's. `summary` and `environment` are the run's files,
    `adapter` its adapter_config.json; `best`: the adapter of the best evaluation, not of the last step.
    `prompt` is the form of the prompts, `chat` whether a chat template wrote it. `merge` is None for an
    adapter.
    """

    name: str
    settings: Settings
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    adapter: Mapping[str, Any]
    base: Base
    best: bool
    prompt: str
    chat: bool
    license: str | None = None
    merge: Merge | None = None


def model_card(subject: Subject) -> str:
    """The card's text: YAML metadata and Markdown."""
    from huggingface_hub import ModelCard

    parts = [_title(subject), _use(subject), _results(subject), _training(subject), _merging(subject)]
    parts += [_limits(subject), _citing(subject)]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_metadata(subject)}\n---\n\n{body}\n"))


# ---- metadata --------------------------------------------------------------------------------------------


def _metadata(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    algorithm, merged = subject.settings.algorithm.name, subject.merge is not None
    data, dataset = _data(subject)
    result = _measured(subject)
    results = None
    if result is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset or subject.settings.task.name,
                dataset_name=shown(dataset or data),
                metric_type="accuracy",
                metric_value=round(float(result["value"]), 4),
                metric_name=f"accuracy, greedy, {int(result['n'])} problems",
            )
        ]
    tags = ["twig", "reinforcement-learning", algorithm, *([] if merged else ["lora"]), "arxiv:2504.20834"]
    card = ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=subject.base.hub_id and shown(subject.base.hub_id),
        license=subject.license,
        datasets=[dataset] if dataset else None,
        tags=tags,
        model_name=shown(subject.name),
        eval_results=results,
    )
    return card.to_yaml()


def _measured(subject: Subject) -> Mapping[str, Any] | None:
    """The evaluation of what is exported."""
    return subject.summary.get("accuracy_best" if subject.best else "accuracy_after")


def _data(subject: Subject) -> tuple[str, str | None]:
    """The data in words, and its id on the Hub where it was read from there."""
    task = subject.settings.task
    own = getattr(import_module(TASKS[task.name]), "HUB_NAME", None)
    if "train_dataset" in _passed(subject):
        return f"{task.name}, data passed from Python", None
    if task.path is None and own is not None:
        return f"{task.name}: {own}", own
    if task.path is None:
        digits = " by ".join(map(str, task.digits))
        return f"{task.name}, made by a generator, factors of {digits} digits", None
    if _is_on_the_hub(task.path):
        return f"{task.name}: {task.path}", task.path
    return f"{task.name}: {last_part(task.path)}, a file of its own", None


def _is_on_the_hub(path: str) -> bool:
    """Whether a data set was fetched from the Hub under this name: a folder may have such a name too."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return False
    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset")).is_dir()


def _passed(subject: Subject) -> list[str]:
    return (subject.environment.get("passed") or "").split(", ")


# ---- the page --------------------------------------------------------------------------------------------


def _title(subject: Subject) -> str:
    method, words = METHODS[subject.settings.algorithm.name]
    what = "A LoRA adapter on" if subject.merge is None else "A LoRA adapter merged into"
    base, name = subject.base, code(subject.name)
    text = (
        f"# {name}\n\n{what} {code(base.hub_id or base.name)}, trained by reinforcement learning with "
        f"{method} on the task {code(subject.settings.task.name)} with Twig {__version__}. {method}: {words}."
    )
    if base.embedded:
        text += (
            f"\n\nThe base, {code(base.name)}, is a model of a million parameters that ships with Twig (the "
            f'Python package `twig-rl`) and is on no Hub: `twig.load_model("{base.name}")` gives it.'
        )
        if subject.merge is not None:
            text += " The files here hold all that is needed; they need neither the base nor Twig."
    elif base.hub_id is None:
        text += (
            f"\n\nThe base is a model that was on the trainer's machine, in a folder called "
            f"{code(base.name)}. Its id on the Hub was not given (`twig export RUN --base-model ID` writes "
            "it here)."
        )
    return text


def _use(subject: Subject) -> str:
    settings, base, name = subject.settings, subject.base, repr(shown(subject.name))
    remote = ", trust_remote_code=True" if settings.model.trust_remote_code else ""
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name}{remote})"
    if subject.merge is not None:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({name}{remote})",
            tokenizer,
        ]
    elif base.embedded:
        lines = [
            "import twig",
            "from peft import PeftModel",
            f'model, tokenizer = twig.load_model("{base.name}")',
            f"model = PeftModel.from_pretrained(model, {name})",
        ]
    elif base.hub_id is not None:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f"model = AutoPeftModelForCausalLM.from_pretrained({name}{remote})",
            tokenizer,
        ]
    else:
        folder = repr(f"FOLDER/{shown(base.name)}")
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({folder}{remote})",
            f"model = PeftModel.from_pretrained(model, {name}); {tokenizer}",
        ]
    prompt = str(public(subject.prompt))
    long = len(prompt) > _LONGEST_PROMPT
    words = [repr("..." if long else prompt), 'return_tensors="pt"']
    words += ["add_special_tokens=False"] if subject.chat else []
    options = [f"max_new_tokens={settings.rollout.max_completion_length}", "do_sample=False"]
    if settings.rollout.stop:
        options += [f"stop_strings={public(settings.rollout.stop)!r}", "tokenizer=tokenizer"]
    lines += [
        f"inputs = tokenizer({', '.join(words)}).to(model.device)",
        f"print(tokenizer.decode(model.generate(**inputs, {', '.join(options)})[0], "
        "skip_special_tokens=True))",
    ]
    text = f"## Use\n\n{fenced(chr(10).join(lines), 'python')}"
    if long or subject.chat:
        text += f"\n\nPrompts have this form, in training and below:\n\n{fenced(prompt, 'text')}"
    return text


def _results(subject: Subject) -> str:
    summary, steps = subject.summary, int(subject.summary["steps"])
    best, after = summary.get("accuracy_best"), summary.get("accuracy_after")
    here = " (this model)"
    rows = {"before training": summary.get("accuracy_before")}
    if subject.best and best is not None:
        rows[f"after step {int(best['step'])}, the best{here}"] = best
    rows[f"after step {steps}{'' if subject.best else here}"] = after
    rows = {label: row for label, row in rows.items() if row is not None}
    if not rows:
        return "## Results\n\nAccuracy was not measured."
    lines = [
        "| | right | 95 % interval | problems | answer found | last number right |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        cells = [
            _percent_or_dash(row["value"]),
            f"{100 * row['low']:.1f} to {_percent_or_dash(row['high'])}",
            f"{int(row['n']):,}",
        ]
        cells += [_percent_or_dash(row.get("found")), _percent_or_dash(row.get("right_lenient"))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return (
        "## Results\n\nGreedy answers to the task's evaluation problems. The interval is Wilson's; *last "
        "number right* also counts right numbers that are not marked as the answer.\n\n" + "\n".join(lines)
    )


def _training(subject: Subject) -> str:
    summary, environment, adapter = subject.summary, subject.environment, subject.adapter
    sampled, selected = int(summary["tokens_sampled"]), int(summary["tokens_selected"])
    share = f" ({_percent_or_dash(selected / sampled)})" if sampled else ""
    modules, layers = adapter.get("target_modules"), adapter.get("layers_to_transform")
    modules = ", ".join(sorted(modules)) if isinstance(modules, list) else modules
    alpha = f"{adapter.get('lora_alpha')}".removesuffix(".0")
    layers = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    versions = environment.get("versions") or {}
    commit, held = environment.get("model_revision"), environment.get("quantization")
    facts = {
        "method": METHODS[subject.settings.algorithm.name][0],
        "base": code(subject.base.hub_id or subject.base.name)
        + (f", commit {code(commit)}" if commit else ""),
        "data": code(_data(subject)[0]) + f", checksum {code(environment.get('data_revision'))}",
        "adapter": code(f"rank {adapter.get('r')}, alpha {alpha}, {modules} of {layers}"),
        "steps": f"{int(summary['steps']):,}, in {float(summary['seconds']):,.0f} seconds",
        "tokens": f"{sampled:,} sampled, {selected:,} of them with credit{share}",
        "numbers": f"base in {code(environment.get('dtype'))}"
        + (f", layers quantised to {code(held)}" if held else "")
        + ", adapter and loss in float32 or wider",
        "device": code(environment.get("device_name") or environment.get("device")),
        "versions": ", ".join(
            f"{name} {code(versions.get(name))}" for name in ("twig-rl", "torch", "transformers", "peft")
        ),
    }
    lines = [f"- {name}: {words}" for name, words in facts.items()]
    settings = yaml.safe_dump(_settings(subject), sort_keys=False, width=10_000, allow_unicode=True).strip()
    return (
        "## Training\n\n"
        + "\n".join(lines)
        + "\n\nSettings that are not Twig's defaults (of names of files, the "
        f"last part):\n\n{fenced(settings, 'yaml')}"
    )


def _settings(subject: Subject) -> dict[str, dict[str, Any]]:
    """The settings that differ from the defaults, and the three that name the run, in their groups."""
    settings = subject.settings
    named = {"model.name": settings.model.name, "task.name": settings.task.name}
    named["algorithm.name"] = settings.algorithm.name
    default = Settings.from_dict(_grouped(named)).flat()
    chosen = {
        key: last_part(str(value)) if key in _FILES else public(value)
        for key, value in settings.flat().items()
        if key in named or (value != default[key] and not key.startswith("log."))
    }
    chosen["model.name"] = public(subject.base.hub_id or subject.base.name)
    if "task.path" in chosen and _data(subject)[1] == settings.task.path:
        chosen["task.path"] = settings.task.path
    return _grouped(chosen)


def _grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return found


def _merging(subject: Subject) -> str:
    merge = subject.merge
    if merge is None:
        return ""
    wide = "float64" if merge.dtype == "float64" else "float32"
    rounded = "" if merge.dtype == wide else f" and rounded once to {merge.dtype}"
    held = subject.environment.get("quantization")
    other = (
        f" In training, the base had its layers quantised to {code(held)}; here they are not, so answers may "
        "differ from those of the evaluations."
    )
    return (
        f"## Merging\n\nEach adapted weight was added up in {wide}{rounded}. Between these files and base + "
        f"adapter, both in {merge.dtype}, the logits differ by at most {merge.difference:.2g} on one text "
        f"({merge.tokens} tokens; the largest logit there is {merge.largest:.3g}).{other if held else ''}"
    )


def _limits(subject: Subject) -> str:
    settings, summary = subject.settings, subject.summary
    before, result = summary.get("accuracy_before"), _measured(subject)
    lines = [
        f"One run with one seed ({settings.train.seed}): another seed gives another model.",
        "Trained and measured on one task, with prompts of one form. Nothing else was measured: no "
        "other task or prompt, nor safety or bias. What the base gets wrong elsewhere, this model does too.",
    ]
    if before and result and before["low"] <= result["high"] and result["low"] <= before["high"]:
        lines.append("The intervals before and after training overlap: the difference may be chance.")
    if result is None:
        lines.append("The accuracy of this model was not measured.")
    if subject.best:
        lines.append(
            "Chosen as the best of several evaluations on the same problems, so its accuracy is on average "
            "too high."
        )
    if subject.base.embedded:
        lines.append("The base knows multiplication of small numbers and nothing else: a model to try out.")
    passed = [name for name in _passed(subject) if name]
    if passed:
        lines.append(f"Passed from Python, so that no card can say what it was: {code(', '.join(passed))}.")
    if settings.model.adapter is not None:
        lines.append("Training went on from an earlier adapter; the numbers above are of the last run alone.")
    licence = (
        f"Licence: that of the base, `{subject.license}`."
        if subject.license
        else "The licence is not set here; the base's licence holds for what is made from it."
    )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in [*lines, licence])


def _citing(subject: Subject) -> str:
    papers = dict.fromkeys([PAPER, PAPERS.get(subject.settings.algorithm.name, PAPER)])
    entries = "\n\n".join([*papers, SOFTWARE.replace("VERSION", __version__)])
    return (
        "## Citing\n\nS-GRPO and T-SPMO are of [arXiv 2504.20834](https://arxiv.org/abs/2504.20834); Twig is "
        f"an independent implementation.\n\n{fenced(entries, 'bibtex')}"
    )


def _percent_or_dash(share: float | None) -> str:
    return "-" if share is None else percent(share)
