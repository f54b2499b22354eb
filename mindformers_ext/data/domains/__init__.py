# SPDX-License-Identifier: Apache-2.0
"""Texts by domain: documents, filters, splits, and the prepared folder that a mixture reads."""
