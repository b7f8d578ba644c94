"""The report: its numbers are those of the run folders, its text is data, it is one small file."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from hostile import HOSTILE, hostile_run
from pyarrow import parquet
from run_folders import WORDS, write_run

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import load
from twig.core.algorithms.registry import algorithm
from twig.core.credit import assign
from twig.core.rng import CREDIT, generator
from twig.core.trie import PrefixTrie
from twig.report.credit_map import SHOWN, Strings, choose, group_map, read_groups, saved_steps
from twig.report.curves import arm_series, arms_of, differing
from twig.report.diagnosis import to_try
from twig.report.history import History, read_run
from twig.report.page import End, page_of, write_report


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def data_of(page):
    """What the page's script draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def weights_along(drawn, algorithm, row):
    """(plus, minus) of each token of a drawn completion, and its token texts, from the page's segments."""
    (last,) = [i for i, segment in enumerate(drawn["segments"]) if row in segment[5]]
    chain = [last]
    while drawn["segments"][chain[-1]][0] >= 0:
        chain.append(drawn["segments"][chain[-1]][0])
    pairs, texts = [], []
    given = drawn["credit"][algorithm]
    for segment in reversed(chain):
        flat = given["runs"][segment]
        for count, pair in zip(flat[::2], flat[1::2], strict=True):
            pairs += [given["pairs"][pair]] * count
        texts += drawn["segments"][segment][4]
    return pairs, texts


# ---- credit maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=t-spmo", "algorithm.normalise=branches"],
        [
            "algorithm.name=s-grpo",
            "algorithm.alpha=2",
            "algorithm.p=0.5",
            "algorithm.k=4",
            "algorithm.beta=0.1",
        ],
        ["algorithm.name=grpo", "algorithm.scale_rewards=none", "algorithm.mask_truncated_completions=true"],
    ],
)
def test_credit_on_the_page_is_that_of_the_algorithms(tmp_path, overrides, size):
    """Rows of the file through `assign`, against what the page holds: equal to the last bit."""
    folder = write_run(tmp_path / "run", overrides, saved=(7,), size=size)
    data, settings = data_of(page_of([read_run(folder)])), load(str(folder))
    rows = parquet.read_table(folder / "completions" / "step-7.parquet").to_pylist()
    assert len(data["groups"]) == 2
    tries = {}
    for slot in {row["prompt_index"] for row in rows}:
        group = [row for row in rows if row["prompt_index"] == slot and row["reward"] is not None]
        finished = np.array([row["finished"] for row in group])
        trains = finished if settings.algorithm.mask_truncated_completions else np.ones(len(group), bool)
        ids = [row["token_ids"] for row in group]
        tries[slot] = PrefixTrie.build(ids, [row["reward"] for row in group], trained=trains)
    for drawn in data["groups"]:
        slot = drawn["problem"]
        group = [row for row in rows if row["prompt_index"] == slot and row["reward"] is not None]
        rewards = [row["reward"] for row in group]
        own, trie = settings.algorithm, tries[slot]
        assert set(drawn["credit"]) == {"grpo", "s-grpo", "t-spmo"}
        assert (drawn["size"], drawn["distinct"]) == (len(group), len(trie) - 1)
        assert drawn["mean"] == pytest.approx(np.mean(rewards))
        for name, given in drawn["credit"].items():
            options = own if name == own.name else algorithm(name)
            if name != own.name and {name, own.name} == {"grpo", "s-grpo"}:
                options = algorithm(name, scale_rewards=own.scale_rewards)
            generators = [generator(0, CREDIT, other, 7) for other in tries]
            credit = assign(options, list(tries.values()), generators, 2)[0][list(tries).index(slot)]
            assert given["trained"] == np.count_nonzero((credit.plus != 0) | (credit.minus != 0))
            by_prefix = {}
            for path, row in zip(trie.paths, group, strict=True):
                for t, node in enumerate(path):
                    by_prefix[tuple(row["token_ids"][: t + 1])] = (credit.plus[node], credit.minus[node])
            for row in range(len(drawn["completions"])):
                pairs, places = weights_along(drawn, name, row)
                ids = [WORDS.index(data["strings"][place]) for place in places]
                assert len(ids) == drawn["completions"][row][3]
                assert [tuple(pair) for pair in pairs] == [
                    by_prefix[tuple(ids[: t + 1])] for t in range(len(ids))
                ]
    assert min(len(drawn["completions"]) for drawn in data["groups"]) == min(size - 1, SHOWN)


