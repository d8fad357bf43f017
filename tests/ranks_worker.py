"""One of the processes of tests/test_ranks.py: some steps of methods on its share of the batches, saved to a file."""

import json
import sys
from datetime import timedelta

import torch
from helpers import method
from torch import distributed as dist

from sdcl import ranks
from sdcl.methods import get
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.networks import build_network, resnet, unet, vnet
from sdcl.runs.devices import place
from sdcl.steps import add_teacher, make_learners, pretrain_step

BATCH, STEPS = 6, 2  # of each stage
SHAPES = {2: (32, 48), 3: (32, 16, 32)}
NETWORKS = {2: ("unet", "resunet"), 3: ("vnet", "resvnet")}


def quiet_student(name, dtype):
    """Dropout is each process's own: it is off, so that their number makes no difference."""
    network = place(build_network(name, 3), torch.device("cpu")).to(dtype).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout3d):
            module.p = 0.0
    return network


def batch_of(step, shape, dtype, mine):
    draw = torch.Generator().manual_seed(step)
    batch = {}
    for key in ("x_a", "x_b", "u_a", "u_b"):
        batch[key] = torch.randn(BATCH, 1, *shape, generator=draw, dtype=torch.float64)[mine].to(dtype)
    for key in ("y_a", "y_b"):
        batch[key] = torch.randint(3, (BATCH, *shape), generator=draw, dtype=torch.uint8)[mine]
    return batch, copy_paste_mask(shape, box_size(shape, 2 / 3), draw)


def train(name, dimensions, precision):
    """Return the losses of each step and the weights after them."""
    torch.manual_seed(0)
    dtype, shape = getattr(torch, precision), SHAPES[dimensions]
    learners = make_learners(*(quiet_student(net, dtype) for net in NETWORKS[dimensions]), 1e-3)
    settings = method(
        method=name, dice="batch" if dimensions == 2 else "sample", connectivity=8 if dimensions == 2 else 26, noise=0.0
    )
    share = BATCH // ranks.count()
    mine = slice(ranks.rank() * share, (ranks.rank() + 1) * share)
    losses, chosen = [], get(name)
    for step in range(2 * STEPS):
        if step == STEPS:
            learners.keep(chosen.students)
            learners.iteration = 0
            if chosen.has_teacher:
                add_teacher(learners)
        do = pretrain_step if step < STEPS else chosen.self_train_step
        named = do(learners, *batch_of(step, shape, dtype, mine), settings)
        learners.iteration += 1
        losses.append({key: float(value) for key, value in named.items()})
    weights = {role: network.state_dict() for role, network in learners.networks.items()}
    return {"losses": losses, "weights": weights}


def narrow():
    """A quarter of the networks' widths: float64 convolutions are slow."""
    vnet.WIDTHS = resnet.WIDTHS = unet.WIDTHS = (4, 8, 16, 32, 64)


def main(rank, count, meeting, output, cases):
    torch.set_num_threads(1)
    narrow()
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=120)
        )
    torch.save([train(*case) for case in cases], output)
    if count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
