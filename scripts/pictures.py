"""Draws the pictures of docs/concepts.md: one group as a trie, its credit, and what the update runs of it.

    python scripts/pictures.py            # writes docs/images/{trie,credit,compute,layers}.svg

The numbers in them are computed by Twig (`PrefixTrie`, `assign_one`, `build_packs`). A picture has its own
background, so it can be read on light and dark pages.
"""

import sys
from fractions import Fraction
from html import escape
from pathlib import Path

import numpy as np

from twig.core.algorithms.base import Credit
from twig.core.algorithms.registry import algorithm
from twig.core.credit import Scored, assign_one
from twig.core.trie import ROOT, PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine.pack import Pack, build_packs

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"

# The worked example: four answers to one problem. The end of a text is a token too.
PROMPT = "7*6="
ANSWERS = (("42", 1.0), ("48", 0.0), ("42", 1.0), ("360", 0.0))
END, SEED = 10, 1
OPTIONS = {
    "GRPO": algorithm("grpo"),
    "S-GRPO": algorithm("s-grpo", alpha=1, p=0.5, k=2),
    "T-SPMO": algorithm("t-spmo"),
}

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; }
text { fill: var(--ink); }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.soft { fill: var(--soft); } .strong { fill: var(--strong); }
.bold { font-weight: 650; } .mid { text-anchor: middle; }
.line { stroke: var(--rule); fill: none; stroke-width: 1.5; }
.none { fill: var(--empty); } .out { fill: none; stroke: var(--rule); stroke-dasharray: 3 3; }
svg { --paper: #fbfaf7; --ink: #1b1b19; --soft: #5f5c55; --rule: #b9b3a6; --empty: #e9e5dc; --strong: #ffffff;
  --p1: #dcebf7; --p2: #b3d3ec; --p3: #7db2dc; --p4: #2c71ad; --p5: #164d84;
  --m1: #fdebdc; --m2: #fad0ab; --m3: #f2a766; --m4: #b3540d; --m5: #843804; }
@media (prefers-color-scheme: dark) { svg {
  --paper: #14161a; --ink: #eae8e3; --soft: #a9a69f; --rule: #565c66; --empty: #2a2e35; --strong: #14161a;
  --p1: #1a2f43; --p2: #1d4466; --p3: #246196; --p4: #66aae2; --p5: #aad5f8;
  --m1: #38271a; --m2: #5a3718; --m3: #874c12; --m4: #e39243; --m5: #fac891; } }
"""
WIDTH, MARGIN = 480, 16
COLUMN, ROW, BOX, HIGH = 92, 56, 44, 28  # of a trie: distances of nodes, and a node's size


def group() -> Group:
    """Returns the group of the worked example. Token ids are its digits, and END."""
    completions = []
    for text, _ in ANSWERS:
        ids = np.array([*map(int, text), END])
        completions.append(Completion(ids, np.zeros(len(ids)), np.zeros(len(ids)), True, text))
    rewards = np.array([reward for _, reward in ANSWERS])
    return Group(Example(PROMPT), 0, np.arange(20, 20 + len(PROMPT)), completions, rewards)


def trie_of(group: Group) -> PrefixTrie:
    return PrefixTrie.build([c.ids for c in group.completions], group.rewards)


def credit_of(trie: PrefixTrie, title: str) -> Credit:
    return assign_one(OPTIONS[title], trie, np.random.default_rng(SEED))


def main() -> int:
    """Writes the pictures."""
    for name, text in drawn().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
    return 0


def drawn() -> dict[str, str]:
    """File name to SVG, of all pictures."""
    return {
        "trie.svg": picture_of_trie(),
        "credit.svg": picture_of_credit(),
        "compute.svg": picture_of_compute(),
        "layers.svg": picture_of_layers(),
    }


# ---- what is drawn ---------------------------------------------------------------------------------------


def picture_of_trie() -> str:
    """Draws the answers one by one, and below them the trie with counts and values."""
    trie = trie_of(group())
    parts = [text(MARGIN, 30, f"Four answers to {PROMPT}", "bold", 15)]
    y = 44
    for answer, reward in ANSWERS:
        for column, token in enumerate([*answer, "end"]):
            parts += box(MARGIN + column * (BOX + 6), y, BOX, HIGH, token, "none")
        verdict = "right: reward 1" if reward else "wrong: reward 0"
        parts.append(text(MARGIN + 4 * (BOX + 6) + 16, y + 19, verdict, "" if reward else "soft", 13))
        y += HIGH + 8
    y += 34
    parts.append(text(MARGIN, y, "The same, merged where they begin alike", "bold", 15))
    parts.append(text(MARGIN, y + 20, "below a token: answers through it, and their mean reward", "soft", 13))
    labels = [f"{n}, {fraction(v)}" for n, v in zip(trie.count, trie.value, strict=True)]
    shapes, bottom = tree(trie, y + 36, ["none"] * len(trie), labels)
    return svg(parts + shapes, bottom, "Four answers as rows of tokens, and as a trie with counts and values")


def picture_of_credit() -> str:
    """Draws the trie under each algorithm: blue more likely, orange less likely, grey untrained."""
    trie, parts, y = trie_of(group()), [], 30
    for title in OPTIONS:
        credit = credit_of(trie, title)
        total = credit.plus + credit.minus
        trained = int(credit.weighted.sum())
        parts.append(text(MARGIN, y, title, "bold", 15))
        parts.append(text(MARGIN + 80, y, f"{trained} of {len(trie) - 1} tokens get credit", "soft", 13))
        largest = float(np.abs(total).max())
        fills = [level(weight / largest) for weight in total]
        labels = ["", *(number(weight, title) for weight in total[1:])]
        shapes, bottom = tree(trie, y + 16, fills, labels)
        parts += shapes
        y = bottom + 34
    for x, fill, meaning in (
        (0, "p4", "made more likely"),
        (164, "m4", "less likely"),
        (272, "none", "not trained"),
    ):
        parts += [rect(MARGIN + x, y - 14, 18, 14, fill), text(MARGIN + x + 26, y - 2, meaning, "soft", 13)]
    return svg(parts, y + 6, "The weight of every token of the trie under GRPO, S-GRPO and T-SPMO")


def picture_of_compute() -> str:
    """Draws the tokens that one gradient runs through the upper layers, row by row and as packs."""
    parts, y, size, gap = [], 30, 30, 4
    step = size + gap

    def token(column: int, y: int, word: str, fill: str) -> list[str]:
        return box(MARGIN + column * step, y, size, size - 4, word, fill, 13)

    rows = [[*PROMPT, *answer, "end"] for answer, _ in ANSWERS]
    parts.append(text(MARGIN, y, f"Row by row: {sum(map(len, rows))} tokens", "bold", 15))
    y += 14
    for row in rows:
        for column, word in enumerate(row):
            parts += token(column, y, word, "p2")
        y += step
    for title in ("GRPO", "T-SPMO"):
        answered, trie = group(), trie_of(group())
        packs = build_packs([Scored(answered, trie, credit_of(trie, title))], size=1024)
        runs = {node for pack in packs for node in nodes_of(pack, trie)}
        y += 30
        parts.append(text(MARGIN, y, f"A pack, {title}: {len(PROMPT) + len(runs)} tokens", "bold", 15))
        y += 14
        for column, word in enumerate(PROMPT):
            parts += token(column, y, word, "p2")
        for node, line in zip(range(1, len(trie)), lines(trie)[1:], strict=True):
            fill = "p2" if node in runs else "out"
            parts += token(len(PROMPT) + trie.depth[node] - 1, y + line * step, token_texts(trie)[node], fill)
        y += 3 * step
    parts.append(
        text(MARGIN, y + 18, "dashed: nothing with credit comes after it, so it is not run", "soft", 13)
    )
    return svg(parts, y + 22, "Tokens run for one gradient: 29 row by row, fewer as a pack")


def nodes_of(pack: Pack, trie: PrefixTrie) -> list[int]:
    """Returns the trie's nodes that a pack runs after the prompt, from its positions and tokens."""
    nodes = []
    for ids, positions in zip(pack.ids, pack.positions, strict=True):
        last = {0: ROOT}
        for token, depth in zip(ids.tolist(), (positions - len(PROMPT) + 1).tolist(), strict=True):
            if depth > 0:
                (last[depth],) = np.flatnonzero((trie.parent == last[depth - 1]) & (trie.token == token))
                nodes.append(int(last[depth]))
    return nodes


def picture_of_layers() -> str:
    """Draws the model's layers: what runs while sampling, and what the update adds."""
    parts, y, left, wide = [], 30, MARGIN, 200
    right = left + wide + 32
    parts += [text(left, y, "Sampling", "bold", 15), text(right, y, "Update", "bold", 15)]
    y += 14
    shapes = (("head", 30, "none", "p2"), ("upper third, with adapters", 84, "none", "p2"), ("", 8, "", ""))
    shapes += (("lower layers, frozen", 150, "none", "out"),)
    labels = {
        "head": "rows before credit only",
        "upper third, with adapters": "forward and backward",
        "lower layers, frozen": "not run again",
    }
    for name, high, sampled, updated in shapes:
        if not name:
            parts += [rect(left, y, wide, high, "p4"), rect(right, y, wide, high, "p4")]
            parts.append(f'<path class="line" d="M{left + wide + 4} {y + 4}h22m-6 -5l6 5l-6 5"/>')
            y += high + 6
            continue
        parts += [rect(left, y, wide, high, sampled), rect(right, y, wide, high, updated)]
        middle = y + high / 2 + 5
        parts.append(text(left + wide / 2, middle, name, "mid", 13))
        parts.append(
            text(right + wide / 2, middle, labels[name], "mid" if updated != "out" else "mid soft", 13)
        )
        y += high + 6
    parts.append(rect(left, y + 16, 18, 8, "p4"))
    parts.append(text(left + 26, y + 25, "the boundary: one row of numbers a token, kept from", "soft", 13))
    parts.append(text(left + 26, y + 43, "sampling, read by the update", "soft", 13))
    return svg(
        parts, y + 48, "Sampling runs all layers and keeps the boundary; the update runs the upper ones"
    )


# ---- how -------------------------------------------------------------------------------------------------


def tree(trie: PrefixTrie, y: float, fills: list[str], labels: list[str]) -> tuple[list[str], float]:
    """Draws a trie from left to right. Returns its shapes and their lower end."""
    tokens, at = token_texts(trie), lines(trie)
    parts = []
    for node in range(1, len(trie)):
        parent = int(trie.parent[node])
        x1, x2 = (MARGIN + trie.depth[n] * COLUMN for n in (parent, node))
        y1, y2 = (y + at[n] * ROW + HIGH / 2 for n in (parent, node))
        bend = (x1 + BOX + x2) / 2
        parts.append(f'<path class="line" d="M{x1 + BOX} {y1:g}H{bend:g}V{y2:g}H{x2}"/>')
    for node in range(len(trie)):
        x, top = MARGIN + int(trie.depth[node]) * COLUMN, y + at[node] * ROW
        parts += box(x, top, BOX, HIGH, tokens[node], fills[node])
        parts.append(text(x + BOX / 2, top + HIGH + 16, labels[node], "mid soft", 13))
    return parts, y + (max(at) + 1) * ROW


def lines(trie: PrefixTrie) -> list[int]:
    """Returns the line that each node is drawn on. A node's first child shares its line."""
    drawn_on, free = [0], 0
    for node in range(1, len(trie)):
        parent = int(trie.parent[node])
        if node == parent + 1:
            drawn_on.append(drawn_on[parent])
        else:
            free += 1
            drawn_on.append(free)
    return drawn_on


def token_texts(trie: PrefixTrie) -> list[str]:
    return [PROMPT, *("end" if token == END else str(token) for token in trie.token[1:])]


def fraction(value: float) -> str:
    return str(Fraction(value).limit_denominator(100))


def number(weight: float, title: str) -> str:
    """Writes a weight as the page does: T-SPMO's are fractions of small numbers."""
    if weight == 0:
        return "0"
    sign = "+" if weight > 0 else "-"
    return f"{sign}{fraction(abs(weight)) if title == 'T-SPMO' else f'{abs(weight):.3f}'}".replace(
        "-", "\N{MINUS SIGN}"
    )


def level(share: float) -> str:
    """Returns the colour of a weight relative to the largest: p1 to p5, m1 to m5, or none."""
    if share == 0:
        return "none"
    return ("p" if share > 0 else "m") + str(min(5, 1 + int(abs(share) * 4.999)))


def rect(x: float, y: float, wide: float, high: float, fill: str) -> str:
    kind = f'class="{fill}"' if fill in ("none", "out") else f'style="fill: var(--{fill})"'
    return f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}" rx="4" {kind}/>'


def text(x: float, y: float, content: str, kind: str, size: int) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" class="{kind}">{escape(content)}</text>'


def box(x: float, y: float, wide: float, high: float, word: str, fill: str, size: int = 15) -> list[str]:
    kind = "mono mid" + (" strong" if fill[-1] in "45" else " soft" if fill == "out" else "")
    size = size if len(word) < 3 else size - 3
    return [rect(x, y, wide, high, fill), text(x + wide / 2, y + high / 2 + 5, word, kind, size)]


def svg(parts: list[str], bottom: float, title: str) -> str:
    high = round(bottom + MARGIN)
    size = f'viewBox="0 0 {WIDTH} {high}" width="640" height="{round(high * 4 / 3)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{high}" rx="8" style="fill: var(--paper)"/>',
    ]
    return "\n".join([*lines, *parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
