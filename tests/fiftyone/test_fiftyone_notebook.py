"""The notebook of the guide runs from top to bottom."""

from __future__ import annotations

import pytest

from support.photographs import write_near_duplicates, write_photographs


def test_the_notebook_runs(fo, repository, tmp_path):
    pytest.importorskip("ipykernel", reason="pip install ipykernel nbclient nbformat")
    client = pytest.importorskip("nbclient", reason="pip install ipykernel nbclient nbformat")
    import nbformat

    originals = write_photographs(tmp_path / "photos", 30)
    write_near_duplicates(tmp_path / "photos", originals[:2])
    notebook = nbformat.read(repository / "docs" / "guides" / "fiftyone.ipynb", as_version=4)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "execute_result"
    ]
    assert results[-1] == "2", "the planted near duplicates are found and nothing else"
    assert not any(
        "outputs" in cell and cell["outputs"]
        for cell in nbformat.read(repository / "docs" / "guides" / "fiftyone.ipynb", as_version=4).cells
    ), "the notebook is stored without outputs"
