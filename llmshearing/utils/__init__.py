# SPDX-License-Identifier: Apache-2.0
"""LLM-Shearing's commands under their names; see mindformers_ext/cli/shearing.py."""
