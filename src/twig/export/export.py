"""Writes a finished run as a folder to share: the adapter, or the base with it merged in, and a model card.

The folder is written beside its place and renamed into it: whole or not at all. The base on disk is only
read. Uploading comes last, when the folder is there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.redact import last_part
from twig.common.tokenizer import Tokenizer
from twig.config.load import RUN_CONFIG, Settings, load
from twig.config.schema import Model
from twig.core.types import Example
from twig.engine.load import end_ids, load_config, load_model, load_tokenizer
from twig.engine.lora import load_adapter
from twig.engine.model_files import EMBEDDED, source_of
from twig.export.card import Base, Merge, Subject, model_card
from twig.export.gguf import FORMATS, Origin, Vocabulary, refuse_gguf, write_adapter, write_model
from twig.export.upload import Push, check_push, push_folder
from twig.runs.adapters import adapter_of
from twig.runs.reader import COMPLETIONS, ENVIRONMENT, SUMMARY, is_finished, is_run, read_summary
from twig.tasks.load import texts_of
from twig.tasks.prompts import names_in, render_prompt
from twig.training.state import RunState

EXPORTS = Path("exports")
CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TEXT = "347 * 26 = 9022. A text like any other, for comparing logits."
_TOKENS = 256  # of which the logits are compared
# A merge may miss this share of the adapter's effect, or what rounding alone explains: so many times the
# precision of the weights' dtype.
_MERGE_ERROR, _ROUNDING = 0.1, 8.0
# The precision of what a GGUF file holds: of float16, and of a block of 8-bit numbers.
_PRECISION = {"f16": 2.0**-10, "q8_0": 2.0**-7}
_PLAIN = {"gguf_file": None, "revision": None}
# Problems of the kind that a task has, for the form of its prompts; no row of anybody's data is shown.
_PROBLEMS = {
    "multiplication": "347*26=",
    "svamp": "Ann has 3 apples and buys 4 more. How many apples does she have?",
    "gsm8k": "Ann has 3 apples and buys twice as many. How many apples does she have?",
}


@dataclass(frozen=True)
class ExportOptions:
    """What is exported of a run.

    `merged`: the base with the adapter merged into it, not the adapter alone. `best`: the adapter of the
    best evaluation, not of the last step. `base_model`: the base's id on the Hub if the run was trained on a
    folder, or the folder where the base is now. `tokenizer` replaces the base's. `gguf`: one GGUF file in
    place of safetensors, a merged model in this form (f16 or q8_0).
    """

    merged: bool = False
    best: bool = False
    base_model: str | None = None
    tokenizer: Tokenizer | None = None
    gguf: str | None = None

    def __post_init__(self) -> None:
        if self.gguf not in (None, *FORMATS):
            raise UserError("--gguf-type", f"{self.gguf} is not written", f"Pass {' or '.join(FORMATS)}")

    @property
    def file(self) -> str | None:
        """The name of the GGUF file; None without one."""
        if self.gguf is None:
            return None
        return f"model-{self.gguf}.gguf" if self.merged else "adapter.gguf"


@dataclass(frozen=True)
class Exported:
    """What was exported.

    `base` is as the card names it; `file` is the GGUF file (None without one); `merge` says how exact a merge
    is (None for an adapter); `url` is the page on the Hub (None if nothing was uploaded); `prompt` is a
    prompt of the form that the run had.
    """

    folder: Path
    base: Base
    file: Path | None = None
    merge: Merge | None = None
    url: str | None = None
    prompt: str = ""


@dataclass(frozen=True)
class _Source:
    """A run's files, read."""

    folder: Path
    adapter: Path
    settings: Settings
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Located:
    """The base as others find it, and where it is loaded from here."""

    base: Base
    place: str


@dataclass(frozen=True)
class _Job:
    """What is written: a run, its base with the settings to load it, and the folder to write to."""

    source: _Source
    base: Base
    model: Model
    tokenizer: Tokenizer
    options: ExportOptions
    draft: Path
    origin: Origin


@dataclass(frozen=True)
class _Prompt:
    """A prompt as the run's model saw it, and whether a chat template wrote it."""

    text: str
    chat: bool


