# SPDX-License-Identifier: Apache-2.0
"""A transformer's own forward → segments. Read `models`, `trace`, `tidy`, `blocks`, `classes`, `partition`, `cut`."""
