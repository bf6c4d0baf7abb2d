"""The errors that a user of CMR may meet; each message says what was found and what would work."""


class CMRError(Exception):
    """A failure that the user can understand and act upon; the command line prints it and exits with 2."""


class FileError(CMRError):
    """A file is missing, unreadable, damaged, or of a kind that CMR does not read."""


class ModelError(CMRError):
    """A model's architecture, sizes, tensors or vocabulary are not supported or contradict each other."""


class PluginError(CMRError):
    """A plugin is unknown, conflicts with another, has wrong options, or failed while it ran."""


class RequestError(CMRError):
    """A request cannot be served: a bad option value, or a prompt that does not fit the context."""
