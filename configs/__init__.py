"""The configs that come with world_distill: one file a family, each with `get_config(arg)`.

`--config NAME[:ARG]` finds them here, `--config path/to/file.py[:ARG]` takes one of your own. A config
that starts from another calls `world_distill.config.load_config("other:arg")` and changes what differs.
"""
