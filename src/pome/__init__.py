"""pome: replace the update of FFN matrices by its equalized truncated SVD (POME, arXiv 2510.06627)."""

__version__ = "0.1.0"
