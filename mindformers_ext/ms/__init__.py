# SPDX-License-Identifier: Apache-2.0
"""MindSpore networks."""
