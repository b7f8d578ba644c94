r"""Compares two expressions such as `\frac{\sqrt{2}}{2}` and `1/\sqrt{2}`.

Only what an allow-list has is compared: under 200 characters of numbers, single letters, a few functions,
sums, products, fractions, roots and powers whose exponent contains no power and no number of more than three
digits. math-verify compares them in a separate process, which is killed after a second: some allowed
expressions take hours, and neither signals nor threads stop that. The process starts with the first
comparison that needs it, serves all later ones, restarts after a kill, and ends with this one.

Nothing is evaluated as Python. Knows nothing of answers or tasks.
"""

import atexit
import functools
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

from twig.common.errors import UserError

MAX_LENGTH = 200  # characters
TIMEOUT = 1.0  # seconds for one comparison, without the start of the process
_START = 120.0  # seconds for the start: one second, or many if disk and processor are busy
_CHILD_TIMEOUT = 10.0  # seconds after which the process ends itself if nobody kills it
_CHILD_MEMORY = 2 << 30  # bytes

_TOKEN = re.compile(
    r"\s+|\\[,;:! ]|(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^(){}\[\]])"
)
_UNICODE = str.maketrans({"√": "\\sqrt ", "π": "\\pi ", "×": "*", "·": "*", "⋅": "*", "÷": "/", "–": "-"})
_RAISED = {ord(raised): str(digit) for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_SAME = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "times": "*", "cdot": "*", "div": "/", "**": "^"}
_FUNCTIONS = ("sin", "cos", "tan", "ln", "log")
_PRODUCTS = "abcxyz"  # an unknown word of these letters counts as a product: `xy`, but not `or`
_NAMES = ("frac", "sqrt", "pi", *_FUNCTIONS)
_CLOSES = {"(": ")", "{": "}", "[": "]"}


def allowed_expression(text: str, letters: str | None = "") -> str | None:
    r"""Returns the text as plain LaTeX if the allow-list has all of it, else None.

    `letters` are the single letters that may stand for unknowns; None allows any.

    >>> allowed_expression(r"3 * sqrt(2)/2")
    '3*\\sqrt{2}/2'
    >>> print(allowed_expression("20!"), allowed_expression("9^9^9"), allowed_expression("2^1000"))
    None None None
    """
    if len(text) > MAX_LENGTH:
        return None
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda raised: f"^{{{raised[0].translate(_RAISED)}}}", text)
    tokens = _tokens(text.translate(_UNICODE), letters)
    if not tokens or not _is_nested(tokens):
        return None
    for shape in (_shape_roots, _shape_powers):
        tokens = shape(tokens)
        if tokens is None:
            return None
    latex = "".join(f"\\{token} " if token in _NAMES else token for token in tokens)
    return re.sub(r" (?![A-Za-z0-9])", "", latex)


def letters_of(expression: str) -> str:
    """Returns the single letters of an expression from `allowed_expression`."""
    return "".join(sorted(set(re.findall("[A-Za-z]", re.sub(r"\\[a-z]+", "", expression)))))


@functools.lru_cache(maxsize=4096)
def same_expression(gold: str, answer: str) -> bool:
    """Tells whether two expressions from `allowed_expression` are equal.

    False also if that cannot be decided within a second. Decimal numbers are equal if they agree in six
    places. Raises UserError if the process that compares does not start.
    """
    return gold == answer or _comparer(os.getpid()).same(gold, answer)


# ---- the allow-list ----------------------------------------------------------------------------------------


def _tokens(text: str, letters: str | None) -> list[str] | None:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        name = match["command"] or match["word"]
        if match["number"]:
            if tokens and tokens[-1][-1].isdigit():  # "1200 1300", "1,2345"
                return None
            tokens.append(match["number"].replace(",", ""))
        elif match["sign"] or match["command"] in _SAME:
            tokens.append(_SAME.get(match["sign"] or match["command"], match["sign"] or match["command"]))
        elif name in _NAMES:
            tokens.append(name)
        elif match["word"]:
            word = match["word"]
            allowed = (word if len(word) == 1 else _PRODUCTS) if letters is None else letters
            if not set(word) <= set(allowed):
                return None
            tokens += word
        elif name and name not in ("left", "right"):
            return None
    return tokens


def _is_nested(tokens: list[str]) -> bool:
    # Brackets close in order, and square ones stand only where a root has its degree.
    open_ = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token == "[" and before != "sqrt":
            return False
        if token in _CLOSES:
            open_.append(_CLOSES[token])
        elif token in _CLOSES.values() and (not open_ or open_.pop() != token):
            return False
    return not open_


def _close(tokens: list[str], start: int) -> int:
    # Where the bracket is that closes the one at `start`; the brackets are well nested.
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] in _CLOSES) - (tokens[place] in _CLOSES.values())
        if depth == 0:
            return place
    raise AssertionError("brackets are well nested")


