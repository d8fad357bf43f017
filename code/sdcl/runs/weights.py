"""Which weights are scored or predict: a stage of a run, or files that a user gives."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcl.checkpoints import AVERAGE, LAST, load, load_weights
from sdcl.methods import get
from sdcl.networks import build_network
from sdcl.runs.devices import place
from sdcl.runs.errors import UserError
from sdcl.runs.folder import (
    LOGGER,
    differing_tasks,
    find_run,
    known_task,
    pretrained_folder,
    read_config,
    start_selected_on,
)
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS, Predictors, load_predictors
from sdcl.steps import TEACHER, averaged


@dataclass(frozen=True)
class Weights:
    """What a test scores.

    Attributes:
        folder: the run's; results go below it.
        settings: that the networks were trained with.
        stage: of the run, "pre_train" or "self_train".
        files: by student, where files were given; else empty.
        asked: the predictors to score; empty: the method's own.
    """

    folder: Path
    settings: dict[str, Any]
    stage: str
    files: dict[str, Path]
    asked: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Path]:
        """The folders of the runs that they come of; published files come of none."""
        if not self.files:
            return [self.folder]
        stages = {path.resolve().parent for path in self.files.values()}
        runs = {stage.parent for stage in stages if stage.name in ("pre_train", "self_train")}
        return sorted(run for run in runs if (run / "config.json").is_file())

    @property
    def records(self) -> dict[str, str]:
        """The folders of the stages that led to them, of which metrics.csv tells; none of given files."""
        if self.files:
            return {}
        begun = pretrained_folder(self.folder)
        stages = {"pre_train": (begun or self.folder) / "pre_train"}
        if self.stage == "self_train":
            stages["self_train"] = self.folder / "self_train"
        return {name: str(folder) for name, folder in stages.items() if (folder / "metrics.csv").exists()}

    @property
    def selected_on(self) -> str | None:
        """What the run's best were selected on, "test" or "val"; None: nothing was."""
        if self.files:
            best = {path.resolve().parents[1] for path in self.files.values() if path.name.startswith("best_")}
            selects = [read_config(run)["select"] for run in self.runs if run in best]
        else:
            selects = [self.settings["select"]] * any((self.folder / self.stage).glob("best_*.pth"))
        return ("test" if "test" in selects else "val") if selects else None

    @property
    def start_selected_on(self) -> str | None:
        """Which cases stage 1's best were selected on, from which these weights' self-training started, if it did."""
        if self.files:
            trained = {path.resolve().parent for path in self.files.values()}
            runs = [run for run in self.runs if run / "self_train" in trained]
        else:
            runs = [self.folder] * (self.stage == "self_train")
        found = {start_selected_on(run) for run in runs}
        return "test" if "test" in found else "val" if "val" in found else None

    @property
    def name(self) -> str:
        """What folders of results are called: the stage, or the given files' names and content."""
        if not self.files:
            return self.stage
        content = hashlib.sha256()
        for path in self.files.values():
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):  # noqa: B023 - read at once
                    content.update(block)
        stems = "_".join(re.sub(r"\W", "", path.stem) for path in self.files.values())
        return f"weights_{stems[:60]}_{content.hexdigest()[:8]}"

    def elsewhere(self, name: str) -> str:
        """Return the name of the data set to score where it is another one than the run's own; else ""."""
        own = name if self.files else (known_task(self.folder) or {}).get("name", name)
        return "" if own == name else name

    @property
    def label(self) -> str:
        """What tables say in the place of a method."""
        if self.files:
            return "given weights"
        return self.settings.get("method", "sdcl") if self.stage == "self_train" else self.stage

    def load(self, sizes: tuple[int, int], device: torch.device) -> Predictors:
        """Load what is scored, on the device; sizes: as Task has them.

        Raises:
            UserError: a checkpoint is missing or does not fit.
        """
        if self.files:
            networks = {role: make_network(self.settings, role, sizes, device) for role in STUDENTS}
            for role, path in self.files.items():
                LOGGER.info("%s", load_weights(networks[role], path, prefer=role))
            return Predictors.of(networks, chosen(PREDICTORS, self.asked, PREDICTORS, "given weights"))
        own = predictors_of(self.folder, self.stage, self.settings)
        return load_predictors(
            self.folder / self.stage,
            lambda role: make_network(self.settings, role, sizes, device),
            str(self.selected_on),
            chosen(own, self.asked, known_predictors(own, self.stage, self.settings), self.label),
            self.settings["select"] == "last",
            set(self.asked) - set(own),
        )


