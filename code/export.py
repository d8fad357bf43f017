"""Write a run as one graph for other programs: `python code/export.py --run models/<run> --output a.onnx`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whichever is installed

from sdcl.runs.config import run_script
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, commits_of, known_runs, read_config, read_task, sizes_of, start_logging
from sdcl.runs.written_files import check_replaceable, is_own_file


@dataclass
class Config:
    """Write one graph, ONNX or TorchScript, from normalised windows or slices to the predictor's probabilities.

    Its metadata say how a scan is normalised, of which size the input is, what the classes are called, how
    probabilities become labels, and which weights these are; docs/predicting.md shows how it is run.
    """

    run: Path  # a run's folder, models/<data set>_<exp>_<labelnum>_labeled
    output: Path  # the file to write
    format: Literal["onnx", "torchscript"] = "onnx"  # onnx needs the packages onnx and onnxscript
    stage: Literal["self_train", "pre_train"] = "self_train"  # whose checkpoints; the best, or the last of no best
    checkpoint: Path | None = None  # this file instead; with --predictor, of networks that it holds
    predictor: str | None = None  # student_a, student_b, mean or teacher; None: the method's own answer


def main(config: Config) -> None:
    """Read the run, load its networks and write them."""
    start_logging()
    if not (config.run / "config.json").is_file():
        raise UserError(f"--run {config.run} is no run's folder ({known_runs(config.run.parent)}): give one of these.")
    check_replaceable(config.output)
    if config.output.exists() and is_own_file(config.output):
        raise UserError(f"--output {config.output} is a file of a run, no export: choose another file.")
    settings, task = read_config(config.run), read_task(config.run)
    import torch  # takes a second, which a wrong flag need not wait for

    from sdcl.export import export
    from sdcl.runs.weights import load_predictor

    names = list(task["class_names"])
    loaded = load_predictor(config, settings, sizes_of(task), torch.device("cpu"))
    shape = [sizes_of(task)[1], *settings["patch_size"]]
    metadata = {
        "run": config.run.resolve().name, "method": settings.get("method", "sdcl"), "predictor": loaded.predictor,
        "weights": loaded.path.name if config.checkpoint else f"{config.stage}/{loaded.path.name}",
        "iteration": loaded.iteration, "commits": [] if config.checkpoint else commits_of(config.run),
        "input": "image, float32 (N, channels, *size), normalised as in preprocessing", "size": shape,
        "output": "probabilities, float32 (N, classes, *size)", "class_names": ["background", *names],
        "label_values": [0, *task.get("label_values", range(1, len(names) + 1))],
        "decision_rule": task["decision_rule"], "preprocessing": task["preprocessing"],
        "trained_on_crops": task["trained_on_crops"],
    }  # fmt: skip
    replaces = ", in place of the file that was there" * config.output.exists()
    export(loaded.networks, config.output, config.format, shape, metadata)
    sides = ", ".join(map(str, shape))
    LOGGER.info("written to %s%s: %s of input (N, %s)", config.output, replaces, config.format, sides)


if __name__ == "__main__":
    run_script(main, Config)