def test_counts_values_and_ends_by_hand(tmp_path):
    #  a b (R 1), a b (R 0), a c d (R 1), a c (R 0): root 4, a 4, b 2 (1/2), c 2 (1/2), d 1 (1)
    numbers = {"a": 0, "b": 1, "c": 2, "d": 3}
    rows = [
        {"completion_index": i, "prompt_index": 5, "prompt": "p", "prefix_length": 0, "finished": True}
        | {
            "token_ids": [numbers[c] for c in text],
            "tokens": list(text),
            "reward": reward,
            "right": reward == 1,
        }
        for i, (text, reward) in enumerate([("ab", 1.0), ("ab", 0.0), ("acd", 1.0), ("ac", 0.0)])
    ]
    from twig.runs.folder import RunLog

    settings = load("quickstart")
    path = RunLog.create(tmp_path / "run", settings).save_completions(3, rows)
    (group,) = read_groups(3, path, settings)
    drawn = group_map(group, settings, Strings())
    assert drawn["segments"] == [
        [-1, 1, 4, 0.5, [0], []],
        [0, 2, 2, 0.5, [1], [0, 1]],
        [0, 2, 2, 0.5, [2], [2]],
        [2, 3, 1, 1.0, [3], [3]],
    ]
    assert [each[:2] for each in drawn["completions"]] == [
        [1.0, True],
        [0.0, False],
        [0.0, False],
        [1.0, True],
    ]
    # T-SPMO: only d differs from its parent, by 1/2, over 4 unique nodes; one group in the step
    assert drawn["credit"]["t-spmo"]["runs"] == [[1, 0], [1, 0], [1, 0], [1, 1]]
    assert drawn["credit"]["t-spmo"]["pairs"] == [[0.0, 0.0], [0.125, 0.0]]


def test_groups_are_those_of_the_step_the_most_divided_first(tmp_path):
    folder = write_run(tmp_path / "run", saved=(3, 11, 2), groups=3)
    assert list(saved_steps(folder)) == [2, 3, 11]
    groups = read_groups(3, saved_steps(folder)[3], load(str(folder)))
    assert sorted(group.slot for group in groups) == [0, 1, 2]
    spread = [group.rewards.var() for group in groups]
    assert spread == sorted(spread, reverse=True)


def test_few_bytes_still_show_every_run_and_both_ends_of_it(tmp_path):
    runs = [write_run(tmp_path / name, saved=range(1, 40), groups=4) for name in "ab"]
    runs = [(folder, load(str(folder))) for folder in runs]
    everything = choose(runs, Strings(), 10**9)
    assert len(everything) == 2 * 39 * 4
    some = choose(runs, Strings(), 8000)
    assert len(json.dumps(some, separators=(",", ":"))) < 8000
    assert {(each["run"], each["step"]) for each in some} >= {(0, 1), (0, 39), (1, 1), (1, 39)}
    assert len(choose(runs, Strings(), 0)) == 1


def test_completions_of_a_file_without_texts_are_shown_by_number(run):
    path = run / "completions" / "step-1.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["tokens"]), path)
    strings = Strings()
    group_map(read_groups(1, path, load(str(run)))[0], load(str(run)), strings)
    assert set(strings.texts) <= {f"[{i}]" for i in range(len(WORDS))}


