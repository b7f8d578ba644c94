"""What shells and editors ask for: completion of arguments, and the JSON schema of the settings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twig.cli.app import main
from twig.cli.completion import complete_run, complete_source
from twig.config.load import load, parse_yaml, recipe_names, recipe_text

# ---- completion --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run in `runs`, a run beside it, YAML files and a folder that is no run."""
    for name in (
        "runs/quickstart-1/config.yaml",
        "mine/config.yaml",
        "quick.yaml",
        ".hidden.yaml",
        "no/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_source_is_a_recipe_a_file_or_a_run(folder: Path) -> None:
    assert complete_source("qui") == ["quickstart", "quick.yaml"]
    assert complete_source("runs/") == ["runs/quickstart-1"]
    assert {*recipe_names(), "quick.yaml", "mine", "runs/quickstart-1"} == set(complete_source(""))


def test_a_run_is_a_folder_with_settings(folder: Path) -> None:
    assert complete_run("") == ["mine", "runs/quickstart-1"]
    assert complete_run("n") == complete_run("nowhere/") == complete_run("[") == []
    assert complete_run(f"{folder}/m") == [f"{folder}/mine"]


@pytest.mark.parametrize(
    ("line", "proposal"), [("pl", "plan"), ("train quicks", "quickstart"), ("report ru", "runs/quickstart-1")]
)
def test_a_shell_is_answered_without_torch(folder: Path, line: str, proposal: str) -> None:
    typed = ["twig", *line.split()]
    code = """
import atexit, sys
heavy = "torch transformers datasets peft matplotlib".split()
atexit.register(lambda: print("imported:", [name for name in heavy if name in sys.modules]))
from twig.cli.app import main
main([])
"""
    asked = {
        "_TWIG_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked
    )
    assert done.stdout.splitlines() == [proposal, "imported: []"], done.stderr


# ---- the schema --------------------------------------------------------------------------------------------

_KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def faults_of(value: Any, schema: dict[str, Any], root: dict[str, Any], key: str = "") -> list[str]:
    """Returns the keys at which a value breaks a JSON schema: kinds, choices, unknown and missing keys."""
    if "$ref" in schema:
        return faults_of(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, key)
    if "anyOf" in schema:
        return min((faults_of(value, each, root, key) for each in schema["anyOf"]), key=len)
    kind = _KINDS[schema["type"]] if "type" in schema else object
    if not isinstance(value, kind) or isinstance(value, bool) and kind not in (bool, object):
        return [key]
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return [key]
    if isinstance(value, list) and "items" in schema:
        return [fault for item in value for fault in faults_of(item, schema["items"], root, key)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    names, prefix = schema["properties"], key and f"{key}."
    faults = [f"{prefix}{name}" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        if name in names:
            faults += faults_of(item, names[name], root, prefix + name)
        elif schema.get("additionalProperties") is False:
            faults.append(prefix + name)
    return faults


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["schema"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_the_schema(name: str, schema: dict[str, Any]) -> None:
    assert faults_of(parse_yaml(recipe_text(name), name), schema, schema) == []
    assert faults_of(load(name).model_dump(), schema, schema) == [], "and so do the settings of its runs"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.learning_rat", 1e-5),
        ("train.max_steps", "many"),
        ("train.max_steps", True),
        ("algorithm.name", "nothing"),
        ("lora.target_modules", 3),
        ("trian", {}),
    ],
)
def test_a_mistake_breaks_the_schema(key: str, value: Any, schema: dict[str, Any]) -> None:
    settings = parse_yaml(recipe_text("quickstart"), "quickstart")
    group, _, name = key.partition(".")
    if name:
        settings[group] = settings.get(group, {}) | {name: value}
    else:
        settings[group] = value
    assert key in faults_of(settings, schema, schema)
