"""From words on the command line to a trained model.

- `configuration`: finds configs by name and reads what the line asks for
- `task`, `tasks`: the four tasks: their model, data and callbacks
- `lightning`: the LightningCLI that they share
- `trust`: what of a user's own may be imported; `help`: the pages of --help
"""
