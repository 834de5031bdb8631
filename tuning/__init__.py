# SPDX-License-Identifier: Apache-2.0
"""Choose cache settings by measurement: calibrate, solve, tune, report."""
