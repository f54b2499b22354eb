# SPDX-License-Identifier: Apache-2.0
"""Answers and perplexities of a network."""
