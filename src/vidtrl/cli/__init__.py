"""The `vidtrl` command."""
