# SPDX-License-Identifier: Apache-2.0
"""What a job may ask of a framework, and the one door through which an engine is opened."""
