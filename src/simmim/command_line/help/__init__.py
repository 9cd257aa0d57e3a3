"""What `--help` says, at once: nothing here imports torch.

`task` is the page of a task's subcommand, `function` that of a command that is a plain function,
`layout` what both look like.
"""

from simmim.command_line.help.function import groups_of, page_of_function
from simmim.command_line.help.layout import HELP, asked, fill, table
from simmim.command_line.help.task import page_of_task

__all__ = ["HELP", "asked", "fill", "groups_of", "page_of_function", "page_of_task", "table"]
