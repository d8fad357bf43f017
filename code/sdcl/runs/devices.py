"""Where a run computes and how exactly: the device, its arithmetic, compilation, memory."""

import ctypes
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from sdcl import ranks
from sdcl.runs.config import env_text
from sdcl.runs.distribution import places
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of mallopt's parameters, from malloc.h


def likely_device_type(device: str) -> str:
    """Return the type of device that `--device` means here, before it is looked at; refuses nothing."""
    if device not in ("auto", "cuda"):
        return device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # select_device() tells of them
        return "cuda" if torch.cuda.is_available() else "cpu"


def select_device(device: str, gpu: int) -> torch.device:
    """Return the device of `--device auto|cpu|cuda|mps|xpu` and `--gpu`; of "auto" a CUDA GPU, else the CPU.

    Where several processes share a run, each takes the GPU that comes so many places after --gpu on its machine. On
    Apple's and Intel's GPUs ("mps", "xpu") nothing has been tried.

    Raises:
        UserError: the device that was asked for is not there, or has no such GPU.
    """
    if device in ("mps", "xpu"):
        if not getattr(torch, device).is_available():
            raise UserError(f"--device {device} was asked for but PyTorch sees none: use --device cpu, or auto.")
        LOGGER.info("NOTE: --device %s was never tried with this code: compare its first losses to a CPU's.", device)
        return torch.device(device)
    if device == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as said:  # a driver that is missing or too old is told in a warning
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    reason = f" ({str(said[0].message).split(' (Triggered')[0].splitlines()[0]})" if said else ""
    if not is_there:
        if device == "cuda":
            raise UserError(f"--device cuda was asked for but PyTorch sees no CUDA GPU{reason}: use --device cpu.")
        if reason:
            LOGGER.info("NOTE: --device auto finds no GPU that PyTorch can use%s: the CPU computes.", reason)
        return torch.device("cpu")
    number = gpu + places()[2]
    if not env_text("RANK") and torch.cuda.device_count() == 1:
        number = gpu  # srun has given each task a GPU of its own
    if number >= torch.cuda.device_count():
        what = f"--gpu is {gpu}" if number == gpu else f"process {number - gpu} of this machine asks for GPU {number}"
        raise UserError(f"{what} but there are only {torch.cuda.device_count()} GPUs: count from 0.")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def set_arithmetic(deterministic: bool, precision: str = "fp32") -> None:
    """Make float32 mean float32 on a GPU, and with `deterministic` each run give the same bits.

    Without it cuDNN picks the fastest kernels. "tf32" rounds the factors of convolutions to TF32; those of matrix
    products, such as the losses' sums, stay in float32.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call itself imports for 2 seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def computes_bf16(device: torch.device) -> bool:
    """Tell whether a device has arithmetic for bfloat16; a CPU without it is some hundred times slower in it."""
    if device.type == "cuda":  # is_bf16_supported() is true of GPUs that emulate it too
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return True
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every version of PyTorch
    return is_supported is None or bool(is_supported())


def cost_of_bf16(side: int = 512) -> float:
    """Return how many times fp32's seconds a product of matrices takes in bf16 on the CPU, as measured now.

    A processor may have the instructions and yet be slower with them: Intel's with AVX-512, where AMX is missing.
    """
    threads = torch.get_num_threads()
    matrices = [torch.ones(side, side, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = [math.inf, math.inf]
    torch.set_num_threads(1)  # several wait for each other where cores are busy
    try:
        for i in [0, 1] * 8:  # in turn: the first two make the kernels, some are interrupted
            begin = time.perf_counter()
            matrices[i] @ matrices[i]
            seconds[i] = min(seconds[i], time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return seconds[1] / seconds[0]


def fastest_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision in which a device multiplies matrices faster."""
    is_faster = computes_bf16(device) and (device.type != "cpu" or cost_of_bf16() < 1)
    return "bf16" if is_faster else "fp32"


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in the memory layout that its convolutions are fastest in there."""
    is_2d = any(isinstance(module, nn.Conv2d) for module in network.modules())
    # Convolutions want channels last: without it each one reorders its input. Norms and pooling of 2D networks follow;
    # InstanceNorm would copy to channels first, so 3D networks are left alone.
    if is_2d and device.type == "cuda" and ranks.count() > 1:  # statistics of the whole batch; on a CPU ours know how
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(device, memory_format=torch.channels_last if is_2d else torch.preserve_format)


def records_passes(settings: Any, device: torch.device) -> bool:
    """Tell whether a run's training passes become CUDA graphs, by its header; several processes talk within theirs."""
    return settings.cuda_graphs and not settings.compile and device.type == "cuda" and ranks.count() == 1


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Let torch.compile fuse what networks do, under their parameters' own names; say so where it does not work.

    Args:
        networks: changed in place; each is compiled when it is first called, which takes a minute or so.
        device: that they are on.
    """
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        LOGGER.info("NOTE: --compile finds no working compiler (%s): the run goes on without it.", reason)
        return
    for network in networks:
        network.compile()


def give_back_freed_memory() -> None:
    """Return to the system what keep_freed_memory() holds, after work that needed more than what follows (glibc)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next iteration instead of returning each to the system.

    On a CPU a step allocates gigabytes in blocks so large that glibc maps each anew and the system zeroes its pages: a
    quarter of the time of a 3D step, and a third of preparing batches, for a GPU too. Elsewhere than on glibc nothing
    happens.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)  # -1: never
