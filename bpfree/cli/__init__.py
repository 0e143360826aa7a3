"""The command line: parses words, calls the library, prints. Heavy modules are imported inside commands."""
