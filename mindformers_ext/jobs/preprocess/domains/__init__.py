# SPDX-License-Identifier: Apache-2.0
"""A corpus by domain: blocks encoded into parts, parts packed into the folder that a mixture reads."""
