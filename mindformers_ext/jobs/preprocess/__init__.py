# SPDX-License-Identifier: Apache-2.0
"""From text to records that training reads, and back to text for people."""
