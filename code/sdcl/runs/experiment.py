"""What every data set's scripts do around the loops: prepare, train both stages, test."""

import contextlib
import logging
import math
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sdcl import ranks
from sdcl.checkpoints import LAST, PREVIOUS, load_last
from sdcl.methods import check_settings, get
from sdcl.networks import build_network
from sdcl.runs.ahead import out_of_memory, plan_of, tell_memory, tell_memory_of_test
from sdcl.runs.atomic import claimed
from sdcl.runs.config import as_dict, as_plain, check_common, check_labelnum, describe, ramp_length, recipe_of
from sdcl.runs.data import Data, Stage, Training
from sdcl.runs.devices import (
    computes_bf16,
    cost_of_bf16,
    keep_freed_memory,
    likely_device_type,
    place,
    select_device,
    set_arithmetic,
)
from sdcl.runs.distribution import check_same, check_share, first, is_first, join, part, share_weights
from sdcl.runs.errors import UserError
from sdcl.runs.folder import (
    ADDED_FIELDS,
    LOGGER,
    Reads,
    checksum_of,
    commits_of,
    differing_tasks,
    environment,
    inherited,
    known_runs,
    open_run,
    read_config,
    results_name,
    run_folder,
    start_logging,
    trained_among,
    validated_among,
)
from sdcl.runs.weights import check_prepared, find_weights
from sdcl.scoring.evaluation import STUDENTS, names_of
from sdcl.scoring.report import test_report, validator
from sdcl.scoring.tables import selection_warning
from sdcl.training import make_learners, pretrain, self_train, validation_iterations

OF_A_MACHINE = ("root_path", "models_path", "device", "gpu", "workers", "cache_gb", "pretrained")  # may differ in each

OF_NETWORKS = ("patch_size", "student_a", "student_b")  # of a test's header; the tested run's own stand in for them
SLOWER = 1.2  # times fp32's seconds, from which on bf16 is told to be slow; less is noise


def begin(config: Any, check: Callable[[], None] = lambda: None) -> torch.device:
    """Start logging, check the header, print it, and choose the device.

    Args:
        config: the script's header.
        check: refuses what this data set cannot do, after the common checks.

    Raises:
        UserError: a setting is impossible; the message names it.
    """
    start_logging()
    check_common(config)
    check_labelnum(config)
    join(likely_device_type(config.device))  # first: what one of them refuses then ends all
    if not is_first():  # one of them tells
        LOGGER.setLevel(logging.ERROR)
    check()
    device = select_device(config.device, config.gpu)
    precision = getattr(config, "precision", "fp32")
    set_arithmetic(getattr(config, "deterministic", False), precision)
    keep_freed_memory()
    if precision == "bf16" and not computes_bf16(device):
        LOGGER.info("NOTE: %s has no bfloat16 arithmetic: --precision fp32 is many times faster here.", device)
    elif precision == "bf16" and device.type == "cpu" and is_first() and (cost := cost_of_bf16()) > SLOWER:
        LOGGER.info(
            "NOTE: products of matrices take %.1f times fp32's time in bf16 on this processor: --precision fp32 is "
            "likely faster.", cost,
        )  # fmt: skip
    if named := recipe_of(config):
        LOGGER.info("recipe %s: %s", config.recipe, _listed(config, named))
    LOGGER.info("%s\nComputing on %s, with\n%s", type(config).__doc__.splitlines()[0], device, describe(config))
    return device


def _listed(config: Any, named: dict[str, Any]) -> str:
    """List a recipe's fields with the values that the run has, and beside a changed one the recipe's."""
    values = {name: (getattr(config, name), value) for name, value in named.items()}
    return ", ".join(
        f"{name} {now}" + (f" (instead of {value})" if now != value else "") for name, (now, value) in values.items()
    )


