"""What every process of ours has: its log, its edge, its place, its time limits.

Promises nothing about pushes: it could serve another program as well.
"""
