"""The protocols that an upstream may speak: of each, how requests are written and answers are read. Pure."""

from types import ModuleType

from gocm_lib.message import fcm, gcm

DIALECTS: dict[str, ModuleType] = {gcm.NAME: gcm, fcm.NAME: fcm}
