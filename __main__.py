# SPDX-License-Identifier: Apache-2.0
"""``python -m freewheel``, as launchers such as torchrun start it."""

from .cli import main

if __name__ == "__main__":
    main()
