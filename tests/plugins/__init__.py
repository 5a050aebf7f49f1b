"""Plugins as a user would write them: a module each, named in a recipe's `plugins`."""
