# SPDX-License-Identifier: Apache-2.0
"""Rows packed of several documents: what their column ``document_ids`` may hold.

A row numbers its documents 1, 2, ... in order; 0 is the padding behind the last one. A token attends to its own
document alone, and positions begin anew in each.
"""

from __future__ import annotations

DOCUMENT_IDS = "document_ids"
MOST_DOCUMENTS = 128  # of a row: a kernel of variable length gets as many lengths for every row, whatever it holds
