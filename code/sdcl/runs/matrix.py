"""The runs of an experiment and what their folders say of them: methods, labelled counts and seeds, each a training."""

import csv
import importlib.util
import json
import re
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from filelock import FileLock, Timeout

from sdcl.runs.atomic import LOCK
from sdcl.runs.config import as_dict, method_names, parse
from sdcl.runs.errors import UserError
from sdcl.runs.folder import differing_fields, differing_settings, read_config, run_folder, settings_of_test

CODE = Path(__file__).resolve().parents[2]
SCRIPTS = {  # a data set to its scripts, below code/
    "acdc": ("ACDC_train.py", "test_ACDC.py"),
    "la": ("LA_train.py", "test_LA.py"),
    "pancreas": ("pancreas/Pancreas_train.py", "pancreas/test_Pancreas.py"),
    "own": ("own_train.py", "test_own.py"),
}
# What changes a shared stage 1 must agree in: its networks, optimiser and what it alone reads, also by a recipe.
OF_STAGE_ONE = ("recipe", "student_a", "student_b", "optimiser", "pre_iterations", "pre_dice", "foreground_prior")
OWN = ("method", "exp", "labelnum", "seed", "root_path", "models_path", "pretrained")  # fields that the matrix gives
SWITCH = {"yes": True, "true": True, "no": False, "false": False}
DEFAULT_FLAGS = {"select": "last"}  # default of every training unless --flags names another
PACE = re.compile(r" (?P<stage>pre_train|self_train)(?: \d+)?: .*?(?P<seconds>[\d.]+) s an iteration")
LAST = "last.pth"  # checkpoints.LAST, which would import PyTorch
Kind = Literal["absent", "running", "begun", "broken", "trained", "tested"]


@dataclass(frozen=True)
class Spec:
    """A row of the matrix: a method, with changes to its settings.

    Attributes:
        text: as in the header, such as "sdcl:kl_weight=0".
        method: its method.
        changes: further flags, by field.
    """

    text: str
    method: str
    changes: tuple[tuple[str, str], ...]

    @property
    def slug(self) -> str:
        """Its text as a folder's name has it."""
        return re.sub(r"[^\w.]+", "-", self.text)

    def flags(self, header: type) -> list[str]:
        """Return its flags for a training script with this header."""
        return ["--method", self.method, *(word for change in self.changes for word in flag_of(header, *change))]


@dataclass(frozen=True)
class Run:
    """One training of the matrix; without a spec a stage 1 that several share.

    Attributes:
        spec: what it trains; None: stage 1 alone.
        labelnum: labelled cases.
        seed: its seed.
        exp: its --exp.
        folder: its folder.
        flags: of the training script.
        header: what that makes of them.
        needs: the stage 1 that it starts from.
    """

    spec: Spec | None
    labelnum: int
    seed: int
    exp: str
    folder: Path
    flags: tuple[str, ...]
    header: Any = field(compare=False, repr=False)
    needs: "Run | None" = None

    @property
    def title(self) -> str:
        """What lists call it."""
        return f"{self.spec.text if self.spec else 'stage 1'}, {self.labelnum} labelled, seed {self.seed}"


@dataclass(frozen=True)
class State:
    """What a run's files say.

    Attributes:
        kind: "absent"; "running": another process holds it; "begun"; "broken"; "trained"; "tested".
        text: the same for a list.
        left: iterations that are left, by stage.
        other_test: its test has other settings than those asked for.
    """

    kind: Kind
    text: str
    left: dict[str, int]
    other_test: bool = False


def read_spec(text: str) -> Spec:
    """Read "method" or "method:field=value,field=value".

    Raises:
        UserError: says how to write it.
    """
    method, colon, rest = text.partition(":")
    if colon and not rest:
        raise UserError(f"--methods {text}: leave the colon out, or write {method}:field=value.")
    if method not in method_names():
        raise UserError(f"--methods {text}: {method or 'nothing'} is no method: choose of {', '.join(method_names())}.")
    changes = {}
    for part in filter(None, rest.split(",")):
        name, is_there, value = part.partition("=")
        if not is_there or not value or name in OWN:
            raise UserError(f"--methods {text}: write {method}:field=value, of another field than {', '.join(OWN)}.")
        if name.strip() in changes:
            raise UserError(f"--methods {text}: {name.strip()} is given twice: give it once.")
        changes[name.strip()] = value.strip()
    return Spec(text, method, tuple(changes.items()))


