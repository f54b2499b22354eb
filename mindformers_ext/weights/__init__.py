# SPDX-License-Identifier: Apache-2.0
"""What a tensor is called where: one rule table per model."""
