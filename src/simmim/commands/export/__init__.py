"""Write an encoder or a classifier for use without simmim, checked against the original.

`source` says what is exported, `timm_folder` and `graph` write the formats, `check` compares what
was written with the model in memory, `model_card` describes it, and `command` puts them together.
"""

from simmim.commands.export.command import Exported, export

__all__ = ["Exported", "export"]
