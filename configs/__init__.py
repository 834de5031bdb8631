# SPDX-License-Identifier: Apache-2.0
"""Caching configs, what policies declare, and the errors: what every other package may import."""
