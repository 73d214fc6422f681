"""Define the one error that the user can fix."""


class UserError(ValueError):
    """A mistake in what the user gave. The message is one paragraph: the value, its place, the fix.

    Programs print it without a traceback and exit with code 2.
    """
