# SPDX-License-Identifier: Apache-2.0
"""What MindFormers sees of us: the only folder that imports mindformers."""
