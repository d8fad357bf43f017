"""The methods: each step against a plain oracle, the loop around each, ablations, refusals, the page on one's own."""

import copy
import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, method
from torch import nn
from torch.nn import functional as F

from sdcl import checkpoints
from sdcl.consistency import growing_decay, noisy, ramp
from sdcl.methods import check_settings, get
from sdcl.networks import build_network, resnet, unet, vnet
from sdcl.runs.config import method_names, parse, ramp_length
from sdcl.runs.errors import UserError
from sdcl.runs.experiment import validate_at
from sdcl.scoring.evaluation import Validation
from sdcl.steps import add_teacher, make_learners
from sdcl.training import pretrain, self_train

NAMES = ["bcp", "cps", "mean_teacher", "sdcl", "supervised", "ua_mt"]
CLASSES = 3


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The same networks with few filters."""
    for module in (resnet, unet, vnet):
        monkeypatch.setattr(module, "WIDTHS", (2, 4, 8, 16, 32))


def test_the_methods_are_those_of_the_page():
    assert method_names() == NAMES
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", page, re.MULTILINE))
    assert sorted(rows) == NAMES
    for name in NAMES:
        one = get(name)
        assert one.name == name and set(one.students) <= {"student_a", "student_b"}
        assert {role for roles in one.predictors.values() for role in roles} <= set(one.roles)
    with pytest.raises(UserError, match="--method fixmatch is not known: choose bcp, cps"):
        get("fixmatch")


def test_ramp_noise_and_decay():
    assert ramp(0, 10) == pytest.approx(math.exp(-5)) and ramp(5, 10) == pytest.approx(math.exp(-1.25))
    assert ramp(10, 10) == ramp(99, 10) == ramp(0, 0) == 1
    assert ramp_length(None, 700) == 280 and ramp_length(0, 700) == 0
    assert [growing_decay(t, 0.99) for t in (0, 1, 99, 1000)] == [0, 0.5, 0.99, 0.99]
    torch.manual_seed(0)
    noise = noisy(torch.full((200_000,), 3.0), 0.1) - 3
    assert noise.abs().max() <= 0.2 + 1e-6 and noise.mean().abs() < 1e-3
    assert noise.std().item() == pytest.approx(0.1 * 0.9594, rel=0.01)  # of a normal one clipped at two deviations


def learners_of(name, shape=(32, 48)):
    """A method's networks in train mode without dropout, in float64."""
    torch.manual_seed(0)
    pair = ("unet", "resunet") if len(shape) == 2 else ("vnet", "resvnet")
    learners = make_learners(*(build_network(n, CLASSES).double() for n in pair), base_lr=1e-3)
    learners.keep(get(name).students)
    if get(name).has_teacher:
        add_teacher(learners)
        for parameter in learners.networks["teacher"].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for network in learners.networks.values():
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout | nn.Dropout3d):
                module.p = 0.0
    return learners


