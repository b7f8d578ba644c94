"""The report in a real browser: no script of a hostile page runs, no network is asked, keys reach everything.

Skipped, with a reason, where Chromium or its driver is not installed. With AXE_CORE=FILE (axe.min.js of
axe-core) accessibility is checked too.
"""

import json
import os

import pytest
from browser import Browser, axe_source, programs
from hostile import HOSTILE, hostile_run
from run_folders import write_run

from twig.report.page import End, write_report

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
    long = [write_run(folder / f"long-{seed}", steps=500, seed=seed, saved=(1,)) for seed in (0, 1)]
    many = [
        write_run(folder / f"m{number}", [f"model.name={'a-model-with-a-long-name-' * 2}{number}"], steps=4)
        for number in range(8)
    ]
    made = {"one": [one], "several": several, "attack": [attack], "long": long, "many": many}
    paths = {name: write_report(runs, folder / f"{name}.html") for name, runs in made.items()}
    return paths | {"live": write_report([one], folder / "live.html", End("running"))}


def steps_of(run):
    """Step to what metrics.jsonl says of it, evaluations too."""
    rows: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


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
    assert "No group" in browser.run("return credit.parts.count.textContent")
    browser.run(change, "search", "")
    mixed = browser.run(change, "reward", "mixed")
    assert mixed == [row for row in by_step if 0 < row[2] < 1]


@pytest.mark.parametrize("name", ["one", "several", "long"])
def test_readouts_are_measured_values_of_their_own_step(browser, pages, name):
    """At ten places: every value, beside the step that it names, is the one in metrics.jsonl."""
    browser.size(1400)
    browser.open(pages[name])
    arms = browser.run(
        "return DATA.arms.map((_, arm) => DATA.runs.filter((run) => run.arm === arm).map((run) => run.name))"
    )
    runs = [[steps_of(pages[name].parent / run) for run in names] for names in arms]
    charts = browser.run("return state.charts.map((view) => [view.chart.metric, view.chart.unit])")
    most = max(step for arm in runs for run in arm for step in run)
    read = (
        "point(arguments[0]); const values = (view) => [...view.says.querySelectorAll('b')];"
        "return state.charts.map((view) => values(view).map((b) => [Number(b.dataset.arm),"
        " Number(b.dataset.step), b.textContent]))"
    )
    places = [1 + round(i * (most - 1) / 9) for i in range(10)]
    seen = 0
    for place in places:
        for (metric, unit), values in zip(charts, browser.run(read, place), strict=True):
            for arm, step, text in values:
                rows = [run[step].get(metric) for run in runs[arm] if step in run]
                if metric == "eval/accuracy" and step in (0, most):
                    continue  # of summary.json
                mean = float(f"{sum(rows) / len(rows):.4g}")
                shown = browser.run("return minus(worded(arguments[0], arguments[1]))", mean, unit)
                assert text.endswith(shown), (metric, place, step)
                assert metric == "eval/accuracy" or step == place
                seen += 1
    assert seen > 10 * 12


def test_smoothing_is_said_and_turned_off(browser, pages):
    browser.size(1400)
    browser.open(pages["one"])
    box = "[...document.querySelectorAll('#charts input[type=checkbox]')][0]"
    assert "mean over 5 steps" in browser.run(f"return {box}.parentNode.textContent")
    path = "return document.querySelector('.chart path.line').getAttribute('d')"
    raw = browser.run("return document.querySelector('.chart path.raw').getAttribute('d')")
    assert browser.run(path) != raw
    browser.run(f"{box}.click()")
    assert browser.run(path) == raw
    assert browser.run("return document.querySelectorAll('.chart path.raw').length") == 0


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", ["one", "several", "many"])
def test_labels_neither_overlap_nor_leave_the_page(browser, pages, name, width):
    browser.size(width)
    browser.open(pages[name])
    boxes = browser.run(
        "const box = (text) => { const b = text.getBoundingClientRect();"
        " return [b.left, b.right, b.top, b.bottom]; };"
        "return [...document.querySelectorAll('.chart svg')].map((svg) =>"
        " [...svg.querySelectorAll('text.fill')].map(box))"
    )
    for chart in boxes:
        assert all(left >= 0 and right <= width for left, right, _, _ in chart)
        chart.sort(key=lambda box: box[2])
        for above, below in zip(chart, chart[1:], strict=False):
            assert below[2] >= above[3] - 2.5 or below[0] >= above[1]
    inside = browser.run(
        "return [...document.querySelectorAll('#accuracy text, .phases text')].every((text) => {"
        " const b = text.getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth; })"
    )
    assert inside


