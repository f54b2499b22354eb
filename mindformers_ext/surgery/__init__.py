# SPDX-License-Identifier: Apache-2.0
"""Methods that make new weights out of others: merging; torch tensors and no files."""
