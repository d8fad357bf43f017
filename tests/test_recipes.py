"""Options beside the published training: schedules, AdamW, EMA warm-up, intensity, recipes."""

import ast
import dataclasses
import importlib.util
import json
import math
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, method
from hypothesis import given
from hypothesis import strategies as st
from test_3d import call, load
from torch.nn import Dropout, Dropout3d

from dataloaders.transforms import shift_intensity
from sdcl import checkpoints
from sdcl.checkpoints import load_weights
from sdcl.methods import PUBLISHED, check_settings, get, method_names
from sdcl.mixing import copy_paste_mask
from sdcl.networks import build_network
from sdcl.runs.config import as_dict, describe, parse
from sdcl.runs.errors import UserError
from sdcl.runs.folder import differing_fields
from sdcl.runs.weights import Weights
from sdcl.schedule import share
from sdcl.steps import STUDENTS, add_averages, add_teacher, averaged, make_learners, move_averages, pretrain_step
from sdcl.teacher import growing_decay

WITH_RECIPES = ("ACDC_train.py", "LA_train.py")


def test_the_published_rate_is_constant():
    assert {share(t, 10, "constant", 0) for t in range(1, 11)} == {1.0}


def test_rates_by_hand():
    assert [share(t, 4, "linear", 0) for t in range(1, 5)] == [1, 0.75, 0.5, 0.25]
    assert [share(t, 6, "linear", 2) for t in range(1, 7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert [share(t, 4, "cosine", 0) for t in (1, 3)] == pytest.approx([1, 0.5])
    assert share(2, 4, "cosine", 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@given(st.integers(1, 200), st.integers(0, 50), st.sampled_from(["linear", "cosine"]))
def test_a_rate_rises_then_falls_and_stays_above_zero(length, warmup, schedule):
    rates = [share(t, length + warmup, schedule, warmup) for t in range(1, length + warmup + 1)]
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1], strict=True))
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[warmup] == 1 and 0 < rates[-1] <= 1


def small_learners(**how):
    torch.manual_seed(0)
    return make_learners(build_network("unet", 2), build_network("unet", 2), base_lr=1e-2, **how)


def batch_2d():
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(2, 1, 32, 32, generator=generator) for name in ("x_a", "x_b")}
    return batch | {f"y_{d}": (batch[f"x_{d}"][:, 0] > 1).to(torch.uint8) for d in "ab"}


def test_weight_decay_takes_its_share_of_each_weight():
    """Decoupled: against the same step without decay, weights differ by lr * decay * weight before the step."""
    mask, after = copy_paste_mask((32, 32), (16, 16)), []
    for decay in (0.0, 0.1):
        learners = small_learners(weight_decay=decay)
        before = [p.detach().clone() for p in learners.students[0].parameters()]
        torch.manual_seed(3)
        pretrain_step(learners, batch_2d(), mask, method())
        after.append([p.detach() for p in learners.students[0].parameters()])
    for first, plain, decayed in zip(before, *after, strict=True):
        torch.testing.assert_close(plain - decayed, 1e-2 * 0.1 * first, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "largest"), [("unet", 0.5), ("vnet", 0.5), ("resvnet", 0.5), ("resunet", 0.0)])
def test_a_share_of_dropout_is_of_every_published_rate(name, largest):
    published, half, none = (build_network(name, 2, dropout=share) for share in (1.0, 0.5, 0.0))
    rates = [[m.p for m in n.modules() if isinstance(m, Dropout | Dropout3d)] for n in (published, half, none)]
    assert max(rates[0], default=0.0) == largest
    assert rates[1] == [rate / 2 for rate in rates[0]] and not any(rates[2])
    image = torch.randn(2, 1, *((32,) * (3 if "vnet" in name else 2)))
    assert torch.equal(*(none.train()(image) for _ in range(2)))


