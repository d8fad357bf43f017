"""Run in a process of its own by ../test_fake_gpu.py: the real code on fake tensors of a GPU that is not there.

`python checks.py <device.so> [fault]` prints what it counted as JSON, or fails. A fault is planted to see that it does.
"""

import ctypes
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path


def load_device(library):
    """Load the fake device before torch is imported, which looks for devices only once."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


load_device(sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import method  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from sdcl import inference, steps  # noqa: E402
from sdcl.methods import get  # noqa: E402
from sdcl.mixing import box_size, copy_paste_mask  # noqa: E402
from sdcl.networks import build_network  # noqa: E402
from sdcl.networks.layers import InstanceNorm  # noqa: E402
from sdcl.pseudo_labels import decide  # noqa: E402
from sdcl.scoring.evaluation import PREDICTORS, Case, Decision, Predictors, Task  # noqa: E402
from sdcl.scoring.report import validator  # noqa: E402

GPU = torch.device("cuda", 0)
SHAPES = {2: (256, 256), 3: (112, 112, 80)}
PAIRS = {2: ("unet", "resunet"), 3: ("vnet", "resvnet")}
MOVES = {"aten._to_copy.default", "aten.copy_.default"}
SMALL = 2**16  # elements; copies of more are counted apart
NOT_LAUNCHED = frozenset(
    "detach view _unsafe_view t transpose permute select slice expand alias unbind split split_with_sizes as_strided "
    "unsqueeze squeeze diagonal unfold empty empty_like empty_strided new_empty new_empty_strided lift_fresh device "
    "promote_types _record_function_enter_new _record_function_exit is_same_size".split()
)


class Watch(TorchDispatchMode):
    """Counts the kernels that would be launched; fails where tensors change device or a convolution gets its input in a
    memory format that it would have to change.
    """

    def __init__(self, may_upload=False):
        super().__init__()
        self.kernels, self.uploads, self.may_upload = Counter(), 0, may_upload

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in NOT_LAUNCHED:
            is_small = name in ("copy_", "clone") and result.numel() < SMALL
            self.kernels[f"small {name}" if is_small else name] += 1
        if str(func) in MOVES:
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                assert self.may_upload and source.device.type == "cpu", f"{func}: {source.device} to {result.device}"
                self.uploads += 1
        if name in ("convolution", "convolution_backward"):
            x = args[1] if name == "convolution_backward" else args[0]
            wanted = torch.channels_last if x.ndim == 4 else torch.contiguous_format
            assert x.is_contiguous(memory_format=wanted), f"{name} of {tuple(x.shape)} with strides {x.stride()}"
        return result


class Decided:
    """In the place of PendingLabels: the host's part, which cleans real labels, is left out."""

    def __init__(self, logits, rule, connectivity):
        self.labels = decide(torch.softmax(logits.detach().float(), 1), rule)

    def result(self):
        return self.labels


def network_of(name):
    with GPU:
        network = build_network(name, 3)
    if "unet" in name:  # what place() makes of them, strides of single channels included; fake ones cannot be swapped
        for parameter in (p for p in network.parameters() if p.ndim == 4):
            parameter.data = torch.empty_like(parameter, memory_format=torch.channels_last)
    return network


def check_networks(found):
    for name in (*PAIRS[2], *PAIRS[3]):
        shape = SHAPES[3 if "vnet" in name else 2]
        for precision in ("fp32", "bf16"):
            network = network_of(name)
            x = torch.randn(2, 1, *shape, device=GPU)
            for mode in ("eval", "train"):
                network.train(mode == "train")
                with Watch() as watch, steps.autocast(GPU, precision):
                    logits = network(x)
                assert logits.device == GPU and logits.shape == (2, 3, *shape)
                assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
                found[f"{name} {precision} {mode} forward"] = watch.kernels
            with Watch() as watch:
                logits.float().sum().backward()
            found[f"{name} {precision} train backward"] = watch.kernels


def check_steps(found, is_short=False):
    steps.PendingLabels = Decided
    torch.randint = lambda high, *_, **__: high // 2  # the mask's corner, which the host draws
    kinds = ((3, "fp32"),) if is_short else ((3, "fp32"), (3, "bf16"), (2, "fp32"), (2, "bf16"))
    for dimensions, precision in kinds:
        shape = SHAPES[dimensions]
        others = () if precision == "bf16" or is_short else ("bcp", "cps", "mean_teacher", "ua_mt", "supervised")
        for what in ("sdcl", *others, *["muon"] * bool(others)):
            name, optimiser = ("sdcl", "muon") if what == "muon" else (what, "adam")
            learners = steps.make_learners(*map(network_of, PAIRS[dimensions]), 1e-3, optimiser=optimiser)
            settings = method(method=name, precision=precision, dice="batch" if dimensions == 2 else "sample")
            batch = {k: torch.randn(2, 1, *shape, device=GPU) for k in ("x_a", "x_b", "u_a", "u_b")}
            batch |= {k: torch.zeros(2, *shape, dtype=torch.uint8, device=GPU) for k in ("y_a", "y_b")}
            for stage in ("pre_train", "self_train")[name != "sdcl" :]:  # stage 1 is the same for all
                if stage == "self_train":
                    learners.keep(get(name).students)
                    if get(name).has_teacher:
                        steps.add_teacher(learners)
                do = steps.pretrain_step if stage == "pre_train" else get(name).self_train_step
                for _ in range(2):  # the first step of a stage makes the optimiser's state
                    with Watch() as watch:
                        mask = copy_paste_mask(shape, box_size(shape, 2 / 3), device=GPU)
                        losses = do(learners, batch, mask, settings)
                assert all(value.device == GPU and value.shape == () for value in losses.values())
                found[f"{what} {dimensions}D {precision} {stage}"] = watch.kernels