def export_run(
    run: str | Path,
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    *,
    push: Push | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the run in the folder `run` to the folder `output`, ready to share.

    That is safetensors and tokenizer, or a GGUF file, and the model card of what `options` say: by default
    the adapter of the last step; of a run that did not finish, that of its newest checkpoint. `output` is by
    default exports/NAME. `push` uploads the folder too.

    Raises UserError for what can be fixed; `output` is then as it was before.
    """
    options, progress = options or ExportOptions(), progress or Progress()
    check_push(push)
    with _exportable(Path(run), options.best, progress) as source:
        return _export(source, output, options, push, progress)


def _export(
    source: _Source, output: str | Path | None, options: ExportOptions, push: Push | None, progress: Progress
) -> Exported:
    target = _target(output, source.folder, options)
    located = _locate_base(source, options.base_model)
    base = located.base
    if base.hub_id is None and not base.embedded:
        progress.message(
            f"the card names no base on the Hub, only {base.name}; add --base-model ID if it has one"
        )
    progress.phase("loading")
    model = _base_settings(source, located.place)
    if options.gguf is not None:
        refuse_gguf(load_config(model), base.name, options.merged)
    tokenizer = options.tokenizer or load_tokenizer(model)
    prompt, own_license = _prompt(source.settings, tokenizer), _license(model) if options.merged else None
    with _drafted(target) as draft:
        origin = Origin(target.name, base.hub_id, own_license)
        merge = _write(_Job(source, base, model, tokenizer, options, draft, origin), progress)
        subject = Subject(
            name=push.repo if push else target.name,
            settings=source.settings,
            summary=source.summary,
            environment=source.environment,
            adapter=source.config,
            base=base,
            best=options.best,
            prompt=prompt.text,
            chat=prompt.chat,
            license=own_license,
            merge=merge,
            file=options.file,
        )
        (draft / CARD).write_text(model_card(subject), encoding="utf-8")
    url = None if push is None else push_folder(target, push, progress)
    file = None if options.file is None else target / options.file
    return Exported(target, base, file, merge, url, prompt.text)


# ---- what is read ----------------------------------------------------------------------------------------


@contextmanager
def _exportable(folder: Path, best: bool, progress: Progress) -> Iterator[_Source]:
    """Yields what is exported of a run: an adapter in its folder, or that of its newest checkpoint."""
    summary = read_summary(folder)
    damaged = summary is None and (folder / SUMMARY).exists()
    if best or damaged or not is_run(folder) or is_finished(summary):
        yield _read(folder, best)
        return
    with adapter_of(folder) as found:
        if found.state is None:
            yield _read(folder, best)
            return
        progress.message(f"the run is not finished; this is its adapter after step {found.step}")
        settings, environment = load(str(folder)), _json(folder / ENVIRONMENT)
        summary = _summary_at(settings, found.state, summary or {})
        yield _Source(folder, found.folder, settings, summary, environment, _json(found.folder / CONFIG))


def _summary_at(settings: Settings, state: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the summary of a run at one of its checkpoints; `summary` is the one it stopped with."""
    standing = RunState(**state["standing"])
    last = standing.evaluations[-1] if standing.evaluations else {}
    measured = {key: value for key, value in last.items() if key != "step"}
    return {
        "status": "stopped",
        "algorithm": settings.algorithm.name,
        "task": settings.task.name,
        "steps": standing.step,
        "accuracy_before": standing.before,
        "accuracy_after": measured if last.get("step") == standing.step > 0 else None,
        "accuracy_best": standing.best,
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        **standing.totals,
    }


def _read(folder: Path, best: bool) -> _Source:
    if not is_run(folder):
        raise UserError(
            str(folder), f"no run (it has no {RUN_CONFIG})", "Pass the folder of a run, such as runs/NAME"
        )
    settings, summary = load(str(folder)), read_summary(folder)
    resume = f"Run twig train {folder} --resume"
    if summary is None or summary.get("schema_version") != 1:
        raise UserError(str(folder / SUMMARY), "no result that can be read", resume)
    if not best and summary["status"] != "finished":
        other = ", or pass --best" if summary.get("accuracy_best") else ""
        raise UserError(str(folder), f"the run is {summary['status']}, not finished", resume + other)
    if best and summary.get("accuracy_best") is None:
        raise UserError("--best", f"{folder} has no evaluation since training began", "Leave out --best")
    adapter = folder / ("adapter-best" if best else "adapter")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(str(adapter), f"it has no {WEIGHTS}", resume)
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise UserError(str(adapter / WEIGHTS), f"damaged ({error})", "Export another run") from error
    config = _json(adapter / CONFIG)
    return _Source(folder, adapter, settings, summary, _json(folder / ENVIRONMENT), config)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "Export another run") from error
    if not isinstance(value, dict):
        raise UserError(str(path), "not a JSON object", "Export another run")
    return value


