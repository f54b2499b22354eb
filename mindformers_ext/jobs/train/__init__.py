# SPDX-License-Identifier: Apache-2.0
"""Training by our own loop."""
