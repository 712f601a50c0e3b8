"""How a client's mistake is told. Pure."""


class BadRequest(Exception):
    """A client's mistake: `error` is a sentence, `field` the field at fault, then the HTTP status; for a wrong method
    `allow` lists the right ones.
    """

    def __init__(self, error: str, field: str = "", status: int = 400, allow: str = "") -> None:
        super().__init__(error)
        self.error = error
        self.field = field
        self.status = status
        self.allow = allow
