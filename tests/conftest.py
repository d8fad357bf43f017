import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the textbook is the oracle
# Children import this checkout's code too, whichever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "code"), str(ROOT)])

from dataloaders.phantom import write_acdc, write_la, write_pancreas  # noqa: E402
from sdcl.runs.folder import start_logging  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for what a module's tests share: runs' checkpoints take gigabytes, so it goes with the module."""
    folder = tmp_path_factory.mktemp("scratch")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def acdc_phantom(tmp_path_factory):
    """A tiny ACDC: 4 training patients, 1 for validation, 1 for test; two slices a volume."""
    root = tmp_path_factory.mktemp("acdc")
    return write_acdc(root, patients=(4, 1, 1), size=(36, 40), slices=2)


@pytest.fixture(scope="session")
def la_phantom(tmp_path_factory):
    """A tiny LA: 4 training cases, 2 for test."""
    return write_la(tmp_path_factory.mktemp("la"), cases=(4, 2), size=(40, 36, 32))


@pytest.fixture(scope="session")
def pancreas_phantom(tmp_path_factory):
    """A tiny Pancreas: 4 training cases, 2 for test."""
    return write_pancreas(tmp_path_factory.mktemp("pancreas"), cases=(4, 2), size=(40, 40, 32))


@pytest.fixture
def said(capsys):
    """Return what was logged since the last call."""
    start_logging()
    return lambda: capsys.readouterr().out
