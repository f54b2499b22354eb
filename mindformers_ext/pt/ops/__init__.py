# SPDX-License-Identifier: Apache-2.0
"""Operators of the PyTorch networks, and the choice between their implementations."""
