"""The bytes between processes: control frames, call messages, payloads. Nothing here decides."""
