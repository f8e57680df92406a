"""The scenarios of a cell: a plan on fake tensors, the cost of a step, and the quality of a trained model.

`bench.run.cell` selects the scenarios of a cell and runs them in order. Each scenario reports its figures, by
record key, as soon as it has them, so that they survive a later failure.
"""
