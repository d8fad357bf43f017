"""Undo each detail of docs/implementation_details.md and see a test fail: a part of `make mutants`.

`python tests/details.py 3 17` tries some of them alone. Each edit is made in a copy of the repository.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Undo:
    """An edit that undoes a detail, and the tests one of which has to fail then.

    Attributes:
        path: of the file, from the repository's root.
        old: text that is in it once.
        new: what to put in its place.
        tests: arguments to pytest: files, and what to choose in them.
    """

    path: str
    old: str
    new: str
    tests: str


LOSSES, STEPS, TRAINING = "code/sdcl/losses.py", "code/sdcl/steps.py", "code/sdcl/training.py"
ACDC, LA, PANCREAS = "code/ACDC_train.py", "code/LA_train.py", "code/pancreas/Pancreas_train.py"
DEFAULTS_2D, DEFAULTS_3D = "tests/test_scripts.py -k the_defaults", "tests/test_3d.py -k the_defaults"
TEXTBOOK = "tests/test_steps.py -k textbooks"
UNDONE: dict[int, tuple[Undo, ...]] = {
    1: (
        Undo(TRAINING, "network.train()  #", 'network.train(network is not self.learners.networks.get("teacher"))  #',
             "tests/test_training.py -k train_mode"),
    ),
    2: (
        Undo("code/sdcl/teacher.py", "    if buffers:", "    if False:", "tests/test_teacher.py"),
        Undo(ACDC, "ema_buffers: bool = True", "ema_buffers: bool = False", DEFAULTS_2D),
    ),
    3: (
        Undo(STEPS, "learners.networks[role](mixed) for role",
             "learners.networks[role](torch.cat([mixed, mixed * 2]))[: len(mixed)] for role", TEXTBOOK),
    ),
    4: (
        Undo("code/sdcl/mixing.py", "torch.randint(side - b,", "torch.randint(side - b + 1,", "tests/test_mixing.py"),
        Undo("code/sdcl/mixing.py", "torch.where(mask.bool(), image, patch)", "torch.where(mask.bool(), patch, image)",
             "tests/test_mixing.py"),
    ),
    5: (
        Undo(LOSSES, '"batch": 1e-10', '"batch": 1e-5', "tests/test_losses.py"),
        Undo(LOSSES, 'p if dice == "sample" else square', "p", "tests/test_losses.py"),
        Undo(LOSSES, '(x if dice == "sample" else total)', "x", "tests/test_losses.py"),
    ),
    6: (
        Undo(LOSSES, "count[region, :, :, ce + 3 * regions]", "count[:, :, :, ce + 3 * regions]",
             "tests/test_losses.py"),
        Undo(ACDC, "u_weight: float = 0.5", "u_weight: float = 1.0", DEFAULTS_2D),
    ),
    7: (
        Undo(LOSSES, "count[:, 1:, :, mse + 3", "count[:, 2:, :, mse + 3", "tests/test_losses.py"),
        Undo(LOSSES, "over_classes[log_p, region, 2:", "over_classes[log_p, region, 1:", "tests/test_losses.py"),
        Undo(LOSSES, "count[:, 2:, :, kl + 3", "count[:, 1:, :, kl + 3", "tests/test_losses.py"),
    ),
    8: (
        Undo(LOSSES, ":, kl] = -1 / classes", ":, kl] = -1 / classes; count[region, 2:, :, kl] = -math.log(classes)",
             "tests/test_losses.py"),
    ),
    9: (
        Undo(STEPS, 'mask if settings.pre_dice == "regions" else None', "None", TEXTBOOK),
        Undo(ACDC, '] = "regions"', '] = "whole"', DEFAULTS_2D),
        Undo(LA, '] = "whole"', '] = "regions"', DEFAULTS_3D),
    ),
    10: (
        Undo("dataloaders/streams.py", "len(cases) * repeat - 1 - places)", "places)", "tests/test_data.py"),
        Undo("dataloaders/streams.py", "divmod(iteration, self.iterations_per_epoch)", "0, iteration",
             "tests/test_data.py"),
        Undo(ACDC, "shuffle: bool = False", "shuffle: bool = True", DEFAULTS_2D),
    ),
    11: (
        Undo("dataloaders/transforms.py", "elif rng.random() < how.", "if rng.random() < how.",
             "tests/test_data.py"),
        Undo("dataloaders/transforms.py", "range(rng.integers(4))", "range(rng.integers(1, 4))",
             "tests/test_data.py"),
    ),
    12: (
        Undo("code/sdcl/inference.py", "ndimage.zoom(np.arange(1, side + 1), size / side, order=0) - 1",
             "np.linspace(0, side - 1, size).round().astype(int)", "tests/test_data.py tests/test_inference.py"),
    ),
    13: (
        Undo("code/sdcl/pseudo_labels.py", ">= 0.5", "> 0.5", "tests/test_pseudo_labels.py"),
        Undo("code/sdcl/scoring/evaluation.py", "[1] > 0.5).astype", "[1] >= 0.5).astype", "tests/test_evaluation.py"),
        Undo(PANCREAS, '"threshold"] = "argmax"', '"threshold"] = "threshold"', DEFAULTS_3D),
    ),
    14: (
        Undo(PANCREAS, '] = "centre"', '] = "random"', DEFAULTS_3D),
        Undo(PANCREAS, "unlabelled_repeat: int = 1 ", "unlabelled_repeat: int = 10 ", DEFAULTS_3D),
        Undo("dataloaders/transforms.py", "round(room / 2) if rng is None", "(room + 1) // 2 if rng is None",
             "tests/test_3d.py -k crops"),
    ),
    15: (
        Undo("dataloaders/transforms.py", "max((patch - side) // 2 + 1, 0)", "max((patch - side + 1) // 2, 0)",
             "tests/test_3d.py -k crops"),
    ),
    16: (
        Undo(LA, '"last"] = "test"', '"last"] = "last"', DEFAULTS_3D),
        Undo(PANCREAS, '"last"] = "test"', '"last"] = "last"', DEFAULTS_3D),
    ),
    17: (
        Undo(STEPS, "if weight_decay else torch.optim.Adam\n", "if weight_decay else torch.optim.AdamW\n",
             TEXTBOOK),
        Undo(STEPS, '{"state": values["state"], "param_groups": groups}', '{"state": {}, "param_groups": groups}',
             "tests/test_training.py -k stage_one"),
        Undo(STEPS, 'copy.deepcopy(learners.networks["student_a"])', 'copy.deepcopy(learners.networks["student_b"])',
             "tests/test_training.py -k golden"),
    ),
    18: (
        Undo(TRAINING, 'if dice > self.learners.best.get(name, {"dice": -1.0})["dice"]:',
             'if validation.dice["student_a"] > self.learners.best.get(name, {"dice": -1.0})["dice"]:',
             "tests/test_training.py -k best"),
    ),
    19: (
        Undo("code/sdcl/pseudo_labels.py", "members[np.isin(members, largest)][0]",
             "members[np.isin(members, largest)][-1]", "tests/test_pseudo_labels.py"),
        Undo(PANCREAS, "connectivity: int = 18", "connectivity: int = 26", DEFAULTS_3D),
        Undo(ACDC, "connectivity: int = 8", "connectivity: int = 4", DEFAULTS_2D),
    ),
    20: (
        Undo("code/sdcl/metrics.py", "asd = float(to_reference.mean())",
             "asd = float(np.concatenate([to_reference, to_prediction]).mean())", "tests/test_metrics.py"),
        Undo("code/sdcl/metrics.py", "np.percentile(np.concatenate([to_reference, to_prediction]), 95)",
             "max(np.percentile(to_reference, 95), np.percentile(to_prediction, 95))", "tests/test_metrics.py"),
        Undo("code/sdcl/scoring/evaluation.py", "voxels = case_metrics(prediction, reference, distances=distances)",
             "voxels = case_metrics(prediction, reference, case.spacing, distances=distances)",
             "tests/test_evaluation.py"),
    ),
    21: (
        Undo("code/sdcl/scoring/tables.py", 'if protocol == "default" or not row.empty:', "if True:",
             "tests/test_evaluation.py"),
        Undo("code/sdcl/metrics.py", "math.nan if size_p == size_r else 0.0", "0.0", "tests/test_metrics.py"),
    ),
    22: (
        Undo("code/sdcl/checkpoints.py", 'name not in wanted and name not in left_out]', "False]",
             "tests/test_checkpoints.py"),
        Undo("code/sdcl/checkpoints.py", "unused and unused.fullmatch(name))", "False)", "tests/test_checkpoints.py"),
    ),
    23: (
        Undo("code/sdcl/networks/vnet.py", "width, 3, padding=1), width)", "width, 3, padding=1, bias=False), width)",
             "tests/test_networks.py -k names"),
    ),
    24: (
        Undo(TRAINING, "        torch.manual_seed(iteration_seed(self.settings.seed, self.stage, number))\n", "",
             "tests/test_training.py -k same_bits"),
        Undo("dataloaders/streams.py", "kind + direction, iteration, place)", "kind + direction, place)",
             "tests/test_data.py"),
    ),
    25: (
        Undo(LA, '"bf16"] = "fp32"', '"bf16"] = "bf16"', DEFAULTS_3D),
        Undo("code/sdcl/runs/devices.py", 'cudnn.allow_tf32 = precision == "tf32"', "cudnn.allow_tf32 = True",
             "tests/test_arithmetic.py -k tf32"),
        Undo(LOSSES, "yield z.to(dtype),", "yield z,", "tests/test_losses.py"),
    ),
    26: (
        Undo(STEPS, "    for (image, patch), labels, weights in mixes:\n",
             "    for (image, patch), labels, weights in mixes:\n        _clear_gradients(learners)\n", TEXTBOOK),
        Undo(STEPS, "fused=True", "fused=False", "tests/test_steps.py -k moves"),
    ),
    27: (
        Undo("code/sdcl/networks/layers.py", "1 / (1 - dropped / 2**BITS)", "1.0", "tests/test_networks.py"),
        Undo("code/sdcl/networks/layers.py", "return _Normalise.apply(", "return super().forward(x)\n        (",
             "tests/test_networks.py -k batch_norm"),
        Undo("code/sdcl/networks/layers.py", "n, channels, size, channels, self.eps", "n, channels, size, 1, self.eps",
             "tests/test_networks.py -k golden"),
    ),
}  # fmt: skip


def is_noticed(undo: Undo, copy: Path) -> bool:
    """Tell whether a test fails in a copy of the repository once a detail is undone there."""
    path = copy / undo.path
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(undo.old, undo.new), encoding="utf-8")
    run = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *undo.tests.split()]
    done = subprocess.run(run, cwd=copy, capture_output=True, text=True)
    path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(
            f"error: pytest {undo.tests} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1 and " failed" in done.stdout.splitlines()[-1]


def main() -> None:
    """Undo each detail, and print what no test noticed."""
    chosen = [int(number) for number in sys.argv[1:]] or list(UNDONE)
    ignore = shutil.ignore_patterns(".git", ".venv", "mutants", "models", "__pycache__", "demo_output", ".*_cache")
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignore))
        for number in chosen:
            for undo in UNDONE[number]:
                noticed = is_noticed(undo, copy)
                unnoticed += not noticed
                print(f"{number:2} {undo.path}: {'a test fails' if noticed else 'NO TEST NOTICES'}", flush=True)
    if unnoticed:
        sys.exit(f"error: {unnoticed} undone details go unnoticed.")


if __name__ == "__main__":
    main()
