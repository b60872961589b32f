"""Report the spectral norms of a checkpoint: readers of files, the measurement, and its table.

`spectral_core.report` imports this package when it is called; importing `spectral_core` does not.
"""
