"""What makes the pipeline run with no data and no weights from outside: drawn pictures, a server, a tiny teacher."""
