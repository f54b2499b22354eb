# SPDX-License-Identifier: Apache-2.0
"""What belongs to a run of any mode: checks before it, its data, what it measures, pictures and reports."""
