#!/usr/bin/env python3
"""GoCM takes push notifications over plain HTTP, answers at once, and delivers them to Google in the background."""

from gocm_lib.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
