# SPDX-License-Identifier: Apache-2.0
"""Operators in two forms, portable and Ascend, chosen once."""
