"""A masking, target, head, loss or encoder by its name or by its import path.

- `names`: finds and builds it; a user's own is imported only where the user trusts it
- `checks`: what a user's own part must give, tried before any data are read
"""
