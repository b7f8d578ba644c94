"""A finished run as a folder to share: the adapter, or the base with the adapter merged into it, and a card.

The folder is written beside its place and renamed into it: whole or not at all. The base on disk is only
read. Pushing it to the Hub is a step of its own, after the folder is there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
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
from twig.config.load import RUN_CONFIG, Settings, load
from twig.config.schema import Model
from twig.core.types import Example
from twig.engine.load import EMBEDDED, load_config, load_model, load_tokenizer, place_of
from twig.engine.lora import load_adapter
from twig.export.card import Base, Merge, Subject, model_card
from twig.export.upload import check_push, push_folder
from twig.runs.reader import COMPLETIONS, ENVIRONMENT, is_run, read_summary
from twig.tasks.base import Task
from twig.tasks.load import TASKS
from twig.tasks.prompts import render_prompt

EXPORTS = Path("exports")
CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TEXT = "347 * 26 = 9022. A text like any other, for comparing logits."
_TOKENS = 256  # of which the logits are compared
# Problems of the kind that a task has, for the form of its prompts; no row of anybody's data is shown.
_PROBLEMS = {
    "multiplication": "347*26=",
    "svamp": "Ann has 3 apples and buys 4 more. How many apples does she have?",
    "gsm8k": "Ann has 3 apples and buys twice as many. How many apples does she have?",
}


@dataclass(frozen=True)
class Exported:
    """What was exported: the folder, the base as the card names it, how exact a merge is (None for an
    adapter), and the page on the Hub (None where it was not pushed)."""

    folder: Path
    base: Base
    merge: Merge | None = None
    url: str | None = None


@dataclass(frozen=True)
class _Source:
    """A run's files, read."""

    folder: Path
    adapter: Path
    settings: Settings
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]


