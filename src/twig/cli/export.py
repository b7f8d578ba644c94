"""Defines the command `twig export`: one library call, and what it wrote."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import quiet_libraries, result_console
from twig.cli.display import quoted
from twig.common.errors import UserError
from twig.common.text import one_line
from twig.report.progress import showing
from twig.runtime.stop import stoppable

_LONGEST_PROMPT = 60  # in the command shown; most are long


def export_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The folder of a run.", autocompletion=complete_run),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write. Without it: exports/NAME.")
    ] = None,
    merged: Annotated[
        bool,
        typer.Option("--merged/--adapter", help="The base with the adapter merged into it, or the adapter."),
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="The best evaluated adapter, not the last.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The base's id on the Hub, if it was a folder (or its new folder)."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to the Hub too, privately.")
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="As a GGUF file, for llama.cpp, Ollama and LM Studio.")
    ] = False,
    gguf_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="With --merged --gguf: f16, or q8_0 of half the size.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everyone to see.")] = False,
) -> None:
    """Write a trained model as a folder to share, with a model card."""
    if public and push is None:
        raise UserError("--public", "nothing is pushed", "Add --push USER/NAME")
    if gguf_type is not None and not (gguf and merged):
        raise UserError("--gguf-type", "it is the form of a whole model", "Add --merged --gguf")
    with showing("auto") as progress, stoppable() as stop:
        stop.at_once = True  # nothing half is left behind, so there is nothing to wait for
        progress.phase("starting")
        from twig.export.export import ExportOptions, export_run
        from twig.export.upload import Push

        quiet_libraries()
        options = ExportOptions(merged, best, base_model, gguf=(gguf_type or "f16") if gguf else None)
        done = export_run(run, output, options, push=Push(push, public) if push else None, progress=progress)
    facts = {
        "folder": str(done.folder) if done.file is None else str(done.file),
        "form": "merged model" if merged else "adapter",
        "base": done.base.hub_id or done.base.name,
    }
    if done.merge is not None:
        facts["exact"] = f"logits differ by at most {done.merge.difference:.2g} ({done.merge.dtype})"
    if done.url is not None:
        facts["page"] = done.url
    elif done.file is None:
        facts["next"] = f"read {quoted(done.folder / 'README.md')}, then share the folder"
    else:
        facts["next"] = _llama_command(done.file, done.prompt, merged)
    if done.file is not None and not merged:
        facts["note"] = f"BASE.gguf is {facts['base']} as a GGUF file; with --merged, one file is enough"
    for name, text in facts.items():
        result_console().print(Text(f"{name:<8} {one_line(text)}"), soft_wrap=True)


def _llama_command(file: Path, prompt: str, merged: bool) -> str:
    """Returns the command of llama.cpp that answers a prompt; a long one is left for the user to write."""
    text = shlex.quote(prompt) if prompt.isprintable() and len(prompt) <= _LONGEST_PROMPT else "PROMPT"
    model = f"-m {quoted(file)}" if merged else f"-m BASE.gguf --lora {quoted(file)}"
    return f"llama-completion {model} -no-cnv --temp 0 -p {text}"
