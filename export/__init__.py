"""ONNX export and the sessions that run what was exported; import it as ``fastddpm.export``."""

if __name__ != "fastddpm.export":
    # The folder stands at the top of the repository, so a bare `import export` finds it there by accident.
    raise ImportError(
        f"export: the package must be imported as fastddpm.export, got {__name__}; write `from fastddpm import export`"
    )
