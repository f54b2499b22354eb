# SPDX-License-Identifier: Apache-2.0
"""A mixture's layer in PyTorch: routing, experts, losses."""
