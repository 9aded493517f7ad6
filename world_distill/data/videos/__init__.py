"""Videos as training clips: finding them with their texts, and reading their frames."""
