"""The real code on tensors of a GPU that is not there: what waits for the host, mixes devices or copies is seen.

PyTorch's fake tensors have shapes, strides, types and a device, and no numbers. Networks, steps, losses, the EMA,
halting, prediction and validation run on them as on `cuda:0`, in a process of its own whose PyTorch takes a stub
(fake_gpu/device.cpp) for a GPU's driver. What this cannot see: numbers, races between streams, whether a kernel exists,
time, memory, the threads that clean pseudo-labels, and pinned memory. tests/test_cuda.py asks a real GPU.
"""

import json

import pytest
from launches import COUNTING, build_device, count, lacking, run_python

LAUNCHES = {  # at most so many kernels and so many whole copies of tensors a pass or step; a few more than counted
    "vnet fp32 train forward": (148, 0), "vnet fp32 train backward": (155, 0), "vnet bf16 train forward": (210, 0),
    "resvnet fp32 train forward": (246, 4), "resvnet fp32 train backward": (268, 0),
    "unet fp32 train forward": (98, 0), "unet fp32 train backward": (82, 0), "unet bf16 train forward": (154, 0),
    "resunet fp32 train forward": (215, 0), "resunet fp32 train backward": (172, 0),
    "sdcl 3D fp32 pre_train": (975, 12), "sdcl 3D fp32 self_train": (2115, 18), "sdcl 3D bf16 self_train": (2765, 18),
    "sdcl 2D fp32 pre_train": (720, 2), "sdcl 2D fp32 self_train": (1520, 4), "sdcl 2D bf16 self_train": (2160, 4),
    "bcp 3D fp32 self_train": (1058, 8), "cps 3D fp32 self_train": (3600, 32), "ua_mt 3D fp32 self_train": (4180, 12),
    "mean_teacher 3D fp32 self_train": (1705, 12), "supervised 3D fp32 self_train": (388, 5),
    "muon 3D fp32 self_train": (2960, 18), "muon 2D fp32 self_train": (2520, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def device(scratch):
    """The stub, built."""
    if missing := lacking():
        pytest.skip(missing)
    return build_device(scratch)


@pytest.fixture(scope="module")
def counted(device):
    return count(device)


@pytest.mark.parametrize("what", LAUNCHES)
def test_launches_and_copies_are_bounded(what, counted):
    kernels = counted[what]
    copies = kernels.get("copy_", 0) + kernels.get("clone", 0)
    launches, most_copies = LAUNCHES[what]
    assert sum(kernels.values()) <= launches and copies <= most_copies, kernels


def test_predictions_are_copied_in_blocks(counted):
    """9 slices, 4 at a time, of two networks; a volume of one block, and its windows' weights."""
    assert counted["slice_wise"] == {"uploads": 3, "downloads": 6}
    assert counted["sliding_window"] == {"uploads": 3, "downloads": 4}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("item", "DataDependentOutputException: aten._local_scalar_dense"),  # a value that the host reads
        ("cpu", "aten._to_copy.default: cuda:0 to cpu"),
        ("mixed", "Expected all tensors to be on the same device"),
        ("strides", "convolution of (2, 16, 112, 112, 80) with strides"),  # a memory format that is changed back
    ],
)
def test_a_planted_fault_is_seen(fault, message, device):
    done = run_python(COUNTING / "checks.py", device, fault)
    assert done.returncode == 1 and message in done.stderr


def test_a_view_that_is_changed_in_place_is_seen(device):
    """Its backward pass copies: far more than the bound."""
    done = run_python(COUNTING / "checks.py", device, "view")
    kernels = json.loads(done.stdout.splitlines()[-1])["sdcl 3D fp32 pre_train"]
    assert kernels["copy_"] + kernels["clone"] > 5 * LAUNCHES["sdcl 3D fp32 pre_train"][1]
