"""Settings: what is read from recipes, files, overrides and dicts; and that the reference page is current."""

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from twig.common.errors import UserError
from twig.config.load import (
    RUN_CONFIG,
    Settings,
    affects,
    json_schema,
    load,
    parse_override,
    parse_yaml,
    recipe_names,
    recipe_text,
    settings_with,
)
from twig.config.messages import fields_of
from twig.config.reference import rule_of, settings_reference
from twig.config.schema import AFFECTS
from twig.core.algorithms.registry import shipped

ROOT = Path(__file__).resolve().parents[2]
LEAST = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}


def line_of(values, *overrides):
    with pytest.raises(UserError) as caught:
        Settings.from_dict(values, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is shipped and documented


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_is(name):
    settings = load(name)
    assert settings == Settings.from_dict(settings.model_dump())
    assert recipe_text(name).startswith("# ")


def test_the_reference_page_is_current():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_reference(), "run: python -m twig.config.reference > docs/settings.md"


EVERY = {key: info for kind in shipped().values() for key, info in fields_of(settings_with(kind))}
EVERY |= dict(fields_of(Settings))


@pytest.mark.parametrize("key", EVERY)
def test_every_setting_has_a_description_a_rule_and_a_row(key):
    description = EVERY[key].description
    assert description and description.strip().endswith((".", "`", ")"))
    assert rule_of(EVERY[key])
    assert f"| `{key}` |" in settings_reference()
    assert affects(key) in AFFECTS


@pytest.mark.parametrize(
    "key, rule",
    [
        ("train.learning_rate", "number > 0"),
        ("rollout.num_generations", "whole number >= 2"),
        ("algorithm.replay.probability", "number >= 0 and <= 1"),
        ("train.adam_beta1", "number >= 0 and < 1"),
        ("train.max_steps", "whole number >= 1, null"),
        ("lora.layers", "last_third, all, list of one or more (whole number >= 0)"),
        ("task.digits", "list of 2 (whole number >= 1 and <= 9)"),
        ("log.report_to", "tensorboard, wandb, trackio, all, none, list of (tensorboard, wandb, trackio)"),
        ("model.trust_remote_code", "true, false"),
        ("model.revision", "text, null"),
    ],
)
def test_a_rule_is_made_from_its_field(key, rule):
    assert rule_of(EVERY[key]) == rule


def test_the_schema_takes_every_recipe_and_refuses_a_misspelt_key():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    for name in recipe_names():
        jsonschema.validate(parse_yaml(recipe_text(name), name), schema)
    for wrong in ({"train": {"max_step": 3}}, {"algorithm": {"name": "grpo", "replay": {}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(LEAST | wrong, schema)


# Reading


def test_overrides_are_read_as_yaml_and_the_last_one_wins():
    settings = load(
        "quickstart",
        [
            "train.learning_rate=1e-5",
            "train.max_steps=7",
            "train.max_steps=8",
            "lora.layers=[2, 3]",
            "eval.before=false",
            "task.system_prompt='a = b: c'",
            "task.chat_template_kwargs.enable_thinking=false",
            "algorithm.replay.probability=0.5",
        ],
    )
    assert settings.train.learning_rate == 1e-5
    assert settings.train.max_steps == 8
    assert settings.lora.layers == [2, 3]
    assert settings.eval.before is False
    assert settings.task.system_prompt == "a = b: c"
    assert settings.algorithm.replay.probability == 0.5
    assert settings.task.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["Problem: {question}", "0123", "1e5", "true", "[a]"])
def test_a_setting_of_text_gets_what_was_typed(text):
    assert parse_override(f"task.prompt_template={text}") == ("task.prompt_template", text)
    assert parse_override(f"model.revision= {text}") == ("model.revision", text)
    assert parse_override("model.revision=null") == ("model.revision", None)


def test_a_number_in_a_file_is_no_text():
    with pytest.raises(UserError) as raised:
        Settings.from_dict({**LEAST, "model": {"name": "x", "revision": 1234}})
    assert raised.value.fix.endswith("model.revision=\"'1234'\"")


def test_the_example_in_an_error_can_be_typed():
    with pytest.raises(UserError) as raised:
        Settings.from_dict({**LEAST, "task": {"name": "svamp", "prompt_template": {}}})
    (override,) = shlex.split(raised.value.fix.removeprefix("Set for example "))
    assert parse_override(override) == ("task.prompt_template", "Question: {question}\nAnswer:")


def test_a_value_may_hold_equals_signs():
    assert parse_override("task.prompt_template='{a}*{b}='") == ("task.prompt_template", "{a}*{b}=")


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("2.", 2.0),
        ("-3", -3),
        ("010", 10),  # decimal: a leading zero is not octal
        ("0x10", "0x10"),
        ("1:30", "1:30"),  # text: not 90
        ("2024-01-31", "2024-01-31"),  # text: not a date
        ("yes", "yes"),  # text: only true and false are booleans
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: 1}", {"a": 1}),
        ("1_000", "1_000"),
        ("'1'", "1"),
    ],
)
def test_plain_values(text, value):
    actual = parse_yaml(text, "test")
    assert actual == value and type(actual) is type(value)


