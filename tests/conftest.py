"""What several test files share."""

import pytest
from filelock import FileLock

import prepare

STAGE = ["--val_every=3", "--limit_mb=1", "--num_proc=1"]  # a demo stage in seconds


@pytest.fixture(scope="session")
def data(tmp_path_factory, worker_id):
    """A data folder with a small demo stage, made once for all workers. Nobody writes into it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "demo_data"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no network is needed
        prepare.main(["demo", f"--data_dir={folder}", *STAGE])  # the second worker finds it there
    return folder
