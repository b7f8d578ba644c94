"""What the documents say is true: examples run; files, functions, settings and tests that are named exist."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, blocks, code_words, examples, script
from project import MODULES, ROOT, SOURCE

import twig
from twig.cli.app import main
from twig.config.load import Settings
from twig.runs.folder import RunLog

# Pages that name so much that a check which finds nothing has lost its eyes.
RICH = (
    "README.md",
    "docs/algorithms.md",
    "docs/architecture.md",
    "docs/from-trl.md",
    "docs/troubleshooting.md",
)
README, ALGORITHMS, ARCHITECTURE = (
    PAGES[name] for name in ("README.md", "docs/algorithms.md", "docs/architecture.md")
)

# What examples are run with in place of what they say, so that they take seconds. Each text must be there.
SHORTER = {
    "max_steps: 100": "max_steps: 2",
    '"max_steps": 100': '"max_steps": 2',
    "max_completion_length: 64": "max_completion_length: 12",
    '"max_completion_length": 64': '"max_completion_length": 12',
}
# What is added to the commands.
SMALL = {
    "train": "train.max_steps=2 eval.limit=8 rollout.num_generations=4 rollout.prompts_per_step=2 "
    "rollout.max_completion_length=12 log.progress=quiet",
    "eval": "eval.limit=8 log.progress=quiet",
}
SUFFIXES = (".py", ".md", ".html", ".json", ".jsonl", ".yaml", ".parquet", ".cff")
DOTTED = re.compile(r"([a-z][\w]*)(\.[\w]+)+")
MINIMAL = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
# Written by runs and by readers of the README.
MADE = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "report.html",
    "problems.jsonl",
    "rewards.py",
    "my.yaml",
    # named in other pages
    "config.json",
    "arithmetic.yaml",
    "STUDY.yaml",
    "comparison.md",
    "comparison.json",
    "evaluation.json",
    "completions.jsonl",
    "traceback.txt",
    "warnings.txt",
    "site/index.html",
}


def shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, with the README's files."""
    monkeypatch.chdir(tmp_path)
    for _, text, file in blocks(README):
        if file is not None:
            Path(file).write_text(shorter(text), encoding="utf-8")
    return tmp_path


@pytest.fixture
def quickstart(folder):
    """`make quickstart`, of two steps."""
    assert main(["train", "quickstart", "--output", "runs/quickstart", *SMALL["train"].split()]) == 0
    return folder / "runs" / "quickstart"


# Examples run


def test_the_shorter_texts_are_in_the_readme():
    for text in SHORTER:
        assert text in README, text


def test_the_readme_has_the_files_of_its_own_task(folder):
    assert {path.name for path in folder.iterdir()} == {"problems.jsonl", "rewards.py", "my.yaml"}
    for line in Path("problems.jsonl").read_text().splitlines():
        row = json.loads(line)
        a, b = row["prompt"].rstrip("=").split("*")
        assert int(a) * int(b) == int(row["answer"])


def test_the_commands_of_the_readme_run(quickstart, capsys):
    commands = [
        shlex.split(line, comments=True)
        for language, text, _ in blocks(README)
        if language == "sh"
        for line in text.splitlines()
    ]
    assert {words[1] for words in commands} == {
        "train",
        "eval",
        "export",
        "tasks",
        "recipes",
        "plan",
        "report",
        "env",
    }
    assert all(words[0] == "twig" for words in commands)
    for _, *words in commands:
        assert main([*words, *SMALL.get(words[0], "").split()]) == 0, words
        assert capsys.readouterr().out, words
    assert json.loads(Path("runs/my-1/summary.json").read_text())["task"] == "custom"


