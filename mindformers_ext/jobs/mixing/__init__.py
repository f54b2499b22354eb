# SPDX-License-Identifier: Apache-2.0
"""Proportions of a data mixture before and behind training: what they mean, what runs have shown, what is best."""
