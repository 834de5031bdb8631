# SPDX-License-Identifier: Apache-2.0
"""Cuts for one sequence over ranks: graphs of a finished cut, divided where tokens meet."""
