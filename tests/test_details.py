"""What tests/details.py undoes is there to be undone."""

import re

from details import UNDONE
from helpers import ROOT


def test_every_numbered_detail_can_be_undone():
    page = (ROOT / "docs" / "implementation_details.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", page, re.MULTILINE)]
    assert list(UNDONE) == numbers == list(range(1, len(numbers) + 1))
    for number, undos in UNDONE.items():
        for undo in undos:
            assert (ROOT / undo.path).read_text(encoding="utf-8").count(undo.old) == 1, (number, undo)
            assert all((ROOT / word).exists() for word in undo.tests.split() if word.startswith("tests/"))
