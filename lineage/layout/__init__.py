"""The layout algebra: operations on tensors, templates of names, and mappings made of both."""