def batch_of(shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = {key: torch.randn(2, 1, *shape, generator=generator).to(dtype) for key in ("x_a", "x_b", "u_a", "u_b")}
    return batch | {key: torch.randint(CLASSES, (2, *shape), generator=generator).byte() for key in ("y_a", "y_b")}


def sup(z, y):
    """(Dice + CE) / 2 with sums over the batch, written out."""
    p, target = z.softmax(1), F.one_hot(y.long(), CLASSES).movedim(-1, 1)
    axes = (0, *range(2, z.ndim))
    overlap, size = (p * target).sum(axes), (p**2).sum(axes) + target.sum(axes)
    dice = 1 - ((2 * overlap + 1e-10) / (size + 1e-10)).mean()
    return (dice + F.cross_entropy(z, y.long())) / 2


def drawn(like):
    return (0.1 * torch.randn_like(like)).clamp(-0.2, 0.2)


def oracle_losses(name, nets, batch, settings, t):
    """Each student's whole loss of one step."""
    rise = math.exp(-5 * (1 - min(t, settings.rampup) / settings.rampup) ** 2) if settings.rampup else 1
    losses = {r: (sup(n(batch["x_a"]), batch["y_a"]) + sup(n(batch["x_b"]), batch["y_b"])) / 2
              for r, n in nets.items() if r != "teacher"}  # fmt: skip
    unlabelled = [batch["u_a"], batch["u_b"]]
    if name == "cps":
        z = {r: [nets[r](u) for u in unlabelled] for r in ("student_a", "student_b")}
        for r, other in (("student_a", "student_b"), ("student_b", "student_a")):
            ce = [F.cross_entropy(mine, its.argmax(1)) for mine, its in zip(z[r], z[other], strict=True)]
            losses[r] = losses[r] + 0.1 * rise * sum(ce) / 2
    if name == "mean_teacher":
        differences = []
        for u in unlabelled:
            p = nets["student_a"](u + drawn(u)).softmax(1)
            differences.append((p - nets["teacher"](u + drawn(u)).detach().softmax(1)) ** 2)
        losses["student_a"] = losses["student_a"] + 0.1 * rise * torch.cat(differences).mean()
    if name == "ua_mt":
        targets, sure = [], []
        for u in unlabelled:
            targets.append(nets["teacher"](u + drawn(u)).detach().softmax(1))
            mean = torch.stack([nets["teacher"](u + drawn(u)).detach().softmax(1) for _ in range(8)]).mean(0)
            entropy = -(mean * mean.log()).sum(1)
            sure.append((entropy < (0.75 + 0.25 * rise) * math.log(CLASSES)).double())
        total = 0
        for u, target, where in zip(unlabelled, targets, sure, strict=True):
            squares = ((nets["student_a"](u + drawn(u)).softmax(1) - target) ** 2).sum(1)
            total = total + (squares * where).sum()
        count = sum(where.sum() for where in sure)
        everywhere = sum(where.numel() for where in sure)
        assert 0 < count < everywhere or rise > 0.9  # some places are sure, others not, until the ramp is up
        losses["student_a"] = losses["student_a"] + 0.1 * rise * total / (2 * count + 1e-16)
    return losses


@pytest.mark.parametrize("rampup", [0, 2, 50])
@pytest.mark.parametrize("name", ["cps", "mean_teacher", "supervised", "ua_mt"])
def test_three_steps_are_the_oracles(name, rampup):
    shape, settings = (32, 48), method(method=name, rampup=rampup, paste="no", ema_buffers=False)
    learners = learners_of(name)
    theirs = copy.deepcopy(learners.networks)
    optimisers = {r: torch.optim.Adam(n.parameters(), lr=1e-3) for r, n in theirs.items() if r != "teacher"}
    mask = torch.ones(shape).bool()
    for t in range(3):
        batch = batch_of(shape, seed=t)
        learners.iteration = t
        torch.manual_seed(t)
        found = get(name).self_train_step(learners, batch, mask, settings)
        torch.manual_seed(t)
        expected = oracle_losses(name, theirs, batch, settings, t)
        for optimiser in optimisers.values():
            optimiser.zero_grad()
        sum(expected.values()).backward()
        for optimiser in optimisers.values():
            optimiser.step()
        if "teacher" in theirs:
            decay = min(1 - 1 / (t + 1), 0.99)
            with torch.no_grad():
                pairs = zip(theirs["teacher"].parameters(), theirs["student_a"].parameters(), strict=True)
                for slow, fast in pairs:
                    slow.copy_(decay * slow + (1 - decay) * fast)
        for role, loss in expected.items():
            assert found[f"{role}/loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for role, network in theirs.items():
        ours = learners.networks[role].state_dict()
        for key, value in network.state_dict().items():
            if value.ndim > 1:
                torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-7, msg=f"{role} {key}")


@pytest.mark.parametrize("name", ["mean_teacher", "ua_mt"])
@pytest.mark.parametrize("averaged", [True, False])
def test_noise_leaves_the_statistics_alone_that_evaluation_uses(name, averaged):
    """Whatever the noise, they are those of the labelled images; a teacher's own move where they are not an average."""
    ends = []
    for noise in (0.0, 5.0):
        learners, settings = learners_of(name), method(method=name, noise=noise, paste="no", ema_buffers=averaged)
        learners.iteration = 3
        torch.manual_seed(0)
        get(name).self_train_step(learners, batch_of((32, 48), seed=0), torch.ones(32, 48).bool(), settings)
        ends.append({role: dict(network.named_buffers()) for role, network in learners.networks.items()})
    begin = {role: dict(network.named_buffers()) for role, network in learners_of(name).networks.items()}
    for key, first in ends[0]["student_a"].items():
        assert torch.equal(first, ends[1]["student_a"][key]) or key.endswith("num_batches_tracked")
        assert not torch.equal(first, begin["student_a"][key])  # the labelled ones did move them
    means = [key for key in ends[0]["teacher"] if key.endswith("running_mean")]
    assert all(torch.equal(ends[0]["teacher"][key], ends[1]["teacher"][key]) == averaged for key in means)
    momenta = {layer.momentum for layer in learners.networks["student_a"].modules() if hasattr(layer, "momentum")}
    assert momenta == {0.1}  # as it was


def test_bcp_is_sdcls_student_a_without_corrections():
    """Student b and the corrections are all that differs: with their weights 0 student a goes the same way."""
    shape, mask = (32, 48), torch.ones(32, 48).bool()
    mask[4:20, 8:30] = False
    ends = []
    without = method(mse_weight=0.0, kl_weight=0.0)
    for name, settings in (("bcp", method()), ("sdcl", without), ("sdcl", method(correct="none"))):
        learners = learners_of(name)
        learners.networks["teacher"].load_state_dict(learners.networks["student_a"].state_dict())
        for seed in range(2):
            losses = get(name).self_train_step(learners, batch_of(shape, seed=seed), mask, settings)
        ends.append((losses["student_a/loss"].item(), learners.networks["teacher"].state_dict()))
        assert ("discrepancy" in losses) == (name == "sdcl" and settings.correct != "none")
    for loss, state in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-12)
        weights = {key: value for key, value in ends[0][1].items() if value.ndim > 1}  # Adam divides rounding by itself
        assert all(torch.allclose(state[key], value, rtol=0, atol=1e-9) for key, value in weights.items())


