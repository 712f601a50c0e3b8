"""GoCM: takes push notifications over HTTP, answers at once, delivers them to Google. Start reading in gocm.py."""

__version__ = "0.2.0"
