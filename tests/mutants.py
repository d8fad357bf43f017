"""Mutation testing of the method's core with mutmut: `make mutants`, with a table of what was killed.

`make mutants MODULES="losses mixing"` takes some of the modules alone, with the tests of the same names. mutmut looks
for packages in src/, so a copy of the repository with that layout is made in a folder that git ignores.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "mutants"
CORE = (
    "sdcl/losses.py", "sdcl/mixing.py", "sdcl/pseudo_labels.py", "sdcl/teacher.py", "sdcl/steps.py", "sdcl/training.py",
    "sdcl/inference.py", "sdcl/metrics.py", "sdcl/evaluation.py", "dataloaders/streams.py", "dataloaders/transforms.py",
    "dataloaders/volumes.py",
)  # fmt: skip
TESTS = (
    "losses", "mixing", "pseudo_labels", "teacher", "steps", "training", "inference", "metrics", "evaluation", "data",
    "3d", "networks", "arithmetic",
)  # fmt: skip
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {core}
also_copy = ["src", "code", "tests", "benchmarks", "Datasets"]
pytest_add_cli_args = ["-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
"""


def lay_out(modules: list[str]) -> None:
    """Copy what the tests need, packages into src/, scripts into code/.

    Args:
        modules: names of the modules to mutate, such as "losses"; none: all of CORE.
    """
    shutil.rmtree(WORK, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "sdcl")
    shutil.copytree(ROOT / "code", WORK / "code", ignore=ignore)
    for package in (ROOT / "code" / "sdcl", ROOT / "dataloaders"):
        shutil.copytree(package, WORK / "src" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "benchmarks"):
        shutil.copytree(ROOT / folder, WORK / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "Datasets", WORK / "Datasets", ignore=shutil.ignore_patterns("data"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.replace('pythonpath = ["code", "."]', 'pythonpath = ["src"]')
    core = [f"src/{path}" for path in CORE if not modules or Path(path).stem in modules]
    tests = [f"tests/test_{name}.py" for name in TESTS if not modules or name in modules]
    (WORK / "pyproject.toml").write_text(text + SETTINGS.format(core=core, tests=tests), encoding="utf-8")


def main() -> None:
    """Make the mutants, test each with the tests that reach it, and print what came of them, file by file."""
    unknown = set(sys.argv[1:]) - {Path(path).stem for path in CORE}
    if unknown:
        sys.exit(f"error: no module of the core is called {', '.join(sorted(unknown))}: choose of {', '.join(CORE)}.")
    lay_out(sys.argv[1:])
    mutmut = str(Path(sys.executable).with_name("mutmut"))
    subprocess.run([mutmut, "run", "--max-children", "2"], cwd=WORK, check=True)
    said = subprocess.run([mutmut, "results", "--all", "true"], cwd=WORK, capture_output=True, text=True, check=True)
    rows = re.findall(r"^\s*(\S+)\.x\S*?__mutmut_\d+: (.+)$", said.stdout, re.MULTILINE)
    counts = Counter(rows)
    print("| module | killed | of them by a time limit | survived | in no test |\n|---|---|---|---|---|")
    for module in dict.fromkeys(module for module, _ in rows):
        killed, late, survived, unseen = (
            counts[module, what] for what in ("killed", "timeout", "survived", "no tests")
        )
        print(f"| {module} | {killed + late} | {late} | {survived} | {unseen} |")
    for line in re.findall(r"^\s*(\S+): survived$", said.stdout, re.MULTILINE):
        print(line)


if __name__ == "__main__":
    main()
