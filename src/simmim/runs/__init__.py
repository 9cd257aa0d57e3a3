"""A run on the disk.

- `folder`: where a run lives, and which run goes on
- `checkpoints`: when they are written, and that they are whole
- `loggers`: metrics.csv and the W&B board
"""
