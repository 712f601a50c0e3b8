"""What every process of ours has: its start, its log, its CPU, its time limits.

Knows nothing of pushes: it could serve another program as well.
"""
