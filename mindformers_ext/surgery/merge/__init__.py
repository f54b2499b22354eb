# SPDX-License-Identifier: Apache-2.0
"""Merge methods as pure functions of tensors: one file per method, one registry; nothing here knows about files."""
