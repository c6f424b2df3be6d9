"""One file per architecture: which tensor plays which role, and how its operations are replaced.

A family is found by its file: `ssmtune.families.<name>` holds a constant `FAMILY`.
"""
