"""Commands of the command line, a module for each group; `kpt.cli` puts them together."""
