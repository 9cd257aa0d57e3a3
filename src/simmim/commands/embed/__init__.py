"""Features of a folder's images, what they are worth, and what they look like.

`table` is what is found and its file, `scores` tells what it is worth, `pictures` draws maps and
neighbours, and `command` puts them together.
"""

from simmim.commands.embed.command import embed

__all__ = ["embed"]
