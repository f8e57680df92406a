"""Claims of the literature about long-context attention, each checked against an experiment's records.

Each claim is one file `claim_NN_words.py`, found by its name; no list contains them. See `bench.claims.base`.
"""
