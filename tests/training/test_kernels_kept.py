"""`model.kernels` of a run and of a study: chosen once, kept in the config and the checkpoint, resumed."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import yaml
from small_runs import Heard, ask_to_stop, at, record
from transformers import AutoModelForCausalLM, AutoTokenizer

from twig.common.errors import UserError
from twig.config.sizes import with_values
from twig.engine import kernels
from twig.engine.kernels import Choice
from twig.runs import checkpoint
from twig.runs.folder import RunLog
from twig.study.plan import Planned
from twig.study.runner import _with_one_choice

pytestmark = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))
CHOOSE = "twig.engine.kernels.choose_kernels"


def never(*arguments):
    raise AssertionError("measured again")


def stopped_run(run, monkeypatch):
    """A run that `auto` gave oneDNN and that was stopped after two steps."""
    monkeypatch.setattr(CHOOSE, lambda *arguments: Choice("onednn", "it is faster"))
    run("run", progress=Heard(step=at(2, ask_to_stop)))
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "measure", never)


def test_what_auto_chose_is_kept_and_resumed_bit_for_bit(run, whole, tmp_path, monkeypatch):
    stopped_run(run, monkeypatch)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["kernels"] == "onednn"
    assert config["rollout"]["packed_weights"] is True, "there is room for so small a model"
    newest, _ = checkpoint.newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint.load_state(newest)["decided"]["model.kernels"] == "onednn"
    run("run", resume=True)
    assert record(tmp_path / "run") == record(whole("model.kernels=onednn"))


def test_a_machine_without_it_cannot_resume(run, monkeypatch):
    stopped_run(run, monkeypatch)
    monkeypatch.setattr(kernels, "obstacle", lambda: "this build of torch has no oneDNN")
    with pytest.raises(UserError, match=r"^model\.kernels: .*no oneDNN") as error:
        run("run", resume=True)
    assert "\n" not in str(error.value)


def test_another_choice_is_refused(run, monkeypatch):
    stopped_run(run, monkeypatch)
    with pytest.raises(UserError, match=r"^model\.kernels: .*'torch' here.*'onednn'"):
        run("run", "model.kernels=torch", resume=True)


def test_a_study_chooses_once_for_all_runs_of_a_model(settings, tmp_path, monkeypatch):
    calls = []

    def chosen(*arguments):
        calls.append(arguments)
        return Choice("onednn", "it is faster")

    monkeypatch.setattr(CHOOSE, chosen)
    runs = [Planned("a", seed, settings()) for seed in (0, 1)]
    runs.append(Planned("set", 0, settings("model.kernels=torch")))
    runs.append(Planned("missing", 0, settings("model.name=./nowhere")))
    decided = _with_one_choice(runs, [])
    assert [each.settings.model.kernels for each in decided] == ["onednn", "onednn", "torch", "auto"]
    assert len(calls) == 1
    # What an earlier run of the study took stands, also for a seed that was added later.
    began = with_values(runs[0].settings, {"model.kernels": "torch"})
    RunLog.create(tmp_path / "a", began).close()
    decided = _with_one_choice([replace(runs[1], seed=7)], [tmp_path / "a"])
    assert decided[0].settings.model.kernels == "torch" and len(calls) == 1


def test_a_passed_model_is_what_it_was_and_can_be_copied_saved_and_merged(run, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = run("run", "model.kernels=onednn", model=model, tokenizer=tokenizer).model
    assert not any("forward" in vars(module) for module in trained.modules())
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        for copied in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
            assert torch.equal(copied(input_ids=ids).logits, expected)
        merged = copy.deepcopy(trained).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        merged.save_pretrained(tmp_path / "merged")
        assert copy.deepcopy(trained).to(torch.bfloat16)(input_ids=ids).logits.dtype is torch.bfloat16
    after = trained.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
