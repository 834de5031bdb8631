# SPDX-License-Identifier: Apache-2.0
"""The command line's verbs, one file each; `options` and `screen` are what they share."""