# ---- arms and curves --------------------------------------------------------------------------------------


def test_runs_that_differ_by_seed_only_are_one_arm(tmp_path):
    made = [
        ("a", [], 0),
        ("b", [], 1),
        ("c", ["train.learning_rate=0.5"], 0),
        ("d", ["algorithm.name=grpo"], 0),
    ]
    made += [("e", ["log.completions_steps=7"], 2), ("f", ["memory.budget=2GiB"], 3)]
    runs = [read_run(write_run(tmp_path / name, list(o), seed=seed)) for name, o, seed in made]
    arms = arms_of(runs)
    assert [[run.name for run in arm.runs] for arm in arms] == [["a", "b", "e", "f"], ["c"], ["d"]]
    assert [arm.label for arm in arms] == [
        "t-spmo, learning_rate=0.0001",
        "t-spmo, learning_rate=0.5",
        "grpo",
    ]
    table = differing(arms)
    assert table["train.learning_rate"] == [1e-4, 0.5, 1e-4]
    assert table["algorithm.normalise"] == ["step", "step", None], "grpo has no such setting"
    assert not {"train.seed", "log.completions_steps", "memory.budget", "model.name"} & set(table)


def test_a_point_of_a_curve_is_a_step_or_says_how_many_it_is_the_mean_of(tmp_path, monkeypatch):
    runs = [read_run(write_run(tmp_path / str(seed), steps=600, saved=(), seed=seed)) for seed in (0, 1)]
    (arm,) = arms_of(runs)
    series = arm_series(arm)
    rewards = np.array([run.history.column("reward") for run in runs])
    assert series["width"] == 1 and series["x"]["step"] == list(range(1, 601))
    np.testing.assert_allclose(series["series"]["reward"]["mean"], rewards.mean(0), rtol=1e-3)
    monkeypatch.setattr("twig.report.curves._POINTS", 240)
    series, width = arm_series(arm), 3
    assert series["width"] == width
    means = rewards.reshape(2, 200, width).mean(2)
    for name, how in (("mean", np.mean), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose(series["series"]["reward"][name], how(means, 0), rtol=1e-3)
    assert series["x"]["step"] == list(range(3, 601, 3))
    np.testing.assert_allclose(series["x"]["tokens"], np.arange(3, 601, 3) * 2560, rtol=1e-5)
    assert "kl" not in series["series"], "no run has it"


def test_a_lost_row_of_metrics_moves_no_other_step(tmp_path):
    run = write_run(tmp_path / "a", steps=10, saved=())
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != 3))
    series = arm_series(arms_of([read_run(run)])[0])
    rewards = series["series"]["reward"]["mean"]
    assert rewards[2] is None and series["x"]["step"][-1] == 10
    expected = {row["step"]: row["reward"] for row in rows if "reward" in row}
    for step in (1, 2, 4, 10):
        assert rewards[step - 1] == pytest.approx(expected[step], rel=1e-3)


def test_runs_that_stop_at_different_tokens_are_compared_at_equal_ones(tmp_path):
    short = write_run(tmp_path / "short", ["algorithm.name=grpo"], steps=20)
    longer = write_run(tmp_path / "long", steps=40)
    page = page_of([read_run(short), read_run(longer)])
    # After 20 steps the short one is at 80 %; the long one has an evaluation there, of 60 %.
    assert "Right after 51,200 tokens" in page
    assert "grpo 80.0\xa0%, t-spmo 60.0\xa0%" in page
    equal = page_of([read_run(short), read_run(write_run(tmp_path / "as-long", steps=20))])
    assert "Right after training:" in equal


