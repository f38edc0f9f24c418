"""The groups of commands of `koala`, a module each."""
