"""The gallery of attention masks: which tokens each token reads, from gradients of the modules.

`reads` computes the gradients, `draw` draws the pictures, and `python -m bench.tools.gallery` writes them.
"""
