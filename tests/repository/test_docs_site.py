"""The pages of docs/: links resolve, commands parse, numbers are the code's; and the site builds.

Only the last test needs MkDocs. That examples run and that what is named exists is in `test_docs.py`.
"""

import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from fractions import Fraction
from html.parser import HTMLParser

import pytest
import typer
from pages import PAGES, blocks, code_words, script
from project import MODULES, ROOT

import twig
from twig.cli.app import app, main
from twig.config.load import Settings, load, parse_override, recipe_names, recipe_text
from twig.core.algorithms.registry import shipped
from twig.report.diagnosis import SYMPTOMS
from twig.study.plan import Study
from twig.tasks.load import load_task

CONCEPTS, TROUBLE = PAGES["docs/concepts.md"], PAGES["docs/troubleshooting.md"]
hooks, pictures = script("docs_hooks"), script("pictures")
MINIMAL = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
COMMANDS = typer.main.get_command(app).commands


def section(page, title):
    """What stands below a heading, up to the next one of its level or above."""
    mark, rest = re.search(rf"^(#+) {re.escape(title)}$(.*)", page, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(mark)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


# Links


def anchors(page):
    """The anchors of a page's headings, as both GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
    assert len(names) == len(set(names)), "two headings with one anchor"
    return names


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_anchor_leads_somewhere(name):
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", PAGES[name]):
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_relative_to(ROOT) and target.exists(), path
        if anchor:
            assert anchor in anchors(PAGES[target.relative_to(ROOT).as_posix()]), f"{path}#{anchor}"


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages | set(hooks.PAGES.values()))


def test_links_on_the_site_are_those_of_the_repository():
    """A link to a file outside the site becomes plain text; a broken link stays for the strict build."""
    assert doctest.testmod(hooks).failed == 0
    text = (
        "![a](images/trie.svg) [b](https://c.org/d.md) [`e.py`](../src/twig/__main__.py) [f](gone.md) [g](#h)"
    )
    expected = text.replace("[`e.py`](../src/twig/__main__.py)", "`e.py`")
    assert hooks.relinked(text, "docs/concepts.md") == expected
    assert hooks.relinked("[S](SECURITY.md) [d](docs/models.md)", "CHANGELOG.md") == (
        "[S](security.md) [d](models.md)"
    )
    fence = "```sh\n[a](../src/twig/core/trie.py)\n```"
    assert hooks.relinked(f"[s](study)\n\n{fence}\n", "docs/study.md") == f"s\n\n{fence}\n"


# Commands


def commands(page):
    """The command lines of Twig in a page's code blocks, from the word behind `twig` on."""
    code = "\n".join(text for language, text, _ in blocks(page) if language == "sh")
    code += "\n" + "\n".join(re.findall(r"^    ((?:\S+ )*twig .*)$", page, re.MULTILINE))
    for line in code.splitlines():
        parts = shlex.split(line, comments=True)
        if "twig" in parts and (parts[0] == "twig" or "-m" in parts):
            yield parts[parts.index("twig") + 1 :]


def valid_keys(command):
    keys = set()
    for name in shipped():
        keys |= set(Settings.model_validate(MINIMAL | {"algorithm": {"name": name}}).flat())
    return keys | set(Study.model_fields) if command == "compare" else keys


def check(arguments):
    """Parses a command line as the program does; raises if it would be refused."""
    name, *rest = arguments
    context = COMMANDS[name].make_context(f"twig {name}", rest)
    overrides = context.params.get("overrides") or ()
    own_algorithm = any(override.startswith("algorithm.file=") for override in overrides)
    for override in overrides:
        key = override.partition("=")[0] if name == "compare" else parse_override(override)[0]
        assert key in valid_keys(name) or own_algorithm and key.startswith("algorithm."), override
    source = context.params.get("source")
    if source is not None and not source.startswith("runs/") and not source.endswith(".yaml"):
        assert source in recipe_names(), source


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_parses(name):
    for arguments in commands(PAGES[name]):
        check(arguments)


def test_a_wrong_command_line_is_seen():
    assert any(True for _ in commands(PAGES["README.md"]))
    check(shlex.split("train quickstart train.seed=1 --output x"))
    for wrong in ("trian quickstart", "train quickstart --outptu x", "train", "eval run --limit many"):
        with pytest.raises((KeyError, typer.BadParameter.__mro__[1])):
            check(shlex.split(wrong))
    for wrong in ("train quickstart train.sede=1", "train quikstart", "compare s.yaml sedes=[1]"):
        with pytest.raises(AssertionError):
            check(shlex.split(wrong))


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_sentences_exist(name):
    """`twig NAME ... --option`, whatever else they leave out."""
    for word in code_words(PAGES[name]):
        if word.startswith("twig "):
            parts = word.split()
            options = {option for p in COMMANDS[parts[1]].params for option in (*p.opts, *p.secondary_opts)}
            assert {part for part in parts if part.startswith("--")} <= options, word


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    named = re.findall(r"(?:^|`|    )make ([\w-]+)", PAGES[name], re.MULTILINE)
    named += re.findall(r"setup\.py ([\w-]+)", PAGES[name])
    assert set(named) <= set(targets)


# Start and recipes


def test_what_start_has_the_reader_write_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = PAGES["docs/start.md"]
    files = {file: text for _, text, file in blocks(page) if file is not None}
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert main(["tasks", "show", "custom", "task.path=problems.jsonl"]) == 0
    assert "score: 1" in capsys.readouterr().out
    names = {}
    exec(files["rewards.py"], names)
    assert names["exact"](["so it is\n#### tree", "tree?"], answer=["tree", "tree"]) == [1.0, 0.0]
    settings = load("custom", ["task.path=problems.jsonl", "task.reward_file=rewards.py:exact"])
    assert [f.__name__ for f in load_task(settings).reward_funcs] == ["exact"]


def test_the_page_of_recipes_says_what_the_recipes_say():
    page = PAGES["docs/recipes.md"]
    rows = {row[0]: row for row in re.findall(r"^\| `([\w.-]+)` \|(.*)\|$", page, re.MULTILINE)}
    assert set(rows) == set(recipe_names())
    for name in recipe_names():
        settings, said = (
            load(name),
            re.search(r"^# Memory, predicted: (.*)\.$", recipe_text(name), re.MULTILINE)[1],
        )
        model, _, smallest, quickest = (cell.strip() for cell in rows[name][1].split("|"))
        assert settings.model.name in model
        numbers = re.findall(r"[\d.]+ GiB", said)
        if len(numbers) == 3:  # what it takes, on which GPU, at its quickest
            assert (smallest, quickest) == (f"{numbers[1]}: {numbers[0]}", numbers[2])
        else:
            assert (smallest, quickest) == ("none needed", numbers[0])
        assert f"\ntwig train {name}" in section(page, name)


def test_the_recipe_of_ones_own_is_one(tmp_path):
    texts = {file: text for _, text, file in blocks(PAGES["docs/recipes.md"]) if file is not None}
    assert texts
    for file, text in texts.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
        load(str(tmp_path / file))


# Concepts


def fraction(text):
    return float(sum(map(Fraction, text.replace("-", " -").replace("+", " +").split())))


def test_the_worked_example_is_what_the_code_computes():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|(.*)\|$", section(CONCEPTS, "Credit"), re.MULTILINE)
    trie = pictures.trie_of(pictures.group())
    assert len(rows) == len(trie) - 1 == 9
    texts = pictures.token_texts(trie)
    for node, (token, after, cells) in enumerate(rows, 1):
        before, parent = [], int(trie.parent[node])
        while parent > 0:
            before, parent = [texts[parent], *before], int(trie.parent[parent])
        assert (token, after) == (texts[node], " ".join(before) or "the prompt")
        count, value, *weights = (cell.strip() for cell in cells.split("|"))
        assert (int(count), fraction(value)) == (trie.count[node], pytest.approx(trie.value[node]))
        for title, cell in zip(pictures.OPTIONS, weights, strict=True):
            credit = pictures.credit_of(trie, title)
            both = [weight for weight in (credit.plus[node], credit.minus[node]) if weight] or [0.0]
            # As fractions exactly, as decimals to their last digit.
            close = 1e-12 if "/" in cell else 5.1e-4
            assert [fraction(part) for part in cell.split()] == pytest.approx(both, abs=close), cell


@pytest.mark.parametrize("name", pictures.drawn())
def test_pictures_are_current(name):
    text = pictures.drawn()[name]
    assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == text
    assert f"(images/{name})" in CONCEPTS


# Troubleshooting


def test_every_symptom_has_its_entry():
    part = section(TROUBLE, "It does not learn")
    assert re.findall(r"^### (.*)$", part, re.MULTILINE) == [symptom.name for symptom in SYMPTOMS]
    for symptom in SYMPTOMS:
        settings = set(
            re.findall(r"\b(?:model|lora|task|rollout|algorithm|train|eval|memory)\.\w+", symptom.change)
        )
        missing = {key for key in settings if key not in section(TROUBLE, symptom.name)}
        assert not missing, f"{symptom.name}: {missing}"


# Python


def test_every_public_name_is_on_the_page_of_python():
    named = re.findall(r"^::: twig\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(named) == sorted(set(twig.__all__) - {"__version__"})


def test_the_modules_on_their_page_exist():
    named = re.findall(r"^::: twig\.([\w.]+)$", PAGES["docs/modules.md"], re.MULTILINE)
    assert named and set(named) <= set(MODULES)


# The site


class Links(HTMLParser):
    """The addresses that a page loads by itself: scripts, styles, pictures, fonts, frames."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def handle_starttag(self, tag, attrs):
        names = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
        if tag in names:
            self.loaded += [value for name, value in attrs if name == names[tag] and value]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="MkDocs is not installed: make docs installs it",
)
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md"))) + len(hooks.PAGES)
    for path in pages:
        links = Links()
        links.feed(path.read_text(encoding="utf-8"))
        assert not [address for address in links.loaded if re.match(r"(\w+:)?//", address)], path.name
    text = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in set(twig.__all__) - {"__version__"}:
        assert f'id="twig.{name}"' in text, name
    text = (tmp_path / "site" / "modules.html").read_text(encoding="utf-8")
    assert "<p>- sum(plus * min(r, 1 + epsilon_high)" in text, "the sign of the loss"
    styles = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)", styles)
