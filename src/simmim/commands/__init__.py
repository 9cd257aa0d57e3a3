"""The commands beside the four tasks, a room each.

- `functions`: what the table of `simmim.cli` calls; options are the functions' arguments
- `doctor`, `compare`, `embed`, `export`, `convert`, `report`, `benchmark`
"""
