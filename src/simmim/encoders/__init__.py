"""What `simmim.encoder` is made of.

- `dry_run`: what a timm model does with an image: its stem, its layers, what it leaves out
- `visible_tokens`: a ViT that sees visible tokens alone
- `visible_windows`, `attention`: the same of a Swin, and fused attention in windows
- `custom`: an encoder of a user's own
"""
