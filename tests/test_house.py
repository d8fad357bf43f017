"""Which part of the house imports which: data never start a run, the library knows no data set, nothing goes round."""

import ast

import pytest
from helpers import ROOT

SCRIPTS = {path.stem for path in (ROOT / "dataloaders").glob("*.py") if "run_script(main" in path.read_text("utf-8")}
TRAINS = (
    "sdcl.training",
    "sdcl.steps",
    "sdcl.locating",
    "sdcl.methods",
    "sdcl.runs.experiment",
    "sdcl.runs.resume",
    "sdcl.runs.records",
)


def modules():
    paths = [*(ROOT / "code" / "sdcl").rglob("*.py"), *(ROOT / "dataloaders").rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removeprefix("code.").removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@pytest.fixture(scope="module")
def imports():
    """Each module's imports among the others, those within functions too."""
    known, arrows = modules(), {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        arrows[name] = {other for other in found if other in known and other != name}
    assert "sdcl.losses" in arrows["sdcl.steps"] and "dataloaders.streams" in arrows["dataloaders.volumes"]
    return arrows


def test_the_library_knows_no_data_set_and_no_script(imports):
    for name, others in imports.items():
        if name.startswith("sdcl"):
            assert not [other for other in others if other.startswith("dataloaders")], name
        assert not [other for other in others if other.removeprefix("dataloaders.") in SCRIPTS], name


def test_data_never_start_a_run(imports):
    for name, others in imports.items():
        if name.startswith("dataloaders"):
            assert not [other for other in others if other.startswith(TRAINS)], name


def test_no_import_goes_round(imports):
    done = set()

    def visit(name, way):
        assert name not in way, " > ".join([*way, name])
        if name not in done:
            for other in imports[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in imports:
        visit(name, [])


@pytest.mark.parametrize("path", modules().values(), ids=modules())
def test_no_function_takes_more_than_six_arguments(path):
    """Outside the public surface and what autograd and dataclasses fix: what goes together is one object."""
    public = {"mixed_losses", "slice_wise", "sliding_window", "pretrain", "self_train", "forward"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name not in public:
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            given = [a for a in arguments if a not in ("self", "cls", "ctx")]
            assert len(given) <= 6, f"{node.name}({', '.join(given)})"
