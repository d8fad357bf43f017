import pytest
import torch
from torch import nn

from sdcl.networks import build_network
from sdcl.teacher import update_teacher


def test_parameters_buffers_and_the_rounded_counter():
    teacher, student = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    for network, value, counter in ((teacher, 1.0, 3), (student, 2.0, 10)):
        nn.init.constant_(network.weight, value)
        network.running_mean.fill_(value)
        network.num_batches_tracked.fill_(counter)
    update_teacher(teacher, student, 0.9, buffers=True)
    assert teacher.weight.item() == pytest.approx(1.1)
    assert teacher.running_mean.item() == pytest.approx(1.1)
    assert teacher.num_batches_tracked.item() == 3  # 3.7, rounded down
    assert student.weight.item() == 2
    update_teacher(teacher, student, 0.5, buffers=False)
    assert teacher.weight.item() == pytest.approx(1.55)
    assert teacher.running_mean.item() == pytest.approx(1.1)


@pytest.mark.parametrize("name", ["unet", "vnet"])
@pytest.mark.parametrize("laid_out", [torch.channels_last, torch.contiguous_format])
def test_every_number_moves_whatever_the_memory_layout(name, laid_out):
    """Of a student that lies in memory as the teacher does, and of one that does not."""
    torch.manual_seed(0)
    teacher, student = build_network(name, 2), build_network(name, 2)
    if name == "unet":
        teacher, student = teacher.to(memory_format=torch.channels_last), student.to(memory_format=laid_out)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    update_teacher(teacher, student, 0.9, buffers=True, halted=torch.zeros(()))
    for key, value in teacher.state_dict().items():
        expected = 0.9 * before[key] + 0.1 * student.state_dict()[key]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-5, atol=1e-6)


def test_numbers_with_gaps_between_them_are_refused():
    networks = [nn.Linear(3, 2), nn.Linear(3, 2)]
    for network in networks:
        network.weight = nn.Parameter(torch.zeros(2, 5)[:, :3])
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and strides \(5, 1\) is not one piece of memory"):
        update_teacher(*networks, 0.9, buffers=True)


def test_no_gradient_reaches_the_teacher():
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    update_teacher(teacher, student, 0.99, buffers=True)
    assert all(p.is_leaf and p.grad_fn is None for p in teacher.parameters())  # a tracked update would leave a graph
    teacher(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is None for p in student.parameters())


def test_a_halted_teacher_takes_nothing_of_a_student_that_is_nan():
    teacher, student = build_network("unet", 2), build_network("unet", 2)
    for value in student.state_dict().values():
        value.fill_(torch.nan) if value.is_floating_point() else None
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(teacher, student, 0.99, buffers=True, halted=torch.ones(()))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
