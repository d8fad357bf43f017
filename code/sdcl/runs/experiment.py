"""What every data set's scripts do around the loops: prepare, train both stages, test."""

import hashlib
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdcl.checkpoints import LAST, PREVIOUS, load, load_last, load_weights
from sdcl.networks import build_network
from sdcl.runs.atomic import claimed
from sdcl.runs.config import as_dict, check_common, describe
from sdcl.runs.devices import computes_bf16, keep_freed_memory, select_device, set_arithmetic
from sdcl.runs.errors import UserError
from sdcl.runs.folder import (
    LOGGER,
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
from sdcl.scoring.evaluation import PREDICTORS, STUDENTS, Case, Predictors, Task, load_predictors
from sdcl.scoring.report import test_report, validator
from sdcl.training import Streams, make_learners, pretrain, self_train


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


def place(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Move a network to a device, in the memory layout that its convolutions are fastest in there."""
    is_2d = any(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    # Convolutions want channels last: without it each one reorders its input. Norms and pooling of 2D networks follow;
    # InstanceNorm would copy to channels first, so 3D networks are left alone.
    return network.to(device, memory_format=torch.channels_last if is_2d else torch.preserve_format)


def train(
    config: Any,
    task: Task,
    device: torch.device,
    *,
    make_streams: Callable[[bool], Streams],
    lists: Mapping[str, Sequence[str]],
    trained_on: Sequence[str],
    cases: Sequence[Case],
    validated_on: str,
    pre_val_at: Collection[int],
    self_val_at: Collection[int],
    facts: dict[str, Any],
) -> None:
    """Train both stages of a run, from where its folder left it.

    Args:
        config: the script's header.
        task: what the data set fixes.
        device: where to compute.
        make_streams: makes the streams of pre-training (False) or, with the unlabelled ones, of self-training (True).
        lists: names of the cases that the run reads, by what they are for: a run does not go on with others.
        trained_on: the training cases, as tests name them: a test says which of its cases are among them.
        cases: volumes to validate on; none: nothing is validated or selected.
        validated_on: their name, "val" or "test".
        pre_val_at: iterations of pre-training after which to validate, beside the last.
        self_val_at: the same for self-training.
        facts: what config.json keeps of the data set, under "task".

    Raises:
        UserError: see claimed(), open_run(), pretrain() and self_train().
    """
    torch.manual_seed(config.seed)
    names = (config.student_a, config.student_b)
    students = [place(build_network(name, task.num_classes), device) for name in names]
    learners = make_learners(*students, config.base_lr)
    folder = run_folder(config.models_path, task.name, config.exp, config.labelnum)
    stages = [make_streams(False)] if config.pretrained is None else [None]
    stages += [make_streams(True)] if config.self_iterations else [None]  # both before any training, for their refusals
    pretrained = _check_stages(config, folder, facts)
    common = {"method": config, "validate": validator(cases, task), "validated_on": validated_on}
    common["config"] = as_dict(config)
    with claimed(folder):
        validation = [case.name for case in cases]
        names = {**lists, "validation": validation}
        open_run(folder, as_dict(config), names, device, facts, trained_on, pretrained)
        known = {*trained_on, *(pretrained or {}).get("trained_on", ())}
        if seen := [name for name in validation if name in known]:
            LOGGER.warning("NOTE: training reads %d of the cases it is validated on (%s).", len(seen), _few(seen))
        if stages[0] is not None:
            pretrain(learners, stages[0], folder, validate_at=pre_val_at, **common)
        if stages[1] is not None:
            start = "last" if config.select == "last" else "best"
            self_train(
                learners,
                stages[1],
                folder,
                validate_at=self_val_at,
                start_from=start,
                pretrained=config.pretrained,
                **common,
            )
    stage = "" if stages[1] is not None else " --stage pre_train"
    given = {name: str(getattr(config, name)) for name in ("root_path", "models_path") if hasattr(config, name)}
    paths = shlex.join([text for name, path in given.items() for text in (f"--{name}", path)])
    where = f"{paths} --exp {shlex.quote(config.exp)} --labelnum {config.labelnum}{stage}"
    LOGGER.info("done: %s; the test script scores it with %s", folder, where)


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
    needed = [LAST] if config.select == "last" else [f"best_{role}.pth" for role in STUDENTS]
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


def test(
    config: Any,
    task: Task,
    device: torch.device,
    folder: Path,
    trained: dict[str, Any],
    read_cases: Callable[[], Sequence[Case]],
    split: str,
    facts: dict[str, Any],
    nifti: bool = False,
) -> None:
    """Score a run's best and last students and means, or given weights, in one pass; print and write the tables.

    Args:
        config: the test script's header.
        task: what the data set fixes.
        device: where to compute.
        folder: from find_weights().
        trained: from find_weights().
        read_cases: reads the volumes to score, once the networks are there.
        split: their name.
        facts: what the data set says of the files to score, as DataSet.facts() does.
        nifti: also write each case's image, label, prediction and probability as NIfTI.

    Raises:
        UserError: a checkpoint is missing or does not fit, or the data are not prepared as those trained on.
    """

    def make_student(role: str) -> torch.nn.Module:
        return place(build_network(trained[role], task.num_classes), device)

    files = dict(zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True))
    are_given = all(files.values())
    stages = {path.resolve().parent for path in files.values()} if are_given else set()
    runs = {stage.parent for stage in stages if stage.name in ("pre_train", "self_train")} if are_given else {folder}
    runs = {run for run in runs if (run / "config.json").is_file()}  # published files lie in none
    for run in runs:
        _check_prepared(run, facts, are_given)
    selected_on = None if are_given else "test" if trained["select"] == "test" else "val"
    if are_given:
        networks = [make_student(role) for role in STUDENTS]
        for network, (role, path) in zip(networks, files.items(), strict=True):
            LOGGER.info("%s", load_weights(network, path, prefer=role))
        predictors = Predictors(networks, PREDICTORS)
    else:
        predictors = load_predictors(folder / config.stage, make_student, selected_on)
    used = as_dict(config) | {key: trained[key] for key in ("patch_size", "student_a", "student_b")}
    LOGGER.info("networks %s and %s, patch_size %s", used["student_a"], used["student_b"], used["patch_size"])
    name = "_".join([_weights_name(files) if are_given else config.stage, split, *_options(config)])
    cases, results = read_cases(), folder / "test" / name
    seen = list(dict.fromkeys(one for run in runs for one in trained_among(run, [case.name for case in cases])))
    said = {"split": split, "selected_on": selected_on, "config": used, "environment": environment(device)}
    said["trained_on"] = seen
    with claimed(results):
        test_report(results, predictors, cases, task, config.protocol, said, nifti)
    if seen:
        LOGGER.warning("NOTE: the run was TRAINED on %d of these cases (%s), which flatters it.", len(seen), _few(seen))
    elif not runs:
        LOGGER.info("NOTE: these files do not tell which cases they were trained on.")
    if selected_on == split:
        LOGGER.info("NOTE: 'best on %s' was selected on these very volumes, which flatters it; 'last' was not.", split)


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
