import nanodit_path  # noqa: F401
