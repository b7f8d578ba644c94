"""The report in a real browser: no script of a hostile page runs, no network is asked, keys reach everything.

Skipped, with a reason, where Chromium or its driver is not installed. With AXE_CORE=FILE (axe.min.js of
axe-core) accessibility is checked too.
"""

import os

import pytest
from browser import Browser, axe_source, programs
from hostile import HOSTILE, hostile_run
from run_folders import write_run

from twig.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if None in programs():
        reason = "needs Chromium: apt-get install chromium chromium-driver"
        if os.environ.get("TWIG_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: of one run, of two algorithms with two seeds each, of an attack."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one", size=20)
    several = [
        write_run(folder / f"{name}-{seed}", [f"algorithm.name={name}"], seed=seed, size=16)
        for name in ("grpo", "t-spmo")
        for seed in (0, 1)
    ]
    attack = hostile_run(folder / "<img src=x onerror=alert(3)>")
    made = {"one": [one], "several": several, "attack": [attack]}
    return {name: write_report(runs, folder / f"{name}.html") for name, runs in made.items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["one", "several", "attack"])
def test_a_page_is_whole_at_every_width(browser, pages, name, width, dark):
    browser.size(width, dark=dark)
    browser.open(pages[name])
    assert browser.messages == [], "no errors on the console, of the policy neither"
    assert [address for address in browser.requests if not address.startswith("file:")] == []
    assert browser.run("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert browser.run("return document.querySelectorAll('.chart svg').length") >= 12
    assert browser.run("return document.querySelectorAll('.icicle').length") == 3
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 22, 26)" if dark else "rgb(251, 250, 247)")
    axe = axe_source()
    if axe is not None:
        browser.run(axe)
        result = browser.run_async(
            "const done = arguments[arguments.length - 1];"
            "axe.run().then((r) => done({bad: r.violations.map((v) => [v.id, v.nodes[0].html]),"
            " good: r.passes.length}))"
        )
        assert result["bad"] == [] and result["good"] > 20


def test_no_script_of_a_hostile_page_runs(browser, pages):
    """Every group is looked at; an alert would fail the next command, an element would be in the tree."""
    browser.size(1400)
    browser.open(pages["attack"])
    seen = browser.run(
        "let text = ''; for (const group of DATA.groups) { show(group); credit.open.add('all'); drawTree();"
        " text += document.getElementById('credit-map').textContent; } return text"
    )
    for attack in HOSTILE:
        if attack.isprintable():
            assert attack in seen, "shown as it is"
    assert "\\u202e" in seen and "\\u0000" in seen and "\u202e" not in seen
    assert browser.run("return document.querySelectorAll('img, script, style, iframe').length") == 3
    assert browser.run("return document.scripts.length") == 2
    assert browser.messages == []
    # the policy itself: what came through all the same would not run
    added = "const late = document.createElement('script'); late.textContent = 'window.ran = 1';"
    added += "document.body.append(late);"
    assert browser.run(added + "return window.ran === undefined")
    assert "Content Security Policy" in browser.messages[0]


def test_keys_reach_every_fork_and_say_what_it_got(browser, pages):
    browser.size(1400)
    browser.open(pages["one"])
    number = browser.run("return credit.group.segments.length")
    browser.run("document.querySelector('.switch, .tree').parentNode.querySelector('.tools input').focus()")
    browser.press("Tab")
    reached = set()
    for _ in range(number):
        row = browser.run("return [document.activeElement.dataset.row, document.activeElement.ariaLabel]")
        reached.add(int(row[0]))
        assert "mean reward" in row[1] and "T-SPMO" in row[1]
        assert "of 19 completions" in browser.run("return tip.hidden ? '' : tip.textContent")
        browser.press("ArrowDown")
    assert reached == set(range(number))
    folds = browser.run("return document.querySelectorAll('.fold').length")
    browser.run("document.querySelector('.fold').closest('[data-row]').focus()")
    browser.press("Enter")
    assert browser.run("return document.querySelectorAll('.fold').length") < folds


def test_a_group_is_found_by_step_reward_and_problem(browser, pages):
    browser.size(1400)
    browser.open(pages["several"])
    change = (
        "const [name, value] = arguments; credit.parts[name].value = value;"
        "credit.parts[name].dispatchEvent(new Event(name === 'search' ? 'input' : 'change'));"
        "return credit.matches.map((g) => [g.run, g.step, g.num_right / g.size, g.problem])"
    )
    everything = browser.run(change, "step", "")
    assert len(everything) == 4 * 2 * 2
    by_step = browser.run(change, "step", "20")
    assert by_step == [row for row in everything if row[1] == 20]
    assert browser.run(change, "search", "1+2") == by_step, "the text of the problem"
    assert browser.run(change, "search", "0") == [row for row in by_step if row[3] == 0], "its number"
    assert browser.run(change, "search", "nowhere") == []
    browser.run(change, "search", "")
    mixed = browser.run(change, "reward", "mixed")
    assert mixed == [row for row in by_step if 0 < row[2] < 1]


def test_the_cross_hair_reads_all_charts_at_one_step(browser, pages):
    browser.size(1400)
    browser.open(pages["several"])
    browser.run("document.querySelector('.chart').focus()")
    browser.press("ArrowRight", "ArrowRight")
    says = browser.run("return [...document.querySelectorAll('.chart .says')].map((p) => p.textContent)")
    assert len({text.split(" · ")[0] for text in says}) == 1 and says[0].startswith("step ")
    assert "grpo" in says[0] and "t-spmo" in says[0]
