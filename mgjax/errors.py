"""The one base of all errors that a user can mend."""


class InputError(ValueError):
    """Something the user gave does not fit; the message says what, where, and what to do.

    Command lines show it as one line; libraries catch it, or the subclass of the module.
    """
