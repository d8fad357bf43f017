"""Exported graphs give the networks' probabilities in other programs, and say what they need."""

import json

import numpy as np
import pytest
import torch
from helpers import fill
from test_honest_runs import main
from test_reuse import SLICES

from sdcl.export import KEY, METADATA, MeanProbabilities, export
from sdcl.networks import build_network
from sdcl.runs.errors import UserError

KINDS = {"3D": (("vnet", "resvnet_lowres"), (1, 64, 64, 32), 2), "2D": (("unet", "resunet"), (1, 32, 48), 4)}


def networks_of(kind):
    names, _, classes = KINDS[kind]
    return [fill(build_network(name, classes), seed).eval() for seed, name in enumerate(names)]


def run_graph(path, image):
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(["probabilities"], {"image": image})[0]
    return torch.jit.load(str(path))(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_gives_the_networks_probabilities(kind, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    networks, (_, shape, classes) = networks_of(kind), KINDS[kind]
    path = tmp_path / f"a.{'onnx' if form == 'onnx' else 'pt'}"
    export(networks, path, form, shape, {"size": shape})
    for count in (1, 3):  # not the number that it was traced with
        image = np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float32)
        with torch.no_grad():
            expected = sum(torch.softmax(n(torch.from_numpy(image)), 1) for n in networks).numpy() / 2
        found = run_graph(path, image)
        assert found.shape == (count, classes, *shape[1:]) and np.abs(found - expected).max() < 2e-4
        assert np.ptp(expected) > 0.1


def test_the_mean_is_of_probabilities_not_of_logits():
    class Fixed(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.tensor([[0.0, self.value]])

    found = MeanProbabilities([Fixed(0.0), Fixed(1e9)])(torch.zeros(1))
    assert found.tolist() == [[0.25, 0.75]]


def test_a_runs_answer_is_exported_with_what_its_input_needs(acdc_phantom, tmp_path):
    where = ["--root_path", acdc_phantom, "--models_path", tmp_path, *SLICES]
    main("ACDC_train.py", *where, "--self_iterations", 1)
    run = tmp_path / "acdc_SDCL_2_labeled"
    export_flags = ("--run", run, "--output", tmp_path / "a.pt", "--format", "torchscript")
    assert "/a.pt: torchscript of input (N, 1, 32, 32)" in main("export.py", *export_flags)
    assert "/a.pt, in place of the file that was there: " in main("export.py", *export_flags)
    extra = {METADATA: ""}
    model = torch.jit.load(str(tmp_path / "a.pt"), _extra_files=extra)
    told = json.loads(extra[METADATA])
    assert told["class_names"] == ["background", "RV", "Myo", "LV"] and told["size"] == [1, 32, 32]
    assert told["preprocessing"]["normalise"] == "minmax" and told["commits"]
    assert model(torch.zeros(1, 1, 32, 32)).sum(1).sub(1).abs().max() < 1e-5
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    main("export.py", "--run", run, "--output", tmp_path / "a.onnx", "--predictor", "teacher")
    (entry,) = [e for e in onnx.load(str(tmp_path / "a.onnx")).metadata_props if e.key == KEY]
    told = json.loads(entry.value)
    assert (told["predictor"], told["weights"], told["iteration"]) == ("teacher", "self_train/last.pth", 1)
    with pytest.raises(UserError, match="is no run's folder"):
        main("export.py", "--run", tmp_path / "none", "--output", tmp_path / "b.onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="--format onnx needs the package onnx: `pip install onnx onnxscript`"):
        export(networks_of("2D"), tmp_path / "a.onnx", "onnx", KINDS["2D"][1], {})
