"""Whole updates written out from the papers' equations, in float64 and plain tensor operations: what `check_update` compares with."""
