"""The notebooks run from top to bottom in a kernel, and show what they say they show."""

import os
from pathlib import Path

import pytest
from project import ROOT

pytest.importorskip("nbclient", reason="nbclient is in the dev extra")
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def executed(path: Path, folder: Path):
    """The notebook after all its cells ran in `folder`."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    if kept := os.environ.get("TWIG_KEEP_NOTEBOOKS"):  # to look at
        nbformat.write(notebook, Path(kept) / path.name)
    return notebook


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["own_reward.ipynb", "quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_without_outputs(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads beside another worker wait for each other
    notebook = executed(path, tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    (live,) = [page for page in pages if "finished, " in page and "after: " in page]
    assert "<svg" in live and "<table" in live
    (result,) = [page for page in pages if "answer before" in page]
    assert "became right" in result and "<svg" in result
    assert len([page for page in pages if "<svg" in page]) == 3
    assert any("dataframe" in page for page in pages)
