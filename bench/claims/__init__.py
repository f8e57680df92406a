"""What is said of long-context attention, held against an experiment's records: a verdict each.

One file a claim, found by its name, `claim_NN_words.py`: nothing lists them. See `bench.claims.base`.
"""