@pytest.mark.parametrize("state", ["failed", "killed", "stopped", "running"])
def test_a_run_that_is_not_finished_says_so_and_what_to_do(state, tmp_path):
    run = write_run(tmp_path / "a", ["train.max_steps=100"], steps=12)
    (run / "checkpoints" / "step-10").mkdir(parents=True)
    if state == "stopped":
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"status": "stopped", "accuracy_after": None}))
    else:
        (run / "summary.json").unlink()
    if state == "failed":
        (run / "traceback.txt").write_text("Traceback\nValueError: the <file> is gone\n")
    end = End("running") if state == "running" else None
    page = write_report([run], tmp_path / "report.html", end).read_text(encoding="utf-8")
    top = page[page.index("<h1>") : page.index("<nav")]
    assert "step 12 of 100" in top
    assert ("--resume" in top) == (state != "running")
    assert ("ValueError: the &lt;file&gt; is gone" in top) == (state == "failed")
    assert ("from step 10" in top) == (state in ("failed", "killed"))
    assert (data_of(page)["live"] > 0) == ('http-equiv="refresh"' in page) == (state == "running")


def test_a_finished_run_says_what_to_try_next(tmp_path):
    run = read_run(write_run(tmp_path / "a", steps=40))
    page = page_of([run])
    top = page[page.index("What to try next") : page.index('id="credit"')]
    assert "<code>train.seed=1</code>" in top and "twig chat" in "".join(re.split("<[^>]*>", top))
    assert "task.path" not in top, "a fifth of the problems is still wrong"
    summary = run.summary | {"accuracy_after": run.summary["accuracy_after"] | {"value": 0.95}}
    better = History(run.history.rows, run.settings, summary)
    assert any("task.path" in text for text in to_try(better))
    rising = [{**row, "reward": row["step"] / 40} for row in run.history.rows]
    flat = [{**row, "reward": row["step"] % 2} for row in run.history.rows]
    texts = [to_try(History(rows, run.settings, summary)) for rows in (rising, flat)]
    assert ["max_steps" in text[0] for text in texts] == [True, False]
    (tmp_path / "a" / "summary.json").unlink()
    assert "train.seed=1" not in page_of([read_run(tmp_path / "a")])


def test_a_finished_run_says_nothing_of_its_state(run):
    page = page_of([read_run(run)])
    assert "--resume" not in page[: page.index("<nav")] and data_of(page)["live"] == 0


def test_accuracy_has_each_evaluation_with_an_interval(tmp_path):
    (arm,) = arms_of([read_run(write_run(tmp_path / "a"))])
    rows = arm_series(arm)["evals"]
    assert [row[:2] for row in rows] == [[0, 0.0], [20, 20 * 2560], [40, 40 * 2560]]
    assert rows[1][3:] == [0.6, 0.5693, 0.6299], "Wilson's interval of 600 of 1000"
    (arm,) = arms_of([read_run(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in (1, 2)])
    assert arm_series(arm)["evals"][1][3:] == [0.6, 0.6, 0.6], "of several seeds: lowest and highest"


def test_runs_of_different_length_and_without_results(tmp_path):
    short = write_run(tmp_path / "short", steps=3)
    (short / "summary.json").unlink()
    (short / "environment.json").unlink()
    page = page_of([read_run(short), read_run(write_run(tmp_path / "long", seed=1))])
    series = data_of(page)["arms"][0]["series"]["reward"]["mean"]
    assert len(series) == 40 and None not in series
    assert "–" in page


def test_a_run_without_steps_has_a_report_too(tmp_path):
    folder = write_run(tmp_path / "run", steps=0, saved=())
    (folder / "metrics.jsonl").unlink()
    data = data_of(page_of([read_run(folder)]))
    assert data["groups"] == [] and data["arms"][0]["series"] == {}


# ---- the page ---------------------------------------------------------------------------------------------


def test_text_of_models_and_users_is_only_data(tmp_path):
    folder = hostile_run(tmp_path / "<b>run&amp;")
    page = page_of([read_run(folder)])
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)" in page, "it is there, as data"
    for raw in ("<img", "<!--", "<style>*", "<b>run"):
        assert raw not in page
    assert set(HOSTILE) & set(data_of(page)["strings"]) and data_of(page)["runs"][0]["name"] == "<b>run&amp;"