def train(config: Any, data: Data, filled: Collection[str] = ()) -> None:
    """Train both stages of a run, from where its folder left it.

    Args:
        config: the script's header.
        data: what it names.
        filled: fields that the script filled in since they were None.

    Raises:
        UserError: a setting, list or file is wrong; see also claimed(), open_run(), pretrain() and self_train().
    """

    def check() -> None:
        data.check_root()
        data.check()
        check_settings(config, filled)
        if "rampup" in get(config.method).reads:  # a longer run keeps its ramp
            config.rampup = ramp_length(config.rampup, config.self_iterations)

    device = begin(config, check)
    _check_processes(config)
    LOGGER.info("method: %s", get(config.method).title)
    given = data.training(get(config.method).needs_unlabelled)
    torch.manual_seed(config.seed)
    rates = (config.dropout, config.foreground_prior)
    students = [place(build_network(getattr(config, role), *given.task.sizes, *rates), device) for role in STUDENTS]
    learners = make_learners(*students, config.base_lr, config.weight_decay, config.optimiser)
    del students  # so that a stage which trains one of them does not keep the other in memory
    folder = run_folder(config.models_path, given.task.name, config.exp, config.labelnum)
    stages: list[Stage] = ["pre_train"] * (config.pretrained is None) + ["self_train"] * bool(config.self_iterations)
    streams = {stage: given.streams(stage) for stage in stages}  # all before any training, for their refusals
    _check_same(config, given)
    share_weights(learners.networks.values())
    pretrained = first(lambda: _check_stages(config, folder, given))
    plans = [(stage, plan_of(config, given.task.sizes, stage, device)) for stage in stages]
    tell_memory(plans, device, given.waiting_bytes)
    common = {"settings": config, "validate": validator(given.validation_cases, given.task)}
    common |= {"validated_on": given.validated_on, "config": as_dict(config)}
    with claimed_by_first(folder):
        validation = names_of(given.validation_cases)
        reads = Reads({**given.lists, "validation": validation}, given.facts, given.trained_on, pretrained)
        first(lambda: open_run(folder, as_dict(config), reads, device))
        given.keep(folder)
        known = {*given.trained_on, *(pretrained or {}).get("trained_on", ())}
        if seen := [name for name in validation if name in known]:
            LOGGER.warning("NOTE: training reads %d of the cases it is validated on (%s).", len(seen), _few(seen))
        if "pre_train" in streams:
            with told_of_memory(config, given.task.sizes, "pre_train", device):
                at = validate_at(config, "pre_train")
                pretrain(learners, streams["pre_train"], folder, validate_at=at, **common)
        if "self_train" in streams:
            common |= {"start_from": "last" if config.select == "last" else "best", "pretrained": config.pretrained}
            with told_of_memory(config, given.task.sizes, "self_train", device):
                at = validate_at(config, "self_train")
                self_train(learners, streams["self_train"], folder, validate_at=at, **common)
    _tell_end(config, folder)
    part()


def _check_same(config: Any, given: Training) -> None:
    """Refuse processes of one run with other settings or other data than the first one's."""
    settings = {f"--{name}": v for name, v in as_dict(config).items() if name not in OF_A_MACHINE}
    cases = {f"{name} cases": list(names) for name, names in given.lists.items()}
    check_same(settings | cases | {"validation cases": names_of(given.validation_cases), "data": given.facts})


def _check_processes(config: Any) -> None:
    """Refuse what several processes cannot train together, and say how many there are.

    Raises:
        UserError: names the flag.
    """
    if ranks.count() == 1:
        return
    check_share(config.batch_size)
    if config.compile:
        raise UserError("--compile does not know several processes: leave it out, or start without torchrun.")
    if not get(config.method).spans_ranks:
        raise UserError(
            f"--method {config.method} does not say that several processes can share its step: start it without "
            "torchrun, or see docs/scaling.md for what its METHOD needs."
        )
    LOGGER.info("%d processes share each batch of %d", ranks.count(), config.batch_size)


