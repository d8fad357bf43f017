"""Train and test a matrix of methods, labelled counts and seeds: `python code/experiments.py run`; see its header."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from tyro.conf import Positional

from dataloaders.roots import check_root
from sdcl.runs.config import as_dict, parse, run_script
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, duration, results_name, settings_of_test, start_logging
from sdcl.runs.matrix import (
    CODE,
    SCRIPTS,
    Run,
    check_once,
    is_finished,
    load_script,
    plan,
    seconds_left,
    state_of,
    words_of,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Train what is missing of a matrix, say how far it is, and print its table with intervals and tests.

    What to do is one of five words. "list" shows each run's state and the time it still needs. "run" does what is
    missing and nothing else; given again it goes on, and several of them at once share the work. "slurm" submits an
    array of jobs that do so. "table" compares what is tested; docs/statistics.md explains its columns. "report" makes a
    page of it too, with pictures and training curves.
    """

    action: Positional[Literal["list", "run", "slurm", "table", "report"]]  # what to do

    # --- the matrix ---
    name: str = "matrix"  # of the experiment: begins each run's --exp
    data_set: Literal["acdc", "la", "pancreas", "own"] = "acdc"  # whose scripts
    root_path: Path | None = None  # the data set's folder; None: Datasets/<data_set>
    models_path: Path = ROOT / "models"  # where the runs are, and the tables, in <name>/
    methods: tuple[str, ...] = ("supervised", "bcp", "sdcl")  # with changes: sdcl:kl_weight=0,mse_weight=0
    labelnums: tuple[int, ...] = (7,)  # labelled cases or patients
    seeds: tuple[int, ...] = (1337, 1, 2)  # those of one seed and labelled count share one stage 1
    flags: str = ""  # more flags for every training; --select last is added unless given: --flags="--patch_size 64 64"
    test_flags: str = ""  # further flags of every test: --test_flags="--split val"

    # --- the table ---
    checkpoint: Literal["last", "best"] = "last"  # best: the one selected; on what, the table says
    predictors: Literal["answer", "all"] = "answer"  # answer: each method's own, such as the mean of both students
    reference: str = "sdcl"  # the row that the others are compared with: a method, or method/predictor

    # --- machine ---
    slots: int = 0  # runs at a time; 0: as many as there are GPUs for, or one
    processes: int = 1  # that train one run together: torchrun's, or in a SLURM job of several nodes srun's
    wait: bool = True  # for runs that another process has; --no-wait leaves them to it

    # --- SLURM ---
    jobs: int = 4  # of the array, which share the work
    sbatch: str = "--time=24:00:00"  # further flags of sbatch: --sbatch="--time=24:00:00 --gpus=1"
    repeats: int = 3  # arrays that follow, each when the one before has ended, however it ended
    signal_minutes: int = 5  # before a job's time is up its runs are asked to save and stop
    dry_run: bool = False  # print the batch script, submit nothing


