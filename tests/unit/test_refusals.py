"""What RecBole refuses is told in a line; what is wrong elsewhere stays what it is."""

import pytest
import torch
from recbole.utils import early_stopping, ensure_dir

from recbole_mllm.errors import UserError
from recbole_mllm.refusals import told_in_a_line


def test_recboles_own_error_is_a_users_mistake():
    words = r"^RecBole cannot stop: TypeError '>=' not supported .*\(--debug shows where\)$"
    with pytest.raises(UserError, match=words) as found, told_in_a_line("stop"):
        early_stopping("high", 1.0, 0, 3)
    assert isinstance(found.value.__cause__, TypeError)


def test_an_error_deeper_than_recbole_is_recboles_too():
    with pytest.raises(UserError, match="^RecBole cannot read: TypeError stat: "), told_in_a_line("read"):
        ensure_dir([])  # raised by Python's library, which RecBole called


@pytest.mark.parametrize(
    "error", [ValueError("ours"), MemoryError(), torch.OutOfMemoryError("full"), UserError("ours")]
)
def test_ours_and_want_of_memory_go_through(error):
    def raises():
        raise error

    with pytest.raises(type(error)) as found, told_in_a_line("do it"):
        raises()
    assert found.value is error
