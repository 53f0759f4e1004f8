"""The one exception that the laboratory shows to a person."""


class UserError(Exception):
    """Something the user can mend. Its message is one clear sentence; the command line exits with code 2."""
