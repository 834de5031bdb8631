# SPDX-License-Identifier: Apache-2.0
"""Serving a bundle: model repositories for Triton Inference Server, and where that server is."""