def test_settings_survive_being_written_and_read(tmp_path):
    odd = ["1e5", "yes", "null", "2024-01-31", "a: b", "# c", "ä\u2028\tö", "'", "{x}", "- y", "1:30", ""]
    values = LEAST | {"task": LEAST["task"] | {"chat_template_kwargs": {"odd": odd, "n": 1e-5}}}
    settings = Settings.from_dict(values, ["algorithm.name=s-grpo", "train.learning_rate=3e-7"])
    (tmp_path / RUN_CONFIG).write_text(settings.to_yaml(), encoding="utf-8")
    assert load(str(tmp_path)) == settings
    assert load(str(tmp_path / RUN_CONFIG)) == settings


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("a\x85b\u2028c\u2029")
def test_any_text_survives_being_written_and_read(text):
    settings = Settings.from_dict(LEAST | {"task": LEAST["task"] | {"system_prompt": text}})
    assert parse_yaml(settings.to_yaml(), "test") == settings.model_dump()


@given(st.text(max_size=40))
def test_any_override_is_taken_or_refused_in_one_line(text):
    """Whatever is written, a person gets settings or one line; never another exception."""
    for override in (text, f"train.{text}", f"train.max_steps={text}", f"task.system_prompt={text}"):
        try:
            Settings.from_dict(LEAST, [override])
        except UserError as error:
            assert str(error)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.yaml").write_text(recipe_text("quickstart"), encoding="utf-8-sig")
    assert load(str(tmp_path / "a.yaml")) == load("quickstart")


def test_what_python_passes_naturally_is_taken():
    values = LEAST | {"task": LEAST["task"] | {"digits": (2, 2), "path": Path("data") / "x.jsonl"}}
    task = Settings.from_dict(values).task
    assert task.digits == [2, 2]
    assert Path(task.path) == Path("data/x.jsonl")


def test_reading_changes_no_argument():
    values = LEAST | {"train": {"max_steps": 3}}
    Settings.from_dict(values, ["train.max_steps=4", "eval.limit=5"])
    assert values == LEAST | {"train": {"max_steps": 3}}


