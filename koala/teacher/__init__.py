"""The teacher: from the Hub, a folder or a single file, LoRAs fused; or tiny, and trained here."""
