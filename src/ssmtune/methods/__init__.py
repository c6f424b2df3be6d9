"""One file per method: what it trains, where it may act, how many parameters it adds, and the edit itself.

A method is found by its file: `ssmtune.methods.<name>` holds a constant `METHOD`.
"""
