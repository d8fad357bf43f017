"""README.md and docs/: every link leads somewhere, every command parses, and those that phantoms can serve run."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from helpers import ROOT

from dataloaders.phantom import write_acdc, write_la, write_pancreas
from sdcl.runs.config import parse

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")]
PLACEHOLDER = re.compile(r"<[^>]*>")


def blocks(page):
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """The `python <script> <flags>` lines of a page, continued lines joined, remarks cut off."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python [^`]*)`", text.replace("\n", " "))
    return [line.split("  #")[0].strip() for line in lines if line.strip().startswith("python ") and ".py" in line]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_there_are_commands():
    assert len(COMMANDS) > 20 and {"README.md", "training.md", "testing.md", "own_data.md"} <= {n for n, _ in COMMANDS}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_name_scripts_and_flags_that_are_there(page, line):
    words = shlex.split(PLACEHOLDER.sub("placeholder", line))
    script, flags = ROOT / words[1], words[2:]
    assert script.is_file(), f"{page}: {line}"
    if "--help" in flags or not flags or script.parent.name in ("benchmarks", "tests"):
        return
    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    given = ["sdcl" if word == "entropy" and page == "methods.md" else word for word in flags]  # which that page writes
    needed = needed_flags(module.Config, [word.split("=")[0] for word in given])
    parse(module.Config, [*given, *needed])


def needed_flags(header, given):
    """Flags that a header needs and a page's shortened command leaves out."""
    from dataclasses import MISSING, fields

    return [
        word
        for field in fields(header)
        if field.default is MISSING and f"--{field.name}" not in given and field.name != "action"
        for word in (f"--{field.name}", {"normalise": "zscore", "dataset": "la"}.get(field.name, "placeholder"))
    ]


# --- every command runs ---

PAGES_RUN = ("experiments", "own_data", "training", "testing", "predicting", "methods", "data")
SLOW_PAGES = ("experiments", "testing", "methods", "training", "own_data", "predicting")
NOT_TO_COPY = shutil.ignore_patterns("data", "__pycache__", "*.egg-info")
SMALL = {  # in the scripts' headers, edited as a user would
    r"(pre|self)_iterations: int = [\d_]+": r"\1_iterations: int = 1",
    r"(batch_size: int) = \d+": r"\1 = 2",
    r"(patch_size: tuple\[int, int\]) = \(\d+, \d+\)": r"\1 = (32, 32)",
    r"((?:patch_size|stride): tuple\[int, int, int\]) = \(\d+, \d+, \d+\)": r"\1 = (32, 32, 32)",
}


@pytest.fixture(scope="module")
def checkout(scratch):
    """A copy of the checkout with phantoms where the data sets lie and small numbers in the scripts' headers."""
    for folder in ("code", "dataloaders", "Datasets", "models"):
        shutil.copytree(ROOT / folder, scratch / folder, ignore=NOT_TO_COPY)
    write_acdc(scratch / "Datasets" / "acdc2", patients=(8, 1, 1), labelled_patients=7, size=(36, 40), slices=2)
    write_la(scratch / "Datasets" / "la2", cases=(9, 2), labelled_cases=8, size=(40, 36, 32))
    write_pancreas(scratch / "Datasets" / "pancreas2", cases=(14, 2), labelled_cases=12, size=(40, 36, 32))
    for name in ("acdc", "la", "pancreas"):
        shutil.rmtree(scratch / "Datasets" / name)
        (scratch / "Datasets" / f"{name}2").rename(scratch / "Datasets" / name)
    for script in [*scratch.glob("code/*_train.py"), *scratch.glob("code/pancreas/*_train.py")]:
        text = script.read_text(encoding="utf-8")
        for pattern, small in SMALL.items():
            text = re.sub(pattern, small, text)
        script.write_text(text, encoding="utf-8")
    scan = np.random.default_rng(0).normal(size=(384, 404, 90)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([-0.625, -0.625, 0.625, 1])), scratch / "scan.nii.gz")
    method = re.search(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.M | re.S
    )
    (scratch / "code" / "sdcl" / "methods" / "entropy.py").write_text(method[1], encoding="utf-8")
    return scratch


def is_run(line):
    """Placeholders stand for what no phantom is (tests/test_raw.py runs those scripts); `make demo` runs the demo."""
    return not PLACEHOLDER.search(line) and not line.startswith(("python code/demo.py", "python benchmarks/"))


def run_page(page, checkout):
    """Run a page's commands in order in the copy, an iteration a stage and a small ROI; return what they print."""
    outputs = {}
    for line in commands(page):
        if not is_run(line):
            continue
        shorter = re.sub(r"(_iterations) \d+", r"\1 1", line)
        words = shlex.split(re.sub(r"--roi \d+ \d+ \d+ \d+ \d+ \d+", "--roi 180 230 200 250 0 48", shorter))
        words[0], environment = sys.executable, os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(
            words, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=500
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        outputs[line] = done.stdout
    return outputs


@pytest.fixture(scope="module")
def walked(checkout):
    """What the README's commands print; their runs are what the other pages start from."""
    outputs = run_page(ROOT / "README.md", checkout)
    for letter in "ab":
        best = checkout / "models" / "la_SDCL_8_labeled" / "self_train" / f"best_student_{letter}.pth"
        shutil.copy(best, checkout / f"{letter}.pth")
    return outputs


def test_the_commands_of_the_readme_run(walked, checkout):
    assert len(walked) == 9
    said = walked["python code/test_LA.py"]
    assert "95HD" in said and "mean, best on test and last (1)" in said and "mean, last (1)" not in said
    assert "NOTE: 'best on test' was selected on these very volumes" in said
    assert list((checkout / "first" / "models" / "la_SDCL_2_labeled" / "test").rglob("cases.png"))


# `make slow` runs the pages that take longest.
@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW_PAGES)) for p in PAGES_RUN])
def test_the_commands_of_a_page_run(page, walked, checkout):
    outputs = run_page(ROOT / "docs" / f"{page}.md", checkout)
    assert outputs and all(outputs.values())
    if page == "methods":
        assert "method entropy" in outputs["python code/test_ACDC.py --exp entropy"]
        losses = checkout / "models" / "acdc_entropy_7_labeled" / "self_train" / "metrics.csv"
        assert "student_a/entropy" in losses.read_text(encoding="utf-8")


def test_no_page_with_commands_is_left_out():
    pages = {page for page, line in COMMANDS if is_run(line)}
    assert pages == {"README.md", *(f"{page}.md" for page in PAGES_RUN)}
