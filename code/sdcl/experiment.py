"""What every data set's scripts do around the loops: prepare, train both stages, test."""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdcl.atomic import claimed
from sdcl.checkpoints import LAST, load_weights
from sdcl.config import (
    as_dict,
    check_common,
    computes_bf16,
    describe,
    keep_freed_memory,
    select_device,
    set_arithmetic,
)
from sdcl.errors import UserError
from sdcl.evaluation import PREDICTORS, STUDENTS, Case, Predictors, Task, load_predictors
from sdcl.networks import build_network
from sdcl.report import test_report, validator
from sdcl.runs import LOGGER, environment, open_run, read_config, run_folder, start_logging, trained_among
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
    _check_stages(config, folder)
    common = {"method": config, "validate": validator(cases, task), "validated_on": validated_on}
    common["config"] = as_dict(config)
    with claimed(folder):
        validation = [case.name for case in cases]
        open_run(folder, as_dict(config), {**lists, "validation": validation}, device, facts, trained_on)
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


def _check_stages(config: Any, folder: Path) -> None:
    """Refuse a run whose self-training would find nothing to start from, before its folder is made."""
    if config.pretrained is None:
        if config.self_iterations and not config.pre_iterations and not (folder / "pre_train").exists():
            raise UserError("--pre_iterations 0 leaves self-training nothing to start from: give --pretrained.")
        return
    other = read_config(config.pretrained)
    for name in ("student_a", "student_b", "labelnum"):
        if other.get(name) != getattr(config, name):
            raise UserError(
                f"--pretrained {config.pretrained} was trained with {name} {other.get(name)}, not "
                f"{getattr(config, name)}: choose a run of the same --{name}."
            )
    needed = [LAST] if config.select == "last" else [f"best_{role}.pth" for role in STUDENTS]
    for name in needed:
        if not (config.pretrained / "pre_train" / name).exists():
            raise UserError(
                f"--pretrained {config.pretrained} has no pre_train/{name}: choose a run that finished pre-training"
                f"{'' if config.select == 'last' else ' with validation, or --select last'}."
            )


def find_run(config: Any, data_set: str) -> tuple[Path, dict[str, Any]]:
    """Return the run's folder that a test's header names, and the settings that it was trained with.

    With weights given in files, the folder is student a's and the settings are the header's own.

    Raises:
        UserError: there is no such run, or only one of the two weights' files is given.
    """
    files = (config.student_a_weights, config.student_b_weights)
    if any(files) and not all(files):
        raise UserError("--student_a_weights and --student_b_weights belong together: give both or none.")
    if all(files):
        return config.student_a_weights.resolve().parent, as_dict(config)
    folder = run_folder(config.models_path, data_set, config.exp, config.labelnum)
    return folder, read_config(folder)


def test(
    config: Any,
    task: Task,
    device: torch.device,
    folder: Path,
    trained: dict[str, Any],
    read_cases: Callable[[], Sequence[Case]],
    split: str,
    nifti: bool = False,
) -> None:
    """Score a run's best and last students and means, or given weights, in one pass; print and write the tables.

    Args:
        config: the test script's header.
        task: what the data set fixes.
        device: where to compute.
        folder: from find_run().
        trained: from find_run().
        read_cases: reads the volumes to score, once the networks are there.
        split: their name.
        nifti: also write each case's image, label, prediction and probability as NIfTI.

    Raises:
        UserError: a checkpoint is missing or does not fit.
    """

    def make_student(role: str) -> torch.nn.Module:
        return place(build_network(trained[role], task.num_classes), device)

    files = dict(zip(STUDENTS, (config.student_a_weights, config.student_b_weights), strict=True))
    selected_on = None if all(files.values()) else "test" if trained["select"] == "test" else "val"
    if selected_on is None:
        networks = [make_student(role) for role in STUDENTS]
        for network, path in zip(networks, files.values(), strict=True):
            LOGGER.info("%s", load_weights(network, path))
        predictors = Predictors(networks, PREDICTORS)
    else:
        predictors = load_predictors(folder / config.stage, make_student, selected_on)
    used = as_dict(config) | {key: trained[key] for key in ("patch_size", "student_a", "student_b")}
    facts = {"split": split, "selected_on": selected_on, "config": used, "environment": environment(device)}
    LOGGER.info("networks %s and %s, patch_size %s", used["student_a"], used["student_b"], used["patch_size"])
    name = "_".join([config.stage if selected_on else "weights", split, *_options(config)])
    cases, results = read_cases(), folder / "test" / name
    seen = trained_among(folder, [case.name for case in cases]) if selected_on else []
    facts["trained_on"] = seen
    with claimed(results):
        test_report(results, predictors, cases, task, config.protocol, facts, nifti)
    if seen:
        shown = ", ".join(seen[:5]) + (" ..." if len(seen) > 5 else "")
        LOGGER.warning("NOTE: the run was TRAINED on %d of these cases (%s), which flatters it.", len(seen), shown)
    if selected_on == split:
        LOGGER.info("NOTE: 'best on %s' was selected on these very volumes, which flatters it; 'last' was not.", split)


def _options(config: Any) -> list[str]:
    """Name the options that make a test differ from the published one, so that each has a folder of its own."""
    chosen = ["paper"] if config.protocol == "paper" else []
    chosen += ["gaussian"] if getattr(config, "window_weighting", "") == "gaussian" else []
    return chosen + [name for name in ("tta", "largest_component") if getattr(config, name, False)]