def flag_of(header: type, name: str, value: str) -> list[str]:
    """Return the words that give a field a value on a script's command line; of a switch "yes" or "no" is the value.

    Raises:
        UserError: the field is a switch and the value none of its words.
    """
    types = {field.name: field.type for field in fields(header)}
    options = typing.get_args(types.get(name)) or (types.get(name),)
    if bool not in options:
        return [f"--{name}", *value.split()]
    if value.lower() not in SWITCH:
        raise UserError(f"--methods: {name}={value} is none of {', '.join(SWITCH)}: give yes or no.")
    is_on = SWITCH[value.lower()]
    if len(options) > 1:  # a field that may be None takes a word
        return [f"--{name}", str(is_on)]
    return [f"--{name}" if is_on else f"--no-{name}"]


def check_once(name: str, words: Sequence[str]) -> None:
    """Refuse a field of flags that gives a setting twice.

    Raises:
        UserError: names the setting.
    """
    given = [field_of(word).removeprefix("no_") for word in words if word.startswith("--")]
    if twice := [field for field in given if given.count(field) > 1]:
        raise UserError(f"--{name} gives --{twice[0]} twice: give it once.")


def plan(config: Any, data_set: str) -> list[Run]:
    """List the runs of a header's matrix, each stage 1 before those that start from it.

    Args:
        config: experiments.py's header.
        data_set: the data set's name, as run folders carry it.

    Raises:
        UserError: a method or flag that the training script does not know, or one row twice.
    """
    specs = [read_spec(text) for text in config.methods]
    if not re.fullmatch(r"[\w.-]+", config.name):
        raise UserError(f"--name {config.name} is no folder's name: use letters, digits, dots and dashes.")
    further = training_flags(config)
    if given := [word for word in further if word.startswith("--") and field_of(word) in OWN]:
        raise UserError(f"--flags must not give {given[0]}, which the matrix gives: leave it out.")
    for name, values in (
        ("methods", [s.slug for s in specs]),
        ("labelnums", config.labelnums),
        ("seeds", config.seeds),
    ):
        if len(set(values)) < len(values) or not values:
            raise UserError(
                f"--{name} names {'one thing twice: give it once' if values else 'nothing: give at least one'}."
            )
    header = load_script(CODE / SCRIPTS[config.data_set][0]).Config
    runs: dict[str, Run] = {}

    def add(spec: Spec | None, labelnum: int, seed: int, exp: str, more: Sequence[str], needs: Run | None) -> Run:
        where = ["--root_path", str(config.root_path), "--models_path", str(config.models_path)]
        who = ["--exp", exp, "--labelnum", str(labelnum), "--seed", str(seed)]
        flags = [*where, *who, *further, *more]
        if needs is not None:
            flags += ["--pretrained", str(needs.folder)]
        folder = run_folder(config.models_path, data_set, exp, labelnum)
        if str(folder) not in runs:
            runs[str(folder)] = Run(spec, labelnum, seed, exp, folder, tuple(flags), parse(header, flags), needs)
        return runs[str(folder)]

    for labelnum in config.labelnums:
        for seed in config.seeds:
            for spec in specs:
                shared = {name: value for name, value in spec.changes if name in OF_STAGE_ONE}
                of_its_own = "".join(f"-{name}-{value}" for name, value in shared.items())
                more = [word for change in shared.items() for word in flag_of(header, *change)]
                begin = f"{config.name}_stage1{of_its_own}_s{seed}"
                first = add(None, labelnum, seed, begin, [*more, "--self_iterations", "0"], None)
                add(spec, labelnum, seed, f"{config.name}_{spec.slug}_s{seed}", spec.flags(header), first)
    return list(runs.values())


def training_flags(config: Any) -> list[str]:
    """Return the flags of every training: those that an experiment gives by itself, then --flags.

    Raises:
        UserError: a quotation mark is left open.
    """
    further = words_of("flags", config.flags)
    check_once("flags", further)
    given = [field_of(word) for word in further if word.startswith("--")]
    for name, value in DEFAULT_FLAGS.items():
        if name not in given:
            further = [f"--{name}", value, *further]
    return further


def field_of(flag: str) -> str:
    """Return the field that a flag sets: `--pre-dice=whole` sets pre_dice."""
    return flag.removeprefix("--").split("=")[0].replace("-", "_")


