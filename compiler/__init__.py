# SPDX-License-Identifier: Apache-2.0
"""Checkpoint in, bundle out: cut, trace, bring weights, compile."""
