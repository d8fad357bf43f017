"""Mutation testing of the method's core with mutmut: `make mutants`, with a table of what was killed.

`make mutants MODULES="losses mixing"` takes some of the modules alone. Each module is tried with the test files that
are about it, so that a mutant that survives costs seconds, not the suite. Not mutated: what only words errors and log
lines, and zip's `strict`. mutmut looks for packages in src/, so a copy of the repository with that layout is made in a
folder that git ignores; `mutants/survivors.diff` has what survived.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "mutants"
CORE = {  # a module of the core to the test files that are about it
    "sdcl/losses.py": ("losses", "steps"),
    "sdcl/mixing.py": ("mixing", "steps"),
    "sdcl/pseudo_labels.py": ("pseudo_labels", "steps"),
    "sdcl/teacher.py": ("teacher", "steps"),
    "sdcl/steps.py": ("steps", "methods"),
    "sdcl/training.py": ("training", "runs"),
    "sdcl/inference.py": ("inference", "3d", "windows"),
    "sdcl/windows.py": ("windows", "3d"),
    "sdcl/metrics.py": ("metrics",),
    "sdcl/scoring/evaluation.py": ("evaluation", "inference"),
    "sdcl/scoring/tables.py": ("evaluation",),
    "dataloaders/streams.py": ("data", "steps"),
    "dataloaders/transforms.py": ("data", "3d"),
}
SLOW = "not " + " and not ".join(
    (
        "scripts",
        "selection_is_named",
        "without_validation",
        "three_classes",
        "trains_tests_and_predicts",
        "given_weights_are_of",
        "images_alone_need",
        "page_on_ones",
        "mean_nothing",
        "of_each_method_ends",
    )
)  # whole runs
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {core}
also_copy = ["src", "code", "tests", "benchmarks", "Datasets", "docs", "README.md"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", "{slow}"]
pytest_add_cli_args_test_selection = {tests}
timeout_multiplier = 4
timeout_constant = 10
"""


def lay_out(module: str) -> None:
    """Copy what the tests need, packages into src/, scripts into code/.

    Args:
        module: the key of CORE to mutate.
    """
    shutil.rmtree(WORK / "copy", ignore_errors=True)
    work = WORK / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "sdcl")
    shutil.copytree(ROOT / "code", work / "code", ignore=ignore)
    for package in (ROOT / "code" / "sdcl", ROOT / "dataloaders"):
        shutil.copytree(package, work / "src" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", work)
    shutil.copytree(ROOT / "Datasets", work / "Datasets", ignore=shutil.ignore_patterns("data"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('pythonpath = ["code", "."]', 'pythonpath = ["src"]')
    tests = [f"tests/test_{name}.py" for name in CORE[module]]
    settings = SETTINGS.format(core=[f"src/{module}"], tests=tests, slow=SLOW)
    (work / "pyproject.toml").write_text(text + settings, encoding="utf-8")
    spare_wording(work / "src" / module)


def spare_wording(path: Path) -> None:
    """Mark the lines of a copied module that raise errors or write log lines, which mutmut then leaves alone."""
    text = re.sub(r", strict=(True|False)\b", "", path.read_text(encoding="utf-8"))  # of zip: guards, no behaviour
    # mutmut leaves decorated functions alone; these decorators save memory and change no number.
    text = re.sub(
        r"^ *@(torch\.no_grad\(\)|torch\.inference_mode\(\)|once_differentiable)\n", "", text, flags=re.MULTILINE
    )
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        call = node.value if isinstance(node, ast.Expr) else None
        is_log = isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("LOGGER.", "warnings."))
        if isinstance(node, ast.Raise) or is_log:
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] += "  # pragma: no mutate"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tried(module: str) -> tuple[Counter, list[str]]:
    """Run a module's mutants, each with the tests that reach it.

    Returns:
        How many came to which end ("killed", "timeout", "survived", "no tests"), and the diffs of those that lived.
    """
    lay_out(module)
    mutmut = str(Path(sys.executable).with_name("mutmut"))
    with (WORK / f"{Path(module).stem}.log").open("w", encoding="utf-8") as log:
        run = [mutmut, "run", "--max-children", "2"]
        subprocess.run(run, cwd=WORK / "copy", check=True, stdout=log, stderr=subprocess.STDOUT)
    asked = {"cwd": WORK / "copy", "capture_output": True, "text": True, "check": True}
    said = subprocess.run([mutmut, "results", "--all", "true"], **asked).stdout
    rows = re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", said, re.MULTILINE)
    lived = [name for name, end in rows if end not in ("killed", "timeout")]
    return Counter(end for _, end in rows), [subprocess.run([mutmut, "show", name], **asked).stdout for name in lived]


def main() -> None:
    """Try the modules one after another, and print a line for each."""
    unknown = set(sys.argv[1:]) - {Path(path).stem for path in CORE}
    if unknown:
        sys.exit(f"error: no module of the core is called {', '.join(sorted(unknown))}: choose of {', '.join(CORE)}.")
    WORK.mkdir(exist_ok=True)
    print(
        "| module | mutants | killed | of them by a time limit | survived | in no test |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with (WORK / "survivors.diff").open("w", encoding="utf-8") as kept:
        for module in CORE:
            if not sys.argv[1:] or Path(module).stem in sys.argv[1:]:
                ends, diffs = tried(module)
                late, survived, unseen = ends["timeout"], ends["survived"], ends["no tests"]
                killed = ends["killed"] + late
                print(f"| {module} | {ends.total()} | {killed} | {late} | {survived} | {unseen} |", flush=True)
                kept.write("\n".join(diffs))
                kept.flush()


if __name__ == "__main__":
    main()
