"""The pattern gallery: which tokens a token reads, from gradients of the modules themselves.

`reads` takes the gradients, `draw` makes the pictures, `python -m bench.tools.gallery` writes them.
"""
