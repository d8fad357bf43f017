"""The switches of how a machine computes: TF32, bfloat16, compilation."""

import contextlib
import locale
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdcl.runs import devices, experiment
from sdcl.runs.folder import LOGGER

CPU = torch.device("cpu")


@pytest.fixture
def told(caplog, monkeypatch):
    """What the library's logger says; it does not pass its lines on to the root's."""
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


@pytest.fixture
def arithmetic():
    yield
    devices.set_arithmetic(deterministic=False)


def test_tf32_is_on_only_when_asked_for_and_never_in_the_losses(arithmetic):
    for precision, expected in (("tf32", True), ("bf16", False), ("fp32", False)):
        devices.set_arithmetic(deterministic=False, precision=precision)
        assert torch.backends.cudnn.allow_tf32 == expected
        assert not torch.backends.cuda.matmul.allow_tf32


def begin(told, monkeypatch, precision, has_bf16):
    monkeypatch.setattr(experiment, "computes_bf16", lambda device: has_bf16)
    monkeypatch.setattr(experiment, "check_common", lambda header: None)
    monkeypatch.setattr(experiment, "describe", lambda header: "")
    experiment.begin(SimpleNamespace(device="cpu", gpu=0, precision=precision, __doc__="x"))
    return "no bfloat16 arithmetic" in told.text


@pytest.mark.parametrize(("precision", "has_bf16", "is_told"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])  # fmt: skip # noqa: E501
def test_bf16_without_its_arithmetic_is_told(told, monkeypatch, arithmetic, precision, has_bf16, is_told):
    assert begin(told, monkeypatch, precision, has_bf16) == is_told


def test_without_a_compiler_the_run_goes_on(told, monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    network = nn.Linear(2, 2)
    devices.compile_networks([network], CPU)
    assert "NOTE: --compile finds no working compiler (no C++ compiler)" in told.text
    assert network(torch.ones(1, 2)).shape == (1, 2)


@pytest.fixture
def users_locale():
    """The compiler's output is read in it; some readers of scans leave "C"."""
    before = locale.setlocale(locale.LC_ALL)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "")
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("g++"), reason="no compiler")
def test_a_compiled_network_keeps_its_names_and_its_output(told, users_locale):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    names, x = list(network.state_dict()), torch.randn(3, 4)
    expected = network(x)
    devices.compile_networks([network], CPU)
    if "NOTE" in told.text:
        pytest.skip(told.text.strip())
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(x), expected)
