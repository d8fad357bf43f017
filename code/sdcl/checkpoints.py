"""Checkpoints: written whole or not at all, read without executing anything, matched by name."""

import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcl.runs.archive import DamagedError, check_archive, check_payload
from sdcl.runs.atomic import flush_file, replacing
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import check_replaceable, record

LAST, PREVIOUS = "last.pth", "last_previous.pth"  # a stage's two latest checkpoints
PREFIX = re.compile(r"((module|_orig_mod)\.)+")  # what DataParallel and torch.compile put before each name
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of a parameter
AVERAGE = "_average"  # behind a student's role: the average of its weights
CONTAINERS = ("net", "state_dict", "model_state_dict", "model")  # keys under which files hold one network's weights


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


@dataclass(frozen=True)
class LastCheckpoint:
    """A stage's last checkpoint that can be read.

    Attributes:
        payload: what save() was given.
        path: the file that it was read from.
        damaged: what was wrong with later ones, a sentence; "" where this is the last.
    """

    payload: dict[str, Any]
    path: Path
    damaged: str = ""


def save(payload: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint so that it appears only when it is complete and has been read back.

    Args:
        payload: tensors, numbers, text, and dicts, lists of them.
        path: the file; the one that it replaces stays until then.
        previous: where to keep the one that it replaces; at any instant one of the two is there and whole.

    Raises:
        UserError: the disk refuses the file.
    """
    try:
        with replacing(path, any_content=True) as temporary:
            with open(temporary, "wb") as file:
                torch.save(payload, file)
            check_archive(temporary)
            if previous is not None and path.exists():
                flush_file(temporary)
                check_replaceable(previous)
                record(previous)
                os.replace(path, previous)
    except (OSError, RuntimeError, DamagedError) as error:
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None  # a second signal: stop at once
        if "DataLoader worker" in f"{error} {error.__context__}":
            raise  # of a process that prepares batches, not of the disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # PyTorch hides the disk's own
        free_mib = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        raise UserError(
            f"{path} cannot be written ({cause}; {free_mib:.0f} MiB are free there): free some space or choose another "
            "folder, and give the same command again."
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking its checksums, and execute nothing from it.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a checkpoint in it, such as self_train/last.pth of a run.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: train first, or give the path of a checkpoint.")
    try:
        archive_bytes = check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch finds odd is refused or harmless
            payload = torch.load(path, map_location="cpu", weights_only=True)
        check_payload(payload, archive_bytes)
    except Exception as error:  # a hostile file makes the reader fail in many ways; all of them mean the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is not a checkpoint that can be read safely ({reason[:120]}): copy it again, or save it "
            "anew as a state dict of tensors."
        ) from error
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds a {type(payload).__name__}, not a dict of tensors: save a state dict.")
    return payload


def load_last(folder: Path) -> LastCheckpoint | None:
    """Read a stage's last checkpoint, or the one before it where the last is damaged or missing.

    Args:
        folder: a run's pre_train/ or self_train/.

    Returns:
        None where the stage has saved nothing yet.

    Raises:
        UserError: there are checkpoints, and none of them can be read.
    """
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            return LastCheckpoint(load(path), path, " ".join(damaged))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} can be read ({damaged[0].split(': ')[0]}): restore a copy, "
            "or remove that folder to repeat the stage."
        )
    return None


def check_best(folder: Path, names: Iterable[str]) -> None:
    """Refuse a stage whose best checkpoints are lost or damaged: its best scores would have no weights.

    Args:
        folder: a run's pre_train/ or self_train/.
        names: predictors that have a best score.

    Raises:
        UserError: names the first such file.
    """
    for path in (folder / f"best_{name}.pth" for name in names):
        try:
            check_archive(path)
        except (OSError, DamagedError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            raise UserError(
                f"{path} {reason} although the run selected it: restore a copy, or remove the folder {folder} "
                "to repeat the stage, which gives the same numbers."
            ) from None


def load_weights(
    network: nn.Module, path: Path | str, role: str | None = None, prefer: str | None = None
) -> LoadReport:
    """Copy a checkpoint's weights into a network: ours, a bare state dict, or one within a container.

    A container holds it as "net" (as published), "state_dict", "model_state_dict" or "model"; names may begin with
    "module." (DataParallel) or "_orig_mod." (torch.compile).

    Args:
        network: from build_network; changed only if everything fits.
        path: the checkpoint.
        role: which network of our own checkpoints: "student_a", "student_b" or "teacher"; None takes the only one
            that fits by name. Where a student's average is kept (`--average_decay`), it stands for the student.
        prefer: the role to take where several fit by name, as of two students of one architecture.

    Returns:
        What was loaded and what was left out.

    Raises:
        UserError: the file cannot be read, or a name or shape does not fit; the message names it.

    Source: docs/method.md, "Networks", last paragraph.
    """
    path = Path(path)
    payload = load(path)
    state = _find_state(payload, network, path, role, prefer)
    state = {PREFIX.sub("", name, count=1) if PREFIX.match(name) else name: tensor for name, tensor in state.items()}
    wanted = network.state_dict()
    unused = getattr(network, "unused_names", None)  # only some networks' published files hold such
    left_out = tuple(name for name in state if name not in wanted and unused and unused.fullmatch(name))
    check_state(state, network, path, left_out)
    network.load_state_dict({name: state[name] for name in wanted})
    iteration = payload.get("iteration")
    return LoadReport(path, tuple(wanted), left_out, iteration if isinstance(iteration, int) else None)


def _find_state(
    payload: dict[str, Any], network: nn.Module, path: Path, role: str | None, prefer: str | None
) -> dict[str, Any]:
    """Return the state dict inside a checkpoint's container."""
    if "networks" in payload:
        states = payload["networks"]
        if not isinstance(states, dict) or not all(isinstance(r, str) and _is_state(states[r]) for r in states):
            raise UserError(f"{path} holds no networks by role: choose a checkpoint of this repository.")
        averaged = {r.removesuffix(AVERAGE): state for r, state in states.items() if r.endswith(AVERAGE)}
        states = {r: state for r, state in states.items() if not r.endswith(AVERAGE)} | averaged
        if role is None:
            usable = [r for r in states if r != "teacher"] or list(states)  # a file of the teacher alone is meant
            fitting = [r for r in usable if states[r].keys() == network.state_dict().keys()]
            if prefer not in (None, *fitting) and fitting not in ([], ["teacher"]):
                raise UserError(f"{path} holds {', '.join(states)}, no {prefer}: give that student's file.")
            fitting = [prefer] if prefer in fitting else fitting
            if len(fitting) != 1:
                raise UserError(
                    f"{path} holds {', '.join(states)}, of which {len(fitting)} fit a {type(network).__name__}: "
                    "say which one to load."
                )
            role = fitting[0]
        role = role.removesuffix(AVERAGE)
        if role not in states:
            raise UserError(f"{path} holds no {role}, only {', '.join(states)}: choose one of these.")
        return states[role]
    held = [payload[key] for key in CONTAINERS if isinstance(payload.get(key), dict)]
    state = held[0] if held else payload
    if not _is_state(state):
        known = ", ".join(f"'{key}'" for key in ("networks", *CONTAINERS))
        raise UserError(f"{path} is neither a state dict nor a container with {known}: save one of these.")
    return state


def check_state(state: Any, network: nn.Module, path: Path, left_out: Collection[str] = ()) -> None:
    """Refuse a state dict with missing or foreign names, other shapes or types, or values that are not finite.

    Args:
        state: what a file holds for the network.
        network: whose names and shapes are wanted.
        path: the file, for the message.
        left_out: names that may be there.

    Raises:
        UserError: names the first three that do not fit.
    """
    kind, wanted = type(network).__name__, network.state_dict()
    if not _is_state(state):
        raise UserError(f"{path} holds no tensors by name for a {kind}: choose a checkpoint of this repository.")
    present = [name for name in wanted if name in state]
    problems = {
        "lacks": [name for name in wanted if name not in state],
        "has the unknown": [name for name in state if name not in wanted and name not in left_out],
        "has another shape for": [name for name in present if state[name].shape != wanted[name].shape],
        "has another type of number for": [
            name for name in present if state[name].is_floating_point() != wanted[name].is_floating_point()
        ],
        "has nan or infinite values in": [name for name in present if not bool(torch.isfinite(state[name]).all())],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            detail = ""
            if "shape" in problem:
                detail = f" ({tuple(state[names[0]].shape)} where {tuple(wanted[names[0]].shape)} is needed)"
            raise UserError(
                f"{path} does not fit a {kind}: it {problem} {', '.join(names[:3])}{more}{detail}; "
                "choose the checkpoint of this network and number of classes."
            )


def check_optimiser(values: Any, optimiser: torch.optim.Optimizer, path: Path) -> None:
    """Refuse the state of another optimiser: other parameters, shapes, or values that are not finite.

    Args:
        values: what a file holds for the optimiser, as from its state_dict().
        optimiser: whose parameters are wanted.
        path: the file, for the message.

    Raises:
        UserError: the state does not fit.
    """
    shapes = [parameter.shape for group in optimiser.param_groups for parameter in group["params"]]
    kept = [group.get("kept", ADAM) for group in optimiser.param_groups for _ in group["params"]]
    state = values.get("state") if isinstance(values, dict) else None
    fits = isinstance(state, dict) and (not state or set(state) == set(range(len(shapes))))
    if not fits or not all(_is_moments(moments, shapes[index], kept[index]) for index, moments in state.items()):
        raise UserError(
            f"{path} does not fit: its optimiser's state is not that of these networks; restore a copy of it, "
            "or choose another --exp to train anew."
        )


def _is_moments(moments: Any, shape: torch.Size, names: Collection[str]) -> bool:
    """Tell whether this is an optimiser's state of one parameter, under these names."""
    if not _is_state(moments) or set(moments) != set(names):
        return False
    return all(
        value.shape == (torch.Size() if name == "step" else shape)
        and value.is_floating_point()
        and bool(torch.isfinite(value).all())
        for name, value in moments.items()
    )


def _is_state(state: Any) -> bool:
    """Tell whether this is a dict of tensors by name."""
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
