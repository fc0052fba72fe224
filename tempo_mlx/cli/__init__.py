"""The command line: one module a command. Importing it loads no tensor library."""