def words_of(name: str, text: str) -> list[str]:
    """Split a field of flags into words, as a shell does.

    Raises:
        UserError: a quotation mark is left open.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{name} {text}: {str(error).lower()}: close it.") from None


def load_script(path: Path) -> ModuleType:
    """Import a script for its header."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def state_of(run: Run, results: str, settings: Mapping[str, Any] | None = None) -> State:
    """Derive a run's state from its files.

    Args:
        run: which.
        results: the name of its test's folder; not asked of a stage 1.
        settings: the test's, from settings_of_test(): a test with others does not count; None: any test counts.
    """
    config = as_dict(run.header)
    stages = {"pre_train": config["pre_iterations"]} if run.spec is None else {"self_train": config["self_iterations"]}
    if not (run.folder / "config.json").exists():
        return State("absent", "absent", stages)
    try:
        kept = read_config(run.folder)
    except UserError as error:
        return State("broken", f"broken: {error}", stages)
    # Own data fill in what is None; the folder of stage 1 may have moved together with the run.
    wanted = {name: value for name, value in config.items() if value is not None or kept.get(name) is None}
    wanted.pop("pretrained", None)
    if differing := differing_fields({k: v for k, v in kept.items() if k in wanted}, wanted):
        return State("broken", f"broken: another configuration ({differing})", stages)
    (stage, planned), folder = next(iter(stages.items())), run.folder / next(iter(stages))
    done = iterations(folder)
    left = {stage: max(planned - done, 0)}
    if is_claimed(run.folder):
        return State("running", f"running: {stage} at {done} of {planned}", left)
    if wrong := sorted(folder.glob("nonfinite_*.pth")):
        return State("broken", f"broken: {wrong[0].name} in {stage}", left)
    last = folder / LAST
    if done < planned or not _is_saved(folder, planned):
        unsaved = "" if last.exists() else ", nothing of it saved yet"
        return State("begun", f"{stage} at {done} of {planned}{unsaved}", left if last.exists() else stages)
    summary = run.folder / "test" / results / "summary.json"
    if run.spec is not None and summary.exists() and summary.stat().st_mtime_ns >= last.stat().st_mtime_ns:
        try:
            tested = settings_of_test(json.loads(summary.read_text(encoding="utf-8")).get("config") or {})
        except (OSError, ValueError, AttributeError):
            return State("trained", f"trained; {summary} cannot be read", {})
        if differing := differing_settings(tested, settings or {}):
            return State("trained", f"trained; tested with other settings ({differing})", {}, other_test=True)
        return State("tested", "tested", {})
    return State("trained", "trained", {})


def _is_saved(folder: Path, planned: int) -> bool:
    """Tell whether a stage whose rows are all there has its last checkpoint too."""
    last = folder / LAST
    if not last.exists():
        return False
    if last.stat().st_mtime_ns >= (folder / "metrics.csv").stat().st_mtime_ns:
        return True
    # Rows come to the disk first: a kill came between, or the folder was copied. The checkpoint knows.
    from sdcl.checkpoints import load  # takes a second, which other states need not wait for

    try:
        return load(last).get("iteration") == planned
    except UserError:
        return False


def is_finished(run: Run, state: State) -> bool:
    """Tell whether nothing of a run is missing."""
    return state.kind == ("trained" if run.spec is None else "tested")


def is_claimed(folder: Path) -> bool:
    """Tell whether another process trains in a run's folder."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def iterations(folder: Path) -> int:
    """Return the last iteration that a stage's metrics.csv tells of; 0 without one."""
    try:
        with open(folder / "metrics.csv", encoding="utf-8", errors="replace", newline="") as file:
            numbers = [row.get("iteration") or "" for row in csv.DictReader(file)]
    except OSError:
        return 0
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def pace(folder: Path, stage: str) -> float | None:
    """Return the seconds an iteration that a stage's log.txt tells last; None without one."""
    try:
        text = (folder / stage / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = [match["seconds"] for match in PACE.finditer(text) if match["stage"] == stage]
    return float(found[-1]) if found else None


def seconds_left(run: Run, state: State, runs: Sequence[Run]) -> float | None:
    """Return the time that a run still needs: its pace, or that of its row's others, times what is left."""
    total = 0.0
    for stage, left in state.left.items():
        alike = [one for one in runs if (one.spec and one.spec.text) == (run.spec and run.spec.text)]
        paces = [found for one in [run, *alike] if (found := pace(one.folder, stage)) is not None]
        if left and not paces:
            return None
        total += left * paces[0] if left else 0.0
    return total
