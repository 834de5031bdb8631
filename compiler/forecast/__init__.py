# SPDX-License-Identifier: Apache-2.0
"""What a build and its runs will take, told from the model's cut."""
