"""The turn engine's rules: partitions, sessions, turns, fairness, adapters. Keys, positions and states, no content,
no I/O.
"""
