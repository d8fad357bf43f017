"""README.md and docs/: every link leads somewhere, every command parses, and the first walk runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

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
    given = [word for flag in flags for word in flag.split("=", 1)]
    given = ["sdcl" if word == "entropy" and page == "methods.md" else word for word in given]  # which that page writes
    needed = needed_flags(module.Config, given)
    parse(module.Config, [*given, *needed])


def needed_flags(header, given):
    """Flags that a header needs and a page's shortened command leaves out."""
    from dataclasses import MISSING, fields

    return [
        word
        for field in fields(header)
        if field.default is MISSING and f"--{field.name}" not in given
        for word in (f"--{field.name}", {"normalise": "zscore", "dataset": "la"}.get(field.name, "placeholder"))
    ]


def test_the_readmes_first_training_and_test_run(tmp_path):
    """Its very lines, with one iteration a stage."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## A first training and test")[1]
    lines = re.search(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1].splitlines()
    (ran,) = [[line for line in lines if line.startswith("python ")]]
    assert len(ran) == 3
    for line in ran:
        words = shlex.split(re.sub(r"(_iterations) \d+", r"\1 1", line))
        run = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "95HD" in done.stdout
    assert list(Path(tmp_path, "first", "models", "la_SDCL_2_labeled", "test").rglob("cases.png"))