def test_corrections_everywhere_act_on_every_voxel():
    shape, mask = (32, 48), torch.ones(32, 48).bool()
    learners = learners_of("sdcl")
    losses = get("sdcl").self_train_step(learners, batch_of(shape), mask, method(correct="everywhere"))
    assert losses["discrepancy"] == 2 * 2 * 32 * 48  # both mixes of two samples


@pytest.mark.parametrize(("cleaned", "kept"), [("yes", 3), ("no", 4)])
def test_pseudo_labels_are_cleaned_unless_told_not_to(cleaned, kept, monkeypatch):
    from sdcl import steps

    logits = torch.zeros(2, CLASSES, 32, 48)
    logits[:, 1, 3, 3:6] = logits[:, 1, 9, 9] = 5.0
    seen = []

    class Spy(steps.PendingLabels):
        def result(self):
            seen.append(super().result())
            return seen[-1]

    monkeypatch.setattr(steps, "PendingLabels", Spy)
    learners = learners_of("bcp")
    learners.networks["teacher"].forward = lambda x: logits.double()
    mask = torch.ones(32, 48).bool()
    get("bcp").self_train_step(learners, batch_of((32, 48)), mask, method(largest_component=cleaned))
    assert [int((labels == 1).sum()) for labels in seen] == [2 * kept, 2 * kept]


class TinyStreams:
    """The batches of every iteration."""

    def __init__(self, shape):
        self.shape = shape

    def names(self, iteration):
        return {"x_a": ["one"]}

    def batches(self, start, stop):
        for k in range(start, stop):
            yield batch_of(self.shape, torch.float32, seed=k)


def score(predictors):
    values = [float(next(n.parameters()).detach().sum() % 1) for n in predictors.networks]
    dice = {name: sum(values[i] for i in members) / len(members) for name, members in predictors.members.items()}
    return Validation(dice, np.zeros((3, 4, 4)))


