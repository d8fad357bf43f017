import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdcl.mixing import box_size, copy_paste_mask, mix


@st.composite
def shapes_and_boxes(draw):
    shape = draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    return shape, [draw(st.integers(1, side - 1)) for side in shape]


@given(shapes_and_boxes(), st.integers(0, 2**31))
def test_mask_is_one_box_that_starts_below_the_upper_end(shape_and_box, seed):
    shape, box = shape_and_box
    mask = copy_paste_mask(shape, box, torch.Generator().manual_seed(seed))
    assert mask.dtype == torch.bool and list(mask.shape) == shape
    inside = (~mask).nonzero()
    assert (inside.amax(0) - inside.amin(0) + 1).tolist() == box
    assert len(inside) == torch.tensor(box).prod()
    assert all(corner < side - b for corner, side, b in zip(inside.amin(0).tolist(), shape, box, strict=True))


def test_every_corner_occurs_and_the_generator_decides():
    corners = {int((~copy_paste_mask((6,), (3,), torch.Generator().manual_seed(s))).nonzero()[0]) for s in range(50)}
    assert corners == {0, 1, 2}  # 3 would fit too, but the published range leaves it out
    first, second = (copy_paste_mask((64, 64), (42, 42), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("shape", "box"), [((4, 4), (4, 2)), ((4,), (0,)), ((4, 4), (2,))])
def test_impossible_boxes_are_refused(shape, box):
    with pytest.raises(ValueError, match="must be smaller than the shape"):
        copy_paste_mask(shape, box)


def test_published_boxes():
    assert box_size((112, 112, 80), 2 / 3) == (74, 74, 53)
    assert box_size((96, 96, 96), 2 / 3) == (64, 64, 64)
    assert box_size((256, 256), 2 / 3) == (170, 170)
    assert box_size((2, 3), 0.5) == (1, 1)


@pytest.mark.parametrize("fraction", [1.0, 0.06])
def test_a_fraction_that_leaves_no_box_or_nothing_around_it_is_refused(fraction):
    with pytest.raises(ValueError, match="choose a fraction"):
        box_size((16, 16), fraction)


def test_mix_keeps_the_image_where_the_mask_is_true():
    mask = torch.tensor([[True, False], [False, True]])
    image, patch = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert torch.equal(mix(image, patch, mask), torch.eye(2).expand(2, 1, 2, 2))
    labels = mix(torch.full((2, 2, 2), 3, dtype=torch.uint8), torch.zeros(2, 2, 2, dtype=torch.uint8), mask.float())
    assert labels.dtype == torch.uint8 and labels[0].tolist() == [[3, 0], [0, 3]]
