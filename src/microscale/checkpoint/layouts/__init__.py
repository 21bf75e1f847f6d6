"""Layouts of checkpoints: our own and those of other programs, one file each.

A layout says which packed tensors it carries, how each is stored, and how its files say so.
`microscale.checkpoint.export` writes and reads them.
"""
