"""Writes the model card of a run: results, settings, versions, limits, in Markdown.

The template in assets/ has the text. Every value in it is escaped as Markdown, or shown as code.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from twig import __version__
from twig.common.redact import code, fenced, last_part, public, shown
from twig.common.text import percent, shortened
from twig.config.load import Settings
from twig.core.algorithms.base import PAPER, Algorithm
from twig.report.figures import figure_of
from twig.runs.reader import KINDS, answers_of, any_graded, missing_kinds
from twig.tasks.load import TASKS

SOFTWARE = """@software{twig,
  title = {Twig: reinforcement learning for language models on small hardware},
  author = {{The Twig maintainers}},
  version = {VERSION},
  license = {Apache-2.0}
}"""

# Settings that name files: only the last part of the name is shown.
_FILES = ("model.adapter", "task.path", "task.reward_file", "algorithm.file")
_LONGEST_ANSWER = 1000  # characters of a problem or an answer
_LONGEST_PROMPT = 120  # characters in the example; a longer one is shown below it
# What Markdown could take for more than a letter: anywhere in a line, and at the beginning of one.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$]|^(?:[-+#=]|\d+[.)](?!\S))")


@dataclass(frozen=True)
class Base:
    """The base model as others find it: its name, and its id on the Hub if that is recorded."""

    name: str
    hub_id: str | None = None
    embedded: bool = False


@dataclass(frozen=True)
class Merge:
    """How a merged model differs from base and adapter.

    `difference` is the largest one between their logits on `tokens` tokens, `largest` the largest logit
    there; `dtype` is that of the weights, f16 or q8_0 in a GGUF file.
    """

    dtype: str
    difference: float
    largest: float
    tokens: int

    @property
    def sum_dtype(self) -> str:
        """The dtype in which weights were added up."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    `name` is USER/NAME on the Hub, or the folder's. `summary` and `environment` are the run's files,
    `adapter` its adapter_config.json; `best`: the adapter of the best evaluation, not of the last step.
    `prompt` is the form of the prompts, `chat` whether a chat template wrote it. `merge` is None for an
    adapter. `file` is the GGUF file, None without one.
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
    file: str | None = None

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """The evaluation of what is exported."""
        return self.summary.get("accuracy_best" if self.best else "accuracy_after")

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Problems with the answers before and after training; none of data that may be somebody's own."""
        task, passed = self.settings.task, self.passed.split(", ")
        if task.name == "custom" or task.path is not None or {"train_dataset", "eval_dataset"} & {*passed}:
            return []
        last = not self.best or (self.measured or {}).get("step") == self.summary["steps"]
        return (answers_of(self.summary) or []) if last else []

    @property
    def passed(self) -> str:
        """What was passed from Python, with commas."""
        return self.environment.get("passed") or ""


@dataclass(frozen=True)
class _Data:
    """The training data in a few words, and its id on the Hub if it was read from there."""

    text: str
    hub_id: str | None = None


@dataclass(frozen=True)
class _Row:
    """A row in the table of results."""

    label: str
    accuracy: Mapping[str, Any]


def model_card(subject: Subject) -> str:
    """Returns the card's text: YAML metadata and Markdown."""
    from huggingface_hub import ModelCard

    settings, base, environment = subject.settings, subject.base, subject.environment
    algorithm = settings.algorithm
    prompt = str(public(subject.prompt))
    parts = vars(subject) | {
        "metadata": _metadata(subject),
        "version": __version__,
        "title": algorithm.title or algorithm.name,
        "algorithm": algorithm.summary,
        "base_name": base.hub_id or base.name,
        "model_id": shown(subject.name),
        "base_folder": f"FOLDER/{shown(base.name)}",
        "prompt": prompt,
        "example": "..." if len(prompt) > _LONGEST_PROMPT else prompt,
        "stop": public(settings.rollout.stop),
        "results": _results(subject),
        "graded": any_graded([subject.measured]),
        "figure_of": figure_of,
        "measured": subject.measured,
        "answers": [_answer_texts(row) for row in subject.answers],
        "missing": missing_kinds(subject.answers) if subject.answers else [],
        "may_be_chance": _may_be_chance(subject.summary.get("accuracy_before"), subject.measured),
        "data": _data(subject).text,
        "adapter": _adapter(subject.adapter),
        "versions": environment.get("versions") or {},
        "quantization": environment.get("quantization"),
        "changed_settings": _yaml(_settings(subject)),
        "passed": subject.passed,
        "citations": _citations(algorithm),
    }
    return str(ModelCard(_renderer()(parts)))


