"""Options that every command refuses before it loads a model."""

BAD_OPTIONS = [
    (("--limit", "0"), "--limit 0 must be at least 1"),
    (("--batch-size", "-1"), "--batch-size -1"),
    (("--dtype", "int8"), "--dtype 'int8'"),
    (("--device", "cuda:77"), "--device 'cuda:77' is not available"),
    (("--json", "/no/such/folder/c.json"), "there is no folder '/no/such/folder'"),
    (("--json", "/tmp"), "is a folder"),
    (("--picture", "/no/such/folder/c.png"), "there is no folder"),
    (("--picture", "c.bmp"), "'.bmp'"),
    (("--text", "/no/such/text"), "does not exist"),
]


def not_loaded(*_: object, **__: object) -> None:
    """Stand in for what loads a model."""
    raise AssertionError("loaded before everything was checked")
