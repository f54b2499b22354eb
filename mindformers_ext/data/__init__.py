# SPDX-License-Identifier: Apache-2.0
"""Text to samples: readers, prompt templates, tokenizers, packing."""
