"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: one line says what, where and what to do next; the command line exits with 2."""
