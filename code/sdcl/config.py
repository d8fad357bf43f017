"""From a script's header to a checked configuration: command line, device, common refusals."""

import ctypes
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch import nn

from sdcl.errors import UserError
from sdcl.mixing import box_size
from sdcl.runs import LOGGER

Config = TypeVar("Config")
POSITIVE_FIELDS = (
    "labelnum", "batch_size", "window_batch", "base_lr", "log_every", "save_every", "labelled_repeat",
    "unlabelled_repeat", "late_val_every",
)  # fmt: skip
NON_NEGATIVE_FIELDS = (
    "pre_iterations", "self_iterations", "u_weight", "mse_weight", "kl_weight", "seed", "gpu", "cache_gb", "val_cases",
    "pre_val_from", "pre_val_every", "self_val_every", "late_val_from", "max_angle_deg",
    "save_minutes",
)  # fmt: skip
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of mallopt's parameters, from malloc.h
SIDE_DIVISOR = 16  # every network halves its input four times


def run_script(main: Callable[[Any], None], config_class: type) -> None:
    """Parse the command line into the header's dataclass and call main; a UserError ends in one sentence.

    Args:
        main: the script's main, called with an instance of config_class.
        config_class: the header; its docstring describes the script on the command line's help page.
    """
    try:
        main(parse(config_class, sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: lower --batch_size, --patch_size or, in 3D, --window_batch.")
    except RuntimeError as error:
        if "deterministic" not in str(error) or "use_deterministic_algorithms" not in str(error):
            raise
        sys.exit(f"error: --deterministic: {str(error).split(', but')[0].strip()}: run without it, or on --device cpu.")
    except OSError as error:
        sys.exit(f"error: {error}: check that path, its permissions and the space on its disk.")
    except KeyboardInterrupt:
        sys.exit(130)


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """Build the header's dataclass from command-line arguments; `--field value` overrides a default.

    Raises:
        UserError: a flag that the header does not have.
    """
    config, unknown = tyro.cli(config_class, args=arguments, return_unknown_args=True, use_underscores=True)
    if unknown:
        flags = [f"--{field.name}" for field in dataclasses.fields(config_class)]
        close = difflib.get_close_matches(unknown[0].replace("-", "_").replace("__", "--", 1), flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help for the flags there are."
        raise UserError(f"unknown argument {unknown[0]}: {hint}")
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Return the header's fields as plain values (paths as text, tuples as lists), ready for JSON and checkpoints."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def describe(config: Any) -> str:
    """Return the resolved configuration, one field a line."""
    values = as_dict(config)
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def check_common(config: Any) -> None:
    """Refuse values that no data set can train with.

    Raises:
        UserError: names the flag and what it must be.
    """
    for name in POSITIVE_FIELDS:
        if hasattr(config, name) and not getattr(config, name) > 0:
            raise UserError(f"--{name} is {getattr(config, name)}: it must be above 0.")
    for name in NON_NEGATIVE_FIELDS:
        if hasattr(config, name) and not getattr(config, name) >= 0:
            raise UserError(f"--{name} is {getattr(config, name)}: it must not be negative.")
    if hasattr(config, "ema_decay") and not 0 <= config.ema_decay <= 1:
        raise UserError(f"--ema_decay is {config.ema_decay}: it must lie in [0, 1].")
    if hasattr(config, "augment_probability") and not 0 <= config.augment_probability <= 1:
        raise UserError(f"--augment_probability is {config.augment_probability}: it must lie in [0, 1].")
    if getattr(config, "spacing", None) and not all(math.isfinite(side) and side > 0 for side in config.spacing):
        raise UserError(f"--spacing is {' '.join(map(str, config.spacing))}: every side must be above 0 mm.")
    if not hasattr(config, "patch_size"):
        return
    if any(side <= 0 or side % SIDE_DIVISOR for side in config.patch_size):
        raise UserError(
            f"--patch_size is {' '.join(map(str, config.patch_size))}: every side must be a multiple of "
            f"{SIDE_DIVISOR}, since the networks halve it four times."
        )
    if math.prod(config.patch_size) == SIDE_DIVISOR ** len(config.patch_size):
        raise UserError("--patch_size leaves a single voxel at the networks' bottom, which no normalisation can use.")
    if hasattr(config, "mask_fraction"):
        try:
            box_size(config.patch_size, config.mask_fraction)
        except ValueError as error:
            raise UserError(f"--mask_fraction is {config.mask_fraction}: {error}.") from None


def select_device(device: str, gpu: int) -> torch.device:
    """Return the device of `--device auto|cpu|cuda` and `--gpu`.

    Raises:
        UserError: CUDA was asked for and is not there, or has no such GPU.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but PyTorch sees no CUDA GPU: use --device cpu, or auto.")
    if gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu is {gpu} but there are only {torch.cuda.device_count()} GPUs: count from 0.")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


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
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every version of PyTorch
    return is_supported is None or bool(is_supported())


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


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks for the next iteration instead of returning each to the system.

    On a CPU a step allocates gigabytes in blocks so large that glibc maps each anew and the system zeroes its pages: a
    quarter of the time of a 3D step. Elsewhere than on glibc nothing happens.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)  # -1: never
