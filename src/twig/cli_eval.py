"""The command `twig eval`: its words become settings, one library call measures, the result is printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from twig.cli_shared import Overrides, quiet_libraries, result_console
from twig.config import Settings, load
from twig.display import accuracy_table, showing
from twig.progress import Progress
from twig.records import UserError
from twig.runlog import is_run
from twig.tasks import TASKS, load_task
from twig.wording import either


def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A run folder, an adapter, or a model.")
    ],
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="The task. Without it: the run's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Problems to answer. Without it: all.")
    ] = None,
) -> None:
    """Measure a model's accuracy, with a 95 % interval."""
    settings = _settings_to_evaluate(model, task, overrides or [], limit)
    with showing(settings.log.progress) as progress:
        result = _evaluate(settings, progress)
    console = result_console()
    console.print(accuracy_table({settings.task.name: result}))
    found = "" if result["found"] is None else f"answer found {100 * result['found']:.1f} %, "
    if result["right_lenient"] is not None:
        found += f"last number right {100 * result['right_lenient']:.1f} %, "
    length = f"mean length {result['mean_length']:.1f} tokens, cut off {100 * result['truncated']:.1f} %"
    console.print(Text(f"\n{found}{length}"), soft_wrap=True)


def _evaluate(settings: Settings, progress: Progress) -> dict[str, Any]:
    from twig.evaluate import evaluate_policy
    from twig.models import end_ids, load_model, suppressed_ids
    from twig.policy import Policy, attach

    quiet_libraries()
    progress.phase("loading")
    task = load_task(settings)
    if not task.eval:
        raise UserError(f"task {task.name}: nothing to evaluate on; write task.eval_split= the split to use")
    model, tokenizer = load_model(settings.model)
    suppressed = suppressed_ids(
        model, settings.rollout.suppress_tokens, len(model.get_output_embeddings().weight)
    )
    lora, ends = settings.lora, end_ids(model, tokenizer)
    # A new adapter adds nothing until it is trained: without model.adapter this is the model itself.
    peft_model = attach(
        model,
        r=lora.r,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        layers=lora.layers,
        adapter=settings.model.adapter,
    )
    policy = Policy(peft_model, suppress_tokens=suppressed, plain=settings.model.engine == "plain")
    result, _ = evaluate_policy(
        policy,
        tokenizer,
        task,
        settings.task,
        end_ids=ends,
        max_completion_length=settings.rollout.max_completion_length,
        limit=settings.eval.limit,
        batch_size=settings.eval.batch_size,
        stop=settings.rollout.stop,
        progress=progress,
    )
    return result.as_dict()


def _settings_to_evaluate(model: str, task: str | None, overrides: list[str], limit: int | None) -> Settings:
    if "=" in model and not Path(model).exists():
        raise UserError(f"{model}: a setting where the model belongs; write twig eval MODEL_OR_RUN {model}")
    folder = Path(model)
    if is_run(folder):
        values = load(model).model_dump()
        values["model"]["adapter"] = _adapter_of(folder)
    elif (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        values = {"model": {"name": base["base_model_name_or_path"], "adapter": model}}
    else:
        values = {"model": {"name": model}}
    if task is not None and task != values.get("task", {}).get("name"):
        values["task"] = {"name": task}
    if "task" not in values and not any(word.startswith("task.name=") for word in overrides):
        raise UserError(
            f"--task: not set, and {model} is not a run that has one; write {either(list(TASKS))}"
        )
    return Settings.from_dict(values, overrides if limit is None else [*overrides, f"eval.limit={limit}"])


def _adapter_of(folder: Path) -> str:
    for name in ("adapter", "adapter-best"):
        if (folder / name / "adapter_config.json").is_file():
            return str(folder / name)
    raise UserError(f"{folder}: the run has no adapter yet; go on with it: twig train {folder} --resume")
