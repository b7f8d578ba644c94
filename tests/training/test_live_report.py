"""A run's report while it trains, and after it failed."""

import json
from pathlib import Path

import pytest
from small_runs import Heard, at

from twig.common.errors import UserError
from twig.report.page import NAME
from twig.runs.listing import list_runs
from twig.training import session


def data_of(folder: Path) -> dict:
    text = (folder / NAME).read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_the_report_is_there_while_a_run_trains_and_loads_itself_again(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(session, "_REPORT_SHARE", 1e9)
    seen = []
    heard = Heard(step=lambda step: seen.append((step, (tmp_path / "run" / NAME).exists())))
    trained = run("run", progress=heard)
    assert seen[0] == (1, False) and all(there for step, there in seen if step > 1)
    assert data_of(trained.folder)["live"] == 0, "that of a finished run is left alone"


def test_a_report_that_takes_long_is_written_seldom(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session, "REPORT_SECONDS", 0.0)
    written: list[str] = []
    monkeypatch.setattr(session, "report_of_run", lambda folder, tell, end=None: written.append(end.state))
    monkeypatch.setattr(session, "_REPORT_SHARE", 1e-9)  # the first one takes all the time there is
    run("run")
    assert written == ["running", "finished"]


@pytest.mark.parametrize("error", [UserError("task", "the file is gone", "Put it back"), OSError("no disk")])
def test_a_run_that_fails_leaves_a_report_with_the_reason(error, run, tmp_path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run("run", progress=Heard(step=at(3, fail)))
    page = (tmp_path / "run" / NAME).read_text(encoding="utf-8")
    assert "step 3 of 6" in page and ("the file is gone" in page or "no disk" in page)
    assert "from step 2:" in page and data_of(tmp_path / "run")["live"] == 0
    (listed,) = list_runs(tmp_path / "run")
    assert listed.state == "failed"
    if isinstance(error, UserError):
        assert "the file is gone" in (listed.reason or "")


def test_a_run_that_fails_before_its_first_step_leaves_nothing(run, tmp_path) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("task", "the file is gone")

    with pytest.raises(UserError):
        run("run", progress=Heard(evaluation=fail))
    assert not (tmp_path / "run" / NAME).exists()