def test_json_in_a_page_cannot_end_its_element(tmp_path):
    folder = hostile_run(tmp_path / "run")
    text = re.search(r'id="data">(.*?)\n?<', page_of([read_run(folder)]), re.DOTALL)[1]
    assert not set("<>&\u2028") & set(text) and text.isascii()
    assert "</script><script>alert(1)</script>" in json.loads(text)["strings"]


def test_what_cannot_be_seen_is_written_out(tmp_path):
    """Among them a mark that turns the text after it around, and a zero byte."""
    folder = write_run(tmp_path / "run")
    facts = json.loads((folder / "environment.json").read_text()) | {"device": "a\u202eb\x00c\td"}
    (folder / "environment.json").write_text(json.dumps(facts))
    assert "<dd>a\\u202eb\\x00c\\td</dd>" in page_of([read_run(folder)])


def test_the_policy_allows_the_page_its_own_script_and_style_and_nothing_else(run):
    page = write_report([run]).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    for name, element in (("script", "script"), ("style", "style")):
        text = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\s(style|on\w+)=", re.sub(r"<script.*</script>", "", page, flags=re.DOTALL))


def test_the_page_names_no_address_of_the_network(run):
    page = write_report([run]).read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\"'\s]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|object)\b|@import|url\(", page)


def test_results_diagnosis_and_settings_are_words_in_the_page(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", ["algorithm.name=grpo"])]
    page = page_of([read_run(run) for run in runs])
    assert "Two ways to train, two runs" in page
    assert "45.0\xa0% (42.0 to 48.0)" in page and "80.0\xa0% (77.0 to 83.0)" in page
    assert "None of the" in page and "<code>algorithm.name</code>" in page
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.writelines(
            json.dumps({"step": 41 + i, "tokens/sampled": 9, "kl": 2.0}) + "\n" for i in range(40)
        )
    page = page_of([read_run(run) for run in runs])
    assert "Far from the base model" in page and "<b>a</b>: the KL divergence" in page
    assert "<code>algorithm.beta</code>" in page


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_folder_of_one_run_and_beside_several(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name)
    assert main(["report", "a"]) == 0
    assert main(["report", "a", "b", "a"]) == 0
    assert main(["report", "b", "--output", "other.html"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "a/report.html",
        "report.html",
        "other.html",
    ]
    assert len(data_of((tmp_path / "report.html").read_text())["runs"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "other.html", "report.html"]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["nowhere"], "nowhere: it holds no run"),
        (["run", "--output", "no/where.html"], "no/where.html cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert main(["report", *arguments]) == 2
    assert line in capsys.readouterr().err


def test_a_damaged_file_of_metrics_is_named(run):
    (run / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 1"):
        read_run(run)


@pytest.mark.slow
def test_five_runs_of_two_thousand_steps_are_a_small_page(tmp_path):
    """As a study leaves them: completions of every 25th step, 8 groups of 16, up to 200 tokens each."""
    saved = [1, *range(25, 2001, 25)]
    runs = []
    for seed in range(5):
        name = ["algorithm.name=grpo"] if seed > 2 else []
        runs.append(write_run(tmp_path / str(seed), name, 2000, saved, seed, groups=8, size=16, length=200))
    path = write_report(runs, tmp_path / "report.html")
    assert path.stat().st_size < 5_000_000
    data = data_of(path.read_text(encoding="utf-8"))
    assert [arm["runs"] for arm in data["arms"]] == [3, 2]
    assert max(len(series["mean"]) for arm in data["arms"] for series in arm["series"].values()) <= 2000
    for run in range(5):
        steps = {group["step"] for group in data["groups"] if group["run"] == run}
        assert {1, 2000} <= steps and len(steps) >= 10, "spread over the run"
