"""What everyone may import, and what imports nothing of ours.

- `errors`: a user's mistake as one sentence with the remedy
- `files`: files written whole or not at all, and configs read from them
- `progress`: progress bars and status lines
"""
