"""The error of everything a user can put right."""


class LaAciqError(ValueError):
    """A request that cannot be carried out as given.

    The message is one sentence that names the argument or file, its value, and what was expected. The command line
    prints it without a traceback and exits with status 2.
    """


class UnavailableError(LaAciqError, RuntimeError):
    """A backend that was asked for and cannot run: here, or on these tensors."""
