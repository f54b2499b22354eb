# SPDX-License-Identifier: Apache-2.0
"""Code that is saved with a LLaMA-MoE model and run there by transformers (``trust_remote_code=True``).

Nothing of this package imports it, and it imports nothing of this package: a saved model stands alone.
"""