def main(config: Config) -> None:
    """List, run or compare."""
    start_logging()
    for name, least in (("slots", 0), ("processes", 1), ("jobs", 1), ("repeats", 0), ("signal_minutes", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} is {getattr(config, name)}: it must be at least {least}.")
    config.root_path = config.root_path or ROOT / "Datasets" / config.data_set
    check_root(config.data_set, config.root_path)
    runs = plan(config, data_set_name(config))
    if config.action == "list":
        show(config, runs)
    elif config.action == "run":
        run(config, runs)
    elif config.action == "slurm":
        from sdcl.runs.slurm import submit

        results_of(config, runs)  # for its refusals
        submit(config, Path(__file__).resolve(), config.dry_run)
    else:
        compare(config, runs)


def data_set_name(config: Config) -> str:
    """Return the data set's name as run folders carry it."""
    if config.data_set != "own":
        return config.data_set
    return str(json.loads((config.root_path / "dataset.json").read_text(encoding="utf-8"))["name"])


def test_flags(config: Config, run: Run) -> list[str]:
    """Return a run's test's flags."""
    where = ["--root_path", config.root_path, "--models_path", config.models_path, "--exp", run.exp]
    return [*map(str, where), "--labelnum", str(run.labelnum), *words_of("test_flags", config.test_flags)]


def results_of(config: Config, runs: list[Run]) -> tuple[str, str, dict[str, Any]]:
    """Return the name of the tests' folders, the volumes' name and the tests' settings, by the test script's header."""
    header = load_script(CODE / SCRIPTS[config.data_set][1]).Config
    check_once("test_flags", words_of("test_flags", config.test_flags))
    given = parse(header, test_flags(config, runs[0]))
    if given.stage != "self_train":
        raise UserError("--test_flags must not choose another --stage: the table is of self-training.")
    split = getattr(given, "split", "test")
    return results_name("self_train", split, given), split, settings_of_test(as_dict(given))


def show(config: Config, runs: list[Run]) -> None:
    """Print each run's state and what is left."""
    results, _, settings = results_of(config, runs)
    total, is_known = 0.0, True
    for run in runs:
        state = state_of(run, results, settings)
        left = seconds_left(run, state, runs)
        total, is_known = total + (left or 0.0), is_known and left is not None
        time = ", time unknown" if left is None else f", {duration(left)} left" if left else ", its test is left"
        time = "" if is_finished(run, state) else time
        LOGGER.info("%-60s %s%s", run.title, state.text, time)
    known = f"{duration(total)} of training" if is_known or total else "an unknown time, since no run has begun"
    LOGGER.info("left: %s%s", "" if is_known or not total else "at least ", known)


def run(config: Config, runs: list[Run]) -> None:
    """Do what is missing."""
    import torch  # takes a second, which a wrong flag need not wait for

    from sdcl.methods import check_settings
    from sdcl.runs.launch import Launcher, Machine
    from sdcl.runs.slurm import check_processes, nodes_of_job

    results, _, settings = results_of(config, runs)
    gpus = torch.cuda.device_count()
    for one in runs:
        if one.spec is not None:  # the runs print settings that only stage 1 reads
            check_settings(dataclasses.replace(one.header, pretrained=None))
    asked = "CUDA_VISIBLE_DEVICES" in os.environ  # then it is somebody's choice
    slots = config.slots or (1 if nodes_of_job() > 1 else max(gpus // config.processes, 1))
    check_processes(config.processes, slots)
    machine = Machine(slots, 0 if asked else gpus, config.wait, config.processes)
    scripts = [CODE / script for script in SCRIPTS[config.data_set]]
    launcher = Launcher(
        runs, lambda run: state_of(run, results, settings), lambda run: test_flags(config, run), scripts, machine,
        config.models_path / config.name / "logs",
    )  # fmt: skip
    if failed := launcher.run():
        raise UserError(
            f"{failed} of {len(runs)} runs failed, see above: mend the cause and give the same command again."
        )
    if launcher.waiting:
        LOGGER.info("%d runs are left to other processes", len(launcher.waiting))
        return
    LOGGER.info("nothing is missing: python code/experiments.py table, with the same flags, shows it")


def patient_of(config: Config) -> Callable[[str], str]:
    """Return what maps a volume's name to its patient's, as the data set has it: of ACDC two volumes are one's."""
    from dataloaders import acdc, la, pancreas
    from dataloaders.own import read_data_set

    known = {"acdc": acdc, "la": la, "pancreas": pancreas}
    own = config.data_set == "own"
    return (read_data_set(config.root_path) if own else known[config.data_set].DATA_SET).patient_of


def compare(config: Config, runs: list[Run]) -> None:
    """Print the table and write it; with its page, if asked for."""
    from sdcl.runs.costs import costs_of, said_of  # these take seconds, which a wrong flag need not wait for
    from sdcl.scoring.comparison import entries_of, make_rows, reference_of, write_table
    from sdcl.scoring.fingerprint import check_alike
    from sdcl.scoring.matrix_page import Compared, write_all_cases, write_matrix_page

    results, split, settings = results_of(config, runs)
    states = [(run, state_of(run, results, settings)) for run in runs if run.spec]
    if others := [f"{run.title}: {state.text}" for run, state in states if state.other_test]:
        raise UserError(
            f"{others[0]}{f' (and {len(others) - 1} more runs)' if len(others) > 1 else ''}: give the --test_flags of "
            "these tests, or run, which tests them again."
        )
    tested = [run for run, state in states if state.kind == "tested"]
    unread = [run for run, state in states if state.kind == "broken"]
    broken = [f"{run.title}: {state.text}" for run, state in states if state.kind == "broken"]
    if not tested and broken:
        raise UserError(f"no run of {config.name} is tested; {broken[0]}. Give the flags that the runs have, or run.")
    if not tested:
        raise UserError(
            f"no run of {config.name} is tested: python code/experiments.py run, with the same flags, first."
        )
    fingerprint, without_checksums = check_alike({run.title: run.folder / "test" / results for run in tested})
    of_patient = patient_of(config)
    entries = entries_of(tested, results, config)
    reference = reference_of(entries, config.reference)
    rows = [replace(row, fingerprint=fingerprint) for row in make_rows(entries, of_patient, reference)]
    folder = config.models_path / config.name
    cases = {case for e in entries for by in e.scores.values() for values in by.values() for case in values}
    number = f"n = {len(cases)} volumes of {len(set(map(of_patient, cases)))} patients"
    head = said_of(config, tested, results, split)
    head.append(
        f"{number}; test flags {' '.join(config.test_flags.split()) or 'none'}; cases and references {fingerprint}."
    )
    if without_checksums:
        head.append(
            f"{len(without_checksums)} of {len(tested)} tests, of an earlier version, have no checksums of their "
            "references."
        )
    if broken:
        head.append(f"WARNING: {len(broken)} of {len(states)} runs are left out; {broken[0]}.")
    for labelnum in config.labelnums:
        if not any(run.labelnum == labelnum for run in tested):
            head.append(f"{labelnum} labelled: no run is tested yet.")
    head.append(f"Differences are to {reference}.")
    compared = Compared(entries, rows, head, costs_of([run for run in runs if run not in unread]), reference)
    print(write_table(folder, rows, head, compared.costs))
    write_all_cases(folder / "cases.csv", tested, results)
    names = ["table.csv", "table.json", "table.md", "table.tex", "cases.csv"]
    if config.action == "report":
        names += write_matrix_page(folder, config, tested, results, compared)
    LOGGER.info("written to %s: %s", folder, ", ".join(names))


if __name__ == "__main__":
    run_script(main, Config)
