# SPDX-License-Identifier: Apache-2.0
"""Segments in, ONNX graphs out."""
