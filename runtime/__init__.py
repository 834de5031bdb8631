# SPDX-License-Identifier: Apache-2.0
"""Run a bundle: sessions, the diffusers drop-in, traces, benchmarks."""
