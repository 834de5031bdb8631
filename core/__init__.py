# SPDX-License-Identifier: Apache-2.0
"""What every part may import, and what imports none of them."""
