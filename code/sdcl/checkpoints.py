"""Checkpoints: written whole or not at all, read without executing anything, matched by name."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcl.errors import UserError

PREFIX = "module."  # what DataParallel puts before each name


@dataclass(frozen=True)
class LoadReport:
    """What load_weights did.

    Attributes:
        path: the file.
        loaded: names copied into the network.
        left_out: names in the file that no forward pass reads.
        iteration: of the training stage, where the file says so.
    """

    path: Path
    loaded: tuple[str, ...]
    left_out: tuple[str, ...]
    iteration: int | None = None

    def __str__(self) -> str:
        """Say in one line what was loaded and what was left out."""
        groups = sorted({name.split(".")[0] for name in self.left_out})
        rest = f"; left out {len(self.left_out)} that nothing reads ({', '.join(groups)})" if groups else ""
        return f"{self.path}: {len(self.loaded)} tensors loaded{rest}"


def save(payload: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that it appears only when complete; the one it replaces stays until then.

    Args:
        payload: tensors, numbers, text, and dicts, lists of them.
        path: the file.

    Raises:
        UserError: the disk refuses the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error}): free some space or choose another folder.") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with `weights_only`, which executes nothing from the file.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: train first, or give the path of a checkpoint.")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in many ways; all of them mean the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is not a checkpoint that can be read safely ({reason[:120]}): copy it again, or save it "
            "anew as a state dict of tensors."
        ) from error
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not a dict of tensors: save a state dict.")
    return payload


def load_weights(network: nn.Module, path: Path | str, role: str | None = None) -> LoadReport:
    """Copy a checkpoint's weights into a network: ours, a bare state dict, or `{'net': …, 'opt': …, 'epoch': …}`.

    Args:
        network: from build_network; changed only if everything fits.
        path: the checkpoint.
        role: which network of our own checkpoints: "student_a", "student_b" or "teacher"; None takes the only one
            that fits by name.

    Returns:
        What was loaded and what was left out.

    Raises:
        UserError: the file cannot be read, or a name or shape does not fit; the message names it.

    Source: docs/method.md, "Networks", last paragraph.
    """
    path = Path(path)
    payload = load(path)
    state = _find_state(payload, network, path, role)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    wanted = network.state_dict()
    unused = getattr(network, "unused_names", None)  # only some networks' published files hold such
    left_out = tuple(name for name in state if name not in wanted and unused and unused.fullmatch(name))
    _check_names(state, wanted, left_out, path, type(network).__name__)
    network.load_state_dict({name: state[name] for name in wanted})
    iteration = payload.get("iteration")
    return LoadReport(path, tuple(wanted), left_out, iteration if isinstance(iteration, int) else None)


def _find_state(payload: dict[str, Any], network: nn.Module, path: Path, role: str | None) -> dict[str, Any]:
    """Return the state dict inside a checkpoint's container."""
    if "networks" in payload:
        states = payload["networks"]
        if role is None:
            fitting = [r for r in states if r != "teacher" and states[r].keys() == network.state_dict().keys()]
            if len(fitting) != 1:
                raise UserError(
                    f"{path} holds {', '.join(states)}, of which {len(fitting)} fit a {type(network).__name__}: "
                    "say which one to load."
                )
            role = fitting[0]
        if role not in states:
            raise UserError(f"{path} holds no {role}, only {', '.join(states)}: choose one of these.")
        return states[role]
    state = payload.get("net", payload)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is neither a state dict nor a container with 'net' or 'networks': save one of these.")
    return state


def _check_names(
    state: dict[str, Any], wanted: dict[str, Any], left_out: tuple[str, ...], path: Path, kind: str
) -> None:
    """Refuse a state dict with missing or foreign names, or other shapes."""
    missing = [name for name in wanted if name not in state]
    foreign = [name for name in state if name not in wanted and name not in left_out]
    misshapen = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    for names, problem in ((missing, "lacks"), (foreign, "has the unknown"), (misshapen, "has another shape for")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            detail = ""
            if names is misshapen:
                detail = f" ({tuple(state[names[0]].shape)} where {tuple(wanted[names[0]].shape)} is needed)"
            raise UserError(
                f"{path} does not fit a {kind}: it {problem} {', '.join(names[:3])}{more}{detail}; "
                "choose the checkpoint of this network and number of classes."
            )