@pytest.mark.parametrize("name", ["unet", "resunet", "vnet", "resvnet"])
def test_a_network_may_start_at_a_probability_of_foreground(name):
    """What all other layers say is taken away: three classes, a tenth of foreground, half of it for each class."""
    torch.manual_seed(5)
    drawn = build_network(name, 3)
    torch.manual_seed(5)
    network = build_network(name, 3, foreground_prior=0.1)
    differing = [n for n, p in network.state_dict().items() if not torch.equal(p, drawn.state_dict()[n])]
    assert len(differing) == 1 and differing[0].endswith(".bias")
    last = network.get_submodule(differing[0].removesuffix(".bias"))
    torch.nn.init.zeros_(last.weight)
    shares = network(torch.randn(1, 1, *((32,) * (3 if "vnet" in name else 2)))).softmax(1)
    expected = torch.tensor([0.9, 0.05, 0.05]).view(1, 3, *(1,) * (shares.ndim - 2)).expand_as(shares)
    torch.testing.assert_close(shares, expected)


def test_a_rate_of_zero_moves_nothing_and_a_share_is_of_the_base_rate():
    learners = small_learners()
    learners.set_rate(0.25)
    assert {g["lr"] for o in learners.optimisers.values() for g in o.param_groups} == {2.5e-3}
    learners.set_rate(0.0)
    before = [p.detach().clone() for p in learners.students[0].parameters()]
    pretrain_step(learners, batch_2d(), copy_paste_mask((32, 32), (16, 16)), method())
    assert all(torch.equal(a, b) for a, b in zip(before, learners.students[0].parameters(), strict=True))


@pytest.mark.parametrize("warms_up", [False, True])
def test_the_teacher_follows_faster_at_first(warms_up):
    from sdcl.methods import get

    learners, batch = small_learners(), batch_2d()
    add_teacher(learners)
    learners.iteration = 3
    old = [p.clone() for p in learners.networks["teacher"].parameters()]
    batch |= {f"u_{d}": batch[f"x_{d}"] + 1 for d in "ab"}
    get("sdcl").self_train_step(learners, batch, copy_paste_mask((32, 32), (16, 16)), method(ema_warmup=warms_up))
    decay = growing_decay(3, 0.99) if warms_up else 0.99
    assert decay == (0.75 if warms_up else 0.99)
    for was, now, student in zip(
        old, learners.networks["teacher"].parameters(), learners.students[0].parameters(), strict=True
    ):
        torch.testing.assert_close(now, decay * was + (1 - decay) * student.detach(), rtol=1e-5, atol=1e-6)


def test_no_intensity_is_the_same_image_and_draws_nothing():
    image, rng = np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.random.default_rng(0)
    assert shift_intensity(image, 0.0, rng) is image
    assert rng.random() == np.random.default_rng(0).random()


@given(st.floats(0.01, 0.99), st.integers(0, 99))
def test_intensity_keeps_the_order_of_values_and_each_channel_its_own(strength, seed):
    image = np.stack([np.linspace(-1, 3, 60), np.full(60, 5.0)]).astype(np.float32).reshape(2, 6, 10)
    changed = shift_intensity(image, strength, np.random.default_rng(seed))
    assert changed.dtype == np.float32 and changed.shape == image.shape
    assert (np.diff(changed[0].ravel()) >= 0).all()
    assert np.array_equal(changed[1], image[1])  # of one value: no contrast, no deviation
    spread = changed[0].std() / image[0].std()
    assert abs(changed[0].mean() - image[0].mean()) < 2 * (strength + 0.5) * image[0].std() and 0.2 < spread < 5