def check_inference(found, mode):
    downloads = Counter()

    def cpu(tensor):
        """What the host would get: zeros."""
        if not isinstance(tensor, FakeTensor) or tensor.device.type == "cpu":
            return tensor
        downloads["copies"] += 1
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def numpy(tensor):
        assert tensor.device.type == "cpu"
        return plain(tensor) if not isinstance(tensor, FakeTensor) else np.ones(tensor.shape, np.float32)

    plain = torch.Tensor.numpy
    torch.Tensor.cpu, torch.Tensor.numpy = cpu, numpy
    for name, arguments in (
        ("slice_wise", ((256, 256), 3, 4)),
        ("sliding_window", ((112, 112, 80), (56, 56, 40), 3, 2)),
    ):
        is_2d = name == "slice_wise"
        networks = [network_of(network) for network in PAIRS[2 if is_2d else 3]]
        volume = np.zeros((9, 40, 50) if is_2d else (130, 120, 100), np.float32)
        downloads.clear()
        mode.allow_non_fake_inputs = True  # volumes are real arrays
        with Watch(may_upload=True) as watch:
            maps = getattr(inference, name)(networks, volume, *arguments)
        assert [m.shape for m in maps] == [(3, *volume.shape)] * 2
        found[name] = {"uploads": watch.uploads, "downloads": downloads["copies"]}
        infer = lambda nets, image, given=arguments: inference.slice_slabs(nets, image, *given)  # noqa: E731
        if not is_2d:
            how = inference.Windows(*arguments)
            infer = lambda nets, image, how=how: inference.window_slabs(nets, image, how)  # noqa: E731
        task = Task("t", ("x", "y"), infer, Decision("argmax"))
        predictors = Predictors.of(dict(zip(("student_a", "student_b"), networks, strict=True)), PREDICTORS)
        with Watch(may_upload=True):
            scores = validator([Case("c", volume, np.zeros(volume.shape, np.uint8))], task)(predictors)
        mode.allow_non_fake_inputs = False
        assert set(scores.dice) == set(PREDICTORS)


def plant(fault):
    """Make one of the mistakes that these checks are for."""
    losses, forward = steps.mixed_losses, InstanceNorm.forward

    def with_item(logits, *given, **named):
        found = losses(logits, *given, **named)
        found["dice"].sum().item()
        return found

    def with_cpu(logits, *given, **named):
        found = losses(logits, *given, **named)
        return found | {"dice": found["dice"] * found["dice"].detach().to("cpu").to(GPU)}

    def with_mixed(logits, image_label, patch_label, mask, **named):
        return losses(
            logits, image_label, patch_label, None if mask is None else torch.ones(mask.shape).bool(), **named
        )

    def with_view(self, x):
        return F.instance_norm(x, eps=self.eps)

    def with_strides(self, x):
        return forward(self, x).contiguous(memory_format=torch.channels_last_3d)

    chosen = {"item": with_item, "cpu": with_cpu, "mixed": with_mixed, "view": with_view, "strides": with_strides}[
        fault
    ]
    if fault in ("view", "strides"):
        InstanceNorm.forward = chosen
    else:
        steps.mixed_losses = chosen


def know_shapes():
    """Tell what SyncBatchNorm's kernels return, which PyTorch does not tell without a GPU."""
    library = torch.library.Library("aten", "IMPL")
    for name, returned in {
        "batch_norm_stats": lambda x, eps: (x.new_empty(x.shape[1], dtype=torch.float32),) * 2,
        "batch_norm_gather_stats_with_counts": lambda x, mean, *_: (mean.new_empty(mean.shape[1]),) * 2,
        "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
        "batch_norm_backward_reduce": lambda grad, x, mean, *_: (
            (torch.empty_like(mean),) * 2 + (mean.new_empty(0),) * 2
        ),
        "batch_norm_backward_elemt": lambda grad, *_: torch.empty_like(grad),
    }.items():
        library.impl(name, returned, "Meta")
    return library


def main():
    shapes = know_shapes()  # as long as it lives  # noqa: F841
    if len(sys.argv) > 2:
        plant(sys.argv[2])
    FakeTensorMode.__deepcopy__ = lambda mode, _: mode  # of a network that is copied
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # autocast asks
    torch.cuda.is_bf16_supported = lambda: True
    found = {}
    with FakeTensorMode() as mode:
        if len(sys.argv) > 2:
            check_steps(found, is_short=True)
        else:
            check_networks(found)
            check_steps(found)
            check_inference(found, mode)
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine's thread for the device knows no end
