"""The protocols that an upstream may speak. Each dialect writes requests and reads answers. Pure."""

from types import ModuleType

from gocm_lib.message import fcm, gcm

DIALECTS: dict[str, ModuleType] = {gcm.NAME: gcm, fcm.NAME: fcm}
