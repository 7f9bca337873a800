"""The one error of the data layer."""


class DataError(ValueError):
    """Bad data or a bad request about data, in one line: what, where, what to do."""
