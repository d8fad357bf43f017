"""The switches of how a machine computes: TF32, bfloat16, compilation."""

import contextlib
import locale
import logging
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdcl.runs import devices, experiment
from sdcl.runs.errors import UserError
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


def test_a_gpu_that_cannot_be_used_is_told_of(monkeypatch, told):
    def too_old():
        warnings.warn("The NVIDIA driver on your system is too old (9). (Triggered internally at x)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert devices.select_device("auto", 0) == torch.device("cpu")
    assert "--device auto finds no GPU that PyTorch can use (The NVIDIA driver on your system is too old" in told.text
    with pytest.raises(UserError, match="--device cuda was asked for but .* is too old"):
        devices.select_device("cuda", 0)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_untried_and_say_so(device, monkeypatch, told):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {device} was asked for but PyTorch sees none"):
        devices.select_device(device, 0)
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: True)
    assert devices.select_device(device, 0).type == device
    assert f"--device {device} was never tried" in told.text


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert devices.select_device("auto", 1) == torch.device("cuda", 2) and taken == [2]
    with pytest.raises(UserError, match="process 1 of this machine asks for GPU 3 but there are only 3"):
        devices.select_device("cuda", 2)


@pytest.mark.parametrize(("capability", "has_bf16"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_emulates_bfloat16_does_not_have_it(capability, has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.computes_bf16(torch.device("cuda")) == has_bf16
