"""The notebooks: one that trains and Kaggle's run from top to bottom; all are thin."""

import ast
import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def copy_of_the_repository(folder, data):
    """What commands need of it, with a small demo stage."""
    for path in ROOT.glob("*.*"):
        if path.suffix in (".py", ".toml", ".txt", ".md"):
            shutil.copy(path, folder)
    for name in ("config", "notebooks", "smol", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(data, folder / "data")
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory, data):
    return copy_of_the_repository(tmp_path_factory.mktemp("copy"), data)


@pytest.mark.parametrize("name", ["30_route_b_train.ipynb", "kaggle_t4x2.ipynb"])
def test_a_notebook_runs_from_top_to_bottom(copy, name, monkeypatch):
    variables = {"SMOL_QUICK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"IPYTHONDIR": str(copy / ".ipython"), "JUPYTER_DATA_DIR": str(copy / ".jupyter")}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(copy / "notebooks" / name, as_version=4)
    where = {"metadata": {"path": str(copy / "notebooks")}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    client.execute()  # raises where a cell does, a %%bash cell whose command fails among them
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2, text[-2000:]
    passed = re.findall("PASS   overfit one (?:text|puzzle) batch", text)
    assert "stage 0 of" in text and len(passed) == 2, text[-2000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_thin_and_committed_without_outputs(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == [] and cell.execution_count is None
        if not cell.source.startswith("%%bash"):
            assert not any(
                isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(ast.parse(cell.source))
            )
        for script in re.findall(r"(?:python|\$RUN|torchrun \S+ \S+) (\w+)\.py", cell.source):
            assert (ROOT / f"{script}.py").exists(), f"{name} calls {script}.py"
