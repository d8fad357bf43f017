"""What every data set's scripts do around the loops: prepare, train both stages, test."""

import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcl.checkpoints import LAST, PREVIOUS, load, load_last, load_weights
from sdcl.methods import check_settings, get
from sdcl.networks import build_network
from sdcl.runs.atomic import claimed
from sdcl.runs.config import as_dict, check_common, describe
from sdcl.runs.data import Data, Stage
from sdcl.runs.devices import computes_bf16, keep_freed_memory, place, select_device, set_arithmetic
from sdcl.runs.errors import UserError
from sdcl.runs.folder import (
    LOGGER,
    Reads,
    differing_tasks,
    environment,
    find_run,
    inherited,
    known_runs,
    known_task,
    open_run,
    read_config,
    run_folder,
    start_logging,
    trained_among,
)
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS, Predictors, load_predictors
from sdcl.scoring.report import test_report, validator
from sdcl.steps import TEACHER
from sdcl.training import make_learners, pretrain, self_train, validation_iterations


def begin(config: Any, check: Callable[[Any], None]) -> torch.device:
    """Start logging, check the header, print it, and choose the device.

    Args:
        config: the script's header.
        check: refuses what this data set cannot do.

    Raises:
        UserError: a setting is impossible; the message names it.
    """
    start_logging()
    device = select_device(config.device, config.gpu)
    check_common(config)
    check(config)
    precision = getattr(config, "precision", "fp32")
    set_arithmetic(getattr(config, "deterministic", False), precision)
    if device.type == "cpu":
        keep_freed_memory()
    if precision == "bf16" and not computes_bf16(device):
        LOGGER.info("NOTE: %s has no bfloat16 arithmetic: --precision fp32 is many times faster here.", device)
    LOGGER.info("%s\nComputing on %s, with\n%s", type(config).__doc__.splitlines()[0], device, describe(config))
    return device


def train(config: Any, data: Data, filled: Collection[str] = ()) -> None:
    """Train both stages of a run, from where its folder left it.

    Args:
        config: the script's header.
        data: what it names.
        filled: fields that the script filled in since they were None.

    Raises:
        UserError: a setting, list or file is wrong; see also claimed(), open_run(), pretrain() and self_train().
    """

    def check(_: Any) -> None:
        data.check_root()
        data.check()
        check_settings(config, filled)

    device = begin(config, check)
    LOGGER.info("method: %s", get(config.method).title)
    given = data.training(get(config.method).needs_unlabelled)
    torch.manual_seed(config.seed)
    students = [place(build_network(getattr(config, role), given.task.num_classes), device) for role in STUDENTS]
    learners = make_learners(*students, config.base_lr)
    del students  # so that a stage which trains one of them does not keep the other in memory
    folder = run_folder(config.models_path, given.task.name, config.exp, config.labelnum)
    stages: list[Stage] = ["pre_train"] * (config.pretrained is None) + ["self_train"] * bool(config.self_iterations)
    streams = {stage: given.streams(stage) for stage in stages}  # all before any training, for their refusals
    pretrained = _check_stages(config, folder, given.facts)
    common = {"settings": config, "validate": validator(given.validation_cases, given.task)}
    common |= {"validated_on": given.validated_on, "config": as_dict(config)}
    with claimed(folder):
        validation = [case.name for case in given.validation_cases]
        names = {**given.lists, "validation": validation}
        open_run(folder, as_dict(config), Reads(names, given.facts, given.trained_on, pretrained), device)
        known = {*given.trained_on, *(pretrained or {}).get("trained_on", ())}
        if seen := [name for name in validation if name in known]:
            LOGGER.warning("NOTE: training reads %d of the cases it is validated on (%s).", len(seen), _few(seen))
        if "pre_train" in streams:
            pretrain(learners, streams["pre_train"], folder, validate_at=validate_at(config, "pre_train"), **common)
        if "self_train" in streams:
            common |= {"start_from": "last" if config.select == "last" else "best", "pretrained": config.pretrained}
            self_train(learners, streams["self_train"], folder, validate_at=validate_at(config, "self_train"), **common)
    _tell_end(config, folder)


def _tell_end(config: Any, folder: Path) -> None:
    """Say how the run is scored."""
    stage = "" if config.self_iterations else " --stage pre_train"
    given = {name: str(getattr(config, name)) for name in ("root_path", "models_path") if hasattr(config, name)}
    paths = shlex.join([text for name, path in given.items() for text in (f"--{name}", path)])
    where = f"{paths} --exp {shlex.quote(config.exp)} --labelnum {config.labelnum}{stage}"
    LOGGER.info("done: %s; the test script scores it with %s", folder, where)


