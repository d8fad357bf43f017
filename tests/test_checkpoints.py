import json
import os

import pytest
import torch
from helpers import GOLDEN, fill

from sdcl import checkpoints
from sdcl.checkpoints import load_weights
from sdcl.networks import build_network
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import RECORD

FIGURES = json.loads((GOLDEN / "networks.json").read_text())
CLASSES = {"unet": 4, "resunet": 4, "vnet": 2, "resvnet": 2}


def same(network, state):
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("container", [False, True])
def test_published_forms(tmp_path, name, prefix, container):
    wanted = fill(build_network(name, CLASSES[name]), 3).state_dict()
    unused = {key: torch.zeros(shape) for key, shape in FIGURES[name]["unused"].items()}
    state = {prefix + key: value for key, value in (wanted | unused).items()}
    payload = {"net": state, "opt": torch.optim.Adam([torch.zeros(1)]).state_dict(), "epoch": 7} if container else state
    torch.save(payload, tmp_path / "published.pth")
    network = build_network(name, CLASSES[name])
    report = load_weights(network, tmp_path / "published.pth")
    assert same(network, wanted)
    assert set(report.left_out) == set(unused) and set(report.loaded) == set(wanted)
    assert f"{len(wanted)} tensors loaded" in str(report)
    assert (f"left out {len(unused)}" in str(report)) == bool(unused)


def test_only_the_listed_unused_names_are_left_out(tmp_path):
    for name, foreign in (
        ("unet", "projection_head.9.weight"),
        ("resvnet", "block_one.bn.weight"),
        ("vnet", "block_ten.x"),
    ):
        network = build_network(name, CLASSES[name])
        torch.save(network.state_dict() | {foreign: torch.zeros(1)}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"has the unknown {foreign}"):
            load_weights(network, tmp_path / "x.pth")


def test_weights_of_another_resolution_do_not_fit(tmp_path):
    for trained, asked in (("vnet", "vnet_lowres"), ("vnet_lowres", "vnet")):
        torch.save(build_network(trained, 2).state_dict(), tmp_path / "x.pth")
        with pytest.raises(UserError, match="block_one.conv.0.weight"):
            load_weights(build_network(asked, 2), tmp_path / "x.pth")


def test_our_own_form_finds_the_network_that_fits(tmp_path):
    networks = {"student_a": build_network("unet", 2), "student_b": build_network("resunet", 2)}
    payload = {"networks": {role: n.state_dict() for role, n in networks.items()}, "iteration": 5}
    checkpoints.save(payload, tmp_path / "last.pth")
    network = build_network("resunet", 2)
    assert load_weights(network, tmp_path / "last.pth").iteration == 5
    assert same(network, networks["student_b"].state_dict())
    with pytest.raises(UserError, match="holds no teacher, only student_a, student_b"):
        load_weights(network, tmp_path / "last.pth", "teacher")
    with pytest.raises(UserError, match="of which 0 fit a VNet: say which"):
        load_weights(build_network("vnet", 2), tmp_path / "last.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.out_conv.bias"), "it lacks decoder.out_conv.bias; choose"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), "has the unknown head.weight; choose"),
        (
            lambda s: s.update({"decoder.out_conv.bias": torch.zeros(9)}),
            r"shape for decoder.out_conv.bias \(\(9,\) where \(4,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_copied(tmp_path, change, message):
    network = fill(build_network("unet", 4), 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        load_weights(network, tmp_path / "other.pth")
    assert same(network, before)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"net": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="cannot|not a checkpoint that can be read safely"):
        load_weights(build_network("unet", 4), tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: train first"),
        (b"", "not a checkpoint"),
        (b"PK\x03\x04 nonsense", "not a checkpoint"),
        (bytes(range(256)) * 8, "not a checkpoint"),
        (b"\x80\x02}q\x00(X", "not a checkpoint"),
    ],
)
def test_missing_and_damaged_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path / "x.pth")


def test_truncated_and_foreign_content(tmp_path):
    checkpoints.save({"networks": {"student_a": {"w": torch.zeros(1000)}}}, tmp_path / "x.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:2000])
    with pytest.raises(UserError, match="cut.pth is not a checkpoint"):
        checkpoints.load(tmp_path / "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not a dict"):
        checkpoints.load(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(UserError, match="neither a state dict nor a container"):
        load_weights(build_network("unet", 4), tmp_path / "epoch.pth")


def test_a_checkpoint_appears_only_when_complete(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoints.save({"iteration": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="last.pth cannot be written .*No space left.*: free some space"):
        checkpoints.save({"iteration": 2}, path)
    assert checkpoints.load(path) == {"iteration": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth", RECORD}
