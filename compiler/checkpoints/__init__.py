# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, and how its weights come into a bundle."""