SCRIPTS = ("ACDC_train.py", "LA_train.py", "own_train.py", "pancreas/Pancreas_train.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_values_are_the_defaults(script):
    given = ["--root_path", "x"] if script == "own_train.py" else []
    config = parse(load(script).Config, given)
    assert (config.lr_schedule, config.warmup, config.weight_decay) == ("constant", 0, 0.0)
    assert (config.ema_warmup, config.intensity, config.average_decay) == (False, 0.0, 0.0)
    assert (config.dropout, config.foreground_prior, config.optimiser) == (1, 0, "adam")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--intensity", "1"], r"--intensity is 1.0: it must lie in \[0, 1\)"),
        (["--dropout", "1.5"], r"--dropout is 1.5: it must lie in \[0, 1\]"),
        (["--foreground_prior", "1"], r"--foreground_prior is 1.0: it must lie in \[0, 1\)"),
        (["--average_decay", "1"], r"--average_decay is 1.0: it must lie in \[0, 1\)"),
        (["--warmup", "-1"], "--warmup is -1: it must not be negative"),
        (["--weight_decay", "-0.1"], "--weight_decay is -0.1: it must not be negative"),
        (
            ["--warmup", "50", "--pre_iterations", "50"],
            "--warmup is 50: it must be below --pre_iterations, which is 50",
        ),
        (["--lr_schedule", "step"], "invalid choice 'step'"),
        (["--optimiser", "sgd"], "invalid choice 'sgd'"),
        (["--recipe", "faster"], "invalid choice 'faster' for argument '--recipe'"),
    ],
)
def test_wrong_values_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(load("ACDC_train.py").Config, flags)


def test_a_script_without_recipes_takes_their_flag_for_no_other():
    with pytest.raises(UserError, match="unknown argument --recipe: see --help for the flags there are"):
        parse(load("pancreas/Pancreas_train.py").Config, ["--recipe", "fast"])


def test_a_planned_end_cannot_be_moved_where_the_rate_falls_to_it():
    there = {"self_iterations": 10, "lr_schedule": "cosine"}
    assert "self_iterations 10 there, 20 now" in differing_fields(there, there | {"self_iterations": 20})
    constant = {"self_iterations": 10, "lr_schedule": "constant"}
    assert differing_fields(constant, constant | {"self_iterations": 20}) == ""
    assert differing_fields({"self_iterations": 10}, constant) == ""  # of an earlier version
    assert differing_fields({"self_iterations": 10}, constant | {"foreground_prior": 0.0}) == ""


@pytest.mark.parametrize("script", WITH_RECIPES)
def test_a_recipe_names_values_and_flags_beside_it_win(script):
    module = load(script)
    published, fast = parse(module.Config, []), parse(module.Config, ["--recipe", "fast"])
    changed = {
        f.name: getattr(fast, f.name)
        for f in dataclasses.fields(fast)
        if getattr(fast, f.name) != getattr(published, f.name)
    }
    assert changed == module.RECIPES["fast"] | {"recipe": "fast"}
    own = parse(module.Config, ["--base_lr", "0.5", "--recipe=fast", "--batch_size", "3"])
    assert (own.base_lr, own.batch_size, own.recipe) == (0.5, 3, "fast")
    assert own.lr_schedule == fast.lr_schedule


@pytest.mark.parametrize("name", method_names())
def test_every_method_takes_a_recipe(name):
    """What a method does not read of it is no mistake of the user's; what was given beside it is."""
    config = parse(load("ACDC_train.py").Config, ["--recipe", "fast", "--method", name])
    check_settings(config)
    config.noise = 0.5
    if name not in ("ua_mt", "mean_teacher"):
        with pytest.raises(UserError, match="--noise is not read by"):
            check_settings(config)


TRAINING = ("ACDC_train.py", "LA_train.py", "pancreas/Pancreas_train.py", "own_train.py")
TESTING = ("test_ACDC.py", "test_LA.py", "pancreas/test_Pancreas.py", "test_own.py")


