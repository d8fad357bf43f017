"""The one exception that a user sees as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; the message is one sentence that names the file or flag and the way out."""
