"""The tests: a package with a file of its own, because some libraries install a package of this name too."""
