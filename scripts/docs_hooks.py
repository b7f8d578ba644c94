"""What MkDocs needs to be told about this repository (`mkdocs.yml`, `hooks`).

The pages in docs/ are also read where they lie, with links to files of the source. On the site those links
are plain words, and SECURITY.md and CHANGELOG.md are pages too. Docstrings are plain text, and become
Markdown.
"""

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

try:
    from griffe import Extension
except ImportError:  # it comes with mkdocstrings; the rest needs nothing
    Extension = object

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site, for those that are not in docs/.
PAGES = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_DOCTEST = re.compile(r"(?:^>>> .*\n(?:^(?!\s*$).*\n?)*)", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """The files of the site: those in docs/, and the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with links that lead somewhere on the site."""
    own = {page: name for name, page in PAGES.items()}
    return relinked(markdown, own.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def relinked(markdown: str, place: str) -> str:
    """The text of the file `place` of the repository with its links as the site has them.

    A link to a file that is not on the site becomes its words; one that leads nowhere stays, for the strict
    build to find.

    >>> relinked("[a](../src/twig/core/trie.py), [b](../SECURITY.md), [c](models.md#x)", "docs/index.md")
    'a, [b](security.md), [c](models.md#x)'
    """

    def link(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        target = ((ROOT / place).parent / path).resolve()
        inside = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        if inside in PAGES:
            page = PAGES[inside]
        elif inside.startswith("docs/") and target.is_file():
            page = inside.removeprefix("docs/")
        else:
            return words if target.exists() else match[0]
        here = Path(place).parent.relative_to("docs").as_posix() if place.startswith("docs/") else "."
        return f"[{words}]({relpath(page, here)}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def as_markdown(text: str) -> str:
    """A docstring with its examples in code blocks. A line that begins with a minus is an equation, no list.

    >>> as_markdown("One.\\n\\n- sum(w)\\n\\n>>> 1 + 1\\n2\\n")
    'One.\\n\\n\\\\- sum(w)\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n'
    """
    text = re.sub(r"^- ", r"\\- ", text, flags=re.MULTILINE)
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)


class Docstrings(Extension):
    """Makes Markdown of all docstrings."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
