# SPDX-License-Identifier: Apache-2.0

import pytest

from freewheel.core.errors import RequestError
from freewheel.core.limits import LARGEST_SIZE, check_size


def test_sizes_are_taken_up_to_the_limit() -> None:
    check_size("height", LARGEST_SIZE)
    with pytest.raises(RequestError, match=r"--height 32769: is above 32768; give pixels"):
        check_size("height", LARGEST_SIZE + 1)
    with pytest.raises(RequestError, match="give frames"):
        check_size("frames", LARGEST_SIZE + 1)
