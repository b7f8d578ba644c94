"""Files and checkpoints when the disk fails: whole, or as before, at every single write, flush and rename."""

import errno
import os
import shutil

import pytest
import torch
from faults import Failing

from twig.common.files import append_whole, put_folder, remove_folder, write_whole
from twig.runs import checkpoint

TENSORS = {"adapter": {"a": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"m": torch.ones(4)}}


def state(step):
    return {"step": step, "words": ["ä", None, 1.5]}


def save(folder, step, keep=2):
    return checkpoint.save(folder, step, TENSORS, state(step), keep)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, number):
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    calls = 0
    while True:
        with Failing(calls, number) as failing:
            try:
                write_whole(path, "new")
            except OSError as error:
                assert error.errno == number
        if not failing.failed:
            break
        renamed = failing.calls[-1][0] == "fsync" and calls == 3  # of the folder, after the rename
        assert path.read_text() == ("new" if renamed else "old"), failing.calls
        assert [p.name for p in tmp_path.iterdir()] == ["summary.json"], "nothing half is left"
        write_whole(path, "old")
        calls += 1
    assert [name for name, _ in failing.calls] == ["write", "fsync", "replace", "fsync"]
    assert path.read_text() == "new"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_whole(path, "one\n")
    with Failing(0, errno.ENOSPC), pytest.raises(OSError, match="No space"):
        append_whole(path, "two, and quite long\n")
    assert path.read_text() == "one\n"
    append_whole(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def test_text_that_utf_8_cannot_say_is_written_as_an_escape(tmp_path):
    write_whole(tmp_path / "a", "half a pair: \ud800")
    assert (tmp_path / "a").read_text() == "half a pair: \\ud800"


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name, content in (("adapter", "old"), (".adapter.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text(content)
    put_folder(tmp_path / ".adapter.tmp", tmp_path / "adapter")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["adapter", "adapter/new"]
    remove_folder(tmp_path / "adapter")
    remove_folder(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    """Whichever call fails: the old folder or the new one is there, and nothing beside it but the draft."""
    target, draft = tmp_path / "adapter", tmp_path / ".adapter.tmp"
    seen = []
    for call in range(5):
        for folder, content in ((target, "old"), (draft, "new")):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "content").write_text(content)
        with Failing(call, errno.EIO) as failing:
            try:
                put_folder(draft, target)
                assert not failing.failed
            except OSError:
                assert failing.failed
        seen.append((target / "content").read_text())
        beside = {".adapter.tmp"} if seen[-1] == "old" else set()
        assert {path.name for path in tmp_path.iterdir()} == {"adapter"} | beside
    assert seen == ["old", "old", "old", "new", "new"]


# Checkpoints


def test_a_checkpoint_is_read_back_and_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path / "checkpoints", step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-2", "step-10"]
    newest, damaged = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert (newest.name, damaged) == ("step-10", [])
    tensors, read = checkpoint.load(newest)
    assert read == state(10)
    assert {f: {k: v.tolist() for k, v in t.items()} for f, t in tensors.items()} == {
        f: {k: v.tolist() for k, v in t.items()} for f, t in TENSORS.items()
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_where_a_checkpoint_cannot_be_written_the_one_before_is_whole(tmp_path, number):
    """Each write, flush and rename fails once, with one checkpoint kept and nothing to fall back on."""
    folder = tmp_path / "checkpoints"
    save(folder, 1, keep=1)
    calls = 0
    while True:
        with Failing(calls, number) as failing:
            try:
                save(folder, 2, keep=1)
            except OSError:
                assert failing.failed
        newest, damaged = checkpoint.newest_valid(folder)
        assert damaged == [] and newest is not None
        assert checkpoint.load(newest)[1] == state(int(newest.name[-1]))
        if not failing.failed:
            break
        shutil.rmtree(folder)
        save(folder, 1, keep=1)
        calls += 1
    assert newest.name == "step-2" and [p.name for p in folder.iterdir()] == ["step-2"]
    assert {name for name, _ in failing.calls} == {"write", "fsync", "replace"} and calls > 8


def damage(how, path):
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if how == "torn":
        file.write_bytes(data[: len(data) // 2])
    elif how == "one bit":
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "missing":
        file.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text({"torn manifest": '{"state', "other manifest": "[]"}[how])


@pytest.mark.parametrize(
    "how", ["torn", "one bit", "missing", "no manifest", "torn manifest", "other manifest"]
)
def test_a_damaged_checkpoint_is_known_by_its_manifest(tmp_path, how):
    for step in (1, 2):
        save(tmp_path, step)
    damage(how, tmp_path / "step-2")
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-1", [tmp_path / "step-2"])
    # A damaged one never counts among those that are kept.
    damage(how, save(tmp_path, 9))
    save(tmp_path, 3, keep=1)
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step-3", [])


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    (tmp_path / ".step-1.tmp").mkdir()
    (tmp_path / ".step-0.old").mkdir()
    save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def test_checkpoints_never_unpickle(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    path = save(tmp_path, 1)
    for module, name in ((torch, "load"), (os, "system")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    checkpoint.load(path)
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
