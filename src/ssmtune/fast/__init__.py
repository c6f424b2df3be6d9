"""Rewritten decoder layers: the same function as the model's own, with less memory traffic.

One file per family that has one, named like the family's file. What a layer cannot serve keeps the model's own forward.
"""
