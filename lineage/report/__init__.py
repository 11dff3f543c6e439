"""Reports: one file a medium, every figure and sentence from the record."""