def _locate_base(source: _Source, given: str | None) -> _Located:
    recorded = source.config.get("base_model_name_or_path") or ""
    if given is None and not recorded:
        raise UserError(
            "--base-model", "the run's model was passed from Python", "Pass its id on the Hub or its folder"
        )
    if given is not None and not _is_local(given):
        if not _HUB_ID.fullmatch(given):
            problem = f"{given} is neither an id on the Hub nor a folder or GGUF file"
            raise UserError("--base-model", problem, "Pass USER/NAME, such as Qwen/Qwen2-1.5B")
        return _Located(Base(given, hub_id=given), recorded if _is_local(recorded) else given)
    place = given or recorded
    if place in EMBEDDED:
        return _Located(Base(place, embedded=True), place)
    # A folder elsewhere may have such a name too: only what came from the Hub has a commit.
    if not _is_local(place) and source.environment.get("model_revision") and _HUB_ID.fullmatch(place):
        return _Located(Base(place, hub_id=place), place)
    return _Located(Base(last_part(str(Path(place).expanduser().resolve()))), place)


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    return bool(name) and (path.is_dir() or path.is_file())


def _base_settings(source: _Source, place: str) -> Model:
    """Returns the settings to load the base with: those of the run, but on the CPU."""
    model = source.settings.model
    is_the_runs_own = place == source.config.get("base_model_name_or_path")
    dtype = str(source.environment.get("dtype")).removeprefix("torch.")
    values = {
        "name": place,
        "gguf_file": model.gguf_file if is_the_runs_own else None,
        "revision": source.environment.get("model_revision") if is_the_runs_own else None,
        "dtype": dtype if dtype in _DTYPES else model.dtype,
        "device": "cpu",
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }
    return Model.model_validate(values)


def _prompt(settings: Settings, tokenizer: Tokenizer) -> _Prompt:
    asked, task = settings.task, texts_of(settings)
    problem = _PROBLEMS.get(asked.name, "...")
    columns = dict.fromkeys(names_in(task.prompt_template), "...")
    columns |= {"question": problem, "prompt": problem}
    text = render_prompt(task, Example(problem, columns), tokenizer)
    return _Prompt(text, asked.chat != "never" and bool(getattr(tokenizer, "chat_template", None)))