def _renderer() -> Callable[[dict[str, Any]], str]:
    """Returns the template as a function of its values."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    # Jinja2 escapes HTML, and leaves Markup alone: here that is Markdown, in which every value ends up.
    def filter_of(function: Callable[..., str]) -> Callable[..., Markup]:
        return lambda *values: Markup(function(*values))

    def finalize(value: Any) -> Markup:
        return value if isinstance(value, Markup) else Markup(_markdown(value))

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": filter_of(code), "fenced": filter_of(fenced), "python": filter_of(repr)}
    environment.filters["percent"] = percent
    return environment.get_template("card.md.jinja").render


def _asset(name: str) -> str:
    return (files("twig.export") / "assets" / name).read_text(encoding="utf-8")


def _markdown(value: Any) -> str:
    """Returns a value as text within a line of Markdown.

    >>> _markdown("*a* | <b>"), _markdown("# a"), _markdown("T-SPMO, 3.5 %")
    ('\\\\*a\\\\* \\\\| \\\\<b\\\\>', '\\\\# a', 'T-SPMO, 3.5 %')
    """
    return _MARKUP.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", shown(value))


# ---- metadata --------------------------------------------------------------------------------------------


def _metadata(subject: Subject) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    merged = subject.merge is not None
    data, measured = _data(subject), subject.measured
    results = None
    if measured is not None:
        graded = any_graded([measured])
        name = "mean reward" if graded else "accuracy"
        value = measured["reward"] if graded else measured["value"]
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data.hub_id or subject.settings.task.name,
                dataset_name=shown(data.hub_id or data.text),
                metric_type="reward" if graded else "accuracy",
                metric_value=round(float(value or 0.0), 4),
                metric_name=f"{name}, greedy, {int(measured['n'])} problems",
            )
        ]
    tags = ["twig", "reinforcement-learning", shown(subject.settings.algorithm.name)]
    tags += [*([] if merged else ["lora"]), *(["gguf"] if subject.file else []), "arxiv:2504.20834"]
    card = ModelCardData(
        library_name=None if subject.file else "transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=subject.base.hub_id and shown(subject.base.hub_id),
        license=subject.license,
        datasets=[data.hub_id] if data.hub_id else None,
        tags=tags,
        model_name=shown(subject.name),
        eval_results=results,
    )
    return card.to_yaml()


def _data(subject: Subject) -> _Data:
    task = subject.settings.task
    own = getattr(import_module(TASKS[task.name]), "HUB_NAME", None)
    if "train_dataset" in subject.passed.split(", "):
        return _Data(f"{task.name}, data passed from Python")
    if task.path is None and own is not None:
        return _Data(f"{task.name}: {own}", own)
    if task.path is None:
        digits = " by ".join(map(str, task.digits))
        return _Data(f"{task.name}, made by a generator, factors of {digits} digits")
    if _is_on_the_hub(task.path):
        return _Data(f"{task.name}: {task.path}", task.path)
    return _Data(f"{task.name}: {last_part(task.path)}, a file of its own")


def _is_on_the_hub(path: str) -> bool:
    # Whether a data set was fetched from the Hub under this name: a folder may have such a name too.
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return False
    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset")).is_dir()


# ---- parts of the page -----------------------------------------------------------------------------------


def _results(subject: Subject) -> list[_Row]:
    summary, mark = subject.summary, " (this model)"
    rows = [("before training", summary.get("accuracy_before"))]
    best = summary.get("accuracy_best")
    if subject.best and best is not None:
        rows.append((f"after step {int(best['step'])}, the best{mark}", best))
    after = f"after step {int(summary['steps'])}{'' if subject.best else mark}"
    rows.append((after, summary.get("accuracy_after")))
    return [_Row(label, accuracy) for label, accuracy in rows if accuracy is not None]


def _answer_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a problem and its answers as the card shows them: no secrets and paths, and not too long."""
    texts = {when: str(public(row[when]["text"].strip())) for when in ("before", "after")}
    short = {when: shortened(text, _LONGEST_ANSWER) or "(empty)" for when, text in texts.items()}
    return {
        "title": KINDS[row["kind"]],
        "prompt": shortened(str(public(row["prompt"])), _LONGEST_ANSWER),
        "answer": row["answer"],
        "answers": [(when, row[when]["right"], short[when]) for when in ("before", "after")],
    }


def _may_be_chance(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    if any_graded([before, after]):
        return False
    return bool(before and after and before["low"] <= after["high"] and after["low"] <= before["high"])


def _adapter(config: Mapping[str, Any]) -> str:
    modules, layers = config.get("target_modules"), config.get("layers_to_transform")
    modules = ", ".join(sorted(modules)) if isinstance(modules, list) else modules
    alpha = f"{config.get('lora_alpha')}".removesuffix(".0")
    layers = "all layers" if layers is None else f"layers {', '.join(map(str, layers))}"
    return f"rank {config.get('r')}, alpha {alpha}, {modules} of {layers}"


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=10_000, allow_unicode=True).strip()


def _settings(subject: Subject) -> dict[str, Any]:
    # Those that differ from the defaults, and those that name the run, in their groups.
    settings = subject.settings
    named = {
        "model.name": settings.model.name,
        "task.name": settings.task.name,
        "algorithm.name": settings.algorithm.name,
    }
    if settings.algorithm.file is not None:
        named["algorithm.file"] = settings.algorithm.file
    default = Settings.from_dict(_grouped(named)).flat()
    chosen = {
        key: last_part(str(value)) if key in _FILES else public(value)
        for key, value in settings.flat().items()
        if key in named or (value != default.get(key) and not key.startswith("log."))
    }
    chosen["model.name"] = public(subject.base.hub_id or subject.base.name)
    if "task.path" in chosen and _data(subject).hub_id == settings.task.path:
        chosen["task.path"] = settings.task.path
    return _grouped(chosen)


def _grouped(flat: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for key, value in flat.items():
        *names, last = key.split(".")
        inner = groups
        for name in names:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return groups


def _papers(algorithm: Algorithm) -> list[str]:
    # The paper that Twig grew out of, and the algorithm's own.
    return list(dict.fromkeys([PAPER, algorithm.citation or PAPER]))


def _citations(algorithm: Algorithm) -> str:
    return "\n\n".join([*_papers(algorithm), SOFTWARE.replace("VERSION", __version__)])
