"""A new plugin, written from templates (``*.tmpl`` beside this file)."""

from bpfree.template.write import next_commands, write_plugin

__all__ = ["next_commands", "write_plugin"]
