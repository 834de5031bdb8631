# SPDX-License-Identifier: Apache-2.0
"""A bundle inside a diffusers pipeline."""
