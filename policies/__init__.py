# SPDX-License-Identifier: Apache-2.0
"""Cache policies: the table of all there are, in the order in which they are listed."""

from __future__ import annotations

from ..configs.errors import ConfigError, nearest
from .adacache import AdaCache
from .base import Policy
from .custom import Custom
from .easycache import EasyCache
from .firstblock import FirstBlock
from .magcache import MagCache
from .off import Off
from .solved import Solved
from .taylorseer import TaylorSeer
from .teacache import TeaCache

__all__ = ["POLICIES", "policy"]

POLICIES: dict[str, type[Policy]] = {
    "off": Off,
    "teacache": TeaCache,
    "taylorseer": TaylorSeer,
    "adacache": AdaCache,
    "custom": Custom,
    "magcache": MagCache,
    "easycache": EasyCache,
    "firstblock": FirstBlock,
    "solved": Solved,
}


def policy(name: str) -> Policy:
    """Return the policy called ``name``.

    Raises:
        ConfigError: there is none; says which is nearest.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy '{name}'", "is not known", nearest(name, list(POLICIES)))
    return POLICIES[name]()
