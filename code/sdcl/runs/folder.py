"""A run's folder: its configuration, its logs, its scalars."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdcl.runs.atomic import write_text
from sdcl.runs.config import as_dict, ramp_length
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import check_replaceable

if TYPE_CHECKING:
    import torch

NETWORKS = ("vnet", "resvnet", "unet", "resunet", "vnet_lowres", "resvnet_lowres")  # by their names in config.json
# Fields that say where and how a run is carried out, not what it computes, or name what other fields say: they may
# change when it goes on.
MACHINE_FIELDS = frozenset(
    {
        "root_path", "models_path", "device", "gpu", "cache_gb", "log_every", "save_every", "save_minutes",
        "window_batch", "workers", "recipe", "cuda_graphs",
    }
)  # fmt: skip
# Fields of a test script that name the weights, which the run's own stand in for, or that change no score.
NOT_OF_SCORES = frozenset(
    {
        "exp", "labelnum", "run", "student_a_weights", "student_b_weights", "student_a", "student_b", "patch_size",
        "predictors", "save_nifti", "batch_size",
    }
)  # fmt: skip
# Fields that earlier versions lacked, as they computed.
ADDED_FIELDS = {
    "method": "sdcl", "correct": "discrepancy", "largest_component": "yes", "teacher_dropout": "yes",
    "consistency_weight": 0.1, "rampup": None, "noise": 0.1, "passes": 8, "paste": "yes",
    "lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0, "dropout": 1.0, "ema_warmup": False,
    "average_decay": 0.0, "intensity": 0.0, "foreground_prior": 0.0, "recipe": "published", "optimiser": "adam",
}  # fmt: skip
COMPLETED_LATER = frozenset({"orientation", "slice_axis", "label_values"})  # facts that earlier versions lacked
PACKAGES = ("torch", "numpy", "scipy", "h5py", "connected-components-3d")
MAX_CONFIG_BYTES = 2**24  # of config.json, which grows by half a kilobyte at each resume
MAX_SIDE = 2**14  # of a patch in a config.json, in pixels
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
ECHO_SECONDS = 60.0  # so long torchrun's own signal counts as the echo of one that came before
STAGE_FILES = [f"{stage}/*.{kind}" for stage in ("pre_train", "self_train") for kind in ("pth", "csv", "txt", "json")]
LOGGER = logging.getLogger("sdcl")


def duration(seconds: float) -> str:
    """Return a time as hours and minutes, a short one in seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def write_csv(path: Path, rows: list[dict[str, Any]], is_known: bool = False) -> None:
    """Write rows with the first one's keys as columns, whole or not at all; nothing for no rows.

    With `is_known` the caller has read the file that is there, and its rows are among these.
    """
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(_csv_field(row[key]) for key in rows[0]) for row in rows]
    write_text(path, "".join(f"{line}\n" for line in lines), is_known=is_known)


