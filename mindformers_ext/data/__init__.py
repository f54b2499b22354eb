# SPDX-License-Identifier: Apache-2.0
"""Text to rows of tokens: readers, conversations, tokenizers, packing, the order of rows."""
