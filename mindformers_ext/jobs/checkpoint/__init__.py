# SPDX-License-Identifier: Apache-2.0
"""Weights in files: opened, converted, compared, cut and merged anew, described."""
