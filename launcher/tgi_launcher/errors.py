"""The ways a start or a run of the launcher ends early. One tree; raised anywhere, printed once by `cli.main`.

The class names are those TGI prints (`Error: ArgumentValidation("...")`), because scripts look for them. Every error
exits with status 1; what cannot be parsed at all is click's business and exits with 2.
"""

import json


class LauncherError(Exception):
    """Base. `sentence` says what is wrong and what to do; it may be empty when it was logged already."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        """As TGI prints it: the name, then the sentence in quotes where there is one."""
        name = type(self).__name__
        return f"{name}({json.dumps(self.sentence, ensure_ascii=False)})" if self.sentence else name


class ArgumentValidation(LauncherError):
    """Flags that contradict each other, the model or the machine."""


class DownloadError(LauncherError):
    """The model could not be brought to this machine."""


class ShardCannotStart(LauncherError):
    """A shard died, or made no progress, before the group was ready for the first time."""


class ShardFailed(LauncherError):
    """Shards kept dying after they had been ready, more often than the restart budget allows."""


class WebserverCannotStart(LauncherError):
    """The router ended, or made no progress, before it served."""


class WebserverFailed(LauncherError):
    """The router ended while it served."""
