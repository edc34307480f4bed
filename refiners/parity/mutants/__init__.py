"""Planted faults: what a suite tells, what it misses, and what each input of a case is good for."""
