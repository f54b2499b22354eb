# SPDX-License-Identifier: Apache-2.0
"""What a tensor is called where: a table of rules per family; conversion, layouts, cutting and merging."""
