"""What the Hub does not give, and what cannot be read, is one line and exit status 2; nobody waits for it."""

import time
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub import constants, errors
from saved import build_tokenizer
from transformers import AutoConfig

from twig.cli.app import main
from twig.common import hub
from twig.common.errors import UserError
from twig.config.schema import Model
from twig.engine.load import load_model
from twig.engine.lora import attach, load_adapter
from twig.tasks import data

NAME = "somebody/something"


def answer(status):
    return httpx2.Response(status, request=httpx2.Request("HEAD", "https://huggingface.co/x"))


def wrapped(error, message):
    """`error` as transformers hands it on."""
    try:
        raise OSError(message) from error
    except OSError as outer:
        return outer


GATED = errors.GatedRepoError("Access to model somebody/something is restricted.", response=answer(403))
MISSING = errors.RepositoryNotFoundError("401 Client Error. Repository Not Found", response=answer(401))
REVISION = errors.RevisionNotFoundError("404 Client Error. Revision Not Found", response=answer(404))
UNCACHED = errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache")
OFFLINE = errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co/x")
CASES = {
    "gated": (GATED, wrapped(GATED, "You are trying to access a gated repo.")),
    "missing": (MISSING, wrapped(MISSING, "x is not a local folder and is not a valid model identifier")),
    "revision": (REVISION, wrapped(REVISION, "nope is not a valid git identifier")),
    "offline": (
        UNCACHED,
        OFFLINE,
        wrapped(UNCACHED, "We couldn't connect to 'https://huggingface.co' to load the files"),
        httpx2.ConnectError("[Errno -2] Name or service not known"),
        httpx2.ConnectTimeout("timed out"),
    ),
}
each = pytest.mark.parametrize(
    ("why", "error"), [(why, error) for why, errors in CASES.items() for error in errors], ids=repr
)
# What each line must say, of a model and of a data set.
MODEL = {
    "gated": f"model.name: {NAME} .*https://huggingface.co/{NAME}, .*`hf auth login`",
    "missing": f"model.name: {NAME} .*model.name=",
    "revision": f"model.revision: {NAME} .* nope.*model.revision=",
    "offline": f"model.name: {NAME} .*model.name=",
}
DATA = {
    "gated": f"task custom: data set {NAME} .*co/datasets/{NAME}, .*`hf auth login`",
    "missing": f"task custom: data set {NAME} .*task.path=FOLDER",
    "revision": f"task custom: data set {NAME} .* nope.*task.revision=",
    "offline": f"task custom: data set {NAME} .*task.path=FOLDER",
}


@each
def test_the_reason_is_found_wherever_it_is_in_the_chain(why, error):
    assert hub.refusal(error) == why
    assert hub.refusal(ValueError("a head of 3 does not divide 7")) is None


def raising(error):
    def fetch(*arguments, **options):
        raise error

    return fetch


@each
def test_a_model_that_the_hub_does_not_give_is_one_line(why, error, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", raising(wrapped(error, str(error))))
    with pytest.raises(UserError, match=f"^{MODEL[why]}") as caught:
        load_model(Model(name=NAME, revision="nope"))
    assert "\n" not in str(caught.value)


@each
def test_data_that_the_hub_does_not_give_is_one_line(why, error, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", raising(error))
    with pytest.raises(UserError, match=f"^{DATA[why]}") as caught:
        data._open(SimpleNamespace(name="custom", path=NAME, revision="nope", subset=None), None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("why", ["gated", "missing", "offline"])
def test_an_adapter_that_the_hub_does_not_give_is_one_line(why, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(CASES[why][0]))
    says = {
        "gated": "needs its licence",
        "missing": "is no folder, and not on the Hub",
        "offline": "nor reach",
    }
    with pytest.raises(UserError, match=f"^model.adapter: {NAME} .*{says[why]}"):
        load_adapter(tiny.build_model(), NAME)


def test_an_adapter_from_the_hub_is_fetched_without_anything_else_and_goes_on(tmp_path, monkeypatch):
    first = attach(tiny.build_model(), r=3, alpha=6.0, target_modules=["k_proj"], layers=[1])
    first.save_pretrained(tmp_path, save_embedding_layers=False)
    asked = {}

    def fetch(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    again = attach(tiny.build_model(), r=9, alpha=1.0, target_modules=["q_proj"], adapter=NAME)
    assert asked == {"name": NAME, "patterns": ["adapter_config.json", "adapter_model.safetensors"]}
    trained = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and all("layers.1.self_attn.k_proj.lora_" in n for n in trained)
    for name, parameter in first.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter, rtol=0, atol=1e-7)


def save_pickled(folder, model):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def test_weights_that_are_only_pickled_are_refused_by_name(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    save_pickled(folder, tiny.build_model())
    with pytest.raises(
        UserError, match=r"^model.name: .*base has no safetensors weights \(it has pytorch_mod"
    ):
        load_model(str(folder))
    tiny.build_model().save_pretrained(folder)  # beside safetensors they do not matter, and are not read
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert load_model(str(folder))[0].config.model_type == "qwen2"


def test_an_adapter_that_is_only_pickled_is_refused_by_name(tmp_path):
    peft_model = attach(tiny.build_model(), r=3, alpha=6.0, target_modules=["q_proj"])
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="^model.adapter: .* has no adapter_model.safetensors, and no other"):
        load_adapter(tiny.build_model(), tmp_path)


@pytest.fixture
def online(monkeypatch):
    """As where HF_HUB_OFFLINE is not set, with the answers of the Hub to be chosen."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    asked = []

    def choose(result):
        def head(address, timeout):
            asked.append((address, timeout))
            if isinstance(result, Exception):
                raise result
            return result

        session = SimpleNamespace(head=head)
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
        return asked

    yield choose
    hub.reachable.cache_clear()


def test_the_hub_is_asked_once_and_whatever_it_answers_counts(online):
    asked = online(answer(503))
    assert hub.reachable() and hub.reachable()
    assert asked == [("https://huggingface.co", 5.0)]
    with hub.hub_or_cache():
        assert not constants.HF_HUB_OFFLINE


def test_without_an_answer_the_libraries_look_into_their_cache_only(online):
    online(httpx2.ConnectError("[Errno -2] Name or service not known"))
    with pytest.raises(ZeroDivisionError), hub.hub_or_cache():
        assert constants.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE, "as before, whatever happened"


def test_nobody_waits_for_a_hub_that_is_not_reachable(online, monkeypatch, tmp_path, capsys):
    """The libraries would try each file six times, 23 seconds in all."""
    online(httpx2.ConnectError("[Errno -2] Name or service not known"))
    monkeypatch.setattr(
        time, "sleep", lambda s, own=time.sleep: own(s) if s < 0.1 else pytest.fail(f"waits {s} s")
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n' * 5)
    base = ["train", "quickstart", "--output", "run", "log.progress=quiet"]
    assert main([*base, f"model.name={NAME}"]) == 2
    assert f"model.name: {NAME} " in one_line(capsys)
    overrides = ["task.name=custom", f"task.path={NAME}"]
    assert main([*base, *overrides]) == 2
    assert f"data set {NAME} " in one_line(capsys)
    assert not (tmp_path / "run").exists()


def one_line(capsys):
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said
