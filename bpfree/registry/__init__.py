"""The registry of known plugins: an entry for each, the certificates of its rules, and an index made from both."""

from bpfree.registry.certificates import certificates, core_changed, stale, state
from bpfree.registry.entries import Entry, entry_of, read_entries, read_entry, to_toml
from bpfree.registry.folder import registry_folder
from bpfree.registry.index import build_index, read_index, renew
from bpfree.registry.validation import measured_on_another_core, missing, problems

__all__ = [
    "Entry",
    "build_index",
    "certificates",
    "core_changed",
    "entry_of",
    "measured_on_another_core",
    "missing",
    "problems",
    "read_entries",
    "read_entry",
    "read_index",
    "registry_folder",
    "renew",
    "stale",
    "state",
    "to_toml",
]
