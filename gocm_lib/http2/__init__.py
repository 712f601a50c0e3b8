"""HTTP/2 (RFC 9113) without a socket: bytes in, events out. Senders speak it to Google, the sandbox to anybody.

Promises that no peer makes us hold more than the limits named here, whatever it sends.
"""
