"""What a push is, how each upstream wants it, and what an upstream's answer means.

All of it is pure: no clock, no socket, no file.
"""
