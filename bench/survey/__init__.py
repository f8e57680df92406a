"""The survey of Tay et al. (arXiv:2009.06732v3) and the variants here: `python -m bench.survey`.

`rows` has the facts of its Table 1; `page` sets the variants, their claims and measured exponents beside it.
"""