def known_predictors(
    own: Mapping[str, tuple[str, ...]], stage: str, settings: dict[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Return a stage's predictors, and what can be scored beside them: the teacher of a method that has one."""
    has_teacher = stage == "self_train" and get(settings.get("method", "sdcl")).has_teacher
    return ({TEACHER: (TEACHER,)} if has_teacher else {}) | dict(own)


def chosen(
    own: Mapping[str, tuple[str, ...]], asked: Sequence[str], known: Mapping[str, tuple[str, ...]], whose: str
) -> dict[str, tuple[str, ...]]:
    """Return the predictors to score, to the roles whose probabilities are averaged.

    Args:
        own: what is scored unless something is asked for.
        asked: by --predictors.
        known: what can be scored.
        whose: for the message.

    Raises:
        UserError: what is asked for is not known.
    """
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--predictors {unknown[0]} is none of {whose}'s: choose of {', '.join(known)}.")
    return {name: known[name] for name in known if name in asked} or dict(own)  # the answer stays the last


def find_weights(config: Any, data_set: str) -> Weights:
    """Do what find_run() does, and take the settings of given weights from their own checkpoints where they have some.

    Args:
        config: a test script's header.
        data_set: the data set's name, as runs carry it.

    Raises:
        UserError: see find_run(), or the two files are of different patches.
    """
    folder, settings = find_run(config, data_set)
    if not config.student_a_weights:
        return Weights(folder, settings, config.stage, {}, config.predictors)
    files = dict(zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True))
    found: dict[str, list[Any]] = {}
    for role, path in files.items():
        own = load(path).get("config")
        for name in ("patch_size", role):
            if isinstance(own, dict) and name in own:
                found.setdefault(name, []).append(own[name])
    for name, values in found.items():
        if any(value != values[0] for value in values):
            raise UserError(
                f"--student_a_weights and --student_b_weights were trained with {name} {values[0]} and {values[1]}: "
                "give two files of one run."
            )
        if settings[name] != values[0]:
            LOGGER.info("NOTE: %s is the checkpoint's own, %s, not this script's %s", name, values[0], settings[name])
        settings[name] = values[0]
    return Weights(folder, settings, config.stage, files, config.predictors)


@dataclass(frozen=True)
class Loaded:
    """What load_predictor() has read: the predictor's name, its file, the iteration that it was saved after."""

    predictor: str
    path: Path
    iteration: int | None
    networks: list[nn.Module]

    @property
    def name(self) -> str:
        """What tables say of a number's weights, such as "mean of .../best_mean.pth, iteration 6000"."""
        after = "" if self.iteration is None else f", iteration {self.iteration}"
        return f"{self.predictor} of {self.path}{after}"


def load_predictor(config: Any, settings: dict[str, Any], sizes: tuple[int, int], device: torch.device) -> Loaded:
    """Load a run's networks for prediction: a predictor's best, or its last where --select was last or nothing was.

    Args:
        config: code/predict.py's header: the run, the stage, and the predictor; None: the method's own answer, such as
            the mean of both students.
        settings: that the run was trained with.
        sizes: number of classes C, and of the images' channels.
        device: where to.

    Returns:
        The networks, whose probabilities are to be averaged, and where they come from.

    Raises:
        UserError: the method has no such predictor, or a checkpoint is missing or does not fit.
    """
    own = predictors_of(config.run, config.stage, settings)
    predictor, roles_of = config.predictor or list(own)[-1], known_predictors(own, config.stage, settings)
    if predictor not in roles_of:
        whose = "pre-training" if config.stage == "pre_train" else settings.get("method", "sdcl")
        raise UserError(f"--predictor {predictor} is none of {whose}'s: choose {', '.join(roles_of)}.")
    best = config.run / config.stage / f"best_{predictor}.pth"
    path = best if best.exists() and settings["select"] != "last" else config.run / config.stage / LAST
    path = config.checkpoint or path
    networks, iteration = [], None
    for role in roles_of[predictor]:
        network = make_network(settings, role, sizes, device)
        report = load_weights(network, path, role)
        LOGGER.info("%s: %s", role, report)
        networks.append(network)
        iteration = report.iteration
    return Loaded(predictor, path, iteration, networks)


def make_network(settings: dict[str, Any], role: str, sizes: tuple[int, int], device: torch.device) -> nn.Module:
    """Build the network of a role, as a run's settings name it, on the device; sizes: see load_predictor()."""
    architecture = settings["student_a" if role == TEACHER else role.removesuffix(AVERAGE)]
    return place(build_network(architecture, *sizes), device)


def predictors_of(folder: Path, stage: str, settings: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return what a stage of a run is scored by, to the roles whose probabilities are averaged.

    Raises:
        UserError: the run has the other stage alone.
    """
    other = {"self_train": "pre_train", "pre_train": "self_train"}[stage]
    if not (folder / stage / LAST).exists() and (folder / other / LAST).exists():
        raise UserError(f"{folder} has no {stage}, only {other}: give --stage {other}, or train it.")
    if stage == "pre_train":
        return PREDICTORS
    return averaged(get(settings.get("method", "sdcl")).predictors, settings.get("average_decay", 0.0))


def check_prepared(run: Path, facts: dict[str, Any], are_given: bool) -> None:
    """Refuse to score a run on data that were prepared in another way than those it was trained on.

    Args:
        run: its folder.
        facts: what the data set to score says, as DataSet.facts() does.
        are_given: the run's weights were given as files, so that the data may be another set of the same classes.

    Raises:
        UserError: says what differs.
    """
    task = known_task(run)
    if task is None:
        LOGGER.info("NOTE: %s does not tell how the data were prepared that it was trained on.", run)
        return
    if are_given and facts["name"] != task.get("name"):  # its name and its structures' names are its own
        names, theirs = (list(each.get("class_names") or ()) for each in (facts, task))
        if names != theirs and sorted(names) == sorted(theirs):
            raise UserError(
                f"{run} was trained on the structures {', '.join(theirs)}, and --root_path calls them "
                f"{', '.join(names)}, in another order: import the data again with these --class_names and "
                "--label_values in the run's order."
            )
        if names != theirs:
            pairs = [f"{there} counts as {here}" for there, here in zip(theirs, names, strict=False) if there != here]
            LOGGER.info("NOTE: structures are paired by their order: %s.", ", ".join(pairs))
        facts = facts | {key: task.get(key) for key in ("name", "class_names", "label_values")}
    if differing := differing_tasks(task, facts):
        raise UserError(
            f"{run} was trained on data prepared in another way than those of --root_path ({differing}): "
            "prepare the data to test on as it was, or choose a run on these."
        )