def trained(folder, name, shape, self_iterations=5, **changes):
    """Both stages; the first is the same for all."""
    settings = method(method=name, pre_iterations=2, self_iterations=self_iterations, save_every=1, rampup=4, **changes)
    if len(shape) == 3:
        settings = SimpleNamespace(**(vars(settings) | {"connectivity": 26, "dice": "sample", "ema_buffers": False}))
    torch.manual_seed(0)
    pair = ("unet", "resunet") if len(shape) == 2 else ("vnet", "resvnet")
    learners = make_learners(*(build_network(n, CLASSES) for n in pair), base_lr=1e-3)
    common = {"validate": score, "validate_at": (2,), "validated_on": "val", "config": {}}
    pretrain(learners, TinyStreams(shape), folder, settings, **common)
    self_train(learners, TinyStreams(shape), folder, settings, start_from="best", **common)
    return learners


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_of_each_method_ends_with_the_same_bits(tmp_path, name, shape):
    whole = trained(tmp_path / "whole", name, shape)
    trained(tmp_path / "parts", name, shape, self_iterations=3)
    again = trained(tmp_path / "parts", name, shape)
    assert again.iteration == 5 and set(again.networks) == set(get(name).roles)
    for role, network in whole.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, again.networks[role].state_dict()[key]), (role, key)
    stage = tmp_path / "whole" / "self_train"
    for predictor, roles in get(name).predictors.items():
        assert set(checkpoints.load(stage / f"best_{predictor}.pth")["networks"]) == set(roles)
    header, *rows = (stage / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5 and all(f"student_a/{part}" in header.split(",") for part in get(name).parts)
    assert all(cell not in ("", "nan") for cell in rows[-1].split(","))  # each column is filled at a validation


def test_stage_one_is_the_same_for_all_methods(tmp_path):
    states = [trained(tmp_path / name, name, (32, 32), self_iterations=0) and checkpoints.load(
        tmp_path / name / "pre_train" / "last.pth")["networks"] for name in NAMES]  # fmt: skip
    for state in states[1:]:
        assert all(torch.equal(state[r][k], v) for r in states[0] for k, v in states[0][r].items())


@pytest.mark.parametrize("name", NAMES)
def test_bf16(tmp_path, name):
    trained(tmp_path, name, (32, 32), precision="bf16")


def test_without_pasting_inputs_are_the_images_and_the_teacher_may_go_without_dropout(tmp_path):
    learners = trained(tmp_path / "plain", "sdcl", (32, 32), mask_fraction=0)
    assert learners.iteration == 5
    learners = trained(tmp_path / "sure", "sdcl", (32, 32), teacher_dropout="no")
    modes = {
        role: {m.training for m in network.modules() if isinstance(m, nn.Dropout)}
        for role, network in learners.networks.items()
    }
    assert modes["teacher"] == {False} and learners.networks["teacher"].training


@pytest.mark.parametrize("name", NAMES)
def test_no_method_moves_from_a_value_that_is_not_finite_on(name):
    learners, mask = learners_of(name), torch.ones(32, 48).bool()
    mask[4:20, 8:30] = False
    step, settings = get(name).self_train_step, method(method=name, rampup=0)
    step(learners, batch_of((32, 48)), mask, settings)
    state = {(r, n): v.clone() for r, net in learners.networks.items() for n, v in net.named_parameters()}
    bad = batch_of((32, 48), seed=2)
    bad["x_a"][:] = torch.inf
    for batch in (bad, batch_of((32, 48), seed=3)):
        step(learners, batch, mask, settings)
    assert learners.halted == 1
    assert all(torch.equal(state[r, n], v) for r, net in learners.networks.items() for n, v in net.named_parameters())


@pytest.fixture
def mine(monkeypatch):
    """Let a method of one's own be there, without a file."""

    def add(**changes):
        module = SimpleNamespace(METHOD=dataclasses.replace(get("bcp"), **({"name": "mine"} | changes)))
        monkeypatch.setitem(sys.modules, "sdcl.methods.mine", module)
        monkeypatch.setattr("sdcl.methods.method_names", lambda: [*NAMES, "mine"])

    return add


def test_predictors_of_ones_own_are_scored_and_resumed(tmp_path, mine):
    mine(predictors={"student_a": ("student_a",), "both": ("student_a", "teacher")})
    trained(tmp_path, "mine", (32, 32), self_iterations=3)
    assert trained(tmp_path, "mine", (32, 32)).iteration == 5
    assert set(checkpoints.load(tmp_path / "self_train" / "best_both.pth")["networks"]) == {"student_a", "teacher"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "mine.py calls its method other: its name must be the file's, mine"),
        ({"self_train_step": lambda *_: {"student_a/loss": torch.zeros(())}},
         "mine.py names no student_a/grad_norm: end it with `return named | descend"),
        ({"parts": ("dice",)}, "mine.py names student_a/ce, which its METHOD lacks: add them to its parts or totals"),
    ],
)  # fmt: skip
def test_mistakes_in_ones_own_method_are_named(tmp_path, mine, changes, message):
    mine(**changes)
    with pytest.raises(UserError, match=re.escape(message)):
        trained(tmp_path, "mine", (32, 32))


