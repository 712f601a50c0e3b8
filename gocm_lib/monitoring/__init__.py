"""What happens is counted, judged, shown and exported.

Promises to change nothing: it reads the state, and the figures of the processes.
"""
