# SPDX-License-Identifier: Apache-2.0
"""Runs that several processes share, over torch.distributed."""
