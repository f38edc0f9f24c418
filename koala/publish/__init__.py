"""From a distilled pipeline to a release: gate, card, folder, Hub, S3."""
