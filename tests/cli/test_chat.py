"""`twig chat`: the answers of a trained model and of its base, whatever the model writes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import HOSTILE
from rich.console import Console
from small_runs import PROMPTS, Heard, ask_to_stop, at

from twig.cli import chat
from twig.cli.app import main
from twig.config.load import Settings
from twig.evaluation.stream import Candidate, Speaker, Token, _Pieces
from twig.runs.adapters import adapter_of
from twig.runs.reader import CHECKPOINTS

PROMPT = next(iter(PROMPTS))


def said(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["chat", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["chat", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def speaker_of(folder: Path) -> Speaker:
    from twig.config.load import load

    with adapter_of(folder) as adapter:
        values = load(str(folder)).model_dump()
        values["model"]["adapter"] = str(adapter.folder)
        return Speaker.load(Settings.from_dict(values))


def greedy(model: torch.nn.Module, ids: np.ndarray, longest: int) -> list[int]:
    """The greedy answer, the whole text run again for each token."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < longest and (not answer or answer[-1] != 1):
            text = torch.tensor([[*ids.tolist(), *answer]])
            answer.append(int(model(input_ids=text, use_cache=False).logits[0, -1].argmax()))
    return answer


def test_the_answers_are_those_of_the_trained_model_and_of_its_base(run) -> None:
    trained = run("run")
    speaker = speaker_of(trained.folder)
    ids = speaker.encode(PROMPT)
    own = [token.id for token in speaker.answer(ids)]
    base = [token.id for token in speaker.answer(ids, base=True)]
    assert own == greedy(trained.model, ids, 7)
    with trained.model.disable_adapter():
        assert base == greedy(trained.model, ids, 7)
    assert own != base


def test_the_probabilities_are_those_of_each_model(run) -> None:
    trained = run("run", "rollout.temperature=0.5")
    speaker = speaker_of(trained.folder)
    ids = speaker.encode(PROMPT)
    (first, *_) = speaker.answer(ids)
    with torch.no_grad():
        own = torch.softmax(trained.model(input_ids=torch.tensor(ids)[None]).logits[0, -1] / 0.5, -1)
        with trained.model.disable_adapter():
            base = torch.softmax(trained.model(input_ids=torch.tensor(ids)[None]).logits[0, -1] / 0.5, -1)
    assert first.probability == pytest.approx(float(own.max()), abs=1e-5)
    choices = speaker.choices(ids, [], 2)
    assert 2 <= len(choices) <= 4
    assert max(each.trained for each in choices) == pytest.approx(float(own.max()), abs=1e-5)
    assert max(each.base for each in choices) == pytest.approx(float(base.max()), abs=1e-5)


def test_a_stopped_run_answers_from_its_newest_checkpoint(run, capsys) -> None:
    stopped = run("run", progress=Heard(step=at(4, ask_to_stop)))
    assert stopped.summary["status"] == "stopped"
    speaker = speaker_of(stopped.folder)
    ids = speaker.encode(PROMPT)
    assert [token.id for token in speaker.answer(ids)] == greedy(stopped.model, ids, 7)
    assert main(["chat", str(stopped.folder), "--prompt", PROMPT]) == 0
    assert "step 4" in capsys.readouterr().err


def test_a_run_without_checkpoint_or_adapter_is_one_line(whole, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(whole(), tmp_path / "run"))
    for name in (CHECKPOINTS, "adapter", "adapter-best"):
        shutil.rmtree(folder / name)
    assert "--resume" in refused(folder, "--prompt", "1", capsys=capsys)
    assert "--best" in refused(folder, "--prompt", "1", "--best", capsys=capsys) + "--best"


def test_a_model_that_was_passed_from_python_is_said(whole, base, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(whole(), tmp_path / "run"))
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"passed": "model, tokenizer"}))
    assert "from Python" in refused(folder, "--prompt", "1", capsys=capsys)
    assert said(folder, f"model.name={base}", "--prompt", "1", capsys=capsys).strip()


def test_each_line_of_a_pipe_is_a_problem(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("12*3=\n\n\u2603\n45*6=\n"))
    assert main(["chat", "tiny-arithmetic"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "letters" in err  # the embedded model knows no snowman


def test_a_model_without_adapter_has_no_base(capsys) -> None:
    assert "--fork" in refused("tiny-arithmetic", "--fork", "--prompt", "1*2=", capsys=capsys)


def test_answers_stand_beside_each_other_with_the_place_where_they_part(whole, capsys) -> None:
    text = said(whole(), "--fork", "--prompt", PROMPT, capsys=capsys)
    assert text.startswith("base ") and "\ntrained " in text
    assert "they part at token" in text


class Hostile:
    """Answers every problem with text that a terminal could act on."""

    trained = True

    def __init__(self) -> None:
        self.texts = ["\x1b[2J", "\x9b31m", *HOSTILE, "[red]", "\r", "a\nb", "\x1b]0;title\x07"]

    def encode(self, problem: str) -> np.ndarray:
        return np.arange(3)

    def answer(self, ids: np.ndarray, base: bool = False):
        texts = reversed(self.texts) if base else self.texts
        return (Token(number, text, 0.5) for number, text in enumerate(texts, 10 * base))

    def choices(self, ids, answer, num):
        return [Candidate(text, 0.5, 0.5) for text in self.texts]

    def token_text(self, token):
        return self.texts[token % len(self.texts)]

    class policy:
        temperature = 1.0


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("fork", [True, False])
def test_no_text_of_a_model_reaches_the_terminal_as_a_command(terminal, fork) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=80)
    chat._Chat(console, Hostile(), fork, fork).answer("x")
    lines = out.getvalue()
    own = ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\x1b[1m", "\x1b[0m")  # a live table's
    for code in own if terminal else ():
        lines = lines.replace(code, "")
    lines = lines.replace("\r", "") if terminal and fork else lines
    assert all(c.isprintable() or c == "\n" for c in lines)
    assert "\\x1b[2J" in lines.replace("\n", "") or "\\x1b[2J" in lines


def test_characters_of_several_tokens_are_written_whole() -> None:
    letters = ["\u4e2d".encode()[:1], "\u4e2d".encode()[1:], b"a", "\u0645".encode()[:1], b" "]

    def decode(rows: list[np.ndarray]) -> list[str]:
        return [b"".join(letters[i] for i in row).decode(errors="replace") for row in rows]

    pieces, texts = _Pieces(decode), []
    for number in range(len(letters)):
        pieces.add(number)
        texts.append(pieces.text(number == len(letters) - 1))
    assert texts[:3] == ["", "\u4e2d", "a"]
    assert "".join(texts) == decode([np.arange(len(letters))])[0]
