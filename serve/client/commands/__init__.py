"""The subcommands of `python -m serve.client`: each a module with options of its own."""
