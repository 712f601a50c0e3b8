"""The shared state: one process, which alone changes what is waiting, sent and counted.

Promises that what it has answered for is on disk. Other rooms know it by `contract` and `client` alone.
"""
