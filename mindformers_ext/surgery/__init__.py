# SPDX-License-Identifier: Apache-2.0
"""Methods that make new weights out of others: merging, and experts out of dense parts; no files."""
