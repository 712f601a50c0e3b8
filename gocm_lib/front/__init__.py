"""From a client to the spool: listens, reads strictly, commits, and only then answers `ok`.

Never speaks with the senders: both meet in the state.
"""
