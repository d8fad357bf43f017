"""Going back to a stage's last save."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sdcl import checkpoints
from sdcl.runs.distribution import first, is_first
from sdcl.runs.errors import UserError
from sdcl.runs.folder import differing_fields
from sdcl.runs.written_files import check_replaceable, record
from sdcl.steps import Learners

DAMAGED = "last_damaged.pth"  # a last checkpoint that could not be read, kept for inspection


def resume(learners: Learners, folder: Path, config: dict[str, Any], predictors: Collection[str]) -> str:
    """Go back to the last save that can be read; where there is none, change nothing.

    Args:
        learners: changed in place.
        folder: the stage's, which has the stage's name.
        config: the run's, which the checkpoint's must equal.
        predictors: the names that a best may have.

    Returns:
        What was wrong with a later save, a sentence or two; "" where nothing was.

    Raises:
        UserError: no save can be read, or it is of another run; nothing has been changed.
    """
    last = first(lambda: checkpoints.load_last(folder))
    if last is None:
        return ""
    state, path = last.payload, last.path
    _check_progress(state, path, learners, predictors)
    differing = differing_fields(state["config"], config)
    if differing:
        raise UserError(f"{path} is of another configuration ({differing}): choose another --exp.")
    learners.load(state, path)
    learners.best, learners.iteration = state["best"], state["iteration"]
    if path.name == checkpoints.LAST:
        return ""
    if last.damaged and is_first():  # set aside, so that the next save does not put it in the place of the good one
        check_replaceable(folder / DAMAGED)
        record(folder / DAMAGED)
        os.replace(folder / checkpoints.LAST, folder / DAMAGED)
    lost = f"{last.damaged} It is kept as {DAMAGED}." if last.damaged else f"{checkpoints.LAST} is missing."
    return f"{lost} Going on from {path.name}, saved after iteration {state['iteration']}."


def _check_progress(state: dict[str, Any], path: Path, learners: Learners, predictors: Collection[str]) -> None:
    """Refuse a checkpoint that is not one of this stage, whole."""
    best, iteration = state.get("best"), state.get("iteration")
    is_sound = (
        state.get("stage") == path.parent.name
        and isinstance(state.get("config"), dict)
        and isinstance(iteration, int)
        and iteration >= 0
        and isinstance(best, dict)
        and all(
            name in predictors
            and isinstance(entry, dict)
            and isinstance(entry.get("dice"), float)
            and isinstance(entry.get("iteration"), int)
            for name, entry in best.items()
        )
        and _has(state.get("networks"), learners.networks)
        and _has(state.get("optimisers"), learners.optimisers)
    )
    if not is_sound:
        raise UserError(
            f"{path} is not a whole checkpoint of {path.parent.name}: restore a copy of it, or choose another --exp."
        )


def _has(held: Any, ours: dict[str, Any]) -> bool:
    """Tell whether a checkpoint holds something for each of our roles, and for no other."""
    return isinstance(held, dict) and set(held) == set(ours)
