"""The one exception that means: the user can fix this."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input. Its message is one sentence that names thing and remedy; the CLI prints it and exits with 1."""
