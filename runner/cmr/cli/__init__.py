"""The commands: one file each; only this package prints, exits or reads the command line."""
