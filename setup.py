"""Packaging: `pip install .` gives the command `gocm`; `pip install -e '.[test]'` what the tests need besides."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TEST = [
    *("pytest>=8", "hypothesis>=6.100", "ruff~=0.17.0", "trustme>=1.1", "h11>=0.14", "prometheus_client>=0.20"),
    *("pytest-xdist>=3.6", "mypy>=1.18", "selenium>=4.20", "schemathesis>=4.0", "proxy.py>=2.4"),
    *("markdown-it-py>=3", "pyyaml>=6", "requests>=2.31", "h2>=4.2", "hpack>=4.1", "httpx[http2]>=0.28"),
    "google-api-python-client==2.202.0",  # for the discovery document that the schema of FCM v1 is compared with
]
# Below the floors there are known holes, such as CVE-2025-66418 and CVE-2026-21441 of urllib3.
FCM = ["google-auth[urllib3]>=2.47"]
POSTGRES = ["psycopg[binary]>=3.2"]

setup(
    name="gocm",
    # Read, not imported: importing would need urllib3 while building.
    version=re.search(r'__version__ = "(.+)"', (HERE / "gocm_lib/__init__.py").read_text())[1],
    description="Takes push notifications over HTTP, answers at once, delivers them to Google",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["gocm_lib", "gocm_lib.*"]),
    package_data={"gocm_lib": ["py.typed"], "gocm_lib.front": ["status.html"], "gocm_lib.help": ["*.md"]},
    py_modules=["gocm"],
    install_requires=["urllib3>=2.7,<3"],
    extras_require={
        "fcm": FCM,
        "postgres": POSTGRES,
        "test": [*FCM, *POSTGRES, *TEST],
    },
    entry_points={"console_scripts": ["gocm=gocm_lib.__main__:main"]},
)
