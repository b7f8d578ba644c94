"""Hooks of MkDocs (`mkdocs.yml`, `hooks`) that make pages of this repository's documents.

The pages in docs/ are also read in the repository, with links to source files. On the site those links become
plain text, SECURITY.md and CHANGELOG.md become pages, and docstrings, which are plain text, become Markdown.
"""

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

try:
    from griffe import Extension
except ImportError:  # it comes with mkdocstrings; the other hooks work without
    Extension = object

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site, for pages outside docs/.
PAGES = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_DOCTEST = re.compile(r"(?:^>>> .*\n(?:^(?!\s*$).*\n?)*)", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside docs/ to the files of the site."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the text of a page with links that work on the site."""
    own = {page: name for name, page in PAGES.items()}
    return relinked(markdown, own.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def relinked(markdown: str, place: str) -> str:
    """Returns the text of the repository's file `place` with its links rewritten for the site.

    A link to a file that is not on the site becomes plain text. A broken link stays, for the strict build to
    report.

    >>> relinked("[a](../src/twig/core/trie.py), [b](../SECURITY.md), [c](models.md#x)", "docs/index.md")
    'a, [b](security.md), [c](models.md#x)'
    """

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = ((ROOT / place).parent / path).resolve()
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if inside in PAGES:
            page = PAGES[inside]
        elif inside.startswith("docs/") and target.is_file():
            page = inside.removeprefix("docs/")
        else:
            return label if target.exists() else match[0]
        here = Path(place).parent.relative_to("docs").as_posix() if place.startswith("docs/") else "."
        return f"[{label}]({relpath(page, here)}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def as_markdown(text: str) -> str:
    """Returns a docstring with its examples in code blocks; a line that begins with a minus is an equation.

    >>> as_markdown("One.\\n\\n- sum(w)\\n\\n>>> 1 + 1\\n2\\n")
    'One.\\n\\n\\\\- sum(w)\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n'
    """
    text = re.sub(r"^- ", r"\\- ", text, flags=re.MULTILINE)
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)


class Docstrings(Extension):
    """Turns all docstrings into Markdown."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
