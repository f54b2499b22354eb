# SPDX-License-Identifier: Apache-2.0
"""Masks of structured pruning and the pruned weights, numpy only."""