def _shape_roots(tokens: list[str]) -> list[str] | None:
    # Writes `sqrt(2)` and `\sqrt 2` as `\sqrt{2}`, `\frac12` as `\frac{1}{2}`: arguments stand in braces.
    tokens = list(tokens)
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else ""
        if token == "sqrt" and following == "(":
            tokens[_close(tokens, place + 1)], tokens[place + 1] = "}", "{"
        elif token == "sqrt" and (
            following[-1:].isdigit() or following == "pi" or len(following) == 1 and following.isalpha()
        ):
            tokens[place + 1] = f"{{{following}}}".replace("pi", "\\pi")
        elif token == "frac" and re.fullmatch(r"\d\d", following):
            tokens[place + 1] = f"{{{following[0]}}}{{{following[1]}}}"
        elif token in ("sqrt", "frac") and following not in ("{", "["):
            return None
    return tokens


def _shape_powers(tokens: list[str]) -> list[str] | None:
    # Puts exponents in braces; None if one is itself a power, or has a number of more than three digits.
    shaped: list[str] = []
    place = 0
    while place < len(tokens):
        shaped.append(tokens[place])
        place += 1
        if shaped[-1] != "^":
            continue
        if not (place > 1 and (tokens[place - 2][-1].isalnum() or tokens[place - 2] in (")", "}"))):
            return None
        start = place
        if place < len(tokens) and tokens[place] in "+-":
            place += 1
        if place == len(tokens):
            return None
        if tokens[place] in "({" and place == start:
            end = _close(tokens, place)
            exponent = tokens[place + 1 : end]
        elif tokens[place][-1].isalnum() and tokens[place] not in ("sqrt", "frac", *_FUNCTIONS):
            end = place
            exponent = tokens[start : end + 1]
        else:
            return None
        if "^" in exponent or any(len(re.sub(r"\D", "", token)) > 3 for token in exponent):
            return None
        shaped += ["{", *exponent, "}"]
        place = end + 1
        if tokens[place : place + 1] == ["^"]:
            return None
    return shaped


# ---- the process that compares -----------------------------------------------------------------------------


class _Comparer:
    """Sends comparisons to the process, one at a time, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner = os.getpid()
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def same(self, gold: str, answer: str) -> bool:
        """Returns the result of the process; False if it is killed for taking too long, or dies."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps([gold, answer]) + "\n")
                self.process.stdin.flush()
                result = self.lines.get(timeout=TIMEOUT)
            except (queue.Empty, OSError):
                result = ""
            if not result:
                self._stop()
            return result == "same"

    def close(self) -> None:
        """Ends the process, unless the process that this one was forked from owns it."""
        if self.owner == os.getpid():
            with self.lock:
                self._stop()

    def _start(self) -> None:
        self._stop()
        # The process imports from the same folders as this one.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.lines = queue.SimpleQueue()
        # Pipes cannot be read with a time limit on every system; queues can.
        thread = threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True)
        thread.start()
        try:
            ready = self.lines.get(timeout=_START)
        except queue.Empty:
            ready = ""
        if not ready:
            self._stop()
            raise UserError(
                "math-verify",
                "the process that compares expressions does not start",
                f"Run {sys.executable} -m {__name__} to see why, or install math-verify[antlr4_13_2]",
            )

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None and self.process.stdout is not None
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except OSError:  # unwritten text has no reader any more
                    pass
            self.process = None


@functools.cache
def _comparer(process_id: int) -> _Comparer:
    # One per process: a forked process must not share the pipes of its parent.
    comparer = _Comparer()
    atexit.register(comparer.close)
    return comparer


def _read(stream: Iterable[str], lines: "queue.SimpleQueue[str]") -> None:
    try:
        for line in stream:
            lines.put(line.strip())
    except (OSError, ValueError):  # closed meanwhile
        pass
    finally:
        lines.put("")


def _serve() -> None:
    """Runs the process: for each line [gold, answer] of its input it writes a line `same` or `different`."""
    import faulthandler
    import signal

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = open(os.devnull, "w")
    os.dup2(nowhere.fileno(), 1)  # what libraries print is not a result
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides when it ends

    from math_verify import LatexExtractionConfig, parse, verify

    # By default sympy's parser of Python text would run too, and that evaluates its input.
    latex_only = [LatexExtractionConfig()]

    def read(text: str) -> list:
        # parsing_timeout: declared as a number, but None is the documented way to have no limit.
        options: dict[str, Any] = {"fallback_mode": "no_fallback", "parsing_timeout": None}
        return parse(f"${text}$", latex_only, **options)

    def same(gold: str, answer: str) -> bool:
        try:
            return bool(verify(read(gold), read(answer), timeout_seconds=None))
        except (Exception, MemoryError):  # expressions that cannot be compared are not equal
            return False

    same(r"\frac{\sqrt{2}}{2}", r"x^2+1")  # the parser builds its tables at its first use
    _limit_memory()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        # Ends the process from a thread without the interpreter lock, which one long power would hold.
        faulthandler.dump_traceback_later(_CHILD_TIMEOUT, exit=True, file=nowhere)
        gold, answer = json.loads(line)
        answers.write("same\n" if same(gold, answer) else "different\n")
        answers.flush()
        faulthandler.cancel_dump_traceback_later()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_CHILD_MEMORY, _CHILD_MEMORY))
    except (ImportError, ValueError, OSError):  # Windows, and systems with a lower limit or none
        pass


if __name__ == "__main__":
    _serve()
