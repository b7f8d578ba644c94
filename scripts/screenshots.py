"""Takes the pictures of reports and of `twig chat` in README.md and docs/start.md.

    python scripts/screenshots.py RUN STUDY
    python scripts/screenshots.py --words WORDS

Writes docs/images/credit-map.png, curves.png, report-phone.png and chat.svg, or word-problem.png. RUN is the
run of the quickstart, STUDY the folder of docs/study/study.yaml, WORDS a run of docs/study/svamp.yaml. Needs
Chromium and its driver.
"""

import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from twig.cli import chat
from twig.cli.console import quiet_libraries
from twig.cli.models import named_model
from twig.config.load import Settings
from twig.evaluation.stream import Speaker
from twig.report.page import write_report
from twig.runs.listing import runs_in

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser  # noqa: E402  (the one of the tests)

COMPARED = r"(grpo|s-grpo|t-spmo)-seed-[012]"
PROBLEM = "651*79="
WIDTH, PHONE = 1230, 400


def main(run: Path, study: Path) -> int:
    """Writes the pictures."""
    (FOLDER / "chat.svg").write_text(picture_of_chat(run), encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        one = write_report([run], Path(place) / "one.html")
        compared = [each for each in runs_in(study) if re.fullmatch(COMPARED, each.name)]
        several = write_report(compared, Path(place) / "several.html")
        browser = Browser(Path(place) / "profile")
        try:
            browser.size(WIDTH)
            browser.open(one)
            browser.picture(FOLDER / "credit-map.png", box(browser, ".asked", ".tree"))
            browser.size(1410)
            browser.open(several)
            browser.picture(FOLDER / "curves.png", box(browser, "#curves h2", ".chart:nth-of-type(9)"))
            browser.size(PHONE)
            browser.open(several)
            clip = box(browser, "header", "#accuracy")
            browser.picture(FOLDER / "report-phone.png", clip | {"x": 0, "width": PHONE})
        finally:
            browser.close()
    return 0


def word_problem(run: Path) -> int:
    """Writes the picture of the group that a report shows first."""
    with tempfile.TemporaryDirectory() as place:
        page = write_report([run], Path(place) / "words.html")
        browser = Browser(Path(place) / "profile")
        try:
            browser.size(WIDTH)
            browser.open(page)
            browser.picture(FOLDER / "word-problem.png", box(browser, ".asked", ".tree"))
        finally:
            browser.close()
    return 0


def box(browser: Browser, first: str, last: str) -> dict[str, float]:
    """Returns the part of the page from one element to another, with a margin."""
    script = (
        "const [a, b] = Array.from(arguments, (name) => document"
        ".querySelector(name).getBoundingClientRect());"
        "const [left, right] = [Math.min(a.left, b.left), Math.max(a.right, b.right)];"
        "return {x: Math.max(0, left - 24), y: a.top + scrollY - 16, width: right - left + 48,"
        " height: b.bottom - a.top + 32};"
    )
    return browser.run(script, first, last)


def picture_of_chat(run: Path) -> str:
    """Records `twig chat RUN --prompt PROBLEM --fork` as an SVG that needs no network."""
    quiet_libraries()
    console = Console(record=True, width=84, force_terminal=True, highlight=False, legacy_windows=False)
    with named_model(str(run), False, "chat") as named:
        speaker = Speaker.load(Settings.from_dict(named.values))
        console.print(Text(f"$ twig chat runs/quickstart --prompt '{PROBLEM}' --fork\n", style="bold"))
        base, trained = chat._Answer(), chat._Answer()
        ids = speaker.encode(PROBLEM)
        base.tokens, trained.tokens = list(speaker.answer(ids, base=True)), list(speaker.answer(ids))
        shown = chat._Chat(console, speaker, True, True)
        shown._show(base, trained)
        chat._show_fork(console, speaker, ids, base.tokens, trained.tokens)
    picture = console.export_svg(title="twig chat", unique_id="chat")
    picture = re.sub(r"@font-face\s*{.*?}", "", picture, flags=re.DOTALL)
    picture = re.sub(r"<!--.*?-->", "", picture, flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", picture, flags=re.MULTILINE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--words"]:
        sys.exit(word_problem(*map(Path, sys.argv[2:])))
    sys.exit(main(*map(Path, sys.argv[1:])))