def export_run(
    run: str | Path,
    output: str | Path | None = None,
    *,
    merged: bool = False,
    best: bool = False,
    base_model: str | None = None,
    push: str | None = None,
    public: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the run in the folder `run` to the folder `output`, ready to share; returns what was written.

    The adapter, or with `merged` the base with the adapter merged into it: safetensors, tokenizer, model
    card. With `best` it is the adapter of the best evaluation, not of the last step. `output` is by default
    exports/NAME. `base_model` is the base's id on the Hub, where the run was trained on a folder, or the
    folder that the base lies in now. `push` (USER/NAME) uploads the folder too, to a repository that is
    private unless `public`. `tokenizer` takes the place of the base's.

    Raises UserError, one line, for what can be fixed; `output` is then as it was before.
    """
    progress = progress or Progress()
    check_push(push, public)
    source = _read(Path(run), best)
    target = _target(output, source.folder, merged, best)
    base, place = _base(source, base_model)
    if base.hub_id is None and not base.embedded:
        progress.message(
            f"the card names no base on the Hub, only {base.name}; add --base-model ID if it has one"
        )
    progress.phase("loading")
    wanted = _wanted(source, place)
    tokenizer = tokenizer or load_tokenizer(wanted)
    prompt, chat = _prompt(source.settings, tokenizer)
    with _drafted(target) as draft:
        tokenizer.save_pretrained(draft)
        if merged:
            merge = _write_merged(source, wanted, tokenizer, draft, progress)
        else:
            merge = None
            _write_adapter(source, base, draft)
        subject = Subject(
            name=push or target.name,
            settings=source.settings,
            summary=source.summary,
            environment=source.environment,
            adapter=source.config,
            base=base,
            best=best,
            prompt=prompt,
            chat=chat,
            license=_license(place) if merged else None,
            merge=merge,
        )
        (draft / CARD).write_text(model_card(subject), encoding="utf-8")
    url = None if push is None else push_folder(target, push, public, progress)
    return Exported(target, base, merge, url)


# ---- what is read ----------------------------------------------------------------------------------------


def _read(folder: Path, best: bool) -> _Source:
    if not is_run(folder):
        raise UserError(
            f"{folder}: no run (it has no {RUN_CONFIG}); write the folder of a run, such as runs/NAME"
        )
    settings, summary = load(str(folder)), read_summary(folder)
    go_on = f"go on with it: twig train {folder} --resume"
    if summary is None or summary.get("schema_version") != 1:
        raise UserError(f"{folder}: it has no result that can be read (summary.json); {go_on}")
    if not best and summary["status"] != "finished":
        other = ", or write --best" if summary.get("accuracy_best") else ""
        raise UserError(f"{folder}: the run is {summary['status']}, not finished; {go_on}{other}")
    if best and summary.get("accuracy_best") is None:
        raise UserError(f"--best: {folder} has no evaluation since training began; leave --best out")
    adapter = folder / ("adapter-best" if best else "adapter")
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: it has no {WEIGHTS}; {go_on}")
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise UserError(f"{adapter / WEIGHTS}: damaged ({error}); export another run") from error
    config = _json(adapter / CONFIG)
    return _Source(folder, adapter, settings, summary, _json(folder / ENVIRONMENT), config)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export another run") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; export another run")
    return found


def _base(source: _Source, given: str | None) -> tuple[Base, str]:
    """The base as others find it, and where it is loaded from here."""
    recorded = source.config.get("base_model_name_or_path") or ""
    if given is None and not recorded:
        raise UserError(
            "--base-model: the run's model was passed from Python; write its id on the Hub or its folder"
        )
    if given is not None and not _is_folder(given):
        if not _HUB_ID.fullmatch(given):
            raise UserError(
                f"--base-model: {given} is neither an id on the Hub nor a folder; write USER/NAME, such as "
                "Qwen/Qwen2-1.5B"
            )
        return Base(given, hub_id=given), recorded if _is_folder(recorded) else given
    place = given or recorded
    if place in EMBEDDED:
        return Base(place, embedded=True), place
    # The same words may name a folder elsewhere: only what came from the Hub has a commit.
    if not _is_folder(place) and source.environment.get("model_revision") and _HUB_ID.fullmatch(place):
        return Base(place, hub_id=place), place
    return Base(last_part(str(Path(place).expanduser().resolve()))), place


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).expanduser().is_dir()


def _wanted(source: _Source, place: str) -> Model:
    """How the base is loaded: as the run had it, but on the CPU."""
    model = source.settings.model
    is_the_runs_own = place == source.config.get("base_model_name_or_path")
    dtype = str(source.environment.get("dtype")).removeprefix("torch.")
    return Model(
        name=place,
        revision=source.environment.get("model_revision") if is_the_runs_own else None,
        dtype=dtype if dtype in _DTYPES else model.dtype,
        device="cpu",
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )


def _prompt(settings: Settings, tokenizer: Any) -> tuple[str, bool]:
    """A prompt as the run's model saw it, and whether a chat template wrote it."""
    from importlib import import_module

    wanted = settings.task
    module = import_module(TASKS[wanted.name])
    problem = _PROBLEMS.get(wanted.name, "...")
    template = wanted.prompt_template or getattr(module, "PROMPT", None)
    columns = dict.fromkeys(re.findall(r"\{(\w+)\}", template or ""), "...")
    columns |= {"question": problem, "prompt": problem}
    task = Task(wanted.name, (), (), (), prompt_template=template, system_prompt=wanted.system_prompt)
    text = render_prompt(task, Example(problem, columns), tokenizer, wanted)
    return text, wanted.chat != "never" and bool(getattr(tokenizer, "chat_template", None))


def _license(place: str) -> str | None:
    """The licence that the base's own card names, where that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = Path(place_of(place)) / CARD
    if not path.is_file() and _HUB_ID.fullmatch(place):
        cached = try_to_load_from_cache(place, CARD)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except Exception:  # somebody else's page: whatever is wrong with it, no licence is known
        return None
    # `other` means nothing without the name and the link that go with it.
    return (
        found if isinstance(found, str) and re.fullmatch(r"[a-z0-9.-]+", found) and found != "other" else None
    )


# ---- what is written -------------------------------------------------------------------------------------


def _target(output: str | Path | None, run: Path, merged: bool, best: bool) -> Path:
    name = f"{run.resolve().name}{'-best' if best else ''}{'-merged' if merged else ''}"
    target = EXPORTS / name if output is None else Path(output).expanduser()
    target = target if target.name not in ("", "..") else target.resolve()
    try:
        free = not target.exists() or not any(target.iterdir())
    except OSError as error:
        raise UserError(f"--output {target}: not a folder ({error.strerror}); write another") from error
    if not free:
        raise UserError(f"--output {target}: not empty; write another, or remove it first")
    return target


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `target` where all went well, else nothing is left of it."""
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
        raise UserError(f"--output {target}: cannot be written ({reason}); write another") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_adapter(source: _Source, base: Base, draft: Path) -> None:
    shutil.copyfile(source.adapter / WEIGHTS, draft / WEIGHTS)
    # Nothing is named that could be somebody else's model on the Hub.
    name = base.hub_id or (base.name if base.embedded else None)
    model = source.settings.model
    revision = model.revision if name == model.name else None
    config = source.config | {"base_model_name_or_path": name, "revision": revision}
    (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_merged(source: _Source, wanted: Model, tokenizer: Any, draft: Path, progress: Progress) -> Merge:
    if getattr(load_config(wanted), "quantization_config", None) is not None:
        raise UserError(
            f"--merged: {wanted.name} is quantised, and an adapter cannot be merged into that; leave "
            "--merged out, or write --base-model with the model that is not quantised"
        )
    model, _ = load_model(wanted)
    ids = _ids(source, tokenizer)
    peft_model = load_adapter(model, source.adapter)
    expected = _logits(peft_model, ids)
    progress.phase("merging")
    model = merge_adapter(peft_model)
    progress.phase("writing")
    try:
        logging.disable_progress_bar()
        model.save_pretrained(draft)
    finally:
        logging.enable_progress_bar()
    del model, peft_model
    progress.phase("checking")
    written, _ = load_model(wanted.model_copy(update={"name": str(draft), "revision": None}))
    found = _logits(written, ids)
    # Where both are -inf (tokens that a model rules out) the difference is none.
    difference = torch.where(found == expected, 0.0, (found - expected).abs()).max()
    largest = expected[expected.isfinite()].abs().max()
    dtype = str(written.dtype).removeprefix("torch.")
    return Merge(dtype, float(difference), float(largest), ids.shape[1])


def merge_adapter(peft_model: PeftModel) -> PreTrainedModel:
    """The base with the adapter added to its weights; `peft_model` is used up.

    Each weight is added up in float32 (or wider) and rounded to its dtype once. Raises UserError where a sum
    is not a finite number of that dtype.
    """
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        dtype = layer.weight.dtype
        if not dtype.is_floating_point:
            raise UserError("--merged: the base is quantised; load it unquantised, or leave --merged out")
        layer.weight.data = layer.weight.data.to(torch.promote_types(dtype, torch.float32))
        module.merge()
        layer.weight.data = layer.weight.data.to(dtype)
        if not layer.weight.isfinite().all():
            raise UserError(f"--merged: {name} leaves the range of {dtype}; leave --merged out")
    return peft_model.unload()


def _ids(source: _Source, tokenizer: Any) -> Tensor:
    """Token ids [1, T]: a prompt of the run and an answer to it, else any text."""
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
    """Logits [T, V], float32 or wider."""
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