def edited(script, folder, **values):
    """Import a copy of a script in whose header these fields have other defaults, as an editor would leave it."""
    text = (ROOT / "code" / script).read_text(encoding="utf-8").splitlines(keepends=True)
    (header,) = (n for n in ast.parse("".join(text)).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for field in reversed([node for node in header.body if isinstance(node, ast.AnnAssign)]):
        if field.target.id in values:
            source = f"Path({str(values[field.target.id])!r})" if "Path" in ast.unparse(field.annotation) else None
            source = source or repr(values[field.target.id])
            line = f"    {field.target.id}: {ast.unparse(field.annotation)} = {source}\n"
            text[field.lineno - 1 : field.end_lineno] = [line]
    name = f"edited_{Path(script).stem}_{folder.name}"
    path = folder / f"{name}.py"
    path.write_text("".join(text), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def other_values(header):
    """Another valid value of each field of a header, by the field's type and default."""
    fixed = {
        "patch_size": (64, 64, 32), "method": "ua_mt", "mask_fraction": 0.5, "stride": (9, 9, 3), "rampup": 7,
        "connectivity": 6, "ema_buffers": True, "batch_size": 3, "predictors": ("mean",), "spacing": (1.0, 2.0, 3.0),
        "exp": "other", "dropout": 0.5, "ema_decay": 0.5, "warmup": 3, "recipe": "published",
    }  # fmt: skip
    values = {}
    for field in dataclasses.fields(header):
        default = None if field.default is dataclasses.MISSING else field.default
        literals = [a for part in (field.type, *typing.get_args(field.type)) for a in typing.get_args(part)]
        literals = [a for a in literals if isinstance(a, str)]
        if field.name in fixed:
            values[field.name] = fixed[field.name]
        elif literals:
            values[field.name] = next(a for a in reversed(literals) if a != default)
        elif isinstance(default, bool):
            values[field.name] = not default
        elif isinstance(default, int):
            values[field.name] = default + 1
        elif isinstance(default, float):
            values[field.name] = default / 2 or 0.25
        else:
            values[field.name] = Path("some", "where")
    if header.__annotations__.get("patch_size") == tuple[int, int]:
        values["patch_size"] = (64, 32)
    return values


def as_flags(header, values):
    flags = []
    for name, value in values.items():
        if isinstance(value, bool) and header.__annotations__[name] is bool:
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


@pytest.mark.parametrize("script", [*TRAINING, *TESTING])
def test_an_edited_header_is_the_same_as_its_flags(script, tmp_path):
    """Every field of the header, edited in a copy: what is resolved, printed and recorded has the edited value."""
    header = load(script).Config
    values = other_values(header)
    by_header = parse(edited(script, tmp_path, **values).Config, [])
    by_flags = parse(header, as_flags(header, values))
    assert vars(by_header) == vars(by_flags) == values
    assert set(values) == {field.name for field in dataclasses.fields(header)}
    printed = [line.split(maxsplit=1) for line in describe(by_header).splitlines()]
    assert {line[0]: line[1] for line in printed} == {name: str(value) for name, value in as_dict(by_header).items()}
    again = parse(edited(script, tmp_path, **values).Config, ["--models_path", "flag", "--labelnum", "9"])
    assert vars(again) == values | {"models_path": Path("flag"), "labelnum": 9}


@pytest.mark.parametrize("script", WITH_RECIPES)
def test_the_header_names_a_recipe_and_the_last_flag_wins(script, tmp_path):
    module = edited(script, tmp_path, recipe="fast", base_lr=0.5)
    fast = module.RECIPES["fast"]
    by_header = vars(parse(module.Config, ["--batch_size", "3"]))
    assert {name: by_header[name] for name in fast} == fast | {"batch_size": 3}
    assert (by_header["recipe"], by_header["base_lr"]) == ("fast", 0.5)
    published = parse(module.Config, ["--recipe", "published"])
    assert published.batch_size == load(script).Config.batch_size and published.recipe == "published"
    header = load(script).Config
    for words in (["--recipe", "fast", "--recipe", "published"], ["--recipe=fast", "--recipe=published"]):
        assert vars(parse(header, words)) == vars(parse(header, []))
    assert vars(parse(header, ["--recipe", "published", "--recipe=fast"])) == vars(parse(header, ["--recipe", "fast"]))


@pytest.mark.parametrize("script", TRAINING)
def test_what_a_method_does_not_read_is_refused_in_the_header_too(script, tmp_path):
    header, module = load(script).Config, load(script)
    values = other_values(header) | {"method": "bcp", "teacher_dropout": "no"}
    unread = [name for name in vars(header) if name in PUBLISHED | module.PUBLISHED and name not in get("bcp").reads]
    assert {"kl_weight", "mse_weight", "noise", "passes", "paste", "correct"} <= set(unread)
    needed = ["--root_path", "x", "--method", "bcp"]
    check_settings(parse(header, needed))
    for name in unread:
        folder = tmp_path / name
        folder.mkdir()
        one = edited(script, folder, **{name: values[name]})
        with pytest.raises(UserError, match=f"--{name} is not read by --method bcp, only by"):
            check_settings(parse(one.Config, needed))
        if getattr(header, name) is not None:  # a flag takes the edit back
            check_settings(parse(one.Config, [*needed, *as_flags(header, {name: getattr(header, name)})]))
    idle = edited(script, tmp_path, correct="none", kl_weight=0.7)
    with pytest.raises(UserError, match="--kl_weight does nothing with --correct none"):
        check_settings(parse(idle.Config, needed[:2]))


@pytest.mark.parametrize("script", TRAINING)
def test_published_values_are_what_the_headers_have(script):
    module = load(script)
    for name, value in (PUBLISHED | module.PUBLISHED).items():
        assert getattr(module.Config, name) == value, name
    read = {name for method_ in method_names() for name in get(method_).reads}
    assert read == set(PUBLISHED | module.PUBLISHED)


def test_no_labelled_case_is_refused_in_the_header_too(acdc_phantom, tmp_path):
    """In the scripts of one's own data 0 stands for all that have a label, whatever the header's default is."""
    for module in (edited("ACDC_train.py", tmp_path, labelnum=0), load("ACDC_train.py")):
        config = parse(module.Config, ["--root_path", str(acdc_phantom), "--labelnum", "0"])
        with pytest.raises(UserError, match="--labelnum is 0: it must be above 0"):
            module.main(config)
    own = edited("own_train.py", tmp_path, labelnum=4, root_path=acdc_phantom)
    assert parse(own.Config, ["--labelnum", "0"]).labelnum == 0
    with pytest.raises(UserError, match="--labelnum is -1: it must be above 0"):
        parse(own.Config, ["--labelnum", "-1"])


def test_an_edited_header_is_trained_printed_and_recorded(acdc_phantom, tmp_path, said):
    module = edited("ACDC_train.py", tmp_path, recipe="fast", method="ua_mt", root_path=acdc_phantom, labelnum=2)
    flags = ["--patch_size", "32", "32", "--pre_iterations", "1", "--self_iterations", "2", "--select", "last"]
    flags += ["--models_path", str(tmp_path), "--device", "cpu", "--batch_size", "2", "--pre_val_every", "0"]
    module.main(parse(module.Config, flags))
    printed = dict(line.split(maxsplit=1) for line in said().splitlines() if line.startswith("  "))
    for path in (tmp_path / "acdc_SDCL_2_labeled" / "config.json",):
        kept = json.loads(path.read_text(encoding="utf-8"))["config"]
    trained = checkpoints.load(tmp_path / "acdc_SDCL_2_labeled" / "self_train" / "last.pth")
    expected = module.RECIPES["fast"] | {"batch_size": 2, "pre_iterations": 1, "self_iterations": 2, "rampup": 1}
    for name, value in expected.items():
        assert kept[name] == trained["config"][name] == value and printed[name] == str(value), name
    assert "student_a_average" in trained["networks"]  # of the recipe's average_decay


def test_a_real_run_with_all_of_them(acdc_phantom, tmp_path):
    call(
        "ACDC_train.py", "--root_path", acdc_phantom, "--models_path", tmp_path, "--labelnum", 2, "--batch_size", 2,
        "--patch_size", 32, 32, "--pre_iterations", 2, "--self_iterations", 2,
        "--lr_schedule", "cosine", "--warmup", 1, "--intensity", 0.3, "--ema_warmup", "--weight_decay", 0.01,
        "--foreground_prior", 0.05, "--select", "last",
    )  # fmt: skip
    kept = json.loads((tmp_path / "acdc_SDCL_2_labeled" / "config.json").read_text(encoding="utf-8"))["config"]
    assert (kept["lr_schedule"], kept["warmup"], kept["recipe"]) == ("cosine", 1, "published")
    networks = checkpoints.load(tmp_path / "acdc_SDCL_2_labeled" / "pre_train" / "last.pth")["networks"]
    for state in networks.values():  # two steps move a bias by a thousandth each
        bias = next(b for name, b in state.items() if name.endswith("out_conv.bias"))
        expected = torch.tensor([0.95, 0.05 / 3, 0.05 / 3, 0.05 / 3]).log()
        torch.testing.assert_close(bias, expected, atol=3e-3, rtol=0)


def test_an_average_forgets_its_start_and_then_falls_by_its_decay():
    """After one step it is the student, after two the mean of both; from then on the decay's."""
    learners = small_learners()
    add_averages(learners)
    values = {}
    for t, value in enumerate((1.0, 2.0, 6.0)):
        for parameter in learners.students[1].parameters():
            torch.nn.init.constant_(parameter, value)
        learners.iteration = t
        move_averages(learners, 0.5)
        values |= {t: next(learners.networks["student_b_average"].parameters()).flatten()[0].item()}
    assert values == pytest.approx({0: 1.0, 1: 1.5, 2: 3.75})


def test_averages_stand_in_for_students_alone():
    own = {"teacher": ("teacher",), "mean": ("student_a", "student_b")}
    assert averaged(own, 0.0) == own
    assert averaged(own, 0.9) == {"teacher": ("teacher",), "mean": ("student_a_average", "student_b_average")}


@pytest.mark.slow
def test_averages_are_scored_kept_and_gone_on_with(acdc_phantom, tmp_path):
    where = [
        "--root_path", acdc_phantom, "--models_path", tmp_path, "--labelnum", 2, "--batch_size", 2,
        "--patch_size", 32, 32, "--pre_iterations", 1, "--pre_val_every", 0, "--self_val_every", 2,
        "--average_decay", 0.6, "--select", "last", "--device", "cpu",
    ]  # fmt: skip
    call("ACDC_train.py", *where, "--exp", "long", "--self_iterations", 4)
    for iterations in (2, 4):  # goes on from averages, too
        first = ["--pretrained", tmp_path / "acdc_long_2_labeled", "--self_iterations", iterations]
        call("ACDC_train.py", *where, "--exp", "short", *first)
    folder, other = (tmp_path / f"acdc_{name}_2_labeled" / "self_train" for name in ("long", "short"))
    states, others = (checkpoints.load(f / "last.pth")["networks"] for f in (folder, other))
    assert set(states) == {"teacher", *STUDENTS, "student_a_average", "student_b_average"}
    same = {role: all(torch.equal(x, others[role][n]) for n, x in states[role].items()) for role in states}
    assert all(same.values()), same
    assert list(checkpoints.load(folder / "best_student_a.pth")["networks"]) == ["student_a_average"]

    settings = json.loads((folder.parent / "config.json").read_text(encoding="utf-8"))["config"]
    loaded = Weights(folder.parent, settings, "self_train", {}).load((4, 1), torch.device("cpu"))
    found = [next(iter(network.state_dict().values())) for network in loaded.networks]
    first = {role: next(iter(state.values())) for role, state in states.items()}
    assert all(any(torch.equal(x, first[f"{role}_average"]) for role in STUDENTS) for x in found[:2])
    assert not any(torch.equal(x, first[role]) for x in found for role in STUDENTS)
    network = build_network("unet", 4)
    for path in (folder / "best_student_a.pth", folder / "last.pth"):  # as --student_a_weights takes them
        load_weights(network, path, prefer="student_a")
    assert torch.equal(next(network.parameters()), first["student_a_average"])
    load_weights(network, folder.parent / "pre_train" / "last.pth", "student_a_average")  # --checkpoint's, without any
    call("test_ACDC.py", "--root_path", acdc_phantom, "--models_path", tmp_path, "--exp", "long", "--labelnum", 2)
    assert (folder.parent / "test").is_dir()
