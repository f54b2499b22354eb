# SPDX-License-Identifier: Apache-2.0
"""Pruning in one shot: what a pass over some text measures says which units stay."""
