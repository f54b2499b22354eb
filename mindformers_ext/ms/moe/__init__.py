# SPDX-License-Identifier: Apache-2.0
"""A mixture's layer in MindSpore: routing, experts, losses."""
