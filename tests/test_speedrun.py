"""Seconds to a Dice: what the driver reads of a training, and when it calls a seed failed."""

import csv

import pytest
import speedrun
from launches import launch_line, launch_rows

from sdcl.runs.errors import UserError

TRAINING = """
import sys, time
seed = int(sys.argv[sys.argv.index("--seed") + 1])
print("pre_train 50: Dice on validation cases: student_a 0.9 (best 0.9 at 50), student_b 0.1 (best 0.1 at 50), "
      "mean 0.5000 (best 0.5000 at 50)")
for k in (50, 100):
    dice = 0.6 + 0.001 * k if seed == 1 else 0.55
    print(f"self_train {k}: Dice on the TEST cases (the published selection): student_a 0.9 (best 0.9 at 50), "
          f"mean {dice:.4f} (best 0.9000 at 50)", flush=True)
if seed == 1:
    time.sleep(60)  # is ended as soon as the target is reached
if seed == 3:
    sys.exit("error: no data")
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A header whose training is a stub that says what a training says."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "stub.py").write_text(TRAINING, encoding="utf-8")
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    monkeypatch.setattr(speedrun, "SCRIPTS", {"acdc": ("stub.py", "")})
    return speedrun.Config("row", models_path=tmp_path / "runs", output=tmp_path / "rows.csv", seeds=(1, 2))


def test_a_seed_ends_at_the_validation_that_reaches_the_target(config, capsys):
    speedrun.main(config)
    with config.output.open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["reached"], first["stage"], first["iteration"], first["dice"]) == ("yes", "self_train", "100", "0.7")
    assert 0 <= float(first["seconds"]) < 30
    assert (second["reached"], second["stage"], second["dice"]) == ("no", "self_train", "0.55")
    assert "mean of 1 seeds, 1 of 2 failed" in capsys.readouterr().out
    with pytest.raises(UserError, match="has a row row already: give another --name"):
        speedrun.main(config)


@pytest.mark.parametrize("fastest", ["fp32", "bf16"])
def test_the_fastest_precision_is_chosen_told_and_kept(config, capsys, monkeypatch, fastest):
    config.seeds, config.target, config.precision, config.flags = (2,), 0.5, "fastest", "--recipe fast"
    monkeypatch.setattr(speedrun, "fastest_precision", lambda device: fastest)
    speedrun.main(config)
    assert speedrun.read(config.output)[0]["flags"] == f"--recipe fast --precision {fastest}"
    assert f"row: in {fastest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--precision bf16", "--flags holds --precision"), ("--device=cpu", "give fp32 or bf16 with a --device")],
)
def test_two_answers_about_the_precision_are_refused(config, flags, message):
    config.precision, config.flags = "fastest", flags
    with pytest.raises(UserError, match=message):
        speedrun.main(config)


def test_a_training_that_goes_on_to_its_end_keeps_both_scores(config):
    """The target is reached at the first validation, and a later one is better or worse."""
    config.seeds, config.target, config.finish = (1, 2), 0.52, True
    script = speedrun.ROOT / "code" / "stub.py"
    script.write_text(TRAINING.replace("time.sleep(60)", "pass").replace("0.001 * k", "-0.001 * k"), encoding="utf-8")
    speedrun.main(config)
    first, second = speedrun.read(config.output)
    assert [first[k] for k in ("reached", "iteration", "dice", "end_iteration", "end_dice")] == [
        "yes", "50", "0.55", "100", "0.5",
    ]  # fmt: skip
    assert (second["dice"], second["end_dice"]) == ("0.55", "0.55")
    assert 0 <= float(first["seconds"]) <= float(first["end_seconds"])


def test_a_training_that_fails_after_the_target_has_no_end(config):
    config.seeds, config.target, config.finish = (1,), 0.52, True
    script = speedrun.ROOT / "code" / "stub.py"
    script.write_text(TRAINING.replace("time.sleep(60)", "sys.exit('error: the disk is full')"), encoding="utf-8")
    speedrun.main(config)
    (row,) = speedrun.read(config.output)
    assert (row["reached"], row["end_dice"], row["end_seconds"]) == ("yes", "", "")


def test_a_training_that_ends_before_any_validation_is_an_error(config):
    config.seeds = (3,)
    script = speedrun.ROOT / "code" / "stub.py"
    script.write_text("import sys; sys.exit('error: no ACDC data')", encoding="utf-8")
    with pytest.raises(UserError, match="seed 3 ended without a validation: error: no ACDC data"):
        speedrun.main(config)


def test_a_seed_that_takes_too_long_is_ended(config):
    config.seeds, config.limit_s = (2,), 1.0
    (speedrun.ROOT / "code" / "stub.py").write_text(
        TRAINING.replace("if seed == 1:", "if seed == 2:"), encoding="utf-8"
    )
    speedrun.main(config)
    assert speedrun.read(config.output)[0]["reached"] == "no"


def test_what_counting_launches_lacks_is_said(monkeypatch):
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    assert "not measured: this PyTorch is built for CUDA" in launch_line(next(launch_rows()))
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "not measured: no C++ compiler, or no ninja" in launch_line(next(launch_rows()))


def test_launches_are_counted_beside_the_networks_own(monkeypatch):
    """Two passes there and back of two students, and the teacher's two: 2 * (1 + 2 + 3 + 4) + 2 * 1 = 22."""
    passes = {"a forward": 1, "a backward": 2, "b forward": 3, "b backward": 4}
    counted = {f"{n.split()[0]} fp32 train {n.split()[1]}": {"conv": k} for n, k in passes.items()}
    monkeypatch.setattr("launches.STEPS", {"2D": ("a", "b")})
    monkeypatch.setattr("launches.lacking", lambda: "")
    monkeypatch.setattr("launches.build_device", lambda folder: folder)
    monkeypatch.setattr("launches.count", lambda _: counted | {"sdcl 2D fp32 self_train": {"conv": 20, "add": 13}})
    (row,) = launch_rows()
    assert (row["networks"], row["step"], row["beside"]) == (22, 33, 0.5)
    assert "33 kernels a step, 22 of them the networks' own: 50% beside them (goal 15%)" in launch_line(row)