def _license(model: Model) -> str | None:
    """Returns the licence that the base's own card names, if that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = Path(source_of(model).place) / CARD
    if not path.is_file() and _HUB_ID.fullmatch(model.name):
        cached = try_to_load_from_cache(model.name, CARD)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's page: whatever is wrong with it, it names no licence
        return None
    name = data.get("license")
    # `other` means nothing without the name and the link that go with it.
    usable = isinstance(name, str) and re.fullmatch(r"[a-z0-9.-]+", name) and name != "other"
    return name if usable else None


# ---- what is written -------------------------------------------------------------------------------------


def _target(output: str | Path | None, run: Path, options: ExportOptions) -> Path:
    name = f"{run.resolve().name}{'-best' if options.best else ''}{'-merged' if options.merged else ''}"
    name += "-gguf" if options.gguf else ""
    target = EXPORTS / name if output is None else Path(output).expanduser()
    target = target if target.name not in ("", "..") else target.resolve()
    try:
        free = not target.exists() or not any(target.iterdir())
    except OSError as error:
        problem = f"{target} is not a folder ({error.strerror})"
        raise UserError("--output", problem, "Pass --output DIR with another folder") from error
    if not free:
        raise UserError("--output", f"{target} is not empty", "Pass another folder, or remove this one first")
    return target


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """Yields a folder to write to, and renames it to `target` if all went well, else removes it."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in draft.iterdir():  # some libraries write files that only their owner may read
            shutil.copymode(draft / CARD, path)
        if target.exists():
            target.rmdir()  # it is empty; not every system renames over a folder
        os.replace(draft, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"{target} cannot be written ({reason})"
        raise UserError("--output", problem, "Pass --output DIR with another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(job: _Job, progress: Progress) -> Merge | None:
    """Writes the weights, and the tokenizer unless they are in one GGUF file with it."""
    if job.options.gguf is None:
        job.tokenizer.save_pretrained(job.draft)
    if job.options.merged:
        return _write_merged(job, progress)
    if (file := job.options.file) is not None:
        write_adapter(job.draft / file, job.source.adapter, load_config(job.model), job.origin)
    else:
        _write_adapter(job.source, job.base, job.draft)
    return None


def _write_adapter(source: _Source, base: Base, draft: Path) -> None:
    shutil.copyfile(source.adapter / WEIGHTS, draft / WEIGHTS)
    # Nothing is named that could be somebody else's model on the Hub.
    name = base.hub_id or (base.name if base.embedded else None)
    model = source.settings.model
    revision = model.revision if name == model.name else None
    config = source.config | {"base_model_name_or_path": name, "revision": revision}
    (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_merged(job: _Job, progress: Progress) -> Merge:
    """Merges, writes and reads back what was written; raises UserError if its logits are others."""
    base, form = job.model, job.options.gguf
    if getattr(load_config(base), "quantization_config", None) is not None:
        raise UserError(
            "--merged",
            f"{base.name} is quantised, and an adapter cannot be merged into that",
            "Leave out --merged, or pass --base-model with the model that is not quantised",
        )
    if form is not None:  # so that weights are rounded once, to what the file holds
        base = base.model_copy(update={"dtype": "float32"})
    model, _ = load_model(base, job.tokenizer)
    ids = _ids(job.source, job.tokenizer)
    peft_model = load_adapter(model, job.source.adapter)
    expected = _logits(peft_model, ids)
    with peft_model.disable_adapter():
        effect = expected - _logits(peft_model, ids)
    progress.phase("merging")
    model = merge_adapter(peft_model)
    progress.phase("writing")
    place = _save_gguf(job, model, job.draft / job.options.file) if job.options.file else _save(job, model)
    config = None if form is None else model.config  # which transformers reads from a GGUF file only in part
    del model, peft_model
    progress.phase("checking")
    written, _ = load_model(base.model_copy(update={"name": str(place), **_PLAIN}), job.tokenizer, config)
    logits = _logits(written, ids)
    # If both are -inf (tokens that a model rules out) they do not differ.
    error = torch.where(logits == expected, 0.0, (logits - expected).abs())
    difference, largest = float(error.max()), float(expected[expected.isfinite()].abs().max())
    share = float(error.norm() / effect[effect.isfinite()].norm().clamp(min=1e-30))
    precision = _PRECISION[form] if form else torch.finfo(written.dtype).eps
    if not (share <= _MERGE_ERROR or difference <= _ROUNDING * precision * largest):
        raise UserError(
            "--merged",
            f"the merged model differs from base and adapter by {share:.0%} of what the adapter does",
            "Leave out --merged",
        )
    return Merge(form or str(written.dtype).removeprefix("torch."), difference, largest, ids.shape[1])


def _save(job: _Job, model: PreTrainedModel) -> Path:
    try:
        logging.disable_progress_bar()
        model.save_pretrained(job.draft)
    finally:
        logging.enable_progress_bar()
    return job.draft


def _save_gguf(job: _Job, model: PreTrainedModel, path: Path) -> Path:
    base = source_of(job.model).fetched(job.model.revision).gguf_file
    texts = Vocabulary(job.tokenizer, end_ids(model, job.tokenizer), base)
    write_model(path, model, str(job.options.gguf), texts, job.origin)
    return path


def merge_adapter(peft_model: PeftModel) -> PreTrainedModel:
    """Returns the base with the adapter added to its weights; `peft_model` is used up.

    Each weight is added up in float32 (or wider) and rounded to its dtype once. Raises UserError if a sum is
    not a finite number of that dtype.
    """
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = module.get_base_layer().weight
        assert isinstance(weight, Tensor), "LoRA adapts layers that have one weight"
        dtype = weight.dtype
        if not dtype.is_floating_point:
            fix = "Leave out --merged, or pass --base-model with the model that is not quantised"
            raise UserError("--merged", "the base is quantised", fix)
        weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
        module.merge()
        weight.data = weight.data.to(dtype)
        if not weight.isfinite().all():
            raise UserError("--merged", f"{name} leaves the range of {dtype}", "Leave out --merged")
    return peft_model.unload()


def _ids(source: _Source, tokenizer: Tokenizer) -> Tensor:
    """Returns token ids [1, T]: a prompt of the run and an answer to it, else any text."""
    files = sorted((source.folder / COMPLETIONS).glob("step-*.parquet"))
    if files:
        from pyarrow import parquet

        row = parquet.read_table(files[0], columns=["prompt", "token_ids"]).slice(0, 1).to_pylist()[0]
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] + row["token_ids"]
    else:
        ids = tokenizer(_TEXT)["input_ids"]
    return torch.tensor([ids[:_TOKENS]])


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Returns logits [T, V], float32 or wider."""
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
