"""From a client to the spool: listens, reads strictly, commits, and only then answers `ok`.

Never imports the senders: the two meet in the state.
"""
