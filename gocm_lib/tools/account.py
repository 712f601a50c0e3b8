"""Service account files in Google's own form, for who stands in for Google: the sandbox, and the v1 door."""

import json
import os
from typing import Any

from gocm_lib.config.settings import Exit, Fatal


def write(path: str, project: str, key_id: str, token_uri: str) -> None:
    """Write an account with a new key of this id, which gets its access tokens at this address. Raises Fatal."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa
    except ImportError:
        raise Fatal(f"making {path} needs cryptography: pip install 'gocm[fcm]'", Exit.SENDER) from None
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    account: dict[str, Any] = {
        "type": "service_account",
        "project_id": project,
        "private_key_id": key_id,
        "private_key": pem.decode(),
        "client_email": f"gocm@{project}.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": token_uri,
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump(account, file, indent=2)
    except OSError as error:
        raise Fatal(f"{path} cannot be written: {error.strerror}", Exit.SPOOL_UNWRITABLE) from None
