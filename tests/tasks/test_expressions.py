"""Answers that are expressions: what the allow-list lets through, what is equal, the process that compares.

The inputs that must not reach math-verify are counted at the door of the process, not guessed from times.
"""

import ast
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from answer_cases import CASES

from twig.common.errors import UserError
from twig.core.types import Score
from twig.tasks import answers, expressions
from twig.tasks.answers import Expression, read_answer, read_number, score_answer, score_lenient
from twig.tasks.expressions import MAX_LENGTH, allowed_expression, letters_of, same_expression

# Minutes of work that the allow-list cannot see: a power of a power of a power, its exponents three digits.
ENDLESS = r"((9^{999})^{999})^{999}"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What the process was asked."""
    same_expression.cache_clear()
    questions: list[tuple[str, str]] = []
    ask = expressions._Comparer.same

    def note(self: expressions._Comparer, gold: str, answer: str) -> bool:
        questions.append((gold, answer))
        return ask(self, gold, answer)

    monkeypatch.setattr(expressions._Comparer, "same", note)
    yield questions
    same_expression.cache_clear()


# ---- the allow-list ----------------------------------------------------------------------------------------

ALLOWED = [
    ("3*sqrt(2)/2", r"3*\sqrt{2}/2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{2}}{2}"),
    (r"\dfrac12\pi", r"\frac{1}{2}\pi"),
    (r"\left(\sqrt 2+1\right)^2", r"(\sqrt{2}+1)^{2}"),
    ("3√2", r"3\sqrt{2}"),
    ("2π", r"2\pi"),
    ("2^10", "2^{10}"),
    ("2**-1", "2^{-1}"),
    ("2^(1/2)", "2^{1/2}"),
    ("10¹²", "10^{12}"),
    ("2^999", "2^{999}"),
    (r"3 \times 10^8", "3*10^{8}"),
    (r"1,234\pi", r"1234\pi"),
    (r"\sqrt[3]{8}", r"\sqrt[3]{8}"),
    (r"\sqrt\pi", r"\sqrt{\pi}"),
    ("sin(3)", r"\sin(3)"),
    (ENDLESS, ENDLESS),
]
REFUSED = [
    "",
    "20!",
    r"\binom{9}{3}",
    "9^9^9",
    "9^{9^{9^9}}",
    "9^(9^9)",
    "2^1000",
    "2^{1000}",
    "2^{-1000}",
    "2^",
    "2^-",
    "2^*3",
    "x+1",
    "1200 1300",
    "1,2345",
    "12 or 13",
    "(3",
    "3)",
    "(3]",
    "[3]",
    r"\sqrt",
    r"\frac 1 2",
    r"\int x",
    "__import__('os')",
    "os.getcwd()",
    "lambda: 0",
    "3;4",
    "3|4",
    "3=4",
    "3" * (MAX_LENGTH + 1),
    "3+" * (MAX_LENGTH // 2) + "33",
    "^2",
    "²",
    "3+^2",
    r"\sqrt^2",
    r"\prod_{n=1}^{9} n",
    r"\sum n",
    r"\lim x",
    r"\operatorname{x}",
    "9↑↑9",
    "0x10",
    "1e9",
]


@pytest.mark.parametrize(("text", "latex"), ALLOWED)
def test_what_is_allowed_becomes_plain_latex(text: str, latex: str) -> None:
    assert allowed_expression(text) == latex
    assert allowed_expression(latex) == latex


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_on_the_list_is_refused(text: str) -> None:
    assert allowed_expression(text) is None


def test_letters_are_those_of_the_gold_answer() -> None:
    gold = allowed_expression(r"\pi x^2 + \sqrt{y}", None)
    assert gold is not None and letters_of(gold) == "xy"
    assert allowed_expression("y+x", "xy") == "y+x"
    assert allowed_expression("2xy", "xy") == "2xy"
    assert allowed_expression("x+z", "xy") is None
    assert allowed_expression("3 or 4", None) is None


# ---- readings ----------------------------------------------------------------------------------------------

READ = [
    (r"so $x = \boxed{3\sqrt{2}}$.", r"3\sqrt{2}"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"The answer is $2\pi$ cm.", r"2\pi"),
    (r"The answer is \(2\pi\).", r"2\pi"),
    (r"Answer: $$2\pi$$", r"2\pi"),
    ("#### 2^10", "2^{10}"),
    ("**Answer:** 3√2.", r"3\sqrt{2}"),
    (r"<answer>3\sqrt{2}</answer>", r"3\sqrt{2}"),
    (r"\boxed{3\sqrt{2}\text{ cm}}", r"3\sqrt{2}"),
    ("#### 12\nThat is \\boxed{2^5}.", "2^{5}"),
    (r"$3\sqrt{2}$", r"3\sqrt{2}"),
    (r"3\sqrt{2}.", r"3\sqrt{2}"),
]
NOT_READ = [
    "the answer is 5 + 8",  # a sum that is not worked out
    r"\boxed{\frac{1+2}{3}}",
    r"\boxed{3 \times 4}",
    r"The answer is $\sqrt{2}$ or $\sqrt{3}$.",
    r"The answer is $\sqrt{2}$, $\sqrt{3}$.",
    r"The answer is $\sqrt{2}$ + 1.",
    r"\boxed{3\sqrt{2}",
    r"\boxed{20!}",
    r"\boxed{9^{9^{9^9}}}",
    r"The answer is not $\sqrt{2}$.",
    r"It is $\sqrt{2}$.",
    "The answer is x.",
    r"\boxed{" + r"\sqrt{2}+" * 30 + "1}",
]


@pytest.mark.parametrize(("text", "latex"), READ)
def test_marked_expressions_are_read(text: str, latex: str) -> None:
    assert read_answer(text) == Expression(latex)
    assert read_number(text, strict=True) is None


@pytest.mark.parametrize("text", NOT_READ)
def test_what_is_no_expression_is_not_read(text: str) -> None:
    assert read_answer(text) is None


SCORED = [
    # gold, answer, answered, right
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", True, True),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{\sqrt{3}}{2}}", True, False),
    (r"3\sqrt{2}", r"The answer is $\sqrt{18}$.", True, True),
    (r"3\sqrt{2}", "#### 2", True, False),
    (r"2\pi", "#### 6.283185", True, True),
    (r"2\pi", "#### 6.28", True, False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True, True),
    ("x^2+2x+1", r"\boxed{(x+2)^2}", True, False),
    ("x^2+2x+1", r"\boxed{(y+1)^2}", False, False),
    ("1024", r"\boxed{2^{10}}", True, True),
    ("300000000", r"#### 3 \times 10^8", True, True),
    ("1024", r"\boxed{2^{9}}", True, False),
    ("2", r"\boxed{\sqrt[3]{8}}", True, True),
    ("12", r"\boxed{x}", False, False),
    ("13", "#### 5 + 8", False, False),
    ("362880", "#### 9!", True, False),
]


@pytest.mark.parametrize(("gold", "text", "answered", "right"), SCORED)
def test_expressions_are_compared_by_value(gold: str, text: str, answered: bool, right: bool) -> None:
    assert score_answer(text, gold) == Score(answered, right)


def test_the_lenient_reading_of_an_expression_is_the_strict_one_first() -> None:
    assert score_lenient(r"so \boxed{\sqrt{18}}, about 4.2", r"3\sqrt{2}") == Score(True, True)
    assert score_lenient("about 4.2", r"3\sqrt{2}") == Score(True, False)
    assert score_lenient(r"so \boxed{2^{10}} = 1024", "1024") == Score(True, True)


def test_very_long_numbers_are_no_expressions(asked: list) -> None:
    assert score_answer("#### " + "9" * 5000, r"3\sqrt{2}") == Score(True, False)
    assert asked == []


def test_nothing_is_evaluated_as_python() -> None:
    for module in (answers, expressions):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"eval", "exec", "compile_command", "literal_eval", "sympify", "parse_expr"}


# ---- the process -------------------------------------------------------------------------------------------


def test_plain_numbers_never_reach_it(asked: list) -> None:
    for text in ("#### 12", r"\boxed{\frac{24}{2}}", "The answer is $12.00.", "12", "#### 1,2", "#### 12!"):
        score_answer(text, "12")
        score_lenient(text, "12")
    for text in (r"\boxed{9^{9^{9^9}}}", r"\boxed{20!}", r"\boxed{2^{1000}}", r"\boxed{5+8}"):
        assert not score_answer(text, "12").right
    assert score_answer(r"\boxed{3\sqrt{2}}", r"3\sqrt2") == Score(True, True)  # the same text
    for text, strict, _ in CASES:
        if strict is not None:
            score_answer(text, "7")
    assert asked == []
    score_answer(r"\boxed{\sqrt{144}}", "12")
    assert asked == [("12", r"\sqrt{144}")]


def test_it_is_killed_after_a_second_and_started_anew(asked: list) -> None:
    assert same_expression(r"\sqrt{16}", "4")
    first = expressions._comparer(os.getpid()).process
    start = time.perf_counter()
    assert not same_expression(ENDLESS, "1")
    assert 0.9 < time.perf_counter() - start < 5
    assert first is not None and first.poll() is not None
    assert same_expression(r"\sqrt{25}", "5")
    second = expressions._comparer(os.getpid()).process
    assert second is not None and second.pid != first.pid
    assert same_expression(r"\sqrt{36}", "6")
    assert expressions._comparer(os.getpid()).process is second, "one process serves all"
    count = len(asked)
    assert not same_expression(ENDLESS, "1") and len(asked) == count, "asked once, remembered"


def test_it_serves_all_threads() -> None:
    same_expression.cache_clear()
    wrong = []

    def ask(number: int) -> None:
        for other in range(number, number + 4):
            if same_expression(str(number), rf"\sqrt{{{other * other}}}") != (other == number):
                wrong.append((number, other))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_survives_its_own_death() -> None:
    same_expression.cache_clear()
    assert same_expression(r"\sqrt{49}", "7")
    process = expressions._comparer(os.getpid()).process
    assert process is not None
    process.kill()
    process.wait()
    assert same_expression(r"\sqrt{64}", "8")


def test_what_it_cannot_read_is_not_equal() -> None:
    assert allowed_expression("2+") == "2+"
    assert not same_expression("2+", "2")
    assert same_expression(r"\sqrt{81}", "9")


def test_where_it_does_not_start_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = expressions._Comparer()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(UserError, match="^math-verify: .*math-verify") as caught:
        comparer.same("1", "2")
    assert "\n" not in str(caught.value) and comparer.process is None


# Runs where the starting method of processes matters: without the guard that `spawn` asks of a program.
SCRIPT = """
import multiprocessing, sys
from twig.tasks.answers import score_answer
from twig.tasks import expressions

def child(texts):
    return [score_answer(text, "4").right for text in texts]

print(score_answer("#### 4", "4").right, expressions._comparer.cache_info().currsize)
print(score_answer(r"\\boxed{\\sqrt{16}}", "4").right)
"""
SPAWNING = (
    SCRIPT
    + """
if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(child, [[r"\\boxed{\\sqrt{16}}", r"\\boxed{\\sqrt{25}}"]]))
    import os
    print("process", expressions._comparer(os.getpid()).process.pid)
"""
)


def _is_running(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_it_works_in_processes_of_either_kind_and_ends_with_them(tmp_path, method: str) -> None:
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    script = tmp_path / "own.py"
    script.write_text(SPAWNING)
    done = subprocess.run([sys.executable, str(script), method], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["True 0", "True"], "nothing is started before an expression needs it"
    assert "[[True, False]]" in lines and done.stderr == ""
    assert not _is_running(int(lines[-1].split()[1])), "closed at exit"


def test_it_needs_no_guard_in_the_program(tmp_path) -> None:
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["True", "0", "True"]


def test_it_ends_when_nobody_is_left_to_ask() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "twig.tasks.expressions"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.close()
        assert process.wait(timeout=30) == 0
