"""The documents, taken apart: pages, blocks of code, words of code."""

import importlib
import importlib.util
import re

from project import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}


def blocks(page: str) -> list[tuple[str, str, str | None]]:
    """(language, text, file) of each fenced block; the line before a block may end with the `file` it is."""
    actual = []
    for match in re.finditer(r"([^\n]*)\n\n```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        file = re.search(r"`([\w.]+)`:$", match[1])
        actual.append((match[2], match[3], file[1] if file else None))
    assert len(actual) == page.count("\n```") // 2, "a block is not seen"
    return actual


def examples(page: str) -> list[str]:
    return [text for language, text, file in blocks(page) if language == "python" and file is None]


def code_words(page: str) -> list[str]:
    """What stands between backticks, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE))


def script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"twig_docs_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