@pytest.mark.parametrize("width", [1400, 400])
def test_what_wraps_in_a_row_of_the_tree_stays_right_of_its_lines(browser, pages, width):
    browser.size(width)
    browser.open(pages["one"])
    starts = browser.run(
        "return [...document.querySelectorAll('.branch')].map((row) => {"
        " const left = (each) => each.getBoundingClientRect().left;"
        " const share = left(row.querySelector('.share'));"
        " return [...row.querySelectorAll('.marks')].map((mark) => left(mark) - share); })"
    )
    assert any(starts) and all(start >= 0 for row in starts for start in row)


def test_the_result_needs_no_scrolling_sideways_on_a_telephone(browser, pages):
    browser.size(400)
    for name in ("one", "several"):
        browser.open(pages[name])
        assert browser.run(
            "const box = document.querySelector('.results').closest('.scroll');"
            "return box.scrollWidth <= box.clientWidth"
        )


def test_an_algorithm_has_one_colour_on_the_page(browser, pages):
    browser.size(1400)
    browser.open(pages["several"])
    colours = browser.run(
        "const of = (node) => getComputedStyle(node);"
        "const lines = Object.fromEntries(DATA.arms.map((arm, i) => [DATA.algorithms[arm.algorithm].title,"
        " of(document.querySelectorAll('.key line')[i]).stroke]));"
        "const heads = [...document.querySelectorAll('.panel h3')].map((h) => [h.textContent, of(h).color]);"
        "return [lines, Object.fromEntries(heads)]"
    )
    lines, heads = colours
    assert len(set(heads.values())) == len(heads) == 3
    assert len(lines) == 2 and all(heads[name] == colour for name, colour in lines.items())


def test_a_tip_lies_on_none_of_the_texts_that_are_compared(browser, pages):
    browser.size(1400)
    browser.open(pages["one"])
    covered = browser.run(
        "const row = [...document.querySelectorAll('[data-row]')][2];"
        "const token = row.querySelector('[data-token]');"
        "token.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
        "const box = tip.getBoundingClientRect();"
        "const clear = (node) => { const b = node.getBoundingClientRect();"
        " return b.right <= box.left || b.left >= box.right || b.bottom <= box.top || b.top >= box.bottom; };"
        "return [tip.hidden, [...row.querySelectorAll('.text')].every(clear)]"
    )
    assert covered == [False, True]


def test_a_page_of_a_run_that_trains_loads_itself_again(browser, pages):
    browser.size(1400)
    browser.open(pages["live"])
    assert "Written" in browser.run("return document.getElementById('written').textContent")
    browser.run("window.seen = 1; DATA.live = 0.001; watch()")
    assert browser.run("return window.seen === undefined")
    browser.run("document.querySelector('.chart').focus(); window.seen = 1; DATA.live = 0.001; watch()")
    assert browser.run("return window.seen === 1"), "not while somebody reads a curve"


def test_the_cross_hair_reads_all_charts_at_one_step(browser, pages):
    browser.size(1400)
    browser.open(pages["several"])
    browser.run("document.querySelector('.chart').focus()")
    browser.press("ArrowRight", "ArrowRight")
    says = browser.run("return [...document.querySelectorAll('.chart .says')].map((p) => p.textContent)")
    own = [text.split(" · ")[0] for text in says]
    assert own.count(own[0]) == len(own) - 1 and own[0].startswith("step "), "all but that of evaluations"
    assert "grpo" in says[0] and "t-spmo" in says[0]
