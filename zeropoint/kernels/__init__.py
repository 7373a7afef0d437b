"""Operators on quantized weights:

`ops` (the contract), `select` (which kernel), and one file per kernel.
"""