def test_the_trained_adapter_answers_in_six_lines(quickstart, capsys):
    (six,) = [text for text in examples(README) if "PeftModel" in text]
    assert len([line for line in six.splitlines() if line]) == 6
    names = {}
    exec(compile(six, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert re.fullmatch(r"347\*26=[0-9*=,:#+-]+\n", shown)
    trained = {n: p for n, p in names["model"].named_parameters() if "lora_B" in n}
    assert trained and any(bool(p.any()) for p in trained.values()), "the adapter of the run is in it"


def test_training_from_python_runs(folder, capsys):
    (whole,) = [text for text in examples(README) if "twig.train(" in text]
    names = {}
    exec(compile(shorter(whole), "README.md", "exec"), names)
    assert names["run"].summary["steps"] == 2
    assert names["run"].summary["accuracy_after"]["n"] == 20
    assert capsys.readouterr().out.startswith(str(names["run"].folder))


def test_credit_alone_runs(capsys):
    (alone,) = [text for text in examples(README) if "twig.assign(" in text]
    exec(compile(alone, "README.md", "exec"), {})
    # V: root 1/3; after 7 the same; after 7 8 it is 1, after 7 9 it is 0, and so it stays. Six nodes.
    assert capsys.readouterr().out.splitlines() == [
        "token 8 at depth 2: +0.111",
        "token 9 at depth 2: -0.056",
    ]


def test_every_example_of_the_readme_is_run_by_one_of_these():
    assert len(examples(README)) == 3


def test_the_parts_put_together_by_hand_give_a_gradient():
    (parts,) = examples(ARCHITECTURE)
    names = {}
    exec(compile(parts, "architecture.md", "exec"), names)
    assert 0 < names["rewards"].sum() < 16, "both kinds of answer are in the group"
    gradients = [p.grad for n, p in names["policy"].parameters.items() if "lora_B" in n]
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_the_example_of_algorithms_runs():
    (example,) = examples(ALGORITHMS)
    exec(compile(example, "algorithms.md", "exec"), {})


def test_a_t_spmo_step_can_lower_the_expected_reward():
    # One token decides: two common ones, with rewards 1/2 and 0, and twelve rare ones with reward 1. The
    # group is 1000 completions in exactly the policy's proportions, so V(root) is the expected reward.
    number, reward = np.array([658, 282, *[5] * 12]), np.array([0.5, 0.0, *[1.0] * 12])
    tokens = np.repeat(np.arange(len(number)), number)
    trie = twig.PrefixTrie.build(list(tokens[:, None]), reward[tokens])
    options = twig.Algorithm(name="t-spmo")
    credit = twig.assign(trie, options, np.random.default_rng(0), num_prompts=1)
    p, weight = number / 1000, (credit.plus + credit.minus)[1:]
    ascent = weight - p * weight.sum()  # the gradient of sum(weight * log p) by the logits
    policy_gradient = p * (reward - p @ reward)  # that of the expected reward
    assert ascent @ policy_gradient < -1e-3
    # The same weights times count(n) / G are the policy gradient, but for the divisor.
    visited = weight * p
    np.testing.assert_allclose(visited - p * visited.sum(), policy_gradient / len(number), atol=1e-15)


# What is named exists


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_function_and_file_named_exists(name):
    """`group.key` is a setting, `module.function` is in that module, `folder/file.py` is a file."""
    settings = Settings.model_validate(MINIMAL).flat()
    ours = {*Settings.model_fields, *MODULES, "twig"}
    code = [word for word in code_words(PAGES[name]) if not word.startswith("python -m twig.")]
    words = [part for word in code for part in re.split(r"[\s(=:]", word)]
    files = [word for word in words if word.endswith(SUFFIXES)]
    dotted = [word for word in words if DOTTED.fullmatch(word) and word not in files]
    for word in files:
        assert _is_file(word), f"{word} is no file"
    for word in (word for word in dotted if word.split(".")[0] in ours):
        assert word in settings or _has(word), f"{word} is neither a setting nor in a module"
    assert len(files) + len(dotted) > 5 or name not in RICH


def _is_file(word: str) -> bool:
    if word in MADE or re.fullmatch(r"completions/step-N\.parquet", word):
        return True
    places = (ROOT, SOURCE, ROOT / "docs", ROOT / "tests", SOURCE / "recipes")
    return any((place / word).is_file() for place in places)


def _has(dotted: str) -> bool:
    parts = dotted.split(".")
    if parts[0] == "twig":
        return len(parts) == 2 and parts[1] in twig.__all__
    if dotted in MODULES:
        return True
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:length]) in MODULES:
            value = importlib.import_module("twig." + ".".join(parts[:length]))
            for part in parts[length:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


def test_the_check_of_names_sees_a_wrong_one():
    for right in (
        "core.algorithms.t_spmo",
        "core.trie.PrefixTrie.value",
        "tasks.rewards.judge",
        "twig.train",
    ):
        assert _has(right)
    for wrong in (
        "core.algorithms.tspmo",
        "core.trie.PrefixTrie.values",
        "tasks.reward.score",
        "twig.trie",
        "nowhere.t_spmo",
    ):
        assert not _has(wrong)
    assert not _is_file("credits.py")


def test_every_function_of_the_equations_is_of_the_modules_that_compute_them():
    """The page says where each rule is; a rule that is added needs its line."""
    named = {word for word in code_words(ALGORITHMS) if DOTTED.fullmatch(word) and _has(word)}
    for name, rule in twig.ALGORITHMS.items():
        assert f"core.algorithms.{rule.__name__}" in named, name
    for module in ("core.objective", "core.replay"):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {f"{module}.{function}" for function in functions if function[0] != "_"} <= named


@pytest.mark.parametrize("name", PAGES)
def test_every_test_named_exists(name):
    named = [word for word in code_words(PAGES[name]) if "::" in word]
    for word in named:
        file, _, function = word.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, word
    assert len(named) > 20 or name != "docs/algorithms.md"


def test_make_has_the_targets_of_the_readme():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"\bmake ([a-z][\w-]+)", README)
    assert {"quickstart", "test", "test-slow"} <= set(targets)
    for target in set(targets) - {"test)"}:
        assert target in re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split(), target


