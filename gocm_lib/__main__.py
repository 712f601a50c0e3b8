"""Where every process of GoCM starts that a user starts: before anything slow is imported."""

import os
import sys

import gocm_lib


def main() -> int:
    """Run this process's command; returns the exit code."""
    # The server leaves the directory that it was started in; python gocm.pyz is found by a name that means something
    # only there.
    sys.path[:] = [os.path.abspath(place) for place in sys.path]
    gocm_lib.__path__[:] = [os.path.abspath(place) for place in gocm_lib.__path__]
    from gocm_lib.process import early

    early.listen()
    early.fill_standard_files()
    from gocm_lib import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
