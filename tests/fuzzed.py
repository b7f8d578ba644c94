"""Random texts that are hard to read an answer out of: what patterns stumble over, repeated and nested."""

import random
from collections.abc import Callable

# What a pattern may start to match at each place, and give up much later.
PIECES = r"""
1, 1,234, 12.5 1.2.3. 1/ 1/2/ 1e 1e9 -1 - -- +- $ $$ $1 \$ % 12% 1½ ½ 2(3+4) '1 1'1 a1 1a 1_ _1
# #1 #### ####1 #1# \boxed{ \boxed{1} \boxed \boxed{\frac{ \frac{1}{ \frac12 \dfrac \sqrt{ \sqrt{2} 3\sqrt{2}
\left( \right) \( \) \[ \] \text{ \, {,} \! \\ \ { } {} ( ) [ ] (( )) ^ ^{ ^2 2^{10} 9^{9^{9 20! π/2
answer answer: answer_is Answer:** **answer** <answer> </answer> <answer>12 x= x=1 =1 1=1= x=x= 5x8=
or 12or ,and to 12, minus eggs is the apples * ** *** _ __ `` ``` ~~ > - |
² ⁹ √2 π ∞ ١ १, ٫ ٬ １ － ＃ − – — ⅔ ⁄ 十 é 😀
""".split()
PIECES += [" ", "  ", "\t", "\n", "\r\n", "\x00", "\x85", "\u2028", "\u00a0", "\u202f1", "\u0301"]
PHRASES = [
    "The answer is ",
    "the answer (in dollars) is ",
    "answer to the problem is x = ",
    "answer is about around exactly ",
    "so $x = 3 + 4 = ",
    "he has 12 eggs, 3 pears. ",
    "**Final answer:** $",
    "\n### Answer\n",
    "\n#### ",
    "\n1. ",
]
ALPHABETS = r"""
0123456789 0123456789, 01,._ {} \{} \ # #_1 ()[]{}$ *_`~>#| =x1_ +-*/^=1_ eE+-1 answeris:_ aA_1
١٢٣۴५६৭１２３ ١,٫٬1 ²³⁴½¾⅔1_
""".split()
ALPHABETS = [letters.replace("_", " ") for letters in ALPHABETS]
ALPHABETS += [" \t\n", "\u00a0\u202f\u20091", "\x00\x1b\ud7ff\uffff1", "a_1"]


def _repeated(rng: random.Random, size: int) -> str:
    piece = "".join(rng.choices(PIECES + PHRASES, k=rng.randint(1, 4))) or "1"
    return piece * (size // len(piece))


def _mixed(rng: random.Random, size: int) -> str:
    few = rng.choices(PIECES + PHRASES, k=rng.randint(2, 12))
    return rng.choice(["", " ", "\n"]).join(rng.choices(few, k=max(size // 4, 1)))


def _characters(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(rng.choice(ALPHABETS), k=size))


def _nested(rng: random.Random, size: int) -> str:
    before, after = rng.choice(
        [
            ("\\boxed{", "}"),
            ("\\frac{", "}{2}"),
            ("\\sqrt{", "}"),
            ("(", ")"),
            ("<answer>", "</answer>"),
            ("{", "}"),
        ]
    )
    depth = size // (len(before) + len(after))
    return before * depth + rng.choice(["12", "", "x"]) + after * rng.choice([depth, depth // 2, 0])


def _begun(rng: random.Random, size: int) -> str:
    # A marker, and then nothing that ends it.
    return rng.choice(PHRASES) + _characters(rng, size)


def _ended(rng: random.Random, size: int) -> str:
    return _characters(rng, size) + rng.choice([*PHRASES, "#### 12", "12", "\\boxed{3\\sqrt{2}}"])


def _lines(rng: random.Random, size: int) -> str:
    line = _characters(rng, rng.randint(1, 300))
    return "\n".join([rng.choice(PHRASES) + line] * (size // (len(line) + 8)))


KINDS: list[Callable[[random.Random, int], str]] = [
    _repeated, _mixed, _characters, _nested, _begun, _ended, _lines,
]  # fmt: skip


def fuzzed_text(seed: int, longest: int = 100_000) -> str:
    """The text of that seed: of one kind, at most `longest` characters, most of them long."""
    rng = random.Random(seed)
    return KINDS[seed % len(KINDS)](rng, rng.randint(1, longest))[:longest]
