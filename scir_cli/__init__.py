"""Self-Consistent Internal Rewards (arXiv 2502.08922) as a command-line toolkit.

Importing this package does nothing.
"""

__version__ = "0.1.0"
