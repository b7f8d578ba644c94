"""Draws the packages of Twig as a house: each storey may import from those below it.

    python scripts/house.py            # writes docs/images/house.svg

The order of the storeys comes from the contract in pyproject.toml, the text of each from its package's
docstring. The picture has its own background, so it can be read on light and dark pages.
"""

import ast
import sys
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "twig"
PICTURE = ROOT / "docs" / "images" / "house.svg"

WIDTH, MARGIN, NAMES = 900, 18, 128  # the width of the column of names too
ROOF, LINE, LETTERS = 54, 17, 96  # letters of a line of file names
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; }
text { fill: var(--ink); }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.soft { fill: var(--soft); } .bold { font-weight: 650; } .mid { text-anchor: middle; }
.wall { fill: var(--wall); stroke: var(--rule); stroke-width: 1.2; }
.torch { fill: var(--torch); }
svg { --paper: #fbfaf7; --ink: #1b1b19; --soft: #5f5c55; --rule: #b9b3a6; --wall: #f1eee6; --torch: #2c71ad; }
@media (prefers-color-scheme: dark) { svg {
  --paper: #14161a; --ink: #eae8e3; --soft: #a9a69f; --rule: #565c66; --wall: #20242a; --torch: #66aae2; } }
"""


def main() -> int:
    """Writes the picture."""
    PICTURE.write_text(drawn(), encoding="utf-8")
    print(PICTURE)
    return 0


def storeys() -> list[str]:
    """Returns the packages in the order of the contract, the top one first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")


def first_line(package: Path) -> str:
    """Returns the first line of a package's docstring."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")


def files_of(package: Path) -> list[tuple[str, bool]]:
    """Returns a package's files, without .py, and whether importing them imports torch.

    A folder stands for its files.
    """
    files = [(path.stem, needs_torch(path)) for path in package.glob("*.py") if path.stem != "__init__"]
    files += [(f"{path.parent.name}/", False) for path in package.glob("*/__init__.py")]
    return sorted(files)


def needs_torch(path: Path) -> bool:
    """Returns whether a file imports torch, or a library that does, at its top level."""
    heavy = {"torch", "transformers", "peft"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if heavy & {name.partition(".")[0] for name in names}:
            return True
    return False


def lines_of(files: list[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Breaks the files into lines of at most LETTERS letters."""
    lines, used = [[]], 0
    for name, heavy in files:
        if used + len(name) > LETTERS:
            lines.append([])
            used = 0
        lines[-1].append((name, heavy))
        used += len(name) + 2
    return lines


def drawn() -> str:
    """Returns the picture as SVG."""
    parts, y = [], MARGIN + ROOF
    peak = WIDTH / 2
    parts.append(f'<path class="wall" d="M{MARGIN} {y} L{peak:g} {MARGIN} L{WIDTH - MARGIN} {y} Z"/>')
    parts.append(text(peak, y - 14, "twig", "bold mid", 17))
    for name in storeys():
        package = SOURCE / name
        lines = lines_of(files_of(package))
        high = 30 + LINE * len(lines)
        parts.append(
            f'<rect class="wall" x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{high}"/>'
        )
        parts.append(text(MARGIN + 12, y + 21, name, "bold", 15))
        parts.append(text(MARGIN + NAMES, y + 20, first_line(package), "", 13))
        for number, files in enumerate(lines):
            spans = "  ".join(
                f'<tspan class="torch">{escape(file)}</tspan>' if heavy else escape(file)
                for file, heavy in files
            )
            at = y + 22 + LINE * (number + 1)
            parts.append(
                f'<text x="{MARGIN + NAMES}" y="{at}" font-size="11.5" class="mono soft" '
                f'xml:space="preserve">{spans}</text>'
            )
        y += high
    legend = "A storey imports only from those below it. Blue: importing it imports torch."
    parts.append(text(MARGIN + 12, y + 24, legend, "soft", 12))
    return svg(parts, y + 24)


def text(x: float, y: float, content: str, kind: str, size: int) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" class="{kind}">{escape(content)}</text>'


def svg(parts: list[str], bottom: float) -> str:
    high = round(bottom + MARGIN)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" '
        f'height="{high}" role="img">',
        "<title>The packages of Twig, each above those that it may import from</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{high}" rx="8" style="fill: var(--paper)"/>',
    ]
    return "\n".join([*lines, *parts, "</svg>", ""])


if __name__ == "__main__":
    sys.exit(main())
