# SPDX-License-Identifier: Apache-2.0
"""What the commands do, in folders by subject: the only place where files, engines and surgery meet."""
