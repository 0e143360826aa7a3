"""A new plugin, written from templates (``*.tmpl`` beside this file)."""

from bpfree.template.write import Kind, next_commands, write_plugin

__all__ = ["Kind", "next_commands", "write_plugin"]