def test_settings_are_frozen_and_overrides_make_new_ones():
    settings = load("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        settings.train.seed = 3
    assert settings.with_overrides(["train.seed=3"]).train.seed == 3
    assert settings.train.seed == 0


def test_flat_has_every_setting_by_its_dotted_key():
    settings = load("quickstart")
    flat = settings.flat()
    assert list(flat) == [key for key, _ in fields_of(settings_with(type(settings.algorithm)))]
    assert flat["algorithm.replay.cut"] == "entropy"


# What stands for something else, and what excludes something else


def test_null_becomes_what_it_stands_for():
    assert (
        Settings.from_dict(LEAST, ["algorithm.epsilon=0.3", "algorithm.name=grpo"]).algorithm.epsilon_high
        == 0.3
    )
    s_grpo = Settings.from_dict(LEAST, ["algorithm.name=s-grpo", "algorithm.k=70"]).algorithm
    assert (s_grpo.alpha, s_grpo.p, s_grpo.k) == (50, 0.3, 70)
    rollout = {"rollout": {"max_completion_length": 77}}
    assert Settings.from_dict(LEAST | rollout, ["algorithm.name=dr-grpo"]).algorithm.divisor == 77


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["algorithm.alpha=3"], "algorithm.alpha"),
        (["algorithm.name=grpo", "algorithm.p=0.3"], "algorithm.p"),
        (["algorithm.name=grpo", "algorithm.k=3"], "algorithm.k"),
        (["algorithm.unbiased=true"], "algorithm.unbiased"),
        (["algorithm.name=s-grpo", "algorithm.unbiased=true", "algorithm.k=50"], "algorithm.k"),
        (["algorithm.beta=0.04"], "algorithm.beta"),
        (["algorithm.scale_rewards=none"], "algorithm.scale_rewards"),
        (["algorithm.name=grpo", "algorithm.normalise=branches"], "algorithm.normalise"),
        (["algorithm.name=grpo", "algorithm.l2=0.1"], "algorithm.l2"),
        (["algorithm.name=s-grpo", "algorithm.replay.probability=0.1"], "algorithm.replay"),
        (["train.warmup_steps=3"], "train.warmup_steps"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(overrides, key):
    with pytest.raises(UserError) as caught:
        Settings.from_dict(LEAST, overrides)
    assert caught.value.key.endswith(key) and caught.value.fix


def test_a_setting_is_taken_where_it_does_something():
    for overrides in (
        ["algorithm.name=s-grpo", "algorithm.unbiased=true", "algorithm.k=51"],
        ["algorithm.name=grpo", "algorithm.beta=0.04", "algorithm.scale_rewards=none"],
        ["algorithm.l2=0.1", "algorithm.normalise=branches", "algorithm.replay.probability=0.1"],
        ["train.warmup_steps=3", "train.lr_scheduler_type=linear"],
    ):
        Settings.from_dict(LEAST, overrides)


# Messages


@pytest.mark.parametrize(
    "key, meant",
    [
        ("train.learning_rat", "train.learning_rate"),
        ("train.num_generations", "rollout.num_generations"),
        ("num_generations", "rollout.num_generations"),
        ("rollout.temprature", "rollout.temperature"),
        ("rollout.lerning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train"),
        ("algorithm.probability", "algorithm.replay.probability"),
        ("algorithm.replay.cuts", "algorithm.replay.cut"),
    ],
)
def test_an_unknown_setting_gets_the_nearest_valid_one(key, meant):
    with pytest.raises(UserError) as caught:
        Settings.from_dict(LEAST, [f"{key}=3"])
    assert meant in caught.value.fix


def test_an_unknown_setting_like_no_other_gets_the_ones_there_are():
    assert "r, alpha, target_modules, " in line_of(LEAST, "lora.xyz=3")
    assert ", ".join(Settings.model_fields) in line_of(LEAST | {"xyz": 3})


def test_the_place_of_a_mistake_is_named(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name: x}\ntask: {name: svamp}\ntrain: {max_steps: soon}\n")
    with pytest.raises(UserError, match=r"my\.yaml: train\.max_steps: 'soon' should be a valid integer"):
        load(str(tmp_path / "my.yaml"))
    with pytest.raises(
        UserError, match=r"^override train\.max_steps=0: train\.max_steps: 0 should be greater"
    ):
        load(str(tmp_path / "my.yaml"), ["train.max_steps=0"])
    assert load(str(tmp_path / "my.yaml"), ["train.max_steps=5"]).train.max_steps == 5


def test_several_mistakes_are_counted():
    assert "(and 1 more)" in line_of(LEAST, "train.seed=x", "eval.limit=0")


@pytest.mark.parametrize(
    "override, instead",
    [
        ("train.max_steps=1e3", "train.max_steps=1000"),
        ("log.report_to=wandbb", "log.report_to=wandb?"),
        ("lora.layers=3", "lora.layers=[3]"),
        ("task.name=svmp", "task.name=svamp?"),
    ],
)
def test_what_to_write_instead_is_the_value_put_right(override, instead):
    with pytest.raises(UserError) as caught:
        Settings.from_dict(LEAST, [override])
    assert caught.value.fix.endswith(instead)


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("log.report_to=wandb", "log.report_to", ["wandb"]),
        ("log.report_to=none", "log.report_to", []),
        ("log.report_to=[none]", "log.report_to", []),
        ("rollout.stop=Question", "rollout.stop", ["Question"]),
        ("rollout.suppress_tokens=7", "rollout.suppress_tokens", [7]),
        ("task.reward_weights=0.5", "task.reward_weights", [0.5]),
    ],
)
def test_a_list_of_one_is_written_as_its_only_value(override, key, value):
    settings = Settings.from_dict(LEAST, [override])
    assert settings.flat()[key] == value
    assert Settings.from_dict(parse_yaml(settings.to_yaml(), "config.yaml")) == settings
    group, name = key.split(".")
    one = value[0] if value else "none"
    schema = json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(LEAST | {group: LEAST.get(group, {}) | {name: one}}, schema)


def test_all_trackers_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr("twig.config.schema.find_spec", lambda name: name == "trackio" or None)
    assert Settings.from_dict(LEAST, ["log.report_to=all"]).log.report_to == ["trackio"]


# Aliases

NINE = "\n".join(
    f"{name}: &{name} [{', '.join(['x' if before is None else f'*{before}'] * 9)}]"
    for before, name in zip([None, *"abcdefgh"], "abcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        NINE,
        "a: &a [*a]",
        "a: &a {b: [1, *a]}",
        "&a {x: *a}",
        f"{NINE}\nz: {{<<: [*a]}}",
        "a: &a {x: 1}\n" + "b: [" + "*a, " * 11_000 + "]",
    ],
)
def test_aliases_without_end_are_refused_before_they_are_followed(text):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ") and "alias" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_that_a_person_writes_are_read():
    text = "base: &base {seed: 3, optim: sgd}\ntrain: {<<: *base, max_steps: 5}\nmore: [*base, *base]"
    base = {"seed": 3, "optim": "sgd"}
    assert parse_yaml(text, "") == {"base": base, "train": base | {"max_steps": 5}, "more": [base, base]}
    long = list(range(20_000))
    assert parse_yaml(str(long), "") == long, "without an alias there is no limit"


@given(st.text(st.sampled_from("&*ab: [],{}\n-<1"), max_size=60))
def test_aliases_are_read_or_refused(text):
    try:
        parse_yaml(text, "my.yaml")
    except UserError as error:
        assert "\n" not in str(error)
