"""From a script's header to a checked configuration: command line, help, common refusals; without PyTorch."""

import codecs
import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from sdcl.runs.interrupt import allow_interrupts, end_on_interrupt  # first, since the next import takes a while

end_on_interrupt()

import tyro  # noqa: E402

from sdcl.runs.errors import UserError  # noqa: E402

Config = TypeVar("Config")
POSITIVE_FIELDS = (
    "batch_size", "window_batch", "base_lr", "log_every", "save_every", "labelled_repeat",
    "unlabelled_repeat", "late_val_every", "passes", "workers",
)  # fmt: skip
NON_NEGATIVE_FIELDS = (
    "pre_iterations", "self_iterations", "u_weight", "mse_weight", "kl_weight", "seed", "gpu", "cache_gb", "val_cases",
    "pre_val_from", "pre_val_every", "self_val_every", "late_val_from", "max_angle_deg",
    "save_minutes", "consistency_weight", "rampup", "noise", "warmup", "weight_decay",
)  # fmt: skip
METHODS = Path(__file__).resolve().parents[1] / "methods"  # a file each
RAMP_SHARE = 0.4  # of self-training: the ramp of what unlabelled images say, where no length is given
HALVINGS = 4  # of their input by the networks
LOWRES = "_lowres"  # at the end of the names of those that halve it once more
GROUP = re.compile(r"\s*# --- (?P<title>[^(]*?)\s*(?:\((?P<remark>.*)\))?\s*---\s*$")  # a heading in a header
FIELD = re.compile(r"    (?P<name>\w+): ")
COMMENT = re.compile(r"  # (?P<text>.*)$")
PLAIN = {"±": "+-", "×": "x", "…": "...", "°": " deg", "µ": "u"}  # what a terminal without UTF-8 shows instead


# What a device or another process says, and what to tell of it; of PyTorch's errors, which is not imported here.
TOLD = (
    (
        ("deterministic", "use_deterministic_algorithms"),
        "--deterministic: {first}: run without it, or on --device cpu.",
    ),
    (
        ("device-side assert",),
        "a check on the GPU failed, most often of a label outside the classes: run on --device cpu, which says where.",
    ),
    (
        ("CUDA", "driver"),
        "PyTorch cannot use the GPU's driver ({first}): update the driver, install the PyTorch that fits it "
        "(docs/installing.md), or give --device cpu.",
    ),
    (
        ("DataLoader worker",),
        "a process that prepares batches ended ({first}): give --workers 1, or more room in /dev/shm.",
    ),
    (
        ("gloo",),
        "another process of this run ended or is out of reach; what it said stands above or in its own log. "
        "The same command goes on from the last save.",
    ),
    (
        ("NCCL",),
        "another process of this run ended or is out of reach ({first}); what it said stands above or in its own log. "
        "The same command goes on from the last save.",
    ),
)


def ramp_length(rampup: int | None, iterations: int) -> int:
    """Return the ramp's length T, iterations: what the header says, else two fifths of self-training's."""
    return round(RAMP_SHARE * iterations) if rampup is None else rampup


def processes() -> int:
    """Return how many processes torchrun, or else an srun, has started for this run, by the environment."""
    named = "WORLD_SIZE" if env_text("RANK") and env_text("WORLD_SIZE") else "SLURM_STEP_NUM_TASKS"
    return env_number(named, 1)


def env_text(name: str) -> str:
    """Return an environment variable; an empty one counts as not set."""
    return os.environ.get(name, "").strip()


def env_number(name: str, otherwise: int) -> int:
    """Return an environment variable's whole number, or another one where it is not set.

    Raises:
        UserError: it is no whole number.
    """
    text = env_text(name)
    if text and not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a whole number: unset it.")
    return int(text) if text else otherwise


