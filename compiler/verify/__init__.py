# SPDX-License-Identifier: Apache-2.0
"""Is a bundle right: its bytes, its engines, its policies."""