def validate_at(config: Any, stage: Stage) -> set[int]:
    """Return the iterations of a stage after which to validate, beside the last, by a script's header.

    Args:
        config: with pre_val_every and self_val_every, and maybe pre_val_from, late_val_from and late_val_every.
        stage: which.
    """
    if stage == "pre_train":
        has_from = hasattr(config, "pre_val_from") and len(config.patch_size) == 2  # own_train reads it in 2D
        first = config.pre_val_from if has_from else config.pre_val_every
        return set(validation_iterations(first, config.pre_val_every, config.pre_iterations))
    every, last = config.self_val_every, config.self_iterations
    if not hasattr(config, "late_val_every"):
        return set(validation_iterations(every, every, last))
    late = validation_iterations(config.late_val_from, config.late_val_every, last)
    return {*validation_iterations(every, every, config.late_val_from - 1), *late}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _check_stages(config: Any, folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Refuse a run whose self-training would find nothing to start from, before its folder is made.

    Returns:
        What the run takes over from --pretrained; None without it, and once self-training has begun, since from then
        on it is needed no more.

    Raises:
        UserError: names the flag.
    """
    if any((folder / "self_train" / name).exists() for name in (LAST, PREVIOUS)):
        return None
    if config.pretrained is None:
        if config.self_iterations and not config.pre_iterations and not (folder / "pre_train").exists():
            raise UserError("--pre_iterations 0 leaves self-training nothing to start from: give --pretrained.")
        return None
    where = f"--pretrained {config.pretrained}"
    if not (config.pretrained / "config.json").is_file():
        raise UserError(f"{where} is no run's folder ({known_runs(config.models_path)}): give one of these.")
    other, other_settings = inherited(config.pretrained), read_config(config.pretrained)
    for name in ("student_a", "student_b", "labelnum"):
        if other_settings.get(name) != getattr(config, name):
            raise UserError(
                f"{where} was trained with {name} {other_settings.get(name)}, not "
                f"{getattr(config, name)}: choose a run of the same --{name}."
            )
    if not other["task"]:
        LOGGER.warning("NOTE: %s does not tell on which data it was trained.", where)
    elif differing := differing_tasks(other["task"], facts):
        raise UserError(f"{where} was trained on other data ({differing}): choose a run on these.")
    needed = [LAST] if config.select == "last" else [f"best_{role}.pth" for role in get(config.method).students]
    for name in needed:
        if not (config.pretrained / "pre_train" / name).exists():
            raise UserError(
                f"{where} has no pre_train/{name}: choose a run that finished pre-training"
                f"{'' if config.select == 'last' else ' with validation, or --select last'}."
            )
    last = load_last(config.pretrained / "pre_train")
    done, planned = (None if last is None else last.payload.get("iteration")), other["pre_iterations"]
    if done != planned:
        raise UserError(
            f"{where} has done {done} of its {planned} iterations of pre-training: give its own command again to "
            "finish it, or choose another run."
        )
    if other["select"] == "test" and config.select == "val":
        LOGGER.warning("NOTE: %s selected its checkpoints on the TEST cases, which flatters this run's test.", where)
    if not other["trained_on"]:
        LOGGER.warning("NOTE: %s does not tell which cases it was trained on; a test of this run cannot say.", where)
    return {key: value for key, value in other.items() if key != "task"}


def test(config: Any, data: Data) -> None:
    """Score a run's best and last students and means, or given weights, in one pass; print and write the tables.

    Args:
        config: the test script's header.
        data: what it names.

    Raises:
        UserError: a checkpoint is missing or does not fit, or the data are not prepared as those trained on.
    """
    device = begin(config, lambda _: data.check_root())
    folder, trained = find_weights(config, data.name)
    scored = data.scoring(trained)

    def make_network(role: str) -> nn.Module:
        name = trained["student_a" if role == TEACHER else role]
        return place(build_network(name, scored.task.num_classes), device)

    # Stage 1 is the same for all methods: its scores are no method's.
    method = trained.get("method", "sdcl") if config.stage == "self_train" else "sdcl"
    files = dict(zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True))
    are_given = all(files.values())
    stages = {path.resolve().parent for path in files.values()} if are_given else set()
    runs = {stage.parent for stage in stages if stage.name in ("pre_train", "self_train")} if are_given else {folder}
    runs = {run for run in runs if (run / "config.json").is_file()}  # published files lie in none
    for run in runs:
        _check_prepared(run, scored.facts, are_given)
    was_selected = not are_given and any((folder / config.stage).glob("best_*.pth"))
    selected_on = ("test" if trained["select"] == "test" else "val") if was_selected else None
    if are_given:
        networks = [make_network(role) for role in STUDENTS]
        for network, (role, path) in zip(networks, files.items(), strict=True):
            LOGGER.info("%s", load_weights(network, path, prefer=role))
        predictors = Predictors(networks, PREDICTORS)
    else:
        _check_stage(folder, config.stage)
        roles_of = get(method).predictors
        predictors = load_predictors(folder / config.stage, make_network, str(selected_on), roles_of)
    used = as_dict(config) | {key: trained[key] for key in ("patch_size", "student_a", "student_b")}
    LOGGER.info("networks %s and %s, patch_size %s", used["student_a"], used["student_b"], used["patch_size"])
    name = "_".join([_weights_name(files) if are_given else config.stage, scored.split, *_options(config)])
    cases, results = scored.read_cases(), folder / "test" / name
    seen = list(dict.fromkeys(one for run in runs for one in trained_among(run, [case.name for case in cases])))
    said = {"split": scored.split, "selected_on": selected_on, "config": used, "environment": environment(device)}
    said |= {
        "trained_on": seen,
        "protocol": config.protocol,
        "method": "given weights" if are_given else method if config.stage == "self_train" else config.stage,
    }
    with claimed(results):
        test_report(results, predictors, cases, scored.task, said, config.save_nifti)
    if seen:
        LOGGER.warning("NOTE: the run was TRAINED on %d of these cases (%s), which flatters it.", len(seen), _few(seen))
    elif not runs:
        LOGGER.info("NOTE: these files do not tell which cases they were trained on.")
    if selected_on == scored.split:
        LOGGER.info(
            "NOTE: 'best on %s' was selected on these very volumes, which flatters it; 'last' was not.", scored.split
        )


def _check_stage(folder: Path, stage: str) -> None:
    """Refuse a stage that a run does not have, naming the one that it has.

    Raises:
        UserError: the run has the other stage alone.
    """
    other = {"self_train": "pre_train", "pre_train": "self_train"}[stage]
    if not (folder / stage / LAST).exists() and (folder / other / LAST).exists():
        raise UserError(f"{folder} has no {stage}, only {other}: give --stage {other}, or train it.")


def load_predictor(config: Any, settings: dict[str, Any], num_classes: int, device: torch.device) -> list[nn.Module]:
    """Load a run's networks for prediction: a predictor's best, or its last where nothing was selected.

    Args:
        config: code/predict.py's header: the run, the stage, and the predictor; None: the method's own answer, such as
            the mean of both students.
        settings: that the run was trained with.
        num_classes: number of classes C.
        device: where to.

    Returns:
        The networks, whose probabilities are to be averaged.

    Raises:
        UserError: the method has no such predictor, or a checkpoint is missing or does not fit.
    """
    _check_stage(config.run, config.stage)
    method = "sdcl" if config.stage == "pre_train" else settings.get("method", "sdcl")  # stage 1 is the same for all
    roles_of = get(method).predictors
    predictor = config.predictor or list(roles_of)[-1]
    if predictor not in roles_of:
        whose = "pre-training" if config.stage == "pre_train" else method
        raise UserError(f"--predictor {predictor} is none of {whose}'s: choose {', '.join(roles_of)}.")
    best = config.run / config.stage / f"best_{predictor}.pth"
    path = best if best.exists() else config.run / config.stage / LAST
    networks = []
    for role in roles_of[predictor]:
        network = place(build_network(settings["student_a" if role == TEACHER else role], num_classes), device)
        LOGGER.info("%s: %s", role, load_weights(network, path, role))
        networks.append(network)
    return networks


def _check_prepared(run: Path, facts: dict[str, Any], are_given: bool) -> None:
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
    if are_given:  # on one's own data, say: its name and its structures' names are its own
        facts = facts | {key: task.get(key) for key in ("name", "class_names", "label_values")}
    if differing := differing_tasks(task, facts):
        raise UserError(
            f"{run} was trained on data prepared in another way than those of --root_path ({differing}): "
            "prepare the data to test on as it was, or choose a run on these."
        )


def _weights_name(files: dict[str, Path]) -> str:
    """Name a set of given weights, so that each has results of its own: the files' names and their content."""
    content = hashlib.sha256()
    for path in files.values():
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):  # noqa: B023 - read at once
                content.update(block)
    stems = "_".join(re.sub(r"\W", "", path.stem) for path in files.values())
    return f"weights_{stems[:60]}_{content.hexdigest()[:8]}"


def find_weights(config: Any, data_set: str) -> tuple[Path, dict[str, Any]]:
    """Do what find_run() does, and take the settings of given weights from their own checkpoints where they have some.

    Raises:
        UserError: see find_run(), or the two files are of different patches.
    """
    folder, settings = find_run(config, data_set)
    if not config.student_a_weights:
        return folder, settings
    found: dict[str, list[Any]] = {}
    for role, path in zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True):
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
    return folder, settings


def _options(config: Any) -> list[str]:
    """Name the options that make a test differ from the published one, so that each has a folder of its own."""
    chosen = ["paper"] if config.protocol == "paper" else []
    chosen += ["gaussian"] if getattr(config, "window_weighting", "") == "gaussian" else []
    return chosen + [name for name in ("tta", "largest_component") if getattr(config, name, False)]
