"""Filter rules, a file each."""