def test_a_file_that_is_no_method_disables_only_itself(acdc_phantom, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sdcl.methods.broken", SimpleNamespace())
    monkeypatch.setattr("sdcl.methods.method_names", lambda: [*NAMES, "broken"])
    with pytest.raises(UserError, match="broken.py cannot be read as a method .AttributeError"):
        get("broken")
    check_settings(parse(script("ACDC_train").Config, ["--method", "bcp"]))
    broken = dataclasses.replace(get("bcp"), reads=("consistancy_weight",))
    monkeypatch.setattr(sys.modules["sdcl.methods.bcp"], "METHOD", broken)
    with pytest.raises(UserError, match="bcp.py reads consistancy_weight, which no header field is called"):
        check_settings(parse(script("ACDC_train").Config, ["--method", "bcp"]))


def test_when_a_stage_is_validated_follows_from_the_header():
    acdc = parse(script("ACDC_train").Config, [])
    assert sorted(validate_at(acdc, "pre_train"))[:2] == [5650, 6215]
    pancreas = parse(script("pancreas/Pancreas_train").Config, [])
    assert sorted(validate_at(pancreas, "self_train"))[6:9] == [3500, 4000, 4125]
    own = parse(script("own_train").Config, ["--root_path", "x", "--pre_val_every", "500", "--pre_iterations", "1500"])
    own.patch_size = (96, 96, 96)  # pre_val_from is of 2D
    assert sorted(validate_at(own, "pre_train")) == [500, 1000, 1500]
    own.patch_size = (256, 256)
    assert sorted(validate_at(own, "pre_train")) == [200, 700, 1200]


# --- scripts ---


def script(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / "code" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(name, *arguments):
    module = script(name)
    module.main(parse(module.Config, [str(a) for a in arguments]))


@pytest.fixture(scope="module")
def stage_one(acdc_phantom, la_phantom, scratch):
    return {"acdc": (acdc_phantom, scratch), "la": (la_phantom, scratch)}


TINY = {
    "acdc": ("ACDC_train", "test_ACDC", ("--patch_size", 32, 32, "--batch_size", 2)),
    "la": ("LA_train", "test_LA", ("--patch_size", 32, 16, 16, "--stride", 16, 16, 16)),
}


def first_stage(data, stage_one):
    """The run whose stage 1 all methods share, trained once."""
    root, models = stage_one[data]
    train, _, tiny = TINY[data]
    first = models / f"{data}_stage1_2_labeled"
    if not (first / "pre_train" / "last.pth").exists():
        call(train, "--root_path", root, "--models_path", models, "--labelnum", 2, "--device", "cpu", *tiny, "--select",
             "last", "--pre_iterations", 1, "--exp", "stage1", "--self_iterations", 0)  # fmt: skip
    return first


# In 3D two of them, of two students and of one with a teacher; `make slow` runs the others. Each loop in 3D is above.
IN_3D = ("sdcl", "mean_teacher")
SCRIPTS = [
    pytest.param(name, data, marks=[pytest.mark.slow] * (data == "la" and name not in IN_3D))
    for name in NAMES
    for data in TINY
]


@pytest.mark.parametrize(("name", "data"), SCRIPTS)
def test_each_method_trains_tests_and_predicts(data, name, stage_one, tmp_path, capsys):
    root, models = stage_one[data]
    train, test, tiny = TINY[data]
    where = ("--root_path", root, "--models_path", models, "--labelnum", 2, "--device", "cpu")
    first = first_stage(data, stage_one)
    common = (*where, *tiny, "--select", "last", "--pre_iterations", 1)
    call(train, *common, "--self_iterations", 2, "--exp", name, "--method", name, "--pretrained", first)
    stride = ("--stride", 16, 16, 16) if data == "la" else ()
    call(test, *where, *stride, "--exp", name)
    said = capsys.readouterr().out
    results = models / f"{data}_{name}_2_labeled" / "test" / "self_train_test"
    assert f"method {name}" in said and all(
        re.search(rf"^{p}, .*last \(2\)", said, re.MULTILINE) for p in get(name).predictors
    )
    assert (results / "cases.csv").read_text().splitlines()[1].startswith(f"{name},")
    assert (results / "cases.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="has no pre_train, only self_train: give --stage self_train"):
        call(test, *where, *stride, "--exp", name, "--stage", "pre_train")
    scan = write_scan(tmp_path / "scan.nii.gz")
    call("predict", "--run", models / f"{data}_{name}_2_labeled", "--input", scan, "--output", tmp_path / "out",
         "--device", "cpu")  # fmt: skip
    assert (tmp_path / "out" / "scan_prediction.nii.gz").exists()
    if name == "supervised":
        with pytest.raises(UserError, match="--predictor mean is none of supervised's: choose student_a"):
            call("predict", "--run", models / f"{data}_{name}_2_labeled", "--input", scan, "--output", tmp_path / "no",
                 "--device", "cpu", "--predictor", "mean")  # fmt: skip


def write_scan(path):
    import nibabel

    image = np.random.default_rng(0).random((40, 36, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([1.0, 1.0, 1.5, 1.0])), path)
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method", "fixmatch"), "--method fixmatch is not known: choose bcp, cps, mean_teacher"),
        (
            ("--method", "bcp", "--kl_weight", 0.1),
            "--kl_weight is not read by --method bcp, only by sdcl: ",
        ),
        (("--noise", 0.2), "--noise is not read by --method sdcl, only by mean_teacher, ua_mt"),
        (("--method", "cps", "--correct", "none"), "--correct is not read by --method cps, only by sdcl"),
        (("--method", "bcp", "--rampup", 7), "--rampup is not read by --method bcp, only by cps, mean_teacher, ua_mt"),
        (
            ("--correct", "none", "--mse_weight", 0.9),
            "--mse_weight does nothing with --correct none: leave",
        ),
        (("--largest_component", "no", "--connectivity", 4), "--connectivity does nothing with --largest_component no"),
        (("--method", "ua_mt", "--passes", 0), "--passes is 0: it must be above 0"),
        (("--method", "ua_mt", "--rampup", -1), "--rampup is -1: it must not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags, message, acdc_phantom, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        call("ACDC_train", "--root_path", acdc_phantom, "--models_path", tmp_path, "--labelnum", 2, "--device", "cpu",
             "--patch_size", 32, 32, *flags)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_labelled_images_alone_need_no_others(acdc_phantom, tmp_path, capsys):
    """The upper bound: every case labelled, as many updates; what stage 1 scores is no method's."""
    where = ("--root_path", acdc_phantom, "--models_path", tmp_path, "--labelnum", 4, "--device", "cpu")
    tiny = ("--patch_size", 32, 32, "--batch_size", 2, "--pre_iterations", 1, "--self_iterations", 1)
    with pytest.raises(UserError, match="leaves no unlabelled patients"):
        call("ACDC_train", *where, *tiny)
    call("ACDC_train", *where, *tiny, "--method", "supervised")
    for stage, named in (("self_train", "supervised"), ("pre_train", "pre_train")):
        call("test_ACDC", *where, "--stage", stage)
        results = tmp_path / "acdc_SDCL_4_labeled" / "test" / f"{stage}_test"
        assert (results / "cases.csv").read_text().splitlines()[1].startswith(f"{named},")
    capsys.readouterr()
    call("ACDC_train", *where, *tiny, "--exp", "again", "--method", "supervised", "--pre_dice", "whole", "--pretrained",
         tmp_path / "acdc_SDCL_4_labeled")  # fmt: skip
    said = capsys.readouterr().out
    assert "--pre_dice: of stage 1, which --pretrained brings: nothing reads it here" in said
    assert "method: supervised: labelled images alone" in said


def test_given_weights_are_of_the_student_that_they_are_given_for(stage_one, tmp_path):
    root, models = stage_one["acdc"]
    state = checkpoints.load(first_stage("acdc", stage_one) / "pre_train" / "last.pth")
    state["config"] |= {"student_b": "unet"}  # as if both were of one architecture
    one = tmp_path / "a_alone.pth"
    checkpoints.save(state | {"networks": {"student_a": state["networks"]["student_a"]}}, one)
    files = ("--student_a_weights", one, "--student_b_weights", one)
    with pytest.raises(UserError, match="a_alone.pth holds student_a, no student_b: give that student's file"):
        call("test_ACDC", "--root_path", root, "--models_path", models, "--device", "cpu", *files)
    checkpoints.save(state | {"networks": {"teacher": state["networks"]["student_a"]}}, tmp_path / "teacher.pth")
    network = build_network("unet", 4)
    assert checkpoints.load_weights(network, tmp_path / "teacher.pth", prefer="student_a").loaded


def test_every_script_knows_every_setting_of_a_method():
    headers = [script(name).Config for name in ("ACDC_train", "LA_train", "pancreas/Pancreas_train", "own_train")]
    for name in NAMES:
        for field in get(name).reads:
            defaults = {repr(header.__dataclass_fields__[field].default) for header in headers}
            assert defaults, field
