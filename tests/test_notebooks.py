"""The notebooks, run from top to bottom as a user would, in a copy of the repository with a small stage and tiny steps (SMOL_QUICK)."""

import os
import re
import shutil
from pathlib import Path

import pytest
from test_train import STAGE

import prepare

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def copy_of_the_repository(folder):
    """What git tracks of it, as far as commands need it, and a small demo stage."""
    for path in ROOT.glob("*.*"):
        if path.suffix in (".py", ".toml", ".txt", ".md", ".html"):
            shutil.copy(path, folder)
    for name in ("config", "notebooks", "smol", "bench"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    prepare.main(["demo", f"--data_dir={folder / 'data'}", *STAGE])
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_of_the_repository(tmp_path_factory.mktemp("copy"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(copy, name, monkeypatch):
    for k, v in {
        "SMOL_QUICK": "1",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(copy / ".ipython"),
        "JUPYTER_DATA_DIR": str(copy / ".jupyter"),
        "CUDA_VISIBLE_DEVICES": "",
    }.items():
        monkeypatch.setenv(k, v)
    notebook = nbformat.read(copy / "notebooks" / name, as_version=4)
    where = {"metadata": {"path": str(copy / "notebooks")}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    client.execute()  # raises where a cell does, a %%bash cell whose command fails among them
    if os.environ.get("KEEP_NOTEBOOKS"):  # to look at what they show
        nbformat.write(notebook, Path(os.environ["KEEP_NOTEBOOKS"]) / name)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in shown)
    text = "".join(output.get("text", "") for output in shown)
    assert pictures == {"00_env_smoke.ipynb": 0, "10_data_prep.ipynb": 1}.get(name, 2), (pictures, text[-2000:])
    if "train" in name or "kaggle" in name:
        assert (
            "stage 0 of" in text and len(re.findall("PASS   one (text|puzzle) batch by heart", text)) == 2
        ), text[-2000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_thin_and_committed_without_outputs(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert not re.search(r"^\s*(def|class) ", cell.source, re.M), (
                "logic belongs into the files that notebooks call"
            )
