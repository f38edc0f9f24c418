"""Images of simple shapes, and what the demo needs around them to run without a network: a server, a table, a checker."""