def run_script(main: Callable[[Any], None], config_class: type) -> None:
    """Parse the command line into the header's dataclass and call main; a UserError ends in one sentence.

    Args:
        main: the script's main, called with an instance of config_class.
        config_class: the header; its docstring describes the script on the command line's help page.
    """
    make_output_safe()
    try:
        allow_interrupts()
        processes()  # raises a UserError for a malformed variable
        main(parse(config_class, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if not end.code:  # the help was asked for
            end_if_output_is_closed()
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            end_if_output_is_closed()
        told = _told(error)
        if _is_single_process():
            if told is None:
                raise
            sys.exit(f"error: {told}")
        if told is None:
            traceback.print_exc()
        rank = env_text("RANK") or env_text("SLURM_PROCID") or "0"
        who = "error" if rank == "0" else f"error in process {rank}"
        print(f"{who}: {told or error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # at once: what ends a process in order would wait for the others


def end_if_output_is_closed() -> None:
    """Exit silently if the reader of standard output has gone, as in `--help | head -1`."""
    is_closed = False
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no poll on Windows, no number of a captured output
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        is_closed = any(state & select.POLLERR for _, state in output.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at its end
        sys.exit(141)  # as a shell reports the signal that would have ended it


def _is_single_process() -> bool:
    try:
        return processes() == 1
    except UserError:
        return True


def _told(error: Exception) -> str | None:
    """Return what a user is told of an error; None of one that is no user's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}: check that path, its permissions and the space on its disk."
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which may not be imported here
        return "the GPU's memory is full: lower --batch_size, --patch_size or, in 3D, --window_batch."
    text = next((text for words, text in TOLD if all(word in str(error) for word in words)), None)
    if text is None or not isinstance(error, RuntimeError):
        return None
    return text.format(first=str(error).strip().splitlines()[0].split(", but")[0].strip(" ."))


def make_output_safe() -> None:
    """Let standard output and error show in plain letters what their encoding lacks, instead of ending the run."""

    def plainly(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end

    codecs.register_error("sdcl-plain", plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sdcl-plain")


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """Build the header's dataclass from command-line arguments.

    Three sources give a field's value, and a later one wins: the header, the recipe that the header or the last
    `--recipe` names, and the flags.

    Raises:
        UserError: a flag that the header does not have, or a value that its flag or any data set refuses.
        SystemExit: the help was asked for, and has been printed.
    """
    if {"-h", "--help"} & set(arguments):
        show_help(config_class)
    config, unknown = _read_flags(config_class, arguments, None)
    default = with_recipe(config_class, getattr(config, "recipe", None))  # named by the header or by a flag
    if default is not None:
        config, unknown = _read_flags(config_class, arguments, default)
    if unknown:
        flags = [f"--{field.name}" for field in dataclasses.fields(config_class)]
        close = difflib.get_close_matches(unknown[0].replace("-", "_").replace("__", "--", 1), flags, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "see --help for the flags there are."
        earlier = [word for word in arguments[: arguments.index(unknown[0])] if word.startswith("--")]
        if not unknown[0].startswith("-") and earlier:
            hint = f"{earlier[-1]} takes fewer values; see --help."
        raise UserError(f"unknown argument {unknown[0]}: {hint}")
    check_common(config)
    return config


def _read_flags(config_class: type[Config], arguments: list[str], default: Config | None) -> tuple[Config, list[str]]:
    """Read flags on top of a header's defaults, or of others; return the words that are no flag of it as well."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                config_class, args=arguments, default=default, return_unknown_args=True, use_underscores=True
            )
    except SystemExit as end:
        if not end.code:  # a completion script was asked for
            raise
        raise UserError(_sentence(output.getvalue())) from None


def recipe_of(config: Any) -> dict[str, Any]:
    """Return the values that a header's recipe names, by field; none for the published one.

    A script that has recipes names them in its RECIPES: a recipe's name to fields and values.
    """
    return _recipes(type(config)).get(getattr(config, "recipe", None), {})


def _recipes(config_class: type) -> dict[str, dict[str, Any]]:
    return getattr(sys.modules[config_class.__module__], "RECIPES", {})


def with_recipe(config_class: type, name: str | None) -> Any:
    """Return the header's defaults with a recipe's values in their place; None where the name is no recipe's.

    A name that no script knows, such as "published", changes nothing.
    """
    values = _recipes(config_class).get(name)
    if values is None:
        return None
    needed = [f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING]
    return config_class(**{**dict.fromkeys(needed, tyro.MISSING), **values, "recipe": name})


def _sentence(box: str) -> str:
    """Return what tyro's box on a terminal says first, in one sentence."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    end = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))  # a rule ends it
    text = " ".join(line for line in lines[:end] if line).replace("Error parsing ", "")
    text = text.split(" Got errors:")[0]  # what each of several types of a flag says
    return f"{text[:1].lower()}{text[1:].rstrip('.')}: see --help for what it takes."


def show_help(config_class: type) -> None:
    """Print what the header says of each field, in the header's groups, and exit with status 0."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    titles: list[tuple[str, Any, Any]] = []
    for (title, remark), comments in header_groups(config_class).items():
        parts = []
        for name, comment in comments.items():
            field = fields[name]
            default = dataclasses.field() if field.default is dataclasses.MISSING else field.default
            parts.append((name, Annotated[field.type, tyro.conf.arg(help=comment)], default))
        name = re.sub(r"\W+", "_", title) or "needed"
        group = dataclasses.make_dataclass(name, parts)
        group.__doc__ = remark
        titles.append((name, group, dataclasses.field()))
    whole = dataclasses.make_dataclass(config_class.__name__, titles)
    marks = (tyro.conf.OmitArgPrefixes,)
    tyro.cli(whole, args=["--help"], description=inspect.getdoc(config_class), use_underscores=True, config=marks)


def header_groups(config_class: type) -> dict[tuple[str, str], dict[str, str]]:
    """Read a header's source: its groups, each a heading `# --- title (remark) ---`, and each field's comment.

    Returns:
        (title, remark) to field to comment; fields before the first heading are under ("", "").
    """
    groups: dict[tuple[str, str], dict[str, str]] = {("", ""): {}}
    name = ""
    for line in inspect.getsource(config_class).splitlines():
        if heading := GROUP.match(line):
            groups[heading["title"], heading["remark"] or ""] = {}
        elif field := FIELD.match(line):
            name = field["name"]
            list(groups.values())[-1][name] = ""
        if name and (comment := COMMENT.search(line)) and not list(groups.values())[-1].get(name, "-"):
            list(groups.values())[-1][name] = comment["text"]
    return {key: fields for key, fields in groups.items() if fields}


def as_dict(config: Any) -> dict[str, Any]:
    """Return the header's fields as plain values (paths as text, tuples as lists), ready for JSON and checkpoints."""
    return {field.name: as_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def as_plain(value: Any) -> Any:
    """Return a header's value as JSON has it: a path as text, a tuple as a list."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def describe(config: Any) -> str:
    """Return the resolved configuration, one field a line."""
    values = as_dict(config)
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())


def method_names() -> list[str]:
    """Return the names that --method takes: those of the files in sdcl/methods/."""
    return sorted(path.stem for path in METHODS.glob("[a-z]*.py"))


def check_common(config: Any) -> None:
    """Refuse values that no data set can train with; fields that are None are filled in later.

    Raises:
        UserError: names the flag and what it must be.
    """
    values = {name: value for name, value in vars(config).items() if value is not None}
    for name in (name for name in POSITIVE_FIELDS if name in values):
        if not values[name] > 0:
            raise UserError(f"--{name} is {values[name]}: it must be above 0.")
    if values.get("labelnum", 0) < 0:  # the scripts of one's own data take 0 for all; check_labelnum() is the others'
        raise UserError(f"--labelnum is {config.labelnum}: it must be above 0.")
    for name in (name for name in NON_NEGATIVE_FIELDS if name in values):
        if not values[name] >= 0:
            raise UserError(f"--{name} is {values[name]}: it must not be negative.")
    for name in ("ema_decay", "augment_probability", "dropout"):
        if not 0 <= values.get(name, 0) <= 1:
            raise UserError(f"--{name} is {values[name]}: it must lie in [0, 1].")
    for name in ("intensity", "average_decay", "foreground_prior"):
        if not 0 <= values.get(name, 0) < 1:
            raise UserError(f"--{name} is {values[name]}: it must lie in [0, 1).")
    for stage in ("pre_iterations", "self_iterations"):
        if 0 < values.get(stage, 0) <= values.get("warmup", 0):
            raise UserError(f"--warmup is {config.warmup}: it must be below --{stage}, which is {values[stage]}.")
    if values.get("method", "sdcl") not in method_names():
        raise UserError(f"--method {config.method} is not known: choose {', '.join(method_names())}.")
    if values.get("pre_iterations") == values.get("self_iterations") == 0:
        raise UserError("--pre_iterations and --self_iterations are both 0, which trains nothing: raise one of them.")
    if not all(math.isfinite(side) and side > 0 for side in values.get("spacing", ())):
        raise UserError(f"--spacing is {' '.join(map(str, config.spacing))}: every side must be above 0 mm.")
    if "patch_size" in values:
        students = [values[role] for role in ("student_a", "student_b") if role in values]
        _check_patch(config.patch_size, values.get("mask_fraction"), students)


def check_labelnum(config: Any) -> None:
    """Refuse a run without labelled cases, once a script has filled in how many there are.

    Raises:
        UserError: --labelnum is not above 0.
    """
    if getattr(config, "labelnum", 1) < 1:
        raise UserError(f"--labelnum is {config.labelnum}: it must be above 0.")


def side_divisor(networks: Iterable[str]) -> int:
    """Return what every side of an input is a multiple of, for all of these architectures."""
    return 2 ** (HALVINGS + any(name.endswith(LOWRES) for name in networks))


def _check_patch(patch_size: tuple[int, ...], mask_fraction: float | None, students: Sequence[str]) -> None:
    divisor, sides = side_divisor(students), " ".join(map(str, patch_size))
    if any(side <= 0 or side % divisor for side in patch_size):
        why = "the networks halve it four times"
        if lowres := [name for name in students if name.endswith(LOWRES)]:
            why = f"{lowres[0]} halves it five times"
        raise UserError(f"--patch_size is {sides}: every side must be a multiple of {divisor}, since {why}.")
    if math.prod(patch_size) == divisor ** len(patch_size):
        raise UserError(
            f"--patch_size is {sides}: it leaves a single voxel at the networks' bottom, which no normalisation can "
            f"use: make a side {2 * divisor} or more."
        )
    if mask_fraction not in (None, 0) and not (
        0 < mask_fraction < 1 and all(0 < int(side * mask_fraction + 1e-9) < side for side in patch_size)
    ):
        raise UserError(
            f"--mask_fraction is {mask_fraction}: a mask of {mask_fraction} of {patch_size} leaves no box, or nothing "
            "around it; choose a fraction inside (0, 1), or 0 for no pasting."
        )
