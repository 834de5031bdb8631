# SPDX-License-Identifier: Apache-2.0
"""What a run will do, told before it starts."""
