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


def begin(told, monkeypatch, precision, has_bf16, cost=0.5):
    monkeypatch.setattr(experiment, "computes_bf16", lambda device: has_bf16)
    monkeypatch.setattr(experiment, "cost_of_bf16", lambda: cost)
    monkeypatch.setattr(experiment, "check_common", lambda header: None)
    monkeypatch.setattr(experiment, "describe", lambda header: "")
    experiment.begin(SimpleNamespace(device="cpu", gpu=0, precision=precision, __doc__="x"))
    return [said for said in ("no bfloat16 arithmetic", "1.9 times fp32's time in bf16") if said in told.text]


@pytest.mark.parametrize(
    ("precision", "has_bf16", "cost", "said"),
    [
        ("bf16", False, 5.0, ["no bfloat16 arithmetic"]), ("bf16", True, 0.3, []), ("bf16", True, 1.1, []),
        ("bf16", True, 1.9, ["1.9 times fp32's time in bf16"]), ("fp32", False, 5.0, []), ("fp32", True, 1.9, []),
    ],
)  # fmt: skip
def test_bf16_without_its_arithmetic_or_slower_than_fp32_is_told(
    told, monkeypatch, arithmetic, precision, has_bf16, cost, said
):
    assert begin(told, monkeypatch, precision, has_bf16, cost) == said


@pytest.mark.parametrize(
    ("device", "has_bf16", "cost", "expected"),
    [("cpu", True, 0.5, "bf16"), ("cpu", True, 1.9, "fp32"), ("cpu", False, 0.5, "fp32"), ("cuda", True, 1.9, "bf16")],
)
def test_the_fastest_precision_is_the_faster_one_of_what_there_is(monkeypatch, device, has_bf16, cost, expected):
    monkeypatch.setattr(devices, "computes_bf16", lambda device: has_bf16)
    monkeypatch.setattr(devices, "cost_of_bf16", lambda: cost)
    assert devices.fastest_precision(torch.device(device)) == expected


def test_the_cost_of_bf16_is_a_ratio_of_seconds(monkeypatch):
    """A clock that a product moves by 1 s, and by 2 s in bf16; one of each is interrupted."""
    clock, products = [0.0], []

    def multiply(first, second):
        products.append(first.dtype)
        late = 7.0 * (products.count(first.dtype) == 3)
        clock[0] += late + {torch.float32: 1.0, torch.bfloat16: 2.0}[first.dtype]
        assert torch.get_num_threads() == 1
        return first

    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert devices.cost_of_bf16(4) == 2.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


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
