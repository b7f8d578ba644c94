"""Defines the command `twig chat`: problems answered by a trained model, and by its base beside it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from twig.cli.completion import complete_run
from twig.cli.console import Overrides, quiet_libraries, result_console
from twig.cli.display import clean
from twig.cli.models import named_model
from twig.common.errors import UserError
from twig.common.text import one_line, percent
from twig.config.load import Settings
from twig.report.progress import showing

if TYPE_CHECKING:
    import numpy as np

    from twig.evaluation.stream import Candidate, Speaker, Token

    Pairs = Iterator[tuple[Token | None, ...]]

_CHOICES = 3  # of each model, where the two part
_MOST_TOKENS = 20  # of the table of tokens
_BEFORE_FORK = 8  # of them, before the two part
_LONGEST_TOKEN = 24  # characters


def chat_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run folder, an adapter, or a model.",
            autocompletion=complete_run,
        ),
    ],
    overrides: Overrides = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this, and stop. Without it: line by line.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also what the base answers, side by side.")] = False,
    fork: Annotated[
        bool,
        typer.Option("--fork", help="Also where the two part, and how likely each token was."),
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="A run's best evaluated adapter, not the last.")
    ] = False,
) -> None:
    """Answer problems with a trained model, as its run would write them: greedy, one by one."""
    with named_model(model, best, "chat", overrides or ()) as named:
        settings = Settings.from_dict({"task": {"name": "custom"}} | named.values, overrides or ())
        with showing(settings.log.progress) as progress:
            progress.phase("loading")
            speaker = _load(settings)
            named.tell(progress.notice)
    if (base or fork) and not speaker.trained:
        option = "--fork" if fork else "--base"
        raise UserError(option, f"{model} has no adapter, so it is the base", f"Leave {option} out")
    chat = _Chat(result_console(), speaker, base or fork, fork)
    if prompt is not None:
        chat.answer(prompt)
        return
    for line in _lines(speaker):
        try:
            chat.answer(line)
        except UserError as error:
            sys.stderr.write(f"twig: {one_line(error)}\n")


def _load(settings: Settings) -> "Speaker":
    from twig.evaluation.stream import Speaker

    quiet_libraries()
    return Speaker.load(settings)


def _lines(speaker: "Speaker") -> Iterator[str]:
    """Yields the lines that are typed, or those of a pipe, without empty ones."""
    if sys.stdin.isatty():
        template = "" if speaker.task.prompt_template is None else " The run's template is put around it."
        keys = "Ctrl-C stops an answer, Ctrl-D ends."
        sys.stderr.write(f"Each line is a problem of its own.{template} {keys}\n")
    while True:
        try:
            line = input("\n> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            sys.stderr.write("\n")
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.rstrip("\n")


@dataclass
class _Answer:
    """An answer as far as it is written."""

    tokens: "list[Token]" = field(default_factory=list)

    @property
    def text(self) -> str:
        return clean("".join(token.text for token in self.tokens))


@dataclass(frozen=True)
class _Chat:
    """Where answers are shown, who gives them, and what is shown beside them."""

    console: Console
    speaker: "Speaker"
    base: bool
    fork: bool

    def answer(self, problem: str) -> None:
        """Shows the answer to a problem while it is written; Ctrl-C stops it."""
        ids = self.speaker.encode(problem)
        if not self.base:
            self._stream(self.speaker.answer(ids))
            return
        base, trained = _Answer(), _Answer()
        both = zip_longest(self.speaker.answer(ids, base=True), self.speaker.answer(ids))
        try:
            self._side_by_side(both, base, trained)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        if self.fork:
            _show_fork(self.console, self.speaker, ids, base.tokens, trained.tokens)

    def _stream(self, tokens: "Iterator[Token]") -> None:
        try:
            for token in tokens:
                if token.text:
                    self.console.print(Text(clean(token.text)), end="", soft_wrap=True)
                    self.console.file.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        self.console.print()

    def _side_by_side(self, both: "Pairs", base: _Answer, trained: _Answer) -> None:
        """Shows two answers in two columns; on a terminal while they are written."""
        live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            live = Live(console=self.console, refresh_per_second=12, transient=True)
            live.start()
        try:
            for pair in both:
                for answer, token in zip((base, trained), pair, strict=True):
                    if token is not None:
                        answer.tokens.append(token)
                if live is not None:
                    live.update(self._columns(base, trained))
        finally:
            if live is not None:
                live.update(Text(""))
                live.stop()
            self._show(base, trained)

    def _show(self, base: _Answer, trained: _Answer) -> None:
        if self.console.is_terminal:
            self.console.print(self._columns(base, trained))
            return
        for name, answer in (("base", base), ("trained", trained)):
            _say(self.console, f"{name:<8} {answer.text}")

    def _columns(self, base: _Answer, trained: _Answer) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        table.add_column("base", ratio=1, overflow="fold")
        table.add_column("trained", ratio=1, overflow="fold")
        table.add_row(Text(base.text), Text(trained.text))
        return table


# ---- where two answers part ------------------------------------------------------------------------------


def _show_fork(
    console: Console,
    speaker: "Speaker",
    prompt_ids: "np.ndarray",
    base: "Sequence[Token]",
    trained: "Sequence[Token]",
) -> None:
    """Prints where two answers part, what each model would write there, and how likely each token was."""
    at = _fork_of(base, trained)
    if at is None:
        _say(console, f"\nboth answers are the same {len(trained)} tokens")
    else:
        shared = [token.id for token in trained[:at]]
        text = _quoted("".join(token.text for token in trained[:at]))
        _say(console, f"\nthey part at token {at + 1}" + (f", after {text}" if shared else ""))
        choices = speaker.choices(prompt_ids, shared, _CHOICES)
        console.print(_choices_table(choices))
    _say(console, "\nhow likely each token was" + _at_temperature(speaker))
    first = max((at or 0) - _BEFORE_FORK, 0)
    pairs = list(zip_longest(base, trained))
    console.print(_odds_table(speaker, pairs[first : first + _MOST_TOKENS], first, at))
    left = len(pairs) - first - _MOST_TOKENS
    if left > 0:
        _say(console, f"and {left} more")
    least = min(range(len(trained)), key=lambda i: trained[i].probability, default=None)
    if least is not None:
        token = trained[least]
        text = _quoted(token.text or speaker.token_text(token.id))
        _say(console, f"least likely of the trained: token {least + 1}, {text}, {percent(token.probability)}")


def _fork_of(base: "Sequence[Token]", trained: "Sequence[Token]") -> int | None:
    """Returns the place of the first token that differs; None if the answers are the same."""
    pairs = zip_longest(base, trained)
    return next((i for i, (a, b) in enumerate(pairs) if a is None or b is None or a.id != b.id), None)


def _at_temperature(speaker: "Speaker") -> str:
    temperature = speaker.policy.temperature
    return "" if temperature == 1 else f", at the run's temperature of {temperature:g}"


def _choices_table(choices: "Sequence[Candidate]") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("next token")
    for name in ("base", "trained"):
        table.add_column(name, justify="right")
    for choice in choices:
        table.add_row(Text(_quoted(choice.text)), percent(choice.base), percent(choice.trained))
    return table


def _odds_table(
    speaker: "Speaker", pairs: "Sequence[tuple[Token | None, ...]]", first: int, fork: int | None
) -> Table:
    """Returns a table of the tokens of two answers, numbered from `first`; the fork is bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right")
    for name in ("base", "trained"):
        table.add_column(name)
        table.add_column("", justify="right")
    for number, pair in enumerate(pairs, first):
        cells = []
        for token in pair:
            text = "" if token is None else _quoted(token.text or speaker.token_text(token.id))
            cells += [Text(text), Text("" if token is None else percent(token.probability))]
        table.add_row(str(number + 1), *cells, style="bold" if number == fork else "")
    return table


def _quoted(text: str) -> str:
    """Returns a token's text in quotation marks, its line ends as signs, and only the end of a long one."""
    text = clean(text).replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\\t")
    return f'"{text}"' if len(text) <= _LONGEST_TOKEN else f'"...{text[3 - _LONGEST_TOKEN :]}"'


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
