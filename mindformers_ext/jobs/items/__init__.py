# SPDX-License-Identifier: Apache-2.0
"""Work mapped over items: in this process, in several, or on the machines of a Ray cluster."""