@contextlib.contextmanager
def told_of_memory(config: Any, sizes: tuple[int, int], stage: Stage, device: torch.device) -> Iterator[None]:
    """Turn a device's lack of memory into a sentence with the settings that would fit.

    Raises:
        UserError: instead of PyTorch's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(out_of_memory(config, sizes, stage, device)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what PyTorch says on a CPU
            raise
        raise UserError(out_of_memory(config, sizes, stage, device)) from error


@contextlib.contextmanager
def claimed_by_first(folder: Path) -> Iterator[None]:
    """Do what claimed() does, in the first process for all of them."""
    with contextlib.ExitStack() as stack:
        first(lambda: stack.enter_context(claimed(folder)))
        yield


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


def _check_stages(config: Any, folder: Path, given: Training) -> dict[str, Any] | None:
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
    for name in ("student_a", "student_b", "labelnum", "optimiser"):
        if (theirs := other_settings.get(name, ADDED_FIELDS.get(name))) != getattr(config, name):
            raise UserError(
                f"{where} was trained with {name} {theirs}, not "
                f"{getattr(config, name)}: choose a run of the same --{name}."
            )
    if not other["task"]:
        LOGGER.warning("NOTE: %s does not tell on which data it was trained.", where)
    elif differing := differing_tasks(other["task"], given.facts):
        raise UserError(f"{where} was trained on other data ({differing}): choose a run on these.")
    labelled = other["lists"].get("labelled")
    if labelled is None:
        LOGGER.warning("NOTE: %s does not tell which labelled cases it was trained on.", where)
    elif labelled != checksum_of(given.lists["labelled"]):
        raise UserError(
            f"{where} was trained on other labelled cases than these {config.labelnum}: choose another run, "
            "or restore the lists in data_split/."
        )
    for name in ("seed", "patch_size"):
        theirs, ours = other_settings.get(name), as_plain(getattr(config, name))
        if theirs is not None and theirs != ours:
            LOGGER.info("NOTE: %s was trained with --%s %s, not %s.", where, name, _words(theirs), _words(ours))
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
    return {key: value for key, value in other.items() if key not in ("task", "lists")}


def _words(value: Any) -> str:
    """Return a value as its flag has it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tell_replaced(config: Any, used: dict[str, Any]) -> None:
    """Name the flags that a run's own settings stand in for."""
    given = as_dict(config)
    for name in OF_NETWORKS:
        if given[name] not in (used[name], as_plain(getattr(type(config), name))):
            LOGGER.info("NOTE: --%s is not used: the run's own is %s.", name, used[name])


def test(config: Any, data: Data) -> None:
    """Score a run's best and last students and means, or given weights, in one pass; print and write the tables.

    Args:
        config: the test script's header.
        data: what it names.

    Raises:
        UserError: a checkpoint is missing or does not fit, or the data are not prepared as those trained on.
    """
    device = begin(config, data.check_root)
    weights = find_weights(config, data.name)
    trained = weights.settings
    elsewhere = weights.elsewhere(data.name)
    scored = data.scoring(trained | ({"val_cases": 0} if elsewhere else {}))  # it held out none of these
    for run in weights.runs:
        check_prepared(run, scored.facts, bool(weights.files) or config.run is not None)
    selected_on = weights.selected_on
    if elsewhere and selected_on:
        selected_on += " of the run's own data"
    name = f"{weights.name}_on_{elsewhere}" if elsewhere else weights.name
    predictors = weights.load(scored.task.sizes, device)
    used = as_dict(config) | {key: trained[key] for key in OF_NETWORKS}
    _tell_replaced(config, used)
    LOGGER.info("networks %s and %s, patch_size %s", used["student_a"], used["student_b"], used["patch_size"])
    cases = scored.read_cases()
    planes = used["patch_size"][0] if len(used["patch_size"]) == 3 else used["batch_size"]
    largest = max((case.label.shape for case in cases), key=math.prod)
    kept = predictors.keeping_answer() if config.save_nifti else predictors
    tell_memory_of_test(kept, scored.task.sizes, largest, planes, device)
    results = weights.folder / "test" / results_name(name, scored.split, config)
    names = [case.name for case in cases]
    runs = [] if elsewhere else weights.runs  # another data set's cases may have the same names
    seen = list(dict.fromkeys(one for run in runs for one in trained_among(run, names)))
    validated = [one for run in runs for one in validated_among(run, names)]
    start = weights.start_selected_on
    said = {"split": scored.split, "selected_on": selected_on, "start_selected_on": start, "config": used}
    said["selected_here"] = bool(selected_on) and (selected_on == scored.split or bool(validated))
    said["start_selected_here"] = bool(start and not elsewhere) and (start == scored.split or bool(validated))
    said |= {"environment": first(lambda: environment(device)), "trained_on": seen, "protocol": config.protocol}
    said |= {"method": weights.label, "trained_with": {} if weights.files else trained, "records": weights.records}
    said |= {"commits": sorted({commit for run in weights.runs for commit in commits_of(run)})}
    with claimed_by_first(results):
        test_report(results, predictors, cases, scored.task, said, config.save_nifti)
    if seen:
        LOGGER.warning("NOTE: the run was TRAINED on %d of these cases (%s), which flatters it.", len(seen), _few(seen))
    elif not weights.runs:
        LOGGER.info("NOTE: these files do not tell which cases they were trained on.")
    if sentence := selection_warning(said):
        LOGGER.info("NOTE: %s", sentence)
    part()
