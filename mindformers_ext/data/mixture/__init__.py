# SPDX-License-Identifier: Apache-2.0
"""The data mixture: domains drawn row by row by proportions that may move with their losses. Numpy only."""