def test_a_fresh_machine_needs_what_the_setup_asks_for():
    setup = script("setup")
    assert f"Python {setup.dotted(setup.OLDEST_PYTHON)} or newer" in README
    found = re.search(r"([0-9.]+) GB of\s+disk; ([0-9.]+) GB on Linux", README)
    assert (float(found[1]), float(found[2])) == (setup.DISK_CPU, setup.DISK_CUDA)


def test_recipes_named_in_the_readme_are_shipped():
    named = re.findall(r"[Rr]ecipe `([\w.-]+)`", PAGES["README.md"])
    assert named
    for name in named:
        assert (SOURCE / "recipes" / f"{name}.yaml").is_file()


def test_the_results_have_their_place():
    assert README.count("<!-- results -->") == README.count("<!-- /results -->") == 1


def test_type_checkers_see_the_names_that_are_exported():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in branch.body
        for alias in node.names
    }
    exported = {name: place if ":" in place else f"{place}:{name}" for name, place in twig._EXPORTS.items()}
    assert seen == exported


# The learning curve

learning_curve = script("learning_curve")
ACCURACY = {"value": 0.476, "low": 0.4452, "high": 0.507, "n": 1000}


def write_run(folder, algorithm, rewards, summary=None):
    settings = Settings.from_dict(MINIMAL, [f"algorithm.name={algorithm}"])
    log = RunLog.create(folder, settings)
    for step, reward in enumerate(rewards, 1):
        log.log(step, {"reward": reward})
    log.log(len(rewards), {"eval/accuracy": 0.5})
    if summary is not None:
        log.save_summary(summary)
    return folder


def test_a_curve_is_the_reward_of_each_step(tmp_path):
    steps, rewards = learning_curve.curve(write_run(tmp_path / "a", "grpo", [0.0, 1.0, None, 0.5]))
    assert (steps.tolist(), rewards.tolist()) == ([1, 2, 4], [0.0, 1.0, 0.5])


def test_the_thick_line_is_the_mean_of_the_last_steps():
    values = np.array([1.0, 2.0, 6.0, 0.0])
    assert learning_curve.trailing_mean(values, 2).tolist() == [1.0, 1.5, 4.0, 3.0]
    assert learning_curve.trailing_mean(values, 1).tolist() == values.tolist()
    assert learning_curve.trailing_mean(values, 9).tolist() == [1.0, 1.5, 3.0, 2.25]


def test_runs_are_drawn_and_their_table_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    summary = {
        **{"status": "finished", "algorithm": "t-spmo", "task": "multiplication"},
        **{"steps": 2, "nodes_run": 3, "accuracy_best": None},
        "accuracy_before": ACCURACY,
        "accuracy_after": ACCURACY | {"value": 0.913},
        "tokens_sampled": 1_000_000,
        "tokens_selected": 12_345,
        "seconds": 171.6,
        "peak_memory_bytes": 3 * 2**29,
    }
    runs = [
        write_run(Path("a"), "t-spmo", [0.1, 0.9], summary),
        write_run(Path("b"), "grpo", [0.2, 0.3]),
        write_run(Path("c"), "grpo", [0.2, 0.3, 0.4]),
    ]
    assert learning_curve.main([*map(str, runs), "--output", "images/curve.svg"]) == 0
    picture = Path("images/curve.svg").read_text(encoding="utf-8")
    for text in ("t-spmo", "grpo (b)", "grpo (c)", "step", "#ffffff"):
        assert text in picture
    lines = capsys.readouterr().out.splitlines()
    before, after = "47.6 % (44.5 to 50.7, n = 1000)", "91.3 % (44.5 to 50.7, n = 1000)"
    assert lines[2:] == [
        f"| t-spmo | {before} | {after} | 1,000,000 | 1.2 % | 172 s | 1.50 GiB |",
        "| grpo (b) | - | - | - | - | - | - |",
        "| grpo (c) | - | - | - | - | - | - |",
    ]
    learning_curve.main([*map(str, runs), "--output", "again.svg"])
    assert Path("again.svg").read_text(encoding="utf-8") == picture
    learning_curve.main([*map(str, runs), "--output", "other.svg", "--smooth", "1"])
    assert Path("other.svg").read_text(encoding="utf-8") != picture


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert learning_curve.main([str(tmp_path / "empty"), "--output", str(tmp_path / "x.svg")]) == 2
    shown = capsys.readouterr()
    assert "no run with metrics" in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "x.svg").exists()