def _csv_field(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def _git(root: Path, *arguments: str) -> str:
    """Return what git says of the repository."""
    run = ["git", "-C", str(root), *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def environment(device: "torch.device") -> dict[str, Any]:
    """Collect what is needed to run an experiment again: commit, versions, device."""
    import torch  # here alone, so that what needs no network starts at once

    from sdcl import ranks

    root = Path(__file__).resolve().parents[3]
    try:
        commit = _git(root, "describe", "--always", "--dirty", "--abbrev=40")
        if not commit.endswith("-dirty") and _git(root, "status", "--porcelain", "--", "code", "dataloaders"):
            commit += "-dirty"  # a file that git does not know, such as a method of one's own
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "commit": commit,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": ranks.count(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
    }


def run_folder(models_path: Path, data_set: str, exp: str, labelnum: int) -> Path:
    """Return a run's folder: models_path/<data set>_<exp>_<labelnum>_labeled."""
    return models_path / f"{data_set}_{exp}_{labelnum}_labeled"


def results_name(weights: str, split: str, config: Any) -> str:
    """Name the folder of a test's results, so that each way to test has one of its own.

    Args:
        weights: what is scored: a stage, or given files.
        split: the volumes' name.
        config: the test's header; what differs from the published way is named.
    """
    chosen = ["paper"] if config.protocol == "paper" else []
    chosen += ["gaussian"] if getattr(config, "window_weighting", "") == "gaussian" else []
    chosen += [name for name in ("tta", "largest_component") if getattr(config, name, False)]
    chosen += ["-".join(config.predictors)] if getattr(config, "predictors", ()) else []
    return "_".join([weights, split, *chosen])


def settings_of_test(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of a test script that its scores depend on, beside the weights and the data."""
    return {name: value for name, value in config.items() if name not in MACHINE_FIELDS | NOT_OF_SCORES}


def differing_settings(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings two tests differ in, as far as both tell; "" if they do not."""
    names = [name for name in there if name in now and there[name] != now[name]]
    return ", ".join(f"{name} {there[name]} there, {now[name]} now" for name in names)


def find_run(config: Any, data_set: str) -> tuple[Path, dict[str, Any]]:
    """Return the run's folder that a test's header names, and the settings that it was trained with.

    `--run` names a folder, else `--exp` and `--labelnum` do. With weights given in files, the folder is student a's and
    the settings are the header's own.

    Raises:
        UserError: there is no such run or file, or only one of the two weights' files is given.
    """
    files = (config.student_a_weights, config.student_b_weights)
    if any(files) and not all(files):
        raise UserError("--student_a_weights and --student_b_weights belong together: give both or none.")
    run = getattr(config, "run", None)
    if run is not None and all(files):
        raise UserError("--run and --student_a_weights both say what to score: give one of them.")
    if run is not None:
        if not (run / "config.json").is_file():
            raise UserError(f"--run {run} is no run's folder ({known_runs(run.parent)}): give one of these.")
        return run, read_config(run)
    if all(files):
        for name, path in zip(("student_a", "student_b"), files, strict=True):
            if not path.is_file():
                raise UserError(f"--{name}_weights {path} does not exist: give the path of a checkpoint.")
        return config.student_a_weights.resolve().parent, as_dict(config)
    folder = run_folder(config.models_path, data_set, config.exp, config.labelnum)
    return folder, read_config(folder)


def known_runs(models_path: Path) -> str:
    """Name the runs in a folder of models, for a message."""
    names = sorted(path.parent.name for path in models_path.glob("*/config.json")) if models_path.is_dir() else []
    return (
        f"{models_path} holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        if names
        else (f"{models_path} holds no run")
    )


@dataclass(frozen=True)
class Reads:
    """What a run reads, as its config.json keeps it.

    Attributes:
        lists: the cases, by what they are for; their checksums are kept.
        task: what else prediction needs: classes, preprocessing.
        trained_on: the cases that training reads, as tests name them.
        pretrained: of the run whose pre-training this one starts from, what inherited() says.
    """

    lists: Mapping[str, Sequence[str]]
    task: dict[str, Any]
    trained_on: Sequence[str] = ()
    pretrained: dict[str, Any] | None = None


def _differing_environments(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which of the things that change a run's last digits differ between two starts, as far as both tell."""

    def told(environment_: Mapping[str, Any]) -> dict[str, Any]:
        packages = environment_.get("packages")
        version = packages.get("torch") if isinstance(packages, dict) else None
        values = {"PyTorch": version, "device": environment_.get("device"), "threads": environment_.get("threads")}
        return values | {"processes": environment_.get("processes")}

    one, other = told(earlier), told(now)
    names = [name for name in one if None not in (one[name], other[name]) and one[name] != other[name]]
    return ", ".join(f"{name} {other[name]} instead of {one[name]}" for name in names)


def checksum_of(cases: Sequence[str]) -> str:
    """Return the checksum of a list of cases that config.json keeps."""
    return hashlib.sha256("\n".join(cases).encode()).hexdigest()


def open_run(folder: Path, config: dict[str, Any], reads: Reads, device: "torch.device") -> None:
    """Create a run's folder with its config.json, or check that the one there is of the same run.

    Args:
        folder: models/<data set>_<exp>_<labelnum>_labeled.
        config: from config.as_dict.
        reads: the cases and data.
        device: where the run computes.

    Raises:
        UserError: the folder holds a run of another configuration or other cases, and the message names what differs;
            or it holds a file of the user's where the run would write.
    """
    path, now = folder / "config.json", environment(device)
    sums = {name: checksum_of(cases) for name, cases in reads.lists.items()}
    content = {"config": config, "task": reads.task, "lists": sums, "environment": now, "resumed": []}
    content["trained_on"] = list(dict.fromkeys([*reads.trained_on, *(reads.pretrained or {}).get("trained_on", ())]))
    content["pretrained"] = reads.pretrained
    content["validation_cases"] = list(reads.lists.get("validation", ()))
    if path.exists():
        content = _read_content(path)
        differing = differing_fields(content["config"], config)
        if differing:
            raise UserError(
                f"{folder} holds a run of another configuration ({differing}): "
                "choose another --exp, restore these fields to go on with it, or remove the folder."
            )
        changed = [name for name, kept in content.setdefault("lists", sums).items() if sums.get(name) != kept]
        if changed:
            raise UserError(
                f"{folder} holds a run on other {' and '.join(changed)} cases: restore the lists in data_split/ "
                "to go on with it, choose another --exp, or remove the folder."
            )
        facts = json.loads(json.dumps(reads.task))
        if differing := differing_tasks(content.setdefault("task", facts), facts):
            raise UserError(
                f"{folder} holds a run on data that were preprocessed in another way ({differing}): restore the data "
                "to go on with it, choose another --exp, or remove the folder."
            )
        content["task"] = facts
        if lengthened(content["config"], config):
            done, asked = content["config"]["self_iterations"], config["self_iterations"]
            LOGGER.info(
                "self-training was planned with %d iterations and goes on to %d; its validation at %d, if there was "
                "one, stays", done, asked, done,
            )  # fmt: skip
            content["config"] |= {"self_iterations": asked, "rampup": config.get("rampup")}  # as it was, made explicit
            content.setdefault("lengthened", []).append({"from": done, "to": asked})
        earlier = [content.get("environment"), *content["resumed"]][-1]
        if isinstance(earlier, dict) and (changed_machine := _differing_environments(earlier, now)):
            LOGGER.info("NOTE: this run resumes with %s: results may differ in the last digits.", changed_machine)
        content["resumed"].append(now)
    check_replaceable(path, *(file for kind in STAGE_FILES for file in folder.glob(kind)))
    write_text(path, json.dumps(content, indent=2) + "\n", any_content=True)


def differing_fields(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Say which fields that matter to a run's result differ between two configurations; "" if none does.

    A longer self-training is the same run going on where the learning rate is constant; a ramp's length is a field.
    """
    there, now = ({**ADDED_FIELDS, **fields} for fields in (there, now))
    for fields in (there, now):
        if isinstance(fields.get("pretrained"), str):  # the same folder, however it is written
            fields["pretrained"] = str(Path(fields["pretrained"]).resolve())
    for one, other in ((there, now), (now, there)):  # earlier versions did not resolve it
        if one.get("rampup") is None and other.get("rampup") is not None and one.get("self_iterations"):
            one["rampup"] = ramp_length(None, one["self_iterations"])
    names = [k for k in sorted({*there, *now} - MACHINE_FIELDS) if there.get(k) != now.get(k)]
    names = [k for k in names if not (k == "self_iterations" and lengthened(there, now))]
    return ", ".join(f"{k} {there.get(k)} there, {now.get(k)} now" for k in names)


def lengthened(there: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether a configuration asks for a longer self-training than another one, of a rate that does not fall."""
    if now.get("lr_schedule", "constant") != "constant":
        return False
    lengths = [fields.get("self_iterations") for fields in (there, now)]
    return all(isinstance(length, int) for length in lengths) and 0 < lengths[0] < lengths[1]


def differing_tasks(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Say how the data of two runs, or of a run and a test, differ; "" if they do not, as far as both tell.

    Args:
        there: what a run's config.json keeps of its data set, as from DataSet.facts().
        now: the same of other data. How decisions are made is no property of the data and may differ.
    """
    pairs = [(name, there.get(name), now.get(name)) for name in ("name", "class_names", "label_values")]
    steps = [task.get("preprocessing") for task in (there, now)]
    if all(isinstance(step, dict) for step in steps):
        pairs += [(name, steps[0].get(name), steps[1].get(name)) for name in dict.fromkeys([*steps[1], *steps[0]])]
    else:
        pairs.append(("preprocessing", *steps))
    plain = [(name, *json.loads(json.dumps([one, two]))) for name, one, two in pairs]
    return ", ".join(
        f"{name} {one} there, {two} now"
        for name, one, two in plain
        if one != two and not (name in COMPLETED_LATER and None in (one, two))
    )


def inherited(folder: Path) -> dict[str, Any]:
    """Return what a run takes over from the one that its --pretrained names: folder, commit, cases trained on.

    Raises:
        UserError: there is no such run.
    """
    content = _read_content(folder / "config.json")
    environment_ = content.get("environment") if isinstance(content.get("environment"), dict) else {}
    known = [name for name in content.get("trained_on") or () if isinstance(name, str)]
    return {
        "folder": str(folder.resolve()),
        "commit": environment_.get("commit"),
        "select": content["config"]["select"],
        "pre_iterations": content["config"].get("pre_iterations"),
        "task": content.get("task") if isinstance(content.get("task"), dict) else {},
        "trained_on": known,
        "validation_cases": content.get("validation_cases"),
        "lists": content.get("lists", {}),
    }


def pretrained_folder(folder: Path) -> Path | None:
    """Return the folder of the run whose stage 1 a run started from, as its config.json keeps it; None of its own."""
    kept = _read_content(folder / "config.json").get("pretrained")
    return Path(kept["folder"]) if isinstance(kept, dict) and isinstance(kept.get("folder"), str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that a run was started with.

    Raises:
        UserError: there is no readable config.json in the folder.
    """
    return _read_content(folder / "config.json")["config"]


def commits_of(folder: Path) -> list[str]:
    """Return the commits that a run was begun and gone on with, as its config.json tells."""
    content = _read_content(folder / "config.json")
    times = [content.get("environment"), *content["resumed"]]
    return [str(one["commit"]) for one in times if isinstance(one, dict) and "commit" in one]


def _read_content(path: Path) -> dict[str, Any]:
    """Return what a run's config.json holds, checked, since it may come from anywhere."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["config"]
        patch_size = config["patch_size"]
        is_sound = (
            all(config[name] in NETWORKS for name in ("student_a", "student_b"))
            and all(isinstance(config[name], str) for name in ("student_a", "student_b", "select"))
            and isinstance(config["labelnum"], int)
            and isinstance(patch_size, list)
            and len(patch_size) in (2, 3)
            and all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in patch_size)
            and isinstance(content.get("lists", {}), dict)
            and isinstance(content.setdefault("resumed", []), list)
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: train first, or give the run's --exp, --labelnum and --models_path "
            f"({known_runs(path.parent.parent)})."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{path} cannot be read: restore it from a copy, or remove the folder and train again.")
    return content


def read_task(folder: Path) -> dict[str, Any]:
    """Return what a run's config.json keeps of its data set: classes, decision rule, preprocessing.

    Raises:
        UserError: it keeps nothing of the kind.
    """
    task = known_task(folder)
    if task is None:
        raise UserError(f"{folder / 'config.json'} has no `task`: start the run's training once more, which adds it.")
    return task


def sizes_of(task: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of classes, background included, and of channels of the data that config.json tells of."""
    channels = (task.get("preprocessing") or {}).get("channels") or ("image",)
    return len(task.get("class_names") or ("foreground",)) + 1, len(channels)


def known_task(folder: Path) -> dict[str, Any] | None:
    """Return what read_task() does; None of a run of an earlier version, which kept nothing of the kind."""
    task = _read_content(folder / "config.json").get("task")
    return task if isinstance(task, dict) else None


def trained_among(folder: Path, cases: Sequence[str]) -> list[str]:
    """Return those cases that a run was trained on, as far as its config.json tells."""
    path = folder / "config.json"
    trained_on = _read_content(path).get("trained_on") if path.exists() else None
    known = {name for name in trained_on if isinstance(name, str)} if isinstance(trained_on, list) else set()
    return [name for name in cases if name in known]


def start_selected_on(folder: Path) -> str | None:
    """Return which cases stage 1's best checkpoints were selected on, if a run's self-training started from them.

    Returns:
        "test" or "val"; None where self-training started from stage 1's last checkpoint.
    """
    content = _read_content(folder / "config.json")
    own, kept = content["config"]["select"], content.get("pretrained")
    if own == "last":
        return None
    select = kept.get("select") or own if isinstance(kept, dict) else own
    return "test" if select == "test" else "val"


def validated_among(folder: Path, cases: Sequence[str]) -> list[str]:
    """Return those cases that a run was validated on, its stage 1 included, as far as its config.json tells."""
    content = _read_content(folder / "config.json")
    kept = content.get("pretrained")
    known = [content.get("validation_cases"), kept.get("validation_cases") if isinstance(kept, dict) else None]
    names = {name for one in known if isinstance(one, list) for name in one if isinstance(name, str)}
    if cases and content.get("lists", {}).get("validation") == checksum_of(cases):  # earlier versions kept nothing else
        names |= set(cases)
    return [name for name in cases if name in names]


class _TqdmHandler(logging.Handler):
    """Prints log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        # Whoever read the pipe is gone, or the terminal cannot show a letter: log.txt has the line.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stdout)


def start_logging() -> None:
    """Send log lines to the terminal, once."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    if not any(isinstance(handler, _TqdmHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_TqdmHandler())


class StopRequest:
    """Turns a signal to end into a wish to stop after this iteration; a second one stops at once.

    Under torchrun a second one within a minute is taken for torchrun's echo of the first and changes nothing.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal was closed; not under nohup, which has it ignored), and SIGUSR1 and
    SIGUSR2, which clusters send before a job's time is up.

    Attributes:
        code: the exit status to end with, 128 + the signal's number; 0 while nobody asked.
    """

    def __init__(self) -> None:
        self.code, self._asked_at = 0, 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Take over the signals; only the main thread can, elsewhere they stay as they are."""
        if threading.current_thread() is threading.main_thread():
            known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]  # Windows has few
            # nohup ignores SIGHUP; a shell's background jobs ignore SIGINT too, but may be asked to stop by it.
            heard = [n for n in known if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
            self._earlier = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.code:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._asked_at < ECHO_SECONDS:
                return
            sys.exit(self.code)
        self.code, self._asked_at = 128 + number, time.monotonic()
        LOGGER.info("asked to stop: finishing this iteration and saving (again: stop at once)")
