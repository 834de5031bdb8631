# SPDX-License-Identifier: Apache-2.0
"""The bundle on disk: its manifest, its files, and how they are read."""
